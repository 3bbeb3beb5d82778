//! What tests share: a state directory of their own, the program in it, a tiny base, a real registry.

pub mod bases;
pub mod registry;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A state directory and a working directory that go away with the test, also a failing one.
pub struct TestEnv {
    directory: tempfile::TempDir,
}

impl TestEnv {
    pub fn new() -> TestEnv {
        // Beside the build's own files: a real file system, where /tmp may be a tmpfs.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory");
        fs::create_dir(directory.path().join("work")).expect("a working directory");
        TestEnv { directory }
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// Where commands run.
    pub fn work(&self) -> PathBuf {
        self.directory.path().join("work")
    }

    /// Writes a file of the working directory; parents are made.
    pub fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.work().join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("parents");
        fs::write(&path, text).expect("a file");
        path
    }

    /// A `Dockerfile` over [`TestEnv::shell_base`].
    pub fn dockerfile(&self, text: &str) -> &TestEnv {
        self.file("Dockerfile", text);
        self
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forge"));
        command.args(arguments).current_dir(self.work()).env("FORGE_ROOT", self.root()).stdin(Stdio::null());
        for name in ["SOURCE_DATE_EPOCH", "BUILDKIT_PROGRESS", "DOCKER_CONFIG", "FORGE_SNAPSHOTTER"] {
            command.env_remove(name);
        }
        command
    }

    pub fn forge(&self, arguments: &[&str]) -> Finished {
        Finished::of(self.command(arguments))
    }

    /// `forge build` with plain progress and a busybox stage named `base` at hand.
    pub fn build(&self, arguments: &[&str]) -> Finished {
        let base = format!("base={}", self.shell_base().display());
        let fixed = ["build", "--progress=plain", "--build-context", &base];
        self.forge(&[&fixed[..], arguments, &["."]].concat())
    }

    /// A context with busybox and the directories that programs expect. `COPY --from=base / /` makes a root of it.
    pub fn shell_base(&self) -> PathBuf {
        let base = self.directory.path().join("base");
        if !base.exists() {
            fs::create_dir_all(base.join("bin")).expect("bin");
            for name in ["etc", "tmp", "root", "proc", "sys", "dev"] {
                fs::create_dir(base.join(name)).expect(name);
            }
            fs::write(base.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n")
                .expect("passwd");
            fs::write(base.join("etc/group"), "root:x:0:\nweb:x:1000:\nstaff:x:50:web\n").expect("group");
            fs::copy(busybox(), base.join("bin/busybox"))
                .expect("busybox-static is installed (apt-get install busybox-static)");
            for applet in APPLETS {
                std::os::unix::fs::symlink("busybox", base.join("bin").join(applet)).expect(applet);
            }
        }
        base
    }
}

/// The Dockerfile lines that make a stage with a shell of the `base` context.
pub const SHELL: &str = "FROM scratch\nCOPY --from=base / /\n";

const APPLETS: &[&str] = &[
    "sh",
    "ash",
    "cat",
    "chmod",
    "chown",
    "cp",
    "cut",
    "date",
    "dd",
    "echo",
    "env",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "ip",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "mount",
    "mv",
    "nc",
    "ping",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "tail",
    "tar",
    "test",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "wc",
    "wget",
    "which",
    "yes",
];

pub fn busybox() -> &'static Path {
    let places = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
    places.into_iter().find(|path| path.exists()).unwrap_or(places[0])
}

/// How a command ended, with what it said.
pub struct Finished {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    what: String,
}

impl Finished {
    pub fn of(mut command: Command) -> Finished {
        let output = command.output().expect("the program starts");
        Finished::new(format!("{command:?}"), output)
    }

    pub fn new(what: String, output: Output) -> Finished {
        Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            what,
        }
    }

    #[track_caller]
    pub fn ok(self) -> Finished {
        assert_eq!(self.code, 0, "{}", self.story());
        self
    }

    #[track_caller]
    pub fn fails(self, code: i32) -> Finished {
        assert_eq!(self.code, code, "{}", self.story());
        self
    }

    #[track_caller]
    pub fn says(self, text: &str) -> Finished {
        assert!(self.stderr.contains(text), "expected {text:?} in\n{}", self.story());
        self
    }

    #[track_caller]
    pub fn silent_about(self, text: &str) -> Finished {
        assert!(!self.stderr.contains(text), "did not expect {text:?} in\n{}", self.story());
        self
    }

    #[track_caller]
    pub fn prints(self, text: &str) -> Finished {
        assert!(self.stdout.contains(text), "expected {text:?} in\n{}", self.story());
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}\n{}", self.story()))
    }

    /// The last line of stdout.
    #[track_caller]
    pub fn last_line(&self) -> &str {
        self.stdout.trim_end().lines().last().unwrap_or_else(|| panic!("no output\n{}", self.story()))
    }

    fn story(&self) -> String {
        let mut story = String::new();
        write!(
            story,
            "{}\nexit code {}\n--- stdout\n{}\n--- stderr\n{}",
            self.what, self.code, self.stdout, self.stderr
        )
        .expect("a string");
        story
    }
}

/// Says why a test does nothing here, and whether it must not.
pub fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none() || !reason.starts_with("install "), "in CI: {reason}");
    eprintln!("skipped: {reason}");
}

/// Whether a program is there; says so where it is not.
pub fn have(program: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(program).is_file())
    });
    if !found {
        skip(&format!("install {program}"));
    }
    found
}
