//! How a tree is made: who bears whom, and when, so that parents, sessions and groups come out as they were.
//!
//! A session is only entered by being born into it, and a process group only while it has a member. Where who
//! passed them on has gone, a *stand-in* takes its place: a task with the number of the missing leader, or with
//! any number, that bears the orphans and ends. The kernel hands them to the nearest ancestor that is a child
//! subreaper, and the one that is to have them is made the only one for that moment. (What tasks have in common
//! comes on top of it: see [`super::births`].)

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::tree::{ProcessRecord, Tree};
use crate::error::{Error, ErrorKind, Result, Subject};

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Actor {
    /// A process of the tree, or the stand-in for one that has gone.
    Number(u32),
    /// A stand-in that may have any number.
    Nameless(usize),
}

/// By which task, with which flags of clone(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Birth {
    pub(crate) by: Actor,
    pub(crate) flags: u64,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Bear {
        parent: Actor,
        child: Actor,
        birth: Birth,
    },
    /// A thread that differs from its process.
    Spawn {
        process: u32,
        tid: u32,
        birth: Birth,
    },
    /// unshare(2) with these flags.
    Unshare(Actor, u64),
    StartSession(Actor),
    JoinGroup(Actor, u32),
    /// A stand-in ends, and `parent` waits for it. Its children go to this ancestor.
    Retire {
        stand_in: Actor,
        parent: Actor,
        heir: Option<u32>,
    },
}

/// How a tree is made.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The session that the tree is in but does not lead.
    pub(crate) outer_session: Option<u32>,
    /// The same for a process group.
    pub(crate) outer_group: Option<u32>,
    pub(crate) steps: Vec<Step>,
    /// The numbers of leaders that have gone while their sessions or groups live on.
    pub(crate) stand_ins: BTreeSet<u32>,
}

/// Plans a tree that [`Tree::plan`] has found to be one.
pub(super) fn of<'t>(
    tree: &'t Tree,
    root: &'t ProcessRecord,
    known: BTreeMap<u32, &'t ProcessRecord>,
    tasks: &BTreeSet<u32>,
) -> Result<Plan> {
    let outer_session = (root.session != root.pid).then_some(root.session);
    let mut planner = Planner {
        tree,
        root,
        known,
        outer_session,
        outer_group: None,
        natural: BTreeMap::new(),
        orphans: BTreeMap::new(),
        group: BTreeMap::new(),
        steps: Vec::new(),
        retirements: Vec::new(),
        stand_ins: BTreeSet::new(),
        nameless: 0,
    };
    let groups = planner.groups()?;
    planner.births();
    planner.make_processes()?;
    planner.make_groups(&groups)?;
    if let Some(number) = planner.stand_ins.iter().find(|number| tasks.contains(number)) {
        let who = tree.processes.iter().find(|p| p.session == *number || p.group == *number);
        return Err(impossible(who.unwrap_or(root), "session", "its number is that of another task"));
    }
    let Planner { mut steps, retirements, outer_group, stand_ins, .. } = planner;
    steps.extend(retirements.into_iter().rev());
    Ok(Plan { outer_session, outer_group, steps, stand_ins })
}

/// Orphans of one session: by the ancestor that has them now.
type Orphans = BTreeMap<u32, Vec<u32>>;

struct Planner<'t> {
    tree: &'t Tree,
    root: &'t ProcessRecord,
    known: BTreeMap<u32, &'t ProcessRecord>,
    outer_session: Option<u32>,
    outer_group: Option<u32>,
    /// The children that a process bears itself; true for those that left its session behind because they were
    /// there before it started its own.
    natural: BTreeMap<u32, Vec<(u32, bool)>>,
    orphans: BTreeMap<u32, Orphans>,
    /// The group that each is in by now.
    group: BTreeMap<Actor, u32>,
    steps: Vec<Step>,
    retirements: Vec<Step>,
    stand_ins: BTreeSet<u32>,
    nameless: usize,
}

impl<'t> Planner<'t> {
    fn process(&self, pid: u32) -> Result<&'t ProcessRecord> {
        self.known.get(&pid).copied().ok_or_else(|| Error::new(ErrorKind::Image, "no such process"))
    }

    /// Checks the groups; those whose leaders have gone, with their sessions.
    fn groups(&mut self) -> Result<BTreeMap<u32, u32>> {
        let mut missing = BTreeMap::new();
        for process in &self.tree.processes {
            if process.session == process.pid && process.group != process.pid {
                return Err(
                    Error::new(ErrorKind::Image, "a session leader outside its group").of(process.pid())
                );
            }
            match self.known.get(&process.group) {
                Some(leader) if leader.session == process.session => {}
                Some(_) => {
                    return Err(impossible(
                        process,
                        "process group",
                        "its group's leader is in another session",
                    ));
                }
                None if Some(process.session) == self.outer_session
                    && self.outer_group.is_none_or(|group| group == process.group) =>
                {
                    self.outer_group = Some(process.group);
                }
                None if process.group == process.session => {}
                None => match missing.insert(process.group, process.session) {
                    Some(session) if session != process.session => {
                        return Err(impossible(process, "process group", "its group is in two sessions"));
                    }
                    _ => {}
                },
            }
        }
        Ok(missing)
    }

    /// Finds out who can have borne whom, and who must be an orphan.
    fn births(&mut self) {
        // The sessions that those who start one have to be born into, as far as their children's were theirs.
        let mut wanted: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for process in self.tree.processes.iter().rev() {
            let own = match process.session == process.pid {
                true => wanted.entry(process.pid).or_default().clone(),
                false => BTreeSet::from([process.session]),
            };
            let leader = |parent: &&&ProcessRecord| parent.session == parent.pid;
            if let Some(parent) = self.known.get(&process.parent).filter(leader) {
                let others = own.into_iter().filter(|session| *session != parent.pid);
                wanted.entry(parent.pid).or_default().extend(others);
            }
        }
        let mut born_into = BTreeMap::from([(self.root.pid, self.outer_session)]);
        for process in self.tree.processes.iter().skip(1) {
            let Some(parent) = self.known.get(&process.parent) else { continue };
            let before =
                (parent.session == parent.pid).then(|| born_into.get(&parent.pid).copied().flatten());
            let (now, before) = (parent.session, before.flatten());
            let session = if process.session != process.pid {
                process.session
            } else {
                let wanted = wanted.get(&process.pid);
                let wanted = |session: &u32| wanted.is_some_and(|wanted| wanted.contains(session));
                [Some(now), before].into_iter().flatten().find(wanted).unwrap_or(now)
            };
            born_into.insert(process.pid, Some(session));
            if session == now || Some(session) == before {
                let child = (process.pid, session != now);
                self.natural.entry(parent.pid).or_default().push(child);
            } else {
                let heirs = self.orphans.entry(session).or_default();
                heirs.entry(parent.pid).or_default().push(process.pid);
            }
        }
    }

    fn make_processes(&mut self) -> Result<()> {
        // Where the leader has gone, its stand-in goes below all heirs.
        let mut missing: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (session, heirs) in &self.orphans {
            if !self.known.contains_key(session) {
                let deepest = heirs.keys().copied().max_by_key(|heir| self.depth(*heir));
                deepest.into_iter().for_each(|heir| missing.entry(heir).or_default().push(*session));
            }
        }
        self.group.insert(Actor::Number(self.root.pid), self.outer_group.unwrap_or(0));
        let mut queue = VecDeque::from([self.root.pid]);
        let mut made = BTreeSet::new();
        while let Some(pid) = queue.pop_front() {
            made.insert(pid);
            let (actor, process) = (Actor::Number(pid), self.process(pid)?);
            let children = self.natural.remove(&pid).unwrap_or_default();
            let bear = |this: &mut Self, before_setsid: bool, queue: &mut VecDeque<u32>| {
                for (child, _) in children.iter().filter(|(_, before)| *before == before_setsid) {
                    this.bear(actor, Actor::Number(*child));
                    queue.push_back(*child);
                }
            };
            bear(self, true, &mut queue);
            if process.session == pid {
                self.start_session(pid);
            }
            bear(self, false, &mut queue);
            if let Some(heirs) = self.orphans.remove(&pid) {
                self.orphan(actor, pid, heirs, &mut queue)?;
            }
            for session in missing.remove(&pid).unwrap_or_default() {
                let mut heirs = self.orphans.remove(&session).unwrap_or_default();
                let leader = self.stand_in(actor, Actor::Number(session), Some(pid));
                self.start_session(session);
                for child in heirs.remove(&pid).unwrap_or_default() {
                    self.bear(leader, Actor::Number(child));
                    queue.push_back(child);
                }
                self.orphan(leader, pid, heirs, &mut queue)?;
            }
        }
        match self.tree.processes.iter().find(|process| !made.contains(&process.pid)) {
            Some(process) => Err(impossible(process, "session", NEVER_IN)),
            None => Ok(()),
        }
    }

    /// Makes children that `parent`, who is (below) `below`, could have borne, but that belong to its ancestors.
    fn orphan(&mut self, parent: Actor, below: u32, heirs: Orphans, queue: &mut VecDeque<u32>) -> Result<()> {
        for (heir, children) in heirs {
            let mut above = self.process(below)?.parent;
            while above != heir {
                match self.known.get(&above) {
                    Some(process) => above = process.parent,
                    None => {
                        let child = self.process(children.first().copied().unwrap_or(heir))?;
                        return Err(impossible(child, "session", NEVER_IN));
                    }
                }
            }
            let stand_in = Actor::Nameless(self.nameless);
            self.nameless += 1;
            self.stand_in(parent, stand_in, Some(heir));
            for child in children {
                self.bear(stand_in, Actor::Number(child));
                queue.push_back(child);
            }
        }
        Ok(())
    }

    fn make_groups(&mut self, missing: &BTreeMap<u32, u32>) -> Result<()> {
        for (group, session) in missing {
            let parent = match Some(*session) == self.outer_session {
                true => Actor::Number(self.root.pid),
                false => Actor::Number(*session),
            };
            if !self.group.contains_key(&parent) {
                let member = self.tree.processes.iter().find(|process| process.group == *group);
                return Err(impossible(member.unwrap_or(self.root), "process group", "its session has gone"));
            }
            let leader = self.stand_in(parent, Actor::Number(*group), None);
            self.join(leader, *group);
        }
        let wanted: BTreeSet<u32> = self.tree.processes.iter().map(|process| process.group).collect();
        // A process may have left the group that it has started.
        let (founders, others): (Vec<_>, Vec<_>) =
            self.tree.processes.iter().partition(|process| wanted.contains(&process.pid));
        founders.iter().for_each(|process| self.join(Actor::Number(process.pid), process.pid));
        for process in others.iter().chain(&founders) {
            self.join(Actor::Number(process.pid), process.group);
        }
        Ok(())
    }

    fn bear(&mut self, parent: Actor, child: Actor) {
        self.steps.push(Step::Bear { parent, child, birth: Birth { by: parent, flags: 0 } });
        let group = self.group.get(&parent).copied().unwrap_or(0);
        self.group.insert(child, group);
    }

    fn stand_in(&mut self, parent: Actor, stand_in: Actor, heir: Option<u32>) -> Actor {
        self.bear(parent, stand_in);
        self.retirements.push(Step::Retire { stand_in, parent, heir });
        if let Actor::Number(number) = stand_in {
            self.stand_ins.insert(number);
        }
        stand_in
    }

    fn start_session(&mut self, pid: u32) {
        self.steps.push(Step::StartSession(Actor::Number(pid)));
        self.group.insert(Actor::Number(pid), pid);
    }

    fn join(&mut self, who: Actor, group: u32) {
        if self.group.insert(who, group) != Some(group) {
            self.steps.push(Step::JoinGroup(who, group));
        }
    }

    fn depth(&self, pid: u32) -> usize {
        std::iter::successors(self.known.get(&pid), |process| self.known.get(&process.parent)).count()
    }
}

const NEVER_IN: &str = "it belongs to a session that its parent has never been in, and no orphan could be";

fn impossible(process: &ProcessRecord, what: &'static str, why: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, why).of(process.pid()).about(Subject::Attribute(what))
}

#[cfg(test)]
mod tests {
    use super::super::tree::{Life, ProcessRecord, Tree};
    use super::Actor::{Nameless, Number};
    use super::Step::*;
    use super::*;

    fn tree(processes: &[[u32; 4]]) -> Tree {
        let process = |[pid, parent, group, session]: &[u32; 4]| ProcessRecord {
            pid: *pid,
            parent: *parent,
            group: *group,
            session: *session,
            exit_signal: 17,
            life: Life::Threads(vec![*pid]),
            name: Vec::new(),
        };
        Tree { processes: processes.iter().map(process).collect() }
    }

    fn bear(parent: u32, child: u32) -> Step {
        bear_any(Number(parent), Number(child))
    }

    fn bear_any(parent: Actor, child: Actor) -> Step {
        Bear { parent, child, birth: Birth { by: parent, flags: 0 } }
    }

    #[test]
    fn born_before_the_session() {
        let plan =
            tree(&[[10, 1, 10, 5], [11, 10, 11, 11], [12, 11, 10, 5], [13, 11, 11, 11]]).plan().unwrap();
        assert_eq!(plan.outer_session, Some(5));
        let steps = [
            bear(10, 11),
            bear(11, 12),
            StartSession(Number(11)),
            bear(11, 13),
            JoinGroup(Number(10), 10),
            JoinGroup(Number(12), 10),
        ];
        assert_eq!(plan.steps, steps);
    }

    /// The leader of session 20 has ended; its orphans are at the subreaper.
    #[test]
    fn session_without_leader() {
        let plan = tree(&[[10, 1, 10, 10], [21, 10, 20, 20], [22, 10, 22, 20]]).plan().unwrap();
        let steps = [
            StartSession(Number(10)),
            bear(10, 20),
            StartSession(Number(20)),
            bear(20, 21),
            bear(20, 22),
            JoinGroup(Number(22), 22),
            Retire { stand_in: Number(20), parent: Number(10), heir: Some(10) },
        ];
        assert_eq!(plan.steps, steps);
        assert_eq!(plan.stand_ins, BTreeSet::from([20]));
    }

    /// A child of a session's living leader has been orphaned.
    #[test]
    fn orphan_of_a_living_session() {
        let plan = tree(&[[10, 1, 10, 10], [30, 10, 20, 20], [20, 10, 20, 20]]).plan().unwrap();
        let steps = [
            StartSession(Number(10)),
            bear(10, 20),
            StartSession(Number(20)),
            bear_any(Number(20), Nameless(0)),
            bear_any(Nameless(0), Number(30)),
            Retire { stand_in: Nameless(0), parent: Number(20), heir: Some(10) },
        ];
        assert_eq!(plan.steps, steps);
    }

    #[test]
    fn group_without_leader() {
        let plan =
            tree(&[[10, 1, 10, 10], [12, 10, 11, 10], [13, 10, 14, 10], [14, 10, 10, 10]]).plan().unwrap();
        let steps = [
            StartSession(Number(10)),
            bear(10, 12),
            bear(10, 13),
            bear(10, 14),
            bear(10, 11),
            JoinGroup(Number(11), 11),
            JoinGroup(Number(14), 14),
            JoinGroup(Number(12), 11),
            JoinGroup(Number(13), 14),
            JoinGroup(Number(14), 10),
            Retire { stand_in: Number(11), parent: Number(10), heir: None },
        ];
        assert_eq!(plan.steps, steps);
    }

    #[test]
    fn impossible_families() {
        // The heir is no ancestor of the session's leader, two heirs side by side, a circle.
        for processes in [
            &[[10, 1, 10, 10], [11, 10, 11, 11], [12, 11, 20, 20], [20, 10, 20, 20]][..],
            &[[10, 1, 10, 10], [11, 10, 11, 11], [12, 10, 12, 12], [13, 11, 20, 20], [14, 12, 20, 20]],
            &[[10, 1, 10, 10], [11, 10, 12, 12], [12, 11, 12, 12]],
        ] {
            assert_eq!(tree(processes).plan().unwrap_err().kind(), ErrorKind::Unsupported, "{processes:?}");
        }
    }
}
