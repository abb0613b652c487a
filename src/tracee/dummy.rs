//! A child that does nothing: something to try system calls on.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::CloneArgs;
use super::blank::{clone_and_run, with_signals_blocked};
use crate::Pid;
use crate::arch::ENTRY_WORDS;
use crate::sys::{pidfd, wait};

/// linux/sched.h; since Linux 5.5.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

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
    table: [[u64; ENTRY_WORDS]; 6],
    sleep: [u64; 2],
    /// The default action and an empty mask, as the kernel's structures.
    nothing: [u64; 4],
}

/// How it ends.
#[derive(Clone, Copy)]
enum End {
    /// When we kill it.
    Killed,
    /// By this signal, whatever the host does about that one.
    Signal(i32),
    /// At once, with this code.
    Exit(i32),
}

impl Program {
    fn new(end: End) -> Box<Self> {
        const LONGEST: u64 = 10;
        let (signal, longest, code) = match end {
            End::Killed => (0, LONGEST, 0),
            End::Signal(signal) => (signal, LONGEST, 0),
            End::Exit(code) => (0, 0, code),
        };
        let mut program = Box::new(Self { table: Default::default(), sleep: [longest, 0], nothing: [0; 4] });
        let (sleep, nothing) = ((&raw const program.sleep) as u64, (&raw const program.nothing) as u64);
        let mut calls =
            vec![vec![libc::SYS_prctl as u64, libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64]];
        if signal != 0 {
            calls.push(vec![libc::SYS_rt_sigaction as u64, signal as u64, nothing, 0, 8]);
            calls.push(vec![libc::SYS_rt_sigprocmask as u64, libc::SIG_SETMASK as u64, nothing, 0, 8]);
        }
        calls.push(vec![libc::SYS_nanosleep as u64, sleep]);
        calls.push(vec![libc::SYS_exit_group as u64, code as u64]);
        for (entry, call) in program.table.iter_mut().zip(calls) {
            entry.iter_mut().zip(call).for_each(|(slot, word)| *slot = word);
        }
        program
    }
}

impl Dummy {
    /// clone3(2) with these arguments on top: shared memory and descriptors, a pidfd, no signal at its end.
    pub(crate) fn spawn(wanted: CloneArgs) -> nix::Result<Self> {
        Self::running(Program::new(End::Killed), wanted)
    }

    /// One that has ended with this wait status: an exit code, or a signal that dumps no core.
    pub(crate) fn dead(status: i32) -> nix::Result<Self> {
        const PATIENCE: u16 = 5_000;
        let end = match status & 0x7f {
            0 => End::Exit(status >> 8 & 0xff),
            signal => End::Signal(signal),
        };
        // Handlers of the host must not run on its memory.
        let wanted = CloneArgs { flags: CLONE_CLEAR_SIGHAND, ..CloneArgs::default() };
        let dummy = Self::running(Program::new(end), wanted)?;
        if let End::Signal(signal) = end {
            pidfd::send_signal(dummy.pidfd(), signal)?;
        }
        let mut ended = [PollFd::new(dummy.pidfd(), PollFlags::POLLIN)];
        match poll(&mut ended, PATIENCE)? {
            0 => Err(Errno::ETIMEDOUT),
            _ => Ok(dummy),
        }
    }

    fn running(program: Box<Program>, wanted: CloneArgs) -> nix::Result<Self> {
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
    fn dies_as_it_is_told() {
        for status in [0, 7 << 8, 255 << 8, libc::SIGKILL, libc::SIGTERM, libc::SIGPIPE] {
            let dummy = Dummy::dead(status).unwrap();
            let ended = wait::peek(dummy.pid()).unwrap().unwrap();
            match status & 0x7f {
                0 => assert_eq!(ended, wait::Ended::Code(status >> 8)),
                signal => assert_eq!(ended, wait::Ended::Signal(signal)),
            }
        }
    }

    #[test]
    fn lives_until_dropped() {
        let dummy = Dummy::spawn(CloneArgs::default()).unwrap();
        let pid = dummy.pid();
        nix::sys::signal::kill(pid.nix(), None).unwrap();
        drop(dummy);
        assert_eq!(nix::sys::signal::kill(pid.nix(), None), Err(Errno::ESRCH));
    }
}
