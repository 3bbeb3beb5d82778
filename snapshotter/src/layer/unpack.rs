//! A blob as files, in one pass: decoding and hashing run ahead of writing, by a few blocks.

use std::io::{self, Read};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;

use super::{ApplyOptions, ApplySummary, apply, codec};
use crate::{Digest, Digester, Error, Result};

const BLOCK: usize = 256 * 1024;
/// Blocks decoded ahead.
const AHEAD: usize = 8;

/// Unpacks a layer's blob into `into`, which must be thrown away after an error. The blob is read to its end
/// whatever follows the archive in it, so a reader that verifies its digest has seen all of it.
pub fn unpack(
    blob: impl Read + Send,
    expected_diff_id: &Digest,
    into: &Path,
    options: &ApplyOptions,
) -> Result<ApplySummary> {
    let (sender, receiver) = mpsc::sync_channel(AHEAD);
    let decoded = thread::scope(|scope| {
        let decoding = scope.spawn(|| decode(blob, options.max_bytes, sender));
        let mut blocks = Blocks { receiver, block: Vec::new(), used: 0 };
        let applied = apply(&mut blocks, into, options);
        let drained = applied.and_then(|summary| blocks.drain().map(|()| summary));
        // Without a receiver the decoder has nothing left to do.
        drop(blocks);
        let found = decoding.join().map_err(|_| Error::Archive { reason: "cannot be read: the decoder failed".into() });
        drained.and_then(|summary| Ok((summary, found?)))
    });
    let (summary, found) = decoded?;
    match found {
        Some(found) if found == *expected_diff_id => Ok(summary),
        Some(found) => Err(Error::DiffId { expected: expected_diff_id.clone(), found }),
        None => Err(Error::Archive { reason: "cannot be read: the decoder stopped early".into() }),
    }
}

/// Decodes to the end and gives the digest of it all; `None` if an error was sent, or nobody listens.
fn decode(blob: impl Read + Send, max_bytes: Option<u64>, sender: SyncSender<io::Result<Vec<u8>>>) -> Option<Digest> {
    let mut digester = Digester::new();
    let mut decoder = match codec::decoder(blob) {
        Ok(decoder) => decoder,
        Err(error) => {
            sender.send(Err(io::Error::other(error))).ok();
            return None;
        }
    };
    loop {
        let mut block = Vec::with_capacity(BLOCK);
        match decoder.by_ref().take(BLOCK as u64).read_to_end(&mut block) {
            Ok(0) => return Some(digester.finish()),
            Ok(_) => {
                digester.update(&block);
                if max_bytes.is_some_and(|max| digester.size() > max) {
                    sender.send(Err(io::Error::other("it is larger than is allowed"))).ok();
                    return None;
                }
                sender.send(Ok(block)).ok()?;
            }
            Err(error) => {
                sender.send(Err(error)).ok();
                return None;
            }
        }
    }
}

/// Reads what the decoder sends.
struct Blocks {
    receiver: Receiver<io::Result<Vec<u8>>>,
    block: Vec<u8>,
    used: usize,
}

impl Blocks {
    /// What comes after the archive's end belongs to the diff id, too.
    fn drain(&mut self) -> Result<()> {
        self.receiver.iter().try_for_each(|block| match block {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::Archive { reason: format!("cannot be read: {error}") }),
        })
    }
}

impl Read for Blocks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.used == self.block.len() {
            match self.receiver.recv() {
                Ok(block) => (self.block, self.used) = (block?, 0),
                Err(_) => return Ok(0),
            }
        }
        let length = buffer.len().min(self.block.len() - self.used);
        buffer[..length].copy_from_slice(&self.block[self.used..self.used + length]);
        self.used += length;
        Ok(length)
    }
}
