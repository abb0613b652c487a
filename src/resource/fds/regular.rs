//! Regular files and directories with a name: path, position, access mode, status flags.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::{Builder, Collector, Description, FileKind, FileRef, OPEN_FLAGS, Probe};
use crate::error::{Context, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Regular {
    file: FileRef,
    position: i64,
}

impl Record for Regular {
    const TAG: Tag = Tag::new(b"FREG");
    const VERSION: u16 = 1;
    const NAME: &'static str = "regular file or directory";
}

impl FileKind for Regular {
    fn recognise(probe: &Probe) -> bool {
        matches!(probe.kind(), SFlag::S_IFREG | SFlag::S_IFDIR) && !probe.name.starts_with(b"anon_inode:")
    }

    fn describe(probe: &Probe, _: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        if fstatfs(&probe.file).call("fstatfs")?.filesystem_type() == PROC_SUPER_MAGIC {
            return Ok(Err(probe.refusal("open files of /proc are not supported yet")));
        }
        let info = probe.fdinfo()?;
        if !info.locks.is_empty() {
            return Ok(Err(probe.refusal("file locks and leases are not supported yet")));
        }
        let file = match FileRef::describe(&probe.name, &probe.stat) {
            Ok(file) => file,
            Err(reason) => return Ok(Err(probe.refusal(reason))),
        };
        Ok(Ok(Self { file, position: info.pos }))
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        let file = self.file.open(common.flags() & OPEN_FLAGS, builder.validation)?;
        if self.position != 0 && !common.flags().contains(OFlag::O_PATH) {
            lseek(&file, self.position, Whence::SeekSet).call("lseek").about(|| self.file.subject())?;
        }
        Ok(file)
    }
}
