//! Which pid namespace a tree is restored into.

use std::os::fd::{AsFd, OwnedFd};

use crate::tracee::Birthplace;

/// The pid namespace that a tree is restored into. In each of them all of its tasks have the numbers that they had
/// for themselves, in the namespace that they were in.
///
/// What cannot come along into another namespace than the caller's
/// ([`ErrorKind::Conflict`](crate::ErrorKind::Conflict)): open files of /proc that tell of a task, and pidfds of
/// processes that are gone.
///
/// ```
/// # use cryosleep::{Pids, Restore};
/// # fn clones() -> cryosleep::Result<()> {
/// for _ in 0..5 {
///     let clone = Restore::from("/var/lib/images/job").pids(Pids::NewNamespace).run()?;
///     println!("{} calls itself {}", clone.pid(), clone.inner_pid());
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Default)]
#[non_exhaustive]
pub enum Pids {
    /// The caller's own: the default. The numbers must be free.
    #[default]
    Original,
    /// A new one, so that one image can be restored any number of times at once. A root that was process 1 is that
    /// again; otherwise there is a new process 1 ([`Restored::init`](crate::Restored::init)), which waits for orphans
    /// and ends, and with it the namespace, when the root ends. Sessions and groups from outside the tree are made
    /// anew. Needs CAP_SYS_ADMIN.
    ///
    /// /proc belongs to the mount namespace: what is mounted there still shows the namespace of before.
    NewNamespace,
    /// One below the caller's, by its file (`/proc/PID/ns/pid`). The root becomes a child of the caller, whom it
    /// does not see: its getppid(2) is 0. Needs CAP_SYS_ADMIN.
    Namespace(OwnedFd),
}

impl Pids {
    /// Where the first task is born.
    pub(crate) fn birthplace(&self, root: u32) -> Birthplace<'_> {
        match self {
            Pids::Original => Birthplace::Here(root),
            Pids::NewNamespace => Birthplace::NewNamespace,
            Pids::Namespace(namespace) => Birthplace::Namespace(namespace.as_fd(), root),
        }
    }
}
