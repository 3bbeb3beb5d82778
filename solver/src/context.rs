//! The files that an instruction reads, and their one digest.
//!
//! [`scan`] reads just the selected part of a directory in place and gives a [`Tree`]: names, types, modes, owners,
//! attributes, link targets and the digests of the bytes, as they were when they were hashed. Its digest is a Merkle
//! digest: a directory's is made of its entries', sorted by name. In it and not in it:
//!
//! | in                                                        | not in                                          |
//! |-----------------------------------------------------------|-------------------------------------------------|
//! | path, type, permission bits, link target, device number   | mtime, ctime, inode, hard-link structure        |
//! | sha256 of a file's bytes                                  | the root directory's own mode and owner         |
//! | `security.capability` and `user.*` (but `user.overlay.*`) | mode and owner of directories on the way        |
//! | owner and group, where [`Owners::Keep`]                   | sockets, which nothing copies                   |
//!
//! Directories that are only on the way to what is selected count by name alone, unless `parents` is set.
//!
//! Reading goes by directory descriptors and follows no link: nothing outside the root is ever opened. Unchanged
//! files are not read at all (`stat_cache`). Links on the way to a selected path are followed inside the root and
//! are part of the tree, so a copy from the tree finds its way as the scan did (`select`).

mod select;
mod stat_cache;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use forge_snapshotter::Digester;
use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags};

use crate::graph::{Digest, Selection};
use crate::pattern::{InvalidPattern, Parents, Patterns};
pub(crate) use select::{Found, Names, SelectError};
pub(crate) use select::{Selected, resolve_new, select};
use stat_cache::Known;
pub use stat_cache::{Stamp, StatCache};

/// A file that keeps changing under the hash is given up after this many readings.
const READINGS_MAX: usize = 3;
const BLOCK: usize = 256 * 1024;

/// What to read.
#[derive(Clone, Copy)]
pub struct Scan<'a> {
    pub root: &'a Path,
    pub selection: &'a Selection,
    /// Of the ignore file; relative to the root.
    pub ignore: Option<&'a Patterns>,
    pub owners: Owners,
    /// `--parents`: `**` in paths, and the directories on the way count.
    pub parents: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// Files of a context count as root's.
    Root,
    /// Files of a stage keep theirs.
    Keep,
}

#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    #[error("{path:?}: not found")]
    NotFound { path: String },
    #[error("{path:?}: not found: the ignore file excludes it")]
    Ignored { path: String },
    #[error("{path:?} is outside of the context")]
    Escapes { path: String },
    #[error("{}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{}: changed while it was read; run the build again when nothing writes to it", path.display())]
    Changed { path: PathBuf },
    #[error("{}: too many levels of symbolic links", path.display())]
    Loop { path: PathBuf },
    #[error(transparent)]
    Pattern(#[from] InvalidPattern),
}

impl From<SelectError> for ContextError {
    fn from(error: SelectError) -> ContextError {
        match error {
            SelectError::Pattern(error) => ContextError::Pattern(error),
            SelectError::Loop(path) => ContextError::Loop { path },
            SelectError::Io { path, source } => ContextError::Unreadable { path, source },
        }
    }
}

/// Files below `root` as they were when they were hashed.
#[derive(Debug)]
pub struct Tree {
    pub root: PathBuf,
    pub digest: Digest,
    directories: Vec<Listing>,
}

/// A directory of a [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectoryId(usize);

#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// Sorted by name.
    pub entries: Vec<Entry>,
    /// Of the directory itself.
    pub attributes: Attributes,
}

pub(crate) type Attributes = Vec<(CString, Vec<u8>)>;

#[derive(Debug)]
pub(crate) struct Entry {
    pub name: OsString,
    pub kind: Kind,
    /// Permission bits, with set-id and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub stamp: Stamp,
    /// Other names may be hard links to it.
    pub linked: bool,
    pub attributes: Attributes,
    /// A directory that is only on the way to what was selected.
    on_the_way: bool,
    /// An excluded directory: there only if something below it was taken back.
    conditional: bool,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Kind {
    File {
        digest: [u8; 32],
        /// The stamp proves the bytes: an edit after the hashing would show in it.
        settled: bool,
    },
    Directory(DirectoryId),
    Link(OsString),
    Special {
        file_type: FileType,
        device: u64,
    },
}

impl Tree {
    pub(crate) fn listing(&self, directory: DirectoryId) -> &Listing {
        &self.directories[directory.0]
    }

    pub(crate) fn top(&self) -> DirectoryId {
        DirectoryId(0)
    }

    /// The entry at a real path; `None` for the root too.
    pub(crate) fn entry(&self, path: &Path) -> Option<&Entry> {
        let mut directory = self.top();
        let mut parts = path.components().map(|part| part.as_os_str()).peekable();
        while let Some(part) = parts.next() {
            let entries = &self.listing(directory).entries;
            let index = entries.binary_search_by(|entry| entry.name.as_os_str().cmp(part)).ok()?;
            match &entries[index].kind {
                _ if parts.peek().is_none() => return Some(&entries[index]),
                Kind::Directory(below) => directory = *below,
                _ => return None,
            }
        }
        None
    }

    /// The directory at a real path, `""` for the root.
    pub(crate) fn directory(&self, path: &Path) -> Option<DirectoryId> {
        if path.as_os_str().is_empty() {
            return Some(self.top());
        }
        match self.entry(path)?.kind {
            Kind::Directory(id) => Some(id),
            _ => None,
        }
    }

    /// How many files, directories and links it holds.
    pub fn len(&self) -> usize {
        self.directories.iter().map(|listing| listing.entries.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Names for Tree {
    fn find(&self, path: &Path) -> io::Result<Option<Found>> {
        Ok(self.entry(path).map(|entry| match &entry.kind {
            Kind::Directory(_) => Found::Directory,
            Kind::Link(target) => Found::Link(target.into()),
            _ => Found::Other,
        }))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        let listing = self.directory(directory).map(|id| self.listing(id));
        Ok(listing.into_iter().flat_map(|listing| &listing.entries).map(|entry| entry.name.clone()).collect())
    }
}

/// Reads what is selected. Fails where a plain path selects nothing; a wildcard may.
pub fn scan(scan: &Scan, cache: &StatCache) -> Result<Tree, ContextError> {
    let unreadable =
        |source: rustix::io::Errno| ContextError::Unreadable { path: scan.root.into(), source: source.into() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = Arc::new(rustix::fs::open(scan.root, flags, Mode::empty()).map_err(unreadable)?);
    let exclude = Patterns::new(&scan.selection.exclude)?;
    let wanted = want(scan, &Disk { root: &root }, &exclude)?;
    let walk = Walk {
        scan,
        cache,
        // Patterns are relative to each source; where one source lies in another, or the sources' pivots are not
        // known, all is read and the copy alone excludes.
        exclude: (!exclude.is_empty() && !scan.parents && !wanted.nested).then_some(&exclude),
        identifiers: AtomicUsize::new(1),
        done: Mutex::default(),
        failure: Mutex::default(),
        stop: AtomicBool::new(false),
    };
    let tree = walk.run(root, &wanted.paths)?;
    for path in &wanted.plain {
        if select(&tree, path, scan.parents, &mut Vec::new())?.is_empty() {
            return Err(ContextError::Ignored { path: path.clone() });
        }
    }
    Ok(tree)
}

/// The selected paths as a tree of names.
#[derive(Debug, Default)]
struct Wanted {
    below: BTreeMap<OsString, Wanted>,
    /// It, and all below it.
    all: bool,
}

struct WantedPaths {
    paths: Wanted,
    /// The selection's paths without wildcards: they must be there.
    plain: Vec<String>,
    nested: bool,
}

impl Wanted {
    /// Whether nothing above or below the path had been added.
    fn add(&mut self, path: &Path) -> bool {
        let mut node = self;
        let mut apart = true;
        for part in path.components() {
            apart &= !node.all;
            node = node.below.entry(part.as_os_str().to_owned()).or_default();
        }
        apart &= !node.all && node.below.is_empty();
        node.all = true;
        apart
    }
}

fn want(scan: &Scan, disk: &Disk, exclude: &Patterns) -> Result<WantedPaths, ContextError> {
    let mut wanted = WantedPaths { paths: Wanted::default(), plain: Vec::new(), nested: false };
    let mut links = Vec::new();
    for path in &scan.selection.paths {
        let cleaned = crate::pattern::clean(path);
        if cleaned == ".." || cleaned.starts_with("../") {
            return Err(ContextError::Escapes { path: path.clone() });
        }
        let selected = select(disk, &cleaned, scan.parents, &mut links)?;
        if !crate::pattern::has_wildcards(&cleaned) {
            if selected.is_empty() {
                return Err(ContextError::NotFound { path: path.clone() });
            }
            wanted.plain.push(cleaned);
        }
        for selected in selected {
            if !selected.is_excluded(exclude) {
                wanted.nested |= !wanted.paths.add(&selected.real);
            }
        }
    }
    for link in links {
        wanted.nested |= !wanted.paths.add(&link);
    }
    Ok(wanted)
}

impl Selected {
    /// Whether `--exclude` drops the whole of it: what a wildcard matched is asked by its name.
    pub(crate) fn is_excluded(&self, exclude: &Patterns) -> bool {
        self.matched.as_ref().is_some_and(|matched| exclude.excludes(&matched.to_string_lossy()))
    }
}

/// A directory on disk, read through its descriptor without following a link.
pub(crate) struct Disk<'a> {
    pub root: &'a OwnedFd,
}

impl Disk<'_> {
    /// `path` is real: a link in it is an error.
    pub(crate) fn open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(self.root, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)
    }
}

impl Names for Disk<'_> {
    fn find(&self, path: &Path) -> io::Result<Option<Found>> {
        use rustix::io::Errno;
        let file = match self.open(path, OFlags::PATH) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            file => file?,
        };
        Ok(Some(match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
            FileType::Directory => Found::Directory,
            FileType::Symlink => Found::Link(read_link(file.as_fd(), c"")?.into()),
            _ => Found::Other,
        }))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        let directory = self.open(directory, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(names(directory.as_fd())?.into_iter().map(|name| OsString::from_vec(name.into_bytes())).collect())
    }
}

/// A scan under way: one task per directory, on rayon's threads.
struct Walk<'a> {
    scan: &'a Scan<'a>,
    cache: &'a StatCache,
    exclude: Option<&'a Patterns>,
    /// A directory's id is greater than its parent's.
    identifiers: AtomicUsize,
    done: Mutex<Vec<(usize, Listing)>>,
    failure: Mutex<Option<ContextError>>,
    stop: AtomicBool,
}

/// A directory to be read.
struct Task<'a> {
    parent: Arc<OwnedFd>,
    name: CString,
    id: usize,
    place: Place<'a>,
}

/// Where a task is, and what of it is wanted.
#[derive(Clone)]
struct Place<'a> {
    path: String,
    /// `None`: all of it.
    wanted: Option<&'a Wanted>,
    ignore: Parents,
    exclude: Parents,
    /// Where the path that `exclude` sees begins.
    base: usize,
}

/// What the patterns say of an entry.
enum Verdict<'a> {
    Take,
    Descend { place: Place<'a>, conditional: bool },
}

impl<'a> Walk<'a> {
    fn run(self, root: Arc<OwnedFd>, wanted: &'a Wanted) -> Result<Tree, ContextError> {
        let place = Place {
            path: String::new(),
            wanted: (!wanted.all).then_some(wanted),
            ignore: Parents::default(),
            exclude: Parents::default(),
            base: 0,
        };
        let top = Task { parent: root, name: c".".into(), id: 0, place };
        rayon::scope(|scope| self.directory(scope, top));
        if let Some(failure) = self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(failure);
        }
        let mut done = self.done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|(id, _)| *id);
        let mut directories: Vec<Listing> = done.into_iter().map(|(_, listing)| listing).collect();
        let digest = merkle(&mut directories, self.scan.parents);
        Ok(Tree { root: self.scan.root.into(), digest, directories })
    }

    fn directory<'s>(&'s self, scope: &rayon::Scope<'s>, task: Task<'s>)
    where
        'a: 's,
    {
        if self.stop.load(Ordering::Relaxed) {
            return;
        }
        let id = task.id;
        match self.read(scope, task) {
            Ok(listing) => self.done.lock().unwrap_or_else(PoisonError::into_inner).push((id, listing)),
            Err(error) => {
                self.stop.store(true, Ordering::Relaxed);
                self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    }

    fn read<'s>(&'s self, scope: &rayon::Scope<'s>, task: Task<'s>) -> Result<Listing, ContextError>
    where
        'a: 's,
    {
        let Task { parent, name, place, .. } = task;
        let context = |source| self.unreadable(&place.path, source);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory =
            rustix::fs::openat(&parent, &name, flags, Mode::empty()).map_err(|errno| context(errno.into()))?;
        drop(parent);
        let directory = Arc::new(directory);
        let names = match place.wanted {
            None => names(directory.as_fd()).map_err(context)?,
            Some(wanted) => wanted.below.keys().filter_map(|name| CString::new(name.as_bytes()).ok()).collect(),
        };
        let mut listing = Listing {
            entries: Vec::with_capacity(names.len()),
            attributes: attributes(directory.as_fd()).map_err(context)?,
        };
        let mut unread = Vec::new();
        for name in names {
            let text = name.to_string_lossy();
            let path = if place.path.is_empty() { text.into_owned() } else { format!("{}/{text}", place.path) };
            let stat = match stat(directory.as_fd(), &name) {
                Err(rustix::io::Errno::NOENT) => continue, // it went away since the directory was listed
                stat => stat.map_err(|errno| self.unreadable(&path, errno.into()))?,
            };
            let file_type = FileType::from_raw_mode(stat.stx_mode.into());
            let Some(verdict) = self.judge(&place, &name, path, file_type) else { continue };
            let mut entry = self.entry(&name, &stat);
            match (verdict, file_type) {
                (Verdict::Descend { place: below, conditional }, _) => {
                    let id = self.identifiers.fetch_add(1, Ordering::Relaxed);
                    entry.kind = Kind::Directory(DirectoryId(id));
                    (entry.on_the_way, entry.conditional) = (below.wanted.is_some(), conditional);
                    let task = Task { parent: directory.clone(), name, id, place: below };
                    scope.spawn(move |scope| self.directory(scope, task));
                }
                (Verdict::Take, FileType::RegularFile) => match self.cache.get(&entry.stamp) {
                    Some(Known { digest, attributes: false }) => entry.kind = Kind::File { digest, settled: true },
                    known => unread.push((listing.entries.len(), name, known)),
                },
                (Verdict::Take, FileType::Symlink) => {
                    entry.kind = Kind::Link(read_link(directory.as_fd(), &name).map_err(context)?);
                }
                (Verdict::Take, _) => (),
            }
            listing.entries.push(entry);
        }
        let read = |(index, name, known): (usize, CString, Option<Known>)| {
            self.file(directory.as_fd(), &name, known, &place.path).map(|entry| (index, entry))
        };
        for (index, entry) in unread.into_par_iter().map(read).collect::<Result<Vec<_>, _>>()? {
            listing.entries[index] = entry;
        }
        Ok(listing)
    }

    /// Whether an entry is in, and how its inside is to be read if it is a directory.
    fn judge(&self, at: &Place<'a>, name: &CStr, path: String, file_type: FileType) -> Option<Verdict<'a>> {
        let name = OsStr::from_bytes(name.to_bytes());
        let wanted = at.wanted.map(|wanted| &wanted.below[name]);
        let on_the_way = wanted.is_some_and(|wanted| !wanted.all);
        // A source is not itself subject to the patterns that are relative to it.
        let inside = at.wanted.is_none();
        let ignore = self.scan.ignore;
        if file_type != FileType::Directory {
            let ignored = ignore.is_some_and(|patterns| patterns.excludes_in(&at.ignore, &path));
            let excluded = inside && self.exclude.is_some_and(|list| list.excludes_in(&at.exclude, &path[at.base..]));
            let wrong = on_the_way || file_type == FileType::Socket;
            return (!ignored && !excluded && !wrong).then_some(Verdict::Take);
        }
        let mut place = Place { wanted: wanted.filter(|wanted| !wanted.all), ..at.clone() };
        let mut conditional = false;
        if let Some(patterns) = ignore {
            let ignored;
            (ignored, place.ignore) = patterns.enter(&at.ignore, &path);
            if ignored && !on_the_way && !patterns.may_descend(&place.ignore, &path) {
                return None;
            }
            conditional |= ignored;
        }
        if let Some(patterns) = self.exclude.filter(|_| inside) {
            let excluded;
            (excluded, place.exclude) = patterns.enter(&at.exclude, &path[at.base..]);
            if excluded && !patterns.may_descend(&place.exclude, &path[at.base..]) {
                return None;
            }
            conditional |= excluded;
        }
        if !inside {
            place.base = path.len() + 1;
        }
        place.path = path;
        Some(Verdict::Descend { place, conditional })
    }

    fn entry(&self, name: &CStr, stat: &Statx) -> Entry {
        let (uid, gid) = match self.scan.owners {
            Owners::Root => (0, 0),
            Owners::Keep => (stat.stx_uid, stat.stx_gid),
        };
        let file_type = FileType::from_raw_mode(stat.stx_mode.into());
        let device = rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
        Entry {
            name: OsString::from_vec(name.to_bytes().to_vec()),
            kind: Kind::Special { file_type, device },
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid,
            gid,
            stamp: Stamp::of(stat),
            linked: stat.stx_nlink > 1,
            attributes: Vec::new(),
            on_the_way: false,
            conditional: false,
        }
    }

    /// A file whose bytes, or attributes, have to be read. Its stat is taken from the open file, before and after.
    fn file(&self, directory: BorrowedFd, name: &CStr, known: Option<Known>, at: &str) -> Result<Entry, ContextError> {
        let path = Path::new(at).join(OsStr::from_bytes(name.to_bytes()));
        let context = |errno: rustix::io::Errno| self.unreadable(&path.to_string_lossy(), errno.into());
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, name, flags, Mode::empty()).map_err(context)?;
        for _ in 0..READINGS_MAX {
            let began = SystemTime::now();
            let stat = stat(file.as_fd(), c"").map_err(context)?;
            let mut entry = self.entry(name, &stat);
            entry.attributes =
                attributes(file.as_fd()).map_err(|error| self.unreadable(&path.to_string_lossy(), error))?;
            // What the cache says holds for the file that was looked up, if this is still that one.
            let cached = known.and_then(|_| self.cache.get(&entry.stamp));
            let digest = match cached {
                Some(known) => known.digest,
                None => hash(file.as_fd()).map_err(context)?,
            };
            let after = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map_err(context)?;
            if Stamp::of(&after) == entry.stamp {
                let settled = cached.is_some() || entry.stamp.settled(began);
                entry.kind = Kind::File { digest, settled };
                let known = Known { digest, attributes: !entry.attributes.is_empty() };
                if cached.is_none() {
                    self.cache.put(&entry.stamp, known, began);
                }
                return Ok(entry);
            }
            rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).map_err(context)?;
        }
        Err(ContextError::Changed { path })
    }

    fn unreadable(&self, path: &str, source: io::Error) -> ContextError {
        ContextError::Unreadable { path: self.scan.root.join(path), source }
    }
}

fn stat(directory: BorrowedFd, name: &CStr) -> rustix::io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    rustix::fs::statx(directory, name, flags, StatxFlags::BASIC_STATS)
}

fn read_link(directory: BorrowedFd, name: &CStr) -> io::Result<OsString> {
    Ok(OsString::from_vec(rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes()))
}

/// The names in a directory, sorted.
fn names(directory: BorrowedFd) -> io::Result<Vec<CString>> {
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn hash(file: BorrowedFd) -> rustix::io::Result<[u8; 32]> {
    thread_local! { static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) } }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(BLOCK, 0);
        let mut digester = Digester::new();
        loop {
            match rustix::io::read(file, &mut buffer[..]) {
                Ok(0) => return Ok(digester.finish_bytes()),
                Ok(read) => digester.update(&buffer[..read]),
                Err(rustix::io::Errno::INTR) => (),
                Err(error) => return Err(error),
            }
        }
    })
}

/// The extended attributes that a copy keeps, sorted.
pub(crate) fn attributes(file: BorrowedFd) -> io::Result<Attributes> {
    use rustix::io::Errno;
    let mut list = vec![0u8; 1024];
    let length = loop {
        match rustix::fs::flistxattr(file, &mut list[..]) {
            Ok(length) => break length,
            Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Err(Errno::RANGE) if list.len() < 1 << 16 => list.resize(1 << 16, 0),
            Err(error) => return Err(error.into()),
        }
    };
    let mut attributes = Attributes::new();
    for name in list[..length].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        let bytes = name.to_bytes();
        if bytes == b"security.capability" || (bytes.starts_with(b"user.") && !bytes.starts_with(b"user.overlay.")) {
            let mut value = vec![0; 1 << 16]; // the kernel's limit
            let length = rustix::fs::fgetxattr(file, name, &mut value[..])?;
            value.truncate(length);
            attributes.push((name.to_owned(), value));
        }
    }
    attributes.sort_unstable();
    Ok(attributes)
}

/// Drops the excluded directories that stayed empty and computes the digest, children before parents.
fn merkle(directories: &mut [Listing], parents: bool) -> Digest {
    let mut digests = vec![[0; 32]; directories.len()];
    for id in (0..directories.len()).rev() {
        let mut entries = std::mem::take(&mut directories[id].entries);
        entries.retain(|entry| match entry.kind {
            Kind::Directory(below) => !entry.conditional || !directories[below.0].entries.is_empty(),
            _ => true,
        });
        let mut digester = Digester::new();
        digester.field(b"forge tree v1");
        for entry in &entries {
            let own = parents || !entry.on_the_way;
            digester.field(entry.name.as_bytes());
            let metadata = if own { [entry.mode, entry.uid, entry.gid] } else { [0; 3] };
            metadata.iter().for_each(|number| digester.update(&number.to_le_bytes()));
            let attributes = match entry.kind {
                Kind::Directory(below) => &directories[below.0].attributes,
                _ => &entry.attributes,
            };
            for (name, value) in attributes.iter().filter(|_| own) {
                digester.field(name.to_bytes());
                digester.field(value);
            }
            match &entry.kind {
                Kind::File { digest, .. } => digest_kind(&mut digester, b"file", digest),
                Kind::Directory(below) => digest_kind(&mut digester, b"directory", &digests[below.0]),
                Kind::Link(target) => digest_kind(&mut digester, b"link", target.as_bytes()),
                Kind::Special { file_type, device } => {
                    digester.update(&file_type.as_raw_mode().to_le_bytes());
                    digest_kind(&mut digester, b"special", &device.to_le_bytes());
                }
            }
        }
        digests[id] = digester.finish_bytes();
        directories[id].entries = entries;
    }
    Digest::from_sha256(digests[0])
}

fn digest_kind(digester: &mut Digester, kind: &[u8], value: &[u8]) {
    digester.field(kind);
    digester.field(value);
}

#[cfg(test)]
mod tests;
