//! What a container finds in /etc/resolv.conf and /etc/hosts.
//!
//! The host's resolver configuration is passed on as it is, but for nameservers that a network namespace of its own
//! cannot reach: those on the host's loopback. If systemd-resolved is behind such an address, its own list of real
//! nameservers is used. If nothing is left, the network's own resolver (`pasta` and `slirp4netns` have one) or else
//! public ones stand in, and a note says so.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use super::{Error, Options, Result};

/// The name by which a container finds its host, as docker has it.
pub const HOST_NAME: &str = "host.docker.internal";

/// Who is asked when the host names nobody that a container could reach.
const PUBLIC: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1)), IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8))];

pub struct Resolver {
    pub text: String,
    pub note: Option<String>,
}

/// A resolver configuration: nameservers, and the lines about everything else.
struct Configuration {
    nameservers: Vec<String>,
    others: Vec<String>,
}

impl Configuration {
    /// What the host has; a missing file is an empty one.
    fn read(path: &Path) -> Result<Configuration> {
        let text = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(Error::system(format!("read {}", path.display())))?,
        };
        Ok(Configuration::parse(&String::from_utf8_lossy(&text)))
    }

    fn parse(text: &str) -> Configuration {
        let mut configuration = Configuration { nameservers: Vec::new(), others: Vec::new() };
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
            match line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
                ["nameserver", server, ..] => configuration.nameservers.push(server.to_owned()),
                ["nameserver"] => {}
                _ => configuration.others.push(line.to_owned()),
            }
        }
        configuration
    }

    fn with(self, nameservers: &[IpAddr]) -> Configuration {
        if nameservers.is_empty() {
            return self;
        }
        Configuration { nameservers: nameservers.iter().map(ToString::to_string).collect(), ..self }
    }

    /// Only the nameservers that can be reached from a namespace without IPv6 and without the host's loopback.
    fn reachable(self) -> Configuration {
        let reachable =
            |server: &String| server.parse().is_ok_and(|ip: Ipv4Addr| !ip.is_loopback() && !ip.is_unspecified());
        Configuration { nameservers: self.nameservers.into_iter().filter(reachable).collect(), ..self }
    }

    fn text(&self) -> String {
        let servers = self.nameservers.iter().map(|server| format!("nameserver {server}\n"));
        servers.chain(self.others.iter().map(|line| format!("{line}\n"))).collect()
    }
}

pub fn for_host(options: &Options) -> Result<String> {
    Ok(Configuration::read(&options.resolv_conf)?.with(&options.nameservers).text())
}

/// `offered`: a resolver that the network has for its guests.
pub fn for_namespace(options: &Options, offered: Option<Ipv4Addr>) -> Result<Resolver> {
    let host = Configuration::read(&options.resolv_conf)?;
    if !options.nameservers.is_empty() {
        return Ok(Resolver { text: host.with(&options.nameservers).text(), note: None });
    }
    let stub = host.nameservers.iter().all(|server| server.parse().is_ok_and(|ip: IpAddr| ip.is_loopback()));
    let host = if stub && options.resolved_conf.exists() { Configuration::read(&options.resolved_conf)? } else { host };
    let before = host.nameservers.join(", ");
    let reachable = host.reachable();
    if !reachable.nameservers.is_empty() {
        return Ok(Resolver { text: reachable.text(), note: None });
    }
    if let Some(offered) = offered {
        return Ok(Resolver { text: reachable.with(&[IpAddr::V4(offered)]).text(), note: None });
    }
    let why = if before.is_empty() {
        "the host names no nameserver".to_owned()
    } else {
        format!("steps cannot reach the host's nameserver {before}")
    };
    let note = format!("{why}: they ask {} and {}; name others with --dns", PUBLIC[0], PUBLIC[1]);
    Ok(Resolver { text: reachable.with(&PUBLIC).text(), note: Some(note) })
}

/// The text of /etc/hosts: loopback, the container's own name, then `hosts` (name, address) in order.
pub fn hosts_file(hostname: &str, address: Option<IpAddr>, hosts: &[(String, String)]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    let own = address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)).to_string();
    let lines = hosts.iter().map(|(name, address)| (address.as_str(), name.as_str()));
    for (address, name) in lines.chain((!hostname.is_empty()).then_some((own.as_str(), hostname))) {
        writeln!(text, "{address}\t{name}").expect("writing to a string does not fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nameservers that a namespace gets for a host's file, systemd-resolved's file and an offered resolver.
    fn check(host: &str, resolved: Option<&str>, offered: Option<Ipv4Addr>, expected: &[&str], noted: bool) {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            resolv_conf: dir.path().join("host"),
            resolved_conf: dir.path().join("resolved"),
            ..Options::default()
        };
        fs::write(&options.resolv_conf, host).unwrap();
        if let Some(resolved) = resolved {
            fs::write(&options.resolved_conf, resolved).unwrap();
        }
        let resolver = for_namespace(&options, offered).unwrap();
        assert_eq!(Configuration::parse(&resolver.text).nameservers, expected, "{host:?}");
        assert_eq!(resolver.note.is_some(), noted, "{host:?}: {:?}", resolver.note);
    }

    #[test]
    fn only_nameservers_that_can_be_reached_are_passed_on() {
        let offered = Some(Ipv4Addr::new(10, 0, 2, 3));
        check("nameserver 10.1.1.1\n", None, None, &["10.1.1.1"], false);
        check("nameserver 10.1.1.1\n", Some("nameserver 10.2.2.2\n"), offered, &["10.1.1.1"], false);
        check("# x\nnameserver 127.0.0.1\n nameserver\t10.1.1.1 \n", None, None, &["10.1.1.1"], false);
        check("nameserver 127.0.0.53\n", Some("nameserver 10.2.2.2\nnameserver fe80::1\n"), None, &["10.2.2.2"], false);
        check("nameserver 127.0.0.53\n", Some("nameserver 127.0.0.1\n"), offered, &["10.0.2.3"], false);
        check("nameserver ::1\n", None, None, &["1.1.1.1", "8.8.8.8"], true);
        check("nameserver nonsense\nnameserver\n", None, None, &["1.1.1.1", "8.8.8.8"], true);
        check("", None, None, &["1.1.1.1", "8.8.8.8"], true);
    }

    #[test]
    fn search_and_options_stay_and_given_nameservers_win() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("resolv.conf");
        fs::write(&conf, "search a.example b.example\nnameserver 127.0.0.1\noptions ndots:2\n").unwrap();
        let nameservers = vec!["127.0.0.9".parse().unwrap()];
        let options = Options { resolv_conf: conf, nameservers, ..Options::default() };
        let expected = "nameserver 127.0.0.9\nsearch a.example b.example\noptions ndots:2\n";
        assert_eq!(for_namespace(&options, None).unwrap().text, expected);
        assert_eq!(for_host(&options).unwrap(), expected);
    }

    #[test]
    fn a_host_without_the_file_has_no_nameservers() {
        let options = Options { resolv_conf: "/nonexistent/resolv.conf".into(), ..Options::default() };
        assert_eq!(for_host(&options).unwrap(), "");
    }

    #[test]
    fn the_hosts_file_names_loopback_itself_and_others() {
        let hosts = [(HOST_NAME.to_owned(), "10.1.1.1".to_owned())];
        let text = hosts_file("box", Some(IpAddr::V4(Ipv4Addr::new(10, 1, 1, 2))), &hosts);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.1.1.1\thost.docker.internal\n10.1.1.2\tbox\n"), "{text}");
        assert!(hosts_file("box", None, &[]).ends_with("127.0.0.1\tbox\n"));
    }
}
