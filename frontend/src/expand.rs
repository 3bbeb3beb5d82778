//! The builder's own small shell: `$v`, `${v}`, `${v:-w}`, `${v+w}`, `${v?m}`, `${v#p}`, `${v%%p}`, `${v/p/r}`, quotes.
//!
//! POSIX "Shell Command Language" 2.6.2 in spirit, BuildKit's frontend in every detail that differs: patterns know
//! `*`, `?` and `\` only; `${}`, `${:x}` and `${{x}` are errors; `<<` is passed through so that heredocs survive.
//!
//! Recursion is bounded by [`NESTING_MAX`], results by [`Expander::word`]'s limit: a file cannot double a value a
//! hundred times.

use std::collections::BTreeSet;
use std::iter::Peekable;
use std::str::Chars;

use regex::Regex;

/// How deep `${a:-${b:-…}}` may nest.
const NESTING_MAX: usize = 64;
/// Linux: `MAX_ARG_STRLEN`, the longest environment string that a program can be given.
const RESULT_MAX: usize = 128 * 1024;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    #[error("missing closing {0:?}")]
    Unclosed(char),
    #[error("bad substitution: a name must follow \"${{\"")]
    BadSubstitution,
    #[error("unsupported modifier {0:?} in substitution")]
    Modifier(String),
    #[error("invalid pattern {0:?} in substitution")]
    Pattern(String),
    #[error("{name}: {message}")]
    Required { name: String, message: String },
    #[error("substitutions are nested deeper than {NESTING_MAX}")]
    Nesting,
    #[error("the expanded text is longer than {0} bytes")]
    TooLong(usize),
}

/// Where values come from.
pub trait Variables {
    fn get(&self, name: &str) -> Option<&str>;
}

impl Variables for [(String, String)] {
    fn get(&self, name: &str) -> Option<&str> {
        self.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// What a word became.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expansion {
    pub text: String,
    /// The text split at unquoted blanks, also those that came from values.
    pub words: Vec<String>,
    /// The names that had a value.
    pub used: BTreeSet<String>,
    /// The names that had none.
    pub unset: BTreeSet<String>,
}

/// How to read a word.
#[derive(Clone, Copy, Debug)]
pub struct Expander {
    pub escape: char,
    /// Quotes stay in the result.
    pub keep_quotes: bool,
    /// Escape characters stay in the result.
    pub keep_escapes: bool,
    /// Quotes are ordinary characters (heredoc bodies).
    pub ignore_quotes: bool,
    /// A variable without a value stays as written.
    pub keep_unset: bool,
}

impl Expander {
    pub fn new(escape: char) -> Expander {
        Expander { escape, keep_quotes: false, keep_escapes: false, ignore_quotes: false, keep_unset: false }
    }

    pub fn expand<V: Variables + ?Sized>(&self, text: &str, variables: &V) -> Result<Expansion, ExpandError> {
        let limit = RESULT_MAX + text.len().saturating_mul(4);
        let mut run = Run {
            options: *self,
            keep_escapes: self.keep_escapes,
            input: text.chars().peekable(),
            variables,
            depth: 0,
            limit,
            produced: 0,
            used: BTreeSet::new(),
            unset: BTreeSet::new(),
        };
        let (text, words) = run.until(None, self.keep_escapes)?;
        Ok(Expansion { text, words, used: run.used, unset: run.unset })
    }
}

struct Run<'a, V: ?Sized> {
    options: Expander,
    keep_escapes: bool,
    input: Peekable<Chars<'a>>,
    variables: &'a V,
    depth: usize,
    limit: usize,
    produced: usize,
    used: BTreeSet<String>,
    unset: BTreeSet<String>,
}

/// Collects the words of the outermost text.
#[derive(Default)]
struct Words {
    done: Vec<String>,
    current: String,
}

impl Words {
    fn character(&mut self, c: char) {
        if !c.is_whitespace() {
            self.current.push(c);
        } else if !self.current.is_empty() {
            self.done.push(std::mem::take(&mut self.current));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.done.push(self.current);
        }
        self.done
    }
}

impl<V: Variables + ?Sized> Run<'_, V> {
    /// Reads to `stop`, which is taken, or to the end of the input.
    fn until(&mut self, stop: Option<char>, keep_escapes: bool) -> Result<(String, Vec<String>), ExpandError> {
        self.depth += 1;
        if self.depth > NESTING_MAX {
            return Err(ExpandError::Nesting);
        }
        let outer = std::mem::replace(&mut self.keep_escapes, keep_escapes);
        let mut result = String::new();
        let mut words = Words::default();
        let mut closed = stop.is_none();
        while let Some(&c) = self.input.peek() {
            if Some(c) == stop {
                self.input.next();
                closed = true;
                break;
            }
            self.piece(c, &mut result, &mut words)?;
        }
        self.depth -= 1;
        self.keep_escapes = outer;
        match stop {
            Some(stop) if !closed => Err(ExpandError::Unclosed(stop)),
            _ => Ok((result, words.finish())),
        }
    }

    fn piece(&mut self, c: char, result: &mut String, words: &mut Words) -> Result<(), ExpandError> {
        let raw = match c {
            '$' => {
                let value = self.dollar()?;
                self.count(value.len())?;
                value.chars().for_each(|c| words.character(c));
                result.push_str(&value);
                return Ok(());
            }
            '<' => self.heredoc_mark(),
            '\'' if !self.options.ignore_quotes => self.single_quoted()?,
            '"' if !self.options.ignore_quotes => self.double_quoted()?,
            _ => {
                self.input.next();
                if c != self.options.escape {
                    words.character(c);
                    result.push(c);
                    return Ok(());
                }
                let mut raw = String::new();
                if self.keep_escapes {
                    raw.push(c);
                }
                raw.extend(self.input.next());
                raw
            }
        };
        words.current.push_str(&raw);
        result.push_str(&raw);
        Ok(())
    }

    /// Counts what substitutions add, before it is kept.
    fn count(&mut self, added: usize) -> Result<(), ExpandError> {
        self.produced = self.produced.saturating_add(added);
        if self.produced > self.limit {
            return Err(ExpandError::TooLong(self.limit));
        }
        Ok(())
    }

    /// `<<` and the blanks after it belong to the word that follows; whether it is a heredoc is decided elsewhere.
    fn heredoc_mark(&mut self) -> String {
        let mut mark = String::from('<');
        self.input.next();
        if self.input.next_if_eq(&'<').is_some() {
            mark.push('<');
            while let Some(blank) = self.input.next_if(|c| matches!(c, '\t' | '\r' | ' ')) {
                mark.push(blank);
            }
        }
        mark
    }

    fn single_quoted(&mut self) -> Result<String, ExpandError> {
        let mut result = String::new();
        result.extend(self.input.next().filter(|_| self.options.keep_quotes));
        loop {
            match self.input.next() {
                None => return Err(ExpandError::Unclosed('\'')),
                Some('\'') => {
                    result.extend(self.options.keep_quotes.then_some('\''));
                    return Ok(result);
                }
                Some(c) => result.push(c),
            }
        }
    }

    fn double_quoted(&mut self) -> Result<String, ExpandError> {
        let mut result = String::new();
        result.extend(self.input.next().filter(|_| self.options.keep_quotes));
        loop {
            let Some(&c) = self.input.peek() else { return Err(ExpandError::Unclosed('"')) };
            match c {
                '"' => {
                    self.input.next();
                    result.extend(self.options.keep_quotes.then_some('"'));
                    return Ok(result);
                }
                '$' => {
                    let value = self.dollar()?;
                    self.count(value.len())?;
                    result.push_str(&value);
                }
                _ if c == self.options.escape => self.escaped_in_quotes(&mut result),
                _ => result.extend(self.input.next()),
            }
        }
    }

    /// Within double quotes only `"`, `$` and the escape character itself can be escaped.
    fn escaped_in_quotes(&mut self, result: &mut String) {
        let escape = self.options.escape;
        self.input.next();
        if self.keep_escapes {
            result.push(escape);
        }
        match self.input.peek() {
            None => {}
            Some(&next) if matches!(next, '"' | '$') || next == escape => result.extend(self.input.next()),
            Some(_) => result.push(escape),
        }
    }

    fn dollar(&mut self) -> Result<String, ExpandError> {
        self.input.next();
        if self.input.next_if_eq(&'{').is_none() {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(match self.value(&name) {
                None if self.options.keep_unset => format!("${name}"),
                value => value.unwrap_or_default(),
            });
        }
        match self.input.peek() {
            None => return Err(ExpandError::Unclosed('}')),
            Some('{' | '}' | ':') => return Err(ExpandError::BadSubstitution),
            Some(_) => {}
        }
        let name = self.name();
        match self.input.next() {
            None => Err(ExpandError::Unclosed('}')),
            Some('}') => Ok(match self.value(&name) {
                None if self.options.keep_unset => format!("${{{name}}}"),
                value => value.unwrap_or_default(),
            }),
            Some(':') => match self.input.next() {
                Some(c @ ('-' | '+' | '?')) => self.conditional(&name, c, true),
                Some(c) => Err(ExpandError::Modifier(format!(":{c}"))),
                None => Err(ExpandError::Unclosed('}')),
            },
            Some(c @ ('-' | '+' | '?')) => self.conditional(&name, c, false),
            Some(c @ ('#' | '%')) => self.trim(&name, c),
            Some('/') => self.replace(&name),
            Some(c) => Err(ExpandError::Modifier(c.to_string())),
        }
    }

    /// `${v-w}`, `${v+w}`, `${v?w}`; with a colon an empty value counts as none.
    fn conditional(&mut self, name: &str, modifier: char, colon: bool) -> Result<String, ExpandError> {
        let (word, _) = self.until(Some('}'), false)?;
        let value = self.value(name);
        if value.is_none() && self.options.keep_unset {
            let colon = if colon { ":" } else { "" };
            return Ok(format!("${{{name}{colon}{modifier}{word}}}"));
        }
        let unset = value.is_none();
        let present = value.filter(|value| !(colon && value.is_empty()));
        match (modifier, present) {
            ('-', None) => Ok(word),
            ('+', None) => Ok(String::new()),
            ('+', Some(_)) => Ok(word),
            ('?', None) => {
                let default = if unset { "is not allowed to be unset" } else { "is not allowed to be empty" };
                let message = if word.is_empty() { default.to_owned() } else { word };
                Err(ExpandError::Required { name: name.to_owned(), message })
            }
            (_, Some(value)) => Ok(value),
            (other, None) => Err(ExpandError::Modifier(other.to_string())),
        }
    }

    /// `${v#p}`, `${v##p}`, `${v%p}`, `${v%%p}`.
    fn trim(&mut self, name: &str, side: char) -> Result<String, ExpandError> {
        let (word, _) = self.until(Some('}'), true)?;
        let Some(value) = self.value(name) else {
            let kept = if self.options.keep_unset { format!("${{{name}{side}{word}}}") } else { String::new() };
            return Ok(kept);
        };
        let (pattern, longest) = match word.strip_prefix(side) {
            Some(rest) => (rest, true),
            None => (word.as_str(), false),
        };
        let regex = pattern_regex(pattern, longest, side)?;
        if side == '#' {
            return Ok(regex.find(&value).map_or_else(|| value.clone(), |found| value[found.end()..].to_owned()));
        }
        // The shortest match at the end is the first one of the reversed text.
        let reversed: String = value.chars().rev().collect();
        let kept = regex.find(&reversed).map_or(reversed.as_str(), |found| &reversed[found.end()..]);
        Ok(kept.chars().rev().collect())
    }

    /// `${v/p/r}`, `${v//p/r}`.
    fn replace(&mut self, name: &str) -> Result<String, ExpandError> {
        let all = self.input.next_if_eq(&'/').is_some();
        let (pattern, _) = self.until(Some('/'), true)?;
        let (replacement, _) = self.until(Some('}'), true)?;
        let Some(value) = self.value(name) else {
            let kept = format!("${{{name}/{pattern}/{replacement}}}");
            return Ok(if self.options.keep_unset { kept } else { String::new() });
        };
        let regex = pattern_regex(&pattern, true, '/')?;
        if !all {
            return Ok(regex.replacen(&value, 1, regex::NoExpand(&replacement)).into_owned());
        }
        let matches = regex.find_iter(&value).count();
        self.count(matches.saturating_mul(replacement.len()))?;
        Ok(regex.replace_all(&value, regex::NoExpand(&replacement)).into_owned())
    }

    /// A name, a run of digits, or one special parameter; may be empty.
    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.input.peek() {
            Some(c) if c.is_numeric() => {
                while let Some(digit) = self.input.next_if(|c| c.is_numeric()) {
                    name.push(digit);
                }
            }
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => name.extend(self.input.next()),
            _ => {
                while let Some(c) = self.input.next_if(|c| c.is_alphabetic() || c.is_numeric() || *c == '_') {
                    name.push(c);
                }
            }
        }
        name
    }

    fn value(&mut self, name: &str) -> Option<String> {
        let value = self.variables.get(name);
        let seen = if value.is_some() { &mut self.used } else { &mut self.unset };
        if !seen.contains(name) {
            seen.insert(name.to_owned());
        }
        value.map(str::to_owned)
    }
}

/// A shell pattern as a regular expression. `side`: `#` anchors at the start, `%` too but reads the pattern backwards,
/// `/` does not anchor.
fn pattern_regex(pattern: &str, longest: bool, side: char) -> Result<Regex, ExpandError> {
    let invalid = || ExpandError::Pattern(pattern.to_owned());
    let star = if longest { ".*" } else { ".*?" };
    let mut parts: Vec<String> = Vec::new();
    let mut input = pattern.chars().peekable();
    while let Some(c) = input.next() {
        parts.push(match c {
            '*' => star.to_owned(),
            '?' => ".".to_owned(),
            // `}` and `/` had to be escaped to be here at all.
            '\\' if matches!(input.peek(), Some('}' | '/')) => continue,
            '\\' => match input.next() {
                Some(c @ ('*' | '?' | '\\')) => regex::escape(c.encode_utf8(&mut [0; 4])),
                _ => return Err(invalid()),
            },
            c => regex::escape(c.encode_utf8(&mut [0; 4])),
        });
    }
    if side == '%' {
        parts.reverse();
    }
    let anchor = if side == '/' { "" } else { "^" };
    Regex::new(&format!("{anchor}{}", parts.concat())).map_err(|_| invalid())
}
