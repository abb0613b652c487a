//! Pipes: pipe(7). A pipe is one record, with what is in it; each open end refers to it.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, open, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::pipe2;

use super::{Builder, Collector, Description, FileKind, Probe};
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Bytes, Decode, Encode, Owner, Record, Tag};

/// One open end.
#[derive(Encode, Decode, Debug)]
pub(crate) struct PipeEnd {
    /// The owner of the section of the [`Pipe`].
    pipe: u32,
}

impl Record for PipeEnd {
    const TAG: Tag = Tag::new(b"FPIP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "end of a pipe";
}

/// A pipe itself.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Pipe {
    /// In bytes, as F_GETPIPE_SZ.
    capacity: i32,
    contents: Bytes,
}

impl Record for Pipe {
    const TAG: Tag = Tag::new(b"PIPE");
    const VERSION: u16 = 1;
    const NAME: &'static str = "pipe";
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
    first: Refusal,
    pipe: Pipe,
}

impl Seen {
    /// A pipe whose other end is open, but not in the tree, cannot be restored from the tree alone.
    pub(super) fn outside(&self) -> Option<Refusal> {
        let missing = (!self.readers && !self.no_readers) || (!self.writers && !self.no_writers);
        missing.then(|| self.first.clone())
    }

    pub(super) fn record(&self) -> (Owner, &Pipe) {
        (Owner(self.number), &self.pipe)
    }
}

impl FileKind for PipeEnd {
    fn recognise(probe: &Probe) -> bool {
        probe.kind() == SFlag::S_IFIFO && probe.name.starts_with(b"pipe:[")
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        if probe.flags.contains(OFlag::O_DIRECT) {
            return Ok(Err(probe.refusal("pipes in packet mode are not supported yet")));
        }
        let access = probe.flags & OFlag::O_ACCMODE;
        let next = collector.pipes.len() as u32 + 1;
        let seen = match collector.pipes.entry(probe.stat.st_ino) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => new.insert(look(probe, next)?),
        };
        seen.readers |= access != OFlag::O_WRONLY;
        seen.writers |= access != OFlag::O_RDONLY;
        let events = hangup(probe)?;
        seen.no_writers |= access == OFlag::O_RDONLY && events.contains(PollFlags::POLLHUP);
        seen.no_readers |= access == OFlag::O_WRONLY && events.contains(PollFlags::POLLERR);
        Ok(Ok(Self { pipe: seen.number }))
    }

    fn build(&self, common: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        let subject = || Subject::Section(format!("{} {}", Pipe::NAME, self.pipe));
        if !builder.pipes.contains_key(&self.pipe) {
            let pipe: Pipe = builder.image.require(Owner(self.pipe))?;
            builder.pipes.insert(self.pipe, pipe.make().about(subject)?);
        }
        let ends = builder.pipes.get_mut(&self.pipe);
        let ends = ends.ok_or_else(|| Error::new(ErrorKind::Image, "a pipe is missing").about(subject()))?;
        ends.take(common.flags()).about(subject)
    }
}

fn hangup(probe: &Probe) -> Result<PollFlags> {
    let mut polled = [PollFd::new(probe.file.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).call("poll")?;
    Ok(polled[0].revents().unwrap_or(PollFlags::empty()))
}

fn look(probe: &Probe, number: u32) -> Result<Seen> {
    let capacity = fcntl(&probe.file, FcntlArg::F_GETPIPE_SZ).call("fcntl")?;
    let contents = peek(probe, capacity)?;
    let outside = probe
        .refusal("the other end of this pipe is outside the tree")
        .hint("redirect the target's standard streams to files or /dev/null, or checkpoint both ends");
    Ok(Seen {
        number,
        readers: false,
        writers: false,
        no_readers: false,
        no_writers: false,
        first: outside,
        pipe: Pipe { capacity, contents: contents.into() },
    })
}

/// Copies what is in the pipe, which stays as it is: tee(2) into one of our own.
fn peek(probe: &Probe, capacity: i32) -> Result<Vec<u8>> {
    // A second way in, whichever end it is, that can be read from.
    let way = format!("/proc/self/fd/{}", probe.file.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let source = open(way.as_str(), flags, Mode::empty()).call("open")?;
    let (sink, copy) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).call("pipe2")?;
    fcntl(&copy, FcntlArg::F_SETPIPE_SZ(capacity)).call("fcntl")?;
    let mut contents = Vec::new();
    match tee(source.as_fd(), copy.as_fd(), capacity as usize, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(0) | Err(Errno::EAGAIN) => return Ok(contents),
        Ok(_) => drop(copy),
        Err(errno) => return Err(Error::call("tee", errno)),
    }
    std::fs::File::from(sink).read_to_end(&mut contents).call("read")?;
    Ok(contents)
}

/// Both ends of a pipe that has been made again. The tasks get these or others of the same pipe.
pub(super) struct Ends {
    reader: OwnedFd,
    writer: OwnedFd,
    /// Has a task got the end that pipe2(2) made?
    reader_given: bool,
    writer_given: bool,
}

impl Pipe {
    fn make(&self) -> Result<Ends> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).call("pipe2")?;
        if fcntl(&writer, FcntlArg::F_GETPIPE_SZ).call("fcntl")? != self.capacity {
            fcntl(&writer, FcntlArg::F_SETPIPE_SZ(self.capacity))
                .call("fcntl(F_SETPIPE_SZ)")
                .hint("a capacity above fs.pipe-max-size needs CAP_SYS_RESOURCE")?;
        }
        let mut rest = &*self.contents;
        while !rest.is_empty() {
            let written = nix::unistd::write(&writer, rest).call("write")?;
            rest = rest.get(written..).unwrap_or_default();
        }
        Ok(Ends { reader, writer, reader_given: false, writer_given: false })
    }
}

impl Ends {
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
        fcntl(end, FcntlArg::F_SETFL(wanted & OFlag::O_NONBLOCK)).call("fcntl")?;
        end.try_clone().call("fcntl")
    }
}

/// The C library calls O_LARGEFILE 0 on 64-bit machines; the kernel does not.
const KERNEL_LARGEFILE: i32 = 0o100_000;
