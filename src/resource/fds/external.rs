//! What an image does not contain: open files that the caller names at a checkpoint and supplies at a restore.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat, major, makedev, minor};

use super::{Builder, Chosen, Collector, Description, FileKind, Probe};
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::{Pid, sys};

/// An open file that is not part of an image: the one side names it, the other supplies another in its place.
///
/// ```no_run
/// use cryosleep::{Checkpoint, External, Restore};
/// // The target's output goes to a pipe, which a logger reads.
/// let log = External::Pipe(3811);
/// Checkpoint::of(4711u32).external(log.clone()).write_to("/var/lib/images/job")?;
/// # fn connect_to_logger() -> std::os::fd::OwnedFd { std::io::pipe().unwrap().1.into() }
/// Restore::from("/var/lib/images/job").inherit(log, connect_to_logger()).run()?;
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum External {
    /// A pipe, both ends of it, by its inode number: what `/proc/PID/fd/N` calls `pipe:[3811]`.
    Pipe(u64),
    /// A socket, by its inode number: what `/proc/PID/fd/N` calls `socket:[3811]`.
    Socket(u64),
    /// Whatever is open by this path: a file, a device.
    File(PathBuf),
    /// Whatever is open of this inode, by whatever name: as stat(2) says it.
    Inode {
        /// Of the device that its file system is on.
        major: u64,
        /// The same.
        minor: u64,
        /// Its number there.
        inode: u64,
    },
    /// The same, by the mount that it was opened through: `mnt_id` of `/proc/PID/fdinfo/N`.
    OfMount {
        /// The mount's number.
        mount: u32,
        /// The inode's number.
        inode: u64,
    },
    /// A character or block device, by the number that it has, whatever its path is.
    Device {
        /// Which driver's.
        major: u64,
        /// Which of them.
        minor: u64,
    },
    /// What this descriptor of this task refers to, and all that share it.
    Fd {
        /// The task, by the number that the caller knows it by.
        pid: Pid,
        /// Its descriptor.
        fd: RawFd,
    },
    /// Only for a restore: what [`Checkpoint::external_as`](crate::Checkpoint::external_as) has given this name.
    Name(String),
}

/// As `/proc/PID/fd/N` says it, where it does.
impl fmt::Display for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.key()).fmt(f)
    }
}

impl External {
    /// What stands for it in an image, and is different for each.
    pub(crate) fn key(&self) -> Bytes {
        let text = match self {
            External::File(path) => return path.as_os_str().as_bytes().to_vec().into(),
            External::Pipe(inode) => format!("pipe:[{inode}]"),
            External::Socket(inode) => format!("socket:[{inode}]"),
            External::Inode { major, minor, inode } => format!("inode:[{major}:{minor}:{inode}]"),
            External::OfMount { mount, inode } => format!("file:[{mount}:{inode}]"),
            External::Device { major, minor } => format!("device:[{major}:{minor}]"),
            External::Fd { pid, fd } => format!("fd:[{pid}:{fd}]"),
            External::Name(name) => format!("name:{name}"),
        };
        text.into_bytes().into()
    }

    /// Is it this description? Pipes are their own affair: it takes all of their ends to say what is outside.
    pub(super) fn is(&self, probe: &Probe) -> bool {
        let stat = &probe.stat;
        match self {
            External::Pipe(_) | External::Name(_) => false,
            External::Socket(inode) => probe.kind() == SFlag::S_IFSOCK && stat.st_ino == *inode,
            External::File(path) => probe.path().as_ref() == Some(path),
            External::Inode { major, minor, inode } => {
                (stat.st_dev, stat.st_ino) == (makedev(*major, *minor), *inode)
            }
            External::OfMount { mount: of, inode } => (probe.info.mnt_id, stat.st_ino) == (*of, *inode),
            External::Device { major: one, minor: two } => {
                let device = matches!(probe.kind(), SFlag::S_IFCHR | SFlag::S_IFBLK);
                device && (major(stat.st_rdev), minor(stat.st_rdev)) == (*one, *two)
            }
            External::Fd { pid, fd } => {
                matches!(sys::kcmp_file((*pid, *fd), (probe.pid, probe.fd)), Ok(Ordering::Equal))
            }
        }
    }
}

/// What a checkpoint does about pipes with an end outside of the tree.
///
/// ```
/// use cryosleep::{Checkpoint, OuterPipes};
/// # fn piped(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).outer_pipes(OuterPipes::External).write_to("/var/lib/images/job")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OuterPipes {
    /// They are refused, unless named by [`External::Pipe`]: the default.
    #[default]
    Refuse,
    /// All of them are taken as if they had been named.
    External,
}

/// What can be done about a file that cannot be part of an image.
pub(super) const HINT: &str =
    "leave it out by Checkpoint::external(External::File(..)), and supply it by Restore::inherit()";

/// The same for one that has no path.
pub(crate) const NAMELESS_HINT: &str = "leave it out by Checkpoint::external(External::Fd { .. }), and supply it by \
     Restore::inherit(); or bring a FileHandler for its kind";

/// A description that the caller supplies.
#[derive(Encode, Decode, Debug)]
pub(crate) struct ExternalFile {
    key: Bytes,
}

impl Record for ExternalFile {
    const TAG: Tag = Tag::new(b"FEXT");
    const VERSION: u16 = 1;
    const NAME: &'static str = "external file";
}

impl FileKind for ExternalFile {
    fn recognise(probe: &Probe) -> bool {
        matches!(probe.chosen, Chosen::External(_))
    }

    fn describe(probe: &Probe, _: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        match &probe.chosen {
            Chosen::External(key) => Ok(Ok(Self { key: key.clone() })),
            _ => Err(Error::new(ErrorKind::Kernel, "nobody supplies this file")),
        }
    }

    fn check(&self, builder: &Builder<'_>) -> Result<()> {
        builder.inherited.has(&self.key)
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        builder.inherited.take(&self.key, common.flags())
    }
}

/// Restore: what the caller has supplied.
#[derive(Debug, Default)]
pub(crate) struct Inherited(BTreeMap<Bytes, Supplied>);

#[derive(Debug)]
struct Supplied {
    file: OwnedFd,
    /// It has become a description of the tasks.
    given: bool,
}

impl Inherited {
    pub(crate) fn add(&mut self, key: &External, file: OwnedFd) {
        self.0.insert(key.key(), Supplied { file, given: false });
    }

    /// In place of the file of this path, if there is one.
    pub(super) fn take_for(&mut self, path: PathBuf, flags: OFlag) -> Option<Result<OwnedFd>> {
        let key = External::File(path).key();
        self.0.contains_key(&key).then(|| self.take(&key, flags))
    }

    pub(super) fn has(&self, key: &Bytes) -> Result<()> {
        if self.0.contains_key(key) {
            return Ok(());
        }
        let name = String::from_utf8_lossy(key);
        Err(Error::new(ErrorKind::Conflict, format!("{name} is not part of the image")).with_hint(
            "it was external at the checkpoint: supply it with Restore::inherit(), by the same External",
        ))
    }

    /// A description for the tasks: the one supplied, or (for a second one, or for the other direction) another of the
    /// same file.
    pub(super) fn take(&mut self, key: &Bytes, flags: OFlag) -> Result<OwnedFd> {
        self.has(key)?;
        let missing = || Error::new(ErrorKind::Conflict, "it is not part of the image");
        let supplied = self.0.get_mut(key).ok_or_else(missing)?;
        let has = OFlag::from_bits_retain(fcntl(&supplied.file, FcntlArg::F_GETFL).call("fcntl(F_GETFL)")?);
        let kind = SFlag::from_bits_truncate(fstat(&supplied.file).call("fstat")?.st_mode) & SFlag::S_IFMT;
        let fits = (has ^ flags) & (OFlag::O_ACCMODE | OFlag::O_PATH) == OFlag::empty();
        // There is no other way to a socket, or to a file without a type, which has never had a name.
        if !supplied.given && fits || kind == SFlag::S_IFSOCK || kind.is_empty() {
            supplied.given = true;
            return supplied.file.try_clone().call("fcntl");
        }
        let way = format!("/proc/self/fd/{}", supplied.file.as_raw_fd());
        let wanted = match flags.contains(OFlag::O_PATH) {
            true => OFlag::O_PATH,
            false => flags & (OFlag::O_ACCMODE | OFlag::O_APPEND | OFlag::O_NONBLOCK) | OFlag::O_NOCTTY,
        };
        open(way.as_str(), wanted | OFlag::O_CLOEXEC, Mode::empty()).call("open")
    }
}
