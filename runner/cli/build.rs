//! `forge build`: flags to a request, a request to a plan, a plan to images, images to where they were asked for.

mod assemble;
mod call;
mod context;
pub mod flags;
mod output;
mod remote;
mod report;
mod sources;

use std::path::PathBuf;
use std::sync::Arc;

use forge_frontend::{Plan, Request};
use forge_snapshotter::SnapshotId;
use forge_solver::event::{EventKind, Events, Outcome, StepId};
use forge_solver::graph::{self, NodeId};
use forge_solver::{Fresh, Options, Solver};

use self::assemble::BuiltImage;
use self::call::{Answer, Call, GraphFormat, Question};
use self::context::BuildContext;
use self::output::{Delivery, Output};
use self::report::{Failed, Source};
use self::sources::BuildSources;
use super::error::Doing;
use super::ui::{Progress, Ui};
use super::{Failure, Result, World, print, say};
use crate::container::StepExecutor;
use crate::network::{self, Networks};

/// Build an image from a Dockerfile
#[derive(clap::Args)]
pub struct Arguments {
    /// The directory that COPY reads from; `-` reads a Dockerfile or a tar archive from stdin; git and http URLs are fetched
    #[arg(value_name = "CONTEXT")]
    context: String,
    /// Name of the image, `name[:tag]`; may be given several times
    #[arg(short, long = "tag", value_name = "NAME")]
    tags: Vec<String>,
    /// The Dockerfile, `-` for stdin [default: CONTEXT/Dockerfile]
    #[arg(short, long, value_name = "FILE")]
    file: Option<String>,
    /// The stage to build [default: the last]
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Value of an ARG; without a value, the environment's
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]")]
    build_args: Vec<String>,
    /// Another context: a directory, docker-image://NAME, oci-layout://DIR[:tag]
    #[arg(long = "build-context", value_name = "NAME=VALUE")]
    build_contexts: Vec<String>,
    /// Platforms to build for, comma separated
    #[arg(long = "platform", value_name = "PLATFORM", value_delimiter = ',')]
    platforms: Vec<String>,
    /// Run every step anew
    #[arg(long)]
    no_cache: bool,
    /// Run the steps of these stages anew
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    no_cache_filter: Vec<String>,
    /// Ask the registry for every base image, also where the store has one of that name
    #[arg(long)]
    pull: bool,
    /// A secret for RUN --mount=type=secret: `id=NAME[,src=FILE|,env=VARIABLE]`
    #[arg(long = "secret", value_name = "SPEC")]
    secrets: Vec<String>,
    /// An SSH agent for RUN --mount=type=ssh: `default` or `NAME[=SOCKET]`
    #[arg(long, value_name = "SPEC")]
    ssh: Vec<String>,
    /// The network of RUN steps: default, host or none
    #[arg(long, value_name = "MODE", default_value = "default")]
    network: String,
    /// Where the result goes: `type=image|oci|docker|tar|local|registry[,dest=PATH][,name=NAME]…`, or a directory
    #[arg(short, long = "output", value_name = "SPEC")]
    outputs: Vec<String>,
    /// Send the image to its registry
    #[arg(long)]
    push: bool,
    /// Keep the image in the local store (the default where no other output is named)
    #[arg(long)]
    load: bool,
    /// How to show progress
    #[arg(long, value_name = "HOW", default_value = "auto", env = "BUILDKIT_PROGRESS", hide_env_values = true)]
    progress: Progress,
    /// Write the image id to a file
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// Write facts about the result to a file, as JSON
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
    /// Print nothing but the image id
    #[arg(short, long)]
    quiet: bool,
    /// A label for the image
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<String>,
    /// An annotation for the manifest
    #[arg(long = "annotation", value_name = "NAME=VALUE")]
    annotations: Vec<String>,
    /// A line for /etc/hosts of RUN steps
    #[arg(long = "add-host", value_name = "NAME:ADDRESS")]
    hosts: Vec<String>,
    /// Size of /dev/shm of RUN steps
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<String>,
    /// A resource limit of RUN steps, `nofile=1024:2048`
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    ulimits: Vec<String>,
    /// Memory limit of each RUN step
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// Permit `network.host` and `security.insecure`
    #[arg(long = "allow", value_name = "ENTITLEMENT", value_delimiter = ',')]
    allowed: Vec<String>,
    /// How many steps may run at once [default: the number of processors]
    #[arg(short, long, value_name = "N")]
    jobs: Option<std::num::NonZeroUsize>,
    /// Ask something of the Dockerfile instead of building it: `check` (its checks, of all stages without --target),
    /// `outline` (what the target can be given), `targets` (its stages); `check,format=sarif` is for editors and code hosts
    #[arg(
        long,
        value_name = "build|check|outline|targets[,format=json]",
        default_value = "build",
        hide_default_value = true
    )]
    call: Call,
    /// Judge the Dockerfile and build nothing: --call=check
    #[arg(long, conflicts_with = "call")]
    check: bool,
    /// Print the plan, each step after what it reads, and build nothing; pictures: --print-graph=dot | dot -Tsvg
    #[arg(long, value_name = "text|json|dot", num_args = 0..=1, require_equals = true, default_missing_value = "text",
        hide_possible_values = true)]
    print_graph: Option<GraphFormat>,
    /// Accepted for buildx's sake and without effect: forge attaches no attestations by itself
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    provenance: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    sbom: Option<String>,
    /// Accepted for buildx's sake: there is one builder, this program
    #[arg(long, hide = true)]
    builder: Option<String>,
}

pub async fn build(arguments: Arguments, world: &World) -> Result {
    let outputs = Output::all(&arguments, world)?;
    let progress = if arguments.quiet { Progress::Quiet } else { arguments.progress };
    let ui = Ui::start(progress);
    if let Some(note) = &world.identity.note {
        say(format_args!("note: {note}"));
    }
    let build = Build { arguments: &arguments, world, events: ui.events() };
    let result = tokio::select! {
        result = build.run(&outputs) => result,
        signal = interrupted() => Err(signal),
    };
    drop(build);
    ui.finish();
    match result {
        Ok(done) => done.print(&arguments),
        Err(Failed::Told(failure)) => Err(failure),
        Err(Failed::Diagnostics(report)) => {
            say(report.trim_end());
            Err(Failure::Shown(1))
        }
    }
}

/// Ctrl-C or a polite kill. Returning drops the build, and with it every step that runs.
async fn interrupted() -> Failed {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => Failed::Told(Failure::new("interrupted").code(130)),
        _ = terminate.recv() => Failed::Told(Failure::new("terminated").code(143)),
    }
}

/// What a finished build has to say.
pub enum Done {
    Built {
        image: String,
        metadata: serde_json::Value,
    },
    /// To `--call` or `--print-graph`.
    Answered(Answer),
}

impl Done {
    fn print(self, arguments: &Arguments) -> Result {
        let (image, metadata) = match self {
            Done::Built { image, metadata } => (image, metadata),
            Done::Answered(answer) => return answer.print(),
        };
        if let Some(file) = &arguments.iidfile {
            std::fs::write(file, &image).doing(format_args!("write {}", file.display()))?;
        }
        if let Some(file) = &arguments.metadata_file {
            let text = serde_json::to_string_pretty(&metadata).doing("print the metadata")?;
            std::fs::write(file, text + "\n").doing(format_args!("write {}", file.display()))?;
        }
        // With an output on stdout the id would spoil it.
        match output::on_stdout(&arguments.outputs) {
            true => Ok(()),
            false => print(image),
        }
    }
}

/// One build: what was asked for, where, and whom to tell.
struct Build<'a> {
    arguments: &'a Arguments,
    world: &'a World,
    events: Events,
}

impl Build<'_> {
    async fn run(&self, outputs: &[Output]) -> Result<Done, Failed> {
        let Build { arguments, world, events } = self;
        let (context, source) = self.open().await?;
        let (file, mut diagnostics) = forge_frontend::parse(&source.text);
        let request = flags::request(arguments, &context)?;
        let sources = Arc::new(BuildSources::new(world, context, arguments.pull, events.clone())?);
        let call = if arguments.check { Call::CHECK } else { arguments.call };
        if let Some(method) = call.method {
            let question = Question { method, call, source: &source, file: &file, request: &request };
            return question.answer(diagnostics, sources.as_ref()).await.map(Done::Answered);
        }
        source.fail_on_errors(&diagnostics)?;
        let planned = forge_frontend::plan(&file, &request, sources.as_ref()).await;
        let plan = planned.map_err(|problems| source.failed(&problems))?;
        diagnostics.extend(plan.warnings.iter().cloned());
        source.warn(&diagnostics, events);
        if let Some(format) = arguments.print_graph {
            return Ok(Done::Answered(call::graph(&plan, format)));
        }
        flags::entitled(&plan.graph, arguments)?;
        let request = Request { epoch: plan.epoch, ..request };
        let snapshots = self.solve(&plan, &sources, &source).await?;
        let images = assemble::images(world, &plan, &snapshots, &request, events).await?;
        let metadata = Delivery { world, images: &images, sources: &sources, events }.write(outputs).await?;
        sources.save();
        world.store.settle()?;
        Ok(Done::Built { image: BuiltImage::id(&images), metadata })
    }

    async fn open(&self) -> Result<(BuildContext, Source), Failed> {
        let step = StepId::new("definition");
        let file = self.arguments.file.as_deref();
        let name = format!("[internal] load build definition from {}", file.unwrap_or("Dockerfile"));
        self.events.send(&step, EventKind::Started { name, location: None });
        let opened = match BuildContext::open(self.arguments, self.world).await {
            Ok(context) => context.dockerfile(file).map(|source| (context, source)),
            Err(failure) => Err(failure),
        };
        let outcome = match &opened {
            Ok(_) => Outcome::Done,
            Err(_) => Outcome::Failed { message: "it cannot be read".to_owned() },
        };
        self.events.send(&step, EventKind::Finished { outcome });
        Ok(opened?)
    }

    /// Solves every platform's root; the snapshots come in the order of the plan's images.
    async fn solve(
        &self,
        plan: &Plan,
        sources: &Arc<BuildSources>,
        source: &Source,
    ) -> Result<Vec<SnapshotId>, Failed> {
        let Build { arguments, world, events } = self;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let fresh = match (arguments.no_cache, arguments.no_cache_filter.is_empty()) {
            (true, _) => Fresh::All,
            (false, false) => Fresh::Stages(arguments.no_cache_filter.clone()),
            (false, true) => Fresh::Nothing,
        };
        let options = Options { jobs: arguments.jobs.map_or(processors, usize::from), fresh, events: events.clone() };
        let network = network::Options { rootless: world.identity.rootless, ..network::Options::default() };
        let networks = Networks::new(&world.store, network);
        let executor = Arc::new(StepExecutor::new(world.store.clone(), networks, flags::secrets(arguments)?));
        let solver = Solver::new(world.store.clone(), executor, sources.clone(), options);
        let roots: Vec<NodeId> = plan.images.iter().map(|image| image.root.clone()).collect();
        solver.solve(&plan.graph, &roots).await.map_err(|error| source.step_failed(&error))
    }
}

/// A RUN's network mode as the command line spells it.
fn network(mode: &str) -> Result<graph::Network> {
    match mode {
        "default" | "" | "bridge" => Ok(graph::Network::Default),
        "host" => Ok(graph::Network::Host),
        "none" => Ok(graph::Network::None),
        other => Err(Failure::usage(format!("--network {other:?}: expected default, host or none"))),
    }
}
