//! What plans hold: history, configuration, operations, questions.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use forge_solver::graph::{CopySource, MountKind, Network, Op, Security, Sharing, Unpack};
use support::{World, build, history, labels, ops, planned, rendered, request_of};

/// `Dockerfile`, request, and the history that the plan must have.
fn check_history(text: &str, words: &str, expect: &[&str]) {
    let plan = planned(text, words);
    assert_eq!(history(&plan), expect, "{text}");
    // What stands in the history is what leads from the base to the root.
    let last = plan.images[0].history.iter().rev().find_map(|line| line.layer.clone());
    if let Some(last) = last {
        assert_eq!(last, plan.images[0].root);
    }
}

#[test]
fn history_reads_as_buildkit_writes_it() {
    check_history(
        concat!(
            "FROM debian:12\nARG A=b C\nENV X=\"1 2\" Y=$A\nLABEL a=$X b\\ c=d\nRUN make $A\nRUN [\"ls\", \"-l\"]\n",
            "COPY --chown=1:2 --chmod=755 --link a \"b\" dst/\nADD a /x\nWORKDIR w\nWORKDIR /\nCMD [\"sh\", \"a\\\"b\"]\n",
            "ENTRYPOINT go\nEXPOSE 81/UDP 80 8000-8001\nVOLUME /a /b\nUSER 1:2\nSTOPSIGNAL SIGTERM\nSHELL [\"/bin/bash\", \"-c\"]\n",
            "HEALTHCHECK --interval=5m --retries=3 CMD a b\nMAINTAINER Me\nRUN last\n",
        ),
        "",
        &[
            "  ARG A=b C",
            "  ENV X=1 2 Y=b",
            "  LABEL a=1 2 b c=d",
            "+ RUN |2 A=b C= /bin/sh -c make $A # buildkit",
            "+ RUN |2 A=b C= ls -l # buildkit",
            "+ COPY --chown=1:2 --chmod=755 a b dst/ # buildkit",
            "+ ADD a /x # buildkit",
            "+ WORKDIR /w",
            "  WORKDIR /",
            "  CMD [\"sh\" \"a\\\"b\"]",
            "  ENTRYPOINT [\"/bin/sh\" \"-c\" \"go\"]",
            "  EXPOSE [80/tcp 8000/tcp 8001/tcp 81/udp]",
            "  VOLUME [/a /b]",
            "  USER 1:2",
            "  STOPSIGNAL SIGTERM",
            "  SHELL [/bin/bash -c]",
            "  HEALTHCHECK {Test:[CMD-SHELL a b] Interval:5m0s Timeout:0s StartPeriod:0s StartInterval:0s Retries:3}",
            "  MAINTAINER Me",
            "+ RUN |2 A=b C= /bin/bash -c last # buildkit",
        ],
    );
}

#[test]
fn configuration_is_inherited_and_changed() {
    let plan = planned("FROM app\nENV B=$A A=2\nLABEL x=y\nEXPOSE 80\nWORKDIR sub\nCMD run\n", "");
    let config = &plan.images[0].config.config;
    assert_eq!(config.env, ["A=2", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "B=1"]);
    assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("app", "/srv/sub"));
    assert_eq!(config.cmd.as_deref(), Some(&["/bin/bash".to_owned(), "-c".to_owned(), "run".to_owned()][..]));
    assert_eq!(config.args_escaped, Some(true));
    assert!(plan.images[0].config.other.is_empty(), "what the base said of its own making is not inherited");
    let [Op::Mkdir(mkdir)] = ops(&plan)[..] else { panic!() };
    assert_eq!(mkdir.owner.as_ref().map(|owner| owner.user.as_str()), Some("app"));
}

#[test]
fn an_entrypoint_drops_the_inherited_cmd_only() {
    for (text, cmd) in [
        ("FROM debian:12\nENTRYPOINT [\"a\"]\n", None),
        ("FROM debian:12\nCMD [\"b\"]\nENTRYPOINT [\"a\"]\n", Some("b")),
        ("FROM debian:12 AS x\nCMD [\"b\"]\nFROM x\nENTRYPOINT [\"a\"]\n", None),
    ] {
        let plan = planned(text, "");
        let got = plan.images[0].config.config.cmd.as_ref().map(|cmd| cmd[0].as_str());
        assert_eq!(got, cmd, "{text}");
    }
}

#[test]
fn stages_inherit_and_unneeded_ones_are_not_asked_about() {
    let text = "FROM debian:12 AS base\nENV A=1\nARG B=2\nRUN one\nFROM nothing AS unused\nCOPY missing /\n\
                FROM base\nRUN two\nFROM base AS last\nCOPY --from=2 /a /a\nRUN three\n";
    let world = World::new();
    let (plan, _) = build(text, &request_of(""), &world);
    let plan = plan.unwrap();
    assert_eq!(*world.asked.lock().unwrap(), ["image debian:12 linux/amd64"]);
    assert_eq!(
        history(&plan),
        [
            "  ENV A=1",
            "  ARG B=2",
            "+ RUN |1 B=2 /bin/sh -c one # buildkit",
            "+ COPY /a /a # buildkit",
            "+ RUN |1 B=2 /bin/sh -c three # buildkit"
        ]
    );
    assert_eq!(
        labels(&plan).iter().filter(|label| !label.contains("FROM")).collect::<Vec<_>>(),
        ["[base 2/2] RUN one", "[last 1/2] COPY --from=2 /a /a", "[last 2/2] RUN three", "[stage-2 1/1] RUN two"]
    );
    let base = labels(&plan).into_iter().find(|label| label.contains("FROM")).unwrap();
    assert!(base.starts_with("[base 1/2] FROM docker.io/library/debian:12@sha256:"), "{base}");
    assert_eq!(history(&planned(text, "target:Base")).len(), 3);
}

#[test]
fn arguments_have_their_scopes() {
    for (text, words, expect) in [
        // A global is seen by FROM alone until it is declared again.
        ("ARG V=12\nFROM debian:$V\nRUN x\n", "", "+ RUN /bin/sh -c x # buildkit"),
        ("ARG V=12\nFROM debian:$V\nARG V\nRUN x\n", "", "+ RUN |1 V=12 /bin/sh -c x # buildkit"),
        ("ARG V=11\nFROM debian:$V\nARG V\nRUN x\n", "arg:V=12", "+ RUN |1 V=12 /bin/sh -c x # buildkit"),
        ("FROM debian:12\nARG V=1\nARG W=$V-\nRUN x\n", "", "+ RUN |2 V=1 W=1- /bin/sh -c x # buildkit"),
        ("FROM debian:12\nARG V=1\nENV V=2\nRUN x\n", "arg:V=3", "+ RUN |1 V=2 /bin/sh -c x # buildkit"),
        ("FROM debian:12\nARG TARGETARCH\nRUN x\n", "", "+ RUN |1 TARGETARCH=amd64 /bin/sh -c x # buildkit"),
        ("FROM debian:12 AS z\nARG TARGETSTAGE\nRUN x\n", "", "+ RUN |1 TARGETSTAGE=z /bin/sh -c x # buildkit"),
        ("FROM debian:12\nRUN x\n", "arg:HTTP_PROXY=p", "+ RUN /bin/sh -c x # buildkit"),
    ] {
        assert_eq!(history(&planned(text, words)).pop().unwrap(), expect, "{text}");
    }
}

#[test]
fn proxies_enter_no_key_unless_declared() {
    let unkeyed = |text: &str| match ops(&planned(text, "arg:https_proxy=p"))[0] {
        Op::Run(run) => (run.unkeyed.proxy_env.len(), run.env.iter().any(|(name, _)| name == "https_proxy")),
        op => panic!("{op:?}"),
    };
    assert_eq!(unkeyed("FROM debian:12\nRUN x\n"), (2, false));
    assert_eq!(unkeyed("FROM debian:12\nARG https_proxy\nRUN x\n"), (1, true));
    let id = |words| planned("FROM debian:12\nRUN x\n", words).images[0].root.clone();
    assert_eq!(id("arg:https_proxy=p"), id(""));
}

#[test]
fn run_is_a_complete_value() {
    let plan = planned("FROM app\nRUN --network=none --security=insecure make\n", "arg:BUILDKIT_SANDBOX_HOSTNAME=h");
    let [Op::Run(run)] = ops(&plan)[..] else { panic!() };
    assert_eq!(run.args, ["/bin/bash", "-c", "make"]);
    assert_eq!((run.cwd.as_str(), run.user.as_str(), run.hostname.as_str()), ("/srv", "app", "h"));
    assert_eq!((run.network, run.security), (Network::None, Security::Insecure));
    assert!(run.env.iter().any(|(name, value)| name == "PATH" && value.ends_with(":/bin")));
}

#[test]
fn heredocs_become_scripts_programs_and_files() {
    let run = |text: &str| match ops(&planned(&format!("FROM debian:12\n{text}"), ""))[0] {
        Op::Run(run) => (run.args[2].clone(), run.files.clone()),
        op => panic!("{op:?}"),
    };
    assert_eq!(run("RUN <<EOF\nset -e\n\tmake $A\nEOF\n").0, "set -e\n\tmake $A\n");
    assert_eq!(run("RUN <<-EOF\n\tmake\n\tEOF\n").0, "make\n");
    assert_eq!(run("RUN cat <<A 3<<'B' >x\na\nA\nb\nB\n").0, "cat <<A 3<<'B' >x\na\nA\nb\nB");
    let (command, files) = run("RUN <<EOF\n#!/bin/python\nprint()\nEOF\n");
    assert_eq!(command, "/dev/pipes/EOF");
    assert_eq!((files[0].path.as_str(), files[0].mode), ("/dev/pipes/EOF", 0o755));
    assert_eq!(files[0].data, "#!/bin/python\nprint()\n");

    let plan = planned("FROM debian:12\nENV A=1\nCOPY <<a <<\"b\" c /d\n$A \"q\" \\$A\na\n$A\nb\n", "");
    let [Op::Copy(copy)] = ops(&plan)[..] else { panic!() };
    let inline = |name: &str, data: &str| CopySource::Inline { name: name.to_owned(), data: data.to_owned() };
    assert_eq!(copy.sources[1..], [inline("a", "1 \"q\" $A\n"), inline("b", "$A\n")]);
    assert_eq!(copy.destination, "/d/");
    assert_eq!(history(&plan)[1], "+ COPY c <<a <<b /d # buildkit");
    assert_eq!(labels(&plan).iter().find(|label| label.contains("COPY")).unwrap(), "[2/2] COPY <<a <<b c /d");
}

#[test]
fn copies_read_what_they_name_and_cannot_leave() {
    let world = World::new();
    let text = "FROM debian:12\nWORKDIR /w\nCOPY ../../etc/x ./a/ *.c .\nCOPY --exclude=*.md / sub\n\
                COPY --parents src/./a/*.c b /p/\nCOPY --from=app /etc /e\nCOPY --from=extra ./x /y\n";
    let (plan, _) = build(text, &request_of("files:extra"), &world);
    let plan = plan.unwrap_or_else(|errors| panic!("{}", rendered(text, &errors)));
    let asked = world.asked.lock().unwrap().clone();
    assert_eq!(asked[..2], ["image app:latest linux/amd64", "image debian:12 linux/amd64"]);
    assert_eq!(
        asked[2..],
        [
            "context main [\"\"] but [\"*.md\"]",
            "context main [\"*.c\", \"a\", \"etc/x\"]",
            "context main [\"b\", \"src/a/*.c\"]",
            "context extra [\"x\"]"
        ]
    );
    let copies: Vec<_> =
        ops(&plan).into_iter().filter_map(|op| if let Op::Copy(copy) = op { Some(copy) } else { None }).collect();
    assert_eq!(copies[0].destination, "/w/");
    assert_eq!(copies[1].destination, "/w/sub");
    let pivot = |source: &CopySource| match source {
        CopySource::Path { path, pivot, .. } => (path.clone(), pivot.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(pivot(&copies[2].sources[0]), ("src/a/*.c".to_owned(), Some("src".to_owned())));
    assert_eq!(pivot(&copies[2].sources[1]), ("b".to_owned(), None));
    let names = labels(&plan);
    assert!(names.iter().any(|name| name == "[context extra] load from client"), "{names:?}");
    assert_eq!(names.iter().filter(|name| *name == "[internal] load build context").count(), 3);
}

#[test]
fn add_takes_archives_urls_and_repositories() {
    let plan = planned(
        "FROM debian:12\nADD a.tar /\nADD https://h/b.tgz /b\nADD --unpack https://h/b.tgz /c\n\
         ADD https://h/r.git#v1:dir /d\nADD --unpack=false a.tar /\n",
        "",
    );
    let copies: Vec<_> = ops(&plan)
        .into_iter()
        .map(|op| match op {
            Op::Copy(copy) => (copy.unpack, copy.sources.clone()),
            op => panic!("{op:?}"),
        })
        .collect();
    let path = |path: &str| vec![CopySource::Path { input: 1, path: path.to_owned(), pivot: None }];
    assert_eq!(
        copies,
        [
            (Unpack::Archives, path("a.tar")),
            (Unpack::Never, path("b.tgz")),
            (Unpack::Archives, path("b.tgz")),
            (Unpack::Never, path("")),
            (Unpack::Never, path("a.tar"))
        ]
    );
}

#[test]
fn mounts_of_every_type() {
    let text = "FROM debian:12 AS tools\nFROM debian:12\nWORKDIR /w\nARG T=/root/.cache\n\
        RUN --mount=target=src,source=a*,rw --mount=type=bind,from=tools,source=/bin/../lib,target=/t \
        --mount=type=cache,target=$T/,sharing=locked,mode=0700,uid=5 --mount=type=tmpfs,target=/tmp,size=1m \
        --mount=type=secret,id=k --mount=type=secret,id=e,env=TOKEN --mount=type=ssh,required x $TOKEN\n";
    let plan = planned(text, "");
    let Some(Op::Run(run)) = ops(&plan).pop() else { panic!() };
    let got: Vec<_> = run.mounts.iter().map(|mount| (mount.target.as_str(), mount.kind.clone())).collect();
    let secret = |id: &str, env: Option<&str>, file| MountKind::Secret {
        id: id.to_owned(),
        env: env.map(str::to_owned),
        file,
        required: false,
        mode: 0o400,
        uid: 0,
        gid: 0,
    };
    assert_eq!(
        got,
        [
            ("/w/src", MountKind::Bind { input: 1, source: "a*".to_owned(), readonly: false }),
            ("/t", MountKind::Bind { input: 2, source: "lib".to_owned(), readonly: true }),
            (
                "/root/.cache",
                MountKind::Cache {
                    id: "/root/.cache".to_owned(),
                    sharing: Sharing::Locked,
                    input: None,
                    source: String::new(),
                    mode: 0o700,
                    uid: 5,
                    gid: 0,
                    readonly: false
                }
            ),
            ("/tmp", MountKind::Tmpfs { size_bytes: Some(1 << 20) }),
            ("/run/secrets/k", secret("k", None, true)),
            ("/run/secrets/e", secret("e", Some("TOKEN"), false)),
            (
                "/run/buildkit/ssh_agent.0",
                MountKind::Ssh { id: "default".to_owned(), required: true, mode: 0o600, uid: 0, gid: 0 }
            ),
        ]
    );
    assert!(run.env.iter().any(|(name, _)| name == "SSH_AUTH_SOCK"));
    assert!(labels(&plan).iter().any(|label| label.ends_with("x ****")));
}

#[test]
fn mounts_fill_in_what_is_left_out() {
    let mounts = |line: &str| match ops(&planned(&format!("FROM debian:12\nWORKDIR /w\nRUN {line} x\n"), "")).pop() {
        Some(Op::Run(run)) => run.mounts.clone(),
        op => panic!("{op:?}"),
    };
    assert_eq!(mounts("--mount=type=tmpfs")[0].target, "/w");
    assert_eq!(mounts("--mount=type=cache,target=a/../b")[0].target, "/w/b");
    let names = |line: &str| match &mounts(line)[0].kind {
        MountKind::Secret { id, env, .. } => (id.clone(), env.clone()),
        kind => panic!("{kind:?}"),
    };
    assert_eq!(names("--mount=type=secret,id=K,env="), ("K".to_owned(), Some("K".to_owned())));
    assert_eq!(names("--mount=type=secret,target=/etc/key"), ("key".to_owned(), None));
    assert_eq!(names("--mount=type=secret,src=k,dst=/etc/key"), ("k".to_owned(), None));
}

#[test]
fn onbuild_runs_first_in_the_child() {
    let mut world = World::new();
    world.add("trigger:latest", r#"{"OnBuild":["COPY --from=tools a /","RUN <<EOF\nhi\nEOF"]}"#);
    let text = "FROM debian:12 AS tools\nFROM trigger AS child\nONBUILD RUN later\nRUN own\nFROM child\nRUN last\n";
    let (plan, _) = build(text, &request_of(""), &world);
    let plan = plan.unwrap_or_else(|errors| panic!("{}", rendered(text, &errors)));
    assert_eq!(
        history(&plan),
        [
            "+ COPY a / # buildkit",
            "+ RUN /bin/sh -c hi\n # buildkit",
            "+ RUN /bin/sh -c own # buildkit",
            "+ RUN /bin/sh -c later # buildkit",
            "+ RUN /bin/sh -c last # buildkit"
        ]
    );
    assert!(plan.images[0].config.config.on_build.is_empty());
    let plan = build("FROM debian:12\nONBUILD COPY <<E /x\na\nE\n", &request_of(""), &world).0.unwrap();
    assert_eq!(plan.images[0].config.config.on_build, ["COPY <<E /x\na\nE"]);
}

#[test]
fn named_contexts_stand_in_for_stages_and_images() {
    let world = World::new();
    let text = "FROM other AS a\nRUN a\nFROM debian:12\nCOPY --from=a x y\nRUN --mount=from=files,target=/m z\n";
    let (plan, _) = build(text, &request_of("image:a=app files:files image:debian:12=app"), &world);
    plan.unwrap_or_else(|errors| panic!("{}", rendered(text, &errors)));
    assert_eq!(*world.asked.lock().unwrap(), ["image app:latest linux/amd64", "context files [\"\"]"]);

    let plan = planned("FROM files\nRUN x\n", "files:files");
    assert_eq!(history(&plan), ["+ FROM files", "+ RUN /bin/sh -c x # buildkit"]);
    let plan = planned("FROM files AS f\nRUN x\nFROM f\nRUN y\n", "files:files");
    assert_eq!(history(&plan).len(), 3);
}

#[test]
fn tags_of_images_have_a_case_and_stages_have_none() {
    let world = World::new();
    let text =
        "FROM debian:12 AS Tools\nFROM debian:12\nCOPY --from=TOOLS a /\nCOPY --from=x:V1 a /\nCOPY --from=x:v1 a /\n";
    let (result, _) = build(text, &request_of(""), &world);
    assert_eq!(result.unwrap_err().len(), 2, "two images that are not there");
    assert_eq!(world.asked.lock().unwrap().len(), 3);
}

#[test]
fn platforms_share_a_graph() {
    let text = "FROM --platform=$BUILDPLATFORM debian:12 AS build\nARG TARGETARCH\nRUN cc $TARGETARCH\n\
                FROM debian:12\nCOPY --from=build o /\nCOPY files /\n";
    let plan = planned(text, "platform:linux/amd64 platform:linux/arm64");
    let arches: Vec<_> = plan.images.iter().map(|image| image.config.architecture.as_str()).collect();
    assert_eq!(arches, ["amd64", "arm64"]);
    let names = labels(&plan);
    assert!(names.contains(&"[linux/amd64->arm64 build 2/2] RUN cc arm64".to_owned()), "{names:?}");
    assert!(names.contains(&"[linux/arm64 stage-1 2/3] COPY --from=build o /".to_owned()), "{names:?}");
    assert_eq!(names.iter().filter(|name| *name == "[internal] load build context").count(), 1);
}

#[test]
fn the_same_answers_give_the_same_plan() {
    let text = "FROM debian:12 AS a\nRUN x\nCOPY y z\nFROM debian:12\nRUN x\nCOPY --from=a z w\n";
    let (one, two) = (planned(text, ""), planned(text, ""));
    assert_eq!(one.images[0].root, two.images[0].root);
    assert_eq!(one.graph.len(), 5, "the equal RUN is one node");
}

#[test]
fn warnings_of_the_plan() {
    for (text, words, expect) in [
        ("FROM debian:12\nRUN x\n", "arg:NOPE=1", "[Warning] One or more build-args [NOPE] were not consumed"),
        (
            "FROM debian:12\nARG VERSION=1\nCOPY $VERSON /\n",
            "",
            "undefined variable '$VERSON' (did you mean $VERSION?)",
        ),
        ("FROM debian:12$X\nRUN x\n", "", "FROM argument 'X' is not declared"),
        ("FROM debian:12\nWORKDIR a\n", "", "Relative workdir \"a\" can have"),
        ("FROM debian:12\nCMD a\n", "", "JSON arguments recommended for CMD"),
        ("FROM debian:12\nEXPOSE 80/TCP\n", "", "Defined protocol '80/TCP'"),
        ("FROM debian:12\nEXPOSE 127.0.0.1:80:81\n", "", "should not define an IP address"),
    ] {
        let warnings = rendered(text, &planned(text, words).warnings);
        assert!(warnings.contains(expect), "{text}{warnings}");
    }
    let quiet = "# check=skip=UndefinedVar\nFROM debian:12\nCOPY $A x /\n# check=skip=JSONArgsRecommended\nCMD a\n";
    assert!(planned(quiet, "").warnings.is_empty());
}

#[test]
fn copies_of_ignored_files_are_warned_of() {
    for (ignore, source, expect) in [
        ("a\n", "a/b", true),
        ("a\n", "/a", true),
        ("a\n", "b", false),
        ("*\n", ".", true),
        ("*.md\n", ".", false),
        ("*\n!a\n", "b", false),
        ("", "a", false),
    ] {
        let text = format!("FROM debian:12\nCOPY {source} /x/\nCOPY --from=app {source} /\n");
        let request = forge_frontend::Request { ignore: forge_frontend::ignore::patterns(ignore), ..request_of("") };
        let warnings = build(&text, &request, &World::new()).0.unwrap().warnings;
        assert_eq!(warnings.len(), usize::from(expect), "{ignore}{source} {warnings:?}");
        assert!(warnings.iter().all(|warning| warning.rule == Some("CopyIgnoredFile")));
    }
}

#[test]
fn mistakes_are_shown_where_they_are() {
    for (text, words, expect) in [
        (
            "FROM debian:12 AS builder\nFROM scratch\nCOPY --from=biulder a b\n",
            "",
            "3:13: error: biulder:latest: not found|did you mean the stage `builder`?",
        ),
        ("FROM debain:12\n", "", "1:6: error: debain:12: not found|is it spelled right?"),
        ("FROM debian:12\nCOPY missing /\n", "", "2:1: error: \"missing\" is not in the context"),
        ("FROM debian:12 AS a\nCOPY --from=b x y\nFROM a AS b\n", "", "circular dependency|a needs b needs a"),
        ("FROM debian:12 AS a\nCOPY --from=a x y\n", "", "circular dependency detected on stage a"),
        ("FROM debian:12\nCOPY --from=7 x y\n", "", "2:13: error: invalid stage index 7"),
        ("FROM debian:12\nCOPY --from=$x x y\n", "", "2:13: error: variable expansion is not supported for --from"),
        ("FROM $nothing\n", "", "1:6: error: base name ($nothing) should not be blank"),
        ("FROM Foo/Bar\n", "", "must be lower case"),
        ("FROM debian:12\nCOPY --chmod=999 a b\n", "", "2:14: error: invalid chmod parameter"),
        ("FROM debian:12\nEXPOSE 99999\n", "", "2:8: error: invalid port \"99999\""),
        ("FROM debian:12\nSTOPSIGNAL SIGTREM\n", "", "invalid signal: SIGTREM|did you mean `TERM`?"),
        (
            "FROM debian:12\nRUN --mount=type=cach,target=/a x\n",
            "",
            "unsupported mount type \"cach\"|did you mean `cache`?",
        ),
        ("FROM debian:12\nRUN --mount=type=cache,target=/ x\n", "", "invalid mount target"),
        (
            "FROM debian:12\nRUN --mount=type=secret,target=/a,sharing=shared x\n",
            "",
            "sharing is not allowed for secret",
        ),
        ("FROM debian:12\nRUN --mount=type=bind,target=/a,uid=1 x\n", "", "uid is not allowed for bind"),
        ("FROM debian:12\nRUN --mount=target=/a,siz=1 x\n", "", "unexpected key \"siz\"|did you mean `size`?"),
        ("FROM debian:12\nENV A=${B?gone}\n", "", "2:7: error: B: gone"),
        ("FROM debian:12\nENV A=${B\n", "", "2:7: error: missing closing '}'"),
        ("FROM debian:12\nCOPY https://h/x /\n", "", "source can't be a URL for COPY|use ADD"),
        ("FROM debian:12\nADD --checksum=sha256:00 x /\n", "", "checksum requires HTTP(S) or Git sources"),
        ("FROM debian:12 AS one\nRUN a\n", "target:xyz", "target stage \"xyz\" could not be found|the stages are one"),
        ("# check=error=true\nFROM debian:12\nCMD a\n", "", "3:1: error[JSONArgsRecommended]"),
        ("FROM --platform=a/b/c/d debian:12\n", "", "1:17: error: invalid platform"),
    ] {
        let (result, _) = build(text, &request_of(words), &World::new());
        let shown = rendered(text, &result.err().unwrap_or_else(|| panic!("{text} was accepted")));
        for part in expect.split('|') {
            assert!(shown.contains(part), "{text}wanted {part}\n{shown}");
        }
    }
}

#[test]
fn all_mistakes_of_a_plan_come_at_once() {
    let text = "FROM nothing AS a\nFROM nowhere\nCOPY --from=a x y\n";
    let (result, _) = build(text, &request_of(""), &World::new());
    assert_eq!(result.unwrap_err().len(), 2);
    let text = "FROM debian:12\nEXPOSE x\nSTOPSIGNAL y\nCOPY --chmod=z a b\n";
    let (result, _) = build(text, &request_of(""), &World::new());
    assert_eq!(result.unwrap_err().len(), 3);
}

/// What the errors of a plan say.
fn refused(text: &str, words: &str) -> String {
    let (result, _) = build(text, &request_of(words), &World::new());
    rendered(text, &result.err().unwrap_or_else(|| panic!("planned: {text}")))
}

#[test]
fn a_stage_is_read_only_when_it_is_above() {
    for (text, expect) in [
        (
            "FROM debian:12 AS a\nCOPY --from=b /x /\nFROM debian:12 AS b\nFROM a\n",
            "2:13: error: cannot copy from stage \"b\", it needs to be defined before current stage \"a\"",
        ),
        ("FROM debian:12 AS a\nCOPY --from=1 /x /\nFROM debian:12\nFROM a\n", "cannot copy from stage \"1\""),
        (
            "FROM debian:12 AS a\nRUN --mount=type=bind,from=b,target=/m x\nFROM debian:12 AS b\nFROM a\n",
            "cannot mount from stage \"b\" to \"/m\"",
        ),
        // Of two stages by one name the last is meant, wherever it is.
        (
            "FROM debian:12 AS b\nFROM debian:12 AS a\nCOPY --from=b /x /\nFROM debian:12 AS b\nFROM a\n",
            "cannot copy from stage \"b\"",
        ),
    ] {
        assert!(refused(text, "").contains(expect), "{text}\n{}", refused(text, ""));
    }
    // A named context in its place is there before every stage, and what the target does not need is not judged.
    planned("FROM debian:12 AS a\nCOPY --from=b /x /\nFROM nothing AS b\nFROM a\n", "files:b");
    planned("FROM debian:12 AS a\nCOPY --from=b /x /\nFROM debian:12 AS b\n", "");
}

#[test]
fn names_of_bases_are_taken_as_written() {
    assert!(refused("FROM debian:12 AS Build\nFROM Build\n", "").contains("did you mean the stage `build`?"));
    assert!(refused("FROM Scratch\n", "").contains("1:6: error: "));
    planned("FROM debian:12 AS Build\nFROM scratch\nCOPY --from=BUILD /x /\n", "");
    for from in ["$x", "a\\\\b", "${"] {
        let text = format!("FROM debian:12\nCOPY --from={from} /x /\n");
        assert!(refused(&text, "").contains("variable expansion is not supported for --from"), "{text}");
    }
}

#[test]
fn a_global_argument_can_date_the_build() {
    let text = "ARG SOURCE_DATE_EPOCH=17\nFROM scratch\n";
    assert_eq!(planned(text, "").epoch, Some(17));
    assert_eq!(planned("FROM scratch\nARG SOURCE_DATE_EPOCH=17\n", "").epoch, None);
    let error = refused("ARG SOURCE_DATE_EPOCH=today\nFROM scratch\n", "");
    assert!(error.contains("1:1: error: invalid SOURCE_DATE_EPOCH: today"), "{error}");
}

#[test]
fn triggers_are_kept_to_the_letter() {
    let plan = planned("FROM scratch\nONBUILD RUN a \\\n  b  \nONBUILD\tCOPY <<E /x\n y\nE\n", "");
    assert_eq!(plan.images[0].config.config.on_build, ["RUN a   b  ", "COPY <<E /x\n y\nE"]);
}
