//! Who notes what a program writes from one checkpoint to the next: in one process, handed over to another, and kept
//! between two commands.

use std::fs;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cryosleep::{AfterDump, Checkpoint, ErrorKind, Tracker};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::chain::{WRITER, Writer, image, text};
use super::{Case, ensure};
use crate::program::{Program, Target, nothing_left, others};
use crate::{Outcome, view};

const WATCHED: Program = Program::C("watched");

pub(super) const CASES: &[Case] = &[
    Case { name: "tracker", test: tracker, programs: &[WRITER] },
    Case { name: "tracker_cut_off", test: cut_off, programs: &[] },
    Case { name: "tracker_beside_another", test: beside_another, programs: &[WATCHED] },
    Case { name: "tracker_kept_by_criu", test: kept_by_criu, programs: &[WRITER] },
    Case { name: "tracker_taken_over_by_criu", test: taken_over_by_criu, programs: &[WRITER] },
];

/// Pages that had to be compared, and pages that the parent has.
struct Stats {
    compared: u64,
    inherited: u64,
}

impl Stats {
    fn tracked(&self) -> Outcome {
        let Self { compared, inherited } = self;
        ensure(compared * 2 < *inherited, || format!("{compared} compared, {inherited} in the parent"))
    }

    fn all_compared(&self) -> Outcome {
        let Self { compared, inherited } = self;
        ensure(compared >= inherited && *inherited > 0, || {
            format!("only {compared} compared, {inherited} in the parent")
        })
    }
}

/// A tracker is only believed for the image that it belongs to, and leaves nothing behind.
fn tracker() -> Outcome {
    let mut writer = Writer::start(5)?;
    let before = descriptors(writer.target.pid)?;
    let mut tracker = Tracker::new();
    let dump = |writer: &Writer, index, tracker: &mut Tracker| {
        let stats = writer.dump(index, AfterDump::Resume, Some(tracker))?;
        Ok::<_, String>(Stats { compared: stats.pages_compared, inherited: stats.pages_in_parent })
    };
    dump(&writer, 0, &mut tracker)?;
    dump(&writer, 1, &mut tracker)?.tracked()?;
    // Nobody else can say whose userfaultfd it is.
    let error = writer.dump(2, AfterDump::Resume, None).err().unwrap_or_default();
    ensure(error.contains("pass it to the checkpoint"), || error)?;
    // In other hands it goes on.
    let (here, there) = UnixStream::pair().map_err(text)?;
    tracker.send(&here).map_err(|error| error.to_string())?;
    let mut tracker = Tracker::receive(&there).map_err(|error| error.to_string())?;
    dump(&writer, 2, &mut tracker)?.tracked()?;
    // What it has noted since image 2 says nothing about what there was in image 0.
    writer.change()?;
    dump(&writer, 1, &mut tracker)?.all_compared()?;
    // Nor does it after a checkpoint that has failed.
    fs::remove_dir_all(image(2)).map_err(text)?;
    fs::write(image(2), "no directory").map_err(text)?;
    ensure(dump(&writer, 2, &mut tracker).is_err(), || "there is no such directory".into())?;
    fs::remove_file(image(2)).map_err(text)?;
    dump(&writer, 2, &mut tracker)?.all_compared()?;
    drop(tracker);
    // Nothing of it is left.
    let pid = writer.target.pid;
    ensure(marked(pid)?.is_empty(), || format!("{:x?} are still watched", marked(pid)))?;
    ensure(descriptors(pid)? == before, || format!("{:?} instead of {before:?}", descriptors(pid)))?;
    writer.target.go()?;
    writer.target.verdict()
}

fn descriptors(pid: u32) -> Result<usize, String> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd")).map_err(text)?.count())
}

/// Where the mappings begin that a userfaultfd watches.
fn marked(pid: u32) -> Result<Vec<u64>, String> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).map_err(text)?;
    let (mut start, mut found) = (0, Vec::new());
    for line in smaps.lines() {
        let address = line.split_once('-').and_then(|(address, _)| u64::from_str_radix(address, 16).ok());
        start = address.unwrap_or(start);
        if line.starts_with("VmFlags:") && (line.contains(" uw") || line.contains(" um")) {
            found.push(start);
        }
    }
    Ok(found)
}

/// Who cannot have all descriptors of a message keeps none of them.
fn cut_off() -> Outcome {
    let (here, there) = UnixStream::pair().map_err(text)?;
    let (witness, held) = std::io::pipe().map_err(text)?;
    let head = [&b"CRYOTRK\x01"[..], &100u32.to_le_bytes(), &[0; 20]].concat();
    let rights = [held.as_raw_fd(); 100];
    for (bytes, rights) in [(head, &rights[..0]), (vec![1; 400], &rights[..])] {
        let control = [ControlMessage::ScmRights(rights)];
        let control = if rights.is_empty() { &[] } else { &control[..] };
        sendmsg::<()>(here.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::empty(), None)
            .map_err(|errno| errno.to_string())?;
    }
    drop(held);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|errno| errno.to_string())?;
    setrlimit(Resource::RLIMIT_NOFILE, 50, hard).map_err(|errno| errno.to_string())?;
    let received = Tracker::receive(&there);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(|errno| errno.to_string())?;
    match received {
        Err(error) if error.kind() == ErrorKind::Image && error.hint().is_some() => {}
        other => return Err(format!("{other:?}")),
    }
    let mut events = [PollFd::new(witness.as_fd(), PollFlags::POLLIN)];
    poll(&mut events, 0u8).map_err(|errno| errno.to_string())?;
    let hung_up = events[0].revents() == Some(PollFlags::POLLHUP);
    ensure(hung_up, || format!("somebody holds the other end: {:?}", events[0].revents()))
}

/// A program that watches its own memory is refused, and goes on watching it.
fn beside_another() -> Outcome {
    let target = Target::start(WATCHED, &[])?;
    let mut tracker = Tracker::new();
    let first = Checkpoint::of(target.pid).tracker(&mut tracker).after(AfterDump::Resume).write_to(image(0));
    first.map_err(|error| error.to_string())?;
    ensure(!marked(target.pid)?.is_empty(), || "nothing is tracked".into())?;
    fs::write(target.dir().join("watch"), "").map_err(text)?;
    target.until("watching", || target.file("watching").is_some())?;
    let own = target.file("watching").unwrap_or_default();
    let own: Vec<u64> = own.split(' ').filter_map(|at| u64::from_str_radix(at, 16).ok()).collect();
    for pre_dump in [false, true, true, false] {
        let checkpoint = Checkpoint::of(target.pid).tracker(&mut tracker).parent(image(0));
        let done = if pre_dump { checkpoint.pre_dump(image(1)) } else { checkpoint.write_to(image(1)) };
        let Err(error) = done else { return Err("it was dumped".into()) };
        // Its mappings and, of a checkpoint, the descriptor: nothing else is said to be watched.
        let said: Vec<String> = error.refusals().iter().map(ToString::to_string).collect();
        let named = |at: &u64| said.iter().any(|why| why.contains(&format!("{at:x}")));
        let count = own.len() + usize::from(!pre_dump);
        let good = own.len() == 2 && own.iter().all(named) && said.len() == count;
        let good = good && said.iter().all(|why| why.contains("userfaultfd"));
        ensure(good && error.kind() == ErrorKind::Unsupported, || format!("{own:x?}: {error}"))?;
    }
    drop(tracker);
    let mut left = marked(target.pid)?;
    left.sort_unstable();
    ensure(left.len() == 2 && own.iter().all(|at| left.contains(at)), || format!("{left:x?}, not {own:x?}"))?;
    target.go()?;
    target.verdict()
}

/// Runs examples/criu.rs on a writer, with a descriptor that nobody else should keep.
struct Criu {
    program: PathBuf,
    pid: String,
}

impl Criu {
    fn of(writer: &Writer) -> Result<Self, String> {
        Ok(Self { program: super::criu::criu()?, pid: writer.target.pid.to_string() })
    }

    fn run(&self, command: &str, index: usize, more: &[&str]) -> Result<Stats, String> {
        fs::DirBuilder::new().mode(0o700).recursive(true).create(image(index)).map_err(text)?;
        let log = image(index).join("log");
        let mut line = Command::new("sh");
        line.args(["-c", "exec \"$0\" \"$@\" 9</dev/zero"]).arg(&self.program).arg(command);
        line.arg("-D").arg(image(index)).args(["-o", "log", "-v3"]).args(more);
        let (mut output, ours) = std::io::pipe().map_err(text)?;
        line.stdin(Stdio::null()).stderr(ours.try_clone().map_err(text)?).stdout(ours);
        let status = line.status().map_err(text)?;
        drop(line);
        let log = fs::read_to_string(log).unwrap_or_default();
        ensure(status.success(), || format!("{command} {more:?}: {status}: {log}"))?;
        // A keeper that had it would keep us waiting.
        let mut said = String::new();
        output.read_to_string(&mut said).map_err(text)?;
        ensure(said.is_empty() && !log.contains("WARN"), || format!("{said}{log}"))?;
        let number = |name: &str| {
            let at = log.rsplit_once(&format!("{name}: ")).map_or("", |(_, rest)| rest);
            at.split(|other: char| !other.is_ascii_digit()).next().and_then(|digits| digits.parse().ok())
        };
        Ok(Stats {
            compared: number("pages_compared").unwrap_or_default(),
            inherited: number("pages_in_parent").unwrap_or_default(),
        })
    }

    fn pre_dump(&self, index: usize, more: &[&str]) -> Result<Stats, String> {
        self.run("pre-dump", index, &[&["-t", &self.pid][..], more].concat())
    }
}

const TRACK: &str = "--track-mem";

fn after(index: usize) -> String {
    format!("--prev-images-dir=../chain.{index}")
}

/// The keepers that there are.
fn keepers() -> Vec<u32> {
    let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    others().into_iter().filter(|pid| name(pid).trim_end() == "criu-keeper").collect()
}

fn one_keeper() -> Result<u32, String> {
    let found = keepers();
    let [keeper] = found[..] else { return Err(format!("keepers: {found:?}\n{}", view::whereabouts())) };
    Ok(keeper)
}

/// As a driver would: each command is a process of its own, and the tracker is kept in between.
fn kept_by_criu() -> Outcome {
    let mut writer = Writer::start(6)?;
    let criu = Criu::of(&writer)?;
    criu.pre_dump(0, &[TRACK])?;
    let first = one_keeper()?;
    has_nothing_of_the_driver(first)?;
    not_for_another_user()?;
    writer.change()?;
    criu.pre_dump(1, &[TRACK, &after(0)])?.tracked()?;
    // The one before is over, and its parent, who we are, has to bury it.
    let _ = waitpid(Pid::from_raw(first as i32), None);
    one_keeper()?;
    writer.change()?;
    let model = writer.model()?;
    criu.run("dump", 2, &["-t", &criu.pid, TRACK, &after(1)])?.tracked()?;
    nothing_left()?;
    let inspected = cryosleep::inspect::Inspection::open(image(2)).map_err(|error| error.to_string())?;
    ensure(inspected.parents().len() == 2, || format!("{:?}", inspected.parents()))?;
    criu.run("restore", 2, &["-d"])?;
    model.compare(writer.target.pid)?;
    // It goes when the target goes.
    criu.pre_dump(3, &[TRACK])?;
    one_keeper()?;
    writer.target.go()?;
    writer.target.verdict()
}

/// Of the driver, and of us, it must hold nothing open.
fn has_nothing_of_the_driver(keeper: u32) -> Outcome {
    let entries = fs::read_dir(format!("/proc/{keeper}/fd")).map_err(text)?.flatten();
    let links = entries.map(|entry| fs::read_link(entry.path()).unwrap_or_default());
    let links: Vec<String> = links.map(|link| link.to_string_lossy().into_owned()).collect();
    let expected = ["/dev/null", "anon_inode:[pidfd]", "anon_inode:[userfaultfd]", "pidfd:", "socket:"];
    let good = links.iter().all(|link| expected.iter().any(|known| link.starts_with(known)));
    ensure(good && !links.is_empty(), || format!("{links:?}"))?;
    let place = fs::read_link(format!("/proc/{keeper}/cwd")).map_err(text)?;
    ensure(place.as_os_str() == "/", || format!("it is in {}", place.display()))
}

/// It stays where it is, for whom it is meant for.
fn not_for_another_user() -> Outcome {
    let sockets = fs::read_to_string("/proc/net/unix").map_err(text)?;
    let namespace = std::os::unix::fs::MetadataExt::ino(&fs::metadata("/proc/self/ns/pid").map_err(text)?);
    let ours = format!("@cryosleep-tracker/{namespace}/");
    let names: Vec<_> = sockets.lines().filter_map(|line| Some(&line[line.find(&ours)? + 1..])).collect();
    let [name] = names[..] else { return Err(format!("{names:?}")) };
    let someone = nix::unistd::Uid::from_raw(12_345);
    nix::unistd::seteuid(someone).map_err(|errno| errno.to_string())?;
    let stream = SocketAddr::from_abstract_name(name).and_then(|name| UnixStream::connect_addr(&name));
    let received = stream.map(|stream| Tracker::receive(&stream));
    nix::unistd::seteuid(nix::unistd::Uid::from_raw(0)).map_err(|errno| errno.to_string())?;
    match received.map_err(text)? {
        Err(_) => one_keeper().map(drop),
        Ok(tracker) => Err(format!("another user was given {tracker:?}")),
    }
}

/// Without a keeper pages are compared; and nothing is tracked for longer than it is asked for.
fn taken_over_by_criu() -> Outcome {
    let mut writer = Writer::start(8)?;
    let criu = Criu::of(&writer)?;
    let pid = writer.target.pid;
    let unwatched = |why: &str| {
        ensure(keepers().is_empty(), || format!("{why}: {:?}", keepers()))?;
        ensure(marked(pid)?.is_empty(), || format!("{why}: {:x?} are watched", marked(pid)))
    };
    criu.pre_dump(0, &[TRACK])?;
    let keeper = Pid::from_raw(one_keeper()? as i32);
    kill(keeper, Signal::SIGKILL).map_err(|errno| errno.to_string())?;
    waitpid(keeper, None).map_err(|errno| errno.to_string())?;
    unwatched("without a keeper")?;
    writer.change()?;
    criu.pre_dump(1, &[TRACK, &after(0)])?.all_compared()?;
    // Of another image it says nothing, and is believed nothing.
    one_keeper()?;
    criu.pre_dump(2, &[TRACK, &after(0)])?.all_compared()?;
    // A command that wants nothing tracked takes it over all the same, uses it, and ends it.
    criu.run("dump", 3, &["-t", &criu.pid, "-R", &after(2)])?.tracked()?;
    writer.target.until("without a keeper", || {
        let _ = waitpid(None, Some(WaitPidFlag::WNOHANG));
        keepers().is_empty()
    })?;
    unwatched("nothing was asked for")?;
    // Nor do those need it who have no parent, which is all that it could speak of.
    criu.run("dump", 4, &["-t", &criu.pid, "-R", TRACK])?;
    one_keeper()?;
    writer.change()?;
    let model = writer.model()?;
    criu.run("dump", 5, &["-t", &criu.pid])?;
    nothing_left()?;
    criu.run("restore", 5, &["-d"])?;
    model.compare(pid)?;
    writer.target.go()?;
    writer.target.verdict()
}
