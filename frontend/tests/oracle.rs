//! Published tables of what BuildKit makes of words and files; `FORGE_ORACLE` names their folder.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fmt::Write as _;
use std::path::PathBuf;

use forge_frontend::expand::{Expander, Expansion, Variables};
use forge_frontend::instruction::Word;
use forge_frontend::lex;

#[expect(clippy::print_stderr, reason = "says what was skipped")]
fn oracle(part: &str) -> Option<PathBuf> {
    let root = std::env::var_os("FORGE_ORACLE")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/oracle")), PathBuf::from);
    let path = root.join(part);
    if !path.exists() {
        eprintln!("skipped: {} is not there; FORGE_ORACLE names the folder of the tables", path.display());
        return None;
    }
    Some(path)
}

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn expand(word: &str, scope: &(impl Variables + ?Sized)) -> Option<Expansion> {
    Expander::new('\\').expand(word, scope).ok()
}

#[test]
fn words_expand_as_the_table_says() {
    let Some(path) = oracle("shell/envVarTest") else { return };
    let scope = variables(&[("PWD", "/home"), ("SHELL", "bash"), ("KOREAN", "한국어"), ("NULL", "")]);
    let text = std::fs::read_to_string(path).unwrap();
    let mut rows = 0;
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        let cells: Vec<&str> = line.split('|').collect();
        let [system, input, expect] = cells.as_slice() else { panic!("{line}") };
        if *system == "W" {
            continue;
        }
        rows += 1;
        let got = expand(input.trim_end(), scope.as_slice()).map(|expansion| expansion.text);
        let expect = expect.trim();
        assert_eq!(got.as_deref().unwrap_or("error"), expect, "{line}");
    }
    assert!(rows > 200, "{rows}");
}

#[test]
fn words_split_as_the_table_says() {
    let Some(path) = oracle("shell/wordsTest") else { return };
    let mut scope: Vec<(String, String)> = Vec::new();
    let text = std::fs::read_to_string(path).unwrap();
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        if let Some(pair) = line.strip_prefix("ENV ") {
            let (name, value) = pair.split_once('=').unwrap();
            scope.push((name.trim().to_owned(), value.to_owned()));
            continue;
        }
        let (input, expect) = line.split_once('|').unwrap();
        let got = expand(input.trim(), scope.as_slice()).map(|expansion| expansion.words.join(","));
        assert_eq!(got.as_deref().unwrap_or("error"), expect.trim_start(), "{line}");
    }
}

/// Go's `strconv.Quote`, for what the tables hold.
fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if (c as u32) < 32 => write!(out, "\\x{:02x}", c as u32).unwrap(),
            c => out.push(c),
        }
    }
    out + "\""
}

/// A line as the tables print it, from the lexer's functions alone: flags and arguments need not make sense there.
fn s_expression(text: &str, range: std::ops::Range<usize>, escape: char) -> String {
    let command = lex::split_command(text, range, escape);
    let name = command.name(text).to_lowercase();
    let mut out = name.clone();
    if !command.flags.is_empty() {
        let flags: Vec<String> = command.flags.iter().map(|(flag, _)| quote(flag)).collect();
        write!(out, " [{}]", flags.join(" ")).unwrap();
    }
    let rest = command.arguments.clone();
    if name == "onbuild" {
        return format!("{out} ({})", s_expression(text, rest, escape));
    }
    for word in arguments(&name, text, rest, escape) {
        write!(out, " {}", quote(&word)).unwrap();
    }
    out
}

fn arguments(name: &str, text: &str, range: std::ops::Range<usize>, escape: char) -> Vec<String> {
    let body = &text[range.clone()];
    let blank_words = |range| lex::blank_words(text, range).into_iter().map(|at| text[at].to_owned()).collect();
    let json = |body: &str| match lex::json_strings(body) {
        lex::Json::Strings(strings) => Some(strings.into_iter().map(|(string, _)| string).collect::<Vec<_>>()),
        _ => None,
    };
    let whole = |body: &str| if body.is_empty() { Vec::new() } else { vec![body.to_owned()] };
    match name {
        "env" | "label" => {
            let words = lex::quoted_words(text, range, escape);
            if !words[0].0.contains('=') {
                let (key, value) = body.split_once([' ', '\t']).unwrap();
                return vec![key.to_owned(), value.trim_start().to_owned(), String::new()];
            }
            let pair = |(word, _): (String, _)| {
                let (key, value) = word.split_once('=').unwrap();
                [key.to_owned(), value.to_owned(), "=".to_owned()]
            };
            words.into_iter().flat_map(pair).collect()
        }
        "arg" => lex::quoted_words(text, range, escape).into_iter().map(|(word, _)| word).collect(),
        "from" | "expose" => blank_words(range),
        "add" | "copy" | "volume" => json(body).unwrap_or_else(|| blank_words(range)),
        "healthcheck" => {
            let end = body.find(char::is_whitespace).unwrap_or(body.len());
            let rest = body[end..].trim_start();
            let mut words = whole(&body[..end]);
            words.extend(json(rest).unwrap_or_else(|| whole(rest)));
            words
        }
        "run" | "cmd" | "entrypoint" | "shell" => json(body).unwrap_or_else(|| whole(body)),
        _ => whole(body),
    }
}

#[test]
fn files_parse_as_the_tables_say() {
    let Some(path) = oracle("parser") else { return };
    let mut cases = 0;
    for case in std::fs::read_dir(path).unwrap() {
        let case = case.unwrap().path();
        let text = std::fs::read_to_string(case.join("Dockerfile")).unwrap();
        let expect = std::fs::read_to_string(case.join("result")).unwrap();
        let lexed = lex::lex(&text);
        assert!(lexed.diagnostics.is_empty(), "{}: {:?}", case.display(), lexed.diagnostics);
        let got: Vec<String> = lexed
            .lines
            .iter()
            .map(|line| format!("({})", s_expression(&line.text, 0..line.text.len(), lexed.directives.escape)))
            .collect();
        assert_eq!(got.join("\n"), expect.trim_end(), "{}", case.display());
        spans_lead_back(&text);
        cases += 1;
    }
    assert!(cases >= 20, "{cases}");
}

/// The words of a tree are where it says that they are.
fn spans_lead_back(text: &str) {
    let (file, _) = forge_frontend::parse(text);
    let mut words: Vec<&Word> = Vec::new();
    for stage in &file.stages {
        words.extend([&stage.keyword, &stage.base]);
        for instruction in &stage.instructions {
            words.push(&instruction.keyword);
            if let forge_frontend::instruction::Kind::Copy(copy) = &instruction.kind {
                words.push(&copy.destination);
                words.extend(&copy.paths);
            }
        }
    }
    for word in words {
        let source = &text[word.span.start..word.span.end];
        let quoted = serde_json::from_str::<String>(source).unwrap_or_else(|_| source.to_owned());
        assert_eq!(quoted, word.text, "{source}");
    }
}
