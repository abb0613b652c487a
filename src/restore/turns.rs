//! The states of all tasks, stage by stage.

use super::blueprint::ProcessPlan;
use crate::error::{Context, Result};
use crate::family::Member;
use crate::proc::status::Status;
use crate::resource::memory::Workshop;
use crate::resource::{Rebuild, Rebuilt, Stage};
use crate::tracee::{Batch, Puppet, Scratch, call_at, run_together};

/// Which threads of each process.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// The leaders, whose batches carry the states of their processes.
    Leaders,
    Others,
    All,
}

/// The stages, and whose turn it is. What restricts a process, or tells who may look at it, waits for the identity of
/// all threads; the other threads do all but the last in one batch.
pub(super) const TURNS: [(Turn, &[Stage]); 5] = [
    (Turn::Leaders, &[Stage::Plain]),
    (Turn::Others, &[Stage::Plain, Stage::Identity, Stage::Seal]),
    (Turn::Leaders, &[Stage::Identity]),
    (Turn::Leaders, &[Stage::Seal]),
    (Turn::All, &[Stage::Pending]),
];

pub(super) fn take_turn(
    member: &Member,
    process: &ProcessPlan,
    fresh: &Status,
    turn: Turn,
    stages: &[Stage],
) -> Result<()> {
    let taken = |index: &usize| match turn {
        Turn::Leaders => *index == 0,
        Turn::Others => *index > 0,
        Turn::All => true,
    };
    let work = (0..member.threads.len()).filter(taken).filter_map(|thread| {
        let task =
            Rebuilt { pid: member.pid, process: member.number, tracee: member.threads.get(thread)?, fresh };
        let own = match (process.threads.get(&task.tracee.number()), &process.dead_leader) {
            (Some(thread), _) => thread.states.as_slice(),
            (None, Some((_, states))) => states.as_slice(),
            (None, None) => &[],
        };
        let shared = if thread == 0 { process.states.as_slice() } else { &[] };
        let at = |stage: Stage| {
            // Timers of the process are set while no signal waits for a thread.
            let (first, second) = if stage == Stage::Pending { (shared, own) } else { (own, shared) };
            first.iter().chain(second).filter(move |(at, _)| *at == stage)
        };
        let states: Vec<_> = stages.iter().copied().flat_map(at).map(|(_, state)| &**state).collect();
        (!states.is_empty()).then_some(Work { member, thread, task, states })
    });
    let work: Vec<_> = work.collect();
    match turn {
        Turn::Leaders | Turn::All => work.iter().try_for_each(|work| work.alone().of(work.task.tid())),
        Turn::Others => work.chunks(Scratch::PARTS).try_for_each(at_once),
    }
}

/// A SIGCONT survives no batch: each is sent by a call of its own.
pub(super) fn queue_continues(member: &Member, process: &ProcessPlan, workshop: &Workshop) -> Result<()> {
    let (leader, scratch) = (member.leader()?, workshop.scratch());
    for one in &process.continues {
        let thread = member.threads.iter().find(|thread| Some(thread.number()) == one.thread);
        let address = scratch.input().start;
        let (call, args) = one.call(member.number, address);
        member.memory.write(address, &one.info.0)?;
        call_at(thread.unwrap_or(leader), scratch.syscall(), call, args)?;
    }
    Ok(())
}

/// What one thread has to build.
pub(super) struct Work<'b> {
    pub(super) member: &'b Member,
    pub(super) thread: usize,
    pub(super) task: Rebuilt<'b>,
    pub(super) states: Vec<&'b dyn Rebuild>,
}

impl<'b> Work<'b> {
    pub(super) fn settle(&self) -> Result<()> {
        self.states.iter().try_for_each(|state| state.settle(self.task))
    }

    /// In as many batches as it takes.
    pub(super) fn alone(&self) -> Result<()> {
        self.settle()?;
        let mut puppet = self.member.puppet(self.thread)?;
        let mut batch = puppet.batch();
        for state in &self.states {
            state.build(self.task, &mut batch)?;
            if batch.is_nearly_full() {
                puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
            }
        }
        puppet.run(batch)?.check()
    }

    /// In one batch, unless that is too large for a part of the scratch memory.
    pub(super) fn in_part(&self, part: usize) -> Result<Option<(Puppet<'b>, Batch)>> {
        let puppet = self.member.puppet_in_part(part, self.thread)?;
        let mut batch = puppet.batch();
        self.states.iter().try_for_each(|state| state.build(self.task, &mut batch))?;
        if !batch.fits() {
            return Ok(None);
        }
        self.settle()?;
        Ok(Some((puppet, batch)))
    }
}

/// Several threads of one process.
pub(super) fn at_once(work: &[Work<'_>]) -> Result<()> {
    let (mut puppets, mut batches, mut large) = (Vec::new(), Vec::new(), Vec::new());
    for (part, work) in work.iter().enumerate() {
        match work.in_part(part).of(work.task.tid())? {
            Some((puppet, batch)) => {
                puppets.push(puppet);
                batches.push(batch);
            }
            None => large.push(work),
        }
    }
    let mut puppets: Vec<_> = puppets.iter_mut().collect();
    run_together(&mut puppets, batches)?.iter().try_for_each(crate::tracee::Answers::check)?;
    large.into_iter().try_for_each(|work| work.alone().of(work.task.tid()))
}
