//! `COPY`, `ADD` and `WORKDIR`: files of trees into a root.
//!
//! The rules are BuildKit's:
//! - The destination's links are followed inside the root. With a trailing slash, or several sources, it is a
//!   directory. A directory's *contents* are copied; a file goes into a destination that is a directory, by its
//!   name in the instruction, else to the destination itself.
//! - Directories that have to be made on the way have mode 0755 (an octal `--chmod`'s, if there is one) and belong
//!   to `--chown`'s owner, else to root. The destination directory itself keeps what it has; directories below it
//!   take mode and owner of the source's. A file replaces a file or link; it never replaces a directory, nor a
//!   directory anything but a directory.
//! - With `--parents` each source keeps its directories from the pivot on, made like the source's.
//! - Links are copied as links; hard links among the files of one instruction stay hard links.
//!
//! Nothing outside the root is reached: every path is resolved to a real one inside it and then opened with
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`.
//!
//! **What is copied is what was hashed.** A file whose stamp is the one that its hash was taken under, before and after
//! the copy, has the bytes of that hash (see [`Kind::File::settled`]), so the kernel copies it, sharing extents where
//! it can. Any other is hashed while it is copied, and a difference ends the step.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use forge_snapshotter::Digester;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, StatxFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::context::{
    Attributes, ContextError, DirectoryId, Disk, Entry, Kind, SelectError, Stamp, Tree, resolve_new, select,
};
use crate::graph::{Copy, CopySource, Mkdir, Unpack};
use crate::pattern::{InvalidPattern, Parents, Patterns, clean, has_wildcards};

use super::archive;
use super::owner::{self, Chmod, InvalidMode};

const BLOCK: usize = 256 * 1024;

/// Why files could not be copied; paths are the root's.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("{action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Source(#[from] ContextError),
    #[error("{}: changed while it was copied; run the build again when nothing writes to it", .0.display())]
    Changed(PathBuf),
    #[error("cannot replace the directory {} with a file", .0.display())]
    DirectoryInTheWay(PathBuf),
    #[error("cannot copy a directory to {}, which is not a directory", .0.display())]
    NotADirectory(PathBuf),
    #[error("{0:?} matches several files, so the destination must be a directory: end it with a slash")]
    SeveralFiles(String),
    #[error("unknown {what} {name:?}: it is not in {file} of the image; give a number, or add it first")]
    Unknown { what: &'static str, name: String, file: &'static str },
    #[error(transparent)]
    Mode(#[from] InvalidMode),
    #[error("unpack {}: {source}", path.display())]
    Archive { path: PathBuf, source: forge_snapshotter::Error },
}

impl From<InvalidPattern> for CopyError {
    fn from(error: InvalidPattern) -> CopyError {
        CopyError::Source(error.into())
    }
}

impl From<SelectError> for CopyError {
    fn from(error: SelectError) -> CopyError {
        CopyError::Source(error.into())
    }
}

type Result<T, E = CopyError> = std::result::Result<T, E>;

trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> At<T> for rustix::io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|errno| CopyError::Io { action, path: Path::new("/").join(path), source: errno.into() })
    }
}

/// Copies every source in order. `tree` gives an input's files by its index.
pub(crate) fn copy<'t>(op: &Copy, root: &Path, tree: impl Fn(usize) -> &'t Tree) -> Result<()> {
    let target = Target::open(root)?;
    let copier = Copier::new(op, &target)?;
    let mut destination = clean(&op.destination);
    if op.destination.ends_with('/') || op.sources.len() > 1 {
        destination.push('/');
    }
    copier.run(op, &destination, tree)
}

/// Copies all of a tree into an empty root.
pub(crate) fn materialise(tree: &Tree, root: &Path) -> Result<()> {
    let sources = vec![CopySource::Path { input: 0, path: String::new(), pivot: None }];
    let op = Copy {
        sources,
        destination: "/".into(),
        owner: None,
        mode: None,
        parents: false,
        exclude: Vec::new(),
        unpack: Unpack::Never,
    };
    copy(&op, root, |_| tree)
}

/// Makes a directory and its parents; one that exists stays as it is.
pub(crate) fn make_directory(op: &Mkdir, root: &Path) -> Result<()> {
    let target = Target::open(root)?;
    let owner = op.owner.as_ref().map(|owner| owner::resolve(owner, &target.disk())).transpose()?;
    let path = target.resolve(Path::new(&clean(&op.path)))?;
    target.make_directories(&path, op.mode, owner)
}

/// The root that is written to.
struct Target {
    root: OwnedFd,
    path: PathBuf,
    /// In a user namespace with a single id no owner but that one can be given.
    single_id: bool,
}

impl Target {
    fn open(root: &Path) -> Result<Target> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(root, flags, Mode::empty()).map_err(|errno| CopyError::Io {
            action: "open",
            path: root.into(),
            source: errno.into(),
        })?;
        Ok(Target { root: fd, path: root.into(), single_id: super::single_id() })
    }

    fn disk(&self) -> Disk<'_> {
        Disk { root: &self.root }
    }

    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        Ok(resolve_new(&self.disk(), path)?)
    }

    fn open_directory(&self, path: &Path) -> Result<OwnedFd> {
        self.disk().open(path, OFlags::RDONLY | OFlags::DIRECTORY).at("open", path)
    }

    fn file_type(&self, path: &Path) -> Result<Option<FileType>> {
        match self.disk().open(path, OFlags::PATH) {
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno).at("look at", path),
            Ok(file) => {
                let stat = rustix::fs::fstat(&file).at("look at", path)?;
                Ok(Some(FileType::from_raw_mode(stat.st_mode)))
            }
        }
    }

    /// Makes what is missing of a real path.
    fn make_directories(&self, path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<()> {
        if self.file_type(path).is_ok_and(|found| found == Some(FileType::Directory)) {
            return Ok(());
        }
        let mut at = PathBuf::new();
        let mut parent = self.open_directory(&at)?;
        for part in path.components() {
            at.push(part);
            match rustix::fs::mkdirat(&parent, part.as_os_str(), Mode::from_raw_mode(0o700)) {
                Ok(()) => {
                    parent = self.open_directory(&at)?;
                    self.own(parent.as_fd(), owner.unwrap_or_default()).at("change the owner of", &at)?;
                    rustix::fs::fchmod(&parent, Mode::from_raw_mode(mode)).at("change the mode of", &at)?;
                }
                Err(Errno::EXIST) => match self.open_directory(&at) {
                    Err(_) if self.file_type(&at)? != Some(FileType::Directory) => {
                        return Err(CopyError::NotADirectory(Path::new("/").join(at)));
                    }
                    opened => parent = opened?,
                },
                Err(errno) => return Err(errno).at("make directory", &at),
            }
        }
        Ok(())
    }

    fn own(&self, file: BorrowedFd, (uid, gid): (u32, u32)) -> rustix::io::Result<()> {
        if self.single_id {
            return Ok(());
        }
        rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
    }
}

/// One instruction at work.
struct Copier<'a> {
    target: &'a Target,
    owner: Option<(u32, u32)>,
    chmod: Option<Chmod>,
    exclude: Patterns,
    unpack: Unpack,
    /// Where a file with several names was copied to, and as what.
    copied: HashMap<(u64, u64), (PathBuf, (u64, u64))>,
    /// Times of directories, set when all is in them.
    times: Vec<(PathBuf, Stamp)>,
    buffer: Vec<u8>,
}

/// A directory to be copied.
struct Task {
    source: DirectoryId,
    /// Real path in the tree.
    from: PathBuf,
    /// Real path in the root.
    to: PathBuf,
    /// What the exclude patterns see of it.
    seen: String,
    parents: Parents,
}

impl<'a> Copier<'a> {
    fn new(op: &Copy, target: &'a Target) -> Result<Copier<'a>> {
        Ok(Copier {
            target,
            owner: op.owner.as_ref().map(|owner| owner::resolve(owner, &target.disk())).transpose()?,
            chmod: op.mode.as_deref().map(Chmod::new).transpose()?,
            exclude: Patterns::new(&op.exclude)?,
            unpack: op.unpack,
            copied: HashMap::new(),
            times: Vec::new(),
            buffer: Vec::new(),
        })
    }

    fn run<'t>(mut self, op: &Copy, destination: &str, tree: impl Fn(usize) -> &'t Tree) -> Result<()> {
        for source in &op.sources {
            match source {
                CopySource::Inline { name, data } => self.inline(name, data.as_bytes(), destination)?,
                CopySource::Path { input, path, pivot } if op.parents => {
                    self.with_parents(tree(*input), path, pivot.as_deref().unwrap_or_default(), destination)?;
                }
                CopySource::Path { input, path, .. } => self.path(tree(*input), path, destination)?,
            }
        }
        for (path, stamp) in std::mem::take(&mut self.times).iter().rev() {
            let directory = self.target.open_directory(path)?;
            rustix::fs::futimens(&directory, &times(stamp)).at("set the time of", path)?;
        }
        Ok(())
    }

    fn implied_mode(&self) -> u32 {
        match self.chmod {
            Some(Chmod::Octal(mode)) => mode,
            _ => 0o755,
        }
    }

    fn make_directories(&self, path: &Path) -> Result<()> {
        self.target.make_directories(path, self.implied_mode(), self.owner)
    }

    /// The destination's real path, its parents made; itself too where it is written as a directory.
    fn destination(&self, destination: &str) -> Result<PathBuf> {
        let real = self.target.resolve(Path::new(destination))?;
        let directory = if destination.ends_with('/') { Some(real.as_path()) } else { real.parent() };
        directory.map_or(Ok(()), |directory| self.make_directories(directory))?;
        Ok(real)
    }

    /// Where a single file of that name goes.
    fn file_destination(&self, name: &OsStr, destination: &str) -> Result<PathBuf> {
        let real = self.destination(destination)?;
        Ok(match self.target.file_type(&real)? {
            Some(FileType::Directory) => real.join(name),
            _ => real,
        })
    }

    fn path(&mut self, tree: &Tree, path: &str, destination: &str) -> Result<()> {
        let mut selected = select(tree, path, false, &mut Vec::new())?;
        if selected.is_empty() && !has_wildcards(path) {
            return Err(ContextError::NotFound { path: path.into() }.into());
        }
        selected.retain(|selected| !selected.is_excluded(&self.exclude));
        let mut files = 0;
        for selected in selected {
            if let Some(source) = tree.directory(&selected.real) {
                let to = self.destination(destination)?;
                self.make_directories(&to)?;
                if let Some(entry) = tree.entry(&selected.real) {
                    self.times.push((to.clone(), entry.stamp));
                }
                let (from, seen) = (selected.real, String::new());
                self.directory(tree, Task { source, from, to, seen, parents: Parents::default() })?;
                continue;
            }
            let Some(entry) = tree.entry(&selected.real) else { continue };
            if self.unpack == Unpack::Archives && self.archive(tree, &selected.real, entry, destination)? {
                continue;
            }
            let name = selected.named.file_name().unwrap_or(&entry.name);
            let to = self.file_destination(name, destination)?;
            files += 1;
            if files > 1 && to.file_name() != Some(name) {
                return Err(CopyError::SeveralFiles(path.into()));
            }
            self.entry(tree, &selected.real, entry, &to)?;
        }
        Ok(())
    }

    fn with_parents(&mut self, tree: &Tree, path: &str, pivot: &str, destination: &str) -> Result<()> {
        let selected = select(tree, path, true, &mut Vec::new())?;
        if selected.is_empty() && !has_wildcards(path) {
            return Err(ContextError::NotFound { path: path.into() }.into());
        }
        let base = self.destination(&format!("{destination}/"))?;
        let pivot = clean(pivot);
        for selected in selected {
            let kept = selected.named.strip_prefix(&pivot).unwrap_or(&selected.named);
            if self.exclude.excludes(&kept.to_string_lossy()) {
                continue;
            }
            let mut to = base.clone();
            let on_the_way = kept.parent().map(Path::components).into_iter().flatten();
            let mut named = PathBuf::from(&pivot);
            let mut seen = Parents::default();
            for part in on_the_way {
                named.push(part);
                to.push(part);
                let shown = named.strip_prefix(&pivot).unwrap_or(&named).to_string_lossy();
                seen = self.exclude.enter(&seen, &shown).1;
                let real = resolve_new(tree, &named)?;
                let directory = tree.entry(&real).filter(|entry| matches!(entry.kind, Kind::Directory(_)));
                if let Some(entry) = directory.filter(|_| !matches!(self.target.file_type(&to), Ok(Some(_)))) {
                    self.entry(tree, &real, entry, &to)?;
                }
            }
            let Some(entry) = tree.entry(&selected.real) else { continue };
            to.extend(kept.file_name());
            self.entry(tree, &selected.real, entry, &to)?;
            if let Kind::Directory(source) = entry.kind {
                let shown = kept.to_string_lossy().into_owned();
                let parents = self.exclude.enter(&seen, &shown).1;
                self.directory(tree, Task { source, from: selected.real, to, seen: shown, parents })?;
            }
        }
        Ok(())
    }

    /// The contents of a directory, into one that is there.
    fn directory(&mut self, tree: &Tree, top: Task) -> Result<()> {
        let mut todo = vec![top];
        while let Some(task) = todo.pop() {
            let source = open_source_directory(tree, &task.from)?;
            let parent = self.target.open_directory(&task.to)?;
            for entry in &tree.listing(task.source).entries {
                let (from, to) = (task.from.join(&entry.name), task.to.join(&entry.name));
                let name = entry.name.to_string_lossy();
                let seen = if task.seen.is_empty() { name.into_owned() } else { format!("{}/{name}", task.seen) };
                let Kind::Directory(source) = entry.kind else {
                    if !self.exclude.excludes_in(&task.parents, &seen) {
                        let (source, parent) = (source.as_fd(), parent.as_fd());
                        self.leaf(tree, entry, &Route { source, from: &from, parent, to: &to })?;
                    }
                    continue;
                };
                let (excluded, parents) = self.exclude.enter(&task.parents, &seen);
                if excluded && !self.holds_included(tree, source, &seen, &parents) {
                    continue;
                }
                self.entry(tree, &from, entry, &to)?;
                todo.push(Task { source, from, to, seen, parents });
            }
        }
        Ok(())
    }

    /// Whether something below an excluded directory was taken back.
    fn holds_included(&self, tree: &Tree, directory: DirectoryId, seen: &str, parents: &Parents) -> bool {
        let mut todo = vec![(directory, seen.to_owned(), parents.clone())];
        while let Some((directory, seen, parents)) = todo.pop() {
            if !self.exclude.may_descend(&parents, &seen) {
                continue;
            }
            for entry in &tree.listing(directory).entries {
                let path = format!("{seen}/{}", entry.name.to_string_lossy());
                let (excluded, below) = self.exclude.enter(&parents, &path);
                match entry.kind {
                    _ if !excluded => return true,
                    Kind::Directory(id) => todo.push((id, path, below)),
                    _ => (),
                }
            }
        }
        false
    }

    /// One entry of a tree to a real path whose parent is there. Of a directory, just itself.
    fn entry(&mut self, tree: &Tree, from: &Path, entry: &Entry, to: &Path) -> Result<()> {
        let Some(parent) = to.parent() else { return Err(CopyError::DirectoryInTheWay("/".into())) };
        if let Kind::Directory(id) = entry.kind {
            return self.one_directory(&tree.listing(id).attributes, entry, to);
        }
        let source = open_source_directory(tree, from.parent().unwrap_or(Path::new("")))?;
        let parent = self.target.open_directory(parent)?;
        self.leaf(tree, entry, &Route { source: source.as_fd(), from, parent: parent.as_fd(), to })
    }

    /// Anything but a directory.
    fn leaf(&mut self, tree: &Tree, entry: &Entry, route: &Route) -> Result<()> {
        let Route { parent, to, .. } = *route;
        let name = route.name();
        self.make_way(parent, name, to)?;
        match &entry.kind {
            Kind::File { digest, settled } => return self.file(tree, entry, (digest, *settled), route),
            Kind::Link(link) => rustix::fs::symlinkat(link, parent, name).at("make link", to)?,
            Kind::Special { file_type, device } => {
                rustix::fs::mknodat(parent, name, *file_type, Mode::from_raw_mode(0o600), *device)
                    .at("make device", to)?;
                let mode = Mode::from_raw_mode(self.mode(entry));
                rustix::fs::chmodat(parent, name, mode, AtFlags::empty()).at("change the mode of", to)?;
            }
            Kind::Directory(_) => (),
        }
        if !self.target.single_id {
            let (uid, gid) = self.owner.unwrap_or((entry.uid, entry.gid));
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).at("change the owner of", to)?;
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(parent, name, &times(&entry.stamp), flags).at("set the time of", to)
    }

    fn one_directory(&mut self, attributes: &Attributes, entry: &Entry, to: &Path) -> Result<()> {
        match self.target.file_type(to)? {
            Some(FileType::Directory) => (),
            Some(_) => return Err(CopyError::NotADirectory(Path::new("/").join(to))),
            None => {
                let parent = self.target.open_directory(to.parent().unwrap_or(Path::new("")))?;
                let name = to.file_name().unwrap_or_default();
                rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)).at("make directory", to)?;
            }
        }
        let directory = self.target.open_directory(to)?;
        self.finish(directory.as_fd(), entry, attributes, to)?;
        self.times.push((to.to_owned(), entry.stamp));
        Ok(())
    }

    /// Removes the file or link that is there.
    fn make_way(&self, parent: BorrowedFd, name: &OsStr, to: &Path) -> Result<()> {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => Err(CopyError::DirectoryInTheWay(Path::new("/").join(to))),
            Err(errno) => Err(errno).at("replace", to),
        }
    }

    fn file(&mut self, tree: &Tree, entry: &Entry, hashed: (&[u8; 32], bool), route: &Route) -> Result<()> {
        let (digest, settled) = hashed;
        let Route { parent, to, .. } = *route;
        if self.link(entry, route)? {
            return Ok(());
        }
        let source = route.open_source(tree)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, route.name(), flags, Mode::from_raw_mode(0o600)).at("create", to)?;
        let unchanged = || Ok::<_, CopyError>(settled && stamp(source.as_fd(), route.from)? == entry.stamp);
        let copied = unchanged()? && self.copy_proven(&source, &file, entry.stamp.size, to)? && unchanged()?;
        if !copied && self.copy_hashing(&source, &file, to)? != *digest {
            return Err(CopyError::Changed(tree.root.join(route.from)));
        }
        self.finish(file.as_fd(), entry, &entry.attributes, to)?;
        rustix::fs::futimens(&file, &times(&entry.stamp)).at("set the time of", to)?;
        if entry.linked {
            let stat = rustix::fs::fstat(&file).at("look at", to)?;
            let key = (entry.stamp.device, entry.stamp.inode);
            self.copied.insert(key, (to.to_owned(), (stat.st_dev, stat.st_ino)));
        }
        Ok(())
    }

    /// A second name of a file that was copied under another, if that copy is still there.
    fn link(&self, entry: &Entry, route: &Route) -> Result<bool> {
        let key = (entry.stamp.device, entry.stamp.inode);
        let Some((copy, identity)) = self.copied.get(&key).filter(|_| entry.linked) else { return Ok(false) };
        let Ok(file) = self.target.disk().open(copy, OFlags::PATH) else { return Ok(false) };
        let stat = rustix::fs::fstat(&file).at("look at", copy)?;
        if (stat.st_dev, stat.st_ino) != *identity {
            return Ok(false);
        }
        let name = route.name();
        rustix::fs::linkat(&self.target.root, copy, route.parent, name, AtFlags::empty()).at("link", route.to)?;
        Ok(true)
    }

    /// Copies bytes that need not be looked at; false where it did not come to all of them.
    fn copy_proven(&mut self, from: &OwnedFd, to: &OwnedFd, size: u64, path: &Path) -> Result<bool> {
        if size > BLOCK as u64 {
            return self.copy_range(from, to, path);
        }
        // Of a small file one reading costs less than asking the kernel to share.
        self.buffer.resize(BLOCK, 0);
        let size = size as usize;
        let read = rustix::io::retry_on_intr(|| rustix::io::read(from, &mut self.buffer[..size])).at("read", path)?;
        write_all(to, &self.buffer[..read]).at("write", path)?;
        Ok(read == size)
    }

    /// Lets the kernel copy; false where it does not do it for these two files.
    fn copy_range(&mut self, from: &OwnedFd, to: &OwnedFd, path: &Path) -> Result<bool> {
        let mut started = false;
        loop {
            match rustix::fs::copy_file_range(from, None, to, None, 1 << 30) {
                Ok(0) => return Ok(true),
                Ok(_) => started = true,
                Err(Errno::INTR) => (),
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::IO)
                    if !started =>
                {
                    return Ok(false);
                }
                Err(errno) => return Err(errno).at("write", path),
            }
        }
    }

    /// Copies from the beginning, whatever was copied before, and says what was copied.
    fn copy_hashing(&mut self, from: &OwnedFd, to: &OwnedFd, path: &Path) -> Result<[u8; 32]> {
        rustix::fs::seek(from, rustix::fs::SeekFrom::Start(0)).at("read", path)?;
        rustix::fs::seek(to, rustix::fs::SeekFrom::Start(0)).at("write", path)?;
        rustix::fs::ftruncate(to, 0).at("write", path)?;
        self.buffer.resize(BLOCK, 0);
        let mut digester = Digester::new();
        loop {
            let read = rustix::io::retry_on_intr(|| rustix::io::read(from, &mut self.buffer[..])).at("read", path)?;
            if read == 0 {
                return Ok(digester.finish_bytes());
            }
            digester.update(&self.buffer[..read]);
            write_all(to, &self.buffer[..read]).at("write", path)?;
        }
    }

    fn mode(&self, entry: &Entry) -> u32 {
        let directory = matches!(entry.kind, Kind::Directory(_));
        self.chmod.as_ref().map_or(entry.mode, |chmod| chmod.apply(entry.mode, directory))
    }

    /// Owner before mode before attributes: each would undo what comes after it (set-id bits, capabilities).
    fn finish(&self, file: BorrowedFd, entry: &Entry, attributes: &Attributes, path: &Path) -> Result<()> {
        let owner = self.owner.unwrap_or((entry.uid, entry.gid));
        self.target.own(file, owner).at("change the owner of", path)?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(self.mode(entry))).at("change the mode of", path)?;
        for (name, value) in attributes {
            match rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()) {
                // Not every file system and user may have them; BuildKit, too, copies what it can.
                Ok(()) | Err(Errno::NOTSUP | Errno::PERM) => (),
                Err(errno) => return Err(errno).at("set an attribute of", path),
            }
        }
        Ok(())
    }

    fn inline(&mut self, name: &str, data: &[u8], destination: &str) -> Result<()> {
        let to = self.file_destination(OsStr::new(name), destination)?;
        let (Some(parent), Some(name)) = (to.parent(), to.file_name()) else {
            return Err(CopyError::DirectoryInTheWay("/".into()));
        };
        let parent = self.target.open_directory(parent)?;
        self.make_way(parent.as_fd(), name, &to)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600)).at("create", &to)?;
        write_all(&file, data).at("write", &to)?;
        self.target.own(file.as_fd(), self.owner.unwrap_or_default()).at("change the owner of", &to)?;
        let mode = self.chmod.as_ref().map_or(0o644, |chmod| chmod.apply(0o644, false));
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).at("change the mode of", &to)?;
        // It has no time of its own; the beginning of time is the same in every build.
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let never = Timestamps { last_access: never, last_modification: never };
        rustix::fs::futimens(&file, &never).at("set the time of", &to)
    }

    /// Unpacks a source that is an archive by its content; false if it is none.
    fn archive(&mut self, tree: &Tree, from: &Path, entry: &Entry, destination: &str) -> Result<bool> {
        let Kind::File { digest, .. } = &entry.kind else { return Ok(false) };
        let directory = open_source_directory(tree, from.parent().unwrap_or(Path::new("")))?;
        let route = Route { source: directory.as_fd(), from, parent: directory.as_fd(), to: from };
        if !archive::is_archive(route.open_source(tree)?.into()) {
            return Ok(false);
        }
        let at = self.destination(&format!("{destination}/"))?;
        let source = route.open_source(tree)?.into();
        let unpacked = archive::unpack(source, &self.target.path, &at, self.owner);
        match unpacked {
            Ok(hash) if hash == *digest => Ok(true),
            Ok(_) => Err(CopyError::Changed(tree.root.join(from))),
            Err(source) => Err(CopyError::Archive { path: tree.root.join(from), source }),
        }
    }
}

/// From where to where one entry goes: open directories and, within the roots, real paths.
struct Route<'a> {
    source: BorrowedFd<'a>,
    from: &'a Path,
    parent: BorrowedFd<'a>,
    to: &'a Path,
}

impl Route<'_> {
    fn name(&self) -> &OsStr {
        self.to.file_name().unwrap_or_default()
    }

    fn open_source(&self, tree: &Tree) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let name = self.from.file_name().unwrap_or_default();
        rustix::fs::openat(self.source, name, flags, Mode::empty()).or_else(|errno| cannot_open(tree, self.from, errno))
    }
}

/// A directory of a tree, opened below its root and through no link.
fn open_source_directory(tree: &Tree, from: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&tree.root, flags, Mode::empty()).or_else(|errno| cannot_open(tree, from, errno))?;
    (Disk { root: &root }).open(from, flags).or_else(|errno| cannot_open(tree, from, errno))
}

/// What is gone, or became something else, has changed.
fn cannot_open<T>(tree: &Tree, from: &Path, errno: Errno) -> Result<T> {
    let path = tree.root.join(from);
    Err(match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO => CopyError::Changed(path),
        errno => ContextError::Unreadable { path, source: errno.into() }.into(),
    })
}

fn stamp(file: BorrowedFd, path: &Path) -> Result<Stamp> {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).at("look at", path)?;
    Ok(Stamp::of(&stat))
}

fn times(stamp: &Stamp) -> Timestamps {
    let time = Timespec { tv_sec: stamp.mtime.0, tv_nsec: stamp.mtime.1.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn write_all(file: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(file, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => (),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
