//! The namespaces that all of forge lives in: a mount namespace, so that what forge mounts is seen by nobody else and goes when
//! forge goes, and for ordinary users a user namespace in which they are root.
//!
//! ```text
//! root                  mount namespace
//! ordinary user         user + mount namespace;   0 -> uid,  1.. -> the ranges of /etc/subuid and /etc/subgid
//!   without ranges      user + mount namespace;   0 -> uid, and nobody else exists
//! ```

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, User};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub rootless: bool,
    /// One user is mapped: files can have no other owner, and containers no other user.
    pub single_id: bool,
    /// For the user, where something is limited: what, and the way out.
    pub note: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make a {kind} namespace: {source}{hint}")]
    Namespace { kind: &'static str, source: io::Error, hint: String },
    #[error("map ids into the user namespace: {0}")]
    Map(String),
    #[error("{action}: {source}")]
    Step { action: &'static str, source: io::Error },
}

type Result<T, E = Error> = std::result::Result<T, E>;

fn step<T>(action: &'static str, result: Result<T, impl Into<io::Error>>) -> Result<T> {
    result.map_err(|error| Error::Step { action, source: error.into() })
}

/// Enters the namespaces. To be called first thing, while this process has one thread.
pub fn enter_namespace() -> Result<Identity> {
    let identity = match Uid::effective().is_root() {
        true => enter_mounts()?,
        false => enter_user()?,
    };
    step(
        "keep forge's mounts to itself",
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC),
    )?;
    Ok(identity)
}

fn enter_mounts() -> Result<Identity> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| Error::Namespace {
        kind: "mount",
        source: error.into(),
        hint: ": forge as root needs CAP_SYS_ADMIN; in a docker container: --cap-add SYS_ADMIN --security-opt seccomp=unconfined, \
               or run forge as an ordinary user"
            .to_owned(),
    })?;
    // Root of an outer user namespace: device nodes and other privileges of the machine are out of reach.
    let map = step("read /proc/self/uid_map", fs::read_to_string("/proc/self/uid_map"))?;
    let mapped: u64 = map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum();
    Ok(Identity { rootless: mapped < u64::from(u32::MAX), single_id: mapped == 1, note: None })
}

/// A map's lines: first id inside, first id outside, how many.
type Map = Vec<(u32, u32, u32)>;

fn enter_user() -> Result<Identity> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    let name = User::from_uid(uid).ok().flatten().map(|user| user.name);
    let plan = Plan::find(uid, gid, name.as_deref());
    let mapped = in_new_namespace(&plan)?;
    step(
        "become root of the user namespace (group)",
        nix::unistd::setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)),
    )?;
    step(
        "become root of the user namespace",
        nix::unistd::setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)),
    )?;
    if mapped == Mapped::Ranges {
        step("leave supplementary groups", nix::unistd::setgroups(&[]))?;
    }
    let note = match (&plan, mapped) {
        (_, Mapped::Ranges) => None,
        (Plan::Ranges { .. }, Mapped::Single(reason)) => Some(limits_of_one(&reason)),
        (Plan::Single { reason }, _) => Some(limits_of_one(reason)),
    };
    Ok(Identity { rootless: true, single_id: note.is_some(), note })
}

fn limits_of_one(reason: &str) -> String {
    format!(
        "one user id only ({reason}): every file belongs to root, and USER and chown to other users do not work; \
         install newuidmap and newgidmap (package uidmap) and give this user ranges in /etc/subuid and /etc/subgid"
    )
}

/// How ids shall be mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Plan {
    Ranges { uids: Map, gids: Map },
    Single { reason: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Mapped {
    Ranges,
    Single(String),
}

impl Plan {
    fn find(uid: Uid, gid: Gid, name: Option<&str>) -> Plan {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let uids = ranges(&read("/etc/subuid"), uid.as_raw(), name, uid.as_raw());
        let gids = ranges(&read("/etc/subgid"), uid.as_raw(), name, gid.as_raw());
        if uids.len() < 2 || gids.len() < 2 {
            return Plan::Single { reason: "this user has no ranges in /etc/subuid and /etc/subgid".to_owned() };
        }
        Plan::Ranges { uids, gids }
    }
}

/// The map that a file of subordinate ids gives: `own` is root, the ranges follow from 1 on.
fn ranges(text: &str, uid: u32, name: Option<&str>, own: u32) -> Map {
    let mut map = vec![(0, own, 1)];
    let mut next = 1u32;
    for line in text.lines() {
        let mut fields = line.trim().split(':');
        let (Some(who), Some(start), Some(count), None) = (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (Ok(start), Ok(count)) = (start.parse::<u32>(), count.parse::<u32>()) else { continue };
        let mine = Some(who) == name || who.parse() == Ok(uid);
        let (Some(after), Some(_)) = (next.checked_add(count), start.checked_add(count)) else { continue };
        if mine && count > 0 {
            map.push((next, start, count));
            next = after;
        }
    }
    map
}

/// Unshares, while a child that stays outside writes the maps: only from there may more than one id be mapped.
#[expect(unsafe_code, reason = "fork has no safe form")]
fn in_new_namespace(plan: &Plan) -> Result<Mapped> {
    let (ready, tell_ready) = step("make a pipe", pipe_with(PipeFlags::CLOEXEC))?;
    let (answer, tell_answer) = step("make a pipe", pipe_with(PipeFlags::CLOEXEC))?;
    let parent = Pid::this();
    // SAFETY: this process has one thread (see `enter_namespace`).
    match step("fork", unsafe { nix::unistd::fork() })? {
        ForkResult::Child => {
            drop((tell_ready, answer));
            let code = match map_from_outside(plan, parent, ready, tell_answer) {
                Ok(()) => 0,
                Err(_) => 1, // the parent sees that no answer came
            };
            super::init::exit(code)
        }
        ForkResult::Parent { child } => {
            drop((ready, tell_answer));
            let entered = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS);
            let told = match entered {
                Ok(()) => fs::File::from(tell_ready).write_all(b"!"),
                Err(_) => {
                    drop(tell_ready);
                    Ok(())
                }
            };
            let mut text = String::new();
            let read = fs::File::from(answer).read_to_string(&mut text);
            match waitpid(child, None) {
                // No child to wait for: whoever started forge made it ignore SIGCHLD. The answer alone counts.
                Ok(_) | Err(nix::errno::Errno::ECHILD) => {}
                Err(error) => return step("wait for the process that maps ids", Err(error)),
            }
            entered.map_err(|error| forbidden(error.into()))?;
            step("talk to the process that maps ids", told.and(read))?;
            match text.split_once(' ') {
                Some(("ranges", _)) => Ok(Mapped::Ranges),
                Some(("single", reason)) => Ok(Mapped::Single(reason.to_owned())),
                Some(("failed", reason)) => Err(Error::Map(reason.to_owned())),
                _ => Err(Error::Map("the process that does it died".to_owned())),
            }
        }
    }
}

fn map_from_outside(plan: &Plan, parent: Pid, ready: OwnedFd, answer: OwnedFd) -> io::Result<()> {
    let mut byte = [0];
    // Nothing to do where the parent could not unshare: it closes without a word.
    if fs::File::from(ready).read(&mut byte)? == 0 {
        return Ok(());
    }
    let mut answer = fs::File::from(answer);
    let reason = match plan {
        Plan::Ranges { uids, gids } => {
            match map_with("newuidmap", parent, uids).and_then(|()| map_with("newgidmap", parent, gids)) {
                Ok(()) => return answer.write_all(b"ranges "),
                Err(reason) => reason,
            }
        }
        Plan::Single { reason } => reason.clone(),
    };
    match map_single(parent) {
        Ok(()) => write!(answer, "single {reason}"),
        Err(error) => write!(answer, "failed {error}; {reason}"),
    }
}

fn map_with(program: &str, parent: Pid, map: &Map) -> Result<(), String> {
    let numbers = map.iter().flat_map(|&(inside, outside, count)| [inside, outside, count]);
    let output = Command::new(program).arg(parent.to_string()).args(numbers.map(|number| number.to_string())).output();
    match output {
        Err(error) => Err(format!("{program}: {error}")),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Maps root to this user alone, for whatever is not mapped yet.
fn map_single(parent: Pid) -> io::Result<()> {
    let write = |file: &str, text: String| {
        let path = format!("/proc/{parent}/{file}");
        fs::write(&path, text).map_err(|error| io::Error::new(error.kind(), format!("write {path}: {error}")))
    };
    let mapped =
        |file: &str| fs::read_to_string(format!("/proc/{parent}/{file}")).is_ok_and(|text| !text.trim().is_empty());
    if !mapped("uid_map") {
        write("uid_map", format!("0 {} 1", Uid::effective()))?;
    }
    write("setgroups", "deny".to_owned())?;
    write("gid_map", format!("0 {} 1", Gid::effective()))
}

fn forbidden(source: io::Error) -> Error {
    let setting = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let hint = if setting("/proc/sys/kernel/unprivileged_userns_clone") == "0" {
        "the machine forbids it to ordinary users: sysctl kernel.unprivileged_userns_clone=1".to_owned()
    } else if setting("/proc/sys/user/max_user_namespaces") == "0" {
        "the machine allows none: sysctl user.max_user_namespaces=15000".to_owned()
    } else if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1" {
        "AppArmor forbids it to programs without a profile: sysctl kernel.apparmor_restrict_unprivileged_userns=0"
            .to_owned()
    } else if source.raw_os_error() == Some(libc::ENOSPC) {
        "the limit in /proc/sys/user/max_user_namespaces is reached".to_owned()
    } else {
        "inside a docker container: --security-opt seccomp=unconfined; otherwise run forge as root".to_owned()
    };
    Error::Namespace { kind: "user", source, hint: format!(": {hint}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ids_follow_root_without_a_gap() {
        let text =
            "alice:100000:65536\n1000:300000:10\nbob:1:1\n# no:1:2\nalice:x:5\nalice:4294967295:9\nalice:500:0\n";
        let check =
            |uid, name, expect: &[(u32, u32, u32)]| assert_eq!(ranges(text, uid, name, uid), expect, "{uid} {name:?}");
        check(1000, Some("alice"), &[(0, 1000, 1), (1, 100_000, 65_536), (65_537, 300_000, 10)]);
        check(1001, Some("bob"), &[(0, 1001, 1), (1, 1, 1)]);
        check(1002, None, &[(0, 1002, 1)]);
    }
}
