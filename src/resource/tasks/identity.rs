//! The user addresses that the kernel keeps per thread: clear_child_tid (set_tid_address(2)) and the robust
//! futex list (set_robust_list(2)).

use crate::error::{NameCall, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

#[derive(Encode, Decode, Debug)]
pub(crate) struct ThreadPointers {
    clear_child_tid: u64,
    robust_head: u64,
    robust_len: u64,
}

impl Record for ThreadPointers {
    const TAG: Tag = Tag::new(b"TPTR");
    const VERSION: u16 = 1;
    const NAME: &'static str = "thread pointers";
}

impl State for ThreadPointers {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Plain;
    type Asked = (Call, Output);

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        let address = batch.output(8);
        let call = batch.call(sys::prctl, &[libc::PR_GET_TID_ADDRESS as u64, address.addr]);
        Ok((call, address))
    }

    fn describe(
        (call, address): Self::Asked,
        answers: &Answers,
        view: View<'_>,
        _: &mut Report,
    ) -> Result<Option<Self>> {
        answers.get(call)?;
        let clear_child_tid = answers.words(&address).first().copied().unwrap_or(0);
        let (robust_head, robust_len) = crate::sys::robust_list(view.tid()).call("get_robust_list")?;
        Ok(Some(Self { clear_child_tid, robust_head, robust_len }))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        batch.call(sys::set_tid_address, &[self.clear_child_tid]);
        if self.robust_head != 0 {
            batch.call(sys::set_robust_list, &[self.robust_head, self.robust_len]);
        }
        Ok(())
    }
}
