//! What open files of special kinds can be asked and told: signalfd, timerfd, epoll, inotify, fanotify, file handles,
//! attributes, owners.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::{check, kcmp_order};
use crate::Pid;

fn owned(result: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = check(result)? as RawFd;
    // SAFETY: only called with results of calls that make a descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// signalfd4(2): a new one that accepts these signals, as bits of one word.
pub(crate) fn signalfd(mask: u64) -> nix::Result<OwnedFd> {
    // SAFETY: the kernel reads a mask of the size that it is told.
    owned(unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of_val(&mask), libc::SFD_CLOEXEC)
    })
}

/// `struct itimerspec` in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TimerSpec {
    pub(crate) interval: u64,
    pub(crate) value: u64,
}

fn timespec(time: u64) -> libc::timespec {
    libc::timespec { tv_sec: (time / 1_000_000_000) as i64, tv_nsec: (time % 1_000_000_000) as i64 }
}

fn nanoseconds(time: libc::timespec) -> u64 {
    (time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64)
}

/// timerfd_create(2).
pub(crate) fn timerfd(clock: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes integers only.
    owned(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) }.into())
}

/// timerfd_settime(2).
pub(crate) fn set_timerfd(timer: BorrowedFd<'_>, flags: i32, spec: TimerSpec) -> nix::Result<()> {
    let spec = libc::itimerspec { it_interval: timespec(spec.interval), it_value: timespec(spec.value) };
    // SAFETY: the structure is live; the old value is not asked for.
    check(unsafe {
        libc::timerfd_settime(timer.as_raw_fd(), flags, &raw const spec, std::ptr::null_mut()).into()
    })
    .map(drop)
}

/// timerfd_gettime(2).
pub(crate) fn get_timerfd(timer: BorrowedFd<'_>) -> nix::Result<TimerSpec> {
    let mut spec = libc::itimerspec { it_interval: timespec(0), it_value: timespec(0) };
    // SAFETY: the structure is live for the call, which fills it in.
    check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut spec) }.into())?;
    Ok(TimerSpec { interval: nanoseconds(spec.it_interval), value: nanoseconds(spec.it_value) })
}

nix::ioctl_write_ptr!(tfd_ioc_set_ticks, b'T', 0, u64);

/// TFD_IOC_SET_TICKS: expirations that have not been read.
pub(crate) fn set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> nix::Result<()> {
    // SAFETY: the argument is the word that the request reads.
    unsafe { tfd_ioc_set_ticks(timer.as_raw_fd(), &raw const ticks) }.map(drop)
}

/// kcmp(2) KCMP_EPOLL_TFD: is a descriptor the same open file description as the one that an epoll instance
/// watches by this number? There may be several by one number: `offset` says which.
pub(crate) fn kcmp_epoll(
    file: (Pid, RawFd),
    epoll: (Pid, RawFd),
    (number, offset): (RawFd, u32),
) -> nix::Result<std::cmp::Ordering> {
    const KCMP_EPOLL_TFD: i32 = 7;
    // struct kcmp_epoll_slot: epoll, watched number, offset
    let slot = [epoll.1 as u32, number as u32, offset];
    // SAFETY: the kernel reads the three words of the slot.
    kcmp_order(unsafe {
        let (one, two) = (file.0.raw(), epoll.0.raw());
        libc::syscall(libc::SYS_kcmp, one, two, KCMP_EPOLL_TFD, file.1 as u64, slot.as_ptr())
    })
}

/// linux/eventpoll.h `struct epoll_params`, as one word: busy polling.
type EpollParams = u64;

nix::ioctl_write_ptr!(epoll_set_params, 0x8a, 1, EpollParams);
nix::ioctl_read!(epoll_get_params, 0x8a, 2, EpollParams);

/// EPIOCGPARAMS (since Linux 6.9). Without it there are none.
pub(crate) fn epoll_params(epoll: BorrowedFd<'_>) -> nix::Result<EpollParams> {
    let mut params = 0;
    // SAFETY: the structure is as large as a word, which is live for the call.
    match unsafe { epoll_get_params(epoll.as_raw_fd(), &raw mut params) } {
        Ok(_) => Ok(params),
        Err(Errno::EINVAL | Errno::ENOTTY) => Ok(0),
        Err(errno) => Err(errno),
    }
}

/// EPIOCSPARAMS.
pub(crate) fn set_epoll_params(epoll: BorrowedFd<'_>, params: EpollParams) -> nix::Result<()> {
    // SAFETY: the structure is as large as a word, which is live for the call.
    unsafe { epoll_set_params(epoll.as_raw_fd(), &raw const params) }.map(drop)
}

/// epoll_wait(2) without waiting, for the number of events alone: at most so many.
pub(crate) fn take_events(epoll: BorrowedFd<'_>, most: usize) -> nix::Result<usize> {
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; most];
    // SAFETY: the kernel writes at most as many events as the buffer has room for.
    check(unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, 0).into() })
        .map(|taken| taken as usize)
}

nix::ioctl_read_bad!(fionread, libc::FIONREAD, i32);
nix::ioctl_write_int_bad!(inotify_ioc_set_next_wd, nix::request_code_write!(b'I', 0, size_of::<i32>()));

/// FIONREAD: how many bytes can be read.
pub(crate) fn readable_bytes(file: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut count = 0;
    // SAFETY: the request writes one int.
    unsafe { fionread(file.as_raw_fd(), &raw mut count) }?;
    Ok(count as usize)
}

/// INOTIFY_IOC_SETNEXTWD: the number that the next watch gets.
pub(crate) fn set_next_watch(inotify: BorrowedFd<'_>, number: i32) -> nix::Result<()> {
    // SAFETY: the request takes an integer.
    unsafe { inotify_ioc_set_next_wd(inotify.as_raw_fd(), number) }.map(drop)
}

/// inotify_add_watch(2): the number of the watch.
pub(crate) fn add_watch(inotify: BorrowedFd<'_>, path: &CStr, mask: u32) -> nix::Result<i32> {
    // SAFETY: the path ends in a zero byte.
    check(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) }.into())
        .map(|number| number as i32)
}

/// fanotify_init(2).
pub(crate) fn fanotify(flags: u32, event_flags: u32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes integers only.
    owned(unsafe { libc::fanotify_init(flags, event_flags) }.into())
}

/// fanotify_mark(2) FAN_MARK_ADD.
pub(crate) fn fanotify_mark(group: BorrowedFd<'_>, how: u32, mask: u64, path: &CStr) -> nix::Result<()> {
    let (fd, flags) = (group.as_raw_fd(), libc::FAN_MARK_ADD | how);
    // SAFETY: the path ends in a zero byte.
    check(unsafe { libc::fanotify_mark(fd, flags, mask, libc::AT_FDCWD, path.as_ptr()) }.into()).map(drop)
}

/// open_by_handle_at(2) with O_PATH, of a file of the mount that the working directory is on.
pub(crate) fn open_handle(kind: i32, handle: &[u8]) -> nix::Result<OwnedFd> {
    /// linux/fs.h MAX_HANDLE_SZ.
    const LONGEST: usize = 128;
    if handle.len() > LONGEST {
        return Err(Errno::EINVAL);
    }
    // struct file_handle: length, kind, bytes; aligned for its integers
    let mut words = [0u32; 2 + LONGEST / 4];
    words[0] = handle.len() as u32;
    words[1] = kind as u32;
    for (word, bytes) in words[2..].iter_mut().zip(handle.chunks(4)) {
        let mut four = [0; 4];
        four.iter_mut().zip(bytes).for_each(|(slot, byte)| *slot = *byte);
        *word = u32::from_ne_bytes(four);
    }
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the structure is live, and has as many bytes behind its head as that says.
    owned(unsafe { libc::syscall(libc::SYS_open_by_handle_at, libc::AT_FDCWD, words.as_mut_ptr(), flags) })
}

/// statx(2): the attributes (STATX_ATTR_..) that a file has.
pub(crate) fn attributes(path: &CStr) -> nix::Result<u64> {
    // SAFETY: a C structure of integers, for which all zeroes is a value.
    let mut statx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in a zero byte, and the structure is live for the call, which fills it in.
    check(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), 0, 0, &raw mut statx) }.into())?;
    Ok(statx.stx_attributes)
}

/// Who gets signals about an open file: F_GETOWN_EX, F_GETOWNER_UIDS, F_GETSIG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Owner {
    /// F_OWNER_TID, F_OWNER_PID or F_OWNER_PGRP.
    pub(crate) kind: i32,
    /// 0 for nobody.
    pub(crate) number: i32,
    /// The real and the effective user of whoever has said so.
    pub(crate) users: [u32; 2],
    /// 0 for SIGIO.
    pub(crate) signal: i32,
}

pub(crate) fn owner(file: impl AsFd) -> nix::Result<Owner> {
    const F_GETSIG: i32 = 11;
    const F_GETOWN_EX: i32 = 16;
    const F_GETOWNER_UIDS: i32 = 17;
    let fd = file.as_fd().as_raw_fd();
    let (mut who, mut users) = ([0i32; 2], [0u32; 2]);
    // SAFETY: the command fills in two ints.
    Errno::result(unsafe { libc::fcntl(fd, F_GETOWN_EX, who.as_mut_ptr()) })?;
    // SAFETY: the command fills in two user ids.
    Errno::result(unsafe { libc::fcntl(fd, F_GETOWNER_UIDS, users.as_mut_ptr()) })?;
    // SAFETY: the command takes no argument.
    let signal = Errno::result(unsafe { libc::fcntl(fd, F_GETSIG) })?;
    Ok(Owner { kind: who[0], number: who[1], users, signal })
}
