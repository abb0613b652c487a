//! The private pages of a tree. A process that has more of them than the others writes them by several threads; those that
//! have about as much as others write them at the same time, each by its own first thread.

use std::collections::BTreeMap;
use std::ops::Range;

use super::inside::Alone;
use super::kin::Kin;
use super::pages::{FromInside, PageWriter, Plan, Whose, size};
use super::survey::Scan;
use super::tracking::Stock;
use super::{AddressSpace, Vma};
use crate::Pid;
use crate::error::{Context, Result};
use crate::image::ImageSink;
use crate::tracee::{Memory, Tracee};

/// Whose pages a process may share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinship {
    /// Those of the process of this number, which bore it.
    pub(crate) donor: Option<u32>,
    /// Its children may share its own; they wait until it is done.
    pub(crate) is_donor: bool,
}

/// A process whose pages are to be written.
pub(crate) struct Member<'b> {
    pub(crate) pid: Pid,
    pub(crate) speaker: Pid,
    /// By which the image knows it.
    pub(crate) number: u32,
    /// Whose descriptors it has.
    pub(crate) files: u32,
    pub(crate) kinship: Kinship,
    pub(crate) pages: &'b Scan,
    pub(crate) memory: &'b Memory,
    pub(crate) inside: &'b dyn FromInside,
    /// How much those have of their own that come after it.
    pub(crate) rest: u64,
}

impl Member<'_> {
    fn reader(&self) -> impl Fn(&[Range<u64>], &mut [u8]) -> Result<()> + Sync + use<'_> {
        let (memory, shares) = (self.memory, self.kinship != Kinship::default());
        move |ranges: &[Range<u64>], buffer: &mut [u8]| match shares {
            false => memory.read_ranges(ranges, buffer),
            true => memory.read_shared_ranges(ranges, buffer),
        }
    }
}

/// Processes whose pages are being written, or have been.
#[derive(Default)]
pub(crate) struct Crowd<'b> {
    under_way: Vec<Busy<'b>>,
    done: BTreeMap<u32, (Pid, AddressSpace)>,
}

/// A process that writes by itself.
struct Busy<'b> {
    member: Member<'b>,
    space: AddressSpace,
    plan: Plan,
    alone: Alone<'b>,
}

impl<'b> Crowd<'b> {
    /// Has the pages of one more process written, sooner or later.
    pub(crate) fn add(
        &mut self,
        member: Member<'b>,
        (mut space, stock): (AddressSpace, &Stock),
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<()> {
        while self.has(|other| Some(other.number) == member.kinship.donor) {
            self.wait_for_one(pages, image)?;
        }
        let donor = member.kinship.donor.and_then(|donor| self.done.get(&donor));
        let donor = donor.map(|(pid, space)| Kin { pid: *pid, runs: &space.runs });
        let whose = Whose { pid: member.speaker, number: member.number, pages: member.pages, donor, stock };
        let mut plan = pages.plan_private(&mut space, whose, &member.reader(), member.inside, image)?;
        // Which numbers are free in a table must not depend on who else is at work.
        while !pages.has_lane() || self.has(|other| other.files == member.files) {
            self.wait_for_one(pages, image)?;
        }
        let inner = size(&plan.inner);
        if inner > 0 && self.is_worth_it(&member, inner, pages) {
            let alone = pages.begin_inner(&mut plan, member.inside.speaker()?, image)?;
            self.under_way.push(Busy { member, space, plan, alone });
            return Ok(());
        }
        if inner > 0 {
            self.wait_for_all(pages, image)?;
            pages.write_inner(&mut plan, member.inside.speaker()?, &means_nothing_in(&space), image)?;
        }
        self.write_rest(member, space, plan, pages, image)
    }

    /// Is it quicker to write so much beside others than by threads of its own? If nobody waits for it, and all others
    /// who could write have as much to do.
    fn is_worth_it(&self, member: &Member<'_>, inner: u64, pages: &mut PageWriter<'_>) -> bool {
        let others = member.rest + self.under_way.iter().map(|busy| busy.alone.rest()).sum::<u64>();
        !member.kinship.is_donor && others >= inner * (pages.most() as u64 - 1)
    }

    fn has(&self, what: impl Fn(&Member<'_>) -> bool) -> bool {
        self.under_way.iter().any(|busy| what(&busy.member))
    }

    /// When there is nobody more: what has come of it, by their numbers.
    pub(crate) fn finish(
        mut self,
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<impl Iterator<Item = (u32, AddressSpace)>> {
        self.wait_for_all(pages, image)?;
        Ok(self.done.into_iter().map(|(number, (_, space))| (number, space)))
    }

    fn wait_for_all(&mut self, pages: &mut PageWriter<'_>, image: &mut dyn ImageSink) -> Result<()> {
        while !self.under_way.is_empty() {
            self.wait_for_one(pages, image)?;
        }
        Ok(())
    }

    fn wait_for_one(&mut self, pages: &mut PageWriter<'_>, image: &mut dyn ImageSink) -> Result<()> {
        loop {
            let tracees = self.under_way.iter().map(|busy| busy.alone.tracee());
            let Some(first) = Tracee::wait_for_first(tracees) else { return Ok(()) };
            let Some(Busy { member, space, alone, .. }) = self.under_way.get_mut(first) else {
                return Ok(());
            };
            if !pages.go_on_inner(alone, &means_nothing_in(space)).of(member.pid)? {
                let Busy { member, space, mut plan, alone } = self.under_way.swap_remove(first);
                pages.end_inner(&mut plan, alone).of(member.pid)?;
                return self.write_rest(member, space, plan, pages, image);
            }
        }
    }

    fn write_rest(
        &mut self,
        member: Member<'b>,
        mut space: AddressSpace,
        plan: Plan,
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<()> {
        let runs =
            pages.write_outer(plan, &member.reader(), &means_nothing_in(&space), image).of(member.pid)?;
        space.runs = runs;
        self.done.insert(member.number, (member.speaker, space));
        Ok(())
    }
}

/// A page of zeroes in a private file mapping hides what the file says there.
fn means_nothing_in(space: &AddressSpace) -> impl Fn(u64) -> bool + Sync + '_ {
    |address| space.vma_at(address).is_some_and(Vma::is_anonymous)
}
