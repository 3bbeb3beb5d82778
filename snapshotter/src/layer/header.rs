//! The canonical header of an entry.
//!
//! One form for each fact, so that equal trees give equal bytes: ustar where the fact fits, one PAX record
//! where it does not (keys sorted), numeric owners without names, no access or change times. Times of whole
//! seconds stay in ustar.
//!
//! ```text
//! offset  0 name 100 | 100 mode 8 | 108 uid 8 | 116 gid 8 | 124 size 12 | 136 mtime 12 | 148 checksum 8
//!       156 type 1 | 157 link 100 | 257 "ustar\0" 6 | 263 "00" 2 | 265 user 32 | 297 group 32
//!       329 major 8 | 337 minor 8 | 345 prefix 155 | 500 zero 12
//! ```

/// What an entry says about its file. Paths are bytes, as the kernel has them.
pub(super) struct Header<'a> {
    pub path: &'a [u8],
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Seconds since 1970, and nanoseconds after them.
    pub mtime: (i64, u32),
    pub link: &'a [u8],
    pub device: (u32, u32),
    /// Sorted by name.
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

pub(super) const BLOCK: usize = 512;

impl Header<'_> {
    /// The header's blocks: a PAX header before the ustar one where that is not enough.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut block = [0; BLOCK];
        let mut records = Vec::new();
        for (name, value) in self.xattrs {
            records.push(record(&[b"SCHILY.xattr.".as_slice(), name].concat(), value));
        }
        if !number(&mut block[116..124], u64::from(self.gid)) {
            records.push(record(b"gid", self.gid.to_string().as_bytes()));
        }
        if !text(&mut block[157..257], self.link) {
            records.push(record(b"linkpath", self.link));
        }
        let whole = u64::try_from(self.mtime.0).is_ok_and(|seconds| number(&mut block[136..148], seconds));
        if !whole {
            number(&mut block[136..148], 0);
        }
        if !whole || self.mtime.1 != 0 {
            records.push(record(b"mtime", decimal(self.mtime).as_bytes()));
        }
        if !self.place_path(&mut block) {
            records.push(record(b"path", self.path));
        }
        if !number(&mut block[124..136], self.size) {
            records.push(record(b"size", self.size.to_string().as_bytes()));
        }
        if !number(&mut block[108..116], u64::from(self.uid)) {
            records.push(record(b"uid", self.uid.to_string().as_bytes()));
        }
        number(&mut block[100..108], u64::from(self.mode));
        number(&mut block[329..337], u64::from(self.device.0));
        number(&mut block[337..345], u64::from(self.device.1));
        seal(&mut block, self.kind);
        if records.is_empty() {
            return block.to_vec();
        }
        let mut blocks = extended(&records.concat());
        blocks.extend_from_slice(&block);
        blocks
    }

    /// Puts the path into name and prefix; where it does not fit, its first bytes, and says so.
    fn place_path(&self, block: &mut [u8; BLOCK]) -> bool {
        if text(&mut block[..100], self.path) {
            return true;
        }
        // The shortest prefix that leaves a name that fits. A slash that ends the path cannot be split at.
        let earliest = self.path.len() - 101;
        let split = self.path[earliest..self.path.len() - 1].iter().position(|byte| *byte == b'/');
        match split.map(|at| self.path.split_at(earliest + at)) {
            Some((prefix, rest)) if !prefix.is_empty() && prefix.len() <= 155 => {
                block[..100].fill(0);
                text(&mut block[..100], &rest[1..]) && text(&mut block[345..500], prefix)
            }
            _ => false,
        }
    }
}

/// Writes bytes, or as many as fit; true if all do.
fn text(field: &mut [u8], bytes: &[u8]) -> bool {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
    length == bytes.len()
}

/// Writes octal digits and a NUL; zeroes, and false, where the number is too large.
fn number(field: &mut [u8], value: u64) -> bool {
    let digits = field.len() - 1;
    let fits = value >> (3 * digits) == 0;
    let mut rest = if fits { value } else { 0 };
    for digit in field[..digits].iter_mut().rev() {
        *digit = b'0' + (rest & 7) as u8;
        rest >>= 3;
    }
    fits
}

fn seal(block: &mut [u8; BLOCK], kind: u8) {
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum = block.iter().map(|byte| u64::from(*byte)).sum();
    number(&mut block[148..155], sum);
    block[154] = 0;
}

/// The PAX header that holds these records, padded.
fn extended(records: &[u8]) -> Vec<u8> {
    let mut block = [0; BLOCK];
    text(&mut block[..100], b"././@PaxHeader");
    for (at, length, value) in
        [(100, 8, 0o644), (108, 8, 0), (116, 8, 0), (124, 12, records.len() as u64), (136, 12, 0)]
    {
        number(&mut block[at..at + length], value);
    }
    seal(&mut block, b'x');
    let mut blocks = block.to_vec();
    blocks.extend_from_slice(records);
    blocks.resize(blocks.len().next_multiple_of(BLOCK), 0);
    blocks
}

/// `LENGTH key=value\n`, where the length counts its own digits.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A time as PAX has it: a decimal number, without zeroes at its end.
fn decimal((seconds, nanoseconds): (i64, u32)) -> String {
    if nanoseconds == 0 {
        return seconds.to_string();
    }
    // -1.25 is two seconds before 1970 and 750,000,000 nanoseconds after that.
    let (sign, whole, fraction) = match seconds {
        0.. => ("", seconds.unsigned_abs(), nanoseconds),
        _ => ("-", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds),
    };
    format!("{sign}{whole}.{fraction:09}").trim_end_matches('0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_decimal() {
        for (time, expect) in [
            ((0, 0), "0"),
            ((-5, 0), "-5"),
            ((1, 500_000_000), "1.5"),
            ((1, 1), "1.000000001"),
            ((-1, 500_000_000), "-0.5"),
            ((-2, 750_000_000), "-1.25"),
        ] {
            assert_eq!(decimal(time), expect);
        }
    }

    #[test]
    fn a_record_counts_its_own_length() {
        for length in [0, 1, 80, 90, 91, 92, 93, 94, 95, 980, 985, 986, 987, 988, 989, 990, 9990] {
            let record = record(b"k", &vec![b'v'; length]);
            let said: usize =
                record.split(|byte| *byte == b' ').next().map(String::from_utf8_lossy).unwrap().parse().unwrap();
            assert_eq!(said, record.len());
        }
    }

    #[test]
    fn a_path_takes_a_pax_record_only_where_ustar_cannot_hold_it() {
        let encode = |path: &str| {
            let header = Header {
                path: path.as_bytes(),
                kind: b'0',
                mode: 0,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: (0, 0),
                link: b"",
                device: (0, 0),
                xattrs: &[],
            };
            header.encode().len() / BLOCK
        };
        let long = "x".repeat(100);
        let too_long = "x".repeat(101);
        for (path, blocks) in [
            (long.clone(), 1),
            (too_long.clone(), 3),
            (format!("d/{long}"), 1),
            (format!("{}/{long}", "d".repeat(155)), 1),
            (format!("{}/{long}", "d".repeat(156)), 3),
            (format!("{}/", "d".repeat(99)), 1),
            (format!("{}/", "d".repeat(100)), 3),
            (format!("e/{}/", "d".repeat(99)), 1),
            (format!("d/{too_long}"), 3),
        ] {
            assert_eq!(encode(&path), blocks, "{path}");
        }
    }
}
