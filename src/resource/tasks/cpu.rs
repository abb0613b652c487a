//! The processor that a tree ran on. Programs choose their code by its features once and for all, and the
//! extended state is laid out by it.

use crate::arch::Cpu;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};

/// How the processor of a restore may differ from that of the checkpoint.
///
/// ```
/// use cryosleep::{CpuCheck, Restore};
/// # fn restore() -> cryosleep::Result<()> {
/// Restore::from("/var/lib/images/job").cpu_check(CpuCheck::Exact).run()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuCheck {
    /// It must have every feature (cpuid) that the other had, and lay out extended state alike: the default.
    #[default]
    Compatible,
    /// It must be of the same model with the same features.
    Exact,
    /// It may be any: the caller knows that the programs use nothing that is missing.
    Ignore,
}

/// What cpuid said at the checkpoint.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Processor {
    identity: Vec<u32>,
    features: Vec<u32>,
    components: Vec<[u32; 3]>,
}

impl Record for Processor {
    const TAG: Tag = Tag::new(b"PCPU");
    const VERSION: u16 = 1;
    const NAME: &'static str = "processor";
}

impl Processor {
    pub(crate) fn here() -> Self {
        let Cpu { identity, features, components } = Cpu::here().clone();
        Self { identity, features, components }
    }

    /// Refuses a processor that may not stand in for this one.
    pub(crate) fn check(self, policy: CpuCheck) -> Result<()> {
        let Self { identity, features, components } = self;
        let (there, here) = (Cpu { identity, features, components }, Cpu::here());
        let fits = match policy {
            CpuCheck::Ignore => true,
            CpuCheck::Exact => *here == there,
            CpuCheck::Compatible => here.can_stand_in_for(&there),
        };
        if fits {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Conflict, "it lacks features that the processor of the checkpoint had")
            .about(Subject::Attribute("processor"))
            .with_hint("restore on a processor of the same kind, or say CpuCheck::Ignore"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_processor_is_refused() {
        let another = || {
            let mut processor = Processor::here();
            processor.identity[3] ^= 1;
            processor
        };
        assert!(another().check(CpuCheck::Compatible).is_ok());
        assert_eq!(another().check(CpuCheck::Exact).unwrap_err().kind(), ErrorKind::Conflict);
        let mut better = Processor::here();
        better.features[1] = u32::MAX;
        assert_eq!(better.check(CpuCheck::Compatible).unwrap_err().kind(), ErrorKind::Conflict);
    }
}
