//! What must hold for every text: nothing panics, nothing hangs, and what is checked here.
#![allow(dead_code, reason = "each fuzz target takes its part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use forge_frontend::diagnostic::{Lines, render};
use forge_frontend::expand::Expander;
use forge_frontend::{
    BaseImage, ContextName, Diagnostic, Dockerfile, NamedContext, Plan, Remote, RemoteFiles, Request, SourceError,
    Sources,
};
use forge_solver::graph::image::{ImageConfig, Platform, Reference};
use forge_solver::graph::{Digest, Network, Selection, Unkeyed};
use forge_solver::pattern::Patterns;
use futures_util::FutureExt as _;

/// A Dockerfile: diagnostics lie within it and can be shown; a sound file means the same when its lines are joined.
pub fn parse(text: &str) {
    let (file, found) = forge_frontend::parse(text);
    show(text, &found);
    if !found.iter().any(Diagnostic::is_error)
        && let Some(printed) = print(text, &file)
    {
        let (again, found) = forge_frontend::parse(&printed);
        assert!(!found.iter().any(Diagnostic::is_error), "{printed:?} {found:?}");
        assert_eq!(codes(&file), codes(&again));
    }
}

fn show(text: &str, found: &[Diagnostic]) {
    let lines = Lines::new(text);
    for diagnostic in found {
        let span = diagnostic.span;
        assert!(text.get(span.start..span.end).is_some(), "{diagnostic:?}");
        render(diagnostic, "Dockerfile", &lines);
    }
}

/// One instruction a line, heredocs as they were; nothing for a file that changes its escape character.
fn print(text: &str, file: &Dockerfile) -> Option<String> {
    let mut out = String::new();
    for (code, span) in codes_and_spans(file) {
        if file.directives.escape != '\\' || code.trim_end().ends_with('\\') {
            return None;
        }
        out.push_str(if code.contains("<<") { &text[span.0..span.1] } else { code });
        out.push('\n');
    }
    Some(out)
}

fn codes(file: &Dockerfile) -> Vec<&str> {
    codes_and_spans(file).map(|(code, _)| code).collect()
}

fn codes_and_spans(file: &Dockerfile) -> impl Iterator<Item = (&str, (usize, usize))> {
    let stages = file.stages.iter().flat_map(|stage| {
        std::iter::once(&stage.code).chain(stage.instructions.iter().map(|instruction| &instruction.code))
    });
    let globals = file.globals.iter().map(|instruction| &instruction.code);
    globals.chain(stages).map(|code| (code.text.as_str(), (code.span.start, code.span.end)))
}

/// A word after one character that picks the mode: a result is bounded, and text without anything special stays.
pub fn expand(text: &str) {
    let mut characters = text.chars();
    let mode = characters.next().map_or(0, u32::from);
    let word = characters.as_str();
    let scope: Vec<(String, String)> = [("a", "va/lu*e"), ("b", ""), ("c", "한 \\x"), ("long", &"x".repeat(3000))]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let expander = Expander {
        escape: if mode & 1 == 0 { '\\' } else { '`' },
        keep_quotes: mode & 2 != 0,
        keep_escapes: mode & 4 != 0,
        ignore_quotes: mode & 8 != 0,
        keep_unset: mode & 16 != 0,
    };
    let Ok(expansion) = expander.expand(word, scope.as_slice()) else { return };
    assert!(expansion.text.len() <= 256 * 1024 + word.len() * 8, "{}", expansion.text.len());
    if !word.contains(['$', '\'', '"', '\\', '`', '<']) {
        assert_eq!(expansion.text, word);
        assert_eq!(expansion.words, word.split_whitespace().collect::<Vec<_>>());
    }
}

/// A path, and below it an ignore file: the fast matcher says what the obvious one says.
pub fn ignore(text: &str) {
    let (path, file) = text.split_once('\n').unwrap_or((text, ""));
    let patterns = forge_frontend::ignore::patterns(file);
    let Ok(fast) = Patterns::new(&patterns) else { return };
    let path = forge_solver::pattern::clean(path);
    if path.is_empty() {
        return;
    }
    let mut excluded = false;
    for pattern in patterns.iter().map(|pattern| pattern.trim()).filter(|pattern| !pattern.is_empty()) {
        let (takes_back, pattern) = match pattern.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, pattern),
        };
        let pattern = naive::parse(&forge_solver::pattern::clean(pattern));
        let mut parents = path.match_indices('/').map(|(end, _)| &path[..end]).chain([path.as_str()]);
        if parents.any(|path| naive::matches(&pattern, path)) {
            excluded = !takes_back;
        }
    }
    assert_eq!(fast.excludes(&path), excluded, "{patterns:?} {path:?}");
}

/// Patterns as one would first write them: a token list, and every way to match it.
mod naive {
    pub enum Token {
        Literal(char),
        One,
        Star,
        /// `**` at the end, or before nothing but letters: moby takes `**.go` for whatever ends so.
        All,
        /// `**` or `**/` before something: nothing, or whole directories.
        Directories,
        Class(bool, Vec<(char, char)>),
    }

    pub fn parse(pattern: &str) -> Vec<Token> {
        let c: Vec<char> = pattern.chars().collect();
        if let Some(letters) = pattern.strip_prefix("**").filter(|rest| !rest.starts_with('/'))
            && !letters.contains(['*', '?', '[', '\\'])
        {
            return std::iter::once(Token::All).chain(letters.chars().map(Token::Literal)).collect();
        }
        let mut tokens = Vec::new();
        let mut at = 0;
        while at < c.len() {
            at += 1;
            tokens.push(match c[at - 1] {
                '*' if c.get(at) == Some(&'*') => {
                    at += 1;
                    at += usize::from(c.get(at) == Some(&'/'));
                    if at == c.len() { Token::All } else { Token::Directories }
                }
                '*' => Token::Star,
                '?' => Token::One,
                '\\' => {
                    at += 1;
                    Token::Literal(c[at - 1])
                }
                '[' => class(&c, &mut at),
                other => Token::Literal(other),
            });
        }
        tokens
    }

    fn class(c: &[char], at: &mut usize) -> Token {
        let negated = c[*at] == '^';
        *at += usize::from(negated);
        let mut ranges = Vec::new();
        let one = |at: &mut usize| {
            *at += if c[*at] == '\\' { 2 } else { 1 };
            c[*at - 1]
        };
        while ranges.is_empty() || c[*at] != ']' {
            let low = one(at);
            let mut high = low;
            if c[*at] == '-' {
                *at += 1;
                high = one(at);
            }
            ranges.push((low, high));
        }
        *at += 1;
        Token::Class(negated, ranges)
    }

    /// For each token, the set of places that can be reached.
    pub fn matches(pattern: &[Token], path: &str) -> bool {
        let path: Vec<char> = path.chars().collect();
        let mut reached = vec![false; path.len() + 1];
        reached[0] = true;
        for token in pattern {
            let mut next = vec![false; path.len() + 1];
            for start in (0..=path.len()).filter(|start| reached[*start]) {
                match token {
                    Token::All => next[start..].fill(true),
                    Token::Star => {
                        let end = path[start..].iter().position(|c| *c == '/').map_or(path.len(), |at| start + at);
                        next[start..=end].fill(true);
                    }
                    Token::Directories => {
                        next[start] = true;
                        (start..path.len()).filter(|at| path[*at] == '/').for_each(|at| next[at + 1] = true);
                    }
                    Token::Literal(..) | Token::One | Token::Class(..) if start == path.len() => {}
                    Token::Literal(literal) => next[start + 1] |= path[start] == *literal,
                    Token::One => next[start + 1] |= path[start] != '/',
                    Token::Class(negated, ranges) => {
                        let inside = ranges.iter().any(|(low, high)| (*low..=*high).contains(&path[start]));
                        next[start + 1] |= inside != *negated;
                    }
                }
            }
            reached = next;
        }
        reached[path.len()]
    }
}

/// A Dockerfile, planned: the same plan each time, and everything that it names is in its graph.
///
/// A first line `#! target:x platform:linux/arm64 arg:A=b files:name image:name=debian` is the request; what follows a line
/// `#---` are the triggers of the image `onbuild`.
pub fn plan(text: &str) {
    let (file, found) = forge_frontend::parse(text);
    show(text, &found);
    if found.iter().any(Diagnostic::is_error) {
        return;
    }
    forge_frontend::outline::targets(&file);
    let request = request(text.lines().next().and_then(|line| line.strip_prefix("#!")).unwrap_or_default());
    let world = World { triggers: triggers(text) };
    let checked = forge_frontend::check(&file, &request, &world).now_or_never().expect("as planning");
    let report = forge_frontend::report::Report { file: "Dockerfile", text, diagnostics: &checked };
    report.lint_results();
    report.sarif("0");
    let outline = forge_frontend::outline::outline(&file, &request);
    match planned(&file, &request, &world) {
        Err(errors) => {
            assert!(errors.iter().any(Diagnostic::is_error), "a refusal has a reason");
            show(text, &errors);
        }
        Ok(plan) => {
            show(text, &plan.warnings);
            assert!(outline.is_ok(), "what can be built can be asked about");
            let nodes = forge_frontend::show::order(&plan).len();
            assert_eq!(forge_frontend::show::text(&plan).lines().count(), nodes + plan.images.len());
            forge_frontend::show::dot(&plan);
            assert_eq!(plan.images.len(), request.platforms.len().max(1));
            let again = planned(&file, &request, &world).expect("it was planned once");
            assert_eq!(names(&plan), names(&again));
        }
    }
}

fn planned(file: &Dockerfile, request: &Request, world: &World) -> Result<Plan, Vec<Diagnostic>> {
    forge_frontend::plan(file, request, world).now_or_never().expect("a world of constants answers at once")
}

fn names(plan: &Plan) -> String {
    let mut out = String::new();
    for image in &plan.images {
        let layers = image.history.iter().filter_map(|line| line.layer.as_ref());
        for id in layers.chain([&image.root]) {
            plan.graph.get(id).inputs.iter().for_each(|input| assert!(plan.graph.contains(input)));
            writeln!(out, "{id} {}", plan.graph.label(id).name).expect("writing to a string does not fail");
        }
        out.push_str(&serde_json::to_string(&image.config).expect("a configuration is plain data"));
    }
    out
}

fn triggers(text: &str) -> Vec<String> {
    let (_, triggers) = text.split_once("\n#---\n").unwrap_or_default();
    triggers.lines().map(str::to_owned).collect()
}

fn request(words: &str) -> Request {
    let mut request = Request {
        target: None,
        platforms: Vec::new(),
        build_platform: Platform::new("linux", "amd64", None),
        build_args: BTreeMap::new(),
        contexts: BTreeMap::new(),
        labels: BTreeMap::new(),
        network: Network::Default,
        hosts: Vec::new(),
        unkeyed: Unkeyed::default(),
        epoch: None,
        ignore: vec!["ignored".to_owned(), "!ignored/not".to_owned()],
    };
    for word in words.split_whitespace() {
        let (key, value) = word.split_once(':').unwrap_or((word, ""));
        let (name, rest) = value.split_once('=').unwrap_or((value, ""));
        match key {
            "target" => request.target = Some(value.to_owned()),
            "platform" if request.platforms.len() < 3 => request.platforms.extend(value.parse().ok()),
            "arg" => drop(request.build_args.insert(name.to_owned(), rest.to_owned())),
            "files" => drop(request.contexts.insert(name.to_owned(), NamedContext::Files)),
            "image" => {
                let image = rest.parse().ok();
                request.contexts.extend(image.map(|image| (name.to_owned(), NamedContext::Image(image))));
            }
            _ => {}
        }
    }
    request
}

/// Every image is there but `missing`; every path but `missing`.
struct World {
    triggers: Vec<String>,
}

impl Sources for World {
    async fn image(&self, name: &Reference, platform: &Platform) -> Result<BaseImage, SourceError> {
        let familiar = name.familiar();
        if familiar.starts_with("missing") {
            return Err(SourceError { message: "not found".to_owned(), hint: None });
        }
        let triggers = if familiar.starts_with("onbuild") { self.triggers.as_slice() } else { &[] };
        let config = serde_json::json!({
            "architecture": platform.architecture,
            "os": platform.os,
            "config": {"Env": ["PATH=/bin", "A=1"], "User": "app", "WorkingDir": "/srv", "OnBuild": triggers},
        });
        let config: ImageConfig = serde_json::from_value(config).expect("a configuration");
        let digest = Digest::of(format!("{name} {platform}"));
        Ok(BaseImage { diff_ids: vec![digest.clone()], digest, config })
    }

    async fn context(&self, context: &ContextName, files: &Selection) -> Result<Digest, SourceError> {
        if files.paths.iter().any(|path| path == "missing") {
            return Err(SourceError { message: "\"missing\" is not in the context".to_owned(), hint: None });
        }
        Ok(Digest::of(format!("{context:?} {files:?}")))
    }

    async fn remote(&self, remote: &Remote) -> Result<RemoteFiles, SourceError> {
        Ok(RemoteFiles { digest: Digest::of(format!("{remote:?}")), path: "file".to_owned() })
    }
}
