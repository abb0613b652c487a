//! What a task may have that cannot be brought back yet: refused by name.

use crate::Pid;
use crate::arch;
use crate::error::{NameCall, Refusal, Result, Subject};
use crate::freeze::{Frozen, Process, Thread};
use crate::proc::read;
use crate::resource::Report;
use crate::resource::tasks::seccomp;
use crate::sys::{ptrace, sched};

/// The namespaces of a task, by their names in `/proc/PID/ns`, but for those of pids.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "time", "time_for_children", "user", "uts"];

/// Only a process with a single thread can leave these. Any thread can leave the others by itself, which takes some
/// 15 microseconds a thread to find out.
const OF_PROCESSES: [&str; 2] = ["time", "user"];

/// A tree may live in a pid namespace of its own, but all of it in the same one: in two, the same number means two
/// tasks, so that nothing else can be said of the tree.
pub(crate) fn nested(frozen: &Frozen, report: &mut Report) -> Result<()> {
    let same = read::link(frozen.root()?.speaker(), "ns/pid")?;
    for process in &frozen.processes {
        // pid_for_children has no link in a task whose own is empty. Each thread has one of its own.
        let other = |tid, name| read::link(tid, name).is_ok_and(|theirs| theirs != same);
        if other(process.speaker(), "ns/pid")
            || process.threads.iter().any(|thread| other(thread.tid(), "ns/pid_for_children"))
        {
            let reason = "it, or its next child, is in another namespace than the root of the tree";
            report.refuse(
                Refusal::new(process.pid, Subject::Namespace("pid"), reason)
                    .hint("checkpoint each pid namespace by itself"),
            );
        }
    }
    Ok(())
}

/// Adds to the report what this process holds that no resource describes.
pub(crate) fn check(process: &Process, report: &mut Report) -> Result<()> {
    let own = Pid::from(std::process::id());
    for name in NAMESPACES {
        let way = format!("ns/{name}");
        // Older kernels lack some.
        let Ok(ours) = read::link(own, &way) else { continue };
        let threads = if OF_PROCESSES.contains(&name) { 1 } else { usize::MAX };
        let mut threads = process.threads.iter().take(threads).map(Thread::tid);
        if let Some(tid) = threads.find(|tid| read::link(*tid, &way).is_ok_and(|theirs| theirs != ours)) {
            report.refuse(
                Refusal::new(tid, Subject::Namespace(name), "it is in another namespace than the caller")
                    .hint("run the checkpoint inside the same namespaces"),
            );
        }
    }
    if !can_be_asked(process) {
        report.refuse(seccomp::refusal(process.pid));
    }
    // PR_SET_IO_FLUSHER shows in the flags only: reading it by prctl(2) needs CAP_SYS_RESOURCE.
    const PF_MEMALLOC_NOIO_AND_LOCAL_THROTTLE: u32 = 0x0018_0000;
    if process.stat.flags & PF_MEMALLOC_NOIO_AND_LOCAL_THROTTLE != 0 {
        report.attribute(process.pid, "I/O flusher", "PR_SET_IO_FLUSHER is not supported");
    }
    for thread in &process.threads {
        per_thread(thread.tid(), report)?;
    }
    if process.stat.tty_nr != 0 {
        report.attribute(process.pid, "controlling terminal", "terminals are not supported yet");
    }
    Ok(())
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

/// Refuses a process with a thread that could not execute our calls.
pub(crate) fn in_32_bit_mode(process: &Process, report: &mut Report) -> Result<bool> {
    for thread in &process.threads {
        if thread.tracee.regs()?.cs != arch::CS_64 {
            report.attribute(thread.tid(), "32-bit mode", "32-bit tasks are not supported");
            return Ok(true);
        }
    }
    Ok(false)
}

/// Can the tasks of this process execute system calls for us?
pub(crate) fn can_be_asked(process: &Process) -> bool {
    process.seccomp.possible
}
