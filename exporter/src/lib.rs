//! Where images enter and leave: registries, OCI layouts, archives, plain directories.
//!
//! [`blobs`] is the centre: the traits [`Blobs`](blobs::Blobs) and [`Manifests`](blobs::Manifests), and
//! [`copy`](copy::copy), which moves an image between two of their implementations. Everything else is an end of it:
//!
//! ```text
//! registry repository ─┐                        ┌─ registry repository
//! layout (OCI directory) ──► copy, fetch_config, ──► layout
//! archive (docker, OCI tar)      unpack_layers  └─ archive::write_*
//! local store ──────────┘                          local store
//! ```
//! Bytes are verified before they are believed, children are there before their parents, and the same input gives
//! the same bytes.

pub mod archive;
pub mod blobs;
pub mod copy;
pub mod fetch;
pub mod files;
pub mod image;
pub mod layout;
pub mod local;
pub mod pack;
pub mod registry;
pub mod remote;
pub mod unpack;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::io;

use forge_snapshotter::{Digest, SnapshotId};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong at the edge. Texts are fragments that fit after "failed to …:".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unsupported digest {0:?}")]
    Digest(String),
    #[error(transparent)]
    Registry(#[from] registry::Error),
    #[error("credentials from {place}: {reason}")]
    Credentials { place: String, reason: String },
    #[error("certificates from {}: {reason}", path.display())]
    Tls { path: std::path::PathBuf, reason: String },
    #[error("failed to read what is to be uploaded: {0}")]
    Body(#[source] std::io::Error),
    #[error(transparent)]
    Store(#[from] forge_snapshotter::Error),
    #[error("{action} {what}: {source}")]
    Stream { action: &'static str, what: String, source: io::Error },
    /// The bytes are not what their descriptor, or their name, says.
    #[error("{what} is not what it should be: expected {expected}, found {found}")]
    Mismatch { what: String, expected: String, found: String },
    #[error("{what} is not valid: {reason}")]
    Malformed { what: String, reason: String },
    #[error("{what} is larger than {limit} bytes")]
    TooLarge { what: String, limit: u64 },
    #[error("{what} not found{hint}")]
    NotFound { what: String, hint: String },
    #[error("no image for {wanted}; there is {available}")]
    Platform { wanted: String, available: String },
    #[error("unsupported: {0}")]
    Unsupported(String),
    #[error("layer {layer}: {source}")]
    Layer { layer: Digest, source: Box<Error> },
    /// The recorded diff id of a layer and what its snapshot gives now differ: the state directory was changed by hand.
    #[error("snapshot {snapshot} no longer gives layer {diff_id} but {found}; prune it and build again")]
    Drifted { snapshot: SnapshotId, diff_id: Digest, found: Digest },
    #[error("layer {0} is known but its bytes are not in the store: pull or build its image again")]
    LayerLost(Digest),
}

impl Error {
    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Error {
        Error::Malformed { what: what.into(), reason: reason.to_string() }
    }

    pub(crate) fn not_found(what: impl Into<String>) -> Error {
        Error::NotFound { what: what.into(), hint: String::new() }
    }
}

/// Says what was being done, and with what, when an I/O error came.
pub(crate) trait During<T> {
    fn during(self, action: &'static str, what: impl std::fmt::Display) -> Result<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, action: &'static str, what: impl std::fmt::Display) -> Result<T> {
        self.map_err(|source| match source.downcast::<Error>() {
            Ok(inner) => inner,
            Err(source) => Error::Stream { action, what: what.to_string(), source },
        })
    }
}

/// Bytes that are moved at a time between the reactor and threads that may block.
pub(crate) const CHUNK: usize = 256 << 10;

/// Runs blocking work away from the reactor. A panic there is our own bug and goes on here.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => unreachable!("blocking tasks are never aborted"),
        },
    }
}
