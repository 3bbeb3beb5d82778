//! Forge's side of the container helper: starting it, and holding a container that it runs.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use forge_solver::{ExecuteError, ExitStatus};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{CWD, MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, fstat, memfd_create, stat};
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};
use rustix::net::Shutdown;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

use super::channel::{self, Ended, FromContainer, FromHelper, Launch, Status, Streams};
use super::mounts::{Depth, set_attributes};
use super::spec::{Container, Stdio};
use crate::network::Namespace;

/// The first argument that makes forge the helper. Not for people, so it stands in no help.
pub const HELPER_ARGUMENT: &str = "__container-helper";

/// The helper process. Dropping it ends it and every container that still runs.
pub struct Helper {
    control: Option<AsyncFd<OwnedFd>>,
    process: Child,
}

impl Helper {
    /// Starts this very program as helper. Call within a tokio runtime.
    pub fn start() -> Result<Helper, ExecuteError> {
        Helper::start_with(Path::new("/proc/self/exe"))
    }

    /// Starts `program`, a forge, as helper.
    pub fn start_with(program: &Path) -> Result<Helper, ExecuteError> {
        let setup = |source| ExecuteError::Setup { step: "start the container helper".to_owned(), source };
        let (ours, theirs) = channel::pair().map_err(setup)?;
        // Where it cannot be had, the kernel's word stands that what is being executed is not written to.
        let protected = read_only(program).ok();
        let name = protected.as_ref().map(|file| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
        let mut command = Command::new(name.as_deref().unwrap_or(program));
        command.arg0("forge").arg(HELPER_ARGUMENT).stdin(theirs).stdout(std::process::Stdio::null());
        let process = command.spawn().map_err(setup)?;
        let control = nonblocking(ours).map_err(setup)?;
        Ok(Helper { control: Some(control), process })
    }

    /// Starts a container; it runs when this returns, or has told why not.
    pub async fn run(&self, container: &Container, network: Namespace, stdio: Stdio) -> Result<Running, ExecuteError> {
        let setup = |source| ExecuteError::Setup { step: "ask the container helper".to_owned(), source };
        let (lifeline, their_lifeline) = channel::pair().map_err(setup)?;
        let (report, their_report) = channel::pair().map_err(setup)?;
        let (streams, ours, theirs) = open_streams(stdio).map_err(setup)?;
        let specification = specification(container).map_err(setup)?;
        let (network, namespace) = match network {
            Namespace::Host => (channel::Network::Host, None),
            Namespace::Private => (channel::Network::Private, None),
            Namespace::Joined(namespace) => (channel::Network::Joined, Some(namespace)),
        };
        let fixed = [&specification, &their_lifeline, &their_report];
        let descriptors: Vec<BorrowedFd<'_>> =
            fixed.into_iter().chain(&theirs).chain(&namespace).map(AsFd::as_fd).collect();
        let launch = Launch { streams, network };
        let mut lifeline = Lifeline { socket: nonblocking(lifeline).map_err(setup)?, ended: true };
        let control = self.control.as_ref().expect("the control socket is there until the drop");
        let sent = control.async_io(Interest::WRITABLE, |socket| channel::send(socket, &launch, &descriptors)).await;
        sent.map_err(setup)?;
        // Now the helper has it, so from here on dropping must end it.
        lifeline.ended = false;
        drop((their_lifeline, their_report, theirs, namespace, specification));
        Running { lifeline, pid: 0, stdin: ours.stdin, stdout: ours.stdout, stderr: ours.stderr, terminal: None }
            .started(nonblocking(report).map_err(setup)?)
            .await
    }
}

/// The program on a read-only mount of its own. A container gets hold of its helper's executable, which is the machine's
/// forge, by making `/proc/self/exe` its program, and could write to it once nobody executes it (CVE-2019-5736).
fn read_only(program: &Path) -> io::Result<OwnedFd> {
    // By its name: the link itself leads into the mount namespace that forge was started in, where nothing can be cloned.
    let path = std::fs::canonicalize(program)?;
    let tree = open_tree(CWD, &path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    set_attributes(&tree, MountAttrFlags::MOUNT_ATTR_RDONLY, Depth::One)?;
    let (named, running) = (fstat(&tree)?, stat(program)?);
    // Forge may have been replaced by a newer one since it was started.
    match (named.st_dev, named.st_ino) == (running.st_dev, running.st_ino) {
        true => Ok(tree),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The helper ends when its control socket closes, after it has killed and cleaned up.
        drop(self.control.take());
        // Fails only where whoever started forge made it ignore SIGCHLD: then the kernel reaps.
        drop(self.process.wait());
    }
}

/// A container that runs. Dropping it kills every process of it, and waits until they are gone and their mounts with them.
pub struct Running {
    lifeline: Lifeline,
    pid: i32,
    pub stdin: Option<pipe::Sender>,
    pub stdout: Option<pipe::Receiver>,
    pub stderr: Option<pipe::Receiver>,
    /// The master side of its terminal.
    pub terminal: Option<OwnedFd>,
}

impl Running {
    /// Waits for the exec, or for word of why there is none.
    async fn started(mut self, report: AsyncFd<OwnedFd>) -> Result<Running, ExecuteError> {
        if let Some(FromHelper::Started { pid }) = self.lifeline.receive().await? {
            self.pid = pid;
        }
        loop {
            let message = report.async_io(Interest::READABLE, |socket| channel::receive::<FromContainer>(socket)).await;
            match message.map_err(lost)? {
                None if self.pid == 0 => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
                None => return Ok(self),
                Some((FromContainer::Terminal, mut descriptors)) => self.terminal = descriptors.pop(),
                Some((FromContainer::Failed(failure), _)) => {
                    // A process that did not get as far as its program still has to be cleaned up after.
                    if self.pid != 0 {
                        self.end().await?;
                    }
                    self.lifeline.ended = true;
                    return Err(failure.into());
                }
            }
        }
    }

    /// Process 1 as this machine numbers it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for the end of process 1, and with it of all others. What could not be cleaned up is an error.
    pub async fn wait(&mut self) -> Result<ExitStatus, ExecuteError> {
        let Ended { status, out_of_memory, left } = self.end().await?;
        if !left.is_empty() {
            let source = io::Error::other(left.join("; "));
            return Err(ExecuteError::Setup { step: "clean up after the container".to_owned(), source });
        }
        Ok(match status {
            // A shell that lost its child to the kernel's memory killer tells it by its own exit code.
            Status::Exited(137) if out_of_memory => ExitStatus::Killed { signal: libc::SIGKILL, out_of_memory },
            Status::Exited(code) => ExitStatus::Exited(code),
            Status::Killed(signal) => ExitStatus::Killed { signal, out_of_memory },
        })
    }

    async fn end(&mut self) -> Result<Ended, ExecuteError> {
        loop {
            match self.lifeline.receive().await? {
                Some(FromHelper::Started { .. }) => {}
                Some(FromHelper::Ended(ended)) => {
                    self.lifeline.ended = true;
                    return Ok(ended);
                }
                None => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    /// Sends a signal to process 1. One that has ended takes none, and that is no error.
    pub fn kill(&self, signal: i32) -> io::Result<()> {
        match channel::send(self.lifeline.socket.get_ref(), &channel::Signal(signal), &[]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }
}

/// The socket whose end is the container's end, in both directions.
struct Lifeline {
    socket: AsyncFd<OwnedFd>,
    /// Nothing runs at the other side: not any more, or not yet.
    ended: bool,
}

impl Lifeline {
    async fn receive(&self) -> Result<Option<FromHelper>, ExecuteError> {
        let message = self.socket.async_io(Interest::READABLE, |socket| channel::receive::<FromHelper>(socket)).await;
        Ok(message.map_err(lost)?.map(|(message, _)| message))
    }
}

/// A kill takes milliseconds; this is for a machine that hangs.
const KILL_TIMEOUT_MS: u16 = 10_000;

impl Drop for Lifeline {
    /// Blocks for as long as the kill takes: whoever drops a container goes on to unmount its root.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let socket = self.socket.get_ref();
        // Refused where the helper is gone, and the containers with it.
        if rustix::net::shutdown(socket, Shutdown::Write).is_err() {
            return;
        }
        loop {
            let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut watched, PollTimeout::from(KILL_TIMEOUT_MS)) {
                Ok(0) => return,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            match channel::receive::<FromHelper>(socket) {
                Ok(Some((FromHelper::Started { .. }, _))) => {}
                _ => return,
            }
        }
    }
}

fn lost(source: io::Error) -> ExecuteError {
    ExecuteError::Setup { step: "hear from the container helper".to_owned(), source }
}

#[expect(unsafe_code, reason = "tokio cannot know that a descriptor stays the same")]
fn nonblocking(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    fcntl_setfl(&socket, fcntl_getfl(&socket)? | OFlags::NONBLOCK)?;
    // SAFETY: an `OwnedFd` is one descriptor for as long as it lives, and lives in the `AsyncFd`.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

fn specification(container: &Container) -> io::Result<OwnedFd> {
    let mut file = std::fs::File::from(memfd_create("container", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(container)?)?;
    Ok(file.into())
}

#[derive(Default)]
struct Ours {
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

/// The streams' two sides: what we keep, and the three that the container gets.
fn open_streams(stdio: Stdio) -> io::Result<(Streams, Ours, Vec<OwnedFd>)> {
    let null =
        || -> io::Result<OwnedFd> { Ok(std::fs::File::options().read(true).write(true).open("/dev/null")?.into()) };
    let mut ours = Ours::default();
    let theirs = match stdio {
        Stdio::Terminal { rows, columns } => return Ok((Streams::Terminal { rows, columns }, ours, Vec::new())),
        Stdio::Inherit => {
            let (input, output, error) = (io::stdin(), io::stdout(), io::stderr());
            let all = [input.as_fd(), output.as_fd(), error.as_fd()];
            let copies = all.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
            return Ok((Streams::Borrowed, ours, copies));
        }
        Stdio::Null => vec![null()?, null()?, null()?],
        Stdio::Output | Stdio::Pipes => {
            let (stdout, their_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
            let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
            ours.stdout = Some(pipe::Receiver::from_owned_fd(stdout)?);
            ours.stderr = Some(pipe::Receiver::from_owned_fd(stderr)?);
            let input = match stdio {
                Stdio::Pipes => {
                    let (theirs, stdin) = pipe_with(PipeFlags::CLOEXEC)?;
                    ours.stdin = Some(pipe::Sender::from_owned_fd(stdin)?);
                    theirs
                }
                _ => null()?,
            };
            vec![input, their_stdout, their_stderr]
        }
    };
    Ok((Streams::Own, ours, theirs))
}
