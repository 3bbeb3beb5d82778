//! Request bodies that can be sent again.
//!
//! A retry needs the body from its start, so every [`Payload`] can be opened any number of times. Bytes and files can by
//! nature; a reader that can be read once is written to a temporary file while it is being sent ([`Spool`]).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _, ReadBuf};
use tokio_util::io::ReaderStream;

use crate::blobs::BlobReader;

/// Large frames: some registries answer 504 to many small ones, and TLS records cost each.
const FRAME: usize = 512 * 1024;

/// How one sending of a payload goes.
#[derive(Default)]
pub(super) struct Meter {
    sent: AtomicU64,
    failed: Mutex<Option<io::Error>>,
}

impl Meter {
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Why reading the payload failed, if that is what went wrong: no other try would do better.
    pub fn take_failure(&self) -> Option<io::Error> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn note(&self, frame: &io::Result<Bytes>) {
        match frame {
            Ok(bytes) => {
                self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            Err(error) => {
                let copy = io::Error::new(error.kind(), error.to_string());
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(copy);
            }
        }
    }
}

#[derive(Clone)]
pub(super) enum Payload {
    Empty,
    Bytes(Bytes),
    File { path: Arc<PathBuf>, offset: u64, length: u64 },
    Spool { spool: Arc<Spool>, offset: u64, length: u64 },
}

impl Payload {
    pub fn length(&self) -> u64 {
        match self {
            Payload::Empty => 0,
            Payload::Bytes(bytes) => bytes.len() as u64,
            Payload::File { length, .. } | Payload::Spool { length, .. } => *length,
        }
    }

    /// A part of it; `offset + length` is within it.
    pub fn part(&self, from: u64, part: u64) -> Payload {
        match self {
            Payload::Empty => Payload::Empty,
            Payload::Bytes(bytes) => Payload::Bytes(bytes.slice(from as usize..(from + part) as usize)),
            Payload::File { path, offset, .. } => {
                Payload::File { path: path.clone(), offset: offset + from, length: part }
            }
            Payload::Spool { spool, offset, .. } => {
                Payload::Spool { spool: spool.clone(), offset: offset + from, length: part }
            }
        }
    }

    /// The body from its start; the meter sees what is handed to the connection.
    pub async fn open(&self, meter: Arc<Meter>) -> io::Result<reqwest::Body> {
        let reader: Pin<Box<dyn AsyncRead + Send>> = match self {
            Payload::Empty => return Ok(reqwest::Body::from(Bytes::new())),
            Payload::Bytes(bytes) => {
                meter.sent.store(bytes.len() as u64, Ordering::Relaxed);
                return Ok(reqwest::Body::from(bytes.clone()));
            }
            Payload::File { path, offset, length } => {
                let mut file = tokio::fs::File::open(path.as_path()).await?;
                file.seek(io::SeekFrom::Start(*offset)).await?;
                file.set_max_buf_size(FRAME);
                Box::pin(file.take(*length))
            }
            Payload::Spool { spool, offset, length } => {
                Box::pin(SpoolReader { spool: spool.clone(), position: *offset }.take(*length))
            }
        };
        let (counted, length) = (meter.clone(), self.length());
        let end = stream::once(async move {
            let early = io::Error::new(io::ErrorKind::UnexpectedEof, format!("it ended before its {length} bytes"));
            (counted.sent() != length).then_some(Err(early))
        });
        let frames = ReaderStream::with_capacity(reader, FRAME).inspect({
            let meter = meter.clone();
            move |frame| meter.note(frame)
        });
        let frames = frames.chain(end.filter_map(std::future::ready).inspect(move |frame| meter.note(frame)));
        Ok(reqwest::Body::wrap_stream(frames))
    }
}

/// A reader that can be read once, and the file that remembers what it gave.
pub(super) struct Spool(Mutex<Inner>);

struct Inner {
    source: BlobReader,
    file: File,
    written: u64,
}

impl Spool {
    pub fn new(source: BlobReader) -> io::Result<Spool> {
        Ok(Spool(Mutex::new(Inner { source, file: tempfile::tempfile()?, written: 0 })))
    }
}

impl Inner {
    /// Reads at `position`: from the file what has been there before, else from the source and into the file.
    fn poll_read_at(
        &mut self,
        context: &mut Context<'_>,
        position: u64,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if position < self.written {
            let wanted = (buffer.remaining() as u64).min(self.written - position) as usize;
            // Just written, so this is a copy from the page cache and not a wait for a disk.
            let read = self.file.read_at(buffer.initialize_unfilled_to(wanted), position)?;
            buffer.advance(read);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.source).poll_read(context, buffer))?;
        let new = &buffer.filled()[before..];
        self.file.write_all_at(new, self.written)?;
        self.written += new.len() as u64;
        Poll::Ready(Ok(()))
    }
}

struct SpoolReader {
    spool: Arc<Spool>,
    position: u64,
}

impl AsyncRead for SpoolReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let spool = self.spool.clone();
        let mut inner = spool.0.lock().unwrap_or_else(PoisonError::into_inner);
        ready!(inner.poll_read_at(context, self.position, buffer))?;
        self.position += (buffer.filled().len() - before) as u64;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(reader: impl AsyncRead, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        std::pin::pin!(reader.take(length as u64)).read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    #[tokio::test]
    async fn a_spool_reads_the_same_from_every_start() {
        let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        let spool = Arc::new(Spool::new(Box::new(std::io::Cursor::new(data.clone()))).unwrap());
        let at = |position: u64| SpoolReader { spool: spool.clone(), position };
        assert_eq!(read(at(0), 100_000).await, data[..100_000]);
        assert_eq!(read(at(0), 200_000).await, data[..200_000]);
        assert_eq!(read(at(150_000), 1_000_000).await, data[150_000..]);
        assert_eq!(read(at(0), 1_000_000).await, data);
    }
}
