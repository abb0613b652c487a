//! What a process has written since its last image: by write protection that the kernel takes off by itself, once for
//! each page (userfaultfd(2), UFFD_FEATURE_WP_ASYNC), and tells us about (PAGEMAP_SCAN).
//!
//! Only private anonymous memory is tracked, and only at a full stop is it looked at and protected. A mapping is
//! believed if it was registered by our very descriptor all the time since: one that was moved, replaced or made anew
//! is not, nor is another program's. Of everything else the pages are compared with what the parent image has.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use super::inside::{closes, free_numbers};
use super::parent::Parent;
use crate::Pid;
use crate::error::{Context, ErrorKind, NameCall, Result, Subject};
use crate::proc::Device;
use crate::proc::smaps::{Mapping, VmFlags};
use crate::sys::{PAGE, pagemap, pidfd, uffd};
use crate::tracee::{Puppet, sys};

/// Notes which pages of a tree are written between one checkpoint and the next, so that the next need not look at the
/// others: for as long as the same tracker is passed to each [`Checkpoint::tracker`](crate::Checkpoint::tracker), and
/// each image is the [`parent`](crate::Checkpoint::parent) of the next. Otherwise pages are compared.
///
/// It holds a descriptor for each process, by which its memory is write-protected. A process notices nothing, but that
/// each page takes a microsecond longer when it is written to for the first time, and that it cannot register
/// memory that is tracked with a userfaultfd of its own. Dropping the tracker ends all of that. Another process can go
/// on with it: [`send`](Self::send).
///
/// ```
/// use cryosleep::{AfterDump, Checkpoint, Tracker};
/// # fn hourly(pid: u32) -> cryosleep::Result<()> {
/// let mut tracker = Tracker::new();
/// Checkpoint::of(pid).after(AfterDump::Resume).tracker(&mut tracker).write_to("/var/lib/images/1")?;
/// let next = Checkpoint::of(pid).after(AfterDump::Resume).tracker(&mut tracker);
/// let dumped = next.parent("/var/lib/images/1").write_to("/var/lib/images/2")?;
/// println!("{} pages were written meanwhile", dumped.stats.pages_written);
/// # Ok(()) }
/// ```
#[derive(Debug, Default)]
pub struct Tracker {
    /// The id of the image since which it knows what was written.
    pub(super) since: Option<[u8; 16]>,
    pub(super) watches: Vec<Watch>,
}

/// The part of a [`Tracker`] that belongs to one process.
#[derive(Debug)]
pub(super) struct Watch {
    /// Whose memory it is.
    pub(super) pid: Pid,
    /// A userfaultfd of that memory.
    pub(super) descriptor: OwnedFd,
}

/// A watch that has been recognised, and the mapping by which: none if it was made for another process, that shared the
/// memory and has ended. Then it is not to be believed.
type Found<'t> = (&'t Watch, Option<Range<u64>>);

impl Tracker {
    /// One that knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// From here on it belongs to no image, until there is a new one. Is what it knows about this one?
    pub(crate) fn begin(&mut self, parent: Option<&Parent>) -> bool {
        let since = self.since.take();
        since.is_some() && since == parent.map(|parent| parent.image().manifest().id)
    }

    /// It knows what these processes write from now on.
    pub(crate) fn belong_to(&mut self, image: [u8; 16], pids: &[Pid]) {
        self.since = Some(image);
        self.watches.retain(|watch| pids.contains(&watch.pid));
    }

    /// Which mappings of a stopped process it has been watching all the time. They lose the mark of that: nobody has to
    /// know.
    pub(crate) fn recognise(&mut self, pid: Pid, mappings: &mut [Mapping]) -> Result<Vec<Range<u64>>> {
        let marked = mappings.iter().filter(|mapping| mapping.flags.contains(VmFlags::UFFD_WP));
        let mut marked: Vec<Range<u64>> = marked.map(range_of).collect();
        if marked.is_empty() {
            // Another program runs there now.
            self.watches.retain(|watch| watch.pid != pid);
            return Ok(Vec::new());
        }
        marked.sort_by_key(|range| range.end - range.start);
        let Some((watch, probe)) = self.watch_of(pid, &marked)? else { return Ok(Vec::new()) };
        let mut watched = Vec::new();
        for mapping in mappings.iter_mut().filter(|mapping| mapping.flags.contains(VmFlags::UFFD_WP)) {
            let range = range_of(mapping);
            // It would be busy if it were somebody else's.
            if uffd::register_writes(watch.descriptor.as_fd(), range.clone()).is_ok() {
                mapping.flags.remove(VmFlags::UFFD_WP);
                // Of the probe what was noted is lost.
                watched.extend(probe.as_ref().is_some_and(|probe| *probe != range).then_some(range));
            }
        }
        Ok(watched)
    }

    /// The one whose descriptor is of this process's memory.
    fn watch_of(&mut self, pid: Pid, marked: &[Range<u64>]) -> Result<Option<Found<'_>>> {
        let mut own_first: Vec<usize> = (0..self.watches.len()).collect();
        own_first.sort_by_key(|index| self.watches.get(*index).is_none_or(|watch| watch.pid != pid));
        for index in own_first {
            let Some(watch) = self.watches.get_mut(index) else { continue };
            let uffd = watch.descriptor.as_fd();
            // What is another's is busy.
            let free = marked.iter().find(|range| uffd::register_writes(uffd, (*range).clone()).is_ok());
            let Some(probe) = free else { continue };
            if is_of(uffd, pid, probe)? {
                let of_it = watch.pid == pid;
                watch.pid = pid;
                return Ok(self.watches.get(index).map(|watch| (watch, of_it.then(|| probe.clone()))));
            }
        }
        Ok(None)
    }

    /// Protects all memory of a stopped process that can be tracked, as it is now.
    pub(crate) fn watch(
        &mut self,
        pid: Pid,
        mappings: &[Mapping],
        make: impl FnOnce() -> Result<Option<OwnedFd>>,
    ) -> Result<()> {
        if !self.watches.iter().any(|watch| watch.pid == pid) {
            match make() {
                Ok(Some(descriptor)) => self.watches.push(Watch { pid, descriptor }),
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::TaskGone => return Err(error),
                // Not allowed here, or it has no descriptor left: its pages will be compared.
                Err(error) => {
                    tracing::debug!(%error, %pid, "its writes cannot be tracked");
                    return Ok(());
                }
            }
        }
        let Some(watch) = self.watches.iter().find(|watch| watch.pid == pid) else { return Ok(()) };
        let pagemap = pagemap_of(pid)?;
        for mapping in mappings.iter().filter(|mapping| can_be_watched(mapping)) {
            let range = range_of(mapping);
            if uffd::register_writes(watch.descriptor.as_fd(), range.clone()).is_ok() {
                // What is not protected counts as written.
                let protected = pagemap::protect(&pagemap, range);
                protected.call("ioctl(PAGEMAP_SCAN)").about(|| super::subject(mapping))?;
            }
        }
        Ok(())
    }
}

/// What of a process's memory the parent image must still have, by what is known of its writes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stock {
    /// Mappings that are believed.
    watched: Vec<Range<u64>>,
    /// What has been written in them.
    written: Vec<Range<u64>>,
}

impl Stock {
    pub(crate) fn take(pid: Pid, watched: &[Range<u64>]) -> Result<Self> {
        let mut stock = Self { watched: watched.to_vec(), written: Vec::new() };
        if watched.is_empty() {
            return Ok(stock);
        }
        let pagemap = pagemap_of(pid)?;
        for range in watched {
            pagemap::written(&pagemap, range.clone(), |range, _| stock.written.push(range))
                .call("ioctl(PAGEMAP_SCAN)")?;
        }
        Ok(stock)
    }

    /// Divides populated ranges: what has not been written, and what cannot be told. What has been is in neither.
    /// Of a page that is swapped out, the mark cannot be told from what is left of one that was dropped.
    pub(super) fn divide(
        &self,
        ranges: &[Range<u64>],
        swapped: &[Range<u64>],
    ) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        use super::kin::without;
        let believed = without(&self.watched, swapped.iter().cloned());
        let doubtful = without(ranges, believed.into_iter());
        let told = without(ranges, doubtful.iter().cloned());
        (without(&told, self.written.iter().cloned()), doubtful)
    }
}

/// Makes the kernel note writes of a process: it makes the descriptor, and we take it.
pub(crate) fn descriptor(puppet: &mut Puppet<'_>) -> Result<OwnedFd> {
    let uffd = take_uffd(puppet)?;
    uffd::handshake_with(uffd.as_fd(), uffd::NOTE_WRITES)
        .call("ioctl(UFFDIO_API)")
        .hint("tracking needs Linux 6.7")?;
    Ok(uffd)
}

/// A userfaultfd of a task's memory, of which the task has nothing left.
pub(super) fn take_uffd(puppet: &mut Puppet<'_>) -> Result<OwnedFd> {
    let numbers = free_numbers(puppet.tracee().tid(), 1)?;
    puppet.if_we_die(closes(&numbers));
    let mut batch = puppet.batch();
    let flags = uffd::USER_MODE_ONLY | (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let made = batch.call(sys::userfaultfd, &[flags]);
    let number = puppet.run(batch)?.get(made)?;
    let ours = pidfd::open(puppet.tgid()).call("pidfd_open");
    let ours = ours.and_then(|pidfd| pidfd::get_fd(pidfd.as_fd(), number as RawFd).call("pidfd_getfd"));
    puppet.if_we_die(Vec::new());
    let mut batch = puppet.batch();
    batch.call(sys::close, &[number]);
    puppet.run(batch)?.check()?;
    ours
}

/// Is the descriptor of this process's memory? Then what is done by it to a mapping can be seen there. It must not be
/// another's: before Linux 6.16 anybody could take that off.
fn is_of(uffd: BorrowedFd<'_>, pid: Pid, probe: &Range<u64>) -> Result<bool> {
    let pagemap = pagemap_of(pid)?;
    let page = probe.start..probe.start + PAGE;
    let watched = || pagemap::is_watched(&pagemap, page.clone()).call("ioctl(PAGEMAP_SCAN)");
    let marked = watched()?;
    let taken_off = uffd::unregister(uffd, probe.clone()).is_ok() && !watched()?;
    let put_on = uffd::register_writes(uffd, probe.clone()).is_ok() && watched()?;
    Ok(marked && taken_off && put_on)
}

/// Private anonymous memory, and nothing special about it.
fn can_be_watched(mapping: &Mapping) -> bool {
    let special = VmFlags::HUGETLB
        | VmFlags::DROPPABLE
        | VmFlags::PFN_MAP
        | VmFlags::IO
        | VmFlags::MIXED_MAP
        | VmFlags::SHADOW_STACK
        | VmFlags::UFFD_MISSING
        | VmFlags::UFFD_WP
        | VmFlags::UFFD_MINOR;
    let anonymous = !mapping.shared && mapping.inode == 0 && mapping.device == Device::default();
    anonymous && super::anonymous(&mapping.name).is_ok() && !mapping.flags.intersects(special)
}

fn range_of(mapping: &Mapping) -> Range<u64> {
    mapping.start..mapping.end
}

pub(super) fn pagemap_of(pid: Pid) -> Result<File> {
    let path = format!("/proc/{pid}/pagemap");
    File::open(&path).call("open").about(|| Subject::Path(path.into())).of(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_not_to_have_been_written_is_believed() {
        let ranges = |list: &[(u64, u64)]| list.iter().map(|(start, end)| *start..*end).collect::<Vec<_>>();
        let stock = Stock { watched: ranges(&[(10, 20), (30, 40)]), written: ranges(&[(12, 13), (35, 40)]) };
        let divide = |populated: &[(u64, u64)], swapped: &[(u64, u64)]| {
            let (quiet, doubtful) = stock.divide(&ranges(populated), &ranges(swapped));
            (quiet, doubtful)
        };
        // Holes are in nothing, though they count as written or are not reported at all.
        let all = [(5, 14), (16, 18), (25, 36), (50, 60)];
        let quiet = ranges(&[(10, 12), (13, 14), (16, 18), (30, 35)]);
        assert_eq!(divide(&all, &[]), (quiet, ranges(&[(5, 10), (25, 30), (50, 60)])));
        // What is left of a page that was dropped looks like one that is swapped out.
        let quiet = ranges(&[(10, 11), (13, 14), (16, 18), (30, 33), (34, 35)]);
        let doubtful = ranges(&[(5, 10), (11, 12), (25, 30), (33, 34), (50, 60)]);
        assert_eq!(divide(&all, &[(11, 12), (33, 34)]), (quiet, doubtful));
        let nothing = Stock::default();
        assert_eq!(nothing.divide(&ranges(&all), &[]), (Vec::new(), ranges(&all)));
    }
}
