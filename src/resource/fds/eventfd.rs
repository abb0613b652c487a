//! Event counters: eventfd(2).

use std::os::fd::OwnedFd;

use nix::sys::eventfd::{EfdFlags, EventFd as New};

use super::{Builder, Collector, Description, FileKind, Probe};
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::nameless;

#[derive(Encode, Decode, Debug)]
pub(crate) struct EventFd {
    count: u64,
    semaphore: bool,
}

impl Record for EventFd {
    const TAG: Tag = Tag::new(b"FEVT");
    const VERSION: u16 = 1;
    const NAME: &'static str = "eventfd";
}

impl FileKind for EventFd {
    fn recognise(probe: &Probe) -> bool {
        probe.name == b"anon_inode:[eventfd]"
    }

    fn describe(probe: &Probe, _: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let nameless::Event { count, semaphore } = probe.tells(nameless::event)?;
        if count == u64::MAX {
            return Ok(Err(probe.refusal("its counter has overflown, which write(2) cannot bring about")));
        }
        Ok(Ok(Self { count, semaphore }))
    }

    fn check(&self, _: &Builder<'_>) -> Result<()> {
        match self.count {
            u64::MAX => Err(Error::new(ErrorKind::Image, "an eventfd that has overflown")),
            _ => Ok(()),
        }
    }

    fn build(&self, _: &Description, _: &mut Builder<'_>) -> Result<OwnedFd> {
        let semaphore = if self.semaphore { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
        let event = New::from_flags(EfdFlags::EFD_CLOEXEC | semaphore).call("eventfd")?;
        // The initial value that the call takes has 32 bits only.
        event.write(self.count).call("write")?;
        Ok(event.into())
    }
}
