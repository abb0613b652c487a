//! What the kernel tells of an address space by a look at every page of it: how its mappings are (smaps), and what is
//! populated (PAGEMAP_SCAN). Both take a tenth of a second for some GiB, so that they are looked at together.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::mpsc;

use nix::errno::Errno;

use super::tracking::pagemap_of;
use super::{ADDRESS_END, AddressSpace, SMAPS, mappings, note_mappings};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Result};
use crate::freeze::Process;
use crate::parallel;
use crate::proc::read;
use crate::proc::smaps::Mapping;
use crate::sys::PAGE;
use crate::sys::pagemap::{Page, Query, scan};

/// What an address space consists of.
pub(crate) struct Survey {
    pub(crate) mappings: Vec<Mapping>,
    pub(crate) pages: Scan,
}

impl Survey {
    /// Of one process, by two threads if there is much to look at.
    pub(crate) fn of(process: &Process) -> Result<Self> {
        /// From so many bytes on, a thread costs less than it saves.
        const MUCH: u64 = 16 * 1024 * 1024;
        /// So many pages of text are read before they are parsed: all of it may be much.
        const AHEAD: usize = 1024;
        let pid = process.speaker();
        if process.stat.rss * PAGE < MUCH {
            return Self::one_by_one(pid);
        }
        std::thread::scope(|scope| {
            let (give, take) = mpsc::sync_channel::<Vec<u8>>(AHEAD);
            let scan = move || {
                let pages = Scan::of(pid)?;
                let mut mappings = Vec::new();
                take.into_iter().try_for_each(|lines| note_mappings(pid, &lines, &mut mappings))?;
                Ok(Self { mappings, pages })
            };
            let scanner = std::thread::Builder::new().name("cryosleep-scan".into());
            let scanner = scanner.spawn_scoped(scope, scan).call("clone")?;
            let all_read = read::some_lines_each(pid, SMAPS, |lines| {
                // Should the scanner have failed, it tells itself.
                let _ = give.send(lines.to_vec());
                Ok(())
            });
            drop(give);
            let survey = scanner.join().unwrap_or_else(|_| Err(ended()))?;
            all_read.map(|()| survey)
        })
    }

    fn one_by_one(pid: Pid) -> Result<Self> {
        Ok(Self { mappings: mappings(pid)?, pages: Scan::of(pid)? })
    }

    /// Of several processes, by several threads.
    pub(crate) fn of_all(pids: &[Pid]) -> Result<BTreeMap<Pid, Self>> {
        let seen = parallel::map(pids, 2, |pid| Ok((*pid, Self::one_by_one(*pid).of(*pid)?)))?;
        Ok(seen.into_iter().collect())
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Kernel, "a reading thread ended early")
}

/// What a scan of page tables has found, in order: pages that belong to the process alone, present or swapped out and not
/// the page cache's, and guard regions.
#[derive(Debug, Default)]
pub(crate) struct Scan(Vec<(Range<u64>, Page)>);

impl Scan {
    fn of(pid: Pid) -> Result<Self> {
        let pagemap = pagemap_of(pid)?;
        let query = |any| {
            let (mut found, none) = (Vec::new(), Page::FILE | Page::PFNZERO);
            let taken = |range, page| found.push((range, page));
            scan(&pagemap, 0..ADDRESS_END, Query { any, none }, taken).map(|()| Self(found))
        };
        let populated = Page::PRESENT | Page::SWAPPED;
        let found = match query(populated | Page::GUARD) {
            // Linux before 6.15 does not know that category.
            Err(Errno::EINVAL) => query(populated),
            found => found,
        };
        found.call("ioctl(PAGEMAP_SCAN)").hint("PAGEMAP_SCAN needs Linux 6.7")
    }

    /// What of it is in which mapping.
    pub(crate) fn populated(&self, spans: &[Span]) -> Populated {
        let mut populated = Populated::default();
        let mut spans = spans.iter().peekable();
        for (range, page) in &self.0 {
            let mut at = range.start;
            while at < range.end {
                while spans.next_if(|span| span.range.end <= at).is_some() {}
                let Some(span) = spans.peek() else { return populated };
                let piece = at.max(span.range.start)..range.end.min(span.range.end);
                at = span.range.end;
                let guard = page.contains(Page::GUARD);
                if piece.start < piece.end && (guard || span.private) {
                    populated.swapped.extend(page.contains(Page::SWAPPED).then(|| piece.clone()));
                    populated.add(piece, guard, span.range.start);
                }
            }
        }
        populated
    }
}

/// A mapping, as far as its pages are concerned. They are in order.
pub(crate) struct Span {
    pub(crate) range: Range<u64>,
    /// Does the process have pages of its own in it?
    pub(crate) private: bool,
}

impl AddressSpace {
    pub(super) fn spans(&self) -> Vec<Span> {
        self.vmas.iter().map(|vma| Span { range: vma.range(), private: vma.is_private() }).collect()
    }
}

/// What mappings are populated with.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Populated {
    /// Pages that belong to the process alone.
    pub(crate) data: Vec<Range<u64>>,
    /// Those of them that are swapped out.
    pub(crate) swapped: Vec<Range<u64>>,
    /// Guard regions (MADV_GUARD_INSTALL).
    pub(super) guards: Vec<Range<u64>>,
}

impl Populated {
    /// Ranges end where mappings do, even if the next one follows at once.
    fn add(&mut self, piece: Range<u64>, guard: bool, vma_start: u64) {
        let ranges = if guard { &mut self.guards } else { &mut self.data };
        match ranges.last_mut() {
            Some(last) if last.end == piece.start && piece.start != vma_start => last.end = piece.end,
            _ => ranges.push(piece),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init)] // one range is what is meant
    fn pages_are_those_of_their_mappings() {
        let span = |range, private| Span { range, private };
        let spans = [span(10..20, true), span(20..30, true), span(40..50, false), span(60..70, true)];
        let scan = Scan(vec![
            (5..12, Page::PRESENT),
            (12..14, Page::SWAPPED),
            (15..25, Page::PRESENT),
            (42..44, Page::PRESENT),
            (45..46, Page::GUARD),
            (61..62, Page::GUARD),
            (65..90, Page::PRESENT),
        ]);
        let expected = Populated {
            data: vec![10..14, 15..20, 20..25, 65..70],
            swapped: vec![12..14],
            guards: vec![45..46, 61..62],
        };
        assert_eq!(scan.populated(&spans), expected);
        assert_eq!(scan.populated(&[]), Populated::default());
    }
}
