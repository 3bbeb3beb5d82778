//! Messages between forge, its container helper and a starting container: one JSON value per `SOCK_SEQPACKET` packet, with
//! descriptors beside it.
//!
//! ```text
//! forge ── control ──> helper            Launch: the container in a memfd, its streams, its network
//! forge <─ lifeline ─> helper            Started, Ended; the other way Signal. Closed by forge: kill it
//! forge <─ report ──── the container     Failed or Terminal; closed by the exec that succeeds
//! ```

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::spec::Failure;

/// Beside it, in order: the container as JSON in a memfd, the lifeline, the report, the three streams (none for a terminal),
/// and the network namespace if one is joined.
#[derive(Debug, Serialize, Deserialize)]
pub struct Launch {
    pub streams: Streams,
    pub network: Network,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Streams {
    /// Made for this container, which may own them.
    Own,
    /// Somebody's: passed on as they are.
    Borrowed,
    Terminal {
        rows: u16,
        columns: u16,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    Host,
    Private,
    Joined,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum FromHelper {
    /// With process 1 as this machine numbers it.
    Started {
        pid: i32,
    },
    Ended(Ended),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub status: Status,
    pub out_of_memory: bool,
    /// What could not be cleaned up.
    pub left: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    Exited(i32),
    Killed(i32),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum FromContainer {
    Failed(Failure),
    /// With the terminal's master side.
    Terminal,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Signal(pub i32);

/// The longest text that a peer sends is a failure with a path in it.
const MESSAGE_BYTES: usize = 64 * 1024;
const DESCRIPTORS: usize = 8;

pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

pub fn send(socket: impl AsFd, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    sendmsg(socket, &[IoSlice::new(&body)], &mut beside, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// `None`: the other side is closed.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut body = vec![0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut body)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(Some((serde_json::from_slice(&body[..received.bytes])?, descriptors)))
}
