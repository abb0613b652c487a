//! Checkpoint, stage one: stopping a whole tree, and letting it go again whatever happens.

mod undertaker;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::Pid;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Owner;
use crate::parallel;
use crate::proc::read;
use crate::proc::stat::{self, Stat};
use crate::proc::status::{self, Status};
use crate::resource::tasks::blocked::{Clocks, Sleeper};
use crate::resource::tasks::seccomp::{self, Suspended};
use crate::sys;
use crate::tracee::{Ids, Stop, Tracee};
use crate::vfork;
use undertaker::Undertaker;

/// How long a task may keep the others waiting before everything is released and tried again: a vfork
/// parent, for one, cannot stop before its child goes on. Each attempt takes twice as long: a machine may be busy.
const ATTEMPT: Duration = Duration::from_millis(100);

/// A thread, stopped.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) tracee: Tracee,
    /// It is in a job-control stop of its own, by this signal.
    pub(crate) job_stop: Option<i32>,
    /// What was seen of its system call before it was stopped.
    pub(crate) sleeper: Option<Sleeper>,
}

impl Thread {
    pub(crate) fn tid(&self) -> Pid {
        self.tracee.tid()
    }
}

/// A process, all threads of which are stopped.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    /// By which it knows itself, in its own pid namespace.
    pub(crate) number: u32,
    /// The living threads; the leader, if it lives, is first.
    pub(crate) threads: Vec<Thread>,
    pub(crate) stat: Stat,
    pub(crate) status: Status,
    pub(crate) seccomp: Suspended,
}

impl Process {
    pub(crate) fn ids(&self) -> Ids {
        Ids { pid: self.pid, number: self.number }
    }

    /// Ends it.
    pub(crate) fn kill(&self) -> Result<()> {
        match nix::sys::signal::kill(self.pid.nix(), nix::sys::signal::Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(errno) => Err(Error::call("kill", errno).of(self.pid)),
        }
    }

    /// Helps it to free its memory, once it has been killed: two do it in half the time. It does without, too.
    pub(crate) fn help_to_die(&self) {
        /// Less is gone before help comes.
        const MUCH: u64 = 16 * 1024 * 1024;
        if self.stat.rss * sys::PAGE >= MUCH {
            let _ = sys::pidfd::open(self.pid).and_then(|pidfd| sys::pidfd::free_memory(pidfd.as_fd()));
        }
    }

    /// Waits until it has ended. A root that is the caller's own child is left for the caller to wait for.
    pub(crate) fn wait_death(&self) -> Result<()> {
        /// For less, another thread of ours is not worth its while.
        const FEW: usize = 200;
        let own_child = self.stat.ppid == std::process::id();
        // The leader is first, and is the last that can be waited for.
        let (leader, others) = self.threads.split_at(usize::from(!self.leader_is_dead()));
        parallel::map(others, FEW, |thread| thread.tracee.wait_death(true))?;
        leader.iter().try_for_each(|thread| thread.tracee.wait_death(!own_child))
    }

    /// The thread that is asked for what all share. By its number /proc shows that, too: of a leader that has
    /// ended it shows nothing any more.
    pub(crate) fn speaker(&self) -> Pid {
        self.threads.first().map_or(self.pid, Thread::tid)
    }

    /// Whose records tell what a thread has: its own if that differs from what its process has.
    pub(crate) fn owner_for(&self, tid: Pid) -> Owner {
        let mut threads = self.threads.iter().skip(1);
        Owner(threads.find(|thread| thread.tid() == tid).map_or(self.number, |thread| thread.tracee.number()))
    }

    /// The leader has ended while other threads live on.
    pub(crate) fn leader_is_dead(&self) -> bool {
        self.threads.first().is_none_or(|thread| thread.tid() != self.pid)
    }
}

/// A process that has ended and that its parent has not waited for.
#[derive(Debug)]
pub(crate) struct Zombie {
    pub(crate) pid: Pid,
    pub(crate) number: u32,
    pub(crate) stat: Stat,
    pub(crate) status: Status,
}

/// A stopped tree. Dropping it lets all of it run on as if nothing had happened.
#[derive(Debug)]
pub(crate) struct Frozen {
    /// In the order they were found: parents before their children, the root first.
    pub(crate) processes: Vec<Process>,
    pub(crate) zombies: Vec<Zombie>,
    /// All other processes, but for kernel threads.
    pub(crate) others: Vec<Pid>,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.processes.iter().for_each(release);
    }
}

impl Frozen {
    /// The children of a process that are in the tree, living or dead, as it knows them.
    pub(crate) fn children_of(&self, parent: Pid) -> Vec<u32> {
        let living = self.processes.iter().map(|process| (process.number, process.stat.ppid));
        let dead = self.zombies.iter().map(|zombie| (zombie.number, zombie.stat.ppid));
        living.chain(dead).filter(|(_, ppid)| *ppid == parent.get()).map(|(number, _)| number).collect()
    }

    /// The root of the tree.
    pub(crate) fn root(&self) -> Result<&Process> {
        self.processes.first().ok_or_else(|| Error::new(ErrorKind::TaskGone, "it has ended"))
    }

    /// Leaves all of it stopped, as job control does.
    pub(crate) fn stop(&self) -> Result<()> {
        self.processes.iter().try_for_each(|process| {
            nix::sys::signal::kill(process.pid.nix(), nix::sys::signal::Signal::SIGSTOP)
                .map_err(|errno| Error::call("kill", errno).of(process.pid))
        })
    }
}

fn release(process: &Process) {
    for thread in &process.threads {
        // It may have been killed from outside meanwhile; there is nothing else to be done about it.
        let _ = thread.tracee.detach();
    }
}

/// Stops the tree below `root`, the root included, within `limit`.
pub(crate) fn freeze(root: Pid, limit: Duration) -> Result<Frozen> {
    refuse_own_ancestors(root)?;
    let started = Instant::now();
    let mut undertaker = Undertaker::default();
    let (mut attempt, mut pause) = (ATTEMPT, Duration::from_millis(1));
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let mut tree = Freezing::default();
        match tree.run(root, left.min(attempt), &mut undertaker).and_then(|()| tree.finish(root)) {
            Err(error) if error.kind() == ErrorKind::Timeout && started.elapsed() + pause < limit => {
                std::thread::sleep(pause);
                // What had to wait for the others gets as much more time as it costs them.
                (attempt, pause) = (attempt * 2, (pause * 4).min(attempt));
            }
            Err(error) => return Err(vfork::explain(error)),
            frozen => return frozen,
        }
    }
}

/// Whoever was not stopped yet has ended its process, or executed a program in it: that ends threads that were. There is
/// nothing wrong with such a tree, but it has to be tried again.
fn moved_on(error: Error) -> Error {
    match error.kind() {
        ErrorKind::TaskGone => error
            .with_kind(ErrorKind::Timeout)
            .with_hint("its tasks end while they are being stopped; try again, or raise the time limit"),
        _ => error,
    }
}

/// A task that ended after it was seized. Until its tracer takes note, the kernel hides it from its own parent,
/// which could not wait for it, and a thread keeps its whole process from being seen as dead. What is the
/// caller's own child is left for the caller: to take note would be to take its status.
fn take_note_of_end(tid: Pid, pid: Pid) {
    let own_child = |stat: Stat| stat.ppid == std::process::id();
    if tid != pid || !read::parsed(tid, "stat", stat::parse).is_ok_and(own_child) {
        sys::wait::reap(tid);
    }
}

fn refuse_own_ancestors(root: Pid) -> Result<()> {
    let refused = |why| Err(Error::new(ErrorKind::Refused, why).of(root));
    let target = read::parsed(root, "status", status::parse)?;
    if target.tgid != root.get() {
        return refused("it is a thread, not a process");
    }
    let own = Pid::from(std::process::id());
    if target.ppid == own.get() {
        return Ok(()); // the usual case: a child of ours is no ancestor
    }
    let mut pid = own;
    let mut why = "a process cannot freeze itself";
    while pid.get() != 0 {
        if pid == root {
            return refused(why);
        }
        why = "it is an ancestor of the calling process, which would be frozen too";
        pid = read::parent(pid)?;
    }
    Ok(())
}

/// A tree on its way to being stopped.
#[derive(Default)]
struct Freezing {
    found: BTreeMap<Pid, Vec<Thread>>,
    order: Vec<Pid>,
    zombies: Vec<Pid>,
    /// As of the last look.
    others: Vec<Pid>,
    clocks: Clocks,
}

impl Drop for Freezing {
    fn drop(&mut self) {
        for (pid, threads) in &self.found {
            // The leader is first, and has ended when all the others have.
            for thread in threads.iter().rev() {
                if thread.tracee.detach().is_err() {
                    take_note_of_end(thread.tid(), *pid);
                }
            }
        }
    }
}

impl Freezing {
    /// Goes on until a whole look at the tree shows nothing that is not stopped: stopped tasks make no new ones.
    fn run(&mut self, root: Pid, limit: Duration, undertaker: &mut Undertaker) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.stop_process(root, deadline, undertaker)?;
        if self.found.get(&root).is_none_or(Vec::is_empty) {
            return Err(Error::new(ErrorKind::TaskGone, "it has ended").of(root));
        }
        loop {
            let new = self.unknown_children()?;
            if new.is_empty() {
                return self.found.values().flatten().try_for_each(still_stopped).map_err(moved_on);
            }
            for pid in new {
                self.stop_process(pid, deadline, undertaker)?;
            }
        }
    }

    fn unknown_children(&mut self) -> Result<Vec<Pid>> {
        // /proc/PID/task/TID/children would be quicker, but needs CONFIG_PROC_CHILDREN and is not exact.
        let parents = read::parents()?.into_iter();
        let unknown = parents.filter(|(pid, _)| !self.found.contains_key(pid) && !self.zombies.contains(pid));
        let (ours, others): (Vec<_>, Vec<_>) =
            unknown.partition(|(_, parent)| self.found.contains_key(parent));
        self.others = others.into_iter().map(|(pid, _)| pid).collect();
        Ok(ours.into_iter().map(|(pid, _)| pid).collect())
    }

    fn stop_process(&mut self, pid: Pid, deadline: Instant, undertaker: &mut Undertaker) -> Result<()> {
        let mut known = std::collections::BTreeSet::<Pid>::new();
        loop {
            let threads = match read::threads(pid) {
                Err(error) if error.kind() == ErrorKind::TaskGone => break,
                threads => threads?,
            };
            let new: Vec<Pid> = threads.into_iter().filter(|tid| !known.contains(tid)).collect();
            if new.is_empty() {
                break;
            }
            known.extend(&new);
            undertaker.mind(known.iter().copied().filter(|tid| *tid != pid).collect())?;
            self.stop_threads(pid, &new, deadline)?;
        }
        match self.found.get(&pid) {
            Some(threads) if !threads.is_empty() => self.order.push(pid),
            _ => {
                self.found.remove(&pid);
                if read::parsed(pid, "stat", stat::parse).is_ok_and(|stat| stat.state == 'Z') {
                    self.zombies.push(pid);
                }
            }
        }
        Ok(())
    }

    /// Seizes all of them first, so that they stop at the same time.
    fn stop_threads(&mut self, pid: Pid, tids: &[Pid], deadline: Instant) -> Result<()> {
        let threads = self.found.entry(pid).or_default();
        let first = threads.len();
        for tid in tids {
            if let Some(thread) = seize(pid, *tid, &mut self.clocks)? {
                threads.push(thread);
            }
        }
        let mut gone = Vec::new();
        for thread in threads.iter_mut().skip(first) {
            match settle(thread, deadline) {
                Err(error) if error.kind() == ErrorKind::TaskGone => {
                    take_note_of_end(thread.tid(), pid);
                    gone.push(thread.tid());
                }
                settled => settled?,
            }
        }
        threads.retain(|thread| !gone.contains(&thread.tid()));
        Ok(())
    }

    fn finish(mut self, root: Pid) -> Result<Frozen> {
        let others = std::mem::take(&mut self.others);
        let mut frozen = Frozen { processes: Vec::new(), zombies: Vec::new(), others };
        let mut found = std::mem::take(&mut self.found);
        for pid in &self.order {
            let mut threads = found.remove(pid).unwrap_or_default();
            threads.sort_by_key(|thread| (thread.tid() != *pid, thread.tid()));
            let speaker = threads.first().map_or(*pid, Thread::tid);
            let described = read::parsed(speaker, "stat", stat::parse).and_then(|mut stat| {
                if speaker != *pid {
                    // The one thing that is the leader's own.
                    stat.exit_signal = read::parsed(*pid, "stat", stat::parse)?.exit_signal;
                }
                let status = read::parsed(speaker, "status", status::parse)?;
                number_threads(&mut threads, &status)?;
                Ok((stat, status, seccomp::suspend(&threads)?))
            });
            match described {
                Ok((stat, status, seccomp)) => {
                    let number = own(&status.ns_tgid, *pid);
                    frozen.processes.push(Process { pid: *pid, number, threads, stat, status, seccomp });
                }
                Err(error) => {
                    // Back into the guard with it: the error must not leave it stopped.
                    found.insert(*pid, threads);
                    self.found = found;
                    return Err(moved_on(error));
                }
            }
        }
        for pid in std::mem::take(&mut self.zombies) {
            let stat = stat_of_dead(pid).map_err(moved_on)?;
            let status = read::parsed(pid, "status", status::parse).map_err(moved_on)?;
            frozen.zombies.push(Zombie { pid, number: own(&status.ns_tgid, pid), stat, status });
        }
        if frozen.processes.first().is_none_or(|first| first.pid != root) {
            return Err(Error::new(ErrorKind::TaskGone, "it has ended").of(root));
        }
        Ok(frozen)
    }
}

/// One that is dead already may run for a moment yet, which looks as if we were not allowed to see how it has ended.
fn stat_of_dead(pid: Pid) -> Result<Stat> {
    const LOOKS: u32 = 20;
    let mut looks = 1;
    loop {
        let stat = read::parsed(pid, "stat", stat::parse)?;
        if stat.wchan != 0 || looks == LOOKS {
            return Ok(stat);
        }
        looks += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The last of a task's numbers, which is that of its own pid namespace.
fn own(numbers: &[u32], pid: Pid) -> u32 {
    numbers.last().copied().unwrap_or(pid.get())
}

/// Finds out by which numbers the threads of a process know themselves. `of_one` is the status of one of them.
fn number_threads(threads: &mut [Thread], of_one: &Status) -> Result<()> {
    if of_one.ns_pid.len() < 2 {
        return Ok(()); // in the namespace of this /proc
    }
    for thread in threads {
        let tid = thread.tid();
        let status = read::parsed(tid, "status", status::parse)?;
        thread.tracee = Tracee::attached(tid).known_as(own(&status.ns_pid, tid));
    }
    Ok(())
}

/// Takes hold of one thread and tells it to stop. `None` when there is nothing (left) to hold.
fn seize(pid: Pid, tid: Pid, clocks: &mut Clocks) -> Result<Option<Thread>> {
    let sleeper = Sleeper::observe(pid, tid, clocks);
    let Some(tracee) = take_hold(pid, tid)? else { return Ok(None) };
    // Seizing alone makes a task that is stopped already report its stop.
    if tracee.stopped()?.is_none() {
        match tracee.interrupt() {
            Err(error) if error.kind() == ErrorKind::TaskGone => return Ok(None),
            interrupted => interrupted?,
        }
    }
    Ok(Some(Thread { tracee, job_stop: None, sleeper }))
}

fn take_hold(pid: Pid, tid: Pid) -> Result<Option<Tracee>> {
    // A task that has ended cannot be seized; but a moment later its number may be that of a thread of the same process
    // that has executed a program.
    const LOOKS: u32 = 3;
    let mut looks = 1;
    loop {
        let error = match Tracee::seize(tid, 0) {
            Ok(tracee) => return Ok(Some(tracee)),
            Err(error) if error.kind() == ErrorKind::TaskGone => return Ok(None),
            Err(error) => error,
        };
        match read::of_thread(pid, tid, "stat", stat::parse) {
            Ok(stat) if !matches!(stat.state, 'Z' | 'X') => {}
            _ => {
                take_note_of_end(tid, pid);
                return Ok(None);
            }
        }
        // An earlier attempt could neither stop it nor, for that reason, let go of it.
        if is_ours(tid) {
            return Ok(Some(Tracee::attached(tid)));
        }
        if looks == LOOKS {
            return Err(error);
        }
        looks += 1;
    }
}

fn is_ours(tid: Pid) -> bool {
    let own = nix::unistd::gettid().as_raw() as u32;
    read::parsed(tid, "status", status::parse).is_ok_and(|status| status.tracer_pid == own)
}

fn still_stopped(thread: &Thread) -> Result<()> {
    match thread.tracee.stopped()? {
        Some(_) => Ok(()),
        None => Err(Error::new(ErrorKind::TaskGone, "it has ended").of(thread.tid())),
    }
}

/// Waits until the thread has stopped for us. A signal on its way is left to be delivered afterwards.
fn settle(thread: &mut Thread, deadline: Instant) -> Result<()> {
    const BEFORE_ASKING_AGAIN: Duration = Duration::from_millis(5);
    let mut limit = BEFORE_ASKING_AGAIN;
    loop {
        let stop = match thread.tracee.wait(limit) {
            Err(error) if error.kind() == ErrorKind::Timeout && Instant::now() < deadline => {
                // It was stopped when it was seen, and has been continued since.
                thread.tracee.interrupt()?;
                limit = deadline.saturating_duration_since(Instant::now());
                continue;
            }
            stop => stop?,
        };
        match stop {
            Stop::Interrupted => return Ok(()),
            Stop::Group(signal) => {
                thread.job_stop = Some(signal);
                return Ok(());
            }
            Stop::Signal(signal) => redeliver(thread, signal)?,
            Stop::Syscall | Stop::Event(_) => thread.tracee.resume(sys::ptrace::Resume::Run)?,
        }
    }
}

/// It was about to take a signal when we asked it to stop: let it, and stop it right after.
fn redeliver(thread: &Thread, signal: i32) -> Result<()> {
    let delivered = sys::ptrace::deliver(thread.tid(), signal);
    delivered.map_err(|errno| Error::call("ptrace(CONT)", errno).of(thread.tid()))
}
