//! `forge pull`, `push`, `save`, `load`: the same copy with other ends.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use forge_exporter::archive::{self, Archive};
use forge_exporter::blobs::{Manifests, digest_of};
use forge_exporter::copy::{self, copy};
use forge_exporter::layout::{Entry, Layout};
use forge_exporter::local::Local;
use forge_exporter::pack::{self, PackOptions};
use forge_snapshotter::image::{Platform, Reference};
use forge_snapshotter::layer::{Compression, MediaTypes};
use forge_snapshotter::{Digest, StoredImage};
use forge_solver::event::{Events, StepId};
use oci_spec::image::Descriptor;

use super::error::Doing;
use super::inspect::wanted_platform;
use super::remote::{self, StoreAndOrigins};
use super::ui::{Progress, Ui};
use super::{Failure, Result, World, print};

#[derive(clap::Args)]
pub struct Pull {
    /// The image, `[registry/]repository[:tag][@digest]`
    #[arg(value_name = "IMAGE")]
    image: String,
    /// The platform, where there are several
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Print the image id only
    #[arg(short, long)]
    quiet: bool,
}

#[derive(clap::Args)]
pub struct Push {
    /// The image, by the name it shall have there
    #[arg(value_name = "IMAGE")]
    image: String,
    /// gzip, zstd or uncompressed, for layers that were made here
    #[arg(long, value_name = "HOW", default_value = "gzip", value_parser = ["gzip", "zstd", "uncompressed"])]
    compression: String,
    /// Print the digest only
    #[arg(short, long)]
    quiet: bool,
}

#[derive(clap::Args)]
pub struct Save {
    /// Images: names, or ids
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
    /// The archive, or for oci-dir the directory [default: stdout]
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// docker-archive (which OCI tools read as well), oci-archive or oci-dir
    #[arg(long, value_name = "FORMAT", default_value = "docker-archive", value_parser = ["docker-archive", "oci-archive", "oci-dir"])]
    format: String,
    /// The platform, where a name has several
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
}

#[derive(clap::Args)]
pub struct Load {
    /// An archive of docker, podman or forge, compressed or not, or an OCI layout [default: stdin]
    #[arg(short, long, value_name = "PATH")]
    input: Option<PathBuf>,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
}

/// Runs with progress on the terminal, unless it shall be quiet.
async fn with_progress<T>(quiet: bool, work: impl AsyncFnOnce(Events) -> Result<T>) -> Result<T> {
    let ui = Ui::start(if quiet { Progress::Quiet } else { Progress::Auto });
    let done = work(ui.events()).await;
    ui.finish();
    done
}

pub async fn pull(arguments: Pull, world: &World) -> Result {
    let name: Reference = arguments.image.parse().map_err(Failure::usage)?;
    let platform = wanted_platform(arguments.platform.as_deref())?;
    let image =
        with_progress(arguments.quiet, async |events| remote::pull(world, &name, &platform, &events).await).await?;
    print(image.id)
}

pub async fn push(arguments: Push, world: &World) -> Result {
    let name: Reference = arguments.image.parse().map_err(Failure::usage)?;
    let images = world.store.catalog().tagged(&name)?;
    if images.is_empty() {
        return Err(Failure::new(format!("no image is called {}", name.familiar()))
            .hint(format!("forge tag IMAGE {}", name.familiar())));
    }
    let options = PackOptions { compression: compression(&arguments.compression), ..PackOptions::default() };
    let client = remote::client()?;
    let packed = with_progress(arguments.quiet, async |events| {
        let packed = packed(world, &name, &images, options, &events).await?;
        remote::push(world, &client, &name, &packed, &events).await?;
        Ok(packed)
    });
    let packed = packed.await?;
    world.store.settle()?;
    print(format_args!(
        "{}@{}",
        name.with_tag(name.tag().unwrap_or("latest")).map_err(Failure::usage)?,
        packed.digest()
    ))
}

fn compression(name: &str) -> Compression {
    match name {
        "zstd" => Compression::ZSTD,
        "uncompressed" => Compression::None,
        _ => Compression::GZIP,
    }
}

/// What a name stands for, ready to go: the index it was pulled with where that is whole, else made of its images.
async fn packed(
    world: &World,
    name: &Reference,
    images: &[StoredImage],
    options: PackOptions,
    events: &Events,
) -> Result<Descriptor> {
    let store = &world.store;
    let step = StepId::new(format!("pack {name}"));
    let options = PackOptions { progress: Some(remote::pack_progress(events, &step)), ..options };
    let packing = async {
        let mut manifests = Vec::new();
        for image in images {
            manifests.push((pack::pack(store, &image.id, &options).await?.manifest, image.platform.clone()));
        }
        match &manifests[..] {
            [(manifest, _)] => Ok(manifest.clone()),
            _ => pack::index(store, &manifests, options.types, &options.annotations),
        }
    };
    Ok(events.step(&step, format!("preparing {}", name.familiar()), packing).await?)
}

pub async fn save(arguments: Save, world: &World) -> Result {
    let platform = wanted_platform(arguments.platform.as_deref())?;
    let output = arguments.output.clone().unwrap_or_else(|| "-".into());
    if remote::is_stdout(&output) && (std::io::stdout().is_terminal() || arguments.format == "oci-dir") {
        return Err(Failure::usage("an archive does not belong on a terminal").hint("-o FILE, or a pipe"));
    }
    let mut entries = Vec::new();
    for text in &arguments.images {
        entries.push(saved(text, &arguments.format, &platform, world).await?);
    }
    let from = remote::local(&world.store, &remote::client()?);
    match arguments.format.as_str() {
        "oci-dir" => write_layout(&from, &entries, &output).await,
        "oci-archive" => write_archive(&from, &entries, ArchiveKind::Oci, &output).await,
        _ => write_archive(&from, &entries, ArchiveKind::Docker, &output).await,
    }
}

/// One image of the arguments, packed. Layers go into archives as they are known, new ones uncompressed: the archive
/// is for a disk or a pipe, and whoever reads it unpacks them at once.
async fn saved(text: &str, format: &str, platform: &Platform, world: &World) -> Result<Entry> {
    let resolved = world.store.catalog().resolve(text, platform)?;
    let options = match format {
        "docker-archive" => {
            PackOptions { compression: Compression::None, types: MediaTypes::Oci, ..PackOptions::default() }
        }
        _ => PackOptions::default(),
    };
    let packed = pack::pack(&world.store, &resolved.image.id, &options).await?;
    let names = resolved.name.iter().map(ToString::to_string).collect();
    Ok(Entry { names, descriptor: packed.manifest })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArchiveKind {
    Oci,
    Docker,
}

pub async fn write_archive(from: &StoreAndOrigins, entries: &[Entry], kind: ArchiveKind, output: &Path) -> Result {
    if remote::is_stdout(output) {
        return write_to(from, entries, kind, &mut tokio::io::stdout()).await;
    }
    // Beside and renamed: a failure leaves the archive of before.
    let directory = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = tempfile::NamedTempFile::new_in(directory).doing(format_args!("write {}", output.display()))?;
    let file = beside.reopen().doing(format_args!("write {}", output.display()))?;
    write_to(from, entries, kind, &mut tokio::fs::File::from_std(file)).await?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    beside.as_file().set_permissions(mode).doing(format_args!("write {}", output.display()))?;
    beside.persist(output).doing(format_args!("write {}", output.display()))?;
    Ok(())
}

async fn write_to(
    from: &StoreAndOrigins,
    entries: &[Entry],
    kind: ArchiveKind,
    out: &mut (impl tokio::io::AsyncWrite + Unpin + Send),
) -> Result {
    match kind {
        ArchiveKind::Oci => archive::write_oci_tar(from, entries, out).await?,
        ArchiveKind::Docker => archive::write_docker_tar(from, entries, out).await?,
    }
    tokio::io::AsyncWriteExt::flush(out).await.doing("write the archive")
}

pub async fn write_layout(from: &StoreAndOrigins, entries: &[Entry], output: &Path) -> Result {
    let layout = Layout::create(output)?;
    for entry in entries {
        copy(from, &layout, &entry.descriptor, &copy::Options::default()).await?;
        layout.add(&entry.descriptor, &entry.names)?;
    }
    Ok(())
}

pub async fn load(arguments: Load, world: &World) -> Result {
    let spool = world.store.ingest()?;
    let input = arguments.input.clone().filter(|path| path.as_os_str() != "-");
    match input {
        Some(path) if path.is_dir() => {
            let layout = Layout::open(&path)?;
            load_all(&layout, &layout.entries()?, arguments.quiet, world).await?;
        }
        Some(path) => {
            let archive = Archive::open(&path, spool.path())?;
            load_all(&archive, archive.entries(), arguments.quiet, world).await?;
        }
        None if std::io::stdin().is_terminal() => {
            return Err(Failure::usage("nothing to load").hint("forge load -i FILE, or forge load < FILE"));
        }
        None => {
            let archive = Archive::read("stdin".to_owned(), std::io::stdin(), spool.path())?;
            load_all(&archive, archive.entries(), arguments.quiet, world).await?;
        }
    }
    Ok(world.store.settle()?)
}

async fn load_all(from: &impl Manifests, entries: &[Entry], quiet: bool, world: &World) -> Result {
    let to = Local::new(world.store.clone());
    if entries.is_empty() {
        return Err(Failure::new("there is no image in it"));
    }
    for entry in entries {
        let names: Vec<Reference> = entry.names.iter().filter_map(|name| loaded_name(name)).collect();
        let options =
            copy::Options { tags: names.iter().map(ToString::to_string).collect(), ..copy::Options::default() };
        copy(from, &to, &entry.descriptor, &options).await?;
        let ids = to.remember(&digest_of(&entry.descriptor)?)?;
        say_loaded(&names, &ids, quiet)?;
    }
    Ok(())
}

/// A bare tag (`latest`, as OCI layouts have it) names no image.
fn loaded_name(name: &str) -> Option<Reference> {
    name.contains(['/', ':']).then(|| name.parse().ok()).flatten()
}

fn say_loaded(names: &[Reference], ids: &[Digest], quiet: bool) -> Result {
    if quiet {
        return ids.iter().try_for_each(print);
    }
    match names {
        [] => ids.iter().try_for_each(|id| print(format_args!("Loaded image ID: {id}"))),
        _ => names.iter().try_for_each(|name| print(format_args!("Loaded image: {}", name.familiar()))),
    }
}
