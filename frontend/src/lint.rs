//! BuildKit's build checks, under the same names: what is allowed and yet probably not meant.
//!
//! What the text alone shows is found by [`file`], after parsing; what depends on variables and base images by the plan
//! (`UndefinedVar`, `UndefinedArgInFrom`, `WorkdirRelativePath`, `JSONArgsRecommended`, `InvalidBaseImagePlatform`,
//! `ExposeProtoCasing`, `ExposeInvalidFormat`, `CopyIgnoredFile`). [`Check`] holds what `# check=` says of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use regex::Regex;

use crate::diagnostic::{Diagnostic, Severity, Span};
use crate::instruction::{Code, Dockerfile, Instruction, Kind, Stage, Word};
use crate::lex::{Directive, Line};

/// Every rule: its name and what it is about. The last one is experimental: it runs only where `experimental=` asks for it.
pub const RULES: [(&str, &str); 22] = [
    ("StageNameCasing", "Stage names are lowercase"),
    ("FromAsCasing", "The case of AS is the case of FROM"),
    ("NoEmptyContinuation", "A continued instruction has no blank lines"),
    ("ConsistentInstructionCasing", "All instructions of a file are in upper case, or all in lower case"),
    ("DuplicateStageName", "Stage names are unique"),
    ("ReservedStageName", "Stages are not called scratch or context"),
    ("JSONArgsRecommended", "CMD and ENTRYPOINT are JSON arrays, so that signals reach the program"),
    ("MaintainerDeprecated", "An image's author is a label: MAINTAINER is deprecated"),
    ("UndefinedArgInFrom", "FROM uses ARGs that are declared"),
    ("WorkdirRelativePath", "The first WORKDIR is absolute, so that it does not depend on the base image"),
    ("UndefinedVar", "Variables are defined before they are used"),
    (
        "MultipleInstructionsDisallowed",
        "CMD, ENTRYPOINT and HEALTHCHECK stand once in a stage, for only the last one counts",
    ),
    ("LegacyKeyValueFormat", "ENV and LABEL are written name=value"),
    ("InvalidBaseImagePlatform", "A base image is of the platform that is built for"),
    ("RedundantTargetPlatform", "FROM does not name the target platform, which is the default"),
    ("SecretsUsedInArgOrEnv", "Secrets are mounted, not kept in ARG or ENV"),
    ("InvalidDefaultArgInFrom", "The default of a global ARG gives a valid base image"),
    ("FromPlatformFlagConstDisallowed", "FROM --platform is not a constant"),
    ("CopyIgnoredFile", "COPY and ADD name no file that the ignore file leaves out"),
    ("ExposeProtoCasing", "Protocols of EXPOSE are lowercase"),
    ("ExposeInvalidFormat", "EXPOSE names ports, no addresses and no mappings"),
    (EXPERIMENTAL, "A comment right above FROM or ARG describes it: `# name description`"),
];
const EXPERIMENTAL: &str = "InvalidDefinitionDescription";

/// `skip=A,B;error=true;experimental=all`: which rules run, and whether they fail the build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    skip: Names,
    experimental: Names,
    pub error: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Names {
    all: bool,
    some: BTreeSet<String>,
}

impl Names {
    fn add(&mut self, list: &str) {
        match list.trim() {
            "all" => self.all = true,
            list => self.some.extend(list.split(',').map(|name| name.trim().to_owned())),
        }
    }

    fn contains(&self, rule: &str) -> bool {
        self.all || self.some.contains(rule)
    }
}

impl Check {
    /// Reads the value of a `check` directive.
    pub fn parse(text: &str) -> Result<Check, String> {
        let mut check = Check::default();
        if text.trim().is_empty() {
            return Ok(check);
        }
        for option in text.splitn(3, ';') {
            let (key, value) = option.split_once('=').ok_or_else(|| format!("invalid check option {option:?}"))?;
            match key.trim() {
                "skip" => check.skip.add(value),
                "experimental" => check.experimental.add(value),
                "error" => {
                    check.error = crate::plan::parse_bool(value.trim())
                        .ok_or_else(|| format!("error is true or false, not {:?}", value.trim()))?;
                }
                other => return Err(format!("invalid check option {other:?}")),
            }
        }
        Ok(check)
    }

    /// The directive at the top of a file; only its first word counts.
    pub fn from_directive(directive: Option<&Directive>, diagnostics: &mut Vec<Diagnostic>) -> Check {
        let Some(directive) = directive else { return Check::default() };
        let value = directive.value.split(' ').next().unwrap_or_default();
        match Check::parse(value) {
            Ok(check) => {
                check.unknown_names(directive.span, diagnostics);
                check
            }
            Err(message) => {
                diagnostics.push(
                    Diagnostic::error(directive.span, message).hint("the options are skip=, error= and experimental="),
                );
                Check::default()
            }
        }
    }

    fn unknown_names(&self, span: Span, diagnostics: &mut Vec<Diagnostic>) {
        for name in self.skip.some.union(&self.experimental.some) {
            if RULES.iter().all(|(known, _)| known != name) {
                let warning = Diagnostic::warning(span, format!("there is no check named {name:?}"));
                diagnostics.push(warning.suggest(name, RULES.map(|(known, _)| known)));
            }
        }
    }

    /// With what a `# check=` comment right above an instruction adds.
    fn with_comments(&self, comments: &[String]) -> Check {
        let mut check = self.clone();
        let directive = comments.iter().find_map(|comment| match crate::lex::key_value(comment) {
            Some((key, value)) if key.eq_ignore_ascii_case("check") => Some(value),
            _ => None,
        });
        let local = directive.map(|value| Check::parse(value.split(' ').next().unwrap_or_default()));
        if let Some(Ok(local)) = local {
            check.skip.all |= local.skip.all;
            check.skip.some.extend(local.skip.some);
            check.experimental.all |= local.experimental.all;
            check.experimental.some.extend(local.experimental.some);
        }
        check
    }

    /// A finding, unless it is muted.
    pub fn finding(
        &self,
        rule: &'static str,
        comments: &[String],
        span: Span,
        message: impl Into<String>,
    ) -> Option<Diagnostic> {
        let check = self.with_comments(comments);
        let runs = if rule == EXPERIMENTAL { check.experimental.contains(rule) } else { !check.skip.contains(rule) };
        let severity = if self.error { Severity::Error } else { Severity::Warning };
        runs.then(|| Diagnostic { severity, rule: Some(rule), ..Diagnostic::error(span, message) })
    }
}

/// Collects findings about one file.
struct Findings<'a> {
    check: &'a Check,
    out: &'a mut Vec<Diagnostic>,
}

impl Findings<'_> {
    /// The finding, if it is not muted.
    fn add(
        &mut self,
        rule: &'static str,
        code: &Code,
        span: Span,
        message: impl Into<String>,
    ) -> Option<&mut Diagnostic> {
        let finding = self.check.finding(rule, &code.comments, span, message)?;
        self.out.push(finding);
        self.out.last_mut()
    }
}

fn hint(finding: Option<&mut Diagnostic>, hint: impl Into<String>) {
    if let Some(finding) = finding {
        finding.hint = Some(hint.into());
    }
}

/// What the text alone shows.
pub fn file(file: &Dockerfile, lines: &[Line], diagnostics: &mut Vec<Diagnostic>) {
    let mut findings = Findings { check: &file.check, out: diagnostics };
    for (line, span) in lines.iter().filter_map(|line| line.empty_continuation.map(|span| (line, span))) {
        let finding = file.check.finding("NoEmptyContinuation", &line.comments, span, "Empty continuation line");
        findings.out.extend(finding.map(|finding| finding.hint("remove the blank line, or make it a comment")));
    }
    casing(file, &mut findings);
    stage_names(file, &mut findings);
    from_lines(file, &mut findings);
    for instruction in file.globals.iter().chain(file.stages.iter().flat_map(|stage| &stage.instructions)) {
        instruction_rules(instruction, &mut findings);
    }
    for stage in &file.stages {
        used_once(stage, &mut findings);
    }
}

/// Most instructions decide whether keywords are upper or lower case.
fn casing(file: &Dockerfile, findings: &mut Findings<'_>) {
    let keywords = || {
        file.stages.iter().flat_map(|stage| {
            let own = std::iter::once((&stage.keyword, &stage.code));
            own.chain(stage.instructions.iter().map(|instruction| (&instruction.keyword, &instruction.code)))
        })
    };
    let is_lower = |word: &str| word == word.to_lowercase();
    let is_upper = |word: &str| word == word.to_uppercase();
    let lower = keywords().filter(|(word, _)| is_lower(&word.text)).count();
    let upper = keywords().filter(|(word, _)| is_upper(&word.text)).count();
    for (Word { text, span }, code) in keywords() {
        let (right, name) = if lower > upper { (is_lower(text), "lowercase") } else { (is_upper(text), "uppercase") };
        if !right {
            let message = format!("Command '{text}' should match the case of the command majority ({name})");
            findings.add("ConsistentInstructionCasing", code, *span, message);
        }
    }
}

fn stage_names(file: &Dockerfile, findings: &mut Findings<'_>) {
    let mut seen = BTreeSet::new();
    for stage in &file.stages {
        let (Some((keyword, name)), from) = (&stage.name, &stage.keyword.text) else { continue };
        let lower = name.text.to_lowercase();
        if lower != name.text {
            let message = format!("Stage name '{}' should be lowercase", name.text);
            hint(findings.add("StageNameCasing", &stage.code, name.span, message), format!("write `{lower}`"));
        }
        let upper = *from == from.to_uppercase();
        let wanted = if upper { keyword.text.to_uppercase() } else { keyword.text.to_lowercase() };
        if (upper || *from == from.to_lowercase()) && keyword.text != wanted {
            let message = format!("'{}' and '{from}' keywords' casing do not match", keyword.text);
            findings.add("FromAsCasing", &stage.code, keyword.span, message);
        }
        if matches!(lower.as_str(), "context" | "scratch") {
            let message = format!("Stage name should not use the same name as reserved stage {lower:?}");
            findings.add("ReservedStageName", &stage.code, name.span, message);
        }
        if !seen.insert(lower.clone()) {
            let message = format!("Duplicate stage name {lower:?}, stage names should be unique");
            findings.add("DuplicateStageName", &stage.code, name.span, message);
        }
        description("FROM", &[&lower], &stage.code, findings);
    }
}

/// What `FROM` makes of its `ARG`s' defaults.
fn from_lines(file: &Dockerfile, findings: &mut Findings<'_>) {
    let defaults = crate::plan::scope::default_globals(file);
    for stage in &file.stages {
        let expander = crate::expand::Expander::new(file.directives.escape);
        if let Some(defaults) = &defaults
            && let Ok(base) = expander.expand(&stage.base.text, defaults.as_slice())
            && base.text.parse::<forge_solver::graph::image::Reference>().is_err()
            && !base.used.is_empty() | !base.unset.is_empty()
        {
            let name = &stage.base.text;
            let message = format!("Default value for ARG {name} results in empty or invalid base image name");
            findings.add("InvalidDefaultArgInFrom", &stage.code, stage.base.span, message);
        }
        if let Some(platform) = &stage.platform {
            platform_flag(stage, platform, findings);
        }
    }
}

fn platform_flag(stage: &Stage, platform: &Word, findings: &mut Findings<'_>) {
    let written = platform.text.as_str();
    if matches!(written, "$TARGETPLATFORM" | "${TARGETPLATFORM}") {
        let message =
            format!("Setting platform to predefined {written} in FROM is redundant as this is the default behavior");
        hint(findings.add("RedundantTargetPlatform", &stage.code, platform.span, message), "leave out --platform");
    }
    let Ok(parsed) = written.parse::<forge_solver::graph::image::Platform>() else { return };
    let name = stage.name().unwrap_or_default();
    if !written.contains('$') && !name.contains(&parsed.os) && !name.contains(&parsed.architecture) {
        let message = format!("FROM --platform flag should not use constant value {written:?}");
        findings.add("FromPlatformFlagConstDisallowed", &stage.code, platform.span, message);
    }
}

fn instruction_rules(instruction: &Instruction, findings: &mut Findings<'_>) {
    let (code, keyword) = (&instruction.code, &instruction.keyword);
    match &instruction.kind {
        Kind::Maintainer(name) => {
            let message = "Maintainer instruction is deprecated in favor of using label".to_owned();
            let instead = format!("write `LABEL org.opencontainers.image.authors={name:?}`");
            hint(findings.add("MaintainerDeprecated", code, keyword.span, message), instead);
        }
        Kind::Env(pairs) => {
            legacy(instruction, pairs, findings);
            pairs.iter().for_each(|pair| secret("ENV", &pair.key, code, findings));
        }
        Kind::Label(pairs) => legacy(instruction, pairs, findings),
        Kind::Arg(arguments) => {
            arguments.iter().for_each(|argument| secret("ARG", &argument.key, code, findings));
            let names: Vec<&str> = arguments.iter().map(|argument| argument.key.text.as_str()).collect();
            description("ARG", &names, code, findings);
        }
        _ => {}
    }
}

fn legacy(instruction: &Instruction, pairs: &[crate::instruction::Pair], findings: &mut Findings<'_>) {
    let keyword = &instruction.keyword.text;
    for pair in pairs.iter().filter(|pair| pair.legacy) {
        let message =
            format!("\"{keyword} key=value\" should be used instead of legacy \"{keyword} key value\" format");
        let value = match pair.value.text.contains(char::is_whitespace) && !pair.value.text.starts_with(['"', '\'']) {
            true => format!("{:?}", pair.value.text),
            false => pair.value.text.clone(),
        };
        let instead = format!("write `{keyword} {}={value}`", pair.key.text);
        let span = pair.key.span.to(pair.value.span);
        hint(findings.add("LegacyKeyValueFormat", &instruction.code, span, message), instead);
    }
}

/// A name with such a word between underscores holds a secret, unless it has one of the others too.
fn secret(instruction: &str, key: &Word, code: &Code, findings: &mut Findings<'_>) {
    static SECRET: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new("(?i)(?:_|^)(?:apikey|auth|credentials?|key|password|pword|passwd|secret|token)(?:_|$)")
            .expect("a constant pattern")
    });
    static HARMLESS: LazyLock<Regex> =
        LazyLock::new(|| Regex::new("(?i)(?:_|^)(?:public|file|version)(?:_|$)").expect("a constant pattern"));
    if SECRET.is_match(&key.text) && !HARMLESS.is_match(&key.text) {
        let message = format!("Do not use ARG or ENV instructions for sensitive data ({instruction} {:?})", key.text);
        let instead = "give it to the step that needs it: `RUN --mount=type=secret,id=…`";
        hint(findings.add("SecretsUsedInArgOrEnv", code, key.span, message), instead);
    }
}

/// Of CMD, ENTRYPOINT and HEALTHCHECK only the last in a stage counts.
fn used_once(stage: &Stage, findings: &mut Findings<'_>) {
    let mut last: BTreeMap<&str, &Instruction> = BTreeMap::new();
    for instruction in &stage.instructions {
        let name = match instruction.kind {
            Kind::Cmd(_) => "CMD",
            Kind::Entrypoint(_) => "ENTRYPOINT",
            Kind::Healthcheck(_) => "HEALTHCHECK",
            _ => continue,
        };
        if let Some(earlier) = last.insert(name, instruction) {
            let name = &instruction.keyword.text;
            let message = format!(
                "Multiple {name} instructions should not be used in the same stage because only the last one will be used"
            );
            findings.add("MultipleInstructionsDisallowed", &instruction.code, earlier.code.span, message);
        }
    }
}

fn description(instruction: &str, names: &[&str], code: &Code, findings: &mut Findings<'_>) {
    let Some(comment) = code.comments.last() else { return };
    if names.contains(&comment.split(' ').next().unwrap_or_default()) {
        return;
    }
    let example = if names.len() == 1 { names[0] } else { "<arg_key>" };
    let message = format!("Comment for {instruction} should follow the format: `# {example} <description>`");
    findings.add(EXPERIMENTAL, code, code.span, message);
}
