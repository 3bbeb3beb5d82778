//! The way of an image through the store: fetched, unpacked, packed, handed on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use forge_snapshotter::image::Platform;
use forge_snapshotter::layer::{self, Compression, DiffOptions, MediaTypes};
use forge_snapshotter::{Digest, SnapshotId, Store, StoredImage};
use oci_spec::image::Descriptor;
use serde_json::json;
use tempfile::TempDir;

use crate::blobs::{self, BlobReader, Blobs, Manifests, Origin, digest_of};
use crate::copy::{self, copy};
use crate::fetch::fetch_config;
use crate::image;
use crate::layout::Layout;
use crate::local::{Local, Origins};
use crate::pack::{self, PackOptions, pack};
use crate::testing::{Recorder, base_images, config_of, gzip, put, put_image, put_index, put_json, tar_of};
use crate::unpack::{UnpackOptions, unpack_layers};
use crate::{Error, Result};

const BASE: &[(&str, &str)] = &[("etc/name", "base"), ("etc/gone", "soon")];
const TOP: &[(&str, &str)] = &[("etc/name", "top"), ("etc/.wh.gone", ""), ("new", "file")];

fn layout() -> (TempDir, Layout) {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::create(directory.path()).unwrap();
    (directory, layout)
}

fn store() -> (TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    (directory, store)
}

fn amd64() -> Platform {
    "linux/amd64".parse().unwrap()
}

fn read(store: &Store, root: &SnapshotId, path: &str) -> Option<String> {
    let view = store.snapshots().view(root).unwrap();
    std::fs::read_to_string(view.root().join(path)).ok()
}

#[tokio::test]
async fn a_name_becomes_files_and_every_blob_is_read_once() {
    let ((_from, from), (_root, store)) = (layout(), store());
    let image = put_image(&from, "linux/amd64", &[BASE, TOP]).await;
    let other = put_image(&from, "linux/arm64", &[BASE]).await;
    from.add(&put_index(&from, &[other, image.clone()]).await, &["app".into()]).unwrap();
    let from = Recorder::new(from);
    let fetched = fetch_config(&store, &from, "app", &amd64()).await.unwrap();
    assert_eq!(fetched.manifest.digest(), image.digest());
    assert_eq!((fetched.layers.len(), fetched.config.platform()), (2, amd64()));
    assert!(!store.content().list().unwrap().iter().any(|(blob, _)| *blob == digest_of(&fetched.layers[0].0).unwrap()));

    let seen = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&seen);
    let progress = Arc::new(move |_: &Descriptor, bytes| {
        counter.fetch_max(bytes, Ordering::Relaxed);
    });
    let options = UnpackOptions { progress: Some(progress), ..UnpackOptions::default() };
    let root = unpack_layers(&store, &from, &fetched.layers, &options).await.unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), fetched.layers.iter().map(|(layer, _)| layer.size()).max().unwrap());
    assert_eq!(read(&store, &root, "etc/name").as_deref(), Some("top"));
    assert_eq!((read(&store, &root, "etc/gone"), read(&store, &root, "new").as_deref()), (None, Some("file")));
    for (layer, diff_id) in &fetched.layers {
        assert_eq!(store.content().size(&digest_of(layer).unwrap()).unwrap(), Some(layer.size()));
        assert!(!store.catalog().recipes(diff_id).unwrap().is_empty());
    }
    // Again, from a place that has nothing: neither documents nor layers are asked for.
    let (_empty, empty) = layout();
    let again = fetch_config(&store, &empty, fetched.root.digest().as_ref(), &amd64()).await.unwrap();
    assert_eq!(unpack_layers(&store, &empty, &again.layers, &UnpackOptions::default()).await.unwrap(), root);
    // And when the snapshots are gone, the blobs are still here.
    for id in [SnapshotId::chain(&again.config.rootfs.diff_ids), SnapshotId::chain(&again.config.rootfs.diff_ids[..1])]
    {
        store.snapshots().remove(&id).unwrap();
    }
    assert_eq!(unpack_layers(&store, &empty, &again.layers, &UnpackOptions::default()).await.unwrap(), root);
}

#[tokio::test]
async fn what_does_not_match_leaves_nothing() {
    let (_from, from) = layout();
    let (good, bad) = (tar_of(BASE), gzip(&tar_of(TOP)));
    let good_blob = put(&from, "application/vnd.oci.image.layer.v1.tar", &good).await;
    let bad_blob = put(&from, "application/vnd.oci.image.layer.v1.tar+gzip", &bad).await;
    let junk = put(&from, "application/vnd.oci.image.layer.v1.tar+gzip", &[0x1f, 0x8b, 8, 0, 1]).await;
    let missing = blobs::describe("application/vnd.oci.image.layer.v1.tar", &Digest::of("missing"), 7);
    for second in [bad_blob, junk, missing] {
        let (_root, store) = store();
        let layers = [(good_blob.clone(), Digest::of(&good)), (second.clone(), Digest::of("another tar"))];
        let error = unpack_layers(&store, &from, &layers, &UnpackOptions::default()).await.unwrap_err();
        assert!(error.to_string().contains(second.digest().as_ref()), "{error}");
        let chain = SnapshotId::chain(&[Digest::of(&good), Digest::of("another tar")]);
        assert!(store.snapshots().get(&chain).unwrap().is_none());
        assert_eq!(store.content().size(&digest_of(&second).unwrap()).unwrap(), None);
    }
}

#[tokio::test]
async fn many_who_want_the_same_layers_do_the_work_once() {
    let ((_from, from), (directory, store)) = (layout(), store());
    let layers: Vec<(String, String)> = (0..6).map(|n| (format!("file{n}"), n.to_string())).collect();
    let files: Vec<Vec<(&str, &str)>> = layers.iter().map(|(name, text)| vec![(&name[..], &text[..])]).collect();
    let files: Vec<&[(&str, &str)]> = files.iter().map(Vec::as_slice).collect();
    let image = put_image(&from, "linux/amd64", &files).await;
    let fetched = fetch_config(&store, &from, image.digest().as_ref(), &amd64()).await.unwrap();
    let from = Counting { inner: from, reads: Mutex::default() };
    // Stores of their own, as processes have them.
    let stores: Vec<Store> = (0..4).map(|_| Store::open(directory.path()).unwrap()).collect();
    let options = UnpackOptions { parallel: 2, ..UnpackOptions::default() };
    let all = stores.iter().map(|store| unpack_layers(store, &from, &fetched.layers, &options));
    for root in futures_util::future::join_all(all).await {
        assert_eq!(root.unwrap(), SnapshotId::chain(&fetched.config.rootfs.diff_ids));
    }
    assert_eq!(from.reads.lock().unwrap().len(), 6);
}

struct Counting {
    inner: Layout,
    reads: Mutex<Vec<String>>,
}

impl Blobs for Counting {
    async fn has(&self, blob: &Descriptor) -> Result<bool> {
        self.inner.has(blob).await
    }

    async fn read(&self, blob: &Descriptor) -> Result<BlobReader> {
        self.reads.lock().unwrap().push(blob.digest().to_string());
        self.inner.read(blob).await
    }

    async fn write(&self, blob: &Descriptor, data: BlobReader) -> Result<()> {
        self.inner.write(blob, data).await
    }
}

#[tokio::test]
async fn what_is_no_image_says_so() {
    let ((_from, from), (_root, store)) = (layout(), store());
    let config = put(&from, image::OCI_CONFIG, &config_of("linux/amd64", &[tar_of(BASE)])).await;
    let chart = put(&from, "application/vnd.cncf.helm.config.v1+json", b"{}").await;
    let manifest = |config: &Descriptor| json!({ "schemaVersion": 2, "mediaType": image::OCI_MANIFEST, "config": config, "layers": [] });
    let list = put_json(&from, &json!({ "schemaVersion": 2, "mediaType": image::OCI_INDEX, "manifests": [] })).await;
    for (root, reason) in [
        (put_json(&from, &manifest(&config)).await, "0 layers where its config names 1"),
        (put_json(&from, &manifest(&chart)).await, "not a container image"),
        (list, "there is none"),
    ] {
        let error = fetch_config(&store, &from, root.digest().as_ref(), &amd64()).await.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[tokio::test]
async fn indexes_within_indexes_are_followed_to_a_limit() {
    let ((_from, from), (_root, store)) = (layout(), store());
    let image = put_image(&from, "linux/amd64", &[BASE]).await;
    let arm = put_image(&from, "linux/arm64", &[BASE]).await;
    let halves = [put_index(&from, &[arm]).await, put_index(&from, std::slice::from_ref(&image)).await];
    let root = put_index(&from, &halves).await;
    let fetched = fetch_config(&store, &from, root.digest().as_ref(), &amd64()).await.unwrap();
    assert_eq!(fetched.manifest.digest(), image.digest());
    let mut deep = image;
    for _ in 0..=copy::DEPTH_LIMIT + 1 {
        deep = put_index(&from, &[deep]).await;
    }
    let error = fetch_config(&store, &from, deep.digest().as_ref(), &amd64()).await.unwrap_err().to_string();
    assert!(error.contains("nested more than"), "{error}");
}

/// An image of one layer that a build left as a snapshot.
pub(crate) fn build(store: &Store, base: &[Digest], parent: Option<&SnapshotId>, text: &str) -> Digest {
    let mut active = store.snapshots().prepare(parent).unwrap();
    std::fs::write(active.root().join("built"), text).unwrap();
    let file = std::fs::File::options().write(true).open(active.root().join("built")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    drop(file);
    let changes = active.changes().unwrap();
    let options = DiffOptions { driver: store.driver(), clamp_mtime: None };
    let (diff_id, summary) = layer::diff_id(&changes, &options).unwrap();
    let id = SnapshotId(Digest::of(text));
    store.snapshots().commit(active, id.clone()).unwrap();
    let layer =
        forge_snapshotter::Layer { diff_id: diff_id.clone(), size_bytes: summary.bytes, entries: summary.entries };
    store.catalog().set_layer(&id, &layer, None).unwrap();
    let diff_ids: Vec<Digest> = base.iter().cloned().chain([diff_id]).collect();
    let config =
        json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let image = store.content().put(config.to_string().as_bytes()).unwrap();
    let stored = StoredImage { id: image.clone(), manifest: None, platform: amd64(), created: None, root: Some(id) };
    store.catalog().put(&stored).unwrap();
    image
}

#[tokio::test]
async fn packing_is_repeatable_and_done_once() {
    let ((_first, first), (_second, second)) = (store(), store());
    let images = [build(&first, &[], None, "same"), build(&second, &[], None, "same")];
    assert_eq!(images[0], images[1]);
    let steps = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&steps);
    let progress: pack::Progress = Arc::new(move |_, step| told.lock().unwrap().push(step));
    let options = PackOptions { progress: Some(progress), ..PackOptions::default() };
    let packed = pack(&first, &images[0], &options).await.unwrap();
    assert_eq!(pack(&second, &images[0], &options).await.unwrap().bytes, packed.bytes);
    assert_eq!(pack(&first, &images[0], &options).await.unwrap().bytes, packed.bytes);
    let steps = steps.lock().unwrap().clone();
    assert!(matches!(steps[..], [pack::Step::Compressed { .. }, pack::Step::Compressed { .. }, pack::Step::Reused]));

    for (compression, types, suffix) in [
        (Compression::ZSTD, MediaTypes::Oci, "oci.image.layer.v1.tar+zstd"),
        (Compression::None, MediaTypes::Oci, "oci.image.layer.v1.tar"),
        (Compression::GZIP, MediaTypes::Docker, "docker.image.rootfs.diff.tar.gzip"),
    ] {
        let annotations = [("b".to_owned(), "2".to_owned()), ("a".to_owned(), "1".to_owned())].into();
        let options = PackOptions { compression, types, annotations, ..PackOptions::default() };
        let packed = pack(&first, &images[0], &options).await.unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&packed.bytes).unwrap();
        assert!(manifest["layers"][0]["mediaType"].as_str().unwrap().ends_with(suffix), "{manifest}");
        assert_eq!(manifest["mediaType"], image::manifest_type(types));
        // What was packed unpacks to the same files elsewhere.
        let ((_to, to), (_root, third)) = (layout(), store());
        copy(&Local::new(first.clone()), &to, &packed.manifest, &copy::Options::default()).await.unwrap();
        let fetched = fetch_config(&third, &to, packed.manifest.digest().as_ref(), &amd64()).await.unwrap();
        let root = unpack_layers(&third, &to, &fetched.layers, &UnpackOptions::default()).await.unwrap();
        assert_eq!(read(&third, &root, "built").as_deref(), Some("same"));
    }
}

#[tokio::test]
async fn a_snapshot_that_changed_is_not_packed() {
    let (_root, store) = store();
    let image = build(&store, &[], None, "before");
    let info = store.snapshots().get(&SnapshotId(Digest::of("before"))).unwrap().unwrap();
    std::fs::write(info.changes.unwrap().join("built"), "after!").unwrap();
    let error = pack(&store, &image, &PackOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::Drifted { .. }), "{error}");
}

/// A registry, as far as the store is concerned.
struct Elsewhere(Layout);

impl Origins for Elsewhere {
    async fn open(&self, origin: &Origin, blob: &Descriptor) -> Result<BlobReader> {
        assert_eq!(origin.repository, "base");
        self.0.read(blob).await
    }
}

#[tokio::test]
async fn a_base_that_was_never_downloaded_is_handed_on() {
    let ((_from, from), (_root, store), (_to, to)) = (layout(), store(), layout());
    let base = put_image(&from, "linux/amd64", &[BASE]).await;
    let origin = Origin { registry: "registry.test".into(), repository: "base".into() };
    let registry = Recorder { mounts: Some(origin.clone()), ..Recorder::new(from.clone()) };
    let fetched = fetch_config(&store, &registry, base.digest().as_ref(), &amd64()).await.unwrap();
    let image = build(&store, &fetched.config.rootfs.diff_ids, None, "on top");
    let packed = pack(&store, &image, &PackOptions::default()).await.unwrap();
    let layer = digest_of(&fetched.layers[0].0).unwrap();
    assert_eq!(store.content().size(&layer).unwrap(), None, "the base was downloaded");

    let local = Local::with_origins(store.clone(), Elsewhere(from.clone()));
    let (_same, same) = layout();
    let same = Recorder { mounts: Some(origin), ..Recorder::new(same) };
    copy(&local, &same, &packed.manifest, &copy::Options::default()).await.unwrap();
    assert!(same.take().contains(&format!("mount {layer}")));
    copy(&local, &to, &packed.manifest, &copy::Options::default()).await.unwrap();
    assert!(to.has(&fetched.layers[0].0).await.unwrap());
    let error = copy(&Local::new(store.clone()), &layout().1, &packed.manifest, &copy::Options::default()).await;
    assert!(error.unwrap_err().to_string().contains("registry.test/base"));

    // Another compression needs the bytes.
    let options = PackOptions { compression: Compression::ZSTD, force_compression: true, ..PackOptions::default() };
    assert!(matches!(pack(&store, &image, &options).await, Err(Error::LayerLost(_))));
    unpack_layers(&store, &from, &fetched.layers, &UnpackOptions::default()).await.unwrap();
    let packed = pack(&store, &image, &options).await.unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&packed.bytes).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        assert!(layer["mediaType"].as_str().unwrap().ends_with("+zstd"), "{manifest}");
    }
}

#[tokio::test]
async fn a_false_claim_about_a_layer_is_not_handed_on() {
    let ((_from, from), (_root, store)) = (layout(), store());
    let honest = put_image(&from, "linux/amd64", &[BASE]).await;
    let other = put(&from, Compression::GZIP.media_type(MediaTypes::Oci), &gzip(&tar_of(TOP))).await;
    let config = put(&from, image::OCI_CONFIG, &config_of("linux/amd64", &[tar_of(BASE)])).await;
    let lie = json!({
        "schemaVersion": 2, "mediaType": image::OCI_MANIFEST, "config": config, "layers": [other],
    });
    let lie = put_json(&from, &lie).await;
    let mut layer = None;
    for root in [&lie, &honest] {
        let fetched = fetch_config(&store, &from, root.digest().as_ref(), &amd64()).await.unwrap();
        layer = fetched.layers.first().cloned();
        let local = Local::new(store.clone());
        local.write(&fetched.layers[0].0, from.read(&fetched.layers[0].0).await.unwrap()).await.unwrap();
    }
    let (blob, diff_id) = layer.unwrap();
    let image = build(&store, &[diff_id], None, "on top");
    let packed = pack(&store, &image, &PackOptions::default()).await.unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&packed.bytes).unwrap();
    assert_eq!(manifest["layers"][0]["digest"], blob.digest().as_ref());
}

#[tokio::test]
async fn what_is_loaded_is_tagged_and_leaves_under_the_digest_it_had() {
    let ((_from, from), (_root, store), (_to, to)) = (layout(), store(), layout());
    let images = [put_image(&from, "linux/amd64", &[BASE]).await, put_image(&from, "linux/arm64", &[TOP]).await];
    let root = put_index(&from, &images).await;
    let local = Local::new(store.clone());
    let options = copy::Options { tags: vec!["docker.io/library/app:1".into()], ..copy::Options::default() };
    copy(&from, &local, &root, &options).await.unwrap();
    let name = "app:1".parse().unwrap();
    assert_eq!(store.catalog().tagged(&name).unwrap().len(), 2);
    assert_eq!(local.resolve("app:1").await.unwrap().digest(), root.digest());
    for image in store.catalog().tagged(&name).unwrap() {
        let packed = pack(&store, &image.id, &PackOptions::default()).await.unwrap();
        assert_eq!(Some(digest_of(&packed.manifest).unwrap()), image.manifest);
    }
    copy(&local, &to, &local.resolve("app:1").await.unwrap(), &options).await.unwrap();
    assert_eq!(to.resolve("app:1").await.unwrap().digest(), root.digest());

    let entries: Vec<(Descriptor, Platform)> =
        images.iter().map(|image| (image.clone(), crate::image::platform_of(image).unwrap())).collect();
    let index = pack::index(&store, &entries, MediaTypes::Oci, &Default::default()).unwrap();
    let bytes = local.manifest(index.digest().as_ref()).await.unwrap().1;
    for (image, platform) in &entries {
        assert_eq!(image::select(&bytes, platform).unwrap().digest(), image.digest());
    }
}

#[tokio::test]
async fn real_images_become_snapshots() {
    for path in base_images().into_iter().filter(|path| path.ends_with("alpine") || path.ends_with("python")) {
        let (_root, store) = store();
        let from = Layout::open(&path).unwrap();
        let root = from.entries().unwrap()[0].descriptor.digest().to_string();
        let fetched = fetch_config(&store, &from, &root, &Platform::host()).await.unwrap();
        let started = std::time::Instant::now();
        let root = unpack_layers(&store, &from, &fetched.layers, &UnpackOptions::default()).await.unwrap();
        let bytes: u64 = fetched.layers.iter().map(|(layer, _)| layer.size()).sum();
        eprintln!("{}: {} layers, {bytes} bytes in {:?}", path.display(), fetched.layers.len(), started.elapsed());
        let view = store.snapshots().view(&root).unwrap();
        assert!(view.root().join("etc/passwd").exists());
    }
}

/// The work may be spawned: its futures go from thread to thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_of_it_can_be_spawned() {
    let ((_from, from), (_root, store), (_to, to)) = (layout(), store(), layout());
    let image = put_image(&from, "linux/amd64", &[BASE, TOP]).await;
    let work = tokio::spawn(async move {
        let local = Local::with_origins(store.clone(), Elsewhere(from.clone()));
        let options = copy::Options { tags: vec!["docker.io/library/app:1".into()], ..copy::Options::default() };
        let fetched = fetch_config(&store, &from, image.digest().as_ref(), &amd64()).await?;
        unpack_layers(&store, &from, &fetched.layers, &UnpackOptions::default()).await?;
        copy(&from, &local, &image, &options).await?;
        let packed = pack(&store, &fetched.id, &PackOptions::default()).await?;
        copy(&local, &to, &packed.manifest, &options).await?;
        let mut tar = Vec::new();
        let entry = crate::layout::Entry { names: Vec::new(), descriptor: packed.manifest };
        crate::archive::write_docker_tar(&local, &[entry], &mut tar).await?;
        Ok::<_, Error>(tar.len())
    });
    assert!(work.await.unwrap().unwrap() > 4096);
}

/// A registry that goes silent after the first bytes.
struct Silent(Arc<tokio::sync::Notify>);

impl Blobs for Silent {
    async fn has(&self, _: &Descriptor) -> Result<bool> {
        Ok(true)
    }

    async fn read(&self, _: &Descriptor) -> Result<BlobReader> {
        let (near, mut far) = tokio::io::duplex(64);
        let notify = Arc::clone(&self.0);
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            // More than the pipe holds: once it is written, the other end has begun to read. Then nothing more comes,
            // until it hangs up.
            far.write_all(&[0; 100]).await.unwrap();
            notify.notify_one();
            far.write_all(&[0; 1000]).await.ok();
            std::future::pending::<()>().await;
        });
        Ok(Box::new(near))
    }

    async fn write(&self, _: &Descriptor, _: BlobReader) -> Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn work_that_is_given_up_ends_and_leaves_nothing() {
    let (directory, store) = store();
    let layers =
        [(blobs::describe("application/vnd.oci.image.layer.v1.tar", &Digest::of("x"), 1 << 20), Digest::of("x"))];
    let begun = Arc::new(tokio::sync::Notify::new());
    let silent = Silent(Arc::clone(&begun));
    let options = UnpackOptions::default();
    tokio::select! {
        done = unpack_layers(&store, &silent, &layers, &options) => panic!("it ended: {:?}", done.err()),
        () = begun.notified() => {}
    }
    // The thread that worked for it holds the lock until it has cleaned up.
    let waiting = store.clone();
    let key = format!("layer {}", SnapshotId::chain(&[Digest::of("x")]));
    let lock = tokio::task::spawn_blocking(move || waiting.lock_key(&key)).await.unwrap();
    drop(lock.unwrap());
    assert!(store.content().list().unwrap().is_empty());
    drop(store);
    assert_eq!(std::fs::read_dir(directory.path().join("active")).unwrap().count(), 0);
}
