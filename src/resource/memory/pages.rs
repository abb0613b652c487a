//! Pages: from a stopped task into the segments of an image, and back.
//!
//! Small amounts are read by the checkpointing process (process_vm_readv(2)). Large ones are written by the
//! task itself, which copies them once instead of twice. Pages that were never touched, that are the
//! kernel's page of zeroes or that still are what their file says are not stored.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use super::AddressSpace;
use super::inside::{self, Share};
use super::kin::{self, Relatives};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};
use crate::hooks::Progress;
use crate::image::{Decode, Encode, Image, ImageWriter, Segment};
use crate::sys::PAGE;
use crate::sys::pagemap::{Page, Query, scan};
use crate::tracee::Memory;

/// Consecutive pages and where their contents are.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first page's address in its address space, or offset in its object.
    pub(crate) addr: u64,
    /// In bytes.
    pub(crate) len: u64,
    /// Which segment of the image.
    pub(crate) segment: u16,
    /// Where in it.
    pub(crate) offset: u64,
}

/// Copies of this size go through the processor's caches best.
const BUFFER: usize = 512 * 1024;

/// From this size on it pays that the task writes its pages itself.
pub(crate) const LARGE: u64 = 4 * 1024 * 1024;

/// Another writer pays from this size on.
const SHARE: u64 = 4 * 1024 * 1024;

/// How many pages were looked at and stored.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) scanned: u64,
    pub(crate) zero: u64,
    pub(crate) written: u64,
}

/// A segment that is being written, and how far it is.
struct Lane {
    segment: Segment,
    offset: u64,
}

/// Writes pages into the segments of an image.
pub(crate) struct PageWriter<'h> {
    /// One for each writer; the first is everybody's.
    lanes: Vec<Lane>,
    writers: usize,
    buffer: Vec<u8>,
    pub(crate) counts: Counts,
    progress: &'h mut dyn FnMut(Progress) -> Result<()>,
}

/// Writes a task's memory from inside the task.
pub(crate) struct FromInside<'p> {
    pub(crate) is_possible: &'p dyn Fn() -> bool,
    pub(crate) write: &'p mut dyn FnMut(&[Share<'_>]) -> Result<()>,
}

impl<'h> PageWriter<'h> {
    /// At most so many `writers` at the same time.
    pub(crate) fn new(writers: usize, progress: &'h mut dyn FnMut(Progress) -> Result<()>) -> Self {
        Self { lanes: Vec::new(), writers, buffer: Vec::new(), counts: Counts::default(), progress }
    }

    /// Stores the pages that a process has of its own, but for those that its kin still has too.
    pub(crate) fn write_private(
        &mut self,
        space: &mut AddressSpace,
        (pid, relatives): (Pid, Relatives<'_>),
        memory: &Memory,
        inside: FromInside<'_>,
        image: &mut ImageWriter,
    ) -> Result<()> {
        let Populated { data, guards } = Populated::scan(space, pid)?;
        space.guards = guards.iter().map(|range| (range.start, range.end)).collect();
        let common = match relatives {
            Relatives::Some(Some(kin)) => kin.common(pid, &data)?,
            Relatives::Some(None) | Relatives::None => Vec::new(),
        };
        let ranges = kin::without(&data, common.iter().map(Run::range));
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        self.counts.scanned +=
            space.vmas.iter().filter(|vma| vma.is_private()).map(|vma| vma.len() / PAGE).sum::<u64>();
        space.runs = match total >= LARGE && (inside.is_possible)() {
            true => self.write_inside(&ranges, inside.write, image)?,
            false => {
                let source = |ranges: &[Range<u64>], buffer: &mut [u8]| match relatives {
                    Relatives::None => memory.read_ranges(ranges, buffer),
                    Relatives::Some(_) => memory.read_shared_ranges(ranges, buffer),
                };
                // A page of zeroes in a private file mapping hides what the file says there.
                let sparse = |address| space.vma_at(address).is_some_and(super::Vma::is_anonymous);
                self.write_ranges(&ranges, source, sparse, image)?
            }
        };
        space.runs.extend(common);
        space.runs.sort_unstable_by_key(|run| run.addr);
        Ok(())
    }

    fn write_inside(
        &mut self,
        ranges: &[Range<u64>],
        write: &mut dyn FnMut(&[Share<'_>]) -> Result<()>,
        image: &mut ImageWriter,
    ) -> Result<Vec<Run>> {
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let parts = divide(ranges, (total / SHARE).clamp(1, self.writers.min(inside::MOST) as u64));
        let (mut runs, mut starts) = (Vec::new(), Vec::new());
        for (number, part) in parts.iter().enumerate() {
            let len = part.iter().map(|range| range.end - range.start).sum();
            let (segment, start) = self.reserve(number, len, image)?;
            starts.push(start);
            let mut offset = start;
            for range in part {
                runs.push(Run { addr: range.start, len: range.end - range.start, segment, offset });
                offset += range.end - range.start;
            }
        }
        let lanes = self.lanes.iter().zip(starts).zip(parts);
        let shares = lanes.map(|((lane, offset), ranges)| Share { file: &lane.segment.file, offset, ranges });
        write(&shares.collect::<Vec<_>>())?;
        self.account(total)?;
        Ok(runs)
    }

    /// Copies ranges of a file: shared memory, by its own file.
    pub(crate) fn copy_file(
        &mut self,
        file: &File,
        ranges: &[Range<u64>],
        image: &mut ImageWriter,
    ) -> Result<Vec<Run>> {
        let source = |ranges: &[Range<u64>], mut buffer: &mut [u8]| {
            for range in ranges {
                let (head, rest) = buffer.split_at_mut((range.end - range.start) as usize);
                file.read_exact_at(head, range.start).call("pread")?;
                buffer = rest;
            }
            Ok(())
        };
        self.write_ranges(ranges, source, |_| true, image)
    }

    /// Copies the data of a file, which may end within a page. Are zeroes that were written data?
    pub(crate) fn copy_data(
        &mut self,
        file: &File,
        data: &[Range<u64>],
        zeroes: bool,
        image: &mut ImageWriter,
    ) -> Result<Vec<Run>> {
        let mut pages: Vec<Range<u64>> = Vec::new();
        for range in data {
            let range = range.start & !(PAGE - 1)..range.end.next_multiple_of(PAGE);
            match pages.last_mut() {
                Some(last) if range.start <= last.end => last.end = range.end,
                _ => pages.push(range),
            }
        }
        let source = |ranges: &[Range<u64>], mut buffer: &mut [u8]| {
            for range in ranges {
                let (head, rest) = buffer.split_at_mut((range.end - range.start) as usize);
                read_at_most(file, head, range.start)?;
                buffer = rest;
            }
            Ok(())
        };
        self.write_ranges(&pages, source, |_| !zeroes, image)
    }

    /// Copies a range of memory, but for its pages of zeroes.
    pub(crate) fn copy_sparse(
        &mut self,
        memory: &Memory,
        range: Range<u64>,
        image: &mut ImageWriter,
    ) -> Result<Vec<Run>> {
        let source = |ranges: &[Range<u64>], buffer: &mut [u8]| memory.read_ranges(ranges, buffer);
        self.write_ranges(&[range], source, |_| true, image)
    }

    /// Copies through a buffer; leaves pages of zeroes out where `sparse` allows it.
    fn write_ranges(
        &mut self,
        ranges: &[Range<u64>],
        source: impl Fn(&[Range<u64>], &mut [u8]) -> Result<()>,
        sparse: impl Fn(u64) -> bool,
        image: &mut ImageWriter,
    ) -> Result<Vec<Run>> {
        let mut kept: Vec<Run> = Vec::new();
        let mut pieces = ranges.iter().flat_map(|range| split(range.clone(), BUFFER as u64)).peekable();
        while pieces.peek().is_some() {
            let (mut group, mut len) = (Vec::new(), 0);
            while let Some(piece) = pieces.next_if(|piece| len + (piece.end - piece.start) <= BUFFER as u64) {
                len += piece.end - piece.start;
                group.push(piece);
            }
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.resize(len as usize, 0);
            source(&group, &mut buffer)?;
            self.write_group(&group, &mut buffer, &sparse, &mut kept, image)?;
            self.buffer = buffer;
        }
        Ok(join(kept, ranges))
    }

    /// Squeezes the zero pages out of the buffer and writes the rest.
    fn write_group(
        &mut self,
        group: &[Range<u64>],
        buffer: &mut [u8],
        sparse: impl Fn(u64) -> bool,
        runs: &mut Vec<Run>,
        image: &mut ImageWriter,
    ) -> Result<()> {
        let start = self.lanes.first().map_or(0, |lane| lane.offset);
        let addresses = group.iter().flat_map(|range| range.clone().step_by(PAGE as usize));
        let (mut kept, mut taken) = (0, 0);
        let mut addresses_kept = Vec::new();
        for address in addresses {
            let page = taken..taken + PAGE as usize;
            taken = page.end;
            if buffer.get(page.clone()).is_some_and(is_zero) && sparse(address) {
                self.counts.zero += 1;
                continue;
            }
            if page.start != kept {
                buffer.copy_within(page, kept);
            }
            addresses_kept.push((address, start + kept as u64));
            kept += PAGE as usize;
        }
        if kept == 0 {
            return Ok(());
        }
        let (index, _) = self.reserve(0, kept as u64, image)?;
        let Some(Lane { segment, .. }) = self.lanes.first() else { return Err(no_segment()) };
        segment.file.write_all_at(buffer.get(..kept).unwrap_or_default(), start).call("pwrite")?;
        runs.extend(addresses_kept.into_iter().map(|(addr, offset)| Run {
            addr,
            len: PAGE,
            segment: index,
            offset,
        }));
        self.account(kept as u64)
    }

    /// Room at the end of a lane: its segment, and where in it.
    fn reserve(&mut self, lane: usize, len: u64, image: &mut ImageWriter) -> Result<(u16, u64)> {
        while self.lanes.len() <= lane {
            self.lanes.push(Lane { segment: image.segment()?, offset: 0 });
        }
        let Some(Lane { segment, offset }) = self.lanes.get_mut(lane) else { return Err(no_segment()) };
        let start = *offset;
        *offset += len;
        if len >= LARGE {
            preallocate(&segment.file, start, len)?;
        }
        Ok((segment.index, start))
    }

    fn account(&mut self, len: u64) -> Result<()> {
        self.counts.written += len / PAGE;
        (self.progress)(Progress { bytes: self.counts.written * PAGE })
    }
}

/// Fills a buffer from a file, with zeroes behind its end.
fn read_at_most(file: &File, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset).call("pread")? {
            0 => buffer.fill(0),
            read => {
                offset += read as u64;
                buffer = buffer.get_mut(read..).unwrap_or_default();
                continue;
            }
        }
        break;
    }
    Ok(())
}

fn no_segment() -> Error {
    Error::new(ErrorKind::Kernel, "no page segment is open")
}

/// Writing into blocks that exist is faster, and a full disk is found out at once. But tmpfs fills what it
/// allocates with zeroes, which costs more than it gains.
fn preallocate(file: &File, start: u64, len: u64) -> Result<()> {
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
    if fstatfs(file).call("fstatfs")?.filesystem_type() == TMPFS_MAGIC {
        return Ok(());
    }
    match fallocate(file.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, start as i64, len as i64) {
        Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)) => Err(Error::call("fallocate", errno)),
        _ => Ok(()),
    }
}

/// Joins pages into runs. A run does not go beyond the range that its pages came from: where one ends, a
/// mapping does.
fn join(pages: Vec<Run>, ranges: &[Range<u64>]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut starts = ranges.iter().map(|range| range.start).peekable();
    for page in pages {
        let mut fresh = false;
        while starts.next_if(|start| *start <= page.addr).is_some() {
            fresh = true;
        }
        match runs.last_mut() {
            Some(run) if !fresh && run.addr + run.len == page.addr && run.offset + run.len == page.offset => {
                run.len += page.len;
            }
            _ => runs.push(page),
        }
    }
    runs
}

/// Divides ranges into at most so many parts of about the same size.
pub(super) fn divide(ranges: &[Range<u64>], parts: u64) -> Vec<Vec<Range<u64>>> {
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let most = total.div_ceil(parts.max(1)).next_multiple_of(PAGE);
    let mut divided = vec![Vec::new()];
    let mut room = most;
    for range in ranges {
        let mut range = range.clone();
        while range.start < range.end {
            if room == 0 {
                divided.push(Vec::new());
                room = most;
            }
            let piece = range.start..range.end.min(range.start + room);
            room -= piece.end - piece.start;
            range.start = piece.end;
            divided.last_mut().into_iter().for_each(|part| part.push(piece.clone()));
        }
    }
    divided
}

fn split(range: Range<u64>, most: u64) -> impl Iterator<Item = Range<u64>> {
    range.clone().step_by(most as usize).map(move |start| start..(start + most).min(range.end))
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// What a scan of page tables has found.
#[derive(Default)]
struct Populated {
    /// Pages that belong to the process alone: present or swapped out, and not the page cache's.
    data: Vec<Range<u64>>,
    /// Guard regions (MADV_GUARD_INSTALL).
    guards: Vec<Range<u64>>,
}

impl Populated {
    fn scan(space: &AddressSpace, pid: Pid) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(&path).call("open").about(|| Subject::Path(path.clone().into()))?;
        let populated = Page::PRESENT | Page::SWAPPED;
        match Self::query(space, &pagemap, populated | Page::GUARD) {
            // Linux before 6.15 does not know that category.
            Err(error) if error.raw_errno() == Some(Errno::EINVAL) => Self::query(space, &pagemap, populated),
            found => found,
        }
    }

    fn query(space: &AddressSpace, pagemap: &File, any: Page) -> Result<Self> {
        let mut found = Self::default();
        let (Some(first), Some(last)) = (space.vmas.first(), space.vmas.last()) else { return Ok(found) };
        let mut vmas = space.vmas.iter().peekable();
        let query = Query { any, none: Page::FILE | Page::PFNZERO };
        let take = |range: Range<u64>, page: Page| {
            let mut at = range.start;
            while at < range.end {
                while vmas.next_if(|vma| vma.end <= at).is_some() {}
                let Some(vma) = vmas.peek() else { return };
                let piece = at.max(vma.start)..range.end.min(vma.end);
                at = vma.end;
                let guard = page.contains(Page::GUARD);
                if piece.start < piece.end && (guard || vma.is_private()) {
                    found.add(piece, guard, vma.start);
                }
            }
        };
        scan(pagemap, first.start..last.end, query, take)
            .call("ioctl(PAGEMAP_SCAN)")
            .hint("PAGEMAP_SCAN needs Linux 6.7")?;
        Ok(found)
    }

    /// Ranges end where mappings do, even if the next one follows at once.
    fn add(&mut self, piece: Range<u64>, guard: bool, vma_start: u64) {
        let ranges = if guard { &mut self.guards } else { &mut self.data };
        match ranges.last_mut() {
            Some(last) if last.end == piece.start && piece.start != vma_start => last.end = piece.end,
            _ => ranges.push(piece),
        }
    }
}

/// Restore: the page segments of an image, with the bounds that runs are held against.
pub(crate) struct Segments<'i>(pub(crate) &'i Image);

impl Segments<'_> {
    /// Makes sure that runs point into their segments.
    pub(crate) fn check(&self, runs: &[Run]) -> Result<()> {
        runs.iter().try_for_each(|run| {
            let end = run.offset.checked_add(run.len);
            let length = self.0.segment_length(run.segment)?;
            match end {
                Some(end) if end <= length => Ok(()),
                _ => Err(Error::new(ErrorKind::Image, "pages outside of their segment")),
            }
        })
    }

    /// Calls `fill` with pieces of the runs' contents, in order, each at most a buffer large.
    pub(crate) fn each(
        &self,
        runs: &[Run],
        mut fill: impl FnMut(&[(u64, &[u8])]) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut pieces = runs
            .iter()
            .flat_map(|run| {
                split(0..run.len, BUFFER as u64).map(move |part| Run {
                    addr: run.addr + part.start,
                    len: part.end - part.start,
                    offset: run.offset + part.start,
                    ..*run
                })
            })
            .peekable();
        while let Some(first) = pieces.peek().copied() {
            let mut group: Vec<Run> = Vec::new();
            let mut len = 0;
            // What is together in the file is read together.
            while let Some(piece) = pieces.next_if(|piece| {
                let follows = piece.segment == first.segment && piece.offset == first.offset + len;
                follows && len + piece.len <= BUFFER as u64
            }) {
                len += piece.len;
                group.push(piece);
            }
            let bytes = buffer.get_mut(..len as usize).unwrap_or_default();
            self.0.segment(first.segment)?.read_exact_at(bytes, first.offset).call("pread")?;
            let mut rest: &[u8] = bytes;
            let parts: Vec<(u64, &[u8])> = group
                .iter()
                .map(|run| {
                    let (head, tail) = rest.split_at(run.len as usize);
                    rest = tail;
                    (run.addr, head)
                })
                .collect();
            fill(&parts)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init)] // one range is what is meant
    fn parts_are_even_and_whole() {
        const P: u64 = PAGE;
        let one = [0..10 * P];
        assert_eq!(divide(&one, 1), [vec![0..10 * P]]);
        assert_eq!(divide(&one, 3), [vec![0..4 * P], vec![4 * P..8 * P], vec![8 * P..10 * P]]);
        let several = [0..P, 5 * P..8 * P, 9 * P..10 * P];
        assert_eq!(divide(&several, 2), [vec![0..P, 5 * P..7 * P], vec![7 * P..8 * P, 9 * P..10 * P]]);
        assert_eq!(divide(&several, 99).len(), 5);
        assert_eq!(divide(&[], 2), [vec![]]);
    }
}
