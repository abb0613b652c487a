//! Resource limits: getrlimit(2). Read from `/proc/PID/limits`, which needs no privilege over the task; set by
//! the task itself. Lowering is free, raising a hard limit needs CAP_SYS_RESOURCE.

use crate::error::{Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::{limits, read};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, sys};

/// Soft and hard limit, by the number of the resource; u64::MAX for none.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Limits(Vec<(u64, u64)>);

impl Record for Limits {
    const TAG: Tag = Tag::new(b"RLIM");
    const VERSION: u16 = 1;
    const NAME: &'static str = "resource limits";
}

fn read_limits(pid: crate::Pid) -> Result<Vec<(u64, u64)>> {
    let limits = read::parsed(pid, "limits", limits::parse)?;
    Ok(limits.iter().map(|limit| (limit.soft, limit.hard)).collect())
}

impl State for Limits {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Identity;
    type Asked = ();

    fn ask(_: View<'_>, _: &mut Batch) -> Result<()> {
        Ok(())
    }

    fn describe((): (), _: &Answers, view: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        read_limits(view.process.speaker()).map(|limits| Some(Self(limits)))
    }

    fn build(&self, task: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        let now = read_limits(task.pid)?;
        for (resource, (wanted, now)) in self.0.iter().zip(&now).enumerate() {
            if wanted != now {
                batch.about(Subject::Attribute(NAMES.get(resource).copied().unwrap_or("resource limit")));
                let limit = batch.input_words(&[wanted.0, wanted.1]);
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
