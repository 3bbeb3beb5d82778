//! Against `docker-registry` (Debian's build of distribution), started on a free loopback port.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use super::*;

/// `forge` with the password `secret`.
const HTPASSWD: &str = "forge:$2b$04$RHe8ZYdmCn6Cbcv6twMHQewAPiJxHpw7Ut9wN1UIph0RgCg3X3R.6\n";
/// An authority of this test alone, and a key and certificate of it for localhost; valid until 2126.
const AUTHORITY: &str = include_str!("ca.crt");

struct Registry {
    child: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may be gone already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

enum Door {
    Open,
    Password,
    Tls,
}

/// `None`, with a word on stderr, where there is no such program.
fn start(door: Door) -> Option<Registry> {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("htpasswd"), HTPASSWD).unwrap();
    std::fs::write(path("server.crt"), include_str!("server.crt")).unwrap();
    std::fs::write(path("server.key"), include_str!("server.key")).unwrap();
    let tls = format!("\n  tls: {{certificate: {:?}, key: {:?}}}", path("server.crt"), path("server.key"));
    let auth = format!("auth: {{htpasswd: {{realm: forge, path: {:?}}}}}\n", path("htpasswd"));
    let config = format!(
        "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {:?}}}\n  delete: {{enabled: true}}\n{}http:\n  addr: 127.0.0.1:0{}\n",
        path("data"),
        if matches!(door, Door::Password) { &auth } else { "" },
        if matches!(door, Door::Tls) { &tls } else { "" },
    );
    std::fs::write(path("config.yml"), config).unwrap();
    let command = Command::new("docker-registry")
        .arg("serve")
        .arg(path("config.yml"))
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn();
    let Ok(mut child) = command else {
        eprintln!("skipped: docker-registry is not installed");
        return None;
    };
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut registry = Registry { child, port: 0, directory };
    let mut line = String::new();
    while registry.port == 0 {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "docker-registry ended before it listened");
        let port =
            line.split_once("listening on 127.0.0.1:").map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit));
        registry.port = port.map_or(0, |digits| digits.collect::<String>().parse().unwrap());
    }
    // Read on, so that it never blocks on a full pipe.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    Some(registry)
}

impl Registry {
    fn repository(&self, name: &str, options: ClientOptions) -> Repository {
        let name = format!("127.0.0.1:{}/{name}", self.port).parse().unwrap();
        Client::new(options).unwrap().repository(&name)
    }
}

async fn push_and_pull(repository: &Repository, directory: &std::path::Path) {
    let (config, small, large) = (b"{}".to_vec(), noise(100_000), noise(9_000_000));
    let blobs = [blob_of(&config), blob_of(&small), blob_of(&large)];
    for blob in &blobs {
        assert!(!repository.has(blob).await.unwrap());
    }
    repository.write_bytes(&blobs[0], config.into()).await.unwrap();
    let file = directory.join("layer");
    std::fs::write(&file, &small).unwrap();
    repository.write_file(&blobs[1], &file).await.unwrap();
    repository.write(&blobs[2], reader(&large)).await.unwrap();

    let image = image_of(&[&blobs[0], &blobs[1], &blobs[2]]);
    let digest = repository.put_manifest(Some("v1"), MANIFEST, &image).await.unwrap();
    repository.put_manifest(Some("v2"), MANIFEST, &image).await.unwrap();
    assert_eq!(digest, Digest::of(&image));

    let resolved = repository.resolve("v1").await.unwrap();
    let (found, bytes) = repository.manifest("v1").await.unwrap();
    assert_eq!((&resolved, bytes.as_ref()), (&found, image.as_slice()));
    assert_eq!(repository.manifest(digest.as_str()).await.unwrap().1, bytes);
    assert_eq!(read_blob(repository, &blobs[1]).await.unwrap(), small);
    assert_eq!(read_blob(repository, &blobs[2]).await.unwrap(), large);
    let mut tags = repository.tags().await.unwrap();
    tags.sort();
    assert_eq!(tags, ["v1", "v2"]);

    repository.delete(&digest).await.unwrap();
    let gone = repository.resolve("v1").await.unwrap_err().to_string();
    assert!(gone.contains("404") && gone.contains("MANIFEST_UNKNOWN"), "{gone}");
}

#[tokio::test]
async fn what_is_pushed_can_be_pulled() {
    let Some(registry) = start(Door::Open) else { return };
    let repository = registry.repository("team/app", ClientOptions::default());
    push_and_pull(&repository, registry.directory.path()).await;
}

#[tokio::test]
async fn blobs_are_mounted_from_another_repository() {
    let Some(registry) = start(Door::Open) else { return };
    let client = Client::new(ClientOptions::default()).unwrap();
    let of = |name: &str| client.repository(&format!("127.0.0.1:{}/{name}", registry.port).parse().unwrap());
    let bytes = noise(1000);
    let blob = blob_of(&bytes);
    of("source").write_bytes(&blob, bytes.clone().into()).await.unwrap();
    assert!(of("target").mount(&blob, "source").await.unwrap());
    assert_eq!(read_blob(&of("target"), &blob).await.unwrap(), bytes);
    let missing = of("other");
    assert!(!missing.mount(&blob, "nowhere").await.unwrap());
    missing.write_bytes(&blob, bytes.clone().into()).await.unwrap();
    assert!(missing.has(&blob).await.unwrap());
}

#[tokio::test]
async fn pieces_arrive_whole() {
    let Some(registry) = start(Door::Open) else { return };
    let repository = registry.repository("pieces", ClientOptions::default());
    let bytes = noise(300_000);
    let digest = Digest::of(&bytes);
    let payload = payload::Payload::Bytes(bytes.clone().into());
    upload::in_pieces(&repository, &digest, &payload, 100_000).await.unwrap();
    assert_eq!(read_blob(&repository, &blob_of(&bytes)).await.unwrap(), bytes);
}

#[tokio::test]
async fn passwords() {
    let Some(registry) = start(Door::Password) else { return };
    let host = format!("127.0.0.1:{}", registry.port);
    let with = |password: &str| ClientOptions {
        credentials: vec![(host.clone(), Credentials::password("forge", password))],
        tries: 1,
        ..ClientOptions::default()
    };
    push_and_pull(&registry.repository("private", with("secret")), registry.directory.path()).await;
    Client::new(with("secret")).unwrap().check(&host).await.unwrap();
    for options in [with("WRONG"), ClientOptions::default()] {
        Client::new(options.clone()).unwrap().check(&host).await.unwrap_err();
        let error = registry.repository("private", options).resolve("v1").await.unwrap_err().to_string();
        assert!(error.contains("401") && error.contains(&format!("forge login {host}")), "{error}");
        assert!(!error.contains("WRONG"), "{error}");
    }
}

#[tokio::test]
async fn own_authorities() {
    let Some(registry) = start(Door::Tls) else { return };
    let directory = registry.directory.path();
    let certs = directory.join("certs.d");
    let host = format!("127.0.0.1:{}", registry.port);
    std::fs::create_dir_all(certs.join(&host)).unwrap();
    std::fs::write(certs.join(&host).join("ca.crt"), AUTHORITY).unwrap();
    let file = directory.join("ca.pem");
    std::fs::write(&file, AUTHORITY).unwrap();
    let default = ClientOptions::default;
    for (name, options) in [
        ("certs.d", ClientOptions { certs_directories: vec![certs], ..default() }),
        ("file", ClientOptions { ca_files: vec![file], ..default() }),
        ("insecure", ClientOptions { insecure: vec![host.clone()], ..default() }),
    ] {
        push_and_pull(&registry.repository(name, options), directory).await;
    }
    let error = registry.repository("x", default()).tags().await.unwrap_err().to_string();
    assert!(error.contains(&format!("certs.d/{host}/ca.crt")), "{error}");
}
