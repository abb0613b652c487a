//! Signals: what tasks do about them, which are waiting, where handlers run, and the timers that send them.

pub(crate) mod actions;
pub(crate) mod altstack;
pub(crate) mod itimers;
pub(crate) mod overruns;
pub(crate) mod pending;
pub(crate) mod posix_timers;

/// Signals are numbered from 1 to this.
pub(crate) const LAST: i32 = 64;
