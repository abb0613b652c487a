//! Finding watched files. inotify and fanotify tell of them by file handles (they hold inodes, which may have many
//! names or none), or by the mount or the file system that they are of.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{chdir, fchdir};

use super::FileRef;
use crate::Pid;
use crate::error::{NameCall, Result};
use crate::proc::mountinfo::{self, Mount};
use crate::proc::{Device, nameless, read};
use crate::sys::file;

/// Needs the mounts, which are only read when there is something to be found.
#[derive(Default)]
pub(super) struct Watched(Option<Mounts>);

type Found = Result<std::result::Result<FileRef, &'static str>>;

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

    /// The directory that a mount is mounted on, unless another one is mounted over it.
    fn point(&self, mount: &Mount) -> Found {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let point = open(OsStr::from_bytes(&mount.mount_point), flags, Mode::empty());
        let Ok(point) = point else { return Ok(Err("its mount cannot be reached")) };
        let number = super::ghost::mount_of(&point)?;
        if number != mount.id {
            return Ok(Err("another file system is mounted over its mount"));
        }
        Ok(FileRef::named(&mount.mount_point, &fstat(&point).call("fstat")?))
    }
}

impl Watched {
    fn mounts(&mut self) -> Result<&Mounts> {
        Ok(match &mut self.0 {
            Some(known) => known,
            unread => unread.insert(Mounts::read()?),
        })
    }

    /// The file that this is the handle of.
    pub(super) fn find(&mut self, object: &nameless::Object) -> Found {
        let Some((kind, handle)) = &object.handle else {
            return Ok(Err("its file system has no file handles"));
        };
        let mounts = self.mounts()?;
        let mut reason = "its file system is not mounted here";
        for mount in mounts.all.iter().filter(|mount| mount.device == object.device) {
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
                Ok(file) if stat.st_ino == object.ino => return Ok(Ok(file)),
                Ok(_) => reason = "its handle leads to another file",
                Err(why) => reason = why,
            }
        }
        Ok(Err(reason))
    }

    /// Where the mount of this number is.
    pub(super) fn mount(&mut self, number: u32) -> Found {
        self.any_mount(|mount| mount.id == number)
    }

    /// Where a file system is mounted.
    pub(super) fn file_system(&mut self, device: Device) -> Found {
        self.any_mount(|mount| mount.device == device)
    }

    fn any_mount(&mut self, is: impl Fn(&Mount) -> bool) -> Found {
        let mounts = self.mounts()?;
        let mut reason = "its file system is not mounted here";
        for mount in mounts.all.iter().filter(|mount| is(mount)) {
            match mounts.point(mount)? {
                Ok(file) => return Ok(Ok(file)),
                Err(why) => reason = why,
            }
        }
        Ok(Err(reason))
    }
}
