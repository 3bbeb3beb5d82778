//! Blobs: immutable files named by the digest of what they hold, `blobs/<algorithm>/<hex>`.
//!
//! A blob is visible only when it is whole, and writing one that exists already is no error. Nothing is synced
//! when it is written: until [`Store::settle`](crate::Store::settle), it carries the boot that wrote it in an
//! extended attribute, and one that a later boot finds so marked is hashed before it is believed.
//!
//! Who asks for a blob keeps it from GC for the rest of the session: its time of modification is the time of its
//! last use, and GC spares what is younger than the sessions that use blobs.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, XattrFlags};
use rustix::io::Errno;
use sha2::Digest as _;

use crate::session::{FileTime, Session, locked, modified};
use crate::{Context, Digest, Digester, Error, Result, create_directory};

/// Names the boot that wrote a blob which is not settled yet.
const BOOT_ATTRIBUTE: &str = "user.forge.boot";
const WRITE_BUFFER_BYTES: usize = 128 * 1024;

pub struct ContentStore {
    blobs: PathBuf,
    session: Arc<Session>,
    unsettled: Arc<Mutex<Vec<Digest>>>,
}

impl ContentStore {
    pub(crate) fn new(root: &Path, session: Arc<Session>) -> ContentStore {
        ContentStore { blobs: root.join("blobs"), session, unsettled: Arc::default() }
    }

    /// Its size where the store has it.
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        match self.open(digest) {
            Ok(file) => Ok(Some(file.metadata().context("look at", &self.path(digest))?.len())),
            Err(Error::UnknownBlob(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.algorithm()).join(digest.hex())
    }

    pub fn open(&self, digest: &Digest) -> Result<File> {
        let path = self.path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::UnknownBlob(digest.clone())),
            Err(error) => return Err(error).context("open", &path),
        };
        self.check_boot(digest, &path, &file)?;
        self.touch(digest, &path, &file)?;
        Ok(file)
    }

    /// The whole of a small blob, its digest checked.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let path = self.path(digest);
        let mut file = self.open(digest)?;
        let size = file.metadata().context("look at", &path)?.len();
        if size > limit {
            return Err(Error::TooLarge { digest: digest.clone(), size, limit });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        file.read_to_end(&mut bytes).context("read", &path)?;
        let found = digest_of(digest.algorithm(), bytes.as_slice()).context("read", &path)?;
        match found == *digest {
            true => Ok(bytes),
            false => Err(Error::Damaged { expected: digest.clone(), found }),
        }
    }

    pub fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if self.size(&digest)? == Some(bytes.len() as u64) {
            return Ok(digest);
        }
        let mut writer = self.writer()?;
        writer.write_all(bytes).context("write", &writer.path)?;
        Ok(writer.commit(Some(&digest))?.0)
    }

    pub fn writer(&self) -> Result<BlobWriter> {
        self.session.hold_blobs()?;
        let path = self.session.fresh_path()?;
        let file = File::options().read(true).write(true).create_new(true).open(&path).context("create", &path)?;
        Ok(BlobWriter {
            file: BufWriter::with_capacity(WRITE_BUFFER_BYTES, file),
            digester: Digester::new(),
            path,
            blobs: self.blobs.clone(),
            unsettled: self.unsettled.clone(),
        })
    }

    /// Nothing there is fine.
    pub fn remove(&self, digest: &Digest) -> Result<()> {
        let path = self.path(digest);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.context("remove", &path),
        }
    }

    pub fn list(&self) -> Result<Vec<(Digest, u64)>> {
        Ok(self.list_with_time()?.into_iter().map(|(digest, size, _)| (digest, size)).collect())
    }

    /// Every blob with its size and the time of its last use.
    pub(crate) fn list_with_time(&self) -> Result<Vec<(Digest, u64, FileTime)>> {
        let mut found = Vec::new();
        for algorithm in ["sha256", "sha512"] {
            let directory = self.blobs.join(algorithm);
            if !directory.exists() {
                continue;
            }
            for entry in fs::read_dir(&directory).context("read", &directory)? {
                let entry = entry.context("read", &directory)?;
                let name = entry.file_name();
                let Some(Ok(digest)) = name.to_str().map(|hex| format!("{algorithm}:{hex}").parse::<Digest>()) else {
                    continue;
                };
                match entry.metadata() {
                    Ok(metadata) => found.push((digest, metadata.len(), modified(&metadata))),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).context("look at", &entry.path()),
                }
            }
        }
        Ok(found)
    }

    /// Keeps the blob from GC as long as this session lives.
    fn touch(&self, digest: &Digest, path: &Path, file: &File) -> Result<()> {
        let since = self.session.hold_blobs()?;
        if modified(&file.metadata().context("look at", path)?) >= since {
            return Ok(());
        }
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        rustix::fs::futimens(file, &times).context("touch", path)?;
        // GC, which moves a blob aside and then looks at its time, may have looked just before.
        match path.exists() {
            true => Ok(()),
            false => Err(Error::UnknownBlob(digest.clone())),
        }
    }

    /// After another boot, a blob that was never settled must prove itself.
    fn check_boot(&self, digest: &Digest, path: &Path, file: &File) -> Result<()> {
        let mut boot = [0; 64];
        let length = match rustix::fs::fgetxattr(file, BOOT_ATTRIBUTE, &mut boot) {
            Ok(length) => length,
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => return Ok(()),
            Err(error) => return Err(error).context("look at", path),
        };
        if boot_id().as_bytes() == &boot[..length] {
            return Ok(());
        }
        let found = digest_of(digest.algorithm(), file).context("read", path)?;
        if found != *digest {
            self.remove(digest)?;
            return Err(Error::UnknownBlob(digest.clone()));
        }
        rustix::io::retry_on_intr(|| rustix::fs::fsync(file)).context("sync", path)?;
        settle(path)?;
        rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0)).context("read", path)?;
        Ok(())
    }

    pub(crate) fn take_unsettled(&self) -> Vec<Digest> {
        std::mem::take(&mut locked(&self.unsettled))
    }

    /// To be called once the file system has been synced.
    pub(crate) fn mark_settled(&self, blobs: &[Digest]) -> Result<()> {
        blobs.iter().try_for_each(|digest| settle(&self.path(digest)))
    }
}

fn settle(path: &Path) -> Result<()> {
    match rustix::fs::removexattr(path, BOOT_ATTRIBUTE) {
        Ok(()) | Err(Errno::NODATA | Errno::NOENT | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error).context("mark", path),
    }
}

/// Which boot this is; empty where the kernel does not say, which equals itself.
pub(crate) fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned())
}

fn digest_of(algorithm: &str, mut reader: impl Read) -> io::Result<Digest> {
    if algorithm == "sha256" {
        return Ok(Digest::of_reader(reader)?.0);
    }
    let mut state = sha2::Sha512::new();
    let mut block = vec![0; WRITE_BUFFER_BYTES];
    loop {
        match reader.read(&mut block)? {
            0 => break,
            read => state.update(&block[..read]),
        }
    }
    let hex: String = state.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha512:{hex}").parse().map_err(io::Error::other)
}

/// A blob in the making. It hashes as it writes; dropping it discards it.
pub struct BlobWriter {
    file: BufWriter<File>,
    digester: Digester,
    path: PathBuf,
    blobs: PathBuf,
    unsettled: Arc<Mutex<Vec<Digest>>>,
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.digester.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl BlobWriter {
    /// Makes it visible under its digest, which must be `expected` where that is given.
    pub fn commit(mut self, expected: Option<&Digest>) -> Result<(Digest, u64)> {
        self.file.flush().context("write", &self.path)?;
        let size = self.digester.size();
        let digest = match expected {
            Some(expected) if expected.algorithm() != "sha256" => {
                let file = File::open(&self.path).context("open", &self.path)?;
                digest_of(expected.algorithm(), file).context("read", &self.path)?
            }
            _ => std::mem::take(&mut self.digester).finish(),
        };
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            return Err(Error::Damaged { expected: expected.clone(), found: digest });
        }
        self.mark_boot()?;
        let directory = self.blobs.join(digest.algorithm());
        if digest.algorithm() != "sha256" {
            create_directory(&directory)?;
        }
        // Over an equal one if there is one: both are whole, and ours is the younger.
        let target = directory.join(digest.hex());
        fs::rename(&self.path, &target).context("store", &target)?;
        locked(&self.unsettled).push(digest.clone());
        Ok((digest, size))
    }

    fn mark_boot(&self) -> Result<()> {
        let file = self.file.get_ref();
        match rustix::fs::fsetxattr(file, BOOT_ATTRIBUTE, boot_id().as_bytes(), XattrFlags::empty()) {
            // A file system without attributes cannot be told what to doubt, so there is nothing to doubt.
            Err(Errno::OPNOTSUPP | Errno::PERM) => file.sync_data().context("sync", &self.path),
            result => result.context("mark", &self.path),
        }
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        // After a commit it is not there any more; otherwise the session's end takes what stays.
        drop(fs::remove_file(&self.path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        (directory, store)
    }

    #[test]
    fn what_is_put_is_read_and_removed() {
        let (_directory, store) = store();
        let content = store.content();
        let digest = content.put(b"hello").unwrap();
        assert_eq!(content.put(b"hello").unwrap(), digest);
        assert_eq!(content.size(&digest).unwrap(), Some(5));
        assert_eq!(content.read(&digest, 5).unwrap(), b"hello");
        assert!(matches!(content.read(&digest, 4), Err(Error::TooLarge { .. })));
        assert_eq!(content.list().unwrap(), [(digest.clone(), 5)]);
        content.remove(&digest).unwrap();
        content.remove(&digest).unwrap();
        assert_eq!(content.size(&digest).unwrap(), None);
        assert!(matches!(content.open(&digest), Err(Error::UnknownBlob(_))));
    }

    #[test]
    fn a_blob_that_is_not_what_it_should_be_never_appears() {
        let (directory, store) = store();
        let mut writer = store.content().writer().unwrap();
        writer.write_all(b"evil").unwrap();
        assert!(matches!(writer.commit(Some(&Digest::of("good"))), Err(Error::Damaged { .. })));
        let mut dropped = store.content().writer().unwrap();
        dropped.write_all(b"half").unwrap();
        drop(dropped);
        assert_eq!(store.content().list().unwrap(), []);
        drop(store);
        assert_eq!(fs::read_dir(directory.path().join("active")).unwrap().count(), 0);
    }

    #[test]
    fn sha512_names_are_kept() {
        let (_directory, store) = store();
        let digest = digest_of("sha512", &b"hello"[..]).unwrap();
        let mut writer = store.content().writer().unwrap();
        writer.write_all(b"hello").unwrap();
        assert_eq!(writer.commit(Some(&digest)).unwrap(), (digest.clone(), 5));
        assert_eq!(store.content().read(&digest, 100).unwrap(), b"hello");
        assert_eq!(store.content().list().unwrap(), [(digest, 5)]);
    }

    #[test]
    fn damage_is_found_by_reading() {
        let (_directory, store) = store();
        let digest = store.content().put(b"hello").unwrap();
        fs::write(store.content().path(&digest), "hellx").unwrap();
        assert!(matches!(store.content().read(&digest, 100), Err(Error::Damaged { .. })));
    }

    /// A power cut: the name is there, the bytes are not, and another boot looks.
    #[test]
    fn an_unsettled_blob_of_another_boot_must_prove_itself() {
        let (_directory, store) = store();
        let content = store.content();
        let (whole, torn, settled) = (content.put(b"whole"), content.put(b"torn"), content.put(b"settled"));
        let (whole, torn, settled) = (whole.unwrap(), torn.unwrap(), settled.unwrap());
        if rustix::fs::setxattr(content.path(&whole), BOOT_ATTRIBUTE, b"other boot", XattrFlags::empty()).is_err() {
            std::io::stderr().write_all(b"skipped: no user attributes on this file system\n").unwrap();
            return;
        }
        store.settle().unwrap();
        for digest in [&whole, &torn] {
            rustix::fs::setxattr(content.path(digest), BOOT_ATTRIBUTE, b"other boot", XattrFlags::empty()).unwrap();
        }
        for digest in [&torn, &settled] {
            File::options().write(true).open(content.path(digest)).unwrap().set_len(0).unwrap();
        }
        let mut text = String::new();
        content.open(&whole).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "whole");
        assert_eq!(content.size(&torn).unwrap(), None);
        assert!(!content.path(&torn).exists());
        assert_eq!(content.size(&settled).unwrap(), Some(0), "settled blobs are not read again");
    }
}
