//! Archives that lie. Each is unpacked as a layer, and again as a plain archive into a root that is full of
//! links to the outside; whatever comes of it, nothing panics and nothing outside changes.

use std::os::unix::ffi::OsStrExt;

use super::*;

/// An archive in the making, header by header, with nothing to keep it honest.
#[derive(Clone, Default)]
pub(super) struct Raw {
    bytes: Vec<u8>,
}

/// A header block: what is not said is empty.
pub(super) struct Block<'a> {
    pub name: &'a [u8],
    pub kind: u8,
    pub size: &'a [u8],
    pub link: &'a [u8],
    pub mode: &'a [u8],
    pub uid: &'a [u8],
    pub mtime: &'a [u8],
    pub device: (&'a [u8], &'a [u8]),
    pub magic: &'a [u8],
}

pub(super) const FILE: Block = Block {
    name: b"file",
    kind: b'0',
    size: b"00000000000",
    link: b"",
    mode: b"0000644",
    uid: b"0000000",
    mtime: b"00000000001",
    device: (b"0000000", b"0000000"),
    magic: b"ustar\x0000",
};

impl Block<'_> {
    pub(super) fn bytes(&self) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, self.name);
        put(100, self.mode);
        put(108, self.uid);
        put(116, b"0000000");
        put(124, self.size);
        put(136, self.mtime);
        put(148, b"        ");
        put(156, &[self.kind]);
        put(157, self.link);
        put(257, self.magic);
        put(329, self.device.0);
        put(337, self.device.1);
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

impl Raw {
    pub(super) fn block(mut self, block: Block) -> Raw {
        self.bytes.extend_from_slice(&block.bytes());
        self
    }

    pub(super) fn data(mut self, data: &[u8]) -> Raw {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, name: &str, content: &[u8]) -> Raw {
        let size = format!("{:011o}", content.len());
        self.block(Block { name: name.as_bytes(), size: size.as_bytes(), ..FILE }).data(content)
    }

    pub(super) fn directory(self, name: &str) -> Raw {
        self.block(Block { name: name.as_bytes(), kind: b'5', mode: b"0000755", ..FILE })
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Raw {
        self.block(Block { name: name.as_bytes(), kind: b'2', link: target.as_bytes(), ..FILE })
    }

    pub(super) fn hard_link(self, name: &str, target: &str) -> Raw {
        self.block(Block { name: name.as_bytes(), kind: b'1', link: target.as_bytes(), ..FILE })
    }

    /// A header for the next entry: `x` for PAX, `L` and `K` for GNU's long names.
    pub(super) fn extension(self, kind: u8, data: &[u8]) -> Raw {
        let size = format!("{:011o}", data.len());
        self.block(Block { name: b"extension", kind, size: size.as_bytes(), ..FILE }).data(data)
    }

    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Raw {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest + 1..).find(|length| rest + length.to_string().len() == *length).unwrap();
            data.extend_from_slice(&[format!("{length} {key}=").as_bytes(), value, b"\n"].concat());
        }
        self.extension(b'x', &data)
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes
    }

    fn cut(mut self, length: usize) -> Vec<u8> {
        self.bytes.truncate(length);
        self.bytes
    }
}

/// What must come of a case.
enum Expect {
    /// An error that says this.
    Error(&'static str),
    /// Success, and exactly these paths, each with a word for what it is.
    Files(&'static [&'static str]),
}
use Expect::{Error, Files};

fn cases() -> Vec<(&'static str, Vec<u8>, Expect)> {
    let raw = Raw::default;
    let file = |name: &'static str| raw().file(name, b"data");
    let sized = |size: &'static [u8]| raw().block(Block { size, ..FILE }).end();
    let named = |name: &'static [u8]| raw().block(Block { name, ..FILE }).end();
    let typed = |kind: u8| raw().block(Block { kind, ..FILE }).end();
    let pax = |records: &[(&str, &[u8])]| raw().pax(records).file("file", b"data").end();
    let deep = "d/".repeat(2000);
    let mut cases = vec![
        // Where paths lead.
        ("parent in the path", file("../outside/x").end(), Error("\"..\"")),
        ("parent inside the path", file("a/../../outside/x").end(), Error("\"..\"")),
        ("parent at the end", raw().directory("a/..").end(), Error("\"..\"")),
        ("absolute path", file("/outside/x").end(), Files(&["outside dir", "outside/x file"])),
        ("many slashes", file("//a///b").end(), Files(&["a dir", "a/b file"])),
        ("dots", file("././a/./b").end(), Files(&["a dir", "a/b file"])),
        ("PAX path with a parent", pax(&[("path", b"../outside/x")]), Error("\"..\"")),
        ("PAX absolute path", pax(&[("path", b"/x")]), Files(&["x file"])),
        ("PAX path with a zero byte", pax(&[("path", b"a\0b")]), Error("zero byte")),
        ("PAX empty path", pax(&[("path", b"")]), Error("empty path")),
        (
            "GNU long name with a parent",
            raw().extension(b'L', b"../outside/x\0").file("f", b"1").end(),
            Error("\"..\""),
        ),
        (
            "name of a hole in PAX sparse with a parent",
            pax(&[("GNU.sparse.name", b"../x"), ("GNU.sparse.map", b"0,4"), ("GNU.sparse.size", b"4")]),
            Error("\"..\""),
        ),
        ("empty name", named(b""), Error("empty path")),
        ("a file for the root", named(b"./"), Files(&[])),
        ("a link for the root", raw().symlink(".", "/etc").end(), Error("place of the root")),
        ("a name that is too long", pax(&[("path", &[b'n'; 256])]), Error("more than 255 bytes")),
        ("a path that is too long", pax(&[("path", &[b"d/".repeat(2500), b"f".to_vec()].concat())]), Error("")),
        ("a deep path", pax(&[("path", [deep.as_bytes(), b"f"].concat().as_slice())]), Files(&["..."])),
        // Links.
        (
            "through a link to the outside",
            raw().symlink("l", "../../outside").file("l/x", b"1").end(),
            Files(&["l link", "outside dir", "outside/x file"]),
        ),
        (
            "through an absolute link",
            raw().symlink("l", "/tmp").file("l/x", b"1").end(),
            Files(&["l link", "tmp dir", "tmp/x file"]),
        ),
        (
            "through a link to a parent",
            raw().directory("d").symlink("d/l", "../../../..").file("d/l/x", b"1").end(),
            Files(&["d dir", "d/l link", "x file"]),
        ),
        (
            "through a chain of links",
            raw().symlink("a", "b").symlink("b", "c").directory("c").file("a/x", b"1").end(),
            Files(&["a link", "b link", "c dir", "c/x file"]),
        ),
        (
            "through a loop of links",
            raw().symlink("a", "b").symlink("b", "a").file("a/x", b"1").end(),
            Error("too many symbolic links"),
        ),
        ("through a link to itself", raw().symlink("a", "a").file("a/x", b"1").end(), Error("too many symbolic links")),
        ("onto a link", raw().symlink("l", "/outside/canary").file("l", b"1").end(), Files(&["l file"])),
        (
            "directory onto a link",
            raw().symlink("l", "/outside").directory("l").file("l/x", b"1").end(),
            Files(&["l dir", "l/x file"]),
        ),
        ("link without a target", raw().symlink("l", "").end(), Error("without a target")),
        ("hard link without a target", raw().hard_link("l", "").end(), Error("without a target")),
        ("hard link to the outside", raw().hard_link("l", "../outside/canary").end(), Error("\"..\"")),
        ("hard link to an absolute path", raw().hard_link("l", "/outside/canary").end(), Error("hard link to")),
        (
            "hard link through a link",
            raw().symlink("d", "/../../outside").hard_link("l", "d/canary").end(),
            Error("hard link to"),
        ),
        (
            "hard link to a link",
            raw().symlink("s", "/outside/canary").hard_link("l", "s").file("l", b"1").end(),
            Files(&["l file", "s link"]),
        ),
        ("hard link to a directory", raw().directory("d").hard_link("l", "d").end(), Error("is a directory")),
        ("hard link to itself", file("f").hard_link("f", "f").end(), Files(&["f file"])),
        ("hard link to itself that is not there", raw().hard_link("f", "f").end(), Error("hard link to")),
        (
            "hard link in the place of what it links",
            raw().file("d/f", b"1").hard_link("d", "d/f").end(),
            Error("it would replace"),
        ),
        ("hard link to what comes later", raw().hard_link("l", "f").file("f", b"1").end(), Error("hard link to")),
        ("hard link to the root", file("f").hard_link("l", "/").end(), Error("hard link to")),
        (
            "a link target with a zero byte",
            raw().pax(&[("linkpath", b"a\0b")]).symlink("l", "t").end(),
            Error("zero byte"),
        ),
        // Duplicates.
        ("a file twice", file("f").file("f", b"other").end(), Files(&["f file"])),
        ("a file in the place of a directory", raw().file("d/e/f", b"1").file("d", b"2").end(), Files(&["d file"])),
        ("a directory in the place of a file", raw().file("d", b"1").file("d/f", b"2").end(), Error("not a directory")),
        (
            "a file below a file",
            raw().file("d", b"1").directory("d").file("d/f", b"2").end(),
            Files(&["d dir", "d/f file"]),
        ),
        ("upper and lower case", file("F").file("f", b"1").end(), Files(&["F file", "f file"])),
        (
            "two forms of one letter",
            raw().file("\u{e9}", b"1").file("e\u{301}", b"1").end(),
            Files(&["e\u{301} file", "\u{e9} file"]),
        ),
        // Sizes and numbers.
        ("more content than there is", sized(b"00000100000"), Error("middle of the content")),
        ("exabytes", sized(b"\x80\0\0\0\x40\0\0\0\0\0\0\0"), Error("")),
        ("the largest size", sized(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"), Error("")),
        ("a negative size", sized(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), Error("")),
        ("letters for a size", sized(b"0000000zzzz"), Error("header")),
        ("PAX size that is no number", pax(&[("size", b"-1")]), Error("no number")),
        ("PAX size with letters", pax(&[("size", b"4x")]), Error("no number")),
        ("PAX size beyond the end", pax(&[("size", b"99999")]), Error("")),
        ("PAX owner that is no number", pax(&[("uid", b"root")]), Error("no number")),
        ("PAX owner of 64 bits", pax(&[("uid", b"4294967296")]), Error("32 bits")),
        ("PAX owner that means nobody", pax(&[("gid", b"4294967295")]), Error("32 bits")),
        ("PAX time that is no number", pax(&[("mtime", b"soon")]), Error("no number")),
        ("PAX time before 1970", pax(&[("mtime", b"-1.5")]), Files(&["file file"])),
        ("PAX time at the end of time", pax(&[("mtime", b"9223372036854775807")]), Files(&["file file"])),
        ("letters for an owner", raw().block(Block { uid: b"rootoot", ..FILE }).end(), Error("header")),
        ("letters for a mode", raw().block(Block { mode: b"rw-r--r", ..FILE }).end(), Error("header")),
        // Headers.
        ("no bytes at all", Vec::new(), Files(&[])),
        ("nothing but zeroes", vec![0; 700], Files(&[])),
        ("one odd byte", vec![1], Error("middle of the header")),
        ("half a header", raw().block(FILE).cut(300), Error("middle of the header")),
        ("half the content", file("f").cut(514), Error("middle of the content")),
        ("no padding", file("f").cut(516), Files(&["f file"])),
        ("no final zeroes", file("f").cut(1024), Files(&["f file"])),
        ("after the end", [file("f").end(), file("g").end()].concat(), Files(&["f file"])),
        ("noise", (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect(), Error("header")),
        ("PAX length too large", raw().extension(b'x', b"99 path=x\n").file("f", b"").end(), Error("")),
        ("PAX length too small", raw().extension(b'x', b"3 path=x\n").file("f", b"").end(), Error("")),
        ("PAX length zero", raw().extension(b'x', b"0 path=x\n").file("f", b"").end(), Error("")),
        (
            "PAX length of many digits",
            raw().extension(b'x', b"99999999999999999999999 path=x\n").file("f", b"").end(),
            Error(""),
        ),
        ("PAX without an equals sign", raw().extension(b'x', b"9 pathxx\n").file("f", b"").end(), Error("")),
        ("PAX for nothing", raw().pax(&[("path", b"x")]).end(), Error("header")),
        ("PAX twice", raw().pax(&[("path", b"x")]).pax(&[("path", b"y")]).file("f", b"").end(), Error("header")),
        ("PAX of gigabytes", raw().block(Block { kind: b'x', size: b"17777777777", ..FILE }).end(), Error("header")),
        (
            "GNU name of gigabytes",
            raw().block(Block { kind: b'L', size: b"17777777777", ..FILE }).end(),
            Error("header"),
        ),
        ("PAX for all", raw().extension(b'g', b"20 path=../outside/x\n").file("f", b"").end(), Files(&["f file"])),
        // Kinds.
        ("a kind that nobody knows", typed(b'Z'), Error("type")),
        ("a volume label", typed(b'V'), Error("type")),
        ("a file cut in two", typed(b'M'), Error("type")),
        (
            "content for a directory",
            raw().block(Block { kind: b'5', size: b"00000001000", ..FILE }).file("f", b"1").end(),
            Files(&["f file", "file dir"]),
        ),
        (
            "a device with letters for a number",
            raw().block(Block { kind: b'3', device: (b"zzzzzzz", b"0"), ..FILE }).end(),
            Error("header"),
        ),
        // Sparse files.
        ("a hole beyond the end", pax(&[("GNU.sparse.map", b"8,4"), ("GNU.sparse.size", b"6")]), Error("sparse map")),
        (
            "extents that overlap",
            pax(&[("GNU.sparse.map", b"0,3,1,1"), ("GNU.sparse.size", b"9")]),
            Error("sparse map"),
        ),
        (
            "extents without content",
            pax(&[("GNU.sparse.map", b"0,4,8,4"), ("GNU.sparse.size", b"12")]),
            Error("stored"),
        ),
        (
            "extents that overflow",
            pax(&[("GNU.sparse.map", b"18446744073709551615,4"), ("GNU.sparse.size", b"4")]),
            Error("sparse map"),
        ),
        (
            "a sparse map without an end",
            raw()
                .pax(&[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.realsize", b"4"),
                    ("GNU.sparse.name", b"f"),
                ])
                .file("x", &[b'1'; 6_000_000])
                .end(),
            Error("headers of more than"),
        ),
    ];
    // The attributes that steer the overlay never come from outside.
    for name in [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.overlay.metacopy",
        "user.overlay.opaque",
        "user.overlay.whiteout",
    ] {
        cases.push(("overlay attribute", pax(&[(&format!("SCHILY.xattr.{name}"), b"y")]), Files(&["file file"])));
    }
    cases
}

/// What stands outside, to be found as it was.
fn outside(root: &Path) -> std::path::PathBuf {
    let outside = root.join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("canary"), "alive").unwrap();
    outside
}

fn listing(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    walk::walk(root, |entry| {
        let word = match entry.file_type() {
            rustix::fs::FileType::Directory => "dir",
            rustix::fs::FileType::Symlink => "link",
            rustix::fs::FileType::RegularFile => "file",
            _ => "other",
        };
        lines.push(format!("{} {word}", String::from_utf8_lossy(entry.path)));
        let path = root.join(walk::as_path(entry.path));
        let overlay = xattrs(&path).into_iter().find(|name| name.contains("overlay"));
        assert_eq!(overlay, None, "{}", path.display());
        Ok(())
    })
    .unwrap();
    lines
}

#[test]
fn no_layer_leaves_its_directory() {
    if !privileged() {
        return;
    }
    let cases = cases();
    assert!(cases.len() >= 60, "{}", cases.len());
    for (what, tar, expect) in cases {
        let root = tempfile::tempdir().unwrap();
        let outside = outside(root.path());
        let before = dump(&outside);
        let into = root.path().join("in/to");
        std::fs::create_dir_all(&into).unwrap();
        let result = apply(&mut &tar[..], &into, &APPLY);
        assert_eq!(dump(&outside), before, "{what}");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2, "{what}");
        assert_eq!(std::fs::read_dir(root.path().join("in")).unwrap().count(), 1, "{what}");
        match (expect, result) {
            (Error(text), Err(error)) => assert!(error.to_string().contains(text), "{what}: {error}"),
            (Files(["..."]), Ok(_)) => {}
            (Files(files), Ok(_)) if what == "directory onto a link" => {
                // It took the place of what hid a name, and says so.
                assert_eq!(tar_entries(&into), ["l/", "l/.wh..wh..opq", "l/x"]);
                assert_eq!(files.len(), 2);
            }
            (Files(files), Ok(_)) if what == "a file below a file" => {
                assert_eq!(tar_entries(&into), ["d/", "d/.wh..wh..opq", "d/f"]);
                assert_eq!(files.len(), 2);
            }
            (Files(files), Ok(_)) => assert_eq!(listing(&into), files, "{what}"),
            (Error(text), Ok(_)) => panic!("{what}: succeeded, {text:?} was expected"),
            (Files(_), Err(error)) => panic!("{what}: {error}"),
        }
    }
}

pub(super) fn tar_entries(changes: &Path) -> Vec<String> {
    let tar = tar_of(changes);
    let mut archive = tar::Archive::new(&tar[..]);
    let path =
        |entry: std::io::Result<tar::Entry<_>>| String::from_utf8_lossy(&entry.unwrap().path_bytes()).into_owned();
    archive.entries().unwrap().map(path).collect()
}

#[test]
fn no_archive_leaves_the_root_it_is_added_to() {
    if !privileged() {
        return;
    }
    let options = ExtractOptions { ids: Ids::Keep, owner: None, max_bytes: None };
    for (what, tar, _) in cases() {
        for at in ["", "plain", "absolute/below", "relative"] {
            let root = tempfile::tempdir().unwrap();
            let outside = outside(root.path());
            let before = dump(&outside);
            let into = root.path().join("root");
            std::fs::create_dir(&into).unwrap();
            std::os::unix::fs::symlink(&outside, into.join("absolute")).unwrap();
            std::os::unix::fs::symlink("../outside", into.join("relative")).unwrap();
            let result = extract_archive(&mut &tar[..], &into, Path::new(at), &options);
            assert_eq!(dump(&outside), before, "{what} at {at:?}: {result:?}");
            assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2, "{what}");
        }
    }
}

#[test]
fn every_cut_of_an_archive_is_an_error_or_a_part_of_it() {
    if !privileged() {
        return;
    }
    let tar = Raw::default()
        .directory("d")
        .pax(&[("mtime", b"1.5"), ("SCHILY.xattr.user.x", b"1")])
        .file("d/f", &[7; 700])
        .symlink("l", "d")
        .end();
    for length in 0..tar.len() {
        let into = tempfile::tempdir().unwrap();
        if let Ok(summary) = apply(&mut &tar[..length], into.path(), &APPLY) {
            // Whole members, and zeroes at most.
            let whole = [(0, 0), (512, 512), (2748, 3072), (3584, 4608)]
                .iter()
                .any(|(from, to)| (*from..=to + 511).contains(&length) && length != to + 512);
            assert!(whole, "{length}: {summary:?}");
        }
    }
}

#[test]
fn a_damaged_header_never_reads_as_whole() {
    if !privileged() {
        return;
    }
    let tar = Raw::default().file("f", b"data").end();
    // The blank after the checksum says nothing.
    for at in (0..512).filter(|at| *at != 155) {
        let mut damaged = tar.clone();
        damaged[at] ^= 0x15;
        let into = tempfile::tempdir().unwrap();
        let result = apply(&mut &damaged[..], into.path(), &APPLY);
        assert!(result.is_err(), "byte {at}");
    }
}

#[test]
fn ceilings_hold() {
    if !privileged() {
        return;
    }
    let sparse = Raw::default()
        .pax(&[("GNU.sparse.map", b"0,4"), ("GNU.sparse.size", b"1000000000000")])
        .file("f", b"data")
        .end();
    let many = (0..100).fold(Raw::default(), |raw, i| raw.file(&format!("f{i}"), &[0; 600])).end();
    for (what, tar, text) in [("sparse", sparse, "files larger"), ("many", many, "larger than the")] {
        let into = tempfile::tempdir().unwrap();
        let options = ApplyOptions { max_bytes: Some(100_000), ..APPLY };
        let error = apply(&mut &tar[..], into.path(), &options).unwrap_err().to_string();
        assert!(error.contains(text), "{what}: {error}");
        assert!(into.path().as_os_str().as_bytes().len() < 100);
    }
}
