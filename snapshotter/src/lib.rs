//! Everything under forge's state directory: blobs, snapshots, layers, images and the database that joins them.
//!
//! ```text
//! $FORGE_ROOT/
//!   VERSION                        "1"; another number is refused
//!   lock                           shared by every process that uses the directory; exclusive to wipe it
//!   state.db                       SQLite, WAL: what is queried or changes together (see `database`)
//!   blobs/sha256/<hex>             content, immutable, named by its digest
//!   snapshots/<hex>/fs             a committed snapshot's own changes, in overlay form
//!   active/<random>/{fs,work,root} snapshots in the making; the process holds a lock on <random>.lock
//!   ingest/<random>                blobs and layers in the making
//!   locks/<hex>                    one per cache key, so that two builds run a step once
//!   logs/<build>/                  what steps printed
//!   volumes/<name>/                named volumes
//!   cache/<id>/                    RUN --mount=type=cache
//! ```
//! Files are complete before they are visible (temporary name, then rename), and files come before the rows
//! that name them; removal goes the other way. What a crash leaves is therefore either invisible (swept from
//! `active` and `ingest` once its owner's lock is free) or whole.

pub mod digest;
pub mod image;
pub mod snapshot;

pub use digest::{Digest, Digester};
pub use snapshot::{Active, Info, SnapshotId, Snapshotter, View};

use std::io;
use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong below the state directory. Texts are fragments that fit after "failed to …:".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// Adds what was tried, and on which path, to an I/O error.
pub trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io { action, path: path.to_owned(), source })
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).context(action, path)
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).context(action, path)
    }
}
