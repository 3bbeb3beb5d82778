//! What a failure looks like and which exit code it gives.
//!
//! 0; 1 the build or a command failed; 2 wrong usage; 125, 126 and 127 as docker for `forge run` (forge failed, the program
//! cannot be executed, there is no such program); a program's own code otherwise; 130 after Ctrl-C.

use std::fmt::Display;
use std::io;
use std::process::ExitCode;

pub type Result<T = (), E = Failure> = std::result::Result<T, E>;

#[derive(Debug)]
pub enum Failure {
    /// Told to the user, with a hint where there is one.
    Told { message: String, hint: Option<String>, code: u8 },
    /// Already on the screen.
    Shown(u8),
}

impl Failure {
    pub fn new(message: impl Display) -> Failure {
        Failure::Told { message: message.to_string(), hint: None, code: 1 }
    }

    pub fn usage(message: impl Display) -> Failure {
        Failure::Told { message: message.to_string(), hint: None, code: 2 }
    }

    pub fn hint(self, text: impl Display) -> Failure {
        match self {
            Failure::Told { message, code, .. } => Failure::Told { message, hint: Some(text.to_string()), code },
            shown => shown,
        }
    }

    pub fn code(self, code: u8) -> Failure {
        match self {
            Failure::Told { message, hint, .. } => Failure::Told { message, hint, code },
            Failure::Shown(_) => Failure::Shown(code),
        }
    }

    pub fn from_error(error: &(dyn std::error::Error + 'static)) -> Failure {
        let failure = Failure::new(chain(error));
        match find_io(error).and_then(way_out) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }

    /// Says it on stderr.
    pub fn report(self) -> ExitCode {
        match self {
            Failure::Shown(code) => ExitCode::from(code),
            Failure::Told { message, hint, code } => {
                let red = console::Style::new().for_stderr().red().bold();
                super::say(format_args!("{} {message}", red.apply_to("error:")));
                if let Some(hint) = hint {
                    super::say(format_args!("  help: {hint}"));
                }
                ExitCode::from(code)
            }
        }
    }
}

/// Every error of the crates below becomes a failure with its whole chain of causes, and the way out where there is one.
impl<E: std::error::Error + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::from_error(&error)
    }
}

/// `a: b: c`, leaving out a cause that its parent already spelled.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

fn find_io<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io);
        }
        current = error.source();
    }
    None
}

fn way_out(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::StorageFull => Some("the disk is full: `forge prune` frees what no image uses"),
        io::ErrorKind::QuotaExceeded => Some("the disk quota is used up: `forge prune` frees what no image uses"),
        io::ErrorKind::ReadOnlyFilesystem => Some("FORGE_ROOT names another state directory"),
        _ => None,
    }
}

/// Adds what was being done.
pub trait Doing<T> {
    fn doing(self, what: impl Display) -> Result<T>;
}

impl<T, E: Into<Failure>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T> {
        self.map_err(|error| match error.into() {
            Failure::Told { message, hint, code } => {
                Failure::Told { message: format!("failed to {what}: {message}"), hint, code }
            }
            shown => shown,
        })
    }
}
