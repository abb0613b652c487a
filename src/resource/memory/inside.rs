//! Pages written by the task that owns them: one copy instead of two.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result, Subject};
use crate::freeze::Process;
use crate::proc::{limits, read};
use crate::resource::fds::open_fds;
use crate::sys::{direct, kcmp_file, pidfd};
use crate::tracee::{Batch, Call, LastWill, Puppet, Scratch, run_together, sys, with_hands};

/// Bytes of one remote write, and of one batch of them.
const WRITE: u64 = 4 * 1024 * 1024;
const BATCH: u64 = 256 * 1024 * 1024;

/// Writers at the same time: of each one's file the task has a descriptor, which its last will closes.
pub(super) const MOST: usize = Scratch::LAST_WILL;

/// What one writer is to do: write ranges of memory, back to back, to a file of its own.
pub(crate) struct Share<'f> {
    pub(crate) file: &'f File,
    /// Where in the file they go.
    pub(crate) offset: u64,
    pub(crate) ranges: Vec<Range<u64>>,
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

/// Has the task write its memory, by one thread for each share where it can have so many. More than one to a
/// file would wait for each other.
pub(crate) fn write(speaker: &mut Puppet<'_>, shares: &[Share<'_>]) -> Result<()> {
    with_hands(speaker, shares.len().saturating_sub(1), |writers| {
        let Some((speaker, _)) = writers.split_first_mut() else { return Ok(()) };
        let lent = Lent::lend(speaker, shares)?;
        let mut work: Vec<Work<'_>> =
            lent.0.iter().zip(shares).map(|(number, share)| Work::of(*number, share)).collect();
        let written = work.chunks_mut(writers.len()).try_for_each(|some| write_together(writers, some));
        let Some((speaker, _)) = writers.split_first_mut() else { return written };
        lent.take_back(speaker).and(written)
    })
}

fn write_together(writers: &mut [&mut Puppet<'_>], work: &mut [Work<'_>]) -> Result<()> {
    while work.iter().any(|work| !work.left.is_empty()) {
        let planned = writers.iter().zip(&mut *work).map(|(writer, work)| work.plan(writer.batch()));
        let (batches, planned): (Vec<_>, Vec<_>) = planned.unzip();
        let answers = run_together(writers, batches)?;
        for (((writer, work), answers), writes) in writers.iter().zip(&*work).zip(answers).zip(planned) {
            writes.into_iter().try_for_each(|write| work.complete(writer, answers.get(write.call), write))?;
        }
    }
    Ok(())
}

/// A share that is being worked on.
struct Work<'f> {
    /// Of the file, in the task.
    number: RawFd,
    file: &'f File,
    offset: u64,
    /// In reverse order: the next one is last.
    left: Vec<Range<u64>>,
}

/// One write in a batch.
struct Write {
    call: Call,
    piece: Range<u64>,
    offset: u64,
}

impl<'f> Work<'f> {
    fn of(number: RawFd, share: &Share<'f>) -> Self {
        let left = share.ranges.iter().rev().cloned().collect();
        Self { number, file: share.file, offset: share.offset, left }
    }

    /// As much of it as goes into one batch.
    fn plan(&mut self, mut batch: Batch) -> (Batch, Vec<Write>) {
        let (mut writes, mut len) = (Vec::new(), 0);
        while len < BATCH && !batch.is_nearly_full() {
            let Some(range) = self.left.pop() else { break };
            let piece = range.start..range.end.min(range.start + WRITE);
            if piece.end < range.end {
                self.left.push(piece.end..range.end);
            }
            let (size, offset) = (piece.end - piece.start, self.offset);
            batch.about(Subject::Vma { start: piece.start, end: piece.end, what: String::new() });
            let call = batch.call(sys::pwrite64, &[self.number as u64, piece.start, size, offset]);
            writes.push(Write { call, piece, offset });
            self.offset += size;
            len += size;
        }
        (batch, writes)
    }

    /// What the task may not read itself, or what a full disk cut short, is written from outside.
    fn complete(&self, puppet: &Puppet<'_>, wrote: Result<u64>, write: Write) -> Result<()> {
        let Write { piece, offset, .. } = write;
        let done = match wrote {
            Ok(done) => done,
            // Or what cannot be written past the page cache.
            Err(error) if matches!(error.raw_errno(), Some(Errno::EFAULT | Errno::EINVAL)) => 0,
            Err(error) => return Err(error),
        };
        if done == piece.end - piece.start {
            return Ok(());
        }
        let rest = puppet.memory().read_vec(piece.start + done, (piece.end - piece.start - done) as usize)?;
        direct::write_all_at(self.file, &rest, offset + done).call("pwrite")
    }
}

/// Descriptors of ours in the task's table, for as long as the writing takes.
struct Lent(Vec<RawFd>);

impl Lent {
    /// Should we die, the task closes again what it has been given. The numbers are known in advance: the kernel
    /// takes the lowest that are free, and nobody else of the process runs.
    fn lend(puppet: &mut Puppet<'_>, shares: &[Share<'_>]) -> Result<Self> {
        let tid = puppet.tracee().tid();
        let numbers = free_numbers(tid, shares.len() + 2)?;
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
        let sent = send(puppet, near, shares);
        puppet.if_we_die(closes(&lent));
        let mut batch = puppet.batch();
        let byte = batch.output(16);
        let vector = batch.input_words(&[byte.addr, 1]);
        let space = 16 + (4 * shares.len()).next_multiple_of(8);
        let control = batch.output(space);
        let header = batch.input_words(&[0, 0, vector, 1, control.addr, space as u64, 0]);
        let flags = (libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) as u64;
        let received = batch.call(sys::recvmsg, &[far as u64, header, flags]);
        close(&mut batch, pair);
        let answers = puppet.run(batch)?;
        sent.and(answers.get(received))?;
        let own = Pid::from(std::process::id());
        let arrived = lent.iter().zip(shares).all(|(number, share)| {
            kcmp_file((tid, *number), (own, share.file.as_raw_fd())) == Ok(std::cmp::Ordering::Equal)
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

fn send(puppet: &Puppet<'_>, near: RawFd, shares: &[Share<'_>]) -> Result<()> {
    let pidfd = pidfd::open(puppet.tgid()).call("pidfd_open")?;
    let ours = pidfd::get_fd(pidfd.as_fd(), near).call("pidfd_getfd")?;
    let rights: Vec<RawFd> = shares.iter().map(|share| share.file.as_raw_fd()).collect();
    let message = [IoSlice::new(b"f")];
    let control = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(ours.as_raw_fd(), &message, &control, MsgFlags::empty(), None).call("sendmsg").map(drop)
}
