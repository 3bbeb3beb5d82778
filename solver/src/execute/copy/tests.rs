use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::context::{Owners, Scan, StatCache, scan};
use crate::graph::{Owner, Selection};

/// `path`, `path=text`, `path -> target`, `path/`; with ` @755` at the end, that mode.
fn build(root: &Path, files: &[&str]) {
    for file in files {
        let (file, mode) = file.split_once(" @").map_or((*file, None), |(file, mode)| (file, Some(mode)));
        let name = file.split([' ', '=']).next().unwrap();
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if let Some((_, target)) = file.split_once(" -> ") {
            symlink(target, &path).unwrap();
        } else if name.ends_with('/') {
            fs::create_dir_all(&path).unwrap();
        } else {
            fs::write(&path, file.split_once('=').map_or(name, |(_, text)| text)).unwrap();
        }
        if let Some(mode) = mode {
            fs::set_permissions(&path, fs::Permissions::from_mode(u32::from_str_radix(mode, 8).unwrap())).unwrap();
        }
    }
}

/// Every path with what it holds: `a=text`, `d/`, `l -> t`.
fn show(root: &Path) -> Vec<String> {
    let mut shown = Vec::new();
    let mut todo = vec![String::new()];
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(root.join(&at)).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{at}{}", entry.file_name().to_str().unwrap());
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                shown.push(format!("{path}/"));
                todo.push(format!("{path}/"));
            } else if kind.is_symlink() {
                shown.push(format!("{path} -> {}", fs::read_link(entry.path()).unwrap().display()));
            } else {
                shown.push(format!("{path}={}", fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }
    shown.sort();
    shown
}

struct Case {
    source: tempfile::TempDir,
    root: tempfile::TempDir,
}

impl Case {
    fn new(source: &[&str], root: &[&str]) -> Case {
        let case = Case { source: tempfile::tempdir().unwrap(), root: tempfile::tempdir().unwrap() };
        build(case.source.path(), source);
        build(case.root.path(), root);
        case
    }

    fn tree(&self, op: &Copy) -> Tree {
        let paths = op.sources.iter().filter_map(|source| match source {
            CopySource::Path { path, .. } => Some(path.clone()),
            CopySource::Inline { .. } => None,
        });
        let selection = Selection { paths: paths.collect(), exclude: op.exclude.clone() };
        let (root, selection, owners) = (self.source.path(), &selection, Owners::Root);
        scan(&Scan { root, selection, ignore: None, owners, parents: op.parents }, &StatCache::none()).unwrap()
    }

    fn copy(&self, op: &Copy) -> Result<Vec<String>> {
        let tree = self.tree(op);
        copy(op, self.root.path(), |_| &tree)?;
        Ok(show(self.root.path()))
    }

    fn stat(&self, path: &str) -> fs::Metadata {
        fs::symlink_metadata(self.root.path().join(path)).unwrap()
    }
}

fn op(paths: &[&str], destination: &str) -> Copy {
    let source = |path: &&str| {
        let (pivot, path) = match path.split_once("/./") {
            Some((pivot, rest)) => (Some(pivot.to_owned()), format!("{pivot}/{rest}")),
            None => (None, (*path).to_owned()),
        };
        CopySource::Path { input: 1, path, pivot }
    };
    Copy {
        sources: paths.iter().map(source).collect(),
        destination: destination.into(),
        owner: None,
        mode: None,
        parents: false,
        exclude: Vec::new(),
        unpack: Unpack::Never,
    }
}

#[test]
fn destinations_are_chosen_as_buildkit_chooses_them() {
    let source = ["a", "b", "d/x", "d/e/y", "l -> d", "la -> a"];
    for (paths, destination, root, expect) in [
        (&["a"][..], "/new", &[][..], &["new=a"][..]),
        (&["a"], "/new/", &[], &["new/", "new/a=a"]),
        (&["a"], "/p/q/new", &[], &["p/", "p/q/", "p/q/new=a"]),
        (&["a"], "/have", &["have/"], &["have/", "have/a=a"]),
        (&["a"], "/have", &["have=old"], &["have=a"]),
        (&["a"], "/", &[], &["a=a"]),
        (&["a", "b"], "/to", &[], &["to/", "to/a=a", "to/b=b"]),
        (&["?"], "/to/", &[], &["to/", "to/a=a", "to/b=b", "to/e/", "to/e/y=d/e/y", "to/x=d/x", "to/e/y=d/e/y"]),
        (&["[a]*"], "/one", &[], &["one=a"]),
        (&["z*"], "/none", &[], &[]),
        (&["d"], "/new", &[], &["new/", "new/e/", "new/e/y=d/e/y", "new/x=d/x"]),
        (&["d"], "/", &["x=old"], &["e/", "e/y=d/e/y", "x=d/x"]),
        (&["l"], "/new", &[], &["new/", "new/e/", "new/e/y=d/e/y", "new/x=d/x"]),
        (&["la"], "/new/", &[], &["new/", "new/la=a"]),
        (&["l/x"], "/", &[], &["x=d/x"]),
        (
            &[""],
            "/all",
            &[],
            &[
                "all/",
                "all/a=a",
                "all/b=b",
                "all/d/",
                "all/d/e/",
                "all/d/e/y=d/e/y",
                "all/d/x=d/x",
                "all/l -> d",
                "all/la -> a",
            ],
        ),
        (&["a"], "/to/", &["to -> real", "real/"], &["real/", "real/a=a", "to -> real"]),
        (&["a"], "/to/new", &["to -> /real"], &["real/", "real/new=a", "to -> /real"]),
        (&["a"], "/up/new", &["up -> ../../.."], &["new=a", "up -> ../../.."]),
        (&["a"], "/to", &["to -> /file", "file=old"], &["file=a", "to -> /file"]),
        (&["d"], "/", &["x -> /elsewhere", "elsewhere=safe"], &["e/", "e/y=d/e/y", "elsewhere=safe", "x=d/x"]),
    ] {
        let case = Case::new(&source, root);
        let mut expect: Vec<String> = expect.iter().map(|line| (*line).to_owned()).collect();
        expect.sort();
        if paths == ["?"] {
            // `?` matches the link too, whose directory's contents are the same.
            expect.dedup();
        }
        assert_eq!(case.copy(&op(paths, destination)).unwrap(), expect, "{paths:?} to {destination} in {root:?}");
    }
}

#[test]
fn what_cannot_be_replaced_is_refused() {
    for (paths, destination, root, expect) in [
        (&["a"][..], "/to/", &["to/a/"][..], "cannot replace the directory /to/a"),
        (&["d"], "/to", &["to=file"], "cannot copy a directory to /to"),
        (&["d"], "/", &["e=file"], "cannot copy a directory to /e"),
        (&["d"], "/", &["e -> x", "x/"], "cannot copy a directory to /e"),
        (&["a"], "/file/below", &["file=x"], "/file, which is not a directory"),
        (&["[ab]"], "/new", &[], "matches several files"),
    ] {
        let case = Case::new(&["a", "b", "d/e/y"], root);
        let error = case.copy(&op(paths, destination)).unwrap_err().to_string();
        assert!(error.contains(expect), "{paths:?} to {destination}: {error}");
    }
}

#[test]
fn parents_and_excludes() {
    let source = ["a/b/c.txt", "a/b/d.md", "a/e.txt", "top.txt"];
    for (paths, exclude, expect) in [
        (&["a/b/c.txt"][..], &[][..], &["to/", "to/a/", "to/a/b/", "to/a/b/c.txt=a/b/c.txt"][..]),
        (&["a/./b/c.txt"], &[], &["to/", "to/b/", "to/b/c.txt=a/b/c.txt"]),
        (&["a/b"], &["**/*.md"], &["to/", "to/a/", "to/a/b/", "to/a/b/c.txt=a/b/c.txt"]),
        (&["**/*.txt"], &["a/b"], &["to/", "to/a/", "to/a/e.txt=a/e.txt", "to/top.txt=top.txt"]),
    ] {
        let case = Case::new(&source, &[]);
        let exclude = exclude.iter().map(|pattern| (*pattern).to_owned()).collect();
        let op = Copy { parents: true, exclude, ..op(paths, "/to") };
        assert_eq!(case.copy(&op).unwrap(), expect, "{paths:?}");
    }
    let case = Case::new(&["d/x.txt", "d/y.md", "d/k/x.txt", "d/k/keep.txt"], &[]);
    let exclude = vec!["*.md".into(), "k".into(), "!k/keep.txt".into()];
    let shown = case.copy(&Copy { exclude, ..op(&["d"], "/") }).unwrap();
    assert_eq!(shown, ["k/", "k/keep.txt=d/k/keep.txt", "x.txt=d/x.txt"]);
    let case = Case::new(&["hom.txt", "hom.md"], &[]);
    assert_eq!(
        case.copy(&Copy { exclude: vec!["*.txt".into()], ..op(&["hom*"], "/to/") }).unwrap(),
        ["to/", "to/hom.md=hom.md"]
    );
}

#[test]
fn owners_and_modes() {
    let root = ["etc/passwd=root:x:0:0::/:\nme:x:1000:1001::/:\n", "etc/group=root:x:0:\nours:x:50:\n", "d/ @700"];
    for (user, group, expect) in [
        ("me", None, (1000, 1001)),
        ("me", Some("ours"), (1000, 50)),
        ("7", None, (7, 7)),
        ("7", Some("8"), (7, 8)),
        ("0", Some("ours"), (0, 50)),
    ] {
        let case = Case::new(&["s/e/f @640"], &root);
        let owner = Some(Owner { user: user.into(), group: group.map(str::to_owned) });
        case.copy(&Copy { owner, ..op(&["s"], "/d/new") }).unwrap();
        for path in ["d/new", "d/new/e", "d/new/e/f"] {
            assert_eq!((case.stat(path).uid(), case.stat(path).gid()), expect, "{path}");
        }
        assert_eq!(case.stat("d").uid(), 0, "what was there keeps its owner");
        assert_eq!(case.stat("d").mode() & 0o7777, 0o700);
    }
    for (mode, expect) in [("0600", [0o600, 0o600, 0o600]), ("go-rwx,u+X", [0o755, 0o700, 0o600])] {
        let case = Case::new(&["s/e/ @755", "s/e/f @644"], &[]);
        case.copy(&Copy { mode: Some(mode.into()), ..op(&["s"], "/new") }).unwrap();
        let modes = ["new", "new/e", "new/e/f"].map(|path| case.stat(path).mode() & 0o7777);
        assert_eq!(modes.map(|mode| format!("{mode:o}")), expect.map(|mode| format!("{mode:o}")), "{mode}");
    }
    let case = Case::new(&["a"], &root);
    for (owner, expect) in [(("you", None), "unknown user \"you\""), (("me", Some("they")), "unknown group \"they\"")] {
        let owner = Some(Owner { user: owner.0.into(), group: owner.1.map(str::to_owned) });
        let error = case.copy(&Copy { owner, ..op(&["a"], "/") }).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
}

#[test]
fn times_links_attributes_and_special_files_are_kept() {
    let case = Case::new(&["d/a @4755", "d/sub/"], &[]);
    let source = |path: &str| case.source.path().join(path);
    fs::hard_link(source("d/a"), source("d/b")).unwrap();
    fs::File::open(source("d/a"))
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_500_000_007))
        .unwrap();
    let attributes = rustix::fs::setxattr(source("d/a"), c"user.note", b"1", XattrFlags::empty()).is_ok();
    case.copy(&Copy { owner: Some(Owner { user: "5".into(), group: None }), ..op(&["d"], "/") }).unwrap();
    let (a, b) = (case.stat("a"), case.stat("b"));
    assert_eq!((a.ino(), a.nlink()), (b.ino(), 2));
    assert_eq!((a.mode() & 0o7777, a.uid()), (0o4755, 5), "the owner is given before the set-user-id bit");
    assert_eq!((a.mtime(), a.mtime_nsec()), (1, 500_000_007));
    assert_eq!(case.stat("sub").mtime(), fs::metadata(source("d/sub")).unwrap().mtime());
    if attributes {
        let mut value = [0; 8];
        assert_eq!(rustix::fs::getxattr(case.root.path().join("a"), c"user.note", &mut value[..]), Ok(1));
    } else {
        eprintln!("skipped: no user attributes here");
    }
}

#[test]
fn a_file_that_changed_since_it_was_hashed_is_not_copied() {
    let case = Case::new(&["a=first"], &[]);
    let op = op(&["a"], "/");
    let tree = case.tree(&op);
    let file = case.source.path().join("a");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    copy(&op, case.root.path(), |_| &tree).unwrap();
    assert_eq!(case.stat("a").mode() & 0o7777, 0o644, "other bits now, but the bytes are those of then");
    fs::write(&file, "other").unwrap();
    let error = copy(&op, case.root.path(), |_| &tree).unwrap_err().to_string();
    assert!(error.contains("changed while it was copied"), "{error}");
    fs::remove_file(&file).unwrap();
    symlink("/etc/passwd", &file).unwrap();
    let error = copy(&op, case.root.path(), |_| &tree).unwrap_err().to_string();
    assert!(error.contains("changed while it was copied"), "{error}");
}

#[test]
fn heredocs_are_files() {
    let case = Case::new(&[], &[]);
    let sources = vec![CopySource::Inline { name: "f".into(), data: "text".into() }];
    assert_eq!(case.copy(&Copy { sources, ..op(&[], "/d/") }).unwrap(), ["d/", "d/f=text"]);
    assert_eq!(case.stat("d/f").mode() & 0o7777, 0o644);
}

/// A tar of one file, by hand: the format's description is what is tested against.
fn tar(name: &str, text: &str) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    for (at, field) in [(100, "0000640\0"), (108, "0000003\0"), (116, "0000004\0"), (136, "00000000001\0"), (156, "0")]
    {
        header[at..at + field.len()].copy_from_slice(field.as_bytes());
    }
    header[124..136].copy_from_slice(format!("{:011o}\0", text.len()).as_bytes());
    header[148..156].fill(b' ');
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend_from_slice(text.as_bytes());
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

#[test]
fn archives_are_known_by_their_content() {
    let case = Case::new(&["plain.tar=no archive"], &["to -> real", "real/"]);
    fs::write(case.source.path().join("odd-name"), tar("d/f", "inside")).unwrap();
    let op = Copy { unpack: Unpack::Archives, ..op(&["odd-name", "plain.tar"], "/to/") };
    let expect = ["real/", "real/d/", "real/d/f=inside", "real/plain.tar=no archive", "to -> real"];
    assert_eq!(case.copy(&op).unwrap(), expect);
    let stat = case.stat("real/d/f");
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (3, 4, 0o640));
    let kept = Case::new(&[], &[]);
    fs::write(kept.source.path().join("odd-name"), tar("d/f", "inside")).unwrap();
    let tree = kept.tree(&super::tests::op(&["odd-name"], "/"));
    copy(&super::tests::op(&["odd-name"], "/"), kept.root.path(), |_| &tree).unwrap();
    assert!(kept.stat("odd-name").is_file(), "COPY unpacks nothing");
}
