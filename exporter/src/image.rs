//! What an image is on the wire: documents, media types, and which of an index's images is meant.
//!
//! Docker's schema 2 and OCI's documents have the same shape, so one model reads both: `oci-spec`'s types, with the
//! media types of either world. What came from outside is kept byte for byte; what is written here is OCI unless
//! asked otherwise, and its bytes are a function of its content.

use std::fmt::Display;

use forge_snapshotter::Digest;
use forge_snapshotter::image::Platform;
pub use forge_snapshotter::layer::{Compression, MediaTypes};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::{Error, Result, blobs};

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

pub fn manifest_type(types: MediaTypes) -> &'static str {
    match types {
        MediaTypes::Oci => OCI_MANIFEST,
        MediaTypes::Docker => DOCKER_MANIFEST,
    }
}

pub fn index_type(types: MediaTypes) -> &'static str {
    match types {
        MediaTypes::Oci => OCI_INDEX,
        MediaTypes::Docker => DOCKER_LIST,
    }
}

pub fn config_type(types: MediaTypes) -> &'static str {
    match types {
        MediaTypes::Oci => OCI_CONFIG,
        MediaTypes::Docker => DOCKER_CONFIG,
    }
}

/// How a layer of this media type, of either world, is packed (at whatever level); `None` for what is not a layer that
/// forge would hand on: encrypted, foreign, unknown.
pub fn layer_compression(media_type: &str) -> Option<Compression> {
    [Compression::None, Compression::GZIP, Compression::ZSTD].into_iter().find(|compression| {
        [MediaTypes::Oci, MediaTypes::Docker].into_iter().any(|types| compression.media_type(types) == media_type)
    })
}

/// A layer that may not be handed on, or lives at a vendor's address: never copied.
pub fn is_foreign(layer: &Descriptor) -> bool {
    let media_type = layer.media_type().as_ref();
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}

pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_LIST)
}

pub fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// A parsed manifest or index. The bytes stay with whoever has them.
#[derive(Debug)]
pub enum Document {
    Index(Box<ImageIndex>),
    Manifest(Box<ImageManifest>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u32>,
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
}

impl Document {
    /// Tells the kind by what the document holds; a document that could be read as both kinds is refused
    /// (CVE-2021-41190: a registry and its client must not see different images behind one digest).
    pub fn parse(bytes: &[u8], name: impl Display) -> Result<Document> {
        let invalid = |reason: &dyn Display| Error::malformed(format!("manifest {name}"), reason);
        let probe: Probe = serde_json::from_slice(bytes).map_err(|error| invalid(&error))?;
        if probe.schema_version == Some(1) || probe.fs_layers.is_some() {
            return Err(Error::Unsupported(format!(
                "{name} is a docker schema 1 manifest, which registries dropped in 2020; push the image again"
            )));
        }
        let named = probe.media_type.as_deref().unwrap_or_default();
        let as_index = probe.manifests.is_some();
        let as_manifest = probe.layers.is_some() || probe.config.is_some();
        if as_index == as_manifest || (as_index && is_manifest(named)) || (as_manifest && is_index(named)) {
            return Err(invalid(&"it is neither clearly an index nor clearly an image manifest"));
        }
        let document = match as_index {
            true => serde_json::from_slice(bytes).map(|index| Document::Index(Box::new(index))),
            false => serde_json::from_slice(bytes).map(|manifest| Document::Manifest(Box::new(manifest))),
        };
        document.map_err(|error| invalid(&error))
    }

    /// The media type that the document claims, else the OCI one of its kind.
    pub fn media_type(&self) -> &str {
        let (named, standard) = match self {
            Document::Index(index) => (index.media_type(), OCI_INDEX),
            Document::Manifest(manifest) => (manifest.media_type(), OCI_MANIFEST),
        };
        named.as_ref().map_or(standard, |named| named.as_ref())
    }
}

/// The descriptor of a manifest or index from its bytes alone.
pub fn describe_document(bytes: &[u8]) -> Result<Descriptor> {
    let digest = Digest::of(bytes);
    let document = Document::parse(bytes, &digest)?;
    Ok(blobs::describe(document.media_type(), &digest, bytes.len() as u64))
}

/// The entry of an index that runs best on `platform`.
///
/// As containerd: the same platform, else the nearest older variant (`arm/v7` takes `v6`, `amd64/v3` takes `v2` and
/// plain `amd64`), else what the processor runs as well (`386` on `amd64`, `arm` on `arm64`). Attestations and other
/// things that are not images are passed over. Entries that name no platform are taken if there is only one.
pub fn select(index: &[u8], platform: &Platform) -> Result<Descriptor> {
    match Document::parse(index, "index")? {
        Document::Index(index) => best(index.manifests(), platform),
        Document::Manifest(_) => Err(Error::malformed("index", "it is an image manifest")),
    }
}

pub(crate) fn best(entries: &[Descriptor], platform: &Platform) -> Result<Descriptor> {
    let images: Vec<&Descriptor> = entries.iter().filter(|entry| is_image(entry)).collect();
    let ranked = images.iter().filter_map(|entry| Some((rank(platform, entry)?, *entry)));
    // The first of equals: indexes list the form that everybody can read first.
    if let Some((_, entry)) = ranked.min_by_key(|(rank, _)| *rank) {
        return Ok(entry.clone());
    }
    let mut nameless = images.iter().filter(|entry| entry.platform().is_none());
    if let (Some(only), None) = (nameless.next(), nameless.next()) {
        return Ok((*only).clone());
    }
    let mut available: Vec<String> = images.iter().filter_map(|entry| Some(platform_of(entry)?.to_string())).collect();
    available.dedup();
    let available = if available.is_empty() { "none".to_owned() } else { available.join(", ") };
    Err(Error::Platform { wanted: platform.to_string(), available })
}

/// An entry for an image, not for what is said of one.
pub(crate) fn is_image(entry: &Descriptor) -> bool {
    let media_type = entry.media_type().as_ref();
    let attestation = entry.annotations().as_ref().is_some_and(|all| all.contains_key("vnd.docker.reference.type"));
    let unknown = platform_of(entry).is_some_and(|platform| platform.os == "unknown");
    (is_manifest(media_type) || is_index(media_type)) && !attestation && !unknown
}

pub(crate) fn platform_of(entry: &Descriptor) -> Option<Platform> {
    let platform = entry.platform().as_ref()?;
    let (os, architecture) = (platform.os().to_string(), platform.architecture().to_string());
    Some(Platform::new(&os.to_ascii_lowercase(), &architecture.to_ascii_lowercase(), platform.variant().as_deref()))
}

/// How far an entry is from what was asked for; `None` if it does not run there.
fn rank(wanted: &Platform, entry: &Descriptor) -> Option<usize> {
    let offered = platform_of(entry)?;
    if offered.os != wanted.os {
        return None;
    }
    let place = runs_on(wanted).iter().position(|(architecture, variant)| {
        offered.architecture == *architecture && offered.variant.as_deref() == variant.as_deref()
    });
    // `arm` without a variant is read as v7, but where the index says nothing an older processor may try.
    let unsaid = entry.platform().as_ref().is_some_and(|platform| platform.variant().is_none());
    place.or_else(|| (unsaid && offered.architecture == wanted.architecture).then_some(usize::MAX))
}

/// Architectures and variants that run on a platform, best first, in [`Platform`]'s normal form.
fn runs_on(platform: &Platform) -> Vec<(&str, Option<String>)> {
    let number = |standard: u32| {
        let digits = platform.variant.as_deref().and_then(|variant| variant.strip_prefix('v'));
        digits.map_or(Some(standard), |digits| digits.parse().ok()).filter(|number| *number < 100)
    };
    let down = |from: u32, to: u32| (to..=from).rev().map(|number| Some(format!("v{number}")));
    let exact = vec![(platform.architecture.as_str(), platform.variant.clone())];
    match (platform.architecture.as_str(), number(0)) {
        ("arm", Some(variant)) => down(variant, 5).map(|variant| ("arm", variant)).collect(),
        ("amd64", Some(variant)) => {
            let older = down(variant, 2).chain([None]).map(|variant| ("amd64", variant));
            older.chain([("386", None)]).collect()
        }
        ("arm64", Some(variant)) => {
            let older = down(variant, 9).chain([None]).map(|variant| ("arm64", variant));
            older.chain(down(8, 5).map(|variant| ("arm", variant))).collect()
        }
        _ => exact,
    }
}

/// The bytes of a document that is written here: maps in `annotations` sorted, nothing else reordered.
pub(crate) fn to_bytes(document: &impl serde::Serialize) -> Vec<u8> {
    let mut value = serde_json::to_value(document).expect("documents have string keys");
    sort_annotations(&mut value);
    serde_json::to_vec(&value).expect("values are serialisable")
}

fn sort_annotations(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(object) => {
            for (key, value) in object {
                match (key.as_str(), &mut *value) {
                    ("annotations", serde_json::Value::Object(annotations)) => annotations.sort_keys(),
                    (_, value) => sort_annotations(value),
                }
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(sort_annotations),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::with_platform;

    fn entry(platform: &str) -> Descriptor {
        with_platform(blobs::describe(OCI_MANIFEST, &Digest::of(platform), 1), platform)
    }

    fn chosen(offered: &[&str], wanted: &str) -> Result<String> {
        let entries: Vec<Descriptor> = offered.iter().map(|platform| entry(platform)).collect();
        let index = json!({ "schemaVersion": 2, "manifests": entries });
        let found = select(&serde_json::to_vec(&index).unwrap(), &wanted.parse().unwrap())?;
        let place = offered.iter().position(|platform| *found.digest() == *entry(platform).digest());
        Ok(offered[place.unwrap()].to_owned())
    }

    #[test]
    fn the_entry_that_runs_best_is_selected() {
        let arms = ["linux/amd64", "linux/arm/v5", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "windows/amd64"];
        let levels = ["linux/386", "linux/amd64", "linux/amd64/v2", "linux/amd64/v4"];
        for (offered, wanted, expect) in [
            (&arms[..], "linux/amd64", Some("linux/amd64")),
            (&arms, "linux/amd64/v3", Some("linux/amd64")),
            (&arms, "linux/arm64", Some("linux/arm64/v8")),
            (&arms, "linux/arm", Some("linux/arm/v7")),
            (&arms, "linux/arm/v8", Some("linux/arm/v7")),
            (&arms, "linux/arm/v6", Some("linux/arm/v6")),
            (&arms[..3], "linux/arm64", Some("linux/arm/v6")),
            (&arms[3..4], "linux/arm/v6", None),
            (&["linux/arm"], "linux/arm/v6", Some("linux/arm")),
            (&arms, "windows/amd64", Some("windows/amd64")),
            (&arms, "linux/riscv64", None),
            (&levels, "linux/amd64", Some("linux/amd64")),
            (&levels, "linux/amd64/v3", Some("linux/amd64/v2")),
            (&levels, "linux/amd64/v4", Some("linux/amd64/v4")),
            (&levels[..1], "linux/amd64", Some("linux/386")),
            (&levels[2..], "linux/amd64", None),
            (&["unknown/unknown"], "linux/amd64", None),
            (&[], "linux/amd64", None),
        ] {
            assert_eq!(chosen(offered, wanted).ok().as_deref(), expect, "{wanted} of {offered:?}");
        }
        let error = chosen(&["linux/arm64", "unknown/unknown"], "linux/s390x").unwrap_err().to_string();
        assert_eq!(error, "no image for linux/s390x; there is linux/arm64");
    }

    #[test]
    fn attestations_and_strangers_are_passed_over() {
        let mut attestation = serde_json::to_value(entry("linux/amd64")).unwrap();
        attestation["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
        let mut artifact = serde_json::to_value(entry("linux/amd64")).unwrap();
        artifact["mediaType"] = "application/example".into();
        let mut nameless = serde_json::to_value(entry("linux/amd64")).unwrap();
        nameless["platform"].take();
        nameless["digest"] = Digest::of("nameless").as_str().into();
        let index = json!({ "manifests": [attestation, artifact, nameless] });
        let found = select(&serde_json::to_vec(&index).unwrap_or_default(), &"linux/amd64".parse().unwrap());
        assert!(found.is_err(), "an index has a schema version");
        let index = json!({ "schemaVersion": 2, "manifests": [attestation, artifact, nameless] });
        let found = select(&serde_json::to_vec(&index).unwrap(), &"linux/amd64".parse().unwrap()).unwrap();
        assert_eq!(found.digest().as_ref(), Digest::of("nameless").as_str());
    }

    #[test]
    fn documents_that_could_be_both_kinds_are_refused() {
        let config = blobs::describe(OCI_CONFIG, &Digest::of(""), 0);
        for (document, expect) in [
            (json!({ "schemaVersion": 2, "config": config, "layers": [], "manifests": [] }), "neither clearly"),
            (json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "config": config, "layers": [] }), "neither clearly"),
            (json!({ "schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "manifests": [] }), "neither clearly"),
            (json!({ "schemaVersion": 2 }), "neither clearly"),
            (json!({ "schemaVersion": 1, "fsLayers": [] }), "schema 1"),
            (json!([]), "not valid"),
            (json!({ "schemaVersion": 2, "config": config, "layers": [{ "size": -1 }] }), "not valid"),
        ] {
            let error = Document::parse(document.to_string().as_bytes(), "it").unwrap_err().to_string();
            assert!(error.contains(expect), "{document}: {error}");
        }
    }

    #[test]
    fn what_is_written_does_not_depend_on_the_order_of_maps() {
        let bytes: Vec<Vec<u8>> = (0..8)
            .map(|_| {
                let mut entry = entry("linux/amd64");
                entry.set_annotations(Some((0..20).map(|n| (format!("key{n:02}"), n.to_string())).collect()));
                to_bytes(&entry)
            })
            .collect();
        assert!(bytes.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
