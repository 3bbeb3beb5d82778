use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// `path`, `path -> target` for a link, `path/` for a directory that gets made.
fn build(files: &[&str]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for file in files {
        if let Some((name, target)) = file.split_once(" -> ") {
            fs::create_dir_all(root.path().join(name).parent().unwrap()).unwrap();
            symlink(target, root.path().join(name)).unwrap();
        } else if let Some(directory) = file.strip_suffix('/') {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        } else {
            write(root.path(), file, file);
        }
    }
    root
}

#[derive(Default)]
struct Ask<'a> {
    paths: &'a [&'a str],
    exclude: &'a [&'a str],
    ignore: &'a [&'a str],
    parents: bool,
}

fn ask(root: &Path, ask: &Ask, cache: &StatCache) -> Result<Tree, ContextError> {
    let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    let selection = Selection { paths: owned(ask.paths), exclude: owned(ask.exclude) };
    let ignore = Patterns::new(ask.ignore).unwrap();
    let (ignore, owners) = (Some(&ignore), Owners::Root);
    scan(&Scan { root, selection: &selection, ignore, owners, parents: ask.parents }, cache)
}

fn all(root: &Path, cache: &StatCache) -> Tree {
    ask(root, &Ask { paths: &[""], ..Ask::default() }, cache).unwrap()
}

/// Paths of a tree, directories with a slash.
fn listing(tree: &Tree) -> Vec<String> {
    let mut paths = Vec::new();
    let mut todo = vec![(String::new(), tree.top())];
    while let Some((at, directory)) = todo.pop() {
        for entry in &tree.listing(directory).entries {
            let name = entry.name.to_str().unwrap();
            match entry.kind {
                Kind::Directory(below) => {
                    paths.push(format!("{at}{name}/"));
                    todo.push((format!("{at}{name}/"), below));
                }
                _ => paths.push(format!("{at}{name}")),
            }
        }
    }
    paths.sort();
    paths
}

#[test]
fn a_scan_holds_what_is_selected_and_no_more() {
    let files = [
        "a.txt",
        "b.md",
        "d/x.txt",
        "d/y.md",
        "d/e/z.txt",
        "link -> d",
        "out -> /etc",
        "up -> ../../d/e",
        "loop -> loop",
    ];
    let root = build(&files);
    for (paths, exclude, ignore, parents, expect) in [
        (&["a.txt"][..], &[][..], &[][..], false, "a.txt"),
        (&["./d/../a.txt"], &[], &[], false, "a.txt"),
        (&["d"], &[], &[], false, "d/ d/e/ d/e/z.txt d/x.txt d/y.md"),
        (&["d/e", "a.txt"], &[], &[], false, "a.txt d/ d/e/ d/e/z.txt"),
        (&["*.txt"], &[], &[], false, "a.txt"),
        (&["d/*.txt", "*.md"], &[], &[], false, "b.md d/ d/x.txt"),
        (&["*/*.txt"], &[], &[], false, "d/ d/x.txt"),
        (&["nothing*"], &[], &[], false, ""),
        (&["link/x.txt"], &[], &[], false, "d/ d/x.txt link"),
        (&["up"], &[], &[], false, "d/ d/e/ d/e/z.txt up"),
        (&["d", "d/e"], &[], &[], false, "d/ d/e/ d/e/z.txt d/x.txt d/y.md"),
        (&["d"], &["*.md"], &[], false, "d/ d/e/ d/e/z.txt d/x.txt"),
        (&["d"], &["e", "!e/z*"], &[], false, "d/ d/e/ d/e/z.txt d/x.txt d/y.md"),
        (&["[ab]*"], &["*.txt"], &[], false, "b.md"),
        (&["d"], &[], &["**/*.txt"], false, "d/ d/e/ d/y.md"),
        (&["d"], &[], &["d", "!d/e/z.txt"], false, "d/ d/e/ d/e/z.txt"),
        (&["d/e/z.txt"], &[], &["d", "!d/e/z.txt"], false, "d/ d/e/ d/e/z.txt"),
        (&["**/*.txt"], &[], &[], true, "a.txt d/ d/e/ d/e/z.txt d/x.txt"),
        (&["d/**/z.txt"], &[], &[], true, "d/ d/e/ d/e/z.txt"),
        (&["link"], &[], &[], true, "link"),
    ] {
        let tree = ask(root.path(), &Ask { paths, exclude, ignore, parents }, &StatCache::none()).unwrap();
        assert_eq!(listing(&tree).join(" "), expect, "{paths:?} {exclude:?} {ignore:?}");
    }
}

#[test]
fn what_cannot_be_selected_says_why() {
    let root = build(&["a.txt", "d/x", "loop -> loop", "dangling -> nowhere", "out -> /etc/passwd"]);
    for (path, ignore, expect) in [
        ("missing", &[][..], "\"missing\": not found"),
        ("a.txt/x", &[], "not found"),
        ("dangling", &[], "not found"),
        ("out", &[], "not found"), // inside the root there is no /etc/passwd
        ("a.txt", &["*.txt"], "\"a.txt\": not found: the ignore file excludes it"),
        ("d", &["d"], "ignore file"),
        ("../a.txt", &[], "outside of the context"),
        ("loop", &[], "too many levels"),
        ("[", &[], "invalid pattern"),
    ] {
        let error =
            ask(root.path(), &Ask { paths: &[path], ignore, ..Ask::default() }, &StatCache::none()).unwrap_err();
        assert!(error.to_string().contains(expect), "{path}: {error}");
    }
}

#[test]
fn the_digest_says_what_a_copy_would_see() {
    let root = build(&["a", "d/x", "d/y", "l -> a"]);
    let path = |name: &str| root.path().join(name);
    let digest = || all(root.path(), &StatCache::none()).digest;
    let first = digest();
    fs::File::open(path("a")).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(digest(), first, "times, and the root's own mode, do not count");

    let mut seen = vec![first];
    let mut changed = |what: &str| {
        let now = digest();
        assert!(!seen.contains(&now), "{what}");
        seen.push(now);
    };
    write(root.path(), "a", "other");
    changed("bytes");
    fs::set_permissions(path("a"), fs::Permissions::from_mode(0o755)).unwrap();
    changed("mode");
    fs::set_permissions(path("d"), fs::Permissions::from_mode(0o700)).unwrap();
    changed("mode of a directory");
    fs::rename(path("d/x"), path("d/z")).unwrap();
    changed("name");
    fs::remove_file(path("l")).unwrap();
    symlink("d", path("l")).unwrap();
    changed("link target");
    fs::remove_file(path("l")).unwrap();
    fs::write(path("l"), "d").unwrap();
    changed("type");
    match rustix::fs::setxattr(path("a"), c"user.x", b"1", rustix::fs::XattrFlags::empty()) {
        Ok(()) => changed("attribute"),
        Err(error) => eprintln!("skipped: no user attributes here: {error}"),
    }
}

#[test]
fn directories_on_the_way_count_only_with_parents() {
    let root = build(&["d/e/x"]);
    let digest = |parents| {
        ask(root.path(), &Ask { paths: &["d/e/x"], parents, ..Ask::default() }, &StatCache::none()).unwrap().digest
    };
    let (without, with) = (digest(false), digest(true));
    fs::set_permissions(root.path().join("d"), fs::Permissions::from_mode(0o711)).unwrap();
    assert_eq!(digest(false), without);
    assert_ne!(digest(true), with);
}

/// Makes every file older than the clock's tick, so that the cache records it.
fn age(root: &Path) {
    let cache = StatCache::none();
    let tick = Instant::now();
    let settled = || {
        all(root, &cache)
            .directories
            .iter()
            .flat_map(|listing| &listing.entries)
            .all(|entry| !matches!(entry.kind, Kind::File { settled: false, .. }))
    };
    while !settled() {
        assert!(tick.elapsed() < Duration::from_secs(10), "the clock stands still");
        std::thread::yield_now();
    }
}

#[test]
fn the_cache_is_saved_found_again_and_not_believed_when_damaged() {
    let root = build(&["a", "d/b"]);
    age(root.path());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sub/cache");
    let cache = StatCache::open(&file);
    let tree = all(root.path(), &cache);
    cache.save().unwrap();
    let saved = fs::read(&file).unwrap();

    let cache = StatCache::open(&file);
    let stamp = tree.entry(Path::new("d/b")).unwrap().stamp;
    let expect: [u8; 32] = {
        let mut digester = Digester::new();
        digester.update(b"d/b");
        digester.finish_bytes()
    };
    assert_eq!(cache.get(&stamp), Some(Known { digest: expect, attributes: false }));
    assert_eq!(cache.get(&Stamp { ctime: (stamp.ctime.0, stamp.ctime.1 ^ 1), ..stamp }), None);
    assert_eq!(all(root.path(), &cache).digest, tree.digest);
    fs::remove_file(&file).unwrap();
    cache.save().unwrap();
    assert!(!file.exists(), "nothing new, nothing written");
    fs::write(&file, &saved).unwrap();

    edit(root.path(), &Edit::Sneak(0, b'z')).unwrap();
    let fresh = all(root.path(), &StatCache::none()).digest;
    assert_ne!(fresh, tree.digest);
    assert_eq!(all(root.path(), &StatCache::open(&file)).digest, fresh, "same size, same mtime, other bytes");

    for at in [0, 17, 30, saved.len() / 2, saved.len() - 1] {
        let mut damaged = saved.clone();
        damaged[at] ^= 1;
        fs::write(&file, &damaged).unwrap();
        assert_eq!(StatCache::open(&file).get(&stamp), None, "byte {at}");
        fs::write(&file, &saved[..at]).unwrap();
        assert_eq!(StatCache::open(&file).get(&stamp), None, "cut at {at}");
    }
}

#[test]
fn records_that_no_scan_meets_are_dropped_after_a_while() {
    let root = build(&["a", "b"]);
    age(root.path());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cache");
    let open_and_scan = |paths: &[&str]| {
        let cache = StatCache::open(&file);
        ask(root.path(), &Ask { paths, ..Ask::default() }, &cache).unwrap();
        cache
    };
    open_and_scan(&["a", "b"]).save().unwrap();
    let size = || fs::metadata(&file).unwrap().len();
    let both = size();
    let made_up = |inode| Stamp { device: 1, inode, size: 0, mtime: (1, 1), ctime: (1, 1) };
    for round in 0..20 {
        let cache = open_and_scan(&["a"]);
        cache.put(&made_up(7), Known { digest: [round; 32], attributes: false }, SystemTime::now());
        cache.save().unwrap();
    }
    assert_eq!(size(), both, "b went, and the made-up one came");
}

#[derive(Clone, Debug)]
enum Edit {
    Touch(usize),
    /// Other bytes of the same length, and the old mtime put back.
    Sneak(usize, u8),
    Append(usize),
    Mode(usize, u32),
    Rename(usize, usize),
    Swap(usize, usize),
    Link(usize, usize),
    Remove(usize),
}

const NAMES: [&str; 6] = ["a", "b", "d/a", "d/b", "d/e/a", "f/a"];

fn edit(root: &Path, edit: &Edit) -> io::Result<()> {
    let path = |index: usize| root.join(NAMES[index]);
    match *edit {
        Edit::Touch(at) => fs::File::open(path(at))?.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(77)),
        Edit::Sneak(at, byte) => {
            let modified = fs::metadata(path(at))?.modified()?;
            let length = fs::read(path(at))?.len();
            fs::write(path(at), vec![byte; length])?;
            fs::File::open(path(at))?.set_modified(modified)
        }
        Edit::Append(at) => fs::read(path(at)).and_then(|mut bytes| {
            bytes.push(b'+');
            fs::write(path(at), bytes)
        }),
        Edit::Mode(at, mode) => fs::set_permissions(path(at), fs::Permissions::from_mode(mode)),
        Edit::Rename(from, to) => fs::rename(path(from), path(to)),
        Edit::Swap(a, b) => {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            Ok(rustix::fs::renameat_with(rustix::fs::CWD, path(a), rustix::fs::CWD, path(b), flags)?)
        }
        Edit::Link(at, to) => {
            fs::remove_file(path(at))?;
            symlink(path(to).file_name().unwrap(), path(at))
        }
        Edit::Remove(at) => fs::remove_file(path(at)),
    }
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let at = 0..NAMES.len();
    prop::collection::vec(
        prop_oneof![
            at.clone().prop_map(Edit::Touch),
            (at.clone(), b'a'..b'e').prop_map(|(at, byte)| Edit::Sneak(at, byte)),
            at.clone().prop_map(Edit::Append),
            (at.clone(), prop::sample::select(vec![0o644, 0o755, 0o600])).prop_map(|(at, mode)| Edit::Mode(at, mode)),
            (at.clone(), at.clone()).prop_map(|(a, b)| Edit::Rename(a, b)),
            (at.clone(), at.clone()).prop_map(|(a, b)| Edit::Swap(a, b)),
            (at.clone(), at.clone()).prop_map(|(a, b)| Edit::Link(a, b)),
            at.prop_map(Edit::Remove),
        ],
        1..12,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_edits_gives_a_stale_digest(edits in edits()) {
        let root = build(&NAMES);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cache");
        for step in &edits {
            // Edits that make no sense in this state (of a file that is gone) change nothing.
            edit(root.path(), step).ok();
            let cache = StatCache::open(&file);
            prop_assert_eq!(&all(root.path(), &cache).digest, &all(root.path(), &StatCache::none()).digest);
            cache.save().unwrap();
        }
    }
}

/// Not a test of speed by itself: prints what a warm scan of 20,000 files takes.
#[test]
#[ignore = "a measurement; run with --ignored --nocapture"]
fn warm_scan_of_20_000_files() {
    let root = tempfile::tempdir().unwrap();
    for directory in 0..500 {
        for file in 0..40 {
            write(
                root.path(),
                &format!("d{}/s{directory}/file-{file}.txt", directory % 20),
                &format!("{directory} {file}"),
            );
        }
    }
    age(root.path());
    let file = root.path().with_extension("cache");
    let cache = StatCache::open(&file);
    let start = Instant::now();
    let cold = all(root.path(), &cache);
    let scanned = start.elapsed();
    cache.save().unwrap();
    eprintln!("cold {scanned:?}, save {:?}", start.elapsed() - scanned);
    for _ in 0..5 {
        let start = Instant::now();
        let cache = StatCache::open(&file);
        let opened = start.elapsed();
        let warm = all(root.path(), &cache);
        eprintln!("open {opened:?}, all {:?}, {} entries", start.elapsed(), warm.len());
        assert_eq!(warm.digest, cold.digest);
    }
    let target = tempfile::tempdir().unwrap();
    let start = Instant::now();
    crate::execute::copy::materialise(&cold, target.path()).unwrap();
    eprintln!("copy {:?}", start.elapsed());
    fs::remove_file(file).unwrap();
}
