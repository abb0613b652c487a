//! Where a process stands in the file system: working directory, root directory, umask.

use nix::sys::stat::stat;

use super::FileRef;
use crate::error::{NameCall, Refusal, Result, Subject};
use crate::freeze::Process;
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::read;
use crate::resource::Report;

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
    pub(crate) fn describe(process: &Process, report: &mut Report) -> Result<Option<Self>> {
        let mut place = |name: &'static str| -> Result<Option<FileRef>> {
            let way = format!("/proc/{}/{name}", process.speaker());
            let stat = stat(way.as_str()).call("stat")?;
            let path = read::link(process.speaker(), name)?;
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
        Ok(Some(Self { cwd, root, umask: process.status.umask.unwrap_or(0o022) }))
    }
}
