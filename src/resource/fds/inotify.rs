//! inotify(7): watches of files, by the numbers that the program knows them by.
//!
//! The kernel tells of a watch by a file handle (it holds an inode, which may have many names or none); the file is
//! found by that, and recorded by path. Events that wait to be read cannot be put back, so that an instance that has
//! some is refused. The number after the highest one is the next one again.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::inotify::{InitFlags, Inotify as New};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{chdir, fchdir};

use super::{Builder, Collector, Description, FileKind, FileRef, Polled, Probe};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::mountinfo::{self, Mount};
use crate::proc::{nameless, read};
use crate::sys::file;

#[derive(Encode, Decode, Debug)]
pub(crate) struct Inotify {
    /// By ascending number.
    watches: Vec<Watch>,
}

#[derive(Encode, Decode, Debug)]
struct Watch {
    number: i32,
    mask: u32,
    file: FileRef,
}

impl Record for Inotify {
    const TAG: Tag = Tag::new(b"FINO");
    const VERSION: u16 = 1;
    const NAME: &'static str = "inotify instance";
}

impl FileKind for Inotify {
    const POLLED: Polled = Polled::NeverBroken;

    fn recognise(probe: &Probe) -> bool {
        probe.name == b"anon_inode:inotify"
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        if file::readable_bytes(probe.file.as_fd()).call("ioctl(FIONREAD)")? != 0 {
            let refusal = probe.refusal("events wait to be read from it, which cannot be put back");
            return Ok(Err(refusal.hint("try again when the program has read them")));
        }
        let mut watches = Vec::new();
        for watch in probe.tells(nameless::watches)? {
            match collector.watched.find(&watch)? {
                Ok(file) => watches.push(Watch { number: watch.number, mask: watch.mask, file }),
                Err(reason) => {
                    let reason = format!("its watch {}: {reason}", watch.number);
                    return Ok(Err(probe.refusal(reason)));
                }
            }
        }
        // The newest is shown first.
        watches.sort_unstable_by_key(|watch| watch.number);
        Ok(Ok(Self { watches }))
    }

    fn check(&self, _: &Builder<'_>) -> Result<()> {
        let ascending = self.watches.windows(2).all(|two| two[0].number < two[1].number);
        if !ascending || self.watches.first().is_some_and(|first| first.number < 1) {
            return Err(Error::new(ErrorKind::Image, "inotify watches with numbers that cannot be"));
        }
        self.watches.iter().try_for_each(|watch| watch.open().map(drop))
    }

    fn build(&self, _: &Description, _: &mut Builder<'_>) -> Result<OwnedFd> {
        New::init(InitFlags::IN_CLOEXEC).call("inotify_init1").map(OwnedFd::from)
    }

    /// Only now: restoring opens and closes files, of which no watch must hear.
    fn start(&self, inotify: BorrowedFd<'_>, _: &Builder<'_>) -> Result<()> {
        self.watches.iter().try_for_each(|watch| watch.add(inotify))
    }
}

impl Watch {
    /// It may be as large as it likes: the program wants to hear of changes.
    fn open(&self) -> Result<OwnedFd> {
        self.file.find()
    }

    fn add(&self, inotify: BorrowedFd<'_>) -> Result<()> {
        let target = self.open()?;
        let way = CString::new(format!("/proc/self/fd/{}", target.as_raw_fd())).unwrap_or_default();
        file::set_next_watch(inotify, self.number).call("ioctl(INOTIFY_IOC_SETNEXTWD)")?;
        let number = file::add_watch(inotify, &way, self.mask).call("inotify_add_watch");
        let number = number.about(|| self.file.subject())?;
        match number == self.number {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Conflict, "two inotify watches lead to one file now")
                .about(self.file.subject())),
        }
    }
}

/// Finding watched files by their handles: needs the mounts, which are only read when there is a watch.
#[derive(Default)]
pub(super) struct Watched(Option<Mounts>);

struct Mounts {
    all: Vec<Mount>,
    /// Where the engine's thread was.
    here: OwnedFd,
}

impl Mounts {
    fn read() -> Result<Self> {
        // The working directory is about to be changed: that of the engine's thread, nobody else's.
        unshare(CloneFlags::CLONE_FS).call("unshare")?;
        let here = open(".", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).call("open")?;
        let own = Pid::from(std::process::id());
        Ok(Self { all: read::parsed(own, "mountinfo", mountinfo::parse)?, here })
    }

    /// Opening a directory of the mount would be an event for whoever watches that one; going there is none.
    fn open(&self, mount: &Mount, (kind, handle): (i32, &[u8])) -> nix::Result<OwnedFd> {
        chdir(OsStr::from_bytes(&mount.mount_point))?;
        let opened = file::open_handle(kind, handle);
        fchdir(&self.here)?;
        opened
    }
}

impl Watched {
    fn find(&mut self, watch: &nameless::Watch) -> Result<std::result::Result<FileRef, &'static str>> {
        let Some((kind, handle)) = &watch.handle else {
            return Ok(Err("its file system has no file handles"));
        };
        let mounts = match &mut self.0 {
            Some(known) => known,
            unread => unread.insert(Mounts::read()?),
        };
        let mut reason = "its file system is not mounted here";
        for mount in mounts.all.iter().filter(|mount| mount.device == watch.device) {
            let found = match mounts.open(mount, (*kind, handle)) {
                Ok(found) => found,
                Err(Errno::EPERM) => return Ok(Err("finding its file needs CAP_DAC_READ_SEARCH")),
                Err(_) => {
                    reason = "its file is gone, or cannot be found by its handle";
                    continue;
                }
            };
            let stat = fstat(&found).call("fstat")?;
            let path = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).call("readlink")?;
            match FileRef::named(path.as_os_str().as_bytes(), &stat) {
                Ok(file) if stat.st_ino == watch.ino => return Ok(Ok(file)),
                Ok(_) => reason = "its handle leads to another file",
                Err(why) => reason = why,
            }
        }
        Ok(Err(reason))
    }
}
