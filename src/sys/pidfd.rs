//! pidfd_open(2), pidfd_getfd(2) and waiting on a pidfd.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::check;
use crate::Pid;

/// pidfd_open(2) of a process (since Linux 5.3). Close-on-exec.
pub(crate) fn open(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.raw(), 0) })?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The same of a thread (PIDFD_THREAD, since Linux 6.9), unless it is a leader.
pub(crate) fn open_thread(tid: Pid, no_leader: bool) -> nix::Result<OwnedFd> {
    let flags = if no_leader { libc::O_EXCL } else { 0 };
    // SAFETY: the call takes integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, tid.raw(), flags) })?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// pidfd_getfd(2) (since Linux 5.6): our own descriptor of the task's open file description. Close-on-exec.
pub(crate) fn get_fd(pidfd: BorrowedFd<'_>, fd: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// pidfd_send_signal(2): never hits a process that took over the number.
pub(crate) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo asks the kernel to fill it in like kill(2) does.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) }).map(drop)
}

/// process_mrelease(2) (since Linux 5.15): frees memory of a process that has been killed, beside its own exit.
pub(crate) fn free_memory(pidfd: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: the call takes integers only, and memory of ours is not what it frees.
    check(unsafe { libc::syscall(libc::SYS_process_mrelease, pidfd.as_raw_fd(), 0) }).map(drop)
}

/// linux/pidfd.h `struct pidfd_info`, in its first published size.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    credentials: [u32; 8],
    exit_code: i32,
}

nix::ioctl_readwrite!(pidfd_get_info, 0xff, 11, PidfdInfo);

/// PIDFD_GET_INFO (since Linux 6.13): the parent of a process.
pub(crate) fn parent(pid: Pid) -> nix::Result<Pid> {
    const PIDFD_INFO_PID: u64 = 1;
    let pidfd = open(pid)?;
    let mut info = PidfdInfo { mask: PIDFD_INFO_PID, ..PidfdInfo::default() };
    // SAFETY: the argument has the kernel's layout and the size that the request number carries.
    unsafe { pidfd_get_info(pidfd.as_raw_fd(), &mut info) }?;
    Ok(Pid::from(info.ppid))
}

/// PIDFD_GET_INFO with PIDFD_INFO_EXIT (since Linux 6.15): the wait status of a process that has been waited
/// for by somebody else. None while it has not ended, or was not opened as long as it lived.
pub(crate) fn exit_status(pidfd: BorrowedFd<'_>) -> nix::Result<Option<i32>> {
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the argument has the kernel's layout and the size that the request number carries.
    unsafe { pidfd_get_info(pidfd.as_raw_fd(), &mut info) }?;
    Ok((info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code))
}
