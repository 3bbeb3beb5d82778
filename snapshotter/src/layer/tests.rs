//! Layers through their front doors: what is written is read back the same, the bytes are pinned, and
//! archives that lie change nothing but their own directory.

mod forms;
mod golden;
mod hostile;
mod real;
mod roundtrip;

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::*;
use crate::walk;

pub(super) const DIFF: DiffOptions = DiffOptions { driver: Driver::Overlay, clamp_mtime: None };
pub(super) const APPLY: ApplyOptions = ApplyOptions { driver: Driver::Overlay, max_bytes: None, ids: Ids::Keep };

/// Whether this process may make devices, give files away and set trusted attributes; says so if not.
pub(super) fn privileged() -> bool {
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::open(directory.path()).unwrap();
    let able = changes::Marks::of(Driver::Overlay).set_opaque(&file).is_ok()
        && rustix::fs::chown(directory.path(), Some(rustix::fs::Uid::from_raw(7)), None).is_ok();
    if !able {
        writeln_stderr("skipped: needs the privileges of root");
    }
    able
}

pub(super) fn writeln_stderr(text: &str) {
    use std::io::Write;
    writeln!(std::io::stderr(), "{text}").unwrap();
}

/// All that a file system says about a tree, its top left out, one line for each thing.
pub(super) fn dump(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut inodes = Vec::new();
    walk::walk(root, |entry| {
        let path = root.join(walk::as_path(entry.path));
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let same = inodes.iter().position(|inode| *inode == meta.ino()).unwrap_or(inodes.len());
        inodes.push(meta.ino());
        let content = match meta.file_type() {
            t if t.is_file() => Digest::of(std::fs::read(&path).unwrap()).short().to_owned(),
            t if t.is_symlink() => std::fs::read_link(&path).unwrap().as_os_str().as_bytes().escape_ascii().to_string(),
            t if t.is_char_device() || t.is_block_device() => format!("device {}", meta.rdev()),
            _ => String::new(),
        };
        let is_whiteout = meta.file_type().is_char_device() && meta.rdev() == 0;
        let details = match is_whiteout {
            true => "whiteout".to_owned(),
            false => format!(
                "{:o} {}:{} {}.{:09} {content} link to {same} {:?}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec(),
                xattrs(&path),
            ),
        };
        lines.push(format!("{} {details}", entry.path.escape_ascii()));
        Ok(())
    })
    .unwrap();
    lines
}

fn xattrs(path: &Path) -> Vec<String> {
    let mut list = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let mut all = Vec::new();
    for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 4096];
        let length = rustix::fs::lgetxattr(path, CString::new(name).unwrap(), &mut value[..]).unwrap();
        all.push(format!("{}={}", name.escape_ascii(), value[..length].escape_ascii()));
    }
    all.sort();
    all
}

pub(super) fn tar_of(changes: &Path) -> Vec<u8> {
    let mut tar = Vec::new();
    diff(changes, &DIFF, &mut tar).unwrap();
    tar
}
