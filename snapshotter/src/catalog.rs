//! Images and their tags, and what is known of layers: the part of the database that is about images.
//!
//! ```text
//! tag (reference, platform) -> image (its config's digest) -> root snapshot -> ... -> base
//!                                                               |
//!                                          layer (diff id) <----+---> encodings (blobs) -> origins (registries)
//! ```
//! An image is named by the digest of its configuration, whose bytes are in the content store. A tag names one
//! image per platform. A layer is a snapshot's changes as a tar; its encodings are the compressed forms known,
//! here or elsewhere; an origin is a repository that has a blob, to fetch it from or to mount it.

mod layers;

use std::str::FromStr;

use rusqlite::{OptionalExtension, Row, named_params, params};

use crate::database::now;
use crate::image::{ImageConfig, Platform, Reference};
use crate::{Database, Digest, Error, Result, SnapshotId, Store};

pub use layers::{Layer, Recipe};

/// OCI sets no limit for a configuration; this is what registries take for a manifest, twice over.
const CONFIG_LIMIT_BYTES: u64 = 8 * 1024 * 1024;
/// As in docker, fewer hex digits are not looked up as the beginning of an id.
const ID_PREFIX_MIN: usize = 4;
const NEAR_NAMES_MAX: usize = 3;
/// `used` is written anew when it is older than this.
const USED_RESOLUTION_SECONDS: i64 = 60;

pub struct Catalog<'a> {
    store: &'a Store,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredImage {
    /// The digest of the configuration.
    pub id: Digest,
    /// The manifest it was pulled with; its exact bytes are in the content store. None for what was built here.
    pub manifest: Option<Digest>,
    pub platform: Platform,
    /// As the configuration says it.
    pub created: Option<String>,
    /// None until its layers are unpacked.
    pub root: Option<SnapshotId>,
}

/// What a name or an id stood for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// None where it was an id.
    pub name: Option<Reference>,
    pub image: StoredImage,
}

/// A form in which a layer travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoding {
    pub media_type: String,
    /// None where somebody else compressed it.
    pub level: Option<i32>,
    pub blob: Digest,
    pub size_bytes: u64,
}

const IMAGE_COLUMNS: &str = "images.id, images.manifest, images.platform, images.created, images.root";

impl<'a> Catalog<'a> {
    pub(crate) fn new(store: &'a Store) -> Catalog<'a> {
        Catalog { store }
    }

    fn database(&self) -> &Database {
        self.store.database()
    }

    /// Adds an image. Of one that is there already, a manifest or root that it had is kept where `image` has none.
    pub fn put(&self, image: &StoredImage) -> Result<()> {
        let platform = image.platform.to_string();
        // Configurations come from anywhere, and a row that cannot be read would spoil every list of images.
        if let Err(error) = platform.parse::<Platform>() {
            return Err(Error::Record { what: format!("configuration {}", image.id), reason: error.to_string() });
        }
        let sql = "INSERT INTO images (id, manifest, platform, root, created, used)
            VALUES (:id, :manifest, :platform, :root, :created, :now)
            ON CONFLICT (id) DO UPDATE SET manifest = coalesce(excluded.manifest, manifest),
                platform = excluded.platform, root = coalesce(excluded.root, root),
                created = excluded.created, used = excluded.used";
        self.database().with(|connection| {
            connection.prepare_cached(sql)?.execute(named_params! {
                ":id": image.id.as_str(),
                ":manifest": image.manifest.as_ref().map(Digest::as_str),
                ":platform": platform,
                ":root": image.root.as_ref().map(|root| root.0.as_str()),
                ":created": image.created,
                ":now": now(),
            })?;
            Ok(())
        })
    }

    pub fn get(&self, id: &Digest) -> Result<Option<StoredImage>> {
        let sql = format!("SELECT {IMAGE_COLUMNS} FROM images WHERE id = ?");
        let image = self.database().with(|connection| {
            let touch = "UPDATE images SET used = ?2 WHERE id = ?1 AND used < ?2 - ?3";
            connection.prepare_cached(touch)?.execute(params![id.as_str(), now(), USED_RESOLUTION_SECONDS])?;
            connection.prepare_cached(&sql)?.query_row([id.as_str()], StoredImage::from_row).optional()
        })?;
        Ok(image)
    }

    pub fn config(&self, id: &Digest) -> Result<ImageConfig> {
        let bytes = self.store.content().read(id, CONFIG_LIMIT_BYTES)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::Record { what: format!("configuration {id}"), reason: error.to_string() })
    }

    /// Makes `name` mean these images, one per platform, and nothing else.
    pub fn tag(&self, name: &Reference, images: &[Digest], index: Option<&Digest>) -> Result<()> {
        let reference = name.to_string();
        self.database().try_transaction(|transaction| {
            transaction.prepare_cached("DELETE FROM tags WHERE reference = ?")?.execute([&reference])?;
            for image in images {
                let sql = "INSERT OR REPLACE INTO tags (reference, platform, image, index_digest, created)
                    SELECT ?, platform, id, ?, ? FROM images WHERE id = ?";
                let values = params![reference, index.map(Digest::as_str), now(), image.as_str()];
                if transaction.prepare_cached(sql)?.execute(values)? == 0 {
                    return Err(Error::UnknownImage { text: image.to_string(), near: Vec::new() });
                }
            }
            Ok(())
        })
    }

    /// Whether there was such a tag. The images stay.
    pub fn untag(&self, name: &Reference) -> Result<bool> {
        let sql = "DELETE FROM tags WHERE reference = ?";
        Ok(self.database().with(|connection| connection.execute(sql, [name.to_string()]))? > 0)
    }

    /// The images of a tag, one per platform; none where there is no such tag.
    pub fn tagged(&self, name: &Reference) -> Result<Vec<StoredImage>> {
        let sql = format!(
            "SELECT {IMAGE_COLUMNS} FROM tags JOIN images ON images.id = tags.image
            WHERE tags.reference = ? ORDER BY tags.platform"
        );
        self.database().with(|connection| {
            connection.prepare_cached(&sql)?.query_map([name.to_string()], StoredImage::from_row)?.collect()
        })
    }

    /// The index that a tag was made or pulled with.
    pub fn index(&self, name: &Reference) -> Result<Option<Digest>> {
        let sql = "SELECT index_digest FROM tags WHERE reference = ? AND index_digest IS NOT NULL LIMIT 1";
        self.database().with(|connection| {
            connection.prepare_cached(sql)?.query_row([name.to_string()], |row| digest(row, 0)).optional()
        })
    }

    /// A name (for the platform), else an id or the beginning of one.
    pub fn resolve(&self, text: &str, platform: &Platform) -> Result<Resolved> {
        if let Ok(name) = Reference::from_str(text)
            && let Some(image) = self.by_name(&name, text, platform)?
        {
            return Ok(Resolved { name: Some(name), image });
        }
        if let Some(image) = self.by_id(text)? {
            return Ok(Resolved { name: None, image });
        }
        Err(Error::UnknownImage { text: text.to_owned(), near: self.near(text)? })
    }

    fn by_name(&self, name: &Reference, text: &str, platform: &Platform) -> Result<Option<StoredImage>> {
        let mut images = self.tagged(name)?;
        if images.is_empty()
            && let Some(digest) = name.digest()
        {
            images = self.by_digest(digest)?;
        }
        if images.is_empty() {
            return Ok(None);
        }
        let there = images.iter().map(|image| image.platform.to_string()).collect();
        let same_machine = |image: &StoredImage| {
            image.platform.os == platform.os && image.platform.architecture == platform.architecture
        };
        let exact = images.iter().position(|image| image.platform == *platform);
        match exact.or_else(|| images.iter().position(same_machine)) {
            Some(found) => Ok(Some(images.swap_remove(found))),
            None => Err(Error::OtherPlatform { text: text.to_owned(), platform: platform.to_string(), there }),
        }
    }

    /// By the digest of a manifest, of an index, or of the configuration itself.
    fn by_digest(&self, digest: &Digest) -> Result<Vec<StoredImage>> {
        let sql = format!(
            "SELECT {IMAGE_COLUMNS} FROM images WHERE id = ?1 OR manifest = ?1
            OR id IN (SELECT image FROM tags WHERE index_digest = ?1) ORDER BY platform"
        );
        self.database().with(|connection| {
            connection.prepare_cached(&sql)?.query_map([digest.as_str()], StoredImage::from_row)?.collect()
        })
    }

    fn by_id(&self, text: &str) -> Result<Option<StoredImage>> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let is_hex = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !(ID_PREFIX_MIN..=64).contains(&hex.len()) || !is_hex {
            return Ok(None);
        }
        let sql = format!("SELECT {IMAGE_COLUMNS} FROM images WHERE id >= ?1 AND id < ?1 || 'g' ORDER BY id LIMIT 9");
        let prefix = format!("sha256:{hex}");
        let mut found: Vec<StoredImage> = self.database().with(|connection| {
            connection.prepare_cached(&sql)?.query_map([prefix], StoredImage::from_row)?.collect()
        })?;
        if found.len() > 1 {
            let matches = found.iter().map(|image| image.id.short().to_owned()).collect();
            return Err(Error::AmbiguousImage { text: text.to_owned(), matches });
        }
        Ok(found.pop())
    }

    /// Names that somebody who typed `text` may have meant, nearest first.
    fn near(&self, text: &str) -> Result<Vec<String>> {
        let mut names: Vec<String> = self.tags()?.into_iter().map(|(name, _)| name.familiar()).collect();
        names.dedup();
        let wanted = text.strip_suffix(":latest").unwrap_or(text);
        let mut near: Vec<(usize, String)> = names
            .into_iter()
            .filter_map(|name| {
                let plain = name.strip_suffix(":latest").unwrap_or(&name);
                let distance = match plain.contains(wanted) || wanted.contains(plain) {
                    true => 0,
                    false => edit_distance(wanted, plain),
                };
                (distance <= 1 + wanted.len().min(12) / 4).then_some((distance, plain.to_owned()))
            })
            .collect();
        near.sort();
        Ok(near.into_iter().take(NEAR_NAMES_MAX).map(|(_, name)| name).collect())
    }

    /// Every tag with its images, by name.
    pub fn tags(&self) -> Result<Vec<(Reference, StoredImage)>> {
        let sql = format!(
            "SELECT {IMAGE_COLUMNS}, tags.reference FROM tags JOIN images ON images.id = tags.image
            ORDER BY tags.reference, tags.platform"
        );
        self.database().with(|connection| {
            connection
                .prepare_cached(&sql)?
                .query_map([], |row| Ok((parsed(row, 5)?, StoredImage::from_row(row)?)))?
                .collect()
        })
    }

    /// Every image, tagged or not; the last used first.
    pub fn images(&self) -> Result<Vec<StoredImage>> {
        let sql = format!("SELECT {IMAGE_COLUMNS} FROM images ORDER BY used DESC, id");
        self.database()
            .with(|connection| connection.prepare_cached(&sql)?.query_map([], StoredImage::from_row)?.collect())
    }

    /// Forgets an image; what it was made of goes with the next GC. Refused while it is tagged.
    pub fn remove(&self, id: &Digest) -> Result<()> {
        self.database().try_transaction(|transaction| {
            let mut statement = transaction.prepare_cached("SELECT DISTINCT reference FROM tags WHERE image = ?")?;
            let tags: Vec<String> = statement.query_map([id.as_str()], |row| row.get(0))?.collect::<Result<_, _>>()?;
            if !tags.is_empty() {
                return Err(Error::ImageTagged { id: id.clone(), tags });
            }
            match transaction.execute("DELETE FROM images WHERE id = ?", [id.as_str()])? {
                0 => Err(Error::UnknownImage { text: id.to_string(), near: Vec::new() }),
                _ => Ok(()),
            }
        })
    }

    pub fn add_encoding(&self, diff_id: &Digest, encoding: &Encoding) -> Result<()> {
        // Who compressed it knows the level; who only met the blob later does not.
        let sql = "INSERT INTO encodings (diff_id, media_type, level, blob, size_bytes) VALUES (?, ?, ?, ?, ?)
            ON CONFLICT DO UPDATE SET level = coalesce(excluded.level, level), size_bytes = excluded.size_bytes";
        let size = i64::try_from(encoding.size_bytes).unwrap_or(i64::MAX);
        let (media_type, level, blob) = (&encoding.media_type, encoding.level, encoding.blob.as_str());
        self.database().with(|connection| {
            connection.prepare_cached(sql)?.execute(params![diff_id.as_str(), media_type, level, blob, size])?;
            Ok(())
        })
    }

    pub fn encodings(&self, diff_id: &Digest) -> Result<Vec<Encoding>> {
        let sql = "SELECT media_type, level, blob, size_bytes FROM encodings WHERE diff_id = ? ORDER BY rowid";
        self.database().with(|connection| {
            let encoding = |row: &Row| {
                let size_bytes = row.get::<_, i64>(3)?.unsigned_abs();
                Ok(Encoding { media_type: row.get(0)?, level: row.get(1)?, blob: digest(row, 2)?, size_bytes })
            };
            connection.prepare_cached(sql)?.query_map([diff_id.as_str()], encoding)?.collect()
        })
    }

    /// Records that the repository has the blob.
    pub fn add_origin(&self, blob: &Digest, registry: &str, repository: &str) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO origins (blob, registry, repository, used) VALUES (?, ?, ?, ?)";
        self.database().with(|connection| {
            connection.prepare_cached(sql)?.execute(params![blob.as_str(), registry, repository, now()])?;
            Ok(())
        })
    }

    /// `(registry, repository)` of those known to have the blob, the last seen first.
    pub fn origins(&self, blob: &Digest) -> Result<Vec<(String, String)>> {
        let sql = "SELECT registry, repository FROM origins WHERE blob = ? ORDER BY used DESC, registry, repository";
        self.database().with(|connection| {
            let origin = |row: &Row| Ok((row.get(0)?, row.get(1)?));
            connection.prepare_cached(sql)?.query_map([blob.as_str()], origin)?.collect()
        })
    }
}

impl StoredImage {
    fn from_row(row: &Row) -> rusqlite::Result<StoredImage> {
        let manifest: Option<String> = row.get(1)?;
        let root: Option<String> = row.get(4)?;
        Ok(StoredImage {
            id: digest(row, 0)?,
            manifest: manifest.map(|_| digest(row, 1)).transpose()?,
            platform: parsed(row, 2)?,
            created: row.get(3)?,
            root: root.map(|_| digest(row, 4)).transpose()?.map(SnapshotId),
        })
    }
}

fn digest(row: &Row, column: usize) -> rusqlite::Result<Digest> {
    parsed(row, column)
}

/// A column's text as what it stands for.
fn parsed<T>(row: &Row, column: usize) -> rusqlite::Result<T>
where
    T: FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text: String = row.get(column)?;
    text.parse().map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(error))
    })
}

/// Levenshtein's.
fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (done, from) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = done + 1;
        for (column, to) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        (directory, store)
    }

    fn image(name: &str, platform: &str) -> StoredImage {
        StoredImage {
            id: Digest::of(name),
            manifest: None,
            platform: platform.parse().unwrap(),
            created: Some("2026-01-02T03:04:05Z".to_owned()),
            root: Some(SnapshotId(Digest::of(format!("root of {name}")))),
        }
    }

    fn name(text: &str) -> Reference {
        text.parse().unwrap()
    }

    #[test]
    fn a_tag_names_one_image_per_platform_and_is_replaced_whole() {
        let (_directory, store) = store();
        let catalog = store.catalog();
        let (amd, arm, new) = (image("amd", "linux/amd64"), image("arm", "linux/arm64"), image("new", "linux/amd64"));
        for image in [&amd, &arm, &new] {
            catalog.put(image).unwrap();
        }
        let index = Digest::of("index");
        catalog.tag(&name("app"), &[amd.id.clone(), arm.id.clone()], Some(&index)).unwrap();
        assert_eq!(catalog.tagged(&name("app")).unwrap(), [amd.clone(), arm]);
        assert_eq!(catalog.index(&name("app")).unwrap(), Some(index));
        catalog.tag(&name("app"), std::slice::from_ref(&new.id), None).unwrap();
        assert_eq!(catalog.tagged(&name("docker.io/library/app:latest")).unwrap(), std::slice::from_ref(&new));
        assert_eq!(catalog.index(&name("app")).unwrap(), None);
        assert_eq!(catalog.tags().unwrap(), [(name("app"), new.clone())]);

        assert!(matches!(catalog.remove(&new.id), Err(Error::ImageTagged { .. })));
        assert!(catalog.untag(&name("app")).unwrap() && !catalog.untag(&name("app")).unwrap());
        catalog.remove(&new.id).unwrap();
        assert_eq!(catalog.get(&new.id).unwrap(), None);
        assert_eq!(catalog.images().unwrap().len(), 2);
        let unknown = catalog.tag(&name("app"), &[new.id], None);
        assert!(matches!(unknown, Err(Error::UnknownImage { .. })));
    }

    #[test]
    fn a_platform_that_is_none_is_refused_and_spoils_nothing() {
        let (_directory, store) = store();
        let catalog = store.catalog();
        for (os, architecture) in [("", ""), ("linux", ""), ("linux/", "amd64"), ("li nux", "amd64"), ("\n", "x")] {
            let platform = Platform::new(os, architecture, None);
            let refused = catalog.put(&StoredImage { platform, ..image("bad", "linux/amd64") });
            assert!(matches!(refused, Err(Error::Record { .. })), "{os:?} {architecture:?}");
        }
        catalog.put(&image("good", "linux/amd64")).unwrap();
        assert_eq!(catalog.images().unwrap().len(), 1);
    }

    #[test]
    fn putting_again_keeps_what_was_known() {
        let (_directory, store) = store();
        let manifest = Some(Digest::of("manifest"));
        let pulled = StoredImage { manifest, root: None, ..image("a", "linux/amd64") };
        store.catalog().put(&pulled).unwrap();
        store.catalog().put(&image("a", "linux/amd64")).unwrap();
        let both = store.catalog().get(&pulled.id).unwrap().unwrap();
        assert_eq!((both.manifest, both.root), (pulled.manifest, image("a", "linux/amd64").root));
    }

    #[test]
    fn names_ids_and_beginnings_resolve_or_say_what_is_near() {
        let (_directory, store) = store();
        let catalog = store.catalog();
        let web = StoredImage { manifest: Some(Digest::of("manifest")), ..image("web", "linux/amd64") };
        catalog.put(&web).unwrap();
        catalog.put(&image("other", "linux/arm64")).unwrap();
        catalog.tag(&name("web-server:v1"), std::slice::from_ref(&web.id), None).unwrap();
        catalog.tag(&name("foreign"), &[Digest::of("other")], None).unwrap();
        let platform = Platform::new("linux", "amd64", None);
        let found = |text: &str| catalog.resolve(text, &platform).map(|found| (found.name.is_some(), found.image.id));
        let by_manifest = format!("web-server@{}", Digest::of("manifest"));
        for (text, named) in [
            ("web-server:v1", true),
            (by_manifest.as_str(), true),
            (web.id.as_str(), false),
            (web.id.hex(), false),
            (web.id.short(), false),
            (&web.id.as_str()[..12], false),
        ] {
            assert_eq!(found(text).unwrap(), (named, web.id.clone()), "{text}");
        }
        for (text, expect) in [
            ("web-server:v2", "is it web-server:v1?"),
            ("wbe-server:v1", "is it web-server:v1?"),
            ("zzz", "no image \"zzz\" in the store"),
            ("foreign", "not there for linux/amd64, but for linux/arm64"),
            (&web.id.hex()[..3], "no image"),
        ] {
            let error = found(text).unwrap_err().to_string();
            assert!(error.contains(expect), "{text}: {error}");
        }
    }

    #[test]
    fn a_beginning_of_several_ids_is_refused() {
        let (_directory, store) = store();
        let catalog = store.catalog();
        for digit in ["1", "2"] {
            let id = format!("sha256:abcd{}", digit.repeat(60)).parse().unwrap();
            catalog.put(&StoredImage { id, ..image("x", "linux/amd64") }).unwrap();
        }
        let platform = Platform::new("linux", "amd64", None);
        let error = catalog.resolve("abcd", &platform).unwrap_err().to_string();
        assert!(error.contains("abcd11111111, abcd22222222"), "{error}");
        assert!(catalog.resolve("abcd1", &platform).is_ok());
    }

    #[test]
    fn layers_encodings_and_origins_are_remembered() {
        let (_directory, store) = store();
        let catalog = store.catalog();
        let (diff_id, snapshot, blob) = (Digest::of("tar"), SnapshotId(Digest::of("root")), Digest::of("gzip"));
        let layer = Layer { diff_id: diff_id.clone(), size_bytes: 2048, entries: 3 };
        catalog.set_layer(&snapshot, &layer, None).unwrap();
        let layer = Layer { diff_id: diff_id.clone(), size_bytes: 2048, entries: 3 };
        assert_eq!(catalog.layer_of(&snapshot, None).unwrap(), Some(layer));
        assert_eq!(catalog.recipes(&diff_id).unwrap(), [Recipe { snapshot, epoch: None }]);
        assert_eq!(catalog.recipes(&blob).unwrap(), []);
        assert_eq!(catalog.layer_size(&diff_id).unwrap(), Some(2048));

        let known = Encoding { media_type: "gzip".to_owned(), level: Some(6), blob: blob.clone(), size_bytes: 7 };
        catalog.add_encoding(&diff_id, &known).unwrap();
        catalog.add_encoding(&diff_id, &Encoding { level: None, ..known.clone() }).unwrap();
        assert_eq!(catalog.encodings(&diff_id).unwrap(), std::slice::from_ref(&known));
        // Of a layer that was never unpacked.
        let (pulled, larger) =
            (Digest::of("pulled"), Encoding { size_bytes: 70, blob: Digest::of("zstd"), ..known.clone() });
        assert_eq!(catalog.layer_size(&pulled).unwrap(), None);
        for encoding in [known, larger] {
            catalog.add_encoding(&pulled, &encoding).unwrap();
        }
        assert_eq!(catalog.layer_size(&pulled).unwrap(), Some(70));

        catalog.add_origin(&blob, "docker.io", "library/app").unwrap();
        catalog.add_origin(&blob, "docker.io", "library/app").unwrap();
        let origins = [("docker.io".to_owned(), "library/app".to_owned())];
        assert_eq!(catalog.origins(&blob).unwrap(), origins);
    }

    /// The same COPY over two bases gives one layer. It must outlive either of its snapshots.
    #[test]
    fn a_layer_that_two_snapshots_give_outlives_one_of_them() {
        let (_directory, store) = store();
        let layer = Layer { diff_id: Digest::of("tar"), size_bytes: 2048, entries: 3 };
        let snapshots = ["one", "two"].map(|name| {
            let active = store.snapshots().prepare(None).unwrap();
            std::fs::write(active.root().join(name), name).unwrap();
            let id = SnapshotId(Digest::of(name));
            store.snapshots().commit(active, id.clone()).unwrap();
            store.catalog().set_layer(&id, &layer, None).unwrap();
            id
        });
        for (gone, stays) in [(1, 0), (0, 1)] {
            store.catalog().set_layer(&snapshots[gone], &layer, None).unwrap();
            store.snapshots().remove(&snapshots[gone]).unwrap();
            assert_eq!(store.catalog().layer_of(&snapshots[stays], None).unwrap().as_ref(), Some(&layer));
            let recipe = Recipe { snapshot: snapshots[stays].clone(), epoch: None };
            assert_eq!(store.catalog().recipes(&layer.diff_id).unwrap(), [recipe]);
            let active = store.snapshots().prepare(None).unwrap();
            std::fs::write(active.root().join("again"), "x").unwrap();
            store.snapshots().commit(active, snapshots[gone].clone()).unwrap();
            store.catalog().set_layer(&snapshots[gone], &layer, None).unwrap();
        }
    }

    #[test]
    fn a_configuration_that_is_none_says_which() {
        let (_directory, store) = store();
        let id = store.content().put(b"[]").unwrap();
        let error = store.catalog().config(&id).unwrap_err().to_string();
        assert!(error.starts_with(&format!("configuration {id}: ")), "{error}");
        assert!(matches!(store.catalog().config(&Digest::of("x")), Err(Error::UnknownBlob(_))));
    }
}
