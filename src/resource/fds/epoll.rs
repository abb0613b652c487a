//! epoll(7). An instance, and what it watches.
//!
//! A watch is of an open file description, under the number that it had when it was added: that number may be closed
//! by now, or be another file. kcmp(2) KCMP_EPOLL_TFD tells which description it is. The process that has the
//! instance adds its watches again, by itself, since it is its signals that a signalfd tells of.
//!
//! Whether an edge (EPOLLET) has been reported already is nowhere to be seen. Adding a watch of a file that is ready
//! reports one. So an instance that had nothing to report is emptied again; from one that had something, a program
//! may hear of an edge twice. It never misses one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::epoll::{Epoll as New, EpollCreateFlags};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::table::{FdTable, Place};
use super::{Builder, Channel, Collector, Description, FileKind, Polled, Probe};
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Decode, Encode, Image, Owner, Record, Records, Tag};
use crate::proc::{fdinfo, nameless, read};
use crate::resource::Report;
use crate::sys::file;
use crate::tracee::{Batch, Puppet, sys};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Epoll {
    /// EPIOCSPARAMS, as one word.
    busy_polling: u64,
}

impl Record for Epoll {
    const TAG: Tag = Tag::new(b"FEPL");
    const VERSION: u16 = 1;
    const NAME: &'static str = "epoll instance";
}

/// What an instance watches. The section's owner is that of the instance.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Watches {
    /// The table of the process that adds them, and the instance's number in it.
    table: u32,
    epoll: i32,
    /// It had nothing to report.
    quiet: bool,
    watches: Vec<Watch>,
}

#[derive(Encode, Decode, Debug, Clone, Copy)]
struct Watch {
    /// The number by which it was added.
    fd: i32,
    description: u32,
    events: u32,
    data: u64,
}

impl Record for Watches {
    const TAG: Tag = Tag::new(b"EPWT");
    const VERSION: u16 = 1;
    const NAME: &'static str = "watches of an epoll instance";
}

// uapi/linux/eventpoll.h
const EPOLLEXCLUSIVE: u32 = 1 << 28;
const EPOLLWAKEUP: u32 = 1 << 29;
const EPOLLONESHOT: u32 = 1 << 30;
const EPOLLET: u32 = 1 << 31;
/// All that is left of a watch with EPOLLONESHOT that has reported.
const HOW: u32 = EPOLLEXCLUSIVE | EPOLLWAKEUP | EPOLLONESHOT | EPOLLET;
/// All that a file can be ready for: IN, PRI, OUT, RDNORM, RDBAND, WRNORM, WRBAND, MSG, RDHUP.
const READY: u32 = 0x27c7;

/// How many instances there can be one in another, and one more: fs/eventpoll.c EP_MAX_NESTS.
const DEEPEST: u32 = 5;

impl Watch {
    fn is_spent(&self) -> bool {
        self.events & !HOW == 0
    }
}

impl FileKind for Epoll {
    const POLLED: Polled = Polled::NeverBroken;

    fn recognise(probe: &Probe) -> bool {
        probe.name == b"anon_inode:[eventpoll]"
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let (number, place) = collector.newest();
        collector.epolls.extend(place.map(|place| Seen { number, place, refusal: probe.refusal("") }));
        Ok(Ok(Self { busy_polling: file::epoll_params(probe.file.as_fd()).call("ioctl(EPIOCGPARAMS)")? }))
    }

    fn build(&self, _: &Description, _: &mut Builder<'_>) -> Result<OwnedFd> {
        let epoll = New::new(EpollCreateFlags::EPOLL_CLOEXEC).call("epoll_create1")?.0;
        if self.busy_polling != 0 {
            file::set_epoll_params(epoll.as_fd(), self.busy_polling).call("ioctl(EPIOCSPARAMS)")?;
        }
        Ok(epoll)
    }
}

/// An instance, as the checkpoint has found it.
#[derive(Debug)]
pub(super) struct Seen {
    /// Of its description.
    number: u32,
    place: Place,
    /// Without its reason.
    refusal: Refusal,
}

impl Seen {
    fn refuse(&self, reason: impl Into<std::borrow::Cow<'static, str>>) -> Refusal {
        Refusal { reason: reason.into(), ..self.refusal.clone() }
    }
}

/// Checkpoint: what all instances watch, when all descriptions are known.
pub(super) fn describe_watches(
    collector: &Collector,
    report: &mut Report,
    records: &mut Records,
) -> Result<()> {
    let mut all: BTreeMap<u32, Watches> = BTreeMap::new();
    for seen in &collector.epolls {
        match watches_of(collector, seen)? {
            Ok(watches) => drop(all.insert(seen.number, watches)),
            Err(refusal) => report.refuse(refusal),
        }
    }
    for seen in &collector.epolls {
        let number = seen.number;
        let quiet = is_quiet(collector, &all, seen)?;
        if let Some(watches) = all.get_mut(&number) {
            watches.quiet = quiet;
            records.put(Owner(number), watches)?;
        }
    }
    Ok(())
}

fn watches_of(collector: &Collector, seen: &Seen) -> Result<std::result::Result<Watches, Refusal>> {
    let Place { pid, fd, table, .. } = seen.place;
    let parse = |text: &[u8]| nameless::targets(&fdinfo::parse(text)?);
    let targets = read::parsed(pid, &format!("fdinfo/{fd}"), parse)?;
    let mut before: BTreeMap<i32, u32> = BTreeMap::new();
    let mut watches = Vec::with_capacity(targets.len());
    for target in targets {
        let offset = before.entry(target.fd).or_default();
        let Some(found) = collector.find_target((pid, fd), &target, *offset)? else {
            let reason = format!(
                "it watches a file (added as fd {}) that no descriptor of the tree refers to",
                target.fd
            );
            return Ok(Err(seen.refuse(reason)));
        };
        *offset += 1;
        let (events, data) = (target.events, target.data);
        let watch = Watch { fd: target.fd, description: found, events, data };
        if watch.is_spent() && collector.polled(found) == Polled::Anything && !can_report(collector, found)? {
            let reason = format!(
                "its watch of fd {} has reported once (EPOLLONESHOT), of a file that is not ready",
                target.fd
            );
            return Ok(Err(seen.refuse(reason).hint("try again: such a file often becomes ready again")));
        }
        watches.push(watch);
    }
    Ok(Ok(Watches { table, epoll: fd, quiet: false, watches }))
}

/// Is the file that this description is of ready for anything, or can be made so for a moment?
fn can_report(collector: &Collector, description: u32) -> Result<bool> {
    let file = collector.borrow(description)?;
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).call("fcntl(F_GETFL)")?);
    let fifo = SFlag::from_bits_truncate(fstat(&file).call("fstat")?.st_mode & SFlag::S_IFMT.bits());
    let empty_pipe = fifo == SFlag::S_IFIFO && flags & OFlag::O_ACCMODE == OFlag::O_RDONLY;
    Ok(empty_pipe || is_ready(file.as_fd())?)
}

fn is_ready(file: BorrowedFd<'_>) -> Result<bool> {
    let mut polled = [PollFd::new(file, PollFlags::from_bits_retain(READY as i16))];
    Ok(poll(&mut polled, 0u8).call("poll")? > 0)
}

/// A byte in a pipe that is empty: it makes its reading end ready. Dropping it takes the byte out again.
struct Byte(std::fs::File);

impl Byte {
    fn put_into(pipe: BorrowedFd<'_>) -> Result<Self> {
        let way = format!("/proc/self/fd/{}", pipe.as_raw_fd());
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mut both = std::fs::File::from(open(way.as_str(), flags, Mode::empty()).call("open")?);
        both.write_all(b"x").call("write")?;
        Ok(Self(both))
    }
}

impl Drop for Byte {
    fn drop(&mut self) {
        // It is there: nobody else has the pipe yet.
        let _ = self.0.read_exact(&mut [0]);
    }
}

/// Has it nothing to report? Only asked where the answer matters and where asking changes nothing: what is ready for us
/// must be so for its owner.
fn is_quiet(collector: &Collector, all: &BTreeMap<u32, Watches>, seen: &Seen) -> Result<bool> {
    let number = seen.number;
    let edges = all.get(&number).is_some_and(|own| own.watches.iter().any(|one| one.events & EPOLLET != 0));
    if !edges || depends_on_caller(collector, all, number, 0) {
        return Ok(false);
    }
    let file = collector.borrow(number)?;
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut polled, 0u8).call("poll")? == 0)
}

fn depends_on_caller(
    collector: &Collector,
    all: &BTreeMap<u32, Watches>,
    description: u32,
    depth: u32,
) -> bool {
    if depth > DEEPEST || collector.polled(description) == Polled::PerCaller {
        return true;
    }
    let watches = all.get(&description).map_or(&[][..], |watches| &watches.watches);
    watches.iter().any(|watch| depends_on_caller(collector, all, watch.description, depth + 1))
}

impl Watches {
    /// All of an image, by their instances, with their references checked. `slot` knows all tables.
    pub(crate) fn load(image: &Image, slot: impl Fn(u32, i32) -> Option<u32>) -> Result<BTreeMap<u32, Self>> {
        let owners: Vec<Owner> = image.owners::<Self>().collect();
        let load = |owner: Owner| {
            let watches: Self = image.require(owner)?;
            let there = slot(watches.table, watches.epoll) == Some(owner.0);
            let keys: BTreeSet<_> =
                watches.watches.iter().map(|watch| (watch.fd, watch.description)).collect();
            let once = keys.len() == watches.watches.len() && keys.first().is_none_or(|(fd, _)| *fd >= 0);
            if !there || !once {
                return Err(Error::new(ErrorKind::Image, "an epoll instance that cannot be"));
            }
            image.require::<Epoll>(owner)?;
            for watch in &watches.watches {
                image.require::<Description>(Owner(watch.description))?;
            }
            Ok((owner.0, watches))
        };
        let about = |owner: Owner| move || Subject::Section(format!("{} {owner}", Self::NAME));
        let all = owners.into_iter().map(|owner| load(owner).about(about(owner)));
        let all = all.collect::<Result<BTreeMap<_, _>>>()?;
        check_nesting(&all).map(|()| all)
    }

    /// The number of the table that it is in.
    pub(crate) fn table(&self) -> u32 {
        self.table
    }

    /// The numbers that its files need for a moment.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = i32> + '_ {
        self.watches.iter().map(|watch| watch.fd)
    }

    /// Makes a task add them, whose table is complete and has the channel besides.
    pub(crate) fn connect(
        &self,
        puppet: &mut Puppet<'_>,
        table: &FdTable,
        builder: &Builder<'_>,
        channel: &Channel,
    ) -> Result<()> {
        let adding = Adding { epoll: self.epoll, table, builder, channel };
        let (spent, others): (Vec<Watch>, Vec<Watch>) =
            self.watches.iter().partition(|watch| watch.is_spent());
        let mut reporting = 0;
        let mut bytes: BTreeMap<u32, Byte> = BTreeMap::new();
        let mut again = Vec::with_capacity(spent.len());
        for watch in spent {
            let file = builder.description(watch.description)?;
            let reports = builder.polled(watch.description)? == Polled::Anything;
            if reports && !is_ready(file)? {
                bytes.insert(watch.description, Byte::put_into(file).about(|| self.subject())?);
            }
            reporting += u64::from(reports);
            again.push(if reports { Watch { events: watch.events | READY, ..watch } } else { watch });
        }
        adding.all(&again, puppet)?;
        self.report_once(reporting, puppet)?;
        drop(bytes);
        adding.all(&others, puppet)?;
        self.check_wakeups(puppet)
    }

    /// Those that have reported once (EPOLLONESHOT) do so now, and are silent from then on.
    fn report_once(&self, mut missing: u64, puppet: &mut Puppet<'_>) -> Result<()> {
        const AT_ONCE: u64 = 1024;
        /// Bytes of a `struct epoll_event`.
        const EVENT: usize = 12;
        while missing > 0 {
            let mut batch = puppet.batch();
            let events = batch.output(AT_ONCE as usize * EVENT);
            let taken = batch.call(sys::epoll_wait, &[self.epoll as u64, events.addr, AT_ONCE, 0]);
            match puppet.run(batch)?.get(taken)? {
                0 => {
                    return Err(Error::new(
                        ErrorKind::Conflict,
                        "a file that was ready is not ready any more",
                    )
                    .about(self.subject()));
                }
                taken => missing = missing.saturating_sub(taken),
            }
        }
        Ok(())
    }

    /// Without CAP_BLOCK_SUSPEND the kernel drops EPOLLWAKEUP without a word.
    fn check_wakeups(&self, puppet: &Puppet<'_>) -> Result<()> {
        let with =
            |events: &mut dyn Iterator<Item = u32>| events.filter(|one| one & EPOLLWAKEUP != 0).count();
        let wanted = with(&mut self.watches.iter().map(|watch| watch.events));
        if wanted == 0 {
            return Ok(());
        }
        let parse = |text: &[u8]| nameless::targets(&fdinfo::parse(text)?);
        let there = read::parsed(puppet.tgid(), &format!("fdinfo/{}", self.epoll), parse)?;
        match with(&mut there.iter().map(|target| target.events)) {
            set if set == wanted => Ok(()),
            _ => Err(Error::new(ErrorKind::Permission, "EPOLLWAKEUP cannot be set")
                .with_hint("it needs CAP_BLOCK_SUSPEND")
                .about(self.subject())),
        }
    }

    fn subject(&self) -> Subject {
        Subject::Fd { fd: self.epoll, what: "epoll".into() }
    }

    /// Takes the reports of edges that had been reported before.
    pub(super) fn silence(&self, epoll: BorrowedFd<'_>) -> Result<()> {
        if self.quiet && !self.watches.is_empty() {
            file::take_events(epoll, self.watches.len()).call("epoll_wait")?;
        }
        Ok(())
    }
}

/// No instance can watch itself, by way of others or not, nor can there be many of them one in another.
fn check_nesting(all: &BTreeMap<u32, Watches>) -> Result<()> {
    let mut left: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (number, watches) in all {
        let inner = watches.watches.iter().map(|watch| watch.description).filter(|one| all.contains_key(one));
        left.insert(*number, inner.collect());
    }
    // From the innermost outwards.
    for _ in 0..=DEEPEST {
        let inner: BTreeSet<u32> =
            left.iter().filter(|(_, inner)| inner.is_empty()).map(|(number, _)| *number).collect();
        left.retain(|number, _| !inner.contains(number));
        left.values_mut().for_each(|watched| watched.retain(|one| !inner.contains(one)));
    }
    match left.keys().next() {
        None => Ok(()),
        Some(number) => Err(Error::new(ErrorKind::Image, "epoll instances that watch each other")
            .about(Subject::Section(format!("{} {number}", Watches::NAME)))),
    }
}

/// Adding watches to one instance.
struct Adding<'a> {
    epoll: i32,
    table: &'a FdTable,
    builder: &'a Builder<'a>,
    channel: &'a Channel,
}

impl Adding<'_> {
    fn all(&self, watches: &[Watch], puppet: &mut Puppet<'_>) -> Result<()> {
        let mut batch = puppet.batch();
        for watch in watches {
            let what = format!("epoll, its watch of fd {}", watch.fd);
            batch.about(Subject::Fd { fd: self.epoll, what });
            let in_place = self.table.slot(watch.fd).map(|slot| slot.description) == Some(watch.description);
            if in_place {
                self.control(watch, &mut batch);
            } else {
                self.add_moved(watch, &mut batch)?;
            }
            // The channel has room for a few messages only.
            if !in_place || batch.is_nearly_full() {
                puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
            }
        }
        puppet.run(batch)?.check()
    }

    /// The number is free now, or another file's: the file gets it for this moment.
    fn add_moved(&self, watch: &Watch, batch: &mut Batch) -> Result<()> {
        let file = self.builder.description(watch.description)?;
        let slots = self.table.slots.iter().map(|slot| slot.fd);
        let open: BTreeSet<i32> = slots.chain([self.channel.number()]).collect();
        let mut free = (0..).filter(|number| !open.contains(number));
        let (received, aside) = (free.next().unwrap_or(-1), free.next().unwrap_or(-1) as u64);
        self.channel.send(&[file], &open.iter().copied().collect::<Vec<_>>(), batch)?;
        let (from, number) = (received as u64, watch.fd as u64);
        if received == watch.fd {
            self.control(watch, batch);
            batch.call(sys::close, &[from]);
            return Ok(());
        }
        let other = self.table.slot(watch.fd);
        if other.is_some() {
            batch.call(sys::fcntl, &[number, libc::F_DUPFD_CLOEXEC as u64, aside]);
        }
        batch.call(sys::dup3, &[from, number, 0]);
        self.control(watch, batch);
        batch.call(sys::close, &[from]);
        match other {
            Some(slot) => {
                let flags = if slot.close_on_exec { libc::O_CLOEXEC as u64 } else { 0 };
                batch.call(sys::dup3, &[aside, number, flags]);
                batch.call(sys::close, &[aside]);
            }
            None => drop(batch.call(sys::close, &[number])),
        }
        Ok(())
    }

    fn control(&self, watch: &Watch, batch: &mut Batch) {
        // struct epoll_event is packed.
        let mut event = watch.events.to_ne_bytes().to_vec();
        event.extend(watch.data.to_ne_bytes());
        let event = batch.input(&event);
        let add = libc::EPOLL_CTL_ADD as u64;
        batch.call(sys::epoll_ctl, &[self.epoll as u64, add, watch.fd as u64, event]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Scratch;
    use super::*;

    #[test]
    fn watches_that_contradict_the_image() {
        let load = |table, epoll, watches: &[(i32, u32)]| {
            let watch = |(fd, description): &(i32, u32)| Watch {
                fd: *fd,
                description: *description,
                events: 1,
                data: 0,
            };
            let watches = watches.iter().map(watch).collect();
            let scratch = Scratch::new();
            let image = scratch.image(|records| {
                for number in [1, 2, 4] {
                    records.put(Owner(number), &Description { flags: 0 }).unwrap();
                }
                records.put(Owner(1), &Epoll { busy_polling: 0 }).unwrap();
                records.put(Owner(1), &Watches { table, epoll, quiet: true, watches }).unwrap();
            });
            // Process 7 has the instance as its descriptor 3.
            Watches::load(&image, |table, fd| (table == 7 && fd == 3).then_some(1))
                .map_err(|error| error.kind())
                .map(|all| all.len())
        };
        assert_eq!(load(7, 3, &[(5, 2), (5, 4), (6, 2)]), Ok(1));
        for (table, epoll, watches) in [
            (8, 3, &[][..]),
            (7, 4, &[]),
            (7, 3, &[(5, 3)]),
            (7, 3, &[(-1, 2)]),
            (7, 3, &[(5, 2), (6, 2), (5, 2)]),
        ] {
            assert_eq!(load(table, epoll, watches), Err(ErrorKind::Image), "{table} {epoll} {watches:?}");
        }
    }

    /// In circles, and deeper than the kernel would have it.
    #[test]
    fn instances_in_each_other() {
        let nested = |edges: &[(u32, u32)]| {
            let watches = |number| {
                let own = edges.iter().filter(|(outer, _)| *outer == number);
                let watch =
                    |(_, inner): &(u32, u32)| Watch { fd: 3, description: *inner, events: 1, data: 0 };
                Watches { table: 7, epoll: 3, quiet: false, watches: own.map(watch).collect() }
            };
            let all = (1..=20).map(|number| (number, watches(number))).collect();
            check_nesting(&all).map_err(|error| error.kind())
        };
        assert_eq!(nested(&[(1, 2), (2, 3), (3, 4), (4, 5), (1, 5), (1, 30)]), Ok(()));
        let chain: Vec<_> = (1..20).map(|number| (number, number + 1)).collect();
        for wrong in [&[(1, 1)][..], &[(1, 2), (2, 1)], &[(4, 1), (1, 2), (2, 3), (3, 1)], &chain] {
            assert_eq!(nested(wrong), Err(ErrorKind::Image), "{wrong:?}");
        }
    }

    #[test]
    fn a_spent_watch_has_nothing_but_how() {
        let watch = |events| Watch { fd: 0, description: 0, events, data: 0 };
        assert!(watch(EPOLLONESHOT | EPOLLET).is_spent() && watch(EPOLLONESHOT).is_spent());
        assert!(!watch(EPOLLONESHOT | 0x18).is_spent());
    }

    /// A byte that makes a pipe ready for a moment is not there afterwards.
    #[test]
    fn a_byte_comes_and_goes() {
        let (reader, _writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let byte = Byte::put_into(reader.as_fd()).unwrap();
        assert!(is_ready(reader.as_fd()).unwrap());
        drop(byte);
        assert!(!is_ready(reader.as_fd()).unwrap());
    }
}
