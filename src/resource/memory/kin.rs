//! Copy-on-write: pages that a process still shares with the one that bore it. The image has them once: the runs
//! of both lead to the same place. And where runs do, a restore lets the one inherit them from the other.

use std::fs::File;
use std::ops::Range;

use super::{AddressSpace, Run};
use crate::Pid;
use crate::error::{Context, NameCall, Result, Subject};
use crate::sys::PAGE;
use crate::sys::pagemap::{Frame, frames};

/// The one who bore it: its pages have been stored already.
#[derive(Clone, Copy)]
pub(crate) struct Kin<'k> {
    pub(crate) pid: Pid,
    pub(crate) space: &'k AddressSpace,
}

/// With whom a process may share pages.
#[derive(Clone, Copy)]
pub(crate) enum Relatives<'k> {
    /// With nobody in the tree.
    None,
    /// With the one who bore it, or (None) with its children only.
    Some(Option<Kin<'k>>),
}

/// How many pages are looked at in one go.
const CHUNK: u64 = 4096;

impl Kin<'_> {
    /// Where the image has those pages of a process, out of `ranges`, that are the very same as here. Without
    /// CAP_SYS_ADMIN in the initial user namespace the kernel does not tell.
    pub(super) fn common(&self, pid: Pid, ranges: &[Range<u64>]) -> Result<Vec<Run>> {
        let candidates = overlap(&self.space.runs, ranges);
        if candidates.is_empty() {
            return Ok(candidates);
        }
        let (here, there) = (pagemap(self.pid)?, pagemap(pid)?);
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

fn pagemap(pid: Pid) -> Result<File> {
    let path = format!("/proc/{pid}/pagemap");
    File::open(&path).call("open").about(|| Subject::Path(path.into()))
}

/// The kernel may move a page to another frame at any time, and another page to that one: so twice for one of them.
fn compare(piece: Run, (here, there): (&File, &File), first: usize, common: &mut Vec<Run>) -> Result<()> {
    let look = |pagemap| frames(pagemap, piece.addr, piece.len / PAGE).call("pread(/proc/PID/pagemap)");
    let (before, theirs, after) = (look(here)?, look(there)?, look(here)?);
    let same =
        |((a, b), c): ((&Option<Frame>, &Option<Frame>), &Option<Frame>)| a.is_some() && a == b && a == c;
    let all = before.iter().zip(&theirs).zip(&after).map(same);
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

    pub(super) fn range(&self) -> Range<u64> {
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
fn overlap(runs: &[Run], ranges: &[Range<u64>]) -> Vec<Run> {
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
pub(super) fn without(ranges: &[Range<u64>], others: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
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
    fn what_is_left() {
        let left = |ranges: &[Range<u64>], others: &[Range<u64>]| without(ranges, others.iter().cloned());
        assert_eq!(left(&[0..10, 20..30], &[]), [0..10, 20..30]);
        assert_eq!(left(&[0..10, 20..30], &[0..10, 22..23, 29..30]), [20..22, 23..29]);
        assert_eq!(left(&[0..10, 20..30], &[5..25]), [0..5, 25..30]);
        assert_eq!(left(&[0..10, 20..30], &[0..1, 2..3, 15..16]), [1..2, 3..10, 20..30]);
        assert_eq!(left(&[0..10], &[0..40]), []);
    }
}
