//! What each operation does to a root, once the cache has said no.
//!
//! `Copy` and `Mkdir` act on the prepared root directly ([`copy`]); `Run` gets its mounts bound and goes to the
//! [`Executor`]. All of it is a function of the operation, the root and the inputs; nothing here knows keys.

pub(crate) mod archive;
pub(crate) mod copy;
pub(crate) mod owner;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use forge_snapshotter::{Active, SnapshotId, Snapshotter, Store, View, layer};

use crate::BoundMount;
use crate::context::{Disk, resolve_new};
use crate::graph::{Mount, MountKind, Run};

pub use copy::CopyError;
pub use owner::{Chmod, InvalidMode};

/// Whether this process lives in a user namespace with one id only, where no other owner can be given.
pub(crate) fn single_id() -> bool {
    static SINGLE: OnceLock<bool> = OnceLock::new();
    *SINGLE.get_or_init(|| {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let counts = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
        counts.sum::<u64>() == 1
    })
}

/// Makes what was done to a root a snapshot, named by what it holds.
pub(crate) fn commit(store: &Store, mut active: Active, parent: &SnapshotId) -> forge_snapshotter::Result<SnapshotId> {
    let (digest, _, _) = layer::content_digest(&active.changes()?, store.driver())?;
    let id = SnapshotId::derive(parent, &digest);
    Ok(store.snapshots().commit(active, id)?.id)
}

/// A RUN's mounts, and the roots that they come from; those end with it.
pub(crate) struct Bound {
    pub mounts: Vec<BoundMount>,
    _views: Vec<View>,
    _scratch: Vec<Active>,
}

/// Binds the mounts that name inputs; `inputs` gives an input's snapshot by its index.
pub(crate) fn bind(
    snapshots: &Arc<dyn Snapshotter>,
    run: &Run,
    inputs: impl Fn(usize) -> SnapshotId,
) -> Result<Bound, CopyError> {
    let mut bound = Bound { mounts: Vec::new(), _views: Vec::new(), _scratch: Vec::new() };
    for mount in &run.mounts {
        let path = match source(mount) {
            None => {
                bound.mounts.push(BoundMount::Unbound);
                continue;
            }
            Some((input, source, Access::Read)) => {
                let view = snapshots.view(&inputs(input)).map_err(|error| bind_error(mount, error))?;
                let path = inside(view.root(), source)?;
                bound._views.push(view);
                path
            }
            Some((input, source, Access::Write)) => {
                let active = snapshots.prepare(Some(&inputs(input))).map_err(|error| bind_error(mount, error))?;
                let path = inside(active.root(), source)?;
                bound._scratch.push(active);
                path
            }
        };
        bound.mounts.push(BoundMount::Path(path));
    }
    Ok(bound)
}

#[derive(Clone, Copy)]
pub(crate) enum Access {
    Read,
    /// What is written is discarded.
    Write,
}

/// The input that a mount reads, and where in it.
pub(crate) fn source(mount: &Mount) -> Option<(usize, &str, Access)> {
    match &mount.kind {
        MountKind::Bind { input, source, readonly } => {
            Some((*input, source, if *readonly { Access::Read } else { Access::Write }))
        }
        MountKind::Cache { input: Some(input), source, .. } => Some((*input, source, Access::Read)),
        _ => None,
    }
}

fn bind_error(mount: &Mount, source: forge_snapshotter::Error) -> CopyError {
    CopyError::Io { action: "mount", path: PathBuf::from(&mount.target), source: std::io::Error::other(source) }
}

/// A path of a root, links followed inside it.
fn inside(root: &Path, path: &str) -> Result<PathBuf, CopyError> {
    use rustix::fs::{Mode, OFlags};
    let context = |errno: rustix::io::Errno| CopyError::Io { action: "open", path: path.into(), source: errno.into() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(root, flags, Mode::empty()).map_err(context)?;
    let disk = Disk { root: &directory };
    let real = resolve_new(&disk, Path::new(path.trim_start_matches('/')))?;
    disk.open(&real, OFlags::PATH).map_err(context)?;
    Ok(root.join(real))
}
