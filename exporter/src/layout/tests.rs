use std::os::unix::fs::symlink;
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

use super::*;
use crate::blobs::{Origin, describe};
use crate::copy::{self, DEPTH_LIMIT, copy};
use crate::testing::{Recorder, base_images, put, put_image, put_index, put_json};

fn fresh() -> (TempDir, Layout) {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::create(directory.path()).unwrap();
    (directory, layout)
}

fn tagged(names: &[&str]) -> copy::Options {
    copy::Options { tags: names.iter().map(|name| name.to_string()).collect(), ..copy::Options::default() }
}

async fn two_platforms(layout: &Layout) -> Descriptor {
    let shared: &[(&str, &str)] = &[("etc/shared", "both have this")];
    let amd64 = put_image(layout, "linux/amd64", &[shared, &[("bin/tool", "amd64")]]).await;
    let arm64 = put_image(layout, "linux/arm64", &[shared, &[("bin/tool", "arm64")]]).await;
    put_index(layout, &[amd64, arm64]).await
}

#[tokio::test]
async fn a_copy_is_whole_children_first_and_a_second_writes_nothing() {
    let ((_from, from), (_to, to)) = (fresh(), fresh());
    let root = two_platforms(&from).await;
    let to = Recorder::new(to);
    copy(&from, &to, &root, &tagged(&["docker.io/library/app:1", "next"])).await.unwrap();
    let written = to.take();
    // Two configs, three layers (one shared), two manifests, the index and its two names.
    assert_eq!(written.len(), 10, "{written:?}");
    assert_eq!(written[7..], [root.digest().to_string(), "name=docker.io/library/app:1".into(), "name=next".into()]);
    for name in ["docker.io/library/app:1", "app:1", "next", root.digest().as_ref()] {
        assert_eq!(to.resolve(name).await.unwrap().digest(), root.digest(), "{name}");
    }
    let graph = copy::walk(&to.inner, &root).await.unwrap();
    for blob in &graph.blobs {
        let mut bytes = Vec::new();
        to.read(blob).await.unwrap().read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes.len() as u64, blob.size());
    }
    copy(&from, &to, &root, &tagged(&["next"])).await.unwrap();
    let blobs: Vec<String> = graph.blobs.iter().map(|blob| blob.digest().to_string()).collect();
    assert!(to.take().iter().all(|written| !blobs.contains(written)), "a blob was written twice");
}

#[tokio::test]
async fn what_two_indexes_share_is_there_before_either() {
    let ((_from, from), (_to, to)) = (fresh(), fresh());
    let image = put_image(&from, "linux/amd64", &[]).await;
    let inner = put_index(&from, std::slice::from_ref(&image)).await;
    let root = put_index(&from, &[image.clone(), inner.clone()]).await;
    let to = Recorder::new(to);
    copy(&from, &to, &root, &tagged(&[])).await.unwrap();
    let expect = [&image, &inner, &root].map(|document| document.digest().to_string());
    assert_eq!(to.take()[1..], expect);
}

#[tokio::test]
async fn blobs_are_mounted_where_that_is_possible() {
    let ((_from, from), (_to, to)) = (fresh(), fresh());
    let root = put_image(&from, "linux/amd64", &[&[("a", "a")]]).await;
    let origin = Origin { registry: "registry.test".into(), repository: "base".into() };
    let from = Recorder { mounts: Some(origin.clone()), ..Recorder::new(from) };
    let to = Recorder { mounts: Some(origin), ..Recorder::new(to) };
    copy(&from, &to, &root, &tagged(&[])).await.unwrap();
    let written = to.take();
    assert_eq!(written.iter().filter(|what| what.starts_with("mount ")).count(), 2, "{written:?}");
    assert_eq!(written.len(), 3);
}

#[tokio::test]
async fn foreign_layers_are_not_handed_on() {
    let ((_from, from), (_to, to)) = (fresh(), fresh());
    let config = put(&from, image::OCI_CONFIG, b"{}").await;
    let foreign = describe("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", &Digest::of("far away"), 8);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": image::DOCKER_MANIFEST, "config": config, "layers": [foreign],
    });
    let root = put_json(&from, &manifest).await;
    copy(&from, &to, &root, &tagged(&["kept"])).await.unwrap();
    assert_eq!(to.resolve("kept").await.unwrap(), {
        let mut named = root.clone();
        named.set_annotations(Some([(REF_NAME.to_owned(), "kept".to_owned())].into()));
        named
    });
}

#[tokio::test]
async fn index_json_keeps_what_others_wrote() {
    let (directory, layout) = fresh();
    let path = directory.path().join("index.json");
    let strange = json!({ "mediaType": "application/strange", "digest": Digest::of("x"), "size": 1, "extra": [1] });
    let index = json!({ "schemaVersion": 2, "manifests": [strange], "annotations": { "a": "b" }, "unknown": true });
    fs::write(&path, index.to_string()).unwrap();
    let (first, second) = (put_image(&layout, "linux/amd64", &[]).await, put_image(&layout, "linux/arm64", &[]).await);
    layout.add(&first, &[]).unwrap();
    layout.add(&first, &["docker.io/library/app:1".into(), "2".into()]).unwrap();
    layout.add(&second, &["docker.io/library/app:1".into()]).unwrap();
    let now: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(
        (&now["manifests"][0], &now["unknown"], &now["annotations"]),
        (&strange, &json!(true), &index["annotations"])
    );
    let entries = layout.entries().unwrap();
    let named: Vec<(&[String], &str)> =
        entries[1..].iter().map(|entry| (&entry.names[..], entry.descriptor.digest().as_ref())).collect();
    let expect = [
        (&["2".to_owned()][..], first.digest().as_ref()),
        (&["docker.io/library/app:1".to_owned()], second.digest().as_ref()),
    ];
    assert_eq!(named, expect);
}

#[tokio::test]
async fn many_writers_lose_no_entry() {
    let (_directory, layout) = fresh();
    let image = put_image(&layout, "linux/amd64", &[]).await;
    std::thread::scope(|scope| {
        for number in 0..16 {
            let (layout, image) = (&layout, &image);
            scope.spawn(move || layout.add(image, &[format!("tag{number}")]).unwrap());
        }
    });
    assert_eq!(layout.entries().unwrap().len(), 16);
}

#[tokio::test]
async fn names_that_are_not_there_list_those_that_are() {
    let (_directory, layout) = fresh();
    let root = two_platforms(&layout).await;
    layout.add(&root, &["docker.io/library/app:1".into()]).unwrap();
    assert_eq!(layout.resolve("").await.unwrap().digest(), root.digest());
    let error = layout.resolve("app:2").await.unwrap_err().to_string();
    assert!(error.contains("app:2") && error.contains("there is docker.io/library/app:1"), "{error}");
    let error = layout.resolve(Digest::of("none").as_str()).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn lies_about_content_are_found() {
    let (directory, layout) = fresh();
    let blob = put(&layout, "text/plain", b"the truth").await;
    let path = directory.path().join(blob_name(&digest_of(&blob).unwrap()));
    let read = async |blob: &Descriptor| {
        let mut bytes = Vec::new();
        layout.read(blob).await.unwrap().read_to_end(&mut bytes).await.map_err(|error| error.to_string())
    };
    let longer = describe("text/plain", &digest_of(&blob).unwrap(), 90);
    assert!(read(&longer).await.unwrap_err().contains("expected 90 bytes, found 9 bytes"));
    assert!(!layout.has(&longer).await.unwrap());
    fs::write(&path, b"the lying").unwrap();
    assert!(read(&blob).await.unwrap_err().contains("found sha256:"));
    let error = layout.manifest(blob.digest().as_ref()).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    let image = put_image(&layout, "linux/amd64", &[]).await;
    let other = put_image(&layout, "linux/arm64", &[]).await;
    let paths = [&image, &other].map(|image| directory.path().join(blob_name(&digest_of(image).unwrap())));
    fs::copy(&paths[0], &paths[1]).unwrap();
    assert!(matches!(layout.manifest(other.digest().as_ref()).await, Err(Error::Mismatch { .. })));
    // A write of other bytes than described leaves nothing behind.
    let promised = describe("text/plain", &Digest::of("promised"), 8);
    assert!(layout.write(&promised, Box::new(&b"given up"[..])).await.is_err());
    assert!(!layout.has(&promised).await.unwrap());
    let left = fs::read_dir(directory.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(".blob-"));
    assert_eq!(left.count(), 0);
}

#[tokio::test]
async fn nothing_outside_and_nothing_special_is_opened() {
    let (directory, layout) = fresh();
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let blob = describe("text/plain", &Digest::of("secret"), 6);
    let path = directory.path().join(blob_name(&digest_of(&blob).unwrap()));
    symlink(&secret, &path).unwrap();
    assert!(layout.read(&blob).await.is_err(), "a link led out");
    fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
    let error = layout.read(&blob).await.err().unwrap().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    fs::remove_file(&path).unwrap();
    let index = directory.path().join("index.json");
    fs::remove_file(&index).unwrap();
    symlink("/proc/self/environ", &index).unwrap();
    assert!(layout.entries().is_err());
}

#[tokio::test]
async fn hostile_indexes_end() {
    let ((_from, from), (_to, to)) = (fresh(), fresh());
    let mut root = put_image(&from, "linux/amd64", &[]).await;
    for _ in 0..DEPTH_LIMIT {
        root = put_index(&from, &[root]).await;
    }
    copy(&from, &to, &root, &tagged(&[])).await.unwrap();
    root = put_index(&from, &[root]).await;
    let error = copy(&from, &to, &root, &tagged(&[])).await.unwrap_err().to_string();
    assert!(error.contains("nested more than"), "{error}");

    let huge = vec![b' '; MANIFEST_LIMIT as usize + 1];
    let huge = put(&from, image::OCI_MANIFEST, &huge).await;
    assert!(matches!(copy(&from, &to, &huge, &tagged(&[])).await, Err(Error::TooLarge { .. })));

    let bad = json!({ "schemaVersion": 2, "mediaType": image::OCI_INDEX, "manifests": [
        { "mediaType": image::OCI_MANIFEST, "digest": "sha256:../../../../etc/passwd", "size": 3 },
    ] });
    let bad = put_json(&from, &bad).await;
    assert!(copy(&from, &to, &bad, &tagged(&[])).await.is_err());
}

#[tokio::test]
async fn other_versions_and_other_directories_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let error = Layout::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("no file oci-layout"), "{error}");
    fs::write(directory.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    assert!(Layout::open(directory.path()).unwrap_err().to_string().contains("version \"2.0.0\""));
    assert!(Layout::open(&directory.path().join("none")).is_err());
}

#[tokio::test]
async fn real_images_make_the_round_trip() {
    for path in base_images() {
        let from = Layout::open(&path).unwrap();
        let (directory, to) = fresh();
        for entry in from.entries().unwrap() {
            copy(&from, &to, &entry.descriptor, &tagged(&["trip"])).await.unwrap();
            assert_eq!(to.resolve("trip").await.unwrap().digest(), entry.descriptor.digest());
            inspect(directory.path());
        }
    }
}

/// Others read what was written.
fn inspect(directory: &Path) {
    let image = format!("oci:{}:trip", directory.display());
    match Command::new("skopeo").args(["inspect", "--raw", &image]).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(_) => eprintln!("skipped: skopeo is not installed"),
    }
    match Command::new("umoci").args(["stat", "--json", "--image", &image[4..]]).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(_) => eprintln!("skipped: umoci is not installed"),
    }
}
