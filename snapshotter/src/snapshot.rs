//! Snapshots: the roots that steps start from and leave behind.
//!
//! ```text
//! prepare(parent) -> Active --commit(id)--> committed snapshot --view()--> View
//!                      |
//!                      +--drop: discarded
//! ```
//! A committed snapshot is immutable, has at most one parent, and outlives nothing: its parent cannot be
//! removed before it. Its [`SnapshotId`] says what it holds: an image layer's is the chain id of its diff
//! ids (OCI image-spec "Layer ChainID"), a step's is made of its parent's id and the content digest of what
//! the step changed ([`SnapshotId::derive`]). Two steps that leave the same files leave the same snapshot.
//!
//! A snapshot that changes nothing has a row and no directory. The scratch snapshot is always there and has
//! neither: as a parent it counts as none.
//!
//! Two implementations promise the same and pass one conformance suite: `overlay` stacks directories in
//! the kernel; `plain` copies, for file systems and users without overlay. What they share, the rows and the
//! directories of committed snapshots, is in `shelf`.

mod below;
#[cfg(test)]
mod conformance;
mod overlay;
mod plain;

mod shelf;

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, Stat, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::database::Database;
use crate::session::Session;
use crate::{Digest, Digester, Result};

use overlay::Overlay;
use plain::Plain;

use shelf::{Settled, Shelf};
pub(crate) use shelf::{discard_unless_listed, disk_usage, mark_settled, parse_id, unsettled};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub Digest);

impl SnapshotId {
    /// The empty root, the parent of first layers.
    pub fn scratch() -> SnapshotId {
        SnapshotId(Digest::of("forge scratch"))
    }

    /// `parent` with a change whose content digest is `change`.
    pub fn derive(parent: &SnapshotId, change: &Digest) -> SnapshotId {
        let mut digester = Digester::new();
        digester.field(b"forge snapshot v1");
        digester.field(parent.0.as_str().as_bytes());
        digester.field(change.as_str().as_bytes());
        SnapshotId(digester.finish())
    }

    /// The snapshot that a stack of image layers gives; the scratch snapshot for none.
    pub fn chain(diff_ids: &[Digest]) -> SnapshotId {
        let Some((first, rest)) = diff_ids.split_first() else { return SnapshotId::scratch() };
        let chain = rest.iter().fold(first.clone(), |chain, diff_id| Digest::of(format!("{chain} {diff_id}")));
        SnapshotId(chain)
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What is known of a committed snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    pub id: SnapshotId,
    pub parent: Option<SnapshotId>,
    /// The directory with this snapshot's own changes in overlay form (whiteouts are 0/0 character devices,
    /// opaque directories carry the overlay xattr); `None` where it changes nothing.
    pub changes: Option<PathBuf>,
    pub size_bytes: u64,
}

/// A writable root in the making. Dropping it discards it.
pub struct Active {
    pub(crate) parent: Option<SnapshotId>,
    pub(crate) state: Box<dyn ActiveState>,
}

/// What an implementation keeps for an [`Active`]; its drop unmounts and removes.
pub(crate) trait ActiveState: Send + Sync {
    /// The merged, writable root.
    fn root(&self) -> &Path;
    /// The directory with the changes alone, in overlay form. The root is gone afterwards.
    fn changes(&mut self) -> Result<PathBuf>;
    /// Ends the root: unmounted, nothing left to be written, ready to be renamed to its place.
    fn settle(&mut self) -> Result<Settled>;
}

impl Active {
    /// The merged, writable root directory, mounted in this process's mount namespace.
    pub fn root(&self) -> &Path {
        self.state.root()
    }

    pub fn parent(&self) -> Option<&SnapshotId> {
        self.parent.as_ref()
    }

    /// The changes, as a directory in overlay form, for content digests before `commit`. Ends the root: nothing can be written any more.
    pub fn changes(&mut self) -> Result<PathBuf> {
        self.state.changes()
    }
}

/// A read-only root. Unmounted on drop.
pub struct View {
    pub(crate) root: PathBuf,
    /// Unmounts, and removes the mount point, when dropped.
    pub(crate) _guard: Option<Box<dyn std::any::Any + Send + Sync>>,
}

impl View {
    pub fn root(&self) -> &Path {
        &self.root
    }
}

pub trait Snapshotter: Send + Sync {
    /// The committed snapshot of that id; marks it as used now.
    fn get(&self, id: &SnapshotId) -> Result<Option<Info>>;

    /// A writable root over `parent` (over nothing: an empty root, mode 0755).
    fn prepare(&self, parent: Option<&SnapshotId>) -> Result<Active>;

    /// Makes it permanent under `id`. If `id` exists already (another process was first) the work is
    /// discarded and the existing snapshot returned. Consumes: an `Active` cannot be used after.
    fn commit(&self, active: Active, id: SnapshotId) -> Result<Info>;

    /// Gives `directories` of `changes`, a layer that is to be adopted over `parent` but does not describe them, the
    /// attributes of the directories that they lie over. The empty path is the top. Where `parent` has none, or
    /// something else, nothing is done: a directory over a symbolic link hides it, as with docker and containerd.
    fn inherit(&self, parent: &SnapshotId, changes: &Path, directories: &[PathBuf]) -> Result<()>;

    /// Makes `changes` (a finished directory in overlay form, on the store's file system, consumed by rename)
    /// a snapshot over `parent`: how image layers, which unpack without their parents, enter.
    fn adopt(&self, parent: Option<&SnapshotId>, changes: &Path, id: SnapshotId) -> Result<Info>;

    fn view(&self, id: &SnapshotId) -> Result<View>;

    /// Removes a snapshot that no other has as parent; what is in use is refused.
    fn remove(&self, id: &SnapshotId) -> Result<()>;
}

/// How snapshots are kept, and with it how changes are written down.
///
/// | driver | where | opaque directory | whiteout |
/// |---|---|---|---|
/// | `Overlay` | root of the machine | `trusted.overlay.opaque` = `y` | character device 0/0 |
/// | `OverlayUser` | root of a user namespace | `user.overlay.opaque` = `y` | character device 0/0 |
/// | `Plain` | anywhere | `user.overlay.opaque` = `y` | character device 0/0, or an empty file with `user.overlay.whiteout` |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Driver {
    Overlay,
    OverlayUser,
    Plain,
}

const WHITEOUT_ATTRIBUTE: &str = "user.overlay.whiteout";

impl Driver {
    pub fn name(self) -> &'static str {
        match self {
            Driver::Overlay => "overlay",
            Driver::OverlayUser => "overlay-user",
            Driver::Plain => "plain",
        }
    }

    pub fn from_name(name: &str) -> Option<Driver> {
        [Driver::Overlay, Driver::OverlayUser, Driver::Plain].into_iter().find(|driver| driver.name() == name)
    }

    /// The attribute, of value `y`, of a directory that hides what its parents hold.
    pub fn opaque_attribute(self) -> &'static str {
        match self {
            Driver::Overlay => "trusted.overlay.opaque",
            Driver::OverlayUser | Driver::Plain => "user.overlay.opaque",
        }
    }

    /// Writes that `name` is gone. Nothing of that name may be in the directory.
    pub fn write_whiteout(self, directory: impl AsFd, name: &std::ffi::CStr) -> rustix::io::Result<()> {
        let made = rustix::fs::mknodat(&directory, name, FileType::CharacterDevice, Mode::empty(), 0);
        match (self, made) {
            // Plain is for places that refuse devices too, such as an overlay itself.
            (Driver::Plain, Err(Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL)) => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&directory, name, flags, Mode::empty())?;
                rustix::fs::fsetxattr(&file, WHITEOUT_ATTRIBUTE, b"y", XattrFlags::empty())
            }
            (_, made) => made,
        }
    }

    /// Whether the entry, of which `stat` is known, says that a name is gone.
    pub fn is_whiteout(self, directory: impl AsFd, name: &std::ffi::CStr, stat: &Stat) -> rustix::io::Result<bool> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice => Ok(stat.st_rdev == 0),
            FileType::RegularFile if self == Driver::Plain && stat.st_size == 0 => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let file = rustix::fs::openat(&directory, name, flags, Mode::empty())?;
                match rustix::fs::fgetxattr(&file, WHITEOUT_ATTRIBUTE, &mut [0u8; 8]) {
                    Ok(_) => Ok(true),
                    Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
                    Err(error) => Err(error),
                }
            }
            _ => Ok(false),
        }
    }
}

/// The implementation that a store uses.
pub(crate) struct Drivers {
    pub(crate) driver: Driver,
    pub(crate) note: Option<String>,
    pub(crate) snapshotter: Arc<dyn Snapshotter>,
}

impl Drivers {
    pub(crate) fn new(
        root: &Path,
        database: &Arc<Database>,
        session: &Arc<Session>,
        wanted: Option<Driver>,
    ) -> Drivers {
        let (driver, note) = match wanted {
            Some(driver) => (driver, None),
            None => probe(root, session),
        };
        let shelf = Arc::new(Shelf::new(root, database.clone(), session.clone()));
        let snapshotter: Arc<dyn Snapshotter> = match driver {
            Driver::Overlay | Driver::OverlayUser => Arc::new(Overlay::new(shelf, driver)),
            Driver::Plain => Arc::new(Plain::new(shelf)),
        };
        Drivers { driver, note, snapshotter }
    }
}

/// Tries overlay once a boot and kind of user, and keeps the answer in the file `driver`:
/// the facts on its first line, then the driver's name, then why it is not overlay.
fn probe(root: &Path, session: &Session) -> (Driver, Option<String>) {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let map = map.split_whitespace().collect::<Vec<_>>().join(" ");
    let candidate = match map.as_str() {
        "0 0 4294967295" => Driver::Overlay,
        _ => Driver::OverlayUser,
    };
    let facts = format!(
        "{} {} uid {} map {map}",
        crate::content::boot_id(),
        candidate.name(),
        rustix::process::geteuid().as_raw()
    );
    let kept = root.join("driver");
    if let Some(answer) = fs::read_to_string(&kept).ok().as_deref().and_then(|text| remembered(text, &facts)) {
        return answer;
    }
    let (driver, note) = match overlay::probe(session, candidate) {
        Ok(()) => (candidate, None),
        Err(error) => (Driver::Plain, Some(format!("no overlay here: {error}").replace('\n', " "))),
    };
    let text = format!("{facts}\n{}\n{}\n", driver.name(), note.as_deref().unwrap_or_default());
    let temporary = root.join(format!("driver.{}", crate::session::unique_name()));
    // Where it cannot be kept, the next process probes again.
    if fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &kept)).is_err() {
        drop(fs::remove_file(&temporary));
    }
    (driver, note)
}

fn remembered(text: &str, facts: &str) -> Option<(Driver, Option<String>)> {
    let mut lines = text.lines();
    let same = lines.next()? == facts;
    let driver = Driver::from_name(lines.next()?).filter(|_| same)?;
    Some((driver, lines.next().filter(|note| !note.is_empty()).map(str::to_owned)))
}
