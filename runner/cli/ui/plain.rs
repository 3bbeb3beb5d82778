//! Lines that only ever append: for logs, pipes and CI.
//!
//! `#3 [build 2/5] RUN make` opens a step, `#3 0.412 text` is its output with the seconds since its start,
//! `#3 DONE 1.2s`, `#3 CACHED` or `#3 ERROR: …` closes it.

use std::collections::HashMap;
use std::io::{self, Write};

use forge_solver::event::{Event, EventKind, Outcome, StepId};

use super::{Steps, View, human_bytes, seconds};

#[derive(Default)]
pub struct Plain {
    /// Output that has no newline yet.
    partial: HashMap<StepId, Vec<u8>>,
}

impl View for Plain {
    fn event(&mut self, event: &Event, steps: &Steps, out: &mut dyn Write) -> io::Result<()> {
        let Some((index, step)) = steps.get(&event.step) else {
            return match &event.kind {
                EventKind::Warning { message } => writeln!(out, "warning: {message}"),
                _ => Ok(()),
            };
        };
        let number = index + 1;
        match &event.kind {
            EventKind::Started { name, .. } => writeln!(out, "#{number} {name}"),
            EventKind::Missed { reason } => writeln!(out, "#{number} miss: {reason}"),
            EventKind::Warning { message } => writeln!(out, "#{number} warning: {message}"),
            EventKind::Output { data, .. } => {
                let since = event.time.duration_since(step.started).unwrap_or_default().as_secs_f64();
                self.output(&event.step, data, &format!("#{number} {since:.3} "), out)
            }
            EventKind::Progress { what, current_bytes, total_bytes } if current_bytes == total_bytes => {
                writeln!(out, "#{number} {what} {} done", human_bytes(*total_bytes))
            }
            EventKind::Progress { .. } => Ok(()),
            EventKind::Finished { outcome } => {
                self.flush(&event.step, &format!("#{number} "), out)?;
                match outcome {
                    Outcome::Done => writeln!(out, "#{number} DONE {}", seconds(step.duration(event.time))),
                    Outcome::Cached => writeln!(out, "#{number} CACHED"),
                    Outcome::Failed { message } => writeln!(out, "#{number} ERROR: {message}"),
                    Outcome::Cancelled => writeln!(out, "#{number} CANCELED"),
                }
            }
        }
    }
}

impl Plain {
    fn output(&mut self, step: &StepId, data: &[u8], prefix: &str, out: &mut dyn Write) -> io::Result<()> {
        let partial = self.partial.entry(step.clone()).or_default();
        partial.extend_from_slice(data);
        while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
            out.write_all(prefix.as_bytes())?;
            out.write_all(&partial[..=end])?;
            partial.drain(..=end);
        }
        // A line without an end must not fill the memory.
        if partial.len() > 64 * 1024 {
            self.flush(step, prefix, out)?;
        }
        Ok(())
    }

    fn flush(&mut self, step: &StepId, prefix: &str, out: &mut dyn Write) -> io::Result<()> {
        match self.partial.remove(step) {
            Some(rest) if !rest.is_empty() => {
                out.write_all(prefix.as_bytes())?;
                out.write_all(&rest)?;
                out.write_all(b"\n")
            }
            _ => Ok(()),
        }
    }
}
