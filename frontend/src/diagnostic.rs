//! What is wrong with a Dockerfile, as data: where, what, and what to write instead.
//!
//! ```text
//! Dockerfile:3:12: error: unknown flag --form
//!    3 | COPY --form=build /app /app
//!      |      ^^^^^^^^^^^^
//! help: did you mean `--from`?
//! ```
//! A [`Diagnostic`] knows byte offsets only; [`Lines`] turns them into lines and columns (both counted from one,
//! columns in characters), and [`render`] prints the picture above.

use std::fmt::Write as _;

use serde::Serialize;

/// Bytes `start..end` of the Dockerfile's text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Span {
    pub start: usize,
    pub end: usize,
}

impl Span {
    pub fn new(start: usize, end: usize) -> Span {
        Span { start, end: end.max(start) }
    }

    /// The smallest span that holds both.
    pub fn to(self, other: Span) -> Span {
        Span::new(self.start.min(other.start), self.end.max(other.end))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    pub severity: Severity,
    /// The check rule that found it (`StageNameCasing`), where one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'static str>,
    /// A lower-case fragment; a rule's own text where `rule` is set.
    pub message: String,
    pub span: Span,
    /// What to do or write instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Diagnostic {
    pub fn error(span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic { severity: Severity::Error, rule: None, message: message.into(), span, hint: None }
    }

    pub fn warning(span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic { severity: Severity::Warning, ..Diagnostic::error(span, message) }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Diagnostic {
        self.hint = Some(hint.into());
        self
    }

    /// Adds "did you mean …?" if one of `options` is near to `word`.
    pub fn suggest<'a>(self, word: &str, options: impl IntoIterator<Item = &'a str>) -> Diagnostic {
        match nearest(word, options) {
            Some(option) => self.hint(format!("did you mean `{option}`?")),
            None => self,
        }
    }

    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// Nothing farther than this many edits is suggested (as BuildKit has it).
const SUGGESTION_DISTANCE_MAX: usize = 2;

/// The option nearest to `word`, not counting case, unless it is `word` itself.
pub fn nearest<'a>(word: &str, options: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    let mut best: Option<(usize, &str)> = None;
    for option in options {
        if option == word {
            return None;
        }
        let candidate = option.to_lowercase();
        // Without this, short words are "near" to every other short word.
        let limit = SUGGESTION_DISTANCE_MAX.min(candidate.len().max(lower.len()) * 2 / 3);
        if candidate.len().abs_diff(lower.len()) > limit {
            continue;
        }
        let distance = edit_distance(&lower, &candidate);
        if distance <= limit && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, option));
        }
    }
    best.map(|(_, option)| option)
}

/// Levenshtein's distance, in characters, where two swapped neighbours count as one edit; linear memory.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let (mut before, mut last) = (Vec::new(), (0..=b.len()).collect::<Vec<usize>>());
    let mut previous = None;
    for (i, x) in a.chars().enumerate() {
        let mut row = Vec::with_capacity(last.len());
        row.push(i + 1);
        for (j, y) in b.iter().enumerate() {
            let mut least = (last[j] + usize::from(x != *y)).min(last[j + 1] + 1).min(row[j] + 1);
            if j > 0 && previous == Some(*y) && b[j - 1] == x {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
        (before, last, previous) = (last, row, Some(x));
    }
    last[b.len()]
}

/// The line starts of a text: byte offsets to lines and columns.
pub struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

/// Counted from one; columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl<'a> Lines<'a> {
    pub fn new(text: &'a str) -> Lines<'a> {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Lines { text, starts }
    }

    pub fn position(&self, offset: usize) -> Position {
        let offset = floor_boundary(self.text, offset);
        let line = self.starts.partition_point(|start| *start <= offset);
        let start = self.starts[line - 1];
        Position { line, column: self.text[start..offset].chars().count() + 1 }
    }

    /// A line's text without its end; empty for a line that is not there.
    pub fn line(&self, number: usize) -> &'a str {
        let Some(start) = number.checked_sub(1).and_then(|index| self.starts.get(index)) else { return "" };
        let end = self.starts.get(number).map_or(self.text.len(), |next| next - 1);
        self.text[*start..end].trim_end_matches('\r')
    }
}

fn floor_boundary(text: &str, offset: usize) -> usize {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    offset
}

/// Source lines longer than this are cut where they are shown.
const SHOWN_COLUMNS_MAX: usize = 160;

/// `file:line:column`, the line, a caret and the hint; ends with a line feed.
pub fn render(diagnostic: &Diagnostic, file: &str, lines: &Lines<'_>) -> String {
    let at = lines.position(diagnostic.span.start);
    let severity = match (diagnostic.severity, diagnostic.rule) {
        (Severity::Error, None) => "error".to_owned(),
        (Severity::Warning, None) => "warning".to_owned(),
        (Severity::Error, Some(rule)) => format!("error[{rule}]"),
        (Severity::Warning, Some(rule)) => format!("warning[{rule}]"),
    };
    let mut out = format!("{file}:{}:{}: {severity}: {}\n", at.line, at.column, diagnostic.message);
    let source = lines.line(at.line);
    if !source.trim().is_empty() && at.column <= SHOWN_COLUMNS_MAX {
        let number = at.line.to_string();
        let blank = " ".repeat(number.len().max(4));
        let shown: String = source.chars().take(SHOWN_COLUMNS_MAX).collect();
        // Tabs stay tabs, so that the caret stands under its word whatever their width.
        let indent: String = shown.chars().take(at.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        let end = lines.position(diagnostic.span.end);
        let last = if end.line == at.line { end.column } else { source.trim_end().chars().count() + 1 };
        let width = last.min(SHOWN_COLUMNS_MAX + 1).saturating_sub(at.column).max(1);
        write_line(&mut out, format_args!("{number:>4} | {shown}"));
        write_line(&mut out, format_args!("{blank} | {indent}{}", "^".repeat(width)));
    }
    if let Some(hint) = &diagnostic.hint {
        write_line(&mut out, format_args!("help: {hint}"));
    }
    out
}

fn write_line(out: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(out, "{line}").expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_line_column_caret_and_help() {
        let text = "FROM a\r\n\tCOPY --form=b ü /\n";
        let lines = Lines::new(text);
        let at = text.find("--form").unwrap();
        let diagnostic =
            Diagnostic::error(Span::new(at, at + 8), "unknown flag --form").suggest("form", ["from", "link"]);
        let expect = "Dockerfile:2:7: error: unknown flag --form\n   2 | \tCOPY --form=b ü /\n     | \t     ^^^^^^^^\nhelp: did you mean `from`?\n";
        assert_eq!(render(&diagnostic, "Dockerfile", &lines), expect);
        let slash = text.rfind('/').unwrap();
        assert_eq!(lines.position(slash), Position { line: 2, column: 18 }, "columns are characters");
        assert_eq!(lines.position(9999).line, 3);
    }

    #[test]
    fn suggests_what_is_near() {
        for (word, expect) in [
            ("biulder", Some("builder")),
            ("Builder", Some("builder")),
            ("builder", None),
            ("zzz", None),
            ("a", None),
            ("test", Some("tests")),
        ] {
            assert_eq!(nearest(word, ["builder", "tests", "b"]), expect, "{word}");
        }
    }
}
