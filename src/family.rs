//! Restore: the tasks themselves, from the first blank one to the moment when all of them run.

use std::os::fd::{AsFd, OwnedFd};

use crate::Pid;
use crate::arch::{self, SYSCALL};
use crate::error::{Context, Error, ErrorKind, NameCall, Result};
use crate::resource::fds::Channel;
use crate::resource::memory::{AddressSpace, Backing, Workshop};
use crate::resource::tasks::tree::{Birth, Life, Plan, ProcessRecord, Tree};
use crate::sys::pidfd;
use crate::tracee::{Blank, CloneArgs, Memory, Puppet, Scratch, Seed, StubFile, Tracee, sys};

/// One process that is being restored.
pub(crate) struct Member {
    pub(crate) pid: Pid,
    /// The leader is first.
    pub(crate) threads: Vec<Tracee>,
    pub(crate) memory: Memory,
    /// It comes back in a job-control stop.
    pub(crate) stopped: bool,
    scratch: Scratch,
    /// It has already ended, as it had at the checkpoint.
    dead: bool,
}

impl Member {
    pub(crate) fn leader(&self) -> Result<&Tracee> {
        self.threads.first().ok_or_else(|| Error::new(ErrorKind::TaskGone, "it has no thread").of(self.pid))
    }

    /// Makes one of its threads execute batches.
    pub(crate) fn puppet(&self, thread: usize) -> Result<Puppet<'_>> {
        let thread = self
            .threads
            .get(thread)
            .ok_or_else(|| Error::new(ErrorKind::TaskGone, "no such thread").of(self.pid))?;
        Puppet::own(thread, self.pid, &self.memory, self.scratch)
    }

    /// Makes its other threads, with their numbers.
    pub(crate) fn make_threads(&mut self, tids: &[u32]) -> Result<()> {
        const AT_ONCE: usize = 512;
        const FLAGS: i32 = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        for some in tids.chunks(AT_ONCE) {
            let born = self.clone(some, FLAGS as u64, 0)?;
            self.threads.extend(born);
        }
        Ok(())
    }

    /// Remote clone3(2), one for each number. The new tasks are stopped before their first instruction.
    fn clone(&self, numbers: &[u32], flags: u64, exit_signal: u64) -> Result<Vec<Tracee>> {
        let mut puppet = self.puppet(0)?;
        let mut batch = puppet.batch();
        let mut calls = Vec::new();
        for number in numbers {
            let set_tid = batch.input(&number.to_ne_bytes());
            let args = CloneArgs { flags, exit_signal, set_tid, set_tid_size: 1, ..CloneArgs::default() };
            let words = args.words();
            let args = batch.input_words(&words);
            calls.push(batch.call(sys::clone3, &[args, size_of_val(&words) as u64]));
        }
        let mut born = Vec::new();
        let answers = puppet.run_forking(batch, |child| {
            let child = Tracee::attached(child);
            child.wait_step()?;
            born.push(child);
            Ok(())
        });
        let answers = answers?;
        for (call, number) in calls.into_iter().zip(numbers) {
            answers.get(call).map_err(|error| crate::tracee::explain_clone(error, Pid::from(*number)))?;
        }
        Ok(born)
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
    pidfd: Option<OwnedFd>,
    scratch: Scratch,
}

impl Family {
    /// Makes the process that will be the root: from the thread that is to be its parent.
    pub(crate) fn seed(workshop: Workshop, tree: &Tree, channel: &Channel) -> Result<Seed> {
        let (base, room) = workshop.stub();
        Seed::plant(&StubFile::new(base, room)?, tree.root()?.pid(), channel.gift())
    }

    /// The root, blank: from the thread that traces the whole family.
    /// `filtered`: some of its tasks have system call filters, which must not apply to what they do for us.
    pub(crate) fn found(workshop: Workshop, seed: Seed, filtered: bool) -> Result<Self> {
        let blank = seed.adopt()?;
        let suspended = if filtered { blank.suspend_seccomp() } else { Ok(()) };
        let Blank { tracee, pidfd } = blank;
        let (pid, scratch) = (tracee.tid(), workshop.scratch());
        let mut family = Self { members: Vec::new(), pidfd: Some(pidfd), scratch };
        let memory = Memory::open(pid)?;
        memory.write(workshop.code(), arch::code())?;
        family.members.push(Member {
            pid,
            threads: vec![tracee],
            memory,
            stopped: false,
            scratch,
            dead: false,
        });
        suspended.map(|()| family)
    }

    /// Lets the root work.
    pub(crate) fn with_root(&mut self, work: impl FnOnce(&mut Puppet<'_>) -> Result<()>) -> Result<()> {
        let root = self.members.first().ok_or_else(no_root)?;
        work(&mut root.puppet(0)?)
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| !member.dead)
    }

    pub(crate) fn members_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.members.iter_mut().filter(|member| !member.dead)
    }

    /// Makes all processes of the tree, each by its own parent, in their sessions and groups; the dead die.
    pub(crate) fn grow(&mut self, tree: &Tree, plan: &Plan, outer_group: Option<u32>) -> Result<()> {
        for record in tree.processes.iter().filter(|record| !record.threads().is_empty()) {
            let births = plan.births.get(&record.pid).map(Vec::as_slice).unwrap_or_default();
            self.bear(record, births, tree, true)?;
            if record.session == record.pid {
                self.call(record, sys::setsid, &[])?;
            }
            self.bear(record, births, tree, false)?;
        }
        if let (Some(group), Ok(root)) = (outer_group, tree.root()) {
            let own = nix::unistd::getpgrp().as_raw() as u32;
            if group != own {
                self.call(root, sys::setpgid, &[0, u64::from(group)])
                    .hint("the group that the tree was in is gone")?;
            }
        }
        // Groups exist once their leaders have made them.
        for leaders in [true, false] {
            let joins = |record: &&ProcessRecord| {
                let known = tree.processes.iter().any(|other| other.pid == record.group);
                known && record.session != record.pid && (record.group == record.pid) == leaders
            };
            for record in tree.processes.iter().filter(joins) {
                self.call(record, sys::setpgid, &[0, u64::from(record.group)])?;
            }
        }
        tree.processes.iter().try_for_each(|record| match record.life {
            Life::Zombie(status) => self.bury(record, status),
            Life::Threads(_) => Ok(()),
        })
    }

    fn member(&mut self, pid: u32) -> Result<&mut Member> {
        self.members.iter_mut().find(|member| member.pid.get() == pid).ok_or_else(no_root)
    }

    fn call(&mut self, record: &ProcessRecord, call: crate::tracee::Sys, args: &[u64]) -> Result<()> {
        let member = self.member(record.pid)?;
        let mut puppet = member.puppet(0)?;
        let mut batch = puppet.batch();
        batch.call(call, args);
        puppet.run(batch)?.check().of(record.pid())
    }

    fn bear(
        &mut self,
        parent: &ProcessRecord,
        births: &[Birth],
        tree: &Tree,
        before_setsid: bool,
    ) -> Result<()> {
        let scratch = self.scratch;
        for birth in births.iter().filter(|birth| birth.before_setsid == before_setsid) {
            let record = tree.processes.iter().find(|record| record.pid == birth.pid).ok_or_else(no_root)?;
            let born = self.member(parent.pid)?.clone(&[birth.pid], 0, u64::from(record.exit_signal))?;
            let pid = record.pid();
            let memory = Memory::open(pid)?;
            self.members.push(Member { pid, threads: born, memory, stopped: false, scratch, dead: false });
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

    /// Lets all of them run.
    pub(crate) fn release(mut self) -> Result<OwnedFd> {
        for member in self.members() {
            if member.stopped {
                nix::sys::signal::kill(member.pid.nix(), nix::sys::signal::Signal::SIGSTOP)
                    .call("kill")
                    .of(member.pid)?;
            }
        }
        for member in self.members() {
            member.threads.iter().try_for_each(Tracee::detach)?;
        }
        self.pidfd.take().ok_or_else(no_root)
    }
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
        self.members.iter().rev().for_each(|member| crate::sys::wait::reap(member.pid));
    }
}
