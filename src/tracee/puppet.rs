//! Making a stopped task execute batches, so that it can be left at any moment without harm.

use std::ops::Range;

use super::{Answers, Batch, LastWill, Memory, Stop, Sys, Tracee, sys};
use crate::Pid;
use crate::arch::{self, ENTRY_WORDS, Regs, RegsExt, SYSCALL};
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::sys::PAGE;
use crate::sys::ptrace::{Resume, SigMask};

/// Memory in a task that batches use: a signal frame, the table, what calls read and what they write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scratch {
    base: u64,
    /// Where the code of [`arch::code`] is in the task.
    code: u64,
    sizes: Sizes,
}

/// How much fits into a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    /// Calls.
    entries: u64,
    input: u64,
    output: u64,
}

impl Sizes {
    const WHOLE: Self = Self { entries: 1984, input: 0x4_0000, output: 0x2_0000 };
    const PART: Self = Self { entries: 128, input: 0x2000, output: 0x1000 };
    const ENTRY: u64 = (ENTRY_WORDS * 8) as u64;

    /// The entry by which the task stops. A batch ends there, wherever it begins: what follows stays where it is.
    const fn last(self) -> u64 {
        Scratch::TABLE + self.entries * Self::ENTRY
    }

    const fn input(self) -> u64 {
        self.last() + (1 + Scratch::LAST_WILL as u64) * Self::ENTRY
    }

    const fn total(self) -> u64 {
        self.input() + self.input + self.output
    }
}

impl Scratch {
    /// Calls that only a task executes which nobody came for.
    pub(crate) const LAST_WILL: usize = 63;
    /// Below it is room for a handler: a task that we leave behind may get a signal before it is back.
    const FRAME: u64 = 0x1_0000;
    const TABLE: u64 = Self::FRAME + arch::FRAME_MAX.next_multiple_of(PAGE);
    /// Into so many parts it can be divided, for as many threads at the same time.
    pub(crate) const PARTS: usize = 32;
    /// Bytes of address space that it takes.
    pub(crate) const LEN: u64 = Self::PARTS as u64 * Sizes::PART.total();

    pub(crate) fn new(base: u64, code: u64) -> Self {
        const { assert!(Sizes::WHOLE.total() <= Self::LEN) };
        Self { base, code, sizes: Sizes::WHOLE }
    }

    /// One part of the whole, with room for small batches.
    pub(crate) fn part(&self, index: usize) -> Self {
        debug_assert!(index < Self::PARTS);
        Self { base: self.base + index as u64 * Sizes::PART.total(), sizes: Sizes::PART, ..*self }
    }

    /// Calls of one batch.
    pub(super) fn room(&self) -> usize {
        self.sizes.entries as usize
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    fn mmap_arguments() -> [u64; 6] {
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
        [0, Self::LEN, prot, flags, u64::MAX, 0]
    }

    /// Writes the signal frame through which a task finds back; gives the stack pointer that leads to it.
    pub(crate) fn put_way_back(&self, saved: &Saved, memory: &Memory) -> Result<u64> {
        let at = self.base + Self::FRAME;
        let frame = saved.frame(at, memory);
        memory.write_all(&[(at, &frame.bytes)])?;
        Ok(frame.stack_pointer)
    }

    /// The address of a bare `syscall` instruction.
    pub(crate) fn syscall(&self) -> u64 {
        self.code
    }

    fn last(&self) -> u64 {
        self.base + self.sizes.last()
    }

    /// Where the entries of a batch of this length are.
    fn entries(&self, len: usize) -> Range<u64> {
        self.last() - (len * ENTRY_WORDS * 8) as u64..self.last()
    }

    pub(crate) fn input(&self) -> Range<u64> {
        let start = self.base + self.sizes.input();
        start..start + self.sizes.input
    }

    pub(crate) fn output(&self) -> Range<u64> {
        let start = self.input().end;
        start..start + self.sizes.output
    }
}

/// The signal that a task sends itself at the end of a batch, so that it stops for its tracer. SIGSTOP always does,
/// but to send it makes the kernel look at all threads of the process. A tracer stops at any signal that is not
/// blocked, though, and should there be none any more, one that the program ignores changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ending(i32);

impl Ending {
    pub(crate) const STOP: Self = Self(libc::SIGSTOP);
    /// For tasks without a program.
    pub(crate) const QUIET: Self = Self(libc::SIGURG);

    /// For a task with these signals blocked, whose process has handlers for those.
    pub(crate) fn among(blocked: SigMask, caught: u64) -> Self {
        const IGNORED_BY_DEFAULT: [i32; 3] = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
        let heeded = |signal: &i32| (blocked.0 | caught) >> (signal - 1) & 1 == 1;
        IGNORED_BY_DEFAULT.into_iter().find(|signal| !heeded(signal)).map_or(Self::STOP, Self)
    }

    /// What is blocked during a batch: everything else.
    fn mask(self) -> SigMask {
        SigMask(!(1 << (self.0 - 1)))
    }
}

/// What a batch changes of a task, to be put back, and what the way back without us needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    pub(crate) regs: Regs,
    pub(crate) mask: SigMask,
    pub(crate) xstate: Vec<u8>,
}

impl Saved {
    pub(crate) fn of(tracee: &Tracee) -> Result<Self> {
        Ok(Self { regs: tracee.regs()?, mask: tracee.sigmask()?, xstate: tracee.xstate()? })
    }

    /// The frame by which the task finds back without us. The kernel forgets there how an interrupted sleep
    /// goes on, so that the call has to be made again under its own number.
    fn frame(&self, base: u64, memory: &Memory) -> arch::Frame {
        const REACH: u64 = 9;
        let mut regs = self.regs;
        if regs.interrupted_call() == Some(libc::SYS_restart_syscall) {
            let code = memory.read_vec(regs.pc().saturating_sub(REACH), REACH as usize);
            if let Some(number) = code.ok().and_then(|code| arch::call_number_before(&code)) {
                regs.orig_rax = number as u64;
            }
        }
        arch::signal_frame(base, &regs, self.mask, &self.xstate)
    }
}

/// The mask comes first: as long as the registers lead to the signal frame, that brings back both.
fn put_back(tracee: &Tracee, regs: &Regs, mask: SigMask) -> Result<()> {
    tracee.set_sigmask(mask)?;
    tracee.set_regs(regs)
}

/// A process: its number here, and the one by which it knows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) pid: Pid,
    pub(crate) number: u32,
}

/// Executes batches by several tasks, one each, at the same time.
pub(crate) fn run_together(puppets: &mut [&mut Puppet<'_>], batches: Vec<Batch>) -> Result<Vec<Answers>> {
    let started = puppets.iter_mut().zip(batches).try_for_each(|(puppet, batch)| puppet.start(batch));
    // Every one is waited for, whatever became of the others.
    let finished: Vec<_> = puppets.iter_mut().map(|puppet| puppet.finish()).collect();
    started?;
    finished.into_iter().collect()
}

/// A stopped task that executes batches. Dropping it puts the registers and the mask back, when the batch that it works
/// on is done.
pub(crate) struct Puppet<'t> {
    tracee: Tracee,
    memory: &'t Memory,
    process: Ids,
    scratch: Scratch,
    ending: Ending,
    regs: Regs,
    stack: u64,
    /// The program's own registers and mask.
    back: Option<(Regs, SigMask)>,
    /// Where the configuration is by which the next batch begins with a use of AMX tiles.
    tiles: Option<u64>,
    /// Somebody else's SIGSTOP arrived meanwhile; it must not be lost.
    stop_arrived: bool,
    last_will: Vec<LastWill>,
    /// What it works on.
    at_work: Option<Batch>,
}

impl<'t> Puppet<'t> {
    /// Takes over a running program's task; `caught` are the signals for which the program has handlers. Should we
    /// die, the task goes on where it was, or stops (see [`Ending`]) and does so when continued.
    pub(crate) fn borrow(
        tracee: &Tracee,
        process: Ids,
        memory: &'t Memory,
        scratch: Scratch,
        saved: &Saved,
        caught: u64,
    ) -> Result<Self> {
        Self::employ(tracee, process, memory, scratch, saved, Ending::among(saved.mask, caught))
    }

    /// The same of a task whose signals are not the program's business.
    pub(super) fn employ(
        tracee: &Tracee,
        process: Ids,
        memory: &'t Memory,
        scratch: Scratch,
        saved: &Saved,
        ending: Ending,
    ) -> Result<Self> {
        let stack = scratch.put_way_back(saved, memory)?;
        // An empty batch, which ends in the frame: the mask only changes when the way back is there.
        let mut idle = saved.regs;
        idle.enter_loop(scratch.code, scratch.last(), scratch.last(), stack);
        tracee.set_regs(&idle)?;
        let mut puppet = Self::new(tracee, process, memory, scratch, ending, saved.regs)?;
        (puppet.stack, puppet.back) = (stack, Some((saved.regs, saved.mask)));
        Ok(puppet)
    }

    /// Takes over a blank task, which has nothing to be put back.
    pub(crate) fn own(
        tracee: &Tracee,
        process: Ids,
        memory: &'t Memory,
        scratch: Scratch,
        ending: Ending,
    ) -> Result<Self> {
        let regs = tracee.regs()?;
        Self::new(tracee, process, memory, scratch, ending, regs)
    }

    fn new(
        tracee: &Tracee,
        process: Ids,
        memory: &'t Memory,
        scratch: Scratch,
        ending: Ending,
        regs: Regs,
    ) -> Result<Self> {
        tracee.set_sigmask(ending.mask())?;
        Ok(Self {
            tracee: tracee.clone(),
            memory,
            process,
            scratch,
            ending,
            regs,
            stack: 0,
            back: None,
            tiles: None,
            stop_arrived: false,
            last_will: Vec::new(),
            at_work: None,
        })
    }

    pub(crate) fn tracee(&self) -> &Tracee {
        &self.tracee
    }

    pub(crate) fn process(&self) -> Ids {
        self.process
    }

    pub(crate) fn tgid(&self) -> Pid {
        self.process.pid
    }

    /// What the task is to tidy up should we die, from the next batch on.
    pub(crate) fn if_we_die(&mut self, calls: Vec<LastWill>) {
        debug_assert!(calls.len() <= Scratch::LAST_WILL);
        self.last_will = calls;
    }

    pub(super) fn ending(&self) -> Ending {
        self.ending
    }

    pub(crate) fn memory(&self) -> &'t Memory {
        self.memory
    }

    pub(crate) fn scratch(&self) -> Scratch {
        self.scratch
    }

    pub(crate) fn batch(&self) -> Batch {
        Batch::new(self.scratch)
    }

    /// Executes a batch that creates no tasks.
    pub(crate) fn run(&mut self, batch: Batch) -> Result<Answers> {
        self.run_forking(batch, |_| Ok(()))
    }

    /// Makes the thread use AMX tiles once: before that it cannot be given any tile data.
    pub(crate) fn use_tiles(&mut self) -> Result<()> {
        let mut batch = self.batch();
        let configuration = batch.input(&arch::tile_configuration());
        batch.call(sys::getpid, &[]);
        self.tiles = Some(configuration);
        let used = self.run(batch).map(drop);
        self.tiles = None;
        used
    }

    /// Executes a batch; `born` hears of every task that it creates, which is stopped at its first instruction.
    pub(crate) fn run_forking(
        &mut self,
        batch: Batch,
        born: impl FnMut(Pid) -> Result<()>,
    ) -> Result<Answers> {
        self.start(batch)?;
        self.finish_forking(born)
    }

    /// Sets the task to work on a batch. Until that is finished, nothing else can be wanted of it.
    pub(crate) fn start(&mut self, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            self.at_work = Some(batch);
            return Ok(());
        }
        if !batch.fits() {
            return Err(Error::new(ErrorKind::Kernel, "a batch is larger than its scratch memory"));
        }
        let stop = [
            sys::tgkill.number as u64,
            u64::from(self.process.number),
            u64::from(self.tracee.number()),
            self.ending.0 as u64,
        ];
        let (table, start) = (batch.table(stop, &self.last_will), self.scratch.entries(batch.len()).start);
        self.memory
            .write_all(&[(start, table.as_slice()), (self.scratch.input().start, batch.input_bytes())])?;
        let mut regs = self.regs;
        regs.enter_loop(self.scratch.code, start, start + table.len() as u64, self.stack);
        if let Some(configuration) = self.tiles {
            regs.enter_through_tiles(configuration);
        }
        self.tracee.set_regs(&regs)?;
        self.tracee.resume(Resume::Run)?;
        self.at_work = Some(batch);
        Ok(())
    }

    /// Waits until the batch that was started is done, and fetches the answers.
    pub(crate) fn finish(&mut self) -> Result<Answers> {
        self.finish_forking(|_| Ok(()))
    }

    fn finish_forking(&mut self, born: impl FnMut(Pid) -> Result<()>) -> Result<Answers> {
        let batch = self.at_work.take().unwrap_or_else(|| self.batch());
        if batch.is_empty() {
            return Ok(batch.answered(self.tracee.tid(), &[], Vec::new()));
        }
        self.wait_for_last(born)?;
        let mut back = vec![0; batch.len() * ENTRY_WORDS * 8 + batch.output_len()];
        let output = self.scratch.output().start..self.scratch.output().start + batch.output_len() as u64;
        self.memory.read_ranges(&[self.scratch.entries(batch.len()), output], &mut back)?;
        let output = back.split_off(batch.len() * ENTRY_WORDS * 8);
        Ok(batch.answered(self.tracee.tid(), &back, output))
    }

    fn wait_for_last(&mut self, mut born: impl FnMut(Pid) -> Result<()>) -> Result<()> {
        let last = self.scratch.last();
        loop {
            match self.tracee.wait_step()? {
                Stop::Event(_) => {
                    let child = crate::sys::ptrace::event_message(self.tracee.tid());
                    let child = child.map_err(|errno| Error::call("ptrace(GETEVENTMSG)", errno))?;
                    born(Pid::from(child as u32))?;
                }
                // The loop keeps its place in rbx: anything earlier is a signal that others sent.
                Stop::Signal(signal) if signal == self.ending.0 && self.tracee.regs()?.rbx == last => {
                    return Ok(());
                }
                Stop::Signal(libc::SIGSTOP) => self.stop_arrived = true,
                Stop::Signal(signal) if signal == self.ending.0 => {} // the program ignores it too
                Stop::Interrupted | Stop::Group(_) => {}
                stop @ (Stop::Signal(_) | Stop::Syscall) => {
                    let reason = format!("a remote system call ended in {stop:?}");
                    return Err(Error::new(ErrorKind::Kernel, reason).of(self.tracee.tid()));
                }
            }
            self.tracee.resume(Resume::Run)?;
        }
    }

    /// Has it map scratch memory for one more task of its process.
    pub(super) fn map_scratch(&mut self) -> Result<Scratch> {
        let mut batch = self.batch();
        let mapped = batch.call(sys::mmap, &Scratch::mmap_arguments());
        let base = self.run(batch)?.get(mapped)?;
        Ok(Scratch::new(base, self.scratch.code))
    }

    pub(super) fn unmap_scratch(&mut self, scratch: Scratch) -> Result<()> {
        let mut batch = self.batch();
        batch.call(sys::munmap, &[scratch.base, Scratch::LEN]);
        self.run(batch)?.check()
    }

    /// Starts one call, which is to be interrupted at its entry, so that the kernel is in the state of a task that a
    /// signal is about to take out of this very call. The batch is not executed: it has what the call reads.
    pub(crate) fn enter(&mut self, number: i64, args: [u64; 6], batch: &Batch) -> Result<()> {
        self.memory.write_all(&[(self.scratch.input().start, batch.input_bytes())])?;
        let mut regs = self.regs;
        regs.enter_call(self.scratch.syscall(), number, args, self.stack);
        self.tracee.set_regs(&regs)?;
        self.tracee.resume(Resume::ToSyscall)
    }

    /// Interrupts the call at its entry.
    pub(crate) fn interrupt(&mut self) -> Result<()> {
        wait_for_syscall(&self.tracee)?;
        self.tracee.interrupt()?;
        self.tracee.resume(Resume::Run)
    }

    /// The result, in the kernel's form, of the call that was interrupted.
    pub(crate) fn interrupted(&mut self) -> Result<i64> {
        loop {
            match self.tracee.wait_step()? {
                Stop::Interrupted | Stop::Group(_) => return Ok(self.tracee.regs()?.result()),
                Stop::Syscall => self.tracee.resume(Resume::Run)?,
                stop => {
                    let reason = format!("a blocked system call ended in {stop:?}");
                    return Err(Error::new(ErrorKind::Kernel, reason).of(self.tracee.tid()));
                }
            }
        }
    }

    /// Puts the program's registers and mask back now, so that an error can be told.
    pub(crate) fn release(mut self) -> Result<()> {
        self.put_back()
    }

    /// The same; nothing more can be wanted of it then.
    pub(crate) fn put_back(&mut self) -> Result<()> {
        if std::mem::take(&mut self.stop_arrived) {
            let sent = nix::sys::signal::kill(self.tgid().nix(), nix::sys::signal::Signal::SIGSTOP);
            sent.map_err(|errno| Error::call("kill", errno).of(self.tgid()))?;
        }
        self.back.take().map_or(Ok(()), |(regs, mask)| put_back(&self.tracee, &regs, mask))
    }
}

impl Drop for Puppet<'_> {
    fn drop(&mut self) {
        // There is something to do only on the way out of another error, or of a task that has died.
        let _ = self.finish();
        let _ = self.put_back();
    }
}

fn step_to_syscall(tracee: &Tracee) -> Result<()> {
    tracee.resume(Resume::ToSyscall)?;
    wait_for_syscall(tracee)
}

fn wait_for_syscall(tracee: &Tracee) -> Result<()> {
    for _ in 0..4 {
        if tracee.wait_step()? == Stop::Syscall {
            return Ok(());
        }
        tracee.resume(Resume::ToSyscall)?;
    }
    Err(Error::new(ErrorKind::Kernel, "it does not reach its system call").of(tracee.tid()))
}

/// The code that a running program's tasks execute batches with: placed in the unused end of its vdso, of
/// which the process then has a private copy. No mapping, descriptor or text of the program is touched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Springboard {
    code: u64,
}

impl Springboard {
    /// The end of the vdso that may hold it.
    pub(crate) const ROOM: u64 = 256;

    /// Can an instruction at this address be the code's? It is at the end of a page.
    pub(crate) fn may_be_at(pc: u64) -> bool {
        pc % PAGE >= PAGE - Self::ROOM
    }

    /// Brings a task home that a checkpoint left in the middle of a batch when it was killed: what it still had
    /// to do is over, but for what it had to close; what is left is that checkpoint's last will and the way back. Its
    /// stack pointer leads to the signal frame all the time.
    pub(crate) fn bring_home(tracee: &Tracee, memory: &Memory, vdso: &Range<u64>) -> Result<Home> {
        let mut regs = tracee.regs()?;
        let at = vdso.end.saturating_sub(Self::ROOM);
        if !(at..vdso.end).contains(&regs.pc()) || memory.read_vec(at, arch::code().len())? != arch::code() {
            return Ok(Home::Program);
        }
        if !is_last_call(&regs, at) {
            let stack = regs.stack_pointer();
            let (closes, will) = duties(regs.left_in_loop(at), memory);
            // Behind the will is one call more: the way back.
            let parts = closes.into_iter().map(|part| (part, 0)).chain([(will, 1)]);
            for (part, more) in parts {
                regs.enter_loop(at, part.start, part.end, stack);
                tracee.set_regs(&regs)?;
                for _ in 0..2 * ((part.end - part.start) / Sizes::ENTRY + more) {
                    step_to_syscall(tracee)?;
                }
            }
        }
        Ok(if is_last_call(&tracee.regs()?, at) { Home::End } else { Home::Program })
    }

    /// Installs the code in the process that `memory` shows, whose vdso is at `vdso`.
    pub(crate) fn install(memory: &Memory, vdso: Range<u64>) -> Result<Self> {
        let code = arch::code();
        let at = vdso.end.saturating_sub(Self::ROOM);
        let mut tail = vec![0; code.len()];
        memory.read(at, &mut tail)?;
        let installed_before = tail == code;
        if at < vdso.start || !(installed_before || tail.iter().all(|byte| *byte == 0)) {
            return Err(Error::new(ErrorKind::Kernel, "the end of its vdso is not empty")
                .about(Subject::Vma { start: vdso.start, end: vdso.end, what: "[vdso]".into() }));
        }
        memory.write(at, code)?;
        Ok(Self { code: at })
    }

    /// Removes the code again.
    pub(crate) fn remove(self, memory: &Memory) -> Result<()> {
        memory.write(self.code, &vec![0; arch::code().len()])
    }

    /// Makes the task map scratch memory.
    pub(crate) fn map_scratch(self, tracee: &Tracee, memory: &Memory) -> Result<Scratch> {
        let base = self.call(tracee, memory, sys::mmap, Scratch::mmap_arguments())?;
        Ok(Scratch::new(base, self.code))
    }

    /// Makes the task unmap it.
    pub(crate) fn unmap_scratch(self, tracee: &Tracee, memory: &Memory, scratch: Scratch) -> Result<()> {
        self.call(tracee, memory, sys::munmap, [scratch.base, Scratch::LEN, 0, 0, 0, 0]).map(drop)
    }

    /// One remote system call without scratch memory. The way back, should we die, is a signal frame below
    /// the red zone of the task's stack, where any signal could have put one.
    pub(crate) fn call(self, tracee: &Tracee, memory: &Memory, sys: Sys, args: [u64; 6]) -> Result<u64> {
        let saved = Saved::of(tracee)?;
        let length = saved.frame(0, memory).bytes.len() as u64;
        let base = (saved.regs.stack_pointer().wrapping_sub(arch::RED_ZONE + length)) & !63;
        let frame = saved.frame(base, memory);
        // A program may use its stack pointer for something else: then there is no place for a way back.
        let below = memory.read_vec(base, frame.bytes.len()).ok();
        if below.is_some() {
            memory.write(base, &frame.bytes)?;
        }
        let mut regs = saved.regs;
        regs.enter_call(self.code, sys.number, args, frame.stack_pointer);
        let result = tracee.set_regs(&regs).and_then(|()| {
            tracee.set_sigmask(SigMask::ALL)?;
            step_to_syscall(tracee)?;
            step_to_syscall(tracee)?;
            Ok(tracee.regs()?.result())
        });
        put_back(tracee, &saved.regs, saved.mask)?;
        if let Some(below) = below {
            memory.write(base, &below)?;
        }
        let result = result?;
        if (-4095..0).contains(&result) {
            let errno = nix::errno::Errno::from_raw(-result as i32);
            return Err(Error::remote_call(sys.name, errno).of(tracee.tid()));
        }
        Ok(result as u64)
    }
}

/// Where a task goes on that a killed checkpoint has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    /// Where the program was.
    Program,
    /// Nowhere: it was a hand, and is about to end.
    End,
}

/// Of the entries of a table, each that closes a descriptor, and those behind the one that stops the task: the last
/// will. (Others of that kind there are none.)
fn duties(left: Range<u64>, memory: &Memory) -> (Vec<Range<u64>>, Range<u64>) {
    let nothing = (Vec::new(), 0..0);
    let len = left.end.saturating_sub(left.start);
    let table = match len {
        1..=Scratch::LEN if len.is_multiple_of(Sizes::ENTRY) => memory.read_vec(left.start, len as usize),
        _ => return nothing,
    };
    // Memory that is gone has no will in it.
    let Ok(table) = table else { return nothing };
    let calls = |entry: &[u8], sys: Sys| entry.starts_with(&sys.number.to_ne_bytes());
    let entries =
        || (left.start..).step_by(Sizes::ENTRY as usize).zip(table.chunks_exact(Sizes::ENTRY as usize));
    let stop = entries().filter(|(_, entry)| calls(entry, sys::tgkill)).map(|(at, _)| at).last();
    let will = stop.map_or(left.start, |at| at + Sizes::ENTRY)..left.end;
    let closes = entries().filter(|(at, entry)| *at < will.start && calls(entry, sys::close));
    (closes.map(|(at, _)| at..at + Sizes::ENTRY).collect(), will)
}

/// Is this a hand, before its last call?
fn is_last_call(regs: &Regs, code: u64) -> bool {
    regs.pc() == code && regs.result() == sys::exit.number
}

/// Executes one call by two stops at the instruction at `pc`; for the very last call of a task whose scratch
/// memory goes with it. The caller sets the registers afterwards.
pub(crate) fn call_at(tracee: &Tracee, pc: u64, sys: Sys, args: [u64; 6]) -> Result<()> {
    debug_assert_eq!(SYSCALL.len() as u64, arch::SYSCALL_LEN);
    let mut regs = tracee.regs()?;
    let stack = regs.stack_pointer();
    regs.enter_call(pc, sys.number, args, stack);
    tracee.set_regs(&regs)?;
    step_to_syscall(tracee)?;
    step_to_syscall(tracee)?;
    match tracee.regs()?.result() {
        0 => Ok(()),
        result => {
            let errno = nix::errno::Errno::from_raw(-result as i32);
            Err(Error::remote_call(sys.name, errno).of(tracee.tid()))
        }
    }
}

/// Sets a task going on its last call: one that ends it, or that sends it the `signal` which does.
pub(crate) fn last_call(tracee: &Tracee, pc: u64, sys: Sys, args: [u64; 6], signal: i32) -> Result<()> {
    let mut regs = tracee.regs()?;
    regs.enter_call(pc, sys.number, args, 0);
    tracee.set_regs(&regs)?;
    tracee.set_sigmask(SigMask(0))?;
    tracee.resume(Resume::Run)?;
    if signal == 0 || signal == libc::SIGKILL {
        return Ok(());
    }
    match tracee.wait_step() {
        Ok(Stop::Signal(arrived)) if arrived == signal => crate::sys::ptrace::deliver(tracee.tid(), signal)
            .map_err(|errno| Error::call("ptrace(CONT)", errno).of(tracee.tid())),
        Ok(stop) => Err(Error::new(ErrorKind::Kernel, format!("it stopped by {stop:?}")).of(tracee.tid())),
        Err(error) if error.kind() == ErrorKind::TaskGone => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_by_a_signal_that_nobody_heeds() {
        let set = |signals: &[i32]| signals.iter().fold(0, |set, signal| set | 1u64 << (signal - 1));
        assert_eq!(Ending::among(SigMask(0), 0), Ending::QUIET);
        assert_eq!(Ending::among(SigMask(set(&[libc::SIGURG])), 0), Ending(libc::SIGWINCH));
        let ending = Ending::among(SigMask(set(&[libc::SIGURG])), set(&[libc::SIGWINCH, libc::SIGUSR1]));
        assert_eq!((ending, ending.mask().0 >> (libc::SIGCHLD - 1) & 1), (Ending(libc::SIGCHLD), 0));
        assert_eq!(Ending::among(SigMask::ALL, 0), Ending::STOP);
        assert_eq!(Ending::among(SigMask(0), u64::MAX), Ending::STOP);
    }
}
