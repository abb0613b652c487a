//! Interval timers: setitimer(2). The remaining time stands still while the process does not exist.

use crate::error::Result;
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// `struct itimerval` of ITIMER_REAL, ITIMER_VIRTUAL and ITIMER_PROF: interval and remaining time, in
/// seconds and microseconds.
#[derive(Encode, Decode, Debug)]
pub(crate) struct IntervalTimers([[u64; 4]; 3]);

impl Record for IntervalTimers {
    const TAG: Tag = Tag::new(b"ITIM");
    const VERSION: u16 = 1;
    const NAME: &'static str = "interval timers";
}

impl State for IntervalTimers {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Pending;
    type Asked = [(Call, Output); 3];

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        Ok([0u64, 1, 2].map(|which| {
            let value = batch.output(32);
            (batch.call(sys::getitimer, &[which, value.addr]), value)
        }))
    }

    fn describe(asked: Self::Asked, answers: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        let mut timers = [[0; 4]; 3];
        for (timer, (call, output)) in timers.iter_mut().zip(asked) {
            answers.get(call)?;
            timer.iter_mut().zip(answers.words(&output)).for_each(|(slot, word)| *slot = word);
        }
        Ok(timers.iter().flatten().any(|word| *word != 0).then_some(Self(timers)))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        for (which, timer) in self.0.iter().enumerate().filter(|(_, timer)| **timer != [0; 4]) {
            let mut timer = *timer;
            // ITIMER_REAL with an interval only: it has expired, and waits for its signal to be delivered before
            // it starts again (signal(7) tells nothing of it). Which part of an interval that took is not known.
            if which == libc::ITIMER_REAL as usize && timer[2..] == [0, 0] {
                timer = [timer[0], timer[1], timer[0], timer[1]];
            }
            let value = batch.input_words(&timer);
            batch.call(sys::setitimer, &[which as u64, value, 0]);
        }
        Ok(())
    }
}
