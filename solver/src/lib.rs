//! Graph to snapshots.
//!
//! [`graph`] is the input, [`event`] the talk on the way; [`context`] turns files into digests, [`key`] says what makes
//! two steps the same, [`cache`] remembers, [`solve`] brings it all about. The solver names
//! neither Dockerfiles nor registries nor namespaces: it owns two one-method traits, [`Executor`] and [`Fetcher`],
//! that the program implements.

pub mod cache;
pub mod context;
pub mod event;
mod execute;
pub mod graph;
pub mod key;
pub mod pattern;
pub mod solve;

pub use execute::{Chmod, CopyError, InvalidMode};
pub use solve::{Fresh, Options, SolveError, Solver, StepError};

use std::path::PathBuf;

use forge_snapshotter::{Active, Digest, SnapshotId};

use crate::event::{EventKind, Events, StepId, Stream};
use crate::graph::Run;

/// Runs programs in containers.
pub trait Executor: Send + Sync + 'static {
    /// Runs `run` over `root` and waits for its end. Dropping the future kills the step and all that it started.
    ///
    /// `mounts` has an entry for each of `run.mounts`, in order. The call leaves nothing mounted on `root` and
    /// removes the mount points that it made there.
    fn execute(
        &self,
        run: &Run,
        root: &Active,
        mounts: &[BoundMount],
        output: &Output,
    ) -> impl Future<Output = Result<ExitStatus, ExecuteError>> + Send;
}

/// Where the files of a mount come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BoundMount {
    /// A directory or file on the host: bind mounts, and the seed of a new cache mount.
    Path(PathBuf),
    /// The executor's own affair: cache mounts without a seed, tmpfs, secrets, ssh.
    Unbound,
}

/// How a step ended, told apart for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    Exited(i32),
    Killed { signal: i32, out_of_memory: bool },
}

/// The step never started, or could not be watched to its end.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// `exec: "foo": executable file not found in $PATH`; exit code 127 in `forge run`.
    #[error("exec: {program:?}: {reason}")]
    NotFound { program: String, reason: String },
    /// There, but not to be executed (permission, format, a directory); exit code 126.
    #[error("exec: {program:?}: {reason}")]
    NotExecutable { program: String, reason: String },
    /// A user or group that the image does not know, a required secret that was not given, and the like.
    #[error("{0}")]
    Invalid(String),
    /// The machine would not do it: which part of the set-up, and why.
    #[error("{step}: {source}")]
    Setup { step: String, source: std::io::Error },
}

/// Where a step's output goes, live.
#[derive(Clone)]
pub struct Output {
    pub events: Events,
    pub step: StepId,
}

impl Output {
    pub fn write(&self, stream: Stream, data: &[u8]) {
        self.events.send(&self.step, EventKind::Output { stream, data: data.to_vec() });
    }
}

/// Brings in what a graph's leaves only name. Called on a cache miss, never before.
pub trait Fetcher: Send + Sync + 'static {
    fn fetch(&self, leaf: &Leaf, events: &Events) -> impl Future<Output = Result<Fetched, FetchError>> + Send;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaf {
    Image { diff_ids: Vec<Digest> },
    Files { digest: Digest },
}

/// A leaf that is here now.
#[derive(Clone)]
pub enum Fetched {
    /// An image's layers, unpacked and committed.
    Snapshot(SnapshotId),
    /// Files in place on the host: read them there, verified against the tree as they are read.
    Tree(std::sync::Arc<crate::context::Tree>),
}

/// Why a leaf could not be had; the text names it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FetchError(pub String);
