//! Restore: the tasks themselves, from the first blank one to the moment when all of them run.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::Pid;
use crate::arch::{self, RegsExt, SYSCALL};
use crate::error::{Context, Error, ErrorKind, NameCall, Result};
use crate::proc::{read, stat};
use crate::resource::fds::Channel;
use crate::resource::memory::{AddressSpace, Backing, Made, Workshop};
use crate::resource::tasks::attributes::Own;
use crate::resource::tasks::job_stop::{self, JobStop};
use crate::resource::tasks::plan::{Actor, Birth, Plan, Step};
use crate::resource::tasks::tree::{Life, ProcessRecord, Tree};
use crate::sys::pidfd;
use crate::sys::ptrace::{Resume, SigMask};
use crate::tracee::{
    Birthplace, Blank, CloneArgs, Ending, Ids, Memory, Newborn, Puppet, Scratch, Seed, Stop, StubFile,
    Tracee, sys,
};

/// One process that is being restored.
pub(crate) struct Member {
    pub(crate) pid: Pid,
    /// By which it knows itself, and the image knows it.
    pub(crate) number: u32,
    /// The leader is first.
    pub(crate) threads: Vec<Tracee>,
    pub(crate) memory: Memory,
    /// It has yet to be stopped, as job control does.
    pub(crate) to_be_stopped: bool,
    scratch: Scratch,
    ending: Ending,
    /// It has already ended, as it had at the checkpoint.
    dead: bool,
}

impl Member {
    fn new(threads: Newborn, scratch: Scratch) -> Result<Self> {
        let leader = threads.first().ok_or_else(no_root)?;
        let (pid, number, ending) = (leader.tid(), leader.number(), Ending::QUIET);
        let (memory, threads) = (Memory::open(pid)?, threads.into_tasks());
        Ok(Self { pid, number, threads, memory, to_be_stopped: false, scratch, ending, dead: false })
    }

    /// From now on signals may be pending, none of which may be taken for the end of a batch.
    pub(crate) fn expect_signals(&mut self) {
        self.ending = Ending::STOP;
    }

    pub(crate) fn leader(&self) -> Result<&Tracee> {
        self.threads.first().ok_or_else(|| Error::new(ErrorKind::TaskGone, "it has no thread").of(self.pid))
    }

    /// Makes one of its threads execute batches.
    pub(crate) fn puppet(&self, thread: usize) -> Result<Puppet<'_>> {
        self.puppet_in(self.scratch, thread)
    }

    /// The same for one of several at the same time, as many as the scratch memory has parts.
    pub(crate) fn puppet_in_part(&self, part: usize, thread: usize) -> Result<Puppet<'_>> {
        self.puppet_in(self.scratch.part(part), thread)
    }

    fn puppet_in(&self, scratch: Scratch, thread: usize) -> Result<Puppet<'_>> {
        let gone = || Error::new(ErrorKind::TaskGone, "no such thread").of(self.pid);
        let thread = self.threads.get(thread).ok_or_else(gone)?;
        let ids = Ids { pid: self.pid, number: self.number };
        Puppet::own(thread, ids, &self.memory, scratch, self.ending)
    }

    /// The same of the thread with this number.
    pub(crate) fn puppet_of(&self, tid: u32) -> Result<Puppet<'_>> {
        let index = self.threads.iter().position(|thread| thread.number() == tid);
        self.puppet(index.unwrap_or(usize::MAX))
    }

    /// Makes its other threads, with their numbers.
    pub(crate) fn make_threads(&mut self, tids: &[u32]) -> Result<()> {
        const AT_ONCE: usize = 512;
        for some in tids.chunks(AT_ONCE) {
            let born = self.clone(0, some, CloneArgs::THREAD, 0)?;
            self.threads.extend(born.into_tasks());
        }
        Ok(())
    }

    /// Remote clone3(2) by one of its threads, for each number. The new tasks are stopped before their first
    /// instruction.
    fn clone(&self, thread: usize, numbers: &[u32], flags: u64, exit_signal: u64) -> Result<Newborn> {
        let mut puppet = self.puppet(thread)?;
        let mut batch = puppet.batch();
        let mut calls = Vec::new();
        for number in numbers {
            let set_tid = batch.input(&number.to_ne_bytes());
            let args = CloneArgs { flags, exit_signal, set_tid, set_tid_size: 1, ..CloneArgs::default() };
            let words = args.words();
            let args = batch.input_words(&words);
            calls.push(batch.call(sys::clone3, &[args, size_of_val(&words) as u64]));
        }
        let mut born = Newborn::default();
        let answers = puppet.run_forking(batch, |child| {
            let child = Tracee::attached(child);
            born.push(child.clone());
            child.wait_step().map(drop)
        })?;
        for (call, number) in calls.into_iter().zip(numbers) {
            answers.get(call).map_err(|error| crate::tracee::explain_clone(error, Pid::from(*number)))?;
        }
        Ok(born.known_as(numbers))
    }

    /// Its leader ends by a call at this address, as it had ended; the other threads remain.
    pub(crate) fn end_leader(&mut self, syscall: u64, code: u64) -> Result<()> {
        if self.threads.is_empty() {
            return Err(no_root());
        }
        let leader = self.threads.remove(0);
        let tid = leader.tid();
        // We cannot let go of a zombie whose threads live: it must not take them with it when we end.
        // Nor may a filter judge its last call, where we have the privilege to prevent that.
        let options = crate::sys::ptrace::set_options(tid, crate::sys::ptrace::SUSPEND_SECCOMP);
        options.or_else(|_| crate::sys::ptrace::set_options(tid, 0)).call("ptrace(SETOPTIONS)").of(tid)?;
        let mut regs = leader.regs()?;
        regs.enter_call(syscall, sys::exit.number, [code, 0, 0, 0, 0, 0], 0);
        leader.set_regs(&regs)?;
        leader.resume(Resume::Run)?;
        for _ in 0..100_000 {
            match read::parsed(tid, "stat", stat::parse)?.state {
                'Z' => return Ok(()),
                _ => std::thread::sleep(Duration::from_micros(20)),
            }
        }
        Err(Error::new(ErrorKind::Timeout, "its leader does not end").of(tid))
    }

    /// Puts it into a job-control stop, of which its parent is told. It still executes batches.
    fn stop(&self, signal: i32) -> Result<()> {
        const LIMIT: Duration = Duration::from_millis(200);
        let leader = self.leader()?;
        // A stop by any signal but SIGSTOP is ignored where nobody could continue it: it sleeps then.
        let mut regs = leader.regs()?;
        regs.enter_call(self.scratch.syscall(), sys::pause.number, [0; 6], 0);
        {
            // What is made of the signal that ends a batch is up to us.
            let mut puppet = self.puppet(0)?;
            let mut batch = puppet.batch();
            batch.call(sys::getpid, &[]);
            puppet.run(batch)?;
        }
        leader.set_regs(&regs)?;
        leader.set_sigmask(SigMask(!(1 << (signal - 1))))?;
        let delivered =
            |signal| crate::sys::ptrace::deliver(leader.tid(), signal).call("ptrace(CONT)").of(leader.tid());
        delivered(signal)?;
        match leader.wait(LIMIT) {
            Ok(Stop::Group(_)) => {}
            Err(error) if error.kind() != ErrorKind::Timeout => return Err(error),
            other => {
                if other.is_err() {
                    leader.interrupt()?;
                    leader.wait_step()?;
                }
                nix::sys::signal::kill(self.pid.nix(), nix::sys::signal::Signal::SIGSTOP)
                    .call("kill")
                    .of(self.pid)?;
                leader.resume(Resume::Run)?;
                while leader.wait_step()? != Stop::Signal(libc::SIGSTOP) {
                    leader.resume(Resume::Run)?;
                }
                delivered(libc::SIGSTOP)?;
                leader.wait_step()?;
            }
        }
        for thread in self.threads.iter().skip(1) {
            thread.resume(Resume::Run)?;
            thread.wait_step()?;
        }
        Ok(())
    }

    /// Continues it after [`Self::stop`], and has its parent told.
    fn go_on(&self) -> Result<()> {
        nix::sys::signal::kill(self.pid.nix(), nix::sys::signal::Signal::SIGCONT).call("kill").of(self.pid)?;
        for thread in &self.threads {
            thread.resume(Resume::Run)?;
            thread.wait_step()?;
        }
        Ok(())
    }

    /// The address of a `syscall` instruction in its vdso, where nothing of ours is needed any more.
    pub(crate) fn syscall_in_vdso(&self, space: &AddressSpace) -> Result<u64> {
        let vdso = space
            .vmas
            .iter()
            .find(|vma| matches!(&vma.backing, Backing::Special { name } if **name == *b"[vdso]"));
        let found = vdso.map(|vdso| {
            let text = self.memory.read_vec(vdso.start, vdso.len() as usize)?;
            Ok::<_, Error>(text.windows(2).position(|two| two == SYSCALL).map(|at| vdso.start + at as u64))
        });
        found
            .transpose()?
            .flatten()
            .ok_or_else(|| Error::new(ErrorKind::Kernel, "its vdso has no system call").of(self.pid))
    }
}

/// All tasks that are being restored. Dropping it ends them all, unless they have been released.
pub(crate) struct Family {
    members: Vec<Member>,
    /// The numbers that stand-ins got which may have any.
    nameless: BTreeMap<usize, u32>,
    pidfd: Option<OwnedFd>,
    scratch: Scratch,
    /// Those that died before they were members.
    stillborn: Vec<Pid>,
    /// Outside of the tasks: gone again unless they are released.
    made: Vec<Made>,
}

impl Family {
    /// Makes the process that will be the root: from the thread that is to be its parent.
    pub(crate) fn seed(workshop: Workshop, place: Birthplace<'_>, channel: &Channel) -> Result<Seed> {
        let (base, room) = workshop.stub();
        Seed::plant(&StubFile::new(base, room)?, place, channel.gift())
    }

    /// The root, blank: from the thread that traces the whole family.
    /// `filtered`: some of its tasks have system call filters, which must not apply to what they do for us.
    pub(crate) fn found(workshop: Workshop, seed: Seed, filtered: bool) -> Result<Self> {
        let blank = seed.adopt()?;
        let suspended = if filtered { blank.suspend_seccomp() } else { Ok(()) };
        let Blank { tracee, pidfd } = blank;
        let (root, scratch) = (Newborn::from(tracee), workshop.scratch());
        let mut family = Self {
            members: Vec::new(),
            nameless: BTreeMap::new(),
            pidfd: Some(pidfd),
            scratch,
            stillborn: Vec::new(),
            made: Vec::new(),
        };
        let root = Member::new(root, scratch)?;
        let written = root.memory.write(workshop.code(), arch::code());
        family.members.push(root);
        written.and(suspended).map(|()| family)
    }

    /// What we call the process that knows itself by this number.
    pub(crate) fn pid_of(&self, number: u32) -> Result<Pid> {
        let member = self.members.iter().find(|member| member.number == number);
        member.map(|member| member.pid).ok_or_else(no_root)
    }

    /// What we call all tasks, by the numbers by which they know themselves.
    pub(crate) fn pids(&self) -> BTreeMap<u32, Pid> {
        let leaders = self.members.iter().map(|member| (member.number, member.pid));
        let threads = self.members.iter().flat_map(|member| &member.threads);
        leaders.chain(threads.map(|thread| (thread.number(), thread.tid()))).collect()
    }

    /// Makes the first task, from which all others have it, give up what it has from whoever restores.
    pub(crate) fn start_afresh(&self, inherited: &Own) -> Result<()> {
        let mut puppet = self.members.first().ok_or_else(no_root)?.puppet(0)?;
        let mut batch = puppet.batch();
        // If SIGCHLD is ignored, nobody can be waited for.
        let default = batch.input_words(&[0; 4]);
        batch.call(sys::rt_sigaction, &[libc::SIGCHLD as u64, default, 0, 8]);
        inherited.shed(&mut batch);
        puppet.run(batch)?.check()
    }

    /// Lets the root make what all are going to have.
    pub(crate) fn prepare(&mut self, work: impl FnOnce(&mut Puppet<'_>) -> Result<Vec<Made>>) -> Result<()> {
        let root = self.members.first().ok_or_else(no_root)?;
        self.made = work(&mut root.puppet(0)?)?;
        Ok(())
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| !member.dead)
    }

    /// The one that knows itself by this number.
    pub(crate) fn process(&self, number: u32) -> Result<&Member> {
        self.members.iter().find(|member| member.number == number).ok_or_else(no_root)
    }

    pub(crate) fn members_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.members.iter_mut().filter(|member| !member.dead)
    }

    /// Makes all processes of the tree, in their sessions and groups; the dead die. `born` has each as soon as it
    /// is there, before it has children.
    pub(crate) fn grow(
        &mut self,
        tree: &Tree,
        plan: &Plan,
        outer_group: Option<u32>,
        born: impl Fn(&Member) -> Result<()>,
    ) -> Result<()> {
        born(self.members.first().ok_or_else(no_root)?)?;
        if let Some(group) = outer_group {
            // Before it has children, who are in it too.
            let root = Actor::Number(tree.root()?.pid);
            self.call(root, sys::setpgid, &[0, u64::from(group)])
                .hint("the group that the tree was in is gone")?;
        }
        for step in &plan.steps {
            match *step {
                Step::Bear { child, birth, .. } => {
                    self.bear(child, birth, tree)?;
                    born(self.members.last().ok_or_else(no_root)?)?;
                }
                Step::Spawn { process, tid, birth } => {
                    let (member, thread) = self.task(birth.by)?;
                    let born = member.clone(thread, &[tid], birth.flags, 0)?;
                    self.member(process)?.threads.extend(born.into_tasks());
                }
                Step::Unshare(who, flags) => self.call(who, sys::unshare, &[flags]).map(drop)?,
                Step::StartSession(who) => self.call(who, sys::setsid, &[]).map(drop)?,
                Step::JoinGroup(who, group) => {
                    self.call(who, sys::setpgid, &[0, u64::from(group)]).map(drop)?;
                }
                Step::Retire { stand_in, parent, heir } => self.retire(stand_in, parent, heir)?,
            }
        }
        tree.processes.iter().try_for_each(|record| match record.life {
            Life::Zombie(status) => self.bury(record, status),
            Life::Threads(_) => Ok(()),
        })
    }

    fn member(&mut self, pid: u32) -> Result<&mut Member> {
        self.members.iter_mut().find(|member| member.number == pid).ok_or_else(no_root)
    }

    fn number(&self, actor: Actor) -> Result<u32> {
        match actor {
            Actor::Number(number) => Ok(number),
            Actor::Nameless(index) => self.nameless.get(&index).copied().ok_or_else(no_root),
        }
    }

    fn call(&mut self, who: Actor, call: crate::tracee::Sys, args: &[u64]) -> Result<u64> {
        let member = self.member(self.number(who)?)?;
        let mut puppet = member.puppet(0)?;
        let mut batch = puppet.batch();
        let call = batch.call(call, args);
        puppet.run(batch)?.get(call).of(member.pid)
    }

    /// The process of a task, and which of its threads that is.
    fn task(&self, who: Actor) -> Result<(&Member, usize)> {
        let number = self.number(who)?;
        let leads = self.members.iter().find(|member| member.number == number).map(|member| (member, 0));
        let thread = |member: &Member| member.threads.iter().position(|thread| thread.number() == number);
        let threads = || self.members.iter().find_map(|member| Some((member, thread(member)?)));
        leads.or_else(threads).ok_or_else(no_root)
    }

    fn bear(&mut self, child: Actor, birth: Birth, tree: &Tree) -> Result<()> {
        let (midwife, thread) = self.task(birth.by)?;
        let threads = match child {
            Actor::Number(number) => {
                let record = tree.processes.iter().find(|record| record.pid == number);
                // Nobody is told of the end of a stand-in. A sibling's child gets the sibling's signal.
                let signals = birth.flags & libc::CLONE_PARENT as u64 == 0;
                let exit_signal = record.filter(|_| signals).map_or(0, |record| record.exit_signal);
                midwife.clone(thread, &[number], birth.flags, u64::from(exit_signal))?
            }
            Actor::Nameless(index) => {
                let threads = bear_nameless(midwife, thread, birth.flags, tree)?;
                let number = threads.first().map_or(0, Tracee::number);
                self.nameless.insert(index, number);
                threads
            }
        };
        let pid = threads.first().ok_or_else(no_root)?.tid();
        let member = Member::new(threads, self.scratch).inspect_err(|_| self.stillborn.push(pid))?;
        self.members.push(member);
        Ok(())
    }

    /// Ends a stand-in, and makes its parent wait for it.
    fn retire(&mut self, stand_in: Actor, parent: Actor, heir: Option<u32>) -> Result<()> {
        let pid = self.number(stand_in)?;
        let subreaper = |on: u64| [libc::PR_SET_CHILD_SUBREAPER as u64, on];
        if let Some(heir) = heir {
            self.call(Actor::Number(heir), sys::prctl, &subreaper(1))?;
        }
        let member = self.member(pid)?;
        let leader = member.leader()?;
        crate::tracee::last_call(leader, member.scratch.syscall(), sys::exit_group, [0; 6], 0)?;
        leader.wait_death(true)?;
        self.members.retain(|member| member.number != pid);
        if let Some(heir) = heir {
            self.call(Actor::Number(heir), sys::prctl, &subreaper(0))?;
        }
        let options = (libc::WNOHANG | libc::__WALL) as u64;
        match self.call(parent, sys::wait4, &[u64::from(pid), 0, options, 0])? {
            waited if waited == u64::from(pid) => Ok(()),
            _ => Err(Error::new(ErrorKind::Kernel, "a stand-in does not end").of(Pid::from(pid))),
        }
    }

    /// Stops those that were, and makes their parents take note where they had; continues those that had been.
    pub(crate) fn stop(&self, tree: &Tree, stops: &BTreeMap<u32, JobStop>) -> Result<()> {
        let of = |pid: u32| self.members.iter().find(|member| member.number == pid).ok_or_else(no_root);
        for record in &tree.processes {
            let Some(stop) = stops.get(&record.pid) else { continue };
            let (signal, seen) = match stop {
                JobStop::Stopped { signal, seen } => (*signal, *seen),
                JobStop::Continued => (libc::SIGSTOP, false),
            };
            let member = of(record.pid)?;
            member.stop(signal).of(record.pid())?;
            if *stop == JobStop::Continued {
                member.go_on().of(record.pid())?;
            }
            if seen {
                let mut puppet = of(record.parent)?.puppet(0)?;
                let mut batch = puppet.batch();
                job_stop::take_note(record.pid, &mut batch);
                puppet.run(batch)?.check()?;
            }
        }
        Ok(())
    }

    /// Ends a process the way it had ended.
    fn bury(&mut self, record: &ProcessRecord, status: i32) -> Result<()> {
        let member = self.member(record.pid)?;
        member.dead = true;
        {
            let mut puppet = member.puppet(0)?;
            let mut batch = puppet.batch();
            let name = batch.input(&[&record.name[..], b"\0"].concat());
            batch.call(sys::prctl, &[libc::PR_SET_NAME as u64, name]);
            // It has not dumped core, whatever limit it has from whoever restores.
            batch.call(sys::prctl, &[libc::PR_SET_DUMPABLE as u64, 0]);
            puppet.run(batch)?.check()?;
        }
        let leader = member.leader()?;
        let (number, args) = match status & 0x7f {
            0 => (sys::exit_group, [(status >> 8 & 0xff) as u64, 0, 0, 0, 0, 0]),
            signal => (sys::tgkill, [u64::from(record.pid), u64::from(record.pid), signal as u64, 0, 0, 0]),
        };
        crate::tracee::last_call(leader, member.scratch.syscall(), number, args, status & 0x7f)?;
        leader.wait_death(true)
    }

    /// Makes the first process, which is none of the tree's, process 1 of the namespace that the tree is in.
    pub(crate) fn start_init(&self, workshop: &Workshop, root: u32) -> Result<()> {
        let member = self.members.first().ok_or_else(no_root)?;
        {
            let mut puppet = member.puppet(0)?;
            let mut batch = puppet.batch();
            let name = batch.input(b"cryosleep-init\0");
            batch.call(sys::prctl, &[libc::PR_SET_NAME as u64, name]);
            let top = batch.input(b"/\0");
            batch.call(sys::chdir, &[top]);
            batch.call(sys::close_range, &[0, u64::from(u32::MAX), 0]);
            batch.call(sys::prctl, &[libc::PR_SET_PDEATHSIG as u64, 0]);
            puppet.run(batch)?.check()?;
        }
        let leader = member.leader()?;
        let (stub, _) = workshop.stub();
        let mut regs = leader.regs()?;
        regs.enter_init(stub, workshop.code()..workshop.range().end, root);
        leader.set_regs(&regs)?;
        leader.set_sigmask(SigMask(0))
    }

    /// Lets all of them run. `root` is the number of the tree's root.
    pub(crate) fn release(mut self, root: u32) -> Result<Released> {
        let pid = self.pid_of(root)?;
        let init = self.members.first().filter(|first| first.pid != pid).map(|first| first.pid);
        let inner = init.map(|_| pidfd::open(pid).call("pidfd_open").of(pid)).transpose()?;
        for member in self.members() {
            if member.to_be_stopped {
                nix::sys::signal::kill(member.pid.nix(), nix::sys::signal::Signal::SIGSTOP)
                    .call("kill")
                    .of(member.pid)?;
            }
        }
        for member in self.members() {
            member.threads.iter().try_for_each(Tracee::detach)?;
        }
        self.made.drain(..).for_each(Made::keep);
        let seed = self.pidfd.take().ok_or_else(no_root)?;
        Ok(match inner {
            None => Released { pid, pidfd: seed, init: None },
            Some(pidfd) => Released { pid, pidfd, init: init.map(|init| (init, seed)) },
        })
    }
}

/// The tree runs.
pub(crate) struct Released {
    /// Its root.
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    /// The process 1 that had to be made for it.
    pub(crate) init: Option<(Pid, OwnedFd)>,
}

/// A child with a number that nobody else is going to need.
fn bear_nameless(midwife: &Member, thread: usize, flags: u64, tree: &Tree) -> Result<Newborn> {
    let needed: BTreeSet<u32> = tree.numbers().map(Pid::get).collect();
    let limit = crate::proc::read::pid_limit()?;
    let unneeded = |number: &u32| !needed.contains(number);
    for number in (limit / 2..limit).rev().filter(unneeded) {
        match midwife.clone(thread, &[number], flags, 0) {
            Err(error) if error.kind() == ErrorKind::Conflict => {}
            born => return born,
        }
    }
    Err(Error::new(ErrorKind::Conflict, "no pid is free"))
}

fn no_root() -> Error {
    Error::new(ErrorKind::Image, "a process without its parent")
}

impl Drop for Family {
    fn drop(&mut self) {
        let Some(pidfd) = self.pidfd.take() else { return };
        let root = self.members.first().map(|root| root.pid);
        for member in self.members.iter().rev() {
            if Some(member.pid) == root {
                let _ = pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL);
            } else if !member.dead {
                let _ = nix::sys::signal::kill(member.pid.nix(), nix::sys::signal::Signal::SIGKILL);
            }
            for thread in member.threads.iter().rev().filter(|_| !member.dead) {
                let _ = thread.wait_death(true);
            }
        }
        // Those whose parents are gone may have become children of ours.
        let members = self.members.iter().rev().map(|member| member.pid);
        members.chain(self.stillborn.iter().copied()).for_each(crate::sys::wait::reap);
    }
}
