//! Digests of files by their stat, so that an unchanged file is not read again.
//!
//! ```text
//! magic "forge-stat-2\0\0\0\0" (16) | save number (8) | records (n x 96, sorted by device and inode) | sha256 (32)
//! record: device inode size mtime.s ctime.s (8 each) mtime.ns ctime.ns flags seen (4 each) digest (32) zero (8)
//! ```
//! A record is believed where device, inode, size, mtime and ctime are all the same. Nobody sets a ctime, so an edit
//! that restores size and mtime is seen. What stat cannot show is an edit in the same clock tick as the hashing: a
//! file whose mtime or ctime is not clearly older than the moment its hashing began is never recorded
//! ([`Stamp::settled`]), so it is hashed again until it has come to rest. That is git's rule for "racily clean"
//! entries, applied when the record is made.
//!
//! The file is read whole and searched in place. One that is damaged is no file. It is written, to a temporary name
//! and then renamed, only when there is something new; records that no scan met in the last saves are dropped then.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use forge_snapshotter::Digester;
use rustix::fs::{Statx, StatxTimestamp};

const MAGIC: &[u8; 16] = b"forge-stat-2\0\0\0\0";
const HEADER: usize = 24;
const RECORD: usize = 96;
const SUM: usize = 32;
/// Saves for which a record is kept that no scan met: another branch, another Dockerfile of the same context.
const KEEP_SAVES: u32 = 16;
/// The kernel's clock for files ticks at 100 Hz at worst; ten ticks.
const FINE_TICK: Duration = Duration::from_millis(100);
/// File systems without nanoseconds count seconds, or pairs of them.
const COARSE_TICK: Duration = Duration::from_secs(3);

/// What stat says of a file, as far as it changes whenever the bytes do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
}

impl Stamp {
    pub(crate) fn of(stat: &Statx) -> Stamp {
        let time = |time: StatxTimestamp| (time.tv_sec, time.tv_nsec);
        Stamp {
            device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            size: stat.stx_size,
            mtime: time(stat.stx_mtime),
            ctime: time(stat.stx_ctime),
        }
    }

    /// Whether an edit after `since` would show.
    pub(crate) fn settled(&self, since: SystemTime) -> bool {
        let coarse = self.mtime.1 == 0 && self.ctime.1 == 0;
        let Ok(since) = since.duration_since(SystemTime::UNIX_EPOCH) else { return false };
        let limit = since.saturating_sub(if coarse { COARSE_TICK } else { FINE_TICK });
        let limit = (limit.as_secs().cast_signed(), limit.subsec_nanos());
        self.mtime < limit && self.ctime < limit
    }

    fn key(&self) -> (u64, u64) {
        (self.device, self.inode)
    }
}

/// What is remembered of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub digest: [u8; 32],
    /// It has extended attributes worth reading (a change of them changes the ctime).
    pub attributes: bool,
}

/// One context's memory. Shared by the threads of a scan, and by the scans of a build.
#[derive(Debug)]
pub struct StatCache {
    file: Option<PathBuf>,
    /// The file as it was read: the records alone, and which of them were met.
    records: Vec<u8>,
    met: Vec<AtomicBool>,
    saves: u32,
    fresh: RwLock<HashMap<(u64, u64), (Stamp, Known)>>,
}

impl StatCache {
    /// Reads what was saved. A missing or damaged file is an empty cache.
    pub fn open(file: &Path) -> StatCache {
        let (records, saves) = read(file).unwrap_or_default();
        let met = (0..records.len() / RECORD).map(|_| AtomicBool::new(false)).collect();
        StatCache { file: Some(file.to_owned()), records, met, saves, fresh: RwLock::default() }
    }

    /// Remembers within this process alone.
    pub fn none() -> StatCache {
        StatCache { file: None, records: Vec::new(), met: Vec::new(), saves: 0, fresh: RwLock::default() }
    }

    pub(crate) fn get(&self, stamp: &Stamp) -> Option<Known> {
        let index = self.search(stamp.key());
        if let Some(record) = index.map(|index| self.record(index)).filter(|record| decode_stamp(record) == *stamp) {
            index.inspect(|index| self.met[*index].store(true, Ordering::Relaxed));
            let flags = u32_at(record, 48);
            return Some(Known { digest: array_at(record, 56), attributes: flags & 1 != 0 });
        }
        let fresh = self.fresh.read().unwrap_or_else(PoisonError::into_inner);
        fresh.get(&stamp.key()).filter(|(known, _)| known == stamp).map(|(_, known)| *known)
    }

    /// Remembers a file whose hashing began at `began`, if an edit since would show.
    pub(crate) fn put(&self, stamp: &Stamp, known: Known, began: SystemTime) {
        if stamp.settled(began) {
            let mut fresh = self.fresh.write().unwrap_or_else(PoisonError::into_inner);
            fresh.insert(stamp.key(), (*stamp, known));
        }
    }

    /// Writes the file anew if a scan found something that it does not hold.
    pub fn save(&self) -> io::Result<()> {
        let fresh = self.fresh.read().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = self.file.as_deref().filter(|_| !fresh.is_empty()) else { return Ok(()) };
        let saves = self.saves.wrapping_add(1);
        let mut records: Vec<[u8; RECORD]> = fresh.values().map(|(stamp, known)| encode(stamp, known, saves)).collect();
        for index in 0..self.met.len() {
            let mut record: [u8; RECORD] = array_at(self.record(index), 0);
            let met = self.met[index].load(Ordering::Relaxed);
            if fresh.contains_key(&decode_stamp(&record).key()) || (!met && self.unmet_for(&record) >= KEEP_SAVES) {
                continue;
            }
            if met {
                record[52..56].copy_from_slice(&saves.to_le_bytes());
            }
            records.push(record);
        }
        records.sort_unstable_by_key(|record| decode_stamp(record).key());
        write(file, &records, saves)
    }

    fn unmet_for(&self, record: &[u8]) -> u32 {
        self.saves.wrapping_sub(u32_at(record, 52))
    }

    fn record(&self, index: usize) -> &[u8] {
        &self.records[index * RECORD..(index + 1) * RECORD]
    }

    fn search(&self, key: (u64, u64)) -> Option<usize> {
        let (mut low, mut high) = (0, self.met.len());
        while low < high {
            let middle = (low + high) / 2;
            let record = self.record(middle);
            match (u64_at(record, 0), u64_at(record, 8)).cmp(&key) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Some(middle),
            }
        }
        None
    }
}

/// The records and the save number of an undamaged file.
fn read(file: &Path) -> Option<(Vec<u8>, u32)> {
    let mut bytes = std::fs::read(file).ok()?;
    let body = bytes.len().checked_sub(SUM)?;
    let sound = body >= HEADER
        && (body - HEADER).is_multiple_of(RECORD)
        && bytes.starts_with(MAGIC)
        && sum(&bytes[..body])[..] == bytes[body..];
    if !sound {
        return None;
    }
    let saves = u32_at(&bytes, 16);
    bytes.truncate(body);
    bytes.drain(..HEADER);
    Some((bytes, saves))
}

fn write(file: &Path, records: &[[u8; RECORD]], saves: u32) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER + records.len() * RECORD + SUM);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&u64::from(saves).to_le_bytes());
    bytes.extend_from_slice(records.as_flattened());
    bytes.extend_from_slice(&sum(&bytes));
    let directory = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(directory)?;
    let mut temporary = tempfile::NamedTempFile::new_in(directory)?;
    temporary.write_all(&bytes)?;
    temporary.persist(file)?;
    Ok(())
}

fn sum(bytes: &[u8]) -> [u8; SUM] {
    let mut digester = Digester::new();
    digester.update(bytes);
    digester.finish_bytes()
}

fn encode(stamp: &Stamp, known: &Known, saves: u32) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        record[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    for number in [stamp.device, stamp.inode, stamp.size] {
        put(&number.to_le_bytes());
    }
    put(&stamp.mtime.0.to_le_bytes());
    put(&stamp.ctime.0.to_le_bytes());
    for number in [stamp.mtime.1, stamp.ctime.1, u32::from(known.attributes), saves] {
        put(&number.to_le_bytes());
    }
    put(&known.digest);
    record
}

fn decode_stamp(record: &[u8]) -> Stamp {
    Stamp {
        device: u64_at(record, 0),
        inode: u64_at(record, 8),
        size: u64_at(record, 16),
        mtime: (u64_at(record, 24).cast_signed(), u32_at(record, 40)),
        ctime: (u64_at(record, 32).cast_signed(), u32_at(record, 44)),
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a record has its fixed length")
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}
