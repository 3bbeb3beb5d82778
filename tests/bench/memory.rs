//! Peak memory, which neither contexts nor layers may drive up. Of the largest process of each command.

use std::fs;
use std::path::Path;

use crate::World;
use crate::measure::{Measured, milliseconds};
use crate::peers::{self, Forge, Peer as _};
use crate::registry::Registry;

const COPY: &str = "COPY . /src\nRUN true\n";
/// Bytes that do not compress.
const LARGE_LAYER: &str = "RUN dd if=/dev/urandom of=/large bs=1M count=1024\n";

pub fn memory(world: &World) {
    println!("\n## peak memory (target: under 100 MB, whatever the sizes)");
    let Some(debian) = peers::base("debian") else { return };
    // Each with a state directory of its own.
    let builder =
        |name: &str, base: &Path| Forge::new(&world.context(&format!("memory-{name}")), Some(base.to_owned()));
    let context = world.large_context();
    let forge = builder("context", &debian);
    print("a context of 200 MB and 20,000 files, first build", forge.build(&context, COPY));
    print("the same again", forge.build(&context, COPY));
    let empty = world.context("empty");
    let forge = builder("layer", &debian);
    print("a layer of 1 GiB", forge.build(&empty, LARGE_LAYER));
    let Some(registry) = Registry::start() else { return };
    let name = |name: &str| format!("{}/{name}", registry.address());
    for how in ["gzip", "zstd"] {
        let push = format!("type=image,name={},push=true,compression={how},force-compression=true", name(how));
        print(&format!("pushing it as {how}"), forge.build_to(&empty, LARGE_LAYER, &push));
    }
    let Some(golang) = peers::base("golang") else { return };
    let forge = builder("golang", &golang);
    print("golang from a layout, unpacked, and a RUN", forge.build(&empty, "RUN true\n"));
    print(
        "pushing that",
        forge.build_to(&empty, "RUN true\n", &format!("type=image,name={},push=true", name("golang"))),
    );
    print("pulling that", builder("pull", &golang).run(&["pull", &name("golang")]));
    let file = world.context("from-registry").join("Dockerfile");
    fs::write(&file, format!("FROM {}\nRUN true\n", name("golang"))).expect("a Dockerfile");
    let directory = file.parent().expect("its directory").display().to_string();
    print(
        "building on it from the registry",
        builder("fetch", &golang).run(&["build", "-q", "--network=host", &directory]),
    );
}

fn print(what: &str, measured: Measured) {
    let peak = measured.peak_memory_kib as f64 * 1024.0 / 1e6;
    println!("{what:50} {peak:>6.1} MB   {} ms", milliseconds(measured.wall));
}
