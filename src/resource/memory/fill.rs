//! Filling memory: threads put pages into their places while the engine goes on building.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use tracing::debug;

use super::kin::{beside, overlap, union, without};
use super::pages::LARGE;
use super::tracking::take_uffd;
use super::{AddressSpace, Run, Segments, Traits, Vma};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Result};
use crate::image::Image;
use crate::parallel;
use crate::sys::{PAGE, uffd};
use crate::tracee::{Memory, Puppet, Transfer};

/// What is in the same part of a segment is one piece of work. A multiple of a segment's chunks.
const PART: u64 = 4 * 1024 * 1024;

/// So much work may wait: what is waited for has descriptors open.
const WAITING: usize = 64;

/// Threads that fill memory, whosever it is, and the work that they have.
pub(crate) struct Fillers<'s> {
    image: &'s Image,
    work: Mutex<Work<'s>>,
    changed: Condvar,
}

#[derive(Default)]
struct Work<'s> {
    waiting: VecDeque<Piece<'s>>,
    /// How many pieces somebody is at.
    begun: usize,
    /// The first thing that went wrong. Nothing more is begun then.
    failed: Option<Error>,
    over: bool,
}

/// Runs of one process, and where they go.
struct Piece<'s> {
    runs: Vec<Run>,
    to: Arc<Target<'s>>,
}

struct Target<'s> {
    pid: Pid,
    put: Box<Put<'s>>,
}

type Put<'s> = dyn Fn(&[Transfer<'_>]) -> Result<()> + Send + Sync + 's;

impl<'s> Fillers<'s> {
    /// Has them there, for about so many `bytes`, during `build`: which is over when they are.
    pub(crate) fn employ<T>(
        image: &'s Image,
        bytes: u64,
        build: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<T> {
        let fillers = Self { image, work: Mutex::default(), changed: Condvar::new() };
        let others = match bytes {
            0..LARGE => 0, // to ask for the processors would take longer
            _ => parallel::usual().get().max(2) - 1,
        };
        std::thread::scope(|scope| {
            let _end = End(&fillers);
            for _ in 0..others {
                let thread = std::thread::Builder::new().name("cryosleep-fill".into());
                if let Err(error) = thread.spawn_scoped(scope, || fillers.serve()) {
                    debug!(%error, "fewer threads fill memory");
                    break;
                }
            }
            build(&fillers)
        })
    }

    /// Has `put` called, by any thread, with all contents of the runs, some at a time. What comes of it says
    /// [`Self::finish`], at the latest.
    pub(crate) fn fill(
        &self,
        pid: Pid,
        runs: &[Run],
        put: impl Fn(&[Transfer<'_>]) -> Result<()> + Send + Sync + 's,
    ) -> Result<()> {
        let to = Arc::new(Target { pid, put: Box::new(put) });
        let pieces = divide(runs).into_iter().map(|runs| Piece { runs, to: to.clone() });
        self.lock().waiting.extend(pieces);
        drop(to);
        self.changed.notify_all();
        self.work_until(|work| work.waiting.len() <= WAITING)
    }

    /// Everything is in its place when this returns. The calling thread does its part.
    pub(crate) fn finish(&self) -> Result<()> {
        self.work_until(|work| work.waiting.is_empty() && work.begun == 0)
    }

    fn work_until(&self, enough: impl Fn(&Work<'s>) -> bool) -> Result<()> {
        let mut buffer = Vec::new();
        let mut work = self.lock();
        loop {
            if let Some(error) = work.failed.take() {
                return Err(error);
            }
            if enough(&work) {
                return Ok(());
            }
            work = self.step(work, &mut buffer);
        }
    }

    /// The life of one of the threads.
    fn serve(&self) {
        let mut buffer = Vec::new();
        let mut work = self.lock();
        while !work.over {
            work = self.step(work, &mut buffer);
        }
    }

    /// One piece of work, or a wait for some.
    fn step<'w>(
        &'w self,
        mut work: MutexGuard<'w, Work<'s>>,
        buffer: &mut Vec<u8>,
    ) -> MutexGuard<'w, Work<'s>> {
        match work.begin() {
            Some(piece) => {
                drop(work);
                self.put(piece, buffer);
                self.lock()
            }
            None => self.changed.wait(work).unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn put(&self, piece: Piece<'s>, buffer: &mut Vec<u8>) {
        let ended = Err(Error::new(ErrorKind::Kernel, "a filling thread ended early"));
        let mut begun = Begun { fillers: self, outcome: ended };
        let Piece { runs, to } = piece;
        begun.outcome = Segments(self.image).each_through(buffer, &runs, |some| (to.put)(some)).of(to.pid);
        // The last one closes what it was put by, before anybody can know that it was the last.
        drop(to);
    }

    fn lock(&self) -> MutexGuard<'_, Work<'s>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'s> Work<'s> {
    fn begin(&mut self) -> Option<Piece<'s>> {
        let piece = self.waiting.pop_front()?;
        self.begun += 1;
        Some(piece)
    }
}

/// A piece that somebody is at.
struct Begun<'f, 's> {
    fillers: &'f Fillers<'s>,
    outcome: Result<()>,
}

impl Drop for Begun<'_, '_> {
    fn drop(&mut self) {
        let mut work = self.fillers.lock();
        work.begun -= 1;
        if let Err(error) = std::mem::replace(&mut self.outcome, Ok(())) {
            work.failed.get_or_insert(error);
            work.waiting.clear();
        }
        self.fillers.changed.notify_all();
    }
}

/// Tells the threads to go, however building has ended.
struct End<'f, 's>(&'f Fillers<'s>);

impl Drop for End<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

/// Divides runs into pieces of work, none of which reads what another does.
fn divide(runs: &[Run]) -> Vec<Vec<Run>> {
    let mut pieces: BTreeMap<(u16, u64), Vec<Run>> = BTreeMap::new();
    for run in runs {
        let mut rest = *run;
        while rest.len > 0 {
            let part = rest.offset / PART;
            let len = rest.len.min((part + 1) * PART - rest.offset);
            pieces.entry((rest.segment, part)).or_default().push(Run { len, ..rest });
            rest = Run { addr: rest.addr + len, len: rest.len - len, offset: rest.offset + len, ..rest };
        }
    }
    pieces.into_values().collect()
}

/// Has private memory of a process filled.
pub(crate) fn fill<'s>(
    puppet: &mut Puppet<'_>,
    space: &'s AddressSpace,
    runs: &[Run],
    fillers: &Fillers<'s>,
) -> Result<()> {
    let huge = huge_areas(space, runs);
    let usual = beside(runs, &huge);
    let uffd = register(puppet, space, &usual, &huge);
    let runs = [overlap(runs, &huge), usual].concat();
    let place = Place { space, memory: puppet.memory().clone(), huge, uffd };
    fillers.fill(puppet.tgid(), &runs, move |pieces| place.put(pieces))
}

/// What is to be transparent huge pages at once, as it became when it was first written to: whole ones, where they were
/// asked for. They come into being by being written to.
fn huge_areas(space: &AddressSpace, runs: &[Run]) -> Vec<Range<u64>> {
    /// Of the size that x86-64 has.
    const HUGE: u64 = 2 << 20;
    let advised = |vma: &&Vma| takes(vma) && vma.has(Traits::HUGE_PAGE) && is_writable(vma);
    let advised: Vec<_> = space.vmas.iter().filter(advised).map(Vma::range).collect();
    if advised.is_empty() || !is_allowed() {
        return Vec::new();
    }
    let full = overlap(runs, &advised).iter().map(Run::range).collect();
    let whole = union(full).into_iter().map(|full| full.start.next_multiple_of(HUGE)..full.end & !(HUGE - 1));
    whole.filter(|area| area.start < area.end).collect()
}

/// Does the system have transparent huge pages (Documentation/admin-guide/mm/transhuge.rst)?
fn is_allowed() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|enabled| !enabled.contains("[never]"))
}

/// A userfaultfd for the anonymous memory that these runs are in, if there is enough for it to pay; but for huge pages.
fn register(
    puppet: &mut Puppet<'_>,
    space: &AddressSpace,
    runs: &[Run],
    huge: &[Range<u64>],
) -> Option<OwnedFd> {
    let large: Vec<Run> =
        runs.iter().filter(|run| space.vma_at(run.addr).is_some_and(takes)).copied().collect();
    if large.iter().map(|run| run.len).sum::<u64>() < LARGE {
        return None;
    }
    let registered = take_uffd(puppet).and_then(|ours| {
        uffd::handshake(ours.as_fd()).call("ioctl(UFFDIO_API)")?;
        // What is registered costs by the call.
        let mappings = large.iter().filter_map(|run| space.vma_at(run.addr)).map(Vma::range);
        for range in without(&union(mappings.collect()), huge.iter().cloned()) {
            uffd::register(ours.as_fd(), range).call("ioctl(UFFDIO_REGISTER)")?;
        }
        Ok(ours)
    });
    // Not allowed here, by sysctl or seccomp: the slower way does it as well.
    registered.inspect_err(|error| debug!(%error, "userfaultfd is not available")).ok()
}

/// userfaultfd does not take droppable memory.
fn takes(vma: &Vma) -> bool {
    vma.is_anonymous() && !vma.has(Traits::DROPPABLE)
}

fn is_writable(vma: &Vma) -> bool {
    vma.prot & libc::PROT_WRITE as u32 != 0 || vma.is_filled_first()
}

/// The memory of a process, and how it is filled.
struct Place<'s> {
    space: &'s AddressSpace,
    memory: Memory,
    huge: Vec<Range<u64>>,
    /// It allocates and copies in one step, from several threads. Closing it makes the memory usual again.
    uffd: Option<OwnedFd>,
}

impl Place<'_> {
    fn put(&self, pieces: &[Transfer<'_>]) -> Result<()> {
        let mut written = Vec::new();
        for (addr, bytes) in pieces {
            let vma = self.space.vma_at(*addr);
            match &self.uffd {
                Some(uffd) if vma.is_some_and(takes) && !self.is_huge(*addr) => {
                    self.copy(uffd.as_fd(), *addr, bytes)?
                }
                _ if vma.is_some_and(is_writable) => written.push((*addr, *bytes)),
                _ => self.memory.write(*addr, bytes)?,
            }
        }
        self.memory.write_all(&written)
    }

    fn is_huge(&self, address: u64) -> bool {
        let at = self.huge.partition_point(|area| area.end <= address);
        self.huge.get(at).is_some_and(|area| area.start <= address)
    }

    /// A page may be there already: where a donor's memory was locked, its children get pages of zeroes, too.
    fn copy(&self, uffd: BorrowedFd<'_>, addr: u64, bytes: &[u8]) -> Result<()> {
        match uffd::copy(uffd, addr, bytes) {
            Err(Errno::EEXIST) if bytes.len() as u64 <= PAGE => self.memory.write(addr, bytes),
            Err(Errno::EEXIST) => {
                let pages = (addr..).step_by(PAGE as usize).zip(bytes.chunks(PAGE as usize));
                pages.into_iter().try_for_each(|(addr, page)| self.copy(uffd, addr, page))
            }
            copied => copied.call("ioctl(UFFDIO_COPY)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::super::pages::BUFFER;
    use super::*;
    use crate::image::{ImageWriter, ManifestInfo, Records};

    const PARTS: u64 = 40;

    fn run(addr: u64, len: u64, segment: u16, offset: u64) -> Run {
        Run { addr, len, segment, offset }
    }

    /// An image whose pages are holes.
    fn image(name: &str) -> Image {
        let dir = std::env::temp_dir().join(format!("cryosleep-fill-{name}-{}", std::process::id()));
        let mut writer = ImageWriter::create(&dir).unwrap();
        writer.segment().unwrap().file().unwrap().set_len(PARTS * PART).unwrap();
        writer.finish(Records::new().unwrap(), ManifestInfo { root: Pid::from(1) }).unwrap();
        let image = Image::open(&dir).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        image
    }

    #[test]
    fn nothing_is_read_twice() {
        let runs = [run(0, PAGE, 0, 0), run(9 * PART, 2 * PART, 0, 3 * PART - PAGE), run(PART, PAGE, 1, 0)];
        assert_eq!(
            divide(&[runs[0], run(PAGE, PAGE, 0, PAGE)]),
            [[run(0, PAGE, 0, 0), run(PAGE, PAGE, 0, PAGE)]]
        );
        assert_eq!(
            divide(&runs),
            [
                [run(0, PAGE, 0, 0)],
                [run(9 * PART, PAGE, 0, 3 * PART - PAGE)],
                [run(9 * PART + PAGE, PART, 0, 3 * PART)],
                [run(10 * PART + PAGE, PART - PAGE, 0, 4 * PART)],
                [run(PART, PAGE, 1, 0)],
            ]
        );
    }

    #[test]
    fn all_of_it_is_put() {
        let image = image("all");
        for bytes in [0, PARTS * PART] {
            let (put, busy) = (AtomicU64::new(0), AtomicU64::new(0));
            Fillers::employ(&image, bytes, |fillers| {
                for part in 0..PARTS / 2 {
                    let runs = [run(part, 2 * PART, 0, 2 * part * PART)];
                    fillers.fill(Pid::from(1), &runs, |pieces| {
                        busy.fetch_add(1, Ordering::SeqCst);
                        let len: usize = pieces.iter().map(|(_, bytes)| bytes.len()).sum();
                        put.fetch_add(len as u64, Ordering::SeqCst);
                        busy.fetch_sub(1, Ordering::SeqCst);
                        Ok(())
                    })?;
                }
                fillers.finish()?;
                assert_eq!((put.load(Ordering::SeqCst), busy.load(Ordering::SeqCst)), (PARTS * PART, 0));
                fillers.finish()
            })
            .unwrap();
        }
    }

    #[test]
    fn the_first_error_ends_it() {
        let image = image("error");
        for bytes in [0, PARTS * PART] {
            let put = AtomicU64::new(0);
            let error = Fillers::employ(&image, bytes, |fillers| {
                fillers.fill(Pid::from(7), &[run(0, PARTS * PART, 0, 0)], |_| {
                    put.fetch_add(1, Ordering::SeqCst);
                    Err(Error::call("ioctl(UFFDIO_COPY)", Errno::ESRCH))
                })?;
                fillers.finish()
            });
            let error = error.unwrap_err();
            assert_eq!((error.kind(), error.pid()), (ErrorKind::TaskGone, Some(Pid::from(7))));
            assert!(put.load(Ordering::SeqCst) <= parallel::MOST.get() as u64);
        }
    }

    /// What waits when building has failed is not done, and nobody waits for ever.
    #[test]
    fn the_threads_go_with_the_building() {
        let image = image("over");
        let put = AtomicU64::new(0);
        let failed: Result<()> = Fillers::employ(&image, PARTS * PART, |fillers| {
            fillers.fill(Pid::from(1), &[run(0, PARTS * PART, 0, 0)], |_| {
                put.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(10));
                Ok(())
            })?;
            Err(Error::new(ErrorKind::Kernel, "something else"))
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Kernel);
        assert!(put.load(Ordering::SeqCst) < PARTS * PART / BUFFER as u64);
    }
}
