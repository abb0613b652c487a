//! The NUMA memory policy of a thread, set_mempolicy(2), and that of single mappings, mbind(2), which is refused.

use crate::Pid;
use crate::error::{Refusal, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::smaps::Mapping;
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// MPOL_* with its mode flags, and the nodes as a bit set.
#[derive(Encode, Decode, Debug)]
pub(crate) struct MemoryPolicy {
    mode: u32,
    nodes: Vec<u64>,
}

impl Record for MemoryPolicy {
    const TAG: Tag = Tag::new(b"NUMA");
    const VERSION: u16 = 1;
    const NAME: &'static str = "memory policy";
}

/// The most nodes that a kernel can be configured for.
const MAX_NODES: u64 = 1024;
const MPOL_F_ADDR: u64 = 1 << 1;

impl State for MemoryPolicy {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Plain;
    type Asked = (Call, Output, Output);

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        let mode = batch.output(8);
        let nodes = batch.output((MAX_NODES / 8) as usize);
        Ok((batch.call(sys::get_mempolicy, &[mode.addr, nodes.addr, MAX_NODES, 0, 0]), mode, nodes))
    }

    fn describe(
        (call, mode, nodes): Self::Asked,
        answers: &Answers,
        _: View<'_>,
        _: &mut Report,
    ) -> Result<Option<Self>> {
        // ENOSYS: a kernel without CONFIG_NUMA.
        if answers.get(call).is_err() {
            return Ok(None);
        }
        let mode = answers.words(&mode).first().map_or(0, |mode| *mode as u32);
        let mut nodes = answers.words(&nodes);
        nodes.truncate(nodes.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1));
        // The default is kept too: a new task has the policy of whoever restores it.
        Ok(Some(Self { mode, nodes }))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        batch.about(Subject::Attribute("memory policy"));
        let bits = self.nodes.len() as u64 * 64;
        // The kernel takes one bit less than it is told.
        let (nodes, len) = if bits == 0 { (0, 0) } else { (batch.input_words(&self.nodes), bits + 1) };
        batch.call(sys::set_mempolicy, &[u64::from(self.mode), nodes, len]);
        Ok(())
    }
}

/// The policies of some mappings, as the process was asked for them.
pub(crate) struct OfMappings<'m>(Vec<(&'m Mapping, Call, Output)>);

impl<'m> OfMappings<'m> {
    /// So many fit into a batch beside everything else.
    pub(crate) const AT_ONCE: usize = 1024;

    /// To ask for each is much cheaper than /proc/PID/numa_maps, which counts pages.
    pub(crate) fn ask(mappings: &'m [Mapping], batch: &mut Batch) -> Self {
        let asked = mappings.iter().map(|mapping| {
            let mode = batch.output(8);
            let call = batch.call(sys::get_mempolicy, &[mode.addr, 0, 0, mapping.start, MPOL_F_ADDR]);
            (mapping, call, mode)
        });
        Self(asked.collect())
    }

    /// Refuses those that have one of their own.
    pub(crate) fn refuse(&self, process: Pid, answers: &Answers, report: &mut Report) {
        for (mapping, call, mode) in &self.0 {
            // An error: there is no NUMA, or this is [vsyscall], which is no mapping.
            let policy = answers.get(*call).ok().and_then(|_| answers.words(mode).first().copied());
            if policy.is_some_and(|policy| policy as u32 != 0) {
                let what = String::from_utf8_lossy(&mapping.name).into_owned();
                let subject = Subject::Vma { start: mapping.start, end: mapping.end, what };
                let reason = "it has a memory policy of its own, mbind(2)";
                report.refuse(Refusal::new(process, subject, reason));
            }
        }
    }
}
