//! `--call` and `--print-graph`: questions about a Dockerfile that need no step to run.
//!
//! The answer goes to stdout. Formats and exit codes are buildx's: a check that finds something ends with 1, unless
//! `ignorestatus` is set; SARIF is ours.

use std::str::FromStr;

use base64::Engine as _;
use forge_frontend::diagnostic::{Diagnostic, Lines, render};
use forge_frontend::outline::{self, Outline, Target};
use forge_frontend::report::Report;
use forge_frontend::{Dockerfile, Plan, Request, Sources, show};

use super::report::{Failed, Source};
use crate::cli::error::Doing;
use crate::cli::{Failure, Result, print, say};

/// `check,format=json,ignorestatus=true`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// `None`: a build.
    pub method: Option<Method>,
    format: Format,
    ignore_status: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Check,
    Outline,
    Targets,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Text,
    Json,
    Sarif,
}

impl Call {
    pub const CHECK: Call = Call { method: Some(Method::Check), format: Format::Text, ignore_status: false };
}

impl FromStr for Call {
    type Err = String;

    fn from_str(text: &str) -> Result<Call, String> {
        let mut call = Call { method: None, ..Call::CHECK };
        for field in text.split(',') {
            match field.split_once('=').unwrap_or((field, "")) {
                ("build", "") => call.method = None,
                ("check" | "lint", "") => call.method = Some(Method::Check),
                ("outline", "") => call.method = Some(Method::Outline),
                ("targets", "") => call.method = Some(Method::Targets),
                ("format", "text") => call.format = Format::Text,
                ("format", "json") => call.format = Format::Json,
                ("format", "sarif") => call.format = Format::Sarif,
                ("ignorestatus", "true" | "1") => call.ignore_status = true,
                ("ignorestatus", "false" | "0") => call.ignore_status = false,
                _ => {
                    return Err(format!(
                        "{field:?}: expected build, check, outline or targets, and format=text, json or sarif"
                    ));
                }
            }
        }
        match (call.format, call.method) {
            (Format::Sarif, Some(Method::Outline | Method::Targets)) => {
                Err("format=sarif is for diagnostics: --call=check,format=sarif".to_owned())
            }
            _ => Ok(call),
        }
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum GraphFormat {
    Text,
    Json,
    Dot,
}

/// What is printed, and how the program ends.
#[derive(Default)]
pub struct Answer {
    /// Data, for stdout.
    text: String,
    /// Talk, for stderr.
    talk: String,
    code: u8,
}

impl Answer {
    pub fn print(self) -> Result {
        if !self.text.is_empty() {
            print(self.text.trim_end())?;
        }
        if !self.talk.is_empty() {
            say(self.talk.trim_end());
        }
        match self.code {
            0 => Ok(()),
            code => Err(Failure::Shown(code)),
        }
    }
}

pub fn graph(plan: &Plan, format: GraphFormat) -> Answer {
    let text = match format {
        GraphFormat::Text => show::text(plan),
        GraphFormat::Json => pretty(&show::json(plan)),
        GraphFormat::Dot => show::dot(plan),
    };
    Answer { text, ..Answer::default() }
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}")
}

/// A call and what it is about.
pub struct Question<'a> {
    pub method: Method,
    pub call: Call,
    pub source: &'a Source,
    pub file: &'a Dockerfile,
    pub request: &'a Request,
}

impl Question<'_> {
    /// `parsed` is what parsing found.
    pub async fn answer(&self, parsed: Vec<Diagnostic>, sources: &impl Sources) -> Result<Answer, Failed> {
        let sound = self.report(&parsed).errors().next().is_none();
        match self.method {
            Method::Check => {
                let mut found = parsed;
                if sound {
                    found.extend(forge_frontend::check(self.file, self.request, sources).await);
                }
                found.sort_by_key(|diagnostic| diagnostic.span);
                Ok(self.checked(&found))
            }
            _ if !sound => Err(self.source.failed(&parsed)),
            Method::Outline => {
                let outline =
                    outline::outline(self.file, self.request).map_err(|errors| self.source.failed(&errors))?;
                let data = serde_json::to_value(&outline).doing("print the outline").map_err(Failed::Told)?;
                Ok(self.data(data, || outline_text(&outline)))
            }
            Method::Targets => {
                let targets = outline::targets(self.file);
                Ok(self.data(serde_json::json!({"targets": targets}), || targets_text(&targets)))
            }
        }
    }

    fn report<'b>(&'b self, diagnostics: &'b [Diagnostic]) -> Report<'b> {
        Report { file: &self.source.name, text: &self.source.text, diagnostics }
    }

    fn data(&self, mut data: serde_json::Value, text: impl FnOnce() -> String) -> Answer {
        let text = match self.call.format {
            Format::Json | Format::Sarif => {
                data["sources"] = vec![base64::engine::general_purpose::STANDARD.encode(&self.source.text)].into();
                pretty(&data)
            }
            Format::Text => text(),
        };
        Answer { text, ..Answer::default() }
    }

    fn checked(&self, found: &[Diagnostic]) -> Answer {
        let report = self.report(found);
        let lines = Lines::new(&self.source.text);
        let shown = |diagnostic: &Diagnostic| render(diagnostic, &self.source.name, &lines);
        let (warnings, errors) = (report.findings().count(), report.errors().count());
        let mut talk: String = report.notes().map(shown).collect();
        let text = match self.call.format {
            Format::Json => pretty(&report.lint_results()),
            Format::Sarif => pretty(&report.sarif(env!("CARGO_PKG_VERSION"))),
            Format::Text => {
                talk.extend(report.errors().map(shown));
                let blocks: String = report.findings().map(|finding| format!("\n{}", shown(finding))).collect();
                match (warnings, errors) {
                    (0, 0) => "Check complete, no warnings found.".to_owned(),
                    (0, _) => String::new(),
                    (1, _) => format!("Check complete, 1 warning has been found!\n{blocks}"),
                    (count, _) => format!("Check complete, {count} warnings have been found!\n{blocks}"),
                }
            }
        };
        let failed = errors > 0 || (warnings > 0 && !self.call.ignore_status);
        Answer { text, talk, code: u8::from(failed) }
    }
}

fn outline_text(outline: &Outline) -> String {
    let mut out = String::new();
    if !outline.name.is_empty() || !outline.description.is_empty() {
        let mut rows = vec![["TARGET:", &outline.name]];
        rows.extend(Some(["DESCRIPTION:", &outline.description]).filter(|row| !row[1].is_empty()));
        table(&mut out, &rows, 1);
        out.push('\n');
    }
    let args = outline.args.iter().map(|arg| [arg.name.as_str(), &arg.value, &arg.description]);
    section(&mut out, ["BUILD ARG", "VALUE", "DESCRIPTION"], args);
    for (title, secrets) in [("SECRET", &outline.secrets), ("SSH", &outline.ssh)] {
        let rows = secrets.iter().map(|secret| [secret.name.as_str(), if secret.required { "true" } else { "" }]);
        section(&mut out, [title, "REQUIRED"], rows);
    }
    section(&mut out, ["CACHE MOUNT"], outline.cache.iter().map(|cache| [cache.id.as_str()]));
    out
}

fn targets_text(targets: &[Target]) -> String {
    let names: Vec<String> = targets
        .iter()
        .map(|target| match (target.name.as_str(), target.default) {
            ("", true) => "(default)".to_owned(),
            (name, true) => format!("{name} (default)"),
            (name, false) => name.to_owned(),
        })
        .collect();
    let mut rows = vec![["TARGET", "DESCRIPTION"]];
    rows.extend(names.iter().zip(targets).map(|(name, target)| [name.as_str(), &target.description]));
    let mut out = String::new();
    table(&mut out, &rows, 1);
    out
}

/// A table with a head and a blank line after it; nothing where there is nothing to list.
fn section<'a, const N: usize>(out: &mut String, head: [&'a str; N], rows: impl Iterator<Item = [&'a str; N]>) {
    let rows: Vec<[&str; N]> = std::iter::once(head).chain(rows).collect();
    if rows.len() > 1 {
        table(out, &rows, 3);
        out.push('\n');
    }
}

/// Columns as wide as their widest cell, `gap` blanks between them.
fn table<const N: usize>(out: &mut String, rows: &[[&str; N]], gap: usize) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0) + gap;
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        out.push_str(cells.collect::<String>().trim_end());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_as_buildx_writes_them() {
        for (text, method, format, ignore_status) in [
            ("build", None, Format::Text, false),
            ("check", Some(Method::Check), Format::Text, false),
            ("lint,format=json", Some(Method::Check), Format::Json, false),
            ("check,format=sarif,ignorestatus=true", Some(Method::Check), Format::Sarif, true),
            ("format=json,outline", Some(Method::Outline), Format::Json, false),
            ("targets", Some(Method::Targets), Format::Text, false),
        ] {
            assert_eq!(text.parse(), Ok(Call { method, format, ignore_status }), "{text}");
        }
        for bad in ["", "outlines", "check,format=xml", "targets,format=sarif", "check,ignorestatus", "check=1"] {
            assert!(bad.parse::<Call>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tables_line_up_and_empty_sections_are_left_out() {
        let mut out = String::new();
        section(&mut out, ["A", "LONG", "C"], [["name", "v", "is"], ["x", "", ""]].into_iter());
        section(&mut out, ["NOTHING"], std::iter::empty());
        assert_eq!(out, "A      LONG   C\nname   v      is\nx\n\n");
    }
}
