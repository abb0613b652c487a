//! Blank tasks: a new process of ours that contains nothing but a stub and room for batches.

use std::arch::asm;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;

use super::{Stop, Tracee};
use crate::Pid;
use crate::arch;
use crate::error::{Context, Error, ErrorKind, NameCall, Result};
use crate::sys::ptrace::SigMask;

/// linux/sched.h `struct clone_args`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CloneArgs {
    pub(crate) flags: u64,
    pub(crate) pidfd: u64,
    pub(crate) child_tid: u64,
    pub(crate) parent_tid: u64,
    pub(crate) exit_signal: u64,
    pub(crate) stack: u64,
    pub(crate) stack_size: u64,
    pub(crate) tls: u64,
    pub(crate) set_tid: u64,
    pub(crate) set_tid_size: u64,
    pub(crate) cgroup: u64,
}

impl CloneArgs {
    /// The flags of a thread like any other.
    pub(crate) const THREAD: u64 = (libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM) as u64;

    /// As the words that a remote clone3(2) reads.
    pub(crate) fn words(&self) -> [u64; 11] {
        let a = self;
        [
            a.flags,
            a.pidfd,
            a.child_tid,
            a.parent_tid,
            a.exit_signal,
            a.stack,
            a.stack_size,
            a.tls,
            a.set_tid,
            a.set_tid_size,
            a.cgroup,
        ]
    }
}

/// The stub program as a file that can be executed.
pub(crate) struct StubFile(OwnedFd);

impl StubFile {
    /// The stub at `base` with `room` bytes of memory behind its page.
    pub(crate) fn new(base: u64, room: u64) -> Result<Self> {
        // MFD_EXEC: with vm.memfd_noexec=1 a memfd is not executable unless it says so; old kernels lack it.
        let flags = MFdFlags::MFD_CLOEXEC;
        let executable = flags | MFdFlags::from_bits_retain(libc::MFD_EXEC);
        let writable = memfd_create(c"cryosleep-stub", executable)
            .or_else(|_| memfd_create(c"cryosleep-stub", flags))
            .call("memfd_create")?;
        let mut writable = std::fs::File::from(writable);
        writable.write_all(&arch::stub_program(base, room)).call("write")?;
        // A file that is open for writing cannot be executed (ETXTBSY).
        let path = format!("/proc/self/fd/{}", writable.as_raw_fd());
        open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).call("open").map(Self)
    }
}

/// A new process that nobody traces yet: it waits in the stub. Dropping it ends it.
///
/// Whoever makes it is its parent for good: parent death signals are sent when that very thread ends.
pub(crate) struct Seed {
    pid: Pid,
    /// By which it knows itself.
    number: u32,
    pidfd: Option<OwnedFd>,
}

impl Drop for Seed {
    fn drop(&mut self) {
        if let Some(pidfd) = self.pidfd.take() {
            let _ = crate::sys::pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL);
            while matches!(crate::sys::wait::wait(pidfd.as_fd()), Ok(None) | Err(Errno::EINTR)) {}
        }
    }
}

/// A blank task of ours, seized and stopped. It dies with the thread that traces it.
pub(crate) struct Blank {
    pub(crate) tracee: Tracee,
    pub(crate) pidfd: OwnedFd,
}

/// The pid namespace that a new task is born into, and its number there.
#[derive(Clone, Copy)]
pub(crate) enum Birthplace<'fd> {
    /// That of the caller.
    Here(u32),
    /// This one, below the caller's.
    Namespace(BorrowedFd<'fd>, u32),
    /// One of its own: it is process 1.
    NewNamespace,
}

impl Birthplace<'_> {
    fn number(self) -> u32 {
        match self {
            Birthplace::Here(number) | Birthplace::Namespace(_, number) => number,
            Birthplace::NewNamespace => 1,
        }
    }
}

/// What ends up in the new task: one descriptor of ours, at this number.
#[derive(Clone, Copy)]
pub(crate) struct Gift<'fd> {
    pub(crate) fd: BorrowedFd<'fd>,
    pub(crate) number: RawFd,
}

impl Seed {
    /// Makes a child of the calling thread that runs the stub.
    pub(crate) fn plant(stub: &StubFile, place: Birthplace<'_>, gift: Gift<'_>) -> Result<Self> {
        // Above the gift's number, so that the gift cannot be put on top of them.
        let above = |fd: BorrowedFd<'_>| {
            let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(gift.number + 1)).call("fcntl")?;
            // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
            Ok::<_, Error>(unsafe { OwnedFd::from_raw_fd(copy) })
        };
        let (stub, from) = (above(stub.0.as_fd())?, above(gift.fd)?);
        let number = place.number();
        let born = within(place, || retry_busy_text(|| vfork_exec(place, &stub, &from, gift.number)));
        let (pid, pidfd) = born.map_err(|error| match place {
            Birthplace::NewNamespace => error.with_hint("a new pid namespace needs CAP_SYS_ADMIN"),
            _ => explain(error, Pid::from(number)),
        })?;
        Ok(Self { pid, number, pidfd: Some(pidfd) })
    }

    /// Traces it from the calling thread.
    pub(crate) fn adopt(mut self) -> Result<Blank> {
        let tracee = Tracee::seize(self.pid, OPTIONS)?.known_as(self.number);
        tracee.interrupt()?;
        let stop = tracee.wait_step()?;
        match (stop, self.pidfd.take()) {
            (Stop::Interrupted, Some(pidfd)) => Ok(Blank { tracee, pidfd }),
            (stop, pidfd) => {
                self.pidfd = pidfd;
                Err(Error::new(ErrorKind::Kernel, format!("the stub stopped by {stop:?}")).of(self.pid))
            }
        }
    }
}

impl Blank {
    /// System call filters do not apply to it, nor to the tasks that it makes from now on.
    pub(crate) fn suspend_seccomp(&self) -> Result<()> {
        let suspended = self.tracee.suspend_seccomp_beside(OPTIONS);
        suspended.hint(
            "system call filters can only be restored with CAP_SYS_ADMIN in the initial user namespace, and by a \
             caller without filters of its own",
        )
    }
}

/// Tasks that are being restored die with their tracer, and so do those that they make.
const OPTIONS: i32 = libc::PTRACE_O_EXITKILL
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK;

/// Says what a failed clone3(2) with a chosen pid means.
pub(crate) fn explain(error: Error, pid: Pid) -> Error {
    let error = error.of(pid);
    match error.raw_errno() {
        Some(Errno::EEXIST) => error
            .with_kind(ErrorKind::Conflict)
            .with_hint("the pid is taken, perhaps by a zombie that nobody has waited for"),
        Some(Errno::EPERM) => error.with_hint(
            "choosing a pid needs CAP_CHECKPOINT_RESTORE in the user namespace of the pid namespace",
        ),
        Some(Errno::EINVAL) => {
            error.with_kind(ErrorKind::Conflict).with_hint("the pid is above kernel.pid_max")
        }
        _ => error,
    }
}

/// A fork elsewhere in the host can for a moment hold the writable descriptor that we have closed.
fn retry_busy_text<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..100 {
        match attempt() {
            Err(error) if error.raw_errno() == Some(Errno::ETXTBSY) => {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            other => return other,
        }
    }
    attempt()
}

/// Lets children of the calling thread be born into that namespace meanwhile.
fn within<T>(place: Birthplace<'_>, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let Birthplace::Namespace(namespace, _) = place else { return body() };
    let set = |namespace: BorrowedFd<'_>| {
        setns(namespace, CloneFlags::CLONE_NEWPID)
            .call("setns")
            .hint("the namespace has to be one below the caller's, and CAP_SYS_ADMIN is needed in both")
    };
    let before = "/proc/thread-self/ns/pid_for_children";
    let before = open(before, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).call("open")?;
    set(namespace)?;
    let result = body();
    set(before.as_fd())?;
    result
}

/// clone3(CLONE_VM | CLONE_VFORK) and execveat(2) of the stub. Gives the child, and its pidfd.
fn vfork_exec(
    place: Birthplace<'_>,
    stub: &OwnedFd,
    gift: &OwnedFd,
    number: RawFd,
) -> Result<(Pid, OwnedFd)> {
    const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
    let mut pidfd: i32 = -1;
    let set_tid = [place.number()];
    let (namespace, set_tid_size) = match place {
        Birthplace::NewNamespace => (libc::CLONE_NEWPID, 0),
        _ => (0, 1),
    };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | namespace;
    let args = CloneArgs {
        flags: flags as u64 | CLONE_CLEAR_SIGHAND,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: if set_tid_size == 0 { 0 } else { set_tid.as_ptr() as u64 },
        set_tid_size,
        ..CloneArgs::default()
    };
    let argv = [c"cryosleep".as_ptr() as u64, 0];
    let failed: i64 = 0;
    let parent = nix::unistd::gettid().as_raw() as u64;
    let mut table: [[u64; arch::ENTRY_WORDS]; 8] = [
        [libc::SYS_prctl as u64, libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0, 0],
        [libc::SYS_getppid as u64, 0, 0, 0, 0, 0, 0, 0],
        [libc::SYS_tgkill as u64, 0, parent, 0, 0, 0, 0, 0],
        [
            libc::SYS_close_range as u64,
            0,
            u64::from(u32::MAX),
            u64::from(libc::CLOSE_RANGE_CLOEXEC),
            0,
            0,
            0,
            0,
        ],
        [libc::SYS_dup3 as u64, gift.as_raw_fd() as u64, number as u64, 0, 0, 0, 0, 0],
        [
            libc::SYS_execveat as u64,
            stub.as_raw_fd() as u64,
            c"".as_ptr() as u64,
            argv.as_ptr() as u64,
            0,
            libc::AT_EMPTY_PATH as u64,
            0,
            (&raw const failed) as u64,
        ],
        [libc::SYS_exit_group as u64, 127, 0, 0, 0, 0, 0, 0],
        [0; arch::ENTRY_WORDS],
    ];
    // A parent that was gone before the child asked for its death signal leaves an orphan for ever. So is the
    // child's parent (still) the process that has our thread? If not, tgkill's error becomes an environment that
    // execveat cannot read, and the child ends.
    let base = (&raw mut table) as u64;
    let word = |entry: usize, word: usize| base + ((entry * arch::ENTRY_WORDS + word) * 8) as u64;
    let (asked, checked) = (word(2, 1), word(5, 4));
    table[1][7] = asked;
    table[2][7] = checked;
    // In another namespace the child does not see its parent: but it can look at a pidfd of it.
    let own = Pid::from(parent as u32);
    let parent = match place {
        Birthplace::Here(_) => None,
        _ => {
            let leader = own.get() == std::process::id();
            let pidfd = crate::sys::pidfd::open_thread(own, !leader);
            let pidfd = pidfd.or_else(|_| crate::sys::pidfd::open(Pid::from(std::process::id())));
            Some(pidfd.call("pidfd_open")?)
        }
    };
    let watched = parent.as_ref().map(|parent| libc::pollfd {
        fd: parent.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    if let Some(watched) = &watched {
        table[1] = [libc::SYS_getpid as u64, 0, 0, 0, 0, 0, 0, 0];
        table[2] = [libc::SYS_poll as u64, std::ptr::from_ref(watched) as u64, 1, 0, 0, 0, 0, checked];
    }
    let result = with_signals_blocked(|| {
        // SAFETY: see `clone_and_run`: the table ends in exit_group; everything it points to outlives the
        // call, since a vfork parent waits until the child has executed another program or ended.
        unsafe { clone_and_run(&args, (&raw mut table).cast()) }
    });
    if result < 0 {
        return Err(Error::call("clone3", Errno::from_raw(-result as i32)));
    }
    // SAFETY: CLONE_PIDFD gave us this descriptor; nobody else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    // SAFETY: `failed` lives on; the child, which shared our memory, wrote it before it ended, if at all.
    let failed = unsafe { std::ptr::read_volatile(&raw const failed) };
    if failed != 0 {
        crate::sys::wait::reap(Pid::from(result as u32));
        return Err(Error::call("execveat", Errno::from_raw(-failed as i32)));
    }
    Ok((Pid::from(result as u32), pidfd))
}

/// The child must not run a handler of the host on shared memory. A raw call, since the C library leaves its
/// own internal signals unblocked.
pub(super) fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    let set = |new: &SigMask, old: *mut u64| {
        // SAFETY: both point to live 8-byte masks, or old is null.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const new.0, old, 8) }
    };
    let mut before = 0u64;
    set(&SigMask::ALL, &raw mut before);
    let result = body();
    set(&SigMask(before), std::ptr::null_mut());
    result
}

/// Clones; the child works through the table of system calls, the parent gets clone3's result. An entry's
/// last word, when not null, is where the child stores the result of a call that came back.
///
/// # Safety
/// With CLONE_VM: `table` must be followed to a call that does not return (exit_group), and
/// everything that it points to must stay alive until this returns (CLONE_VFORK) or the child has ended.
pub(super) unsafe fn clone_and_run(args: &CloneArgs, table: *const u64) -> i64 {
    let result;
    // SAFETY: in the parent this is one system call. The child has no stack of its own and touches none: it
    // uses registers, executes system calls, and never leaves the loop.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 3f",
            "2:",
            "mov rax, [r12]",
            "mov rdi, [r12 + 8]",
            "mov rsi, [r12 + 16]",
            "mov rdx, [r12 + 24]",
            "mov r10, [r12 + 32]",
            "mov r8, [r12 + 40]",
            "mov r9, [r12 + 48]",
            "syscall",
            "mov rdi, [r12 + 56]",
            "test rdi, rdi",
            "jz 4f",
            "mov [rdi], rax",
            "4:",
            "add r12, 64",
            "jmp 2b",
            "3:",
            inlateout("rax") libc::SYS_clone3 => result,
            inlateout("rdi") std::ptr::from_ref(args) => _,
            inlateout("rsi") size_of::<CloneArgs>() => _,
            inlateout("r12") table => _,
            lateout("rdx") _, lateout("r10") _, lateout("r8") _, lateout("r9") _,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    result
}
