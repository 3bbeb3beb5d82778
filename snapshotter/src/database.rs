//! What is queried or changes together, in one SQLite database: `state.db`.
//!
//! Several processes use it at once: write-ahead log, short immediate transactions, a long busy timeout.
//! Creating it and migrating it happens under a file lock, because switching a new database to the
//! write-ahead log fails when two do it together. `user_version` numbers the schema; a newer one is refused.
//!
//! A commit is not synced: after a `kill -9` it is there, after a power cut it may not be
//! ([`Store::settle`](crate::Store::settle) makes the lasting ones last).

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use rustix::fs::FlockOperation;

use crate::session::locked;
use crate::{Context, Error, Result, lock};

/// One step per schema version, in order; what has shipped is never edited.
/// Times are seconds since 1970, `detail` and `node` are JSON, digests and ids are text.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE snapshots (id TEXT PRIMARY KEY, parent TEXT, has_changes INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
        created INTEGER NOT NULL, used INTEGER NOT NULL,
        boot TEXT);                                -- the boot that made it, until it is settled
    CREATE INDEX snapshots_parent ON snapshots (parent);
    CREATE TABLE pins (session TEXT NOT NULL, snapshot TEXT NOT NULL, PRIMARY KEY (session, snapshot)) WITHOUT ROWID;
    CREATE INDEX pins_snapshot ON pins (snapshot);
    CREATE TABLE cache (key TEXT PRIMARY KEY, snapshot TEXT NOT NULL, node TEXT, detail TEXT,
        created INTEGER NOT NULL, used INTEGER NOT NULL);
    CREATE INDEX cache_snapshot ON cache (snapshot);
    CREATE TABLE layers (snapshot TEXT NOT NULL, epoch INTEGER NOT NULL, diff_id TEXT NOT NULL,
        size_bytes INTEGER NOT NULL, entries INTEGER NOT NULL, PRIMARY KEY (snapshot, epoch)) WITHOUT ROWID;
    CREATE INDEX layers_diff_id ON layers (diff_id);
    CREATE TABLE encodings (diff_id TEXT NOT NULL, media_type TEXT NOT NULL, level INTEGER, blob TEXT NOT NULL,
        size_bytes INTEGER NOT NULL, PRIMARY KEY (diff_id, media_type, blob));
    CREATE INDEX encodings_blob ON encodings (blob);
    CREATE TABLE origins (blob TEXT NOT NULL, registry TEXT NOT NULL, repository TEXT NOT NULL, used INTEGER NOT NULL,
        PRIMARY KEY (blob, registry, repository));
    CREATE TABLE images (id TEXT PRIMARY KEY, manifest TEXT, platform TEXT NOT NULL, root TEXT,
        created TEXT, used INTEGER NOT NULL);      -- created: as the image says it, RFC 3339
    CREATE TABLE tags (reference TEXT NOT NULL, platform TEXT NOT NULL, image TEXT NOT NULL, index_digest TEXT,
        created INTEGER NOT NULL, PRIMARY KEY (reference, platform));
    CREATE INDEX tags_image ON tags (image);
    CREATE TABLE resolutions (reference TEXT NOT NULL, platform TEXT NOT NULL, digest TEXT NOT NULL,
        checked INTEGER NOT NULL, PRIMARY KEY (reference, platform));
    CREATE TABLE leases (network TEXT NOT NULL, address TEXT NOT NULL, owner_pid INTEGER NOT NULL,
        owner_start INTEGER NOT NULL, PRIMARY KEY (network, address));
    CREATE TABLE networks (name TEXT PRIMARY KEY, detail TEXT NOT NULL);
    CREATE TABLE volumes (name TEXT PRIMARY KEY, detail TEXT NOT NULL, created INTEGER NOT NULL, used INTEGER NOT NULL);
    CREATE TABLE builds (id TEXT PRIMARY KEY, started INTEGER NOT NULL, ended INTEGER, detail TEXT NOT NULL);
"];

const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a transaction is begun anew when SQLite gives up although the timeout has not passed (it does so
/// without waiting where waiting could be a deadlock, and while another process recovers the log).
const BEGIN_ATTEMPTS: u32 = 50;
const BEGIN_PAUSE: Duration = Duration::from_millis(20);

/// The database, opened by its first use.
pub struct Database {
    path: PathBuf,
    connection: Mutex<Option<Connection>>,
}

/// Seconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

impl Database {
    pub(crate) fn new(root: &Path) -> Database {
        Database { path: root.join("state.db"), connection: Mutex::new(None) }
    }

    /// For reading, and for single statements. Keep it short: one thread at a time.
    pub fn with<T>(&self, use_it: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        self.on_connection(|connection| Ok(use_it(connection)?))
    }

    /// An immediate transaction: what it reads stays true until it ends. An error rolls it back.
    pub fn transaction<T>(&self, work: impl FnOnce(&Transaction) -> rusqlite::Result<T>) -> Result<T> {
        self.try_transaction(|transaction| Ok(work(transaction)?))
    }

    pub(crate) fn try_transaction<T>(&self, work: impl FnOnce(&Transaction) -> Result<T>) -> Result<T> {
        self.on_connection(|connection| run(connection, work))
    }

    /// A transaction that is on disk when this returns, and with it all that were before.
    pub(crate) fn durably<T>(&self, work: impl FnOnce(&Transaction) -> rusqlite::Result<T>) -> Result<T> {
        self.on_connection(|connection| {
            connection.pragma_update(None, "synchronous", "FULL")?;
            let result = run(connection, |transaction| Ok(work(transaction)?));
            connection.pragma_update(None, "synchronous", "NORMAL")?;
            result
        })
    }

    fn on_connection<T>(&self, use_it: impl FnOnce(&mut Connection) -> Result<T>) -> Result<T> {
        let mut connection = locked(&self.connection);
        let connection = match &mut *connection {
            Some(connection) => connection,
            none => none.insert(open(&self.path)?),
        };
        use_it(connection)
    }
}

fn run<T>(connection: &mut Connection, work: impl FnOnce(&Transaction) -> Result<T>) -> Result<T> {
    let transaction = begin(connection)?;
    let value = work(&transaction)?;
    transaction.commit()?;
    Ok(value)
}

fn begin(connection: &Connection) -> Result<Transaction<'_>> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match Transaction::new_unchecked(connection, TransactionBehavior::Immediate) {
            Err(error) if is_busy(&error) && attempt < BEGIN_ATTEMPTS => std::thread::sleep(BEGIN_PAUSE),
            result => return Ok(result?),
        }
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

fn open(path: &Path) -> Result<Connection> {
    // Build arguments are in it: for its owner alone, whatever the directory above is. Its log gets the same mode.
    drop(lock::open_private(path)?);
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // The last to close would move the whole log into the database, with two syncs, at the end of every command.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.set_prepared_statement_cache_capacity(64);
    if version(&connection)? != MIGRATIONS.len() {
        migrate(&mut connection, path)?;
    }
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection)
}

fn version(connection: &Connection) -> Result<usize> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    Ok(usize::try_from(version).unwrap_or(usize::MAX))
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<()> {
    let lock_path = path.with_extension("db.lock");
    let file = lock::open_private(&lock_path)?;
    lock::flock(&file, FlockOperation::LockExclusive).context("lock", &lock_path)?;
    let found = version(connection)?;
    let Some(missing) = MIGRATIONS.get(found..) else {
        let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
        return Err(Error::Version { path: path.to_owned(), found: format!("database {found}"), known });
    };
    if found == 0 {
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0))?;
    }
    run(connection, |transaction| {
        for migration in missing {
            transaction.execute_batch(migration)?;
        }
        Ok(transaction.pragma_update(None, "user_version", MIGRATIONS.len() as i64)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_schema_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let first = Database::new(directory.path());
        first.with(|connection| connection.pragma_update(None, "user_version", 99)).unwrap();
        let error = Database::new(directory.path()).with(|_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("database 99"), "{error}");
    }

    #[test]
    fn it_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        Database::new(directory.path()).transaction(increment).unwrap();
        let mut seen = 0;
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{:?}", entry.file_name());
            seen += 1;
        }
        assert!(seen >= 3, "the database, its log and its lock");
    }

    #[test]
    fn an_error_rolls_back() {
        let directory = tempfile::tempdir().unwrap();
        let database = Database::new(directory.path());
        let failed = database.transaction(|transaction| {
            transaction.execute("INSERT INTO networks VALUES ('a', '{}')", [])?;
            transaction.execute("INSERT INTO nowhere VALUES (1)", [])
        });
        assert!(failed.is_err());
        let count: i64 = database.with(|c| c.query_row("SELECT count(*) FROM networks", [], |row| row.get(0))).unwrap();
        assert_eq!(count, 0);
    }

    /// Created by all at once, then every process and thread counts one row up: no update is lost.
    #[test]
    fn transactions_of_many_handles_do_not_lose_updates() {
        let directory = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let database = Database::new(directory.path());
                    for _ in 0..30 {
                        database.transaction(increment).unwrap();
                    }
                });
            }
        });
        let total: i64 = Database::new(directory.path())
            .with(|c| c.query_row("SELECT used FROM volumes", [], |row| row.get(0)))
            .unwrap();
        assert_eq!(total, 180);
    }

    fn increment(transaction: &Transaction) -> rusqlite::Result<()> {
        let sql = "SELECT coalesce(max(used), 0) FROM volumes";
        let seen: i64 = transaction.query_row(sql, [], |row| row.get(0))?;
        transaction.execute("INSERT OR REPLACE INTO volumes VALUES ('v', '{}', 0, ?)", [seen + 1])?;
        Ok(())
    }
}
