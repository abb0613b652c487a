//! The private pages of a tree: processes that have much of them write them one after the other, by several threads each;
//! many smaller ones do it at the same time, by themselves.

use std::collections::BTreeMap;
use std::ops::Range;

use super::inside::Alone;
use super::kin::{Kin, Relatives};
use super::pages::{FromInside, PageWriter, Plan, Whose, size};
use super::survey::Scan;
use super::tracking::Stock;
use super::{AddressSpace, Vma};
use crate::Pid;
use crate::error::{Context, Result};
use crate::image::ImageSink;
use crate::tracee::{Memory, Tracee};

/// With whom in the tree a process may share pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kinship {
    None,
    /// With its children only.
    Donor,
    /// With the process of this number, which bore it.
    Child(u32),
}

impl Kinship {
    fn donor(self) -> Option<u32> {
        match self {
            Kinship::None | Kinship::Donor => None,
            Kinship::Child(donor) => Some(donor),
        }
    }
}

/// A process whose pages are to be written.
pub(crate) struct Member<'b> {
    pub(crate) pid: Pid,
    pub(crate) speaker: Pid,
    /// By which the image knows it.
    pub(crate) number: u32,
    pub(crate) kinship: Kinship,
    pub(crate) pages: &'b Scan,
    pub(crate) memory: &'b Memory,
    /// How much those have that come after it.
    pub(crate) rest: u64,
}

impl Member<'_> {
    fn reader(&self) -> impl Fn(&[Range<u64>], &mut [u8]) -> Result<()> + Sync + use<'_> {
        let (memory, shares) = (self.memory, self.kinship != Kinship::None);
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
        inside: &FromInside<'_, 'b>,
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<()> {
        while self.is_under_way(member.kinship.donor()) {
            self.wait_for_one(pages, image)?;
        }
        let relatives = self.relatives(member.kinship);
        let whose =
            Whose { pid: member.speaker, number: member.number, pages: member.pages, relatives, stock };
        let mut plan = pages.plan_private(&mut space, whose, &member.reader(), inside, image)?;
        let inner = size(&plan.inner);
        // Beside others only if those have as much to do: otherwise its own threads are quicker.
        let beside = inner > 0 && member.rest + self.under_way() >= inner;
        while !pages.has_lane() {
            self.wait_for_one(pages, image)?;
        }
        if beside {
            let alone = pages.begin_inner(&mut plan, (inside.speaker)()?, image)?;
            self.under_way.push(Busy { member, space, plan, alone });
            return Ok(());
        }
        if inner > 0 {
            self.wait_for_all(pages, image)?;
            pages.write_inner(&mut plan, (inside.speaker)()?, &means_nothing_in(&space), image)?;
        }
        self.write_rest(member, space, plan, pages, image)
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
            let first = Tracee::wait_for_first(self.under_way.iter().map(|busy| busy.alone.tracee()));
            let Some(Busy { member, space, alone, .. }) = self.under_way.get_mut(first) else {
                return Ok(());
            };
            if pages.go_on_inner(alone, &means_nothing_in(space)).of(member.pid)? {
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

    fn is_under_way(&self, number: Option<u32>) -> bool {
        self.under_way.iter().any(|busy| Some(busy.member.number) == number)
    }

    /// How much is being written.
    fn under_way(&self) -> u64 {
        self.under_way.iter().map(|busy| busy.alone.bytes()).sum()
    }

    fn relatives(&self, kinship: Kinship) -> Relatives<'_> {
        match kinship {
            Kinship::None => Relatives::None,
            Kinship::Donor => Relatives::Some(None),
            Kinship::Child(donor) => {
                let donor = self.done.get(&donor);
                Relatives::Some(donor.map(|(pid, space)| Kin { pid: *pid, runs: &space.runs }))
            }
        }
    }
}

/// A page of zeroes in a private file mapping hides what the file says there.
fn means_nothing_in(space: &AddressSpace) -> impl Fn(u64) -> bool + Sync + '_ {
    |address| space.vma_at(address).is_some_and(Vma::is_anonymous)
}
