//! [`unpack_layers`]: from blobs to a snapshot, each byte seen once.
//!
//! ```text
//!                        ┌─ blob digest ─ content store
//! network or local file ─┤
//!                        └─ inflate ─ diff id ─ files in an ingest directory      (layers side by side)
//! both digests right: adopted under the chain id, over its parent                 (layers in order)
//! ```
//! Several processes that want the same layers share the work: each layer's chain id is locked while it is made. Who
//! holds a lock waits for nothing but layers further down the same chain, and the base waits for none, so nobody waits
//! in a circle. A place among the workers is taken after the lock, for the same reason.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forge_snapshotter::layer::{self, ApplyOptions, ApplySummary, Ids};
use forge_snapshotter::{BlobWriter, Context, Digest, IngestDir, KeyLock, Layer, SnapshotId, Store};
use futures_util::StreamExt;
use futures_util::future::AbortHandle;
use futures_util::stream::FuturesUnordered;
use oci_spec::image::Descriptor;
use tokio::sync::Semaphore;
use tokio_util::io::SyncIoBridge;

use crate::blobs::{self, Abandon, BlobReader, Blobs, digest_of};
use crate::{During, Error, Result, blocking};

/// So many bytes of a layer's blob have been read.
pub type Progress = Arc<dyn Fn(&Descriptor, u64) + Send + Sync>;

/// How often a layer that another process is unpacking is looked at.
const LOCK_POLL: Duration = Duration::from_millis(20);
/// No layer may unpack to more than this, nor to more than a thousand times its blob where that is larger.
const UNPACKED_LIMIT: u64 = 256 << 30;

pub struct UnpackOptions {
    /// [`Ids::Single`] where one user id is all there is.
    pub ids: Ids,
    /// Layers worked on at a time.
    pub parallel: usize,
    pub progress: Option<Progress>,
}

impl Default for UnpackOptions {
    fn default() -> UnpackOptions {
        UnpackOptions { ids: Ids::Keep, parallel: 4, progress: None }
    }
}

/// Makes the snapshot that a stack of layers gives. Layers that are there are not read; blobs that are here are not
/// fetched, those that are fetched are kept.
pub async fn unpack_layers(
    store: &Store,
    from: &impl Blobs,
    layers: &[(Descriptor, Digest)],
    options: &UnpackOptions,
) -> Result<SnapshotId> {
    let chain = chain_of(layers);
    let Some(top) = chain.last().cloned() else { return Ok(SnapshotId::scratch()) };
    let mut next = first_missing(store, &chain)?;
    let permits = Semaphore::new(options.parallel.max(1));
    let mut work: FuturesUnordered<_> = (next..layers.len())
        .map(|place| {
            let (blob, diff_id) = layers[place].clone();
            let job = Job::new(store, options, blob, diff_id);
            unpack_one(job, from, chain[place].clone(), place, &permits)
        })
        .collect();
    let mut finished = HashMap::new();
    while let Some(done) = work.next().await {
        let (place, unpacked) = done?;
        finished.insert(place, unpacked);
        while let Some(unpacked) = finished.remove(&next) {
            let parent = next.checked_sub(1).map(|below| chain[below].clone());
            if let Some(unpacked) = unpacked {
                adopt(store, unpacked, parent, chain[next].clone(), layers[next].1.clone()).await?;
            }
            next += 1;
        }
    }
    Ok(top)
}

/// The chain id of every prefix of the stack.
fn chain_of(layers: &[(Descriptor, Digest)]) -> Vec<SnapshotId> {
    let mut chain: Vec<SnapshotId> = Vec::with_capacity(layers.len());
    for (_, diff_id) in layers {
        chain.push(match chain.last() {
            None => SnapshotId::chain(std::slice::from_ref(diff_id)),
            Some(below) => SnapshotId::chain(&[below.0.clone(), diff_id.clone()]),
        });
    }
    chain
}

/// Parents outlive children: above the highest that is there, nothing is.
fn first_missing(store: &Store, chain: &[SnapshotId]) -> Result<usize> {
    for (place, id) in chain.iter().enumerate().rev() {
        if store.snapshots().get(id)?.is_some() {
            return Ok(place + 1);
        }
    }
    Ok(0)
}

struct Job {
    store: Store,
    apply: ApplyOptions,
    progress: Option<Progress>,
    blob: Descriptor,
    diff_id: Digest,
}

/// A layer's files, complete and verified, that nobody sees yet.
struct Unpacked {
    changes: PathBuf,
    summary: ApplySummary,
    _directory: IngestDir,
    _lock: KeyLock,
}

impl Job {
    fn new(store: &Store, options: &UnpackOptions, blob: Descriptor, diff_id: Digest) -> Job {
        let max_bytes = Some(blob.size().saturating_mul(1000).max(UNPACKED_LIMIT));
        Job {
            store: store.clone(),
            apply: ApplyOptions { driver: store.driver(), max_bytes, ids: options.ids },
            progress: options.progress.clone(),
            blob,
            diff_id,
        }
    }
}

/// `None` if another process has made the snapshot meanwhile.
async fn unpack_one(
    job: Job,
    from: &impl Blobs,
    id: SnapshotId,
    place: usize,
    permits: &Semaphore,
) -> Result<(usize, Option<Unpacked>)> {
    let lock = lock(&job.store, &format!("layer {id}")).await?;
    if job.store.snapshots().get(&id)?.is_some() {
        return Ok((place, None));
    }
    let _permit = permits.acquire().await.expect("the semaphore is never closed");
    let digest = digest_of(&job.blob)?;
    let (abandon, registration) = Abandon::new();
    let unpacked = async {
        let input = match job.store.content().size(&digest)? == Some(job.blob.size()) {
            true => Input::Local(job.store.content().open(&digest)?),
            false => {
                let reader = blobs::verified(from.read(&job.blob).await?, &job.blob)?;
                Input::Remote(blobs::abandonable(reader, registration))
            }
        };
        let handle = abandon.handle();
        blocking(move || job.run(input, lock, handle)).await
    };
    match unpacked.await {
        Ok(unpacked) => Ok((place, Some(unpacked))),
        Err(source) => Err(Error::Layer { layer: digest, source: Box::new(source) }),
    }
}

/// Waits for a lock without a thread that waits: dropping the future gives up.
pub(crate) async fn lock(store: &Store, key: &str) -> Result<KeyLock> {
    loop {
        match store.try_lock_key(key)? {
            Some(lock) => return Ok(lock),
            None => tokio::time::sleep(LOCK_POLL).await,
        }
    }
}

enum Input {
    Local(File),
    Remote(BlobReader),
}

impl Job {
    fn run(self, input: Input, lock: KeyLock, abandoned: AbortHandle) -> Result<Unpacked> {
        let directory = self.store.ingest()?;
        let changes = directory.path().join("fs");
        fs::create_dir(&changes).context("create", &changes)?;
        let (reader, writer): (Box<dyn Read + Send>, _) = match input {
            Input::Local(file) => (Box::new(file), None),
            Input::Remote(reader) => (Box::new(SyncIoBridge::new(reader)), Some(self.store.content().writer()?)),
        };
        let mut tee = Tee { reader, writer, job: &self, abandoned, seen: 0 };
        let summary = layer::unpack(&mut tee, &self.diff_id, &changes, &self.apply)?;
        // The end is where the blob's own digest is compared.
        io::copy(&mut tee, &mut io::sink()).during("read", "the end of the blob")?;
        if let Some(writer) = tee.writer.take() {
            writer.commit(Some(&digest_of(&self.blob)?))?;
        }
        Ok(Unpacked { changes, summary, _directory: directory, _lock: lock })
    }
}

/// Keeps what is read, and says how much it is.
struct Tee<'a> {
    reader: Box<dyn Read + Send>,
    writer: Option<BlobWriter>,
    job: &'a Job,
    abandoned: AbortHandle,
    seen: u64,
}

impl Read for Tee<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.abandoned.is_aborted() {
            return Err(io::Error::other("given up"));
        }
        let read = self.reader.read(buffer)?;
        if let Some(writer) = &mut self.writer {
            writer.write_all(&buffer[..read])?;
        }
        self.seen += read as u64;
        if let Some(progress) = self.job.progress.as_ref().filter(|_| read > 0) {
            progress(&self.job.blob, self.seen);
        }
        Ok(read)
    }
}

async fn adopt(
    store: &Store,
    unpacked: Unpacked,
    parent: Option<SnapshotId>,
    id: SnapshotId,
    diff_id: Digest,
) -> Result<()> {
    let store = store.clone();
    blocking(move || {
        let Unpacked { changes, summary, _directory, _lock } = unpacked;
        if let Some(parent) = &parent {
            store.snapshots().inherit(parent, &changes, &summary.implied_directories)?;
        }
        store.snapshots().adopt(parent.as_ref(), &changes, id.clone())?;
        let layer = Layer { diff_id, size_bytes: summary.bytes, entries: summary.entries };
        Ok(store.catalog().set_layer(&id, &layer, None)?)
    })
    .await
}
