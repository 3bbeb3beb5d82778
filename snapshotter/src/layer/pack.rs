//! A layer as a blob, in one pass.
//!
//! ```text
//!   tree -> tar -+-> diff id
//!                +-> blocks of 1 MiB -> compressors (rayon) -> in order -+-> blob digest
//!                                                                        +-> out
//! ```
//! The compressed bytes depend on the tar, the compression and its level, and on nothing else. A gzip blob is
//! a row of members (RFC 1952, 2.2), one for each block, which every gzip reader takes as one stream; blocks
//! are cut at fixed places and compressed whole, so neither threads nor the size of writes can be seen in
//! them. zstd cuts its jobs by itself, at places that depend on the level alone once it has a worker.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, TryRecvError};

use libdeflater::{CompressionLvl, Compressor};

use super::{Compression, DiffOptions, Packed, diff};
use crate::{Context, Digester, Error, Result};

/// What one gzip member holds. Part of the format: another value gives other blobs for the same layers.
const GZIP_BLOCK: usize = 1 << 20;
/// Blocks being compressed or waiting for their turn: what bounds the memory.
const MAX_IN_FLIGHT: usize = 16;
/// More do not pay: each takes its window, and layers are packed side by side.
const MAX_ZSTD_WORKERS: u32 = 4;

/// Writes the layer of `changes` to `out`, compressed, and gives both its digests.
pub fn pack(changes: &Path, options: &DiffOptions, compression: Compression, out: impl Write) -> Result<Packed> {
    let mut blob = Counted { out, digester: Digester::new() };
    let failed = |result: io::Result<()>| result.context("write the blob of", changes);
    let mut encoder = Encoder::new(&mut blob, compression).context("compress", changes)?;
    let mut tee = Tee { tar: Digester::new(), encoder: &mut encoder };
    let summary = diff::diff(changes, options, &mut tee)?;
    let tar = tee.tar;
    failed(encoder.finish())?;
    failed(blob.out.flush())?;
    let size_bytes = blob.digester.size();
    Ok(Packed {
        uncompressed_bytes: tar.size(),
        diff_id: tar.finish(),
        blob: blob.digester.finish(),
        size_bytes,
        entries: summary.entries,
        skipped_sockets: summary.skipped_sockets,
    })
}

/// Compresses a tar that exists already, byte for byte. Its entries are not looked at, or counted.
pub fn compress(tar: &mut dyn io::Read, compression: Compression, out: impl Write) -> Result<Packed> {
    let failed = |error: io::Error| Error::Archive { reason: format!("cannot be compressed: {error}") };
    let mut blob = Counted { out, digester: Digester::new() };
    let mut encoder = Encoder::new(&mut blob, compression).map_err(failed)?;
    let mut tee = Tee { tar: Digester::new(), encoder: &mut encoder };
    io::copy(tar, &mut tee).map_err(failed)?;
    let tar = tee.tar;
    encoder.finish().and_then(|()| blob.out.flush()).map_err(failed)?;
    let size_bytes = blob.digester.size();
    Ok(Packed {
        uncompressed_bytes: tar.size(),
        diff_id: tar.finish(),
        blob: blob.digester.finish(),
        size_bytes,
        entries: 0,
        skipped_sockets: Vec::new(),
    })
}

/// Digests what passes.
struct Counted<W> {
    out: W,
    digester: Digester,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.digester.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Gives the tar to its digest and to the compressor.
struct Tee<'a, 'b, W: Write> {
    tar: Digester,
    encoder: &'a mut Encoder<'b, W>,
}

impl<W: Write> Write for Tee<'_, '_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tar.update(bytes);
        self.encoder.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Encoder<'a, W: Write> {
    None(&'a mut W),
    Gzip(Members<'a, W>),
    Zstd(zstd::Encoder<'static, &'a mut W>),
}

impl<'a, W: Write> Encoder<'a, W> {
    fn new(out: &'a mut W, compression: Compression) -> io::Result<Encoder<'a, W>> {
        Ok(match compression {
            Compression::None => Encoder::None(out),
            Compression::Gzip(level) => {
                let known = Some(level).filter(|level| *level > 0).and_then(|level| CompressionLvl::new(level).ok());
                let level = known.ok_or_else(|| invalid(format!("gzip has levels 1 to 12, not {level}")))?;
                Encoder::Gzip(Members { out, level, block: Vec::with_capacity(GZIP_BLOCK), in_flight: VecDeque::new() })
            }
            Compression::Zstd(level) => {
                if !(1..=22).contains(&level) {
                    return Err(invalid(format!("zstd has levels 1 to 22, not {level}")));
                }
                let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
                Encoder::Zstd(zstd_encoder(out, level, cores.min(MAX_ZSTD_WORKERS))?)
            }
        })
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Encoder::None(_) => Ok(()),
            Encoder::Gzip(members) => members.finish(),
            Encoder::Zstd(encoder) => encoder.finish().map(drop),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Encoder::None(out) => out.write_all(bytes),
            Encoder::Gzip(members) => members.write_all(bytes),
            Encoder::Zstd(encoder) => encoder.write_all(bytes),
        }
    }
}

/// Never without a worker: the library would cut its jobs elsewhere and give other bytes.
fn zstd_encoder<W: Write>(out: W, level: i32, workers: u32) -> io::Result<zstd::Encoder<'static, W>> {
    let mut encoder = zstd::Encoder::new(out, level)?;
    encoder.multithread(workers.max(1))?;
    encoder.include_checksum(true)?;
    Ok(encoder)
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

/// gzip, a member for each block, compressed by the thread pool and written in order.
struct Members<'a, W: Write> {
    out: &'a mut W,
    level: CompressionLvl,
    block: Vec<u8>,
    in_flight: VecDeque<Receiver<Vec<u8>>>,
}

impl<W: Write> Members<'_, W> {
    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(GZIP_BLOCK - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = rest;
            if self.block.len() == GZIP_BLOCK {
                self.send()?;
            }
        }
        Ok(())
    }

    /// Hands the block to the pool; first writes what is done, and waits where too much is not.
    fn send(&mut self) -> io::Result<()> {
        while self.in_flight.len() >= MAX_IN_FLIGHT {
            self.write_first()?;
        }
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(GZIP_BLOCK));
        let (sender, receiver) = mpsc::sync_channel(1);
        let level = self.level;
        rayon::spawn(move || {
            // The receiver is gone only where packing failed meanwhile; nobody wants the member then.
            sender.send(member(&block, level)).ok();
        });
        self.in_flight.push_back(receiver);
        Ok(())
    }

    fn write_first(&mut self) -> io::Result<()> {
        let Some(receiver) = self.in_flight.pop_front() else { return Ok(()) };
        let member = receive(&receiver).filter(|member| !member.is_empty());
        self.out.write_all(&member.ok_or_else(|| io::Error::other("a compressor thread failed"))?)
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.block.is_empty() {
            self.send()?;
        }
        while !self.in_flight.is_empty() {
            self.write_first()?;
        }
        Ok(())
    }
}

/// Waits for a member. A thread of the pool itself must not sleep while work is queued that may be what it
/// waits for: it does that work instead.
fn receive(receiver: &Receiver<Vec<u8>>) -> Option<Vec<u8>> {
    loop {
        match receiver.try_recv() {
            Ok(member) => return Some(member),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => {}
        }
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => {}
            Some(rayon::Yield::Idle) | None => return receiver.recv().ok(),
        }
    }
}

/// One gzip member, empty where the compressor fails (its buffer is as large as it asks for, so it cannot).
fn member(block: &[u8], level: CompressionLvl) -> Vec<u8> {
    let mut compressor = Compressor::new(level);
    let mut member = vec![0; compressor.gzip_compress_bound(block.len())];
    let length = compressor.gzip_compress(block, &mut member).unwrap_or(0);
    member.truncate(length);
    member
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;

    #[test]
    fn workers_and_writes_cannot_be_seen_in_zstd() {
        let data: Vec<u8> = (0..12_000_000u32).map(|i| (i.wrapping_mul(i) >> 19) as u8).collect();
        let blob = |workers, write| {
            let mut encoder = zstd_encoder(Vec::new(), 3, workers).unwrap();
            data.chunks(write).for_each(|chunk| encoder.write_all(chunk).unwrap());
            Digest::of(encoder.finish().unwrap())
        };
        let expect = blob(1, 1 << 20);
        for (workers, write) in [(0, 1 << 20), (2, 1 << 20), (4, 77_777), (8, 12_000_000), (1, 513)] {
            assert_eq!(blob(workers, write), expect, "{workers} workers, writes of {write}");
        }
    }

    #[test]
    fn writes_cannot_be_seen_in_gzip() {
        let data: Vec<u8> = (0..3_500_000u32).map(|i| (i.wrapping_mul(i) >> 19) as u8).collect();
        let blob = |write| {
            let mut out = Vec::new();
            let mut encoder = Encoder::new(&mut out, Compression::GZIP).unwrap();
            data.chunks(write).for_each(|chunk| encoder.write_all(chunk).unwrap());
            encoder.finish().unwrap();
            Digest::of(out)
        };
        let expect = blob(GZIP_BLOCK);
        for write in [513, 77_777, GZIP_BLOCK + 1, data.len()] {
            assert_eq!(blob(write), expect, "writes of {write}");
        }
    }
}
