//! What a task may have that cannot be brought back yet: refused by name.

use crate::Pid;
use crate::error::{NameCall, Refusal, Result, Subject};
use crate::freeze::Process;
use crate::proc::read;
use crate::resource::Report;
use crate::resource::tasks::seccomp;
use crate::sys::ptrace;

/// The namespaces of a task, by their names in `/proc/PID/ns`.
const NAMESPACES: [&str; 10] =
    ["cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts"];

/// Adds to the report what this process holds that no resource describes.
pub(crate) fn check(process: &Process, root: &Process, report: &mut Report) -> Result<()> {
    let own = Pid::from(std::process::id());
    for name in NAMESPACES {
        // A tree may live in a pid namespace of its own, all of it in the same one.
        let (task, as_well) = match name {
            "pid" | "pid_for_children" => (root.speaker(), "pid"),
            name => (own, name),
        };
        let theirs = read::link(process.speaker(), &format!("ns/{name}"));
        // pid_for_children has no link in a process whose own is empty; older kernels lack some.
        if let (Ok(theirs), Ok(same)) = (theirs, read::link(task, &format!("ns/{as_well}")))
            && theirs != same
        {
            let (reason, hint) = match as_well {
                "pid" => ("it is in another namespace than the root of the tree", "checkpoint them apart"),
                _ => (
                    "it is in another namespace than the caller",
                    "run the checkpoint inside the same namespaces",
                ),
            };
            report.refuse(Refusal::new(process.pid, Subject::Namespace(name), reason).hint(hint));
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
    // Kernels without it have nothing to be refused.
    if ptrace::dispatches_syscalls(tid).unwrap_or(false) {
        report.attribute(tid, "syscall user dispatch", "it is not supported");
    }
    Ok(())
}

/// Can the tasks of this process execute system calls for us?
pub(crate) fn can_be_asked(process: &Process) -> bool {
    process.seccomp.possible
}
