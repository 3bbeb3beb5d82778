//! The client against registries: one that misbehaves on request ([`server`]), and Debian's `docker-registry`.

mod faults;
mod real;
mod server;

use forge_snapshotter::Digest;
use oci_spec::image::{Descriptor, MediaType};
use tokio::io::AsyncReadExt as _;

use super::*;
use crate::blobs::Blobs as _;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Bytes that no compression or cache can make smaller by accident.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

fn blob_of(bytes: &[u8]) -> Descriptor {
    let digest: oci_spec::image::Digest = Digest::of(bytes).as_str().parse().unwrap();
    Descriptor::new(MediaType::ImageLayer, bytes.len() as u64, digest)
}

async fn read_blob(repository: &Repository, blob: &Descriptor) -> Result<Vec<u8>, String> {
    let mut reader = repository.read(blob).await.map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).await.map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn reader(bytes: &[u8]) -> crate::blobs::BlobReader {
    Box::new(std::io::Cursor::new(bytes.to_vec()))
}

fn image_of(layers: &[&Descriptor]) -> Vec<u8> {
    let list: Vec<_> = layers.iter().map(|layer| serde_json::to_value(layer).unwrap()).collect();
    let image = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": list[0], "layers": &list[1..]});
    serde_json::to_vec(&image).unwrap()
}
