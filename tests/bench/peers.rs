//! The builders: forge, and those of Debian's packages that it is measured against.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::measure::{Measured, measure};

pub trait Peer {
    fn name(&self) -> &'static str;
    /// Builds `text` over the base; the text starts behind its FROM line.
    fn build(&self, context: &Path, text: &str) -> Measured;
}

/// The OCI layout of a Debian base image, where its maker is at hand.
pub fn base() -> Option<PathBuf> {
    let maker = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/base-images/make-base-images");
    let maker = std::env::var_os("FORGE_BASE_IMAGES").map_or(maker, PathBuf::from);
    let output = Command::new(maker).args(["--tar", "debian"]).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().last()?.split('\t').nth(2).map(PathBuf::from)
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
}

impl Peer for Forge {
    fn name(&self) -> &'static str {
        "forge"
    }

    fn build(&self, context: &Path, text: &str) -> Measured {
        let from = if self.base.is_some() { "base" } else { "scratch" };
        let file = dockerfile(&self.directory, "forge", from, text);
        let mut command = Command::new(env!("CARGO_BIN_EXE_forge"));
        command.args(["build", "-q", "--network=host", "-t", "bench", "-f"]).arg(file).arg(context);
        if let Some(base) = &self.base {
            command.arg("--build-context").arg(format!("base=oci-layout://{}", base.display()));
        }
        measure(command.env("FORGE_ROOT", self.directory.join("forge")))
    }
}

pub struct Buildah {
    directory: PathBuf,
}

impl Buildah {
    pub fn start(directory: &Path, base: &Path) -> Option<Buildah> {
        let peer = Buildah { directory: directory.join("buildah") };
        fs::create_dir_all(&peer.directory).expect("a directory");
        fs::write(
            peer.directory.join("containers.conf"),
            "[containers]\ndefault_ulimits = [\"nofile=20000:20000\", \"nproc=32768:32768\"]\n",
        )
        .expect("written");
        fs::write(peer.directory.join("policy.json"), "{\"default\":[{\"type\":\"insecureAcceptAnything\"}]}")
            .expect("written");
        let mut pull = peer.command(&["pull", "--quiet", "--policy=always"]);
        pull.arg("--signature-policy").arg(peer.directory.join("policy.json")).arg(format!("oci:{}", base.display()));
        let pulled = pull.output().ok().filter(|output| output.status.success());
        let Some(pulled) = pulled else {
            println!("buildah is not installed or cannot pull: left out");
            return None;
        };
        let id = String::from_utf8_lossy(&pulled.stdout).trim().to_owned();
        peer.command(&["tag", &id, "localhost/base"]).status().ok()?;
        Some(peer)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(self.directory.join("root")).arg("--runroot").arg(self.directory.join("run"));
        command.args(["--storage-driver", "overlay"]).args(arguments);
        command
            .env("CONTAINERS_CONF", self.directory.join("containers.conf"))
            .stderr(Stdio::null())
            .stdin(Stdio::null());
        command
    }
}

impl Peer for Buildah {
    fn name(&self) -> &'static str {
        "buildah"
    }

    fn build(&self, context: &Path, text: &str) -> Measured {
        let file = dockerfile(&self.directory, "buildah", "localhost/base", text);
        let mut command = self.command(&[
            "build",
            "--quiet",
            "--layers",
            "--pull=never",
            "--isolation=oci",
            "--runtime=runc",
            "--network=host",
        ]);
        command.arg("--signature-policy").arg(self.directory.join("policy.json"));
        measure(command.args(["-t", "bench", "-f"]).arg(file).arg(context))
    }
}

impl Drop for Buildah {
    fn drop(&mut self) {
        // Its storage may be mounted still.
        self.command(&["rm", "--all"]).output().ok();
        Command::new("umount").arg("-l").arg(self.directory.join("root/overlay")).stderr(Stdio::null()).status().ok();
    }
}

/// dockerd with its BuildKit, started for the run, the host's network left alone.
pub struct Docker {
    directory: PathBuf,
    daemon: Child,
}

impl Docker {
    pub fn start(directory: &Path, base: &Path) -> Option<Docker> {
        let directory = directory.join("docker");
        fs::create_dir_all(&directory).expect("a directory");
        let log = fs::File::create(directory.join("log")).expect("a log");
        let daemon = Command::new("dockerd")
            .arg("--data-root")
            .arg(directory.join("data"))
            .arg("--exec-root")
            .arg(directory.join("exec"))
            .arg("--pidfile")
            .arg(directory.join("pid"))
            .arg("-H")
            .arg(format!("unix://{}", directory.join("sock").display()))
            .args(["--bridge=none", "--iptables=false", "--ip-forward=false"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn();
        let Ok(daemon) = daemon else {
            println!("docker.io is not installed: left out");
            return None;
        };
        let peer = Docker { directory, daemon };
        peer.ready().then_some(())?;
        let archive = base.parent()?.parent()?.join("tar").join(format!("{}.tar", base.file_name()?.to_string_lossy()));
        let loaded = peer.command(&["load", "-q", "-i"]).arg(&archive).output().ok()?;
        let text = String::from_utf8_lossy(&loaded.stdout).into_owned();
        let Some(name) = text.trim().rsplit_once(": ").map(|(_, name)| name.to_owned()) else {
            println!("dockerd did not load {}: left out", archive.display());
            return None;
        };
        peer.command(&["tag", &name, "base"]).status().ok()?;
        Some(peer)
    }

    fn ready(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if self.command(&["version"]).output().is_ok_and(|output| output.status.success()) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        println!("dockerd did not come up: left out");
        false
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("-H").arg(format!("unix://{}", self.directory.join("sock").display())).args(arguments);
        command.env("DOCKER_BUILDKIT", "1").stdin(Stdio::null()).stderr(Stdio::null());
        command
    }
}

impl Peer for Docker {
    fn name(&self) -> &'static str {
        "docker"
    }

    fn build(&self, context: &Path, text: &str) -> Measured {
        let file = dockerfile(&self.directory, "docker", "base", text);
        measure(self.command(&["build", "-q", "--network=host", "-t", "bench", "-f"]).arg(file).arg(context))
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.daemon.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).ok();
        self.daemon.wait().ok();
    }
}
