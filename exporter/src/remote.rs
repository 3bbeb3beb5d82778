//! Registry repositories as ends of a copy, and the registry client as the place where lazy blobs are.

use bytes::Bytes;
use forge_snapshotter::Digest;
use forge_snapshotter::image::Reference;
use oci_spec::image::Descriptor;

use crate::blobs::{BlobReader, Blobs, Manifests, Origin};
use crate::local::Origins;
use crate::registry::{Client, Repository};
use crate::{Error, Result};

impl Manifests for Repository {
    async fn resolve(&self, name: &str) -> Result<Descriptor> {
        Repository::resolve(self, name).await
    }

    async fn manifest(&self, name: &str) -> Result<(Descriptor, Bytes)> {
        Repository::manifest(self, name).await
    }

    async fn put_manifest(&self, tag: Option<&str>, media_type: &str, bytes: &[u8]) -> Result<Digest> {
        Repository::put_manifest(self, tag, media_type, bytes).await
    }

    /// A registry takes a manifest only when it has what the manifest names, so one that is there needs no look at its
    /// blobs. One that will not say is asked for each of them, which will tell why.
    async fn complete(&self, manifest: &Descriptor) -> Result<bool> {
        let found = Repository::resolve(self, manifest.digest().as_ref()).await;
        Ok(found.is_ok_and(|found| found.digest() == manifest.digest()))
    }

    async fn mount(&self, blob: &Descriptor, from: &Origin) -> Result<bool> {
        match from.registry == self.registry() && from.repository != self.name() {
            true => Repository::mount(self, blob, &from.repository).await,
            false => Ok(false),
        }
    }
}

impl Origins for Client {
    async fn open(&self, origin: &Origin, blob: &Descriptor) -> Result<BlobReader> {
        let name = format!("{}/{}", origin.registry, origin.repository);
        let name: Reference = name.parse().map_err(|error| Error::malformed("a recorded origin", error))?;
        self.repository(&name).read(blob).await
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};
    use std::sync::{Arc, Mutex};

    use forge_snapshotter::{SnapshotId, Store};

    use super::*;
    use crate::blobs::digest_of;
    use crate::copy::{self, Step, copy};
    use crate::fetch::fetch_config;
    use crate::layout::Layout;
    use crate::local::Local;
    use crate::pack::{PackOptions, pack};
    use crate::registry::ClientOptions;
    use crate::testing::{put_image, put_index};
    use crate::tests::build;
    use crate::unpack::{UnpackOptions, unpack_layers};

    struct Server {
        child: Child,
        address: String,
        _directory: tempfile::TempDir,
    }

    impl Drop for Server {
        fn drop(&mut self) {
            // Gone already is as good.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }

    fn serve() -> Option<Server> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yml");
        let data = directory.path().join("data");
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {data:?}}}\nhttp:\n  addr: 127.0.0.1:0\n"
        );
        std::fs::write(&path, config).unwrap();
        let mut command = Command::new("docker-registry");
        let spawned = command.arg("serve").arg(path).stderr(Stdio::piped()).stdout(Stdio::null()).spawn();
        let Ok(mut child) = spawned else {
            eprintln!("skipped: docker-registry is not installed");
            return None;
        };
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut server = Server { child, address: String::new(), _directory: directory };
        let mut line = String::new();
        while server.address.is_empty() {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "docker-registry ended before it listened");
            if let Some((_, rest)) = line.split_once("listening on 127.0.0.1:") {
                let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
                server.address = format!("127.0.0.1:{port}");
            }
        }
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Some(server)
    }

    #[tokio::test]
    async fn an_image_goes_round_and_its_base_stays_where_it_is() {
        let Some(server) = serve() else { return };
        let client = Client::new(ClientOptions::default()).unwrap();
        let of = |name: &str| client.repository(&format!("{}/{name}", server.address).parse().unwrap());
        let (base, app) = (of("base"), of("team/app"));
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(&directory.path().join("layout")).unwrap();
        let image = put_image(&layout, "linux/amd64", &[&[("etc/base", "base")]]).await;
        let index = put_index(&layout, &[image]).await;
        let tagged = |tag: &str| copy::Options { tags: vec![tag.to_owned()], ..copy::Options::default() };
        copy(&layout, &base, &index, &tagged("1")).await.unwrap();

        let store = Store::open(&directory.path().join("here")).unwrap();
        let amd64 = "linux/amd64".parse().unwrap();
        let fetched = fetch_config(&store, &base, "1", &amd64).await.unwrap();
        let layer = digest_of(&fetched.layers[0].0).unwrap();
        let image = build(&store, &fetched.config.rootfs.diff_ids, None, "on top");
        let packed = pack(&store, &image, &PackOptions::default()).await.unwrap();
        let local = Local::with_origins(store.clone(), client.clone());
        let steps = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&steps);
        let progress: copy::Progress = Arc::new(move |blob, step| {
            seen.lock().unwrap().push((blob.digest().to_string(), step));
        });
        let options = copy::Options { progress: Some(progress), ..tagged("v1") };
        copy(&local, &app, &packed.manifest, &options).await.unwrap();
        let origin = Origin { registry: server.address.clone(), repository: "base".into() };
        let mounted = (layer.to_string(), Step::Mounted(origin));
        assert!(steps.lock().unwrap().contains(&mounted), "{steps:?}");
        assert_eq!(store.content().size(&layer).unwrap(), None, "the base was downloaded");

        // What the registry has whole is not looked at again.
        steps.lock().unwrap().clear();
        copy(&local, &app, &packed.manifest, &options).await.unwrap();
        assert_eq!(steps.lock().unwrap()[..], []);

        // To a place that cannot mount, the base streams from where it is.
        copy(&local, &layout, &packed.manifest, &tagged("streamed")).await.unwrap();
        assert!(layout.has(&fetched.layers[0].0).await.unwrap());

        let elsewhere = Store::open(&directory.path().join("elsewhere")).unwrap();
        let fetched = fetch_config(&elsewhere, &app, "v1", &amd64).await.unwrap();
        let root = unpack_layers(&elsewhere, &app, &fetched.layers, &UnpackOptions::default()).await.unwrap();
        assert_eq!(root, SnapshotId::chain(&fetched.config.rootfs.diff_ids));
        let view = elsewhere.snapshots().view(&root).unwrap();
        for (file, text) in [("etc/base", "base"), ("built", "on top")] {
            assert_eq!(std::fs::read_to_string(view.root().join(file)).unwrap(), text);
        }
    }
}
