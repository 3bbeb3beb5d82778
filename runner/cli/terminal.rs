//! The user's terminal, lent to a container: raw while the program runs, itself again afterwards, the same size all along.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::OwnedFd;

use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};
use tokio::task::JoinHandle;

use super::error::Doing;
use super::{Failure, Result};
use crate::container::Stdio;

/// What the container's terminal starts as.
pub struct Terminal {
    rows: u16,
    columns: u16,
}

impl Terminal {
    pub fn new() -> Terminal {
        match tcgetwinsize(std::io::stdout()) {
            Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Terminal { rows: size.ws_row, columns: size.ws_col },
            _ => Terminal { rows: 24, columns: 80 },
        }
    }

    pub fn stdio(&self) -> Stdio {
        Stdio::Terminal { rows: self.rows, columns: self.columns }
    }

    /// Joins the user's terminal with the container's.
    pub fn attach(self, master: OwnedFd, interactive: bool) -> Result<Attached> {
        let raw = if interactive && std::io::stdin().is_terminal() { Some(Raw::enter()?) } else { None };
        let copy = || master.try_clone().map(File::from).doing("keep the terminal");
        let resize = tokio::spawn(resize(master.try_clone().doing("keep the terminal")?));
        let input = if interactive { Some(forward_input(copy()?)) } else { None };
        let output = forward_output(copy()?);
        Ok(Attached { output, resize, input, _raw: raw })
    }
}

pub struct Attached {
    output: JoinHandle<()>,
    resize: JoinHandle<()>,
    input: Option<JoinHandle<()>>,
    /// Restores the terminal.
    _raw: Option<Raw>,
}

impl Attached {
    /// Shows what the program wrote last, then gives the terminal back.
    pub async fn finish(self) {
        self.output.await.unwrap_or_default();
        self.resize.abort();
        if let Some(input) = self.input {
            input.abort();
        }
    }
}

/// Until the other side is closed, which a pty tells by EIO.
fn forward_output(mut master: File) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let mut block = vec![0; 16 * 1024];
        let mut stdout = std::io::stdout();
        while let Ok(read @ 1..) = master.read(&mut block) {
            if stdout.write_all(&block[..read]).and_then(|()| stdout.flush()).is_err() {
                return;
            }
        }
    })
}

/// Until stdin ends, which the program sees as Ctrl-D. Nobody waits for this thread: a read of stdin cannot be called off.
fn forward_input(mut master: File) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let mut block = vec![0; 4096];
        let mut stdin = std::io::stdin().lock();
        loop {
            match stdin.read(&mut block) {
                Ok(0) => return master.write_all(b"\x04").unwrap_or_default(),
                Ok(read) if master.write_all(&block[..read]).is_ok() => {}
                // Either side is gone.
                _ => return,
            }
        }
    })
}

/// Follows the size of the user's window.
async fn resize(master: OwnedFd) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut changed) = signal(SignalKind::window_change()) else { return };
    while changed.recv().await.is_some() {
        let size: Result<Winsize, _> = tcgetwinsize(std::io::stdout());
        if size.and_then(|size| tcsetwinsize(&master, size)).is_err() {
            return;
        }
    }
}

/// Raw mode; left on drop.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Raw> {
        let before = tcgetattr(std::io::stdin())
            .map_err(|error| Failure::new(format!("failed to read the terminal's mode: {error}")))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)
            .map_err(|error| Failure::new(format!("failed to make the terminal raw: {error}")))?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal is gone where this fails: nothing is left to restore.
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &self.0).unwrap_or_default();
    }
}
