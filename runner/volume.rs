//! Directories that outlive the step or container that uses them: cache mounts and named volumes.
//!
//! ```text
//! $FORGE_ROOT/
//!   cache/<id>/id          the cache's id as written (the directory's name is a hash and the id's readable tail)
//!   cache/<id>/<n>         an instance: 0 is the common one, 1 and up are those of private mounts
//!   cache/<id>/<n>.lock    flock: shared by `shared` mounts, exclusive for the others; its mtime is the last use
//!   volumes/<name>/data    the volume
//!   volumes/<name>/lock    flock: shared by those who use it, exclusive to fill or remove it
//! ```
//! A lock ends with its holder, so nothing is in use that no living process uses. Whoever removes a lock file does so
//! under the lock; whoever waited for it sees that its file has gone from its path and starts over. Directories
//! are made and filled in the store's ingest area and renamed into place: what is there is complete.

mod copy;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use forge_snapshotter::{Context, Digest, Store};
use forge_solver::graph::Sharing;
use rusqlite::{OptionalExtension, params};
use rustix::fs::{FlockOperation, Gid, Mode, Uid};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

pub use copy::{Copied, CopyError, copy_tree};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] forge_snapshotter::Error),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(
        "{0:?} is no name for a volume: it takes a letter or digit, then letters, digits and _ . - (at most 255 in all)"
    )]
    InvalidName(String),
    #[error("there is no volume {0}")]
    UnknownVolume(VolumeName),
    #[error("volume {0} is in use: stop the container that uses it first")]
    VolumeInUse(VolumeName),
    #[error("the record of volume {name} cannot be read: {source}")]
    Record { name: VolumeName, source: serde_json::Error },
    #[error("the thread that waited for the cache {0:?} is gone")]
    Interrupted(String),
}

// ---- cache mounts ----

/// `RUN --mount=type=cache`, as one step wants it.
#[derive(Clone, Debug)]
pub struct CacheRequest {
    pub id: String,
    pub sharing: Sharing,
    /// What a new cache starts with: a directory that is not written to meanwhile.
    pub seed: Option<PathBuf>,
    /// Of a new cache's directory.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// A cache in use. Dropping it (or dying) gives it back.
#[derive(Debug)]
pub struct CacheMount {
    path: PathBuf,
    _lock: File,
}

impl CacheMount {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The caches of one step, in the order of the requests.
///
/// They are taken in the order of their ids, so that two steps that want the same locked ones never wait for each
/// other, and requests for the same cache share one hold, under the stricter of their rules. `waiting` is told
/// the id of a cache that somebody else has to give back first.
pub async fn cache_mounts(
    store: &Store,
    requests: &[CacheRequest],
    waiting: impl Fn(&str) + Send + Sync,
) -> Result<Vec<Arc<CacheMount>>> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    // Locked before shared, for the same id.
    order.sort_by_key(|index| (&requests[*index].id, requests[*index].sharing != Sharing::Locked, *index));
    let mut mounts: BTreeMap<usize, Arc<CacheMount>> = BTreeMap::new();
    let mut before: Option<usize> = None;
    for index in order {
        let request = &requests[index];
        let common = request.sharing != Sharing::Private;
        let same = before.filter(|before| common && requests[*before].id == request.id);
        let mount = match same.and_then(|same| mounts.get(&same)) {
            Some(mount) => Arc::clone(mount),
            None => Arc::new(cache_mount(store, request, &waiting).await?),
        };
        mounts.insert(index, mount);
        if common {
            before = Some(index);
        }
    }
    Ok(mounts.into_values().collect())
}

/// One cache. A step that needs several takes them by [`cache_mounts`].
pub async fn cache_mount(
    store: &Store,
    request: &CacheRequest,
    waiting: impl Fn(&str) + Send + Sync,
) -> Result<CacheMount> {
    let directory = cache_directory(store, &request.id)?;
    match request.sharing {
        Sharing::Private => private_cache(store, request, &directory).await,
        Sharing::Locked => {
            let lock =
                wait_for(&instance_lock(&directory, 0), FlockOperation::LockExclusive, request, &waiting).await?;
            make_instance(store, request, &directory.join("0")).await?;
            in_use(lock, directory.join("0"))
        }
        Sharing::Shared => loop {
            let path = directory.join("0");
            let lock = wait_for(&instance_lock(&directory, 0), FlockOperation::LockShared, request, &waiting).await?;
            if path.exists() {
                return in_use(lock, path);
            }
            drop(lock);
            // Made alone, then looked at again: between the two locks it may have been pruned.
            let _alone =
                wait_for(&instance_lock(&directory, 0), FlockOperation::LockExclusive, request, &waiting).await?;
            make_instance(store, request, &path).await?;
        },
    }
}

/// The first instance that nobody uses.
async fn private_cache(store: &Store, request: &CacheRequest, directory: &Path) -> Result<CacheMount> {
    let mut number = 1;
    loop {
        if let Some(lock) = try_lock(&instance_lock(directory, number), FlockOperation::NonBlockingLockExclusive)? {
            let path = directory.join(number.to_string());
            make_instance(store, request, &path).await?;
            return in_use(lock, path);
        }
        number += 1;
    }
}

/// Notes the time for pruning.
fn in_use(lock: File, path: PathBuf) -> Result<CacheMount> {
    lock.set_modified(SystemTime::now()).context("note the use of", &path)?;
    Ok(CacheMount { path, _lock: lock })
}

fn instance_lock(directory: &Path, number: u32) -> PathBuf {
    directory.join(format!("{number}.lock"))
}

/// The directory of a cache, made if it is missing.
fn cache_directory(store: &Store, id: &str) -> Result<PathBuf> {
    let directory = store.root().join("cache").join(cache_directory_name(id));
    fs::create_dir_all(&directory).context("create", &directory)?;
    let name = directory.join("id");
    if !name.exists() {
        // Whoever comes at the same time writes the same.
        fs::write(&name, id).context("write", &name)?;
    }
    Ok(directory)
}

/// Unlike ids, unlike names: 128 bits of the id's digest decide, its last part is for people.
fn cache_directory_name(id: &str) -> String {
    const TAIL_CHARS: usize = 40;
    let hash = Digest::of(id).hex()[..32].to_owned();
    let tail: Vec<char> = id.chars().map(|char| if char.is_ascii_alphanumeric() { char } else { '-' }).collect();
    let tail: String = tail[tail.len().saturating_sub(TAIL_CHARS)..].iter().collect();
    format!("{hash}-{}", tail.trim_matches('-'))
}

/// Makes an instance that is not there yet; its lock is held exclusively.
async fn make_instance(store: &Store, request: &CacheRequest, path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let (store, request, path) = (store.clone(), request.clone(), path.to_owned());
    let id = request.id.clone();
    let making = tokio::task::spawn_blocking(move || make_instance_now(&store, &request, &path));
    making.await.map_err(|_| Error::Interrupted(id))?
}

fn make_instance_now(store: &Store, request: &CacheRequest, path: &Path) -> Result<()> {
    let ingest = store.ingest()?;
    let new = ingest.path().join("cache");
    fs::create_dir(&new).context("create", &new)?;
    if let Some(seed) = &request.seed {
        copy_tree(seed, &new)?;
    }
    let owned = rustix::fs::chown(&new, Some(Uid::from_raw(request.uid)), Some(Gid::from_raw(request.gid)));
    if !copy::is_unmapped(&owned) {
        owned.context("change the owner of", &new)?;
    }
    rustix::fs::chmod(&new, Mode::from_raw_mode(request.mode)).context("change the mode of", &new)?;
    Ok(fs::rename(&new, path).context("put in place", path)?)
}

/// One instance of a cache, for `du` and `prune`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheInstance {
    pub id: String,
    pub path: PathBuf,
    pub used: SystemTime,
    pub size_bytes: u64,
}

pub fn caches(store: &Store) -> Result<Vec<CacheInstance>> {
    let mut found = Vec::new();
    for directory in entries(&store.root().join("cache"))? {
        // A directory without its id was being made when its maker was killed.
        let id = fs::read_to_string(directory.join("id")).unwrap_or_default();
        for path in entries(&directory)?.into_iter().filter(|path| path.is_dir()) {
            let lock = path.with_extension("lock");
            let used = fs::metadata(&lock).and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            found.push(CacheInstance { id: id.clone(), used, size_bytes: size_of(&path), path });
        }
    }
    found.sort_by(|one, other| (&one.id, &one.path).cmp(&(&other.id, &other.path)));
    Ok(found)
}

/// Removes caches that nobody uses and nobody used for so long; returns what went.
pub fn prune_caches(store: &Store, unused_for: Duration) -> Result<Vec<CacheInstance>> {
    let mut removed = Vec::new();
    for instance in caches(store)? {
        let age = SystemTime::now().duration_since(instance.used).unwrap_or_default();
        if age >= unused_for && remove_cache(store, &instance.path)? {
            removed.push(instance);
        }
    }
    Ok(removed)
}

/// Says no if it is in use.
fn remove_cache(store: &Store, path: &Path) -> Result<bool> {
    let lock_path = path.with_extension("lock");
    let Some(_lock) = try_lock(&lock_path, FlockOperation::NonBlockingLockExclusive)? else { return Ok(false) };
    let ingest = store.ingest()?;
    match fs::rename(path, ingest.path().join("removed")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        moved => moved.context("remove", path)?,
    }
    fs::remove_file(&lock_path).context("remove", &lock_path)?;
    Ok(true)
}

// ---- named volumes ----

/// As docker allows it; anonymous volumes have 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

impl FromStr for VolumeName {
    type Err = Error;

    fn from_str(text: &str) -> Result<VolumeName> {
        let valid = text.len() <= 255
            && text.starts_with(|first: char| first.is_ascii_alphanumeric())
            && text.chars().all(|char| char.is_ascii_alphanumeric() || matches!(char, '_' | '.' | '-'));
        if valid { Ok(VolumeName(text.to_owned())) } else { Err(Error::InvalidName(text.to_owned())) }
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// A volume as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub name: VolumeName,
    pub path: PathBuf,
    /// Seconds since 1970.
    pub created: i64,
    pub used: i64,
    pub anonymous: bool,
    pub labels: BTreeMap<String, String>,
}

/// The part of a volume's record that nobody queries by.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Detail {
    anonymous: bool,
    labels: BTreeMap<String, String>,
}

/// A volume in use. Dropping it (or dying) gives it back.
#[derive(Debug)]
pub struct OpenVolume {
    path: PathBuf,
    /// What the image gave it on its first use.
    pub copied: Option<Copied>,
    _lock: File,
}

impl OpenVolume {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prune {
    Anonymous,
    All,
}

/// The named volumes of a state directory.
#[derive(Clone)]
pub struct Volumes {
    store: Store,
}

impl Volumes {
    pub fn new(store: &Store) -> Volumes {
        Volumes { store: store.clone() }
    }

    /// Makes a volume. One that exists is returned as it is, as docker does.
    pub fn create(&self, name: &VolumeName, labels: BTreeMap<String, String>) -> Result<Volume> {
        self.make(name, Detail { anonymous: false, labels })?;
        self.inspect(name)
    }

    /// A new volume that has no name but a random one.
    pub fn create_anonymous(&self) -> Result<Volume> {
        let random = Path::new("/dev/urandom");
        let mut bytes = [0; 32];
        File::open(random).and_then(|mut file| file.read_exact(&mut bytes)).context("read", random)?;
        let name = VolumeName(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        self.make(&name, Detail { anonymous: true, labels: BTreeMap::new() })?;
        self.inspect(&name)
    }

    /// Takes a volume into use; makes it if it is missing, and fills an empty one that nobody else uses with what `seed` holds.
    pub fn open(&self, name: &VolumeName, seed: Option<&Path>) -> Result<OpenVolume> {
        loop {
            self.make(name, Detail::default())?;
            if let Some(open) = self.try_open(name, seed)? {
                self.touch(name)?;
                return Ok(open);
            }
        }
    }

    /// None: it was removed meanwhile.
    fn try_open(&self, name: &VolumeName, seed: Option<&Path>) -> Result<Option<OpenVolume>> {
        let (path, lock_path) = (self.data(name), self.lock(name));
        // Whoever is alone may fill it; others wait for him, which is short, and find it filled.
        let mut copied = None;
        let alone = match try_lock_existing(&lock_path, FlockOperation::NonBlockingLockExclusive) {
            Err(error) if is_gone(&error) => return Ok(None),
            locked => locked?,
        };
        let lock = match alone {
            Some(lock) => {
                if let Some(seed) = seed.filter(|_| is_empty(&path)) {
                    copied = Some(self.fill(&path, seed)?);
                }
                lock
            }
            None => match File::options().read(true).write(true).open(&lock_path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                opened => opened.context("open", &lock_path)?,
            },
        };
        flock(&lock, FlockOperation::LockShared).context("lock", &lock_path)?;
        let there = is_at(&lock, &lock_path).context("look at", &lock_path)?;
        Ok(there.then_some(OpenVolume { path, copied, _lock: lock }))
    }

    /// Puts a full copy where the empty directory was, at once.
    fn fill(&self, path: &Path, seed: &Path) -> Result<Copied> {
        let ingest = self.store.ingest()?;
        let new = ingest.path().join("data");
        fs::create_dir(&new).context("create", &new)?;
        let copied = copy_tree(seed, &new)?;
        fs::rename(&new, path).context("put in place", path)?;
        Ok(copied)
    }

    pub fn inspect(&self, name: &VolumeName) -> Result<Volume> {
        let row = self.store.database().with(|connection| {
            let mut select = connection.prepare_cached("SELECT detail, created, used FROM volumes WHERE name = ?1")?;
            select.query_row([&name.0], |row| Ok((row.get::<_, String>(0)?, row.get(1)?, row.get(2)?))).optional()
        })?;
        let (detail, created, used) = row.ok_or_else(|| Error::UnknownVolume(name.clone()))?;
        let record = |source| Error::Record { name: name.clone(), source };
        let Detail { anonymous, labels } = serde_json::from_str(&detail).map_err(record)?;
        Ok(Volume { name: name.clone(), path: self.data(name), created, used, anonymous, labels })
    }

    /// By name.
    pub fn list(&self) -> Result<Vec<Volume>> {
        let names = self.store.database().with(|connection| {
            let mut select = connection.prepare_cached("SELECT name FROM volumes ORDER BY name")?;
            select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<Vec<String>>>()
        })?;
        let volumes = names.into_iter().map(|name| self.inspect(&VolumeName(name)));
        // One that was removed since is not listed.
        volumes.filter(|volume| !matches!(volume, Err(Error::UnknownVolume(_)))).collect()
    }

    pub fn remove(&self, name: &VolumeName) -> Result<()> {
        let directory = self.directory(name);
        let lock_path = self.lock(name);
        let lock = match try_lock_existing(&lock_path, FlockOperation::NonBlockingLockExclusive) {
            Ok(Some(lock)) => Some(lock),
            Ok(None) => return Err(Error::VolumeInUse(name.clone())),
            // Made by halves, or removed by halves: the record goes all the same.
            Err(error) if is_gone(&error) => None,
            Err(error) => return Err(error),
        };
        let delete = "DELETE FROM volumes WHERE name = ?1";
        let rows = self.store.database().transaction(|transaction| transaction.execute(delete, [&name.0]))?;
        if rows == 0 && lock.is_none() {
            return Err(Error::UnknownVolume(name.clone()));
        }
        let ingest = self.store.ingest()?;
        match fs::rename(&directory, ingest.path().join("removed")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            moved => Ok(moved.context("remove", &directory)?),
        }
    }

    /// Removes what nobody uses; returns the names.
    pub fn prune(&self, which: Prune) -> Result<Vec<VolumeName>> {
        let mut removed = Vec::new();
        for volume in self.list()?.into_iter().filter(|volume| volume.anonymous || which == Prune::All) {
            match self.remove(&volume.name) {
                Ok(()) => removed.push(volume.name),
                Err(Error::VolumeInUse(_) | Error::UnknownVolume(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Files first, then the row; both may be there already.
    fn make(&self, name: &VolumeName, detail: Detail) -> Result<()> {
        let directory = self.directory(name);
        if !self.lock(name).exists() {
            let ingest = self.store.ingest()?;
            let new = ingest.path().join("volume");
            fs::create_dir_all(new.join("data")).context("create", &new)?;
            rustix::fs::chmod(new.join("data"), Mode::from_raw_mode(0o755)).context("change the mode of", &new)?;
            fs::write(new.join("lock"), "").context("create", &new)?;
            match fs::rename(&new, &directory) {
                // Somebody else was first.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {}
                moved => moved.context("create", &directory)?,
            }
        }
        let detail = serde_json::to_string(&detail).map_err(|source| Error::Record { name: name.clone(), source })?;
        let now = forge_snapshotter::database::now();
        let insert = "INSERT OR IGNORE INTO volumes (name, detail, created, used) VALUES (?1, ?2, ?3, ?3)";
        self.store.database().transaction(|transaction| transaction.execute(insert, params![name.0, detail, now]))?;
        Ok(())
    }

    fn touch(&self, name: &VolumeName) -> Result<()> {
        let now = forge_snapshotter::database::now();
        let update = "UPDATE volumes SET used = ?2 WHERE name = ?1";
        self.store.database().transaction(|transaction| transaction.execute(update, params![name.0, now]))?;
        Ok(())
    }

    fn directory(&self, name: &VolumeName) -> PathBuf {
        self.store.root().join("volumes").join(&name.0)
    }

    fn data(&self, name: &VolumeName) -> PathBuf {
        self.directory(name).join("data")
    }

    fn lock(&self, name: &VolumeName) -> PathBuf {
        self.directory(name).join("lock")
    }
}

// ---- locks and directories ----

fn flock(file: &File, operation: FlockOperation) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| rustix::fs::flock(file, operation))?)
}

/// Whether the file is still the one at this path: a lock on one that was removed holds nobody off.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A lock that can be had without waiting; its file is made if it is missing.
fn try_lock(path: &Path, operation: FlockOperation) -> Result<Option<File>> {
    loop {
        let file = open_lock(path)?;
        if !locked_now(&file, path, operation)? {
            return Ok(None);
        }
        if is_at(&file, path).context("look at", path)? {
            return Ok(Some(file));
        }
    }
}

/// As [`try_lock`], for a lock file that must be there already: an error where it is gone (see [`is_gone`]).
fn try_lock_existing(path: &Path, operation: FlockOperation) -> Result<Option<File>> {
    let file = File::options().read(true).write(true).open(path).context("open", path)?;
    if !locked_now(&file, path, operation)? {
        return Ok(None);
    }
    if !is_at(&file, path).context("look at", path)? {
        return Ok(Err(io::Error::from(io::ErrorKind::NotFound)).context("lock", path)?);
    }
    Ok(Some(file))
}

fn locked_now(file: &File, path: &Path, operation: FlockOperation) -> Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::WOULDBLOCK.raw_os_error()) => Ok(false),
        Err(error) => Ok(Err(error).context("lock", path)?),
    }
}

fn open_lock(path: &Path) -> Result<File> {
    Ok(File::options().read(true).write(true).create(true).truncate(false).open(path).context("open", path)?)
}

/// Waits for a lock without holding up the runtime. A thread of its own waits: the runtime's blocking ones would
/// keep a cancelled build from ending, this one gives the lock back as soon as it has it and nobody wants it.
async fn wait_for(
    path: &Path,
    operation: FlockOperation,
    request: &CacheRequest,
    waiting: &(impl Fn(&str) + Send + Sync),
) -> Result<File> {
    let now = match operation {
        FlockOperation::LockShared => FlockOperation::NonBlockingLockShared,
        _ => FlockOperation::NonBlockingLockExclusive,
    };
    if let Some(lock) = try_lock(path, now)? {
        return Ok(lock);
    }
    waiting(&request.id);
    let (reply, answer) = oneshot::channel();
    let owned = path.to_owned();
    let wait = move || drop(reply.send(lock_blocking(&owned, operation)));
    thread::Builder::new()
        .name("forge-cache-lock".to_owned())
        .spawn(wait)
        .context("start a thread to wait for", path)?;
    answer.await.map_err(|_| Error::Interrupted(request.id.clone()))?
}

fn lock_blocking(path: &Path, operation: FlockOperation) -> Result<File> {
    loop {
        let file = open_lock(path)?;
        flock(&file, operation).context("lock", path)?;
        if is_at(&file, path).context("look at", path)? {
            return Ok(file);
        }
    }
}

fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Store(forge_snapshotter::Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound)
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.context("list", directory)?,
    };
    let paths = read.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>();
    Ok(paths.context("list", directory)?)
}

/// Disk space below a directory. What vanishes while it is looked at counts nothing.
fn size_of(path: &Path) -> u64 {
    let mut waiting = vec![path.to_owned()];
    let mut total = 0;
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            total += metadata.blocks() * 512;
            if metadata.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    total
}

#[cfg(test)]
mod tests;
