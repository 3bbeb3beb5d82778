//! A registry in memory that speaks HTTP/1.1 by hand, remembers every request, and misbehaves where a test says so.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;

#[derive(Clone, Debug)]
pub struct Received {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
    /// How many requests came before it.
    pub index: usize,
}

impl Received {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn is(&self, method: &str, part: &str) -> bool {
        self.method == method && self.target.contains(part)
    }

    fn query(&self, name: &str) -> Option<String> {
        let url: url::Url = format!("http://x{}", self.target).parse().unwrap();
        url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }
}

#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Close the connection after so many bytes of the body; 0 closes before the answer.
    pub cut: Option<usize>,
}

impl Reply {
    pub fn new(status: u16) -> Reply {
        Reply { status, ..Reply::default() }
    }

    pub fn reset() -> Reply {
        Reply { cut: Some(0), ..Reply::new(200) }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn body(self, body: impl Into<Vec<u8>>) -> Reply {
        Reply { body: body.into(), ..self }
    }

    pub fn cut(self, after: usize) -> Reply {
        Reply { cut: Some(after), ..self }
    }
}

#[derive(Default)]
pub struct Contents {
    pub blobs: BTreeMap<String, Vec<u8>>,
    pub manifests: BTreeMap<String, Vec<u8>>,
    sessions: HashMap<String, Vec<u8>>,
    opened: usize,
}

impl Contents {
    /// Takes what a PATCH brings, for a rule that answers it otherwise.
    pub fn take_piece(&mut self, received: &Received) {
        let id = received.target.split('?').next().unwrap().rsplit('/').next().unwrap();
        self.sessions.get_mut(id).unwrap().extend(&received.body);
    }
}

/// What may go wrong: asked first for every request, with what the honest answer would be made of.
pub type Rule = Box<dyn Fn(&Received, &mut Contents) -> Option<Reply> + Send + Sync>;

struct State {
    rule: Rule,
    /// How a session's path is written in `Location`, given the host.
    location: fn(&str, &str) -> String,
    log: Mutex<Vec<Received>>,
    contents: Mutex<Contents>,
}

pub struct Server {
    pub port: u16,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn start(rule: impl Fn(&Received, &mut Contents) -> Option<Reply> + Send + Sync + 'static) -> Server {
        Server::with_location(rule, |_, path| path.to_owned()).await
    }

    pub async fn with_location(
        rule: impl Fn(&Received, &mut Contents) -> Option<Reply> + Send + Sync + 'static,
        location: fn(&str, &str) -> String,
    ) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state =
            Arc::new(State { rule: Box::new(rule), location, log: Mutex::default(), contents: Mutex::default() });
        let shared = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Server { port, state, task }
    }

    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn repository(&self, options: ClientOptions) -> Repository {
        Client::new(options).unwrap().repository(&format!("{}/team/app", self.host()).parse().unwrap())
    }

    pub fn log(&self) -> Vec<Received> {
        self.state.log.lock().unwrap().clone()
    }

    pub fn count(&self, method: &str, part: &str) -> usize {
        self.log().iter().filter(|received| received.is(method, part)).count()
    }

    pub fn put_blob(&self, bytes: &[u8]) -> Descriptor {
        let blob = blob_of(bytes);
        self.contents().blobs.insert(blob.digest().to_string(), bytes.to_vec());
        blob
    }

    pub fn contents(&self) -> std::sync::MutexGuard<'_, Contents> {
        self.state.contents.lock().unwrap()
    }
}

async fn serve(stream: TcpStream, state: Arc<State>) {
    let mut stream = BufReader::new(stream);
    while let Some(mut received) = receive(&mut stream).await {
        let reply = {
            let mut log = state.log.lock().unwrap();
            received.index = log.len();
            log.push(received.clone());
            let mut contents = state.contents.lock().unwrap();
            (state.rule)(&received, &mut contents).unwrap_or_else(|| answer(&received, &mut contents, state.location))
        };
        if !send(&mut stream, &received, reply).await {
            return;
        }
    }
}

/// `None` at the end of the connection.
async fn receive(stream: &mut BufReader<TcpStream>) -> Option<Received> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").map_or(0, |text| text.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some(Received { method, target, headers, body, index: 0 })
}

/// False when the connection is to be closed.
async fn send(stream: &mut BufReader<TcpStream>, received: &Received, reply: Reply) -> bool {
    if reply.cut == Some(0) {
        return false;
    }
    let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
    let own_length = reply.headers.iter().any(|(name, _)| name == "content-length");
    if !own_length && reply.status != 204 {
        head += &format!("content-length: {}\r\n", reply.body.len());
    }
    // An empty value leaves the header out.
    for (name, value) in reply.headers.iter().filter(|(_, value)| !value.is_empty()) {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    let body = if received.method == "HEAD" { &[] } else { &reply.body[..reply.cut.unwrap_or(reply.body.len())] };
    let written = stream.write_all(head.as_bytes()).await.and(stream.write_all(body).await);
    written.is_ok() && stream.flush().await.is_ok() && reply.cut.is_none()
}

fn problem(status: u16, code: &str) -> Reply {
    Reply::new(status).body(format!(r#"{{"errors":[{{"code":"{code}","message":"as the test wants it"}}]}}"#))
}

/// The honest registry: one repository, whatever it is called.
fn answer(received: &Received, contents: &mut Contents, location: fn(&str, &str) -> String) -> Reply {
    let path = received.target.split('?').next().unwrap();
    let last = path.rsplit('/').next().unwrap().to_owned();
    // Bodies must be announced: proxies drop those that are not.
    if matches!(received.method.as_str(), "POST" | "PUT" | "PATCH") && received.header("content-length").is_empty() {
        return problem(411, "LENGTH_REQUIRED");
    }
    let open = |contents: &mut Contents| {
        contents.opened += 1;
        let id = format!("s{}", contents.opened);
        contents.sessions.insert(id.clone(), Vec::new());
        session_reply(202, received, &id, 0, location)
    };
    match received.method.as_str() {
        "GET" if path == "/v2/" => Reply::new(200),
        "POST" if path.ends_with("/blobs/uploads/") => open(contents),
        "PATCH" if path.contains("/uploads/") => patch(received, contents, &last, location),
        "PUT" if path.contains("/uploads/") => finish(received, contents, &last),
        "GET" | "HEAD" if path.contains("/blobs/") => match contents.blobs.get(&last) {
            Some(bytes) => blob_reply(received, bytes),
            None => problem(404, "BLOB_UNKNOWN"),
        },
        "PUT" if path.contains("/manifests/") => {
            let digest = Digest::of(&received.body).to_string();
            contents.manifests.insert(digest, received.body.clone());
            contents.manifests.insert(last, received.body.clone());
            Reply::new(201)
        }
        "GET" | "HEAD" if path.contains("/manifests/") => match contents.manifests.get(&last) {
            Some(bytes) => Reply::new(200)
                .header("content-type", format!("{MANIFEST}; charset=utf-8"))
                .header("docker-content-digest", Digest::of(bytes).to_string())
                .body(bytes.clone()),
            None => problem(404, "MANIFEST_UNKNOWN"),
        },
        _ => problem(404, "UNSUPPORTED"),
    }
}

fn session_reply(
    status: u16,
    received: &Received,
    id: &str,
    length: usize,
    location: fn(&str, &str) -> String,
) -> Reply {
    // The state is what a client must send back untouched.
    let path = format!("/v2/team/app/blobs/uploads/{id}?_state=a%3Db");
    Reply::new(status)
        .header("location", location(received.header("host"), &path))
        .header("range", format!("0-{}", length.saturating_sub(1)))
}

fn patch(received: &Received, contents: &mut Contents, id: &str, location: fn(&str, &str) -> String) -> Reply {
    let Some(session) = contents.sessions.get_mut(id) else { return problem(404, "BLOB_UPLOAD_UNKNOWN") };
    let start = received.header("content-range").split('-').next().unwrap();
    if start.parse() != Ok(session.len()) {
        return session_reply(416, received, id, session.len(), location);
    }
    session.extend(&received.body);
    session_reply(202, received, id, session.len(), location)
}

fn finish(received: &Received, contents: &mut Contents, id: &str) -> Reply {
    if received.query("_state").as_deref() != Some("a=b") {
        return problem(400, "STATE_LOST");
    }
    // A session is used up, whatever comes of it.
    let Some(mut bytes) = contents.sessions.remove(id) else { return problem(404, "BLOB_UPLOAD_UNKNOWN") };
    bytes.extend(&received.body);
    let digest = received.query("digest").unwrap_or_default();
    if Digest::of(&bytes).as_str() != digest {
        return problem(400, "DIGEST_INVALID");
    }
    contents.blobs.insert(digest, bytes);
    Reply::new(201)
}

fn blob_reply(received: &Received, bytes: &[u8]) -> Reply {
    let Some(range) = received.header("range").strip_prefix("bytes=") else { return Reply::new(200).body(bytes) };
    let (start, end) = range.split_once('-').unwrap();
    // Open ranges are refused, as some registries do.
    let (Ok(start), Ok(end)) = (start.parse::<usize>(), end.parse::<usize>()) else {
        return problem(416, "RANGE_INVALID");
    };
    Reply::new(206).header("content-range", format!("bytes {start}-{end}/{}", bytes.len())).body(&bytes[start..=end])
}
