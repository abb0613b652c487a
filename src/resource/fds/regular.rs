//! Files and directories of a file system: position, access mode, status flags. And whatever is open by O_PATH,
//! which is no more than a place in the file system.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::path::TMPFILE;
use super::{Builder, Collector, Description, FileKind, FileRef, OPEN_FLAGS, Probe};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Regular {
    file: FileRef,
    position: i64,
    /// It is what /proc shows of a task of the tree.
    of_task: bool,
}

impl Record for Regular {
    const TAG: Tag = Tag::new(b"FREG");
    const VERSION: u16 = 1;
    const NAME: &'static str = "regular file, directory or O_PATH descriptor";
}

impl FileKind for Regular {
    fn recognise(probe: &Probe) -> bool {
        let kind = matches!(probe.kind(), SFlag::S_IFREG | SFlag::S_IFDIR);
        (kind || probe.flags.contains(OFlag::O_PATH)) && !probe.name.starts_with(b"anon_inode:")
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let tasks = shown_tasks(probe)?;
        // In a /proc that is not the tree's own it would not be found again by its number.
        if !tasks.iter().all(|task| collector.task(*task) == Some(task.get())) {
            return Ok(Err(probe.refusal("what /proc shows of a task that is not part of the tree")));
        }
        if may_be_trigger(probe)? {
            let reason = "it may be told of pressure on resources (PSI): nothing shows what it waits for";
            return Ok(Err(probe.refusal(reason)));
        }
        let of_task = !tasks.is_empty();
        let position = probe.info.pos;
        Ok(collector.file(probe)?.map(|file| Self { file, position, of_task }))
    }

    fn path(&self) -> Option<PathBuf> {
        self.file.path()
    }

    fn is_of_tasks(&self) -> bool {
        self.of_task
    }

    fn check(&self, builder: &Builder<'_>) -> Result<()> {
        if !self.of_task || !builder.renumbered {
            return Ok(());
        }
        let reason =
            "it is one of the files of /proc that are found by the numbers that tasks had for everybody";
        let error = Error::new(ErrorKind::Conflict, reason).about(self.file.subject());
        Err(error.with_hint("restore it with Pids::Original"))
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        let file = builder.finder.open(&self.file, common.flags() & OPEN_FLAGS.union(TMPFILE))?;
        if self.position != 0 && !common.flags().contains(OFlag::O_PATH) {
            lseek(&file, self.position, Whence::SeekSet).call("lseek").about(|| self.file.subject())?;
        }
        Ok(file)
    }
}

/// Could something have been written to it that makes poll(2) tell of pressure (accounting/psi.rst)?
fn may_be_trigger(probe: &Probe) -> Result<bool> {
    let writable = !probe.flags.contains(OFlag::O_PATH) && probe.flags & OFlag::O_ACCMODE != OFlag::O_RDONLY;
    if !writable || !is_named_pressure(&probe.name) {
        return Ok(false);
    }
    let of = fstatfs(&probe.file).call("fstatfs")?.filesystem_type();
    Ok(of == PROC_SUPER_MAGIC || of == CGROUP2_SUPER_MAGIC)
}

/// `/proc/pressure/...`, or `....pressure` of a control group, wherever these are mounted.
fn is_named_pressure(name: &[u8]) -> bool {
    let mut parts = name.rsplit(|byte| *byte == b'/');
    let (last, directory) = (parts.next().unwrap_or_default(), parts.next());
    last.ends_with(b".pressure") || directory == Some(b"pressure")
}

/// The process (and the thread) that a file of /proc tells of.
fn shown_tasks(probe: &Probe) -> Result<Vec<Pid>> {
    if fstatfs(&probe.file).call("fstatfs")?.filesystem_type() != PROC_SUPER_MAGIC {
        return Ok(Vec::new());
    }
    Ok(named_tasks(&probe.name))
}

fn named_tasks(name: &[u8]) -> Vec<Pid> {
    let number = |part: &&[u8]| Some(Pid::from(std::str::from_utf8(part).ok()?.parse::<u32>().ok()?));
    let parts: Vec<&[u8]> = name.split(|byte| *byte == b'/').collect();
    match parts.as_slice() {
        [b"", b"proc", pid, b"task", tid, ..] => [pid, tid].into_iter().filter_map(number).collect(),
        [b"", b"proc", pid, ..] => number(pid).into_iter().collect(),
        [b"", b"proc"] => Vec::new(),
        // Where another /proc is mounted, any number may be a task.
        _ => vec![Pid::from(u32::MAX)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pressure() {
        for name in ["/proc/pressure/io", "/host/proc/pressure/cpu", "/sys/fs/cgroup/a/memory.pressure"] {
            assert!(is_named_pressure(name.as_bytes()), "{name}");
        }
        for name in ["/proc/self/io", "/proc/pressure", "/sys/fs/cgroup/pressure.d/cgroup.procs", "pressure"]
        {
            assert!(!is_named_pressure(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn tasks_in_names() {
        let tasks = |name: &str| named_tasks(name.as_bytes()).iter().map(|pid| pid.get()).collect::<Vec<_>>();
        assert_eq!(tasks("/proc/12/stat"), [12]);
        assert_eq!(tasks("/proc/12"), [12]);
        assert_eq!(tasks("/proc/12/task"), [12]);
        assert_eq!(tasks("/proc/12/task/13/stat"), [12, 13]);
        assert_eq!(tasks("/proc/sys/kernel/12"), []);
        assert_eq!(tasks("/proc"), []);
        assert_eq!(tasks("/host/proc/12/stat"), [u32::MAX]);
    }
}
