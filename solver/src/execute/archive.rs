//! `ADD` of a local archive: known by its content, unpacked inside the root.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use forge_snapshotter::layer::{ExtractOptions, Ids, decoder, extract_archive};
use forge_snapshotter::{Digester, Error, Result};

const BLOCK: usize = 512;

/// Whether a file is a tar, compressed or not: it decodes, and begins with a member's header.
pub(super) fn is_archive(file: File) -> bool {
    let mut block = [0; BLOCK];
    // Whatever cannot be read as an archive is an ordinary file.
    decoder(file).is_ok_and(|mut tar| tar.read_exact(&mut block).is_ok()) && is_header(&block)
}

/// POSIX tar: the field at 148 is, in octal, the sum of the header's bytes with the field itself as blanks.
fn is_header(block: &[u8; BLOCK]) -> bool {
    let field = block[148..156].iter().map(|byte| char::from(*byte)).collect::<String>();
    let digits = field.trim_matches([' ', '\0']);
    let Ok(stored) = i64::from_str_radix(digits, 8) else { return false };
    let sum = |value: fn(u8) -> i64| {
        let bytes = block.iter().enumerate();
        bytes.map(|(at, byte)| if (148..156).contains(&at) { 32 } else { value(*byte) }).sum::<i64>()
    };
    block[0] != 0 && (stored == sum(|byte| byte.into()) || stored == sum(|byte| byte.cast_signed().into()))
}

/// Unpacks below `at` and gives the sha256 of the archive as it was read.
pub(super) fn unpack(file: File, root: &Path, at: &Path, owner: Option<(u32, u32)>) -> Result<[u8; 32]> {
    let mut file = Hashing { file, digester: Digester::new() };
    let ids = if super::single_id() { Ids::Single } else { Ids::Keep };
    let options = ExtractOptions { ids, owner, max_bytes: None };
    extract_archive(&mut decoder(&mut file)?, root, at, &options)?;
    // What a decoder leaves behind the archive's end belongs to the file all the same.
    io::copy(&mut file, &mut io::sink()).map_err(|source| Error::Io { action: "read", path: at.into(), source })?;
    Ok(file.digester.finish_bytes())
}

struct Hashing {
    file: File,
    digester: Digester,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.digester.update(&buffer[..read]);
        Ok(read)
    }
}
