//! Everything under forge's state directory: blobs, snapshots, layers, images and the database that joins them.
//!
//! ```text
//! $FORGE_ROOT/
//!   VERSION                        "1"; another number is refused
//!   lock                           shared by every process that uses the directory; exclusive to wipe it
//!   driver                         what the probe for overlay found, and for which boot and user (see `snapshot`)
//!   state.db                       SQLite, WAL: what is queried or changes together (see `database`)
//!   blobs/sha256/<hex>             content, immutable, named by its digest
//!   snapshots/<hex>/fs             a committed snapshot's own changes, in overlay form
//!   snapshots/<hex>/root           its whole tree: the plain driver only
//!   active/<session>.lock          held by a process as long as it lives (see `session`)
//!   active/<session>/<n>           blobs and layers in the making
//!   active/<session>/<n>/{fs,work,root}   snapshots in the making, and mounted views
//!   empty/                         the lower directory of roots that start from nothing
//!   trash/                         renamed here, then deleted at leisure
//!   locks/<hex>                    one per cache key while it is held, so that two builds run a step once
//!   contexts/<hex>                 digests of a build context's files by their stat (see `forge_solver::context`)
//!   volumes/<name>/                named volumes
//!   cache/<id>/                    RUN --mount=type=cache
//! ```
//! Files are complete before they are visible (temporary name, then rename), and files come before the rows
//! that name them; removal goes the other way. What a crash leaves is therefore either invisible (swept from
//! `active` once its session's lock is free) or whole.
//!
//! Nothing is synced on the way. A row or blob says which boot made it until [`Store::settle`] has synced the
//! file system; found after another boot and not settled, a row counts for nothing and a blob is hashed again
//! before it is believed. A `kill -9` loses nothing that was committed; a power cut loses at most the builds
//! that had not finished.

pub mod catalog;
pub mod content;
pub mod database;
pub mod digest;
pub mod gc;
pub mod image;
pub mod layer;
mod lock;
mod session;
pub mod snapshot;
mod walk;

pub use catalog::{Catalog, Encoding, Layer, Recipe, Resolved, StoredImage};
pub use content::{BlobWriter, ContentStore};
pub use database::Database;
pub use digest::{Digest, Digester};
pub use lock::KeyLock;
pub use session::IngestDir;
pub use snapshot::{Active, Driver, Info, SnapshotId, Snapshotter, View};

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::FlockOperation;

use session::Session;
use snapshot::Drivers;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong below the state directory. Texts are fragments that fit after "failed to …:".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("state database: {0}")]
    Database(rusqlite::Error),
    #[error("{} was written by another version of forge ({found}, this one knows up to {known}): use that version, or another directory in FORGE_ROOT", path.display())]
    Version { path: PathBuf, found: String, known: u32 },
    #[error("{} is on a network file system, where several processes cannot share a database: set FORGE_ROOT to a local directory", .0.display())]
    NetworkFileSystem(PathBuf),
    #[error("{what}: {reason}")]
    Record { what: String, reason: String },
    #[error("no blob {0} in the store")]
    UnknownBlob(Digest),
    #[error("blob {expected} is damaged: its content is {found}")]
    Damaged { expected: Digest, found: Digest },
    #[error("blob {digest} has {size} bytes, more than the {limit} that are taken here")]
    TooLarge { digest: Digest, size: u64, limit: u64 },
    #[error("no snapshot {0} in the store")]
    UnknownSnapshot(SnapshotId),
    #[error("snapshot {id} is in use by {by}")]
    SnapshotInUse { id: SnapshotId, by: &'static str },
    #[error(
        "{count} layers are more than the {limit} that this kernel can stack: join RUN instructions, or start from a base with fewer layers"
    )]
    TooManyLayers { count: usize, limit: usize },
    #[error("no image {text:?} in the store{}", did_you_mean(.near))]
    UnknownImage { text: String, near: Vec<String> },
    #[error("{text:?} is the beginning of several image ids: {}", .matches.join(", "))]
    AmbiguousImage { text: String, matches: Vec<String> },
    #[error("image {text:?} is not there for {platform}, but for {}", .there.join(", "))]
    OtherPlatform { text: String, platform: String, there: Vec<String> },
    #[error("image {id} is still tagged as {}: remove the tags first", .tags.join(", "))]
    ImageTagged { id: Digest, tags: Vec<String> },
    /// One file of a tree, or one entry of an archive, that cannot be what it claims to be.
    #[error("layer entry \"{entry}\": {reason}")]
    Layer { entry: String, reason: String },
    /// The archive as a whole: unreadable, cut short, too large.
    #[error("layer archive: {reason}")]
    Archive { reason: String },
    #[error(
        "layer has diff id {found} where {expected} was expected: it is damaged or not the layer that its image names"
    )]
    DiffId { expected: Digest, found: Digest },
}

fn did_you_mean(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("; is it {}?", names.join(" or ")),
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Error {
        Error::Database(error)
    }
}

impl Error {
    /// Whether the disk, or the user's share of it, is full: the way out is then to free space.
    pub fn is_full_disk(&self) -> bool {
        match self {
            Error::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Error::Database(error) => error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            _ => false,
        }
    }
}

/// Adds what was tried, and on which path, to an I/O error.
pub trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io { action, path: path.to_owned(), source })
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).context(action, path)
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).context(action, path)
    }
}

/// The number in `VERSION`. It changes when an older forge could no longer read the directory.
const VERSION: u32 = 1;

/// statfs(2): `NFS_SUPER_MAGIC`, `SMB2_SUPER_MAGIC`, `CIFS_SUPER_MAGIC`.
const NETWORK_FILE_SYSTEMS: [u32; 3] = [0x6969, 0xfe53_4d42, 0xff53_4d42];

/// An open state directory. Clones are the same store; several processes may have one open at once.
///
/// Opening reads two small files. The database, the session and the driver come with their first use.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    // In this order: snapshots in use end before the session, the session before the directory's lock.
    drivers: OnceLock<Drivers>,
    wanted: Option<Driver>,
    content: ContentStore,
    session: Arc<Session>,
    database: Arc<Database>,
    root: PathBuf,
    _lock: File,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Use this driver, and do not probe.
    pub driver: Option<Driver>,
}

impl Store {
    /// Opens the state directory, and creates it where it is missing.
    pub fn open(root: &Path) -> Result<Store> {
        Store::open_with(root, OpenOptions::default())
    }

    pub fn open_with(root: &Path, options: OpenOptions) -> Result<Store> {
        create_directory(root)?;
        let root = fs::canonicalize(root).context("resolve", root)?;
        let lock = lock::open_private(&root.join("lock"))?;
        lock::flock(&lock, FlockOperation::LockShared).context("lock", &root.join("lock"))?;
        check_version(&root)?;
        let session = Arc::new(Session::new(&root));
        Ok(Store(Arc::new(Inner {
            drivers: OnceLock::new(),
            wanted: options.driver,
            content: ContentStore::new(&root, session.clone()),
            session,
            database: Arc::new(Database::new(&root)),
            root,
            _lock: lock,
        })))
    }

    pub fn root(&self) -> &Path {
        &self.0.root
    }

    pub fn content(&self) -> &ContentStore {
        &self.0.content
    }

    /// Overlay where it can be had (probed once a boot), else plain copies.
    pub fn snapshots(&self) -> &Arc<dyn Snapshotter> {
        &self.drivers().snapshotter
    }

    pub fn driver(&self) -> Driver {
        self.drivers().driver
    }

    /// Why the driver is [`Driver::Plain`], where that was not asked for.
    pub fn driver_note(&self) -> Option<&str> {
        self.drivers().note.as_deref()
    }

    fn drivers(&self) -> &Drivers {
        let inner = &*self.0;
        inner.drivers.get_or_init(|| Drivers::new(&inner.root, &inner.database, &inner.session, inner.wanted))
    }

    pub fn database(&self) -> &Database {
        &self.0.database
    }

    pub fn catalog(&self) -> Catalog<'_> {
        Catalog::new(self)
    }

    /// A fresh directory on the store's file system for things in the making, removed on drop.
    pub fn ingest(&self) -> Result<IngestDir> {
        IngestDir::new(&self.0.session)
    }

    /// Waits until nobody else holds `key`, in this process or another. Freed on drop and on death.
    pub fn lock_key(&self, key: &str) -> Result<KeyLock> {
        KeyLock::wait(&self.0.root, key)
    }

    /// As [`Store::lock_key`], but `None` where somebody else holds it.
    pub fn try_lock_key(&self, key: &str) -> Result<Option<KeyLock>> {
        KeyLock::attempt(&self.0.root, key)
    }

    /// Makes everything committed so far survive a power cut: one sync of the file system, then one of the
    /// database. Called once, when a build's records are complete. Costs nothing where nothing is new.
    pub fn settle(&self) -> Result<()> {
        let pending = snapshot::unsettled(&self.0.database)?;
        let blobs = self.0.content.take_unsettled();
        if !pending.is_empty() || !blobs.is_empty() {
            let root = File::open(self.root()).context("open", self.root())?;
            rustix::fs::syncfs(&root).context("sync", self.root())?;
            self.0.content.mark_settled(&blobs)?;
        }
        self.0.database.durably(|transaction| snapshot::mark_settled(transaction, &pending))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Pins of a session that has ended count for nothing; leaving one behind costs a row until the next GC.
        drop(self.drivers.take());
        if let Some(name) = self.session.pinned() {
            drop(self.database.with(|connection| connection.execute("DELETE FROM pins WHERE session = ?", [name])));
        }
    }
}

fn create_directory(path: &Path) -> Result<()> {
    // Only the owner may look inside: set-user-id programs in snapshots are nobody else's to start.
    DirBuilder::new().recursive(true).mode(0o700).create(path).context("create", path)
}

/// Reads `VERSION`; writes it, and makes the directories, where the store is new.
fn check_version(root: &Path) -> Result<()> {
    let path = root.join("VERSION");
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == VERSION.to_string() => Ok(()),
        Ok(text) => {
            Err(Error::Version { path: root.to_owned(), found: text.trim().chars().take(40).collect(), known: VERSION })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => initialise(root, &path),
        Err(error) => Err(error).context("read", &path),
    }
}

fn initialise(root: &Path, version: &Path) -> Result<()> {
    let directory = File::open(root).context("open", root)?;
    let kind = rustix::fs::fstatfs(&directory).context("look at the file system of", root)?.f_type;
    if NETWORK_FILE_SYSTEMS.contains(&(kind as u32)) {
        return Err(Error::NetworkFileSystem(root.to_owned()));
    }
    for name in ["blobs/sha256", "snapshots", "active", "empty", "trash", "locks", "volumes", "cache"] {
        create_directory(&root.join(name))?;
    }
    // The root of an empty image shows through this one's attributes.
    let empty = root.join("empty");
    fs::set_permissions(&empty, std::os::unix::fs::PermissionsExt::from_mode(0o755)).context("chmod", &empty)?;
    // Processes that get here together write the same; each renames a file of its own.
    let temporary = root.join(format!("VERSION.{}", session::unique_name()));
    fs::write(&temporary, format!("{VERSION}\n")).context("write", &temporary)?;
    fs::rename(&temporary, version).context("write", version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        drop(Store::open(directory.path()).unwrap());
        fs::write(directory.path().join("VERSION"), "7\n").unwrap();
        let error = Store::open(directory.path()).err().unwrap().to_string();
        assert!(error.contains("another version of forge (7"), "{error}");
    }

    #[test]
    fn many_open_a_new_store_at_once() {
        let directory = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let root = directory.path();
                scope.spawn(move || {
                    let store = Store::open(root).unwrap();
                    store.content().put(format!("blob {number}").as_bytes()).unwrap();
                    let sql = "INSERT INTO networks (name, detail) VALUES (?, '{}')";
                    store.database().with(|connection| connection.execute(sql, [number])).unwrap();
                });
            }
        });
        let store = Store::open(directory.path()).unwrap();
        let count = |connection: &rusqlite::Connection| {
            connection.query_row("SELECT count(*) FROM networks", [], |row| row.get::<_, i64>(0))
        };
        assert_eq!(store.database().with(count).unwrap(), 8);
        assert_eq!(store.content().list().unwrap().len(), 8);
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let full = Err::<(), _>(io::Error::from_raw_os_error(libc_enospc())).context("write", Path::new("/x"));
        assert!(full.unwrap_err().is_full_disk());
        let other = Err::<(), _>(io::Error::from(io::ErrorKind::NotFound)).context("write", Path::new("/x"));
        assert!(!other.unwrap_err().is_full_disk());
    }

    fn libc_enospc() -> i32 {
        rustix::io::Errno::NOSPC.raw_os_error()
    }
}
