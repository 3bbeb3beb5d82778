//! Snapshots as whole trees: for file systems and users without overlay.
//!
//! ```text
//! snapshots/<hex>/fs       the changes, in overlay form, as with every driver
//! snapshots/<hex>/root     the whole tree; made by commit, or when first wanted for what was adopted
//! active/<s>/<n>/root      a full copy of the parent's, written to by the step
//! ```
//! What a step changed is told by (inode, ctime): both are noted once the copy is complete and the clock has moved
//! on, and no program can set a ctime back. The changed files of `fs` and `root` are hard links of each other.
//!
//! Trees are walked by directory descriptors and no link in them is ever followed.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::shelf::{
    Place, Settled, Shelf, Use, attribute, attribute_names, copy_attributes, copy_directory_attributes, disk_usage,
    is_untouched,
};
use super::{Active, ActiveState, Driver, Info, SnapshotId, Snapshotter, View};
use crate::{Context, Result};

const TICK: Duration = Duration::from_millis(1);

pub(crate) struct Plain {
    shelf: Arc<Shelf>,
}

impl Plain {
    pub(crate) fn new(shelf: Arc<Shelf>) -> Plain {
        Plain { shelf }
    }

    /// The whole tree of a snapshot that is in use.
    fn tree(&self, id: &SnapshotId) -> Result<PathBuf> {
        let stack = self.shelf.stack(id)?;
        let tree = |id: &SnapshotId| self.shelf.directory(id).join("root");
        let Some(top) = stack.first() else { return Ok(self.shelf.empty()) };
        let missing = stack.iter().take_while(|id| !tree(id).exists()).count();
        if missing == 0 {
            return Ok(tree(top));
        }
        let place = Place::new(&self.shelf)?;
        let root = place.make("root")?;
        let base = stack.get(missing).map_or_else(|| self.shelf.empty(), tree);
        lay(&base, &root, Form::Tree)?;
        for id in stack[..missing].iter().rev() {
            lay(&self.shelf.directory(id).join("fs"), &root, Form::Changes)?;
        }
        match fs::rename(&root, tree(top)) {
            // Somebody else wanted it too, and was first.
            Err(_) if tree(top).exists() => {}
            result => result.context("store", &tree(top))?,
        }
        Ok(tree(top))
    }
}

impl Snapshotter for Plain {
    fn get(&self, id: &SnapshotId) -> Result<Option<Info>> {
        self.shelf.get(id)
    }

    fn prepare(&self, parent: Option<&SnapshotId>) -> Result<Active> {
        let held = parent.map(|parent| self.shelf.hold(parent)).transpose()?;
        let from = parent.map_or_else(|| Ok(self.shelf.empty()), |parent| self.tree(parent))?;
        let place = Place::new(&self.shelf)?;
        let root = place.make("root")?;
        lay(&from, &root, Form::Tree)?;
        let before = remember(&open_directory(CWD, &root).context("open", &root)?).context("read", &root)?;
        wait_for_tick(&place.path("tick"))?;
        let fresh = fs::metadata(&root).context("look at", &root)?;
        let state = PlainActive { root, before, fresh, place, _held: held };
        Ok(Active { parent: parent.cloned(), state: Box::new(state) })
    }

    fn commit(&self, mut active: Active, id: SnapshotId) -> Result<Info> {
        let settled = active.state.settle()?;
        self.shelf.publish(&id, active.parent.as_ref(), &settled)
    }

    fn inherit(&self, parent: &SnapshotId, changes: &Path, directories: &[PathBuf]) -> Result<()> {
        self.shelf.inherit(Driver::Plain, parent, changes, directories)
    }

    fn adopt(&self, parent: Option<&SnapshotId>, changes: &Path, id: SnapshotId) -> Result<Info> {
        self.shelf.adopt(parent, changes, &id)
    }

    /// The snapshot's own tree: nothing but the caller's care keeps it from being written to.
    fn view(&self, id: &SnapshotId) -> Result<View> {
        let held = self.shelf.hold(id)?;
        Ok(View { root: self.tree(id)?, _guard: Some(Box::new(held)) })
    }

    fn remove(&self, id: &SnapshotId) -> Result<()> {
        self.shelf.remove(id)
    }
}

struct PlainActive {
    root: PathBuf,
    before: Entries,
    fresh: fs::Metadata,
    place: Place,
    _held: Option<Use>,
}

impl ActiveState for PlainActive {
    fn root(&self) -> &Path {
        &self.root
    }

    fn changes(&mut self) -> Result<PathBuf> {
        let changes = self.place.path("fs");
        self.place.discard("fs")?;
        self.place.make("fs")?;
        let (new, out) = (open_directory(CWD, &self.root), open_directory(CWD, &changes));
        let (new, out) = (new.context("open", &self.root)?, out.context("open", &changes)?);
        compare(&new, Some(&self.before), &out).context("compare with its parent", &self.root)?;
        copy_directory_attributes(&self.root, &changes)?;
        Ok(changes)
    }

    fn settle(&mut self) -> Result<Settled> {
        let changes = self.changes()?;
        if is_untouched(&changes, &self.fresh)? {
            return Ok(Settled::nothing());
        }
        let size_bytes = disk_usage(&changes)?;
        Ok(Settled { parts: vec![(changes, "fs"), (self.root.clone(), "root")], size_bytes })
    }
}

/// What a directory held before the step.
type Entries = BTreeMap<CString, Seen>;

struct Seen {
    inode: u64,
    ctime: (i64, i64),
    /// None for what is no directory.
    entries: Option<Entries>,
}

impl Seen {
    fn is(&self, stat: &Stat) -> bool {
        self.inode == stat.st_ino && self.ctime == ctime(stat)
    }
}

fn ctime(stat: &Stat) -> (i64, i64) {
    (stat.st_ctime, stat.st_ctime_nsec as i64)
}

fn open_directory(at: impl std::os::fd::AsFd, name: impl rustix::path::Arg) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(at, name, flags, Mode::empty())?))
}

fn names(directory: &File) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn stat_in(directory: &File, name: &CStr) -> io::Result<Stat> {
    Ok(rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn remember(directory: &File) -> io::Result<Entries> {
    let mut entries = Entries::new();
    for name in names(directory)? {
        let stat = stat_in(directory, &name)?;
        let inner = match kind(&stat) {
            FileType::Directory => Some(remember(&open_directory(directory, &*name)?)?),
            _ => None,
        };
        entries.insert(name, Seen { inode: stat.st_ino, ctime: ctime(&stat), entries: inner });
    }
    Ok(entries)
}

/// Returns once a change would get another ctime than everything so far: the clock of inodes ticks.
fn wait_for_tick(probe: &Path) -> Result<()> {
    let changed = || -> io::Result<(i64, i64)> {
        fs::write(probe, "")?;
        let metadata = fs::metadata(probe)?;
        fs::remove_file(probe)?;
        Ok((metadata.ctime(), metadata.ctime_nsec()))
    };
    let first = changed().context("write", probe)?;
    while changed().context("write", probe)? <= first {
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// Writes to `out` how `new` differs from `before`; false if it does not.
fn compare(new: &File, before: Option<&Entries>, out: &File) -> io::Result<bool> {
    let names = names(new)?;
    let mut differs = false;
    for name in &names {
        let stat = stat_in(new, name)?;
        let seen = before.and_then(|before| before.get(name));
        let same = seen.is_some_and(|seen| seen.is(&stat));
        if kind(&stat) == FileType::Directory {
            differs |= compare_directory(new, name, seen, same, out)?;
        } else if !same {
            rustix::fs::linkat(new, &**name, out, &**name, AtFlags::empty())?;
            differs = true;
        }
    }
    for gone in before.into_iter().flatten().map(|(name, _)| name).filter(|name| names.binary_search(name).is_err()) {
        Driver::Plain.write_whiteout(out, gone)?;
        differs = true;
    }
    Ok(differs)
}

fn compare_directory(new: &File, name: &CStr, seen: Option<&Seen>, same: bool, out: &File) -> io::Result<bool> {
    rustix::fs::mkdirat(out, name, Mode::RWXU)?;
    let (inner_new, inner_out) = (open_directory(new, name)?, open_directory(out, name)?);
    let differs = compare(&inner_new, seen.and_then(|seen| seen.entries.as_ref()), &inner_out)?;
    if same && !differs {
        rustix::fs::unlinkat(out, name, AtFlags::REMOVEDIR)?;
        return Ok(false);
    }
    copy_attributes(&inner_new, &inner_out)?;
    rustix::fs::futimens(&inner_out, &times(&rustix::fs::fstat(&inner_new)?))?;
    Ok(true)
}

/// How a tree that is laid over another is to be read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As it is.
    Tree,
    /// Whiteouts remove, opaque directories hide.
    Changes,
}

/// Lays a tree over another, which may be empty.
fn lay(from: &Path, onto: &Path, form: Form) -> Result<()> {
    let (source, target) = (open_directory(CWD, from), open_directory(CWD, onto));
    let (source, target) = (source.context("open", from)?, target.context("open", onto)?);
    let mut laying = Laying { form, target: target.try_clone().context("open", onto)?, linked: HashMap::new() };
    laying.directory(&source, &target, Path::new("")).context("copy", from)
}

struct Laying {
    form: Form,
    /// The top of what is written.
    target: File,
    /// Files with several names, and the first of them that was written, below the top.
    linked: HashMap<(u64, u64), PathBuf>,
}

impl Laying {
    fn directory(&mut self, from: &File, to: &File, path: &Path) -> io::Result<()> {
        for name in names(from)? {
            let stat = stat_in(from, &name)?;
            if self.form == Form::Changes && Driver::Plain.is_whiteout(from, &name, &stat)? {
                remove(to, &name)?;
                continue;
            }
            let path = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            if kind(&stat) == FileType::Directory {
                let inner = open_directory(from, &*name)?;
                let inner_to = self.make_directory(&inner, to, &name)?;
                self.directory(&inner, &inner_to, &path)?;
            } else {
                self.file(&Source { directory: from, name: &name, stat }, to, path)?;
            }
        }
        copy_attributes(from, to)?;
        Ok(rustix::fs::futimens(to, &times(&rustix::fs::fstat(from)?))?)
    }

    /// The directory `name` in `to`: the one that is there, unless `from` hides it.
    fn make_directory(&self, from: &File, to: &File, name: &CStr) -> io::Result<File> {
        let opaque = self.form == Form::Changes && Driver::Plain.is_opaque(from)?;
        match stat_in(to, name) {
            Ok(stat) if kind(&stat) == FileType::Directory && !opaque => return open_directory(to, name),
            Ok(_) => remove(to, name)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        rustix::fs::mkdirat(to, name, Mode::RWXU)?;
        open_directory(to, name)
    }

    fn file(&mut self, source: &Source, to: &File, path: PathBuf) -> io::Result<()> {
        if self.form == Form::Changes {
            remove(to, source.name)?;
        }
        let stat = &source.stat;
        let identity = (stat.st_dev, stat.st_ino);
        if stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&identity) {
                return Ok(rustix::fs::linkat(&self.target, first, to, source.name, AtFlags::empty())?);
            }
            self.linked.insert(identity, path);
        }
        match kind(stat) {
            FileType::RegularFile => copy_file(source, to),
            _ => copy_special(source, to),
        }
    }
}

/// Something that is no directory, where it is.
struct Source<'a> {
    directory: &'a File,
    name: &'a CStr,
    stat: Stat,
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as _),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as _),
    }
}

/// Removes whatever has the name, if anything.
fn remove(directory: &File, name: &CStr) -> io::Result<()> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => fs::remove_dir_all(below(directory, name)),
        Err(error) => Err(error.into()),
    }
}

/// A path for calls that take no directory descriptor.
fn below(directory: &File, name: &CStr) -> PathBuf {
    let name = std::ffi::OsStr::from_bytes(name.to_bytes());
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

fn copy_file(source: &Source, to: &File) -> io::Result<()> {
    let Source { directory, name, stat } = *source;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let source = File::from(rustix::fs::openat(directory, name, flags, Mode::empty())?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let target = File::from(rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)?);
    if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
        copy_data(&source, &target, u64::try_from(stat.st_size).unwrap_or_default())?;
    }
    copy_attributes(&source, &target)?;
    Ok(rustix::fs::futimens(&target, &times(&stat))?)
}

/// Copies what there is, and leaves holes holes.
fn copy_data(mut source: &File, mut target: &File, size: u64) -> io::Result<()> {
    let mut position = 0;
    while position < size {
        let start = match rustix::fs::seek(source, rustix::fs::SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, rustix::fs::SeekFrom::Hole(start))?;
        source.seek(SeekFrom::Start(start))?;
        target.seek(SeekFrom::Start(start))?;
        io::copy(&mut source.take(end - start), &mut target)?;
        position = end;
    }
    target.set_len(size)
}

/// Links, devices, pipes and sockets.
fn copy_special(source: &Source, to: &File) -> io::Result<()> {
    let Source { directory: from, name, stat } = *source;
    let kind = kind(&stat);
    if kind == FileType::Symlink {
        let target = rustix::fs::readlinkat(from, name, Vec::new())?;
        rustix::fs::symlinkat(&target, to, name)?;
    } else {
        rustix::fs::mknodat(to, name, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev)?;
    }
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        rustix::fs::chmodat(to, name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
    }
    let (source, target) = (below(from, name), below(to, name));
    for attribute_name in attribute_names(|list| rustix::fs::llistxattr(&source, list))? {
        let value = attribute(|value| rustix::fs::lgetxattr(&source, &*attribute_name, value))?;
        rustix::fs::lsetxattr(&target, &*attribute_name, &value, XattrFlags::empty())?;
    }
    Ok(rustix::fs::utimensat(to, name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?)
}
