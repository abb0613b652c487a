//! Scheduling attributes of any task: sched_getattr(2), sched_getaffinity(2), ioprio_get(2), PR_SCHED_CORE.

use super::check;
use crate::Pid;

/// Length of `struct sched_attr` with utilization clamps (since Linux 5.3).
const ATTR_SIZE: usize = 56;

/// sched_getattr(2): the raw structure.
pub(crate) fn attributes(tid: Pid) -> nix::Result<Vec<u8>> {
    let mut bytes = vec![0u8; ATTR_SIZE];
    // SAFETY: the kernel writes at most the size that it is told to the live buffer.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid.raw(), bytes.as_mut_ptr(), ATTR_SIZE, 0) })?;
    Ok(bytes)
}

/// sched_setattr(2).
pub(crate) fn set_attributes(tid: Pid, attributes: &[u8]) -> nix::Result<()> {
    let mut bytes = [0u8; ATTR_SIZE];
    bytes.iter_mut().zip(attributes).for_each(|(slot, byte)| *slot = *byte);
    bytes[..4].copy_from_slice(&(ATTR_SIZE as u32).to_ne_bytes());
    // SAFETY: the structure is as long as its first member says.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid.raw(), bytes.as_ptr(), 0) }).map(drop)
}

/// sched_getaffinity(2), as long as the kernel makes it.
pub(crate) fn affinity(tid: Pid) -> nix::Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the kernel writes at most the length that it is told.
    let len = check(unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, tid.raw(), mask.len(), mask.as_mut_ptr())
    })?;
    mask.truncate(len as usize);
    Ok(mask)
}

/// sched_setaffinity(2).
pub(crate) fn set_affinity(tid: Pid, mask: &[u8]) -> nix::Result<()> {
    // SAFETY: the kernel reads as many bytes as the slice has.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid.raw(), mask.len(), mask.as_ptr()) })
        .map(drop)
}

const IOPRIO_WHO_PROCESS: i32 = 1;

/// ioprio_get(2) of one thread: class and level in one word.
pub(crate) fn io_priority(tid: Pid) -> nix::Result<i32> {
    // SAFETY: the call takes integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid.raw()) })
        .map(|word| word as i32)
}

/// ioprio_set(2).
pub(crate) fn set_io_priority(tid: Pid, priority: i32) -> nix::Result<()> {
    // SAFETY: the call takes integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid.raw(), priority) }).map(drop)
}

/// The group that a thread shares processor cores with (prctl(2) PR_SCHED_CORE_GET); 0: with everybody. EINVAL or
/// ENODEV where the kernel has no such groups.
pub(crate) fn core_cookie(tid: Pid) -> nix::Result<u64> {
    const PR_SCHED_CORE: i32 = 62;
    const PR_SCHED_CORE_GET: u64 = 0;
    const SCOPE_THREAD: u64 = 0;
    let mut cookie = 0u64;
    // SAFETY: the kernel writes one word to the live variable.
    check(i64::from(unsafe {
        libc::prctl(PR_SCHED_CORE, PR_SCHED_CORE_GET, tid.get() as u64, SCOPE_THREAD, &raw mut cookie)
    }))?;
    Ok(cookie)
}
