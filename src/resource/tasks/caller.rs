//! Whoever restores: what its tasks are born with because it has it, and what nobody can take away from them again. A
//! restore that would leave them with it does not begin.

use nix::unistd::gettid;

use super::attributes;
use crate::Pid;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::proc::status::{self, Status};
use crate::proc::{read, stat};
use crate::sys::sched;

/// PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE, which are PR_SET_IO_FLUSHER. To ask prctl(2) takes CAP_SYS_RESOURCE.
pub(crate) const IO_FLUSHER: u32 = 0x0018_0000;

/// The thread that makes the first task.
pub(crate) struct Caller {
    pub(crate) tid: Pid,
    pub(crate) status: Status,
    pub(crate) attributes: attributes::Own,
}

impl Caller {
    /// Looks at the calling thread. No image has what it is refused for here.
    pub(crate) fn look() -> Result<Self> {
        let own = Pid::from(gettid().as_raw() as u32);
        let caller = Self {
            tid: own,
            status: read::parsed(own, "status", status::parse)?,
            attributes: attributes::Own::look(),
        };
        let flags = read::parsed(own, "stat", stat::parse)?.flags;
        // Kernels without core scheduling have no groups.
        caller.check(flags, sched::core_cookie(own).unwrap_or(0))?;
        Ok(caller)
    }

    fn check(&self, flags: u32, cookie: u64) -> Result<()> {
        // With filters of its own it may not suspend those of others either.
        if self.status.seccomp != 0 {
            return Err(for_good(
                "seccomp",
                "the caller is under system call filters, as all tasks that it makes",
            ));
        }
        if flags & IO_FLUSHER != 0 {
            return Err(for_good("I/O flusher", "the caller is one, as all tasks that it makes"));
        }
        if cookie != 0 {
            return Err(for_good(
                "core scheduling",
                "the caller shares cores with a group only, as all tasks that it makes",
            ));
        }
        Ok(())
    }
}

/// The error for what tasks would keep.
pub(super) fn for_good(what: &'static str, reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Conflict, reason)
        .about(Subject::Attribute(what))
        .with_hint("restore from a process that has not been restricted in this way")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_task_can_give_up() {
        let tid = Pid::from(std::process::id());
        let status = read::parsed(tid, "status", status::parse).unwrap();
        let attributes = attributes::Own::default();
        let mut caller = Caller { tid, status: Status { seccomp: 0, ..status }, attributes };
        assert!(caller.check(!IO_FLUSHER, 0).is_ok());
        let refused = |error: Error, what| {
            assert_eq!(
                (error.kind(), error.subject()),
                (ErrorKind::Conflict, Some(&Subject::Attribute(what)))
            );
        };
        refused(caller.check(IO_FLUSHER, 0).unwrap_err(), "I/O flusher");
        refused(caller.check(0, 5).unwrap_err(), "core scheduling");
        caller.status.seccomp = 2;
        refused(caller.check(0, 0).unwrap_err(), "seccomp");
    }
}
