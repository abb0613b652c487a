//! The stream form of an image, for pipes: nobody has to seek, to write it or to read it.
//!
//! ```text
//! stream   magic[8] version[4] kind[4]   then frames, until one of the part END
//! frame    part[4] length[4] offset[8] crc32[4]   then that many bytes of the part
//! ```
//!
//! The offset is that in the part, so that no frame can be lost, doubled or taken for another; the checksum is that of
//! the fields before it and of the bytes. The manifest says which parts there are, and nothing follows the end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;

use super::dir::{MANIFEST_MAX, STATE_MAX};
use super::{ImageSource, ImageStore, Part};
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};

const HEADER: [u8; 16] = *b"CRYOSLP\n\x01\0\0\0STRM";
const FIELDS: usize = 16;
/// Most bytes of one frame.
const MOST: usize = 1 << 20;

const MANIFEST: u32 = 0;
const RECORDS: u32 = 1;
const PAGES: u32 = 2;
const END: u32 = u32::MAX;

/// A stream as a store.
#[derive(Debug)]
pub(crate) struct StreamStore<W> {
    stream: W,
    lengths: BTreeMap<Part, u64>,
}

impl<W: Write> StreamStore<W> {
    pub(crate) fn new(stream: W) -> Self {
        Self { stream, lengths: BTreeMap::new() }
    }

    fn frame(&mut self, part: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let [a, b, c] = [&part.to_le_bytes()[..], &(bytes.len() as u32).to_le_bytes(), &offset.to_le_bytes()];
        let fields = [a, b, c].concat();
        let sum = sum_of(&fields, bytes).to_le_bytes();
        self.stream.write_all(&[&fields[..], &sum].concat())?;
        self.stream.write_all(bytes)
    }
}

fn sum_of(fields: &[u8], bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(fields);
    hasher.update(bytes);
    hasher.finalize()
}

impl<W: Write + Send> ImageStore for StreamStore<W> {
    fn append(&mut self, part: Part, bytes: &[u8]) -> io::Result<()> {
        if self.lengths.is_empty() {
            self.stream.write_all(&HEADER)?;
        }
        let number = match part {
            Part::Manifest => MANIFEST,
            Part::Records => RECORDS,
            Part::Pages(segment) => PAGES + u32::from(segment),
        };
        for piece in bytes.chunks(MOST) {
            let offset = *self.lengths.entry(part).or_default();
            self.frame(number, offset, piece)?;
            self.lengths.insert(part, offset + piece.len() as u64);
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.frame(END, 0, &[])?;
        self.stream.flush()
    }
}

/// Reads a stream to its end, and hands on what has been verified: a part, where in it, and the bytes.
pub(crate) fn unpack(
    stream: &mut dyn Read,
    mut take: impl FnMut(Part, u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut header = [0; HEADER.len()];
    fill(stream, &mut header)?;
    check_header(&header)?;
    let mut lengths: BTreeMap<Part, u64> = BTreeMap::new();
    let mut bytes = Vec::new();
    loop {
        let mut fields = [0; FIELDS];
        let mut sum = [0; 4];
        fill(stream, &mut fields)?;
        fill(stream, &mut sum)?;
        let (number, length, offset) = split(&fields);
        if length > MOST {
            return Err(bad("a frame that is longer than any"));
        }
        bytes.resize(length, 0);
        fill(stream, &mut bytes)?;
        if sum_of(&fields, &bytes) != u32::from_le_bytes(sum) && !cfg!(fuzzing) {
            return Err(bad("the checksum of a frame does not match"));
        }
        if (number, length, offset) == (END, 0, 0) {
            break;
        }
        let part = part(number).ok_or_else(|| bad("a frame of an impossible part"))?;
        let held = lengths.entry(part).or_default();
        if *held != offset || length == 0 {
            return Err(bad("frames that do not follow each other"));
        }
        *held += length as u64;
        if *held > limit(part) {
            return Err(bad("a part that is longer than any of its kind"));
        }
        take(part, offset, &bytes)?;
    }
    match stream.read(&mut [0]).call("read")? {
        0 => Ok(()),
        _ => Err(bad("bytes follow its end")),
    }
}

fn check_header(header: &[u8; HEADER.len()]) -> Result<()> {
    if header == &HEADER {
        return Ok(());
    }
    let (magic, rest) = header.split_at(8);
    let (version, kind) = rest.split_at(4);
    Err(match HEADER.starts_with(magic) && HEADER.ends_with(kind) {
        true => bad(format!("version {version:?} of the stream: this library reads version 1")),
        false => bad("not a stream that is an image"),
    })
}

fn split(fields: &[u8; FIELDS]) -> (u32, usize, u64) {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *fields;
    let length = u32::from_le_bytes([e, f, g, h]);
    (u32::from_le_bytes([a, b, c, d]), length as usize, u64::from_le_bytes(rest))
}

fn part(number: u32) -> Option<Part> {
    match number {
        MANIFEST => Some(Part::Manifest),
        RECORDS => Some(Part::Records),
        _ => u16::try_from(number.checked_sub(PAGES)?).ok().map(Part::Pages),
    }
}

fn limit(part: Part) -> u64 {
    match part {
        Part::Manifest => MANIFEST_MAX,
        Part::Records => STATE_MAX,
        Part::Pages(_) => i64::MAX as u64,
    }
}

fn fill(stream: &mut dyn Read, buffer: &mut [u8]) -> Result<()> {
    match stream.read_exact(buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(bad("cut off")),
        read => read.call("read").about(subject),
    }
}

fn bad(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Image, reason).about(subject())
}

fn subject() -> Subject {
    Subject::Attribute("image stream")
}

/// Where an image that comes as a stream is kept until its tasks have their memory.
///
/// ```
/// use cryosleep::{Restore, Spool};
/// # fn receive(connection: std::net::TcpStream) -> cryosleep::Result<()> {
/// Restore::from_reader(connection).spool(Spool::Directory("/var/tmp".into())).run()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Spool {
    /// In memory (memfd_create(2)), for as long as the restore takes: the tree needs that much twice.
    #[default]
    Memory,
    /// In files without names in this directory (O_TMPFILE).
    Directory(PathBuf),
}

impl Spool {
    fn file(&self) -> Result<File> {
        let made: OwnedFd = match self {
            Spool::Memory => memfd_create(c"cryosleep-spool", MFdFlags::MFD_CLOEXEC).call("memfd_create")?,
            Spool::Directory(dir) => nameless(dir).about(|| Subject::Path(dir.clone()))?,
        };
        Ok(made.into())
    }

    /// Reads and verifies a whole stream.
    pub(crate) fn receive(&self, stream: &mut dyn Read) -> Result<Spooled> {
        let mut spooled = Spooled::default();
        unpack(stream, |part, offset, bytes| {
            if offset == 0 {
                spooled.0.insert(part, (self.file()?, 0));
            }
            let (file, length) = spooled.0.get_mut(&part).ok_or_else(|| bad("a part without its start"))?;
            *length = offset + bytes.len() as u64;
            file.write_all_at(bytes, offset).call("pwrite").about(subject)
        })?;
        Ok(spooled)
    }
}

fn nameless(dir: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    open(dir, flags, Mode::S_IRUSR | Mode::S_IWUSR).call("open(O_TMPFILE)")
}

/// A stream that has been read.
#[derive(Debug, Default)]
pub(crate) struct Spooled(BTreeMap<Part, (File, u64)>);

impl Spooled {
    /// How many parts there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    fn part(&self, part: Part) -> io::Result<&(File, u64)> {
        self.0.get(&part).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the stream lacks this part"))
    }
}

impl ImageSource for Spooled {
    fn length(&self, part: Part) -> io::Result<u64> {
        self.part(part).map(|(_, length)| *length)
    }

    fn read_at(&self, part: Part, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.part(part)?.0.read_exact_at(buffer, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTS: [(Part, &[u8]); 5] = [
        (Part::Pages(0), b"some pages"),
        (Part::Pages(1), b"others"),
        (Part::Pages(0), b" and more of them"),
        (Part::Records, b"records"),
        (Part::Manifest, b"the manifest"),
    ];

    /// The parts of an image as a stream, that is whole or has yet to be finished.
    pub(crate) fn sample(parts: &[(Part, &[u8])], finish: bool) -> Vec<u8> {
        let mut stream = Vec::new();
        let mut store = StreamStore::new(&mut stream);
        parts.iter().for_each(|(part, bytes)| store.append(*part, bytes).unwrap());
        if finish {
            store.finish().unwrap();
        }
        stream
    }

    fn read(stream: &[u8]) -> Result<Spooled> {
        Spool::Memory.receive(&mut &*stream)
    }

    fn refused(stream: &[u8]) -> String {
        let error = read(stream).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image, "{error}");
        error.to_string()
    }

    #[test]
    fn round_trip() {
        let spooled = read(&sample(&PARTS, true)).unwrap();
        assert_eq!(spooled.count(), 4);
        let expected: [(Part, &[u8]); 4] = [
            (Part::Pages(0), b"some pages and more of them"),
            (Part::Pages(1), b"others"),
            (Part::Records, b"records"),
            (Part::Manifest, b"the manifest"),
        ];
        for (part, bytes) in expected {
            let mut read = vec![0; spooled.length(part).unwrap() as usize];
            spooled.read_at(part, 0, &mut read).unwrap();
            assert_eq!(read, bytes);
        }
        assert_eq!(spooled.length(Part::Pages(2)).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn long_pieces_are_divided() {
        let long = vec![7; 2 * MOST + 1];
        let spooled = read(&sample(&[(Part::Records, &long)], true)).unwrap();
        assert_eq!(spooled.length(Part::Records).unwrap(), long.len() as u64);
    }

    #[test]
    fn every_truncation_every_flipped_bit_and_what_follows() {
        let stream = sample(&PARTS, true);
        for len in 0..stream.len() {
            assert!(refused(&stream[..len]).contains("cut off"), "{len}");
        }
        for bit in 0..stream.len() * 8 {
            let mut stream = stream.clone();
            stream[bit / 8] ^= 1 << (bit % 8);
            refused(&stream);
        }
        assert!(refused(&[&stream[..], b"\0"].concat()).contains("bytes follow its end"));
        assert!(refused(&stream.repeat(2)).contains("bytes follow its end"));
        assert!(refused(&sample(&PARTS, false)).contains("cut off"));
    }

    #[test]
    fn foreign_streams() {
        assert!(refused(b"\x1f\x8b\x08 and so on and so on").contains("not a stream that is an image"));
        let mut newer = sample(&PARTS, true);
        newer[8] = 2;
        assert!(refused(&newer).contains("version [2, 0, 0, 0]"));
    }

    #[test]
    fn lost_doubled_and_exchanged_frames() {
        let frames: Vec<Vec<u8>> = (1..=PARTS.len())
            .map(|count| {
                let before = sample(&PARTS[..count - 1], false).len().max(HEADER.len());
                sample(&PARTS[..count], false)[before..].to_vec()
            })
            .collect();
        let end = sample(&PARTS, true)[sample(&PARTS, false).len()..].to_vec();
        let stream = |order: &[usize]| {
            let mut stream = HEADER.to_vec();
            order.iter().for_each(|frame| stream.extend(&frames[*frame]));
            [stream, end.clone()].concat()
        };
        read(&stream(&[0, 1, 2, 3, 4])).unwrap();
        for wrong in [&[2, 0, 1, 3, 4][..], &[0, 0, 1, 2, 3, 4], &[1, 2, 3, 4], &[0, 1, 2, 2, 3, 4]] {
            refused(&stream(wrong));
        }
        let mut impossible = frames[0].clone();
        impossible[..4].copy_from_slice(&(PAGES + (1 << 16)).to_le_bytes());
        let sum = sum_of(&impossible[..FIELDS], &impossible[FIELDS + 4..]);
        impossible[FIELDS..FIELDS + 4].copy_from_slice(&sum.to_le_bytes());
        assert!(refused(&[&HEADER[..], &impossible].concat()).contains("impossible part"));
    }

    #[test]
    fn hostile_lengths() {
        let mut stream = HEADER.to_vec();
        stream.extend([RECORDS.to_le_bytes(), u32::MAX.to_le_bytes()].concat());
        stream.extend([0; 12]);
        assert!(refused(&stream).contains("longer than any"));
    }

    #[test]
    fn spooled_into_a_directory() {
        let spool = Spool::Directory(std::env::temp_dir());
        assert_eq!(spool.receive(&mut &*sample(&PARTS, true)).unwrap().count(), 4);
        let spool = Spool::Directory("/nonexistent".into());
        let error = spool.receive(&mut &*sample(&PARTS, true)).unwrap_err();
        assert_eq!(error.subject(), Some(&Subject::Path("/nonexistent".into())));
    }
}
