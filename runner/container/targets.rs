//! Places in a root that things are mounted at: found without ever leaving the root, made where they are missing, and
//! taken away again so that a run which changes nothing leaves nothing.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, fstat, futimens, mkdirat, openat, openat2,
    readlinkat, unlinkat,
};
use rustix::io::Errno;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
}

/// What was made in a root, in the order in which it was made.
#[derive(Default)]
pub struct Made(Vec<Entry>);

struct Entry {
    parent: OwnedFd,
    name: OsString,
    kind: Kind,
    /// The parent's times before the entry was made.
    before: Timestamps,
    /// The parent's modification time right after: if it is another by the end, the run wrote there too.
    after: (i64, u64),
}

/// Symbolic links that lead to a missing target are followed this often, as the kernel does.
const LINKS: usize = 40;

/// `path` inside `root`, absolute links and `..` included.
pub fn find(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<OwnedFd> {
    // A path component that is renamed meanwhile makes the kernel answer EAGAIN.
    loop {
        match openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), IN_ROOT) {
            Err(Errno::AGAIN) => {}
            Ok(found) => return Ok(found),
            Err(error) => return Err(error),
        }
    }
}

const IN_ROOT: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// As [`find`]; what is missing on the way is made and noted in `made`.
pub fn find_or_make(root: BorrowedFd<'_>, path: &Path, kind: Kind, made: &mut Made) -> rustix::io::Result<OwnedFd> {
    reach(root, path, kind, made, LINKS)
}

fn reach(root: BorrowedFd<'_>, path: &Path, kind: Kind, made: &mut Made, links: usize) -> rustix::io::Result<OwnedFd> {
    match find(root, path) {
        Err(Errno::NOENT) if links > 0 => {}
        other => return other,
    }
    let (Some(parent_path), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::NOENT) };
    let parent = reach(root, parent_path, Kind::Directory, made, links - 1)?;
    match made.make(&parent, name, kind) {
        Ok(()) => openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()),
        // A link whose target is missing: make the target.
        Err(Errno::EXIST) => {
            let link = readlinkat(&parent, name, Vec::new())?;
            let target = parent_path.join(Path::new(OsStr::from_bytes(link.as_bytes())));
            reach(root, &target, kind, made, links - 1)
        }
        Err(error) => Err(error),
    }
}

impl Made {
    fn make(&mut self, parent: &OwnedFd, name: &OsStr, kind: Kind) -> rustix::io::Result<()> {
        let parent = openat(parent, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let stat = fstat(&parent)?;
        match kind {
            Kind::Directory => mkdirat(&parent, name, Mode::from_raw_mode(0o755))?,
            Kind::File => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                drop(openat(&parent, name, flags, Mode::from_raw_mode(0o644))?);
            }
        }
        let after = modified(&parent)?;
        let before = Timestamps {
            last_access: Timespec { tv_sec: stat.st_atime as i64, tv_nsec: stat.st_atime_nsec as _ },
            last_modification: Timespec { tv_sec: stat.st_mtime as i64, tv_nsec: stat.st_mtime_nsec as _ },
        };
        self.0.push(Entry { parent, name: name.to_owned(), kind, before, after });
        Ok(())
    }

    /// Takes away what was made and is still empty; gives directories the times back that they had. Tells what went wrong.
    pub fn remove(self) -> Vec<String> {
        self.0.into_iter().rev().filter_map(|entry| entry.remove().err()).collect()
    }
}

impl Entry {
    fn remove(self) -> Result<(), String> {
        let untouched = modified(&self.parent).is_ok_and(|now| now == self.after);
        let flags = if self.kind == Kind::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match unlinkat(&self.parent, &self.name, flags) {
            Ok(()) if untouched => futimens(&self.parent, &self.before).map_err(|error| self.failure(error)),
            // The run put something there, or took it away: it is the run's own now.
            Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failure(error)),
        }
    }

    fn failure(&self, error: Errno) -> String {
        format!("remove mount point {:?}: {}", self.name, io::Error::from(error))
    }
}

fn modified(directory: &OwnedFd) -> rustix::io::Result<(i64, u64)> {
    let stat = fstat(directory)?;
    Ok((stat.st_mtime as i64, stat.st_mtime_nsec as u64))
}

/// Makes all that `targets` (absolute paths) need in `root` before anything is mounted there. A target below another one is
/// left alone: it will be looked for in what is mounted there.
pub fn prepare(root: &Path, targets: &[(PathBuf, Kind)]) -> Result<(OwnedFd, Made), (PathBuf, io::Error)> {
    let directory = File::open(root).map_err(|error| (root.to_owned(), error))?;
    let mut made = Made::default();
    for (index, (target, kind)) in targets.iter().enumerate() {
        let covered = targets[..index].iter().any(|(earlier, _)| target != earlier && target.starts_with(earlier));
        if covered {
            continue;
        }
        if let Err(error) = find_or_make(directory.as_fd(), target, *kind, &mut made) {
            let left = made.remove();
            let error = io::Error::from(error);
            let error =
                if left.is_empty() { error } else { io::Error::new(error.kind(), format!("{error}; {left:?}")) };
            return Err((target.clone(), error));
        }
    }
    Ok((directory.into(), made))
}

/// Whether `found` is a directory itself.
pub fn is_directory(found: &OwnedFd) -> rustix::io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(found)?.st_mode) == FileType::Directory)
}
