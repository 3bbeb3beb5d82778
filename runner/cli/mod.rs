//! The command line: one file per subcommand, arguments to request there, exit code here.
//!
//! stdout is data, stderr is talk. Words and flags are docker's and buildx's; where forge differs, `--help` says so.

mod build;
mod error;
mod images;
mod inspect;
mod prune;
mod remote;
mod run;
mod terminal;
mod transfer;
mod ui;
mod version;

use std::fmt::Display;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use forge_snapshotter::{Driver, OpenOptions, Store};

use crate::container::user::{self, Identity};
pub use error::{Failure, Result};

/// Builds, ships and starts container images: no daemon, no set-up, root or not.
#[derive(Parser)]
#[command(name = "forge", version, max_term_width = 110, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Where images, layers and caches live [default: /var/lib/forge for root, $XDG_DATA_HOME/forge for others]
    #[arg(long, env = "FORGE_ROOT", global = true, value_name = "DIR", hide_env_values = true)]
    root: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Build an image from a Dockerfile
    Build(Box<build::Arguments>),
    /// Start a program in a new container
    Run(Box<run::Arguments>),
    /// List images
    #[command(visible_alias = "ls")]
    Images(images::List),
    /// Give an image another name
    Tag(images::Tag),
    /// Remove names of images, and images that have no name left
    Rmi(images::Remove),
    /// Show an image's configuration
    Inspect(inspect::Inspect),
    /// Show how an image was made
    History(inspect::History),
    /// Write images to an archive
    Save(transfer::Save),
    /// Read images from an archive
    Load(transfer::Load),
    /// Fetch an image from a registry
    Pull(transfer::Pull),
    /// Send an image to a registry
    Push(transfer::Push),
    /// Remove what no image uses
    Prune(prune::Prune),
    /// Show what takes how much space
    #[command(name = "du")]
    DiskUsage(prune::DiskUsage),
    /// Show the version
    Version(version::Version),
}

/// What every command finds prepared.
pub struct World {
    pub store: Store,
    pub identity: Identity,
}

pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match dispatch(arguments) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn dispatch(arguments: Arguments) -> Result<ExitCode> {
    // Needs neither state nor namespaces, and starts fastest without.
    if let Command::Version(version) = &arguments.command {
        return version::version(version).map(|()| ExitCode::SUCCESS);
    }
    let root = state_directory(arguments.root)?;
    // Before the first thread: namespaces belong to the whole process.
    let identity = user::enter_namespace().map_err(|e| Failure::new(e).code(start_failure(&arguments.command)))?;
    let store = open_store(&root, identity.rootless)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8))
        .enable_all()
        .build()
        .map_err(|e| Failure::new(format!("failed to start threads: {e}")))?;
    let world = World { store, identity };
    let done = runtime.block_on(command(arguments.command, &world));
    // A blocking read of stdin or of a lock must not hold up the end.
    runtime.shutdown_background();
    done
}

/// docker's code for a `run` that did not come as far as the program.
fn start_failure(command: &Command) -> u8 {
    match command {
        Command::Run(_) => 125,
        _ => 1,
    }
}

async fn command(command: Command, world: &World) -> Result<ExitCode> {
    let done = match command {
        Command::Build(arguments) => build::build(*arguments, world).await,
        Command::Run(arguments) => return run::run(*arguments, world).await,
        Command::Images(arguments) => images::list(&arguments, world),
        Command::Tag(arguments) => images::tag(&arguments, world),
        Command::Rmi(arguments) => images::remove(&arguments, world),
        Command::Inspect(arguments) => inspect::inspect(&arguments, world),
        Command::History(arguments) => inspect::history(&arguments, world),
        Command::Save(arguments) => transfer::save(arguments, world).await,
        Command::Load(arguments) => transfer::load(arguments, world).await,
        Command::Pull(arguments) => transfer::pull(arguments, world).await,
        Command::Push(arguments) => transfer::push(arguments, world).await,
        Command::Prune(arguments) => prune::prune(&arguments, world),
        Command::DiskUsage(arguments) => prune::disk_usage(&arguments, world),
        Command::Version(arguments) => version::version(&arguments),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// `$FORGE_ROOT`, else `/var/lib/forge` for root and `$XDG_DATA_HOME/forge` (`~/.local/share/forge`) for others.
fn state_directory(chosen: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(root) = chosen.filter(|root| !root.as_os_str().is_empty()) {
        return std::path::absolute(&root).map_err(|e| Failure::new(format!("{}: {e}", root.display())));
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/forge"));
    }
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    match (absolute("XDG_DATA_HOME"), absolute("HOME")) {
        (Some(data), _) => Ok(data.join("forge")),
        (None, Some(home)) => Ok(home.join(".local/share/forge")),
        (None, None) => Err(Failure::new("neither HOME nor XDG_DATA_HOME is set")
            .hint("set FORGE_ROOT to a directory for forge's state")),
    }
}

fn open_store(root: &std::path::Path, rootless: bool) -> Result<Store> {
    let driver = match std::env::var("FORGE_SNAPSHOTTER").ok().as_deref() {
        None | Some("" | "auto") => None,
        Some("overlay") if rootless => Some(Driver::OverlayUser),
        Some("overlay") => Some(Driver::Overlay),
        Some("plain") => Some(Driver::Plain),
        Some(other) => {
            return Err(Failure::usage(format!("FORGE_SNAPSHOTTER={other}: expected auto, overlay or plain")));
        }
    };
    Store::open_with(root, OpenOptions { driver })
        .map_err(Failure::from)
        .map_err(|failure| failure.hint("FORGE_ROOT names another state directory"))
}

/// A line of talk.
pub fn say(line: impl Display) {
    // Nobody reads stderr any more: there is nobody to tell.
    writeln!(io::stderr(), "{line}").unwrap_or_default();
}

/// A line of data. A closed pipe (`forge images | head -1`) is no failure.
pub fn print(line: impl Display) -> Result {
    match writeln!(io::stdout(), "{line}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("failed to write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}
