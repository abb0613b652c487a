//! Pairs of unix sockets without a name: socketpair(2), unix(7). A pair is one record, with what is in its queues; each
//! open end refers to it.
//!
//! A socket tells who has made it (SO_PEERCRED), so that process makes it again. It tells nobody its other end, and
//! whether it is shut down: that is asked of sock_diag(7).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, UnixAddr, getpeername, shutdown};
use nix::sys::stat::SFlag;
use nix::unistd::{getegid, geteuid, getgroups};

use super::diag::Diag;
use super::options::Options;
use super::queue::{Kind, Queue};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Refusal, Result, Subject};
use crate::image::{Decode, Encode, Image, Owner, Record, Records, Tag};
use crate::proc::{fdinfo, nameless, read};
use crate::resource::Report;
use crate::resource::fds::{Builder, Collector, Description, FileKind, NAMELESS_HINT, Probe};
use crate::sys;
use crate::sys::socket::{has_filter, is_at_mark, option, unread_of_peer};
use crate::tracee::{Batch, Puppet, sys as call};

/// linux/net.h RCV_SHUTDOWN and SEND_SHUTDOWN.
const RECEIVES_NO_MORE: u8 = 1;
const SENDS_NO_MORE: u8 = 2;
const BOTH: u8 = RECEIVES_NO_MORE | SENDS_NO_MORE;

/// One open end.
#[derive(Encode, Decode, Debug)]
pub(crate) struct UnixSocket {
    /// The owner of the section of the [`UnixPair`].
    pair: u32,
}

impl Record for UnixSocket {
    const TAG: Tag = Tag::new(b"FUNX");
    const VERSION: u16 = 1;
    const NAME: &'static str = "end of a pair of unix sockets";
}

/// A pair itself.
#[derive(Encode, Decode, Debug)]
pub(crate) struct UnixPair {
    kind: Kind,
    creator: Creator,
    /// Two, or the one that is left.
    ends: Vec<End>,
}

impl Record for UnixPair {
    const TAG: Tag = Tag::new(b"UNXP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "pair of unix sockets";
}

/// Who has made it, as the effective user and groups that it was then.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
struct Creator {
    process: u32,
    user: u32,
    group: u32,
    groups: Vec<u32>,
}

#[derive(Encode, Decode, Debug)]
struct End {
    description: u32,
    options: Options,
    /// What it has yet to read.
    queue: Queue,
    shutdown: u8,
    /// The other end was closed with something unread: ECONNRESET.
    reset: bool,
}

/// Checkpoint: what has been seen of all sockets.
#[derive(Default)]
pub(crate) struct Sockets {
    diag: Option<Diag>,
    /// By inode; `None` if it is refused.
    seen: BTreeMap<u32, Option<Seen>>,
    pairs: u32,
}

struct Seen {
    pair: u32,
    /// The inode of the other end; 0 if it is closed.
    peer: u32,
    kind: Kind,
    creator: Creator,
    /// The memory of what it has sent.
    sent: usize,
    end: End,
    lonely: Refusal,
    unseen: Refusal,
}

type Reason = Cow<'static, str>;

impl FileKind for UnixSocket {
    fn recognise(probe: &Probe) -> bool {
        let unix =
            || option(probe.file.as_fd(), libc::SO_DOMAIN, 4) == Ok(libc::AF_UNIX.to_ne_bytes().into());
        probe.kind() == SFlag::S_IFSOCK && unix()
    }

    fn describe(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Self, Refusal>> {
        let inode = probe.stat.st_ino as u32;
        let (seen, outcome) = match look(probe, collector)? {
            Ok(seen) => {
                let pair = seen.pair;
                (Some(seen), Ok(Self { pair }))
            }
            Err(reason) => (None, Err(probe.refusal(reason).hint(NAMELESS_HINT))),
        };
        collector.sockets.seen.insert(inode, seen);
        Ok(outcome)
    }

    /// It tells who has made it.
    fn is_of_tasks(&self) -> bool {
        true
    }

    fn build(&self, _: &Description, builder: &mut Builder<'_>) -> Result<OwnedFd> {
        let missing = || Error::new(ErrorKind::Image, "a socket without its pair");
        builder.sockets.remove(&builder.current).ok_or_else(missing)
    }
}

fn look(probe: &Probe, collector: &mut Collector) -> Result<std::result::Result<Seen, Reason>> {
    let socket = probe.file.as_fd();
    let sockets = &mut collector.sockets;
    let diag = match &mut sockets.diag {
        Some(open) => open,
        closed => closed.insert(Diag::open()?),
    };
    if !diag.is_beside(&socket)? {
        return Ok(Err("sockets of another network namespace: not supported".into()));
    }
    let inode = probe.stat.st_ino as u32;
    let Some(entry) = diag.entry(inode)? else {
        return Ok(Err("sockets that sock_diag(7) does not show: not supported".into()));
    };
    let Some(kind) = Kind::of(socket)? else {
        return Ok(Err("unix sockets of this type: not supported".into()));
    };
    let peer = match entry.peer {
        _ if entry.has_name => return Ok(Err("unix sockets with a name: not supported".into())),
        None => return Ok(Err("unix sockets that are not connected: not supported".into())),
        Some(peer) => peer,
    };
    if peer_has_name(socket.as_raw_fd())? {
        return Ok(Err("unix sockets connected to one with a name: not supported".into()));
    }
    if kind.is_connected() && peer == 0 && entry.shutdown != BOTH {
        return Ok(Err("a connection that has not been accepted yet: not supported".into()));
    }
    if has_filter(socket) {
        return Ok(Err("sockets with a filter (SO_ATTACH_FILTER): not supported".into()));
    }
    let events = ready(probe)?;
    if events.contains(PollFlags::POLLPRI) || kind == Kind::Stream && is_at_mark(socket) {
        return Ok(Err("an urgent byte (MSG_OOB) waits in it: not supported".into()));
    }
    let failed = events.contains(PollFlags::POLLERR);
    let reset = failed && kind == Kind::Stream && peer == 0;
    if failed && !reset {
        return Ok(Err("it has an error to report, which cannot be brought about again".into()));
    }
    let creator = match creator(probe, collector)? {
        Ok(creator) => creator,
        Err(reason) => return Ok(Err(reason)),
    };
    let untouched = (creator.user, creator.group, (SFlag::S_IFSOCK.bits() | 0o777));
    if (probe.stat.st_uid, probe.stat.st_gid, probe.stat.st_mode) != untouched {
        return Ok(Err("the socket's owner or mode has been changed: not supported".into()));
    }
    let options = Options::of(socket)?;
    // What is empty is not touched.
    let queue = match events.contains(PollFlags::POLLIN) {
        true => match Queue::of(socket, kind)? {
            Ok(queue) => queue,
            Err(reason) => return Ok(Err(format!("{reason}: not supported").into())),
        },
        false => Queue::default(),
    };
    let sockets = &mut collector.sockets;
    let pair = match sockets.seen.get(&peer) {
        Some(Some(other)) => other.pair,
        _ => {
            sockets.pairs += 1;
            sockets.pairs
        }
    };
    Ok(Ok(Seen {
        pair,
        peer,
        kind,
        creator,
        sent: unread_of_peer(socket).call("ioctl(SIOCOUTQ)")?,
        end: End { description: collector.newest_number(), options, queue, shutdown: entry.shutdown, reset },
        lonely: probe.refusal("the other end of this socket is outside the tree").hint(NAMELESS_HINT),
        unseen: probe.refusal(
            "messages wait at its other end that cannot be found: an empty one is seen by the first MSG_PEEK only",
        ),
    }))
}

fn peer_has_name(socket: RawFd) -> Result<bool> {
    match getpeername::<UnixAddr>(socket) {
        Ok(address) => Ok(!address.is_unnamed()),
        Err(Errno::ENOTCONN) => Ok(false),
        Err(errno) => Err(Error::call("getpeername", errno)),
    }
}

/// Nothing of this takes anything away, as reading SO_ERROR would.
fn ready(probe: &Probe) -> Result<PollFlags> {
    let mut polled = [PollFd::new(probe.file.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
    poll(&mut polled, PollTimeout::ZERO).call("poll")?;
    Ok(polled[0].revents().unwrap_or(PollFlags::empty()))
}

/// Whoever it is must be there on a restore.
fn creator(probe: &Probe, collector: &Collector) -> Result<std::result::Result<Creator, Reason>> {
    let socket = probe.file.as_fd();
    let gone = "the process that has made this socket is gone, or outside the tree";
    let pidfd = match sys::socket::peer(socket) {
        Ok(pidfd) => pidfd,
        Err(Errno::ENODATA | Errno::ESRCH | Errno::EINVAL) => return Ok(Err(gone.into())),
        Err(errno) => return Err(Error::call("getsockopt(SO_PEERPIDFD)", errno)),
    };
    let parse = |text: &[u8]| nameless::process(&fdinfo::parse(text)?);
    let own = Pid::from(std::process::id());
    let number = read::parsed(own, &format!("fdinfo/{}", pidfd.as_raw_fd()), parse)?;
    let known = u32::try_from(number).ok().and_then(|number| collector.process(Pid::from(number)));
    let Some(process) = known else { return Ok(Err(gone.into())) };
    let words = |bytes: Vec<u8>| -> Vec<u32> {
        let words = bytes.chunks_exact(4).map(|word| word.first_chunk().copied().unwrap_or_default());
        words.map(u32::from_ne_bytes).collect()
    };
    // struct ucred
    let who = words(option(socket, libc::SO_PEERCRED, 12).call("getsockopt(SO_PEERCRED)")?);
    let groups = words(groups(socket).call("getsockopt(SO_PEERGROUPS)")?);
    match who[..] {
        [_, user, group] => Ok(Ok(Creator { process, user, group, groups })),
        _ => Err(Error::new(ErrorKind::Kernel, "SO_PEERCRED cannot be understood")),
    }
}

fn groups(socket: BorrowedFd<'_>) -> nix::Result<Vec<u8>> {
    const SO_PEERGROUPS: i32 = 59;
    const FEW: usize = 4 * 32;
    /// NGROUPS_MAX.
    const MOST: usize = 4 * 65536;
    match option(socket, SO_PEERGROUPS, FEW) {
        Err(Errno::ERANGE) => option(socket, SO_PEERGROUPS, MOST),
        other => other,
    }
}

impl Sockets {
    /// What can only be said when both ends of each are known.
    pub(crate) fn finish(mut self, report: &mut Report, records: &mut Records) -> Result<()> {
        while let Some((inode, seen)) = self.seen.pop_first() {
            let Some(one) = seen else { continue };
            let other = match (one.peer, self.seen.remove(&one.peer)) {
                (0, _) => None,
                (_, Some(Some(other))) if other.peer == inode && other.creator == one.creator => Some(other),
                (_, Some(None)) => continue, // refused already
                _ => {
                    report.refuse(one.lonely);
                    continue;
                }
            };
            if let Some(other) = &other
                && !(one.end.queue.is_all(one.kind, other.sent)?
                    && other.end.queue.is_all(one.kind, one.sent)?)
            {
                report.refuse(one.unseen);
                continue;
            }
            let ends = std::iter::once(one.end).chain(other.map(|other| other.end)).collect();
            records.put(Owner(one.pair), &UnixPair { kind: one.kind, creator: one.creator, ends })?;
        }
        Ok(())
    }
}

/// Restore: all pairs of an image, by their numbers.
pub(crate) struct Pairs(BTreeMap<u32, UnixPair>);

impl Pairs {
    /// With all references checked. `is_process` knows who will be there.
    pub(crate) fn load(image: &Image, is_process: impl Fn(u32) -> bool) -> Result<Self> {
        let about = |owner: Owner| move || Subject::Section(format!("{} {owner}", UnixPair::NAME));
        let impossible =
            |owner| Err(Error::new(ErrorKind::Image, "a pair that cannot be").about(about(owner)()));
        let mut pairs = BTreeMap::new();
        let owners: Vec<Owner> = image.owners::<UnixPair>().collect();
        for owner in owners {
            let pair: UnixPair = image.require(owner)?;
            if !pair.can_be() || !is_process(pair.creator.process) {
                return impossible(owner);
            }
            for end in &pair.ends {
                if image.require::<UnixSocket>(Owner(end.description)).about(about(owner))?.pair != owner.0 {
                    return impossible(owner);
                }
            }
            pairs.insert(owner.0, pair);
        }
        let ends: BTreeSet<u32> =
            pairs.values().flat_map(|pair| &pair.ends).map(|end| end.description).collect();
        match image.owners::<UnixSocket>().find(|owner| !ends.contains(&owner.0)) {
            Some(owner) => impossible(owner),
            None => Ok(Self(pairs)),
        }
    }

    /// Has them made by their creators; gives all ends by their descriptions.
    pub(crate) fn make<'p>(
        &self,
        puppet: impl Fn(u32) -> Result<Puppet<'p>>,
    ) -> Result<BTreeMap<u32, OwnedFd>> {
        let mut made = BTreeMap::new();
        for (number, pair) in &self.0 {
            let about = || Subject::Section(format!("{} {number}", UnixPair::NAME));
            let mut puppet = puppet(pair.creator.process)?;
            let both = pair.creator.make(pair.kind, &mut puppet).about(about)?;
            for (end, socket) in pair.ends.iter().zip(pair.fill(both).about(about)?) {
                made.insert(end.description, socket);
            }
        }
        Ok(made)
    }
}

impl UnixPair {
    fn can_be(&self) -> bool {
        let mirrored = |shutdown: u8| (shutdown & RECEIVES_NO_MORE) << 1 | (shutdown & SENDS_NO_MORE) >> 1;
        let resets = self.kind == Kind::Stream && self.ends.len() == 1;
        let possible = |end: &End| end.shutdown <= BOTH && end.options.are_known() && (resets || !end.reset);
        let each = self.ends.iter().all(possible);
        let together = match &self.ends[..] {
            [one] if self.kind.is_connected() => one.shutdown == BOTH,
            [_] => true,
            [one, other] => {
                let agree = !self.kind.is_connected() || mirrored(one.shutdown) == other.shutdown;
                agree && one.description != other.description
            }
            _ => false,
        };
        each && together
    }

    /// What was sent comes first: the limits may be lower than what they have let through. Closes what nobody has.
    fn fill(&self, both: [OwnedFd; 2]) -> Result<Vec<OwnedFd>> {
        let [first, second] = both;
        let senders = [&second, &first];
        for (end, sender) in self.ends.iter().zip(senders) {
            end.queue.send_by(sender.as_fd(), self.kind)?;
        }
        if self.ends.iter().any(|end| end.reset) {
            nix::unistd::write(&first, b"unread").call("write")?;
        }
        let ends: Vec<OwnedFd> = [first, second].into_iter().take(self.ends.len()).collect();
        for (end, socket) in self.ends.iter().zip(&ends) {
            let how = match end.shutdown {
                RECEIVES_NO_MORE => Some(Shutdown::Read),
                SENDS_NO_MORE => Some(Shutdown::Write),
                BOTH => Some(Shutdown::Both),
                _ => None,
            };
            how.map_or(Ok(()), |how| shutdown(socket.as_raw_fd(), how)).call("shutdown")?;
            end.options.set(socket.as_fd())?;
        }
        Ok(ends)
    }
}

impl Creator {
    /// Makes a pair as the user that it was then, while it still has all of our privileges.
    fn make(&self, kind: Kind, puppet: &mut Puppet<'_>) -> Result<[OwnedFd; 2]> {
        let mut batch = puppet.batch();
        self.disguise(&mut batch)?;
        let numbers = batch.output(8);
        let flags = (kind.sock_type() as i32 | libc::SOCK_CLOEXEC) as u64;
        batch.call(call::socketpair, &[libc::AF_UNIX as u64, flags, 0, numbers.addr]);
        let answers = puppet.run(batch)?;
        answers.check()?;
        let tid = puppet.tracee().tid();
        let pidfd = sys::pidfd::open_thread(tid, tid != puppet.tgid()).call("pidfd_open")?;
        let mut batch = puppet.batch();
        let mut made = Vec::new();
        for number in answers.bytes(&numbers).chunks_exact(4) {
            let number = RawFd::from_ne_bytes(number.first_chunk().copied().unwrap_or_default());
            made.push(sys::pidfd::get_fd(pidfd.as_fd(), number).call("pidfd_getfd")?);
            batch.call(call::close, &[number as u64]);
        }
        self.undisguise(&mut batch)?;
        puppet.run(batch)?.check()?;
        let odd = |_| Error::new(ErrorKind::Kernel, "socketpair made no pair");
        made.try_into().map_err(odd)
    }

    /// What differs from whoever restores it, who its process still is.
    fn disguise(&self, batch: &mut Batch) -> Result<()> {
        let own: Vec<u32> = getgroups().call("getgroups")?.into_iter().map(|group| group.as_raw()).collect();
        if self.groups != own {
            set_groups(&self.groups, batch);
        }
        if self.group != getegid().as_raw() {
            batch.call(call::setresgid, &[SAME, self.group.into(), SAME]);
        }
        if self.user != geteuid().as_raw() {
            batch.call(call::setresuid, &[SAME, self.user.into(), SAME]);
        }
        Ok(())
    }

    fn undisguise(&self, batch: &mut Batch) -> Result<()> {
        let own: Vec<u32> = getgroups().call("getgroups")?.into_iter().map(|group| group.as_raw()).collect();
        if self.user != geteuid().as_raw() {
            batch.call(call::setresuid, &[SAME, geteuid().as_raw().into(), SAME]);
        }
        if self.group != getegid().as_raw() {
            batch.call(call::setresgid, &[SAME, getegid().as_raw().into(), SAME]);
        }
        if self.groups != own {
            set_groups(&own, batch);
        }
        Ok(())
    }
}

/// What setresuid(2) leaves as it is.
const SAME: u64 = u64::MAX;

fn set_groups(groups: &[u32], batch: &mut Batch) {
    let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
    let list = batch.input(&bytes);
    batch.call(call::setgroups, &[groups.len() as u64, list]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fds::tests::Scratch;

    fn end(description: u32, shutdown: u8) -> End {
        End { description, shutdown, options: Options::default(), queue: Queue::default(), reset: false }
    }

    fn pair(kind: Kind, ends: Vec<End>) -> UnixPair {
        UnixPair { kind, creator: Creator { process: 7, user: 0, group: 0, groups: Vec::new() }, ends }
    }

    #[test]
    fn how_two_ends_can_be() {
        let can = |kind, ends: Vec<End>| pair(kind, ends).can_be();
        for (kind, one, other) in
            [(Kind::Stream, 0, 0), (Kind::Packets, 1, 2), (Kind::Stream, 3, 3), (Kind::Datagram, 1, 0)]
        {
            assert!(can(kind, vec![end(1, one), end(2, other)]), "{kind:?} {one} {other}");
        }
        for (kind, one, other) in [(Kind::Stream, 1, 0), (Kind::Packets, 1, 1), (Kind::Datagram, 4, 0)] {
            assert!(!can(kind, vec![end(1, one), end(2, other)]), "{kind:?} {one} {other}");
        }
        assert!(can(Kind::Stream, vec![end(1, 3)]) && can(Kind::Datagram, vec![end(1, 0)]));
        assert!(!can(Kind::Stream, vec![end(1, 0)]));
        assert!(!can(Kind::Stream, vec![]) && !can(Kind::Datagram, vec![end(1, 0), end(2, 0), end(3, 0)]));
        assert!(!can(Kind::Datagram, vec![end(1, 0), end(1, 0)]));
        let reset = |ends: u32| (1..=ends).map(|number| End { reset: true, ..end(number, 3) }).collect();
        assert!(
            can(Kind::Stream, reset(1)) && !can(Kind::Stream, reset(2)) && !can(Kind::Datagram, reset(1))
        );
    }

    #[test]
    fn pairs_that_contradict_the_image() {
        let load = |pairs: Vec<(u32, UnixPair)>, sockets: &[(u32, u32)]| {
            let scratch = Scratch::new();
            let image = scratch.image(|records| {
                for (description, pair) in sockets {
                    records.put(Owner(*description), &UnixSocket { pair: *pair }).unwrap();
                }
                for (number, pair) in &pairs {
                    records.put(Owner(*number), pair).unwrap();
                }
            });
            let outcome = Pairs::load(&image, |number| number == 7);
            outcome.map(|pairs| pairs.0.len()).map_err(|error| error.kind())
        };
        let good = || pair(Kind::Stream, vec![end(1, 0), end(2, 0)]);
        let stranger = || {
            let Creator { user, group, groups, .. } = good().creator;
            UnixPair { creator: Creator { process: 8, user, group, groups }, ..good() }
        };
        assert_eq!(load(vec![(5, good())], &[(1, 5), (2, 5)]), Ok(1));
        for (pairs, sockets) in [
            (vec![(5, good())], &[(1, 5)][..]),
            (vec![(5, good())], &[(1, 5), (2, 6)]),
            (vec![(5, good())], &[(1, 5), (2, 5), (3, 5)]),
            (vec![(5, stranger())], &[(1, 5), (2, 5)]),
            (vec![(5, good()), (6, good())], &[(1, 5), (2, 5)]),
            (vec![], &[(1, 5)]),
        ] {
            assert_eq!(load(pairs, sockets), Err(ErrorKind::Image), "{sockets:?}");
        }
    }
}
