//! The world as the frontend and the solver see it: images, contexts and remotes become digests first, and bytes only when
//! a step misses the cache.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use forge_exporter::blobs::digest_of;
use forge_exporter::fetch::{self, fetch_config};
use forge_exporter::layout::Layout;
use forge_exporter::registry::Client;
use forge_exporter::unpack::unpack_layers;
use forge_frontend::{BaseImage, ContextName, Remote, RemoteFiles, SourceError, Sources};
use forge_snapshotter::image::{Platform, Reference};
use forge_snapshotter::{Digest, SnapshotId, Store};
use forge_solver::context::{ContextError, Owners, Scan, StatCache, Tree, scan};
use forge_solver::event::{EventKind, Events, StepId};
use forge_solver::graph::Selection;
use forge_solver::{FetchError, Fetched, Fetcher, Leaf};

use super::context::BuildContext;
use super::remote;
use crate::cli::error::chain;
use crate::cli::remote::{self as registry, StoreAndOrigins};
use crate::cli::{Failure, Result, World};

pub struct BuildSources {
    store: Store,
    context: BuildContext,
    client: Client,
    pull: bool,
    single_id: bool,
    events: Events,
    stat_cache: StatCache,
    /// What the digests handed out stand for.
    trees: Mutex<HashMap<Digest, Arc<Tree>>>,
    images: Mutex<HashMap<Vec<Digest>, Origin>>,
    /// Downloads and checkouts, kept until the build ends.
    fetched: Mutex<Vec<remote::Fetched>>,
}

/// Where the layers of an image are, besides the store.
#[derive(Clone)]
enum Origin {
    Store,
    /// Made here: the snapshot is there, its layers perhaps never were blobs.
    Made(SnapshotId),
    Layout(Arc<Layout>),
}

impl BuildSources {
    pub fn new(world: &World, context: BuildContext, pull: bool, events: Events) -> Result<BuildSources> {
        let cache =
            context.files(&ContextName::Main).map(|files| Digest::of(files.root.as_os_str().as_encoded_bytes()));
        let stat_cache = match cache {
            Some(name) => StatCache::open(&world.store.root().join("contexts").join(name.hex())),
            None => StatCache::none(),
        };
        Ok(BuildSources {
            store: world.store.clone(),
            context,
            client: registry::client()?,
            pull,
            single_id: world.identity.single_id,
            events,
            stat_cache,
            trees: Mutex::default(),
            images: Mutex::default(),
            fetched: Mutex::default(),
        })
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The store's blobs, and through it those that the store only knows where to find.
    pub fn local(&self) -> StoreAndOrigins {
        registry::local(&self.store, &self.client)
    }

    /// Writes down what was hashed, for the next build.
    pub fn save(&self) {
        // A stat cache that cannot be written costs time, never a result.
        if let Err(error) = self.stat_cache.save() {
            let message = format!("the cache of file digests was not saved: {error}");
            self.events.send(&StepId::new("context"), EventKind::Warning { message });
        }
    }

    async fn resolve(&self, name: &Reference, platform: &Platform) -> Result<BaseImage> {
        if let Some(directory) = self.context.layout(name) {
            let layout = Arc::new(Layout::open(directory)?);
            let wanted = layout_name(&layout, name)?;
            let fetched = fetch_config(&self.store, layout.as_ref(), &wanted, platform).await?;
            return self.remember(fetched, Origin::Layout(layout));
        }
        if !self.pull
            && let Some(image) = registry::stored(&self.store, name, platform)?
        {
            let config = self.store.catalog().config(&image.id)?;
            let base = BaseImage {
                digest: image.manifest.unwrap_or(image.id),
                diff_ids: config.rootfs.diff_ids.clone(),
                config,
            };
            lock(&self.images).insert(base.diff_ids.clone(), image.root.map_or(Origin::Store, Origin::Made));
            return Ok(base);
        }
        let fetched = registry::resolve(&self.store, &self.client, name, platform).await?;
        self.remember(fetched, Origin::Store)
    }

    fn remember(&self, fetched: fetch::Fetched, origin: Origin) -> Result<BaseImage> {
        let diff_ids: Vec<Digest> = fetched.layers.iter().map(|(_, diff_id)| diff_id.clone()).collect();
        lock(&self.images).insert(diff_ids.clone(), origin);
        Ok(BaseImage { digest: digest_of(&fetched.manifest)?, diff_ids, config: fetched.config })
    }

    /// An image that was built here has its root under another name than the solver asks for: a snapshot over it, with
    /// no changes of its own, takes that name. `None` where the root is gone.
    fn adopt_made(&self, root: &SnapshotId, diff_ids: &[Digest]) -> Result<Option<SnapshotId>> {
        let snapshots = self.store.snapshots();
        if snapshots.get(root)?.is_none() {
            return Ok(None);
        }
        let nothing = self.store.ingest()?;
        Ok(Some(snapshots.adopt(Some(root), nothing.path(), SnapshotId::chain(diff_ids))?.id))
    }

    /// Unpacks an image's layers, from wherever they are.
    async fn unpack(&self, diff_ids: &[Digest], events: &Events) -> Result<SnapshotId> {
        let origin = lock(&self.images).get(diff_ids).cloned().unwrap_or(Origin::Store);
        if let Origin::Made(root) = &origin
            && let Some(adopted) = self.adopt_made(root, diff_ids)?
        {
            return Ok(adopted);
        }
        let step = StepId::new(format!("layers {}", SnapshotId::chain(diff_ids)));
        let layers = registry::layers(&self.store, diff_ids)?;
        let options = registry::unpack_options(self.single_id, events, &step);
        let unpacking = async {
            match origin {
                Origin::Store | Origin::Made(_) => unpack_layers(&self.store, &self.local(), &layers, &options).await,
                Origin::Layout(layout) => unpack_layers(&self.store, layout.as_ref(), &layers, &options).await,
            }
        };
        Ok(events.step(&step, "unpacking the base image", unpacking).await?)
    }

    fn keep(&self, tree: Tree) -> Digest {
        let digest = tree.digest.clone();
        lock(&self.trees).insert(digest.clone(), Arc::new(tree));
        digest
    }
}

/// What an image of a layout is called there: the tag asked for; or, where the layout holds one image, that one.
fn layout_name(layout: &Layout, wanted: &Reference) -> Result<String> {
    if let Some(digest) = wanted.digest() {
        return Ok(digest.to_string());
    }
    let tag = wanted.tag().unwrap_or("latest");
    let entries = layout.entries()?;
    let named =
        entries.iter().any(|entry| entry.names.iter().any(|name| name == tag || name.ends_with(&format!(":{tag}"))));
    match &entries[..] {
        [only] if !named => Ok(only.descriptor.digest().to_string()),
        _ => Ok(tag.to_owned()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sources for BuildSources {
    async fn image(&self, name: &Reference, platform: &Platform) -> Result<BaseImage, SourceError> {
        let step = StepId::new(format!("image {name} {platform}"));
        let resolving = async { self.resolve(name, platform).await.map_err(source_error) };
        self.events.step(&step, format!("[internal] load metadata for {name}"), resolving).await
    }

    async fn context(&self, context: &ContextName, selection: &Selection) -> Result<Digest, SourceError> {
        let Some(files) = self.context.files(context) else {
            return Err(SourceError { message: format!("{context:?} is no directory"), hint: None });
        };
        // The walk is CPU and disk work; the few threads of the runtime are free for it while planning.
        let scanned = tokio::task::block_in_place(|| {
            let request = Scan {
                root: &files.root,
                selection,
                ignore: Some(&files.ignore),
                owners: Owners::Root,
                parents: false,
            };
            scan(&request, &self.stat_cache)
        });
        scanned.map(|tree| self.keep(tree)).map_err(context_error)
    }

    async fn remote(&self, remote: &Remote) -> Result<RemoteFiles, SourceError> {
        let name = match remote {
            Remote::Http { url, .. } | Remote::Git { url, .. } => url.clone(),
        };
        let step = StepId::new(format!("remote {name}"));
        let fetching = async {
            let fetched = remote::fetch(remote, &self.store).await.map_err(source_error)?;
            let selection = Selection { paths: vec![String::new()], exclude: Vec::new() };
            let request = Scan {
                root: fetched.directory.path(),
                selection: &selection,
                ignore: None,
                owners: Owners::Root,
                parents: false,
            };
            let tree = tokio::task::block_in_place(|| scan(&request, &StatCache::none())).map_err(context_error)?;
            let files = RemoteFiles { digest: self.keep(tree), path: fetched.path.clone() };
            lock(&self.fetched).push(fetched);
            Ok(files)
        };
        self.events.step(&step, format!("[internal] fetch {name}"), fetching).await
    }
}

fn source_error(failure: Failure) -> SourceError {
    match failure {
        Failure::Told { message, hint, .. } => SourceError { message, hint },
        Failure::Shown(_) => SourceError { message: "failed".to_owned(), hint: None },
    }
}

fn context_error(error: ContextError) -> SourceError {
    let hint = match &error {
        ContextError::NotFound { .. } => {
            Some("the path counts from the build context, the last argument of forge build".to_owned())
        }
        ContextError::Ignored { .. } => Some("add a line `!path` to the ignore file".to_owned()),
        ContextError::Escapes { .. } => {
            Some("COPY reads from the context alone; --build-context adds another".to_owned())
        }
        _ => None,
    };
    SourceError { message: chain(&error), hint }
}

impl Fetcher for BuildSources {
    async fn fetch(&self, leaf: &Leaf, events: &Events) -> Result<Fetched, FetchError> {
        match leaf {
            Leaf::Image { diff_ids } => match self.unpack(diff_ids, events).await {
                Ok(snapshot) => Ok(Fetched::Snapshot(snapshot)),
                Err(failure) => Err(FetchError(source_error(failure).message)),
            },
            Leaf::Files { digest } => match lock(&self.trees).get(digest) {
                Some(tree) => Ok(Fetched::Tree(tree.clone())),
                None => Err(FetchError(format!("no files of digest {digest} were selected in this build"))),
            },
        }
    }
}
