//! From snapshots to images: the layers behind a root, their diff ids, and the configuration that names them.
//!
//! What is written here is a function of the plan and of what the steps left, not of when the build ran: a layer's date is
//! its snapshot's, an instruction without a layer takes the date of the one before it. So a build with nothing changed gives
//! the image of before, id and all.

use forge_frontend::{Plan, PlannedImage, Request};
use forge_snapshotter::image::{History, ImageConfig, Platform};
use forge_snapshotter::{Digest, Info, Layer, SnapshotId, Store, StoredImage, layer};
use forge_solver::event::{Events, StepId};
use rayon::prelude::*;

use crate::cli::{Failure, Result, World};

/// An image in the store, without a name yet.
pub struct BuiltImage {
    pub platform: Platform,
    /// The digest of its configuration.
    pub id: Digest,
    pub root: SnapshotId,
    /// `SOURCE_DATE_EPOCH`: no file of its new layers is younger.
    pub epoch: Option<i64>,
}

impl BuiltImage {
    /// What the build prints.
    pub fn id(images: &[BuiltImage]) -> String {
        images.iter().map(|image| image.id.to_string()).collect::<Vec<_>>().join("\n")
    }
}

pub async fn images(
    world: &World,
    plan: &Plan,
    snapshots: &[SnapshotId],
    request: &Request,
    events: &Events,
) -> Result<Vec<BuiltImage>> {
    let work: Vec<(PlannedImage, SnapshotId)> = plan.images.iter().cloned().zip(snapshots.iter().cloned()).collect();
    let (store, epoch) = (world.store.clone(), request.epoch);
    let step = StepId::new("layers");
    let assembling = async {
        let assembled = tokio::task::spawn_blocking(move || {
            work.iter().map(|(image, root)| assemble(&store, image, root, epoch)).collect::<Result<Vec<_>>>()
        });
        assembled.await.map_err(|error| Failure::new(format!("assembling the image: {error}")))?
    };
    let assembled = events.step(&step, "assembling the image", async { assembling.await.map_err(Shown) }).await;
    assembled.map_err(|Shown(failure)| failure)
}

struct Shown(Failure);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Failure::Told { message, .. } => f.write_str(message),
            Failure::Shown(_) => Ok(()),
        }
    }
}

fn assemble(store: &Store, image: &PlannedImage, root: &SnapshotId, epoch: Option<i64>) -> Result<BuiltImage> {
    let base = image.base.as_ref();
    let base_diff_ids = base.map(|base| base.diff_ids.clone()).unwrap_or_default();
    let steps = image.history.iter().filter(|line| line.layer.is_some()).count();
    let chain = chain(store, root, steps)?;
    let layers = chain.par_iter().map(|info| diff_id(store, info, epoch)).collect::<Result<Vec<_>>>()?;

    let mut config = image.config.clone();
    config.history = base.map(|base| base.config.history.clone()).unwrap_or_default();
    account_for_layers(&mut config.history, base_diff_ids.len());
    config.rootfs.diff_ids = base_diff_ids;
    config.rootfs.diff_ids.extend(layers.iter().filter(|layer| layer.entries > 0).map(|layer| layer.diff_id.clone()));
    let steps = chain
        .iter()
        .zip(&layers)
        .map(|(info, layer)| Ok(Step { made: store.catalog().made(&info.id)?, has_layer: layer.entries > 0 }));
    write_history(&mut config, image, &steps.collect::<Result<Vec<_>>>()?, epoch);

    let bytes = serde_json::to_vec(&config).map_err(|error| Failure::new(format!("image configuration: {error}")))?;
    let id = store.content().put(&bytes)?;
    let stored = StoredImage {
        id: id.clone(),
        manifest: None,
        platform: image.platform.clone(),
        created: config.created.clone(),
        root: Some(root.clone()),
    };
    store.catalog().put(&stored)?;
    Ok(BuiltImage { platform: image.platform.clone(), id, root: root.clone(), epoch })
}

/// The snapshots of the image's own steps, first to last: `steps` parents up from the root.
fn chain(store: &Store, root: &SnapshotId, steps: usize) -> Result<Vec<Info>> {
    let mut chain = Vec::with_capacity(steps);
    let mut next = Some(root.clone());
    while chain.len() < steps {
        let Some(id) = next else {
            return Err(
                Failure::new("a step's snapshot has no parent: the store is damaged").hint("forge build --no-cache")
            );
        };
        let Some(info) = store.snapshots().get(&id)? else {
            return Err(Failure::new(format!("snapshot {id} is gone")).hint("build again: it is made anew"));
        };
        next = info.parent.clone();
        chain.push(info);
    }
    chain.reverse();
    Ok(chain)
}

/// The layer behind a snapshot: remembered, or hashed now. Compressing waits until somebody needs the compressed bytes.
fn diff_id(store: &Store, info: &Info, epoch: Option<i64>) -> Result<Layer> {
    let catalog = store.catalog();
    if let Some(known) = catalog.layer_of(&info.id, epoch)? {
        return Ok(known);
    }
    let options = layer::DiffOptions { driver: store.driver(), clamp_mtime: epoch };
    let (diff_id, summary) = match &info.changes {
        Some(changes) => layer::diff_id(changes, &options)?,
        None => (Digest::of(""), layer::DiffSummary::default()),
    };
    let layer = Layer { diff_id, size_bytes: summary.bytes, entries: summary.entries };
    catalog.set_layer(&info.id, &layer, epoch)?;
    Ok(layer)
}

/// What history has to say of a step.
struct Step {
    made: Option<i64>,
    has_layer: bool,
}

fn write_history(config: &mut ImageConfig, image: &PlannedImage, steps: &[Step], epoch: Option<i64>) {
    let base_created = image.base.as_ref().and_then(|base| base.config.created.clone());
    let mut date = epoch.map(date).or(base_created);
    // Instructions before the first layer have no date of their own where the base has none either.
    let mut date_unknown_until = config.history.len();
    let mut steps = steps.iter();
    for line in &image.history {
        let step = line.layer.as_ref().and_then(|_| steps.next());
        if let (Some(made), None) = (step.and_then(|step| step.made), epoch) {
            date = Some(self::date(made));
        }
        config.history.push(History {
            created: date.clone(),
            created_by: Some(line.created_by.clone()),
            comment: Some("buildkit.dockerfile.v0".to_owned()),
            author: config.author.clone(),
            empty_layer: step.is_none_or(|step| !step.has_layer),
            ..History::default()
        });
        if date.is_some() {
            for earlier in &mut config.history[date_unknown_until..] {
                earlier.created = earlier.created.take().or_else(|| date.clone());
            }
            date_unknown_until = config.history.len();
        }
    }
    config.created = date;
}

/// Makes a base's history speak of every one of its layers and of no other. Some builders write none, and readers that go
/// by it (docker's older forms do) would take our lines for the base's layers.
fn account_for_layers(history: &mut Vec<History>, layers: usize) {
    let spoken_of = history.iter().filter(|line| !line.empty_layer).count();
    for line in history.iter_mut().rev().filter(|line| !line.empty_layer).take(spoken_of.saturating_sub(layers)) {
        line.empty_layer = true;
    }
    let unknown = || History {
        comment: Some("a layer of the base, which does not say how it was made".to_owned()),
        ..History::default()
    };
    history.extend((spoken_of..layers).map(|_| unknown()));
}

fn date(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map(|time| time.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bases_history_speaks_of_each_of_its_layers() {
        for (lines, layers, expect) in [
            ("", 0, ""),
            ("", 2, "++"),
            ("+", 2, "++"),
            ("-+-", 2, "-+-+"),
            ("+-+", 2, "+-+"),
            ("+-+", 1, "+--"),
            ("++", 0, "--"),
        ] {
            let line = |sign| History { empty_layer: sign == '-', ..History::default() };
            let mut history: Vec<History> = lines.chars().map(line).collect();
            account_for_layers(&mut history, layers);
            let found: String = history.iter().map(|line| if line.empty_layer { '-' } else { '+' }).collect();
            assert_eq!(found, expect, "{lines} of {layers}");
        }
    }
}
