//! One registry host: how it is reached, who we are to it, and how much at a time.

use std::sync::Arc;
use std::time::Instant;

use reqwest::{Method, Response, StatusCode};
use tokio::sync::{OnceCell, Semaphore};
use url::Url;

use super::auth::{Access, Auth, Party};
use super::challenge;
use super::credentials::Sources;
use super::error::Error;
use super::host::{api_host, base_urls};
use super::transport::{Lane, Request, Transport, failure, read_capped};
use crate::Result;

/// Rounds through the ways to reach a host.
const PROBE_TRIES: u32 = 3;

pub(super) struct Endpoint {
    registry: String,
    pub transport: Arc<Transport>,
    sources: Arc<Sources>,
    candidates: Vec<Url>,
    base: OnceCell<Url>,
    auth: Auth,
    /// Apart, so that a copy within one registry cannot wait for itself.
    pub uploads: Arc<Semaphore>,
    pub downloads: Arc<Semaphore>,
}

impl Endpoint {
    pub fn new(registry: &str, transport: Arc<Transport>, sources: Arc<Sources>) -> Endpoint {
        let host = api_host(registry);
        let options = transport.options();
        let candidates = base_urls(host, options.is_plain(host), options.is_insecure(host));
        let transfers = options.transfers_per_host;
        Endpoint {
            registry: registry.to_owned(),
            transport,
            sources,
            candidates,
            base: OnceCell::new(),
            auth: Auth::default(),
            uploads: Arc::new(Semaphore::new(transfers)),
            downloads: Arc::new(Semaphore::new(transfers)),
        }
    }

    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// `https://host/`; where more than one scheme is possible, what answers decides, once.
    pub async fn base(&self) -> Result<&Url> {
        self.base.get_or_try_init(|| self.probe()).await
    }

    async fn probe(&self) -> Result<Url> {
        if let [only] = self.candidates.as_slice() {
            return Ok(only.clone());
        }
        for attempt in 1.. {
            let error = match self.first_that_answers().await {
                Ok(url) => return Ok(url),
                Err(error) => error,
            };
            // Where nothing listens, waiting rarely helps; a connection that broke off may have been an accident.
            let wait =
                self.transport.wait_after(&error, attempt).filter(|_| attempt < PROBE_TRIES && !is_unreachable(&error));
            let Some(wait) = wait else { return Err(error) };
            tokio::time::sleep(wait).await;
        }
        unreachable!("the loop ends by returning")
    }

    /// The error, if there is one, is that of the way that got furthest.
    async fn first_that_answers(&self) -> Result<Url> {
        let mut failed: Option<crate::Error> = None;
        for base in &self.candidates {
            match self.speaks(base).await {
                Ok(()) => return Ok(base.clone()),
                Err(error) if failed.is_some() && is_unreachable(&error) => {}
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| crate::Error::Credentials {
            place: self.registry.clone(),
            reason: "not the host of a registry".to_owned(),
        }))
    }

    async fn speaks(&self, base: &Url) -> Result<()> {
        let url = api_root(base)?;
        let request = Request::new(Method::GET, url.clone(), Lane::Metadata).once();
        let response = self.transport.execute(&request, None).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            if let Some(challenge) = challenge::choose(response.headers()) {
                self.auth.learn(challenge);
            }
            return Ok(());
        }
        // A server that wants TLS often says so in plain text.
        if base.scheme() == "http" && response.status() == StatusCode::BAD_REQUEST {
            return Err(failure(&Method::GET, response).await);
        }
        Ok(())
    }

    pub async fn check(&self) -> Result<()> {
        let url = api_root(self.base().await?)?;
        let access = Access::default();
        let response = self.send(Request::new(Method::GET, url, Lane::Metadata), &access).await?;
        match response.status().is_success() {
            true => Ok(()),
            false => Err(failure(&Method::GET, response).await),
        }
    }

    /// A URL below `/v2/REPOSITORY/`.
    pub async fn url(&self, repository: &str, rest: &str) -> Result<Url> {
        let base = self.base().await?;
        let path = format!("v2/{repository}/{rest}");
        base.join(&path).map_err(|_| Error::refused(&Method::GET, base, format!("{path:?} is not a path")).into())
    }

    /// Sends with our credentials; an answer of 401 that remains is the registry's last word.
    pub async fn send(&self, request: Request, access: &Access) -> Result<Response> {
        let base = self.base().await?;
        let party = Party { transport: &self.transport, sources: &self.sources, registry: &self.registry, base };
        let own = request.url.origin() == base.origin();
        let (mut asked, mut renewed) = (false, false);
        loop {
            let sent = if own { self.auth.header(&party, access).await? } else { None };
            let sent_at = sent.is_some().then(Instant::now);
            let response = self.transport.execute(&request, sent.as_ref()).await?;
            let again = if sent.is_some() { &mut renewed } else { &mut asked };
            let ours = response.url().origin() == base.origin();
            let refused = match response.status() {
                StatusCode::UNAUTHORIZED => true,
                // Some registries (ECR) say so of what has expired; of what never was good it is the last word.
                StatusCode::FORBIDDEN => self.auth.has_proved(sent.as_ref()),
                _ => {
                    self.auth.proved(sent);
                    return Ok(response);
                }
            };
            if !refused || !ours || *again {
                return Ok(response);
            }
            *again = true;
            if !self.take_challenge(&response, access, sent_at).await? {
                return Ok(response);
            }
        }
    }

    /// False when there is no known way to answer.
    async fn take_challenge(&self, response: &Response, access: &Access, sent: Option<Instant>) -> Result<bool> {
        let mut challenge = challenge::choose(response.headers());
        if challenge.is_none() && !self.auth.knows_challenge() {
            // Some registries challenge at their root only.
            let request = Request::new(Method::GET, api_root(self.base().await?)?, Lane::Metadata);
            let root = self.transport.execute(&request, None).await?;
            challenge = challenge::choose(root.headers());
            read_capped(&Method::GET, root, 64 * 1024).await?;
        }
        self.auth.refused(access, challenge, sent).await;
        Ok(self.auth.knows_challenge())
    }
}

fn is_unreachable(error: &crate::Error) -> bool {
    matches!(error, crate::Error::Registry(error) if error.is_unreachable())
}

fn api_root(base: &Url) -> Result<Url> {
    base.join("v2/").map_err(|_| Error::refused(&Method::GET, base, "not the URL of a registry").into())
}
