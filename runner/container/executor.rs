//! RUN: a step of the build graph as a container.

use std::collections::HashMap;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use forge_snapshotter::{Active, Store};
use forge_solver::event::{EventKind, Stream};
use forge_solver::graph::{Mount, MountKind, Run, Security};
use forge_solver::{BoundMount, ExecuteError, Executor, ExitStatus, Output};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;

use super::helper::Helper;
use super::spec::{Container, ContainerMount, Cpu, Limits, MountSource, Privileges, Stdio, Ulimit};
use crate::network::{Networks, hosts_file};
use crate::volume::{CacheRequest, cache_mounts};

/// What `--secret` and `--ssh` named. Read when a step asks for it, never before.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    pub secrets: HashMap<String, SecretSource>,
    /// Agents' sockets by id.
    pub agents: HashMap<String, PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    File(PathBuf),
    /// The name of a variable of forge's own environment.
    Variable(String),
}

/// As BuildKit: a secret is a key, not a file system.
const SECRET_BYTES: u64 = 500 * 1024;

/// What a step's process prints is passed on in pieces of at most this.
const OUTPUT_BYTES: usize = 32 * 1024;

/// Runs the steps of one build, all through one helper that the first of them starts.
pub struct StepExecutor {
    store: Store,
    networks: Networks,
    secrets: Secrets,
    /// The forge that serves as helper.
    program: PathBuf,
    helper: OnceCell<Helper>,
}

impl StepExecutor {
    pub fn new(store: Store, networks: Networks, secrets: Secrets) -> StepExecutor {
        StepExecutor::with_program(store, networks, secrets, PathBuf::from("/proc/self/exe"))
    }

    /// As [`StepExecutor::new`] where this process is no forge itself.
    pub fn with_program(store: Store, networks: Networks, secrets: Secrets, program: PathBuf) -> StepExecutor {
        StepExecutor { store, networks, secrets, program, helper: OnceCell::new() }
    }

    async fn helper(&self) -> Result<&Helper, ExecuteError> {
        self.helper.get_or_try_init(|| async { Helper::start_with(&self.program) }).await
    }
}

impl Executor for StepExecutor {
    async fn execute(
        &self,
        run: &Run,
        root: &Active,
        mounts: &[BoundMount],
        output: &Output,
    ) -> Result<ExitStatus, ExecuteError> {
        // In this order, because what is declared last is dropped first: the container goes before what it uses.
        let helper = self.helper().await?;
        let caches = self.caches(run, mounts, output).await?;
        let mut step = Step { container: container(run, root.root()), agents: Vec::new() };
        step.container.mounts.extend(run.files.iter().map(|file| ContainerMount {
            target: file.path.clone(),
            source: MountSource::File { data: file.data.clone().into_bytes(), mode: file.mode, uid: 0, gid: 0 },
            readonly: false,
        }));
        let mut caches_left = caches.iter();
        for (mount, bound) in run.mounts.iter().zip(mounts) {
            match &mount.kind {
                MountKind::Cache { readonly, .. } => {
                    let cache = caches_left.next().expect("a cache was taken for each cache mount");
                    step.bind(mount, cache.path().to_owned(), *readonly);
                }
                _ => step.mount(mount, bound, &self.secrets).await?,
            }
        }
        let attachment = self.networks.attach(run.network.into()).await.map_err(|error| ExecuteError::Setup {
            step: "set up the network".to_owned(),
            source: io::Error::other(error),
        })?;
        if let Some(message) = &attachment.note {
            output.events.send(&output.step, EventKind::Warning { message: message.clone() });
        }
        let hosts = [attachment.hosts.as_slice(), &run.hosts].concat();
        step.container.hosts = hosts_file(&run.hostname, attachment.address, &hosts);
        step.container.resolv_conf.clone_from(&attachment.resolv_conf);
        let mut running = helper.run(&step.container, attachment.namespace, Stdio::Output).await?;
        let (stdout, stderr) = (running.stdout.take(), running.stderr.take());
        let (_, _, status) = tokio::join!(
            pass_on(stdout, Stream::Stdout, output),
            pass_on(stderr, Stream::Stderr, output),
            running.wait()
        );
        status
    }
}

impl StepExecutor {
    async fn caches(
        &self,
        run: &Run,
        mounts: &[BoundMount],
        output: &Output,
    ) -> Result<Vec<std::sync::Arc<crate::volume::CacheMount>>, ExecuteError> {
        let request = |(mount, bound): (&Mount, &BoundMount)| match &mount.kind {
            MountKind::Cache { id, sharing, mode, uid, gid, .. } => Some(CacheRequest {
                id: id.clone(),
                sharing: *sharing,
                seed: match bound {
                    BoundMount::Path(path) => Some(path.clone()),
                    BoundMount::Unbound => None,
                },
                mode: *mode,
                uid: *uid,
                gid: *gid,
            }),
            _ => None,
        };
        let requests: Vec<CacheRequest> = run.mounts.iter().zip(mounts).filter_map(request).collect();
        let waiting = |id: &str| {
            let what = format!("waiting for the cache {id:?}, which another step has locked");
            output.events.send(&output.step, EventKind::Progress { what, current_bytes: 0, total_bytes: 0 });
        };
        cache_mounts(&self.store, &requests, waiting).await.map_err(|error| ExecuteError::Setup {
            step: "open a cache mount".to_owned(),
            source: io::Error::other(error),
        })
    }
}

fn container(run: &Run, root: &Path) -> Container {
    let mut env = run.env.clone();
    for (name, value) in &run.unkeyed.proxy_env {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.clone(), value.clone()));
        }
    }
    let unkeyed = &run.unkeyed;
    let ulimit =
        |limit: &forge_solver::graph::Ulimit| Ulimit { name: limit.name.clone(), soft: limit.soft, hard: limit.hard };
    Container {
        root: root.to_owned(),
        args: run.args.clone(),
        env,
        cwd: run.cwd.clone(),
        user: run.user.clone(),
        hostname: run.hostname.clone(),
        privileges: match run.security {
            Security::Sandbox => Privileges::default(),
            Security::Insecure => Privileges::All,
        },
        limits: Limits {
            memory_bytes: unkeyed.memory_bytes,
            cpu: unkeyed.cpu_quota.map(|cpu| Cpu { quota_us: cpu.quota_us, period_us: cpu.period_us }),
            pids: unkeyed.pids,
            ulimits: unkeyed.ulimits.iter().map(ulimit).collect(),
            shm_size_bytes: unkeyed.shm_size_bytes,
        },
        ..Container::default()
    }
}

/// A container in the making, and what has to live as long as it does.
struct Step {
    container: Container,
    agents: Vec<Agent>,
}

impl Step {
    fn bind(&mut self, mount: &Mount, path: PathBuf, readonly: bool) {
        self.push(mount, MountSource::Bind(path), readonly);
    }

    fn push(&mut self, mount: &Mount, source: MountSource, readonly: bool) {
        self.container.mounts.push(ContainerMount { target: mount.target.clone(), source, readonly });
    }

    async fn mount(&mut self, mount: &Mount, bound: &BoundMount, secrets: &Secrets) -> Result<(), ExecuteError> {
        match &mount.kind {
            MountKind::Bind { readonly, .. } => match bound {
                BoundMount::Path(path) => self.bind(mount, path.clone(), *readonly),
                BoundMount::Unbound => {
                    return Err(ExecuteError::Invalid(format!("the mount at {} has no source", mount.target)));
                }
            },
            MountKind::Cache { .. } => unreachable!("cache mounts are bound by who holds them"),
            MountKind::Tmpfs { size_bytes } => {
                self.push(mount, MountSource::Tmpfs { size_bytes: *size_bytes, mode: 0o1777 }, false);
            }
            MountKind::Secret { id, env, file, required, mode, uid, gid } => {
                let Some(data) = secrets.read(id, *required).await? else { return Ok(()) };
                if let Some(name) = env {
                    let value = String::from_utf8(data.clone()).map_err(|_| {
                        ExecuteError::Invalid(format!("secret {id:?} is not text and cannot be the variable {name}"))
                    })?;
                    self.set(name, value);
                }
                if *file {
                    self.push(mount, MountSource::File { data, mode: *mode, uid: *uid, gid: *gid }, true);
                }
            }
            MountKind::Ssh { id, required, mode, uid, gid } => {
                let Some(agent) = secrets.agents.get(id) else {
                    return missing(*required, || format!("ssh agent {id:?}"), || format!("--ssh {id}=SOCKET"));
                };
                let agent = Agent::start(agent.clone(), *mode, (*uid, *gid))
                    .map_err(|source| ExecuteError::Setup { step: format!("offer the ssh agent {id:?}"), source })?;
                self.bind(mount, agent.socket(), false);
                self.agents.push(agent);
                if !self.container.env.iter().any(|(name, _)| name == "SSH_AUTH_SOCK") {
                    self.set("SSH_AUTH_SOCK", mount.target.clone());
                }
            }
        }
        Ok(())
    }

    fn set(&mut self, name: &str, value: String) {
        self.container.env.retain(|(known, _)| known != name);
        self.container.env.push((name.to_owned(), value));
    }
}

fn missing(required: bool, what: impl Fn() -> String, flag: impl Fn() -> String) -> Result<(), ExecuteError> {
    match required {
        false => Ok(()),
        true => Err(ExecuteError::Invalid(format!("{} is required, but was not given: add {}", what(), flag()))),
    }
}

impl Secrets {
    /// `None` for one that was not given and need not be.
    async fn read(&self, id: &str, required: bool) -> Result<Option<Vec<u8>>, ExecuteError> {
        let Some(source) = self.secrets.get(id) else {
            let flag = || format!("--secret id={id},src=FILE or --secret id={id},env=NAME");
            missing(required, || format!("secret {id:?}"), flag)?;
            return Ok(None);
        };
        let (what, read) = match source {
            SecretSource::File(path) => (path.display().to_string(), read_limited(path).await),
            SecretSource::Variable(name) => {
                let value = std::env::var_os(name).ok_or(io::ErrorKind::NotFound.into());
                (format!("the variable {name}"), value.map(std::os::unix::ffi::OsStringExt::into_vec))
            }
        };
        match read {
            Err(error) => Err(ExecuteError::Invalid(format!("read secret {id:?} from {what}: {error}"))),
            Ok(data) if data.len() as u64 > SECRET_BYTES => {
                Err(ExecuteError::Invalid(format!("secret {id:?} from {what} has more than {SECRET_BYTES} bytes")))
            }
            Ok(data) => Ok(Some(data)),
        }
    }
}

async fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    tokio::fs::File::open(path).await?.take(SECRET_BYTES + 1).read_to_end(&mut data).await?;
    Ok(data)
}

/// An ssh agent's socket with another owner and mode: connections to it are passed on to the real one.
struct Agent {
    directory: tempfile::TempDir,
    task: JoinHandle<()>,
}

impl Agent {
    fn start(agent: PathBuf, mode: u32, (uid, gid): (u32, u32)) -> io::Result<Agent> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("agent");
        let listener = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, Permissions::from_mode(mode))?;
        if (uid, gid) != (0, 0) {
            match std::os::unix::fs::chown(&socket, Some(uid), Some(gid)) {
                // Not mapped, so nobody in the container can be that user.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                done => done?,
            }
        }
        let task = tokio::spawn(async move {
            // Ends when it is aborted, or when no connection can be taken any more.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(relay(client, agent.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Agent { directory, task })
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent")
    }
}

/// A client of an agent that does not answer sees its connection close.
async fn relay(mut client: UnixStream, agent: PathBuf) -> io::Result<()> {
    let mut agent = UnixStream::connect(agent).await?;
    tokio::io::copy_bidirectional(&mut client, &mut agent).await.map(drop)
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Passes on what a stream gives, as it comes, until its last writer is gone.
async fn pass_on(stream: Option<pipe::Receiver>, name: Stream, output: &Output) {
    let Some(mut stream) = stream else { return };
    let mut buffer = vec![0; OUTPUT_BYTES];
    // A pipe of our own does not fail; if it did, the step's status would still be told.
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        output.write(name, &buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn an_agent_is_reached_through_its_stand_in() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().join("real");
        let listener = UnixListener::bind(&real).unwrap();
        let agent = Agent::start(real, 0o600, (0, 0)).unwrap();
        let (mut client, mut server) = {
            let (client, server) = tokio::join!(UnixStream::connect(agent.socket()), listener.accept());
            (client.unwrap(), server.unwrap().0)
        };
        client.write_all(b"ask").await.unwrap();
        client.shutdown().await.unwrap();
        let mut asked = String::new();
        server.read_to_string(&mut asked).await.unwrap();
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut answered = String::new();
        client.read_to_string(&mut answered).await.unwrap();
        assert_eq!((&*asked, &*answered), ("ask", "answer"));
        let socket = agent.socket();
        drop(agent);
        assert!(!socket.exists());
    }

    #[tokio::test]
    async fn secrets_are_read_late_and_to_a_limit() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("big");
        let secrets =
            Secrets { secrets: [("big".to_owned(), SecretSource::File(file.clone()))].into(), agents: HashMap::new() };
        assert!(secrets.read("big", false).await.unwrap_err().to_string().contains("read secret \"big\" from "));
        std::fs::write(&file, vec![b'x'; SECRET_BYTES as usize]).unwrap();
        assert_eq!(secrets.read("big", false).await.unwrap().map(|data| data.len() as u64), Some(SECRET_BYTES));
        std::fs::write(&file, vec![b'x'; SECRET_BYTES as usize + 1]).unwrap();
        assert!(secrets.read("big", false).await.unwrap_err().to_string().contains("more than 512000 bytes"));
        assert_eq!(secrets.read("other", false).await.unwrap(), None);
        assert!(secrets.read("other", true).await.is_err());
    }
}
