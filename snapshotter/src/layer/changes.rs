//! Reads a directory in overlay form: what each thing in it *means* as a change.
//!
//! The tar and the content digest are both made from this, so they cannot disagree about what a layer holds.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{self, FileType, Mode, OFlags, Stat, XattrFlags};
use rustix::io::Errno;

use super::{WHITEOUT, is_portable, refuse};
use crate::walk::{self, Entry};
use crate::{Driver, Error, Result};

/// One change, in the order of the walk.
pub(super) struct Change<'a> {
    pub path: &'a [u8],
    pub stat: &'a Stat,
    pub kind: Kind,
    /// Sorted by name; portable ones only.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(super) enum Kind {
    /// The name is removed.
    Whiteout,
    Directory {
        /// What lower layers have in it is hidden.
        opaque: bool,
    },
    /// Open at its start; `stat.st_size` is its size.
    File(File),
    /// Another name of a thing that came earlier, at this path.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharacterDevice,
    BlockDevice,
    Fifo,
    Socket,
}

/// Calls `visit` with every change below `changes`.
pub(super) fn read(changes: &Path, driver: Driver, mut visit: impl FnMut(Change) -> Result<()>) -> Result<()> {
    let marks = Marks::of(driver);
    let mut first_names = HashMap::new();
    walk::walk(changes, |entry| {
        if entry.name.to_bytes().starts_with(WHITEOUT) {
            let reason = "a name that begins with \".wh.\" means a removal in an image layer; rename the file";
            return Err(refuse(entry.path, reason));
        }
        visit(interpret(changes, entry, marks, &mut first_names)?)
    })
}

/// The attributes that mark changes, as the overlay was mounted.
#[derive(Clone, Copy)]
pub(super) struct Marks {
    prefixes: &'static [&'static str],
}

impl Marks {
    pub(super) fn of(driver: Driver) -> Marks {
        let prefixes: &[&str] = match driver {
            Driver::Overlay => &["trusted.overlay."],
            Driver::OverlayUser => &["user.overlay."],
            Driver::Plain => &["trusted.overlay.", "user.overlay."],
        };
        Marks { prefixes }
    }

    /// The value of one mark, as "opaque".
    fn get(self, file: impl AsFd, mark: &str) -> rustix::io::Result<Option<Vec<u8>>> {
        for prefix in self.prefixes {
            if let Some(value) = get_xattr(&file, format!("{prefix}{mark}").as_bytes())? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// Marks a directory as opaque, with the first of the attributes that this process may set.
    pub(super) fn set_opaque(self, directory: impl AsFd) -> rustix::io::Result<()> {
        let mut refused = Errno::NOTSUP;
        for prefix in self.prefixes {
            match fs::fsetxattr(&directory, format!("{prefix}opaque"), b"y", XattrFlags::empty()) {
                Err(errno @ (Errno::PERM | Errno::NOTSUP)) => refused = errno,
                other => return other,
            }
        }
        Err(refused)
    }
}

fn interpret<'a>(
    changes: &Path,
    entry: &'a Entry,
    marks: Marks,
    first_names: &mut HashMap<(u64, u64), Vec<u8>>,
) -> Result<Change<'a>> {
    let failed = |action, errno: Errno| failed(changes, entry.path, action, errno);
    let stat = &entry.stat;
    let change = |kind| Change { path: entry.path, stat, kind, xattrs: Vec::new() };
    if let Some(directory) = entry.directory {
        let names = xattr_names(directory).map_err(|e| failed("list attributes of", e))?;
        refuse_indirect(entry.path, &names)?;
        let opaque = names.iter().any(|name| name.ends_with(b".overlay.opaque"))
            && marks.get(directory, "opaque").map_err(|e| failed("read attributes of", e))?.as_deref() == Some(b"y");
        let xattrs = portable(directory, names).map_err(|e| failed("read attributes of", e))?;
        return Ok(Change { path: entry.path, stat, kind: Kind::Directory { opaque }, xattrs });
    }
    let file_type = entry.file_type();
    if file_type == FileType::CharacterDevice && stat.st_rdev == 0 {
        return Ok(change(Kind::Whiteout));
    }
    // Only regular files have attributes that images carry, and only they are opened.
    let mut opened = None;
    if file_type == FileType::RegularFile {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = fs::openat(entry.parent, entry.name, flags, Mode::empty()).map_err(|e| failed("open", e))?;
        let names = xattr_names(&file).map_err(|e| failed("list attributes of", e))?;
        refuse_indirect(entry.path, &names)?;
        let marked = stat.st_size == 0 && names.iter().any(|name| name.ends_with(b".overlay.whiteout"));
        if marked && marks.get(&file, "whiteout").map_err(|e| failed("read attributes of", e))?.is_some() {
            return Ok(change(Kind::Whiteout));
        }
        opened = Some((file, names));
    }
    if stat.st_nlink > 1 {
        match first_names.entry((stat.st_dev, stat.st_ino)) {
            std::collections::hash_map::Entry::Occupied(first) => {
                return Ok(change(Kind::HardLink(first.get().clone())));
            }
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(entry.path.to_vec());
            }
        }
    }
    if let Some((file, names)) = opened {
        let xattrs = portable(&file, names).map_err(|e| failed("read attributes of", e))?;
        return Ok(Change { path: entry.path, stat, kind: Kind::File(file.into()), xattrs });
    }
    Ok(change(match file_type {
        FileType::Symlink => {
            let target = fs::readlinkat(entry.parent, entry.name, Vec::new()).map_err(|e| failed("read link", e))?;
            Kind::Symlink(target.into_bytes())
        }
        FileType::CharacterDevice => Kind::CharacterDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        _ => return Err(refuse(entry.path, "a kind of file that no image layer can hold")),
    }))
}

/// Changes that point at a lower layer instead of holding their content cannot be read on their own.
fn refuse_indirect(path: &[u8], names: &[Vec<u8>]) -> Result<()> {
    for (mark, feature) in [("redirect", "redirect_dir"), ("metacopy", "metacopy")] {
        let set = |name: &Vec<u8>| {
            name.strip_suffix(mark.as_bytes())
                .is_some_and(|rest| matches!(rest, b"trusted.overlay." | b"user.overlay."))
        };
        if names.iter().any(set) {
            let reason = format!(
                "made by an overlay with {feature}=on, which layers cannot express; mount it with {feature}=off"
            );
            return Err(refuse(path, reason));
        }
    }
    Ok(())
}

fn failed(changes: &Path, path: &[u8], action: &'static str, errno: Errno) -> Error {
    Error::Io { action, path: changes.join(walk::as_path(path)), source: errno.into() }
}

fn xattr_names(file: impl AsFd) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut list = vec![0; 1024];
    let length = loop {
        match fs::flistxattr(&file, &mut list[..]) {
            Err(Errno::RANGE) => list.resize(list.len() * 8, 0),
            // A file system without attributes has none.
            Err(Errno::NOTSUP) => break 0,
            other => break other?,
        }
    };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(<[u8]>::to_vec).collect())
}

fn portable(file: impl AsFd, mut names: Vec<Vec<u8>>) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    names.retain(|name| is_portable(name));
    names.sort_unstable();
    let mut xattrs = Vec::with_capacity(names.len());
    for name in names {
        if let Some(value) = get_xattr(&file, &name)? {
            xattrs.push((name, value));
        }
    }
    Ok(xattrs)
}

fn get_xattr(file: impl AsFd, name: &[u8]) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; 256];
    loop {
        match fs::fgetxattr(&file, name, &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                return Ok(Some(value));
            }
            Err(Errno::RANGE) => value.resize(value.len() * 16, 0),
            Err(Errno::NODATA | Errno::NOTSUP) => return Ok(None),
            Err(errno) => return Err(errno),
        }
    }
}
