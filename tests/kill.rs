//! `kill -9` at any moment: nothing that was committed is lost, nothing half-done is mistaken for a result.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{SHELL, TestEnv};

#[test]
fn a_killed_build_is_repaired_by_the_next() {
    let env = TestEnv::new();
    for number in 0..200 {
        env.file(&format!("files/{number}"), format!("{number}").repeat(1000));
    }
    let steps: String = (0..6).map(|n| format!("RUN echo {n} > /step-{n} && cp -r /files /copy-{n}\n")).collect();
    env.dockerfile(&format!(
        "{SHELL}COPY files /files\n{steps}RUN cat /copy-*/* | md5sum > /sum\nCMD [\"cat\", \"/sum\"]\n"
    ));
    let base = format!("base={}", env.shell_base().display());
    // How long a whole build takes decides where the kills fall: all over it.
    let clean = TestEnv::new();
    let start = Instant::now();
    let arguments = ["build", "--progress=plain", "--build-context", &base, "-t", "app", "."];
    let mut whole = clean.command(&arguments);
    whole.current_dir(env.work());
    crate::support::Finished::of(whole).ok();
    let expect = clean.forge(&["run", "--rm", "--network=none", "app"]).ok().stdout;
    let length = start.elapsed();
    for round in 1..=12_u32 {
        let mut build = env.command(&arguments);
        let mut child = build.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("forge starts");
        let moment = Instant::now() + length * round / 14;
        while Instant::now() < moment && child.try_wait().expect("waited").is_none() {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        child.kill().ok();
        child.wait().expect("ended");
    }
    env.forge(&arguments).ok();
    assert_eq!(env.forge(&["run", "--rm", "--network=none", "app"]).ok().stdout, expect);
    // What the killed ones left goes, and what was built stays.
    env.forge(&["prune", "--force"]).ok();
    assert_eq!(env.forge(&["run", "--rm", "--network=none", "app"]).ok().stdout, expect);
    for leftover in ["active", "ingest"] {
        let directory = env.root().join(leftover);
        let left: Vec<_> = std::fs::read_dir(&directory)
            .map(|entries| entries.flatten().map(|e| e.file_name()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "{leftover}: {left:?}");
    }
    let mounts = std::fs::read_to_string("/proc/mounts").expect("mounts");
    assert!(!mounts.contains(&env.root().display().to_string()), "{mounts}");
}
