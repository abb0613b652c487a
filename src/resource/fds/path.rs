//! Files that can be found again: by a path, and only accepted when it still leads to the file that it was; or
//! made again, if they have no name any more.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, SFlag, fstat, lstat};

use super::build_id;
use super::ghost::{self, Ghosts, Revived};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Image};

/// A file in the file system.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FileRef {
    Named(Named),
    /// Nothing leads to it any more: the owner of the section of its [`Ghost`](super::ghost::Ghost).
    Ghost(u32),
}

/// A named file and what must not have changed about it.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Named {
    path: Bytes,
    /// The type bits of its mode (S_IFMT).
    kind: u32,
    /// Of a regular file.
    size: u64,
    /// When its contents were last changed: seconds and nanoseconds.
    modified: (i64, i64),
    build_id: BuildId,
    /// Of a device.
    device: u64,
}

/// What the linker calls a program or a library.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum BuildId {
    /// The checkpoint was not told to look.
    Unread,
    /// It is no program, or has none.
    None,
    Is(Bytes),
}

/// Why a file cannot be brought back, and what can be done about it.
#[derive(Debug)]
pub(crate) struct Reason {
    pub(crate) text: Cow<'static, str>,
    hint: Option<&'static str>,
}

impl<T: Into<Cow<'static, str>>> From<T> for Reason {
    fn from(text: T) -> Self {
        Self { text: text.into(), hint: None }
    }
}

impl Reason {
    pub(super) fn hint(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }

    pub(crate) fn refusal(self, pid: Pid, subject: Subject) -> Refusal {
        Refusal { hint: self.hint.map(Cow::from), ..Refusal::new(pid, subject, self.text) }
    }
}

/// How files that have changed since the checkpoint are taken on restore.
///
/// ```
/// use cryosleep::{FileValidation, Restore};
/// # fn restore() -> cryosleep::Result<()> {
/// Restore::from("/var/lib/images/job").file_validation(FileValidation::Type).run()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileValidation {
    /// A regular file must have the size that it had: the default.
    #[default]
    Size,
    /// A file must be of the same type; its contents may have changed in any way.
    Type,
    /// A regular file must have the size that it had, and not have been written to since.
    Modified,
    /// A program or library that was mapped or open must be of the same build (NT_GNU_BUILD_ID), other files must have
    /// the size that they had. The checkpoint has to be told:
    /// [`Checkpoint::file_validation`](crate::Checkpoint::file_validation).
    BuildId,
}

const OTHER_NAMES: &str = "its name no longer exists: it was deleted, but has other names";

impl FileRef {
    /// Records the file that `stat` is of, that goes by `name` ("/path", or "/path (deleted)") and that `way`, some
    /// link of /proc, leads to.
    pub(crate) fn describe(
        name: &[u8],
        stat: &FileStat,
        way: &str,
        ghosts: &mut Ghosts,
    ) -> Result<std::result::Result<Self, Reason>> {
        if ghosts.takes(name, stat) {
            return Ok(ghosts.number(name, stat, way)?.map(Self::Ghost));
        }
        Ok(Self::named(name, stat).map_err(|reason| match reason {
            OTHER_NAMES => Reason::from(reason)
                .hint("Checkpoint::link_remap(LinkRemap::Link) gives such a file another name beside it"),
            _ => reason.into(),
        }))
    }

    /// The same for a file that must have a name. The reason if that name does not lead to it.
    pub(crate) fn named(path: &[u8], stat: &FileStat) -> std::result::Result<Self, &'static str> {
        if !path.starts_with(b"/") {
            return Err("it has no name in the file system");
        }
        match lstat(OsStr::from_bytes(path)) {
            Err(_) if stat.st_nlink == 0 => Err("it was deleted"),
            Err(_) if path.ends_with(ghost::DELETED) => Err(OTHER_NAMES),
            Err(_) => Err("its name cannot be reached: another file system may be mounted over it"),
            Ok(named) if named.st_dev != stat.st_dev => {
                Err("its name now leads to another file: another file system may be mounted over it")
            }
            Ok(named) if (named.st_dev, named.st_ino) != (stat.st_dev, stat.st_ino) => {
                Err("its name now leads to another file")
            }
            Ok(_) => Ok(Self::Named(Named {
                path: path.to_vec().into(),
                kind: stat.st_mode & SFlag::S_IFMT.bits(),
                size: if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits() {
                    stat.st_size as u64
                } else {
                    0
                },
                modified: (stat.st_mtime, stat.st_mtime_nsec),
                build_id: BuildId::Unread,
                device: stat.st_rdev,
            })),
        }
    }

    #[cfg(test)]
    pub(super) fn of_test(path: &std::path::Path, kind: u32) -> Self {
        let (modified, build_id) = ((0, 0), BuildId::Unread);
        let path = path.as_os_str().as_bytes().to_vec().into();
        Self::Named(Named { path, kind, size: 0, modified, build_id, device: 0 })
    }

    pub(crate) fn subject(&self) -> Subject {
        match self {
            Self::Named(named) => named.subject(),
            Self::Ghost(number) => ghost::subject_of(*number),
        }
    }

    /// By its name.
    pub(super) fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Named(named) => Some(named.path()),
            Self::Ghost(_) => None,
        }
    }

    /// Finds one that has a name, whatever it contains by now. It may be a symbolic link itself.
    pub(super) fn find(&self) -> Result<OwnedFd> {
        match self {
            Self::Named(named) => named.open(OFlag::O_PATH | OFlag::O_NOFOLLOW, FileValidation::Type),
            Self::Ghost(_) => {
                Err(Error::new(ErrorKind::Image, "a file without a name").about(self.subject()))
            }
        }
    }

    /// Is it the root directory, by its name?
    pub(crate) fn is_root(&self) -> bool {
        matches!(self, Self::Named(named) if *named.path == *b"/")
    }
}

/// What only the flags of a description that O_TMPFILE has made have.
pub(super) const TMPFILE: OFlag = OFlag::O_TMPFILE.difference(OFlag::O_DIRECTORY);

/// Restore: where files are found.
pub(crate) struct Finder {
    validation: FileValidation,
    ghosts: Revived,
}

impl Finder {
    pub(crate) fn new(image: &Image, validation: FileValidation) -> Result<Self> {
        Ok(Self { validation, ghosts: Revived::make(image)? })
    }

    #[cfg(test)]
    pub(super) fn of_nothing() -> Self {
        Self { validation: FileValidation::default(), ghosts: Revived::default() }
    }

    /// Opens a file.
    pub(crate) fn open(&self, file: &FileRef, flags: OFlag) -> Result<OwnedFd> {
        match file {
            FileRef::Named(named) => named.open(flags - TMPFILE, self.validation),
            FileRef::Ghost(number) => self.ghosts.open(*number, flags),
        }
    }

    /// All files are open.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.ghosts.finish()
    }

    /// All memory is mapped.
    pub(crate) fn finish_mapped(&self) -> Result<()> {
        self.ghosts.finish_mapped()
    }
}

impl Named {
    fn path(&self) -> PathBuf {
        OsStr::from_bytes(&self.path).into()
    }

    fn subject(&self) -> Subject {
        Subject::Path(self.path())
    }

    /// Opens the file, and makes sure that it is the one. No symbolic link is followed on the way: the
    /// recorded path had none.
    fn open(&self, flags: OFlag, validation: FileValidation) -> Result<OwnedFd> {
        // openat2 is strict: nothing else goes with O_PATH.
        // Opening a fifo could wait for ever, opening a device could do anything.
        let now = lstat(&*self.path()).call("lstat").map_err(|error| self.explain(error))?;
        self.check_type(&now).about(|| self.subject())?;
        let more = if flags.contains(OFlag::O_PATH) { OFlag::empty() } else { OFlag::O_NOCTTY };
        let how =
            OpenHow::new().flags(flags | more | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let opened = openat2(nix::fcntl::AT_FDCWD, &*self.path(), how).call("openat2");
        let file = opened.map_err(|error| self.explain(error))?;
        self.check(&file, validation).about(|| self.subject())?;
        Ok(file)
    }

    fn explain(&self, error: Error) -> Error {
        let error = error.about(self.subject());
        match error.raw_errno() {
            Some(Errno::ENOENT | Errno::ENOTDIR) => error
                .with_kind(ErrorKind::Conflict)
                .with_hint("the file was there at the checkpoint: put it back"),
            Some(Errno::EISDIR | Errno::ENXIO) => {
                error.with_kind(ErrorKind::Conflict).with_hint("it is now a file of another type")
            }
            Some(Errno::ELOOP) => error
                .with_kind(ErrorKind::Conflict)
                .with_hint("the path now leads elsewhere, through a symbolic link"),
            _ => error,
        }
    }

    fn check_type(&self, now: &FileStat) -> Result<()> {
        if now.st_mode & SFlag::S_IFMT.bits() == self.kind && now.st_rdev == self.device {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Conflict, "it is now a file of another type"))
    }

    fn check(&self, file: impl AsFd, validation: FileValidation) -> Result<()> {
        let conflict = |reason: String| Err(Error::new(ErrorKind::Conflict, reason));
        let now = fstat(&file).call("fstat")?;
        self.check_type(&now)?;
        if self.kind == SFlag::S_IFREG.bits()
            && let Some(reason) = self.change(&file, &now, validation)?
        {
            return conflict(reason);
        }
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let leads_to = std::fs::read_link(path).call("readlink")?;
        if leads_to.as_os_str().as_bytes() != &*self.path {
            return conflict(format!("its path leads elsewhere: to {}", leads_to.display()));
        }
        Ok(())
    }

    /// What has changed about a regular file that must not have.
    fn change(&self, file: impl AsFd, now: &FileStat, validation: FileValidation) -> Result<Option<String>> {
        let resized = (now.st_size as u64 != self.size)
            .then(|| format!("its size has changed from {} to {} bytes", self.size, now.st_size));
        let touched = (now.st_mtime, now.st_mtime_nsec) != self.modified;
        Ok(match validation {
            FileValidation::Type => None,
            FileValidation::Size => resized,
            FileValidation::Modified => {
                resized.or(touched.then(|| "it has been written to since the checkpoint".into()))
            }
            FileValidation::BuildId => match &self.build_id {
                BuildId::Unread => {
                    Some("the checkpoint has not read its build id: see Checkpoint::file_validation()".into())
                }
                BuildId::None => resized,
                BuildId::Is(id) => {
                    let way = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
                    let same = matches!(build_id_of(&way)?, Some(now) if now == **id);
                    (!same).then(|| "it is of another build".into())
                }
            },
        })
    }

    pub(super) fn read_build_id(&mut self, way: &str) -> Result<()> {
        if self.kind == SFlag::S_IFREG.bits() {
            // What is made up while it is read (/proc, /sys) has no size.
            let id = if self.size > 0 { build_id_of(way)? } else { None };
            self.build_id = id.map_or(BuildId::None, |id| BuildId::Is(id.into()));
        }
        Ok(())
    }
}

fn build_id_of(way: &str) -> Result<Option<Vec<u8>>> {
    build_id::of(&ghost::open_quietly(way)?).call("pread")
}
