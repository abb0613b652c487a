//! Kinds of open files that the library does not know, and that whoever uses it brings along: a GPU's, a device of his
//! own. Their handlers are asked about files that would be refused otherwise.

use std::error::Error as StdError;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::{Builder, Chosen, Collector, Description, FileKind, Probe};
use crate::Pid;
use crate::error::{Error, ErrorKind, Refusal, Result};
use crate::hooks::HookError;
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::proc::read;

/// Saves and restores open files of a kind that the library does not know.
///
/// It is registered with [`Checkpoint::handler`](crate::Checkpoint::handler), where it is asked about every open file
/// description that would be refused otherwise, and with [`Restore::handler`](crate::Restore::handler), where it
/// makes those again that it has described. What tasks share (dup(2), fork(2)), descriptors' numbers and flags, and
/// owners (F_SETOWN) are the library's business. Memory that is mapped from such files is not covered.
///
/// ```no_run
/// use std::io::{Read, Write};
/// use std::os::fd::OwnedFd;
/// use std::sync::Arc;
/// use cryosleep::{Checkpoint, FileHandler, OpenFile, Restore};
///
/// type Failure = Box<dyn std::error::Error + Send + Sync>;
///
/// /// Requests for a low latency of the processor, which end when their file is closed.
/// struct Latency;
///
/// impl FileHandler for Latency {
///     fn name(&self) -> &str {
///         "cpu_dma_latency"
///     }
///
///     fn describe(&self, file: &OpenFile<'_>) -> Result<Option<Vec<u8>>, Failure> {
///         if !file.link().ends_with("cpu_dma_latency") {
///             return Ok(None);
///         }
///         let mut microseconds = [0; 4];
///         std::fs::File::from(file.fd().try_clone_to_owned()?).read_exact(&mut microseconds)?;
///         Ok(Some(microseconds.into()))
///     }
///
///     fn restore(&self, state: &[u8], _flags: i32) -> Result<OwnedFd, Failure> {
///         let mut device = std::fs::File::options().read(true).write(true).open("/dev/cpu_dma_latency")?;
///         device.write_all(state)?;
///         Ok(device.into())
///     }
/// }
///
/// let latency = Arc::new(Latency);
/// Checkpoint::of(4711u32).handler(latency.clone()).write_to("/var/lib/images/job")?;
/// Restore::from("/var/lib/images/job").handler(latency).run()?;
/// # Ok::<(), cryosleep::Error>(())
/// ```
pub trait FileHandler: Send + Sync {
    /// What its files are called in the image: the restore finds the handler by it.
    fn name(&self) -> &str;

    /// The state of a file, in whatever form; `None` if it is not one of its own. The target is frozen meanwhile, and
    /// the file must be left as it is.
    ///
    /// # Errors
    /// Why the file cannot be restored: the checkpoint is refused with that as its reason.
    fn describe(&self, file: &OpenFile<'_>) -> Result<Option<Vec<u8>>, Box<dyn StdError + Send + Sync>>;

    /// Makes a file with this state, and with the access mode in `flags` (F_GETFL). It is called once for each
    /// description, before there is any task. An image is not to be trusted.
    ///
    /// # Errors
    /// Whatever is returned ends the restore and becomes the source of its error.
    fn restore(&self, state: &[u8], flags: i32) -> Result<OwnedFd, Box<dyn StdError + Send + Sync>>;
}

/// An open file of the target, as a [`FileHandler`] sees it.
///
/// ```
/// fn is_gpu(file: &cryosleep::OpenFile<'_>) -> bool {
///     file.link().starts_with("/dev/dri")
/// }
/// ```
#[derive(Clone, Copy)]
pub struct OpenFile<'p>(&'p Probe);

impl OpenFile<'_> {
    /// Of the same open file description as the target's.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// A task that has it open.
    pub fn pid(&self) -> Pid {
        self.0.pid
    }

    /// The number by which it has it open.
    pub fn number(&self) -> RawFd {
        self.0.fd
    }

    /// What `/proc/PID/fd/N` says: a path, or something like `anon_inode:[perf_event]`.
    pub fn link(&self) -> &Path {
        Path::new(std::ffi::OsStr::from_bytes(&self.0.name))
    }

    /// Access mode and status flags: F_GETFL.
    pub fn flags(&self) -> i32 {
        self.0.flags.bits()
    }

    /// `/proc/PID/fdinfo/N`, where many kinds tell their state.
    ///
    /// # Errors
    /// When the task is gone.
    pub fn info(&self) -> Result<Vec<u8>> {
        read::bytes(self.0.pid, &format!("fdinfo/{}", self.0.fd))
    }
}

impl fmt::Debug for OpenFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OpenFile({} of {})", self.0.subject(), self.0.pid)
    }
}

/// The handlers of one checkpoint or restore.
#[derive(Clone, Default)]
pub(crate) struct Handlers(Vec<Arc<dyn FileHandler>>);

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|handler| handler.name())).finish()
    }
}

impl Handlers {
    pub(crate) fn add(&mut self, handler: Arc<dyn FileHandler>) {
        self.0.push(handler);
    }

    /// The first that takes a file describes it.
    pub(super) fn describe(&self, probe: &Probe) -> std::result::Result<Option<Chosen>, Refusal> {
        for handler in &self.0 {
            let name = handler.name();
            match handler.describe(&OpenFile(probe)) {
                Ok(None) => {}
                Ok(Some(state)) => {
                    let handler = name.as_bytes().to_vec().into();
                    return Ok(Some(Chosen::Handled { handler, state: state.into() }));
                }
                Err(error) => return Err(probe.refusal(format!("{name}: {error}"))),
            }
        }
        Ok(None)
    }

    fn of(&self, name: &Bytes) -> Result<&dyn FileHandler> {
        let found = self.0.iter().find(|handler| handler.name().as_bytes() == &**name);
        found.map(|handler| &**handler).ok_or_else(|| {
            let name = String::from_utf8_lossy(name);
            Error::new(ErrorKind::Conflict, format!("there is no handler {name:?} for this file"))
                .with_hint("it was there at the checkpoint: register it with Restore::handler()")
        })
    }
}

/// A file that a handler has described.
#[derive(Encode, Decode, Debug)]
pub(crate) struct HandledFile {
    handler: Bytes,
    state: Bytes,
}

impl Record for HandledFile {
    const TAG: Tag = Tag::new(b"FHDL");
    const VERSION: u16 = 1;
    const NAME: &'static str = "file of a kind that the caller handles";
}

impl FileKind for HandledFile {
    fn recognise(probe: &Probe) -> bool {
        matches!(probe.chosen, Chosen::Handled { .. })
    }

    fn describe(probe: &Probe, _: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        match &probe.chosen {
            Chosen::Handled { handler, state } => {
                Ok(Ok(Self { handler: handler.clone(), state: state.clone() }))
            }
            _ => Err(Error::new(ErrorKind::Kernel, "nobody handles this file")),
        }
    }

    fn check(&self, builder: &Builder<'_>) -> Result<()> {
        builder.handlers.of(&self.handler).map(drop)
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        let handler = builder.handlers.of(&self.handler)?;
        handler.restore(&self.state, common.flags).map_err(|source| {
            let name = handler.name();
            Error::new(ErrorKind::Hook, format!("the handler {name:?} cannot restore it"))
                .with_source(HookError(source))
        })
    }
}
