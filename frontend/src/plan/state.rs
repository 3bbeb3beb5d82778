//! One stage, instruction by instruction: what its image will say and what is to be done.
//!
//! Nothing is asked and no node is made here: a [`Step`] names what it reads ([`Input`]), and when all stages are
//! evaluated everything is asked for at once and the graph is written.

use std::cell::Cell;

use forge_solver::graph::image::{ImageConfig, Platform};
use forge_solver::graph::{Copy, Label, Location, Mkdir, Run, Selection};
use forge_solver::pattern::Patterns;

use super::scope::{Variables, set};
use super::stage::{Origin, Stages, State};
use super::{config, copy, run};
use crate::diagnostic::{Diagnostic, Span, nearest};
use crate::expand::Expander;
use crate::instruction::{Code, Dockerfile, Instruction, Kind, Word};
use crate::{BaseImage, ContextName, Remote, Request};

pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// `ARG`s that are settings of the builder and enter no environment.
const SETTINGS: [&str; 2] = ["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

/// What a step reads besides the root that it changes.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    State(usize),
    Files(ContextName, Selection),
    Remote(Remote),
}

#[derive(Clone, Debug)]
pub enum Work {
    Run(Box<Run>),
    Copy(Copy),
    Mkdir(Mkdir),
}

/// An instruction's part in the plan: a line of history, and work where it changes files.
#[derive(Clone, Debug)]
pub struct Step {
    pub history: String,
    pub span: Span,
    pub work: Option<(Work, Vec<Input>, Label)>,
}

/// A stage after its last instruction.
#[derive(Clone, Debug)]
pub struct Evaluated {
    pub config: ImageConfig,
    pub platform: Platform,
    pub base: Option<BaseImage>,
    /// Environment and arguments: what RUN gets and words expand by.
    pub scope: Variables,
    /// The declared arguments, for RUN's history.
    pub arguments: Vec<(String, Option<String>)>,
    /// Its own; those of the stage below are there.
    pub steps: Vec<Step>,
    workdir_set: bool,
}

/// What all states of one platform share.
pub struct Shared<'a> {
    pub file: &'a Dockerfile,
    pub request: &'a Request,
    pub stages: &'a Stages<'a>,
    pub globals: &'a Variables,
    pub target_platform: &'a Platform,
    /// No platform was asked for: the base's counts.
    pub implicit: bool,
    /// Labels name the platform.
    pub multi: bool,
    /// What the ignore file leaves out, for a list that takes nothing back.
    pub ignored: Option<Patterns>,
    /// What the steps hold so far.
    pub held_bytes: Cell<usize>,
}

/// Every RUN holds its environment and every line of history its arguments, so a short hostile file could ask for a
/// lot of memory. Real plans stay below a megabyte.
const HELD_BYTES_MAX: usize = 256 << 20;

/// A stage in the making.
pub struct Builder<'a> {
    pub shared: &'a Shared<'a>,
    pub index: usize,
    pub state: &'a State<'a>,
    pub out: Evaluated,
    pub warnings: Vec<Diagnostic>,
    pub onbuild: bool,
    pub cmd_set: bool,
    done: usize,
    total: usize,
}

pub type Result<T, E = Diagnostic> = std::result::Result<T, E>;

/// Evaluates a state whose needs are evaluated already.
pub fn evaluate<'a>(
    shared: &'a Shared<'a>,
    index: usize,
    parent: Option<&Evaluated>,
) -> Result<(Evaluated, Vec<Diagnostic>), Vec<Diagnostic>> {
    let state = &shared.stages.states[index];
    let mut builder = Builder {
        shared,
        index,
        state,
        out: start(shared, state, parent),
        warnings: Vec::new(),
        onbuild: false,
        cmd_set: false,
        done: 0,
        total: steps_total(state),
    };
    if state.stage.is_none() {
        return Ok((builder.out, Vec::new()));
    }
    builder.base_platform();
    // The label of the base counts as a step.
    builder.done = usize::from(base_is_step(state));
    let mut errors = Vec::new();
    for (onbuild, instruction) in state.instructions() {
        builder.onbuild = onbuild;
        if let Err(error) = builder.instruction(instruction) {
            errors.push(error);
        }
        if shared.held_bytes.get() > HELD_BYTES_MAX {
            break;
        }
    }
    if errors.is_empty() { Ok((builder.out, builder.warnings)) } else { Err(errors) }
}

fn start(shared: &Shared<'_>, state: &State<'_>, parent: Option<&Evaluated>) -> Evaluated {
    if let Some(parent) = parent {
        let mut config = parent.config.clone();
        config.config.on_build.clear();
        return Evaluated {
            config,
            platform: parent.platform.clone(),
            base: parent.base.clone(),
            scope: parent.scope.clone(),
            arguments: parent.arguments.clone(),
            steps: Vec::new(),
            workdir_set: parent.workdir_set,
        };
    }
    let mut platform = state.platform.clone().unwrap_or_else(|| shared.target_platform.clone());
    let mut config = match &state.image {
        None => empty_config(&platform),
        Some(image) => base_config(&image.config),
    };
    if state.image.is_some() && state.platform.is_none() && shared.implicit && !config.os.is_empty() {
        platform = config.platform();
    }
    if config.config.env_value("PATH").is_none() {
        config.config.set_env("PATH", DEFAULT_PATH);
    }
    if !config.config.working_dir.is_empty() {
        config.config.working_dir = crate::path::join("/", &config.config.working_dir);
    }
    let mut scope = Variables::new();
    for pair in &config.config.env {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        set(&mut scope, name, value);
    }
    let base = state.image.clone();
    Evaluated { config, platform, base, scope, arguments: Vec::new(), steps: Vec::new(), workdir_set: false }
}

fn empty_config(platform: &Platform) -> ImageConfig {
    let mut config = ImageConfig {
        os: platform.os.clone(),
        architecture: platform.architecture.clone(),
        variant: platform.variant.clone(),
        ..ImageConfig::default()
    };
    config.config.working_dir = "/".to_owned();
    config
}

/// What a stage inherits of an image: what the OCI and Docker specifications know, without what is remade.
fn base_config(image: &ImageConfig) -> ImageConfig {
    let mut config = image.clone();
    config.created = None;
    config.rootfs = Default::default();
    config.history = Vec::new();
    config.config.on_build.clear();
    config.config.other.clear();
    config.other.retain(|key, _| matches!(key.as_str(), "os.version" | "os.features"));
    config
}

/// Whether the base of a state is a step of its own: an image or a named context is, a stage is not.
pub fn base_is_step(state: &State<'_>) -> bool {
    matches!(state.origin, Origin::Image(_) | Origin::Files(_))
}

fn steps_total(state: &State<'_>) -> usize {
    let works = |kind: &Kind| matches!(kind, Kind::Run(_) | Kind::Copy(_) | Kind::Workdir(_));
    usize::from(base_is_step(state)) + state.instructions().filter(|(_, i)| works(&i.kind)).count()
}

impl<'a> Builder<'a> {
    /// The base must be of the stage's platform.
    fn base_platform(&mut self) {
        let (Some(image), Some(stage)) = (&self.state.image, self.state.stage) else { return };
        let (expected, actual) = (&self.out.platform, image.config.platform());
        if (&expected.os, &expected.architecture) != (&actual.os, &actual.architecture) {
            let name = &stage.base.text;
            let message = format!(
                "Base image {name} was pulled with platform \"{actual}\", expected \"{expected}\" for current build"
            );
            let comments = &stage.code.comments;
            let check = &self.shared.file.check;
            self.warnings.extend(check.finding("InvalidBaseImagePlatform", comments, stage.base.span, message));
        }
    }

    fn instruction(&mut self, instruction: &Instruction) -> Result<()> {
        match &instruction.kind {
            Kind::Arg(arguments) => self.arguments(instruction, arguments),
            Kind::Run(line) => run::run(self, instruction, line),
            Kind::Copy(files) => copy::copy(self, instruction, files),
            Kind::Workdir(path) => self.workdir(instruction, path),
            _ => config::instruction(self, instruction),
        }
    }

    pub fn expander(&self) -> Expander {
        Expander::new(self.shared.file.directives.escape)
    }

    /// A word with its variables replaced; those that nobody declared are reported.
    pub fn expand(&mut self, code: &Code, word: &Word) -> Result<String> {
        self.expand_with(code, &word.text, word.span, self.expander())
    }

    pub fn expand_with(&mut self, code: &Code, text: &str, span: Span, expander: Expander) -> Result<String> {
        let expansion = expander
            .expand(text, self.out.scope.as_slice())
            .map_err(|error| Diagnostic::error(span, error.to_string()))?;
        for name in &expansion.unset {
            self.undefined(code, name, span);
        }
        Ok(expansion.text)
    }

    pub fn undefined(&mut self, code: &Code, name: &str, span: Span) {
        let declared = self.out.arguments.iter().any(|(key, _)| key == name);
        if declared || SETTINGS.contains(&name) {
            return;
        }
        let mut message = format!("Usage of undefined variable '${name}'");
        if let Some(near) = nearest(name, self.out.scope.iter().map(|(key, _)| key.as_str())) {
            message.push_str(&format!(" (did you mean ${near}?)"));
        }
        self.lint("UndefinedVar", code, span, message);
    }

    pub fn lint(&mut self, rule: &'static str, code: &Code, span: Span, message: String) {
        let finding = self.shared.file.check.finding(rule, &code.comments, span, message);
        self.warnings.extend(finding);
    }

    /// A line of history without work.
    pub fn note(&mut self, code: &Code, history: String) -> Result<()> {
        self.hold(code, history.len())?;
        self.out.steps.push(Step { history, span: code.span, work: None });
        Ok(())
    }

    pub fn step(
        &mut self,
        code: &Code,
        history: String,
        (work, inputs): (Work, Vec<Input>),
        shown: &str,
    ) -> Result<()> {
        let environment: usize = match &work {
            Work::Run(run) => run.env.iter().map(|(name, value)| name.len() + value.len()).sum(),
            _ => 0,
        };
        self.hold(code, history.len() + shown.len() + environment)?;
        let label = self.label(code, shown);
        self.out.steps.push(Step { history, span: code.span, work: Some((work, inputs, label)) });
        Ok(())
    }

    /// Counts what a step keeps in memory.
    fn hold(&self, code: &Code, bytes: usize) -> Result<()> {
        let held = self.shared.held_bytes.get().saturating_add(bytes);
        self.shared.held_bytes.set(held);
        if held > HELD_BYTES_MAX {
            let message = format!("the plan would hold more than {} MiB", HELD_BYTES_MAX >> 20);
            return Err(Diagnostic::error(code.span, message)
                .hint("the file repeats large values: fewer or shorter ARG, ENV and EXPOSE"));
        }
        Ok(())
    }

    /// `[build 2/5] RUN make`, `[linux/arm64 2/5] ONBUILD RUN make`.
    fn label(&mut self, code: &Code, shown: &str) -> Label {
        self.done += 1;
        let prefix = prefix(self.shared, self.state, &self.out.platform, self.done, self.total);
        let onbuild = if self.onbuild { "ONBUILD " } else { "" };
        Label {
            name: format!("{prefix}{onbuild}{shown}"),
            stage: self.state.name.clone(),
            location: Some(Location { first_line: code.first_line, last_line: code.last_line }),
        }
    }

    /// An instruction as it is shown: its keyword in upper case and its variables replaced.
    pub fn shown(&self, code: &Code, expander: Expander, scope: &Variables) -> String {
        let text = expander.expand(&code.text, scope.as_slice()).map_or_else(|_| code.text.clone(), |done| done.text);
        match text.split_once(' ') {
            Some((keyword, rest)) => format!("{} {rest}", keyword.to_uppercase()),
            None => text.to_uppercase(),
        }
    }

    fn arguments(&mut self, instruction: &Instruction, arguments: &[crate::instruction::Argument]) -> Result<()> {
        let code = &instruction.code;
        let mut history = Vec::new();
        for argument in arguments {
            let name = &argument.key.text;
            let given = self.shared.request.build_args.get(name).cloned();
            let value = match (given, &argument.value) {
                (Some(given), _) => Some(given),
                (None, Some(default)) => Some(self.expand(code, default)?),
                (None, None) => self.shared.globals.iter().find(|(key, _)| key == name).map(|(_, v)| v.clone()),
            };
            if let Some(value) = &value
                && !SETTINGS.contains(&name.as_str())
            {
                set(&mut self.out.scope, name, value);
            }
            history.push(match &value {
                Some(value) => format!("{name}={value}"),
                None => name.clone(),
            });
            self.out.arguments.push((name.clone(), value));
        }
        self.note(code, format!("ARG {}", history.join(" ")))
    }

    fn workdir(&mut self, instruction: &Instruction, word: &Word) -> Result<()> {
        let code = &instruction.code;
        let path = self.expand(code, word)?;
        if !self.out.workdir_set && !path.starts_with('/') {
            let message = format!(
                "Relative workdir {} can have unexpected results if the base image changes",
                super::text::quote(&path)
            );
            self.lint("WorkdirRelativePath", code, word.span, message);
        }
        self.out.workdir_set = true;
        let path = crate::path::join(&self.out.config.config.working_dir, &path);
        self.out.config.config.working_dir.clone_from(&path);
        let history = format!("WORKDIR {path}");
        if path == "/" {
            return self.note(code, history);
        }
        let owner = Some(self.out.config.config.user.as_str()).filter(|user| !user.is_empty()).map(copy::owner);
        let shown = self.shown(code, self.expander(), &self.out.scope);
        self.step(code, history, (Work::Mkdir(Mkdir { path, mode: 0o755, owner }), Vec::new()), &shown)
    }
}

/// `[build 2/5] `, or nothing for a state without steps.
pub fn prefix(shared: &Shared<'_>, state: &State<'_>, platform: &Platform, done: usize, total: usize) -> String {
    if total == 0 {
        return String::new();
    }
    let mut out = String::from("[");
    if shared.multi {
        out.push_str(&platform.to_string());
        if platform.architecture != shared.target_platform.architecture {
            out.push_str(&format!("->{}", shared.target_platform.architecture));
        }
        out.push(' ');
    }
    // A file that is one stage and nothing else needs no names.
    if shared.stages.states.len() > 1 {
        out.push_str(&state.name);
        out.push(' ');
    }
    let width = total.to_string().len();
    out + &format!("{done:>width$}/{total}] ")
}

/// As [`prefix`], of the base's own step.
pub fn base_prefix(shared: &Shared<'_>, state: &State<'_>, platform: &Platform) -> String {
    if state.stage.is_none() { String::new() } else { prefix(shared, state, platform, 1, steps_total(state)) }
}
