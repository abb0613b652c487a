//! The character devices that have no state of their own: null, zero, full, random, urandom; and kmsg for writing,
//! since only readers have a place in it.

use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::sys::stat::{SFlag, major, minor};

use super::{Builder, Collector, Description, FileKind, FileRef, OPEN_FLAGS, Probe};
use crate::error::{Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};

#[derive(Encode, Decode, Debug)]
pub(crate) struct Device(FileRef);

impl Record for Device {
    const TAG: Tag = Tag::new(b"FDEV");
    const VERSION: u16 = 1;
    const NAME: &'static str = "stateless character device";
}

/// Documentation/admin-guide/devices.txt: null, zero, full, random and urandom of major 1.
const STATELESS: [u64; 5] = [3, 5, 7, 8, 9];
const KMSG: u64 = 11;

impl FileKind for Device {
    fn recognise(probe: &Probe) -> bool {
        let device = probe.stat.st_rdev;
        let writes = probe.flags & OFlag::O_ACCMODE == OFlag::O_WRONLY;
        let stateless = STATELESS.contains(&minor(device)) || (minor(device) == KMSG && writes);
        probe.kind() == SFlag::S_IFCHR && major(device) == 1 && stateless
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        Ok(collector.file(probe)?.map(Self))
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        builder.finder.open(&self.0, common.flags() & OPEN_FLAGS)
    }
}
