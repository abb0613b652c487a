//! fd tables, and finding out which slots share one open file description.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd, RawFd};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::makedev;

use super::locks::{self, TableLock};
use super::path::TMPFILE;
use super::{
    Channel, Chosen, Description, DescriptionLocks, DevicePaths, External, FileOwner, FileRef,
    FileValidation, Ghosts, Glance, Handlers, KINDS, KindRegistration, LinkRemap, OuterPipes, Polled, Probe,
    epoll, external, handles, pipe, unsupported,
};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::freeze::{Frozen, Process};
use crate::image::{Bytes, Decode, Encode, Owner, Record, Records, Tag};
use crate::proc::{fdinfo, nameless};
use crate::resource::Report;
use crate::resource::sockets::Sockets;
use crate::resource::tasks::tree::Tree;
use crate::sys;
use crate::tracee::{Batch, sys as call};

/// One open descriptor.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) fd: i32,
    pub(crate) close_on_exec: bool,
    /// The owner of the sections of its open file description.
    pub(crate) description: u32,
}

/// The open descriptors of one process, in ascending order.
#[derive(Encode, Decode, Debug, Default)]
pub(crate) struct FdTable {
    pub(crate) slots: Vec<Slot>,
    pub(crate) locks: Vec<TableLock>,
}

impl Record for FdTable {
    const TAG: Tag = Tag::new(b"FDTB");
    const VERSION: u16 = 1;
    const NAME: &'static str = "fd table";
}

/// What descriptions are sorted by before kcmp(2) has to be asked.
type Key = (u64, u64, u64, i32);

/// Where a description is found: one slot of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// The number of the table.
    pub(super) table: u32,
    pub(super) pid: Pid,
    pub(super) is_leader: bool,
    pub(super) fd: RawFd,
}

/// Checkpoint: the descriptions found so far, in all tables.
#[derive(Default)]
pub(crate) struct Collector {
    pub(crate) ghosts: Ghosts,
    pub(super) policy: FilePolicy,
    /// Descriptions with a lease, as long as the process that took it has not been seen.
    leases: BTreeMap<u32, Refusal>,
    /// By number, from 1.
    found: Vec<Found>,
    /// Their numbers, in the order that kcmp(2) gives.
    sorted: BTreeMap<Key, Vec<u32>>,
    /// The descriptions of all slots.
    slots: BTreeMap<(Pid, RawFd), u32>,
    /// The tree's tasks, and those of its groups that are its own: by their numbers here, with those that it knows.
    tasks: BTreeMap<Pid, u32>,
    groups: BTreeMap<u32, u32>,
    /// Those of the tasks that are processes, and alive.
    processes: BTreeSet<Pid>,
    /// By device and inode.
    pub(super) pipes: BTreeMap<(u64, u64), pipe::Seen>,
    pub(super) epolls: Vec<epoll::Seen>,
    pub(super) watched: handles::Watched,
    pub(crate) sockets: Sockets,
}

/// A description, by the first slot that refers to it.
#[derive(Clone, Copy)]
struct Found {
    place: Place,
    polled: Polled,
}

/// What a checkpoint does about files that need a decision.
#[derive(Clone, Debug)]
pub(crate) struct FilePolicy {
    /// How many bytes of data an unlinked file may have.
    pub(crate) ghost_limit: u64,
    /// Each with the key by which it will be supplied.
    pub(crate) external: BTreeMap<External, Bytes>,
    pub(crate) outer_pipes: OuterPipes,
    pub(crate) handlers: Handlers,
    pub(crate) links: LinkRemap,
    pub(crate) device_paths: DevicePaths,
    /// What a restore may ask of files.
    pub(crate) validation: FileValidation,
}

impl Default for FilePolicy {
    fn default() -> Self {
        Self {
            ghost_limit: 1 << 20,
            external: BTreeMap::new(),
            outer_pipes: OuterPipes::default(),
            handlers: Handlers::default(),
            links: LinkRemap::default(),
            device_paths: DevicePaths::default(),
            validation: FileValidation::default(),
        }
    }
}

impl Collector {
    pub(crate) fn new(frozen: &Frozen, tree: &Tree, policy: &FilePolicy) -> Self {
        let living = frozen.processes.iter().map(|process| (process.pid, process.number));
        let dead = frozen.zombies.iter().map(|zombie| (zombie.pid, zombie.number));
        let threads = frozen.processes.iter().flat_map(|process| &process.threads);
        let threads = threads.map(|thread| (thread.tid(), thread.tracee.number()));
        let tasks = living.chain(dead).chain(threads).collect();
        // One that the tree cannot be restored with is refused elsewhere.
        let outer = tree.plan().ok().and_then(|plan| plan.outer_group);
        let living = frozen.processes.iter().map(|process| (&process.stat, &process.status));
        let dead = frozen.zombies.iter().map(|zombie| (&zombie.stat, &zombie.status));
        let groups = living.chain(dead).filter_map(|(stat, status)| {
            let own = status.ns_pgid.last().copied().filter(|group| Some(*group) != outer)?;
            Some((u32::try_from(stat.pgrp).ok()?, own))
        });
        let groups = groups.collect();
        let processes = frozen.processes.iter().map(|process| process.pid).collect();
        Self { tasks, groups, processes, ..Self::of_policy(policy) }
    }

    pub(super) fn of_policy(policy: &FilePolicy) -> Self {
        Self { ghosts: Ghosts::new(policy), policy: policy.clone(), ..Self::default() }
    }

    /// The file of the file system that a description is of.
    pub(super) fn file(&mut self, probe: &Probe) -> Result<std::result::Result<FileRef, Refusal>> {
        let way = probe.way();
        if self.ghosts.takes(&probe.name, &probe.stat)
            && probe.stat.st_nlink > 0
            && probe.flags.contains(TMPFILE)
        {
            return Ok(Err(
                probe.refusal("it was made by O_TMPFILE, and has got a name since that is not known")
            ));
        }
        let mut file = FileRef::describe(&probe.name, &probe.stat, &way, &mut self.ghosts)?;
        self.ghosts.note_flags(&probe.stat, probe.flags);
        if let Ok(file) = &mut file
            && self.policy.validation == FileValidation::BuildId
            && !probe.info.locks.iter().any(|lock| lock.kind == fdinfo::LockKind::Lease)
        {
            self.ghosts.note_build_id(file, &way)?;
        }
        Ok(file.map_err(|reason| reason.refusal(probe.pid, probe.subject())))
    }

    /// The number by which a task of the tree knows itself.
    pub(super) fn task(&self, pid: Pid) -> Option<u32> {
        self.tasks.get(&pid).copied()
    }

    /// The same of a living process.
    pub(crate) fn process(&self, pid: Pid) -> Option<u32> {
        self.task(pid).filter(|_| self.processes.contains(&pid))
    }

    /// The same of a group.
    pub(super) fn group(&self, group: u32) -> Option<u32> {
        self.groups.get(&group).copied()
    }

    /// Describes the table that a thread of a process has, and those of its descriptions that are new.
    pub(crate) fn table(
        &mut self,
        process: &Process,
        tid: Pid,
        report: &mut Report,
        records: &mut Records,
    ) -> Result<()> {
        let mut table = FdTable::default();
        let pidfd = sys::pidfd::open_thread(tid, tid != process.pid).call("pidfd_open")?;
        for fd in open_fds(tid)? {
            let described = self.slot(process, tid, &pidfd, fd, report, records);
            let at = || Subject::Fd { fd, what: String::new() };
            let (slot, locks) = described.of(tid).about(at)?;
            // Each is shown for all descriptors of the description that it was taken by.
            let mut others = table.slots.iter();
            if !locks.is_empty() && !others.any(|other| other.description == slot.description) {
                if locks.iter().any(TableLock::is_lease) {
                    self.leases.remove(&slot.description);
                }
                table.locks.extend(locks);
            }
            table.slots.push(slot);
        }
        records.put(process.owner_for(tid), &table)
    }

    fn slot(
        &mut self,
        process: &Process,
        pid: Pid,
        pidfd: &OwnedFd,
        fd: RawFd,
        report: &mut Report,
        records: &mut Records,
    ) -> Result<(Slot, Vec<TableLock>)> {
        let file = sys::pidfd::get_fd(pidfd.as_fd(), fd).call("pidfd_getfd")?;
        let glance = Glance::at(pid, fd, file)?;
        let close_on_exec = glance.info.flags & libc::O_CLOEXEC as u32 != 0;
        let locks = TableLock::describe(fd, process.pid, &glance.info.locks);
        let table = process.owner_for(pid).0;
        let place = Place { table, pid, is_leader: pid == process.pid, fd };
        let stat = &glance.stat;
        let key = (stat.st_dev, stat.st_ino, stat.st_rdev, glance.flags.bits());
        let order = |other: Place| sys::kcmp_file((other.pid, other.fd), (pid, fd));
        let description = match self.find(key, order).call("kcmp")? {
            Ok(number) => number,
            Err(index) => {
                let mut probe = Probe::new(pid, fd, glance)?;
                let external = self.policy.external.iter().find(|(file, _)| file.is(&probe));
                probe.chosen = external.map_or(Chosen::Nothing, |(_, key)| Chosen::External(key.clone()));
                self.found.push(Found { place, polled: Polled::Anything });
                let number = self.found.len() as u32;
                self.sorted.entry(key).or_default().insert(index, number);
                let leased = |lock: &fdinfo::Lock| lock.kind == fdinfo::LockKind::Lease && lock.exclusive;
                if probe.stat.st_nlink == 0 && probe.info.locks.iter().any(leased) {
                    // Its contents cannot be read without breaking the lease.
                    report.refuse(probe.refusal("a deleted file under a write lease is not supported"));
                } else {
                    self.describe(Owner(number), &mut probe, (process, table), report, records)?;
                }
                if probe.info.locks.iter().any(|lock| lock.kind == fdinfo::LockKind::Lease) {
                    let reason = "its lease was taken by a process that does not have the file any more";
                    self.leases.insert(number, probe.refusal(reason));
                }
                match DescriptionLocks::describe(&probe, &probe.info.locks) {
                    Ok(Some(locks)) => records.put(Owner(number), &locks)?,
                    Ok(None) => {}
                    Err(refusal) => report.refuse(refusal),
                }
                number
            }
        };
        self.slots.insert((pid, fd), description);
        Ok((Slot { fd, close_on_exec, description }, locks))
    }

    /// The number of a description among those with this key, or the index where it belongs. `order` says how one by
    /// its place stands to it.
    fn find(
        &self,
        key: Key,
        order: impl Fn(Place) -> nix::Result<Ordering>,
    ) -> nix::Result<std::result::Result<u32, usize>> {
        let known = self.sorted.get(&key).map_or(&[][..], Vec::as_slice);
        let mut failed = None;
        let found = known.binary_search_by(|number| {
            let ordered = self.place(*number).map_or(Ok(Ordering::Equal), &order);
            ordered.unwrap_or_else(|errno| {
                failed = Some(errno);
                Ordering::Equal
            })
        });
        match failed {
            Some(errno) => Err(errno),
            None => Ok(found.map(|index| known.get(index).copied().unwrap_or_default())),
        }
    }

    fn found(&self, number: u32) -> Option<&Found> {
        self.found.get((number as usize).checked_sub(1)?)
    }

    fn place(&self, number: u32) -> Option<Place> {
        self.found(number).map(|found| found.place)
    }

    pub(super) fn polled(&self, number: u32) -> Polled {
        self.found(number).map_or(Polled::Anything, |found| found.polled)
    }

    /// The number that the description gets that is being described.
    pub(crate) fn newest_number(&self) -> u32 {
        self.found.len() as u32
    }

    /// The same, and where it is.
    pub(super) fn newest(&self) -> (u32, Option<Place>) {
        (self.newest_number(), self.found.last().map(|found| found.place))
    }

    /// A descriptor of our own.
    pub(super) fn borrow(&self, number: u32) -> Result<OwnedFd> {
        let missing = || Error::new(ErrorKind::Kernel, format!("no open file description {number}"));
        let place = self.place(number).ok_or_else(missing)?;
        let pidfd = sys::pidfd::open_thread(place.pid, !place.is_leader).call("pidfd_open")?;
        sys::pidfd::get_fd(pidfd.as_fd(), place.fd).call("pidfd_getfd").of(place.pid)
    }

    /// The description that an epoll instance watches: most often that of the descriptor by which it was added.
    pub(super) fn find_target(
        &self,
        epoll: (Pid, RawFd),
        target: &nameless::Target,
        offset: u32,
    ) -> Result<Option<u32>> {
        let order = |place: Place| sys::file::kcmp_epoll((place.pid, place.fd), epoll, (target.fd, offset));
        if let Some(number) = self.slots.get(&(epoll.0, target.fd))
            && let Ok(Ordering::Equal) = self.place(*number).map_or(Ok(Ordering::Less), order)
        {
            return Ok(Some(*number));
        }
        let device = makedev(target.device.major.into(), target.device.minor.into());
        let near = |key: &Key| (key.0, key.1) == (device, target.ino);
        // Some file systems show another device number than their own: those come second.
        let (first, second): (Vec<&Key>, Vec<&Key>) = self.sorted.keys().partition(|key| near(key));
        for key in first.into_iter().chain(second.into_iter().filter(|key| key.1 == target.ino)) {
            if let Ok(number) = self.find(*key, order).call("kcmp")? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    fn describe(
        &mut self,
        owner: Owner,
        probe: &mut Probe,
        holder: (&Process, u32),
        report: &mut Report,
        records: &mut Records,
    ) -> Result<()> {
        if let Some(signals) = FileOwner::describe(probe, holder, self, report)? {
            records.put(owner, &signals)?;
        }
        match self.kind_of(probe)? {
            Ok(kind) => {
                self.found.iter_mut().last().into_iter().for_each(|found| found.polled = kind.polled);
                (kind.describe)(probe, owner, self, report, records)?;
            }
            Err(refusal) => report.refuse(refusal),
        }
        records.put(owner, &Description { flags: probe.flags.bits() })
    }

    /// The kind that takes a file, or a handler of the caller's if there is none.
    fn kind_of(&self, probe: &mut Probe) -> Result<std::result::Result<&'static KindRegistration, Refusal>> {
        let takes = |probe: &Probe| KINDS.iter().find(|kind| (kind.recognise)(probe));
        let refusal = match (unsupported::disguised(probe)?, takes(probe)) {
            (_, Some(kind)) if probe.chosen != Chosen::Nothing => return Ok(Ok(kind)),
            (None, Some(kind)) => return Ok(Ok(kind)),
            (Some(refusal), _) => refusal,
            (None, None) => unsupported::refusal(probe),
        };
        probe.chosen = match self.policy.handlers.describe(probe) {
            Ok(Some(chosen)) => chosen,
            Ok(None) => Chosen::Nothing,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let hint = if probe.path().is_some() { external::HINT } else { external::NAMELESS_HINT };
        Ok(takes(probe).filter(|_| probe.chosen != Chosen::Nothing).ok_or_else(|| refusal.hint(hint)))
    }

    /// What can only be said when all tables are known.
    pub(crate) fn finish(mut self, report: &mut Report, records: &mut Records) -> Result<Ghosts> {
        for ((_, inode), seen) in std::mem::take(&mut self.pipes) {
            match seen.finish(inode, &self.policy) {
                Ok((owner, pipe)) => records.put(owner, &pipe)?,
                Err(refusal) => report.refuse(refusal),
            }
        }
        std::mem::take(&mut self.sockets).finish(report, records)?;
        std::mem::take(&mut self.leases).into_values().for_each(|refusal| report.refuse(refusal));
        epoll::describe_watches(&self, report, records)?;
        self.ghosts.finish(report);
        Ok(self.ghosts)
    }
}

/// The descriptors that a task has open, in order.
pub(crate) fn open_fds(pid: Pid) -> Result<Vec<RawFd>> {
    let path = format!("/proc/{pid}/fd");
    let entries = std::fs::read_dir(&path).call("open").about(|| Subject::Path(path.into()))?;
    let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let mut fds: Vec<RawFd> = entries.filter_map(number).collect();
    fds.sort_unstable();
    Ok(fds)
}

/// How high descriptors can be: a new task has our own limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    soft: u64,
    hard: u64,
}

impl Room {
    pub(crate) fn find() -> Result<Self> {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).call("getrlimit")?;
        Ok(Self { soft, hard })
    }

    pub(crate) fn check(self, highest: RawFd) -> Result<()> {
        if highest < 0 || (highest as u64) < self.hard {
            return Ok(());
        }
        let hard = self.hard;
        let reason = format!("the hard RLIMIT_NOFILE of the restoring process, {hard}, is too low");
        let at = Subject::Fd { fd: highest, what: String::new() };
        Err(Error::new(ErrorKind::Conflict, reason).about(at).with_hint("raise it: prlimit(1)"))
    }

    /// Queues what lets the task have as many as it may. It gets its own limits later.
    pub(crate) fn make(self, highest: RawFd, batch: &mut Batch) {
        if highest >= 0 && highest as u64 >= self.soft {
            let limit = batch.input_words(&[self.hard, self.hard]);
            batch.call(call::prlimit64, &[0, u64::from(libc::RLIMIT_NOFILE), limit, 0]);
        }
    }
}

/// Descriptors that one message carries (the kernel's SCM_MAX_FD is 253).
const MESSAGE: usize = 240;

impl FdTable {
    pub(crate) fn slot(&self, fd: RawFd) -> Option<&Slot> {
        self.slots.binary_search_by_key(&fd, |slot| slot.fd).ok().and_then(|index| self.slots.get(index))
    }

    /// Are all of its descriptions among those that the image has?
    pub(crate) fn check_references(&self, known: &BTreeSet<u32>) -> Result<()> {
        match self.slots.iter().find(|slot| !known.contains(&slot.description)) {
            None => Ok(()),
            Some(slot) => Err(Error::new(ErrorKind::Image, "a descriptor of nothing").about(Subject::Fd {
                fd: slot.fd,
                what: format!("{} {}", Description::NAME, slot.description),
            })),
        }
    }

    /// Its highest number.
    pub(crate) fn highest(&self) -> Option<RawFd> {
        self.slots.last().map(|slot| slot.fd)
    }

    /// Checks what the restore relies on.
    pub(crate) fn check(&self) -> Result<()> {
        let bad = |why| Err(Error::new(ErrorKind::Image, why));
        let ascending = self.slots.windows(2).all(|pair| pair[0].fd < pair[1].fd);
        if !ascending || self.slots.first().is_some_and(|first| first.fd < 0) {
            return bad("the slots of an fd table are not in order");
        }
        if !self.locks.iter().all(|lock| self.slot(lock.fd()).is_some()) {
            return bad("a lock by a descriptor that is not open");
        }
        self.locks.iter().try_for_each(TableLock::check)
    }

    /// Queues the calls that take its locks: when nothing of it will be closed any more.
    pub(crate) fn take_locks(
        &self,
        mut run: impl FnMut(Batch) -> Result<()>,
        new_batch: impl Fn() -> Batch,
    ) -> Result<()> {
        self.locks.chunks(MESSAGE).try_for_each(|some| {
            let mut batch = new_batch();
            for lock in some {
                batch.about(Subject::Fd { fd: lock.fd(), what: "its lock".into() });
                lock.take(&mut batch)?;
            }
            run(batch).map_err(locks::taken)
        })
    }

    /// Sends the descriptions to a task whose only open descriptor is the channel, one message at a time, and
    /// queues the calls with which the task receives them and puts them in their places. The last ones remain in the
    /// batch.
    pub(crate) fn install<'fd>(
        &self,
        channel: &Channel,
        description: impl Fn(u32) -> Result<std::os::fd::BorrowedFd<'fd>>,
        batch: &mut Batch,
        mut run: impl FnMut(&mut Batch) -> Result<()>,
    ) -> Result<()> {
        let mut placed: Vec<RawFd> = vec![channel.number()];
        for (index, message) in self.slots.chunks(MESSAGE).enumerate() {
            if index > 0 {
                run(batch)?;
            }
            let fds = message.iter().map(|slot| description(slot.description)).collect::<Result<Vec<_>>>()?;
            let received = channel.send(&fds, &placed, batch)?;
            // From the highest down: no number that is still needed is taken, since each is at most its place.
            for (slot, from) in message.iter().zip(&received).rev() {
                let what = String::from("its slot");
                batch.about(Subject::Fd { fd: slot.fd, what });
                place(slot, *from, batch);
            }
            placed.extend(message.iter().map(|slot| slot.fd));
        }
        Ok(())
    }
}

fn place(slot: &Slot, from: RawFd, batch: &mut Batch) {
    let (from, to) = (from as u64, slot.fd as u64);
    if from != to {
        let flags = if slot.close_on_exec { libc::O_CLOEXEC as u64 } else { 0 };
        batch.call(call::dup3, &[from, to, flags]);
        batch.call(call::close, &[from]);
    } else if slot.close_on_exec {
        batch.call(call::fcntl, &[to, libc::F_SETFD as u64, libc::FD_CLOEXEC as u64]);
    }
}
