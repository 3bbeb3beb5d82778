use std::process::Command;

use forge_snapshotter::Digest;
use oci_spec::image::Descriptor;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

use super::*;
use crate::blobs::{Blobs, Manifests, describe};
use crate::copy::{self, copy, walk};
use crate::image;
use crate::layout::{Entry, Layout};
use crate::testing::{base_images, config_of, gzip, put, put_image, put_index, put_json, tar_of};
use crate::{Error, Result};

const FILES: &[(&str, &str)] = &[("etc/name", "value")];

fn fresh() -> (TempDir, Layout) {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::create(directory.path()).unwrap();
    (directory, layout)
}

fn named(descriptor: &Descriptor, names: &[&str]) -> Entry {
    Entry { names: names.iter().map(|name| name.to_string()).collect(), descriptor: descriptor.clone() }
}

/// A tar of members; a name with `->` is a symbolic link.
fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match name.split_once("->") {
            Some((name, target)) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
                header.set_link_name_literal(target).unwrap();
            }
            None => {
                // Not set_path: hostile names must get in.
                header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
                header.set_size(bytes.len() as u64);
            }
        }
        header.set_cksum();
        tar.append(&header, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

fn read(bytes: &[u8]) -> Result<Archive> {
    Archive::read("test.tar".into(), bytes, &std::env::temp_dir())
}

async fn content(of: &impl Manifests, root: &Descriptor) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for blob in walk(of, root).await?.blobs {
        let mut bytes = Vec::new();
        of.read(&blob).await?.read_to_end(&mut bytes).await.map_err(|error| Error::malformed("blob", error))?;
        all.push(bytes);
    }
    Ok(all)
}

#[tokio::test]
async fn both_forms_are_read_back_and_always_the_same_bytes() {
    let (_directory, layout) = fresh();
    let image = put_image(&layout, "linux/amd64", &[FILES, &[("b", "b")]]).await;
    let images = [named(&image, &["docker.io/library/app:1", "registry.test:5000/app:2"])];
    let (mut docker, mut oci, mut again) = (Vec::new(), Vec::new(), Vec::new());
    write_docker_tar(&layout, &images, &mut docker).await.unwrap();
    write_docker_tar(&layout, &images, &mut again).await.unwrap();
    write_oci_tar(&layout, &images, &mut oci).await.unwrap();
    assert!(docker == again, "two archives of the same image differ");
    for bytes in [&docker, &oci, &gzip(&docker)] {
        let archive = read(bytes).unwrap();
        assert_eq!(archive.entries().len(), 1);
        assert_eq!(archive.entries()[0].names, images[0].names);
        let root = archive.resolve("app:1").await.unwrap();
        assert_eq!(root.digest(), image.digest());
        assert_eq!(content(&archive, &root).await.unwrap(), content(&layout, &image).await.unwrap());
    }
    let names: Vec<String> = tar::Archive::new(&docker[..])
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert!(names.is_sorted(), "{names:?}");
    let list = read(&docker).unwrap().member("manifest.json", 4096).unwrap().unwrap();
    let list: Value = serde_json::from_slice(&list).unwrap();
    assert_eq!(list[0]["RepoTags"], json!(["app:1", "registry.test:5000/app:2"]));
    assert_eq!(list[0]["Layers"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn an_index_is_kept_in_an_oci_archive_and_refused_in_a_docker_one() {
    let (_directory, layout) = fresh();
    let images = [put_image(&layout, "linux/amd64", &[FILES]).await, put_image(&layout, "linux/arm64", &[FILES]).await];
    let root = [named(&put_index(&layout, &images).await, &["next"])];
    let mut bytes = Vec::new();
    write_oci_tar(&layout, &root, &mut bytes).await.unwrap();
    let (_to, to) = fresh();
    let archive = read(&bytes).unwrap();
    copy(&archive, &to, &root[0].descriptor, &copy::Options::default()).await.unwrap();
    assert_eq!(content(&to, &root[0].descriptor).await.unwrap().len(), 3);
    let error = write_docker_tar(&layout, &root, &mut Vec::new()).await.unwrap_err().to_string();
    assert!(error.contains("one platform"), "{error}");
}

/// `<id>.json` and `x/layer.tar`, the second image's layer a link to the first's.
fn old_form() -> Vec<u8> {
    let (base, top) = (tar_of(FILES), gzip(&tar_of(&[("b", "b")])));
    let first = config_of("linux/amd64", std::slice::from_ref(&base));
    let second = config_of("linux/amd64", &[base.clone(), tar_of(&[("b", "b")])]);
    let list = json!([
        { "Config": "first.json", "RepoTags": ["app:1"], "Layers": ["one/layer.tar"] },
        { "Config": "./second.json", "RepoTags": null, "Layers": ["two/layer.tar", "three/layer.tar"] },
    ]);
    tar(&[
        ("one/layer.tar", &base),
        ("two/layer.tar->../one/layer.tar", b""),
        ("three/layer.tar", &top),
        ("first.json", &first),
        ("second.json", &second),
        ("manifest.json", list.to_string().as_bytes()),
    ])
}

#[tokio::test]
async fn the_old_form_is_read_in_place() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("old.tar");
    std::fs::write(&path, old_form()).unwrap();
    let archive = Archive::open(&path, std::path::Path::new("/nowhere")).unwrap();
    assert_eq!(archive.entries()[0].names, ["docker.io/library/app:1"]);
    let second = content(&archive, &archive.entries()[1].descriptor).await.unwrap();
    assert_eq!(second[1..], [tar_of(FILES), gzip(&tar_of(&[("b", "b")]))]);
    let graph = walk(&archive, &archive.entries()[1].descriptor).await.unwrap();
    let types: Vec<&str> = graph.blobs.iter().map(|blob| blob.media_type().as_ref()).collect();
    assert!(types[1].ends_with(".tar") && types[2].ends_with("+gzip"), "{types:?}");
    let (_to, to) = fresh();
    copy(&archive, &to, &archive.entries()[0].descriptor, &copy::Options::default()).await.unwrap();
}

#[tokio::test]
async fn an_oci_manifest_without_its_layers_gives_way_to_dockers_list() {
    let layer = tar_of(FILES);
    let config = config_of("linux/amd64", std::slice::from_ref(&layer));
    let config_blob = describe(image::OCI_CONFIG, &Digest::of(&config), config.len() as u64);
    for layers in [json!([]), json!(null)] {
        let manifest = json!({
            "schemaVersion": 2, "mediaType": image::OCI_MANIFEST, "config": config_blob, "layers": layers,
        });
        let manifest = manifest.to_string();
        let broken = describe(image::OCI_MANIFEST, &Digest::of(&manifest), manifest.len() as u64);
        let blob = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
        let list = json!([{ "Config": blob(&config), "RepoTags": ["app:1"], "Layers": [blob(&layer)] }]);
        let archive = tar(&[
            (&blob(&config), &config),
            (&blob(&layer), &layer),
            (&blob(manifest.as_bytes()), manifest.as_bytes()),
            ("index.json", json!({ "schemaVersion": 2, "manifests": [broken] }).to_string().as_bytes()),
            ("manifest.json", list.to_string().as_bytes()),
        ]);
        let archive = read(&archive).unwrap();
        assert_eq!(archive.entries().len(), 1);
        assert_eq!(content(&archive, &archive.entries()[0].descriptor).await.unwrap(), [config.clone(), layer.clone()]);
    }
}

#[tokio::test]
async fn hostile_archives_are_refused() {
    let config = config_of("linux/amd64", &[tar_of(FILES)]);
    let layers = |layers: Value| json!([{ "Config": "c.json", "Layers": layers }]).to_string();
    let cut = old_form();
    for (bytes, reason) in [
        (tar(&[("hello", b"x")]), "neither index.json nor manifest.json"),
        (b"not a tar at all, but long enough to be looked at ".repeat(20), "not valid"),
        (cut[..700].to_vec(), "ends within"),
        (tar(&[("manifest.json", b"{}")]), "not valid"),
        (tar(&[("index.json", br#"{"manifests":[{"digest":"sha256:../x"}]}"#)]), "not valid"),
        (tar(&[("oci-layout", br#"{"imageLayoutVersion":"9"}"#), ("index.json", b"{}")]), "version \"9\""),
        (
            tar(&[("c.json", &config), ("manifest.json", layers(json!(["../../etc/passwd"])).as_bytes())]),
            "does not hold",
        ),
        (tar(&[("c.json", &config), ("manifest.json", layers(json!([])).as_bytes())]), "names 1 layers but 0"),
        (
            tar(&[
                ("c.json", &config),
                ("a->b", b""),
                ("b->a", b""),
                ("manifest.json", layers(json!(["a"])).as_bytes()),
            ]),
            "does not hold",
        ),
        (
            tar(&[("c.json", &config), ("a->/etc/passwd", b""), ("manifest.json", layers(json!(["a"])).as_bytes())]),
            "does not hold",
        ),
        (
            tar(&[("c.json", &config), ("l", b"BZh91"), ("manifest.json", layers(json!(["l"])).as_bytes())]),
            "compressed with bzip2",
        ),
    ] {
        let error = read(&bytes).err().map(|error| error.to_string()).unwrap_or_else(|| panic!("no error: {reason}"));
        assert!(error.contains(reason), "{reason}: {error}");
    }
    // What lies about its content is found when it is read.
    let list = layers(json!(["l"]));
    let members: &[(&str, &[u8])] = &[("c.json", &config), ("l", b"other bytes"), ("manifest.json", list.as_bytes())];
    let archive = read(&tar(members)).unwrap();
    assert!(content(&archive, &archive.entries()[0].descriptor).await.is_err());
    // A header that says more than the file has.
    let mut lying = tar(&[("index.json", b"{}")]);
    let mut header = tar::Header::from_byte_slice(&lying[..512]).clone();
    header.set_size(1 << 50);
    header.set_cksum();
    lying[..512].copy_from_slice(header.as_bytes());
    assert!(read(&lying).is_err());
}

#[tokio::test]
async fn others_read_what_is_written() {
    let (directory, layout) = fresh();
    let image = put_image(&layout, "linux/amd64", &[FILES, &[("b", "b")]]).await;
    let path = directory.path().join("image.tar");
    let mut file = tokio::fs::File::create(&path).await.unwrap();
    write_docker_tar(&layout, &[named(&image, &["docker.io/library/app:1"])], &mut file).await.unwrap();
    for form in ["docker-archive", "oci-archive"] {
        match Command::new("skopeo").args(["inspect", &format!("{form}:{}", path.display())]).output() {
            Err(_) => return eprintln!("skipped: skopeo is not installed"),
            Ok(output) => {
                assert!(output.status.success(), "{form}: {}", String::from_utf8_lossy(&output.stderr));
                let seen: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(seen["Layers"].as_array().unwrap().len(), 2, "{form}");
            }
        }
    }
    // And the other way: what skopeo writes is read.
    let theirs = directory.path().join("theirs.tar");
    let to = format!("docker-archive:{}:app:2", theirs.display());
    let from = format!("docker-archive:{}", path.display());
    let output = Command::new("skopeo").args(["copy", &from, &to]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let archive = Archive::open(&theirs, directory.path()).unwrap();
    assert_eq!(archive.entries()[0].names, ["docker.io/library/app:2"]);
    assert_eq!(content(&archive, &archive.entries()[0].descriptor).await.unwrap().len(), 3);
}

#[tokio::test]
async fn real_images_make_the_round_trip() {
    for path in base_images().into_iter().filter(|path| path.ends_with("alpine") || path.ends_with("busybox")) {
        let layout = Layout::open(&path).unwrap();
        let images = [named(&layout.entries().unwrap()[0].descriptor, &["trip"])];
        let mut bytes = Vec::new();
        write_oci_tar(&layout, &images, &mut bytes).await.unwrap();
        let archive = read(&bytes).unwrap();
        let root = &archive.entries()[0].descriptor;
        assert_eq!(content(&archive, root).await.unwrap(), content(&layout, root).await.unwrap());
    }
}

#[tokio::test]
async fn documents_in_memory_are_found_by_digest() {
    let archive = read(&old_form()).unwrap();
    for entry in archive.entries() {
        let (descriptor, bytes) = archive.manifest(entry.descriptor.digest().as_ref()).await.unwrap();
        assert_eq!((descriptor.digest(), descriptor.size()), (entry.descriptor.digest(), bytes.len() as u64));
        assert!(archive.has(&descriptor).await.unwrap());
    }
    let (_directory, layout) = fresh();
    let config = put(&layout, image::OCI_CONFIG, b"{}").await;
    assert!(!archive.has(&config).await.unwrap());
    let manifest = json!({ "schemaVersion": 2, "mediaType": image::OCI_MANIFEST, "config": config, "layers": [] });
    let strange = put_json(&layout, &manifest).await;
    assert!(archive.manifest(strange.digest().as_ref()).await.is_err());
    assert!(archive.resolve("app:9").await.unwrap_err().to_string().contains("there is docker.io/library/app:1"));
}
