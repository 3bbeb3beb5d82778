//! [`copy`]: one algorithm for pull, push, save, load and mirror.
//!
//! ```text
//! 1. walk     root -> indexes -> manifests, breadth first, each read once; subtrees that are complete there are cut
//! 2. blobs    in parallel: there already? else mounted from an origin? else read and written
//! 3. documents  children before parents, so nothing ever names what is not there
//! 4. names    last: a tag appears when all of it can be pulled
//! ```

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use oci_spec::image::Descriptor;
use tokio::io::{AsyncRead, ReadBuf};

use crate::blobs::{BlobReader, Manifests, Origin};
use crate::image::{self, Document};
use crate::{Error, Result};

/// Indexes within indexes that are followed. One level is common, two are seen; digests make real cycles impossible.
pub const DEPTH_LIMIT: usize = 4;
/// Manifests below one root. The largest public indexes hold a few hundred.
pub const MANIFESTS_LIMIT: usize = 4096;

/// What happens to a blob, as it happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Exists,
    Mounted(Origin),
    /// So many bytes have been sent.
    Sent(u64),
    Written,
}

pub type Progress = Arc<dyn Fn(&Descriptor, Step) + Send + Sync>;

pub struct Options {
    /// Names for the root in the destination.
    pub tags: Vec<String>,
    /// Blobs on their way at a time.
    pub parallel: usize,
    pub progress: Option<Progress>,
}

impl Default for Options {
    fn default() -> Options {
        Options { tags: Vec::new(), parallel: 6, progress: None }
    }
}

impl Options {
    fn tell(&self, blob: &Descriptor, step: Step) {
        if let Some(progress) = &self.progress {
            progress(blob, step);
        }
    }
}

/// Everything below a root.
#[derive(Default)]
pub struct Graph {
    /// Manifests and indexes, parents before children.
    pub documents: Vec<(Descriptor, Bytes)>,
    /// Configs and layers, each once, in the order in which they are named.
    pub blobs: Vec<Descriptor>,
}

/// Makes `to` hold what `root` is in `from`, whole, under the same digests.
pub async fn copy(from: &impl Manifests, to: &impl Manifests, root: &Descriptor, options: &Options) -> Result<()> {
    let graph = walk_missing(from, Some(to), root).await?;
    let blobs = graph.blobs.iter().map(|blob| copy_blob(from, to, blob, options)).collect();
    run(blobs, options.parallel).await?;
    for (descriptor, bytes) in graph.documents.iter().rev() {
        to.put_manifest(None, descriptor.media_type().as_ref(), bytes).await?;
        options.tell(descriptor, Step::Written);
    }
    if options.tags.is_empty() {
        return Ok(());
    }
    let bytes = match graph.documents.first() {
        Some((_, bytes)) => bytes.clone(),
        None => from.manifest(root.digest().as_ref()).await?.1,
    };
    for tag in &options.tags {
        to.put_manifest(Some(tag), root.media_type().as_ref(), &bytes).await?;
    }
    Ok(())
}

/// All that `root` names, read from `from`.
pub async fn walk<F: Manifests>(from: &F, root: &Descriptor) -> Result<Graph> {
    walk_missing(from, None::<&F>, root).await
}

async fn walk_missing<F: Manifests, T: Manifests>(from: &F, to: Option<&T>, root: &Descriptor) -> Result<Graph> {
    let mut found: Vec<(usize, Descriptor, Bytes, Document)> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut level = vec![root.clone()];
    for depth in 0..=DEPTH_LIMIT {
        let mut next = Vec::new();
        let mut seen = HashSet::new();
        for descriptor in std::mem::take(&mut level) {
            let name = descriptor.digest().to_string();
            if !seen.insert(name.clone()) {
                continue;
            }
            let place = match places.get(&name) {
                Some(place) => *place,
                None => {
                    if let Some(to) = to
                        && to.complete(&descriptor).await?
                    {
                        continue;
                    }
                    let (_, bytes) = from.manifest(&name).await?;
                    let document = Document::parse(&bytes, &name)?;
                    found.push((depth, descriptor, bytes, document));
                    places.insert(name, found.len() - 1);
                    found.len() - 1
                }
            };
            if found.len() > MANIFESTS_LIMIT {
                let reason = format!("it names more than {MANIFESTS_LIMIT} manifests");
                return Err(Error::malformed(format!("index {}", root.digest()), reason));
            }
            // Its deepest level counts: what two indexes share has to be there before either.
            found[place].0 = depth;
            if let Document::Index(index) = &found[place].3 {
                next.extend(index.manifests().iter().cloned());
            }
        }
        if next.is_empty() {
            return Ok(graph(found));
        }
        level = next;
    }
    let reason = format!("indexes are nested more than {DEPTH_LIMIT} deep");
    Err(Error::malformed(format!("index {}", root.digest()), reason))
}

fn graph(mut found: Vec<(usize, Descriptor, Bytes, Document)>) -> Graph {
    found.sort_by_key(|(depth, ..)| *depth);
    let mut graph = Graph::default();
    let mut seen = HashSet::new();
    for (_, descriptor, bytes, document) in found {
        if let Document::Manifest(manifest) = &document {
            let blobs = std::iter::once(manifest.config()).chain(manifest.layers());
            let wanted = blobs.filter(|blob| !image::is_foreign(blob) && seen.insert(blob.digest().to_string()));
            graph.blobs.extend(wanted.cloned());
        }
        graph.documents.push((descriptor, bytes));
    }
    graph
}

async fn copy_blob(from: &impl Manifests, to: &impl Manifests, blob: &Descriptor, options: &Options) -> Result<()> {
    if to.has(blob).await? {
        options.tell(blob, Step::Exists);
        return Ok(());
    }
    for origin in from.origins(blob)? {
        if to.mount(blob, &origin).await? {
            options.tell(blob, Step::Mounted(origin));
            return Ok(());
        }
    }
    if let Some(path) = from.file(blob)? {
        to.write_file(blob, &path).await?;
        options.tell(blob, Step::Written);
        return Ok(());
    }
    let mut data = from.read(blob).await?;
    if let Some(progress) = &options.progress {
        data = Box::new(Counted { reader: data, blob: blob.clone(), sent: 0, progress: Arc::clone(progress) });
    }
    to.write(blob, data).await?;
    options.tell(blob, Step::Written);
    Ok(())
}

/// Drives all of `work`, `parallel` at a time; the first error drops the rest.
pub(crate) async fn run<F: Future<Output = Result<()>>>(work: Vec<F>, parallel: usize) -> Result<()> {
    let mut waiting = work.into_iter();
    let mut running: FuturesUnordered<F> = waiting.by_ref().take(parallel.max(1)).collect();
    while let Some(done) = running.next().await {
        done?;
        running.extend(waiting.next());
    }
    Ok(())
}

struct Counted {
    reader: BlobReader,
    blob: Descriptor,
    sent: u64,
    progress: Progress,
}

impl AsyncRead for Counted {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.reader).poll_read(context, buffer))?;
        let read = buffer.filled().len() - before;
        if read > 0 {
            this.sent += read as u64;
            (this.progress)(&this.blob, Step::Sent(this.sent));
        }
        Poll::Ready(Ok(()))
    }
}
