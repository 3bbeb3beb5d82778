//! `--output`: where a result goes.
//!
//! Spelled as buildx spells it: a list of `key=value` fields, or a bare path (`-o out`, `-o -`). The image itself is the
//! store's either way; compressing, tagging and sending happen only for the outputs that need it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use forge_exporter::files::{self, DirectoryOptions};
use forge_exporter::layout::Entry;
use forge_exporter::pack::{self, PackOptions};
use forge_snapshotter::image::Reference;
use forge_snapshotter::layer::{Compression, Ids, MediaTypes};
use forge_snapshotter::{Context, Digest, SnapshotId, Store};
use forge_solver::event::{Events, StepId};
use oci_spec::image::Descriptor;
use serde_json::{Value, json};

use super::Arguments;
use super::assemble::BuiltImage;
use super::flags;
use super::sources::BuildSources;
use crate::cli::remote;
use crate::cli::transfer::{ArchiveKind, write_archive, write_layout};
use crate::cli::{Failure, Result, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The local store, and the registry where `push=true`.
    Image,
    Oci,
    Docker,
    Local,
    Tar,
}

/// One `--output`, checked.
#[derive(Debug)]
pub struct Output {
    kind: Kind,
    destination: Option<PathBuf>,
    names: Vec<Reference>,
    push: bool,
    compression: Option<Compression>,
    force_compression: bool,
    media_types: MediaTypes,
    /// `tar=false`: an OCI directory instead of an archive.
    directory: bool,
    annotations: BTreeMap<String, String>,
}

const STDOUT: &str = "-";

/// The id would spoil an archive on stdout.
pub fn on_stdout(outputs: &[String]) -> bool {
    outputs
        .iter()
        .any(|output| output == STDOUT || output.split(',').any(|field| field == "dest=-" || field == "type=tar"))
        && !outputs.iter().any(|output| output.split(',').any(|field| field.starts_with("dest=") && field != "dest=-"))
}

impl Output {
    pub fn all(arguments: &Arguments, _world: &World) -> Result<Vec<Output>> {
        let tags =
            arguments.tags.iter().map(|tag| tag.parse().map_err(Failure::usage)).collect::<Result<Vec<Reference>>>()?;
        let annotations = flags::pairs("--annotation", &arguments.annotations)?;
        let mut outputs = Vec::new();
        for text in &arguments.outputs {
            outputs.push(Output::parse(text, &tags, &annotations)?);
        }
        let image = |push: bool| Output { push, ..Output::new(Kind::Image, tags.clone(), annotations.clone()) };
        let stores = outputs.iter().any(|output| output.kind == Kind::Image);
        if arguments.push && !stores {
            outputs.push(image(true));
        } else if outputs.is_empty() || (arguments.load && !stores) {
            outputs.push(image(false));
        }
        if arguments.push {
            outputs.iter_mut().filter(|output| output.kind == Kind::Image).for_each(|output| output.push = true);
        }
        match outputs.iter().any(|output| output.push && output.names.is_empty()) {
            true => Err(Failure::usage("a push needs a name").hint("-t registry.example.com/project/name:tag")),
            false => Ok(outputs),
        }
    }

    fn new(kind: Kind, names: Vec<Reference>, annotations: BTreeMap<String, String>) -> Output {
        Output {
            kind,
            destination: None,
            names,
            push: false,
            compression: None,
            force_compression: false,
            media_types: if kind == Kind::Docker { MediaTypes::Docker } else { MediaTypes::Oci },
            directory: false,
            annotations,
        }
    }

    fn parse(text: &str, tags: &[Reference], annotations: &BTreeMap<String, String>) -> Result<Output> {
        let bad = |reason: String| Failure::usage(format!("--output {text:?}: {reason}"));
        if !text.contains('=') {
            let kind = if text == STDOUT { Kind::Tar } else { Kind::Local };
            return Ok(Output { destination: Some(text.into()), ..Output::new(kind, Vec::new(), BTreeMap::new()) });
        }
        let fields: Vec<(&str, &str)> = fields(text).map_err(bad)?;
        let kind = match fields.iter().find(|(key, _)| *key == "type").map(|(_, value)| *value) {
            Some("image" | "registry") => Kind::Image,
            Some("oci") => Kind::Oci,
            Some("docker") => Kind::Docker,
            Some("local") => Kind::Local,
            Some("tar") => Kind::Tar,
            Some(other) => {
                return Err(bad(format!("unknown type {other:?}")).hint("image, registry, oci, docker, local or tar"));
            }
            None => return Err(bad("no type".to_owned()).hint("type=image|registry|oci|docker|local|tar")),
        };
        let mut output = Output::new(kind, tags.to_vec(), annotations.clone());
        output.push = fields.contains(&("type", "registry"));
        let mut level = None;
        for (key, value) in fields {
            output.set(key, value, &mut level).map_err(bad)?;
        }
        output.compression = level_of(output.compression, level).map_err(bad)?;
        match (output.kind, &output.destination) {
            (Kind::Local, None) => Err(bad("no dest".to_owned()).hint("dest=DIRECTORY")),
            (Kind::Oci, None) if output.directory => Err(bad("no dest".to_owned()).hint("dest=DIRECTORY")),
            _ => Ok(output),
        }
    }

    fn set(&mut self, key: &str, value: &str, level: &mut Option<i32>) -> std::result::Result<(), String> {
        let yes = matches!(value, "true" | "1" | "");
        match key {
            "type" => {}
            "dest" => self.destination = Some(value.into()),
            "name" => {
                let names = value.split(',').map(|name| name.parse::<Reference>().map_err(|error| error.to_string()));
                self.names = names.collect::<std::result::Result<_, _>>()?;
            }
            "push" => self.push = yes,
            "tar" => self.directory = value == "false" || value == "0",
            "compression" => {
                self.compression = Some(match value {
                    "uncompressed" => Compression::None,
                    "gzip" => Compression::GZIP,
                    "zstd" => Compression::ZSTD,
                    other => return Err(format!("unknown compression {other:?}: uncompressed, gzip or zstd")),
                });
            }
            "compression-level" => {
                *level = Some(value.parse().map_err(|_| format!("compression-level {value:?} is not a number"))?)
            }
            "force-compression" => self.force_compression = yes,
            "oci-mediatypes" => self.media_types = if yes { MediaTypes::Oci } else { MediaTypes::Docker },
            // Harmless: what buildx users pass and forge does anyway, or by its own rules.
            "store" | "unpack" | "name-canonical" | "rewrite-timestamp" | "registry.insecure" | "context"
            | "platform-split" => {}
            _ => match key.strip_prefix("annotation.") {
                Some(name) => {
                    self.annotations.insert(name.to_owned(), value.to_owned());
                }
                None => return Err(format!("unknown field {key:?}")),
            },
        }
        Ok(())
    }

    fn pack_options(&self, progress: pack::Progress) -> PackOptions {
        PackOptions {
            compression: self.compression.unwrap_or(Compression::GZIP),
            force_compression: self.force_compression,
            types: self.media_types,
            annotations: self.annotations.clone(),
            progress: Some(progress),
        }
    }
}

fn level_of(compression: Option<Compression>, level: Option<i32>) -> std::result::Result<Option<Compression>, String> {
    match (compression, level) {
        (compression, None) => Ok(compression),
        (Some(Compression::None), Some(_)) => Err("uncompressed has no level".to_owned()),
        (None | Some(Compression::Gzip(_)), Some(level @ 0..=9)) => Ok(Some(Compression::Gzip(level))),
        (None | Some(Compression::Gzip(_)), Some(level)) => Err(format!("gzip has levels 0 to 9, not {level}")),
        (Some(Compression::Zstd(_)), Some(level @ 0..=22)) => Ok(Some(Compression::Zstd(level))),
        (Some(Compression::Zstd(_)), Some(level)) => Err(format!("zstd has levels 0 to 22, not {level}")),
    }
}

/// `a=b,"name=x,y",c=d`: comma-separated values as encoding/csv reads one line.
fn fields(text: &str) -> std::result::Result<Vec<(&str, &str)>, String> {
    let mut fields = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (field, after) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let end = quoted.find('"').ok_or("a quote is not closed")?;
                (&quoted[..end], quoted[end + 1..].strip_prefix(',').unwrap_or(&quoted[end + 1..]))
            }
            None => rest.split_once(',').unwrap_or((rest, "")),
        };
        fields.push(field.split_once('=').ok_or_else(|| format!("{field:?} has no value"))?);
        rest = after;
    }
    Ok(fields)
}

/// A finished build on its way out.
pub struct Delivery<'a> {
    pub world: &'a World,
    pub images: &'a [BuiltImage],
    pub sources: &'a BuildSources,
    pub events: &'a Events,
}

impl Delivery<'_> {
    /// Writes every output; returns what `--metadata-file` says.
    pub async fn write(&self, outputs: &[Output]) -> Result<Value> {
        let mut metadata = json!({});
        if let [image] = self.images {
            metadata["containerimage.config.digest"] = json!(image.id);
        }
        for (number, output) in outputs.iter().enumerate() {
            let packed = match output.kind {
                Kind::Image => self.store(output, number, &mut metadata).await?,
                Kind::Oci | Kind::Docker => Some(self.archive(output, number).await?),
                Kind::Local | Kind::Tar => self.files(output, number).await.map(|()| None)?,
            };
            if let Some(packed) = packed {
                metadata["containerimage.digest"] = json!(packed.digest().to_string());
                metadata["containerimage.descriptor"] = json!(packed);
            }
        }
        Ok(metadata)
    }

    fn ids(&self) -> Vec<Digest> {
        self.images.iter().map(|image| image.id.clone()).collect()
    }

    /// Names the images in the store, and sends them off where that was asked for.
    async fn store(&self, output: &Output, number: usize, metadata: &mut Value) -> Result<Option<Descriptor>> {
        for name in &output.names {
            let step = StepId::new(format!("naming {name}"));
            let naming = async { self.world.store.catalog().tag(name, &self.ids(), None) };
            self.events.step(&step, format!("naming to {name}"), naming).await?;
        }
        if !output.names.is_empty() {
            let names: Vec<String> = output.names.iter().map(ToString::to_string).collect();
            metadata["image.name"] = json!(names.join(","));
        }
        if !output.push {
            return Ok(None);
        }
        let packed = self.pack(output, number).await?;
        for name in &output.names {
            remote::push(self.world, self.sources.client(), name, &packed, self.events).await?;
        }
        Ok(Some(packed))
    }

    /// Every image's manifest with its layers ready to go, and an index over them where there are several platforms.
    async fn pack(&self, output: &Output, number: usize) -> Result<Descriptor> {
        let step = StepId::new(format!("exporting {number}"));
        let store = &self.world.store;
        let packing = async {
            let mut manifests = Vec::new();
            for image in self.images {
                let options = output.pack_options(remote::pack_progress(self.events, &step));
                manifests.push((pack::pack(store, &image.id, &options).await?.manifest, image.platform.clone()));
            }
            match &manifests[..] {
                [(manifest, _)] => Ok(manifest.clone()),
                _ => pack::index(store, &manifests, output.media_types, &output.annotations),
            }
        };
        Ok(self.events.step(&step, "exporting layers", packing).await?)
    }

    async fn archive(&self, output: &Output, number: usize) -> Result<Descriptor> {
        let packed = self.pack(output, number).await?;
        let names = output.names.iter().map(ToString::to_string).collect();
        let entries = [Entry { names, descriptor: packed.clone() }];
        let path = output.destination.as_deref().unwrap_or(Path::new(STDOUT));
        let from = self.sources.local();
        match output.kind {
            _ if output.directory => write_layout(&from, &entries, path).await?,
            // `type=docker` without a destination means "into the engine": here, the store.
            Kind::Docker if output.destination.is_none() => {
                let catalog = self.world.store.catalog();
                output.names.iter().try_for_each(|name| catalog.tag(name, &self.ids(), None))?;
            }
            Kind::Docker => write_archive(&from, &entries, ArchiveKind::Docker, path).await?,
            _ => write_archive(&from, &entries, ArchiveKind::Oci, path).await?,
        }
        Ok(packed)
    }

    async fn files(&self, output: &Output, number: usize) -> Result {
        let step = StepId::new(format!("files {number}"));
        let destination = output.destination.clone().unwrap_or_else(|| STDOUT.into());
        let name = format!("copying files to {}", destination.display());
        let split = self.images.len() > 1;
        let files = self.images.iter().map(|image| Files {
            root: image.root.clone(),
            epoch: image.epoch,
            // buildx: `linux_arm64`, where there are several.
            folder: split.then(|| image.platform.to_string().replace('/', "_")),
            single_id: self.world.identity.single_id,
        });
        let files: Vec<Files> = files.collect();
        let (store, kind) = (self.world.store.clone(), output.kind);
        let writing = tokio::task::spawn_blocking(move || {
            files.iter().try_for_each(|files| files.write(&store, kind, &destination))
        });
        let flat = async { writing.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) };
        Ok(self.events.step(&step, name, flat).await?)
    }
}

/// The files of one image on their way out.
struct Files {
    root: SnapshotId,
    epoch: Option<i64>,
    folder: Option<String>,
    single_id: bool,
}

impl Files {
    fn write(&self, store: &Store, kind: Kind, destination: &Path) -> forge_exporter::Result<()> {
        let view = store.snapshots().view(&self.root)?;
        let destination = match &self.folder {
            Some(folder) if kind == Kind::Local => destination.join(folder),
            Some(folder) => destination.with_extension(format!("{folder}.tar")),
            None => destination.to_owned(),
        };
        match kind {
            Kind::Local => {
                let ids = if self.single_id { Ids::Single } else { Ids::Keep };
                // As buildx does: what comes out belongs to who built it.
                let options = DirectoryOptions { ids, owner: Some((0, 0)), epoch: self.epoch };
                files::write_dir(view.root(), store.driver(), &destination, &options)?;
            }
            _ if destination == Path::new(STDOUT) => {
                files::write_tar(view.root(), store.driver(), self.epoch, &mut std::io::stdout().lock())?;
            }
            _ => {
                let mut file = std::fs::File::create(&destination).context("create", &destination)?;
                files::write_tar(view.root(), store.driver(), self.epoch, &mut file)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Output> {
        Output::parse(text, &[], &BTreeMap::new())
    }

    #[test]
    fn outputs_are_spelled_as_buildx_spells_them() {
        for (text, kind, destination) in [
            ("out", Kind::Local, Some("out")),
            ("-", Kind::Tar, Some("-")),
            ("type=local,dest=out", Kind::Local, Some("out")),
            ("type=oci,dest=a.tar", Kind::Oci, Some("a.tar")),
            ("type=image,\"name=a,b\",push=true", Kind::Image, None),
            ("type=registry,name=a", Kind::Image, None),
        ] {
            let output = parse(text).unwrap_or_else(|_| panic!("{text}"));
            assert_eq!((output.kind, output.destination.as_deref()), (kind, destination.map(Path::new)), "{text}");
        }
        assert_eq!(parse("type=image,\"name=a,b\"").expect("valid").names.len(), 2);
        assert!(parse("type=registry,name=a").expect("valid").push);
        for bad in [
            "type=what",
            "dest=x",
            "type=local",
            "type=oci,compression=lzma",
            "type=oci,nonsense=1",
            "type=oci,\"name=a",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn levels_are_checked_against_the_algorithm() {
        assert_eq!(
            parse("type=oci,compression=zstd,compression-level=19").expect("valid").compression,
            Some(Compression::Zstd(19))
        );
        assert!(parse("type=oci,compression=gzip,compression-level=19").is_err());
    }
}
