//! Checkpoint: freeze, collect, describe, write; then let go.

mod borrowed;
mod described;
mod pre_dump;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info_span};

use borrowed::Borrowed;
use described::Described;

use crate::Pid;
use crate::arch::RegsExt;
use crate::error::{Context, Error, ErrorKind, NameCall, Phase, Refusal, Result};
use crate::freeze::{Frozen, Process, freeze};
use crate::hooks::{Event, Hooks, Progress, vetoed};
use crate::image::{
    Compression, Durability, ImageSink, ImageStore, ImageWriter, ManifestInfo, Owner, PageChecksums,
    PageFormat, StoreWriter, StreamStore, feed,
};
use crate::resource::Report;
use crate::resource::fds::{
    DevicePaths, External, FileHandler, FilePolicy, FileValidation, LinkRemap, OldNames, OuterPipes,
    refuse_askers,
};
use crate::resource::memory::{self, Counts, Crowd, Kinship, PageWriter, Parent, Stock, Tracker};
use crate::resource::tasks::blocked::Blocked;
use crate::resource::tasks::sharing::Shares;
use crate::resource::tasks::unsupported;
use crate::sys::ptrace::Resume;
use crate::tracee::{Home, Memory, Springboard};

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
    pages: PageFormat,
    files: FilePolicy,
    writers: Option<NonZeroUsize>,
    parent: Option<PathBuf>,
    tracker: Option<&'h mut Tracker>,
    hooks: Option<&'h mut dyn Hooks>,
}

impl std::fmt::Debug for Checkpoint<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { root, after, time_limit, durability, pages, writers, parent, .. } = self;
        f.debug_struct("Checkpoint")
            .field("root", root)
            .field("after", after)
            .field("time_limit", time_limit)
            .field("durability", durability)
            .field("pages", pages)
            .field("writers", writers)
            .field("parent", parent)
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
    /// From then until the image was complete.
    pub frozen: Duration,
    /// From then until the tree ran on, or was stopped for good, or had ended.
    pub release: Duration,
    /// The part of that in which memory was copied.
    pub memory: Duration,
    /// Threads, in all processes.
    pub tasks: u64,
    /// Pages of private memory that the target has mapped.
    pub pages_scanned: u64,
    /// Pages that were populated but held zeroes only, and so were left out.
    pub pages_zero: u64,
    /// Pages that are in the parent image ([`Checkpoint::parent`]) as they are now, and so were left out.
    pub pages_in_parent: u64,
    /// Pages that had to be compared with those of the parent image, as no [`Tracker`] knew whether they were written.
    pub pages_compared: u64,
    /// Pages stored.
    pub pages_written: u64,
    /// Size of the image, in bytes.
    pub bytes_written: u64,
}

impl CheckpointStats {
    fn count(&mut self, counts: Counts) {
        self.pages_scanned = counts.scanned;
        self.pages_zero = counts.zero;
        self.pages_in_parent = counts.inherited;
        self.pages_compared = counts.compared;
        self.pages_written = counts.written;
    }
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
            pages: PageFormat::default(),
            files: FilePolicy::default(),
            writers: None,
            parent: None,
            tracker: None,
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

    /// Whether the image has checksums of its pages; it has unless this says otherwise.
    pub fn page_checksums(mut self, checksums: PageChecksums) -> Self {
        self.pages.checksums = checksums;
        self
    }

    /// Whether pages are compressed; they are not unless this says otherwise.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.pages.compression = compression;
        self
    }

    /// How many bytes an image may hold of one file that is open or mapped though it was deleted: 1 MiB unless this
    /// says otherwise. Holes do not count, nor do files in memory (tmpfs, memfds). A larger one is refused.
    pub fn ghost_limit(mut self, bytes: u64) -> Self {
        self.files.ghost_limit = bytes;
        self
    }

    /// Leaves an open file out of the image: [`Restore::inherit`](crate::Restore::inherit) supplies it.
    pub fn external(mut self, file: External) -> Self {
        let key = file.key();
        self.files.external.insert(file, key);
        self
    }

    /// The same, to be supplied as [`External::Name`]: by a name that says more than a number of this machine.
    pub fn external_as(mut self, file: External, name: &str) -> Self {
        self.files.external.insert(file, External::Name(name.to_owned()).key());
        self
    }

    /// Who is asked about open files of kinds that the library does not know.
    pub fn handler(mut self, handler: Arc<dyn FileHandler>) -> Self {
        self.files.handlers.add(handler);
        self
    }

    /// What to do about pipes with an end outside of the tree.
    pub fn outer_pipes(mut self, pipes: OuterPipes) -> Self {
        self.files.outer_pipes = pipes;
        self
    }

    /// What to do about files whose name was removed, though they have other names.
    pub fn link_remap(mut self, links: LinkRemap) -> Self {
        self.files.links = links;
        self
    }

    /// By which paths devices may be opened again.
    pub fn device_paths(mut self, paths: DevicePaths) -> Self {
        self.files.device_paths = paths;
        self
    }

    /// How a restore will look at files that have changed: [`FileValidation::BuildId`] has to be known now, everything
    /// else is recorded anyway.
    pub fn file_validation(mut self, validation: FileValidation) -> Self {
        self.files.validation = validation;
        self
    }

    /// How many threads write memory at the same time, each to a page segment of its own. As many
    /// as there are processors, but at most 4, unless this says otherwise; more than 63 are not used.
    ///
    /// They are the target's: where one process has most of the memory it gets all but its first thread for that time,
    /// and where several have about as much, the first threads of those do it. Where pages are compressed or do not go
    /// to a directory, they are the caller's. A target may not be allowed any more (RLIMIT_NPROC, pids.max): then there
    /// are fewer. Small amounts have one.
    pub fn writers(mut self, writers: NonZeroUsize) -> Self {
        self.writers = Some(writers);
        self
    }

    /// Stores only the pages that are not in the image in this directory, an earlier one of the same tree: the
    /// new image is its child, and good for nothing without it. The parent may itself be a child; a chain has at most
    /// 100 images, each in a directory of its own. They can be moved together.
    ///
    /// Which pages are the same is found out by reading both, where no [`tracker`](Self::tracker) tells.
    ///
    /// ```
    /// # use cryosleep::{AfterDump, Checkpoint};
    /// # fn hourly(pid: u32) -> cryosleep::Result<()> {
    /// Checkpoint::of(pid).after(AfterDump::Resume).write_to("/var/lib/images/1")?;
    /// let dumped = Checkpoint::of(pid).parent("/var/lib/images/1").write_to("/var/lib/images/2")?;
    /// println!("{} pages have changed", dumped.stats.pages_written);
    /// # Ok(()) }
    /// ```
    pub fn parent(mut self, image: impl AsRef<Path>) -> Self {
        self.parent = Some(image.as_ref().into());
        self
    }

    /// Who notes what is written from now on, and says what was written since the [`parent`](Self::parent).
    pub fn tracker(mut self, tracker: &'h mut Tracker) -> Self {
        self.tracker = Some(tracker);
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
    /// The target runs on unharmed, and an image that was there before is still there; but for errors of
    /// [`Phase::Release`], which come when the new image has already taken its place: a veto of [`Event::PostDump`], after
    /// which the target runs on too, or a target that could not be let go, or killed, as it should.
    /// [`ErrorKind::Unsupported`] lists everything that cannot be brought back.
    pub fn write_to(self, dir: impl AsRef<Path>) -> Result<Dumped> {
        let dir = dir.as_ref();
        on_own_thread(move || self.run(Destination::Directory(dir)))
    }

    /// The same to any stream, a pipe or a connection: [`Restore::from_reader`](crate::Restore::from_reader) takes it
    /// from there. Memory is bounded: if the stream is slow, the target waits. Its end says whether it is whole.
    ///
    /// ```
    /// # use cryosleep::{AfterDump, Checkpoint};
    /// # fn send(pid: u32, host: &str) -> Result<(), Box<dyn std::error::Error>> {
    /// let connection = std::net::TcpStream::connect((host, 7000))?;
    /// Checkpoint::of(pid).write_to_stream(connection)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`Checkpoint::write_to`]; [`ErrorKind::Refused`] with a [`parent`](Checkpoint::parent), which is known by its
    /// directory.
    pub fn write_to_stream(self, stream: impl Write + Send) -> Result<Dumped> {
        self.write_to_store(&mut StreamStore::new(stream))
    }

    /// The same to a store of the caller's own.
    ///
    /// # Errors
    /// As [`Checkpoint::write_to_stream`]; an error of the store is the source of this one.
    pub fn write_to_store(self, store: &mut impl ImageStore) -> Result<Dumped> {
        if self.parent.is_some() {
            let reason = "only an image in a directory can be the child of another";
            return Err(Error::new(ErrorKind::Refused, reason));
        }
        let format = self.pages;
        let write = |writer| on_own_thread(move || self.run(Destination::Store(writer)));
        feed(store, format, write).in_phase(Phase::Write)
    }

    /// Freezes the tree for a moment, only to say what a checkpoint of it would refuse.
    ///
    /// # Errors
    /// When the tree cannot be frozen or looked at.
    pub fn preflight(mut self) -> Result<Preflight> {
        on_own_thread(move || {
            let frozen = freeze_program(self.root, self.time_limit).in_phase(Phase::Freeze)?;
            let mut report = Report::default();
            let Some(shares) = look_first(&frozen, &mut report).in_phase(Phase::Collect)? else {
                return Ok(Preflight(report.0));
            };
            let tracker = self.tracker.as_deref_mut();
            let borrowed = Borrowed::all(&frozen, &shares, tracker, &mut report).in_phase(Phase::Collect)?;
            let described = Described::of(&frozen, &borrowed, &shares, &self.files, &mut report);
            let described = described.in_phase(Phase::Describe);
            drop(borrowed);
            described.map(|_| Preflight(report.0))
        })
    }

    fn run(mut self, to: Destination<'_>) -> Result<Dumped> {
        let span = info_span!("checkpoint", root = self.root.get());
        let _entered = span.enter();
        let mut stats = CheckpointStats::default();
        let root = self.root;
        let parent = self.parent.as_deref().map(Parent::open).transpose().in_phase(Phase::Read)?;
        let old = to.names_there();
        self.tell(Event::PreDump { root }).in_phase(Phase::Freeze)?;
        sleep_precisely();
        let started = Instant::now();
        let frozen = freeze_program(root, self.time_limit).in_phase(Phase::Freeze)?;
        stats.freezing = started.elapsed();
        stats.tasks = frozen.processes.iter().map(|process| process.threads.len() as u64).sum();
        debug!(processes = frozen.processes.len(), tasks = stats.tasks, "frozen");
        self.tell(Event::Frozen { root }).in_phase(Phase::Freeze)?;

        let mut report = Report::default();
        let Some(shares) = look_first(&frozen, &mut report).in_phase(Phase::Collect)? else {
            return Err(Error::unsupported(report.0).in_phase(Phase::Collect));
        };
        let mut tracker = self.tracker.take();
        // Whatever becomes of this checkpoint: what is noted from here on belongs to no older image.
        let trusted = tracker.as_mut().is_some_and(|tracker| tracker.begin(parent.as_ref()));
        let borrowed =
            Borrowed::all(&frozen, &shares, tracker.as_deref_mut(), &mut report).in_phase(Phase::Collect)?;
        let described = Described::of(&frozen, &borrowed, &shares, &self.files, &mut report);
        let described = described.in_phase(Phase::Describe)?;
        if !report.0.is_empty() {
            return Err(Error::unsupported(report.0).in_phase(Phase::Describe));
        }
        let mut tracking = Tracking { tracker, trusted };
        let Complete { id, sleeps } = self
            .write(described, &borrowed, (to, parent.as_ref()), &mut tracking, &mut stats)
            .in_phase(Phase::Write)?;
        old.remove();
        let pids: Vec<Pid> = borrowed.iter().map(|process| process.process.speaker()).collect();
        stats.frozen = started.elapsed() - stats.freezing;
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
        // Not before: to take the protection off a living process takes longer than to end it.
        tracking.finish(id, if self.after == AfterDump::Kill { &[] } else { &pids });
        stats.release = started.elapsed() - stats.freezing - stats.frozen;
        Ok(Dumped { root, stats })
    }

    fn tell(&mut self, event: Event) -> Result<()> {
        self.hooks.as_mut().map_or(Ok(()), |hooks| vetoed(hooks.event(event)))
    }

    fn open(&self, to: Destination<'_>, parent: Option<&Parent>) -> Result<Box<dyn ImageSink>> {
        Ok(match to {
            Destination::Store(writer) => Box::new(writer),
            Destination::Directory(dir) => {
                let writer = ImageWriter::create(dir)?.durability(self.durability).pages(self.pages);
                Box::new(match parent {
                    Some(parent) => writer.child_of(parent.image())?,
                    None => writer,
                })
            }
        })
    }

    /// Writes pages and records; the manifest, which makes it an image, comes last.
    fn write(
        &mut self,
        described: Described,
        borrowed: &[Borrowed<'_>],
        (to, parent): (Destination<'_>, Option<&Parent>),
        tracking: &mut Tracking<'_>,
        stats: &mut CheckpointStats,
    ) -> Result<Complete> {
        let Described { mut records, spaces, shared, ghosts, sleeps, kin, .. } = described;
        let root = borrowed.first().map_or(self.root, |root| Pid::from(root.process.number));
        let mut image = self.open(to, parent)?;
        let started = Instant::now();
        let hooks = &mut self.hooks;
        let mut progress = |progress: Progress| match hooks {
            Some(hooks) => vetoed(hooks.progress(progress)),
            None => Ok(()),
        };
        let mut pages = PageWriter::new(self.writers, parent, &mut progress);
        let donors: BTreeSet<u32> = kin.values().copied().collect();
        let owners = borrowed.iter().filter(|process| process.owns_memory);
        let mut rest: u64 = owners.clone().map(Borrowed::own_bytes).sum();
        let mut crowd = Crowd::default();
        for (space, process) in spaces.into_iter().zip(owners) {
            let Process { pid, number, .. } = *process.process;
            rest -= process.own_bytes();
            let kinship = Kinship { donor: kin.get(&number).copied(), is_donor: donors.contains(&number) };
            let stock = tracking.take_stock(process, self.after).of(pid)?;
            let whose = (space, &stock);
            process.write_pages(whose, (kinship, rest), &mut crowd, &mut pages, &mut *image).of(pid)?;
        }
        for (number, space) in crowd.finish(&mut pages, &mut *image)? {
            records.put(Owner(number), &space)?;
        }
        shared.write(Memory::open, &mut pages, &mut *image, &mut records)?;
        let links = ghosts.write(&mut pages, &mut *image, &mut records)?;
        let counts = pages.finish(&mut records)?;
        stats.memory = started.elapsed();
        stats.count(counts);
        let written = image.finish(records, ManifestInfo { root })?;
        stats.bytes_written = written.bytes;
        links.keep();
        Ok(Complete { id: written.id, sleeps })
    }
}

/// An image is complete: its id, and what threads that sleep on are to remember.
struct Complete {
    id: [u8; 16],
    sleeps: BTreeMap<Pid, Blocked>,
}

/// Where an image goes.
enum Destination<'d> {
    Directory(&'d Path),
    Store(StoreWriter),
}

impl Destination<'_> {
    /// Of an image that is there already.
    fn names_there(&self) -> OldNames {
        match self {
            Destination::Directory(dir) => OldNames::of_image_in(dir),
            Destination::Store(_) => OldNames::default(),
        }
    }
}

/// What tasks share; `None` if something has been refused that forbids any further look.
fn look_first(frozen: &Frozen, report: &mut Report) -> Result<Option<Shares>> {
    if unsupported::namespaces(frozen, report)? {
        return Ok(None);
    }
    let shares = Shares::find(frozen, report)?;
    let mut askers = Report::default();
    for process in &frozen.processes {
        refuse_askers(shares.tables(process).map(|tid| (process.pid, tid)), &mut askers)?;
    }
    let may_go_on = askers.0.is_empty();
    report.0.append(&mut askers.0);
    Ok(may_go_on.then_some(shares))
}

/// The default slack of 50 us would make every short sleep of the engine's thread that much longer.
pub(crate) fn sleep_precisely() {
    let _ = nix::sys::prctl::set_timerslack(1);
}

/// Freezes the tree without the threads that a killed checkpoint has given it.
fn freeze_program(root: Pid, limit: Duration) -> Result<Frozen> {
    let started = Instant::now();
    loop {
        let frozen = freeze(root, limit.saturating_sub(started.elapsed()))?;
        if !end_hands(&frozen)? {
            return Ok(frozen);
        }
    }
}

/// Ends such threads, of a process that is stopped by job control too. Were there any?
fn end_hands(frozen: &Frozen) -> Result<bool> {
    let mut found = false;
    for process in &frozen.processes {
        let mut suspects = Vec::new();
        for thread in process.threads.iter().skip(1) {
            suspects.extend(Springboard::may_be_at(thread.tracee.regs()?.pc()).then_some(thread));
        }
        if suspects.is_empty() {
            continue;
        }
        let memory = Memory::open(process.speaker())?;
        let Some(vdso) = memory::vdso(&memory::places(process.speaker())?) else { continue };
        for thread in suspects {
            if Springboard::bring_home(&thread.tracee, &memory, &vdso)? == Home::End {
                thread.tracee.resume(Resume::Run)?;
                thread.tracee.wait_death(true)?;
                found = true;
            }
        }
    }
    Ok(found)
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
        // The last one is the likeliest to have just begun.
        ended.iter().rev().for_each(|process| process.help_to_die());
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

/// A tracker during a checkpoint.
struct Tracking<'t> {
    tracker: Option<&'t mut Tracker>,
    /// Does it belong to the parent image?
    trusted: bool,
}

impl Tracking<'_> {
    /// What a process has written, and a new start for it, if it goes on.
    fn take_stock(&mut self, process: &Borrowed<'_>, after: AfterDump) -> Result<Stock> {
        let Some(tracker) = &mut self.tracker else { return Ok(Stock::default()) };
        let pid = process.process.speaker();
        let stock = match self.trusted {
            true => Stock::take(pid, &process.watched)?,
            false => Stock::default(),
        };
        if after != AfterDump::Kill {
            tracker.watch(pid, &process.mappings, || process.make_descriptor())?;
        }
        Ok(stock)
    }

    fn finish(self, image: [u8; 16], going_on: &[Pid]) {
        if let Some(tracker) = self.tracker {
            tracker.belong_to(image, going_on);
        }
    }
}
