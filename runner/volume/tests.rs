use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("state")).unwrap();
    (directory, store)
}

fn request(id: &str, sharing: Sharing) -> CacheRequest {
    CacheRequest { id: id.to_owned(), sharing, seed: None, mode: 0o755, uid: 0, gid: 0 }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A cache that must be free.
fn take(store: &Store, request: &CacheRequest) -> CacheMount {
    wait(cache_mount(store, request, |id| panic!("waits for {id}"))).unwrap()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn any_id_is_a_directory_of_its_own() {
    let long = "x/".repeat(3000);
    let ids = [
        "",
        ".",
        "..",
        "../../etc",
        "/",
        "a/b",
        "a-b",
        "A-B",
        "a\0b",
        "a\nb",
        "ünïcode",
        "/root/.cache/go-build",
        &long,
    ];
    let names: std::collections::BTreeSet<String> = ids.iter().map(|id| cache_directory_name(id)).collect();
    assert_eq!(names.len(), ids.len());
    for name in &names {
        assert!(name.len() <= 80 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{name}");
    }
    assert!(names.iter().any(|name| name.ends_with("-root--cache-go-build")), "{names:?}");
}

#[test]
fn a_new_cache_has_its_mode_owner_and_seed_and_keeps_what_is_put_there() {
    let (directory, store) = store();
    let seed = directory.path().join("seed");
    fs::create_dir(&seed).unwrap();
    fs::write(seed.join("file"), "seeded").unwrap();
    let (uid, gid) =
        if is_root() { (12, 34) } else { (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw()) };
    let request = CacheRequest { seed: Some(seed.clone()), mode: 0o2770, uid, gid, ..request("id", Sharing::Shared) };
    let cache = take(&store, &request);
    let metadata = fs::metadata(cache.path()).unwrap();
    assert_eq!((metadata.permissions().mode() & 0o7777, metadata.uid(), metadata.gid()), (0o2770, uid, gid));
    assert_eq!(fs::read_to_string(cache.path().join("file")).unwrap(), "seeded");
    fs::write(cache.path().join("file"), "changed").unwrap();
    drop(cache);
    let cache = take(&store, &request);
    assert_eq!(fs::read_to_string(cache.path().join("file")).unwrap(), "changed");
    assert_eq!(fs::read_to_string(seed.join("file")).unwrap(), "seeded");
}

#[test]
fn a_seed_that_cannot_be_copied_leaves_no_cache() {
    let (directory, store) = store();
    let request = CacheRequest { seed: Some(directory.path().join("missing")), ..request("id", Sharing::Locked) };
    assert!(matches!(wait(cache_mount(&store, &request, |_| ())), Err(Error::Copy(_))));
    assert!(caches(&store).unwrap().is_empty());
}

#[test]
fn sharing_says_who_may_come_in() {
    use Sharing::{Locked, Private, Shared};
    // Who holds it, who comes, whether the second waits, whether they see the same.
    let cases = [
        (Shared, Shared, false, true),
        (Shared, Locked, true, true),
        (Locked, Shared, true, true),
        (Locked, Locked, true, true),
        (Private, Private, false, false),
        (Private, Shared, false, false),
        (Locked, Private, false, false),
    ];
    for (first, second, waits, same) in cases {
        let (_directory, store) = store();
        let held = take(&store, &request("id", first));
        let held_path = held.path().to_owned();
        let held = std::sync::Mutex::new(Some(held));
        let waited = AtomicBool::new(false);
        let let_go = |id: &str| {
            assert_eq!(id, "id");
            waited.store(true, Ordering::SeqCst);
            drop(held.lock().unwrap().take());
        };
        let got = wait(cache_mount(&store, &request("id", second), let_go)).unwrap();
        assert_eq!((waited.load(Ordering::SeqCst), got.path() == held_path), (waits, same), "{first:?} {second:?}");
    }
}

#[test]
fn a_private_cache_is_used_again_once_it_is_free() {
    let (_directory, store) = store();
    let private = request("id", Sharing::Private);
    let (one, two) = (take(&store, &private), take(&store, &private));
    fs::write(one.path().join("file"), "one").unwrap();
    assert!(!two.path().join("file").exists());
    drop(one);
    assert_eq!(fs::read_to_string(take(&store, &private).path().join("file")).unwrap(), "one");
}

#[test]
fn locked_means_one_at_a_time() {
    let (_directory, store) = store();
    let inside = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                // As another process would: with a store of its own.
                let store = Store::open(store.root()).unwrap();
                for _ in 0..20 {
                    let cache = wait(cache_mount(&store, &request("id", Sharing::Locked), |_| ())).unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    let count = fs::read_to_string(cache.path().join("count")).unwrap_or_default().len();
                    fs::write(cache.path().join("count"), "x".repeat(count + 1)).unwrap();
                    inside.fetch_sub(1, Ordering::SeqCst);
                }
            });
        }
    });
    let cache = take(&store, &request("id", Sharing::Locked));
    assert_eq!(fs::read_to_string(cache.path().join("count")).unwrap().len(), 120);
}

#[test]
fn steps_that_want_the_same_caches_never_wait_for_each_other_for_ever() {
    let (_directory, store) = store();
    thread::scope(|scope| {
        for order in [["a", "b", "a"], ["b", "a", "b"]] {
            let store = &store;
            scope.spawn(move || {
                let requests = order.map(|id| request(id, Sharing::Locked));
                for _ in 0..50 {
                    let mounts = wait(cache_mounts(store, &requests, |_| ())).unwrap();
                    assert_eq!(mounts[0].path(), mounts[2].path());
                    assert_ne!(mounts[0].path(), mounts[1].path());
                }
            });
        }
    });
}

#[test]
fn one_step_may_name_a_cache_twice() {
    let (_directory, store) = store();
    let requests =
        [Sharing::Shared, Sharing::Private, Sharing::Locked, Sharing::Private].map(|sharing| request("id", sharing));
    let mounts = wait(cache_mounts(&store, &requests, |id| panic!("waits for {id}"))).unwrap();
    let names: Vec<_> = mounts.iter().map(|mount| mount.path().file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["0", "1", "0", "2"]);
    // The stricter rule holds.
    assert!(
        try_lock(&instance_lock(mounts[0].path().parent().unwrap(), 0), FlockOperation::NonBlockingLockShared)
            .unwrap()
            .is_none()
    );
}

#[test]
fn a_wait_that_is_given_up_takes_nothing() {
    let (_directory, store) = store();
    let locked = request("id", Sharing::Locked);
    let held = take(&store, &locked);
    wait(async {
        let (told, mut hear) = tokio::sync::mpsc::unbounded_channel();
        let waiting = cache_mount(&store, &locked, move |_| told.send(()).unwrap());
        tokio::select! {
            biased;
            _ = waiting => panic!("got a cache that is held"),
            _ = hear.recv() => {}
        }
    });
    drop(held);
    drop(wait(cache_mount(&store, &locked, |_| ())).unwrap());
}

#[test]
fn pruning_spares_what_is_used_or_young() {
    let (_directory, store) = store();
    let held = take(&store, &request("held", Sharing::Shared));
    drop(take(&store, &request("old", Sharing::Private)));
    fs::write(held.path().join("file"), vec![1; 10_000]).unwrap();
    let listed = caches(&store).unwrap();
    assert_eq!(listed.iter().map(|cache| cache.id.as_str()).collect::<Vec<_>>(), ["held", "old"]);
    assert!(listed[0].size_bytes >= 8192);
    assert!(prune_caches(&store, Duration::from_secs(3600)).unwrap().is_empty());
    let removed = prune_caches(&store, Duration::ZERO).unwrap();
    assert_eq!(removed.iter().map(|cache| cache.id.as_str()).collect::<Vec<_>>(), ["old"]);
    drop(held);
    assert_eq!(prune_caches(&store, Duration::ZERO).unwrap().len(), 1);
    assert!(caches(&store).unwrap().is_empty());
    assert!(fs::read_dir(take(&store, &request("held", Sharing::Shared)).path()).unwrap().next().is_none());
}

#[test]
fn caches_come_and_go_under_pruning() {
    let (_directory, store) = store();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let users: Vec<_> = [Sharing::Shared, Sharing::Locked, Sharing::Private]
            .into_iter()
            .map(|sharing| {
                let store = &store;
                scope.spawn(move || {
                    for _ in 0..50 {
                        let cache = wait(cache_mount(store, &request("id", sharing), |_| ())).unwrap();
                        fs::write(cache.path().join("file"), "x").unwrap();
                    }
                })
            })
            .collect();
        let pruner = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                prune_caches(&store, Duration::ZERO).unwrap();
            }
        });
        let outcomes: Vec<_> = users.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::SeqCst);
        pruner.join().unwrap();
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    });
}

/// Starts one of the functions below as a process of its own.
fn start(name: &str, state: &Path) -> Child {
    let name = format!("volume::tests::{name}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &name, "--ignored", "--nocapture"]).env("FORGE_TEST_STATE", state);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    child
}

#[test]
#[ignore = "a process that another test starts and kills"]
fn hold_all_and_wait_for_death() {
    let Some(state) = std::env::var_os("FORGE_TEST_STATE") else { return };
    let store = Store::open(Path::new(&state)).unwrap();
    let _cache = take(&store, &request("id", Sharing::Locked));
    let _volume = Volumes::new(&store).open(&"data".parse().unwrap(), None).unwrap();
    println!("\nready");
    io::stdin().read_exact(&mut [0]).unwrap();
}

#[test]
fn what_a_killed_process_held_is_free() {
    let (_directory, store) = store();
    let child = start("hold_all_and_wait_for_death", store.root());
    let child = std::sync::Mutex::new(child);
    let kill = || {
        let mut child = child.lock().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    };
    let volumes = Volumes::new(&store);
    let name: VolumeName = "data".parse().unwrap();
    assert!(matches!(volumes.remove(&name), Err(Error::VolumeInUse(_))));
    let (told, hear) = mpsc::channel();
    drop(
        wait(cache_mount(&store, &request("id", Sharing::Locked), |id| {
            told.send(id.to_owned()).unwrap();
            kill();
        }))
        .unwrap(),
    );
    assert_eq!(hear.recv().unwrap(), "id");
    volumes.remove(&name).unwrap();
}

#[test]
fn volume_names_are_dockers() {
    for (name, valid) in [
        ("a", true),
        ("A.b_c-9", true),
        ("0", true),
        (&"x".repeat(255), true),
        (&"x".repeat(256), false),
        ("", false),
        (".", false),
        ("..", false),
        ("-a", false),
        ("_a", false),
        ("a/b", false),
        ("a b", false),
        ("ä", false),
        ("a\n", false),
    ] {
        assert_eq!(name.parse::<VolumeName>().is_ok(), valid, "{name:?}");
    }
}

#[test]
fn a_volume_lives_from_create_to_remove() {
    let (_directory, store) = store();
    let volumes = Volumes::new(&store);
    let name: VolumeName = "data".parse().unwrap();
    let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
    let made = volumes.create(&name, labels.clone()).unwrap();
    assert_eq!((made.anonymous, &made.labels), (false, &labels));
    assert_eq!(volumes.create(&name, BTreeMap::new()).unwrap(), made, "one that exists stays as it is");
    let anonymous = volumes.create_anonymous().unwrap();
    assert_eq!(anonymous.name.0.len(), 64);
    assert_eq!(volumes.list().unwrap().len(), 2);

    let (one, two) = (volumes.open(&name, None).unwrap(), volumes.open(&name, None).unwrap());
    fs::write(one.path().join("file"), "kept").unwrap();
    assert!(matches!(volumes.remove(&name), Err(Error::VolumeInUse(_))));
    drop(one);
    assert!(matches!(volumes.remove(&name), Err(Error::VolumeInUse(_))));
    assert_eq!(volumes.prune(Prune::All).unwrap(), [anonymous.name]);
    drop(two);
    assert!(volumes.prune(Prune::Anonymous).unwrap().is_empty());
    assert_eq!(fs::read_to_string(made.path.join("file")).unwrap(), "kept");
    volumes.remove(&name).unwrap();
    assert!(!made.path.exists());
    assert!(matches!(volumes.remove(&name), Err(Error::UnknownVolume(_))));
    assert!(matches!(volumes.inspect(&name), Err(Error::UnknownVolume(_))));
}

#[test]
fn the_first_use_of_a_volume_fills_it_once() {
    let (directory, store) = store();
    let seed = directory.path().join("seed");
    fs::create_dir(&seed).unwrap();
    fs::set_permissions(&seed, fs::Permissions::from_mode(0o1777)).unwrap();
    (0..50).for_each(|number| fs::write(seed.join(number.to_string()), "x").unwrap());
    let name: VolumeName = "data".parse().unwrap();
    let copies = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let volume = Volumes::new(&store).open(&name, Some(&seed)).unwrap();
                assert_eq!(fs::read_dir(volume.path()).unwrap().count(), 50);
                copies.fetch_add(u32::from(volume.copied.is_some()), Ordering::SeqCst);
            });
        }
    });
    assert_eq!(copies.load(Ordering::SeqCst), 1);
    let volume = Volumes::new(&store).open(&name, Some(&seed)).unwrap();
    assert_eq!(fs::metadata(volume.path()).unwrap().permissions().mode() & 0o7777, 0o1777);
}

#[test]
fn a_copy_is_like_what_it_copies() {
    let directory = tempfile::tempdir().unwrap();
    let (from, into) = (directory.path().join("from"), directory.path().join("into"));
    fs::create_dir_all(from.join("deep/er")).unwrap();
    fs::create_dir(&into).unwrap();
    fs::write(from.join("deep/program"), "#!").unwrap();
    fs::hard_link(from.join("deep/program"), from.join("zz-again")).unwrap();
    symlink("/etc/passwd", from.join("link")).unwrap();
    symlink("/nowhere", from.join("deep/er/dangling")).unwrap();
    nix::unistd::mkfifo(&from.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
    let program = from.join("deep/program");
    if is_root() {
        std::os::unix::fs::chown(&program, Some(12), Some(34)).unwrap();
        std::os::unix::fs::lchown(from.join("link"), Some(56), Some(78)).unwrap();
    }
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(from.join("deep"), fs::Permissions::from_mode(0o555)).unwrap();
    let marked = rustix::fs::setxattr(&program, "user.mark", b"value", rustix::fs::XattrFlags::empty()).is_ok();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    File::open(&program).unwrap().set_modified(long_ago).unwrap();
    File::open(from.join("deep")).unwrap().set_modified(long_ago).unwrap();

    let copied = copy_tree(&from, &into).unwrap();
    assert_eq!(copied, Copied { entries: 6, unmapped_owners: 0, sockets: 1 });
    let describe = |root: &Path, name: &str| {
        let metadata = fs::symlink_metadata(root.join(name)).unwrap();
        (metadata.mode(), metadata.uid(), metadata.gid(), metadata.nlink(), metadata.modified().unwrap())
    };
    for name in ["", "deep", "deep/er", "deep/program", "zz-again", "link", "deep/er/dangling", "pipe"] {
        assert_eq!(describe(&from, name), describe(&into, name), "{name}");
    }
    assert_eq!(
        fs::metadata(into.join("zz-again")).unwrap().ino(),
        fs::metadata(into.join("deep/program")).unwrap().ino()
    );
    assert_eq!(fs::read_link(into.join("link")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::read_to_string(into.join("zz-again")).unwrap(), "#!");
    assert!(!into.join("socket").exists());
    if marked {
        let mut value = [0; 16];
        let length = rustix::fs::getxattr(into.join("deep/program"), "user.mark", &mut value[..]).unwrap();
        assert_eq!(&value[..length], b"value");
    }
    // So that the directory can be removed by other users than root.
    fs::set_permissions(from.join("deep"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(into.join("deep"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_failed_copy_names_the_place() {
    let directory = tempfile::tempdir().unwrap();
    let (from, into) = (directory.path().join("from"), directory.path().join("into"));
    fs::create_dir_all(from.join("a")).unwrap();
    fs::write(from.join("a/file"), "").unwrap();
    fs::create_dir_all(into.join("a")).unwrap();
    let error = copy_tree(&from, &into).unwrap_err();
    assert_eq!(error.path, from.join("a"));
    let mut deep = from.join("a");
    (0..600).for_each(|_| deep.push("d"));
    fs::create_dir_all(&deep).unwrap();
    let fresh = directory.path().join("fresh");
    fs::create_dir(&fresh).unwrap();
    assert!(copy_tree(&from, &fresh).unwrap_err().to_string().contains("inside each other"));
}
