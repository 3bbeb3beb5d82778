//! Which stages there are, what each is built on, and which of them a target needs.
//!
//! A *state* is anything that has a root: a stage of the file, or an image (or named context) that a `COPY --from` or
//! a mount names and that is no stage. States refer to each other by index. Stages that the target does not need are
//! never asked about, but a mistake in their `FROM` is one all the same.

use std::collections::{BTreeMap, HashMap};

use forge_solver::graph::image::{Platform, Reference};
use futures_util::future::join_all;

use super::scope::Variables;
use crate::diagnostic::{Diagnostic, Span, nearest};
use crate::expand::Expander;
use crate::instruction::{Code, Dockerfile, Instruction, Kind, Stage};
use crate::{BaseImage, NamedContext, Request, Sources};

/// What a state starts from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    Scratch,
    State(usize),
    Image(Reference),
    /// A named context that is files.
    Files(String),
}

pub struct State<'a> {
    /// `None`: an image that an instruction names.
    pub stage: Option<&'a Stage>,
    pub code: Code,
    /// The name, or `stage-N`.
    pub name: String,
    pub origin: Origin,
    /// `--platform`.
    pub platform: Option<Platform>,
    /// The base image once it is known.
    pub image: Option<BaseImage>,
    /// ONBUILD instructions that the base brings.
    pub triggers: Vec<Instruction>,
    triggers_known: bool,
    /// A named context stands in for this stage: its instructions are not looked at.
    replaced: bool,
    needs: Vec<(usize, Span)>,
}

impl State<'_> {
    /// The triggers first, then the stage's own.
    pub fn instructions(&self) -> impl Iterator<Item = (bool, &Instruction)> {
        let own = self.stage.filter(|_| !self.replaced).map_or(&[][..], |stage| &stage.instructions);
        self.triggers.iter().map(|trigger| (true, trigger)).chain(own.iter().map(|instruction| (false, instruction)))
    }

    fn onbuild(&self) -> Vec<String> {
        let sources = self.instructions().filter_map(|(_, instruction)| match &instruction.kind {
            Kind::Onbuild(onbuild) => Some(onbuild.source.clone()),
            _ => None,
        });
        sources.collect()
    }
}

pub struct Stages<'a> {
    pub states: Vec<State<'a>>,
    /// Lower-case stage names; of two equal ones the later.
    names: HashMap<String, usize>,
    /// Images by name as written: tags have a case.
    externals: HashMap<String, usize>,
    /// How many of the states are stages.
    stages: usize,
    request: &'a Request,
    target_platform: Platform,
    expander: Expander,
}

type Result<T, E = Vec<Diagnostic>> = std::result::Result<T, E>;

impl<'a> Stages<'a> {
    pub fn new(
        file: &'a Dockerfile,
        request: &'a Request,
        target_platform: &Platform,
        globals: &Variables,
        warnings: &mut Vec<Diagnostic>,
    ) -> Result<Stages<'a>> {
        let mut stages = Stages {
            states: Vec::new(),
            names: HashMap::new(),
            externals: HashMap::new(),
            stages: file.stages.len(),
            request,
            target_platform: target_platform.clone(),
            expander: Expander::new(file.directives.escape),
        };
        let mut errors = Vec::new();
        for (index, stage) in file.stages.iter().enumerate() {
            let from = From { file, globals, stage };
            match stages.stage(index, &from, warnings) {
                Ok(state) => stages.states.push(state),
                Err(error) => {
                    errors.push(error);
                    stages.states.push(state(Some(stage), stage.code.clone(), String::new(), Origin::Scratch));
                }
            }
            if let Some(name) = stage.name() {
                stages.names.insert(name, index);
            }
        }
        for index in 0..stages.stages {
            stages.link(index, &mut errors);
        }
        if errors.is_empty() {
            stages.refuse_cycles()?;
        }
        if errors.is_empty() { Ok(stages) } else { Err(errors) }
    }

    fn stage(
        &self,
        index: usize,
        from: &From<'a, '_>,
        warnings: &mut Vec<Diagnostic>,
    ) -> Result<State<'a>, Diagnostic> {
        let stage = from.stage;
        let base = from.expand(&stage.base, warnings)?;
        if base.is_empty() {
            let message = format!("base name ({}) should not be blank", stage.base.text);
            return Err(Diagnostic::error(stage.base.span, message)
                .hint("give its ARG a default before the first FROM, or use --build-arg"));
        }
        let platform = match &stage.platform {
            None => None,
            Some(word) => Some(from.platform(word, warnings)?),
        };
        let name = stage.name().unwrap_or_else(|| format!("stage-{index}"));
        let mut made = state(Some(stage), stage.code.clone(), name, Origin::Scratch);
        made.platform = platform;
        let own = stage.name().and_then(|name| self.named_context(&name, made.platform.as_ref()));
        made.replaced = own.is_some();
        made.origin = match own {
            Some(origin) => origin,
            // As written: stage names are lower case, so `FROM Base` means an image.
            None => match self.names.get(&base) {
                Some(parent) => Origin::State(*parent),
                None => self.origin(&base, made.platform.as_ref(), stage.base.span)?,
            },
        };
        Ok(made)
    }

    /// What a name that is no stage stands for.
    fn origin(&self, name: &str, platform: Option<&Platform>, span: Span) -> Result<Origin, Diagnostic> {
        if name == "scratch" {
            return Ok(Origin::Scratch);
        }
        if let Some(origin) = self.named_context(name, platform) {
            return Ok(origin);
        }
        let reference: Reference = name.parse().map_err(|error| {
            let diagnostic = Diagnostic::error(span, format!("{error}"));
            match self.near_stage(name) {
                Some(near) => diagnostic.hint(format!("did you mean the stage `{near}`?")),
                None => diagnostic.hint("name a stage above, an image, or `scratch`"),
            }
        })?;
        let familiar = reference.familiar();
        let familiar = familiar.strip_suffix(":latest").unwrap_or(&familiar);
        Ok(self.named_context(familiar, platform).unwrap_or(Origin::Image(reference)))
    }

    fn named_context(&self, name: &str, platform: Option<&Platform>) -> Option<Origin> {
        if name.eq_ignore_ascii_case("scratch") || name.eq_ignore_ascii_case("context") {
            return None;
        }
        let platform = platform.unwrap_or(&self.target_platform);
        let keys = [format!("{name}::{platform}"), name.to_owned()];
        let key = keys.into_iter().find(|key| self.request.contexts.contains_key(key))?;
        Some(match &self.request.contexts[&key] {
            NamedContext::Image(reference) => Origin::Image(reference.clone()),
            NamedContext::Files => Origin::Files(key),
        })
    }

    fn near_stage(&self, name: &str) -> Option<&str> {
        nearest(name, self.names.keys().map(String::as_str))
    }

    /// The state that `--from` or `from=` names; `numbers` says whether stages count by number too.
    pub fn find(&self, name: &str, numbers: bool) -> Option<usize> {
        let by_number = || name.parse().ok().filter(|index| numbers && *index < self.stages);
        by_number().or_else(|| self.names.get(&name.to_lowercase()).or_else(|| self.externals.get(name)).copied())
    }

    /// Whether a state can be read by another: an image and what a named context replaced can always, a stage when it is above.
    pub fn readable(&self, found: usize, from: usize) -> bool {
        let state = &self.states[found];
        found < from || state.stage.is_none() || state.replaced
    }

    /// Finds what the instructions of a state name, making states for what is no stage.
    fn link(&mut self, index: usize, errors: &mut Vec<Diagnostic>) {
        let mut wanted: Vec<(String, bool, Span, Code)> = Vec::new();
        for (_, instruction) in self.states[index].instructions() {
            match &instruction.kind {
                Kind::Copy(copy) => {
                    let from = copy.from.iter();
                    wanted.extend(from.map(|from| (from.text.clone(), true, from.span, instruction.code.clone())));
                }
                Kind::Run(run) => {
                    for (from, mount) in run.mounts.iter().filter_map(|mount| Some((mount.from()?, mount))) {
                        wanted.push((from.to_owned(), false, mount.span, instruction.code.clone()));
                    }
                }
                _ => {}
            }
        }
        let mut needs = match self.states[index].origin {
            Origin::State(parent) => vec![(parent, self.states[index].code.span)],
            _ => Vec::new(),
        };
        for (name, numbers, span, code) in wanted {
            match self.find_or_add(&name, numbers, span, code) {
                Ok(found) => needs.push((found, span)),
                Err(error) => errors.push(error),
            }
        }
        self.states[index].needs = needs;
    }

    fn find_or_add(&mut self, name: &str, numbers: bool, span: Span, code: Code) -> Result<usize, Diagnostic> {
        if let Some(found) = self.find(name, numbers) {
            return Ok(found);
        }
        if numbers && name.parse::<i64>().is_ok() {
            let message = format!("invalid stage index {name}");
            let hint = format!("there are {} stages, counted from 0", self.stages);
            return Err(Diagnostic::error(span, message).hint(hint));
        }
        if numbers && self.expander.expand(name, &[][..]).map_or(true, |expansion| expansion.text != name) {
            return Err(Diagnostic::error(span, "variable expansion is not supported for --from")
                .hint("define a stage `FROM $image AS name` and copy from that name"));
        }
        let origin = self.origin(name, None, span)?;
        self.states.push(state(None, Code { span, ..code }, name.to_owned(), origin));
        self.externals.insert(name.to_owned(), self.states.len() - 1);
        Ok(self.states.len() - 1)
    }

    fn refuse_cycles(&self) -> Result<()> {
        // 0: not seen, 1: on the path, 2: done. The stack holds (state, next need).
        let mut seen = vec![0u8; self.states.len()];
        for first in 0..self.states.len() {
            let mut path = vec![(first, 0)];
            if seen[first] == 0 {
                seen[first] = 1;
            } else {
                continue;
            }
            while let Some((at, next)) = path.last_mut() {
                let Some(&(need, span)) = self.states[*at].needs.get(*next) else {
                    seen[*at] = 2;
                    path.pop();
                    continue;
                };
                *next += 1;
                match seen[need] {
                    0 => {
                        seen[need] = 1;
                        path.push((need, 0));
                    }
                    1 => return Err(vec![self.cycle(&path, need, span)]),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn cycle(&self, path: &[(usize, usize)], back: usize, span: Span) -> Diagnostic {
        let start = path.iter().position(|(state, _)| *state == back).unwrap_or(0);
        let mut names: Vec<&str> = path[start..].iter().map(|(state, _)| self.states[*state].name.as_str()).collect();
        names.push(&self.states[back].name);
        let message = format!("circular dependency detected on stage {}", self.states[back].name);
        Diagnostic::error(span, message).hint(format!("{}: break the circle", names.join(" needs ")))
    }

    /// The stage to build: the last, or the one that was asked for.
    pub fn target(&self) -> Result<usize> {
        let Some(name) = super::target(self.request) else {
            return self.stages.checked_sub(1).ok_or_else(|| vec![no_stages()]);
        };
        self.names.get(&name.to_lowercase()).copied().ok_or_else(|| {
            let last = self.states.get(self.stages.saturating_sub(1)).map(|state| state.code.span).unwrap_or_default();
            let diagnostic = Diagnostic::error(last, format!("target stage {name:?} could not be found"));
            let mut names: Vec<&str> = self.names.keys().map(String::as_str).collect();
            names.sort_unstable();
            vec![match (self.near_stage(name), names.is_empty()) {
                (Some(near), _) => diagnostic.hint(format!("did you mean `{near}`?")),
                (None, true) => diagnostic.hint("no stage has a name: write `FROM image AS name`"),
                (None, false) => diagnostic.hint(format!("the stages are {}", names.join(", "))),
            }]
        })
    }

    /// The wanted states and what they need, each after all that it needs itself.
    fn order(&self, wanted: &[usize]) -> Vec<usize> {
        let mut order = Vec::new();
        let mut seen = vec![false; self.states.len()];
        for &first in wanted {
            if std::mem::replace(&mut seen[first], true) {
                continue;
            }
            let mut path = vec![(first, 0)];
            while let Some((at, next)) = path.last_mut() {
                match self.states[*at].needs.get(*next) {
                    Some(&(need, _)) => {
                        *next += 1;
                        if !std::mem::replace(&mut seen[need], true) {
                            path.push((need, 0));
                        }
                    }
                    None => {
                        order.push(*at);
                        path.pop();
                    }
                }
            }
        }
        order
    }

    /// Asks for the images that the wanted states need, all at once, and again for what their ONBUILD triggers add.
    /// Gives the states in the order in which they can be evaluated.
    pub async fn resolve(&mut self, wanted: &[usize], sources: &impl Sources) -> Result<Vec<usize>> {
        loop {
            let order = self.order(wanted);
            self.ask_for_images(&order, sources).await?;
            let mut errors = Vec::new();
            let mut added = false;
            for index in order.iter().copied() {
                if !self.states[index].triggers_known {
                    added |= self.add_triggers(index, &mut errors);
                }
            }
            if !errors.is_empty() {
                return Err(errors);
            }
            if !added {
                return Ok(order);
            }
            self.refuse_cycles()?;
        }
    }

    async fn ask_for_images(&mut self, order: &[usize], sources: &impl Sources) -> Result<()> {
        let mut questions: BTreeMap<(Reference, Platform), Vec<usize>> = BTreeMap::new();
        for &index in order {
            let state = &self.states[index];
            if let (Origin::Image(reference), None) = (&state.origin, &state.image) {
                let platform = state.platform.clone().unwrap_or_else(|| self.target_platform.clone());
                questions.entry((reference.clone(), platform)).or_default().push(index);
            }
        }
        let answers = join_all(questions.keys().map(|(name, platform)| sources.image(name, platform))).await;
        let mut errors = Vec::new();
        for (((name, _), states), answer) in questions.iter().zip(answers) {
            match answer {
                Ok(image) => states.iter().for_each(|index| self.states[*index].image = Some(image.clone())),
                Err(error) => {
                    let place = self.states[states[0]].stage.map_or(self.states[states[0]].code.span, |s| s.base.span);
                    let diagnostic = Diagnostic::error(place, format!("{}: {}", name.familiar(), error.message));
                    let short = name.familiar();
                    let near = self.near_stage(short.strip_suffix(":latest").unwrap_or(&short));
                    let hint = near.map(|near| format!("did you mean the stage `{near}`?")).or(error.hint);
                    errors.push(Diagnostic { hint, ..diagnostic });
                }
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// Says whether there were any.
    fn add_triggers(&mut self, index: usize, errors: &mut Vec<Diagnostic>) -> bool {
        self.states[index].triggers_known = true;
        if self.states[index].stage.is_none() || self.states[index].replaced {
            return false;
        }
        let sources = match (&self.states[index].origin, &self.states[index].image) {
            (Origin::State(parent), _) => self.states[*parent].onbuild(),
            (_, Some(image)) => image.config.config.on_build.clone(),
            _ => Vec::new(),
        };
        let code = self.states[index].code.clone();
        for source in &sources {
            match crate::parse::parse_trigger(source, &code) {
                Ok(trigger) => self.states[index].triggers.push(trigger),
                Err(found) => errors.extend(found),
            }
        }
        self.link(index, errors);
        !sources.is_empty()
    }
}

fn state(stage: Option<&Stage>, code: Code, name: String, origin: Origin) -> State<'_> {
    State {
        stage,
        code,
        name,
        origin,
        platform: None,
        image: None,
        triggers: Vec::new(),
        triggers_known: false,
        replaced: false,
        needs: Vec::new(),
    }
}

fn no_stages() -> Diagnostic {
    Diagnostic::error(Span::default(), "the file has no FROM")
}

/// A `FROM` line and the scope that it is read in.
struct From<'a, 'b> {
    file: &'a Dockerfile,
    globals: &'b Variables,
    stage: &'a Stage,
}

impl From<'_, '_> {
    fn expand(&self, word: &crate::instruction::Word, warnings: &mut Vec<Diagnostic>) -> Result<String, Diagnostic> {
        let expander = Expander::new(self.file.directives.escape);
        let expansion = expander
            .expand(&word.text, self.globals.as_slice())
            .map_err(|error| Diagnostic::error(word.span, error.to_string()))?;
        let declared = || {
            self.file.globals.iter().flat_map(|instruction| match &instruction.kind {
                Kind::Arg(arguments) => arguments.as_slice(),
                _ => &[],
            })
        };
        for name in expansion.unset {
            if declared().any(|argument| argument.key.text == name) {
                continue;
            }
            let known = declared().map(|argument| argument.key.text.as_str());
            let near = nearest(&name, known.chain(self.globals.iter().map(|(key, _)| key.as_str())));
            let mut message = format!("FROM argument '{name}' is not declared");
            if let Some(near) = near {
                message.push_str(&format!(" (did you mean {near}?)"));
            }
            let comments = &self.stage.code.comments;
            warnings.extend(self.file.check.finding("UndefinedArgInFrom", comments, word.span, message));
        }
        Ok(expansion.text)
    }

    fn platform(
        &self,
        word: &crate::instruction::Word,
        warnings: &mut Vec<Diagnostic>,
    ) -> Result<Platform, Diagnostic> {
        let text = self.expand(word, warnings)?;
        if text.is_empty() {
            let message = format!("empty platform value from expression {}", word.text);
            return Err(Diagnostic::error(word.span, message));
        }
        text.parse().map_err(|error| Diagnostic::error(word.span, format!("{error}")))
    }
}
