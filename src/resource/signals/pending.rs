//! Signals that wait to be delivered, to a process or to one thread, with their `siginfo` and in their order.
//!
//! PTRACE_PEEKSIGINFO shows them; the task itself queues them again, because rt_sigqueueinfo(2) takes any
//! `si_code` only from a sender who is also the receiver. All signals are blocked while it does. Those of periodic
//! timers belong to the timers, see [`posix_timers`](super::posix_timers): they are pending before the others.

use super::posix_timers::Sent;
use crate::Pid;
use crate::error::{NameCall, Result};
use crate::freeze::Process;
use crate::image::{Bytes, Decode, Encode, Image, Owner, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::sys::ptrace::{SIGINFO_SIZE, SigInfo, peek_siginfo};
use crate::tracee::{Answers, Batch, Sys, sys};

/// One `siginfo_t` after another.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Queue(Vec<Bytes>);

impl Queue {
    fn ask(view: View<'_>, shared: bool, batch: &mut Batch) -> Result<Asked> {
        let mut signals = peek_siginfo(view.tid(), shared).call("ptrace(PEEKSIGINFO)")?;
        if !signals.iter().any(is_continue) {
            let thread = (!shared).then_some(view.number());
            let lost = view.continues.iter().filter(|one| one.thread == thread);
            signals.extend(lost.map(|one| one.info));
        }
        Ok((Sent::ask(&signals, view, batch)?, signals))
    }

    /// None if there is nothing to be queued.
    fn describe((sent, signals): Asked, answers: &Answers) -> Result<Option<Self>> {
        let mut queue = Vec::new();
        for info in signals {
            if !sent.contains(&info, answers)? {
                queue.push(info.0.to_vec().into());
            }
        }
        Ok((!queue.is_empty()).then_some(Self(queue)))
    }

    fn infos(&self) -> impl Iterator<Item = SigInfo> {
        self.0.iter().map(|bytes| {
            let mut info = SigInfo([0; SIGINFO_SIZE]);
            info.0.iter_mut().zip(&**bytes).for_each(|(slot, byte)| *slot = *byte);
            info
        })
    }

    /// The end of every batch is a stop signal, which would discard a SIGCONT: that one waits for the end.
    fn queue(&self, batch: &mut Batch, mut send: impl FnMut(&mut Batch, u64, u64)) {
        for info in self.infos().filter(|info| !is_continue(info)) {
            let address = batch.input(&info.0);
            send(batch, info.signo() as u64, address);
        }
    }
}

/// Before the batch, which ends in a stop signal.
pub(crate) type Asked = (Sent, Vec<SigInfo>);

/// What waits for a thread (and, if it speaks, for its process and all threads, whom the timers signal), to be compared
/// with what waits later. A batch itself may discard SIGCONT, which does not count.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Snapshot(Vec<[u8; SIGINFO_SIZE]>);

impl Snapshot {
    pub(crate) fn take(view: View<'_>) -> Result<Self> {
        let mut queues = vec![(view.tid(), false)];
        if view.speaks() {
            queues = view.process.threads.iter().map(|thread| (thread.tid(), false)).collect();
            queues.push((view.tid(), true));
        }
        let mut all = Vec::new();
        for (tid, shared) in queues {
            let queue = peek_siginfo(tid, shared).call("ptrace(PEEKSIGINFO)")?;
            all.extend(queue.iter().filter(|info| !is_continue(info)).map(|info| info.0));
        }
        Ok(Self(all))
    }
}

fn is_continue(info: &SigInfo) -> bool {
    info.signo() == libc::SIGCONT
}

/// A SIGCONT that waits for a process, or for one of its threads. The stop signal at the end of a batch discards it, so
/// that it is queued again when no batch follows any more.
#[derive(Clone, Copy)]
pub(crate) struct Continue {
    /// By which its process knows it; none: the process.
    pub(crate) thread: Option<u32>,
    pub(crate) info: SigInfo,
}

impl Continue {
    /// Those that wait now, before there is any batch.
    pub(crate) fn all(process: &Process) -> Result<Vec<Self>> {
        let mut queues = vec![(process.speaker(), None)];
        queues.extend(process.threads.iter().map(|thread| (thread.tid(), Some(thread.tracee.number()))));
        let mut all = Vec::new();
        for (tid, thread) in queues {
            let queue = peek_siginfo(tid, thread.is_none()).call("ptrace(PEEKSIGINFO)")?;
            all.extend(queue.into_iter().filter(is_continue).map(|info| Self { thread, info }));
        }
        Ok(all)
    }

    /// Those of an image.
    pub(crate) fn load(image: &Image, process: Pid, threads: &[u32]) -> Result<Vec<Self>> {
        let of = |queue: &Queue, thread| -> Vec<Self> {
            queue.infos().filter(is_continue).map(|info| Self { thread, info }).collect()
        };
        let shared: Option<ProcessPending> = image.get(Owner(process.get()))?;
        let mut all = shared.map_or(Vec::new(), |pending| of(&pending.0, None));
        for thread in threads {
            let own: Option<ThreadPending> = image.get(Owner(*thread))?;
            all.extend(own.map_or(Vec::new(), |pending| of(&pending.0, Some(*thread))));
        }
        Ok(all)
    }

    /// The call by which the thread, or one that speaks for the process with this number, queues it again; its siginfo
    /// is at `info`.
    pub(crate) fn call(&self, process: u32, info: u64) -> (Sys, [u64; 6]) {
        let (process, signal) = (u64::from(process), libc::SIGCONT as u64);
        match self.thread {
            None => (sys::rt_sigqueueinfo, [process, signal, info, 0, 0, 0]),
            Some(thread) => (sys::rt_tgsigqueueinfo, [process, thread.into(), signal, info, 0, 0]),
        }
    }
}

/// Signals pending for the process.
#[derive(Encode, Decode, Debug)]
pub(crate) struct ProcessPending(Queue);

impl Record for ProcessPending {
    const TAG: Tag = Tag::new(b"SIGP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "pending signals of a process";
}

impl State for ProcessPending {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Pending;
    type Asked = Asked;

    fn ask(view: View<'_>, batch: &mut Batch) -> Result<Asked> {
        Queue::ask(view, true, batch)
    }

    fn describe(asked: Asked, answers: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        Ok(Queue::describe(asked, answers)?.map(Self))
    }

    fn build(&self, task: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        self.0.queue(batch, |batch, signal, info| {
            batch.call(sys::rt_sigqueueinfo, &[u64::from(task.process), signal, info]);
        });
        Ok(())
    }
}

/// Signals pending for one thread.
#[derive(Encode, Decode, Debug)]
pub(crate) struct ThreadPending(Queue);

impl Record for ThreadPending {
    const TAG: Tag = Tag::new(b"SIGT");
    const VERSION: u16 = 1;
    const NAME: &'static str = "pending signals of a thread";
}

impl State for ThreadPending {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Pending;
    type Asked = Asked;

    fn ask(view: View<'_>, batch: &mut Batch) -> Result<Asked> {
        Queue::ask(view, false, batch)
    }

    fn describe(asked: Asked, answers: &Answers, _: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        Ok(Queue::describe(asked, answers)?.map(Self))
    }

    fn build(&self, task: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        let (tgid, tid) = (u64::from(task.process), u64::from(task.tracee.number()));
        self.0.queue(batch, |batch, signal, info| {
            batch.call(sys::rt_tgsigqueueinfo, &[tgid, tid, signal, info]);
        });
        Ok(())
    }
}
