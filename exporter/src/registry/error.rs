//! What a registry refused, and what to do about it.
//!
//! An [`Error`] names the method and the URL without its query (queries carry signatures and upload states), the
//! status, the registry's own words, and a hint. It never holds a header that was sent, so no secret can be in it.

use std::error::Error as _;
use std::fmt;

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use url::Url;

/// How much of a registry's own words is shown.
const WORDS_MAX: usize = 4096;

/// One request that did not do what it was for.
#[derive(Debug)]
pub struct Error(Box<Report>);

#[derive(Debug)]
struct Report {
    method: Method,
    url: String,
    cause: Cause,
    hint: Option<String>,
}

/// Why; the variants are what callers decide on.
#[derive(Debug)]
pub enum Cause {
    /// The registry answered, and not with what was asked for.
    Status { status: StatusCode, words: String, request_id: Option<String> },
    /// No connection: nothing listens there, or the name is not known.
    Unreachable(String),
    /// The host's certificate is not one that we trust.
    Untrusted(String),
    /// No answer came, or it broke off.
    Transport(String),
    /// An answer came that must not be believed or followed.
    Refused(String),
}

impl Error {
    fn new(method: &Method, url: &Url, cause: Cause, hint: Option<String>) -> Error {
        Error(Box::new(Report { method: method.clone(), url: shown(url), cause, hint }))
    }

    pub(super) fn status(method: &Method, url: &Url, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Error {
        let words = registry_words(body);
        let hint = status_hint(method, url, status, &words);
        let request_id = ["x-amzn-requestid", "x-github-request-id", "x-request-id", "docker-distribution-request-id"]
            .iter()
            .find_map(|name| Some(printable(headers.get(*name)?.to_str().ok()?, 100)));
        Error::new(method, url, Cause::Status { status, words, request_id }, hint)
    }

    pub(super) fn transport(method: &Method, url: &Url, error: reqwest::Error) -> Error {
        let error = error.without_url();
        let mut text = error.to_string();
        let mut source = error.source();
        let mut refused = false;
        while let Some(inner) = source {
            let io = inner.downcast_ref::<std::io::Error>();
            refused |= io.is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused);
            let inner_text = inner.to_string();
            if !text.contains(&inner_text) {
                text = format!("{text}: {inner_text}");
            }
            source = inner.source();
        }
        let (cause, hint) = transport_cause(url, text, refused);
        Error::new(method, url, cause, hint)
    }

    pub(super) fn stalled(method: &Method, url: &Url, limit: std::time::Duration) -> Error {
        let text = format!("nothing has moved for {limit:?}");
        Error::new(method, url, Cause::Transport(text), None)
    }

    pub(super) fn refused(method: &Method, url: &Url, reason: impl Into<String>) -> Error {
        Error::new(method, url, Cause::Refused(reason.into()), None)
    }

    pub(super) fn with_hint(mut self, hint: impl Into<String>) -> Error {
        self.0.hint = Some(hint.into());
        self
    }

    /// Whether it may go better another time without anything having been changed.
    pub(super) fn is_break(&self) -> bool {
        matches!(self.0.cause, Cause::Transport(_))
    }

    pub(super) fn is_unreachable(&self) -> bool {
        matches!(self.0.cause, Cause::Unreachable(_))
    }

    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// The status that the registry answered with, if it answered.
    pub fn code(&self) -> Option<u16> {
        match &self.0.cause {
            Cause::Status { status, .. } => Some(status.as_u16()),
            _ => None,
        }
    }

    /// The registry's own words, in lower case, for telling apart what shares a status.
    pub(super) fn says(&self, any: &[&str]) -> bool {
        let Cause::Status { words, .. } = &self.0.cause else { return false };
        let words = words.to_lowercase();
        any.iter().any(|text| words.contains(text))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: ", self.0.method, self.0.url)?;
        match &self.0.cause {
            Cause::Status { status, words, request_id } => {
                write!(f, "{status}")?;
                if !words.is_empty() {
                    write!(f, ": {words}")?;
                }
                if let Some(id) = request_id {
                    write!(f, " (request id {id})")?;
                }
            }
            Cause::Unreachable(text) | Cause::Untrusted(text) | Cause::Transport(text) | Cause::Refused(text) => {
                f.write_str(text)?;
            }
        }
        match &self.0.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// A URL as it may be shown: without user, password, query and fragment.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Both fail only for URLs that cannot have a user, and those carry none.
    if url.set_username("").is_err() || url.set_password(None).is_err() {
        return format!("{}:", url.scheme());
    }
    url.to_string()
}

/// Control characters from outside never reach a terminal.
pub(super) fn printable(text: &str, limit: usize) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(limit).collect();
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// distribution-spec "Error Codes": `{"errors": [{"code", "message", "detail"}]}`; token servers write
/// `{"details": …}` or `{"error", "error_description"}`; proxies write pages.
fn registry_words(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        errors: Vec<Item>,
        details: Option<Value>,
        error: Option<Value>,
        error_description: Option<String>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: Value,
        message: Option<String>,
        detail: Option<Value>,
    }
    let flat = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let Ok(parsed) = serde_json::from_slice::<Body>(body) else {
        return printable(&without_tags(&String::from_utf8_lossy(body)), WORDS_MAX);
    };
    let mut parts: Vec<String> = Vec::new();
    for item in &parsed.errors {
        let fields = [
            flat(&item.code),
            item.message.clone().unwrap_or_default(),
            item.detail.as_ref().map_or_else(String::new, flat),
        ];
        parts.push(fields.into_iter().filter(|field| !field.is_empty()).collect::<Vec<_>>().join(": "));
    }
    let rest = [parsed.details.as_ref().map(flat), parsed.error.as_ref().map(flat), parsed.error_description];
    parts.extend(rest.into_iter().flatten().filter(|text| !text.is_empty()));
    printable(&parts.join("; "), WORDS_MAX)
}

/// A proxy's HTML page, reduced to what it says.
fn without_tags(text: &str) -> String {
    if !text.trim_start().starts_with('<') {
        return text.to_owned();
    }
    let mut words = String::new();
    let mut inside = false;
    for c in text.chars() {
        match c {
            '<' => inside = true,
            '>' => {
                inside = false;
                words.push(' ');
            }
            c if !inside => words.push(c),
            _ => {}
        }
    }
    words
}

fn status_hint(method: &Method, url: &Url, status: StatusCode, words: &str) -> Option<String> {
    let host = host_port(url);
    let words = words.to_lowercase();
    let immutable = ["immutable", "tag_already_exists", "image_tag_already_exists"].iter().any(|w| words.contains(w));
    Some(match status.as_u16() {
        _ if immutable => "the tag is immutable there: push under another tag".to_owned(),
        404 if *method == Method::POST => {
            format!("the repository may not exist on {host}: create it there first, or log in: forge login {host}")
        }
        401 | 403 | 404 => format!(
            "it may not exist, be private, or need other credentials (registries do not tell these apart): \
             check the name, or log in: forge login {host}"
        ),
        407 => "a proxy wants credentials: put them into the proxy's URL in HTTPS_PROXY".to_owned(),
        413 => "something in front of the registry limits the size of requests".to_owned(),
        429 => "the registry limits the rate: wait, or log in for a higher limit".to_owned(),
        507 => "the registry's storage is full".to_owned(),
        _ => return None,
    })
}

fn transport_cause(url: &Url, text: String, refused: bool) -> (Cause, Option<String>) {
    let host = host_port(url);
    let lower = text.to_lowercase();
    if lower.contains("certificate") || lower.contains("unknownissuer") {
        let hint = format!(
            "put the CA certificate of {host} (PEM) into /etc/docker/certs.d/{host}/ca.crt, \
             or list {host} as insecure if it must not be checked"
        );
        return (Cause::Untrusted(text), Some(hint));
    }
    if refused {
        let hint = format!("nothing listens on {host}: is the registry running, and is that its port?");
        return (Cause::Unreachable(text), Some(hint));
    }
    if lower.contains("dns") || lower.contains("failed to lookup") {
        let hint = format!("the name {host} could not be resolved: check it and the network");
        return (Cause::Unreachable(text), Some(hint));
    }
    (Cause::Transport(text), None)
}

/// Host and port as people write them: the port only where it is not the scheme's own.
pub(super) fn host_port(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => url.scheme().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registrys_own_words_are_found_in_every_form() {
        for (body, expect) in [
            (r#"{"errors":[{"code":"DENIED","message":"no","detail":{"a":1}}]}"#, r#"DENIED: no: {"a":1}"#),
            (r#"{"errors":[{"code":"A"},{"message":"b"}]}"#, "A; b"),
            (r#"{"details":"incorrect username or password"}"#, "incorrect username or password"),
            (r#"{"error":"invalid_grant","error_description":"old"}"#, "invalid_grant; old"),
            ("<html><h1>413 Request\nEntity</h1></html>", "413 Request Entity"),
            ("Too Many\x1b[31m Requests", "Too Many [31m Requests"),
            ("", ""),
        ] {
            assert_eq!(registry_words(body.as_bytes()), expect);
        }
        assert!(registry_words("x".repeat(100_000).as_bytes()).len() <= WORDS_MAX);
    }

    #[test]
    fn urls_are_shown_without_their_secrets() {
        let url: Url = "https://user:pass@host:5000/v2/x/blobs/uploads/1?_state=SECRET#f".parse().unwrap();
        assert_eq!(shown(&url), "https://host:5000/v2/x/blobs/uploads/1");
        let error = Error::status(&Method::POST, &url, StatusCode::NOT_FOUND, &HeaderMap::new(), b"");
        let text = format!("{error} {error:?}");
        assert!(text.contains("create it") && !text.contains("SECRET") && !text.contains("pass@"), "{text}");
    }
}
