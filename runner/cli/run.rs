//! `forge run`: a program in a new container, in the foreground, through the same code as a RUN step.
//!
//! Exit codes are docker's: the program's own, 128 + n for signal n, 127 no such program, 126 not executable, 125 forge itself.

use std::io::IsTerminal;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use forge_snapshotter::image::{ImageConfig, Platform, Reference, RuntimeConfig};
use forge_snapshotter::{Active, StoredImage};
use forge_solver::{ExecuteError, ExitStatus};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::build::flags::{add_host, size, ulimit};
use super::error::{Doing, chain};
use super::inspect::wanted_platform;
use super::remote;
use super::terminal::Terminal;
use super::{Failure, Result, World, say};
use crate::container::{
    Container, ContainerMount, Cpu, Helper, Limits, MountSource, Privileges, Running, Stdio, Ulimit, capability,
};
use crate::network::{self, Attachment, HOST_NAME, Networks, hosts_file};
use crate::volume::{OpenVolume, VolumeName, Volumes};

/// Start a program in a new container
#[derive(clap::Args)]
#[command(trailing_var_arg = true)]
pub struct Arguments {
    /// The image: a name or an id; fetched if it is not there
    #[arg(value_name = "IMAGE")]
    image: String,
    /// The program and its arguments [default: the image's CMD]
    #[arg(value_name = "ARGS", allow_hyphen_values = true)]
    args: Vec<String>,
    /// Remove the container when it ends; forge keeps none, so this is always so
    #[arg(long)]
    rm: bool,
    /// Pass stdin on
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// An environment variable; without a value, the one of this environment
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// The working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The user, `name|uid[:group|gid]`
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// The program, instead of the image's ENTRYPOINT
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// none, host or bridge
    #[arg(long, visible_alias = "net", value_name = "MODE", default_value = "bridge")]
    network: String,
    /// `SOURCE:TARGET[:ro]`: a directory of this machine, or a named volume
    #[arg(short, long = "volume", value_name = "SPEC")]
    volumes: Vec<String>,
    /// A directory in memory, `PATH[:size=64m,mode=1777]`
    #[arg(long, value_name = "SPEC")]
    tmpfs: Vec<String>,
    /// The container's host name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// A line for /etc/hosts
    #[arg(long = "add-host", value_name = "NAME:ADDRESS")]
    hosts: Vec<String>,
    /// Nameservers instead of this machine's
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<std::net::IpAddr>,
    /// Add capabilities
    #[arg(long, value_name = "CAP", value_delimiter = ',')]
    cap_add: Vec<String>,
    /// Drop capabilities
    #[arg(long, value_name = "CAP", value_delimiter = ',')]
    cap_drop: Vec<String>,
    /// All capabilities, no system call filter, nothing masked
    #[arg(long)]
    privileged: bool,
    /// `no-new-privileges`
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// The root is read-only
    #[arg(long)]
    read_only: bool,
    /// Memory limit
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// Processors, such as 1.5
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<f64>,
    /// How many processes there may be
    #[arg(long, value_name = "NUMBER")]
    pids_limit: Option<i64>,
    /// A resource limit, `nofile=1024:2048`
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    ulimits: Vec<String>,
    /// Size of /dev/shm
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<String>,
    /// Process 1 reaps orphans and passes signals on
    #[arg(long)]
    init: bool,
    /// The platform, where a name has several
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// When to ask the registry: always, missing or never
    #[arg(long, value_name = "WHEN", default_value = "missing", value_parser = ["always", "missing", "never"])]
    pull: String,
}

pub async fn run(arguments: Arguments, world: &World) -> Result<ExitCode> {
    // Whatever goes wrong before the program runs is docker's 125.
    start(arguments, world).await.map_err(|failure| match failure {
        Failure::Told { code: 1 | 2, .. } => failure.code(125),
        other => other,
    })
}

async fn start(arguments: Arguments, world: &World) -> Result<ExitCode> {
    if arguments.tty && arguments.interactive && !std::io::stdin().is_terminal() {
        return Err(Failure::new("the input is not a terminal").hint("leave out -t, or run it from a terminal"));
    }
    if let Some(note) = &world.identity.note {
        say(format_args!("note: {note}"));
    }
    let platform = wanted_platform(arguments.platform.as_deref())?;
    let image = find(&arguments, world, &platform).await?;
    let config = world.store.catalog().config(&image.id)?;
    let root = remote::root(world, &image, &config).await?;
    let active = world.store.snapshots().prepare(Some(&root))?;
    let options = network::Options {
        rootless: world.identity.rootless,
        nameservers: arguments.dns.clone(),
        ..Default::default()
    };
    let networks = Networks::new(&world.store, options);
    let attachment = networks.attach(network_kind(&arguments.network)?).await?;
    if let Some(note) = &attachment.note {
        say(format_args!("note: {note}"));
    }
    let (mounts, _volumes) = mounts(&arguments, world, &active)?;
    let container = container(&arguments, &config, &active, &attachment, mounts)?;
    let helper = Helper::start().map_err(told)?;
    let terminal = arguments.tty.then(Terminal::new);
    let stdio = match &terminal {
        Some(terminal) => terminal.stdio(),
        None if arguments.interactive => Stdio::Inherit,
        None => Stdio::Output,
    };
    let mut running = helper.run(&container, attachment.namespace, stdio).await.map_err(told)?;
    let status = supervise(&mut running, terminal, arguments.interactive).await?;
    // In this order: the program has ended, its root goes, its place on the network goes.
    drop(running);
    drop(active);
    Ok(code(status))
}

fn told(error: ExecuteError) -> Failure {
    let code = match &error {
        ExecuteError::NotFound { .. } => 127,
        ExecuteError::NotExecutable { .. } => 126,
        _ => 125,
    };
    Failure::new(chain(&error)).code(code)
}

fn code(status: ExitStatus) -> ExitCode {
    match status {
        ExitStatus::Exited(code) => ExitCode::from(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
        ExitStatus::Killed { signal, out_of_memory } => {
            if out_of_memory {
                say("note: the container ran out of memory and was killed");
            }
            ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
        }
    }
}

/// The image in the store, fetched first where `--pull` says so.
async fn find(arguments: &Arguments, world: &World, platform: &Platform) -> Result<StoredImage> {
    let found = world.store.catalog().resolve(&arguments.image, platform);
    let missing = match (found, arguments.pull.as_str()) {
        (Ok(found), "missing" | "never") => return Ok(found.image),
        (Ok(_), _) => None,
        (Err(error), "never") => return Err(error.into()),
        (Err(error), _) => Some(error),
    };
    let Ok(name) = arguments.image.parse::<Reference>() else {
        return Err(missing.map_or_else(|| Failure::new(format!("{} is not a name", arguments.image)), Failure::from));
    };
    if missing.is_some() {
        say(format_args!("Unable to find image '{}' locally", name.familiar()));
    }
    remote::pull(world, &name, platform, &remote::quiet_events()).await?;
    Ok(world.store.catalog().resolve(&arguments.image, platform)?.image)
}

fn network_kind(mode: &str) -> Result<network::Kind> {
    match mode {
        "bridge" | "default" => Ok(network::Kind::Default),
        "host" => Ok(network::Kind::Host),
        "none" => Ok(network::Kind::None),
        other => Err(Failure::usage(format!("--network {other:?}: expected none, host or bridge"))),
    }
}

fn container(
    arguments: &Arguments,
    config: &ImageConfig,
    active: &Active,
    attachment: &Attachment,
    mounts: Vec<ContainerMount>,
) -> Result<Container> {
    let runtime = &config.config;
    let hostname = arguments.hostname.clone().unwrap_or_else(random_hostname);
    let mut hosts = attachment.hosts.clone();
    for host in &arguments.hosts {
        let (name, address) = add_host(host)?;
        let gateway =
            || attachment.hosts.iter().find(|(name, _)| name == HOST_NAME).map(|(_, address)| address.clone());
        let address =
            if address == "host-gateway" { gateway().unwrap_or_else(|| "127.0.0.1".to_owned()) } else { address };
        hosts.push((name, address));
    }
    Ok(Container {
        root: active.root().to_owned(),
        args: args(arguments, runtime)?,
        env: env(arguments, runtime)?,
        cwd: working_directory(arguments, runtime),
        user: arguments.user.clone().unwrap_or_else(|| runtime.user.clone()),
        mounts,
        resolv_conf: attachment.resolv_conf.clone(),
        hosts: hosts_file(&hostname, attachment.address, &hosts),
        hostname,
        privileges: privileges(arguments)?,
        no_new_privileges: no_new_privileges(arguments)?,
        readonly_root: arguments.read_only,
        limits: limits(arguments)?,
        init: arguments.init,
    })
}

/// ENTRYPOINT and CMD as docker combines them: `--entrypoint` drops the image's CMD, arguments replace it.
fn args(arguments: &Arguments, runtime: &RuntimeConfig) -> Result<Vec<String>> {
    let mut args = match &arguments.entrypoint {
        Some(program) if program.is_empty() => Vec::new(),
        Some(program) => vec![program.clone()],
        None => runtime.entrypoint.clone().unwrap_or_default(),
    };
    match (arguments.args.is_empty(), &arguments.entrypoint) {
        (false, _) => args.extend(arguments.args.iter().cloned()),
        (true, None) => args.extend(runtime.cmd.clone().unwrap_or_default()),
        (true, Some(_)) => {}
    }
    match args.is_empty() {
        true => Err(Failure::new("no program: the image has neither CMD nor ENTRYPOINT")
            .hint("name one: forge run IMAGE PROGRAM")),
        false => Ok(args),
    }
}

/// The image's variables, then files, then flags; a later one of a name replaces an earlier one.
fn env(arguments: &Arguments, runtime: &RuntimeConfig) -> Result<Vec<(String, String)>> {
    let mut given = Vec::new();
    for file in &arguments.env_file {
        let text = std::fs::read_to_string(file).doing(format_args!("read {}", file.display()))?;
        let lines = text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
        given.extend(lines.map(str::to_owned));
    }
    given.extend(arguments.env.iter().cloned());
    let mut all: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: String| match all.iter_mut().find(|(known, _)| known == name) {
        Some(entry) => entry.1 = value,
        None => all.push((name.to_owned(), value)),
    };
    for pair in &runtime.env {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        set(name, value.to_owned());
    }
    for pair in &given {
        match pair.split_once('=') {
            Some(("", _)) => return Err(Failure::usage(format!("{pair:?}: a variable needs a name"))),
            Some((name, value)) => set(name, value.to_owned()),
            None => {
                if let Ok(value) = std::env::var(pair) {
                    set(pair, value);
                }
            }
        }
    }
    if arguments.tty {
        let known = all.iter().any(|(name, _)| name == "TERM");
        if !known {
            all.push(("TERM".to_owned(), "xterm".to_owned()));
        }
    }
    Ok(all)
}

fn working_directory(arguments: &Arguments, runtime: &RuntimeConfig) -> String {
    let chosen = arguments.workdir.as_deref().unwrap_or(&runtime.working_dir);
    if chosen.starts_with('/') { chosen.to_owned() } else { format!("/{chosen}") }
}

/// Twelve hex digits, as docker names a container without a name.
fn random_hostname() -> String {
    let mut bytes = [0; 6];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    let seed = if filled == bytes.len() {
        bytes
    } else {
        u64::from(std::process::id()).to_le_bytes()[..6].try_into().unwrap_or(bytes)
    };
    seed.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn privileges(arguments: &Arguments) -> Result<Privileges> {
    if arguments.privileged {
        return Ok(Privileges::All);
    }
    let set = |names: &[String]| {
        names.iter().try_fold(0, |set, name| match capability::parse(name) {
            Some(capability) => Ok(set | capability),
            None => Err(Failure::usage(format!("{name:?} is not a capability")).hint("such as NET_ADMIN or ALL")),
        })
    };
    Ok(Privileges::Default { add: set(&arguments.cap_add)?, drop: set(&arguments.cap_drop)? })
}

fn no_new_privileges(arguments: &Arguments) -> Result<bool> {
    let mut found = false;
    for option in &arguments.security_opt {
        match option.as_str() {
            "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true" => found = true,
            other => return Err(Failure::usage(format!("--security-opt {other:?}: expected no-new-privileges"))),
        }
    }
    Ok(found)
}

fn limits(arguments: &Arguments) -> Result<Limits> {
    const PERIOD_US: u64 = 100_000;
    let cpu = match arguments.cpus {
        Some(cpus) if cpus.is_finite() && cpus >= 0.01 => {
            Some(Cpu { quota_us: (cpus * PERIOD_US as f64) as u64, period_us: PERIOD_US })
        }
        Some(cpus) => return Err(Failure::usage(format!("--cpus {cpus}: expected at least 0.01"))),
        None => None,
    };
    let ulimits = arguments
        .ulimits
        .iter()
        .map(|text| ulimit(text).map(|limit| Ulimit { name: limit.name, soft: limit.soft, hard: limit.hard }));
    Ok(Limits {
        memory_bytes: arguments.memory.as_deref().map(|text| size("--memory", text)).transpose()?,
        cpu,
        // docker: 0 and -1 mean no limit.
        pids: arguments.pids_limit.and_then(|pids| u64::try_from(pids).ok()).filter(|pids| *pids > 0),
        ulimits: ulimits.collect::<Result<_>>()?,
        shm_size_bytes: arguments.shm_size.as_deref().map(|text| size("--shm-size", text)).transpose()?,
    })
}

/// `-v` and `--tmpfs`. What must live as long as the container comes second.
fn mounts(arguments: &Arguments, world: &World, active: &Active) -> Result<(Vec<ContainerMount>, Vec<OpenVolume>)> {
    let mut mounts = Vec::new();
    let mut held = Vec::new();
    for text in &arguments.volumes {
        let volume = VolumeFlag::parse(text)?;
        let source = match volume.source {
            Source::Path(path) => path,
            Source::Anonymous => {
                // Nobody can name it afterwards, and the container goes with the program: memory of the root itself will do.
                continue;
            }
            Source::Named(name) => {
                let seed = image_directory(active.root(), &volume.target)?;
                let path = seed.as_ref().map(|seed| PathBuf::from(format!("/proc/self/fd/{}", seed.as_raw_fd())));
                let opened = Volumes::new(&world.store).open(&name, path.as_deref())?;
                let path = opened.path().to_owned();
                held.push(opened);
                path
            }
        };
        mounts.push(ContainerMount {
            target: volume.target,
            source: MountSource::Bind(source),
            readonly: volume.readonly,
        });
    }
    for text in &arguments.tmpfs {
        mounts.push(tmpfs(text)?);
    }
    Ok((mounts, held))
}

/// The directory of the image that a new volume starts with; its links lead nowhere outside of the image.
fn image_directory(root: &Path, target: &str) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, flags, Mode::empty()).map_err(std::io::Error::from)?;
    match rustix::fs::openat2(&top, target, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(std::io::Error::from(error)).doing(format_args!("read {target} of the image")),
    }
}

struct VolumeFlag {
    source: Source,
    target: String,
    readonly: bool,
}

enum Source {
    Path(PathBuf),
    Anonymous,
    Named(VolumeName),
}

impl VolumeFlag {
    fn parse(text: &str) -> Result<VolumeFlag> {
        let bad = |reason: &str| Failure::usage(format!("--volume {text:?}: {reason}")).hint("-v SOURCE:TARGET[:ro]");
        let parts: Vec<&str> = text.split(':').collect();
        let (source, target, options) = match parts[..] {
            [target] => (None, target, ""),
            [source, target] => (Some(source), target, ""),
            [source, target, options] => (Some(source), target, options),
            _ => return Err(bad("too many colons")),
        };
        if !target.starts_with('/') || target == "/" {
            return Err(bad("the target must be an absolute path, and not /"));
        }
        let mut readonly = false;
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option {
                "ro" | "readonly" => readonly = true,
                "rw" | "z" | "Z" | "rprivate" | "private" | "rbind" | "cached" | "delegated" | "consistent" => {}
                _ => return Err(bad("unknown option")),
            }
        }
        let source = match source {
            Some(path) if path.starts_with('/') || path.starts_with('.') || path.starts_with('~') => {
                let path = std::path::absolute(path).doing(format_args!("find {path}"))?;
                if !path.exists() {
                    return Err(Failure::new(format!("{} does not exist", path.display()))
                        .hint("make it first: forge does not make directories of this machine by itself"));
                }
                Source::Path(path)
            }
            Some(name) => Source::Named(name.parse().map_err(|error| bad(&chain(&error)))?),
            None => Source::Anonymous,
        };
        Ok(VolumeFlag { source, target: target.to_owned(), readonly })
    }
}

fn tmpfs(text: &str) -> Result<ContainerMount> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    let (mut size_bytes, mut mode, mut readonly) = (None, 0o1777, false);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", value)) => size_bytes = Some(size("--tmpfs size", value)?),
            Some(("mode", value)) => {
                mode = u32::from_str_radix(value, 8)
                    .map_err(|_| Failure::usage(format!("--tmpfs {text:?}: mode is octal")))?
            }
            None if option == "ro" => readonly = true,
            None if ["rw", "noexec", "exec", "nosuid", "suid", "nodev", "dev"].contains(&option) => {}
            _ => {
                return Err(Failure::usage(format!("--tmpfs {text:?}: unknown option {option:?}"))
                    .hint("size=64m, mode=1777, ro"));
            }
        }
    }
    Ok(ContainerMount { target: target.to_owned(), source: MountSource::Tmpfs { size_bytes, mode }, readonly })
}

/// Moves bytes and signals between the program and whoever started forge, until the program ends.
async fn supervise(running: &mut Running, terminal: Option<Terminal>, interactive: bool) -> Result<ExitStatus> {
    let pid = running.pid();
    let forward = forward_signals(pid, terminal.is_some());
    let output = pump(running, terminal, interactive)?;
    let ended = tokio::select! {
        ended = running.wait() => ended.map_err(told),
        never = forward => match never? {},
    };
    // What the program wrote last is still in the pipes.
    output.finish().await;
    ended
}

enum Never {}

/// Every polite signal that forge gets goes to the program; what it does then is its own affair.
async fn forward_signals(pid: i32, terminal: bool) -> Result<Never> {
    use tokio::signal::unix::{SignalKind, signal};
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    let mut signals = kinds.map(signal);
    loop {
        let waits = signals.iter_mut().zip(kinds).map(|(signal, kind)| {
            Box::pin(async move {
                match signal {
                    Ok(signal) => signal.recv().await,
                    Err(_) => std::future::pending().await,
                };
                kind
            })
        });
        let (kind, ..) = futures_util::future::select_all(waits.collect::<Vec<_>>()).await;
        // On a terminal of its own the program gets Ctrl-C from the terminal.
        if terminal && kind == SignalKind::interrupt() {
            continue;
        }
        let signal = nix::sys::signal::Signal::try_from(kind.as_raw_value()).map_err(Failure::from)?;
        match nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => say(format_args!("warning: {} was not passed on: {error}", signal.as_str())),
        }
    }
}

/// The tasks that copy a program's output.
struct Output {
    copies: Vec<tokio::task::JoinHandle<()>>,
    terminal: Option<super::terminal::Attached>,
}

impl Output {
    async fn finish(self) {
        for copy in self.copies {
            copy.await.unwrap_or_default();
        }
        if let Some(terminal) = self.terminal {
            terminal.finish().await;
        }
    }
}

fn pump(running: &mut Running, terminal: Option<Terminal>, interactive: bool) -> Result<Output> {
    let mut copies = Vec::new();
    if let Some(stdout) = running.stdout.take() {
        copies.push(tokio::spawn(copy(stdout, tokio::io::stdout())));
    }
    if let Some(stderr) = running.stderr.take() {
        copies.push(tokio::spawn(copy(stderr, tokio::io::stderr())));
    }
    let terminal = match (terminal, running.terminal.take()) {
        (Some(terminal), Some(master)) => Some(terminal.attach(master, interactive)?),
        _ => None,
    };
    Ok(Output { copies, terminal })
}

async fn copy(mut from: impl tokio::io::AsyncRead + Unpin, mut to: impl tokio::io::AsyncWrite + Unpin) {
    // Nobody reads any more: the program notices by its own full pipe or goes on in silence, as it would without forge.
    tokio::io::copy(&mut from, &mut to).await.unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_paths_or_names() {
        let parse = |text: &str| {
            VolumeFlag::parse(text).map(|flag| (matches!(flag.source, Source::Named(_)), flag.target, flag.readonly))
        };
        assert_eq!(parse("/tmp:/x").expect("a path"), (false, "/x".to_owned(), false));
        assert_eq!(parse("/tmp:/x:ro").expect("a path"), (false, "/x".to_owned(), true));
        assert_eq!(parse("data:/x").expect("a name"), (true, "/x".to_owned(), false));
        for bad in ["/tmp:x", "/tmp:/", "/tmp:/x:odd", "/no/such/path:/x", "a:b:c:d"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
