//! Writing: blobs pass through as they are read, verified; memory holds only documents.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use forge_snapshotter::image::{Reference, valid_tag};
use oci_spec::image::Descriptor;
use tokio::io::{AsyncWrite, AsyncWriteExt, BufReader};

use super::DockerImage;
use crate::blobs::{self, Manifests, digest_of};
use crate::copy::walk;
use crate::image::{self, Document};
use crate::layout::{self, Entry, blob_name};
use crate::{CHUNK, During, Error, Result};

const BLOCK: u64 = 512;

enum Member {
    Directory,
    Bytes(Bytes),
    Blob(Box<Descriptor>),
}

/// An OCI archive: a layout in a tar.
pub async fn write_oci_tar(
    from: &impl Manifests,
    images: &[Entry],
    out: &mut (impl AsyncWrite + Unpin + Send),
) -> Result<()> {
    write(from, images, None, out).await
}

/// What `docker load` of any version reads. Such an archive holds one platform of each image.
pub async fn write_docker_tar(
    from: &impl Manifests,
    images: &[Entry],
    out: &mut (impl AsyncWrite + Unpin + Send),
) -> Result<()> {
    write(from, images, Some(Vec::new()), out).await
}

async fn write(
    from: &impl Manifests,
    images: &[Entry],
    mut docker: Option<Vec<DockerImage>>,
    out: &mut (impl AsyncWrite + Unpin + Send),
) -> Result<()> {
    let mut members = BTreeMap::new();
    let mut index = layout::empty_index();
    let listings = index["manifests"].as_array_mut().expect("empty_index has an array");
    for image in images {
        let graph = walk(from, &image.descriptor).await?;
        if let Some(docker) = &mut docker {
            add_docker(docker, image, &graph.documents[0].1)?;
        }
        for (descriptor, bytes) in graph.documents {
            members.insert(blob_name(&digest_of(&descriptor)?), Member::Bytes(bytes));
        }
        for blob in graph.blobs {
            members.insert(blob_name(&digest_of(&blob)?), Member::Blob(Box::new(blob)));
        }
        match image.names.is_empty() {
            true => listings.push(layout::listing(&image.descriptor, None)),
            false => listings.extend(image.names.iter().map(|name| layout::listing(&image.descriptor, Some(name)))),
        }
    }
    members.insert("blobs/".to_owned(), Member::Directory);
    members.insert("blobs/sha256/".to_owned(), Member::Directory);
    members.insert("index.json".to_owned(), Member::Bytes(image::to_bytes(&index).into()));
    members.insert("oci-layout".to_owned(), Member::Bytes(layout::marker().into()));
    if let Some(docker) = docker {
        members.insert("manifest.json".to_owned(), Member::Bytes(image::to_bytes(&docker).into()));
    }
    for (name, member) in &members {
        write_member(from, name, member, out).await?;
    }
    out.write_all(&[0; 2 * BLOCK as usize]).await.during("write", "the archive")?;
    out.flush().await.during("write", "the archive")
}

fn add_docker(docker: &mut Vec<DockerImage>, image: &Entry, bytes: &[u8]) -> Result<()> {
    let manifest = match Document::parse(bytes, image.descriptor.digest())? {
        Document::Manifest(manifest) => manifest,
        Document::Index(_) => {
            let reason = "a docker archive holds one platform: choose one, or write an OCI archive (type=oci)";
            return Err(Error::Unsupported(reason.to_owned()));
        }
    };
    let layers: Result<Vec<String>> = manifest.layers().iter().map(|layer| Ok(blob_name(&digest_of(layer)?))).collect();
    let config = blob_name(&digest_of(manifest.config())?);
    // Docker reads back only names that have a tag, in the short form that it prints.
    let full = image.names.iter().filter(|name| !valid_tag(name)).filter_map(|name| name.parse::<Reference>().ok());
    let tags: Vec<String> = full.filter(|name| name.tag().is_some()).map(|name| name.familiar()).collect();
    docker.push(DockerImage { config, repo_tags: (!tags.is_empty()).then_some(tags), layers: Some(layers?) });
    Ok(())
}

async fn write_member(
    from: &impl Manifests,
    name: &str,
    member: &Member,
    out: &mut (impl AsyncWrite + Unpin + Send),
) -> Result<()> {
    let size = match member {
        Member::Directory => 0,
        Member::Bytes(bytes) => bytes.len() as u64,
        Member::Blob(blob) => blob.size(),
    };
    out.write_all(header(name, size)?.as_bytes()).await.during("write", name)?;
    match member {
        Member::Directory => {}
        Member::Bytes(bytes) => out.write_all(bytes).await.during("write", name)?,
        Member::Blob(blob) => {
            let data = blobs::verified(from.read(blob).await?, blob)?;
            let mut data = BufReader::with_capacity(CHUNK, data);
            tokio::io::copy_buf(&mut data, out).await.during("write", name)?;
        }
    }
    let padding = size.next_multiple_of(BLOCK) - size;
    out.write_all(&[0; BLOCK as usize][..padding as usize]).await.during("write", name)
}

fn header(name: &str, size: u64) -> Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    let directory = name.ends_with('/');
    header.set_path(Path::new(name)).during("name", name)?;
    header.set_entry_type(if directory { tar::EntryType::Directory } else { tar::EntryType::Regular });
    header.set_mode(if directory { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    Ok(header)
}
