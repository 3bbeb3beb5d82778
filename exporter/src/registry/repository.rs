//! One repository: manifests, tags and blobs.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use forge_snapshotter::Digest;
use forge_snapshotter::image::valid_tag;
use oci_spec::image::{Descriptor, MediaType};
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, LINK};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use url::Url;

use super::auth::Access;
use super::endpoint::Endpoint;
use super::error::Error;
use super::host::resolve_location;
use super::payload::{Payload, Spool};
use super::retry::backoff;
use super::transport::{Lane, Request, failure, read_capped};
use super::{download, upload};
use crate::blobs::{BlobReader, Blobs, Origin, digest_of};
use crate::{Result, registry};

const MANIFEST_READ_MAX: usize = 8 << 20;
/// distribution-spec: registries should accept manifests of this size; few accept more.
const MANIFEST_WRITE_MAX: usize = 4 << 20;
const TAGS_PAGE_MAX: usize = 4 << 20;
const TAGS_PAGES_MAX: usize = 1000;
/// A registry may take a moment to see a blob that it has just accepted.
const UNKNOWN_BLOB_TRIES: u32 = 3;
/// Readers up to this size are held in memory; larger ones are spooled to a file while they are sent.
const IN_MEMORY_MAX: u64 = 4 << 20;

const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Clones are the same repository.
#[derive(Clone)]
pub struct Repository(Arc<Inner>);

struct Inner {
    endpoint: Arc<Endpoint>,
    name: String,
    /// Blobs that are known to be there: not asked for and not sent again.
    known: Mutex<HashSet<String>>,
    /// Uploads that a refused mount has opened, by digest.
    opened: Mutex<HashMap<String, Url>>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Repository({})", self.0.name)
    }
}

/// What tells one kind of manifest from another.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

impl Repository {
    pub(super) fn new(endpoint: Arc<Endpoint>, name: &str) -> Repository {
        let name = name.to_owned();
        Repository(Arc::new(Inner { endpoint, name, known: Mutex::default(), opened: Mutex::default() }))
    }

    /// The host, as the name had it.
    pub fn registry(&self) -> &str {
        self.endpoint().registry()
    }

    /// The path within the registry.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What a tag or digest stands for, without its bytes. HEAD where the registry answers it as it should: it does not
    /// count against the pull limits of those that have one.
    pub async fn resolve(&self, tag_or_digest: &str) -> Result<Descriptor> {
        let url = self.manifest_url(tag_or_digest).await?;
        let response = self.send(manifest_request(Method::HEAD, url), &self.pull()).await?;
        if response.status().is_success()
            && let Some(found) = described(response.headers(), tag_or_digest.parse().ok())
        {
            return Ok(found);
        }
        // An answer to HEAD has no body, so a failure cannot say why: GET can.
        Ok(self.manifest(tag_or_digest).await?.0)
    }

    /// The bytes of a manifest or index. Its digest is computed here; what the registry claims is not looked at.
    pub async fn manifest(&self, tag_or_digest: &str) -> Result<(Descriptor, Bytes)> {
        let url = self.manifest_url(tag_or_digest).await?;
        let response = self.send(manifest_request(Method::GET, url.clone()), &self.pull()).await?;
        if !response.status().is_success() {
            return Err(failure(&Method::GET, response).await);
        }
        let content_type = media_type_of(response.headers());
        let bytes = read_capped(&Method::GET, response, MANIFEST_READ_MAX).await?;
        let refused = |reason: String| Error::refused(&Method::GET, &url, reason);
        let digest = match tag_or_digest.parse::<Digest>() {
            Ok(digest) => {
                download::check(&digest, &bytes).map_err(refused)?;
                digest
            }
            Err(_) => Digest::of(&bytes),
        };
        let media_type = manifest_type(&bytes, content_type).map_err(refused)?;
        Ok((descriptor(&media_type, bytes.len() as u64, &digest), bytes))
    }

    /// Stores a manifest by tag, or by its digest alone.
    pub async fn put_manifest(&self, tag: Option<&str>, media_type: &str, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let url = self.manifest_url(tag.unwrap_or(digest.as_str())).await?;
        let refused = |reason: &str| Error::refused(&Method::PUT, &url, reason);
        if bytes.len() > MANIFEST_WRITE_MAX {
            return Err(refused("the manifest is larger than 4 MiB, which registries do not take").into());
        }
        let media_type = HeaderValue::from_str(media_type).map_err(|_| refused("malformed media type"))?;
        let bytes = Bytes::copy_from_slice(bytes);
        for attempt in 0.. {
            let request = Request::new(Method::PUT, url.clone(), Lane::Metadata)
                .header(CONTENT_TYPE, media_type.clone())
                .with_payload(Payload::Bytes(bytes.clone()));
            let response = self.send(request, &self.push()).await?;
            if matches!(response.status().as_u16(), 200..=202 | 204) {
                break;
            }
            let failed = failure(&Method::PUT, response).await;
            let crate::Error::Registry(error) = &failed else { return Err(failed) };
            let unknown_blob = error.says(&["manifest_blob_unknown", "blob unknown", "unknown blob"]);
            if unknown_blob && attempt + 1 < UNKNOWN_BLOB_TRIES {
                tokio::time::sleep(backoff(attempt)).await;
                continue;
            }
            lock(&self.0.known).clear();
            match tag {
                // Registries with immutable tags refuse even what is there already.
                Some(tag) if may_be_immutable(error) && self.holds(tag, &digest).await => break,
                _ => return Err(failed),
            }
        }
        Ok(digest)
    }

    async fn holds(&self, tag: &str, digest: &Digest) -> bool {
        matches!(self.resolve(tag).await, Ok(found) if found.digest().to_string() == digest.as_str())
    }

    /// Lets the registry take a blob from another repository of its own. False, whatever the reason, means: upload it.
    pub async fn mount(&self, blob: &Descriptor, from_repository: &str) -> Result<bool> {
        let digest = digest_of(blob)?;
        if self.knows(&digest) {
            return Ok(true);
        }
        let mut url = self.0.endpoint.url(self.name(), "blobs/uploads/").await?;
        url.query_pairs_mut().append_pair("mount", digest.as_str()).append_pair("from", from_repository);
        let request = Request::new(Method::POST, url, Lane::Metadata).once();
        let Ok(response) = self.send(request, &Access::mount(self.name(), from_repository)).await else {
            return Ok(false);
        };
        match response.status() {
            StatusCode::CREATED => self.remember(&digest),
            StatusCode::ACCEPTED => {
                if let Ok(location) = upload::location(&response) {
                    lock(&self.0.opened).insert(digest.to_string(), location);
                }
            }
            _ => {}
        }
        Ok(self.knows(&digest))
    }

    /// Every tag, in the registry's order.
    pub async fn tags(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let mut tags = Vec::new();
        let mut url = self.0.endpoint.url(self.name(), "tags/list?n=1000").await?;
        for _ in 0..TAGS_PAGES_MAX {
            let response = self.send(Request::new(Method::GET, url.clone(), Lane::Metadata), &self.pull()).await?;
            if !response.status().is_success() {
                return Err(failure(&Method::GET, response).await);
            }
            let next = next_page(&url, response.headers());
            let body = read_capped(&Method::GET, response, TAGS_PAGE_MAX).await?;
            let page: Page = serde_json::from_slice(&body)
                .map_err(|_| Error::refused(&Method::GET, &url, "the answer is not a list of tags"))?;
            tags.extend(page.tags.unwrap_or_default());
            match next {
                Some(next) if next != url => url = next,
                _ => return Ok(tags),
            }
        }
        Err(Error::refused(&Method::GET, &url, format!("more than {TAGS_PAGES_MAX} pages of tags")).into())
    }

    /// Deletes a manifest, and with it the tags that point to it.
    pub async fn delete(&self, digest: &Digest) -> Result<()> {
        let url = self.manifest_url(digest.as_str()).await?;
        let request = Request::new(Method::DELETE, url, Lane::Metadata);
        let response = self.send(request, &Access::delete(self.name())).await?;
        match response.status().as_u16() {
            200 | 202 | 204 => Ok(()),
            405 => Err(match failure(&Method::DELETE, response).await {
                crate::Error::Registry(error) => {
                    error.with_hint("the registry does not allow deletion: enable it there").into()
                }
                other => other,
            }),
            _ => Err(failure(&Method::DELETE, response).await),
        }
    }

    /// Uploads a blob from a file: what a retry needs is read again from there.
    pub async fn write_file(&self, blob: &Descriptor, path: &Path) -> Result<()> {
        let payload = Payload::File { path: Arc::new(path.to_owned()), offset: 0, length: blob.size() };
        self.upload(blob, payload).await
    }

    /// Uploads a blob from memory.
    pub async fn write_bytes(&self, blob: &Descriptor, bytes: Bytes) -> Result<()> {
        self.upload(blob, Payload::Bytes(bytes)).await
    }

    async fn upload(&self, blob: &Descriptor, payload: Payload) -> Result<()> {
        let digest = digest_of(blob)?;
        if self.knows(&digest) {
            return Ok(());
        }
        let opened = lock(&self.0.opened).remove(digest.as_str());
        upload::upload(self, &digest, &payload, opened).await?;
        self.remember(&digest);
        Ok(())
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.0.endpoint
    }

    pub(super) fn pull(&self) -> Access {
        Access::pull(self.name())
    }

    pub(super) fn push(&self) -> Access {
        Access::push(self.name())
    }

    pub(super) async fn send(&self, request: Request, access: &Access) -> Result<Response> {
        self.0.endpoint.send(request, access).await
    }

    async fn manifest_url(&self, tag_or_digest: &str) -> Result<Url> {
        if !valid_tag(tag_or_digest) && tag_or_digest.parse::<Digest>().is_err() {
            let base = self.0.endpoint.base().await?;
            return Err(
                Error::refused(&Method::GET, base, format!("{tag_or_digest:?} is neither a tag nor a digest")).into()
            );
        }
        self.0.endpoint.url(self.name(), &format!("manifests/{tag_or_digest}")).await
    }

    pub(super) async fn blob_url(&self, digest: &Digest) -> Result<Url> {
        self.0.endpoint.url(self.name(), &format!("blobs/{digest}")).await
    }

    fn knows(&self, digest: &Digest) -> bool {
        lock(&self.0.known).contains(digest.as_str())
    }

    fn remember(&self, digest: &Digest) {
        lock(&self.0.known).insert(digest.to_string());
    }
}

impl Blobs for Repository {
    async fn write_file(&self, blob: &Descriptor, path: &Path) -> Result<()> {
        Repository::write_file(self, blob, path).await
    }

    /// Whatever is read here can be mounted from here.
    fn origins(&self, _: &Descriptor) -> Result<Vec<Origin>> {
        Ok(vec![Origin { registry: self.registry().to_owned(), repository: self.name().to_owned() }])
    }

    /// A registry that will not say counts as one that has not: the upload, or the read, will tell why.
    async fn has(&self, blob: &Descriptor) -> Result<bool> {
        let digest = digest_of(blob)?;
        if self.knows(&digest) {
            return Ok(true);
        }
        let request = Request::new(Method::HEAD, self.blob_url(&digest).await?, Lane::Metadata);
        let found = self.send(request, &self.pull()).await?.status().is_success();
        if found {
            self.remember(&digest);
        }
        Ok(found)
    }

    /// Takes one of the host's transfer slots until the reader has ended or is dropped.
    async fn read(&self, blob: &Descriptor) -> Result<BlobReader> {
        download::open(self.clone(), blob).await
    }

    /// Does not ask first whether the blob is there; see [`Blobs::has`]. A reader can be read once, so what has been sent is
    /// kept until the registry has accepted it; [`Repository::write_file`] needs no second copy.
    async fn write(&self, blob: &Descriptor, mut data: BlobReader) -> Result<()> {
        if self.knows(&digest_of(blob)?) {
            return Ok(());
        }
        if blob.size() > IN_MEMORY_MAX {
            let spool = Arc::new(Spool::new(data).map_err(crate::Error::Body)?);
            return self.upload(blob, Payload::Spool { spool, offset: 0, length: blob.size() }).await;
        }
        let mut bytes = Vec::with_capacity(blob.size() as usize);
        let mut limited = tokio::io::AsyncReadExt::take(&mut data, blob.size() + 1);
        tokio::io::AsyncReadExt::read_to_end(&mut limited, &mut bytes).await.map_err(crate::Error::Body)?;
        if bytes.len() as u64 != blob.size() {
            let text = format!("{} bytes announced for {}, not as many read", blob.size(), blob.digest());
            return Err(crate::Error::Body(std::io::Error::new(std::io::ErrorKind::InvalidData, text)));
        }
        self.write_bytes(blob, bytes.into()).await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Each map is whole between statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn manifest_request(method: Method, url: Url) -> Request {
    Request::new(method, url, Lane::Metadata).header(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES))
}

fn media_type_of(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

fn descriptor(media_type: &str, size: u64, digest: &Digest) -> Descriptor {
    let digest: oci_spec::image::Digest = digest.as_str().parse().expect("a valid digest is one to oci-spec too");
    Descriptor::new(MediaType::from(media_type), size, digest)
}

/// A descriptor out of the head of an answer, if it says all that one needs.
fn described(headers: &HeaderMap, digest: Option<Digest>) -> Option<Descriptor> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let digest = digest.or_else(|| text("docker-content-digest")?.parse().ok())?;
    let size = text(CONTENT_LENGTH.as_str())?.parse().ok().filter(|size| *size > 0)?;
    let media_type = media_type_of(headers).filter(|media_type| MANIFEST_TYPES.contains(media_type.as_str()))?;
    Some(descriptor(&media_type, size, &digest))
}

/// The manifest's own word, else the header's, else what its fields look like.
fn manifest_type(bytes: &[u8], content_type: Option<String>) -> Result<String, String> {
    let shape: Shape = serde_json::from_slice(bytes).map_err(|_| "the answer is not a manifest".to_owned())?;
    if shape.schema_version == Some(1) {
        return Err("the image is in the retired schema 1 format: push it again with a newer tool".to_owned());
    }
    let listed = content_type.filter(|media_type| MANIFEST_TYPES.contains(media_type.as_str()));
    let guess = match shape.manifests {
        Some(_) => "application/vnd.oci.image.index.v1+json",
        None => "application/vnd.oci.image.manifest.v1+json",
    };
    Ok(shape.media_type.filter(|text| !text.is_empty()).or(listed).unwrap_or_else(|| guess.to_owned()))
}

fn may_be_immutable(error: &registry::Error) -> bool {
    matches!(error.code(), Some(409 | 412))
        || error.says(&["immutable", "already exists", "already_exists", "overwrite"])
}

/// RFC 8288: `Link: </v2/x/tags/list?last=b&n=1000>; rel="next"`.
fn next_page(url: &Url, headers: &HeaderMap) -> Option<Url> {
    let link =
        headers.get_all(LINK).iter().filter_map(|value| value.to_str().ok()).find(|link| link.contains("next"))?;
    let target = link.split_once('<')?.1.split_once('>')?.0;
    resolve_location(url, target).ok()
}
