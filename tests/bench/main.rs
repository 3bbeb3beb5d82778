//! forge beside its peers, in one run on one machine: medians, ratios, peak memory.
//!
//! `cargo bench` runs all; `cargo bench -- warm steps` some. As root, with Debian's `buildah`, `runc` and `docker.io` where a
//! peer is wanted; what is missing is said and left out. Times are whole processes from outside. Nothing here fails on a slow
//! machine: figures are for reading.
//!
//! Sync settings: forge syncs the file system once per build that made something; buildah and dockerd run as packaged.
//!
//! The harness lives in a mount namespace of its own, and what it starts ends with it: whatever a peer mounts is gone when
//! this ends, however it ends.

#![expect(clippy::print_stdout, reason = "figures are what it is for")]

mod measure;
mod memory;
mod peers;
#[path = "../support/registry.rs"]
#[expect(dead_code, reason = "tests ask it more")]
mod registry;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use measure::{Figures, compare, milliseconds};
use peers::{Buildah, Docker, Forge, Peer};

type Benchmark = fn(&World);

const ALL: &[(&str, Benchmark)] =
    &[("startup", startup), ("warm", warm), ("steps", steps), ("edit", edit), ("memory", memory::memory)];

/// A place for contexts, and the builders.
pub struct World {
    // The peers end before their directories go.
    peers: Vec<Box<dyn Peer>>,
    directory: tempfile::TempDir,
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|word| word == name);
    let compared = ["warm", "steps", "edit"].into_iter().any(chosen);
    let own_mounts = enter_namespace();
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory");
    let base = peers::base("debian");
    let mut peers: Vec<Box<dyn Peer>> = vec![Box::new(Forge::new(directory.path(), base.clone()))];
    match &base {
        _ if !compared => {}
        Some(_) if !own_mounts => println!("not root: forge alone"),
        Some(base) => {
            peers.extend(Buildah::start(directory.path(), base).map(|peer| Box::new(peer) as Box<dyn Peer>));
            peers.extend(Docker::start(directory.path(), base).map(|peer| Box::new(peer) as Box<dyn Peer>));
        }
        None => println!("no base images here (FORGE_BASE_IMAGES names their maker): forge alone, from scratch"),
    }
    let world = World { peers, directory };
    for (_, benchmark) in ALL.iter().filter(|(name, _)| chosen(name)) {
        benchmark(&world);
    }
}

/// False where that is not allowed.
fn enter_namespace() -> bool {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let downstream = || mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>);
    unshare(CloneFlags::CLONE_NEWNS).and_then(|()| downstream()).is_ok()
}

/// Whether a program is installed; said where it is not.
fn have(program: &str) -> bool {
    let found = Command::new("which").arg(program).output().is_ok_and(|output| output.status.success());
    if !found {
        println!("{program} is not installed: left out");
    }
    found
}

impl World {
    fn context(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir_all(&path).expect("a context");
        path
    }

    /// 20,000 files and 200 MB in directories of a hundred, made once.
    fn large_context(&self) -> PathBuf {
        let context = self.context("large");
        if context.join("d000").exists() {
            return context;
        }
        for number in 0..20_000_u32 {
            let directory = context.join(format!("d{:03}", number / 100));
            if number % 100 == 0 {
                fs::create_dir_all(&directory).expect("a directory");
            }
            let word = number.to_le_bytes();
            let data: Vec<u8> = (0..10_000_u32).map(|byte| word[(byte % 4) as usize] ^ (byte / 7) as u8).collect();
            fs::write(directory.join(format!("f{number}")), data).expect("a file");
        }
        context
    }

    /// Each builder once to fill its caches, then `times` measured rounds, builders in turn within each.
    fn builds(&self, context: &Path, times: usize, mut prepare: impl FnMut(&Path) -> String) -> Vec<Figures> {
        let mut figures: Vec<Figures> = self.peers.iter().map(|_| Figures::default()).collect();
        for round in 0..=times {
            let text = prepare(context);
            for (peer, figures) in self.peers.iter().zip(&mut figures) {
                let measured = peer.build(context, &text);
                if round > 0 {
                    figures.add(measured);
                }
            }
        }
        figures
    }

    fn names(&self) -> Vec<&'static str> {
        self.peers.iter().map(|peer| peer.name()).collect()
    }
}

fn startup(_: &World) {
    println!("\n## forge version (target: under 5 ms)");
    measure::repeat(21, Forge::version).print("forge");
}

/// A warm rebuild with nothing changed.
fn warm(world: &World) {
    println!("\n## warm rebuild, nothing changed, 20,000 files, 200 MB (target: under 100 ms, 20 times faster)");
    let context = world.large_context();
    let figures = world.builds(&context, 7, |_| "COPY . /src\nRUN true\n".to_owned());
    compare(&world.names(), &figures);
}

const CHAIN: u32 = 50;

/// A chain of trivial steps, and what a build without them takes.
fn steps(world: &World) {
    println!("\n## {CHAIN} RUN true, built anew (target: 10 ms a step, 10 times faster)");
    let context = world.context("steps");
    let mut round = 0;
    let mut anew = |context: &Path, chain: &str| {
        round += 1;
        fs::write(context.join("round"), format!("{round}")).expect("a file");
        // A first step that is new each time, or everything would be cached.
        format!("COPY round /round\n{chain}")
    };
    let chain = "RUN true\n".repeat(CHAIN as usize);
    let with = world.builds(&context, 5, |context| anew(context, &chain));
    let without = world.builds(&context, 5, |context| anew(context, ""));
    compare(&world.names(), &with);
    println!("of which a step, the build without them taken off:");
    let step = |(with, without): (&Figures, &Figures)| with.median().saturating_sub(without.median()) / CHAIN;
    let steps: Vec<Duration> = with.iter().zip(&without).map(step).collect();
    for (name, step) in world.names().iter().zip(&steps) {
        println!(
            "{name:10} {} ms   {:.1} times forge's",
            milliseconds(*step),
            step.as_secs_f64() / steps[0].as_secs_f64()
        );
    }
}

/// One file of many edited, then a step that must see it.
fn edit(world: &World) {
    println!("\n## one file of 20,000 edited, COPY and RUN true");
    let context = world.large_context();
    let mut round = 0;
    let figures = world.builds(&context, 5, |context| {
        round += 1;
        fs::write(context.join("d000/f0"), format!("edit {round}")).expect("a file");
        "COPY . /src\nRUN true\n".to_owned()
    });
    compare(&world.names(), &figures);
}
