//! Checkpoint and restore running Linux processes from inside your own program.
//!
//! # Does
//!
//! * Freezes a tree of processes, writes its state into a directory, and kills it, lets it run on or leaves it
//!   stopped: [`Checkpoint`].
//! * Brings the tree back with the same pids and tids, in the middle of what it was doing: [`Restore`]. In a pid
//!   namespace of its own ([`Pids`]) these are always free.
//! * Leaves open files that you name out of the image, and puts others in their place: [`External`].
//! * Says beforehand what it would refuse ([`Checkpoint::preflight`]) and what this system lacks ([`check`]).
//! * Refuses by name, in one report, what it finds and cannot bring back: [`Error::refusals`].
//! * Works in a multi-threaded host, several times at once. Each operation runs on a thread of its own that is
//!   gone when the call returns; no state is global.
//!
//! # Does not
//!
//! * Print anything: it emits [`tracing`] spans and tells [`Hooks`].
//! * Start a helper program or a daemon, or need one.
//! * Restore sockets other than pairs of unix sockets, terminals, or tasks in other namespaces than the caller's (but
//!   for those of pids). The README has the whole table, the privileges that each part needs, and what is not seen yet.
//! * Read or write the images of CRIU.
//!
//! It needs x86_64 Linux 6.7 or later with CONFIG_CHECKPOINT_RESTORE.
//!
//! # A worked example
//!
//! A counter is frozen while it counts, is gone, and is brought back. (This needs the privilege to choose pids:
//! see [`check::Feature::Clone3SetTid`].)
//!
//! ```no_run
//! use std::process::{Command, Stdio};
//! use cryosleep::{AfterDump, Checkpoint, Restore};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // setsid: a tree is whole when the leader of its session is in it. No terminal, no pipe to the outside.
//! let mut counter = Command::new("setsid")
//!     .args(["sh", "-c", "i=0; while :; do echo $i >> /tmp/count; i=$((i + 1)); sleep 1; done"])
//!     .stdin(Stdio::null())
//!     .stdout(Stdio::null())
//!     .stderr(Stdio::null())
//!     .spawn()?;
//!
//! // What would be in the way?
//! for refusal in Checkpoint::of(counter.id()).preflight()?.refusals() {
//!     println!("{refusal}");
//! }
//!
//! let dumped = Checkpoint::of(counter.id()).after(AfterDump::Kill).write_to("/tmp/counter.image")?;
//! println!("{} bytes, frozen for {:?}", dumped.stats.bytes_written, dumped.stats.frozen);
//! counter.wait()?; // its pid is free only when its parent, which we are, has waited for it
//!
//! let restored = Restore::from("/tmp/counter.image").run()?;
//! assert_eq!(restored.pid().get(), counter.id());
//! println!("it ended: {:?}", restored.wait()?);
//! # Ok(()) }
//! ```

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("cryosleep works on x86_64 Linux only");

mod arch;
pub mod check;
mod checkpoint;
mod error;
mod family;
mod flatten;
mod freeze;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(clippy::expect_used, clippy::indexing_slicing)]
pub mod fuzz;
mod hooks;
mod image;
pub mod inspect;
mod parallel;
mod pid;
mod proc;
mod resource;
mod restore;
mod sys;
mod tracee;
mod vfork;

pub use checkpoint::{AfterDump, Checkpoint, CheckpointStats, Dumped, Preflight};
pub use error::{Error, ErrorKind, Phase, Refusal, Result, Subject};
pub use flatten::flatten;
pub use hooks::{Event, Hooks, Progress};
pub use image::{Compression, Durability, ImageSource, ImageStore, PageChecksums, Part, Spool};
pub use pid::Pid;
pub use resource::fds::{
    DevicePaths, External, FileHandler, FileValidation, LinkRemap, OpenFile, OuterPipes,
};
pub use resource::memory::Tracker;
pub use resource::tasks::cgroup::Cgroups;
pub use resource::tasks::cpu::CpuCheck;
pub use resource::tasks::pids::Pids;
pub use restore::{Exit, OuterSession, Restore, RestoreStats, Restored};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
