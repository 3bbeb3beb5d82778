//! The local store as an end of a copy.
//!
//! It is lazy: the catalog knows layers whose bytes were never fetched, because nothing needed them. Those are read
//! from where they can be had, through [`Origins`], so a push of an image whose base was never downloaded streams it
//! from registry to registry (where it could not be mounted).

use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use forge_snapshotter::image::{ImageConfig, Reference};
use forge_snapshotter::{Digest, Store, StoredImage};
use oci_spec::image::{Descriptor, ImageManifest};
use tokio_util::io::SyncIoBridge;

use crate::blobs::{self, Abandon, BlobReader, Blobs, CONFIG_LIMIT, MANIFEST_LIMIT, Manifests, Origin, digest_of};
use crate::image::{self, Document};
use crate::{CHUNK, During, Error, Result, blocking, fetch, layout};

/// How blobs are read that are known but not here. The registry client's owner implements it.
pub trait Origins: Send + Sync {
    fn open(&self, origin: &Origin, blob: &Descriptor) -> impl Future<Output = Result<BlobReader>> + Send;
}

/// There is nowhere else.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoOrigins;

impl Origins for NoOrigins {
    async fn open(&self, origin: &Origin, blob: &Descriptor) -> Result<BlobReader> {
        let hint = format!(": it is known to be at {}/{}", origin.registry, origin.repository);
        Err(Error::NotFound { what: format!("blob {}", blob.digest()), hint })
    }
}

#[derive(Clone)]
pub struct Local<O = NoOrigins> {
    store: Store,
    origins: Arc<O>,
}

impl Local {
    pub fn new(store: Store) -> Local {
        Local::with_origins(store, NoOrigins)
    }
}

impl<O: Origins> Local<O> {
    pub fn with_origins(store: Store, origins: O) -> Local<O> {
        Local { store, origins: Arc::new(origins) }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    async fn read_elsewhere(&self, blob: &Descriptor) -> Result<BlobReader> {
        let mut failed = Error::not_found(format!("blob {} in the store", blob.digest()));
        for origin in self.origins(blob)? {
            match self.origins.open(&origin, blob).await {
                Ok(reader) => return blobs::verified(reader, blob),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Makes the images below a manifest or index that is here known to the catalog; returns their ids.
    pub fn remember(&self, root: &Digest) -> Result<Vec<Digest>> {
        let bytes = self.store.content().read(root, MANIFEST_LIMIT)?;
        self.images(root, &Document::parse(&bytes, root)?)
    }

    /// The images whose manifests are here, made known to the catalog under `name`.
    fn tag(&self, name: &Reference, root: &Digest, document: &Document) -> Result<()> {
        let images = self.images(root, document)?;
        let index = matches!(document, Document::Index(_)).then_some(root);
        Ok(self.store.catalog().tag(name, &images, index)?)
    }

    fn images(&self, root: &Digest, document: &Document) -> Result<Vec<Digest>> {
        let mut images = Vec::new();
        match document {
            Document::Manifest(manifest) => images.push(self.image(root, manifest)?),
            Document::Index(index) => {
                for entry in index.manifests().iter().filter(|entry| image::is_image(entry)) {
                    let digest = digest_of(entry)?;
                    if self.store.content().size(&digest)?.is_none() {
                        continue;
                    }
                    let bytes = self.store.content().read(&digest, MANIFEST_LIMIT)?;
                    if let Document::Manifest(manifest) = Document::parse(&bytes, &digest)? {
                        images.push(self.image(&digest, &manifest)?);
                    }
                }
            }
        }
        Ok(images)
    }

    fn image(&self, digest: &Digest, manifest: &ImageManifest) -> Result<Digest> {
        let id = digest_of(manifest.config())?;
        let bytes = self.store.content().read(&id, CONFIG_LIMIT)?;
        let config: ImageConfig =
            serde_json::from_slice(&bytes).map_err(|error| Error::malformed(format!("config {id}"), error))?;
        let layers = fetch::layers_of(manifest, &config, digest)?;
        fetch::record(&self.store, &layers, &[])?;
        let image = StoredImage {
            id: id.clone(),
            manifest: Some(digest.clone()),
            platform: config.platform(),
            created: config.created,
            root: None,
        };
        self.store.catalog().put(&image)?;
        Ok(id)
    }
}

impl<O: Origins> Blobs for Local<O> {
    async fn has(&self, blob: &Descriptor) -> Result<bool> {
        Ok(self.store.content().size(&digest_of(blob)?)? == Some(blob.size()))
    }

    async fn read(&self, blob: &Descriptor) -> Result<BlobReader> {
        if !self.has(blob).await? {
            return self.read_elsewhere(blob).await;
        }
        let file = self.store.content().open(&digest_of(blob)?)?;
        blobs::verified(Box::new(tokio::fs::File::from_std(file)), blob)
    }

    async fn write(&self, blob: &Descriptor, data: BlobReader) -> Result<()> {
        let digest = digest_of(blob)?;
        let mut writer = self.store.content().writer()?;
        let (_abandon, registration) = Abandon::new();
        let data = SyncIoBridge::new(blobs::abandonable(blobs::verified(data, blob)?, registration));
        blocking(move || {
            let mut data = BufReader::with_capacity(CHUNK, data);
            std::io::copy(&mut data, &mut writer).during("store", format!("blob {digest}"))?;
            writer.commit(Some(&digest))?;
            Ok(())
        })
        .await
    }

    fn file(&self, blob: &Descriptor) -> Result<Option<PathBuf>> {
        let digest = digest_of(blob)?;
        let whole = self.store.content().size(&digest)? == Some(blob.size());
        Ok(whole.then(|| self.store.content().path(&digest)))
    }

    fn origins(&self, blob: &Descriptor) -> Result<Vec<Origin>> {
        let origins = self.store.catalog().origins(&digest_of(blob)?)?;
        Ok(origins.into_iter().map(|(registry, repository)| Origin { registry, repository }).collect())
    }
}

impl<O: Origins> Manifests for Local<O> {
    /// A digest, or a tag of the catalog.
    async fn resolve(&self, name: &str) -> Result<Descriptor> {
        Ok(self.manifest(name).await?.0)
    }

    async fn manifest(&self, name: &str) -> Result<(Descriptor, Bytes)> {
        let missing = || Error::not_found(format!("a manifest of {name} in the store"));
        let digest = match (name.parse::<Digest>(), name.parse::<Reference>()) {
            (Ok(digest), _) => digest,
            (_, Ok(reference)) => match self.store.catalog().index(&reference)? {
                Some(index) => index,
                None => match &self.store.catalog().tagged(&reference)?[..] {
                    [image] => image.manifest.clone().ok_or_else(missing)?,
                    _ => return Err(missing()),
                },
            },
            (_, Err(error)) => return Err(Error::malformed("a name", error)),
        };
        let bytes = self.store.content().read(&digest, MANIFEST_LIMIT)?;
        layout::checked_document(bytes, &digest)
    }

    /// A tag is a full name here; the images of the manifest become known under it.
    async fn put_manifest(&self, tag: Option<&str>, _: &str, bytes: &[u8]) -> Result<Digest> {
        let document = Document::parse(bytes, Digest::of(bytes))?;
        let digest = self.store.content().put(bytes)?;
        if let Some(tag) = tag {
            let name = tag.parse().map_err(|error| Error::malformed("a name", error))?;
            self.tag(&name, &digest, &document)?;
        }
        Ok(digest)
    }
}
