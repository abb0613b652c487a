//! Checkpoint and restore running Linux processes from inside your own program.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("cryosleep works on x86_64 Linux only");

mod arch;
pub mod check;
mod checkpoint;
mod error;
mod family;
mod freeze;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(clippy::expect_used, clippy::indexing_slicing)]
pub mod fuzz;
mod hooks;
mod image;
mod pid;
mod proc;
mod resource;
mod restore;
mod sys;
mod tracee;

pub use checkpoint::{AfterDump, Checkpoint, CheckpointStats, Dumped, Preflight};
pub use error::{Error, ErrorKind, Phase, Refusal, Result, Subject};
pub use hooks::{Event, Hooks, Progress};
pub use image::Durability;
pub use pid::Pid;
pub use resource::fds::FileValidation;
pub use restore::{Exit, OuterSession, Restore, RestoreStats, Restored};
