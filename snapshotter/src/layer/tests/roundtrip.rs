//! `apply(diff(x)) == x`, over random trees with everything odd that a step can leave behind.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use proptest::prelude::*;
use rustix::fs::{self, AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags};

use super::*;
use crate::layer::tree::timestamps;

/// What decides one thing of a tree: small numbers, so that a failing tree shrinks.
type Gene = [u8; 8];

const NAMES: &[&[u8]] = &[
    b"a",
    b"b c",
    b"new\nline",
    b"\xff\xfe not text",
    "umlaut-\u{e4}-\u{4e16}".as_bytes(),
    b"-dash",
    b".hidden",
    b".w",
    &[b'l'; 101],
    &[b'm'; 255],
    b"back\\slash",
    b"%s=1",
];
const TIMES: &[(i64, u32)] = &[
    (1_700_000_000, 0),
    (1_700_000_000, 123_456_789),
    (0, 0),
    (-1, 0),
    (-2, 750_000_000),
    (0, 1),
    (8_589_934_592, 0),
    (4_294_967_296, 999_999_999),
];
const OWNERS: &[u32] = &[0, 1000, 65534, 2_097_151, 2_097_152, 70_000_000, u32::MAX - 1];
const MODES: &[u32] = &[0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o000, 0o7777];
/// `security.capability` of cap_dac_override, cap_fowner: a newline is in it.
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn pick<T: Copy>(from: &[T], gene: u8) -> T {
    from[usize::from(gene) % from.len()]
}

/// Makes the tree; gives the directories to set times in, the innermost last.
fn grow(root: &Path, genes: &[Gene]) {
    let mut directories = vec![root.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    let mut times = Vec::new();
    for gene in genes {
        let parent = directories[usize::from(gene[0]) % directories.len()].clone();
        let path = parent.join(std::ffi::OsStr::from_bytes(pick(NAMES, gene[1])));
        if path.as_os_str().len() > 3000 || path.symlink_metadata().is_ok() {
            continue;
        }
        let device = |kind, number| fs::mknodat(CWD, &path, kind, Mode::empty(), number).unwrap();
        match gene[2] % 12 {
            0..=2 => {
                fs::mkdir(&path, Mode::RWXU).unwrap();
                directories.push(path.clone());
                if gene[7] % 5 == 0 {
                    changes::Marks::of(Driver::Overlay).set_opaque(std::fs::File::open(&path).unwrap()).unwrap();
                }
            }
            3 => std::fs::write(&path, vec![gene[7]; usize::from(gene[6]) * 7]).unwrap(),
            4 => std::fs::write(&path, b"").unwrap(),
            5 => {
                let file = std::fs::File::create(&path).unwrap();
                file.write_all_at(b"after a hole", 100_000 + u64::from(gene[7])).unwrap();
            }
            6 => fs::symlink(&vec![b'x'; 1 + usize::from(gene[6])][..], &path).unwrap(),
            7 if !files.is_empty() => {
                fs::link(&files[usize::from(gene[6]) % files.len()], &path).unwrap();
                continue;
            }
            8 => device(FileType::Fifo, 0),
            9 => device(FileType::CharacterDevice, fs::makedev(4095, 1_048_575)),
            10 => device(FileType::BlockDevice, fs::makedev(7, u32::from(gene[7]))),
            _ => {
                device(FileType::CharacterDevice, 0);
                continue;
            }
        }
        let is_link = path.is_symlink();
        if !path.is_dir() {
            files.push(path.clone());
        }
        let owner = (Uid::from_raw(pick(OWNERS, gene[3])), Gid::from_raw(pick(OWNERS, gene[4])));
        fs::chownat(CWD, &path, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW).unwrap();
        if !is_link {
            fs::chmod(&path, Mode::from_raw_mode(pick(MODES, gene[5]))).unwrap();
        }
        if !is_link && (path.is_dir() || path.is_file()) {
            for (bit, name, value) in [
                (1, "user.text", b"value".as_slice()),
                (2, "user.binary", b"a=b\n\0\xff\n12 x=y\n"),
                (4, "user.empty", b""),
                (8, "security.capability", CAPABILITY),
            ] {
                if gene[6] & bit != 0 && !(path.is_dir() && name.starts_with("sec")) {
                    fs::setxattr(&path, name, value, XattrFlags::empty()).unwrap();
                }
            }
        }
        times.push((path, pick(TIMES, gene[7])));
    }
    for (path, time) in times.into_iter().rev() {
        fs::utimensat(CWD, &path, &timestamps(time), AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// What is not an accident of the source: ext4 keeps times up to 2446, whiteouts have none that count.
fn check(genes: &[Gene]) {
    let x = tempfile::tempdir().unwrap();
    let y = tempfile::tempdir().unwrap();
    let z = tempfile::tempdir().unwrap();
    grow(x.path(), genes);
    let tar = tar_of(x.path());
    let summary = apply(&mut &tar[..], y.path(), &APPLY).unwrap();
    assert_eq!(dump(x.path()), dump(y.path()));
    assert_eq!(summary.implied_directories, [Path::new("")]);
    assert_eq!(tar, tar_of(y.path()), "the tar of what was applied");
    let content = content_digest(x.path(), Driver::Overlay).unwrap();
    assert_eq!(content, content_digest(y.path(), Driver::Overlay).unwrap());

    let mut blob = Vec::new();
    let packed = pack(x.path(), &DIFF, Compression::Zstd(1), &mut blob).unwrap();
    assert_eq!(packed.diff_id, Digest::of(&tar));
    assert_eq!(unpack(&blob[..], &packed.diff_id, z.path(), &APPLY).unwrap(), summary);
    assert_eq!(dump(x.path()), dump(z.path()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn what_is_applied_is_what_was_diffed(genes in prop::collection::vec(any::<Gene>(), 0..80)) {
        if privileged() {
            check(&genes);
        }
    }
}

#[test]
fn other_readers_see_the_same() {
    if !privileged() {
        return;
    }
    let x = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33).to_le_bytes()
    };
    let mut genes: Vec<Gene> = (0..400)
        .map(|_| {
            let (a, b) = (next(), next());
            [a[0], a[1], a[2], b[0], b[1], b[2], 1, a[3]]
        })
        .collect();
    // The other reader splits PAX records at newlines.
    genes.retain(|gene| !pick(NAMES, gene[1]).contains(&b'\n'));
    grow(x.path(), &genes);
    let tar = tar_of(x.path());
    let mut seen = Vec::new();
    for entry in tar::Archive::new(&tar[..]).entries().unwrap() {
        let entry = entry.unwrap();
        let link = entry.link_name_bytes().map(|link| link.into_owned());
        seen.push((entry.path_bytes().into_owned(), entry.header().entry_type().as_byte(), entry.size(), link));
    }
    let mut ours = Vec::new();
    let mut input = &tar[..];
    let mut archive = archive::Archive::new(&mut input, None);
    while let Some(member) = archive.next().unwrap() {
        let (kind, size, link) = match member.kind {
            archive::MemberKind::File(content) => (b'0', content.size, None),
            archive::MemberKind::Directory => (b'5', 0, None),
            archive::MemberKind::HardLink(target) => (b'1', 0, Some(target)),
            archive::MemberKind::Symlink(target) => (b'2', 0, Some(target)),
            archive::MemberKind::CharacterDevice(..) => (b'3', 0, None),
            archive::MemberKind::BlockDevice(..) => (b'4', 0, None),
            archive::MemberKind::Fifo => (b'6', 0, None),
        };
        ours.push((member.path, kind, size, link));
    }
    assert!(ours.len() > 40, "{}", ours.len());
    let differs = seen.iter().zip(&ours).position(|(seen, ours)| seen != ours);
    assert_eq!((seen.len(), differs), (ours.len(), None));
}
