//! Task numbers.

use std::fmt;

/// The number of a task as the caller's pid namespace sees it (a pid, or a tid for a thread).
///
/// ```
/// let pid = cryosleep::Pid::from(std::process::id());
/// assert_eq!(pid.to_string(), std::process::id().to_string());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pid(u32);

impl Pid {
    /// The plain number.
    pub fn get(self) -> u32 {
        self.0
    }

    pub(crate) fn raw(self) -> i32 {
        i32::try_from(self.0).unwrap_or(i32::MAX)
    }

    pub(crate) fn nix(self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.raw())
    }
}

impl From<u32> for Pid {
    fn from(pid: u32) -> Self {
        Self(pid)
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
