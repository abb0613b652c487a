//! Pages written by the task that owns them: one copy instead of two.

use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result, Subject};
use crate::freeze::Process;
use crate::proc::{limits, read};
use crate::sys::{kcmp_file, pidfd};
use crate::tracee::{Batch, Call, Puppet, run_together, sys, with_hands};

/// Bytes of one remote write, and of one batch of them.
const WRITE: u64 = 4 * 1024 * 1024;
const BATCH: u64 = 256 * 1024 * 1024;

/// What one writer is to do: write ranges of memory, back to back, to a file of its own.
pub(crate) struct Share<'f> {
    pub(crate) file: &'f File,
    /// Where in the file they go.
    pub(crate) offset: u64,
    pub(crate) ranges: Vec<Range<u64>>,
}

/// May this process write a large file of ours? A limit on file sizes would also send it a signal. What a process
/// without a leader has got cannot be looked at before Linux 6.9.
pub(crate) fn is_possible(process: &Process) -> bool {
    if process.leader_is_dead() {
        return false;
    }
    let limits = read::parsed(process.speaker(), "limits", limits::parse);
    limits.is_ok_and(|limits| limits[libc::RLIMIT_FSIZE as usize].soft == u64::MAX)
}

/// Has the task write its memory, by one thread for each share where it can have so many. More than one to a
/// file would wait for each other.
pub(crate) fn write(speaker: &mut Puppet<'_>, shares: &[Share<'_>]) -> Result<()> {
    let mut lent = Vec::new();
    let written = shares
        .iter()
        .try_for_each(|share| Lent::lend(speaker, share.file).map(|one| lent.push(one)))
        .and_then(|()| {
            let mut work: Vec<Work<'_>> =
                lent.iter().zip(shares).map(|(lent, share)| Work::of(lent, share)).collect();
            with_hands(speaker, shares.len() - 1, |writers| {
                work.chunks_mut(writers.len()).try_for_each(|some| write_together(writers, some))
            })
        });
    lent.into_iter().try_for_each(|one| one.take_back(speaker)).and(written)
}

fn write_together(writers: &mut [&mut Puppet<'_>], work: &mut [Work<'_>]) -> Result<()> {
    while work.iter().any(|work| !work.left.is_empty()) {
        let planned: Vec<_> =
            writers.iter().zip(&mut *work).map(|(writer, work)| work.plan(writer.batch())).collect();
        let (batches, planned): (Vec<_>, Vec<_>) = planned.into_iter().unzip();
        let answers = run_together(writers, batches)?;
        for (((writer, work), answers), writes) in writers.iter().zip(&*work).zip(answers).zip(planned) {
            for Write { call, piece, offset } in writes {
                work.lent.complete(writer, answers.get(call), piece, offset)?;
            }
        }
    }
    Ok(())
}

/// A share that is being worked on.
struct Work<'l> {
    lent: &'l Lent,
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

impl<'l> Work<'l> {
    fn of(lent: &'l Lent, share: &Share<'_>) -> Self {
        Self { lent, offset: share.offset, left: share.ranges.iter().rev().cloned().collect() }
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
            let call = batch.call(sys::pwrite64, &[self.lent.number as u64, piece.start, size, offset]);
            writes.push(Write { call, piece, offset });
            self.offset += size;
            len += size;
        }
        (batch, writes)
    }
}

/// A descriptor of ours in the task's table, for as long as the writing takes.
struct Lent {
    number: RawFd,
}

impl Lent {
    fn lend(puppet: &mut Puppet<'_>, file: &File) -> Result<Self> {
        let mut batch = puppet.batch();
        let pair = batch.output(8);
        let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
        let made = batch.call(sys::socketpair, &[libc::AF_UNIX as u64, kind, 0, pair.addr]);
        let answers = puppet.run(batch)?;
        answers.get(made)?;
        let number = |at: usize| {
            let bytes = answers.bytes(&pair).get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(-1, i32::from_ne_bytes)
        };
        let (near, far) = (number(0), number(4));
        let received = Self::receive(puppet, file, near, far);
        let mut batch = puppet.batch();
        batch.call(sys::close, &[near as u64]);
        batch.call(sys::close, &[far as u64]);
        puppet.run(batch)?.check()?;
        received.map(|number| Self { number })
    }

    fn receive(puppet: &mut Puppet<'_>, file: &File, near: RawFd, far: RawFd) -> Result<RawFd> {
        let pid = puppet.tracee().tid();
        let pidfd = pidfd::open(puppet.tgid()).call("pidfd_open")?;
        let ours = pidfd::get_fd(pidfd.as_fd(), near).call("pidfd_getfd")?;
        let rights = [file.as_raw_fd()];
        let message = [IoSlice::new(b"f")];
        sendmsg::<()>(
            ours.as_raw_fd(),
            &message,
            &[ControlMessage::ScmRights(&rights)],
            MsgFlags::empty(),
            None,
        )
        .call("sendmsg")?;
        let mut batch = puppet.batch();
        let byte = batch.output(16);
        let vector = batch.input_words(&[byte.addr, 1]);
        let control = batch.output(24);
        let header = batch.input_words(&[0, 0, vector, 1, control.addr, 24, 0]);
        let got = batch.call(sys::recvmsg, &[far as u64, header, libc::MSG_CMSG_CLOEXEC as u64]);
        let answers = puppet.run(batch)?;
        answers.get(got)?;
        let number = answers
            .bytes(&control)
            .get(16..20)
            .and_then(|b| b.try_into().ok())
            .map_or(-1, i32::from_ne_bytes);
        let own = (Pid::from(std::process::id()), file.as_raw_fd());
        match kcmp_file((pid, number), own) {
            Ok(std::cmp::Ordering::Equal) => Ok(number),
            _ => Err(Error::new(ErrorKind::Kernel, "a descriptor did not arrive").of(pid)),
        }
    }

    /// What the task may not read itself, or what a full disk cut short, is written from outside.
    fn complete(&self, puppet: &Puppet<'_>, wrote: Result<u64>, piece: Range<u64>, at: u64) -> Result<()> {
        let done = match wrote {
            Ok(done) => done,
            Err(error) if error.raw_errno() == Some(nix::errno::Errno::EFAULT) => 0,
            Err(error) => return Err(error),
        };
        if done == piece.end - piece.start {
            return Ok(());
        }
        let rest = puppet.memory().read_vec(piece.start + done, (piece.end - piece.start - done) as usize)?;
        let pidfd = pidfd::open(puppet.tgid()).call("pidfd_open")?;
        let file = File::from(pidfd::get_fd(pidfd.as_fd(), self.number).call("pidfd_getfd")?);
        std::os::unix::fs::FileExt::write_all_at(&file, &rest, at + done).call("pwrite")
    }

    fn take_back(self, puppet: &mut Puppet<'_>) -> Result<()> {
        let mut batch = puppet.batch();
        batch.call(sys::close, &[self.number as u64]);
        puppet.run(batch)?.check()
    }
}
