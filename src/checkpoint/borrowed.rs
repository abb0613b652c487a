//! A stopped process with the tools by which it executes system calls for us.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::Pid;
use crate::arch::RegsExt;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::freeze::{Frozen, Process, Thread};
use crate::image::ImageSink;
use crate::proc::smaps::Mapping;
use crate::resource::Report;
use crate::resource::memory::{
    self, AddressSpace, Crowd, FromInside, Kinship, Member, PageWriter, Scan, Stock, Survey, Tracker,
};
use crate::resource::signals::{overruns::Due, pending::Continue};
use crate::resource::tasks::blocked::{self, Blocked};
use crate::resource::tasks::job_stop::{self, JobStop};
use crate::resource::tasks::sharing::{Kind, Shares};
use crate::resource::tasks::{rseq, unsupported};
use crate::tracee::{Memory, Puppet, Saved, Scratch, Springboard, sys};

/// What batches need in an address space; the processes that share it use them one at a time.
#[derive(Clone, Copy)]
pub(super) struct Tools {
    pub(super) springboard: Springboard,
    pub(super) scratch: Scratch,
}

impl Tools {
    pub(super) fn install(speaker: &Thread, memory: &Memory, vdso: Range<u64>) -> Result<Self> {
        let springboard = Springboard::install(memory, vdso)?;
        match springboard.map_scratch(&speaker.tracee, memory) {
            Ok(scratch) => Ok(Self { springboard, scratch }),
            Err(error) => {
                springboard.remove(memory)?;
                Err(error)
            }
        }
    }

    pub(super) fn remove(self, speaker: &Thread, memory: &Memory) -> Result<()> {
        self.springboard.unmap_scratch(&speaker.tracee, memory, self.scratch)?;
        self.springboard.remove(memory)
    }
}

/// A stopped process that executes system calls for us. Dropping it gives it back.
pub(super) struct Borrowed<'f> {
    pub(super) process: &'f Process,
    /// Its memory is not described with another process that shares it.
    pub(super) owns_memory: bool,
    /// Whose descriptors it has.
    pub(super) files: u32,
    pub(super) mappings: Arc<Vec<Mapping>>,
    pub(super) pages: Arc<Scan>,
    /// Those that a tracker has been watching.
    pub(super) watched: Vec<Range<u64>>,
    pub(super) memory: Memory,
    /// None for a process that cannot be asked. The last of those who share them takes them away.
    pub(super) tools: Option<Arc<Tools>>,
    /// Blocked SIGCONTs that our stops would discard.
    pub(super) continues: Vec<Continue>,
    pub(super) due: Due,
}

impl<'f> Borrowed<'f> {
    pub(super) fn all(
        frozen: &'f Frozen,
        shares: &Shares,
        mut tracker: Option<&mut Tracker>,
        report: &mut Report,
    ) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::with_capacity(frozen.processes.len());
        // Where those are whose memory others share.
        let mut owners = BTreeMap::new();
        let owns = |process: &&Process| shares.process(process.number).get(Kind::Memory) == process.number;
        let own: Vec<Pid> = frozen.processes.iter().filter(owns).map(Process::speaker).collect();
        let mut surveys = match own.len() {
            0 | 1 => BTreeMap::new(),
            _ => Survey::of_all(&own)?,
        };
        for process in &frozen.processes {
            let owner = shares.process(process.number).get(Kind::Memory);
            let first = owners.get(&owner).and_then(|index: &usize| all.get(*index));
            let survey = surveys.remove(&process.speaker());
            let tracker = tracker.as_deref_mut();
            let mut borrowed = Self::borrow(process, first, (survey, tracker), report).of(process.pid)?;
            borrowed.files = shares.process(process.number).get(Kind::Files);
            owners.entry(owner).or_insert(all.len());
            all.push(borrowed);
        }
        Ok(all)
    }

    /// With its survey, if that has been made already.
    pub(super) fn borrow(
        process: &'f Process,
        sharer: Option<&Self>,
        (survey, tracker): (Option<Survey>, Option<&mut Tracker>),
        report: &mut Report,
    ) -> Result<Self> {
        let can_be_asked = unsupported::check(process, report)?;
        let memory = Memory::open(process.speaker())?;
        let mut watched = Vec::new();
        let (mappings, pages) = match sharer {
            Some(sharer) => (sharer.mappings.clone(), sharer.pages.clone()),
            None => {
                let Survey { mut mappings, pages } = survey.map_or_else(|| Survey::of(process), Ok)?;
                if let Some(tracker) = tracker {
                    watched = tracker.recognise(process.speaker(), &mut mappings)?;
                }
                (Arc::new(mappings), Arc::new(pages))
            }
        };
        let vdso = memory::vdso(&mappings);
        let owns_memory = sharer.is_none();
        let (files, tools, continues, due) = (process.number, None, Vec::new(), Due::default());
        let mut borrowed =
            Self { process, owns_memory, files, mappings, pages, watched, memory, tools, continues, due };
        // What we let tasks execute is 64-bit code.
        let Some(registers) = unsupported::registers(process, report)? else { return Ok(borrowed) };
        let memory = &borrowed.memory;
        for (thread, mut regs) in process.threads.iter().zip(registers) {
            if let Some(vdso) = vdso.as_ref().filter(|_| Springboard::may_be_at(regs.pc())) {
                Springboard::bring_home(&thread.tracee, memory, vdso)?;
                regs = thread.tracee.regs()?;
            }
            // No system call is made in a critical section.
            if regs.interrupted_call().is_none() {
                rseq::leave_critical_section(&thread.tracee, regs, memory)?;
            } else {
                blocked::call_again(&thread.tracee, regs, thread.sleeper, memory)?;
            }
        }
        if can_be_asked && let Some(speaker) = process.threads.first() {
            let vdso = vdso.ok_or_else(|| {
                Error::new(
                    ErrorKind::Unsupported,
                    "it has no vdso, from which system calls could be executed",
                )
            })?;
            borrowed.continues = Continue::all(process)?;
            borrowed.tools = match sharer.and_then(|sharer| sharer.tools.clone()) {
                Some(tools) => Some(tools),
                None => Some(Arc::new(Tools::install(speaker, &borrowed.memory, vdso)?)),
            };
            borrowed.due = Due::find(process, |thread| borrowed.puppet(thread))?;
        }
        Ok(borrowed)
    }

    pub(super) fn puppet<'p>(&'p self, thread: &'p Thread) -> Result<Option<Puppet<'p>>> {
        let Some(Tools { scratch, .. }) = self.tools.as_deref().copied() else { return Ok(None) };
        let saved = Saved::of(&thread.tracee)?;
        let Process { status, .. } = self.process;
        let ids = self.process.ids();
        Puppet::borrow(&thread.tracee, ids, &self.memory, scratch, &saved, status.sig_cgt).map(Some)
    }

    /// How many bytes it has written to that nobody else has.
    pub(super) fn own_bytes(&self) -> u64 {
        let private = self.mappings.iter().filter(|mapping| !mapping.shared);
        private.map(|mapping| mapping.private_dirty_kb * 1024).sum()
    }

    /// Has its pages written with those of the others; `rest` is how much those have of their own that come
    /// after it.
    pub(super) fn write_pages<'b>(
        &'b self,
        (space, stock): (AddressSpace, &Stock),
        (kinship, rest): (Kinship, u64),
        crowd: &mut Crowd<'b>,
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<()> {
        let Process { pid, number, .. } = *self.process;
        let (speaker, files) = (self.process.speaker(), self.files);
        let (scan, memory) = (&*self.pages, &self.memory);
        let member = Member { pid, speaker, number, files, kinship, pages: scan, memory, inside: self, rest };
        crowd.add(member, (space, stock), pages, image)
    }

    pub(super) fn make_descriptor(&self) -> Result<Option<OwnedFd>> {
        let Some(speaker) = self.process.threads.first() else { return Ok(None) };
        let Some(mut puppet) = self.puppet(speaker)? else { return Ok(None) };
        let made = memory::descriptor(&mut puppet);
        puppet.release()?;
        made.map(Some)
    }

    pub(super) fn leave_notes(&self, sleeps: &BTreeMap<Pid, Blocked>) {
        for thread in &self.process.threads {
            if let (Some(sleep), Ok(regs)) = (sleeps.get(&thread.tid()), thread.tracee.regs()) {
                sleep.leave_note(&regs, &self.memory);
            }
        }
    }

    pub(super) fn give_back(mut self) -> Result<()> {
        self.take_tools_away()
    }

    /// It will be killed: there is nothing to be tidied up.
    pub(super) fn abandon(mut self) -> &'f Process {
        self.tools = None;
        self.process
    }

    /// Asks it about its children: which are stopped, or have been continued.
    pub(super) fn stops_of(&self, frozen: &Frozen) -> Result<Vec<(u32, JobStop)>> {
        let Some(speaker) = self.process.threads.first() else { return Ok(Vec::new()) };
        let own = |child: &&Process| child.stat.ppid == self.process.pid.get();
        let children: Vec<&Process> = frozen.processes.iter().filter(own).collect();
        let mut stops = Vec::new();
        for some in children.chunks(256) {
            let Some(mut puppet) = self.puppet(speaker)? else { break };
            let mut batch = puppet.batch();
            let asked: Vec<_> = some.iter().map(|child| job_stop::Asked::of(child, &mut batch)).collect();
            let answers = puppet.run(batch)?;
            puppet.release()?;
            for one in asked {
                stops.extend(one.describe(&answers)?);
            }
        }
        Ok(stops)
    }

    /// Makes the process wait for children of its own that have been killed.
    pub(super) fn wait_for(&self, children: &[u32]) -> Result<()> {
        let Some(speaker) = self.process.threads.first().filter(|_| !children.is_empty()) else {
            return Ok(());
        };
        let Some(mut puppet) = self.puppet(speaker)? else { return Ok(()) };
        for some in children.chunks(1024) {
            let mut batch = puppet.batch();
            let options = (libc::WNOHANG | libc::__WALL) as u64;
            some.iter().for_each(|child| {
                batch.call(sys::wait4, &[u64::from(*child), 0, options, 0]);
            });
            // One that ignores SIGCHLD has none to wait for: that is as well.
            puppet.run(batch)?;
        }
        puppet.release()
    }

    pub(super) fn take_tools_away(&mut self) -> Result<()> {
        let (Some(tools), Some(speaker)) = (self.tools.take(), self.process.threads.first()) else {
            return Ok(());
        };
        let Tools { springboard, scratch } = *tools;
        let queued = self.continues.iter().try_for_each(|one| {
            let mut threads = self.process.threads.iter().map(|thread| &thread.tracee);
            let thread = threads.find(|thread| Some(thread.number()) == one.thread);
            let (address, tracee) = (scratch.input().start, thread.unwrap_or(&speaker.tracee));
            let (call, args) = one.call(self.process.number, address);
            self.memory.write(address, &one.info.0)?;
            springboard.call(tracee, &self.memory, call, args).map(drop)
        });
        let last = Arc::into_inner(tools);
        queued.and(last.map_or(Ok(()), |tools| tools.remove(speaker, &self.memory)))
    }
}

impl FromInside for Borrowed<'_> {
    fn is_possible(&self) -> bool {
        memory::inside::is_possible(self.process)
    }

    fn is_steady(&self, address: u64) -> bool {
        memory::inside::is_steady(&self.mappings, address)
    }

    fn rewritten(&self) -> Option<Range<u64>> {
        rseq::area(self.process.speaker())
    }

    fn speaker(&self) -> Result<Puppet<'_>> {
        let speaker = self.process.threads.first().map_or(Ok(None), |thread| self.puppet(thread))?;
        speaker.ok_or_else(|| Error::new(ErrorKind::Kernel, "it cannot be asked").of(self.process.pid))
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        // On the way out of another error, or of a target that was killed meanwhile.
        let _ = self.take_tools_away();
    }
}
