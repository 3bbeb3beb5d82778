//! Text to logical lines: directives, comments, continuations, heredocs.
//!
//! ```text
//! physical lines --join--> Line { text, map, heredocs } --split--> Command { keyword, flags, arguments }
//! ```
//! A [`Line`] is one instruction with its continuations joined; its `map` leads every byte of the joined text back to
//! the byte of the file that it came from, so that everything made of it keeps exact positions.
//!
//! The rules are those of BuildKit's parser (`frontend/dockerfile/parser`): comment lines vanish even within an
//! instruction, blank lines within one are tolerated (and reported), a line ends in a continuation when its last
//! character but blanks is the escape character and the one before is not.

use std::ops::Range;

use crate::diagnostic::{Diagnostic, Span};
use crate::expand::Expander;

/// Go's `bufio.MaxScanTokenSize`: BuildKit reads no physical line that is longer.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// `# syntax=`, `# escape=` and `# check=` at the top of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directives {
    pub escape: char,
    pub syntax: Option<Directive>,
    pub check: Option<Directive>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directive {
    pub value: String,
    pub span: Span,
}

/// One instruction, continuations joined, without its line end.
#[derive(Clone, Debug)]
pub struct Line {
    pub text: String,
    /// Where the pieces of `text` come from, in order.
    map: SourceMap,
    /// All of the instruction in the file, heredocs included.
    pub span: Span,
    /// Counted from one, both ends included.
    pub first_line: usize,
    pub last_line: usize,
    /// The comment lines right above, without `#`.
    pub comments: Vec<String>,
    pub heredocs: Vec<Heredoc>,
    /// The first blank line within a continuation.
    pub empty_continuation: Option<Span>,
}

#[derive(Clone, Debug)]
enum SourceMap {
    /// (offset in the text, offset in the file), ascending.
    Pieces(Vec<(usize, usize)>),
    /// An ONBUILD trigger from an image: everything is where the `FROM` is.
    Fixed(Span),
}

impl Line {
    /// The place in the file of a range of `text`.
    pub fn source(&self, range: Range<usize>) -> Span {
        match &self.map {
            SourceMap::Fixed(span) => *span,
            SourceMap::Pieces(pieces) => {
                let start = offset_in(pieces, range.start);
                // The end belongs to the piece of the last byte, not to the one that starts there.
                let end = if range.is_empty() { start } else { offset_in(pieces, range.end - 1) + 1 };
                Span::new(start, end)
            }
        }
    }
}

fn offset_in(pieces: &[(usize, usize)], offset: usize) -> usize {
    let index = pieces.partition_point(|(text, _)| *text <= offset).saturating_sub(1);
    pieces.get(index).map_or(0, |(text, source)| source + (offset - text))
}

/// `[fd]<<[-]WORD` and the lines up to `WORD`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    pub name: String,
    /// No part of the word was quoted.
    pub expand: bool,
    /// `<<-`: leading tabs do not count.
    pub chomp: bool,
    /// As written, line ends included.
    pub content: String,
    /// Of the content.
    pub span: Span,
}

impl Heredoc {
    /// The body as it is used: without leading tabs if `<<-` says so.
    pub fn body(&self) -> String {
        if !self.chomp {
            return self.content.clone();
        }
        self.content.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
    }
}

/// What the lexer found.
#[derive(Debug)]
pub struct Lexed {
    pub directives: Directives,
    pub lines: Vec<Line>,
    pub diagnostics: Vec<Diagnostic>,
}

pub fn lex(text: &str) -> Lexed {
    Lexer::new(text, None).run()
}

/// The text of an ONBUILD trigger that an image brought; everything in it is said to be at `place`.
pub fn lex_trigger(text: &str, place: Span, lines: (usize, usize)) -> Lexed {
    Lexer::new(text, Some((place, lines))).run()
}

/// A line of the file, without its end.
#[derive(Clone, Copy)]
struct Physical<'a> {
    text: &'a str,
    start: usize,
    /// Where the next line starts.
    next: usize,
    number: usize,
}

struct Lexer<'a> {
    text: &'a str,
    offset: usize,
    number: usize,
    fixed: Option<(Span, (usize, usize))>,
    directives: Directives,
    directive_zone: bool,
    shebang: bool,
    escape_seen: bool,
    comments: Vec<String>,
    lines: Vec<Line>,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Lexer<'a> {
    fn new(text: &'a str, fixed: Option<(Span, (usize, usize))>) -> Lexer<'a> {
        Lexer {
            text,
            offset: if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 },
            number: 0,
            fixed,
            directives: Directives { escape: '\\', syntax: None, check: None },
            directive_zone: true,
            shebang: false,
            escape_seen: false,
            comments: Vec::new(),
            lines: Vec::new(),
            diagnostics: Vec::new(),
        }
    }

    fn run(mut self) -> Lexed {
        while let Some(line) = self.physical() {
            self.logical(line);
        }
        Lexed { directives: self.directives, lines: self.lines, diagnostics: self.diagnostics }
    }

    fn physical(&mut self) -> Option<Physical<'a>> {
        let rest = &self.text[self.offset..];
        if rest.is_empty() {
            return None;
        }
        let length = rest.find('\n').map_or(rest.len(), |end| end + 1);
        let start = self.offset;
        self.offset += length;
        self.number += 1;
        if length > LINE_BYTES_MAX {
            let span = Span::new(start, start);
            let message = format!("the line is longer than {} bytes", LINE_BYTES_MAX - 1);
            self.diagnostics.push(Diagnostic::error(span, message).hint("put the data into a file and COPY it"));
        }
        let text = rest[..length].trim_end_matches(['\r', '\n']);
        Some(Physical { text, start, next: self.offset, number: self.number })
    }

    /// Starts an instruction at `first`, unless it is a comment or blank.
    fn logical(&mut self, first: Physical<'a>) {
        let text = first.text.trim_start();
        let start = first.start + (first.text.len() - text.len());
        let is_directive = self.directive(text, start, first.number);
        if let Some(comment) = text.strip_prefix('#') {
            if !is_directive {
                self.comment(comment);
            }
            return;
        }
        if text.is_empty() {
            return;
        }
        let comments = std::mem::take(&mut self.comments);
        let mut line = Line {
            text: String::new(),
            map: SourceMap::Pieces(Vec::new()),
            span: Span::new(start, start + text.len()),
            first_line: first.number,
            last_line: first.number,
            comments,
            heredocs: Vec::new(),
            empty_continuation: None,
        };
        let continues = self.append(&mut line, text, start);
        self.continue_line(&mut line, continues);
        self.heredocs(&mut line);
        line.span = Span::new(start, line.span.end);
        if let Some((place, (first_line, last_line))) = self.fixed {
            line = Line { map: SourceMap::Fixed(place), span: place, first_line, last_line, ..line };
        }
        self.lines.push(line);
    }

    fn comment(&mut self, comment: &str) {
        match comment.trim() {
            "" => self.comments.clear(),
            comment => self.comments.push(comment.to_owned()),
        }
    }

    /// Takes the next lines for as long as the last one said that it continues.
    fn continue_line(&mut self, line: &mut Line, mut continues: bool) {
        while continues {
            let Some(next) = self.physical() else { break };
            let trimmed = next.text.trim_start();
            if trimmed.starts_with('#') {
                continue;
            }
            if trimmed.is_empty() {
                line.empty_continuation.get_or_insert(Span::new(next.start, next.next.min(self.text.len())));
                continue;
            }
            line.last_line = next.number;
            continues = self.append(line, next.text, next.start);
        }
    }

    /// Adds a physical line's text, and says whether it ends in a continuation.
    fn append(&mut self, line: &mut Line, text: &str, start: usize) -> bool {
        let (kept, continues) = strip_continuation(text, self.directives.escape);
        if let SourceMap::Pieces(pieces) = &mut line.map {
            pieces.push((line.text.len(), start));
        }
        line.text.push_str(kept);
        line.span.end = start + text.len();
        continues
    }

    /// Reads `# key=value`; the zone of directives ends with the first line that is none.
    fn directive(&mut self, text: &str, start: usize, number: usize) -> bool {
        if !self.directive_zone || self.fixed.is_some() {
            return false;
        }
        if number == 1 && text.starts_with("#!") {
            self.shebang = true;
            return true;
        }
        self.directive_zone = false;
        let Some((key, value)) = text.strip_prefix('#').and_then(key_value) else { return false };
        let span = Span::new(start, start + text.len());
        let key = key.to_ascii_lowercase();
        let duplicate = match key.as_str() {
            "syntax" => self.directives.syntax.is_some(),
            "check" => self.directives.check.is_some(),
            "escape" => self.escape_seen,
            _ => return false,
        };
        self.directive_zone = true;
        if duplicate {
            let message = format!("only one {key} parser directive can be used");
            self.diagnostics.push(Diagnostic::error(span, message).hint("remove this one"));
            return true;
        }
        let directive = Directive { value: value.to_owned(), span };
        match key.as_str() {
            "syntax" => self.directives.syntax = Some(directive),
            "check" => self.directives.check = Some(directive),
            _ => self.set_escape(&directive),
        }
        true
    }

    fn set_escape(&mut self, directive: &Directive) {
        self.escape_seen = true;
        match directive.value.as_str() {
            // BuildKit reads no escape directive after an interpreter line.
            "\\" | "`" if self.shebang => {}
            "\\" => self.directives.escape = '\\',
            "`" => self.directives.escape = '`',
            other => {
                let message = format!("invalid escape character {other:?}");
                self.diagnostics
                    .push(Diagnostic::error(directive.span, message).hint("it can be \"\\\" (the default) or \"`\""));
            }
        }
    }

    /// Takes the bodies of the heredocs that the line announces.
    fn heredocs(&mut self, line: &mut Line) {
        if !line.text.contains("<<") || !may_hold_heredocs(&line.text, self.directives.escape) {
            return;
        }
        for word in heredoc_words(&line.text) {
            let Some(mut heredoc) = parse_heredoc(&word) else { continue };
            let start = self.offset;
            let mut closed = false;
            while let Some(next) = self.physical() {
                line.last_line = next.number;
                let end = if heredoc.chomp { next.text.trim_start_matches('\t') } else { next.text };
                if end == heredoc.name {
                    heredoc.span = Span::new(start, next.start);
                    line.span.end = next.start + next.text.len();
                    closed = true;
                    break;
                }
            }
            if !closed {
                heredoc.span = Span::new(start, self.text.len());
                let name = &heredoc.name;
                let message = format!("unterminated heredoc: no line {name:?} follows");
                let hint = format!("end the text with a line that is just {name}");
                self.diagnostics.push(Diagnostic::error(line.source(0..line.text.len()), message).hint(hint));
            }
            heredoc.content = self.text[heredoc.span.start..heredoc.span.end].to_owned();
            line.heredocs.push(heredoc);
        }
    }
}

/// `// syntax = image` at the top, or `{"syntax": "image"}`: files for other frontends name them so.
pub fn other_syntax(text: &str) -> Option<Directive> {
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    if rest.starts_with("#!") {
        rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
    }
    let start = text.len() - rest.len();
    if rest.starts_with('{') {
        let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(rest).ok()?;
        let value = json.get("syntax")?.as_str()?.to_owned();
        return Some(Directive { value, span: Span::new(start, start + 1) });
    }
    let mut at = start;
    for line in rest.split_inclusive('\n') {
        let (key, value) = key_value(line.strip_prefix("//")?.trim_end())?;
        let span = Span::new(at, at + line.trim_end().len());
        match key.to_ascii_lowercase().as_str() {
            "syntax" => return Some(Directive { value: value.to_owned(), span }),
            "escape" | "check" => at += line.len(),
            _ => return None,
        }
    }
    None
}

/// `key = value` after the comment mark, as BuildKit's directives are written.
pub(crate) fn key_value(text: &str) -> Option<(&str, &str)> {
    let (key, value) = text.split_once('=')?;
    let (key, value) = (key.trim_start().trim_end(), value.trim());
    let named = key.starts_with(|c: char| c.is_ascii_alphabetic()) && key.bytes().all(|b| b.is_ascii_alphanumeric());
    (named && !value.is_empty()).then_some((key, value))
}

/// The text without a continuation mark at its end, and whether there was one.
fn strip_continuation(text: &str, escape: char) -> (&str, bool) {
    let Some(kept) = text.trim_end_matches([' ', '\t']).strip_suffix(escape) else { return (text, false) };
    if kept.ends_with(escape) { (text, false) } else { (kept, true) }
}

/// `RUN`, `COPY`, `ADD` in another form than JSON, also behind `ONBUILD`.
fn may_hold_heredocs(text: &str, escape: char) -> bool {
    let mut command = split_command(text, 0..text.len(), escape);
    if command.name(text).eq_ignore_ascii_case("onbuild") {
        command = split_command(text, command.arguments, escape);
    }
    let name = command.name(text);
    ["run", "copy", "add"].iter().any(|known| name.eq_ignore_ascii_case(known))
        && !matches!(json_strings(&text[command.arguments]), Json::Strings(_))
}

/// The words of a line, quotes and escapes kept, with `<<` bound to the word after it. None if the quotes do not match.
fn heredoc_words(text: &str) -> Vec<String> {
    let words = Expander { keep_quotes: true, keep_escapes: true, keep_unset: true, ..Expander::new('\\') };
    let no_variables: &[(String, String)] = &[];
    words.expand(text, no_variables).map(|expansion| expansion.words).unwrap_or_default()
}

/// Reads `[fd]<<[-]WORD`; `None` for any other word.
pub fn parse_heredoc(word: &str) -> Option<Heredoc> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let rest = rest.trim_start();
    if rest.is_empty() || rest.contains('<') {
        return None;
    }
    let no_variables: &[(String, String)] = &[];
    let plain = Expander { keep_unset: true, ..Expander::new('\\') };
    let quoted = Expander { keep_quotes: true, ..plain };
    let name = one_word(plain.expand(rest, no_variables).ok()?.words)?;
    let raw = one_word(quoted.expand(rest, no_variables).ok()?.words)?;
    let quotes = |word: &str| word.matches(['\'', '"']).count();
    let expand = quotes(&name) == quotes(&raw);
    Some(Heredoc { name, expand, chomp, content: String::new(), span: Span::default() })
}

fn one_word(words: Vec<String>) -> Option<String> {
    <[String; 1]>::try_from(words).ok().map(|[word]| word)
}

/// An instruction's line cut into its parts, by ranges of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub keyword: Range<usize>,
    /// The leading words that start with `--`, unquoted.
    pub flags: Vec<(String, Range<usize>)>,
    /// What follows, trimmed.
    pub arguments: Range<usize>,
}

impl Command {
    pub fn name<'a>(&self, text: &'a str) -> &'a str {
        &text[self.keyword.clone()]
    }
}

/// Cuts the part `range` of a joined line.
pub fn split_command(text: &str, range: Range<usize>, escape: char) -> Command {
    let range = trim(text, range);
    let body = &text[range.clone()];
    let blank = |c: char| matches!(c, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ');
    let Some(end) = body.find(blank) else {
        return Command { keyword: range.clone(), flags: Vec::new(), arguments: range.end..range.end };
    };
    let keyword = range.start..range.start + end;
    let (flags, start) = leading_flags(text, keyword.end..range.end, escape);
    Command { keyword, flags, arguments: trim(text, start..range.end) }
}

fn trim(text: &str, range: Range<usize>) -> Range<usize> {
    let body = &text[range.clone()];
    let start = range.start + (body.len() - body.trim_start().len());
    start..start + body.trim().len()
}

/// The flags at the start of a range and where the rest begins; `--` alone ends them.
fn leading_flags(text: &str, range: Range<usize>, escape: char) -> (Vec<(String, Range<usize>)>, usize) {
    let mut flags = Vec::new();
    let mut at = range.start;
    loop {
        at = trim(text, at..range.end).start;
        if !text[at..range.end].starts_with("--") {
            return (flags, at);
        }
        let (word, end) = flag_word(&text[at..range.end], escape);
        let place = at..at + end;
        at = place.end;
        if word == "--" {
            return (flags, at);
        }
        if !word.is_empty() {
            flags.push((word, place));
        }
    }
}

/// One word, quotes and escapes resolved, and how many bytes it took.
fn flag_word(text: &str, escape: char) -> (String, usize) {
    let mut word = String::new();
    let mut quote = None;
    let mut input = text.char_indices();
    while let Some((at, c)) = input.next() {
        match (c, quote) {
            (c, None) if c.is_whitespace() => return (word, at),
            ('\'' | '"', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            (c, _) if c == escape => word.extend(input.next().map(|(_, c)| c)),
            (c, _) => word.push(c),
        }
    }
    (word, text.len())
}

/// Whether arguments are a JSON array.
#[derive(Debug, PartialEq, Eq)]
pub enum Json {
    /// No: the shell form.
    No,
    /// An array of something else than strings, which is an error.
    NotStrings,
    Strings(Vec<(String, Range<usize>)>),
}

/// Reads a JSON array of strings, with the place of each within `text`.
pub fn json_strings(text: &str) -> Json {
    let body = text.trim_start();
    if !body.starts_with('[') {
        return Json::No;
    }
    let Ok(raw) = serde_json::from_str::<Vec<&serde_json::value::RawValue>>(body) else { return Json::No };
    let mut strings = Vec::with_capacity(raw.len());
    let mut from = text.len() - body.len();
    for value in raw {
        let source = value.get();
        // The values are parts of the text, in order.
        let start = text[from..].find(source).map_or(from, |at| from + at);
        from = start + source.len();
        let Ok(string) = serde_json::from_str::<String>(source) else { return Json::NotStrings };
        strings.push((string, start..from));
    }
    Json::Strings(strings)
}

/// Splits at runs of blanks; quotes mean nothing.
pub fn blank_words(text: &str, range: Range<usize>) -> Vec<Range<usize>> {
    let blank = |c: char| matches!(c, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ');
    let mut words = Vec::new();
    let mut at = range.start;
    for word in text[range].split(blank) {
        if !word.is_empty() {
            words.push(at..at + word.len());
        }
        at += word.len() + 1;
    }
    words
}

/// Splits at blanks outside quotes and escapes, which stay in the words (`ENV`, `LABEL`, `ARG`).
pub fn quoted_words(text: &str, range: Range<usize>, escape: char) -> Vec<(String, Range<usize>)> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut start = None;
    let mut quote = None;
    let body = &text[range.clone()];
    let mut input = body.char_indices();
    while let Some((at, c)) = input.next() {
        if quote.is_none() && c.is_whitespace() {
            if let Some(start) = start.take() {
                words.push((std::mem::take(&mut word), range.start + start..range.start + at));
            }
            continue;
        }
        start.get_or_insert(at);
        match quote {
            None if matches!(c, '\'' | '"') => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
        // Nothing can be escaped within single quotes; an escape at the very end counts for nothing.
        if c == escape && quote != Some('\'') {
            let Some((_, next)) = input.next() else { break };
            word.push(c);
            word.push(next);
        } else {
            word.push(c);
        }
    }
    if let Some(start) = start.filter(|_| !word.is_empty()) {
        words.push((word, range.start + start..range.end));
    }
    words
}
