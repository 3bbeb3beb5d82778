//! What a set of changes holds, as one digest: the identity of a step's result.
//!
//! Names, types, modes, owners, attributes, hard links, device numbers and bytes count. Times do not, so a
//! step that writes what it wrote before gives the digest of before. Contents are hashed in parallel, a
//! batch at a time; the digest is of the entries in walk order and knows nothing of batches and threads.

use std::fs::File;
use std::path::Path;

use rayon::prelude::*;
use rustix::fs;

use super::changes::{self, Change, Kind};
use super::refuse;
use crate::{Context, Digest, Digester, Driver, Result, walk};

/// Files open at once, waiting to be hashed.
const BATCH_FILES: usize = 64;
/// Fewer bytes than this in a batch are hashed here: waking other threads would cost more.
const WORTH_SHARING: u64 = 512 * 1024;

/// The content digest of a directory in overlay form, its number of entries and the bytes in its files.
pub fn content_digest(changes: &Path, driver: Driver) -> Result<(Digest, u64, u64)> {
    let mut batch = Batch {
        root: changes,
        digester: Digester::new(),
        pending: Vec::new(),
        files: 0,
        file_bytes: 0,
        entries: 0,
        bytes: 0,
    };
    batch.digester.field(b"forge layer content v1");
    changes::read(changes, driver, |change| batch.push(change))?;
    batch.settle()?;
    Ok((batch.digester.finish(), batch.entries, batch.bytes))
}

struct Batch<'a> {
    root: &'a Path,
    digester: Digester,
    /// Each entry's facts and, where it is a file with content, the file.
    pending: Vec<(Vec<u8>, Option<Content>)>,
    files: usize,
    file_bytes: u64,
    entries: u64,
    bytes: u64,
}

struct Content {
    path: Vec<u8>,
    file: File,
    size: u64,
}

impl Batch<'_> {
    fn push(&mut self, change: Change) -> Result<()> {
        let facts = facts(&change);
        let mut content = None;
        match change.kind {
            // Never part of a layer.
            Kind::Socket => return Ok(()),
            Kind::File(file) if change.stat.st_size > 0 => {
                let size = change.stat.st_size as u64;
                content = Some(Content { path: change.path.to_vec(), file, size });
                self.files += 1;
                self.file_bytes += size;
            }
            _ => {}
        }
        self.pending.push((facts, content));
        self.entries += 1;
        if self.files == BATCH_FILES || self.pending.len() == 64 * BATCH_FILES { self.settle() } else { Ok(()) }
    }

    /// Hashes what is pending and adds it, in order.
    fn settle(&mut self) -> Result<()> {
        let root = self.root;
        let hash = |content: &mut Option<Content>| content.as_mut().map(|content| content.digest(root)).transpose();
        let contents: Vec<_> = if self.files > 1 && self.file_bytes >= WORTH_SHARING {
            self.pending.par_iter_mut().map(|(_, content)| hash(content)).collect::<Result<_>>()?
        } else {
            self.pending.iter_mut().map(|(_, content)| hash(content)).collect::<Result<_>>()?
        };
        for ((facts, _), content) in self.pending.drain(..).zip(contents) {
            self.digester.field(&facts);
            self.digester.field(content.as_ref().map_or(b"", |digest| digest.as_str().as_bytes()));
        }
        self.bytes += self.file_bytes;
        (self.files, self.file_bytes) = (0, 0);
        Ok(())
    }
}

impl Content {
    fn digest(&mut self, root: &Path) -> Result<Digest> {
        let mut digester = Digester::new();
        let path = || root.join(walk::as_path(&self.path));
        let mut buffer = vec![0; usize::try_from(self.size + 1).unwrap_or(usize::MAX).min(256 * 1024)];
        loop {
            match std::io::Read::read(&mut self.file, &mut buffer) {
                Ok(0) => break,
                Ok(read) => digester.update(&buffer[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                error => {
                    error.context("read", &path())?;
                }
            }
        }
        if digester.size() != self.size {
            return Err(refuse(&self.path, "changed while it was read"));
        }
        Ok(digester.finish())
    }
}

/// All of a change but its content, each field with its length or of fixed size.
fn facts(change: &Change) -> Vec<u8> {
    let stat = change.stat;
    let mut facts = Vec::with_capacity(64 + change.path.len());
    let mut field = |bytes: &[u8]| {
        facts.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        facts.extend_from_slice(bytes);
    };
    field(change.path);
    let (kind, detail): (&[u8], &[u8]) = match &change.kind {
        // A removal is the name alone: what stands for it has an owner and a mode by accident.
        Kind::Whiteout => {
            field(b"whiteout");
            return facts;
        }
        Kind::HardLink(first) => (b"link", first),
        Kind::Directory { opaque: false } => (b"directory", b""),
        Kind::Directory { opaque: true } => (b"directory", b"opaque"),
        Kind::File(_) => (b"file", b""),
        Kind::Symlink(target) => (b"symlink", target),
        Kind::CharacterDevice => (b"character device", b""),
        Kind::BlockDevice => (b"block device", b""),
        Kind::Fifo => (b"fifo", b""),
        Kind::Socket => (b"socket", b""),
    };
    field(kind);
    field(detail);
    let is_device = matches!(change.kind, Kind::CharacterDevice | Kind::BlockDevice);
    let (major, minor) = if is_device { (fs::major(stat.st_rdev), fs::minor(stat.st_rdev)) } else { (0, 0) };
    for number in [stat.st_mode & 0o7777, stat.st_uid, stat.st_gid, major, minor] {
        field(&number.to_le_bytes());
    }
    for (name, value) in &change.xattrs {
        field(name);
        field(value);
    }
    facts
}
