//! Timers to be read: timerfd_create(2).
//!
//! A periodic timer stops when it expires, until somebody reads it or asks for its time; then it makes up for
//! what it has missed. So it is asked first, and its expirations are looked at afterwards. (An edge-triggered
//! epoll that the program never answers by a read can tell: it hears of the next expiration too.)

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::time::{ClockId, clock_gettime};

use super::{Builder, Collector, Description, FileKind, Polled, Probe};
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::nameless;
use crate::sys::file::{self, TimerSpec};

#[derive(Encode, Decode, Debug, PartialEq, Eq)]
pub(crate) struct TimerFd {
    clock: i32,
    /// TFD_TIMER_ABSTIME and TFD_TIMER_CANCEL_ON_SET, as last set.
    flags: i32,
    /// In nanoseconds; 0 for a timer that expires once.
    interval: u64,
    /// The next expiration: a point in time or the time that is left, as `flags` say. 0: it does not run.
    value: u64,
    /// Expirations that have not been read.
    ticks: u64,
}

impl Record for TimerFd {
    const TAG: Tag = Tag::new(b"FTMR");
    const VERSION: u16 = 1;
    const NAME: &'static str = "timerfd";
}

impl FileKind for TimerFd {
    const POLLED: Polled = Polled::NeverBroken;

    fn recognise(probe: &Probe) -> bool {
        probe.name == b"anon_inode:[timerfd]"
    }

    fn describe(probe: &Probe, _: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let clock = probe.tells(nameless::timer)?.clock;
        let look = good_look(probe.file.as_fd(), clock)?;
        let timer = look.record(&probe.now(nameless::timer)?);
        if timer.may_be_cancelled() {
            let refusal = probe.refusal("it may have been cancelled by a change of the clock (ECANCELED)");
            return Ok(Err(refusal.hint("try again when its expirations have been read")));
        }
        Ok(Ok(timer))
    }

    fn check(&self, _: &Builder<'_>) -> Result<()> {
        let known = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
        match self.flags & !known == 0 && readable(self.clock).is_some() {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Image, "a timerfd of an unknown clock")),
        }
    }

    fn build(&self, _: &Description, _: &mut Builder<'_>) -> Result<OwnedFd> {
        let timer = file::timerfd(self.clock).call("timerfd_create");
        timer.map_err(|error| match error.raw_errno() {
            Some(Errno::EPERM) => error.with_hint("alarm clocks need CAP_WAKE_ALARM"),
            _ => error,
        })
    }

    fn start(&self, timer: BorrowedFd<'_>, _: &Builder<'_>) -> Result<()> {
        self.arm(timer)
    }
}

impl TimerFd {
    /// Sets it, and its ticks, so that no expiration is lost or counted twice.
    fn arm(&self, timer: BorrowedFd<'_>) -> Result<()> {
        /// An expiration that is no further away is waited for, so that it cannot come in between.
        const NEAR: u64 = 1_000_000;
        const TRIES: u32 = 100;
        let absolute = self.flags & libc::TFD_TIMER_ABSTIME != 0;
        let begin = now(self.clock)?;
        let deadline = if absolute { self.value } else { begin.saturating_add(self.value) };
        for _ in 0..TRIES {
            let left = deadline.saturating_sub(now(self.clock)?);
            let value = match self.value {
                0 => 0,
                value if absolute => value,
                _ => left.max(1),
            };
            let spec = TimerSpec { interval: self.interval, value };
            file::set_timerfd(timer, self.flags, spec).call("timerfd_settime")?;
            if self.ticks == 0 {
                return Ok(());
            }
            let set = |ticks| file::set_ticks(timer, ticks).call("ioctl(TFD_IOC_SET_TICKS)");
            if value == 0 || left > NEAR {
                set(self.ticks)?;
                if value == 0 || now(self.clock)? < deadline {
                    return Ok(());
                }
            } else {
                let mut polled = [PollFd::new(timer, PollFlags::POLLIN)];
                if poll(&mut polled, 10u8).call("poll")? > 0 {
                    return set(self.ticks.saturating_add(1));
                }
            }
        }
        Err(Error::new(ErrorKind::Timeout, "a timerfd does not expire"))
    }

    /// A change of the clock looks like an expiration, until somebody reads (or asks, which is as bad).
    fn may_be_cancelled(&self) -> bool {
        let plain = self.interval == 0 && self.value == 0 && self.ticks == 1;
        self.flags & libc::TFD_TIMER_CANCEL_ON_SET != 0 && self.ticks > 0 && !plain
    }
}

/// A timer at a moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    spec: TimerSpec,
    /// Its clock, before and after it was asked.
    before: u64,
    after: u64,
}

impl Look {
    fn take(timer: BorrowedFd<'_>, clock: i32) -> Result<Self> {
        let before = now(clock)?;
        let spec = file::get_timerfd(timer).call("timerfd_gettime")?;
        Ok(Self { spec, before, after: now(clock)? })
    }

    /// With what fdinfo said after it.
    fn record(self, info: &nameless::Timer) -> TimerFd {
        let TimerSpec { interval, mut value } = self.spec;
        // One that has expired since: that is among the ticks already.
        if value != 0 && !info.runs {
            value = if interval == 0 { 0 } else { value.saturating_add(interval) };
        }
        // Late by what asking took, never early.
        if value != 0 && info.flags & libc::TFD_TIMER_ABSTIME as u32 != 0 {
            value = value.saturating_add(self.after);
        }
        TimerFd { clock: info.clock, flags: info.flags as i32, interval, value, ticks: info.ticks }
    }
}

/// A look that tells the point in time exactly, if a few tries bring one. The last one counts: asking sets a
/// periodic timer going again.
fn good_look(timer: BorrowedFd<'_>, clock: i32) -> Result<Look> {
    const TRIES: u32 = 8;
    const GOOD: u64 = 1_000;
    let mut look = Look::take(timer, clock)?;
    for _ in 1..TRIES {
        // A periodic one that is expiring this very moment shows no time at all.
        let expiring = look.spec.interval != 0 && look.spec.value == 0;
        if look.after.saturating_sub(look.before) <= GOOD && !expiring {
            break;
        }
        look = Look::take(timer, clock)?;
    }
    Ok(look)
}

/// The clock that shows the time of this one: alarm clocks cannot be read on every machine.
pub(crate) fn readable(clock: i32) -> Option<ClockId> {
    match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => Some(ClockId::CLOCK_REALTIME),
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => Some(ClockId::CLOCK_BOOTTIME),
        libc::CLOCK_MONOTONIC => Some(ClockId::CLOCK_MONOTONIC),
        _ => None,
    }
}

fn now(clock: i32) -> Result<u64> {
    let clock = readable(clock)
        .ok_or_else(|| Error::new(ErrorKind::Kernel, format!("a timerfd of an unknown clock {clock}")))?;
    Ok(std::time::Duration::from(clock_gettime(clock).call("clock_gettime")?).as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::super::tests::refuses;
    use super::*;

    fn info(ticks: u64, flags: u32, runs: bool) -> nameless::Timer {
        nameless::Timer { clock: libc::CLOCK_MONOTONIC, ticks, flags, runs }
    }

    #[test]
    fn an_expiration_in_between_counts_once() {
        let look = |interval| Look { spec: TimerSpec { interval, value: 40 }, before: 1000, after: 1002 };
        assert_eq!(
            (look(0).record(&info(0, 0, true)).value, look(0).record(&info(1, 0, false)).value),
            (40, 0)
        );
        assert_eq!(look(100).record(&info(3, 0, false)).value, 140);
        assert_eq!(look(100).record(&info(3, 1, false)).value, 1142);
        assert_eq!(look(100).record(&info(3, 1, true)).value, 1042);
    }

    #[test]
    fn what_a_clock_change_looks_like() {
        let timer = |flags, interval, value, ticks| TimerFd { clock: 0, flags, interval, value, ticks };
        let cancel = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
        for (timer, may_be) in [
            (timer(0, 10, 10, 3), false),
            (timer(cancel, 0, 10, 0), false),
            (timer(cancel, 0, 0, 1), false),
            (timer(cancel, 0, 10, 1), true),
            (timer(cancel, 10, 10, 1), true),
        ] {
            assert_eq!(timer.may_be_cancelled(), may_be, "{timer:?}");
        }
    }

    #[test]
    fn clocks_and_flags_that_are_none() {
        let refused = |clock, flags| {
            refuses(&TimerFd { clock, flags, interval: u64::MAX, value: u64::MAX, ticks: u64::MAX })
        };
        assert!(!refused(libc::CLOCK_BOOTTIME, libc::TFD_TIMER_ABSTIME));
        assert!(refused(libc::CLOCK_PROCESS_CPUTIME_ID, 0) && refused(-7, 0));
        assert!(refused(libc::CLOCK_MONOTONIC, 4));
    }

    /// Ticks that are there and an expiration that comes meanwhile: none is lost, whenever it comes.
    #[test]
    fn ticks_add_up() {
        for left in [1u64, 50_000, 1_000_000, 1_050_000, 3_000_000] {
            let clock = libc::CLOCK_MONOTONIC;
            let record = TimerFd { clock, flags: 0, interval: 0, value: left, ticks: 5 };
            let timer = file::timerfd(clock).unwrap();
            record.arm(timer.as_fd()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(6));
            let mut count = [0; 8];
            nix::unistd::read(&timer, &mut count).unwrap();
            assert_eq!(u64::from_ne_bytes(count), 6, "{left} ns");
        }
    }
}
