//! The firewall rules of the bridge: what leaves it is masqueraded, what may pass it is said below.
//!
//! With `nft`, one table of our own that no other program's rules depend on, made in one transaction. Its comment
//! says which rules for which bridge it holds, so that the common case, a table that is there already, costs one
//! question to the kernel and no process. Where `nft` is missing, `iptables` chains of our own do the same.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use super::ipam::Subnet;
use super::netlink::Socket;
use super::{Error, Result};

const TABLE: &str = "forge";
/// Part of the comment: another number, other rules.
const RULES_VERSION: u32 = 1;
const IPTABLES_NAT: &str = "FORGE-NAT";
const IPTABLES_FORWARD: &str = "FORGE-FORWARD";

/// What [`ensure`] found or did.
#[derive(Debug, PartialEq, Eq)]
pub enum Rules {
    InForce,
    /// Made now; who else is likely to drop the bridge's packets, in words, if somebody is.
    Made(Option<String>),
    /// The host has neither `nft` nor `iptables`.
    Impossible,
}

/// Makes sure that the rules for this bridge are in force.
pub fn ensure(bridge: &str, subnet: Subnet) -> Result<Rules> {
    let comment = format!("forge v{RULES_VERSION} {bridge} {subnet}");
    if nft_has(&comment)? {
        return Ok(Rules::InForce);
    }
    let Err(error) = feed("nft", &["-f", "-"], &nft_rules(bridge, subnet, &comment)) else {
        return Ok(Rules::Made(find_obstacle(bridge)));
    };
    match ensure_iptables(bridge, subnet) {
        Ok(true) => Ok(Rules::Made(None)),
        Ok(false) if is_missing(&error) => Ok(Rules::Impossible),
        Ok(false) => Err(error),
        Err(other) => Err(Error::Several(vec![error, other])),
    }
}

/// In nftables every table has its say: one that drops what it does not know (docker's does) drops ours as well.
/// It is not ours to change, so the user is told. None as well where the rules cannot be listed.
fn find_obstacle(bridge: &str) -> Option<String> {
    let listed = Command::new("nft").args(["list", "chains"]).stdin(Stdio::null()).output().ok()?;
    let (table, chain) = dropping_chain(&String::from_utf8_lossy(&listed.stdout))?;
    Some(format!(
        "the host's firewall drops forwarded packets (table {table}, chain {chain}): steps have no way out until \
         it accepts those to and from {bridge}, by `iptables -I {chain} -i {bridge} -j ACCEPT` and \
         `iptables -I {chain} -o {bridge} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT`"
    ))
}

/// The first foreign chain for forwarded IPv4 packets whose policy is to drop, in what `nft list chains` prints.
fn dropping_chain(listing: &str) -> Option<(String, String)> {
    let (mut table, mut chain) = ("", "");
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ").and_then(|rest| rest.strip_suffix(" {")) {
            table = name;
        } else if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
            chain = name;
        } else if line.contains(" hook forward ")
            && line.ends_with("policy drop;")
            && table.starts_with("i")
            && !table.starts_with("ip6 ")
        {
            return Some((table.to_owned(), chain.to_owned()));
        }
    }
    None
}

/// Whether there is a table with this comment. A kernel without nftables has none.
fn nft_has(comment: &str) -> Result<bool> {
    let Ok(mut socket) = Socket::netfilter() else { return Ok(false) };
    // nft keeps the comment in the table's user data: type, length, text, zero.
    let table = socket.nft_table(TABLE).unwrap_or(None);
    Ok(table.is_some_and(|data| data.get(2..).is_some_and(|data| data.strip_suffix(&[0]) == Some(comment.as_bytes()))))
}

/// Adding the table first makes its deletion legal, so that the transaction replaces whatever was there.
fn nft_rules(bridge: &str, subnet: Subnet, comment: &str) -> String {
    format!(
        r#"table ip {TABLE}
delete table ip {TABLE}
table ip {TABLE} {{
    comment "{comment}"
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} oifname != "{bridge}" masquerade
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" ip saddr != {subnet} counter drop
        iifname "{bridge}" oifname "{bridge}" counter drop
        oifname "{bridge}" ct state established,related accept
        oifname "{bridge}" counter drop
    }}
}}
"#
    )
}

pub(super) fn ensure_iptables(bridge: &str, subnet: Subnet) -> Result<bool> {
    let rules = format!(
        "*nat\n:{IPTABLES_NAT} - [0:0]\n\
         -A {IPTABLES_NAT} -s {subnet} ! -o {bridge} -j MASQUERADE\nCOMMIT\n\
         *filter\n:{IPTABLES_FORWARD} - [0:0]\n\
         -A {IPTABLES_FORWARD} -i {bridge} ! -s {subnet} -j DROP\n\
         -A {IPTABLES_FORWARD} -i {bridge} -o {bridge} -j DROP\n\
         -A {IPTABLES_FORWARD} -i {bridge} -j ACCEPT\n\
         -A {IPTABLES_FORWARD} -o {bridge} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
         -A {IPTABLES_FORWARD} -o {bridge} -j DROP\nCOMMIT\n"
    );
    match feed("iptables-restore", &["--noflush", "--wait"], &rules) {
        Err(error) if is_missing(&error) => return Ok(false),
        done => done?,
    }
    for [table, chain, ours] in HOOKS {
        if feed("iptables", &["--wait", "-t", table, "-C", chain, "-j", ours], "").is_err() {
            feed("iptables", &["--wait", "-t", table, "-I", chain, "-j", ours], "")?;
        }
    }
    Ok(true)
}

/// Where our chains are entered from.
const HOOKS: [[&str; 3]; 2] = [["nat", "POSTROUTING", IPTABLES_NAT], ["filter", "FORWARD", IPTABLES_FORWARD]];

/// Takes the rules away, by whichever program they came.
pub fn remove() -> Vec<Error> {
    let nft = feed("nft", &["-f", "-"], &format!("table ip {TABLE}\ndelete table ip {TABLE}\n"));
    let mut errors: Vec<Error> = nft.err().filter(|error| !is_missing(error)).into_iter().collect();
    for [table, chain, ours] in HOOKS {
        if feed("iptables", &["--wait", "-t", table, "-C", chain, "-j", ours], "").is_ok() {
            for args in [&["-D", chain, "-j", ours][..], &["-F", ours], &["-X", ours]] {
                errors.extend(feed("iptables", &[&["--wait", "-t", table], args].concat(), "").err());
            }
        }
    }
    errors
}

/// Runs a program with a text on its standard input.
fn feed(program: &str, args: &[&str], input: &str) -> Result<()> {
    let failed = || Error::system(format!("run {program}"));
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    // The texts fit into the pipe's buffer, and a program that ended early says why by its status.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(failed())?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Program { program: program.to_owned(), status: output.status, output: text });
    }
    written.map_err(failed())
}

fn is_missing(error: &Error) -> bool {
    matches!(error, Error::System { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firewall_that_drops_what_is_forwarded_is_found() {
        let chain = |table: &str, kind: &str, policy: &str| {
            format!(
                "table {table} {{\n\tchain a {{\n\t}}\n\tchain FORWARD {{\n\t\ttype filter hook {kind} priority filter; policy {policy};\n\t}}\n}}\n"
            )
        };
        let found = Some(("ip filter".to_owned(), "FORWARD".to_owned()));
        for (listing, expected) in [
            (chain("ip filter", "forward", "drop"), found.clone()),
            (chain("inet other", "forward", "accept") + &chain("ip filter", "forward", "drop"), found),
            (chain("ip filter", "forward", "accept"), None),
            (chain("ip filter", "input", "drop"), None),
            (chain("ip6 filter", "forward", "drop"), None),
            (chain("bridge filter", "forward", "drop"), None),
            (String::new(), None),
        ] {
            assert_eq!(dropping_chain(&listing), expected, "{listing}");
        }
    }
}
