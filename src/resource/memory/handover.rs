//! A tracker on its way to another process.
//!
//! ```text
//! head      magic[8] processes[4] of an image[4] its id[16]
//! batches   pid[4] of each process, at most 253 of them, and with these bytes as many descriptors
//! ```
//!
//! Integers are little endian. Nothing that is read is believed, but who has sent it.

use std::collections::BTreeSet;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::tracking::{Tracker, Watch};
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result};
use crate::proc::{fdinfo, nameless, read};
use crate::sys::socket::{MOST_DESCRIPTORS, receive};
use crate::sys::uffd;

const MAGIC: [u8; 8] = *b"CRYOTRK\x01";
/// PID_MAX_LIMIT: there cannot be more processes.
const MOST: u32 = 1 << 22;

/// The first bytes.
type Head = [u8; 32];

impl Tracker {
    /// Hands it over to another process, in which [`receive`](Self::receive) takes it from the other end of the
    /// connection: a checkpoint there can go on where the last one here has left off. Waits as long as the socket's
    /// timeouts allow.
    ///
    /// ```
    /// use std::os::unix::net::UnixListener;
    /// use cryosleep::{AfterDump, Checkpoint, Tracker};
    /// # fn first(pid: u32) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tracker = Tracker::new();
    /// Checkpoint::of(pid).after(AfterDump::Resume).tracker(&mut tracker).write_to("/var/lib/images/1")?;
    /// let (next, _) = UnixListener::bind("/run/tracker")?.accept()?;
    /// tracker.send(&next)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When the other end takes no more. It is gone then: what is written is noted no longer.
    pub fn send(self, stream: &UnixStream) -> Result<()> {
        let count = u32::try_from(self.watches.len()).unwrap_or(u32::MAX);
        let known = u32::from(self.since.is_some());
        let image = self.since.unwrap_or_default();
        let head = [&MAGIC[..], &count.to_le_bytes(), &known.to_le_bytes(), &image].concat();
        send_all(stream, &head, &[])?;
        for watches in self.watches.chunks(MOST_DESCRIPTORS) {
            let pids: Vec<u8> = watches.iter().flat_map(|watch| watch.pid.get().to_le_bytes()).collect();
            let numbers: Vec<RawFd> = watches.iter().map(|watch| watch.descriptor.as_raw_fd()).collect();
            send_all(stream, &pids, &numbers)?;
        }
        Ok(())
    }

    /// Takes one that another process sends, in the same pid namespace. It has a descriptor for each process of the tree.
    /// Whatever else comes is an error, and leaves no descriptor open. But what it says about the memory of processes
    /// is believed: make sure who sends it (SO_PEERCRED).
    ///
    /// ```
    /// use std::os::unix::net::UnixStream;
    /// use cryosleep::{Checkpoint, Tracker};
    /// # fn second(pid: u32) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut tracker = Tracker::receive(&UnixStream::connect("/run/tracker")?)?;
    /// let next = Checkpoint::of(pid).tracker(&mut tracker).parent("/var/lib/images/1");
    /// println!("{} pages were written meanwhile", next.write_to("/var/lib/images/2")?.stats.pages_written);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Image`] for anything that is not a whole tracker.
    pub fn receive(stream: &UnixStream) -> Result<Self> {
        let mut head: Head = [0; 32];
        receive_all(stream, &mut head, 0)?;
        let (since, count) = open(&head).ok_or_else(|| bad("the peer sent something else"))?;
        let mut tracker = Self { since, watches: Vec::new() };
        let mut seen = BTreeSet::new();
        let mut left = count as usize;
        while left > 0 {
            let batch = left.min(MOST_DESCRIPTORS);
            left -= batch;
            let mut pids = vec![0; batch * size_of::<u32>()];
            let descriptors = receive_all(stream, &mut pids, batch)?;
            let pids = pids.as_chunks().0.iter().map(|pid| Pid::from(u32::from_le_bytes(*pid)));
            for (pid, descriptor) in pids.zip(descriptors) {
                if !(1..=MOST).contains(&pid.get()) || !seen.insert(pid) {
                    return Err(bad("it names a process twice, or one that cannot be"));
                }
                if !notes_writes(&descriptor)? {
                    return Err(bad("one of its descriptors is not of a tracker"));
                }
                tracker.watches.push(Watch { pid, descriptor });
            }
        }
        Ok(tracker)
    }
}

/// The image and the number of processes.
fn open(head: &Head) -> Option<(Option<[u8; 16]>, u32)> {
    let rest = head.strip_prefix(&MAGIC)?;
    let (count, rest) = rest.split_first_chunk()?;
    let (known, image) = rest.split_first_chunk()?;
    let count = u32::from_le_bytes(*count);
    let image: [u8; 16] = image.try_into().ok()?;
    let since = match u32::from_le_bytes(*known) {
        0 if image == [0; 16] => None,
        1 => Some(image),
        _ => return None,
    };
    (count <= MOST).then_some((since, count))
}

/// All of them with the first byte.
fn send_all(stream: &UnixStream, mut bytes: &[u8], mut descriptors: &[RawFd]) -> Result<()> {
    while !bytes.is_empty() {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &[] } else { &rights[..] };
        let message = [IoSlice::new(bytes)];
        match sendmsg::<()>(stream.as_raw_fd(), &message, control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            sent => {
                bytes = bytes.get(sent.call("sendmsg")?..).unwrap_or_default();
                descriptors = &[];
            }
        }
    }
    Ok(())
}

/// As many bytes as there is room for, and so many descriptors with them.
fn receive_all(stream: &UnixStream, mut room: &mut [u8], wanted: usize) -> Result<Vec<OwnedFd>> {
    let mut descriptors = Vec::new();
    while !room.is_empty() {
        let received = match receive(stream.as_fd(), room, MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            other => other.call("recvmsg")?,
        };
        if received.length == 0 {
            return Err(bad("it ends early"));
        }
        if !received.is_whole {
            let reason = "not all descriptors of a tracker could be received";
            return Err(Error::new(ErrorKind::Image, reason)
                .with_hint("it takes one for each process: RLIMIT_NOFILE"));
        }
        descriptors.extend(received.descriptors);
        if descriptors.len() > wanted {
            break;
        }
        room = room.get_mut(received.length..).unwrap_or_default();
    }
    if descriptors.len() == wanted { Ok(descriptors) } else { Err(bad("a process has not one descriptor")) }
}

/// Is it a userfaultfd by which nobody has to wait for us?
fn notes_writes(descriptor: &OwnedFd) -> Result<bool> {
    let name = format!("fdinfo/{}", descriptor.as_raw_fd());
    let info = read::parsed(Pid::from(std::process::id()), &name, fdinfo::parse)?;
    let features = nameless::uffd_features(&info);
    Ok(features.is_ok_and(|features| features.is_some_and(uffd::only_notes_writes)))
}

fn bad(reason: &'static str) -> Error {
    Error::new(ErrorKind::Image, format!("what was received is no tracker: {reason}"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::sys::probe;

    fn head(count: u32, known: u32, image: [u8; 16]) -> Vec<u8> {
        [&MAGIC[..], &count.to_le_bytes(), &known.to_le_bytes(), &image].concat()
    }

    fn tracker(pids: std::ops::Range<u32>) -> Tracker {
        let descriptor = probe::userfaultfd(uffd::NOTE_WRITES).unwrap();
        let watch = |pid| Watch { pid: Pid::from(pid), descriptor: descriptor.try_clone().unwrap() };
        Tracker { since: None, watches: pids.map(watch).collect() }
    }

    #[test]
    fn what_arrives_is_what_was_sent() {
        for (since, pids) in [(None, 1..1), (Some([7; 16]), 5..6), (Some([0; 16]), 1..254), (None, 100..900)]
        {
            let (here, there) = UnixStream::pair().unwrap();
            let sent = Tracker { since, ..tracker(pids.clone()) };
            std::thread::spawn(move || sent.send(&here).unwrap());
            let received = Tracker::receive(&there).unwrap();
            assert_eq!(received.since, since);
            assert!(received.watches.iter().map(|watch| watch.pid.get()).eq(pids));
            let flags = |watch: &Watch| nix::fcntl::fcntl(&watch.descriptor, nix::fcntl::F_GETFD).unwrap();
            assert!(received.watches.iter().all(|watch| flags(watch) == libc::FD_CLOEXEC));
            // Not a byte more was taken.
            assert_eq!((&there).read(&mut [0]).unwrap(), 0);
        }
    }

    /// A message of these pieces, each with so many descriptors, is refused, and none of those stays open.
    fn refused(pieces: &[(&[u8], usize)], of: impl Fn(OwnedFd) -> OwnedFd, why: &str) {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut witness, held) = std::io::pipe().unwrap();
        let held = of(held.into());
        for (bytes, count) in pieces {
            send_all(&here, bytes, &vec![held.as_raw_fd(); *count]).unwrap();
        }
        drop((here, held));
        let error = Tracker::receive(&there).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image, "{error}");
        assert!(error.to_string().contains(why), "{error}, not {why}");
        drop(there);
        // It would wait for another holder.
        assert_eq!(witness.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn nothing_else_is_taken_for_one() {
        let none = [0; 16];
        let pids = |pids: std::ops::Range<u32>| pids.flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        let whole = head(1, 1, [3; 16]);
        let mut heads =
            vec![head(MOST + 1, 0, none), head(u32::MAX, 0, none), head(0, 2, none), head(0, 0, [1; 16])];
        heads.extend((0..8).map(|at| {
            let mut head = head(0, 0, none);
            head[at] ^= 1;
            head
        }));
        for head in &heads {
            refused(&[(head, 0)], |held| held, "something else");
        }
        for length in 0..whole.len() {
            refused(&[(&whole[..length], 0)], |held| held, "ends early");
        }
        // Descriptors that nobody has asked for, too few of them, too many.
        refused(&[(&whole, 1)], |held| held, "one descriptor");
        refused(&[(&whole, MOST_DESCRIPTORS)], |held| held, "one descriptor");
        refused(&[(&whole, 0), (&pids(9..10), 0)], |held| held, "one descriptor");
        refused(&[(&whole, 0), (&pids(9..10), 2)], |held| held, "one descriptor");
        refused(&[(&whole, 0), (&pids(9..10)[..3], 1)], |held| held, "ends early");
        refused(&[(&whole, 0), (&pids(9..10)[..2], 1), (&[0; 2], 1)], |held| held, "one descriptor");
        let many = head(300, 0, none);
        refused(&[(&many, 0), (&pids(1..254), MOST_DESCRIPTORS - 1)], |held| held, "one descriptor");
        // What is no userfaultfd, and one for which the process would have to wait.
        refused(&[(&whole, 0), (&pids(9..10), 1)], |held| held, "not of a tracker");
        let waits = |_| probe::userfaultfd(1 << 13).unwrap();
        refused(&[(&whole, 0), (&pids(9..10), 1)], waits, "not of a tracker");
        // Processes that cannot be.
        let notes = |_| probe::userfaultfd(uffd::NOTE_WRITES).unwrap();
        let two = head(2, 0, none);
        refused(&[(&two, 0), (&[pids(9..10), pids(9..10)].concat(), 2)], notes, "twice");
        refused(&[(&whole, 0), (&pids(0..1), 1)], notes, "cannot be");
        refused(&[(&whole, 0), (&pids(MOST + 1..MOST + 2), 1)], notes, "cannot be");
        // Of several batches the second is missing.
        refused(&[(&many, 0), (&pids(1..254), MOST_DESCRIPTORS)], notes, "ends early");
    }

    #[test]
    fn a_peer_that_has_gone_is_an_error() {
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        assert_eq!(tracker(1..2).send(&here).unwrap_err().errno(), Some(libc::EPIPE));
        let (here, there) = UnixStream::pair().unwrap();
        there.set_read_timeout(Some(std::time::Duration::from_millis(1))).unwrap();
        (&here).write_all(&head(1, 0, [0; 16])).unwrap();
        assert_eq!(Tracker::receive(&there).unwrap_err().errno(), Some(libc::EAGAIN));
    }
}
