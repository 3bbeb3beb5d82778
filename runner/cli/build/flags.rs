//! Flags that need more than clap: key-value pairs, sizes, secrets, entitlements.

use std::collections::BTreeMap;
use std::path::PathBuf;

use forge_frontend::Request;
use forge_solver::graph::image::Platform;
use forge_solver::graph::{Graph, Network, Op, Security, Ulimit, Unkeyed};

use super::context::BuildContext;
use super::{Arguments, network};
use crate::cli::{Failure, Result};
use crate::container::{SecretSource, Secrets};

pub fn request(arguments: &Arguments, context: &BuildContext) -> Result<Request> {
    let build_args = build_args(&arguments.build_args)?;
    Ok(Request {
        target: arguments.target.clone(),
        platforms: platforms(&arguments.platforms)?,
        build_platform: Platform::host(),
        epoch: epoch(&build_args)?,
        contexts: context.named(),
        labels: pairs("--label", &arguments.labels)?,
        network: network(&arguments.network)?,
        hosts: arguments.hosts.iter().map(|host| add_host(host)).collect::<Result<_>>()?,
        unkeyed: unkeyed(arguments, &build_args)?,
        ignore: context.ignore_patterns().to_vec(),
        build_args,
    })
}

pub fn platforms(given: &[String]) -> Result<Vec<Platform>> {
    given.iter().filter(|text| !text.is_empty()).map(|text| text.parse().map_err(Failure::usage)).collect()
}

/// `NAME=VALUE`, or `NAME` for the environment's value (and nothing where it has none).
fn build_args(given: &[String]) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    // buildx hands the variable on by itself.
    if let Ok(epoch) = std::env::var("SOURCE_DATE_EPOCH") {
        all.insert("SOURCE_DATE_EPOCH".to_owned(), epoch);
    }
    for text in given {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text.as_str(), std::env::var(text).ok()),
        };
        if name.is_empty() {
            return Err(Failure::usage(format!("--build-arg {text:?}: expected NAME=VALUE")));
        }
        if let Some(value) = value {
            all.insert(name.to_owned(), value);
        }
    }
    Ok(all)
}

pub fn pairs(flag: &str, given: &[String]) -> Result<BTreeMap<String, String>> {
    let pair = |text: &String| match text.split_once('=') {
        Some(("", _)) => Err(Failure::usage(format!("{flag} {text:?}: expected NAME=VALUE"))),
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Ok((text.clone(), String::new())),
    };
    given.iter().map(pair).collect()
}

fn epoch(build_args: &BTreeMap<String, String>) -> Result<Option<i64>> {
    let Some(text) = build_args.get("SOURCE_DATE_EPOCH").filter(|text| !text.is_empty()) else { return Ok(None) };
    let seconds = text.parse().ok().filter(|seconds| *seconds >= 0);
    match seconds {
        Some(seconds) => Ok(Some(seconds)),
        None => Err(Failure::usage(format!("SOURCE_DATE_EPOCH={text}: expected seconds since 1970"))),
    }
}

/// `name:address` or `name=address`; IPv6 addresses may stand in brackets.
pub fn add_host(text: &str) -> Result<(String, String)> {
    let (name, address) = text.split_once('=').or_else(|| text.split_once(':')).unwrap_or((text, ""));
    let address = address.trim_start_matches('[').trim_end_matches(']');
    let valid = address == "host-gateway" || address.parse::<std::net::IpAddr>().is_ok();
    match valid && !name.is_empty() {
        true => Ok((name.to_owned(), address.to_owned())),
        false => Err(Failure::usage(format!("--add-host {text:?}: expected NAME:ADDRESS"))),
    }
}

fn unkeyed(arguments: &Arguments, build_args: &BTreeMap<String, String>) -> Result<Unkeyed> {
    const PROXIES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];
    let is_proxy = |name: &str| PROXIES.contains(&name.to_ascii_uppercase().as_str());
    Ok(Unkeyed {
        proxy_env: build_args.iter().filter(|(name, _)| is_proxy(name)).map(|(n, v)| (n.clone(), v.clone())).collect(),
        shm_size_bytes: arguments.shm_size.as_deref().map(|text| size("--shm-size", text)).transpose()?,
        ulimits: arguments.ulimits.iter().map(|text| ulimit(text)).collect::<Result<_>>()?,
        memory_bytes: arguments.memory.as_deref().map(|text| size("--memory", text)).transpose()?,
        cpu_quota: None,
        pids: None,
    })
}

/// `64m`, `1GiB`, `1048576`: powers of 1024, as docker reads sizes.
pub fn size(flag: &str, text: &str) -> Result<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: Option<u64> = match &lower[digits.len()..] {
        "" | "b" => Some(1),
        "k" | "kb" | "kib" => Some(1 << 10),
        "m" | "mb" | "mib" => Some(1 << 20),
        "g" | "gb" | "gib" => Some(1 << 30),
        "t" | "tb" | "tib" => Some(1 << 40),
        _ => None,
    };
    let bytes = digits.trim().parse::<f64>().ok().zip(factor).map(|(number, factor)| number * factor as f64);
    match bytes.filter(|bytes| bytes.is_finite() && *bytes >= 0.0) {
        Some(bytes) => Ok(bytes as u64),
        None => Err(Failure::usage(format!("{flag} {text:?}: expected a size such as 64m or 1g"))),
    }
}

/// `name=soft[:hard]`, -1 for no limit.
pub fn ulimit(text: &str) -> Result<Ulimit> {
    let number = |text: &str| match text {
        "-1" | "unlimited" => Some(u64::MAX),
        text => text.parse().ok(),
    };
    let parsed = text.split_once('=').and_then(|(name, limits)| {
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        Some(Ulimit { name: name.to_owned(), soft: number(soft)?, hard: number(hard)? })
    });
    match parsed {
        Some(limit) if limit.soft <= limit.hard => Ok(limit),
        _ => Err(Failure::usage(format!(
            "--ulimit {text:?}: expected NAME=SOFT[:HARD], the soft limit not above the hard one"
        ))),
    }
}

/// Every `--secret` and `--ssh`, by id. Read when a step asks for it, never before.
pub fn secrets(arguments: &Arguments) -> Result<Secrets> {
    let mut secrets = Secrets::default();
    for text in &arguments.secrets {
        let (id, secret) = secret(text)?;
        secrets.secrets.insert(id, secret);
    }
    for text in &arguments.ssh {
        let (id, socket) = text.split_once('=').map_or((text.as_str(), None), |(id, socket)| (id, Some(socket)));
        let socket = socket.map(PathBuf::from).or_else(|| std::env::var_os("SSH_AUTH_SOCK").map(PathBuf::from));
        match socket {
            Some(socket) => drop(secrets.agents.insert(id.to_owned(), socket)),
            None => {
                return Err(Failure::usage(format!("--ssh {text}: SSH_AUTH_SOCK is not set"))
                    .hint("start an agent, or name its socket: --ssh default=/path/to/socket"));
            }
        }
    }
    Ok(secrets)
}

fn secret(text: &str) -> Result<(String, SecretSource)> {
    let (mut id, mut source, mut variable, mut kind) = (None, None, None, None);
    for field in text.split(',') {
        match field.split_once('=') {
            Some(("id", value)) => id = Some(value.to_owned()),
            Some(("src" | "source", value)) => source = Some(PathBuf::from(value)),
            Some(("env", value)) => variable = Some(value.to_owned()),
            Some(("type", value @ ("file" | "env"))) => kind = Some(value),
            _ => {
                return Err(Failure::usage(format!("--secret {text:?}: unexpected {field:?}"))
                    .hint("--secret id=NAME,src=FILE or id=NAME,env=VARIABLE"));
            }
        }
    }
    let Some(id) = id.filter(|id| !id.is_empty()) else {
        return Err(Failure::usage(format!("--secret {text:?}: no id"))
            .hint("--secret id=NAME,src=FILE or id=NAME,env=VARIABLE"));
    };
    let secret = match (kind, source, variable) {
        // buildx: `type=env,src=NAME` names a variable.
        (Some("env"), Some(name), None) => SecretSource::Variable(name.to_string_lossy().into_owned()),
        (Some("env"), None, variable) => SecretSource::Variable(variable.unwrap_or_else(|| id.clone())),
        (_, Some(file), None) => SecretSource::File(file),
        (None, None, Some(variable)) => SecretSource::Variable(variable),
        (None, None, None) if std::env::var_os(&id).is_some() => SecretSource::Variable(id.clone()),
        (_, None, None) => SecretSource::File(PathBuf::from(&id)),
        _ => return Err(Failure::usage(format!("--secret {text:?}: a file and a variable exclude each other"))),
    };
    if let SecretSource::File(file) = &secret
        && let Err(error) = std::fs::File::open(file)
    {
        return Err(Failure::new(format!("--secret id={id}: {}: {error}", file.display())));
    }
    Ok((id, secret))
}

/// What a Dockerfile may not take for itself: the host's network and an unconfined step.
pub fn entitled(graph: &Graph, arguments: &Arguments) -> Result {
    let allowed = |name: &str| arguments.allowed.iter().any(|allowed| allowed == name);
    let by_flag = arguments.network == "host";
    for id in graph.ids() {
        let Op::Run(run) = &graph.get(id).op else { continue };
        let wants = match (run.security, run.network) {
            (Security::Insecure, _) if !allowed("security.insecure") => "security.insecure",
            (_, Network::Host) if !by_flag && !allowed("network.host") => "network.host",
            _ => continue,
        };
        let name = &graph.label(id).name;
        return Err(Failure::new(format!("{name}: needs the entitlement {wants}")).hint(format!("--allow {wants}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, expect) in [("1024", 1024), ("64m", 64 << 20), ("1g", 1 << 30), ("1.5GiB", 3 << 29), ("2kb", 2048)] {
            assert_eq!(size("--x", text).ok(), Some(expect), "{text}");
        }
        for bad in ["", "m", "-1", "1x", "1e999"] {
            assert!(size("--x", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_take_both_spellings_and_ipv6() {
        for (text, expect) in
            [("a:10.0.0.1", "10.0.0.1"), ("a=::1", "::1"), ("a:[::1]", "::1"), ("a:host-gateway", "host-gateway")]
        {
            assert_eq!(add_host(text).expect(text), ("a".to_owned(), expect.to_owned()));
        }
        assert!(add_host("a").is_err());
        assert!(add_host("a:b").is_err());
    }

    #[test]
    fn secrets_are_files_or_variables() {
        let env = |name: &str| SecretSource::Variable(name.to_owned());
        for (text, id, expect) in [
            ("id=a,src=/dev/null", "a", SecretSource::File("/dev/null".into())),
            ("type=file,id=a,source=/dev/null", "a", SecretSource::File("/dev/null".into())),
            ("id=a,env=TOKEN", "a", env("TOKEN")),
            ("type=env,id=TOKEN", "TOKEN", env("TOKEN")),
            ("id=PATH", "PATH", env("PATH")),
        ] {
            assert_eq!(secret(text).expect(text), (id.to_owned(), expect), "{text}");
        }
        for bad in ["", "src=/dev/null", "id=a,src=/nonexistent", "id=a,what=b", "id=a,src=/dev/null,env=B"] {
            assert!(secret(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ulimits_keep_soft_below_hard() {
        assert_eq!(ulimit("nofile=5:9").expect("valid").hard, 9);
        assert_eq!(ulimit("core=-1").expect("valid").soft, u64::MAX);
        assert!(ulimit("nofile=9:5").is_err());
        assert!(ulimit("nofile").is_err());
    }
}
