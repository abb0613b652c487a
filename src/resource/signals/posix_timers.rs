//! Timers of timer_create(2): ids, clocks, notification, remaining time and interval. `/proc/PID/timers`
//! lists them; PR_TIMER_CREATE_RESTORE_IDS (since Linux 6.15) lets a process choose their ids. The remaining time
//! stands still while the process does not exist.

use crate::error::{Refusal, Result, Subject};
use crate::freeze::Process;
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::read;
use crate::proc::timers::{self, Notify, PosixTimer, Target};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
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

pub(crate) struct Asked {
    timer: PosixTimer,
    time: (Call, Output),
    overruns: Call,
}

impl State for PosixTimers {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Pending;
    type Asked = Vec<Asked>;

    fn ask(view: View<'_>, batch: &mut Batch) -> Result<Vec<Asked>> {
        let timers = read::parsed(view.process.speaker(), "timers", timers::parse)?;
        let ask = |timer: PosixTimer| {
            let time = batch.output(32);
            let get = batch.call(sys::timer_gettime, &[timer.id as u64, time.addr]);
            Asked {
                timer,
                time: (get, time),
                overruns: batch.call(sys::timer_getoverrun, &[timer.id as u64]),
            }
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
        for Asked { timer, time: (get, time), overruns } in asked {
            answers.get(get)?;
            let refuse = |reason: &'static str| {
                Refusal::new(
                    view.process.pid,
                    Subject::Attribute("POSIX timer"),
                    format!("timer {}: {reason}", timer.id),
                )
            };
            if answers.get(overruns)? != 0 {
                let refusal = refuse("its last signal came with an overrun count, which cannot be set");
                report.refuse(refusal.hint("try again: the next signal's count is likely to be 0"));
                continue;
            }
            // Clock ids of single tasks are negative, and CLOCK_THREAD_CPUTIME_ID is its creator's.
            if timer.clock_id < 0 || timer.clock_id == libc::CLOCK_THREAD_CPUTIME_ID {
                report.refuse(refuse("timers on the processor time of one task are not supported"));
                continue;
            }
            let Some(mut record) = describe(&timer, view.process) else {
                report.refuse(refuse("the thread that it signals is unknown"));
                continue;
            };
            record.time.iter_mut().zip(answers.words(&time)).for_each(|(slot, word)| *slot = word);
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
            let time = batch.input_words(&timer.time);
            batch.call(sys::timer_settime, &[timer.id as u64, 0, time, 0]);
        }
        Ok(())
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
    })
}
