//! Files that are open or mapped though they have no name any more. The image holds all of such a file; on
//! restore it is made again where it was, and loses its name when everything that needs it has it open.
//!
//! A memfd is such a file too: it has never had a name, and has its seals instead. So is anonymous memory of huge
//! pages, which the kernel makes a file of hugetlbfs for; private mappings of it have their pages to themselves.
//!
//! The name that /proc shows of it is that of the original if nobody has taken it meanwhile; otherwise the
//! file is made by another name beside it, and that is what /proc shows.

mod names;
mod revive;

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, open, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

pub(crate) use names::OldNames;
pub(crate) use revive::Revived;

use super::inode::Inode;
use super::link::{LinkRemap, Links};
use super::path::{Reason, TMPFILE};
use super::{FilePolicy, FileRef, FileValidation};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Image, ImageSink, Owner, Record, Records, Tag};
use crate::proc::fdinfo;
use crate::resource::Report;
use crate::resource::memory::{PageWriter, Paged, Run, Segments};
use crate::sys::hugetlb::{self, PageShift};
use crate::sys::sysv::memory_device;
use crate::sys::{PAGE, file, xattr};

/// A file without a name, but for its contents a copy of its inode.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Ghost {
    /// The name that it had last.
    path: Bytes,
    birth: Birth,
    inode: Inode,
    size: u64,
    /// Extended attributes: names and values.
    attributes: Vec<(Bytes, Bytes)>,
    /// Where its data is; their addresses are offsets in the file. The rest is holes.
    runs: Vec<Run>,
}

impl Record for Ghost {
    const TAG: Tag = Tag::new(b"GHST");
    const VERSION: u16 = 1;
    const NAME: &'static str = "unlinked file";
}

impl Paged for Ghost {
    fn runs(&mut self) -> &mut Vec<Run> {
        &mut self.runs
    }

    fn give_names(&mut self, links: &mut Links) -> Result<()> {
        names::again(self, links)
    }
}

/// How it came about.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
enum Birth {
    /// By a name, which was removed.
    Named,
    /// By O_TMPFILE; the flags of the description that this call made, unless it has been closed.
    Nameless { flags: Option<i32> },
    /// By memfd_create(2); its seals, and whether it was mapped before they came, by which it can still be written to.
    /// Of huge pages, their size as its binary logarithm.
    Memory { seals: i32, mapped_first: bool, huge: Option<u8> },
    /// By mmap(2) with MAP_HUGETLB; the size of its pages, as above.
    Huge(u8),
    /// It has other names somewhere; one that the checkpoint has made in the directory that it was in.
    Linked { name: Bytes, inode: u64 },
    /// It is that file, by another name that it has had.
    Again(u32),
}

pub(super) const DELETED: &[u8] = b" (deleted)";

/// Checkpoint: the unlinked files found so far, by device and inode.
#[derive(Debug, Default)]
pub(crate) struct Ghosts {
    limit: u64,
    links: LinkRemap,
    build_ids: bool,
    known: BTreeMap<(u64, u64), Seen>,
    /// Further names of these: the file, and the name with its number.
    again: BTreeMap<(u32, Vec<u8>), (u32, Ghost)>,
}

#[derive(Debug)]
struct Seen {
    number: u32,
    ghost: Ghost,
    /// Of a regular file: opened for reading, and where its data is.
    contents: Option<(File, Vec<Range<u64>>)>,
    /// Of one that gets another name: what leads to it.
    linked: Option<OwnedFd>,
    /// Who has mapped a memfd for writing, though it may be forbidden now; and who has after it was forbidden.
    mapped: (Option<Pid>, Option<Pid>),
}

impl Ghosts {
    pub(super) fn new(policy: &FilePolicy) -> Self {
        let build_ids = policy.validation == FileValidation::BuildId;
        Self { limit: policy.ghost_limit, links: policy.links, build_ids, ..Self::default() }
    }

    /// Is this one of them, a deleted file or one that is to be linked?
    pub(super) fn takes(&self, name: &[u8], stat: &FileStat) -> bool {
        let linked = self.links == LinkRemap::Link && name.ends_with(DELETED);
        name.starts_with(b"/") && (stat.st_nlink == 0 || linked)
    }

    /// Reads what the linker calls the program that a file is, if the restore is to ask for it. `way`: a link of /proc
    /// that may be opened.
    pub(crate) fn note_build_id(&self, file: &mut FileRef, way: &str) -> Result<()> {
        match file {
            FileRef::Named(named) if self.build_ids => named.read_build_id(way),
            _ => Ok(()),
        }
    }

    /// The number of the file that `name` ("/path (deleted)") and `stat` are of. It can be
    /// opened by `way`: some link of /proc.
    pub(super) fn number(
        &mut self,
        name: &[u8],
        stat: &FileStat,
        way: &str,
    ) -> Result<std::result::Result<u32, Reason>> {
        let path = name.strip_suffix(DELETED).unwrap_or(name);
        let number = (self.known.len() + self.again.len()) as u32 + 1;
        if let Some(seen) = self.known.get(&(stat.st_dev, stat.st_ino)) {
            let first = seen.number;
            if *seen.ghost.path == *path {
                return Ok(Ok(first));
            }
            if is_nameless(path, stat) || is_nameless(&seen.ghost.path, stat) {
                return Ok(Err("it was made by O_TMPFILE, and has had a name since".into()));
            }
            return Ok(match birth(path, stat, way)? {
                Err(reason) => Err(reason),
                Ok(_) => {
                    let again = || (number, Ghost::bare(path, Birth::Again(first), stat));
                    Ok(self.again.entry((first, path.to_vec())).or_insert_with(again).0)
                }
            });
        }
        Ok(match Seen::look(number, name, stat, way, self.limit)? {
            Ok(seen) => {
                self.known.insert((stat.st_dev, stat.st_ino), seen);
                Ok(number)
            }
            Err(reason) => Err(reason),
        })
    }

    /// A description of the file has these flags.
    pub(super) fn note_flags(&mut self, stat: &FileStat, flags: OFlag) {
        let seen = self.known.get_mut(&(stat.st_dev, stat.st_ino));
        let nameless = |seen: &&mut Seen| flags.contains(TMPFILE) && !seen.ghost.is_there();
        if let Some(seen) = seen.filter(nameless) {
            seen.ghost.birth = Birth::Nameless { flags: Some(flags.bits()) };
        }
    }

    /// This process has it mapped, shared and from a descriptor for writing. Can the mapping be made writable?
    pub(crate) fn note_mapping(&mut self, file: &FileRef, pid: Pid, may_write: bool) {
        let FileRef::Ghost(number) = file else { return };
        let Some(seen) = self.known.values_mut().find(|seen| seen.number == *number) else { return };
        let slot = if may_write { &mut seen.mapped.0 } else { &mut seen.mapped.1 };
        slot.get_or_insert(pid);
    }

    /// What can only be said when all mappings are known.
    pub(super) fn finish(&mut self, report: &mut Report) {
        for seen in self.known.values_mut() {
            let Birth::Memory { seals, mapped_first, .. } = &mut seen.ghost.birth else { continue };
            if *seals & libc::F_SEAL_FUTURE_WRITE == 0 {
                continue;
            }
            *mapped_first = seen.mapped.0.is_some();
            if let (Some(_), Some(pid)) = seen.mapped {
                let reason = "it was mapped both before and after it was sealed (F_SEAL_FUTURE_WRITE)";
                report.refuse(Refusal::new(pid, seen.ghost.subject(), reason));
            }
        }
    }

    /// Writes every file once, however many descriptions and mappings it has.
    pub(crate) fn write(
        self,
        pages: &mut PageWriter<'_>,
        image: &mut dyn ImageSink,
        records: &mut Records,
    ) -> Result<Links> {
        let mut links = Links::default();
        self.again.into_values().try_for_each(|(number, ghost)| records.put(Owner(number), &ghost))?;
        self.known.into_values().try_for_each(|Seen { number, mut ghost, linked, contents, .. }| {
            if let (Birth::Linked { name, .. }, Some(file)) = (&mut ghost.birth, linked) {
                let subject = || Subject::Path(OsStr::from_bytes(&ghost.path).into());
                let made = open_directory(split(&ghost.path)?.0).and_then(|at| links.make(&file, at));
                *name = made.about(subject)?.into_vec().into();
            }
            if let Some((file, data)) = contents {
                // Zeroes that were written to a file are no hole; memory does not know the difference.
                let memory = matches!(ghost.birth, Birth::Memory { .. });
                let zeroes = !memory && hugetlb::page_of(&file).call("fstatfs")?.is_none();
                let known = pages.known::<Ghost>(Owner(number))?;
                let runs = pages.copy_data(&file, &data, zeroes, &known, image);
                ghost.runs = runs.about(|| ghost.subject())?;
            }
            records.put(Owner(number), &ghost)
        })?;
        Ok(links)
    }
}

impl Seen {
    fn look(
        number: u32,
        name: &[u8],
        stat: &FileStat,
        way: &str,
        limit: u64,
    ) -> Result<std::result::Result<Self, Reason>> {
        let path = name.strip_suffix(DELETED).unwrap_or(name);
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        if !KINDS.contains(&kind) {
            return Ok(Err(
                "it was deleted: only regular files, directories and fifos can be made again".into()
            ));
        }
        let birth = match birth(path, stat, way)? {
            Ok(birth) => birth,
            Err(reason) => return Ok(Err(reason)),
        };
        // Such a file could not be made again step by step, nor get another name.
        const FIXED: u64 = (libc::STATX_ATTR_IMMUTABLE | libc::STATX_ATTR_APPEND) as u64;
        if file::attributes(&c_string(way.as_bytes())?).call("statx")? & FIXED != 0 {
            return Ok(Err("it was deleted, and is immutable or append-only (chattr(1))".into()));
        }
        if let Birth::Linked { .. } = birth {
            let linked = Some(open(way, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).call("open")?);
            let ghost = Ghost::bare(path, birth, stat);
            return Ok(Ok(Self { number, ghost, contents: None, linked, mapped: (None, None) }));
        }
        let mut contents = None;
        if kind == SFlag::S_IFREG {
            let file = open_quietly(way)?;
            // hugetlbfs does not tell where its holes are.
            let data = if stat.st_blocks == 0 { Vec::new() } else { data_of(&file, stat.st_size as u64)? };
            let held: u64 = data.iter().map(|range| range.end - range.start).sum();
            let system = || fstatfs(&file).call("fstatfs").map(|system| system.filesystem_type());
            // There is nothing else than memory that could have more of it.
            if held > limit && !matches!(system()?, TMPFS_MAGIC | HUGETLBFS_MAGIC) {
                return Ok(Err(Reason::from(format!(
                    "it was deleted, and holds {held} bytes: more than the limit of {limit}"
                ))
                .hint("Checkpoint::ghost_limit() is how much of a deleted file an image may hold")));
            }
            contents = Some((file, data));
        }
        let ghost = Ghost {
            size: if contents.is_some() { stat.st_size as u64 } else { 0 },
            attributes: attributes_of(way)?,
            ..Ghost::bare(path, birth, stat)
        };
        Ok(Ok(Self { number, ghost, contents, linked: None, mapped: (None, None) }))
    }
}

/// What can be made again.
const KINDS: [SFlag; 3] = [SFlag::S_IFREG, SFlag::S_IFDIR, SFlag::S_IFIFO];

/// How the file came about, if it can be made again.
fn birth(path: &[u8], stat: &FileStat, way: &str) -> Result<std::result::Result<Birth, Reason>> {
    let huge = match matches!(path, HUGE) || path.starts_with(MEMFD) {
        true => hugetlb::page_of(open_quietly(way)?).call("fstatfs")?,
        false => None,
    };
    let own_device = || huge.map_or_else(memory_device, hugetlb::memory_device).call("memfd_create");
    if path.starts_with(MEMFD) && stat.st_dev == own_device()? {
        let seals = fcntl(&open_quietly(way)?, FcntlArg::F_GET_SEALS).call("fcntl(F_GET_SEALS)")?;
        return Ok(match seals & !KNOWN_SEALS {
            0 => Ok(Birth::Memory { seals, mapped_first: false, huge: huge.map(PageShift::get) }),
            _ => Err("it has seals that are not known".into()),
        });
    }
    if let (HUGE, Some(page)) = (path, huge)
        && stat.st_dev == own_device()?
    {
        return Ok(Ok(Birth::Huge(page.get())));
    }
    let handle = open(way, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).call("open")?;
    if !is_beside(&handle, path)? {
        return Ok(Err("it was deleted, and so was the directory that it was in".into()));
    }
    if stat.st_nlink > 0 {
        return Ok(Ok(Birth::Linked { name: Bytes::default(), inode: stat.st_ino }));
    }
    Ok(Ok(if is_nameless(path, stat) { Birth::Nameless { flags: None } } else { Birth::Named }))
}

/// O_TMPFILE gives its files names like that.
fn is_nameless(path: &[u8], stat: &FileStat) -> bool {
    path.ends_with(format!("/#{}", stat.st_ino).as_bytes())
}

/// The name of anonymous memory of huge pages in /proc.
const HUGE: &[u8] = b"/anon_hugepage";

/// How the name of a memfd begins in /proc.
const MEMFD: &[u8] = b"/memfd:";

const F_SEAL_EXEC: i32 = 0x20;
const KNOWN_SEALS: i32 = libc::F_SEAL_SEAL
    | libc::F_SEAL_SHRINK
    | libc::F_SEAL_GROW
    | libc::F_SEAL_WRITE
    | libc::F_SEAL_FUTURE_WRITE
    | F_SEAL_EXEC;

/// Opens for reading, without a trace in the time of the last access where that is permitted.
pub(super) fn open_quietly(way: &str) -> Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    match open(way, flags | OFlag::O_NOATIME, Mode::empty()) {
        Err(Errno::EPERM) => open(way, flags, Mode::empty()),
        opened => opened,
    }
    .map(File::from)
    .call("open")
}

/// Is the directory in which the file was still there? Or is something else there now, or over it?
fn is_beside(file: impl AsFd, path: &[u8]) -> Result<bool> {
    let directory = match split(path).and_then(|(parent, _)| open_directory(parent)) {
        Ok(directory) => directory,
        Err(error) => match error.raw_errno() {
            Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(false),
            None => return Ok(false), // it never had a name in the file system
            Some(_) => return Err(error),
        },
    };
    Ok(mount_of(file)? == mount_of(directory)?)
}

pub(super) fn mount_of(file: impl AsFd) -> Result<u32> {
    let path = format!("/proc/self/fdinfo/{}", file.as_fd().as_raw_fd());
    let text = std::fs::read(path).call("read")?;
    let info = fdinfo::parse(&text);
    let info = info.map_err(|error| Error::new(ErrorKind::Kernel, "fdinfo").with_source(error))?;
    Ok(info.mnt_id)
}

fn attributes_of(way: &str) -> Result<Vec<(Bytes, Bytes)>> {
    let way = c_string(way.as_bytes())?;
    let names = match xattr::list(&way) {
        Err(Errno::EOPNOTSUPP) => Vec::new(),
        names => names.call("listxattr")?,
    };
    let value = |name: Vec<u8>| {
        let value = xattr::get(&way, &c_string(&name)?).call("getxattr")?;
        Ok((name.into(), value.into()))
    };
    names.into_iter().map(value).collect()
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes)
        .map_err(|error| Error::new(ErrorKind::Image, "a name with a zero byte").with_source(error))
}

/// The parts of a file that are not holes.
fn data_of(file: &File, size: u64) -> Result<Vec<Range<u64>>> {
    let mut data = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(Error::call("lseek(SEEK_DATA)", errno)),
        };
        at = (lseek(file, start as i64, Whence::SeekHole).call("lseek(SEEK_HOLE)")? as u64).min(size);
        if at <= start {
            break; // it became shorter meanwhile
        }
        data.push(start..at);
    }
    Ok(data)
}

/// Directory and last component of a path.
fn split(path: &[u8]) -> Result<(&Path, &OsStr)> {
    let path = Path::new(OsStr::from_bytes(path));
    let bad = || Error::new(ErrorKind::Image, "not an absolute path").about(Subject::Path(path.into()));
    match (path.is_absolute(), path.parent(), path.file_name()) {
        (true, Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(bad()),
    }
}

/// Opens a directory that is to be written to, not through any symbolic link.
fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(AT_FDCWD, path, how).call("openat2").about(|| Subject::Path(path.into()))
}

impl Ghost {
    /// Without its contents.
    fn bare(path: &[u8], birth: Birth, stat: &FileStat) -> Self {
        Self {
            path: path.to_vec().into(),
            birth,
            inode: Inode::of(stat),
            size: 0,
            attributes: Vec::new(),
            runs: Vec::new(),
        }
    }

    fn is_again(&self) -> bool {
        matches!(self.birth, Birth::Again(_))
    }

    /// There is such a file already; only a name of it has to be made.
    fn is_there(&self) -> bool {
        matches!(self.birth, Birth::Linked { .. } | Birth::Again(_))
    }

    fn subject(&self) -> Subject {
        Subject::Path(PathBuf::from(OsStr::from_bytes(&[&*self.path, DELETED].concat())))
    }

    fn kind(&self) -> SFlag {
        self.inode.kind()
    }

    /// An image is not trusted.
    fn check(&self, own: u32, image: &Image) -> Result<()> {
        let bad = |why| Err(Error::new(ErrorKind::Image, why));
        if !KINDS.contains(&self.kind()) {
            return bad("an unlinked file of an impossible type");
        }
        if i64::try_from(self.size).is_err() || (self.kind() != SFlag::S_IFREG && self.size > 0) {
            return bad("an unlinked file of an impossible size");
        }
        let end = self.size.next_multiple_of(PAGE);
        let inside = |run: &Run| run.addr.checked_add(run.len).is_some_and(|last| last <= end);
        if !self.runs.iter().all(inside) {
            return bad("data beyond the end of an unlinked file");
        }
        match &self.birth {
            Birth::Memory { seals, .. } if !self.path.starts_with(MEMFD) || *seals & !KNOWN_SEALS != 0 => {
                return bad("an impossible memfd");
            }
            Birth::Memory { huge: Some(shift), .. } | Birth::Huge(shift)
                if PageShift::new(*shift).is_none_or(|page| !self.size.is_multiple_of(page.size())) =>
            {
                return bad("huge pages of an impossible size");
            }
            Birth::Memory { .. } | Birth::Huge(_) | Birth::Nameless { .. }
                if self.kind() != SFlag::S_IFREG =>
            {
                return bad("an unlinked file of an impossible origin");
            }
            Birth::Linked { .. } | Birth::Again(_) if self.kind() == SFlag::S_IFDIR => {
                return bad("a directory with two names");
            }
            // One is made after the other.
            Birth::Again(first) if *first >= own || image.require::<Self>(Owner(*first))?.is_again() => {
                return bad("an unlinked file that is none of the others");
            }
            Birth::Linked { name, .. } if matches!(&**name, b"" | b"." | b"..") || name.contains(&b'/') => {
                return bad("a name that is none");
            }
            Birth::Memory { .. } | Birth::Huge(_) => {}
            Birth::Named | Birth::Nameless { .. } | Birth::Linked { .. } | Birth::Again(_) => {
                split(&self.path).map(|_| ())?;
            }
        }
        Segments(image).check(&self.runs)
    }
}

fn missing(number: u32) -> Error {
    Error::new(ErrorKind::Image, "a file that is missing").about(subject_of(number))
}

/// What errors call a file of which no more is known.
pub(super) fn subject_of(number: u32) -> Subject {
    Subject::Section(format!("{} {number}", Ghost::NAME))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use nix::sys::stat::fstat;
    use nix::unistd::geteuid;

    use super::super::inode::Time;
    use super::super::link;
    use super::super::tests::{Scratch, make, probe, refused};
    use super::super::{Collector, FilePolicy, FileRef, Finder};
    use super::*;

    fn inode(mode: u32) -> Inode {
        let (user, group) = (geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Inode { mode, user, group, accessed: Time(1, 2), modified: Time(3, 4) }
    }

    fn ghost(path: &Path) -> Ghost {
        Ghost {
            path: path.as_os_str().as_bytes().to_vec().into(),
            birth: Birth::Named,
            inode: inode(libc::S_IFREG | 0o640),
            size: 5000,
            attributes: Vec::new(),
            runs: vec![Run { addr: 0, len: PAGE, segment: 0, offset: 0 }],
        }
    }

    fn linked(name: &[u8]) -> Birth {
        Birth::Linked { name: name.to_vec().into(), inode: 1 }
    }

    fn image(scratch: &Scratch, ghost: &Ghost) -> Image {
        scratch.image(|records| records.put(Owner(1), ghost).unwrap())
    }

    #[test]
    fn hostile_ghosts() {
        let scratch = Scratch::new();
        let good = || ghost(&scratch.path("file"));
        make(&image(&scratch, &good())).unwrap();
        let run = |addr, len, offset| vec![Run { addr, len, segment: 0, offset }];
        for (what, wrong) in [
            ("relative", Ghost { path: b"file".to_vec().into(), ..good() }),
            ("root", Ghost { path: b"/".to_vec().into(), ..good() }),
            (
                "zero byte",
                Ghost { attributes: vec![(b"user.\0".to_vec().into(), Bytes::default())], ..good() },
            ),
            ("directory", Ghost { inode: inode(libc::S_IFDIR | 0o755), ..good() }),
            ("socket", Ghost { inode: inode(libc::S_IFSOCK | 0o755), size: 0, runs: Vec::new(), ..good() }),
            ("device", Ghost { inode: inode(libc::S_IFCHR | 0o666), ..good() }),
            ("size", Ghost { size: 1 << 63, ..good() }),
            ("end", Ghost { runs: run(2 * PAGE, PAGE, 0), ..good() }),
            ("overflow", Ghost { runs: run(u64::MAX, PAGE, 0), ..good() }),
            ("segment", Ghost { runs: run(0, PAGE, 1), ..good() }),
            ("no segment", Ghost { runs: vec![Run { segment: 9, ..good().runs[0] }], ..good() }),
            ("huge", Ghost { birth: Birth::Huge(64), ..good() }),
            ("huge size", Ghost { birth: Birth::Huge(21), ..good() }),
            ("fifo", Ghost { inode: inode(libc::S_IFIFO | 0o600), ..good() }),
            ("way out", Ghost { birth: linked(b"../file"), ..good() }),
            ("no name", Ghost { birth: linked(b""), ..good() }),
            ("itself", Ghost { birth: Birth::Again(1), ..good() }),
            ("none", Ghost { birth: Birth::Again(0), ..good() }),
        ] {
            let said = refused(&image(&scratch, &wrong), ErrorKind::Image);
            assert!(scratch.names().is_empty(), "{what}: {said}: {:?}", scratch.names());
        }
    }

    #[test]
    fn a_directory_that_is_gone_or_leads_elsewhere() {
        let scratch = Scratch::new();
        std::os::unix::fs::symlink(scratch.path(""), scratch.path("link")).unwrap();
        for path in ["none/file", "link/file", "link/../none/file"] {
            refused(&image(&scratch, &ghost(&scratch.path(path))), ErrorKind::Conflict);
        }
        assert_eq!(scratch.names(), ["link"]);
    }

    /// Neither the name of another file nor a name of ours is left.
    #[test]
    fn a_name_that_is_taken() {
        let scratch = Scratch::new();
        std::fs::write(scratch.path("file"), "other").unwrap();
        make(&image(&scratch, &ghost(&scratch.path("file")))).unwrap();
        assert_eq!(std::fs::read(scratch.path("file")).unwrap(), b"other");
        assert_eq!(scratch.names(), ["file"]);
    }

    #[test]
    fn a_file_that_is_missing() {
        let error = Finder::of_nothing().open(&FileRef::Ghost(7), OFlag::O_RDONLY).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image);
    }

    #[test]
    fn the_limit_names_size_and_option() {
        let scratch = Scratch::new();
        let file = scratch.file("file");
        file.write_all_at(&[1; 5000], 1 << 20).unwrap();
        std::fs::remove_file(scratch.path("file")).unwrap();
        let describe = |ghost_limit| {
            let mut collector = Collector::of_policy(&FilePolicy { ghost_limit, ..FilePolicy::default() });
            collector.file(&probe(&file)).unwrap()
        };
        if fstatfs(&file).unwrap().filesystem_type() == TMPFS_MAGIC {
            return; // there is no limit for memory
        }
        let refusal = describe(4999).unwrap_err();
        assert!(refusal.reason.contains("5000 bytes") && refusal.reason.contains("4999"), "{refusal}");
        assert!(refusal.hint.unwrap().contains("Checkpoint::ghost_limit"));
        assert_eq!(describe(5000).unwrap(), FileRef::Ghost(1));
    }

    #[test]
    fn gone_with_its_directory_or_still_linked() {
        let scratch = Scratch::new();
        let describe = |file: &File| {
            let mut collector = Collector::of_policy(&FilePolicy::default());
            collector.file(&probe(file)).unwrap()
        };
        std::fs::create_dir(scratch.path("dir")).unwrap();
        let file = scratch.file("dir/file");
        std::fs::remove_dir_all(scratch.path("dir")).unwrap();
        assert!(describe(&file).unwrap_err().reason.contains("directory"));
        let linked = scratch.file("linked");
        std::fs::hard_link(scratch.path("linked"), scratch.path("other")).unwrap();
        std::fs::remove_file(scratch.path("linked")).unwrap();
        assert!(describe(&linked).unwrap_err().reason.contains("other names"));
    }

    /// The name that the checkpoint has made is there only as long as the checkpoint may come to a good end.
    #[test]
    fn another_name_comes_and_goes() {
        let scratch = Scratch::new();
        let file: OwnedFd = scratch.file("file").into();
        let mut links = Links::default();
        let directory = || open_directory(&scratch.path("")).unwrap();
        let name = links.make(&file, directory()).unwrap();
        assert_eq!(scratch.names().len(), 2);
        let inode = fstat(&file).unwrap().st_ino;
        link::open(&directory(), name.as_bytes(), inode).unwrap();
        for (name, inode) in [(name.as_bytes(), inode + 1), (b"none", inode)] {
            let error = link::open(&directory(), name, inode).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict);
        }
        drop(links);
        assert_eq!(scratch.names(), ["file"]);
    }

    /// Deleted or not: the name decides nothing here, and chattr(1) wants one.
    #[test]
    fn what_must_not_change_is_refused() {
        let scratch = Scratch::new();
        let file = scratch.file("file");
        let look = || {
            let name = [scratch.path("file").as_os_str().as_bytes(), DELETED].concat();
            let way = format!("/proc/self/fd/{}", file.as_raw_fd());
            Ghosts::new(&FilePolicy::default()).number(&name, &fstat(&file).unwrap(), &way).unwrap()
        };
        let change = |how| {
            let chattr = std::process::Command::new("chattr").arg(how).arg(scratch.path("file")).output();
            chattr.is_ok_and(|done| done.status.success())
        };
        assert_eq!(look().unwrap(), 1);
        for (set, unset) in [("+a", "-a"), ("+i", "-i")] {
            if !change(set) {
                return; // not by us, or not in this file system
            }
            let refused = look();
            assert!(change(unset));
            assert!(refused.unwrap_err().text.contains("immutable"));
        }
        assert_eq!(look().unwrap(), 1);
    }

    #[test]
    fn permissions_and_times_come_last() {
        let scratch = Scratch::new();
        let image =
            image(&scratch, &Ghost { inode: inode(libc::S_IFREG | 0o4), ..ghost(&scratch.path("file")) });
        let mut revived = Revived::make(&image).unwrap();
        let file = File::from(revived.open(1, OFlag::O_RDWR).unwrap());
        revived.finish().unwrap();
        let now = file.metadata().unwrap();
        assert_eq!(now.permissions().mode() & 0o7777, 0o4);
        use std::os::unix::fs::MetadataExt;
        assert_eq!((now.atime(), now.atime_nsec(), now.mtime(), now.mtime_nsec()), (1, 2, 3, 4));
        assert_eq!((now.nlink(), now.size()), (0, 5000));
    }
}
