//! A directory in overlay form, as the tar of an OCI layer.

use std::io::{self, Read, Write};
use std::path::Path;

use rustix::fs;

use super::changes::{self, Change, Kind};
use super::header::{BLOCK, Header};
use super::{DiffOptions, DiffSummary, OPAQUE, WHITEOUT, refuse};
use crate::{Context, Digest, Digester, Result, walk};

/// Writes what `changes` holds as a layer tar. The same tree gives the same bytes on every machine; `changes`
/// itself has no entry, as in the layers of other builders.
pub fn diff(changes: &Path, options: &DiffOptions, out: &mut dyn Write) -> Result<DiffSummary> {
    let mut writer = Writer {
        root: changes,
        out,
        clamp: options.clamp_mtime,
        summary: DiffSummary::default(),
        buffer: vec![0; 256 * 1024],
    };
    changes::read(changes, options.driver, |change| writer.entry(change))?;
    writer.emit(&[0; 2 * BLOCK])?;
    writer.out.flush().context("write the layer of", changes)?;
    Ok(writer.summary)
}

/// The digest of the tar alone.
pub fn diff_id(changes: &Path, options: &DiffOptions) -> Result<(Digest, DiffSummary)> {
    let mut digester = Digester::new();
    let summary = diff(changes, options, &mut digester)?;
    Ok((digester.finish(), summary))
}

struct Writer<'a> {
    root: &'a Path,
    out: &'a mut dyn Write,
    clamp: Option<i64>,
    summary: DiffSummary,
    buffer: Vec<u8>,
}

impl Writer<'_> {
    fn entry(&mut self, change: Change) -> Result<()> {
        if let Some((name, _)) = change.xattrs.iter().find(|(name, _)| name.contains(&b'=')) {
            let name = name.escape_ascii();
            return Err(refuse(
                change.path,
                format!("extended attribute {name} has a \"=\" in its name, which archives cannot hold"),
            ));
        }
        let stat = change.stat;
        let device = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
        let mut header = Header {
            path: change.path,
            kind: b'0',
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: 0,
            mtime: self.clamped((stat.st_mtime, stat.st_mtime_nsec as u32)),
            link: b"",
            device: (0, 0),
            xattrs: &change.xattrs,
        };
        match change.kind {
            Kind::Whiteout => {
                let (directory, name) = split(change.path);
                return self.marker(&[directory, WHITEOUT, name].concat());
            }
            Kind::Directory { opaque } => {
                let path = [change.path, b"/"].concat();
                self.header(&Header { path: &path, kind: b'5', ..header })?;
                return if opaque { self.marker(&[&path, OPAQUE].concat()) } else { Ok(()) };
            }
            Kind::File(file) => {
                header.size = stat.st_size as u64;
                self.header(&header)?;
                return self.content(change.path, file, header.size);
            }
            Kind::Socket => {
                self.summary.skipped_sockets.push(walk::as_path(change.path).to_owned());
                return Ok(());
            }
            Kind::HardLink(first) => self.header(&Header { kind: b'1', link: &first, ..header })?,
            Kind::Symlink(target) => self.header(&Header { kind: b'2', link: &target, ..header })?,
            Kind::CharacterDevice => self.header(&Header { kind: b'3', device, ..header })?,
            Kind::BlockDevice => self.header(&Header { kind: b'4', device, ..header })?,
            Kind::Fifo => self.header(&Header { kind: b'6', ..header })?,
        }
        Ok(())
    }

    /// An empty file that says something about a name. Its owner, mode and time say nothing: they are constant.
    fn marker(&mut self, path: &[u8]) -> Result<()> {
        self.header(&Header {
            path,
            kind: b'0',
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: (0, 0),
            link: b"",
            device: (0, 0),
            xattrs: &[],
        })
    }

    fn clamped(&self, mtime: (i64, u32)) -> (i64, u32) {
        match self.clamp {
            Some(epoch) => mtime.min((epoch, 0)),
            None => mtime,
        }
    }

    fn header(&mut self, header: &Header) -> Result<()> {
        self.summary.entries += 1;
        self.emit(&header.encode())
    }

    /// Exactly `size` bytes, for the header has promised them, and padding.
    fn content(&mut self, path: &[u8], mut file: std::fs::File, size: u64) -> Result<()> {
        let mut left = size;
        while left > 0 {
            let most = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = match file.read(&mut self.buffer[..most]) {
                Ok(0) => {
                    return Err(refuse(path, format!("shrank while it was read, {left} of {size} bytes are missing")));
                }
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                error => error.context("read", &self.root.join(walk::as_path(path)))?,
            };
            self.out.write_all(&self.buffer[..read]).context("write the layer of", self.root)?;
            left -= read as u64;
        }
        self.summary.bytes += size;
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        self.emit(&[0; BLOCK][..padding as usize])
    }

    fn emit(&mut self, bytes: &[u8]) -> Result<()> {
        self.summary.bytes += bytes.len() as u64;
        self.out.write_all(bytes).context("write the layer of", self.root)
    }
}

/// The directory, with its slash, and the name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    path.split_at(at)
}
