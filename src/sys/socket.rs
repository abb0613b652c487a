//! Sockets: their options as bytes, and what waits in their queues.

use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

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
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    let Received { length, descriptors, sender, is_whole } = receive(socket, buffer, flags)?;
    if !is_whole {
        return Err(Errno::ENOBUFS);
    }
    Ok(Peeked { length, descriptors: descriptors.len(), sender })
}

/// What recvmsg(2) gives besides the bytes.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) length: usize,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// As [`Peeked::sender`].
    pub(crate) sender: Option<[u32; 3]>,
    /// Otherwise some descriptors are lost: we may have no more of them.
    pub(crate) is_whole: bool,
}

/// SCM_MAX_FD: no message has more descriptors.
pub(crate) const MOST_DESCRIPTORS: usize = 253;

/// recvmsg(2). nix does not say which descriptors have come with a message that was cut off: they would stay open.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<Received> {
    /// For credentials, a pidfd and a label besides.
    const CONTROL: usize = (MOST_DESCRIPTORS * size_of::<RawFd>() + 512) / size_of::<u64>();
    let mut control = [0u64; CONTROL];
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all fields may be zero.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    // SAFETY: the header names a live buffer and live room for control messages, with their lengths.
    let length = check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) } as libc::c_long)?;
    let is_whole = header.msg_flags & libc::MSG_CTRUNC == 0;
    let mut received = Received { length: length as usize, descriptors: Vec::new(), sender: None, is_whole };
    // SAFETY: the kernel has filled in the header, and what it refers to.
    let mut part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    // SAFETY: a part that is not null lies in the room for control messages.
    while let Some(head) = unsafe { part.as_ref() } {
        // SAFETY: as above; behind the head of a part are so many bytes of it.
        let data = unsafe {
            let data: *const u8 = libc::CMSG_DATA(part);
            std::slice::from_raw_parts(data, head.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize))
        };
        received.take(head, data);
        // SAFETY: as above.
        part = unsafe { libc::CMSG_NXTHDR(&raw const header, part) };
    }
    Ok(received)
}

impl Received {
    fn take(&mut self, head: &libc::cmsghdr, data: &[u8]) {
        /// linux/socket.h: the sender's pidfd, if the socket has SO_PASSPIDFD.
        const SCM_PIDFD: i32 = 4;
        let words = data.as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word));
        match (head.cmsg_level, head.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => self.descriptors.extend(words.filter_map(ours)),
            (libc::SOL_SOCKET, SCM_PIDFD) => words.filter_map(ours).for_each(drop),
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                self.sender = words.collect::<Vec<_>>().try_into().ok();
            }
            _ => {}
        }
    }
}

/// A descriptor that the kernel has just given us; instead of a pidfd it may be an errno.
fn ours(number: u32) -> Option<OwnedFd> {
    let number = RawFd::try_from(number).ok()?;
    // SAFETY: nobody else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
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
