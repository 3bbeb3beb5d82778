//! From a graph to snapshots: look up, share, execute.
//!
//! ```text
//! resolve(node):  definition key known? ------------------------------> hit, nothing above is touched
//!                 inputs, concurrently
//!                 content key known? ---------------------------------> hit (the early cut-off)
//!                 lock the content key; known now? -------------------> hit (another process did it)
//!                 fetch what only now is needed, prepare, execute, commit, record both keys
//! ```
//! There is no scheduler: a node is one future whose result is shared, and everything runs in the caller's task. So the
//! caller's dropping [`Solver::solve`] drops every step in it, and the first failure does the same to the others.
//! Every step that was started is finished, as cancelled if need be.
//!
//! Deadlocks: a step holds one key's lock, and takes it before one of the `jobs` slots; who holds a slot waits
//! for no lock of another step. An image's layers have locks of their own below that.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use forge_snapshotter::{KeyLock, SnapshotId, Store, View};
use futures_util::future::{BoxFuture, Shared, try_join_all};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::{OnceCell, Semaphore, mpsc, oneshot};

use crate::cache::{Cache, Lookup};
use crate::context::{ContextError, Owners, Scan, StatCache, Tree, scan};
use crate::event::{EventKind, Events, Outcome, StepId};
use crate::execute::{self, CopyError, copy};
use crate::graph::{Copy, CopySource, Digest, Graph, Label, Node, NodeId, Op, Run};
use crate::key::{self, Facts, Identity, Miss, Reads};
use crate::{ExecuteError, Executor, ExitStatus, FetchError, Fetched, Fetcher, Leaf, Output};

/// The last of a failed step's output that is kept for its error.
const TAIL_BYTES: usize = 64 * 1024;
/// How often a key that another build holds is tried. Polled, because a thread blocked on a lock cannot be cancelled.
const LOCK_PAUSES_MS: std::ops::RangeInclusive<u64> = 2..=50;

#[derive(Clone)]
pub struct Options {
    /// Steps that execute at once; at least one.
    pub jobs: usize,
    /// What is built anew although it is known (`--no-cache`).
    pub fresh: Fresh,
    pub events: Events,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fresh {
    #[default]
    Nothing,
    All,
    /// `--no-cache-filter`: by the stage in a node's label.
    Stages(Vec<String>),
}

impl Fresh {
    fn applies_to(&self, label: &Label) -> bool {
        match self {
            Fresh::Nothing => false,
            Fresh::All => true,
            Fresh::Stages(stages) => stages.iter().any(|stage| stage.eq_ignore_ascii_case(&label.stage)),
        }
    }
}

/// Which step failed, and how.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", label.name)]
pub struct SolveError {
    pub node: NodeId,
    pub label: Label,
    pub kind: StepError,
    /// The last of its output.
    pub output: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("{}", exit(.0))]
    Exit(ExitStatus),
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Store(#[from] forge_snapshotter::Error),
    #[error("the files changed since the build was planned; run the build again when nothing writes to them")]
    Moved,
    #[error("the step names an input that it does not have")]
    Graph,
}

fn exit(status: &ExitStatus) -> String {
    match status {
        ExitStatus::Exited(code) => format!("exit code {code}"),
        ExitStatus::Killed { out_of_memory: true, .. } => "killed: out of memory".to_owned(),
        ExitStatus::Killed { signal, .. } => format!("killed by signal {signal}"),
    }
}

pub struct Solver<E, F> {
    store: Store,
    executor: Arc<E>,
    fetcher: Arc<F>,
    options: Options,
    slots: Semaphore,
}

impl<E: Executor, F: Fetcher> Solver<E, F> {
    pub fn new(store: Store, executor: Arc<E>, fetcher: Arc<F>, options: Options) -> Solver<E, F> {
        let slots = Semaphore::new(options.jobs.clamp(1, Semaphore::MAX_PERMITS));
        Solver { store, executor, fetcher, options, slots }
    }

    /// The roots' snapshots, in order. They are in the store when this returns, but for a root that is a base image
    /// itself: its id is known without it, see [`Solver::fetch`].
    pub async fn solve(&self, graph: &Graph, roots: &[NodeId]) -> Result<Vec<SnapshotId>, SolveError> {
        let (spawn, mut spawned) = mpsc::unbounded_channel();
        let solve = Arc::new(Solve {
            solver: self,
            graph,
            spawn,
            flights: Mutex::default(),
            images: Mutex::default(),
            trees: Mutex::default(),
            history: OnceCell::new(),
            failure: Mutex::default(),
            told: Mutex::default(),
        });
        let mut running = FuturesUnordered::new();
        let mut results = pin!(try_join_all(roots.iter().map(|root| solve.flight(root))));
        let result = loop {
            tokio::select! {
                biased;
                result = &mut results => break result,
                Some(future) = spawned.recv() => running.push(future),
                Some(()) = running.next() => (),
            }
        };
        drop(running);
        result.map_err(|Failed| locked(&solve.failure).take().expect("a failure is told before it is returned"))
    }

    /// Brings in the base image that a node is, if it is one; for those who need a root's files.
    pub async fn fetch(&self, graph: &Graph, node: &NodeId) -> Result<(), StepError> {
        match &graph.get(node).op {
            Op::Image { diff_ids } => self.fetch_image(diff_ids).await,
            _ => Ok(()),
        }
    }

    async fn fetch_image(&self, diff_ids: &[Digest]) -> Result<(), StepError> {
        let expected = SnapshotId::chain(diff_ids);
        let id = expected.clone();
        if self.blocking(move |store| store.snapshots().get(&id)).await?.is_some() {
            return Ok(());
        }
        let leaf = Leaf::Image { diff_ids: diff_ids.to_vec() };
        match self.fetcher.fetch(&leaf, &self.options.events).await? {
            Fetched::Snapshot(found) if found == expected => Ok(()),
            _ => Err(StepError::Moved),
        }
    }

    /// Runs plain code on a thread for it.
    async fn blocking<T, R>(&self, work: impl FnOnce(&Store) -> Result<T, R> + Send + 'static) -> Result<T, R>
    where
        T: Send + 'static,
        R: Send + 'static,
    {
        let store = self.store.clone();
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down: nobody will ask again.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

/// Told already, in [`Solve::failure`].
#[derive(Clone, Copy, Debug)]
struct Failed;

/// A result that several wait for. The work is done elsewhere, so waiting for a chain of thousands is not deep.
type Flight<T> = Shared<BoxFuture<'static, Result<T, Failed>>>;
type Flights<T> = Mutex<HashMap<NodeId, Flight<T>>>;

/// One call of [`Solver::solve`].
struct Solve<'a, E, F> {
    solver: &'a Solver<E, F>,
    graph: &'a Graph,
    /// Where a future goes to be run.
    spawn: mpsc::UnboundedSender<BoxFuture<'a, ()>>,
    flights: Flights<SnapshotId>,
    images: Flights<()>,
    trees: Flights<Arc<Tree>>,
    /// Read once, by the first miss.
    history: OnceCell<Vec<Facts>>,
    failure: Mutex<Option<SolveError>>,
    /// Steps that people have heard of.
    told: Mutex<HashSet<NodeId>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is needed to execute a step.
struct Ready {
    /// Snapshots by input; `None` for files.
    snapshots: Vec<Option<SnapshotId>>,
    /// Trees by input, of those that are read in part by a copy; with the views they are read from.
    trees: Vec<Option<Scanned>>,
}

/// Files to copy from, and the view that holds them in place if they are a stage's.
struct Scanned {
    tree: Arc<Tree>,
    _view: Option<Arc<View>>,
}

/// A step under way.
struct Step<'a> {
    id: &'a NodeId,
    node: &'a Node,
    label: &'a Label,
    fresh: bool,
    evicted: bool,
    line: Line,
    tail: Tail,
}

impl<'a, E: Executor, F: Fetcher> Solve<'a, E, F> {
    fn flight(self: &Arc<Self>, id: &NodeId) -> Flight<SnapshotId> {
        self.share(&self.flights, id, || self.clone().resolve(id.clone()).boxed())
    }

    /// The result for that node, of work that is started at most once.
    fn share<T: Clone + Send + 'static>(
        &self,
        flights: &Flights<T>,
        id: &NodeId,
        start: impl FnOnce() -> BoxFuture<'a, Result<T, Failed>>,
    ) -> Flight<T> {
        let new = || {
            let (sender, receiver) = oneshot::channel();
            let work = start();
            let run = async move {
                // Where nobody waits any more nobody is told.
                drop(sender.send(work.await));
            };
            // The other end is gone only when the solve is, and then nothing runs any more.
            drop(self.spawn.send(run.boxed()));
            receiver.map(|result| result.unwrap_or(Err(Failed))).boxed().shared()
        };
        locked(flights).entry(id.clone()).or_insert_with(new).clone()
    }

    async fn resolve(self: Arc<Self>, id: NodeId) -> Result<SnapshotId, Failed> {
        let node = self.graph.get(&id);
        match &node.op {
            Op::Scratch => Ok(SnapshotId::scratch()),
            // Where it is only stacked upon or named, its id is enough.
            Op::Image { diff_ids } => Ok(SnapshotId::chain(diff_ids)),
            Op::Files { .. } => self.files_root(&id).await,
            _ => self.step(&id, node).await,
        }
    }

    async fn step(self: &Arc<Self>, id: &NodeId, node: &'a Node) -> Result<SnapshotId, Failed> {
        let label = self.graph.label(id);
        let fresh = self.solver.options.fresh.applies_to(label);
        let found = if fresh {
            Lookup::Unknown
        } else {
            self.look_up(id.digest()).await.map_err(|kind| self.fail(id, kind))?
        };
        if let Lookup::Hit(snapshot) = found {
            self.tell_cached(id);
            return Ok(snapshot);
        }
        let snapshots = self.inputs(node).await?;
        locked(&self.told).insert(id.clone());
        let line = Line::start(&self.solver.options.events, id, label);
        let step = Step { id, node, label, fresh, evicted: found == Lookup::Evicted, line, tail: Tail::default() };
        match self.with_inputs(&step, snapshots).await {
            Ok((snapshot, outcome)) => {
                step.line.finish(outcome);
                Ok(snapshot)
            }
            Err(Interrupted::Told) => Err(Failed),
            Err(Interrupted::By(kind)) => {
                step.line.finish(Outcome::Failed { message: kind.to_string() });
                let output = step.tail.take();
                Err(tell(&self.failure, SolveError { node: id.clone(), label: label.clone(), kind, output }))
            }
        }
    }

    async fn with_inputs(
        self: &Arc<Self>,
        step: &Step<'_>,
        snapshots: Vec<Option<SnapshotId>>,
    ) -> Result<(SnapshotId, Outcome), Interrupted> {
        let (ready, identities) = self.identify(step.node, snapshots).await?;
        let facts = Arc::new(Facts { label: step.label.clone(), op: step.node.op.clone(), inputs: identities });
        let key = key::content_key(&step.node.op, &facts.inputs);
        // Not asked before the lock is had: who held it may have done the work, and it is free nearly always.
        let lock = self.lock(&key, &step.line).await?;
        let found = if step.fresh { Lookup::Unknown } else { self.look_up(&key).await? };
        if let Lookup::Hit(snapshot) = found {
            self.record(step.id, &key, &snapshot, &facts).await?;
            return Ok((snapshot, Outcome::Cached));
        }
        let evicted = step.evicted || found == Lookup::Evicted;
        let reason = self.reason(step, &facts, evicted).await?;
        step.line.send(EventKind::Missed { reason: reason.to_string() });
        self.need(step.node.inputs.first().ok_or_else(broken)?).await?;
        let slot = self.solver.slots.acquire().await;
        let snapshot = self.execute(step, ready).await?;
        drop(slot);
        self.record(step.id, &key, &snapshot, &facts).await?;
        drop(lock);
        Ok((snapshot, Outcome::Done))
    }

    /// Says that a step and all that led to it are cached: those were not looked at, but people look for them.
    fn tell_cached(&self, id: &NodeId) {
        let mut pending = vec![id];
        let mut order = Vec::new();
        let mut told = locked(&self.told);
        while let Some(id) = pending.pop() {
            let node = self.graph.get(id);
            if matches!(node.op, Op::Run(_) | Op::Copy(_) | Op::Mkdir(_)) && told.insert(id.clone()) {
                order.push(id);
                pending.extend(&node.inputs);
            }
        }
        for id in order.into_iter().rev() {
            Line::start(&self.solver.options.events, id, self.graph.label(id)).finish(Outcome::Cached);
        }
    }

    /// The inputs' snapshots, all at once. Files are not asked for: their digest says what they are.
    async fn inputs(self: &Arc<Self>, node: &Node) -> Result<Vec<Option<SnapshotId>>, Failed> {
        let flights = node.inputs.iter().enumerate().map(|(index, input)| {
            let flight = match self.graph.get(input).op {
                Op::Files { .. } if index > 0 => None,
                _ => Some(self.flight(input)),
            };
            async move {
                match flight {
                    Some(flight) => flight.await.map(Some),
                    None => Ok(None),
                }
            }
        });
        try_join_all(flights).await
    }

    /// What each input counts as in the content key. What is read in part is scanned, and the scan kept for the copy.
    async fn identify(
        self: &Arc<Self>,
        node: &Node,
        snapshots: Vec<Option<SnapshotId>>,
    ) -> Result<(Ready, Vec<Identity>), Interrupted> {
        let mut identities = Vec::new();
        let mut trees = Vec::new();
        for ((reads, input), snapshot) in key::reads(node).into_iter().zip(&node.inputs).zip(&snapshots) {
            let mut tree = None;
            identities.push(match (&self.graph.get(input).op, reads, snapshot) {
                (Op::Files { digest }, ..) => Identity::Files(digest.clone()),
                (_, Reads::Part { selection, parents }, Some(snapshot)) if !selection.paths.is_empty() => {
                    self.need(input).await?;
                    let snapshot = snapshot.clone();
                    let scanned = self.solver.blocking(move |store| {
                        let view = store.snapshots().view(&snapshot)?;
                        let (owners, root) = (Owners::Keep, view.root());
                        let what = Scan { root, selection: &selection, ignore: None, owners, parents };
                        let tree = scan(&what, &StatCache::none())?;
                        Ok::<_, StepError>(Scanned { tree: Arc::new(tree), _view: Some(Arc::new(view)) })
                    });
                    let scanned = scanned.await?;
                    let identity = Identity::Files(scanned.tree.digest.clone());
                    tree = matches!(node.op, Op::Copy(_)).then_some(scanned);
                    identity
                }
                (_, _, Some(snapshot)) => Identity::Root(snapshot.clone()),
                (_, _, None) => return Err(broken()),
            });
            trees.push(tree);
        }
        Ok((Ready { snapshots, trees }, identities))
    }

    async fn look_up(&self, key: &Digest) -> Result<Lookup, StepError> {
        let key = key.to_string();
        Ok(self.solver.blocking(move |store| Cache(store).lookup(&key)).await?)
    }

    async fn record(
        &self,
        id: &NodeId,
        key: &Digest,
        snapshot: &SnapshotId,
        facts: &Arc<Facts>,
    ) -> Result<(), StepError> {
        let keys = [id.to_string(), key.to_string()];
        let (snapshot, facts) = (snapshot.clone(), facts.clone());
        let write = move |store: &Store| Cache(store).record(&[&keys[0], &keys[1]], &snapshot, &facts);
        Ok(self.solver.blocking(write).await?)
    }

    /// Holds off other builds that are at the same step.
    async fn lock(&self, key: &Digest, line: &Line) -> Result<KeyLock, StepError> {
        let mut pause = *LOCK_PAUSES_MS.start();
        loop {
            let key = key.to_string();
            if let Some(lock) = self.solver.blocking(move |store| store.try_lock_key(&key)).await? {
                return Ok(lock);
            }
            if pause == *LOCK_PAUSES_MS.start() {
                let what = "waiting for another build".to_owned();
                line.send(EventKind::Progress { what, current_bytes: 0, total_bytes: 0 });
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
            pause = (pause * 2).min(*LOCK_PAUSES_MS.end());
        }
    }

    async fn reason(&self, step: &Step<'_>, facts: &Facts, evicted: bool) -> Result<Miss, StepError> {
        if step.fresh {
            return Ok(Miss::NotAsked);
        }
        if evicted {
            return Ok(Miss::Evicted);
        }
        let read = || self.solver.blocking(|store| Cache(store).history());
        let history = self.history.get_or_try_init(read).await?;
        Ok(key::explain(self.graph, step.id, facts, history))
    }

    /// Brings in an input that is a base image; once, however many ask.
    async fn need(self: &Arc<Self>, id: &NodeId) -> Result<(), Failed> {
        let Op::Image { diff_ids } = &self.graph.get(id).op else { return Ok(()) };
        let flight = self.share(&self.images, id, || {
            let (solve, id) = (self.clone(), id.clone());
            let fetch = async move { solve.solver.fetch_image(diff_ids).await.map_err(|kind| solve.fail(&id, kind)) };
            fetch.boxed()
        });
        flight.await
    }

    /// The files of a leaf, in place; asked for once, however many copy from them.
    fn tree(self: &Arc<Self>, id: &NodeId) -> Flight<Arc<Tree>> {
        self.share(&self.trees, id, || {
            let (solve, id) = (self.clone(), id.clone());
            let fetch = async move { solve.fetch_tree(&id).await.map_err(|kind| solve.fail(&id, kind)) };
            fetch.boxed()
        })
    }

    async fn fetch_tree(&self, id: &NodeId) -> Result<Arc<Tree>, StepError> {
        let Op::Files { digest } = &self.graph.get(id).op else { unreachable!("only files are fetched as a tree") };
        let leaf = Leaf::Files { digest: digest.clone() };
        match self.solver.fetcher.fetch(&leaf, &self.solver.options.events).await? {
            Fetched::Tree(tree) if tree.digest == *digest => Ok(tree),
            _ => Err(StepError::Moved),
        }
    }

    /// Files as a snapshot of their own, for those who mount them. Its name says what it holds.
    async fn files_root(self: &Arc<Self>, id: &NodeId) -> Result<SnapshotId, Failed> {
        let Op::Files { digest } = &self.graph.get(id).op else { unreachable!("asked for files") };
        let snapshot = SnapshotId(Digest::of(format!("forge files v1 {digest}")));
        let wanted = snapshot.clone();
        let known = self.solver.blocking(move |store| store.snapshots().get(&wanted)).await;
        if known.map_err(|error| self.fail(id, error.into()))?.is_some() {
            return Ok(snapshot);
        }
        let tree = self.tree(id).await?;
        let made = self.solver.blocking(move |store| {
            let active = store.snapshots().prepare(None)?;
            copy::materialise(&tree, active.root())?;
            // Another build may have been first; then its snapshot, which holds the same, is the one.
            Ok::<_, StepError>(store.snapshots().commit(active, snapshot)?.id)
        });
        made.await.map_err(|kind| self.fail(id, kind))
    }

    async fn execute(self: &Arc<Self>, step: &Step<'_>, ready: Ready) -> Result<SnapshotId, Interrupted> {
        let parent = ready.snapshots.first().cloned().flatten().ok_or_else(broken)?;
        match &step.node.op {
            Op::Run(run) => self.run(step, run, ready).await,
            Op::Copy(op) => {
                let op = op.clone();
                let trees = self.copy_trees(step.node, &op, ready.trees).await?;
                let copy = move |root: &Path| copy::copy(&op, root, |input| &trees[&input].tree);
                self.change(parent, move |root| copy(root).map_err(StepError::Copy)).await
            }
            Op::Mkdir(op) => {
                let op = op.clone();
                self.change(parent, move |root| copy::make_directory(&op, root).map_err(StepError::Copy)).await
            }
            Op::Scratch | Op::Image { .. } | Op::Files { .. } => Err(broken()),
        }
    }

    /// The trees that a copy reads: those of stages were scanned for the key, files are fetched now.
    async fn copy_trees(
        self: &Arc<Self>,
        node: &Node,
        op: &Copy,
        scanned: Vec<Option<Scanned>>,
    ) -> Result<HashMap<usize, Scanned>, Interrupted> {
        let mut trees: HashMap<_, _> =
            scanned.into_iter().enumerate().filter_map(|(input, tree)| Some((input, tree?))).collect();
        for source in &op.sources {
            if let CopySource::Path { input, .. } = source
                && !trees.contains_key(input)
            {
                let id = node.inputs.get(*input).ok_or_else(broken)?;
                trees.insert(*input, Scanned { tree: self.tree(id).await?, _view: None });
            }
        }
        Ok(trees)
    }

    /// Changes a copy of a root by plain code, and keeps it.
    async fn change(
        &self,
        parent: SnapshotId,
        work: impl FnOnce(&Path) -> Result<(), StepError> + Send + 'static,
    ) -> Result<SnapshotId, Interrupted> {
        let changed = self.solver.blocking(move |store| {
            let active = store.snapshots().prepare(Some(&parent))?;
            work(active.root())?;
            Ok::<_, StepError>(execute::commit(store, active, &parent)?)
        });
        Ok(changed.await?)
    }

    async fn run(self: &Arc<Self>, step: &Step<'_>, run: &Run, ready: Ready) -> Result<SnapshotId, Interrupted> {
        let mut inputs = ready.snapshots;
        for (input, ..) in run.mounts.iter().filter_map(execute::source) {
            let id = step.node.inputs.get(input).ok_or_else(broken)?;
            self.need(id).await?;
            if inputs[input].is_none() {
                inputs[input] = Some(self.flight(id).await?);
            }
        }
        let parent = inputs[0].clone().ok_or_else(broken)?;
        let (below, mounts) = (parent.clone(), run.clone());
        let prepared = self.solver.blocking(move |store| {
            let root = |input: usize| inputs[input].clone().expect("the inputs that are mounted were resolved");
            let bound = execute::bind(store.snapshots(), &mounts, root)?;
            Ok::<_, StepError>((store.snapshots().prepare(Some(&below))?, bound))
        });
        let (active, bound) = prepared.await?;
        let output = Output { events: step.tail.collect(&step.line), step: step.line.id.clone() };
        let status =
            self.solver.executor.execute(run, &active, &bound.mounts, &output).await.map_err(StepError::Execute)?;
        if status != ExitStatus::Exited(0) {
            return Err(StepError::Exit(status).into());
        }
        let kept = self.solver.blocking(move |store| {
            drop(bound);
            Ok::<_, StepError>(execute::commit(store, active, &parent)?)
        });
        Ok(kept.await?)
    }

    /// Tells a failure that no step of its own shows.
    fn fail(&self, id: &NodeId, kind: StepError) -> Failed {
        tell(
            &self.failure,
            SolveError { node: id.clone(), label: self.graph.label(id).clone(), kind, output: Vec::new() },
        )
    }
}

/// The first is the cause; others follow from it.
fn tell(failure: &Mutex<Option<SolveError>>, error: SolveError) -> Failed {
    locked(failure).get_or_insert(error);
    Failed
}

/// Why a step did not come to its end.
enum Interrupted {
    By(StepError),
    /// An input failed, and was told.
    Told,
}

impl<E: Into<StepError>> From<E> for Interrupted {
    fn from(error: E) -> Interrupted {
        Interrupted::By(error.into())
    }
}

impl From<Failed> for Interrupted {
    fn from(Failed: Failed) -> Interrupted {
        Interrupted::Told
    }
}

fn broken() -> Interrupted {
    Interrupted::By(StepError::Graph)
}

/// A step on the display: finished exactly once, as cancelled if it is dropped before.
struct Line {
    id: StepId,
    events: Events,
    finished: bool,
}

impl Line {
    fn start(events: &Events, id: &NodeId, label: &Label) -> Line {
        let line = Line { id: StepId::new(id.to_string()), events: events.clone(), finished: false };
        line.send(EventKind::Started { name: label.name.clone(), location: label.location.clone() });
        line
    }

    fn send(&self, kind: EventKind) {
        self.events.send(&self.id, kind);
    }

    fn finish(mut self, outcome: Outcome) {
        self.finished = true;
        self.send(EventKind::Finished { outcome });
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if !self.finished {
            self.send(EventKind::Finished { outcome: Outcome::Cancelled });
        }
    }
}

/// The last of a step's output.
#[derive(Clone, Default)]
struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// The step's events, on their way looked through for output.
    fn collect(&self, line: &Line) -> Events {
        let (tail, events) = (self.clone(), line.events.clone());
        Events::new(move |event| {
            if let EventKind::Output { data, .. } = &event.kind {
                let mut tail = locked(&tail.0);
                tail.extend(&data[data.len().saturating_sub(TAIL_BYTES)..]);
                let excess = tail.len().saturating_sub(TAIL_BYTES);
                tail.drain(..excess);
            }
            events.forward(event);
        })
    }

    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *locked(&self.0)).into()
    }
}

#[cfg(test)]
mod tests;
