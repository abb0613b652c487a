//! NUMA policies of mappings: mbind(2). The kernel splits mappings where policies change, so that each has one.

use std::ops::Range;

use super::AddressSpace;
use crate::error::{Result, Subject};
use crate::image::{Decode, Encode};
use crate::proc::smaps::Mapping;
use crate::resource::tasks::mempolicy::Policy;
use crate::tracee::{Answers, Batch, Call, Output, Puppet, sys};

/// The policy of one mapping.
#[derive(Encode, Decode, Debug, Clone)]
pub(crate) struct RangePolicy {
    start: u64,
    end: u64,
    policy: Policy,
}

/// The modes of the policies of some mappings, which a task is asked for. To ask for each is much cheaper than
/// /proc/PID/numa_maps, which counts pages.
pub(super) struct Modes(Vec<(Call, Output)>);

impl Modes {
    /// Of so many mappings as there is room for, in order.
    pub(super) fn ask(mappings: &[Mapping], batch: &mut Batch) -> Self {
        let mut asked = Vec::new();
        let mut mappings = mappings.iter();
        while !batch.is_nearly_full()
            && let Some(mapping) = mappings.next()
        {
            asked.push(Policy::ask_mode(mapping.start, batch));
        }
        Self(asked)
    }

    /// Which of those mappings have a policy of their own?
    fn with_policy(&self, mappings: &[Mapping], answers: &Answers) -> impl Iterator<Item = Range<u64>> {
        mappings.iter().zip(&self.0).filter_map(|(mapping, (call, mode))| {
            // An error: there is no NUMA, or this is [vsyscall], which is no mapping.
            answers.get(*call).ok()?;
            let mode = answers.words(mode).first().copied()?;
            (mode as u32 != 0).then_some(mapping.start..mapping.end)
        })
    }
}

/// The policies of all mappings, of which the first have told their modes already.
pub(super) fn of_all(
    mappings: &[Mapping],
    (first, answers): (&Modes, &Answers),
    puppet: &mut Puppet<'_>,
) -> Result<Vec<RangePolicy>> {
    let mut with_policy: Vec<Range<u64>> = first.with_policy(mappings, answers).collect();
    let mut rest = mappings.get(first.0.len()..).unwrap_or_default();
    while !rest.is_empty() {
        let mut batch = puppet.batch();
        let some = Modes::ask(rest, &mut batch);
        with_policy.extend(some.with_policy(rest, &puppet.run(batch)?));
        rest = rest.get(some.0.len()..).unwrap_or_default();
    }
    let mut policies = Vec::new();
    for some in with_policy.chunks(256) {
        let mut batch = puppet.batch();
        let asked: Vec<_> =
            some.iter().map(|range| (range, Policy::ask(Some(range.start), &mut batch))).collect();
        let answers = puppet.run(batch)?;
        policies.extend(asked.into_iter().filter_map(|(range, asked)| {
            let policy = Policy::answered(&asked, &answers)?;
            Some(RangePolicy { start: range.start, end: range.end, policy })
        }));
    }
    Ok(policies)
}

impl RangePolicy {
    pub(super) fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Before the mapping has pages, whose places it decides.
    pub(super) fn build(&self, batch: &mut Batch) {
        batch.about(Subject::Vma { start: self.start, end: self.end, what: "memory policy".into() });
        let [mode, nodes, len] = self.policy.arguments(batch);
        batch.call(sys::mbind, &[self.start, self.end - self.start, mode, nodes, len, 0]);
    }

    pub(super) fn is_possible(&self, space: &AddressSpace) -> bool {
        let anonymous = space
            .vma_at(self.start)
            .is_some_and(|vma| vma.is_anonymous() && (vma.start, vma.end) == (self.start, self.end));
        anonymous && self.policy.is_possible()
    }
}
