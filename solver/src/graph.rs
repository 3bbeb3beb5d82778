//! The one intermediate form that every frontend targets: a content-addressed graph of operations.
//!
//! A [`NodeId`] is the sha256 of an operation's canonical JSON and its inputs' ids. Every name (a tag,
//! a path in a context, a URL) became a digest before its node was made, so equal ids mean equal work on
//! every machine, and an id is a durable cache key. What people see of a node (its [`Label`]) stands
//! beside the graph and is in no key; what *is* in a key is listed in the table of [`crate::key`].
//!
//! Invariants: a node's inputs are in the graph before it (so a graph has no cycles); an operation
//! holds no fact of the host; secrets are named, never held.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use forge_snapshotter::{Digest, image};

/// The version of the canonical form. A change of meaning of any field below increments it.
pub const CANONICAL_VERSION: u32 = 1;

/// The identity of a node: its operation and, through their ids, all its inputs.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(Digest);

impl NodeId {
    fn of(op: &Op, inputs: &[NodeId]) -> NodeId {
        let canonical =
            serde_json::to_vec(&(CANONICAL_VERSION, op, inputs)).expect("an operation is plain data with string keys");
        NodeId(Digest::of(canonical))
    }

    pub fn digest(&self) -> &Digest {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.short())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub op: Op,
    pub inputs: Vec<NodeId>,
}

/// What people see of a node. In no key.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// As the terminal shows it: `[build 2/5] RUN make`.
    pub name: String,
    /// The stage it belongs to, for `--no-cache-filter`; empty for sources.
    pub stage: String,
    pub location: Option<Location>,
}

/// Lines of the Dockerfile, counted from one, both ends included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    pub first_line: usize,
    pub last_line: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: HashMap<NodeId, Node>,
    labels: HashMap<NodeId, Label>,
}

impl Graph {
    /// Adds a node whose inputs are there already. A node that exists keeps its first label.
    pub fn add(&mut self, op: Op, inputs: Vec<NodeId>, label: Label) -> NodeId {
        assert!(inputs.iter().all(|input| self.nodes.contains_key(input)), "inputs were added before the node");
        let id = NodeId::of(&op, &inputs);
        self.nodes.entry(id.clone()).or_insert(Node { op, inputs });
        self.labels.entry(id.clone()).or_insert(label);
        id
    }

    pub fn get(&self, id: &NodeId) -> &Node {
        &self.nodes[id]
    }

    pub fn label(&self, id: &NodeId) -> &Label {
        &self.labels[id]
    }

    pub fn contains(&self, id: &NodeId) -> bool {
        self.nodes.contains_key(id)
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// In no particular order.
    pub fn ids(&self) -> impl Iterator<Item = &NodeId> {
        self.nodes.keys()
    }
}

/// One step of work. Input 0 of `Run`, `Copy` and `Mkdir` is the root that they change;
/// further inputs are named by index from the operation's own fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "op")]
pub enum Op {
    /// The empty root.
    Scratch,
    /// The root of an image, by what it consists of. Where its layers are fetched is the `Fetcher`'s affair.
    Image {
        diff_ids: Vec<Digest>,
    },
    /// Files selected from a context, a URL or a git commit, by their Merkle digest (see `context`).
    Files {
        digest: Digest,
    },
    Run(Box<Run>),
    Copy(Copy),
    Mkdir(Mkdir),
}

/// Which files of a context an instruction reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Selection {
    /// Cleaned, relative to the context, `""` for all of it; Go `filepath.Match` wildcards allowed
    /// (and `**` where `parents` is set).
    pub paths: Vec<String>,
    /// `--exclude`: moby patterns, relative to the context.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

/// Runs a program in a container over input 0. A complete value: nothing else decides what it does,
/// except what is outside every key (secrets, cache mounts' contents, proxies, resource limits).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The argument vector; a shell form has its shell in front already.
    pub args: Vec<String>,
    /// In order, each name once.
    pub env: Vec<(String, String)>,
    /// Absolute; created if missing.
    pub cwd: String,
    /// `user[:group]`, by name or number, empty for root; resolved in the root itself.
    pub user: String,
    pub network: Network,
    pub security: Security,
    pub mounts: Vec<Mount>,
    /// Heredoc bodies that the step finds as files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<InlineFile>,
    /// `--add-host`: name and address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<(String, String)>,
    pub hostname: String,
    pub platform: image::Platform,
    /// What enters no key: proxies and limits. `serde(skip)`, so it is not in the canonical form.
    #[serde(skip)]
    pub unkeyed: Unkeyed,
}

/// Facts that change how a step runs but never what it yields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Unkeyed {
    /// `HTTP_PROXY` and its kin, when not declared by `ARG`.
    pub proxy_env: Vec<(String, String)>,
    pub shm_size_bytes: Option<u64>,
    /// `--ulimit name=soft:hard`.
    pub ulimits: Vec<Ulimit>,
    pub memory_bytes: Option<u64>,
    pub cpu_quota: Option<CpuQuota>,
    pub pids: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ulimit {
    pub name: String,
    pub soft: u64,
    pub hard: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuQuota {
    pub quota_us: u64,
    pub period_us: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    #[default]
    Default,
    Host,
    None,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    #[default]
    Sandbox,
    Insecure,
}

/// A file that the step finds at an absolute path and that is not part of the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InlineFile {
    pub path: String,
    pub data: String,
    pub mode: u32,
}

/// `RUN --mount`. Mount points that had to be made are removed after the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute and clean, never `/`.
    pub target: String,
    pub kind: MountKind,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum MountKind {
    /// Files of an input; what is written to a writable one is discarded.
    Bind {
        input: usize,
        source: String,
        readonly: bool,
    },
    /// A directory that lives on between builds. Its contents are in no key.
    Cache {
        id: String,
        sharing: Sharing,
        /// What it starts with when it is new.
        input: Option<usize>,
        source: String,
        mode: u32,
        uid: u32,
        gid: u32,
        readonly: bool,
    },
    Tmpfs {
        size_bytes: Option<u64>,
    },
    Secret {
        id: String,
        /// Also, or only, as an environment variable.
        env: Option<String>,
        /// No file where only the variable was asked for.
        file: bool,
        required: bool,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    Ssh {
        id: String,
        required: bool,
        mode: u32,
        uid: u32,
        gid: u32,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    #[default]
    Shared,
    Private,
    Locked,
}

/// Copies files of inputs into input 0 (`COPY` and `ADD`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Copy {
    pub sources: Vec<CopySource>,
    /// Absolute; a trailing slash (or several sources, or a wildcard) means a directory.
    pub destination: String,
    /// The owner of what is created; `None` keeps the source's (files of a context count as root's).
    pub owner: Option<Owner>,
    /// `--chmod`, octal or symbolic, as written.
    pub mode: Option<String>,
    /// `--parents`: keep the directories of each source.
    pub parents: bool,
    pub exclude: Vec<String>,
    pub unpack: Unpack,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopySource {
    /// A path of an input: relative and clean, wildcards as in [`Selection::paths`].
    /// With `parents`, `pivot` is the leading part before `/./` that is not kept.
    Path { input: usize, path: String, pivot: Option<String> },
    /// A heredoc.
    Inline { name: String, data: String },
}

/// `--chown` as written, both parts a name or a number; resolved in the destination root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub user: String,
    pub group: Option<String>,
}

/// Whether archives among the sources are unpacked (by their content, not their name).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unpack {
    #[default]
    Never,
    Archives,
}

/// Makes a directory and its parents in input 0 (`WORKDIR`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mkdir {
    pub path: String,
    pub mode: u32,
    /// The owner of what is created; `None` is root.
    pub owner: Option<Owner>,
}
