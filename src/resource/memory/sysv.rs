//! System V shared memory, shmat(2). A segment outlives its processes, like a file: one that is still there on
//! restore is attached as it is. One that has gone (IPC_RMID, another machine) is made again, with the same id.

use nix::errno::Errno;

use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};
use crate::image::{Decode, Encode};
use crate::sys::sysv::{self, SHM_DEST, SHM_LOCKED, Status};
use crate::tracee::{Puppet, sys};

/// A segment, but for its contents.
#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    id: i32,
    /// That it was made with: once it has been removed (IPC_RMID), only its name in /proc tells.
    first_key: i32,
    key: i32,
    pub(super) size: u64,
    /// With SHM_DEST and SHM_LOCKED.
    mode: u32,
    user: u32,
    group: u32,
    creator: u32,
    creator_group: u32,
    maker: i32,
}

impl Segment {
    /// The segment that is mapped by this name and inode.
    pub(super) fn describe(name: &[u8], inode: u64) -> std::result::Result<Self, &'static str> {
        let key = name.strip_prefix(b"/SYSV").and_then(|key| std::str::from_utf8(key).ok());
        let key = key.and_then(|key| u32::from_str_radix(key, 16).ok()).ok_or("it has no key in its name")?;
        let id = i32::try_from(inode).map_err(|_| "its id is impossible")?;
        let status = sysv::status(id).map_err(|errno| match errno {
            Errno::EACCES => "this System V segment may not be looked at by this user",
            _ => "there is no System V segment of its number",
        })?;
        let Status { key: now, size, mode, user, group, creator, creator_group, maker } = status;
        let first_key = key as i32;
        Ok(Self { id, first_key, key: now, size, mode, user, group, creator, creator_group, maker })
    }

    /// Is it still there? An error if another one is there in its place.
    pub(super) fn is_there(&self) -> Result<bool> {
        let taken = |why: String| Err(Error::new(ErrorKind::Conflict, why).about(self.subject()));
        match sysv::status(self.id) {
            Ok(now) if (now.key, now.size, now.maker) == (self.key, self.size, self.maker) => Ok(true),
            Ok(_) => taken("another segment has this id".into()),
            Err(Errno::EINVAL | Errno::EIDRM) if sysv::is_taken(self.first_key) => {
                taken(format!("another segment has its key, {:#x}", self.first_key))
            }
            Err(Errno::EINVAL | Errno::EIDRM) => Ok(false),
            Err(errno) => Err(Error::call("shmctl(IPC_STAT)", errno).about(self.subject())),
        }
    }

    /// Makes it again. The task is the one who makes it, with the rights of whoever made it first.
    pub(super) fn make(&self, puppet: &mut Puppet<'_>) -> Result<Made> {
        let own = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let keep = u64::from(u32::MAX);
        let as_creator = |(user, group): (u32, u32)| {
            [
                (sys::setresgid, [keep, u64::from(group), keep]),
                (sys::setresuid, [keep, u64::from(user), keep]),
            ]
        };
        let creator = (self.creator, self.creator_group);
        let mut batch = puppet.batch();
        batch.about(self.subject());
        if creator != own {
            as_creator(creator).iter().for_each(|(call, args)| {
                batch.call(*call, args);
            });
        }
        let flags = u64::from(self.mode & 0o777) | (libc::IPC_CREAT | libc::IPC_EXCL) as u64;
        let made = batch.call(sys::shmget, &[self.first_key as u32 as u64, self.size, flags]);
        if creator != own {
            as_creator(own).iter().rev().for_each(|(call, args)| {
                batch.call(*call, args);
            });
        }
        std::fs::write(NEXT_ID, self.id.to_string())
            .call("write")
            .about(|| Subject::Path(NEXT_ID.into()))
            .hint("choosing the id needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN")?;
        let answers = puppet.run(batch)?;
        let id = answers.get(made)? as i32;
        let made = Made(Some(id));
        answers.check()?;
        if id != self.id {
            return Err(Error::new(ErrorKind::Conflict, format!("it was given the id {id}"))
                .about(self.subject())
                .with_hint("somebody else made a System V segment at the same moment: try again"));
        }
        sysv::set_owner(id, self.user, self.group, self.mode).call("shmctl(IPC_SET)")?;
        if self.mode & SHM_LOCKED != 0 {
            sysv::lock(id).call("shmctl(SHM_LOCK)")?;
        }
        Ok(made)
    }

    /// It was removed, and stays for as long as it is attached.
    pub(super) fn is_removed(&self) -> bool {
        self.mode & SHM_DEST != 0
    }

    /// The arguments of the shmat(2) that puts it to this address.
    pub(super) fn attach(&self, at: u64, writable: bool) -> [u64; 3] {
        [self.id as u64, at, if writable { 0 } else { libc::SHM_RDONLY as u64 }]
    }

    pub(super) fn subject(&self) -> Subject {
        Subject::Path(format!("System V segment {} (key {:#x})", self.id, self.first_key).into())
    }
}

const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// A segment that has been made, and is removed should the restore not get to its end.
#[derive(Debug)]
pub(crate) struct Made(Option<i32>);

impl Made {
    /// It stays.
    pub(crate) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = self.0.map(sysv::remove);
    }
}
