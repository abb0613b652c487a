//! Copy-on-write: pages that a process still shares with the one that bore it. The image has them once: the runs
//! of both lead to the same place. And where runs do, a restore lets the one inherit them from the other.

use std::fs::File;
use std::ops::Range;

use super::tracking::pagemap_of;
use super::{AddressSpace, Backing, Run, Traits, Vma};
use crate::Pid;
use crate::error::{NameCall, Result};
use crate::sys::PAGE;
use crate::sys::hugetlb::PageShift;
use crate::sys::pagemap::{Frame, shared_frames};

/// The one who bore it: its pages have been stored already.
#[derive(Clone, Copy)]
pub(crate) struct Kin<'k> {
    pub(crate) pid: Pid,
    pub(crate) runs: &'k [Run],
}

/// How many pages are looked at in one go.
const CHUNK: u64 = 4096;

impl Kin<'_> {
    /// Where the image has those pages of a process, out of `ranges`, that are the very same as here. Without
    /// CAP_SYS_ADMIN in the initial user namespace the kernel does not tell.
    pub(crate) fn common(&self, pid: Pid, ranges: &[Range<u64>]) -> Result<Vec<Run>> {
        let candidates = overlap(self.runs, ranges);
        if candidates.is_empty() {
            return Ok(candidates);
        }
        let (here, there) = (pagemap_of(self.pid)?, pagemap_of(pid)?);
        let mut common = Vec::new();
        for candidate in candidates {
            // Where a candidate ends, a mapping may.
            let first = common.len();
            for start in (0..candidate.len).step_by((CHUNK * PAGE) as usize) {
                let len = (candidate.len - start).min(CHUNK * PAGE);
                let piece =
                    Run { addr: candidate.addr + start, len, offset: candidate.offset + start, ..candidate };
                compare(piece, (&here, &there), first, &mut common)?;
            }
        }
        Ok(common)
    }
}

/// Restore: what a process keeps of the memory that it is born with, a copy of which it shares with its donor.
#[derive(Debug, Default)]
pub(crate) struct Inheritance {
    /// Mappings of its own, each a part of one of the donor's.
    pub(super) kept: Vec<Range<u64>>,
    /// Pages in them that are none of its own.
    pub(super) stale: Vec<Range<u64>>,
    /// Its own pages.
    shared: Vec<Range<u64>>,
}

impl Inheritance {
    /// What can be kept, given that runs which lead to the same place are the same pages.
    pub(crate) fn of(child: &AddressSpace, donor: &AddressSpace) -> Self {
        let mut inheritance = Self::default();
        // One that is mapped cannot be exchanged.
        if child.executable != donor.executable {
            return inheritance;
        }
        let common = common_runs(&child.runs, &donor.runs);
        for vma in &child.vmas {
            let shared = overlap(&common, std::slice::from_ref(&vma.range()));
            if shared.is_empty() || !is_part_of(vma, child, donor) {
                continue;
            }
            let own = overlap(&child.runs, std::slice::from_ref(&vma.range()));
            if vma.is_filled_first() && own != shared {
                continue; // the donor's is protected by now
            }
            let shared = shared.iter().map(Run::range);
            let all = overlap(&donor.runs, std::slice::from_ref(&vma.range()));
            let all: Vec<_> = all.iter().map(Run::range).collect();
            let stale = widen(without(&all, shared.clone()), vma.huge);
            if vma.huge != 0 && without(&stale, shared.clone()) != stale {
                continue;
            }
            inheritance.stale.extend(stale);
            inheritance.shared.extend(shared);
            inheritance.kept.push(vma.range());
        }
        inheritance
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// How many bytes of its own it has already.
    pub(crate) fn bytes(&self) -> u64 {
        self.shared.iter().map(|range| range.end - range.start).sum()
    }

    /// The runs of a process that it still has to be given.
    pub(crate) fn missing(&self, runs: &[Run]) -> Vec<Run> {
        beside(runs, &self.shared)
    }
}

/// What a process has to have before it has children: what they inherit, and what becomes of no use later.
#[derive(Debug, Default)]
pub(crate) struct Legacy(Vec<Range<u64>>);

impl Legacy {
    /// A child inherits this.
    pub(crate) fn add(&mut self, inheritance: &Inheritance) {
        self.0.extend(inheritance.shared.iter().cloned());
    }

    /// Of these runs those that have to be there first, and the others.
    pub(crate) fn divide(&self, runs: &[Run], space: &AddressSpace) -> (Vec<Run>, Vec<Run>) {
        // Locking needs pages, and comes before there are children.
        let needed = |vma: &&Vma| vma.has(Traits::LOCKED) || vma.is_filled_first();
        let needed = space.vmas.iter().filter(needed).map(Vma::range);
        let first = union(self.0.iter().cloned().chain(needed).collect());
        (overlap(runs, &first), beside(runs, &first))
    }
}

/// The parts of runs that are outside of the ranges; both are in order.
pub(super) fn beside(runs: &[Run], ranges: &[Range<u64>]) -> Vec<Run> {
    let all: Vec<_> = runs.iter().map(Run::range).collect();
    overlap(runs, &without(&all, ranges.iter().cloned()))
}

/// All of them, in order, each address once, joined where they meet.
pub(super) fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
    ranges
}

/// Huge pages go as a whole.
fn widen(ranges: Vec<Range<u64>>, huge: u8) -> Vec<Range<u64>> {
    let Some(page) = PageShift::new(huge) else { return ranges };
    let mut wide: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let range = range.start & !(page.size() - 1)..range.end.next_multiple_of(page.size());
        match wide.last_mut() {
            Some(last) if range.start <= last.end => last.end = range.end,
            _ => wide.push(range),
        }
    }
    wide
}

/// Is it a part of a mapping of the donor's, with the same properties, and passed on to children? What is only set
/// when all have been born may differ.
fn is_part_of(vma: &Vma, child: &AddressSpace, donor: &AddressSpace) -> bool {
    let late = Traits::LOCKED | Traits::LOCK_ON_FAULT | Traits::SEALED;
    let never = Traits::DONT_FORK | Traits::WIPE_ON_FORK;
    let Some(whole) = donor.vma_at(vma.start).filter(|whole| vma.end <= whole.end) else { return false };
    let same_memory = match (&vma.backing, &whole.backing) {
        (Backing::Anonymous { name }, Backing::Anonymous { name: other }) => name == other,
        (Backing::File { index, shared: false }, Backing::File { index: other, shared: false }) => {
            child.files.get(*index as usize) == donor.files.get(*other as usize)
                && vma.offset.wrapping_sub(vma.start) == whole.offset.wrapping_sub(whole.start)
        }
        _ => false,
    };
    let inside = |start: u64, end: u64| start < whole.end && end > whole.start;
    same_memory
        && vma.prot == whole.prot
        && vma.huge == whole.huge
        && vma.traits() - late == whole.traits() - late
        && !vma.traits().intersects(never)
        && !donor.guards.iter().any(|(start, end)| inside(*start, *end))
        && !donor.policies.iter().any(|policy| inside(policy.range().start, policy.range().end))
}

/// The parts of runs that are the same in both; both are in order.
fn common_runs(one: &[Run], other: &[Run]) -> Vec<Run> {
    let ranges: Vec<_> = one.iter().map(Run::range).collect();
    let mut other = overlap(other, &ranges).into_iter().peekable();
    let mut common: Vec<Run> = Vec::new();
    for run in one {
        while let Some(part) = other.next_if(|part| part.addr < run.addr + run.len) {
            let place = run.offset.wrapping_add(part.addr - run.addr);
            if (part.segment, part.offset) == (run.segment, place) {
                common.push(part);
            }
        }
    }
    common
}

/// The kernel may move a page to another frame at any time, and another page to that one: so twice for one of them.
fn compare(piece: Run, (here, there): (&File, &File), first: usize, common: &mut Vec<Run>) -> Result<()> {
    let look =
        |pagemap| shared_frames(pagemap, piece.addr, piece.len / PAGE).call("pread(/proc/PID/pagemap)");
    let before = look(there)?;
    if before.iter().all(Option::is_none) {
        return Ok(());
    }
    let (ours, after) = (look(here)?, look(there)?);
    let same =
        |((a, b), c): ((&Option<Frame>, &Option<Frame>), &Option<Frame>)| a.is_some() && a == b && a == c;
    let all = before.iter().zip(&ours).zip(&after).map(same);
    for at in all.enumerate().filter(|(_, same)| *same).map(|(index, _)| index as u64 * PAGE) {
        let page = Run { addr: piece.addr + at, len: PAGE, offset: piece.offset + at, ..piece };
        match common.get_mut(first..).and_then(|joinable| joinable.last_mut()) {
            Some(last) if page.continues(last) => last.len += PAGE,
            _ => common.push(page),
        }
    }
    Ok(())
}

impl Run {
    /// Is it the next part of the same memory, in the same place of the image?
    fn continues(&self, last: &Run) -> bool {
        let follows = (self.addr, self.offset) == (last.addr + last.len, last.offset + last.len);
        follows && self.segment == last.segment
    }

    pub(crate) fn range(&self) -> Range<u64> {
        self.addr..self.addr + self.len
    }

    /// The part of it that is inside.
    fn within(&self, range: &Range<u64>) -> Option<Run> {
        let (start, end) = (self.addr.max(range.start), (self.addr + self.len).min(range.end));
        let skipped = start - self.addr;
        (start < end).then(|| Run { addr: start, len: end - start, offset: self.offset + skipped, ..*self })
    }
}

/// The parts of runs that are inside of the ranges; both are in order.
pub(crate) fn overlap(runs: &[Run], ranges: &[Range<u64>]) -> Vec<Run> {
    let mut parts = Vec::new();
    let mut runs = runs.iter().peekable();
    for range in ranges {
        while runs.next_if(|run| run.addr + run.len <= range.start).is_some() {}
        while let Some(run) = runs.peek().filter(|run| run.addr < range.end) {
            parts.extend(run.within(range));
            if run.addr + run.len > range.end {
                break;
            }
            runs.next();
        }
    }
    parts
}

/// What is left of ranges without others; both are in order.
pub(crate) fn without(ranges: &[Range<u64>], others: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut others = others.peekable();
    for range in ranges {
        let mut at = range.start;
        while let Some(other) = others.peek().filter(|other| other.start < range.end) {
            if at < other.start {
                left.push(at..other.start);
            }
            at = at.max(other.end);
            if other.end > range.end {
                break;
            }
            others.next();
        }
        if at < range.end {
            left.push(at..range.end);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(addr: u64, len: u64, offset: u64) -> Run {
        Run { addr, len, segment: 0, offset }
    }

    #[test]
    fn parts_of_runs() {
        let runs = [run(10, 10, 100), run(30, 10, 200), run(50, 5, 300)];
        assert_eq!(
            overlap(&runs, &[0..10, 12..14, 18..32, 35..36, 39..60]),
            [
                run(12, 2, 102),
                run(18, 2, 108),
                run(30, 2, 200),
                run(35, 1, 205),
                run(39, 1, 209),
                run(50, 5, 300),
            ]
        );
        assert_eq!(overlap(&runs, &[]), []);
    }

    #[test]
    fn huge_pages_go_as_a_whole() {
        const HUGE: u64 = 1 << 21;
        let ranges = vec![PAGE..2 * PAGE, HUGE - PAGE..HUGE + PAGE, 5 * HUGE..6 * HUGE];
        assert_eq!(widen(ranges.clone(), 0), ranges);
        assert_eq!(widen(ranges, 21), [0..2 * HUGE, 5 * HUGE..6 * HUGE]);
    }

    #[test]
    fn each_address_once() {
        let ranges = vec![20..30, 0..10, 5..7, 8..12, 12..15, 25..26];
        assert_eq!(union(ranges), [0..15, 20..30]);
        assert_eq!(union(Vec::new()), []);
        let runs = [run(0, 10, 100), run(18, 10, 300)];
        assert_eq!(beside(&runs, &[2..4, 8..20]), [run(0, 2, 100), run(4, 4, 104), run(20, 8, 302)]);
    }

    #[test]
    fn same_places() {
        let one = [run(0, 10, 100), run(20, 10, 300)];
        let other = [run(2, 4, 102), run(6, 2, 50), run(8, 30, 108)];
        assert_eq!(common_runs(&one, &other), [run(2, 4, 102), run(8, 2, 108)]);
        let elsewhere = Run { segment: 1, ..run(2, 4, 102) };
        assert_eq!(common_runs(&one, &[elsewhere]), []);
    }

    #[test]
    fn what_is_left() {
        let left = |others: &[(u64, u64)]| {
            let left = without(&[0..10, 20..30], others.iter().map(|(start, end)| *start..*end));
            left.into_iter().map(|range| (range.start, range.end)).collect::<Vec<_>>()
        };
        assert_eq!(left(&[]), [(0, 10), (20, 30)]);
        assert_eq!(left(&[(0, 10), (22, 23), (29, 30)]), [(20, 22), (23, 29)]);
        assert_eq!(left(&[(5, 25)]), [(0, 5), (25, 30)]);
        assert_eq!(left(&[(0, 1), (2, 3), (15, 16)]), [(1, 2), (3, 10), (20, 30)]);
        assert_eq!(left(&[(0, 40)]), []);
    }
}
