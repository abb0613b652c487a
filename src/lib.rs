//! Checkpoint and restore running Linux processes from inside your own program.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("cryosleep works on x86_64 Linux only");

mod arch;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(clippy::expect_used, clippy::indexing_slicing)]
pub mod fuzz;
mod image;
mod pid;
mod proc;
mod sys;
mod tracee;

pub use error::{Error, ErrorKind, Phase, Refusal, Result, Subject};
pub use pid::Pid;
