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
use crate::tracee::{Puppet, sys};

/// Bytes of one remote write, and of one batch of them.
const WRITE: u64 = 4 * 1024 * 1024;
const BATCH: u64 = 64 * 1024 * 1024;

/// May this process write a large file of ours? A limit on file sizes would also send it a signal. What a process
/// without a leader has got cannot be looked at before Linux 6.9.
pub(crate) fn is_possible(process: &Process) -> bool {
    if process.leader_is_dead() {
        return false;
    }
    let limits = read::parsed(process.speaker(), "limits", limits::parse);
    limits.is_ok_and(|limits| limits[libc::RLIMIT_FSIZE as usize].soft == u64::MAX)
}

/// Writes ranges of the task's memory, back to back, to `file` at `offset`.
pub(crate) fn write(puppet: &mut Puppet<'_>, file: &File, offset: u64, ranges: &[Range<u64>]) -> Result<()> {
    let lent = Lent::lend(puppet, file)?;
    let written = lent.write(puppet, offset, ranges);
    lent.take_back(puppet).and(written)
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

    fn write(&self, puppet: &mut Puppet<'_>, mut offset: u64, ranges: &[Range<u64>]) -> Result<()> {
        let pieces = ranges.iter().flat_map(|range| {
            let end = range.end;
            range.clone().step_by(WRITE as usize).map(move |start| start..(start + WRITE).min(end))
        });
        let mut pieces = pieces.peekable();
        while pieces.peek().is_some() {
            let mut batch = puppet.batch();
            let (mut calls, mut len) = (Vec::new(), 0);
            while len < BATCH && !batch.is_nearly_full() {
                let Some(piece) = pieces.next() else { break };
                let size = piece.end - piece.start;
                batch.about(Subject::Vma { start: piece.start, end: piece.end, what: String::new() });
                let call = batch.call(sys::pwrite64, &[self.number as u64, piece.start, size, offset]);
                calls.push((call, piece, offset));
                offset += size;
                len += size;
            }
            let answers = puppet.run(batch)?;
            for (call, piece, at) in calls {
                self.complete(puppet, answers.get(call), piece, at)?;
            }
        }
        Ok(())
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
