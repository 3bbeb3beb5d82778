//! A session: one process's use of the store, from its first write to its end.
//!
//! ```text
//! active/<session>.lock    flocked while the session lives; its text says since when blobs are in use
//! active/<session>/<n>     everything that is in the making
//! trash/<name>             what is to be deleted
//! ```
//! Who can lock another session's file has met a crash, and may take what that left: it is renamed into
//! `trash`, which costs the same whatever its size, and deleted by a thread that nobody waits for.
//! GC spares what living sessions use: snapshots by rows in `pins`, blobs by age (see `gc`).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::mount::UnmountFlags;

use crate::{Context, Result, create_directory, lock};

/// Seconds and nanoseconds of a file's time, as the kernel keeps it.
pub(crate) type FileTime = (i64, i64);

pub(crate) struct Session {
    root: PathBuf,
    state: Mutex<Option<Started>>,
    counter: AtomicU64,
    pinned: AtomicBool,
}

struct Started {
    name: String,
    lock: File,
    blobs_since: Option<FileTime>,
}

/// A name that no other process and no other call gives: for directory entries, not for secrets.
pub(crate) fn unique_name() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{now:x}-{:x}-{:x}", std::process::id(), CALLS.fetch_add(1, Ordering::Relaxed))
}

/// A poisoned mutex guards plain data that every writer leaves whole.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    pub(crate) fn new(root: &Path) -> Session {
        Session {
            root: root.to_owned(),
            state: Mutex::new(None),
            counter: AtomicU64::new(0),
            pinned: AtomicBool::new(false),
        }
    }

    /// The name under which pins are kept, and remembers that there are some.
    pub(crate) fn pin_name(&self) -> Result<String> {
        self.pinned.store(true, Ordering::Relaxed);
        self.with(|started| Ok(started.name.clone()))
    }

    /// The session's name if it has pinned anything.
    pub(crate) fn pinned(&self) -> Option<String> {
        let pinned = self.pinned.load(Ordering::Relaxed);
        locked(&self.state).as_ref().filter(|_| pinned).map(|started| started.name.clone())
    }

    /// A path for something in the making, on the store's file system; nothing is there yet.
    pub(crate) fn fresh_path(&self) -> Result<PathBuf> {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        self.with(|started| Ok(self.root.join("active").join(&started.name).join(number.to_string())))
    }

    /// Says that this session uses blobs from now on, which makes GC spare what has been touched since.
    pub(crate) fn hold_blobs(&self) -> Result<FileTime> {
        let active = self.root.join("active");
        self.with(|started| {
            if let Some(since) = started.blobs_since {
                return Ok(since);
            }
            started.lock.write_all(b"blobs\n").context("write in", &active)?;
            let since = modified(&started.lock.metadata().context("look at", &active)?);
            started.blobs_since = Some(since);
            Ok(since)
        })
    }

    /// Moves a directory or file out of sight; [`empty_trash`] deletes it. Nothing there is fine.
    pub(crate) fn discard(&self, path: &Path) -> Result<()> {
        discard(&self.root, path)
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut Started) -> Result<T>) -> Result<T> {
        let mut state = locked(&self.state);
        let started = match &mut *state {
            Some(started) => started,
            none => none.insert(start(&self.root)?),
        };
        use_it(started)
    }
}

fn start(root: &Path) -> Result<Started> {
    let (name, lock) = loop {
        let name = unique_name();
        let path = root.join("active").join(format!("{name}.lock"));
        let file = lock::open_private(&path)?;
        // Between the two calls a sweeper may have taken the file for a dead session's.
        let ours = lock::try_exclusive(&file).context("lock", &path)?;
        if ours && lock::is_linked(&file).context("look at", &path)? {
            break (name, file);
        }
    };
    create_directory(&root.join("active").join(&name))?;
    sweep(root)?;
    empty_trash_in_background(root)?;
    Ok(Started { name, lock, blobs_since: None })
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(started) = locked(&self.state).take() else { return };
        let active = self.root.join("active");
        let directory = active.join(&started.name);
        // What cannot be removed now is taken by the next sweep, once the lock is gone with this process.
        if fs::remove_dir(&directory).is_ok() || discard(&self.root, &directory).is_ok() {
            drop(fs::remove_file(active.join(format!("{}.lock", started.name))));
        }
    }
}

pub(crate) fn modified(metadata: &fs::Metadata) -> FileTime {
    (metadata.mtime(), metadata.mtime_nsec())
}

pub(crate) fn discard(root: &Path, path: &Path) -> Result<()> {
    match fs::rename(path, root.join("trash").join(unique_name())) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.context("remove", path),
    }
}

/// The sessions that live, and since when each uses blobs.
pub(crate) fn living(root: &Path) -> Result<Vec<(String, Option<FileTime>)>> {
    let mut living = Vec::new();
    for (name, path) in lock_files(root)? {
        let Some(file) = open_existing(&path)? else { continue };
        if lock::try_exclusive(&file).context("lock", &path)? {
            continue;
        }
        let metadata = file.metadata().context("look at", &path)?;
        living.push((name, (metadata.len() > 0).then(|| modified(&metadata))));
    }
    Ok(living)
}

fn lock_files(root: &Path) -> Result<Vec<(String, PathBuf)>> {
    let active = root.join("active");
    let mut found = Vec::new();
    for entry in fs::read_dir(&active).context("read", &active)? {
        let entry = entry.context("read", &active)?;
        let name = entry.file_name();
        if let Some(session) = name.to_str().and_then(|name| name.strip_suffix(".lock")) {
            found.push((session.to_owned(), entry.path()));
        }
    }
    Ok(found)
}

fn open_existing(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("open", path),
    }
}

/// Moves what dead sessions left to the trash: one rename each.
pub(crate) fn sweep(root: &Path) -> Result<()> {
    for (name, path) in lock_files(root)? {
        let Some(file) = open_existing(&path)? else { continue };
        if !lock::try_exclusive(&file).context("lock", &path)? {
            continue;
        }
        let directory = root.join("active").join(&name);
        unmount_leftovers(&directory);
        discard(root, &directory)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.context("remove", &path)?,
        }
    }
    Ok(())
}

/// Mounts die with the mount namespace of the process that made them. Where it had none of its own they
/// are still there, and deleting would go through them.
fn unmount_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        // Most are no mounts, which is what the error says.
        rustix::mount::unmount(entry.path().join("root"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).ok();
    }
}

pub(crate) fn empty_trash_in_background(root: &Path) -> Result<()> {
    let trash = root.join("trash");
    if fs::read_dir(&trash).context("read", &trash)?.next().is_none() {
        return Ok(());
    }
    let root = root.to_owned();
    // What it does not get done, for want of time or of a right, the next one tries again.
    drop(std::thread::Builder::new().name("trash".to_owned()).spawn(move || drop(empty_trash(&root))));
    Ok(())
}

/// Deletes what is in the trash. Several may do so at once.
pub(crate) fn empty_trash(root: &Path) -> Result<()> {
    let trash = root.join("trash");
    for entry in fs::read_dir(&trash).context("read", &trash)? {
        let path = entry.context("read", &trash)?.path();
        match remove(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.context("remove", &path)?,
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

/// A fresh directory for something in the making. Removed on drop.
pub struct IngestDir {
    path: PathBuf,
    session: Arc<Session>,
}

impl IngestDir {
    pub(crate) fn new(session: &Arc<Session>) -> Result<IngestDir> {
        let path = session.fresh_path()?;
        create_directory(&path)?;
        Ok(IngestDir { path, session: session.clone() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for IngestDir {
    fn drop(&mut self) {
        if fs::remove_dir(&self.path).is_ok() {
            return;
        }
        let removed = fs::remove_dir_all(&self.path);
        if removed.is_err() {
            // Whatever is in the way goes with the trash, or with the session.
            drop(self.session.discard(&self.path));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    fn entries(path: &Path) -> usize {
        fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn an_ended_session_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let ingest = store.ingest().unwrap();
        fs::write(ingest.path().join("file"), "x").unwrap();
        drop(ingest);
        drop(store);
        assert_eq!(entries(&directory.path().join("active")), 0);
    }

    #[test]
    fn a_dead_session_is_swept_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let living = Store::open(directory.path()).unwrap();
        let ingest = living.ingest().unwrap();
        let active = directory.path().join("active");
        fs::create_dir_all(active.join("dead/0/fs")).unwrap();
        fs::write(active.join("dead.lock"), "").unwrap();

        let next = Store::open(directory.path()).unwrap();
        let other = next.ingest().unwrap();
        assert!(!active.join("dead").exists() && !active.join("dead.lock").exists());
        assert!(ingest.path().exists() && other.path().exists());
        empty_trash(directory.path()).unwrap();
        assert_eq!(entries(&directory.path().join("trash")), 0);
    }
}
