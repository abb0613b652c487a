//! What the kernel knows of a unix socket and tells nobody who has it: sock_diag(7).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::error::{Error, ErrorKind, NameCall, Result};
use crate::sys::socket::option;

/// linux/net.h SOL_SOCKET, SO_NETNS_COOKIE.
const SO_NETNS_COOKIE: i32 = 71;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) has_name: bool,
    /// The inode of the socket that it is connected to; 0 when nobody has that open.
    pub(super) peer: Option<u32>,
    /// RCV_SHUTDOWN and SEND_SHUTDOWN.
    pub(super) shutdown: u8,
}

/// A netlink socket in our own network namespace.
pub(super) struct Diag(OwnedFd);

impl Diag {
    pub(super) fn open() -> Result<Self> {
        let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
        let netlink = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkSockDiag);
        netlink.map(Self).call("socket")
    }

    /// Is that socket in the namespace that we ask in?
    pub(super) fn is_beside(&self, other: &impl AsFd) -> Result<bool> {
        let cookie = |socket| option(socket, SO_NETNS_COOKIE, 8).call("getsockopt(SO_NETNS_COOKIE)");
        Ok(cookie(self.0.as_fd())? == cookie(other.as_fd())?)
    }

    /// The unix socket with this inode number; `None` if there is none, or if the kernel cannot tell.
    pub(super) fn ask(&self, inode: u32) -> Result<Option<Entry>> {
        send(self.0.as_raw_fd(), &request(inode), MsgFlags::empty()).call("send")?;
        let mut answer = vec![0; 8192];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty()).call("recv")?;
        match parse(answer.get(..length).unwrap_or_default(), inode) {
            Some(Ok(entry)) => Ok(Some(entry)),
            Some(Err(Errno::ENOENT)) => Ok(None),
            Some(Err(errno)) => Err(Error::call("sock_diag", errno)),
            None => Err(Error::new(ErrorKind::Kernel, "sock_diag gives an answer that cannot be understood")),
        }
    }
}

/// linux/netlink.h `struct nlmsghdr`.
const HEADER: usize = 16;
/// linux/unix_diag.h `struct unix_diag_msg`.
const MESSAGE: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// linux/unix_diag.h `struct unix_diag_req`, behind its header.
fn request(inode: u32) -> Vec<u8> {
    const NLM_F_REQUEST: u16 = 1;
    const LENGTH: u32 = HEADER as u32 + 24;
    const UDIAG_SHOW_NAME: u32 = 1;
    const UDIAG_SHOW_PEER: u32 = 4;
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    bytes.extend([0; 8]); // sequence number, port
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    // All states, this inode, what to show; no cookie.
    for word in [u32::MAX, inode, UDIAG_SHOW_NAME | UDIAG_SHOW_PEER, u32::MAX, u32::MAX] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

/// `None`: this is no answer to the question.
fn parse(answer: &[u8], inode: u32) -> Option<std::result::Result<Entry, Errno>> {
    const NLMSG_ERROR: u16 = 2;
    match short(answer.get(4..)?)? {
        NLMSG_ERROR => Some(Err(Errno::from_raw((word(answer.get(HEADER..)?)? as i32).wrapping_neg()))),
        SOCK_DIAG_BY_FAMILY if word(answer.get(HEADER + 4..)?)? == inode => {
            attributes(answer.get(HEADER + MESSAGE..)?).map(Ok)
        }
        _ => None,
    }
}

fn attributes(mut rest: &[u8]) -> Option<Entry> {
    const UNIX_DIAG_NAME: u16 = 0;
    const UNIX_DIAG_PEER: u16 = 2;
    const UNIX_DIAG_SHUTDOWN: u16 = 6;
    let mut entry = Entry::default();
    while !rest.is_empty() {
        let length = usize::from(short(rest)?);
        let value = rest.get(4..length)?;
        match short(rest.get(2..)?)? {
            UNIX_DIAG_NAME => entry.has_name = true,
            UNIX_DIAG_PEER => entry.peer = Some(word(value)?),
            UNIX_DIAG_SHUTDOWN => entry.shutdown = *value.first()?,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(entry)
}

fn short(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::sys::stat::fstat;

    use super::*;

    fn inode(socket: &UnixStream) -> u32 {
        fstat(socket).unwrap().st_ino as u32
    }

    #[test]
    fn both_ends_of_a_pair() {
        let diag = Diag::open().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        assert!(diag.is_beside(&one).unwrap());
        let number = inode(&one);
        let expected = Entry { peer: Some(inode(&other)), ..Entry::default() };
        assert_eq!(diag.ask(number).unwrap(), Some(expected));
        one.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(diag.ask(number).unwrap(), Some(Entry { shutdown: 2, ..expected }));
        assert_eq!(diag.ask(inode(&other)).unwrap().unwrap().shutdown, 1);
        drop(other);
        let alone = Entry { peer: Some(0), shutdown: 3, has_name: false };
        assert_eq!(diag.ask(number).unwrap(), Some(alone));
        drop(one);
        assert_eq!(diag.ask(number).unwrap(), None);
    }

    #[test]
    fn answers_that_are_cut_off() {
        let mut answer = vec![0; HEADER + MESSAGE];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        answer[20..24].copy_from_slice(&7u32.to_ne_bytes());
        answer.extend([8, 0, 2, 0, 9, 0, 0, 0]);
        let whole = Entry { peer: Some(9), ..Entry::default() };
        assert_eq!(parse(&answer, 7), Some(Ok(whole)));
        assert_eq!(parse(&answer, 8), None);
        for length in (0..answer.len()).filter(|length| *length != HEADER + MESSAGE) {
            assert_eq!(parse(&answer[..length], 7), None, "{length}");
        }
        // An attribute that is shorter than its own head.
        answer[32] = 3;
        assert_eq!(parse(&answer, 7), None);
    }
}
