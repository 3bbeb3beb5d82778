//! Where images enter and leave: registries, OCI layouts, archives, plain directories.
//!
//! [`blobs`] is the centre: the trait [`Blobs`](blobs::Blobs) and `copy`. Everything else is an end of it.

pub mod blobs;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unsupported digest {0:?}")]
    Digest(String),
}
