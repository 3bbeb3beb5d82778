//! Digests: the one kind of name that content has in forge.
//!
//! A [`Digest`] is valid once it exists: `algorithm:hex` as the OCI image specification
//! ("Digests") defines it, so code that holds one never checks again.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// The name of some bytes, `sha256:<64 hex>` (or `sha512:<128 hex>` where a registry uses it).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(Arc<str>);

#[derive(Debug, thiserror::Error)]
#[error("invalid digest {0:?}: expected \"sha256:\" and 64 lower-case hexadecimal digits")]
pub struct InvalidDigest(String);

impl Digest {
    /// The sha256 digest of some bytes in memory.
    pub fn of(bytes: impl AsRef<[u8]>) -> Digest {
        let mut digester = Digester::new();
        digester.update(bytes.as_ref());
        digester.finish()
    }

    /// Reads to the end; for files use a buffered or large-block reader.
    pub fn of_reader(mut reader: impl Read) -> io::Result<(Digest, u64)> {
        let mut digester = Digester::new();
        let mut block = vec![0; 256 * 1024];
        loop {
            match reader.read(&mut block)? {
                0 => break,
                read => digester.update(&block[..read]),
            }
        }
        let size = digester.size();
        Ok((digester.finish(), size))
    }

    pub fn from_sha256(bytes: [u8; 32]) -> Digest {
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        push_hex(&mut text, &bytes);
        Digest(text.into())
    }

    pub fn algorithm(&self) -> &str {
        &self.0[..6]
    }

    pub fn hex(&self) -> &str {
        &self.0[7..]
    }

    /// The first twelve hex digits: what people are shown.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)].into());
        text.push(DIGITS[usize::from(byte & 15)].into());
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Digest, InvalidDigest> {
        let length = match text.split_once(':') {
            Some(("sha256", hex)) => (hex.len() == 64).then_some(hex),
            Some(("sha512", hex)) => (hex.len() == 128).then_some(hex),
            _ => None,
        };
        match length {
            Some(hex) if hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) => Ok(Digest(text.into())),
            _ => Err(InvalidDigest(text.chars().take(160).collect())),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A running sha256 that counts what it has seen. It is a [`Write`], so bytes can be teed into it.
#[derive(Clone, Default)]
pub struct Digester {
    state: sha2::Sha256,
    size: u64,
}

impl Digester {
    pub fn new() -> Digester {
        Digester::default()
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
        self.size += bytes.len() as u64;
    }

    /// Adds a length and then the bytes: fields fed this way cannot run into each other.
    pub fn field(&mut self, bytes: &[u8]) {
        self.update(&(bytes.len() as u64).to_le_bytes());
        self.update(bytes);
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn finish(self) -> Digest {
        Digest::from_sha256(self.state.finalize().into())
    }

    pub fn finish_bytes(self) -> [u8; 32] {
        self.state.finalize().into()
    }
}

impl Write for Digester {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_the_empty_string_is_the_published_one() {
        let expect = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of("").as_str(), expect);
        assert_eq!(Digest::of("").algorithm(), "sha256");
    }

    #[test]
    fn only_well_formed_digests_parse() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(format!("sha256:{hex}").parse::<Digest>().is_ok());
        assert!(format!("sha512:{hex}{hex}").parse::<Digest>().is_ok());
        for bad in [
            format!("sha256:{}", &hex[1..]),
            format!("sha256:{}", hex.to_uppercase()),
            format!("md5:{hex}"),
            hex.to_owned(),
            "sha256:../../etc/passwd".to_owned(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
