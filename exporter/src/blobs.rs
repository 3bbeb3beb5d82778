//! One view of every place that holds images: ask, read, write.
//!
//! [`Blobs`] holds bytes by digest, [`Manifests`] adds the documents that join them and the names that people give
//! them. Pull, push, save, load and mirror are all [`copy`](crate::copy::copy) between two of these.

use std::cmp::Ordering;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use forge_snapshotter::{Digest, Digester};
use futures_util::future::{AbortHandle, AbortRegistration, Abortable};
use oci_spec::image::Descriptor;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use crate::{During, Error, Result};

/// Bytes on their way. An implementation that reads from outside verifies size and digest before it reports the end.
pub type BlobReader = Box<dyn AsyncRead + Send + Unpin>;

/// The largest manifest or index that is read: what distribution's and regclient's readers allow.
pub const MANIFEST_LIMIT: u64 = 8 << 20;
/// The largest image configuration that is read. Real ones are a few kilobytes; cache records embedded in them are not.
pub const CONFIG_LIMIT: u64 = 64 << 20;

/// A repository in a registry that a blob can be had from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    pub registry: String,
    pub repository: String,
}

pub trait Blobs: Send + Sync {
    fn has(&self, blob: &Descriptor) -> impl Future<Output = crate::Result<bool>> + Send;

    fn read(&self, blob: &Descriptor) -> impl Future<Output = crate::Result<BlobReader>> + Send;

    /// Returns when the blob is there whole; writes nothing that does not match its descriptor.
    fn write(&self, blob: &Descriptor, data: BlobReader) -> impl Future<Output = crate::Result<()>> + Send;

    /// The file that holds these bytes, where there is one: an upload that is tried again reads it again.
    fn file(&self, _blob: &Descriptor) -> crate::Result<Option<PathBuf>> {
        Ok(None)
    }

    /// As [`Blobs::write`], from a file.
    fn write_file(&self, blob: &Descriptor, path: &Path) -> impl Future<Output = crate::Result<()>> + Send {
        async move {
            let file = tokio::fs::File::open(path).await.during("open", path.display())?;
            self.write(blob, Box::new(file)).await
        }
    }

    /// The repositories that are known to hold this blob: where a push may mount it from instead of sending it.
    fn origins(&self, _blob: &Descriptor) -> crate::Result<Vec<Origin>> {
        Ok(Vec::new())
    }
}

pub trait Manifests: Blobs {
    /// What a tag or a digest stands for.
    fn resolve(&self, name: &str) -> impl Future<Output = crate::Result<Descriptor>> + Send;

    /// The exact bytes of a manifest or index, verified, at most [`MANIFEST_LIMIT`].
    fn manifest(&self, name: &str) -> impl Future<Output = crate::Result<(Descriptor, Bytes)>> + Send;

    /// Stores a manifest whose children are there, under its digest and, if given, a name.
    fn put_manifest(
        &self,
        tag: Option<&str>,
        media_type: &str,
        bytes: &[u8],
    ) -> impl Future<Output = crate::Result<Digest>> + Send;

    /// Whether this manifest is there *and* so is everything that it names. `false` is always a safe answer.
    fn complete(&self, _manifest: &Descriptor) -> impl Future<Output = crate::Result<bool>> + Send {
        std::future::ready(Ok(false))
    }

    /// Takes the blob from another repository of the same registry without moving bytes. Best effort: `false`
    /// means that it must be written.
    fn mount(&self, _blob: &Descriptor, _from: &Origin) -> impl Future<Output = crate::Result<bool>> + Send {
        std::future::ready(Ok(false))
    }
}

/// oci-spec's digest is any string of the right shape; ours is checked.
pub fn digest_of(blob: &Descriptor) -> crate::Result<Digest> {
    let text = blob.digest().to_string();
    text.parse().map_err(|_| crate::Error::Digest(text))
}

/// A descriptor of some bytes.
pub fn describe(media_type: &str, digest: &Digest, size: u64) -> Descriptor {
    let digest: oci_spec::image::Digest = digest.as_str().parse().expect("our digests are a subset of oci-spec's");
    Descriptor::new(media_type.into(), size, digest)
}

/// Reads a small blob whole. Size and digest are checked here, whoever the reader is from.
pub async fn read_small(from: &impl Blobs, blob: &Descriptor, limit: u64) -> Result<Bytes> {
    let what = format!("blob {}", blob.digest());
    if blob.size() > limit {
        return Err(Error::TooLarge { what, limit });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(blob.size()).unwrap_or_default());
    verified(from.read(blob).await?, blob)?.read_to_end(&mut bytes).await.during("read", what)?;
    Ok(bytes.into())
}

/// A reader that fails instead of ending if size or digest are not the descriptor's, and as soon as there is a byte
/// too many.
pub fn verified(reader: BlobReader, blob: &Descriptor) -> Result<BlobReader> {
    let expected = digest_of(blob)?;
    if expected.algorithm() != "sha256" {
        return Err(Error::Digest(expected.to_string()));
    }
    Ok(Box::new(Verified { reader, digester: Some(Digester::new()), expected, size: blob.size() }))
}

struct Verified {
    reader: BlobReader,
    /// Gone once all bytes were seen and found right.
    digester: Option<Digester>,
    expected: Digest,
    size: u64,
}

impl Verified {
    fn mismatch(&self, expected: impl ToString, found: impl ToString) -> io::Error {
        let what = format!("blob {}", self.expected);
        io::Error::other(Error::Mismatch { what, expected: expected.to_string(), found: found.to_string() })
    }

    /// The last byte is not handed out before the digest is known to be right: some readers stop there.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let size = match &mut self.digester {
            Some(digester) => {
                digester.update(bytes);
                digester.size()
            }
            None => self.size + bytes.len() as u64,
        };
        match size.cmp(&self.size) {
            Ordering::Less if bytes.is_empty() => {
                Err(self.mismatch(format!("{} bytes", self.size), format!("{size} bytes")))
            }
            Ordering::Less => Ok(()),
            Ordering::Greater => Err(self.mismatch(format!("{} bytes", self.size), "more")),
            Ordering::Equal => match self.digester.take().map(Digester::finish) {
                Some(found) if found != self.expected => Err(self.mismatch(&self.expected, found)),
                _ => Ok(()),
            },
        }
    }
}

impl AsyncRead for Verified {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.reader).poll_read(context, buffer))?;
        let taken = this.take(&buffer.filled()[before..]);
        if taken.is_err() {
            buffer.set_filled(before);
        }
        Poll::Ready(taken)
    }
}

/// Tells the thread that works for a future that the future is gone: dropped, it aborts what holds its handle.
pub(crate) struct Abandon(AbortHandle);

impl Abandon {
    pub(crate) fn new() -> (Abandon, AbortRegistration) {
        let (handle, registration) = AbortHandle::new_pair();
        (Abandon(handle), registration)
    }

    pub(crate) fn handle(&self) -> AbortHandle {
        self.0.clone()
    }
}

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A reader that fails once it is abandoned, also while it waits: a thread that reads from it never outlives the future
/// that it works for by more than a moment.
pub(crate) fn abandonable(reader: BlobReader, registration: AbortRegistration) -> BlobReader {
    Box::new(Abandonable { reader, abandoned: Abortable::new(std::future::pending(), registration) })
}

struct Abandonable {
    reader: BlobReader,
    abandoned: Abortable<std::future::Pending<()>>,
}

impl AsyncRead for Abandonable {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match Pin::new(&mut this.abandoned).poll(context) {
            Poll::Ready(_) => Poll::Ready(Err(io::Error::other("given up"))),
            Poll::Pending => Pin::new(&mut this.reader).poll_read(context, buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &'static [u8], blob: &Descriptor) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        verified(Box::new(bytes), blob)?.read_to_end(&mut out).await.during("read", "it")?;
        Ok(out)
    }

    #[tokio::test]
    async fn only_the_described_bytes_reach_the_end() {
        let right = describe("text/plain", &Digest::of("hello"), 5);
        assert_eq!(read(b"hello", &right).await.unwrap(), b"hello");
        for (bytes, reason) in
            [(&b"hell"[..], "found 4 bytes"), (b"hello!", "found more"), (b"jello", "found sha256:"), (b"", "0 bytes")]
        {
            let error = read(bytes, &right).await.expect_err("differs").to_string();
            assert!(error.contains(reason), "{error}");
        }
        let long = describe("text/plain", &format!("sha512:{}", "a".repeat(128)).parse().unwrap(), 5);
        assert!(matches!(read(b"hello", &long).await, Err(Error::Digest(_))));
    }
}
