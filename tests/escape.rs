//! Ways out of a container that other engines have had: none of them leads out of ours.

use crate::support::{SHELL, TestEnv};

/// More descriptors than a helper holds while it starts a container.
const DESCRIPTORS: std::ops::Range<u32> = 3..32;

fn env_with(lines: &str) -> TestEnv {
    let env = TestEnv::new();
    env.dockerfile(&format!("{SHELL}{lines}"));
    env.build(&["-t", "app"]).ok();
    env
}

/// A container's root may make device nodes, as docker's may. Opened, one would be the machine's disk.
#[test]
fn device_nodes_are_opened_in_dev_alone() {
    let env = env_with("RUN mknod /made c 1 5 && ! head -c 1 /made\n");
    let bind = format!("{}:/bind", env.work().display());
    let volumes = ["-v", &bind, "-v", "data:/volume", "--tmpfs", "/memory"];
    let run = |flags: &[&str], script: &str| {
        env.forge(&[&["run", "--rm", "--network=none"], &volumes[..], flags, &["app", "sh", "-c", script]].concat())
    };
    for place in ["/", "/dev/", "/dev/shm/", "/bind/", "/volume/", "/memory/", "/tmp/"] {
        run(&[], &format!("mknod {place}node c 1 5 && ! head -c 1 {place}node")).ok();
    }
    run(&[], "head -c 1 /made").fails(1);
    run(&[], "head -c 1 /dev/zero /dev/random /dev/urandom /dev/full >/dev/null </dev/null").ok();
    run(&[], "chmod 600 /dev/null").ok();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata("/dev/null").expect("null").permissions());
    assert_eq!(mode & 0o777, 0o666, "the machine's own /dev/null has changed");
    run(&["--privileged"], "mknod /n c 1 5 && head -c 1 /n >/dev/null && mknod /dev/n c 1 5 && head -c 1 /dev/n").ok();
}

/// CVE-2024-21626: a directory that was open while the container was set up is a way back to the machine's files.
#[test]
fn no_descriptor_of_the_set_up_leads_anywhere() {
    let env = env_with("");
    let up = "../".repeat(30);
    for number in DESCRIPTORS {
        let directory = format!("/proc/self/fd/{number}");
        env.forge(&["run", "--rm", "--network=none", "-w", &directory, "app", "pwd"]).fails(125);
        let program = format!("{directory}/{up}bin/busybox");
        env.forge(&["run", "--rm", "--network=none", "app", &program, "true"]).fails(127);
    }
}

/// The same by way of the file that a user's name is looked up in.
#[test]
fn accounts_are_those_of_the_image() {
    let secret = "outsider:x:4242:4242::/:/bin/sh\n";
    for number in DESCRIPTORS {
        let env = TestEnv::new();
        let outside = env.file("passwd", secret);
        let link = format!("/proc/self/fd/{number}/{}{}", "../".repeat(30), outside.display());
        env.dockerfile(&format!("{SHELL}RUN ln -sf {link} /etc/passwd\nUSER outsider\nRUN id\n"));
        env.build(&[]).fails(1).says("is not in the image's /etc/passwd");
    }
}

/// CVE-2019-5736: process 1 of a container with an init is forge itself.
#[test]
fn the_init_of_a_container_does_not_show_forge() {
    let env = env_with("");
    env.forge(&["run", "--rm", "--init", "--network=none", "app", "head", "-c", "4", "/proc/1/exe"]).fails(1);
}
