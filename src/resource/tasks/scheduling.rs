//! How a thread is scheduled: policy, nice, priority, deadline, utilization clamps (sched_setattr(2)),
//! affinity (sched_setaffinity(2)) and I/O priority (ioprio_set(2)). All of it is read and set from outside.

use crate::Pid;
use crate::error::{Context, NameCall, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::sys::sched;
use crate::tracee::{Answers, Batch};

#[derive(Encode, Decode, Debug, PartialEq, Eq)]
pub(crate) struct Scheduling {
    /// The words of `struct sched_attr`, behind its size.
    attributes: Vec<u8>,
    /// One bit for each processor.
    affinity: Vec<u8>,
    io_priority: i32,
}

impl Record for Scheduling {
    const TAG: Tag = Tag::new(b"SCHD");
    const VERSION: u16 = 1;
    const NAME: &'static str = "scheduling";
}

impl Scheduling {
    fn of(tid: Pid) -> Result<Self> {
        Ok(Self {
            attributes: sched::attributes(tid).call("sched_getattr")?,
            affinity: sched::affinity(tid).call("sched_getaffinity")?,
            io_priority: sched::io_priority(tid).call("ioprio_get")?,
        })
    }
}

impl State for Scheduling {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Identity;
    type Asked = ();

    fn ask(_: View<'_>, _: &mut Batch) -> Result<()> {
        Ok(())
    }

    fn describe((): (), _: &Answers, view: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        Self::of(view.tid()).map(Some)
    }

    fn settle(&self, task: Rebuilt<'_>) -> Result<()> {
        let tid = task.tid();
        let now = Self::of(tid)?;
        let about = |name| move || Subject::Attribute(name);
        if now.affinity != self.affinity {
            sched::set_affinity(tid, &self.affinity)
                .call("sched_setaffinity")
                .about(about("CPU affinity"))
                .hint(
                "the processors that the task was bound to do not exist here, or its cpuset excludes them",
            )?;
        }
        if now.attributes != self.attributes {
            sched::set_attributes(tid, &self.attributes)
                .call("sched_setattr")
                .about(about("scheduling policy"))
                .hint("real-time policies and lower nice values need CAP_SYS_NICE")?;
        }
        if now.io_priority != self.io_priority {
            sched::set_io_priority(tid, self.io_priority).call("ioprio_set").about(about("I/O priority"))?;
        }
        Ok(())
    }
}
