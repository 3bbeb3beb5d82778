//! [`pack`]: gives an image that the store knows the blobs and the manifest that it travels as.
//!
//! Lazily: a layer that has a fitting encoding, here or at a registry, keeps it; one that was built here is compressed
//! when this is first asked, and its encoding remembered. An image that came from outside and needs no change keeps its
//! manifest, so that what was pulled is pushed under the digest it had.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use forge_snapshotter::image::Platform;
use forge_snapshotter::layer::{self, Compression, DiffOptions, MediaTypes};
use forge_snapshotter::{Digest, Encoding, Recipe, Store};
use oci_spec::image::{Descriptor, ImageManifest};
use serde_json::{Value, json};

use crate::blobs::{CONFIG_LIMIT, MANIFEST_LIMIT, describe, digest_of};
use crate::copy::run;
use crate::image::{self, Document, layer_compression};
use crate::{Error, Result, blocking, unpack};

/// Layers compressed at a time; each uses all cores by itself.
const PARALLEL: usize = 2;

/// What became of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Reused,
    Compressed { size_bytes: u64 },
}

/// Told the diff id of every layer as it is ready.
pub type Progress = Arc<dyn Fn(&Digest, Step) + Send + Sync>;

pub struct PackOptions {
    pub compression: Compression,
    /// Also layers from outside that have another compression are compressed again.
    pub force_compression: bool,
    pub types: MediaTypes,
    pub annotations: BTreeMap<String, String>,
    pub progress: Option<Progress>,
}

impl Default for PackOptions {
    fn default() -> PackOptions {
        PackOptions {
            compression: Compression::GZIP,
            force_compression: false,
            types: MediaTypes::Oci,
            annotations: BTreeMap::new(),
            progress: None,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Packed {
    /// With the image's platform, as an entry of an index has it.
    pub manifest: Descriptor,
    pub bytes: Bytes,
}

/// Packs the image whose config has the digest `image`. The same image and options give the same bytes.
pub async fn pack(store: &Store, image: &Digest, options: &PackOptions) -> Result<Packed> {
    let config = store.catalog().config(image)?;
    if let Some(bytes) = unchanged(store, image, options)? {
        return packed(&bytes, &config.platform());
    }
    let diff_ids = &config.rootfs.diff_ids;
    let slots: Vec<_> = diff_ids.iter().map(|_| std::sync::OnceLock::new()).collect();
    let work = diff_ids.iter().zip(&slots).map(|(diff_id, slot)| async move {
        let encoding = pack_layer(store, diff_id, options).await?;
        slot.set(encoding).expect("each layer is packed once");
        Ok(())
    });
    run(work.collect(), PARALLEL).await?;
    let layers: Vec<Descriptor> =
        slots.iter().flat_map(|slot| slot.get()).map(|encoding| describe_layer(encoding, options.types)).collect();
    let size = store.content().read(image, CONFIG_LIMIT)?.len() as u64;
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": image::manifest_type(options.types),
        "config": describe(image::config_type(options.types), image, size),
        "layers": layers,
    });
    annotate(&mut manifest, &options.annotations);
    let bytes = image::to_bytes(&manifest);
    store.content().put(&bytes)?;
    packed(&bytes, &config.platform())
}

/// An index of images for several platforms, in the store.
pub fn index(
    store: &Store,
    manifests: &[(Descriptor, Platform)],
    types: MediaTypes,
    annotations: &BTreeMap<String, String>,
) -> Result<Descriptor> {
    let entries: Vec<Descriptor> = manifests.iter().map(|(entry, platform)| for_platform(entry, platform)).collect();
    let mut index = json!({ "schemaVersion": 2, "mediaType": image::index_type(types), "manifests": entries });
    annotate(&mut index, annotations);
    let bytes = image::to_bytes(&index);
    store.content().put(&bytes)?;
    image::describe_document(&bytes)
}

fn annotate(document: &mut Value, annotations: &BTreeMap<String, String>) {
    if !annotations.is_empty() {
        document["annotations"] = json!(annotations);
    }
}

fn packed(bytes: &[u8], platform: &Platform) -> Result<Packed> {
    let manifest = for_platform(&image::describe_document(bytes)?, platform);
    Ok(Packed { manifest, bytes: Bytes::copy_from_slice(bytes) })
}

fn for_platform(descriptor: &Descriptor, platform: &Platform) -> Descriptor {
    let mut value = serde_json::to_value(descriptor).expect("descriptors have string keys");
    value["platform"] = serde_json::to_value(platform).expect("platforms have string keys");
    serde_json::from_value(value).expect("it was a descriptor")
}

fn describe_layer(encoding: &Encoding, types: MediaTypes) -> Descriptor {
    let media_type = layer_compression(&encoding.media_type).map(|compression| compression.media_type(types));
    describe(media_type.unwrap_or(&encoding.media_type), &encoding.blob, encoding.size_bytes)
}

/// The manifest that the image came with, if it can be handed on as it is.
fn unchanged(store: &Store, image: &Digest, options: &PackOptions) -> Result<Option<Vec<u8>>> {
    let manifest = store.catalog().get(image)?.and_then(|image| image.manifest);
    let Some(digest) = manifest.filter(|_| !options.force_compression && options.annotations.is_empty()) else {
        return Ok(None);
    };
    if store.content().size(&digest)?.is_none() {
        return Ok(None);
    }
    let bytes = store.content().read(&digest, MANIFEST_LIMIT)?;
    let Document::Manifest(manifest) = Document::parse(&bytes, &digest)? else { return Ok(None) };
    let named = manifest.media_type().as_ref().map(AsRef::as_ref);
    let fits = options.types == MediaTypes::Oci || named == Some(image::DOCKER_MANIFEST);
    Ok((fits && is_whole(store, &manifest)?).then_some(bytes))
}

/// Whether every blob can be had.
fn is_whole(store: &Store, manifest: &ImageManifest) -> Result<bool> {
    for layer in manifest.layers().iter().filter(|layer| !image::is_foreign(layer)) {
        if !can_be_had(store, &digest_of(layer)?)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn is_local(store: &Store, blob: &Digest) -> Result<bool> {
    Ok(store.content().size(blob)?.is_some())
}

fn can_be_had(store: &Store, blob: &Digest) -> Result<bool> {
    Ok(is_local(store, blob)? || !store.catalog().origins(blob)?.is_empty())
}

/// An encoding of the layer that fits: known, or made now. One process makes it, the others wait for it.
async fn pack_layer(store: &Store, diff_id: &Digest, options: &PackOptions) -> Result<Encoding> {
    let tell = |step| {
        if let Some(progress) = &options.progress {
            progress(diff_id, step);
        }
    };
    let mut known = find(store, diff_id, options).await?;
    let _lock = match known {
        Some(_) => None,
        None => Some(unpack::lock(store, &format!("encoding {diff_id}")).await?),
    };
    if known.is_none() {
        known = find(store, diff_id, options).await?;
    }
    if let Some(encoding) = known {
        tell(Step::Reused);
        return Ok(encoding);
    }
    let work = Work {
        store: store.clone(),
        diff_id: diff_id.clone(),
        compression: options.compression,
        encodings: local_encodings(store, diff_id)?,
    };
    let encoding = blocking(move || work.encode()).await?;
    store.catalog().add_encoding(diff_id, &encoding)?;
    tell(Step::Compressed { size_bytes: encoding.size_bytes });
    Ok(encoding)
}

/// A known encoding that fits, one that is here before one that is not.
async fn find(store: &Store, diff_id: &Digest, options: &PackOptions) -> Result<Option<Encoding>> {
    let mut known = store.catalog().encodings(diff_id)?;
    known.retain(|encoding| fits(encoding, options));
    let mut here = Vec::new();
    for encoding in &known {
        here.push(is_local(store, &encoding.blob)?);
    }
    let ordered = (0..known.len()).filter(|place| here[*place]).chain((0..known.len()).filter(|place| !here[*place]));
    // Two images may claim different blobs for a layer. What both say can be checked where the bytes are.
    let disputed = known.iter().any(|encoding| encoding.level.is_none() && encoding.blob != known[0].blob);
    for place in ordered {
        let encoding = &known[place];
        let usable = match here[place] {
            true if disputed && encoding.level.is_none() => gives(store, encoding, diff_id).await?,
            true => true,
            false => can_be_had(store, &encoding.blob)?,
        };
        if usable {
            return Ok(Some(encoding.clone()));
        }
    }
    Ok(None)
}

/// What was compressed here must be as asked, level and all; what came from outside stays as it is, unless forced to
/// another compression.
fn fits(encoding: &Encoding, options: &PackOptions) -> bool {
    let Some(compression) = layer_compression(&encoding.media_type) else { return false };
    let same = std::mem::discriminant(&compression) == std::mem::discriminant(&options.compression);
    match (encoding.level, options.force_compression) {
        (None, false) => true,
        (None, true) => same,
        (Some(level), _) => same && level == level_of(options.compression),
    }
}

/// Uncompressed has no level; 0 says that it was made here.
fn level_of(compression: Compression) -> i32 {
    compression.level().unwrap_or(0)
}

async fn gives(store: &Store, encoding: &Encoding, diff_id: &Digest) -> Result<bool> {
    let (file, diff_id) = (store.content().open(&encoding.blob)?, diff_id.clone());
    let found = blocking(move || Digest::of_reader(layer::decoder(file).map_err(std::io::Error::other)?)).await;
    // A blob that cannot be decoded gives no layer.
    Ok(found.is_ok_and(|(found, _)| found == diff_id))
}

fn local_encodings(store: &Store, diff_id: &Digest) -> Result<Vec<Encoding>> {
    let mut known = store.catalog().encodings(diff_id)?;
    for place in (0..known.len()).rev() {
        if !is_local(store, &known[place].blob)? {
            known.remove(place);
        }
    }
    Ok(known)
}

struct Work {
    store: Store,
    diff_id: Digest,
    compression: Compression,
    /// Those whose bytes are here.
    encodings: Vec<Encoding>,
}

impl Work {
    /// From the tar of a blob that is here, byte for byte (others may have written it in another way than we would);
    /// else from the files of the snapshot.
    fn encode(&self) -> Result<Encoding> {
        for encoding in &self.encodings {
            if let Some(encoding) = self.recompress(&encoding.blob)? {
                return Ok(encoding);
            }
        }
        let mut failed = Error::LayerLost(self.diff_id.clone());
        for recipe in self.store.catalog().recipes(&self.diff_id)? {
            match self.compress(&recipe) {
                // What came from outside may have been written in another way; a snapshot made here gives what it gave.
                Err(error @ (Error::Drifted { .. } | Error::LayerLost(_))) => failed = error,
                result => return result,
            }
        }
        Err(failed)
    }

    /// `None` if the blob turns out to be another layer's.
    fn recompress(&self, blob: &Digest) -> Result<Option<Encoding>> {
        let mut tar = layer::decoder(self.store.content().open(blob)?)?;
        let mut writer = self.store.content().writer()?;
        let packed = layer::compress(&mut tar, self.compression, &mut writer)?;
        if packed.diff_id != self.diff_id {
            return Ok(None);
        }
        writer.commit(Some(&packed.blob))?;
        Ok(Some(self.encoding(packed.blob, packed.size_bytes)))
    }

    fn compress(&self, recipe: &Recipe) -> Result<Encoding> {
        let lost = || Error::LayerLost(self.diff_id.clone());
        let info = self.store.snapshots().get(&recipe.snapshot)?.ok_or_else(lost)?;
        let empty = self.store.ingest()?;
        let changes: PathBuf = info.changes.unwrap_or_else(|| empty.path().to_owned());
        let options = DiffOptions { driver: self.store.driver(), clamp_mtime: recipe.epoch };
        let mut writer = self.store.content().writer()?;
        let packed = layer::pack(&changes, &options, self.compression, &mut writer)?;
        if packed.diff_id != self.diff_id {
            let (snapshot, diff_id, found) = (recipe.snapshot.clone(), self.diff_id.clone(), packed.diff_id);
            return Err(Error::Drifted { snapshot, diff_id, found });
        }
        writer.commit(Some(&packed.blob))?;
        Ok(self.encoding(packed.blob, packed.size_bytes))
    }

    fn encoding(&self, blob: Digest, size_bytes: u64) -> Encoding {
        let media_type = self.compression.media_type(MediaTypes::Oci).to_owned();
        Encoding { media_type, level: Some(level_of(self.compression)), blob, size_bytes }
    }
}
