//! How many periods a timer has missed whose signal waits. The kernel counts them when the signal is taken, which also
//! makes the timer go on. So it is taken, and then the timer is set to what it was set to all along: to expire when it
//! was due, which is at once. Its signal waits again, and will be counted as before.
//!
//! That is done where it leaves no other trace: the signal is the only one of its number that the thread could take, no
//! other count would be lost, and the clock is not CLOCK_REALTIME, whose relative timers do not follow when it is set.

use std::collections::BTreeMap;

use super::posix_timers::{Next, SECOND, TIMER_ABSTIME, take};
use crate::error::{NameCall, Result};
use crate::freeze::{Process, Thread};
use crate::proc::read;
use crate::proc::timers::{self, PosixTimer};
use crate::sys::ptrace::{SigInfo, peek_siginfo};
use crate::tracee::{LastWill, Puppet, sys};

/// When timers were due whose signals wait: by id, in nanoseconds of their clocks.
#[derive(Debug, Default)]
pub(crate) struct Due(BTreeMap<i32, u64>);

impl Due {
    /// `puppet` makes a thread work for us.
    pub(crate) fn find<'p>(
        process: &'p Process,
        puppet: impl Fn(&'p Thread) -> Result<Option<Puppet<'p>>>,
    ) -> Result<Self> {
        let mut due = Self::default();
        let mut timers = read::parsed(process.speaker(), "timers", timers::parse)?;
        timers.retain(|timer| matches!(timer.clock_id, libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME));
        let peek = |thread: &Thread, shared| peek_siginfo(thread.tid(), shared).call("ptrace(PEEKSIGINFO)");
        for (index, thread) in process.threads.iter().enumerate().filter(|_| !timers.is_empty()) {
            let mut takes = peek(thread, false)?;
            if index == 0 {
                takes.extend(peek(thread, true)?);
            }
            for timer in timers.iter().filter(|timer| is_alone(timer, &takes)) {
                let Some(mut puppet) = puppet(thread)? else { continue };
                due.0.extend(take_and_set(&mut puppet, timer)?.map(|at| (timer.id, at)));
                puppet.release()?;
            }
        }
        Ok(due)
    }

    /// What a timer with this period has missed that will expire next at this time.
    pub(super) fn missed(&self, id: i32, period: u64, next: u64) -> u32 {
        let since = self.0.get(&id).map_or(0, |due| next.saturating_sub(*due));
        // The times are not read at the same moment.
        let periods = since.saturating_add(period / 2).checked_div(period).unwrap_or(0);
        u32::try_from(periods.saturating_sub(1)).unwrap_or(u32::MAX)
    }
}

/// Is its signal the only one of its number?
fn is_alone(timer: &PosixTimer, signals: &[SigInfo]) -> bool {
    let mut same = signals.iter().filter(|info| info.signo() == timer.signal);
    same.next().is_some_and(|info| info.timer() == Some(timer.id))
        && same.next().is_none()
        && timer.signal != libc::SIGCONT
}

/// When it was due; None if it has no period, has been set again, or its last signal was late, too.
fn take_and_set(puppet: &mut Puppet<'_>, timer: &PosixTimer) -> Result<Option<u64>> {
    let id = timer.id as u64;
    let mut batch = puppet.batch();
    let (next, overruns) = (Next::ask(timer, &mut batch), batch.call(sys::timer_getoverrun, &[id]));
    let answers = puppet.run(batch)?;
    let [seconds, nanoseconds, left @ ..] = next.get(&answers)?.0;
    if [seconds, nanoseconds] == [0, 0] || left == [0, 0] || answers.get(overruns)? != 0 {
        return Ok(None);
    }

    let mut batch = puppet.batch();
    let at_once = batch.input_words(&[seconds, nanoseconds, 0, 1]);
    puppet.if_we_die(vec![LastWill(sys::timer_settime, [id, 0, at_once, 0])]);
    let (taken, info) = take(timer.signal, &mut batch);
    let next = Next::ask(timer, &mut batch);
    let answers = puppet.run(batch)?;
    puppet.if_we_die(Vec::new());
    if answers.get(taken).is_err() {
        return Ok(None); // the kernel has dropped it: the timer has been set since
    }
    // siginfo_t: si_overrun comes after three words, padding and si_timerid.
    let overrun =
        answers.bytes(&info).get(20..24).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes);
    let period = seconds.saturating_mul(SECOND).saturating_add(nanoseconds);
    let due = next.get(&answers)?.1.saturating_sub((u64::from(overrun) + 1).saturating_mul(period)).max(1);

    let mut batch = puppet.batch();
    let first = batch.input_words(&[seconds, nanoseconds, due / SECOND, due % SECOND]);
    batch.call(sys::timer_settime, &[id, TIMER_ABSTIME, first, 0]);
    puppet.run(batch)?.check()?;
    Ok(Some(due))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_missed() {
        let due = Due(BTreeMap::from([(3, 1000)]));
        assert_eq!(due.missed(3, 100, 1100), 0);
        assert_eq!(due.missed(3, 100, 1149), 0);
        assert_eq!(due.missed(3, 100, 1395), 3);
        assert_eq!(due.missed(3, 100, 900), 0);
        assert_eq!(due.missed(3, 0, 900), 0);
        assert_eq!(due.missed(4, 100, 1395), 0);
    }
}
