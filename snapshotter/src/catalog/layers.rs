//! Which snapshot gives which layer.
//!
//! A snapshot's changes as a tar are a function of the files and of one more thing: the epoch that times are clamped to
//! (`SOURCE_DATE_EPOCH`). So a snapshot gives one layer for each epoch, and a layer remembers its own: whoever makes the tar
//! again, a year later, for a push, gets the same bytes. Several snapshots may give one layer (the same COPY over two bases):
//! as long as one of them is there, the layer can be made.

use rusqlite::{OptionalExtension, Row, params};

use super::{Catalog, digest};
use crate::{Digest, Result, SnapshotId};

/// A snapshot's changes as a tar. `entries` is 0 for a layer that changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    pub diff_id: Digest,
    pub size_bytes: u64,
    pub entries: u64,
}

/// How a layer is made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    pub snapshot: SnapshotId,
    /// Times after it are clamped to it.
    pub epoch: Option<i64>,
}

/// No epoch, in a key of the database (where NULL is equal to nothing).
const NO_EPOCH: i64 = -1;

impl Catalog<'_> {
    /// Records that the changes of `snapshot`, as a tar with times up to `epoch`, are this layer.
    pub fn set_layer(&self, snapshot: &SnapshotId, layer: &Layer, epoch: Option<i64>) -> Result<()> {
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let epoch = epoch.unwrap_or(NO_EPOCH);
        let sql =
            "INSERT OR REPLACE INTO layers (snapshot, epoch, diff_id, size_bytes, entries) VALUES (?, ?, ?, ?, ?)";
        let (size, entries) = (number(layer.size_bytes), number(layer.entries));
        let values = params![snapshot.0.as_str(), epoch, layer.diff_id.as_str(), size, entries];
        self.database().with(|connection| connection.prepare_cached(sql)?.execute(values).map(drop))
    }

    pub fn layer_of(&self, snapshot: &SnapshotId, epoch: Option<i64>) -> Result<Option<Layer>> {
        let sql = "SELECT diff_id, size_bytes, entries FROM layers WHERE snapshot = ? AND epoch = ?";
        self.database().with(|connection| {
            let layer = |row: &Row| {
                let number = |number: i64| number.unsigned_abs();
                Ok(Layer { diff_id: digest(row, 0)?, size_bytes: number(row.get(1)?), entries: number(row.get(2)?) })
            };
            let values = params![snapshot.0.as_str(), epoch.unwrap_or(NO_EPOCH)];
            connection.prepare_cached(sql)?.query_row(values, layer).optional()
        })
    }

    /// The size of a layer's tar; of one that was never unpacked, that of the largest form known.
    pub fn layer_size(&self, diff_id: &Digest) -> Result<Option<u64>> {
        let sql = "SELECT coalesce((SELECT size_bytes FROM layers WHERE diff_id = ?1 LIMIT 1),
            (SELECT max(size_bytes) FROM encodings WHERE diff_id = ?1))";
        let size = self.database().with(|connection| {
            connection.prepare_cached(sql)?.query_row([diff_id.as_str()], |row| row.get::<_, Option<i64>>(0))
        })?;
        Ok(size.map(i64::unsigned_abs))
    }

    /// The snapshots whose changes give this layer.
    pub fn recipes(&self, diff_id: &Digest) -> Result<Vec<Recipe>> {
        let sql = "SELECT snapshot, epoch FROM layers WHERE diff_id = ?";
        self.database().with(|connection| {
            let recipe = |row: &Row| {
                let epoch = Some(row.get(1)?).filter(|epoch| *epoch != NO_EPOCH);
                Ok(Recipe { snapshot: SnapshotId(digest(row, 0)?), epoch })
            };
            connection.prepare_cached(sql)?.query_map([diff_id.as_str()], recipe)?.collect()
        })
    }

    /// When a snapshot was made, in seconds since 1970.
    pub fn made(&self, snapshot: &SnapshotId) -> Result<Option<i64>> {
        let sql = "SELECT created FROM snapshots WHERE id = ?";
        self.database().with(|connection| {
            connection.prepare_cached(sql)?.query_row([snapshot.0.as_str()], |row| row.get(0)).optional()
        })
    }
}
