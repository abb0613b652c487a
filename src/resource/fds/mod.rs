//! Open files: fd tables, the open file descriptions that their slots refer to, and the places of the file
//! system that a process stands in.
//!
//! One description is one record, however many slots of however many processes refer to it: kcmp(2) tells.
//! The checkpoint looks at a description through a duplicate of its own (pidfd_getfd(2)), the restore makes
//! it in the calling process and hands it over by SCM_RIGHTS.

mod channel;
mod device;
mod ghost;
mod path;
mod pipe;
mod places;
mod regular;
mod table;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};

use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Decode, Encode, Image, Owner, Record, Records, Tag};
use crate::proc::{fdinfo, read};
use crate::resource::{RecordKind, Report};

pub(crate) use channel::Channel;
pub(crate) use ghost::{Ghost, Ghosts};
pub use path::FileValidation;
pub(crate) use path::{FileRef, Finder, Reason};
pub(crate) use pipe::Pipe;
pub(crate) use places::Places;
pub(crate) use table::{Collector, FdTable, FilePolicy, open_fds};

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
}

impl Probe {
    fn new(pid: Pid, fd: RawFd, file: OwnedFd) -> Result<Self> {
        let name = read::link(pid, &format!("fd/{fd}"))?;
        let stat = fstat(&file).call("fstat")?;
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).call("fcntl")?);
        Ok(Self { pid, fd, file, stat, name, flags })
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

    /// By what it can be opened again.
    pub(crate) fn way(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    fn fdinfo(&self) -> Result<fdinfo::FdInfo> {
        read::parsed(self.pid, &format!("fdinfo/{}", self.fd), fdinfo::parse)
    }

    /// Refuses what no kind restores yet.
    fn refuse_extras(&self, report: &mut Report) -> Result<()> {
        if self.flags.contains(OFlag::O_PATH) {
            return Ok(()); // it has neither, and cannot be asked
        }
        if crate::sys::file_owner(&self.file).call("fcntl(F_GETOWN)")? != 0 {
            report.refuse(self.refusal("it has an owner (F_SETOWN), which is not supported yet"));
        }
        if self.flags.contains(OFlag::O_ASYNC) {
            report.refuse(self.refusal("O_ASYNC: signals on input or output are not supported yet"));
        }
        Ok(())
    }
}

/// One kind of open file: how it is recognised, described and made again.
pub(crate) trait FileKind: Record {
    /// Is it of this kind?
    fn recognise(probe: &Probe) -> bool;

    /// Makes the record, or says why it cannot be restored.
    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>>;

    /// Makes a description like it.
    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd>;

    /// It refers to tasks, and can only be made when they are there and have their memory.
    fn is_of_tasks(&self) -> bool {
        false
    }
}

/// One line of the list of kinds.
pub(crate) struct KindRegistration {
    pub(crate) record: RecordKind,
    recognise: fn(&Probe) -> bool,
    describe: fn(&Probe, Owner, &mut Collector, &mut Report, &mut Records) -> Result<()>,
    build: fn(&Image, Owner, &Description, &mut Builder<'_>) -> Result<Option<Built>>,
}

/// What became of making a description.
enum Built {
    Now(OwnedFd),
    Later,
}

impl KindRegistration {
    const fn of<K: FileKind>() -> Self {
        Self {
            record: RecordKind::of::<K>(),
            recognise: K::recognise,
            describe: |probe, owner, collector, report, records| match K::describe(probe, collector)? {
                Ok(record) => records.put(owner, &record),
                Err(refusal) => {
                    report.refuse(refusal);
                    Ok(())
                }
            },
            build: |image, owner, common, builder| {
                let Some(record) = image.get::<K>(owner)? else { return Ok(None) };
                if record.is_of_tasks() && !builder.tasks_exist {
                    return Ok(Some(Built::Later));
                }
                let made = record.build(common, builder)?;
                set_flags(&made, common.flags())?;
                Ok(Some(Built::Now(made)))
            },
        }
    }
}

/// Every kind of open file that can be restored; the first that recognises a file takes it.
pub(crate) const KINDS: &[KindRegistration] = &[
    KindRegistration::of::<regular::Regular>(),
    KindRegistration::of::<device::Device>(),
    KindRegistration::of::<pipe::PipeEnd>(),
];

/// Why a file of no known kind is refused: what it is, in words.
fn unknown_kind(probe: &Probe) -> Refusal {
    let what = match (probe.kind(), probe.name.as_slice()) {
        (SFlag::S_IFSOCK, _) => "sockets are not supported yet".into(),
        (SFlag::S_IFIFO, _) => "named pipes are not supported yet".into(),
        (SFlag::S_IFCHR, name) if name.starts_with(b"/dev/pts/") || name.starts_with(b"/dev/tty") => {
            "terminals are not supported yet".into()
        }
        (SFlag::S_IFCHR, _) => "this character device is not supported".into(),
        (SFlag::S_IFBLK, _) => "block devices are not supported".into(),
        (_, name) => match name.strip_prefix(b"anon_inode:") {
            Some(kind) => format!("{} is not supported yet", String::from_utf8_lossy(kind)),
            None => "this kind of file is not supported".to_owned(),
        },
    };
    probe.refusal(what)
}

/// Restore: makes descriptions on demand, each once.
pub(crate) struct Builder<'i> {
    pub(crate) image: &'i Image,
    pub(crate) finder: Finder,
    pipes: std::collections::BTreeMap<u32, pipe::Ends>,
    made: std::collections::BTreeMap<u32, OwnedFd>,
    later: Vec<Owner>,
    tasks_exist: bool,
}

impl<'i> Builder<'i> {
    pub(crate) fn new(image: &'i Image, finder: Finder) -> Self {
        Self {
            image,
            finder,
            pipes: Default::default(),
            made: Default::default(),
            later: Vec::new(),
            tasks_exist: false,
        }
    }

    /// Makes every description of the image, but for those that need the tasks.
    pub(crate) fn make_all(&mut self) -> Result<()> {
        let owners: Vec<Owner> = self.image.owners::<Description>().collect();
        owners.into_iter().try_for_each(|owner| self.make(owner))?;
        self.finder.finish()
    }

    /// Makes the others.
    pub(crate) fn make_of_tasks(&mut self) -> Result<()> {
        self.tasks_exist = true;
        std::mem::take(&mut self.later).into_iter().try_for_each(|owner| self.make(owner))
    }

    fn make(&mut self, owner: Owner) -> Result<()> {
        let common: Description = self.image.require(owner)?;
        let built = KINDS.iter().find_map(|kind| (kind.build)(self.image, owner, &common, self).transpose());
        let built = built.unwrap_or_else(|| {
            Err(Error::new(ErrorKind::Image, "an open file without its kind")
                .about(Subject::Section(format!("{} {owner}", Description::NAME))))
        })?;
        match built {
            Built::Now(made) => drop(self.made.insert(owner.0, made)),
            Built::Later => self.later.push(owner),
        }
        Ok(())
    }

    /// A description that has been made.
    pub(crate) fn description(&self, number: u32) -> Result<BorrowedFd<'_>> {
        self.made
            .get(&number)
            .map(AsFd::as_fd)
            .ok_or_else(|| Error::new(ErrorKind::Image, format!("open file description {number} is missing")))
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
