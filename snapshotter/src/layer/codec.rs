//! The compressions that layers travel in.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};

use crate::{Error, Result};

/// How a blob is compressed, and how hard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    None,
    /// 1 to 12; 6 is what everybody uses.
    Gzip(i32),
    /// 1 to 22; 3 is the library's own choice.
    Zstd(i32),
}

/// Whose names a manifest uses for its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaTypes {
    Oci,
    Docker,
}

impl Compression {
    pub const GZIP: Compression = Compression::Gzip(6);
    pub const ZSTD: Compression = Compression::Zstd(3);

    pub fn media_type(self, types: MediaTypes) -> &'static str {
        match (types, self) {
            (MediaTypes::Oci, Compression::None) => "application/vnd.oci.image.layer.v1.tar",
            (MediaTypes::Oci, Compression::Gzip(_)) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (MediaTypes::Oci, Compression::Zstd(_)) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (MediaTypes::Docker, Compression::None) => "application/vnd.docker.image.rootfs.diff.tar",
            (MediaTypes::Docker, Compression::Gzip(_)) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (MediaTypes::Docker, Compression::Zstd(_)) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        }
    }

    /// The level, where there is one to choose.
    pub fn level(self) -> Option<i32> {
        match self {
            Compression::None => None,
            Compression::Gzip(level) | Compression::Zstd(level) => Some(level),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::None => "uncompressed",
            Compression::Gzip(_) => "gzip",
            Compression::Zstd(_) => "zstd",
        })
    }
}

/// The most memory that a stream may make its decoder keep, as a power of two: what `zstd -d` takes unasked.
const WINDOW_LOG: u32 = 27;

/// Reads a stream as what its first bytes say it is; what says nothing is read as it is. All members and
/// frames are read, to the end of the input.
pub fn decoder<'a>(input: impl Read + Send + 'a) -> Result<Box<dyn Read + Send + 'a>> {
    let failed = |error: io::Error| Error::Archive { reason: format!("cannot be read: {error}") };
    let mut input = BufReader::with_capacity(128 * 1024, input);
    let mut head = [0; 6];
    let length = peek(&mut input, &mut head).map_err(failed)?;
    let input = io::Cursor::new(head).take(length as u64).chain(input);
    Ok(match &head[..length] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::Decoder::with_buffer(input).map_err(failed)?;
            decoder.window_log_max(WINDOW_LOG).map_err(failed)?;
            Box::new(decoder)
        }
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let memory = 3 << WINDOW_LOG;
            let stream = liblzma::stream::Stream::new_stream_decoder(memory, liblzma::stream::CONCATENATED);
            Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream.map_err(|error| failed(error.into()))?))
        }
        _ => Box::new(input),
    })
}

/// Reads the first bytes, fewer only where the input has no more.
fn peek(input: &mut impl BufRead, head: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < head.len() {
        match input.read(&mut head[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}
