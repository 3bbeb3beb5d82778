//! What can be asked of a file without building it: its outline, its targets, its diagnostics as data, its plan as a picture.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use forge_frontend::outline::{Outline, outline, targets};
use forge_frontend::report::Report;
use forge_frontend::{Diagnostic, check, parse, show};
use futures_util::FutureExt as _;
use serde_json::json;
use support::{World, planned, request_of};

fn outlined(text: &str, words: &str) -> Outline {
    let (file, _) = parse(text);
    outline(&file, &request_of(words)).unwrap()
}

#[test]
fn arguments_are_those_that_the_target_needs() {
    let text = "
ARG inherited=box
ARG inherited2=box2
ARG unused=abc${inherited2}
# sfx is a suffix
ARG sfx=\"usy${inherited}\"

FROM b${sfx} AS first
# this describes nothing
ARG FOO=123
# BAR is a number
ARG BAR=456
RUN true

FROM alpine${unused} AS second
ARG BAZ
RUN true

FROM scratch AS third
ARG ABC=a
# other will show up
# check=skip=all
ARG other

# target defines build target
FROM third AS target
COPY --from=first /etc/passwd /

FROM second
";
    let outline = outlined(text, "arg:BAR=678 target:target");
    assert_eq!((outline.name.as_str(), outline.description.as_str()), ("target", "defines build target"));
    let args: Vec<_> = outline
        .args
        .iter()
        .map(|arg| (arg.name.as_str(), arg.value.as_str(), arg.description.as_str(), arg.location.first_line))
        .collect();
    assert_eq!(
        args,
        [
            ("inherited", "box", "", 2),
            ("sfx", "usybox", "is a suffix", 6),
            ("FOO", "123", "", 10),
            ("BAR", "678", "is a number", 12),
            ("ABC", "a", "", 20),
            ("other", "", "will show up", 23),
        ]
    );
    let names = |outline: Outline| outline.args.into_iter().map(|arg| arg.name).collect::<Vec<_>>();
    assert_eq!(names(outlined(text, "")), ["inherited2", "unused", "BAZ"]);
}

#[test]
fn arguments_by_one_name_are_listed_once_with_their_last_value() {
    let text = "ARG FOO=123\nARG ABC=abc\nARG DEF=def\nARG FOO=${FOO}${ABC}\nARG BAR=${FOO}456\nARG FOO=${FOO}456${BAR}\n\
                FROM scratch\nARG FOO\nARG INFOO=123\nARG INBAR=${INFOO}456\nARG INFOO=${INFOO}456${INBAR}\n";
    let args: Vec<_> = outlined(text, "").args.into_iter().map(|arg| (arg.name, arg.value)).collect();
    let expect = [
        ("ABC", "abc"),
        ("BAR", "123abc456"),
        ("FOO", "123abc456123abc456"),
        ("INBAR", "123456"),
        ("INFOO", "123456123456"),
    ];
    assert_eq!(args, expect.map(|(name, value)| (name.to_owned(), value.to_owned())));
}

#[test]
fn secrets_agents_and_caches_with_their_lines() {
    let text = "FROM busybox AS first
RUN --mount=type=secret,target=/etc/passwd,required=true --mount=type=ssh true
FROM alpine AS second
RUN --mount=type=secret,id=unused --mount=type=ssh,id=ssh2 true
FROM scratch AS third
ARG BAR
ENV DIR=/cache
ONBUILD RUN --mount=type=secret,id=later true
RUN --mount=type=secret,id=second${BAR} \\
    --mount=type=cache,target=$DIR/ true
FROM third AS target
COPY --from=first /foo /
RUN --mount=type=ssh,id=ssh3,required --mount=type=cache,id=named,target=/n true
RUN --mount=type=cache,id=named,target=/m true
FROM second
";
    let outline = serde_json::to_value(outlined(text, "arg:BAR=678 target:target")).unwrap();
    let lines = |first: usize, last: usize| json!({"ranges": [{"start": {"line": first}, "end": {"line": last}}]});
    assert_eq!(
        outline,
        json!({
            "name": "target",
            "args": [{"name": "BAR", "value": "678", "location": lines(6, 6)}],
            "secrets": [
                {"name": "passwd", "required": true, "location": lines(2, 2)},
                {"name": "second678", "location": lines(9, 10)},
                {"name": "later", "location": lines(11, 11)},
            ],
            "ssh": [{"name": "default", "location": lines(2, 2)}, {"name": "ssh3", "required": true, "location": lines(13, 13)}],
            "cache": [{"ID": "/cache", "location": lines(9, 10)}, {"ID": "named", "location": lines(13, 13)}],
        })
    );
}

#[test]
fn an_outline_says_what_is_wrong_with_stages() {
    let (file, _) = parse("FROM a AS b\n");
    let errors = outline(&file, &request_of("target:c")).unwrap_err();
    assert_eq!(errors[0].message, "target stage \"c\" could not be found");
}

#[test]
fn targets_as_buildkit_lists_them() {
    let (file, _) = parse(
        "# build compiles\nFROM --platform=$BUILDPLATFORM go:$V AS Build\nFROM build AS test\nFROM \\\n scratch\n",
    );
    let lines = |first: usize, last: usize| json!({"ranges": [{"start": {"line": first}, "end": {"line": last}}]});
    assert_eq!(
        serde_json::to_value(targets(&file)).unwrap(),
        json!([
            {"name": "build", "description": "compiles", "base": "go:$V", "platform": "$BUILDPLATFORM", "location": lines(2, 2)},
            {"name": "test", "base": "build", "location": lines(3, 3)},
            {"default": true, "base": "scratch", "location": lines(4, 5)},
        ])
    );
}

/// Parse and check, as `--call=check` does.
fn checked(text: &str, words: &str) -> (Vec<Diagnostic>, Vec<String>) {
    let (file, mut found) = parse(text);
    let world = World::new();
    found.extend(check(&file, &request_of(words), &world).now_or_never().unwrap());
    let asked = world.asked.lock().unwrap().clone();
    (found, asked)
}

#[test]
fn a_check_is_of_all_stages_and_reads_no_files() {
    let text = "FROM debian:12 AS a\nCOPY missing /\nRUN x\nENV B=$NOWHERE\nFROM debian:12\nWORKDIR w\n";
    let rules = |found: &[Diagnostic]| found.iter().filter_map(|found| found.rule).collect::<Vec<_>>();
    let (found, asked) = checked(text, "");
    assert_eq!(rules(&found), ["UndefinedVar", "WorkdirRelativePath"]);
    assert_eq!(asked, ["image debian:12 linux/amd64"]);
    assert_eq!(rules(&checked(text, "target:a").0), ["UndefinedVar"]);
    let (found, _) = checked("FROM nowhere AS a\nFROM debian:12\nCMD x\n", "");
    assert_eq!(found[0].message, "nowhere:latest: not found");
}

#[test]
fn lint_results_have_buildkits_shape() {
    let text = "FROM debian:12 AS Bc\nEXPOSE 80 x\nFROM nowhere\nSTOPSIGNAL ü\n";
    let (found, _) = checked(text, "arg:unused=1");
    let report = Report { file: "dir/Dockerfile", text, diagnostics: &found };
    let mut results = report.lint_results();
    assert_eq!(results["sources"][0]["filename"], "dir/Dockerfile");
    assert_eq!(results["sources"][0]["data"].as_str().unwrap().len(), text.len().div_ceil(3) * 4);
    results.as_object_mut().unwrap().remove("sources");
    assert_eq!(
        results,
        json!({
            "warnings": [{
                "ruleName": "StageNameCasing",
                "description": "Stage names are lowercase",
                "detail": "Stage name 'Bc' should be lowercase",
                "location": {"ranges": [{"start": {"line": 1, "character": 18}, "end": {"line": 1, "character": 20}}]},
                "hint": "write `bc`",
            }],
            "buildError": {
                "message": "nowhere:latest: not found",
                "location": {"ranges": [{"start": {"line": 3, "character": 5}, "end": {"line": 3, "character": 12}}]},
            },
        })
    );
    assert_eq!(report.notes().count(), 1, "an unused argument is no finding");
    let (found, _) = checked("# check=error=true\nFROM scratch AS A\n", "");
    let results = Report { file: "Dockerfile", text: "", diagnostics: &found }.lint_results();
    assert_eq!(results["buildError"]["message"], "lint violation found for rules: StageNameCasing");
}

#[test]
fn sarif_has_rules_results_and_places() {
    let text = "FROM debian:12 AS Bc\nRUN echo ü $\nSTOPSIGNAL ü\n";
    let (found, _) = checked(text, "arg:unused=1");
    let sarif = Report { file: "my dir/Dockerfile", text, diagnostics: &found }.sarif("1.2.3");
    assert_eq!(sarif["version"], "2.1.0");
    let run = &sarif["runs"][0];
    let driver = &run["tool"]["driver"];
    assert_eq!((&driver["name"], &driver["version"]), (&json!("forge"), &json!("1.2.3")));
    let rules: Vec<_> = driver["rules"].as_array().unwrap().iter().map(|rule| rule["id"].as_str().unwrap()).collect();
    let results = run["results"].as_array().unwrap();
    assert!(results.iter().all(|result| rules.contains(&result["ruleId"].as_str().unwrap())));
    let levels: Vec<_> = results.iter().map(|result| result["level"].as_str().unwrap()).collect();
    assert_eq!(levels, ["warning", "note", "error"]);
    assert_eq!(
        results[2]["locations"][0]["physicalLocation"],
        json!({
            "artifactLocation": {"uri": "my%20dir/Dockerfile"},
            "region": {"startLine": 3, "startColumn": 12, "endLine": 3, "endColumn": 13},
        })
    );
}

#[test]
fn a_plan_shows_each_step_after_what_it_reads() {
    let plan = planned("FROM debian:12 AS a\nRUN \"x\\n\"\nFROM scratch\nCOPY --from=a /x /y\nCOPY z /\n", "");
    let text = show::text(&plan);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 7, "{text}");
    let position = |part: &str| lines.iter().position(|line| line.contains(part)).unwrap();
    assert!(position("FROM docker.io") < position("RUN \"x\\n\""), "{text}");
    assert!(position("RUN \"x\\n\"") < position("COPY --from=a"), "{text}");
    assert!(lines[position("COPY --from=a")].contains("<- "), "{text}");
    assert_eq!(lines[6], "image linux/amd64 = 6");

    let json = show::json(&plan);
    let nodes = json["nodes"].as_array().unwrap();
    let known = |until: usize, id: &serde_json::Value| nodes[..until].iter().any(|node| node["id"] == *id);
    for (index, node) in nodes.iter().enumerate() {
        assert!(node["inputs"].as_array().unwrap().iter().all(|input| known(index, input)), "{node}");
    }
    assert_eq!(json["images"][0]["root"], nodes[5]["id"]);
    assert_eq!(nodes[position("RUN")]["operation"]["args"][0], "/bin/sh");

    let dot = show::dot(&plan);
    assert!(dot.starts_with("digraph build {\n") && dot.ends_with("}\n"));
    assert!(dot.contains(r#"RUN \"x\\n\"""#), "{dot}");
    assert_eq!(dot.matches(" -> ").count(), 6, "{dot}");
    assert_eq!(dot.lines().filter(|line| line.matches('"').count() % 2 == 1).count(), 0, "{dot}");
}
