//! Answers to "who are you": basic, and tokens from a token server (distribution "token authentication", OAuth2).
//!
//! ```text
//! request ──401 + challenge──> [realm]  GET ?service&scope…   (Basic when there is a password)
//!    ^                                  POST form             (identity tokens; or where GET is not spoken)
//!    └──────── Bearer token <───────────┘   kept for nine tenths of its life, at least a minute
//! ```
//!
//! One [`Auth`] serves one registry host. Tokens are kept per set of scopes and fetched by one task while others wait.
//! What is refused is forgotten, token and credentials both, so that a push survives their expiry in its middle.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use url::Url;
use url::form_urlencoded::Serializer;

use super::challenge::Challenge;
use super::credentials::{Credentials, Sources, Wanted};
use super::error;
use super::host::may_lead;
use super::payload::Payload;
use super::transport::{Lane, Request, Transport, read_capped};
use crate::Result;

const TOKEN_MAX: usize = 64 * 1024;
/// Token servers that say nothing mean a minute (distribution "token specification").
const LIFE_MIN: Duration = Duration::from_secs(60);
const CREDENTIALS_LIFE: Duration = Duration::from_secs(3600);
const CLIENT_ID: &str = "forge";

/// What a request is allowed to do: the scopes that are asked for before the registry asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Access {
    repository: String,
    actions: &'static str,
    /// The source of a mount, named second: some token servers honour one scope only.
    from: Option<String>,
}

impl Access {
    pub fn pull(repository: &str) -> Access {
        Access { repository: repository.to_owned(), actions: "pull", from: None }
    }

    pub fn push(repository: &str) -> Access {
        Access { actions: "pull,push", ..Access::pull(repository) }
    }

    pub fn delete(repository: &str) -> Access {
        Access { actions: "pull,delete", ..Access::pull(repository) }
    }

    pub fn mount(repository: &str, from: &str) -> Access {
        Access { from: Some(from.to_owned()), ..Access::push(repository) }
    }

    fn scopes(&self) -> Vec<String> {
        let scope = |repository: &str, actions: &str| format!("repository:{repository}:{actions}");
        let own = (!self.repository.is_empty()).then(|| scope(&self.repository, self.actions));
        own.into_iter().chain(self.from.as_deref().map(|from| scope(from, "pull"))).collect()
    }
}

struct Token {
    value: HeaderValue,
    fetched: Instant,
    expires: Instant,
}

type TokenCell = Arc<tokio::sync::Mutex<Option<Token>>>;
type Known = Option<(Option<Credentials>, Instant)>;

#[derive(Default)]
pub(super) struct Auth {
    challenge: Mutex<Option<Challenge>>,
    /// Scopes that the registry asked for beyond those that we asked for, by access.
    demanded: Mutex<HashMap<String, Vec<String>>>,
    tokens: Mutex<HashMap<String, TokenCell>>,
    /// What was last sent and accepted.
    proven: Mutex<Option<HeaderValue>>,
    /// When the last request that was refused was sent.
    refused: Mutex<Option<Instant>>,
    /// By repository; the outer lock is held across a helper's run, so that it runs once.
    credentials: tokio::sync::Mutex<HashMap<String, Known>>,
}

/// What an [`Auth`] needs of its host.
pub(super) struct Party<'a> {
    pub transport: &'a Transport,
    pub sources: &'a Sources,
    pub registry: &'a str,
    pub base: &'a Url,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The maps are consistent between statements, so a panic elsewhere leaves them usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Auth {
    pub fn learn(&self, challenge: Challenge) {
        *lock(&self.challenge) = Some(challenge);
    }

    pub fn knows_challenge(&self) -> bool {
        lock(&self.challenge).is_some()
    }

    pub fn proved(&self, sent: Option<HeaderValue>) {
        *lock(&self.proven) = sent;
    }

    pub fn has_proved(&self, sent: Option<&HeaderValue>) -> bool {
        sent.is_some() && lock(&self.proven).as_ref() == sent
    }

    /// The `Authorization` to send, if the registry has ever asked for one.
    pub async fn header(&self, party: &Party<'_>, access: &Access) -> Result<Option<HeaderValue>> {
        let challenge = lock(&self.challenge).clone();
        match challenge {
            None => Ok(None),
            Some(Challenge::Basic) => {
                let credentials = self.credentials(party, access).await?;
                credentials.map_or(Ok(None), |credentials| basic_or_token(party, &credentials))
            }
            Some(Challenge::Bearer { realm, service, .. }) => {
                let server = Server { realm: realm_url(party, &realm)?, service };
                self.token(party, access, &server).await.map(Some)
            }
        }
    }

    /// Takes note of a refusal: the challenge and the scopes it demands; and, where something was sent, that what was known
    /// by then is worth nothing any more. What other tasks have fetched since stays.
    pub async fn refused(&self, access: &Access, challenge: Option<Challenge>, sent: Option<Instant>) {
        let key = access.scopes().join(" ");
        if let Some(challenge) = challenge {
            if let Challenge::Bearer { scope: Some(scope), .. } = &challenge {
                let demanded = scope.split_ascii_whitespace().map(str::to_owned).take(16).collect();
                lock(&self.demanded).insert(key, demanded);
            }
            self.learn(challenge);
        }
        let Some(sent) = sent else { return };
        *lock(&self.refused) = Some(sent);
        let cells: Vec<TokenCell> = lock(&self.tokens).values().cloned().collect();
        for cell in cells {
            let mut token = cell.lock().await;
            if token.as_ref().is_some_and(|token| token.fetched <= sent) {
                *token = None;
            }
        }
        let stale = |known: &Known| known.as_ref().is_some_and(|(_, read)| *read <= sent);
        self.credentials.lock().await.retain(|_, known| !stale(known));
    }

    async fn credentials(&self, party: &Party<'_>, access: &Access) -> Result<Option<Credentials>> {
        let mut known = self.credentials.lock().await;
        let entry = known.entry(access.repository.clone()).or_default();
        if let Some((credentials, _)) = entry.as_ref().filter(|(_, read)| read.elapsed() < CREDENTIALS_LIFE) {
            return Ok(credentials.clone());
        }
        let refused = *lock(&self.refused);
        let wanted = Wanted { registry: party.registry, repository: &access.repository, refused };
        let found = party.sources.find(wanted).await?;
        *entry = Some((found.clone(), Instant::now()));
        Ok(found)
    }

    fn cell(&self, key: &str) -> TokenCell {
        lock(&self.tokens).entry(key.to_owned()).or_default().clone()
    }

    /// A token for pushing serves pulls from the same repository too.
    fn push_token(&self, access: &Access) -> Option<HeaderValue> {
        let pull_only = access.actions == "pull" && access.from.is_none();
        let key = Access::push(&access.repository).scopes().join(" ");
        let cell = lock(&self.tokens).get(&key).filter(|_| pull_only)?.clone();
        let token = cell.try_lock().ok()?;
        token.as_ref().filter(|token| token.expires > Instant::now()).map(|token| token.value.clone())
    }

    async fn token(&self, party: &Party<'_>, access: &Access, server: &Server) -> Result<HeaderValue> {
        if let Some(value) = self.push_token(access) {
            return Ok(value);
        }
        let mut scopes = access.scopes();
        let cell = self.cell(&scopes.join(" "));
        // Held while fetching: this is the single flight.
        let mut token = cell.lock().await;
        if let Some(token) = token.as_ref().filter(|token| token.expires > Instant::now()) {
            return Ok(token.value.clone());
        }
        let demanded = lock(&self.demanded).get(&scopes.join(" ")).cloned().unwrap_or_default();
        let new: Vec<String> =
            demanded.into_iter().filter(|scope| !scopes.iter().any(|own| covers(own, scope))).collect();
        scopes.extend(new);
        let credentials = self.credentials(party, access).await?;
        if let Some(Credentials::Token(verbatim)) = &credentials {
            return bearer(party, verbatim.expose());
        }
        let fetched = server.fetch(party, credentials.as_ref(), &scopes).await?;
        let value = fetched.value.clone();
        *token = Some(fetched);
        Ok(value)
    }
}

/// Whether `repository:x:pull,push` makes `repository:x:pull` needless.
fn covers(own: &str, other: &str) -> bool {
    match (own.rsplit_once(':'), other.rsplit_once(':')) {
        (Some((name, actions)), Some((other_name, others))) => {
            name == other_name && others.split(',').all(|action| actions.split(',').any(|own| own == action))
        }
        _ => own == other,
    }
}

fn sensitive(party: &Party<'_>, text: &str) -> Result<HeaderValue> {
    let mut value = HeaderValue::from_str(text).map_err(|_| {
        error::Error::refused(&Method::GET, party.base, "the credentials hold characters that HTTP cannot carry")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

fn bearer(party: &Party<'_>, token: &str) -> Result<HeaderValue> {
    sensitive(party, &format!("Bearer {token}"))
}

fn basic_or_token(party: &Party<'_>, credentials: &Credentials) -> Result<Option<HeaderValue>> {
    match credentials {
        Credentials::Token(token) => bearer(party, token.expose()).map(Some),
        other => other.basic().map(|text| sensitive(party, &text)).transpose(),
    }
}

/// The realm as a URL that we may go to. A realm without a real scheme (Nexus sends `null://…`) gets the registry's.
fn realm_url(party: &Party<'_>, realm: &str) -> Result<Url> {
    let refused = |reason: String| error::Error::refused(&Method::GET, party.base, reason);
    let repaired = realm.strip_prefix("null://").map(|rest| format!("{}://{rest}", party.base.scheme()));
    let url = party
        .base
        .join(repaired.as_deref().unwrap_or(realm))
        .map_err(|_| refused("the registry names a token server whose URL is malformed".to_owned()))?;
    may_lead(party.base, &url).map_err(|reason| refused(format!("the registry names a token server, but {reason}")))?;
    Ok(url)
}

/// A token server, as a challenge named it.
struct Server {
    realm: Url,
    service: Option<String>,
}

impl Server {
    async fn fetch(&self, party: &Party<'_>, credentials: Option<&Credentials>, scopes: &[String]) -> Result<Token> {
        if let Some(Credentials::Identity(_)) = credentials {
            return self.post(party, credentials, scopes).await;
        }
        match self.get(party, credentials, scopes).await {
            Err(crate::Error::Registry(error))
                if credentials.is_some() && matches!(error.code(), Some(400 | 401 | 404 | 405)) =>
            {
                // The error of the usual way says more than that of the second one.
                self.post(party, credentials, scopes).await.map_err(|_| crate::Error::Registry(error))
            }
            other => other,
        }
    }

    async fn get(&self, party: &Party<'_>, credentials: Option<&Credentials>, scopes: &[String]) -> Result<Token> {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            for scope in scopes {
                query.append_pair("scope", scope);
            }
        }
        let basic = credentials.and_then(Credentials::basic).map(|text| sensitive(party, &text)).transpose()?;
        exchange(party, Request::new(Method::GET, url, Lane::Metadata), basic.as_ref()).await
    }

    async fn post(&self, party: &Party<'_>, credentials: Option<&Credentials>, scopes: &[String]) -> Result<Token> {
        let form = Payload::Bytes(self.form(credentials, scopes).into());
        let request = Request::new(Method::POST, self.realm.clone(), Lane::Metadata)
            .header(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"))
            .with_payload(form);
        exchange(party, request, None).await
    }

    fn form(&self, credentials: Option<&Credentials>, scopes: &[String]) -> String {
        let mut form = Serializer::new(String::new());
        form.append_pair("client_id", CLIENT_ID).append_pair("scope", &scopes.join(" "));
        if let Some(service) = &self.service {
            form.append_pair("service", service);
        }
        match credentials {
            Some(Credentials::Identity(token)) => {
                form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token.expose());
            }
            Some(Credentials::Password { user, password }) => {
                form.append_pair("grant_type", "password").append_pair("username", user);
                form.append_pair("password", password.expose());
            }
            Some(Credentials::Token(_)) | None => {}
        }
        form.finish()
    }
}

async fn exchange(party: &Party<'_>, request: Request, authorization: Option<&HeaderValue>) -> Result<Token> {
    let request = request.header(ACCEPT, HeaderValue::from_static("application/json"));
    let response = party.transport.execute(&request, authorization).await?;
    let (url, status, headers) = (response.url().clone(), response.status(), response.headers().clone());
    let body = read_capped(&request.method, response, TOKEN_MAX).await?;
    if status.is_success() {
        let nothing = || error::Error::refused(&request.method, &url, "the token server sent no token");
        return parse_token(party, &body)?.ok_or_else(|| nothing().into());
    }
    let error = error::Error::status(&request.method, &url, status, &headers, &body);
    Err(match status {
        StatusCode::UNAUTHORIZED => {
            error.with_hint(format!("user name or password are not accepted: forge login {}", party.registry)).into()
        }
        _ => error.into(),
    })
}

#[derive(Deserialize)]
struct TokenBody {
    token: Option<String>,
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<f64>,
}

fn parse_token(party: &Party<'_>, body: &[u8]) -> Result<Option<Token>> {
    let Ok(parsed) = serde_json::from_slice::<TokenBody>(body) else { return Ok(None) };
    let Some(text) = [parsed.token, parsed.access_token].into_iter().flatten().find(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let seconds = parsed.expires_in.filter(|seconds| seconds.is_finite()).unwrap_or(0.0).clamp(0.0, 86_400.0);
    let life = Duration::from_secs_f64(seconds).max(LIFE_MIN).mul_f64(0.9);
    Ok(Some(Token { value: bearer(party, &text)?, fetched: Instant::now(), expires: Instant::now() + life }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes() {
        assert_eq!(Access::pull("a/b").scopes(), ["repository:a/b:pull"]);
        assert_eq!(Access::mount("a", "b").scopes(), ["repository:a:pull,push", "repository:b:pull"]);
        assert!(Access::default().scopes().is_empty());
        for (own, other, expect) in [
            ("repository:x:pull,push", "repository:x:pull", true),
            ("repository:x:pull,push", "repository:x:push,pull", true),
            ("repository:x:pull", "repository:x:pull,push", false),
            ("repository:x:pull", "repository:y:pull", false),
            ("aws", "aws", true),
        ] {
            assert_eq!(covers(own, other), expect, "{own} {other}");
        }
    }
}
