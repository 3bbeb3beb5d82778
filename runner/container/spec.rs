//! What a container is: one complete value, sent to the helper as it stands.

use std::io;
use std::path::PathBuf;

use forge_solver::ExecuteError;
use serde::{Deserialize, Serialize};

use super::capability::{self, Set};

/// Everything that decides how a program runs, but for what cannot be written down: its network namespace and its streams.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    /// A directory on the host, usually a mount point of a snapshot.
    pub root: PathBuf,
    pub args: Vec<String>,
    /// Each name once. `PATH` and `HOME` are added where they are missing.
    pub env: Vec<(String, String)>,
    /// Absolute. Made for the time of the run where it is missing.
    pub cwd: String,
    /// `user[:group]`, names or numbers, empty for root; resolved in the root.
    pub user: String,
    pub hostname: String,
    /// In order; a later one may lie inside an earlier one.
    pub mounts: Vec<ContainerMount>,
    pub resolv_conf: String,
    pub hosts: String,
    pub privileges: Privileges,
    pub no_new_privileges: bool,
    pub readonly_root: bool,
    pub limits: Limits,
    /// Process 1 is forge's own: it passes signals on and reaps orphans.
    pub init: bool,
}

impl Default for Container {
    fn default() -> Container {
        Container {
            root: PathBuf::new(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: "/".to_owned(),
            user: String::new(),
            hostname: "localhost".to_owned(),
            mounts: Vec::new(),
            resolv_conf: String::new(),
            hosts: String::new(),
            privileges: Privileges::default(),
            no_new_privileges: false,
            readonly_root: false,
            limits: Limits::default(),
            init: false,
        }
    }
}

/// Something mounted at an absolute path of the root. Mount points that have to be made are removed after the run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerMount {
    pub target: String,
    pub source: MountSource,
    pub readonly: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum MountSource {
    /// A file, directory or socket of the host, with what is mounted below it.
    Bind(PathBuf),
    Tmpfs {
        size_bytes: Option<u64>,
        mode: u32,
    },
    /// A file in memory, for secrets and heredocs.
    File {
        data: Vec<u8>,
        mode: u32,
        uid: u32,
        gid: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Privileges {
    /// docker's default capabilities with changes, its system call filter, its masked paths.
    Default { add: Set, drop: Set },
    /// All capabilities, no filter, nothing masked.
    All,
}

impl Default for Privileges {
    fn default() -> Privileges {
        Privileges::Default { add: 0, drop: 0 }
    }
}

impl Privileges {
    pub fn capabilities(self) -> Set {
        match self {
            // Dropping ALL leaves what was added by name; adding ALL leaves all but what was dropped by name.
            Privileges::Default { add, drop: capability::ALL } => add,
            Privileges::Default { add, drop } => (capability::DEFAULT | add) & !drop,
            Privileges::All => capability::ALL,
        }
    }
}

/// Limits by cgroup and rlimit. What is `None` stays as the machine has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    pub memory_bytes: Option<u64>,
    pub cpu: Option<Cpu>,
    pub pids: Option<u64>,
    pub ulimits: Vec<Ulimit>,
    /// The size of `/dev/shm`; 64 MiB if not given.
    pub shm_size_bytes: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    pub quota_us: u64,
    pub period_us: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    pub name: String,
    pub soft: u64,
    pub hard: u64,
}

/// The program's standard streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    /// Nothing to read, nowhere to write.
    Null,
    /// Nothing to read; output through pipes.
    Output,
    /// All three through pipes.
    Pipes,
    /// Those of this process.
    Inherit,
    /// A terminal of the container's own.
    Terminal { rows: u16, columns: u16 },
}

/// Why a container did not start, in a form that can be sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    NotFound { program: String, reason: String },
    NotExecutable { program: String, reason: String },
    Invalid(String),
    Setup { step: String, errno: i32, hint: Option<String> },
}

pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl From<Failure> for ExecuteError {
    fn from(failure: Failure) -> ExecuteError {
        match failure {
            Failure::NotFound { program, reason } => ExecuteError::NotFound { program, reason },
            Failure::NotExecutable { program, reason } => ExecuteError::NotExecutable { program, reason },
            Failure::Invalid(text) => ExecuteError::Invalid(text),
            Failure::Setup { step, errno, hint } => {
                let source = io::Error::from_raw_os_error(errno);
                let source = match hint {
                    Some(hint) => io::Error::new(source.kind(), format!("{source} ({hint})")),
                    None => source,
                };
                ExecuteError::Setup { step, source }
            }
        }
    }
}

/// Names the step of the set-up that went wrong.
pub trait Step<T> {
    fn step(self, step: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Step<T> for std::result::Result<T, E> {
    fn step(self, step: impl Into<String>) -> Result<T> {
        self.map_err(|error| {
            let error: io::Error = error.into();
            Failure::Setup { step: step.into(), errno: error.raw_os_error().unwrap_or(libc::EIO), hint: None }
        })
    }
}

pub trait Hint<T> {
    /// Says what to do about a set-up that failed with `errno`.
    fn hint(self, errno: i32, hint: &str) -> Result<T>;
}

impl<T> Hint<T> for Result<T> {
    fn hint(self, when: i32, text: &str) -> Result<T> {
        self.map_err(|failure| match failure {
            Failure::Setup { step, errno, hint: None } if errno == when => {
                Failure::Setup { step, errno, hint: Some(text.to_owned()) }
            }
            other => other,
        })
    }
}
