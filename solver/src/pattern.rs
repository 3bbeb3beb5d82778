//! Which paths a pattern means: ignore files, `--exclude`, and the wildcards of `COPY`.
//!
//! Two dialects, as Dockerfiles have them:
//! - [`match_path`] (and [`Glob`]) is Go's `filepath.Match`: `*` and `?` stop at `/`, `[a-z]` and `[^a-z]` are
//!   classes, `\` quotes, the whole name must match, and a malformed pattern is an error whatever the name.
//! - [`Patterns`] is a list in the sense of moby's `patternmatcher`: besides the above, `**` crosses `/`, a pattern
//!   that matches a directory matches all below it, `!` takes back, and the last pattern that matches decides.
//!
//! | pattern       | matches                                      |
//! |---------------|----------------------------------------------|
//! | `a/b`         | `a/b` and all below it                       |
//! | `a/**`        | all below `a`, not `a`                       |
//! | `**/a`        | `a` at any depth, and all below it           |
//! | `**a`         | every path that ends in `a`, and all below   |
//! | `a**/b`       | `ab`, `a/b`, `a/x/b`, `ax/b`, ...            |
//! | `*`           | every path (each has a first component)      |
//!
//! Where moby hands pieces of a pattern to its regular expressions unquoted (`[*]`, `\d`), the meaning of
//! `filepath.Match` is taken instead; a class whose range runs backwards, on which moby fails later, is refused at
//! once.
//!
//! A list is asked in two ways that agree: [`Patterns::excludes`] looks at a path and all its parents;
//! [`Patterns::enter`] and [`Patterns::excludes_in`] carry the parents' answers down a walk.

use std::sync::Arc;

use regex::Regex;

/// A pattern that cannot be one, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid pattern {pattern:?}: {reason}")]
pub struct InvalidPattern {
    pub pattern: String,
    pub reason: &'static str,
}

/// Go's `filepath.Match`.
pub fn match_path(pattern: &str, name: &str) -> Result<bool, InvalidPattern> {
    Ok(Glob::new(pattern)?.matches(name))
}

/// Whether a path of `COPY` has wildcards in it, quoted ones left out.
pub fn has_wildcards(path: &str) -> bool {
    let mut characters = path.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => drop(characters.next()),
            '*' | '?' | '[' => return true,
            _ => (),
        }
    }
    false
}

/// A path without its quoting backslashes; for paths without wildcards.
pub fn unquote(path: &str) -> String {
    let mut characters = path.chars();
    let mut text = String::with_capacity(path.len());
    while let Some(character) = characters.next() {
        match character {
            '\\' => text.extend(characters.next()),
            other => text.push(other),
        }
    }
    text
}

/// Go's `path.Clean`, with `""` for the directory itself and without a leading `/`.
pub fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => (),
            ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
            ".." if path.starts_with('/') => (),
            other => parts.push(other),
        }
    }
    parts.join("/")
}

/// A compiled pattern of Go's `filepath.Match`.
#[derive(Clone, Debug)]
pub struct Glob(Vec<Token>);

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Literal(char),
    /// `?`
    One,
    /// `*`
    Star,
    Class(Class),
}

#[derive(Clone, Debug, PartialEq)]
struct Class {
    negated: bool,
    ranges: Vec<(char, char)>,
}

impl Class {
    fn contains(&self, character: char) -> bool {
        self.ranges.iter().any(|(low, high)| (*low..=*high).contains(&character)) != self.negated
    }
}

impl Token {
    fn matches(&self, character: char) -> bool {
        match self {
            Token::Literal(literal) => *literal == character,
            Token::One => character != '/',
            Token::Star => false,
            Token::Class(class) => class.contains(character),
        }
    }
}

impl Glob {
    pub fn new(pattern: &str) -> Result<Glob, InvalidPattern> {
        let mut scanner = Scanner { pattern, rest: pattern };
        let mut tokens = Vec::new();
        while let Some(character) = scanner.next() {
            match character {
                '*' if tokens.last() == Some(&Token::Star) => (),
                '*' => tokens.push(Token::Star),
                '?' => tokens.push(Token::One),
                '[' => tokens.push(Token::Class(scanner.class()?)),
                '\\' => tokens.push(Token::Literal(scanner.quoted()?)),
                other => tokens.push(Token::Literal(other)),
            }
        }
        Ok(Glob(tokens))
    }

    /// Linear but for the last star, which is the only one that ever has to be tried again.
    pub fn matches(&self, name: &str) -> bool {
        let tokens = &self.0;
        let (mut token, mut rest) = (0, name);
        let mut retry: Option<(usize, &str)> = None;
        loop {
            let mut characters = rest.chars();
            match (tokens.get(token), characters.next()) {
                (Some(Token::Star), _) => {
                    token += 1;
                    retry = Some((token, rest));
                    continue;
                }
                (None, None) => return true,
                (Some(expected), Some(character)) if expected.matches(character) => {
                    (token, rest) = (token + 1, characters.as_str());
                    continue;
                }
                _ => (),
            }
            let Some((after_star, from)) = retry else { return false };
            let mut characters = from.chars();
            match characters.next() {
                None | Some('/') => return false,
                Some(_) => (token, rest) = (after_star, characters.as_str()),
            }
            retry = Some((after_star, rest));
        }
    }
}

/// Reads a pattern, character by character.
struct Scanner<'a> {
    pattern: &'a str,
    rest: &'a str,
}

impl Scanner<'_> {
    fn next(&mut self) -> Option<char> {
        let mut characters = self.rest.chars();
        let next = characters.next();
        self.rest = characters.as_str();
        next
    }

    fn eat(&mut self, expected: char) -> bool {
        let found = self.rest.starts_with(expected);
        if found {
            self.next();
        }
        found
    }

    fn fail<T>(&self, reason: &'static str) -> Result<T, InvalidPattern> {
        Err(InvalidPattern { pattern: self.pattern.to_owned(), reason })
    }

    fn quoted(&mut self) -> Result<char, InvalidPattern> {
        self.next().map_or_else(|| self.fail("a backslash at the end quotes nothing"), Ok)
    }

    /// What follows `[`, up to and including `]`.
    fn class(&mut self) -> Result<Class, InvalidPattern> {
        let negated = self.eat('^');
        let mut ranges = Vec::new();
        while ranges.is_empty() || !self.eat(']') {
            let low = self.class_character()?;
            let high = if self.eat('-') { self.class_character()? } else { low };
            ranges.push((low, high));
        }
        Ok(Class { negated, ranges })
    }

    fn class_character(&mut self) -> Result<char, InvalidPattern> {
        match self.next() {
            None => self.fail("a class is not closed by ]"),
            Some('-') => self.fail("a - in a class stands between two characters, or is written \\-"),
            Some(']') => self.fail("a ] cannot be a class's first character or a range's end, write \\]"),
            Some('\\') => self.quoted(),
            Some(other) => Ok(other),
        }
    }
}

/// An ordered list of patterns of which the last that matches decides.
#[derive(Clone, Debug, Default)]
pub struct Patterns(Vec<Pattern>);

#[derive(Clone, Debug)]
struct Pattern {
    /// `!`: takes back what earlier patterns matched.
    takes_back: bool,
    matcher: Matcher,
    /// The cleaned pattern's components, for [`Patterns::may_descend`].
    components: Vec<Component>,
}

#[derive(Clone, Debug)]
enum Matcher {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// `**/rest`: at the end after a slash, or all of it.
    DeepSuffix(String),
    Regex(Regex),
}

#[derive(Clone, Debug)]
enum Component {
    Glob(Glob),
    /// May match a slash, and so anything that follows.
    Open,
}

impl Matcher {
    fn matches(&self, path: &str) -> bool {
        match self {
            Matcher::Exact(text) => path == text,
            Matcher::Prefix(prefix) => path.starts_with(prefix),
            Matcher::Suffix(suffix) => path.ends_with(suffix),
            Matcher::DeepSuffix(suffix) => {
                path.strip_suffix(suffix.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('/'))
            }
            Matcher::Regex(regex) => regex.is_match(path),
        }
    }
}

/// What the patterns said of a directory: the answer for all that is below it starts from here.
#[derive(Clone, Debug, Default)]
pub struct Parents(Option<Arc<[bool]>>);

impl Parents {
    fn matched(&self, index: usize) -> bool {
        self.0.as_ref().is_some_and(|matched| matched[index])
    }
}

impl Patterns {
    pub fn new<S: AsRef<str>>(patterns: impl IntoIterator<Item = S>) -> Result<Patterns, InvalidPattern> {
        let patterns = patterns.into_iter();
        let parsed = patterns.filter_map(|pattern| match pattern.as_ref().trim() {
            "" => None,
            pattern => Some(Pattern::new(pattern)),
        });
        parsed.collect::<Result<_, _>>().map(Patterns)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the list excludes a path (relative, separated by `/`); the root itself is never excluded.
    pub fn excludes(&self, path: &str) -> bool {
        let path = clean(path);
        let mut parents = Parents::default();
        for (end, _) in path.match_indices('/') {
            parents = self.enter(&parents, &path[..end]).1;
        }
        !path.is_empty() && self.excludes_in(&parents, &path)
    }

    /// The same for a clean path in a directory whose own answer is `parents`.
    pub fn excludes_in(&self, parents: &Parents, path: &str) -> bool {
        let mut excluded = false;
        for (index, pattern) in self.0.iter().enumerate() {
            // A pattern that could not change the answer is not tried.
            if pattern.takes_back == excluded && (parents.matched(index) || pattern.matcher.matches(path)) {
                excluded = !pattern.takes_back;
            }
        }
        excluded
    }

    /// Whether a directory is excluded, and what to carry down into it.
    pub fn enter(&self, parents: &Parents, path: &str) -> (bool, Parents) {
        if self.0.is_empty() {
            return (false, Parents::default());
        }
        let patterns = self.0.iter().enumerate();
        let matched: Arc<[bool]> =
            patterns.map(|(index, pattern)| parents.matched(index) || pattern.matcher.matches(path)).collect();
        let last = matched.iter().rposition(|matched| *matched);
        (last.is_some_and(|last| !self.0[last].takes_back), Parents(Some(matched)))
    }

    /// Whether something below an excluded directory may yet be taken back, by a `!` that comes after what
    /// excluded it. If not, the directory need not be read.
    pub fn may_descend(&self, directory: &Parents, path: &str) -> bool {
        let Some(matched) = &directory.0 else { return true };
        let decided = matched.iter().rposition(|matched| *matched).map_or(0, |last| last + 1);
        self.0[decided..].iter().any(|pattern| pattern.takes_back && pattern.may_match_below(path))
    }
}

impl Pattern {
    fn new(text: &str) -> Result<Pattern, InvalidPattern> {
        let fail = |reason| Err(InvalidPattern { pattern: text.to_owned(), reason });
        let rooted = text.starts_with('/');
        let mut cleaned = clean(text);
        if rooted {
            cleaned.insert(0, '/');
        }
        let takes_back = cleaned.starts_with('!');
        let pattern = if takes_back { &cleaned[1..] } else { &cleaned };
        if takes_back && pattern.is_empty() {
            return fail("a ! alone takes nothing back");
        }
        // `.` (here empty) is a pattern that matches no path.
        let glob = Glob::new(pattern).map_err(|error| InvalidPattern { pattern: text.to_owned(), ..error })?;
        let backwards = |token: &Token| matches!(token, Token::Class(class) if class.ranges.iter().any(|(a, b)| a > b));
        if glob.0.iter().any(backwards) {
            return fail("a range in a class runs backwards");
        }
        Ok(Pattern { takes_back, matcher: compile(pattern)?, components: components(pattern) })
    }

    fn may_match_below(&self, directory: &str) -> bool {
        let mut names = directory.split('/');
        for component in &self.components {
            match (component, names.next()) {
                (Component::Open, _) | (_, None) => return true,
                (Component::Glob(glob), Some(name)) if !glob.matches(name) => return false,
                _ => (),
            }
        }
        false // what it could match is the directory itself or above it, and that was asked before
    }
}

fn components(pattern: &str) -> Vec<Component> {
    let component = |text: &str| match Glob::new(text) {
        // A class may hold a slash, so it is not looked into.
        Ok(glob) if !text.contains("**") && !glob.0.iter().any(|token| matches!(token, Token::Class(_))) => {
            Component::Glob(glob)
        }
        _ => Component::Open,
    };
    pattern.split('/').map(component).collect()
}

/// The fastest matcher that a pattern allows; a regular expression where it has more than a `**` at one end.
fn compile(pattern: &str) -> Result<Matcher, InvalidPattern> {
    let mut scanner = Scanner { pattern, rest: pattern };
    let mut expression = String::from("(?s)^");
    let mut special = false; // more than literals, beyond a leading or trailing `**`
    let (mut deep_start, mut deep_end) = (false, false);
    while let Some(character) = scanner.next() {
        let start = pattern.len() - scanner.rest.len() == 1;
        match character {
            '*' if scanner.eat('*') => {
                scanner.eat('/');
                let end = scanner.rest.is_empty();
                expression.push_str(if end { ".*" } else { "(?:.*/)?" });
                special |= !start && (!end || deep_start || special);
                deep_start |= start;
                deep_end |= end;
            }
            '*' => (special, _) = (true, expression.push_str("[^/]*")),
            '?' => (special, _) = (true, expression.push_str("[^/]")),
            '[' => (special, _) = (true, push_class(&mut expression, &scanner.class()?)),
            '\\' => (special, _) = (true, push_literal(&mut expression, scanner.quoted()?)),
            other => push_literal(&mut expression, other),
        }
    }
    Ok(match (special, deep_start, deep_end) {
        (false, false, false) => Matcher::Exact(pattern.to_owned()),
        (false, false, true) => Matcher::Prefix(pattern[..pattern.len() - 2].to_owned()),
        (false, true, _) => match pattern[2..].strip_prefix('/') {
            Some(suffix) => Matcher::DeepSuffix(suffix.to_owned()),
            None => Matcher::Suffix(pattern[2..].to_owned()),
        },
        (true, ..) => {
            expression.push('$');
            Matcher::Regex(Regex::new(&expression).or_else(|_| scanner.fail("it is too large"))?)
        }
    })
}

fn push_literal(expression: &mut String, literal: char) {
    expression.push_str(&regex::escape(literal.encode_utf8(&mut [0; 4])));
}

fn push_class(expression: &mut String, class: &Class) {
    expression.push_str(if class.negated { "[^" } else { "[" });
    for (low, high) in &class.ranges {
        expression.push_str(&format!("\\x{{{:x}}}-\\x{{{:x}}}", u32::from(*low), u32::from(*high)));
    }
    expression.push(']');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_match_as_in_go() {
        for (pattern, name, expect) in [
            ("word", "word", true),
            ("word", "words", false),
            ("*", "word", true),
            ("*", "", true),
            ("*", "a/b", false),
            ("w*d", "wd", true),
            ("w*d", "w/d", false),
            ("*/d", "w/d", true),
            ("*/d", "w/x/d", false),
            ("*o*r*", "word", true),
            ("*ab*abc", "xabxabxabc", true),
            ("*ab*abc", "xabxabxab", false),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false),
            ("?ord", "word", true),
            ("?ord", "/ord", false),
            ("w?d", "wöd", true),
            ("w??d", "wöd", false),
            ("w[n-p]rd", "word", true),
            ("w[^n-p]rd", "word", false),
            ("w[^n-p]rd", "wörd", true),
            ("[α-ω]*", "λx", true),
            ("[\\]x]", "]", true),
            ("[\\-x]", "-", true),
            ("[x\\-]", "z", false),
            ("w\\*d", "w*d", true),
            ("w\\*d", "wxd", false),
            ("**", "word", true),
            ("[z-a]", "m", false),
            ("w[^x]d", "w/d", true),
        ] {
            assert_eq!(match_path(pattern, name), Ok(expect), "{pattern} {name}");
        }
    }

    #[test]
    fn a_bad_pattern_is_refused_whatever_the_name_and_named() {
        for pattern in
            ["[", "[^", "[^ab", "x[", "x[]y]", "[]x]", "[-]", "[x-]", "[-x]", "[a-b-c]", "\\", "a\\", "*[", "[\\"]
        {
            for name in ["", "x", "zzz"] {
                assert_eq!(match_path(pattern, name).expect_err(pattern).pattern, pattern);
            }
            let error = Patterns::new(["fine", pattern]).expect_err(pattern);
            assert!(error.to_string().contains(&format!("{pattern:?}")), "{error}");
        }
        for (pattern, reason) in [("!", "alone"), (" ! ", "alone"), ("[Local-Only]/", "backwards")] {
            let error = Patterns::new([pattern]).expect_err(pattern).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn lists_match_as_in_moby() {
        let check = |patterns: &[&str], path: &str, expect: bool| {
            let list = Patterns::new(patterns).expect("valid");
            assert_eq!(list.excludes(path), expect, "{patterns:?} {path}");
        };
        for (pattern, path, expect) in [
            ("**", "a", true),
            ("**/", "a/b/", true),
            ("**/**", "a/b", true),
            ("d/**", "d", false),
            ("d/**", "d/e/f", true),
            ("d/**", "de", false),
            ("d**", "de", true),
            ("**/d", "d", true),
            ("**/d", "x/d", true),
            ("**/d", "xd", false),
            ("**/d", "d/below/it", true),
            ("**/d/e", "x/y/d/e", true),
            ("**d", "x/yd", true),
            ("**d", "xd", true),
            ("**/d/*", "x/d/f", true),
            ("**/d/*", "x/d", false),
            ("**/d/**", "x/d/y/z", true),
            ("**/f*t", "x/y/foot", true),
            ("**/**/*.txt", "n.txt", true),
            ("**/**/*.txt", "x/y/n.txt2", false),
            ("a**/*.txt", "a/n.txt", true),
            ("a**/*.txt", "a/b/c/n.txt", true),
            ("a/*.txt", "a/b/n.txt", false),
            ("a/*.t**", "a/n.txt", true),
            ("***", "x/y", true),
            ("a[b-d]e", "ace", true),
            ("a[^b-d]e", "ace", false),
            ("a[^b-d]e", "a-e", true),
            (".*", ".git", true),
            (".*", "git", false),
            ("n.txt", "nxtxt", false),
            ("n?txt", "n.txt", true),
            ("a?b", "a☺b", true),
            ("a\\\\", "a\\", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("x(y)z/w", "x(y)z/w", true),
            ("x.|)$(}+{y", "x.|)$(}+{y", true),
            ("*", "a/b/c", true),
            ("a", "a/b/c", true),
            ("a/", "a", true),
            ("./a/../b", "b/c", true),
            ("  a  ", "a", true),
            ("", "a", false),
            (".", "a", false),
            ("**", ".", false),
            ("/a", "a", false),
            ("a", "ab", false),
        ] {
            check(&[pattern], path, expect);
        }
        for (patterns, path, expect) in [
            (&["docs", "!docs/README.md"][..], "docs/README.md", false),
            (&["docs/*", "!docs/README.md"], "docs/other.md", true),
            (&["!a.go", "*.go"], "a.go", true),
            (&["*.go", "!a.go"], "a.go", false),
            (&["**", "!u/d"], "u/d/f", false),
            (&["**", "!u/d", "u/d/f"], "u/d/f", true),
            (&["**", "!dist/*.whl"], "dist/a-1.0+g.whl", false),
            (&["a", "!a/b/c", "a/b"], "a/b/c", true),
            (&["*", "!src", "src/*.o"], "src/x.o", true),
        ] {
            check(patterns, path, expect);
        }
    }

    #[test]
    fn an_excluded_directory_is_read_only_where_something_may_be_taken_back() {
        for (patterns, directory, expect) in [
            (&["d"][..], "d", false),
            (&["d", "!d/keep"], "d", true),
            (&["d", "!e/keep"], "d", false),
            (&["!d/keep", "d"], "d", false),
            (&["*", "!d/*/keep"], "d/x", true),
            (&["*", "!d/*/keep"], "e", false),
            (&["**", "!**/keep"], "d/e", true),
            (&["d", "!d[/]keep"], "d", true),
            (&["*", "!d/keep"], "d/other", false),
        ] {
            let list = Patterns::new(patterns).expect("valid");
            let mut parents = Parents::default();
            let mut excluded = false;
            for end in directory.match_indices('/').map(|(at, _)| at).chain([directory.len()]) {
                (excluded, parents) = list.enter(&parents, &directory[..end]);
            }
            assert!(excluded, "{patterns:?} {directory}");
            assert_eq!(list.may_descend(&parents, directory), expect, "{patterns:?} {directory}");
        }
    }

    #[test]
    fn paths_are_cleaned_as_in_go() {
        for (path, expect) in
            [("", ""), (".", ""), ("/", ""), ("./a//b/", "a/b"), ("a/../b", "b"), ("../a", "../a"), ("/../a", "a")]
        {
            assert_eq!(clean(path), expect, "{path}");
        }
        assert!(has_wildcards("a/*b") && !has_wildcards("a/\\*b"));
        assert_eq!(unquote("a/\\*b\\\\"), "a/*b\\");
    }

    /// The definition, tried on every parent: no fast path, no carried results, no regular expressions.
    fn naive(patterns: &[String], path: &str) -> bool {
        let mut excluded = false;
        for pattern in patterns {
            let pattern = clean(pattern);
            let (takes_back, text) = pattern.strip_prefix('!').map_or((false, &*pattern), |rest| (true, rest));
            let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
            if ends.map(|end| &path[..end]).any(|prefix| naive_pattern(text, prefix)) {
                excluded = !takes_back;
            }
        }
        excluded
    }

    fn naive_pattern(pattern: &str, path: &str) -> bool {
        let rest = pattern.strip_prefix("**").filter(|rest| !rest.contains(['*', '?', '[']));
        match rest {
            Some("") => true,
            Some(rest) if rest.starts_with('/') => path == &rest[1..] || path.ends_with(rest),
            Some(rest) => path.ends_with(rest),
            None => naive_match(pattern.as_bytes(), path.as_bytes()),
        }
    }

    fn naive_match(pattern: &[u8], path: &[u8]) -> bool {
        match (pattern, path) {
            ([], []) => true,
            ([b'*', b'*'], _) | ([b'*', b'*', b'/'], _) => true,
            ([b'*', b'*', b'/', rest @ ..] | [b'*', b'*', rest @ ..], _) => {
                (0..=path.len()).any(|at| (at == 0 || path[at - 1] == b'/') && naive_match(rest, &path[at..]))
            }
            ([b'*', rest @ ..], _) => (0..=path.len())
                .take_while(|at| *at == 0 || path[at - 1] != b'/')
                .any(|at| naive_match(rest, &path[at..])),
            ([b'?', rest @ ..], [character, path @ ..]) => *character != b'/' && naive_match(rest, path),
            ([b'[', b'^', b'a', b']', rest @ ..], [character, path @ ..]) => {
                *character != b'a' && naive_match(rest, path)
            }
            ([b'[', b'a', b'-', b'b', b']', rest @ ..], [character, path @ ..]) => {
                matches!(character, b'a' | b'b') && naive_match(rest, path)
            }
            ([literal, rest @ ..], [character, path @ ..]) => literal == character && naive_match(rest, path),
            _ => false,
        }
    }

    fn pattern() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec!["a", "b", "c", "/", "/", "*", "**", "**/", "?", "[a-b]", "[^a]", "."]);
        (any::<bool>(), prop::collection::vec(piece, 1..7)).prop_map(|(back, pieces)| {
            let text = clean(&pieces.concat().replace("***", "**").replace("***", "**"));
            let text = if text.is_empty() { "a".to_owned() } else { text };
            if back { format!("!{text}") } else { text }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_fast_matcher_agrees_with_the_definition(
            patterns in prop::collection::vec(pattern(), 1..5),
            path in prop::collection::vec("[abc]{1,2}\\.?", 1..5).prop_map(|parts| parts.join("/")),
        ) {
            let list = Patterns::new(&patterns).expect("valid");
            prop_assert_eq!(list.excludes(&path), naive(&patterns, &path));
        }

        #[test]
        fn pruning_never_hides_what_is_taken_back(
            patterns in prop::collection::vec(pattern(), 1..5),
            path in prop::collection::vec("[abc]{1,2}", 2..5).prop_map(|parts| parts.join("/")),
        ) {
            let list = Patterns::new(&patterns).expect("valid");
            let mut parents = Parents::default();
            for (end, _) in path.match_indices('/') {
                let excluded;
                (excluded, parents) = list.enter(&parents, &path[..end]);
                if excluded && !list.may_descend(&parents, &path[..end]) {
                    prop_assert!(list.excludes(&path));
                    break;
                }
            }
        }
    }
}
