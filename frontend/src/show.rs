//! A plan as people can look at it (`--print-graph`): text, JSON, and Graphviz' DOT.
//!
//! Nodes come in an order in which they could be solved: each after its inputs, the first image's first.
//!
//! ```text
//!  1  3fd0b8f1c2aa  [base 1/2] FROM docker.io/library/debian:12@sha256:…
//!  2  80cd4410e8f3  [base 2/2] RUN make  <- 1
//! image linux/amd64 = 2
//! ```

use std::collections::{HashMap, HashSet};
use std::fmt::{Arguments, Write as _};

use forge_solver::graph::{NodeId, Op};
use serde_json::{Value, json};

use crate::Plan;

/// Each node after its inputs; what no image needs is left out.
pub fn order(plan: &Plan) -> Vec<&NodeId> {
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for image in &plan.images {
        let mut path = vec![(&image.root, 0)];
        while let Some((id, next)) = path.last_mut() {
            match plan.graph.get(id).inputs.get(*next) {
                Some(input) => {
                    *next += 1;
                    if !seen.contains(input) {
                        path.push((input, 0));
                    }
                }
                None => {
                    if seen.insert(*id) {
                        order.push(*id);
                    }
                    path.pop();
                }
            }
        }
    }
    order
}

/// What kind of step a node is, in a word.
fn kind(op: &Op) -> &'static str {
    match op {
        Op::Scratch => "scratch",
        Op::Image { .. } => "image",
        Op::Files { .. } => "files",
        Op::Run(_) => "run",
        Op::Copy(_) => "copy",
        Op::Mkdir(_) => "mkdir",
    }
}

/// One line a node: its number, its short id, its name, the numbers of its inputs.
pub fn text(plan: &Plan) -> String {
    let order = order(plan);
    let numbers: HashMap<&NodeId, usize> = order.iter().enumerate().map(|(index, id)| (*id, index + 1)).collect();
    let width = order.len().to_string().len();
    let mut out = String::new();
    for (index, id) in order.iter().enumerate() {
        let name = one_line(&plan.graph.label(id).name);
        write(&mut out, format_args!("{:>width$}  {}  {name}", index + 1, id.digest().short()));
        let inputs: Vec<String> = plan.graph.get(id).inputs.iter().map(|input| numbers[input].to_string()).collect();
        if !inputs.is_empty() {
            write(&mut out, format_args!("  <- {}", inputs.join(" ")));
        }
        out.push('\n');
    }
    for image in &plan.images {
        write(&mut out, format_args!("image {} = {}\n", image.platform, numbers[&image.root]));
    }
    out
}

/// `{"nodes": […], "images": […]}` with all that a node's operation says.
pub fn json(plan: &Plan) -> Value {
    let node = |id: &NodeId| {
        let (node, label) = (plan.graph.get(id), plan.graph.label(id));
        json!({
            "id": id,
            "name": label.name,
            "kind": kind(&node.op),
            "stage": label.stage,
            "location": label.location,
            "inputs": node.inputs,
            "operation": node.op,
        })
    };
    let images = plan.images.iter().map(|image| json!({"platform": image.platform.to_string(), "root": image.root}));
    json!({
        "nodes": order(plan).into_iter().map(node).collect::<Vec<_>>(),
        "images": images.collect::<Vec<_>>(),
    })
}

/// For `dot -Tsvg`: edges run from what is read to what reads it.
pub fn dot(plan: &Plan) -> String {
    let order = order(plan);
    let mut out = String::from("digraph build {\n  rankdir=LR;\n  node [shape=box, fontname=\"monospace\"];\n");
    for id in &order {
        let (node, label) = (plan.graph.get(id), plan.graph.label(id));
        let style = match &node.op {
            Op::Scratch | Op::Image { .. } | Op::Files { .. } => ", style=rounded",
            Op::Run(_) | Op::Copy(_) | Op::Mkdir(_) => "",
        };
        let short = id.digest().short();
        write(&mut out, format_args!("  \"{short}\" [label=\"{}\"{style}];\n", escape(&label.name)));
        for input in &node.inputs {
            write(&mut out, format_args!("  \"{}\" -> \"{short}\";\n", input.digest().short()));
        }
    }
    for (index, image) in plan.images.iter().enumerate() {
        let platform = escape(&image.platform.to_string());
        write(&mut out, format_args!("  image{index} [label=\"{platform}\", shape=ellipse];\n"));
        write(&mut out, format_args!("  \"{}\" -> image{index};\n", image.root.digest().short()));
    }
    out.push_str("}\n");
    out
}

fn write(out: &mut String, text: Arguments<'_>) {
    out.write_fmt(text).expect("writing to a string does not fail");
}

/// Names longer than this are cut: a picture of whole scripts shows nothing.
const SHOWN_CHARACTERS_MAX: usize = 120;

/// A name without line ends and other control characters.
fn one_line(name: &str) -> String {
    let mut out: String =
        name.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SHOWN_CHARACTERS_MAX).collect();
    if name.chars().nth(SHOWN_CHARACTERS_MAX).is_some() {
        out.push('…');
    }
    out
}

/// Within a quoted DOT label `"` ends it and `\` begins an escape (`\N` would be the node's name).
fn escape(name: &str) -> String {
    one_line(name).replace('\\', "\\\\").replace('"', "\\\"")
}
