//! Running a command and reading what it cost from the kernel's own accounts.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub wall: Duration,
    /// Of the largest of its processes.
    pub peak_memory_kib: u64,
}

#[derive(Default)]
pub struct Figures(Vec<Measured>);

impl Figures {
    pub fn add(&mut self, measured: Measured) {
        self.0.push(measured);
    }

    pub fn median(&self) -> Duration {
        let walls = self.sorted();
        walls.get(walls.len() / 2).copied().unwrap_or_default()
    }

    fn sorted(&self) -> Vec<Duration> {
        let mut walls: Vec<Duration> = self.0.iter().map(|measured| measured.wall).collect();
        walls.sort();
        walls
    }

    pub fn print(&self, name: &str) {
        let peak = self.0.iter().map(|measured| measured.peak_memory_kib).max().unwrap_or(0);
        let best = self.sorted().first().copied().unwrap_or_default();
        let (median, best) = (milliseconds(self.median()), milliseconds(best));
        println!("{name:10} {median} ms   best {best} ms   peak {:>6.1} MB", peak as f64 * 1024.0 / 1e6);
    }
}

pub fn milliseconds(time: Duration) -> String {
    format!("{:>10.1}", time.as_secs_f64() * 1000.0)
}

pub fn repeat(times: usize, mut run: impl FnMut() -> Measured) -> Figures {
    run();
    let mut figures = Figures::default();
    (0..times).for_each(|_| figures.add(run()));
    figures
}

/// The first name is ours: how many times longer each other one takes.
pub fn compare(names: &[&str], figures: &[Figures]) {
    for (name, figures) in names.iter().zip(figures) {
        figures.print(name);
    }
    let ours = figures[0].median().as_secs_f64();
    for (name, theirs) in names.iter().zip(figures).skip(1) {
        println!("{name} / {} = {:.1}", names[0], theirs.median().as_secs_f64() / ours);
    }
}

/// Runs to the end; peak memory is that of the largest process, as time(1) tells it.
pub fn measure(command: &mut Command) -> Measured {
    let mut timed = Command::new("/usr/bin/time");
    timed.args(["-f", "%M", "-o"]);
    let report = tempfile::NamedTempFile::new().expect("a file");
    timed.arg(report.path()).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => timed.env(name, value),
            None => timed.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        timed.current_dir(directory);
    }
    timed.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let start = Instant::now();
    let output = timed.output().expect("time(1) is installed (apt-get install time)");
    let wall = start.elapsed();
    let code = output.status.code().or(output.status.signal()).unwrap_or(-1);
    assert_eq!(code, 0, "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(report.path()).expect("a report");
    Measured { wall, peak_memory_kib: text.trim().lines().last().and_then(|line| line.parse().ok()).unwrap_or(0) }
}
