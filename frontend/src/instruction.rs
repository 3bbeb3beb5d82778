//! The Dockerfile as a tree: typed instructions, each word with its place in the file.
//!
//! ```text
//! Dockerfile ── globals: ARG…            before the first FROM
//!            └─ stages ── FROM …
//!                      └─ instructions   in order; ONBUILD holds one more
//! ```
//! Words are as written, nothing is expanded: what a variable is depends on the plan. Numbers and names that may hold
//! variables are therefore checked by the plan too; what is wrong whatever the variables are is refused here.

use crate::diagnostic::Span;
use crate::lex::{Directives, Heredoc};
use crate::lint::Check;

/// A piece of text and where it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Word {
    pub text: String,
    pub span: Span,
}

#[derive(Clone, Debug)]
pub struct Dockerfile {
    pub directives: Directives,
    /// `# check=`.
    pub check: Check,
    /// The `ARG`s before the first `FROM`.
    pub globals: Vec<Instruction>,
    pub stages: Vec<Stage>,
}

#[derive(Clone, Debug)]
pub struct Stage {
    /// `FROM` as written.
    pub keyword: Word,
    pub base: Word,
    /// `AS` as written, and the name.
    pub name: Option<(Word, Word)>,
    pub platform: Option<Word>,
    pub code: Code,
    pub instructions: Vec<Instruction>,
}

impl Stage {
    /// Lower case, as stages are matched.
    pub fn name(&self) -> Option<String> {
        self.name.as_ref().map(|(_, name)| name.text.to_lowercase())
    }
}

/// Where an instruction stands and how it reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code {
    /// The instruction with continuations joined, without heredoc bodies.
    pub text: String,
    pub span: Span,
    /// Counted from one, both ends included.
    pub first_line: usize,
    pub last_line: usize,
    /// The comment lines right above, without `#`.
    pub comments: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// As written: `run`, `RUN`.
    pub keyword: Word,
    pub kind: Kind,
    pub code: Code,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Arg(Vec<Argument>),
    Env(Vec<Pair>),
    Label(Vec<Pair>),
    Run(Run),
    Copy(Copy),
    Workdir(Word),
    User(Word),
    Cmd(CommandLine),
    Entrypoint(CommandLine),
    Shell(Vec<String>),
    Expose(Vec<Word>),
    Volume(Vec<Word>),
    StopSignal(Word),
    Healthcheck(Healthcheck),
    Onbuild(Onbuild),
    Maintainer(String),
}

/// `ARG name[=default]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    pub key: Word,
    pub value: Option<Word>,
}

/// `key=value`, or the older `key value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub key: Word,
    pub value: Word,
    pub legacy: bool,
}

/// What RUN, CMD and ENTRYPOINT are given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandLine {
    /// For the shell.
    Shell(Word),
    /// A JSON array.
    Exec(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub command: CommandLine,
    pub heredocs: Vec<Heredoc>,
    pub mounts: Vec<MountFlag>,
    pub network: Option<Word>,
    pub security: Option<Word>,
    pub devices: Vec<Word>,
}

/// `--mount=…` cut into fields; what they mean is known when variables are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountFlag {
    pub span: Span,
    /// Key in lower case, and the value where there is a `=`.
    pub fields: Vec<(String, Option<String>)>,
}

impl MountFlag {
    /// The `from` field; never expanded, so it is known at once.
    pub fn from(&self) -> Option<&str> {
        let from = self.fields.iter().rev().find(|(key, _)| key == "from")?;
        from.1.as_deref().filter(|name| !name.is_empty())
    }
}

/// `COPY` and `ADD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    pub add: bool,
    pub paths: Vec<Word>,
    pub inline: Vec<Inline>,
    pub destination: Word,
    pub from: Option<Word>,
    pub chown: Option<Word>,
    pub chmod: Option<Word>,
    /// Accepted; the result is the same with and without.
    pub link: bool,
    pub parents: bool,
    pub exclude: Vec<String>,
    pub checksum: Option<Word>,
    pub keep_git_dir: Option<bool>,
    pub unpack: Option<bool>,
}

/// A heredoc as a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inline {
    pub name: String,
    pub body: String,
    pub expand: bool,
    pub span: Span,
}

/// Durations in nanoseconds, 0 where none was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Healthcheck {
    pub test: Vec<String>,
    pub interval: i64,
    pub timeout: i64,
    pub start_period: i64,
    pub start_interval: i64,
    pub retries: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Onbuild {
    /// What the image's configuration will say.
    pub source: String,
    /// `None` where it has a mistake: it would only matter to a later build.
    pub instruction: Option<Box<Instruction>>,
}
