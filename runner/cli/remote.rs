//! Registries as the commands use them: one client from the user's own configuration, names to images, images to names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use forge_exporter::copy::{self, copy};
use forge_exporter::fetch::{Fetched, fetch_config};
use forge_exporter::local::Local;
use forge_exporter::pack;
use forge_exporter::registry::{Client, ClientOptions, Secret};
use forge_exporter::unpack::{self, UnpackOptions, unpack_layers};
use forge_snapshotter::image::{ImageConfig, Platform, Reference};
use forge_snapshotter::layer::Ids;
use forge_snapshotter::{Digest, SnapshotId, Store, StoredImage};
use forge_solver::event::{EventKind, Events, StepId};
use oci_spec::image::{Descriptor, DescriptorBuilder, MediaType};

use super::{Failure, Result, World, say};

/// The store, and behind it the registries that its blobs came from.
pub type StoreAndOrigins = Local<Client>;

/// A client that finds credentials and certificates where docker and podman keep them.
pub fn client() -> Result<Client> {
    let notify = Arc::new(|text: &str| say(format_args!("note: {text}")));
    let options = ClientOptions {
        insecure: insecure_registries(),
        certs_directories: certificate_directories(),
        auth_json: std::env::var("DOCKER_AUTH_CONFIG").ok().map(Secret::new),
        auth_files: auth_files(),
        notify: Some(notify),
        ..ClientOptions::default()
    };
    Ok(Client::new(options)?)
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| !path.as_os_str().is_empty())
}

/// Docker's file, then those of podman and its kin.
fn auth_files() -> Vec<PathBuf> {
    let home = variable("HOME");
    let docker = variable("DOCKER_CONFIG").or_else(|| home.as_ref().map(|home| home.join(".docker")));
    let config = variable("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|home| home.join(".config")));
    [
        variable("REGISTRY_AUTH_FILE"),
        docker.map(|directory| directory.join("config.json")),
        variable("XDG_RUNTIME_DIR").map(|directory| directory.join("containers/auth.json")),
        config.map(|directory| directory.join("containers/auth.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn certificate_directories() -> Vec<PathBuf> {
    let home = variable("HOME").map(|home| home.join(".config/docker/certs.d"));
    home.into_iter().chain(["/etc/docker/certs.d", "/etc/containers/certs.d"].map(PathBuf::from)).collect()
}

/// `insecure-registries` of docker's daemon.json: who made that list for docker means it for forge, too.
fn insecure_registries() -> Vec<String> {
    let Ok(text) = std::fs::read("/etc/docker/daemon.json") else { return Vec::new() };
    let Ok(daemon) = serde_json::from_slice::<serde_json::Value>(&text) else {
        say("warning: /etc/docker/daemon.json is not JSON: its insecure-registries are not used");
        return Vec::new();
    };
    let listed = daemon["insecure-registries"].as_array().map(Vec::as_slice).unwrap_or_default();
    listed.iter().filter_map(|host| host.as_str().map(str::to_owned)).collect()
}

pub fn local(store: &Store, client: &Client) -> StoreAndOrigins {
    Local::with_origins(store.clone(), client.clone())
}

/// The image of that name and platform in the store.
pub fn stored(store: &Store, name: &Reference, platform: &Platform) -> Result<Option<StoredImage>> {
    let images = store.catalog().tagged(name)?;
    Ok(images.into_iter().find(|image| image.platform == *platform))
}

/// What the registry has under a name: documents only, no layer.
pub async fn resolve(store: &Store, client: &Client, name: &Reference, platform: &Platform) -> Result<Fetched> {
    let repository = client.repository(name);
    let wanted = match (name.digest(), name.tag()) {
        (Some(digest), _) => digest.to_string(),
        (None, tag) => tag.unwrap_or("latest").to_owned(),
    };
    let fetched = fetch_config(store, &repository, &wanted, platform).await?;
    let found = fetched.config.platform();
    if found != *platform && !found.architecture.is_empty() {
        say(format_args!("warning: {} is for {found}, not {platform}", name.familiar()));
    }
    Ok(fetched)
}

/// The blobs that give these layers, as far as anybody ever said.
pub fn layers(store: &Store, diff_ids: &[Digest]) -> Result<Vec<(Descriptor, Digest)>> {
    let catalog = store.catalog();
    let mut layers = Vec::new();
    for diff_id in diff_ids {
        let mut known = catalog.encodings(diff_id)?;
        let mut here = Vec::new();
        for encoding in &known {
            here.push(store.content().size(&encoding.blob)?.is_some());
        }
        let best = here.iter().position(|here| *here).unwrap_or(0);
        if known.is_empty() {
            return Err(Failure::new(format!("layer {diff_id} is neither in the store nor known to any registry"))
                .hint("build or pull the image again"));
        }
        let encoding = known.swap_remove(best);
        let descriptor = DescriptorBuilder::default()
            .media_type(MediaType::from(encoding.media_type.as_str()))
            .digest(encoding.blob.as_str().parse::<oci_spec::image::Digest>().map_err(Failure::new)?)
            .size(encoding.size_bytes)
            .build()
            .map_err(Failure::new)?;
        layers.push((descriptor, diff_id.clone()));
    }
    Ok(layers)
}

pub fn unpack_options(single_id: bool, events: &Events, step: &StepId) -> UnpackOptions {
    let ids = if single_id { Ids::Single } else { Ids::Keep };
    UnpackOptions { ids, progress: Some(unpack_progress(events, step)), ..UnpackOptions::default() }
}

fn unpack_progress(events: &Events, step: &StepId) -> unpack::Progress {
    let (events, step) = (events.clone(), step.clone());
    Arc::new(move |blob, current_bytes| {
        let what = short(blob);
        events.send(&step, EventKind::Progress { what, current_bytes, total_bytes: blob.size() });
    })
}

/// `sha256:0123456789ab`
fn short(blob: &Descriptor) -> String {
    blob.digest().to_string().chars().take(19).collect()
}

pub fn pack_progress(events: &Events, step: &StepId) -> pack::Progress {
    let (events, step) = (events.clone(), step.clone());
    Arc::new(move |diff_id, done| {
        if let pack::Step::Compressed { size_bytes } = done {
            let what = format!("layer {}", diff_id.short());
            events.send(&step, EventKind::Progress { what, current_bytes: size_bytes, total_bytes: size_bytes });
        }
    })
}

fn copy_progress(events: &Events, step: &StepId) -> copy::Progress {
    let (events, step) = (events.clone(), step.clone());
    Arc::new(move |blob, done| {
        let current_bytes = match done {
            copy::Step::Sent(bytes) => bytes,
            copy::Step::Exists | copy::Step::Mounted(_) | copy::Step::Written => blob.size(),
        };
        events.send(&step, EventKind::Progress { what: short(blob), current_bytes, total_bytes: blob.size() });
    })
}

/// Sends what `root` is in the store to where `name` says.
pub async fn push(world: &World, client: &Client, name: &Reference, root: &Descriptor, events: &Events) -> Result {
    if let Some(digest) = name.digest() {
        return Err(Failure::usage(format!("{name}: a push goes to a tag, not to a digest ({digest})")));
    }
    let step = StepId::new(format!("push {name}"));
    let options = copy::Options {
        tags: vec![name.tag().unwrap_or("latest").to_owned()],
        progress: Some(copy_progress(events, &step)),
        ..copy::Options::default()
    };
    let (from, to) = (local(&world.store, client), client.repository(name));
    let pushing = async { copy(&from, &to, root, &options).await };
    events.step(&step, format!("pushing {}", name.familiar()), pushing).await?;
    Ok(())
}

/// Fetches an image, layers and all, and names it.
pub async fn pull(world: &World, name: &Reference, platform: &Platform, events: &Events) -> Result<StoredImage> {
    let (store, client) = (&world.store, client()?);
    let fetched = resolve(store, &client, name, platform).await?;
    let step = StepId::new(format!("pull {name}"));
    let options = unpack_options(world.identity.single_id, events, &step);
    let from = local(store, &client);
    let unpacking = async { unpack_layers(store, &from, &fetched.layers, &options).await };
    let root = events.step(&step, format!("pulling {}", name.familiar()), unpacking).await?;
    let image = fetched.stored(Some(root))?;
    let index = (fetched.root.digest() != fetched.manifest.digest())
        .then(|| forge_exporter::blobs::digest_of(&fetched.root))
        .transpose()?;
    store.catalog().put(&image)?;
    store.catalog().tag(name, std::slice::from_ref(&image.id), index.as_ref())?;
    store.settle()?;
    Ok(image)
}

/// The root that an image's layers give, unpacked if it is not there.
pub async fn root(world: &World, image: &StoredImage, config: &ImageConfig) -> Result<SnapshotId> {
    let store = &world.store;
    let chain = SnapshotId::chain(&config.rootfs.diff_ids);
    for known in image.root.iter().chain([&chain]) {
        if store.snapshots().get(known)?.is_some() {
            return Ok(known.clone());
        }
    }
    if config.rootfs.diff_ids.is_empty() {
        return Ok(SnapshotId::scratch());
    }
    let layers = layers(store, &config.rootfs.diff_ids)?;
    let options = unpack_options(world.identity.single_id, &quiet_events(), &StepId::new("unpack"));
    Ok(unpack_layers(store, &local(store, &client()?), &layers, &options).await?)
}

/// For commands that show no progress.
pub fn quiet_events() -> Events {
    Events::nowhere()
}

/// Where `-` means stdout.
pub fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}
