//! Processor features that a process has to ask for before it can use them (AMX tile data): ARCH_GET_XCOMP_PERM
//! and ARCH_REQ_XCOMP_PERM in arch_prctl(2), Documentation/arch/x86/xstate.rst.

use crate::arch::TILE_DATA;
use crate::error::Result;
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// The permitted features, as xcr0 bits.
#[derive(Encode, Decode, Debug)]
pub(crate) struct DynamicFeatures(u64);

impl Record for DynamicFeatures {
    const TAG: Tag = Tag::new(b"XCOM");
    const VERSION: u16 = 1;
    const NAME: &'static str = "permitted processor features";
}

const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;

impl State for DynamicFeatures {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Plain;
    type Asked = (Call, Output);

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        let features = batch.output(8);
        Ok((batch.call(sys::arch_prctl, &[ARCH_GET_XCOMP_PERM, features.addr]), features))
    }

    fn describe(
        (call, features): Self::Asked,
        answers: &Answers,
        _: View<'_>,
        _: &mut Report,
    ) -> Result<Option<Self>> {
        let permitted = answers.get(call).ok().and_then(|_| answers.words(&features).first().copied());
        Ok(permitted.filter(|features| features >> TILE_DATA & 1 == 1).map(Self))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        if self.0 >> TILE_DATA & 1 == 1 {
            batch.call(sys::arch_prctl, &[ARCH_REQ_XCOMP_PERM, TILE_DATA]);
        }
        Ok(())
    }
}
