//! What a consumer can hear of, and veto, while a checkpoint or restore runs.

use crate::Pid;
use crate::error::{Error, ErrorKind, Result};

/// A moment of a checkpoint or a restore.
///
/// ```
/// use cryosleep::{Event, Hooks};
/// struct Narrate;
/// impl Hooks for Narrate {
///     fn event(&mut self, event: Event) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
///         if let Event::Frozen { root } = event {
///             println!("{root} stands still");
///         }
///         Ok(())
///     }
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Checkpoint: nothing has been touched yet.
    PreDump {
        /// The root of the tree.
        root: Pid,
    },
    /// Checkpoint: the whole tree is stopped.
    Frozen {
        /// The root of the tree.
        root: Pid,
    },
    /// Checkpoint: the image is complete; the tree is still stopped. An error removes nothing.
    PostDump {
        /// The root of the tree.
        root: Pid,
    },
    /// Restore: the image is verified; no task exists yet.
    PreRestore {
        /// The pid that the root will have for itself.
        root: Pid,
    },
    /// Restore: everything is rebuilt, and nothing runs yet: the last moment at which an error undoes all.
    PreResume {
        /// The root of the tree.
        root: Pid,
    },
    /// Restore: the tree runs. An error is ignored.
    PostResume {
        /// The root of the tree.
        root: Pid,
    },
}

/// How far a long copy has come.
///
/// ```
/// let at_start = cryosleep::Progress::default();
/// assert_eq!(at_start.bytes, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of memory copied so far.
    pub bytes: u64,
}

/// Told of the stages as they pass; an error stops the operation, which then undoes what it did.
///
/// The calls come from the calling thread or from one of the library's own while the caller waits; never from two
/// at once.
///
/// ```
/// use cryosleep::{Checkpoint, Hooks, Progress};
///
/// struct Budget(u64);
///
/// impl Hooks for Budget {
///     fn progress(&mut self, Progress { bytes, .. }: Progress) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
/// {         if bytes > self.0 { Err("it is larger than expected".into()) } else { Ok(()) }
///     }
/// }
///
/// # fn small(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).hooks(&mut Budget(1 << 30)).write_to("/var/lib/images/job")?;
/// # Ok(()) }
/// ```
pub trait Hooks: Send {
    /// A stage has been reached.
    ///
    /// # Errors
    /// Whatever is returned ends the operation and becomes the source of its error.
    fn event(&mut self, _event: Event) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }

    /// More memory has been copied.
    ///
    /// # Errors
    /// As for [`Hooks::event`].
    fn progress(&mut self, _progress: Progress) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }
}

/// Nobody listens.
impl Hooks for () {}

/// Turns a hook's refusal into an error of ours.
pub(crate) fn vetoed(result: Result<(), Box<dyn std::error::Error + Send + Sync>>) -> Result<()> {
    result.map_err(|source| Error::new(ErrorKind::Hook, "a hook stopped it").with_source(HookError(source)))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct HookError(pub(crate) Box<dyn std::error::Error + Send + Sync>);
