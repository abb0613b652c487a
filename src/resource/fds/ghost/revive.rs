//! Restore: unlinked files are made again, each by a name for as long as others have to open it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, OFlag, OpenHow, ResolveFlag, SealFlag, fcntl, open, openat, openat2};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, mkdirat, mknodat};
use nix::unistd::{UnlinkatFlags, ftruncate, geteuid, unlinkat};

use super::super::link;
use super::super::path::TMPFILE;
use super::{Birth, F_SEAL_EXEC, Ghost, MEMFD, c_string, missing, open_directory, split};
use crate::error::{Context, Error, ErrorKind, NameCall, Result};
use crate::image::Image;
use crate::resource::memory::Segments;
use crate::sys::hugetlb::{self, PageShift};
use crate::sys::xattr;

impl Ghost {
    /// Makes it, with a name where it has to have one for now.
    fn make(self, image: &Image, others: &BTreeMap<u32, Made>) -> Result<Made> {
        let linked = |file: OwnedFd, directory: OwnedFd| {
            let (name, ()) = make_entry(split(&self.path)?.1, |name| link::link(&file, &directory, name))?;
            Ok::<_, Error>((file, Some((directory, name))))
        };
        let (file, entry) = match &self.birth {
            Birth::Memory { seals, huge, .. } => (self.make_memory(*seals, *huge)?, None),
            Birth::Huge(shift) => (make_huge(page(*shift)?, self.size)?, None),
            Birth::Nameless { flags } => (self.make_nameless(&self.directory()?, *flags)?, None),
            Birth::Named => {
                let directory = self.directory()?;
                let create = |name: &OsStr| self.create(&directory, name);
                let (name, file) = make_entry(split(&self.path)?.1, create)?;
                (file, Some((directory, name)))
            }
            Birth::Linked { name, inode } => {
                let directory = self.directory()?;
                linked(link::open(&directory, name, *inode)?, directory)?
            }
            Birth::Again(first) => {
                let first = others.get(first).ok_or_else(|| missing(*first))?;
                linked(first.file.try_clone().call("fcntl")?, self.directory()?)?
            }
        };
        let made = Made { entry, file, ghost: self };
        made.fill(image)?;
        Ok(made)
    }

    fn directory(&self) -> Result<OwnedFd> {
        open_directory(split(&self.path)?.0)
            .map_err(|error| error.with_kind(ErrorKind::Conflict))
            .hint("the directory of a deleted file must be there, for the file to be made again")
    }

    fn make_memory(&self, seals: i32, huge: Option<u8>) -> Result<OwnedFd> {
        const MFD_NOEXEC_SEAL: u32 = 8;
        const MFD_EXEC: u32 = 16;
        let name = c_string(self.path.strip_prefix(MEMFD).unwrap_or_default())?;
        // Where vm.memfd_noexec asks for it; a kernel that does not know of it (before 6.3) has none of these flags.
        let never_executable = seals & F_SEAL_EXEC != 0 && self.inode.mode & 0o111 == 0;
        let more = MFdFlags::from_bits_retain(if never_executable { MFD_NOEXEC_SEAL } else { MFD_EXEC });
        let huge = huge.map(page).transpose()?.map_or(MFdFlags::empty(), PageShift::memfd_flags);
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | huge;
        let made = match memfd_create(&*name, flags | more) {
            Err(Errno::EINVAL) => memfd_create(&*name, flags),
            made => made,
        };
        let made = made.call("memfd_create")?;
        let way = format!("/proc/self/fd/{}", made.as_raw_fd());
        open(way.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).call("open")
    }

    /// A handle of a new file: nobody who may write to the directory can make us take another for it.
    fn create(&self, directory: &OwnedFd, name: &OsStr) -> Result<OwnedFd> {
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        if self.kind() != SFlag::S_IFREG {
            match self.kind() {
                SFlag::S_IFDIR => mkdirat(directory, name, Mode::S_IRWXU).call("mkdirat")?,
                kind => mknodat(directory, name, kind, mode, 0).call("mknodat")?,
            }
            let made = openat(directory, name, HANDLE, Mode::empty()).call("openat")?;
            let stat = fstat(&made).call("fstat")?;
            let own = stat.st_mode & SFlag::S_IFMT.bits() == self.kind().bits()
                && stat.st_uid == geteuid().as_raw()
                && (stat.st_nlink == 1 || self.kind() == SFlag::S_IFDIR);
            return if own { Ok(made) } else { Err(taken()) };
        }
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let made = openat(directory, name, flags, mode).call("openat")?;
        let way = format!("/proc/self/fd/{}", made.as_raw_fd());
        open(way.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).call("open")
    }

    /// The description of that call is that of the original, if there still was one.
    fn make_nameless(&self, directory: &OwnedFd, flags: Option<i32>) -> Result<OwnedFd> {
        let flags = OFlag::from_bits_retain(flags.unwrap_or(libc::O_RDWR));
        let at_birth = OFlag::O_ACCMODE | OFlag::O_NOFOLLOW | OFlag::O_SYNC | OFlag::O_DSYNC;
        let flags = flags & at_birth | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
        openat(directory, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR).call("openat(O_TMPFILE)")
    }
}

fn page(shift: u8) -> Result<PageShift> {
    PageShift::new(shift).ok_or_else(|| Error::new(ErrorKind::Image, "huge pages of an impossible size"))
}

fn make_huge(page: PageShift, size: u64) -> Result<OwnedFd> {
    hugetlb::anonymous(page, size)
        .call("mmap(MAP_HUGETLB)")
        .hint("it takes CAP_CHECKPOINT_RESTORE in the initial user namespace, and huge pages of this size")
}

/// By its own name, or by one that nobody has.
fn make_entry<T>(name: &OsStr, make: impl Fn(&OsStr) -> Result<T>) -> Result<(OsString, T)> {
    const TRIES: u32 = 100;
    let other = |number| OsString::from(format!(".cryosleep-{}-{number}", std::process::id()));
    for name in std::iter::once(name.to_owned()).chain((0..TRIES).map(other)) {
        match make(&name) {
            Err(error) if error.raw_errno() == Some(Errno::EEXIST) => {}
            made => return Ok((name, made?)),
        }
    }
    Err(Error::new(ErrorKind::Conflict, "no name is free in the directory of a deleted file"))
}

fn taken() -> Error {
    Error::new(ErrorKind::Conflict, "another file has taken its place meanwhile")
}

/// What is held of a file whose name is to go: no more than that it exists.
const HANDLE: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// An unlinked file that has been made again. Dropping it removes the name that it may still have.
struct Made {
    /// Its name for now, and the directory that it is in.
    entry: Option<(OwnedFd, OsString)>,
    file: OwnedFd,
    ghost: Ghost,
}

impl Made {
    fn way(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    fn fill(&self, image: &Image) -> Result<()> {
        let ghost = &self.ghost;
        if ghost.is_there() {
            return Ok(()); // it is the original
        }
        let way = self.way();
        if ghost.kind() == SFlag::S_IFREG {
            let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
            let file = File::from(open(way.as_str(), flags, Mode::empty()).call("open")?);
            let huge = hugetlb::page_of(&file).call("fstatfs")?;
            ftruncate(&file, ghost.size as i64).call("ftruncate")?;
            Segments(image).each(&ghost.runs, |pieces| {
                pieces.iter().try_for_each(|(offset, bytes)| {
                    let length = bytes.len().min(ghost.size.saturating_sub(*offset) as usize);
                    let bytes = bytes.get(..length).unwrap_or_default();
                    match huge {
                        None => file.write_all_at(bytes, *offset).call("pwrite"),
                        Some(page) => hugetlb::write(&file, page, bytes, *offset)
                            .call("fallocate")
                            .hint("huge pages: /proc/sys/vm/nr_hugepages, /sys/kernel/mm/hugepages"),
                    }
                })
            })?;
        }
        ghost.inode.own(&way)?;
        let way = c_string(way.as_bytes())?;
        ghost
            .attributes
            .iter()
            .try_for_each(|(name, value)| xattr::set(&way, &c_string(name)?, value).call("setxattr"))
    }

    /// A description of it.
    fn open(&self, flags: OFlag) -> Result<OwnedFd> {
        if flags.contains(TMPFILE) {
            let Birth::Nameless { flags: Some(_) } = self.ghost.birth else {
                return Err(Error::new(ErrorKind::Image, "O_TMPFILE on a file that was not made by it"));
            };
            return self.file.try_clone().call("fcntl");
        }
        let flags = flags | OFlag::O_CLOEXEC;
        let Some((directory, entry)) = &self.entry else {
            return open(self.way().as_str(), flags, Mode::empty()).call("open");
        };
        let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let opened = openat2(directory, entry.as_os_str(), how).call("openat2")?;
        let (is, should) = (fstat(&opened).call("fstat")?, fstat(&self.file).call("fstat")?);
        if (is.st_dev, is.st_ino) != (should.st_dev, should.st_ino) {
            return Err(taken());
        }
        Ok(opened)
    }

    /// Nothing more will be opened: it becomes what it was.
    fn finish(&mut self) -> Result<()> {
        if self.ghost.is_there() {
            return self.unlink();
        }
        let way = self.way();
        self.ghost.inode.settle(&way)?;
        match self.ghost.birth {
            Birth::Memory { seals, mapped_first: false, .. } => self.seal(seals),
            Birth::Memory { mapped_first: true, .. } | Birth::Huge(_) => Ok(()),
            Birth::Named | Birth::Nameless { .. } | Birth::Linked { .. } | Birth::Again(_) => self.unlink(),
        }
    }

    /// Everything is mapped that was mapped before it was sealed.
    fn finish_mapped(&self) -> Result<()> {
        match self.ghost.birth {
            Birth::Memory { seals, mapped_first: true, .. } => self.seal(seals),
            _ => Ok(()),
        }
    }

    fn seal(&self, seals: i32) -> Result<()> {
        let file = open(self.way().as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).call("open")?;
        let seals = FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(seals));
        fcntl(file, seals).call("fcntl(F_ADD_SEALS)").map(drop)
    }

    fn unlink(&mut self) -> Result<()> {
        let Some((directory, entry)) = self.entry.take() else { return Ok(()) };
        let named = fstatat(&directory, entry.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).call("fstatat")?;
        let own = fstat(&self.file).call("fstat")?;
        if (named.st_dev, named.st_ino) != (own.st_dev, own.st_ino) {
            return Err(taken());
        }
        let how = match self.ghost.kind() {
            SFlag::S_IFDIR => UnlinkatFlags::RemoveDir,
            _ => UnlinkatFlags::NoRemoveDir,
        };
        unlinkat(&directory, entry.as_os_str(), how).call("unlinkat")
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // On the way out of another error.
        let _ = self.unlink();
    }
}

/// Restore: all unlinked files, made again.
#[derive(Default)]
pub(crate) struct Revived(BTreeMap<u32, Made>);

impl Revived {
    pub(crate) fn make(image: &Image) -> Result<Self> {
        let numbers = || image.owners::<Ghost>();
        // All are checked before the first is made.
        for owner in numbers() {
            let ghost: Ghost = image.require(owner)?;
            ghost.check(owner.0, image).about(|| ghost.subject())?;
        }
        let mut made = BTreeMap::new();
        for owner in numbers() {
            let ghost: Ghost = image.require(owner)?;
            let subject = ghost.subject();
            let one = ghost.make(image, &made).about(|| subject)?;
            made.insert(owner.0, one);
        }
        Ok(Self(made))
    }

    pub(crate) fn open(&self, number: u32, flags: OFlag) -> Result<OwnedFd> {
        let made = self.0.get(&number);
        let made = made.ok_or_else(|| missing(number))?;
        made.open(flags).about(|| made.ghost.subject())
    }

    /// All memory is mapped.
    pub(crate) fn finish_mapped(&self) -> Result<()> {
        self.0.values().try_for_each(|made| made.finish_mapped().about(|| made.ghost.subject()))
    }

    /// Takes their names away: everything that was to be opened is open.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.0.values_mut().try_for_each(|made| {
            let subject = made.ghost.subject();
            made.finish().about(|| subject)
        })
    }
}
