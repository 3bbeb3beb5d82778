//! The registry client: pull, push, list and delete over the distribution protocol (distribution-spec 1.1).
//!
//! ```text
//! Client ── Repository (Blobs, manifests, tags)          repository.rs, upload.rs, download.rs
//!              └─ Endpoint: one registry host            endpoint.rs
//!                   ├─ Auth: challenges, tokens          auth.rs, challenge.rs, credentials.rs
//!                   └─ Transport: redirects, retries     transport.rs, payload.rs, retry.rs, host.rs
//! ```
//!
//! What it promises: bytes are verified before they are believed; credentials go only to the host that they are for
//! and never into an error; every optimisation (mounts, HEAD, ranges, chunks) falls back to the plain way; a fault that
//! may pass is tried again, and one that may not says what to do. Registries differ from the letter of the protocol in many
//! ways; where code looks lenient, some registry needs it.
//!
//! The client reads no environment and no home directory: [`ClientOptions`] says where everything is. (Proxies alone are
//! taken from the environment, by the HTTP library; loopback is never proxied.)

mod auth;
mod challenge;
mod credentials;
mod download;
mod endpoint;
mod error;
mod host;
mod notice;
mod payload;
mod repository;
mod retry;
mod transport;
mod upload;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use forge_snapshotter::image::Reference;

pub use self::credentials::{Credentials, Secret};
pub use self::error::{Cause, Error};
pub use self::repository::Repository;

use self::credentials::Sources;
use self::endpoint::Endpoint;
use self::transport::Transport;

/// Is told, in one line, of what makes a transfer wait.
pub type Notify = Arc<dyn Fn(&str) + Send + Sync>;

/// Everything that a [`Client`] has to be told.
#[derive(Clone)]
pub struct ClientOptions {
    /// Hosts (`host` or `host:port`) that are spoken to in plain http.
    pub plain_http: Vec<String>,
    /// Hosts whose certificates are not checked, and that may fall back to plain http.
    pub insecure: Vec<String>,
    /// Certificate authorities (PEM bundles) that are trusted besides the system's.
    pub ca_files: Vec<PathBuf>,
    /// Directories laid out as docker's `certs.d`: `HOST[:PORT]/{*.crt, NAME.cert, NAME.key}`.
    pub certs_directories: Vec<PathBuf>,
    /// Credentials by registry host; they come before all others.
    pub credentials: Vec<(String, Credentials)>,
    /// The value of `DOCKER_AUTH_CONFIG`.
    pub auth_json: Option<Secret>,
    /// Docker `config.json` and containers `auth.json` files, the first that knows a host counts; they may be missing.
    pub auth_files: Vec<PathBuf>,
    pub user_agent: String,
    pub connect_timeout: Duration,
    /// A transfer of which no byte moves for so long has failed.
    pub stall_timeout: Duration,
    /// Tries per request, the first included.
    pub tries: u32,
    /// A registry that asks for a longer wait than this has refused.
    pub longest_wait: Duration,
    /// Blobs moving at a time to or from one host, each way.
    pub transfers_per_host: usize,
    /// The size of the pieces for what is too large to be sent whole.
    pub upload_chunk_bytes: u64,
    pub notify: Option<Notify>,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            plain_http: Vec::new(),
            insecure: Vec::new(),
            ca_files: Vec::new(),
            certs_directories: Vec::new(),
            credentials: Vec::new(),
            auth_json: None,
            auth_files: Vec::new(),
            user_agent: concat!("forge/", env!("CARGO_PKG_VERSION")).to_owned(),
            connect_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(60),
            tries: 5,
            longest_wait: Duration::from_secs(300),
            transfers_per_host: 6,
            // Proxies commonly stop at 100 MB (Cloudflare); half leaves room.
            upload_chunk_bytes: 64 << 20,
            notify: None,
        }
    }
}

impl ClientOptions {
    fn is_plain(&self, host: &str) -> bool {
        lists(&self.plain_http, host)
    }

    fn is_insecure(&self, host: &str) -> bool {
        lists(&self.insecure, host)
    }
}

/// An entry without a port stands for every port of its host.
fn lists(hosts: &[String], host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    hosts.iter().any(|listed| listed.eq_ignore_ascii_case(host) || listed.eq_ignore_ascii_case(name))
}

/// The way to every registry; clones share connections, tokens and limits.
#[derive(Clone)]
pub struct Client {
    transport: Arc<Transport>,
    sources: Arc<Sources>,
    endpoints: Arc<Mutex<HashMap<String, Arc<Endpoint>>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    /// Opens nothing yet: files are read and connections made when a registry is first spoken to.
    pub fn new(options: ClientOptions) -> crate::Result<Client> {
        let sources = Sources {
            given: options.credentials.clone(),
            text: options.auth_json.clone(),
            files: options.auth_files.clone(),
            ..Sources::default()
        };
        let options = ClientOptions {
            tries: options.tries.max(1),
            transfers_per_host: options.transfers_per_host.max(1),
            upload_chunk_bytes: options.upload_chunk_bytes.max(1),
            ..options
        };
        Ok(Client {
            transport: Arc::new(Transport::new(Arc::new(options))),
            sources: Arc::new(sources),
            endpoints: Arc::default(),
        })
    }

    /// One repository of one registry; the tag and digest of the name do not matter.
    pub fn repository(&self, name: &Reference) -> Repository {
        Repository::new(self.endpoint(name.registry()), name.repository())
    }

    /// Whether a registry answers and accepts the credentials that are known for it: what a login checks.
    pub async fn check(&self, registry: &str) -> crate::Result<()> {
        self.endpoint(registry).check().await
    }

    fn endpoint(&self, registry: &str) -> Arc<Endpoint> {
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Endpoint::new(registry, self.transport.clone(), self.sources.clone()));
        endpoints.entry(registry.to_owned()).or_insert_with(new).clone()
    }
}

#[cfg(test)]
mod tests;
