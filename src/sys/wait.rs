//! waitid(2), for children and tracees alike, with signals of any number.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;
use crate::Pid;

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    Signal(i32),
}

/// Has it ended? Leaves its status for whoever waits for it. ECHILD: it is no (longer a) child or tracee of ours.
pub(crate) fn peek(pid: Pid) -> nix::Result<Option<Ended>> {
    waitid(libc::P_PID, pid.get(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL)
}

/// Waits for a process to end and takes its status. None: interrupted by something else.
pub(crate) fn wait(pidfd: BorrowedFd<'_>) -> nix::Result<Option<Ended>> {
    waitid(libc::P_PIDFD, pidfd.as_raw_fd() as u32, libc::WEXITED | libc::__WALL)
}

/// Has it ended? Takes its status. ECHILD: it is no (longer a) child or tracee of ours.
pub(crate) fn take(pid: Pid) -> nix::Result<Option<Ended>> {
    waitid(libc::P_PID, pid.get(), libc::WEXITED | libc::WNOHANG | libc::__WALL)
}

/// Takes the status of a process that has ended, if it is a child or tracee of ours.
pub(crate) fn reap(pid: Pid) {
    let _ = take(pid);
}

fn waitid(kind: libc::idtype_t, id: u32, options: i32) -> nix::Result<Option<Ended>> {
    // SAFETY: all-zero bytes are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is live and of the type that the call fills in.
    check(unsafe { libc::waitid(kind, id, &raw mut info, options) }.into())?;
    // SAFETY: waitid fills in the fields of a SIGCHLD, or leaves the zeroes.
    let (code, status) = unsafe { (info.si_code, info.si_status()) };
    Ok(match code {
        libc::CLD_EXITED => Some(Ended::Code(status)),
        libc::CLD_KILLED | libc::CLD_DUMPED => Some(Ended::Signal(status)),
        // A stop of a tracee is reported whatever is asked for.
        _ => None,
    })
}
