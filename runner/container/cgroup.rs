//! Control groups: one per container, for its limits and to learn of a kill for want of memory.
//!
//! ```text
//! cgroup2   <nearest group above us that we may write to and that hands controllers on>/forge-<pid>-<n>
//! v1        <our group in each hierarchy that is needed>/forge-<pid>-<n>
//! none      no group can be made: containers run without, and an asked-for limit is an error
//! ```
//! Where controllers are split over both (hybrid), each is used where it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use super::spec::{Cpu, Failure, Limits, Result, Step};

/// The hierarchies that a container's groups are made in. Found once.
#[derive(Debug, Default)]
pub struct Hierarchies {
    unified: Option<Unified>,
    /// Controller and directory of ours, for `memory`, `cpu` and `pids`.
    legacy: Vec<(String, PathBuf)>,
    made: u64,
}

#[derive(Debug)]
struct Unified {
    parent: PathBuf,
    controllers: Vec<String>,
}

/// What a container sees at `/sys/fs/cgroup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum View {
    None,
    Unified,
    /// v1: its own directories, by controller.
    Controllers(Vec<(String, PathBuf)>),
}

/// The groups of one container.
#[derive(Debug)]
pub struct Cgroup {
    unified: Option<(PathBuf, File)>,
    legacy: Vec<(String, PathBuf)>,
    memory: Option<PathBuf>,
}

const LEGACY_CONTROLLERS: &[&str] = &["memory", "cpu", "pids"];

impl Hierarchies {
    /// Reads `/proc/self/cgroup` and `/proc/self/mountinfo`; what cannot be read or written is not there.
    pub fn find() -> Hierarchies {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let (groups, mounts) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo"));
        let mut found = Hierarchies::default();
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
            if controllers.is_empty() {
                found.unified = mount_of(&mounts, "cgroup2", "").and_then(|mount| Unified::find(&mount, group));
                if let Some(unified) = &found.unified {
                    sweep(&unified.parent);
                }
                continue;
            }
            for controller in controllers.split(',').filter(|name| LEGACY_CONTROLLERS.contains(name)) {
                let Some(mount) = mount_of(&mounts, "cgroup", controller) else { continue };
                let directory = mount.join(group.trim_start_matches('/'));
                if writable(&directory) {
                    sweep(&directory);
                    found.legacy.push((controller.to_owned(), directory));
                }
            }
        }
        found
    }

    fn legacy(&self, controller: &str) -> Option<&Path> {
        self.legacy.iter().find(|(name, _)| name == controller).map(|(_, directory)| directory.as_path())
    }

    fn offers(&self, controller: &str) -> bool {
        let unified =
            self.unified.as_ref().is_some_and(|unified| unified.controllers.iter().any(|name| name == controller));
        unified || self.legacy(controller).is_some()
    }

    /// Groups for one container, with its limits set.
    pub fn create(&mut self, limits: &Limits) -> Result<Cgroup> {
        for (controller, asked) in wanted(limits) {
            if asked && !self.offers(controller) {
                return Err(Failure::Invalid(format!(
                    "a {controller} limit was asked for, but no cgroup with that controller can be made here \
                     (not root? run below `systemd-run --user --scope -p Delegate=yes`)"
                )));
            }
        }
        self.made += 1;
        let name = format!("forge-{}-{}", std::process::id(), self.made);
        let mut cgroup = Cgroup { unified: None, legacy: Vec::new(), memory: None };
        if let Err(failure) = self.fill(&mut cgroup, &name, limits) {
            let left = cgroup.remove();
            return Err(match failure {
                Failure::Setup { step, errno, .. } if !left.is_empty() => {
                    Failure::Setup { step, errno, hint: Some(left.join("; ")) }
                }
                failure => failure,
            });
        }
        Ok(cgroup)
    }

    fn fill(&self, cgroup: &mut Cgroup, name: &str, limits: &Limits) -> Result<()> {
        if let Some(unified) = self.unified.as_ref().filter(|unified| !unified.controllers.is_empty()) {
            let directory = unified.parent.join(name);
            make(&directory)?;
            let opened = File::open(&directory);
            cgroup.unified = Some((directory.clone(), opened.step(format!("open {}", directory.display()))?));
            cgroup.memory = unified.controllers.iter().any(|name| name == "memory").then(|| directory.clone());
            set_unified(&directory, limits, |controller| self.legacy(controller).is_none())?;
        }
        for (controller, asked) in wanted(limits) {
            let Some(parent) = self.legacy(controller) else { continue };
            // A memory group is made without a limit too: it alone tells a kill for want of memory from any other.
            if !asked && controller != "memory" {
                continue;
            }
            let directory = parent.join(name);
            make(&directory)?;
            cgroup.legacy.push((controller.to_owned(), directory.clone()));
            set_legacy(&directory, controller, limits)?;
            if controller == "memory" {
                cgroup.memory = Some(directory);
            }
        }
        Ok(())
    }
}

impl Unified {
    /// The nearest group from ours upwards in which one with controllers can be made. A group that has processes (ours does)
    /// hands no controllers on, unless it is the root.
    fn find(mount: &Path, group: &str) -> Option<Unified> {
        let own = mount.join(group.trim_start_matches('/'));
        let candidates = own.ancestors().take_while(|directory| directory.starts_with(mount));
        candidates.filter(|directory| writable(directory)).find_map(|directory| {
            let words = |name| {
                let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
                text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            };
            let missing =
                |have: &[String], name: &String| LEGACY_CONTROLLERS.contains(&name.as_str()) && !have.contains(name);
            let have = words("cgroup.subtree_control");
            for controller in words("cgroup.controllers").iter().filter(|name| missing(&have, name)) {
                // Refused where the group has processes; what is on in the end is read below.
                if write(&directory.join("cgroup.subtree_control"), &format!("+{controller}")).is_err() {
                    break;
                }
            }
            let controllers = words("cgroup.subtree_control");
            (!controllers.is_empty()).then(|| Unified { parent: directory.to_owned(), controllers })
        })
    }
}

impl Cgroup {
    /// The cgroup2 directory to be born in.
    pub fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(|(_, directory)| directory.as_fd())
    }

    /// Moves this process, which has one thread, into the v1 groups. By `tasks`: for `cgroup.procs` the kernel stops every fork
    /// and exit on the machine and waits for all processors, which takes ten milliseconds and more.
    pub fn join(&self) -> Result<()> {
        for (_, directory) in &self.legacy {
            let file = directory.join("tasks");
            write(&file, "0").step(format!("write {}", file.display()))?;
        }
        Ok(())
    }

    pub fn view(&self) -> View {
        match (&self.unified, self.legacy.is_empty()) {
            (Some(_), true) => View::Unified,
            (None, true) => View::None,
            (_, false) => View::Controllers(self.legacy.clone()),
        }
    }

    /// Whether the kernel killed a process of the container for want of memory.
    pub fn out_of_memory(&self) -> bool {
        let Some(memory) = &self.memory else { return false };
        let kills = |name: &str| {
            let text = fs::read_to_string(memory.join(name)).ok()?;
            let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
            count.trim().parse::<u64>().ok()
        };
        kills("memory.events").or_else(|| kills("memory.oom_control")).is_some_and(|kills| kills > 0)
    }

    /// Removes the groups, which have no process left. Tells what would not go.
    pub fn remove(self) -> Vec<String> {
        let unified = self.unified.into_iter().map(|(directory, _)| directory);
        let directories = unified.chain(self.legacy.into_iter().map(|(_, directory)| directory));
        directories.filter_map(|directory| remove(&directory).err()).collect()
    }
}

/// A controller, and whether a limit needs it.
fn wanted(limits: &Limits) -> [(&'static str, bool); 3] {
    [("memory", limits.memory_bytes.is_some()), ("cpu", limits.cpu.is_some()), ("pids", limits.pids.is_some())]
}

fn set_unified(directory: &Path, limits: &Limits, here: impl Fn(&str) -> bool) -> Result<()> {
    if let Some(bytes) = limits.memory_bytes.filter(|_| here("memory")) {
        set(directory, "memory.max", bytes)?;
        // Swap counts apart here, and what was asked for is all that there is, as with v1 below.
        if directory.join("memory.swap.max").exists() {
            set(directory, "memory.swap.max", 0)?;
        }
    }
    if let Some(Cpu { quota_us, period_us }) = limits.cpu.filter(|_| here("cpu")) {
        set(directory, "cpu.max", format!("{quota_us} {period_us}"))?;
    }
    match limits.pids.filter(|_| here("pids")) {
        Some(pids) => set(directory, "pids.max", pids),
        None => Ok(()),
    }
}

fn set_legacy(directory: &Path, controller: &str, limits: &Limits) -> Result<()> {
    match controller {
        "memory" => {
            let Some(bytes) = limits.memory_bytes else { return Ok(()) };
            set(directory, "memory.limit_in_bytes", bytes)?;
            let with_swap = "memory.memsw.limit_in_bytes";
            if directory.join(with_swap).exists() { set(directory, with_swap, bytes) } else { Ok(()) }
        }
        "cpu" => {
            let Some(Cpu { quota_us, period_us }) = limits.cpu else { return Ok(()) };
            set(directory, "cpu.cfs_period_us", period_us)?;
            set(directory, "cpu.cfs_quota_us", quota_us)
        }
        _ => limits.pids.map_or(Ok(()), |pids| set(directory, "pids.max", pids)),
    }
}

fn set(directory: &Path, name: &str, value: impl ToString) -> Result<()> {
    let (file, value) = (directory.join(name), value.to_string());
    write(&file, &value).step(format!("write {value} to {}", file.display()))
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(text.as_bytes())
}

fn make(directory: &Path) -> Result<()> {
    fs::create_dir(directory).step(format!("make {}", directory.display()))
}

/// A group stays busy for a moment after its last process was reaped.
fn remove(directory: &Path) -> Result<(), String> {
    const ATTEMPTS: u32 = 50;
    for attempt in 1.. {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && attempt < ATTEMPTS => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(format!("remove {}: {error}", directory.display()));
            }
            _ => break,
        }
    }
    Ok(())
}

/// Removes what helpers left that were killed. A group with processes is refused by the kernel, and left alone.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix("forge-")?.split_once('-')?.0.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Tried again by the next forge.
            drop(fs::remove_dir(entry.path()));
        }
    }
}

fn writable(directory: &Path) -> bool {
    nix::unistd::access(directory, nix::unistd::AccessFlags::W_OK).is_ok()
}

/// Where the hierarchy is mounted whose controllers include `controller`. The mount's root must be the hierarchy's own.
fn mount_of(mountinfo: &str, kind: &str, controller: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        let mut back = back.split(' ');
        let (found, options) = (back.next()?, back.nth(1)?);
        let matches = found == kind && (controller.is_empty() || options.split(',').any(|option| option == controller));
        let mut front = front.split(' ').skip(3);
        let (root, mount) = (front.next()?, front.next()?);
        (matches && root == "/").then(|| PathBuf::from(mount))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_in_mountinfo() {
        let mounts = "35 31 0:32 / /sys/fs/cgroup/memory rw shared:7 - cgroup cgroup rw,memory\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      41 31 0:38 /inner /mnt rw - cgroup2 cgroup2 rw\n\
                      42 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let check = |kind, controller, expect: Option<&str>| {
            assert_eq!(mount_of(mounts, kind, controller), expect.map(PathBuf::from), "{kind} {controller}");
        };
        check("cgroup", "memory", Some("/sys/fs/cgroup/memory"));
        check("cgroup", "cpu", Some("/sys/fs/cgroup/cpu,cpuacct"));
        check("cgroup", "pids", None);
        check("cgroup2", "", Some("/sys/fs/cgroup/unified"));
    }

    /// Where the machine has a cgroup2 hierarchy without controllers, this stands in for one with some.
    #[test]
    fn a_process_is_born_in_its_cgroup2_group() {
        use crate::container::namespaces::{Side, fork_into};
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let Some(parent) = mount_of(&mounts, "cgroup2", "").filter(|mount| writable(mount)) else {
            eprintln!("skipped: no cgroup2 hierarchy that can be written to");
            return;
        };
        let unified = Unified { parent: parent.clone(), controllers: vec!["none".to_owned()] };
        let mut hierarchies = Hierarchies { unified: Some(unified), legacy: Vec::new(), made: 0 };
        let cgroup = hierarchies.create(&Limits::default()).unwrap();
        assert_eq!(cgroup.view(), View::Unified);
        match fork_into(0, cgroup.birthplace()).unwrap() {
            Side::Child => crate::container::init::exit(0),
            Side::Parent { pid, pidfd } => {
                let wait = |options| rustix::process::waitid(rustix::process::WaitId::PidFd(pidfd.as_fd()), options);
                use rustix::process::WaitIdOptions;
                wait(WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
                let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
                wait(WaitIdOptions::EXITED).unwrap();
                let name = format!("0::/forge-{}-1", std::process::id());
                assert!(groups.lines().any(|line| line == name), "{groups}");
            }
        }
        assert_eq!(cgroup.remove(), Vec::<String>::new());
        assert!(!parent.join(format!("forge-{}-1", std::process::id())).exists());

        let limits = Limits { memory_bytes: Some(1 << 20), ..Limits::default() };
        assert!(matches!(hierarchies.create(&limits), Err(Failure::Invalid(text)) if text.contains("memory limit")));
    }

    #[test]
    fn limits_are_written_as_each_version_has_them() {
        let limits = Limits {
            memory_bytes: Some(1 << 20),
            cpu: Some(Cpu { quota_us: 50_000, period_us: 100_000 }),
            pids: Some(7),
            ..Limits::default()
        };
        let directory = tempfile::tempdir().unwrap();
        let check = |files: &[(&str, &str)], set: &dyn Fn(&Path) -> Result<()>| {
            files.iter().for_each(|(name, _)| fs::write(directory.path().join(name), "").unwrap());
            set(directory.path()).unwrap();
            for (name, expect) in files {
                assert_eq!(&fs::read_to_string(directory.path().join(name)).unwrap(), expect, "{name}");
            }
        };
        let unified =
            [("memory.max", "1048576"), ("memory.swap.max", "0"), ("cpu.max", "50000 100000"), ("pids.max", "7")];
        check(&unified, &|directory| set_unified(directory, &limits, |_| true));
        let memory = [("memory.limit_in_bytes", "1048576"), ("memory.memsw.limit_in_bytes", "1048576")];
        check(&memory, &|directory| set_legacy(directory, "memory", &limits));
        let cpu = [("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "50000")];
        check(&cpu, &|directory| set_legacy(directory, "cpu", &limits));
        check(&[("pids.max", "7")], &|directory| set_legacy(directory, "pids", &limits));
    }
}
