//! Pages: from a stopped task into the segments of an image, and back.
//!
//! Large amounts are written, and summed up before, by the task itself, which copies them once instead of twice. The
//! others go through buffers of ours, where pages of zeroes are left out. Pages that were never touched, that are the
//! kernel's page of zeroes or that still are what their file says are not stored.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;

use nix::errno::Errno;

use super::AddressSpace;
use super::inside::{self, Work, Written};
use super::kin::{self, Relatives};
use super::parent::{Known, Paged, Parent};
use super::survey::{Populated, Scan};
use super::tracking::Stock;
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result};
use crate::hooks::Progress;
use crate::image::{Decode, Encode, Image, ImageSink, Owner, Records, SegmentWriter};
use crate::parallel;
use crate::sys::PAGE;
use crate::sys::direct::PageBuffer;
use crate::tracee::{Memory, Transfer};

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
pub(super) const BUFFER: usize = 512 * 1024;

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
    /// Left to the parent image, which has them.
    pub(crate) inherited: u64,
    /// Compared with what the parent image has.
    pub(crate) compared: u64,
}

/// Writes pages into the segments of an image.
pub(crate) struct PageWriter<'h> {
    /// One for each writer; the first is everybody's.
    lanes: Vec<Lane>,
    /// How many there may be; as many as usual, if it does not matter yet.
    writers: Option<NonZeroUsize>,
    /// The image that has what has not changed.
    parent: Option<&'h Parent>,
    counts: Counts,
    progress: &'h mut dyn FnMut(Progress) -> Result<()>,
}

/// Whose memory it is.
#[derive(Clone, Copy)]
pub(crate) struct Whose<'k> {
    pub(crate) pid: Pid,
    /// By which the image knows the process.
    pub(crate) number: u32,
    pub(crate) pages: &'k Scan,
    pub(crate) relatives: Relatives<'k>,
    pub(crate) stock: &'k Stock,
}

/// What is to be stored of the private pages of a process.
pub(crate) struct Own<'s> {
    pub(crate) number: u32,
    pub(crate) stock: &'s Stock,
    /// But for what its kin has.
    pub(crate) data: Vec<Range<u64>>,
    pub(crate) swapped: Vec<Range<u64>>,
}

/// How a task's memory is written from inside the task.
pub(crate) struct FromInside<'p> {
    pub(crate) is_possible: &'p dyn Fn() -> bool,
    /// Can the task read the mapping there, and will it read the same twice? Otherwise it cannot sum it up.
    pub(crate) is_steady: &'p dyn Fn(u64) -> bool,
    pub(crate) write: &'p mut dyn FnMut(Work<'_>) -> Result<Written>,
}

impl<'h> PageWriter<'h> {
    /// At most so many `writers` at the same time, or as many as is usual.
    pub(crate) fn new(
        writers: Option<NonZeroUsize>,
        parent: Option<&'h Parent>,
        progress: &'h mut dyn FnMut(Progress) -> Result<()>,
    ) -> Self {
        Self { lanes: Vec::new(), writers, parent, counts: Counts::default(), progress }
    }

    /// When all are written: what is to be known of the segments becomes records.
    pub(crate) fn finish(self, records: &mut Records) -> Result<Counts> {
        for Lane { segment, .. } in self.lanes {
            let owner = Owner(segment.own.into());
            if let Some(chunks) = segment.finish()? {
                records.put(owner, &chunks)?;
            }
        }
        Ok(self.counts)
    }

    /// Where the parent image, if there is one, has what this record is of.
    pub(crate) fn known<R: Paged>(&self, owner: Owner) -> Result<Vec<Run>> {
        self.parent.map_or(Ok(Vec::new()), |parent| Ok(parent.known::<R>(owner)?.runs))
    }

    /// What of the ranges is where `known` runs lead to, and the rest.
    fn unchanged(
        &mut self,
        known: &[Run],
        ranges: &[Range<u64>],
        source: impl Fn(&[Range<u64>], &mut [u8]) -> Result<()>,
    ) -> Result<(Vec<Run>, Vec<Range<u64>>)> {
        let Some(parent) = self.parent else { return Ok((Vec::new(), ranges.to_vec())) };
        let same = parent.unchanged(known, ranges, source)?;
        self.counts.compared += kin::overlap(known, ranges).iter().map(|run| run.len / PAGE).sum::<u64>();
        self.counts.inherited += same.iter().map(|run| run.len / PAGE).sum::<u64>();
        let rest = kin::without(ranges, same.iter().map(Run::range));
        Ok((same, rest))
    }

    /// Stores the pages that a process has of its own, but for those that its kin or the parent image still has too.
    pub(crate) fn write_private(
        &mut self,
        space: &mut AddressSpace,
        Whose { pid, number, pages, relatives, stock }: Whose<'_>,
        memory: &Memory,
        inside: FromInside<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<()> {
        let Populated { data, swapped, guards } = pages.populated(&space.spans());
        space.guards = guards.iter().map(|range| (range.start, range.end)).collect();
        let common = match relatives {
            Relatives::Some(Some(kin)) => kin.common(pid, &data)?,
            Relatives::Some(None) | Relatives::None => Vec::new(),
        };
        let own = Own { number, stock, data: kin::without(&data, common.iter().map(Run::range)), swapped };
        self.counts.scanned +=
            space.vmas.iter().filter(|vma| vma.is_private()).map(|vma| vma.len() / PAGE).sum::<u64>();
        let source = |ranges: &[Range<u64>], buffer: &mut [u8]| match relatives {
            Relatives::None => memory.read_ranges(ranges, buffer),
            Relatives::Some(_) => memory.read_shared_ranges(ranges, buffer),
        };
        // A page of zeroes in a private file mapping hides what the file says there.
        let sparse = |address| space.vma_at(address).is_some_and(super::Vma::is_anonymous);
        let runs = self.write_own(&own, source, sparse, Some(inside), image)?;
        space.runs = runs;
        space.runs.extend(common);
        space.runs.sort_unstable_by_key(|run| run.addr);
        Ok(())
    }

    /// Stores what the parent image does not have.
    pub(crate) fn write_own(
        &mut self,
        own: &Own<'_>,
        source: impl Fn(&[Range<u64>], &mut [u8]) -> Result<()> + Sync,
        sparse: impl Fn(u64) -> bool + Sync,
        inside: Option<FromInside<'_>>,
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let known = self.parent.map_or_else(Known::default, |parent| parent.space(own.number));
        let (quiet, doubtful) = match known.by_parent {
            true => own.stock.divide(&own.data, &own.swapped),
            false => (Vec::new(), own.data.clone()),
        };
        let (mut kept, _) = self.unchanged(&known.runs, &doubtful, &source)?;
        let quiet = kin::overlap(&known.runs, &quiet);
        self.counts.inherited += quiet.iter().map(|run| run.len / PAGE).sum::<u64>();
        kept.extend(quiet);
        kept.sort_unstable_by_key(|run| run.addr);
        let ranges = kin::without(&own.data, kept.iter().map(Run::range));
        let (inner, outer) = match inside {
            Some(inside) if image.lends_files() => {
                self.write_inside(ranges, &own.swapped, (inside, &sparse), image)?
            }
            _ => (Vec::new(), ranges),
        };
        kept.extend(inner);
        kept.extend(self.write_ranges(&outer, source, sparse, image)?);
        kept.sort_unstable_by_key(|run| run.addr);
        Ok(kept)
    }

    /// Has the task write what it can, if that is much. Gives the runs, and what is left.
    fn write_inside(
        &mut self,
        ranges: Vec<Range<u64>>,
        swapped: &[Range<u64>],
        (FromInside { is_possible, is_steady, write }, sparse): (FromInside<'_>, &dyn Fn(u64) -> bool),
        image: &mut dyn ImageSink,
    ) -> Result<(Vec<Run>, Vec<Range<u64>>)> {
        if size(&ranges) < LARGE {
            return Ok((Vec::new(), ranges));
        }
        let steady: Vec<_> = ranges.iter().filter(|range| is_steady(range.start)).cloned().collect();
        // What cannot be read back from where it was swapped to would end the program, should it try.
        let inner = kin::without(&steady, swapped.iter().cloned());
        if size(&inner) < LARGE || !is_possible() {
            return Ok((Vec::new(), ranges));
        }
        let mut outer = kin::without(&ranges, inner.iter().cloned());
        let writers = self.parts(&inner, image)?.len();
        let (counts, progress) = (&mut self.counts, &mut *self.progress);
        let mut tell = |len| account(len, counts, progress);
        let segments = self.lanes.iter_mut().map(|lane| &mut lane.segment).take(writers).collect();
        let work = Work { segments, ranges: inner, sparse, tell: &mut tell };
        let Written { runs, zero, left } = write(work)?;
        self.counts.zero += zero;
        outer.extend(left);
        outer.sort_unstable_by_key(|range| range.start);
        Ok((runs, outer))
    }

    /// What each writer gets of this work: each has a lane then, with room for it.
    fn parts(&mut self, ranges: &[Range<u64>], image: &mut dyn ImageSink) -> Result<Vec<Vec<Range<u64>>>> {
        let shares = size(ranges) / SHARE;
        let most = match shares {
            0 | 1 => 1,
            _ => self.writers.get_or_insert_with(parallel::usual).get().min(inside::MOST) as u64,
        };
        let parts = divide(ranges, shares.clamp(1, most));
        while self.lanes.len() < parts.len() {
            self.lanes.push(Lane { segment: image.segment()?, buffer: PageBuffer::default() });
        }
        for (Lane { segment, .. }, part) in self.lanes.iter().zip(&parts) {
            let len = size(part);
            if len >= LARGE {
                segment.expect(len, preallocate)?;
            }
        }
        Ok(parts)
    }

    /// Copies ranges of a file: shared memory, by its own file.
    pub(crate) fn copy_file(
        &mut self,
        file: &File,
        ranges: &[Range<u64>],
        known: &[Run],
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let source = |ranges: &[Range<u64>], mut buffer: &mut [u8]| {
            for range in ranges {
                let (head, rest) = buffer.split_at_mut((range.end - range.start) as usize);
                file.read_exact_at(head, range.start).call("pread")?;
                buffer = rest;
            }
            Ok(())
        };
        self.write_changed(ranges, source, |_| true, known, image)
    }

    /// Copies the data of a file, which may end within a page. Are zeroes that were written data?
    pub(crate) fn copy_data(
        &mut self,
        file: &File,
        data: &[Range<u64>],
        zeroes: bool,
        known: &[Run],
        image: &mut dyn ImageSink,
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
        self.write_changed(&pages, source, |_| !zeroes, known, image)
    }

    /// Copies a range of memory, but for its pages of zeroes.
    pub(crate) fn copy_sparse(
        &mut self,
        memory: &Memory,
        range: Range<u64>,
        known: &[Run],
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let source = |ranges: &[Range<u64>], buffer: &mut [u8]| memory.read_ranges(ranges, buffer);
        self.write_changed(&[range], source, |_| true, known, image)
    }

    /// Copies what is not where `known` runs lead to.
    fn write_changed(
        &mut self,
        ranges: &[Range<u64>],
        source: impl Fn(&[Range<u64>], &mut [u8]) -> Result<()> + Sync,
        sparse: impl Fn(u64) -> bool + Sync,
        known: &[Run],
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let (same, ranges) = self.unchanged(known, ranges, &source)?;
        let mut runs = self.write_ranges(&ranges, source, sparse, image)?;
        runs.extend(same);
        runs.sort_unstable_by_key(|run| run.addr);
        Ok(runs)
    }

    /// Copies through buffers; leaves pages of zeroes out where `sparse` allows it.
    pub(super) fn write_ranges(
        &mut self,
        ranges: &[Range<u64>],
        source: impl Fn(&[Range<u64>], &mut [u8]) -> Result<()> + Sync,
        sparse: impl Fn(u64) -> bool + Sync,
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        if ranges.is_empty() {
            return Ok(Vec::new());
        }
        let parts = self.parts(ranges, image)?;
        let from = Source { read: &source, sparse: &sparse };
        let (counts, progress) = (&mut self.counts, &mut *self.progress);
        let mut tell = |len| account(len, counts, progress);
        let copied = match (&mut self.lanes[..], &parts[..]) {
            ([lane, ..], [part]) => vec![lane.copy(part, from, &mut tell)?],
            (lanes, parts) => copy_together(lanes, parts, from, &mut tell)?,
        };
        self.counts.zero += copied.iter().map(|copied| copied.zero).sum::<u64>();
        Ok(copied.into_iter().flat_map(|copied| copied.runs).collect())
    }
}

fn account(len: u64, counts: &mut Counts, progress: &mut dyn FnMut(Progress) -> Result<()>) -> Result<()> {
    counts.written += len / PAGE;
    progress(Progress { bytes: counts.written * PAGE })
}

/// Reads ranges into a buffer, back to back.
type Read<'o> = dyn Fn(&[Range<u64>], &mut [u8]) -> Result<()> + Sync + 'o;

/// Where pages come from.
#[derive(Clone, Copy)]
struct Source<'o> {
    read: &'o Read<'o>,
    /// Does it mean nothing that there is a page of zeroes at this address?
    sparse: &'o (dyn Fn(u64) -> bool + Sync),
}

/// A segment that is being written, by whoever has it.
struct Lane {
    segment: SegmentWriter,
    buffer: PageBuffer,
}

/// What has become of some ranges.
struct Copied<'r> {
    ranges: &'r [Range<u64>],
    /// How many of them have been begun.
    begun: usize,
    runs: Vec<Run>,
    /// Pages that were left out.
    zero: u64,
}

impl Copied<'_> {
    /// Joins pages into runs. A run does not go beyond the range that its pages came from: where one ends, a mapping
    /// does.
    fn add(&mut self, page: Run) {
        let before = self.begun;
        while self.ranges.get(self.begun).is_some_and(|range| range.start <= page.addr) {
            self.begun += 1;
        }
        match self.runs.last_mut().filter(|_| before == self.begun) {
            Some(run) if run.addr + run.len == page.addr && run.offset + run.len == page.offset => {
                run.len += page.len;
            }
            _ => self.runs.push(page),
        }
    }
}

/// Each lane has a thread, which copies its part. Who cannot tell any more what it has done gives up.
fn copy_together<'r>(
    lanes: &mut [Lane],
    parts: &'r [Vec<Range<u64>>],
    from: Source<'_>,
    tell: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Vec<Copied<'r>>> {
    let ended = |why| Error::new(ErrorKind::Kernel, why);
    std::thread::scope(|scope| {
        let (done, told) = mpsc::channel();
        let mut copiers = Vec::new();
        for (lane, part) in lanes.iter_mut().zip(parts) {
            let done = done.clone();
            let copy = move || {
                lane.copy(part, from, &mut |len| done.send(len).map_err(|_| ended("nobody listens any more")))
            };
            let copier = std::thread::Builder::new().name("cryosleep-pages".into()).spawn_scoped(scope, copy);
            copiers.push(copier.call("clone")?);
        }
        drop(done);
        let accounted = told.iter().try_for_each(tell);
        drop(told);
        let copied = copiers
            .into_iter()
            .map(|copier| copier.join().unwrap_or_else(|_| Err(ended("a copying thread ended early"))));
        let copied = copied.collect::<Vec<_>>();
        accounted.and_then(|()| copied.into_iter().collect())
    })
}

impl Lane {
    fn copy<'r>(
        &mut self,
        ranges: &'r [Range<u64>],
        from: Source<'_>,
        tell: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Copied<'r>> {
        let mut copied = Copied { ranges, begun: 0, runs: Vec::new(), zero: 0 };
        let mut pieces = ranges.iter().flat_map(|range| split(range.clone(), BUFFER as u64)).peekable();
        while pieces.peek().is_some() {
            let (mut group, mut len) = (Vec::new(), 0);
            while let Some(piece) = pieces.next_if(|piece| len + (piece.end - piece.start) <= BUFFER as u64) {
                len += piece.end - piece.start;
                group.push(piece);
            }
            let buffer = self.buffer.take(len as usize);
            (from.read)(&group, buffer)?;
            let kept = squeeze(buffer, &group, from.sparse, &self.segment, &mut copied);
            if kept > 0 {
                self.segment.append(buffer.get(..kept).unwrap_or_default())?;
                tell(kept as u64)?;
            }
        }
        Ok(copied)
    }
}

/// Squeezes the zero pages out of a buffer, and notes where the others go. Says how many bytes these are.
fn squeeze(
    buffer: &mut [u8],
    group: &[Range<u64>],
    sparse: &dyn Fn(u64) -> bool,
    to: &SegmentWriter,
    copied: &mut Copied<'_>,
) -> usize {
    let (start, segment) = (to.end(), to.index);
    let (mut kept, mut taken) = (0, 0);
    for addr in group.iter().flat_map(|range| range.clone().step_by(PAGE as usize)) {
        let page = taken..taken + PAGE as usize;
        taken = page.end;
        if buffer.get(page.clone()).is_some_and(is_zero) && sparse(addr) {
            copied.zero += 1;
            continue;
        }
        if page.start != kept {
            buffer.copy_within(page, kept);
        }
        copied.add(Run { addr, len: PAGE, segment, offset: start + kept as u64 });
        kept += PAGE as usize;
    }
    kept
}

pub(super) fn size(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
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

/// Divides ranges into at most so many parts of about the same size.
fn divide(ranges: &[Range<u64>], parts: u64) -> Vec<Vec<Range<u64>>> {
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

/// Restore: the page segments of an image, with the bounds that runs are held against.
pub(crate) struct Segments<'i>(pub(crate) &'i Image);

impl Segments<'_> {
    /// Makes sure that runs point into their segments.
    pub(crate) fn check(&self, runs: &[Run]) -> Result<()> {
        runs.iter().try_for_each(|run| {
            let end = run.offset.checked_add(run.len);
            let length = self.0.segment(run.segment)?.length();
            match end {
                Some(end) if end <= length => Ok(()),
                _ => Err(Error::new(ErrorKind::Image, "pages outside of their segment")),
            }
        })
    }

    /// Calls `fill` with pieces of the runs' contents, in the order of their places in the image, a buffer at a time.
    pub(crate) fn each(&self, runs: &[Run], fill: impl FnMut(&[Transfer<'_>]) -> Result<()>) -> Result<()> {
        self.each_through(&mut Vec::new(), runs, fill)
    }

    /// The same through a buffer that has been used before.
    pub(super) fn each_through(
        &self,
        buffer: &mut Vec<u8>,
        runs: &[Run],
        mut fill: impl FnMut(&[Transfer<'_>]) -> Result<()>,
    ) -> Result<()> {
        let mut runs = runs.to_vec();
        runs.sort_unstable_by_key(|run| (run.segment, run.offset));
        let mut left = runs.into_iter().peekable();
        while let Some(first) = left.peek() {
            let segment = self.0.segment(first.segment)?;
            // What is together in the file is read together.
            let mut window = segment.whole(first.offset..first.offset);
            let most = window.start + BUFFER as u64;
            let mut group: Vec<Run> = Vec::new();
            while let Some(run) = left.peek_mut() {
                let follows = group.last().is_none_or(|last| last.segment == run.segment)
                    && (group.is_empty() || run.offset <= window.end);
                if !follows || run.offset >= most {
                    break;
                }
                let part = Run { len: run.len.min(most - run.offset), ..*run };
                window.end = window.end.max(segment.whole(part.offset..part.offset + part.len).end);
                group.push(part);
                if part.len < run.len {
                    *run = Run {
                        addr: run.addr + part.len,
                        len: run.len - part.len,
                        offset: run.offset + part.len,
                        ..*run
                    };
                    break;
                }
                left.next();
            }
            let len = (window.end - window.start) as usize;
            if buffer.len() < len {
                *buffer = vec![0; len];
            }
            let contents = buffer.get_mut(..len).unwrap_or_default();
            segment.read(window.start, contents)?;
            let parts: Vec<Transfer<'_>> = group
                .iter()
                .map(|run| {
                    let start = (run.offset - window.start) as usize;
                    (run.addr, contents.get(start..start + run.len as usize).unwrap_or_default())
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
