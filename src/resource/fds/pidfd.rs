//! References to processes and threads: pidfd_open(2). To tasks of the tree, dead or alive, and to such as are gone:
//! for each of those a child of ours is born and ends the same way.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;

use super::{Builder, Collector, Description, FileKind, Probe};
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Owner, Record, Tag};
use crate::proc::nameless;
use crate::sys::pidfd;
use crate::tracee::Dummy;

#[derive(Encode, Decode, Debug)]
pub(crate) struct PidFd {
    of: Target,
}

#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A task of the tree.
    Task(u32),
    /// One that has been waited for: which of those, and its wait status where the kernel still knows that.
    Gone { which: u64, status: Option<i32> },
}

impl Record for PidFd {
    const TAG: Tag = Tag::new(b"FPID");
    const VERSION: u16 = 1;
    const NAME: &'static str = "pidfd";
}

impl FileKind for PidFd {
    fn recognise(probe: &Probe) -> bool {
        probe.name == b"anon_inode:[pidfd]"
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let of = match probe.tells(nameless::process)? {
            -1 => {
                let status = pidfd::exit_status(probe.file.as_fd()).ok().flatten();
                if let Some(signal) = status.and_then(cannot_be_caused) {
                    let reason = format!("the process that it refers to was ended by signal {signal}");
                    return Ok(Err(probe.refusal(reason)));
                }
                Target::Gone { which: probe.stat.st_ino, status }
            }
            0 => return Ok(Err(probe.refusal("it refers to a process that cannot be seen from here"))),
            number => match u32::try_from(number).ok().and_then(|number| collector.task(Pid::from(number))) {
                Some(number) => Target::Task(number),
                None => {
                    let reason = format!("it refers to process {number}, which is not part of the tree");
                    return Ok(Err(probe.refusal(reason)));
                }
            },
        };
        Ok(Ok(Self { of }))
    }

    fn is_of_tasks(&self) -> bool {
        true
    }

    fn check(&self, builder: &Builder<'_>) -> Result<()> {
        let right = match self.of {
            Target::Task(number) => builder.tasks.contains(&Pid::from(number)),
            Target::Gone { status, .. } => status.and_then(cannot_be_caused).is_none(),
        };
        match right {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Image, "a pidfd of a process that cannot be")),
        }
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        match self.of {
            Target::Task(number) => {
                let missing = || Error::new(ErrorKind::Image, "a pidfd of a process that cannot be");
                open(builder.pids.get(&number).copied().ok_or_else(missing)?, common)
            }
            Target::Gone { which, status } => {
                // No other way leads to a process that is gone: all its pidfds are made at once.
                if !builder.gone.contains_key(&builder.current) {
                    let made = pidfds_of_gone(builder, which, status)?;
                    builder.gone.extend(made);
                }
                let missing = || Error::new(ErrorKind::Image, "a pidfd without its description");
                builder.gone.remove(&builder.current).ok_or_else(missing)
            }
        }
    }
}

fn open(pid: Pid, common: &Description) -> Result<OwnedFd> {
    let of_thread = common.flags().contains(OFlag::O_EXCL); // PIDFD_THREAD
    pidfd::open_thread(pid, of_thread).call("pidfd_open")
}

fn pidfds_of_gone(builder: &Builder<'_>, which: u64, status: Option<i32>) -> Result<Vec<(u32, OwnedFd)>> {
    // It waits for us as a zombie, to which pidfd_open(2) still leads.
    let mut child = Dummy::dead(status.unwrap_or(0)).call("clone3")?;
    let mut made = Vec::new();
    let owners: Vec<Owner> = builder.image.owners::<PidFd>().collect();
    for owner in owners {
        if let Target::Gone { which: other, .. } = builder.image.require::<PidFd>(owner)?.of
            && other == which
        {
            let common: Description = builder.image.require(owner)?;
            made.push((owner.0, open(child.pid(), &common)?));
        }
    }
    child.end();
    Ok(made)
}

/// The signal of a wait status that no child of ours can be given: it shares our memory, of which there must not be
/// a core dump.
fn cannot_be_caused(status: i32) -> Option<i32> {
    const DEADLY: [i32; 13] = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGKILL,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGPIPE,
        libc::SIGALRM,
        libc::SIGTERM,
        libc::SIGSTKFLT,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGIO,
        libc::SIGPWR,
    ];
    let exited = status & !0xff00 == 0;
    let signal = status & 0x7f;
    let killed = status == signal && (DEADLY.contains(&signal) || (32..=64).contains(&signal));
    (!exited && !killed).then_some(signal)
}
