//! ptrace(2) requests that nix does not wrap.

use super::check;
use crate::Pid;

/// A blocked-signal mask as the kernel keeps it: bit n-1 is signal n.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SigMask(pub(crate) u64);

impl SigMask {
    /// Every signal that can be blocked.
    pub(crate) const ALL: Self = Self(!0);
}

/// The raw bytes of one `siginfo_t`, as the kernel keeps it.
pub(crate) const SIGINFO_SIZE: usize = 128;

/// A `siginfo_t` taken apart as far as the engine looks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct SigInfo(pub(crate) [u8; SIGINFO_SIZE]);

impl SigInfo {
    pub(crate) fn signo(&self) -> i32 {
        self.word(0)
    }

    pub(crate) fn code(&self) -> i32 {
        self.word(8)
    }

    /// `si_timerid`, of a signal that a timer of timer_create(2) has sent.
    pub(crate) fn timer(&self) -> Option<i32> {
        (self.code() == libc::SI_TIMER).then(|| self.word(16))
    }

    fn word(&self, at: usize) -> i32 {
        self.0.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes)
    }
}

/// What PTRACE_GET_RSEQ_CONFIGURATION answers (linux/ptrace.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RseqConfiguration {
    pub(crate) pointer: u64,
    pub(crate) size: u32,
    pub(crate) signature: u32,
    pub(crate) flags: u32,
    pad: u32,
}

const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PEEK_SHARED: u32 = 1;

/// One request whose data pointer is writable memory of ours.
///
/// # Safety
/// `data` must be valid for what the request reads or writes.
unsafe fn request(request: u32, tid: Pid, addr: u64, data: *mut libc::c_void) -> nix::Result<i64> {
    // SAFETY: the caller vouches for `data`; the request acts on a tracee of ours, or fails.
    check(unsafe { libc::ptrace(request as _, tid.raw(), addr, data) })
}

/// PTRACE_GETREGSET: one register set, as long as the kernel makes it.
pub(crate) fn get_regset(tid: Pid, set: u32, capacity: usize) -> nix::Result<Vec<u8>> {
    let mut bytes = vec![0u8; capacity];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: the iovec describes the live vector; the kernel writes at most its length.
    unsafe { request(libc::PTRACE_GETREGSET, tid, set.into(), (&raw mut iov).cast()) }?;
    bytes.truncate(iov.iov_len);
    Ok(bytes)
}

/// PTRACE_SETREGSET.
pub(crate) fn set_regset(tid: Pid, set: u32, bytes: &[u8]) -> nix::Result<()> {
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the kernel only reads what the iovec describes.
    unsafe { request(libc::PTRACE_SETREGSET, tid, set.into(), (&raw mut iov).cast()) }.map(drop)
}

/// PTRACE_GETREGS into the kernel's `user_regs_struct`.
pub(crate) fn get_regs(tid: Pid) -> nix::Result<libc::user_regs_struct> {
    nix::sys::ptrace::getregs(tid.nix())
}

/// PTRACE_SETREGS.
pub(crate) fn set_regs(tid: Pid, regs: &libc::user_regs_struct) -> nix::Result<()> {
    nix::sys::ptrace::setregs(tid.nix(), *regs)
}

/// PTRACE_GETSIGMASK: the mask that the task will have when it is back in its program.
pub(crate) fn get_sigmask(tid: Pid) -> nix::Result<SigMask> {
    let mut mask = 0u64;
    // SAFETY: addr is the size of the mask that data points to.
    unsafe { request(PTRACE_GETSIGMASK, tid, 8, (&raw mut mask).cast()) }?;
    Ok(SigMask(mask))
}

/// PTRACE_SETSIGMASK.
pub(crate) fn set_sigmask(tid: Pid, SigMask(mut mask): SigMask) -> nix::Result<()> {
    // SAFETY: addr is the size of the mask that data points to; the kernel only reads it.
    unsafe { request(PTRACE_SETSIGMASK, tid, 8, (&raw mut mask).cast()) }.map(drop)
}

/// PTRACE_GETSIGINFO: why the tracee is stopped. ESRCH while it is not.
pub(crate) fn get_siginfo(tid: Pid) -> nix::Result<SigInfo> {
    let mut info = SigInfo([0; SIGINFO_SIZE]);
    // SAFETY: data points to room for one siginfo_t.
    unsafe { request(libc::PTRACE_GETSIGINFO, tid, 0, info.0.as_mut_ptr().cast()) }?;
    Ok(info)
}

/// PTRACE_PEEKSIGINFO: every pending signal of the thread, or (`shared`) of its process, in queue order.
pub(crate) fn peek_siginfo(tid: Pid, shared: bool) -> nix::Result<Vec<SigInfo>> {
    const ROUND: usize = 32;
    let mut all = Vec::new();
    loop {
        let mut buffer = [[0u8; SIGINFO_SIZE]; ROUND];
        let mut args = libc::ptrace_peeksiginfo_args {
            off: all.len() as u64,
            flags: if shared { PEEK_SHARED } else { 0 },
            nr: ROUND as i32,
        };
        let address = (&raw mut args) as u64;
        // SAFETY: addr points to the argument block, data to room for `nr` siginfo_t.
        let got =
            unsafe { request(libc::PTRACE_PEEKSIGINFO, tid, address, buffer.as_mut_ptr().cast()) }? as usize;
        all.extend(buffer.iter().take(got).map(|info| SigInfo(*info)));
        if got < ROUND {
            return Ok(all);
        }
    }
}

/// PTRACE_GET_RSEQ_CONFIGURATION (since Linux 5.13); none when the thread has registered no area.
pub(crate) fn rseq_configuration(tid: Pid) -> nix::Result<Option<RseqConfiguration>> {
    let mut rseq = RseqConfiguration::default();
    let size = size_of_val(&rseq) as u64;
    // SAFETY: addr is the size of the block that data points to.
    unsafe { request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, (&raw mut rseq).cast()) }?;
    Ok((rseq.pointer != 0).then_some(rseq))
}

/// PTRACE_PEEKUSER of DR7: does the task have hardware breakpoints?
pub(crate) fn has_breakpoints(tid: Pid) -> nix::Result<bool> {
    const DR7: usize = std::mem::offset_of!(libc::user, u_debugreg) + 7 * 8;
    const ENABLED: u64 = 0xff;
    let mut word = 0u64;
    // SAFETY: data points to the word that the raw system call stores the answer in (glibc's wrapper would
    // return it instead).
    let asked =
        unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKUSER, tid.raw(), DR7, &raw mut word) };
    check(asked).map(|_| word & ENABLED != 0)
}

/// PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG (since Linux 6.4): is it on?
pub(crate) fn dispatches_syscalls(tid: Pid) -> nix::Result<bool> {
    const GET_CONFIG: u32 = 0x4211;
    // struct ptrace_sud_config: mode, selector, offset, len
    let mut config = [0u64; 4];
    let size = size_of_val(&config) as u64;
    // SAFETY: addr is the size of the block that data points to.
    unsafe { request(GET_CONFIG, tid, size, config.as_mut_ptr().cast()) }?;
    Ok(config[0] != 0)
}

/// PTRACE_GETEVENTMSG: for a fork event, the new task's number.
pub(crate) fn event_message(tid: Pid) -> nix::Result<u64> {
    nix::sys::ptrace::getevent(tid.nix()).map(|message| message as u64)
}

/// PTRACE_SEIZE with an option word.
pub(crate) fn seize(tid: Pid, options: u32) -> nix::Result<()> {
    // SAFETY: SEIZE takes integers only.
    unsafe { request(libc::PTRACE_SEIZE, tid, 0, options as usize as *mut libc::c_void) }.map(drop)
}

/// PTRACE_O_SUSPEND_SECCOMP (since Linux 4.3).
pub(crate) const SUSPEND_SECCOMP: u32 = 1 << 21;

/// PTRACE_SETOPTIONS of a stopped tracee.
pub(crate) fn set_options(tid: Pid, options: u32) -> nix::Result<()> {
    // SAFETY: SETOPTIONS takes integers only.
    unsafe { request(libc::PTRACE_SETOPTIONS, tid, 0, options as usize as *mut libc::c_void) }.map(drop)
}

/// PTRACE_SECCOMP_GET_FILTER (since Linux 4.4): the program of the filter with this number, the oldest being 0, an
/// instruction a word; none when there are fewer, or none at all.
pub(crate) fn seccomp_filter(tid: Pid, number: usize) -> nix::Result<Option<Vec<u64>>> {
    const GET_FILTER: u32 = 0x420c;
    let number = number as u64;
    // SAFETY: without a buffer only the length is told.
    let len = match unsafe { request(GET_FILTER, tid, number, std::ptr::null_mut()) } {
        Ok(len) => len as usize,
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINVAL) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let mut program = vec![0u64; len];
    // SAFETY: data points to room for as many 8-byte instructions as the stopped task's filter has.
    unsafe { request(GET_FILTER, tid, number, program.as_mut_ptr().cast()) }?;
    Ok(Some(program))
}

/// PTRACE_SECCOMP_GET_METADATA (since Linux 4.16): the flags of the filter with this number.
pub(crate) fn seccomp_flags(tid: Pid, number: usize) -> nix::Result<u64> {
    const GET_METADATA: u32 = 0x420d;
    let mut metadata = [number as u64, 0];
    let size = size_of_val(&metadata) as u64;
    // SAFETY: addr is the size of the block that data points to.
    unsafe { request(GET_METADATA, tid, size, metadata.as_mut_ptr().cast()) }?;
    Ok(metadata[1])
}

/// PTRACE_INTERRUPT.
pub(crate) fn interrupt(tid: Pid) -> nix::Result<()> {
    // SAFETY: INTERRUPT takes integers only.
    unsafe { request(libc::PTRACE_INTERRUPT, tid, 0, std::ptr::null_mut()) }.map(drop)
}

/// How a stopped tracee is set going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Resume {
    /// PTRACE_CONT.
    Run = libc::PTRACE_CONT,
    /// PTRACE_SYSCALL: to the next entry or exit of a system call.
    ToSyscall = libc::PTRACE_SYSCALL,
    /// PTRACE_DETACH.
    Detach = libc::PTRACE_DETACH,
}

/// Sets a stopped tracee going; the signal that stopped it, if any, is not delivered.
pub(crate) fn resume(tid: Pid, how: Resume) -> nix::Result<()> {
    // SAFETY: these requests take integers only.
    unsafe { request(how as u32, tid, 0, std::ptr::null_mut()) }.map(drop)
}

/// PTRACE_CONT out of a signal stop, with the signal that stopped it.
pub(crate) fn deliver(tid: Pid, signal: i32) -> nix::Result<()> {
    // SAFETY: CONT takes integers only.
    unsafe { request(libc::PTRACE_CONT, tid, 0, signal as usize as *mut libc::c_void) }.map(drop)
}
