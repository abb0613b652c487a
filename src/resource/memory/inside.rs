//! Pages written by the task that owns them: one copy instead of two.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::pages::Sparse;
use super::{Run, overlap, pages, without};
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result, Subject};
use crate::freeze::Process;
use crate::image::SegmentWriter;
use crate::proc::smaps::{Mapping, Prot, VmFlags};
use crate::proc::{limits, read};
use crate::resource::fds::open_fds;
use crate::sys::{PAGE, direct, kcmp_file, pidfd};
use crate::tracee::{
    Answers, Batch, Call, LastWill, Memory, Output, Puppet, Scratch, Tracee, sys, with_hands,
};

/// Bytes of one remote write: what has been summed up is still in the processor's cache then.
const WRITE: u64 = 512 * 1024;

/// The least that a hole is made for.
const HOLE: u64 = 64 * 1024;

/// Pieces of memory in one remote write.
const PIECES: usize = 64;

/// The sum of a page of zeroes (and, one in four thousand millions, of another).
const EMPTY: u32 = 0x98f9_4189;

/// What a writer gets at once, at least and at most. The first turn is short: it tells whether there are many pages of
/// zeroes. Those of several get half of their share of what is left, so that all end together.
const TURN: Range<u64> = 4 * 1024 * 1024..32 * 1024 * 1024;

/// Writers at the same time: of each one's file the task has a descriptor, which its last will closes.
pub(super) const MOST: usize = Scratch::LAST_WILL;

/// Ranges of memory that are to be written, by one writer to each segment.
pub(super) struct Work<'w> {
    pub(super) segments: Vec<SegmentWriter>,
    pub(super) ranges: Vec<Range<u64>>,
    pub(super) sparse: &'w Sparse<'w>,
    pub(super) tell: &'w mut dyn FnMut(u64) -> Result<()>,
}

/// Where pages have been written to.
pub(super) struct Written {
    pub(super) segments: Vec<SegmentWriter>,
    pub(super) runs: Vec<Run>,
    /// Pages of zeroes, which are not there any more.
    pub(super) zero: u64,
    /// What is better written by who leaves out pages of zeroes beforehand.
    pub(super) left: Vec<Range<u64>>,
}

/// May this process write a large file of ours, and have it open? A limit on file sizes would also send it a signal.
/// What a process without a leader has got cannot be looked at before Linux 6.9.
pub(crate) fn is_possible(process: &Process) -> bool {
    if process.leader_is_dead() {
        return false;
    }
    let Ok(limits) = read::parsed(process.speaker(), "limits", limits::parse) else { return false };
    let highest = free_numbers(process.speaker(), MOST + 2).ok().and_then(|numbers| numbers.last().copied());
    limits[libc::RLIMIT_FSIZE as usize].soft == u64::MAX
        && highest.is_some_and(|number| (number as u64) < limits[libc::RLIMIT_NOFILE as usize].soft)
}

/// Can a task read the mapping there itself, and will it read the same twice? Pages that the kernel may drop
/// (MADV_FREE, MAP_DROPPABLE) can turn into zeroes at any time.
pub(crate) fn is_steady(mappings: &[Mapping], address: u64) -> bool {
    let at = mappings.partition_point(|mapping| mapping.end <= address);
    mappings.get(at).filter(|mapping| mapping.start <= address).is_some_and(|mapping| {
        let readable = mapping.prot.contains(Prot::READ) && mapping.protection_key == 0;
        readable && mapping.lazy_free_kb == 0 && !mapping.flags.contains(VmFlags::DROPPABLE)
    })
}

/// Has the task write its memory, by one thread for each segment where it can have so many. More than one to a
/// file would wait for each other.
pub(super) fn write(speaker: &mut Puppet<'_>, work: Work<'_>) -> Result<Written> {
    let Work { segments, ranges, sparse, tell } = work;
    let (hands, mut share) = (segments.len().saturating_sub(1), Share::of(ranges, segments.len()));
    with_hands(speaker, hands, |writers| {
        let Some((speaker, _)) = writers.split_first_mut() else { return Err(nobody()) };
        let files = segments.iter().map(SegmentWriter::file).collect::<Result<Vec<_>>>()?;
        let lent = Lent::lend(speaker, &files)?;
        let mut lanes: Vec<_> =
            segments.into_iter().zip(&lent.0).map(|(segment, number)| Lane::new(segment, *number)).collect();
        let written = write_together(writers, &mut lanes, &mut share, sparse, tell);
        // Whatever has happened, all of them are waited for.
        let ended = writers.iter_mut().map(|writer| writer.finish()).collect::<Vec<_>>();
        let Some((speaker, _)) = writers.split_first_mut() else { return Err(nobody()) };
        let taken_back = lent.take_back(speaker);
        written.and(ended.into_iter().try_for_each(|ended| ended.map(drop))).and(taken_back)?;
        Ok(share.written(lanes))
    })
}

fn nobody() -> Error {
    Error::new(ErrorKind::Kernel, "there is nobody to write")
}

/// Every writer gets the next turn when it is done with one: some are slower than others.
fn write_together(
    writers: &mut [&mut Puppet<'_>],
    lanes: &mut [Lane],
    share: &mut Share,
    sparse: &Sparse<'_>,
    tell: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut busy = Vec::new();
    for (writer, lane) in writers.iter_mut().zip(lanes) {
        if lane.begin(writer, share)? {
            busy.push((writer, lane));
        }
    }
    while let Some(first) = Tracee::wait_for_first(busy.iter().map(|(writer, _)| writer.tracee())) {
        let Some((writer, lane)) = busy.get_mut(first) else { break };
        if !lane.turn(writer, share, sparse, tell)? {
            busy.swap_remove(first);
        }
    }
    Ok(())
}

/// A process whose memory its speaker writes, to one segment, while others do the same.
pub(super) struct Alone<'p> {
    puppet: Puppet<'p>,
    /// Until it has been let go.
    task: Option<Task>,
}

struct Task {
    share: Share,
    lane: Lane,
    lent: Lent,
}

impl<'p> Alone<'p> {
    pub(super) fn begin(
        mut puppet: Puppet<'p>,
        segment: SegmentWriter,
        ranges: Vec<Range<u64>>,
    ) -> Result<Self> {
        let lent = Lent::lend(&mut puppet, &[segment.file()?])?;
        let number = lent.0.first().copied().ok_or_else(nobody)?;
        let (mut share, mut lane) = (Share::of(ranges, 1), Lane::new(segment, number));
        let begun = lane.begin(&mut puppet, &mut share);
        let alone = Self { puppet, task: Some(Task { share, lane, lent }) };
        begun.map(|_| alone)
    }

    pub(super) fn tracee(&self) -> &Tracee {
        self.puppet.tracee()
    }

    /// How much it still has to begin with.
    pub(super) fn rest(&self) -> u64 {
        self.task.as_ref().map_or(0, |task| task.share.left.bytes)
    }

    /// Waits until a turn is done. Is there another one?
    pub(super) fn turn(
        &mut self,
        sparse: &Sparse<'_>,
        tell: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<bool> {
        let Task { share, lane, .. } = self.task.as_mut().ok_or_else(nobody)?;
        lane.turn(&mut self.puppet, share, sparse, tell)
    }

    /// When there is none.
    pub(super) fn end(mut self) -> Result<Written> {
        let (share, lane) = self.let_go()?.ok_or_else(nobody)?;
        Ok(share.written(vec![lane]))
    }

    fn let_go(&mut self) -> Result<Option<(Share, Lane)>> {
        let ended = self.puppet.finish();
        let Some(Task { share, lane, lent }) = self.task.take() else { return Ok(None) };
        let taken_back = lent.take_back(&mut self.puppet);
        ended.and(taken_back).and(self.puppet.put_back())?;
        Ok(Some((share, lane)))
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        // There is something to do only on the way out of another error.
        let _ = self.let_go();
    }
}

/// What one process has to write, whoever of it does.
struct Share {
    ranges: Vec<Range<u64>>,
    left: Left,
    runs: Vec<Run>,
    /// So many bytes have been written, of which so many were not taken back.
    all: u64,
    stored: u64,
}

impl Share {
    fn of(ranges: Vec<Range<u64>>, writers: usize) -> Self {
        let left = Left::of(ranges.clone(), writers);
        Self { ranges, left, runs: Vec::new(), all: 0, stored: 0 }
    }

    /// How much a writer takes at once.
    fn turn(&self) -> u64 {
        match self.all {
            0 => TURN.start,
            _ => self.left.turn().clamp(TURN.start, TURN.end),
        }
    }

    /// If one page in so many is of zeroes, the rest is left.
    fn is_better_left(&self) -> bool {
        const MANY: u64 = 8;
        (self.all - self.stored) * MANY > self.all
    }

    fn written(self, lanes: Vec<Lane>) -> Written {
        let Self { ranges, left, mut runs, .. } = self;
        let (mut segments, mut zeroes) = (Vec::new(), Vec::new());
        for lane in lanes {
            segments.push(lane.segment);
            zeroes.extend(lane.zeroes);
        }
        runs.sort_unstable_by_key(|run| run.addr);
        zeroes.sort_unstable_by_key(|range: &Range<u64>| range.start);
        let zero = pages::size(&zeroes) / PAGE;
        if zero > 0 {
            runs = overlap(&runs, &without(&ranges, zeroes.into_iter()));
        }
        Written { segments, runs, zero, left: left.rest() }
    }
}

/// What is left to be written.
struct Left {
    /// In reverse order: the next one is last.
    ranges: Vec<Range<u64>>,
    /// Has a part of it been taken?
    begun: bool,
    /// How much it is.
    bytes: u64,
    writers: u64,
}

impl Left {
    fn of(mut ranges: Vec<Range<u64>>, writers: usize) -> Self {
        let bytes = pages::size(&ranges);
        ranges.reverse();
        Self { ranges, begun: false, bytes, writers: writers.max(1) as u64 }
    }

    /// What one of several writers takes at once; a single one takes all.
    fn turn(&self) -> u64 {
        match self.writers {
            1 => self.bytes,
            writers => self.bytes / (2 * writers),
        }
    }

    /// All of it.
    fn rest(mut self) -> Vec<Range<u64>> {
        self.ranges.reverse();
        self.ranges
    }

    /// The next piece, of at most so many bytes; does it go on where the last one ended, in the same range?
    fn next(&mut self, most: u64) -> Option<(Range<u64>, bool)> {
        let range = self.ranges.pop()?;
        let piece = range.start..range.end.min(range.start + most);
        self.bytes -= piece.end - piece.start;
        let goes_on = std::mem::replace(&mut self.begun, piece.end < range.end);
        self.ranges.extend(self.begun.then_some(piece.end..range.end));
        Some((piece, goes_on))
    }
}

/// A segment, and the task's descriptor of its file.
struct Lane {
    segment: SegmentWriter,
    number: RawFd,
    /// What its writer is at.
    under_way: Vec<Write>,
    /// Pages of zeroes that were written, and taken back.
    zeroes: Vec<Range<u64>>,
}

/// One write in a batch.
struct Write {
    call: Call,
    pieces: Vec<Piece>,
}

/// A piece of memory, where it goes, and the sums of its pages if they are wanted.
struct Piece {
    range: Range<u64>,
    offset: u64,
    sums: Option<Output>,
}

impl Piece {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

impl Lane {
    fn new(segment: SegmentWriter, number: RawFd) -> Self {
        Self { segment, number, under_way: Vec::new(), zeroes: Vec::new() }
    }

    /// Sets its writer to a turn, if there is one.
    fn begin(&mut self, writer: &mut Puppet<'_>, share: &mut Share) -> Result<bool> {
        if share.is_better_left() {
            return Ok(false);
        }
        let (batch, writes) = self.plan(writer.batch(), share)?;
        self.under_way = writes;
        match self.under_way.is_empty() {
            true => Ok(false),
            false => writer.start(batch).map(|()| true),
        }
    }

    /// Waits until its writer is done with a turn, and sets it to another one, if there is one.
    fn turn(
        &mut self,
        writer: &mut Puppet<'_>,
        share: &mut Share,
        sparse: &Sparse<'_>,
        tell: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<bool> {
        let answers = writer.finish()?;
        let done = std::mem::take(&mut self.under_way);
        // What comes of the first turn decides about the others.
        let begun = (share.all > 0).then(|| self.begin(writer, share)).transpose()?;
        share.all += done.iter().flat_map(|write| &write.pieces).map(Piece::len).sum::<u64>();
        let stored = done.into_iter().map(|write| self.complete(writer.memory(), &answers, write, sparse));
        let stored = stored.sum::<Result<u64>>()?;
        share.stored += stored;
        tell(stored)?;
        begun.map_or_else(|| self.begin(writer, share), Ok)
    }

    /// The work of one turn.
    fn plan(&mut self, mut batch: Batch, share: &mut Share) -> Result<(Batch, Vec<Write>)> {
        let (mut writes, end) = (Vec::new(), self.segment.end() + share.turn());
        while !batch.is_nearly_full() && self.segment.end() < end {
            let pieces = self.pieces(&mut batch, share)?;
            let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { break };
            batch.about(Subject::Vma { start: first.range.start, end: last.range.end, what: String::new() });
            let vectors: Vec<u64> =
                pieces.iter().flat_map(|piece| [piece.range.start, piece.len()]).collect();
            let (number, vectors) = (self.number as u64, batch.input_words(&vectors));
            let call = batch.call(sys::pwritev, &[number, vectors, pieces.len() as u64, first.offset, 0]);
            writes.push(Write { call, pieces });
        }
        Ok((batch, writes))
    }

    /// What is written at once. Its sums come first.
    fn pieces(&mut self, batch: &mut Batch, Share { left, runs, .. }: &mut Share) -> Result<Vec<Piece>> {
        let (mut pieces, mut room): (Vec<Piece>, u64) = (Vec::new(), WRITE);
        while room > 0 && pieces.len() < PIECES {
            let Some((range, goes_on)) = left.next(room) else { break };
            let len = range.end - range.start;
            let (segment, offset) = (self.segment.index, self.segment.reserve(len)?);
            match runs.last_mut().filter(|run| goes_on && run.segment == segment) {
                Some(run) => run.len += len,
                None => runs.push(Run { addr: range.start, len, segment, offset }),
            }
            let sums = self.segment.wants_sums().then(|| batch.sum_pages(&range));
            pieces.push(Piece { range, offset, sums });
            room -= len;
        }
        Ok(pieces)
    }

    /// What the task may not read itself, or what a full disk cut short, is written from outside. How many bytes are
    /// stored?
    fn complete(
        &mut self,
        memory: &Memory,
        answers: &Answers,
        write: Write,
        sparse: &Sparse<'_>,
    ) -> Result<u64> {
        let mut done = match answers.get(write.call) {
            Ok(done) => done,
            // Or what cannot be written past the page cache.
            Err(error) if matches!(error.raw_errno(), Some(Errno::EFAULT | Errno::EINVAL)) => 0,
            Err(error) => return Err(error),
        };
        let mut stored = 0;
        for piece in write.pieces {
            let (len, there) = (piece.len(), done.min(piece.len()));
            if there < len {
                let rest = memory.read_vec(piece.range.start + there, (len - there) as usize)?;
                direct::write_all_at(self.segment.file()?, &rest, piece.offset + there).call("pwrite")?;
            }
            done -= there;
            stored += len - self.sum_up(memory, answers, piece, sparse)?;
        }
        Ok(stored)
    }

    /// Takes note of the sums of a piece, and its pages of zeroes back; how many bytes?
    fn sum_up(
        &mut self,
        memory: &Memory,
        answers: &Answers,
        piece: Piece,
        sparse: &Sparse<'_>,
    ) -> Result<u64> {
        let Piece { range, offset, sums } = piece;
        let Some(sums) = sums else { return Ok(0) };
        let (sums, _) = answers.bytes(&sums).as_chunks();
        let sums = || sums.iter().map(|sum| u32::from_ne_bytes(*sum));
        self.segment.add_sums(sums());
        let pages = range.clone().step_by(PAGE as usize).zip(sums());
        let empty = pages.filter(|(page, sum)| *sum == EMPTY && sparse(*page));
        let mut zeroes: Vec<Range<u64>> = Vec::new();
        for (page, _) in empty {
            match zeroes.last_mut() {
                Some(last) if last.end == page => last.end += PAGE,
                _ => zeroes.push(page..page + PAGE),
            }
        }
        let zeroes = zeroes.into_iter().map(|empty| {
            let offset = offset + (empty.start - range.start);
            self.take_back(memory, empty, offset)
        });
        zeroes.sum()
    }

    /// Takes pages back that seem to be of zeroes; how many bytes? What is left is a hole, or zeroes that no
    /// run leads to: the sums stay true.
    fn take_back(&mut self, memory: &Memory, range: Range<u64>, offset: u64) -> Result<u64> {
        let len = range.end - range.start;
        let mut contents = vec![0; len as usize];
        memory.read_protected(range.start, &mut contents)?;
        let empty = contents.iter().all(|byte| *byte == 0);
        // To make a hole takes as long as to write that much.
        if empty && len >= HOLE {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // A file system that cannot make holes has zeroes there.
            let _ = fallocate(self.segment.file()?.as_fd(), hole, offset as i64, len as i64);
        }
        self.zeroes.extend(empty.then_some(range));
        Ok(if empty { len } else { 0 })
    }
}

/// Descriptors of ours in the task's table, for as long as the writing takes.
struct Lent(Vec<RawFd>);

impl Lent {
    /// Should we die, the task closes again what it has been given. The numbers are known in advance: the kernel
    /// takes the lowest that are free, and nobody else of the process runs.
    fn lend(puppet: &mut Puppet<'_>, files: &[&File]) -> Result<Self> {
        let tid = puppet.tracee().tid();
        let numbers = free_numbers(tid, files.len() + 2)?;
        let (pair, lent) = numbers.split_at(2);
        let (&[near, far], lent) = (pair, lent.to_vec()) else { return Err(surprise(tid)) };
        puppet.if_we_die(closes(pair));
        let mut batch = puppet.batch();
        let got = batch.output(8);
        let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
        let made = batch.call(sys::socketpair, &[libc::AF_UNIX as u64, kind, 0, got.addr]);
        let answers = puppet.run(batch)?;
        answers.get(made)?;
        let expected: Vec<u8> = pair.iter().flat_map(|number| number.to_ne_bytes()).collect();
        if answers.bytes(&got) != expected {
            return Err(surprise(tid));
        }
        let sent = send(puppet, near, files);
        puppet.if_we_die(closes(&lent));
        let mut batch = puppet.batch();
        let byte = batch.output(16);
        let vector = batch.input_words(&[byte.addr, 1]);
        let space = 16 + (4 * files.len()).next_multiple_of(8);
        let control = batch.output(space);
        let header = batch.input_words(&[0, 0, vector, 1, control.addr, space as u64, 0]);
        let flags = (libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) as u64;
        let received = batch.call(sys::recvmsg, &[far as u64, header, flags]);
        close(&mut batch, pair);
        let answers = puppet.run(batch)?;
        sent.and(answers.get(received))?;
        let own = Pid::from(std::process::id());
        let arrived = lent.iter().zip(files).all(|(number, file)| {
            kcmp_file((tid, *number), (own, file.as_raw_fd())) == Ok(std::cmp::Ordering::Equal)
        });
        if arrived { Ok(Self(lent)) } else { Err(surprise(tid)) }
    }

    fn take_back(self, puppet: &mut Puppet<'_>) -> Result<()> {
        puppet.if_we_die(Vec::new());
        let mut batch = puppet.batch();
        close(&mut batch, &self.0);
        puppet.run(batch)?.check()
    }
}

fn surprise(tid: Pid) -> Error {
    Error::new(ErrorKind::Kernel, "descriptors did not arrive where they were expected").of(tid)
}

fn close(batch: &mut Batch, numbers: &[RawFd]) {
    for number in numbers {
        batch.call(sys::close, &[*number as u64]);
    }
}

pub(super) fn closes(numbers: &[RawFd]) -> Vec<LastWill> {
    numbers.iter().map(|number| LastWill(sys::close, [*number as u64, 0, 0, 0])).collect()
}

/// The lowest numbers that are free in a task's table.
pub(super) fn free_numbers(tid: Pid, count: usize) -> Result<Vec<RawFd>> {
    let taken: BTreeSet<RawFd> = open_fds(tid)?.into_iter().collect();
    Ok((0..).filter(|number| !taken.contains(number)).take(count).collect())
}

fn send(puppet: &Puppet<'_>, near: RawFd, files: &[&File]) -> Result<()> {
    let pidfd = pidfd::open(puppet.tgid()).call("pidfd_open")?;
    let ours = pidfd::get_fd(pidfd.as_fd(), near).call("pidfd_getfd")?;
    let rights: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    let message = [IoSlice::new(b"f")];
    let control = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(ours.as_raw_fd(), &message, &control, MsgFlags::empty(), None).call("sendmsg").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_of_zeroes() {
        assert_eq!(crate::image::page_sum(&[0; PAGE as usize]), EMPTY);
    }

    #[test]
    fn ranges_are_taken_in_pieces_that_do_not_join_them() {
        let mut left = Left::of(vec![0..2 * WRITE + 4096, 2 * WRITE + 4096..2 * WRITE + 8192], 1);
        let expected = [
            (0..WRITE, false),
            (WRITE..2 * WRITE, true),
            (2 * WRITE..2 * WRITE + 4096, true),
            (2 * WRITE + 4096..2 * WRITE + 8192, false),
        ];
        for piece in expected {
            assert_eq!(left.next(WRITE), Some(piece));
        }
        assert_eq!(left.next(WRITE), None);
    }

    #[test]
    fn only_what_is_read_twice_alike_is_summed_up_by_tasks() {
        let mapping = |start, prot| Mapping { start, end: start + 10, prot, ..Mapping::default() };
        let mappings = [
            mapping(0, Prot::READ),
            mapping(10, Prot::WRITE),
            Mapping { protection_key: 1, ..mapping(20, Prot::READ) },
            Mapping { lazy_free_kb: 4, ..mapping(30, Prot::READ) },
            Mapping { flags: VmFlags::DROPPABLE, ..mapping(40, Prot::READ) },
            mapping(60, Prot::READ | Prot::WRITE),
        ];
        let steady: Vec<u64> = (0..75).step_by(5).filter(|address| is_steady(&mappings, *address)).collect();
        assert_eq!(steady, [0, 5, 60, 65]);
    }
}
