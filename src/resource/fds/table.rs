//! fd tables, and finding out which slots share one open file description.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use super::{Channel, Description, KINDS, Pipe, Probe, pipe, unknown_kind};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};
use crate::freeze::Process;
use crate::image::{Decode, Encode, Owner, Record, Records, Tag};
use crate::proc::{fdinfo, read};
use crate::resource::Report;
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
}

impl Record for FdTable {
    const TAG: Tag = Tag::new(b"FDTB");
    const VERSION: u16 = 1;
    const NAME: &'static str = "fd table";
}

/// What descriptions are sorted by before kcmp(2) has to be asked.
type Key = (u64, u64, u64, i32);

/// Checkpoint: the descriptions found so far, in all tables.
#[derive(Default)]
pub(crate) struct Collector {
    known: BTreeMap<Key, Vec<Known>>,
    count: u32,
    /// By inode number: all pipes are on one internal file system.
    pub(super) pipes: BTreeMap<u64, pipe::Seen>,
}

/// A description, by one slot that refers to it.
struct Known {
    place: (Pid, RawFd),
    number: u32,
}

impl Collector {
    /// Describes one process's table, and those of its descriptions that are new.
    pub(crate) fn table(
        &mut self,
        process: &Process,
        report: &mut Report,
        records: &mut Records,
    ) -> Result<()> {
        let mut slots = Vec::new();
        let pidfd =
            sys::pidfd::open_thread(process.speaker(), process.leader_is_dead()).call("pidfd_open")?;
        for fd in open_fds(process.speaker())? {
            let described = self.slot(process.speaker(), &pidfd, fd, report, records);
            let at = || Subject::Fd { fd, what: String::new() };
            slots.push(described.of(process.pid).about(at)?);
        }
        records.put(Owner(process.pid.get()), &FdTable { slots })
    }

    fn slot(
        &mut self,
        pid: Pid,
        pidfd: &OwnedFd,
        fd: RawFd,
        report: &mut Report,
        records: &mut Records,
    ) -> Result<Slot> {
        let file = sys::pidfd::get_fd(pidfd.as_fd(), fd).call("pidfd_getfd")?;
        let probe = Probe::new(pid, fd, file)?;
        let info = read::parsed(pid, &format!("fdinfo/{fd}"), fdinfo::parse)?;
        let close_on_exec = info.flags & libc::O_CLOEXEC as u32 != 0;
        let description = match self.find(&probe)? {
            Ok(number) => number,
            Err(()) => self.describe(&probe, report, records)?,
        };
        Ok(Slot { fd, close_on_exec, description })
    }

    /// The number of a description that is known already; remembers it if it is not.
    fn find(&mut self, probe: &Probe) -> Result<std::result::Result<u32, ()>> {
        let stat = &probe.stat;
        let key = (stat.st_dev, stat.st_ino, stat.st_rdev, probe.flags.bits());
        let known = self.known.entry(key).or_default();
        let place = (probe.pid, probe.fd);
        let mut failed = None;
        let found = known.binary_search_by(|other| {
            sys::kcmp_file(other.place, place).unwrap_or_else(|errno| {
                failed = Some(errno);
                Ordering::Equal
            })
        });
        if let Some(errno) = failed {
            return Err(Error::call("kcmp", errno));
        }
        Ok(match found {
            Ok(index) => known.get(index).map(|known| known.number).ok_or(()),
            Err(index) => {
                self.count += 1;
                known.insert(index, Known { place, number: self.count });
                Err(())
            }
        })
    }

    fn describe(&mut self, probe: &Probe, report: &mut Report, records: &mut Records) -> Result<u32> {
        let owner = Owner(self.count);
        probe.refuse_extras(report)?;
        match KINDS.iter().find(|kind| (kind.recognise)(probe)) {
            Some(kind) => (kind.describe)(probe, owner, self, report, records)?,
            None => report.refuse(unknown_kind(probe)),
        }
        records.put(owner, &Description { flags: probe.flags.bits() })?;
        Ok(owner.0)
    }

    /// What can only be said when all tables are known.
    pub(crate) fn finish(self, report: &mut Report, records: &mut Records) -> Result<()> {
        for seen in self.pipes.values() {
            match seen.outside() {
                Some(refusal) => report.refuse(refusal),
                None => {
                    let (owner, pipe): (Owner, &Pipe) = seen.record();
                    records.put(owner, pipe)?;
                }
            }
        }
        Ok(())
    }
}

fn open_fds(pid: Pid) -> Result<Vec<RawFd>> {
    let path = format!("/proc/{pid}/fd");
    let entries = std::fs::read_dir(&path).call("open").about(|| Subject::Path(path.into()))?;
    let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let mut fds: Vec<RawFd> = entries.filter_map(number).collect();
    fds.sort_unstable();
    Ok(fds)
}

/// Descriptors that one message carries (the kernel's SCM_MAX_FD is 253).
const MESSAGE: usize = 240;

impl FdTable {
    /// Checks what the restore relies on.
    pub(crate) fn check(&self) -> Result<()> {
        let ascending = self.slots.windows(2).all(|pair| pair[0].fd < pair[1].fd);
        match ascending && self.slots.first().is_none_or(|first| first.fd >= 0) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Image, "the slots of an fd table are not in order")),
        }
    }

    /// Sends the descriptions to a task whose only open descriptor is the channel, one message at a time, and
    /// queues the calls with which the task receives them and puts them in their places. The last batch, which also
    /// closes the channel, is left to the caller.
    pub(crate) fn install<'fd>(
        &self,
        channel: &Channel,
        description: impl Fn(u32) -> Result<std::os::fd::BorrowedFd<'fd>>,
        mut run: impl FnMut(Batch) -> Result<()>,
        new_batch: impl Fn() -> Batch,
    ) -> Result<Batch> {
        let mut placed: Vec<RawFd> = vec![channel.number()];
        let mut batch = new_batch();
        for message in self.slots.chunks(MESSAGE) {
            if !batch.is_empty() {
                run(std::mem::replace(&mut batch, new_batch()))?;
            }
            let fds = message.iter().map(|slot| description(slot.description)).collect::<Result<Vec<_>>>()?;
            let received = channel.send(&fds, &placed, &mut batch)?;
            // From the highest down: no number that is still needed is taken, since each is at most its place.
            for (slot, from) in message.iter().zip(&received).rev() {
                let what = String::from("its slot");
                batch.about(Subject::Fd { fd: slot.fd, what });
                place(slot, *from, &mut batch);
            }
            placed.extend(message.iter().map(|slot| slot.fd));
        }
        batch.call(call::close, &[channel.number() as u64]);
        Ok(batch)
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
