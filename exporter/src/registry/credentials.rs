//! Who we are to a registry: docker's configuration files, containers' `auth.json`, and credential helpers.
//!
//! Sources are asked in the order of the options; within one, the helper of the host, then the entries (the longest
//! path first: `host/team/app`, `host/team`, `host`), then the general store. Nothing is read and no helper is started
//! before a registry has asked who we are, and then once per host for an hour.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{Error, Result};

/// Helpers talk to key rings and clouds; a hanging one must not hang a build.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
const ANSWER_LIFE: Duration = Duration::from_secs(3600);
const HELPER_OUTPUT_MAX: u64 = 64 * 1024;
const CONFIG_MAX: u64 = 4 * 1024 * 1024;

/// A string that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    Password {
        user: String,
        password: Secret,
    },
    /// An OAuth2 refresh token, to be changed for access tokens.
    Identity(Secret),
    /// A bearer token to be sent as it is.
    Token(Secret),
}

impl Credentials {
    pub fn password(user: impl Into<String>, password: impl Into<String>) -> Credentials {
        Credentials::Password { user: user.into(), password: Secret::new(password) }
    }

    /// `Basic …`, if there is a password to send.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Credentials::Password { user, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{}", password.expose()))))
            }
            Credentials::Identity(_) | Credentials::Token(_) => None,
        }
    }
}

/// `config.json` of docker, `auth.json` of containers, and the value of `DOCKER_AUTH_CONFIG`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Option<Entry>>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// The places to look, and what helpers have said.
#[derive(Debug, Default)]
pub(super) struct Sources {
    /// Given by the caller for a registry: first.
    pub given: Vec<(String, Credentials)>,
    /// `DOCKER_AUTH_CONFIG`.
    pub text: Option<Secret>,
    pub files: Vec<PathBuf>,
    /// By helper and host: a helper is slow, and knows nothing of repositories.
    pub answers: Mutex<HashMap<(String, String), Answer>>,
}

#[derive(Clone, Debug)]
pub(super) struct Answer {
    credentials: Option<Credentials>,
    given: Instant,
}

/// Whose credentials are asked for, and since when older answers are worth nothing.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub registry: &'a str,
    pub repository: &'a str,
    pub refused: Option<Instant>,
}

impl Sources {
    /// What is known for a repository; `None` is anonymous.
    pub(super) async fn find(&self, wanted: Wanted<'_>) -> Result<Option<Credentials>> {
        let host = host_key(wanted.registry);
        if let Some((_, given)) = self.given.iter().find(|(key, _)| host_key(key) == host) {
            return Ok(Some(given.clone()));
        }
        if let Some(text) = &self.text {
            let place = "the given docker auth config";
            let config = parse_config(place, text.expose().as_bytes(), false)?;
            if let Some(found) = self.in_config(&config, place, wanted).await? {
                return Ok(Some(found));
            }
        }
        for file in &self.files {
            let Some(config) = read_config(file).await? else { continue };
            if let Some(found) = self.in_config(&config, &file.display().to_string(), wanted).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn in_config(&self, config: &Config, place: &str, wanted: Wanted<'_>) -> Result<Option<Credentials>> {
        let host = host_key(wanted.registry);
        if let Some((_, helper)) = config.cred_helpers.iter().find(|(key, _)| host_key(key) == host) {
            return self.ask_helper(helper, &host, wanted.refused).await;
        }
        if let Some(found) = in_entries(&config.auths, place, &format!("{host}/{}", wanted.repository))? {
            return Ok(Some(found));
        }
        match config.creds_store.as_deref().filter(|name| !name.is_empty()) {
            Some(helper) => self.ask_helper(helper, &host, wanted.refused).await,
            None => Ok(None),
        }
    }

    async fn ask_helper(&self, name: &str, host: &str, refused: Option<Instant>) -> Result<Option<Credentials>> {
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
            return Err(bad(&format!("{name:?}"), "not the name of a credential helper"));
        }
        let key = (format!("docker-credential-{name}"), host.to_owned());
        let known = self.answers.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        let fresh = |answer: &Answer| {
            refused.is_none_or(|refused| answer.given > refused) && answer.given.elapsed() < ANSWER_LIFE
        };
        if let Some(answer) = known.filter(fresh) {
            return Ok(answer.credentials);
        }
        let credentials = helper_credentials(&key.0, host).await?;
        let answer = Answer { credentials: credentials.clone(), given: Instant::now() };
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(key, answer);
        Ok(credentials)
    }
}

fn bad(place: &str, reason: impl fmt::Display) -> Error {
    Error::Credentials { place: place.to_owned(), reason: reason.to_string() }
}

async fn read_config(path: &Path) -> Result<Option<Config>> {
    let place = path.display().to_string();
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(&place, error)),
    };
    let mut bytes = Vec::new();
    file.take(CONFIG_MAX).read_to_end(&mut bytes).await.map_err(|error| bad(&place, error))?;
    let legacy = path.file_name().is_some_and(|name| name == ".dockercfg");
    parse_config(&place, &bytes, legacy).map(Some)
}

fn parse_config(place: &str, bytes: &[u8], legacy: bool) -> Result<Config> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Config::default());
    }
    // serde's messages may quote what stands there, which may be a password: only the position is passed on.
    let position =
        |e: serde_json::Error| bad(place, format!("not valid JSON at line {}, column {}", e.line(), e.column()));
    match legacy {
        true => Ok(Config { auths: serde_json::from_slice(bytes).map_err(position)?, ..Config::default() }),
        false => serde_json::from_slice(bytes).map_err(position),
    }
}

/// `https://index.docker.io/v1/` is `docker.io`: scheme, API version and Docker Hub's other names do not count.
fn host_key(key: &str) -> String {
    let key = key.trim();
    let key = key.strip_prefix("https://").or(key.strip_prefix("http://")).unwrap_or(key).trim_end_matches('/');
    let key = key.strip_suffix("/v1").or(key.strip_suffix("/v2")).unwrap_or(key);
    let (host, path) = key.split_once('/').map_or((key, ""), |(host, path)| (host, path));
    let host = match host.to_ascii_lowercase().as_str() {
        "index.docker.io" | "registry-1.docker.io" | "registry.docker.io" | "docker.io" => "docker.io".to_owned(),
        other => other.strip_suffix(":443").unwrap_or(other).to_owned(),
    };
    if path.is_empty() { host } else { format!("{host}/{path}") }
}

/// The entry with the longest path that `key` begins with.
fn in_entries(entries: &BTreeMap<String, Option<Entry>>, place: &str, mut key: &str) -> Result<Option<Credentials>> {
    loop {
        for (name, entry) in entries.iter().filter(|(name, _)| host_key(name) == key) {
            let found = entry.as_ref().map(|entry| entry_credentials(entry, place, name)).transpose()?;
            if let Some(found) = found.flatten() {
                return Ok(Some(found));
            }
        }
        match key.rsplit_once('/') {
            Some((shorter, _)) => key = shorter,
            None => return Ok(None),
        }
    }
}

fn entry_credentials(entry: &Entry, place: &str, name: &str) -> Result<Option<Credentials>> {
    let non_empty = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if let Some(token) = non_empty(&entry.registrytoken) {
        return Ok(Some(Credentials::Token(Secret(token))));
    }
    if let Some(token) = non_empty(&entry.identitytoken) {
        return Ok(Some(Credentials::Identity(Secret(token))));
    }
    let Some(auth) = non_empty(&entry.auth) else {
        return Ok(non_empty(&entry.username)
            .map(|user| Credentials::password(user, entry.password.clone().unwrap_or_default())));
    };
    let auth = auth.trim();
    let malformed = || bad(place, format!("the auth entry of {name} is not base64 of user:password"));
    let decoded = STANDARD.decode(auth).or_else(|_| STANDARD_NO_PAD.decode(auth)).map_err(|_| malformed())?;
    let text = String::from_utf8(decoded).map_err(|_| malformed())?;
    let (user, password) = text.split_once(':').ok_or_else(malformed)?;
    Ok(Some(Credentials::password(user, password.trim_matches('\0'))))
}

/// docker-credential-helpers: `docker-credential-NAME get`, the server's URL on stdin, JSON on stdout.
async fn helper_credentials(program: &str, host: &str) -> Result<Option<Credentials>> {
    let server = if host == "docker.io" { "https://index.docker.io/v1/" } else { host };
    let (output, success) = tokio::time::timeout(HELPER_TIMEOUT, run_helper(program, server))
        .await
        .map_err(|_| bad(program, format!("gave no answer for {host} within {} s", HELPER_TIMEOUT.as_secs())))??;
    if !success {
        let text = super::error::printable(&String::from_utf8_lossy(&output), 300);
        return match text.to_lowercase().contains("credentials not found") {
            true => Ok(None),
            false => Err(bad(program, format!("failed for {host}: {text}"))),
        };
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Output {
        #[serde(default)]
        username: String,
        #[serde(default)]
        secret: String,
    }
    let answer: Output =
        serde_json::from_slice(&output).map_err(|_| bad(program, "its answer is not the JSON of a helper"))?;
    Ok(match (answer.username.as_str(), answer.secret) {
        ("", secret) if secret.is_empty() => None,
        ("<token>", secret) => Some(Credentials::Identity(Secret(secret))),
        (user, secret) => Some(Credentials::password(user, secret)),
    })
}

async fn run_helper(program: &str, server: &str) -> Result<(Vec<u8>, bool)> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            bad(program, "not found in PATH: install it, or remove it from the docker config")
        }
        _ => bad(program, error),
    };
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(server.as_bytes()).await {
            // A helper that does not read its input may still answer.
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(failed(error)),
            _ => drop(stdin),
        }
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(HELPER_OUTPUT_MAX).read_to_end(&mut output).await.map_err(failed)?;
    }
    let status = child.wait().await.map_err(failed)?;
    Ok((output, status.success()))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn find(text: &str, registry: &str, repository: &str) -> Result<Option<Credentials>> {
        let sources = Sources { text: Some(Secret::new(text)), ..Sources::default() };
        sources.find(Wanted { registry, repository, refused: None }).await
    }

    #[tokio::test]
    async fn entries_are_found_in_every_form() {
        let password = |user: &str, password: &str| Some(Credentials::password(user, password));
        let hub = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpw"}}}"#;
        let paths = r#"{"auths":{"h":{"auth":"dTpw"},"h/team":{"username":"t","password":"q"},"h/team/app":{"identitytoken":"i"}}}"#;
        for (text, registry, repository, expect) in [
            (hub, "docker.io", "library/x", password("u", "p")),
            (hub, "h", "x", None),
            (paths, "h", "other/x", password("u", "p")),
            (paths, "h", "team/x", password("t", "q")),
            (paths, "h", "team/app", Some(Credentials::Identity(Secret::new("i")))),
            (paths, "h", "teams/app", password("u", "p")),
            (r#"{"auths":{"https://H:5000/v2/":{"auth":"dTpwOnE="}}}"#, "h:5000", "x", password("u", "p:q")),
            (r#"{"auths":{"h":{"auth":"dTpwAAA"}}}"#, "h", "x", password("u", "p")),
            (r#"{"auths":{"h:443":{"registrytoken":"r"}}}"#, "h", "x", Some(Credentials::Token(Secret::new("r")))),
            (r#"{"auths":{"h":{}},"HttpHeaders":{"a":"b"}}"#, "h", "x", None),
            (r#"{"auths":{"h":null}}"#, "h", "x", None),
            ("{}", "h", "x", None),
            ("", "h", "x", None),
        ] {
            assert_eq!(find(text, registry, repository).await.unwrap(), expect, "{text} {registry} {repository}");
        }
    }

    #[tokio::test]
    async fn malformed_configurations_are_named_without_their_secrets() {
        for (text, expect) in [
            (r#"{"auths":{"h":{"auth":"SECRET!"}}}"#, "the auth entry of h is not base64"),
            (r#"{"auths":{"h":"SECRET"}}"#, "not valid JSON at line 1"),
            (r#"{"auths":{"h":{"auth":"bm9jb2xvbg=="}}}"#, "not base64 of user:password"),
            (r#"{"credHelpers":{"h":"../../bin/SECRET"}}"#, "not the name of a credential helper"),
            (r#"{"credsStore":"forge-test-missing"}"#, "not found in PATH"),
        ] {
            let error = find(text, "h", "x").await.expect_err(text).to_string();
            assert!(error.contains(expect), "{text}: {error}");
            assert!(!error.contains("SECRET") || text.contains("bin/SECRET"), "{error}");
        }
        assert_eq!(format!("{:?}", Credentials::password("u", "SECRET")), r#"Password { user: "u", password: *** }"#);
    }

    #[tokio::test]
    async fn files_are_asked_in_order_and_may_be_missing() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let files = vec![
            directory.path().join("missing.json"),
            file("config.json", r#"{"auths":{"a":{"username":"first","password":"p"}}}"#),
            file("auth.json", r#"{"auths":{"a":{"username":"second"},"b":{"username":"b","password":"p"}}}"#),
            file(".dockercfg", r#"{"https://c/v1/":{"auth":"dTpw","email":"x"}}"#),
        ];
        let sources = Sources { files, ..Sources::default() };
        for (host, user) in [("a", Some("first")), ("b", Some("b")), ("c", Some("u")), ("d", None)] {
            let found = match sources.find(Wanted { registry: host, repository: "x", refused: None }).await.unwrap() {
                Some(Credentials::Password { user, .. }) => Some(user),
                _ => None,
            };
            assert_eq!(found.as_deref(), user);
        }
    }

    #[tokio::test]
    async fn a_helper_is_not_asked_again_until_its_answer_is_refused() {
        let given = Instant::now();
        let answer = Answer { credentials: Some(Credentials::password("u", "p")), given };
        let key = ("docker-credential-forge-test-missing".to_owned(), "h".to_owned());
        let sources = Sources {
            text: Some(Secret::new(r#"{"credHelpers":{"https://h":"forge-test-missing"}}"#)),
            answers: Mutex::new(HashMap::from([(key, answer)])),
            ..Sources::default()
        };
        let find = |refused| sources.find(Wanted { registry: "h", repository: "x", refused });
        assert_eq!(find(None).await.unwrap(), Some(Credentials::password("u", "p")));
        assert!(find(given.checked_sub(Duration::from_secs(1))).await.unwrap().is_some());
        assert!(find(Some(Instant::now())).await.unwrap_err().to_string().contains("not found in PATH"));
    }

    #[tokio::test]
    async fn helpers_are_asked_by_their_protocol() {
        let directory = tempfile::tempdir().unwrap();
        for (name, script, host, expect) in [
            ("user", r#"read s || :; [ "$1" = get ] && echo "{\"Username\":\"$s\",\"Secret\":\"p\"}""#, "h", "user h"),
            (
                "hub",
                r#"read s || :; echo "{\"Username\":\"$s\",\"Secret\":\"p\"}""#,
                "docker.io",
                "user https://index.docker.io/v1/",
            ),
            ("token", r#"echo '{"Username":"<token>","Secret":"SECRET"}'"#, "h", "identity"),
            ("none", "echo 'credentials not found in native keychain'; exit 1", "h", "nothing"),
            ("deaf", r#"exec <&-; echo '{"Username":"u","Secret":"p"}'"#, "h", "user u"),
            ("broken", "echo 'no key ring'; exit 1", "h", "failed for h: no key ring"),
            ("chatty", "echo SECRET", "h", "its answer is not the JSON of a helper"),
        ] {
            let path = directory.path().join(name);
            // Written by another process: one that has it open for writing while it forks could not execute it.
            let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$2" && chmod 755 "$2""#;
            let written =
                std::process::Command::new("sh").args(["-c", write, "sh", script]).arg(&path).status().unwrap();
            assert!(written.success());
            let found = match helper_credentials(path.to_str().unwrap(), host).await {
                Ok(None) => "nothing".to_owned(),
                Ok(Some(Credentials::Identity(_))) => "identity".to_owned(),
                Ok(Some(Credentials::Password { user, .. })) => format!("user {user}"),
                Ok(Some(Credentials::Token(_))) => "token".to_owned(),
                Err(error) => error.to_string(),
            };
            assert!(found.contains(expect) && !found.contains("SECRET"), "{name}: {found}");
        }
    }
}
