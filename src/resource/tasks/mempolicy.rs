//! The NUMA memory policy of a thread, set_mempolicy(2).

use crate::error::{Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// MPOL_* with its mode flags, and the nodes as a bit set.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    mode: u32,
    nodes: Vec<u64>,
}

/// The most nodes that a kernel can be configured for.
const MAX_NODES: u64 = 1024;
const MPOL_F_ADDR: u64 = 1 << 1;

/// A question for a policy.
pub(crate) struct Asked(Call, Output, Output);

impl Policy {
    /// Asks for the policy of the calling thread, or that of the mapping at an address.
    pub(crate) fn ask(at: Option<u64>, batch: &mut Batch) -> Asked {
        let mode = batch.output(8);
        let nodes = batch.output((MAX_NODES / 8) as usize);
        let (address, flags) = at.map_or((0, 0), |at| (at, MPOL_F_ADDR));
        let call = batch.call(sys::get_mempolicy, &[mode.addr, nodes.addr, MAX_NODES, address, flags]);
        Asked(call, mode, nodes)
    }

    /// None: a kernel without CONFIG_NUMA.
    pub(crate) fn answered(Asked(call, mode, nodes): &Asked, answers: &Answers) -> Option<Self> {
        answers.get(*call).ok()?;
        let mode = answers.words(mode).first().map_or(0, |mode| *mode as u32);
        let mut nodes = answers.words(nodes);
        nodes.truncate(nodes.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1));
        Some(Self { mode, nodes })
    }

    /// The mode alone: which mappings have a policy of their own?
    pub(crate) fn ask_mode(at: u64, batch: &mut Batch) -> (Call, Output) {
        let mode = batch.output(8);
        (batch.call(sys::get_mempolicy, &[mode.addr, 0, 0, at, MPOL_F_ADDR]), mode)
    }

    /// Mode, nodes and their number, as the calls that set a policy take them.
    pub(crate) fn arguments(&self, batch: &mut Batch) -> [u64; 3] {
        let bits = self.nodes.len() as u64 * 64;
        // The kernel takes one bit less than it is told.
        let (nodes, len) = if bits == 0 { (0, 0) } else { (batch.input_words(&self.nodes), bits + 1) };
        [u64::from(self.mode), nodes, len]
    }

    /// Images are not trusted: no more nodes than any kernel knows.
    pub(crate) fn is_possible(&self) -> bool {
        self.nodes.len() as u64 <= MAX_NODES / 64
    }
}

#[derive(Encode, Decode, Debug)]
pub(crate) struct MemoryPolicy(Policy);

impl Record for MemoryPolicy {
    const TAG: Tag = Tag::new(b"NUMA");
    const VERSION: u16 = 1;
    const NAME: &'static str = "memory policy";
}

impl State for MemoryPolicy {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Plain;
    type Asked = Asked;

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        Ok(Policy::ask(None, batch))
    }

    fn describe(asked: Asked, answers: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        // The default is kept too: a new task has the policy of whoever restores it.
        Ok(Policy::answered(&asked, answers).map(Self))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        batch.about(Subject::Attribute("memory policy"));
        let arguments = self.0.arguments(batch);
        batch.call(sys::set_mempolicy, &arguments);
        Ok(())
    }
}
