//! Hands: threads that a stopped process has for a while, to do several things at the same time.

use tracing::debug;

use super::{CloneArgs, Puppet, Saved, Scratch, Tracee, sys};
use crate::Pid;
use crate::arch::RegsExt;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::ptrace::{Resume, SigMask};

/// Has up to `wanted` more threads made by the process of `speaker` while `work` is done, which gets all that
/// there are, `speaker` first. The kernel may grant fewer, or none (RLIMIT_NPROC, pids.max).
///
/// Should we die, a hand finishes its batch and ends.
pub(crate) fn with_hands<T>(
    speaker: &mut Puppet<'_>,
    wanted: usize,
    work: impl FnOnce(&mut [&mut Puppet<'_>]) -> Result<T>,
) -> Result<T> {
    let mut hands = Vec::new();
    while hands.len() < wanted {
        match Hand::grow(speaker) {
            Ok(hand) => hands.push(hand),
            Err(error) => {
                debug!(%error, hands = hands.len(), "no more hands");
                break;
            }
        }
    }
    let worked = employ(speaker, &hands, work);
    let ended = hands.into_iter().try_for_each(|hand| hand.end(speaker));
    worked.and_then(|done| ended.map(|()| done))
}

fn employ<T>(
    speaker: &mut Puppet<'_>,
    hands: &[Hand],
    work: impl FnOnce(&mut [&mut Puppet<'_>]) -> Result<T>,
) -> Result<T> {
    let (process, memory, ending) = (speaker.process(), speaker.memory(), speaker.ending());
    let puppets = hands
        .iter()
        .map(|hand| Puppet::employ(&hand.tracee, process, memory, hand.scratch, &hand.last_call, ending));
    let mut puppets = puppets.collect::<Result<Vec<_>>>()?;
    let mut all: Vec<&mut Puppet<'_>> = std::iter::once(speaker).chain(&mut puppets).collect();
    work(&mut all)
}

/// One such thread. Dropping it ends it; its scratch memory then stays behind.
struct Hand {
    tracee: Tracee,
    scratch: Scratch,
    /// What it does when nobody wants anything else of it: exit(2).
    last_call: Saved,
}

impl Hand {
    fn grow(speaker: &mut Puppet<'_>) -> Result<Self> {
        speaker.tracee().trace_clones()?;
        let scratch = speaker.map_scratch()?;
        let mut regs = speaker.tracee().regs()?;
        regs.enter_call(scratch.syscall(), sys::exit.number, [0; 6], 0);
        let last_call = Saved { regs, mask: SigMask::ALL, xstate: speaker.tracee().xstate()? };
        // Its stack pointer leads to its end from its first instruction on.
        let made = scratch.put_way_back(&last_call, speaker.memory()).and_then(|stack| {
            let mut batch = speaker.batch();
            let args = CloneArgs {
                flags: CloneArgs::THREAD,
                stack: scratch.base(),
                stack_size: stack - scratch.base(),
                ..CloneArgs::default()
            };
            let words = args.words();
            let args = batch.input_words(&words);
            let call = batch.call(sys::clone3, &[args, size_of_val(&words) as u64]);
            let mut born = None;
            let answers = speaker.run_forking(batch, |tid: Pid| {
                let tracee = Tracee::attached(tid);
                tracee.wait_step()?;
                born = Some(tracee);
                Ok(())
            })?;
            let number = answers.get(call)? as u32;
            let born = born.map(|hand| hand.known_as(number));
            born.ok_or_else(|| Error::new(ErrorKind::Kernel, "a new thread is not traced"))
        });
        match made {
            Ok(tracee) => Ok(Self { tracee, scratch, last_call }),
            Err(error) => {
                speaker.unmap_scratch(scratch)?;
                Err(error)
            }
        }
    }

    fn end(self, speaker: &mut Puppet<'_>) -> Result<()> {
        let scratch = self.scratch;
        drop(self);
        speaker.unmap_scratch(scratch)
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        // Its puppet, going, has left it before its last call. Errors: it has been killed with the whole process.
        let ended = self.tracee.set_regs(&self.last_call.regs).and_then(|()| self.tracee.resume(Resume::Run));
        let _ = ended.and_then(|()| self.tracee.wait_death(true));
    }
}
