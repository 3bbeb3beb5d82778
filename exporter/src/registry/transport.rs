//! Requests and answers: connections, redirects, retries. Knows nothing of registries.
//!
//! - Blob bodies travel over HTTP/1.1: an HTTP/2 server's flow-control window caps an upload, and parallel downloads on one
//!   connection share its congestion window. Everything else may use HTTP/2.
//! - The TLS settings of a host hold wherever we meet it: as registry, token server or target of a redirect.
//! - Redirects are followed by hand: `Authorization` stays with its origin, as does a form, and an answer never leads from
//!   https to http or to an address nearer to us than its sender ([`super::host::may_lead`]).
//! - No cookies, no transparent decompression: bytes arrive as they are stored.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Certificate, Identity, Method, Response, StatusCode};
use url::Url;

use super::ClientOptions;
use super::error::{Error, host_port};
use super::host::{is_loopback, resolve_location};
use super::notice::notices;
use super::payload::{Meter, Payload};
use super::retry::{backoff, is_temporary, retry_after};
use crate::Result;

const REDIRECTS_MAX: usize = 10;
/// A registry checks the digest of a large upload before it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// Below the idle limits of common load balancers: a connection that they have closed is not picked up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Refused or unresolved connections rarely heal within a command's patience.
const CONNECT_TRIES: u32 = 3;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Lane {
    Metadata,
    Blob,
}

pub(super) struct Request {
    pub method: Method,
    pub url: Url,
    pub headers: HeaderMap,
    pub payload: Payload,
    pub lane: Lane,
    /// 1 where the caller has to begin elsewhere before it tries again.
    pub tries: u32,
}

impl Request {
    pub fn new(method: Method, url: Url, lane: Lane) -> Request {
        Request { method, url, headers: HeaderMap::new(), payload: Payload::Empty, lane, tries: u32::MAX }
    }

    pub fn with_payload(self, payload: Payload) -> Request {
        Request { payload, ..self }
    }

    pub fn once(self) -> Request {
        Request { tries: 1, ..self }
    }

    pub fn header(mut self, name: reqwest::header::HeaderName, value: HeaderValue) -> Request {
        self.headers.insert(name, value);
        self
    }
}

/// What makes one client differ from another.
#[derive(Clone, PartialEq, Eq, Hash)]
struct ClientKey {
    lane: Lane,
    trust: Trust,
    /// Loopback never goes through a proxy.
    direct: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Trust {
    /// Plain http: no certificates are loaded, so that it works on a machine that has none.
    Nothing,
    System,
    /// The system's and the files below `certs.d` of this host.
    Host(String),
    Anything,
}

pub(super) struct Transport {
    options: Arc<ClientOptions>,
    clients: Mutex<HashMap<ClientKey, reqwest::Client>>,
    /// Notices that have been passed on: each is said once.
    said: Mutex<HashSet<String>>,
}

impl Transport {
    pub fn new(options: Arc<ClientOptions>) -> Transport {
        Transport { options, clients: Mutex::default(), said: Mutex::default() }
    }

    pub fn options(&self) -> &ClientOptions {
        &self.options
    }

    /// Sends, follows, and tries again where that can help. Any answer that is not "later" is returned, whatever its status.
    pub async fn execute(&self, request: &Request, authorization: Option<&HeaderValue>) -> Result<Response> {
        let mut attempt = 0;
        loop {
            let outcome = self.follow(request, authorization).await;
            if let Ok(response) = &outcome {
                self.pass_on(response);
            }
            attempt += 1;
            if attempt >= request.tries.min(self.options.tries) {
                return outcome;
            }
            let Some(wait) = self.wait_before(&outcome, attempt) else { return outcome };
            self.announce(&request.url, &outcome, wait);
            tokio::time::sleep(wait).await;
        }
    }

    /// How long to wait before another try, or `None` if there is nothing to try again.
    pub fn wait_before(&self, outcome: &Result<Response>, attempt: u32) -> Option<Duration> {
        match outcome {
            Ok(response) if !is_temporary(response.status()) => None,
            Ok(response) => match retry_after(response.headers(), SystemTime::now()) {
                Some(wait) => (wait <= self.options.longest_wait).then_some(wait),
                None => Some(backoff(attempt - 1)),
            },
            Err(error) => self.wait_after(error, attempt),
        }
    }

    pub fn wait_after(&self, error: &crate::Error, attempt: u32) -> Option<Duration> {
        match error {
            crate::Error::Registry(error) if error.is_break() => Some(backoff(attempt - 1)),
            crate::Error::Registry(error) if error.is_unreachable() && attempt < CONNECT_TRIES => {
                Some(backoff(attempt - 1))
            }
            _ => None,
        }
    }

    pub fn announce(&self, url: &Url, outcome: &Result<Response>, wait: Duration) {
        let reason = match outcome {
            Ok(response) => response.status().to_string(),
            Err(error) => error.to_string(),
        };
        self.notify(&format!("{}: {reason}; trying again in {:.1} s", host_port(url), wait.as_secs_f64()));
    }

    fn pass_on(&self, response: &Response) {
        let Some(notify) = &self.options.notify else { return };
        for notice in notices(&host_port(response.url()), response.headers()) {
            let new = self.said.lock().unwrap_or_else(PoisonError::into_inner).insert(notice.clone());
            if new {
                notify(&notice);
            }
        }
    }

    pub fn notify(&self, text: &str) {
        if let Some(notify) = &self.options.notify {
            notify(text);
        }
    }

    async fn follow(&self, request: &Request, mut authorization: Option<&HeaderValue>) -> Result<Response> {
        let mut url = request.url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let response = self.exchange(request, &url, authorization).await?;
            if !leads_on(&request.method, response.status()) {
                return Ok(response);
            }
            let refused = |reason: String| Error::refused(&request.method, &url, reason);
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| refused("a redirect without a Location".to_owned()))?;
            let next = resolve_location(&url, location).map_err(refused)?;
            if next.origin() != url.origin() {
                authorization = None;
                // The one body that is posted is a token server's form, with the password in it.
                if request.method == Method::POST && request.payload.length() > 0 {
                    return Err(refused("it leads to another host, which is not told who we are".to_owned()).into());
                }
            }
            url = next;
        }
        Err(Error::refused(&request.method, &request.url, format!("more than {REDIRECTS_MAX} redirects")).into())
    }

    /// One request and the head of its answer. Fails when nothing has moved for the stall time.
    async fn exchange(&self, request: &Request, url: &Url, authorization: Option<&HeaderValue>) -> Result<Response> {
        let meter = Arc::new(Meter::default());
        let body = request.payload.open(meter.clone()).await.map_err(crate::Error::Body)?;
        let mut builder = self.client(url, request.lane)?.request(request.method.clone(), url.clone());
        builder = builder.headers(request.headers.clone()).header(ACCEPT_ENCODING, "identity");
        if let Some(value) = authorization {
            builder = builder.header(AUTHORIZATION, value.clone());
        }
        let total = request.payload.length();
        if !matches!(request.method, Method::GET | Method::HEAD | Method::DELETE) {
            builder = builder.header(CONTENT_LENGTH, total).body(body);
        }
        let mut answer = std::pin::pin!(builder.send());
        let mut seen = 0;
        loop {
            let limit = if total > 0 && seen >= total { ANSWER_TIMEOUT } else { self.options.stall_timeout };
            match tokio::time::timeout(limit, &mut answer).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => {
                    let broken = || Error::transport(&request.method, url, error).into();
                    return Err(meter.take_failure().map_or_else(broken, crate::Error::Body));
                }
                Err(_) if meter.sent() != seen => seen = meter.sent(),
                Err(_) => return Err(Error::stalled(&request.method, url, limit).into()),
            }
        }
    }

    fn client(&self, url: &Url, lane: Lane) -> Result<reqwest::Client> {
        let key = ClientKey { lane, trust: self.trust(url), direct: is_loopback(url) };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = self.build(&key)?;
        clients.insert(key, client.clone());
        Ok(client)
    }

    fn trust(&self, url: &Url) -> Trust {
        let host = host_port(url);
        let has_directory = || self.options.certs_directories.iter().any(|directory| directory.join(&host).is_dir());
        match () {
            () if url.scheme() == "http" => Trust::Nothing,
            () if self.options.is_insecure(&host) => Trust::Anything,
            () if has_directory() => Trust::Host(host),
            () => Trust::System,
        }
    }

    fn build(&self, key: &ClientKey) -> Result<reqwest::Client> {
        let options = &self.options;
        let mut builder = reqwest::Client::builder()
            .user_agent(&options.user_agent)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .retry(reqwest::retry::never())
            .connect_timeout(options.connect_timeout)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .tcp_nodelay(true);
        if key.lane == Lane::Blob {
            builder = builder.http1_only();
        }
        if key.direct {
            builder = builder.no_proxy();
        }
        builder = match &key.trust {
            Trust::Nothing => builder.tls_certs_only([]),
            Trust::Anything => builder.tls_certs_only([]).tls_danger_accept_invalid_certs(true),
            Trust::System => builder.tls_certs_merge(self.extra_certificates()?),
            Trust::Host(host) => {
                self.with_host_certificates(builder.tls_certs_merge(self.extra_certificates()?), host)?
            }
        };
        builder.build().map_err(|error| {
            let error = error.without_url();
            let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            let reason = format!("{error}{source}; is ca-certificates installed?");
            crate::Error::Tls { path: "the system".into(), reason }
        })
    }

    fn extra_certificates(&self) -> Result<Vec<Certificate>> {
        let mut all = Vec::new();
        for path in &self.options.ca_files {
            all.extend(certificates(path)?);
        }
        Ok(all)
    }

    /// docker's `certs.d/HOST`: `*.crt` are authorities, `NAME.cert` with `NAME.key` is who we are.
    fn with_host_certificates(
        &self,
        mut builder: reqwest::ClientBuilder,
        host: &str,
    ) -> Result<reqwest::ClientBuilder> {
        for directory in self.options.certs_directories.iter().map(|directory| directory.join(host)) {
            let Ok(entries) = std::fs::read_dir(&directory) else { continue };
            let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            paths.sort();
            for path in paths {
                match path.extension().and_then(|extension| extension.to_str()) {
                    Some("crt") => builder = builder.tls_certs_merge(certificates(&path)?),
                    Some("cert") => builder = builder.identity(identity(&path)?),
                    _ => {}
                }
            }
        }
        Ok(builder)
    }
}

fn leads_on(method: &Method, status: StatusCode) -> bool {
    match status.as_u16() {
        301..=303 => matches!(*method, Method::GET | Method::HEAD),
        307 | 308 => true,
        _ => false,
    }
}

fn tls_error(path: &Path, reason: impl ToString) -> crate::Error {
    crate::Error::Tls { path: path.to_owned(), reason: reason.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<Certificate>> {
    let pem = std::fs::read(path).map_err(|error| tls_error(path, error))?;
    let found = Certificate::from_pem_bundle(&pem).map_err(|error| tls_error(path, error))?;
    if found.is_empty() {
        return Err(tls_error(path, "holds no PEM certificate"));
    }
    Ok(found)
}

fn identity(certificate: &Path) -> Result<Identity> {
    let key = certificate.with_extension("key");
    let mut pem = std::fs::read(&key).map_err(|error| tls_error(&key, error))?;
    pem.push(b'\n');
    pem.extend(std::fs::read(certificate).map_err(|error| tls_error(certificate, error))?);
    Identity::from_pem(&pem).map_err(|error| tls_error(certificate, error.without_url()))
}

/// A body that is small by nature; one that is not is an error, not a full memory.
pub(super) async fn read_capped(method: &Method, mut response: Response, limit: usize) -> Result<Bytes> {
    let url = response.url().clone();
    let mut bytes = BytesMut::new();
    loop {
        let chunk = tokio::time::timeout(ANSWER_TIMEOUT, response.chunk())
            .await
            .map_err(|_| Error::stalled(method, &url, ANSWER_TIMEOUT))?
            .map_err(|error| Error::transport(method, &url, error))?;
        match chunk {
            None => return Ok(bytes.freeze()),
            Some(chunk) if bytes.len() + chunk.len() > limit => {
                return Err(Error::refused(method, &url, format!("the answer is longer than {limit} bytes")).into());
            }
            Some(chunk) => bytes.extend_from_slice(&chunk),
        }
    }
}

/// The error that an answer is, with its body as far as that can be had.
pub(super) async fn failure(method: &Method, response: Response) -> crate::Error {
    const BODY_MAX: usize = 64 * 1024;
    let (url, status, headers) = (response.url().clone(), response.status(), response.headers().clone());
    // Without its body the error still has its status: that is the better one to report.
    let body = read_capped(method, response, BODY_MAX).await.unwrap_or_default();
    Error::status(method, &url, status, &headers, &body).into()
}
