//! What a container sees of files. Every mount is made detached first (`fsmount`, `open_tree`) and attached to a descriptor
//! that was resolved inside the root, so no path of the image is ever followed on the host.
//!
//! ```text
//! /                    the snapshot
//! /proc                of the container's own pid namespace; partly masked, partly read-only
//! /dev                 tmpfs: null zero full random urandom tty, links, pts/ shm/ mqueue/
//! /sys                 read-only; /sys/fs/cgroup read-only
//! /etc/resolv.conf     files of a tmpfs that is mounted nowhere else, like all of `MountSource::File`
//! /etc/hosts
//! /etc/hostname
//! ...                  the container's mounts, in order
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, makedev, mkdirat, mknodat, open, openat,
    openat2, symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_bind_recursive, mount_change,
    move_mount, open_tree, unmount,
};
use rustix::process::fchdir;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, ptsname, unlockpt};

use super::cgroup::View;
use super::spec::{Container, ContainerMount, Failure, Hint, MountSource, Privileges, Result, Step};
use super::targets::{self, Kind, Made};

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const READONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;
const DATA: MountAttrFlags = NOSUID.union(NODEV).union(NOEXEC);

/// Hidden from a sandboxed container, as docker does: they tell about the machine or change it.
const MASKED_PROC: &[&str] = &[
    "acpi",
    "asound",
    "interrupts",
    "kcore",
    "keys",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
];
const MASKED_SYS: &[&str] = &["firmware", "devices/virtual/powercap"];
const READONLY_PROC: &[&str] = &["bus", "fs", "irq", "sys", "sysrq-trigger"];

const DEVICES: &[(&str, u32, u32)] =
    &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

const SHM_BYTES: u64 = 64 << 20;

/// What the helper knows of the machine and a container cannot see any more.
pub struct Machine {
    /// In a user namespace: device nodes cannot be made, and the machine's `/sys` may have to serve.
    pub rootless: bool,
    /// One user is mapped: no other can own anything.
    pub single_id: bool,
    /// `devices/system/cpu/cpu0/thermal_throttle` and its like, where there are any.
    pub throttles: Vec<PathBuf>,
}

/// The places in the root that [`enter`] mounts at, and the directory that the program starts in.
pub fn targets(container: &Container) -> Vec<(PathBuf, Kind)> {
    let fixed = [
        ("/proc", Kind::Directory),
        ("/dev", Kind::Directory),
        ("/sys", Kind::Directory),
        ("/etc/resolv.conf", Kind::File),
        ("/etc/hosts", Kind::File),
        ("/etc/hostname", Kind::File),
    ];
    let own = container.mounts.iter().map(|mount| {
        let kind = match &mount.source {
            MountSource::Tmpfs { .. } => Kind::Directory,
            MountSource::File { .. } => Kind::File,
            MountSource::Bind(source) if source.is_dir() => Kind::Directory,
            MountSource::Bind(_) => Kind::File,
        };
        (PathBuf::from(&mount.target), kind)
    });
    let fixed = fixed.into_iter().map(|(path, kind)| (PathBuf::from(path), kind));
    fixed.chain(own).chain([(PathBuf::from(&container.cwd), Kind::Directory)]).collect()
}

/// The terminal that a container was given: what its program talks to, and what forge does.
pub struct Terminal {
    pub slave: OwnedFd,
    pub master: OwnedFd,
}

/// Makes `container.root` this process's root and puts everything in place. This process is alone in its mount namespace.
pub fn enter(container: &Container, machine: &Machine, cgroup: &View, terminal: bool) -> Result<Option<Terminal>> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).step("make mounts private")?;
    let detached = Detached::make(container, machine, cgroup)?;
    let root = pivot(&container.root)?;
    let devices = detached.attach(&root)?;
    if sandboxed(container) {
        detached.close_devices(&root)?;
    }
    let terminal = match terminal {
        true => Some(open_terminal(&detached.pts, &devices)?),
        false => None,
    };
    attach_files(container, machine, &root, &detached.sources)?;
    if sandboxed(container) {
        detached.mask(machine, &devices)?;
    }
    if container.readonly_root {
        set_attributes(&root, READONLY, Depth::One).step("make the root read-only")?;
    }
    Ok(terminal)
}

fn sandboxed(container: &Container) -> bool {
    matches!(container.privileges, Privileges::Default { .. })
}

/// File systems and parts of the machine's that are attached nowhere yet. All are taken while the machine's root is still
/// there: the kernel grants a new `/proc` or `/sys` in a user namespace only to who can see a whole one.
struct Detached {
    proc: OwnedFd,
    dev: OwnedFd,
    /// The machine's device nodes, where new ones cannot be made.
    nodes: Vec<(&'static str, OwnedFd)>,
    pts: OwnedFd,
    shm: OwnedFd,
    mqueue: OwnedFd,
    sys: OwnedFd,
    cgroup: Option<OwnedFd>,
    /// The machine's cgroup directories to show below `cgroup`.
    controllers: Vec<(String, OwnedFd)>,
    /// For each of the container's mounts; none for files, which are made later.
    sources: Vec<Option<OwnedFd>>,
}

impl Detached {
    fn make(container: &Container, machine: &Machine, cgroup: &View) -> Result<Detached> {
        let proc = file_system("proc", &[], DATA).step("mount /proc").hint(
            libc::EPERM,
            "the container that forge runs in hides parts of its /proc; docker: --security-opt systempaths=unconfined",
        )?;
        let shm_bytes = container.limits.shm_size_bytes.unwrap_or(SHM_BYTES);
        let pts_group: &[(&str, &str)] = if machine.single_id { &[] } else { &[("gid", "5")] };
        let pts_options = [&[("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620")], pts_group].concat();
        let (sys, own_sys) = sys()?;
        let (cgroup, controllers) = if own_sys { cgroups(cgroup)? } else { (None, Vec::new()) };
        Ok(Detached {
            proc,
            dev: devices(machine)?,
            nodes: if machine.rootless { machine_nodes()? } else { Vec::new() },
            pts: file_system("devpts", &pts_options, NOSUID | NOEXEC).step("mount /dev/pts")?,
            shm: tmpfs(Some(shm_bytes), 0o1777, DATA).step("mount /dev/shm")?,
            mqueue: file_system("mqueue", &[], DATA).step("mount /dev/mqueue")?,
            sys,
            cgroup,
            controllers,
            sources: container.mounts.iter().map(|mount| source(container, mount)).collect::<Result<_>>()?,
        })
    }

    /// Puts the fixed part in place; gives the container's `/dev`.
    fn attach(&self, root: &OwnedFd) -> Result<OwnedFd> {
        attach_at_directory(&self.proc, root, "proc")?;
        attach_at_directory(&self.sys, root, "sys")?;
        if let Some(cgroup) = &self.cgroup {
            let directory = openat(&self.sys, "fs/cgroup", PATH_ONLY, Mode::empty()).step("find /sys/fs/cgroup")?;
            move_to(cgroup, &directory).step("mount /sys/fs/cgroup")?;
            for (name, controller) in &self.controllers {
                let directory =
                    openat(cgroup, name.as_str(), PATH_ONLY, Mode::empty()).step("find a cgroup directory")?;
                move_to(controller, &directory).step(format!("mount /sys/fs/cgroup/{name}"))?;
            }
            set_attributes(cgroup, READONLY, Depth::All).step("make /sys/fs/cgroup read-only")?;
        }
        attach_at_directory(&self.dev, root, "dev")?;
        for (name, mount) in [("pts", &self.pts), ("shm", &self.shm), ("mqueue", &self.mqueue)] {
            let directory = openat(&self.dev, name, PATH_ONLY, Mode::empty()).step(format!("find /dev/{name}"))?;
            move_to(mount, &directory).step(format!("mount /dev/{name}"))?;
        }
        for (name, node) in &self.nodes {
            let file = openat(&self.dev, *name, PATH_ONLY, Mode::empty()).step(format!("find /dev/{name}"))?;
            move_to(node, &file).step(format!("mount /dev/{name}"))?;
        }
        self.dev.try_clone().step("keep /dev")
    }

    /// Leaves no place where a device node that was made, or came in an image, can be opened: root may make them, and one
    /// opened would be the machine's disk. The nodes of `/dev` become mounts of their own, so that it can be closed as well.
    /// (docker has the devices cgroup for this, which not everybody who starts a container may set.)
    fn close_devices(&self, root: &OwnedFd) -> Result<()> {
        for (name, ..) in DEVICES.iter().filter(|(name, ..)| !self.nodes.iter().any(|(bound, _)| bound == name)) {
            let step = || format!("mount /dev/{name}");
            let node = open_tree(&self.dev, *name, CLONE).step(step())?;
            let place = openat(&self.dev, *name, PATH_ONLY, Mode::empty()).step(step())?;
            move_to(&node, &place).step(step())?;
        }
        for (mount, path) in [(&self.dev, "/dev"), (root, "/")] {
            set_attributes(mount, NODEV, Depth::One).step(format!("close {path} to devices"))?;
        }
        Ok(())
    }

    fn mask(&self, machine: &Machine, devices: &OwnedFd) -> Result<()> {
        let mut hidden = Hidden { devices, empty: None };
        for path in MASKED_PROC {
            hidden.cover(&self.proc, Path::new(path))?;
        }
        for path in MASKED_SYS.iter().map(Path::new).chain(machine.throttles.iter().map(PathBuf::as_path)) {
            hidden.cover(&self.sys, path)?;
        }
        for path in READONLY_PROC {
            let step = || format!("make /proc/{path} read-only");
            match open_tree(&self.proc, *path, CLONE | OpenTreeFlags::AT_RECURSIVE) {
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error).step(step()),
                Ok(tree) => {
                    set_attributes(&tree, READONLY, Depth::All).step(step())?;
                    let place = openat(&self.proc, *path, PATH_ONLY, Mode::empty()).step(step())?;
                    move_to(&tree, &place).step(step())?;
                }
            }
        }
        Ok(())
    }
}

/// What stands in for files and directories that a container shall not see.
struct Hidden<'a> {
    devices: &'a OwnedFd,
    /// One empty file system for all directories, with its first place.
    empty: Option<OwnedFd>,
}

impl Hidden<'_> {
    fn cover(&mut self, base: &OwnedFd, path: &Path) -> Result<()> {
        let step = || format!("mask {}", path.display());
        let place = match openat(base, path, PATH_ONLY, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(()),
            place => place.step(step())?,
        };
        let cover = if !targets::is_directory(&place).step(step())? {
            open_tree(self.devices, "null", CLONE).step(step())?
        } else if let Some(empty) = &self.empty {
            open_tree(empty, "", CLONE | OpenTreeFlags::AT_EMPTY_PATH).step(step())?
        } else {
            tmpfs(Some(0), 0o755, DATA | READONLY).step(step())?
        };
        move_to(&cover, &place).step(step())?;
        if self.empty.is_none() && targets::is_directory(&cover).step(step())? {
            self.empty = Some(cover);
        }
        Ok(())
    }
}

/// A read-only `/sys`, and whether it is a new one. The owner of a user namespace that uses the machine's network gets the
/// machine's own instead.
fn sys() -> Result<(OwnedFd, bool)> {
    match file_system("sysfs", &[], DATA | READONLY) {
        Err(Errno::PERM) => {
            let tree = open_tree(CWD, "/sys", CLONE | OpenTreeFlags::AT_RECURSIVE).step("bind /sys")?;
            set_attributes(&tree, READONLY, Depth::All).step("bind /sys read-only")?;
            Ok((tree, false))
        }
        made => Ok((made.step("mount /sys")?, true)),
    }
}

type Controllers = Vec<(String, OwnedFd)>;

fn cgroups(view: &View) -> Result<(Option<OwnedFd>, Controllers)> {
    match view {
        View::None => Ok((None, Vec::new())),
        View::Unified => Ok((Some(file_system("cgroup2", &[], DATA).step("mount cgroup2")?), Vec::new())),
        View::Controllers(directories) => {
            let base = tmpfs(Some(0), 0o755, DATA).step("mount /sys/fs/cgroup")?;
            let mut controllers = Vec::new();
            for (name, directory) in directories {
                mkdirat(&base, name.as_str(), Mode::from_raw_mode(0o755)).step("make a cgroup mount point")?;
                controllers.push((name.clone(), open_tree(CWD, directory, CLONE).step("bind a cgroup")?));
            }
            Ok((Some(base), controllers))
        }
    }
}

fn devices(machine: &Machine) -> Result<OwnedFd> {
    let dev = tmpfs(Some(64 << 20), 0o755, NOSUID | NOEXEC).step("mount /dev")?;
    for (name, major, minor) in DEVICES {
        let step = || format!("make /dev/{name}");
        let mode = Mode::from_raw_mode(0o666);
        match machine.rootless {
            true => drop(openat(&dev, *name, OFlags::CREATE | OFlags::CLOEXEC, mode).step(step())?),
            false => mknodat(&dev, *name, FileType::CharacterDevice, mode, makedev(*major, *minor)).step(step())?,
        }
    }
    for (name, target) in LINKS {
        symlinkat(*target, &dev, *name).step(format!("make /dev/{name}"))?;
    }
    for name in ["pts", "shm", "mqueue"] {
        mkdirat(&dev, name, Mode::from_raw_mode(0o755)).step(format!("make /dev/{name}"))?;
    }
    Ok(dev)
}

fn machine_nodes() -> Result<Vec<(&'static str, OwnedFd)>> {
    let node = |&(name, ..): &(&'static str, u32, u32)| {
        let path = format!("/dev/{name}");
        Ok((name, open_tree(CWD, path.as_str(), CLONE).step(format!("bind {path}"))?))
    };
    DEVICES.iter().map(node).collect()
}

fn source(container: &Container, mount: &ContainerMount) -> Result<Option<OwnedFd>> {
    let tree = match &mount.source {
        MountSource::File { .. } => return Ok(None),
        MountSource::Tmpfs { size_bytes, mode } => {
            tmpfs(*size_bytes, *mode, NOSUID | NODEV).step(format!("make a tmpfs for {}", mount.target))?
        }
        MountSource::Bind(path) => open_tree(CWD, path, CLONE | OpenTreeFlags::AT_RECURSIVE).step(format!(
            "bind {} at {}",
            path.display(),
            mount.target
        ))?,
    };
    let devices = if sandboxed(container) { NODEV } else { MountAttrFlags::empty() };
    let attributes = if mount.readonly { devices | READONLY } else { devices };
    set_attributes(&tree, attributes, Depth::All).step(format!("restrict {}", mount.target))?;
    Ok(Some(tree))
}

/// Leaves the machine's tree for good; gives the new root.
fn pivot(root: &Path) -> Result<OwnedFd> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = open("/", directory, Mode::empty()).step("open /")?;
    mount_bind_recursive(root, root).step(format!("bind {}", root.display()))?;
    let new = open(root, directory, Mode::empty()).step(format!("open {}", root.display()))?;
    fchdir(&new).step("enter the root")?;
    nix::unistd::pivot_root(".", ".").step("pivot_root")?;
    fchdir(&old).step("go back to the old root")?;
    unmount(".", UnmountFlags::DETACH).step("detach the old root")?;
    fchdir(&new).step("enter the root")?;
    Ok(new)
}

/// The container's own mounts, and the files that every container has. The files lie on one tmpfs, which is attached over the
/// root for as long as it takes to take single files from it: older kernels clone no mount that is attached nowhere.
fn attach_files(container: &Container, machine: &Machine, root: &OwnedFd, sources: &[Option<OwnedFd>]) -> Result<()> {
    let scratch = tmpfs(None, 0o700, NOSUID | NODEV).step("make a tmpfs for files")?;
    move_to(&scratch, root).step("attach the tmpfs for files")?;
    let store = FileStore { scratch: &scratch, machine };
    let fixed = [
        ("/etc/resolv.conf", container.resolv_conf.clone()),
        ("/etc/hosts", container.hosts.clone()),
        ("/etc/hostname", format!("{}\n", container.hostname)),
    ];
    let mut ready = Vec::new();
    for (target, text) in &fixed {
        ready.push((*target, store.add(target, text.as_bytes(), 0o644, (0, 0))?));
    }
    for (mount, source) in container.mounts.iter().zip(sources) {
        let tree = match (&mount.source, source) {
            (MountSource::File { data, mode, uid, gid }, _) => {
                let file = store.add(&mount.target, data, *mode, (*uid, *gid))?;
                if mount.readonly {
                    set_attributes(&file, READONLY, Depth::One).step(format!("make {} read-only", mount.target))?;
                }
                file
            }
            (_, Some(tree)) => tree.try_clone().step("keep a mount")?,
            (_, None) => continue,
        };
        ready.push((&mount.target, tree));
    }
    fchdir(&scratch).step("enter the tmpfs for files")?;
    unmount(".", UnmountFlags::DETACH).step("detach the tmpfs for files")?;
    fchdir(root).step("enter the root")?;
    // A mount over all of /etc goes below the three files, as docker has it; any other after them.
    ready.sort_by_key(|(target, _)| Path::new(target) != Path::new("/etc"));
    ready.iter().try_for_each(|(target, tree)| attach_at(tree, root, Path::new(target)))
}

struct FileStore<'a> {
    scratch: &'a OwnedFd,
    machine: &'a Machine,
}

impl FileStore<'_> {
    /// A mount of a file with these bytes.
    fn add(&self, target: &str, data: &[u8], mode: u32, (uid, gid): (u32, u32)) -> Result<OwnedFd> {
        const NAME: &str = "file";
        let step = || format!("make the file for {target}");
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let mut file = File::from(openat(self.scratch, NAME, flags, Mode::from_raw_mode(0o600)).step(step())?);
        file.write_all(data).step(step())?;
        // With a single mapped user everything is root's, and root is the only user there is.
        if !self.machine.single_id {
            fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).step(step())?;
        }
        fchmod(&file, Mode::from_raw_mode(mode)).step(step())?;
        let mount = open_tree(self.scratch, NAME, CLONE).step(step())?;
        // The name was needed for the clone alone, but a deleted file cannot be mounted: give it another, unique one.
        rustix::fs::renameat(self.scratch, NAME, self.scratch, format!("{}", mount.as_raw_fd())).step(step())?;
        Ok(mount)
    }
}

/// A terminal of the container's own devpts, also as `/dev/console`.
fn open_terminal(pts: &OwnedFd, devices: &OwnedFd) -> Result<Terminal> {
    let step = "open a terminal";
    let master = openat(pts, "ptmx", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).step(step)?;
    unlockpt(&master).step(step)?;
    let slave =
        ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).step(step)?;
    let name = ptsname(&master, Vec::new()).step(step)?;
    let number = name.to_string_lossy().rsplit('/').next().unwrap_or_default().to_owned();
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    drop(openat(devices, "console", flags, Mode::from_raw_mode(0o600)).step("make /dev/console")?);
    let console = openat(devices, "console", PATH_ONLY, Mode::empty()).step("find /dev/console")?;
    let tree = open_tree(pts, number.as_str(), CLONE).step("bind /dev/console")?;
    move_to(&tree, &console).step("mount /dev/console")?;
    Ok(Terminal { slave, master })
}

const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// Attaches at one of the directories that an image cannot be allowed to lead elsewhere.
fn attach_at_directory(mount: &OwnedFd, root: &OwnedFd, name: &str) -> Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = match openat2(root, name, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS) {
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(Failure::Invalid(format!(
                "/{name} of the image is not a directory: a container cannot start in it"
            )));
        }
        place => place.step(format!("find /{name}"))?,
    };
    move_to(mount, &place).step(format!("mount /{name}"))
}

/// Attaches anywhere in the root, making what is missing.
fn attach_at(mount: &OwnedFd, root: &OwnedFd, target: &Path) -> Result<()> {
    let step = || format!("mount {}", target.display());
    let kind = if targets::is_directory(mount).step(step())? { Kind::Directory } else { Kind::File };
    let place = targets::find_or_make(root.as_fd(), target, kind, &mut Made::default()).step(step())?;
    move_to(mount, &place).step(step())
}

fn move_to(mount: &OwnedFd, place: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", place, "", flags)
}

fn tmpfs(size_bytes: Option<u64>, mode: u32, attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let (size, mode) = (size_bytes.unwrap_or_default().to_string(), format!("{mode:o}"));
    let options = [("mode", mode.as_str()), ("size", size.as_str())];
    // A size of 0 is tmpfs's word for no limit.
    let count = if size_bytes.is_some() { 2 } else { 1 };
    file_system("tmpfs", &options[..count], attributes)
}

/// A new file system, attached nowhere. An option without a value is a flag.
fn file_system(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        match value.is_empty() {
            true => fsconfig_set_flag(&context, *key)?,
            false => fsconfig_set_string(&context, *key, *value)?,
        }
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

#[derive(Clone, Copy)]
pub enum Depth {
    One,
    All,
}

/// Adds these to what a mount has.
#[expect(unsafe_code, reason = "mount_setattr has no safe form")]
pub fn set_attributes(mount: &OwnedFd, set: MountAttrFlags, depth: Depth) -> io::Result<()> {
    /// The kernel's `struct mount_attr`, version 0 (Linux 5.12).
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attributes = Attributes { set: u64::from(set.bits()), ..Attributes::default() };
    let recursive = match depth {
        Depth::One => 0,
        Depth::All => libc::AT_RECURSIVE,
    };
    let mount: BorrowedFd<'_> = mount.as_fd();
    // SAFETY: the path is a constant C string and the structure has the size that is passed; both live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
