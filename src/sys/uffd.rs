//! userfaultfd(2) as far as filling another task's memory needs it, and noting what it writes.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// UFFD_USER_MODE_ONLY: needs no privilege, and copying into the task never needs more.
pub(crate) const USER_MODE_ONLY: u64 = 1;

const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;

/// UFFD_FEATURE_WP_UNPOPULATED and UFFD_FEATURE_WP_ASYNC: the kernel itself lets a write to a protected page happen,
/// and only notes it (since Linux 6.7).
pub(crate) const NOTE_WRITES: u64 = 1 << 13 | 1 << 15;
const COPY_DONTWAKE: u64 = 1;

/// What the kernel says of the features of a userfaultfd after the handshake: does it note writes, and nothing else?
pub(crate) fn only_notes_writes(features: u32) -> bool {
    const INITIALIZED: u32 = 1 << 31;
    u64::from(features & !INITIALIZED) == NOTE_WRITES
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Span {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);
nix::ioctl_read!(uffdio_unregister, 0xaa, 0x01, Span);
nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, Copy);

/// UFFDIO_API: the handshake that must come first.
pub(crate) fn handshake(uffd: BorrowedFd<'_>) -> nix::Result<()> {
    handshake_with(uffd, 0)
}

/// The same, asking for features. EINVAL: the kernel lacks one.
pub(crate) fn handshake_with(uffd: BorrowedFd<'_>, features: u64) -> nix::Result<()> {
    let mut api = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the argument has the kernel's layout and outlives the call.
    unsafe { uffdio_api(uffd.as_raw_fd(), &mut api) }.map(drop)
}

/// UFFDIO_REGISTER for missing pages. Closing the descriptor undoes it.
pub(crate) fn register(uffd: BorrowedFd<'_>, range: Range<u64>) -> nix::Result<()> {
    register_for(uffd, range, REGISTER_MODE_MISSING)
}

/// UFFDIO_REGISTER for noting writes; what is registered already stays as it is. EBUSY: by another descriptor.
pub(crate) fn register_writes(uffd: BorrowedFd<'_>, range: Range<u64>) -> nix::Result<()> {
    register_for(uffd, range, REGISTER_MODE_WP)
}

/// UFFDIO_UNREGISTER: what was noted is forgotten.
pub(crate) fn unregister(uffd: BorrowedFd<'_>, range: Range<u64>) -> nix::Result<()> {
    let mut arg = Span { start: range.start, len: range.end - range.start };
    // SAFETY: the argument has the kernel's layout and outlives the call.
    unsafe { uffdio_unregister(uffd.as_raw_fd(), &mut arg) }.map(drop)
}

fn register_for(uffd: BorrowedFd<'_>, range: Range<u64>, mode: u64) -> nix::Result<()> {
    let (start, len) = (range.start, range.end - range.start);
    let mut arg = Register { start, len, mode, ioctls: 0 };
    // SAFETY: the argument has the kernel's layout and outlives the call.
    unsafe { uffdio_register(uffd.as_raw_fd(), &mut arg) }.map(drop)
}

/// UFFDIO_COPY of whole pages to `dst` in the registered address space.
pub(crate) fn copy(uffd: BorrowedFd<'_>, dst: u64, source: &[u8]) -> nix::Result<()> {
    let mut done = 0usize;
    while let Some(rest) = source.get(done..).filter(|rest| !rest.is_empty()) {
        let mut arg = Copy {
            dst: dst + done as u64,
            src: rest.as_ptr() as u64,
            len: rest.len() as u64,
            mode: COPY_DONTWAKE,
            copied: 0,
        };
        // SAFETY: `src` and `len` describe a live slice, which the kernel only reads.
        match unsafe { uffdio_copy(uffd.as_raw_fd(), &mut arg) } {
            Ok(_) => return Ok(()),
            Err(Errno::EAGAIN) if arg.copied > 0 => done += arg.copied as usize,
            Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
