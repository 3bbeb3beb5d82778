//! Images in one tar file, as `save` writes and `load` reads them.
//!
//! Written is the hybrid form that docker writes since version 25, members sorted by name, headers a function of the
//! content; without `manifest.json` it is a plain OCI archive:
//! ```text
//! blobs/sha256/<hex>   configs, layers, manifests, indexes
//! index.json           as in an OCI layout
//! manifest.json        [{"Config": "blobs/sha256/…", "RepoTags": […], "Layers": ["blobs/sha256/…"]}]
//! oci-layout
//! ```
//! Read are both, and docker's old form, whose members are `<id>.json` and `<id>/layer.tar` (uncompressed, sometimes a
//! symbolic link to another image's). Nothing is unpacked: an [`Archive`] notes where members lie in the tar and hands
//! out their bytes as [`Blobs`](crate::blobs::Blobs), so names in it can lead nowhere and what lies is found out when
//! it is read.

mod read;
mod write;

pub use read::Archive;
pub use write::{write_docker_tar, write_oci_tar};

use serde::{Deserialize, Serialize};

/// An item of docker's `manifest.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

#[cfg(test)]
mod tests;
