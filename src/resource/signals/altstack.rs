//! The alternate signal stack of a thread: sigaltstack(2).

use crate::error::Result;
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

#[derive(Encode, Decode, Debug)]
pub(crate) struct AltStack {
    pointer: u64,
    /// SS_DISABLE, SS_AUTODISARM; never SS_ONSTACK, which only says where the stack pointer is.
    flags: u64,
    size: u64,
}

impl Record for AltStack {
    const TAG: Tag = Tag::new(b"ALTS");
    const VERSION: u16 = 1;
    const NAME: &'static str = "alternate signal stack";
}

impl State for AltStack {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Plain;
    type Asked = (Call, Output);

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        let stack = batch.output(24);
        Ok((batch.call(sys::sigaltstack, &[0, stack.addr]), stack))
    }

    fn describe(
        (call, stack): Self::Asked,
        answers: &Answers,
        _: View<'_>,
        _: &mut Report,
    ) -> Result<Option<Self>> {
        const SS_DISABLE: u64 = libc::SS_DISABLE as u64;
        const SS_ONSTACK: u64 = libc::SS_ONSTACK as u64;
        answers.get(call)?;
        let words = answers.words(&stack);
        let &[pointer, flags, size] = words.as_slice() else { return Ok(None) };
        let flags = flags & 0xffff_ffff & !SS_ONSTACK;
        Ok((flags & SS_DISABLE == 0).then_some(Self { pointer, flags, size }))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        let stack = batch.input_words(&[self.pointer, self.flags, self.size]);
        batch.call(sys::sigaltstack, &[stack, 0]);
        Ok(())
    }
}
