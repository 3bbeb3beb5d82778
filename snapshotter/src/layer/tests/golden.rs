//! The bytes themselves. A change here gives every layer that forge ever made another name: it is a change of
//! format, never an accident. A new version of a compressor shows up here first.

use rustix::fs::{AtFlags, CWD, Timestamps};

use super::*;
use crate::layer::tree::timestamps;

/// A small tree that is the same on every machine.
fn tree() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path);
    std::fs::create_dir_all(at("usr/lib")).unwrap();
    std::fs::write(at("usr/lib/text"), "words ".repeat(1000)).unwrap();
    // Three blocks, the last of them short, that compress somewhat.
    let mut state = 1u32;
    let noise: Vec<u8> = (0..2_500_000)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 28) as u8 + b'a'
        })
        .collect();
    std::fs::write(at("usr/lib/noise"), noise).unwrap();
    std::fs::hard_link(at("usr/lib/text"), at("usr/same")).unwrap();
    std::os::unix::fs::symlink("lib/text", at("usr/link")).unwrap();
    let odd: Timestamps = timestamps((1_600_000_000, 5));
    for path in ["usr/lib/text", "usr/lib/noise", "usr/link", "usr/lib", "usr"] {
        let times = if path == "usr/lib/noise" { &odd } else { &timestamps((1_600_000_000, 0)) };
        rustix::fs::utimensat(CWD, at(path), times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        if path != "usr/link" {
            let mode = if at(path).is_dir() { 0o755 } else { 0o640 };
            rustix::fs::chmod(at(path), rustix::fs::Mode::from_raw_mode(mode)).unwrap();
        }
    }
    root
}

#[test]
fn the_bytes_are_those_of_before() {
    if !privileged() {
        return;
    }
    let tree = tree();
    let mut digests = Vec::new();
    digests.push(content_digest(tree.path(), Driver::Overlay).unwrap().0.to_string());
    for compression in [Compression::None, Compression::GZIP, Compression::Gzip(1), Compression::ZSTD] {
        let packed = pack(tree.path(), &DIFF, compression, std::io::sink()).unwrap();
        digests.push(format!("{compression} {}", packed.blob));
    }
    let clamped = DiffOptions { clamp_mtime: Some(1_500_000_000), ..DIFF };
    digests.push(format!("clamped {}", diff_id(tree.path(), &clamped).unwrap().0));
    assert_eq!(
        digests,
        [
            "sha256:7d8d56d0976a1442ddf30a1f25b3efc3af995218a00988834030081ec8dc8bda",
            "uncompressed sha256:c68e65f88e42091ac33ed383e12f579253cee1e592a57677397196d0486f227f",
            "gzip sha256:9bad18035e68057b510078a59cc3f275ae09b90355908f4383ab94a701b7e7ad",
            "gzip sha256:0fbdc337b093a556e5a996b9519fc002c51e2ef6d183d9be4e8901055b23b0fb",
            "zstd sha256:12680b924a3aa550da30102c61affd72121e6e00695a035310cdea5d6d606bd8",
            "clamped sha256:300d190b4a5b1956648d9a5b012504b1f60456f6facaa5dc1ef7075490f033b0",
        ]
    );
}

#[test]
fn threads_cannot_be_seen_in_the_bytes() {
    let tree = tree();
    let blobs = |compression| {
        [1, 2, 8].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let inside = pool.install(|| pack(tree.path(), &DIFF, compression, std::io::sink()).unwrap());
            (inside.blob, pool.install(|| content_digest(tree.path(), Driver::Overlay).unwrap()))
        })
    };
    for compression in [Compression::None, Compression::GZIP, Compression::ZSTD] {
        let [one, two, eight] = blobs(compression);
        assert_eq!(one, two, "{compression}");
        assert_eq!(one, eight, "{compression}");
        let outside = pack(tree.path(), &DIFF, compression, std::io::sink()).unwrap();
        assert_eq!(one.0, outside.blob, "{compression}");
    }
}

#[test]
fn content_digests_tell_all_but_times() {
    if !privileged() {
        return;
    }
    let root = tree();
    let digest = || content_digest(root.path(), Driver::Overlay).unwrap().0;
    let at = |path: &str| root.path().join(path);
    let mut seen = vec![digest()];
    rustix::fs::utimensat(CWD, at("usr/same"), &timestamps((1, 1)), AtFlags::empty()).unwrap();
    assert_eq!(digest(), seen[0], "times do not count");
    let mut differs = |what: &str| {
        let now = digest();
        assert!(!seen.contains(&now), "{what}");
        seen.push(now);
    };
    std::fs::write(at("usr/lib/text"), "other").unwrap();
    differs("bytes");
    std::fs::remove_file(at("usr/same")).unwrap();
    std::fs::write(at("usr/same"), "other").unwrap();
    rustix::fs::chmod(at("usr/same"), rustix::fs::Mode::from_raw_mode(0o640)).unwrap();
    differs("a copy is not a hard link");
    rustix::fs::chmod(at("usr/same"), rustix::fs::Mode::from_raw_mode(0o4640)).unwrap();
    differs("mode");
    std::os::unix::fs::chown(at("usr/same"), Some(5), None).unwrap();
    differs("owner");
    rustix::fs::setxattr(at("usr/same"), "user.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    differs("attributes");
    std::fs::rename(at("usr/same"), at("usr/other")).unwrap();
    differs("names");
    std::fs::remove_file(at("usr/other")).unwrap();
    rustix::fs::mknodat(CWD, at("usr/other"), rustix::fs::FileType::CharacterDevice, 0o600.into(), 0).unwrap();
    differs("removals");
    changes::Marks::of(Driver::Overlay).set_opaque(std::fs::File::open(at("usr/lib")).unwrap()).unwrap();
    differs("opaque directories");
}
