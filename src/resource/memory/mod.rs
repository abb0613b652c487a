//! Address spaces: the mappings of a process, the addresses that the kernel keeps about it (brk, arguments,
//! environment, auxiliary vector), its executable, and which pages hold what.

mod build;
mod crowd;
mod fill;
mod handover;
pub(crate) mod inside;
mod keys;
mod kin;
mod layout;
mod locks;
mod pages;
mod parent;
mod places;
mod policy;
mod shared;
mod survey;
mod sysv;
mod tracking;
mod vdso;

use std::collections::BTreeMap;
use std::ops::Range;

use nix::sys::stat::{lstat, stat};

use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::freeze::Process;
use crate::image::{Bytes, Decode, Encode, Record, Tag};
use crate::proc::smaps::{self, Mapping, VmFlags};
use crate::proc::{Device, read};
use crate::resource::Report;
use crate::resource::fds::{FileRef, Ghosts, Reason};
use crate::sys::hugetlb::PageShift;
use crate::tracee::{Answers, Batch, Call, Puppet, sys};

use keys::Keys;
use locks::FutureLocks;
use policy::{Modes, RangePolicy};

pub(crate) use build::{MmBuilder, Opened, SharedPlan, Workshop, load, lock, prepare_shared, seal};
pub(crate) use crowd::{Crowd, Kinship, Member};
pub(crate) use fill::{Fillers, fill};
pub(crate) use kin::{Inheritance, Kin, Legacy, overlap, without};
pub(crate) use layout::Layout;
pub(crate) use pages::{Counts, FromInside, Own, PageWriter, Run, Segments};
pub(crate) use parent::{Paged, Parent, PreDumped};
pub(crate) use places::{Moved, Places};
pub(crate) use shared::{Origin, SharedObject, SharedObjects};
pub(crate) use survey::{Populated, Scan, Span, Survey};
pub(crate) use sysv::Made;
pub use tracking::Tracker;
pub(crate) use tracking::{Stock, descriptor};
pub(crate) use vdso::Vdso;

bitflags::bitflags! {
    /// What a mapping has been asked to do, by mmap(2), madvise(2) and mlock(2). Part of the image format.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Traits: u32 {
        const GROWS_DOWN = 1 << 0;
        const NO_RESERVE = 1 << 1;
        /// It counts as committed memory, though it may not be writable now.
        const ACCOUNT = 1 << 2;
        const DONT_FORK = 1 << 3;
        const DONT_DUMP = 1 << 4;
        const WIPE_ON_FORK = 1 << 5;
        const MERGEABLE = 1 << 6;
        const HUGE_PAGE = 1 << 7;
        const NO_HUGE_PAGE = 1 << 8;
        const SEQUENTIAL = 1 << 9;
        const RANDOM = 1 << 10;
        const LOCKED = 1 << 11;
        const LOCK_ON_FAULT = 1 << 12;
        /// A shared mapping of what was opened or attached for writing: a seal may forbid that it is made writable.
        const FOR_WRITING = 1 << 13;
        /// mseal(2).
        const SEALED = 1 << 14;
        /// MAP_DROPPABLE.
        const DROPPABLE = 1 << 15;
    }
}

/// smaps flags and the traits that stand for them.
const TRAITS: [(VmFlags, Traits); 16] = [
    (VmFlags::GROWS_DOWN, Traits::GROWS_DOWN),
    (VmFlags::NO_RESERVE, Traits::NO_RESERVE),
    (VmFlags::ACCOUNT, Traits::ACCOUNT),
    (VmFlags::DONT_FORK, Traits::DONT_FORK),
    (VmFlags::DONT_DUMP, Traits::DONT_DUMP),
    (VmFlags::WIPE_ON_FORK, Traits::WIPE_ON_FORK),
    (VmFlags::MERGEABLE, Traits::MERGEABLE),
    (VmFlags::HUGE_PAGE, Traits::HUGE_PAGE),
    (VmFlags::NO_HUGE_PAGE, Traits::NO_HUGE_PAGE),
    (VmFlags::SEQ_READ, Traits::SEQUENTIAL),
    (VmFlags::RAND_READ, Traits::RANDOM),
    (VmFlags::LOCKED, Traits::LOCKED),
    (VmFlags::LOCK_ON_FAULT, Traits::LOCK_ON_FAULT),
    (VmFlags::SHARED, Traits::FOR_WRITING),
    (VmFlags::SEALED, Traits::SEALED),
    (VmFlags::DROPPABLE, Traits::DROPPABLE),
];

/// What a mapping is of.
#[derive(Encode, Decode, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Private anonymous memory, perhaps with a name (PR_SET_VMA_ANON_NAME).
    Anonymous { name: Option<Bytes> },
    /// A file, by its index in [`AddressSpace::files`].
    File { index: u32, shared: bool },
    /// Shared memory that is no file: the owner of the section of its [`SharedObject`].
    Shared { object: u32 },
    /// The kernel's own: vdso and vvar, by name.
    Special { name: Bytes },
}

/// One mapping.
#[derive(Encode, Decode, Clone, Debug)]
pub(crate) struct Vma {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// PROT_READ | PROT_WRITE | PROT_EXEC.
    pub(crate) prot: u32,
    pub(crate) traits: u32,
    /// Its protection key.
    pub(crate) key: u8,
    /// Of huge pages (hugetlb), their size as its binary logarithm; 0 of all others.
    pub(crate) huge: u8,
    pub(crate) offset: u64,
    pub(crate) backing: Backing,
}

impl Vma {
    pub(crate) fn len(&self) -> u64 {
        self.end - self.start
    }

    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.start..self.end
    }

    pub(crate) fn traits(&self) -> Traits {
        Traits::from_bits_truncate(self.traits)
    }

    pub(crate) fn has(&self, some: Traits) -> bool {
        self.traits().contains(some)
    }

    /// Does the process have pages of its own in it?
    pub(crate) fn is_private(&self) -> bool {
        matches!(self.backing, Backing::Anonymous { .. } | Backing::File { shared: false, .. })
    }

    pub(crate) fn is_execute_only(&self) -> bool {
        self.prot == libc::PROT_EXEC as u32
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        matches!(self.backing, Backing::Anonymous { .. })
    }

    /// Is it only filled while it is writable? Whatever else is private can be written to from outside at any time.
    pub(crate) fn is_filled_first(&self) -> bool {
        self.huge != 0 && self.is_private() && self.prot & libc::PROT_WRITE as u32 == 0
    }

    pub(crate) fn subject(&self) -> Subject {
        Subject::Vma { start: self.start, end: self.end, what: String::new() }
    }
}

/// Everything about the memory of one process.
#[derive(Encode, Decode, Debug)]
pub(crate) struct AddressSpace {
    pub(crate) layout: Layout,
    pub(crate) executable: FileRef,
    pub(crate) files: Vec<FileRef>,
    pub(crate) vmas: Vec<Vma>,
    pub(crate) runs: Vec<Run>,
    /// What the text of its [`Vdso`] sums up to.
    pub(crate) vdso: u32,
    /// Guard regions: where any access is a fault, without a mapping of their own.
    pub(crate) guards: Vec<(u64, u64)>,
    pub(crate) policies: Vec<RangePolicy>,
    pub(crate) keys: Keys,
    pub(crate) future_locks: FutureLocks,
}

impl Record for AddressSpace {
    const TAG: Tag = Tag::new(b"MMAP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "address space";
}

impl Paged for AddressSpace {
    fn runs(&mut self) -> &mut Vec<Run> {
        &mut self.runs
    }
}

/// The file of all that is known of mappings.
const SMAPS: &str = "smaps";

/// The mappings of a stopped process, before anything of ours is mapped.
pub(crate) fn mappings(pid: Pid) -> Result<Vec<Mapping>> {
    mappings_by(pid, SMAPS)
}

/// The same without what is expensive: where they are, and what of.
pub(crate) fn places(pid: Pid) -> Result<Vec<Mapping>> {
    mappings_by(pid, "maps")
}

fn mappings_by(pid: Pid, file: &str) -> Result<Vec<Mapping>> {
    let mut mappings = Vec::new();
    read::some_lines_each(pid, file, |lines| note_mappings(pid, lines, &mut mappings))?;
    Ok(mappings)
}

fn note_mappings(pid: Pid, lines: &[u8], mappings: &mut Vec<Mapping>) -> Result<()> {
    read::understood(pid, smaps::parse_some(lines, mappings))
}

/// What describing an address space asks the process itself.
pub(crate) struct Asked {
    brk: Call,
    keys: Vec<Call>,
    locks: (u64, Call),
    /// Of the first mappings.
    modes: Modes,
    policies: Vec<RangePolicy>,
}

pub(crate) fn ask(batch: &mut Batch, mappings: &[Mapping]) -> Asked {
    let brk = batch.call(sys::brk, &[0]);
    let (keys, locks) = (keys::ask(batch), locks::ask(batch));
    Asked { brk, keys, locks, modes: Modes::ask(mappings, batch), policies: Vec::new() }
}

impl Asked {
    /// What has to be asked about mappings after the first answers.
    pub(crate) fn ask_more(
        &mut self,
        answers: &Answers,
        puppet: &mut Puppet<'_>,
        mappings: &[Mapping],
    ) -> Result<()> {
        self.policies = policy::of_all(mappings, (&self.modes, answers), puppet)?;
        Ok(())
    }
}

/// Describes an address space, but for its pages. `None` when something in it is refused.
pub(crate) fn describe(
    process: &Process,
    mappings: &[Mapping],
    (asked, answers): (&Asked, &Answers),
    vdso: &Vdso,
    (objects, ghosts): (&mut SharedObjects, &mut Ghosts),
    report: &mut Report,
) -> Result<Option<AddressSpace>> {
    let mut files = Files::default();
    let mut vmas = Vec::with_capacity(mappings.len());
    let mut refused = false;
    for mapping in mappings.iter().filter(|mapping| mapping.name != b"[vsyscall]") {
        match classify(process.speaker(), mapping, &mut files, objects, ghosts)? {
            Ok(backing) => vmas.push(vma(mapping, backing)),
            Err(reason) => {
                refused = true;
                report.refuse(reason.refusal(process.pid, subject(mapping)));
            }
        }
    }
    for policy in &asked.policies {
        let of_it = vmas.iter().find(|vma| vma.start == policy.range().start);
        if let Some(vma) = of_it.filter(|vma| !vma.is_anonymous()) {
            let reason = "a memory policy (mbind) of memory that others can share is not supported";
            report.refuse(Refusal::new(process.pid, vma.subject(), reason));
            refused = true;
        }
    }
    let keys = match Keys::describe(&asked.keys, answers, &vmas) {
        Ok(keys) => keys,
        Err(reason) => {
            report.attribute(process.pid, "protection keys", reason);
            return Ok(None);
        }
    };
    let executable = match executable(process.speaker(), ghosts)? {
        Ok(executable) => executable,
        Err(reason) => {
            report.refuse(reason.refusal(process.pid, Subject::Attribute("executable")));
            return Ok(None);
        }
    };
    let layout = Layout::describe(process, answers.get(asked.brk)?)?;
    let space = AddressSpace {
        layout,
        executable,
        files: files.list,
        vmas,
        runs: Vec::new(),
        vdso: vdso.sum(),
        guards: Vec::new(),
        policies: asked.policies.clone(),
        keys,
        future_locks: FutureLocks::describe(asked.locks, answers, process.speaker())?,
    };
    Ok((!refused).then_some(space))
}

/// Where the vdso is.
pub(crate) fn vdso(mappings: &[Mapping]) -> Option<Range<u64>> {
    let vdso = mappings.iter().find(|mapping| mapping.name == b"[vdso]");
    vdso.map(|mapping| mapping.start..mapping.end)
}

pub(crate) fn subject(mapping: &Mapping) -> Subject {
    let what = String::from_utf8_lossy(&mapping.raw_name()).into_owned();
    Subject::Vma { start: mapping.start, end: mapping.end, what }
}

fn vma(mapping: &Mapping, backing: Backing) -> Vma {
    let set = TRAITS.iter().filter(|(flag, _)| mapping.flags.contains(*flag));
    let mut traits = set.fold(Traits::empty(), |traits, (_, one)| traits | *one);
    if !matches!(backing, Backing::File { shared: true, .. } | Backing::Shared { .. }) {
        traits -= Traits::FOR_WRITING;
    }
    Vma {
        start: mapping.start,
        end: mapping.end,
        prot: mapping.prot.bits(),
        traits: traits.bits(),
        key: mapping.protection_key as u8,
        huge: if mapping.flags.contains(VmFlags::HUGETLB) { huge_shift(mapping) } else { 0 },
        offset: mapping.offset,
        backing,
    }
}

fn huge_shift(mapping: &Mapping) -> u8 {
    mapping.kernel_page_size_kb.saturating_mul(1024).trailing_zeros() as u8
}

/// The files that mappings are of, each once.
#[derive(Default)]
struct Files {
    list: Vec<FileRef>,
    known: BTreeMap<FileRef, u32>,
    /// By name, device and inode: a program maps each of its files several times.
    seen: BTreeMap<(Vec<u8>, Device, u64), u32>,
}

impl Files {
    fn of(
        &mut self,
        pid: Pid,
        mapping: &Mapping,
        ghosts: &mut Ghosts,
    ) -> Result<std::result::Result<u32, Reason>> {
        let key = (mapping.name.clone(), mapping.device, mapping.inode);
        if let Some(index) = self.seen.get(&key).filter(|_| !mapping.deleted) {
            return Ok(Ok(*index));
        }
        Ok(mapped_file(pid, mapping, ghosts)?.map(|file| {
            let index = self.index(file);
            self.seen.insert(key, index);
            index
        }))
    }

    fn index(&mut self, file: FileRef) -> u32 {
        let next = self.list.len() as u32;
        *self.known.entry(file).or_insert_with_key(|file| {
            self.list.push(file.clone());
            next
        })
    }
}

type Classified = std::result::Result<Backing, Reason>;

fn classify(
    pid: Pid,
    mapping: &Mapping,
    files: &mut Files,
    objects: &mut SharedObjects,
    ghosts: &mut Ghosts,
) -> Result<Classified> {
    let named = match without_file(pid, mapping, objects) {
        Some(classified) => return Ok(classified),
        None => files.of(pid, mapping, ghosts)?,
    };
    Ok(named.map(|index| Backing::File { index, shared: mapping.shared }))
}

/// What is not of a file.
fn without_file(pid: Pid, mapping: &Mapping, objects: &mut SharedObjects) -> Option<Classified> {
    let name = mapping.name.as_slice();
    if matches!(name, b"[vdso]" | b"[vvar]" | b"[vvar_vclock]") {
        let reason = "the kernel's own mappings are sealed here: they could not be moved to their places";
        return Some(match mapping.flags.contains(VmFlags::SEALED) {
            true => Err(reason.into()),
            false => Ok(Backing::Special { name: name.to_vec().into() }),
        });
    }
    if let Some(reason) = unsupported(mapping) {
        return Some(Err(reason.into()));
    }
    if mapping.flags.contains(VmFlags::HUGETLB) {
        let reason = "a System V segment of huge pages (SHM_HUGETLB) is not supported";
        return name.starts_with(b"/SYSV").then(|| Err(reason.into()));
    }
    if mapping.inode == 0 && mapping.device == Default::default() {
        return Some(anonymous(name));
    }
    let nameless = name == b"/dev/zero" || name.starts_with(b"/SYSV");
    if mapping.shared && mapping.deleted && nameless && objects.has_no_file(mapping) {
        let object = objects.number(pid, mapping);
        return Some(object.map(|object| Backing::Shared { object }).map_err(Reason::from));
    }
    match name.starts_with(b"anon_inode:") || matches!(name, b"/[aio]" | b"/secretmem") {
        true => {
            Some(Err("memory of this kind (io_uring, AIO ring, memfd_secret ...) is not supported".into()))
        }
        false => None,
    }
}

fn anonymous(name: &[u8]) -> Classified {
    match name {
        b"" | b"[heap]" | b"[stack]" => Ok(Backing::Anonymous { name: None }),
        _ => match name.strip_prefix(b"[anon:").and_then(|rest| rest.strip_suffix(b"]")) {
            Some(name) => Ok(Backing::Anonymous { name: Some(name.to_vec().into()) }),
            None => Err("a mapping of an unknown kind".into()),
        },
    }
}

/// By a userfaultfd, be it the process's own or of a tracker that was not passed to us.
pub(crate) fn is_watched(mapping: &Mapping) -> Option<&'static str> {
    if mapping.flags.intersects(VmFlags::UFFD_MISSING | VmFlags::UFFD_MINOR) {
        return Some("memory watched by userfaultfd is not supported");
    }
    let reason =
        "memory watched by userfaultfd is not supported; if it is by a Tracker, pass it to the checkpoint";
    mapping.flags.contains(VmFlags::UFFD_WP).then_some(reason)
}

/// Properties that no mapping may have yet.
fn unsupported(mapping: &Mapping) -> Option<&'static str> {
    let reasons = [
        (VmFlags::PFN_MAP, "the memory of a device cannot be saved"),
        (VmFlags::IO, "the memory of a device cannot be saved"),
        (VmFlags::MIXED_MAP, "the memory of a device cannot be saved"),
        (VmFlags::DROPPABLE | VmFlags::LOCKED, "droppable memory that is locked is not supported"),
        (VmFlags::SHADOW_STACK, "shadow stacks are not supported"),
        (VmFlags::SYNC, "MAP_SYNC is not supported"),
    ];
    let flagged = reasons.iter().find(|(flag, _)| mapping.flags.contains(*flag)).map(|(_, reason)| *reason);
    flagged
        .or_else(|| is_watched(mapping))
        .or((!mapping.unknown_flags.is_empty()).then_some("it has properties (VmFlags) that are not known"))
}

fn mapped_file(
    pid: Pid,
    mapping: &Mapping,
    ghosts: &mut Ghosts,
) -> Result<std::result::Result<FileRef, Reason>> {
    use std::os::unix::ffi::OsStrExt;
    let name = mapping.raw_name();
    let way = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    let named = lstat(std::ffi::OsStr::from_bytes(&name)).ok().filter(|named| {
        let device = (nix::sys::stat::major(named.st_dev) as u32, nix::sys::stat::minor(named.st_dev) as u32);
        named.st_ino == mapping.inode && device == (mapping.device.major, mapping.device.minor)
    });
    // Some file systems show another device in maps than in stat(2): then the mapping itself is looked at.
    let actual = match named {
        Some(named) => named,
        None => match stat(way.as_str()) {
            Ok(actual) => actual,
            Err(_) => {
                let why = "the mapped file has no name any more: it can only be looked at with \
                           CAP_CHECKPOINT_RESTORE in the initial user namespace";
                return Ok(Err(why.into()));
            }
        },
    };
    let mut file = FileRef::describe(&name, &actual, &way, ghosts)?;
    file.iter_mut().try_for_each(|file| ghosts.note_build_id(file, &way))?;
    if let (Ok(file), true) = (&file, mapping.flags.contains(VmFlags::SHARED)) {
        ghosts.note_mapping(file, pid, mapping.flags.contains(VmFlags::MAY_WRITE));
    }
    Ok(file)
}

fn executable(pid: Pid, ghosts: &mut Ghosts) -> Result<std::result::Result<FileRef, Reason>> {
    let way = format!("/proc/{pid}/exe");
    let stat = stat(way.as_str()).call("stat").of(pid)?;
    let mut file = FileRef::describe(&read::link(pid, "exe")?, &stat, &way, ghosts)?;
    file.iter_mut().try_for_each(|file| ghosts.note_build_id(file, &way))?;
    Ok(file)
}

impl AddressSpace {
    /// Checks what building relies on: an image is not trusted.
    pub(crate) fn check(&self) -> Result<()> {
        let bad = |why: &str| Err(Error::new(ErrorKind::Image, format!("address space: {why}")));
        let page = |address: u64| address.is_multiple_of(crate::sys::PAGE);
        let mut end = 0;
        for vma in &self.vmas {
            if vma.start < end
                || vma.end <= vma.start
                || vma.end > ADDRESS_END
                || !page(vma.start)
                || !page(vma.end)
            {
                return bad("mappings that overlap, are out of order or out of bounds");
            }
            if vma.prot > 7 || !page(vma.offset) || vma.offset.checked_add(vma.len()).is_none() {
                return bad("a mapping with impossible properties");
            }
            if matches!(vma.backing, Backing::File { index, .. } if index as usize >= self.files.len()) {
                return bad("a mapping of a file that is not listed");
            }
            if vma.huge != 0
                && (PageShift::new(vma.huge).is_none() || !matches!(vma.backing, Backing::File { .. }))
            {
                return bad("impossible huge pages");
            }
            end = vma.end;
        }
        if !self.guards.iter().all(|(start, end)| {
            start < end
                && self.vma_at(*start).is_some_and(|vma| *end <= vma.end && page(*start) && page(*end))
        }) {
            return bad("guard regions outside of its mappings");
        }
        if !self.policies.iter().all(|policy| policy.is_possible(self)) {
            return bad("memory policies outside of its mappings");
        }
        if !self.keys.is_possible(&self.vmas) {
            return bad("impossible protection keys");
        }
        self.check_runs()
    }

    fn check_runs(&self) -> Result<()> {
        let mut vmas = self.vmas.iter().filter(|vma| vma.is_private()).peekable();
        for run in &self.runs {
            while vmas.next_if(|vma| vma.end <= run.addr).is_some() {}
            let inside = vmas.peek().is_some_and(|vma| {
                vma.start <= run.addr && run.addr.checked_add(run.len).is_some_and(|end| end <= vma.end)
            });
            if !inside || run.len == 0 || !(run.addr | run.len).is_multiple_of(crate::sys::PAGE) {
                return Err(Error::new(ErrorKind::Image, "address space: pages outside of its mappings"));
            }
        }
        Ok(())
    }

    /// The mapping with this address.
    pub(crate) fn vma_at(&self, address: u64) -> Option<&Vma> {
        let index = self.vmas.partition_point(|vma| vma.end <= address);
        self.vmas.get(index).filter(|vma| vma.start <= address)
    }
}

/// The end of the address space of programs with four-level page tables (TASK_SIZE is a page less).
pub(crate) const ADDRESS_END: u64 = 0x7fff_ffff_f000;
