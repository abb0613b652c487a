//! Open files: fd tables, the open file descriptions that their slots refer to, and the places of the file
//! system that a process stands in.
//!
//! One description is one record, however many slots of however many processes refer to it: kcmp(2) tells.
//! The checkpoint looks at a description through a duplicate of its own (pidfd_getfd(2)), the restore makes
//! it in the calling process and hands it over by SCM_RIGHTS.

mod build_id;
mod channel;
mod device;
mod epoll;
mod eventfd;
mod external;
mod fanotify;
mod ghost;
mod handler;
mod handles;
mod inode;
mod inotify;
mod link;
mod locks;
mod owner;
mod path;
mod pidfd;
mod pipe;
mod places;
mod regular;
mod signalfd;
mod table;
#[cfg(test)]
pub(super) mod tests;
mod timerfd;
mod unsupported;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};

use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Image, Owner, Record, Records, Tag};
use crate::proc::{fdinfo, read};
use crate::resource::{RecordKind, Report, sockets};

pub(crate) use channel::Channel;
pub use device::DevicePaths;
pub(crate) use epoll::Watches;
pub use external::{External, OuterPipes};
pub(crate) use external::{Inherited, NAMELESS_HINT};
pub(crate) use fanotify::refuse_askers;
pub(crate) use ghost::{Ghost, Ghosts, OldNames};
pub(crate) use handler::Handlers;
pub use handler::{FileHandler, OpenFile};
pub use link::LinkRemap;
pub(crate) use link::Links;
pub(crate) use locks::DescriptionLocks;
pub(crate) use owner::FileOwner;
pub use path::FileValidation;
pub(crate) use path::{FileRef, Finder, Reason};
pub(crate) use pipe::Pipe;
pub(crate) use places::Places;
pub(crate) use table::{Collector, FdTable, FilePolicy, Room, open_fds};
pub(crate) use timerfd::readable as clock_of;

/// What all open file descriptions have, whatever they are of; the owner of its section is a number that the
/// tables use. A section of the kind's own record has the same owner.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Description {
    /// F_GETFL: access mode and status flags.
    flags: i32,
}

impl Record for Description {
    const TAG: Tag = Tag::new(b"FDSC");
    const VERSION: u16 = 1;
    const NAME: &'static str = "open file description";
}

impl Description {
    pub(crate) fn flags(&self) -> OFlag {
        OFlag::from_bits_retain(self.flags)
    }
}

/// A description as the checkpoint sees it: through one slot of one process.
pub(crate) struct Probe {
    pub(crate) pid: Pid,
    pub(crate) fd: RawFd,
    /// Our own duplicate.
    pub(crate) file: OwnedFd,
    pub(crate) stat: FileStat,
    /// What `/proc/PID/fd/N` says.
    pub(crate) name: Vec<u8>,
    pub(crate) flags: OFlag,
    pub(crate) info: fdinfo::FdInfo,
    /// What the caller wants to be done about it.
    pub(crate) chosen: Chosen,
}

/// What every slot is asked, before it is known whether its description is a new one.
struct Glance {
    file: OwnedFd,
    stat: FileStat,
    flags: OFlag,
    info: fdinfo::FdInfo,
}

impl Glance {
    fn at(pid: Pid, fd: RawFd, file: OwnedFd) -> Result<Self> {
        let stat = fstat(&file).call("fstat")?;
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).call("fcntl")?);
        let info = read::parsed(pid, &format!("fdinfo/{fd}"), fdinfo::parse)?;
        Ok(Self { file, stat, flags, info })
    }
}

/// What becomes of a description by the caller's choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// What its kind makes of it.
    Nothing,
    /// The caller will supply it, by this key.
    External(Bytes),
    /// A handler of the caller's has described it.
    Handled { handler: Bytes, state: Bytes },
}

impl Probe {
    fn new(pid: Pid, fd: RawFd, Glance { file, stat, flags, info }: Glance) -> Result<Self> {
        let name = read::link(pid, &format!("fd/{fd}"))?;
        Ok(Self { pid, fd, file, stat, name, flags, info, chosen: Chosen::Nothing })
    }

    pub(crate) fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }

    pub(crate) fn subject(&self) -> Subject {
        Subject::Fd { fd: self.fd, what: String::from_utf8_lossy(&self.name).into_owned() }
    }

    pub(crate) fn refusal(&self, reason: impl Into<std::borrow::Cow<'static, str>>) -> Refusal {
        Refusal::new(self.pid, self.subject(), reason)
    }

    /// Its name, if that is a path.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStrExt;
        self.name.starts_with(b"/").then(|| std::ffi::OsStr::from_bytes(&self.name).into())
    }

    /// By what it can be opened again.
    pub(crate) fn way(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// The same at this moment, for what changes though its tasks stand still.
    fn now<T>(
        &self,
        parse: fn(&fdinfo::FdInfo) -> std::result::Result<T, crate::proc::Malformed>,
    ) -> Result<T> {
        let parse = |text: &[u8]| parse(&fdinfo::parse(text)?);
        read::parsed(self.pid, &format!("fdinfo/{}", self.fd), parse)
    }

    /// What fdinfo says in the lines of its kind.
    fn tells<T>(
        &self,
        parse: fn(&fdinfo::FdInfo) -> std::result::Result<T, crate::proc::Malformed>,
    ) -> Result<T> {
        parse(&self.info).map_err(|malformed| {
            Error::new(ErrorKind::Kernel, "unexpected contents").with_source(malformed).of(self.pid)
        })
    }
}

/// What poll(2) can say of a kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Polled {
    /// Anything, errors and hang-ups among it.
    Anything,
    /// Never an error or a hang-up.
    NeverBroken,
    /// The same, and the answer depends on who asks.
    PerCaller,
}

/// One kind of open file: how it is recognised, described and made again.
pub(crate) trait FileKind: Record + Send + Sync {
    const POLLED: Polled = Polled::Anything;

    /// Is it of this kind?
    fn recognise(probe: &Probe) -> bool;

    /// Makes the record, or says why it cannot be restored.
    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>>;

    /// The path by which it was open: the caller may supply another file in its place.
    fn path(&self) -> Option<PathBuf> {
        None
    }

    /// It refers to tasks, and can only be made when they are there and have their memory.
    fn is_of_tasks(&self) -> bool {
        false
    }

    /// What has to be found out before there is any task.
    fn check(&self, _builder: &Builder<'_>) -> Result<()> {
        Ok(())
    }

    /// Makes a description like it. The flags that fcntl(2) can change are set afterwards.
    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd>;

    /// Sets going what must not go on without the tasks: the last thing before they run.
    fn start(&self, _file: BorrowedFd<'_>, _builder: &Builder<'_>) -> Result<()> {
        Ok(())
    }
}

/// A kind's record, without its type.
trait FileRecord: Send + Sync {
    fn polled(&self) -> Polled;
    fn path(&self) -> Option<PathBuf>;
    fn is_of_tasks(&self) -> bool;
    fn check(&self, builder: &Builder<'_>) -> Result<()>;
    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd>;
    fn start(&self, file: BorrowedFd<'_>, builder: &Builder<'_>) -> Result<()>;
}

impl<K: FileKind> FileRecord for K {
    fn polled(&self) -> Polled {
        K::POLLED
    }

    fn path(&self) -> Option<PathBuf> {
        FileKind::path(self)
    }

    fn is_of_tasks(&self) -> bool {
        FileKind::is_of_tasks(self)
    }

    fn check(&self, builder: &Builder<'_>) -> Result<()> {
        FileKind::check(self, builder)
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        FileKind::build(self, common, builder)
    }

    fn start(&self, file: BorrowedFd<'_>, builder: &Builder<'_>) -> Result<()> {
        FileKind::start(self, file, builder)
    }
}

/// The record that a description has of this kind, if it has one.
type Loaded = Result<Option<Box<dyn FileRecord>>>;

/// One line of the list of kinds.
pub(crate) struct KindRegistration {
    pub(crate) record: RecordKind,
    polled: Polled,
    recognise: fn(&Probe) -> bool,
    describe: fn(&Probe, Owner, &mut Collector, &mut Report, &mut Records) -> Result<()>,
    load: fn(&Image, Owner) -> Loaded,
}

impl KindRegistration {
    const fn of<K: FileKind>() -> Self {
        Self {
            record: RecordKind::of::<K>(),
            polled: K::POLLED,
            recognise: K::recognise,
            describe: |probe, owner, collector, report, records| match K::describe(probe, collector)? {
                Ok(record) => records.put(owner, &record),
                Err(refusal) => {
                    report.refuse(refusal);
                    Ok(())
                }
            },
            load: |image, owner| {
                Ok(image.get::<K>(owner)?.map(|record| Box::new(record) as Box<dyn FileRecord>))
            },
        }
    }
}

/// Every kind of open file that can be restored; the first that recognises a file takes it.
pub(crate) const KINDS: &[KindRegistration] = &[
    KindRegistration::of::<external::ExternalFile>(),
    KindRegistration::of::<handler::HandledFile>(),
    KindRegistration::of::<regular::Regular>(),
    KindRegistration::of::<device::Device>(),
    KindRegistration::of::<pipe::PipeEnd>(),
    KindRegistration::of::<eventfd::EventFd>(),
    KindRegistration::of::<timerfd::TimerFd>(),
    KindRegistration::of::<signalfd::SignalFd>(),
    KindRegistration::of::<pidfd::PidFd>(),
    KindRegistration::of::<epoll::Epoll>(),
    KindRegistration::of::<inotify::Inotify>(),
    KindRegistration::of::<fanotify::Fanotify>(),
    KindRegistration::of::<sockets::UnixSocket>(),
];

/// All that is known of a description that has yet to be made.
struct Unmade {
    owner: Owner,
    common: Description,
    record: Box<dyn FileRecord>,
    locks: Option<DescriptionLocks>,
}

/// Restore: makes descriptions on demand, each once.
pub(crate) struct Builder<'i> {
    pub(crate) image: &'i Image,
    pub(crate) finder: Finder,
    pub(crate) inherited: Inherited,
    pub(crate) handlers: Handlers,
    /// The numbers of all tasks of the tree.
    tasks: BTreeSet<Pid>,
    /// Those that they have here, as soon as they exist.
    pids: BTreeMap<u32, Pid>,
    /// By the numbers that they had nobody here will find them.
    pub(crate) renumbered: bool,
    pipes: BTreeMap<u32, pipe::Ends>,
    /// pidfds of processes that are gone, made together with one that has been asked for.
    gone: BTreeMap<u32, OwnedFd>,
    /// Made by tasks, by the numbers of their descriptions.
    pub(crate) sockets: BTreeMap<u32, OwnedFd>,
    /// The number of the description that is being made.
    pub(crate) current: u32,
    waiting: Vec<Unmade>,
    made: BTreeMap<u32, (OwnedFd, Box<dyn FileRecord>)>,
}

impl<'i> Builder<'i> {
    pub(crate) fn new(image: &'i Image, finder: Finder, inherited: Inherited, tasks: BTreeSet<Pid>) -> Self {
        Self {
            image,
            finder,
            inherited,
            handlers: Handlers::default(),
            tasks,
            pids: BTreeMap::new(),
            renumbered: false,
            pipes: BTreeMap::new(),
            gone: BTreeMap::new(),
            sockets: BTreeMap::new(),
            current: 0,
            waiting: Vec::new(),
            made: BTreeMap::new(),
        }
    }

    /// Reads every description of the image, and makes those that need no task.
    pub(crate) fn make_all(&mut self) -> Result<()> {
        let owners: Vec<Owner> = self.image.owners::<Description>().collect();
        for owner in owners {
            let common: Description = self.image.require(owner)?;
            let record = KINDS.iter().find_map(|kind| (kind.load)(self.image, owner).transpose());
            let record = record.unwrap_or_else(|| {
                Err(Error::new(ErrorKind::Image, "an open file without its kind")
                    .about(Subject::Section(format!("{} {owner}", Description::NAME))))
            })?;
            record.check(self)?;
            let locks: Option<DescriptionLocks> = self.image.get(owner)?;
            locks.iter().try_for_each(DescriptionLocks::check)?;
            let unmade = Unmade { owner, common, record, locks };
            match unmade.record.is_of_tasks() {
                true => self.waiting.push(unmade),
                false => self.make(unmade)?,
            }
        }
        for (number, ends) in &self.pipes {
            ends.settle().about(|| Subject::Section(format!("{} {number}", Pipe::NAME)))?;
        }
        self.finder.finish()
    }

    /// Makes the others, now that there are tasks; `pids` has their numbers here, by those that they know.
    pub(crate) fn make_of_tasks(&mut self, pids: BTreeMap<u32, Pid>) -> Result<()> {
        self.pids = pids;
        std::mem::take(&mut self.waiting).into_iter().try_for_each(|unmade| self.make(unmade))?;
        self.pipes.clear(); // no watch must hear of it
        Ok(())
    }

    fn make(&mut self, Unmade { owner, common, record, locks }: Unmade) -> Result<()> {
        let section = || Subject::Section(format!("{} {owner}", Description::NAME));
        self.current = owner.0;
        let supplied = record.path().and_then(|path| self.inherited.take_for(path, common.flags()));
        let built = supplied.unwrap_or_else(|| record.build(&common, self)).map_err(|error| {
            match error.raw_errno() {
                Some(Errno::EMFILE) => error.with_hint("RLIMIT_NOFILE of the restoring process is too low"),
                _ => error,
            }
        });
        let file = built.about(section)?;
        set_flags(&file, common.flags()).about(section)?;
        locks.iter().try_for_each(|locks| locks.take(&file)).about(section)?;
        self.made.insert(owner.0, (file, record));
        Ok(())
    }

    /// A description that has been made.
    pub(crate) fn description(&self, number: u32) -> Result<BorrowedFd<'_>> {
        self.made
            .get(&number)
            .map(|(file, _)| file.as_fd())
            .ok_or_else(|| Error::new(ErrorKind::Image, format!("open file description {number} is missing")))
    }

    fn polled(&self, number: u32) -> Result<Polled> {
        let missing = || Error::new(ErrorKind::Image, format!("open file description {number} is missing"));
        self.made.get(&number).map(|(_, record)| record.polled()).ok_or_else(missing)
    }

    /// Sets everything going that has waited for the tasks.
    pub(crate) fn start(&self, watches: &BTreeMap<u32, Watches>) -> Result<()> {
        for (epoll, watches) in watches {
            watches.silence(self.description(*epoll)?)?;
        }
        self.made.values().try_for_each(|(file, record)| record.start(file.as_fd(), self))
    }
}

/// Sets those flags that not every way of making a file takes.
fn set_flags(file: &OwnedFd, wanted: OFlag) -> Result<()> {
    const SETTABLE: OFlag =
        OFlag::O_APPEND.union(OFlag::O_NONBLOCK).union(OFlag::O_DIRECT).union(OFlag::O_NOATIME);
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).call("fcntl(F_GETFL)")?);
    if (flags ^ wanted).intersects(SETTABLE) && !wanted.contains(OFlag::O_PATH) {
        let flags = flags.difference(SETTABLE) | wanted & SETTABLE;
        fcntl(file, FcntlArg::F_SETFL(flags)).call("fcntl(F_SETFL)")?;
    }
    Ok(())
}

/// The status flags that open(2) takes as they are and that F_GETFL shows again.
const OPEN_FLAGS: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_APPEND)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_DIRECT)
    .union(OFlag::O_NOATIME)
    .union(OFlag::O_SYNC)
    .union(OFlag::O_DSYNC)
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_PATH);
