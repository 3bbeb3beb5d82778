//! Reading: where members lie in the tar, and what images they make.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use forge_snapshotter::image::{ImageConfig, Reference, valid_tag};
use forge_snapshotter::{Context as _, Digest, layer};
use oci_spec::image::{Descriptor, ImageManifest};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::task::JoinHandle;

use super::DockerImage;
use crate::blobs::{self, BlobReader, Blobs, CONFIG_LIMIT, MANIFEST_LIMIT, Manifests, digest_of};
use crate::image::{self, Compression, Document, MediaTypes};
use crate::layout::{self, Entry};
use crate::{CHUNK, During, Error, Result};

/// Members of one archive: a hundred images of a hundred layers have a few ten thousand.
const MEMBERS_LIMIT: usize = 200_000;
/// Symbolic links that one layer may be away.
const LINKS_LIMIT: usize = 8;

/// An archive whose bytes can be asked for in any order.
pub struct Archive {
    name: String,
    file: Arc<File>,
    members: HashMap<String, Member>,
    /// Where the bytes of a digest are said to be; they are checked when they are read.
    blobs: HashMap<Digest, Source>,
    entries: Vec<Entry>,
}

enum Member {
    Span(Span),
    Link(String),
}

#[derive(Clone, Copy)]
struct Span {
    start: u64,
    end: u64,
}

#[derive(Clone)]
enum Source {
    Span(Span),
    Memory(Bytes),
}

impl Archive {
    /// An archive in a file. It is read in place unless it is compressed or a pipe; then it is spooled below `spool`.
    pub fn open(path: &Path, spool: &Path) -> Result<Archive> {
        let mut file = File::open(path).context("open", path)?;
        let metadata = file.metadata().context("look at", path)?;
        if metadata.is_dir() {
            return Err(Error::Unsupported(format!("{} is a directory, not an archive", path.display())));
        }
        let mut magic = [0; 6];
        if metadata.is_file() {
            let read = read_up_to(&mut file, &mut magic).context("read", path)?;
            file.rewind().context("read", path)?;
            if compression(&magic[..read]).is_none() {
                return Archive::index(path.display().to_string(), file);
            }
        }
        Archive::read(path.display().to_string(), file, spool)
    }

    /// An archive from a stream, compressed or not, which goes to an unnamed file below `spool`.
    pub fn read(name: String, input: impl Read + Send, spool: &Path) -> Result<Archive> {
        let mut file = tempfile::tempfile_in(spool).context("create a file in", spool)?;
        let mut input = layer::decoder(input)?;
        io::copy(&mut input, &mut file).during("read", &name)?;
        Archive::index(name, file)
    }

    /// The images in it. One name is in at most one entry.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn index(name: String, file: File) -> Result<Archive> {
        let members = members(&file).map_err(|error| Error::malformed(format!("archive {name}"), error))?;
        let (blobs, entries) = (HashMap::new(), Vec::new());
        let mut archive = Archive { name, file: Arc::new(file), members, blobs, entries };
        for (name, member) in &archive.members {
            if let (Some(digest), Member::Span(span)) = (blob_digest(name), member) {
                archive.blobs.insert(digest, Source::Span(*span));
            }
        }
        let oci = archive.member("index.json", MANIFEST_LIMIT)?;
        let docker = archive.member("manifest.json", MANIFEST_LIMIT)?;
        if oci.is_none() && docker.is_none() {
            let reason = "it is no image archive: it has neither index.json nor manifest.json";
            return Err(archive.malformed(reason));
        }
        if let Some(bytes) = oci {
            archive.add_oci(&bytes)?;
        }
        if let Some(bytes) = docker {
            archive.add_docker(&bytes)?;
        }
        Ok(archive)
    }

    fn malformed(&self, reason: impl ToString) -> Error {
        Error::malformed(format!("archive {}", self.name), reason)
    }

    fn add_oci(&mut self, index: &[u8]) -> Result<()> {
        if let Some(marker) = self.member("oci-layout", MANIFEST_LIMIT)? {
            layout::check_marker(&marker, &self.name)?;
        }
        let index: Value = serde_json::from_slice(index).map_err(|error| self.malformed(error))?;
        for item in index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let descriptor: Descriptor = serde_json::from_value(item.clone()).map_err(|error| self.malformed(error))?;
            let mut entry = layout::entry(descriptor);
            entry.names.iter_mut().for_each(|name| *name = canonical(name));
            match self.entries.iter_mut().find(|old| old.descriptor.digest() == entry.descriptor.digest()) {
                Some(old) => add_names(old, entry.names),
                None => self.entries.push(entry),
            }
        }
        Ok(())
    }

    /// Joins docker's list with what `index.json` gave: the same image once, with the names of both. Where the OCI
    /// manifest is not whole (docker 25.0 wrote some without layers) docker's list is right.
    fn add_docker(&mut self, list: &[u8]) -> Result<()> {
        let images: Vec<DockerImage> = serde_json::from_slice(list).map_err(|error| self.malformed(error))?;
        for image in images {
            let names: Vec<String> = image.repo_tags.iter().flatten().map(|name| canonical(name)).collect();
            let config = self.linked(&image.config)?;
            let config = (Digest::of(self.bytes(config, CONFIG_LIMIT, &image.config)?), config);
            let layers = image.layers.as_deref().unwrap_or_default();
            let twin = self.entries.iter().position(|entry| {
                let mut manifests = self.manifests(entry).into_iter();
                manifests.any(|manifest| is_config(&manifest, &config.0) && manifest.layers().len() == layers.len())
            });
            if let Some(twin) = twin {
                let entry = &mut self.entries[twin];
                // Beside a full name its bare tag says nothing.
                entry.names.retain(|name| names.is_empty() || !valid_tag(name));
                add_names(entry, names);
                continue;
            }
            let digest = config.0.clone();
            let descriptor = self.compose(config, layers)?;
            let mut entries = std::mem::take(&mut self.entries);
            entries.retain(|entry| !self.is_broken_form_of(entry, &digest));
            entries.push(Entry { names, descriptor });
            self.entries = entries;
        }
        Ok(())
    }

    /// Writes, in memory, the manifest that an image of the old form lacks.
    fn compose(&mut self, config: (Digest, Span), layers: &[String]) -> Result<Descriptor> {
        let (digest, span) = config;
        let bytes = self.bytes(span, CONFIG_LIMIT, digest.as_str())?;
        let parsed: ImageConfig = serde_json::from_slice(&bytes).map_err(|error| self.malformed(error))?;
        let diff_ids = &parsed.rootfs.diff_ids;
        if diff_ids.len() != layers.len() {
            let (named, listed) = (diff_ids.len(), layers.len());
            return Err(self.malformed(format!("config {digest} names {named} layers but {listed} are listed")));
        }
        let layers: Result<Vec<Descriptor>> =
            layers.iter().zip(diff_ids).map(|(name, diff_id)| self.layer(name, diff_id)).collect();
        self.blobs.insert(digest.clone(), Source::Memory(bytes.clone().into()));
        let manifest = image::to_bytes(&json!({
            "schemaVersion": 2,
            "mediaType": image::OCI_MANIFEST,
            "config": blobs::describe(image::OCI_CONFIG, &digest, bytes.len() as u64),
            "layers": layers?,
        }));
        let descriptor = image::describe_document(&manifest)?;
        self.blobs.insert(digest_of(&descriptor)?, Source::Memory(manifest.into()));
        Ok(descriptor)
    }

    fn layer(&mut self, name: &str, diff_id: &Digest) -> Result<Descriptor> {
        let span = self.linked(name)?;
        let mut magic = [0; 6];
        let read = read_up_to(&mut self.section(span), &mut magic).during("read", name)?;
        let form = match compression(&magic[..read]) {
            None => Compression::None,
            Some("gzip") => Compression::GZIP,
            Some("zstd") => Compression::ZSTD,
            Some(other) => return Err(Error::Unsupported(format!("layer {name} is compressed with {other}"))),
        };
        let digest = match (blob_digest(&clean(name).unwrap_or_default()), form) {
            (Some(digest), _) => digest,
            (None, Compression::None) => diff_id.clone(),
            (None, _) => Digest::of_reader(self.section(span)).during("read", name)?.0,
        };
        self.blobs.insert(digest.clone(), Source::Span(span));
        Ok(blobs::describe(form.media_type(MediaTypes::Oci), &digest, span.end - span.start))
    }

    /// Whether an entry of `index.json` is the image of this config, but not whole, or nothing at all.
    fn is_broken_form_of(&self, entry: &Entry, config: &Digest) -> bool {
        !image::is_index(entry.descriptor.media_type().as_ref())
            && self.manifests(entry).iter().all(|manifest| is_config(manifest, config))
    }

    /// The image manifests that an entry is or names, as far as they are in the archive and can be read.
    fn manifests(&self, entry: &Entry) -> Vec<ImageManifest> {
        let read = |descriptor: &Descriptor| {
            let (_, bytes) = self.document(&digest_of(descriptor).ok()?).ok()?;
            Document::parse(&bytes, descriptor.digest()).ok()
        };
        match read(&entry.descriptor) {
            Some(Document::Manifest(manifest)) => vec![*manifest],
            Some(Document::Index(index)) => {
                let images = index.manifests().iter().filter(|entry| image::is_image(entry));
                let manifests = images.filter_map(|entry| match read(entry)? {
                    Document::Manifest(manifest) => Some(*manifest),
                    Document::Index(_) => None,
                });
                manifests.collect()
            }
            None => Vec::new(),
        }
    }

    fn document(&self, digest: &Digest) -> Result<(Descriptor, Bytes)> {
        let bytes = match self.blobs.get(digest) {
            None => return Err(Error::not_found(format!("manifest {digest} in archive {}", self.name))),
            Some(Source::Memory(bytes)) => bytes.to_vec(),
            Some(Source::Span(span)) => self.bytes(*span, MANIFEST_LIMIT, digest.as_str())?,
        };
        layout::checked_document(bytes, digest)
    }

    pub(super) fn member(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        match self.members.contains_key(name) {
            true => Ok(Some(self.bytes(self.linked(name)?, limit, name)?)),
            false => Ok(None),
        }
    }

    /// The bytes of a member, through symbolic links within the archive.
    fn linked(&self, name: &str) -> Result<Span> {
        let mut place = clean(name);
        for _ in 0..=LINKS_LIMIT {
            match place.as_ref().and_then(|name| self.members.get(name)) {
                None => break,
                Some(Member::Span(span)) => return Ok(*span),
                Some(Member::Link(target)) => place = Some(target.clone()),
            }
        }
        Err(self.malformed(format!("it names {name:?} but does not hold it")))
    }

    fn section(&self, span: Span) -> Section {
        Section { file: Arc::clone(&self.file), at: span.start, end: span.end }
    }

    fn bytes(&self, span: Span, limit: u64, name: &str) -> Result<Vec<u8>> {
        layout::read_limited(self.section(span), limit, &format!("{name} in archive {}", self.name))
    }
}

fn is_config(manifest: &ImageManifest, digest: &Digest) -> bool {
    manifest.config().digest().as_ref() == digest.as_str()
}

fn add_names(entry: &mut Entry, names: Vec<String>) {
    for name in names {
        if !entry.names.contains(&name) {
            entry.names.push(name);
        }
    }
}

/// A full name in its canonical form; a bare tag as it is.
fn canonical(name: &str) -> String {
    match name.parse::<Reference>() {
        Ok(reference) if !valid_tag(name) => reference.to_string(),
        _ => name.to_owned(),
    }
}

fn blob_digest(name: &str) -> Option<Digest> {
    let (algorithm, hex) = name.strip_prefix("blobs/")?.split_once('/')?;
    format!("{algorithm}:{hex}").parse().ok()
}

/// A member's name without `.` and `..`; `None` if it leaves the archive.
fn clean(name: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn members(file: &File) -> io::Result<HashMap<String, Member>> {
    let length = file.metadata()?.len();
    let mut reader = file;
    reader.seek(SeekFrom::Start(0))?;
    let mut members = HashMap::new();
    for entry in tar::Archive::new(reader).entries_with_seek()? {
        let entry = entry?;
        let Ok(name) = String::from_utf8(entry.path_bytes().into_owned()) else { continue };
        let Some(name) = clean(&name) else { continue };
        let kind = entry.header().entry_type();
        if kind.is_file() {
            let start = entry.raw_file_position();
            let end = start.checked_add(entry.size()).filter(|end| *end <= length);
            let end = end.ok_or_else(|| io::Error::other(format!("it ends within {name}")))?;
            members.insert(name, Member::Span(Span { start, end }));
        } else if kind.is_symlink() || kind.is_hard_link() {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            let Ok(target) = String::from_utf8(target) else { continue };
            let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
            let target = if kind.is_symlink() { format!("{parent}/{target}") } else { target };
            if let Some(target) = clean(&target) {
                members.insert(name, Member::Link(target));
            }
        }
        if members.len() > MEMBERS_LIMIT {
            return Err(io::Error::other(format!("it has more than {MEMBERS_LIMIT} members")));
        }
    }
    Ok(members)
}

fn compression(magic: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 4] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (b"BZh", "bzip2"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
    ];
    known.iter().find(|(start, _)| magic.starts_with(start)).map(|(_, name)| *name)
}

fn read_up_to(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

/// Part of a file that others read at the same time.
struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..left], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// A [`Section`] read by chunks on the blocking pool.
struct AsyncSection {
    section: Option<Section>,
    chunk: io::Cursor<Vec<u8>>,
    reading: Option<JoinHandle<io::Result<Chunk>>>,
}

/// Bytes, and where to go on.
type Chunk = (Section, Vec<u8>);

impl AsyncRead for AsyncSection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if let Some(reading) = &mut this.reading {
                let (section, chunk) = ready!(Pin::new(reading).poll(context)).map_err(io::Error::other)??;
                this.reading = None;
                if chunk.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                (this.section, this.chunk) = (Some(section), io::Cursor::new(chunk));
            }
            let start = this.chunk.position() as usize;
            let left = &this.chunk.get_ref()[start..];
            if !left.is_empty() {
                let take = left.len().min(buffer.remaining());
                buffer.put_slice(&left[..take]);
                this.chunk.set_position((start + take) as u64);
                return Poll::Ready(Ok(()));
            }
            let Some(mut section) = this.section.take() else { return Poll::Ready(Ok(())) };
            let mut chunk = std::mem::take(&mut this.chunk).into_inner();
            this.reading = Some(tokio::task::spawn_blocking(move || {
                chunk.resize(CHUNK, 0);
                let read = section.read(&mut chunk)?;
                chunk.truncate(read);
                Ok((section, chunk))
            }));
        }
    }
}

impl Blobs for Archive {
    async fn has(&self, blob: &Descriptor) -> Result<bool> {
        let size = match self.blobs.get(&digest_of(blob)?) {
            None => return Ok(false),
            Some(Source::Memory(bytes)) => bytes.len() as u64,
            Some(Source::Span(span)) => span.end - span.start,
        };
        Ok(size == blob.size())
    }

    async fn read(&self, blob: &Descriptor) -> Result<BlobReader> {
        let reader: BlobReader = match self.blobs.get(&digest_of(blob)?) {
            None => return Err(Error::not_found(format!("blob {} in archive {}", blob.digest(), self.name))),
            Some(Source::Memory(bytes)) => Box::new(io::Cursor::new(bytes.clone())),
            Some(Source::Span(span)) => {
                let (section, chunk) = (Some(self.section(*span)), io::Cursor::default());
                Box::new(AsyncSection { section, chunk, reading: None })
            }
        };
        blobs::verified(reader, blob)
    }

    async fn write(&self, _: &Descriptor, _: BlobReader) -> Result<()> {
        Err(Error::Unsupported(format!("archive {} is only read", self.name)))
    }
}

impl Manifests for Archive {
    async fn resolve(&self, name: &str) -> Result<Descriptor> {
        match name.parse() {
            Ok(digest) => Ok(self.document(&digest)?.0),
            Err(_) => layout::find(&self.entries, name, &self.name).cloned(),
        }
    }

    async fn manifest(&self, name: &str) -> Result<(Descriptor, Bytes)> {
        let descriptor = self.resolve(name).await?;
        self.document(&digest_of(&descriptor)?)
    }

    async fn put_manifest(&self, _: Option<&str>, _: &str, _: &[u8]) -> Result<Digest> {
        Err(Error::Unsupported(format!("archive {} is only read", self.name)))
    }
}
