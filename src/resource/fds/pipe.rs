//! Pipes and fifos: pipe(7), fifo(7). A pipe is one record, with what is in it; each open end refers to it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, open, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::pipe2;

use super::external::HINT;
use super::inode::Inode;
use super::{
    Builder, Collector, Description, External, FileKind, FilePolicy, FileRef, Finder, OPEN_FLAGS, OuterPipes,
    Probe,
};
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Owner, Record, Tag};
use crate::sys::PAGE;
use crate::sys::file::readable_bytes;

/// One open end.
#[derive(Encode, Decode, Debug)]
pub(crate) struct PipeEnd {
    /// The owner of the section of the [`Pipe`].
    pipe: u32,
    /// The reading end of a fifo that nobody has opened for writing since: poll(2) sees no hang-up.
    fresh: bool,
}

impl Record for PipeEnd {
    const TAG: Tag = Tag::new(b"FPIP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "end of a pipe or fifo";
}

/// A pipe itself.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Pipe {
    /// In bytes, as F_GETPIPE_SZ.
    capacity: i32,
    contents: Contents,
    source: Source,
}

/// Where a pipe comes from.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
enum Source {
    /// pipe(2): both ends are made together.
    Nameless(Inode),
    Fifo(FileRef),
    /// An end of it is outside the tree: the caller supplies another, by this key. Whatever was in it stays there.
    External(Bytes),
}

impl Source {
    fn is_nameless(&self) -> bool {
        matches!(self, Self::Nameless(_))
    }
}

impl Record for Pipe {
    const TAG: Tag = Tag::new(b"PIPE");
    const VERSION: u16 = 1;
    const NAME: &'static str = "pipe or fifo";
}

/// What is in a pipe.
#[derive(Encode, Decode, Debug, PartialEq, Eq)]
enum Contents {
    Stream(Bytes),
    /// Written under O_DIRECT: each is read by a call of its own.
    Packets(Vec<Bytes>),
}

/// What the checkpoint has seen of one pipe so far.
#[derive(Debug)]
pub(super) struct Seen {
    number: u32,
    readers: bool,
    writers: bool,
    /// There are none anywhere: the other end has been closed.
    no_readers: bool,
    no_writers: bool,
    /// A reading end of which cannot be said whether it is fresh.
    doubtful: bool,
    first: Refusal,
    pipe: Pipe,
}

impl Seen {
    /// A pipe whose other end is open, but not in the tree, cannot be restored from the tree alone.
    fn is_outside(&self) -> bool {
        let missing = (!self.readers && !self.no_readers) || (!self.writers && !self.no_writers);
        missing || self.doubtful && !self.writers
    }

    /// The record, when all ends are known.
    pub(super) fn finish(
        mut self,
        inode: u64,
        policy: &FilePolicy,
    ) -> std::result::Result<(Owner, Pipe), Refusal> {
        let outside = self.is_outside();
        let key = External::Pipe(inode);
        let named = policy.external.get(&key).cloned();
        let all = outside && policy.outer_pipes == OuterPipes::External;
        if let Some(key) = named.or(all.then(|| key.key()))
            && self.pipe.source.is_nameless()
        {
            self.pipe.source = Source::External(key);
            self.pipe.contents = Contents::Stream(Bytes::default());
        } else if outside {
            return Err(self.first);
        }
        Ok((Owner(self.number), self.pipe))
    }
}

impl FileKind for PipeEnd {
    fn recognise(probe: &Probe) -> bool {
        probe.kind() == SFlag::S_IFIFO
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let access = probe.flags & OFlag::O_ACCMODE;
        let key = (probe.stat.st_dev, probe.stat.st_ino);
        if !collector.pipes.contains_key(&key) {
            let source = match probe.name.starts_with(b"pipe:[") {
                true => Source::Nameless(Inode::of(&probe.stat)),
                false => match collector.file(probe)? {
                    Ok(file) => Source::Fifo(file),
                    Err(refusal) => return Ok(Err(refusal)),
                },
            };
            let next = collector.pipes.len() as u32 + 1;
            match look(probe, next, source)? {
                Ok(seen) => drop(collector.pipes.insert(key, seen)),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        let seen = collector.pipes.get_mut(&key);
        let seen = seen.ok_or_else(|| Error::new(ErrorKind::Kernel, "a pipe was lost"))?;
        let events = hangup(probe)?;
        let reads = access == OFlag::O_RDONLY;
        // Only a fifo can be opened for reading while nobody writes.
        let quiet = reads && !seen.pipe.source.is_nameless() && !events.contains(PollFlags::POLLHUP);
        let fresh = quiet && is_at_its_end(probe)?;
        seen.doubtful |= quiet && !fresh && readable_bytes(probe.file.as_fd()).call("ioctl(FIONREAD)")? > 0;
        seen.readers |= access != OFlag::O_WRONLY;
        seen.writers |= !reads;
        seen.no_writers |= fresh || reads && events.contains(PollFlags::POLLHUP);
        seen.no_readers |= access == OFlag::O_WRONLY && events.contains(PollFlags::POLLERR);
        Ok(Ok(Self { pipe: seen.number, fresh }))
    }

    /// After all others, since it must never have had a writer.
    fn is_of_tasks(&self) -> bool {
        self.fresh
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        let subject = || Subject::Section(format!("{} {}", Pipe::NAME, self.pipe));
        if !builder.pipes.contains_key(&self.pipe) {
            let pipe: Pipe = builder.image.require(Owner(self.pipe))?;
            builder.pipes.insert(self.pipe, pipe.make(&builder.finder).about(subject)?);
        }
        let ends = builder.pipes.get_mut(&self.pipe);
        let ends = ends.ok_or_else(|| Error::new(ErrorKind::Image, "a pipe is missing").about(subject()))?;
        let flags = common.flags();
        match ends {
            Ends::Pipe(pair) => pair.take(flags).about(subject),
            Ends::External(key) => builder.inherited.take(key, flags),
            Ends::Fifo { file, both, .. } if self.fresh => {
                *both = None;
                builder.finder.open(file, flags & OPEN_FLAGS | OFlag::O_NONBLOCK)
            }
            // Packet mode is set later: open(2) refuses it.
            Ends::Fifo { file, .. } => builder.finder.open(file, (flags & OPEN_FLAGS) - OFlag::O_DIRECT),
        }
    }
}

fn hangup(probe: &Probe) -> Result<PollFlags> {
    let mut polled = [PollFd::new(probe.file.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).call("poll")?;
    Ok(polled[0].revents().unwrap_or(PollFlags::empty()))
}

/// Is there nothing to be read, and nobody to write? Of a pipe that has writers tee(2) says that it would wait.
fn is_at_its_end(probe: &Probe) -> Result<bool> {
    let copy = Copied::new(0)?;
    match tee(&probe.file, &copy.writer, 1, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(bytes) => Ok(bytes == 0),
        Err(Errno::EAGAIN) => Ok(false),
        Err(errno) => Err(Error::call("tee", errno)),
    }
}

fn look(probe: &Probe, number: u32, source: Source) -> Result<std::result::Result<Seen, Refusal>> {
    let capacity = fcntl(&probe.file, FcntlArg::F_GETPIPE_SZ).call("fcntl")?;
    let Some(contents) = peek(probe, capacity)? else {
        return Ok(Err(probe.refusal("both packets (O_DIRECT) and a stream wait in this pipe")));
    };
    let outside = probe
        .refusal("the other end of this pipe is outside the tree")
        .hint(match source {
            Source::Fifo(_) => HINT,
            _ => {
                "leave it out by Checkpoint::external(External::Pipe(..)) or Checkpoint::outer_pipes(), and supply it by \
                 Restore::inherit(); or redirect the target's standard streams to files"
            }
        });
    Ok(Ok(Seen {
        number,
        readers: false,
        writers: false,
        no_readers: false,
        no_writers: false,
        doubtful: false,
        first: outside,
        pipe: Pipe { capacity, contents, source },
    }))
}

/// What is in the pipe, which stays as it is. `None`: packets and a stream, one after the other.
fn peek(probe: &Probe, capacity: i32) -> Result<Option<Contents>> {
    let second;
    let source = match probe.flags & OFlag::O_ACCMODE {
        OFlag::O_WRONLY => {
            let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            second = open(probe.way().as_str(), flags, Mode::empty()).call("open")?;
            second.as_fd()
        }
        _ => probe.file.as_fd(),
    };
    let mut copy = Copied::of(source, capacity)?;
    let mut parts = Vec::new();
    while copy.left()? > 0 {
        parts.push(copy.read(capacity as usize)?);
    }
    if parts.is_empty() {
        return Ok(Some(Contents::Stream(Bytes::default())));
    }
    let packets = Copied::of(source, capacity)?.are_packets(&parts)?;
    Ok(packets.map(|packets| match packets {
        true => Contents::Packets(parts.into_iter().map(Bytes::from).collect()),
        false => Contents::Stream(parts.concat().into()),
    }))
}

/// A pipe of our own with a copy of another's contents, made by tee(2).
struct Copied {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Copied {
    fn new(capacity: i32) -> Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).call("pipe2")?;
        // With room for one more.
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(capacity.max(2 * PAGE as i32))).call("fcntl(F_SETPIPE_SZ)")?;
        Ok(Self { reader, writer })
    }

    fn of(source: BorrowedFd<'_>, capacity: i32) -> Result<Self> {
        let copy = Self::new(capacity)?;
        match tee(source, &copy.writer, capacity as usize, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(copy),
            Err(errno) => Err(Error::call("tee", errno)),
        }
    }

    fn left(&self) -> Result<usize> {
        readable_bytes(self.reader.as_fd()).call("ioctl(FIONREAD)")
    }

    /// One read(2): a packet at most.
    fn read(&mut self, most: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; most];
        let length = nix::unistd::read(&self.reader, &mut bytes).call("read")?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// Are these, which read(2) has given one after the other, packets, or are they one stream? `None`: both. Of a
    /// packet that is read in part the rest is lost, and no read goes beyond its end.
    fn are_packets(mut self, parts: &[Vec<u8>]) -> Result<Option<bool>> {
        for (index, part) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let packet = match part.len() {
                1 if last => self.ends_here()?,
                length => {
                    let before = self.left()?;
                    self.read(1)?;
                    before - self.left()? == length
                }
            };
            match (packet, parts.len()) {
                (true, _) => {}
                (false, 1) => return Ok(self.is_stream(part.len())?.then_some(false)),
                (false, _) => return Ok(None),
            }
        }
        Ok(Some(true))
    }

    /// The first byte of `length` was of a stream, and has been read: is the last one, too?
    fn is_stream(&mut self, length: usize) -> Result<bool> {
        if length > 2 {
            self.read(length - 2)?;
        }
        Ok(length == 1 || self.left()? == 1 && !self.ends_here()?)
    }

    /// Is the one byte that is left a packet?
    fn ends_here(&mut self) -> Result<bool> {
        nix::unistd::write(&self.writer, b"s").call("write")?;
        Ok(self.read(2)?.len() == 1)
    }
}

/// A pipe that has been made again. What we have open of it is gone before the tasks run.
pub(super) enum Ends {
    Pipe(Pair),
    /// `both` is open for reading and writing; as long as it is there, no other way of opening it has to wait.
    Fifo {
        file: FileRef,
        both: Option<OwnedFd>,
        _reader: OwnedFd,
    },
    External(Bytes),
}

/// Both ends that pipe2(2) has made. The tasks get these, or others of the same pipe.
pub(super) struct Pair {
    reader: OwnedFd,
    writer: OwnedFd,
    inode: Inode,
    reader_given: bool,
    writer_given: bool,
}

impl Pipe {
    fn make(self, finder: &Finder) -> Result<Ends> {
        match self.source {
            Source::External(key) => Ok(Ends::External(key)),
            Source::Nameless(ref inode) => {
                let inode = inode.clone();
                let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).call("pipe2")?;
                self.fill(&writer)?;
                Ok(Ends::Pipe(Pair { reader, writer, inode, reader_given: false, writer_given: false }))
            }
            Source::Fifo(ref file) => {
                let both = finder.open(file, OFlag::O_RDWR | OFlag::O_NONBLOCK)?;
                if readable_bytes(both.as_fd()).call("ioctl(FIONREAD)")? > 0 {
                    let reason = "somebody has written to this fifo meanwhile";
                    return Err(Error::new(ErrorKind::Conflict, reason).about(file.subject()));
                }
                self.fill(&both)?;
                let reader = finder.open(file, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
                Ok(Ends::Fifo { file: file.clone(), both: Some(both), _reader: reader })
            }
        }
    }

    fn fill(&self, writer: &OwnedFd) -> Result<()> {
        if self.capacity < PAGE as i32 {
            return Err(Error::new(ErrorKind::Image, "a pipe of an impossible size"));
        }
        if fcntl(writer, FcntlArg::F_GETPIPE_SZ).call("fcntl")? != self.capacity {
            fcntl(writer, FcntlArg::F_SETPIPE_SZ(self.capacity))
                .call("fcntl(F_SETPIPE_SZ)")
                .hint("a capacity above fs.pipe-max-size needs CAP_SYS_RESOURCE")?;
        }
        self.contents.write(writer).map_err(|error| match error.raw_errno() {
            Some(Errno::EAGAIN) => error.with_kind(ErrorKind::Image),
            _ => error,
        })
    }
}

impl Contents {
    fn write(&self, writer: &OwnedFd) -> Result<()> {
        let set = |flags| fcntl(writer, FcntlArg::F_SETFL(flags)).call("fcntl(F_SETFL)").map(drop);
        match self {
            Contents::Stream(bytes) => {
                let mut rest = &**bytes;
                while !rest.is_empty() {
                    let written = nix::unistd::write(writer, rest).call("write")?;
                    rest = rest.get(written..).unwrap_or_default();
                }
                Ok(())
            }
            Contents::Packets(packets) => {
                set(OFlag::O_NONBLOCK | OFlag::O_DIRECT)?;
                for packet in packets {
                    let whole = (1..=PAGE as usize).contains(&packet.len());
                    if !whole || nix::unistd::write(writer, packet).call("write")? != packet.len() {
                        return Err(Error::new(ErrorKind::Image, "a packet of an impossible size"));
                    }
                }
                set(OFlag::O_NONBLOCK)
            }
        }
    }
}

impl Ends {
    /// All descriptions of it are there.
    pub(super) fn settle(&self) -> Result<()> {
        let Ends::Pipe(Pair { reader, inode, .. }) = self else { return Ok(()) };
        let way = format!("/proc/self/fd/{}", reader.as_raw_fd());
        inode.own(&way)?;
        inode.settle(&way)
    }
}

impl Pair {
    /// An open file description of this pipe with these flags.
    fn take(&mut self, flags: OFlag) -> Result<OwnedFd> {
        let wanted = flags & (OFlag::O_ACCMODE | OFlag::O_NONBLOCK);
        // What has O_LARGEFILE came out of an open(2) of /proc/PID/fd/N, not out of pipe(2).
        let opened = flags.bits() & KERNEL_LARGEFILE != 0;
        let (end, given) = match flags & OFlag::O_ACCMODE {
            OFlag::O_RDONLY => (&self.reader, &mut self.reader_given),
            _ => (&self.writer, &mut self.writer_given),
        };
        if opened || *given || flags & OFlag::O_ACCMODE == OFlag::O_RDWR {
            let way = format!("/proc/self/fd/{}", end.as_raw_fd());
            return open(way.as_str(), wanted | OFlag::O_CLOEXEC, Mode::empty()).call("open");
        }
        *given = true;
        end.try_clone().call("fcntl")
    }
}

/// The C library calls O_LARGEFILE 0 on 64-bit machines; the kernel does not.
const KERNEL_LARGEFILE: i32 = 0o100_000;

#[cfg(test)]
mod tests {
    use super::super::tests::{Scratch, make, refuses};
    use super::*;
    use crate::image::Records;

    fn inode() -> Inode {
        let (reader, _writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        Inode::of(&nix::sys::stat::fstat(&reader).unwrap())
    }

    #[test]
    fn pipes_that_cannot_be() {
        let made = |capacity, contents, source| {
            let scratch = Scratch::new();
            let image = scratch.image(|records: &mut Records| {
                records.put(Owner(1), &Description { flags: libc::O_RDONLY }).unwrap();
                records.put(Owner(1), &PipeEnd { pipe: 5, fresh: false }).unwrap();
                records.put(Owner(5), &Pipe { capacity, contents, source }).unwrap();
            });
            make(&image).map_err(|error| error.kind())
        };
        let stream = |length| Contents::Stream(vec![1; length].into());
        let packets = |count, length| Contents::Packets(vec![vec![1; length].into(); count]);
        let nameless = || Source::Nameless(inode());
        assert_eq!(made(8192, stream(8192), nameless()), Ok(()));
        assert_eq!(made(8192, packets(2, 4096), nameless()), Ok(()));
        for (capacity, contents) in [
            (8192, stream(8193)),
            (8192, packets(3, 1)),
            (8192, packets(1, 4097)),
            (8192, packets(1, 0)),
            (0, stream(0)),
            (-1, stream(0)),
        ] {
            let what = format!("{capacity} {contents:?}");
            assert_eq!(made(capacity, contents, nameless()), Err(ErrorKind::Image), "{what}");
        }
        assert_eq!(made(8192, stream(1), Source::Fifo(FileRef::Ghost(9))), Err(ErrorKind::Image));
        let supplied = Source::External(b"pipe:[5]".to_vec().into());
        assert_eq!(made(8192, stream(0), supplied), Err(ErrorKind::Conflict));
        assert!(refuses(&PipeEnd { pipe: 5, fresh: false }));
    }
}
