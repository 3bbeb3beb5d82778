//! What goes wrong is told with its place and a way out, and nothing is lost by it.

use crate::support::{SHELL, TestEnv};

/// Building `text` fails with 1 and says each of `expect`.
#[track_caller]
fn check(text: &str, expect: &[&str]) {
    let env = TestEnv::new();
    env.file("there.txt", "");
    env.dockerfile(text);
    let mut finished = env.build(&[]).fails(1);
    for part in expect {
        finished = finished.says(part);
    }
}

#[test]
fn a_dockerfile_problem_names_line_and_caret() {
    check("FROM scratch\nCOPPY a b\n", &["Dockerfile:2", "COPPY", "^", "COPY"]);
    check("FROM scratch\nCOPY --chwon=1 a b\n", &["Dockerfile:2", "--chwon", "--chown"]);
    check("FROM scratch\nCOPY there.text /\n", &["Dockerfile:2", "there.text"]);
    check("FROM scratch AS builder\nFROM scratch\nCOPY --from=biulder /a /\n", &["Dockerfile:3", "builder"]);
    check("FROM a AS b\nCOPY --from=c /x /\nFROM b AS c\n", &["Dockerfile:"]);
    check("FROM scratch\nRUN --mount=type=bnd true\n", &["Dockerfile:2", "bnd", "bind"]);
    check("RUN true\n", &["Dockerfile:1", "FROM"]);
    check("FROM ${NOTHING}\n", &["Dockerfile:1"]);
    check("FROM scratch\nHEALTHCHECK --interval=soon CMD true\n", &["Dockerfile:2", "soon"]);
    check("FROM scratch\nCOPY --chmod=999 there.txt /\n", &["Dockerfile:2", "999"]);
    check("FROM scratch\nCOPY <<EOT /x\nnever ends\n", &["Dockerfile:2", "EOT"]);
    check("", &["Dockerfile"]);
}

#[test]
fn every_problem_is_shown_at_once() {
    check("FROM scratch\nCOPPY a b\nRNU true\n", &["Dockerfile:2", "Dockerfile:3"]);
}

#[test]
fn a_failing_step_shows_its_lines_and_its_last_words() {
    check(&format!("{SHELL}RUN echo last words; exit 7\n"), &["last words", "Dockerfile:3", ">>>", "exit code 7"]);
    check(&format!("{SHELL}RUN [\"/no/such/program\"]\n"), &["/no/such/program", "no such"]);
    check("FROM scratch\nCOPY there.txt /\nRUN [\"/there.txt\"]\n", &["/there.txt", "ermission"]);
    check(&format!("{SHELL}USER nobody-here\nRUN true\n"), &["nobody-here"]);
    check(&format!("{SHELL}RUN --mount=type=secret,id=missing,required=true true\n"), &["missing", "--secret"]);
}

#[test]
fn a_step_out_of_memory_is_told_as_such() {
    let env = TestEnv::new();
    env.dockerfile(&format!("{SHELL}RUN dd if=/dev/zero of=/dev/null bs=200M count=1; tail /dev/zero\n"));
    let finished = env.build(&["--memory=32m"]);
    if finished.stderr.contains("note:") && finished.stderr.contains("memory") {
        return crate::support::skip("no memory controller here");
    }
    finished.fails(1).says("out of memory");
}

#[test]
fn commands_say_what_they_did_not_understand() {
    let env = TestEnv::new();
    env.dockerfile("FROM scratch\n");
    for (arguments, expect) in [
        (&["build", "--nonsense", "."][..], "--nonsense"),
        (&["build", "-t", "UPPER", "."], "lower case"),
        (&["build", "-t", "a:b:c", "."], "a:b:c"),
        (&["build", "--platform", "linux/", "."], "linux/"),
        (&["build", "--network", "moon", "."], "moon"),
        (&["build", "-o", "type=moon", "."], "moon"),
        (&["build", "--push", "."], "-t"),
        (&["tag", "app", "BAD"], "lower case"),
    ] {
        env.forge(arguments).fails(2).says(expect);
    }
    for (arguments, expect) in [
        (&["build", "no-such-directory"][..], "no-such-directory"),
        (&["build", "-f", "no-such-file", "."], "no-such-file"),
        (&["build", "--target", "nothing", "."], "nothing"),
        (&["inspect", "nothing"], "nothing"),
        (&["tag", "nothing", "something"], "nothing"),
        (&["rmi", "nothing"], "nothing"),
    ] {
        env.forge(arguments).fails(1).says(expect);
    }
    env.forge(&["run", "--pull=never", "nothing"]).fails(125).says("nothing");
}

#[test]
fn a_registry_that_is_down_is_named() {
    let env = TestEnv::new();
    // A port that nothing listens on: bound and let go.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    env.dockerfile(&format!("FROM 127.0.0.1:{port}/app\n"));
    env.forge(&["build", "."]).fails(1).says(&format!("127.0.0.1:{port}")).says("Dockerfile:1");
}

#[test]
fn a_full_disk_is_told_and_leaves_the_store_sound() {
    let env = TestEnv::new();
    let disk = env.work().join("disk");
    std::fs::create_dir(&disk).expect("a mount point");
    let mounted =
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=24m", "none"]).arg(&disk).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return crate::support::skip("no right to mount a tmpfs");
    }
    let _mounted = Unmount(disk.clone());
    env.dockerfile(&format!("{SHELL}RUN dd if=/dev/zero of=/big bs=1M count=64\n"));
    let base = format!("base={}", env.shell_base().display());
    let build = |text: &str| {
        env.dockerfile(text);
        let mut command = env.command(&["build", "--progress=plain", "--build-context", &base, "-t", "app", "."]);
        command.env("FORGE_ROOT", disk.join("state"));
        crate::support::Finished::of(command)
    };
    build(&format!("{SHELL}RUN dd if=/dev/zero of=/big bs=1M count=64\n")).fails(1).says("No space left");
    build(&format!("{SHELL}RUN echo small > /small\n")).ok();
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}
