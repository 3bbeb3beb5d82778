//! forge beside its peers, in one run on one machine: medians, ratios, peak memory.
//!
//! `cargo bench` runs all; `cargo bench -- warm steps` some. As root, with Debian's `buildah`, `runc` and `docker.io` where a
//! peer is wanted; what is missing is said and left out. Times are whole processes from outside. Nothing here fails on a slow
//! machine: figures are for reading.
//!
//! Sync settings: forge syncs the file system once per build that made something; buildah and dockerd run as packaged.

#![expect(clippy::print_stdout, reason = "figures are what it is for")]

mod measure;
mod peers;

use std::fs;
use std::path::{Path, PathBuf};

use measure::{Figures, compare};
use peers::{Buildah, Docker, Forge, Peer};

type Benchmark = fn(&World);

const ALL: &[(&str, Benchmark)] = &[("startup", startup), ("warm", warm), ("steps", steps), ("edit", edit)];

/// A place for contexts, and the builders.
pub struct World {
    directory: tempfile::TempDir,
    peers: Vec<Box<dyn Peer>>,
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory");
    let base = peers::base();
    let mut peers: Vec<Box<dyn Peer>> = vec![Box::new(Forge::new(directory.path(), base.clone()))];
    match base {
        Some(base) => {
            peers.extend(Buildah::start(directory.path(), &base).map(|peer| Box::new(peer) as Box<dyn Peer>));
            peers.extend(Docker::start(directory.path(), &base).map(|peer| Box::new(peer) as Box<dyn Peer>));
        }
        None => println!("no base images here (FORGE_BASE_IMAGES names their maker): forge alone, from scratch"),
    }
    let world = World { directory, peers };
    for (name, benchmark) in ALL {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            benchmark(&world);
        }
    }
}

impl World {
    fn context(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir_all(&path).expect("a context");
        path
    }
}

/// 20,000 files and 200 MB in directories of a hundred.
fn large_context(at: &Path) {
    for number in 0..20_000_u32 {
        let directory = at.join(format!("d{:03}", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&directory).expect("a directory");
        }
        let word = number.to_le_bytes();
        let data: Vec<u8> = (0..10_000_u32).map(|byte| word[(byte % 4) as usize] ^ (byte / 7) as u8).collect();
        fs::write(directory.join(format!("f{number}")), data).expect("a file");
    }
}

fn startup(_: &World) {
    println!("\n## forge version (target: under 5 ms)");
    let figures = measure::repeat(21, Forge::version);
    figures.print("forge");
}

/// A warm rebuild with nothing changed.
fn warm(world: &World) {
    println!("\n## warm rebuild, nothing changed, 20,000 files, 200 MB (target: under 100 ms, 20 times faster)");
    let context = world.context("warm");
    large_context(&context);
    run(world, &context, "COPY . /src\nRUN true\n", 7, |_| {});
}

/// A chain of fifty trivial steps.
fn steps(world: &World) {
    println!("\n## fifty RUN true, built anew (target: 10 ms a step, 10 times faster)");
    let context = world.context("steps");
    let mut round = 0;
    let chain = "RUN true\n".repeat(50);
    run_changing(world, &context, 3, move |context| {
        round += 1;
        fs::write(context.join("round"), format!("{round}")).expect("a file");
        // A first step that is new each time, or everything would be cached.
        format!("COPY round /round\n{chain}")
    });
}

/// One file of many edited, then a step that must see it.
fn edit(world: &World) {
    println!("\n## one file of 20,000 edited, COPY and RUN true");
    let context = world.context("edit");
    large_context(&context);
    let mut round = 0;
    run_changing(world, &context, 3, move |context| {
        round += 1;
        fs::write(context.join("d000/f0"), format!("edit {round}")).expect("a file");
        "COPY . /src\nRUN true\n".to_owned()
    });
}

fn run(world: &World, context: &Path, text: &str, times: usize, before: impl FnMut(&Path)) {
    let mut before = before;
    let text = text.to_owned();
    run_changing(world, context, times, move |context| {
        before(context);
        text.clone()
    });
}

/// Each builder once to fill its caches, then `times` measured rounds, builders in turn within each.
fn run_changing(world: &World, context: &Path, times: usize, mut prepare: impl FnMut(&Path) -> String) {
    let mut figures: Vec<Figures> = world.peers.iter().map(|_| Figures::default()).collect();
    for round in 0..=times {
        let text = prepare(context);
        for (peer, figures) in world.peers.iter().zip(&mut figures) {
            let measured = peer.build(context, &text);
            if round > 0 {
                figures.add(measured);
            }
        }
    }
    let names: Vec<&str> = world.peers.iter().map(|peer| peer.name()).collect();
    compare(&names, &figures);
}
