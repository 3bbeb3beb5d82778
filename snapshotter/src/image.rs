//! What images are called and what they say of themselves.
//!
//! [`Reference`] is a name as people type it, made canonical; [`Platform`] is where an image runs;
//! [`ImageConfig`] is the OCI image configuration kept lossless: fields that forge does not know
//! survive a round trip (`oci-spec` drops Docker's `Healthcheck`, `OnBuild`, `Shell` and others).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Digest;

/// `registry/repository[:tag][@digest]`, canonical: `alpine` is `docker.io/library/alpine:latest`.
///
/// Grammar: distribution-spec "Pulling manifests", and distribution/reference for the host part.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid reference {text:?}: {reason}")]
pub struct InvalidReference {
    pub text: String,
    pub reason: String,
}

/// distribution/reference: `NameTotalLengthMax`.
const NAME_LENGTH_MAX: usize = 255;
const TAG_LENGTH_MAX: usize = 128;

impl Reference {
    /// Host and port, `docker.io` where none was given.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path within the registry, such as `library/alpine`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference { digest: Some(digest), ..self.clone() }
    }

    /// The same repository under another tag; the caller has checked it with [`valid_tag`].
    pub fn with_tag(&self, tag: &str) -> Result<Reference, InvalidReference> {
        if !valid_tag(tag) {
            return Err(invalid(
                tag,
                "a tag is up to 128 letters, digits, '_', '.' and '-', and does not start with '.' or '-'",
            ));
        }
        Ok(Reference { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    /// As people write it: `alpine:latest`, not `docker.io/library/alpine:latest`.
    pub fn familiar(&self) -> String {
        let text = self.to_string();
        match text.strip_prefix("docker.io/") {
            Some(rest) => rest.strip_prefix("library/").unwrap_or(rest).to_owned(),
            None => text,
        }
    }
}

fn invalid(text: &str, reason: impl Into<String>) -> InvalidReference {
    InvalidReference { text: text.chars().take(300).collect(), reason: reason.into() }
}

/// distribution-spec: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
pub fn valid_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=TAG_LENGTH_MAX).contains(&tag.len())
        && word(tag.as_bytes()[0])
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn valid_component(component: &str) -> bool {
    let bytes = component.as_bytes();
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if !bytes.first().is_some_and(alphanumeric) || !bytes.last().is_some_and(alphanumeric) {
        return false;
    }
    component
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

fn valid_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if address.parse::<std::net::Ipv6Addr>().is_ok() => ("ipv6", port),
            _ => return false,
        },
        None => match host.find(':') {
            Some(colon) => host.split_at(colon),
            None => (host, ""),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.split('.').all(label)
        && (port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok()))
}

fn is_host(first: &str) -> bool {
    first == "localhost"
        || first.starts_with('[')
        || first.contains(['.', ':'])
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Reference, InvalidReference> {
        if text.is_empty() {
            return Err(invalid(text, "it is empty"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|e| invalid(text, format!("{e}")))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        let name_start = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[name_start..].find(':') {
            Some(colon) => (&rest[..name_start + colon], Some(&rest[name_start + colon + 1..])),
            None => (rest, None),
        };
        if let Some(tag) = tag.filter(|tag| !valid_tag(tag)) {
            return Err(invalid(
                text,
                format!(
                    "{tag:?} is not a tag: up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'"
                ),
            ));
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, repository)) if is_host(first) => (first, repository.to_owned()),
            Some(_) => ("docker.io", name.to_owned()),
            None => ("docker.io", format!("library/{name}")),
        };
        let registry = match registry {
            "index.docker.io" | "registry-1.docker.io" => "docker.io",
            other => other,
        };
        let repository = match repository.contains('/') || registry != "docker.io" {
            true => repository,
            false => format!("library/{repository}"),
        };
        check_name(text, name, registry, &repository)?;
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
    }
}

fn check_name(text: &str, name: &str, registry: &str, repository: &str) -> Result<(), InvalidReference> {
    if !valid_host(registry) {
        return Err(invalid(text, format!("{registry:?} is not a registry host")));
    }
    if registry.len() + 1 + repository.len() > NAME_LENGTH_MAX {
        return Err(invalid(text, format!("the name is longer than {NAME_LENGTH_MAX} characters")));
    }
    if name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(invalid(text, "64 hexadecimal digits are an image id, not a name"));
    }
    if repository.split('/').all(valid_component) {
        return Ok(());
    }
    let lower = text.to_lowercase();
    if lower != text && repository.to_lowercase().split('/').all(valid_component) {
        return Err(invalid(text, format!("a repository name must be lower case: {lower:?}")));
    }
    Err(invalid(text, "a repository name is lower-case letters and digits, separated by '.', '_', '__', '-' or '/'"))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Where an image runs: `os/architecture[/variant]`, normalised as containerd does
/// (`x86_64` is `amd64`, `aarch64` and `arm64/v8` are `arm64`, `armhf` is `arm/v7`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("invalid platform {0:?}: expected os/architecture[/variant], such as linux/amd64 or linux/arm/v7")]
pub struct InvalidPlatform(String);

impl Platform {
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Platform {
        let (architecture, variant) = match (architecture, variant.filter(|v| !v.is_empty())) {
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant.filter(|v| *v != "v1")),
            ("aarch64" | "arm64", variant) => ("arm64", variant.filter(|v| *v != "8" && *v != "v8")),
            ("armhf", _) => ("arm", Some("v7")),
            ("armel", _) => ("arm", Some("v6")),
            ("arm", None | Some("7")) => ("arm", Some("v7")),
            ("arm", Some("5")) => ("arm", Some("v5")),
            ("arm", Some("6")) => ("arm", Some("v6")),
            ("arm", Some("8")) => ("arm", Some("v8")),
            ("i386", _) => ("386", None),
            (architecture, variant) => (architecture, variant),
        };
        Platform { os: os.to_owned(), architecture: architecture.to_owned(), variant: variant.map(str::to_owned) }
    }

    /// The platform of the machine this program was built for.
    pub fn host() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "powerpc64" => "ppc64le",
            other => other,
        };
        Platform::new("linux", architecture, None)
    }
}

impl FromStr for Platform {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Platform, InvalidPlatform> {
        let part =
            |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let lower = text.to_ascii_lowercase();
        let parts: Vec<&str> = lower.split('/').collect();
        if !parts.iter().all(|p| part(p)) {
            return Err(InvalidPlatform(text.to_owned()));
        }
        match parts[..] {
            ["linux"] => Ok(Platform::host()),
            [
                architecture @ ("amd64" | "arm64" | "arm" | "386" | "riscv64" | "s390x" | "ppc64le" | "x86_64"
                | "aarch64"),
            ] => Ok(Platform::new("linux", architecture, None)),
            [os, architecture] => Ok(Platform::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Platform::new(os, architecture, Some(variant))),
            _ => Err(InvalidPlatform(text.to_owned())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// The OCI image configuration (`application/vnd.oci.image.config.v1+json`), lossless.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub config: RuntimeConfig,
    #[serde(default)]
    pub rootfs: RootFs,
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<History>,
    /// What forge does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl ImageConfig {
    /// Where it runs; what it does not say is taken for this machine's, as docker does.
    pub fn platform(&self) -> Platform {
        let host = Platform::host();
        let os = if self.os.is_empty() { &host.os } else { &self.os };
        let architecture = if self.architecture.is_empty() { &host.architecture } else { &self.architecture };
        Platform::new(os, architecture, self.variant.as_deref())
    }
}

/// The part of the configuration that a container starts with (`config` in the OCI document).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RuntimeConfig {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, Empty>,
    /// `NAME=value`, in order.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args_escaped: Option<bool>,
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, Empty>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub on_build: Vec<String>,
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<Vec<String>>,
    /// What forge does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl RuntimeConfig {
    /// The value of an environment variable; the last one of its name counts.
    pub fn env_value(&self, name: &str) -> Option<&str> {
        self.env.iter().rev().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// Sets a variable in place, or appends it.
    pub fn set_env(&mut self, name: &str, value: &str) {
        let pair = format!("{name}={value}");
        let place = self.env.iter().position(|old| old.split('=').next() == Some(name));
        match place {
            Some(index) => self.env[index] = pair,
            None => self.env.push(pair),
        }
    }
}

/// `{}`: the value type of Go's `map[string]struct{}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// Docker's `HEALTHCHECK`; durations are nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Healthcheck {
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub test: Vec<String>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub interval: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub timeout: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub start_period: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub start_interval: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retries: i64,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RootFs {
    #[serde(rename = "type", default)]
    pub kind: String,
    #[serde(default, deserialize_with = "or_default")]
    pub diff_ids: Vec<Digest>,
}

impl Default for RootFs {
    fn default() -> RootFs {
        RootFs { kind: "layers".to_owned(), diff_ids: Vec::new() }
    }
}

/// One line of `forge history`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Go writes `null` for an empty list or map.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_become_canonical() {
        let cases = [
            ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
            ("foo/bar", "docker.io/foo/bar:latest", "foo/bar:latest"),
            ("index.docker.io/library/x", "docker.io/library/x:latest", "x:latest"),
            ("docker.io/x", "docker.io/library/x:latest", "x:latest"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            ("127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t"),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
            ("HOST/x", "HOST/x:latest", "HOST/x:latest"),
            ("a__b/c--d.e", "docker.io/a__b/c--d.e:latest", "a__b/c--d.e:latest"),
        ];
        for (text, canonical, familiar) in cases {
            let reference: Reference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(reference.to_string(), canonical);
            assert_eq!(reference.familiar(), familiar);
            assert_eq!(reference.to_string().parse::<Reference>().as_ref(), Ok(&reference));
        }
        let hex = "a".repeat(64);
        let pinned: Reference = format!("alpine@sha256:{hex}").parse().expect("valid");
        assert_eq!((pinned.tag(), pinned.digest().map(Digest::hex)), (None, Some(hex.as_str())));
    }

    #[test]
    fn bad_references_say_why() {
        for (text, reason) in [
            ("", "empty"),
            ("Alpine", "lower case"),
            ("a/B", "lower case"),
            ("x:", "not a tag"),
            ("x:-t", "not a tag"),
            ("a//b", "repository name"),
            ("-a", "repository name"),
            ("a___b", "repository name"),
            ("host:port/x", "registry host"),
            ("x@sha256:12", "invalid digest"),
            (&"a".repeat(64), "image id"),
            (&"a/".repeat(200), "longer"),
        ] {
            let error = text.parse::<Reference>().expect_err(text);
            assert!(error.reason.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn platforms_are_normalised() {
        for (text, expect) in [
            ("linux/x86_64", "linux/amd64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("Linux/AMD64", "linux/amd64"),
            ("arm64", "linux/arm64"),
        ] {
            assert_eq!(text.parse::<Platform>().expect(text).to_string(), expect);
        }
        for bad in ["", "/", "linux/", "a/b/c/d", "linux/am d64"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn image_config_keeps_unknown_fields() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Env":["A=1"],"Cmd":["sh"],"StopTimeout":3,"Labels":null},"rootfs":{"type":"layers","diff_ids":[]},"moby.buildkit.cache.v0":"eA=="}"#;
        let config: ImageConfig = serde_json::from_str(text).expect("valid");
        let value = serde_json::to_value(&config).expect("serialises");
        assert_eq!(value["moby.buildkit.cache.v0"], "eA==");
        assert_eq!(value["config"]["StopTimeout"], 3);
    }

    #[test]
    fn a_config_that_names_no_platform_is_for_this_machine() {
        let config: ImageConfig = serde_json::from_str(r#"{"rootfs":{"type":"layers"}}"#).expect("valid");
        assert_eq!(config.platform(), Platform::host());
    }
}
