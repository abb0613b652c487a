//! Files and directories of a file system: position, access mode, status flags. And whatever is open by O_PATH, which is
//! no more than a place in the file system.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::path::TMPFILE;
use super::{Builder, Collector, Description, FileKind, FileRef, OPEN_FLAGS, Probe};
use crate::Pid;
use crate::error::{Context, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Regular {
    file: FileRef,
    position: i64,
    /// It is what /proc shows of a process of the tree.
    of_process: bool,
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
        let of_process = match whose(probe)? {
            None => false,
            Some(pid) if collector.is_of_tree(pid) => true,
            Some(_) => {
                return Ok(Err(probe
                    .refusal("what /proc shows of a thread or of a process outside the tree is not supported")
                    .hint("only files of /proc/PID, of processes of the tree, can be opened again")));
            }
        };
        let position = probe.fdinfo()?.pos;
        Ok(collector.file(probe)?.map(|file| Self { file, position, of_process }))
    }

    fn is_of_tasks(&self) -> bool {
        self.of_process
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        if let Some(path) = self.file.path()
            && let Some(supplied) = builder.inherited.take_for(path, common.flags())
        {
            return supplied;
        }
        let file = builder.finder.open(&self.file, common.flags() & OPEN_FLAGS.union(TMPFILE))?;
        if self.position != 0 && !common.flags().contains(OFlag::O_PATH) {
            lseek(&file, self.position, Whence::SeekSet).call("lseek").about(|| self.file.subject())?;
        }
        Ok(file)
    }
}

/// The process that a file of /proc tells of. Of a thread's files it is a process that does not exist.
fn whose(probe: &Probe) -> Result<Option<Pid>> {
    if fstatfs(&probe.file).call("fstatfs")?.filesystem_type() != PROC_SUPER_MAGIC {
        return Ok(None);
    }
    Ok(owner_of(&probe.name))
}

fn owner_of(name: &[u8]) -> Option<Pid> {
    const NOBODY: u32 = u32::MAX;
    let mut parts = name.split(|byte| *byte == b'/').skip_while(|part| part.is_empty());
    // Where another /proc is mounted, any number may be a process.
    let (mount, first) = (parts.next()?, parts.next());
    let number = |part: &[u8]| std::str::from_utf8(part).ok()?.parse::<u32>().ok();
    if mount != b"proc" {
        return Some(Pid::from(NOBODY));
    }
    let pid = number(first?)?;
    let of_thread = parts.next() == Some(b"task") && parts.next().is_some();
    Some(Pid::from(if of_thread { NOBODY } else { pid }))
}
