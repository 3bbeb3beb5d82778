//! A root file system as plain files: `type=tar` and `type=local`.
//!
//! Both are the tar of the merged root, which has no whiteouts; a directory is that tar, extracted. So the two say the
//! same, and what a build left can lead the extraction nowhere: it happens inside the destination as in a root.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::thread;

use forge_snapshotter::layer::{self, ApplySummary, DiffOptions, DiffSummary, ExtractOptions, Ids};
use forge_snapshotter::{Context, Driver};

use crate::{CHUNK, During, Result};

#[derive(Clone, Debug)]
pub struct DirectoryOptions {
    /// [`Ids::Keep`] where this process may give files away.
    pub ids: Ids,
    /// The owner of all files, instead of those that they have: for the directory of an ordinary user.
    pub owner: Option<(u32, u32)>,
    /// Times after this one become this one.
    pub epoch: Option<i64>,
}

/// Writes the tree below `root`, a mounted view, as a tar.
pub fn write_tar(root: &Path, driver: Driver, epoch: Option<i64>, out: &mut dyn Write) -> Result<DiffSummary> {
    let mut out = BufWriter::with_capacity(CHUNK, out);
    let summary = layer::diff(root, &DiffOptions { driver, clamp_mtime: epoch }, &mut out)?;
    out.flush().during("write", "the tar")?;
    Ok(summary)
}

/// Merges the tree below `root`, a mounted view, into `destination`, which is made if it is missing. What is there under
/// the same names is replaced (a directory by a file, too), the rest stays.
pub fn write_dir(root: &Path, driver: Driver, destination: &Path, options: &DirectoryOptions) -> Result<ApplySummary> {
    std::fs::create_dir_all(destination).context("create", destination)?;
    let (reader, mut writer) = io::pipe().during("create", "a pipe")?;
    let extract = ExtractOptions { ids: options.ids, owner: options.owner, max_bytes: None };
    thread::scope(|scope| {
        let writing = scope.spawn(move || write_tar(root, driver, options.epoch, &mut writer));
        let mut reader = BufReader::with_capacity(CHUNK, reader);
        let mut extracted = layer::extract_archive(&mut reader, destination, Path::new("/"), &extract);
        if extracted.is_ok() {
            // Blocks after the end of the archive; left unread they would break the writer's pipe.
            if let Err(error) = io::copy(&mut reader.by_ref(), &mut io::sink()) {
                extracted = Err(error).context("read the tar for", destination);
            }
        }
        drop(reader);
        let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (extracted, written) {
            (Ok(summary), written) => written.map(|_| summary),
            // The first cause: a reader that stopped breaks the pipe, a writer that stopped cuts the archive short.
            (Err(_), Err(cause)) if !is_broken_pipe(&cause) => Err(cause),
            (Err(error), _) => Err(error.into()),
        }
    })
}

fn is_broken_pipe(error: &crate::Error) -> bool {
    let source = match error {
        crate::Error::Store(forge_snapshotter::Error::Io { source, .. }) => source,
        crate::Error::Stream { source, .. } => source,
        _ => return false,
    };
    source.kind() == io::ErrorKind::BrokenPipe
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    const KEEP: DirectoryOptions = DirectoryOptions { ids: Ids::Keep, owner: None, epoch: None };

    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir_all(path("etc/empty")).unwrap();
        fs::write(path("etc/name"), "value").unwrap();
        fs::set_permissions(path("etc/name"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::hard_link(path("etc/name"), path("etc/same")).unwrap();
        symlink("../etc/name", path("etc/link")).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(path("etc/name"), Some(12), Some(34)).unwrap();
        }
        fs::File::open(path("etc/name")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        root
    }

    fn options() -> DirectoryOptions {
        match rustix::process::geteuid().is_root() {
            true => KEEP,
            false => DirectoryOptions { ids: Ids::Single, ..KEEP },
        }
    }

    #[test]
    fn a_directory_is_merged_into() {
        let (root, destination) = (tree(), tempfile::tempdir().unwrap());
        let out = |name: &str| destination.path().join("out").join(name);
        fs::create_dir_all(out("etc/empty/stays")).unwrap();
        fs::write(out("etc/name"), "old").unwrap();
        fs::write(out("mine"), "stays").unwrap();
        for _ in 0..2 {
            write_dir(root.path(), Driver::Plain, &destination.path().join("out"), &options()).unwrap();
        }
        assert_eq!(fs::read_to_string(out("etc/name")).unwrap(), "value");
        assert_eq!(fs::read_link(out("etc/link")).unwrap(), Path::new("../etc/name"));
        assert!(out("mine").exists() && out("etc/empty/stays").exists());
        let (name, same) = (fs::metadata(out("etc/name")).unwrap(), fs::metadata(out("etc/same")).unwrap());
        assert_eq!((name.ino(), name.mode() & 0o7777, name.mtime()), (same.ino(), 0o640, 0));
        if rustix::process::geteuid().is_root() {
            assert_eq!((name.uid(), name.gid()), (12, 34));
        }
    }

    #[test]
    fn links_that_lie_in_the_destination_lead_nowhere_else() {
        let (root, destination, outside) = (tree(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(outside.path(), destination.path().join("etc")).unwrap();
        // Whether it is replaced or refused: nothing is written through it.
        drop(write_dir(root.path(), Driver::Plain, destination.path(), &options()));
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_tar_holds_the_tree_and_is_the_same_twice() {
        let root = tree();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        write_tar(root.path(), Driver::Plain, Some(0), &mut first).unwrap();
        write_tar(root.path(), Driver::Plain, Some(0), &mut second).unwrap();
        assert!(first == second);
        let names: Vec<String> = tar::Archive::new(&first[..])
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["etc/", "etc/empty/", "etc/link", "etc/name", "etc/same"]);
    }

    #[test]
    fn the_first_cause_is_told() {
        let (root, destination) = (tree(), tempfile::tempdir().unwrap());
        let error = write_dir(&root.path().join("none"), Driver::Plain, destination.path(), &options()).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
        let file = destination.path().join("file");
        fs::write(&file, "not a directory").unwrap();
        let error = write_dir(root.path(), Driver::Plain, &file, &options()).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
    }
}
