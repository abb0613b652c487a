//! The control groups of a process: `/proc/PID/cgroup`, cgroups(7). A new task is in those of whoever restores
//! it; moving it is not supported yet, so they must be the same, or be of no importance to the caller.

use crate::Pid;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::read;

/// What becomes of the control groups that the tree was in.
///
/// ```
/// use cryosleep::{Cgroups, Restore};
/// # fn restore() -> cryosleep::Result<()> {
/// Restore::from("/var/lib/images/job").cgroups(Cgroups::Inherit).run()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cgroups {
    /// The caller must be in the same groups as every process of the tree was: the default.
    #[default]
    Same,
    /// The tree is restored into the caller's own groups, whatever it was in.
    Inherit,
}

/// The file's lines, sorted: hierarchy number, controllers, path. Numbers differ between boots and are left out.
#[derive(Encode, Decode, Debug, PartialEq, Eq)]
pub(crate) struct Membership(Vec<Vec<u8>>);

impl Record for Membership {
    const TAG: Tag = Tag::new(b"CGRP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "control groups";
}

impl Membership {
    pub(crate) fn of(pid: Pid) -> Result<Self> {
        let text = read::bytes(pid, "cgroup")?;
        let without_number =
            |line: &[u8]| line.iter().position(|byte| *byte == b':').map(|at| line[at..].to_vec());
        let mut lines: Vec<Vec<u8>> = text.split(|byte| *byte == b'\n').filter_map(without_number).collect();
        lines.sort_unstable();
        Ok(Self(lines))
    }

    /// Refuses a caller whose groups are not these.
    pub(crate) fn check(&self, pid: Pid, policy: Cgroups) -> Result<()> {
        if policy == Cgroups::Inherit || *self == Self::of(Pid::from(std::process::id()))? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Conflict, "it was in other control groups than the caller is in")
            .of(pid)
            .about(Subject::Attribute("control groups"))
            .with_hint("restore from inside those groups, or into the caller's with Cgroups::Inherit"))
    }
}
