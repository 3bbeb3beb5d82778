//! Reads an archive, one member after the other, believing nothing.
//!
//! The forms are those of `tar_core`: ustar, GNU long names, PAX, and all four ways to say that a file has
//! holes. What it passes over is checked here: numbers in PAX records must be numbers, sizes and ids must
//! fit, an archive must not end in the middle of a thing. Member kinds without content have none, whatever
//! size they declare, as Go's reader has it, which made most of the layers there are.

use std::io::{self, Read};

use tar_core::EntryType;
use tar_core::parse::{Limits, ParseError, ParseEvent, ParsedEntry, Parser};

use super::{MAX_ENTRIES, MAX_PATH, refuse};
use crate::{Error, Result};

/// The most that headers before one member may take, with their map of a sparse file.
const MAX_HEADERS: usize = 4 << 20;
/// The most that PAX records and long names of one member may take.
const MAX_METADATA: u32 = 1 << 20;
const BLOCK: u64 = tar_core::HEADER_SIZE as u64;

pub(super) struct Archive<'a> {
    input: &'a mut dyn Read,
    parser: Parser,
    buffer: Vec<u8>,
    /// What of the buffer is read but not used yet.
    start: usize,
    end: usize,
    /// Of the current member's content, and of the padding after it.
    content_left: u64,
    padding_left: u64,
    members: u64,
    bytes: u64,
    max_bytes: u64,
}

/// What an archive says about one file.
#[derive(Debug)]
pub(super) struct Member {
    /// As it stands in the archive.
    pub path: Vec<u8>,
    pub kind: MemberKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Debug)]
pub(super) enum MemberKind {
    Directory,
    File(Content),
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharacterDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// A file's content, which may have holes.
#[derive(Debug)]
pub(super) struct Content {
    pub size: u64,
    /// What is stored of it: offset and length, ascending; all that is not named is zero.
    pub extents: Vec<(u64, u64)>,
}

impl<'a> Archive<'a> {
    pub(super) fn new(input: &'a mut dyn Read, max_bytes: Option<u64>) -> Archive<'a> {
        let limits =
            Limits { max_metadata_size: MAX_METADATA, max_path_len: Some(MAX_PATH as u32), ..Limits::default() };
        let mut parser = Parser::new(limits);
        // Times before 1970 are errors to it; every number in PAX records is read again below.
        parser.set_ignore_pax_errors(true);
        Archive {
            input,
            parser,
            buffer: vec![0; 64 * 1024],
            start: 0,
            end: 0,
            content_left: 0,
            padding_left: 0,
            members: 0,
            bytes: 0,
            max_bytes: max_bytes.unwrap_or(u64::MAX),
        }
    }

    /// The next member; `None` at the end of the archive. Content that was not read is passed over.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        self.skip_content()?;
        loop {
            let needed =
                match self.parser.parse(&self.buffer[self.start..self.end]).map_err(|e| broken(self.members, &e))? {
                    ParseEvent::NeedData { min_bytes } => min_bytes,
                    ParseEvent::GlobalExtensions { consumed, .. } => {
                        self.start += consumed;
                        continue;
                    }
                    ParseEvent::End { .. } => return Ok(None),
                    ParseEvent::Entry { consumed, entry } => {
                        let (member, stored) = member(&entry, None)?;
                        return self.begin(consumed, member, stored).map(Some);
                    }
                    ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size } => {
                        let extents = sparse_map.iter().map(|extent| (extent.offset, extent.length)).collect();
                        let (member, stored) = member(&entry, Some((real_size, extents)))?;
                        return self.begin(consumed, member, stored).map(Some);
                    }
                };
            if !self.fill(needed)? {
                return self.end_of_input();
            }
        }
    }

    fn begin(&mut self, consumed: usize, member: Member, stored: u64) -> Result<Member> {
        self.start += consumed;
        self.members += 1;
        if self.members > MAX_ENTRIES {
            return Err(Error::Archive { reason: format!("has more than {MAX_ENTRIES} entries") });
        }
        let padded = stored.checked_next_multiple_of(BLOCK).filter(|size| *size <= i64::MAX as u64);
        let padded =
            padded.ok_or_else(|| refuse(&member.path, format!("declares an impossible size of {stored} bytes")))?;
        (self.content_left, self.padding_left) = (stored, padded - stored);
        Ok(member)
    }

    /// Reads until `needed` bytes are there; false where the input ends before.
    fn fill(&mut self, needed: usize) -> Result<bool> {
        // The parser does not know how much a sparse map needs and asks for less than there is.
        let have = self.end - self.start;
        let needed = if needed > have { needed } else { 2 * have };
        if needed > MAX_HEADERS {
            return Err(Error::Archive {
                reason: format!("entry {} has headers of more than {MAX_HEADERS} bytes", self.members + 1),
            });
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        // Growing by doubling keeps what the parser reads again and again in proportion.
        if needed > self.buffer.len() {
            self.buffer.resize(needed.next_power_of_two(), 0);
        }
        while self.end < needed {
            let read = read(self.input, &mut self.buffer[self.end..])?;
            if read == 0 {
                return Ok(false);
            }
            self.count(read)?;
            self.end += read;
        }
        Ok(true)
    }

    /// An archive may lack its final zeroes (umoci's do, with the padding of the last member), and only those.
    fn end_of_input(&self) -> Result<Option<Member>> {
        match self.buffer[self.start..self.end].iter().all(|byte| *byte == 0) {
            true => Ok(None),
            false => Err(Error::Archive {
                reason: format!("ends in the middle of the header of entry {}", self.members + 1),
            }),
        }
    }

    fn count(&mut self, read: usize) -> Result<()> {
        self.bytes += read as u64;
        match self.bytes > self.max_bytes {
            true => {
                Err(Error::Archive { reason: format!("is larger than the {} bytes that are allowed", self.max_bytes) })
            }
            false => Ok(()),
        }
    }

    /// The member's content, some bytes at a time; 0 at its end.
    pub(super) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let read = self.read_some(buffer, self.content_left)?;
        if read == 0 && self.content_left > 0 && !buffer.is_empty() {
            return Err(Error::Archive {
                reason: format!("ends in the middle of the content of entry {}", self.members),
            });
        }
        self.content_left -= read as u64;
        Ok(read)
    }

    fn skip_content(&mut self) -> Result<()> {
        let mut waste = [0; 8192];
        while self.read_content(&mut waste)? > 0 {}
        while self.padding_left > 0 {
            match self.read_some(&mut waste, self.padding_left)? {
                // Nothing of the last member is missing; the parser meets the same end.
                0 => self.padding_left = 0,
                read => self.padding_left -= read as u64,
            }
        }
        Ok(())
    }

    /// 0 at the end of the input.
    fn read_some(&mut self, buffer: &mut [u8], most: u64) -> Result<usize> {
        let most = buffer.len().min(usize::try_from(most).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        if self.start < self.end {
            let length = most.min(self.end - self.start);
            buffer[..length].copy_from_slice(&self.buffer[self.start..self.start + length]);
            self.start += length;
            return Ok(length);
        }
        let read = read(self.input, &mut buffer[..most])?;
        self.count(read)?;
        Ok(read)
    }
}

fn read(input: &mut dyn Read, buffer: &mut [u8]) -> Result<usize> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Archive { reason: format!("cannot be read: {error}") }),
            Ok(read) => return Ok(read),
        }
    }
}

fn broken(members: u64, error: &ParseError) -> Error {
    Error::Archive { reason: format!("entry {} has an invalid header: {error}", members + 1) }
}

/// The member and how many bytes of content it has in the archive.
fn member(entry: &ParsedEntry, sparse: Option<(u64, Vec<(u64, u64)>)>) -> Result<(Member, u64)> {
    let path = entry.path.to_vec();
    let wrong = |reason: &str| refuse(&path, reason);
    let mtime = checked_numbers(entry)?;
    let id = |id: u64| {
        u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| wrong("declares an owner id beyond 32 bits"))
    };
    let (uid, gid) = (id(entry.uid)?, id(entry.gid)?);
    let link = || match entry.link_target.as_deref() {
        None => Err(wrong("is a link without a target")),
        Some(target) if target.contains(&0) => Err(wrong("is a link to a name with a zero byte in it")),
        Some(target) => Ok(target.to_vec()),
    };
    let device = || (entry.dev_major.unwrap_or(0), entry.dev_minor.unwrap_or(0));
    let mut stored = 0;
    let kind = match entry.entry_type {
        EntryType::Regular if path.ends_with(b"/") => {
            stored = entry.size;
            MemberKind::Directory
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => {
            stored = entry.size;
            let (size, extents) = sparse.unwrap_or_else(|| (stored, vec![(0, stored)]));
            check_extents(&path, size, stored, &extents)?;
            MemberKind::File(Content { size, extents })
        }
        EntryType::Directory => MemberKind::Directory,
        EntryType::Link => MemberKind::HardLink(link()?),
        EntryType::Symlink => MemberKind::Symlink(link()?),
        EntryType::Char => MemberKind::CharacterDevice(device().0, device().1),
        EntryType::Block => MemberKind::BlockDevice(device().0, device().1),
        EntryType::Fifo => MemberKind::Fifo,
        other => {
            return Err(wrong(&format!("is of a type that layers do not have ({:?})", char::from(other.to_byte()))));
        }
    };
    if path.contains(&0) {
        return Err(wrong("has a zero byte in its name"));
    }
    let xattrs = entry.xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    Ok((Member { path, kind, mode: entry.mode & 0o7777, uid, gid, mtime, xattrs }, stored))
}

/// Extents must ascend, lie in the file, and be all there.
fn check_extents(path: &[u8], size: u64, stored: u64, extents: &[(u64, u64)]) -> Result<()> {
    let mut end = 0u64;
    let mut total = 0u64;
    for (offset, length) in extents {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= size);
        end = next.ok_or_else(|| refuse(path, "has a sparse map that does not fit its size"))?;
        total += length;
    }
    if total != stored || size > i64::MAX as u64 {
        return Err(refuse(path, format!("declares {size} bytes with {total} of them stored, but stores {stored}")));
    }
    Ok(())
}

/// The time with its fraction, once no number in the records is nonsense.
fn checked_numbers(entry: &ParsedEntry) -> Result<(i64, u32)> {
    let mut mtime = (i64::try_from(entry.mtime).unwrap_or(i64::MAX), 0);
    let mut rest = entry.pax.unwrap_or_default();
    while !rest.is_empty() {
        let record = next_record(&mut rest);
        let (key, value) = record.ok_or_else(|| refuse(&entry.path, "has a malformed PAX record"))?;
        let value = String::from_utf8_lossy(value);
        let wrong = || refuse(&entry.path, format!("has a PAX {} that is no number: {value:?}", key.escape_ascii()));
        match key {
            b"mtime" => mtime = parse_time(&value).ok_or_else(wrong)?,
            b"uid" | b"gid" | b"size" => {
                value.parse::<u64>().map_err(|_| wrong())?;
            }
            _ => {}
        }
    }
    Ok(mtime)
}

/// Takes `LENGTH key=value\n` off the front.
fn next_record<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let space = rest.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
    let record = rest.get(space + 1..length)?.strip_suffix(b"\n")?;
    *rest = &rest[length..];
    let equals = record.iter().position(|byte| *byte == b'=').filter(|at| *at > 0)?;
    Some((&record[..equals], &record[equals + 1..]))
}

/// Seconds with a fraction, perhaps negative. What is finer than a nanosecond is cut off.
fn parse_time(text: &str) -> Option<(i64, u32)> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if !fraction.bytes().chain(whole.bytes()).all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let nanoseconds: u32 = format!("{fraction:0<9}")[..9].parse().ok()?;
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        for (text, expect) in [
            ("0", Some((0, 0))),
            ("1700000000.5", Some((1_700_000_000, 500_000_000))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-3", Some((-3, 0))),
            ("1.0000000019", Some((1, 1))),
            ("", None),
            ("1e3", None),
            ("1.-5", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(parse_time(text), expect, "{text}");
        }
    }
}
