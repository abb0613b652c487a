//! Images that go elsewhere than into a directory: piece by piece to a store, and back from a source.
//!
//! The store works on a thread of its own, so that pages are read and compressed while others are on their way. What
//! waits there is bounded: a slow store makes the checkpoint wait.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use super::dir::{MANIFEST_MAX, Records, STATE_MAX, Written, parse_state};
use super::manifest::Id;
use super::segment::{Out, PageFormat, SegmentWriter, Stored};
use super::{Content, Image, ImageSink, ListedFile, Manifest, ManifestInfo, Spool};
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};

/// One of the things that an image consists of.
///
/// ```
/// use cryosleep::Part;
/// let name = |part| match part {
///     Part::Manifest => "manifest".to_owned(),
///     Part::Records => "records".to_owned(),
///     Part::Pages(number) => format!("pages-{number}"),
/// };
/// assert_eq!(name(Part::Pages(3)), "pages-3");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// What the image is, and what belongs to it: given last.
    Manifest,
    /// All that is known but for the contents of pages; given after these.
    Records,
    /// Contents of pages: the segment of this number, from 0.
    Pages(u16),
}

/// Where an image goes, if not into a directory: another host, a database, memory
/// ([`Checkpoint::write_to_store`](crate::Checkpoint::write_to_store)). [`ImageSource`] is the way back.
///
/// ```
/// use std::collections::BTreeMap;
/// use std::io::{self, Read};
/// use cryosleep::{Checkpoint, ImageSource, ImageStore, Part, Restore};
///
/// /// An image in memory.
/// #[derive(Default)]
/// struct Parts(BTreeMap<Part, Vec<u8>>);
///
/// impl ImageStore for Parts {
///     fn append(&mut self, part: Part, bytes: &[u8]) -> io::Result<()> {
///         self.0.entry(part).or_default().extend(bytes);
///         Ok(())
///     }
///
///     fn finish(&mut self) -> io::Result<()> {
///         Ok(())
///     }
/// }
///
/// impl ImageSource for Parts {
///     fn length(&self, part: Part) -> io::Result<u64> {
///         self.0.get(&part).map(|bytes| bytes.len() as u64).ok_or_else(|| io::ErrorKind::NotFound.into())
///     }
///
///     fn read_at(&self, part: Part, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
///         let bytes = self.0.get(&part).and_then(|bytes| bytes.get(offset as usize..));
///         let bytes = bytes.and_then(|bytes| bytes.get(..buffer.len()));
///         buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
///         Ok(())
///     }
/// }
///
/// # fn through_memory(pid: u32) -> cryosleep::Result<()> {
/// let mut parts = Parts::default();
/// Checkpoint::of(pid).write_to_store(&mut parts)?;
/// Restore::from_source(parts).run()?;
/// # Ok(()) }
/// ```
pub trait ImageStore: Send {
    /// The next bytes of a part. Parts come side by side, each in order; pages of which there are none do not come.
    ///
    /// # Errors
    /// Any ends the checkpoint, and the target runs on.
    fn append(&mut self, part: Part, bytes: &[u8]) -> io::Result<()>;

    /// The image is whole. Until then it is none, and a store that is dropped without it has to forget it. When this
    /// returns the target may be killed.
    ///
    /// # Errors
    /// Any ends the checkpoint, and the target runs on.
    fn finish(&mut self) -> io::Result<()>;
}

/// Where an image comes from, if not from a directory ([`Restore::from_source`](crate::Restore::from_source)). It is
/// trusted as little as any: what it gives is verified.
pub trait ImageSource: Send + Sync {
    /// How long a part is, in bytes.
    ///
    /// # Errors
    /// When there is no such part.
    fn length(&self, part: Part) -> io::Result<u64>;

    /// Fills a buffer with what begins at this place of a part. Several threads call this at the same time.
    ///
    /// # Errors
    /// When there is less, or when it cannot be had.
    fn read_at(&self, part: Part, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// Pieces that may wait for the store: with their lengths, some MiB.
const PIECES: usize = 8;
const PIECE: usize = 512 * 1024;

enum Piece {
    Bytes(Part, Vec<u8>),
    End,
}

/// The way to a store.
#[derive(Clone, Debug)]
pub(super) struct Pipe {
    pieces: SyncSender<Piece>,
    lengths: Arc<Mutex<BTreeMap<Part, u64>>>,
}

impl Pipe {
    pub(super) fn append(&self, part: Part, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(PIECE) {
            self.send(Piece::Bytes(part, piece.to_vec()))?;
        }
        let mut lengths = self.lengths.lock().unwrap_or_else(PoisonError::into_inner);
        *lengths.entry(part).or_default() += bytes.len() as u64;
        Ok(())
    }

    fn send(&self, piece: Piece) -> Result<()> {
        self.pieces.send(piece).map_err(|_| gave_up())
    }

    fn length(&self, part: Part) -> u64 {
        let lengths = self.lengths.lock().unwrap_or_else(PoisonError::into_inner);
        lengths.get(&part).copied().unwrap_or(0)
    }
}

/// Why it has, only its thread knows.
fn gave_up() -> Error {
    Error::new(ErrorKind::Kernel, "the image store has given up")
}

/// Writes an image to a store.
#[derive(Debug)]
pub(crate) struct StoreWriter {
    id: Id,
    format: PageFormat,
    segments: u16,
    pipe: Pipe,
    done: Receiver<()>,
}

/// Has an image written to a store.
pub(crate) fn feed<T>(
    store: &mut dyn ImageStore,
    format: PageFormat,
    write: impl FnOnce(StoreWriter) -> Result<T>,
) -> Result<T> {
    let (pieces, arriving) = sync_channel(PIECES);
    let (tell, done) = channel();
    let pipe = Pipe { pieces, lengths: Arc::default() };
    std::thread::scope(|scope| {
        let pump = std::thread::Builder::new().name("cryosleep-store".into());
        let pump = pump.spawn_scoped(scope, move || pump_into(store, arriving, tell)).call("clone")?;
        let written = write(StoreWriter { id: Id::random(), format, segments: 0, pipe, done });
        match pump.join() {
            Ok(Ok(())) => written,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::new(ErrorKind::Kernel, "the image store has panicked")),
        }
    })
}

fn pump_into(store: &mut dyn ImageStore, pieces: Receiver<Piece>, done: Sender<()>) -> Result<()> {
    let about = || Subject::Attribute("image store");
    for piece in pieces {
        match piece {
            Piece::Bytes(part, bytes) => store.append(part, &bytes).call("write").about(about)?,
            Piece::End => {
                store.finish().call("write").about(about)?;
                let _ = done.send(());
            }
        }
    }
    Ok(())
}

impl ImageSink for StoreWriter {
    fn segment(&mut self) -> Result<SegmentWriter> {
        let number = self.segments;
        self.segments = number
            .checked_add(1)
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "too many page segments"))?;
        let out = Out::Store(self.pipe.clone(), Part::Pages(number));
        Ok(SegmentWriter::new(number, out, self.format))
    }

    fn lends_files(&self) -> bool {
        false
    }

    fn finish(self: Box<Self>, records: Records, info: ManifestInfo) -> Result<Written> {
        let records = records.into_bytes();
        self.pipe.append(Part::Records, &records)?;
        let length = records.len() as u64;
        let crc32 = Some(crc32fast::hash(&records));
        let mut files = vec![ListedFile { name: self.id.file_name(0), length, crc32 }];
        for number in 0..self.segments {
            let name = self.id.file_name(usize::from(number) + 1);
            files.push(ListedFile { name, length: self.pipe.length(Part::Pages(number)), crc32: None });
        }
        let bytes = files.iter().map(|file| file.length).sum::<u64>();
        let manifest = Manifest::new(self.id, info, (Content::Tree, None), files)?;
        let id = manifest.id;
        let manifest = manifest.to_bytes()?;
        self.pipe.append(Part::Manifest, &manifest)?;
        self.pipe.send(Piece::End)?;
        // The target may be killed only when all of it has arrived.
        self.done.recv().map_err(|_| gave_up())?;
        Ok(Written { id, bytes: bytes + manifest.len() as u64 })
    }
}

impl Image {
    /// The image that a source has, verified but for the contents of its pages.
    pub(crate) fn from_source(source: Arc<dyn ImageSource>) -> Result<Self> {
        Self::read_from(source).map_err(|error| error.with_kind(ErrorKind::Image))
    }

    fn read_from(source: Arc<dyn ImageSource>) -> Result<Self> {
        let manifest = whole(&*source, Part::Manifest, MANIFEST_MAX)?;
        let crc32 = crc32fast::hash(&manifest);
        let manifest = Manifest::from_bytes(&manifest).about(|| about(Part::Manifest))?;
        if manifest.parent.is_some() {
            return Err(bad(Part::Manifest, "the child of an image in another directory"));
        }
        let state = whole(&*source, Part::Records, STATE_MAX)?;
        if manifest.files.first().and_then(|listed| listed.crc32) != Some(crc32fast::hash(&state)) {
            return Err(bad(Part::Records, "the checksum does not match"));
        }
        let state = parse_state(state).about(|| about(Part::Records))?;
        let mut stored = Vec::new();
        for (listed, number) in manifest.files.iter().skip(1).zip(0..) {
            let part = Part::Pages(number);
            // Of a segment without pages (they were all zeroes) nothing was ever given to the store.
            if listed.length != 0
                && source.length(part).call("length").about(|| about(part))? != listed.length
            {
                return Err(bad(part, "not as long as the manifest says"));
            }
            stored.push(Stored::Source(source.clone(), part));
        }
        Self::of(None, (manifest, crc32), state, stored)
    }

    /// The image that comes as a stream, all of which is verified.
    pub(crate) fn from_stream(stream: &mut dyn Read, spool: &Spool) -> Result<Self> {
        let spooled = spool.receive(stream)?;
        let parts = spooled.count();
        let image = Self::from_source(Arc::new(spooled))?;
        let listed = image.manifest().files.iter().filter(|listed| listed.length != 0).count();
        match parts == listed + 1 {
            true => Ok(image),
            false => Err(bad(Part::Manifest, "the stream has parts that it does not list")),
        }
    }
}

fn whole(source: &dyn ImageSource, part: Part, most: u64) -> Result<Vec<u8>> {
    let length = source.length(part).call("length").about(|| about(part))?;
    let length = usize::try_from(length).ok().filter(|_| length <= most);
    let length = length.ok_or_else(|| bad(part, "longer than any of its kind"))?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(length).map_err(|error| bad(part, "too large").with_source(error))?;
    bytes.resize(length, 0);
    source.read_at(part, 0, &mut bytes).call("read").about(|| about(part))?;
    Ok(bytes)
}

fn about(part: Part) -> Subject {
    Subject::Section(format!("{part:?}"))
}

fn bad(part: Part, reason: &'static str) -> Error {
    Error::new(ErrorKind::Image, reason).about(about(part))
}

#[cfg(test)]
mod tests {
    use super::super::dir::tests::{INFO, records};
    use super::super::{Owner, StreamStore};
    use super::*;
    use crate::image::sections::tests::{Thing, thing};

    const FORMAT: fn() -> PageFormat = PageFormat::default;

    type Parts = BTreeMap<Part, Vec<u8>>;

    fn write(mut writer: StoreWriter) -> Result<Written> {
        let mut records = records(&["first"]);
        for number in 0..3 {
            let mut segment = writer.segment()?;
            // The last has no page.
            let length = if number < 2 { 200_704 } else { 0 };
            segment.append(&vec![number + 1; length])?;
            records.put(Owner(number.into()), &segment.finish()?.unwrap()).unwrap();
        }
        Box::new(writer).finish(records, INFO())
    }

    fn stream() -> Vec<u8> {
        let mut stream = Vec::new();
        let written = feed(&mut StreamStore::new(&mut stream), FORMAT(), write).unwrap();
        assert!(written.bytes < stream.len() as u64);
        stream
    }

    #[test]
    fn through_a_stream() {
        let stream = stream();
        let image = Image::from_stream(&mut &*stream, &Spool::Memory).unwrap();
        assert_eq!(image.require::<Thing>(Owner(1)).unwrap(), thing("first"));
        for number in 0..2 {
            let segment = image.segment(number).unwrap();
            let mut pages = vec![0; segment.length() as usize];
            segment.read(0, &mut pages).unwrap();
            assert!(pages.len() == 200_704 && pages.iter().all(|byte| u16::from(*byte) == number + 1));
        }
        assert_eq!(image.segment(2).unwrap().length(), 0);
        assert!(image.segment(3).is_err());
    }

    /// Frames that are right but do not make an image.
    #[test]
    fn parts_that_do_not_belong_together() {
        let mut parts = Parts::new();
        super::super::unpack(&mut &*stream(), |part, _, bytes| {
            parts.entry(part).or_default().extend(bytes);
            Ok(())
        })
        .unwrap();
        let open = |change: &dyn Fn(&mut Parts)| {
            let mut parts = parts.clone();
            change(&mut parts);
            let mut stream = Vec::new();
            let mut store = StreamStore::new(&mut stream);
            parts.iter().rev().for_each(|(part, bytes)| match part {
                Part::Pages(_) => {}
                _ => store.append(*part, bytes).unwrap(),
            });
            for (part, bytes) in parts.range(Part::Pages(0)..) {
                store.append(*part, bytes).unwrap();
            }
            store.finish().unwrap();
            Image::from_stream(&mut &*stream, &Spool::Memory).map_err(|error| {
                assert_eq!(error.kind(), ErrorKind::Image, "{error}");
                error.to_string()
            })
        };
        open(&|_| {}).unwrap();
        let refused = |change: &dyn Fn(&mut Parts)| open(change).unwrap_err();
        assert!(refused(&|parts| drop(parts.remove(&Part::Manifest))).contains("lacks this part"));
        assert!(refused(&|parts| drop(parts.remove(&Part::Records))).contains("lacks this part"));
        assert!(refused(&|parts| drop(parts.remove(&Part::Pages(1)))).contains("lacks this part"));
        assert!(refused(&|parts| drop(parts.insert(Part::Pages(2), vec![0]))).contains("does not list"));
        assert!(refused(&|parts| parts.get_mut(&Part::Pages(0)).unwrap().push(0)).contains("not as long"));
        assert!(refused(&|parts| parts.get_mut(&Part::Records).unwrap()[40] ^= 1).contains("checksum"));
        assert!(refused(&|parts| parts.get_mut(&Part::Manifest).unwrap()[40] ^= 1).contains("checksum"));
    }

    /// Gives up in the middle, at the end, or panics.
    struct Unwilling(u32, fn() -> io::Result<()>);

    impl ImageStore for Unwilling {
        fn append(&mut self, _: Part, _: &[u8]) -> io::Result<()> {
            self.0 = self.0.saturating_sub(1);
            if self.0 == 0 { (self.1)() } else { Ok(()) }
        }

        fn finish(&mut self) -> io::Result<()> {
            (self.1)()
        }
    }

    #[test]
    fn a_store_that_gives_up() {
        for patience in 1..10 {
            let mut store = Unwilling(patience, || Err(io::Error::other("no more")));
            let error = feed(&mut store, FORMAT(), write).unwrap_err();
            assert!(error.to_string().contains("image store: write: no more"), "{error}");
        }
        let mut store = Unwilling(0, || Err(io::Error::from_raw_os_error(libc::ENOSPC)));
        assert_eq!(feed(&mut store, FORMAT(), write).unwrap_err().errno(), Some(libc::ENOSPC));
    }

    /// It is not finished, whatever it was that went wrong.
    #[test]
    fn who_gives_up_finishes_nothing() {
        let mut stream = Vec::new();
        let error = feed(&mut StreamStore::new(&mut stream), FORMAT(), |mut writer| {
            writer.segment()?.append(&[1; 4096])?;
            Err::<(), _>(Error::new(ErrorKind::Hook, "enough"))
        });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Hook);
        let error = Image::from_stream(&mut &*stream, &Spool::Memory).unwrap_err();
        assert!(error.to_string().contains("cut off"), "{error}");
    }
}
