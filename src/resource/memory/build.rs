//! Rebuilding an address space in a blank task.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use nix::fcntl::OFlag;

use super::{
    ADDRESS_END, AddressSpace, Backing, Fillers, Inheritance, Made, Origin, Run, Segments, SharedObject,
    Traits, Vdso, Vma, locks, vdso::Foreign,
};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, Result, Subject};
use crate::image::{Image, Owner};
use crate::proc::smaps::Mapping;
use crate::resource::fds::{Channel, FileRef, Finder};
use crate::sys::PAGE;
use crate::tracee::{Batch, Puppet, Scratch, sys};

/// Where the engine's own things are in every task that it rebuilds: one range, free in all of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workshop {
    base: u64,
    len: u64,
}

/// Room for the kernel's own mappings on their way to their places.
const PARK: u64 = 0x2_0000;

impl Workshop {
    /// Finds a range that no address space uses, with room for the shared objects.
    pub(crate) fn find<'s>(spaces: impl Iterator<Item = &'s AddressSpace>, shared: u64) -> Result<Self> {
        /// mmap_min_addr is lower; a stack wants a gap of a megabyte below it.
        const LOWEST: u64 = 0x20_0000;
        const GAP: u64 = 0x20_0000;
        let len = shared.saturating_add(2 * PAGE + Scratch::LEN + PARK);
        let mut used: Vec<Range<u64>> =
            spaces.flat_map(|space| space.vmas.iter().map(|vma| vma.start..vma.end)).collect();
        used.sort_unstable_by_key(|range| range.start);
        let mut free = LOWEST;
        for range in used.into_iter().chain(std::iter::once(ADDRESS_END..ADDRESS_END)) {
            if range.start >= free && range.start - free >= len.saturating_add(GAP) {
                return Ok(Self { base: free, len });
            }
            free = free.max(range.end.saturating_add(GAP) & !(GAP - 1));
        }
        Err(Error::new(ErrorKind::Unsupported, "the address spaces of the tree leave no room for the engine"))
    }

    /// Where the stub program goes, and how much memory it needs behind its page.
    pub(crate) fn stub(&self) -> (u64, u64) {
        (self.base, PAGE + Scratch::LEN)
    }

    pub(crate) fn scratch(&self) -> Scratch {
        Scratch::new(self.base + 2 * PAGE, self.code())
    }

    pub(crate) fn code(&self) -> u64 {
        self.base + PAGE
    }

    fn park(&self) -> u64 {
        self.base + 2 * PAGE + Scratch::LEN
    }

    fn shared(&self) -> u64 {
        self.park() + PARK
    }

    pub(crate) fn range(&self) -> Range<u64> {
        self.base..self.base + self.len
    }

    /// What of a blank task's memory has to stay until the end.
    fn keeps(&self, mapping: &Mapping) -> bool {
        mapping.start >= self.code() && mapping.end <= self.base + self.len
    }
}

/// The shared objects of an image, and where the workshop has them.
#[derive(Debug, Default)]
pub(crate) struct SharedPlan {
    objects: BTreeMap<u32, (u64, SharedObject)>,
    pub(crate) len: u64,
    /// Which views of them are mapped: writable or not.
    views: BTreeSet<(u32, bool)>,
}

impl SharedPlan {
    pub(crate) fn load(image: &Image) -> Result<Self> {
        let mut plan = Self::default();
        for owner in image.owners::<SharedObject>() {
            let object: SharedObject = image.require(owner)?;
            object.check().about(|| Subject::Section(format!("SHMO {owner}")))?;
            Segments(image).check(&object.runs)?;
            let offset = plan.len;
            plan.len = plan.len.saturating_add(object.room());
            plan.objects.insert(owner.0, (offset, object));
        }
        Ok(plan)
    }

    /// Bytes that the image holds of it.
    pub(crate) fn bytes(&self) -> u64 {
        self.objects.values().flat_map(|(_, object)| &object.runs).map(|run| run.len).sum()
    }

    /// The address at which the workshop has what this mapping is of.
    fn address(&self, workshop: &Workshop, object: u32, vma: &Vma) -> Result<u64> {
        match self.objects.get(&object) {
            Some((at, object)) if vma.offset + vma.len() <= object.size => {
                let view = object.view(vma.has(Traits::FOR_WRITING));
                Ok(workshop.shared() + at + view + vma.offset)
            }
            _ => Err(Error::new(ErrorKind::Image, "a mapping of shared memory that is missing or too small")),
        }
    }

    /// Checks that every mapping of shared memory has its object, and notes how they are mapped.
    pub(crate) fn check(&mut self, space: &AddressSpace, workshop: &Workshop) -> Result<()> {
        for vma in &space.vmas {
            if let Backing::Shared { object } = vma.backing {
                self.address(workshop, object, vma).about(|| vma.subject())?;
                self.views.insert((object, vma.has(Traits::FOR_WRITING)));
            }
        }
        Ok(())
    }

    /// Looks whether what is outside of the image allows to make them, before there is any task.
    pub(crate) fn plan(&self) -> Result<()> {
        self.objects.values().try_for_each(|(_, object)| match &object.origin {
            Origin::Anonymous { .. } => Ok(()),
            Origin::SystemV(segment) => segment.is_there().map(drop),
        })
    }
}

impl SharedObject {
    fn check(&self) -> Result<()> {
        let bad = |why| Err(Error::new(ErrorKind::Image, why));
        if self.size == 0 || !self.size.is_multiple_of(PAGE) || self.size > ADDRESS_END {
            return bad("shared memory of an impossible size");
        }
        if matches!(self.origin, Origin::SystemV(segment) if segment.size > self.size) {
            return bad("a System V segment that is larger than its memory");
        }
        let inside = |run: &Run| run.addr.checked_add(run.len).is_some_and(|end| end <= self.size);
        match self
            .runs
            .iter()
            .all(|run| inside(run) && run.len > 0 && (run.addr | run.len).is_multiple_of(PAGE))
        {
            true => Ok(()),
            false => bad("pages outside of their shared memory"),
        }
    }

    /// How much of the workshop it takes: what is attached for reading only is another view of it.
    fn room(&self) -> u64 {
        match self.origin {
            Origin::Anonymous { .. } => self.size,
            Origin::SystemV(_) => self.size.saturating_mul(2),
        }
    }

    /// Where in its room the view is that mappings come from.
    fn view(&self, writable: bool) -> u64 {
        match self.origin {
            Origin::SystemV(_) if !writable => self.size,
            _ => 0,
        }
    }
}

/// Makes the shared objects in the root, before it has children who inherit them. Gives those that outlive it.
pub(crate) fn prepare_shared<'s>(
    puppet: &mut Puppet<'_>,
    shared: &'s SharedPlan,
    workshop: &Workshop,
    fillers: &Fillers<'s>,
) -> Result<Vec<Made>> {
    let mut made = Vec::new();
    for (number, (at, object)) in &shared.objects {
        let start = workshop.shared() + at;
        let mut batch = puppet.batch();
        match &object.origin {
            Origin::Anonymous { no_reserve } => {
                let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
                let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
                if *no_reserve {
                    flags |= libc::MAP_NORESERVE;
                }
                batch.call(sys::mmap, &[start, object.size, prot, flags as u64, u64::MAX, 0]);
                puppet.run(batch)?.check()?;
            }
            Origin::SystemV(segment) => {
                let new = if segment.is_there()? { None } else { Some(segment.make(puppet)?) };
                batch.about(segment.subject());
                for writable in [true, false] {
                    // It is filled through the writable one.
                    if shared.views.contains(&(*number, writable)) || writable && new.is_some() {
                        let view = start + object.view(writable);
                        batch.call(sys::shmat, &segment.attach(view, writable));
                    }
                }
                puppet.run(batch)?.check()?;
                match new {
                    None => continue,
                    // From here on it lasts for as long as it is attached.
                    Some(new) if segment.is_removed() => drop(new),
                    Some(new) => made.push(new),
                }
            }
        }
        let memory = puppet.memory().clone();
        fillers.fill(puppet.tgid(), &object.runs, move |pieces| {
            let pieces: Vec<_> = pieces.iter().map(|(addr, bytes)| (start + addr, *bytes)).collect();
            memory.write_all(&pieces)
        })?;
    }
    Ok(made)
}

/// Files that restored tasks need, each opened (and checked) once.
#[derive(Default)]
pub(crate) struct Opened {
    files: BTreeMap<(FileRef, i32), OwnedFd>,
}

impl Opened {
    fn open(&mut self, file: &FileRef, flags: OFlag, finder: &Finder) -> Result<()> {
        let key = (file.clone(), flags.bits());
        if let std::collections::btree_map::Entry::Vacant(slot) = self.files.entry(key) {
            slot.insert(finder.open(file, flags)?);
        }
        Ok(())
    }

    fn get(&self, file: &FileRef, flags: OFlag) -> Result<std::os::fd::BorrowedFd<'_>> {
        let opened = self.files.get(&(file.clone(), flags.bits()));
        opened.map(AsFd::as_fd).ok_or_else(|| Error::new(ErrorKind::Image, "a file that is not listed"))
    }

    /// Opens all of these, before there is any task.
    pub(crate) fn open_all<'f>(
        &mut self,
        mut needs: impl Iterator<Item = (&'f FileRef, OFlag)>,
        finder: &Finder,
    ) -> Result<()> {
        needs.try_for_each(|(file, flags)| self.open(file, flags, finder))
    }

    /// Makes a task whose only open descriptor is the channel receive all of these, the last ones with the batch.
    pub(crate) fn lend<'s>(
        &self,
        mut wanted: Vec<(&'s FileRef, OFlag)>,
        channel: &Channel,
        puppet: &mut Puppet<'_>,
        batch: &mut Batch,
    ) -> Result<Numbers<'s>> {
        const MESSAGE: usize = 240;
        wanted.sort_unstable_by_key(|(file, flags)| (*file, flags.bits()));
        wanted.dedup();
        let (mut numbers, mut taken) = (BTreeMap::new(), vec![channel.number()]);
        for (index, message) in wanted.chunks(MESSAGE).enumerate() {
            if index > 0 {
                puppet.run(std::mem::replace(batch, puppet.batch()))?.check()?;
            }
            let fds =
                message.iter().map(|(file, flags)| self.get(file, *flags)).collect::<Result<Vec<_>>>()?;
            let received = channel.send(&fds, &taken, batch)?;
            let keys = message.iter().map(|(file, flags)| (*file, flags.bits()));
            numbers.extend(keys.zip(received.iter().copied()));
            taken.extend(received);
        }
        Ok(Numbers { numbers })
    }
}

impl AddressSpace {
    /// Its files with the flags that they are opened with.
    pub(crate) fn needs(&self) -> Vec<(&FileRef, OFlag)> {
        let file = |(index, flags): (u32, OFlag)| Some((self.files.get(index as usize)?, flags));
        let executable = (&self.executable, OFlag::O_RDONLY);
        std::iter::once(executable).chain(mapped(self).into_iter().filter_map(file)).collect()
    }
}

/// The mapped files, by index, with the flags that their mappings need: each pair once.
fn mapped(space: &AddressSpace) -> Vec<(u32, OFlag)> {
    let mut wanted: Vec<(u32, i32)> =
        space.vmas.iter().filter_map(|vma| Some((file_index(vma)?, open_flags(vma).bits()))).collect();
    wanted.sort_unstable();
    wanted.dedup();
    wanted.into_iter().map(|(index, flags)| (index, OFlag::from_bits_retain(flags))).collect()
}

fn file_index(vma: &Vma) -> Option<u32> {
    match vma.backing {
        Backing::File { index, .. } => Some(index),
        _ => None,
    }
}

/// A shared mapping that may be made writable comes from a descriptor that could write.
fn open_flags(vma: &Vma) -> OFlag {
    match vma.backing {
        Backing::File { shared: true, .. } if vma.has(Traits::FOR_WRITING) => OFlag::O_RDWR,
        _ => OFlag::O_RDONLY,
    }
}

/// Rebuilds an address space.
pub(crate) struct MmBuilder<'b> {
    pub(crate) workshop: Workshop,
    pub(crate) shared: &'b SharedPlan,
    pub(crate) opened: &'b Opened,
    pub(crate) channel: &'b Channel,
    pub(crate) image: &'b Image,
    /// What the task has mapped so far.
    pub(crate) blank: &'b [Mapping],
    /// What of that is to stay.
    pub(crate) inheritance: &'b Inheritance,
}

impl MmBuilder<'_> {
    /// Its mappings, which are empty.
    pub(crate) fn build(&self, puppet: &mut Puppet<'_>, space: &AddressSpace) -> Result<()> {
        let workshop = self.workshop.range();
        let foreign = Foreign::plan(space, self.image, puppet.memory(), self.blank, workshop)?;
        let mut batch = self.clear(puppet)?;
        let numbers = self.opened.lend(space.needs(), self.channel, puppet, &mut batch)?;
        // While it is not mapped: the kernel does not let go of a program that is.
        batch.about(Subject::Attribute("executable"));
        let executable = numbers.number(&space.executable, OFlag::O_RDONLY)?;
        space.layout.build(self.inheritance.is_empty().then_some(executable), &mut batch);
        let kept =
            |vma: &&Vma| self.inheritance.kept.binary_search_by_key(&vma.start, |kept| kept.start).is_ok();
        for vma in space.vmas.iter().filter(|vma| !kept(vma)) {
            match &vma.backing {
                Backing::Special { .. } if foreign.is_some() => map_in_place_of(vma, &mut batch),
                _ => self.map(vma, space, &numbers, &mut batch)?,
            }
            if batch.is_nearly_full() {
                puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
            }
        }
        numbers.close(&mut batch);
        puppet.run(batch)?.check()?;
        foreign.map_or(Ok(()), |foreign| self.settle(foreign, puppet))?;
        set_policies(puppet, space)
    }

    /// Removes what the task does not need, and moves the kernel's mappings out of the way.
    fn clear(&self, puppet: &mut Puppet<'_>) -> Result<Batch> {
        let mut batch = puppet.batch();
        let mut useless: Vec<Range<u64>> = Vec::new();
        for mapping in self.blank.iter().filter(|mapping| !self.workshop.keeps(mapping)) {
            match self.parked(&mapping.name) {
                Some(park) => drop(move_to(&mut batch, mapping.start, mapping.end - mapping.start, park)),
                None if mapping.name == b"[vsyscall]" => {}
                None => useless.push(mapping.start..mapping.end),
            }
        }
        let useless = super::kin::without(&useless, self.inheritance.kept.iter().cloned());
        let unmap = useless.iter().map(|range| (range, sys::munmap, 0));
        let empty =
            self.inheritance.stale.iter().map(|range| (range, sys::madvise, libc::MADV_DONTNEED as u64));
        for (range, call, advice) in unmap.chain(empty) {
            batch.call(call, &[range.start, range.end - range.start, advice]);
            if batch.is_nearly_full() {
                puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
            }
        }
        Ok(batch)
    }

    /// The parking place of one of the kernel's own mappings.
    fn parked(&self, name: &[u8]) -> Option<u64> {
        let special = |mapping: &&Mapping| is_special(&mapping.name);
        let mut at = self.workshop.park();
        for mapping in self.blank.iter().filter(special) {
            if mapping.name == name {
                return Some(at);
            }
            at += mapping.end - mapping.start;
        }
        None
    }

    fn map(&self, vma: &Vma, space: &AddressSpace, numbers: &Numbers<'_>, batch: &mut Batch) -> Result<()> {
        batch.about(vma.subject());
        let (start, len) = (vma.start, vma.len());
        let write = libc::PROT_WRITE as u32;
        // Memory that was writable once counts as committed for good.
        let accounted = vma.has(Traits::ACCOUNT) && vma.is_private() && vma.prot & write == 0;
        // What may only be executed gets its protection with its key.
        let last = u64::from(if vma.is_execute_only() { 0 } else { vma.prot });
        let prot = if accounted || vma.is_filled_first() { last | u64::from(write) } else { last };
        match &vma.backing {
            Backing::Anonymous { name } => {
                let droppable = vma.has(Traits::DROPPABLE);
                let kind = if droppable { libc::MAP_DROPPABLE } else { libc::MAP_PRIVATE };
                let flags = mmap_flags(vma, kind | libc::MAP_ANONYMOUS);
                batch.call(sys::mmap, &[start, len, prot, flags, u64::MAX, 0]);
                if accounted {
                    // mprotect(2) would take back the account of memory that has never been written to.
                    batch.call(sys::madvise, &[start, crate::sys::PAGE, libc::MADV_POPULATE_WRITE as u64]);
                    batch.call(sys::madvise, &[start, crate::sys::PAGE, libc::MADV_DONTNEED as u64]);
                }
                if let Some(name) = name {
                    const PR_SET_VMA: u64 = 0x5356_4d41;
                    let name = batch.input(&[name, &b"\0"[..]].concat());
                    batch.call(sys::prctl, &[PR_SET_VMA, 0, start, len, name]);
                }
            }
            Backing::File { shared, .. } => {
                let kind = if *shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                let fd = numbers.of(vma, space)? as u64;
                batch.call(sys::mmap, &[start, len, prot, mmap_flags(vma, kind), fd, vma.offset]);
            }
            Backing::Shared { object } => {
                let from = self.shared.address(&self.workshop, *object, vma)?;
                // An old length of 0 maps shared memory a second time.
                batch.call(sys::mremap, &[from, 0, len, MREMAP, start]);
                batch.call(sys::mprotect, &[start, len, prot]);
            }
            Backing::Special { name } => return self.map_special(vma, name, batch),
        }
        if accounted {
            batch.call(sys::mprotect, &[start, len, last]);
        }
        for (_, advice) in ADVICE.iter().filter(|(traits, _)| vma.has(*traits)) {
            batch.call(sys::madvise, &[start, len, *advice as u64]);
        }
        Ok(())
    }

    fn map_special(&self, vma: &Vma, name: &[u8], batch: &mut Batch) -> Result<()> {
        let of_blank = self.blank.iter().find(|mapping| mapping.name == name);
        match (of_blank, self.parked(name)) {
            (Some(mapping), Some(park)) if mapping.end - mapping.start == vma.len() => {
                move_to(batch, park, vma.len(), vma.start);
                Ok(())
            }
            _ => Err(other_kernel().about(vma.subject())),
        }
    }

    /// Puts the kernel's mappings where they are in nobody's way, and what leads there to the place of the old ones.
    fn settle(&self, foreign: Foreign, puppet: &mut Puppet<'_>) -> Result<()> {
        let mut batch = puppet.batch();
        for mapping in self.blank.iter() {
            if let Some(park) = self.parked(&mapping.name) {
                move_to(&mut batch, park, mapping.end - mapping.start, foreign.place(mapping));
            }
        }
        puppet.run(batch)?.check()?;
        puppet.memory().write(foreign.at, &foreign.text)
    }
}

/// What needs the pages to be there: protection of huge ones, guard regions, locks. Locking touches pages: later it
/// would make copies of those that have come to be shared with children.
pub(crate) fn lock(puppet: &mut Puppet<'_>, space: &AddressSpace) -> Result<()> {
    const MADV_GUARD_INSTALL: u64 = 102;
    let mut batch = puppet.batch();
    for vma in space.vmas.iter().filter(|vma| vma.is_filled_first() && !vma.is_execute_only()) {
        batch.about(vma.subject());
        batch.call(sys::mprotect, &[vma.start, vma.len(), u64::from(vma.prot)]);
        if batch.is_nearly_full() {
            puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
        }
    }
    for (start, end) in &space.guards {
        batch.about(Subject::Vma { start: *start, end: *end, what: "guard region".into() });
        batch.call(sys::madvise, &[*start, end.saturating_sub(*start), MADV_GUARD_INSTALL]);
        if batch.is_nearly_full() {
            puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
        }
    }
    puppet.run(batch)?.check()?;
    locks::build(&space.vmas, puppet)
}

/// The last things about memory, when there are all processes that get a part of it: keys, seals, locks to come.
pub(crate) fn seal(puppet: &mut Puppet<'_>, space: &AddressSpace) -> Result<()> {
    space.keys.build(&space.vmas, puppet)?;
    let mut batch = puppet.batch();
    for vma in space.vmas.iter().filter(|vma| vma.has(Traits::SEALED)) {
        batch.about(vma.subject());
        batch.call(sys::mseal, &[vma.start, vma.len(), 0]);
        if batch.is_nearly_full() {
            puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
        }
    }
    space.future_locks.build(&mut batch);
    puppet.run(batch)?.check()
}

fn set_policies(puppet: &mut Puppet<'_>, space: &AddressSpace) -> Result<()> {
    let mut batch = puppet.batch();
    for policy in &space.policies {
        policy.build(&mut batch);
        if batch.is_nearly_full() {
            puppet.run(std::mem::replace(&mut batch, puppet.batch()))?.check()?;
        }
    }
    puppet.run(batch)?.check()
}

fn other_kernel() -> Error {
    Error::new(ErrorKind::Kernel, "the vdso of this kernel differs from that of the checkpoint's")
        .with_hint("restore on the kernel that the checkpoint was made on")
}

/// Which descriptor number each file has in the task.
pub(crate) struct Numbers<'s> {
    numbers: BTreeMap<(&'s FileRef, i32), RawFd>,
}

impl Numbers<'_> {
    pub(crate) fn number(&self, file: &FileRef, flags: OFlag) -> Result<RawFd> {
        let number = self.numbers.get(&(file, flags.bits())).copied();
        number.ok_or_else(|| Error::new(ErrorKind::Image, "a file that is not listed").about(file.subject()))
    }

    fn of(&self, vma: &Vma, space: &AddressSpace) -> Result<RawFd> {
        let file = file_index(vma).and_then(|index| space.files.get(index as usize));
        let file =
            file.ok_or_else(|| Error::new(ErrorKind::Image, "a mapping of a file that is not listed"))?;
        self.number(file, open_flags(vma))
    }

    pub(crate) fn close(&self, batch: &mut Batch) {
        for number in self.numbers.values() {
            batch.call(sys::close, &[*number as u64]);
        }
    }
}

const MREMAP: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;

fn move_to(batch: &mut Batch, from: u64, len: u64, to: u64) -> crate::tracee::Call {
    batch.call(sys::mremap, &[from, len, len, MREMAP, to])
}

/// Memory of its own in the place of one of the kernel's mappings.
fn map_in_place_of(vma: &Vma, batch: &mut Batch) {
    batch.about(vma.subject());
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    batch.call(sys::mmap, &[vma.start, vma.len(), u64::from(vma.prot), flags as u64, u64::MAX, 0]);
}

pub(super) fn is_special(name: &[u8]) -> bool {
    matches!(name, b"[vdso]" | b"[vvar]" | b"[vvar_vclock]")
}

fn mmap_flags(vma: &Vma, kind: i32) -> u64 {
    let mut flags = kind | libc::MAP_FIXED_NOREPLACE;
    if vma.has(Traits::GROWS_DOWN) {
        flags |= libc::MAP_GROWSDOWN;
    }
    if vma.has(Traits::NO_RESERVE) {
        flags |= libc::MAP_NORESERVE;
    }
    flags as u64
}

/// What madvise(2) has to be told again.
const ADVICE: [(Traits, i32); 8] = [
    (Traits::DONT_FORK, libc::MADV_DONTFORK),
    (Traits::DONT_DUMP, libc::MADV_DONTDUMP),
    (Traits::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
    (Traits::MERGEABLE, libc::MADV_MERGEABLE),
    (Traits::HUGE_PAGE, libc::MADV_HUGEPAGE),
    (Traits::NO_HUGE_PAGE, libc::MADV_NOHUGEPAGE),
    (Traits::SEQUENTIAL, libc::MADV_SEQUENTIAL),
    (Traits::RANDOM, libc::MADV_RANDOM),
];

/// Loads and checks one process's address space.
pub(crate) fn load(image: &Image, pid: Pid) -> Result<AddressSpace> {
    let space: AddressSpace = image.require(Owner(pid.get())).of(pid)?;
    space.check().of(pid)?;
    Vdso::load(image, &space).of(pid)?;
    Segments(image).check(&space.runs).of(pid)?;
    Ok(space)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_workshop_for_too_much() {
        assert!(Workshop::find(std::iter::empty(), 1 << 40).is_ok());
        assert!(Workshop::find(std::iter::empty(), u64::MAX).is_err());
    }
}
