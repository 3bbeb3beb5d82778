//! Diagnostics for other programs: as BuildKit's lint results, and as SARIF 2.1.0 (OASIS), which editors and code hosts read.

use base64::Engine as _;
use serde_json::{Value, json};

use crate::diagnostic::{Diagnostic, Lines, Position, Span};
use crate::lint::RULES;

/// What was found in one file.
pub struct Report<'a> {
    /// As the user knows it.
    pub file: &'a str,
    pub text: &'a str,
    pub diagnostics: &'a [Diagnostic],
}

/// What SARIF calls a finding that no rule made.
const REFUSED: (&str, &str) = ("Refused", "The file can be built");
/// And one that refuses nothing.
const NOTED: (&str, &str) = ("Noted", "The file says what it seems to say");

impl<'a> Report<'a> {
    /// The findings of rules, which `# check=error=true` may have made errors.
    pub fn findings(&self) -> impl Iterator<Item = &'a Diagnostic> {
        self.diagnostics.iter().filter(|diagnostic| diagnostic.rule.is_some())
    }

    /// Why the file cannot be built, whatever the rules say of it.
    pub fn errors(&self) -> impl Iterator<Item = &'a Diagnostic> {
        self.diagnostics.iter().filter(|diagnostic| diagnostic.rule.is_none() && diagnostic.is_error())
    }

    /// What is said and is no finding: the exit code does not depend on it.
    pub fn notes(&self) -> impl Iterator<Item = &'a Diagnostic> {
        self.diagnostics.iter().filter(|diagnostic| diagnostic.rule.is_none() && !diagnostic.is_error())
    }

    /// `LintResults` of BuildKit's `frontend.lint`: `warnings`, `sources`, `buildError`.
    ///
    /// Lines count from one and characters from zero. Where a file has several errors, `buildError` has a line of message
    /// and a range for each. `hint` is ours.
    pub fn lint_results(&self) -> Value {
        let lines = Lines::new(self.text);
        let description =
            |rule| RULES.iter().find(|(name, _)| Some(*name) == rule).map(|(_, description)| *description);
        let warning = |found: &Diagnostic| {
            let mut warning = json!({
                "ruleName": found.rule,
                "description": description(found.rule),
                "detail": found.message,
                "location": {"ranges": [range(&lines, found.span)]},
            });
            if let Some(hint) = &found.hint {
                warning["hint"] = json!(hint);
            }
            warning
        };
        let data = base64::engine::general_purpose::STANDARD.encode(self.text);
        let mut results = json!({
            "warnings": self.findings().map(warning).collect::<Vec<_>>(),
            "sources": [{"filename": self.file, "data": data, "language": "Dockerfile"}],
        });
        let errors: Vec<&Diagnostic> = self.errors().collect();
        let violated: Vec<&str> =
            self.findings().filter(|found| found.is_error()).filter_map(|found| found.rule).collect();
        if !errors.is_empty() {
            let messages: Vec<&str> = errors.iter().map(|error| error.message.as_str()).collect();
            let ranges: Vec<Value> = errors.iter().map(|error| range(&lines, error.span)).collect();
            results["buildError"] = json!({"message": messages.join("\n"), "location": {"ranges": ranges}});
        } else if !violated.is_empty() {
            let message = format!("lint violation found for rules: {}", distinct(violated).join(", "));
            results["buildError"] = json!({"message": message, "location": {}});
        }
        results
    }

    /// One run of SARIF; `version` is that of the program.
    pub fn sarif(&self, version: &str) -> Value {
        let lines = Lines::new(self.text);
        let rules = RULES.iter().chain([&REFUSED, &NOTED]);
        let rule = |(id, description): &(&str, &str)| json!({"id": id, "shortDescription": {"text": description}});
        let result = |found: &Diagnostic| {
            let (rule, level) = match (found.rule, found.is_error()) {
                (Some(rule), true) => (rule, "error"),
                (Some(rule), false) => (rule, "warning"),
                (None, true) => (REFUSED.0, "error"),
                (None, false) => (NOTED.0, "note"),
            };
            let text = match &found.hint {
                Some(hint) => format!("{}\n{hint}", found.message),
                None => found.message.clone(),
            };
            let (start, end) = (lines.position(found.span.start), lines.position(found.span.end));
            json!({
                "ruleId": rule,
                "level": level,
                "message": {"text": text},
                "locations": [{"physicalLocation": {
                    "artifactLocation": {"uri": uri(self.file)},
                    "region": {
                        "startLine": start.line,
                        "startColumn": start.column,
                        "endLine": end.line,
                        "endColumn": end.column,
                    },
                }}],
            })
        };
        json!({
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{
                "tool": {"driver": {
                    "name": "forge",
                    "version": version,
                    "rules": rules.map(rule).collect::<Vec<_>>(),
                }},
                "columnKind": "unicodeCodePoints",
                "results": self.diagnostics.iter().map(result).collect::<Vec<_>>(),
            }],
        })
    }
}

fn range(lines: &Lines<'_>, span: Span) -> Value {
    let position = |Position { line, column }| json!({"line": line, "character": column - 1});
    json!({"start": position(lines.position(span.start)), "end": position(lines.position(span.end))})
}

fn distinct(mut names: Vec<&str>) -> Vec<&str> {
    names.sort_unstable();
    names.dedup();
    names
}

/// A path as a URI reference (RFC 3986); an absolute one names its scheme.
fn uri(path: &str) -> String {
    let mut out = String::from(if path.starts_with('/') { "file://" } else { "" });
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(byte.into()),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}
