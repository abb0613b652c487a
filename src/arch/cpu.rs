//! What a processor can do, as programs find out: by cpuid.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// The feature words of cpuid, and the sizes and offsets of the extended state's components.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cpu {
    /// Vendor, family, model and stepping.
    pub(crate) identity: Vec<u32>,
    /// One bit for each feature.
    pub(crate) features: Vec<u32>,
    /// Bit number, size and offset of each component that the kernel has enabled.
    pub(crate) components: Vec<[u32; 3]>,
}

/// Bits of leaf 1 that depend on the moment or the place, not on the processor: OSXSAVE, hypervisor.
const VOLATILE_1_ECX: u32 = 1 << 27 | 1 << 31;

impl Cpu {
    /// The processor that this runs on. Not state but a constant of the machine, kept because a virtual machine takes
    /// microseconds for each question, and every signal frame needs the answers.
    pub(crate) fn here() -> &'static Self {
        static HERE: OnceLock<Cpu> = OnceLock::new();
        HERE.get_or_init(Self::ask)
    }

    fn ask() -> Self {
        let (vendor, basic) = (__cpuid(0), __cpuid(1));
        let (seven, seven_one) = (__cpuid_count(7, 0), __cpuid_count(7, 1));
        let (xsave, xsave_more, extended) =
            (__cpuid_count(0xd, 0), __cpuid_count(0xd, 1), __cpuid(0x8000_0001));
        let enabled = u64::from(xsave.eax) | u64::from(xsave.edx) << 32;
        let component = |bit: u32| {
            let leaf = __cpuid_count(0xd, bit);
            [bit, leaf.eax, leaf.ebx]
        };
        Self {
            identity: vec![vendor.ebx, vendor.edx, vendor.ecx, basic.eax],
            features: vec![
                basic.ecx & !VOLATILE_1_ECX,
                basic.edx,
                seven.ebx,
                seven.ecx,
                seven.edx,
                seven_one.eax,
                xsave_more.eax,
                extended.ecx,
                extended.edx,
            ],
            components: (2..63).filter(|bit| enabled >> bit & 1 == 1).map(component).collect(),
        }
    }

    /// Can a program that has found out about `other` run on this one?
    pub(crate) fn can_stand_in_for(&self, other: &Self) -> bool {
        let features = self.features.len() == other.features.len()
            && self.features.iter().zip(&other.features).all(|(here, there)| there & !here == 0);
        features && other.components.iter().all(|component| self.components.contains(component))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_with_more_stands_in_for_one_with_less() {
        let here = Cpu::here();
        let mut less = here.clone();
        less.features[0] &= less.features[0] - 1;
        less.components.pop();
        assert!(here.can_stand_in_for(here) && here.can_stand_in_for(&less));
        assert!(!less.can_stand_in_for(here));
    }
}
