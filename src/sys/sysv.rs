//! System V shared memory: shmctl(2), shmget(2) of what is there.

use super::check;

/// What shmctl(IPC_STAT) says of a segment, as far as it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) key: i32,
    pub(crate) size: u64,
    /// With SHM_DEST and SHM_LOCKED.
    pub(crate) mode: u32,
    pub(crate) user: u32,
    pub(crate) group: u32,
    pub(crate) creator: u32,
    pub(crate) creator_group: u32,
    /// The process that made it.
    pub(crate) maker: i32,
}

/// It goes when nobody has it attached any more.
pub(crate) const SHM_DEST: u32 = 0o1000;
pub(crate) const SHM_LOCKED: u32 = 0o2000;

fn control(id: i32, command: i32, status: &mut libc::shmid_ds) -> nix::Result<()> {
    // SAFETY: the argument is a live variable of the type that all commands used here read or write.
    check(unsafe { libc::shmctl(id, command, status) }.into()).map(drop)
}

fn empty() -> libc::shmid_ds {
    // SAFETY: a C structure of integers, for which all zeroes is a value.
    unsafe { std::mem::zeroed() }
}

fn raw(id: i32) -> nix::Result<libc::shmid_ds> {
    let mut status = empty();
    control(id, libc::IPC_STAT, &mut status).map(|()| status)
}

/// IPC_STAT. EINVAL or EIDRM: there is none with this id.
pub(crate) fn status(id: i32) -> nix::Result<Status> {
    let raw = raw(id)?;
    let perm = raw.shm_perm;
    Ok(Status {
        key: perm.__key,
        size: raw.shm_segsz as u64,
        mode: u32::from(perm.mode),
        user: perm.uid,
        group: perm.gid,
        creator: perm.cuid,
        creator_group: perm.cgid,
        maker: raw.shm_cpid,
    })
}

/// IPC_SET: owner and permissions.
pub(crate) fn set_owner(id: i32, user: u32, group: u32, mode: u32) -> nix::Result<()> {
    let mut status = raw(id)?;
    (status.shm_perm.uid, status.shm_perm.gid) = (user, group);
    status.shm_perm.mode = (mode & 0o777) as libc::c_ushort;
    control(id, libc::IPC_SET, &mut status)
}

/// IPC_RMID: it goes now, or when nobody has it attached any more.
pub(crate) fn remove(id: i32) -> nix::Result<()> {
    control(id, libc::IPC_RMID, &mut empty())
}

/// SHM_LOCK: its pages stay in memory.
pub(crate) fn lock(id: i32) -> nix::Result<()> {
    const SHM_LOCK: i32 = 11;
    control(id, SHM_LOCK, &mut empty())
}

/// Is there a segment with this key?
pub(crate) fn is_taken(key: i32) -> bool {
    // SAFETY: the call takes integers only; without IPC_CREAT it makes nothing.
    key != libc::IPC_PRIVATE && unsafe { libc::shmget(key, 0, 0) } >= 0
}

/// A segment that we have attached for reading, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Attached(usize);

impl Attached {
    pub(crate) fn new(id: i32) -> nix::Result<Self> {
        // SAFETY: at an address that the kernel chooses nothing of ours is touched.
        let at = unsafe { libc::shmat(id, std::ptr::null(), libc::SHM_RDONLY) };
        nix::errno::Errno::result(at as libc::c_long).map(|at| Self(at as usize))
    }

    pub(crate) fn address(&self) -> u64 {
        self.0 as u64
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: it is attached there, and no reference into it was ever made.
        let _ = unsafe { libc::shmdt(self.0 as *const libc::c_void) };
    }
}

/// The device of memory that has no file: shared anonymous memory, memfds, System V segments.
pub(crate) fn memory_device() -> nix::Result<libc::dev_t> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = memfd_create(c"", MFdFlags::MFD_CLOEXEC)?;
    nix::sys::stat::fstat(&file).map(|stat| stat.st_dev)
}
