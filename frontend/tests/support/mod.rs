//! A world made of constants, for planning against.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::sync::Mutex;

use forge_frontend::diagnostic::{Lines, render};
use forge_frontend::{
    BaseImage, ContextName, Diagnostic, NamedContext, Plan, Remote, RemoteFiles, Request, SourceError, Sources, parse,
    plan,
};
use forge_solver::graph::image::{ImageConfig, Platform, Reference};
use forge_solver::graph::{Digest, Network, Op, Selection, Unkeyed};

#[derive(Default)]
pub struct World {
    images: BTreeMap<String, ImageConfig>,
    /// Every question, in the order asked.
    pub asked: Mutex<Vec<String>>,
}

impl World {
    pub fn new() -> World {
        let mut world = World::default();
        world.add("debian:12", r#"{"Env":["PATH=/bin"],"Cmd":["bash"]}"#);
        world.add("app:latest", r#"{"Env":["A=1"],"User":"app","WorkingDir":"/srv","Shell":["/bin/bash","-c"]}"#);
        world
    }

    pub fn add(&mut self, name: &str, config: &str) {
        let config = format!(r#"{{"architecture":"amd64","os":"linux","config":{config},"container":"x"}}"#);
        self.images.insert(name.to_owned(), serde_json::from_str(&config).unwrap());
    }

    fn ask(&self, question: String) {
        self.asked.lock().unwrap().push(question);
    }
}

impl Sources for World {
    async fn image(&self, name: &Reference, platform: &Platform) -> Result<BaseImage, SourceError> {
        self.ask(format!("image {} {platform}", name.familiar()));
        let config = self.images.get(&name.familiar()).cloned();
        let missing = || SourceError { message: "not found".to_owned(), hint: Some("is it spelled right?".to_owned()) };
        let mut config = config.ok_or_else(missing)?;
        config.architecture.clone_from(&platform.architecture);
        let digest = Digest::of(format!("{name} {platform}"));
        Ok(BaseImage { diff_ids: vec![Digest::of(format!("layer {digest}"))], digest, config })
    }

    async fn context(&self, context: &ContextName, files: &Selection) -> Result<Digest, SourceError> {
        let name = match context {
            ContextName::Main => "main",
            ContextName::Named(name) => name,
        };
        let exclude = if files.exclude.is_empty() { String::new() } else { format!(" but {:?}", files.exclude) };
        self.ask(format!("context {name} {:?}{exclude}", files.paths));
        if files.paths.iter().any(|path| path == "missing") {
            return Err(SourceError { message: "\"missing\" is not in the context".to_owned(), hint: None });
        }
        Ok(Digest::of(format!("{name} {files:?}")))
    }

    async fn remote(&self, remote: &Remote) -> Result<RemoteFiles, SourceError> {
        self.ask(format!("remote {remote:?}"));
        let path = match remote {
            Remote::Http { url, .. } => url.rsplit('/').next().unwrap_or_default().to_owned(),
            Remote::Git { .. } => String::new(),
        };
        Ok(RemoteFiles { digest: Digest::of(format!("{remote:?}")), path })
    }
}

pub fn request() -> Request {
    Request {
        target: None,
        platforms: Vec::new(),
        build_platform: Platform::new("linux", "amd64", None),
        build_args: BTreeMap::new(),
        contexts: BTreeMap::new(),
        labels: BTreeMap::new(),
        network: Network::Default,
        hosts: Vec::new(),
        unkeyed: Unkeyed::default(),
        epoch: None,
        ignore: Vec::new(),
    }
}

/// A request from `--target x --build-arg a=b --platform p --context name` words.
pub fn request_of(words: &str) -> Request {
    let mut request = request();
    for word in words.split_whitespace() {
        let (key, value) = word.split_once(':').expect("key:value");
        match key {
            "target" => request.target = Some(value.to_owned()),
            "platform" => request.platforms.push(value.parse().unwrap()),
            "arg" => {
                let (name, value) = value.split_once('=').unwrap();
                request.build_args.insert(name.to_owned(), value.to_owned());
            }
            "files" => drop(request.contexts.insert(value.to_owned(), NamedContext::Files)),
            "image" => {
                let (name, image) = value.split_once('=').unwrap();
                request.contexts.insert(name.to_owned(), NamedContext::Image(image.parse().unwrap()));
            }
            other => panic!("{other}"),
        }
    }
    request
}

/// Parses and plans; parse errors come first.
pub fn build(text: &str, request: &Request, world: &World) -> (Result<Plan, Vec<Diagnostic>>, Vec<Diagnostic>) {
    let (file, found) = parse(text);
    if found.iter().any(Diagnostic::is_error) {
        return (Err(found.clone()), found);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    (runtime.block_on(plan(&file, request, world)), found)
}

pub fn planned(text: &str, words: &str) -> Plan {
    let (plan, _) = build(text, &request_of(words), &World::new());
    plan.unwrap_or_else(|errors| panic!("{text}\n{}", rendered(text, &errors)))
}

pub fn rendered(text: &str, diagnostics: &[Diagnostic]) -> String {
    let lines = Lines::new(text);
    diagnostics.iter().map(|diagnostic| render(diagnostic, "Dockerfile", &lines)).collect()
}

/// The lines of history of the first image; those with a layer are marked `+`.
pub fn history(plan: &Plan) -> Vec<String> {
    let mark = |layer: bool| if layer { "+" } else { " " };
    plan.images[0].history.iter().map(|line| format!("{} {}", mark(line.layer.is_some()), line.created_by)).collect()
}

/// The operations of the first image, first to last.
pub fn ops(plan: &Plan) -> Vec<&Op> {
    let layers = plan.images[0].history.iter().filter_map(|line| line.layer.as_ref());
    layers.map(|id| &plan.graph.get(id).op).collect()
}

/// The labels of all nodes, sorted.
pub fn labels(plan: &Plan) -> Vec<String> {
    let mut labels: Vec<String> = plan.graph.ids().map(|id| plan.graph.label(id).name.clone()).collect();
    labels.sort();
    labels
}
