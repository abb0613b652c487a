//! Batches of remote system calls: a table that the task works through in one go.

use std::ops::Range;

use nix::errno::Errno;

use super::Scratch;
use crate::Pid;
use crate::arch::{self, ENTRY_WORDS};
use crate::error::{Error, Result, Subject};
use crate::sys::PAGE;

/// A system call by number, and by the name that errors show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sys {
    pub(crate) number: i64,
    pub(crate) name: &'static str,
}

/// The system calls that tasks are made to execute, under their own names.
#[allow(non_upper_case_globals)]
pub(crate) mod sys {
    macro_rules! calls {
        ($($name:ident = $number:ident;)*) => {
            $(pub(crate) const $name: super::Sys =
                super::Sys { number: libc::$number, name: stringify!($name) };)*
        };
    }
    calls! {
        mmap = SYS_mmap;
        mprotect = SYS_mprotect;
        munmap = SYS_munmap;
        mremap = SYS_mremap;
        madvise = SYS_madvise;
        brk = SYS_brk;
        mlock2 = SYS_mlock2;
        mlockall = SYS_mlockall;
        msync = SYS_msync;
        mbind = SYS_mbind;
        shmget = SYS_shmget;
        shmat = SYS_shmat;
        mseal = SYS_mseal;
        pkey_mprotect = SYS_pkey_mprotect;
        pkey_alloc = SYS_pkey_alloc;
        pkey_free = SYS_pkey_free;
        rt_sigaction = SYS_rt_sigaction;
        rt_sigqueueinfo = SYS_rt_sigqueueinfo;
        rt_sigtimedwait = SYS_rt_sigtimedwait;
        rt_tgsigqueueinfo = SYS_rt_tgsigqueueinfo;
        sigaltstack = SYS_sigaltstack;
        getitimer = SYS_getitimer;
        setitimer = SYS_setitimer;
        prctl = SYS_prctl;
        set_tid_address = SYS_set_tid_address;
        set_robust_list = SYS_set_robust_list;
        rseq = SYS_rseq;
        setsid = SYS_setsid;
        setpgid = SYS_setpgid;
        fchdir = SYS_fchdir;
        chdir = SYS_chdir;
        close_range = SYS_close_range;
        chroot = SYS_chroot;
        umask = SYS_umask;
        dup3 = SYS_dup3;
        close = SYS_close;
        fcntl = SYS_fcntl;
        epoll_ctl = SYS_epoll_ctl;
        epoll_wait = SYS_epoll_wait;
        recvmsg = SYS_recvmsg;
        socketpair = SYS_socketpair;
        pwrite64 = SYS_pwrite64;
        pwritev = SYS_pwritev;
        userfaultfd = SYS_userfaultfd;
        wait4 = SYS_wait4;
        waitid = SYS_waitid;
        pause = SYS_pause;
        exit = SYS_exit;
        exit_group = SYS_exit_group;
        tgkill = SYS_tgkill;
        clone3 = SYS_clone3;
        unshare = SYS_unshare;
        clock_gettime = SYS_clock_gettime;
        timer_create = SYS_timer_create;
        timer_settime = SYS_timer_settime;
        timer_gettime = SYS_timer_gettime;
        timer_getoverrun = SYS_timer_getoverrun;
        arch_prctl = SYS_arch_prctl;
        getpid = SYS_getpid;
        membarrier = SYS_membarrier;
        get_mempolicy = SYS_get_mempolicy;
        set_mempolicy = SYS_set_mempolicy;
        seccomp = SYS_seccomp;
        personality = SYS_personality;
        setresuid = SYS_setresuid;
        setresgid = SYS_setresgid;
        setfsuid = SYS_setfsuid;
        setfsgid = SYS_setfsgid;
        setgroups = SYS_setgroups;
        keyctl = SYS_keyctl;
        capset = SYS_capset;
        prlimit64 = SYS_prlimit64;
    }
}

/// Not a system call, but a thing that the loop does by itself: see [`Batch::sum_pages`].
const SUM_PAGES: Sys = Sys { number: arch::SUM_PAGES, name: "checksum" };

/// One call of a batch: the key to its answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call(usize);

/// Memory in the task that a call writes to, read back with the answers.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    /// Its address in the task.
    pub(crate) addr: u64,
    range: Range<usize>,
}

/// A call that a task only executes if we die before its next batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LastWill(pub(crate) Sys, pub(crate) [u64; 4]);

struct Entry {
    sys: Sys,
    args: [u64; 6],
    subject: Option<Subject>,
}

/// System calls to be executed by a task, in order, with the memory that they read and write.
///
/// Every call is executed whatever became of those before it; the answers tell.
pub(crate) struct Batch {
    scratch: Scratch,
    entries: Vec<Entry>,
    input: Vec<u8>,
    output: usize,
    subject: Option<Subject>,
}

impl Batch {
    pub(crate) fn new(scratch: Scratch) -> Self {
        Self { scratch, entries: Vec::new(), input: Vec::new(), output: 0, subject: None }
    }

    /// Queues one call.
    pub(crate) fn call(&mut self, sys: Sys, args: &[u64]) -> Call {
        let mut six = [0; 6];
        six.iter_mut().zip(args).for_each(|(slot, arg)| *slot = *arg);
        self.entries.push(Entry { sys, args: six, subject: self.subject.clone() });
        Call(self.entries.len() - 1)
    }

    /// Queues the sums of pages (their CRC-32Cs), which must be readable: where they will be. The processor must be
    /// able to make them ([`arch::can_sum`]).
    pub(crate) fn sum_pages(&mut self, pages: &Range<u64>) -> Output {
        let count = (pages.end - pages.start) / PAGE;
        let sums = self.output(count as usize * size_of::<u32>());
        self.call(SUM_PAGES, &[pages.start, sums.addr, count]);
        sums
    }

    /// What the calls from here on are about, for their errors.
    pub(crate) fn about(&mut self, subject: Subject) {
        self.subject = Some(subject);
    }

    /// Puts bytes where the calls can read them: their address in the task, 16-byte aligned.
    pub(crate) fn input(&mut self, bytes: &[u8]) -> u64 {
        let at = self.input.len();
        self.input.extend_from_slice(bytes);
        self.input.resize(self.input.len().next_multiple_of(16), 0);
        self.scratch.input().start + at as u64
    }

    /// The same for plain words.
    pub(crate) fn input_words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.input(&bytes)
    }

    /// Sets room aside that a call can write to.
    pub(crate) fn output(&mut self, len: usize) -> Output {
        let at = self.output;
        self.output += len.next_multiple_of(16);
        Output { addr: self.scratch.output().start + at as u64, range: at..at + len }
    }

    /// A page of the scratch memory that no call touches.
    pub(crate) fn scratch_base(&self) -> u64 {
        self.scratch.base()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Is there little room left? Then run it and go on with a new one.
    pub(crate) fn is_nearly_full(&self) -> bool {
        let room = |range: Range<u64>| (range.end - range.start) as usize;
        self.entries.len() + 256 > self.scratch.room()
            || self.input.len() * 2 > room(self.scratch.input())
            || self.output * 2 > room(self.scratch.output())
    }

    /// Is there room for all of it?
    pub(crate) fn fits(&self) -> bool {
        let room = |range: Range<u64>| (range.end - range.start) as usize;
        self.entries.len() <= self.scratch.room()
            && self.input.len() <= room(self.scratch.input())
            && self.output <= room(self.scratch.output())
    }

    /// The table as the loop reads it: the calls, one that stops the task, and those for the case that nobody comes.
    pub(super) fn table(&self, stop: [u64; 4], last_will: &[LastWill]) -> Vec<u8> {
        let mut table = Vec::with_capacity((self.entries.len() + 1 + last_will.len()) * ENTRY_WORDS * 8);
        let mut push = |number: u64, args: &[u64], result: u64| {
            let mut words = [0u64; ENTRY_WORDS];
            words[0] = number;
            words[1..].iter_mut().zip(args).for_each(|(slot, arg)| *slot = *arg);
            words[ENTRY_WORDS - 1] = result;
            words.iter().for_each(|word| table.extend(word.to_ne_bytes()));
        };
        for entry in &self.entries {
            push(entry.sys.number as u64, &entry.args, 0);
        }
        let [number, args @ ..] = stop;
        push(number, &args, 0);
        for LastWill(sys, args) in last_will {
            push(sys.number as u64, args, 0);
        }
        table
    }

    pub(super) fn input_bytes(&self) -> &[u8] {
        &self.input
    }

    pub(super) fn output_len(&self) -> usize {
        self.output
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn answered(self, pid: Pid, table: &[u8], output: Vec<u8>) -> Answers {
        let results = table
            .chunks_exact(ENTRY_WORDS * 8)
            .map(|entry| entry.last_chunk::<8>().map_or(0, |word| i64::from_ne_bytes(*word)))
            .collect();
        Answers { pid, entries: self.entries, results, output }
    }
}

/// What became of a batch.
pub(crate) struct Answers {
    pid: Pid,
    entries: Vec<Entry>,
    results: Vec<i64>,
    output: Vec<u8>,
}

impl Answers {
    /// The result of one call, or its error.
    pub(crate) fn get(&self, Call(index): Call) -> Result<u64> {
        let result = self.results.get(index).copied().unwrap_or(-i64::from(libc::ENOSYS));
        if !(-4095..0).contains(&result) {
            return Ok(result as u64);
        }
        let errno = Errno::from_raw(-result as i32);
        let Some(Entry { sys, subject, .. }) = self.entries.get(index) else {
            return Err(Error::remote_call("syscall", errno).of(self.pid));
        };
        let error = Error::remote_call(sys.name, errno).of(self.pid);
        Err(match subject {
            Some(subject) => error.about(subject.clone()),
            None => error,
        })
    }

    /// The first error of all the calls, if any failed.
    pub(crate) fn check(&self) -> Result<()> {
        (0..self.entries.len()).try_for_each(|index| self.get(Call(index)).map(drop))
    }

    /// What a call wrote.
    pub(crate) fn bytes(&self, output: &Output) -> &[u8] {
        self.output.get(output.range.clone()).unwrap_or_default()
    }

    /// The same, as plain words.
    pub(crate) fn words(&self, output: &Output) -> Vec<u64> {
        self.bytes(output).chunks_exact(8).map(|w| w.try_into().map_or(0, u64::from_ne_bytes)).collect()
    }
}
