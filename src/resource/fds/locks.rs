//! Locks on files. flock(2) and open file description locks belong to a description, and are taken by us before the
//! tasks get it. POSIX locks belong to an fd table; its process takes them itself, when it will not close any
//! descriptor any more: that of any descriptor of a file drops all of them. A lease belongs to a description, but its
//! process takes it, too: the signal that tells of its end names the descriptor. Opening a file would break a lease: we
//! never do.

use std::os::fd::AsFd;

use nix::errno::Errno;

use super::Probe;
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::fdinfo::{self, LockKind};
use crate::sys::lock::{self, Extent};
use crate::tracee::{Batch, sys as call};

/// Part of a file, under a lock.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Locked {
    exclusive: bool,
    start: u64,
    /// The last byte, unless it goes on to the end, wherever that will be.
    last: Option<u64>,
}

impl Locked {
    fn of(lock: &fdinfo::Lock) -> Self {
        Self { exclusive: lock.exclusive, start: lock.start, last: lock.last }
    }

    /// As struct flock has it; an image is not trusted.
    fn extent(&self) -> Result<Extent> {
        let length = match self.last {
            None => Some(0),
            Some(last) => last.checked_sub(self.start).and_then(|length| length.checked_add(1)),
        };
        let in_range = |number: u64| i64::try_from(number).ok();
        match (in_range(self.start), length.and_then(in_range)) {
            (Some(start), Some(length)) => Ok(Extent { exclusive: self.exclusive, start, length }),
            _ => Err(Error::new(ErrorKind::Image, "a lock of an impossible range")),
        }
    }
}

/// The locks that belong to an open file description, which has the same owner.
#[derive(Encode, Decode, Debug, Default, PartialEq, Eq)]
pub(crate) struct DescriptionLocks {
    /// By flock(2): is it exclusive?
    whole: Option<bool>,
    /// By F_OFD_SETLK.
    parts: Vec<Locked>,
}

impl Record for DescriptionLocks {
    const TAG: Tag = Tag::new(b"FLCK");
    const VERSION: u16 = 1;
    const NAME: &'static str = "locks of an open file description";
}

impl DescriptionLocks {
    /// `None` when there are none.
    pub(super) fn describe(
        probe: &Probe,
        locks: &[fdinfo::Lock],
    ) -> std::result::Result<Option<Self>, Refusal> {
        let mut found = Self::default();
        for lock in locks {
            match lock.kind {
                LockKind::Flock => found.whole = Some(lock.exclusive),
                LockKind::Ofd => found.parts.push(Locked::of(lock)),
                LockKind::Posix | LockKind::Lease => {}
                LockKind::Other => {
                    return Err(probe.refusal("a lease that is being broken, or a lock of an unknown kind"));
                }
            }
        }
        Ok((found != Self::default()).then_some(found))
    }

    pub(super) fn check(&self) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.extent().map(drop))
    }

    /// Takes them for a description of ours.
    pub(super) fn take(&self, file: impl AsFd) -> Result<()> {
        if let Some(exclusive) = self.whole {
            lock::flock(&file, exclusive).call("flock").map_err(taken)?;
        }
        self.parts.iter().try_for_each(|part| {
            lock::set_of_description(&file, part.extent()?).call("fcntl(F_OFD_SETLK)").map_err(taken)
        })
    }
}

/// A lock that its process takes, and the descriptor by which it does.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TableLock {
    fd: i32,
    taken: Taken,
}

#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    Posix(Locked),
    Lease { exclusive: bool },
}

impl TableLock {
    /// Those that the process has taken by this descriptor.
    pub(super) fn describe(fd: i32, pid: Pid, locks: &[fdinfo::Lock]) -> Vec<Self> {
        let taken = |lock: &fdinfo::Lock| match lock.kind {
            LockKind::Posix => Some(Taken::Posix(Locked::of(lock))),
            LockKind::Lease if lock.pid == pid.raw() => Some(Taken::Lease { exclusive: lock.exclusive }),
            _ => None,
        };
        locks.iter().filter_map(taken).map(|taken| Self { fd, taken }).collect()
    }

    pub(super) fn is_lease(&self) -> bool {
        matches!(self.taken, Taken::Lease { .. })
    }

    #[cfg(test)]
    pub(super) fn new(fd: i32, start: u64, last: Option<u64>) -> Self {
        Self { fd, taken: Taken::Posix(Locked { exclusive: true, start, last }) }
    }

    pub(super) fn fd(&self) -> i32 {
        self.fd
    }

    pub(super) fn check(&self) -> Result<()> {
        match &self.taken {
            Taken::Posix(locked) => locked.extent().map(drop),
            Taken::Lease { .. } => Ok(()),
        }
    }

    /// Queues the call that takes it.
    pub(super) fn take(&self, batch: &mut Batch) -> Result<()> {
        let fd = self.fd as u64;
        match &self.taken {
            Taken::Posix(locked) => {
                let lock = batch.input_words(&locked.extent()?.words());
                batch.call(call::fcntl, &[fd, libc::F_SETLK as u64, lock]);
            }
            Taken::Lease { exclusive } => {
                let kind = if *exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                batch.call(call::fcntl, &[fd, libc::F_SETLEASE as u64, kind as u64]);
            }
        }
        Ok(())
    }
}

/// An error of taking a lock: somebody else may have it now.
pub(super) fn taken(error: Error) -> Error {
    match error.raw_errno() {
        Some(Errno::EAGAIN | Errno::EACCES) => {
            let conflict = error.with_kind(ErrorKind::Conflict);
            conflict.with_hint("somebody else has taken a lock that the target had, or has opened a file under its lease: see lslocks(8)")
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Scratch;
    use super::*;

    /// Before there is any task.
    #[test]
    fn somebody_else_has_it() {
        let scratch = Scratch::new();
        let (own, other) = (scratch.file("file"), scratch.file("file"));
        let whole = DescriptionLocks { whole: Some(true), parts: Vec::new() };
        let part = Locked { exclusive: true, start: 3, last: Some(3) };
        let part = DescriptionLocks { whole: None, parts: vec![part] };
        for locks in [whole, part] {
            locks.take(&other).unwrap();
            assert_eq!(locks.take(&own).unwrap_err().kind(), ErrorKind::Conflict);
        }
    }

    #[test]
    fn impossible_ranges() {
        let extent = |start, last| Locked { exclusive: true, start, last }.extent();
        assert_eq!(extent(3, Some(6)).unwrap().length, 4);
        assert_eq!(extent(3, None).unwrap().length, 0);
        for (start, last) in [
            (7, Some(6)),
            (u64::MAX, None),
            (0, Some(u64::MAX)),
            (1 << 63, Some(1 << 63)),
            (0, Some(i64::MAX as u64)),
        ] {
            assert_eq!(extent(start, last).unwrap_err().kind(), ErrorKind::Image, "{start} {last:?}");
        }
    }
}
