//! Snapshots stacked by the kernel's overlay file system.
//!
//! ```text
//! snapshots/<c>/fs     lowerdir+      the parent
//! snapshots/<b>/fs     lowerdir+      its parent that changes something
//! active/<s>/<n>/fs    upperdir       what the step changes: the snapshot to be
//! active/<s>/<n>/work  workdir
//! active/<s>/<n>/root  the mount
//! ```
//! The upper directory alone must be the change, so nothing in it may point into a lower one: `redirect_dir`,
//! `index` and `metacopy` are off. `volatile` saves every sync: what a power cut could tear is not believed
//! after it (see the crate's documentation), which also means that a program's own fsync in a root costs nothing
//! and keeps nothing.
//!
//! Layers are given one by one where the kernel takes that (6.5), without a limit on their names' length. Before,
//! mount(2) takes them in one page of options: they are opened first and named `/proc/self/fd/<n>`.

mod untouched;

use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::shelf::{Place, Settled, Shelf, Use, copy_directory_attributes, disk_usage, is_untouched};
use super::{Active, ActiveState, Driver, Info, SnapshotId, Snapshotter, View};
use crate::session::Session;
use crate::{Context, Error, Result, create_directory};

/// The kernel's OVL_MAX_STACK.
const LOWERS_MAX: usize = 500;
/// fsconfig(2) takes strings of up to 255 bytes.
const STRING_MAX: usize = 255;
/// mount(2) takes one page, with a terminating zero.
const OPTIONS_MAX: usize = 4095;
/// How long a mount may stay busy once its step has ended: a fork in another thread holds every descriptor of
/// this process until it executes.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// With these the upper directory says everything itself. A user's overlay takes no other word for no redirects.
const OPTIONS: [(&str, &str); 3] = [("redirect_dir", "nofollow"), ("index", "off"), ("metacopy", "off")];

/// Set when this kernel does not take layers one by one.
static CLASSIC: AtomicBool = AtomicBool::new(false);

pub(crate) struct Overlay {
    shelf: Arc<Shelf>,
    driver: Driver,
}

impl Overlay {
    pub(crate) fn new(shelf: Arc<Shelf>, driver: Driver) -> Overlay {
        Overlay { shelf, driver }
    }

    /// Top first.
    fn lowers(&self, id: Option<&SnapshotId>) -> Result<Vec<PathBuf>> {
        let stack = id.map(|id| self.shelf.stack(id)).transpose()?.unwrap_or_default();
        if stack.len() > LOWERS_MAX {
            return Err(Error::TooManyLayers { count: stack.len(), limit: LOWERS_MAX });
        }
        Ok(stack.iter().map(|id| self.shelf.directory(id).join("fs")).collect())
    }
}

impl Snapshotter for Overlay {
    fn get(&self, id: &SnapshotId) -> Result<Option<Info>> {
        self.shelf.get(id)
    }

    fn prepare(&self, parent: Option<&SnapshotId>) -> Result<Active> {
        let held = parent.map(|parent| self.shelf.hold(parent)).transpose()?;
        let mut lowers = self.lowers(parent)?;
        if lowers.is_empty() {
            lowers.push(self.shelf.empty());
        }
        let place = Place::new(&self.shelf)?;
        let upper = place.make("fs")?;
        copy_directory_attributes(&lowers[0], &upper)?;
        let fresh = fs::metadata(&upper).context("look at", &upper)?;
        let layers = Layers { driver: self.driver, upper: Some((upper, place.make("work")?)), lowers };
        let mount = Mount::new(&layers, place.make("root")?)?;
        let (root, lowers, driver) = (mount.at.clone(), layers.lowers, self.driver);
        let state = OverlayActive { root, mount: Some(mount), lowers, driver, fresh, place, _held: held };
        Ok(Active { parent: parent.cloned(), state: Box::new(state) })
    }

    fn commit(&self, mut active: Active, id: SnapshotId) -> Result<Info> {
        let settled = active.state.settle()?;
        self.shelf.publish(&id, active.parent.as_ref(), &settled)
    }

    fn inherit(&self, parent: &SnapshotId, changes: &Path, directories: &[PathBuf]) -> Result<()> {
        self.shelf.inherit(self.driver, parent, changes, directories)
    }

    fn adopt(&self, parent: Option<&SnapshotId>, changes: &Path, id: SnapshotId) -> Result<Info> {
        self.shelf.adopt(parent, changes, &id)
    }

    fn view(&self, id: &SnapshotId) -> Result<View> {
        let held = self.shelf.hold(id)?;
        let place = Place::new(&self.shelf)?;
        let mut lowers = self.lowers(Some(id))?;
        // A stack without an upper directory needs two layers, and no layer twice.
        if lowers.is_empty() {
            let top = place.make("fs")?;
            copy_directory_attributes(&self.shelf.empty(), &top)?;
            lowers.push(top);
        }
        if lowers.len() == 1 {
            lowers.push(self.shelf.empty());
        }
        let mount = Mount::new(&Layers { driver: self.driver, upper: None, lowers }, place.make("root")?)?;
        Ok(View { root: mount.at.clone(), _guard: Some(Box::new((mount, place, held))) })
    }

    fn remove(&self, id: &SnapshotId) -> Result<()> {
        self.shelf.remove(id)
    }
}

struct OverlayActive {
    root: PathBuf,
    mount: Option<Mount>,
    /// Top first.
    lowers: Vec<PathBuf>,
    driver: Driver,
    /// The upper directory's own attributes before the step.
    fresh: fs::Metadata,
    place: Place,
    _held: Option<Use>,
}

impl ActiveState for OverlayActive {
    fn root(&self) -> &Path {
        &self.root
    }

    fn changes(&mut self) -> Result<PathBuf> {
        let upper = self.place.path("fs");
        if let Some(mount) = &mut self.mount {
            mount.end()?;
            untouched::remove(&upper, &self.lowers, self.driver)?;
        }
        self.mount = None;
        Ok(upper)
    }

    fn settle(&mut self) -> Result<Settled> {
        let upper = self.changes()?;
        if is_untouched(&upper, &self.fresh)? {
            return Ok(Settled::nothing());
        }
        let size_bytes = disk_usage(&upper)?;
        Ok(Settled { parts: vec![(upper, "fs")], size_bytes })
    }
}

struct Layers {
    driver: Driver,
    /// The upper directory and the work directory; a stack without them is read-only.
    upper: Option<(PathBuf, PathBuf)>,
    lowers: Vec<PathBuf>,
}

/// A mounted overlay. Dropping it detaches it.
struct Mount {
    at: PathBuf,
    mounted: bool,
}

impl Mount {
    fn new(layers: &Layers, at: PathBuf) -> Result<Mount> {
        let classic = CLASSIC.load(Ordering::Relaxed);
        let attempt = if classic { Err(Errno::NOSYS) } else { mount_layer_by_layer(layers, &at) };
        match attempt {
            Err(Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                mount_in_one_page(layers, &at)?;
                CLASSIC.store(true, Ordering::Relaxed);
            }
            result => result.context("mount an overlay on", &at)?,
        }
        Ok(Mount { at, mounted: true })
    }

    /// Unmounts for good: afterwards nothing can write through it.
    fn end(&mut self) -> Result<()> {
        let deadline = Instant::now() + BUSY_PATIENCE;
        loop {
            match rustix::mount::unmount(&self.at, UnmountFlags::NOFOLLOW) {
                Ok(()) => break,
                Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(BUSY_PAUSE),
                Err(error) => return Err(error).context("unmount (something still uses it)", &self.at),
            }
        }
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.mounted || rustix::mount::unmount(&self.at, UnmountFlags::NOFOLLOW).is_ok() {
            return;
        }
        // Something still uses it, and may go on writing to its directories until it ends. What is put in the
        // mount point keeps the next root out of them. Should all of this fail, the mount dies with its namespace.
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).ok();
        drop(File::create(self.at.join("detached")));
    }
}

/// A directory under a name that fits and needs no escapes.
struct Named {
    name: PathBuf,
    _open: Option<OwnedFd>,
}

fn opened(path: &Path) -> rustix::io::Result<Named> {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(Named { name: format!("/proc/self/fd/{}", fd.as_raw_fd()).into(), _open: Some(fd) })
}

fn named(path: &Path) -> rustix::io::Result<Named> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let plain = bytes.len() <= STRING_MAX && !bytes.iter().any(|byte| matches!(byte, b'\\' | b',' | b':'));
    match plain {
        true => Ok(Named { name: path.to_owned(), _open: None }),
        false => opened(path),
    }
}

fn mount_layer_by_layer(layers: &Layers, at: &Path) -> rustix::io::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "forge")?;
    if layers.driver == Driver::OverlayUser {
        fsconfig_set_flag(&context, "userxattr")?;
    }
    for (key, value) in OPTIONS {
        fsconfig_set_string(&context, key, value)?;
    }
    for lower in &layers.lowers {
        fsconfig_set_string(&context, "lowerdir+", named(lower)?.name)?;
    }
    let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    if let Some((upper, work)) = &layers.upper {
        fsconfig_set_string(&context, "upperdir", named(upper)?.name)?;
        fsconfig_set_string(&context, "workdir", named(work)?.name)?;
        fsconfig_set_flag(&context, "volatile")?;
        attributes = MountAttrFlags::empty();
    }
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn mount_in_one_page(layers: &Layers, at: &Path) -> Result<()> {
    let mut options = OPTIONS.map(|(key, value)| format!("{key}={value}")).join(",");
    if layers.driver == Driver::OverlayUser {
        options.push_str(",userxattr");
    }
    let mut open = Vec::new();
    let mut flags = MountFlags::RDONLY;
    if let Some((upper, work)) = &layers.upper {
        for (key, path) in [("upperdir", upper), ("workdir", work)] {
            let directory = opened(path).context("open", path)?;
            push(&mut options, format_args!(",{key}={}", directory.name.display()));
            open.push(directory);
        }
        flags = MountFlags::empty();
    }
    for (number, lower) in layers.lowers.iter().enumerate() {
        let directory = opened(lower).context("open", lower)?;
        let before = if number == 0 { ",lowerdir=" } else { ":" };
        push(&mut options, format_args!("{before}{}", directory.name.display()));
        open.push(directory);
    }
    if options.len() + ",volatile".len() > OPTIONS_MAX {
        let limit = layers.lowers.len() * OPTIONS_MAX / options.len();
        return Err(Error::TooManyLayers { count: layers.lowers.len(), limit });
    }
    let mount = |options: String| {
        let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
        rustix::mount::mount("forge", at, "overlay", flags, options.as_c_str())
    };
    let mounted = match flags.contains(MountFlags::RDONLY) {
        true => mount(options),
        // Kernels before 5.10 do not know it, and only sync more.
        false => match mount(format!("{options},volatile")) {
            Err(Errno::INVAL) => mount(options),
            result => result,
        },
    };
    mounted.context("mount an overlay on", at)
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a string does not fail");
}

/// Mounts a small overlay and looks whether it notes down removals as promised.
pub(crate) fn probe(session: &Session, driver: Driver) -> Result<()> {
    let base = session.fresh_path()?;
    create_directory(&base)?;
    let result = probe_in(&base, driver);
    // A refused mount leaves a handful of empty directories, and those go with the session if not now.
    drop(fs::remove_dir_all(&base));
    result
}

fn probe_in(base: &Path, driver: Driver) -> Result<()> {
    let [lower, bottom, upper, work, at] = ["lower", "bottom", "upper", "work", "root"].map(|name| base.join(name));
    for path in [&lower.join("directory"), &bottom, &upper, &work, &at] {
        create_directory(path)?;
    }
    File::create(lower.join("file")).context("create a file in", &lower)?;
    let lowers = vec![lower, bottom];
    let mut mount = Mount::new(&Layers { driver, upper: Some((upper.clone(), work)), lowers }, at.clone())?;
    fs::remove_file(at.join("file")).context("remove a file in", &at)?;
    fs::remove_dir(at.join("directory")).context("remove a directory in", &at)?;
    fs::create_dir(at.join("directory")).context("create a directory in", &at)?;
    mount.end()?;

    let whiteout = fs::symlink_metadata(upper.join("file")).context("find a whiteout in", &upper)?;
    let opaque = rustix::fs::getxattr(upper.join("directory"), driver.opaque_attribute(), &mut [0u8; 8]);
    opaque.context("find an opaque directory in", &upper)?;
    match whiteout.file_type().is_char_device() && whiteout.rdev() == 0 {
        true => Ok(()),
        false => Err(io::Error::from(io::ErrorKind::Unsupported)).context("find a whiteout in", &upper),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use super::*;
    use crate::{Digest, OpenOptions, Store};

    fn id(number: usize) -> SnapshotId {
        SnapshotId(Digest::of(number.to_string()))
    }

    /// A store with `count` snapshots above each other; None where overlay cannot be had.
    fn store(root: &Path, count: usize) -> Option<Store> {
        let store = Store::open(root).unwrap();
        if store.driver() == Driver::Plain {
            let note = store.driver_note().unwrap_or_default();
            writeln!(std::io::stderr(), "skipped: {note}").unwrap();
            return None;
        }
        for number in 0..count {
            let ingest = store.ingest().unwrap();
            let changes = ingest.path().join("fs");
            fs::create_dir(&changes).unwrap();
            fs::write(changes.join(number.to_string()), "x").unwrap();
            let parent = number.checked_sub(1).map(id);
            store.snapshots().adopt(parent.as_ref(), &changes, id(number)).unwrap();
        }
        Some(store)
    }

    fn count(root: &Path) -> usize {
        fs::read_dir(root).unwrap().count()
    }

    #[test]
    fn as_many_layers_as_the_kernel_takes_and_then_a_clear_word() {
        let directory = tempfile::tempdir().unwrap();
        let Some(store) = store(directory.path(), LOWERS_MAX + 1) else { return };
        let deepest = store.snapshots().prepare(Some(&id(LOWERS_MAX - 1))).unwrap();
        assert_eq!(count(deepest.root()), LOWERS_MAX);
        let error = store.snapshots().prepare(Some(&id(LOWERS_MAX))).err().unwrap().to_string();
        assert!(error.contains("501 layers are more than the 500"), "{error}");
    }

    #[test]
    fn names_that_are_long_or_look_like_options_are_mounted_too() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["long".repeat(60), "a,lowerdir=b:c\\d".to_owned()] {
            let Some(store) = store(&directory.path().join(&name), 3) else { return };
            assert_eq!(count(store.snapshots().view(&id(2)).unwrap().root()), 3);
            assert_eq!(count(store.snapshots().prepare(Some(&id(2))).unwrap().root()), 3);
        }
    }

    /// How kernels before 6.5 are asked.
    #[test]
    fn one_page_of_options_mounts_the_same_and_says_when_it_is_full() {
        let directory = tempfile::tempdir().unwrap();
        let Some(store) = store(directory.path(), 0) else { return };
        let base = directory.path().join("by hand");
        let lowers: Vec<PathBuf> = (0..150).map(|number| base.join(number.to_string())).collect();
        for (number, lower) in lowers.iter().enumerate() {
            fs::create_dir_all(lower).unwrap();
            fs::write(lower.join(format!("file {number}")), "x").unwrap();
        }
        let [upper, work, at] = ["upper", "work", "root"].map(|name| base.join(name));
        for path in [&upper, &work, &at] {
            fs::create_dir(path).unwrap();
        }
        let layers = Layers { driver: store.driver(), upper: Some((upper.clone(), work)), lowers };
        mount_in_one_page(&layers, &at).unwrap();
        let mut mount = Mount { at: at.clone(), mounted: true };
        fs::remove_file(at.join("file 7")).unwrap();
        assert_eq!(count(&at), 149);
        mount.end().unwrap();
        assert_eq!(count(&upper), 1);

        let view = Layers { upper: None, lowers: layers.lowers, ..layers };
        mount_in_one_page(&view, &at).unwrap();
        let mount = Mount { at: at.clone(), mounted: true };
        assert_eq!(count(&at), 150);
        assert!(fs::write(at.join("new"), "x").is_err(), "a view is read-only");
        drop(mount);
        let many = Layers { lowers: vec![view.lowers[0].clone(); 400], ..view };
        assert!(matches!(mount_in_one_page(&many, &at), Err(Error::TooManyLayers { .. })));
    }

    #[test]
    fn a_root_in_use_is_not_committed() {
        let directory = tempfile::tempdir().unwrap();
        let Some(store) = store(directory.path(), 1) else { return };
        let active = store.snapshots().prepare(Some(&id(0))).unwrap();
        let file = File::create(active.root().join("file")).unwrap();
        let error = store.snapshots().commit(active, id(1)).err().unwrap();
        assert!(error.to_string().contains("something still uses it"), "{error}");
        // The next root has nothing to do with the one that somebody still has open.
        let next = store.snapshots().prepare(Some(&id(0))).unwrap();
        assert_eq!(count(next.root()), 1);
        drop(file);
        assert_eq!(store.snapshots().get(&id(1)).unwrap(), None);
    }

    const INSIDE: &str = "FORGE_TEST_USER_NAMESPACE";

    /// Runs the conformance suite's first cases as root of a user namespace, where the driver is another.
    #[test]
    fn in_a_user_namespace_the_driver_marks_changes_with_user_attributes() {
        if std::env::var_os(INSIDE).is_none() {
            let name = "snapshot::overlay::tests::in_a_user_namespace_the_driver_marks_changes_with_user_attributes";
            let this = std::env::current_exe().unwrap();
            let mut command = Command::new("unshare");
            command.args(["--user", "--map-root-user", "--mount"]).arg(this).args(["--exact", name]).env(INSIDE, "1");
            match command.output() {
                Err(error) => writeln!(std::io::stderr(), "skipped: unshare: {error}").unwrap(),
                Ok(output) => {
                    let error = String::from_utf8_lossy(&output.stderr);
                    match error.starts_with("unshare:") {
                        true => writeln!(std::io::stderr(), "skipped: {error}").unwrap(),
                        false => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
                    }
                }
            }
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!((store.driver(), store.driver_note()), (Driver::OverlayUser, None));
        let active = store.snapshots().prepare(None).unwrap();
        fs::create_dir(active.root().join("directory")).unwrap();
        fs::write(active.root().join("gone"), "x").unwrap();
        store.snapshots().commit(active, id(0)).unwrap();
        let active = store.snapshots().prepare(Some(&id(0))).unwrap();
        fs::remove_file(active.root().join("gone")).unwrap();
        fs::remove_dir(active.root().join("directory")).unwrap();
        fs::create_dir(active.root().join("directory")).unwrap();
        let changes = store.snapshots().commit(active, id(1)).unwrap().changes.unwrap();
        assert_eq!(count(&changes), 2);
        let opaque = rustix::fs::getxattr(changes.join("directory"), "user.overlay.opaque", &mut [0u8; 8]);
        assert_eq!(opaque, Ok(1));
        assert_eq!(count(store.snapshots().view(&id(1)).unwrap().root()), 1);
    }

    #[test]
    fn the_driver_is_probed_once_and_another_can_be_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let probed = Store::open(directory.path()).unwrap().driver();
        let kept = fs::read_to_string(directory.path().join("driver")).unwrap();
        assert_eq!(kept.lines().nth(1), Some(probed.name()));
        let facts = kept.lines().next().unwrap();
        fs::write(directory.path().join("driver"), format!("{facts}\nplain\nfor a reason\n")).unwrap();
        let remembered = Store::open(directory.path()).unwrap();
        assert_eq!((remembered.driver(), remembered.driver_note()), (Driver::Plain, Some("for a reason")));
        fs::write(directory.path().join("driver"), "another boot\nplain\n\n").unwrap();
        assert_eq!(Store::open(directory.path()).unwrap().driver(), probed);
        let options = OpenOptions { driver: Some(Driver::Plain) };
        assert_eq!(Store::open_with(directory.path(), options).unwrap().driver(), Driver::Plain);
    }

    /// What a step costs without its program.
    #[test]
    #[ignore = "measures, and means something on a machine at rest only"]
    fn a_step_costs_less_than_two_milliseconds() {
        let directory = tempfile::tempdir().unwrap();
        let Some(store) = store(directory.path(), 60) else { return };
        for (layers, changes) in [(10, false), (10, true), (60, false), (60, true)] {
            let mut times: Vec<[Duration; 2]> = (0..100)
                .map(|round| {
                    let begin = Instant::now();
                    let active = store.snapshots().prepare(Some(&id(layers - 1))).unwrap();
                    let prepared = begin.elapsed();
                    if changes {
                        fs::write(active.root().join("new"), "x").unwrap();
                    }
                    let begin = Instant::now();
                    let next = id(10_000 + layers * 1000 + usize::from(changes) * 100 + round);
                    store.snapshots().commit(active, next).unwrap();
                    [prepared, begin.elapsed()]
                })
                .collect();
            times.sort();
            let [prepare, commit] = times[50];
            let line = format!("{layers} layers, changes {changes}: prepare {prepare:?}, commit {commit:?}");
            writeln!(std::io::stderr(), "{line}").unwrap();
            assert!(prepare + commit < Duration::from_millis(2), "{line}");
        }
    }
}
