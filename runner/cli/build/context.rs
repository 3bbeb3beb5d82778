//! Where a build's files come from: the main context and those named with `--build-context`.
//!
//! A directory is read in place. Everything else (a tar archive or a Dockerfile on stdin, a URL, a git repository) becomes
//! a directory below the store's `ingest` that lives as long as the build.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use forge_frontend::{ContextName, NamedContext, ignore};
use forge_snapshotter::image::Reference;
use forge_snapshotter::layer::{self, ExtractOptions, Ids};
use forge_snapshotter::{IngestDir, Store};
use forge_solver::pattern::Patterns;

use super::report::Source;
use super::{Arguments, remote};
use crate::cli::error::Doing;
use crate::cli::{Failure, Result, World};

/// Largest Dockerfile that is read. BuildKit stops at 16 MiB as well.
const DOCKERFILE_BYTES_MAX: u64 = 16 << 20;

pub struct BuildContext {
    main: Files,
    named: BTreeMap<String, Named>,
    /// `CONTEXT -` with a Dockerfile on stdin, or `--file -`.
    stdin: Option<String>,
}

/// A directory, and what of it does not count.
pub struct Files {
    pub root: PathBuf,
    pub ignore: Patterns,
    patterns: Vec<String>,
    /// Keeps a fetched context until the build ends.
    _fetched: Option<IngestDir>,
}

pub enum Named {
    Files(Files),
    Image(Reference),
    /// An OCI layout, and the tag or digest wanted of it.
    Layout {
        directory: PathBuf,
        reference: Reference,
    },
}

impl BuildContext {
    pub async fn open(arguments: &Arguments, world: &World) -> Result<BuildContext> {
        let store = &world.store;
        let mut stdin = None;
        let main = match arguments.context.as_str() {
            "-" if arguments.file.as_deref() == Some("-") => {
                return Err(Failure::usage("the context and the Dockerfile cannot both come from stdin"));
            }
            "-" => from_stdin(store, &mut stdin)?,
            context => open_files(context, arguments.file.as_deref(), world).await?,
        };
        if arguments.file.as_deref() == Some("-") {
            stdin = Some(read_stdin_text()?);
        }
        let mut named = BTreeMap::new();
        for text in &arguments.build_contexts {
            let Some((name, value)) =
                text.split_once('=').filter(|(name, value)| !name.is_empty() && !value.is_empty())
            else {
                return Err(Failure::usage(format!("--build-context {text:?}: expected NAME=VALUE")));
            };
            named.insert(name.to_owned(), open_named(name, value, world).await?);
        }
        Ok(BuildContext { main, named, stdin })
    }

    /// The Dockerfile: `--file`, else `Dockerfile` or `dockerfile` in the context.
    pub fn dockerfile(&self, file: Option<&str>) -> Result<Source> {
        if let Some(text) = &self.stdin {
            return Ok(Source { name: "Dockerfile".to_owned(), text: text.clone() });
        }
        let root = &self.main.root;
        let path = match file {
            Some(file) => locate(root, file),
            None => ["Dockerfile", "dockerfile"]
                .map(|name| root.join(name))
                .into_iter()
                .find(|path| path.is_file())
                .unwrap_or_else(|| root.join("Dockerfile")),
        };
        let name = file.unwrap_or("Dockerfile").to_owned();
        read_dockerfile(&path, name)
    }

    pub fn named(&self) -> BTreeMap<String, NamedContext> {
        let kind = |context: &Named| match context {
            Named::Files(_) => NamedContext::Files,
            Named::Image(reference) | Named::Layout { reference, .. } => NamedContext::Image(reference.clone()),
        };
        self.named.iter().map(|(name, context)| (name.clone(), kind(context))).collect()
    }

    pub fn ignore_patterns(&self) -> &[String] {
        &self.main.patterns
    }

    pub fn files(&self, name: &ContextName) -> Option<&Files> {
        match name {
            ContextName::Main => Some(&self.main),
            ContextName::Named(name) => match self.named.get(name)? {
                Named::Files(files) => Some(files),
                _ => None,
            },
        }
    }

    /// The layout that a reference made by [`layout_reference`] stands for.
    pub fn layout(&self, wanted: &Reference) -> Option<&Path> {
        self.named.values().find_map(|context| match context {
            Named::Layout { directory, reference } if reference == wanted => Some(directory.as_path()),
            _ => None,
        })
    }
}

/// `-f FILE` counts from the working directory as buildx has it, and from the context where it is not there.
fn locate(root: &Path, file: &str) -> PathBuf {
    let given = PathBuf::from(file);
    match given.exists() || given.is_absolute() {
        true => given,
        false => root.join(file),
    }
}

fn read_dockerfile(path: &Path, name: String) -> Result<Source> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Failure::new(format!("no Dockerfile at {}", path.display())).hint("name it with --file"));
        }
        Err(error) => return Err(Failure::new(format!("failed to read {}: {error}", path.display()))),
    };
    read_text(file, &path.display().to_string()).map(|text| Source { name, text })
}

fn read_text(from: impl Read, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    from.take(DOCKERFILE_BYTES_MAX + 1).read_to_end(&mut bytes).doing(format_args!("read {name}"))?;
    if bytes.len() as u64 > DOCKERFILE_BYTES_MAX {
        return Err(Failure::new(format!(
            "{name} is larger than {} MiB: that is no Dockerfile",
            DOCKERFILE_BYTES_MAX >> 20
        )));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line =
            1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        Failure::new(format!("{name}:{line}: not UTF-8")).hint("save the file as UTF-8")
    })
}

fn read_stdin_text() -> Result<String> {
    read_text(std::io::stdin().lock(), "stdin")
}

/// `forge build -`: an archive is the context, text is a Dockerfile with an empty context.
fn from_stdin(store: &Store, dockerfile: &mut Option<String>) -> Result<Files> {
    let directory = store.ingest()?;
    let mut stdin = std::io::stdin();
    let mut head = vec![0; 512];
    let mut filled = 0;
    while filled < head.len() {
        match stdin.read(&mut head[filled..]).doing("read stdin")? {
            0 => break,
            read => filled += read,
        }
    }
    head.truncate(filled);
    let archive = is_archive(&head);
    let all = std::io::Cursor::new(head).chain(stdin);
    match archive {
        true => unpack(all, directory.path())?,
        false => *dockerfile = Some(read_text(all, "stdin")?),
    }
    files(directory.path().to_owned(), None, Some(directory))
}

/// gzip, bzip2, xz, zstd, or the `ustar` of a tar header.
pub fn is_archive(head: &[u8]) -> bool {
    const MAGIC: [&[u8]; 4] = [b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"];
    MAGIC.iter().any(|magic| head.starts_with(magic)) || head.get(257..262) == Some(b"ustar")
}

pub fn unpack(archive: impl Read + Send, into: &Path) -> Result {
    let mut decoded = layer::decoder(archive).doing("read the archive")?;
    let options = ExtractOptions { ids: Ids::Keep, owner: None, max_bytes: None };
    layer::extract_archive(&mut decoded, into, Path::new("/"), &options).doing("unpack the context")?;
    Ok(())
}

async fn open_files(context: &str, file: Option<&str>, world: &World) -> Result<Files> {
    if remote::is_remote(context) {
        let (root, guard) = remote::context(context, world).await?;
        return files(root, file, Some(guard));
    }
    let root =
        std::fs::canonicalize(context).map_err(|error| Failure::new(format!("build context {context:?}: {error}")))?;
    if !root.is_dir() {
        return Err(Failure::new(format!("build context {context:?} is not a directory"))
            .hint("the last argument is the directory that COPY reads from; the Dockerfile is named with --file"));
    }
    files(root, file, None)
}

/// A directory with its ignore file: `<Dockerfile>.dockerignore` where there is one, else `.dockerignore`.
fn files(root: PathBuf, dockerfile: Option<&str>, fetched: Option<IngestDir>) -> Result<Files> {
    let own = dockerfile.filter(|file| *file != "-").unwrap_or("Dockerfile");
    let mut own = locate(&root, own).into_os_string();
    own.push(".dockerignore");
    let mut patterns = Vec::new();
    for path in [PathBuf::from(own), root.join(".dockerignore")] {
        match std::fs::File::open(&path) {
            Ok(file) => {
                patterns = ignore::patterns(&read_text(file, &path.display().to_string())?);
                break;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::new(format!("failed to read {}: {error}", path.display()))),
        }
    }
    let ignore = Patterns::new(&patterns).doing("read the ignore file")?;
    Ok(Files { root, ignore, patterns, _fetched: fetched })
}

async fn open_named(name: &str, value: &str, world: &World) -> Result<Named> {
    if let Some(image) = value.strip_prefix("docker-image://") {
        return Ok(Named::Image(image.parse().map_err(Failure::usage)?));
    }
    if let Some(layout) = value.strip_prefix("oci-layout://") {
        let (directory, reference) = layout_reference(name, layout)?;
        return Ok(Named::Layout { directory, reference });
    }
    if value.starts_with("target:") {
        return Err(Failure::usage(format!(
            "--build-context {name}={value}: targets of a bake file are not known to forge build"
        )));
    }
    open_files(value, None, world).await.map(Named::Files)
}

/// `DIR[:tag][@digest]`. The frontend knows images by references, so the layout gets one that no registry can have.
fn layout_reference(name: &str, text: &str) -> Result<(PathBuf, Reference)> {
    let (rest, digest) = text.split_once('@').map_or((text, None), |(rest, digest)| (rest, Some(digest)));
    let slash = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (directory, tag) = match rest[slash..].find(':') {
        Some(colon) => (&rest[..slash + colon], Some(&rest[slash + colon + 1..])),
        None => (rest, None),
    };
    if !Path::new(directory).join("oci-layout").is_file() {
        return Err(Failure::new(format!(
            "--build-context {name}: {directory:?} is no OCI layout: it has no file oci-layout"
        )));
    }
    let safe: String = name.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let repository = format!("oci-layout.invalid/{}", safe.trim_matches('-'));
    let reference = match (tag, digest) {
        (_, Some(digest)) => format!("{repository}@{digest}"),
        (Some(tag), None) => format!("{repository}:{tag}"),
        (None, None) => format!("{repository}:latest"),
    };
    Ok((PathBuf::from(directory), reference.parse().map_err(Failure::usage)?))
}
