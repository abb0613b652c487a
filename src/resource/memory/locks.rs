//! Locked memory: mlock2(2) of what there is, mlockall(2) of what is to come.

use nix::errno::Errno;

use super::{Traits, Vma, mappings};
use crate::Pid;
use crate::error::{Context, Result};
use crate::image::{Decode, Encode};
use crate::proc::smaps::VmFlags;
use crate::sys::PAGE;
use crate::tracee::{Answers, Batch, Call, Puppet, sys};

/// How mappings to come are locked: mlockall(MCL_FUTURE), MCL_ONFAULT.
#[derive(Encode, Decode, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum FutureLocks {
    #[default]
    None,
    AtOnce,
    OnFault,
}

/// msync(MS_INVALIDATE) of locked memory is refused; otherwise it does nothing to memory without a file.
fn ask_whether_locked(address: u64, batch: &mut Batch) -> Call {
    batch.call(sys::msync, &[address, PAGE, libc::MS_INVALIDATE as u64])
}

fn is_locked(call: Call, answers: &Answers) -> bool {
    answers.get(call).is_err_and(|error| error.raw_errno() == Some(Errno::EBUSY))
}

/// The scratch memory is a new mapping: it has what new mappings get.
pub(super) fn ask(batch: &mut Batch) -> (u64, Call) {
    let newest = batch.scratch_base();
    (newest, ask_whether_locked(newest, batch))
}

impl FutureLocks {
    pub(super) fn describe((newest, call): (u64, Call), answers: &Answers, pid: Pid) -> Result<Self> {
        if !is_locked(call, answers) {
            return Ok(Self::None);
        }
        let mappings = mappings(pid)?;
        let on_fault = mappings.iter().any(|mapping| {
            (mapping.start..mapping.end).contains(&newest) && mapping.flags.contains(VmFlags::LOCK_ON_FAULT)
        });
        Ok(if on_fault { Self::OnFault } else { Self::AtOnce })
    }

    /// When nothing is going to be mapped any more.
    pub(super) fn build(self, batch: &mut Batch) {
        let flags = match self {
            Self::None => return,
            Self::AtOnce => libc::MCL_FUTURE,
            Self::OnFault => libc::MCL_FUTURE | libc::MCL_ONFAULT,
        };
        batch.call(sys::mlockall, &[flags as u64]);
    }
}

/// Locks what was locked, when its pages are there.
pub(super) fn build(vmas: &[Vma], puppet: &mut Puppet<'_>) -> Result<()> {
    let locked: Vec<&Vma> = vmas.iter().filter(|vma| vma.has(Traits::LOCKED)).collect();
    for some in locked.chunks(512) {
        let mut batch = puppet.batch();
        let calls: Vec<_> = some
            .iter()
            .map(|vma| {
                batch.about(vma.subject());
                let flags = if vma.has(Traits::LOCK_ON_FAULT) { u64::from(libc::MLOCK_ONFAULT) } else { 0 };
                let locking = batch.call(sys::mlock2, &[vma.start, vma.len(), flags]);
                (locking, ask_whether_locked(vma.start, &mut batch))
            })
            .collect();
        let answers = puppet.run(batch)?;
        for (locking, asked) in calls {
            // It fails after it has locked what cannot be touched: PROT_NONE, guard regions, beyond the end of a file.
            if !is_locked(asked, &answers) {
                answers
                    .get(locking)
                    .hint("locking memory is limited by RLIMIT_MEMLOCK, unless with CAP_IPC_LOCK")?;
            }
        }
    }
    Ok(())
}
