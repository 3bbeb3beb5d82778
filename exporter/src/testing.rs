//! Images made up for tests, and a place that counts what is written to it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bytes::Bytes;
use forge_snapshotter::Digest;
use forge_snapshotter::image::Platform;
use oci_spec::image::Descriptor;
use serde_json::{Value, json};

use crate::Result;
use crate::blobs::{BlobReader, Blobs, Manifests, Origin, describe};
use crate::image::{self, Compression, MediaTypes};

/// A layer's tar with these files, each owned by root.
pub fn tar_of(files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(text.len() as u64);
        tar.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub async fn put(to: &impl Manifests, media_type: &str, bytes: &[u8]) -> Descriptor {
    let blob = describe(media_type, &Digest::of(bytes), bytes.len() as u64);
    to.write(&blob, Box::new(std::io::Cursor::new(bytes.to_vec()))).await.unwrap();
    blob
}

pub async fn put_json(to: &impl Manifests, document: &Value) -> Descriptor {
    let bytes = serde_json::to_vec(document).unwrap();
    let media_type = document["mediaType"].as_str().unwrap();
    let digest = to.put_manifest(None, media_type, &bytes).await.unwrap();
    describe(media_type, &digest, bytes.len() as u64)
}

pub fn config_of(platform: &str, tars: &[Vec<u8>]) -> Vec<u8> {
    let platform: Platform = platform.parse().unwrap();
    let diff_ids: Vec<Digest> = tars.iter().map(Digest::of).collect();
    let config = json!({
        "architecture": platform.architecture, "os": platform.os, "variant": platform.variant,
        "config": { "Env": ["A=1"], "Healthcheck": { "Test": ["NONE"] } },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    serde_json::to_vec(&config).unwrap()
}

/// An image whose layers are gzip, described as an entry of an index would.
pub async fn put_image(to: &impl Manifests, platform: &str, layers: &[&[(&str, &str)]]) -> Descriptor {
    let tars: Vec<Vec<u8>> = layers.iter().map(|files| tar_of(files)).collect();
    let config = put(to, image::OCI_CONFIG, &config_of(platform, &tars)).await;
    let mut descriptors = Vec::new();
    for tar in &tars {
        descriptors.push(put(to, Compression::GZIP.media_type(MediaTypes::Oci), &gzip(tar)).await);
    }
    let manifest = json!({
        "schemaVersion": 2, "mediaType": image::OCI_MANIFEST, "config": config, "layers": descriptors,
    });
    with_platform(put_json(to, &manifest).await, platform)
}

pub fn with_platform(descriptor: Descriptor, platform: &str) -> Descriptor {
    let mut value = serde_json::to_value(descriptor).unwrap();
    let mut parts = platform.split('/');
    let (os, architecture) = (parts.next().unwrap(), parts.next().unwrap());
    value["platform"] = json!({ "os": os, "architecture": architecture });
    if let Some(variant) = parts.next() {
        value["platform"]["variant"] = variant.into();
    }
    serde_json::from_value(value).unwrap()
}

pub async fn put_index(to: &impl Manifests, entries: &[Descriptor]) -> Descriptor {
    put_json(to, &json!({ "schemaVersion": 2, "mediaType": image::OCI_INDEX, "manifests": entries })).await
}

/// The base images that this machine keeps as OCI layouts, if it does.
pub fn base_images() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").unwrap_or_default();
    let Ok(found) = std::fs::read_dir(Path::new(&home).join(".cache/forge-base-images/oci")) else {
        eprintln!("skipped: there are no base images in ~/.cache/forge-base-images/oci");
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = found.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Passes everything on and remembers what was written, in order: blobs, manifests and `name=` for tags.
pub struct Recorder<T> {
    pub inner: T,
    pub written: Mutex<Vec<String>>,
    /// The origin that mounts succeed from.
    pub mounts: Option<Origin>,
}

impl<T> Recorder<T> {
    pub fn new(inner: T) -> Recorder<T> {
        Recorder { inner, written: Mutex::default(), mounts: None }
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.written.lock().unwrap())
    }

    fn note(&self, what: String) {
        self.written.lock().unwrap().push(what);
    }
}

impl<T: Manifests> Blobs for Recorder<T> {
    async fn has(&self, blob: &Descriptor) -> Result<bool> {
        self.inner.has(blob).await
    }

    async fn read(&self, blob: &Descriptor) -> Result<BlobReader> {
        self.inner.read(blob).await
    }

    async fn write(&self, blob: &Descriptor, data: BlobReader) -> Result<()> {
        self.note(blob.digest().to_string());
        self.inner.write(blob, data).await
    }

    fn origins(&self, _: &Descriptor) -> Result<Vec<Origin>> {
        Ok(self.mounts.iter().cloned().collect())
    }
}

impl<T: Manifests> Manifests for Recorder<T> {
    async fn resolve(&self, name: &str) -> Result<Descriptor> {
        self.inner.resolve(name).await
    }

    async fn manifest(&self, name: &str) -> Result<(Descriptor, Bytes)> {
        self.inner.manifest(name).await
    }

    async fn put_manifest(&self, tag: Option<&str>, media_type: &str, bytes: &[u8]) -> Result<Digest> {
        self.note(tag.map_or_else(|| Digest::of(bytes).to_string(), |tag| format!("name={tag}")));
        self.inner.put_manifest(tag, media_type, bytes).await
    }

    async fn mount(&self, blob: &Descriptor, from: &Origin) -> Result<bool> {
        let mounted = self.mounts.as_ref() == Some(from);
        if mounted {
            self.note(format!("mount {}", blob.digest()));
        }
        Ok(mounted)
    }
}
