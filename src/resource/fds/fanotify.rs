//! fanotify(7): groups, and what they have marked.
//!
//! Marks are found like the watches of inotify. Events that wait to be read cannot be put back. Whoever is asked for
//! permission (FAN_OPEN_PERM and the like) may have a question that he has read and not answered, which shows nowhere;
//! and while he stands still, whoever opens a marked file does so too, the checkpoint among them. So such groups are
//! refused, before any file is opened.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{Builder, Collector, Description, FileKind, FileRef, Polled, Probe, open_fds};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::{fdinfo, nameless, read, status};
use crate::resource::Report;
use crate::sys::file;

const LINK: &[u8] = b"anon_inode:[fanotify]";

// uapi/linux/fanotify.h
const CLASSES_AND_ADMIN: u32 = 0x1bc; // contents' classes, unlimited queue and marks, pidfds, thread numbers
const REPORT_FID: u32 = 0x1e00;
const MARK_MOUNT: u32 = 0x10;
const MARK_IGNORED_MASK: u32 = 0x20;
const MARK_SURVIVES: u32 = 0x40;
const MARK_FILE_SYSTEM: u32 = 0x100;
const MARK_EVICTABLE: u32 = 0x200;
const MARK_IGNORE: u32 = 0x400;
/// FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS.
const ASKS: u32 = 0x17_0000;

#[derive(Encode, Decode, Debug)]
pub(crate) struct Fanotify {
    flags: u32,
    /// Of the files that come with events.
    event_flags: u32,
    marks: Vec<Mark>,
}

#[derive(Encode, Decode, Debug)]
struct Mark {
    on: Marked,
    /// What of it shows in fdinfo.
    flags: u32,
    mask: u32,
    ignored: u32,
    /// The file itself, or the directory that is mounted on.
    file: FileRef,
}

#[derive(Encode, Decode, Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Marked {
    Inode,
    Mount,
    FileSystem,
}

impl Record for Fanotify {
    const TAG: Tag = Tag::new(b"FFAN");
    const VERSION: u16 = 1;
    const NAME: &'static str = "fanotify group";
}

impl FileKind for Fanotify {
    const POLLED: Polled = Polled::NeverBroken;

    fn recognise(probe: &Probe) -> bool {
        probe.name == LINK
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let group = probe.tells(nameless::group)?;
        if file::readable_bytes(probe.file.as_fd()).call("ioctl(FIONREAD)")? != 0 {
            let refusal = probe.refusal("events wait to be read from it, which cannot be put back");
            return Ok(Err(refusal.hint("try again when the program has read them")));
        }
        if let Some(reason) = hidden(&group, probe.pid)? {
            return Ok(Err(probe.refusal(reason)));
        }
        let mut marks = Vec::with_capacity(group.marks.len());
        for mark in &group.marks {
            match Mark::describe(mark, collector)? {
                Ok(mark) => marks.push(mark),
                Err(reason) => return Ok(Err(probe.refusal(format!("one of its marks: {reason}")))),
            }
        }
        Ok(Ok(Self { flags: group.flags, event_flags: group.event_flags, marks }))
    }

    fn check(&self, _: &Builder<'_>) -> Result<()> {
        let wrong = |mark: &Mark| mark.mask & ASKS != 0 || mark.mask == 0 && mark.ignored == 0;
        if self.marks.iter().any(wrong) {
            return Err(Error::new(ErrorKind::Image, "a fanotify mark that cannot be"));
        }
        self.marks.iter().try_for_each(|mark| mark.open().map(drop))
    }

    fn build(&self, _: &Description, _: &mut Builder<'_>) -> Result<OwnedFd> {
        let group =
            file::fanotify(self.flags, self.event_flags).call("fanotify_init").map_err(
                |error| match error.raw_errno() {
                    Some(Errno::EPERM) => error.with_hint("fanotify needs CAP_SYS_ADMIN"),
                    _ => error,
                },
            )?;
        // FAN_CLOEXEC stays visible among the group's flags: it is as it was there.
        fcntl(&group, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).call("fcntl(F_SETFD)")?;
        Ok(group)
    }

    /// Only now: restoring opens and closes files, of which nobody must hear.
    fn start(&self, group: BorrowedFd<'_>, _: &Builder<'_>) -> Result<()> {
        self.marks.iter().try_for_each(|mark| mark.add(group))?;
        let own = Pid::from(std::process::id());
        let parse = |text: &[u8]| nameless::group(&fdinfo::parse(text)?);
        let now = read::parsed(own, &format!("fdinfo/{}", group.as_raw_fd()), parse)?;
        let mut are: Vec<_> = now.marks.iter().filter_map(shown).collect();
        let mut should: Vec<_> = self.marks.iter().map(Mark::key).collect();
        are.sort_unstable();
        should.sort_unstable();
        match are == should {
            true => Ok(()),
            false => {
                Err(Error::new(ErrorKind::Conflict, "the marks of a fanotify group are not as they were"))
            }
        }
    }
}

/// What of a group's state cannot be seen, if it has such.
fn hidden(group: &nameless::Group, pid: Pid) -> Result<Option<&'static str>> {
    if asks(group) {
        return Ok(Some(
            "it decides on permissions (FAN_OPEN_PERM ...): what it has been asked cannot be seen",
        ));
    }
    let on_inodes = |mark: &nameless::Mark| matches!(mark.on, nameless::Marked::Inode(_));
    let anybodys = group.flags & CLASSES_AND_ADMIN == 0 && group.flags & REPORT_FID != 0;
    if !anybodys || !group.marks.iter().all(on_inodes) {
        return Ok(None);
    }
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let capable = read::parsed(pid, "status", status::parse)?.cap_eff & CAP_SYS_ADMIN != 0;
    // The kernel tells an ordinary user's group less, and does not say which groups are such.
    Ok((!capable).then_some("a fanotify group of a process without CAP_SYS_ADMIN is not supported"))
}

fn asks(group: &nameless::Group) -> bool {
    group.marks.iter().any(|mark| mark.mask & ASKS != 0)
}

/// Before anything is opened: refuses the groups in these tables that would be asked. A table is named by its process
/// and a thread that has it.
pub(crate) fn refuse_askers(tables: impl Iterator<Item = (Pid, Pid)>, report: &mut Report) -> Result<()> {
    for (pid, tid) in tables {
        for fd in open_fds(tid)? {
            if read::link(tid, &format!("fd/{fd}"))? != LINK {
                continue;
            }
            let parse = |text: &[u8]| nameless::group(&fdinfo::parse(text)?);
            let group = read::parsed(tid, &format!("fdinfo/{fd}"), parse)?;
            if let Some(reason) = asks(&group).then(|| hidden(&group, tid)).transpose()?.flatten() {
                let what = String::from_utf8_lossy(LINK).into_owned();
                report.refuse(Refusal::new(pid, Subject::Fd { fd, what }, reason));
            }
        }
    }
    Ok(())
}

fn shown(mark: &nameless::Mark) -> Option<(Marked, u32, u32, u32)> {
    let on = match mark.on {
        nameless::Marked::Inode(_) => Marked::Inode,
        nameless::Marked::Mount(_) => Marked::Mount,
        nameless::Marked::FileSystem(_) => Marked::FileSystem,
        nameless::Marked::Namespace => return None,
    };
    Some((on, mark.flags, mark.mask, mark.ignored))
}

impl Mark {
    fn describe(
        mark: &nameless::Mark,
        collector: &mut Collector,
    ) -> Result<std::result::Result<Self, &'static str>> {
        let found = match &mark.on {
            nameless::Marked::Inode(object) => collector.watched.find(object)?,
            nameless::Marked::Mount(number) => collector.watched.mount(*number)?,
            nameless::Marked::FileSystem(device) => collector.watched.file_system(*device)?,
            nameless::Marked::Namespace => Err("marks of mount namespaces are not supported"),
        };
        let known = MARK_SURVIVES | MARK_EVICTABLE | MARK_IGNORE;
        Ok(match (found, shown(mark)) {
            (Ok(file), Some((on, flags, mask, ignored))) if flags & !known == 0 => {
                Ok(Self { on, flags, mask, ignored, file })
            }
            (Err(reason), _) => Err(reason),
            _ => Err("it has flags that are not known"),
        })
    }

    fn key(&self) -> (Marked, u32, u32, u32) {
        (self.on, self.flags, self.mask, self.ignored)
    }

    fn open(&self) -> Result<OwnedFd> {
        let file = self.file.find()?;
        const MOUNT_ROOT: u64 = libc::STATX_ATTR_MOUNT_ROOT as u64;
        let attributes = file::attributes(&way(&file)).call("statx")?;
        if self.on != Marked::Inode && attributes & MOUNT_ROOT == 0 {
            let error = Error::new(ErrorKind::Conflict, "nothing is mounted there any more");
            return Err(error.about(self.file.subject()));
        }
        Ok(file)
    }

    fn add(&self, group: BorrowedFd<'_>) -> Result<()> {
        let target = self.open()?;
        let on = match self.on {
            Marked::Inode => 0,
            Marked::Mount => MARK_MOUNT,
            Marked::FileSystem => MARK_FILE_SYSTEM,
        };
        let common = on | self.flags & MARK_EVICTABLE;
        let ignore = if self.flags & MARK_IGNORE != 0 { MARK_IGNORE } else { MARK_IGNORED_MASK };
        let both = [(0, self.mask), (ignore | self.flags & MARK_SURVIVES, self.ignored)];
        for (how, mask) in both.into_iter().filter(|(_, mask)| *mask != 0) {
            let marked = file::fanotify_mark(group, common | how, mask.into(), &way(&target));
            marked.call("fanotify_mark").about(|| self.file.subject())?;
        }
        Ok(())
    }
}

fn way(file: &OwnedFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Scratch, refuses};
    use super::*;

    fn group(flags: u32, mask: u32) -> nameless::Group {
        let object = nameless::Object { ino: 1, device: Default::default(), handle: None };
        let on = nameless::Marked::Inode(object);
        let marks = vec![nameless::Mark { on, flags: 0, mask, ignored: 0 }];
        nameless::Group { flags, event_flags: 0, marks }
    }

    #[test]
    fn what_cannot_be_seen() {
        let own = Pid::from(std::process::id());
        let hidden = |flags, mask| hidden(&group(flags, mask), own).unwrap();
        for mask in [0x1_0000, 0x2_0000, 0x4_0000, 0x10_0000] {
            assert!(hidden(4, mask | 2).unwrap().contains("permissions"));
        }
        assert_eq!(hidden(4, 2), None);
        assert_eq!(hidden(0x10, 2), None);
    }

    /// A mark without a name, and one of a mount where there is none: before there is a group.
    #[test]
    fn marks_that_lead_nowhere() {
        let scratch = Scratch::new();
        drop(scratch.file("file"));
        let file = FileRef::of_test(&scratch.path("file"), libc::S_IFREG);
        let refuses = |mask, file: FileRef| {
            let mark = Mark { on: Marked::Inode, flags: 0, mask, ignored: 0, file };
            refuses(&Fanotify { flags: 0, event_flags: 0, marks: vec![mark] })
        };
        assert!(refuses(2, FileRef::Ghost(1)));
        // One that asks would have the restore wait for itself.
        assert!(refuses(0x1_0002, file.clone()) && refuses(0, file.clone()));
        let mark = |on| Mark { on, flags: 0, mask: 2, ignored: 0, file: file.clone() };
        mark(Marked::Inode).open().unwrap();
        for on in [Marked::Mount, Marked::FileSystem] {
            assert_eq!(mark(on).open().unwrap_err().kind(), ErrorKind::Conflict);
        }
    }
}
