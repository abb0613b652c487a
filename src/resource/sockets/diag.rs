//! What the kernel knows of a unix socket and tells nobody who has it: sock_diag(7).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket, socketpair,
};
use nix::sys::stat::fstat;

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

/// All unix sockets of our own network namespace, as they were when it was made.
pub(super) struct Diag {
    netlink: OwnedFd,
    all: BTreeMap<u32, Entry>,
}

impl Diag {
    pub(super) fn open() -> Result<Self> {
        let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
        let netlink = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkSockDiag);
        let mut diag = Self { netlink: netlink.call("socket")?, all: BTreeMap::new() };
        diag.all = diag.ask(None)?;
        Ok(diag)
    }

    /// Is that socket in the namespace that we ask in?
    pub(super) fn is_beside(&self, other: &impl AsFd) -> Result<bool> {
        let cookie = |socket| option(socket, SO_NETNS_COOKIE, 8).call("getsockopt(SO_NETNS_COOKIE)");
        Ok(cookie(self.netlink.as_fd())? == cookie(other.as_fd())?)
    }

    /// The socket with this inode number; `None` if there is none, or if the kernel cannot tell.
    pub(super) fn entry(&self, inode: u32) -> Result<Option<Entry>> {
        match self.all.get(&inode) {
            Some(entry) => Ok(Some(*entry)),
            // The list has been made in pieces: others that came or went meanwhile may have hidden it.
            None => Ok(self.ask(Some(inode))?.remove(&inode)),
        }
    }

    /// One of them, for which the kernel has to search among all, or all.
    fn ask(&self, inode: Option<u32>) -> Result<BTreeMap<u32, Entry>> {
        send(self.netlink.as_raw_fd(), &request(inode), MsgFlags::empty()).call("send")?;
        let mut found = BTreeMap::new();
        let mut answer = vec![0; 32 << 10];
        loop {
            let length = recv(self.netlink.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).call("recv")?;
            let told = parse(answer.get(..length).unwrap_or_default(), &mut found);
            match told.ok_or_else(|| Error::new(ErrorKind::Kernel, "sock_diag cannot be understood"))? {
                Told::More if inode.is_none() => {}
                Told::More | Told::All | Told::Failed(Errno::ENOENT) => return Ok(found),
                Told::Failed(errno) => return Err(Error::call("sock_diag", errno)),
            }
        }
    }
}

/// Does this kernel tell?
pub(crate) fn is_there() -> nix::Result<()> {
    let (one, _other) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    let inode = fstat(&one)?.st_ino as u32;
    match Diag::open().and_then(|diag| diag.entry(inode)) {
        Ok(Some(Entry { peer: Some(_), .. })) => Ok(()),
        Ok(_) => Err(Errno::ENOENT),
        Err(error) => Err(error.raw_errno().unwrap_or(Errno::EIO)),
    }
}

/// linux/netlink.h `struct nlmsghdr`.
const HEADER: usize = 16;
/// linux/unix_diag.h `struct unix_diag_msg`.
const MESSAGE: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// linux/unix_diag.h `struct unix_diag_req`, behind its header.
fn request(inode: Option<u32>) -> Vec<u8> {
    const NLM_F_REQUEST: u16 = 1;
    const NLM_F_DUMP: u16 = 0x300;
    const LENGTH: u32 = HEADER as u32 + 24;
    const UDIAG_SHOW_NAME: u32 = 1;
    const UDIAG_SHOW_PEER: u32 = 4;
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    let flags = if inode.is_some() { NLM_F_REQUEST } else { NLM_F_REQUEST | NLM_F_DUMP };
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]); // sequence number, port
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    // All states, which inode, what to show; no cookie.
    for word in [u32::MAX, inode.unwrap_or(0), UDIAG_SHOW_NAME | UDIAG_SHOW_PEER, u32::MAX, u32::MAX] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

/// How an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    More,
    All,
    Failed(Errno),
}

/// Takes all sockets out of an answer. `None`: it is none.
fn parse(mut rest: &[u8], found: &mut BTreeMap<u32, Entry>) -> Option<Told> {
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    while !rest.is_empty() {
        let length = usize::try_from(word(rest)?).ok().filter(|length| *length >= HEADER)?;
        let payload = rest.get(HEADER..length)?;
        match short(rest.get(4..)?)? {
            NLMSG_DONE => return Some(Told::All),
            NLMSG_ERROR => {
                return Some(Told::Failed(Errno::from_raw((word(payload)? as i32).wrapping_neg())));
            }
            SOCK_DIAG_BY_FAMILY => {
                let inode = word(payload.get(4..)?)?;
                found.insert(inode, attributes(payload.get(MESSAGE..)?)?);
            }
            _ => return None,
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Told::More)
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

    use super::*;

    fn inode(socket: &UnixStream) -> u32 {
        fstat(socket).unwrap().st_ino as u32
    }

    #[test]
    fn both_ends_of_a_pair() {
        let entry = |inode| Diag::open().unwrap().entry(inode).unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let number = inode(&one);
        let expected = Entry { peer: Some(inode(&other)), ..Entry::default() };
        let diag = Diag::open().unwrap();
        assert!(diag.is_beside(&one).unwrap());
        assert_eq!(diag.entry(number).unwrap(), Some(expected));
        one.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(entry(number), Some(Entry { shutdown: 2, ..expected }));
        assert_eq!(entry(inode(&other)).unwrap().shutdown, 1);
        drop(other);
        assert_eq!(entry(number), Some(Entry { peer: Some(0), shutdown: 3, has_name: false }));
        // One that is not on the list is asked for.
        let (late, _other) = UnixStream::pair().unwrap();
        assert!(!diag.all.contains_key(&inode(&late)) && diag.entry(inode(&late)).unwrap().is_some());
        drop(one);
        assert_eq!(entry(number), None);
    }

    #[test]
    fn more_sockets_than_one_answer_has_room_for() {
        let many: Vec<_> = (0..400).map(|_| UnixStream::pair().unwrap()).collect();
        let diag = Diag::open().unwrap();
        for (one, other) in &many {
            assert_eq!(diag.entry(inode(one)).unwrap().unwrap().peer, Some(inode(other)));
        }
    }

    #[test]
    fn answers_that_are_cut_off() {
        let mut answer = vec![0; HEADER + MESSAGE];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        answer[20..24].copy_from_slice(&7u32.to_ne_bytes());
        answer.extend([8, 0, 2, 0, 9, 0, 0, 0]);
        answer[..4].copy_from_slice(&40u32.to_ne_bytes());
        let read = |answer: &[u8]| {
            let mut found = BTreeMap::new();
            parse(answer, &mut found).map(|told| (told, found))
        };
        let whole = BTreeMap::from([(7, Entry { peer: Some(9), ..Entry::default() })]);
        assert_eq!(read(&answer), Some((Told::More, whole.clone())));
        for length in 1..answer.len() {
            assert_eq!(read(&answer[..length]), None, "{length}");
        }
        let done: Vec<u8> = [20, 0, 0, 0, 3, 0].into_iter().chain([0; 14]).collect();
        assert_eq!(read(&[&answer[..], &done].concat()), Some((Told::All, whole)));
        // An attribute, and a message, that is shorter than its own head.
        answer[32] = 3;
        assert_eq!(read(&answer), None);
        answer[0] = 15;
        assert_eq!(read(&answer), None);
    }
}
