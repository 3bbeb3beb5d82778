//! Layers: what one snapshot changed, as files in overlay form, as an OCI layer tar, as a compressed blob.
//!
//! ```text
//!   changes directory --diff--> tar --pack--> blob      names, types, owners, bytes, whiteouts
//!                     <-apply--     <-unpack-
//! ```
//! * The tar is a function of the tree: sorted, in one canonical form, nothing of the machine in it
//!   ([`diff`]). The blob is a function of the tar, the compression and its level, whatever the number of
//!   threads ([`pack`]).
//! * `apply(diff(x))` is `x`.
//! * What comes from outside is hostile: nothing that an archive says is written outside its directory, and
//!   what it declares is checked before it is believed ([`apply`]).
//!
//! Overlay form, as the kernel has it: a removed name is a character device 0/0 (or an empty file with the
//! `overlay.whiteout` attribute), a directory that hides what is below it has the attribute
//! `overlay.opaque` = "y". In a tar the same is `.wh.NAME` and `DIRECTORY/.wh..wh..opq`
//! (OCI image-spec, "Representing Changes").

mod apply;
mod archive;
mod changes;
mod codec;
mod diff;
mod digest;
mod header;
mod pack;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

use std::path::PathBuf;

pub use apply::{ExtractOptions, apply, extract_archive};
pub use codec::{Compression, MediaTypes, decoder};
pub use diff::{diff, diff_id};
pub use digest::content_digest;
pub use pack::{compress, pack};
pub use unpack::unpack;

use crate::{Digest, Driver, Error};

/// What is prefixed to a name that a layer removes.
const WHITEOUT: &[u8] = b".wh.";
/// Names of the aufs file system's own; all of them but [`OPAQUE`] mean nothing any more.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// In a directory that hides what lower layers have in it.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The longest path that an archive may name.
const MAX_PATH: usize = 4096;
/// The most entries that one archive may have.
const MAX_ENTRIES: u64 = 20_000_000;

#[derive(Clone, Debug)]
pub struct DiffOptions {
    /// Which attributes the changes are marked with.
    pub driver: Driver,
    /// Times after this one (seconds since 1970) become this one: SOURCE_DATE_EPOCH.
    pub clamp_mtime: Option<i64>,
}

/// What a layer's tar holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiffSummary {
    pub entries: u64,
    /// The length of the tar.
    pub bytes: u64,
    /// Sockets cannot be put into an archive; they are left out, as every other tool does.
    pub skipped_sockets: Vec<PathBuf>,
}

/// Whose files a layer's become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// Theirs.
    Keep,
    /// This process's: where one id alone is mapped nobody else can own a file. What differs is counted.
    Single,
}

#[derive(Clone, Debug)]
pub struct ApplyOptions {
    pub driver: Driver,
    /// The most bytes that the archive, and the files in it, may have.
    pub max_bytes: Option<u64>,
    pub ids: Ids,
}

/// What an archive turned into, and what of it could not be kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApplySummary {
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
    pub whiteouts: u64,
    /// Directories that the archive puts things in but has no entry for, in order; the empty path is its top. They
    /// are made 0755 root, until [`Snapshotter::inherit`](crate::Snapshotter::inherit) knows better.
    pub implied_directories: Vec<PathBuf>,
    /// Entries whose owner could not be set ([`Ids::Single`]).
    pub owners_left: u64,
    /// Device nodes left out because this process may not make any (a user namespace).
    pub skipped_devices: u64,
    /// Extended attributes left out: not a kind that images carry, or refused by the file system.
    pub skipped_xattrs: u64,
}

/// A layer as a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    pub diff_id: Digest,
    pub uncompressed_bytes: u64,
    pub blob: Digest,
    pub size_bytes: u64,
    pub entries: u64,
    pub skipped_sockets: Vec<PathBuf>,
}

/// Extended attributes that images carry: capabilities, and what users set themselves.
fn is_portable(name: &[u8]) -> bool {
    name == b"security.capability" || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

/// An error about one entry. Names are escaped: they may hold anything.
fn refuse(path: &[u8], reason: impl Into<String>) -> Error {
    Error::Layer { entry: path.escape_ascii().to_string(), reason: reason.into() }
}
