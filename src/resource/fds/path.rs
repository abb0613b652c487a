//! A file that has a name: recorded by path, found again by path, and only accepted when it is still the
//! file that it was.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, SFlag, fstat, lstat};

use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};
use crate::image::{Bytes, Decode, Encode};

/// A named file and what must not have changed about it.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileRef {
    path: Bytes,
    /// The type bits of its mode (S_IFMT).
    kind: u32,
    /// Of a regular file.
    size: u64,
    /// Of a device.
    device: u64,
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
}

impl FileRef {
    /// Records the file that `stat` is of and that goes by `path`. The reason if that name does not lead to it.
    pub(crate) fn describe(path: &[u8], stat: &FileStat) -> std::result::Result<Self, &'static str> {
        if !path.starts_with(b"/") {
            return Err("it has no name in the file system");
        }
        match lstat(OsStr::from_bytes(path)) {
            Err(_) => Err("its name no longer exists: the file was deleted or renamed"),
            Ok(named) if (named.st_dev, named.st_ino) != (stat.st_dev, stat.st_ino) => {
                Err("its name now leads to another file")
            }
            Ok(_) => Ok(Self {
                path: path.to_vec().into(),
                kind: stat.st_mode & SFlag::S_IFMT.bits(),
                size: if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits() {
                    stat.st_size as u64
                } else {
                    0
                },
                device: stat.st_rdev,
            }),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        OsStr::from_bytes(&self.path).into()
    }

    pub(crate) fn subject(&self) -> Subject {
        Subject::Path(self.path())
    }

    /// Opens the file, and makes sure that it is the one. No symbolic link is followed on the way: the
    /// recorded path had none.
    pub(crate) fn open(&self, flags: OFlag, validation: FileValidation) -> Result<OwnedFd> {
        // openat2 is strict: nothing else goes with O_PATH.
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

    fn check(&self, file: impl AsFd, validation: FileValidation) -> Result<()> {
        let conflict = |reason: String| Err(Error::new(ErrorKind::Conflict, reason));
        let now = fstat(&file).call("fstat")?;
        if now.st_mode & SFlag::S_IFMT.bits() != self.kind || now.st_rdev != self.device {
            return conflict("it is now a file of another type".into());
        }
        if validation == FileValidation::Size
            && self.kind == SFlag::S_IFREG.bits()
            && now.st_size as u64 != self.size
        {
            return conflict(format!("its size has changed from {} to {} bytes", self.size, now.st_size));
        }
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let leads_to = std::fs::read_link(path).call("readlink")?;
        if leads_to.as_os_str().as_bytes() != &*self.path {
            return conflict(format!("its path leads elsewhere: to {}", leads_to.display()));
        }
        Ok(())
    }
}
