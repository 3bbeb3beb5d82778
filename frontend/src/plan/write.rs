//! Evaluated stages to nodes: the last step, when every name has become a digest.

use std::collections::{BTreeMap, HashMap};

use forge_solver::graph::{Copy, CopySource, Digest, Graph, Label, Location, NodeId, Op, Selection, Unpack};
use futures_util::future::{join, join_all};

use super::Evaluation;
use super::stage::Origin;
use super::state::{self, Evaluated, Input, Shared, Step, Work};
use crate::diagnostic::{Diagnostic, Span};
use crate::instruction::{Code, Dockerfile};
use crate::{ContextName, PlannedHistory, PlannedImage, Remote, RemoteFiles, Request, SourceError, Sources};

/// What `Sources` said of contexts and remotes, each asked once.
pub struct Answers {
    files: BTreeMap<(ContextName, Selection), Digest>,
    remotes: HashMap<Remote, RemoteFiles>,
}

impl Answers {
    pub async fn ask(platforms: &[Evaluation<'_>], sources: &impl Sources) -> Result<Answers, Vec<Diagnostic>> {
        let mut files: BTreeMap<(ContextName, Selection), Span> = BTreeMap::new();
        let mut remotes: Vec<(Remote, Span)> = Vec::new();
        for evaluation in platforms {
            for &index in &evaluation.order {
                let state = &evaluation.stages.states[index];
                if let Origin::Files(name) = &state.origin
                    && evaluation.is_root(index)
                {
                    files.entry(whole(name)).or_insert(state.code.span);
                }
                let steps = evaluation.evaluated[index].iter().flat_map(|evaluated| &evaluated.steps);
                for (input, span) in steps.flat_map(inputs) {
                    match input {
                        Input::Files(name, selection) => {
                            files.entry((name.clone(), selection.clone())).or_insert(span);
                        }
                        Input::Remote(remote) if !remotes.iter().any(|(known, _)| known == remote) => {
                            remotes.push((remote.clone(), span));
                        }
                        _ => {}
                    }
                }
            }
        }
        let (found, fetched) = join(
            join_all(files.keys().map(|(name, selection)| sources.context(name, selection))),
            join_all(remotes.iter().map(|(remote, _)| sources.remote(remote))),
        )
        .await;
        let mut errors = Vec::new();
        let mut answers = Answers { files: BTreeMap::new(), remotes: HashMap::new() };
        for ((question, span), answer) in files.into_iter().zip(found) {
            match answer {
                Ok(digest) => {
                    answers.files.insert(question, digest);
                }
                Err(error) => errors.push(refused(span, error)),
            }
        }
        for ((remote, span), answer) in remotes.into_iter().zip(fetched) {
            match answer {
                Ok(files) => {
                    answers.remotes.insert(remote, files);
                }
                Err(error) => errors.push(refused(span, error)),
            }
        }
        errors.sort_by_key(|error| error.span);
        if errors.is_empty() { Ok(answers) } else { Err(errors) }
    }
}

fn inputs(step: &Step) -> impl Iterator<Item = (&Input, Span)> {
    step.work.iter().flat_map(|(_, inputs, _)| inputs).map(|input| (input, step.span))
}

fn refused(span: Span, error: SourceError) -> Diagnostic {
    Diagnostic { hint: error.hint, ..Diagnostic::error(span, error.message) }
}

fn whole(name: &str) -> (ContextName, Selection) {
    let selection = Selection { paths: vec![String::new()], exclude: Vec::new() };
    (ContextName::Named(name.to_owned()), selection)
}

/// Writes the graph of all platforms.
pub fn plan(
    file: &Dockerfile,
    request: &Request,
    platforms: Vec<Evaluation<'_>>,
    answers: &Answers,
) -> (Graph, Vec<PlannedImage>) {
    let mut graph = Graph::default();
    let mut images = Vec::new();
    for mut evaluation in platforms {
        let mut steps: Vec<Vec<Step>> = evaluation.evaluated.iter_mut().map(take_steps).collect();
        let mut writer = Writer {
            shared: evaluation.shared(file, request),
            answers,
            graph: &mut graph,
            states: vec![None; evaluation.stages.states.len()],
        };
        for &index in &evaluation.order {
            let evaluated = evaluation.evaluated[index].as_ref().expect("a state in the order was evaluated");
            if evaluation.is_root(index) {
                writer.state(index, evaluated, std::mem::take(&mut steps[index]));
            }
        }
        let written = writer.states[evaluation.target].take().expect("the target is last in the order");
        let evaluated = evaluation.evaluated[evaluation.target].as_ref().expect("the target was evaluated");
        images.push(image(&evaluation, request, evaluated, written));
    }
    (graph, images)
}

fn take_steps(evaluated: &mut Option<Evaluated>) -> Vec<Step> {
    evaluated.as_mut().map(|evaluated| std::mem::take(&mut evaluated.steps)).unwrap_or_default()
}

fn image(evaluation: &Evaluation<'_>, request: &Request, evaluated: &Evaluated, written: Written) -> PlannedImage {
    let mut config = evaluated.config.clone();
    config.config.labels.extend(request.labels.clone());
    let mut platform = evaluated.platform.clone();
    if !request.platforms.is_empty() {
        // The image is for the platform that was asked for, whatever its base was for.
        platform = evaluation.target_platform.clone();
        let same = (&config.os, &config.architecture) == (&platform.os, &platform.architecture);
        config.os.clone_from(&platform.os);
        config.architecture.clone_from(&platform.architecture);
        if platform.variant.is_some() || !same {
            config.variant.clone_from(&platform.variant);
        }
    }
    PlannedImage { platform, root: written.root, base: evaluated.base.clone(), config, history: written.history }
}

/// A state's root and the history since its base.
#[derive(Clone)]
struct Written {
    root: NodeId,
    history: Vec<PlannedHistory>,
}

struct Writer<'a> {
    shared: Shared<'a>,
    answers: &'a Answers,
    graph: &'a mut Graph,
    states: Vec<Option<Written>>,
}

impl Writer<'_> {
    fn state(&mut self, index: usize, evaluated: &Evaluated, steps: Vec<Step>) {
        let origin = &self.shared.stages.states[index].origin;
        let mut written = match origin {
            Origin::State(parent) => {
                self.states[*parent].clone().expect("a parent is before its children in the order")
            }
            _ => self.base(index, evaluated),
        };
        for step in steps {
            let layer = step.work.map(|(work, inputs, label)| self.work(&written.root, work, &inputs, label));
            if let Some(layer) = &layer {
                written.root = layer.clone();
            }
            written.history.push(PlannedHistory { created_by: step.history, layer });
        }
        self.states[index] = Some(written);
    }

    fn base(&mut self, index: usize, evaluated: &Evaluated) -> Written {
        let state = &self.shared.stages.states[index];
        let prefix = state::base_prefix(&self.shared, state, &evaluated.platform);
        match (&state.origin, &state.image) {
            (Origin::Image(reference), Some(image)) if !image.diff_ids.is_empty() => {
                let name = format!("{prefix}FROM {}", reference.with_digest(image.digest.clone()));
                let op = Op::Image { diff_ids: image.diff_ids.clone() };
                Written { root: self.graph.add(op, Vec::new(), source_label(name, &state.code)), history: Vec::new() }
            }
            (Origin::Files(name), _) => self.files_as_root(name, &prefix, &state.code),
            _ => {
                let label = Label { name: format!("{prefix}FROM scratch"), ..Label::default() };
                Written { root: self.graph.add(Op::Scratch, Vec::new(), label), history: Vec::new() }
            }
        }
    }

    /// The files of a named context as a root of its own.
    fn files_as_root(&mut self, name: &str, prefix: &str, code: &Code) -> Written {
        let (context, selection) = whole(name);
        let files = self.input(&Input::Files(context, selection));
        let scratch =
            self.graph.add(Op::Scratch, Vec::new(), Label { name: "FROM scratch".to_owned(), ..Label::default() });
        let copy = Copy {
            sources: vec![CopySource::Path { input: 1, path: String::new(), pivot: None }],
            destination: "/".to_owned(),
            owner: None,
            mode: None,
            parents: false,
            exclude: Vec::new(),
            unpack: Unpack::Never,
        };
        let label = source_label(format!("{prefix}FROM {name}"), code);
        let root = self.graph.add(Op::Copy(copy), vec![scratch, files], label);
        let line = PlannedHistory { created_by: format!("FROM {name}"), layer: Some(root.clone()) };
        Written { root, history: vec![line] }
    }

    fn work(&mut self, root: &NodeId, work: Work, inputs: &[Input], label: Label) -> NodeId {
        let op = match work {
            Work::Run(run) => Op::Run(run),
            Work::Mkdir(mkdir) => Op::Mkdir(mkdir),
            Work::Copy(copy) => Op::Copy(self.with_remote_paths(copy, inputs)),
        };
        let mut nodes = vec![root.clone()];
        for input in inputs {
            nodes.push(self.input(input));
        }
        self.graph.add(op, nodes, label)
    }

    fn with_remote_paths(&self, mut copy: Copy, inputs: &[Input]) -> Copy {
        for source in &mut copy.sources {
            if let CopySource::Path { input, path, .. } = source
                && let Some(Input::Remote(remote)) = inputs.get(*input - 1)
            {
                path.clone_from(&self.answers.remotes[remote].path);
            }
        }
        copy
    }

    fn input(&mut self, input: &Input) -> NodeId {
        let (digest, name) = match input {
            Input::State(index) => {
                return self.states[*index].as_ref().expect("what a step reads is before it in the order").root.clone();
            }
            Input::Files(name, selection) => {
                let label = match name {
                    ContextName::Main => "[internal] load build context".to_owned(),
                    ContextName::Named(name) => format!("[context {name}] load from client"),
                };
                (self.answers.files[&(name.clone(), selection.clone())].clone(), label)
            }
            Input::Remote(remote) => {
                let (Remote::Http { url, .. } | Remote::Git { url, .. }) = remote;
                (self.answers.remotes[remote].digest.clone(), format!("[internal] load {url}"))
            }
        };
        self.graph.add(Op::Files { digest }, Vec::new(), Label { name, ..Label::default() })
    }
}

fn source_label(name: String, code: &Code) -> Label {
    let location = Location { first_line: code.first_line, last_line: code.last_line };
    Label { name, stage: String::new(), location: Some(location) }
}
