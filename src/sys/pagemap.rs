//! /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst): which pages are populated, and with what
//! (PAGEMAP_SCAN, since Linux 6.7), and which are the same.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use bitflags::bitflags;

bitflags! {
    /// What PAGEMAP_SCAN says of a page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Page: u64 {
        const WPALLOWED = 1 << 0;
        const WRITTEN = 1 << 1;
        /// It belongs to the page cache (a file's or shared memory's), not to this mapping alone.
        const FILE = 1 << 2;
        const PRESENT = 1 << 3;
        const SWAPPED = 1 << 4;
        /// The shared page of zeroes.
        const PFNZERO = 1 << 5;
        const HUGE = 1 << 6;
        const SOFT_DIRTY = 1 << 7;
        /// A guard region (MADV_GUARD_INSTALL).
        const GUARD = 1 << 8;
    }
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArg);

/// A longer output vector can come back with a stale end of walk.
const REGIONS: usize = 512;

/// What a scan looks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    /// A page must have any of these...
    pub(crate) any: Page,
    /// ... and none of these.
    pub(crate) none: Page,
}

/// Calls `found` with every run of pages in `range` that the query matches, in order, and which of `any` they have.
pub(crate) fn scan(
    pagemap: &File,
    range: Range<u64>,
    query: Query,
    found: impl FnMut(Range<u64>, Page),
) -> nix::Result<()> {
    let arg = ScanArg {
        category_inverted: query.none.bits(),
        category_mask: query.none.bits(),
        category_anyof_mask: query.any.bits(),
        return_mask: query.any.bits(),
        ..ScanArg::default()
    };
    walk(pagemap, range, arg, found)
}

/// The pages that have been written to since they were protected, and all that are not protected, holes too. Nothing
/// else is asked for: the kernel has a short cut for that.
pub(crate) fn written(
    pagemap: &File,
    range: Range<u64>,
    found: impl FnMut(Range<u64>, Page),
) -> nix::Result<()> {
    let mask = Page::WRITTEN.bits();
    walk(pagemap, range, ScanArg { category_mask: mask, return_mask: mask, ..ScanArg::default() }, found)
}

/// Protects what there is in a mapping that is registered for that (userfaultfd(2)), but no holes, for which that would
/// take page tables: what comes into them is written. EPERM: it is not registered.
pub(crate) fn protect(pagemap: &File, range: Range<u64>) -> nix::Result<()> {
    const WP_MATCHING: u64 = 1;
    const CHECK_WPASYNC: u64 = 2;
    let mask = Page::WRITTEN.bits();
    let arg = ScanArg {
        flags: WP_MATCHING | CHECK_WPASYNC,
        category_mask: mask,
        category_anyof_mask: (Page::PRESENT | Page::SWAPPED).bits(),
        return_mask: mask,
        ..ScanArg::default()
    };
    walk(pagemap, range, arg, |_, _| ())
}

/// Is a mapping with this page registered for being protected?
pub(crate) fn is_watched(pagemap: &File, page: Range<u64>) -> nix::Result<bool> {
    let mask = Page::WPALLOWED.bits();
    let mut watched = false;
    let arg = ScanArg { category_mask: mask, return_mask: mask, ..ScanArg::default() };
    walk(pagemap, page, arg, |_, _| watched = true)?;
    Ok(watched)
}

fn walk(
    pagemap: &File,
    range: Range<u64>,
    arg: ScanArg,
    mut found: impl FnMut(Range<u64>, Page),
) -> nix::Result<()> {
    let mut regions = [Region::default(); REGIONS];
    let mut at = range.start;
    while at < range.end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: at,
            end: range.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            ..arg
        };
        // SAFETY: `arg` has the kernel's layout and size; its vector points to `vec_len` live regions.
        let filled = unsafe { pagemap_scan(pagemap.as_raw_fd(), &mut arg) }? as usize;
        for region in regions.iter().take(filled) {
            found(region.start..region.end, Page::from_bits_truncate(region.categories));
        }
        if arg.walk_end <= at {
            break;
        }
        at = arg.walk_end;
    }
    Ok(())
}

/// A page of the machine's memory, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame(std::num::NonZeroU64);

/// In which frames pages are, from this address on. None: in none, in one that nobody else has, or it is not for us to
/// know.
pub(crate) fn shared_frames(pagemap: &File, start: u64, pages: u64) -> std::io::Result<Vec<Option<Frame>>> {
    const ENTRY: u64 = 8;
    const PRESENT: u64 = 1 << 63;
    /// Mapped exactly once.
    const EXCLUSIVE: u64 = 1 << 56;
    const NUMBER: u64 = (1 << 55) - 1;
    let mut entries = vec![0; (pages * ENTRY) as usize];
    pagemap.read_exact_at(&mut entries, start / super::PAGE * ENTRY)?;
    let frame = |entry: &[u8]| {
        let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
        let number = if entry & (PRESENT | EXCLUSIVE) == PRESENT { entry & NUMBER } else { 0 };
        std::num::NonZeroU64::new(number).map(Frame)
    };
    Ok(entries.chunks_exact(ENTRY as usize).map(frame).collect())
}
