//! A child that does nothing: something to try system calls on.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::CloneArgs;
use super::blank::{clone_and_run, with_signals_blocked};
use crate::Pid;
use crate::arch::ENTRY_WORDS;
use crate::sys::{pidfd, wait};

/// It sleeps on the caller's memory, without a stack, until it is dropped, or for ten seconds.
///
/// The host hears nothing of it: it sends no signal when it ends, and waitpid(-1) does not see it (it is a
/// "clone child", wait(2)) unless it is traced; whoever reaps it then takes nothing that is needed.
pub(crate) struct Dummy {
    pid: Pid,
    pidfd: OwnedFd,
    ended: bool,
    /// What it executes and reads, as long as it lives.
    _program: Box<Program>,
}

struct Program {
    table: [[u64; ENTRY_WORDS]; 4],
    sleep: [u64; 2],
}

impl Program {
    fn new() -> Box<Self> {
        const LONGEST: u64 = 10;
        let mut program = Box::new(Self { table: Default::default(), sleep: [LONGEST, 0] });
        let sleep = (&raw const program.sleep) as u64;
        program.table = [
            [libc::SYS_prctl as u64, libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0, 0],
            [libc::SYS_nanosleep as u64, sleep, 0, 0, 0, 0, 0, 0],
            [libc::SYS_exit_group as u64, 0, 0, 0, 0, 0, 0, 0],
            [0; ENTRY_WORDS],
        ];
        program
    }
}

impl Dummy {
    /// clone3(2) with these arguments on top: shared memory and descriptors, a pidfd, no signal at its end.
    pub(crate) fn spawn(wanted: CloneArgs) -> nix::Result<Self> {
        let program = Program::new();
        let mut pidfd: i32 = -1;
        let args = CloneArgs {
            flags: wanted.flags | (libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_PIDFD) as u64,
            pidfd: (&raw mut pidfd) as u64,
            exit_signal: 0,
            ..wanted
        };
        let result = with_signals_blocked(|| {
            // SAFETY: the table ends in exit_group; it and what it points to live in the box, which `drop`
            // frees only after the child has ended. `args` is read before clone3 returns in the parent.
            unsafe { clone_and_run(&args, program.table.as_ptr().cast()) }
        });
        if result < 0 {
            return Err(Errno::from_raw(-result as i32));
        }
        // SAFETY: CLONE_PIDFD gave us this descriptor; nobody else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Ok(Self { pid: Pid::from(result as u32), pidfd, ended: false, _program: program })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Ends it and takes its status; its pidfd remains.
    pub(crate) fn end(&mut self) {
        while !self.ended {
            let _ = pidfd::send_signal(self.pidfd(), libc::SIGKILL);
            // Anything but its end, or that somebody else has seen its end, is an interruption.
            self.ended = matches!(wait::wait(self.pidfd()), Ok(Some(_)) | Err(Errno::ECHILD));
        }
    }
}

impl Drop for Dummy {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_until_dropped() {
        let dummy = Dummy::spawn(CloneArgs::default()).unwrap();
        let pid = dummy.pid();
        nix::sys::signal::kill(pid.nix(), None).unwrap();
        drop(dummy);
        assert_eq!(nix::sys::signal::kill(pid.nix(), None), Err(Errno::ESRCH));
    }
}
