//! Copies a directory tree as it is: owners, modes, times, extended attributes, hard links, symbolic links, devices.
//!
//! Every step goes by descriptors and follows no symbolic link, so the copy neither reads nor writes outside the two
//! directories, whatever the tree holds.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod, fchown,
    fgetxattr, flistxattr, fsetxattr, futimens, linkat, mkdirat, mknodat, openat, readlinkat, statat, symlinkat,
    utimensat,
};
use rustix::io::Errno;

/// A tree that is deeper was made to hurt: every level is an open descriptor here.
const DEPTH_LIMIT: usize = 512;
/// The kernel's limits for one attribute's value and for a list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_BYTES: usize = 64 * 1024;

/// What was copied, and what could not be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    pub entries: u64,
    /// Owners that this user namespace has no number for; the copy belongs to us.
    pub unmapped_owners: u64,
    /// Sockets mean nothing without the process behind them.
    pub sockets: u64,
}

/// A failure, and the path below the tree's root where it happened.
#[derive(Debug, thiserror::Error)]
#[error("copy {}: {source}", path.display())]
pub struct CopyError {
    pub path: PathBuf,
    pub source: io::Error,
}

/// Copies what is in `from`, and its own attributes, into the empty directory `into`.
pub fn copy_tree(from: &Path, into: &Path) -> Result<Copied, CopyError> {
    let mut tree = Tree { path: PathBuf::new(), depth: 0, links: HashMap::new(), copied: Copied::default() };
    let root = |path: &Path| {
        rustix::fs::open(path, DIRECTORY, Mode::empty())
            .map_err(|errno| CopyError { path: path.to_owned(), source: errno.into() })
    };
    let (source, target) = (root(from)?, root(into)?);
    tree.directory(&source, &target, &target).map_err(|source| CopyError { path: from.join(&tree.path), source })?;
    Ok(tree.copied)
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

struct Tree {
    /// Where we are, below the root. After a failure: where it was.
    path: PathBuf,
    depth: usize,
    /// The first copy of every file that has several names, below the root.
    links: HashMap<(u64, u64), PathBuf>,
    copied: Copied,
}

impl Tree {
    fn directory(&mut self, source: &OwnedFd, target: &OwnedFd, root: &OwnedFd) -> io::Result<()> {
        if self.depth == DEPTH_LIMIT {
            return Err(io::Error::other(format!("more than {DEPTH_LIMIT} directories inside each other")));
        }
        self.depth += 1;
        for entry in Dir::read_from(source)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.path.push(OsStr::from_bytes(name.to_bytes()));
            self.entry(source, target, root, name)?;
            self.path.pop();
        }
        self.depth -= 1;
        let stat = rustix::fs::fstat(source)?;
        self.attributes(source.as_fd(), target.as_fd(), &stat)
    }

    fn entry(&mut self, source: &OwnedFd, target: &OwnedFd, root: &OwnedFd, name: &CStr) -> io::Result<()> {
        let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if !matches!(kind, FileType::Directory | FileType::Socket) && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                return Ok(linkat(root, first, target, name, AtFlags::empty())?);
            }
            self.links.insert((stat.st_dev, stat.st_ino), self.path.clone());
        }
        self.copied.entries += 1;
        match kind {
            FileType::Directory => {
                mkdirat(target, name, Mode::RWXU)?;
                let inner = openat(source, name, DIRECTORY, Mode::empty())?;
                self.directory(&inner, &openat(target, name, DIRECTORY, Mode::empty())?, root)
            }
            FileType::RegularFile => self.file(source, target, name, &stat),
            FileType::Symlink => {
                symlinkat(readlinkat(source, name, Vec::new())?, target, name)?;
                self.nameless_attributes(target, name, &stat)
            }
            FileType::Socket => {
                self.copied.entries -= 1;
                self.copied.sockets += 1;
                Ok(())
            }
            special => {
                mknodat(target, name, special, Mode::from_raw_mode(stat.st_mode), stat.st_rdev)?;
                self.nameless_attributes(target, name, &stat)?;
                // Only now: changing the owner takes set-id bits away, and umask has its say before.
                Ok(rustix::fs::chmodat(target, name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?)
            }
        }
    }

    fn file(&mut self, source: &OwnedFd, target: &OwnedFd, name: &CStr, stat: &Stat) -> io::Result<()> {
        let reading = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut from = File::from(openat(source, name, reading, Mode::empty())?);
        let writing = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut into = File::from(openat(target, name, writing, Mode::RUSR | Mode::WUSR)?);
        io::copy(&mut from, &mut into)?;
        self.attributes(from.as_fd(), into.as_fd(), stat)
    }

    /// In this order: a new owner takes set-id bits and capabilities away, and times come last.
    fn attributes(&mut self, from: BorrowedFd<'_>, into: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
        self.owner(fchown(into, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid))))?;
        fchmod(into, Mode::from_raw_mode(stat.st_mode))?;
        for name in xattr_names(from)? {
            copy_xattr(from, into, &name)?;
        }
        Ok(futimens(into, &times(stat))?)
    }

    /// For what cannot be opened without side effects.
    fn nameless_attributes(&mut self, target: &OwnedFd, name: &CStr, stat: &Stat) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        self.owner(chownat(target, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))?;
        Ok(utimensat(target, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn owner(&mut self, changed: Result<(), Errno>) -> io::Result<()> {
        if !is_unmapped(&changed) {
            return Ok(changed?);
        }
        self.copied.unmapped_owners += 1;
        Ok(())
    }
}

/// Whether an owner could not be given because it has no number in our user namespace, or we no right to give.
pub fn is_unmapped(changed: &Result<(), Errno>) -> bool {
    matches!(changed, Err(Errno::INVAL | Errno::PERM))
}

fn times(stat: &Stat) -> Timestamps {
    // The kernel's own numbers of nanoseconds are below a thousand million.
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as _),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as _),
    }
}

fn xattr_names(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut list = vec![0; XATTR_BYTES];
    let length = match flistxattr(file, &mut list[..]) {
        Err(Errno::OPNOTSUPP) => 0,
        listed => listed?,
    };
    Ok(list[..length]
        .split_inclusive(|byte| *byte == 0)
        .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
        .map(CStr::to_owned)
        .collect())
}

/// Attributes that this file system or user may not have (labels of a security module, say) are left out.
fn copy_xattr(from: BorrowedFd<'_>, into: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let mut value = vec![0; XATTR_BYTES];
    let length = match fgetxattr(from, name, &mut value[..]) {
        Err(Errno::NODATA | Errno::PERM | Errno::OPNOTSUPP) => return Ok(()),
        read => read?,
    };
    match fsetxattr(into, name, &value[..length], XattrFlags::empty()) {
        Err(Errno::PERM | Errno::OPNOTSUPP) => Ok(()),
        set => Ok(set?),
    }
}
