//! The tree to a [`Plan`]: which stages are needed, what they consist of, and the graph of it.
//!
//! ```text
//! for each platform:  global ARGs ─> stages and what they need ─> base images (asked together) ─> evaluate each stage
//! then for all:       contexts and remotes (asked together) ─> nodes, labels, history
//! ```
//! A stage that the target does not need is never evaluated and nothing is asked for it.

mod config;
mod copy;
mod git;
mod mount;
mod run;
pub(crate) mod scope;
pub(crate) mod stage;
mod state;
mod text;
mod write;

use std::cell::Cell;
use std::collections::BTreeSet;

use forge_solver::graph::image::Platform;
use futures_util::future::join_all;

use crate::diagnostic::{Diagnostic, Span};
use crate::instruction::{Dockerfile, Kind};
use crate::{Plan, Request, Sources};
use scope::Variables;
use stage::{Origin, Stages};
use state::{Evaluated, Shared};

/// Decides all that a build will do; asks [`Sources`] for every digest it needs, together where it can.
///
/// Warnings come back in [`Plan::warnings`]; any error means that there is no plan.
pub async fn plan(file: &Dockerfile, request: &Request, sources: &impl Sources) -> Result<Plan, Vec<Diagnostic>> {
    let (platforms, found) = evaluate(file, request, sources, Wanted::Target).await;
    let (errors, warnings): (Vec<_>, Vec<_>) = found.into_iter().partition(Diagnostic::is_error);
    if !errors.is_empty() {
        return Err(errors);
    }
    let epoch = match (request.epoch, platforms.first()) {
        (None, Some(platform)) => scope::epoch(file, &platform.globals).map_err(|error| vec![error])?,
        (epoch, _) => epoch,
    };
    let answers = write::Answers::ask(&platforms, sources).await?;
    let (graph, images) = write::plan(file, request, platforms, &answers);
    Ok(Plan { graph, images, epoch, warnings })
}

/// Judges what a build would make of a file; asks for base images, for no files and no remotes.
///
/// Without a target every stage is judged, also those that no build of the last one needs.
pub async fn check(file: &Dockerfile, request: &Request, sources: &impl Sources) -> Vec<Diagnostic> {
    let wanted = match target(request) {
        Some(_) => Wanted::Target,
        None => Wanted::All,
    };
    evaluate(file, request, sources, wanted).await.1
}

/// Which stages are evaluated.
#[derive(Clone, Copy)]
enum Wanted {
    /// The target and what it needs.
    Target,
    All,
}

/// Every platform of the request, as far as that went, and what was found on the way, each thing once.
async fn evaluate<'a>(
    file: &'a Dockerfile,
    request: &'a Request,
    sources: &impl Sources,
    wanted: Wanted,
) -> (Vec<Evaluation<'a>>, Vec<Diagnostic>) {
    let targets = match request.platforms.as_slice() {
        [] => vec![request.build_platform.clone()],
        platforms => platforms.to_vec(),
    };
    let evaluated = join_all(targets.iter().map(|target| one_platform(file, request, target, sources, wanted))).await;
    let mut platforms = Vec::new();
    let mut found = unused_build_args(file, request);
    for result in evaluated {
        let more = match result {
            Ok(mut platform) => {
                let more = std::mem::take(&mut platform.found);
                platforms.push(platform);
                more
            }
            Err(errors) => errors,
        };
        for diagnostic in more {
            if !found.contains(&diagnostic) {
                found.push(diagnostic);
            }
        }
    }
    (platforms, found)
}

fn target(request: &Request) -> Option<&str> {
    request.target.as_deref().filter(|name| !name.is_empty())
}

/// `TARGETSTAGE`: as it was asked for, or the name of the last stage.
pub(crate) fn target_name(file: &Dockerfile, request: &Request) -> String {
    let last = || file.stages.last().and_then(|stage| stage.name()).unwrap_or_default();
    target(request).map_or_else(last, str::to_owned)
}

/// All stages of one platform, evaluated.
pub(crate) struct Evaluation<'a> {
    pub globals: Variables,
    pub target_platform: Platform,
    pub stages: Stages<'a>,
    pub target: usize,
    /// Needs before what needs them.
    pub order: Vec<usize>,
    /// By state; `None` where the target does not need it.
    pub evaluated: Vec<Option<Evaluated>>,
    /// Warnings and errors.
    pub found: Vec<Diagnostic>,
}

async fn one_platform<'a>(
    file: &'a Dockerfile,
    request: &'a Request,
    target_platform: &Platform,
    sources: &impl Sources,
    wanted: Wanted,
) -> Result<Evaluation<'a>, Vec<Diagnostic>> {
    let name = target_name(file, request);
    let arguments = scope::platform_arguments(&request.build_platform, target_platform, &name, &request.build_args);
    let globals = scope::globals(file, arguments, &request.build_args).map_err(|error| vec![error])?;
    let mut found = Vec::new();
    let mut stages = Stages::new(file, request, target_platform, &globals, &mut found)?;
    let target = stages.target()?;
    let order = match wanted {
        Wanted::Target => stages.resolve(&[target], sources).await?,
        Wanted::All => stages.resolve(&(0..file.stages.len()).collect::<Vec<_>>(), sources).await?,
    };
    let mut evaluation = Evaluation {
        globals,
        target_platform: target_platform.clone(),
        evaluated: vec![None; stages.states.len()],
        stages,
        target,
        order,
        found,
    };
    evaluation.evaluate(file, request);
    Ok(evaluation)
}

impl<'a> Evaluation<'a> {
    fn evaluate(&mut self, file: &'a Dockerfile, request: &'a Request) {
        let mut evaluated = std::mem::take(&mut self.evaluated);
        let mut found = Vec::new();
        let shared = self.shared(file, request);
        for &index in &self.order {
            let parent = match shared.stages.states[index].origin {
                // A parent that failed has said why.
                Origin::State(parent) if evaluated[parent].is_none() => continue,
                Origin::State(parent) => evaluated[parent].as_ref(),
                _ => None,
            };
            match state::evaluate(&shared, index, parent) {
                Ok((done, warnings)) => {
                    evaluated[index] = Some(done);
                    found.extend(warnings);
                }
                Err(errors) => found.extend(errors),
            }
        }
        self.evaluated = evaluated;
        self.found.extend(found);
    }

    /// Whether a state is wanted as a whole: of a named context that is files, steps read just what they name.
    pub(crate) fn is_root(&self, index: usize) -> bool {
        let states = &self.stages.states;
        let files = matches!(states[index].origin, Origin::Files(_)) && states[index].instructions().next().is_none();
        !files || index == self.target || self.order.iter().any(|child| states[*child].origin == Origin::State(index))
    }

    pub(crate) fn shared<'b>(&'b self, file: &'b Dockerfile, request: &'b Request) -> Shared<'b>
    where
        'a: 'b,
    {
        Shared {
            file,
            request,
            stages: &self.stages,
            globals: &self.globals,
            target_platform: &self.target_platform,
            implicit: request.platforms.is_empty(),
            multi: request.platforms.len() > 1,
            ignored: copy::ignored(&request.ignore),
            held_bytes: Cell::new(0),
        }
    }
}

/// `--build-arg`s that nothing in the file declares.
fn unused_build_args(file: &Dockerfile, request: &Request) -> Vec<Diagnostic> {
    let mut known: BTreeSet<&str> = BTreeSet::new();
    let stages = file.stages.iter().flat_map(|stage| &stage.instructions);
    for instruction in file.globals.iter().chain(stages) {
        if let Kind::Arg(arguments) = &instruction.kind {
            known.extend(arguments.iter().map(|argument| argument.key.text.as_str()));
        }
    }
    let built_in = |name: &str| {
        let platform = name.strip_prefix("BUILD").or_else(|| name.strip_prefix("TARGET"));
        name.starts_with("BUILDKIT_")
            || name == "SOURCE_DATE_EPOCH"
            || run::PROXIES.contains(&name.to_uppercase().as_str())
            || platform
                .is_some_and(|rest| matches!(rest, "PLATFORM" | "OS" | "OSVERSION" | "ARCH" | "VARIANT" | "STAGE"))
    };
    let unused = request.build_args.keys().filter(|name| !known.contains(name.as_str()) && !built_in(name));
    let unused: Vec<&str> = unused.map(String::as_str).collect();
    if unused.is_empty() {
        return Vec::new();
    }
    let message = format!("[Warning] One or more build-args [{}] were not consumed", unused.join(" "));
    let warning = Diagnostic::warning(Span::default(), message);
    let near = unused.iter().find_map(|name| crate::diagnostic::nearest(name, known.iter().copied()));
    vec![match near {
        Some(near) => warning.hint(format!("did you mean `{near}`?")),
        None => warning.hint("declare them with ARG in the stage that uses them"),
    }]
}

/// What Go's `strconv.ParseBool` takes.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}
