//! Attributes of a process that are files of `/proc/PID`: coredump_filter, oom_score_adj and autogroup; see proc(5).

use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::getsid;

use crate::Pid;
use crate::error::{Context, NameCall, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::proc::read;
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch};

/// Their order is part of the image format: append only.
const FILES: [&str; 3] = ["coredump_filter", "oom_score_adj", "autogroup"];

/// What each says; none where the kernel has no such file.
#[derive(Encode, Decode, Debug)]
pub(crate) struct ProcFiles(Vec<Option<Bytes>>);

impl Record for ProcFiles {
    const TAG: Tag = Tag::new(b"PROC");
    const VERSION: u16 = 1;
    const NAME: &'static str = "attributes in /proc";
}

fn contents(pid: Pid, name: &str) -> Result<Option<Bytes>> {
    let text = match read::bytes(pid, name) {
        Err(error) if error.raw_errno() == Some(Errno::ENOENT) => return Ok(None),
        text => text?,
    };
    let text = text.trim_ascii();
    // "/autogroup-25 nice 0": the number is the kernel's, the nice value is the user's.
    let wanted = match name {
        "autogroup" if text.is_empty() => return Ok(None), // its session has none of its own
        "autogroup" => text.rsplit(|byte| *byte == b' ').next().unwrap_or_default().to_vec(),
        // Read as hexadecimal without saying so, written as any C number.
        "coredump_filter" => [b"0x", text].concat(),
        _ => text.to_vec(),
    };
    Ok(Some(wanted.into()))
}

fn is_in_our_session(pid: Pid) -> Result<bool> {
    Ok(getsid(Some(pid.nix())).call("getsid")? == getsid(None).call("getsid")?)
}

impl State for ProcFiles {
    const SCOPE: Scope = Scope::Process;
    const STAGE: Stage = Stage::Identity;
    type Asked = ();

    fn ask(_: View<'_>, _: &mut Batch) -> Result<()> {
        Ok(())
    }

    fn describe((): (), _: &Answers, view: View<'_>, _: &mut Report) -> Result<Option<Self>> {
        let speaker = view.process.speaker();
        Ok(Some(Self(FILES.iter().map(|name| contents(speaker, name)).collect::<Result<_>>()?)))
    }

    fn settle(&self, task: Rebuilt<'_>) -> Result<()> {
        for (name, wanted) in FILES.iter().zip(&self.0) {
            let Some(wanted) = wanted else { continue };
            if *name == "autogroup" && is_in_our_session(task.pid)? {
                continue; // it is a session's, and that one's is not for the image to say
            }
            if contents(task.pid, name)?.as_ref() != Some(wanted) {
                let path = PathBuf::from(format!("/proc/{}/{name}", task.pid));
                std::fs::write(&path, &**wanted).call("write").about(|| Subject::Path(path))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_not_there_is_missing() {
        let own = Pid::from(std::process::id());
        assert!(contents(own, "coredump_filter").unwrap().unwrap().starts_with(b"0x"));
        assert!(contents(own, "no_such_file").unwrap().is_none());
        assert_eq!(contents(own, "mem").unwrap_err().raw_errno(), Some(Errno::EIO));
    }
}
