//! Directories that the kernel copied up and nobody changed.
//!
//! Making a mount point in `/etc` and taking it away again leaves an empty `etc` in the upper directory. It changes
//! nothing, but it would make a layer of a step that did nothing. So directories of the upper that are empty, hide
//! nothing, and say what the directory below them says are removed, innermost first.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, utimensat};

use super::Driver;
use crate::snapshot::below::Stack;
use crate::snapshot::shelf::{attribute, attribute_names};
use crate::{Context, Result};

/// Removes them from `upper`, an overlay's upper directory that is no longer mounted; `lowers` come top first.
pub(super) fn remove(upper: &Path, lowers: &[PathBuf], driver: Driver) -> Result<()> {
    let tree = Tree { upper, lowers: Stack { layers: lowers, driver }, driver };
    for (path, before) in tree.directories()?.into_iter().rev() {
        if tree.is_untouched(&path, &before)? {
            let full = upper.join(&path);
            fs::remove_dir(&full).context("remove directory", &full)?;
        } else {
            tree.restore_time(&path, &before)?;
        }
    }
    Ok(())
}

struct Tree<'a> {
    upper: &'a Path,
    lowers: Stack<'a>,
    driver: Driver,
}

impl Tree<'_> {
    /// Every directory below the top as it is now, outer ones before inner ones.
    fn directories(&self) -> Result<Vec<(PathBuf, Metadata)>> {
        let mut found: Vec<(PathBuf, Metadata)> = Vec::new();
        let mut next = 0;
        let mut path = PathBuf::new();
        loop {
            let full = self.upper.join(&path);
            for entry in fs::read_dir(&full).context("read directory", &full)? {
                let entry = entry.context("read directory", &full)?;
                if entry.file_type().context("examine", &full)?.is_dir() {
                    found.push((path.join(entry.file_name()), entry.metadata().context("examine", &full)?));
                }
            }
            match found.get(next) {
                Some((inner, _)) => path = inner.clone(),
                None => return Ok(found),
            }
            next += 1;
        }
    }

    fn is_untouched(&self, path: &Path, before: &Metadata) -> Result<bool> {
        let full = self.upper.join(path);
        let upper = File::open(&full).context("open directory", &full)?;
        if fs::read_dir(&full).context("read directory", &full)?.next().is_some()
            || self.driver.is_opaque(&upper).context("read attributes of", &full)?
        {
            return Ok(false);
        }
        let Some(below) = self.lowers.directory(path)? else { return Ok(false) };
        let metadata = below.metadata().context("examine", path)?;
        let said = |metadata: &Metadata| {
            (metadata.mode(), metadata.uid(), metadata.gid(), metadata.mtime(), metadata.mtime_nsec())
        };
        if said(&metadata) != said(before) {
            return Ok(false);
        }
        let attributes = |file| attributes(file).context("read attributes of", &full);
        Ok(attributes(&upper)? == attributes(&below)?)
    }

    /// Removing an inner directory changed the time of its outer one.
    fn restore_time(&self, path: &Path, before: &Metadata) -> Result<()> {
        let full = self.upper.join(path);
        let now = fs::symlink_metadata(&full).context("examine", &full)?;
        if (now.mtime(), now.mtime_nsec()) == (before.mtime(), before.mtime_nsec()) {
            return Ok(());
        }
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: before.mtime(), tv_nsec: before.mtime_nsec() },
        };
        utimensat(CWD, &full, &times, AtFlags::SYMLINK_NOFOLLOW).context("set the time of", &full)
    }
}

/// Extended attributes but for overlay's own, which are bookkeeping of the copy.
fn attributes(file: &File) -> io::Result<BTreeMap<CString, Vec<u8>>> {
    let names = attribute_names(|list| rustix::fs::flistxattr(file, list))?;
    let value = |name: &CString| attribute(|value| rustix::fs::fgetxattr(file, &**name, value));
    names.into_iter().map(|name| value(&name).map(|value| (name, value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path, seconds: u64) {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        fs::File::open(path).and_then(|file| file.set_modified(time)).unwrap();
    }

    /// A lower with `etc` and `etc/deep`, an upper with the same and what `change` does to it; what is left of the upper.
    fn check(change: impl Fn(&Path), expect: &[&str]) {
        let place = tempfile::tempdir().unwrap();
        let (upper, lower) = (place.path().join("upper"), place.path().join("lower"));
        for tree in [&upper, &lower] {
            fs::create_dir_all(tree.join("etc/deep")).unwrap();
            touch(&tree.join("etc/deep"), 7);
            touch(&tree.join("etc"), 5);
        }
        change(&upper);
        let silent = place.path().join("silent");
        fs::create_dir(&silent).unwrap();
        remove(&upper, &[silent, lower], Driver::OverlayUser).unwrap();
        let mut left = Vec::new();
        crate::walk::walk(&upper, |entry| {
            left.push(String::from_utf8_lossy(entry.path).into_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(left, expect);
    }

    #[test]
    fn only_what_says_the_same_as_below_goes() {
        check(|_| (), &[]);
        check(|upper| fs::write(upper.join("etc/new"), "").unwrap(), &["etc", "etc/new"]);
        check(|upper| touch(&upper.join("etc"), 6), &["etc"]);
        check(|upper| touch(&upper.join("etc/deep"), 6), &["etc", "etc/deep"]);
        check(|upper| fs::create_dir(upper.join("other")).unwrap(), &["other"]);
        let opaque = |upper: &Path| {
            let set = rustix::fs::setxattr(
                upper.join("etc/deep"),
                "user.overlay.opaque",
                b"y",
                rustix::fs::XattrFlags::empty(),
            );
            set.unwrap();
        };
        check(opaque, &["etc", "etc/deep"]);
    }

    #[test]
    fn an_outer_directory_keeps_its_time() {
        let place = tempfile::tempdir().unwrap();
        let (upper, lower) = (place.path().join("upper"), place.path().join("lower"));
        for tree in [&upper, &lower] {
            fs::create_dir_all(tree.join("etc/deep")).unwrap();
            touch(&tree.join("etc/deep"), 7);
        }
        touch(&upper.join("etc"), 9);
        touch(&lower.join("etc"), 5);
        remove(&upper, &[lower], Driver::OverlayUser).unwrap();
        assert!(!upper.join("etc/deep").exists());
        assert_eq!(fs::metadata(upper.join("etc")).unwrap().mtime(), 9);
    }
}
