//! What the store takes, and getting it back.
//!
//! ```text
//! kept always    tagged images: configuration, manifest, index, layers' blobs, snapshots down to the base
//!                what living sessions use: pinned snapshots, blobs touched since they began (see `session`)
//! kept as cache  what cache records lead to, and untagged images that were pulled (bases of builds);
//!                evicted, the least recently used first, as far as the options say
//! never kept     the rest: what no record, image or session leads to
//! ```
//! Rows go first, then files. Nothing here holds off a build: a snapshot that somebody begins to use meanwhile is
//! refused by [`Snapshotter::remove`](crate::Snapshotter::remove) and stays, and a blob that is touched is put back.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;

use crate::content::boot_id;
use crate::database::now;
use crate::image::ImageConfig;
use crate::session::{self, FileTime};
use crate::snapshot::{discard_unless_listed, disk_usage};
use crate::{Context, Digest, Error, Result, SnapshotId, Store};

/// No manifest, index or configuration that a registry takes is larger.
const MANIFEST_LIMIT_BYTES: u64 = 8 * 1024 * 1024;
/// Indexes within indexes are followed this deep.
const MANIFEST_DEPTH: u32 = 4;

/// A blob this young counts as in use: the clock of files ticks slowly, and equal times must not mislead.
const BLOB_GRACE_SECONDS: i64 = 1;

/// One kind of thing in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kind {
    pub count: u64,
    pub bytes: u64,
    /// What [`prune`] with `all` would free of it.
    pub reclaimable_bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Images count by their number; their bytes are those of blobs and snapshots.
    pub images: Kind,
    pub snapshots: Kind,
    pub blobs: Kind,
    /// Cache records: their bytes are those of snapshots.
    pub cache: Kind,
    pub cache_mounts: Kind,
    pub volumes: Kind,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct PruneOptions {
    /// Evict the whole cache, not only what nothing leads to.
    pub all: bool,
    /// Evict only what has not been used for so long.
    pub older_than: Option<Duration>,
    /// Evict only until snapshots and blobs take no more than this.
    pub keep_bytes: Option<u64>,
}

impl PruneOptions {
    fn evicts(&self) -> bool {
        self.all || self.older_than.is_some() || self.keep_bytes.is_some()
    }
}

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub images: Vec<Digest>,
    pub snapshots: Vec<SnapshotId>,
    pub blobs: Vec<Digest>,
    pub cache_records: u64,
    pub bytes: u64,
}

/// What the store takes by kind. Volumes and cache mounts are walked.
pub fn usage(store: &Store) -> Result<Usage> {
    let facts = Facts::gather(store)?;
    let all = plan(store, &facts, &PruneOptions { all: true, ..PruneOptions::default() })?;
    let size_of = |id: &String| facts.snapshots.get(id).map_or(0, |row| row.size_bytes);
    let mut usage = Usage {
        images: Kind { count: facts.images.len() as u64, ..Kind::default() },
        cache: Kind { count: facts.cache.len() as u64, ..Kind::default() },
        snapshots: Kind {
            count: facts.snapshots.len() as u64,
            bytes: facts.snapshots.values().map(|row| row.size_bytes).sum(),
            reclaimable_bytes: all.snapshots.iter().map(size_of).sum(),
        },
        cache_mounts: directories(&store.root().join("cache"))?,
        volumes: directories(&store.root().join("volumes"))?,
        ..Usage::default()
    };
    for (digest, size, _) in &facts.blobs {
        usage.blobs.count += 1;
        usage.blobs.bytes += size;
        usage.blobs.reclaimable_bytes += if all.blobs.contains(digest) { *size } else { 0 };
    }
    Ok(usage)
}

fn directories(path: &Path) -> Result<Kind> {
    let mut kind = Kind::default();
    for entry in fs::read_dir(path).context("read", path)? {
        let entry = entry.context("read", path)?;
        if entry.file_type().context("look at", &entry.path())?.is_dir() {
            kind.count += 1;
            kind.bytes += disk_usage(&entry.path())?;
        }
    }
    Ok(kind)
}

/// Removes what nothing leads to, and evicts from the cache what `options` name.
pub fn prune(store: &Store, options: &PruneOptions) -> Result<Pruned> {
    let _only_one = store.lock_key("garbage collection")?;
    session::sweep(store.root())?;
    drop_dead_rows(store)?;
    let facts = Facts::gather(store)?;
    let plan = plan(store, &facts, options)?;
    let mut pruned = Pruned::default();
    remove_records(store, &facts, &plan, &mut pruned)?;
    remove_snapshots(store, &facts, &plan, &mut pruned)?;
    remove_blobs(store, &facts, &plan, &mut pruned)?;
    forget_encodings(store, &plan)?;
    remove_stray_directories(store)?;
    session::empty_trash(store.root())?;
    Ok(pruned)
}

/// Pins of dead sessions, snapshots of another boot that were never settled, cache records that lead nowhere.
fn drop_dead_rows(store: &Store) -> Result<()> {
    store.database().try_transaction(|transaction| {
        let sessions: Vec<String> = rows(transaction, "SELECT DISTINCT session FROM pins", |row| row.get(0))?;
        // In this order: a session that begins after the pins were read has none among them.
        let living = session::living(store.root())?;
        for dead in sessions.iter().filter(|name| !living.iter().any(|(living, _)| living == *name)) {
            transaction.execute("DELETE FROM pins WHERE session = ?", [dead])?;
        }
        transaction.execute("DELETE FROM snapshots WHERE boot IS NOT NULL AND boot <> ?", [boot_id()])?;
        for table in ["cache", "layers"] {
            let sql = format!("DELETE FROM {table} WHERE snapshot NOT IN (SELECT id FROM snapshots) AND snapshot <> ?");
            transaction.execute(&sql, [SnapshotId::scratch().0.as_str()])?;
        }
        let sql = "UPDATE images SET root = NULL WHERE root NOT IN (SELECT id FROM snapshots) AND root <> ?";
        transaction.execute(sql, [SnapshotId::scratch().0.as_str()])?;
        Ok(())
    })
}

/// The store as it was at one moment.
struct Facts {
    snapshots: HashMap<String, SnapshotRow>,
    cache: Vec<CacheRow>,
    images: Vec<ImageRow>,
    pinned: Vec<String>,
    indexes: Vec<String>,
    /// diff id, blob.
    encodings: Vec<(String, String)>,
    /// snapshot, diff id.
    layers: Vec<(String, String)>,
    blobs: Vec<(Digest, u64, FileTime)>,
    /// Blobs touched at or after this are in use.
    blob_horizon: FileTime,
}

struct SnapshotRow {
    parent: Option<String>,
    size_bytes: u64,
    /// What the compressed forms of its layer take here: they go with it.
    blob_bytes: u64,
}

struct CacheRow {
    key: String,
    snapshot: String,
    used: i64,
}

struct ImageRow {
    id: String,
    manifest: Option<String>,
    root: Option<String>,
    used: i64,
    tagged: bool,
}

impl Facts {
    fn gather(store: &Store) -> Result<Facts> {
        // Blobs first: who writes one afterwards is younger than the horizon.
        let blobs = store.content().list_with_time()?;
        let mut facts = store.database().try_transaction(|transaction| {
            let snapshots = rows(transaction, "SELECT id, parent, size_bytes FROM snapshots", |row| {
                let size_bytes = row.get::<_, i64>(2)?.unsigned_abs();
                Ok((row.get(0)?, SnapshotRow { parent: row.get(1)?, size_bytes, blob_bytes: 0 }))
            })?;
            let cache = rows(transaction, "SELECT key, snapshot, used FROM cache ORDER BY used", |row| {
                Ok(CacheRow { key: row.get(0)?, snapshot: row.get(1)?, used: row.get(2)? })
            })?;
            let sql = "SELECT id, manifest, root, used, id IN (SELECT image FROM tags) FROM images ORDER BY used";
            let images = rows(transaction, sql, |row| {
                let (id, manifest, root) = (row.get(0)?, row.get(1)?, row.get(2)?);
                Ok(ImageRow { id, manifest, root, used: row.get(3)?, tagged: row.get(4)? })
            })?;
            let pair = |row: &rusqlite::Row| Ok((row.get(0)?, row.get(1)?));
            let pins: Vec<(String, String)> = rows(transaction, "SELECT session, snapshot FROM pins", pair)?;
            // Who pinned something was alive then: whether it still is must be asked after the pins are read.
            let living = session::living(store.root())?;
            let grace = (now() - BLOB_GRACE_SECONDS, 0);
            let blob_horizon = living.iter().filter_map(|(_, since)| *since).fold(grace, FileTime::min);
            let alive = |name: &String| living.iter().any(|(living, _)| living == name);
            let sql = "SELECT DISTINCT index_digest FROM tags WHERE index_digest IS NOT NULL";
            Ok(Facts {
                snapshots: snapshots.into_iter().collect(),
                cache,
                images,
                pinned: pins.into_iter().filter(|(name, _)| alive(name)).map(|(_, snapshot)| snapshot).collect(),
                indexes: rows(transaction, sql, |row| row.get(0))?,
                encodings: rows(transaction, "SELECT diff_id, blob FROM encodings", pair)?,
                layers: rows(transaction, "SELECT snapshot, diff_id FROM layers", pair)?,
                blobs,
                blob_horizon,
            })
        })?;
        facts.weigh_layers();
        Ok(facts)
    }

    fn weigh_layers(&mut self) {
        let sizes: HashMap<&str, u64> = self.blobs.iter().map(|(blob, size, _)| (blob.as_str(), *size)).collect();
        let mut layers: HashMap<&String, u64> = HashMap::new();
        for (diff_id, blob) in &self.encodings {
            *layers.entry(diff_id).or_default() += sizes.get(blob.as_str()).copied().unwrap_or_default();
        }
        for (snapshot, diff_id) in &self.layers {
            if let (Some(row), Some(bytes)) = (self.snapshots.get_mut(snapshot), layers.remove(diff_id)) {
                row.blob_bytes = bytes;
            }
        }
    }

    /// Whether a living session may have it in hand, such as an image between its making and its tag.
    fn in_use(&self, touched: &FileTime) -> bool {
        *touched >= self.blob_horizon
    }

    /// The images that are neither tagged nor in anybody's hands.
    fn loose_images(&self) -> Vec<&ImageRow> {
        let in_use: HashSet<&str> =
            self.blobs.iter().filter(|(.., touched)| self.in_use(touched)).map(|(blob, ..)| blob.as_str()).collect();
        self.images.iter().filter(|image| !image.tagged && !in_use.contains(image.id.as_str())).collect()
    }
}

fn rows<T>(
    connection: &Connection,
    sql: &str,
    read: impl FnMut(&rusqlite::Row) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    connection.prepare(sql)?.query_map([], read)?.collect()
}

/// What is to go.
struct Plan {
    cache: HashSet<String>,
    images: HashSet<String>,
    /// Children before parents.
    snapshots: Vec<String>,
    blobs: HashSet<Digest>,
    /// The layers that something still leads to.
    diff_ids: HashSet<String>,
}

/// Something in the cache, the oldest first.
enum Evictable<'a> {
    Record(&'a CacheRow),
    Image(&'a ImageRow),
}

impl Evictable<'_> {
    fn used(&self) -> i64 {
        match self {
            Evictable::Record(row) => row.used,
            Evictable::Image(row) => row.used,
        }
    }
}

fn plan(store: &Store, facts: &Facts, options: &PruneOptions) -> Result<Plan> {
    let mut references = References::count(facts);
    let mut cache = HashSet::new();
    let mut images = HashSet::new();
    // An image that was built here and has lost its tag was replaced by a newer build of it.
    for image in facts.loose_images().into_iter().filter(|image| image.manifest.is_none()) {
        images.insert(image.id.clone());
        references.release(image.root.as_ref());
    }
    if options.evicts() {
        let oldest = options.older_than.map(|age| now() - i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
        // Blobs of layers are weighed with their snapshots; the others stay as long as their images.
        let layer_bytes: u64 = facts.snapshots.values().map(|row| row.blob_bytes).sum();
        let other_bytes = facts.blobs.iter().map(|(_, size, _)| size).sum::<u64>().saturating_sub(layer_bytes);
        for candidate in evictable(facts) {
            if oldest.is_some_and(|oldest| candidate.used() > oldest) {
                break;
            }
            if options.keep_bytes.is_some_and(|keep| references.bytes + other_bytes <= keep) {
                break;
            }
            match candidate {
                Evictable::Record(row) => {
                    cache.insert(row.key.clone());
                    references.release(Some(&row.snapshot));
                }
                Evictable::Image(image) => {
                    images.insert(image.id.clone());
                    references.release(image.root.as_ref());
                }
            }
        }
    }
    let snapshots = references.freed;
    let gone: HashSet<&String> = snapshots.iter().collect();
    // A record whose snapshot goes without it (it has no worth of its own) goes too.
    cache.extend(facts.cache.iter().filter(|row| gone.contains(&row.snapshot)).map(|row| row.key.clone()));
    let kept: Vec<&ImageRow> = facts.images.iter().filter(|image| !images.contains(&image.id)).collect();
    let diff_ids = kept_diff_ids(store, facts, &kept, &gone)?;
    let blobs = unreferenced_blobs(store, facts, &kept, &diff_ids)?;
    Ok(Plan { cache, images, snapshots, blobs, diff_ids })
}

fn evictable(facts: &Facts) -> Vec<Evictable<'_>> {
    let pulled = facts.loose_images().into_iter().filter(|image| image.manifest.is_some());
    let mut all: Vec<_> = facts.cache.iter().map(Evictable::Record).chain(pulled.map(Evictable::Image)).collect();
    all.sort_by_key(Evictable::used);
    all
}

/// How many things keep each snapshot: children, records, images, sessions. At zero it is free, and lets go of
/// its parent.
struct References<'a> {
    facts: &'a Facts,
    counts: HashMap<&'a String, usize>,
    /// Children before parents.
    freed: Vec<String>,
    /// What the snapshots that are not freed take, with their layers' blobs.
    bytes: u64,
}

impl<'a> References<'a> {
    fn count(facts: &'a Facts) -> References<'a> {
        let mut counts: HashMap<&String, usize> = facts.snapshots.keys().map(|id| (id, 0)).collect();
        let parents = facts.snapshots.values().filter_map(|row| row.parent.as_ref());
        let records = facts.cache.iter().map(|row| &row.snapshot);
        let roots = facts.images.iter().filter_map(|image| image.root.as_ref());
        for kept in parents.chain(records).chain(roots).chain(&facts.pinned) {
            if let Some(count) = counts.get_mut(kept) {
                *count += 1;
            }
        }
        let unused: Vec<&String> = counts.iter().filter(|(_, count)| **count == 0).map(|(id, _)| *id).collect();
        let bytes = facts.snapshots.values().map(|row| row.size_bytes + row.blob_bytes).sum();
        let mut references = References { facts, counts, freed: Vec::new(), bytes };
        for id in unused {
            references.free(id);
        }
        references
    }

    fn release(&mut self, id: Option<&String>) {
        if let Some(count) = id.and_then(|id| self.counts.get_mut(id)) {
            *count -= 1;
            if *count == 0
                && let Some(id) = id
            {
                self.free(id);
            }
        }
    }

    fn free(&mut self, id: &String) {
        let mut next = Some(id);
        while let Some(id) = next.take() {
            let Some(row) = self.facts.snapshots.get(id) else { return };
            self.freed.push(id.clone());
            self.bytes -= row.size_bytes + row.blob_bytes;
            let Some(parent) = row.parent.as_ref() else { return };
            if let Some(count) = self.counts.get_mut(parent) {
                *count -= 1;
                next = (*count == 0).then_some(parent);
            }
        }
    }
}

/// The layers of the images and snapshots that stay.
fn kept_diff_ids(
    store: &Store,
    facts: &Facts,
    images: &[&ImageRow],
    gone: &HashSet<&String>,
) -> Result<HashSet<String>> {
    let snapshots = facts.layers.iter().filter(|(snapshot, _)| !gone.contains(snapshot));
    let mut kept: HashSet<String> = snapshots.map(|(_, diff_id)| diff_id.clone()).collect();
    for image in images {
        // Without its configuration an image leads nowhere; what is wrong with it, its user is told.
        let Some(bytes) = image.id.parse().ok().map(|id| read_quietly(store, &id)).transpose()?.flatten() else {
            continue;
        };
        if let Ok(config) = serde_json::from_slice::<ImageConfig>(&bytes) {
            kept.extend(config.rootfs.diff_ids.iter().map(ToString::to_string));
        }
    }
    Ok(kept)
}

fn unreferenced_blobs(
    store: &Store,
    facts: &Facts,
    images: &[&ImageRow],
    diff_ids: &HashSet<String>,
) -> Result<HashSet<Digest>> {
    let encodings = facts.encodings.iter().filter(|(diff_id, _)| diff_ids.contains(diff_id));
    let mut kept: HashSet<String> = encodings.map(|(_, blob)| blob.clone()).collect();
    kept.extend(images.iter().map(|image| image.id.clone()));
    for manifest in images.iter().filter_map(|image| image.manifest.as_ref()).chain(&facts.indexes) {
        follow_manifest(store, manifest, &mut kept, MANIFEST_DEPTH)?;
    }
    let unreferenced =
        facts.blobs.iter().filter(|(digest, _, touched)| !kept.contains(digest.as_str()) && !facts.in_use(touched));
    Ok(unreferenced.map(|(digest, ..)| digest.clone()).collect())
}

/// Keeps a manifest or index that is here, and all that it names.
fn follow_manifest(store: &Store, digest: &str, kept: &mut HashSet<String>, depth: u32) -> Result<()> {
    if !kept.insert(digest.to_owned()) || depth == 0 {
        return Ok(());
    }
    let Ok(name) = digest.parse::<Digest>() else { return Ok(()) };
    let bytes = match read_quietly(store, &name)? {
        Some(bytes) => bytes,
        None => return Ok(()),
    };
    let Ok(manifest) = serde_json::from_slice::<Value>(&bytes) else { return Ok(()) };
    let digest_of = |descriptor: &Value| descriptor.get("digest").and_then(Value::as_str).map(str::to_owned);
    let listed = |key: &str| manifest.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    kept.extend(manifest.get("config").and_then(digest_of));
    kept.extend(listed("layers").iter().filter_map(digest_of));
    for child in listed("manifests").iter().filter_map(digest_of) {
        follow_manifest(store, &child, kept, depth - 1)?;
    }
    Ok(())
}

/// A manifest's or configuration's bytes without counting as a use of it; none where there is nothing to read.
fn read_quietly(store: &Store, digest: &Digest) -> Result<Option<Vec<u8>>> {
    let path = store.content().path(digest);
    match fs::metadata(&path) {
        Ok(metadata) if metadata.len() <= MANIFEST_LIMIT_BYTES => Ok(Some(fs::read(&path).context("read", &path)?)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("look at", &path),
    }
}

fn remove_records(store: &Store, facts: &Facts, plan: &Plan, pruned: &mut Pruned) -> Result<()> {
    store.database().transaction(|transaction| {
        for row in facts.cache.iter().filter(|row| plan.cache.contains(&row.key)) {
            // One that was used since the plan was made stays.
            let sql = "DELETE FROM cache WHERE key = ? AND used <= ?";
            pruned.cache_records += transaction.prepare_cached(sql)?.execute(params![row.key, row.used])? as u64;
        }
        for image in facts.images.iter().filter(|image| plan.images.contains(&image.id)) {
            let sql = "DELETE FROM images WHERE id = ?1 AND used <= ?2 AND NOT EXISTS
                (SELECT 1 FROM tags WHERE image = ?1)";
            if transaction.prepare_cached(sql)?.execute(params![image.id, image.used])? > 0 {
                pruned.images.extend(image.id.parse::<Digest>());
            }
        }
        Ok(())
    })
}

fn remove_snapshots(store: &Store, facts: &Facts, plan: &Plan, pruned: &mut Pruned) -> Result<()> {
    for id in &plan.snapshots {
        // Somebody may have come to use it, or keep it, since the plan was made.
        let sql = "SELECT EXISTS (SELECT 1 FROM cache WHERE snapshot = ?1)
            OR EXISTS (SELECT 1 FROM images WHERE root = ?1)";
        if store.database().with(|connection| connection.query_row(sql, [id], |row| row.get(0)))? {
            continue;
        }
        let snapshot = crate::snapshot::parse_id(id)?;
        match store.snapshots().remove(&snapshot) {
            Ok(()) => {
                pruned.bytes += facts.snapshots.get(id).map_or(0, |row| row.size_bytes);
                pruned.snapshots.push(snapshot);
            }
            Err(Error::SnapshotInUse { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn remove_blobs(store: &Store, facts: &Facts, plan: &Plan, pruned: &mut Pruned) -> Result<()> {
    for (digest, size, touched) in facts.blobs.iter().filter(|(digest, ..)| plan.blobs.contains(digest)) {
        let path = store.content().path(digest);
        let aside = store.root().join("trash").join(session::unique_name());
        match fs::rename(&path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result.context("remove", &path)?,
        }
        let metadata = fs::metadata(&aside).context("look at", &aside)?;
        if session::modified(&metadata) > *touched {
            fs::rename(&aside, &path).context("put back", &path)?;
            continue;
        }
        pruned.blobs.push(digest.clone());
        pruned.bytes += size;
    }
    Ok(())
}

/// What is known of layers that nothing leads to any more.
fn forget_encodings(store: &Store, plan: &Plan) -> Result<()> {
    store.database().transaction(|transaction| {
        let known: Vec<String> = rows(transaction, "SELECT DISTINCT diff_id FROM encodings", |row| row.get(0))?;
        for diff_id in known.iter().filter(|diff_id| !plan.diff_ids.contains(*diff_id)) {
            // A layer that was recorded since the plan was made is in use.
            let sql = "DELETE FROM encodings WHERE diff_id = ?1 AND NOT EXISTS
                (SELECT 1 FROM layers WHERE diff_id = ?1)";
            transaction.prepare_cached(sql)?.execute([diff_id])?;
        }
        transaction.execute("DELETE FROM origins WHERE blob NOT IN (SELECT blob FROM encodings)", [])?;
        Ok(())
    })
}

/// Directories without a row, which a crash between rename and commit left.
fn remove_stray_directories(store: &Store) -> Result<()> {
    let snapshots = store.root().join("snapshots");
    for entry in fs::read_dir(&snapshots).context("read", &snapshots)? {
        let name = entry.context("read", &snapshots)?.file_name();
        let digest = name.to_str().map(|hex| format!("sha256:{hex}").parse::<Digest>());
        let Some(Ok(digest)) = digest else { continue };
        let sql = "SELECT 1 FROM snapshots WHERE id = ?";
        let listed = |connection: &Connection| connection.query_row(sql, [digest.as_str()], |_| Ok(())).optional();
        if store.database().with(listed)?.is_none() {
            discard_unless_listed(store.root(), store.database(), &SnapshotId(digest))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Platform;
    use crate::{Driver, Encoding, OpenOptions, StoredImage};

    struct Bench {
        directory: tempfile::TempDir,
    }

    fn snapshot(name: &str) -> SnapshotId {
        SnapshotId(Digest::of(name))
    }

    impl Bench {
        fn new() -> Bench {
            Bench { directory: tempfile::tempdir().unwrap() }
        }

        /// A process's view of the store. Dropped, its session ends.
        fn open(&self) -> Store {
            Store::open_with(self.directory.path(), OpenOptions { driver: Some(Driver::Plain) }).unwrap()
        }

        /// A snapshot of one file of 64 KiB, and its layer of `blob`.
        fn step(&self, store: &Store, parent: Option<&str>, name: &str) {
            let active = store.snapshots().prepare(parent.map(snapshot).as_ref()).unwrap();
            fs::write(active.root().join(name), vec![1; 65536]).unwrap();
            store.snapshots().commit(active, snapshot(name)).unwrap();
            let diff_id = Digest::of(format!("layer {name}"));
            let blob = store.content().put(format!("blob {name}").as_bytes()).unwrap();
            let layer = crate::Layer { diff_id: diff_id.clone(), size_bytes: 100, entries: 1 };
            store.catalog().set_layer(&snapshot(name), &layer, None).unwrap();
            let encoding = Encoding { media_type: "gzip".to_owned(), level: Some(1), blob, size_bytes: 9 };
            store.catalog().add_encoding(&diff_id, &encoding).unwrap();
        }

        fn cache(&self, store: &Store, key: &str, name: &str, used: i64) {
            let sql = "INSERT INTO cache VALUES (?, ?, NULL, NULL, 0, ?)";
            let id = snapshot(name).0;
            store.database().with(|connection| connection.execute(sql, params![key, id.as_str(), used])).unwrap();
        }

        fn image(&self, store: &Store, root: &str, manifest: Option<&[u8]>) -> Digest {
            let config =
                format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#, Digest::of(format!("layer {root}")));
            let image = StoredImage {
                id: store.content().put(config.as_bytes()).unwrap(),
                manifest: manifest.map(|bytes| store.content().put(bytes).unwrap()),
                platform: Platform::new("linux", "amd64", None),
                created: None,
                root: Some(snapshot(root)),
            };
            store.catalog().put(&image).unwrap();
            image.id
        }

        /// Ends the sessions so far: as if time had passed since the blobs were touched.
        fn age(&self) {
            for (digest, ..) in self.open().content().list_with_time().unwrap() {
                let blob = fs::File::open(self.open().content().path(&digest)).unwrap();
                blob.set_modified(std::time::UNIX_EPOCH).unwrap();
            }
        }

        fn prune(&self, options: PruneOptions) -> Pruned {
            prune(&self.open(), &options).unwrap()
        }

        fn left(&self) -> Vec<String> {
            let store = self.open();
            let names = ["a", "b", "c", "d"].into_iter();
            names.filter(|name| store.snapshots().get(&snapshot(name)).unwrap().is_some()).map(str::to_owned).collect()
        }

        fn has_blob(&self, name: &str) -> bool {
            self.open().content().path(&Digest::of(format!("blob {name}"))).exists()
        }
    }

    const ALL: PruneOptions = PruneOptions { all: true, older_than: None, keep_bytes: None };

    #[test]
    fn what_is_tagged_stays_and_what_nothing_leads_to_goes() {
        let bench = Bench::new();
        let store = bench.open();
        bench.step(&store, None, "a");
        bench.step(&store, Some("a"), "b");
        bench.step(&store, Some("a"), "c");
        bench.step(&store, None, "d");
        bench.cache(&store, "key", "c", 5);
        let image = bench.image(&store, "b", None);
        store.catalog().tag(&"app".parse().unwrap(), &[image], None).unwrap();
        drop(store);
        bench.age();

        let pruned = bench.prune(PruneOptions::default());
        assert_eq!((pruned.snapshots, pruned.cache_records), (vec![snapshot("d")], 0));
        assert!(pruned.bytes > 65536);
        assert_eq!(bench.left(), ["a", "b", "c"]);
        assert_eq!(["a", "b", "c", "d"].map(|name| bench.has_blob(name)), [true, true, true, false]);

        bench.age();
        let pruned = bench.prune(ALL);
        assert_eq!((pruned.snapshots, pruned.cache_records), (vec![snapshot("c")], 1));
        assert_eq!(bench.left(), ["a", "b"]);
        assert!(!bench.has_blob("c") && bench.has_blob("b"));

        // Its tag gone, an image that was built here is nobody's.
        assert!(bench.open().catalog().untag(&"app".parse().unwrap()).unwrap());
        bench.age();
        assert_eq!(bench.prune(PruneOptions::default()).images.len(), 1);
        assert_eq!(bench.left(), [""; 0]);
        assert_eq!(bench.open().content().list().unwrap(), []);
        assert_eq!(usage(&bench.open()).unwrap(), Usage::default());
        for directory in ["trash", "snapshots", "active", "locks"] {
            let path = bench.directory.path().join(directory);
            assert_eq!(fs::read_dir(&path).unwrap().count(), 0, "{directory}");
        }
    }

    #[test]
    fn the_cache_goes_by_age_or_until_it_fits() {
        let full = || {
            let bench = Bench::new();
            let store = bench.open();
            for (name, used) in [("a", 10), ("b", 20), ("c", now())] {
                bench.step(&store, None, name);
                bench.cache(&store, name, name, used);
            }
            drop(store);
            bench.age();
            bench
        };
        let bench = full();
        let hour = Some(Duration::from_secs(3600));
        bench.prune(PruneOptions { older_than: hour, ..PruneOptions::default() });
        assert_eq!(bench.left(), ["c"]);

        let bench = full();
        let total = usage(&bench.open()).unwrap();
        assert_eq!(total.snapshots.reclaimable_bytes, total.snapshots.bytes);
        let keep_bytes = Some(total.snapshots.bytes + total.blobs.bytes - 1);
        bench.prune(PruneOptions { keep_bytes, ..PruneOptions::default() });
        assert_eq!(bench.left(), ["b", "c"]);
    }

    #[test]
    fn what_a_living_session_uses_stays() {
        let bench = Bench::new();
        let store = bench.open();
        bench.step(&store, None, "a");
        bench.step(&store, Some("a"), "b");
        let image = bench.image(&store, "b", None);
        let pruned = bench.prune(ALL);
        assert_eq!(pruned, Pruned::default());
        store.catalog().tag(&"late".parse().unwrap(), &[image], None).unwrap();
        drop(store);
        bench.age();
        // Another process has merely asked for it.
        let other = bench.open();
        bench.step(&other, None, "d");
        drop(other);
        let asking = bench.open();
        asking.snapshots().get(&snapshot("d")).unwrap().unwrap();
        assert_eq!(asking.content().size(&Digest::of("blob d")).unwrap(), Some(6));
        assert_eq!(bench.prune(ALL).snapshots, []);
        assert!(bench.has_blob("d"));
        drop(asking);
        bench.age();
        assert_eq!(bench.prune(ALL).snapshots, [snapshot("d")]);
        assert!(!bench.has_blob("d"));
    }

    /// Builds go on while everything that they do not hold is taken from under them.
    #[test]
    fn pruning_never_disturbs_a_build() {
        let bench = Bench::new();
        let build = |builder: usize| {
            for round in 0..12 {
                let store = bench.open();
                let mut parent: Option<SnapshotId> = None;
                for step in 0..4 {
                    let id = snapshot(&format!("step {step}"));
                    let name = format!("builder {builder} round {round} step {step}");
                    let blob = store.content().put(format!("shared blob {step}").as_bytes()).unwrap();
                    if store.snapshots().get(&id).unwrap().is_none() {
                        let active = store.snapshots().prepare(parent.as_ref()).expect(&name);
                        fs::write(active.root().join(step.to_string()), "x").unwrap();
                        store.snapshots().commit(active, id.clone()).expect(&name);
                    }
                    assert!(store.content().size(&blob).unwrap().is_some(), "{name}");
                    parent = Some(id);
                }
                let view = store.snapshots().view(&parent.unwrap()).unwrap();
                assert_eq!(fs::read_dir(view.root()).unwrap().count(), 4);
            }
        };
        std::thread::scope(|scope| {
            let builders: Vec<_> = (0..3).map(|builder| scope.spawn(move || build(builder))).collect();
            while !builders.iter().all(|builder| builder.is_finished()) {
                bench.prune(ALL);
            }
        });
        bench.age();
        bench.prune(ALL);
        assert_eq!(usage(&bench.open()).unwrap(), Usage::default());
    }

    #[test]
    fn pulled_images_keep_what_their_manifests_name() {
        let bench = Bench::new();
        let store = bench.open();
        bench.step(&store, None, "a");
        let layer = store.content().put(b"compressed, not unpacked").unwrap();
        let manifest = format!(r#"{{"layers":[{{"digest":"{layer}"}}]}}"#);
        let image = bench.image(&store, "a", Some(manifest.as_bytes()));
        let index = format!(r#"{{"manifests":[{{"digest":"{}"}}]}}"#, Digest::of(&manifest));
        let index = store.content().put(index.as_bytes()).unwrap();
        store.catalog().tag(&"base".parse().unwrap(), &[image], Some(&index)).unwrap();
        drop(store);
        bench.age();
        assert_eq!(bench.prune(ALL), Pruned::default());
        bench.open().catalog().untag(&"base".parse().unwrap()).unwrap();
        bench.age();
        // As the base of a build it is cache now: without the tag, the index is nobody's.
        assert_eq!(bench.prune(PruneOptions::default()).blobs, [index]);
        bench.age();
        assert_eq!(bench.prune(ALL).blobs.len(), 4);
    }
}
