//! Where a process stands in the file system: working directory, root directory, umask.

use std::os::fd::RawFd;

use nix::fcntl::OFlag;
use nix::sys::stat::stat;

use super::FileRef;
use crate::Pid;
use crate::error::{NameCall, Refusal, Result, Subject};
use crate::freeze::Process;
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::{read, status};
use crate::resource::Report;
use crate::tracee::{Batch, sys};

const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY);

#[derive(Encode, Decode, Debug)]
pub(crate) struct Places {
    pub(crate) cwd: FileRef,
    /// Unless it is that of the calling process.
    pub(crate) root: Option<FileRef>,
    pub(crate) umask: u32,
}

impl Record for Places {
    const TAG: Tag = Tag::new(b"FSPL");
    const VERSION: u16 = 1;
    const NAME: &'static str = "working directory, root and umask";
}

impl Places {
    /// Describes those that a thread of this process has.
    pub(crate) fn describe(process: &Process, tid: Pid, report: &mut Report) -> Result<Option<Self>> {
        let mut place = |name: &'static str| -> Result<Option<FileRef>> {
            let way = format!("/proc/{tid}/{name}");
            let stat = stat(way.as_str()).call("stat")?;
            let path = read::link(tid, name)?;
            match FileRef::named(&path, &stat) {
                Ok(file) => Ok(Some(file)),
                Err(reason) => {
                    report.refuse(Refusal::new(process.pid, Subject::Path(way.into()), reason));
                    Ok(None)
                }
            }
        };
        let (Some(cwd), Some(root)) = (place("cwd")?, place("root")?) else { return Ok(None) };
        let root = (!root.is_root()).then_some(root);
        let umask = match tid == process.speaker() {
            true => process.status.umask,
            false => read::parsed(tid, "status", status::parse)?.umask,
        };
        Ok(Some(Self { cwd, root, umask: umask.unwrap_or(0o022) }))
    }

    /// The directories that have to be opened for them.
    pub(crate) fn needs(&self) -> Vec<(&FileRef, OFlag)> {
        std::iter::once(&self.cwd).chain(&self.root).map(|place| (place, DIRECTORY)).collect()
    }

    /// Queues the calls that go there, by descriptors of the task.
    pub(crate) fn build(
        &self,
        at: impl Fn(&FileRef, OFlag) -> Result<RawFd>,
        batch: &mut Batch,
    ) -> Result<()> {
        if let Some(root) = &self.root {
            batch.about(root.subject());
            batch.call(sys::fchdir, &[at(root, DIRECTORY)? as u64]);
            let dot = batch.input(b".\0");
            batch.call(sys::chroot, &[dot]);
        }
        batch.about(self.cwd.subject());
        batch.call(sys::fchdir, &[at(&self.cwd, DIRECTORY)? as u64]);
        batch.call(sys::umask, &[u64::from(self.umask)]);
        Ok(())
    }
}
