//! The default network without rights over the host's: `pasta` or `slirp4netns` carries packets between a namespace
//! and ordinary sockets.
//!
//! One namespace and one such program serve all steps of a build: starting one costs as much as starting a step,
//! and each is a process with megabytes of buffers. Steps of one build that run at the same time therefore share
//! their ports, as they would on the host's network, but they see nothing of the host's: its loopback is closed to
//! them by the options below.
//!
//! The namespace is handed over as standard input, and named `/proc/self/fd/0`: these programs give up the right to
//! look into other processes before they open it, and newer ones close every other descriptor. The program dies with
//! the thread that started it, and is killed when the last attachment and that thread let go of it. It is ready
//! when the namespace has a default route, and the kernel tells us of that.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, set_parent_process_death_signal};

use super::netlink::Socket;
use super::{Error, Result, new_namespace};

/// Both programs take some 10 ms; a machine that needs longer than this has other troubles.
const READY_SECONDS: u64 = 10;
/// Of what a program said before it gave up.
const OUTPUT_BYTES: u64 = 4096;

struct Program {
    name: &'static str,
    args: &'static [&'static str],
    /// Where it answers questions for nameservers.
    resolver: Ipv4Addr,
}

/// In order of preference: pasta is the faster and the more exact one.
const PROGRAMS: [Program; 2] = [
    Program {
        name: "pasta",
        args: &[
            "--foreground",
            "--quiet",
            "--config-net",
            "--netns",
            "/proc/self/fd/0",
            "--no-netns-quit",
            "--no-map-gw",
            "--tcp-ports",
            "none",
            "--udp-ports",
            "none",
            "--tcp-ns",
            "none",
            "--udp-ns",
            "none",
            // Link-local, so that it hides nothing.
            "--dns-forward",
            "169.254.53.53",
        ],
        resolver: Ipv4Addr::new(169, 254, 53, 53),
    },
    Program {
        name: "slirp4netns",
        args: &[
            "--configure",
            "--mtu=65520",
            "--disable-host-loopback",
            "--netns-type=path",
            "/proc/self/fd/0",
            "tap0",
        ],
        resolver: Ipv4Addr::new(10, 0, 2, 3),
    },
];

/// A namespace with a way out, and the process that is this way.
#[derive(Debug)]
pub struct Uplink {
    namespace: OwnedFd,
    resolver: Ipv4Addr,
    child: Child,
}

impl Uplink {
    /// Starts the first program that is installed and works. None: none is installed.
    pub fn start() -> Result<Option<Uplink>> {
        let mut failure = None;
        for program in &PROGRAMS {
            match Uplink::start_with(program) {
                Ok(uplink) => return Ok(Some(uplink)),
                Err(Error::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                // The preferred program's words are the ones to tell.
                Err(error) => drop(failure.get_or_insert(error)),
            }
        }
        failure.map_or(Ok(None), Err)
    }

    fn start_with(program: &Program) -> Result<Uplink> {
        let open = || Ok((Socket::route()?, Socket::watch(libc::RTMGRP_IPV4_ROUTE as u32)?));
        let (namespace, sockets) =
            new_namespace(|| open().map_err(Error::system("open sockets in the new namespace")))?;
        let handed = namespace.try_clone().map_err(Error::system("duplicate the namespace's descriptor"))?;
        let words = rustix::fs::memfd_create("forge-uplink", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(Error::system("make a file for a program's messages"))?;
        let words = File::from(words);
        let stderr = words.try_clone().map_err(Error::system("duplicate a descriptor"))?;
        let mut command = Command::new(program.name);
        command.args(program.args).stdin(Stdio::from(handed)).stdout(Stdio::null()).stderr(Stdio::from(stderr));
        die_with_parent(&mut command);
        let child = command.spawn().map_err(Error::system(format!("start {}", program.name)))?;
        // From here on the guard's drop ends the process.
        let mut uplink = Uplink { namespace, resolver: program.resolver, child };
        uplink.wait_until_ready(program.name, sockets, words)?;
        Ok(uplink)
    }

    fn wait_until_ready(&mut self, program: &str, (mut socket, watch): (Socket, Socket), words: File) -> Result<()> {
        let process = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())
            .map_err(io::Error::from)
            .map_err(Error::system(format!("watch {program}")))?;
        let deadline = Instant::now() + Duration::from_secs(READY_SECONDS);
        while !socket.routes()?.iter().any(|route| route.prefix == 0) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Late { program: program.to_owned(), seconds: READY_SECONDS, output: said(words) });
            }
            if wait_for_either(&watch, &process, left)? {
                let status = self.child.wait().map_err(Error::system(format!("wait for {program}")))?;
                return Err(Error::Program { program: program.to_owned(), status, output: said(words) });
            }
        }
        Ok(())
    }

    pub fn namespace(&self) -> Result<OwnedFd> {
        self.namespace.try_clone().map_err(Error::system("duplicate the namespace's descriptor"))
    }

    pub fn resolver(&self) -> Ipv4Addr {
        self.resolver
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        // Killing fails only for a process that has been waited for, and then waiting returns at once.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Waits until a route changes (no), the process ends (yes) or the time is over (no).
fn wait_for_either(watch: &Socket, process: &OwnedFd, left: Duration) -> Result<bool> {
    // Rounded up, so that the last wait is not a busy one.
    let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
    let mut waiting = [PollFd::new(watch.as_fd(), PollFlags::POLLIN), PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    match poll(&mut waiting, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(Error::system("wait for the network")(errno.into())),
    }
    let ended = waiting[1].any().unwrap_or(false);
    watch.drain().map_err(Error::system("read what happened in the new namespace"))?;
    Ok(ended)
}

/// What a program wrote to its standard error, without the noise of one that misses syslog.
fn said(mut words: File) -> String {
    let mut text = Vec::new();
    let read = words.rewind().and_then(|()| words.take(OUTPUT_BYTES).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.ends_with("to syslog"));
    read.map_or_else(|error| format!("its messages cannot be read: {error}"), |_| lines.collect::<Vec<_>>().join("; "))
}

#[expect(unsafe_code, reason = "only the child itself can say that it is to die with its parent")]
fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let die = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the call.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::Error::from(io::ErrorKind::BrokenPipe)) }
    };
    // SAFETY: between fork and exec the closure makes two system calls, without allocating or taking a lock:
    // an `io::Error` made of a kind or an errno holds no memory.
    unsafe { command.pre_exec(die) };
}
