//! Resource limits: prlimit(2). Read and set by the task itself: anybody else would need its user id, or
//! CAP_SYS_RESOURCE. Lowering is free, raising a hard limit needs CAP_SYS_RESOURCE.

use crate::error::{Error, ErrorKind, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::{limits, read};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// Soft and hard limit, by the number of the resource; u64::MAX for none.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Limits(Vec<(u64, u64)>);

impl Record for Limits {
    const TAG: Tag = Tag::new(b"RLIM");
    const VERSION: u16 = 1;
    const NAME: &'static str = "resource limits";
}

impl State for Limits {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Identity;
    type Asked = Vec<(Call, Output)>;

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        let ask = |resource| {
            let limit = batch.output(16);
            (batch.call(sys::prlimit64, &[0, resource as u64, 0, limit.addr]), limit)
        };
        Ok((0..NAMES.len()).map(ask).collect())
    }

    fn describe(asked: Self::Asked, answers: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        let limit = |(call, limit)| {
            answers.get(call)?;
            match answers.words(&limit)[..] {
                [soft, hard] => Ok((soft, hard)),
                _ => Err(Error::new(ErrorKind::Kernel, "a limit is missing")),
            }
        };
        asked.into_iter().map(limit).collect::<Result<_>>().map(|limits| Some(Self(limits)))
    }

    fn build(&self, task: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        let now = read::parsed(task.pid, "limits", limits::parse)?;
        for (resource, ((soft, hard), now)) in self.0.iter().zip(&now).enumerate() {
            // Some could not be set again to what they are: fs.nr_open may have been lowered.
            if (*soft, *hard) != (now.soft, now.hard) {
                batch.about(Subject::Attribute(NAMES.get(resource).copied().unwrap_or("resource limit")));
                let limit = batch.input_words(&[*soft, *hard]);
                batch.call(sys::prlimit64, &[0, resource as u64, limit, 0]);
            }
        }
        Ok(())
    }
}

const NAMES: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];
