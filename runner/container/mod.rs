//! Containers: how RUN and `forge run` start a program over a root.
//!
//! ```text
//! forge ──spawns once──> helper (`serve`, one thread) ──clone3──> process 1 (`init`) ──exec──> the program
//!   └── `Helper::run`: a `Container` value and descriptors, over sockets (`channel`)
//! ```
//! Promises: a container sees its root and what was mounted for it, nothing else of the machine; it ends when forge lets go
//! of it, when forge dies and when its first process ends, with all its processes; what was made for it in the root or
//! beside it (mount points, cgroups) is removed, and what cannot be removed is told. Needs Linux 5.12 (`clone3`, the new
//! mount calls, `mount_setattr`).
//!
//! Start reading at [`spec`], then [`init`].

mod account;
pub mod capability;
mod cgroup;
mod channel;
mod executor;
mod helper;
mod init;
mod mounts;
mod namespaces;
mod reaper;
mod seccomp;
mod serve;
mod spec;
mod targets;
pub mod user;

pub use executor::{SecretSource, Secrets, StepExecutor};
pub use helper::{HELPER_ARGUMENT, Helper, Running};
pub use serve::helper_main;
pub use spec::{Container, ContainerMount, Cpu, Limits, MountSource, Privileges, Stdio, Ulimit};
