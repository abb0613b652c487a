//! The whole image, decoded and checked.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;

use super::OuterSession;
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Image, Owner};
use crate::resource::fds::{Description, FdTable, FileOwner, Places, Watches};
use crate::resource::memory::{self, AddressSpace, Inheritance, Legacy, Run, SharedPlan, Workshop};
use crate::resource::signals::pending::Continue;
use crate::resource::sockets::Pairs;
use crate::resource::tasks::births;
use crate::resource::tasks::blocked::Blocked;
use crate::resource::tasks::caller::Caller;
use crate::resource::tasks::cgroup::Membership;
use crate::resource::tasks::dead_leader::DeadLeader;
use crate::resource::tasks::job_stop::JobStop;
use crate::resource::tasks::login::LoginUser;
use crate::resource::tasks::pids::Pids;
use crate::resource::tasks::plan::Plan;
use crate::resource::tasks::registers::Registers;
use crate::resource::tasks::sharing::{Kind, Shares, Sharing};
use crate::resource::tasks::tree::{Life, Tree};
use crate::resource::{Rebuild, STATES, Scope, Stage, refuse_unknown};

/// One process, decoded and checked.
pub(super) struct ProcessPlan {
    /// The first process that has its address space.
    pub(super) memory: u32,
    /// Unless it is that of another process.
    pub(super) space: Option<AddressSpace>,
    /// Of the leader, and of the threads that have something of their own.
    pub(super) seats: BTreeMap<u32, Seat>,
    pub(super) states: StatesOf,
    pub(super) cgroups: Membership,
    pub(super) login: Option<LoginUser>,
    pub(super) continues: Vec<Continue>,
    /// The leader, if it has ended, and what it does all the same until then.
    pub(super) dead_leader: Option<(DeadLeader, StatesOf)>,
    /// Unless its parent is outside of the tree.
    pub(super) stop: Option<JobStop>,
    pub(super) threads: BTreeMap<u32, ThreadPlan>,
}

/// What a task may have for itself, or share; None: it is in the records of another one.
pub(super) struct Seat {
    pub(super) places: Option<Places>,
    pub(super) table: Option<FdTable>,
}

/// The states of one task, in the order of the registration list.
pub(super) type StatesOf = Vec<(Stage, Box<dyn Rebuild>)>;

pub(super) struct ThreadPlan {
    pub(super) states: StatesOf,
    pub(super) registers: Registers,
    pub(super) blocked: Option<Blocked>,
}

/// The whole image, decoded and checked: nothing in it is looked up again.
pub(super) struct Blueprint {
    /// With the process 1 that has to be made for it, if one has to be.
    pub(super) tree: Tree,
    /// The number of the image's own root.
    pub(super) root: u32,
    pub(super) plan: Plan,
    pub(super) processes: BTreeMap<u32, ProcessPlan>,
    pub(super) shared: SharedPlan,
    pub(super) lineage: Lineage,
    /// By the open file description of the epoll instance.
    pub(super) watches: BTreeMap<u32, Watches>,
    pub(super) file_owners: Vec<FileOwner>,
    pub(super) pairs: Pairs,
    pub(super) workshop: Workshop,
    pub(super) channel_number: i32,
}

/// Who keeps what of the memory that it is born with.
pub(super) struct Lineage {
    pub(super) inheritances: BTreeMap<u32, Inheritance>,
    /// Of those who pass it on.
    pub(super) legacies: BTreeMap<u32, Legacy>,
}

impl Lineage {
    pub(super) fn of(
        plan: &Plan,
        tree: &Tree,
        processes: &BTreeMap<u32, ProcessPlan>,
        shares: &Shares,
    ) -> Self {
        let (mut inheritances, mut legacies) = (BTreeMap::new(), BTreeMap::<u32, Legacy>::new());
        let space = |pid| processes.get(&pid).and_then(|process| process.space.as_ref());
        for (child, donor) in plan.donors(tree, |pid| shares.process(pid).get(Kind::Memory)) {
            let (Some(of_child), Some(of_donor)) = (space(child), space(donor)) else { continue };
            let inheritance = Inheritance::of(of_child, of_donor);
            if !inheritance.is_empty() {
                legacies.entry(donor).or_default().add(&inheritance);
                inheritances.insert(child, inheritance);
            }
        }
        Self { inheritances, legacies }
    }

    pub(super) fn is_donor(&self, number: u32) -> bool {
        self.legacies.contains_key(&number)
    }

    /// The runs that a process has to be given: before it has children, and when all have been born.
    pub(super) fn missing(&self, number: u32, space: &AddressSpace) -> (Vec<Run>, Vec<Run>) {
        let inheritance = self.inheritances.get(&number);
        let missing = inheritance.map_or_else(|| space.runs.clone(), |kept| kept.missing(&space.runs));
        match self.legacies.get(&number) {
            Some(legacy) => legacy.divide(&missing, space),
            None => (Vec::new(), missing),
        }
    }
}

impl Blueprint {
    pub(super) fn load(image: &Image, pids: &Pids, session: OuterSession) -> Result<Self> {
        image.require_tree()?;
        refuse_unknown(image)?;
        let mut tree: Tree = image.require(Owner::IMAGE)?;
        let root = tree.root()?.pid;
        if matches!(pids, Pids::NewNamespace) && root != 1 {
            tree.below_init(session == OuterSession::Inherit);
        }
        let mut plan = tree.plan()?;
        let shares = Shares::load(image, &tree)?;
        births::arrange(&tree, &mut plan, &shares).map_err(|error| error.with_kind(ErrorKind::Image))?;
        let mut processes = BTreeMap::new();
        for record in tree
            .processes
            .iter()
            .filter(|record| record.life != Life::Zombie(0) && !record.threads().is_empty())
            .skip(usize::from(tree.root()?.pid != root))
        {
            let process =
                ProcessPlan::load(image, record.pid(), record.threads(), &shares).of(record.pid())?;
            processes.insert(record.pid, process);
        }
        let mut shared = SharedPlan::load(image)?;
        let spaces = || processes.values().filter_map(|process: &ProcessPlan| process.space.as_ref());
        let workshop = Workshop::find(spaces(), shared.len)?;
        spaces().try_for_each(|space| shared.check(space, &workshop))?;
        let tables: BTreeMap<u32, &FdTable> = tables(&processes).collect();
        let descriptions = image.owners::<Description>().map(|owner| owner.0).collect();
        tables.values().try_for_each(|table| table.check_references(&descriptions))?;
        let slot = |table: u32, fd| tables.get(&table)?.slot(fd).map(|slot| slot.description);
        let watches = Watches::load(image, slot)?;
        let file_owners = FileOwner::load(image, &tree, slot)?;
        let pairs = Pairs::load(image, |number| processes.contains_key(&number))?;
        let channel_number = lowest_unused(tables.values(), &watches);
        let lineage = Lineage::of(&plan, &tree, &processes, &shares);
        Ok(Self {
            tree,
            root,
            plan,
            processes,
            shared,
            lineage,
            watches,
            file_owners,
            pairs,
            workshop,
            channel_number,
        })
    }
}

impl Blueprint {
    /// Can tasks that the caller makes become what these were?
    pub(super) fn check(&self, caller: &Caller) -> Result<()> {
        for (number, process) in &self.processes {
            let of_threads = process.threads.values().flat_map(|thread| &thread.states);
            let mut states = process.states.iter().chain(of_threads);
            states.try_for_each(|(_, state)| state.check(caller)).of(Pid::from(*number))?;
        }
        Ok(())
    }

    /// Bytes of memory that are put in place.
    pub(super) fn bytes(&self) -> u64 {
        let spaces = self.processes.values().filter_map(|process| process.space.as_ref());
        let private = spaces.flat_map(|space| &space.runs).map(|run| run.len);
        let inherited: u64 = self.lineage.inheritances.values().map(Inheritance::bytes).sum();
        private.sum::<u64>() - inherited + self.shared.bytes()
    }
}

impl Blueprint {
    /// The highest that a table ever needs.
    pub(super) fn highest_number(&self, number: u32, table: &FdTable) -> RawFd {
        let watches = self.watches.values().filter(|watches| watches.table() == number);
        let numbers = watches.flat_map(Watches::numbers).chain(table.highest());
        numbers.chain([self.channel_number]).max().unwrap_or(0)
    }

    /// The address space of a process, whoever has its record.
    pub(super) fn space(&self, process: &ProcessPlan) -> Result<&AddressSpace> {
        let owner = self.processes.get(&process.memory);
        let space = owner.and_then(|owner| owner.space.as_ref());
        space.ok_or_else(|| Error::new(ErrorKind::Image, "its memory is not there"))
    }

    pub(super) fn suspends_seccomp(&self) -> bool {
        let of_threads = |process: &ProcessPlan| {
            process
                .threads
                .values()
                .flat_map(|thread| &thread.states)
                .any(|(_, state)| state.suspends_seccomp())
        };
        self.processes.values().any(|process| {
            of_threads(process) || process.states.iter().any(|(_, state)| state.suspends_seccomp())
        })
    }
}

/// All fd tables, by the first task that has them.
pub(super) fn tables(processes: &BTreeMap<u32, ProcessPlan>) -> impl Iterator<Item = (u32, &FdTable)> {
    let seats = processes.values().flat_map(|process| &process.seats);
    seats.filter_map(|(number, seat)| Some((*number, seat.table.as_ref()?)))
}

/// A number that no process uses, so that the way in does not stand in the way.
pub(super) fn lowest_unused<'t>(
    tables: impl Iterator<Item = &'t &'t FdTable>,
    watches: &BTreeMap<u32, Watches>,
) -> i32 {
    let open = tables.flat_map(|table| table.slots.iter().map(|slot| slot.fd));
    let used: BTreeSet<i32> = open.chain(watches.values().flat_map(Watches::numbers)).collect();
    (0..i32::MAX).find(|number| !used.contains(number)).unwrap_or(0)
}

pub(super) fn load_states(image: &Image, scope: Scope, owner: Pid) -> Result<StatesOf> {
    let mut states = Vec::new();
    for registration in STATES.iter().filter(|registration| registration.scope == scope) {
        if let Some(state) = (registration.load)(image, Owner(owner.get()))? {
            states.push((registration.stage, state));
        }
    }
    Ok(states)
}

impl ProcessPlan {
    pub(super) fn load(image: &Image, pid: Pid, tids: &[u32], shares: &Shares) -> Result<Self> {
        let owner = Owner(pid.get());
        let sharing = shares.process(pid.get());
        let mut seats = BTreeMap::new();
        for (number, sharing) in std::iter::once((pid.get(), sharing)).chain(shares.threads(pid.get())) {
            seats.insert(number, Seat::load(image, number, sharing).of(Pid::from(number))?);
        }
        let memory = sharing.get(Kind::Memory);
        let stop: Option<JobStop> = image.get(owner)?;
        stop.map_or(Ok(()), JobStop::check)?;
        let mut threads = BTreeMap::new();
        for tid in tids {
            threads.insert(*tid, ThreadPlan::load(image, Pid::from(*tid)).of(Pid::from(*tid))?);
        }
        Ok(Self {
            memory,
            space: (memory == pid.get()).then(|| memory::load(image, pid)).transpose()?,
            seats,
            states: load_states(image, Scope::Process, pid)?,
            cgroups: image.require(owner)?,
            login: image.get(owner)?,
            continues: Continue::load(image, pid, tids)?,
            dead_leader: dead_leader(image, pid, tids)?,
            stop,
            threads,
        })
    }
}

impl Seat {
    pub(super) fn load(image: &Image, number: u32, sharing: Sharing) -> Result<Self> {
        let owner = |kind| (sharing.get(kind) == number).then_some(Owner(number));
        let table: Option<FdTable> = owner(Kind::Files).map(|owner| image.require(owner)).transpose()?;
        table.iter().try_for_each(FdTable::check)?;
        let places = owner(Kind::Places).map(|owner| image.require(owner)).transpose()?;
        Ok(Self { places, table })
    }
}

/// It has the identity of the others: all that still shows of it.
pub(super) fn dead_leader(image: &Image, pid: Pid, tids: &[u32]) -> Result<Option<(DeadLeader, StatesOf)>> {
    match tids.first() {
        Some(first) if *first != pid.get() => {
            let mut states = load_states(image, Scope::Thread, Pid::from(*first))?;
            states.retain(|(stage, _)| *stage == Stage::Identity);
            Ok(Some((image.require(Owner(pid.get()))?, states)))
        }
        _ => Ok(None),
    }
}

impl ThreadPlan {
    pub(super) fn load(image: &Image, tid: Pid) -> Result<Self> {
        let owner = Owner(tid.get());
        Ok(Self {
            states: load_states(image, Scope::Thread, tid)?,
            registers: image.require(owner)?,
            blocked: image.get(owner)?,
        })
    }
}
