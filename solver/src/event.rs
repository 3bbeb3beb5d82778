//! What a build tells while it runs.
//!
//! Workers send, one task owns the screen. An [`Event`] names the step it belongs to, so no handle is
//! threaded through calls and no order is assumed beyond: `Started` first, `Finished` last.

use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::graph::Location;

/// A line of the progress display: a node of the graph, or work beside it such as a pull, an export or a push.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct StepId(pub Arc<str>);

impl StepId {
    pub fn new(name: impl AsRef<str>) -> StepId {
        StepId(name.as_ref().into())
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Event {
    pub step: StepId,
    #[serde(skip)]
    pub time: SystemTime,
    #[serde(flatten)]
    pub kind: EventKind,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum EventKind {
    Started {
        name: String,
        location: Option<Location>,
    },
    /// A lookup said no, and this is why.
    Missed {
        reason: String,
    },
    /// Bytes of a step's own output, whole and in order per stream.
    Output {
        stream: Stream,
        #[serde(serialize_with = "lossy")]
        data: Vec<u8>,
    },
    /// How far a long operation is; `what` names it (`sha256:ab12… 3.1 MB`), total 0 where unknown.
    Progress {
        what: String,
        current_bytes: u64,
        total_bytes: u64,
    },
    Warning {
        message: String,
    },
    Finished {
        outcome: Outcome,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    Stdout,
    Stderr,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done,
    Cached,
    Failed { message: String },
    Cancelled,
}

fn lossy<S: serde::Serializer>(data: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&String::from_utf8_lossy(data))
}

/// Where events go. Cheap to clone; sending never blocks and never fails (nobody may be listening).
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(Event) + Send + Sync>);

impl Events {
    pub fn new(sink: impl Fn(Event) + Send + Sync + 'static) -> Events {
        Events(Arc::new(sink))
    }

    pub fn nowhere() -> Events {
        Events::new(|_| ())
    }

    pub fn send(&self, step: &StepId, kind: EventKind) {
        (self.0)(Event { step: step.clone(), time: SystemTime::now(), kind });
    }

    /// Passes an event on as it is.
    pub fn forward(&self, event: Event) {
        (self.0)(event);
    }

    /// Runs `work` as a step of its own: `Started` before, `Finished` after, whatever it returns.
    pub async fn step<T, E: std::fmt::Display>(
        &self,
        step: &StepId,
        name: impl Into<String>,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        self.send(step, EventKind::Started { name: name.into(), location: None });
        let result = work.await;
        let outcome = match &result {
            Ok(_) => Outcome::Done,
            Err(error) => Outcome::Failed { message: error.to_string() },
        };
        self.send(step, EventKind::Finished { outcome });
        result
    }
}
