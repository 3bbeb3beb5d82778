//! A blob on its way here: verified as it passes, taken up again where the connection broke.

use bytes::Bytes;
use forge_snapshotter::digest::{Digest, Digester};
use oci_spec::image::Descriptor;
use reqwest::header::{CONTENT_RANGE, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};
use sha2::Digest as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::io::StreamReader;
use url::Url;

use super::error::Error;
use super::repository::Repository;
use super::retry::backoff;
use super::transport::{Lane, Request, failure};
use crate::Result;
use crate::blobs::{BlobReader, digest_of};

/// Progress that makes a broken connection count as an accident and not as the rule.
const PROGRESS: u64 = 1 << 20;
/// A server that ignores a range sends everything again; more than this is not thrown away.
const DISCARD_MAX: u64 = 64 << 20;

enum Hasher {
    Sha256(Digester),
    Sha512(Box<sha2::Sha512>),
}

impl Hasher {
    fn of(digest: &Digest) -> Hasher {
        match digest.algorithm() {
            "sha512" => Hasher::Sha512(Box::default()),
            _ => Hasher::Sha256(Digester::new()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(state) => state.update(bytes),
            Hasher::Sha512(state) => state.update(bytes),
        }
    }

    fn finish(self) -> String {
        match self {
            Hasher::Sha256(state) => state.finish().to_string(),
            Hasher::Sha512(state) => {
                let hex: String = state.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
                format!("sha512:{hex}")
            }
        }
    }
}

/// Whether bytes in memory have a digest.
pub(super) fn check(digest: &Digest, bytes: &[u8]) -> Result<(), String> {
    let mut hasher = Hasher::of(digest);
    hasher.update(bytes);
    match hasher.finish() {
        found if found == digest.as_str() => Ok(()),
        found => Err(format!("the bytes have digest {found} where {digest} was asked for")),
    }
}

pub(super) async fn open(repository: Repository, blob: &Descriptor) -> Result<BlobReader> {
    let digest = digest_of(blob)?;
    let slots = repository.endpoint().downloads.clone();
    let slot = slots.acquire_owned().await.expect("the semaphore is never closed");
    let mut download = Download {
        url: repository.blob_url(&digest).await?,
        hasher: Hasher::of(&digest),
        size: blob.size(),
        repository,
        digest,
        offset: 0,
        skip: 0,
        failures: 0,
        safe_offset: 0,
        response: None,
        _slot: slot,
    };
    download.response = Some(download.request().await?);
    let frames = futures_util::stream::try_unfold(download, |mut download| async move {
        match download.next().await {
            Ok(Some(bytes)) => Ok(Some((bytes, download))),
            Ok(None) => Ok(None),
            Err(error) => Err(std::io::Error::other(error)),
        }
    });
    Ok(Box::new(StreamReader::new(Box::pin(frames))))
}

struct Download {
    repository: Repository,
    url: Url,
    digest: Digest,
    size: u64,
    /// How much has been hashed and handed on.
    offset: u64,
    hasher: Hasher,
    /// How much of the answer is known already: it began before `offset`.
    skip: u64,
    response: Option<Response>,
    failures: u32,
    safe_offset: u64,
    _slot: OwnedSemaphorePermit,
}

impl Download {
    /// The next bytes, or `None` when all have come and are what they were announced to be.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        let limit = self.repository.endpoint().transport.options().stall_timeout;
        loop {
            let mut response = match self.response.take() {
                Some(response) => response,
                None => self.request().await?,
            };
            let error = match tokio::time::timeout(limit, response.chunk()).await {
                Ok(Ok(Some(bytes))) => {
                    self.response = Some(response);
                    match self.accept(bytes)? {
                        bytes if bytes.is_empty() => continue,
                        bytes => return Ok(Some(bytes)),
                    }
                }
                Ok(Ok(None)) if self.offset == self.size => return self.verify(),
                Ok(Ok(None)) => self.refused(format!("the blob ended after {} of {} bytes", self.offset, self.size)),
                Ok(Err(error)) => Error::transport(&Method::GET, &self.url, error).into(),
                Err(_) => Error::stalled(&Method::GET, &self.url, limit).into(),
            };
            self.pause(error).await?;
        }
    }

    fn accept(&mut self, mut bytes: Bytes) -> Result<Bytes> {
        let known = self.skip.min(bytes.len() as u64);
        self.skip -= known;
        let bytes = bytes.split_off(known as usize);
        if bytes.len() as u64 > self.size - self.offset {
            return Err(self.refused(format!("the blob is longer than the {} bytes announced", self.size)));
        }
        self.hasher.update(&bytes);
        self.offset += bytes.len() as u64;
        Ok(bytes)
    }

    fn verify(&mut self) -> Result<Option<Bytes>> {
        let hasher = std::mem::replace(&mut self.hasher, Hasher::of(&self.digest));
        match hasher.finish() {
            found if found == self.digest.as_str() => Ok(None),
            found => Err(self.refused(format!("the registry sent bytes with digest {found}, not {}", self.digest))),
        }
    }

    /// Waits before going on from `offset`, or gives the error back when that has been tried often enough.
    async fn pause(&mut self, error: crate::Error) -> Result<()> {
        if self.offset >= self.safe_offset + PROGRESS {
            self.failures = 0;
        }
        self.safe_offset = self.safe_offset.max(self.offset);
        self.failures += 1;
        let transport = &self.repository.endpoint().transport;
        if self.failures >= transport.options().tries {
            return Err(error);
        }
        let wait = backoff(self.failures - 1);
        transport.announce(&self.url, &Err(error), wait);
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Asks for the rest. The range is closed: some registries refuse open ones.
    async fn request(&mut self) -> Result<Response> {
        let mut request = Request::new(Method::GET, self.url.clone(), Lane::Blob);
        if self.offset > 0 {
            let range = format!("bytes={}-{}", self.offset, self.size.saturating_sub(1));
            let range = HeaderValue::from_str(&range).expect("digits are a header value");
            request = request.header(RANGE, range);
        }
        let response = self.repository.send(request, &self.repository.pull()).await?;
        self.skip = 0;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if self.offset > 0 => match range_start(&response) {
                Some(start) if start == self.offset => Ok(response),
                _ => Err(self.refused("the registry sent another range than was asked for".to_owned())),
            },
            StatusCode::OK => match response.content_length() {
                Some(length) if length != self.size => {
                    Err(self.refused(format!("the registry sends {length} bytes where {} were announced", self.size)))
                }
                _ if self.offset > DISCARD_MAX && self.offset > self.size / 4 => {
                    Err(self.refused("the connection broke, and the registry cannot go on from there".to_owned()))
                }
                _ => {
                    self.skip = self.offset;
                    Ok(response)
                }
            },
            _ => Err(failure(&Method::GET, response).await),
        }
    }

    fn refused(&self, reason: String) -> crate::Error {
        Error::refused(&Method::GET, &self.url, reason).into()
    }
}

/// `bytes 5-9/10`, or without the unit (Nexus).
fn range_start(response: &Response) -> Option<u64> {
    let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?.trim();
    text.strip_prefix("bytes").unwrap_or(text).trim().split_once('-')?.0.parse().ok()
}
