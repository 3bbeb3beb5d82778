//! Real namespaces, bridges and firewall rules, on a stage of their own: a network namespace plays the host, another
//! one the internet. The machine's network is not touched, and everything goes with the test's threads and
//! descriptors, however it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::setns;

use super::ipam::{Owner, Pool, Subnet};
use super::netlink::{Socket, VethPair};
use super::*;

const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const INTERNET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Smaller than usual, to see it arrive.
const MTU: u32 = 1400;
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a test waits for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(200);

/// The calling thread's namespace is the host's; this is what lies beyond its uplink.
struct Stage {
    internet: OwnedFd,
    store: Store,
    directory: tempfile::TempDir,
}

impl Stage {
    fn networks(&self) -> Networks {
        self.networks_of(&self.store)
    }

    fn networks_of(&self, store: &Store) -> Networks {
        let resolv_conf = self.directory.path().join("resolv.conf");
        std::fs::write(&resolv_conf, "nameserver 198.51.100.1\n").unwrap();
        Networks::new(store, Options { resolv_conf, ..Options::default() })
    }

    fn leases(&self) -> i64 {
        let count = |connection: &rusqlite::Connection| {
            connection.query_row("SELECT count(*) FROM leases", [], |row| row.get(0))
        };
        self.store.database().with(count).unwrap()
    }
}

/// Runs a test as the host, or says why it cannot.
fn on_stage(test: impl FnOnce(&Stage) + Send) {
    let set = || {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
            eprintln!("skipped: no network namespace can be made here: {errno}");
            return;
        }
        let internet = match build_stage() {
            Ok(internet) => internet,
            Err(error) => {
                eprintln!("skipped: no stage can be built here: {error}");
                return;
            }
        };
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("state")).unwrap();
        test(&Stage { internet, store, directory });
    };
    thread::scope(|scope| {
        if let Err(panic) = scope.spawn(set).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn build_stage() -> Result<OwnedFd> {
    let open = || Socket::route().map_err(Error::system("open a netlink socket"));
    let subnet = Subnet::new(HOST, 24);
    let (internet, mut there) = new_namespace(open)?;
    let mut here = open()?;
    here.execute([netlink::add_veth(&VethPair {
        name: "uplink",
        master: 0,
        mtu: MTU,
        peer_name: "uplink",
        peer_hardware: [2, 0, 0, 0, 0, 1],
        peer_namespace: internet.as_fd(),
    })])?;
    let far = there.link("uplink")?.unwrap().index;
    there.execute([netlink::set_up(1), netlink::add_address(far, INTERNET, subnet), netlink::set_up(far)])?;
    let uplink = here.link("uplink")?.unwrap().index;
    here.execute([
        netlink::set_up(1),
        netlink::add_address(uplink, HOST, subnet),
        netlink::add_default_route(uplink, INTERNET),
    ])?;
    Ok(internet)
}

/// Runs something in a namespace. Sockets that it opens stay there.
fn inside<T: Send>(namespace: impl AsFd + Sync, work: impl FnOnce() -> T + Send) -> T {
    let enter = || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(enter).join().unwrap())
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn attach(networks: &Networks) -> Attachment {
    wait(networks.attach(Kind::Default)).unwrap()
}

fn namespace(attachment: &Attachment) -> &OwnedFd {
    match &attachment.namespace {
        Namespace::Joined(namespace) => namespace,
        other => panic!("{other:?}, note: {:?}", attachment.note),
    }
}

fn address(attachment: &Attachment) -> IpAddr {
    attachment.address.unwrap()
}

fn connect(from: &Attachment, to: impl Into<SocketAddr>, patience: Duration) -> io::Result<TcpStream> {
    let to = to.into();
    inside(namespace(from), || TcpStream::connect_timeout(&to, patience))
}

fn listen(namespace: impl AsFd + Sync, port: u16) -> TcpListener {
    inside(namespace, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap())
}

/// Whether a step reaches the internet, which must see the host's address.
fn assert_reaches_internet(stage: &Stage, attachment: &Attachment) {
    let listener = listen(&stage.internet, 7);
    let mut stream = connect(attachment, (INTERNET, 7), PATIENCE).unwrap();
    let (mut other, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), IpAddr::V4(HOST), "not masqueraded");
    other.write_all(b"hello").unwrap();
    drop(other);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
}

fn steps_links() -> Vec<String> {
    let links = Socket::route().unwrap().links().unwrap();
    links.into_iter().map(|link| link.name).filter(|name| name.starts_with("fg")).collect()
}

/// The kernel takes a namespace apart in its own time; waits until none of its veths is left.
fn wait_until_unplugged() {
    let watch = Socket::watch(libc::RTMGRP_LINK as u32).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !steps_links().is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:?}", steps_links());
        poll(&mut [PollFd::new(watch.as_fd(), PollFlags::POLLIN)], PollTimeout::from(1000_u16)).unwrap();
        watch.drain().unwrap();
    }
}

#[test]
fn steps_reach_outside_and_host_but_not_each_other() {
    on_stage(|stage| {
        let networks = stage.networks();
        let (one, other) = (attach(&networks), attach(&networks));
        assert_ne!(address(&one), address(&other));
        assert_reaches_internet(stage, &one);
        assert_reaches_internet(stage, &other);

        let gateway: Ipv4Addr = one.hosts[0].1.parse().unwrap();
        assert_eq!(one.hosts[0].0, "host.docker.internal");
        let host = TcpListener::bind((gateway, 80)).unwrap();
        drop(connect(&one, (gateway, 80), PATIENCE).unwrap());
        assert_eq!(host.accept().unwrap().1.ip(), address(&one));

        let listener = listen(namespace(&other), 80);
        let listening = (address(&other), 80);
        connect(&one, listening, SILENCE).unwrap_err();
        // Its own namespace would have let it in.
        drop(connect(&other, listening, PATIENCE).unwrap());
        drop(listener);
    });
}

#[test]
fn nobody_outside_reaches_a_step() {
    on_stage(|stage| {
        let networks = stage.networks();
        let step = attach(&networks);
        let _listener = listen(namespace(&step), 80);
        let from_outside = inside(&stage.internet, || {
            let status = Command::new("ip").args(["route", "add", "10.0.0.0/8", "via", &HOST.to_string()]).status();
            assert!(status.unwrap().success());
            TcpStream::connect_timeout(&SocketAddr::from((address(&step), 80)), SILENCE)
        });
        assert_eq!(from_outside.unwrap_err().kind(), io::ErrorKind::TimedOut);
        // From the host itself it does.
        drop(TcpStream::connect_timeout(&SocketAddr::from((address(&step), 80)), PATIENCE).unwrap());
    });
}

#[test]
fn a_namespace_is_furnished_and_has_the_uplinks_mtu() {
    on_stage(|stage| {
        let networks = stage.networks();
        let step = attach(&networks);
        assert_eq!(step.resolv_conf, "nameserver 198.51.100.1\n");
        let mut socket = inside(namespace(&step), || Socket::route().unwrap());
        let links = socket.links().unwrap();
        let eth0 = links.iter().find(|link| link.name == "eth0").unwrap();
        assert!(links.iter().any(|link| link.name == "lo" && link.up));
        assert_eq!((eth0.mtu, eth0.up, eth0.kind.as_str()), (MTU, true, "veth"));
        assert!(socket.routes().unwrap().iter().any(|route| route.prefix == 0 && route.index == Some(eth0.index)));
        assert_eq!(Socket::route().unwrap().link("forge0").unwrap().unwrap().mtu, MTU);
        let six = inside(namespace(&step), || {
            std::net::UdpSocket::bind("[::]:0").and_then(|socket| socket.connect("[2001:db8::1]:53"))
        });
        assert!(six.is_err(), "a step must have no way out by IPv6");
    });
}

#[test]
fn the_other_kinds_need_nothing_from_the_host() {
    on_stage(|stage| {
        let networks = stage.networks();
        let host = wait(networks.attach(Kind::Host)).unwrap();
        assert!(matches!(host.namespace, Namespace::Host));
        assert_eq!(host.resolv_conf, "nameserver 198.51.100.1\n");
        let none = wait(networks.attach(Kind::None)).unwrap();
        assert!(matches!(none.namespace, Namespace::Private));
        assert_eq!(none.resolv_conf, "");
        assert!(Socket::route().unwrap().link("forge0").unwrap().is_none());
    });
}

#[test]
fn leases_of_the_dead_are_free_and_those_of_the_living_are_not() {
    on_stage(|stage| {
        drop(attach(&stage.networks()));
        assert_eq!(stage.leases(), 0, "what is not in use any more is not leased");
        let subnet = ipam::recorded(&stage.store, "forge0").unwrap().unwrap();
        let lease_all = |owner: Owner| {
            ipam::lease(&stage.store, Pool { network: "forge0", subnet }, owner, 0, usize::MAX)
                .map(|addresses| addresses.len())
        };
        let owner = Owner::current().unwrap();
        let dead = Owner { start: owner.start + 1, ..owner };
        assert_eq!(lease_all(dead).unwrap(), 253);
        drop(attach(&stage.networks()));
        assert_eq!(lease_all(owner).unwrap(), 253);
        assert!(matches!(lease_all(owner), Err(Error::NoAddress { .. })));
        let error = wait(stage.networks().attach(Kind::Default)).unwrap_err();
        assert!(matches!(error, Error::NoAddress { .. }), "{error}");
    });
}

#[test]
fn state_directories_share_the_bridge_without_sharing_addresses() {
    on_stage(|stage| {
        let second = Store::open(&stage.directory.path().join("second")).unwrap();
        let (here, there) = (stage.networks(), stage.networks_of(&second));
        let all: Vec<_> = (0..3).flat_map(|_| [attach(&here), attach(&there)]).collect();
        let mut addresses: Vec<_> = all.iter().map(address).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 6);
        all.iter().for_each(|attachment| assert_reaches_internet(stage, attachment));
    });
}

#[test]
fn attachments_made_ahead_are_as_good() {
    on_stage(|stage| {
        let networks = stage.networks();
        networks.prepare(3).unwrap();
        let all: Vec<_> = (0..5).map(|_| attach(&networks)).collect();
        all.iter().for_each(|attachment| assert_reaches_internet(stage, attachment));
        // Notes are for the first alone.
        assert!(all[1..].iter().all(|attachment| attachment.note.is_none()));
        drop(all);
        wait_until_unplugged();
        drop(networks);
        assert_eq!(stage.leases(), 0);
    });
}

#[test]
fn firewall_rules_are_found_again_and_replaced_when_they_are_gone() {
    on_stage(|stage| {
        drop(attach(&stage.networks()));
        let subnet = ipam::recorded(&stage.store, "forge0").unwrap().unwrap();
        let handle = || {
            let output = Command::new("nft").args(["-a", "list", "table", "ip", "forge"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().lines().next().map(str::to_owned)
        };
        let Some(before) = handle() else {
            eprintln!("skipped: no nft here");
            return;
        };
        firewall::ensure("forge0", subnet).unwrap();
        assert_eq!(handle().unwrap(), before, "rules as wanted were made again");
        assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
        let networks = stage.networks();
        assert_reaches_internet(stage, &attach(&networks));
        assert_ne!(handle().unwrap(), before);
    });
}

#[test]
fn a_host_that_drops_what_it_forwards_is_told_of() {
    on_stage(|stage| {
        let rules = "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; } ; }";
        match Command::new("nft").arg(rules).status() {
            Ok(status) if status.success() => {}
            other => {
                eprintln!("skipped: no nft here: {other:?}");
                return;
            }
        }
        let networks = stage.networks();
        let note = attach(&networks).note.unwrap();
        assert!(note.contains("(table ip filter, chain FORWARD)"), "{note}");
        assert_eq!(attach(&networks).note, None);
    });
}

#[test]
fn iptables_does_where_there_is_no_nft() {
    on_stage(|stage| {
        drop(attach(&stage.networks()));
        let subnet = ipam::recorded(&stage.store, "forge0").unwrap().unwrap();
        assert!(Command::new("nft").args(["flush", "ruleset"]).status().unwrap().success());
        for _ in 0..2 {
            match firewall::ensure_iptables("forge0", subnet) {
                Ok(true) => {}
                other => {
                    eprintln!("skipped: no iptables here: {other:?}");
                    return;
                }
            }
        }
        let (mut bridge, _) = Bridge::open(&stage.store, "forge0").unwrap();
        assert!(Command::new("nft").args(["delete", "table", "ip", "forge"]).status().unwrap().success());
        let (namespace, _) = bridge.connect(&stage.store).unwrap();
        let listener = listen(&stage.internet, 7);
        drop(inside(&namespace, || TcpStream::connect_timeout(&(INTERNET, 7).into(), PATIENCE).unwrap()));
        assert_eq!(listener.accept().unwrap().1.ip(), IpAddr::V4(HOST));
        assert!(firewall::remove().is_empty());
        let rules = Command::new("iptables-save").output().unwrap().stdout;
        assert!(!String::from_utf8(rules).unwrap().contains("FORGE"));
    });
}

#[test]
fn removing_all_leaves_nothing() {
    on_stage(|stage| {
        let networks = stage.networks();
        let step = attach(&networks);
        networks.remove_all().unwrap();
        let mut socket = Socket::route().unwrap();
        assert_eq!(socket.link("forge0").unwrap(), None);
        assert_eq!(steps_links(), Vec::<String>::new());
        assert_eq!(Socket::netfilter().unwrap().nft_table("forge").unwrap(), None);
        assert_eq!(stage.leases(), 0);
        connect(&step, (INTERNET, 7), SILENCE).unwrap_err();
        // Twice is once.
        networks.remove_all().unwrap();
        assert_reaches_internet(stage, &attach(&networks));
    });
}

#[test]
fn a_foreign_interface_with_the_bridges_name_is_left_alone() {
    on_stage(|stage| {
        let (elsewhere, _) = new_namespace(|| Ok(())).unwrap();
        let pair = VethPair {
            name: "forge0",
            master: 0,
            mtu: MTU,
            peer_name: "eth0",
            peer_hardware: [2, 0, 0, 0, 0, 1],
            peer_namespace: elsewhere.as_fd(),
        };
        Socket::route().unwrap().execute([netlink::add_veth(&pair)]).unwrap();
        let error = wait(stage.networks().attach(Kind::Default)).unwrap_err();
        assert!(matches!(error, Error::NotABridge { .. }), "{error}");
        stage.networks().remove_all().unwrap();
        assert!(Socket::route().unwrap().link("forge0").unwrap().is_some());
    });
}

#[test]
fn refusals_carry_the_kernels_words() {
    on_stage(|_| {
        let mut socket = Socket::route().unwrap();
        let error = socket.execute([netlink::add_default_route(1, Ipv4Addr::new(203, 0, 113, 1))]).unwrap_err();
        assert_eq!(error.errno, Errno::ENETUNREACH);
        assert_eq!(
            error.to_string(),
            "route everything to 203.0.113.1: Network is unreachable (Nexthop has invalid gateway)"
        );
        let both = [netlink::delete_link("nonesuch"), netlink::set_up(1)];
        assert_eq!(socket.execute(both).unwrap_err().action, "remove nonesuch");
    });
}

/// Starts one of the functions below as a process of its own, in this thread's network namespace.
fn start(name: &str, wrapper: &[&str], state: &Path) -> Child {
    let program = std::env::current_exe().unwrap();
    let mut words: Vec<&str> = wrapper.to_vec();
    let name = format!("network::tests::{name}");
    words.extend([program.to_str().unwrap(), "--exact", &name, "--ignored", "--nocapture"]);
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("FORGE_TEST_STATE", state);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

/// Descriptors of the processes that a process has started.
fn children_of(child: &Child) -> Vec<OwnedFd> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let children = tasks.flat_map(|task| std::fs::read_to_string(task.unwrap().path().join("children")));
    let text = children.collect::<String>();
    text.split_ascii_whitespace()
        .filter_map(|pid| rustix::process::Pid::from_raw(pid.parse().unwrap()))
        .map(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap())
        .collect()
}

/// What the process said on a line of its own that starts with `key`.
fn hear(child: &mut Child, key: &str) -> String {
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    lines.map(|line| line.unwrap()).find_map(|line| line.split_once(key).map(|(_, rest)| rest.to_owned())).unwrap()
}

fn state_of_child() -> Option<Store> {
    std::env::var_os("FORGE_TEST_STATE").map(|path| Store::open(Path::new(&path)).unwrap())
}

#[test]
#[ignore = "a process that another test starts and kills"]
fn attach_and_wait_for_death() {
    let Some(store) = state_of_child() else { return };
    let networks = Networks::new(&store, Options::default());
    networks.prepare(4).unwrap();
    let held = [attach(&networks), attach(&networks)];
    println!("\nready {}", held.len());
    io::stdin().read_exact(&mut [0]).unwrap();
}

#[test]
fn a_killed_build_leaves_only_bridge_and_table() {
    on_stage(|stage| {
        let state = stage.store.root();
        let mut child = start("attach_and_wait_for_death", &[], state);
        assert_eq!(hear(&mut child, "ready "), "2");
        assert!(steps_links().len() >= 2);
        assert!(stage.leases() >= 2);
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until_unplugged();
        let names: Vec<_> = Socket::route().unwrap().links().unwrap().into_iter().map(|link| link.name).collect();
        assert!(names.contains(&"forge0".to_owned()));
        let networks = stage.networks();
        assert_reaches_internet(stage, &attach(&networks));
        drop(networks);
        assert!(stage.leases() <= 1, "the dead process's leases are gone");
    });
}

#[test]
#[ignore = "a process that another test starts in a user namespace"]
fn attach_without_rights() {
    let Some(store) = state_of_child() else { return };
    let networks = Networks::new(&store, Options { rootless: true, ..Options::default() });
    let (one, other) = (attach(&networks), attach(&networks));
    println!("\nnote {:?}", one.note);
    if matches!(one.namespace, Namespace::Host) {
        return;
    }
    let said = |attachment: &Attachment| {
        let mut text = String::new();
        connect(attachment, (INTERNET, 7), PATIENCE).unwrap().read_to_string(&mut text).unwrap();
        text
    };
    println!("\nsaid {} {}", said(&one), said(&other));
    io::stdin().read_exact(&mut [0]).unwrap();
}

#[test]
fn without_rights_a_program_carries_the_packets() {
    on_stage(|stage| {
        let listener = listen(&stage.internet, 7);
        let state = stage.directory.path().join("rootless");
        let mut child = start("attach_without_rights", &["unshare", "--user", "--map-root-user", "--mount"], &state);
        let note = hear(&mut child, "note ");
        if note.contains("steps use the host's network") {
            eprintln!("skipped: {note}");
            child.wait().unwrap();
            return;
        }
        for word in [b"one", b"two"] {
            let (mut stream, from) = listener.accept().unwrap();
            assert_eq!(from.ip(), IpAddr::V4(HOST));
            stream.write_all(word).unwrap();
        }
        assert_eq!(hear(&mut child, "said "), "one two");
        let programs = children_of(&child);
        assert_eq!(programs.len(), 1, "one program serves all");
        child.kill().unwrap();
        child.wait().unwrap();
        for program in programs {
            let ended = poll(&mut [PollFd::new(program.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000_u16));
            assert_eq!(ended, Ok(1), "it outlived the build");
        }
    });
}

#[test]
#[ignore = "a measurement, printed"]
fn cost_of_an_attachment() {
    on_stage(|stage| {
        let networks = stage.networks();
        let timed = |what: &str, work: &dyn Fn() -> Attachment| {
            let start = Instant::now();
            let made = work();
            eprintln!("{what}: {:?}", start.elapsed());
            made
        };
        let mut held = vec![timed("first, with bridge and rules", &|| attach(&networks))];
        for _ in 0..10 {
            held.push(timed("next", &|| attach(&networks)));
        }
        let listener = listen(&stage.internet, 7);
        let start = Instant::now();
        drop(connect(&held[10], (INTERNET, 7), PATIENCE).unwrap());
        eprintln!("connection right after: {:?}", start.elapsed());
        drop(listener);
        let again = stage.networks();
        held.push(timed("first of another build", &|| attach(&again)));
        let start = Instant::now();
        (0..600).for_each(|_| drop(attach(&networks)));
        eprintln!("600 times attach and drop: {:?}", start.elapsed());
    });
}
