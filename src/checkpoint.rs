//! Checkpoint: freeze, collect, describe, write; then let go.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::{debug, info_span};

use crate::Pid;
use crate::arch::RegsExt;
use crate::error::{Context, Error, ErrorKind, NameCall, Phase, Refusal, Result};
use crate::freeze::{Frozen, Process, Thread, freeze};
use crate::hooks::{Event, Hooks, Progress, vetoed};
use crate::image::{Durability, ImageWriter, ManifestInfo, Owner, Records};
use crate::proc::read;
use crate::proc::smaps::Mapping;
use crate::proc::status::{self, Status};
use crate::resource::fds::{Collector, Places};
use crate::resource::memory::{self, AddressSpace, PageWriter, SharedObjects};
use crate::resource::signals::pending;
use crate::resource::tasks::blocked::{self, Blocked};
use crate::resource::tasks::cgroup::Membership;
use crate::resource::tasks::cpu::Processor;
use crate::resource::tasks::dead_leader::DeadLeader;
use crate::resource::tasks::job_stop::{self, JobStop};
use crate::resource::tasks::mempolicy::OfMappings;
use crate::resource::tasks::sharing::{self, Sharing};
use crate::resource::tasks::{rseq, tree::Tree, unsupported};
use crate::resource::{Report, STATES, Scope, View};
use crate::tracee::{Batch, Ending, Memory, Puppet, Saved, Scratch, Springboard, sys};

/// What becomes of the target when its image is complete.
///
/// ```
/// # use cryosleep::{AfterDump, Checkpoint};
/// # fn periodic(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).after(AfterDump::Resume).write_to("/var/lib/images/job")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AfterDump {
    /// It ends, by SIGKILL: its next life is the restored one.
    #[default]
    Kill,
    /// It runs on as if nothing had happened.
    Resume,
    /// It stays stopped, as by SIGSTOP, until somebody sends SIGCONT.
    Stop,
}

/// A checkpoint to be made: who, and how.
///
/// ```no_run
/// use cryosleep::{AfterDump, Checkpoint};
/// use std::time::Duration;
///
/// let dumped = Checkpoint::of(4711u32)
///     .after(AfterDump::Resume)
///     .time_limit(Duration::from_secs(2))
///     .write_to("/var/lib/images/job")?;
/// println!("frozen for {:?}", dumped.stats.frozen);
/// # Ok::<(), cryosleep::Error>(())
/// ```
///
/// Needs Linux 6.7, and the right to trace the target: the same user, or CAP_SYS_PTRACE (ptrace(2)).
#[must_use = "nothing happens before write_to() or preflight()"]
pub struct Checkpoint<'h> {
    root: Pid,
    after: AfterDump,
    time_limit: Duration,
    durability: Durability,
    hooks: Option<&'h mut dyn Hooks>,
}

impl std::fmt::Debug for Checkpoint<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { root, after, time_limit, durability, .. } = self;
        f.debug_struct("Checkpoint")
            .field("root", root)
            .field("after", after)
            .field("time_limit", time_limit)
            .field("durability", durability)
            .finish_non_exhaustive()
    }
}

/// What a checkpoint has done.
///
/// ```no_run
/// let dumped = cryosleep::Checkpoint::of(4711u32).write_to("/tmp/image")?;
/// assert_eq!(dumped.root.get(), 4711);
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Dumped {
    /// The root of the tree.
    pub root: Pid,
    /// How long it took, and how much it was.
    pub stats: CheckpointStats,
}

/// Times and amounts of a checkpoint.
///
/// ```
/// let none = cryosleep::CheckpointStats::default();
/// assert_eq!(none.bytes_written, 0);
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct CheckpointStats {
    /// From the start until the last task stood still.
    pub freezing: Duration,
    /// From then until the tree was let go (or had been killed).
    pub frozen: Duration,
    /// The part of that in which memory was copied.
    pub memory: Duration,
    /// Threads, in all processes.
    pub tasks: u64,
    /// Pages of private memory that the target has mapped.
    pub pages_scanned: u64,
    /// Pages that were populated but held zeroes only, and so were left out.
    pub pages_zero: u64,
    /// Pages stored.
    pub pages_written: u64,
    /// Size of the image, in bytes.
    pub bytes_written: u64,
}

/// Everything that would be refused.
///
/// ```
/// # fn ask(pid: u32) -> cryosleep::Result<()> {
/// let report = cryosleep::Checkpoint::of(pid).preflight()?;
/// if report.is_supported() {
///     println!("it can be checkpointed");
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Preflight(Vec<Refusal>);

impl Preflight {
    /// Nothing stands in the way.
    pub fn is_supported(&self) -> bool {
        self.0.is_empty()
    }

    /// What stands in the way.
    pub fn refusals(&self) -> &[Refusal] {
        &self.0
    }
}

impl<'h> Checkpoint<'h> {
    /// A checkpoint of the tree whose root is this process.
    pub fn of(root: impl Into<Pid>) -> Self {
        const TIME_LIMIT: Duration = Duration::from_secs(10);
        Self {
            root: root.into(),
            after: AfterDump::default(),
            time_limit: TIME_LIMIT,
            durability: Durability::default(),
            hooks: None,
        }
    }

    /// What becomes of the target; it is killed unless this says otherwise.
    pub fn after(mut self, after: AfterDump) -> Self {
        self.after = after;
        self
    }

    /// How long freezing may take; 10 seconds unless this says otherwise.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// What must have reached the disk before the target is let go; nothing unless this says otherwise.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Who hears of the stages.
    pub fn hooks(mut self, hooks: &'h mut dyn Hooks) -> Self {
        self.hooks = Some(hooks);
        self
    }

    /// Makes the checkpoint. The directory is created (mode 0700) if it does not exist; an image that it
    /// holds is replaced in one step, when the new one is complete.
    ///
    /// # Errors
    /// On every error the target runs on unharmed, and an image that was there before is still there.
    /// [`ErrorKind::Unsupported`] lists everything that cannot be brought back.
    pub fn write_to(self, dir: impl AsRef<Path>) -> Result<Dumped> {
        let dir = dir.as_ref();
        on_own_thread(move || self.run(dir))
    }

    /// Freezes the tree for a moment, only to say what a checkpoint of it would refuse.
    ///
    /// # Errors
    /// When the tree cannot be frozen or looked at.
    pub fn preflight(self) -> Result<Preflight> {
        on_own_thread(move || {
            let frozen = freeze(self.root, self.time_limit).in_phase(Phase::Freeze)?;
            let mut report = Report::default();
            let borrowed = Borrowed::all(&frozen, &mut report).in_phase(Phase::Collect)?;
            let described = Described::of(&frozen, &borrowed, &mut report).in_phase(Phase::Describe);
            drop(borrowed);
            described.map(|_| Preflight(report.0))
        })
    }

    fn run(mut self, dir: &Path) -> Result<Dumped> {
        let span = info_span!("checkpoint", root = self.root.get());
        let _entered = span.enter();
        let mut stats = CheckpointStats::default();
        let root = self.root;
        self.tell(Event::PreDump { root }).in_phase(Phase::Freeze)?;
        sleep_precisely();
        let started = Instant::now();
        let frozen = freeze(root, self.time_limit).in_phase(Phase::Freeze)?;
        stats.freezing = started.elapsed();
        stats.tasks = frozen.processes.iter().map(|process| process.threads.len() as u64).sum();
        debug!(processes = frozen.processes.len(), tasks = stats.tasks, "frozen");
        self.tell(Event::Frozen { root }).in_phase(Phase::Freeze)?;

        let mut report = Report::default();
        let borrowed = Borrowed::all(&frozen, &mut report).in_phase(Phase::Collect)?;
        let described = Described::of(&frozen, &borrowed, &mut report).in_phase(Phase::Describe)?;
        if !report.0.is_empty() {
            return Err(Error::unsupported(report.0).in_phase(Phase::Describe));
        }
        let sleeps = self.write(described, &borrowed, dir, &mut stats).in_phase(Phase::Write)?;
        self.tell(Event::PostDump { root }).in_phase(Phase::Release)?;
        match self.after {
            AfterDump::Kill => end_all(&frozen, borrowed).in_phase(Phase::Release)?,
            AfterDump::Resume | AfterDump::Stop => {
                borrowed.iter().for_each(|process| process.leave_notes(&sleeps));
                borrowed.into_iter().try_for_each(Borrowed::give_back).in_phase(Phase::Release)?;
            }
        }
        if self.after == AfterDump::Stop {
            frozen.stop().in_phase(Phase::Release)?;
        }
        drop(frozen);
        stats.frozen = started.elapsed() - stats.freezing;
        Ok(Dumped { root, stats })
    }

    fn tell(&mut self, event: Event) -> Result<()> {
        self.hooks.as_mut().map_or(Ok(()), |hooks| vetoed(hooks.event(event)))
    }

    /// Writes pages and records; the manifest, which makes it an image, comes last.
    fn write(
        &mut self,
        described: Described,
        borrowed: &[Borrowed<'_>],
        dir: &Path,
        stats: &mut CheckpointStats,
    ) -> Result<Vec<(Pid, Blocked)>> {
        let Described { mut records, spaces, shared, sleeps } = described;
        let mut image = ImageWriter::create(dir)?.durability(self.durability);
        let started = Instant::now();
        let hooks = &mut self.hooks;
        let mut progress = |progress: Progress| match hooks {
            Some(hooks) => vetoed(hooks.progress(progress)),
            None => Ok(()),
        };
        let mut pages = PageWriter::new(&mut progress);
        for (mut space, process) in spaces.into_iter().zip(borrowed) {
            process.write_pages(&mut space, &mut pages, &mut image).of(process.process.pid)?;
            records.put(Owner(process.process.pid.get()), &space)?;
        }
        shared.write(Memory::open, &mut pages, &mut image, &mut records)?;
        stats.memory = started.elapsed();
        stats.pages_scanned = pages.counts.scanned;
        stats.pages_zero = pages.counts.zero;
        stats.pages_written = pages.counts.written;
        stats.bytes_written = image.finish(records, ManifestInfo { root: self.root })?.bytes;
        Ok(sleeps)
    }
}

/// The default slack of 50 us would make every short sleep of the engine's thread that much longer.
pub(crate) fn sleep_precisely() {
    let _ = nix::sys::prctl::set_timerslack(1);
}

/// Ends the whole tree, children first: each parent, as its last call, waits for its dead children, so that
/// no pid of the tree stays taken until whoever inherits them gets round to it.
fn end_all(frozen: &Frozen, borrowed: Vec<Borrowed<'_>>) -> Result<()> {
    let mut generations: Vec<Vec<Borrowed<'_>>> = Vec::new();
    let mut depths: BTreeMap<u32, usize> = BTreeMap::new();
    for process in borrowed {
        let depth = depths.get(&process.process.stat.ppid).map_or(0, |parent| parent + 1);
        depths.insert(process.process.pid.get(), depth);
        generations.resize_with(generations.len().max(depth + 1), Vec::new);
        if let Some(generation) = generations.get_mut(depth) {
            generation.push(process);
        }
    }
    for generation in generations.into_iter().rev() {
        for process in &generation {
            let pid = process.process.pid;
            process.wait_for(&frozen.children_of(pid)).of(pid)?;
        }
        let ended: Vec<&Process> = generation.into_iter().map(Borrowed::abandon).collect();
        ended.iter().try_for_each(|process| process.kill())?;
        ended.iter().try_for_each(|process| process.wait_death())?;
    }
    Ok(())
}

/// ptrace(2) belongs to a thread; the caller's may be anything, so everything happens on one of our own.
pub(crate) fn on_own_thread<T: Send>(body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("cryosleep".into()).spawn_scoped(scope, body);
        let ended = thread.call("clone")?.join();
        ended.unwrap_or_else(|_| Err(Error::new(ErrorKind::Kernel, "the engine's thread ended early")))
    })
}

/// A stopped process that executes system calls for us. Dropping it gives it back.
struct Borrowed<'f> {
    process: &'f Process,
    mappings: Vec<Mapping>,
    memory: Memory,
    /// None for a process that cannot be asked.
    tools: Option<(Springboard, Scratch)>,
    /// A blocked SIGCONT that our stops would discard.
    continues: Vec<crate::sys::ptrace::SigInfo>,
}

impl<'f> Borrowed<'f> {
    fn all(frozen: &'f Frozen, report: &mut Report) -> Result<Vec<Self>> {
        let borrow = |process: &'f Process| {
            unsupported::check(process, report)?;
            Self::borrow(process).of(process.pid)
        };
        frozen.processes.iter().map(borrow).collect()
    }

    fn borrow(process: &'f Process) -> Result<Self> {
        let memory = Memory::open(process.speaker())?;
        let mappings = memory::mappings(process.speaker())?;
        let vdso = mappings.iter().find(|mapping| mapping.name == b"[vdso]");
        let vdso = vdso.map(|mapping| mapping.start..mapping.end);
        for thread in &process.threads {
            let regs = match &vdso {
                Some(vdso) => Springboard::bring_home(&thread.tracee, &memory, vdso)?,
                None => thread.tracee.regs()?,
            };
            // No system call is made in a critical section.
            if regs.interrupted_call().is_none() {
                rseq::leave_critical_section(&thread.tracee, regs, &memory)?;
            } else {
                blocked::call_again(&thread.tracee, regs, thread.sleeper, &memory)?;
            }
        }
        let mut borrowed = Self { process, mappings, memory, tools: None, continues: Vec::new() };
        if unsupported::can_be_asked(process)
            && let Some(speaker) = process.threads.first()
        {
            let vdso = vdso.ok_or_else(|| {
                Error::new(
                    ErrorKind::Unsupported,
                    "it has no vdso, from which system calls could be executed",
                )
            })?;
            borrowed.continues = pending::continues(speaker.tid())?;
            let springboard = Springboard::install(&borrowed.memory, vdso)?;
            match springboard.map_scratch(&speaker.tracee, &borrowed.memory) {
                Ok(scratch) => borrowed.tools = Some((springboard, scratch)),
                Err(error) => {
                    springboard.remove(&borrowed.memory)?;
                    return Err(error);
                }
            }
        }
        Ok(borrowed)
    }

    /// The thread that is asked for what all share.
    fn speaker(&self) -> Option<Asks<'_>> {
        let scratch = self.tools.map(|(_, scratch)| scratch);
        self.process.threads.first().map(|thread| Asks { borrowed: self, thread, scratch })
    }

    fn puppet<'p>(&'p self, thread: &'p Thread) -> Result<Option<Puppet<'p>>> {
        let Some((_, scratch)) = self.tools else { return Ok(None) };
        let saved = Saved::of(&thread.tracee)?;
        let ending = Ending::among(saved.mask, self.process.status.sig_cgt);
        Puppet::borrow(&thread.tracee, self.process.pid, &self.memory, scratch, &saved, ending).map(Some)
    }

    fn write_pages(
        &self,
        space: &mut AddressSpace,
        pages: &mut PageWriter<'_>,
        image: &mut ImageWriter,
    ) -> Result<()> {
        let pid = self.process.speaker();
        let Some(speaker) = self.process.threads.first() else { return Ok(()) };
        let mut write = |file: &std::fs::File, offset: u64, ranges: &[std::ops::Range<u64>]| match self
            .puppet(speaker)?
        {
            Some(mut puppet) => {
                memory::inside::write(&mut puppet, file, offset, ranges)?;
                puppet.release()
            }
            None => Err(Error::new(ErrorKind::Kernel, "it cannot be asked").of(pid)),
        };
        let inside = memory::inside::is_possible(self.process);
        pages.write_private(space, pid, &self.memory, inside.then_some(&mut write), image)
    }

    fn leave_notes(&self, sleeps: &[(Pid, Blocked)]) {
        for thread in &self.process.threads {
            let sleep = sleeps.iter().find(|(tid, _)| *tid == thread.tid());
            if let (Some((_, sleep)), Ok(regs)) = (sleep, thread.tracee.regs()) {
                sleep.leave_note(&regs, &self.memory);
            }
        }
    }

    fn give_back(mut self) -> Result<()> {
        self.take_tools_away()
    }

    /// It will be killed: there is nothing to be tidied up.
    fn abandon(mut self) -> &'f Process {
        self.tools = None;
        self.process
    }

    /// Asks it about those of its children that are stopped.
    fn stops_of(&self, frozen: &Frozen) -> Result<Vec<(Pid, JobStop)>> {
        let Some(speaker) = self.process.threads.first() else { return Ok(Vec::new()) };
        let own = |child: &&Process| child.stat.ppid == self.process.pid.get() && child.is_stopped();
        let stopped: Vec<&Process> = frozen.processes.iter().filter(own).collect();
        let mut stops = Vec::new();
        for some in stopped.chunks(256) {
            let Some(mut puppet) = self.puppet(speaker)? else { break };
            let mut batch = puppet.batch();
            let asked: Vec<_> =
                some.iter().filter_map(|child| job_stop::Asked::of(child, &mut batch)).collect();
            let answers = puppet.run(batch)?;
            puppet.release()?;
            for one in asked {
                stops.push(one.describe(&answers)?);
            }
        }
        Ok(stops)
    }

    /// Makes the process wait for children of its own that have been killed.
    fn wait_for(&self, children: &[Pid]) -> Result<()> {
        let Some(speaker) = self.process.threads.first().filter(|_| !children.is_empty()) else {
            return Ok(());
        };
        let Some(mut puppet) = self.puppet(speaker)? else { return Ok(()) };
        for some in children.chunks(1024) {
            let mut batch = puppet.batch();
            let options = (libc::WNOHANG | libc::__WALL) as u64;
            some.iter().for_each(|child| {
                batch.call(sys::wait4, &[u64::from(child.get()), 0, options, 0]);
            });
            // One that ignores SIGCHLD has none to wait for: that is as well.
            puppet.run(batch)?;
        }
        puppet.release()
    }

    fn take_tools_away(&mut self) -> Result<()> {
        let (Some((springboard, scratch)), Some(speaker)) = (self.tools.take(), self.process.threads.first())
        else {
            return Ok(());
        };
        let tools = (springboard, scratch);
        pending::queue_continues(&self.continues, tools, self.process.pid, &speaker.tracee, &self.memory)?;
        springboard.unmap_scratch(&speaker.tracee, &self.memory, scratch)?;
        springboard.remove(&self.memory)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        // On the way out of another error, or of a target that was killed meanwhile.
        let _ = self.take_tools_away();
    }
}

/// The records of a tree, but for its pages.
struct Described {
    records: Records,
    spaces: Vec<AddressSpace>,
    shared: SharedObjects,
    sleeps: Vec<(Pid, Blocked)>,
}

impl Described {
    fn of(frozen: &Frozen, borrowed: &[Borrowed<'_>], report: &mut Report) -> Result<Self> {
        let mut described = Self {
            records: Records::new()?,
            spaces: Vec::new(),
            shared: SharedObjects::default(),
            sleeps: Vec::new(),
        };
        let tree = Tree::describe(frozen, report);
        described.records.put(Owner::IMAGE, &tree)?;
        described.records.put(Owner::IMAGE, &Processor::here())?;
        let sharing = sharing::describe(frozen, &tree, report)?;
        let mut files = Collector::default();
        for some in borrowed.chunks(Scratch::PARTS) {
            let speakers: Vec<_> = some.iter().filter_map(Borrowed::speaker).collect();
            described.threads(&speakers, report)?;
            for process in some {
                let shared = sharing.get(&process.process.pid.get()).copied().unwrap_or_default();
                described.process(process, shared, report).of(process.process.pid)?;
                if shared.files.is_none() {
                    files.table(process.process, report, &mut described.records)?;
                }
                for (child, stop) in process.stops_of(frozen)? {
                    described.records.put(Owner(child.get()), &stop)?;
                }
            }
        }
        files.finish(report, &mut described.records)?;
        Ok(described)
    }

    fn process(&mut self, borrowed: &Borrowed<'_>, shared: Sharing, report: &mut Report) -> Result<()> {
        let process = borrowed.process;
        if shared != Sharing::default() {
            self.records.put(Owner(process.pid.get()), &shared)?;
        }
        if shared.places.is_none()
            && let Some(places) = Places::describe(process, report)?
        {
            self.records.put(Owner(process.pid.get()), &places)?;
        }
        self.records.put(Owner(process.pid.get()), &Membership::of(process.speaker())?)?;
        if let Some(leader) = DeadLeader::describe(process)? {
            self.records.put(Owner(process.pid.get()), &leader)?;
        }
        for some in process.threads.get(1..).unwrap_or_default().chunks(Scratch::PARTS) {
            let scratch = |part| borrowed.tools.map(|(_, scratch)| scratch.part(part));
            let others = some.iter().enumerate();
            let others = others.map(|(part, thread)| Asks { borrowed, thread, scratch: scratch(part) });
            self.threads(&others.collect::<Vec<_>>(), report)?;
        }
        Ok(())
    }

    /// Describes some threads, which work at the same time: each in scratch memory of its own.
    fn threads(&mut self, asks: &[Asks<'_>], report: &mut Report) -> Result<()> {
        let seen = asks.iter().map(|asks| Seen::of(*asks).of(asks.thread.tid()));
        let seen = seen.collect::<Result<Vec<_>>>()?;
        for seen in &seen {
            self.sleep(seen.view(), &seen.asks.borrowed.memory, report)?;
        }
        // A process that is stopped at the end of one batch must not be stopped again by another.
        let at_once = seen.iter().all(|seen| seen.ending() != Ending::STOP);
        let asked = if at_once {
            let asking = seen.iter().map(Asking::start).collect::<Result<Vec<_>>>()?;
            asking
                .into_iter()
                .map(|asking| asking.map(Asking::finish).transpose())
                .collect::<Result<Vec<_>>>()?
        } else {
            seen.iter().map(Asked::of).collect::<Result<_>>()?
        };
        for (seen, asked) in seen.iter().zip(asked) {
            if let Some(asked) = asked {
                self.describe(seen.view(), asked.at_rest(seen)?, seen.asks.borrowed, report)?;
            }
        }
        Ok(())
    }

    fn sleep(&mut self, view: View<'_>, memory: &Memory, report: &mut Report) -> Result<()> {
        match Blocked::describe(view.tid(), &view.saved.regs, view.thread.sleeper, memory) {
            Ok(Some(sleep)) => {
                self.records.put(Owner(view.tid().get()), &sleep)?;
                self.sleeps.push((view.tid(), sleep));
            }
            Ok(None) => {}
            Err(error) => report.refuse(error.into_refusal()?),
        }
        Ok(())
    }

    fn describe(
        &mut self,
        view: View<'_>,
        asked: Asked,
        borrowed: &Borrowed<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let Asked { states, space, answers, refused, .. } = asked;
        refused.0.into_iter().for_each(|refusal| report.refuse(refusal));
        for describe in states {
            let refused = describe(&answers, view, report, &mut self.records);
            if let Err(error) = refused {
                report.refuse(error.of(view.tid()).into_refusal()?);
            }
        }
        if let Some(space) = space {
            let described = memory::describe(
                view.process,
                &borrowed.mappings,
                (&space, &answers),
                &borrowed.memory,
                &mut self.shared,
                report,
            )?;
            self.spaces.extend(described);
        }
        Ok(())
    }
}

/// Who is to be asked, and where it works; nowhere if it cannot be asked.
#[derive(Clone, Copy)]
struct Asks<'b> {
    borrowed: &'b Borrowed<'b>,
    thread: &'b Thread,
    scratch: Option<Scratch>,
}

/// A stopped thread and what it shows to anybody.
struct Seen<'b> {
    asks: Asks<'b>,
    saved: Saved,
    /// None of the speaker, whose is that of the process.
    status: Option<Status>,
}

impl<'b> Seen<'b> {
    fn of(asks: Asks<'b>) -> Result<Self> {
        let (process, thread) = (asks.borrowed.process, asks.thread);
        let own = thread.tid() != process.speaker();
        let read = || read::of_thread(process.pid, thread.tid(), "status", status::parse);
        let status = own.then(read).transpose()?;
        Ok(Self { asks, saved: Saved::of(&thread.tracee)?, status })
    }

    fn view(&self) -> View<'_> {
        let process = self.asks.borrowed.process;
        let status = self.status.as_ref().unwrap_or(&process.status);
        View { process, thread: self.asks.thread, status, saved: &self.saved }
    }

    fn ending(&self) -> Ending {
        Ending::among(self.saved.mask, self.asks.borrowed.process.status.sig_cgt)
    }
}

/// A thread that is working on its answers.
struct Asking<'s> {
    puppet: Puppet<'s>,
    states: Vec<crate::resource::Describe>,
    space: Option<memory::Asked>,
    pending: pending::Snapshot,
    /// Of the speaker: those that did not fit into its batch.
    mappings: &'s [Mapping],
    policies: OfMappings<'s>,
}

/// One thread's answers.
struct Asked {
    states: Vec<crate::resource::Describe>,
    space: Option<memory::Asked>,
    pending: pending::Snapshot,
    answers: crate::tracee::Answers,
    /// What is refused of its mappings.
    refused: Report,
}

impl<'s> Asking<'s> {
    fn start(seen: &'s Seen<'s>) -> Result<Option<Self>> {
        let Asks { borrowed, thread, scratch: Some(scratch) } = seen.asks else { return Ok(None) };
        let view = seen.view();
        let speaks = view.speaks();
        let pending = pending::Snapshot::take(view)?;
        let mut batch = Batch::new(scratch);
        let wanted = STATES.iter().filter(|state| speaks || state.scope == Scope::Thread);
        // While the thread still has its own registers and mask.
        let states = wanted.map(|state| (state.ask)(view, &mut batch)).collect::<Result<Vec<_>>>()?;
        let space = speaks.then(|| memory::ask(&mut batch));
        let mappings = if speaks { borrowed.mappings.as_slice() } else { &[] };
        let (some, mappings) = mappings.split_at(mappings.len().min(OfMappings::AT_ONCE));
        let policies = OfMappings::ask(some, &mut batch);
        let (pid, ending) = (borrowed.process.pid, seen.ending());
        let mut puppet = Puppet::borrow(&thread.tracee, pid, &borrowed.memory, scratch, &seen.saved, ending)?;
        puppet.start(batch)?;
        Ok(Some(Self { puppet, states, space, pending, policies, mappings }))
    }

    fn finish(mut self) -> Result<Asked> {
        let answers = self.puppet.finish()?;
        let mut refused = Report::default();
        let pid = self.puppet.tgid();
        self.policies.refuse(pid, &answers, &mut refused);
        for some in self.mappings.chunks(OfMappings::AT_ONCE) {
            let mut batch = self.puppet.batch();
            let policies = OfMappings::ask(some, &mut batch);
            policies.refuse(pid, &self.puppet.run(batch)?, &mut refused);
        }
        self.puppet.release()?;
        Ok(Asked { states: self.states, space: self.space, pending: self.pending, answers, refused })
    }
}

impl Asked {
    fn of(seen: &Seen<'_>) -> Result<Option<Self>> {
        Asking::start(seen)?.map(Asking::finish).transpose()
    }

    /// A timer that expires in between would be seen in neither place, or in both: then the thread is asked again.
    fn at_rest(mut self, seen: &Seen<'_>) -> Result<Self> {
        for _ in 0..5 {
            if self.pending == pending::Snapshot::take(seen.view())? {
                break;
            }
            if let Some(again) = Self::of(seen)? {
                self = again;
            }
        }
        Ok(self)
    }
}
