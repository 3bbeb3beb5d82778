//! A directory that an archive is written into, which nothing leaves.
//!
//! Paths go through here to become a directory's descriptor and one name in it. A path without symbolic
//! links is resolved by the kernel (`openat2`, beneath the root, no links). Any other is walked here, a
//! component at a time, none of them opened through a link: links are read and followed by hand, with the
//! tree's own top as "/" and ".." stopping there. Directories that are missing on the way are made.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::changes::Marks;
use super::{MAX_PATH, refuse};
use crate::walk::{self, DIRECTORY};
use crate::{Context, Error, Result};

/// Links followed for one path before it is taken for a loop; the kernel's number.
const MAX_LINKS: usize = 40;
/// How deep a directory may be to be replaced by something else.
const MAX_REMOVED_DEPTH: usize = 512;

pub(super) type Directory = Rc<OwnedFd>;

pub(super) struct Tree {
    path: PathBuf,
    root: Directory,
    /// Of overlay form; `None` in an ordinary root.
    marks: Option<Marks>,
    /// The directory used last: archives name files directory by directory.
    last: Option<(Vec<u8>, Directory)>,
    /// Set at the end: making a file in a directory changes the directory's time.
    times: BTreeMap<Vec<u8>, (i64, u32)>,
    /// Directories made on the way that no entry has described yet, by inode.
    implied: HashMap<u64, Vec<u8>>,
    /// Whether directories made on the way are given to root; else they belong to this process.
    owned: bool,
}

impl Tree {
    pub(super) fn open(path: &Path, marks: Option<Marks>, owned: bool) -> Result<Tree> {
        let root = Rc::new(fs::open(path, DIRECTORY, Mode::empty()).context("open directory", path)?);
        Ok(Tree {
            path: path.to_owned(),
            root,
            marks,
            last: None,
            times: BTreeMap::new(),
            implied: HashMap::new(),
            owned,
        })
    }

    pub(super) fn root(&self) -> Directory {
        self.root.clone()
    }

    pub(super) fn failed(&self, action: &'static str, path: &[u8], errno: Errno) -> Error {
        Error::Io { action, path: self.path.join(walk::as_path(path)), source: errno.into() }
    }

    /// The directory at a clean path, made if it is missing.
    pub(super) fn directory(&mut self, path: &[u8]) -> Result<Directory> {
        if path.is_empty() {
            return Ok(self.root.clone());
        }
        if let Some((_, directory)) = self.last.as_ref().filter(|(last, _)| last == path) {
            return Ok(directory.clone());
        }
        let directory = match self.beneath(path) {
            Ok(directory) => Rc::new(directory),
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => self.follow(path, true)?,
            Err(errno) => return Err(self.failed("open directory", path, errno)),
        };
        self.last = Some((path.to_owned(), directory.clone()));
        Ok(directory)
    }

    /// The directory at a clean path, if there is one.
    pub(super) fn existing(&mut self, path: &[u8]) -> Result<Option<Directory>> {
        if path.is_empty() {
            return Ok(Some(self.root.clone()));
        }
        if let Ok(directory) = self.beneath(path) {
            return Ok(Some(Rc::new(directory)));
        }
        match self.follow(path, false) {
            Ok(directory) => Ok(Some(directory)),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn beneath(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        fs::openat2(&self.root, path, DIRECTORY, Mode::empty(), resolve)
    }

    /// Resolves component by component, links within the tree.
    fn follow(&mut self, path: &[u8], make: bool) -> Result<Directory> {
        let mut stack = vec![(Vec::new(), self.root.clone())];
        let mut left: VecDeque<Vec<u8>> = components(path);
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            let (above, parent) = match stack.last() {
                Some((above, parent)) => (above.clone(), parent.clone()),
                None => (Vec::new(), self.root.clone()),
            };
            if name == b".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let here = join(&above, &name);
            if here.len() > MAX_PATH {
                return Err(refuse(path, "leads through links to a path that is too long"));
            }
            let stat = lstat(&parent, &name).map_err(|e| self.failed("examine", &here, e))?;
            match stat.as_ref().map(file_type) {
                Some(FileType::Directory) => {}
                Some(FileType::Symlink) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(refuse(path, "leads through too many symbolic links"));
                    }
                    let target = fs::readlinkat(&parent, &name[..], Vec::new());
                    let target = target.map_err(|e| self.failed("read link", &here, e))?.into_bytes();
                    if target.starts_with(b"/") {
                        stack.truncate(1);
                    }
                    for component in components(&target).into_iter().rev() {
                        left.push_front(component);
                    }
                    continue;
                }
                None if make => self.imply(&parent, &name, &here)?,
                Some(_) if make && self.is_whiteout(stat.as_ref()) => {
                    fs::unlinkat(&parent, &name[..], AtFlags::empty()).map_err(|e| self.failed("remove", &here, e))?;
                    self.imply(&parent, &name, &here)?;
                    self.hide_lower(&parent, &name, &here)?;
                }
                None => return Err(self.failed("open directory", &here, Errno::NOENT)),
                Some(_) => {
                    let file = here.escape_ascii().to_string();
                    return Err(refuse(path, format!("is below \"{file}\", which is not a directory")));
                }
            }
            let directory = fs::openat(&parent, &name[..], DIRECTORY, Mode::empty());
            stack.push((here.clone(), Rc::new(directory.map_err(|e| self.failed("open directory", &here, e))?)));
        }
        Ok(stack.pop().map_or_else(|| self.root.clone(), |(_, directory)| directory))
    }

    /// Makes a directory that the archive does not describe: root's, 0755, of no time.
    fn imply(&mut self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<()> {
        let made = fs::mkdirat(parent, name, Mode::RWXU)
            .and_then(|()| fs::openat(parent, name, DIRECTORY, Mode::empty()))
            .and_then(|directory| {
                if self.owned {
                    fs::fchown(&directory, Some(Uid::ROOT), Some(Gid::ROOT))?;
                }
                fs::fchmod(&directory, Mode::from_raw_mode(0o755))?;
                fs::fstat(&directory)
            });
        let made = made.map_err(|e| self.failed("make directory", path, e))?;
        self.implied.insert(made.st_ino, path.to_owned());
        self.times.insert(path.to_owned(), (0, 0));
        Ok(())
    }

    /// The top is there before any entry.
    pub(super) fn imply_top(&mut self) -> Result<()> {
        let stat = fs::fstat(&self.root).map_err(|e| self.failed("examine", b"", e))?;
        self.implied.insert(stat.st_ino, Vec::new());
        Ok(())
    }

    /// Notes that an entry describes this directory.
    pub(super) fn describe(&mut self, directory: &OwnedFd, path: &[u8]) -> Result<()> {
        if !self.implied.is_empty() {
            let stat = fs::fstat(directory).map_err(|e| self.failed("examine", path, e))?;
            self.implied.remove(&stat.st_ino);
        }
        Ok(())
    }

    /// Marks a directory as hiding what lower layers have under its name; nothing in an ordinary root.
    pub(super) fn hide_lower(&self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<()> {
        let directory = fs::openat(parent, name, DIRECTORY, Mode::empty());
        self.mark_opaque(&directory.map_err(|e| self.failed("open directory", path, e))?, path)
    }

    pub(super) fn mark_opaque(&self, directory: &OwnedFd, path: &[u8]) -> Result<()> {
        let Some(marks) = self.marks else { return Ok(()) };
        marks.set_opaque(directory).map_err(|e| self.failed("mark as opaque", path, e))
    }

    pub(super) fn is_whiteout(&self, stat: Option<&Stat>) -> bool {
        self.marks.is_some() && stat.is_some_and(|s| file_type(s) == FileType::CharacterDevice && s.st_rdev == 0)
    }

    /// Removes whatever has this name, with all that is in it.
    pub(super) fn remove(&mut self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<()> {
        // Descriptors kept for speed could be of what goes now.
        self.last = None;
        remove(parent, name, 0).map_err(|e| self.failed("remove", path, e))?;
        self.times.remove(path);
        let below = [path, b"/"].concat()..[path, b"0"].concat(); // "0" is what comes after "/"
        let gone: Vec<_> = self.times.range(below).map(|(path, _)| path.clone()).collect();
        for path in gone {
            self.times.remove(&path);
        }
        Ok(())
    }

    pub(super) fn set_time_later(&mut self, path: &[u8], mtime: (i64, u32)) {
        self.times.insert(path.to_owned(), mtime);
    }

    /// Gives directories their times, the innermost first. Returns the directories that no entry describes, in order.
    pub(super) fn settle(mut self) -> Result<Vec<PathBuf>> {
        for (path, mtime) in std::mem::take(&mut self.times).into_iter().rev() {
            let (above, name) = split(&path);
            let Some(parent) = self.existing(above)? else { continue };
            if name.is_empty() {
                fs::futimens(&parent, &timestamps(mtime)).map_err(|e| self.failed("set the time of", &path, e))?;
                continue;
            }
            // What took the place of a directory through another name has its own time.
            let stat = lstat(&parent, name).map_err(|e| self.failed("examine", &path, e))?;
            if stat.as_ref().map(file_type) == Some(FileType::Directory) {
                fs::utimensat(&parent, name, &timestamps(mtime), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| self.failed("set the time of", &path, e))?;
            }
        }
        let there = |inode: u64, path: &[u8]| {
            // Whatever took its place is another thing.
            path.is_empty() || self.beneath(path).and_then(fs::fstat).is_ok_and(|stat| stat.st_ino == inode)
        };
        let implied = self.implied.iter().filter(|(inode, path)| there(**inode, path));
        let mut implied: Vec<PathBuf> = implied.map(|(_, path)| walk::as_path(path).to_owned()).collect();
        implied.sort();
        Ok(implied)
    }
}

fn remove(parent: &OwnedFd, name: &[u8], depth: usize) -> rustix::io::Result<()> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        other => return other,
    }
    if depth == MAX_REMOVED_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    let directory = fs::openat(parent, name, DIRECTORY, Mode::empty())?;
    for inner in walk::names(directory.as_fd())? {
        remove(&directory, inner.to_bytes(), depth + 1)?;
    }
    fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// What has this name, itself, if anything has.
pub(super) fn lstat(parent: &OwnedFd, name: &[u8]) -> rustix::io::Result<Option<Stat>> {
    match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode as RawMode)
}

pub(super) fn create_file(parent: &OwnedFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
}

pub(super) fn timestamps((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn components(path: &[u8]) -> VecDeque<Vec<u8>> {
    let meaningful = |component: &&[u8]| !component.is_empty() && *component != b".";
    path.split(|byte| *byte == b'/').filter(meaningful).map(<[u8]>::to_vec).collect()
}

/// A path as it is resolved: relative to the top, without empty components; ".." is refused.
pub(super) fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let components = Vec::from(components(path));
    if components.iter().any(|component| component == b"..") {
        return Err(refuse(path, "has \"..\" in its path"));
    }
    let clean = components.join(&b'/');
    match clean.len() > MAX_PATH {
        true => Err(refuse(&clean[..100], format!("has a path of more than {MAX_PATH} bytes"))),
        false => Ok(clean),
    }
}

pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// The directory, without a slash, and the name.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}
