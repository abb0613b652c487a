//! What an image does not contain: open files that the caller names at a checkpoint and supplies at a restore.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::{Builder, Collector, Description, FileKind, Probe};
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Bytes, Decode, Encode, Record, Tag};

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
    /// A pipe, by its inode number: what `/proc/PID/fd/N` calls `pipe:[3811]`.
    Pipe(u64),
    /// Whatever is open by this path: a file, a device.
    File(PathBuf),
}

/// As `/proc/PID/fd/N` says it.
impl fmt::Display for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            External::Pipe(inode) => write!(f, "pipe:[{inode}]"),
            External::File(path) => path.display().fmt(f),
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

/// A description that the caller supplies, by the path that it had.
#[derive(Encode, Decode, Debug)]
pub(crate) struct ExternalFile {
    path: Bytes,
}

impl Record for ExternalFile {
    const TAG: Tag = Tag::new(b"FEXT");
    const VERSION: u16 = 1;
    const NAME: &'static str = "external file";
}

impl FileKind for ExternalFile {
    fn recognise(probe: &Probe) -> bool {
        probe.external
    }

    fn describe(probe: &Probe, _: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        Ok(Ok(Self { path: probe.name.clone().into() }))
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        let key = External::File(std::ffi::OsStr::from_bytes(&self.path).into());
        builder.inherited.take(&key, common.flags())
    }
}

/// Restore: what the caller has supplied.
#[derive(Debug, Default)]
pub(crate) struct Inherited(BTreeMap<External, Supplied>);

#[derive(Debug)]
struct Supplied {
    file: OwnedFd,
    /// It has become a description of the tasks.
    given: bool,
}

impl Inherited {
    pub(crate) fn add(&mut self, key: External, file: OwnedFd) {
        self.0.insert(key, Supplied { file, given: false });
    }

    /// In place of the file of this path, if there is one.
    pub(super) fn take_for(&mut self, path: PathBuf, flags: OFlag) -> Option<Result<OwnedFd>> {
        let key = External::File(path);
        self.0.contains_key(&key).then(|| self.take(&key, flags))
    }

    /// A description for the tasks: the one supplied, or (for a second one, or for the other direction) another of the
    /// same file.
    pub(super) fn take(&mut self, key: &External, flags: OFlag) -> Result<OwnedFd> {
        let supplied = self.0.get_mut(key).ok_or_else(|| {
            Error::new(ErrorKind::Conflict, format!("{key} is not part of the image")).with_hint(format!(
                "it was external at the checkpoint: supply it with Restore::inherit() for {key:?}"
            ))
        })?;
        let has = OFlag::from_bits_retain(fcntl(&supplied.file, FcntlArg::F_GETFL).call("fcntl(F_GETFL)")?);
        let kind = SFlag::from_bits_truncate(fstat(&supplied.file).call("fstat")?.st_mode) & SFlag::S_IFMT;
        let fits = (has ^ flags) & OFlag::O_ACCMODE == OFlag::empty();
        // There is no other way to a socket.
        if !supplied.given && fits || kind == SFlag::S_IFSOCK {
            supplied.given = true;
            return supplied.file.try_clone().call("fcntl");
        }
        let way = format!("/proc/self/fd/{}", supplied.file.as_raw_fd());
        let wanted = flags & (OFlag::O_ACCMODE | OFlag::O_APPEND | OFlag::O_NONBLOCK);
        let more = OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        open(way.as_str(), wanted | more, Mode::empty()).call("open")
    }
}
