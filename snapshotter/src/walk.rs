//! A directory tree in one fixed order: names sorted by bytes, a directory before what it holds.
//!
//! The order is a function of the names alone, so whatever is made of a walk (a layer's tar, a content
//! digest) is one too. Nothing is followed: every step goes through the descriptor of the directory above
//! and refuses symbolic links. The depth of the tree costs neither stack nor descriptors: at most
//! [`OPEN_LEVELS`] directories are open, and those above them are opened again on the way back.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::{Context, Result};

/// How many levels keep their directory open during a walk.
const OPEN_LEVELS: usize = 64;

/// How a directory is opened for reading, never through a symbolic link.
pub(crate) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// One thing that the walk came to.
pub(crate) struct Entry<'a> {
    /// Relative to the root of the walk, without a leading or trailing slash.
    pub path: &'a [u8],
    pub name: &'a CStr,
    /// The directory that `name` is in.
    pub parent: BorrowedFd<'a>,
    pub stat: Stat,
    /// The directory itself, open, where this is one.
    pub directory: Option<BorrowedFd<'a>>,
}

impl Entry<'_> {
    pub fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }
}

/// A directory that the walk is in.
struct Level {
    /// `None` once the walk is so deep below that it was closed.
    directory: Option<OwnedFd>,
    /// Length of this directory's path in the walk's path buffer.
    path_length: usize,
    names: std::vec::IntoIter<CString>,
}

/// Visits everything below `root` (not `root` itself). The first error ends the walk.
pub(crate) fn walk(root: &Path, mut visit: impl FnMut(&Entry) -> Result<()>) -> Result<()> {
    let top = fs::open(root, DIRECTORY, Mode::empty()).context("open directory", root)?;
    let names = sorted_names(top.as_fd()).context("read directory", root)?;
    let mut levels = vec![Level { directory: Some(top), path_length: 0, names }];
    let mut path = Vec::new();
    while let Some(level) = levels.last_mut() {
        path.truncate(level.path_length);
        let Some(name) = level.names.next() else {
            levels.pop();
            continue;
        };
        let parent = match level.directory.take() {
            Some(parent) => parent,
            None => reopen(root, &path)?,
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.to_bytes());
        let below = step(root, &path, &name, parent.as_fd(), &mut visit)?;
        level.directory = Some(parent);
        if let Some(below) = below {
            levels.push(below);
            if let Some(far) = levels.len().checked_sub(OPEN_LEVELS + 1) {
                levels[far].directory = None;
            }
        }
    }
    Ok(())
}

/// Visits `name`; gives the level to go on with where it is a directory.
fn step(
    root: &Path,
    path: &[u8],
    name: &CStr,
    parent: BorrowedFd<'_>,
    visit: &mut impl FnMut(&Entry) -> Result<()>,
) -> Result<Option<Level>> {
    let full = || root.join(as_path(path));
    let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| located("examine", full(), e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        visit(&Entry { path, name, parent, stat, directory: None })?;
        return Ok(None);
    }
    let directory =
        fs::openat(parent, name, DIRECTORY, Mode::empty()).map_err(|e| located("open directory", full(), e))?;
    visit(&Entry { path, name, parent, stat, directory: Some(directory.as_fd()) })?;
    let names = sorted_names(directory.as_fd()).map_err(|e| located("read directory", full(), e))?;
    Ok(Some(Level { directory: Some(directory), path_length: path.len(), names }))
}

/// Opens a directory of the tree again from the top.
fn reopen(root: &Path, path: &[u8]) -> Result<OwnedFd> {
    let top = fs::open(root, DIRECTORY, Mode::empty()).context("open directory", root)?;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let name = if path.is_empty() { b"." } else { path };
    fs::openat2(top, name, DIRECTORY, Mode::empty(), beneath)
        .map_err(|errno| located("open directory", root.join(as_path(path)), errno))
}

fn located(action: &'static str, path: PathBuf, errno: Errno) -> crate::Error {
    crate::Error::Io { action, path, source: errno.into() }
}

fn sorted_names(directory: BorrowedFd<'_>) -> rustix::io::Result<std::vec::IntoIter<CString>> {
    let mut names = names(directory)?;
    names.sort_unstable();
    Ok(names.into_iter())
}

/// The names in a directory, in the file system's order, without "." and "..".
pub(crate) fn names(directory: BorrowedFd<'_>) -> rustix::io::Result<Vec<CString>> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 8192];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Bytes that the kernel gave as a name, as a path.
pub(crate) fn as_path(bytes: &[u8]) -> &Path {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(root: &Path) -> Vec<String> {
        let mut seen = Vec::new();
        walk(root, |entry| {
            seen.push(String::from_utf8_lossy(entry.path).into_owned());
            Ok(())
        })
        .unwrap();
        seen
    }

    #[test]
    fn order_is_by_bytes_and_directories_come_before_what_they_hold() {
        let root = tempfile::tempdir().unwrap();
        for directory in ["b/z", "b/a", "a", "a-b", "empty"] {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        for file in ["b/m", "a/1", "a.txt", "Z"] {
            std::fs::write(root.path().join(file), "").unwrap();
        }
        std::os::unix::fs::symlink("b", root.path().join("link")).unwrap();
        let expect = ["Z", "a", "a/1", "a-b", "a.txt", "b", "b/a", "b/m", "b/z", "empty", "link"];
        assert_eq!(paths(root.path()), expect);
    }

    #[test]
    fn a_deep_tree_is_walked_to_its_end_and_back() {
        let root = tempfile::tempdir().unwrap();
        let mut deep = root.path().to_owned();
        for _ in 0..300 {
            deep.push("d");
        }
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("file"), "").unwrap();
        std::fs::write(root.path().join("d/last"), "").unwrap();
        std::fs::write(root.path().join("end"), "").unwrap();
        let seen = paths(root.path());
        assert_eq!(seen.len(), 303);
        assert_eq!(&seen[301..], ["d/last", "end"]);
    }
}
