//! An OCI image layout: a directory that is a small registry.
//!
//! ```text
//! oci-layout          {"imageLayoutVersion":"1.0.0"}; writers hold a lock on this file
//! index.json          what is in it: descriptors, named by annotations; replaced by rename
//! blobs/<algorithm>/<hex>
//! .blob-<random>      a blob in the making
//! ```
//! A layout may come from anybody: blob files are opened below its root and nowhere else, must be regular files, and
//! are believed when size and digest match. Entries of `index.json` that forge does not understand are kept as they are.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use forge_snapshotter::image::{Reference, valid_tag};
use forge_snapshotter::{Context, Digest};
use oci_spec::image::Descriptor;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde_json::{Value, json};
use tokio_util::io::SyncIoBridge;

use crate::blobs::{self, Abandon, BlobReader, Blobs, MANIFEST_LIMIT, Manifests, digest_of};
use crate::{CHUNK, During, Error, Result, blocking, image};

/// The tag of an entry, as OCI defines it; many tools write the full name here.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The full name of an entry, as containerd, BuildKit and docker write it.
pub const IMAGE_NAME: &str = "io.containerd.image.name";

const LAYOUT_VERSION: &str = "1.0.0";

/// One image of a layout or archive: what it is called there and what it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Full names or bare tags, as written; none for an image that has no name.
    pub names: Vec<String>,
    pub descriptor: Descriptor,
}

#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// A layout that exists.
    pub fn open(root: &Path) -> Result<Layout> {
        let layout = Layout { root: root.to_owned() };
        let marker = match layout.file("oci-layout") {
            Err(Error::NotFound { .. }) => {
                let hint = ": it has no file oci-layout".to_owned();
                return Err(Error::NotFound { what: format!("OCI layout {}", root.display()), hint });
            }
            file => layout.read_file(file?, "oci-layout")?,
        };
        check_marker(&marker, root.display())?;
        Ok(layout)
    }

    /// The layout at `root`, made if it is not there yet.
    pub fn create(root: &Path) -> Result<Layout> {
        fs::create_dir_all(root.join("blobs/sha256")).context("create layout", root)?;
        let layout = Layout { root: root.to_owned() };
        if !root.join("index.json").exists() {
            layout.replace("index.json", &image::to_bytes(&empty_index()))?;
        }
        if !root.join("oci-layout").exists() {
            layout.replace("oci-layout", &marker())?;
        }
        Layout::open(root)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What `index.json` lists, in its order.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let index = self.index()?;
        let what = || format!("{}/index.json", self.root.display());
        let items = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default();
        let descriptors = items.iter().map(|item| serde_json::from_value::<Descriptor>(item.clone()));
        let entries = descriptors.map(|item| item.map(entry).map_err(|error| Error::malformed(what(), error)));
        entries.collect()
    }

    /// Lists `root`, whose content is there, under `names` (full names or bare tags), which other entries lose.
    pub fn add(&self, root: &Descriptor, names: &[String]) -> Result<()> {
        let marker = File::open(self.root.join("oci-layout")).context("open", &self.root)?;
        marker.lock().context("lock", &self.root)?;
        let mut index = self.index()?;
        if !index["manifests"].is_array() {
            index["manifests"] = json!([]);
        }
        let items = index["manifests"].as_array_mut().expect("it is an array now");
        let digest = root.digest().to_string();
        let listed = |item: &Value| item["digest"] == digest.as_str();
        if names.is_empty() {
            if items.iter().any(listed) {
                return Ok(());
            }
            items.push(listing(root, None));
        }
        for name in names {
            let new = listing(root, Some(name));
            let replaced = |item: &Value| same_name(item, &new) || (listed(item) && is_nameless(item));
            items.retain(|item| !replaced(item));
            items.push(new);
        }
        self.replace("index.json", &image::to_bytes(&index))
    }

    fn find(&self, name: &str) -> Result<Descriptor> {
        find(&self.entries()?, name, self.root.display()).cloned()
    }

    fn index(&self) -> Result<Value> {
        let bytes = self.read_file(self.file("index.json")?, "index.json")?;
        let what = || format!("{}/index.json", self.root.display());
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| Error::malformed(what(), error))?;
        match value.is_object() {
            true => Ok(value),
            false => Err(Error::malformed(what(), "it is not an object")),
        }
    }

    fn file(&self, name: &str) -> Result<File> {
        open_beneath(&self.root, name)
    }

    fn read_file(&self, file: File, name: &str) -> Result<Vec<u8>> {
        read_limited(file, MANIFEST_LIMIT, &format!("{}/{name}", self.root.display()))
    }

    /// Writes beside and renames, so that a reader sees the old or the new file, whole.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.temporary()?;
        file.write_all(bytes).context("write", &self.root.join(name))?;
        self.persist(file, name)
    }

    fn temporary(&self) -> Result<tempfile::NamedTempFile> {
        let mut builder = tempfile::Builder::new();
        let mode = fs::Permissions::from_mode(0o644);
        Ok(builder
            .prefix(".blob-")
            .permissions(mode)
            .tempfile_in(&self.root)
            .context("create a file in", &self.root)?)
    }

    fn persist(&self, file: tempfile::NamedTempFile, name: &str) -> Result<()> {
        let path = self.root.join(name);
        file.persist(&path).map_err(|error| error.error).context("rename to", &path)?;
        Ok(())
    }

    fn open_blob(&self, digest: &Digest) -> Result<(File, u64)> {
        let file = self.file(&blob_name(digest))?;
        let size = file.metadata().context("look at", &self.root)?.len();
        Ok((file, size))
    }

    fn write_blob(&self, digest: &Digest, data: impl Read) -> Result<()> {
        let mut file = self.temporary()?;
        io::copy(&mut BufReader::with_capacity(CHUNK, data), &mut file)
            .during("write", format!("blob {digest} to {}", self.root.display()))?;
        let directory = self.root.join("blobs").join(digest.algorithm());
        fs::create_dir_all(&directory).context("create", &directory)?;
        self.persist(file, &blob_name(digest))
    }
}

pub(crate) fn marker() -> Vec<u8> {
    image::to_bytes(&json!({ "imageLayoutVersion": LAYOUT_VERSION }))
}

pub(crate) fn empty_index() -> Value {
    json!({ "schemaVersion": 2, "mediaType": image::OCI_INDEX, "manifests": [] })
}

pub(crate) fn check_marker(bytes: &[u8], place: impl std::fmt::Display) -> Result<()> {
    let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
    match value["imageLayoutVersion"].as_str() {
        Some(LAYOUT_VERSION) => Ok(()),
        Some(version) => Err(Error::Unsupported(format!("{place} is an OCI layout of version {version:?}"))),
        None => Err(Error::malformed(format!("{place}/oci-layout"), "it names no version")),
    }
}

/// `root` as an item of `index.json`.
pub(crate) fn listing(root: &Descriptor, name: Option<&String>) -> Value {
    let mut root = root.clone();
    let mut annotations = root.annotations().clone().unwrap_or_default();
    annotations.retain(|key, _| key != REF_NAME && key != IMAGE_NAME);
    if let Some(name) = name {
        match name.parse::<Reference>() {
            Ok(reference) if !valid_tag(name) => {
                annotations.insert(IMAGE_NAME.into(), reference.to_string());
                annotations.insert(REF_NAME.into(), reference.tag().unwrap_or(name).to_owned());
            }
            _ => {
                annotations.insert(REF_NAME.into(), name.clone());
            }
        }
    }
    root.set_annotations((!annotations.is_empty()).then_some(annotations));
    serde_json::to_value(&root).expect("descriptors have string keys")
}

/// The entry that an item of `index.json` is.
pub(crate) fn entry(descriptor: Descriptor) -> Entry {
    let annotation = |key| descriptor.annotations().as_ref().and_then(|all| all.get(key)).cloned();
    let names = annotation(IMAGE_NAME).or_else(|| annotation(REF_NAME)).into_iter().collect();
    Entry { names, descriptor }
}

fn is_nameless(item: &Value) -> bool {
    let annotations = &item["annotations"];
    annotations[REF_NAME].is_null() && annotations[IMAGE_NAME].is_null()
}

fn same_name(old: &Value, new: &Value) -> bool {
    let (old, new) = (&old["annotations"], &new["annotations"]);
    match (&old[IMAGE_NAME], &new[IMAGE_NAME]) {
        (Value::Null, Value::Null) => !new[REF_NAME].is_null() && old[REF_NAME] == new[REF_NAME],
        (old, new) => old == new,
    }
}

/// The entry called `name`: a digest, a full name, a tag, or nothing where there is one entry.
pub(crate) fn find<'a>(entries: &'a [Entry], name: &str, place: impl std::fmt::Display) -> Result<&'a Descriptor> {
    let full = name.parse::<Reference>().ok().map(|reference| reference.to_string());
    let called = |entry: &&Entry| {
        entry.descriptor.digest().as_ref() == name
            || entry.names.iter().any(|given| {
                let reference = given.parse::<Reference>().ok().filter(|_| !valid_tag(given));
                let tag = reference.as_ref().and_then(Reference::tag);
                given == name
                    || tag == Some(name)
                    || (reference.is_some() && reference.as_ref().map(Reference::to_string) == full)
            })
    };
    let found = match name.is_empty() {
        true if entries.len() == 1 => entries.first(),
        true => None,
        false => entries.iter().find(called),
    };
    found.map(|entry| &entry.descriptor).ok_or_else(|| {
        let names: Vec<&str> = entries.iter().flat_map(|entry| &entry.names).map(String::as_str).take(20).collect();
        let there = if names.is_empty() { "no named image".to_owned() } else { names.join(", ") };
        let what = if name.is_empty() { "the only image".to_owned() } else { format!("image {name:?}") };
        Error::NotFound { what: format!("{what} in {place}"), hint: format!("; there is {there}") }
    })
}

pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// Opens a regular file below `root`; no link leads out of it, no device or pipe is waited for.
fn open_beneath(root: &Path, name: &str) -> Result<File> {
    let what = || format!("{}/{name}", root.display());
    let flags = OFlags::CLOEXEC | OFlags::DIRECTORY;
    let directory = rustix::fs::open(root, flags | OFlags::RDONLY, Mode::empty()).context("open", root)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let file = match rustix::fs::openat2(&directory, name, flags, Mode::empty(), resolve) {
        Err(rustix::io::Errno::NOENT) => return Err(Error::not_found(what())),
        file => File::from(file.map_err(io::Error::from).during("open", what())?),
    };
    match file.metadata().during("look at", what())?.is_file() {
        true => Ok(file),
        false => Err(Error::malformed(what(), "it is not a regular file")),
    }
}

pub(crate) fn read_limited(from: impl Read, limit: u64, what: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(limit + 1).read_to_end(&mut bytes).during("read", what)?;
    match bytes.len() as u64 > limit {
        true => Err(Error::TooLarge { what: what.to_owned(), limit }),
        false => Ok(bytes),
    }
}

/// The bytes of a manifest that was found under `expected`.
pub(crate) fn checked_document(bytes: Vec<u8>, expected: &Digest) -> Result<(Descriptor, Bytes)> {
    let found = image::describe_document(&bytes)?;
    if found.digest().as_ref() != expected.as_str() {
        let (expected, found) = (expected.to_string(), found.digest().to_string());
        return Err(Error::Mismatch { what: format!("manifest {expected}"), expected, found });
    }
    Ok((found, bytes.into()))
}

impl Blobs for Layout {
    async fn has(&self, blob: &Descriptor) -> Result<bool> {
        match self.open_blob(&digest_of(blob)?) {
            Ok((_, size)) => Ok(size == blob.size()),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn read(&self, blob: &Descriptor) -> Result<BlobReader> {
        let (file, _) = self.open_blob(&digest_of(blob)?)?;
        blobs::verified(Box::new(tokio::fs::File::from_std(file)), blob)
    }

    async fn write(&self, blob: &Descriptor, data: BlobReader) -> Result<()> {
        let digest = digest_of(blob)?;
        let (_abandon, registration) = Abandon::new();
        let data = SyncIoBridge::new(blobs::abandonable(blobs::verified(data, blob)?, registration));
        let layout = self.clone();
        blocking(move || layout.write_blob(&digest, data)).await
    }
}

impl Manifests for Layout {
    async fn resolve(&self, name: &str) -> Result<Descriptor> {
        match name.parse::<Digest>() {
            Ok(_) => Ok(self.manifest(name).await?.0),
            Err(_) => self.find(name),
        }
    }

    async fn manifest(&self, name: &str) -> Result<(Descriptor, Bytes)> {
        let digest = match name.parse() {
            Ok(digest) => digest,
            Err(_) => digest_of(&self.find(name)?)?,
        };
        let (file, _) = self.open_blob(&digest)?;
        checked_document(self.read_file(file, digest.as_str())?, &digest)
    }

    /// Without a tag the document is stored but not listed; [`Layout::add`] lists it.
    async fn put_manifest(&self, tag: Option<&str>, media_type: &str, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let descriptor = blobs::describe(media_type, &digest, bytes.len() as u64);
        if !self.has(&descriptor).await? {
            self.write_blob(&digest, bytes)?;
        }
        if let Some(tag) = tag {
            self.add(&descriptor, &[tag.to_owned()])?;
        }
        Ok(digest)
    }
}

#[cfg(test)]
mod tests;
