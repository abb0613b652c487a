//! What a task may have that cannot be brought back yet: refused by name.

use crate::Pid;
use crate::error::{Refusal, Result, Subject};
use crate::freeze::Process;
use crate::proc::{read, status, timers};
use crate::resource::Report;

/// The namespaces of a task, by their names in `/proc/PID/ns`.
const NAMESPACES: [&str; 10] =
    ["cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts"];

/// Adds to the report what this process holds that no resource describes.
pub(crate) fn check(process: &Process, report: &mut Report) -> Result<()> {
    let own = Pid::from(std::process::id());
    for name in NAMESPACES {
        let way = format!("ns/{name}");
        let (theirs, ours) = (read::link(process.pid, &way), read::link(own, &way));
        // pid_for_children has no link in a process whose own is empty; older kernels lack some.
        if let (Ok(theirs), Ok(ours)) = (theirs, ours)
            && theirs != ours
        {
            report.refuse(
                Refusal::new(
                    process.pid,
                    Subject::Namespace(name),
                    "it is in another namespace than the caller",
                )
                .hint("run the checkpoint inside the same namespaces"),
            );
        }
    }
    credentials(process, own, report)?;
    if !read::parsed(process.pid, "timers", timers::parse)?.is_empty() {
        report.attribute(process.pid, "POSIX timers", "timers of timer_create(2) are not supported yet");
    }
    if process.stat.tty_nr != 0 {
        report.attribute(process.pid, "controlling terminal", "terminals are not supported yet");
    }
    Ok(())
}

/// A restored task has the credentials of whoever restores it, for now.
fn credentials(process: &Process, own: Pid, report: &mut Report) -> Result<()> {
    let (theirs, ours) = (&process.status, read::parsed(own, "status", status::parse)?);
    let same_ids = theirs.uid == ours.uid && theirs.gid == ours.gid && theirs.groups == ours.groups;
    let capabilities = |s: &status::Status| [s.cap_inh, s.cap_prm, s.cap_eff, s.cap_bnd, s.cap_amb];
    if !same_ids || capabilities(theirs) != capabilities(&ours) {
        let reason = "users, groups or capabilities other than the caller's are not supported yet";
        report.attribute(process.pid, "credentials", reason);
    }
    if theirs.no_new_privs != ours.no_new_privs {
        report.attribute(process.pid, "no_new_privs", "it is not supported yet");
    }
    if theirs.seccomp != 0 {
        report.attribute(process.pid, "seccomp", "system call filters are not supported yet");
    }
    Ok(())
}

/// Can the tasks of this process execute system calls for us?
pub(crate) fn can_be_asked(process: &Process) -> bool {
    process.status.seccomp == 0
}
