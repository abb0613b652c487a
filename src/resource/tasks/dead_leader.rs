//! A thread-group leader that has ended while other threads live on: the kernel keeps it as a zombie.

use crate::error::Result;
use crate::freeze::Process;
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::{read, stat};

/// What is left of it.
#[derive(Encode, Decode, Debug, Clone)]
pub(crate) struct DeadLeader {
    /// Its wait status. Before Linux 5.17 it becomes that of the process, if nobody calls exit_group(2).
    status: i32,
    /// What it is called (comm).
    pub(crate) name: Vec<u8>,
}

impl Record for DeadLeader {
    const TAG: Tag = Tag::new(b"LEAD");
    const VERSION: u16 = 1;
    const NAME: &'static str = "dead thread-group leader";
}

impl DeadLeader {
    pub(crate) fn describe(process: &Process) -> Result<Option<Self>> {
        if !process.leader_is_dead() {
            return Ok(None);
        }
        let stat = read::parsed(process.pid, "stat", stat::parse)?;
        Ok(Some(Self { status: stat.exit_code, name: stat.comm }))
    }

    /// What it has passed to exit(2).
    pub(crate) fn code(&self) -> u64 {
        (self.status >> 8 & 0xff) as u64
    }
}
