//! What a process does about each signal: rt_sigaction(2), handlers, flags, masks and restorers included.

use crate::error::Result;
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// The kernel's `struct sigaction`.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

/// The actions that differ from the default, by signal number.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Actions(Vec<(i32, Action)>);

impl Record for Actions {
    const TAG: Tag = Tag::new(b"SIGA");
    const VERSION: u16 = 1;
    const NAME: &'static str = "signal actions";
}

/// Those whose action can be chosen.
fn signals() -> impl Iterator<Item = i32> {
    (1..=super::LAST).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP))
}

const MASK_SIZE: u64 = 8;

impl State for Actions {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Plain;
    type Asked = Vec<(i32, Call, Output)>;

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        Ok(signals()
            .map(|signal| {
                let action = batch.output(32);
                let call = batch.call(sys::rt_sigaction, &[signal as u64, 0, action.addr, MASK_SIZE]);
                (signal, call, action)
            })
            .collect())
    }

    fn describe(asked: Self::Asked, answers: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        let mut actions = Vec::new();
        for (signal, call, output) in asked {
            answers.get(call)?;
            if let &[handler, flags, restorer, mask] = answers.words(&output).as_slice() {
                let action = Action { handler, flags, restorer, mask };
                if action != Action::default() {
                    actions.push((signal, action));
                }
            }
        }
        Ok(Some(Self(actions)))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        // Making the dead children has left their exit signals behind: ignoring a signal discards it.
        const SIG_IGN: u64 = 1;
        let ignore = batch.input_words(&[SIG_IGN, 0, 0, 0]);
        // And what the calling process ignores (SIGPIPE, in most Rust programs) the new task ignores too.
        let default = batch.input_words(&[0; 4]);
        for signal in signals() {
            batch.call(sys::rt_sigaction, &[signal as u64, ignore, 0, MASK_SIZE]);
            batch.call(sys::rt_sigaction, &[signal as u64, default, 0, MASK_SIZE]);
        }
        // Processes that share their actions all set the same.
        for (signal, action) in &self.0 {
            let action = batch.input_words(&[action.handler, action.flags, action.restorer, action.mask]);
            batch.call(sys::rt_sigaction, &[*signal as u64, action, 0, MASK_SIZE]);
        }
        Ok(())
    }
}
