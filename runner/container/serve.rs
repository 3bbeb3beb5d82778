//! The helper: one process with one thread, which starts containers, waits for them and cleans up after them.
//!
//! A process with threads must not run code between `clone` and `exec`, because another thread's locks are copied as they
//! stand. So forge starts itself once more, before anything else has happened in it, and asks that process for containers.
//! When forge goes, however it goes, the control socket closes; the helper then kills what runs, cleans up and ends.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use libc::sock_filter;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};

use super::capability::Set;
use super::cgroup::{Cgroup, Hierarchies};
use super::channel::{self, Ended, FromContainer, FromHelper, Launch, Network, Status, Streams};
use super::init::{self, Start};
use super::mounts::{self, Machine};
use super::namespaces::{self, Side};
use super::seccomp;
use super::spec::{Container, Failure, Privileges, Result, Step};
use super::targets::{self, Made};

/// Serves the control socket, which is standard input, until it closes.
pub fn helper_main() -> ! {
    let code = match serve(&io::stdin().as_fd()) {
        Ok(()) => 0,
        Err(error) => match writeln!(io::stderr(), "forge container helper: {error}") {
            Ok(()) => 1,
            Err(_) => 2,
        },
    };
    std::process::exit(code)
}

fn serve(control: &BorrowedFd<'_>) -> io::Result<()> {
    // Whoever started forge with SIGCHLD ignored would have its children reaped by nobody.
    init::default_signals();
    // Out of the terminal's process group: what Ctrl-C means is forge's to say.
    rustix::process::setsid()?;
    let mut helper =
        Helper { machine: machine()?, hierarchies: Hierarchies::find(), filters: HashMap::new(), jobs: Vec::new() };
    loop {
        let (asked, events) = helper.wait(control)?;
        // Backwards: a job that ended is taken out of the list.
        for (index, event) in events.into_iter().enumerate().rev() {
            helper.attend(index, event)?;
        }
        if !asked {
            continue;
        }
        match channel::receive::<Launch>(control)? {
            Some((launch, descriptors)) => helper.launch(&launch, descriptors)?,
            None => return helper.end(),
        }
    }
}

struct Helper {
    machine: Machine,
    hierarchies: Hierarchies,
    /// Compiled filters by the capabilities that they are for.
    filters: HashMap<Set, Vec<sock_filter>>,
    jobs: Vec<Job>,
}

/// A container that runs.
struct Job {
    pidfd: OwnedFd,
    /// `None` once forge has let go of it.
    lifeline: Option<OwnedFd>,
    /// Where to tell the end, also after it was let go of.
    told: OwnedFd,
    cgroup: Cgroup,
    made: Made,
}

#[derive(Clone, Copy)]
struct Event {
    ended: bool,
    spoken: bool,
}

impl Helper {
    /// Waits for a request, the end of a container, or word about one.
    fn wait(&self, control: &BorrowedFd<'_>) -> io::Result<(bool, Vec<Event>)> {
        let mut watched = vec![PollFd::new(*control, PollFlags::POLLIN)];
        for job in &self.jobs {
            watched.push(PollFd::new(job.pidfd.as_fd(), PollFlags::POLLIN));
            match &job.lifeline {
                Some(lifeline) => watched.push(PollFd::new(lifeline.as_fd(), PollFlags::POLLIN)),
                None => watched.push(PollFd::new(job.pidfd.as_fd(), PollFlags::empty())),
            }
        }
        match poll(&mut watched, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        let events = watched[1..]
            .chunks(2)
            .zip(&self.jobs)
            .map(|(pair, job)| Event { ended: ready(&pair[0]), spoken: job.lifeline.is_some() && ready(&pair[1]) });
        Ok((ready(&watched[0]), events.collect()))
    }

    fn attend(&mut self, index: usize, event: Event) -> io::Result<()> {
        if event.ended {
            return self.jobs.swap_remove(index).finish();
        }
        let job = &mut self.jobs[index];
        let Some(lifeline) = job.lifeline.as_ref().filter(|_| event.spoken) else { return Ok(()) };
        match channel::receive::<channel::Signal>(lifeline) {
            Ok(Some((channel::Signal(number), _))) => job.kill(number),
            // Closed, or in a state that leaves no way to talk: nobody waits for it any more.
            Ok(None) | Err(_) => {
                job.lifeline = None;
                job.kill(libc::SIGKILL)
            }
        }
    }

    fn launch(&mut self, launch: &Launch, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let Some(order) = Order::new(launch, descriptors) else {
            return Err(io::Error::other("a request came without its descriptors"));
        };
        let report = order.report.try_clone()?;
        match self.start(launch, order) {
            Ok(job) => self.jobs.push(job),
            // If forge is gone there is nobody to tell; the control socket says so next.
            Err(failure) => drop(channel::send(&report, &FromContainer::Failed(failure), &[])),
        }
        Ok(())
    }

    fn start(&mut self, launch: &Launch, order: Order) -> Result<Job> {
        let container = order.container()?;
        let filter = self.filter(container.privileges);
        let (_root, made) = targets::prepare(&container.root, &mounts::targets(&container))
            .map_err(|(path, error)| failure(format!("make the mount point {} in the root", path.display()), &error))?;
        let cgroup = match self.hierarchies.create(&container.limits) {
            Ok(cgroup) => cgroup,
            Err(failure) => return Err(with_leftovers(failure, made.remove())),
        };
        let private = if launch.network == Network::Private { libc::CLONE_NEWNET } else { 0 };
        match namespaces::fork_into(namespaces::CONTAINER | private, cgroup.birthplace()) {
            Ok(Side::Child) => init::run(Start {
                container: &container,
                machine: &self.machine,
                cgroup: &cgroup,
                filter: filter.as_deref(),
                streams: launch.streams,
                network: launch.network,
                report: order.report,
                stdio: order.stdio,
                namespace: order.namespace,
            }),
            Ok(Side::Parent { pid, pidfd }) => {
                let told = order.lifeline.try_clone().step("keep the lifeline")?;
                let job = Job { pidfd, lifeline: Some(order.lifeline), told, cgroup, made };
                // A forge that is gone is noticed by its lifeline.
                drop(channel::send(&job.told, &FromHelper::Started { pid }, &[]));
                Ok(job)
            }
            Err(error) => {
                let left = [cgroup.remove(), made.remove()].concat();
                Err(with_leftovers(namespace_failure(&error), left))
            }
        }
    }

    fn filter(&mut self, privileges: Privileges) -> Option<Vec<sock_filter>> {
        let architectures = seccomp::native();
        if privileges == Privileges::All || architectures.is_empty() {
            return None;
        }
        let capabilities = privileges.capabilities();
        Some(self.filters.entry(capabilities).or_insert_with(|| seccomp::compile(capabilities, architectures)).clone())
    }

    /// Forge is gone: nothing is left behind.
    fn end(self) -> io::Result<()> {
        self.jobs.iter().try_for_each(|job| job.kill(libc::SIGKILL))?;
        self.jobs.into_iter().try_for_each(Job::finish)
    }
}

impl Job {
    fn kill(&self, number: i32) -> io::Result<()> {
        // A number that is no signal's was not sent by forge.
        let Some(signal) = rustix::process::Signal::from_named_raw(number) else { return Ok(()) };
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for process 1 (with it, every process of the container is gone), cleans up and tells.
    fn finish(self) -> io::Result<()> {
        let ended = loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(ended)) => break ended,
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let out_of_memory = self.cgroup.out_of_memory();
        let left = [self.cgroup.remove(), self.made.remove()].concat();
        let ended = Ended { status: status(&ended), out_of_memory, left };
        // Nobody may be listening any more.
        drop(channel::send(&self.told, &FromHelper::Ended(ended), &[]));
        Ok(())
    }
}

fn status(ended: &WaitIdStatus) -> Status {
    match (ended.exit_status(), ended.terminating_signal()) {
        (Some(code), _) => Status::Exited(code),
        (None, signal) => Status::Killed(signal.unwrap_or(libc::SIGKILL)),
    }
}

/// A request's descriptors by name.
struct Order {
    specification: OwnedFd,
    lifeline: OwnedFd,
    report: OwnedFd,
    stdio: Vec<OwnedFd>,
    namespace: Option<OwnedFd>,
}

impl Order {
    fn new(launch: &Launch, descriptors: Vec<OwnedFd>) -> Option<Order> {
        let mut descriptors = descriptors.into_iter();
        let streams = if matches!(launch.streams, Streams::Terminal { .. }) { 0 } else { 3 };
        Some(Order {
            specification: descriptors.next()?,
            lifeline: descriptors.next()?,
            report: descriptors.next()?,
            stdio: descriptors.by_ref().take(streams).collect(),
            namespace: descriptors.next(),
        })
    }

    fn container(&self) -> Result<Container> {
        let mut file = File::from(self.specification.try_clone().step("read the container")?);
        let mut json = Vec::new();
        file.rewind().step("read the container")?;
        file.read_to_end(&mut json).step("read the container")?;
        serde_json::from_slice(&json).map_err(|error| Failure::Invalid(format!("read the container: {error}")))
    }
}

fn failure(step: String, error: &io::Error) -> Failure {
    let hint = match error.raw_os_error() {
        Some(_) => None,
        None => Some(error.to_string()),
    };
    Failure::Setup { step, errno: error.raw_os_error().unwrap_or(libc::EIO), hint }
}

fn namespace_failure(error: &io::Error) -> Failure {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSPC) => Some("a limit in /proc/sys/user is reached"),
        Some(libc::EPERM | libc::ENOSYS) => {
            Some("inside a docker container: --privileged, or --security-opt seccomp=unconfined --cap-add SYS_ADMIN")
        }
        _ => None,
    };
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    Failure::Setup { step: "make namespaces".to_owned(), errno, hint: hint.map(str::to_owned) }
}

fn with_leftovers(failure: Failure, left: Vec<String>) -> Failure {
    match failure {
        Failure::Setup { step, errno, hint } if !left.is_empty() => {
            let hint = hint.into_iter().chain(left).collect::<Vec<_>>().join("; ");
            Failure::Setup { step, errno, hint: Some(hint) }
        }
        other => other,
    }
}

/// What a container's set-up depends on, read while the machine's own files are in sight.
fn machine() -> io::Result<Machine> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let counts: Vec<u64> = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse().ok()).collect();
    let mapped: u64 = counts.iter().sum();
    let cpus = fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().filter_map(Result::<_, _>::ok);
    let throttle = |entry: fs::DirEntry| {
        let path = PathBuf::from("devices/system/cpu").join(entry.file_name()).join("thermal_throttle");
        PathBuf::from("/sys").join(&path).exists().then_some(path)
    };
    Ok(Machine {
        rootless: mapped < u64::from(u32::MAX),
        single_id: mapped == 1,
        throttles: cpus.filter_map(throttle).collect(),
    })
}
