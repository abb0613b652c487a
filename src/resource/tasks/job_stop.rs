//! Job control: that a process is stopped, or has been continued, and whether its parent has taken note of that: the
//! kernel tells it only once.

use crate::error::{Error, ErrorKind, Result};
use crate::freeze::Process;
use crate::image::{Decode, Encode, Record, Tag};
use crate::tracee::{Answers, Batch, Call, Output, sys};

/// Of a process whose parent is in the tree.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobStop {
    /// By this signal. `seen`: the parent has waited for the stop already.
    Stopped { signal: i32, seen: bool },
    /// It runs again, and the parent has yet to wait for that (WCONTINUED).
    Continued,
}

impl Record for JobStop {
    const TAG: Tag = Tag::new(b"STOP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "job control";
}

impl JobStop {
    /// Images are not trusted.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Continued
            | Self::Stopped {
                signal: libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU, ..
            } => Ok(()),
            Self::Stopped { .. } => {
                Err(Error::new(ErrorKind::Image, "it is stopped by a signal that stops nobody"))
            }
        }
    }
}

/// What the parent of a process was asked.
pub(crate) struct Asked {
    child: u32,
    stopped_by: Option<i32>,
    call: Call,
    info: Output,
}

impl Asked {
    /// Asks the parent.
    pub(crate) fn of(child: &Process, batch: &mut Batch) -> Self {
        let stopped_by = child.threads.iter().find_map(|thread| thread.job_stop);
        let info = batch.output(128);
        let what = if stopped_by.is_some() { libc::WSTOPPED } else { libc::WCONTINUED };
        let options = libc::WNOWAIT | what | libc::WNOHANG | libc::__WALL;
        let args = [u64::from(libc::P_PID), u64::from(child.number), info.addr, options as u64, 0];
        let call = batch.call(sys::waitid, &args);
        Self { child: child.number, stopped_by, call, info }
    }

    pub(crate) fn describe(self, answers: &Answers) -> Result<Option<(u32, JobStop)>> {
        answers.get(self.call)?;
        // siginfo_t: si_pid comes after three words and padding, si_uid and si_status follow.
        let word =
            |at: usize| answers.bytes(&self.info).get(at..at + 4)?.try_into().ok().map(i32::from_ne_bytes);
        let unseen = word(16).filter(|pid| u32::try_from(*pid) == Ok(self.child)).and_then(|_| word(24));
        let stop = match (self.stopped_by, unseen) {
            (Some(signal), None) => Some(JobStop::Stopped { signal, seen: true }),
            (Some(_), Some(signal)) => Some(JobStop::Stopped { signal, seen: false }),
            (None, Some(_)) => Some(JobStop::Continued),
            (None, None) => None,
        };
        Ok(stop.map(|stop| (self.child, stop)))
    }
}

/// Makes the parent take note of a stop. Its SIGCHLD is gone with its signal actions, which are set later.
pub(crate) fn take_note(child: u32, batch: &mut Batch) {
    let options = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
    batch.call(sys::waitid, &[u64::from(libc::P_PID), u64::from(child), 0, options as u64, 0]);
}
