//! Who makes whom, so that tasks share what they shared: clone(2) shares with its caller, who must have it already.
//!
//! The caller is the parent or, where siblings share what their parent does not have, a sibling (CLONE_PARENT). An fd
//! table and places can also be left behind (unshare(2)): a process between two that share one is born with theirs
//! and keeps it until it has borne its children. Into the family of one child lead no other ways, so that at most
//! one object of a kind can be common to tasks inside and outside of it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::plan::{Actor, Birth, Plan, Step};
use super::sharing::{Kind, Shares};
use super::tree::{ProcessRecord, Tree};
use crate::Pid;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::resource::Report;

/// Changes the order of siblings, and says of each birth by whom and with what in common it is.
pub(crate) fn arrange(tree: &Tree, plan: &mut Plan, shares: &Shares) -> Result<()> {
    if shares.is_empty() {
        return Ok(());
    }
    let mut arranger = Arranger::new(tree, plan, shares)?;
    let mut steps = std::mem::take(&mut plan.steps).into_iter().peekable();
    while let Some(step) = steps.next() {
        let Step::Bear { parent, child, .. } = step else {
            arranger.steps.push(step);
            continue;
        };
        // Siblings, while nothing happens to their parent's session.
        let mut children = vec![child];
        while let Some(Step::Bear { child, .. }) =
            steps.next_if(|next| matches!(next, Step::Bear { parent: same, .. } if *same == parent))
        {
            children.push(child);
        }
        arranger.bear_all(parent, children)?;
    }
    for process in &tree.processes {
        let process = Actor::Number(process.pid);
        arranger.bear_all(process, Vec::new())?;
        Kind::OF_THREADS.into_iter().for_each(|kind| arranger.leave(process, kind));
    }
    plan.steps = arranger.steps;
    Ok(())
}

/// Refuses what cannot be brought about.
pub(crate) fn check(tree: &Tree, shares: &Shares, report: &mut Report) -> Result<()> {
    // That there is no plan has been reported already.
    let Ok(mut plan) = tree.plan() else { return Ok(()) };
    if let Err(error) = arrange(tree, &mut plan, shares) {
        report.refuse(error.into_refusal()?);
    }
    Ok(())
}

struct Arranger<'t> {
    shares: &'t Shares,
    processes: BTreeMap<u32, &'t ProcessRecord>,
    /// The threads that differ from their processes and are not born yet.
    unborn: BTreeMap<u32, Vec<u32>>,
    /// The process of each such thread.
    homes: BTreeMap<u32, u32>,
    /// What a task must be born with, because tasks inside and outside of its family have it.
    enters: BTreeMap<(Actor, Kind), u32>,
    /// What those that are born have by now.
    held: BTreeMap<(Actor, Kind), u32>,
    exists: BTreeSet<(Kind, u32)>,
    steps: Vec<Step>,
}

impl<'t> Arranger<'t> {
    fn new(tree: &'t Tree, plan: &Plan, shares: &'t Shares) -> Result<Self> {
        let mut new = Self {
            shares,
            processes: tree.processes.iter().map(|process| (process.pid, process)).collect(),
            unborn: BTreeMap::new(),
            homes: BTreeMap::new(),
            enters: BTreeMap::new(),
            held: BTreeMap::new(),
            exists: BTreeSet::new(),
            steps: Vec::new(),
        };
        for process in &tree.processes {
            for (tid, _) in shares.threads(process.pid) {
                new.unborn.entry(process.pid).or_default().push(tid);
                new.homes.insert(tid, process.pid);
            }
        }
        new.find_entering(plan)?;
        new.is_born(Actor::Number(tree.root()?.pid));
        Ok(new)
    }

    fn find_entering(&mut self, plan: &Plan) -> Result<()> {
        let parents: BTreeMap<Actor, Actor> = plan
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::Bear { parent, child, .. } => Some((*child, *parent)),
                _ => None,
            })
            .collect();
        let mut members: BTreeMap<(Kind, u32), BTreeSet<u32>> = BTreeMap::new();
        for ((process, number), sharing) in self.shares.all() {
            for kind in Kind::ALL {
                let first = sharing.get(kind);
                let all = members.entry((kind, first)).or_default();
                // The first one need not differ from what is usual.
                all.insert(first);
                all.insert(if self.shares.process(process).get(kind) == first { process } else { number });
            }
        }
        for ((kind, first), members) in members {
            let mut inside: BTreeMap<Actor, usize> = BTreeMap::new();
            for member in &members {
                let home = self.homes.get(member).unwrap_or(member);
                let line =
                    std::iter::successors(Some(Actor::Number(*home)), |actor| parents.get(actor).copied());
                line.for_each(|actor| *inside.entry(actor).or_default() += 1);
            }
            for (actor, _) in inside.into_iter().filter(|(_, count)| *count < members.len()) {
                let other = self.enters.insert((actor, kind), first);
                let leaves = !matches!(kind, Kind::Memory | Kind::Actions) || self.own(actor, kind).is_none();
                if other.is_some() || !(leaves || self.own(actor, kind) == Some(first)) {
                    return Err(impossible(actor, kind, first));
                }
            }
        }
        Ok(())
    }

    /// What a task is to have in the end; stand-ins have no wishes.
    fn own(&self, actor: Actor, kind: Kind) -> Option<u32> {
        let Actor::Number(number) = actor else { return None };
        match self.homes.get(&number) {
            Some(process) => self.shares.thread(*process, number).map(|sharing| sharing.get(kind)),
            None => self.processes.get(&number).map(|process| self.shares.process(process.pid).get(kind)),
        }
    }

    /// What it is to be born with.
    fn at_birth(&self, actor: Actor, kind: Kind) -> Option<u32> {
        self.enters.get(&(actor, kind)).copied().or_else(|| self.own(actor, kind))
    }

    /// What it is to be born with and somebody has already.
    fn needs(&self, actor: Actor) -> Vec<(Kind, u32)> {
        let wanted = Kind::ALL.into_iter().filter_map(|kind| Some((kind, self.at_birth(actor, kind)?)));
        wanted.filter(|object| self.exists.contains(object)).collect()
    }

    fn is_born(&mut self, actor: Actor) {
        for kind in Kind::ALL {
            if let Some(object) = self.at_birth(actor, kind) {
                self.held.insert((actor, kind), object);
                self.exists.insert((kind, object));
            }
        }
    }

    fn is_thread(&self, actor: Actor) -> bool {
        matches!(actor, Actor::Number(number) if self.homes.contains_key(&number))
    }

    /// Bears these children, and the threads of their parent before.
    fn bear_all(&mut self, parent: Actor, children: Vec<Actor>) -> Result<()> {
        let threads = match parent {
            Actor::Number(number) => self.unborn.remove(&number).unwrap_or_default(),
            Actor::Nameless(_) => Vec::new(),
        };
        let shares = |child: &Actor| Kind::ALL.iter().any(|kind| self.enters.contains_key(&(*child, *kind)));
        let (sharing, others): (Vec<Actor>, Vec<Actor>) = children.into_iter().partition(shares);
        let mut midwives = vec![parent];
        if let Actor::Number(number) = parent {
            let tids = self.shares.threads(number).map(|(tid, _)| tid).filter(|tid| !threads.contains(tid));
            midwives.extend(tids.map(Actor::Number));
        }
        let mut waiting: Vec<Actor> = threads.into_iter().map(Actor::Number).chain(sharing).collect();
        while !waiting.is_empty() {
            match self.next(parent, &waiting, &midwives) {
                Some((index, birth)) => {
                    let child = waiting.remove(index);
                    self.bear(parent, child, birth);
                    midwives.push(child);
                }
                None => self.leave_for_these(parent, &waiting)?,
            }
        }
        others.into_iter().for_each(|child| self.bear(parent, child, Birth { by: parent, flags: 0 }));
        Ok(())
    }

    /// Whom to bear next: threads, who have nobody else to be borne by, and then who has most in common with those
    /// that are there, so that two that have a third in common are not both there before it.
    fn next(&self, parent: Actor, waiting: &[Actor], midwives: &[Actor]) -> Option<(usize, Birth)> {
        let mut best = None;
        for (index, child) in waiting.iter().enumerate() {
            let Some((count, birth)) = self.birth(parent, *child, midwives) else { continue };
            let rank = (self.is_thread(*child), count, Reverse(index));
            let entering = |kind: &&Kind| self.enters.contains_key(&(*child, **kind));
            let complete = count >= Kind::ALL.iter().filter(entering).count();
            if best.is_none_or(|(most, _)| rank > most) {
                best = Some((rank, birth));
            }
            if complete && best.is_some_and(|((thread, ..), _)| !thread) {
                return Some((index, birth));
            }
        }
        best.map(|((_, _, Reverse(index)), birth)| (index, birth))
    }

    /// By whom a child can be borne now, and how many objects it shares then.
    fn birth(&self, parent: Actor, child: Actor, midwives: &[Actor]) -> Option<(usize, Birth)> {
        let needs = self.needs(child);
        if Kind::ALL.into_iter().any(|kind| self.awaits(parent, child, kind)) {
            return None;
        }
        let has_all =
            |by: &Actor| needs.iter().all(|(kind, object)| self.held.get(&(*by, *kind)) == Some(object));
        let by = midwives.iter().copied().find(|by| self.may_bear(parent, *by, child) && has_all(by))?;
        let mut flags = needs.iter().fold(0, |flags, (kind, _)| flags | kind.flag());
        if self.is_thread(child) {
            flags |= (libc::CLONE_THREAD | libc::CLONE_SYSVSEM) as u64;
        } else if by != parent && !self.is_thread(by) {
            flags |= libc::CLONE_PARENT as u64;
        }
        Some((needs.len(), Birth { by, flags }))
    }

    /// Will the parent have this only later?
    fn awaits(&self, parent: Actor, child: Actor, kind: Kind) -> bool {
        let wanted = self.at_birth(child, kind);
        wanted.is_some()
            && wanted == self.own(parent, kind)
            && wanted != self.held.get(&(parent, kind)).copied()
    }

    /// A sibling passes its own exit signal on; a thread is only borne by its process.
    fn may_bear(&self, parent: Actor, by: Actor, child: Actor) -> bool {
        let exit_signal = |actor: Actor| match actor {
            Actor::Number(number) => self.processes.get(&number).map(|process| process.exit_signal),
            Actor::Nameless(_) => None,
        };
        let of_parent = by == parent || self.is_thread(by);
        of_parent
            || !self.is_thread(child) && exit_signal(by).is_some() && exit_signal(by) == exit_signal(child)
    }

    fn bear(&mut self, parent: Actor, child: Actor, birth: Birth) {
        self.is_born(child);
        self.steps.push(match (parent, child) {
            (Actor::Number(process), Actor::Number(tid)) if self.is_thread(child) => {
                Step::Spawn { process, tid, birth }
            }
            _ => Step::Bear { parent, child, birth },
        });
    }

    /// The parent takes what it is to have in the end, for the sake of those who share that.
    fn leave_for_these(&mut self, parent: Actor, waiting: &[Actor]) -> Result<()> {
        let awaited = |kind: &Kind| waiting.iter().any(|child| self.awaits(parent, *child, *kind));
        if let Some(kind) = Kind::OF_THREADS.into_iter().find(awaited) {
            self.leave(parent, kind);
            return Ok(());
        }
        let stuck = waiting.iter().find_map(|child| {
            let missing = |(kind, object): &(Kind, u32)| self.held.get(&(parent, *kind)) != Some(object);
            Some((*child, self.needs(*child).into_iter().find(missing)?))
        });
        let (child, (kind, first)) = stuck.unwrap_or((parent, (Kind::Memory, 0)));
        Err(impossible(child, kind, first))
    }

    fn leave(&mut self, process: Actor, kind: Kind) {
        let Some(own) = self.own(process, kind) else { return };
        let held = self.held.insert((process, kind), own);
        if held.is_some_and(|held| held != own) {
            self.exists.insert((kind, own));
            self.steps.push(Step::Unshare(process, kind.flag()));
        }
    }
}

fn impossible(actor: Actor, kind: Kind, first: u32) -> Error {
    let pid = match actor {
        Actor::Number(number) => Pid::from(number),
        Actor::Nameless(_) => Pid::from(first),
    };
    let reason = format!("it shares it with task {first} in a way that no order of clone(2) brings about");
    Error::new(ErrorKind::Unsupported, reason).of(pid).about(Subject::Attribute(kind.name()))
}

#[cfg(test)]
mod tests {
    use super::super::plan::Actor::Number;
    use super::super::sharing::Sharing;
    use super::super::tree::{Life, ProcessRecord, Tree};
    use super::*;

    const FILES: u64 = libc::CLONE_FILES as u64;
    const PLACES: u64 = libc::CLONE_FS as u64;
    const MEMORY: u64 = libc::CLONE_VM as u64;
    const SIBLING: u64 = libc::CLONE_PARENT as u64;

    /// Processes by their numbers and parents, all in one session.
    fn tree(processes: &[(u32, u32)]) -> Tree {
        let process = |(pid, parent): &(u32, u32)| ProcessRecord {
            pid: *pid,
            parent: *parent,
            group: 10,
            session: 10,
            exit_signal: 17,
            life: Life::Threads(vec![*pid]),
            name: Vec::new(),
        };
        Tree { processes: processes.iter().map(process).collect() }
    }

    /// Those who are named have what the first of them has.
    fn shares(groups: &[(Kind, &[u32])]) -> Shares {
        let mut processes: BTreeMap<u32, Sharing> = BTreeMap::new();
        for (kind, group) in groups {
            for pid in *group {
                processes.entry(*pid).or_insert(Sharing::alone(*pid)).set(*kind, group[0]);
            }
        }
        Shares::of(processes, BTreeMap::new())
    }

    /// The births, as child, by whom and how; and who leaves what.
    fn arranged(processes: &[(u32, u32)], shares: &Shares) -> Result<Vec<(u32, u32, u64)>> {
        let tree = tree(processes);
        let mut plan = tree.plan()?;
        arrange(&tree, &mut plan, shares)?;
        let steps = plan.steps.iter().filter_map(|step| match step {
            Step::Bear { child: Number(child), birth: Birth { by: Number(by), flags }, .. }
            | Step::Spawn { tid: child, birth: Birth { by: Number(by), flags }, .. } => {
                Some((*child, *by, *flags))
            }
            Step::Unshare(Number(who), flags) => Some((*who, *who, *flags)),
            _ => None,
        });
        Ok(steps.collect())
    }

    #[test]
    fn with_the_parent_and_with_siblings() {
        let tree = [(10, 1), (11, 10), (12, 10), (13, 10)];
        let shares = shares(&[(Kind::Memory, &[10, 13]), (Kind::Files, &[11, 12])]);
        let expected = [(13, 10, MEMORY), (11, 10, 0), (12, 11, FILES | SIBLING)];
        assert_eq!(arranged(&tree, &shares).unwrap(), expected);
    }

    /// 12 is between the two: 11 first would leave it without a midwife who has both.
    #[test]
    fn the_link_comes_before_the_ends() {
        let tree = [(10, 1), (11, 10), (12, 10), (13, 10)];
        let shares = shares(&[(Kind::Places, &[10, 12]), (Kind::Files, &[11, 12, 13])]);
        let expected = [(12, 10, PLACES), (11, 12, FILES | SIBLING), (13, 12, FILES | SIBLING)];
        assert_eq!(arranged(&tree, &shares).unwrap(), expected);
    }

    #[test]
    fn grandchildren_and_cousins() {
        let grandchild = shares(&[(Kind::Files, &[10, 12]), (Kind::Places, &[11, 13])]);
        let tree = [(10, 1), (11, 10), (12, 11), (13, 11)];
        // It has to leave its own parent's table before anybody can be born with its own.
        let expected = [(11, 10, FILES), (12, 11, FILES), (13, 11, PLACES), (11, 11, FILES)];
        assert_eq!(arranged(&tree, &grandchild).unwrap(), expected);
        let both = shares(&[(Kind::Files, &[10, 12]), (Kind::Files, &[11, 13])]);
        let expected = [(11, 10, FILES), (12, 11, FILES), (11, 11, FILES), (13, 11, FILES)];
        assert_eq!(arranged(&tree, &both).unwrap(), expected);
        let tree = [(10, 1), (11, 10), (12, 10), (13, 11), (14, 12)];
        let cousins = shares(&[(Kind::Files, &[13, 14])]);
        let expected = [
            (11, 10, 0),
            (12, 11, FILES | SIBLING),
            (13, 11, FILES),
            (14, 12, FILES),
            (11, 11, FILES),
            (12, 12, FILES),
        ];
        assert_eq!(arranged(&tree, &cousins).unwrap(), expected);
    }

    #[test]
    fn threads_come_before_the_children_of_their_process() {
        let mut tree = tree(&[(10, 1), (20, 10)]);
        tree.processes[0].life = Life::Threads(vec![10, 11, 12]);
        let own = |files| {
            let mut sharing = Sharing::alone(10);
            sharing.set(Kind::Files, files);
            sharing
        };
        let mut child = Sharing::alone(20);
        child.set(Kind::Files, 11);
        child.set(Kind::Places, 10);
        let threads = BTreeMap::from([((10, 11), own(11)), ((10, 12), own(11))]);
        let shares = Shares::of(BTreeMap::from([(20, child)]), threads);
        let mut plan = tree.plan().unwrap();
        arrange(&tree, &mut plan, &shares).unwrap();
        let births: Vec<(Actor, u64)> = plan
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::Bear { birth, .. } | Step::Spawn { birth, .. } => Some((birth.by, birth.flags)),
                _ => None,
            })
            .collect();
        let thread = (libc::CLONE_THREAD | libc::CLONE_SYSVSEM | libc::CLONE_VM | libc::CLONE_SIGHAND) as u64;
        let expected = [
            (Number(10), thread | PLACES),
            (Number(11), thread | FILES | PLACES),
            (Number(11), FILES | PLACES),
        ];
        assert_eq!(births, expected);
    }

    #[test]
    fn impossible_sharing() {
        let line = [(10, 1), (11, 10), (12, 11)];
        let fork = [(10, 1), (11, 10), (12, 11), (13, 11), (14, 10)];
        for (tree, shares) in [
            // Memory cannot be left behind.
            (&line[..], shares(&[(Kind::Memory, &[10, 12])])),
            // Two tables at once cannot pass through one birth.
            (&fork[..], shares(&[(Kind::Files, &[10, 12]), (Kind::Files, &[13, 14])])),
        ] {
            let error = arranged(tree, &shares).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.pid().is_some() && error.subject().is_some(), "{error}");
        }
        // The signal of a sibling's child is the sibling's.
        let mut tree = tree(&[(10, 1), (11, 10), (12, 10)]);
        tree.processes[2].exit_signal = 0;
        let mut plan = tree.plan().unwrap();
        assert!(arrange(&tree, &mut plan, &shares(&[(Kind::Memory, &[11, 12])])).is_err());
    }
}
