//! hugetlbfs: files of huge pages, which can be read and mapped, but not written to.

use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

/// Where mmap(2) and memfd_create(2) have the size of a page in their flags, as its binary logarithm.
const SHIFT: i32 = 26;

/// The size of a huge page as its binary logarithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageShift(u8);

impl PageShift {
    pub(crate) fn new(shift: u8) -> Option<Self> {
        (13..40).contains(&shift).then_some(Self(shift))
    }

    pub(crate) fn get(self) -> u8 {
        self.0
    }

    /// In bytes.
    pub(crate) fn size(self) -> u64 {
        1 << self.0
    }

    pub(crate) fn memfd_flags(self) -> MFdFlags {
        MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(u32::from(self.0) << SHIFT)
    }
}

/// The size of its pages, if it is a file of hugetlbfs.
pub(crate) fn page_of(file: impl AsFd) -> nix::Result<Option<PageShift>> {
    let system = fstatfs(file)?;
    let size = u64::try_from(system.block_size()).unwrap_or(0);
    let is_huge = system.filesystem_type() == HUGETLBFS_MAGIC && size.is_power_of_two();
    Ok(PageShift::new(size.trailing_zeros() as u8).filter(|_| is_huge))
}

/// The device of memory of such pages that has no file of its own: anonymous, or a memfd.
pub(crate) fn memory_device(page: PageShift) -> nix::Result<libc::dev_t> {
    let file = memfd_create(c"", MFdFlags::MFD_CLOEXEC | page.memfd_flags())?;
    fstat(&file).map(|stat| stat.st_dev)
}

/// A mapping of ours, as long as it is needed.
struct Mapped(NonNull<libc::c_void>, usize);

impl Mapped {
    fn range(&self) -> (usize, usize) {
        let start = self.0.as_ptr() as usize;
        (start, start + self.1)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range is a mapping that this value owns, and no reference into it was ever made.
        let _ = unsafe { munmap(self.0, self.1) };
    }
}

fn length(len: u64) -> nix::Result<NonZeroUsize> {
    usize::try_from(len).ok().and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)
}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// The file that mmap(2) makes for anonymous memory of huge pages, to be opened by /proc/self/fd. Takes no pages.
pub(crate) fn anonymous(page: PageShift, len: u64) -> nix::Result<OwnedFd> {
    let kind = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::MAP_HUGETLB;
    let kind = kind | MapFlags::from_bits_retain(i32::from(page.0) << SHIFT);
    let len = length(len)?;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let mapped = Mapped(unsafe { mmap_anonymous(None, len, READ_WRITE, kind) }?, len.get());
    let (start, end) = mapped.range();
    let way = format!("/proc/self/map_files/{start:x}-{end:x}");
    open(way.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
}

/// Writes into such a file, which must be open for both directions. ENOSPC: there are not enough huge pages.
pub(crate) fn write(file: &File, page: PageShift, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    let start = offset & !(page.size() - 1);
    let end = offset.saturating_add(bytes.len() as u64).next_multiple_of(page.size());
    fallocate(file, FallocateFlags::empty(), start as i64, (end - start) as i64)?;
    let len = length(end - start)?;
    // SAFETY: a new mapping at an address that the kernel chooses.
    let mapped = unsafe { mmap(None, len, READ_WRITE, MapFlags::MAP_SHARED, file, start as i64) }?;
    let mapped = Mapped(mapped, len.get());
    // By the kernel: should a page be missing after all, that is an error and no SIGBUS.
    let memory = OpenOptions::new().write(true).open("/proc/self/mem")?;
    memory.write_all_at(bytes, mapped.range().0 as u64 + (offset - start))
}
