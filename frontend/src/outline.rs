//! What a target can be given: build arguments, secrets, agents, caches (`--call=outline`).
//!
//! Read from the tree alone: no image is asked for, so what a base image would add (its variables, its triggers) is not
//! known here, and no plan is made. The JSON form is that of BuildKit's `frontend.outline`.
//!
//! ```text
//! ARG V=1            ─┐ listed if a FROM that the target needs uses it, and what its default uses
//! FROM base:$V AS x   ├─ x and every stage that x is built on or copies from
//! # T is a tag        │  "is a tag": the comment right above, after the name
//! ARG T              ─┘
//! ```

use std::collections::{BTreeMap, BTreeSet};

use forge_solver::graph::Digest;
use forge_solver::graph::image::{ImageConfig, Platform, Reference};
use futures_util::FutureExt as _;
use serde::ser::SerializeStruct as _;
use serde::{Serialize, Serializer};

use crate::diagnostic::Diagnostic;
use crate::expand::Expander;
use crate::instruction::{Argument, Code, Dockerfile, Instruction, Kind, MountFlag};
use crate::plan::scope::{self, Variables};
use crate::plan::stage::{Origin, Stages, State};
use crate::{BaseImage, ContextName, Remote, RemoteFiles, Request, SourceError, Sources, path, plan};
use forge_solver::graph::Selection;

/// Everything is in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outline {
    /// The target's name; empty for a stage without one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<Arg>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<Secret>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ssh: Vec<Secret>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cache: Vec<Cache>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Arg {
    pub name: String,
    /// From the comment above.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What the request gives, or the default; empty for none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub value: String,
    pub location: Location,
}

/// A `--secret` or an `--ssh`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Secret {
    pub name: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub required: bool,
    pub location: Location,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cache {
    #[serde(rename = "ID")]
    pub id: String,
    pub location: Location,
}

/// A stage that `--target` can name (`--call=targets`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Target {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The last stage: what is built where nothing is named.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub default: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// As written.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub base: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub platform: String,
    pub location: Location,
}

/// Lines of the file, counted from one, both ends included. In JSON a `pb.Location` of BuildKit with one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    pub first_line: usize,
    pub last_line: usize,
}

impl Serialize for Location {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let range = serde_json::json!({"start": {"line": self.first_line}, "end": {"line": self.last_line}});
        let mut location = serializer.serialize_struct("Location", 1)?;
        location.serialize_field("ranges", &[range])?;
        location.end()
    }
}

impl From<&Code> for Location {
    fn from(code: &Code) -> Location {
        Location { first_line: code.first_line, last_line: code.last_line }
    }
}

/// The stages of a file, first to last.
pub fn targets(file: &Dockerfile) -> Vec<Target> {
    let last = file.stages.len().saturating_sub(1);
    let target = |(index, stage): (usize, &crate::instruction::Stage)| {
        let name = stage.name().unwrap_or_default();
        Target {
            description: description(&stage.code, &name),
            default: index == last,
            base: stage.base.text.clone(),
            platform: stage.platform.as_ref().map(|word| word.text.clone()).unwrap_or_default(),
            location: Location::from(&stage.code),
            name,
        }
    };
    file.stages.iter().enumerate().map(target).collect()
}

/// What the request's target can be given.
///
/// A file with parse errors should not be asked; what is wrong with its stages is said here as by [`plan`](fn@crate::plan).
pub fn outline(file: &Dockerfile, request: &Request) -> Result<Outline, Vec<Diagnostic>> {
    let platform = request.platforms.first().unwrap_or(&request.build_platform);
    let arguments = scope::platform_arguments(
        &request.build_platform,
        platform,
        &plan::target_name(file, request),
        &request.build_args,
    );
    let globals = scope::globals(file, arguments, &request.build_args).map_err(|error| vec![error])?;
    let mut stages = Stages::new(file, request, platform, &globals, &mut Vec::new())?;
    let target = stages.target()?;
    let order = stages.resolve(&[target], &NoImages).now_or_never().expect("constants are there at once")?;
    let reader = Reader { file, request, globals: &globals, expander: Expander::new(file.directives.escape) };
    let declared = reader.globals();
    let mut outline = Outline::default();
    let mut read: BTreeMap<usize, Seen> = BTreeMap::new();
    for index in order {
        let state = &stages.states[index];
        let parent = match state.origin {
            Origin::State(parent) => read.get(&parent),
            _ => None,
        };
        let mut seen = parent.cloned().unwrap_or_else(|| Seen { declared: declared.clone(), ..Seen::default() });
        reader.stage(state, &mut seen, &mut outline);
        read.insert(index, seen);
    }
    // The target's own word on an argument comes first, then that of the stages that it needs, nearest first.
    let mut args: BTreeMap<&String, &Declared> = BTreeMap::new();
    for seen in read.get(&target).into_iter().chain(read.values().rev()) {
        for name in &seen.used {
            if let Some(declared) = seen.declared.get(name) {
                args.entry(name).or_insert(declared);
            }
        }
    }
    outline.args = args.values().map(|declared| declared.arg.clone()).collect();
    let stage = stages.states[target].stage.and_then(|stage| stage.name().map(|name| (name, &stage.code)));
    if let Some((name, code)) = stage {
        outline.description = description(code, &name);
        outline.name = name;
    }
    outline.sort();
    Ok(outline)
}

impl Outline {
    fn sort(&mut self) {
        self.args.sort_by_key(|arg| arg.location);
        for secrets in [&mut self.secrets, &mut self.ssh] {
            secrets.sort_by_key(|secret| secret.location);
        }
        self.cache.sort_by_key(|cache| cache.location);
    }
}

/// `# name the rest`, right above.
fn description(code: &Code, name: &str) -> String {
    let rest = |comment: &String| comment.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned);
    if name.is_empty() { String::new() } else { code.comments.iter().find_map(rest).unwrap_or_default() }
}

/// An `ARG` and the names that its default uses.
#[derive(Clone)]
struct Declared {
    arg: Arg,
    needs: BTreeSet<String>,
}

/// What a stage has declared by its end.
#[derive(Clone, Default)]
struct Seen {
    variables: Variables,
    declared: BTreeMap<String, Declared>,
    used: BTreeSet<String>,
}

impl Seen {
    /// A name, and all that its default needs.
    fn mark(&mut self, name: &str) {
        let mut open = vec![name.to_owned()];
        while let Some(name) = open.pop() {
            let needs = self.declared.get(&name).map(|declared| declared.needs.clone()).unwrap_or_default();
            if self.used.insert(name) {
                open.extend(needs);
            }
        }
    }
}

struct Reader<'a> {
    file: &'a Dockerfile,
    request: &'a Request,
    globals: &'a Variables,
    expander: Expander,
}

impl Reader<'_> {
    /// What the `ARG`s before the first `FROM` declare; of several by one name the last, which may need the one before.
    fn globals(&self) -> BTreeMap<String, Declared> {
        let mut declared: BTreeMap<String, Declared> = BTreeMap::new();
        let mut variables: Variables = self.globals.iter().filter(|(name, _)| !self.is_global(name)).cloned().collect();
        for instruction in &self.file.globals {
            let Kind::Arg(arguments) = &instruction.kind else { continue };
            for argument in arguments {
                let mut new = self.declare(argument, &instruction.code, &variables);
                if new.needs.remove(&argument.key.text)
                    && let Some(old) = declared.get(&argument.key.text)
                {
                    new.needs.extend(old.needs.iter().cloned());
                }
                if self.given(argument).is_some() || argument.value.is_some() {
                    scope::set(&mut variables, &argument.key.text, &new.arg.value);
                }
                declared.insert(argument.key.text.clone(), new);
            }
        }
        declared
    }

    fn is_global(&self, name: &str) -> bool {
        let arguments = self.file.globals.iter().filter_map(|instruction| match &instruction.kind {
            Kind::Arg(arguments) => Some(arguments),
            _ => None,
        });
        arguments.flatten().any(|argument| argument.key.text == name)
    }

    fn given(&self, argument: &Argument) -> Option<&String> {
        self.request.build_args.get(&argument.key.text)
    }

    fn declare(&self, argument: &Argument, code: &Code, variables: &Variables) -> Declared {
        let name = &argument.key.text;
        let (value, needs) = match (self.given(argument), &argument.value) {
            (Some(given), _) => (given.clone(), BTreeSet::new()),
            (None, Some(default)) => match self.expander.expand(&default.text, variables.as_slice()) {
                Ok(expansion) => (expansion.text, expansion.used),
                Err(_) => (default.text.clone(), BTreeSet::new()),
            },
            (None, None) => (String::new(), BTreeSet::new()),
        };
        let arg = Arg { name: name.clone(), description: description(code, name), value, location: code.into() };
        Declared { arg, needs }
    }

    fn stage(&self, state: &State<'_>, seen: &mut Seen, outline: &mut Outline) {
        if let Some(stage) = state.stage {
            for word in std::iter::once(&stage.base).chain(&stage.platform) {
                let used = self.expander.expand(&word.text, self.globals.as_slice()).map(|expansion| expansion.used);
                used.unwrap_or_default().iter().for_each(|name| seen.mark(name));
            }
        }
        for (_, instruction) in state.instructions() {
            self.instruction(instruction, seen, outline);
        }
    }

    fn instruction(&self, instruction: &Instruction, seen: &mut Seen, outline: &mut Outline) {
        match &instruction.kind {
            Kind::Arg(arguments) => arguments.iter().for_each(|argument| self.argument(argument, instruction, seen)),
            Kind::Env(pairs) => {
                let expand = |text: &str| self.expand(text, &seen.variables);
                let pairs: Vec<_> =
                    pairs.iter().map(|pair| (expand(&pair.key.text), expand(&pair.value.text))).collect();
                pairs.iter().for_each(|(name, value)| scope::set(&mut seen.variables, name, value));
            }
            Kind::Run(run) => {
                for mount in &run.mounts {
                    self.mount(mount, Location::from(&instruction.code), &seen.variables, outline);
                }
            }
            _ => {}
        }
    }

    fn argument(&self, argument: &Argument, instruction: &Instruction, seen: &mut Seen) {
        let name = &argument.key.text;
        let global = self.globals.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        let own = self.given(argument).is_some() || argument.value.is_some();
        match global.filter(|_| !own) {
            // Inherited: the global declaration says what it is.
            Some(value) => scope::set(&mut seen.variables, name, value),
            None => {
                let declared = self.declare(argument, &instruction.code, &seen.variables);
                if own {
                    scope::set(&mut seen.variables, name, &declared.arg.value);
                }
                seen.declared.insert(name.clone(), declared);
            }
        }
        seen.mark(name);
    }

    fn mount(&self, mount: &MountFlag, location: Location, variables: &Variables, outline: &mut Outline) {
        let find = |keys: &[&str]| {
            let field = mount.fields.iter().rev().find(|(key, _)| keys.contains(&key.as_str()));
            field.map(|(_, value)| value.as_ref().map_or_else(|| "true".to_owned(), |v| self.expand(v, variables)))
        };
        let name = |keys: &[&str]| find(keys).filter(|value| !value.is_empty());
        let target = || name(&["target", "dst", "destination"]).unwrap_or_default();
        let required = find(&["required"]).is_some_and(|value| plan::parse_bool(&value) == Some(true));
        let kind = find(&["type"]).unwrap_or_default().to_lowercase();
        let (list, name) = match kind.as_str() {
            "secret" => {
                let id = name(&["source", "src"]).or_else(|| name(&["id"]));
                (&mut outline.secrets, id.unwrap_or_else(|| path::base(&target()).to_owned()))
            }
            "ssh" => (&mut outline.ssh, name(&["id"]).unwrap_or_else(|| "default".to_owned())),
            "cache" => {
                let id = name(&["id"]).unwrap_or_else(|| path::clean(&target()));
                if !outline.cache.iter().any(|known| known.id == id) {
                    outline.cache.push(Cache { id, location });
                }
                return;
            }
            _ => return,
        };
        if !list.iter().any(|known| known.name == name) {
            list.push(Secret { name, required, location });
        }
    }

    /// A word with its variables replaced, or as it is where that cannot be done.
    fn expand(&self, text: &str, variables: &Variables) -> String {
        self.expander.expand(text, variables.as_slice()).map_or_else(|_| text.to_owned(), |expansion| expansion.text)
    }
}

/// Every image is one that says nothing.
struct NoImages;

impl Sources for NoImages {
    async fn image(&self, name: &Reference, _: &Platform) -> Result<BaseImage, SourceError> {
        Ok(BaseImage { digest: Digest::of(name.to_string()), diff_ids: Vec::new(), config: ImageConfig::default() })
    }

    async fn context(&self, _: &ContextName, _: &Selection) -> Result<Digest, SourceError> {
        Ok(Digest::of(""))
    }

    async fn remote(&self, _: &Remote) -> Result<RemoteFiles, SourceError> {
        Ok(RemoteFiles { digest: Digest::of(""), path: String::new() })
    }
}
