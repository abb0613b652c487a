//! One error type for the whole library, and the small helper that builds it.
//!
//! An [`Error`] says in which phase, for which task and which object, which call failed and why, and
//! what to do about it. It reads like
//! `restore/build: task 412 fd 7 (/run/x): openat: ENOENT: No such file or directory; hint: ...`.

use std::borrow::Cow;
use std::fmt;

use nix::errno::Errno;

use crate::Pid;

/// The result of every fallible call of this library.
///
/// ```
/// fn freeze_and_kill(pid: u32) -> cryosleep::Result<()> {
///     cryosleep::Checkpoint::of(pid).write_to("/var/lib/images/job").map(drop)
/// }
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure this is: the part of an [`Error`] that programs match on.
///
/// ```
/// use cryosleep::{Checkpoint, ErrorKind};
/// let error = Checkpoint::of(std::process::id()).preflight().unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Refused); // nobody can freeze himself
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The target holds something that this version cannot bring back; see [`Error::refusals`].
    Unsupported,
    /// The request itself makes no sense: freezing oneself, an option that contradicts another.
    Refused,
    /// A privilege is missing.
    Permission,
    /// The task does not exist, or ended while it was being worked on.
    TaskGone,
    /// Something that the restore needs is taken or has changed: a pid, a file, a path.
    Conflict,
    /// The kernel lacks a feature, or answered in a way that it never should.
    Kernel,
    /// The image is torn, truncated, foreign, of another version, or contradicts itself.
    Image,
    /// A system call failed for a reason with no kind of its own.
    Syscall,
    /// The configured time limit passed.
    Timeout,
    /// A hook asked for the operation to stop.
    Hook,
}

/// The step of a checkpoint or a restore in which an error arose.
///
/// ```
/// assert_eq!(cryosleep::Phase::Freeze.to_string(), "checkpoint/freeze");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Checkpoint: stopping the tree.
    Freeze,
    /// Checkpoint: building the graph of tasks and shared objects.
    Collect,
    /// Checkpoint: turning each resource into its record.
    Describe,
    /// Checkpoint: writing sections and pages.
    Write,
    /// Restore: opening and verifying the image.
    Read,
    /// Restore: checking that the image can be restored here.
    Plan,
    /// Restore: creating tasks and filling them.
    Build,
    /// Both: letting tasks run, or ending them.
    Release,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Freeze => "checkpoint/freeze",
            Phase::Collect => "checkpoint/collect",
            Phase::Describe => "checkpoint/describe",
            Phase::Write => "checkpoint/write",
            Phase::Read => "restore/read",
            Phase::Plan => "restore/plan",
            Phase::Build => "restore/build",
            Phase::Release => "release",
        })
    }
}

/// The object that an error or a refusal is about.
///
/// ```
/// let fd = cryosleep::Subject::Fd { fd: 7, what: "/run/x".into() };
/// assert_eq!(fd.to_string(), "fd 7 (/run/x)");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Subject {
    /// The task as a whole.
    Task,
    /// An open file descriptor and what it refers to.
    Fd {
        /// Its number.
        fd: i32,
        /// What `/proc/PID/fd` says that it is.
        what: String,
    },
    /// A mapping of the address space.
    Vma {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
        /// Its name in `/proc/PID/maps`.
        what: String,
    },
    /// A path of the file system.
    Path(std::path::PathBuf),
    /// A namespace, by the name it has in `/proc/PID/ns`.
    Namespace(&'static str),
    /// A section of the image.
    Section(String),
    /// A signal, by number.
    Signal(i32),
    /// Some other attribute of a task, by the name that documentation uses for it.
    Attribute(&'static str),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Task => f.write_str("itself"),
            Subject::Fd { fd, what } => write!(f, "fd {fd} ({what})"),
            Subject::Vma { start, end, what } if what.is_empty() => write!(f, "mapping {start:x}-{end:x}"),
            Subject::Vma { start, end, what } => write!(f, "mapping {start:x}-{end:x} ({what})"),
            Subject::Path(path) => write!(f, "path {}", path.display()),
            Subject::Namespace(name) => write!(f, "{name} namespace"),
            Subject::Section(name) => write!(f, "section {name}"),
            Subject::Signal(number) => write!(f, "signal {number}"),
            Subject::Attribute(name) => f.write_str(name),
        }
    }
}

/// One thing that a checkpoint refuses: which task, which object, why, and what can be done about it.
///
/// ```
/// use cryosleep::{Checkpoint, Refusal};
/// # fn report(pid: u32) -> cryosleep::Result<()> {
/// for Refusal { pid, subject, reason, hint, .. } in Checkpoint::of(pid).preflight()?.refusals() {
///     println!("task {pid}: {subject}: {reason} ({})", hint.as_deref().unwrap_or("no way round"));
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The task that holds it, as the caller sees its pid.
    pub pid: Pid,
    /// What it is.
    pub subject: Subject,
    /// Why it cannot be brought back.
    pub reason: Cow<'static, str>,
    /// What the caller can do about it.
    pub hint: Option<Cow<'static, str>>,
}

impl Refusal {
    pub(crate) fn new(pid: Pid, subject: Subject, reason: impl Into<Cow<'static, str>>) -> Self {
        Self { pid, subject, reason: reason.into(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task {} {}: {}", self.pid, self.subject, self.reason)?;
        self.hint.iter().try_for_each(|hint| write!(f, " (hint: {hint})"))
    }
}

/// Why a checkpoint or a restore failed, with everything that is known about it.
///
/// ```
/// use cryosleep::{Restore, ErrorKind, Phase};
/// let error = Restore::from("/nonexistent").run().unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Image);
/// assert_eq!(error.phase(), Some(Phase::Read));
/// assert!(error.to_string().contains("/nonexistent"));
/// ```
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    reason: Option<Cow<'static, str>>,
    phase: Option<Phase>,
    pid: Option<Pid>,
    subject: Option<Subject>,
    call: Option<Call>,
    hint: Option<Cow<'static, str>>,
    refusals: Vec<Refusal>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

#[derive(Debug, Clone, Copy)]
struct Call {
    name: &'static str,
    errno: Option<Errno>,
    remote: bool,
}

impl Error {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The step that failed.
    pub fn phase(&self) -> Option<Phase> {
        self.0.phase
    }

    /// The task that it failed for, by the pid that the caller sees.
    pub fn pid(&self) -> Option<Pid> {
        self.0.pid
    }

    /// The object that it failed for.
    pub fn subject(&self) -> Option<&Subject> {
        self.0.subject.as_ref()
    }

    /// The system call that failed.
    pub fn syscall(&self) -> Option<&'static str> {
        self.0.call.map(|call| call.name)
    }

    /// Its error number, as in errno(3).
    pub fn errno(&self) -> Option<i32> {
        self.0.call.and_then(|call| call.errno).map(|errno| errno as i32)
    }

    /// Was the failing system call executed by the task itself (as a remote system call)?
    pub fn is_remote(&self) -> bool {
        self.0.call.is_some_and(|call| call.remote)
    }

    /// What the caller can do about it.
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Everything that the checkpoint refuses, when the kind is [`ErrorKind::Unsupported`].
    pub fn refusals(&self) -> &[Refusal] {
        &self.0.refusals
    }

    /// Why, without the context.
    pub(crate) fn reason(&self) -> String {
        match (&self.0.reason, self.0.call) {
            (Some(reason), _) => reason.to_string(),
            (None, Some(call)) => call.name.to_owned(),
            (None, None) => String::new(),
        }
    }

    /// An error of one resource as one line of the report, when it is about something unsupported.
    pub(crate) fn into_refusal(self) -> Result<Refusal> {
        if self.kind() != ErrorKind::Unsupported || !self.0.refusals.is_empty() {
            return Err(self);
        }
        let Some(pid) = self.0.pid else { return Err(self) };
        let subject = self.0.subject.clone().unwrap_or(Subject::Task);
        let mut refusal = Refusal::new(pid, subject, self.reason());
        refusal.hint = self.0.hint.clone();
        Ok(refusal)
    }

    pub(crate) fn new(kind: ErrorKind, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::build(kind, Some(reason.into()), None)
    }

    pub(crate) fn unsupported(refusals: Vec<Refusal>) -> Self {
        let mut error = Self::build(ErrorKind::Unsupported, None, None);
        error.0.refusals = refusals;
        error
    }

    pub(crate) fn call(name: &'static str, errno: Errno) -> Self {
        let kind = match errno {
            Errno::EPERM | Errno::EACCES => ErrorKind::Permission,
            Errno::ESRCH => ErrorKind::TaskGone,
            Errno::ENOSYS => ErrorKind::Kernel,
            _ => ErrorKind::Syscall,
        };
        Self::build(kind, None, Some(Call { name, errno: Some(errno), remote: false }))
    }

    pub(crate) fn remote_call(name: &'static str, errno: Errno) -> Self {
        let mut error = Self::call(name, errno);
        error.0.call = Some(Call { name, errno: Some(errno), remote: true });
        error
    }

    fn build(kind: ErrorKind, reason: Option<Cow<'static, str>>, call: Option<Call>) -> Self {
        Self(Box::new(Inner {
            kind,
            reason,
            phase: None,
            pid: None,
            subject: None,
            call,
            hint: None,
            refusals: Vec::new(),
            source: None,
        }))
    }

    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    pub(crate) fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    /// Adds what is not yet known: inner layers know better than outer ones.
    pub(crate) fn in_phase(mut self, phase: Phase) -> Self {
        self.0.phase.get_or_insert(phase);
        self
    }

    pub(crate) fn of(mut self, pid: Pid) -> Self {
        self.0.pid.get_or_insert(pid);
        self
    }

    pub(crate) fn about(mut self, subject: Subject) -> Self {
        self.0.subject.get_or_insert(subject);
        self
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.0.hint.get_or_insert(hint.into());
        self
    }

    /// The plain errno, for callers that turn one particular failure into something else.
    pub(crate) fn raw_errno(&self) -> Option<Errno> {
        self.0.call.and_then(|call| call.errno)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { phase, pid, subject, reason, call, hint, refusals, source, .. } = &*self.0;
        let mut lead = String::new();
        if let Some(phase) = phase {
            lead += &format!("{phase}: ");
        }
        match (pid, subject) {
            (Some(pid), Some(Subject::Task)) | (Some(pid), None) => lead += &format!("task {pid}: "),
            (Some(pid), Some(subject)) => lead += &format!("task {pid} {subject}: "),
            (None, Some(subject)) => lead += &format!("{subject}: "),
            (None, None) => {}
        }
        f.write_str(&lead)?;
        let mut parts = Vec::new();
        if let Some(reason) = reason {
            parts.push(reason.to_string());
        }
        if let Some(Call { name, errno, remote }) = call {
            let place = if *remote { " (in the task)" } else { "" };
            let errno = errno.map_or(String::new(), |errno| format!(": {errno}"));
            parts.push(format!("{name}{place}{errno}"));
        }
        if !refusals.is_empty() {
            let list: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
            parts.push(format!("{} not supported: {}", refusals.len(), list.join("; ")));
        }
        if let Some(source) = source {
            parts.push(source.to_string());
        }
        f.write_str(&parts.join(": "))?;
        hint.iter().try_for_each(|hint| write!(f, "; hint: {hint}"))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// Names the system call that failed, where it failed.
pub(crate) trait NameCall<T> {
    fn call(self, name: &'static str) -> Result<T>;
}

impl<T> NameCall<T> for std::result::Result<T, Errno> {
    fn call(self, name: &'static str) -> Result<T> {
        self.map_err(|errno| Error::call(name, errno))
    }
}

impl<T> NameCall<T> for std::io::Result<T> {
    fn call(self, name: &'static str) -> Result<T> {
        self.map_err(|error| match error.raw_os_error() {
            Some(raw) => Error::call(name, Errno::from_raw(raw)),
            None => Error::new(ErrorKind::Kernel, name).with_source(error),
        })
    }
}

/// Adds what the outer layer knows to an error on its way up.
pub(crate) trait Context<T> {
    fn in_phase(self, phase: Phase) -> Result<T>;
    fn of(self, pid: Pid) -> Result<T>;
    fn about(self, subject: impl FnOnce() -> Subject) -> Result<T>;
    fn hint(self, hint: &'static str) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn in_phase(self, phase: Phase) -> Result<T> {
        self.map_err(|error| error.in_phase(phase))
    }
    fn of(self, pid: Pid) -> Result<T> {
        self.map_err(|error| error.of(pid))
    }
    fn about(self, subject: impl FnOnce() -> Subject) -> Result<T> {
        self.map_err(|error| error.about(subject()))
    }
    fn hint(self, hint: &'static str) -> Result<T> {
        self.map_err(|error| error.with_hint(hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_like_a_sentence() {
        let error = Error::remote_call("openat", Errno::ENOENT)
            .of(Pid::from(412))
            .about(Subject::Fd { fd: 7, what: "/run/x".into() })
            .in_phase(Phase::Build)
            .with_hint("put the file back");
        assert_eq!(
            error.to_string(),
            "restore/build: task 412 fd 7 (/run/x): openat (in the task): ENOENT: No such file or directory; hint: put the file back"
        );
        assert!(error.is_remote());
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Syscall, Some(2)));
    }

    #[test]
    fn inner_context_wins() {
        let error = Error::new(ErrorKind::Image, "torn").in_phase(Phase::Read).in_phase(Phase::Plan);
        assert_eq!(error.phase(), Some(Phase::Read));
    }
}
