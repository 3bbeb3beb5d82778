//! Logical lines to typed instructions.
//!
//! Every instruction is read on its own and a mistake costs just that instruction, so one pass reports them all.

use std::ops::Range;

use crate::diagnostic::{Diagnostic, Span, nearest};
use crate::duration;
use crate::flag::{self, Flags, Known};
use crate::instruction::{
    Argument, Code, CommandLine, Copy, Dockerfile, Healthcheck, Inline, Instruction, Kind, MountFlag, Onbuild, Pair,
    Run, Stage, Word,
};
use crate::lex::{self, Command, Directive, Directives, Json, Lexed, Line};
use crate::lint::{self, Check};

/// What instructions are called.
pub const INSTRUCTIONS: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Reads a Dockerfile; the tree holds what could be understood, the list every problem found.
///
/// A file with an error among the problems is not to be built.
pub fn parse(text: &str) -> (Dockerfile, Vec<Diagnostic>) {
    if let Some(syntax) = lex::other_syntax(text)
        && !is_built_in(&syntax)
    {
        let directives = Directives { escape: '\\', syntax: Some(syntax.clone()), check: None };
        let file = Dockerfile { directives, check: Check::default(), globals: Vec::new(), stages: Vec::new() };
        let message = format!("the file is for the frontend {:?}, which is not built in", syntax.value);
        return (file, vec![Diagnostic::error(syntax.span, message).hint("forge builds Dockerfiles alone")]);
    }
    let Lexed { directives, lines, mut diagnostics } = lex::lex(text);
    let check = Check::from_directive(directives.check.as_ref(), &mut diagnostics);
    let mut file = Dockerfile { directives, check, globals: Vec::new(), stages: Vec::new() };
    for line in &lines {
        let mut parser = Parser { line, escape: file.directives.escape, diagnostics: Vec::new() };
        let parsed = parser.statement(0..line.text.len());
        diagnostics.append(&mut parser.diagnostics);
        match parsed {
            Ok(Statement::Stage(stage)) => file.stages.push(stage),
            Ok(Statement::Instruction(instruction)) => place(&mut file, instruction, &mut diagnostics),
            Err(diagnostic) => diagnostics.push(diagnostic),
        }
    }
    if file.stages.is_empty() && !diagnostics.iter().any(Diagnostic::is_error) {
        let message = if lines.is_empty() { "the file has no instructions" } else { "the file has no FROM" };
        diagnostics.push(
            Diagnostic::error(Span::new(0, 0), message)
                .hint("start with `FROM image`, or `FROM scratch` for an empty one"),
        );
    }
    foreign_syntax(&file, &mut diagnostics);
    lint::file(&file, &lines, &mut diagnostics);
    diagnostics.sort_by_key(|diagnostic| (diagnostic.span, diagnostic.severity));
    (file, diagnostics)
}

/// `# syntax=` names a frontend image; docker's own is this one, of another there is only the name.
fn foreign_syntax(file: &Dockerfile, diagnostics: &mut Vec<Diagnostic>) {
    let Some(syntax) = &file.directives.syntax else { return };
    if !is_built_in(syntax) {
        let image = syntax.value.split(' ').next().unwrap_or_default();
        let message = format!("syntax {image:?} is not built in: the file is read as docker/dockerfile");
        diagnostics.push(Diagnostic::warning(syntax.span, message).hint("write `# syntax=docker/dockerfile:1`"));
    }
}

fn is_built_in(syntax: &Directive) -> bool {
    let image = syntax.value.split(' ').next().unwrap_or_default();
    let name = image.strip_prefix("docker.io/").unwrap_or(image);
    let name = name.split(['@', ':']).next().unwrap_or_default();
    matches!(name, "docker/dockerfile" | "docker/dockerfile-upstream")
}

fn place(file: &mut Dockerfile, instruction: Instruction, diagnostics: &mut Vec<Diagnostic>) {
    match (file.stages.last_mut(), &instruction.kind) {
        (Some(stage), _) => stage.instructions.push(instruction),
        (None, Kind::Arg(_)) => file.globals.push(instruction),
        (None, _) => {
            let keyword = instruction.keyword.text.to_uppercase();
            let message = format!("{keyword} before the first FROM: there is no stage yet");
            diagnostics
                .push(Diagnostic::error(instruction.keyword.span, message).hint("only ARG may stand before FROM"));
        }
    }
}

/// An ONBUILD trigger as an image's configuration holds it; everything in it is said to be at `place`.
pub fn parse_trigger(text: &str, place: &Code) -> Result<Instruction, Vec<Diagnostic>> {
    let lexed = lex::lex_trigger(text, place.span, (place.first_line, place.last_line));
    let mut diagnostics = lexed.diagnostics;
    let [line] = lexed.lines.as_slice() else {
        return Err(vec![Diagnostic::error(
            place.span,
            format!("the ONBUILD trigger {text:?} is not one instruction"),
        )]);
    };
    let mut parser = Parser { line, escape: '\\', diagnostics: Vec::new() };
    let parsed = parser.statement(0..line.text.len());
    diagnostics.append(&mut parser.diagnostics);
    match parsed {
        Ok(Statement::Instruction(instruction)) if !diagnostics.iter().any(Diagnostic::is_error) => {
            return Ok(instruction);
        }
        Ok(Statement::Instruction(_)) => {}
        Ok(Statement::Stage(_)) => diagnostics.push(Diagnostic::error(place.span, "FROM is no ONBUILD trigger")),
        Err(diagnostic) => diagnostics.push(diagnostic),
    }
    for diagnostic in &mut diagnostics {
        diagnostic.message = format!("in the base image's ONBUILD {text:?}: {}", diagnostic.message);
    }
    Err(diagnostics)
}

enum Statement {
    Stage(Stage),
    Instruction(Instruction),
}

type Result<T, E = Diagnostic> = std::result::Result<T, E>;

struct Parser<'a> {
    line: &'a Line,
    escape: char,
    diagnostics: Vec<Diagnostic>,
}

impl Parser<'_> {
    fn statement(&mut self, range: Range<usize>) -> Result<Statement> {
        let command = lex::split_command(&self.line.text, range.clone(), self.escape);
        let keyword = self.word(command.keyword.clone());
        let name = keyword.text.to_uppercase();
        let code = self.code(range);
        if name == "FROM" {
            return self.from(&command, keyword, code).map(Statement::Stage);
        }
        let kind = self.kind(&name, &command)?;
        Ok(Statement::Instruction(Instruction { keyword, kind, code }))
    }

    fn code(&self, range: Range<usize>) -> Code {
        let line = self.line;
        Code {
            text: line.text[range].trim().to_owned(),
            span: line.span,
            first_line: line.first_line,
            last_line: line.last_line,
            comments: line.comments.clone(),
        }
    }

    fn kind(&mut self, name: &str, command: &Command) -> Result<Kind> {
        match name {
            "ARG" => self.arguments(command).map(Kind::Arg),
            "ENV" => self.pairs(command, "ENV").map(Kind::Env),
            "LABEL" => self.pairs(command, "LABEL").map(Kind::Label),
            "RUN" => self.run(command).map(Kind::Run),
            "COPY" => self.copy(command, false).map(Kind::Copy),
            "ADD" => self.copy(command, true).map(Kind::Copy),
            "WORKDIR" => self.single(command, "WORKDIR").map(Kind::Workdir),
            "USER" => self.single(command, "USER").map(Kind::User),
            "STOPSIGNAL" => self.single(command, "STOPSIGNAL").map(Kind::StopSignal),
            "MAINTAINER" => self.single(command, "MAINTAINER").map(|word| Kind::Maintainer(word.text)),
            "CMD" => self.command_line(command, "CMD").map(Kind::Cmd),
            "ENTRYPOINT" => self.command_line(command, "ENTRYPOINT").map(Kind::Entrypoint),
            "SHELL" => self.shell(command).map(Kind::Shell),
            "EXPOSE" => self.list(command, "EXPOSE", false).map(Kind::Expose),
            "VOLUME" => self.volumes(command).map(Kind::Volume),
            "HEALTHCHECK" => self.healthcheck(command).map(Kind::Healthcheck),
            "ONBUILD" => self.onbuild(command).map(Kind::Onbuild),
            _ => Err(self.unknown(name, command)),
        }
    }

    fn unknown(&self, name: &str, command: &Command) -> Diagnostic {
        let written = command.name(&self.line.text);
        let diagnostic = Diagnostic::error(self.span(&command.keyword), format!("unknown instruction: {written}"));
        match nearest(name, INSTRUCTIONS) {
            Some(near) => diagnostic.hint(format!("did you mean `{near}`?")),
            None => diagnostic.hint("does the line before it lack a continuation mark at its end?"),
        }
    }

    fn span(&self, range: &Range<usize>) -> Span {
        self.line.source(range.clone())
    }

    fn word(&self, range: Range<usize>) -> Word {
        Word { span: self.span(&range), text: self.line.text[range].to_owned() }
    }

    fn flags(&mut self, command: &Command, known: Known, instruction: &str) -> Flags {
        let words: Vec<Word> =
            command.flags.iter().map(|(text, range)| Word { text: text.clone(), span: self.span(range) }).collect();
        Flags::read(&words, known, instruction, &mut self.diagnostics)
    }

    fn missing(&self, command: &Command, message: impl Into<String>) -> Diagnostic {
        let whole = command.keyword.start..command.arguments.end.max(command.keyword.end);
        Diagnostic::error(self.span(&whole), message)
    }

    // FROM

    fn from(&mut self, command: &Command, keyword: Word, code: Code) -> Result<Stage> {
        let flags = self.flags(command, flag::FROM, "FROM");
        let words: Vec<Word> = lex::blank_words(&self.line.text, command.arguments.clone())
            .into_iter()
            .map(|range| self.word(range))
            .collect();
        let (base, name) = match words.as_slice() {
            [base] => (base.clone(), None),
            [base, r#as, name] if r#as.text.eq_ignore_ascii_case("as") => {
                (base.clone(), Some((r#as.clone(), name.clone())))
            }
            [_, r#as] if r#as.text.eq_ignore_ascii_case("as") => {
                return Err(Diagnostic::error(r#as.span, "AS lacks a name").hint("write `FROM image AS name`"));
            }
            [] => return Err(self.missing(command, "FROM lacks an image").hint("write `FROM image [AS name]`")),
            _ => {
                return Err(self
                    .missing(command, "FROM requires either one or three arguments")
                    .hint("write `FROM image [AS name]`"));
            }
        };
        if let Some((_, name)) = &name {
            self.stage_name(name);
        }
        Ok(Stage { keyword, base, name, platform: flags.one("platform"), code, instructions: Vec::new() })
    }

    /// `[a-z][a-z0-9-_.]*`, in any case.
    fn stage_name(&mut self, name: &Word) {
        let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let lower = name.text.to_lowercase();
        if lower.starts_with(|c: char| c.is_ascii_lowercase()) && lower.chars().all(letters) {
            return;
        }
        let message = format!("invalid name for build stage: {:?}", name.text);
        self.diagnostics.push(
            Diagnostic::error(name.span, message)
                .hint("a name starts with a letter and goes on with letters, digits, `-`, `_` and `.`"),
        );
    }

    // Key and value

    fn arguments(&mut self, command: &Command) -> Result<Vec<Argument>> {
        self.ignored_flags(command, "ARG");
        let words = lex::quoted_words(&self.line.text, command.arguments.clone(), self.escape);
        if words.is_empty() {
            return Err(self.missing(command, "ARG requires at least one argument").hint("write `ARG name[=default]`"));
        }
        let mut arguments = Vec::with_capacity(words.len());
        for (text, range) in words {
            let (key, value) = self.split_pair(&text, &range);
            if key.text.is_empty() {
                return Err(Diagnostic::error(self.span(&range), "ARG names can not be blank"));
            }
            arguments.push(Argument { key, value });
        }
        Ok(arguments)
    }

    /// Flags that BuildKit overlooks.
    fn ignored_flags(&mut self, command: &Command, instruction: &str) {
        for (text, range) in &command.flags {
            let message = format!("{instruction} takes no flags: {text} is ignored");
            let span = self.span(range);
            self.diagnostics.push(Diagnostic::warning(span, message));
        }
    }

    fn split_pair(&self, text: &str, range: &Range<usize>) -> (Word, Option<Word>) {
        match text.split_once('=') {
            None => (Word { text: text.to_owned(), span: self.span(range) }, None),
            Some((key, value)) => {
                let middle = (range.start + key.len()).min(range.end);
                let key = Word { text: key.to_owned(), span: self.span(&(range.start..middle)) };
                let value = Word { text: value.to_owned(), span: self.span(&((middle + 1).min(range.end)..range.end)) };
                (key, Some(value))
            }
        }
    }

    fn pairs(&mut self, command: &Command, instruction: &str) -> Result<Vec<Pair>> {
        self.flags(command, flag::NONE, instruction);
        let words = lex::quoted_words(&self.line.text, command.arguments.clone(), self.escape);
        let Some((first, _)) = words.first() else {
            let message = format!("{instruction} requires at least one argument");
            return Err(self.missing(command, message).hint(format!("write `{instruction} name=value`")));
        };
        if !first.contains('=') {
            return self.legacy_pair(command, instruction).map(|pair| vec![pair]);
        }
        let mut pairs = Vec::with_capacity(words.len());
        for (text, range) in words {
            match self.split_pair(&text, &range) {
                (key, Some(value)) if !key.text.is_empty() => pairs.push(Pair { key, value, legacy: false }),
                (_, Some(_)) => {
                    return Err(Diagnostic::error(self.span(&range), format!("{instruction} names can not be blank")));
                }
                (key, None) => return Err(no_equals(&key)),
            }
        }
        Ok(pairs)
    }

    /// `ENV key the rest`.
    fn legacy_pair(&self, command: &Command, instruction: &str) -> Result<Pair> {
        let range = command.arguments.clone();
        let body = &self.line.text[range.clone()];
        let blank = |c: char| matches!(c, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ');
        let Some(end) = body.find(blank) else {
            let message = format!("{instruction} must have two arguments");
            return Err(self.missing(command, message).hint(format!("write `{instruction} {body}=value`")));
        };
        let start = end + (body[end..].len() - body[end..].trim_start_matches(blank).len());
        let key = self.word(range.start..range.start + end);
        Ok(Pair { key, value: self.word(range.start + start..range.end), legacy: true })
    }

    // One argument, or several

    fn single(&mut self, command: &Command, instruction: &str) -> Result<Word> {
        match instruction {
            "STOPSIGNAL" => self.ignored_flags(command, instruction),
            _ => {
                self.flags(command, flag::NONE, instruction);
            }
        }
        if command.arguments.is_empty() {
            return Err(self.missing(command, format!("{instruction} requires exactly one argument")));
        }
        Ok(self.word(command.arguments.clone()))
    }

    /// Blank separated words, or a JSON array where that is allowed.
    fn list(&mut self, command: &Command, instruction: &str, json: bool) -> Result<Vec<Word>> {
        self.flags(command, flag::NONE, instruction);
        let words = self.words(command, json)?;
        if words.is_empty() {
            return Err(self.missing(command, format!("{instruction} requires at least one argument")));
        }
        Ok(words)
    }

    fn words(&self, command: &Command, json: bool) -> Result<Vec<Word>> {
        let range = command.arguments.clone();
        if json && let Some(strings) = self.json(range.clone())? {
            return Ok(strings);
        }
        Ok(lex::blank_words(&self.line.text, range).into_iter().map(|range| self.word(range)).collect())
    }

    fn json(&self, range: Range<usize>) -> Result<Option<Vec<Word>>> {
        match lex::json_strings(&self.line.text[range.clone()]) {
            Json::No => Ok(None),
            Json::NotStrings => Err(Diagnostic::error(
                self.span(&range),
                "when using JSON array syntax, arrays must be comprised of strings only",
            )
            .hint("put each element in double quotes")),
            Json::Strings(strings) => {
                let word = |(text, at): (String, Range<usize>)| Word {
                    text,
                    span: self.span(&(range.start + at.start..range.start + at.end)),
                };
                Ok(Some(strings.into_iter().map(word).collect()))
            }
        }
    }

    fn volumes(&mut self, command: &Command) -> Result<Vec<Word>> {
        let words = self.list(command, "VOLUME", true)?;
        match words.iter().find(|word| word.text.trim().is_empty()) {
            Some(empty) => Err(Diagnostic::error(empty.span, "VOLUME specified can not be an empty string")),
            None => Ok(words.into_iter().map(|word| Word { text: word.text.trim().to_owned(), ..word }).collect()),
        }
    }

    // Commands

    fn shell_or_exec(&self, range: Range<usize>) -> Result<CommandLine> {
        Ok(match self.json(range.clone())? {
            Some(words) => CommandLine::Exec(words.into_iter().map(|word| word.text).collect()),
            None => CommandLine::Shell(self.word(range)),
        })
    }

    fn command_line(&mut self, command: &Command, instruction: &str) -> Result<CommandLine> {
        self.flags(command, flag::NONE, instruction);
        self.shell_or_exec(command.arguments.clone())
    }

    fn shell(&mut self, command: &Command) -> Result<Vec<String>> {
        self.flags(command, flag::NONE, "SHELL");
        match self.shell_or_exec(command.arguments.clone())? {
            CommandLine::Exec(words) if !words.is_empty() => Ok(words),
            CommandLine::Exec(_) => Err(self.missing(command, "SHELL requires at least one argument")),
            CommandLine::Shell(_) => Err(self
                .missing(command, "SHELL requires the arguments to be in JSON form")
                .hint("write `SHELL [\"/bin/bash\", \"-c\"]`")),
        }
    }

    fn run(&mut self, command: &Command) -> Result<Run> {
        let flags = self.flags(command, flag::RUN, "RUN");
        let mut mounts = Vec::new();
        for word in flags.many("mount") {
            mounts.push(mount_flag(&word)?);
        }
        let network = self.choice(flags.one("network"), "network", &["default", "none", "host"]);
        let security = self.choice(flags.one("security"), "security", &["sandbox", "insecure"]);
        let line = self.shell_or_exec(command.arguments.clone())?;
        let heredocs = self.line.heredocs.clone();
        Ok(Run { command: line, heredocs, mounts, network, security, devices: flags.many("device") })
    }

    fn choice(&mut self, word: Option<Word>, flag: &str, known: &[&'static str]) -> Option<Word> {
        let word = word?;
        if known.contains(&word.text.as_str()) {
            return Some(word);
        }
        let message = format!("{flag} mode {:?} is not valid", word.text);
        let diagnostic = Diagnostic::error(word.span, message)
            .hint(format!("it can be {}", known.join(", ")))
            .suggest(&word.text, known.iter().copied());
        self.diagnostics.push(diagnostic);
        None
    }

    // Files

    fn copy(&mut self, command: &Command, add: bool) -> Result<Copy> {
        let instruction = if add { "ADD" } else { "COPY" };
        let flags = self.flags(command, if add { flag::ADD } else { flag::COPY }, instruction);
        let mut words = self.words(command, true)?;
        let destination = match words.pop() {
            Some(destination) if !words.is_empty() => destination,
            _ => {
                let message = format!("{instruction} requires at least two arguments: a source and a destination");
                return Err(self.missing(command, message).hint(format!("write `{instruction} source destination`")));
            }
        };
        if lex::parse_heredoc(&destination.text).is_some() {
            let message = format!("{instruction} cannot accept a heredoc as a destination");
            return Err(Diagnostic::error(destination.span, message).hint("name a file or directory after it"));
        }
        let (mut paths, mut inline) = (Vec::new(), Vec::new());
        for word in words {
            match self.inline(&word) {
                Some(source) => inline.push(source),
                None => paths.push(word),
            }
        }
        Ok(Copy {
            add,
            paths,
            inline,
            destination,
            from: flags.one("from").filter(|from| !from.text.is_empty()),
            chown: flags.one("chown"),
            chmod: flags.one("chmod"),
            link: flags.boolean("link").unwrap_or(false),
            parents: flags.boolean("parents").unwrap_or(false),
            exclude: flags.many("exclude").into_iter().map(|word| word.text).collect(),
            checksum: flags.one("checksum"),
            keep_git_dir: flags.boolean("keep-git-dir"),
            unpack: flags.boolean("unpack"),
        })
    }

    fn inline(&self, word: &Word) -> Option<Inline> {
        let mark = lex::parse_heredoc(&word.text)?;
        let heredoc = self.line.heredocs.iter().rev().find(|heredoc| heredoc.name == mark.name);
        let body = heredoc.map(|heredoc| heredoc.body()).unwrap_or_default();
        Some(Inline { name: mark.name, body, expand: mark.expand, span: word.span })
    }

    // HEALTHCHECK, ONBUILD

    fn healthcheck(&mut self, command: &Command) -> Result<Healthcheck> {
        let range = command.arguments.clone();
        let body = &self.line.text[range.clone()];
        let end = body.find(char::is_whitespace).unwrap_or(body.len());
        let kind = self.word(range.start..range.start + end);
        let rest = range.start + body.len() - body[end..].trim_start().len()..range.end;
        match kind.text.to_uppercase().as_str() {
            "" => Err(self
                .missing(command, "HEALTHCHECK requires at least one argument")
                .hint("write `HEALTHCHECK CMD command`, or `HEALTHCHECK NONE`")),
            "NONE" if rest.is_empty() => Ok(Healthcheck { test: vec!["NONE".to_owned()], ..Healthcheck::default() }),
            "NONE" => Err(Diagnostic::error(self.span(&rest), "HEALTHCHECK NONE takes no arguments")),
            "CMD" => self.health_command(command, rest),
            other => Err(Diagnostic::error(kind.span, format!("unknown type {other:?} in HEALTHCHECK"))
                .hint("write `HEALTHCHECK CMD command`, or `HEALTHCHECK NONE`")),
        }
    }

    fn health_command(&mut self, command: &Command, rest: Range<usize>) -> Result<Healthcheck> {
        let flags = self.flags(command, flag::HEALTHCHECK, "HEALTHCHECK");
        let test = match self.shell_or_exec(rest)? {
            CommandLine::Exec(args) if !args.is_empty() => std::iter::once("CMD".to_owned()).chain(args).collect(),
            CommandLine::Shell(text) if !text.text.is_empty() => vec!["CMD-SHELL".to_owned(), text.text],
            _ => return Err(self.missing(command, "missing command after HEALTHCHECK CMD")),
        };
        let retries = match flags.one("retries").filter(|word| !word.text.is_empty()) {
            None => 0,
            Some(word) => word.text.parse::<i32>().ok().filter(|n| *n >= 0).ok_or_else(|| {
                Diagnostic::error(word.span, format!("--retries is a number from 0 up, not {:?}", word.text))
            })?,
        };
        Ok(Healthcheck {
            test,
            interval: interval(flags.one("interval"))?,
            timeout: interval(flags.one("timeout"))?,
            start_period: interval(flags.one("start-period"))?,
            start_interval: interval(flags.one("start-interval"))?,
            retries: retries.into(),
        })
    }

    fn onbuild(&mut self, command: &Command) -> Result<Onbuild> {
        self.flags(command, flag::NONE, "ONBUILD");
        let range = command.arguments.clone();
        if range.is_empty() {
            return Err(self.missing(command, "ONBUILD requires at least one argument"));
        }
        let inner = lex::split_command(&self.line.text, range.clone(), self.escape);
        let name = inner.name(&self.line.text).to_uppercase();
        if matches!(name.as_str(), "ONBUILD" | "FROM" | "MAINTAINER") {
            let message = format!("{name} isn't allowed as an ONBUILD trigger");
            return Err(Diagnostic::error(self.span(&inner.keyword), message));
        }
        self.trigger_form(&inner, &name)?;
        // Blanks at its end included.
        let mut source = self.line.text[range.start..].to_owned();
        for heredoc in &self.line.heredocs {
            source.push('\n');
            source.push_str(&heredoc.content);
            source.push_str(&heredoc.name);
        }
        Ok(Onbuild { source, instruction: self.trigger(range).map(Box::new) })
    }

    /// What is wrong with the form of a trigger is refused at once, as BuildKit does.
    fn trigger_form(&self, inner: &Command, name: &str) -> Result<()> {
        let arguments = inner.arguments.clone();
        match name {
            "ENV" | "LABEL" => {
                let words = lex::quoted_words(&self.line.text, arguments, self.escape);
                if words.first().is_some_and(|(first, _)| !first.contains('=')) {
                    return self.legacy_pair(inner, name).map(drop);
                }
                match words.iter().find(|(word, _)| !word.contains('=')) {
                    Some((word, range)) => Err(no_equals(&Word { text: word.clone(), span: self.span(range) })),
                    None => Ok(()),
                }
            }
            "RUN" | "CMD" | "ENTRYPOINT" | "SHELL" | "COPY" | "ADD" | "VOLUME" => self.json(arguments).map(drop),
            _ => Ok(()),
        }
    }

    /// Other mistakes in a trigger are said, but hurt only the build that meets it.
    fn trigger(&mut self, range: Range<usize>) -> Option<Instruction> {
        let before = self.diagnostics.len();
        let parsed = match self.statement(range) {
            Ok(Statement::Instruction(instruction)) => Some(instruction),
            Ok(Statement::Stage(_)) => None,
            Err(diagnostic) => {
                self.diagnostics.push(diagnostic);
                None
            }
        };
        let mut sound = true;
        for diagnostic in &mut self.diagnostics[before..] {
            sound &= !diagnostic.is_error();
            diagnostic.severity = crate::diagnostic::Severity::Warning;
        }
        parsed.filter(|_| sound)
    }
}

fn no_equals(word: &Word) -> Diagnostic {
    Diagnostic::error(word.span, format!("can't find = in {:?}", word.text))
        .hint("each word must be of the form name=value; put a value with blanks in quotes")
}

fn interval(word: Option<Word>) -> Result<i64> {
    const MINIMUM_NS: i64 = 1_000_000;
    let Some(word) = word.filter(|word| !word.text.is_empty()) else { return Ok(0) };
    let duration = duration::parse(&word.text).ok_or_else(|| {
        Diagnostic::error(word.span, format!("invalid duration {:?}", word.text))
            .hint("write a number with a unit, such as 30s, 1m30s or 500ms")
    })?;
    if duration != 0 && duration < MINIMUM_NS {
        return Err(Diagnostic::error(word.span, format!("the interval {} is less than 1ms", word.text)));
    }
    Ok(duration)
}

fn mount_flag(word: &Word) -> Result<MountFlag> {
    let fields = flag::comma_separated(&word.text)
        .map_err(|reason| Diagnostic::error(word.span, format!("invalid --mount: {reason}")))?;
    let split = |field: String| match field.split_once('=') {
        Some((key, value)) => (key.to_lowercase(), Some(value.to_owned())),
        None => (field.to_lowercase(), None),
    };
    let mount = MountFlag { span: word.span, fields: fields.into_iter().map(split).collect() };
    let variable = |from: &str| from.find('$').is_some_and(|at| at != from.len() - 1);
    if mount.from().is_some_and(variable) {
        return Err(Diagnostic::error(word.span, "'from' doesn't support variable expansion")
            .hint("define a stage `FROM $image AS name` and mount from that name"));
    }
    Ok(mount)
}
