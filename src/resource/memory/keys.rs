//! Protection keys, pkeys(7): which are allocated, which mappings have them. What a thread may do by which key is
//! in its registers (PKRU).
//!
//! Memory that may only be executed has a key that the kernel allocates by itself when there first is such
//! memory, and that programs cannot use.

use std::collections::BTreeSet;

use nix::errno::Errno;

use super::Vma;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::image::{Decode, Encode};
use crate::sys::PAGE;
use crate::tracee::{Answers, Batch, Call, Puppet, sys};

/// Keys of an address space, as bit sets.
#[derive(Encode, Decode, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Keys {
    allocated: u16,
    /// That of memory that may only be executed; 0: there is none.
    execute_only: u8,
}

/// The keys of x86; number 0 is that of all memory that has no other.
const KEYS: std::ops::Range<u8> = 1..16;

/// An address where nothing can be mapped.
const NOWHERE: u64 = 1 << 62;

pub(super) fn ask(batch: &mut Batch) -> Vec<Call> {
    let ask = |key| batch.call(sys::pkey_mprotect, &[NOWHERE, PAGE, libc::PROT_NONE as u64, key]);
    (0..u64::from(KEYS.end)).map(ask).collect()
}

impl Keys {
    /// Whether a key is allocated is looked at first, whether there is such memory after that.
    pub(super) fn describe(
        asked: &[Call],
        answers: &Answers,
        vmas: &[Vma],
    ) -> std::result::Result<Self, &'static str> {
        let known = |call: &Call| {
            let error = answers.get(*call).err();
            error.is_some_and(|error| error.raw_errno() == Some(Errno::ENOMEM))
        };
        let allocated = asked.iter().rev().fold(0, |keys, call| keys << 1 | u16::from(known(call)));
        if allocated != 0 && allocated & 1 == 0 {
            return Err("protection key 0, which most memory has, was freed");
        }
        let unusable = |vma: &&Vma| vma.is_execute_only() && vma.key != 0 && allocated >> vma.key & 1 == 0;
        let execute_only: BTreeSet<u8> = vmas.iter().filter(unusable).map(|vma| vma.key).collect();
        match execute_only.len() {
            0 | 1 => Ok(Self { allocated, execute_only: execute_only.first().copied().unwrap_or(0) }),
            _ => Err("memory that may only be executed has several protection keys that are not allocated"),
        }
    }

    /// Allocates them, and gives memory its keys; memory that may only be executed has had no protection so far.
    pub(super) fn build(self, vmas: &[Vma], puppet: &mut Puppet<'_>) -> Result<()> {
        self.allocate(vmas, puppet)?;
        let mut batch = puppet.batch();
        for vma in vmas.iter().filter(|vma| vma.key != 0 || vma.is_execute_only()) {
            batch.about(vma.subject());
            let (start, len, prot) = (vma.start, vma.len(), u64::from(vma.prot));
            match vma.key {
                // Without keys in the processor there is no key 0 either.
                0 if self.allocated == 0 => batch.call(sys::mprotect, &[start, len, prot]),
                key if vma.is_execute_only() && key == self.execute_only && key != 0 => {
                    batch.call(sys::mprotect, &[start, len, prot])
                }
                key => batch.call(sys::pkey_mprotect, &[start, len, prot, u64::from(key)]),
            };
            if batch.is_nearly_full() {
                puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
            }
        }
        let left_over = KEYS.filter(|key| *key < self.end(vmas) && !self.has(*key));
        left_over.for_each(|key| {
            batch.call(sys::pkey_free, &[u64::from(key)]);
        });
        puppet.run(batch)?.check()
    }

    /// The kernel always gives the lowest key that is free: all of them in order, then those back that are not
    /// allocated.
    fn allocate(self, vmas: &[Vma], puppet: &mut Puppet<'_>) -> Result<()> {
        let mut batch = puppet.batch();
        batch.about(Subject::Attribute("protection keys"));
        let mut calls = Vec::new();
        for key in KEYS.filter(|key| *key < self.end(vmas)) {
            let first = vmas.iter().find(|vma| vma.is_execute_only() && vma.key == key);
            match first.filter(|_| key == self.execute_only) {
                Some(vma) => {
                    batch.call(sys::mprotect, &[vma.start, vma.len(), u64::from(vma.prot)]);
                }
                None => calls.push((key, batch.call(sys::pkey_alloc, &[0, 0]))),
            }
        }
        let answers = puppet.run(batch)?;
        answers.check()?;
        calls.into_iter().try_for_each(|(key, call)| match answers.get(call)? {
            got if got == u64::from(key) => Ok(()),
            _ => Err(Error::new(ErrorKind::Kernel, "the kernel gives other protection keys")),
        })
    }

    fn has(self, key: u8) -> bool {
        key == self.execute_only || self.allocated >> key & 1 != 0
    }

    /// The first key that is not needed at all.
    fn end(self, vmas: &[Vma]) -> u8 {
        let used = vmas.iter().map(|vma| vma.key).chain([self.execute_only]);
        let allocated = (u16::BITS - self.allocated.leading_zeros()) as u8;
        used.map(|key| key + 1).max().unwrap_or(1).max(allocated)
    }

    /// An image is not trusted.
    pub(super) fn is_possible(self, vmas: &[Vma]) -> bool {
        let used = vmas.iter().all(|vma| vma.key < KEYS.end);
        let backed = self.execute_only == 0
            || vmas.iter().any(|vma| vma.is_execute_only() && vma.key == self.execute_only);
        used && backed && self.execute_only < KEYS.end
    }
}
