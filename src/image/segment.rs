//! Page segments: files of page contents, in chunks. Each chunk is checked by itself, may be compressed, and is read
//! whole.
//!
//! Records lead to places in the *contents* of a segment: only this file knows where in the file a chunk is.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use crc_fast::CrcAlgorithm;

use super::store::Pipe;
use super::{Decode, Encode, ImageSource, Part, Record, Tag};
use crate::arch::can_sum;
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};
use crate::sys::{PAGE, direct};

/// Large enough that a checksum costs next to nothing, small enough that little is read in vain.
pub(crate) const CHUNK: u64 = 64 * 1024;

/// Whether an image has checksums of its pages. With them a restore puts no page into a task that is not what it was.
///
/// ```
/// use cryosleep::{Checkpoint, PageChecksums};
/// # fn fast(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).page_checksums(PageChecksums::Off).write_to("/dev/shm/image")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PageChecksums {
    /// One for each 64 KiB, the CRC-32 of the CRC-32Cs of its pages.
    #[default]
    Crc32c,
    /// None: a damaged page is found by nobody but the program. What the target writes itself then holds its pages of
    /// zeroes too, as nobody looks at them.
    Off,
}

/// Whether the pages of an image are compressed, each 64 KiB by themselves; those that would hardly become smaller
/// are stored as they are.
///
/// ```
/// use cryosleep::{Checkpoint, Compression};
/// # fn small(pid: u32) -> cryosleep::Result<()> {
/// Checkpoint::of(pid).compression(Compression::Lz4).write_to("/var/lib/images/job")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// They are not: the fastest way.
    #[default]
    None,
    /// By LZ4 blocks: several times the time of a checkpoint, some more for a restore.
    Lz4,
}

/// How pages are stored.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageFormat {
    pub(crate) checksums: PageChecksums,
    pub(crate) compression: Compression,
}

impl PageFormat {
    /// Can a task write its pages by itself?
    pub(super) fn can_be_lent(self) -> bool {
        self.is_aligned() && (!self.is_summed() || can_sum())
    }

    /// Are pages written as they are, each at its own place?
    pub(super) fn is_aligned(self) -> bool {
        self.compression == Compression::None
    }

    /// Is a segment nothing but pages?
    fn is_bare(self) -> bool {
        !self.is_summed() && self.is_aligned()
    }

    fn is_summed(self) -> bool {
        self.checksums == PageChecksums::Crc32c
    }
}

/// What is known of the chunks of one segment, by whose index it goes.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Chunks {
    /// Of the contents, in bytes.
    pub(crate) length: u64,
    /// Of each the crc32 of the [`page_sum`]s, each as four bytes, the lowest first.
    pub(crate) sums: Option<Vec<u32>>,
    /// What each takes in the file, one behind the other: as much as its contents unless it is compressed. None: they
    /// all are stored as they are.
    pub(crate) stored: Option<Vec<u32>>,
}

impl Record for Chunks {
    const TAG: Tag = Tag::new(b"PGCH");
    const VERSION: u16 = 1;
    const NAME: &'static str = "chunks of pages";
}

impl Chunks {
    fn check(&self, file_length: u64) -> Result<()> {
        let count = self.length.div_ceil(CHUNK);
        let complete = |list: &Option<Vec<u32>>| list.as_ref().is_none_or(|list| list.len() as u64 == count);
        let stored = match &self.stored {
            None => self.length,
            Some(stored) => stored.iter().copied().map(u64::from).sum(),
        };
        let possible = |(stored, at): (&u32, u64)| (1..=self.extent(at)).contains(&u64::from(*stored));
        let all = || self.stored.iter().flatten().zip((0..).step_by(CHUNK as usize));
        let pages = self.length.is_multiple_of(PAGE);
        let complete = complete(&self.sums) && complete(&self.stored);
        match pages && complete && stored == file_length && all().all(possible) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Image, "its chunks do not add up to what it holds")),
        }
    }

    /// How long the chunk is that begins there.
    fn extent(&self, at: u64) -> u64 {
        self.length.saturating_sub(at).min(CHUNK)
    }
}

/// The sum of a page: its CRC-32C, for which tasks have an instruction.
pub(crate) fn page_sum(page: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, page) as u32
}

/// The sums of pages, of which there are whole ones only.
fn sums_of(pages: &[u8]) -> impl Iterator<Item = u32> {
    pages.chunks_exact(PAGE as usize).map(page_sum)
}

/// A page segment that is being written, from its start to its end.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    /// Its number in the chain, by which records lead to it.
    pub(crate) index: u16,
    /// Its number in its own image.
    pub(crate) own: u16,
    out: Out,
    format: PageFormat,
    /// Of the contents so far.
    length: u64,
    /// Of the file.
    stored: u64,
    /// Of the chunk that has been begun: the sums of its pages, and its contents if they are to be compressed.
    begun_sums: Vec<u8>,
    begun: Vec<u8>,
    sums: Vec<u32>,
    lengths: Vec<u32>,
    /// What is about to be written.
    ready: Vec<u8>,
}

/// Where a segment goes.
#[derive(Debug)]
pub(super) enum Out {
    File(File),
    Store(Pipe, Part),
}

impl SegmentWriter {
    pub(super) fn new(own: u16, out: Out, format: PageFormat) -> Self {
        Self {
            index: own,
            own,
            out,
            format,
            length: 0,
            stored: 0,
            begun_sums: Vec::new(),
            begun: Vec::new(),
            sums: Vec::new(),
            lengths: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Behind so many segments of parents.
    pub(super) fn behind(mut self, inherited: u16) -> Self {
        self.index = inherited + self.own;
        self
    }

    /// Must the sums of pages be known that others write?
    pub(crate) fn wants_sums(&self) -> bool {
        self.format.is_summed()
    }

    /// Its file, for others to write to.
    pub(crate) fn file(&self) -> Result<&File> {
        match &self.out {
            Out::File(file) => Ok(file),
            Out::Store(..) => Err(Error::new(ErrorKind::Kernel, "a page segment without a file")),
        }
    }

    /// Where the next page goes.
    pub(crate) fn end(&self) -> u64 {
        self.length
    }

    /// Room for so many bytes is set aside, if it is known how many they will be.
    pub(crate) fn expect(
        &self,
        len: u64,
        allocate: impl FnOnce(&File, u64, u64) -> Result<()>,
    ) -> Result<()> {
        match (&self.out, self.format.compression) {
            (Out::File(file), Compression::None) => allocate(file, self.stored, len),
            _ => Ok(()),
        }
    }

    /// Writes pages at its end.
    pub(crate) fn append(&mut self, pages: &[u8]) -> Result<()> {
        let mut rest = pages;
        while !self.format.is_bare() && !rest.is_empty() {
            let (head, tail) = rest.split_at((CHUNK - self.length % CHUNK).min(rest.len() as u64) as usize);
            self.take(head)?;
            rest = tail;
        }
        match self.format.compression {
            Compression::None => {
                self.length += rest.len() as u64;
                self.put(pages)
            }
            Compression::Lz4 => self.put_ready(),
        }
    }

    /// Takes a part of a chunk.
    fn take(&mut self, part: &[u8]) -> Result<()> {
        self.length += part.len() as u64;
        if self.format.is_summed() {
            self.add_sums(sums_of(part));
        }
        if self.format.compression == Compression::Lz4 {
            self.begun.extend(part);
            if self.length.is_multiple_of(CHUNK) {
                self.compress()?;
            }
        }
        Ok(())
    }

    /// The sums of the pages that follow those whose sums it has.
    pub(crate) fn add_sums(&mut self, sums: impl Iterator<Item = u32>) {
        for sum in sums {
            self.begun_sums.extend(sum.to_le_bytes());
            if self.begun_sums.len() as u64 == CHUNK / PAGE * size_of::<u32>() as u64 {
                self.close_sum();
            }
        }
    }

    fn close_sum(&mut self) {
        self.sums.push(crc32fast::hash(&self.begun_sums));
        self.begun_sums.clear();
    }

    /// The chunk that has been begun is at its end.
    fn compress(&mut self) -> Result<()> {
        /// By what part it must become smaller, to make up for the time that it takes to be read.
        const WORTH: usize = 8;
        let (start, len) = (self.ready.len(), self.begun.len());
        self.ready.resize(start + lz4_flex::block::get_maximum_output_size(len), 0);
        let room = self.ready.get_mut(start..).unwrap_or_default();
        let compressed = lz4_flex::block::compress_into(&self.begun, room);
        let compressed = compressed.map_err(|error| {
            Error::new(ErrorKind::Kernel, "pages cannot be compressed").with_source(error)
        })?;
        let stored = if compressed <= len - len / WORTH { compressed } else { len };
        self.ready.truncate(start + stored);
        if stored == len {
            self.ready.truncate(start);
            self.ready.extend(&self.begun);
        }
        self.lengths.push(stored as u32);
        self.begun.clear();
        Ok(())
    }

    fn put_ready(&mut self) -> Result<()> {
        let mut ready = std::mem::take(&mut self.ready);
        self.put(&ready)?;
        ready.clear();
        self.ready = ready;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        match &self.out {
            Out::File(file) => direct::write_all_at(file, bytes, self.stored).call("pwrite")?,
            Out::Store(pipe, part) => pipe.append(*part, bytes)?,
        }
        self.stored += bytes.len() as u64;
        Ok(())
    }

    /// Leaves room at its end for pages that somebody else writes, as they are. If it [`wants_sums`], their sums must
    /// follow.
    ///
    /// [`wants_sums`]: Self::wants_sums
    pub(crate) fn reserve(&mut self, len: u64) -> Result<u64> {
        if !self.format.is_aligned() {
            return Err(Error::new(ErrorKind::Kernel, "pages must not be written past their compression"));
        }
        let start = self.length;
        self.length += len;
        self.stored += len;
        Ok(start)
    }

    /// What is to be known of it, if anything.
    pub(crate) fn finish(mut self) -> Result<Option<Chunks>> {
        let compression = self.format.compression;
        let unfinished = !self.length.is_multiple_of(CHUNK);
        if !self.begun_sums.is_empty() {
            self.close_sum();
        }
        if self.format.is_summed() && self.sums.len() as u64 != self.length.div_ceil(CHUNK) {
            return Err(Error::new(ErrorKind::Kernel, "pages were written without their checksums"));
        }
        if unfinished && compression == Compression::Lz4 {
            self.compress()?;
            self.put_ready()?;
        }
        // What was preallocated and is not needed goes back.
        if let Out::File(file) = &self.out {
            file.set_len(self.stored).call("ftruncate")?;
        }
        Ok((!self.format.is_bare()).then_some(Chunks {
            length: self.length,
            sums: self.format.is_summed().then_some(self.sums),
            stored: (compression == Compression::Lz4).then_some(self.lengths),
        }))
    }
}

/// A page segment of an image that is being read.
#[derive(Debug)]
pub(crate) struct PageSegment {
    stored: Stored,
    length: u64,
    chunks: Option<Chunks>,
    /// Where each chunk of a compressed segment is in the file.
    places: Vec<u64>,
}

/// Where a segment is read from.
pub(super) enum Stored {
    /// And its path, for messages.
    File(File, PathBuf),
    Source(Arc<dyn ImageSource>, Part),
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.subject().fmt(f)
    }
}

impl Stored {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match self {
            Stored::File(file, _) => file.read_exact_at(buffer, offset),
            Stored::Source(source, part) => source.read_at(*part, offset, buffer),
        }
        .call("pread")
        .about(|| self.subject())
    }

    fn subject(&self) -> Subject {
        match self {
            Stored::File(_, path) => Subject::Path(path.clone()),
            Stored::Source(_, part) => Subject::Section(format!("{part:?}")),
        }
    }
}

impl PageSegment {
    /// Of what takes so much room.
    pub(super) fn new(from: Stored, length: u64, chunks: Option<Chunks>) -> Result<Self> {
        chunks.iter().try_for_each(|chunks| chunks.check(length)).about(|| from.subject())?;
        let stored = chunks.iter().flat_map(|chunks| &chunks.stored).flatten();
        let places = stored.scan(0, |end, stored| Some(std::mem::replace(end, *end + u64::from(*stored))));
        let places = places.collect();
        let length = chunks.as_ref().map_or(length, |chunks| chunks.length);
        Ok(Self { stored: from, length, chunks, places })
    }

    /// Of its contents, in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// What has to be read for a range of it to be had.
    pub(crate) fn whole(&self, range: Range<u64>) -> Range<u64> {
        match self.chunks {
            None => range,
            Some(_) => range.start - range.start % CHUNK..range.end.next_multiple_of(CHUNK).min(self.length),
        }
    }

    /// Reads and verifies contents, of whole chunks.
    pub(crate) fn read(&self, start: u64, contents: &mut [u8]) -> Result<()> {
        let first = (start / CHUNK) as usize;
        let (sums, stored) = match &self.chunks {
            Some(Chunks { sums, stored, .. }) => (sums.as_deref(), stored.as_deref()),
            None => (None, None),
        };
        match stored {
            None => self.stored.read_at(contents, start)?,
            Some(stored) => self.decompress(first, stored, contents)?,
        }
        let chunks = contents.chunks(CHUNK as usize).zip(sums.into_iter().flatten().skip(first));
        for ((chunk, sum), at) in chunks.zip((start..).step_by(CHUNK as usize)) {
            let pages: Vec<u8> = sums_of(chunk).flat_map(u32::to_le_bytes).collect();
            if crc32fast::hash(&pages) != *sum {
                return Err(self.damaged(at, "the checksum does not match"));
            }
        }
        Ok(())
    }

    /// Reads and verifies all of it.
    pub(crate) fn verify(&self) -> Result<()> {
        const AT_ONCE: u64 = 8 * CHUNK;
        let mut buffer = vec![0; AT_ONCE as usize];
        (0..self.length).step_by(AT_ONCE as usize).try_for_each(|start| {
            let len = (self.length - start).min(AT_ONCE) as usize;
            self.read(start, buffer.get_mut(..len).unwrap_or_default())
        })
    }

    fn decompress(&self, first: usize, stored: &[u32], contents: &mut [u8]) -> Result<()> {
        let count = contents.len().div_ceil(CHUNK as usize);
        let lengths = stored.iter().skip(first).take(count).map(|stored| *stored as usize);
        let mut bytes = vec![0; lengths.clone().sum()];
        let place = self.places.get(first).copied().unwrap_or_default();
        self.stored.read_at(&mut bytes, place)?;
        let mut rest = bytes.as_slice();
        for ((chunk, length), number) in contents.chunks_mut(CHUNK as usize).zip(lengths).zip(first as u64..)
        {
            let (head, tail) = rest.split_at(length);
            rest = tail;
            if length == chunk.len() {
                chunk.copy_from_slice(head);
            } else if lz4_flex::block::decompress_into(head, chunk).ok() != Some(chunk.len()) {
                return Err(self.damaged(number * CHUNK, "they cannot be decompressed"));
            }
        }
        Ok(())
    }

    fn damaged(&self, at: u64, why: &str) -> Error {
        Error::new(ErrorKind::Image, format!("the pages from {at:#x} on: {why}")).about(self.stored.subject())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment with these pages, appended in pieces, as a reader finds it; and its file.
    fn written(pieces: &[usize], format: PageFormat) -> (PageSegment, File, Vec<u8>) {
        let file = memory();
        let mut writer = SegmentWriter::new(0, Out::File(file.try_clone().unwrap()), format);
        let mut contents = Vec::new();
        for len in pieces {
            let piece: Vec<u8> = (contents.len()..contents.len() + len).map(byte).collect();
            assert_eq!(writer.end(), contents.len() as u64);
            writer.append(&piece).unwrap();
            contents.extend(piece);
        }
        let chunks = writer.finish().unwrap();
        let length = file.metadata().unwrap().len();
        let reader = PageSegment::new(stored(file.try_clone().unwrap()), length, chunks).unwrap();
        (reader, file, contents)
    }

    /// Every third chunk is noise, which does not become smaller.
    fn byte(at: usize) -> u8 {
        match at / CHUNK as usize % 3 {
            1 => ((at as u64).pow(3).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8,
            _ => (at / 97) as u8,
        }
    }

    fn stored(file: File) -> Stored {
        Stored::File(file, "pages".into())
    }

    fn memory() -> File {
        let made = nix::sys::memfd::memfd_create(c"segment", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        made.unwrap().into()
    }

    const SUMMED: PageFormat =
        PageFormat { checksums: PageChecksums::Crc32c, compression: Compression::None };
    const BARE: PageFormat = PageFormat { checksums: PageChecksums::Off, ..SUMMED };
    const SQUEEZED: PageFormat = PageFormat { compression: Compression::Lz4, ..BARE };
    const BOTH: PageFormat = PageFormat { compression: Compression::Lz4, ..SUMMED };

    #[test]
    fn what_is_appended_is_read() {
        for format in [SUMMED, BARE, SQUEEZED, BOTH] {
            for pieces in [&[][..], &[4096], &[CHUNK as usize], &[8192, 200_704, 65_536, 4096]] {
                let (segment, _, contents) = written(pieces, format);
                assert_eq!(segment.length(), contents.len() as u64);
                for at in (0..contents.len() as u64).step_by(4096) {
                    let range = segment.whole(at..at + 4096);
                    let mut read = vec![0; (range.end - range.start) as usize];
                    segment.read(range.start, &mut read).unwrap();
                    assert_eq!(read, contents[range.start as usize..range.end as usize]);
                }
            }
        }
    }

    #[test]
    fn what_is_compressed_is_shorter() {
        let (segment, file, contents) = written(&[4 * CHUNK as usize], BOTH);
        let stored = segment.chunks.as_ref().unwrap().stored.as_ref().unwrap().clone();
        assert_eq!(u64::from(stored[1]), CHUNK);
        assert!([0, 2, 3].iter().all(|chunk| u64::from(stored[*chunk]) < CHUNK / 8), "{stored:?}");
        let length = file.metadata().unwrap().len();
        assert!(length < contents.len() as u64 / 2);
    }

    fn read_all(segment: &PageSegment) -> Result<Vec<u8>> {
        let mut read = vec![0; segment.length() as usize];
        segment.read(0, &mut read).map(|()| read)
    }

    #[test]
    fn every_change_is_found() {
        for format in [SUMMED, BOTH] {
            let (segment, file, contents) = written(&[200_704], format);
            for at in (0..file.metadata().unwrap().len()).step_by(509) {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 8], at).unwrap();
                let error = read_all(&segment).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Image);
                assert!(error.to_string().starts_with("path pages: the pages from 0x"), "{error}");
                file.write_all_at(&byte, at).unwrap();
            }
            assert_eq!(read_all(&segment).unwrap(), contents);
        }
    }

    /// Whatever it is that is to be decompressed: no more comes of it than there is room for.
    #[test]
    fn hostile_blocks() {
        let (segment, file, _) = written(&[3 * CHUNK as usize], SQUEEZED);
        let length = file.metadata().unwrap().len();
        for round in 0..2000_u64 {
            let at = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) % length;
            file.write_all_at(&round.to_le_bytes()[..1], at).unwrap();
            match read_all(&segment) {
                Err(error) => assert_eq!(error.kind(), ErrorKind::Image),
                Ok(read) => assert_eq!(read.len() as u64, segment.length()),
            }
        }
    }

    #[test]
    fn chunks_that_do_not_add_up() {
        let summed = |length, count| Chunks { length, sums: Some(vec![0; count]), stored: None };
        let packed = |length, stored: &[u32]| Chunks { length, sums: None, stored: Some(stored.to_vec()) };
        let new = |length, chunks| PageSegment::new(stored(memory()), length, Some(chunks));
        const MORE: u64 = CHUNK + PAGE;
        new(MORE, summed(MORE, 2)).unwrap();
        new(11, packed(MORE, &[10, 1])).unwrap();
        for (length, wrong) in [
            (CHUNK, summed(MORE, 2)),
            (CHUNK, summed(CHUNK, 0)),
            (CHUNK, summed(CHUNK, 2)),
            (CHUNK - 1, summed(CHUNK - 1, 1)),
            (0, summed(u64::MAX, 1)),
            (10, packed(MORE, &[10])),
            (10, packed(MORE, &[10, 0])),
            (10 + PAGE + 1, packed(MORE, &[10, PAGE as u32 + 1])),
            (12, packed(MORE, &[10, 1])),
            (CHUNK + 2, packed(MORE, &[CHUNK as u32 + 1, 1])),
            (1, packed(u64::MAX - PAGE + 1, &[1])),
        ] {
            assert_eq!(new(length, wrong).unwrap_err().kind(), ErrorKind::Image);
        }
    }

    #[test]
    fn what_others_write_has_its_sums() {
        let mut writer = SegmentWriter::new(0, Out::File(memory()), BOTH);
        writer.reserve(4096).unwrap_err();
        let pages: Vec<u8> = (0..3 * CHUNK as usize + 8192).map(byte).collect();
        let sums = |writer: SegmentWriter| writer.finish().unwrap().unwrap().sums.unwrap();
        let mut appended = SegmentWriter::new(0, Out::File(memory()), SUMMED);
        appended.append(&pages).unwrap();
        let mut written = SegmentWriter::new(0, Out::File(memory()), SUMMED);
        assert!(written.wants_sums());
        written.append(&pages[..12288]).unwrap();
        assert_eq!(written.reserve(pages.len() as u64 - 12288).unwrap(), 12288);
        written.add_sums(sums_of(&pages[12288..]));
        assert_eq!(sums(appended), sums(written));
        let mut forgotten = SegmentWriter::new(0, Out::File(memory()), SUMMED);
        forgotten.reserve(CHUNK).unwrap();
        assert_eq!(forgotten.finish().unwrap_err().kind(), ErrorKind::Kernel);
        let mut writer = SegmentWriter::new(0, Out::File(memory()), BARE);
        assert_eq!((writer.reserve(4096).unwrap(), writer.reserve(4096).unwrap()), (0, 4096));
    }
}
