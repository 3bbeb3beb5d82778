//! `forge run`: the container that a user gets, and its exit codes.

use std::process::Stdio;

use crate::support::{Finished, SHELL, TestEnv};

/// An image `app` with a shell, built once per test.
fn env() -> TestEnv {
    let env = TestEnv::new();
    env.dockerfile(&format!("{SHELL}ENV A=image\nWORKDIR /home\nCMD [\"echo\", \"default\"]\n"));
    env.build(&["-t", "app"]).ok();
    env
}

#[test]
fn exit_codes_are_dockers() {
    let env = env();
    for (arguments, code) in [
        (&["app", "true"][..], 0),
        (&["app", "sh", "-c", "exit 42"], 42),
        // Process 1 of a namespace ignores what it sends itself, so a child does it.
        (&["app", "sh", "-c", "sh -c 'kill -TERM $$'; exit $?"], 143),
        (&["app", "/no/such/program"], 127),
        (&["app", "no-such-program"], 127),
        (&["app", "/etc/passwd"], 126),
        (&["app", "/etc"], 126),
        (&["--pull=never", "no-such-image"], 125),
        (&["-u", "nobody-here", "app", "true"], 125),
    ] {
        env.forge(&[&["run", "--rm", "--network=none"], arguments].concat()).fails(code);
    }
}

#[test]
fn flags_change_what_the_image_says() {
    let env = env();
    for (arguments, expect) in [
        (&["app"][..], "default\n"),
        (&["-e", "A=flag", "app", "sh", "-c", "echo $A"], "flag\n"),
        (&["app", "sh", "-c", "echo $A"], "image\n"),
        (&["app", "pwd"], "/home\n"),
        (&["-w", "/etc", "app", "pwd"], "/etc\n"),
        (&["-u", "web:staff", "app", "id"], "uid=1000(web) gid=50(staff) groups=50(staff)\n"),
        (&["-u", "1000", "app", "id", "-u"], "1000\n"),
        (&["--entrypoint", "echo", "app", "one", "two"], "one two\n"),
        (&["--entrypoint", "pwd", "app"], "/home\n"),
        (&["--hostname", "box", "app", "hostname"], "box\n"),
        (&["--network=none", "app", "ls", "/sys/class/net"], "lo\n"),
    ] {
        let run = env.forge(&[&["run", "--rm"], arguments].concat()).ok();
        assert_eq!(run.stdout, expect, "{arguments:?}");
    }
}

#[test]
fn volumes_bind_directories_and_named_ones_persist() {
    let env = env();
    env.file("share/in", "from outside\n");
    let share = env.work().join("share");
    let bind = format!("{}:/share", share.display());
    env.forge(&["run", "--rm", "-v", &bind, "app", "sh", "-c", "cat /share/in; echo written > /share/out"])
        .ok()
        .prints("from outside");
    assert_eq!(std::fs::read_to_string(share.join("out")).expect("written"), "written\n");
    env.forge(&["run", "--rm", "-v", &format!("{bind}:ro"), "app", "sh", "-c", "echo x > /share/no"]).fails(1);
    env.forge(&["run", "--rm", "-v", "data:/data", "app", "sh", "-c", "echo kept > /data/f"]).ok();
    env.forge(&["run", "--rm", "-v", "data:/data", "app", "cat", "/data/f"]).ok().prints("kept");
}

#[test]
fn the_container_is_confined() {
    let env = env();
    let run = |script: &str| env.forge(&["run", "--rm", "--network=none", "app", "sh", "-c", script]);
    // docker's default set of fourteen capabilities.
    run("grep CapEff /proc/self/status").ok().prints("00000000a80425fb");
    run("grep Seccomp: /proc/self/status").ok().prints("2");
    run("mount -t tmpfs none /tmp").fails(1);
    run("echo 1 > /proc/sys/kernel/panic").fails(1);
    run("test ! -s /proc/kcore && test ! -s /proc/keys").ok();
    run("ls /sys/firmware | wc -l").ok().prints("0");
    run("ps | wc -l").ok();
    assert_eq!(run("echo $$").ok().stdout, "1\n");
    run("test -c /dev/null -a -c /dev/zero -a -c /dev/urandom -a -d /dev/pts -a -d /dev/shm -a -h /dev/fd").ok();
    // What a container writes is its own.
    run("echo x > /new").ok();
    run("test ! -e /new").ok();
}

#[test]
fn stdin_reaches_the_program_only_with_i() {
    let env = env();
    let with_stdin = |arguments: &[&str]| {
        use std::io::Write;
        let mut command = env.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("forge starts");
        // Without -i nobody may read it.
        child.stdin.take().expect("piped").write_all(b"hello\n").ok();
        Finished::new(format!("{arguments:?}"), child.wait_with_output().expect("forge ends")).ok().stdout
    };
    assert_eq!(with_stdin(&["run", "--rm", "-i", "app", "cat"]), "hello\n");
    assert_eq!(with_stdin(&["run", "--rm", "app", "cat"]), "");
}

#[test]
fn stopping_forge_stops_the_container() {
    let env = env();
    let marker = format!("{}.77", 1000 + std::process::id());
    let mut command =
        env.command(&["run", "--rm", "--network=none", "app", "sh", "-c", &format!("echo up; sleep {marker}")]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("forge starts");
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().expect("piped")), &mut line)
        .expect("its output");
    assert_eq!(line, "up\n");
    child.kill().expect("killed");
    child.wait().expect("ended");
    // The kernel takes the container down with its parent: wait for that, but not for ever.
    let gone = || !processes().iter().any(|line| line.contains(&format!("sleep\0{marker}")));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !gone() {
        assert!(std::time::Instant::now() < deadline, "the container outlived forge");
        std::thread::yield_now();
    }
}

fn processes() -> Vec<String> {
    let numbered = std::fs::read_dir("/proc").expect("/proc").flatten();
    numbered
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .collect()
}

#[test]
fn a_terminal_is_given_with_t() {
    let env = env();
    if !crate::support::have("script") {
        return;
    }
    let mut command = std::process::Command::new("script");
    let inner = format!(
        "FORGE_ROOT={} {} run --rm -it app sh -c 'test -t 0 && test -t 1 && echo a terminal'",
        env.root().display(),
        env!("CARGO_BIN_EXE_forge")
    );
    command.args(["-qec", &inner, "/dev/null"]).stdin(Stdio::null());
    Finished::of(command).ok().prints("a terminal");
    env.forge(&["run", "--rm", "-t", "-i", "app", "true"]).fails(125).says("terminal");
}
