//! `forge prune` and `forge du`: what takes space, and giving it back.

use std::io::{BufRead, IsTerminal, Write};

use forge_snapshotter::gc::{self, Kind, PruneOptions, Usage};
use serde_json::json;

use super::build::flags::size;
use super::images::table;
use super::ui::human_bytes;
use super::{Failure, Result, World, print};

#[derive(clap::Args)]
pub struct Prune {
    /// Also the cache of builds and images without a container: everything that no name leads to
    #[arg(short, long)]
    all: bool,
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// Only what has not been used for so long, such as 24h or 7d
    #[arg(long, value_name = "DURATION")]
    older_than: Option<String>,
    /// `until=24h`: the same, as docker spells it
    #[arg(long, value_name = "FILTER")]
    filter: Vec<String>,
    /// Stop when no more than this is left
    #[arg(long, visible_alias = "max-used-space", value_name = "SIZE")]
    keep_storage: Option<String>,
    /// How to print it
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    format: String,
}

#[derive(clap::Args)]
pub struct DiskUsage {
    /// How to print it
    #[arg(long, value_name = "FORMAT", default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

pub fn prune(arguments: &Prune, world: &World) -> Result {
    let options = PruneOptions {
        all: arguments.all,
        older_than: older_than(arguments)?,
        keep_bytes: arguments.keep_storage.as_deref().map(|text| size("--keep-storage", text)).transpose()?,
    };
    if !arguments.force && std::io::stdin().is_terminal() && !confirmed(arguments.all)? {
        return Ok(());
    }
    let pruned = gc::prune(&world.store, &options)?;
    match arguments.format.as_str() {
        "json" => print(
            json!({ "ReclaimedBytes": pruned.bytes, "Snapshots": pruned.snapshots.len(), "Blobs": pruned.blobs.len() }),
        ),
        _ => print(format_args!("Total reclaimed space: {}", human_bytes(pruned.bytes))),
    }
}

fn confirmed(all: bool) -> Result<bool> {
    let what = if all {
        "everything that no named image uses, the build cache included"
    } else {
        "layers and blobs that neither an image nor the build cache uses"
    };
    let mut stderr = std::io::stderr();
    write!(stderr, "This removes {what}. Go on? [y/N] ").and_then(|()| stderr.flush()).map_err(Failure::new)?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(Failure::new)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn older_than(arguments: &Prune) -> Result<Option<std::time::Duration>> {
    let mut given = arguments.older_than.clone();
    for filter in &arguments.filter {
        match filter.split_once('=') {
            Some(("until" | "unused-for", value)) => given = Some(value.to_owned()),
            _ => return Err(Failure::usage(format!("--filter {filter:?}: unknown")).hint("--filter until=24h")),
        }
    }
    let Some(text) = given else { return Ok(None) };
    humantime::parse_duration(&text)
        .map(Some)
        .map_err(|error| Failure::usage(format!("{text:?}: {error}")).hint("such as 24h or 7d"))
}

pub fn disk_usage(arguments: &DiskUsage, world: &World) -> Result {
    let usage = gc::usage(&world.store)?;
    if arguments.format == "json" {
        let lines = kinds(&usage).map(|(name, kind)| {
            json!({ "Type": name, "Count": kind.count, "Bytes": kind.bytes, "ReclaimableBytes": kind.reclaimable_bytes })
        });
        return print(json!(lines));
    }
    let rows = kinds(&usage).map(|(name, kind)| {
        vec![name.to_owned(), kind.count.to_string(), human_bytes(kind.bytes), human_bytes(kind.reclaimable_bytes)]
    });
    table(&["TYPE", "COUNT", "SIZE", "RECLAIMABLE"], rows.into())
}

fn kinds(usage: &Usage) -> [(&'static str, Kind); 6] {
    [
        ("Images", usage.images),
        ("Snapshots", usage.snapshots),
        ("Blobs", usage.blobs),
        ("Build cache", usage.cache),
        ("Cache mounts", usage.cache_mounts),
        ("Volumes", usage.volumes),
    ]
}
