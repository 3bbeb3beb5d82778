//! Events to a terminal, to lines, or to JSON.
//!
//! One thread owns the screen: workers send [`Event`]s, [`Ui::finish`] waits until all of them are drawn. Everything goes
//! to stderr; stdout is left to data. Four ways to look at a build, named as buildx names them:
//! `tty` redraws a list of steps in place, `plain` appends lines (`#3 0.412 output`), `rawjson` writes BuildKit's
//! `SolveStatus` objects, `quiet` says nothing.

mod json;
mod plain;
mod tty;

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use forge_solver::event::{Event, EventKind, Events, Outcome, StepId};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Progress {
    /// `tty` on a terminal, `plain` elsewhere
    #[default]
    Auto,
    Tty,
    Plain,
    /// BuildKit's SolveStatus as JSON lines
    Rawjson,
    Quiet,
    #[value(hide = true)]
    None,
}

/// How often the terminal is redrawn.
const FRAME: Duration = Duration::from_millis(100);

pub struct Ui(Option<Drawing>);

struct Drawing {
    events: Sender<Message>,
    thread: JoinHandle<()>,
}

enum Message {
    Event(Event),
    End,
}

trait View: Send {
    fn event(&mut self, event: &Event, steps: &Steps, out: &mut dyn Write) -> io::Result<()>;
    /// Time has passed.
    fn tick(&mut self, _steps: &Steps, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
    fn end(&mut self, _steps: &Steps, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}

impl Ui {
    pub fn start(progress: Progress) -> Ui {
        let terminal = io::stderr().is_terminal();
        let view: Option<Box<dyn View>> = match progress {
            Progress::Auto if terminal => Some(Box::new(tty::Tty::new())),
            Progress::Tty => Some(Box::new(tty::Tty::new())),
            Progress::Auto | Progress::Plain => Some(Box::new(plain::Plain::default())),
            Progress::Rawjson => Some(Box::new(json::RawJson)),
            Progress::Quiet | Progress::None => None,
        };
        Ui(view.map(|view| {
            let (events, inbox) = mpsc::channel();
            Drawing { events, thread: std::thread::spawn(move || draw(&inbox, view)) }
        }))
    }

    pub fn events(&self) -> Events {
        let Some(drawing) = &self.0 else { return Events::nowhere() };
        let sender = drawing.events.clone();
        Events::new(move |event| {
            // The drawing thread is gone where nobody reads stderr any more: the build goes on in silence.
            sender.send(Message::Event(event)).unwrap_or_default();
        })
    }

    /// Waits until everything sent so far is on the screen.
    pub fn finish(self) {
        let Some(Drawing { events, thread }) = self.0 else { return };
        events.send(Message::End).unwrap_or_default();
        thread.join().unwrap_or_default();
    }
}

/// Ends with the last message, or when nobody is reading.
fn draw(inbox: &Receiver<Message>, mut view: Box<dyn View>) {
    let mut steps = Steps::default();
    let mut next_frame = Instant::now() + FRAME;
    loop {
        let message = inbox.recv_timeout(next_frame.saturating_duration_since(Instant::now()));
        let mut out = io::stderr().lock();
        let drawn = match message {
            Ok(Message::Event(event)) => {
                steps.apply(&event);
                view.event(&event, &steps, &mut out)
            }
            Ok(Message::End) | Err(RecvTimeoutError::Disconnected) => {
                // Nobody may be reading any more; there is nothing left to tell them.
                return view.end(&steps, &mut out).unwrap_or_default();
            }
            Err(RecvTimeoutError::Timeout) => Ok(()),
        };
        if drawn.is_err() {
            return;
        }
        if Instant::now() >= next_frame {
            if view.tick(&steps, &mut out).is_err() {
                return;
            }
            next_frame = Instant::now() + FRAME;
        }
    }
}

/// What is known of every step so far, in the order they started.
#[derive(Default)]
struct Steps {
    order: Vec<Step>,
    index: HashMap<StepId, usize>,
}

struct Step {
    name: String,
    started: SystemTime,
    finished: Option<(SystemTime, Outcome)>,
    missed: Option<String>,
    /// The last lines of output, for the terminal.
    tail: Vec<String>,
    /// Bytes after the last newline.
    partial: Vec<u8>,
    /// By what is moved: current and total bytes.
    progress: Vec<(String, u64, u64)>,
}

const TAIL_LINES: usize = 6;

impl Steps {
    fn get(&self, id: &StepId) -> Option<(usize, &Step)> {
        let index = *self.index.get(id)?;
        Some((index, &self.order[index]))
    }

    fn apply(&mut self, event: &Event) {
        if let EventKind::Started { name, .. } = &event.kind {
            let step = Step {
                name: name.clone(),
                started: event.time,
                finished: None,
                missed: None,
                tail: Vec::new(),
                partial: Vec::new(),
                progress: Vec::new(),
            };
            match self.index.get(&event.step) {
                Some(&index) => self.order[index] = step,
                None => {
                    self.index.insert(event.step.clone(), self.order.len());
                    self.order.push(step);
                }
            }
            return;
        }
        let Some(&index) = self.index.get(&event.step) else { return };
        self.order[index].apply(event);
    }
}

impl Step {
    fn apply(&mut self, event: &Event) {
        match &event.kind {
            EventKind::Missed { reason } => self.missed = Some(reason.clone()),
            EventKind::Output { data, .. } => self.output(data),
            EventKind::Progress { what, current_bytes, total_bytes } => {
                self.advance(what, *current_bytes, *total_bytes)
            }
            EventKind::Finished { outcome } => self.finished = Some((event.time, outcome.clone())),
            EventKind::Started { .. } | EventKind::Warning { .. } => {}
        }
    }

    fn output(&mut self, data: &[u8]) {
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.tail.push(clean(&line));
        }
        // A program that never ends its line (a progress bar) must not fill the memory.
        if self.partial.len() > 8192 {
            let line = std::mem::take(&mut self.partial);
            self.tail.push(clean(&line));
        }
        let excess = self.tail.len().saturating_sub(TAIL_LINES);
        self.tail.drain(..excess);
    }

    fn advance(&mut self, what: &str, current: u64, total: u64) {
        match self.progress.iter_mut().find(|(name, ..)| name == what) {
            Some(entry) => (entry.1, entry.2) = (current, total),
            None => self.progress.push((what.to_owned(), current, total)),
        }
    }

    fn duration(&self, now: SystemTime) -> Duration {
        let end = self.finished.as_ref().map_or(now, |(end, _)| *end);
        end.duration_since(self.started).unwrap_or_default()
    }
}

/// A line of a program's output made harmless for the terminal: what a carriage return overwrote is dropped, and
/// so are escape sequences and other control characters.
fn clean(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end_matches(['\n', '\r']);
    let shown = text.rsplit('\r').next().unwrap_or_default();
    console::strip_ansi_codes(shown)
        .chars()
        .map(|c| if c == '\t' { ' ' } else { c })
        .filter(|c| !c.is_control())
        .collect()
}

fn seconds(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}

/// `12.3MB`, decimal as docker prints it.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes}B"),
        _ if value < 10.0 => format!("{value:.2}{}", UNITS[unit]),
        _ if value < 100.0 => format!("{value:.1}{}", UNITS[unit]),
        _ => format!("{value:.0}{}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_decimal_as_docker_prints_them() {
        for (bytes, expect) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1.00kB"),
            (12_345, "12.3kB"),
            (123_456_789, "123MB"),
            (5_000_000_000_000, "5.00TB"),
        ] {
            assert_eq!(human_bytes(bytes), expect);
        }
    }

    #[test]
    fn output_lines_cannot_move_the_cursor() {
        assert_eq!(clean(b"10%\r50%\r100%\n"), "100%");
        assert_eq!(clean(b"\x1b[2J\x1b[31mred\x1b[0m\x07\tx\n"), "red x");
    }
}
