//! The bridge that default networks hang on, and the attachments to it.
//!
//! ```text
//!   step's namespace        host                                     outside
//!   eth0 ──── veth ──── fg<address> ──── forge0 ── masquerade ── uplink
//!   10.203.64.7/24                       10.203.64.1/24
//! ```
//! The kernel is the record of what is in use: the near end of a veth is named after the address that its far end
//! has. Two processes that believe to hold the same address (builds with different state directories, say) can
//! therefore not both attach with it: the second one's veth has a name that is taken, and it goes on to the next.
//! For the same reason a closed namespace needs no clean-up: until the kernel has removed it, its address is simply
//! taken. The far end's hardware address follows from its address too, so no neighbour entry goes stale.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use forge_snapshotter::Store;
use nix::errno::Errno;

use super::firewall::{self, Rules};
use super::ipam::{self, Owner, Pool, Subnet};
use super::netlink::{self, Link, Socket, VethPair};
use super::{Error, Result, new_namespace};

/// Addresses are leased this many at a time, one write to the database each.
const LEASE_BATCH: usize = 8;
const FAR_NAME: &str = "eth0";
const LOOPBACK_INDEX: u32 = 1;
/// Without a default route there is nothing to measure by.
const DEFAULT_MTU: u32 = 1500;
const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// The bridge, ready, and this process's share of its addresses.
pub struct Bridge {
    socket: Socket,
    name: String,
    index: u32,
    mtu: u32,
    subnet: Subnet,
    owner: Owner,
    /// Leased and not in use. Taken from the front, given back at the end: an address rests as long as possible.
    free: VecDeque<Ipv4Addr>,
    next_lease: u32,
}

impl Bridge {
    /// Finds the bridge or makes it; also what the user should know about it.
    pub fn open(store: &Store, name: &str) -> Result<(Bridge, Option<String>)> {
        let mut socket = Socket::route().map_err(Error::system("open a netlink socket"))?;
        let _alone = store.lock_key(&format!("network {name}"))?;
        let mtu = uplink_mtu(&mut socket)?;
        let before = socket.link(name)?;
        let link = match &before {
            Some(link) if link.kind != "bridge" => return Err(Error::NotABridge { name: name.to_owned() }),
            Some(link) => link.clone(),
            None => make(&mut socket, name, mtu)?,
        };
        let (subnet, note) = match prepare(&mut socket, store, &link, mtu) {
            Ok(prepared) => prepared,
            Err(error) if before.is_some() => return Err(error),
            // A bridge that was made for nothing goes again.
            Err(error) => return Err(undo(&mut socket, name, error)),
        };
        let owner = Owner::current()?;
        // Processes start looking at different places, so that they seldom meet.
        let next_lease = owner.pid.wrapping_mul(LEASE_BATCH as u32);
        let (name, index) = (name.to_owned(), link.index);
        Ok((Bridge { socket, name, index, mtu, subnet, owner, free: VecDeque::new(), next_lease }, note))
    }

    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.gateway()
    }

    /// A new namespace with an address and a way out.
    pub fn connect(&mut self, store: &Store) -> Result<(OwnedFd, Ipv4Addr)> {
        let (namespace, mut inside) =
            new_namespace(|| Socket::route().map_err(Error::system("open a netlink socket in the new namespace")))?;
        let address = self.plug(store, &namespace)?;
        match self.furnish(&mut inside, address) {
            Ok(()) => Ok((namespace, address)),
            Err(error) => {
                // The namespace goes with its descriptor, and the veth with the namespace.
                self.give_back(address);
                Err(error)
            }
        }
    }

    /// Gives the far end its address and the namespace its way out.
    fn furnish(&self, inside: &mut Socket, address: Ipv4Addr) -> Result<()> {
        let far = inside.link(FAR_NAME)?.ok_or(Error::Stopped)?.index;
        Ok(inside.execute([
            netlink::no_ipv6_address(far),
            netlink::set_up(LOOPBACK_INDEX),
            netlink::add_address(far, address, self.subnet),
            netlink::set_up(far),
            netlink::add_default_route(far, self.subnet.gateway()),
        ])?)
    }

    /// Makes a veth between the bridge and the namespace, trying addresses until one is free.
    fn plug(&mut self, store: &Store, namespace: &OwnedFd) -> Result<Ipv4Addr> {
        // Kept out of the way while others are tried: the kernel has not got round to removing their veths.
        let mut busy = Vec::new();
        let plugged = loop {
            let address = match self.take(store) {
                Ok(address) => address,
                Err(error) => break Err(error),
            };
            match self.socket.execute([netlink::add_veth(&self.pair(address, namespace, &near_name(address)))]) {
                Ok(()) => break Ok(address),
                Err(refused) => {
                    busy.push(address);
                    if refused.errno != Errno::EEXIST {
                        break Err(refused.into());
                    }
                }
            }
        };
        self.free.extend(busy);
        let address = plugged?;
        if let Err(refused) = self.socket.execute([netlink::isolate_port(&near_name(address))]) {
            self.give_back(address);
            return Err(refused.into());
        }
        Ok(address)
    }

    fn pair<'a>(&self, address: Ipv4Addr, namespace: &'a OwnedFd, name: &'a str) -> VethPair<'a> {
        VethPair {
            name,
            master: self.index,
            mtu: self.mtu,
            peer_name: FAR_NAME,
            peer_hardware: hardware(address),
            peer_namespace: namespace.as_fd(),
        }
    }

    /// An address that this process holds the lease of.
    fn take(&mut self, store: &Store) -> Result<Ipv4Addr> {
        if let Some(address) = self.free.pop_front() {
            return Ok(address);
        }
        let leased = ipam::lease(
            store,
            Pool { network: &self.name, subnet: self.subnet },
            self.owner,
            self.next_lease,
            LEASE_BATCH,
        )?;
        self.next_lease = self.next_lease.wrapping_add(LEASE_BATCH as u32);
        self.free.extend(leased);
        self.free.pop_front().ok_or_else(|| Error::NoAddress { network: self.name.clone(), subnet: self.subnet })
    }

    pub fn give_back(&mut self, address: Ipv4Addr) {
        self.free.push_back(address);
    }

    /// Ends the leases of addresses that are not in use.
    pub fn close(mut self, store: &Store) -> Result<()> {
        ipam::release(store, &self.name, self.owner, self.free.make_contiguous())
    }
}

/// Gives a bridge its subnet, its MTU and its rules. What the host allows comes last: by then the rules are in force.
fn prepare(socket: &mut Socket, store: &Store, link: &Link, mtu: u32) -> Result<(Subnet, Option<String>)> {
    let subnet = match address_of(socket, link)? {
        Some(subnet) => subnet,
        None => give_address(socket, store, link)?,
    };
    if !link.up || link.mtu != mtu {
        socket.execute([netlink::set_mtu(link.index, mtu), netlink::set_up(link.index)])?;
    }
    let obstacle = match firewall::ensure(&link.name, subnet)? {
        Rules::InForce => None,
        Rules::Made(obstacle) => obstacle,
        Rules::Impossible => {
            let source = io::Error::from_raw_os_error(Errno::EOPNOTSUPP as i32);
            return Err(Error::system("find nft or iptables on this host")(source));
        }
    };
    let notes: Vec<String> = forward_packets()?.into_iter().chain(obstacle).collect();
    Ok((subnet, (!notes.is_empty()).then(|| notes.join("; "))))
}

fn undo(socket: &mut Socket, name: &str, error: Error) -> Error {
    match socket.execute([netlink::delete_link(name)]) {
        Ok(()) => error,
        Err(refused) => Error::Several(vec![error, refused.into()]),
    }
}

/// The bridge itself. Whoever else makes it at the same moment may be first.
fn make(socket: &mut Socket, name: &str, mtu: u32) -> Result<Link> {
    // The last bytes are those of no address: gateways are told apart by the bridges' names.
    let hardware = [0x02, 0x66, 0x6f, 0x72, 0x67, 0x65];
    match socket.execute([netlink::add_bridge(name, hardware, mtu)]) {
        Err(refused) if refused.errno != Errno::EEXIST => return Err(refused.into()),
        _ => {}
    }
    socket.link(name)?.ok_or_else(|| Error::NotABridge { name: name.to_owned() })
}

fn address_of(socket: &mut Socket, link: &Link) -> Result<Option<Subnet>> {
    let addresses = socket.addresses()?;
    Ok(addresses
        .iter()
        .find(|address| address.index == link.index)
        .map(|found| Subnet::new(found.address, found.prefix)))
}

/// Chooses the bridge's subnet, the one of last time if that is still possible.
fn give_address(socket: &mut Socket, store: &Store, link: &Link) -> Result<Subnet> {
    let addresses = socket.addresses()?;
    let mut taken: Vec<Subnet> = addresses.iter().map(|address| Subnet::new(address.address, address.prefix)).collect();
    taken.extend(socket.routes()?.iter().filter_map(ipam::covered));
    let subnet = ipam::choose(ipam::recorded(store, &link.name)?, &taken)?;
    socket
        .execute([netlink::no_ipv6_address(link.index), netlink::add_address(link.index, subnet.gateway(), subnet)])?;
    ipam::record(store, &link.name, subnet)?;
    Ok(subnet)
}

/// The MTU of the device that the default route leads to: with a larger one, big packets would be lost on the way.
fn uplink_mtu(socket: &mut Socket) -> Result<u32> {
    let routes = socket.routes()?;
    let default = routes.iter().filter(|route| route.main && route.prefix == 0).min_by_key(|route| route.metric);
    let Some(index) = default.and_then(|route| route.index) else { return Ok(DEFAULT_MTU) };
    Ok(socket.links()?.iter().find(|link| link.index == index).map_or(DEFAULT_MTU, |link| link.mtu))
}

/// Lets the host forward packets at all; says so if that is new.
fn forward_packets() -> Result<Option<String>> {
    let read = fs::read_to_string(IP_FORWARD).map_err(Error::system(format!("read {IP_FORWARD}")))?;
    if read.trim() != "0" {
        return Ok(None);
    }
    fs::write(IP_FORWARD, "1").map_err(Error::system(format!("write {IP_FORWARD}")))?;
    Ok(Some("turned on net.ipv4.ip_forward, which the default network needs".to_owned()))
}

/// `fg` and the address in hexadecimal digits: 10 of the 15 characters that a name may have.
fn near_name(address: Ipv4Addr) -> String {
    format!("fg{:08x}", address.to_bits())
}

/// A locally administered address that ends in the IPv4 address, as docker's do.
fn hardware(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x42, a, b, c, d]
}

/// Takes the bridge down, with the veths on it, and the firewall rules; reports all that failed.
pub fn remove(store: &Store, name: &str) -> Result<()> {
    let _alone = store.lock_key(&format!("network {name}"))?;
    let mut errors = firewall::remove();
    errors.extend(unplug(name).err());
    errors.extend(ipam::forget(store, name).err());
    if errors.is_empty() { Ok(()) } else { Err(Error::Several(errors)) }
}

fn unplug(name: &str) -> Result<()> {
    let mut socket = Socket::route().map_err(Error::system("open a netlink socket"))?;
    let Some(bridge) = socket.link(name)?.filter(|link| link.kind == "bridge") else { return Ok(()) };
    let ports = socket.links()?.into_iter().filter(|link| link.master == Some(bridge.index));
    for port in ports {
        match socket.execute([netlink::delete_link(&port.name)]) {
            // Its namespace ended meanwhile.
            Err(refused) if refused.errno == Errno::ENODEV => {}
            done => done?,
        }
    }
    Ok(socket.execute([netlink::delete_link(name)])?)
}
