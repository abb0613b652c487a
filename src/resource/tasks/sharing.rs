//! What tasks share beyond what their kind implies: CLONE_VM, CLONE_FILES, CLONE_FS, CLONE_SIGHAND between
//! processes, or threads that have stopped sharing.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use super::plan::{Actor, Step};
use super::tree::Tree;
use crate::Pid;
use crate::error::{NameCall, Result};
use crate::freeze::{Frozen, Process};
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::Report;
use crate::sys::{Compare, kcmp};

/// What a process shares with its parent, by the number of the first process that has it: that one's records are
/// those of all.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Sharing {
    pub(crate) files: Option<u32>,
    pub(crate) places: Option<u32>,
}

impl Record for Sharing {
    const TAG: Tag = Tag::new(b"SHAR");
    const VERSION: u16 = 1;
    const NAME: &'static str = "sharing between processes";
}

impl Sharing {
    /// The flags of the clone(2) that makes this child of that parent. None: it cannot share with this one.
    pub(crate) fn clone_flags(child: (u32, Self), parent: (u32, Self)) -> Option<u64> {
        let flag = |flag: i32, child: Option<u32>, parents: Option<u32>| match child {
            None => Some(0),
            Some(first) => (parents.unwrap_or(parent.0) == first).then_some(flag as u64),
        };
        let files = flag(libc::CLONE_FILES, child.1.files, parent.1.files)?;
        let places = flag(libc::CLONE_FS, child.1.places, parent.1.places)?;
        Some(files | places)
    }
}

const REFUSED_BETWEEN_PROCESSES: [(Compare, &str); 2] = [
    (Compare::Vm, "shared address space (CLONE_VM)"),
    (Compare::Sighand, "shared signal actions (CLONE_SIGHAND)"),
];

const REFUSED_BETWEEN_THREADS: [(Compare, &str); 2] =
    [(Compare::Files, "fd table of its own"), (Compare::Fs, "working directory of its own")];

/// What processes share with their parents. Refuses everything else that tasks share, or do not.
pub(crate) fn describe(frozen: &Frozen, tree: &Tree, report: &mut Report) -> Result<BTreeMap<u32, Sharing>> {
    for (what, name) in REFUSED_BETWEEN_PROCESSES {
        for group in groups(frozen, what)? {
            for process in group.iter().skip(1) {
                let reason = format!("it shares it with process {}: not supported yet", group[0].pid);
                report.attribute(process.pid, name, reason);
            }
        }
    }
    // By whom a process is going to be made.
    let plan = tree.plan().ok();
    let steps = plan.iter().flat_map(|plan| &plan.steps);
    let births: BTreeMap<u32, u32> = steps
        .filter_map(|step| match step {
            Step::Bear { parent: Actor::Number(parent), child: Actor::Number(child) } => {
                Some((*child, *parent))
            }
            _ => None,
        })
        .collect();
    let mut sharing: BTreeMap<u32, Sharing> = BTreeMap::new();
    for (what, name) in [(Compare::Files, "shared fd table"), (Compare::Fs, "shared working directory")] {
        for group in groups(frozen, what)? {
            let pids: BTreeSet<u32> = group.iter().map(|process| process.number).collect();
            let first = group[0].number;
            for process in group.iter().skip(1) {
                if !births.get(&process.number).is_some_and(|parent| pids.contains(parent)) {
                    let reason = format!("it shares it with process {first}, but not with its parent");
                    report.attribute(process.pid, name, reason);
                }
                let own = sharing.entry(process.number).or_default();
                match what {
                    Compare::Files => own.files = Some(first),
                    _ => own.places = Some(first),
                }
            }
        }
    }
    between_threads(frozen, report)?;
    Ok(sharing)
}

/// The processes that have one of these in common, parents before their children; at least two in a group.
fn groups(frozen: &Frozen, what: Compare) -> Result<Vec<Vec<&Process>>> {
    let mut order: Vec<usize> = (0..frozen.processes.len()).collect();
    let mut failed = None;
    let speaker = |index: usize| frozen.processes.get(index).map_or(Pid::from(0), Process::speaker);
    let mut compare = |a: usize, b: usize| {
        kcmp(speaker(a), speaker(b), what).unwrap_or_else(|errno| {
            failed = Some(errno);
            Ordering::Equal
        })
    };
    // The sort is stable.
    order.sort_by(|a, b| compare(*a, *b));
    let groups: Vec<Vec<&Process>> = order
        .chunk_by(|a, b| compare(*a, *b) == Ordering::Equal)
        .filter(|group| group.len() > 1)
        .map(|group| group.iter().filter_map(|index| frozen.processes.get(*index)).collect())
        .collect();
    failed.map_or(Ok(()), Err).call("kcmp")?;
    Ok(groups)
}

fn between_threads(frozen: &Frozen, report: &mut Report) -> Result<()> {
    for process in &frozen.processes {
        let mut threads = process.threads.iter().map(|thread| thread.tid());
        let Some(first) = threads.next() else { continue };
        for tid in threads {
            for (what, name) in REFUSED_BETWEEN_THREADS {
                if kcmp(first, tid, what).call("kcmp")? != Ordering::Equal {
                    report.attribute(tid, name, "threads that do not share it are not supported yet");
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags() {
        let sharing = |files, places| Sharing { files, places };
        let none = Sharing::default();
        assert_eq!(Sharing::clone_flags((11, none), (10, none)), Some(0));
        let files = libc::CLONE_FILES as u64;
        assert_eq!(Sharing::clone_flags((11, sharing(Some(10), None)), (10, none)), Some(files));
        let places = libc::CLONE_FS as u64;
        let (child, parent) = ((12, sharing(Some(10), Some(11))), (11, sharing(Some(10), None)));
        assert_eq!(Sharing::clone_flags(child, parent), Some(files | places));
        assert_eq!(Sharing::clone_flags((12, sharing(Some(10), None)), (11, none)), None);
    }
}
