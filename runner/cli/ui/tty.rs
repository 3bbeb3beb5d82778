//! The terminal: finished steps scroll up, running ones are redrawn in place with the end of their output.

use std::io::{self, Write};
use std::time::{Instant, SystemTime};

use console::{Style, Term, measure_text_width, truncate_str};
use forge_solver::event::{Event, EventKind, Outcome};

use super::{Step, Steps, View, human_bytes, seconds};

pub struct Tty {
    term: Term,
    started: Instant,
    /// Lines of the live part on the screen now.
    drawn: usize,
    /// Which finished steps have scrolled up already, by index.
    settled: Vec<bool>,
    dim: Style,
    blue: Style,
    red: Style,
}

/// Running steps shown with output; more are shown by name.
const STEPS_WITH_OUTPUT: usize = 3;

impl Tty {
    pub fn new() -> Tty {
        let style = || Style::new().for_stderr();
        Tty {
            term: Term::stderr(),
            started: Instant::now(),
            drawn: 0,
            settled: Vec::new(),
            dim: style().dim(),
            blue: style().blue(),
            red: style().red(),
        }
    }

    fn width(&self) -> usize {
        usize::from(self.term.size().1).max(40)
    }

    fn clear(&mut self, out: &mut dyn Write) -> io::Result<()> {
        if self.drawn > 0 {
            write!(out, "\x1b[{}A\r\x1b[J", self.drawn)?;
            self.drawn = 0;
        }
        Ok(())
    }

    /// ` => name ........ 1.2s`, cut to the width of the terminal.
    fn line(&self, name: &str, time: &str) -> String {
        let width = self.width();
        let room = width.saturating_sub(time.len() + 6);
        let name = truncate_str(name, room, "…");
        let gap = width.saturating_sub(4 + measure_text_width(&name) + time.len() + 1);
        format!(" => {name}{}{time}", " ".repeat(gap))
    }

    fn settle(&mut self, index: usize, step: &Step, out: &mut dyn Write) -> io::Result<()> {
        let Some((_, outcome)) = &step.finished else { return Ok(()) };
        let time = seconds(step.duration(SystemTime::now()));
        let (text, style) = match outcome {
            Outcome::Done => (step.name.clone(), &self.blue),
            Outcome::Cached => (format!("CACHED {}", step.name), &self.blue),
            Outcome::Failed { .. } => (format!("ERROR {}", step.name), &self.red),
            Outcome::Cancelled => (format!("CANCELED {}", step.name), &self.dim),
        };
        writeln!(out, "{}", style.apply_to(self.line(&text, &time)))?;
        if let Some(reason) = step.missed.as_ref().filter(|_| *outcome == Outcome::Done) {
            let line = format!(" => => miss: {reason}");
            writeln!(out, "{}", self.dim.apply_to(truncate_str(&line, self.width() - 1, "…")))?;
        }
        self.settled[index] = true;
        Ok(())
    }

    fn live(&mut self, steps: &Steps, out: &mut dyn Write) -> io::Result<()> {
        let now = SystemTime::now();
        let finished = steps.order.iter().filter(|step| step.finished.is_some()).count();
        let mut lines =
            vec![format!("[+] Building {} ({finished}/{})", seconds(self.started.elapsed()), steps.order.len())];
        let running: Vec<&Step> = steps.order.iter().filter(|step| step.finished.is_none()).collect();
        let height = usize::from(self.term.size().0).saturating_sub(2).max(4);
        for (position, step) in running.iter().enumerate() {
            lines.push(self.line(&step.name, &seconds(step.duration(now))));
            if position >= STEPS_WITH_OUTPUT {
                continue;
            }
            for (what, current, total) in
                step.progress.iter().filter(|(_, current, total)| current < total || *total == 0).take(4)
            {
                let text = format!(" => => {what} {} / {}", human_bytes(*current), human_bytes(*total));
                lines.push(self.dim.apply_to(truncate_str(&text, self.width() - 1, "…")).to_string());
            }
            for text in &step.tail {
                let text = format!(" => => # {text}");
                lines.push(self.dim.apply_to(truncate_str(&text, self.width() - 1, "…")).to_string());
            }
        }
        lines.truncate(height);
        for line in &lines {
            writeln!(out, "{line}")?;
        }
        self.drawn = lines.len();
        out.flush()
    }

    fn redraw(&mut self, steps: &Steps, out: &mut dyn Write) -> io::Result<()> {
        self.clear(out)?;
        self.settled.resize(steps.order.len(), false);
        for (index, step) in steps.order.iter().enumerate() {
            if !self.settled[index] && step.finished.is_some() {
                self.settle(index, step, out)?;
            }
        }
        self.live(steps, out)
    }
}

impl View for Tty {
    fn event(&mut self, event: &Event, steps: &Steps, out: &mut dyn Write) -> io::Result<()> {
        match &event.kind {
            EventKind::Warning { message } => {
                self.clear(out)?;
                writeln!(out, "warning: {message}")?;
                self.live(steps, out)
            }
            // Everything else is drawn with the next frame.
            _ => Ok(()),
        }
    }

    fn tick(&mut self, steps: &Steps, out: &mut dyn Write) -> io::Result<()> {
        self.redraw(steps, out)
    }

    fn end(&mut self, steps: &Steps, out: &mut dyn Write) -> io::Result<()> {
        self.redraw(steps, out)?;
        self.clear(out)?;
        let finished = steps.order.iter().filter(|step| step.finished.is_some()).count();
        writeln!(out, "[+] Built {finished} steps in {}", seconds(self.started.elapsed()))
    }
}
