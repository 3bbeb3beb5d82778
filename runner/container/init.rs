//! The way of a container's first process, from its birth in new namespaces to the program.
//!
//! The order matters: what needs the machine's files or privileges comes before the root is entered or they are given up.
//! 1. v1 cgroups, network, cgroup namespace, host name
//! 2. mounts, and out of the machine's tree
//! 3. session, streams; every other descriptor is closed: from here on no path of the image can lead through one
//! 4. who to be, limits, working directory
//! 5. bounding set, system call filter (which needs `SYS_ADMIN` or no-new-privileges), ids, capabilities
//! 6. exec, of all that `PATH` offers the first that is there

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libc::sock_filter;
use nix::errno::Errno;
use nix::sched::CloneFlags;
use rustix::fs::{Mode, Uid};

use super::account::{self, Account};
use super::capability::Set;
use super::cgroup::Cgroup;
use super::channel::{self, FromContainer, Network, Streams};
use super::mounts::{self, Machine, Terminal};
use super::spec::{Container, Failure, Hint, Privileges, Result, Step, Ulimit};
use super::{namespaces, reaper};

/// All that the first process needs; a copy of the helper's memory.
pub struct Start<'a> {
    pub container: &'a Container,
    pub machine: &'a Machine,
    pub cgroup: &'a Cgroup,
    /// `None` for all privileges, and where no filter is known for the architecture.
    pub filter: Option<&'a [sock_filter]>,
    pub streams: Streams,
    pub network: Network,
    pub report: OwnedFd,
    /// Standard input, output and error; empty for a terminal.
    pub stdio: Vec<OwnedFd>,
    /// What [`Network::Joined`] joins.
    pub namespace: Option<OwnedFd>,
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The exit code of a process that could not start, which nobody but the helper sees.
const NOT_STARTED: i32 = 127;

pub fn run(start: Start<'_>) -> ! {
    let Err(failure) = begin(&start);
    // If forge is gone there is nobody to tell.
    let told = channel::send(&start.report, &FromContainer::Failed(failure), &[]);
    exit(if told.is_ok() { NOT_STARTED } else { NOT_STARTED + 1 })
}

/// Ends this process without running what the helper, whose memory this is a copy of, would run at its end.
#[expect(unsafe_code, reason = "_exit has no safe form")]
pub fn exit(code: i32) -> ! {
    // SAFETY: ends the process; nothing of ours runs after.
    unsafe { libc::_exit(code) }
}

fn begin(start: &Start<'_>) -> Result<Infallible> {
    let container = start.container;
    start.cgroup.join()?;
    enter_namespaces(start)?;
    rustix::process::umask(Mode::empty());
    let view = start.cgroup.view();
    let wants_terminal = matches!(start.streams, Streams::Terminal { .. });
    let terminal = mounts::enter(container, start.machine, &view, wants_terminal)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::setsid().step("start a session")?;
    connect(start, terminal)?;
    close_others(&start.report)?;
    let account = account::resolve(&container.user)?;
    give_streams(start, &account)?;
    set_limits(&container.limits.ulimits)?;
    std::env::set_current_dir(&container.cwd).step(format!("enter the working directory {}", container.cwd))?;
    give_up_privileges(start, &account)?;
    if container.init {
        reaper::fork()?;
    }
    execute(&container.args, &environment(container, &account, wants_terminal))
}

fn enter_namespaces(start: &Start<'_>) -> Result<()> {
    match (&start.network, &start.namespace) {
        (Network::Joined, Some(namespace)) => {
            nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET).step("join the network namespace")?;
        }
        (Network::Private, _) => namespaces::loopback_up().step("bring the loopback device up")?,
        _ => {}
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).step("make a cgroup namespace")?;
    nix::unistd::sethostname(&start.container.hostname).step("set the host name")
}

/// A program starts with no signal ignored and none blocked, whatever started forge. Called once, by the helper: every
/// container begins as its copy.
#[expect(unsafe_code, reason = "signal dispositions have no safe form")]
pub fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL runs no code of ours. KILL, STOP and what libc keeps for itself are refused, which is fine.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // Cannot fail: the set is valid.
    if let Err(error) = nix::sys::signal::SigSet::empty().thread_set_mask() {
        unreachable!("an empty signal mask is refused: {error}");
    }
}

fn connect(start: &Start<'_>, terminal: Option<Terminal>) -> Result<()> {
    let streams: Vec<&OwnedFd> = match &terminal {
        Some(terminal) => vec![&terminal.slave; 3],
        None => start.stdio.iter().collect(),
    };
    let [input, output, error] = streams[..] else {
        return Err(Failure::Invalid("a container needs three streams".to_owned()));
    };
    if let (Some(terminal), Streams::Terminal { rows, columns }) = (&terminal, start.streams) {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal.slave, size).step("size the terminal")?;
        rustix::process::ioctl_tiocsctty(&terminal.slave).step("take the terminal")?;
        channel::send(&start.report, &FromContainer::Terminal, &[terminal.master.as_fd()])
            .step("hand the terminal over")?;
    }
    nix::unistd::dup2_stdin(input).step("connect standard input")?;
    nix::unistd::dup2_stdout(output).step("connect standard output")?;
    nix::unistd::dup2_stderr(error).step("connect standard error")
}

/// Closes all but the streams and the report. A directory of the machine that is still open is a way back to it, by
/// `/proc/self/fd/N/../..` as working directory, as program or behind a link of the image (CVE-2024-21626).
#[expect(unsafe_code, reason = "close_range has no safe form")]
fn close_others(report: &OwnedFd) -> Result<()> {
    let report = report.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, report - 1), (report + 1, libc::c_uint::MAX)] {
        if first > last {
            continue;
        }
        // SAFETY: whoever owns these descriptors is in frames that this process never returns to (see `exit`).
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        Errno::result(closed).step("close descriptors")?;
    }
    Ok(())
}

/// Streams of the container's own belong to its user, so that it can open `/dev/stdout`.
fn give_streams(start: &Start<'_>, account: &Account) -> Result<()> {
    if start.streams == Streams::Borrowed || account.uid == 0 || start.machine.single_id {
        return Ok(());
    }
    let is_terminal = matches!(start.streams, Streams::Terminal { .. });
    let (input, output, error) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [input.as_fd(), output.as_fd(), error.as_fd()] {
        if rustix::fs::fstat(stream).step("look at a stream")?.st_rdev != 0 && !is_terminal {
            continue; // /dev/null is everybody's
        }
        match rustix::fs::fchown(stream, Some(Uid::from_raw(account.uid)), None) {
            // Made outside of the user namespace: it stays whose it is.
            Err(rustix::io::Errno::PERM | rustix::io::Errno::INVAL) => {}
            done => done.step("give a stream to the user")?,
        }
    }
    Ok(())
}

/// The open files that a program may have if nobody says otherwise: enough for servers, few enough for old programs that
/// close every number there is.
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

fn set_limits(ulimits: &[Ulimit]) -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).step("read the limit of open files")?;
    let hard = hard.min(OPEN_FILES.1);
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(OPEN_FILES.0), hard).step("limit open files")?;
    for Ulimit { name, soft, hard } in ulimits {
        let resource = match name.as_str() {
            "as" => Resource::RLIMIT_AS,
            "core" => Resource::RLIMIT_CORE,
            "cpu" => Resource::RLIMIT_CPU,
            "data" => Resource::RLIMIT_DATA,
            "fsize" => Resource::RLIMIT_FSIZE,
            "locks" => Resource::RLIMIT_LOCKS,
            "memlock" => Resource::RLIMIT_MEMLOCK,
            "msgqueue" => Resource::RLIMIT_MSGQUEUE,
            "nice" => Resource::RLIMIT_NICE,
            "nofile" => Resource::RLIMIT_NOFILE,
            "nproc" => Resource::RLIMIT_NPROC,
            "rss" => Resource::RLIMIT_RSS,
            "rtprio" => Resource::RLIMIT_RTPRIO,
            "rttime" => Resource::RLIMIT_RTTIME,
            "sigpending" => Resource::RLIMIT_SIGPENDING,
            "stack" => Resource::RLIMIT_STACK,
            _ => return Err(Failure::Invalid(format!("unknown ulimit {name:?}"))),
        };
        setrlimit(resource, *soft, *hard)
            .step(format!("set ulimit {name}={soft}:{hard}"))
            .hint(libc::EPERM, "only a user with CAP_SYS_RESOURCE can raise the hard limit")?;
    }
    Ok(())
}

fn give_up_privileges(start: &Start<'_>, account: &Account) -> Result<()> {
    let (container, single_id) = (start.container, start.machine.single_id);
    if single_id && (account.uid != 0 || account.gid != 0) {
        return Err(Failure::Invalid(format!(
            "user {:?} (uid {}, gid {}) cannot be used: only one id is mapped; install newuidmap and newgidmap and give this \
             user ranges in /etc/subuid and /etc/subgid, or run as root",
            container.user, account.uid, account.gid
        )));
    }
    let capabilities = container.privileges.capabilities();
    if container.privileges != Privileges::All {
        bound(capabilities)?;
    }
    if container.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().step("set no-new-privileges")?;
    }
    if let Some(filter) = start.filter {
        install(filter)?;
    }
    // With one id mapped the kernel refuses setgroups, and the groups that there are cannot be told apart anyway.
    if !single_id {
        let groups: Vec<nix::unistd::Gid> = account.groups.iter().map(|&gid| nix::unistd::Gid::from_raw(gid)).collect();
        nix::unistd::setgroups(&groups).step("set supplementary groups")?;
    }
    let (uid, gid) = (nix::unistd::Uid::from_raw(account.uid), nix::unistd::Gid::from_raw(account.gid));
    let unmapped = "the id is not mapped: give this user larger ranges in /etc/subuid and /etc/subgid";
    nix::unistd::setresgid(gid, gid, gid).step(format!("become group {gid}")).hint(libc::EINVAL, unmapped)?;
    nix::unistd::setresuid(uid, uid, uid).step(format!("become user {uid}")).hint(libc::EINVAL, unmapped)?;
    if container.privileges != Privileges::All {
        hold(capabilities)?;
    }
    // Last, because a change of ids clears it: a container does not outlive the helper.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).step("tie the container to forge")
}

/// Takes every other capability out of what this process and its children can ever have.
#[expect(unsafe_code, reason = "prctl has no safe form for capabilities of kernels to come")]
fn bound(capabilities: Set) -> Result<()> {
    for capability in 0..Set::BITS {
        if capabilities & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: takes a number and no pointer.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
        match Errno::result(dropped) {
            Ok(_) => {}
            Err(Errno::EINVAL) => return Ok(()), // past the kernel's last
            Err(error) => return Err(error).step("drop capabilities"),
        }
    }
    Ok(())
}

/// Of what a user has (who is not root has nothing) exactly these; none to inherit, as docker since 20.10.14.
#[expect(unsafe_code, reason = "capset has no safe form for capabilities of kernels to come")]
fn hold(capabilities: Set) -> Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header { version: VERSION_3, pid: 0 };
    let mut halves =
        [Half { effective: 0, permitted: 0, inheritable: 0 }, Half { effective: 0, permitted: 0, inheritable: 0 }];
    // SAFETY: version 3 has two halves, and both structures live through the call.
    let read = unsafe { libc::syscall(libc::SYS_capget, &raw const header, halves.as_mut_ptr()) };
    Errno::result(read).step("read capabilities")?;
    for (half, bits) in halves.iter_mut().zip([capabilities as u32, (capabilities >> 32) as u32]) {
        // What forge itself does not have cannot be given.
        half.permitted &= bits;
        half.effective = half.permitted;
        half.inheritable = 0;
    }
    // SAFETY: as above.
    let written = unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) };
    Errno::result(written).map(drop).step("set capabilities")
}

#[expect(unsafe_code, reason = "seccomp has no safe form")]
fn install(filter: &[sock_filter]) -> Result<()> {
    let length =
        u16::try_from(filter.len()).map_err(|_| Failure::Invalid("the system call filter is too long".to_owned()))?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions, which live through the call, and writes nothing.
    let installed = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    Errno::result(installed).map(drop).step("install the system call filter")
}

fn environment(container: &Container, account: &Account, terminal: bool) -> Vec<(String, String)> {
    let mut environment = container.env.clone();
    let mut default = |name: &str, value: &str| {
        if !environment.iter().any(|(known, _)| known == name) {
            environment.push((name.to_owned(), value.to_owned()));
        }
    };
    default("PATH", PATH);
    default("HOME", &account.home);
    if terminal {
        default("TERM", "xterm");
    }
    environment
}

fn execute(args: &[String], environment: &[(String, String)]) -> Result<Infallible> {
    let Some(program) = args.first().filter(|program| !program.is_empty()) else {
        return Err(Failure::Invalid("no command was given".to_owned()));
    };
    let text = |what: &str, value: String| {
        CString::new(value).map_err(|_| Failure::Invalid(format!("{what} contains a NUL byte")))
    };
    let argv: Vec<CString> = args.iter().map(|arg| text("an argument", arg.clone())).collect::<Result<_>>()?;
    let envp: Vec<CString> = environment
        .iter()
        .map(|(name, value)| text("the environment", format!("{name}={value}")))
        .collect::<Result<_>>()?;
    let path = environment.iter().find(|(name, _)| name == "PATH").map_or(PATH, |(_, path)| path);
    let mut refused = None;
    for candidate in candidates(program, path) {
        let name = text("the program", candidate.to_string_lossy().into_owned())?;
        let Err(error) = nix::unistd::execve(&name, &argv, &envp);
        match error {
            Errno::ENOENT | Errno::ENOTDIR if fs::symlink_metadata(&candidate).is_err() => {}
            Errno::EACCES if !program.contains('/') && candidate.is_dir() => {}
            Errno::EACCES => _ = refused.get_or_insert(candidate),
            error => return Err(unexecutable(program, &candidate, error)),
        }
    }
    Err(match refused {
        Some(candidate) => unexecutable(program, &candidate, Errno::EACCES),
        None if program.contains('/') => {
            Failure::NotFound { program: program.clone(), reason: "no such file or directory".to_owned() }
        }
        None => Failure::NotFound { program: program.clone(), reason: "executable file not found in $PATH".to_owned() },
    })
}

fn candidates(program: &str, path: &str) -> Vec<PathBuf> {
    if program.contains('/') {
        return vec![PathBuf::from(program)];
    }
    // An empty entry is the working directory.
    path.split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(program))
        .collect()
}

fn unexecutable(program: &str, file: &Path, error: Errno) -> Failure {
    let program = program.to_owned();
    let reason = match error {
        Errno::EACCES if file.is_dir() => "is a directory".to_owned(),
        Errno::EACCES => "permission denied".to_owned(),
        Errno::ENOENT => {
            let reason = match interpreter(file) {
                Some(interpreter) => format!("its interpreter {interpreter:?} does not exist in the image"),
                None => "the loader that it needs does not exist in the image".to_owned(),
            };
            return Failure::NotFound { program, reason };
        }
        Errno::ENOEXEC => format!("exec format error: {}", format_problem(file)),
        Errno::E2BIG => "argument list too long".to_owned(),
        error => io::Error::from(error).to_string(),
    };
    Failure::NotExecutable { program, reason }
}

fn head(file: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    match fs::File::open(file).and_then(|file| file.take(256).read_to_end(&mut bytes)) {
        Ok(_) => bytes,
        Err(_) => Vec::new(), // only the wording of an error depends on it
    }
}

/// What a script names after `#!`.
fn interpreter(file: &Path) -> Option<String> {
    let head = head(file);
    let line = head.strip_prefix(b"#!")?.split(|&byte| byte == b'\n').next()?;
    let words = OsStr::from_bytes(line).to_string_lossy();
    words.split_whitespace().next().map(str::to_owned)
}

fn format_problem(file: &Path) -> String {
    let head = head(file);
    if !head.starts_with(b"\x7fELF") {
        return "neither a program nor a script with a #! line".to_owned();
    }
    let machine = match (head.get(5), head.get(18..20)) {
        (Some(2), Some(bytes)) => u16::from_be_bytes([bytes[0], bytes[1]]),
        (_, Some(bytes)) => u16::from_le_bytes([bytes[0], bytes[1]]),
        _ => return "a truncated program".to_owned(),
    };
    let architecture = match machine {
        3 => "386",
        8 => "mips",
        21 => "ppc64",
        22 => "s390x",
        40 => "arm",
        62 => "amd64",
        183 => "arm64",
        243 => "riscv64",
        258 => "loong64",
        _ => "another architecture",
    };
    format!(
        "built for {architecture}, and this machine ({}) has no emulator for it; register one with binfmt_misc \
         (package qemu-user-static)",
        std::env::consts::ARCH
    )
}
