//! Dockerfile text to a build plan. No files, no network, no clock.
//!
//! ```text
//! text --lex--> logical lines --parse--> Dockerfile (AST, spans) --plan(Sources)--> Plan (graph, image configs)
//! ```
//! The world is seen through [`Sources`] alone: it turns names into digests. So a [`Plan`] holds digests, never tags,
//! and planning twice over the same answers gives the same plan.

pub mod diagnostic;
mod duration;
pub mod expand;
mod flag;
pub mod ignore;
pub mod instruction;
pub mod lex;
pub mod lint;
pub mod outline;
mod parse;
mod path;
mod plan;
pub mod report;
pub mod show;

pub use diagnostic::{Diagnostic, Severity, Span};
pub use instruction::Dockerfile;
pub use parse::{INSTRUCTIONS, parse};
pub use plan::{check, plan};

use std::collections::BTreeMap;

use forge_solver::graph::image::{ImageConfig, Platform, Reference};
use forge_solver::graph::{Digest, Graph, Network, NodeId, Selection, Unkeyed};

/// The frontend's only window on the world.
///
/// An error's text is shown at the instruction that asked.
pub trait Sources: Sync {
    /// An image by name, for a platform: digest, diff ids, config. Downloads no layer.
    fn image(
        &self,
        name: &Reference,
        platform: &Platform,
    ) -> impl Future<Output = Result<BaseImage, SourceError>> + Send;

    /// The Merkle digest of what a selection of a context holds now; hashes just those files.
    fn context(
        &self,
        context: &ContextName,
        files: &Selection,
    ) -> impl Future<Output = Result<Digest, SourceError>> + Send;

    /// The digest of what a URL or git reference gives, as a tree for `COPY` to read.
    fn remote(&self, remote: &Remote) -> impl Future<Output = Result<RemoteFiles, SourceError>> + Send;
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    pub message: String,
    pub hint: Option<String>,
}

/// Which context: the main one, or one given by `--build-context name=…` that is a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ContextName {
    Main,
    Named(String),
}

/// What `--build-context NAME=VALUE` gave, as far as planning must know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedContext {
    /// Files: a directory, an unpacked archive, a git checkout.
    Files,
    /// An image: `docker-image://` or `oci-layout://`. `Sources::image` is asked with this reference.
    Image(Reference),
}

/// `ADD https://…` or `ADD https://….git#ref:dir`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Remote {
    Http {
        url: String,
        checksum: Option<Digest>,
        unpack: bool,
    },
    Git {
        url: String,
        reference: Option<String>,
        subdir: Option<String>,
        keep_git_dir: bool,
        checksum: Option<String>,
        submodules: bool,
    },
}

/// What a remote gave: a tree, and the path within it that `COPY` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFiles {
    pub digest: Digest,
    /// The file's name for http, `""` (the whole tree) for git.
    pub path: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct BaseImage {
    /// Of the manifest for this platform.
    pub digest: Digest,
    pub diff_ids: Vec<Digest>,
    pub config: ImageConfig,
}

/// What the command line asks of a Dockerfile.
#[derive(Clone, Debug)]
pub struct Request {
    pub target: Option<String>,
    /// Empty: the host's.
    pub platforms: Vec<Platform>,
    /// The platform that builds (`BUILDPLATFORM`).
    pub build_platform: Platform,
    pub build_args: BTreeMap<String, String>,
    pub contexts: BTreeMap<String, NamedContext>,
    pub labels: BTreeMap<String, String>,
    /// `--network`: what a RUN without its own flag gets.
    pub network: Network,
    /// `--add-host`.
    pub hosts: Vec<(String, String)>,
    /// `--shm-size`, `--ulimit`, proxies and limits: passed through to every RUN.
    pub unkeyed: Unkeyed,
    /// `SOURCE_DATE_EPOCH`: the date of the image and its history, in seconds. A plan's may come from the file.
    pub epoch: Option<i64>,
    /// The patterns of the ignore file, so that a COPY of an ignored file can be warned of.
    pub ignore: Vec<String>,
}

/// What is to be done, and what the images will say.
#[derive(Clone, Debug)]
pub struct Plan {
    pub graph: Graph,
    /// One per platform, in the order asked for.
    pub images: Vec<PlannedImage>,
    /// The request's, or what a global `ARG SOURCE_DATE_EPOCH=…` says.
    pub epoch: Option<i64>,
    /// What planning found that is allowed and yet probably not meant; parsing has found its own.
    pub warnings: Vec<Diagnostic>,
}

#[derive(Clone, Debug)]
pub struct PlannedImage {
    pub platform: Platform,
    pub root: NodeId,
    /// `None` for a stage from scratch.
    pub base: Option<BaseImage>,
    /// Complete but for `created`, `rootfs` and `history`, which depend on what the steps yield.
    pub config: ImageConfig,
    /// The instructions since the base, in order.
    pub history: Vec<PlannedHistory>,
}

/// One line of history; `layer` says whether a node of the graph stands behind it. Walking the snapshots from the
/// root of the image to that of its base meets exactly the nodes named here, last first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedHistory {
    pub created_by: String,
    pub layer: Option<NodeId>,
}
