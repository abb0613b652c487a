//! The name of a thread (comm): PR_SET_NAME in prctl(2).

use crate::error::Result;
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, sys};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Name(Bytes);

impl Record for Name {
    const TAG: Tag = Tag::new(b"NAME");
    const VERSION: u16 = 1;
    const NAME: &'static str = "thread name";
}

impl State for Name {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Plain;
    type Asked = ();

    fn ask(_: View<'_>, _: &mut Batch) -> Result<()> {
        Ok(())
    }

    fn describe((): (), _: &Answers, view: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        Ok(Some(Self(view.status.name.clone().into())))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        let name = batch.input(&[&self.0[..], b"\0"].concat());
        batch.call(sys::prctl, &[libc::PR_SET_NAME as u64, name]);
        Ok(())
    }
}
