//! Which tasks have one kernel object in common: an address space (CLONE_VM), signal actions (CLONE_SIGHAND), an fd
//! table (CLONE_FILES), or working directory, root and umask (CLONE_FS).
//!
//! Processes have one of their own each, and the threads of a process share them, unless they say otherwise: by
//! clone(2) for processes, by unshare(2) for the last two of a thread. kcmp(2) tells, and puts all tasks into an
//! order in which those that share are neighbours.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use super::tree::Tree;
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Result};
use crate::freeze::{Frozen, Process, Thread};
use crate::image::{Decode, Encode, Image, Owner, Record, Records, Tag};
use crate::parallel;
use crate::resource::Report;
use crate::sys::{Compare, kcmp};

/// A kind of object that tasks can share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Memory,
    Actions,
    Files,
    Places,
}

impl Kind {
    pub(crate) const ALL: [Kind; 4] = [Kind::Memory, Kind::Actions, Kind::Files, Kind::Places];
    /// What a single task can leave by unshare(2).
    pub(crate) const OF_THREADS: [Kind; 2] = [Kind::Files, Kind::Places];

    /// The flag of clone(2), and of unshare(2).
    pub(crate) fn flag(self) -> u64 {
        let flag = match self {
            Kind::Memory => libc::CLONE_VM,
            Kind::Actions => libc::CLONE_SIGHAND,
            Kind::Files => libc::CLONE_FILES,
            Kind::Places => libc::CLONE_FS,
        };
        flag as u64
    }

    fn compare(self) -> Compare {
        match self {
            Kind::Memory => Compare::Vm,
            Kind::Actions => Compare::Sighand,
            Kind::Files => Compare::Files,
            Kind::Places => Compare::Fs,
        }
    }

    /// What a refusal calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Memory => "shared address space (CLONE_VM)",
            Kind::Actions => "shared signal actions (CLONE_SIGHAND)",
            Kind::Files => "shared fd table (CLONE_FILES)",
            Kind::Places => "shared working directory (CLONE_FS)",
        }
    }
}

/// What a task has, by the number of the first task that has it, whose records are those of all. A process goes by
/// its pid, a thread that differs from its process by its tid.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sharing {
    memory: u32,
    actions: u32,
    files: u32,
    places: u32,
}

impl Record for Sharing {
    const TAG: Tag = Tag::new(b"SHAR");
    const VERSION: u16 = 1;
    const NAME: &'static str = "sharing between tasks";
}

impl Sharing {
    /// Of a process that shares nothing.
    pub(crate) fn alone(pid: u32) -> Self {
        Self { memory: pid, actions: pid, files: pid, places: pid }
    }

    pub(crate) fn get(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Memory => self.memory,
            Kind::Actions => self.actions,
            Kind::Files => self.files,
            Kind::Places => self.places,
        }
    }

    pub(crate) fn set(&mut self, kind: Kind, first: u32) {
        match kind {
            Kind::Memory => self.memory = first,
            Kind::Actions => self.actions = first,
            Kind::Files => self.files = first,
            Kind::Places => self.places = first,
        }
    }
}

/// All that is shared, or not, otherwise than usual.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    processes: BTreeMap<u32, Sharing>,
    /// The threads that differ from their processes, by the numbers of both.
    threads: BTreeMap<(u32, u32), Sharing>,
}

impl Shares {
    /// Asks the kernel about a stopped tree. Refuses what it shares with others.
    pub(crate) fn find(frozen: &Frozen, report: &mut Report) -> Result<Self> {
        let mut shares = Self::default();
        let processes: Vec<Seat> = frozen.processes.iter().map(Seat::of).collect();
        let memory = Sorted::of(Kind::Memory, processes.clone())?;
        for group in memory.groups()? {
            shares.put(Kind::Memory, &group);
            // Only who shares memory can share these.
            let actions = Sorted::of(Kind::Actions, group)?;
            actions.groups()?.iter().for_each(|group| shares.put(Kind::Actions, group));
        }
        let (mut own, mut all) = (BTreeSet::new(), vec![memory]);
        for kind in Kind::OF_THREADS {
            let threads = own_seats(frozen, kind)?;
            threads.iter().for_each(|seat| shares.put(kind, &[*seat]));
            own.extend(threads.iter().map(|seat| (kind, seat.number)));
            let sorted = Sorted::of(kind, processes.iter().chain(&threads).copied().collect())?;
            sorted.groups()?.iter().for_each(|group| shares.put(kind, group));
            all.push(sorted);
        }
        for other in &frozen.others {
            for (sorted, seat) in all.iter().filter_map(|sorted| Some((sorted, sorted.find(*other)?))) {
                let reason = format!("process {other} outside of the tree shares it");
                report.attribute(seat.tid, sorted.kind.name(), reason);
            }
        }
        for ((process, tid), sharing) in &mut shares.threads {
            let of_process = shares.processes.get(process).copied().unwrap_or(Sharing::alone(*process));
            let follows = Kind::ALL.into_iter().filter(|kind| !own.contains(&(*kind, *tid)));
            follows.for_each(|kind| sharing.set(kind, of_process.get(kind)));
        }
        Ok(shares)
    }

    /// These have one of this kind.
    fn put(&mut self, kind: Kind, group: &[Seat]) {
        let Some(first) = group.first().map(|seat| seat.number) else { return };
        for seat in group {
            let alone = Sharing::alone(seat.process);
            let sharing = match seat.number == seat.process {
                true => self.processes.entry(seat.process).or_insert(alone),
                false => self.threads.entry((seat.process, seat.number)).or_insert(alone),
            };
            sharing.set(kind, first);
        }
    }

    #[cfg(test)]
    pub(super) fn of(processes: BTreeMap<u32, Sharing>, threads: BTreeMap<(u32, u32), Sharing>) -> Self {
        Self { processes, threads }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.processes.is_empty() && self.threads.is_empty()
    }

    pub(crate) fn process(&self, pid: u32) -> Sharing {
        self.processes.get(&pid).copied().unwrap_or(Sharing::alone(pid))
    }

    /// Of a thread that differs from its process.
    pub(crate) fn thread(&self, process: u32, tid: u32) -> Option<Sharing> {
        self.threads.get(&(process, tid)).copied()
    }

    /// The threads of a process that differ from it.
    pub(crate) fn threads(&self, process: u32) -> impl Iterator<Item = (u32, Sharing)> + '_ {
        let range = (process, 0)..=(process, u32::MAX);
        self.threads.range(range).map(|((_, tid), sharing)| (*tid, *sharing))
    }

    /// The threads of a stopped process that can have something of their own, the first one for all others.
    pub(crate) fn seats<'s>(&'s self, process: &'s Process) -> impl Iterator<Item = (Pid, Sharing)> + 's {
        let threads =
            process.threads.iter().skip(1).filter_map(|thread| {
                Some((thread.tid(), self.thread(process.number, thread.tracee.number())?))
            });
        std::iter::once((process.speaker(), self.process(process.number))).chain(threads)
    }

    /// One task for each fd table that this process is the first to have.
    pub(crate) fn tables<'s>(&'s self, process: &'s Process) -> impl Iterator<Item = Pid> + 's {
        let is_first =
            |(tid, sharing): &(Pid, Sharing)| sharing.get(Kind::Files) == process.owner_for(*tid).0;
        self.seats(process).filter(is_first).map(|(tid, _)| tid)
    }

    /// The tasks (as process and number) that share at least one object in another way than usual.
    pub(crate) fn all(&self) -> impl Iterator<Item = ((u32, u32), Sharing)> + '_ {
        let processes = self.processes.iter().map(|(pid, sharing)| ((*pid, *pid), *sharing));
        processes.chain(self.threads.iter().map(|(task, sharing)| (*task, *sharing)))
    }

    pub(crate) fn write(&self, records: &mut Records) -> Result<()> {
        self.all().try_for_each(|((_, number), sharing)| records.put(Owner(number), &sharing))
    }

    /// Reads and checks those of an image.
    pub(crate) fn load(image: &Image, tree: &Tree) -> Result<Self> {
        let mut processes: BTreeMap<u32, u32> = BTreeMap::new();
        for record in &tree.processes {
            let living = !record.threads().is_empty();
            let tasks = record.threads().iter().copied().chain(living.then_some(record.pid));
            processes.extend(tasks.map(|tid| (tid, record.pid)));
        }
        let mut shares = Self::default();
        for owner in image.owners::<Sharing>() {
            let sharing: Sharing = image.require(owner)?;
            match processes.get(&owner.0) {
                Some(process) if *process == owner.0 => drop(shares.processes.insert(owner.0, sharing)),
                Some(process) => drop(shares.threads.insert((*process, owner.0), sharing)),
                None => return Err(bad("a task that is not there shares something").of(Pid::from(owner.0))),
            }
        }
        shares.check(&processes)?;
        Ok(shares)
    }

    /// Those that are named have what they are named for, and what goes together goes together.
    fn check(&self, processes: &BTreeMap<u32, u32>) -> Result<()> {
        for ((process, number), sharing) in self.all() {
            let image = |why| Err(bad(why).of(Pid::from(number)));
            for kind in Kind::ALL {
                let first = sharing.get(kind);
                let named = match processes.get(&first) {
                    Some(home) if *home == first => Some(self.process(first)),
                    Some(home) if Kind::OF_THREADS.contains(&kind) => self.thread(*home, first),
                    _ => None,
                };
                if named.is_none_or(|named| named.get(kind) != first) {
                    return image("it shares with a task that has nothing to share");
                }
                if !Kind::OF_THREADS.contains(&kind) && first != self.process(process).get(kind) {
                    return image("a thread with memory of its own");
                }
            }
            if self.process(sharing.actions).memory != sharing.memory {
                return image("shared signal actions without shared memory");
            }
        }
        Ok(())
    }
}

fn bad(why: &'static str) -> Error {
    Error::new(ErrorKind::Image, why)
}

/// A process, or a thread that has something of its own.
#[derive(Clone, Copy)]
struct Seat {
    process: u32,
    number: u32,
    /// The task that is asked for it.
    tid: Pid,
}

impl Seat {
    fn of(process: &Process) -> Self {
        let number = process.number;
        Self { process: number, number, tid: process.speaker() }
    }
}

/// Seats in kcmp(2)'s order: those that have an object of this kind in common are neighbours, the first comes first.
struct Sorted {
    kind: Kind,
    seats: Vec<Seat>,
}

impl Sorted {
    fn of(kind: Kind, mut seats: Vec<Seat>) -> Result<Self> {
        let mut failed = None;
        // The sort is stable.
        seats.sort_by(|a, b| {
            kcmp(a.tid, b.tid, kind.compare()).unwrap_or_else(|errno| {
                failed = Some(errno);
                Ordering::Equal
            })
        });
        failed.map_or(Ok(Self { kind, seats }), Err).call("kcmp")
    }

    /// Those of at least two.
    fn groups(&self) -> Result<Vec<Vec<Seat>>> {
        let mut failed = None;
        let groups = self.seats.chunk_by(|a, b| {
            let order = kcmp(a.tid, b.tid, self.kind.compare());
            order.unwrap_or_else(|errno| {
                failed = Some(errno);
                Ordering::Equal
            }) == Ordering::Equal
        });
        let groups = groups.filter(|group| group.len() > 1).map(<[Seat]>::to_vec).collect();
        failed.map_or(Ok(groups), Err).call("kcmp")
    }

    /// Who has this process's object, as far as that can be seen.
    fn find(&self, pid: Pid) -> Option<Seat> {
        let mut seen = true;
        let found = self.seats.binary_search_by(|seat| {
            kcmp(seat.tid, pid, self.kind.compare()).unwrap_or_else(|_| {
                seen = false;
                Ordering::Less
            })
        });
        found.ok().filter(|_| seen).and_then(|index| self.seats.get(index)).copied()
    }
}

/// The threads that do not have what the first of their process has.
fn own_seats(frozen: &Frozen, kind: Kind) -> Result<Vec<Seat>> {
    /// For less, another thread of ours is not worth its while.
    const FEW: usize = 200;
    let mut own = Vec::new();
    for process in &frozen.processes {
        let Some((first, others)) = process.threads.split_first() else { continue };
        let order =
            |thread: &Thread| kcmp(first.tid(), thread.tid(), kind.compare()).call("kcmp").of(thread.tid());
        for (thread, order) in others.iter().zip(parallel::map(others, FEW, order)?) {
            if order != Ordering::Equal {
                own.push(Seat { tid: thread.tid(), number: thread.tracee.number(), ..Seat::of(process) });
            }
        }
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Processes 10 and 20, and a thread of the first.
    fn check(processes: &[(u32, [u32; 4])], threads: &[((u32, u32), [u32; 4])]) -> Result<()> {
        let sharing = |[memory, actions, files, places]: [u32; 4]| Sharing { memory, actions, files, places };
        let processes = processes.iter().map(|(pid, all)| (*pid, sharing(*all))).collect();
        let threads = threads.iter().map(|(task, all)| (*task, sharing(*all))).collect();
        Shares::of(processes, threads).check(&BTreeMap::from([(10, 10), (11, 10), (20, 20)]))
    }

    #[test]
    fn what_goes_together() {
        check(&[(20, [10, 10, 20, 10])], &[]).unwrap();
        check(&[(20, [20, 20, 11, 10])], &[((10, 11), [10, 10, 11, 10])]).unwrap();
    }

    #[test]
    fn hostile_sharing() {
        // With nobody, with a thread that has nothing of its own, with somebody who has another's.
        check(&[(20, [20, 20, 30, 20])], &[]).unwrap_err();
        check(&[(20, [20, 20, 11, 20])], &[]).unwrap_err();
        check(&[(20, [20, 20, 11, 20])], &[((10, 11), [10, 10, 10, 11])]).unwrap_err();
        check(&[(10, [20, 10, 10, 10]), (20, [10, 20, 20, 20])], &[]).unwrap_err();
        // Actions without memory, memory of a thread.
        check(&[(20, [20, 10, 20, 20])], &[]).unwrap_err();
        check(&[], &[((10, 11), [11, 10, 10, 10])]).unwrap_err();
        check(&[(10, [11, 10, 10, 10])], &[((10, 11), [11, 10, 11, 10])]).unwrap_err();
    }
}
