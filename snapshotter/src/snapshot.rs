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
//! Two implementations promise the same and pass one conformance suite: [`overlay`] stacks directories in
//! the kernel; [`plain`] copies, for file systems and users without overlay.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Digest, Digester, Result};

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
    /// The directory with the changes alone, in overlay form, settled: called once nothing writes to the root any more.
    fn changes(&mut self) -> Result<PathBuf>;
}

impl Active {
    /// The merged, writable root directory, mounted in this process's mount namespace.
    pub fn root(&self) -> &Path {
        self.state.root()
    }

    pub fn parent(&self) -> Option<&SnapshotId> {
        self.parent.as_ref()
    }

    /// The changes so far, as a directory in overlay form. For `layer::diff` and content digests before `commit`.
    pub fn changes(&mut self) -> Result<PathBuf> {
        self.state.changes()
    }
}

/// A read-only root. Unmounted on drop.
pub struct View {
    pub(crate) root: PathBuf,
    /// Unmounts, and removes the mount point, when dropped.
    pub(crate) guard: Option<Box<dyn std::any::Any + Send + Sync>>,
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

    /// Makes `changes` (a finished directory in overlay form, on the store's file system, consumed by rename)
    /// a snapshot over `parent`: how image layers, which unpack without their parents, enter.
    fn adopt(&self, parent: Option<&SnapshotId>, changes: &Path, id: SnapshotId) -> Result<Info>;

    fn view(&self, id: &SnapshotId) -> Result<View>;

    /// Removes a snapshot that no other has as parent; what is in use is refused.
    fn remove(&self, id: &SnapshotId) -> Result<()>;
}
