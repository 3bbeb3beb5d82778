//! What is remembered between builds: which key gave which snapshot.
//!
//! A row of the `cache` table is one key, a node's definition key or its content key (see [`crate::key`]). Beside the
//! snapshot it keeps what the node was, as JSON, so that a later miss can be explained. A row whose snapshot is gone
//! (pruned) is no hit. Both keys of a node are written in one transaction, after its snapshot was committed.

use forge_snapshotter::database::now;
use forge_snapshotter::{Digest, Result, SnapshotId, Store};
use rusqlite::OptionalExtension as _;

use crate::key::Facts;

/// A row's time of use is written again when it is older than this.
const USED_PRECISION_S: i64 = 3600;
/// As many steps as an explanation looks back through.
const HISTORY_ROWS: u32 = 500;

pub struct Cache<'a>(pub &'a Store);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    Hit(SnapshotId),
    /// The key is known, its snapshot is gone.
    Evicted,
    Unknown,
}

impl Cache<'_> {
    pub fn lookup(&self, key: &str) -> Result<Lookup> {
        let row: Option<(String, i64)> = self.0.database().with(|connection| {
            let mut statement = connection.prepare_cached("SELECT snapshot, used FROM cache WHERE key = ?")?;
            statement.query_row([key], |row| Ok((row.get(0)?, row.get(1)?))).optional()
        })?;
        // A row that does not hold a digest is none.
        let Some((Ok(digest), used)) = row.map(|(text, used)| (text.parse::<Digest>(), used)) else {
            return Ok(Lookup::Unknown);
        };
        let id = SnapshotId(digest);
        if self.0.snapshots().get(&id)?.is_none() {
            return Ok(Lookup::Evicted);
        }
        if now() - used > USED_PRECISION_S {
            let sql = "UPDATE cache SET used = ? WHERE key = ?";
            self.0.database().with(|connection| connection.execute(sql, (now(), key)))?;
        }
        Ok(Lookup::Hit(id))
    }

    pub fn record(&self, keys: &[&str], snapshot: &SnapshotId, facts: &Facts) -> Result<()> {
        let facts = serde_json::to_string(facts).expect("facts are plain data with string keys");
        self.0.database().transaction(|transaction| {
            let sql = "INSERT OR REPLACE INTO cache (key, snapshot, node, detail, created, used)
                VALUES (?, ?, ?, NULL, ?, ?)";
            let mut statement = transaction.prepare_cached(sql)?;
            // What the node was stands beside its definition key alone: once for each way of writing the step.
            for (place, key) in keys.iter().enumerate() {
                let facts = (place == 0).then_some(&facts);
                statement.execute((key, snapshot.to_string(), facts, now(), now()))?;
            }
            Ok(())
        })
    }

    /// The last nodes recorded, newest first. Rows of another format are passed over.
    pub fn history(&self) -> Result<Vec<Facts>> {
        let rows = self.0.database().with(|connection| {
            // A row that is written again gets a new number, so the order is that of writing and takes no sorting.
            let sql = "SELECT node FROM cache WHERE node IS NOT NULL ORDER BY rowid DESC LIMIT ?";
            let mut statement = connection.prepare_cached(sql)?;
            let rows = statement.query_map([HISTORY_ROWS], |row| row.get::<_, String>(0))?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        })?;
        Ok(rows.iter().filter_map(|text| serde_json::from_str(text).ok()).collect())
    }
}
