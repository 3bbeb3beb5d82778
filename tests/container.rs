//! Containers over a root made of busybox alone, through the library's front door. They need root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use forge::container::{
    Container, ContainerMount, Helper, MountSource, Privileges, Running, SecretSource, Secrets, Stdio, StepExecutor,
    capability,
};
use forge::network::Namespace;
use forge::network::Networks;
use forge_snapshotter::{Active, Digest, SnapshotId, Store};
use forge_solver::event::{EventKind, Events, StepId};
use forge_solver::graph::{self, Run};
use forge_solver::{BoundMount, ExecuteError, Executor, ExitStatus, Output};
use tokio::io::AsyncReadExt;

const FORGE: &str = env!("CARGO_BIN_EXE_forge");

/// A root with busybox in it, and what a run over it printed.
struct Root(tempfile::TempDir);

#[derive(Debug)]
struct Done {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Root {
    fn new() -> Option<Root> {
        if !nix::unistd::Uid::effective().is_root() || !Path::new("/bin/busybox").exists() {
            eprintln!("skipped: needs root and busybox-static");
            return None;
        }
        let root = Root(tempfile::tempdir().unwrap());
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for directory in ["bin", "etc", "proc", "dev", "sys", "tmp"] {
            fs::create_dir(root.path().join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.path().join("bin/busybox")).unwrap();
        for applet in
            ["sh", "true", "cat", "ls", "id", "mount", "sleep", "unshare", "grep", "stat", "tty", "hostname", "pwd"]
        {
            symlink("busybox", root.path().join("bin").join(applet)).unwrap();
        }
        fs::write(root.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
            .unwrap();
        fs::write(root.path().join("etc/group"), "root:x:0:\napp:x:1000:\nextra:x:2000:app\n").unwrap();
        Some(root)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn container(&self, args: &[&str]) -> Container {
        Container {
            root: self.path().to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            hostname: "box".to_owned(),
            resolv_conf: "nameserver 127.0.0.1\n".to_owned(),
            hosts: "127.0.0.1 localhost\n".to_owned(),
            ..Container::default()
        }
    }

    fn shell(&self, script: &str) -> Container {
        self.container(&["sh", "-c", script])
    }

    /// Every path in it, with what a layer would tell about it.
    fn listing(&self) -> Vec<(PathBuf, i64, i64)> {
        fn walk(directory: &Path, into: &mut Vec<(PathBuf, i64, i64)>) {
            for entry in fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                let metadata = entry.path().symlink_metadata().unwrap();
                into.push((entry.path(), metadata.mtime(), metadata.mtime_nsec()));
                if metadata.is_dir() {
                    walk(&entry.path(), into);
                }
            }
        }
        let metadata = self.path().metadata().unwrap();
        let mut listing = vec![(self.path().to_owned(), metadata.mtime(), metadata.mtime_nsec())];
        walk(self.path(), &mut listing);
        listing.sort();
        listing
    }
}

fn helper() -> Helper {
    Helper::start_with(Path::new(FORGE)).unwrap()
}

async fn finish(mut running: Running) -> Result<Done, ExecuteError> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (mut out, mut error) = (running.stdout.take().unwrap(), running.stderr.take().unwrap());
    let (out, error, status) =
        tokio::join!(out.read_to_end(&mut stdout), error.read_to_end(&mut stderr), running.wait());
    out.unwrap();
    error.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ok(Done { status: status?, stdout: text(stdout), stderr: text(stderr) })
}

async fn run(helper: &Helper, container: &Container) -> Result<Done, ExecuteError> {
    finish(helper.run(container, Namespace::Private, Stdio::Output).await?).await
}

/// The standard output of a script that must succeed.
async fn output(helper: &Helper, container: &Container) -> String {
    let done = run(helper, container).await.unwrap();
    assert_eq!(done.status, ExitStatus::Exited(0), "{done:?}");
    done.stdout
}

fn mount(target: &str, source: MountSource) -> ContainerMount {
    ContainerMount { target: target.to_owned(), source, readonly: false }
}

#[tokio::test]
async fn exit_codes_and_output() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    for code in [0, 1, 42, 255] {
        let done = run(&helper, &root.shell(&format!("echo out; echo err >&2; exit {code}"))).await.unwrap();
        assert_eq!((done.status, &*done.stdout, &*done.stderr), (ExitStatus::Exited(code), "out\n", "err\n"));
    }
}

#[tokio::test]
async fn a_run_that_changes_nothing_leaves_nothing() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    // Without /proc, /dev, /sys and the files of /etc, all mount points have to be made.
    for directory in ["proc", "dev", "sys"] {
        fs::remove_dir(root.path().join(directory)).unwrap();
    }
    let before = root.listing();
    let mut container =
        root.shell("test -e /proc/self && test -c /dev/null && test -d /sys/kernel && cat /etc/resolv.conf");
    container.mounts.push(mount("/new/deep/cache", MountSource::Tmpfs { size_bytes: None, mode: 0o1777 }));
    container.cwd = "/not/there".to_owned();
    assert_eq!(output(&helper, &container).await, "nameserver 127.0.0.1\n");
    assert_eq!(root.listing(), before);

    // What the run itself leaves stays, also beside and below what forge made.
    let mut container = root.shell("echo kept > file; echo x > /new/own");
    container.mounts = vec![mount("/new/cache", MountSource::Tmpfs { size_bytes: None, mode: 0o1777 })];
    container.cwd = "/not/there".to_owned();
    output(&helper, &container).await;
    assert_eq!(fs::read_to_string(root.path().join("not/there/file")).unwrap(), "kept\n");
    assert_eq!(fs::read_to_string(root.path().join("new/own")).unwrap(), "x\n");
    assert!(!root.path().join("new/cache").exists());
}

#[tokio::test]
async fn what_cannot_be_executed_is_told_apart() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let write = |name: &str, bytes: &[u8], mode| {
        let path = root.path().join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    write("bin/plain", b"data", 0o644);
    write("bin/script", b"#!/usr/bin/python3 -u\n", 0o755);
    write("bin/words", b"no format\n", 0o755);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(18, 0);
    elf.extend([183, 0, 0, 0]);
    write("bin/arm", &elf, 0o755);
    let failure = async |args: &[&str]| run(&helper, &root.container(args)).await.unwrap_err();
    let check = async |program: &str, missing: bool, text: &str| {
        let (found, message) = match failure(&[program]).await {
            ExecuteError::NotFound { reason, .. } => (true, reason),
            ExecuteError::NotExecutable { reason, .. } => (false, reason),
            other => panic!("{program}: {other}"),
        };
        assert!(found == missing && message.contains(text), "{program}: {message}");
    };
    check("nothing", true, "not found in $PATH").await;
    check("/bin/nothing", true, "no such file").await;
    check("script", true, "interpreter \"/usr/bin/python3\"").await;
    check("plain", false, "permission denied").await;
    check("/bin", false, "is a directory").await;
    check("words", false, "neither a program nor a script").await;
    check("arm", false, "built for arm64").await;
    assert!(matches!(failure(&[]).await, ExecuteError::Invalid(_)));
    // The helper is none the worse for it.
    assert_eq!(output(&helper, &root.shell("echo fine")).await, "fine\n");
}

#[tokio::test]
async fn a_sandbox_has_docker_s_privileges() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let script = "grep -E 'Cap|Seccomp:|NoNewPrivs' /proc/self/status";
    let status = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let capabilities = format!("{:016x}", capability::DEFAULT);
    let text = output(&helper, &root.shell(script)).await;
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(&text, set), capabilities, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status(&text, set), "0000000000000000", "{set}");
    }
    assert_eq!((status(&text, "Seccomp"), status(&text, "NoNewPrivs")), ("2".to_owned(), "0".to_owned()));

    let mut container = root.shell(script);
    container.user = "app".to_owned();
    container.no_new_privileges = true;
    let text = output(&helper, &container).await;
    assert_eq!(status(&text, "CapEff"), "0000000000000000");
    assert_eq!(status(&text, "CapBnd"), capabilities);
    assert_eq!(status(&text, "NoNewPrivs"), "1");

    let mut container = root.shell(script);
    container.privileges = Privileges::Default { add: capability::NET_ADMIN, drop: capability::CHOWN };
    let text = output(&helper, &container).await;
    let expect = (capability::DEFAULT | capability::NET_ADMIN) & !capability::CHOWN;
    assert_eq!(status(&text, "CapEff"), format!("{expect:016x}"));

    container.privileges = Privileges::All;
    let text = output(&helper, &container).await;
    assert_eq!(status(&text, "Seccomp"), "0");
    assert_ne!(status(&text, "CapEff"), capabilities);
}

#[tokio::test]
async fn a_sandbox_refuses_what_it_must_and_hides_what_it_must() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    for script in [
        "mount -t tmpfs none /tmp",
        "unshare -U true",
        "unshare -m true",
        "echo 1 > /proc/sys/kernel/core_pattern",
        "echo b > /proc/sysrq-trigger",
        "mkdir /sys/fs/cgroup/new",
        "echo 1 > /sys/kernel/profiling",
    ] {
        let done = run(&helper, &root.shell(script)).await.unwrap();
        assert!(!matches!(done.status, ExitStatus::Exited(0)), "{script}: {done:?}");
    }
    assert_eq!(output(&helper, &root.shell("cat /proc/keys /proc/timer_list /proc/kcore; ls /sys/firmware")).await, "");
    let mut container = root.shell("mount -t tmpfs none /tmp && echo mounted");
    container.privileges = Privileges::All;
    assert_eq!(output(&helper, &container).await, "mounted\n");
    let mut container = root.shell("echo x > /file; echo y > /tmp/scratch && cat /tmp/scratch");
    container.readonly_root = true;
    container.mounts.push(mount("/tmp", MountSource::Tmpfs { size_bytes: Some(1 << 20), mode: 0o1777 }));
    assert_eq!(output(&helper, &container).await, "y\n");
    assert!(!root.path().join("file").exists());
}

#[tokio::test]
async fn what_a_container_sees() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let check =
        async |script: &str, expect: &str| assert_eq!(output(&helper, &root.shell(script)).await, expect, "{script}");
    check("echo $$; hostname; cat /etc/hostname; pwd; umask; echo $HOME", "1\nbox\nbox\n/\n0022\n/root\n").await;
    check("ls /proc | grep -c '^[0-9]'", "3\n").await;
    check(
        "cd /dev; ls",
        "core\nfd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n",
    )
    .await;
    check("stat -c %a /dev/shm /dev/null /dev/pts/ptmx", "1777\n666\n666\n").await;
    check("ls /proc/self/fd | grep -cv '^[0123]$'; true", "0\n").await;
    check("ls /sys/class/net", "lo\n").await;
    check("cat", "").await; // standard input is empty
    check("grep -c ' / rw' /proc/self/mountinfo", "1\n").await;
}

#[tokio::test]
async fn users_are_those_of_the_root() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let check = async |user: &str, expect: &str| {
        let mut container = root.shell("id -u; id -g; id -G; echo $HOME; echo written > /dev/stdout");
        container.user = user.to_owned();
        assert_eq!(output(&helper, &container).await, expect, "{user:?}");
    };
    check("", "0\n0\n0\n/root\nwritten\n").await;
    check("app", "1000\n1000\n1000 2000\n/home/app\nwritten\n").await;
    check("1000:extra", "1000\n2000\n2000\n/home/app\nwritten\n").await;
    check("77:88", "77\n88\n88\n/\nwritten\n").await;
    let mut container = root.shell("true");
    container.user = "nobody".to_owned();
    let error = run(&helper, &container).await.unwrap_err();
    assert!(matches!(&error, ExecuteError::Invalid(text) if text.contains("nobody")), "{error}");
    // A fifo in place of the accounts does not hang anybody.
    fs::remove_file(root.path().join("etc/passwd")).unwrap();
    nix::unistd::mkfifo(&root.path().join("etc/passwd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = run(&helper, &root.shell("true")).await.unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

#[tokio::test]
async fn mounts_of_every_kind() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("file"), "from the host\n").unwrap();
    let bind = |path: &Path| MountSource::Bind(path.to_owned());
    let secret = MountSource::File { data: b"hush".to_vec(), mode: 0o400, uid: 1000, gid: 1000 };
    let script = MountSource::File { data: b"#!/bin/sh\necho ran\n".to_vec(), mode: 0o755, uid: 0, gid: 0 };
    let mut container = root.shell(
        "cat /data/file /one; echo new > /data/new; echo no > /fixed/new; cat /run/secrets/key; \
         stat -c ' %a %u' /run/secrets/key; /dev/pipes/EOF; echo x > /data/inner/x; stat -c %a /scratch",
    );
    container.mounts = vec![
        mount("/data", bind(host.path())),
        mount("/one", bind(&host.path().join("file"))),
        ContainerMount { readonly: true, ..mount("/fixed", bind(host.path())) },
        mount("/run/secrets/key", secret),
        mount("/dev/pipes/EOF", script),
        mount("/data/inner", MountSource::Tmpfs { size_bytes: Some(1 << 20), mode: 0o755 }),
        mount("/scratch", MountSource::Tmpfs { size_bytes: None, mode: 0o750 }),
    ];
    let done = run(&helper, &container).await.unwrap();
    assert_eq!(done.stdout, "from the host\nfrom the host\nhush 400 1000\nran\n750\n", "{done:?}");
    assert!(done.stderr.contains("/fixed/new: Read-only file system"), "{done:?}");
    assert_eq!(fs::read_to_string(host.path().join("new")).unwrap(), "new\n");

    // A volume over /etc does not take the container's own files away.
    fs::create_dir(host.path().join("etc")).unwrap();
    fs::copy(root.path().join("etc/passwd"), host.path().join("etc/passwd")).unwrap();
    let mut container = root.shell("cat /etc/resolv.conf; ls /etc");
    container.mounts = vec![mount("/etc", bind(&host.path().join("etc")))];
    assert_eq!(output(&helper, &container).await, "nameserver 127.0.0.1\nhostname\nhosts\npasswd\nresolv.conf\n");
    assert!(!host.path().join("inner/x").exists());
    for made in ["data", "one", "run", "fixed", "scratch"] {
        assert!(!root.path().join(made).exists(), "{made}");
    }
}

#[tokio::test]
async fn links_in_an_image_lead_nowhere_outside() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let outside = tempfile::tempdir().unwrap();
    let outside_listing = || fs::read_dir(outside.path()).unwrap().count();
    // /etc itself, a mount's target, its parent and a link upwards: all point at the machine's directory.
    fs::remove_dir_all(root.path().join("etc")).unwrap();
    symlink(outside.path(), root.path().join("etc")).unwrap();
    symlink(outside.path(), root.path().join("target")).unwrap();
    symlink(format!("../../../../../../../..{}", outside.path().display()), root.path().join("up")).unwrap();
    symlink(outside.path().join("made"), root.path().join("dangling")).unwrap();
    let mut container = root.shell("cat /target/file /up/sub/file /dangling /etc/resolv.conf");
    let file = |text: &str| MountSource::File { data: text.as_bytes().to_vec(), mode: 0o644, uid: 0, gid: 0 };
    container.mounts = vec![
        mount("/target/file", file("one\n")),
        mount("/up/sub/file", file("two\n")),
        mount("/dangling", file("three\n")),
    ];
    assert_eq!(output(&helper, &container).await, "one\ntwo\nthree\nnameserver 127.0.0.1\n");
    assert_eq!(outside_listing(), 0);

    for (name, elsewhere) in [("proc", "/tmp"), ("sys", "tmp"), ("dev", "/")] {
        let root = Root::new().unwrap();
        fs::remove_dir(root.path().join(name)).unwrap();
        symlink(elsewhere, root.path().join(name)).unwrap();
        let error = run(&helper, &root.shell("true")).await.unwrap_err();
        assert!(error.to_string().contains("is not a directory"), "{name}: {error}");
    }
}

#[tokio::test]
async fn signals_and_want_of_memory_are_told_apart() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let mut running = helper.run(&root.shell("sleep 1000"), Namespace::Private, Stdio::Null).await.unwrap();
    running.kill(libc_signal::KILL).unwrap();
    assert_eq!(running.wait().await.unwrap(), ExitStatus::Killed { signal: 9, out_of_memory: false });

    let mut container = root.shell("x=x; while true; do x=$x$x; done");
    container.limits.memory_bytes = Some(32 << 20);
    match run(&helper, &container).await {
        Err(ExecuteError::Invalid(text)) => eprintln!("skipped: {text}"),
        done => assert_eq!(done.unwrap().status, ExitStatus::Killed { signal: 9, out_of_memory: true }),
    }
    container.args[2] = "(x=x; while true; do x=$x$x; done); exit $?".to_owned();
    if let Ok(done) = run(&helper, &container).await {
        assert_eq!(done.status, ExitStatus::Killed { signal: 9, out_of_memory: true }, "through a shell");
    }
}

mod libc_signal {
    pub const KILL: i32 = 9;
    pub const TERM: i32 = 15;
}

#[tokio::test]
async fn limits_hold() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let mut container = root.shell("ulimit -n; ulimit -Hn; ulimit -c; stat -fc %b:%S /dev/shm");
    container.limits.ulimits = vec![
        forge::container::Ulimit { name: "nofile".to_owned(), soft: 100, hard: 200 },
        forge::container::Ulimit { name: "core".to_owned(), soft: 0, hard: 0 },
    ];
    container.limits.shm_size_bytes = Some(1 << 20);
    assert_eq!(output(&helper, &container).await, "100\n200\n0\n256:4096\n");
    container.limits.ulimits[0].name = "files".to_owned();
    let error = run(&helper, &container).await.unwrap_err();
    assert!(error.to_string().contains("unknown ulimit"), "{error}");

    // What a program reads to size itself is there, and its own group alone.
    let mut container =
        root.shell("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2> /dev/null; true");
    container.limits.memory_bytes = Some(64 << 20);
    match run(&helper, &container).await {
        Err(ExecuteError::Invalid(text)) => eprintln!("skipped: {text}"),
        done => assert_eq!(done.unwrap().stdout, "67108864\n"),
    }

    let mut container = root.shell("for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo all");
    container.limits.pids = Some(4);
    match run(&helper, &container).await {
        Err(ExecuteError::Invalid(text)) => eprintln!("skipped: {text}"),
        done => assert!(done.unwrap().stderr.contains("can't fork")),
    }
}

/// The processes of the machine that have `mark` among their arguments.
fn processes_with(mark: &str) -> usize {
    let entries = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok());
    entries
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| line.split(|&byte| byte == 0).any(|argument| argument == mark.as_bytes()))
        .count()
}

#[tokio::test]
async fn dropping_a_container_leaves_no_process_and_no_mount_point() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let mark = "98765.25";
    fs::remove_dir(root.path().join("sys")).unwrap();
    let before = root.listing();
    let mut container = root.shell("sleep 1000 & sleep 1000 & echo ready; wait");
    container.args.push(mark.to_owned());
    let mut running = helper.run(&container, Namespace::Private, Stdio::Output).await.unwrap();
    let mut word = [0; 6];
    running.stdout.as_mut().unwrap().read_exact(&mut word).await.unwrap();
    assert!(processes_with(mark) > 0);
    drop(running);
    assert_eq!(processes_with(mark), 0);
    assert_eq!(root.listing(), before);

    // The end of the helper is the end of its containers, and so is a future that is dropped.
    let running = helper.run(&container, Namespace::Private, Stdio::Null).await.unwrap();
    drop(helper);
    assert_eq!(processes_with(mark), 0);
    drop(running);
    assert_eq!(root.listing(), before);
}

/// Waits until a process is gone, or for ten seconds.
fn is_gone(pidfd: &std::os::fd::OwnedFd) -> bool {
    use std::os::fd::AsFd;
    let mut watched = [nix::poll::PollFd::new(pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
    nix::poll::poll(&mut watched, 10_000u16).unwrap() == 1
}

fn parent_of(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
    line.trim().parse().unwrap()
}

#[tokio::test]
async fn containers_end_with_a_helper_that_is_killed_and_the_next_one_cleans_up() {
    let Some(root) = Root::new() else { return };
    let first = helper();
    let mut running = first.run(&root.shell("sleep 1000"), Namespace::Private, Stdio::Null).await.unwrap();
    let process = rustix::process::Pid::from_raw(running.pid()).unwrap();
    let container = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).unwrap();
    let helper_pid = parent_of(running.pid());
    let groups = || {
        let text = fs::read_to_string("/proc/self/cgroup").unwrap();
        let memory = text.lines().find_map(|line| line.split_once(":memory:/")).map(|(_, group)| group);
        let directory = Path::new("/sys/fs/cgroup/memory").join(memory.unwrap_or_default());
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!("forge-{helper_pid}-"))).count()
    };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(helper_pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert!(is_gone(&container));
    assert!(matches!(running.wait().await, Err(ExecuteError::Setup { .. })));
    drop(running);
    let start = std::time::Instant::now();
    assert!(first.run(&root.shell("true"), Namespace::Private, Stdio::Null).await.is_err());
    assert!(start.elapsed().as_secs() < 5, "a helper that is gone is noticed at once");
    drop(first);
    let next = helper();
    assert_eq!(output(&next, &root.shell("echo fine")).await, "fine\n");
    assert_eq!(groups(), 0);
}

/// CVE-2019-5736: what a container can get hold of by `/proc/self/exe` as its program.
#[tokio::test]
async fn the_helper_s_executable_is_not_for_writing() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let running = helper.run(&root.shell("sleep 1000"), Namespace::Private, Stdio::Null).await.unwrap();
    let executable = format!("/proc/{}/exe", parent_of(running.pid()));
    let mount = rustix::fs::statvfs(executable).unwrap();
    assert!(mount.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
}

#[tokio::test]
async fn an_init_passes_signals_on_and_codes_back() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let mut container = root.shell("exit 7");
    container.init = true;
    assert_eq!(run(&helper, &container).await.unwrap().status, ExitStatus::Exited(7));
    container.args = vec!["missing".to_owned()];
    assert!(matches!(run(&helper, &container).await, Err(ExecuteError::NotFound { .. })));
    container.args = ["sh", "-c", "echo ready; exec sleep 1000"].map(str::to_owned).into();
    let mut running = helper.run(&container, Namespace::Private, Stdio::Output).await.unwrap();
    let mut word = [0; 6];
    running.stdout.as_mut().unwrap().read_exact(&mut word).await.unwrap();
    running.kill(libc_signal::TERM).unwrap();
    assert_eq!(running.wait().await.unwrap(), ExitStatus::Exited(128 + libc_signal::TERM));
}

#[tokio::test]
async fn a_terminal_is_the_container_s_own() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    let container = root.shell("tty; stty size; echo $TERM; test -c /dev/console && echo console");
    symlink("busybox", root.path().join("bin/stty")).unwrap();
    let stdio = Stdio::Terminal { rows: 33, columns: 77 };
    let mut running = helper.run(&container, Namespace::Private, stdio).await.unwrap();
    let master = fs::File::from(running.terminal.take().unwrap());
    let read = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        // The end of a terminal is an error, EIO.
        assert!(std::io::Read::read_to_end(&mut &master, &mut text).is_err());
        String::from_utf8(text).unwrap()
    });
    assert_eq!(running.wait().await.unwrap(), ExitStatus::Exited(0));
    assert_eq!(read.await.unwrap(), "/dev/pts/0\r\n33 77\r\nxterm\r\nconsole\r\n");
}

#[tokio::test]
async fn many_at_once() {
    let Some(root) = Root::new() else { return };
    let helper = helper();
    // One root for all: no mount point may be missing, or the first to end would take it from the others.
    for name in ["resolv.conf", "hosts", "hostname"] {
        fs::write(root.path().join("etc").join(name), "").unwrap();
    }
    let containers = (0..20).map(|number| {
        let container = root.shell(&format!("echo {number}"));
        let helper = &helper;
        async move { assert_eq!(output(helper, &container).await, format!("{number}\n")) }
    });
    futures_util::future::join_all(containers).await;
}

/// A helper in a user namespace that maps one user, as forge makes one for who has no subordinate ids.
#[tokio::test]
async fn a_container_of_an_ordinary_user() {
    let Some(root) = Root::new() else { return };
    let wrapper = root.path().join("wrapper");
    let script =
        format!("#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups unshare -Urm '{FORGE}' \"$@\"\n");
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    if !Command::new("setpriv")
        .args(["--reuid", "65534", "unshare", "-Urm", FORGE])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("skipped: an ordinary user cannot make namespaces, or cannot reach the program");
        return;
    }
    Command::new("chown").args(["-R", "65534:65534"]).arg(root.path()).status().unwrap();
    let helper = Helper::start_with(&wrapper).unwrap();
    let check = async |script: &str, network: Namespace| {
        let running = helper.run(&root.shell(script), network, Stdio::Output).await.unwrap();
        finish(running).await.unwrap()
    };
    let done =
        check("id -u; echo x > /dev/null; cat /etc/hostname; ls /sys/class/net; echo $$", Namespace::Private).await;
    assert_eq!((&done.status, &*done.stdout), (&ExitStatus::Exited(0), "0\nbox\nlo\n1\n"), "{done:?}");
    let done =
        check("cat /proc/keys; test -d /sys/class/net/lo && echo x > /dev/zero && echo host", Namespace::Host).await;
    assert_eq!(done.stdout, "host\n", "{done:?}");
    let mut container = root.shell("true");
    container.user = "app".to_owned();
    let error = helper.run(&container, Namespace::Private, Stdio::Null).await.err().unwrap();
    assert!(error.to_string().contains("/etc/subuid"), "{error}");
}

/// A step of a build over the test's root, through the executor.
struct Build {
    _directory: tempfile::TempDir,
    store: Store,
    executor: StepExecutor,
}

impl Build {
    fn new(secrets: Secrets) -> Build {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let networks = Networks::new(&store, forge::network::Options::default());
        let executor = StepExecutor::with_program(store.clone(), networks, secrets, FORGE.into());
        Build { _directory: directory, store, executor }
    }

    /// A snapshot in the making that holds what the test's root holds.
    fn active(&self, root: &Root) -> Active {
        let snapshots = self.store.snapshots();
        let active = snapshots.prepare(None).unwrap();
        let status = Command::new("cp").arg("-a").arg(root.path().join(".")).arg(active.root()).status().unwrap();
        assert!(status.success());
        let base = snapshots.commit(active, SnapshotId(Digest::of("base"))).unwrap();
        snapshots.prepare(Some(&base.id)).unwrap()
    }

    async fn execute(
        &self,
        run: &Run,
        active: &Active,
        mounts: &[BoundMount],
    ) -> (Result<ExitStatus, ExecuteError>, String) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let events = Events::new(move |event| {
            if let EventKind::Output { data, .. } = event.kind {
                sink.lock().unwrap().extend(data);
            }
        });
        let output = Output { events, step: StepId::new("step") };
        let status = self.executor.execute(run, active, mounts, &output).await;
        let text = String::from_utf8(seen.lock().unwrap().clone()).unwrap();
        (status, text)
    }
}

fn step(script: &str) -> Run {
    Run {
        args: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        env: vec![("PATH".to_owned(), "/bin".to_owned())],
        cwd: "/".to_owned(),
        user: String::new(),
        network: graph::Network::None,
        security: graph::Security::Sandbox,
        mounts: Vec::new(),
        files: Vec::new(),
        hosts: vec![("db".to_owned(), "10.0.0.9".to_owned())],
        hostname: "buildkitsandbox".to_owned(),
        platform: graph::image::Platform::host(),
        unkeyed: graph::Unkeyed::default(),
    }
}

#[tokio::test]
async fn a_step_has_all_that_its_run_says() {
    let Some(root) = Root::new() else { return };
    fs::write(root.path().join("hush"), "hush").unwrap();
    let agent = root.path().join("agent");
    let _listener = std::os::unix::net::UnixListener::bind(&agent).unwrap();
    let build = Build::new(Secrets {
        secrets: [("key".to_owned(), SecretSource::File(root.path().join("hush")))].into(),
        agents: [("default".to_owned(), agent.clone())].into(),
    });
    let mut run = step(
        "cat /run/secrets/key; echo \" $KEY $http_proxy $LEFT\"; grep -c 10.0.0.9 /etc/hosts; /dev/pipes/EOF; \
         stat -c '%a %u' /agent; test -S $SSH_AUTH_SOCK && echo socket; echo kept > /cache/kept; \
         cat /seed/data; touch /tmpfs/x; echo result > /result; test -e /nothing && echo wrong; true",
    );
    symlink("busybox", root.path().join("bin/touch")).unwrap();
    let secret = |id: &str, required| graph::MountKind::Secret {
        id: id.to_owned(),
        env: Some("KEY".to_owned()),
        file: true,
        required,
        mode: 0o400,
        uid: 0,
        gid: 0,
    };
    let cache = graph::MountKind::Cache {
        id: "cache".to_owned(),
        sharing: graph::Sharing::Locked,
        input: None,
        source: String::new(),
        mode: 0o755,
        uid: 0,
        gid: 0,
        readonly: false,
    };
    let bind = graph::MountKind::Bind { input: 1, source: String::new(), readonly: true };
    let ssh = graph::MountKind::Ssh { id: "default".to_owned(), required: true, mode: 0o600, uid: 1000, gid: 1000 };
    run.mounts = [
        ("/run/secrets/key", secret("key", true)),
        ("/nothing", secret("none", false)),
        ("/cache", cache),
        ("/seed", bind),
        ("/tmpfs", graph::MountKind::Tmpfs { size_bytes: Some(1 << 20) }),
        ("/agent", ssh),
    ]
    .map(|(target, kind)| graph::Mount { target: target.to_owned(), kind })
    .into();
    run.files = vec![graph::InlineFile {
        path: "/dev/pipes/EOF".to_owned(),
        data: "#!/bin/sh\necho heredoc\n".to_owned(),
        mode: 0o755,
    }];
    run.unkeyed.proxy_env = [("http_proxy", "http://proxy"), ("PATH", "/elsewhere")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let seed = tempfile::tempdir().unwrap();
    fs::write(seed.path().join("data"), "seeded\n").unwrap();
    let mut mounts = vec![BoundMount::Unbound; 6];
    mounts[3] = BoundMount::Path(seed.path().to_owned());
    let mut active = build.active(&root);
    let (status, text) = build.execute(&run, &active, &mounts).await;
    assert_eq!(status.unwrap(), ExitStatus::Exited(0), "{text}");
    let expect = "hush hush http://proxy \n1\nheredoc\n600 1000\nsocket\nseeded\n";
    assert_eq!(text, expect);
    // The next step finds the cache as this one left it.
    let mut again = step("cat /cache/kept");
    again.mounts = vec![run.mounts[2].clone()];
    let (status, text) = build.execute(&again, &active, &[BoundMount::Unbound]).await;
    assert_eq!((status.unwrap(), &*text), (ExitStatus::Exited(0), "kept\n"));

    // All that the layer will hold is the result: mount points that had to be made are gone without a trace.
    let changes = active.changes().unwrap();
    let names: Vec<_> = fs::read_dir(&changes).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| name == "result"), "{names:?}");
}

#[tokio::test]
async fn a_required_secret_that_was_not_given_is_an_error_that_says_what_to_type() {
    let Some(root) = Root::new() else { return };
    let build = Build::new(Secrets::default());
    let active = build.active(&root);
    let (mut secret, mut ssh) = (step("true"), step("true"));
    let kind = graph::MountKind::Secret {
        id: "token".to_owned(),
        env: None,
        file: true,
        required: true,
        mode: 0o400,
        uid: 0,
        gid: 0,
    };
    secret.mounts = vec![graph::Mount { target: "/run/secrets/token".to_owned(), kind }];
    let kind = graph::MountKind::Ssh { id: "default".to_owned(), required: true, mode: 0o600, uid: 0, gid: 0 };
    ssh.mounts = vec![graph::Mount { target: "/agent".to_owned(), kind }];
    for (run, flag) in [(secret, "--secret id=token"), (ssh, "--ssh default")] {
        let (status, _) = build.execute(&run, &active, &[BoundMount::Unbound]).await;
        let error = status.unwrap_err().to_string();
        assert!(error.contains(flag), "{error}");
    }
}

#[tokio::test]
async fn a_step_that_is_dropped_is_gone_and_its_root_can_be_removed() {
    let Some(root) = Root::new() else { return };
    let build = Build::new(Secrets::default());
    let active = build.active(&root);
    let mark = "98765.75";
    let mut run = step("echo started; sleep 1000 & wait");
    run.args.push(mark.to_owned());
    let started = tokio::sync::Notify::new();
    let started = Arc::new(started);
    let notify = Arc::clone(&started);
    let events = Events::new(move |event| {
        if matches!(event.kind, EventKind::Output { .. }) {
            notify.notify_one();
        }
    });
    let output = Output { events, step: StepId::new("step") };
    tokio::select! {
        status = build.executor.execute(&run, &active, &[], &output) => panic!("ended: {status:?}"),
        () = started.notified() => {}
    }
    assert_eq!(processes_with(mark), 0);
    let path = active.root().to_owned();
    drop(active);
    assert!(!path.exists());
}
