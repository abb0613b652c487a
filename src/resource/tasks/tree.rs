//! The shape of the tree: which tasks there are, who is whose child, sessions, process groups, the dead.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{self, Plan};
use crate::Pid;
use crate::error::{Error, ErrorKind, Refusal, Result, Subject};
use crate::freeze::{Frozen, Process, Zombie};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::{read, stat};
use crate::resource::Report;

/// The whole tree, parents before children, the root first.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Tree {
    pub(crate) processes: Vec<ProcessRecord>,
}

impl Record for Tree {
    const TAG: Tag = Tag::new(b"TREE");
    const VERSION: u16 = 1;
    const NAME: &'static str = "process tree";
}

/// One process.
#[derive(Encode, Decode, Debug, Clone)]
pub(crate) struct ProcessRecord {
    pub(crate) pid: u32,
    pub(crate) parent: u32,
    pub(crate) group: u32,
    pub(crate) session: u32,
    /// The signal that its parent gets when it ends.
    pub(crate) exit_signal: u32,
    pub(crate) life: Life,
    /// What it is called (comm); empty for the living, whose threads have names of their own.
    pub(crate) name: Vec<u8>,
}

/// Does it live?
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
pub(crate) enum Life {
    /// It runs these threads; the leader is the first unless it has ended.
    Threads(Vec<u32>),
    /// It has ended with this wait status, and nobody has waited for it.
    Zombie(i32),
}

impl ProcessRecord {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from(self.pid)
    }

    pub(crate) fn threads(&self) -> &[u32] {
        match &self.life {
            Life::Threads(threads) => threads,
            Life::Zombie(_) => &[],
        }
    }
}

impl ProcessRecord {
    pub(crate) fn leader_is_dead(&self) -> bool {
        self.threads().first() != Some(&self.pid)
    }
}

impl Tree {
    pub(crate) fn describe(frozen: &Frozen, report: &mut Report) -> Self {
        let own: BTreeMap<u32, u32> = frozen.processes.iter().map(|p| (p.pid.get(), p.number)).collect();
        // The root's parent is not in the tree.
        let nested = frozen.processes.first().is_some_and(|root| root.status.ns_pid.len() > 1);
        let outside = |ppid| if nested { 0 } else { ppid };
        let parent = |stat: &stat::Stat| own.get(&stat.ppid).copied().unwrap_or(outside(stat.ppid));
        let living = frozen.processes.iter().map(|process| Self::living(process, parent(&process.stat)));
        let mut processes: Vec<_> = living.collect();
        for zombie in &frozen.zombies {
            if let Err((reason, hint)) = can_die_again(&zombie.stat) {
                report.refuse(Refusal::new(zombie.pid, Subject::Attribute("wait status"), reason).hint(hint));
            }
            processes.push(Self::dead(zombie, parent(&zombie.stat)));
        }
        let tree = Self { processes };
        if let Some(root) = tree.processes.first().filter(|root| root.exit_signal != libc::SIGCHLD as u32) {
            let reason =
                format!("its parent, which is not in the tree, gets signal {} for it", root.exit_signal);
            report.attribute(root.pid(), "exit signal", reason);
        }
        let planned = tree.plan().and_then(|plan| none_outside(frozen, &plan));
        if let Err(reason) = planned {
            let pid = reason.pid().unwrap_or(Pid::from(tree.processes.first().map_or(0, |root| root.pid)));
            let subject = reason.subject().cloned().unwrap_or(Subject::Task);
            report.refuse(
                Refusal::new(pid, subject, reason.reason())
                    .hint("checkpoint a tree that is whole: with the session leader or group leader in it"),
            );
        }
        tree
    }

    fn living(process: &Process, parent: u32) -> ProcessRecord {
        let mut threads: Vec<u32> = process.threads.iter().map(|thread| thread.tracee.number()).collect();
        threads.sort_unstable_by_key(|tid| (*tid != process.number, *tid));
        ProcessRecord {
            pid: process.number,
            parent,
            group: process.status.ns_pgid.last().copied().unwrap_or(0),
            session: process.status.ns_sid.last().copied().unwrap_or(0),
            exit_signal: process.stat.exit_signal.max(0) as u32,
            life: Life::Threads(threads),
            name: Vec::new(),
        }
    }

    fn dead(zombie: &Zombie, parent: u32) -> ProcessRecord {
        ProcessRecord {
            pid: zombie.number,
            parent,
            group: zombie.status.ns_pgid.last().copied().unwrap_or(0),
            session: zombie.status.ns_sid.last().copied().unwrap_or(0),
            exit_signal: zombie.stat.exit_signal.max(0) as u32,
            life: Life::Zombie(zombie.stat.exit_code),
            name: zombie.stat.comm.clone(),
        }
    }

    /// The root of the tree.
    pub(crate) fn root(&self) -> Result<&ProcessRecord> {
        self.processes.first().ok_or_else(|| Error::new(ErrorKind::Image, "an image without processes"))
    }

    /// Puts a process 1 above the root. What its session and group are is outside its namespace; the tree joins them
    /// instead of those that it was in if it is to `inherit` them.
    pub(crate) fn below_init(&mut self, inherit: bool) {
        let known: BTreeSet<u32> = self.processes.iter().map(|process| process.pid).collect();
        let Some(root) = self.processes.first_mut() else { return };
        let outer = Some(root.session).filter(|session| inherit && *session != root.pid);
        root.parent = 1;
        for process in self.processes.iter_mut().filter(|process| Some(process.session) == outer) {
            process.session = 0;
            if !known.contains(&process.group) {
                process.group = 0;
            }
        }
        self.processes.insert(
            0,
            ProcessRecord {
                pid: 1,
                parent: 0,
                group: 0,
                session: 0,
                exit_signal: libc::SIGCHLD as u32,
                life: Life::Threads(vec![1]),
                name: Vec::new(),
            },
        );
    }

    /// The numbers of all its tasks, the dead ones included.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = Pid> + '_ {
        let dead = |process: &ProcessRecord| process.leader_is_dead().then_some(process.pid);
        self.processes
            .iter()
            .flat_map(move |process| process.threads().iter().copied().chain(dead(process)))
            .map(Pid::from)
    }

    /// Checks the tree and finds out how it can be made.
    pub(crate) fn plan(&self) -> Result<Plan> {
        let root = self.root()?;
        let mut known: BTreeMap<u32, &ProcessRecord> = BTreeMap::new();
        let mut tasks = BTreeSet::new();
        for process in &self.processes {
            let image = |why| Err(Error::new(ErrorKind::Image, why).of(process.pid()));
            if process.pid != root.pid && !known.contains_key(&process.parent) {
                return image("its parent is not in the tree, or comes after it");
            }
            if known.get(&process.parent).is_some_and(|parent| parent.threads().is_empty()) {
                return image("a dead process has a child");
            }
            match &process.life {
                Life::Threads(threads) if threads.is_empty() => return image("it lives without a thread"),
                Life::Zombie(_) if process.pid == root.pid => return image("the root of the tree is dead"),
                Life::Zombie(status) if !is_final(*status) => {
                    return image("it has ended in an impossible way");
                }
                _ => {}
            }
            let own = process.threads().iter().chain(process.leader_is_dead().then_some(&process.pid));
            if own.into_iter().any(|tid| !tasks.insert(*tid)) {
                return image("a task is there twice");
            }
            known.insert(process.pid, process);
        }
        if known.contains_key(&root.parent) {
            return Err(Error::new(ErrorKind::Image, "the parent of the root is in the tree").of(root.pid()));
        }
        plan::of(self, root, known, &tasks)
    }
}

/// Why a process that has ended cannot end in that way once more, and what could be done about it.
fn can_die_again(stat: &stat::Stat) -> std::result::Result<(), (&'static str, &'static str)> {
    const CORE_DUMPED: i32 = 0x80;
    match stat {
        // The kernel shows to nobody else that a task which has ended does not run.
        stat::Stat { wchan: 0, .. } => Err(("how it has ended may not be read", "CAP_SYS_PTRACE is needed")),
        stat::Stat { exit_code, .. } if exit_code & CORE_DUMPED != 0 => {
            Err(("it has dumped core, and would have to do so once more", "let its parent wait for it"))
        }
        _ => Ok(()),
    }
}

/// Is it a wait status by exit(2) or by a signal that ends processes?
fn is_final(status: i32) -> bool {
    const HARMLESS: [i32; 8] = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    match status & 0xff {
        0 => (0..=0xff00).contains(&status),
        signal => status == signal && signal <= 64 && !HARMLESS.contains(&signal),
    }
}

/// A session or group whose leader is not in the tree can be made again if all of it is in the tree.
fn none_outside(frozen: &Frozen, plan: &Plan) -> Result<()> {
    if plan.stand_ins.is_empty() {
        return Ok(());
    }
    // As everybody sees them, by how the tree knows them.
    let mut stand_ins: BTreeMap<u32, (u32, Pid, &'static str)> = BTreeMap::new();
    let living = frozen.processes.iter().map(|process| (process.pid, &process.stat, &process.status));
    let dead = frozen.zombies.iter().map(|zombie| (zombie.pid, &zombie.stat, &zombie.status));
    for (pid, stat, status) in living.chain(dead) {
        let leaders =
            [(stat.pgrp, &status.ns_pgid, "process group"), (stat.session, &status.ns_sid, "session")];
        for (here, own, what) in leaders {
            if let Some(own) = own.last().filter(|own| plan.stand_ins.contains(own)) {
                stand_ins.insert(here.max(0) as u32, (*own, pid, what));
            }
        }
    }
    for pid in frozen.others.iter().copied() {
        let Ok(stat) = read::parsed(pid, "stat", stat::parse) else { continue };
        let numbers = [pid.get(), stat.session.max(0) as u32, stat.pgrp.max(0) as u32];
        let Some((own, member, what)) = numbers.iter().find_map(|number| stand_ins.get(number)) else {
            continue;
        };
        let reason = format!("{what} {own} is not the tree's own: process {pid} is in it too");
        return Err(Error::new(ErrorKind::Unsupported, reason).about(Subject::Attribute(what)).of(*member));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32, group: u32, session: u32) -> ProcessRecord {
        ProcessRecord {
            pid,
            parent,
            group,
            session,
            exit_signal: 17,
            life: Life::Threads(vec![pid]),
            name: Vec::new(),
        }
    }

    #[test]
    fn ways_to_end() {
        let zombie = |wchan, code| {
            let text = format!(
                "7 (a) Z 1 1 1 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 1 0 0 1 0 0 0 0 0 0 0 0 0 {wchan} 0 0 17 \
                 0 0 0 0 0 0 0 0 0 0 0 0 0 {code}\n"
            );
            can_die_again(&stat::parse(text.as_bytes()).unwrap())
        };
        assert_eq!((zombie(1, 0x700), zombie(1, 11)), (Ok(()), Ok(())));
        assert!(zombie(0, 0).unwrap_err().0.contains("may not be read"));
        assert!(zombie(1, 0x80 | 11).unwrap_err().0.contains("core"));
        assert!([0, 0x100, 0xff00, 1, 9, 64].into_iter().all(is_final));
        assert!(![-1, 0x1_0000, 0x7f, 0x8b, 65, 17, 19, 0x109, 0x137f, 0xffff].into_iter().any(is_final));
        let died = |status| ProcessRecord { life: Life::Zombie(status), ..process(11, 10, 10, 10) };
        let tree = |status| Tree { processes: vec![process(10, 1, 10, 10), died(status)] };
        assert!(tree(9).plan().is_ok());
        assert_eq!(tree(17).plan().unwrap_err().kind(), ErrorKind::Image);
    }

    #[test]
    fn hostile_trees() {
        let twice = Tree { processes: vec![process(10, 1, 10, 10), process(10, 10, 10, 10)] };
        let orphan = Tree { processes: vec![process(10, 1, 10, 10), process(11, 12, 10, 10)] };
        let cycle = Tree { processes: vec![process(10, 11, 10, 10), process(11, 11, 10, 10)] };
        let circle = Tree { processes: vec![process(10, 11, 10, 10), process(11, 10, 0, 0)] };
        let empty = Tree { processes: vec![] };
        for tree in [twice, orphan, cycle, circle, empty] {
            assert_eq!(tree.plan().unwrap_err().kind(), ErrorKind::Image, "{tree:?}");
        }
    }
}
