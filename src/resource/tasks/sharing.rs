//! What tasks share beyond what their kind implies: CLONE_VM, CLONE_FILES, CLONE_FS, CLONE_SIGHAND between
//! processes, or threads that have stopped sharing.

use std::cmp::Ordering;

use crate::Pid;
use crate::error::{NameCall, Result};
use crate::freeze::{Frozen, Process};
use crate::resource::Report;
use crate::sys::{Compare, kcmp};

const BETWEEN_PROCESSES: [(Compare, &str); 4] = [
    (Compare::Vm, "shared address space (CLONE_VM)"),
    (Compare::Files, "shared fd table (CLONE_FILES)"),
    (Compare::Fs, "shared working directory (CLONE_FS)"),
    (Compare::Sighand, "shared signal actions (CLONE_SIGHAND)"),
];

const BETWEEN_THREADS: [(Compare, &str); 2] =
    [(Compare::Files, "fd table of its own"), (Compare::Fs, "working directory of its own")];

/// Refuses both, for now.
pub(crate) fn check(frozen: &Frozen, report: &mut Report) -> Result<()> {
    for (what, name) in BETWEEN_PROCESSES {
        let mut pids: Vec<Pid> = frozen.processes.iter().map(Process::speaker).collect();
        let mut failed = None;
        let mut order = |a: &Pid, b: &Pid| {
            kcmp(*a, *b, what).unwrap_or_else(|errno| {
                failed = Some(errno);
                Ordering::Equal
            })
        };
        pids.sort_by(&mut order);
        for pair in pids.windows(2) {
            if order(&pair[0], &pair[1]) == Ordering::Equal {
                report.attribute(
                    pair[1],
                    name,
                    format!("it shares it with process {}: not supported yet", pair[0]),
                );
            }
        }
        failed.map_or(Ok(()), Err).call("kcmp")?;
    }
    for process in &frozen.processes {
        let mut threads = process.threads.iter().map(|thread| thread.tid());
        let Some(first) = threads.next() else { continue };
        for tid in threads {
            for (what, name) in BETWEEN_THREADS {
                if kcmp(first, tid, what).call("kcmp")? != Ordering::Equal {
                    report.attribute(tid, name, "threads that do not share it are not supported yet");
                }
            }
        }
    }
    Ok(())
}
