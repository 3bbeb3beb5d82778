//! Committed snapshots: their rows, their directories, and who uses them. Both drivers stand on this.
//!
//! A directory is renamed to its place inside the transaction that inserts its row, and renamed away in one that
//! sees that the row is gone: the database's write lock orders the two. A crash between rename and commit leaves
//! a directory without a row, which the next commit of that id replaces and GC removes.
//!
//! Whatever this process has been told of is pinned: a row in `pins` for its session keeps [`Shelf::remove`] of
//! other processes away until the session ends. In this process only roots and views in use do.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rusqlite::{OptionalExtension, Transaction, named_params, params};

use super::below::Stack;
use super::{Driver, Info, SnapshotId};
use crate::content::boot_id;
use crate::database::{Database, now};
use crate::session::{self, Session, locked};
use crate::{Context, Digest, Error, Result, create_directory};

/// `used` is written anew when it is older than this: GC's order needs no more.
const USED_RESOLUTION_SECONDS: i64 = 60;

pub(crate) struct Shelf {
    root: PathBuf,
    database: Arc<Database>,
    session: Arc<Session>,
    state: Mutex<State>,
    /// Places whose roots have ended and left them clean.
    spare: Mutex<Vec<PathBuf>>,
}

#[derive(Default)]
struct State {
    /// What never changes of rows seen so far.
    known: HashMap<SnapshotId, Record>,
    /// Roots and views of this process, by the snapshot they stand on.
    uses: HashMap<SnapshotId, usize>,
}

#[derive(Clone)]
struct Record {
    parent: Option<SnapshotId>,
    has_changes: bool,
    size_bytes: u64,
    pinned: bool,
}

/// A root that has ended, ready to become a snapshot.
pub(crate) struct Settled {
    /// What is renamed into the snapshot's directory, and the name it gets there. Empty: it changes nothing.
    pub(crate) parts: Vec<(PathBuf, &'static str)>,
    pub(crate) size_bytes: u64,
}

impl Settled {
    pub(crate) fn nothing() -> Settled {
        Settled { parts: Vec::new(), size_bytes: 0 }
    }
}

/// Keeps a snapshot from being removed by this process; pins do so for the others.
pub(crate) struct Use {
    shelf: Arc<Shelf>,
    id: SnapshotId,
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut state = locked(&self.shelf.state);
        if let Some(count) = state.uses.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                state.uses.remove(&self.id);
            }
        }
    }
}

impl Shelf {
    pub(crate) fn new(root: &Path, database: Arc<Database>, session: Arc<Session>) -> Shelf {
        Shelf { root: root.to_owned(), database, session, state: Mutex::default(), spare: Mutex::default() }
    }

    /// The lower directory of roots that start from nothing.
    pub(crate) fn empty(&self) -> PathBuf {
        self.root.join("empty")
    }

    /// `snapshots/<hex>`, the directory of a snapshot that changes something.
    pub(crate) fn directory(&self, id: &SnapshotId) -> PathBuf {
        directory(&self.root, id)
    }

    /// The snapshot if it is there, pinned from now on.
    pub(crate) fn get(&self, id: &SnapshotId) -> Result<Option<Info>> {
        if *id == SnapshotId::scratch() {
            return Ok(Some(self.info(id, &Record { parent: None, has_changes: false, size_bytes: 0, pinned: true })));
        }
        if let Some(record) = locked(&self.state).known.get(id).filter(|record| record.pinned) {
            return Ok(Some(self.info(id, record)));
        }
        let session = self.session.pin_name()?;
        let record = self.database.try_transaction(|transaction| {
            let record = self.believed(transaction, id)?;
            if record.is_some() {
                pin(transaction, &session, id)?;
                let sql = "UPDATE snapshots SET used = ?2 WHERE id = ?1 AND used < ?2 - ?3";
                transaction.prepare_cached(sql)?.execute(params![id.0.as_str(), now(), USED_RESOLUTION_SECONDS])?;
            }
            Ok(record)
        })?;
        Ok(record.map(|record| {
            let info = self.info(id, &record);
            locked(&self.state).known.insert(id.clone(), record);
            info
        }))
    }

    /// The row, unless it is of no worth: of another boot and not settled, or its directory is gone.
    fn believed(&self, transaction: &Transaction, id: &SnapshotId) -> Result<Option<Record>> {
        let sql = "SELECT parent, has_changes, size_bytes FROM snapshots WHERE id = ? AND (boot IS NULL OR boot = ?)";
        let row = transaction
            .prepare_cached(sql)?
            .query_row([id.0.as_str(), boot_id()], |row| {
                Ok((row.get::<_, Option<String>>(0)?, row.get::<_, bool>(1)?, row.get::<_, i64>(2)?))
            })
            .optional()?;
        let Some((parent, has_changes, size)) = row else { return Ok(None) };
        if has_changes && !self.directory(id).join("fs").is_dir() {
            return Ok(None);
        }
        let parent = parent.map(|parent| parse_id(&parent)).transpose()?;
        Ok(Some(Record { parent, has_changes, size_bytes: size.unsigned_abs(), pinned: true }))
    }

    fn info(&self, id: &SnapshotId, record: &Record) -> Info {
        Info {
            id: id.clone(),
            parent: record.parent.clone(),
            changes: record.has_changes.then(|| self.directory(id).join("fs")),
            size_bytes: record.size_bytes,
        }
    }

    /// Counts a root or view on `id` until the guard is dropped.
    pub(crate) fn hold(self: &Arc<Self>, id: &SnapshotId) -> Result<Use> {
        // First the count, so that no thread of ours removes it in between.
        *locked(&self.state).uses.entry(id.clone()).or_default() += 1;
        let held = Use { shelf: self.clone(), id: id.clone() };
        match self.get(id)? {
            Some(_) => Ok(held),
            None => Err(Error::UnknownSnapshot(id.clone())),
        }
    }

    /// The snapshot and those below it, top first, that change something. It is in use, so all of them stay.
    pub(crate) fn stack(&self, id: &SnapshotId) -> Result<Vec<SnapshotId>> {
        let mut stack = Vec::new();
        let mut next = Some(id.clone()).filter(|id| *id != SnapshotId::scratch());
        while let Some(id) = next {
            let record = self.record(&id)?;
            if record.has_changes {
                stack.push(id);
            }
            next = record.parent;
        }
        Ok(stack)
    }

    fn record(&self, id: &SnapshotId) -> Result<Record> {
        if let Some(record) = locked(&self.state).known.get(id) {
            return Ok(record.clone());
        }
        self.learn_chain(id)?;
        locked(&self.state).known.get(id).cloned().ok_or_else(|| Error::UnknownSnapshot(id.clone()))
    }

    /// Reads a snapshot and all below it at once.
    fn learn_chain(&self, id: &SnapshotId) -> Result<()> {
        let sql = "WITH RECURSIVE chain (id, parent, has_changes, size_bytes) AS (
                SELECT id, parent, has_changes, size_bytes FROM snapshots WHERE id = ?
                UNION SELECT s.id, s.parent, s.has_changes, s.size_bytes
                FROM snapshots s JOIN chain ON s.id = chain.parent)
            SELECT id, parent, has_changes, size_bytes FROM chain";
        let rows = self.database.with(|connection| {
            connection
                .prepare_cached(sql)?
                .query_map([id.0.as_str()], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?, row.get(2)?, row.get::<_, i64>(3)?))
                })?
                .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        for (id, parent, has_changes, size) in rows {
            let parent = parent.map(|parent| parse_id(&parent)).transpose()?;
            let record = Record { parent, has_changes, size_bytes: size.unsigned_abs(), pinned: false };
            locked(&self.state).known.entry(parse_id(&id)?).or_insert(record);
        }
        Ok(())
    }

    /// Files, then the row. Where the snapshot is there already, what was settled stays where it is, for its
    /// owner to discard.
    pub(crate) fn publish(&self, id: &SnapshotId, parent: Option<&SnapshotId>, settled: &Settled) -> Result<Info> {
        let scratch = SnapshotId::scratch();
        let parent = parent.filter(|parent| **parent != scratch);
        if let Some(info) = self.get(id)? {
            return Ok(info);
        }
        let session = self.session.pin_name()?;
        let record = self.database.try_transaction(|transaction| {
            let record = match self.believed(transaction, id)? {
                Some(record) => record,
                None => self.insert(transaction, id, parent, settled)?,
            };
            pin(transaction, &session, id)?;
            Ok(record)
        })?;
        let info = self.info(id, &record);
        locked(&self.state).known.insert(id.clone(), record);
        Ok(info)
    }

    fn insert(
        &self,
        transaction: &Transaction,
        id: &SnapshotId,
        parent: Option<&SnapshotId>,
        settled: &Settled,
    ) -> Result<Record> {
        if let Some(parent) = parent
            && self.believed(transaction, parent)?.is_none()
        {
            return Err(Error::UnknownSnapshot(parent.clone()));
        }
        let directory = self.directory(id);
        // A crash between the rename and the row left one that counts for nothing.
        self.session.discard(&directory)?;
        if !settled.parts.is_empty() {
            create_directory(&directory)?;
        }
        for (from, name) in &settled.parts {
            fs::rename(from, directory.join(name)).context("store", &directory)?;
        }
        let sql = "INSERT OR REPLACE INTO snapshots (id, parent, has_changes, size_bytes, created, used, boot)
            VALUES (:id, :parent, :has_changes, :size, :now, :now, :boot)";
        transaction.prepare_cached(sql)?.execute(named_params! {
            ":id": id.0.as_str(),
            ":parent": parent.map(|parent| parent.0.as_str()),
            ":has_changes": !settled.parts.is_empty(),
            ":size": i64::try_from(settled.size_bytes).unwrap_or(i64::MAX),
            ":now": now(),
            ":boot": boot_id(),
        })?;
        Ok(Record {
            parent: parent.cloned(),
            has_changes: !settled.parts.is_empty(),
            size_bytes: settled.size_bytes,
            pinned: true,
        })
    }

    /// See [`Snapshotter::inherit`](super::Snapshotter::inherit).
    pub(crate) fn inherit(
        self: &Arc<Self>,
        driver: Driver,
        parent: &SnapshotId,
        changes: &Path,
        directories: &[PathBuf],
    ) -> Result<()> {
        let _held = self.hold(parent)?;
        let layers: Vec<PathBuf> = self.stack(parent)?.iter().map(|id| self.directory(id).join("fs")).collect();
        let below = Stack { layers: &layers, driver };
        // Inner ones first: an outer one may come to be closed to us.
        for path in directories.iter().rev() {
            if below.is_hidden_by(changes, path)? {
                continue;
            }
            if let Some(from) = below.directory(path)? {
                let full = changes.join(path);
                let to = File::open(&full).context("open", &full)?;
                copy_attributes(&from, &to)
                    .and_then(|()| to.set_modified(from.metadata()?.modified()?))
                    .context("set the attributes of", &full)?;
            }
        }
        Ok(())
    }

    /// Publishes a finished directory, which is consumed also where it was not needed.
    pub(crate) fn adopt(&self, parent: Option<&SnapshotId>, changes: &Path, id: &SnapshotId) -> Result<Info> {
        let settled = match says_nothing(changes)? {
            true => Settled::nothing(),
            false => Settled { parts: vec![(changes.to_owned(), "fs")], size_bytes: disk_usage(changes)? },
        };
        let info = self.publish(id, parent, &settled)?;
        self.session.discard(changes)?;
        Ok(info)
    }

    /// The row, then the files.
    pub(crate) fn remove(&self, id: &SnapshotId) -> Result<()> {
        let refused = |by| Err(Error::SnapshotInUse { id: id.clone(), by });
        let own = self.session.pinned();
        self.database.try_transaction(|transaction| {
            if locked(&self.state).uses.contains_key(id) {
                return refused("a step or container of this process");
            }
            if has_child(transaction, id)? {
                return refused("another snapshot, of which it is the parent");
            }
            let mut others = pinned_by(transaction, id)?;
            others.retain(|by| own.as_ref() != Some(by));
            // Who pinned it was alive then: whether it still is must be asked after the pins are read.
            if !others.is_empty() && session::living(&self.root)?.iter().any(|(name, _)| others.contains(name)) {
                return refused("another forge process");
            }
            delete_rows(transaction, id)
        })?;
        locked(&self.state).known.remove(id);
        discard_unless_listed(&self.root, &self.database, id)
    }
}

/// `active/<session>/<n>`, for one root. What a root leaves clean is used for the next one: a file system takes
/// longer over making and removing directories than over anything else in a step.
pub(crate) struct Place {
    path: PathBuf,
    shelf: Arc<Shelf>,
}

impl Place {
    pub(crate) fn new(shelf: &Arc<Shelf>) -> Result<Place> {
        let spare = locked(&shelf.spare).pop();
        let path = match spare {
            Some(path) => path,
            None => shelf.session.fresh_path()?,
        };
        create_directory(&path)?;
        Ok(Place { path, shelf: shelf.clone() })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// An empty directory in it.
    pub(crate) fn make(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        create_directory(&path)?;
        Ok(path)
    }

    pub(crate) fn discard(&self, name: &str) -> Result<()> {
        self.shelf.session.discard(&self.path.join(name))
    }

    fn clean(&self) -> io::Result<()> {
        // The kernel marks a volatile overlay's work directory, so that nobody takes it up again after a crash.
        let mark = self.path.join("work/work/incompat");
        absent(fs::remove_file(mark.join("volatile/dirty")))?;
        absent(fs::remove_dir(mark.join("volatile")))?;
        absent(fs::remove_dir(mark))?;
        absent(fs::remove_dir(self.path.join("fs")))?;
        match fs::read_dir(self.path.join("root")).map(|mut entries| entries.next().is_none()) {
            Ok(false) => Err(io::ErrorKind::DirectoryNotEmpty.into()),
            result => absent(result.map(drop)),
        }
    }
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.clean().is_ok() {
            return locked(&self.shelf.spare).push(std::mem::take(&mut self.path));
        }
        // What cannot be moved now goes with the session.
        drop(self.shelf.session.discard(&self.path));
        drop(session::empty_trash_in_background(&self.shelf.root));
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        for place in locked(&self.spare).drain(..) {
            for name in ["root", "work/work", "work", ""] {
                // What stays goes with the session.
                drop(fs::remove_dir(place.join(name)));
            }
        }
    }
}

fn directory(root: &Path, id: &SnapshotId) -> PathBuf {
    root.join("snapshots").join(id.0.hex())
}

/// Removes a snapshot's directory if it has no row, which nobody can insert meanwhile.
pub(crate) fn discard_unless_listed(root: &Path, database: &Database, id: &SnapshotId) -> Result<()> {
    database.try_transaction(|transaction| {
        let sql = "SELECT EXISTS (SELECT 1 FROM snapshots WHERE id = ?)";
        match transaction.prepare_cached(sql)?.query_row([id.0.as_str()], |row| row.get(0))? {
            true => Ok(()),
            false => session::discard(root, &directory(root, id)),
        }
    })
}

fn pin(transaction: &Transaction, session: &str, id: &SnapshotId) -> Result<()> {
    let sql = "INSERT OR IGNORE INTO pins (session, snapshot) VALUES (?, ?)";
    transaction.prepare_cached(sql)?.execute([session, id.0.as_str()])?;
    Ok(())
}

fn has_child(transaction: &Transaction, id: &SnapshotId) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM snapshots WHERE parent = ?)";
    Ok(transaction.prepare_cached(sql)?.query_row([id.0.as_str()], |row| row.get(0))?)
}

fn pinned_by(transaction: &Transaction, id: &SnapshotId) -> Result<Vec<String>> {
    let mut statement = transaction.prepare_cached("SELECT session FROM pins WHERE snapshot = ?")?;
    let sessions = statement.query_map([id.0.as_str()], |row| row.get(0))?;
    Ok(sessions.collect::<rusqlite::Result<_>>()?)
}

fn delete_rows(transaction: &Transaction, id: &SnapshotId) -> Result<()> {
    for sql in [
        "DELETE FROM snapshots WHERE id = ?",
        "DELETE FROM pins WHERE snapshot = ?",
        "DELETE FROM cache WHERE snapshot = ?",
        "DELETE FROM layers WHERE snapshot = ?",
    ] {
        transaction.prepare_cached(sql)?.execute([id.0.as_str()])?;
    }
    Ok(())
}

pub(crate) fn parse_id(text: &str) -> Result<SnapshotId> {
    let record = |error: crate::digest::InvalidDigest| Error::Record {
        what: "a snapshot's row".to_owned(),
        reason: error.to_string(),
    };
    text.parse::<Digest>().map(SnapshotId).map_err(record)
}

/// The rows that a power cut would make worthless.
pub(crate) fn unsettled(database: &Database) -> Result<Vec<String>> {
    database.with(|connection| {
        let mut statement = connection.prepare_cached("SELECT id FROM snapshots WHERE boot = ?")?;
        statement.query_map([boot_id()], |row| row.get(0))?.collect()
    })
}

/// To be called once the file system has been synced.
pub(crate) fn mark_settled(transaction: &Transaction, ids: &[String]) -> rusqlite::Result<()> {
    let mut statement = transaction.prepare_cached("UPDATE snapshots SET boot = NULL WHERE id = ?")?;
    ids.iter().try_for_each(|id| statement.execute([id]).map(drop))
}

/// What a tree takes on the disk; names of one file count once.
pub(crate) fn disk_usage(directory: &Path) -> Result<u64> {
    let mut seen = std::collections::HashSet::new();
    let mut total = 0;
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).context("read", &directory)? {
            let entry = entry.context("read", &directory)?;
            let metadata = entry.metadata().context("look at", &entry.path())?;
            if metadata.is_dir() {
                pending.push(entry.path());
            } else if metadata.nlink() > 1 && !seen.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            total += metadata.blocks() * 512;
        }
    }
    Ok(total)
}

/// Whether a finished directory says nothing: no entries, and a root as every fresh one.
pub(crate) fn says_nothing(changes: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(changes).context("read", changes)?;
    if let Some(entry) = entries.next() {
        entry.context("read", changes)?;
        return Ok(false);
    }
    let metadata = fs::metadata(changes).context("look at", changes)?;
    Ok((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()) == (0o755, 0, 0))
}

/// Nothing inside, and its own mode and owner as they were: a `chmod /` is a change.
pub(crate) fn is_untouched(upper: &Path, fresh: &fs::Metadata) -> Result<bool> {
    if fs::read_dir(upper).context("read", upper)?.next().is_some() {
        return Ok(false);
    }
    let now = fs::metadata(upper).context("look at", upper)?;
    Ok((now.mode(), now.uid(), now.gid()) == (fresh.mode(), fresh.uid(), fresh.gid()))
}

/// Gives `to`, a directory, the mode, owner and attributes of `from`; what belongs to overlay stays behind.
pub(crate) fn copy_directory_attributes(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from).context("open", from)?;
    let target = File::open(to).context("open", to)?;
    copy_attributes(&source, &target).context("copy the attributes of", from)
}

pub(crate) fn copy_attributes(from: &File, to: &File) -> io::Result<()> {
    let (wanted, there) = (from.metadata()?, to.metadata()?);
    let other_owner = (wanted.uid(), wanted.gid()) != (there.uid(), there.gid());
    if other_owner {
        std::os::unix::fs::fchown(to, Some(wanted.uid()), Some(wanted.gid()))?;
    }
    // A new owner takes the set-user-id bits away.
    if other_owner || wanted.mode() != there.mode() {
        to.set_permissions(wanted.permissions())?;
    }
    for name in attribute_names(|list| rustix::fs::flistxattr(from, list))? {
        let value = attribute(|value| rustix::fs::fgetxattr(from, &*name, value))?;
        rustix::fs::fsetxattr(to, &*name, &value, rustix::fs::XattrFlags::empty())?;
    }
    Ok(())
}

/// The names that a tree's owner gave; overlay's own marks are not among them.
pub(crate) fn attribute_names(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<Vec<std::ffi::CString>> {
    let names = match attribute(list) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(Vec::new()),
        names => names?,
    };
    let kept = |name: &&[u8]| {
        // SELinux labels what is made here itself.
        let machine = *name == b"security.selinux";
        !(name.is_empty() || machine || name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay."))
    };
    let names = names.split(|byte| *byte == 0).filter(kept);
    names.map(|name| std::ffi::CString::new(name).map_err(io::Error::other)).collect()
}

/// Reads a value whose length is not known: into more and more room, until it fits. The kernel's limit is 64 KiB.
pub(crate) fn attribute(read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut value = vec![0; 512];
    loop {
        match read(&mut value) {
            Ok(length) => {
                value.truncate(length);
                return Ok(value);
            }
            Err(rustix::io::Errno::RANGE) if value.len() < 1 << 20 => value.resize(value.len() * 8, 0),
            Err(error) => return Err(error.into()),
        }
    }
}
