//! Thin safe wrappers of the system calls that nix lacks. One gate per call: arguments in types, errno out.
#![allow(unsafe_code)]

pub(crate) mod direct;
pub(crate) mod file;
pub(crate) mod hugetlb;
pub(crate) mod lock;
pub(crate) mod pagemap;
pub(crate) mod pidfd;
pub(crate) mod probe;
pub(crate) mod ptrace;
pub(crate) mod sched;
pub(crate) mod socket;
pub(crate) mod sysv;
pub(crate) mod uffd;
pub(crate) mod wait;
pub(crate) mod xattr;

use std::os::fd::RawFd;

use nix::errno::Errno;

use crate::Pid;

/// Turns the C library's -1 into the errno it stands for.
pub(crate) fn check(result: libc::c_long) -> nix::Result<i64> {
    Errno::result(result)
}

/// Which kernel object of a task kcmp(2) compares.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(crate) enum Compare {
    /// KCMP_VM: address spaces.
    Vm = 1,
    /// KCMP_FILES: fd tables.
    Files = 2,
    /// KCMP_FS: cwd, root and umask.
    Fs = 3,
    /// KCMP_SIGHAND: tables of signal actions.
    Sighand = 4,
}

/// kcmp(2) on what two tasks as a whole own: equal, or an order that is stable while both live.
pub(crate) fn kcmp(a: Pid, b: Pid, what: Compare) -> nix::Result<std::cmp::Ordering> {
    // SAFETY: kcmp takes integers only.
    kcmp_order(unsafe { libc::syscall(libc::SYS_kcmp, a.raw(), b.raw(), what as i32, 0, 0) })
}

/// kcmp(2) KCMP_FILE: are two descriptors the same open file description?
pub(crate) fn kcmp_file(a: (Pid, RawFd), b: (Pid, RawFd)) -> nix::Result<std::cmp::Ordering> {
    const KCMP_FILE: i32 = 0;
    // SAFETY: kcmp takes integers only.
    kcmp_order(unsafe {
        libc::syscall(libc::SYS_kcmp, a.0.raw(), b.0.raw(), KCMP_FILE, a.1 as u64, b.1 as u64)
    })
}

fn kcmp_order(result: libc::c_long) -> nix::Result<std::cmp::Ordering> {
    Ok(match check(result)? {
        0 => std::cmp::Ordering::Equal,
        1 => std::cmp::Ordering::Less,
        // 3 means "not equal, and no order is given": any fixed answer serves.
        _ => std::cmp::Ordering::Greater,
    })
}

/// get_robust_list(2) of another task: head and length.
pub(crate) fn robust_list(tid: Pid) -> nix::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both out pointers are live for the call, which writes one word to each.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid.raw(), &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// prctl(2) PR_GET_SECUREBITS of the calling thread.
pub(crate) fn securebits() -> nix::Result<u32> {
    // SAFETY: the option takes no further arguments.
    Errno::result(unsafe { libc::prctl(libc::PR_GET_SECUREBITS) }).map(|bits| bits as u32)
}

/// prctl(2) of the calling thread with an option that asks for an attribute and takes plain numbers.
pub(crate) fn attribute(option: i32, which: u64) -> nix::Result<u64> {
    // SAFETY: such options neither read nor write memory.
    Errno::result(unsafe { libc::prctl(option, which, 0u64, 0u64, 0u64) }).map(|value| value as u64)
}

/// The same with an option that writes an int.
pub(crate) fn written_attribute(option: i32) -> nix::Result<u64> {
    let mut value = 0i32;
    // SAFETY: such options write an int to the live variable.
    Errno::result(unsafe { libc::prctl(option, &raw mut value, 0u64, 0u64, 0u64) })?;
    Ok(value as u32 as u64)
}

/// The kernel's hardware page size.
pub(crate) const PAGE: u64 = 4096;
