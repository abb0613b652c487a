//! System calls in which a thread was blocked when it was stopped, so that they go on as if nothing had
//! happened.
//!
//! The stop makes the kernel leave the call with a result of its own (linux/errno.h): most say "call again"
//! and need no help. Three groups do:
//!
//! * sleeps with a relative time (nanosleep, poll, futex ...) go on by restart_syscall(2), from a place in
//!   the kernel that a new task does not have. It gets there by entering the same call with the remaining
//!   time and being interrupted at once.
//! * a few calls (epoll_wait, rt_sigtimedwait, semop ...) give up with EINTR, which their program has never
//!   seen: they are called again instead.
//! * a sleep that has gone on once shows no longer which call it was, nor until when: a note below the red
//!   zone of its own stack, which nothing can use while it sleeps, keeps both.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid as NixPid;

use crate::Pid;
use crate::arch::{self, RED_ZONE, Regs, RegsExt, restart};
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::syscall::{self, SyscallState};
use crate::proc::{read, sched, stat, status};
use crate::tracee::{Memory, Puppet, Tracee};

const NANOSLEEP: i64 = libc::SYS_nanosleep;
const CLOCK_NANOSLEEP: i64 = libc::SYS_clock_nanosleep;
const POLL: i64 = libc::SYS_poll;
const FUTEX: i64 = libc::SYS_futex;
const RESTART: i64 = libc::SYS_restart_syscall;

/// A sleep that its new thread has to be put into.
#[derive(Encode, Decode, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocked {
    number: i64,
    wait: Wait,
}

/// Until when.
#[derive(Encode, Decode, Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// For so many nanoseconds more.
    Remaining(u64),
    /// As its own arguments say: for ever, or to a point in time.
    Unchanged,
}

impl Record for Blocked {
    const TAG: Tag = Tag::new(b"BLKD");
    const VERSION: u16 = 1;
    const NAME: &'static str = "blocked system call";
}

/// What was seen of a sleeping thread before anything disturbed it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sleeper {
    /// When it fell asleep, in CLOCK_MONOTONIC nanoseconds.
    since: u64,
    stack: u64,
}

/// By how much the scheduler's clock of each processor differs from CLOCK_MONOTONIC.
#[derive(Debug, Default)]
pub(crate) struct Clocks(BTreeMap<i32, i64>);

impl Clocks {
    fn offset(&mut self, cpu: i32) -> Option<i64> {
        if let Some(offset) = self.0.get(&cpu) {
            return Some(*offset);
        }
        let offset = measure_on(cpu)?;
        self.0.insert(cpu, offset);
        Some(offset)
    }
}

/// Reads both clocks on that processor; the calling thread is the tracer, whose affinity is its own affair.
fn measure_on(cpu: i32) -> Option<i64> {
    let own = NixPid::from_raw(0);
    let before = sched_getaffinity(own).ok()?;
    let mut only = CpuSet::new();
    only.set(usize::try_from(cpu).ok()?).ok()?;
    sched_setaffinity(own, &only).ok()?;
    // Yielding makes the scheduler take note of the time.
    std::thread::yield_now();
    let now = monotonic();
    let text = std::fs::read("/proc/thread-self/sched").ok();
    sched_setaffinity(own, &before).ok()?;
    let seen = sched::parse(&text?).ok()?.exec_start;
    Some(now as i64 - seen as i64)
}

pub(crate) fn monotonic() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| Duration::from(now).as_nanos() as u64)
}

impl Sleeper {
    /// Looks at a thread that nothing has disturbed yet.
    pub(crate) fn observe(pid: Pid, tid: Pid, clocks: &mut Clocks) -> Option<Self> {
        let call = read::of_thread(pid, tid, "syscall", syscall::parse).ok()?;
        let SyscallState::Blocked { nr, args, sp, .. } = call else { return None };
        if !ends_in_time(nr, args) {
            return None;
        }
        let stat = read::of_thread(pid, tid, "stat", stat::parse).ok()?;
        if stat.state != 'S' {
            return None;
        }
        let seen = read::of_thread(pid, tid, "sched", sched::parse).ok()?.exec_start;
        let since = (seen as i64).checked_add(clocks.offset(stat.processor)?)?;
        Some(Self { since: since.try_into().ok()?, stack: sp })
    }
}

/// Is it a call of which nobody but the clock will know how much time it had left?
fn ends_in_time(number: i64, args: [u64; 6]) -> bool {
    match (gives_up(number), Timeout::of(number, args)) {
        (Some(limit), _) => limit.is_set(args),
        (None, Some(timeout)) => matches!(timeout, Timeout::Timespec(_) | Timeout::Millis(_)),
        (None, None) => number == RESTART,
    }
}

/// A call that the kernel ends with EINTR when a stop interrupts it, and where its time limit is.
fn gives_up(number: i64) -> Option<Limit> {
    Some(match number {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => Limit::Millis(3),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => Limit::Timespec(3),
        libc::SYS_rt_sigtimedwait => Limit::Timespec(2),
        libc::SYS_io_getevents => Limit::Timespec(4),
        // All but semop(2) only of sockets that limit the time themselves (SO_RCVTIMEO), which then begins anew.
        libc::SYS_semop
        | libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_write
        | libc::SYS_writev
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_recvmmsg
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg
        | libc::SYS_accept
        | libc::SYS_accept4
        | libc::SYS_connect => Limit::None,
        _ => return None,
    })
}

/// Which argument of a call limits its time.
#[derive(Clone, Copy, Debug)]
enum Limit {
    None,
    Timespec(usize),
    Millis(usize),
}

impl Limit {
    fn is_set(self, args: [u64; 6]) -> bool {
        match self {
            Limit::None => false,
            Limit::Millis(index) => args[index] as i32 > 0,
            Limit::Timespec(index) => args[index] != 0,
        }
    }
}

/// Makes a call that gave up because of the stop be called again, in the living thread and so in the image:
/// with the time that is left, which below the red zone of the thread's own stack outlasts the call's entry.
pub(crate) fn call_again(
    tracee: &Tracee,
    mut regs: Regs,
    sleeper: Option<Sleeper>,
    memory: &Memory,
) -> Result<()> {
    if regs.result() != -i64::from(libc::EINTR) {
        return Ok(());
    }
    let Some(limit) = regs.interrupted_call().and_then(gives_up) else { return Ok(()) };
    let status = read::parsed(tracee.tid(), "status", status::parse)?;
    if (status.sig_pnd | status.shd_pnd) & !status.sig_blk != 0 {
        return Ok(()); // it will see the signal, and has every right to its EINTR
    }
    let elapsed = elapsed(sleeper, &regs);
    shorten(limit, &mut regs, elapsed, memory)?;
    regs.set_result(restart::NOHAND);
    tracee.set_regs(&regs)
}

fn shorten(limit: Limit, regs: &mut Regs, elapsed: u64, memory: &Memory) -> Result<()> {
    let mut args = regs.args();
    match limit {
        Limit::Millis(index) if limit.is_set(args) => {
            args[index] = millis_left(args[index], elapsed);
        }
        Limit::Timespec(index) if limit.is_set(args) => {
            let left = read_timespec(memory, args[index])?.saturating_sub(elapsed);
            let place = Note::place(regs.stack_pointer());
            let words = [left / NANOS, left % NANOS].map(u64::to_ne_bytes).concat();
            memory.write_all(&[(place, &words)])?;
            args[index] = place;
        }
        _ => return Ok(()),
    }
    regs.set_args(args);
    Ok(())
}

/// Of the argument of a call that takes it for an int: nothing says what the upper half of the register is.
fn millis_left(argument: u64, elapsed: u64) -> u64 {
    (u64::from(argument as u32) * 1_000_000).saturating_sub(elapsed).div_ceil(1_000_000)
}

/// How long the thread has been in this call.
fn elapsed(sleeper: Option<Sleeper>, regs: &Regs) -> u64 {
    let same = sleeper.filter(|sleeper| sleeper.stack == regs.stack_pointer());
    same.map_or(0, |sleeper| monotonic().saturating_sub(sleeper.since))
}

impl Blocked {
    /// The sleep that a stopped thread is in, if it is in one that needs help.
    pub(crate) fn describe(
        tid: Pid,
        regs: &Regs,
        sleeper: Option<Sleeper>,
        memory: &Memory,
    ) -> Result<Option<Self>> {
        let (Some(shown), restart::BLOCK, arch::CS_64) = (regs.interrupted_call(), regs.result(), regs.cs)
        else {
            return Ok(None);
        };
        let note = Note::read(memory, regs);
        let number = match shown {
            RESTART => {
                number_in_code(memory, regs.pc()).or(note.map(|note| note.number)).ok_or_else(|| {
                    Error::new(
                        ErrorKind::Unsupported,
                        "it is in restart_syscall, and nothing tells of which call",
                    )
                    .of(tid)
                    .about(Subject::Task)
                })?
            }
            number => number,
        };
        let note = note.filter(|note| shown == RESTART && note.number == number);
        let wait = match Timeout::of(number, regs.args()) {
            None => {
                let reason = format!("system call {number} restarts in an unknown way");
                return Err(Error::new(ErrorKind::Unsupported, reason).of(tid).about(Subject::Task));
            }
            Some(Timeout::None) => Wait::Unchanged,
            Some(Timeout::Remaining { written_to }) => Wait::Remaining(read_timespec(memory, written_to)?),
            Some(timeout) => Wait::Remaining(match note {
                Some(note) => note.deadline.saturating_sub(monotonic()),
                None => timeout.whole(memory)?.saturating_sub(elapsed(sleeper, regs)),
            }),
        };
        Ok(Some(Self { number, wait }))
    }

    /// Notes down, where the thread's next stop will find them, the call and its deadline.
    pub(crate) fn leave_note(&self, regs: &Regs, memory: &Memory) {
        let deadline = match self.wait {
            Wait::Remaining(remaining) => monotonic().saturating_add(remaining),
            // Its own arguments say until when.
            Wait::Unchanged => u64::MAX,
        };
        Note { number: self.number, deadline }.write(memory, regs);
    }

    /// Makes a new thread, whose registers are to be these, enter the call. It is to be interrupted at once, and then
    /// [`Blocked::entered`] follows.
    pub(crate) fn enter(&self, regs: &Regs, puppet: &mut Puppet<'_>) -> Result<()> {
        let mut batch = puppet.batch();
        let mut args = regs.args();
        if let Wait::Remaining(left) = self.wait {
            match Timeout::of(self.number, args).and_then(|timeout| timeout.argument(self.number)) {
                Some(TimeArgument::Timespec(index)) => {
                    args[index] = batch.input_words(&[left / NANOS, left % NANOS]);
                }
                Some(TimeArgument::Millis(index)) => {
                    args[index] = left.div_ceil(1_000_000).min(i32::MAX as u64)
                }
                None => {
                    let reason = "a blocked system call without the timeout that it should have";
                    return Err(Error::new(ErrorKind::Image, reason));
                }
            }
        }
        puppet.enter(self.number, args, &batch)
    }

    /// The registers with which the thread goes on sleeping.
    pub(crate) fn entered(&self, mut regs: Regs, puppet: &mut Puppet<'_>) -> Result<Regs> {
        let result = puppet.interrupted()?;
        regs.set_result(result);
        // Whatever has completed is over; everything else is the kernel's to restart.
        regs.orig_rax = if (-517..=-512).contains(&result) { self.number as u64 } else { u64::MAX };
        if result == restart::BLOCK {
            self.leave_note(&regs, puppet.memory());
        }
        Ok(regs)
    }
}

const NANOS: u64 = 1_000_000_000;

/// Where a call that restarts by restart_syscall(2) has its time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timeout {
    None,
    /// The kernel has written what is left there.
    Remaining {
        written_to: u64,
    },
    /// A whole time at this address.
    Timespec(u64),
    Millis(u32),
}

#[derive(Clone, Copy)]
enum TimeArgument {
    Timespec(usize),
    Millis(usize),
}

impl Timeout {
    fn of(number: i64, args: [u64; 6]) -> Option<Self> {
        const FUTEX_WAIT: u64 = 0;
        const FUTEX_WAIT_BITSET: u64 = 9;
        const FUTEX_COMMAND: u64 = 0x7f;
        let sleep = |request, remaining| match remaining {
            0 => Timeout::Timespec(request),
            written_to => Timeout::Remaining { written_to },
        };
        Some(match (number, args) {
            (NANOSLEEP, [request, remaining, ..]) => sleep(request, remaining),
            (CLOCK_NANOSLEEP, [_, flags, request, remaining, ..]) if flags as u32 == 0 => {
                sleep(request, remaining)
            }
            (POLL, [_, _, millis, ..]) => u32::try_from(millis as i32).map_or(Timeout::None, Timeout::Millis),
            (FUTEX, [_, op, _, at, ..]) if op & FUTEX_COMMAND == FUTEX_WAIT && at != 0 => {
                Timeout::Timespec(at)
            }
            (FUTEX, [_, op, ..]) if op & FUTEX_COMMAND == FUTEX_WAIT_BITSET => Timeout::None,
            _ => return None,
        })
    }

    fn whole(self, memory: &Memory) -> Result<u64> {
        match self {
            Timeout::None => Ok(u64::MAX),
            Timeout::Remaining { written_to: at } | Timeout::Timespec(at) => read_timespec(memory, at),
            Timeout::Millis(millis) => Ok(u64::from(millis) * 1_000_000),
        }
    }

    fn argument(self, number: i64) -> Option<TimeArgument> {
        match (self, number) {
            (Timeout::None, _) => None,
            (_, NANOSLEEP) => Some(TimeArgument::Timespec(0)),
            (_, CLOCK_NANOSLEEP) => Some(TimeArgument::Timespec(2)),
            (_, FUTEX) => Some(TimeArgument::Timespec(3)),
            (_, POLL) => Some(TimeArgument::Millis(2)),
            _ => None,
        }
    }
}

fn read_timespec(memory: &Memory, at: u64) -> Result<u64> {
    let mut bytes = [0; 16];
    memory.read(at, &mut bytes)?;
    let word =
        |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
    Ok(word(0).saturating_mul(NANOS).saturating_add(word(8)))
}

fn number_in_code(memory: &Memory, pc: u64) -> Option<i64> {
    const REACH: u64 = 9;
    arch::call_number_before(&memory.read_vec(pc.checked_sub(REACH)?, REACH as usize).ok()?)
}

/// What a sleeping thread's own stack remembers of its sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    number: i64,
    /// CLOCK_MONOTONIC nanoseconds.
    deadline: u64,
}

impl Note {
    const MAGIC: u64 = 0x6372_796f_736c_6565;

    fn place(stack: u64) -> u64 {
        stack.wrapping_sub(RED_ZONE + 64) & !15
    }

    fn read(memory: &Memory, regs: &Regs) -> Option<Self> {
        let bytes = memory.read_vec(Self::place(regs.stack_pointer()), 32).ok()?;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes)).collect();
        let &[magic, number, deadline, check] = words.as_slice() else { return None };
        let valid = magic == Self::MAGIC && check == Self::check(number, deadline, regs);
        // A sleep whose time is over would not be asleep: such a note is an old one.
        (valid && deadline > monotonic()).then_some(Self { number: number as i64, deadline })
    }

    fn write(self, memory: &Memory, regs: &Regs) {
        let number = self.number as u64;
        let words = [Self::MAGIC, number, self.deadline, Self::check(number, self.deadline, regs)];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // Without it only a second checkpoint during the same sleep knows less.
        let _ = memory.write_all(&[(Self::place(regs.stack_pointer()), &bytes)]);
    }

    /// Ties a note to its sleep: another one with the same stack pointer has other arguments, most likely.
    fn check(number: u64, deadline: u64, regs: &Regs) -> u64 {
        let words = [number, deadline, regs.pc(), regs.stack_pointer()].into_iter().chain(regs.args());
        words.fold(Self::MAGIC, |all, word| (all ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_halves_of_ints_are_nothing() {
        let garbage = 0xdead_beef_0000_0000;
        assert_eq!(millis_left(garbage | 1500, 1_000_001), 1499);
        assert_eq!(millis_left(garbage | 1500, u64::MAX), 0);
        let args = [garbage, garbage, 5, 0, 0, 0];
        assert_eq!(Timeout::of(CLOCK_NANOSLEEP, args), Some(Timeout::Timespec(5)));
    }

    #[test]
    fn where_the_time_limit_is() {
        assert_eq!(Timeout::of(NANOSLEEP, [1, 0, 0, 0, 0, 0]), Some(Timeout::Timespec(1)));
        assert_eq!(Timeout::of(NANOSLEEP, [1, 2, 0, 0, 0, 0]), Some(Timeout::Remaining { written_to: 2 }));
        assert_eq!(Timeout::of(POLL, [1, 2, u64::MAX, 0, 0, 0]), Some(Timeout::None));
        assert_eq!(Timeout::of(FUTEX, [1, 128, 0, 5, 0, 0]), Some(Timeout::Timespec(5)));
        assert_eq!(Timeout::of(FUTEX, [1, 128 | 9, 0, 5, 0, 0]), Some(Timeout::None));
        assert_eq!(Timeout::of(CLOCK_NANOSLEEP, [0, 1, 0, 5, 0, 0]), None);
        assert_eq!(Timeout::of(libc::SYS_read, [0; 6]), None);
    }

    #[test]
    fn scheduler_clock_follows_the_monotonic_one() {
        let mut clocks = Clocks::default();
        let first = clocks.offset(0).unwrap();
        let again = Clocks::default().offset(0).unwrap();
        assert!((first - again).abs() < 50_000_000, "{first} {again}");
    }
}
