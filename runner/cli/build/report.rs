//! What a failed or doubtful build shows: the place in the Dockerfile, the line, what to do.

use forge_frontend::diagnostic::{self, Diagnostic, Lines, Severity};
use forge_solver::event::{Events, StepId};
use forge_solver::{ExecuteError, ExitStatus, SolveError, StepError};

use super::Failure;
use crate::cli::error::chain;

/// Why a build ended early.
pub enum Failed {
    Told(Failure),
    /// Already rendered, with lines and carets.
    Diagnostics(String),
}

impl<E: Into<Failure>> From<E> for Failed {
    fn from(error: E) -> Failed {
        Failed::Told(error.into())
    }
}

/// The Dockerfile, by the name that the user knows it by.
pub struct Source {
    pub name: String,
    pub text: String,
}

/// Lines shown before and after the one that failed.
const CONTEXT_LINES: usize = 2;

impl Source {
    pub fn fail_on_errors(&self, diagnostics: &[Diagnostic]) -> Result<(), Failed> {
        match diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
            true => Err(self.failed(diagnostics)),
            false => Ok(()),
        }
    }

    pub fn failed(&self, diagnostics: &[Diagnostic]) -> Failed {
        let errors: Vec<&Diagnostic> = diagnostics.iter().filter(|d| d.severity == Severity::Error).collect();
        let mut text: String = errors.iter().map(|error| self.render(error)).collect();
        if errors.len() > 1 {
            text.push_str(&format!("{} problems in {}\n", errors.len(), self.name));
        }
        Failed::Diagnostics(text)
    }

    pub fn render(&self, diagnostic: &Diagnostic) -> String {
        diagnostic::render(diagnostic, &self.name, &Lines::new(&self.text))
    }

    /// Warnings go where progress goes.
    pub fn warn(&self, diagnostics: &[Diagnostic], events: &Events) {
        let step = StepId::new("warnings");
        for warning in diagnostics.iter().filter(|d| d.severity == Severity::Warning) {
            let line = Lines::new(&self.text).position(warning.span.start).line;
            let rule = warning.rule.map(|rule| format!("{rule}: ")).unwrap_or_default();
            let message = format!("{rule}{} ({}:{line})", warning.message, self.name);
            events.send(&step, forge_solver::event::EventKind::Warning { message });
        }
    }

    /// A step that failed: the end of its output, its lines in the Dockerfile, and what happened.
    pub fn step_failed(&self, error: &SolveError) -> Failed {
        let mut text = String::new();
        let output = String::from_utf8_lossy(&error.output);
        if !output.trim().is_empty() {
            text.push_str(&format!("------\n > {}:\n", error.label.name));
            let lines: Vec<&str> = output.lines().collect();
            for line in &lines[lines.len().saturating_sub(20)..] {
                text.push_str(&console::strip_ansi_codes(line));
                text.push('\n');
            }
            text.push_str("------\n");
        }
        if let Some(location) = &error.label.location {
            text.push_str(&self.excerpt(location.first_line, location.last_line));
        }
        let (message, hint) = explain(&error.kind);
        text.push_str(&format!("error: {}: {message}\n", error.label.name));
        if let Some(hint) = hint {
            text.push_str(&format!("  help: {hint}\n"));
        }
        Failed::Diagnostics(text)
    }

    fn excerpt(&self, first: usize, last: usize) -> String {
        let mut text = format!("{}:{first}\n--------------------\n", self.name);
        for (index, line) in self.text.lines().enumerate() {
            let number = index + 1;
            if number + CONTEXT_LINES < first || number > last + CONTEXT_LINES {
                continue;
            }
            let mark = if (first..=last).contains(&number) { ">>>" } else { "   " };
            text.push_str(&format!("{number:4} | {mark} {line}\n"));
        }
        text.push_str("--------------------\n");
        text
    }
}

fn explain(kind: &StepError) -> (String, Option<String>) {
    match kind {
        StepError::Exit(ExitStatus::Exited(127)) => ("did not complete: exit code 127".to_owned(), Some("127 is the shell's word for a command that it did not find: is the package installed in this stage?".to_owned())),
        StepError::Exit(ExitStatus::Exited(code)) => (format!("did not complete: exit code {code}"), None),
        StepError::Exit(ExitStatus::Killed { out_of_memory: true, .. }) => {
            ("did not complete: the kernel killed it, out of memory".to_owned(), Some("fewer steps at once (--jobs 1), or a higher --memory".to_owned()))
        }
        StepError::Exit(ExitStatus::Killed { signal, .. }) => {
            let name = nix::sys::signal::Signal::try_from(*signal).map_or("a signal", nix::sys::signal::Signal::as_str);
            (format!("did not complete: killed by {name} ({signal})"), None)
        }
        StepError::Execute(error @ ExecuteError::NotFound { .. }) => {
            (error.to_string(), Some("the image has no such program: a shell form needs a shell in the image, an exec form (RUN [\"…\"]) needs the program itself".to_owned()))
        }
        other => (chain(other), way_out(other)),
    }
}

/// A full disk under any error.
fn way_out(error: &StepError) -> Option<String> {
    match Failure::from_error(error) {
        Failure::Told { hint, .. } => hint,
        Failure::Shown(_) => None,
    }
}
