//! Signals to be read: signalfd(2). It holds a mask and nothing else: whose signals it reads is up to the reader.

use std::os::fd::OwnedFd;

use super::{Builder, Collector, Description, FileKind, Polled, Probe};
use crate::error::{NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::nameless;
use crate::sys::file;

#[derive(Encode, Decode, Debug)]
pub(crate) struct SignalFd {
    mask: u64,
}

impl Record for SignalFd {
    const TAG: Tag = Tag::new(b"FSIG");
    const VERSION: u16 = 1;
    const NAME: &'static str = "signalfd";
}

impl FileKind for SignalFd {
    const POLLED: Polled = Polled::PerCaller;

    fn recognise(probe: &Probe) -> bool {
        probe.name == b"anon_inode:[signalfd]"
    }

    fn describe(probe: &Probe, _: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        Ok(Ok(Self { mask: probe.tells(nameless::signals)? }))
    }

    fn build(&self, _: &Description, _: &mut Builder<'_>) -> Result<OwnedFd> {
        file::signalfd(self.mask).call("signalfd4")
    }
}
