//! The builders: forge, and those of Debian's packages that it is measured against.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::have;
use crate::measure::{Measured, measure};

pub trait Peer {
    fn name(&self) -> &'static str;
    /// Builds `text` over the base; the text starts behind its FROM line.
    fn build(&self, context: &Path, text: &str) -> Measured;
}

/// The OCI layout of a base image, where its maker is at hand; the same image as an archive lies beside it.
pub fn base(name: &str) -> Option<PathBuf> {
    let maker = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/base-images/make-base-images");
    let maker = std::env::var_os("FORGE_BASE_IMAGES").map_or(maker, PathBuf::from);
    let output = Command::new(maker).args(["--tar", name]).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().last()?.split('\t').nth(2).map(PathBuf::from)
}

/// What docker can load: `<cache>/tar/NAME.tar` for the layout `<cache>/oci/NAME`.
fn archive(base: &Path) -> Option<PathBuf> {
    Some(base.parent()?.parent()?.join("tar").join(format!("{}.tar", base.file_name()?.to_string_lossy())))
}

fn dockerfile(directory: &Path, name: &str, from: &str, text: &str) -> PathBuf {
    // Outside the context, or every builder's file would be part of all contexts.
    let path = directory.join(format!("Dockerfile.{name}"));
    fs::write(&path, format!("FROM {from}\n{text}")).expect("a Dockerfile");
    path
}

pub struct Forge {
    directory: PathBuf,
    base: Option<PathBuf>,
}

impl Forge {
    pub fn new(directory: &Path, base: Option<PathBuf>) -> Forge {
        Forge { directory: directory.to_owned(), base }
    }

    pub fn version() -> Measured {
        measure(Command::new(env!("CARGO_BIN_EXE_forge")).arg("version"))
    }

    pub fn run(&self, arguments: &[&str]) -> Measured {
        measure(self.command().args(arguments))
    }

    pub fn build_to(&self, context: &Path, text: &str, output: &str) -> Measured {
        measure(self.build_command(context, text).args(["-o", output]))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forge"));
        command.env("FORGE_ROOT", self.directory.join("forge"));
        command
    }

    fn build_command(&self, context: &Path, text: &str) -> Command {
        let from = if self.base.is_some() { "base" } else { "scratch" };
        let file = dockerfile(&self.directory, "forge", from, text);
        let mut command = self.command();
        command.args(["build", "-q", "--network=host", "-t", "bench", "-f"]).arg(file).arg(context);
        if let Some(base) = &self.base {
            command.arg("--build-context").arg(format!("base=oci-layout://{}", base.display()));
        }
        command
    }
}

impl Peer for Forge {
    fn name(&self) -> &'static str {
        "forge"
    }

    fn build(&self, context: &Path, text: &str) -> Measured {
        measure(&mut self.build_command(context, text))
    }
}

pub struct Buildah {
    directory: PathBuf,
}

impl Buildah {
    pub fn start(directory: &Path, base: &Path) -> Option<Buildah> {
        if !have("buildah") || !have("runc") {
            return None;
        }
        let peer = Buildah { directory: directory.join("buildah") };
        fs::create_dir_all(&peer.directory).expect("a directory");
        let limits = "[containers]\ndefault_ulimits = [\"nofile=20000:20000\", \"nproc=32768:32768\"]\n";
        fs::write(peer.directory.join("containers.conf"), limits).expect("written");
        let policy = "{\"default\":[{\"type\":\"insecureAcceptAnything\"}]}";
        fs::write(peer.directory.join("policy.json"), policy).expect("written");
        let archive = archive(base)?;
        let pulled = peer.command("pull").arg("--quiet").arg(format!("docker-archive:{}", archive.display())).output();
        let pulled = pulled.expect("buildah starts");
        let id = String::from_utf8_lossy(&pulled.stdout).trim().to_owned();
        if id.is_empty() {
            println!("buildah cannot pull: left out\n{}", String::from_utf8_lossy(&pulled.stderr));
            return None;
        }
        let tagged = peer.plain_command("tag").args([&id, "localhost/base"]).status();
        tagged.is_ok_and(|status| status.success()).then_some(peer)
    }

    fn plain_command(&self, word: &str) -> Command {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(self.directory.join("root")).arg("--runroot").arg(self.directory.join("run"));
        command.args(["--storage-driver", "overlay", word]);
        command.env("CONTAINERS_CONF", self.directory.join("containers.conf")).stdin(Stdio::null());
        command
    }

    /// A command that checks signatures if it is not told to let that be.
    fn command(&self, word: &str) -> Command {
        let mut command = self.plain_command(word);
        command.arg("--signature-policy").arg(self.directory.join("policy.json"));
        command
    }
}

impl Peer for Buildah {
    fn name(&self) -> &'static str {
        "buildah"
    }

    fn build(&self, context: &Path, text: &str) -> Measured {
        let file = dockerfile(&self.directory, "buildah", "localhost/base", text);
        let mut command = self.command("build");
        // Its default network would change the host's firewall.
        command.args(["--quiet", "--layers", "--pull=never", "--isolation=oci", "--runtime=runc", "--network=host"]);
        measure(command.args(["-t", "bench", "-f"]).arg(file).arg(context))
    }
}

/// dockerd with its BuildKit, started for the run, the host's network left alone.
pub struct Docker {
    directory: PathBuf,
    daemon: Child,
    /// Whether the groups of that name are ours to remove.
    made_cgroups: bool,
}

/// Of Debian's package: another in `PATH` may want another builder.
const CLIENT: &str = "/usr/bin/docker";
/// dockerd makes it in every hierarchy, and leaves it.
const CGROUP: &str = "docker";

impl Docker {
    pub fn start(directory: &Path, base: &Path) -> Option<Docker> {
        if !have("dockerd") || !have(CLIENT) {
            return None;
        }
        let directory = directory.join("docker");
        fs::create_dir_all(&directory).expect("a directory");
        let log = fs::File::create(directory.join("log")).expect("a log");
        let made_cgroups = cgroups().is_empty();
        // It ends with this process also where nothing can be dropped any more.
        let daemon = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "dockerd", "--data-root"])
            .arg(directory.join("data"))
            .arg("--exec-root")
            .arg(directory.join("exec"))
            .arg("--pidfile")
            .arg(directory.join("pid"))
            .arg("-H")
            .arg(format!("unix://{}", directory.join("sock").display()))
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("setpriv starts");
        let peer = Docker { directory, daemon, made_cgroups };
        if !peer.ready() {
            let log = fs::read_to_string(peer.directory.join("log")).unwrap_or_default();
            println!("dockerd did not come up: left out\n{log}");
            return None;
        }
        let archive = archive(base)?;
        let loaded = peer.command(&["load", "-q", "-i"]).arg(&archive).output().expect("docker starts");
        let text = String::from_utf8_lossy(&loaded.stdout).into_owned();
        let Some((_, name)) = text.trim().split_once(": ") else {
            println!("dockerd did not load {}: left out", archive.display());
            return None;
        };
        let tagged = peer.command(&["tag", name, "base"]).status();
        tagged.is_ok_and(|status| status.success()).then_some(peer)
    }

    fn ready(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if self.command(&["version"]).output().is_ok_and(|output| output.status.success()) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        false
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(CLIENT);
        command.arg("-H").arg(format!("unix://{}", self.directory.join("sock").display())).args(arguments);
        command.env("DOCKER_BUILDKIT", "1").stdin(Stdio::null());
        command
    }

    fn peak_memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    }
}

impl Peer for Docker {
    fn name(&self) -> &'static str {
        "docker"
    }

    /// The client, and the daemon that does the work for it.
    fn build(&self, context: &Path, text: &str) -> Measured {
        let file = dockerfile(&self.directory, "docker", "base", text);
        let mut command = self.command(&["build", "-q", "--network=host", "-t", "bench", "-f"]);
        // proc(5): 5 resets the peak.
        fs::write(format!("/proc/{}/clear_refs", self.daemon.id()), "5").expect("the peak is reset");
        let measured = measure(command.arg(file).arg(context));
        Measured { peak_memory_kib: measured.peak_memory_kib.max(self.peak_memory_kib()), ..measured }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.daemon.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).ok();
        self.daemon.wait().ok();
        if self.made_cgroups {
            cgroups().iter().for_each(|group| remove_groups(group));
        }
    }
}

fn cgroups() -> Vec<PathBuf> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let own = hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]).map(|hierarchy| hierarchy.join(CGROUP));
    own.filter(|group| group.is_dir()).collect()
}

/// Innermost first; the kernel keeps those that have processes.
fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    fs::remove_dir(group).ok();
}
