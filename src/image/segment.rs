//! Page segments: files of page contents, in chunks. Each chunk is checked by itself, may be compressed, and is read
//! whole.
//!
//! Records lead to places in the *contents* of a segment: only this file knows where in the file a chunk is.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::{Decode, Encode, Record, Tag};
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};

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
    /// One for each 64 KiB.
    #[default]
    Crc32,
    /// None: a damaged page is found by nobody but the program.
    Off,
}

/// How pages are stored.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageFormat {
    pub(crate) checksums: PageChecksums,
}

impl PageFormat {
    /// Is a segment nothing but pages? Then anybody may write it.
    pub(crate) fn is_bare(self) -> bool {
        self.checksums == PageChecksums::Off
    }
}

/// What is known of the chunks of one segment, by whose index it goes.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Chunks {
    /// Of the contents, in bytes.
    pub(crate) length: u64,
    /// The crc32 of the contents of each.
    pub(crate) sums: Vec<u32>,
}

impl Record for Chunks {
    const TAG: Tag = Tag::new(b"PGCH");
    const VERSION: u16 = 1;
    const NAME: &'static str = "chunks of pages";
}

impl Chunks {
    fn check(&self, file_length: u64) -> Result<()> {
        if self.length != file_length || self.length.div_ceil(CHUNK) != self.sums.len() as u64 {
            return Err(Error::new(ErrorKind::Image, "its chunks do not add up to what it holds"));
        }
        Ok(())
    }
}

/// A page segment that is being written, from its start to its end.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    /// Its number in the chain, by which records lead to it.
    pub(crate) index: u16,
    /// Its number in its own image.
    pub(crate) own: u16,
    file: File,
    format: PageFormat,
    /// Of the contents so far.
    length: u64,
    sums: Vec<u32>,
    /// Of the chunk that has been begun.
    sum: crc32fast::Hasher,
}

impl SegmentWriter {
    pub(super) fn new(own: u16, file: File, format: PageFormat) -> Self {
        Self { index: own, own, file, format, length: 0, sums: Vec::new(), sum: crc32fast::Hasher::new() }
    }

    /// Behind so many segments of parents.
    pub(super) fn behind(mut self, inherited: u16) -> Self {
        self.index = inherited + self.own;
        self
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where the next page goes.
    pub(crate) fn end(&self) -> u64 {
        self.length
    }

    /// Writes pages at its end.
    pub(crate) fn append(&mut self, pages: &[u8]) -> Result<()> {
        self.file.write_all_at(pages, self.length).call("pwrite")?;
        if self.format.checksums == PageChecksums::Off {
            self.length += pages.len() as u64;
            return Ok(());
        }
        let mut rest = pages;
        while !rest.is_empty() {
            let room = (CHUNK - self.length % CHUNK) as usize;
            let (head, tail) = rest.split_at(room.min(rest.len()));
            self.sum.update(head);
            self.length += head.len() as u64;
            if self.length.is_multiple_of(CHUNK) {
                self.close_chunk();
            }
            rest = tail;
        }
        Ok(())
    }

    /// Leaves room at its end for pages that somebody else writes, which is only possible where they are stored bare.
    pub(crate) fn reserve(&mut self, len: u64) -> Result<u64> {
        if !self.format.is_bare() {
            return Err(Error::new(ErrorKind::Kernel, "pages must not be written past their checksums"));
        }
        let start = self.length;
        self.length += len;
        Ok(start)
    }

    fn close_chunk(&mut self) {
        let sum = std::mem::replace(&mut self.sum, crc32fast::Hasher::new());
        self.sums.push(sum.finalize());
    }

    /// What is to be known of it, if anything.
    pub(crate) fn finish(mut self) -> Result<Option<Chunks>> {
        // What was preallocated and is not needed goes back.
        self.file.set_len(self.length).call("ftruncate")?;
        if self.format.is_bare() {
            return Ok(None);
        }
        if !self.length.is_multiple_of(CHUNK) {
            self.close_chunk();
        }
        Ok(Some(Chunks { length: self.length, sums: self.sums }))
    }
}

/// A page segment of an image that is being read.
#[derive(Debug)]
pub(crate) struct PageSegment {
    file: File,
    path: PathBuf,
    length: u64,
    chunks: Option<Chunks>,
}

impl PageSegment {
    /// Of a file of this length.
    pub(super) fn new(file: File, path: PathBuf, length: u64, chunks: Option<Chunks>) -> Result<Self> {
        chunks.iter().try_for_each(|chunks| chunks.check(length)).about(|| Subject::Path(path.clone()))?;
        Ok(Self { file, path, length, chunks })
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
        self.file.read_exact_at(contents, start).call("pread").about(|| self.subject())?;
        let Some(chunks) = &self.chunks else { return Ok(()) };
        let sums = chunks.sums.iter().skip((start / CHUNK) as usize);
        for ((chunk, sum), at) in
            contents.chunks(CHUNK as usize).zip(sums).zip((start..).step_by(CHUNK as usize))
        {
            if crc32fast::hash(chunk) != *sum {
                let reason = format!("the checksum of the pages from {at:#x} on does not match");
                return Err(Error::new(ErrorKind::Image, reason).about(self.subject()));
            }
        }
        Ok(())
    }

    fn subject(&self) -> Subject {
        Subject::Path(self.path.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment with these pages, appended in pieces, as a reader finds it; and its file.
    fn written(pieces: &[usize], format: PageFormat) -> (PageSegment, File, Vec<u8>) {
        let file = memory();
        let mut writer = SegmentWriter::new(0, file.try_clone().unwrap(), format);
        let mut contents = Vec::new();
        for len in pieces {
            let piece: Vec<u8> = (contents.len()..contents.len() + len).map(|at| (at / 97) as u8).collect();
            assert_eq!(writer.end(), contents.len() as u64);
            writer.append(&piece).unwrap();
            contents.extend(piece);
        }
        let chunks = writer.finish().unwrap();
        let length = file.metadata().unwrap().len();
        let reader = PageSegment::new(file.try_clone().unwrap(), "pages".into(), length, chunks).unwrap();
        (reader, file, contents)
    }

    fn memory() -> File {
        let made = nix::sys::memfd::memfd_create(c"segment", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        made.unwrap().into()
    }

    const SUMMED: PageFormat = PageFormat { checksums: PageChecksums::Crc32 };
    const BARE: PageFormat = PageFormat { checksums: PageChecksums::Off };

    #[test]
    fn what_is_appended_is_read() {
        for format in [SUMMED, BARE] {
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
    fn every_changed_page_is_found() {
        let (segment, file, contents) = written(&[200_704], SUMMED);
        for at in (0..contents.len()).step_by(4096) {
            file.write_all_at(&[!contents[at + 7]], at as u64 + 7).unwrap();
            let range = segment.whole(at as u64..at as u64 + 4096);
            let mut read = vec![0; (range.end - range.start) as usize];
            let error = segment.read(range.start, &mut read).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Image);
            assert_eq!(
                error.to_string(),
                format!("path pages: the checksum of the pages from {:#x} on does not match", range.start)
            );
            file.write_all_at(&[contents[at + 7]], at as u64 + 7).unwrap();
            segment.read(range.start, &mut read).unwrap();
        }
    }

    #[test]
    fn chunks_that_do_not_add_up() {
        let chunks = |length, count| Chunks { length, sums: vec![0; count] };
        let new = |length, chunks| PageSegment::new(memory(), "pages".into(), length, Some(chunks));
        new(CHUNK + 1, chunks(CHUNK + 1, 2)).unwrap();
        for (length, wrong) in [
            (CHUNK, chunks(CHUNK + 1, 2)),
            (CHUNK, chunks(CHUNK, 0)),
            (CHUNK, chunks(CHUNK, 2)),
            (0, chunks(u64::MAX, 1)),
        ] {
            assert_eq!(new(length, wrong).unwrap_err().kind(), ErrorKind::Image);
        }
    }

    #[test]
    fn nobody_writes_past_the_checksums() {
        let mut writer = SegmentWriter::new(0, memory(), SUMMED);
        writer.reserve(4096).unwrap_err();
        let mut writer = SegmentWriter::new(0, memory(), BARE);
        assert_eq!((writer.reserve(4096).unwrap(), writer.reserve(4096).unwrap()), (0, 4096));
    }
}
