//! What becomes of a stopped tree: its records.

use std::collections::{BTreeMap, BTreeSet};

use super::borrowed::{Borrowed, Tools};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::freeze::{Frozen, Process, Thread};
use crate::image::{Owner, Records};
use crate::parallel;
use crate::proc::read;
use crate::proc::smaps::Mapping;
use crate::proc::status::{self, Status};
use crate::resource::fds::{Collector, FilePolicy, Ghosts, Places};
use crate::resource::memory::{self, AddressSpace, SharedObjects, Vdso};
use crate::resource::signals::pending;
use crate::resource::tasks::births;
use crate::resource::tasks::blocked::Blocked;
use crate::resource::tasks::cgroup::Membership;
use crate::resource::tasks::cpu::Processor;
use crate::resource::tasks::dead_leader::DeadLeader;
use crate::resource::tasks::login::LoginUser;
use crate::resource::tasks::sharing::{Kind, Shares};
use crate::resource::tasks::tree::Tree;
use crate::resource::{Report, STATES, Scope, View};
use crate::tracee::{Answers, Batch, Ending, Memory, Puppet, Saved, Scratch};

/// The records of a tree, but for its pages.
pub(super) struct Described {
    pub(super) records: Records,
    pub(super) spaces: Vec<AddressSpace>,
    /// Those that have been recorded.
    pub(super) vdsos: BTreeSet<u32>,
    pub(super) shared: SharedObjects,
    pub(super) ghosts: Ghosts,
    pub(super) sleeps: BTreeMap<Pid, Blocked>,
    /// Who may share pages with whom.
    pub(super) kin: BTreeMap<u32, u32>,
}

impl Described {
    pub(super) fn of(
        frozen: &Frozen,
        borrowed: &[Borrowed<'_>],
        shares: &Shares,
        policy: &FilePolicy,
        report: &mut Report,
    ) -> Result<Self> {
        let mut described = Self {
            records: Records::new()?,
            spaces: Vec::new(),
            vdsos: BTreeSet::new(),
            shared: SharedObjects::new()?,
            ghosts: Ghosts::default(),
            sleeps: BTreeMap::new(),
            kin: BTreeMap::new(),
        };
        let tree = Tree::describe(frozen, report);
        let owner = |pid| shares.process(pid).get(Kind::Memory);
        described.kin = tree.plan().map(|plan| plan.donors(&tree, owner)).unwrap_or_default();
        described.records.put(Owner::IMAGE, &tree)?;
        described.records.put(Owner::IMAGE, &Processor::here())?;
        births::check(&tree, shares, report)?;
        shares.write(&mut described.records)?;
        let mut files = Collector::new(frozen, &tree, policy);
        let mut next = None;
        for (index, process) in borrowed.iter().enumerate() {
            let speaking = match next.take() {
                Some(speaking) => speaking,
                None => described.begin(process, report)?,
            };
            // Its speaker works while this process is described; who shares memory has to wait for the tools.
            let following = borrowed.get(index + 1).filter(|next| next.owns_memory);
            next = following.map(|next| described.begin(next, report)).transpose()?;
            described.process(process, speaking, &mut files.ghosts, report).of(process.process.pid)?;
            for (tid, sharing) in shares.seats(process.process) {
                let owner = process.process.owner_for(tid);
                if sharing.get(Kind::Files) == owner.0 {
                    files.table(process.process, tid, report, &mut described.records)?;
                }
                if sharing.get(Kind::Places) == owner.0
                    && let Some(places) = Places::describe(process.process, tid, &mut files.ghosts, report)?
                {
                    described.records.put(owner, &places)?;
                }
            }
            for (child, stop) in process.stops_of(frozen)? {
                described.records.put(Owner(child), &stop)?;
            }
        }
        described.shared.note_unattached(frozen, report)?;
        described.ghosts = files.finish(report, &mut described.records)?;
        Ok(described)
    }

    /// Sets the speaker of a process to work.
    fn begin<'b>(&mut self, borrowed: &'b Borrowed<'b>, report: &mut Report) -> Result<Option<Speaking<'b>>> {
        let Process { pid, ref threads, .. } = *borrowed.process;
        let Some(speaker) = threads.first() else { return Ok(None) };
        let seen = self.look(borrowed, (speaker, None), report).of(pid)?;
        let asking = borrowed.tools.as_deref().map(|tools| Asking::start(&seen, tools.scratch));
        Ok(Some(Speaking { seen, asking: asking.transpose().of(pid)? }))
    }

    fn process(
        &mut self,
        borrowed: &Borrowed<'_>,
        speaking: Option<Speaking<'_>>,
        ghosts: &mut Ghosts,
        report: &mut Report,
    ) -> Result<()> {
        let process = borrowed.process;
        self.records.put(Owner(process.number), &Membership::of(process.speaker())?)?;
        if let Some(login) = LoginUser::of(process.speaker()) {
            self.records.put(Owner(process.number), &login)?;
        }
        if let Some(leader) = DeadLeader::describe(process)? {
            self.records.put(Owner(process.number), &leader)?;
        }
        let Some(Speaking { seen, asking }) = speaking else { return Ok(()) };
        let answered = match asking {
            Some(asking) => self.thread(&seen, asking.finish()?, report)?,
            None => None,
        };
        if let Some((space, answers)) = answered {
            let vdso = Vdso::of(&borrowed.memory, &borrowed.mappings)?;
            if self.vdsos.insert(vdso.sum()) {
                self.records.put(Owner(vdso.sum()), &vdso)?;
            }
            let described = memory::describe(
                process,
                &borrowed.mappings,
                (&space, &answers),
                &vdso,
                (&mut self.shared, &mut *ghosts),
                report,
            )?;
            self.spaces.extend(described);
        }
        let others = process.threads.get(1..).unwrap_or_default();
        self.threads(borrowed, others, report)
    }

    /// Describes the other threads. Half a scratch memory of them work at the same time, while those who had the other
    /// half before are described.
    pub(super) fn threads(
        &mut self,
        borrowed: &Borrowed<'_>,
        threads: &[Thread],
        report: &mut Report,
    ) -> Result<()> {
        let pid = borrowed.process.pid;
        let status = |thread: &Thread| read::of_thread(pid, thread.tid(), "status", status::parse);
        parallel::ahead(threads, status, |status| self.threads_by(borrowed, threads, status, report))
    }

    fn threads_by(
        &mut self,
        borrowed: &Borrowed<'_>,
        threads: &[Thread],
        status: &mut dyn FnMut() -> Result<Status>,
        report: &mut Report,
    ) -> Result<()> {
        const HALF: usize = Scratch::PARTS / 2;
        let mut before = Vec::new();
        for (index, some) in threads.chunks(HALF).enumerate() {
            let seen = some.iter().map(|thread| self.look(borrowed, (thread, Some(status()?)), report));
            let seen = seen.collect::<Result<Vec<_>>>()?;
            let Some(Tools { scratch, .. }) = borrowed.tools.as_deref().copied() else { continue };
            if !seen.iter().all(Seen::ends_quietly) {
                self.answers(std::mem::take(&mut before), report)?;
                for seen in seen {
                    self.thread(&seen, Asked::of(&seen, scratch)?, report)?;
                }
                continue;
            }
            let parts = (index % 2 * HALF..).map(|part| scratch.part(part));
            let asking =
                seen.into_iter().zip(parts).map(|(seen, part)| Ok((Asking::start(&seen, part)?, seen)));
            let asking = asking.collect::<Result<Vec<_>>>()?;
            self.answers(std::mem::replace(&mut before, asking), report)?;
        }
        self.answers(before, report)
    }

    pub(super) fn answers(&mut self, asking: Vec<(Asking<'_>, Seen<'_>)>, report: &mut Report) -> Result<()> {
        asking
            .into_iter()
            .try_for_each(|(asking, seen)| self.thread(&seen, asking.finish()?, report).map(drop))
    }

    pub(super) fn look<'b>(
        &mut self,
        borrowed: &'b Borrowed<'b>,
        (thread, status): (&'b Thread, Option<Status>),
        report: &mut Report,
    ) -> Result<Seen<'b>> {
        let saved = Saved::of(&thread.tracee)?;
        let seen = Seen { borrowed, thread, saved, status };
        self.sleep(seen.view(), &borrowed.memory, report)?;
        Ok(seen)
    }

    pub(super) fn thread(
        &mut self,
        seen: &Seen<'_>,
        asked: Asked,
        report: &mut Report,
    ) -> Result<Option<(memory::Asked, Answers)>> {
        let Asked { states, space, answers, .. } = asked.at_rest(seen)?;
        for describe in states {
            let refused = describe(&answers, seen.view(), report, &mut self.records);
            if let Err(error) = refused {
                report.refuse(error.of(seen.thread.tid()).into_refusal()?);
            }
        }
        Ok(space.map(|space| (space, answers)))
    }

    pub(super) fn sleep(&mut self, view: View<'_>, memory: &Memory, report: &mut Report) -> Result<()> {
        match Blocked::describe(view.tid(), &view.saved.regs, view.thread.sleeper, memory) {
            Ok(Some(sleep)) => {
                self.records.put(Owner(view.number()), &sleep)?;
                self.sleeps.insert(view.tid(), sleep);
            }
            Ok(None) => {}
            Err(error) => report.refuse(error.into_refusal()?),
        }
        Ok(())
    }
}

/// A stopped thread and what it shows to anybody.
pub(super) struct Seen<'b> {
    pub(super) borrowed: &'b Borrowed<'b>,
    pub(super) thread: &'b Thread,
    pub(super) saved: Saved,
    /// None of the speaker, whose is that of the process.
    pub(super) status: Option<Status>,
}

impl<'b> Seen<'b> {
    pub(super) fn view(&self) -> View<'_> {
        let Borrowed { process, due, continues, .. } = self.borrowed;
        let status = self.status.as_ref().unwrap_or(&process.status);
        View { process, thread: self.thread, status, saved: &self.saved, due, continues }
    }

    /// Does it stop for nobody but its tracer? Otherwise it has to work alone: its process, stopped at the end of
    /// one batch and continued, must not be stopped again by another.
    pub(super) fn ends_quietly(&self) -> bool {
        Ending::among(self.saved.mask, self.borrowed.process.status.sig_cgt) != Ending::STOP
    }
}

/// The first thread of a process; it works on its answers if it can be asked.
struct Speaking<'b> {
    seen: Seen<'b>,
    asking: Option<Asking<'b>>,
}

/// A thread that works on its answers.
pub(super) struct Asking<'b> {
    pub(super) puppet: Puppet<'b>,
    pub(super) scratch: Scratch,
    pub(super) mappings: &'b [Mapping],
    pub(super) states: Vec<crate::resource::Describe>,
    pub(super) space: Option<memory::Asked>,
    pub(super) pending: pending::Snapshot,
}

/// One thread's answers.
pub(super) struct Asked {
    pub(super) scratch: Scratch,
    pub(super) states: Vec<crate::resource::Describe>,
    pub(super) space: Option<memory::Asked>,
    pub(super) pending: pending::Snapshot,
    pub(super) answers: Answers,
}

impl<'b> Asking<'b> {
    pub(super) fn start(seen: &Seen<'b>, scratch: Scratch) -> Result<Self> {
        let (view, borrowed) = (seen.view(), seen.borrowed);
        let speaks = view.speaks();
        let pending = pending::Snapshot::take(view)?;
        let mut batch = Batch::new(scratch);
        let wanted = STATES.iter().filter(|state| speaks || state.scope == Scope::Thread);
        // While the thread still has its own registers and mask.
        let states = wanted.map(|state| (state.ask)(view, &mut batch)).collect::<Result<Vec<_>>>()?;
        let space = (speaks && borrowed.owns_memory).then(|| memory::ask(&mut batch, &borrowed.mappings));
        let (process, memory) = (borrowed.process, &borrowed.memory);
        let (ids, caught) = (process.ids(), process.status.sig_cgt);
        let mut puppet = Puppet::borrow(&seen.thread.tracee, ids, memory, scratch, &seen.saved, caught)?;
        puppet.start(batch)?;
        Ok(Self { puppet, scratch, mappings: &borrowed.mappings, states, space, pending })
    }

    pub(super) fn finish(self) -> Result<Asked> {
        let Self { mut puppet, scratch, mappings, states, mut space, pending } = self;
        let answers = puppet.finish()?;
        space.iter_mut().try_for_each(|space| space.ask_more(&answers, &mut puppet, mappings))?;
        puppet.release()?;
        Ok(Asked { scratch, states, space, pending, answers })
    }
}

impl Asked {
    pub(super) fn of(seen: &Seen<'_>, scratch: Scratch) -> Result<Self> {
        Asking::start(seen, scratch)?.finish()
    }

    /// A timer that expires in between would be seen in neither place, or in both: then the thread is asked again.
    pub(super) fn at_rest(mut self, seen: &Seen<'_>) -> Result<Self> {
        const LOOKS: u32 = 50;
        for _ in 0..LOOKS {
            if self.pending == pending::Snapshot::take(seen.view())? {
                return Ok(self);
            }
            self = Self::of(seen, self.scratch)?;
        }
        Err(Error::new(ErrorKind::Timeout, "its signals and timers change faster than they can be looked at")
            .of(seen.view().tid())
            .with_hint("somebody sends it one signal after another; try again"))
    }
}
