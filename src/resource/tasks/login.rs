//! The user who has logged in: `/proc/PID/loginuid`, see pam_loginuid(8) and proc(5). Only the task itself may write
//! it; what it bears after that inherits it. To change one that is set takes CAP_AUDIT_CONTROL. Which session of the
//! audit that is (`/proc/PID/sessionid`) nobody can choose: the kernel counts them.

use std::os::fd::AsFd;
use std::path::PathBuf;

use crate::Pid;
use crate::error::{Context, NameCall, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::proc::read;
use crate::resource::fds::Channel;
use crate::tracee::{Puppet, sys};

/// What the file says.
#[derive(Encode, Decode, Debug, PartialEq, Eq)]
pub(crate) struct LoginUser(Bytes);

impl Record for LoginUser {
    const TAG: Tag = Tag::new(b"LUID");
    const VERSION: u16 = 1;
    const NAME: &'static str = "login user";
}

impl LoginUser {
    /// None where the kernel has no such file.
    pub(crate) fn of(pid: Pid) -> Option<Self> {
        Some(Self(read::bytes(pid, "loginuid").ok()?.trim_ascii().to_vec().into()))
    }

    /// Makes the leader write it, through a descriptor of ours, before there are other threads.
    pub(crate) fn build(&self, pid: Pid, channel: &Channel, puppet: &mut Puppet<'_>) -> Result<()> {
        if Self::of(pid).as_ref() == Some(self) {
            return Ok(());
        }
        let path = PathBuf::from(format!("/proc/{pid}/loginuid"));
        let file = std::fs::OpenOptions::new().write(true).open(&path).call("open");
        let file = file.about(|| Subject::Path(path.clone()))?;
        let mut batch = puppet.batch();
        let received = channel.send(&[file.as_fd()], &[channel.number()], &mut batch)?;
        let text = batch.input(&self.0);
        batch.about(Subject::Path(path));
        for number in received {
            batch.call(sys::pwrite64, &[number as u64, text, self.0.len() as u64, 0]);
            batch.call(sys::close, &[number as u64]);
        }
        puppet.run(batch)?.check().hint("to change a login user that is set takes CAP_AUDIT_CONTROL")
    }
}
