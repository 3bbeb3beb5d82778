//! The `--flags` of instructions: known or not, with a value or not, once or often; and `--mount`'s fields.

use crate::diagnostic::{Diagnostic, Span};
use crate::instruction::Word;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// `--link`, `--link=false`.
    Bool,
    One,
    Many,
}

/// The flags an instruction knows.
pub type Known = &'static [(&'static str, Arity)];

pub const NONE: Known = &[];
pub const FROM: Known = &[("platform", Arity::One)];
pub const RUN: Known =
    &[("mount", Arity::Many), ("network", Arity::One), ("security", Arity::One), ("device", Arity::Many)];
pub const COPY: Known = &[
    ("chown", Arity::One),
    ("from", Arity::One),
    ("chmod", Arity::One),
    ("link", Arity::Bool),
    ("exclude", Arity::Many),
    ("parents", Arity::Bool),
];
pub const ADD: Known = &[
    ("chown", Arity::One),
    ("chmod", Arity::One),
    ("link", Arity::Bool),
    ("keep-git-dir", Arity::Bool),
    ("checksum", Arity::One),
    ("unpack", Arity::Bool),
    ("exclude", Arity::Many),
];
pub const HEALTHCHECK: Known = &[
    ("interval", Arity::One),
    ("timeout", Arity::One),
    ("start-period", Arity::One),
    ("start-interval", Arity::One),
    ("retries", Arity::One),
];

/// The flags of one instruction, checked against what it knows.
#[derive(Debug, Default)]
pub struct Flags {
    found: Vec<(&'static str, Word)>,
}

impl Flags {
    /// Reads `--name[=value]` words; every mistake goes to `diagnostics`.
    pub fn read(words: &[Word], known: Known, instruction: &str, diagnostics: &mut Vec<Diagnostic>) -> Flags {
        let mut flags = Flags::default();
        for word in words {
            if let Err(diagnostic) = flags.add(word, known, instruction) {
                diagnostics.push(diagnostic);
            }
        }
        flags
    }

    fn add(&mut self, word: &Word, known: Known, instruction: &str) -> Result<(), Diagnostic> {
        let body = word.text.strip_prefix("--").unwrap_or(&word.text);
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (body, None),
        };
        let Some((name, arity)) = known.iter().find(|(known, _)| *known == name) else {
            return Err(unknown(word.span, name, known, instruction));
        };
        if *arity != Arity::Many && self.found.iter().any(|(found, _)| found == name) {
            return Err(Diagnostic::error(word.span, format!("duplicate flag --{name}")).hint("it can be given once"));
        }
        let value = match (arity, value.map(|value| (value, value.to_ascii_lowercase()))) {
            (Arity::Bool, None) => "true",
            (Arity::Bool, Some((_, lower))) if lower == "true" => "true",
            (Arity::Bool, Some((_, lower))) if lower == "false" => "false",
            (Arity::Bool, Some((value, _))) => {
                let message = format!("--{name} is true or false, not {value:?}");
                return Err(Diagnostic::error(word.span, message).hint(format!("write `--{name}` or `--{name}=false`")));
            }
            (_, None) => {
                let message = format!("missing a value on flag --{name}");
                return Err(Diagnostic::error(word.span, message).hint(format!("write `--{name}=…`")));
            }
            (_, Some(_)) => value.unwrap_or_default(),
        };
        // The value's own place, if the word stands in the file as it reads.
        let start = if word.span.end - word.span.start == word.text.len() { word.text.len() - value.len() } else { 0 };
        let start = if *arity == Arity::Bool { 0 } else { start };
        let span = Span::new(word.span.start + start, word.span.end);
        self.found.push((name, Word { text: value.to_owned(), span }));
        Ok(())
    }

    pub fn one(&self, name: &str) -> Option<Word> {
        self.found.iter().find(|(found, _)| *found == name).map(|(_, word)| word.clone())
    }

    pub fn many(&self, name: &str) -> Vec<Word> {
        self.found.iter().filter(|(found, _)| *found == name).map(|(_, word)| word.clone()).collect()
    }

    pub fn boolean(&self, name: &str) -> Option<bool> {
        self.one(name).map(|word| word.text == "true")
    }
}

fn unknown(span: Span, name: &str, known: Known, instruction: &str) -> Diagnostic {
    let diagnostic = Diagnostic::error(span, format!("unknown flag --{name} for {instruction}"));
    if known.is_empty() {
        return diagnostic.hint(format!("{instruction} takes no flags"));
    }
    match crate::diagnostic::nearest(name, known.iter().map(|(name, _)| *name)) {
        Some(near) => diagnostic.hint(format!("did you mean `--{near}`?")),
        None => {
            let names: Vec<String> = known.iter().map(|(name, _)| format!("--{name}")).collect();
            diagnostic.hint(format!("{instruction} knows {}", names.join(", ")))
        }
    }
}

/// The fields of one line of comma separated values (RFC 4180): a field may stand in double quotes.
pub fn comma_separated(text: &str) -> Result<Vec<String>, &'static str> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        let field = match rest.strip_prefix('"') {
            Some(quoted) => {
                let (field, after) = quoted_field(quoted)?;
                rest = after;
                field
            }
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                let (field, after) = rest.split_at(end);
                if field.contains('"') {
                    return Err("a quote within a field: put the whole field in quotes");
                }
                rest = after;
                field.to_owned()
            }
        };
        fields.push(field);
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None if rest.is_empty() => return Ok(fields),
            None => return Err("text after a closing quote"),
        }
    }
}

fn quoted_field(text: &str) -> Result<(String, &str), &'static str> {
    let mut field = String::new();
    let mut input = text.char_indices().peekable();
    while let Some((at, c)) = input.next() {
        match c {
            '"' if input.next_if(|(_, next)| *next == '"').is_some() => field.push('"'),
            '"' => return Ok((field, &text[at + 1..])),
            c => field.push(c),
        }
    }
    Err("a quote is not closed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comma_separated_fields() {
        let cases: &[(&str, Option<&[&str]>)] = &[
            ("a=b,c", Some(&["a=b", "c"])),
            ("", Some(&[""])),
            ("a,,b", Some(&["a", "", "b"])),
            (r#""a,b",c"#, Some(&["a,b", "c"])),
            (r#""a""b""#, Some(&["a\"b"])),
            (r#""a"#, None),
            (r#"a"b"#, None),
            (r#""a"b"#, None),
        ];
        for (text, expect) in cases {
            let got = comma_separated(text).ok();
            let expect = expect.map(|fields| fields.iter().map(|field| (*field).to_owned()).collect::<Vec<_>>());
            assert_eq!(got, expect, "{text}");
        }
    }
}
