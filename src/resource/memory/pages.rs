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
use super::inside::{self, Alone, Work, Written};
use super::kin::{self, Kin};
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
use crate::tracee::{Memory, Puppet, Transfer};

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
    /// One for each writer; what one writer does goes to the first.
    lanes: Vec<Lane>,
    /// So many more are with processes that write to them.
    lent: usize,
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
    /// The one whose pages it may still share.
    pub(crate) donor: Option<Kin<'k>>,
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

/// How a process's memory is written from inside.
pub(crate) trait FromInside {
    fn is_possible(&self) -> bool;

    /// Can its tasks read the mapping there, and will they read the same twice? Otherwise they cannot sum it up.
    fn is_steady(&self, address: u64) -> bool;

    /// What the kernel writes to while the speaker runs.
    fn rewritten(&self) -> Option<Range<u64>>;

    /// Who does it.
    fn speaker(&self) -> Result<Puppet<'_>>;
}

/// What is to be done about the pages of a process.
pub(super) struct Plan {
    /// Those that the image or its parent has already.
    pub(super) kept: Vec<Run>,
    /// What the process writes itself.
    pub(super) inner: Vec<Range<u64>>,
    /// What is written from outside.
    pub(super) outer: Vec<Range<u64>>,
}

impl<'h> PageWriter<'h> {
    /// At most so many `writers` at the same time, or as many as is usual.
    pub(crate) fn new(
        writers: Option<NonZeroUsize>,
        parent: Option<&'h Parent>,
        progress: &'h mut dyn FnMut(Progress) -> Result<()>,
    ) -> Self {
        Self { lanes: Vec::new(), lent: 0, writers, parent, counts: Counts::default(), progress }
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
        source: &Read<'_>,
    ) -> Result<(Vec<Run>, Vec<Range<u64>>)> {
        let Some(parent) = self.parent else { return Ok((Vec::new(), ranges.to_vec())) };
        let same = parent.unchanged(known, ranges, source)?;
        self.counts.compared += kin::overlap(known, ranges).iter().map(|run| run.len / PAGE).sum::<u64>();
        self.counts.inherited += same.iter().map(|run| run.len / PAGE).sum::<u64>();
        let rest = kin::without(ranges, same.iter().map(Run::range));
        Ok((same, rest))
    }

    /// What is to be done about the pages that a process has of its own, but for those that its kin still has too.
    pub(super) fn plan_private(
        &mut self,
        space: &mut AddressSpace,
        Whose { pid, number, pages, donor, stock }: Whose<'_>,
        source: &Read<'_>,
        inside: &dyn FromInside,
        image: &dyn ImageSink,
    ) -> Result<Plan> {
        let Populated { data, swapped, guards } = pages.populated(&space.spans());
        space.guards = guards.iter().map(|range| (range.start, range.end)).collect();
        let common = donor.map_or(Ok(Vec::new()), |donor| donor.common(pid, &data))?;
        let own = Own { number, stock, data: kin::without(&data, common.iter().map(Run::range)), swapped };
        self.counts.scanned +=
            space.vmas.iter().filter(|vma| vma.is_private()).map(|vma| vma.len() / PAGE).sum::<u64>();
        let mut plan = self.plan_own(&own, source)?;
        plan.kept.extend(common);
        if image.lends_files() {
            take_inner(&mut plan, &own.swapped, inside);
        }
        Ok(plan)
    }

    /// What the parent image does not have.
    fn plan_own(&mut self, own: &Own<'_>, source: &Read<'_>) -> Result<Plan> {
        let known = self.parent.map_or_else(Known::default, |parent| parent.space(own.number));
        let (quiet, doubtful) = match known.by_parent {
            true => own.stock.divide(&own.data, &own.swapped),
            false => (Vec::new(), own.data.clone()),
        };
        let (mut kept, _) = self.unchanged(&known.runs, &doubtful, source)?;
        let quiet = kin::overlap(&known.runs, &quiet);
        self.counts.inherited += quiet.iter().map(|run| run.len / PAGE).sum::<u64>();
        kept.extend(quiet);
        kept.sort_unstable_by_key(|run| run.addr);
        let outer = kin::without(&own.data, kept.iter().map(Run::range));
        Ok(Plan { kept, inner: Vec::new(), outer })
    }

    /// Stores what the parent image does not have.
    pub(crate) fn write_own(
        &mut self,
        own: &Own<'_>,
        source: &Read<'_>,
        sparse: &Sparse<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let plan = self.plan_own(own, source)?;
        self.write_outer(plan, source, sparse, image)
    }

    /// The rest of a plan. Gives all runs that come of it, in order.
    pub(super) fn write_outer(
        &mut self,
        plan: Plan,
        source: &Read<'_>,
        sparse: &Sparse<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let mut runs = plan.kept;
        runs.extend(self.write_ranges(&plan.outer, source, sparse, image)?);
        runs.sort_unstable_by_key(|run| run.addr);
        Ok(runs)
    }

    /// Has a process write what of a plan it can write itself, by several threads.
    pub(super) fn write_inner(
        &mut self,
        plan: &mut Plan,
        mut speaker: Puppet<'_>,
        sparse: &Sparse<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<()> {
        let ranges = std::mem::take(&mut plan.inner);
        let writers = self.parts(&ranges, image)?.len();
        let (segments, buffers): (Vec<_>, Vec<_>) =
            self.lanes.drain(..writers).map(|Lane { segment, buffer }| (segment, buffer)).unzip();
        let written =
            self.telling(|tell| inside::write(&mut speaker, Work { segments, ranges, sparse, tell }))?;
        let segments = self.account_for(written, plan);
        let lanes = segments.into_iter().zip(buffers).map(|(segment, buffer)| Lane { segment, buffer });
        self.lanes.splice(..0, lanes);
        speaker.release()
    }

    /// Has a process begin to write what of a plan it can write itself, by one thread: there must be a lane for it.
    pub(super) fn begin_inner<'p>(
        &mut self,
        plan: &mut Plan,
        speaker: Puppet<'p>,
        image: &mut dyn ImageSink,
    ) -> Result<Alone<'p>> {
        let ranges = std::mem::take(&mut plan.inner);
        let lane = match self.lanes.pop() {
            Some(lane) => lane,
            None => Lane::new(image)?,
        };
        self.lent += 1;
        lane.segment.expect(size(&ranges), preallocate)?;
        Alone::begin(speaker, lane.segment, ranges)
    }

    /// Waits until one that writes by itself is done with a turn. Is there another one?
    pub(super) fn go_on_inner(&mut self, alone: &mut Alone<'_>, sparse: &Sparse<'_>) -> Result<bool> {
        self.telling(|tell| alone.turn(sparse, tell))
    }

    /// When it is.
    pub(super) fn end_inner(&mut self, plan: &mut Plan, alone: Alone<'_>) -> Result<()> {
        let segments = self.account_for(alone.end()?, plan);
        self.lent -= segments.len();
        let lanes = segments.into_iter().map(|segment| Lane { segment, buffer: PageBuffer::default() });
        // In front: what it has left may take the room that was made for it.
        self.lanes.splice(..0, lanes);
        Ok(())
    }

    /// Is there a lane that nobody writes to, or may there be another one?
    pub(super) fn has_lane(&mut self) -> bool {
        // To ask for the processors takes a while.
        self.lent == 0 || self.lent < self.most()
    }

    /// How many write at the same time.
    pub(super) fn most(&mut self) -> usize {
        self.writers.get_or_insert_with(parallel::usual).get().min(inside::MOST)
    }

    fn account_for(&mut self, written: Written, plan: &mut Plan) -> Vec<SegmentWriter> {
        let Written { segments, runs, zero, left } = written;
        self.counts.zero += zero;
        plan.kept.extend(runs);
        plan.outer.extend(left);
        plan.outer.sort_unstable_by_key(|range| range.start);
        segments
    }

    fn telling<T>(&mut self, body: impl FnOnce(&mut dyn FnMut(u64) -> Result<()>) -> Result<T>) -> Result<T> {
        let (counts, progress) = (&mut self.counts, &mut *self.progress);
        body(&mut |len| account(len, counts, progress))
    }

    /// What each writer gets of this work: each has a lane then, with room for it.
    fn parts(&mut self, ranges: &[Range<u64>], image: &mut dyn ImageSink) -> Result<Vec<Vec<Range<u64>>>> {
        let shares = size(ranges) / SHARE;
        let most = match shares {
            0 | 1 => 1,
            _ => self.most().saturating_sub(self.lent).max(1) as u64,
        };
        let parts = divide(ranges, shares.clamp(1, most));
        while self.lanes.len() < parts.len() {
            self.lanes.push(Lane::new(image)?);
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
        self.write_changed(ranges, &source, &|_| true, known, image)
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
        self.write_changed(&pages, &source, &|_| !zeroes, known, image)
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
        self.write_changed(&[range], &source, &|_| true, known, image)
    }

    /// Copies what is not where `known` runs lead to.
    fn write_changed(
        &mut self,
        ranges: &[Range<u64>],
        source: &Read<'_>,
        sparse: &Sparse<'_>,
        known: &[Run],
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let (same, ranges) = self.unchanged(known, ranges, source)?;
        let mut runs = self.write_ranges(&ranges, source, sparse, image)?;
        runs.extend(same);
        runs.sort_unstable_by_key(|run| run.addr);
        Ok(runs)
    }

    /// Copies through buffers; leaves pages of zeroes out where `sparse` allows it.
    pub(super) fn write_ranges(
        &mut self,
        ranges: &[Range<u64>],
        source: &Read<'_>,
        sparse: &Sparse<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        if ranges.is_empty() {
            return Ok(Vec::new());
        }
        let parts = self.parts(ranges, image)?;
        let from = Source { read: source, sparse };
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

/// What of a plan the process writes itself: what it can, if that is much.
fn take_inner(plan: &mut Plan, swapped: &[Range<u64>], inside: &dyn FromInside) {
    if size(&plan.outer) < LARGE {
        return;
    }
    let steady = plan.outer.iter().filter(|range| inside.is_steady(range.start)).cloned();
    // What cannot be read back from where it was swapped to would end the program, should it try.
    let inner = kin::without(&steady.collect::<Vec<_>>(), swapped.iter().cloned());
    let rewritten =
        inside.rewritten().map(|range| range.start & !(PAGE - 1)..range.end.next_multiple_of(PAGE));
    let inner = kin::without(&inner, rewritten.into_iter());
    if size(&inner) >= LARGE && inside.is_possible() {
        plan.outer = kin::without(&plan.outer, inner.iter().cloned());
        plan.inner = inner;
    }
}

/// Reads ranges into a buffer, back to back.
pub(super) type Read<'o> = dyn Fn(&[Range<u64>], &mut [u8]) -> Result<()> + Sync + 'o;

/// Does it mean nothing that there is a page of zeroes at this address?
pub(super) type Sparse<'o> = dyn Fn(u64) -> bool + Sync + 'o;

/// Where pages come from.
#[derive(Clone, Copy)]
struct Source<'o> {
    read: &'o Read<'o>,
    sparse: &'o Sparse<'o>,
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
    fn new(image: &mut dyn ImageSink) -> Result<Self> {
        Ok(Self { segment: image.segment()?, buffer: PageBuffer::default() })
    }

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
    sparse: &Sparse<'_>,
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
