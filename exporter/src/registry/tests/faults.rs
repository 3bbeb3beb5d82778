//! What registries and networks do, one table each.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;

use super::server::{Contents, Received, Reply, Server};
use super::*;

fn honest(_: &Received, _: &mut Contents) -> Option<Reply> {
    None
}

async fn push(repository: &Repository, bytes: &[u8]) -> crate::Result<Digest> {
    let blob = blob_of(bytes);
    if !repository.has(&blob).await? {
        repository.write(&blob, reader(bytes)).await?;
    }
    repository.put_manifest(Some("v1"), MANIFEST, &image_of(&[&blob])).await
}

async fn pull(repository: &Repository) -> Result<Vec<u8>, String> {
    let (descriptor, bytes) = match repository.resolve("v1").await {
        Ok(resolved) => repository.manifest(resolved.digest().as_ref()).await.map_err(|e| e.to_string())?,
        Err(error) => return Err(error.to_string()),
    };
    assert_eq!(descriptor.size(), bytes.len() as u64);
    let image: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    read_blob(repository, &serde_json::from_value(image["config"].clone()).unwrap()).await
}

/// A token server and its registry in one: tokens are good for `uses` requests each.
fn guarded(uses: usize) -> impl Fn(&Received, &mut Contents) -> Option<Reply> + Send + Sync {
    let (issued, used) = (AtomicUsize::new(0), AtomicUsize::new(0));
    move |received, _| {
        if received.target.starts_with("/token") {
            used.store(0, Ordering::Relaxed);
            let token = issued.fetch_add(1, Ordering::Relaxed) + 1;
            return Some(Reply::new(200).body(format!(r#"{{"token":"T{token}","expires_in":300}}"#)));
        }
        let good = received.header("authorization") == format!("Bearer T{}", issued.load(Ordering::Relaxed))
            && used.fetch_add(1, Ordering::Relaxed) < uses;
        let realm = format!(r#"Bearer realm="http://{}/token",service="test""#, received.header("host"));
        (!good).then(|| Reply::new(401).header("www-authenticate", realm))
    }
}

#[tokio::test]
async fn a_token_is_fetched_once_for_all_who_wait() {
    let server = Server::start(guarded(usize::MAX)).await;
    let repository = server.repository(ClientOptions::default());
    let blobs: Vec<_> = (0..8u8).map(|i| server.put_blob(&[i])).collect();
    let found = join_all(blobs.iter().map(|blob| repository.has(blob))).await;
    assert!(found.into_iter().all(|found| found.unwrap()));
    assert_eq!(server.count("GET", "/token"), 1);
    let token = server.log().into_iter().find(|received| received.is("GET", "/token")).unwrap();
    assert_eq!(token.target, "/token?service=test&scope=repository%3Ateam%2Fapp%3Apull");
    assert_eq!(token.header("user-agent"), concat!("forge/", env!("CARGO_PKG_VERSION")));
    // Pulls go on with the token for pushing.
    push(&repository, b"new").await.unwrap();
    repository.resolve("v1").await.unwrap();
    assert_eq!(server.count("GET", "/token"), 2);
}

#[tokio::test]
async fn tokens_may_expire_at_any_request() {
    for uses in 1..6 {
        let server = Server::start(guarded(uses)).await;
        let repository = server.repository(ClientOptions::default());
        let bytes = noise(100_000);
        push(&repository, &bytes).await.unwrap();
        assert_eq!(pull(&repository).await.unwrap(), bytes, "{uses}");
    }
}

#[tokio::test]
async fn every_kind_of_credentials_is_presented_as_its_server_wants_it() {
    let password = || Credentials::password("forge", "SECRET");
    let identity = || Credentials::Identity(Secret::new("SECRET"));
    for (name, credentials, get_status, expect) in [
        ("password by GET", password(), 200, "Basic Zm9yZ2U6U0VDUkVU"),
        ("password by POST", password(), 405, "grant_type=password&username=forge&password=SECRET"),
        ("identity token", identity(), 200, "grant_type=refresh_token&refresh_token=SECRET"),
        ("token as it is", Credentials::Token(Secret::new("T1")), 404, "Bearer T1"),
    ] {
        let server = Server::start(move |received, _| {
            let realm = format!(r#"Basic realm="other", Bearer realm="http://{}/token""#, received.header("host"));
            match received.header("authorization") {
                _ if received.is("GET", "/token") => Some(Reply::new(get_status).body(r#"{"access_token":"T1"}"#)),
                _ if received.is("POST", "/token") => Some(Reply::new(200).body(r#"{"access_token":"T1"}"#)),
                "Bearer T1" => None,
                _ => Some(Reply::new(401).header("www-authenticate", realm)),
            }
        })
        .await;
        let options = ClientOptions { credentials: vec![(server.host(), credentials)], ..ClientOptions::default() };
        push(&server.repository(options), b"x").await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let shown =
            |r: &Received| r.header("authorization") == expect || String::from_utf8_lossy(&r.body).contains(expect);
        assert!(server.log().iter().any(shown), "{name}");
    }
}

#[tokio::test]
async fn what_a_server_refuses_is_said_without_secrets() {
    for (rule_status, realm, expect) in [
        (401, "http://{host}/token", "401 Unauthorized: WORDS; user name or password are not accepted: forge login"),
        (500, "http://{host}/token", "500 Internal Server Error: WORDS"),
        (200, "http://169.254.169.254/token", "internal address 169.254.169.254"),
        (200, "ftp://127.0.0.1/token", "leads to a ftp: URL"),
        (200, "http://{host}/token", "the token server sent no token"),
    ] {
        let server = Server::start(move |received, _| {
            let realm = format!(r#"Bearer realm="{}""#, realm.replace("{host}", received.header("host")));
            match received.target.starts_with("/token") {
                true => Some(Reply::new(rule_status).body(r#"{"details":"WORDS"}"#)),
                false => Some(Reply::new(401).header("www-authenticate", realm)),
            }
        })
        .await;
        let credentials = vec![(server.host(), Credentials::password("forge", "SECRET"))];
        let options = ClientOptions { credentials, tries: 1, ..ClientOptions::default() };
        let error = server.repository(options).resolve("v1").await.unwrap_err();
        assert!(error.to_string().contains(expect), "{error}");
        for secret in ["SECRET", "Zm9yZ2U6U0VDUkVU"] {
            assert!(!format!("{error} {error:?}").contains(secret), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_redirect_takes_no_password_to_another_host() {
    for status in [307, 308] {
        let other = Server::start(|_, _| Some(Reply::new(200).body(r#"{"token":"T1"}"#))).await;
        let target = format!("http://{}/token", other.host());
        let server = Server::start(move |received, _| {
            let realm = format!(r#"Bearer realm="http://{}/token""#, received.header("host"));
            match received.method.as_str() {
                "GET" if received.target.starts_with("/token") => Some(Reply::new(405)),
                "POST" => Some(Reply::new(status).header("location", target.clone())),
                _ => Some(Reply::new(401).header("www-authenticate", realm)),
            }
        })
        .await;
        for credentials in [Credentials::password("forge", "SECRET"), Credentials::Identity(Secret::new("SECRET"))] {
            let credentials = vec![(server.host(), credentials)];
            let repository = server.repository(ClientOptions { credentials, tries: 1, ..ClientOptions::default() });
            repository.resolve("v1").await.unwrap_err();
        }
        assert!(server.count("POST", "/token") > 0);
        assert_eq!(other.log().len(), 0, "{:?}", other.log());
    }
}

#[tokio::test]
async fn a_403_in_the_middle_is_not_the_last_word() {
    for (at, survives) in [(1, false), (2, true), (3, true), (4, true)] {
        let server = Server::start(move |received, _| match received.header("authorization") {
            "" => Some(Reply::new(401).header("www-authenticate", "Basic realm=x")),
            _ => (received.index == at).then(|| Reply::new(403).body("Your authorization token has expired")),
        })
        .await;
        let credentials = vec![(server.host(), Credentials::password("forge", "SECRET"))];
        let repository = server.repository(ClientOptions { credentials, ..ClientOptions::default() });
        let blob = server.put_blob(b"x");
        let found = read_blob(&repository, &blob).await;
        let pushed = push(&repository, b"new").await;
        assert_eq!((found.is_ok(), pushed.is_ok()), (survives, true), "{at}: {found:?} {pushed:?}");
    }
}

/// Every single fault at every request of a push and a pull.
#[tokio::test]
async fn any_one_fault_is_survived() {
    type Fault = fn() -> Reply;
    let faults: [(&str, Fault); 5] = [
        ("reset", Reply::reset),
        ("429", || Reply::new(429).header("retry-after", "0")),
        ("500", || Reply::new(500).header("retry-after", "0").body("<h1>no</h1>")),
        ("503", || Reply::new(503).header("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")),
        ("cut", || Reply::new(200).body(vec![b'{'; 1000]).header("content-length", "2000").cut(500)),
    ];
    let one = |name: &'static str, fault: Fault, at: usize| async move {
        let server = Server::start(move |received, _| (received.index == at).then(fault)).await;
        let repository = server.repository(ClientOptions::default());
        let bytes = noise(50_000);
        if let Err(error) = push(&repository, &bytes).await {
            panic!("push, {name} at {at}: {error}");
        }
        match pull(&server.repository(ClientOptions::default())).await {
            Ok(found) => assert_eq!(found, bytes, "pull, {name} at {at}"),
            // Lies with status 200 are caught, not repaired.
            Err(error) => assert!(name == "cut", "pull, {name} at {at}: {error}"),
        }
        server.log().len()
    };
    // One request of a push and a pull each: probe, HEAD, POST, PUT, PUT; probe, HEAD, GET, GET.
    assert_eq!(one("none", Reply::reset, 1000).await, 9);
    // A HEAD or a PUT that is answered 200 has been answered: bodies are cut short on the way back only.
    let all = faults.iter().flat_map(|(name, fault)| (0..9).map(move |at| (name, fault, at)));
    join_all(all.filter(|(name, _, at)| **name != "cut" || *at > 5).map(|(name, fault, at)| one(name, *fault, at)))
        .await;
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_broke() {
    let bytes = noise(400_000);
    for ranges in [true, false] {
        let whole = bytes.clone();
        let server = Server::start(move |received, _| {
            if !received.is("GET", "/blobs/") {
                return None;
            }
            match received.header("range") {
                "" => Some(Reply::new(200).body(whole.clone()).cut(150_000)),
                _ if ranges => None,
                _ => Some(Reply::new(200).body(whole.clone())),
            }
        })
        .await;
        let blob = server.put_blob(&bytes);
        let found = read_blob(&server.repository(ClientOptions::default()), &blob).await.unwrap();
        assert!(found == bytes, "ranges {ranges}");
        let asked: Vec<_> =
            server.log().iter().map(|r| r.header("range").to_owned()).filter(|r| !r.is_empty()).collect();
        assert_eq!(asked, ["bytes=150000-399999"]);
    }
}

#[tokio::test]
async fn lies_about_blobs_are_caught() {
    let bytes = noise(10_000);
    type Lie = fn(&[u8]) -> Reply;
    let lies: [(&str, Lie, &str); 6] = [
        ("other bytes", |b| Reply::new(200).body(vec![0; b.len()]), "bytes with digest sha256:"),
        ("longer", |b| Reply::new(200).body([b, b"x"].concat()), "sends 10001 bytes where 10000 were announced"),
        ("shorter", |b| Reply::new(200).body(&b[1..]), "sends 9999 bytes where 10000 were announced"),
        ("longer, unannounced", |b| chunked(&[b, b"x"].concat()), "longer than the 10000 bytes announced"),
        ("always broken off", |b| Reply::new(200).body(b).cut(10), ""),
        ("another range", |b| Reply::new(206).header("content-range", "bytes 0-9/10000").body(b), "another range"),
    ];
    for (name, lie, expect) in lies {
        let whole = bytes.clone();
        let server = Server::start(move |received, _| match (name, received.header("range")) {
            _ if !received.is("GET", "/blobs/") => None,
            ("another range", "") => Some(Reply::new(200).body(whole.clone()).cut(10)),
            _ => Some(lie(&whole)),
        })
        .await;
        let blob = server.put_blob(&bytes);
        let options = ClientOptions { tries: 2, ..ClientOptions::default() };
        let error = read_blob(&server.repository(options), &blob).await.expect_err(name);
        assert!(error.contains(expect), "{name}: {error}");
    }
}

/// A body without a length.
fn chunked(bytes: &[u8]) -> Reply {
    let body = [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n0\r\n\r\n"].concat();
    Reply::new(200).header("transfer-encoding", "chunked").header("content-length", "").body(body)
}

#[tokio::test]
async fn what_is_too_large_goes_in_pieces() {
    let too_large = |words: &'static str, status: u16| {
        move |received: &Received, _: &mut Contents| {
            (received.body.len() > 100_000).then(|| Reply::new(status).body(words))
        }
    };
    for (status, words) in
        [(413, "<h1>Request Entity Too Large</h1>"), (400, r#"{"errors":[{"code":"SIZE_INVALID"}]}"#)]
    {
        let server = Server::start(too_large(words, status)).await;
        let options = ClientOptions { upload_chunk_bytes: 300_000, ..ClientOptions::default() };
        let bytes = noise(350_000);
        push(&server.repository(options), &bytes).await.unwrap();
        assert!(server.contents().blobs[&blob_of(&bytes).digest().to_string()] == bytes);
        // 300,000 and 150,000 are still too much; 75,000 goes.
        assert_eq!(server.count("PATCH", ""), 2 + 5);
    }
    // A proxy that breaks off instead of answering.
    let server = Server::start(|received, _| (received.body.len() > 100_000).then(Reply::reset)).await;
    let options = ClientOptions { upload_chunk_bytes: 90_000, ..ClientOptions::default() };
    push(&server.repository(options), &noise(250_000)).await.unwrap();
    assert_eq!(server.count("PATCH", ""), 3);
}

#[tokio::test]
async fn a_piece_that_arrived_is_not_sent_twice() {
    // The second PATCH is taken, but its answer is lost.
    let patches = AtomicUsize::new(0);
    let server = Server::start(move |received, contents| {
        let lost = received.method == "PATCH" && patches.fetch_add(1, Ordering::Relaxed) == 1;
        let at = received.is("GET", "/uploads/").then(|| {
            let path = received.target.clone();
            Reply::new(204).header("range", "0-199999").header("location", path)
        });
        lost.then(|| {
            contents.take_piece(received);
            Reply::reset()
        })
        .or(at)
    })
    .await;
    let repository = server.repository(ClientOptions::default());
    let bytes = noise(250_000);
    let digest = Digest::of(&bytes);
    upload::in_pieces(&repository, &digest, &payload::Payload::Bytes(bytes.into()), 100_000).await.unwrap();
    assert_eq!(server.count("PATCH", ""), 3);
}

/// How far a session has come is the server's word.
#[tokio::test]
async fn a_session_that_is_impossibly_far_is_not_resumed() {
    let bytes = noise(200_000);
    let server = Server::start(move |received, _| match received.method.as_str() {
        "PUT" if !received.body.is_empty() => Some(Reply::new(413)),
        "PATCH" => Some(Reply::new(503)),
        "GET" if received.target.contains("/uploads/") => {
            Some(Reply::new(204).header("location", received.target.clone()).header("range", format!("0-{}", u64::MAX)))
        }
        _ => None,
    })
    .await;
    let options = ClientOptions { tries: 1, upload_chunk_bytes: 100_000, ..ClientOptions::default() };
    push(&server.repository(options), &bytes).await.unwrap_err();
    assert!(server.count("GET", "/uploads/") > 0);
}

#[tokio::test]
async fn redirects() {
    let bytes = noise(1000);
    let storage = Server::start(|received, _| {
        (!received.header("authorization").is_empty()).then(|| Reply::new(400).body("Only one auth mechanism allowed"))
    })
    .await;
    let blob = storage.put_blob(&bytes);
    let elsewhere = format!("http://{}/signed/blobs/{}?signature=SECRET", storage.host(), blob.digest());
    for (location, expect) in [
        (elsewhere.as_str(), Ok(())),
        ("/moved/blobs/", Ok(())),
        ("/v2/team/app/blobs/", Err("more than 10 redirects")),
        ("http://169.254.169.254/latest", Err("internal address 169.254.169.254")),
        ("file:///etc/passwd", Err("leads to a file: URL")),
        ("http://[::1/", Err("its Location is not a URL")),
    ] {
        let target = match location.ends_with("/blobs/") {
            true => format!("{location}{}", blob.digest()),
            false => location.to_owned(),
        };
        let server = Server::start(move |received, _| {
            let realm = r#"Basic realm="x""#;
            match received.header("authorization") {
                "" => Some(Reply::new(401).header("www-authenticate", realm)),
                _ => received.is("GET", "/v2/team/app/blobs/").then(|| Reply::new(307).header("location", &target)),
            }
        })
        .await;
        server.put_blob(&bytes);
        let credentials = vec![(server.host(), Credentials::password("forge", "SECRET"))];
        let found =
            read_blob(&server.repository(ClientOptions { credentials, ..ClientOptions::default() }), &blob).await;
        match expect {
            Ok(()) => assert!(found.as_ref().is_ok_and(|found| *found == bytes), "{location}: {found:?}"),
            Err(expect) => {
                let error = found.expect_err(location);
                assert!(error.contains(expect) && !error.contains("SECRET"), "{error}");
            }
        }
    }
    assert_eq!(storage.log().len(), 1);
}

#[tokio::test]
async fn mounts_are_only_a_try() {
    let bytes = noise(1000);
    for (status, mounted, posts) in [(201, true, 1), (202, false, 1), (403, false, 2), (404, false, 2), (500, false, 2)]
    {
        let server = Server::start(move |received, contents| match received.target.contains("mount=") {
            true if status == 202 => None,
            true => {
                contents
                    .blobs
                    .extend((status == 201).then(|| (blob_of(&noise(1000)).digest().to_string(), noise(1000))));
                Some(Reply::new(status))
            }
            false => None,
        })
        .await;
        let repository = server.repository(ClientOptions::default());
        let blob = blob_of(&bytes);
        assert_eq!(repository.mount(&blob, "team/other").await.unwrap(), mounted, "{status}");
        repository.write(&blob, reader(&bytes)).await.unwrap();
        assert_eq!(read_blob(&repository, &blob).await.unwrap(), bytes, "{status}");
        // An upload that the refused mount opened is used.
        assert_eq!(server.count("POST", ""), posts, "{status}");
    }
}

#[tokio::test]
async fn locations_in_every_form() {
    let forms: [fn(&str, &str) -> String; 4] = [
        |_, path| path.to_owned(),
        |host, path| format!("http://{host}{path}"),
        |host, path| format!("{host}{path}"),
        |_, path| path.trim_start_matches("/v2/team/app/blobs/uploads/").to_owned(),
    ];
    for form in forms {
        let server = Server::with_location(honest, form).await;
        push(&server.repository(ClientOptions::default()), b"x")
            .await
            .unwrap_or_else(|e| panic!("{}: {e}", form("H", "/P")));
    }
    let server = Server::with_location(honest, |_, path| format!("http://169.254.169.254{path}")).await;
    let error = push(&server.repository(ClientOptions::default()), b"x").await.unwrap_err().to_string();
    assert!(error.contains("internal address"), "{error}");
}

#[tokio::test]
async fn manifests_are_not_believed() {
    for (status, body, expect) in [
        (200, r#"{"schemaVersion":1,"fsLayers":[]}"#, "retired schema 1 format"),
        (200, "<html>", "not a manifest"),
        (
            403,
            r#"{"errors":[{"code":"DENIED","message":"pay first"}]}"#,
            "DENIED: pay first; it may not exist, be private",
        ),
        (429, "slow down", "429 Too Many Requests: slow down"),
    ] {
        let server = Server::start(move |received, _| {
            let reply = Reply::new(status).body(body).header("retry-after", "100000");
            received.target.contains("/manifests/").then_some(reply)
        })
        .await;
        let error = server.repository(ClientOptions::default()).resolve("v1").await.unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
    let server = Server::start(|received, _| {
        received.target.contains("/manifests/").then(|| Reply::new(200).body(vec![b' '; 9 << 20]))
    })
    .await;
    let repository = server.repository(ClientOptions::default());
    let error = repository.manifest("v1").await.unwrap_err().to_string();
    assert!(error.contains("longer than 8388608 bytes"), "{error}");
    let error = repository.resolve("../../x").await.unwrap_err().to_string();
    assert!(error.contains("neither a tag nor a digest"), "{error}");

    let server = Server::start(honest).await;
    let digest = Digest::of("other");
    server.contents().manifests.insert(digest.to_string(), image_of(&[&blob_of(b"x")]));
    let error = server.repository(ClientOptions::default()).manifest(digest.as_str()).await.unwrap_err().to_string();
    assert!(error.contains("the bytes have digest"), "{error}");
}

#[tokio::test]
async fn an_immutable_tag_that_holds_the_same_is_success() {
    let immutable = |received: &Received, _: &mut Contents| {
        let error = r#"{"errors":[{"code":"TAG_INVALID","message":"tag is immutable"}]}"#;
        received.is("PUT", "/manifests/").then(|| Reply::new(400).body(error))
    };
    let server = Server::start(immutable).await;
    let repository = server.repository(ClientOptions::default());
    let image = image_of(&[&blob_of(b"x")]);
    server.contents().manifests.insert("v1".to_owned(), image.clone());
    repository.put_manifest(Some("v1"), MANIFEST, &image).await.unwrap();
    let other = image_of(&[&blob_of(b"y")]);
    let error = repository.put_manifest(Some("v1"), MANIFEST, &other).await.unwrap_err().to_string();
    assert!(error.contains("the tag is immutable there"), "{error}");
}

#[tokio::test]
async fn tags_are_read_page_by_page() {
    let server = Server::start(|received, _| {
        let page = |tags: &str| Reply::new(200).body(format!(r#"{{"name":"team/app","tags":{tags}}}"#));
        Some(match received.target.as_str() {
            "/v2/team/app/tags/list?n=1000" => {
                page(r#"["a","b"]"#).header("link", r#"</v2/team/app/tags/list?last=b&n=1000>; rel="next""#)
            }
            "/v2/team/app/tags/list?last=b&n=1000" => page("null"),
            _ => return None,
        })
    })
    .await;
    assert_eq!(server.repository(ClientOptions::default()).tags().await.unwrap(), ["a", "b"]);
}

#[tokio::test]
async fn nothing_listening_is_said_with_host_and_port() {
    let port = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    let name = format!("127.0.0.1:{port}/x").parse().unwrap();
    let error = Client::new(ClientOptions::default()).unwrap().repository(&name).tags().await.unwrap_err().to_string();
    assert!(error.contains(&format!("nothing listens on 127.0.0.1:{port}")), "{error}");
}

#[tokio::test]
async fn a_silent_server_does_not_hold_us() {
    let blob = blob_of(&noise(1000));
    let options = |stall_ms| ClientOptions {
        tries: 1,
        stall_timeout: Duration::from_millis(stall_ms),
        ..ClientOptions::default()
    };
    // It accepts, and never says a word; the kernel's backlog does the accepting.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = format!("127.0.0.1:{}/x", silent.local_addr().unwrap().port()).parse().unwrap();
    let client = Client::new(ClientOptions { plain_http: vec!["127.0.0.1".to_owned()], ..options(50) }).unwrap();
    let error = client.repository(&name).has(&blob).await.unwrap_err().to_string();
    assert!(error.contains("nothing has moved for 50ms"), "{error}");
}

#[tokio::test]
async fn people_are_told_why_they_wait() {
    let first = AtomicUsize::new(0);
    let server = Server::start(move |received, _| {
        let busy = received.is("HEAD", "/blobs/") && first.fetch_add(1, Ordering::Relaxed) == 0;
        busy.then(|| Reply::new(503).header("retry-after", "0").header("warning", "299 - \"moving soon\""))
    })
    .await;
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = told.clone();
    let notify: Notify = Arc::new(move |text: &str| hears.lock().unwrap().push(text.to_owned()));
    let blob = server.put_blob(b"x");
    let repository = server.repository(ClientOptions { notify: Some(notify), ..ClientOptions::default() });
    assert!(repository.has(&blob).await.unwrap());
    let host = server.host();
    let expect =
        [format!("{host} warns: moving soon"), format!("{host}: 503 Service Unavailable; trying again in 0.0 s")];
    assert_eq!(*told.lock().unwrap(), expect);
}

#[tokio::test]
async fn nothing_is_stored_that_is_not_what_it_is_called() {
    for length in [1000, 6_000_000] {
        let bytes = noise(length);
        let blob = blob_of(&bytes);
        let (mut other, short) = (bytes.clone(), &bytes[..length - 1]);
        other[0] ^= 1;
        for (name, data, expect) in
            [("other", other.as_slice(), "DIGEST_INVALID"), ("short", short, "failed to read what is to be uploaded")]
        {
            let server = Server::start(honest).await;
            let error = server.repository(ClientOptions::default()).write(&blob, reader(data)).await;
            let error = error.expect_err(name).to_string();
            assert!(error.contains(expect), "{name} {length}: {error}");
            assert!(server.contents().blobs.is_empty());
            // Trying again cannot help, so it is not done.
            assert!(server.count("PUT", "") <= 1 && server.count("POST", "") <= 1, "{name} {length}");
        }
    }
}
