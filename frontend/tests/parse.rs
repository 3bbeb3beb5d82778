//! What the parser says of text: trees, mistakes, checks; and that no text makes it fall over.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use dockerfile_parser::{Dockerfile as Other, Instruction as OtherInstruction};
use forge_frontend::expand::Expander;
use forge_frontend::instruction::{CommandLine, Kind};
use forge_frontend::{Severity, ignore, parse};
use proptest::prelude::*;
use support::{World, build, rendered, request};

/// `text` must give a diagnostic that shows all of `expect`'s parts (separated by `|`).
fn check(text: &str, severity: Severity, expect: &str) {
    let (_, found) = parse(text);
    let found: Vec<_> = found.into_iter().filter(|diagnostic| diagnostic.severity == severity).collect();
    let shown = rendered(text, &found);
    for part in expect.split('|') {
        assert!(shown.contains(part), "{text}\nwanted {part}\n{shown}");
    }
}

#[test]
fn mistakes_and_what_to_write_instead() {
    for (text, expect) in [
        ("FORM a\n", "1:1: error: unknown instruction: FORM|did you mean `FROM`?"),
        ("FROM a\n  Rnu x\n", "2:3: error: unknown instruction: Rnu|did you mean `RUN`?"),
        ("FROM a AS\n", "1:8: error: AS lacks a name"),
        ("FROM a b\n", "either one or three"),
        ("FROM a AS 1x\n", "1:11: error: invalid name for build stage: \"1x\""),
        ("FROM\n", "FROM lacks an image"),
        ("RUN x\n", "1:1: error: RUN before the first FROM"),
        ("", "the file has no instructions"),
        ("# just this\n", "the file has no instructions"),
        ("ARG a=b\n", "the file has no FROM"),
        ("FROM a\nCOPY --form=x a b\n", "2:6: error: unknown flag --form for COPY|did you mean `--from`?"),
        ("FROM a\nCOPY --link=maybe a b\n", "--link is true or false"),
        ("FROM a\nCOPY --from a b\n", "missing a value on flag --from"),
        ("FROM a\nCOPY --chown=a --chown=b c d\n", "duplicate flag --chown"),
        ("FROM a\nCOPY x\n", "COPY requires at least two arguments"),
        ("FROM a\nCOPY x <<E\nE\n", "2:8: error: COPY cannot accept a heredoc as a destination"),
        ("FROM a\nENV A\n", "ENV must have two arguments"),
        ("FROM a\nENV A=1 B\n", "2:9: error: can't find = in \"B\""),
        ("FROM a\nENV =1\n", "names can not be blank"),
        ("FROM a\nLABEL\n", "LABEL requires at least one argument"),
        ("FROM a\nCMD [1]\n", "2:5: error: when using JSON array syntax"),
        ("FROM a\nSHELL bash -c\n", "in JSON form"),
        ("FROM a\nRUN <<EOF\nx\n", "2:1: error: unterminated heredoc: no line \"EOF\" follows"),
        ("FROM a\nRUN --network=hosts x\n", "2:15: error: network mode \"hosts\" is not valid|did you mean `host`?"),
        ("FROM a\nRUN --mount=type=bind,from=$x,target=/a x\n", "'from' doesn't support variable expansion"),
        ("FROM a\nRUN --mount='a\"b' x\n", "2:5: error: invalid --mount: a quote within a field"),
        ("FROM a\nHEALTHCHECK --interval=5 CMD x\n", "2:24: error: invalid duration \"5\""),
        ("FROM a\nHEALTHCHECK --interval=5us CMD x\n", "less than 1ms"),
        ("FROM a\nHEALTHCHECK --retries=-1 CMD x\n", "--retries is a number"),
        ("FROM a\nHEALTHCHECK TCP 80\n", "unknown type \"TCP\""),
        ("FROM a\nHEALTHCHECK CMD\n", "missing command"),
        ("FROM a\nONBUILD ONBUILD RUN x\n", "2:9: error: ONBUILD isn't allowed as an ONBUILD trigger"),
        ("FROM a\nONBUILD FROM x\n", "FROM isn't allowed"),
        // The form of a trigger is judged at once.
        ("FROM a\nONBUILD ENV A\n", "2:9: error: ENV must have two arguments"),
        ("FROM a\nONBUILD LABEL a=b c\n", "2:19: error: can't find = in \"c\""),
        ("FROM a\nONBUILD CMD [1]\n", "2:13: error: when using JSON array syntax"),
        // Files that say that they are for another frontend.
        ("// syntax=other/frontend:1\nthings {\n}\n", "1:1: error: the file is for the frontend \"other/frontend:1\""),
        ("#!/usr/bin/x\n{\"syntax\": \"a/b\",\n\"things\": [1]}\n", "2:1: error: the file is for the frontend \"a/b\""),
        ("// syntax=docker/dockerfile:1\nFROM a\n", "1:1: error: unknown instruction: //"),
        ("# escape=x\nFROM a\n", "1:1: error: invalid escape character \"x\""),
        ("# escape=`\n# escape=`\nFROM a\n", "2:1: error: only one escape parser directive"),
        ("# check=foo=1\nFROM a\n", "invalid check option"),
        ("FROM a\nVOLUME [\"\"]\n", "can not be an empty string"),
        // A mistake does not hide the next one.
        ("FROM a\nNOPE\nALSO NOPE\n", "2:1: error: unknown instruction: NOPE|3:1: error: unknown instruction: ALSO"),
    ] {
        check(text, Severity::Error, expect);
    }
    let long = format!("FROM a\nRUN {}\n", "x".repeat(70_000));
    check(&long, Severity::Error, "2:1: error: the line is longer than 65535 bytes");
}

#[test]
fn positions_hold_through_continuations() {
    check("FROM a\nCOPY \\\n  # comment\n  --ü=1 \\\n  a b\n", Severity::Error, "4:3: error: unknown flag --ü|^^^^^\n");
    check("\u{feff}FROM a\r\nRUN \\\r\n  --bad x\r\n", Severity::Error, "3:3: error: unknown flag --bad");
    check("# escape=`\nFROM a\nCOPY `\n --bad a c:\\b\\\n", Severity::Error, "4:2: error: unknown flag --bad");
}

#[test]
fn checks_by_their_names() {
    for (text, expect) in [
        ("FROM a AS Bc\n", "1:11: warning[StageNameCasing]: Stage name 'Bc' should be lowercase"),
        ("FROM a as b\n", "1:8: warning[FromAsCasing]: 'as' and 'FROM' keywords' casing do not match"),
        ("FROM a\nRUN x \\\n\n y\n", "3:1: warning[NoEmptyContinuation]"),
        (
            "FROM a\nrun x\n",
            "2:1: warning[ConsistentInstructionCasing]: Command 'run' should match the case of the command majority (uppercase)",
        ),
        ("FROM a AS b\nFROM a AS b\n", "2:11: warning[DuplicateStageName]"),
        (
            "FROM a AS scratch\n",
            "warning[ReservedStageName]: Stage name should not use the same name as reserved stage \"scratch\"",
        ),
        (
            "FROM a\nMAINTAINER me\n",
            "warning[MaintainerDeprecated]|write `LABEL org.opencontainers.image.authors=\"me\"`",
        ),
        ("FROM a\nENV b c d\n", "2:5: warning[LegacyKeyValueFormat]|write `ENV b=\"c d\"`"),
        ("FROM a\nCMD [\"a\"]\nCMD [\"b\"]\n", "2:1: warning[MultipleInstructionsDisallowed]: Multiple CMD"),
        (
            "FROM a\nARG DB_PASSWORD\n",
            "2:5: warning[SecretsUsedInArgOrEnv]: Do not use ARG or ENV instructions for sensitive data (ARG \"DB_PASSWORD\")",
        ),
        ("ARG V\nFROM a:$V\n", "warning[InvalidDefaultArgInFrom]: Default value for ARG a:$V results"),
        ("FROM --platform=$TARGETPLATFORM a\n", "1:17: warning[RedundantTargetPlatform]"),
        ("FROM --platform=linux/amd64 a\n", "1:17: warning[FromPlatformFlagConstDisallowed]"),
        ("# check=skip=StageNameCasng\nFROM a\n", "there is no check named|did you mean `StageNameCasing`?"),
        ("# syntax=example/other:1\nFROM a\n", "1:1: warning: syntax \"example/other:1\" is not built in"),
        ("# check=experimental=all\n\n# about\nFROM a AS b\n", "InvalidDefinitionDescription"),
    ] {
        check(text, Severity::Warning, expect);
    }
    for quiet in [
        "FROM a AS b\nENV TOKEN_FILE=x PUBLIC_KEY=y c=d\nRUN x \\\n# comment\n y\n",
        "# check=skip=all\nFROM a as B\nMAINTAINER me\n",
        "from a as b\nrun x\n",
        "FROM a\n# check=skip=MaintainerDeprecated\nMAINTAINER me\n",
        "FROM --platform=linux/amd64 a AS amd64-build\n",
        "FROM --platform=$BUILDPLATFORM a\n",
    ] {
        let (_, found) = parse(quiet);
        assert!(found.is_empty(), "{quiet}{found:?}");
    }
    check("# check=error=true\nFROM a as b\n", Severity::Error, "error[FromAsCasing]");
}

#[test]
fn directives_end_with_the_first_other_line() {
    let escape = |text: &str| parse(text).0.directives.escape;
    assert_eq!(escape("# escape=`\nFROM a\n"), '`');
    assert_eq!(escape("\u{feff}#ESCAPE = `\nFROM a\n"), '`');
    assert_eq!(escape("# syntax=docker/dockerfile:1\n# escape=`\nFROM a\n"), '`');
    assert_eq!(escape("# a comment\n# escape=`\nFROM a\n"), '\\');
    assert_eq!(escape("\n# escape=`\nFROM a\n"), '\\');
    assert_eq!(escape("# unknown=x\n# escape=`\nFROM a\n"), '\\');
    let (file, _) = parse("#!/usr/bin/env forge\n# syntax = docker/dockerfile:1 \nFROM a\n");
    assert_eq!(file.directives.syntax.unwrap().value, "docker/dockerfile:1");
}

#[test]
fn shell_form_where_json_is_not() {
    let command = |text: &str| {
        let (file, found) = parse(&format!("FROM a\nCMD {text}\n"));
        assert!(!found.iter().any(|diagnostic| diagnostic.is_error()), "{found:?}");
        match file.stages[0].instructions[0].kind.clone() {
            Kind::Cmd(line) => line,
            kind => panic!("{kind:?}"),
        }
    };
    let exec = |words: &[&str]| CommandLine::Exec(words.iter().map(|word| (*word).to_owned()).collect());
    assert_eq!(command("[\"a\", \"b\\n\"]"), exec(&["a", "b\n"]));
    assert_eq!(command("[]"), exec(&[]));
    for shell in ["['a']", "[\"a\"", "[\"a\"] b", "[ -f x ] && y", "\"a\""] {
        assert!(matches!(command(shell), CommandLine::Shell(word) if word.text == shell), "{shell}");
    }
}

#[test]
fn a_broken_trigger_hurts_no_one_yet() {
    let (file, found) = parse("FROM a\nONBUILD COPY --bogus a b\n");
    assert!(found.iter().all(|diagnostic| diagnostic.severity == Severity::Warning));
    assert_eq!(found.len(), 1);
    let Kind::Onbuild(onbuild) = &file.stages[0].instructions[0].kind else { panic!() };
    assert_eq!((onbuild.source.as_str(), onbuild.instruction.is_none()), ("COPY --bogus a b", true));
}

/// What both parsers know must be read alike.
fn agrees(text: &str) {
    let (file, _) = parse(text);
    let other = Other::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let mine: Vec<String> = file
        .stages
        .iter()
        .flat_map(|stage| {
            let name = stage.name.as_ref().map(|(_, name)| name.text.as_str());
            let from = format!("FROM {} {:?}", stage.base.text, name);
            std::iter::once(from).chain(stage.instructions.iter().filter_map(|instruction| match &instruction.kind {
                Kind::Run(run) => Some(command("RUN", &run.command)),
                Kind::Cmd(line) => Some(command("CMD", line)),
                Kind::Entrypoint(line) => Some(command("ENTRYPOINT", line)),
                Kind::Copy(copy) if !copy.add => {
                    let paths: Vec<&str> = copy.paths.iter().map(|word| word.text.as_str()).collect();
                    Some(format!("COPY {paths:?} {}", copy.destination.text))
                }
                _ => None,
            }))
        })
        .collect();
    let theirs: Vec<String> = other.instructions.iter().filter_map(known).collect();
    assert_eq!(mine, theirs, "{text}");
}

fn command(name: &str, line: &CommandLine) -> String {
    match line {
        CommandLine::Exec(args) => format!("{name} {args:?}"),
        CommandLine::Shell(word) => format!("{name} {}", words(&word.text)),
    }
}

/// Blanks at continuations are kept by one parser and not by the other.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn known(instruction: &OtherInstruction) -> Option<String> {
    use dockerfile_parser::ShellOrExecExpr as Expr;
    let line = |name: &str, expr: &Expr| match expr {
        Expr::Shell(text) => format!("{name} {}", words(&text.to_string())),
        Expr::Exec(list) => format!("{name} {:?}", list.as_str_vec()),
    };
    match instruction {
        OtherInstruction::From(from) => {
            let name = from.alias.as_ref().map(|alias| alias.content.as_str());
            Some(format!("FROM {} {:?}", from.image.content, name))
        }
        OtherInstruction::Run(run) => Some(line("RUN", &run.expr)),
        OtherInstruction::Cmd(cmd) => Some(line("CMD", &cmd.expr)),
        OtherInstruction::Entrypoint(entry) => Some(line("ENTRYPOINT", &entry.expr)),
        OtherInstruction::Copy(copy) => {
            let paths: Vec<&str> = copy.sources.iter().map(|source| source.content.as_str()).collect();
            Some(format!("COPY {paths:?} {}", copy.destination.content))
        }
        _ => None,
    }
}

#[test]
fn another_parser_reads_simple_files_alike() {
    for text in [
        "FROM alpine:3.20 AS build\nRUN apk add \\\n    gcc \\\n    make\nCOPY a b /src/\nCMD [\"sh\", \"-c\"]\n",
        "FROM scratch\nCOPY --from=build /a /b\nENTRYPOINT [\"/b\"]\n",
        "FROM a\nRUN [\"ls\", \"-l\"]\nRUN echo \"hi\" && true\nCMD echo $HOME\n",
        "# syntax=docker/dockerfile:1\nFROM node:22\nWORKDIR /app\nENV A=b C=\"d e\"\nCOPY package.json ./\nRUN npm ci\n# done\nCOPY . .\nENTRYPOINT npm start\n",
        "ARG V=1\nFROM x:$V\nLABEL a=b\nRUN x \\\n # comment\n  y\n",
    ] {
        agrees(text);
    }
}

#[test]
fn a_long_file_is_planned_quickly() {
    let mut text = String::from("FROM debian:12\n");
    for line in 0..2000 {
        text.push_str(&match line % 4 {
            0 => format!("ENV A{line}=value\n"),
            1 => format!("RUN make -C dir{line} \\\n  all\n"),
            2 => format!("COPY a{line} b{line} /dst/\n"),
            _ => format!("LABEL l{line}=$A{}\n", line - 3),
        });
    }
    let start = std::time::Instant::now();
    let (plan, _) = build(&text, &request(), &World::new());
    let elapsed = start.elapsed();
    assert_eq!(plan.unwrap().images[0].history.len(), 2000);
    // Far above what it takes, so that a busy machine does not fail it; a quadratic parser would.
    assert!(elapsed.as_secs() < 5, "{elapsed:?}");
}

/// Text that looks enough like a Dockerfile to reach the corners.
fn dockerfile() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "(FROM|from|RUN|COPY|ADD|ENV|ARG|LABEL|ONBUILD|HEALTHCHECK|EXPOSE|VOLUME|USER|WORKDIR|CMD|SHELL|#|# check=|# escape=)",
        "( |\t|\n|\r\n|\\\\\n|`|\\\\|\"|'|=|\\$|\\$\\{|\\}|:-|//|##|%|,)",
        "(--from=|--mount=type=|--chmod=|--link|cache|bind|target=/a|from=|AS |<<EOF|<<-'E'|EOF|E|scratch|debian:12)",
        "[a-z0-9./*\\[\\]]{0,6}",
        any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_parser_or_the_plan_fall_over(text in dockerfile()) {
        let (result, found) = build(&text, &request(), &World::new());
        let all = found.into_iter().chain(result.err().unwrap_or_default());
        for diagnostic in all {
            prop_assert!(diagnostic.span.start <= diagnostic.span.end && diagnostic.span.end <= text.len());
            rendered(&text, &[diagnostic]);
        }
    }

    #[test]
    fn no_stage_makes_the_plan_fall_over(text in dockerfile()) {
        build(&format!("FROM debian:12 AS a\n{text}\nFROM a\n{text}"), &request(), &World::new()).0.ok();
    }

    #[test]
    fn no_word_makes_expansion_fall_over(word in "[$a{}:?+\\-#%/*\\\\'\"< ]{0,40}", raw in any::<bool>()) {
        let scope = vec![("a".to_owned(), "value/*\\".to_owned())];
        let expander = Expander { ignore_quotes: raw, keep_unset: raw, ..Expander::new('\\') };
        if let Ok(expansion) = expander.expand(&word, scope.as_slice()) {
            prop_assert!(expansion.text.len() <= word.len() * 64);
        }
    }

    #[test]
    fn ignore_patterns_are_clean(text in "[a/.!# *\n\\\\]{0,40}") {
        for pattern in ignore::patterns(&text) {
            let path = pattern.trim_start_matches('!');
            prop_assert!(!path.contains("//") && (path.len() < 2 || !path.ends_with('/')), "{pattern:?}");
        }
    }

    #[test]
    fn a_tree_is_the_same_when_printed_and_read_again(lines in prop::collection::vec(statement(), 0..20)) {
        let text = format!("FROM a\n{}", lines.concat());
        let (file, found) = parse(&text);
        prop_assert!(!found.iter().any(|diagnostic| diagnostic.is_error()), "{}", rendered(&text, &found));
        let printed = print(&text, &file);
        let (again, _) = parse(&printed);
        prop_assert_eq!(shape(&file), shape(&again), "{}", printed);
    }
}

/// A valid instruction, cut by continuations and comments.
fn statement() -> impl Strategy<Value = String> {
    let word = "([a-zA-Z0-9$./{}]{1,6}|\"[a-z \\\\]{0,3}x\"|'[a-z]{0,3}')";
    let cut = prop_oneof![Just(" "), Just(" \\\n  "), Just("\t\\ \n# comment\n"), Just("  \\\r\n\r\n")];
    let words = prop::collection::vec((cut, word), 2..6);
    let keyword = prop_oneof![
        "(RUN|run|CMD|COPY|ADD --link|COPY --from=x|ENTRYPOINT|EXPOSE|VOLUME|ONBUILD RUN|USER|WORKDIR|HEALTHCHECK CMD)",
        "(ARG|FROM x AS|LABEL a|ENV a|RUN --mount=type=cache,target=/a)",
    ];
    let rest = words.prop_map(|words| words.into_iter().map(|(cut, word)| format!("{cut}{word}")).collect::<String>());
    let line = (keyword, rest).prop_map(|(keyword, rest)| match keyword.as_str() {
        "FROM x AS" => "FROM x AS y\n".to_owned(),
        _ => format!("{keyword}{rest}\n"),
    });
    let heredoc = "(RUN|COPY|ONBUILD COPY) <<(-E|'E') /x\n\t?[a-z#\\\\]{0,8}\nE\n";
    prop_oneof![4 => line, 1 => heredoc]
}

/// A tree without its places.
fn shape(file: &forge_frontend::Dockerfile) -> String {
    let places = regex::Regex::new(r"Span \{ start: \d+, end: \d+ \}|_line: \d+").unwrap();
    let stages = file.stages.iter().map(|stage| {
        let kinds: Vec<_> =
            stage.instructions.iter().map(|instruction| (&instruction.kind, &instruction.code.text)).collect();
        format!("{} {:?} {kinds:?}", stage.base.text, stage.name())
    });
    places.replace_all(&stages.collect::<Vec<_>>().join("\n"), "").into_owned()
}

/// One instruction a line, heredocs as they were.
fn print(text: &str, file: &forge_frontend::Dockerfile) -> String {
    let mut out = String::new();
    let stages = file.stages.iter().flat_map(|stage| {
        std::iter::once(&stage.code).chain(stage.instructions.iter().map(|instruction| &instruction.code))
    });
    for code in file.globals.iter().map(|instruction| &instruction.code).chain(stages) {
        if code.text.contains("<<") {
            out.push_str(&text[code.span.start..code.span.end]);
        } else {
            out.push_str(&code.text);
        }
        out.push('\n');
    }
    out
}

#[test]
fn doubling_a_value_again_and_again_is_refused() {
    let mut text = String::from("FROM debian:12\nENV A=aaaaaaaaaaaaaaaa\n");
    text.push_str(&"ENV A=$A$A\n".repeat(60));
    let (result, _) = build(&text, &request(), &World::new());
    assert!(rendered(&text, &result.unwrap_err()).contains("longer than"));
    let wide = format!("FROM debian:12\nENV A={}\n{}", "a".repeat(60_000), "RUN x\n".repeat(5000));
    let (result, _) = build(&wide, &request(), &World::new());
    assert!(rendered(&wide, &result.unwrap_err()).contains("hold more than"));
    let deep = format!("FROM debian:12\nENV A={}{}\n", "${B:-".repeat(500), "}".repeat(500));
    let (result, _) = build(&deep, &request(), &World::new());
    assert!(rendered(&deep, &result.unwrap_err()).contains("nested deeper"));
}
