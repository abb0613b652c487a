//! The processor state of a thread: general registers, extended state (x87 to AVX-512 and AMX, xsave's
//! standard format), and the signal mask that goes with them. What it does about an interrupted system call
//! is in [`super::blocked`].

use crate::arch::{self, REG_WORDS, Regs, RegsExt};
use crate::error::Result;
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::sys::ptrace::SigMask;
use crate::tracee::{Answers, Batch};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Registers {
    general: [u64; REG_WORDS],
    mask: u64,
    extended: Bytes,
    /// It is in a job-control stop, by this signal.
    job_stop: Option<i32>,
}

impl Record for Registers {
    const TAG: Tag = Tag::new(b"REGS");
    const VERSION: u16 = 1;
    const NAME: &'static str = "registers";
}

impl Registers {
    /// Does it hold AMX tiles? Then the thread has to use one before it can be given them.
    pub(crate) fn has_tiles(&self) -> bool {
        arch::xstate_in_use(&self.extended) >> arch::TILE_DATA & 1 == 1
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.job_stop.is_some()
    }

    pub(crate) fn general(&self) -> Regs {
        Regs::from_words(self.general)
    }
}

impl State for Registers {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Release;
    /// As they were before the batch borrowed the thread.
    type Asked = Registers;

    fn ask(view: View<'_>, _: &mut Batch) -> Result<Registers> {
        Ok(Registers {
            general: view.saved.regs.to_words(),
            mask: view.saved.mask.0,
            extended: view.saved.xstate.clone().into(),
            job_stop: view.thread.job_stop,
        })
    }

    fn describe(mut asked: Registers, _: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        asked.extended.0.truncate(arch::xstate_used_len(&asked.extended));
        Ok(Some(asked))
    }

    fn settle(&self, task: Rebuilt<'_>) -> Result<()> {
        let mut extended = task.tracee.xstate()?;
        let length = self.extended.len().min(extended.len());
        extended.fill(0);
        extended
            .get_mut(..length)
            .into_iter()
            .for_each(|head| head.copy_from_slice(&self.extended[..length]));
        task.tracee.set_xstate(&extended)?;
        task.tracee.set_sigmask(SigMask(self.mask))
    }
}
