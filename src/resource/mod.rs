//! Everything that a task can hold, one file per kind, and the one list of them.
//!
//! A [`State`] belongs to one thread or to one process. Describing it is asking: remote system calls that
//! it puts into a batch, together with everybody else's, and whatever can be learnt from outside. Building
//! is the same in reverse. The engine decides when batches run; a state only says in which [`Stage`].

pub(crate) mod fds;
pub(crate) mod memory;
pub(crate) mod signals;
pub(crate) mod sockets;
pub(crate) mod tasks;

use std::fmt::Debug;

use crate::Pid;
use crate::error::{Error, ErrorKind, Refusal, Result, Subject};
use crate::freeze::{Process, Thread};
use crate::image::{Image, Owner, Record, Records, Section, Tag};
use crate::proc::status::Status;
use crate::resource::fds::Links;
use crate::resource::memory::{Moved, Paged, Run};
use crate::resource::tasks::caller::Caller;
use crate::tracee::{Answers, Batch, Saved, Tracee};

/// Whose state it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Each thread has its own: the section's owner is the tid.
    Thread,
    /// The threads of a process share it: the owner is the tgid; its first living thread is asked.
    Process,
}

/// When a state is built, counted from the moment at which all tasks exist and have their memory and files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// What nothing else depends on.
    Plain,
    /// What takes privileges away from its thread: nothing that needs any can come later.
    Identity,
    /// What the change of identity would undo, or what restricts system calls.
    Seal,
    /// What could end the quiet: pending signals, running timers.
    Pending,
    /// From outside, when the task's own batches are over: registers.
    Release,
}

/// A stopped thread of the target, as describing it sees it.
#[derive(Clone, Copy)]
pub(crate) struct View<'t> {
    pub(crate) process: &'t Process,
    pub(crate) thread: &'t Thread,
    pub(crate) status: &'t Status,
    /// Its registers and mask, which are its own only while no batch runs.
    pub(crate) saved: &'t Saved,
    /// Of the timers of its process.
    pub(crate) due: &'t signals::overruns::Due,
    /// What waited for its process before anything was asked.
    pub(crate) continues: &'t [signals::pending::Continue],
}

impl<'t> View<'t> {
    pub(crate) fn tid(&self) -> Pid {
        self.thread.tid()
    }

    /// Is it the one that is asked for what all share?
    pub(crate) fn speaks(&self) -> bool {
        self.tid() == self.process.speaker()
    }

    /// By which the thread knows itself.
    pub(crate) fn number(&self) -> u32 {
        self.tracee().number()
    }

    pub(crate) fn tracee(&self) -> &'t Tracee {
        &self.thread.tracee
    }
}

/// A thread that is being rebuilt.
#[derive(Clone, Copy)]
pub(crate) struct Rebuilt<'t> {
    pub(crate) pid: Pid,
    /// By which its process knows itself.
    pub(crate) process: u32,
    pub(crate) tracee: &'t Tracee,
    /// What every task has from whoever restores it, until it is changed.
    pub(crate) fresh: &'t Status,
}

impl Rebuilt<'_> {
    pub(crate) fn tid(&self) -> Pid {
        self.tracee.tid()
    }
}

/// Everything that a checkpoint refuses, gathered in one go.
#[derive(Debug, Default)]
pub(crate) struct Report(pub(crate) Vec<Refusal>);

impl Report {
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        self.0.push(refusal);
    }

    /// The short form for an attribute of a task.
    pub(crate) fn attribute(
        &mut self,
        pid: Pid,
        name: &'static str,
        reason: impl Into<std::borrow::Cow<'static, str>>,
    ) {
        self.refuse(Refusal::new(pid, Subject::Attribute(name), reason));
    }
}

/// One kind of state: its record, how it is read from a stopped thread and how it is put into a new one.
pub(crate) trait State: Record + Send + Sync {
    /// Thread or process.
    const SCOPE: Scope;
    /// When it is built.
    const STAGE: Stage;
    /// A task that has it can only be worked on under PTRACE_O_SUSPEND_SECCOMP.
    const SUSPENDS_SECCOMP: bool = false;
    /// What `ask` keeps for `describe`.
    type Asked: 'static;

    /// Queues the remote system calls whose answers it needs, and reads what has to be read before them.
    fn ask(view: View<'_>, batch: &mut Batch) -> Result<Self::Asked>;

    /// Makes the record; `None` when there is nothing to be restored. What it cannot restore it refuses.
    fn describe(
        asked: Self::Asked,
        answers: &Answers,
        view: View<'_>,
        report: &mut Report,
    ) -> Result<Option<Self>>;

    /// What has to be found out before there is any task.
    fn check(&self, _caller: &Caller) -> Result<()> {
        Ok(())
    }

    /// Queues the remote system calls that rebuild it.
    fn build(&self, _task: Rebuilt<'_>, _batch: &mut Batch) -> Result<()> {
        Ok(())
    }

    /// What is done from outside, before the batch of its stage.
    fn settle(&self, _task: Rebuilt<'_>) -> Result<()> {
        Ok(())
    }
}

/// The second half of describing one state of one thread.
pub(crate) type Describe = Box<dyn FnOnce(&Answers, View<'_>, &mut Report, &mut Records) -> Result<()>>;

/// A record on its way into a task.
pub(crate) trait Rebuild: Debug + Send + Sync {
    fn check(&self, caller: &Caller) -> Result<()>;
    fn build(&self, task: Rebuilt<'_>, batch: &mut Batch) -> Result<()>;
    fn settle(&self, task: Rebuilt<'_>) -> Result<()>;
    fn suspends_seccomp(&self) -> bool;
}

impl<S: State> Rebuild for S {
    fn check(&self, caller: &Caller) -> Result<()> {
        State::check(self, caller)
    }

    fn build(&self, task: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        State::build(self, task, batch)
    }

    fn settle(&self, task: Rebuilt<'_>) -> Result<()> {
        State::settle(self, task)
    }

    fn suspends_seccomp(&self) -> bool {
        S::SUSPENDS_SECCOMP
    }
}

/// The record that a task has of this kind, if it has one.
pub(crate) type Loaded = Result<Option<Box<dyn Rebuild>>>;

/// One line of the registration list: a kind of state, without its type.
pub(crate) struct Registration {
    pub(crate) record: RecordKind,
    pub(crate) scope: Scope,
    pub(crate) stage: Stage,
    pub(crate) ask: fn(View<'_>, &mut Batch) -> Result<Describe>,
    pub(crate) load: fn(&Image, Owner) -> Loaded,
}

/// What every kind of record can do, without its type.
#[derive(Clone, Copy)]
pub(crate) struct RecordKind {
    pub(crate) tag: Tag,
    pub(crate) name: &'static str,
    /// Decodes a payload and says what is in it.
    pub(crate) show: fn(&Section<'_>) -> Result<String>,
    #[cfg(any(test, fuzzing))]
    pub(crate) fuzz: fn(&[u8]),
}

impl RecordKind {
    pub(crate) const fn of<R: Record>() -> Self {
        Self {
            tag: R::TAG,
            name: R::NAME,
            show: |section| section.record::<R>().map(|record| format!("{record:?}")),
            #[cfg(any(test, fuzzing))]
            fuzz: crate::fuzz::round_trip::<R>,
        }
    }
}

impl Registration {
    const fn of<S: State>() -> Self {
        Self {
            record: RecordKind::of::<S>(),
            scope: S::SCOPE,
            stage: S::STAGE,
            ask: |view, batch| {
                let asked = S::ask(view, batch)?;
                Ok(Box::new(move |answers, view, report, records| {
                    let owner = match S::SCOPE {
                        Scope::Thread => view.number(),
                        Scope::Process => view.process.number,
                    };
                    match S::describe(asked, answers, view, report)? {
                        Some(record) => records.put(Owner(owner), &record),
                        None => Ok(()),
                    }
                }))
            },
            load: |image, owner| {
                Ok(image.get::<S>(owner)?.map(|record| Box::new(record) as Box<dyn Rebuild>))
            },
        }
    }
}

/// Every kind of state, in the order in which those of one stage are built.
pub(crate) const STATES: &[Registration] = &[
    Registration::of::<tasks::name::Name>(),
    Registration::of::<tasks::identity::ThreadPointers>(),
    Registration::of::<tasks::rseq::Rseq>(),
    Registration::of::<tasks::membarrier::Membarrier>(),
    Registration::of::<tasks::dynamic_features::DynamicFeatures>(),
    Registration::of::<signals::altstack::AltStack>(),
    Registration::of::<signals::actions::Actions>(),
    Registration::of::<tasks::limits::Limits>(),
    Registration::of::<tasks::scheduling::Scheduling>(),
    Registration::of::<tasks::mempolicy::MemoryPolicy>(),
    Registration::of::<tasks::proc_files::ProcFiles>(),
    Registration::of::<tasks::label::Label>(),
    Registration::of::<tasks::seccomp::SharedFilters>(),
    Registration::of::<tasks::seccomp::Seccomp>(),
    Registration::of::<tasks::credentials::Credentials>(),
    Registration::of::<tasks::attributes::Attributes<false>>(),
    Registration::of::<tasks::attributes::Attributes<true>>(),
    Registration::of::<signals::itimers::IntervalTimers>(),
    Registration::of::<signals::posix_timers::PosixTimers>(),
    Registration::of::<signals::pending::ProcessPending>(),
    Registration::of::<signals::pending::ThreadPending>(),
    Registration::of::<tasks::registers::Registers>(),
];

/// Records that are not the state of one task.
const OBJECTS: &[RecordKind] = &[
    RecordKind::of::<tasks::tree::Tree>(),
    RecordKind::of::<tasks::cpu::Processor>(),
    RecordKind::of::<tasks::job_stop::JobStop>(),
    RecordKind::of::<tasks::dead_leader::DeadLeader>(),
    RecordKind::of::<tasks::sharing::Sharing>(),
    RecordKind::of::<tasks::blocked::Blocked>(),
    RecordKind::of::<tasks::cgroup::Membership>(),
    RecordKind::of::<tasks::login::LoginUser>(),
    RecordKind::of::<memory::AddressSpace>(),
    RecordKind::of::<memory::SharedObject>(),
    RecordKind::of::<memory::PreDumped>(),
    RecordKind::of::<crate::image::Chunks>(),
    RecordKind::of::<fds::Places>(),
    RecordKind::of::<fds::FdTable>(),
    RecordKind::of::<fds::Description>(),
    RecordKind::of::<fds::FileOwner>(),
    RecordKind::of::<fds::Pipe>(),
    RecordKind::of::<fds::Ghost>(),
    RecordKind::of::<fds::DescriptionLocks>(),
    RecordKind::of::<fds::Watches>(),
    RecordKind::of::<memory::Vdso>(),
    RecordKind::of::<sockets::UnixPair>(),
];

/// A kind of record that says where pages are, without its type.
pub(crate) struct PagedKind {
    pub(crate) tag: Tag,
    pub(crate) runs: fn(&Section<'_>) -> Result<Vec<Run>>,
    /// Puts it among the records of another image, which has the pages elsewhere.
    pub(crate) put: fn(&Section<'_>, (&Moved<'_>, &mut Links), &mut Records) -> Result<()>,
}

impl PagedKind {
    const fn of<R: Paged>() -> Self {
        Self {
            tag: R::TAG,
            runs: |section| Ok(std::mem::take(section.record::<R>()?.runs())),
            put: |section, (moved, links), records| {
                let mut record = section.record::<R>()?;
                record.give_names(links)?;
                let there = record.runs().iter().map(|run| moved.run(run)).collect::<Result<Vec<_>>>()?;
                *record.runs() = there.into_iter().flatten().collect();
                records.put(section.owner, &record)
            },
        }
    }
}

/// All of them.
pub(crate) const PAGED: &[PagedKind] = &[
    PagedKind::of::<memory::AddressSpace>(),
    PagedKind::of::<memory::SharedObject>(),
    PagedKind::of::<memory::PreDumped>(),
    PagedKind::of::<fds::Ghost>(),
];

/// An image must not be used without what a newer version has put into it.
pub(crate) fn refuse_unknown(image: &Image) -> Result<()> {
    let known: Vec<_> = all_records().map(|kind| kind.tag).collect();
    match image.unknown(&known).next() {
        None => Ok(()),
        Some(section) => Err(Error::new(ErrorKind::Image, "this library does not know this kind of record")
            .about(Subject::Section(section.tag.to_string()))
            .with_hint("the image was written by a newer version")),
    }
}

/// Every kind of record that an image can hold.
pub(crate) fn all_records() -> impl Iterator<Item = RecordKind> {
    let files = fds::KINDS.iter().map(|kind| kind.record);
    STATES.iter().map(|state| state.record).chain(OBJECTS.iter().copied()).chain(files)
}

#[cfg(test)]
mod tests;
