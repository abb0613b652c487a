//! Restore: read, plan, build, release.

mod blueprint;
mod processes;
mod turns;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info_span};

use blueprint::{Blueprint, ProcessPlan, ThreadPlan, tables};
use turns::{TURNS, Turn, queue_continues, take_turn};

use crate::arch::{Regs, RegsExt};
use crate::checkpoint::{on_own_thread, sleep_precisely};
use crate::error::{Context, Error, ErrorKind, NameCall, Phase, Result, Subject};
use crate::family::{Family, Member, Released};
use crate::hooks::{Event, Hooks, vetoed};
use crate::image::{Image, ImageSource, Owner, Spool};
use crate::proc::status::{self, Status};
use crate::proc::{read, stat};
use crate::resource::fds::{
    Builder, Channel, External, FileHandler, FileValidation, Finder, Handlers, Inherited, Places, Room,
};
use crate::resource::memory::{self, AddressSpace, Fillers, Opened, Workshop};
use crate::resource::tasks::attributes::Own;
use crate::resource::tasks::caller::Caller;
use crate::resource::tasks::cgroup::Cgroups;
use crate::resource::tasks::cpu::{CpuCheck, Processor};
use crate::resource::tasks::job_stop::JobStop;
use crate::resource::tasks::pids::Pids;
use crate::resource::tasks::plan::Plan;
use crate::resource::{Rebuilt, Stage};
use crate::sys::wait::Ended;
use crate::tracee::{Batch, Birthplace, Scratch, Seed, Tracee, call_at, sys};
use crate::{Pid, sys as system};

/// What a tree that was part of a session without leading it is restored into.
///
/// ```
/// # use cryosleep::{OuterSession, Restore};
/// # fn shell_job() -> cryosleep::Result<()> {
/// Restore::from("/var/lib/images/job").outer_session(OuterSession::Inherit).run()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OuterSession {
    /// The caller must be in the same session and group (by number) as the tree was: the default.
    #[default]
    Same,
    /// The caller's own session and group, whatever they are.
    Inherit,
}

/// A restore to be made: from where, and how.
///
/// ```no_run
/// let restored = cryosleep::Restore::from("/var/lib/images/job").run()?;
/// println!("{} runs again", restored.pid());
/// let status = restored.wait()?;
/// # Ok::<(), cryosleep::Error>(())
/// ```
///
/// The same pids and tids need CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN) in the user namespace that owns the
/// pid namespace (clone(2), `set_tid`).
#[must_use = "nothing happens before run()"]
pub struct Restore<'h> {
    from: Origin<'h>,
    spool: Spool,
    pids: Pids,
    session: OuterSession,
    validation: FileValidation,
    cgroups: Cgroups,
    cpu_check: CpuCheck,
    inherited: Inherited,
    handlers: Handlers,
    hooks: Option<&'h mut dyn Hooks>,
}

impl std::fmt::Debug for Restore<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restore")
            .field("from", &self.from)
            .field("pids", &self.pids)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

/// Where an image is.
enum Origin<'h> {
    Directory(PathBuf),
    Stream(Box<dyn Read + Send + 'h>),
    Source(Arc<dyn ImageSource>),
}

impl std::fmt::Debug for Origin<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Directory(dir) => dir.fmt(f),
            Origin::Stream(_) => f.write_str("a stream"),
            Origin::Source(_) => f.write_str("a source"),
        }
    }
}

/// Times of a restore.
///
/// ```
/// assert_eq!(cryosleep::RestoreStats::default().tasks, 0);
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct RestoreStats {
    /// Reading, verifying and planning: no task exists yet.
    pub reading: Duration,
    /// Building, up to the last task's readiness.
    pub building: Duration,
    /// Letting go.
    pub release: Duration,
    /// Threads, in all processes.
    pub tasks: u64,
    /// Bytes of memory put in place.
    pub bytes_restored: u64,
}

/// How a restored process has ended.
///
/// ```
/// use cryosleep::Exit;
/// assert_eq!(Exit::Code(3).code(), Some(3));
/// assert_eq!(Exit::Signal(9).code(), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By exit(3) with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// The exit status, unless a signal ended it.
    pub fn code(self) -> Option<i32> {
        match self {
            Exit::Code(code) => Some(code),
            Exit::Signal(_) => None,
        }
    }
}

/// A restored tree, which runs. Dropping it leaves the tree running.
///
/// ```no_run
/// let restored = cryosleep::Restore::from("/tmp/image").run()?;
/// assert_eq!(restored.wait()?.code(), Some(0));
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Debug)]
pub struct Restored {
    pid: Pid,
    number: u32,
    pidfd: OwnedFd,
    init: Option<(Pid, OwnedFd)>,
    /// How long it took.
    pub stats: RestoreStats,
}

impl Restored {
    /// The root of the tree. It is a child of the calling process, unless there is an [`init`](Self::init).
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What the root's pid is for the tree itself: that in the image.
    pub fn inner_pid(&self) -> u32 {
        self.number
    }

    /// The process 1 that was made for the tree's new pid namespace ([`Pids::NewNamespace`]): a child of the
    /// calling process and the root's parent. It ends when the root does, with its status (128 and the number of
    /// the signal that ended it); killing it ends everything in the namespace.
    pub fn init(&self) -> Option<Pid> {
        self.init.as_ref().map(|(pid, _)| *pid)
    }

    /// A pidfd of the root: poll(2) says when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for the root to end, like waitpid(2): with an [`init`](Self::init), for both. Before Linux 6.15 a signal
    /// that has ended the root shows there as the code 128 and its number.
    ///
    /// # Errors
    /// [`ErrorKind::TaskGone`] when somebody else in this process has waited for it already and the kernel
    /// (before Linux 6.15) no longer knows how it ended.
    pub fn wait(self) -> Result<Exit> {
        loop {
            let child = self.init.as_ref().map_or(&self.pidfd, |(_, pidfd)| pidfd);
            match system::wait::wait(child.as_fd()) {
                // Its own status says more than what its parent could make of it.
                Ok(Some(Ended::Code(code))) if self.init.is_some() => {
                    return self.exit_of_reaped().or(Ok(Exit::Code(code)));
                }
                Ok(Some(Ended::Code(code))) => return Ok(Exit::Code(code)),
                Ok(Some(Ended::Signal(signal))) => return Ok(Exit::Signal(signal)),
                Ok(None) | Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::ECHILD) => return self.exit_of_reaped(),
                Err(errno) => return Err(Error::call("waitid", errno).of(self.pid)),
            }
        }
    }

    fn exit_of_reaped(&self) -> Result<Exit> {
        let gone = || Error::new(ErrorKind::TaskGone, "somebody else has waited for it").of(self.pid);
        let status = system::pidfd::exit_status(self.pidfd.as_fd()).ok().flatten().ok_or_else(gone)?;
        Ok(match status & 0x7f {
            0 => Exit::Code(status >> 8 & 0xff),
            signal => Exit::Signal(signal),
        })
    }

    /// Leaves it to itself; the pid and the pidfd of the root remain. Where there is an [`init`](Self::init), that is
    /// the child to be waited for.
    pub fn detach(self) -> (Pid, OwnedFd) {
        (self.pid, self.pidfd)
    }
}

impl<'h> Restore<'h> {
    /// A restore of the image in this directory.
    pub fn from(dir: impl AsRef<Path>) -> Self {
        Self::of(Origin::Directory(dir.as_ref().into()))
    }

    /// A restore of the image that comes as a stream
    /// ([`Checkpoint::write_to_stream`](crate::Checkpoint::write_to_stream)). It is read to its end, and verified,
    /// before there is any task; [`Restore::spool`] says where it is kept.
    pub fn from_reader(stream: impl Read + Send + 'h) -> Self {
        Self::of(Origin::Stream(Box::new(stream)))
    }

    /// A restore of the image that a store has taken
    /// ([`Checkpoint::write_to_store`](crate::Checkpoint::write_to_store)).
    pub fn from_source(source: impl ImageSource + 'static) -> Self {
        Self::of(Origin::Source(Arc::new(source)))
    }

    fn of(from: Origin<'h>) -> Self {
        Self {
            from,
            spool: Spool::default(),
            pids: Pids::default(),
            session: OuterSession::default(),
            validation: FileValidation::default(),
            cgroups: Cgroups::default(),
            cpu_check: CpuCheck::default(),
            inherited: Inherited::default(),
            handlers: Handlers::default(),
            hooks: None,
        }
    }

    /// Where an image that comes as a stream is kept meanwhile: in memory unless this says otherwise.
    pub fn spool(mut self, spool: Spool) -> Self {
        self.spool = spool;
        self
    }

    /// The pid namespace that the tree is restored into.
    pub fn pids(mut self, pids: Pids) -> Self {
        self.pids = pids;
        self
    }

    /// What to do about a session that the tree was in but did not lead.
    pub fn outer_session(mut self, session: OuterSession) -> Self {
        self.session = session;
        self
    }

    /// What to do about the control groups that the tree was in.
    pub fn cgroups(mut self, cgroups: Cgroups) -> Self {
        self.cgroups = cgroups;
        self
    }

    /// How the processor may differ from that of the checkpoint.
    pub fn cpu_check(mut self, check: CpuCheck) -> Self {
        self.cpu_check = check;
        self
    }

    /// How files that have changed are taken.
    pub fn file_validation(mut self, validation: FileValidation) -> Self {
        self.validation = validation;
        self
    }

    /// Supplies an open file that the image does not contain: one that was external at the checkpoint
    /// ([`Checkpoint::external`](crate::Checkpoint::external)), or any that is open by this path. The tasks get the
    /// very description that `file` is of; a second description of that file is opened anew.
    pub fn inherit(mut self, key: External, file: impl Into<OwnedFd>) -> Self {
        self.inherited.add(&key, file.into());
        self
    }

    /// The same with a descriptor of the calling process by its number, as whoever started it may have said it.
    ///
    /// # Errors
    /// When there is no such descriptor.
    pub fn inherit_fd(self, key: External, number: RawFd) -> Result<Self> {
        let own = system::pidfd::open(Pid::from(std::process::id())).call("pidfd_open")?;
        let file = system::pidfd::get_fd(own.as_fd(), number).call("pidfd_getfd");
        let file = file.about(|| Subject::Fd { fd: number, what: key.to_string() })?;
        Ok(self.inherit(key, file))
    }

    /// Makes files again of kinds that the library does not know.
    pub fn handler(mut self, handler: Arc<dyn FileHandler>) -> Self {
        self.handlers.add(handler);
        self
    }

    /// Who hears of the stages.
    pub fn hooks(mut self, hooks: &'h mut dyn Hooks) -> Self {
        self.hooks = Some(hooks);
        self
    }

    /// Makes the restore: the tree runs when this returns. Its root is a child of the calling process ([`Pids`] has the
    /// exception); a parent-death signal (PR_SET_PDEATHSIG(2const)) that the root has asked for comes when the calling
    /// thread ends.
    ///
    /// # Errors
    /// On every error no task is left: most are found before there is any. [`ErrorKind::Image`] for an image
    /// that is not whole, [`ErrorKind::Conflict`] for a pid that is taken or a file that has changed.
    pub fn run(mut self) -> Result<Restored> {
        let span = info_span!("restore", image = ?self.from);
        let _entered = span.enter();
        let started = Instant::now();
        let image = self.open().in_phase(Phase::Read)?;
        let blueprint = Blueprint::load(&image, &self.pids, self.session).in_phase(Phase::Read)?;
        let inherited = std::mem::take(&mut self.inherited);
        let ready = Ready::plan(&blueprint, &image, &self, inherited).in_phase(Phase::Plan)?;
        let root = Pid::from(blueprint.root);
        let stats = RestoreStats { reading: started.elapsed(), ..RestoreStats::default() };
        self.tell(Event::PreRestore { root }).in_phase(Phase::Plan)?;
        let building = Instant::now();
        // The calling thread is the parent; the tracer ends with this call.
        let seed = self.plant(&blueprint, &ready).in_phase(Phase::Build)?;
        on_own_thread(move || self.build(&blueprint, ready, seed, (building, stats)))
    }

    fn open(&mut self) -> Result<Image> {
        match &mut self.from {
            Origin::Directory(dir) => Image::open(dir),
            Origin::Stream(stream) => Image::from_stream(stream, &self.spool),
            Origin::Source(source) => Image::from_source(source.clone()),
        }
    }

    fn plant(&self, blueprint: &Blueprint, ready: &Ready<'_>) -> Result<Seed> {
        const STEP: Duration = Duration::from_millis(1);
        let mut patience = PATIENCE;
        loop {
            let place = self.pids.birthplace(blueprint.root);
            match Family::seed(blueprint.workshop, place, &ready.channel) {
                // Whether it is the dead who have the numbers of another namespace is hard to say.
                Err(error)
                    if error.kind() == ErrorKind::Conflict
                        && matches!(place, Birthplace::Namespace(..))
                        && !patience.is_zero() =>
                {
                    std::thread::sleep(STEP);
                    patience = patience.saturating_sub(STEP);
                }
                planted => return planted,
            }
        }
    }

    fn build(
        &mut self,
        blueprint: &Blueprint,
        ready: Ready<'_>,
        seed: Seed,
        (started, mut stats): (Instant, RestoreStats),
    ) -> Result<Restored> {
        let (family, files) = ready.build(blueprint, seed).in_phase(Phase::Build)?;
        stats.building = started.elapsed();
        let root = family.pid_of(blueprint.root)?;
        let of_tree = |member: &&Member| blueprint.processes.contains_key(&member.number);
        stats.tasks = family.members().filter(of_tree).map(|member| member.threads.len() as u64).sum();
        stats.bytes_restored = blueprint.bytes();
        debug!(tasks = stats.tasks, "built");
        self.tell(Event::PreResume { root }).in_phase(Phase::Build)?;

        let built = Instant::now();
        files.start(&blueprint.watches).in_phase(Phase::Release)?;
        // What only we have open must not be there any more when they run: an end of a pipe, for one.
        drop(files);
        let Released { pid, pidfd, init } = family.release(blueprint.root).in_phase(Phase::Release)?;
        stats.release = built.elapsed();
        // The tree runs: it is too late for a veto.
        let _ = self.tell(Event::PostResume { root });
        Ok(Restored { pid, number: blueprint.root, pidfd, init, stats })
    }

    fn tell(&mut self, event: Event) -> Result<()> {
        self.hooks.as_mut().map_or(Ok(()), |hooks| vetoed(hooks.event(event)))
    }
}

/// A blueprint for which everything outside the image has been found.
struct Ready<'i> {
    image: &'i Image,
    opened: Opened,
    files: Builder<'i>,
    channel: Channel,
    /// The tree's outer group is to be joined by number.
    outer_group: Option<u32>,
    room: Room,
    /// What the caller has of attributes that the tasks are not to have from it.
    inherited: Own,
}

impl<'i> Ready<'i> {
    fn plan(
        blueprint: &Blueprint,
        image: &'i Image,
        options: &Restore<'_>,
        inherited: Inherited,
    ) -> Result<Self> {
        image.require::<Processor>(Owner::IMAGE)?.check(options.cpu_check)?;
        let outer_group = outer_group(&blueprint.plan, options.session, &options.pids)?;
        if let Pids::Original = options.pids {
            let mut patience = PATIENCE;
            let stand_ins = blueprint.plan.stand_ins.iter().map(|number| Pid::from(*number));
            for tid in blueprint.tree.numbers().chain(stand_ins) {
                wait_until_free(tid, &mut patience)?;
            }
        }
        let room = Room::find()?;
        for (number, table) in tables(&blueprint.processes) {
            room.check(blueprint.highest_number(number, table)).of(Pid::from(number))?;
        }
        blueprint.shared.plan()?;
        let caller = Caller::look()?;
        blueprint.check(&caller)?;
        for (pid, process) in &blueprint.processes {
            let at = process.threads.values().map(|thread| thread.registers.general().pc());
            blueprint.space(process).and_then(|space| space.check_vdso(at)).of(Pid::from(*pid))?;
        }
        let finder = Finder::new(image, options.validation)?;
        let mut opened = Opened::default();
        for (pid, process) in &blueprint.processes {
            process.cgroups.check(Pid::from(*pid), options.cgroups)?;
            let of_memory = process.space.iter().flat_map(AddressSpace::needs);
            let places = process.seats.values().filter_map(|seat| seat.places.as_ref());
            opened.open_all(of_memory.chain(places.flat_map(Places::needs)), &finder).of(Pid::from(*pid))?;
        }
        let tasks = blueprint.tree.numbers().collect();
        let mut files = Builder::new(image, finder, inherited, tasks);
        files.handlers = options.handlers.clone();
        files.renumbered = !matches!(options.pids, Pids::Original);
        files.make_all()?;
        let channel = Channel::new(blueprint.channel_number)?;
        let inherited = caller.attributes;
        Ok(Self { image, opened, files, channel, outer_group, room, inherited })
    }

    /// Builds everything, and closes what was open for that. The descriptions remain: some have yet to be started.
    fn build(mut self, blueprint: &Blueprint, seed: Seed) -> Result<(Family, Builder<'i>)> {
        sleep_precisely();
        let mut family = Family::found(blueprint.workshop, seed, blueprint.suspends_seccomp())?;
        let needs_init = blueprint.tree.root()?.pid != blueprint.root;
        family.start_afresh(&self.inherited)?;
        let root = family.members().next().map_or(Pid::from(blueprint.root), |root| root.pid);
        let fresh = read::parsed(root, "status", status::parse)?;
        Fillers::employ(self.image, blueprint.bytes(), |fillers| {
            self.build_processes(&mut family, blueprint, fillers)
        })?;
        for member in family.members() {
            if let Some(process) = blueprint.processes.get(&member.number) {
                if let Some(space) = &process.space {
                    memory::seal(&mut member.puppet(0)?, space).of(member.pid)?;
                }
                self.build_places(member, process).of(member.pid)?;
            }
        }
        self.files.finder.finish_mapped()?;
        for member in family.members_mut() {
            if let Some(process) = blueprint.processes.get(&member.number) {
                build_threads(member, process).of(member.pid)?;
            }
        }
        self.files.sockets = blueprint.pairs.make(|number| family.process(number)?.puppet(0))?;
        self.files.make_of_tasks(family.pids())?;
        // Fd tables are needed empty until those who share them have all their mappings and places.
        for member in family.members_mut() {
            if let Some(process) = blueprint.processes.get(&member.number) {
                self.build_files(member, process, blueprint).of(member.pid)?;
            }
        }
        // Before signal actions are set, which takes away what the parents were told by these.
        let stop_of = |(pid, process): (&u32, &ProcessPlan)| Some((*pid, process.stop?));
        let stops: BTreeMap<u32, JobStop> = blueprint.processes.iter().filter_map(stop_of).collect();
        family.stop(&blueprint.tree, &stops)?;
        for (turn, stages) in TURNS {
            if turn == Turn::All {
                family.members_mut().for_each(Member::expect_signals);
            }
            for member in family.members() {
                if let Some(process) = blueprint.processes.get(&member.number) {
                    take_turn(member, process, &fresh, turn, stages).of(member.pid)?;
                }
            }
        }
        for member in family.members() {
            if let Some(process) = blueprint.processes.get(&member.number) {
                set_file_owners(member, process, blueprint).of(member.pid)?;
            }
        }
        let mut registers = BTreeMap::new();
        for member in family.members() {
            if let Some(process) = blueprint.processes.get(&member.number) {
                arm(member, process, &blueprint.workshop, &mut registers).of(member.pid)?;
            }
        }
        for member in family.members_mut() {
            if let Some(process) = blueprint.processes.get(&member.number) {
                let space = blueprint.space(process).of(member.pid)?;
                finish(member, process, space, (&fresh, &blueprint.workshop), &registers).of(member.pid)?;
            }
        }
        if needs_init {
            family.start_init(&blueprint.workshop, blueprint.root)?;
        }
        Ok((family, self.files))
    }

    fn build_places(&self, member: &Member, process: &ProcessPlan) -> Result<()> {
        if let Some(login) = &process.login {
            login.build(member.pid, &self.channel, &mut member.puppet(0)?)?;
        }
        for (number, seat) in &process.seats {
            let Some(places) = &seat.places else { continue };
            let mut puppet = member.puppet_of(*number)?;
            let mut batch = puppet.batch();
            let lent = self.opened.lend(places.needs(), &self.channel, &mut puppet, &mut batch)?;
            places.build(|file, flags| lent.number(file, flags), &mut batch)?;
            lent.close(&mut batch);
            puppet.run(batch)?.check()?;
        }
        Ok(())
    }

    fn build_files(&self, member: &Member, process: &ProcessPlan, blueprint: &Blueprint) -> Result<()> {
        for (number, seat) in &process.seats {
            let Some(table) = &seat.table else { continue };
            let mut puppet = member.puppet_of(*number)?;
            let scratch = puppet.scratch();
            let new_batch = || Batch::new(scratch);
            let mut run = |batch: &mut Batch| puppet.run(std::mem::replace(batch, new_batch()))?.check();
            let mut batch = new_batch();
            self.room.make(blueprint.highest_number(*number, table), &mut batch);
            table.install(&self.channel, |number| self.files.description(number), &mut batch, &mut run)?;
            let mut watches = blueprint.watches.values().filter(|one| one.table() == *number).peekable();
            if watches.peek().is_some() {
                run(&mut batch)?;
            }
            for watches in watches {
                watches.connect(&mut puppet, table, &self.files, &self.channel)?;
            }
            batch.call(sys::close, &[self.channel.number() as u64]);
            puppet.run(batch)?.check()?;
            table.take_locks(|batch| puppet.run(batch)?.check(), new_batch)?;
        }
        Ok(())
    }
}

/// Makes the threads of a process, before it has any files: some files are of threads.
fn build_threads(member: &mut Member, process: &ProcessPlan) -> Result<()> {
    {
        let mut puppet = member.puppet(0)?;
        let mut batch = puppet.batch();
        // From here on PTRACE_O_EXITKILL alone looks after orphans; the signal would outlast the release.
        batch.call(sys::prctl, &[libc::PR_SET_PDEATHSIG as u64, 0]);
        if let Some((leader, _)) = &process.dead_leader {
            let name = batch.input(&[&leader.name[..], b"\0"].concat());
            batch.call(sys::prctl, &[libc::PR_SET_NAME as u64, name]);
        }
        puppet.run(batch)?.check()?;
    }
    let there: Vec<u32> = member.threads.iter().map(|thread| thread.number()).collect();
    let others = process.threads.keys().copied().filter(|tid| !there.contains(tid));
    member.make_threads(&others.collect::<Vec<_>>())
}

/// Says who gets signals about its files: as the user that it is by now.
fn set_file_owners(member: &Member, process: &ProcessPlan, blueprint: &Blueprint) -> Result<()> {
    for number in process.seats.keys() {
        let mut owners = blueprint.file_owners.iter().filter(|one| one.table() == *number).peekable();
        if owners.peek().is_none() {
            continue;
        }
        let mut puppet = member.puppet_of(*number)?;
        let mut batch = puppet.batch();
        for owner in owners {
            owner.set(&mut batch);
            if batch.is_nearly_full() {
                puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
            }
        }
        puppet.run(batch)?.check()?;
    }
    Ok(())
}

/// Which group the root joins, when it is one from outside.
fn outer_group(plan: &Plan, policy: OuterSession, pids: &Pids) -> Result<Option<u32>> {
    let Some(session) = plan.outer_session else { return Ok(None) };
    // For who is inside a namespace, everybody outside has the number 0.
    let (own, group) = match pids {
        Pids::Original => (nix::unistd::getsid(None).call("getsid")?, nix::unistd::getpgrp()),
        Pids::NewNamespace | Pids::Namespace(_) => {
            (nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))
        }
    };
    let (own, group) = (own.as_raw() as u32, group.as_raw() as u32);
    match policy {
        OuterSession::Inherit => Ok(None),
        OuterSession::Same if own == session => match plan.outer_group.filter(|wanted| *wanted != group) {
            Some(0) => Err(Error::new(
                ErrorKind::Conflict,
                format!(
                    "the tree was in a group from outside its pid namespace, and the caller is in group {group}"
                ),
            )),
            other => Ok(other),
        },
        OuterSession::Same => {
            let reason =
                format!("the tree was part of session {session}, and the caller is in session {own}");
            Err(Error::new(ErrorKind::Conflict, reason).with_hint(
                "restore it into the caller's session with OuterSession::Inherit, or start it with setsid",
            ))
        }
    }
}

/// How long the numbers of the dead may stay taken.
const PATIENCE: Duration = Duration::from_secs(3);

/// A number is free when no task has it. The dead of a tree that was killed a moment ago are on their way out:
/// whoever inherited them has to wait for them.
fn wait_until_free(tid: Pid, patience: &mut Duration) -> Result<()> {
    const STEP: Duration = Duration::from_millis(1);
    loop {
        let taken = |why| Err(Error::new(ErrorKind::Conflict, why).of(tid));
        match read::parsed(tid, "stat", stat::parse) {
            Err(error) if error.kind() == ErrorKind::TaskGone => return Ok(()),
            Ok(stat) if !matches!(stat.state, 'Z' | 'X') => {
                return taken("this pid is taken by a running task")
                    .hint("in a pid namespace of its own (Pids::NewNamespace) the tree's numbers are free");
            }
            Ok(_) if patience.is_zero() => {
                return taken("this pid is taken by a zombie that nobody waits for");
            }
            _ => {
                std::thread::sleep(STEP);
                *patience = patience.saturating_sub(STEP);
            }
        }
    }
}

/// Puts blocked threads back into their calls, and says what registers all are to get: the last that anybody does
/// in the workshop.
fn arm(
    member: &Member,
    process: &ProcessPlan,
    workshop: &Workshop,
    registers: &mut BTreeMap<Pid, Regs>,
) -> Result<()> {
    let living: Vec<_> = living(member, process).collect();
    for some in living.chunks(Scratch::PARTS) {
        let mut sleepers = Vec::new();
        for (part, (index, thread)) in some.iter().enumerate() {
            let tid = thread.tid();
            let plan = plan_of(process, thread.number())?;
            let regs = plan.registers.general();
            if plan.registers.has_tiles() {
                member.puppet_in_part(part, *index)?.use_tiles().of(tid)?;
            }
            match &plan.blocked {
                Some(blocked) => {
                    let mut puppet = member.puppet_in_part(part, *index)?;
                    blocked.enter(&regs, &mut puppet).of(tid)?;
                    sleepers.push((blocked, regs, puppet));
                }
                None => drop(registers.insert(tid, regs)),
            }
        }
        for (_, _, puppet) in &mut sleepers {
            puppet.interrupt()?;
        }
        for (blocked, regs, mut puppet) in sleepers {
            let tid = puppet.tracee().tid();
            registers.insert(tid, blocked.entered(regs, &mut puppet).of(tid)?);
        }
    }
    queue_continues(member, process, workshop)
}

/// Removes the workshop, sets the registers.
fn finish(
    member: &mut Member,
    process: &ProcessPlan,
    space: &AddressSpace,
    (fresh, workshop): (&Status, &Workshop),
    registers: &BTreeMap<Pid, Regs>,
) -> Result<()> {
    let range = workshop.range();
    let syscall = member.syscall_in_vdso(space)?;
    if process.space.is_some() {
        let args = [range.start, range.end - range.start, 0, 0, 0, 0];
        call_at(member.leader()?, syscall, sys::munmap, args)?;
    }
    let mut stopped = false;
    for (_, thread) in living(member, process) {
        let task = Rebuilt { pid: member.pid, process: member.number, tracee: thread, fresh };
        let plan = plan_of(process, thread.number())?;
        for (_, state) in plan.states.iter().filter(|(stage, _)| *stage == Stage::Release) {
            state.settle(task).of(thread.tid())?;
        }
        let regs = registers.get(&thread.tid());
        thread.set_regs(regs.ok_or_else(|| Error::new(ErrorKind::Kernel, "it has not been prepared"))?)?;
        stopped |= plan.registers.is_stopped() && process.stop.is_none();
    }
    member.to_be_stopped |= stopped;
    process.dead_leader.iter().try_for_each(|(leader, _)| member.end_leader(syscall, leader.code()))
}

/// The threads that are to live on, with their places in the list. A dead leader has nothing to go back to.
fn living<'m>(member: &'m Member, process: &ProcessPlan) -> impl Iterator<Item = (usize, &'m Tracee)> {
    member.threads.iter().enumerate().skip(usize::from(process.dead_leader.is_some()))
}

fn plan_of(process: &ProcessPlan, number: u32) -> Result<&ThreadPlan> {
    process
        .threads
        .get(&number)
        .ok_or_else(|| Error::new(ErrorKind::Image, "a thread without its records").of(Pid::from(number)))
}
