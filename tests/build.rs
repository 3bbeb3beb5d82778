//! `forge build`: what instructions leave, what is cached, where results go.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::support::{SHELL, TestEnv, have};

/// Builds `text` over a shell and prints what `script` says in the result.
fn check(text: &str, script: &str, expect: &str) {
    let env = TestEnv::new();
    env.file("a.txt", "alpha\n");
    env.file("dir/b.txt", "beta\n");
    env.file("dir/sub/c.txt", "gamma\n");
    env.dockerfile(&format!("{SHELL}{text}"));
    env.build(&["-t", "app"]).ok();
    let run = env.forge(&["run", "--rm", "--network=none", "app", "sh", "-c", script]).ok();
    assert_eq!(run.stdout, expect, "{text}");
}

#[test]
fn copy_puts_files_where_buildkit_puts_them() {
    check("COPY a.txt /x/", "cat /x/a.txt", "alpha\n");
    check("COPY a.txt /x/renamed", "cat /x/renamed", "alpha\n");
    check("COPY dir /y", "cd /y && find . -type f | sort", "./b.txt\n./sub/c.txt\n");
    check("COPY dir a.txt /z/", "cd /z && find . -type f | sort", "./a.txt\n./b.txt\n./sub/c.txt\n");
    check("WORKDIR /w\nCOPY *.txt .", "cd /w && ls", "a.txt\n");
    check("COPY --chmod=0640 --chown=web:staff a.txt /f", "stat -c '%a %u %g' /f", "640 1000 50\n");
    check("COPY --parents dir/sub/c.txt /p/", "cat /p/dir/sub/c.txt", "gamma\n");
    check("COPY --exclude=*.txt dir /e", "find /e", "/e\n/e/sub\n/e/sub/c.txt\n");
}

#[test]
fn heredocs_become_scripts_and_files() {
    check("RUN <<EOT\nset -e\necho one > /out\necho two >> /out\nEOT", "cat /out", "one\ntwo\n");
    check("RUN <<EOT\n#!/bin/sh\necho $0 > /out\nEOT", "grep -c /dev/pipes /out", "1\n");
    check("ENV NAME=world\nCOPY <<EOT /greeting\nhello $NAME\nEOT", "cat /greeting", "hello world\n");
    check("COPY <<'EOT' /greeting\nhello $NAME\nEOT", "cat /greeting", "hello $NAME\n");
    check("COPY <<one <<two /d/\n1\none\n2\ntwo", "cat /d/one /d/two", "1\n2\n");
}

#[test]
fn variables_follow_their_scopes() {
    check("ARG A=1\nENV A=2\nRUN echo $A > /out", "cat /out", "2\n");
    check("ARG A=1\nRUN echo ${A:-none} > /out", "cat /out; echo ${A:-unset}", "1\nunset\n");
    check("ENV P=/a/b.tar.gz\nENV Q=${P%%.*} R=${P##*/}\nRUN echo $Q $R > /out", "cat /out", "/a/b b.tar.gz\n");
    check("ARG TARGETARCH\nRUN test -n \"$TARGETARCH\" && echo yes > /out", "cat /out", "yes\n");
}

#[test]
fn mounts_are_there_for_the_step_and_gone_after() {
    let env = TestEnv::new();
    env.file("data.txt", "from the context\n");
    env.file("token", "s3cret");
    env.dockerfile(&format!(
        "{SHELL}FROM scratch AS files\nCOPY data.txt /other\n{SHELL}\
         RUN --mount=type=bind,target=/ctx cat /ctx/data.txt > /1\n\
         RUN --mount=type=bind,from=files,source=/other,target=/o cat /o > /2\n\
         RUN --mount=type=tmpfs,target=/scratch touch /scratch/x && grep ' /scratch tmpfs' /proc/mounts | wc -l > /3\n\
         RUN --mount=type=secret,id=token cat /run/secrets/token > /4 && stat -c %a /run/secrets/token >> /4\n\
         RUN --mount=type=secret,id=token,env=TOKEN echo $TOKEN > /5\n\
         RUN --mount=type=cache,target=/cache echo once >> /cache/log; wc -l < /cache/log > /6\n\
         RUN ls -d /ctx /o /scratch /run/secrets /cache 2>/dev/null | wc -l > /7\n"
    ));
    env.build(&["-t", "app", "--secret", "id=token,src=token"]).ok();
    let run = env.forge(&["run", "--rm", "app", "cat", "/1", "/2", "/3", "/4", "/5", "/6", "/7"]).ok();
    assert_eq!(run.stdout, "from the context\nfrom the context\n1\ns3cret400\ns3cret\n1\n0\n");
    // A cache mount lives on; a step that runs again finds it.
    env.build(&["-t", "app", "--secret", "id=token,src=token", "--no-cache"]).ok();
    assert_eq!(env.forge(&["run", "--rm", "app", "cat", "/6"]).ok().stdout, "2\n");
}

#[test]
fn a_step_that_changes_nothing_adds_no_layer() {
    let env = TestEnv::new();
    env.dockerfile(&format!("{SHELL}RUN true\nRUN cat /etc/passwd > /dev/null\n"));
    env.build(&["-t", "app"]).ok();
    let layers = env.forge(&["inspect", "--format", ".RootFS.Layers", "app"]).ok().json();
    assert_eq!(layers.as_array().map(Vec::len), Some(1), "{layers}");
    let history = env.forge(&["history", "--format=json", "app"]).ok();
    assert_eq!(
        history.stdout.lines().filter(|line| line.contains("\"EmptyLayer\":true")).count(),
        2,
        "{}",
        history.stdout
    );
}

#[test]
fn a_second_build_is_cached_and_gives_the_same_image() {
    let env = TestEnv::new();
    env.file("src/main.c", "int main;\n");
    env.dockerfile(&format!("{SHELL}COPY src /src\nRUN md5sum /src/main.c > /sum\nENV A=1\n"));
    let first = env.build(&["-t", "app"]).ok();
    let second = env.build(&["-t", "app"]).ok().silent_about("miss:").says("CACHED");
    assert_eq!(first.last_line(), second.last_line());
    // Touching is no change; editing is, and the reason is told.
    fs::File::options()
        .append(true)
        .open(env.work().join("src/main.c"))
        .expect("a file")
        .set_modified(std::time::UNIX_EPOCH)
        .expect("touched");
    let third = env.build(&["-t", "app"]).ok().silent_about("miss:");
    assert_eq!(first.last_line(), third.last_line());
    env.file("src/main.c", "int mein;\n");
    let fourth = env.build(&["-t", "app"]).ok().says("miss:").says("src/main.c");
    assert_ne!(first.last_line(), fourth.last_line());
}

#[test]
fn a_step_with_the_files_of_before_cuts_the_rebuild_off() {
    let env = TestEnv::new();
    env.file("input", "1\n");
    env.dockerfile(&format!("{SHELL}COPY input /input\n{SHELL}RUN --mount=type=bind,target=/ctx wc -l < /ctx/input > /lines\nRUN echo expensive > /after\n"));
    env.build(&["-t", "app"]).ok();
    env.file("input", "2\n");
    // The first step runs again, writes what it wrote, and what follows stays.
    let log = env.build(&["-t", "app"]).ok().stderr;
    let cached = |needle: &str| {
        let number = log
            .lines()
            .find(|line| line.contains(needle))
            .and_then(|line| line.split(' ').next())
            .unwrap_or_else(|| panic!("{needle}: {log}"));
        log.contains(&format!("{number} CACHED"))
    };
    assert!(!cached("wc -l"), "{log}");
    assert!(cached("expensive"), "{log}");
}

#[test]
fn the_same_input_gives_the_same_digest_from_an_empty_state() {
    let build = || {
        let env = TestEnv::new();
        env.file("a/b", "c");
        env.dockerfile(&format!(
            "{SHELL}COPY a /a\nRUN date > /dev/null; mkdir -p /x/y && echo z > /x/y/z\nLABEL l=1\n"
        ));
        env.build(&[
            "-o",
            "type=oci,dest=out.tar",
            "--build-arg",
            "SOURCE_DATE_EPOCH=1700000000",
            "--metadata-file=meta.json",
        ])
        .ok();
        let metadata: serde_json::Value =
            serde_json::from_slice(&fs::read(env.work().join("meta.json")).expect("metadata")).expect("json");
        (metadata["containerimage.digest"].to_string(), fs::read(env.work().join("out.tar")).expect("an archive"))
    };
    let (first, second) = (build(), build());
    assert_eq!(first.0, second.0);
    assert!(first.1 == second.1, "the archives differ");
}

#[test]
fn unused_stages_are_never_built_and_targets_are() {
    let env = TestEnv::new();
    env.dockerfile("FROM scratch AS unused\nCOPY nothing-there /\nFROM scratch AS wanted\nCOPY Dockerfile /d\nFROM wanted AS last\nCOPY Dockerfile /e\n");
    env.forge(&["build", "--progress=plain", "-o", "out", "--target=wanted", "."]).ok();
    assert!(env.work().join("out/d").is_file() && !env.work().join("out/e").exists());
}

#[test]
fn outputs_are_directories_archives_and_layouts() {
    let env = TestEnv::new();
    env.file("f", "data").set_permissions_to(0o751);
    env.dockerfile("FROM scratch\nCOPY f /bin/f\nCMD [\"/bin/f\"]\n");
    env.forge(&[
        "build",
        "-t",
        "app:v1",
        "-o",
        "out",
        "-o",
        "type=tar,dest=root.tar",
        "-o",
        "type=oci,dest=oci.tar",
        "-o",
        "type=docker,dest=docker.tar",
        "-o",
        "type=oci,tar=false,dest=layout",
        ".",
    ])
    .ok();
    let mode = fs::metadata(env.work().join("out/bin/f")).expect("the file").permissions().mode();
    assert_eq!(mode & 0o7777, 0o751);
    let names = |archive: &str| {
        let file = fs::File::open(env.work().join(archive)).expect(archive);
        let mut archive = tar::Archive::new(file);
        let names = archive
            .entries()
            .expect("entries")
            .map(|entry| entry.expect("an entry").path().expect("a path").display().to_string());
        names.collect::<Vec<_>>()
    };
    assert!(names("root.tar").contains(&"bin/f".to_owned()));
    assert!(names("oci.tar").contains(&"index.json".to_owned()));
    assert!(names("docker.tar").contains(&"manifest.json".to_owned()));
    assert!(env.work().join("layout/oci-layout").is_file());
    if have("skopeo") {
        for source in ["oci-archive:oci.tar", "docker-archive:docker.tar", "oci:layout"] {
            let mut command = std::process::Command::new("skopeo");
            command.args(["inspect", "--config", source]).current_dir(env.work());
            let config = crate::support::Finished::of(command).ok().json();
            assert_eq!(config["config"]["Cmd"][0], "/bin/f", "{source}");
        }
    }
}

trait SetPermissions {
    fn set_permissions_to(self, mode: u32);
}

impl SetPermissions for std::path::PathBuf {
    fn set_permissions_to(self, mode: u32) {
        fs::set_permissions(self, fs::Permissions::from_mode(mode)).expect("permissions");
    }
}

#[test]
fn ignored_files_stay_out_and_the_dockerfiles_own_ignore_file_wins() {
    let env = TestEnv::new();
    for name in ["keep.txt", "drop.log", "sub/keep.log", "sub/drop.log"] {
        env.file(name, name);
    }
    env.file(".dockerignore", "# comment\n**/*.log\n!sub/keep.log\nDockerfile*\n.dockerignore\n");
    env.dockerfile("FROM scratch\nCOPY . /\n");
    let list = |dir: &str| {
        let mut names: Vec<String> = fs::read_dir(env.work().join(dir))
            .expect(dir)
            .map(|e| e.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        names.sort();
        names
    };
    env.file("other/Dockerfile", "");
    env.forge(&["build", "-o", "../out1", "."]).ok();
    assert_eq!(list("../out1"), ["keep.txt", "other", "sub"]);
    assert_eq!(list("../out1/sub"), ["keep.log"]);
    env.file("Dockerfile.dockerignore", "sub\nother\n");
    env.forge(&["build", "-o", "../out2", "."]).ok();
    assert!(list("../out2").contains(&"drop.log".to_owned()) && !list("../out2").contains(&"sub".to_owned()));
}

#[test]
fn a_dockerfile_or_an_archive_may_come_from_stdin() {
    let env = TestEnv::new();
    let with_stdin = |arguments: &[&str], stdin: &[u8]| {
        use std::io::Write;
        let mut command = env.command(arguments);
        command
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let mut child = command.spawn().expect("forge starts");
        child.stdin.take().expect("piped").write_all(stdin).expect("written");
        crate::support::Finished::new(format!("{arguments:?}"), child.wait_with_output().expect("forge ends"))
    };
    with_stdin(&["build", "-t", "a", "-"], b"FROM scratch\nLABEL from=stdin\n").ok();
    let label = env.forge(&["inspect", "-f", "{{.Config.Labels.from}}", "a"]).ok();
    assert_eq!(label.stdout.trim(), "stdin");
    let mut archive = tar::Builder::new(Vec::new());
    for (name, data) in [("Dockerfile", "FROM scratch\nCOPY x /x\n"), ("x", "y")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, data.as_bytes()).expect("appended");
    }
    with_stdin(&["build", "-o", "out", "-"], &archive.into_inner().expect("an archive")).ok();
    assert_eq!(fs::read_to_string(env.work().join("out/x")).expect("x"), "y");
    env.file("ctx/x", "z");
    with_stdin(&["build", "-o", "out2", "-f", "-", "ctx"], b"FROM scratch\nCOPY x /x\n").ok();
    assert_eq!(fs::read_to_string(env.work().join("out2/x")).expect("x"), "z");
}

#[test]
fn configuration_instructions_reach_the_image() {
    let env = TestEnv::new();
    env.dockerfile(
        "FROM scratch\nMAINTAINER me\nLABEL a=1 b=\"two words\"\nENV P=1 Q=$P\nENV R=${P}x\nEXPOSE 80 53/udp 8000-8001\nVOLUME /data\nUSER 7:8\nWORKDIR /a/b\n\
         STOPSIGNAL SIGINT\nSHELL [\"/x\", \"-c\"]\nHEALTHCHECK --interval=5s --retries=3 CMD true\nONBUILD RUN later\nENTRYPOINT [\"/e\"]\nCMD [\"c\"]\n",
    );
    env.forge(&["build", "-t", "app", "--label", "c=3", "."]).ok();
    let image = env.forge(&["inspect", "app"]).ok().json();
    let config = &image[0]["Config"];
    assert_eq!(image[0]["Author"], "me");
    assert_eq!(config["Labels"], serde_json::json!({ "a": "1", "b": "two words", "c": "3" }));
    assert!(config["Env"].as_array().expect("env").contains(&"R=1x".into()), "{config}");
    assert!(config["Env"].as_array().expect("env").contains(&"Q=".into()), "{config}");
    let ports: Vec<&String> = config["ExposedPorts"].as_object().expect("ports").keys().collect();
    assert_eq!(ports, ["53/udp", "80/tcp", "8000/tcp", "8001/tcp"]);
    assert_eq!(
        (&config["User"], &config["WorkingDir"], &config["StopSignal"]),
        (&"7:8".into(), &"/a/b".into(), &"SIGINT".into())
    );
    assert_eq!(config["Healthcheck"]["Test"], serde_json::json!(["CMD-SHELL", "true"]));
    assert_eq!(config["Healthcheck"]["Interval"], 5_000_000_000_i64);
    assert_eq!(
        (&config["OnBuild"][0], &config["Entrypoint"][0], &config["Cmd"][0]),
        (&"RUN later".into(), &"/e".into(), &"c".into())
    );
}

#[test]
fn onbuild_triggers_run_in_the_child() {
    let env = TestEnv::new();
    env.file("f", "child\n");
    env.file("base.Dockerfile", format!("{SHELL}ONBUILD COPY f /f\nONBUILD RUN cat /f > /g\n"));
    env.build(&["-t", "parent", "-f", "base.Dockerfile"]).ok();
    env.dockerfile("FROM parent\n");
    env.build(&["-t", "app"]).ok();
    assert_eq!(env.forge(&["run", "--rm", "app", "cat", "/g"]).ok().stdout, "child\n");
    assert_eq!(env.forge(&["inspect", "-f", ".Config.OnBuild", "app"]).ok().stdout.trim(), "null");
}

#[test]
fn symlinks_in_the_context_lead_nowhere_outside() {
    let env = TestEnv::new();
    let outside = env.file("../outside/secret", "secret");
    env.file("ctx/Dockerfile", "FROM scratch\nCOPY link/secret /\n");
    std::os::unix::fs::symlink(outside.parent().expect("a parent"), env.work().join("ctx/link")).expect("a link");
    env.forge(&["build", "-o", "out", "ctx"]).fails(1);
    assert!(!env.work().join("out/secret").exists());
}

#[test]
fn archives_are_unpacked_by_add_and_kept_by_copy() {
    let env = TestEnv::new();
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(2);
    header.set_mode(0o600);
    archive.append_data(&mut header, "in/side", &b"ok"[..]).expect("appended");
    let bytes = archive.into_inner().and_then(|gzip| gzip.finish()).expect("an archive");
    env.file("no-name-says-so", bytes);
    env.dockerfile("FROM scratch\nADD no-name-says-so /added/\nCOPY no-name-says-so /copied/\n");
    env.forge(&["build", "-o", "out", "."]).ok();
    assert_eq!(fs::read_to_string(env.work().join("out/added/in/side")).expect("unpacked"), "ok");
    assert!(env.work().join("out/copied/no-name-says-so").is_file());
}

#[test]
fn independent_stages_run_at_the_same_time() {
    let env = TestEnv::new();
    // Each stage waits for the other through a shared cache mount: in turn, neither would end.
    let stage = |me: &str, other: &str| {
        format!("{SHELL}RUN --mount=type=cache,target=/meet touch /meet/{me}; for i in $(seq 300); do test -e /meet/{other} && break; sleep 0.1; done; test -e /meet/{other} && echo met > /{me}\n")
            .replacen("FROM scratch", &format!("FROM scratch AS {me}"), 1)
    };
    env.dockerfile(&format!(
        "{}{}FROM scratch\nCOPY --from=left /left /\nCOPY --from=right /right /\n",
        stage("left", "right"),
        stage("right", "left")
    ));
    env.build(&["--jobs=2", "-o", "out"]).ok();
    assert!(env.work().join("out/left").is_file() && env.work().join("out/right").is_file());
}

#[test]
fn two_builds_of_one_thing_share_the_work() {
    let env = TestEnv::new();
    env.dockerfile(&format!(
        "{SHELL}RUN --mount=type=cache,target=/log echo ran >> /log/runs; sleep 0.5; wc -l < /log/runs > /runs\n"
    ));
    let base = format!("base={}", env.shell_base().display());
    let start = || {
        let mut command = env.command(&["build", "--progress=plain", "--build-context", &base, "-q", "."]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().expect("forge starts")
    };
    let builds: Vec<_> = (0..4).map(|_| start()).collect();
    let ids: Vec<String> = builds
        .into_iter()
        .map(|build| {
            crate::support::Finished::new("a build".to_owned(), build.wait_with_output().expect("it ends")).ok().stdout
        })
        .collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    env.build(&["-t", "app"]).ok();
    assert_eq!(env.forge(&["run", "--rm", "app", "cat", "/runs"]).ok().stdout, "1\n");
}

#[test]
fn networks_are_what_was_asked_for() {
    let env = TestEnv::new();
    env.dockerfile(&format!("{SHELL}RUN --network=none ls /sys/class/net > /none\nRUN --network=host ls /sys/class/net > /host\nRUN ip route > /default\n"));
    env.build(&["-t", "app", "--allow", "network.host"]).ok();
    assert_eq!(env.forge(&["run", "--rm", "app", "cat", "/none"]).ok().stdout, "lo\n");
    env.forge(&["run", "--rm", "app", "cat", "/default"]).ok().prints("default via");
    env.build(&[]).fails(1).says("network.host").says("--allow");
}

#[test]
fn files_for_scripts_say_what_was_built() {
    let env = TestEnv::new();
    env.dockerfile("FROM scratch\nLABEL a=1\n");
    let built = env.forge(&["build", "-q", "-t", "app", "--iidfile=id", "--metadata-file=meta", "."]).ok();
    let id = fs::read_to_string(env.work().join("id")).expect("the id");
    assert_eq!(built.stdout.trim(), id);
    assert_eq!(built.stderr, "");
    let metadata: serde_json::Value =
        serde_json::from_slice(&fs::read(env.work().join("meta")).expect("metadata")).expect("json");
    assert_eq!(metadata["containerimage.config.digest"], id.as_str());
    let raw = env.forge(&["build", "--progress=rawjson", "."]).ok();
    assert!(raw.stderr.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{}", raw.stderr);
}
