//! The forms that layers come in: removals, other builders' oddities, sparse files, compressions.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode};

use super::hostile::{Block, FILE, Raw, tar_entries};
use super::*;

fn applied(tar: &[u8]) -> (tempfile::TempDir, ApplySummary) {
    let into = tempfile::tempdir().unwrap();
    let summary = apply(&mut &tar[..], into.path(), &APPLY).unwrap();
    (into, summary)
}

#[test]
fn removals_speak_of_lower_layers() {
    if !privileged() {
        return;
    }
    let raw = Raw::default;
    for (what, tar, expect) in [
        ("a name", raw().file("d/.wh.x", b""), vec!["d/", "d/.wh.x"]),
        ("twice", raw().file(".wh.x", b"").file(".wh.x", b""), vec![".wh.x"]),
        ("then a file", raw().file(".wh.x", b"").file("x", b"1"), vec!["x"]),
        ("after a file", raw().file("x", b"1").file(".wh.x", b""), vec!["x"]),
        ("then a directory", raw().file(".wh.x", b"").directory("x"), vec!["x/", "x/.wh..wh..opq"]),
        ("then something below", raw().file(".wh.x", b"").file("x/y", b""), vec!["x/", "x/.wh..wh..opq", "x/y"]),
        ("after a directory", raw().file("x/y", b"").file(".wh.x", b""), vec!["x/", "x/.wh..wh..opq", "x/y"]),
        ("all in a directory", raw().directory("d").file("d/.wh..wh..opq", b""), vec!["d/", "d/.wh..wh..opq"]),
        ("all, after a file", raw().file("d/f", b"").file("d/.wh..wh..opq", b""), vec!["d/", "d/.wh..wh..opq", "d/f"]),
        ("through a link", raw().symlink("l", "d").file("l/.wh.x", b""), vec!["d/", "d/.wh.x", "l"]),
        ("aufs's own", raw().directory(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"").file(".wh..wh.aufs", b""), vec![]),
        ("a 0/0 device", raw().block(Block { name: b"x", kind: b'3', ..FILE }), vec![".wh.x"]),
    ] {
        let (into, _) = applied(&tar.end());
        assert_eq!(tar_entries(into.path()), expect, "{what}");
    }
    for (name, text) in [
        (".wh.", "cannot exist"),
        ("d/.wh..", "cannot exist"),
        (".wh...", "cannot exist"),
        (".wh.d/f", "means a removal"),
        ("a/.wh.d/.wh..wh..opq", "means a removal"),
        (".wh..wh..opq", "no overlay can express"),
    ] {
        let into = tempfile::tempdir().unwrap();
        let tar = Raw::default().file(name, b"").end();
        let error = apply(&mut &tar[..], into.path(), &APPLY).unwrap_err().to_string();
        assert!(error.contains(text), "{name}: {error}");
    }
}

#[test]
fn added_archives_know_no_removals() {
    if !privileged() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("usr/lib")).unwrap();
    std::os::unix::fs::symlink("/usr/lib", root.path().join("lib")).unwrap();
    let tar = Raw::default().file(".wh.x", b"1").file("sub/f", b"2").hard_link("h", "sub/f").end();
    let options = ExtractOptions { ids: Ids::Keep, owner: Some((5, 6)), max_bytes: None };
    let summary = extract_archive(&mut &tar[..], root.path(), Path::new("/lib/new"), &options).unwrap();
    assert_eq!((summary.entries, summary.bytes, summary.whiteouts), (3, 2, 0));
    let new = root.path().join("usr/lib/new");
    assert_eq!(std::fs::read(new.join(".wh.x")).unwrap(), b"1");
    let link = std::fs::metadata(new.join("h")).unwrap();
    assert_eq!((link.nlink(), link.uid(), link.gid()), (2, 5, 6));
}

#[test]
fn directories_keep_their_times_and_what_is_in_them() {
    if !privileged() {
        return;
    }
    let tar = Raw::default().directory("d").file("d/f", b"1").file("other/g", b"").directory("d").end();
    let (into, summary) = applied(&tar);
    assert_eq!((summary.entries, summary.implied_directories), (4, vec!["".into(), "other".into()]));
    let meta = |path: &str| std::fs::metadata(into.path().join(path)).unwrap();
    assert_eq!(meta("d").mtime(), 1);
    assert_eq!((meta("other").mtime(), meta("other").mode() & 0o7777), (0, 0o755));
    assert_eq!((meta("").mtime(), meta("").mode() & 0o7777), (0, 0o755));
    assert_eq!(std::fs::read(into.path().join("d/f")).unwrap(), b"1");
}

#[test]
fn directories_without_an_entry_are_named() {
    if !privileged() {
        return;
    }
    let raw = Raw::default;
    for (what, tar, expect) in [
        ("none", raw().directory("./").directory("d").file("d/f", b""), vec![]),
        ("the top alone", raw().file("f", b""), vec![""]),
        ("nested", raw().file("a/b/c", b"").file("a/d/.wh.x", b""), vec!["", "a", "a/b", "a/d"]),
        ("described later", raw().file("a/b/c", b"").directory("a"), vec!["", "a/b"]),
        ("described through a link", raw().symlink("l", "a").file("a/b/c", b"").directory("l/b"), vec!["", "a"]),
        ("made through a link", raw().directory("a").symlink("l", "a").file("l/b/c", b""), vec!["", "a/b"]),
        ("replaced", raw().file("a/b/c", b"").file("a/b", b""), vec!["", "a"]),
        ("replaced and made again", raw().file("a/c", b"").file("a", b"").file("a", b"").directory("a"), vec![""]),
    ] {
        let (_into, summary) = applied(&tar.end());
        let expect: Vec<std::path::PathBuf> = expect.into_iter().map(Into::into).collect();
        assert_eq!(summary.implied_directories, expect, "{what}");
    }
}

/// umoci's `insert` ends its layers without padding and without the final zeroes.
#[test]
fn an_archive_may_end_with_its_last_byte_of_content() {
    if !privileged() {
        return;
    }
    let tar = Raw::default().directory("d").file("d/f", &[7; 700]).end();
    let (into, summary) = applied(&tar[..512 + 512 + 700]);
    assert_eq!((summary.entries, std::fs::metadata(into.path().join("d/f")).unwrap().len()), (2, 700));
}

#[test]
fn a_single_id_owns_all() {
    if !privileged() {
        return;
    }
    let tar = Raw::default().block(Block { uid: b"0001750", mode: b"0004755", ..FILE }).file("g", b"").end();
    let into = tempfile::tempdir().unwrap();
    let summary = apply(&mut &tar[..], into.path(), &ApplyOptions { ids: Ids::Single, ..APPLY }).unwrap();
    assert_eq!(summary.owners_left, 1);
    let meta = std::fs::metadata(into.path().join("file")).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (rustix::process::geteuid().as_raw(), 0o4755));
}

#[test]
fn sparse_files_of_every_form() {
    if !privileged() {
        return;
    }
    let mut old = Block { name: b"file", kind: b'S', size: b"00000000004", magic: b"ustar  \0", ..FILE }.bytes();
    for (at, number) in [(386, 4), (398, 2), (410, 8), (422, 2), (483, 12)] {
        old[at..at + 11].copy_from_slice(format!("{number:011o}").as_bytes());
    }
    old[148..156].fill(b' ');
    let sum: u32 = old.iter().map(|byte| u32::from(*byte)).sum();
    old[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut gnu = old.to_vec();
    gnu.extend_from_slice(&Raw::default().data(b"abcd").end());

    let size = b"12".as_slice();
    let zero: &[(&str, &[u8])] = &[
        ("GNU.sparse.size", size),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"4"),
        ("GNU.sparse.numbytes", b"2"),
        ("GNU.sparse.offset", b"8"),
        ("GNU.sparse.numbytes", b"2"),
    ];
    let one: &[(&str, &[u8])] =
        &[("GNU.sparse.map", b"4,2,8,2"), ("GNU.sparse.name", b"file"), ("GNU.sparse.size", size)];
    let newest: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"file"),
        ("GNU.sparse.realsize", size),
    ];
    let mut map = b"2\n4\n2\n8\n2\n".to_vec();
    map.resize(512, 0);
    map.extend_from_slice(b"abcd");
    for (what, tar) in [
        ("GNU", gnu),
        ("PAX 0.0", Raw::default().pax(zero).file("file", b"abcd").end()),
        ("PAX 0.1", Raw::default().pax(one).file("GNUSparseFile.1/file", b"abcd").end()),
        ("PAX 1.0", Raw::default().pax(newest).file("GNUSparseFile.1/file", &map).end()),
    ] {
        let (into, _) = applied(&tar);
        let content = std::fs::read(into.path().join("file"));
        assert_eq!(content.unwrap(), b"\0\0\0\0ab\0\0cd\0\0", "{what}");
    }
}

#[test]
fn what_a_layer_cannot_hold() {
    if !privileged() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let socket = UnixListener::bind(root.path().join("socket")).unwrap();
    let mut tar = Vec::new();
    let summary = diff(root.path(), &DIFF, &mut tar).unwrap();
    drop(socket);
    assert_eq!(summary.skipped_sockets, [Path::new("socket")]);
    assert_eq!((summary.entries, summary.bytes, tar.len()), (0, 1024, 1024));
    std::fs::write(root.path().join(".wh.foo"), "").unwrap();
    let error = diff(root.path(), &DIFF, &mut std::io::sink()).unwrap_err().to_string();
    assert!(error.contains(".wh.foo") && error.contains("rename"), "{error}");
    assert!(content_digest(root.path(), Driver::Overlay).is_err());
}

#[test]
fn marks_count_only_in_the_form_of_the_driver() {
    if !privileged() {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let set = |path: &str, name: &str| {
        let path = root.path().join(path);
        rustix::fs::setxattr(&path, name, b"y", rustix::fs::XattrFlags::empty()).unwrap();
    };
    std::fs::create_dir(root.path().join("d")).unwrap();
    std::fs::write(root.path().join("gone"), "").unwrap();
    set("d", "user.overlay.opaque");
    set("gone", "user.overlay.whiteout");
    let entries = |driver| {
        let mut tar = Vec::new();
        diff(root.path(), &DiffOptions { driver, ..DIFF }, &mut tar).unwrap();
        let plain = tempfile::tempdir().unwrap();
        let options = ExtractOptions { ids: Ids::Keep, owner: None, max_bytes: None };
        extract_archive(&mut &tar[..], plain.path(), Path::new(""), &options).unwrap();
        let mut names = Vec::new();
        walk::walk(plain.path(), |entry| {
            names.push(String::from_utf8_lossy(entry.path).into_owned());
            Ok(())
        })
        .unwrap();
        names
    };
    assert_eq!(entries(Driver::Overlay), ["d", "gone"]);
    for driver in [Driver::OverlayUser, Driver::Plain] {
        assert_eq!(entries(driver), [".wh.gone", "d", "d/.wh..wh..opq"], "{driver:?}");
    }
    set("d", "trusted.overlay.redirect");
    let error = diff(root.path(), &DIFF, &mut std::io::sink()).unwrap_err().to_string();
    assert!(error.contains("redirect_dir=off"), "{error}");
}

#[test]
fn a_file_that_shrinks_is_an_error() {
    // Its size changes once its header is written, as if another process were at work.
    struct Shrinks(std::path::PathBuf);
    impl Write for Shrinks {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            std::fs::write(&self.0, "less")?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    std::fs::write(&file, [1; 5000]).unwrap();
    let error = diff(root.path(), &DIFF, &mut Shrinks(file)).unwrap_err().to_string();
    assert!(error.contains("shrank"), "{error}");
}

#[test]
fn every_compression_is_known_by_its_first_bytes() {
    let text = b"a layer, or so it seems. ".repeat(40_000);
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let bzip2 = |bytes: &[u8]| {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let xz = |bytes: &[u8]| liblzma::encode_all(bytes, 1).unwrap();
    let (one, two) = text.split_at(text.len() / 3);
    let skippable = [b"\x5a\x2a\x4d\x18\x03\0\0\0abc".as_slice(), &zstd(&text)].concat();
    for (what, blob) in [
        ("plain", text.clone()),
        ("gzip", gzip(&text)),
        ("gzip, two members", [gzip(one), gzip(two)].concat()),
        ("zstd", zstd(&text)),
        ("zstd, two frames", [zstd(one), zstd(two)].concat()),
        ("zstd, skippable frame", skippable),
        ("bzip2", bzip2(&text)),
        ("bzip2, two streams", [bzip2(one), bzip2(two)].concat()),
        ("xz", xz(&text)),
        ("xz, two streams", [xz(one), xz(two)].concat()),
    ] {
        let mut decoded = Vec::new();
        decoder(&blob[..]).unwrap().read_to_end(&mut decoded).unwrap();
        assert!(decoded == text, "{what}: {} bytes", decoded.len());
        if what != "plain" {
            let cut = &blob[..blob.len() - 3];
            assert!(decoder(cut).unwrap().read_to_end(&mut Vec::new()).is_err(), "{what}, cut short");
        }
    }
    for short in [b"".as_slice(), b"B", b"\x1f"] {
        let mut decoded = Vec::new();
        decoder(short).unwrap().read_to_end(&mut decoded).unwrap();
        assert_eq!(decoded, short);
    }
}

#[test]
fn a_blob_must_be_what_its_diff_id_says() {
    if !privileged() {
        return;
    }
    let tar = Raw::default().file("f", b"data").end();
    let trailing = [tar.clone(), vec![0; 10_000]].concat();
    for (what, blob, diff_id, text) in [
        ("right", tar.clone(), Digest::of(&tar), None),
        ("with more zeroes", trailing.clone(), Digest::of(&trailing), None),
        ("another", tar.clone(), Digest::of("another"), Some("diff id")),
        ("without its zeroes", trailing, Digest::of(&tar), Some("diff id")),
        ("cut short", zstd::encode_all(&tar[..], 1).unwrap()[..30].to_vec(), Digest::of(&tar), Some("cannot be read")),
        ("no layer", b"\x1f\x8bnothing".to_vec(), Digest::of(&tar), Some("cannot be read")),
    ] {
        let into = tempfile::tempdir().unwrap();
        match (unpack(&blob[..], &diff_id, into.path(), &APPLY), text) {
            (Ok(summary), None) => assert_eq!(summary.entries, 1, "{what}"),
            (Err(error), Some(text)) => assert!(error.to_string().contains(text), "{what}: {error}"),
            (result, _) => panic!("{what}: {result:?}"),
        }
    }
}

#[test]
fn a_bomb_stops_at_the_ceiling() {
    let bomb = zstd::encode_all(std::io::repeat(0).take(1 << 30), 1).unwrap();
    let into = tempfile::tempdir().unwrap();
    let options = ApplyOptions { max_bytes: Some(1 << 20), ids: Ids::Single, ..APPLY };
    let error = unpack(&bomb[..], &Digest::of(""), into.path(), &options).unwrap_err().to_string();
    assert!(error.contains("larger than"), "{error}");
}

#[test]
fn levels_that_do_not_exist_are_refused() {
    let root = tempfile::tempdir().unwrap();
    for compression in [Compression::Gzip(0), Compression::Gzip(13), Compression::Zstd(0), Compression::Zstd(23)] {
        let error = pack(root.path(), &DIFF, compression, std::io::sink()).unwrap_err().to_string();
        assert!(error.contains("has levels"), "{error}");
    }
}

#[test]
fn fifos_are_not_waited_for() {
    let root = tempfile::tempdir().unwrap();
    rustix::fs::mknodat(CWD, root.path().join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert_eq!(tar_entries(root.path()), ["fifo"]);
    assert_eq!(content_digest(root.path(), Driver::Overlay).unwrap().1, 1);
}

#[test]
fn user_attributes_mark_as_trusted_ones_do() {
    if !privileged() {
        return;
    }
    let tar = Raw::default().directory("d").file("d/.wh..wh..opq", b"").file(".wh.x", b"").directory("x").end();
    for (driver, mark) in [(Driver::OverlayUser, "user.overlay.opaque=y"), (Driver::Plain, "trusted.overlay.opaque=y")]
    {
        let into = tempfile::tempdir().unwrap();
        apply(&mut &tar[..], into.path(), &ApplyOptions { driver, ..APPLY }).unwrap();
        for path in ["d", "x"] {
            assert_eq!(xattrs(&into.path().join(path)), [mark]);
        }
        let (once, summary) = diff_id(into.path(), &DiffOptions { driver, ..DIFF }).unwrap();
        assert_eq!(summary.entries, 4);
        let again = diff_id(applied(&tar).0.path(), &DIFF).unwrap();
        assert_eq!((once, summary), again);
    }
}

#[test]
fn layers_unpack_without_privileges() {
    let device = Block { name: b"null", kind: b'3', device: (b"0000001", b"0000003"), ..FILE };
    let tar = Raw::default().file(".wh.x", b"").file("d/.wh..wh..opq", b"").file("f", b"1").block(device).end();
    let into = tempfile::tempdir().unwrap();
    let options = ApplyOptions { driver: Driver::OverlayUser, max_bytes: None, ids: Ids::Single };
    let summary = apply(&mut &tar[..], into.path(), &options).unwrap();
    let made = into.path().join("null").symlink_metadata().is_ok();
    assert_eq!((summary.whiteouts, summary.skipped_devices), (2, u64::from(!made)));
    let (_, diffed) = diff_id(into.path(), &DiffOptions { driver: Driver::OverlayUser, ..DIFF }).unwrap();
    assert_eq!(diffed.entries, 4 + u64::from(made));
}

#[test]
fn the_tools_of_the_field_read_what_is_packed() {
    let root = tempfile::tempdir().unwrap();
    let noise: Vec<u8> = (0..2_600_000u32).map(|i| (i.wrapping_mul(i) >> 19) as u8).collect();
    std::fs::write(root.path().join("noise"), &noise).unwrap();
    std::fs::write(root.path().join("n".repeat(140)), "long").unwrap();
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("layer");
    let python = "import sys,tarfile; t=tarfile.open(sys.argv[1]); assert len(t.getmembers())==2, t.getmembers()";
    for (compression, tools) in [
        (Compression::None, &[["tar", "-tf"].as_slice(), &["python3", "-c", python]] as &[&[&str]]),
        (Compression::GZIP, &[&["gzip"], &["tar", "-tzf"], &["python3", "-c", python]]),
        (Compression::ZSTD, &[&["zstd", "-qt"]]),
    ] {
        pack(root.path(), &DIFF, compression, std::fs::File::create(&file).unwrap()).unwrap();
        for tool in tools {
            let mut command = std::process::Command::new(tool[0]);
            if tool[0] == "gzip" {
                command.arg("-tc").stdin(std::fs::File::open(&file).unwrap());
            } else {
                command.args(&tool[1..]).arg(&file);
            }
            match command.output() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    writeln_stderr(&format!("skipped: {} is not installed", tool[0]));
                }
                output => {
                    let output = output.unwrap();
                    assert!(output.status.success(), "{tool:?}: {}", String::from_utf8_lossy(&output.stderr));
                }
            }
        }
    }
}
