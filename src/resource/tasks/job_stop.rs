//! Job-control stops, and whether the parent has taken note of them: the kernel tells it only once.

use crate::error::Result;
use crate::freeze::Process;
use crate::image::{Decode, Encode, Record, Tag};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// Of a process that is stopped, and whose parent is in the tree.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JobStop {
    /// The signal by which it was stopped.
    pub(crate) signal: i32,
    /// Its parent has waited for the stop already.
    pub(crate) seen: bool,
}

impl Record for JobStop {
    const TAG: Tag = Tag::new(b"STOP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "job-control stop";
}

/// What the parent of a stopped process was asked.
pub(crate) struct Asked {
    child: u32,
    signal: i32,
    call: Call,
    info: Output,
}

impl Asked {
    /// Asks the parent, unless the process is not stopped.
    pub(crate) fn of(child: &Process, batch: &mut Batch) -> Option<Self> {
        let signal = child.threads.iter().find_map(|thread| thread.job_stop)?;
        let info = batch.output(128);
        let options = libc::WNOWAIT | libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
        let args = [u64::from(libc::P_PID), u64::from(child.number), info.addr, options as u64, 0];
        let call = batch.call(sys::waitid, &args);
        Some(Self { child: child.number, signal, call, info })
    }

    pub(crate) fn describe(self, answers: &Answers) -> Result<(u32, JobStop)> {
        answers.get(self.call)?;
        // siginfo_t: si_pid comes after three words and padding, si_uid and si_status follow.
        let word =
            |at: usize| answers.bytes(&self.info).get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes);
        let unseen = word(16).filter(|pid| u32::try_from(*pid) == Ok(self.child)).and_then(|_| word(24));
        Ok((self.child, JobStop { signal: unseen.unwrap_or(self.signal), seen: unseen.is_none() }))
    }
}

/// Makes the parent take note of it. Its SIGCHLD is gone with its signal actions, which are set later.
pub(crate) fn take_note(child: u32, batch: &mut Batch) {
    let options = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
    batch.call(sys::waitid, &[u64::from(libc::P_PID), u64::from(child), 0, options as u64, 0]);
}
