//! Restartable sequences (rseq(2), Documentation/rseq): the registered area of a thread. A thread that was
//! stopped inside a critical section goes on at its abort handler, as after any preemption.

use std::ops::Range;

use crate::Pid;
use crate::arch::{Regs, RegsExt};
use crate::error::{NameCall, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Memory, Tracee, sys};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Rseq {
    pointer: u64,
    size: u32,
    signature: u32,
}

impl Record for Rseq {
    const TAG: Tag = Tag::new(b"RSEQ");
    const VERSION: u16 = 1;
    const NAME: &'static str = "restartable sequences";
}

impl State for Rseq {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Plain;
    type Asked = ();

    fn ask(_: View<'_>, _: &mut Batch) -> Result<()> {
        Ok(())
    }

    fn describe((): (), _: &Answers, view: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        let area =
            crate::sys::ptrace::rseq_configuration(view.tid()).call("ptrace(GET_RSEQ_CONFIGURATION)")?;
        Ok(area.map(|area| Self { pointer: area.pointer, size: area.size, signature: area.signature }))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        batch.call(sys::rseq, &[self.pointer, u64::from(self.size), 0, u64::from(self.signature)]);
        Ok(())
    }
}

/// The area of a thread, which the kernel writes to whenever the thread goes on: on another processor, other values.
pub(crate) fn area(tid: Pid) -> Option<Range<u64>> {
    let area = crate::sys::ptrace::rseq_configuration(tid).ok().flatten()?;
    Some(area.pointer..area.pointer + u64::from(area.size))
}

/// Takes a thread out of the critical section that it is in, if any: the kernel would do so at the first
/// signal or preemption, but an injected system call makes it forget the section instead.
pub(crate) fn leave_critical_section(tracee: &Tracee, mut regs: Regs, memory: &Memory) -> Result<()> {
    let Ok(Some(area)) = crate::sys::ptrace::rseq_configuration(tracee.tid()) else { return Ok(()) };
    if let Some(abort) = abort_address(area.pointer, &regs, memory) {
        regs.rip = abort;
        regs.orig_rax = u64::MAX;
        tracee.set_regs(&regs)?;
    }
    Ok(())
}

fn abort_address(area: u64, regs: &Regs, memory: &Memory) -> Option<u64> {
    const RSEQ_CS: u64 = 8;
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    let section = word(&memory.read_vec(area + RSEQ_CS, 8).ok()?, 0).filter(|section| *section != 0)?;
    // struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip
    let section = memory.read_vec(section, 32).ok()?;
    let (start, length, abort) = (word(&section, 8)?, word(&section, 16)?, word(&section, 24)?);
    (regs.pc().wrapping_sub(start) < length).then_some(abort)
}
