//! System calls that are only asked whether they are there: none of them changes anything.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::check;
use super::ptrace::{SUSPEND_SECCOMP, set_options};
use super::uffd;
use crate::Pid;

fn prctl(option: i32, args: [u64; 4]) -> nix::Result<i64> {
    let [a, b, c, d] = args;
    // SAFETY: the callers pass integers, or addresses of live variables of the type that the option writes.
    check(unsafe { libc::prctl(option, a, b, c, d) }.into())
}

/// PR_SET_MM_MAP_SIZE: is PR_SET_MM_MAP compiled in?
pub(crate) fn set_mm_map_size() -> nix::Result<()> {
    let mut size = 0u32;
    prctl(libc::PR_SET_MM, [libc::PR_SET_MM_MAP_SIZE as u64, (&raw mut size) as u64, 0, 0]).map(drop)
}

/// PR_SET_MM_MAP with a descriptor that cannot exist: EBADF when changing `/proc/PID/exe` is allowed. The
/// kernel looks at the descriptor before it changes anything.
pub(crate) fn set_exe_link() -> nix::Result<()> {
    const PLAUSIBLE: u64 = 0x20_0000;
    let mut map = [PLAUSIBLE; 13];
    map[1] += super::PAGE; // the end of the code, after its start
    map[4] += super::PAGE; // the start of the brk area, after the data
    map[5] += 2 * super::PAGE; // its end
    map[11] = 0; // auxv
    map[12] = (i32::MAX as u64) << 32; // auxv_size and exe_fd
    let size = size_of_val(&map) as u64;
    prctl(libc::PR_SET_MM, [libc::PR_SET_MM_MAP as u64, (&raw const map) as u64, size, 0]).map(drop)
}

/// PR_GET_TID_ADDRESS.
pub(crate) fn get_tid_address() -> nix::Result<()> {
    let mut address = 0u64;
    prctl(libc::PR_GET_TID_ADDRESS, [(&raw mut address) as u64, 0, 0, 0]).map(drop)
}

/// PR_TIMER_CREATE_RESTORE_IDS, the question.
pub(crate) fn timer_create_restore_ids() -> nix::Result<()> {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: u64 = 2;
    prctl(PR_TIMER_CREATE_RESTORE_IDS, [GET, 0, 0, 0]).map(drop)
}

/// ARCH_MAP_VDSO_64 in a process that has a vdso: EEXIST. The caller makes sure that it has one.
pub(crate) fn map_vdso() -> nix::Result<()> {
    const ARCH_MAP_VDSO_64: i32 = 0x2003;
    // SAFETY: the call takes integers only, and refuses to map a second vdso.
    check(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0) }).map(drop)
}

/// PTRACE_O_SUSPEND_SECCOMP on a stopped tracee that has no filter.
pub(crate) fn suspend_seccomp(tracee: Pid) -> nix::Result<()> {
    set_options(tracee, SUSPEND_SECCOMP)
}

/// userfaultfd(2) for user mode, with these features (none: 0).
pub(crate) fn userfaultfd(features: u64) -> nix::Result<OwnedFd> {
    let flags = uffd::USER_MODE_ONLY | libc::O_CLOEXEC as u64;
    // SAFETY: the call takes integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    uffd::handshake_with(std::os::fd::AsFd::as_fd(&fd), features).map(|()| fd)
}

/// The raw errno of a plain close-on-exec duplicate: a descriptor of ours, taken as if from another process.
pub(crate) fn own_fd_by_pidfd(pidfd: &OwnedFd) -> nix::Result<()> {
    super::pidfd::get_fd(std::os::fd::AsFd::as_fd(pidfd), pidfd.as_raw_fd()).map(drop)
}
