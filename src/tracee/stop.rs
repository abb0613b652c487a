//! Seizing, stopping, waiting for and releasing one task.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::Pid;
use crate::arch::{NT_X86_XSTATE, Regs, XSTATE_MAX};
use crate::error::{Error, ErrorKind, NameCall, Result};
use crate::sys::ptrace::{self, Resume, SigInfo, SigMask};
use crate::sys::wait;

/// Why a tracee is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// PTRACE_EVENT_STOP after an interrupt, or of a new task.
    Interrupted,
    /// The same, of a task that is (or is being) stopped by this job-control signal.
    Group(i32),
    /// Entry to or exit from a system call.
    Syscall,
    /// It made a new task: one of the PTRACE_EVENT_* numbers of clone, fork or vfork.
    Event(i32),
    /// A signal is about to be delivered.
    Signal(i32),
}

impl Stop {
    fn of(info: &SigInfo) -> Self {
        const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;
        match (info.signo(), info.code()) {
            (libc::SIGTRAP, code) if code == libc::SIGTRAP | 0x80 => Stop::Syscall,
            (signal, code) if code == signal | EVENT_STOP << 8 && signal == libc::SIGTRAP => {
                Stop::Interrupted
            }
            (signal, code) if code == signal | EVENT_STOP << 8 => Stop::Group(signal),
            (libc::SIGTRAP, code) if code & 0xff == libc::SIGTRAP && (1..=7).contains(&(code >> 8)) => {
                Stop::Event(code >> 8)
            }
            (signal, _) => Stop::Signal(signal),
        }
    }
}

/// One task that this thread traces. It must be used from the thread that seized it: ptrace is per thread.
///
/// Dropping it does nothing: whoever owns the tree decides whether its tasks are released or killed.
#[derive(Clone, Debug)]
pub(crate) struct Tracee {
    tid: Pid,
    /// What it is in its own pid namespace.
    number: u32,
}

/// The gaps between two looks at a task: none at first, since most steps are over in microseconds, then
/// sleeps. Yielding instead would hand a whole time slice to whoever else wants the processor.
struct Pause {
    started: Instant,
    looks: u32,
    /// The first sleeps.
    short: Duration,
}

impl Pause {
    fn new() -> Self {
        Self { started: Instant::now(), looks: 0, short: Duration::from_micros(3) }
    }

    /// For what takes milliseconds.
    fn long() -> Self {
        Self { short: Duration::from_micros(30), ..Self::new() }
    }

    fn waited(&self) -> Duration {
        self.started.elapsed()
    }

    fn wait(&mut self) {
        // The task may be waiting for this very processor: after a few looks it has to be given away.
        const LOOKS: u32 = 6;
        self.looks += 1;
        if self.looks < LOOKS {
            return std::hint::spin_loop();
        }
        // What has taken long may be found out a little later.
        let part = self.waited() / 32;
        std::thread::sleep(if part < Duration::from_micros(30) {
            self.short
        } else {
            part.min(Duration::from_millis(1))
        });
    }
}

/// How long one step of an already stopped task may take before something is badly wrong.
const STEP: Duration = Duration::from_secs(20);

impl Tracee {
    /// PTRACE_SEIZE: the task does not notice, and goes on running.
    pub(crate) fn seize(tid: Pid, options: i32) -> Result<Self> {
        let seized = ptrace::seize(tid, (options | libc::PTRACE_O_TRACESYSGOOD) as u32);
        seized.call("ptrace(SEIZE)").map_err(|error| match error.raw_errno() {
            Some(Errno::EPERM) => error
                .of(tid)
                .with_hint("it is traced already, is a kernel thread, or CAP_SYS_PTRACE over it is missing"),
            _ => error.of(tid),
        })?;
        Ok(Self::attached(tid))
    }

    /// Takes over a task that the kernel attached by itself (PTRACE_O_TRACEFORK and its kind).
    pub(crate) fn attached(tid: Pid) -> Self {
        Self { tid, number: tid.get() }
    }

    /// The same task, which knows itself by another number than we do.
    pub(crate) fn known_as(self, number: u32) -> Self {
        Self { number, ..self }
    }

    /// By which it knows itself: for the calls that it makes, and for images.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn tid(&self) -> Pid {
        self.tid
    }

    /// PTRACE_O_SUSPEND_SECCOMP of a stopped task that was seized without options, until it is detached.
    pub(crate) fn suspend_seccomp(&self) -> Result<()> {
        self.suspend_seccomp_beside(0)
    }

    /// The same of a task that was seized with these options.
    pub(crate) fn suspend_seccomp_beside(&self, options: i32) -> Result<()> {
        let options = (options | libc::PTRACE_O_TRACESYSGOOD) as u32 | ptrace::SUSPEND_SECCOMP;
        ptrace::set_options(self.tid, options).call("ptrace(SETOPTIONS)").map_err(|error| error.of(self.tid))
    }

    /// Threads that it makes from now on are traced from their first instruction, until it is detached.
    pub(crate) fn trace_clones(&self) -> Result<()> {
        // The options are set all at once: filters stay suspended, where we may.
        self.suspend_seccomp_beside(libc::PTRACE_O_TRACECLONE).or_else(|_| {
            let options = (libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACESYSGOOD) as u32;
            ptrace::set_options(self.tid, options)
                .call("ptrace(SETOPTIONS)")
                .map_err(|error| error.of(self.tid))
        })
    }

    pub(crate) fn interrupt(&self) -> Result<()> {
        ptrace::interrupt(self.tid).call("ptrace(INTERRUPT)").map_err(|error| error.of(self.tid))
    }

    /// Waits until the task is stopped; on [`ErrorKind::TaskGone`] it has ended.
    ///
    /// Other threads of the host may be in `waitpid(-1)` and take the news of the stop away from us, so the
    /// state itself is asked for as well.
    pub(crate) fn wait(&self, limit: Duration) -> Result<Stop> {
        let mut pause = Pause::new();
        loop {
            // That it has stopped is likely and quickly seen; that it has ended is neither.
            let look = if pause.looks % 8 == 7 { self.poll() } else { self.stopped() };
            if let Some(stop) = look? {
                return Ok(stop);
            }
            if pause.waited() > limit {
                break;
            }
            pause.wait();
        }
        Err(Error::new(ErrorKind::Timeout, format!("it did not stop within {limit:?}"))
            .of(self.tid)
            .with_hint("it is in an uninterruptible wait (state D); try again, or raise the time limit"))
    }

    /// Waits for the end of a step of our own making.
    pub(crate) fn wait_step(&self) -> Result<Stop> {
        self.wait(STEP)
    }

    /// Waits until one of them is stopped, or has ended: which one? If none is within the time of a step, the first.
    pub(crate) fn wait_for_first<'t>(tracees: impl Iterator<Item = &'t Tracee> + Clone) -> Option<usize> {
        tracees.clone().next()?;
        let mut pause = Pause::long();
        while pause.waited() < STEP {
            let first = tracees.clone().position(|tracee| !matches!(tracee.poll(), Ok(None)));
            if first.is_some() {
                return first;
            }
            pause.wait();
        }
        Some(0)
    }

    /// Is it stopped? Why? Never blocks, and takes no news that somebody else waits for.
    fn poll(&self) -> Result<Option<Stop>> {
        if let Some(stop) = self.stopped()? {
            return Ok(Some(stop));
        }
        match wait::peek(self.tid) {
            Ok(None) => Ok(None),
            // No child of ours any more: it was reaped by a thread that waits for everybody.
            Ok(Some(_)) | Err(Errno::ECHILD) => Err(self.gone()),
            Err(errno) => Err(Error::call("waitid", errno).of(self.tid)),
        }
    }

    /// The same, but for a task that has ended.
    pub(crate) fn stopped(&self) -> Result<Option<Stop>> {
        match ptrace::get_siginfo(self.tid) {
            Ok(info) => Ok(Some(Stop::of(&info))),
            Err(Errno::ESRCH) => Ok(None),
            Err(errno) => Err(Error::call("ptrace(GETSIGINFO)", errno).of(self.tid)),
        }
    }

    fn gone(&self) -> Error {
        Error::new(ErrorKind::TaskGone, "it has ended").of(self.tid)
    }

    pub(crate) fn resume(&self, how: Resume) -> Result<()> {
        ptrace::resume(self.tid, how).call("ptrace(CONT)").map_err(|error| error.of(self.tid))
    }

    pub(crate) fn detach(&self) -> Result<()> {
        ptrace::resume(self.tid, Resume::Detach).call("ptrace(DETACH)").map_err(|error| error.of(self.tid))
    }

    pub(crate) fn regs(&self) -> Result<Regs> {
        ptrace::get_regs(self.tid).call("ptrace(GETREGS)").map_err(|error| error.of(self.tid))
    }

    pub(crate) fn set_regs(&self, regs: &Regs) -> Result<()> {
        ptrace::set_regs(self.tid, regs).call("ptrace(SETREGS)").map_err(|error| error.of(self.tid))
    }

    /// The whole extended state (x87, SSE, AVX, AVX-512, PKRU, AMX) in xsave's standard format.
    pub(crate) fn xstate(&self) -> Result<Vec<u8>> {
        ptrace::get_regset(self.tid, NT_X86_XSTATE, XSTATE_MAX)
            .call("ptrace(GETREGSET)")
            .map_err(|error| error.of(self.tid))
    }

    pub(crate) fn set_xstate(&self, xstate: &[u8]) -> Result<()> {
        ptrace::set_regset(self.tid, NT_X86_XSTATE, xstate)
            .call("ptrace(SETREGSET)")
            .map_err(|error| error.of(self.tid))
    }

    pub(crate) fn sigmask(&self) -> Result<SigMask> {
        ptrace::get_sigmask(self.tid).call("ptrace(GETSIGMASK)").map_err(|error| error.of(self.tid))
    }

    pub(crate) fn set_sigmask(&self, mask: SigMask) -> Result<()> {
        ptrace::set_sigmask(self.tid, mask).call("ptrace(SETSIGMASK)").map_err(|error| error.of(self.tid))
    }

    /// Waits until the task, which has been killed, is dead. `reap` is for those whose parent is somebody
    /// else: the parent's own wait comes after ours.
    pub(crate) fn wait_death(&self, reap: bool) -> Result<()> {
        let look = if reap { wait::take } else { wait::peek };
        let mut pause = Pause::new();
        loop {
            match look(self.tid) {
                // No child of ours any more: it was reaped by a thread that waits for everybody.
                Ok(Some(_)) | Err(Errno::ECHILD) => return Ok(()),
                Err(errno) => return Err(Error::call("waitid", errno).of(self.tid)),
                Ok(None) if pause.waited() > STEP => {
                    return Err(Error::new(ErrorKind::Timeout, "it did not die").of(self.tid));
                }
                Ok(None) => pause.wait(),
            }
        }
    }
}
