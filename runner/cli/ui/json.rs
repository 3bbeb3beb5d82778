//! BuildKit's `SolveStatus` as JSON lines, for programs that read `buildx --progress=rawjson`.

use std::io::{self, Write};
use std::time::SystemTime;

use base64::Engine as _;
use forge_snapshotter::Digest;
use forge_solver::event::{Event, EventKind, Outcome, Stream};
use serde_json::{Value, json};

use super::{Step, Steps, View};

pub struct RawJson;

impl View for RawJson {
    fn event(&mut self, event: &Event, steps: &Steps, out: &mut dyn Write) -> io::Result<()> {
        let Some((_, step)) = steps.get(&event.step) else { return Ok(()) };
        // A vertex is named by a digest; ours may be words.
        let vertex = Digest::of(event.step.0.as_bytes()).to_string();
        let status = match &event.kind {
            EventKind::Started { .. } | EventKind::Finished { .. } => json!({ "vertexes": [describe(&vertex, step)] }),
            EventKind::Output { stream, data } => json!({ "logs": [{
                "vertex": vertex,
                "stream": match stream { Stream::Stdout => 1, Stream::Stderr => 2 },
                "data": base64::engine::general_purpose::STANDARD.encode(data),
                "timestamp": time(event.time),
            }] }),
            EventKind::Progress { what, current_bytes, total_bytes } => json!({ "statuses": [{
                "id": what, "vertex": vertex, "name": what, "current": current_bytes, "total": total_bytes,
                "timestamp": time(event.time),
            }] }),
            EventKind::Missed { reason } => json!({ "statuses": [{
                "id": format!("miss: {reason}"), "vertex": vertex, "current": 0, "timestamp": time(event.time),
            }] }),
            EventKind::Warning { message } => json!({ "warnings": [{
                "vertex": vertex, "level": 1, "short": base64::engine::general_purpose::STANDARD.encode(message),
            }] }),
        };
        writeln!(out, "{status}")
    }
}

fn describe(vertex: &str, step: &Step) -> Value {
    let mut value = json!({ "digest": vertex, "name": step.name, "started": time(step.started) });
    if let Some((end, outcome)) = &step.finished {
        value["completed"] = json!(time(*end));
        match outcome {
            Outcome::Cached => value["cached"] = json!(true),
            Outcome::Failed { message } => value["error"] = json!(message),
            Outcome::Cancelled => value["error"] = json!("context canceled"),
            Outcome::Done => {}
        }
    }
    value
}

fn time(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}
