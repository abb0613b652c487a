//! The way by which descriptors of ours get into a task that is being restored: a socket pair, one end of
//! which every blank task inherits.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use crate::error::{NameCall, Result};
use crate::tracee::{Batch, Gift, sys};

/// Our end, the tasks' end, and the number that it has in the tasks.
pub(crate) struct Channel {
    ours: OwnedFd,
    theirs: OwnedFd,
    number: RawFd,
}

impl Channel {
    pub(crate) fn new(number: RawFd) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).call("socketpair")?;
        Ok(Self { ours, theirs, number })
    }

    pub(crate) fn number(&self) -> RawFd {
        self.number
    }

    pub(crate) fn gift(&self) -> Gift<'_> {
        Gift { fd: self.theirs.as_fd(), number: self.number }
    }

    /// Sends descriptors and queues the call that receives them. Gives the numbers that they will have, in
    /// the order of `fds`: the lowest that are not in `taken`, as the kernel always chooses.
    pub(crate) fn send(
        &self,
        fds: &[BorrowedFd<'_>],
        taken: &[RawFd],
        batch: &mut Batch,
    ) -> Result<Vec<RawFd>> {
        if fds.is_empty() {
            return Ok(Vec::new());
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let message = [IoSlice::new(b"f")];
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(self.ours.as_raw_fd(), &message, &rights, MsgFlags::empty(), None).call("sendmsg")?;

        let byte = batch.output(16);
        let vector = batch.input_words(&[byte.addr, 1]);
        let control_len = 16 + (raw.len() * 4).next_multiple_of(8);
        let control = batch.output(control_len);
        // struct msghdr: name, name length, vector, its length, control, its length, flags
        let header = batch.input_words(&[0, 0, vector, 1, control.addr, control_len as u64, 0]);
        batch.call(sys::recvmsg, &[self.number as u64, header, 0]);
        let taken: std::collections::BTreeSet<RawFd> = taken.iter().copied().collect();
        Ok((0..).filter(|number| !taken.contains(number)).take(raw.len()).collect())
    }
}
