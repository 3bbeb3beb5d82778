//! What every snapshotter promises, asked of each driver that this machine can have.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;

use super::{Active, Driver, SnapshotId, Snapshotter};
use crate::{Digest, Error, OpenOptions, Store, View};

struct Bench {
    store: Store,
    directory: tempfile::TempDir,
    driver: Driver,
}

/// Runs a case on each driver.
fn each(case: impl Fn(&Bench)) {
    for driver in [Driver::Overlay, Driver::Plain] {
        let directory = tempfile::tempdir().unwrap();
        let probe = Store::open(directory.path()).unwrap();
        if driver == Driver::Overlay && probe.driver() != Driver::Overlay {
            let note = probe.driver_note().unwrap_or("in a user namespace").to_owned();
            writeln!(std::io::stderr(), "skipped: {note}").unwrap();
            continue;
        }
        drop(probe);
        let store = open(directory.path(), driver);
        case(&Bench { store, directory, driver });
    }
}

fn open(root: &Path, driver: Driver) -> Store {
    Store::open_with(root, OpenOptions { driver: Some(driver) }).unwrap()
}

fn id(name: &str) -> SnapshotId {
    SnapshotId(Digest::of(name))
}

impl Bench {
    fn snapshots(&self) -> &dyn Snapshotter {
        &**self.store.snapshots()
    }

    fn prepare(&self, parent: Option<&str>) -> Active {
        self.snapshots().prepare(parent.map(id).as_ref()).unwrap()
    }

    /// A snapshot called `name` over `parent`, changed by `change`.
    fn step(&self, parent: Option<&str>, name: &str, change: impl FnOnce(&Path)) -> super::Info {
        let active = self.prepare(parent);
        change(active.root());
        self.snapshots().commit(active, id(name)).unwrap()
    }

    fn view(&self, name: &str) -> View {
        self.snapshots().view(&id(name)).unwrap()
    }
}

fn write(path: PathBuf, text: &str) {
    fs::write(path, text).unwrap();
}

/// Every path with what it holds: `/` for directories, `-> target` for links.
fn listing(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap();
            let holds = if kind.is_dir() {
                pending.push(path.clone());
                "/".to_owned()
            } else if kind.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else {
                String::from_utf8(fs::read(&path).unwrap()).unwrap()
            };
            found.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned(), holds);
        }
    }
    found
}

fn check(root: &Path, expect: &[(&str, &str)]) {
    let expect: BTreeMap<String, String> = expect.iter().map(|(p, t)| ((*p).to_owned(), (*t).to_owned())).collect();
    assert_eq!(listing(root), expect);
}

#[test]
fn steps_stack_and_views_show_them() {
    each(|bench| {
        let first = bench.step(None, "first", |root| {
            write(root.join("kept"), "1");
            write(root.join("changed"), "1");
            write(root.join("removed"), "1");
            fs::create_dir_all(root.join("directory/inner")).unwrap();
            write(root.join("directory/file"), "1");
            symlink("kept", root.join("link")).unwrap();
        });
        assert_eq!((first.parent, first.id), (None, id("first")));
        let second = bench.step(Some("first"), "second", |root| {
            write(root.join("changed"), "2");
            fs::remove_file(root.join("removed")).unwrap();
            fs::remove_dir_all(root.join("directory")).unwrap();
            fs::create_dir(root.join("directory")).unwrap();
            write(root.join("directory/new"), "2");
        });
        assert_eq!(second.parent, Some(id("first")));
        assert_eq!(bench.snapshots().get(&id("second")).unwrap(), Some(second));
        let both = [("changed", "2"), ("directory", "/"), ("directory/new", "2"), ("kept", "1"), ("link", "-> kept")];
        check(bench.view("second").root(), &both);
        check(bench.prepare(Some("second")).root(), &both);
        check(
            bench.view("first").root(),
            &[
                ("changed", "1"),
                ("directory", "/"),
                ("directory/file", "1"),
                ("directory/inner", "/"),
                ("kept", "1"),
                ("link", "-> kept"),
                ("removed", "1"),
            ],
        );
    });
}

#[test]
fn an_empty_root_is_one_and_a_step_that_changes_nothing_has_no_directory() {
    each(|bench| {
        let scratch = SnapshotId::scratch();
        let info = bench.snapshots().get(&scratch).unwrap().unwrap();
        assert_eq!((info.parent, info.changes, info.size_bytes), (None, None, 0));
        let active = bench.snapshots().prepare(Some(&scratch)).unwrap();
        assert_eq!(fs::metadata(active.root()).unwrap().mode() & 0o7777, 0o755);
        check(active.root(), &[]);
        let nothing = bench.snapshots().commit(active, id("nothing")).unwrap();
        assert_eq!((&nothing.parent, &nothing.changes), (&None, &None));
        let more = bench.step(Some("nothing"), "more", |_| ());
        assert_eq!((more.parent, more.changes), (Some(id("nothing")), None));
        assert_eq!(fs::read_dir(bench.directory.path().join("snapshots")).unwrap().count(), 0);
        check(bench.view("more").root(), &[]);
        let file = bench.step(Some("more"), "file", |root| write(root.join("file"), "x"));
        assert!(file.changes.is_some() && file.size_bytes > 0);
        bench.step(Some("file"), "same", |_| ());
        check(bench.view("same").root(), &[("file", "x")]);
    });
}

#[test]
fn the_root_directory_keeps_its_mode_and_a_change_of_it_is_one() {
    each(|bench| {
        let closed = bench.step(None, "closed", |root| {
            fs::set_permissions(root, fs::Permissions::from_mode(0o1711)).unwrap();
            std::os::unix::fs::chown(root, Some(7), Some(8)).unwrap();
        });
        assert!(closed.changes.is_some());
        bench.step(Some("closed"), "file", |root| write(root.join("file"), "x"));
        for name in ["closed", "file"] {
            let view = bench.view(name);
            let root = fs::metadata(view.root()).unwrap();
            assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o1711, 7, 8), "{name}");
        }
    });
}

/// The changes, with overlay's marks as words.
fn changes_listing(driver: Driver, changes: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![changes.to_owned()];
    while let Some(path) = pending.pop() {
        let directory = File::open(&path).unwrap();
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            let name = std::ffi::CString::new(entry.file_name().as_encoded_bytes()).unwrap();
            let stat = rustix::fs::statat(&directory, &*name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
            let path = entry.path();
            let holds = if driver.is_whiteout(&directory, &name, &stat).unwrap() {
                "gone".to_owned()
            } else if path.is_dir() {
                pending.push(path.clone());
                "/".to_owned()
            } else {
                fs::read_to_string(&path).unwrap()
            };
            found.insert(path.strip_prefix(changes).unwrap().to_str().unwrap().to_owned(), holds);
        }
    }
    found
}

#[test]
fn changes_are_what_changed_and_nothing_else() {
    each(|bench| {
        bench.step(None, "base", |root| {
            for name in ["a/deep/er", "b", "c"] {
                fs::create_dir_all(root.join(name)).unwrap();
            }
            for name in ["a/deep/er/file", "a/other", "b/gone", "c/kept", "same", "swapped"] {
                write(root.join(name), "1");
            }
        });
        let mut active = bench.prepare(Some("base"));
        let root = active.root().to_owned();
        write(root.join("a/deep/er/file"), "2");
        fs::remove_file(root.join("b/gone")).unwrap();
        fs::remove_file(root.join("swapped")).unwrap();
        fs::create_dir(root.join("swapped")).unwrap();
        write(root.join("swapped/in"), "2");
        let expect = [
            ("a", "/"),
            ("a/deep", "/"),
            ("a/deep/er", "/"),
            ("a/deep/er/file", "2"),
            ("b", "/"),
            ("b/gone", "gone"),
            ("swapped", "/"),
            ("swapped/in", "2"),
        ];
        let expect: BTreeMap<_, _> = expect.map(|(p, t)| (p.to_owned(), t.to_owned())).into();
        assert_eq!(changes_listing(bench.driver, &active.changes().unwrap()), expect);
        let info = bench.snapshots().commit(active, id("next")).unwrap();
        assert_eq!(changes_listing(bench.driver, &info.changes.unwrap()), expect);
    });
}

/// Size and times alike, only the bytes differ: no step may lose such a change.
#[test]
fn a_change_that_sets_the_time_back_is_seen() {
    each(|bench| {
        bench.step(None, "base", |root| write(root.join("file"), "1"));
        bench.step(Some("base"), "next", |root| {
            let before = fs::metadata(root.join("file")).unwrap().modified().unwrap();
            write(root.join("file"), "2");
            File::options().write(true).open(root.join("file")).unwrap().set_modified(before).unwrap();
        });
        check(bench.view("next").root(), &[("file", "2")]);
    });
}

#[test]
fn everything_of_a_file_is_carried_along() {
    each(|bench| {
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
        bench.step(None, "base", |root| {
            write(root.join("one"), "twin");
            std::os::unix::fs::chown(root.join("one"), Some(1234), Some(4321)).unwrap();
            fs::set_permissions(root.join("one"), fs::Permissions::from_mode(0o4751)).unwrap();
            rustix::fs::setxattr(root.join("one"), "user.colour", b"blue", XattrFlags::empty()).unwrap();
            fs::hard_link(root.join("one"), root.join("two")).unwrap();
            File::open(root.join("one")).unwrap().set_modified(time).unwrap();
            let sparse = File::create(root.join("sparse")).unwrap();
            sparse.set_len(64 << 20).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (64 << 20) - 3).unwrap();
        });
        bench.step(Some("base"), "next", |root| write(root.join("other"), "x"));
        for root in [bench.view("next").root(), bench.prepare(Some("next")).root()] {
            let (one, two) = (fs::metadata(root.join("one")).unwrap(), fs::metadata(root.join("two")).unwrap());
            assert_eq!((one.mode() & 0o7777, one.uid(), one.gid()), (0o4751, 1234, 4321));
            assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
            assert_eq!(one.modified().unwrap(), time);
            let mut value = [0u8; 8];
            let length = rustix::fs::getxattr(root.join("one"), "user.colour", &mut value).unwrap();
            assert_eq!(&value[..length], b"blue");
            let sparse = fs::metadata(root.join("sparse")).unwrap();
            assert_eq!(sparse.len(), 64 << 20);
            assert!(sparse.blocks() * 512 < 1 << 20, "holes were filled");
            assert!(fs::read(root.join("sparse")).unwrap().ends_with(b"\0end"));
        }
    });
}

#[test]
fn adopted_layers_stack_like_steps() {
    each(|bench| {
        let layer = |parent: Option<&str>, name: &str, make: &dyn Fn(&Path)| {
            let ingest = bench.store.ingest().unwrap();
            let changes = ingest.path().join("fs");
            fs::create_dir(&changes).unwrap();
            fs::set_permissions(&changes, fs::Permissions::from_mode(0o755)).unwrap();
            make(&changes);
            let info = bench.snapshots().adopt(parent.map(id).as_ref(), &changes, id(name)).unwrap();
            assert!(!changes.exists(), "consumed");
            info
        };
        layer(None, "base", &|root| {
            fs::create_dir(root.join("directory")).unwrap();
            write(root.join("directory/old"), "1");
            write(root.join("gone"), "1");
            symlink("/etc", root.join("etc")).unwrap();
        });
        layer(Some("base"), "top", &|root| {
            fs::create_dir(root.join("directory")).unwrap();
            let name = bench.driver.opaque_attribute();
            rustix::fs::setxattr(root.join("directory"), name, b"y", XattrFlags::empty()).unwrap();
            write(root.join("directory/new"), "2");
            bench.driver.write_whiteout(File::open(root).unwrap(), c"gone").unwrap();
            fs::create_dir(root.join("etc")).unwrap();
            write(root.join("etc/passwd"), "2");
        });
        assert_eq!(layer(Some("top"), "empty", &|_| ()).changes, None);
        let expect = [("directory", "/"), ("directory/new", "2"), ("etc", "/"), ("etc/passwd", "2")];
        check(bench.view("empty").root(), &expect);
        check(bench.prepare(Some("empty")).root(), &expect);
        // Whoever comes second changes nothing.
        layer(None, "base", &|root| write(root.join("other"), "x"));
        assert!(!listing(bench.view("base").root()).contains_key("other"));
    });
}

/// Layers may put a file into a directory that they do not describe, and must not change the directory by that.
#[test]
fn directories_that_a_layer_does_not_describe_stay_as_they_were() {
    each(|bench| {
        let marked = |path: PathBuf, mode: u32, owner: u32| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            std::os::unix::fs::chown(&path, Some(owner), Some(owner)).unwrap();
            rustix::fs::setxattr(&path, "user.colour", b"blue", XattrFlags::empty()).unwrap();
            File::open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        };
        bench.step(None, "base", |root| {
            for path in ["private/inner", "cut/inner", "replaced", "target"] {
                fs::create_dir_all(root.join(path)).unwrap();
            }
            symlink("target", root.join("link")).unwrap();
            marked(root.join("private/inner"), 0o710, 7);
            marked(root.join("private"), 0o700, 5);
            marked(root.join("cut/inner"), 0o700, 5);
            marked(root.to_owned(), 0o711, 3);
        });
        bench.step(Some("base"), "between", |root| write(root.join("other"), "x"));

        let ingest = bench.store.ingest().unwrap();
        let changes = ingest.path().join("fs");
        for path in ["private/inner/new", "cut/inner/new", "link/new", "fresh/new"] {
            fs::create_dir_all(changes.join(path).parent().unwrap()).unwrap();
            write(changes.join(path), "x");
        }
        let name = bench.driver.opaque_attribute();
        rustix::fs::setxattr(changes.join("cut"), name, b"y", XattrFlags::empty()).unwrap();
        let implied = ["", "private", "private/inner", "cut/inner", "link", "fresh"].map(PathBuf::from);
        bench.snapshots().inherit(&id("between"), &changes, &implied).unwrap();
        bench.snapshots().adopt(Some(&id("between")), &changes, id("top")).unwrap();

        let view = bench.view("top");
        let described = |path: &str| {
            let meta = fs::symlink_metadata(view.root().join(path)).unwrap();
            let colour = rustix::fs::getxattr(view.root().join(path), "user.colour", &mut [0u8; 8]);
            (meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.mtime() == 0, colour.is_ok())
        };
        assert_eq!(described(""), (0o711, 3, 3, false, true));
        assert_eq!(described("private"), (0o700, 5, 5, true, true));
        assert_eq!(described("private/inner"), (0o710, 7, 7, true, true));
        // What is hidden, no directory, or not there has nothing to hand down.
        for path in ["cut/inner", "link", "fresh"] {
            let (_, uid, gid, _, colour) = described(path);
            assert_eq!((uid, gid, colour), (0, 0, false), "{path}");
        }
        assert!(view.root().join("target").is_dir() && !view.root().join("target/new").exists());
    });
}

#[test]
fn what_is_dropped_leaves_nothing() {
    each(|bench| {
        let active = bench.prepare(None);
        let root = active.root().to_owned();
        write(root.join("file"), "x");
        drop(active);
        assert!(!root.join("file").exists());
        bench.step(None, "base", |root| write(root.join("file"), "x"));
        drop(bench.view("base"));
        let session = root.parent().unwrap().parent().unwrap();
        // At most an empty place for the next root.
        let spare = listing(session);
        assert!(spare.len() <= 4 && spare.values().all(|holds| holds == "/"), "{spare:?}");
        assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(session.to_str().unwrap()));
    });
}

#[test]
fn parents_outlive_children_and_users() {
    each(|bench| {
        let snapshots = bench.snapshots();
        bench.step(None, "base", |root| write(root.join("file"), "x"));
        bench.step(Some("base"), "top", |root| write(root.join("more"), "x"));
        let refused = |name: &str, why: &str| match snapshots.remove(&id(name)) {
            Err(Error::SnapshotInUse { by, .. }) => assert!(by.contains(why), "{by}"),
            other => panic!("{other:?}"),
        };
        refused("base", "another snapshot");
        let view = bench.view("top");
        refused("top", "this process");
        drop(view);
        let active = bench.prepare(Some("top"));
        refused("top", "this process");
        drop(active);

        let other = open(bench.directory.path(), bench.driver);
        assert!(other.snapshots().get(&id("top")).unwrap().is_some());
        refused("top", "another forge process");
        drop(other);

        snapshots.remove(&id("top")).unwrap();
        snapshots.remove(&id("base")).unwrap();
        assert_eq!(snapshots.get(&id("base")).unwrap(), None);
        assert!(matches!(snapshots.prepare(Some(&id("base"))), Err(Error::UnknownSnapshot(_))));
        assert_eq!(fs::read_dir(bench.directory.path().join("snapshots")).unwrap().count(), 0);
    });
}

#[test]
fn many_processes_commit_the_same_and_one_wins() {
    each(|bench| {
        bench.step(None, "base", |root| write(root.join("file"), "base"));
        std::thread::scope(|scope| {
            for number in 0..6 {
                scope.spawn(move || {
                    let store = open(bench.directory.path(), bench.driver);
                    for round in 0..8 {
                        let active = store.snapshots().prepare(Some(&id("base"))).unwrap();
                        write(active.root().join("file"), &format!("{round}"));
                        let info = store.snapshots().commit(active, id(&format!("step {round}"))).unwrap();
                        let changes = info.changes.unwrap();
                        assert_eq!(fs::read_to_string(changes.join("file")).unwrap(), format!("{round}"));
                        let own = store.snapshots().prepare(Some(&info.id)).unwrap();
                        write(own.root().join("own"), &format!("{number}"));
                        store.snapshots().commit(own, id(&format!("own {number} {round}"))).unwrap();
                    }
                });
            }
        });
        let count = fs::read_dir(bench.directory.path().join("snapshots")).unwrap().count();
        assert_eq!(count, 1 + 8 + 6 * 8);
        check(bench.view("own 3 7").root(), &[("file", "7"), ("own", "3")]);
    });
}

/// A power cut before the sync: the row may be there and the files torn.
#[test]
fn what_another_boot_did_not_settle_is_made_again() {
    each(|bench| {
        bench.step(None, "settled", |root| write(root.join("file"), "1"));
        bench.store.settle().unwrap();
        bench.step(Some("settled"), "torn", |root| write(root.join("file"), "torn"));
        let sql = "UPDATE snapshots SET boot = 'other' WHERE boot IS NOT NULL";
        assert_eq!(bench.store.database().with(|connection| connection.execute(sql, [])).unwrap(), 1);
        let after = Bench { store: open(bench.directory.path(), bench.driver), ..again(bench) };
        assert!(after.snapshots().get(&id("settled")).unwrap().is_some());
        assert_eq!(after.snapshots().get(&id("torn")).unwrap(), None);
        after.step(Some("settled"), "torn", |root| write(root.join("file"), "whole"));
        check(after.view("torn").root(), &[("file", "whole")]);
    });
}

fn again(bench: &Bench) -> Bench {
    Bench { store: bench.store.clone(), directory: tempfile::tempdir().unwrap(), driver: bench.driver }
}

/// A row whose directory somebody removed by hand, and a directory without a row.
#[test]
fn rows_and_directories_that_lost_each_other_are_repaired() {
    each(|bench| {
        let info = bench.step(None, "step", |root| write(root.join("file"), "1"));
        let directory = info.changes.unwrap().parent().unwrap().to_owned();
        fs::remove_dir_all(&directory).unwrap();
        fs::create_dir_all(directory.join("fs")).unwrap();
        write(directory.join("fs/stale"), "x");
        bench.store.database().with(|connection| connection.execute("DELETE FROM snapshots", [])).unwrap();
        let after = Bench { store: open(bench.directory.path(), bench.driver), ..again(bench) };
        assert_eq!(after.snapshots().get(&id("step")).unwrap(), None);
        after.step(None, "step", |root| write(root.join("file"), "2"));
        check(after.view("step").root(), &[("file", "2")]);

        fs::remove_dir_all(&directory).unwrap();
        let last = Bench { store: open(bench.directory.path(), bench.driver), ..again(bench) };
        assert_eq!(last.snapshots().get(&id("step")).unwrap(), None);
    });
}

const KILLED: &str = "FORGE_TEST_KILLED_STORE";

/// Commits one snapshot after another until it is killed; does nothing when run as a test.
#[test]
fn commits_until_killed() {
    let Some(root) = std::env::var_os(KILLED) else { return };
    let (driver, root) = root.to_str().unwrap().split_once(' ').unwrap();
    let store = open(Path::new(root), Driver::from_name(driver).unwrap());
    let mut parent = None;
    for number in 0.. {
        let active = store.snapshots().prepare(parent.as_ref()).unwrap();
        write(active.root().join(format!("{number}")), "whole");
        write(active.root().join("last"), &format!("{number}"));
        let info = store.snapshots().commit(active, id(&format!("{number}"))).unwrap();
        parent = Some(info.id);
        writeln!(std::io::stdout(), "committed {number}").unwrap();
    }
}

#[test]
fn kill_nine_loses_nothing_that_was_committed() {
    use std::io::{BufRead, BufReader};
    each(|bench| {
        let root = bench.directory.path();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "snapshot::conformance::commits_until_killed", "--nocapture"])
            .env(KILLED, format!("{} {}", bench.driver.name(), root.display()))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut committed = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
            if let Some((_, number)) = line.split_once("committed ") {
                committed = number.parse().unwrap();
            }
            if committed == 20 {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(committed >= 20);

        let left = fs::read_dir(root.join("active")).unwrap().count();
        assert!(left >= 2, "the child left its session behind");
        let name = committed.to_string();
        let view = bench.view(&name);
        assert_eq!(fs::read_to_string(view.root().join("last")).unwrap(), name);
        assert_eq!(fs::read_dir(view.root()).unwrap().count(), committed + 2);
        // The next session has swept what the dead one left: its own directory and lock are all there is.
        assert_eq!(fs::read_dir(root.join("active")).unwrap().count(), 2);
        bench.step(Some(&name), "next build", |root| write(root.join("next"), "x"));
        crate::session::empty_trash(root).unwrap();
    });
}
