//! Pre-dump: pages ahead of the checkpoint that needs them. The tree stands still only for as long as it takes to see
//! what there is, and to protect it; the pages are read while it runs. What is written meanwhile the next image has.

use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use tracing::{debug, info_span};

use super::borrowed::Borrowed;
use super::{
    AfterDump, Checkpoint, CheckpointStats, Dumped, Tracking, freeze_program, look_first, on_own_thread,
    sleep_precisely,
};
use crate::Pid;
use crate::error::{Context, Error, Phase, Refusal, Result, Subject};
use crate::freeze::Process;
use crate::hooks::{Event, vetoed};
use crate::image::{ImageWriter, ManifestInfo, Owner, Records};
use crate::proc::read;
use crate::proc::smaps::{Mapping, VmFlags};
use crate::resource::Report;
use crate::resource::fds::{OldNames, open_fds};
use crate::resource::memory::{
    Kin, Own, PageWriter, Parent, Populated, PreDumped, Run, Span, Stock, is_watched, overlap, subject,
    without,
};
use crate::resource::tasks::sharing::{Kind, Shares};
use crate::resource::tasks::tree::Tree;
use crate::sys::PAGE;
use crate::tracee::Memory;

impl Checkpoint<'_> {
    /// Writes pages only, while the tree runs: an image that cannot be restored, but be the [`parent`](Self::parent) of
    /// one that can. That has to hold only what was written since, so that the tree stands still for less time, most of all
    /// if a [`tracker`](Self::tracker) knows what that is. A pre-dump may have a parent too.
    ///
    /// The tree always runs on. What is not private memory is left to the checkpoint.
    ///
    /// ```
    /// use cryosleep::{Checkpoint, Tracker};
    /// # fn move_away(pid: u32) -> cryosleep::Result<()> {
    /// let mut tracker = Tracker::new();
    /// Checkpoint::of(pid).tracker(&mut tracker).pre_dump("/var/lib/images/1")?;
    /// Checkpoint::of(pid).tracker(&mut tracker).parent("/var/lib/images/1").pre_dump("/var/lib/images/2")?;
    /// Checkpoint::of(pid).tracker(&mut tracker).parent("/var/lib/images/2").write_to("/var/lib/images/3")?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As for [`write_to`](Self::write_to), but that little is looked at: what the checkpoint will refuse
    /// [`preflight`](Self::preflight) says. What devices write to (io_uring, AIO) is refused here too, and memory that
    /// the process itself watches (userfaultfd).
    pub fn pre_dump(self, dir: impl AsRef<Path>) -> Result<Dumped> {
        let dir = dir.as_ref();
        on_own_thread(move || self.run_pre_dump(dir))
    }

    fn run_pre_dump(mut self, dir: &Path) -> Result<Dumped> {
        let root = self.root;
        let span = info_span!("pre-dump", root = root.get());
        let _entered = span.enter();
        let mut stats = CheckpointStats::default();
        let parent = self.parent.as_deref().map(Parent::open).transpose().in_phase(Phase::Read)?;
        let old = OldNames::of_image_in(dir);
        self.tell(Event::PreDump { root }).in_phase(Phase::Freeze)?;
        let mut tracker = self.tracker.take();
        let trusted = tracker.as_mut().is_some_and(|tracker| tracker.begin(parent.as_ref()));
        let mut tracking = Tracking { tracker, trusted };
        let seen = self.look(&mut tracking, &mut stats)?;
        let written = self.copy(&seen, dir, parent.as_ref(), &mut stats).in_phase(Phase::Write)?;
        old.remove();
        let pids: Vec<Pid> = seen.iter().map(|seen| seen.pid).collect();
        tracking.finish(written, &pids);
        self.tell(Event::PostDump { root }).in_phase(Phase::Release)?;
        Ok(Dumped { root, stats })
    }

    /// Stops the tree for a look at it.
    fn look(&mut self, tracking: &mut Tracking<'_>, stats: &mut CheckpointStats) -> Result<Vec<Seen>> {
        sleep_precisely();
        let started = Instant::now();
        let frozen = freeze_program(self.root, self.time_limit).in_phase(Phase::Freeze)?;
        stats.freezing = started.elapsed();
        stats.tasks = frozen.processes.iter().map(|process| process.threads.len() as u64).sum();
        debug!(processes = frozen.processes.len(), tasks = stats.tasks, "frozen");
        self.tell(Event::Frozen { root: self.root }).in_phase(Phase::Freeze)?;
        let mut report = Report::default();
        let Some(shares) = look_first(&frozen, &mut report).in_phase(Phase::Collect)? else {
            return Err(Error::unsupported(report.0).in_phase(Phase::Collect));
        };
        let borrowed = Borrowed::all(&frozen, &shares, tracking.tracker.as_deref_mut(), &mut report);
        let borrowed = borrowed.in_phase(Phase::Collect)?;
        for process in &frozen.processes {
            refuse_devices(process, &shares, &mut report).in_phase(Phase::Collect)?;
        }
        for process in borrowed.iter().filter(|process| process.owns_memory) {
            refuse_mapped_devices(process, &mut report);
            refuse_watched(process, &mut report);
        }
        if !report.0.is_empty() {
            return Err(Error::unsupported(report.0).in_phase(Phase::Collect));
        }
        let tree = Tree::describe(&frozen, &mut Report::default());
        let donors = tree.plan().map(|plan| plan.donors(&tree, |pid| shares.process(pid).get(Kind::Memory)));
        let donors = donors.unwrap_or_default();
        let mut seen: Vec<Seen> = Vec::new();
        for process in borrowed.iter().filter(|process| process.owns_memory) {
            let donor = donors.get(&process.process.number);
            let donor = seen.iter().find(|seen| donor == Some(&seen.number));
            let taken = Seen::of(process, donor, tracking).of(process.process.pid);
            seen.push(taken.in_phase(Phase::Describe)?);
        }
        borrowed.into_iter().try_for_each(Borrowed::give_back).in_phase(Phase::Release)?;
        drop(frozen);
        stats.frozen = started.elapsed() - stats.freezing;
        Ok(seen)
    }

    /// Reads what there was, and writes it; gives the image's id.
    fn copy(
        &mut self,
        seen: &[Seen],
        dir: &Path,
        parent: Option<&Parent>,
        stats: &mut CheckpointStats,
    ) -> Result<[u8; 16]> {
        let started = Instant::now();
        let image = ImageWriter::create(dir)?.durability(self.durability).pages(self.pages).pages_only();
        let mut image = match parent {
            Some(parent) => image.child_of(parent.image())?,
            None => image,
        };
        let hooks = &mut self.hooks;
        let mut progress = |progress| match hooks {
            Some(hooks) => vetoed(hooks.progress(progress)),
            None => Ok(()),
        };
        let mut pages = PageWriter::new(self.writers, parent, &mut progress);
        let mut records = Records::new()?;
        for process in seen {
            let runs = process.write(&mut pages, &mut image).of(process.pid)?;
            records.put(Owner(process.number), &PreDumped { runs })?;
        }
        let counts = pages.finish(&mut records)?;
        stats.memory = started.elapsed();
        stats.count(counts);
        let root = seen.first().map_or(self.root, |root| Pid::from(root.number));
        let written = image.finish(records, ManifestInfo { root })?;
        stats.bytes_written = written.bytes;
        Ok(written.id)
    }
}

/// A process as it was at the stop.
struct Seen {
    pid: Pid,
    number: u32,
    /// Of the address space that it had then, whatever it executes.
    memory: Memory,
    stock: Stock,
    /// But for what it shares with the one that bore it.
    data: Vec<Range<u64>>,
    swapped: Vec<Range<u64>>,
    /// Where pages of zeroes mean nothing.
    anonymous: Vec<Range<u64>>,
}

impl Seen {
    fn of(process: &Borrowed<'_>, donor: Option<&Self>, tracking: &mut Tracking<'_>) -> Result<Self> {
        let pid = process.process.speaker();
        let mappings = process.mappings.iter().filter(|mapping| mapping.name != b"[vsyscall]");
        let spans = mappings.map(|mapping| Span {
            range: mapping.start..mapping.end,
            private: !mapping.shared && !is_of_the_kernel(mapping),
        });
        let anonymous = process.mappings.iter().filter(|mapping| !mapping.shared && mapping.inode == 0);
        let Populated { data, swapped, .. } = process.pages.populated(&spans.collect::<Vec<_>>());
        // Where its pages will be in the image is not known yet; that they are the same is.
        let common = match donor {
            Some(donor) => {
                let place = |range: &Range<u64>| Run {
                    addr: range.start,
                    len: range.end - range.start,
                    segment: 0,
                    offset: range.start,
                };
                let runs: Vec<Run> = donor.data.iter().map(place).collect();
                Kin { pid: donor.pid, runs: &runs }.common(pid, &data)?
            }
            None => Vec::new(),
        };
        Ok(Self {
            pid,
            number: process.process.number,
            memory: Memory::open(pid)?,
            stock: tracking.take_stock(process, AfterDump::Resume)?,
            data: without(&data, common.iter().map(Run::range)),
            swapped,
            anonymous: anonymous.map(|mapping| mapping.start..mapping.end).collect(),
        })
    }

    /// What cannot be read any more has gone meanwhile: nothing is said of it.
    fn write(&self, pages: &mut PageWriter<'_>, image: &mut ImageWriter) -> Result<Vec<Run>> {
        let gone: Mutex<Vec<Range<u64>>> = Mutex::new(Vec::new());
        let source = |ranges: &[Range<u64>], mut buffer: &mut [u8]| {
            for range in ranges {
                let (head, rest) = buffer.split_at_mut((range.end - range.start) as usize);
                buffer = rest;
                if self.memory.read_protected(range.start, head).is_ok() {
                    continue;
                }
                for (address, page) in
                    range.clone().step_by(PAGE as usize).zip(head.chunks_mut(PAGE as usize))
                {
                    if self.memory.read_protected(address, page).is_err() {
                        let mut gone = gone.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        gone.push(address..address + PAGE);
                    }
                }
            }
            Ok(())
        };
        let sparse = |address| {
            let at = self.anonymous.partition_point(|range| range.end <= address);
            self.anonymous.get(at).is_some_and(|range| range.start <= address)
        };
        let Self { number, stock, data, swapped, .. } = self;
        let own = Own { number: *number, stock, data: data.clone(), swapped: swapped.clone() };
        let runs = pages.write_own(&own, &source, &sparse, image)?;
        let mut gone = gone.into_inner().unwrap_or_default();
        gone.sort_unstable_by_key(|range| range.start);
        Ok(overlap(&runs, &without(data, gone.into_iter())))
    }
}

/// Of no process, or of a kind that no checkpoint takes.
fn is_of_the_kernel(mapping: &Mapping) -> bool {
    let special = VmFlags::HUGETLB | VmFlags::PFN_MAP | VmFlags::IO | VmFlags::MIXED_MAP;
    mapping.flags.intersects(special) || mapping.name.starts_with(b"[v")
}

/// What has these open may have pages that a device, or the kernel for it, writes to without any trace in page tables,
/// now or later: they must not be taken for unchanged.
const WRITERS: [&[u8]; 5] =
    [b"anon_inode:[io_uring]", b"anon_inode:[vfio", b"anon_inode:kvm-", b"/dev/vfio", b"/dev/infiniband"];

const REASON: &str = "memory that is written past the page tables cannot be pre-dumped";

fn refuse_devices(process: &Process, shares: &Shares, report: &mut Report) -> Result<()> {
    for tid in shares.tables(process) {
        for fd in open_fds(tid)? {
            let what = read::link(tid, &format!("fd/{fd}"))?;
            if WRITERS.iter().any(|writer| what.starts_with(writer)) {
                let what = String::from_utf8_lossy(&what).into_owned();
                report.refuse(Refusal::new(process.pid, Subject::Fd { fd, what }, REASON));
            }
        }
    }
    Ok(())
}

/// Whoever reads it may have to wait for the process.
fn refuse_watched(process: &Borrowed<'_>, report: &mut Report) {
    for mapping in process.mappings.iter() {
        if let Some(reason) = is_watched(mapping) {
            report.refuse(Refusal::new(process.process.pid, subject(mapping), reason));
        }
    }
}

fn refuse_mapped_devices(process: &Borrowed<'_>, report: &mut Report) {
    let rings = process.mappings.iter().filter(|mapping| {
        let ring = mapping.name.starts_with(b"/[aio]") || mapping.name.starts_with(b"anon_inode:[io_uring]");
        ring || mapping.flags.intersects(VmFlags::PFN_MAP | VmFlags::IO) && !mapping.name.starts_with(b"[v")
    });
    for mapping in rings {
        report.refuse(Refusal::new(process.process.pid, subject(mapping), REASON));
    }
}
