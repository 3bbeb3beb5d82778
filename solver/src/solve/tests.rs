use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use forge_snapshotter::Active;
use proptest::prelude::*;

use super::*;
use crate::BoundMount;
use crate::event::{Event, Stream};
use crate::graph::image::Platform;
use crate::graph::{Location, Mkdir, Mount, MountKind, Network, Security, Selection, Unpack};

/// Runs no program: the arguments are a script, with `;` between its commands.
#[derive(Default)]
struct Script {
    /// The arguments of what was executed, in order.
    ran: Mutex<Vec<String>>,
    dropped: AtomicBool,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Executor for Script {
    async fn execute(
        &self,
        run: &Run,
        root: &Active,
        mounts: &[BoundMount],
        output: &Output,
    ) -> Result<ExitStatus, ExecuteError> {
        locked(&self.ran).push(run.args.join(" "));
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_running.fetch_max(running, Ordering::SeqCst);
        let mut status = ExitStatus::Exited(0);
        for command in run.args.split(|argument| argument == ";") {
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            match words[..] {
                ["write", path, text] => fs::write(root.root().join(path), text).unwrap(),
                ["join", path] => {
                    let mut files = files_of(root.root());
                    for (mount, bound) in mounts.iter().enumerate() {
                        if let BoundMount::Path(path) = bound {
                            files.extend(files_of(path).into_iter().map(|(k, v)| (format!("{mount}:{k}"), v)));
                        }
                    }
                    let text: Vec<String> = files.iter().map(|(path, text)| format!("{path}={text}\n")).collect();
                    fs::write(root.root().join(path), Digest::of(text.concat()).as_str()).unwrap();
                }
                ["show", path] => {
                    let BoundMount::Path(mounted) = &mounts[0] else { panic!("not bound") };
                    fs::copy(mounted, root.root().join(path)).unwrap();
                }
                ["scribble"] => {
                    let BoundMount::Path(mounted) = &mounts[0] else { panic!("not bound") };
                    fs::write(mounted.join("scribble"), "x").unwrap();
                }
                ["fail", code] => {
                    output.write(Stream::Stderr, &vec![b'x'; 2 * TAIL_BYTES]);
                    output.write(Stream::Stderr, b"the end");
                    status = ExitStatus::Exited(code.parse().unwrap());
                }
                ["hang"] => {
                    let _dropped = OnDrop(&self.dropped);
                    std::future::pending::<()>().await;
                }
                ["meet"] => {
                    while self.most_running.load(Ordering::SeqCst) < 2 {
                        tokio::task::yield_now().await;
                    }
                }
                ["yield"] => {
                    for _ in 0..20 {
                        tokio::task::yield_now().await;
                    }
                }
                ref other => panic!("no such command: {other:?}"),
            }
        }
        self.running.fetch_sub(1, Ordering::SeqCst);
        Ok(status)
    }
}

fn files_of(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            } else {
                let path = entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                found.insert(path, fs::read_to_string(entry.path()).unwrap());
            }
        }
    }
    found
}

/// Contexts by digest, and images made of thin air.
struct Sources {
    store: Store,
    trees: Mutex<HashMap<Digest, Arc<Tree>>>,
    fetched: Mutex<Vec<Leaf>>,
}

impl Fetcher for Sources {
    async fn fetch(&self, leaf: &Leaf, _: &Events) -> Result<Fetched, FetchError> {
        locked(&self.fetched).push(leaf.clone());
        match leaf {
            Leaf::Files { digest } => {
                let tree = locked(&self.trees).get(digest).cloned();
                tree.map(Fetched::Tree).ok_or_else(|| FetchError(format!("no files {digest}")))
            }
            Leaf::Image { diff_ids } => {
                let active = self.store.snapshots().prepare(None).unwrap();
                fs::write(active.root().join("base"), diff_ids[0].as_str()).unwrap();
                let id = SnapshotId::chain(diff_ids);
                self.store.snapshots().commit(active, id.clone()).unwrap();
                Ok(Fetched::Snapshot(id))
            }
        }
    }
}

struct Bench {
    directory: Arc<tempfile::TempDir>,
    store: Store,
    script: Arc<Script>,
    sources: Arc<Sources>,
    events: Arc<Mutex<Vec<Event>>>,
    fresh: Fresh,
    jobs: usize,
}

impl Bench {
    fn new() -> Bench {
        Bench::on(Arc::new(tempfile::tempdir().unwrap()))
    }

    /// Another process's view of the same state directory, as far as one process can have one.
    fn beside(&self) -> Bench {
        Bench::on(self.directory.clone())
    }

    fn on(directory: Arc<tempfile::TempDir>) -> Bench {
        let store = Store::open(&directory.path().join("state")).unwrap();
        let sources = Sources { store: store.clone(), trees: Mutex::default(), fetched: Mutex::default() };
        Bench {
            directory,
            store,
            script: Arc::default(),
            sources: Arc::new(sources),
            events: Arc::default(),
            fresh: Fresh::Nothing,
            jobs: 4,
        }
    }

    async fn solve(&self, graph: &Graph, roots: &[NodeId]) -> Result<Vec<SnapshotId>, SolveError> {
        let seen = self.events.clone();
        let events = Events::new(move |event| locked(&seen).push(event));
        let options = Options { jobs: self.jobs, fresh: self.fresh.clone(), events };
        let solver = Solver::new(self.store.clone(), self.script.clone(), self.sources.clone(), options);
        solver.solve(graph, roots).await
    }

    /// What a solve executed.
    async fn ran(&self, graph: &Graph, root: &NodeId) -> Vec<String> {
        self.solve(graph, std::slice::from_ref(root)).await.unwrap();
        std::mem::take(&mut *locked(&self.script.ran))
    }

    async fn files(&self, graph: &Graph, root: &NodeId) -> BTreeMap<String, String> {
        let ids = self.solve(graph, std::slice::from_ref(root)).await.unwrap();
        files_of(self.store.snapshots().view(&ids[0]).unwrap().root())
    }

    /// A node for a context with those files.
    fn context(&self, graph: &mut Graph, files: &[(&str, &str)]) -> NodeId {
        let root = tempfile::tempdir_in(self.directory.path()).unwrap().keep();
        for (path, text) in files {
            fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            fs::write(root.join(path), text).unwrap();
        }
        let selection = Selection { paths: vec![String::new()], exclude: Vec::new() };
        let (ignore, owners) = (None, Owners::Root);
        let what = Scan { root: &root, selection: &selection, ignore, owners, parents: false };
        let tree = Arc::new(scan(&what, &StatCache::none()).unwrap());
        let digest = tree.digest.clone();
        locked(&self.sources.trees).insert(digest.clone(), tree);
        graph.add(Op::Files { digest }, Vec::new(), Label::default())
    }

    fn reasons(&self) -> Vec<String> {
        let events = std::mem::take(&mut *locked(&self.events));
        let reasons = events.into_iter().filter_map(|event| match event.kind {
            EventKind::Missed { reason } => Some(reason),
            _ => None,
        });
        reasons.collect()
    }
}

fn image(graph: &mut Graph, name: &str) -> NodeId {
    graph.add(Op::Image { diff_ids: vec![Digest::of(name)] }, Vec::new(), Label::default())
}

fn label(stage: &str, line: usize) -> Label {
    Label {
        name: format!("[{stage}] {line}"),
        stage: stage.into(),
        location: Some(Location { first_line: line, last_line: line }),
    }
}

fn script(text: &str) -> Run {
    Run {
        args: text.split(' ').map(str::to_owned).collect(),
        env: Vec::new(),
        cwd: "/".into(),
        user: String::new(),
        network: Network::Default,
        security: Security::Sandbox,
        mounts: Vec::new(),
        files: Vec::new(),
        hosts: Vec::new(),
        hostname: "buildkitsandbox".into(),
        platform: "linux/amd64".parse::<Platform>().unwrap(),
        unkeyed: Default::default(),
    }
}

fn run(graph: &mut Graph, on: &NodeId, line: usize, text: &str) -> NodeId {
    graph.add(Op::Run(Box::new(script(text))), vec![on.clone()], label("main", line))
}

fn copy_of(graph: &mut Graph, on: &NodeId, from: &NodeId, path: &str, line: usize) -> NodeId {
    let op = Copy {
        sources: vec![CopySource::Path { input: 1, path: path.into(), pivot: None }],
        destination: "/".into(),
        owner: None,
        mode: None,
        parents: false,
        exclude: Vec::new(),
        unpack: Unpack::Never,
    };
    graph.add(Op::Copy(op), vec![on.clone(), from.clone()], label("main", line))
}

#[tokio::test]
async fn what_was_built_is_not_built_again_and_its_base_not_fetched() {
    let bench = Bench::new();
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let context = bench.context(&mut graph, &[("src/a", "1")]);
    let copied = copy_of(&mut graph, &base, &context, "", 2);
    let first = run(&mut graph, &copied, 3, "write one 1");
    let second = run(&mut graph, &first, 4, "join two");
    assert_eq!(bench.ran(&graph, &second).await, ["write one 1", "join two"]);
    assert_eq!(bench.files(&graph, &second).await.keys().collect::<Vec<_>>(), ["base", "one", "src/a", "two"]);
    assert_eq!(bench.reasons(), ["first build"; 3]);
    locked(&bench.sources.fetched).clear();

    let beside = bench.beside();
    let start = Instant::now();
    assert!(beside.ran(&graph, &second).await.is_empty());
    eprintln!("cached solve, store opened: {:?}", start.elapsed());
    assert_eq!(locked(&beside.events).len(), 6, "the steps that led there are told as well, two events each");
    assert!(locked(&beside.sources.fetched).is_empty());
}

#[tokio::test]
async fn equal_results_cut_off_what_follows() {
    let bench = Bench::new();
    let build = |text: &str, other: &str| {
        let mut graph = Graph::default();
        let base = image(&mut graph, "base");
        let context = bench.context(&mut graph, &[("read", text), ("other", other)]);
        let stage = copy_of(&mut graph, &base, &context, "", 1);
        let taken = copy_of(&mut graph, &base, &stage, "read", 2);
        let last = run(&mut graph, &taken, 3, "join end");
        (graph, last)
    };
    let (graph, last) = build("1", "1");
    assert_eq!(bench.ran(&graph, &last).await, ["join end"]);
    let (graph, last) = build("1", "2");
    assert!(bench.ran(&graph, &last).await.is_empty(), "the stage changed, but not what is copied from it");
    let (graph, last) = build("2", "2");
    assert_eq!(bench.ran(&graph, &last).await, ["join end"]);

    // A RUN that writes what it wrote before keeps what follows.
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let made = run(&mut graph, &base, 1, "write x 1");
    let end = run(&mut graph, &made, 2, "join end2");
    bench.ran(&graph, &end).await;
    let made = run(&mut graph, &base, 1, "write x 0 ; write x 1");
    let end = run(&mut graph, &made, 2, "join end2");
    assert_eq!(bench.ran(&graph, &end).await, ["write x 0 ; write x 1"]);
}

#[tokio::test]
async fn every_miss_says_why() {
    let bench = Bench::new();
    let build = |base: &str, file: &str, command: &str, variable: &str| {
        let mut graph = Graph::default();
        let base = image(&mut graph, base);
        let context = bench.context(&mut graph, &[("src/main.rs", file)]);
        let copied = copy_of(&mut graph, &base, &context, "src/main.rs", 2);
        let op = Run { env: vec![("VERSION".into(), variable.into())], ..script(command) };
        let last = graph.add(Op::Run(Box::new(op)), vec![copied], label("main", 3));
        (graph, last)
    };
    for (base, file, command, variable, expect) in [
        ("b", "1", "write x 1", "1", &["first build", "first build"][..]),
        ("b", "1", "write x 2", "1", &["RUN text changed"]),
        ("b", "1", "write x 2", "2", &["env VERSION changed: \"1\" -> \"2\""]),
        ("b", "2", "write x 2", "2", &["COPY src/main.rs changed", "an earlier step changed"]),
        ("c", "2", "write x 2", "2", &["base changed", "an earlier step changed"]),
        ("c", "2", "write x 2", "2", &[]),
    ] {
        let (graph, last) = build(base, file, command, variable);
        bench.ran(&graph, &last).await;
        assert_eq!(bench.reasons(), expect, "{base} {file} {command} {variable}");
    }
    let (graph, last) = build("c", "2", "write x 2", "2");
    let id = bench.solve(&graph, std::slice::from_ref(&last)).await.unwrap().remove(0);
    bench.reasons();
    let trees = locked(&bench.sources.trees).clone();
    let directory = bench.directory.clone();
    drop(bench);
    let bench = Bench::on(directory);
    let sql = "DELETE FROM snapshots WHERE id = ?";
    bench.store.database().with(|connection| connection.execute(sql, [id.to_string()])).unwrap();
    bench.ran(&graph, &last).await;
    assert_eq!(bench.reasons(), ["evicted"]);
    let fresh = Bench { fresh: Fresh::Stages(vec!["MAIN".into()]), ..bench.beside() };
    locked(&fresh.sources.trees).extend(trees);
    assert_eq!(fresh.ran(&graph, &last).await, ["write x 2"]);
    assert_eq!(fresh.reasons(), ["--no-cache", "--no-cache"]);
    let other = Bench { fresh: Fresh::Stages(vec!["other".into()]), ..bench.beside() };
    assert!(other.ran(&graph, &last).await.is_empty());
}

#[tokio::test]
async fn a_failure_cancels_the_rest_and_says_which_step_with_the_end_of_its_output() {
    let bench = Bench::new();
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let hangs = run(&mut graph, &base, 1, "hang");
    let fails = run(&mut graph, &base, 2, "meet ; fail 3");
    let error = bench.solve(&graph, &[hangs, fails.clone()]).await.unwrap_err();
    assert_eq!((error.node, error.kind.to_string()), (fails, "exit code 3".to_owned()));
    assert!(error.output.len() == TAIL_BYTES && error.output.ends_with(b"xthe end"));
    assert!(bench.script.dropped.load(Ordering::SeqCst), "the other step was dropped");
    let events = locked(&bench.events);
    let outcomes = events.iter().filter_map(|event| match &event.kind {
        EventKind::Finished { outcome } => Some(outcome.clone()),
        _ => None,
    });
    let expect = [Outcome::Failed { message: "exit code 3".into() }, Outcome::Cancelled];
    assert_eq!(outcomes.collect::<Vec<_>>(), expect);
}

#[tokio::test]
async fn dropping_a_solve_drops_its_steps() {
    let bench = Bench::new();
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let hangs = run(&mut graph, &base, 1, "hang");
    let roots = [hangs];
    let mut solve = Box::pin(bench.solve(&graph, &roots));
    while locked(&bench.script.ran).is_empty() {
        let waited = tokio::time::timeout(Duration::from_millis(1), &mut solve).await;
        assert!(waited.is_err(), "it hangs");
    }
    drop(solve);
    assert!(bench.script.dropped.load(Ordering::SeqCst));
    assert!(matches!(locked(&bench.events).last().unwrap().kind, EventKind::Finished { outcome: Outcome::Cancelled }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_runs_once_whoever_asks() {
    let benches: Vec<Bench> = {
        let first = Bench::new();
        let beside: Vec<Bench> = (0..3).map(|_| first.beside()).collect();
        std::iter::once(first).chain(beside).collect()
    };
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let shared = run(&mut graph, &base, 1, "yield ; write a 1");
    let left = run(&mut graph, &shared, 2, "yield ; write l 1");
    let right = run(&mut graph, &shared, 3, "yield ; write r 1");
    let solves = benches.iter().map(|bench| bench.solve(&graph, std::slice::from_ref(&left)));
    let all = futures_util::future::try_join_all(solves).await.unwrap();
    assert!(all.iter().all(|ids| *ids == all[0]));
    let ran: Vec<String> = benches.iter().flat_map(|bench| locked(&bench.script.ran).clone()).collect();
    assert_eq!(ran.len(), 2, "{ran:?}");
    benches[0].solve(&graph, &[left, right]).await.unwrap();
    assert_eq!(locked(&benches[0].script.ran).last().unwrap(), "yield ; write r 1");
}

#[tokio::test]
async fn no_more_steps_run_at_once_than_asked() {
    let bench = Bench { jobs: 2, ..Bench::new() };
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let roots: Vec<NodeId> =
        (0..6).map(|at| run(&mut graph, &base, at, &format!("meet ; yield ; write f {at}"))).collect();
    bench.solve(&graph, &roots).await.unwrap();
    assert_eq!(bench.script.most_running.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn mounts_show_their_input_and_keep_nothing() {
    let bench = Bench::new();
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let context = bench.context(&mut graph, &[("d/file", "from files")]);
    let stage = run(&mut graph, &base, 1, "write made stage");
    let mut mounted = |input: &NodeId, source: &str, readonly: bool, text: &str| {
        let kind = MountKind::Bind { input: 1, source: source.into(), readonly };
        let op = Run { mounts: vec![Mount { target: "/mnt".into(), kind }], ..script(text) };
        graph.add(Op::Run(Box::new(op)), vec![base.clone(), input.clone()], label("main", 5))
    };
    let of_files = mounted(&context, "d/file", true, "show seen");
    let of_stage = mounted(&stage, "/made", true, "show seen");
    let scribbled = mounted(&stage, "/", false, "scribble ; join seen");
    assert_eq!(bench.files(&graph, &of_files).await["seen"], "from files");
    assert_eq!(bench.files(&graph, &of_stage).await["seen"], "stage");
    assert_eq!(bench.files(&graph, &scribbled).await.keys().collect::<Vec<_>>(), ["base", "seen"]);
    assert!(!bench.files(&graph, &stage).await.contains_key("scribble"));
}

#[tokio::test]
async fn a_directory_is_made_and_one_that_exists_left_alone() {
    use std::os::unix::fs::MetadataExt;
    let bench = Bench::new();
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let mkdir = |graph: &mut Graph, on: &NodeId, path: &str, mode, user: &str| {
        let owner = Some(crate::graph::Owner { user: user.into(), group: None });
        graph.add(Op::Mkdir(Mkdir { path: path.into(), mode, owner }), vec![on.clone()], label("main", 1))
    };
    let made = mkdir(&mut graph, &base, "/a/b", 0o750, "7");
    let again = mkdir(&mut graph, &made, "/a", 0o700, "8");
    let id = bench.solve(&graph, &[again]).await.unwrap().remove(0);
    let view = bench.store.snapshots().view(&id).unwrap();
    let stat = fs::metadata(view.root().join("a")).unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o750, 7, 7));
}

#[tokio::test]
async fn a_chain_of_thousands_does_not_overflow_the_stack() {
    let bench = Bench::new();
    let mut graph = Graph::default();
    let base = image(&mut graph, "base");
    let mut at = run(&mut graph, &base, 0, "fail 1");
    for line in 1..2000 {
        at = run(&mut graph, &at, line, "write x 1");
    }
    let error = bench.solve(&graph, &[at]).await.unwrap_err();
    assert_eq!(error.label.location.unwrap().first_line, 0);
}

#[tokio::test]
async fn a_cached_graph_of_sixty_nodes_costs_one_look_up() {
    let bench = Bench::new();
    let mut graph = Graph::default();
    let mut at = image(&mut graph, "base");
    for line in 0..60 {
        at = run(&mut graph, &at, line, &format!("write f{line} 1"));
    }
    let start = Instant::now();
    assert_eq!(bench.ran(&graph, &at).await.len(), 60);
    eprintln!("60 steps: {:?}", start.elapsed());
    let start = Instant::now();
    assert!(bench.ran(&graph, &at).await.is_empty());
    eprintln!("60 cached steps: {:?}", start.elapsed());
}

/// A random graph: each node stands on an earlier one and may copy a file from another.
#[derive(Clone, Debug)]
struct Shape {
    /// For each node: what it stands on, what it mounts, and whether its result depends on them.
    nodes: Vec<(prop::sample::Index, Option<prop::sample::Index>, bool)>,
}

fn shape() -> impl Strategy<Value = Shape> {
    let node = (any::<prop::sample::Index>(), any::<Option<prop::sample::Index>>(), prop::bool::weighted(0.7));
    prop::collection::vec(node, 1..9).prop_map(|nodes| Shape { nodes })
}

/// Node `n` runs `join out` (depends on all below) or `write out n` (does not); the leaf has `text`.
fn grow(bench: &Bench, shape: &Shape, text: &str) -> (Graph, Vec<NodeId>) {
    let mut graph = Graph::default();
    let scratch = graph.add(Op::Scratch, Vec::new(), Label::default());
    let context = bench.context(&mut graph, &[("leaf", text), ("same", "same")]);
    let mut nodes = vec![copy_of(&mut graph, &scratch, &context, "", 0)];
    for (line, (on, from, depends)) in shape.nodes.iter().enumerate() {
        let on = nodes[on.index(nodes.len())].clone();
        let mut inputs = vec![on];
        let mut op = script(&if *depends { format!("join out{line}") } else { "write leaf reset".to_owned() });
        if let Some(from) = from {
            inputs.push(nodes[from.index(nodes.len())].clone());
            let source = if *depends { "" } else { "same" }.to_owned();
            let kind = MountKind::Bind { input: 1, source, readonly: true };
            op.mounts.push(Mount { target: "/from".into(), kind });
        }
        op.env.push(("LINE".into(), line.to_string()));
        nodes.push(graph.add(Op::Run(Box::new(op)), inputs, label("main", line + 1)));
    }
    (graph, nodes)
}

fn contents(bench: &Bench, id: &SnapshotId) -> BTreeMap<String, String> {
    files_of(bench.store.snapshots().view(id).unwrap().root())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn random_graphs_are_built_once_in_order_and_rebuilt_no_more_than_needed(shape in shape()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bench = Bench::new();
            let (graph, nodes) = grow(&bench, &shape, "1");
            let root = &nodes[nodes.len() - 1];
            let first = bench.solve(&graph, &nodes).await.unwrap();
            let ran = std::mem::take(&mut *locked(&bench.script.ran));
            prop_assert!(ran.len() <= shape.nodes.len(), "at most once each");
            inputs_first(&bench, &graph)?;
            prop_assert!(bench.ran(&graph, root).await.is_empty(), "a second solve executes nothing");

            let (changed, nodes) = grow(&bench, &shape, "2");
            let rebuilt = bench.solve(&changed, &nodes).await.unwrap();
            let again = locked(&bench.script.ran).len();
            let differ = first.iter().zip(&rebuilt).filter(|(before, now)| before != now).count();
            // What reran and came out the same was cut off: nothing above it needed to run, unless it differs too.
            let resets = shape.nodes.iter().filter(|(_, _, depends)| !depends).count();
            prop_assert!(again <= differ + resets, "{again} ran, {differ} differ, {resets} reset");

            let clean = Bench::new();
            let (graph, nodes) = grow(&clean, &shape, "2");
            for (built, clean_id) in rebuilt.iter().zip(clean.solve(&graph, &nodes).await.unwrap()) {
                prop_assert_eq!(contents(&bench, built), contents(&clean, &clean_id));
            }
            Ok(())
        })?;
    }
}

/// No step started before the steps that it reads had finished.
fn inputs_first(bench: &Bench, graph: &Graph) -> Result<(), TestCaseError> {
    let mut finished = HashSet::new();
    for event in locked(&bench.events).iter() {
        match &event.kind {
            EventKind::Started { .. } => {
                let id = graph.ids().find(|id| *id.to_string() == *event.step.0).unwrap();
                for input in
                    graph.get(id).inputs.iter().filter(|input| matches!(graph.get(input).op, Op::Run(_) | Op::Copy(_)))
                {
                    prop_assert!(finished.contains(&input.to_string()));
                }
            }
            EventKind::Finished { .. } => drop(finished.insert(event.step.0.to_string())),
            _ => (),
        }
    }
    Ok(())
}
