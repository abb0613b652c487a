//! Timers of timer_create(2): ids, clocks, notification, remaining time and interval. `/proc/PID/timers`
//! lists them; PR_TIMER_CREATE_RESTORE_IDS (since Linux 6.15) lets a process choose their ids. The remaining time
//! stands still while the process does not exist.
//!
//! A periodic timer whose signal waits does not run on before that is taken: the signal is part of the timer, and tells
//! how many periods were missed. So it is not queued again like others ([`Sent`]): the timer is set to when it was due,
//! so that it expires at once. See [`overruns`](super::overruns) for when that was; where that cannot be told, it is
//! the last time at which the timer would have expired, so that the count begins anew.
//!
//! When its signal is taken, the kernel counts the periods that have gone by since it was due, for
//! timer_getoverrun(2). To have that count again, the timer is set to expire as many periods ago, and its signal taken.
//!
//! Both need points in time. A relative timer on CLOCK_REALTIME, which a change of that clock does not touch, becomes
//! an absolute one by that, which it does; the kernel does not tell which of the two it is.

use std::collections::BTreeSet;

use nix::time::{ClockId, clock_gettime};

use crate::error::{Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::freeze::Process;
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::read;
use crate::proc::timers::{self, Notify, PosixTimer, Target};
use crate::resource::fds::clock_of;
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::sys::ptrace::{SigInfo, peek_siginfo};
use crate::tracee::{Answers, Batch, Call, Output, sys};

#[derive(Encode, Decode, Debug)]
struct Timer {
    id: i32,
    clock: i32,
    /// `struct sigevent`: value, signal, how, and for which thread.
    value: u64,
    signal: i32,
    notify: i32,
    thread: u32,
    /// `struct itimerspec`: interval and remaining time, in seconds and nanoseconds.
    time: [u64; 4],
    progress: Progress,
}

/// How far a timer has got.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// It runs, or does not. So many periods had been missed when its signal was taken last.
    Running { overruns: u32 },
    /// It is periodic, and its signal waits, for so many periods more.
    Sent { missed: u32 },
}

/// The timers of one process.
#[derive(Encode, Decode, Debug)]
pub(crate) struct PosixTimers(Vec<Timer>);

impl Record for PosixTimers {
    const TAG: Tag = Tag::new(b"PTIM");
    const VERSION: u16 = 1;
    const NAME: &'static str = "POSIX timers";
}

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

pub(super) const TIMER_ABSTIME: u64 = 1;

pub(crate) struct Asked {
    timer: PosixTimer,
    next: Next,
    overruns: Call,
    /// Its signal waits.
    waits: bool,
}

/// timer_gettime(2)
struct Time(Call, Output);

impl Time {
    fn ask(timer: &PosixTimer, batch: &mut Batch) -> Self {
        let time = batch.output(32);
        Self(batch.call(sys::timer_gettime, &[timer.id as u64, time.addr]), time)
    }

    fn get(&self, answers: &Answers) -> Result<[u64; 4]> {
        answers.get(self.0)?;
        let mut time = [0; 4];
        time.iter_mut().zip(answers.words(&self.1)).for_each(|(slot, word)| *slot = word);
        Ok(time)
    }
}

/// timer_gettime(2), and when that was.
pub(crate) struct Next(Time, Output);

impl Next {
    pub(super) fn ask(timer: &PosixTimer, batch: &mut Batch) -> Self {
        let (time, now) = (Time::ask(timer, batch), batch.output(16));
        batch.call(sys::clock_gettime, &[timer.clock_id as u64, now.addr]);
        Self(time, now)
    }

    /// Also when it will expire next, in nanoseconds of its clock.
    pub(super) fn get(&self, answers: &Answers) -> Result<([u64; 4], u64)> {
        let time = self.0.get(answers)?;
        let now = answers.words(&self.1);
        let whole = |words: &[u64]| match words {
            [seconds, nanoseconds] => seconds.saturating_mul(SECOND).saturating_add(*nanoseconds),
            _ => 0,
        };
        Ok((time, whole(&now).saturating_add(whole(&time[2..]))))
    }
}

/// Takes a signal that waits, if it does: the call, and its siginfo.
pub(super) fn take(signal: i32, batch: &mut Batch) -> (Call, Output) {
    const SET_SIZE: u64 = 8;
    let set = batch.input_words(&[1 << (signal - 1).clamp(0, 63)]);
    let second = batch.input_words(&[1, 0]);
    let info = batch.output(128);
    (batch.call(sys::rt_sigtimedwait, &[set, info.addr, second, SET_SIZE]), info)
}

/// The signals of a queue that are part of their timers.
pub(crate) struct Sent(Vec<(PosixTimer, Time)>);

impl Sent {
    pub(super) fn ask(signals: &[SigInfo], view: View<'_>, batch: &mut Batch) -> Result<Self> {
        let ids: BTreeSet<i32> = signals.iter().filter_map(SigInfo::timer).collect();
        if ids.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let timers = read::parsed(view.process.speaker(), "timers", timers::parse)?;
        let senders = timers.into_iter().filter(|timer| ids.contains(&timer.id));
        let ask = |timer: PosixTimer| {
            let time = Time::ask(&timer, batch);
            (timer, time)
        };
        Ok(Self(senders.map(ask).collect()))
    }

    pub(super) fn contains(&self, info: &SigInfo, answers: &Answers) -> Result<bool> {
        match self.0.iter().find(|(timer, _)| Some(timer.id) == info.timer()) {
            Some((timer, time)) => Ok(keeps_its_signal(timer, time.get(answers)?)),
            None => Ok(false),
        }
    }
}

/// Can it be set so that it sends its signal again at once, and goes on? Processor time begins anew with the task. And
/// a SIGCONT would be gone at the end of the batch.
fn keeps_its_signal(timer: &PosixTimer, time: [u64; 4]) -> bool {
    let [seconds, nanoseconds, left @ ..] = time;
    let periodic = [seconds, nanoseconds] != [0, 0] && left != [0, 0];
    periodic && timer.signal != libc::SIGCONT && readable(timer.clock_id).is_some()
}

fn readable(clock: i32) -> Option<ClockId> {
    match clock {
        libc::CLOCK_TAI => Some(ClockId::CLOCK_TAI),
        _ => clock_of(clock),
    }
}

impl State for PosixTimers {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Pending;
    type Asked = Vec<Asked>;

    fn ask(view: View<'_>, batch: &mut Batch) -> Result<Vec<Asked>> {
        let timers = read::parsed(view.process.speaker(), "timers", timers::parse)?;
        let waiting = if timers.is_empty() { BTreeSet::new() } else { waiting(view)? };
        let ask = |timer: PosixTimer| Asked {
            next: Next::ask(&timer, batch),
            overruns: batch.call(sys::timer_getoverrun, &[timer.id as u64]),
            waits: waiting.contains(&timer.id),
            timer,
        };
        Ok(timers.into_iter().map(ask).collect())
    }

    fn describe(
        asked: Vec<Asked>,
        answers: &Answers,
        view: View<'_>,
        report: &mut Report,
    ) -> Result<Option<Self>> {
        let mut timers = Vec::new();
        for Asked { timer, next, overruns, waits } in asked {
            let refuse = |reason: &'static str| {
                Refusal::new(
                    view.process.pid,
                    Subject::Attribute("POSIX timer"),
                    format!("timer {}: {reason}", timer.id),
                )
            };
            if !Clock::of(timer.clock_id).is_of(view) {
                report.refuse(refuse(
                    "it runs on the processor time of a task that cannot be told, or of another process",
                ));
                continue;
            }
            let Some(mut record) = describe(&timer, view.process) else {
                report.refuse(refuse("the thread that it signals is unknown"));
                continue;
            };
            let (time, next) = next.get(answers)?;
            record.time = time;
            let overruns = answers.get(overruns)? as u32;
            record.progress = match waits && keeps_its_signal(&timer, time) {
                true => Progress::Sent { missed: view.due.missed(timer.id, period(time).unwrap_or(0), next) },
                false => Progress::Running { overruns },
            };
            // The leader takes the signal again, before any other is there.
            if overruns != 0
                && (waits
                    || readable(timer.clock_id).is_none()
                    || ![0, view.process.number].contains(&record.thread)
                    || view.process.leader_is_dead())
            {
                let refusal = refuse(
                    "its last signal came with an overrun count, which cannot be set while the next one waits, on processor \
                     time, or if another thread than the leader was signalled",
                );
                report.refuse(refusal.hint("try again: the next signal's count is likely to be 0"));
                continue;
            }
            timers.push(record);
        }
        // The file lists the newest first.
        timers.reverse();
        Ok((!timers.is_empty()).then_some(Self(timers)))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        batch.about(Subject::Attribute("POSIX timers (with chosen ids: Linux 6.15)"));
        batch.call(sys::prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 1]);
        for timer in &self.0 {
            let event = batch.input_words(&[
                timer.value,
                u64::from(timer.signal as u32) | (timer.notify as u64) << 32,
                u64::from(timer.thread),
                0,
                0,
                0,
                0,
                0,
            ]);
            let id = batch.input(&timer.id.to_ne_bytes());
            batch.call(sys::timer_create, &[timer.clock as u64, event, id]);
        }
        batch.call(sys::prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 0]);
        for timer in self.0.iter().filter(|timer| timer.time[2..] != [0, 0]) {
            let (flags, time) = match timer.first_expiry()? {
                Some(first) => (TIMER_ABSTIME, first),
                None => (0, timer.time),
            };
            let time = batch.input_words(&time);
            batch.call(sys::timer_settime, &[timer.id as u64, flags, time, 0]);
            if matches!(timer.progress, Progress::Running { overruns: 1.. }) {
                take(timer.signal, batch);
            }
        }
        Ok(())
    }
}

impl Timer {
    /// What to set it to if periods have gone by since it was due: its interval, and when that was.
    fn first_expiry(&self) -> Result<Option<[u64; 4]>> {
        let ago = match self.progress {
            Progress::Running { overruns: 0 } => return Ok(None),
            Progress::Running { overruns } => u64::from(overruns) + 1,
            Progress::Sent { missed } => u64::from(missed) + 1,
        };
        let Some(clock) = readable(self.clock) else { return Ok(None) };
        let now = clock_gettime(clock).call("clock_gettime")?;
        let first = before(self.time, ago, (now.tv_sec() as u64, now.tv_nsec() as u64));
        match first {
            Some([.., 0, 1]) if ago > 1 => {
                let reason =
                    format!("{ago} periods of timer {} are longer than its clock has been running", self.id);
                Err(Error::new(ErrorKind::Conflict, reason).about(Subject::Attribute("POSIX timer")))
            }
            first => Ok(first),
        }
    }
}

/// When a timer with this interval and remaining time was to expire, so many periods before it will. None if it cannot
/// have expired yet: it was set again, and its signal is one from before, which nobody gets.
fn before(time: [u64; 4], periods: u64, now: (u64, u64)) -> Option<[u64; 4]> {
    let [seconds, nanoseconds, left @ ..] = time;
    let ago = period(time)?.checked_mul(periods)?.checked_sub(whole(left.into())?)?;
    // 0 would stop it.
    let first = whole(now)?.saturating_sub(ago).max(1);
    Some([seconds, nanoseconds, first / SECOND, first % SECOND])
}

pub(super) const SECOND: u64 = 1_000_000_000;

fn whole((seconds, nanoseconds): (u64, u64)) -> Option<u64> {
    seconds.checked_mul(SECOND)?.checked_add(nanoseconds)
}

fn period([seconds, nanoseconds, ..]: [u64; 4]) -> Option<u64> {
    whole((seconds, nanoseconds))
}

/// The timers whose signals wait, for the process or for one of its threads.
fn waiting(view: View<'_>) -> Result<BTreeSet<i32>> {
    let peek = |tid, shared| peek_siginfo(tid, shared).call("ptrace(PEEKSIGINFO)");
    let mut signals = peek(view.tid(), true)?;
    for thread in &view.process.threads {
        signals.extend(peek(thread.tid(), false)?);
    }
    Ok(signals.iter().filter_map(SigInfo::timer).collect())
}

/// Whose time a timer's clock shows, by the number that linux/posix-timers.h makes of a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clock {
    Everybodys,
    /// CLOCK_THREAD_CPUTIME_ID: of whoever made the timer.
    Creators,
    /// clock_getcpuclockid(3), 0 for the process itself.
    Process(u32),
    /// pthread_getcpuclockid(3), 0 for the creator.
    Thread(u32),
}

impl Clock {
    fn of(id: i32) -> Self {
        const PER_THREAD: i32 = 4;
        match (id, !(id >> 3) as u32) {
            (libc::CLOCK_THREAD_CPUTIME_ID, _) => Self::Creators,
            (0.., _) => Self::Everybodys,
            (_, pid) if id & PER_THREAD != 0 => Self::Thread(pid),
            (_, pid) => Self::Process(pid),
        }
    }

    /// Can it be had again by a timer that the leader makes?
    fn is_of(self, view: View<'_>) -> bool {
        let threads = &view.process.threads;
        match self {
            Self::Everybodys => true,
            Self::Creators | Self::Thread(0) => threads.len() == 1,
            Self::Process(pid) => pid == 0 || pid == view.process.number,
            Self::Thread(tid) => threads.iter().any(|thread| thread.tracee.number() == tid),
        }
    }
}

/// None for a timer that signals a thread which is not one of the process.
fn describe(timer: &PosixTimer, process: &Process) -> Option<Timer> {
    let how = match timer.notify {
        Notify::Signal => libc::SIGEV_SIGNAL,
        Notify::None => libc::SIGEV_NONE,
        Notify::Thread => libc::SIGEV_THREAD,
    };
    let (notify, thread) = match timer.target {
        Target::Thread(tid) => {
            let thread = process.threads.iter().find(|thread| thread.tid().get() == tid)?;
            (how | libc::SIGEV_THREAD_ID, thread.tracee.number())
        }
        Target::Process(_) => (how, 0),
    };
    Some(Timer {
        id: timer.id,
        clock: timer.clock_id,
        value: timer.sigev_value,
        signal: timer.signal,
        notify,
        thread,
        time: [0; 4],
        progress: Progress::Running { overruns: 0 },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_expiry() {
        let (interval, now) = ([2, 500_000_000], (10, 100_000_000));
        let first = |seconds, nanoseconds, periods| {
            before([interval[0], interval[1], seconds, nanoseconds], periods, now)
        };
        assert_eq!(first(2, 500_000_000, 1), Some([2, 500_000_000, 10, 100_000_000]));
        assert_eq!(first(0, 1, 1), Some([2, 500_000_000, 7, 600_000_001]));
        assert_eq!(first(2, 500_000_001, 1), None);
        assert_eq!(first(1, 100_000_000, 4), Some([2, 500_000_000, 1, 200_000_000]));
        assert_eq!(before([20, 0, 1, 0], 1, now), Some([20, 0, 0, 1]));
        assert_eq!(before([u64::MAX, 0, 1, 0], 1, now), None);
        assert_eq!(before([u64::MAX >> 40, 0, 1, 0], u64::MAX, now), None);
    }

    #[test]
    fn clocks_of_tasks() {
        // As MAKE_PROCESS_CPUCLOCK and MAKE_THREAD_CPUCLOCK with CPUCLOCK_SCHED.
        let (process, thread) = (|pid: i32| !pid << 3 | 2, |tid: i32| !tid << 3 | 6);
        assert_eq!(Clock::of(process(4711)), Clock::Process(4711));
        assert_eq!(Clock::of(thread(12)), Clock::Thread(12));
        assert_eq!(Clock::of(process(0)), Clock::Process(0));
        assert_eq!(Clock::of(libc::CLOCK_THREAD_CPUTIME_ID), Clock::Creators);
        assert_eq!(Clock::of(libc::CLOCK_PROCESS_CPUTIME_ID), Clock::Everybodys);
        assert_eq!(Clock::of(libc::CLOCK_BOOTTIME), Clock::Everybodys);
    }
}
