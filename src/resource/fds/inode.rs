//! What an inode is but for its contents: whose, with which permissions, and its times; of files that are made again.

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, stat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, chown};

use crate::error::{Context, NameCall, Result};
use crate::image::{Decode, Encode};

#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
pub(super) struct Inode {
    /// Type and permissions.
    pub(super) mode: u32,
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) accessed: Time,
    pub(super) modified: Time,
}

/// Seconds and nanoseconds.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time(pub(super) i64, pub(super) i64);

impl From<Time> for TimeSpec {
    fn from(Time(seconds, nanoseconds): Time) -> Self {
        TimeSpec::new(seconds, nanoseconds)
    }
}

impl Inode {
    pub(super) fn of(stat: &FileStat) -> Self {
        Self {
            mode: stat.st_mode,
            user: stat.st_uid,
            group: stat.st_gid,
            accessed: Time(stat.st_atime, stat.st_atime_nsec),
            modified: Time(stat.st_mtime, stat.st_mtime_nsec),
        }
    }

    pub(super) fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.mode & SFlag::S_IFMT.bits())
    }

    /// Makes it belong to whom it did; `way` is a link of /proc to it.
    pub(super) fn own(&self, way: &str) -> Result<()> {
        let now = stat(way).call("stat")?;
        if (now.st_uid, now.st_gid) == (self.user, self.group) {
            return Ok(());
        }
        chown(way, Some(Uid::from_raw(self.user)), Some(Gid::from_raw(self.group)))
            .call("chown")
            .hint("a file of another user or group needs CAP_CHOWN")
    }

    /// Permissions and times, which come last: nothing more will be opened, nor written.
    pub(super) fn settle(&self, way: &str) -> Result<()> {
        let mode = Mode::from_bits_truncate(self.mode);
        fchmodat(AT_FDCWD, way, mode, FchmodatFlags::FollowSymlink).call("fchmodat")?;
        let (accessed, modified) = (self.accessed.into(), self.modified.into());
        utimensat(AT_FDCWD, way, &accessed, &modified, UtimensatFlags::FollowSymlink).call("utimensat")
    }
}
