//! Files whose name is gone though they have others somewhere (hard links): the checkpoint may give them another name
//! beside the one that they had, which belongs to the image from then on.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::fstat;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use crate::error::{Error, ErrorKind, NameCall, Result};

/// What a checkpoint does about files whose name was removed, but which have others that it cannot know.
///
/// ```
/// use cryosleep::{Checkpoint, LinkRemap};
/// # fn save(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).link_remap(LinkRemap::Link).write_to("/var/lib/images/job")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkRemap {
    /// They are refused: the default.
    #[default]
    Refuse,
    /// They get a further name (`.cryosleep-link-..`) in the directory that they were in. It belongs to the image:
    /// it goes when another checkpoint takes the image's place, and is to be removed with the image. A checkpoint that
    /// fails leaves none.
    Link,
}

/// How these names begin.
const BEGINNING: &str = ".cryosleep-link-";

/// Is it one of these names, and nothing but a name?
pub(super) fn is_ours(name: &[u8]) -> bool {
    name.starts_with(BEGINNING.as_bytes()) && !name.contains(&b'/')
}

/// Names that a checkpoint has made: dropping them removes them.
#[derive(Default)]
pub(crate) struct Links(Vec<(OwnedFd, OsString)>);

impl Links {
    /// Gives a file a name in this directory.
    pub(super) fn make(&mut self, file: &OwnedFd, directory: OwnedFd) -> Result<OsString> {
        const TRIES: u32 = 10_000;
        for number in 0..TRIES {
            let name = OsString::from(format!("{BEGINNING}{}-{number}", std::process::id()));
            match link(file, &directory, &name) {
                Err(error) if error.raw_errno() == Some(Errno::EEXIST) => {}
                made => {
                    made?;
                    self.0.push((directory, name.clone()));
                    return Ok(name);
                }
            }
        }
        Err(Error::new(ErrorKind::Conflict, "no name is free beside the one that is gone"))
    }

    /// There is an image that they belong to.
    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for (directory, name) in &self.0 {
            // On the way out of another error.
            let _ = unlinkat(directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Restore: the file by the name that it got, if it still is that one.
pub(super) fn open(directory: &OwnedFd, name: &[u8], inode: u64) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let resolve = ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH;
    let how = OpenHow::new().flags(flags).resolve(resolve);
    let opened = openat2(directory, OsStr::from_bytes(name), how).call("openat2").map_err(|error| {
        let hint = "the name that the checkpoint has given it belongs to the image: put it back";
        error.with_kind(ErrorKind::Conflict).with_hint(hint)
    })?;
    match fstat(&opened).call("fstat")?.st_ino == inode {
        true => Ok(opened),
        false => Err(Error::new(ErrorKind::Conflict, "the name that belongs to the image is another file's")),
    }
}

/// Another name of a file that is open.
pub(super) fn link(file: &OwnedFd, directory: &OwnedFd, name: &OsStr) -> Result<()> {
    let way = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, way.as_str(), directory, name, AtFlags::AT_SYMLINK_FOLLOW).call("linkat")
}
