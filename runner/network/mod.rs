//! Networks of steps and containers.
//!
//! | kind | as root | as an ordinary user |
//! |---|---|---|
//! | default | a namespace with a veth on the bridge `forge0`, masqueraded ([`bridge`]) | a namespace behind `pasta` or `slirp4netns` ([`rootless`]) |
//! | host | the host's own | the host's own |
//! | none | a fresh one with loopback alone, made by whoever starts the container | the same |
//!
//! Where a default network cannot be had (no rights over the network, no veth in the kernel, no firewall, no
//! helper program) steps use the host's and [`Attachment::note`] says so and why.
//!
//! **What holds a namespace together.** A network namespace is a descriptor that a short-lived thread opened. When
//! the last descriptor closes and the last process in it is gone, the kernel removes it with its veth pair. A
//! build that is killed therefore leaves nothing but what is meant to stay: the bridge and the firewall table,
//! both reused by the next build. [`Networks::remove_all`] takes these down as well.
//!
//! **What changes on the host**: the bridge, the nftables table `ip forge` (or the iptables chains `FORGE-*` where
//! there is no `nft`), and `net.ipv4.ip_forward`, which is turned on if it is off. Nothing else.
//!
//! **Isolation.** Steps reach the outside and the host (at the gateway's address, `host.docker.internal`), but not
//! each other, neither by the bridge (its ports are isolated) nor by way of the host (the firewall drops it).
//! Nobody outside reaches a step: only answers to its own connections are let in. A step cannot send under a
//! foreign address. Addresses are IPv4; a step has no IPv6 but on loopback.
//!
//! **Threads.** One thread per [`Networks`] makes namespaces, ahead of need when told so by [`Networks::prepare`];
//! it starts with the first request and lives in the network namespace of the thread that made that request.

mod bridge;
mod firewall;
mod ipam;
mod netlink;
mod resolv;
mod rootless;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use forge_snapshotter::Store;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use tokio::sync::oneshot;

pub use resolv::{HOST_NAME, hosts_file};

use bridge::Bridge;
use netlink::Refused;
use rootless::Uplink;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("{action}: {source}")]
    System { action: String, source: io::Error },
    #[error("{program} ended with {status}: {output}")]
    Program { program: String, status: ExitStatus, output: String },
    #[error("{program} did not bring up the network within {seconds} s: {output}")]
    Late { program: String, seconds: u64, output: String },
    #[error(transparent)]
    Store(#[from] forge_snapshotter::Error),
    #[error("no address is free on {network} ({subnet}): too many steps and containers run at once")]
    NoAddress { network: String, subnet: ipam::Subnet },
    #[error("every private subnet that forge could use collides with a route or address of this host")]
    NoSubnet,
    #[error("there is an interface {name}, and it is not a bridge: rename or remove it")]
    NotABridge { name: String },
    #[error("the network thread is gone")]
    Stopped,
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<Error>),
}

impl Error {
    fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let action = action.into();
        move |source| Error::System { action, source }
    }

    /// Whether this tells that the host will not let us, or has no such thing, as opposed to a failure.
    fn is_unavailable(&self) -> bool {
        let errno = match self {
            Error::Refused(refused) => refused.errno,
            Error::System { source, .. } => Errno::from_raw(source.raw_os_error().unwrap_or(0)),
            // A firewall program that refuses; the programs of `rootless` are not asked about.
            Error::Program { .. } => return true,
            Error::Several(errors) => return errors.iter().any(Error::is_unavailable),
            _ => return false,
        };
        matches!(
            errno,
            Errno::EPERM
                | Errno::EACCES
                | Errno::EROFS
                | Errno::EOPNOTSUPP
                | Errno::EPROTONOSUPPORT
                | Errno::EAFNOSUPPORT
                | Errno::ENOSPC
        )
    }
}

/// The one bridge of a host, whatever state directories there are. The firewall table belongs to it.
const BRIDGE: &str = "forge0";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Default,
    Host,
    None,
}

impl From<forge_solver::graph::Network> for Kind {
    fn from(network: forge_solver::graph::Network) -> Kind {
        match network {
            forge_solver::graph::Network::Default => Kind::Default,
            forge_solver::graph::Network::Host => Kind::Host,
            forge_solver::graph::Network::None => Kind::None,
        }
    }
}

/// What the program knows and networks need to.
#[derive(Clone, Debug)]
pub struct Options {
    /// In a user namespace of our own, without rights over the host's network.
    pub rootless: bool,
    /// `--dns`: asked instead of the host's nameservers.
    pub nameservers: Vec<IpAddr>,
    /// The host's resolver configuration, and where systemd-resolved keeps the one behind its stub.
    pub resolv_conf: PathBuf,
    pub resolved_conf: PathBuf,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            rootless: false,
            nameservers: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            resolved_conf: "/run/systemd/resolve/resolv.conf".into(),
        }
    }
}

/// Where a container's processes are to live, network-wise.
#[derive(Debug)]
pub enum Namespace {
    Host,
    /// A new one with nothing but loopback, which the container's init brings up.
    Private,
    /// One that is ready: to be entered.
    Joined(OwnedFd),
}

/// A place on a network. Dropping it gives address and namespace back.
#[derive(Debug)]
pub struct Attachment {
    pub namespace: Namespace,
    /// The text of the container's /etc/resolv.conf.
    pub resolv_conf: String,
    /// Names and addresses that belong in /etc/hosts beside those of the container (see [`hosts_file`]).
    pub hosts: Vec<(String, String)>,
    /// The container's own address, where it has one to itself.
    pub address: Option<IpAddr>,
    /// What the user should know about this network; told once.
    pub note: Option<String>,
    _hold: Option<Hold>,
}

/// What lives as long as an attachment. Nobody reads it: it works by being dropped.
#[derive(Debug)]
enum Hold {
    Address { _lease: Lease },
    Uplink { _uplink: Arc<Uplink> },
}

/// The networks of one state directory, for one process. To be kept as long as its attachments are in use: with it go
/// what was made ahead and, without root, the program that carries their packets.
pub struct Networks {
    store: Store,
    options: Options,
    maker: Mutex<Option<Handle>>,
}

struct Handle {
    requests: Sender<Message>,
    thread: JoinHandle<()>,
}

impl Networks {
    /// Costs nothing: the host is looked at when the first attachment is asked for.
    pub fn new(store: &Store, options: Options) -> Networks {
        Networks { store: store.clone(), options, maker: Mutex::new(None) }
    }

    pub async fn attach(&self, kind: Kind) -> Result<Attachment> {
        match kind {
            Kind::None => Ok(self.plain(Namespace::Private, String::new())),
            Kind::Host => Ok(self.plain(Namespace::Host, resolv::for_host(&self.options)?)),
            Kind::Default => {
                let (reply, answer) = oneshot::channel();
                self.send(Message::Attach(reply))?;
                self.dress(answer.await.map_err(|_| Error::Stopped)??)
            }
        }
    }

    /// Has attachments to the default network made ahead of need, in the background. A failure shows when one is asked for.
    pub fn prepare(&self, count: usize) -> Result<()> {
        self.send(Message::Prepare(count))
    }

    /// Takes down what builds leave in place: the bridge (and with it every attachment) and the firewall table.
    pub fn remove_all(&self) -> Result<()> {
        self.stop();
        if self.options.rootless { Ok(()) } else { bridge::remove(&self.store, BRIDGE) }
    }

    /// Ends the thread; the next request starts another, which looks at the host anew.
    fn stop(&self) {
        let maker = self.maker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Handle { requests, thread }) = maker {
            // Either fails only if the thread has ended already, and then its leases end with this process.
            drop(requests.send(Message::Close));
            drop(thread.join());
        }
    }

    fn plain(&self, namespace: Namespace, resolv_conf: String) -> Attachment {
        Attachment { namespace, resolv_conf, hosts: Vec::new(), address: None, note: None, _hold: None }
    }

    /// Adds the files that make a connection usable.
    fn dress(&self, connection: Connection) -> Result<Attachment> {
        let mut notes: Vec<String> = connection.note.into_iter().collect();
        let resolv_conf = match &connection.namespace {
            Some(_) => {
                let resolver = resolv::for_namespace(&self.options, connection.resolver)?;
                notes.extend(resolver.note.filter(|_| connection.first));
                resolver.text
            }
            None => resolv::for_host(&self.options)?,
        };
        Ok(Attachment {
            namespace: connection.namespace.map_or(Namespace::Host, Namespace::Joined),
            resolv_conf,
            hosts: connection
                .gateway
                .map(|gateway| (resolv::HOST_NAME.to_owned(), gateway.to_string()))
                .into_iter()
                .collect(),
            address: connection.address.map(IpAddr::V4),
            note: (!notes.is_empty()).then(|| notes.join("; ")),
            _hold: connection.hold,
        })
    }

    fn send(&self, message: Message) -> Result<()> {
        let mut maker = self.maker.lock().unwrap_or_else(PoisonError::into_inner);
        if maker.is_none() {
            *maker = Some(Handle::start(self.store.clone(), self.options.clone())?);
        }
        let handle = maker.as_ref().ok_or(Error::Stopped)?;
        handle.requests.send(message).map_err(|_| Error::Stopped)
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        self.stop();
    }
}

enum Message {
    Attach(oneshot::Sender<Result<Connection>>),
    Prepare(usize),
    Release(Ipv4Addr),
    Close,
}

/// An address on loan from the maker's pool.
#[derive(Debug)]
struct Lease {
    address: Ipv4Addr,
    pool: Sender<Message>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Without a maker nobody needs the address: its lease ends with this process.
        drop(self.pool.send(Message::Release(self.address)));
    }
}

/// What the maker hands out.
struct Connection {
    /// None: the host's.
    namespace: Option<OwnedFd>,
    address: Option<Ipv4Addr>,
    gateway: Option<Ipv4Addr>,
    /// A nameserver that the network itself offers.
    resolver: Option<Ipv4Addr>,
    note: Option<String>,
    first: bool,
    hold: Option<Hold>,
}

/// How the default network is provided, found out once.
enum Way {
    Bridge(Box<Bridge>),
    Uplink(Arc<Uplink>),
    Host,
}

/// The thread's state: it alone touches the bridge, so nothing here is shared.
struct Maker {
    store: Store,
    options: Options,
    way: Option<Way>,
    /// Not told yet.
    note: Option<String>,
    first: bool,
    ready: VecDeque<Connection>,
    requests: Sender<Message>,
}

impl Handle {
    fn start(store: Store, options: Options) -> Result<Handle> {
        let (requests, inbox) = mpsc::channel();
        let maker = Maker {
            store,
            options,
            way: None,
            note: None,
            first: true,
            ready: VecDeque::new(),
            requests: requests.clone(),
        };
        let thread = thread::Builder::new()
            .name("forge-network".to_owned())
            .spawn(move || maker.serve(&inbox))
            .map_err(Error::system("start the network thread"))?;
        Ok(Handle { requests, thread })
    }
}

impl Maker {
    /// Serves until told to close; between requests it makes what was ordered ahead.
    fn serve(mut self, inbox: &Receiver<Message>) {
        let mut wanted: usize = 0;
        loop {
            let message = match wanted.saturating_sub(self.ready.len()) {
                0 => inbox.recv().map_err(|_| TryRecvError::Disconnected),
                _ => inbox.try_recv(),
            };
            match message {
                Ok(Message::Attach(reply)) => {
                    wanted = wanted.saturating_sub(1);
                    let connection = self.ready.pop_front().map_or_else(|| self.connect(), Ok);
                    // Who asked may have been cancelled; dropping the connection takes it down.
                    drop(reply.send(connection.map(|connection| self.tell(connection))));
                }
                Ok(Message::Prepare(count)) => wanted = count,
                Ok(Message::Release(address)) => self.release(address),
                Ok(Message::Close) | Err(TryRecvError::Disconnected) => return self.close(),
                Err(TryRecvError::Empty) => match self.connect() {
                    Ok(connection) => self.ready.push_back(connection),
                    // It will be met again, and told, when an attachment is asked for.
                    Err(_) => wanted = 0,
                },
            }
        }
    }

    /// The first connection that is handed out carries the notes.
    fn tell(&mut self, connection: Connection) -> Connection {
        let first = std::mem::take(&mut self.first);
        Connection { note: self.note.take(), first, ..connection }
    }

    fn connect(&mut self) -> Result<Connection> {
        let mut way = match self.way.take() {
            Some(way) => way,
            None => self.find_way()?,
        };
        let connection = self.connect_by(&mut way);
        self.way = Some(way);
        connection
    }

    fn connect_by(&mut self, way: &mut Way) -> Result<Connection> {
        let blank = Connection {
            namespace: None,
            address: None,
            gateway: None,
            resolver: None,
            note: None,
            first: false,
            hold: None,
        };
        match way {
            Way::Host => Ok(blank),
            Way::Uplink(uplink) => Ok(Connection {
                namespace: Some(uplink.namespace()?),
                resolver: Some(uplink.resolver()),
                hold: Some(Hold::Uplink { _uplink: Arc::clone(uplink) }),
                ..blank
            }),
            Way::Bridge(bridge) => {
                let (namespace, address) = bridge.connect(&self.store)?;
                let lease = Lease { address, pool: self.requests.clone() };
                Ok(Connection {
                    namespace: Some(namespace),
                    address: Some(address),
                    gateway: Some(bridge.gateway()),
                    hold: Some(Hold::Address { _lease: lease }),
                    ..blank
                })
            }
        }
    }

    fn find_way(&mut self) -> Result<Way> {
        if self.options.rootless {
            return self.find_uplink(None);
        }
        match Bridge::open(&self.store, BRIDGE) {
            Ok((bridge, note)) => {
                self.note = note;
                Ok(Way::Bridge(Box::new(bridge)))
            }
            Err(error) if error.is_unavailable() => self.find_uplink(Some(error)),
            Err(error) => Err(error),
        }
    }

    /// `refused` tells why there is no bridge, where one was tried.
    fn find_uplink(&mut self, refused: Option<Error>) -> Result<Way> {
        let reason = match Uplink::start() {
            Ok(Some(uplink)) => return Ok(Way::Uplink(Arc::new(uplink))),
            Ok(None) => "no pasta or slirp4netns".to_owned(),
            Err(error) => error.to_string(),
        };
        let refused = refused.map(|error| format!("{error}; ")).unwrap_or_default();
        self.note = Some(format!("{refused}{reason}: steps use the host's network"));
        Ok(Way::Host)
    }

    fn release(&mut self, address: Ipv4Addr) {
        if let Some(Way::Bridge(bridge)) = &mut self.way {
            bridge.give_back(address);
        }
    }

    /// Gives up the leases of addresses that nobody uses. Those in use end with this process.
    fn close(mut self) {
        for connection in self.ready.drain(..) {
            if let (Some(Way::Bridge(bridge)), Some(address)) = (&mut self.way, connection.address) {
                bridge.give_back(address);
            }
        }
        if let Some(Way::Bridge(bridge)) = self.way {
            // A lease that stays behind is free as soon as this process is gone.
            drop(bridge.close(&self.store));
        }
    }
}

/// A new network namespace, made by a thread that ends with this call, and what `inside` opened in it.
fn new_namespace<T: Send>(inside: impl FnOnce() -> Result<T> + Send) -> Result<(OwnedFd, T)> {
    let enter = || {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(io::Error::from)
            .map_err(Error::system("make a network namespace"))?;
        let namespace =
            File::open("/proc/thread-self/ns/net").map_err(Error::system("open the new network namespace"))?;
        Ok((OwnedFd::from(namespace), inside()?))
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("forge-netns".to_owned())
            .spawn_scoped(scope, enter)
            .map_err(Error::system("start a thread for a network namespace"))?;
        thread.join().unwrap_or(Err(Error::Stopped))
    })
}
