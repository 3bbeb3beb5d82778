//! The same program as an ordinary user: with subordinate ids, and with a single one.

use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Command, Stdio};

use crate::support::{Finished, SHELL, TestEnv, have};

/// An id that the machine gives to nobody.
const NOBODY: u32 = 63_217;

/// Runs forge as an ordinary user who owns `env`.
fn forge_as(env: &TestEnv, uid: u32, arguments: &[&str]) -> Finished {
    let mut command = Command::new("setpriv");
    command
        .args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups", "--"])
        .arg(env!("CARGO_BIN_EXE_forge"))
        .args(arguments)
        .current_dir(env.work())
        .env("FORGE_ROOT", env.root())
        .env("HOME", env.work())
        .stdin(Stdio::null());
    Finished::of(command)
}

/// A state directory that an ordinary user can reach, below /tmp: the build's own directory may be private to root.
fn reachable(env: &TestEnv, uid: u32) -> bool {
    for path in [env.work(), env.work().parent().expect("a parent").to_owned()] {
        chown(&path, Some(uid), Some(uid)).expect("given away");
    }
    let mut directory = env.work();
    while directory.pop() {
        let mode = std::fs::metadata(&directory).expect("metadata").permissions().mode();
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&directory).expect("metadata"));
        if mode & 0o001 == 0 && owner != uid {
            crate::support::skip(&format!("{} is closed to other users", directory.display()));
            return false;
        }
    }
    true
}

#[test]
fn an_ordinary_user_builds_and_runs_with_one_id() {
    let env = TestEnv::new();
    let base = format!("base={}", env.shell_base().display());
    env.dockerfile(&format!("{SHELL}RUN id -u > /uid && mkdir /d && touch /d/f && rm /d/f\nCOPY Dockerfile /x/\n"));
    if !have("setpriv") || !reachable(&env, NOBODY) {
        return;
    }
    let built = forge_as(
        &env,
        NOBODY,
        &["build", "--progress=plain", "--network=none", "--build-context", &base, "-t", "app", "."],
    )
    .ok();
    assert!(built.stderr.contains("note:"), "one id limits what can be built, and that must be said: {}", built.stderr);
    let run =
        forge_as(&env, NOBODY, &["run", "--rm", "--network=none", "app", "sh", "-c", "cat /uid; id -u; ls /x"]).ok();
    assert_eq!(run.stdout, "0\n0\nDockerfile\n");
}

#[test]
fn subordinate_ids_give_a_build_its_users() {
    if !have("setpriv") || !have("newuidmap") {
        return;
    }
    // A user who has subordinate ids: made for this test, and taken away.
    let Some(user) = TemporaryUser::add() else { return };
    let env = TestEnv::new();
    let base = format!("base={}", env.shell_base().display());
    env.dockerfile(&format!("{SHELL}RUN chown web:staff /tmp && su_check=$(stat -c %u /tmp) && test $su_check = 1000\nUSER web\nRUN id -u > /tmp/who\n"));
    if !reachable(&env, user.uid) {
        return;
    }
    forge_as(
        &env,
        user.uid,
        &["build", "--progress=plain", "--network=none", "--build-context", &base, "-t", "app", "."],
    )
    .ok();
    let run = forge_as(
        &env,
        user.uid,
        &["run", "--rm", "--network=none", "app", "sh", "-c", "cat /tmp/who; stat -c '%u %g' /tmp"],
    )
    .ok();
    assert_eq!(run.stdout, "1000\n1000 50\n");
}

struct TemporaryUser {
    name: String,
    uid: u32,
}

impl TemporaryUser {
    fn add() -> Option<TemporaryUser> {
        let name = format!("forge-test-{}", std::process::id());
        let added = Command::new("useradd").args(["--no-create-home", "--shell", "/bin/sh", &name]).output().ok()?;
        if !added.status.success() {
            crate::support::skip(&format!("useradd: {}", String::from_utf8_lossy(&added.stderr)));
            return None;
        }
        let id = Command::new("id").args(["-u", &name]).output().expect("id starts");
        let uid = String::from_utf8_lossy(&id.stdout).trim().parse().expect("a number");
        let user = TemporaryUser { name, uid };
        let subordinate = std::fs::read_to_string("/etc/subuid").unwrap_or_default();
        if !subordinate.contains(&user.name) {
            let range = Command::new("usermod")
                .args(["--add-subuids", "700000-765535", "--add-subgids", "700000-765535", &user.name])
                .status();
            assert!(range.is_ok_and(|status| status.success()), "usermod gives subordinate ids");
        }
        Some(user)
    }
}

impl Drop for TemporaryUser {
    fn drop(&mut self) {
        Command::new("userdel").arg("--force").arg(&self.name).stderr(Stdio::null()).status().ok();
    }
}
