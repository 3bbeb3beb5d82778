//! [`fetch_config`]: from a name to everything that a plan needs to know of an image, without one of its layers.
//!
//! What is learnt on the way is recorded: manifest and config in the content store, which blob is which layer, and
//! where the blobs can be had. So the layers can be fetched, mounted elsewhere or left where they are, later.

use bytes::Bytes;
use forge_snapshotter::image::{ImageConfig, Platform};
use forge_snapshotter::{Digest, Encoding, SnapshotId, Store, StoredImage};
use oci_spec::image::{Descriptor, ImageManifest};

use crate::blobs::{CONFIG_LIMIT, MANIFEST_LIMIT, Manifests, Origin, digest_of, read_small};
use crate::copy::DEPTH_LIMIT;
use crate::image::{self, DOCKER_CONFIG, Document, OCI_CONFIG};
use crate::{Error, Result, layout};

/// An image as its documents describe it.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What the name stood for: an index, or the manifest itself.
    pub root: Descriptor,
    pub manifest: Descriptor,
    pub manifest_bytes: Bytes,
    /// The digest of the configuration: the image's id.
    pub id: Digest,
    pub config: ImageConfig,
    pub config_bytes: Bytes,
    /// Each layer's blob and diff id, the base first.
    pub layers: Vec<(Descriptor, Digest)>,
}

impl Fetched {
    /// The image in the catalog's terms; `root` is there once its layers are unpacked.
    pub fn stored(&self, root: Option<SnapshotId>) -> Result<StoredImage> {
        Ok(StoredImage {
            id: self.id.clone(),
            manifest: Some(digest_of(&self.manifest)?),
            platform: self.config.platform(),
            created: self.config.created.clone(),
            root,
        })
    }
}

/// Resolves `name`, a tag or a digest, to the image for `platform`. A name that is a single image is taken whatever
/// its platform is; the caller compares the configuration's.
///
/// A digest whose documents are in the store already asks nobody.
pub async fn fetch_config(store: &Store, from: &impl Manifests, name: &str, platform: &Platform) -> Result<Fetched> {
    let (root, bytes) = document(store, from, name).await?;
    let (manifest, manifest_bytes, parsed) = choose(store, from, root.clone(), bytes, platform).await?;
    let config_type = parsed.config().media_type().as_ref();
    if !matches!(config_type, OCI_CONFIG | DOCKER_CONFIG) {
        let digest = manifest.digest();
        return Err(Error::Unsupported(format!("{digest} is not a container image: its config is {config_type:?}")));
    }
    let id = digest_of(parsed.config())?;
    let config_bytes = match store.content().size(&id)? {
        Some(_) => store.content().read(&id, CONFIG_LIMIT)?.into(),
        None => {
            let bytes = read_small(from, parsed.config(), CONFIG_LIMIT).await?;
            store.content().put(&bytes)?;
            bytes
        }
    };
    let config: ImageConfig =
        serde_json::from_slice(&config_bytes).map_err(|error| Error::malformed(format!("config {id}"), error))?;
    let layers = layers_of(&parsed, &config, &digest_of(&manifest)?)?;
    record(store, &layers, &from.origins(&manifest)?)?;
    Ok(Fetched { root, manifest, manifest_bytes, id, config, config_bytes, layers })
}

/// A manifest's layers, each with the diff id that the config has for it.
pub(crate) fn layers_of(
    manifest: &ImageManifest,
    config: &ImageConfig,
    digest: &Digest,
) -> Result<Vec<(Descriptor, Digest)>> {
    let (layers, diff_ids) = (manifest.layers(), &config.rootfs.diff_ids);
    if layers.len() != diff_ids.len() {
        let reason = format!("it has {} layers where its config names {}", layers.len(), diff_ids.len());
        return Err(Error::malformed(format!("manifest {digest}"), reason));
    }
    layers.iter().try_for_each(|layer| digest_of(layer).map(drop))?;
    Ok(layers.iter().cloned().zip(diff_ids.iter().cloned()).collect())
}

/// Remembers which blobs are these layers and who has them.
pub(crate) fn record(store: &Store, layers: &[(Descriptor, Digest)], origins: &[Origin]) -> Result<()> {
    let catalog = store.catalog();
    for (layer, diff_id) in layers {
        let blob = digest_of(layer)?;
        let media_type = layer.media_type().to_string();
        let encoding = Encoding { media_type, level: None, blob: blob.clone(), size_bytes: layer.size() };
        catalog.add_encoding(diff_id, &encoding)?;
        for origin in origins {
            catalog.add_origin(&blob, &origin.registry, &origin.repository)?;
        }
    }
    Ok(())
}

/// A manifest or index, kept in the store byte for byte.
async fn document(store: &Store, from: &impl Manifests, name: &str) -> Result<(Descriptor, Bytes)> {
    if let Ok(digest) = name.parse::<Digest>()
        && store.content().size(&digest)?.is_some()
    {
        return layout::checked_document(store.content().read(&digest, MANIFEST_LIMIT)?, &digest);
    }
    let (descriptor, bytes) = from.manifest(name).await?;
    store.content().put(&bytes)?;
    Ok((descriptor, bytes))
}

/// Follows indexes down to the image manifest that fits.
async fn choose(
    store: &Store,
    from: &impl Manifests,
    root: Descriptor,
    bytes: Bytes,
    platform: &Platform,
) -> Result<(Descriptor, Bytes, ImageManifest)> {
    let (mut descriptor, mut bytes) = (root, bytes);
    for _ in 0..=DEPTH_LIMIT {
        let index = match Document::parse(&bytes, descriptor.digest())? {
            Document::Manifest(manifest) => return Ok((descriptor, bytes, *manifest)),
            Document::Index(index) => index,
        };
        let entry = match image::best(index.manifests(), platform) {
            Ok(entry) => entry,
            Err(error) => image::best(&nested(store, from, index.manifests()).await?, platform).map_err(|_| error)?,
        };
        let (found, content) = document(store, from, entry.digest().as_ref()).await?;
        if found.size() != entry.size() {
            let (expected, found) = (format!("{} bytes", entry.size()), format!("{} bytes", found.size()));
            return Err(Error::Mismatch { what: format!("manifest {}", entry.digest()), expected, found });
        }
        (descriptor, bytes) = (found, content);
    }
    let reason = format!("indexes are nested more than {DEPTH_LIMIT} deep");
    Err(Error::malformed(format!("index {}", descriptor.digest()), reason))
}

/// The entries of the indexes among `entries` that do not say what they are for.
async fn nested(store: &Store, from: &impl Manifests, entries: &[Descriptor]) -> Result<Vec<Descriptor>> {
    let mut all = Vec::new();
    let unsaid = |entry: &&Descriptor| entry.platform().is_none() && image::is_index(entry.media_type().as_ref());
    for entry in entries.iter().filter(unsaid) {
        let (descriptor, bytes) = document(store, from, entry.digest().as_ref()).await?;
        if let Document::Index(index) = Document::parse(&bytes, descriptor.digest())? {
            all.extend(index.manifests().iter().cloned());
        }
    }
    Ok(all)
}
