//! A task in vfork(2), or clone(2) with CLONE_VFORK, cannot be stopped before its child has executed a program or
//! ended; and a child that is stopped does neither.

use crate::Pid;
use crate::error::{Error, ErrorKind, Refusal, Result, Subject};
use crate::proc::read;
use crate::proc::stat;
use crate::proc::status;
use crate::proc::syscall::{self, SyscallState};
use crate::sys::{Compare, kcmp};
use crate::tracee::Memory;

/// Says so if that is why a task did not stop in time.
pub(crate) fn explain(error: Error) -> Error {
    let tid = error.pid().filter(|_| error.kind() == ErrorKind::Timeout);
    match tid.and_then(|tid| refusal(tid).ok().flatten()) {
        Some(refusal) => Error::unsupported(vec![refusal]).with_source(error),
        None => error,
    }
}

fn refusal(tid: Pid) -> Result<Option<Refusal>> {
    if !is_in_vfork(tid)? {
        return Ok(None);
    }
    let process = Pid::from(read::parsed(tid, "status", status::parse)?.tgid);
    let shares = |child: Pid| kcmp(tid, child, Compare::Vm) == Ok(std::cmp::Ordering::Equal);
    let parents = read::parents()?;
    let child =
        parents.iter().find(|(child, parent)| *parent == process && shares(*child)).map(|(pid, _)| *pid);
    let named = match child {
        Some(child) => {
            let name = read::parsed(child, "stat", stat::parse)?.comm;
            format!("its child {child} ({})", String::from_utf8_lossy(&name))
        }
        None => "its child".to_owned(),
    };
    let reason = format!("it is in vfork(2) (state D): {named} has neither executed a program nor ended");
    let refusal = Refusal::new(tid, Subject::Task, reason);
    Ok(Some(refusal.hint("try again when the child has; the time limit says for how long to wait for that")))
}

fn is_in_vfork(tid: Pid) -> Result<bool> {
    let SyscallState::Blocked { nr, args, .. } = read::parsed(tid, "syscall", syscall::parse)? else {
        return Ok(false);
    };
    let flags = match nr {
        libc::SYS_vfork => return Ok(true),
        libc::SYS_clone => args[0],
        libc::SYS_clone3 => {
            let mut flags = [0; 8];
            Memory::open(tid)?.read(args[0], &mut flags)?;
            u64::from_ne_bytes(flags)
        }
        _ => 0,
    };
    Ok(flags & libc::CLONE_VFORK as u64 != 0)
}
