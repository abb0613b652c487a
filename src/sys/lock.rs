//! Locks on files: flock(2) and fcntl(2), without waiting. nix ties them to guards.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// Part of a file: what struct flock says. A length of 0 reaches to the end, wherever that will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) exclusive: bool,
    pub(crate) start: i64,
    pub(crate) length: i64,
}

impl Extent {
    fn kind(self) -> i16 {
        (if self.exclusive { libc::F_WRLCK } else { libc::F_RDLCK }) as i16
    }

    /// struct flock, as the kernel reads it: type and whence (SEEK_SET is 0), start, length, pid.
    pub(crate) fn words(self) -> [u64; 4] {
        [self.kind() as u64, self.start as u64, self.length as u64, 0]
    }
}

/// flock(2) LOCK_SH or LOCK_EX.
pub(crate) fn flock(file: impl AsFd, exclusive: bool) -> nix::Result<()> {
    let operation = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: flock takes integers only.
    Errno::result(unsafe { libc::flock(file.as_fd().as_raw_fd(), operation | libc::LOCK_NB) }).map(drop)
}

/// fcntl(2) F_OFD_SETLK.
pub(crate) fn set_of_description(file: impl AsFd, extent: Extent) -> nix::Result<()> {
    let lock = libc::flock {
        l_type: extent.kind(),
        l_whence: libc::SEEK_SET as i16,
        l_start: extent.start,
        l_len: extent.length,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads a struct flock, which is live for the call.
    Errno::result(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_structure() {
        let words = Extent { exclusive: true, start: 3, length: 1 << 40 }.words();
        // SAFETY: both are 32 plain bytes, in which any value is valid.
        let flock: libc::flock = unsafe { std::mem::transmute(words) };
        assert_eq!((flock.l_type, flock.l_whence), (libc::F_WRLCK as i16, libc::SEEK_SET as i16));
        assert_eq!((flock.l_start, flock.l_len, flock.l_pid), (3, 1 << 40, 0));
    }
}
