//! One view of every place that holds images: ask, read, write; and [`copy`], which moves an image between two of them.
//!
//! Pull, push, save, load and mirror are all `copy` with other ends.

use forge_snapshotter::Digest;
use oci_spec::image::Descriptor;
use tokio::io::AsyncRead;

/// Bytes on their way. An implementation that reads from outside verifies size and digest before it reports the end.
pub type BlobReader = Box<dyn AsyncRead + Send + Unpin>;

pub trait Blobs: Send + Sync {
    fn has(&self, blob: &Descriptor) -> impl Future<Output = crate::Result<bool>> + Send;

    fn read(&self, blob: &Descriptor) -> impl Future<Output = crate::Result<BlobReader>> + Send;

    /// Returns when the blob is there whole; writes nothing that does not match its descriptor.
    fn write(&self, blob: &Descriptor, data: BlobReader) -> impl Future<Output = crate::Result<()>> + Send;
}

/// oci-spec's digest is any string of the right shape; ours is checked.
pub fn digest_of(blob: &Descriptor) -> crate::Result<Digest> {
    let text = blob.digest().to_string();
    text.parse().map_err(|_| crate::Error::Digest(text))
}
