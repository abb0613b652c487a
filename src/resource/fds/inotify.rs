//! inotify(7): watches of files, by the numbers that the program knows them by.
//!
//! The kernel tells of a watch by a file handle: `handles` finds the file, which is recorded by path. Events that wait
//! to be read cannot be put back, so that an instance that has some is refused. The number after the highest one is the
//! next one again. (Before Linux 6.10 looking for a file is itself an event for those who watch IN_OPEN or
//! IN_CLOSE_NOWRITE.)

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::inotify::{InitFlags, Inotify as New};

use super::{Builder, Collector, Description, FileKind, FileRef, Polled, Probe};
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::nameless;
use crate::sys::file;

#[derive(Encode, Decode, Debug)]
pub(crate) struct Inotify {
    /// By ascending number.
    watches: Vec<Watch>,
}

#[derive(Encode, Decode, Debug)]
struct Watch {
    number: i32,
    mask: u32,
    file: FileRef,
}

impl Record for Inotify {
    const TAG: Tag = Tag::new(b"FINO");
    const VERSION: u16 = 1;
    const NAME: &'static str = "inotify instance";
}

impl FileKind for Inotify {
    const POLLED: Polled = Polled::NeverBroken;

    fn recognise(probe: &Probe) -> bool {
        probe.name == b"anon_inode:inotify"
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        if file::readable_bytes(probe.file.as_fd()).call("ioctl(FIONREAD)")? != 0 {
            let refusal = probe.refusal("events wait to be read from it, which cannot be put back");
            return Ok(Err(refusal.hint("try again when the program has read them")));
        }
        let mut watches = Vec::new();
        for watch in probe.tells(nameless::watches)? {
            match collector.watched.find(&watch.object)? {
                Ok(file) => watches.push(Watch { number: watch.number, mask: watch.mask, file }),
                Err(reason) => {
                    let reason = format!("its watch {}: {reason}", watch.number);
                    return Ok(Err(probe.refusal(reason)));
                }
            }
        }
        // The newest is shown first.
        watches.sort_unstable_by_key(|watch| watch.number);
        Ok(Ok(Self { watches }))
    }

    fn check(&self, _: &Builder<'_>) -> Result<()> {
        let ascending = self.watches.windows(2).all(|two| two[0].number < two[1].number);
        if !ascending || self.watches.first().is_some_and(|first| first.number < 1) {
            return Err(Error::new(ErrorKind::Image, "inotify watches with numbers that cannot be"));
        }
        self.watches.iter().try_for_each(|watch| watch.open().map(drop))
    }

    fn build(&self, _: &Description, _: &mut Builder<'_>) -> Result<OwnedFd> {
        New::init(InitFlags::IN_CLOEXEC).call("inotify_init1").map(OwnedFd::from)
    }

    /// Only now: restoring opens and closes files, of which no watch must hear.
    fn start(&self, inotify: BorrowedFd<'_>, _: &Builder<'_>) -> Result<()> {
        self.watches.iter().try_for_each(|watch| watch.add(inotify))
    }
}

impl Watch {
    /// It may be as large as it likes: the program wants to hear of changes.
    fn open(&self) -> Result<OwnedFd> {
        self.file.find()
    }

    fn add(&self, inotify: BorrowedFd<'_>) -> Result<()> {
        let target = self.open()?;
        let way = CString::new(format!("/proc/self/fd/{}", target.as_raw_fd())).unwrap_or_default();
        file::set_next_watch(inotify, self.number).call("ioctl(INOTIFY_IOC_SETNEXTWD)")?;
        let number = file::add_watch(inotify, &way, self.mask).call("inotify_add_watch");
        let number = number.about(|| self.file.subject())?;
        match number == self.number {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Conflict, "two inotify watches lead to one file now")
                .about(self.file.subject())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Scratch, refuses};
    use super::*;

    #[test]
    fn numbers_that_the_kernel_never_gives() {
        let scratch = Scratch::new();
        drop(scratch.file("file"));
        let file = FileRef::of_test(&scratch.path("file"), libc::S_IFREG);
        let with = |numbers: &[i32]| {
            let watch = |number: &i32| Watch { number: *number, mask: 1, file: file.clone() };
            refuses(&Inotify { watches: numbers.iter().map(watch).collect() })
        };
        assert!(!with(&[]) && !with(&[1, 5]));
        assert!(with(&[0]) && with(&[-1, 1]) && with(&[5, 1]) && with(&[3, 3]));
        assert!(refuses(&Inotify { watches: vec![Watch { number: 1, mask: 1, file: FileRef::Ghost(1) }] }));
    }
}
