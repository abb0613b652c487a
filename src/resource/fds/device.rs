//! The character devices that have no state of their own: null, zero, full, random, urandom; and kmsg for writing,
//! since only readers have a place in it.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, SFlag, lstat, major, minor};

use super::{Builder, Collector, Description, FileKind, FileRef, OPEN_FLAGS, Probe};
use crate::error::{Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Device(FileRef);

impl Record for Device {
    const TAG: Tag = Tag::new(b"FDEV");
    const VERSION: u16 = 1;
    const NAME: &'static str = "stateless character device";
}

/// Documentation/admin-guide/devices.txt: null, zero, full, random and urandom of major 1.
const STATELESS: [u64; 5] = [3, 5, 7, 8, 9];
const KMSG: u64 = 11;

/// By which path a device may be opened again that can no longer be reached by its own: one that was deleted, or has
/// another one in its place.
///
/// ```
/// use cryosleep::{Checkpoint, DevicePaths};
/// # fn save(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).device_paths(DevicePaths::Any).write_to("/var/lib/images/job")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DevicePaths {
    /// None: it is refused. The default.
    #[default]
    Same,
    /// That of any file in `/dev` that is the same device. What `/proc/PID/fd` says of it changes.
    Any,
}

/// The same device in /dev.
fn elsewhere(device: &FileStat) -> Option<FileRef> {
    let paths = std::fs::read_dir("/dev").ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let same = |path: PathBuf| {
        let stat = lstat(&path).ok()?;
        let is =
            (stat.st_rdev, stat.st_mode & SFlag::S_IFMT.bits()) == (device.st_rdev, SFlag::S_IFCHR.bits());
        FileRef::named(path.as_os_str().as_bytes(), &stat).ok().filter(|_| is)
    };
    paths.filter_map(same).next()
}

impl FileKind for Device {
    fn recognise(probe: &Probe) -> bool {
        let device = probe.stat.st_rdev;
        let writes = probe.flags & OFlag::O_ACCMODE == OFlag::O_WRONLY;
        let stateless = STATELESS.contains(&minor(device)) || (minor(device) == KMSG && writes);
        probe.kind() == SFlag::S_IFCHR && major(device) == 1 && stateless
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        Ok(match collector.file(probe)? {
            Err(refusal) if collector.policy.device_paths == DevicePaths::Any => {
                elsewhere(&probe.stat).ok_or(refusal)
            }
            file => file,
        }
        .map(Self))
    }

    fn path(&self) -> Option<PathBuf> {
        self.0.path()
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        builder.finder.open(&self.0, common.flags() & OPEN_FLAGS)
    }
}
