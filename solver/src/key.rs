//! What makes two steps the same.
//!
//! A node has two keys. The *definition key* is its [`NodeId`]: known before anything was done, so a hit costs one
//! look-up and touches nothing above. The *content key* is made once the inputs are known: the operation and what its
//! inputs hold. An input that was made anew but came out the same therefore still hits: the early cut-off.
//!
//! | in the keys                                              | definition | content |
//! |----------------------------------------------------------|------------|---------|
//! | every field of the operation that is in its canonical form | yes      | yes     |
//! | version of the canonical form                            | yes        | yes, and [`CONTENT_VERSION`] |
//! | input that is a whole root (input 0)                     | its node   | its snapshot id: what it holds, no mtimes |
//! | input read in part (`COPY --from`, bind mount, cache seed) | its node | digest of the selected files |
//! | files of a context, a URL, a git commit                  | their digest | their digest |
//! | base image                                               | its diff ids | their chain id |
//! | secrets' ids, cache mounts' ids, targets and modes       | yes        | yes     |
//! | secrets' and ssh sockets' content, cache mounts' content | no         | no      |
//! | proxies, shm size, ulimits, memory, cpu, pids ([`crate::graph::Unkeyed`]) | no | no |
//! | labels, stage names, line numbers, comments              | no         | no      |
//! | host, user, state directory, time, `--jobs`, where a base is fetched | no | no  |
//!
//! What a record keeps besides ([`Facts`]) explains a later miss ([`Miss`]) and is in no key.

use std::fmt;

use forge_snapshotter::{Digest, Digester, SnapshotId};
use serde::{Deserialize, Serialize};

use crate::graph::{CANONICAL_VERSION, CopySource, Graph, Label, Node, NodeId, Op, Selection};

/// Changes when the meaning of a content key does.
pub const CONTENT_VERSION: u32 = 1;

/// What an input counts as in a content key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    Root(SnapshotId),
    Files(Digest),
}

/// How an operation reads one of its inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reads {
    Whole,
    Part {
        selection: Selection,
        /// With `--parents`.
        parents: bool,
    },
}

/// How each input is read, by index.
pub fn reads(node: &Node) -> Vec<Reads> {
    let mut reads: Vec<Reads> =
        node.inputs.iter().map(|_| Reads::Part { selection: Selection::default(), parents: false }).collect();
    let mut add = |input: usize, path: &str, exclude: &[String], with_parents: bool| {
        if let Some(Reads::Part { selection, parents }) = reads.get_mut(input) {
            selection.paths.push(path.trim_start_matches('/').to_owned());
            selection.exclude = exclude.to_vec();
            *parents = with_parents;
        }
    };
    match &node.op {
        Op::Copy(copy) => {
            for source in &copy.sources {
                if let CopySource::Path { input, path, .. } = source {
                    add(*input, path, &copy.exclude, copy.parents);
                }
            }
        }
        Op::Run(run) => {
            for (input, source, _) in run.mounts.iter().filter_map(crate::execute::source) {
                add(input, source, &[], false);
            }
        }
        _ => (),
    }
    if let Some(first) = reads.first_mut() {
        *first = Reads::Whole;
    }
    reads
}

/// The content key.
pub fn content_key(op: &Op, inputs: &[Identity]) -> Digest {
    let canonical =
        serde_json::to_vec(&(CANONICAL_VERSION, op, inputs)).expect("an operation is plain data with string keys");
    let mut digester = Digester::new();
    digester.field(b"forge content key");
    digester.update(&CONTENT_VERSION.to_le_bytes());
    digester.field(&canonical);
    digester.finish()
}

/// What a record says of the node that it is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub label: Label,
    pub op: Op,
    pub inputs: Vec<Identity>,
}

/// Why there was no hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss {
    FirstBuild,
    /// Built before, and removed since.
    Evicted,
    /// It was asked not to look.
    NotAsked,
    /// `RUN`, `COPY`, ... and what of it is another.
    Changed {
        instruction: &'static str,
        what: String,
    },
    /// A variable of the environment: from what to what.
    Variable {
        name: String,
        before: Option<String>,
        now: Option<String>,
    },
    /// What a `COPY` or a mount reads.
    Files {
        instruction: &'static str,
        paths: Vec<String>,
    },
    /// The image below, or the step before, is another.
    Base,
    EarlierStep,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |value: &Option<String>| value.as_ref().map_or("unset".to_owned(), |value| format!("{value:?}"));
        match self {
            Miss::FirstBuild => f.write_str("first build"),
            Miss::Evicted => f.write_str("evicted"),
            Miss::NotAsked => f.write_str("--no-cache"),
            Miss::Changed { instruction, what } => write!(f, "{instruction} {what} changed"),
            Miss::Variable { name, before, now } => {
                write!(f, "env {name} changed: {} -> {}", quoted(before), quoted(now))
            }
            Miss::Files { instruction, paths } => write!(f, "{instruction} {} changed", paths.join(" ")),
            Miss::Base => f.write_str("base changed"),
            Miss::EarlierStep => f.write_str("an earlier step changed"),
        }
    }
}

/// Compares a node with the nearest that was built before: the same line of the same stage, else the same stage and
/// kind with the most in common.
pub fn explain(graph: &Graph, id: &NodeId, facts: &Facts, history: &[Facts]) -> Miss {
    let kind = std::mem::discriminant(&facts.op);
    let candidates =
        history.iter().filter(|old| old.label.stage == facts.label.stage && std::mem::discriminant(&old.op) == kind);
    let likeness = |old: &&Facts| {
        let same_op = old.op == facts.op;
        let same_line = old.label.location == facts.label.location && facts.label.location.is_some();
        let same_inputs = old.inputs == facts.inputs;
        (same_op || same_line || old.label.name == facts.label.name)
            .then_some(4 * u8::from(same_op) + 2 * u8::from(same_line) + u8::from(same_inputs))
    };
    // The newest of those that are equally near.
    let nearest = candidates.rev().filter_map(|old| likeness(&old).map(|likeness| (likeness, old)));
    match nearest.max_by_key(|(likeness, _)| *likeness) {
        None => Miss::FirstBuild,
        Some((_, old)) => difference(graph, graph.get(id), old, facts),
    }
}

fn difference(graph: &Graph, node: &Node, old: &Facts, new: &Facts) -> Miss {
    let instruction = instruction(&new.op);
    if old.op != new.op {
        return operation_difference(instruction, &old.op, &new.op);
    }
    let reads = reads(node);
    let differs = |index: &usize| old.inputs.get(*index) != new.inputs.get(*index);
    // The root first: all else may follow from it.
    match (0..new.inputs.len()).find(differs).map(|index| &reads[index]) {
        Some(Reads::Whole) if matches!(graph.get(&node.inputs[0]).op, Op::Image { .. } | Op::Scratch) => Miss::Base,
        Some(Reads::Whole) => Miss::EarlierStep,
        Some(Reads::Part { selection, .. }) => Miss::Files { instruction, paths: shown(&selection.paths) },
        None => Miss::Evicted,
    }
}

fn shown(paths: &[String]) -> Vec<String> {
    paths.iter().map(|path| if path.is_empty() { ".".to_owned() } else { path.clone() }).collect()
}

fn instruction(op: &Op) -> &'static str {
    match op {
        Op::Run(_) => "RUN",
        Op::Copy(_) => "COPY",
        Op::Mkdir(_) => "WORKDIR",
        Op::Scratch | Op::Image { .. } | Op::Files { .. } => "FROM",
    }
}

fn operation_difference(instruction: &'static str, old: &Op, new: &Op) -> Miss {
    let changed = |what: &str| Miss::Changed { instruction, what: what.to_owned() };
    match (old, new) {
        (Op::Run(old), Op::Run(new)) if old.args != new.args => changed("text"),
        (Op::Run(old), Op::Run(new)) if old.env != new.env => variable(&old.env, &new.env),
        (Op::Run(old), Op::Run(new)) if old.mounts != new.mounts => changed("--mount"),
        (Op::Run(old), Op::Run(new)) if old.cwd != new.cwd => changed("working directory"),
        (Op::Run(old), Op::Run(new)) if old.user != new.user => changed("user"),
        (Op::Run(old), Op::Run(new)) if old.network != new.network => changed("--network"),
        (Op::Run(old), Op::Run(new)) if old.files != new.files => changed("heredoc"),
        (Op::Copy(old), Op::Copy(new)) if old.sources != new.sources => changed("sources"),
        (Op::Copy(old), Op::Copy(new)) if old.destination != new.destination => changed("destination"),
        (Op::Copy(old), Op::Copy(new)) if old.owner != new.owner => changed("--chown"),
        (Op::Copy(old), Op::Copy(new)) if old.mode != new.mode => changed("--chmod"),
        (Op::Mkdir(_), Op::Mkdir(_)) => changed("path"),
        _ => changed("options"),
    }
}

/// The first variable that differs; of equal sets in another order, the order.
fn variable(old: &[(String, String)], new: &[(String, String)]) -> Miss {
    let value = |set: &[(String, String)], name: &str| {
        set.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
    };
    let names = new.iter().chain(old).map(|(name, _)| name);
    for name in names {
        let (before, now) = (value(old, name), value(new, name));
        if before != now {
            return Miss::Variable { name: name.clone(), before, now };
        }
    }
    Miss::Changed { instruction: "ENV", what: "order".into() }
}

#[cfg(test)]
mod tests;
