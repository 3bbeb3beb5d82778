//! Netlink, as little of it as networks need: links, addresses and routes (`NETLINK_ROUTE`), and the question
//! whether a firewall table is there (`NETLINK_NETFILTER`).
//!
//! A socket belongs to the network namespace of the thread that opened it, for good: that is how one thread
//! configures a namespace that it has left again. Requests go out in batches, several messages in one datagram;
//! the kernel handles them in order and answers each, so a namespace is furnished with one system call out and
//! one in. It does not stop at a failed one: whoever sends a batch must be able to throw the whole result away.
//!
//! ```text
//! message    = length u32 | type u16 | flags u16 | sequence u32 | port u32 | family header | attribute*
//! attribute  = length u16 | type u16 | payload, padded to 4          (length counts the 4 bytes before the payload)
//! error      = message(2): errno i32 (negative; 0: done) | header of the request | attribute*  (1: the kernel's words)
//! ```
//! Numbers are the kernel's, `include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,veth}.h`.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, socket,
};

use super::ipam::Subnet;

/// A request that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {}{}", errno.desc(), if kernel.is_empty() { String::new() } else { format!(" ({kernel})") })]
pub struct Refused {
    pub action: String,
    pub errno: Errno,
    /// The kernel's own explanation, where it gave one.
    pub kernel: String,
}

impl Refused {
    fn at(action: &str, errno: Errno) -> Refused {
        Refused { action: action.to_owned(), errno, kernel: String::new() }
    }
}

pub type Result<T> = std::result::Result<T, Refused>;

/// Larger than any datagram that the kernel sends (it caps dumps at 32 KiB).
const BUFFER_BYTES: usize = 64 * 1024;
/// A dump that changed while it was read is read again this often.
const DUMP_ATTEMPTS: usize = 8;

const HEADER_BYTES: usize = 16;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const SOL_NETLINK: i32 = 270;
const NETLINK_CAP_ACK: i32 = 10;
const NETLINK_EXT_ACK: i32 = 11;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_USERDATA: u16 = 6;
const NFPROTO_IPV4: u8 = 2;
/// An attribute that holds attributes says so.
const NESTED: u16 = 0x8000;

/// One message in the making: what it does in words (for errors), and its bytes.
pub struct Request {
    action: String,
    bytes: Vec<u8>,
}

impl Request {
    fn new(kind: u16, flags: i32, action: String, header: &[u8]) -> Request {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        // Flags are 16 bits wide on the wire and `int` in the headers.
        bytes[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
        bytes.extend_from_slice(header);
        Request { action, bytes }
    }

    fn attribute(mut self, kind: u16, payload: &[u8]) -> Request {
        put_attribute(&mut self.bytes, kind, |bytes| bytes.extend_from_slice(payload));
        self
    }

    fn nested(mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) -> Request {
        put_attribute(&mut self.bytes, kind | NESTED, fill);
        self
    }
}

/// Appends an attribute whose payload `fill` writes: length in front, padding behind.
fn put_attribute(bytes: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&kind.to_ne_bytes());
    fill(bytes);
    let length = u16::try_from(bytes.len() - start).expect("an attribute of ours is a few hundred bytes");
    bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// `text` as the kernel wants strings: with a zero behind.
fn put_text(bytes: &mut Vec<u8>, kind: u16, text: &str) {
    put_attribute(bytes, kind, |bytes| {
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(0);
    });
}

/// `struct ifinfomsg`: family, device type, index, flags and which of them count.
fn link_header(index: u32, flags: i32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

const CREATE: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
const CHANGE: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
const DUMP: i32 = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;

/// A bridge, up, with a hardware address of its own (it would otherwise change with its ports).
pub fn add_bridge(name: &str, hardware: [u8; 6], mtu: u32) -> Request {
    let mut name_attribute = Vec::new();
    put_text(&mut name_attribute, libc::IFLA_IFNAME, name);
    let mut request =
        Request::new(libc::RTM_NEWLINK, CREATE, format!("make the bridge {name}"), &link_header(0, libc::IFF_UP));
    request.bytes.extend_from_slice(&name_attribute);
    request
        .attribute(libc::IFLA_ADDRESS, &hardware)
        .attribute(libc::IFLA_MTU, &mtu.to_ne_bytes())
        .nested(libc::IFLA_LINKINFO, |bytes| put_text(bytes, libc::IFLA_INFO_KIND, "bridge"))
}

/// A veth pair: the near end in our namespace, up and a port of a bridge; the far end in another one, down.
pub struct VethPair<'a> {
    pub name: &'a str,
    /// The bridge; 0 for none.
    pub master: u32,
    pub mtu: u32,
    pub peer_name: &'a str,
    pub peer_hardware: [u8; 6],
    pub peer_namespace: BorrowedFd<'a>,
}

pub fn add_veth(pair: &VethPair<'_>) -> Request {
    let action = format!("make the veth pair {}", pair.name);
    let mut request = Request::new(libc::RTM_NEWLINK, CREATE, action, &link_header(0, libc::IFF_UP));
    put_text(&mut request.bytes, libc::IFLA_IFNAME, pair.name);
    request
        .attribute(libc::IFLA_MTU, &pair.mtu.to_ne_bytes())
        .attribute(libc::IFLA_MASTER, &pair.master.to_ne_bytes())
        .nested(libc::IFLA_LINKINFO, |bytes| {
            put_text(bytes, libc::IFLA_INFO_KIND, "veth");
            put_attribute(bytes, libc::IFLA_INFO_DATA | NESTED, |bytes| {
                put_attribute(bytes, VETH_INFO_PEER | NESTED, |bytes| put_veth_peer(bytes, pair));
            });
        })
}

fn put_veth_peer(bytes: &mut Vec<u8>, pair: &VethPair<'_>) {
    bytes.extend_from_slice(&link_header(0, 0));
    put_text(bytes, libc::IFLA_IFNAME, pair.peer_name);
    put_attribute(bytes, libc::IFLA_MTU, |bytes| bytes.extend_from_slice(&pair.mtu.to_ne_bytes()));
    put_attribute(bytes, libc::IFLA_ADDRESS, |bytes| bytes.extend_from_slice(&pair.peer_hardware));
    let descriptor = pair.peer_namespace.as_raw_fd();
    put_attribute(bytes, libc::IFLA_NET_NS_FD, |bytes| bytes.extend_from_slice(&descriptor.to_ne_bytes()));
}

/// Lets a bridge port talk to the bridge alone, not to other such ports.
pub fn isolate_port(name: &str) -> Request {
    let mut request =
        Request::new(libc::RTM_NEWLINK, CHANGE, format!("isolate the bridge port {name}"), &link_header(0, 0));
    put_text(&mut request.bytes, libc::IFLA_IFNAME, name);
    request.nested(libc::IFLA_LINKINFO, |bytes| {
        put_text(bytes, IFLA_INFO_SLAVE_KIND, "bridge");
        put_attribute(bytes, IFLA_INFO_SLAVE_DATA | NESTED, |bytes| {
            put_attribute(bytes, IFLA_BRPORT_ISOLATED, |bytes| bytes.push(1));
        });
    })
}

pub fn delete_link(name: &str) -> Request {
    let mut request = Request::new(libc::RTM_DELLINK, CHANGE, format!("remove {name}"), &link_header(0, 0));
    put_text(&mut request.bytes, libc::IFLA_IFNAME, name);
    request
}

pub fn set_up(index: u32) -> Request {
    let action = format!("bring up interface {index}");
    Request::new(libc::RTM_NEWLINK, CHANGE, action, &link_header(index, libc::IFF_UP))
}

pub fn set_mtu(index: u32, mtu: u32) -> Request {
    Request::new(libc::RTM_NEWLINK, CHANGE, format!("set the MTU of interface {index}"), &link_header(index, 0))
        .attribute(libc::IFLA_MTU, &mtu.to_ne_bytes())
}

/// Keeps the kernel from giving the link an IPv6 address by itself.
pub fn no_ipv6_address(index: u32) -> Request {
    let action = format!("turn off IPv6 addresses of interface {index}");
    Request::new(libc::RTM_NEWLINK, CHANGE, action, &link_header(index, 0)).nested(libc::IFLA_AF_SPEC, |bytes| {
        put_attribute(bytes, libc::AF_INET6 as u16 | NESTED, |bytes| {
            put_attribute(bytes, IFLA_INET6_ADDR_GEN_MODE, |bytes| bytes.push(IN6_ADDR_GEN_MODE_NONE));
        });
    })
}

pub fn add_address(index: u32, address: Ipv4Addr, subnet: Subnet) -> Request {
    let mut header = [0; 8];
    header[0] = libc::AF_INET as u8;
    header[1] = subnet.prefix;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    Request::new(libc::RTM_NEWADDR, CREATE, format!("give interface {index} the address {address}"), &header)
        .attribute(libc::IFA_LOCAL, &address.octets())
        .attribute(libc::IFA_ADDRESS, &address.octets())
        .attribute(libc::IFA_BROADCAST, &subnet.broadcast().octets())
}

pub fn add_default_route(index: u32, gateway: Ipv4Addr) -> Request {
    let mut header = [0; 12];
    header[0] = libc::AF_INET as u8;
    header[4] = libc::RT_TABLE_MAIN;
    header[5] = libc::RTPROT_STATIC;
    header[6] = libc::RT_SCOPE_UNIVERSE;
    header[7] = libc::RTN_UNICAST;
    Request::new(libc::RTM_NEWROUTE, CREATE, format!("route everything to {gateway}"), &header)
        .attribute(libc::RTA_GATEWAY, &gateway.octets())
        .attribute(libc::RTA_OIF, &index.to_ne_bytes())
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mtu: u32,
    pub up: bool,
    /// `bridge`, `veth`, …; empty for real devices.
    pub kind: String,
    /// The bridge that it is a port of.
    pub master: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub index: u32,
    pub address: Ipv4Addr,
    pub prefix: u8,
}

/// An IPv4 route of the main or another table (the kernel's own local table is left out).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: Ipv4Addr,
    pub prefix: u8,
    pub index: Option<u32>,
    pub metric: u32,
    /// Of the main table: the others hold for some traffic only.
    pub main: bool,
}

/// A netlink socket and the sequence numbers of its requests.
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub fn route() -> io::Result<Socket> {
        Socket::open(SockProtocol::NetlinkRoute)
    }

    pub fn netfilter() -> io::Result<Socket> {
        Socket::open(SockProtocol::NetlinkNetFilter)
    }

    /// A socket that is readable whenever something of these groups (`RTMGRP_*`) has come, changed or gone.
    pub fn watch(groups: u32) -> io::Result<Socket> {
        Socket::open_with(SockProtocol::NetlinkRoute, groups)
    }

    fn open(protocol: SockProtocol) -> io::Result<Socket> {
        Socket::open_with(protocol, 0)
    }

    fn open_with(protocol: SockProtocol, groups: u32) -> io::Result<Socket> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        // Errors then carry the kernel's words, and not the request that we know.
        set_option(fd.as_fd(), NETLINK_CAP_ACK)?;
        set_option(fd.as_fd(), NETLINK_EXT_ACK)?;
        Ok(Socket { fd, sequence: 0 })
    }

    /// Sends requests as one datagram and waits for all answers; the first refusal is returned.
    pub fn execute<const N: usize>(&mut self, requests: [Request; N]) -> Result<()> {
        let first = self.sequence;
        let mut datagram = Vec::new();
        for request in &requests {
            self.append(&mut datagram, request);
        }
        let action = |sequence: u32| {
            let position = sequence.wrapping_sub(first).wrapping_sub(1) as usize;
            requests.get(position).map(|request| request.action.as_str())
        };
        self.send(&datagram).map_err(|errno| Refused::at(action(first.wrapping_add(1)).unwrap_or_default(), errno))?;
        let mut failure = None;
        let mut open = N;
        while open > 0 {
            let bytes = self.receive().map_err(|errno| Refused::at("read the kernel's answer", errno))?;
            for message in Messages(&bytes) {
                // An answer to an earlier request that was given up is not ours.
                let Some(action) = action(message.sequence) else { continue };
                if i32::from(message.kind) == libc::NLMSG_ERROR {
                    open -= 1;
                    if let Err(refused) = message.verdict(action) {
                        failure.get_or_insert(refused);
                    }
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// The payloads of all messages that answer a dump or a question.
    fn ask(&mut self, request: &Request) -> Result<Vec<Vec<u8>>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(answers) = self.ask_once(request)? {
                return Ok(answers);
            }
        }
        Err(Refused::at(&request.action, Errno::EAGAIN))
    }

    /// None: what was listed changed meanwhile.
    fn ask_once(&mut self, request: &Request) -> Result<Option<Vec<Vec<u8>>>> {
        let mut datagram = Vec::new();
        self.append(&mut datagram, request);
        self.send(&datagram).map_err(|errno| Refused::at(&request.action, errno))?;
        let (mut answers, mut whole) = (Vec::new(), true);
        loop {
            let bytes = self.receive().map_err(|errno| Refused::at(&request.action, errno))?;
            for message in Messages(&bytes).filter(|message| message.sequence == self.sequence) {
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(whole.then_some(answers)),
                    libc::NLMSG_ERROR => return message.verdict(&request.action).map(|()| Some(answers)),
                    _ => answers.push(message.payload.to_vec()),
                }
            }
        }
    }

    pub fn links(&mut self) -> Result<Vec<Link>> {
        let request = Request::new(libc::RTM_GETLINK, DUMP, "list the interfaces".to_owned(), &link_header(0, 0));
        Ok(self.ask(&request)?.iter().filter_map(|payload| parse_link(payload)).collect())
    }

    pub fn link(&mut self, name: &str) -> Result<Option<Link>> {
        let mut request =
            Request::new(libc::RTM_GETLINK, CHANGE, format!("look for the interface {name}"), &link_header(0, 0));
        put_text(&mut request.bytes, libc::IFLA_IFNAME, name);
        match self.ask(&request) {
            Ok(answers) => Ok(answers.iter().find_map(|payload| parse_link(payload))),
            Err(refused) if refused.errno == Errno::ENODEV => Ok(None),
            Err(refused) => Err(refused),
        }
    }

    pub fn addresses(&mut self) -> Result<Vec<Address>> {
        let request = Request::new(
            libc::RTM_GETADDR,
            DUMP,
            "list the addresses".to_owned(),
            &[libc::AF_INET as u8, 0, 0, 0, 0, 0, 0, 0],
        );
        Ok(self.ask(&request)?.iter().filter_map(|payload| parse_address(payload)).collect())
    }

    pub fn routes(&mut self) -> Result<Vec<Route>> {
        let mut header = [0; 12];
        header[0] = libc::AF_INET as u8;
        let request = Request::new(libc::RTM_GETROUTE, DUMP, "list the routes".to_owned(), &header);
        Ok(self.ask(&request)?.iter().filter_map(|payload| parse_route(payload)).collect())
    }

    /// The user data (nft keeps a table's comment there) of an IPv4 nftables table, if there is such a table.
    pub fn nft_table(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE;
        let action = format!("look for the nftables table {name}");
        let mut request = Request::new(kind, CHANGE, action, &[NFPROTO_IPV4, 0, 0, 0]);
        put_text(&mut request.bytes, NFTA_TABLE_NAME, name);
        match self.ask(&request) {
            Ok(answers) => Ok(answers.first().map(|payload| {
                attribute_of(payload.get(4..).unwrap_or_default(), NFTA_TABLE_USERDATA).unwrap_or_default().to_vec()
            })),
            Err(refused) if refused.errno == Errno::ENOENT => Ok(None),
            Err(refused) => Err(refused),
        }
    }

    /// Gives the request its length and the next sequence number.
    fn append(&mut self, datagram: &mut Vec<u8>, request: &Request) {
        self.sequence = self.sequence.wrapping_add(1);
        let start = datagram.len();
        datagram.extend_from_slice(&request.bytes);
        let length = u32::try_from(request.bytes.len()).expect("a request of ours is a few hundred bytes");
        datagram[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        datagram[start + 8..start + 12].copy_from_slice(&self.sequence.to_ne_bytes());
    }

    fn send(&self, datagram: &[u8]) -> nix::Result<()> {
        sendto(self.fd.as_raw_fd(), datagram, &NetlinkAddr::new(0, 0), MsgFlags::empty()).map(|_| ())
    }

    /// Reads away what is there; a watching socket is then readable again when something new comes.
    pub fn drain(&self) -> io::Result<()> {
        let mut bytes = [0; 64];
        loop {
            match recv(self.fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                // ENOBUFS: more came than the socket held; whoever watches looks at the whole anyway.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn receive(&self) -> nix::Result<Vec<u8>> {
        let mut bytes = vec![0; BUFFER_BYTES];
        loop {
            match recv(self.fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_TRUNC) {
                Ok(length) if length > bytes.len() => return Err(Errno::EMSGSIZE),
                Ok(length) => {
                    bytes.truncate(length);
                    return Ok(bytes);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[expect(unsafe_code, reason = "no wrapper knows these socket options")]
fn set_option(fd: BorrowedFd<'_>, option: i32) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = size_of_val(&on) as libc::socklen_t;
    // SAFETY: `fd` is open for the whole call, and the kernel reads `length` bytes at the address of `on`, which lives here.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), SOL_NETLINK, option, (&raw const on).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Message<'_> {
    /// Reads an error message, whose code 0 means that all went well.
    fn verdict(&self, action: &str) -> Result<()> {
        let code = self.payload.first_chunk().map_or(-(Errno::EBADMSG as i32), |bytes| i32::from_ne_bytes(*bytes));
        if code == 0 {
            return Ok(());
        }
        let explained = self.flags & NLM_F_ACK_TLVS != 0;
        let attributes = if explained { self.payload.get(4 + HEADER_BYTES..).unwrap_or_default() } else { &[] };
        let kernel = attribute_of(attributes, NLMSGERR_ATTR_MSG).map(text).unwrap_or_default();
        Err(Refused { action: action.to_owned(), errno: Errno::from_raw(-code), kernel })
    }
}

/// The messages of a datagram; stops at the first that does not fit.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32_at(self.0, 0)? as usize;
        let payload = self.0.get(HEADER_BYTES..length)?;
        let message =
            Message { kind: u16_at(self.0, 4)?, flags: u16_at(self.0, 6)?, sequence: u32_at(self.0, 8)?, payload };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

/// The attributes behind a family header, as (type, payload); stops at the first that does not fit.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<(u16, &'a [u8])> {
        let length = u16_at(self.0, 0)? as usize;
        let attribute = (u16_at(self.0, 2)? & !NESTED, self.0.get(4..length)?);
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(attribute)
    }
}

fn attribute_of(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes(bytes).find(|(found, _)| *found == kind).map(|(_, payload)| payload)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    bytes.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let attributes = payload.get(16..)?;
    let kind = attribute_of(attributes, libc::IFLA_LINKINFO).and_then(|info| attribute_of(info, libc::IFLA_INFO_KIND));
    Some(Link {
        index: u32_at(payload, 4)?,
        name: text(attribute_of(attributes, libc::IFLA_IFNAME)?),
        mtu: u32_at(attribute_of(attributes, libc::IFLA_MTU)?, 0)?,
        up: u32_at(payload, 8)? & libc::IFF_UP as u32 != 0,
        kind: kind.map(text).unwrap_or_default(),
        master: attribute_of(attributes, libc::IFLA_MASTER).and_then(|bytes| u32_at(bytes, 0)),
    })
}

fn parse_address(payload: &[u8]) -> Option<Address> {
    let attributes = payload.get(8..)?;
    let local = attribute_of(attributes, libc::IFA_LOCAL).or_else(|| attribute_of(attributes, libc::IFA_ADDRESS))?;
    Some(Address { index: u32_at(payload, 4)?, address: ipv4(local)?, prefix: *payload.get(1)? })
}

fn parse_route(payload: &[u8]) -> Option<Route> {
    let attributes = payload.get(12..)?;
    let number = |kind| attribute_of(attributes, kind).and_then(|bytes| u32_at(bytes, 0));
    let table = number(libc::RTA_TABLE).unwrap_or_else(|| u32::from(payload[4]));
    if payload[0] != libc::AF_INET as u8 || table == u32::from(libc::RT_TABLE_LOCAL) {
        return None;
    }
    Some(Route {
        destination: attribute_of(attributes, libc::RTA_DST).and_then(ipv4).unwrap_or(Ipv4Addr::UNSPECIFIED),
        prefix: payload[1],
        index: number(libc::RTA_OIF),
        metric: number(libc::RTA_PRIORITY).unwrap_or(0),
        main: table == u32::from(libc::RT_TABLE_MAIN),
    })
}
