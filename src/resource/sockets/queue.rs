//! What has been sent to a unix socket and not been read.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};

use super::options::make_room;
use crate::error::{Error, ErrorKind, NameCall, Result};
use crate::image::{Bytes, Decode, Encode};
use crate::sys::file::readable_bytes;
use crate::sys::socket::{Peeked, option, peek, set_option, unread_of_peer};

/// By type of socket.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Stream,
    Datagram,
    Packets,
}

impl Kind {
    pub(super) fn of(socket: BorrowedFd<'_>) -> Result<Option<Self>> {
        let number = option(socket, libc::SO_TYPE, 4).call("getsockopt(SO_TYPE)")?;
        let kinds = [Self::Stream, Self::Datagram, Self::Packets];
        Ok(kinds.into_iter().find(|kind| (kind.sock_type() as i32).to_ne_bytes() == *number))
    }

    pub(super) fn sock_type(self) -> SockType {
        match self {
            Self::Stream => SockType::Stream,
            Self::Datagram => SockType::Datagram,
            Self::Packets => SockType::SeqPacket,
        }
    }

    /// Does one end hear when the other closes, or shuts down?
    pub(super) fn is_connected(self) -> bool {
        self != Self::Datagram
    }
}

/// Message by message; a stream is at most one.
#[derive(Encode, Decode, Debug, Default, PartialEq, Eq)]
pub(super) struct Queue(Vec<Bytes>);

/// How a sender is shown that nobody has asked about.
const NOBODY: [u32; 3] = [0, 65534, 65534];

impl Queue {
    /// Looks at it, and says what of it cannot be put back.
    pub(super) fn of(socket: BorrowedFd<'_>, kind: Kind) -> Result<std::result::Result<Self, &'static str>> {
        /// What decides about a look: where it begins, and whom else it shows. A pidfd for each would be ours to close.
        const LOOK: [(i32, i32); 3] =
            [(76 /* SO_PASSPIDFD */, 0), (libc::SO_PASSCRED, 1), (libc::SO_PEEK_OFF, 0)];
        let mut before = Vec::new();
        for (number, _) in LOOK {
            before.push((number, option(socket, number, 4).call("getsockopt")?));
        }
        let set = |number, value: &[u8]| set_option(socket, number, value).call("setsockopt");
        let asked = LOOK.into_iter().try_for_each(|(number, value)| set(number, &value.to_ne_bytes()));
        let seen = asked.and_then(|()| Self::read(socket, kind));
        before.iter().try_for_each(|(number, value)| set(*number, value))?;
        seen
    }

    fn read(socket: BorrowedFd<'_>, kind: Kind) -> Result<std::result::Result<Self, &'static str>> {
        let mut messages = Vec::new();
        let mut left = readable_bytes(socket).call("ioctl(FIONREAD)")?;
        loop {
            // Of a message, the first look tells the length; one that is empty is only seen once.
            let mut bytes = vec![0; if kind == Kind::Stream { left } else { 0 }];
            let mut seen = match (kind, left) {
                (Kind::Stream, 0) => break,
                _ => match peek(socket, &mut bytes) {
                    Err(Errno::EAGAIN) => break,
                    other => other.call("recvmsg(MSG_PEEK)")?,
                },
            };
            if kind != Kind::Stream && seen.length > 0 {
                bytes = vec![0; seen.length];
                seen = peek(socket, &mut bytes).call("recvmsg(MSG_PEEK)")?;
            }
            match seen {
                // All messages have a sender; the end has not.
                Peeked { length: 0, sender: None, .. } => break,
                Peeked { descriptors: 1.., .. } => {
                    return Ok(Err("descriptors are on their way through it (SCM_RIGHTS)"));
                }
                Peeked { sender, .. } if sender != Some(NOBODY) => {
                    return Ok(Err("what waits in it says who has sent it (SCM_CREDENTIALS)"));
                }
                Peeked { length, .. } => {
                    bytes.truncate(length);
                    left = left.saturating_sub(length);
                    messages.push(bytes);
                }
            }
        }
        if kind == Kind::Stream && !messages.is_empty() {
            messages = vec![messages.concat()];
        }
        Ok(Ok(Self(messages.into_iter().map(Bytes::from).collect())))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sends it by the other end.
    pub(super) fn send_by(&self, sender: BorrowedFd<'_>, kind: Kind) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        make_room(sender)?;
        for message in &self.0 {
            let mut rest = &**message;
            loop {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                let sent = send(sender.as_raw_fd(), rest, flags).call("send")?;
                rest = rest.get(sent..).unwrap_or_default();
                if rest.is_empty() {
                    break;
                }
                if kind != Kind::Stream {
                    return Err(Error::new(ErrorKind::Kernel, "a message was cut off"));
                }
            }
        }
        Ok(())
    }

    /// Is this all that takes `memory` bytes of the kernel's? An empty message is not seen a second time.
    pub(super) fn is_all(&self, kind: Kind, memory: usize) -> Result<bool> {
        if kind == Kind::Stream {
            return Ok(true);
        }
        let flags = SockFlag::SOCK_CLOEXEC;
        let (sender, _receiver) =
            socketpair(AddressFamily::Unix, kind.sock_type(), None, flags).call("socketpair")?;
        self.send_by(sender.as_fd(), kind)?;
        Ok(unread_of_peer(sender.as_fd()).call("ioctl(SIOCOUTQ)")? == memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(kind: Kind) -> (std::os::fd::OwnedFd, std::os::fd::OwnedFd) {
        socketpair(AddressFamily::Unix, kind.sock_type(), None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    fn queue(messages: &[&[u8]]) -> Queue {
        Queue(messages.iter().map(|message| Bytes::from(message.to_vec())).collect())
    }

    #[test]
    fn what_was_sent_is_seen_and_stays() {
        let large = vec![7u8; 150_000];
        for (kind, sent, seen) in [
            (Kind::Stream, &[&b"one"[..], b"two", &large][..], &[&[b"onetwo", &large[..]].concat()[..]][..]),
            (Kind::Datagram, &[b"one", b"", b"three"], &[b"one", b"", b"three"]),
            (Kind::Packets, &[b"", b"one", &large], &[b"", b"one", &large]),
            (Kind::Packets, &[], &[]),
        ] {
            let (one, other) = pair(kind);
            queue(sent).send_by(one.as_fd(), kind).unwrap();
            let memory = unread_of_peer(one.as_fd()).unwrap();
            let found = Queue::of(other.as_fd(), kind).unwrap().unwrap();
            assert_eq!(found, queue(seen), "{kind:?}");
            assert!(found.is_all(kind, memory).unwrap(), "{kind:?}");
            // Whom it would have shown, and from where on, is as before.
            assert_eq!(option(other.as_fd(), libc::SO_PASSCRED, 4).unwrap(), 0i32.to_ne_bytes());
            assert_eq!(option(other.as_fd(), libc::SO_PEEK_OFF, 4).unwrap(), (-1i32).to_ne_bytes());
            // The second look misses what is empty, and the memory tells.
            let again = Queue::of(other.as_fd(), kind).unwrap().unwrap();
            assert_eq!(again.is_all(kind, memory).unwrap(), !sent.contains(&&b""[..]), "{kind:?}");
            for message in sent.iter().filter(|_| kind != Kind::Stream) {
                let mut bytes = vec![0; 200_000];
                let length = nix::unistd::read(&other, &mut bytes).unwrap();
                assert_eq!(&bytes[..length], *message);
            }
        }
    }

    #[test]
    fn what_more_than_bytes_is_in_it() {
        use nix::sys::socket::{ControlMessage, UnixCredentials, sendmsg};
        for kind in [Kind::Stream, Kind::Datagram, Kind::Packets] {
            let (one, other) = pair(kind);
            let message = [std::io::IoSlice::new(b"x")];
            let numbers = [one.as_raw_fd(); 3];
            let more = [ControlMessage::ScmRights(&numbers)];
            sendmsg::<()>(one.as_raw_fd(), &message, &more, MsgFlags::empty(), None).unwrap();
            assert!(Queue::of(other.as_fd(), kind).unwrap().unwrap_err().contains("SCM_RIGHTS"));
            let (one, other) = pair(kind);
            nix::unistd::write(&one, b"a").unwrap();
            let who = UnixCredentials::new();
            let more = [ControlMessage::ScmCredentials(&who)];
            sendmsg::<()>(one.as_raw_fd(), &message, &more, MsgFlags::empty(), None).unwrap();
            assert!(Queue::of(other.as_fd(), kind).unwrap().unwrap_err().contains("SCM_CREDENTIALS"));
        }
    }

    #[test]
    fn the_end_is_no_message() {
        let (one, other) = pair(Kind::Packets);
        nix::unistd::write(&one, b"last").unwrap();
        drop(one);
        assert_eq!(Queue::of(other.as_fd(), Kind::Packets).unwrap().unwrap(), queue(&[b"last"]));
    }
}
