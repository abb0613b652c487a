//! Shared memory that is no file: anonymous, or of System V. On restore the root of the tree has it before it
//! has children, who inherit it: anonymous memory has no name by which another process could map it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use nix::sys::stat::{major, minor};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Whence, lseek};

use super::kin::overlap;
use super::sysv::Segment;
use super::{PageWriter, Paged, Run};
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::freeze::{Frozen, Process};
use crate::image::{Decode, Encode, ImageSink, Owner, Record, Records, Tag};
use crate::proc::Device;
use crate::proc::shm::{self, Shm};
use crate::proc::smaps::{Mapping, VmFlags};
use crate::resource::Report;
use crate::sys::{PAGE, sysv};
use crate::tracee::Memory;

/// One object; the addresses of its runs are offsets in it.
#[derive(Encode, Decode, Debug)]
pub(crate) struct SharedObject {
    /// In whole pages.
    pub(crate) size: u64,
    pub(crate) origin: Origin,
    pub(crate) runs: Vec<Run>,
}

/// How shared memory came about.
#[derive(Encode, Decode, Debug, Clone, Copy)]
pub(crate) enum Origin {
    /// By mmap(2), with MAP_NORESERVE or not.
    Anonymous { no_reserve: bool },
    /// By shmget(2).
    SystemV(Segment),
}

impl Record for SharedObject {
    const TAG: Tag = Tag::new(b"SHMO");
    const VERSION: u16 = 1;
    const NAME: &'static str = "shared memory";
}

impl Paged for SharedObject {
    fn runs(&mut self) -> &mut Vec<Run> {
        &mut self.runs
    }
}

/// Checkpoint: the objects seen so far, by inode: all are on one internal device.
pub(crate) struct SharedObjects {
    device: Device,
    seen: BTreeMap<u64, Seen>,
    /// By ourselves, because nobody else has.
    attached: Vec<sysv::Attached>,
}

struct Seen {
    number: u32,
    origin: Origin,
    /// Where it is mapped: process, address, range of the object.
    places: Vec<(Pid, u64, Range<u64>)>,
}

impl SharedObjects {
    pub(crate) fn new() -> Result<Self> {
        let device = sysv::memory_device().call("memfd_create")?;
        let device = Device { major: major(device) as u32, minor: minor(device) as u32 };
        Ok(Self { device, seen: BTreeMap::new(), attached: Vec::new() })
    }

    /// Is it memory without a file, whatever it is called?
    pub(super) fn has_no_file(&self, mapping: &Mapping) -> bool {
        mapping.device == self.device
    }

    /// The number of the object that this mapping is of, or why it cannot be restored.
    pub(super) fn number(&mut self, pid: Pid, mapping: &Mapping) -> std::result::Result<u32, &'static str> {
        let next = self.seen.len() as u32 + 1;
        let seen = match self.seen.entry(mapping.inode) {
            Entry::Occupied(seen) => seen.into_mut(),
            Entry::Vacant(slot) => {
                let origin = match mapping.name.starts_with(b"/SYSV") {
                    true => Origin::SystemV(Segment::describe(&mapping.name, mapping.inode)?),
                    false => Origin::Anonymous { no_reserve: mapping.flags.contains(VmFlags::NO_RESERVE) },
                };
                slot.insert(Seen { number: next, origin, places: Vec::new() })
            }
        };
        let range = mapping.offset..mapping.offset + (mapping.end - mapping.start);
        seen.places.push((pid, mapping.start, range));
        Ok(seen.number)
    }

    /// System V segments that the tree's processes have made and that nobody has attached: nobody else would save them.
    pub(crate) fn note_unattached(&mut self, frozen: &Frozen, report: &mut Report) -> Result<()> {
        let text = match std::fs::read("/proc/sysvipc/shm") {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            text => text.call("read")?,
        };
        let all =
            shm::parse(&text).map_err(|error| Error::new(ErrorKind::Kernel, "shm").with_source(error))?;
        for one in all.into_iter().filter(|one| one.attached == 0) {
            let maker = frozen.processes.iter().find(|process| process.pid.get() == one.maker);
            // Another process may have had its number before.
            if let Some(maker) = maker.filter(|maker| is_older(maker, one.changed))
                && let Err(reason) = self.attach(one)?
            {
                let name = format!("System V segment {} (key {:#x})", one.id, one.key);
                report.refuse(Refusal::new(maker.pid, Subject::Path(name.into()), reason));
            }
        }
        Ok(())
    }

    fn attach(&mut self, shm: Shm) -> Result<std::result::Result<(), &'static str>> {
        let Ok(attached) = sysv::Attached::new(shm.id) else {
            return Ok(Err("this user may not read it, and nobody has it attached"));
        };
        let (own, start) = (Pid::from(std::process::id()), attached.address());
        let mappings = super::places(own)?;
        let mapping = mappings.iter().find(|mapping| mapping.start == start);
        Ok(match mapping.filter(|mapping| self.has_no_file(mapping)) {
            Some(mapping) => {
                self.attached.push(attached);
                self.number(own, mapping).map(drop)
            }
            None => Err("System V segments of huge pages (SHM_HUGETLB) are not supported"),
        })
    }

    /// Writes every object once, however many processes map it.
    pub(crate) fn write(
        &self,
        memory: impl Fn(Pid) -> Result<Memory>,
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
        records: &mut Records,
    ) -> Result<()> {
        for seen in self.seen.values() {
            let object = seen.write(&memory, pages, image)?;
            records.put(Owner(seen.number), &object)?;
        }
        Ok(())
    }
}

/// Did this process start before that second of the real-time clock?
fn is_older(process: &Process, second: u64) -> bool {
    const TICKS: u64 = 100; // of /proc, on every machine
    let now = |clock| clock_gettime(clock).map_or(0, |now| now.tv_sec() as u64);
    let booted = now(ClockId::CLOCK_REALTIME).saturating_sub(now(ClockId::CLOCK_BOOTTIME));
    booted + process.stat.starttime / TICKS <= second + 1
}

impl Seen {
    fn write(
        &self,
        memory: impl Fn(Pid) -> Result<Memory>,
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<SharedObject> {
        let mapped = self.places.iter().map(|place| place.2.end).max().unwrap_or(0);
        // Following the link needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE in the initial user namespace.
        let file = self.places.iter().find_map(|(pid, at, range)| {
            File::open(format!("/proc/{pid}/map_files/{at:x}-{:x}", at + (range.end - range.start))).ok()
        });
        let whole = match (&file, &self.origin) {
            (_, Origin::SystemV(segment)) => segment.size,
            (Some(file), _) => file.metadata().call("fstat")?.size(),
            (None, _) => mapped,
        };
        let size = whole.next_multiple_of(PAGE).max(mapped);
        let known = pages.known::<SharedObject>(Owner(self.number))?;
        let runs = match file {
            Some(file) => pages.copy_file(&file, &populated(&file, size)?, &known, image)?,
            None => self.read_mapped(memory, &known, pages, image)?,
        };
        Ok(SharedObject { size, origin: self.origin, runs })
    }

    /// Without the file: what any process has mapped of it, once.
    fn read_mapped(
        &self,
        memory: impl Fn(Pid) -> Result<Memory>,
        known: &[Run],
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
    ) -> Result<Vec<Run>> {
        let mut places: Vec<_> = self.places.iter().collect();
        places.sort_by_key(|(.., range)| range.start);
        let (mut runs, mut done) = (Vec::new(), 0);
        for (pid, at, range) in places {
            let from = range.start.max(done);
            if from >= range.end {
                continue;
            }
            let address = at + (from - range.start);
            let here = address..address + (range.end - from);
            // What is at an offset of the object is at an address here.
            let known = overlap(known, std::slice::from_ref(&(from..range.end)));
            let known: Vec<_> =
                known.iter().map(|run| Run { addr: run.addr - from + address, ..*run }).collect();
            let copied = pages.copy_sparse(&memory(*pid)?, here, &known, image)?;
            runs.extend(copied.into_iter().map(|run| Run { addr: run.addr - address + from, ..run }));
            done = range.end;
        }
        Ok(runs)
    }
}

/// The parts of a file that are not holes, in whole pages.
fn populated(file: &File, size: u64) -> Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match lseek(file, at as i64, Whence::SeekData) {
            Ok(data) => data as u64,
            Err(nix::errno::Errno::ENXIO) => break,
            Err(errno) => return Err(crate::error::Error::call("lseek(SEEK_DATA)", errno)),
        };
        let hole = lseek(file, data as i64, Whence::SeekHole).call("lseek(SEEK_HOLE)")? as u64;
        at = hole.next_multiple_of(PAGE).min(size);
        ranges.push(data & !(PAGE - 1)..at);
    }
    Ok(ranges)
}
