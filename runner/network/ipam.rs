//! Who has which address.
//!
//! A subnet is chosen so that it hides nothing that the host can reach, and stays the same from then on
//! (`networks` table). Addresses are leased from the `leases` table to a process, known by its id and its start
//! time (ids are used again, start times are not): a lease whose owner is dead is free. Nothing has to be cleaned up
//! after a killed build.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;

use forge_snapshotter::Store;
use rusqlite::{Transaction, params};

use super::netlink::Route;
use super::{Error, Result};

/// An IPv4 subnet in canonical form: no bit set behind the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    base: u32,
    pub prefix: u8,
}

impl Subnet {
    pub fn new(address: Ipv4Addr, prefix: u8) -> Subnet {
        let prefix = prefix.min(32);
        Subnet { base: address.to_bits() & mask(prefix), prefix }
    }

    pub fn parse(text: &str) -> Option<Subnet> {
        let (address, prefix) = text.split_once('/')?;
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
        Some(Subnet::new(address.parse().ok()?, prefix))
    }

    pub fn overlaps(self, other: Subnet) -> bool {
        let shorter = mask(self.prefix.min(other.prefix));
        self.base & shorter == other.base & shorter
    }

    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base | !mask(self.prefix))
    }

    /// The first address, the host's own.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base | 1)
    }

    /// How many addresses there are for others than the gateway.
    fn places(self) -> u32 {
        (!mask(self.prefix)).saturating_sub(2)
    }

    /// The addresses behind the gateway, starting somewhere and going around once.
    fn addresses_from(self, start: u32) -> impl Iterator<Item = Ipv4Addr> {
        let places = self.places();
        (0..places).map(move |step| Ipv4Addr::from_bits(self.base + 2 + (start % places + step) % places))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", Ipv4Addr::from_bits(self.base), self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

/// Corners of the private ranges that other engines and common VPNs leave alone; sixteen /24 are tried in each.
const RANGES: [Ipv4Addr; 5] = [
    Ipv4Addr::new(10, 203, 64, 0),
    Ipv4Addr::new(172, 29, 208, 0),
    Ipv4Addr::new(192, 168, 208, 0),
    Ipv4Addr::new(10, 77, 64, 0),
    Ipv4Addr::new(172, 25, 64, 0),
];
const PREFIX: u8 = 24;

/// The first subnet that overlaps nothing in `taken`; `before` (what was used last time) is tried first.
pub fn choose(before: Option<Subnet>, taken: &[Subnet]) -> Result<Subnet> {
    let candidates = RANGES
        .iter()
        .flat_map(|range| (0..16).map(|step| Subnet::new(Ipv4Addr::from_bits(range.to_bits() + (step << 8)), PREFIX)));
    before
        .into_iter()
        .chain(candidates)
        .find(|candidate| !taken.iter().any(|other| candidate.overlaps(*other)))
        .ok_or(Error::NoSubnet)
}

/// What a route covers; a default route covers nothing that could not be given away.
pub fn covered(route: &Route) -> Option<Subnet> {
    (route.prefix > 0).then(|| Subnet::new(route.destination, route.prefix))
}

/// The subnet that a network had last time.
pub fn recorded(store: &Store, network: &str) -> Result<Option<Subnet>> {
    let detail = store.database().with(|connection| {
        let mut rows = connection.prepare_cached("SELECT detail FROM networks WHERE name = ?1")?;
        let mut found = rows.query_map([network], |row| row.get::<_, String>(0))?;
        found.next().transpose()
    })?;
    let detail = detail.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    Ok(detail.and_then(|detail| Subnet::parse(detail.get("subnet")?.as_str()?)))
}

pub fn record(store: &Store, network: &str, subnet: Subnet) -> Result<()> {
    let detail = serde_json::json!({ "driver": "bridge", "subnet": subnet.to_string() }).to_string();
    store.database().transaction(|transaction| {
        transaction.execute("INSERT OR REPLACE INTO networks (name, detail) VALUES (?1, ?2)", params![network, detail])
    })?;
    Ok(())
}

pub fn forget(store: &Store, network: &str) -> Result<()> {
    store.database().transaction(|transaction| {
        transaction.execute("DELETE FROM networks WHERE name = ?1", [network])?;
        transaction.execute("DELETE FROM leases WHERE network = ?1", [network])
    })?;
    Ok(())
}

/// A process that cannot be mistaken for a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    pub pid: u32,
    /// In clock ticks since boot.
    pub start: u64,
}

impl Owner {
    pub fn current() -> Result<Owner> {
        let pid = std::process::id();
        let start = start_time(pid).map_err(Error::system("read when this process was started"))?;
        Ok(Owner { pid, start })
    }

    pub fn alive(self) -> bool {
        start_time(self.pid).is_ok_and(|start| start == self.start)
    }
}

/// Field 22 of /proc/PID/stat, counted from behind the command, which may hold anything.
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let start = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    start.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The addresses of one network.
#[derive(Clone, Copy)]
pub struct Pool<'a> {
    pub network: &'a str,
    pub subnet: Subnet,
}

/// Leases up to `count` addresses (at least one) to `owner`, looking from `start` on; dead owners' leases are ended.
pub fn lease(store: &Store, pool: Pool<'_>, owner: Owner, start: u32, count: usize) -> Result<Vec<Ipv4Addr>> {
    let Pool { network, subnet } = pool;
    let leased = store.database().transaction(|transaction| {
        let taken = living_leases(transaction, network)?;
        let free = subnet.addresses_from(start).filter(|address| !taken.contains(address)).take(count);
        let leased = free.map(|address| insert(transaction, network, address, owner).map(|()| address));
        leased.collect::<rusqlite::Result<Vec<_>>>()
    })?;
    if leased.is_empty() { Err(Error::NoAddress { network: network.to_owned(), subnet }) } else { Ok(leased) }
}

fn insert(transaction: &Transaction<'_>, network: &str, address: Ipv4Addr, owner: Owner) -> rusqlite::Result<()> {
    let mut insert = transaction
        .prepare_cached("INSERT INTO leases (network, address, owner_pid, owner_start) VALUES (?1, ?2, ?3, ?4)")?;
    // Ticks since boot stay far below the sign bit.
    insert.execute(params![network, address.to_string(), owner.pid, owner.start.cast_signed()]).map(|_| ())
}

/// The addresses that living processes hold; the rows of dead ones are removed.
fn living_leases(transaction: &Transaction<'_>, network: &str) -> rusqlite::Result<HashSet<Ipv4Addr>> {
    let mut select =
        transaction.prepare_cached("SELECT address, owner_pid, owner_start FROM leases WHERE network = ?1")?;
    let rows = select.query_map([network], |row| {
        let owner = Owner { pid: row.get(1)?, start: row.get::<_, i64>(2)?.cast_unsigned() };
        Ok((row.get::<_, String>(0)?, owner))
    })?;
    let mut taken = HashSet::new();
    let mut delete = transaction.prepare_cached("DELETE FROM leases WHERE network = ?1 AND address = ?2")?;
    for row in rows.collect::<rusqlite::Result<Vec<_>>>()? {
        match (row.0.parse(), row.1.alive()) {
            (Ok(address), true) => drop(taken.insert(address)),
            _ => drop(delete.execute(params![network, row.0])?),
        }
    }
    Ok(taken)
}

/// Ends leases of `owner`, and of nobody else.
pub fn release(store: &Store, network: &str, owner: Owner, addresses: &[Ipv4Addr]) -> Result<()> {
    store.database().transaction(|transaction| {
        let mut delete = transaction.prepare_cached(
            "DELETE FROM leases WHERE network = ?1 AND address = ?2 AND owner_pid = ?3 AND owner_start = ?4",
        )?;
        addresses.iter().try_for_each(|address| {
            delete.execute(params![network, address.to_string(), owner.pid, owner.start.cast_signed()]).map(|_| ())
        })
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        Subnet::parse(text).unwrap()
    }

    #[test]
    fn subnets_are_read_and_compared() {
        for (text, shown) in [("10.1.2.3/24", "10.1.2.0/24"), ("0.0.0.0/0", "0.0.0.0/0"), ("1.2.3.4/32", "1.2.3.4/32")]
        {
            assert_eq!(subnet(text).to_string(), shown);
        }
        for text in ["", "10.0.0.0", "10.0.0.0/33", "10.0.0/8", "::/0", "10.0.0.0/-1"] {
            assert_eq!(Subnet::parse(text), None, "{text}");
        }
        for (one, other, overlap) in [
            ("10.0.0.0/8", "10.203.64.0/24", true),
            ("10.203.64.0/24", "10.203.64.128/25", true),
            ("10.203.64.0/24", "10.203.65.0/24", false),
            ("0.0.0.0/0", "192.168.0.0/16", true),
        ] {
            assert_eq!(subnet(one).overlaps(subnet(other)), overlap, "{one} {other}");
            assert_eq!(subnet(other).overlaps(subnet(one)), overlap, "{other} {one}");
        }
        assert_eq!(subnet("10.9.8.0/24").gateway(), Ipv4Addr::new(10, 9, 8, 1));
        assert_eq!(subnet("10.9.8.0/24").broadcast(), Ipv4Addr::new(10, 9, 8, 255));
    }

    #[test]
    fn addresses_go_around_once_without_gateway_and_broadcast() {
        let all: Vec<_> = subnet("10.9.8.0/29").addresses_from(7).map(|address| address.octets()[3]).collect();
        assert_eq!(all, [4, 5, 6, 2, 3]);
    }

    #[test]
    fn a_subnet_avoids_what_the_host_has() {
        assert_eq!(choose(None, &[]).unwrap(), subnet("10.203.64.0/24"));
        assert_eq!(choose(None, &[subnet("10.203.64.128/25")]).unwrap(), subnet("10.203.65.0/24"));
        assert_eq!(choose(None, &[subnet("10.0.0.0/8")]).unwrap(), subnet("172.29.208.0/24"));
        let before = Some(subnet("10.203.70.0/24"));
        assert_eq!(choose(before, &[]).unwrap(), subnet("10.203.70.0/24"));
        assert_eq!(choose(before, &[subnet("10.203.70.7/32")]).unwrap(), subnet("10.203.64.0/24"));
        assert!(matches!(choose(before, &[subnet("0.0.0.0/0")]), Err(Error::NoSubnet)));
    }

    #[test]
    fn an_owner_is_told_from_a_later_process_with_its_id() {
        let owner = Owner::current().unwrap();
        assert!(owner.alive());
        assert!(!Owner { start: owner.start + 1, ..owner }.alive());
        assert!(!Owner { pid: u32::MAX, ..owner }.alive());
    }
}
