//! What a process has registered with membarrier(2): read back since Linux 6.3. Without it the first barrier
//! after a restore would fail.

use crate::error::Result;
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, sys};

/// The registering commands, as one bit each.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Membarrier(u64);

impl Record for Membarrier {
    const TAG: Tag = Tag::new(b"MBAR");
    const VERSION: u16 = 1;
    const NAME: &'static str = "memory barrier registrations";
}

const GET_REGISTRATIONS: u64 = 1 << 9;

impl State for Membarrier {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Plain;
    type Asked = Call;

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Call> {
        Ok(batch.call(sys::membarrier, &[GET_REGISTRATIONS, 0, 0]))
    }

    fn describe(call: Call, answers: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        // Older kernels cannot say, and are the worse for it.
        Ok(answers.get(call).ok().filter(|registered| *registered != 0).map(Self))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        for command in (0..32).map(|bit| 1u64 << bit).filter(|command| self.0 & command != 0) {
            batch.call(sys::membarrier, &[command, 0, 0]);
        }
        Ok(())
    }
}
