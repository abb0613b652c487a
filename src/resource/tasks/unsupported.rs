//! What a task may have that cannot be brought back yet: refused by name.

use std::collections::BTreeSet;

use crate::Pid;
use crate::arch::{self, Regs};
use crate::error::{NameCall, Refusal, Result, Subject};
use crate::freeze::{Frozen, Process, Thread};
use crate::parallel;
use crate::proc::read::Links;
use crate::proc::status::Status;
use crate::resource::Report;
use crate::resource::tasks::caller::IO_FLUSHER;
use crate::resource::tasks::seccomp;
use crate::sys::{ptrace, sched};

/// The namespaces of a task, by their names in `/proc/PID/ns`, but for those of pids.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "time", "time_for_children", "user", "uts"];

/// Only a process with a single thread can leave these. Any thread can leave the others by itself, which takes some
/// 10 microseconds a thread to find out.
const OF_PROCESSES: [&str; 2] = ["time", "user"];

/// A process's own, and that of its next children.
const OF_PIDS: [&str; 2] = ["pid", "pid_for_children"];

/// Adds to the report who is in another namespace than the caller. Is the tree in more than one pid namespace? It may
/// live in one of its own, but all of it in the same one: in two, the same number means two tasks, so that nothing else
/// can be said of the tree.
pub(crate) fn namespaces(frozen: &Frozen, report: &mut Report) -> Result<bool> {
    let own = Links::of(Pid::from(std::process::id()), "ns")?;
    // Older kernels lack some.
    let ours: Vec<Namespace> = NAMESPACES.iter().filter_map(|name| Some((*name, own.get(name)?))).collect();
    let pids = Links::of(frozen.root()?.speaker(), "ns")?.get("pid");
    let mut nested = false;
    for process in &frozen.processes {
        if !is_within(process, &pids, &ours, report)? {
            let reason = "it, or its next child, is in another namespace than the root of the tree";
            report.refuse(
                Refusal::new(process.pid, Subject::Namespace("pid"), reason)
                    .hint("checkpoint each pid namespace by itself"),
            );
            nested = true;
        }
    }
    Ok(nested)
}

/// Its name, and what its link says.
type Namespace = (&'static str, Vec<u8>);

/// Reports the first thread that is in another than one of `ours`. Are all of them, and their next children, in this
/// pid namespace?
fn is_within(
    process: &Process,
    pids: &Option<Vec<u8>>,
    ours: &[Namespace],
    report: &mut Report,
) -> Result<bool> {
    /// For less, another thread of ours is not worth its while.
    const FEW: usize = 32;
    // What all threads of a process have in common the first one tells.
    let left = |thread: &Thread| -> Result<Vec<&'static str>> {
        let first = thread.tid() == process.speaker();
        let links = Links::of_thread(process.pid, thread.tid(), "ns")?;
        let other = |name, wanted: &Vec<u8>| links.get(name).is_some_and(|theirs| theirs != *wanted);
        let ours = ours.iter().filter(|(name, _)| first || !OF_PROCESSES.contains(name));
        // pid_for_children has no link in a task whose own is empty. Each thread has one of its own.
        let of_pids = OF_PIDS.iter().filter(|name| first || **name != OF_PIDS[0]);
        let of_pids = of_pids.filter(|name| pids.as_ref().is_some_and(|pids| other(name, pids)));
        Ok(ours
            .filter(|(name, ours)| other(name, ours))
            .map(|(name, _)| *name)
            .chain(of_pids.copied())
            .collect())
    };
    let (mut within, mut reported) = (true, BTreeSet::new());
    let left = parallel::map(&process.threads, FEW, left)?;
    for (thread, name) in process
        .threads
        .iter()
        .zip(left)
        .flat_map(|(thread, left)| left.into_iter().map(move |name| (thread, name)))
    {
        if OF_PIDS.contains(&name) {
            within = false;
        } else if reported.insert(name) {
            let reason = "it is in another namespace than the caller";
            report.refuse(
                Refusal::new(thread.tid(), Subject::Namespace(name), reason)
                    .hint("run the checkpoint inside the same namespaces"),
            );
        }
    }
    Ok(within)
}

/// Adds to the report what this process holds that no resource describes. Can its tasks execute system calls for us?
/// Some would be killed by a signal instead.
pub(crate) fn check(process: &Process, report: &mut Report) -> Result<bool> {
    if !process.seccomp.possible {
        report.refuse(seccomp::refusal(process.pid));
    }
    if process.stat.flags & IO_FLUSHER != 0 {
        report.attribute(process.pid, "I/O flusher", "PR_SET_IO_FLUSHER is not supported");
    }
    if tags_addresses(&process.status) {
        report.attribute(process.pid, "address tagging", "ARCH_ENABLE_TAGGED_ADDR (LAM) is not supported");
    }
    // Kernels without them have no groups.
    let has_groups = sched::core_cookie(process.speaker()).is_ok();
    let mut can_be_asked = process.seccomp.possible;
    for thread in &process.threads {
        can_be_asked &= per_thread(thread.tid(), has_groups, report)?;
    }
    if process.stat.tty_nr != 0 {
        report.attribute(process.pid, "controlling terminal", "terminals are not supported yet");
    }
    Ok(can_be_asked)
}

/// Does the processor ignore some bits of its addresses?
fn tags_addresses(status: &Status) -> bool {
    status.untag_mask.is_some_and(|mask| mask != u64::MAX)
}

/// Can it execute system calls for us?
fn per_thread(tid: Pid, has_groups: bool, report: &mut Report) -> Result<bool> {
    if ptrace::has_breakpoints(tid).call("ptrace(PEEKUSER)")? {
        report.attribute(tid, "debug registers", "hardware breakpoints are not supported");
    }
    if has_groups && sched::core_cookie(tid).is_ok_and(|cookie| cookie != 0) {
        report.attribute(tid, "core scheduling", "groups of tasks that share cores are not supported");
    }
    // Kernels that cannot be asked have nothing to be refused.
    let dispatches = ptrace::dispatches_syscalls(tid).unwrap_or(false);
    if dispatches {
        report.attribute(tid, "syscall user dispatch", "it is not supported");
    }
    Ok(!dispatches)
}

/// The registers of all threads, unless one of them executes other code than ours, which is refused.
pub(crate) fn registers(process: &Process, report: &mut Report) -> Result<Option<Vec<Regs>>> {
    let mut all = Vec::with_capacity(process.threads.len());
    for thread in &process.threads {
        let regs = thread.tracee.regs()?;
        if regs.cs != arch::CS_64 {
            report.attribute(thread.tid(), "32-bit mode", "32-bit tasks are not supported");
            return Ok(None);
        }
        all.push(regs);
    }
    Ok(Some(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_seen() {
        let mut status = crate::proc::status::parse(&std::fs::read("/proc/self/status").unwrap()).unwrap();
        for (mask, tags) in [(None, false), (Some(u64::MAX), false), (Some(!(0x3f << 57)), true)] {
            status.untag_mask = mask;
            assert_eq!(tags_addresses(&status), tags, "{mask:x?}");
        }
    }
}
