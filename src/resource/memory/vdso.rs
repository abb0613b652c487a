//! The vdso. A task goes on in the one that it had where the kernel has the same; mremap(2) puts it to its place.
//!
//! Where the kernel has another one, the task keeps the text of its own as ordinary memory, because it knows the
//! addresses of the functions in it, but each function then leads to the same one of the kernel's, which is mapped
//! elsewhere. In the place of the data that the old functions used are zeroes.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{AddressSpace, Backing, Vma, vdso};
use crate::Pid;
use crate::arch;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Bytes, Decode, Encode, Image, Owner, Record, Tag};
use crate::proc::smaps::Mapping;
use crate::sys::PAGE;
use crate::tracee::{Memory, Springboard};

/// The text of a vdso, but for its end, which may hold our springboard. Its owner is what it sums up to.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Vdso {
    text: Bytes,
}

impl Record for Vdso {
    const TAG: Tag = Tag::new(b"VDSO");
    const VERSION: u16 = 1;
    const NAME: &'static str = "vdso";
}

/// No vdso is larger.
const MOST: u64 = 1 << 20;

impl Vdso {
    /// That of a process; empty if it has none.
    pub(crate) fn of(memory: &Memory, mappings: &[Mapping]) -> Result<Self> {
        let Some(vdso) = vdso(mappings) else { return Ok(Self { text: Bytes::default() }) };
        let length = (vdso.end - vdso.start).saturating_sub(Springboard::ROOM).min(MOST);
        Ok(Self { text: memory.read_vec(vdso.start, length as usize)?.into() })
    }

    pub(crate) fn sum(&self) -> u32 {
        crc32fast::hash(&self.text)
    }

    /// The one that an address space was in.
    pub(super) fn load(image: &Image, space: &AddressSpace) -> Result<Self> {
        let vdso: Self = image.require(Owner(space.vdso))?;
        let lengths = space.specials().filter(|(_, name)| *name == b"[vdso]").map(|(vma, _)| vma.len());
        let lengths: Vec<u64> = lengths.collect();
        let room = vdso.text.len() as u64 + if vdso.text.is_empty() { 0 } else { Springboard::ROOM };
        match vdso.sum() == space.vdso && lengths.iter().sum::<u64>() == room && lengths.len() <= 1 {
            true => Ok(vdso),
            false => Err(Error::new(ErrorKind::Image, "a vdso that is not its address space's")),
        }
    }

    /// Where its functions begin, by name.
    fn functions(&self) -> Option<BTreeMap<&[u8], u64>> {
        Elf(&self.text).functions()
    }

    /// The text in which every function leads to that of `other`, which is at `base`.
    fn leading_to(&self, other: &Self, base: u64) -> Result<Vec<u8>> {
        let odd = || Error::new(ErrorKind::Kernel, "the functions of a vdso cannot be told");
        let (own, there) = (self.functions().ok_or_else(odd)?, other.functions().ok_or_else(odd)?);
        let mut text = self.text.to_vec();
        let mut starts: Vec<u64> = own.values().copied().collect();
        starts.sort_unstable();
        starts.dedup();
        let close = starts.windows(2).any(|two| matches!(two, [a, b] if b - a < arch::ENTRY_MAX as u64));
        for (name, start) in own {
            let entry = arch::vdso_entry(name, there.get(name).map(|offset| base + offset));
            let place = text.get_mut(start as usize..start as usize + entry.len()).filter(|_| !close);
            place.ok_or_else(odd)?.copy_from_slice(&entry);
        }
        Ok(text)
    }
}

impl AddressSpace {
    fn specials(&self) -> impl Iterator<Item = (&Vma, &[u8])> {
        self.vmas.iter().filter_map(|vma| match &vma.backing {
            Backing::Special { name } => Some((vma, &**name)),
            _ => None,
        })
    }

    /// Is this address in the text of its vdso?
    fn has_in_vdso(&self, address: u64) -> bool {
        self.specials().any(|(vma, name)| name == b"[vdso]" && vma.range().contains(&address))
    }

    /// Before there is a task: can threads that are at these addresses go on? Our own vdso is the kernel's.
    pub(crate) fn check_vdso(&self, mut at: impl Iterator<Item = u64>) -> Result<()> {
        let own = Pid::from(std::process::id());
        let here = || Vdso::of(&Memory::open(own)?, &super::places(own)?);
        if !at.any(|address| self.has_in_vdso(address)) || here()?.sum() == self.vdso {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, "a thread was in the vdso, and this kernel has another one")
            .with_hint("checkpoint it again, or restore it on a kernel like that of the checkpoint"))
    }
}

/// How a task goes on that had the vdso of another kernel.
#[derive(Debug)]
pub(super) struct Foreign {
    /// Where its own was, and what is to be there.
    pub(super) at: u64,
    pub(super) text: Vec<u8>,
    /// By how much the kernel's mappings are to be moved from where the blank task has them.
    shift: u64,
}

impl Foreign {
    /// None: it can go on in the kernel's.
    pub(super) fn plan(
        space: &AddressSpace,
        image: &Image,
        memory: &Memory,
        blank: &[Mapping],
        workshop: Range<u64>,
    ) -> Result<Option<Self>> {
        let here = Vdso::of(memory, blank)?;
        let there = |(vma, name): (&Vma, &[u8])| {
            blank.iter().any(|mapping| mapping.name == name && mapping.end - mapping.start == vma.len())
        };
        if here.sum() == space.vdso && space.specials().all(there) {
            return Ok(None);
        }
        let missing = || Error::new(ErrorKind::Kernel, "there is no vdso");
        let own = space.specials().find(|(_, name)| *name == b"[vdso]").ok_or_else(missing)?.0.start;
        let special = || blank.iter().filter(|mapping| super::build::is_special(&mapping.name));
        let (first, last) =
            (special().next().ok_or_else(missing)?, special().next_back().ok_or_else(missing)?);
        let place = roomiest(space, workshop, last.end - first.start)?;
        let shift = place.wrapping_sub(first.start);
        let base = vdso(blank).ok_or_else(missing)?.start.wrapping_add(shift);
        let text = Vdso::load(image, space)?.leading_to(&here, base)?;
        Ok(Some(Self { at: own, text, shift }))
    }

    /// The place of one of the kernel's mappings.
    pub(super) fn place(&self, mapping: &Mapping) -> u64 {
        mapping.start.wrapping_add(self.shift)
    }
}

/// In the middle of the largest hole nothing is in the way of what grows: the heap, the stack, new mappings.
fn roomiest(space: &AddressSpace, workshop: Range<u64>, len: u64) -> Result<u64> {
    const LOWEST: u64 = 0x20_0000;
    let mut used: Vec<Range<u64>> = space.vmas.iter().map(Vma::range).chain([workshop]).collect();
    used.sort_unstable_by_key(|range| range.start);
    let starts = used.iter().map(|range| range.start).chain([super::ADDRESS_END]);
    let ends = std::iter::once(LOWEST).chain(used.iter().map(|range| range.end));
    let holes = ends.zip(starts).map(|(end, start)| (start.saturating_sub(end), end));
    match holes.max() {
        Some((room, from)) if room > 2 * len => Ok((from + (room - len) / 2) & !(PAGE - 1)),
        _ => Err(Error::new(ErrorKind::Unsupported, "its address space leaves no room for another vdso")),
    }
}

/// A 64-bit shared library as it is in memory, of which nothing is trusted.
struct Elf<'t>(&'t [u8]);

impl<'t> Elf<'t> {
    fn bytes<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.0.get(usize::try_from(at).ok()?..)?.first_chunk().copied()
    }

    fn word(&self, at: u64) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }

    fn half(&self, at: u64) -> Option<u64> {
        self.bytes(at).map(|bytes| u64::from(u16::from_le_bytes(bytes)))
    }

    /// A table of pairs until one with a 0, or a program header of this kind: where its contents are.
    fn segment(&self, kind: u32) -> Option<u64> {
        let (table, size, count) = (self.word(32)?, self.half(54)?, self.half(56)?);
        let headers = (0..count).map(|index| table.checked_add(index * size));
        let found = headers.flatten().find(|at| self.bytes(*at).map(u32::from_le_bytes) == Some(kind));
        found.and_then(|at| self.word(at + 16))
    }

    fn dynamic(&self, tag: u64) -> Option<u64> {
        const MOST: u64 = 64;
        const PT_DYNAMIC: u32 = 2;
        let table = self.segment(PT_DYNAMIC)?;
        let entries = (0..MOST).filter_map(|index| table.checked_add(16 * index));
        let mut entries = entries.map_while(|at| Some((self.word(at)?, self.word(at + 8)?)));
        entries.find(|(key, _)| *key == tag).map(|(_, value)| value)
    }

    fn functions(&self) -> Option<BTreeMap<&'t [u8], u64>> {
        const DT_STRTAB: u64 = 5;
        const DT_SYMTAB: u64 = 6;
        const STT_FUNC: u8 = 2;
        const SYMBOL: u64 = 24;
        let (names, symbols) = (self.dynamic(DT_STRTAB)?, self.dynamic(DT_SYMTAB)?);
        // The names follow the symbols, of which a library as it is in memory has no count.
        let count = names.checked_sub(symbols)? / SYMBOL;
        let mut functions = BTreeMap::new();
        for at in (0..count).map(|index| symbols + SYMBOL * index) {
            let name = u64::from(u32::from_le_bytes(self.bytes(at)?));
            let ([info], section, value) = (self.bytes(at + 4)?, self.half(at + 6)?, self.word(at + 8)?);
            if info & 0xf == STT_FUNC && section != 0 && value < self.0.len() as u64 {
                let name = self.0.get(usize::try_from(names.checked_add(name)?).ok()?..)?;
                functions.insert(name.split(|byte| *byte == 0).next()?, value);
            }
        }
        (!functions.is_empty()).then_some(functions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Vdso {
        let pid = Pid::from(std::process::id());
        Vdso::of(&Memory::open(pid).unwrap(), &super::super::places(pid).unwrap()).unwrap()
    }

    #[test]
    fn functions_are_found_by_name() {
        let vdso = own();
        let functions = vdso.functions().unwrap();
        assert_eq!(functions[&b"clock_gettime"[..]], functions[&b"__vdso_clock_gettime"[..]]);
        assert!(functions.values().all(|offset| *offset > 0x100));
    }

    /// The same function is elsewhere in the other, another one is missing there.
    #[test]
    fn each_leads_to_its_namesake() {
        let old = own();
        let base = 0x1234_5678_9000;
        let symbols = Elf(&old.text).dynamic(6).unwrap() as usize;
        let names = Elf(&old.text).dynamic(5).unwrap() as usize;
        let mut text = old.text.to_vec();
        let functions = old.functions().unwrap();
        for at in (symbols..names).step_by(24) {
            let value: [u8; 8] = text[at + 8..at + 16].try_into().unwrap();
            let moved = match u64::from_le_bytes(value) {
                value if value == functions[&b"clock_gettime"[..]] => value + 0x20,
                value if value == functions[&b"time"[..]] => 1 << 40,
                value => value,
            };
            text[at + 8..at + 16].copy_from_slice(&moved.to_le_bytes());
        }
        let new = Vdso { text: text.into() };
        let text = old.leading_to(&new, base).unwrap();
        let at = |name: &str, len| &text[functions[name.as_bytes()] as usize..][..len];
        assert_eq!(at("__vdso_clock_gettime", 6), b"\xff\x25\0\0\0\0");
        let there = base + functions[&b"clock_gettime"[..]] + 0x20;
        assert_eq!(at("clock_gettime", 14)[6..], there.to_le_bytes());
        assert_eq!(at("time", 8), b"\xb8\xc9\0\0\0\x0f\x05\xc3");
        assert_eq!(text.len(), old.text.len());
    }

    #[test]
    fn damaged_ones_are_told() {
        let vdso = own();
        for len in [0, 1, 40, 63, 64, 100, 0x200, 0x330, 0x500] {
            let cut = Vdso { text: vdso.text.get(..len).unwrap_or_default().to_vec().into() };
            let _ = cut.leading_to(&vdso, 0);
            let _ = vdso.leading_to(&cut, 0);
        }
        for at in 0..0x500 {
            let mut text = vdso.text.to_vec();
            text[at] ^= 0xff;
            let _ = Vdso { text: text.into() }.leading_to(&vdso, 0);
        }
        assert!(Vdso { text: Bytes::default() }.leading_to(&vdso, 0).is_err());
    }
}
