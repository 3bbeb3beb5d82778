//! What shows through from lower layers: one directory of a stack in overlay form, found without a mount.
//!
//! As in the kernel, no symbolic link on the way is followed: what has a directory's name and is none hides all
//! directories of that name below it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use super::Driver;
use crate::walk::DIRECTORY;
use crate::{Context, Result};

/// Layers in overlay form, top first.
pub(super) struct Stack<'a> {
    pub layers: &'a [PathBuf],
    pub driver: Driver,
}

/// What one layer says about a directory.
enum Seen {
    It(File),
    /// Whatever lower layers have there does not show.
    Hidden,
    Nothing,
}

impl Stack<'_> {
    /// The directory at `path`, which is relative, if the stack shows one; the topmost, whose attributes are seen.
    pub(super) fn directory(&self, path: &Path) -> Result<Option<File>> {
        for layer in self.layers {
            match self.look(layer, path)? {
                Seen::It(directory) => return Ok(Some(directory)),
                Seen::Hidden => return Ok(None),
                Seen::Nothing => {}
            }
        }
        Ok(None)
    }

    fn look(&self, layer: &Path, path: &Path) -> Result<Seen> {
        let top = File::from(openat(CWD, layer, DIRECTORY, Mode::empty()).context("open directory", layer)?);
        if path.as_os_str().is_empty() {
            return Ok(Seen::It(top));
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        if let Ok(directory) = openat2(&top, path, DIRECTORY, Mode::empty(), resolve) {
            return Ok(Seen::It(directory.into()));
        }
        let (mut directory, mut opaque) = (top, false);
        for name in path {
            directory = match openat(&directory, name, DIRECTORY, Mode::empty()) {
                Ok(inner) => inner.into(),
                Err(Errno::NOENT) if opaque => return Ok(Seen::Hidden),
                Err(Errno::NOENT) => return Ok(Seen::Nothing),
                Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Seen::Hidden),
                Err(error) => return Err(error).context("open directory", &layer.join(path)),
            };
            opaque |= self.driver.is_opaque(&directory).context("read attributes of", &layer.join(path))?;
        }
        Ok(Seen::It(directory))
    }

    /// Whether all that these layers have at `path` and below is hidden by `upper`, a layer above them that has this
    /// directory.
    pub(super) fn is_hidden_by(&self, upper: &Path, path: &Path) -> Result<bool> {
        for outer in path.ancestors().filter(|outer| !outer.as_os_str().is_empty()) {
            let full = upper.join(outer);
            let directory = openat(CWD, &full, DIRECTORY, Mode::empty()).context("open directory", &full)?;
            if self.driver.is_opaque(&directory).context("read attributes of", &full)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Driver {
    /// Whether a directory of this driver's hides what its parents hold.
    pub(super) fn is_opaque(self, directory: impl AsFd) -> rustix::io::Result<bool> {
        // Plain keeps its trees where another driver may have been before.
        let marks = match self {
            Driver::Plain => &[Driver::Plain, Driver::Overlay][..],
            ref only => std::slice::from_ref(only),
        };
        for mark in marks {
            let mut value = [0u8; 8];
            match rustix::fs::fgetxattr(&directory, mark.opaque_attribute(), &mut value) {
                Ok(length) if value[..length] == *b"y" => return Ok(true),
                // A value that long is not one of overlay's.
                Ok(_) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::RANGE) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(found: Option<File>) -> Option<u32> {
        found.map(|directory| directory.metadata().unwrap().permissions().mode() & 0o777)
    }

    /// A stack, top first, where every directory's mode says which layer it is of.
    #[test]
    fn the_topmost_directory_that_shows_is_found() {
        let place = tempfile::tempdir().unwrap();
        let outside = place.path().join("outside");
        fs::create_dir_all(outside.join("x")).unwrap();
        let layers: Vec<PathBuf> = ["top", "middle", "bottom"].map(|name| place.path().join(name)).into();
        let make = |layer: usize, path: &str| {
            fs::create_dir_all(layers[layer].join(path)).unwrap();
            let mode = fs::Permissions::from_mode(0o700 + layer as u32);
            fs::set_permissions(layers[layer].join(path), mode).unwrap();
        };
        for path in ["", "all", "low", "low/deep", "hidden", "hidden/x", "real", "real/x", "cut", "cut/x"] {
            make(2, path);
        }
        symlink(&outside, layers[2].join("link")).unwrap();
        for path in ["", "all", "middle", "cut"] {
            make(1, path);
        }
        fs::write(layers[1].join("hidden"), "").unwrap();
        let opaque = Driver::Plain.opaque_attribute();
        if rustix::fs::setxattr(layers[1].join("cut"), opaque, b"y", rustix::fs::XattrFlags::empty()).is_err() {
            std::io::Write::write_all(&mut std::io::stderr(), b"skipped: no user attributes here\n").unwrap();
            return;
        }
        symlink("middle", layers[1].join("real")).unwrap();
        // A directory where lower layers have a link.
        for path in ["", "link"] {
            make(0, path);
        }
        let stack = Stack { layers: &layers, driver: Driver::Plain };
        for (path, expect) in [
            ("", Some(0o700)),
            ("all", Some(0o701)),
            ("middle", Some(0o701)),
            ("low", Some(0o702)),
            ("low/deep", Some(0o702)),
            ("low/deep/none", None),
            ("hidden", None),
            ("hidden/x", None),
            ("real", None),
            ("real/x", None),
            ("cut", Some(0o701)),
            ("cut/x", None),
            ("link", Some(0o700)),
            ("link/x", None),
        ] {
            assert_eq!(mode(stack.directory(Path::new(path)).unwrap()), expect, "{path}");
        }
    }
}
