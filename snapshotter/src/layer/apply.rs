//! An archive, as files: a layer into overlay form, or a plain archive into a root.
//!
//! The archive is hostile until shown otherwise. Whatever it names is resolved beneath its directory (see
//! [`super::tree`]); what it declares is checked before anything is written; attributes by which the overlay
//! itself is steered never come from outside.
//!
//! Later entries replace earlier ones of the same name; a directory onto a directory changes what the entry
//! says and keeps what is in it. A removal (`.wh.x`) speaks of lower layers alone, as the specification
//! wants it: an `x` of the same layer stays, before or after it, and hides what is below.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, Uid, XattrFlags};
use rustix::io::Errno;

use super::archive::{Archive, Content, Member, MemberKind};
use super::changes::Marks;
use super::tree::{Directory, Tree, clean, create_file, file_type, join, lstat, split, timestamps};
use super::{ApplyOptions, ApplySummary, Ids, OPAQUE, WHITEOUT, WHITEOUT_META, is_portable, refuse};
use crate::{Context, Error, Result, walk};

/// The longest name that a directory can hold.
const MAX_NAME: usize = 255;

/// Unpacks a layer into `into`, an empty directory, in overlay form. It needs no lower layer.
///
/// After an error `into` holds a part of the layer and must be thrown away.
pub fn apply(tar: &mut dyn Read, into: &Path, options: &ApplyOptions) -> Result<ApplySummary> {
    let tree = Tree::open(into, Some(Marks::of(options.driver)), options.ids == Ids::Keep)?;
    let top = tree.root();
    fs::fchmod(&top, Mode::from_raw_mode(0o755)).context("set the mode of", into)?;
    if options.ids == Ids::Keep {
        fs::fchown(&top, Some(Uid::ROOT), Some(Gid::ROOT)).context("set the owner of", into)?;
    }
    let mut writer = Writer::new(tree, options.ids, options.max_bytes);
    writer.layered = true;
    // Without an entry of its own the top has no time that anything could depend on.
    writer.tree.set_time_later(b"", (0, 0));
    writer.tree.imply_top()?;
    writer.run(tar)
}

/// How [`extract_archive`] unpacks.
#[derive(Clone, Debug)]
pub struct ExtractOptions {
    pub ids: Ids,
    /// Who owns all that is unpacked; else the owners that the archive names.
    pub owner: Option<(u32, u32)>,
    pub max_bytes: Option<u64>,
}

/// Unpacks an archive at `at` inside the root directory `into_root`: ADD of a local tar. Symbolic links of the
/// root are followed within it, existing files are replaced, and names that layers give a meaning have none.
pub fn extract_archive(
    tar: &mut dyn Read,
    into_root: &Path,
    at: &Path,
    options: &ExtractOptions,
) -> Result<ApplySummary> {
    use std::os::unix::ffi::OsStrExt;
    let tree = Tree::open(into_root, None, options.ids == Ids::Keep)?;
    let mut writer = Writer::new(tree, options.ids, options.max_bytes);
    writer.base = clean(at.as_os_str().as_bytes())?;
    writer.owner = options.owner;
    let base = writer.base.clone();
    writer.tree.directory(&base)?;
    writer.run(tar)
}

/// Where a member goes.
struct Place<'a> {
    parent: Directory,
    name: &'a [u8],
    /// From the top of the tree, for messages and for what is done at the end.
    path: &'a [u8],
}

struct Writer {
    tree: Tree,
    /// Into overlay form, where some names mean something; an ordinary root otherwise.
    layered: bool,
    /// Where in the tree the archive's top is.
    base: Vec<u8>,
    ids: Ids,
    owner: Option<(u32, u32)>,
    max_bytes: u64,
    summary: ApplySummary,
    buffer: Vec<u8>,
}

impl Writer {
    fn new(tree: Tree, ids: Ids, max_bytes: Option<u64>) -> Writer {
        Writer {
            tree,
            layered: false,
            base: Vec::new(),
            ids,
            owner: None,
            max_bytes: max_bytes.unwrap_or(u64::MAX),
            summary: ApplySummary::default(),
            buffer: vec![0; 256 * 1024],
        }
    }

    fn run(mut self, tar: &mut dyn Read) -> Result<ApplySummary> {
        let mut archive = Archive::new(tar, Some(self.max_bytes));
        while let Some(member) = archive.next()? {
            let inner = clean(&member.path)?;
            self.summary.entries += 1;
            if self.layered && self.marker(&inner)? {
                continue;
            }
            let path = if inner.is_empty() { self.base.clone() } else { join(&self.base, &inner) };
            self.member(&mut archive, &member, &path)?;
        }
        self.summary.implied_directories = self.tree.settle()?;
        Ok(self.summary)
    }

    /// Acts on names that mean something; false for all others.
    fn marker(&mut self, path: &[u8]) -> Result<bool> {
        let (directory, name) = split(path);
        let within = |prefix| directory.split(|byte| *byte == b'/').any(|component| component.starts_with(prefix));
        if within(WHITEOUT_META) || (name.starts_with(WHITEOUT_META) && name != OPAQUE) {
            // Leftovers of aufs.
            return Ok(true);
        }
        if within(WHITEOUT) {
            return Err(refuse(path, "is in a directory whose name means a removal"));
        }
        if name == OPAQUE {
            return self.opaque(directory).map(|()| true);
        }
        match name.strip_prefix(WHITEOUT) {
            None => Ok(false),
            Some(b"" | b"." | b"..") => Err(refuse(path, "removes a name that cannot exist")),
            Some(removed) => self.whiteout(directory, removed).map(|()| true),
        }
    }

    fn opaque(&mut self, path: &[u8]) -> Result<()> {
        if path.is_empty() {
            return Err(refuse(b"/", "hides all of the layers below it, which no overlay can express"));
        }
        self.summary.whiteouts += 1;
        let directory = self.tree.directory(path)?;
        self.tree.mark_opaque(&directory, path)
    }

    fn whiteout(&mut self, directory: &[u8], name: &[u8]) -> Result<()> {
        let parent = self.tree.directory(directory)?;
        let path = join(directory, name);
        self.summary.whiteouts += 1;
        let existing = lstat(&parent, name).map_err(|e| self.tree.failed("examine", &path, e))?;
        match existing.as_ref().map(file_type) {
            None => fs::mknodat(&parent, name, FileType::CharacterDevice, Mode::empty(), 0)
                .map_err(|e| self.tree.failed("make a whiteout at", &path, e)),
            Some(FileType::Directory) => self.tree.hide_lower(&parent, name, &path),
            // What is not a directory hides the name below by being there.
            Some(_) => Ok(()),
        }
    }

    fn member(&mut self, archive: &mut Archive, member: &Member, path: &[u8]) -> Result<()> {
        let (directory, name) = split(path);
        if path == self.base {
            return match member.kind {
                MemberKind::Directory => self.top(member, path),
                _ => Err(refuse(&member.path, "is not a directory but takes the place of the root")),
            };
        }
        if name.len() > MAX_NAME {
            return Err(refuse(path, format!("has a name of more than {MAX_NAME} bytes")));
        }
        let place = Place { parent: self.tree.directory(directory)?, name, path };
        match &member.kind {
            MemberKind::Directory => self.directory(member, &place),
            MemberKind::File(content) => {
                let file = self.fresh(&place, create_file)?;
                self.content(archive, &file, path, content)?;
                self.describe(&file, member, path)?;
                fs::futimens(&file, &timestamps(member.mtime)).map_err(|e| self.tree.failed("set the time of", path, e))
            }
            MemberKind::HardLink(target) => self.hard_link(target, &place),
            MemberKind::Symlink(target) => {
                self.fresh(&place, |parent, name| fs::symlinkat(&target[..], parent, name))?;
                self.describe_special(member, &place)
            }
            MemberKind::Fifo => self.special(member, &place, FileType::Fifo, 0),
            MemberKind::CharacterDevice(major, minor) => {
                self.special(member, &place, FileType::CharacterDevice, fs::makedev(*major, *minor))
            }
            MemberKind::BlockDevice(major, minor) => {
                self.special(member, &place, FileType::BlockDevice, fs::makedev(*major, *minor))
            }
        }
    }

    /// Makes something under a name, in the place of whatever had it.
    fn fresh<T>(&mut self, place: &Place, make: impl Fn(&OwnedFd, &[u8]) -> rustix::io::Result<T>) -> Result<T> {
        let made = match make(&place.parent, place.name) {
            Err(Errno::EXIST) => {
                self.tree.remove(&place.parent, place.name, place.path)?;
                make(&place.parent, place.name)
            }
            other => other,
        };
        made.map_err(|e| self.tree.failed("make", place.path, e))
    }

    /// The archive's entry for its own top.
    fn top(&mut self, member: &Member, path: &[u8]) -> Result<()> {
        let directory = self.tree.directory(path)?;
        self.tree.describe(&directory, path)?;
        self.describe(&directory, member, path)?;
        self.tree.set_time_later(path, member.mtime);
        Ok(())
    }

    fn directory(&mut self, member: &Member, place: &Place) -> Result<()> {
        let Place { parent, name, path } = place;
        match fs::mkdirat(parent, *name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let existing = lstat(parent, name).map_err(|e| self.tree.failed("examine", path, e))?;
                if existing.as_ref().map(file_type) != Some(FileType::Directory) {
                    // It takes the place of something that hid the name below, and must go on hiding it.
                    self.tree.remove(parent, name, path)?;
                    fs::mkdirat(parent, *name, Mode::RWXU).map_err(|e| self.tree.failed("make directory", path, e))?;
                    self.tree.hide_lower(parent, name, path)?;
                }
            }
            Err(errno) => return Err(self.tree.failed("make directory", path, errno)),
        }
        let directory = fs::openat(parent, *name, walk::DIRECTORY, Mode::empty());
        let directory = directory.map_err(|e| self.tree.failed("open directory", path, e))?;
        self.tree.describe(&directory, path)?;
        self.describe(&directory, member, path)?;
        self.tree.set_time_later(path, member.mtime);
        Ok(())
    }

    fn content(&mut self, archive: &mut Archive, file: &OwnedFd, path: &[u8], content: &Content) -> Result<()> {
        self.summary.bytes = self.summary.bytes.saturating_add(content.size);
        if self.summary.bytes > self.max_bytes {
            let max = self.max_bytes;
            return Err(refuse(path, format!("makes the files larger than the {max} bytes that are allowed")));
        }
        let mut end = 0;
        for (offset, length) in &content.extents {
            let (mut at, mut left) = (*offset, *length);
            while left > 0 {
                let most = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let read = archive.read_content(&mut self.buffer[..most])?;
                write_all_at(file, &self.buffer[..read], at).map_err(|e| self.tree.failed("write", path, e))?;
                at += read as u64;
                left -= read as u64;
            }
            end = at;
        }
        if end < content.size {
            fs::ftruncate(file, content.size).map_err(|e| self.tree.failed("write", path, e))?;
        }
        Ok(())
    }

    fn hard_link(&mut self, target: &[u8], place: &Place) -> Result<()> {
        let shown = target.escape_ascii().to_string();
        let target = join(&self.base, &clean(target)?);
        let (directory, target_name) = split(&target);
        let which = if self.layered { "which this layer does not hold before it" } else { "which does not exist" };
        let missing = || refuse(place.path, format!("is a hard link to \"{shown}\", {which}"));
        if target_name.is_empty() {
            return Err(missing());
        }
        let from = self.tree.existing(directory)?.ok_or_else(missing)?;
        let stat = lstat(&from, target_name).map_err(|e| self.tree.failed("examine", &target, e))?;
        let stat = stat.filter(|stat| !self.tree.is_whiteout(Some(stat))).ok_or_else(missing)?;
        if file_type(&stat) == FileType::Directory {
            return Err(refuse(place.path, format!("is a hard link to \"{shown}\", which is a directory")));
        }
        let existing = lstat(&place.parent, place.name).map_err(|e| self.tree.failed("examine", place.path, e))?;
        if existing.is_some_and(|existing| (existing.st_dev, existing.st_ino) == (stat.st_dev, stat.st_ino)) {
            return Ok(());
        }
        if target.starts_with(&[place.path, b"/"].concat()) {
            return Err(refuse(place.path, format!("is a hard link to \"{shown}\", which it would replace")));
        }
        self.fresh(place, |parent, name| fs::linkat(&from, target_name, parent, name, AtFlags::empty()))
    }

    fn special(&mut self, member: &Member, place: &Place, kind: FileType, device: u64) -> Result<()> {
        let make = |parent: &OwnedFd, name: &[u8]| fs::mknodat(parent, name, kind, Mode::empty(), device);
        match self.fresh(place, make) {
            Err(Error::Io { source, .. })
                if kind != FileType::Fifo && source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                self.summary.skipped_devices += 1;
                Ok(())
            }
            made => made.and_then(|()| self.describe_special(member, place)),
        }
    }

    /// Owner, then mode (a change of owner takes set-user-id bits away), then attributes (it takes those, too).
    fn describe(&mut self, file: &OwnedFd, member: &Member, path: &[u8]) -> Result<()> {
        if let Some((uid, gid)) = self.owner_of(member) {
            fs::fchown(file, Some(uid), Some(gid)).map_err(|e| self.owner_refused(member, path, e))?;
        }
        fs::fchmod(file, Mode::from_raw_mode(member.mode)).map_err(|e| self.tree.failed("set the mode of", path, e))?;
        for (name, value) in &member.xattrs {
            if !is_portable(name) {
                self.summary.skipped_xattrs += 1;
                continue;
            }
            match fs::fsetxattr(file, &name[..], value, XattrFlags::empty()) {
                Ok(()) => {}
                Err(Errno::PERM | Errno::NOTSUP) => self.summary.skipped_xattrs += 1,
                Err(errno) => return Err(self.tree.failed("set attributes of", path, errno)),
            }
        }
        Ok(())
    }

    /// The same for what cannot be opened. Such files have no attributes that images carry.
    fn describe_special(&mut self, member: &Member, place: &Place) -> Result<()> {
        let Place { parent, name, path } = place;
        if let Some((uid, gid)) = self.owner_of(member) {
            fs::chownat(parent, *name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| self.owner_refused(member, path, e))?;
        }
        if !matches!(member.kind, MemberKind::Symlink(_)) {
            fs::chmodat(parent, *name, Mode::from_raw_mode(member.mode), AtFlags::empty())
                .map_err(|e| self.tree.failed("set the mode of", path, e))?;
        }
        self.summary.skipped_xattrs += member.xattrs.len() as u64;
        fs::utimensat(parent, *name, &timestamps(member.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.tree.failed("set the time of", path, e))
    }

    fn owner_of(&mut self, member: &Member) -> Option<(Uid, Gid)> {
        let (uid, gid) = self.owner.unwrap_or((member.uid, member.gid));
        if self.ids == Ids::Single {
            self.summary.owners_left += u64::from((uid, gid) != (0, 0));
            return None;
        }
        Some((Uid::from_raw(uid), Gid::from_raw(gid)))
    }

    fn owner_refused(&self, member: &Member, path: &[u8], errno: Errno) -> Error {
        let (uid, gid) = self.owner.unwrap_or((member.uid, member.gid));
        match errno {
            Errno::INVAL => refuse(
                path,
                format!(
                    "belongs to {uid}:{gid}, which is not mapped here; give the user more ids in /etc/subuid and /etc/subgid"
                ),
            ),
            errno => self.tree.failed("set the owner of", path, errno),
        }
    }
}

fn write_all_at(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => (bytes, at) = (&bytes[written..], at + written as u64),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
