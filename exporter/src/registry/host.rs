//! Where a registry answers, and where its answers may lead.
//!
//! ```text
//! docker.io                     https://registry-1.docker.io
//! localhost, *.localhost, 127/8, ::1   http, then https (https first where the port is 443)
//! listed as plain http          http
//! listed as insecure            https unverified, then http
//! everything else               https
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use url::{Host, Url};

/// The host that answers for a registry's name.
pub(super) fn api_host(registry: &str) -> &str {
    match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    }
}

/// The base URLs to try for a host, best first. Never empty for a host that a `Reference` accepted.
pub(super) fn base_urls(host: &str, plain: bool, insecure: bool) -> Vec<Url> {
    let url = |scheme: &str| format!("{scheme}://{host}/").parse::<Url>().ok();
    let local = url("https").is_some_and(|url| is_loopback(&url));
    let schemes: &[&str] = match () {
        () if plain => &["http"],
        () if insecure => &["https", "http"],
        () if local && host.ends_with(":443") => &["https", "http"],
        () if local => &["http", "https"],
        () => &["https"],
    };
    schemes.iter().filter_map(|scheme| url(scheme)).collect()
}

pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => {
            let name = name.strip_suffix('.').unwrap_or(name);
            name == "localhost" || name.ends_with(".localhost")
        }
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback() || address.to_ipv4_mapped().is_some_and(|a| a.is_loopback()),
        None => false,
    }
}

/// How near an address is to us; an answer may lead outwards, never inwards.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Nearness {
    Public,
    Private,
    Loopback,
    /// Link-local and unspecified: where cloud metadata services live.
    Never,
}

fn nearness(url: &Url) -> Nearness {
    match url.host() {
        Some(Host::Ipv4(address)) => nearness_of(address.into()),
        Some(Host::Ipv6(address)) => nearness_of(address.into()),
        Some(Host::Domain(_)) if is_loopback(url) => Nearness::Loopback,
        Some(Host::Domain(_)) => Nearness::Public,
        None => Nearness::Never,
    }
}

fn nearness_of(address: IpAddr) -> Nearness {
    let v4 = |a: Ipv4Addr| match a.octets() {
        [127, ..] => Nearness::Loopback,
        [0, ..] | [169, 254, ..] | [255, 255, 255, 255] => Nearness::Never,
        [100, second, ..] if second & 0xc0 == 64 => Nearness::Private,
        _ if a.is_private() => Nearness::Private,
        _ => Nearness::Public,
    };
    let v6 = |a: Ipv6Addr| match a.segments() {
        [0, 0, 0, 0, 0, 0, 0, 1] => Nearness::Loopback,
        [0, 0, 0, 0, 0, 0, 0, 0] => Nearness::Never,
        [first, ..] if first & 0xffc0 == 0xfe80 => Nearness::Never,
        [first, ..] if first & 0xfe00 == 0xfc00 => Nearness::Private,
        _ => a.to_ipv4_mapped().map_or(Nearness::Public, v4),
    };
    match address {
        IpAddr::V4(address) => v4(address),
        IpAddr::V6(address) => v6(address),
    }
}

/// Whether an answer from `from` may send us to `to`. Names are judged as they are written: what they resolve to is the
/// resolver's word, and a registry inside a company may well answer under a name with a private address.
pub(super) fn may_lead(from: &Url, to: &Url) -> Result<(), String> {
    let target = super::error::host_port(to);
    match (from.scheme(), to.scheme()) {
        ("https", "http") => {
            return Err(format!("it leads from https to plain http on {target}, which is not followed"));
        }
        (_, "http" | "https") => {}
        (_, scheme) => return Err(format!("it leads to a {scheme}: URL, which is not followed")),
    }
    let same_host = from.host() == to.host();
    if !same_host && (nearness(to) > nearness(from) || nearness(to) == Nearness::Never) {
        return Err(format!("it leads to the internal address {target}, which is not followed"));
    }
    Ok(())
}

/// What `Location` means: absolute, from the root, relative, or a host without its scheme. The query is kept.
pub(super) fn resolve_location(base: &Url, location: &str) -> Result<Url, String> {
    let bad = |_| "its Location is not a URL".to_owned();
    let first = location.split('/').next().unwrap_or_default();
    let names_a_host = !location.contains("://")
        && !first.is_empty()
        && (first == super::error::host_port(base) || (first.contains(':') && first.contains('.')));
    let mut url = match names_a_host {
        true => format!("{}://{location}", base.scheme()).parse::<Url>().map_err(bad)?,
        false => base.join(location).map_err(bad)?,
    };
    // A registry behind a proxy that ends TLS often believes that it is spoken to in plain http.
    let behind_proxy = base.scheme() == "https" && url.scheme() == "http" && base.host() == url.host();
    if behind_proxy {
        let port = if url.port().is_none() || url.port() == Some(80) { base.port() } else { url.port() };
        if url.set_scheme("https").is_err() || url.set_port(port).is_err() {
            return Err("its Location is not a URL".to_owned());
        }
    }
    may_lead(base, &url)?;
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_to_try() {
        for (host, plain, insecure, expect) in [
            ("registry-1.docker.io", false, false, "https"),
            ("localhost:5000", false, false, "http https"),
            ("x.localhost", false, false, "http https"),
            ("127.0.0.1:443", false, false, "https http"),
            ("[::1]:5000", false, false, "http https"),
            ("10.0.0.1:5000", false, false, "https"),
            ("r.example", true, false, "http"),
            ("r.example", false, true, "https http"),
        ] {
            let urls = base_urls(host, plain, insecure);
            assert_eq!(urls.iter().map(Url::scheme).collect::<Vec<_>>().join(" "), expect, "{host}");
        }
    }

    #[test]
    fn locations() {
        let base = "https://r.example:5000/v2/x/blobs/uploads/";
        for (base, location, expect) in [
            (base, "https://r.example:5000/u/1?_state=a%3D", Some("https://r.example:5000/u/1?_state=a%3D")),
            (base, "/v2/x/u/1?a=b", Some("https://r.example:5000/v2/x/u/1?a=b")),
            (base, "1?a=b", Some("https://r.example:5000/v2/x/blobs/uploads/1?a=b")),
            (base, "r.example:5000/u/1", Some("https://r.example:5000/u/1")),
            (base, "http://r.example/u/1", Some("https://r.example:5000/u/1")),
            (base, "//cdn.example/u", Some("https://cdn.example/u")),
            (base, "http://other.example/u/1", None),
            (base, "ftp://r.example/u", None),
            (base, "file:///etc/passwd", None),
            (base, "https://169.254.169.254/latest", None),
            (base, "https://127.0.0.1/x", None),
            (base, "https://localhost/x", None),
            (base, "https://localhost./x", None),
            (base, "https://2130706433/x", None),
            (base, "https://[::ffff:10.0.0.1]/x", None),
            ("http://127.0.0.1:5000/v2/", "http://127.0.0.1:6000/x", Some("http://127.0.0.1:6000/x")),
            ("http://127.0.0.1:5000/v2/", "http://169.254.1.1/x", None),
            ("https://10.0.0.1/v2/", "https://10.0.0.2/x", Some("https://10.0.0.2/x")),
            ("https://10.0.0.1/v2/", "https://127.0.0.1/x", None),
        ] {
            let found = resolve_location(&base.parse().unwrap(), location).ok();
            assert_eq!(found.as_ref().map(Url::as_str), expect, "{base} {location}");
        }
    }
}
