//! An image in a directory of its own: written so that it is there whole or not at all, and read with
//! every doubt settled before the first byte is used.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, fsync, geteuid, mkdir, unlinkat};

use super::chain::{self, ParentLink};
use super::manifest::Id;
use super::publish::{publish, sync_entry};
use super::sections::{has_magic, named};
use super::segment::{Chunks, Out, PageFormat, PageSegment, SegmentWriter, Stored};
use super::{
    Content, ImageSink, Kind, ListedFile, Manifest, ManifestInfo, Owner, Record, Section, SectionWriter,
    Sections, Tag,
};
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};
use crate::sys::direct;

pub(super) const MANIFEST: &str = "manifest";
/// No manifest is longer: it has room for more segments than can be numbered.
pub(super) const MANIFEST_MAX: u64 = 16 << 20;
/// No state file is longer, on either side: it is held in memory whole.
pub(super) const STATE_MAX: u64 = 1 << 30;

/// How often an image may be replaced while it is being opened.
const REPLACED_MAX: u32 = 32;

/// What of an image must have reached the disk when a checkpoint is over (fsync(2)).
///
/// ```
/// use cryosleep::{Checkpoint, Durability};
/// # fn nightly(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).durability(Durability::Synced).write_to("/var/lib/images/job")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Durability {
    /// Nothing: the image is whole for every reader, but a crash of the machine may lose or tear it.
    #[default]
    Cached,
    /// All of it, and the directory, if it was made for it. Pages that are not compressed go past the page cache (O_DIRECT), where the file system allows it:
    /// that is faster than flushing them, but a restore will have to read them from the disk.
    Synced,
}

/// A directory that holds, or will hold, an image; its path is only for messages.
#[derive(Debug)]
pub(super) struct Dir {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
}

impl Dir {
    pub(super) fn subject(&self) -> Subject {
        Subject::Path(self.path.clone())
    }

    pub(super) fn file(&self, name: &str) -> Subject {
        Subject::Path(self.path.join(name))
    }

    fn create(&self, name: &str) -> Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).call("openat");
        fd.map(File::from).about(|| self.file(name))
    }

    fn open(&self, name: &str) -> Result<File> {
        // O_NONBLOCK: opening must not wait should somebody have put a fifo there.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let fd = openat(&self.fd, name, flags, Mode::empty()).call("openat");
        fd.map(File::from).about(|| self.file(name))
    }

    fn length(&self, name: &str) -> Result<u64> {
        let stat = fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW).call("fstatat");
        Ok(length(&stat.about(|| self.file(name))?))
    }

    pub(super) fn remove(&self, name: &str) {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => tracing::warn!(dir = %self.path.display(), name, %errno, "image file not removed"),
        }
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn length(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn is_kind(stat: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == kind
}

fn bad_image(reason: &'static str) -> Error {
    Error::new(ErrorKind::Image, reason)
}

/// Whoever can change the files of an image decides what the restored tasks do: only the caller and root may.
fn check_trust(stat: &FileStat) -> Result<(), &'static str> {
    let mode = Mode::from_bits_truncate(stat.st_mode);
    let sticky = is_kind(stat, SFlag::S_IFDIR) && mode.contains(Mode::S_ISVTX);
    if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
        return Err("belongs to another user");
    }
    if mode.intersects(Mode::S_IWGRP | Mode::S_IWOTH) && !sticky {
        return Err("can be written by others than its owner");
    }
    Ok(())
}

const TRUST_HINT: &str =
    "an image must belong to the caller or to root, and nobody else may write to it: chown, chmod go-w";

/// The records of an image, until it is finished.
#[derive(Debug)]
pub(crate) struct Records(SectionWriter<Vec<u8>>);

impl Records {
    pub(crate) fn new() -> Result<Self> {
        SectionWriter::new(Vec::new(), Kind::State).map(Self)
    }

    /// Adds one of another image, as it is.
    pub(crate) fn copy(&mut self, section: Section<'_>) -> Result<()> {
        self.0.put(section)
    }

    /// Adds one.
    pub(crate) fn put<R: Record>(&mut self, owner: Owner, record: &R) -> Result<()> {
        self.0.put_record(owner, record)?;
        if self.0.get_ref().len() as u64 > STATE_MAX {
            let error = Error::new(ErrorKind::Unsupported, "the image holds more than 1 GiB of records");
            return Err(error.about(named::<R>(owner)));
        }
        Ok(())
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0.into_inner()
    }
}

/// Writes an image into a directory. Dropped before [`ImageWriter::finish`], it leaves nothing behind
/// but the directory.
#[derive(Debug)]
pub(crate) struct ImageWriter {
    dir: Dir,
    /// The directory, by this writer.
    made: bool,
    id: Id,
    durability: Durability,
    content: Content,
    /// When and by which kernel, if not now and here.
    origin: Option<((u64, u32), String)>,
    /// What it only holds the changes of, and how many page segments that has, with its own parents.
    parent: Option<ParentLink>,
    inherited: u16,
    pages: PageFormat,
    segments: u16,
    /// Created by this writer, and to be removed should it not get to its end.
    created: Vec<String>,
}

/// What [`ImageWriter::finish`] has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) id: [u8; 16],
    /// Length of all files together.
    pub(crate) bytes: u64,
}

impl ImageWriter {
    /// Starts an image in `dir`, which is created (mode 0700) unless it exists. An image that it holds
    /// already stays untouched until this one is finished.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        let (fd, made) = open_or_make_dir(dir).about(|| Subject::Path(dir.into()))?;
        let mut writer = Self::create_in(fd, dir)?;
        writer.made = made;
        Ok(writer)
    }

    /// The same for a directory that is open already; `path` is what messages call it.
    pub(crate) fn create_in(dir: OwnedFd, path: &Path) -> Result<Self> {
        let dir = Dir { fd: dir, path: path.into() };
        check_target(&dir).about(|| dir.subject())?;
        refuse_foreign(&dir, MANIFEST)?;
        Ok(Self {
            dir,
            made: false,
            id: Id::random(),
            durability: Durability::default(),
            content: Content::default(),
            origin: None,
            parent: None,
            inherited: 0,
            pages: PageFormat::default(),
            segments: 0,
            created: Vec::new(),
        })
    }

    pub(crate) fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Makes it what another image is, in another directory.
    pub(crate) fn instead_of(mut self, image: &Image) -> Result<Self> {
        chain::refuse_same_place(image, &self.dir)?;
        let Manifest { content, created, ref kernel, .. } = image.manifest;
        self.content = content;
        self.origin = Some((created, kernel.clone()));
        Ok(self)
    }

    /// Makes it a pre-dump.
    pub(crate) fn pages_only(mut self) -> Self {
        self.content = Content::Pages;
        self
    }

    /// Makes it the child of an image in another directory: records may point into the page segments of that too.
    pub(crate) fn child_of(mut self, parent: &Image) -> Result<Self> {
        self.parent = Some(parent.link_from(&self.dir)?);
        self.inherited = parent.segment_count();
        Ok(self)
    }

    pub(crate) fn pages(mut self, format: PageFormat) -> Self {
        self.pages = format;
        self
    }

    /// Creates the next page segment. They are counted from those of the oldest image of the chain. What
    /// becomes known of its chunks is to be among the records.
    pub(crate) fn segment(&mut self) -> Result<SegmentWriter> {
        let own = self.segments;
        if self.inherited.checked_add(own).is_none_or(|index| index == u16::MAX) {
            return Err(bad_image("too many page segments"));
        }
        let file = self.create_file(self.id.file_name(usize::from(own) + 1))?;
        self.segments = own + 1;
        if self.durability == Durability::Synced && self.pages.is_aligned() {
            direct::bypass_cache(&file);
        }
        Ok(SegmentWriter::new(own, Out::File(file), self.pages).behind(self.inherited))
    }

    /// Writes the records, and makes this the directory's image: at once, by the name of its
    /// manifest. Only then are the files of an image that was there before removed.
    pub(crate) fn finish(mut self, records: Records, info: ManifestInfo) -> Result<Written> {
        let mut files = vec![self.write_state(records)?];
        for index in 0..self.segments {
            files.push(self.list_segment(index)?);
        }
        let mut manifest = Manifest::new(self.id, info, (self.content, self.parent.clone()), files)?;
        if let Some((created, kernel)) = self.origin.take() {
            (manifest.created, manifest.kernel) = (created, kernel);
        }
        let bytes = manifest.to_bytes()?;
        self.publish(&manifest, &bytes)?;
        let listed = manifest.files.iter().map(|file| file.length).sum::<u64>();
        Ok(Written { id: manifest.id, bytes: listed + bytes.len() as u64 })
    }

    fn create_file(&mut self, name: String) -> Result<File> {
        let file = self.dir.create(&name)?;
        self.created.push(name);
        Ok(file)
    }

    fn write_file(&mut self, name: String, bytes: &[u8]) -> Result<()> {
        let subject = self.dir.file(&name);
        let mut file = self.create_file(name)?;
        file.write_all(bytes).call("write").about(|| subject.clone())?;
        self.sync(&file).about(|| subject)
    }

    fn sync(&self, file: impl AsFd) -> Result<()> {
        match self.durability {
            Durability::Cached => Ok(()),
            Durability::Synced => fsync(file).call("fsync"),
        }
    }

    fn write_state(&mut self, records: Records) -> Result<ListedFile> {
        let bytes = records.into_bytes();
        let name = self.id.file_name(0);
        self.write_file(name.clone(), &bytes)?;
        Ok(ListedFile { name, length: bytes.len() as u64, crc32: Some(crc32fast::hash(&bytes)) })
    }

    fn list_segment(&self, index: u16) -> Result<ListedFile> {
        let name = self.id.file_name(usize::from(index) + 1);
        if self.durability == Durability::Synced {
            // Another descriptor than the one that wrote it does as well: it is the file that is flushed.
            let file = self.dir.open(&name)?;
            self.sync(&file).about(|| self.dir.file(&name))?;
        }
        Ok(ListedFile { length: self.dir.length(&name)?, name, crc32: None })
    }

    fn publish(&mut self, manifest: &Manifest, bytes: &[u8]) -> Result<()> {
        if self.made && self.durability == Durability::Synced {
            sync_entry(&self.dir)?;
        }
        let draft = self.id.manifest_draft();
        self.write_file(draft.clone(), bytes)?;
        let mut before = publish(&self.dir, &draft)?;
        let synced = self.sync(&self.dir).about(|| self.dir.subject());
        if synced.is_err() {
            before = match before.put_back(&self.dir, &draft) {
                Ok(()) => return synced,
                Err(before) => before,
            };
        }
        self.created.clear(); // they are the image
        before.remove(&self.dir, &draft, manifest);
        synced
    }
}

impl ImageSink for ImageWriter {
    fn segment(&mut self) -> Result<SegmentWriter> {
        Self::segment(self)
    }

    fn lends_files(&self) -> bool {
        self.pages.can_be_lent()
    }

    fn finish(self: Box<Self>, records: Records, info: ManifestInfo) -> Result<Written> {
        Self::finish(*self, records, info)
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        for name in &self.created {
            self.dir.remove(name);
        }
    }
}

/// And was it made?
fn open_or_make_dir(path: &Path) -> Result<(OwnedFd, bool)> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let with = |made| move |fd| (fd, made);
    match open(path, flags, Mode::empty()) {
        Err(Errno::ENOENT) => {
            let made = match mkdir(path, Mode::S_IRWXU) {
                Ok(()) => true,
                Err(Errno::EEXIST) => false,
                Err(errno) => return Err(Error::call("mkdir", errno)),
            };
            open(path, flags, Mode::empty()).call("open").map(with(made))
        }
        Err(errno @ (Errno::ENOTDIR | Errno::ELOOP)) => Err(Error::call("open", errno)
            .with_hint("an image is written into a directory, not through a symbolic link")),
        opened => opened.call("open").map(with(false)),
    }
}

/// An image holds all of a process's memory: nobody else may be able to put files in its place.
fn check_target(dir: &Dir) -> Result<()> {
    let stat = fstat(dir).call("fstat")?;
    if !is_kind(&stat, SFlag::S_IFDIR) {
        return Err(Error::call("fstat", Errno::ENOTDIR));
    }
    check_trust(&stat).map_err(|reason| Error::new(ErrorKind::Permission, reason).with_hint(TRUST_HINT))
}

/// Replacing an image is fine, even one that a crash has torn; replacing somebody's other file is not.
pub(super) fn refuse_foreign(dir: &Dir, name: &str) -> Result<()> {
    let mut start = Vec::new();
    let file = match dir.open(name) {
        Err(error) if error.raw_errno() == Some(Errno::ENOENT) => return Ok(()),
        file => file?,
    };
    file.take(64).read_to_end(&mut start).call("read").about(|| dir.file(MANIFEST))?;
    if has_magic(&start) || start.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let error = Error::new(ErrorKind::Conflict, "the file is there already and is no image's manifest");
    Err(error.about(dir.file(MANIFEST)).with_hint("write the image into a directory of its own"))
}

/// An image that has been opened and verified, with all that it is a child of.
#[derive(Debug)]
pub(crate) struct Image {
    /// None: it comes from elsewhere.
    dir: Option<Arc<Dir>>,
    manifest: Manifest,
    manifest_crc32: u32,
    state: Vec<u8>,
    sections: Sections,
    segments: Vec<PageSegment>,
    parent: Option<Box<Image>>,
    /// How many page segments its parents have.
    inherited: u16,
}

impl Image {
    /// Opens the image in a directory and verifies everything but the contents of its pages.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(dir, flags, Mode::empty()).call("open");
        let fd = fd.map_err(|error| error.with_kind(ErrorKind::Image)).about(|| Subject::Path(dir.into()))?;
        Self::open_in(fd, dir)
    }

    /// The same for a directory that is open already; `path` is what messages call it.
    pub(crate) fn open_in(dir: OwnedFd, path: &Path) -> Result<Self> {
        let dir = Arc::new(Dir { fd: dir, path: path.into() });
        Self::read(&dir).map_err(|error| error.with_kind(ErrorKind::Image))
    }

    fn read(dir: &Arc<Dir>) -> Result<Self> {
        check_dir(dir)?;
        let mut manifest = read_manifest(dir, MANIFEST)?;
        let mut attempts = REPLACED_MAX;
        loop {
            let id = manifest.0.id;
            let failed = match Self::read_files(dir, manifest).and_then(chain::with_parents) {
                Ok(image) => return Ok(image),
                Err(error) => error,
            };
            // Files that the manifest lists are gone when another image has taken its place since.
            match read_manifest(dir, MANIFEST) {
                Ok(now) if now.0.id != id && attempts > 0 => manifest = now,
                _ => return Err(failed),
            }
            attempts -= 1;
        }
    }

    /// One image of a chain, if it still is the one that is meant.
    pub(super) fn read_link(dir: Dir, link: &ParentLink) -> Result<Self> {
        check_dir(&dir)?;
        let (manifest, crc32) = read_manifest(&dir, MANIFEST)?;
        if (manifest.id, crc32) != (link.id, link.manifest_crc32) {
            return Err(bad_image("another image is there now, or it was altered").about(dir.subject()));
        }
        Self::read_files(&Arc::new(dir), (manifest, crc32))
    }

    fn read_files(dir: &Arc<Dir>, (manifest, manifest_crc32): (Manifest, u32)) -> Result<Self> {
        let Some((listed, rest)) = manifest.files.split_first() else {
            return Err(bad_image("the manifest lists no state file").about(dir.file(MANIFEST)));
        };
        let state =
            read_state(dir, listed).and_then(|state| parse_state(state).about(|| dir.file(&listed.name)))?;
        let open = |listed| Ok(Stored::File(open_listed(dir, listed)?, dir.path.join(&listed.name)));
        let stored = rest.iter().map(open).collect::<Result<Vec<_>>>()?;
        Self::of(Some(dir.clone()), (manifest, manifest_crc32), state, stored)
    }

    /// An image of its parts.
    pub(super) fn of(
        dir: Option<Arc<Dir>>,
        (manifest, manifest_crc32): (Manifest, u32),
        (state, sections): (Vec<u8>, Sections),
        stored: Vec<Stored>,
    ) -> Result<Self> {
        let segments = Vec::new();
        let mut image =
            Self { dir, manifest, manifest_crc32, state, sections, segments, parent: None, inherited: 0 };
        for (index, stored) in (0..).zip(stored) {
            let listed = image.manifest.files.get(index as usize + 1).ok_or_else(|| no_segment(index))?;
            let segment = PageSegment::new(stored, listed.length, image.get(Owner(index.into()))?)?;
            image.segments.push(segment);
        }
        if let Some(owner) = image.owners::<Chunks>().find(|owner| owner.0 as usize >= image.segments.len()) {
            return Err(bad_image("the image lacks this page segment").about(named::<Chunks>(owner)));
        }
        Ok(image)
    }

    /// Puts one image of a chain before those that come after it.
    pub(super) fn adopted_by(mut self, parent: Option<Self>) -> Result<Self> {
        self.inherited = parent.as_ref().map_or(0, Self::segment_count);
        self.parent = parent.map(Box::new);
        match usize::from(self.inherited) + self.segments.len() <= usize::from(u16::MAX) {
            true => Ok(self),
            false => Err(bad_image("its chain has too many page segments").about(self.dir()?.subject())),
        }
    }

    /// Where it was found: parents are in directories.
    pub(crate) fn path(&self) -> Result<&Path> {
        self.dir().map(|dir| dir.path.as_path())
    }

    pub(super) fn dir(&self) -> Result<&Dir> {
        self.dir.as_deref().ok_or_else(|| bad_image("it is in no directory"))
    }

    /// It can be restored.
    pub(crate) fn require_tree(&self) -> Result<()> {
        match self.manifest.content {
            Content::Tree => Ok(()),
            Content::Pages => Err(bad_image("a pre-dump: it holds pages only, for another image")
                .about(self.dir.as_ref().map_or(Subject::Path(MANIFEST.into()), |dir| dir.subject()))
                .with_hint("restore an image that was made with this one as its parent")),
        }
    }

    /// The image that this one only holds the changes of.
    pub(crate) fn parent(&self) -> Option<&Image> {
        self.parent.as_deref()
    }

    /// How a child of it that is written into this directory names it.
    fn link_from(&self, child: &Dir) -> Result<ParentLink> {
        ParentLink::to(self, self.manifest_crc32, child)
    }

    /// How many page segments there are, in all images of the chain.
    fn segment_count(&self) -> u16 {
        self.inherited + self.segments.len() as u16
    }

    /// The image that has this page segment, and where in its own list.
    fn holder(&self, index: u16) -> Result<(&Image, usize)> {
        let mut image = self;
        while index < image.inherited {
            image = image.parent().ok_or_else(|| no_segment(index))?;
        }
        Ok((image, usize::from(index - image.inherited)))
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The record that `owner` has, if there is one.
    pub(crate) fn get<R: Record>(&self, owner: Owner) -> Result<Option<R>> {
        self.sections.get(&self.state, R::TAG, owner).map(|section| section.record()).transpose()
    }

    /// The record that `owner` must have.
    pub(crate) fn require<R: Record>(&self, owner: Owner) -> Result<R> {
        self.get(owner)?.ok_or_else(|| bad_image("the image lacks this section").about(named::<R>(owner)))
    }

    /// Who has a record of this kind, in order.
    pub(crate) fn owners<R: Record>(&self) -> impl Iterator<Item = Owner> + '_ {
        self.sections.owners(R::TAG)
    }

    /// All sections, by tag and owner.
    pub(crate) fn sections(&self) -> impl Iterator<Item = Section<'_>> {
        self.sections.iter(&self.state)
    }

    /// The sections whose tags the caller does not know: an image must not be restored without them.
    pub(crate) fn unknown<'a>(&'a self, known: &'a [Tag]) -> impl Iterator<Item = Section<'a>> + 'a {
        self.sections.iter(&self.state).filter(|section| !known.contains(&section.tag))
    }

    /// A page segment, open for reading.
    pub(crate) fn segment(&self, index: u16) -> Result<&PageSegment> {
        let (image, own) = self.holder(index)?;
        image.segments.get(own).ok_or_else(|| no_segment(index))
    }
}

fn no_segment(index: u16) -> Error {
    Error::new(ErrorKind::Image, format!("the image has no page segment {index}"))
}

/// Opens a file of an image, which must be a regular one that only its owner can change.
fn open_trusted(dir: &Dir, name: &str) -> Result<(File, u64)> {
    let file = dir.open(name)?;
    let stat = fstat(&file).call("fstat").about(|| dir.file(name))?;
    if !is_kind(&stat, SFlag::S_IFREG) {
        return Err(bad_image("not a regular file").about(dir.file(name)));
    }
    check_trust(&stat).map_err(|reason| bad_image(reason).about(dir.file(name)).with_hint(TRUST_HINT))?;
    Ok((file, length(&stat)))
}

fn open_listed(dir: &Dir, listed: &ListedFile) -> Result<File> {
    let (file, length) = open_trusted(dir, &listed.name)?;
    if length != listed.length {
        let reason = format!("{length} bytes long, but the manifest lists {}", listed.length);
        return Err(Error::new(ErrorKind::Image, reason).about(dir.file(&listed.name)));
    }
    Ok(file)
}

fn check_dir(dir: &Dir) -> Result<()> {
    let stat = fstat(dir).call("fstat").about(|| dir.subject())?;
    check_trust(&stat).map_err(|reason| bad_image(reason).about(dir.subject()).with_hint(TRUST_HINT))
}

/// And its checksum.
pub(super) fn read_manifest(dir: &Dir, name: &str) -> Result<(Manifest, u32)> {
    let (file, length) = open_trusted(dir, name)?;
    read_whole(file, length, MANIFEST_MAX)
        .and_then(|bytes| Ok((Manifest::from_bytes(&bytes)?, crc32fast::hash(&bytes))))
        .about(|| dir.file(name))
}

pub(super) fn parse_state(state: Vec<u8>) -> Result<(Vec<u8>, Sections)> {
    let sections = Sections::parse(&state, Kind::State)?;
    Ok((state, sections))
}

fn read_state(dir: &Dir, listed: &ListedFile) -> Result<Vec<u8>> {
    let file = open_listed(dir, listed)?;
    let bytes = read_whole(file, listed.length, STATE_MAX).about(|| dir.file(&listed.name))?;
    if listed.crc32 != Some(crc32fast::hash(&bytes)) {
        return Err(bad_image("the checksum does not match").about(dir.file(&listed.name)));
    }
    Ok(bytes)
}

/// Reads a file whose length fstat has told.
fn read_whole(file: File, length: u64, max: u64) -> Result<Vec<u8>> {
    let expected = usize::try_from(length).ok().filter(|_| length <= max);
    let expected = expected.ok_or_else(|| bad_image("longer than any file of its kind"))?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(expected).map_err(|error| bad_image("too large").with_source(error))?;
    file.take(length).read_to_end(&mut bytes).call("read")?;
    if bytes.len() != expected {
        return Err(bad_image("became shorter while it was read"));
    }
    Ok(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt, symlink};
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::sections::tests::{Thing, thing};
    use super::*;
    use crate::Pid;

    /// A directory of one test, removed with everything in it.
    pub(in crate::image) struct Scratch(pub(in crate::image) PathBuf);

    impl Scratch {
        pub(in crate::image) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name =
                format!("cryosleep-image-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
            Self(path)
        }

        fn image(&self) -> PathBuf {
            self.0.join("image")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    pub(in crate::image) const INFO: fn() -> ManifestInfo = || ManifestInfo { root: Pid::from(412) };

    fn write(dir: &Path, name: &str) -> Written {
        let mut writer = ImageWriter::create(dir).unwrap();
        for content in ["first pages", "more"] {
            let segment = writer.segment().unwrap();
            segment.file().unwrap().write_all_at(content.as_bytes(), 0).unwrap();
        }
        writer.finish(records(&[name, "second"]), INFO()).unwrap()
    }

    /// A record for each of these names, of owners 1, 2 ...
    pub(in crate::image) fn records(names: &[&str]) -> Records {
        let mut records = Records::new().unwrap();
        for (owner, name) in (1..).zip(names) {
            records.put(Owner(owner), &thing(name)).unwrap();
        }
        records
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn find(dir: &Path, prefix: &str) -> PathBuf {
        dir.join(names(dir).into_iter().find(|name| name.starts_with(prefix)).unwrap())
    }

    fn refused(dir: &Path) -> Error {
        let error = Image::open(dir).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image, "{error}");
        assert!(error.subject().is_some(), "{error}");
        error
    }

    #[test]
    fn round_trip() {
        let scratch = Scratch::new();
        let written = write(&scratch.image(), "first");
        let image = Image::open(&scratch.image()).unwrap();
        assert_eq!(image.require::<Thing>(Owner(1)).unwrap(), thing("first"));
        assert_eq!(image.get::<Thing>(Owner(3)).unwrap(), None);
        let error = image.require::<Thing>(Owner(3)).unwrap_err();
        assert_eq!(error.to_string(), "section THNG 3 (thing): the image lacks this section");
        assert_eq!(image.owners::<Thing>().collect::<Vec<_>>(), [Owner(1), Owner(2)]);
        assert_eq!(image.sections().count(), 2);
        assert_eq!(image.manifest().root, 412);
        assert_eq!(image.segment(0).unwrap().length(), 11);
        let mut content = [0; 4];
        image.segment(1).unwrap().read(0, &mut content).unwrap();
        assert_eq!(&content, b"more");
        assert_eq!(image.segment(2).unwrap_err().kind(), ErrorKind::Image);
        let lengths =
            fs::read_dir(scratch.image()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        assert_eq!(written.bytes, lengths.sum());
    }

    #[test]
    fn only_the_owner_may_read() {
        let scratch = Scratch::new();
        write(&scratch.image(), "first");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&scratch.image()), 0o700);
        let files = names(&scratch.image());
        assert_eq!(files.len(), 4);
        files.iter().for_each(|name| assert_eq!(mode(&scratch.image().join(name)), 0o600, "{name}"));
    }

    #[test]
    fn synced_writes_the_same_files() {
        let scratch = Scratch::new();
        let mut writer = ImageWriter::create(&scratch.image()).unwrap().durability(Durability::Synced);
        drop(writer.segment().unwrap());
        writer.finish(records(&["a"]), INFO()).unwrap();
        assert_eq!(Image::open(&scratch.image()).unwrap().segment(0).unwrap().length(), 0);
    }

    #[test]
    fn dropped_before_the_end_it_leaves_the_old_image_intact() {
        let scratch = Scratch::new();
        write(&scratch.image(), "old");
        let before = names(&scratch.image());
        let mut writer = ImageWriter::create(&scratch.image()).unwrap();
        let segment = writer.segment().unwrap();
        assert_eq!(segment.index, 0);
        assert_eq!(names(&scratch.image()).len(), before.len() + 1);
        drop(writer);
        assert_eq!(names(&scratch.image()), before);
        assert_eq!(Image::open(&scratch.image()).unwrap().require::<Thing>(Owner(1)).unwrap(), thing("old"));
    }

    #[test]
    fn a_second_image_replaces_the_first_and_nothing_else() {
        let scratch = Scratch::new();
        write(&scratch.image(), "old");
        let old = Image::open(&scratch.image()).unwrap();
        fs::write(scratch.image().join("notes"), "mine").unwrap();
        fs::write(scratch.image().join("state-00000000.img"), "somebody's").unwrap();
        write(&scratch.image(), "new");
        assert_eq!(names(&scratch.image()).len(), 4 + 2);
        assert_eq!(Image::open(&scratch.image()).unwrap().require::<Thing>(Owner(1)).unwrap(), thing("new"));
        // Whoever had the old one open still has it.
        assert_eq!(old.require::<Thing>(Owner(1)).unwrap(), thing("old"));
        let mut content = [0; 4];
        old.segment(1).unwrap().read(0, &mut content).unwrap();
    }

    #[test]
    fn a_reader_finds_a_whole_image_while_it_is_replaced() {
        let scratch = Scratch::new();
        write(&scratch.image(), "same");
        let path = scratch.image();
        let replace = std::thread::spawn(move || {
            (0..200).for_each(|_| {
                write(&path, "same");
            })
        });
        while !replace.is_finished() {
            let image = Image::open(&scratch.image()).unwrap();
            assert_eq!(image.require::<Thing>(Owner(1)).unwrap(), thing("same"));
        }
        replace.join().unwrap();
        assert_eq!(names(&scratch.image()).len(), 4);
    }

    #[test]
    fn a_failure_while_finishing_leaves_nothing() {
        let scratch = Scratch::new();
        let mut writer = ImageWriter::create(&scratch.image()).unwrap();
        drop(writer.segment().unwrap());
        fs::create_dir(scratch.image().join("manifest")).unwrap(); // cannot be replaced by a file
        let error = writer.finish(records(&[]), INFO()).unwrap_err();
        assert_eq!(error.syscall(), Some("read"));
        assert_eq!(names(&scratch.image()), ["manifest"]);
        fs::remove_dir(scratch.image().join("manifest")).unwrap();

        let mut writer = ImageWriter::create(&scratch.image()).unwrap();
        drop(writer.segment().unwrap());
        fs::write(scratch.image().join("manifest"), "somebody's").unwrap();
        let error = writer.finish(records(&[]), INFO()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert_eq!(names(&scratch.image()), ["manifest"]);
        assert_eq!(fs::read(scratch.image().join("manifest")).unwrap(), b"somebody's");
    }

    #[test]
    fn replaces_a_torn_manifest_but_no_foreign_file() {
        let scratch = Scratch::new();
        write(&scratch.image(), "old");
        let manifest = scratch.image().join("manifest");
        fs::write(&manifest, "").unwrap();
        refused(&scratch.image());
        write(&scratch.image(), "new");
        Image::open(&scratch.image()).unwrap();
        fs::write(&manifest, "apiVersion: v1").unwrap();
        let error = ImageWriter::create(&scratch.image()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert_eq!(fs::read(&manifest).unwrap(), b"apiVersion: v1");
    }

    #[test]
    fn duplicates_are_refused_when_written() {
        let error = records(&["a"]).put(Owner(1), &thing("a")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image);
    }

    #[test]
    fn unknown_tags_are_seen() {
        let scratch = Scratch::new();
        write(&scratch.image(), "first");
        let image = Image::open(&scratch.image()).unwrap();
        assert_eq!(image.unknown(&[Thing::TAG]).count(), 0);
        let unknown: Vec<_> =
            image.unknown(&[Manifest::TAG]).map(|section| (section.tag, section.owner)).collect();
        assert_eq!(unknown, [(Thing::TAG, Owner(1)), (Thing::TAG, Owner(2))]);
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_of_both_files_is_an_error() {
        let scratch = Scratch::new();
        write(&scratch.image(), "first");
        for path in [find(&scratch.image(), "state-"), scratch.image().join("manifest")] {
            let bytes = fs::read(&path).unwrap();
            let spoil = |bytes: &[u8]| {
                fs::write(&path, bytes).unwrap();
                refused(&scratch.image());
            };
            (0..bytes.len()).for_each(|len| spoil(&bytes[..len]));
            spoil(&[&bytes[..], &[0]].concat());
            for bit in 0..bytes.len() * 8 {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                spoil(&bytes);
            }
            fs::write(&path, &bytes).unwrap();
            Image::open(&scratch.image()).unwrap();
        }
    }

    #[test]
    fn missing_shorter_and_longer_segments() {
        let scratch = Scratch::new();
        write(&scratch.image(), "first");
        let path = find(&scratch.image(), "pages-");
        for length in [10, 12, 0] {
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
            let error = refused(&scratch.image());
            assert!(error.to_string().contains("but the manifest lists 11"), "{error}");
            assert_eq!(error.subject(), Some(&Subject::Path(path.clone())));
        }
        fs::remove_file(&path).unwrap();
        let error = refused(&scratch.image());
        assert_eq!((error.syscall(), error.errno()), (Some("openat"), Some(Errno::ENOENT as i32)));
    }

    #[test]
    fn files_must_be_regular() {
        let scratch = Scratch::new();
        write(&scratch.image(), "first");
        let (manifest, moved) = (scratch.image().join("manifest"), scratch.0.join("moved"));
        fs::rename(&manifest, &moved).unwrap();
        symlink(&moved, &manifest).unwrap();
        assert_eq!(refused(&scratch.image()).errno(), Some(Errno::ELOOP as i32));
        fs::remove_file(&manifest).unwrap();
        nix::unistd::mkfifo(&manifest, Mode::S_IRWXU).unwrap();
        assert!(refused(&scratch.image()).to_string().contains("not a regular file"));
        fs::remove_file(&manifest).unwrap();
        fs::create_dir(&manifest).unwrap();
        assert!(refused(&scratch.image()).to_string().contains("not a regular file"));
    }

    #[test]
    fn what_others_can_change_is_not_trusted() {
        let scratch = Scratch::new();
        write(&scratch.image(), "first");
        let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for path in [scratch.image(), scratch.image().join("manifest"), find(&scratch.image(), "pages-")] {
            let mode = fs::metadata(&path).unwrap().mode();
            for wrong in [mode | 0o020, mode | 0o002] {
                chmod(&path, wrong);
                let error = refused(&scratch.image());
                assert!(error.hint().is_some_and(|hint| hint.contains("chmod")), "{error}");
            }
            chmod(&path, mode);
        }
        Image::open(&scratch.image()).unwrap();
        chmod(&scratch.image(), 0o1777);
        Image::open(&scratch.image()).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(find(&scratch.image(), "state-"), Some(1234), None).unwrap();
            assert!(refused(&scratch.image()).to_string().contains("belongs to another user"));
        }
    }

    #[test]
    fn writes_only_into_a_directory_of_its_owner() {
        let scratch = Scratch::new();
        let link = scratch.0.join("link");
        symlink(&scratch.0, &link).unwrap();
        assert!(ImageWriter::create(&link).unwrap_err().hint().unwrap().contains("symbolic link"));
        let file = scratch.0.join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(ImageWriter::create(&file).unwrap_err().errno(), Some(Errno::ENOTDIR as i32));
        let error = ImageWriter::create(&scratch.0.join("no/such")).unwrap_err();
        assert_eq!((error.syscall(), error.errno()), (Some("mkdir"), Some(Errno::ENOENT as i32)));
        let open = scratch.0.join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(ImageWriter::create(&open).unwrap_err().kind(), ErrorKind::Permission);
        assert_eq!(fs::metadata(&open).unwrap().mode() & 0o777, 0o770);
    }

    #[test]
    fn an_absent_image() {
        let scratch = Scratch::new();
        let error = refused(&scratch.image());
        assert!(error.to_string().contains(scratch.image().to_str().unwrap()), "{error}");
        let error = refused(&scratch.0);
        assert_eq!(error.subject(), Some(&Subject::Path(scratch.0.join("manifest"))));
    }
}
