//! NUMA policies of mappings: mbind(2). The kernel splits mappings where policies change, so that each has one.

use std::ops::Range;

use super::AddressSpace;
use crate::error::{Result, Subject};
use crate::image::{Decode, Encode};
use crate::proc::smaps::Mapping;
use crate::resource::tasks::mempolicy::Policy;
use crate::tracee::{Batch, Puppet, sys};

/// The policy of one mapping.
#[derive(Encode, Decode, Debug, Clone)]
pub(crate) struct RangePolicy {
    start: u64,
    end: u64,
    policy: Policy,
}

/// Asks for the policies of all mappings. To ask for each is much cheaper than /proc/PID/numa_maps, which counts
/// pages.
pub(super) fn ask(puppet: &mut Puppet<'_>, mappings: &[Mapping]) -> Result<Vec<RangePolicy>> {
    let mut with_policy: Vec<Range<u64>> = Vec::new();
    for some in mappings.chunks(1024) {
        let mut batch = puppet.batch();
        let asked: Vec<_> =
            some.iter().map(|mapping| (mapping, Policy::ask_mode(mapping.start, &mut batch))).collect();
        let answers = puppet.run(batch)?;
        for (mapping, (call, mode)) in asked {
            // An error: there is no NUMA, or this is [vsyscall], which is no mapping.
            let mode = answers.get(call).ok().and_then(|_| answers.words(&mode).first().copied());
            if mode.is_some_and(|mode| mode as u32 != 0) {
                with_policy.push(mapping.start..mapping.end);
            }
        }
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
