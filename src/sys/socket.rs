//! Sockets: their options as bytes, and what waits in their queues.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};

use super::check;

/// Their values have addresses in them, or are counted otherwise than in bytes.
const ODD: [i32; 3] = [libc::SO_ATTACH_FILTER, libc::SO_ATTACH_REUSEPORT_CBPF, libc::SO_ATTACH_BPF];

/// getsockopt(2) of SOL_SOCKET, for at most so many bytes.
pub(crate) fn option(socket: BorrowedFd<'_>, option: i32, most: usize) -> nix::Result<Vec<u8>> {
    if ODD.contains(&option) {
        return Err(Errno::EINVAL);
    }
    let mut value = vec![0u8; most];
    let mut length = most as libc::socklen_t;
    let (fd, to) = (socket.as_raw_fd(), value.as_mut_ptr().cast());
    // SAFETY: the kernel writes no more bytes than it is told that there is room for.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, to, &raw mut length) }.into())?;
    value.truncate(length as usize);
    Ok(value)
}

/// setsockopt(2) of SOL_SOCKET.
pub(crate) fn set_option(socket: BorrowedFd<'_>, option: i32, value: &[u8]) -> nix::Result<()> {
    if ODD.contains(&option) {
        return Err(Errno::EINVAL);
    }
    let (fd, from, length) = (socket.as_raw_fd(), value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: the kernel reads as many bytes as there are.
    check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, from, length) }.into()).map(drop)
}

/// SO_PEERPIDFD (since Linux 6.5): the process that SO_PEERCRED names, even if another has its number now.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    const SO_PEERPIDFD: i32 = 77;
    let bytes = option(socket, SO_PEERPIDFD, size_of::<RawFd>())?;
    let number = RawFd::from_ne_bytes(bytes.try_into().map_err(|_| Errno::EINVAL)?);
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// SO_GET_FILTER: is there one, classic or not?
pub(crate) fn has_filter(socket: BorrowedFd<'_>) -> bool {
    let mut length = 0;
    let (fd, nowhere) = (socket.as_raw_fd(), std::ptr::null_mut());
    // SAFETY: asked for no instructions at all, the kernel only counts them.
    let told =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, nowhere, &raw mut length) };
    told < 0 || length > 0
}

/// What recvmsg(2) says of a message that stays where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Peeked {
    /// Of the whole message, where there are such; of a stream, what has been read.
    pub(crate) length: usize,
    pub(crate) descriptors: usize,
    /// Pid, user and group, if the socket has SO_PASSCRED.
    pub(crate) sender: Option<[u32; 3]>,
}

/// MSG_PEEK, without waiting.
pub(crate) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<Peeked> {
    /// SCM_MAX_FD
    const MOST: usize = 253;
    let mut control = nix::cmsg_space!([RawFd; MOST], UnixCredentials);
    let mut vector = [IoSliceMut::new(buffer)];
    let flags =
        MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut vector, Some(&mut control), flags)?;
    let mut peeked = Peeked { length: message.bytes, ..Peeked::default() };
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::ScmRights(numbers) => {
                peeked.descriptors += numbers.len();
                for number in numbers {
                    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
                    drop(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            ControlMessageOwned::ScmCredentials(who) => {
                peeked.sender = Some([who.pid() as u32, who.uid(), who.gid()]);
            }
            _ => {}
        }
    }
    Ok(peeked)
}

nix::ioctl_read_bad!(tiocoutq, libc::TIOCOUTQ, i32);
nix::ioctl_read_bad!(siocatmark, SIOCATMARK, i32);

/// linux/sockios.h
const SIOCATMARK: u32 = 0x8905;

/// SIOCOUTQ: how much of what it has sent has not been read; of a unix socket, the memory that this takes.
pub(crate) fn unread_of_peer(socket: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut count = 0;
    // SAFETY: the request writes one int.
    unsafe { tiocoutq(socket.as_raw_fd(), &raw mut count) }?;
    Ok(count as usize)
}

/// SIOCATMARK: is an urgent byte (MSG_OOB) next? Never where the kernel has no such bytes.
pub(crate) fn is_at_mark(socket: BorrowedFd<'_>) -> bool {
    let mut answer = 0;
    // SAFETY: the request writes one int.
    unsafe { siocatmark(socket.as_raw_fd(), &raw mut answer) }.is_ok() && answer != 0
}
