//! Locks between processes, and between threads of one: flock(2) on files of their own.
//!
//! A lock belongs to an open file description, so two locks taken by one process exclude each other as well,
//! and the kernel frees them when their holder dies. A [`KeyLock`]'s file is removed by its holder, under the
//! lock; whoever waited on the removed file sees that it has no name any more and starts over. `locks/`
//! therefore holds only what is locked now, and what a killed holder left for the next one to take.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::{Context, Digest, Result};

/// flock that starts over when a signal interrupts it.
pub(crate) fn flock(file: impl AsFd, operation: FlockOperation) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::fs::flock(&file, operation))
}

/// Whether it could be had without waiting.
pub(crate) fn try_exclusive(file: impl AsFd) -> rustix::io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A file for its owner alone, made if it is missing.
pub(crate) fn open_private(path: &Path) -> Result<File> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .context("open", path)
}

/// Whether the file still has a name: a lock on one that has none holds nobody off.
pub(crate) fn is_linked(file: &File) -> rustix::io::Result<bool> {
    Ok(rustix::fs::fstat(file)?.st_nlink > 0)
}

/// An exclusive lock on a key, freed on drop.
#[derive(Debug)]
pub struct KeyLock {
    path: PathBuf,
    _file: File,
}

impl KeyLock {
    pub(crate) fn wait(root: &Path, key: &str) -> Result<KeyLock> {
        let path = path_of(root, key);
        loop {
            let file = open_private(&path)?;
            flock(&file, FlockOperation::LockExclusive).context("lock", &path)?;
            if is_linked(&file).context("look at", &path)? {
                return Ok(KeyLock { path, _file: file });
            }
        }
    }

    pub(crate) fn attempt(root: &Path, key: &str) -> Result<Option<KeyLock>> {
        let path = path_of(root, key);
        loop {
            let file = open_private(&path)?;
            if !try_exclusive(&file).context("lock", &path)? {
                return Ok(None);
            }
            if is_linked(&file).context("look at", &path)? {
                return Ok(Some(KeyLock { path, _file: file }));
            }
        }
    }
}

fn path_of(root: &Path, key: &str) -> PathBuf {
    root.join("locks").join(Digest::of(key).hex())
}

impl Drop for KeyLock {
    fn drop(&mut self) {
        // Left behind, the file is taken by the next who wants the key.
        drop(fs::remove_file(&self.path));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use crate::Store;

    #[test]
    fn one_at_a_time_across_handles() {
        let directory = tempfile::tempdir().unwrap();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let store = Store::open(directory.path()).unwrap();
                    for _ in 0..200 {
                        let lock = store.lock_key("key").unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(directory.path().join("locks")).unwrap().count(), 0);
    }

    #[test]
    fn trying_does_not_wait() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let held = store.lock_key("a").unwrap();
        assert!(store.try_lock_key("a").unwrap().is_none());
        assert!(store.try_lock_key("b").unwrap().is_some());
        drop(held);
        assert!(store.try_lock_key("a").unwrap().is_some());
    }
}
