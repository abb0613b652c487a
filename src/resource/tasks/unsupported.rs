//! What a task may have that cannot be brought back yet: refused by name.

use crate::Pid;
use crate::arch;
use crate::error::{NameCall, Refusal, Result, Subject};
use crate::freeze::{Frozen, Process, Thread};
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
        if !is_within(process, &pids, ours.clone(), report)? {
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
    mut ours: Vec<Namespace>,
    report: &mut Report,
) -> Result<bool> {
    let mut within = true;
    for (index, thread) in process.threads.iter().enumerate() {
        let links = Links::of(thread.tid(), "ns")?;
        let differs = |name, wanted: &Vec<u8>| links.get(name).is_some_and(|theirs| theirs != *wanted);
        let of_pids = |name| pids.as_ref().is_some_and(|pids| differs(name, pids));
        // pid_for_children has no link in a task whose own is empty. Each thread has one of its own.
        within &= !of_pids("pid_for_children") && (index > 0 || !of_pids("pid"));
        ours.retain(|(name, ours)| {
            let other = differs(name, ours);
            if other {
                report.refuse(
                    Refusal::new(
                        thread.tid(),
                        Subject::Namespace(name),
                        "it is in another namespace than the caller",
                    )
                    .hint("run the checkpoint inside the same namespaces"),
                );
            }
            !other && (index > 0 || !OF_PROCESSES.contains(name)) // of these the first thread has told
        });
    }
    Ok(within)
}

/// Adds to the report what this process holds that no resource describes.
pub(crate) fn check(process: &Process, report: &mut Report) -> Result<()> {
    if !process.seccomp.possible {
        report.refuse(seccomp::refusal(process.pid));
    }
    if process.stat.flags & IO_FLUSHER != 0 {
        report.attribute(process.pid, "I/O flusher", "PR_SET_IO_FLUSHER is not supported");
    }
    if tags_addresses(&process.status) {
        report.attribute(process.pid, "address tagging", "ARCH_ENABLE_TAGGED_ADDR (LAM) is not supported");
    }
    for thread in &process.threads {
        per_thread(thread.tid(), report)?;
    }
    if process.stat.tty_nr != 0 {
        report.attribute(process.pid, "controlling terminal", "terminals are not supported yet");
    }
    Ok(())
}

/// Does the processor ignore some bits of its addresses?
fn tags_addresses(status: &Status) -> bool {
    status.untag_mask.is_some_and(|mask| mask != u64::MAX)
}

fn per_thread(tid: Pid, report: &mut Report) -> Result<()> {
    if ptrace::has_breakpoints(tid).call("ptrace(PEEKUSER)")? {
        report.attribute(tid, "debug registers", "hardware breakpoints are not supported");
    }
    // Kernels without these have nothing to be refused.
    if sched::core_cookie(tid).is_ok_and(|cookie| cookie != 0) {
        report.attribute(tid, "core scheduling", "groups of tasks that share cores are not supported");
    }
    if ptrace::dispatches_syscalls(tid).unwrap_or(false) {
        report.attribute(tid, "syscall user dispatch", "it is not supported");
    }
    Ok(())
}

/// Refuses a process with a thread that executes other code than ours.
pub(crate) fn in_32_bit_mode(process: &Process, report: &mut Report) -> Result<bool> {
    for thread in &process.threads {
        if thread.tracee.regs()?.cs != arch::CS_64 {
            report.attribute(thread.tid(), "32-bit mode", "32-bit tasks are not supported");
            return Ok(true);
        }
    }
    Ok(false)
}

/// Can the tasks of this process execute system calls for us? Some would be killed by a signal instead.
pub(crate) fn can_be_asked(process: &Process) -> bool {
    let dispatches = |thread: &Thread| ptrace::dispatches_syscalls(thread.tid()).unwrap_or(false);
    process.seccomp.possible && !process.threads.iter().any(dispatches)
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
