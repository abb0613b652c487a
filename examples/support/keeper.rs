//! Where a tracker is between two commands, each of which is a process of its own: a small process keeps it until it is
//! asked for it, or the target has ended.
//!
//! It is found by the target and not by an image: whatever is done to the target next has to take the tracker over, or
//! end it. The address is an abstract one, so there is no file that could be left behind. Who is at the other end is
//! asked for: only the same user gives and takes.

use std::error::Error;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use cryosleep::Tracker;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

type Failure = Box<dyn Error + Send + Sync>;
type Result<T> = std::result::Result<T, Failure>;

/// The command by which this program is the keeper. No driver gives it.
pub(crate) const COMMAND: &str = "keep-tracker";

/// How long to wait for somebody who does not answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process whose tracker is kept.
pub(crate) struct Target {
    pidfd: OwnedFd,
    /// Of the keeper's socket.
    name: String,
}

impl Target {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid)?;
        let process = rustix::process::Pid::from_raw(pid).ok_or("not a pid")?;
        let pidfd = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty())?;
        let started = procfs::process::Process::new(pid)?.stat()?.starttime;
        let namespace = fs::metadata("/proc/self/ns/pid")?.ino();
        Ok(Self { pidfd, name: format!("cryosleep-tracker/{namespace}/{pid}/{started}") })
    }

    /// The tracker that an earlier command has left, if it has.
    pub(crate) fn take(&self) -> Result<Option<Tracker>> {
        let stream = match UnixStream::connect_addr(&SocketAddr::from_abstract_name(&self.name)?) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(None),
            other => other?,
        };
        if !is_of_our_user(&stream)? {
            return Err("another user keeps one".into());
        }
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Some(Tracker::receive(&stream)?))
    }

    /// Starts a keeper.
    pub(crate) fn keep(&self, tracker: Tracker) -> Result<()> {
        let (mut ours, its) = UnixStream::pair()?;
        // All that it needs is in the places of its standard files, so it has nothing of the driver's.
        let mut keeper = Command::new("/proc/self/exe");
        keeper.arg0("criu").args([COMMAND, &self.name]).env_clear().current_dir("/");
        keeper.stdin(OwnedFd::from(its)).stdout(self.pidfd.try_clone()?).stderr(Stdio::null());
        keeper.spawn()?;
        drop(keeper); // which has the other end
        ours.set_read_timeout(Some(PATIENCE))?;
        ours.set_write_timeout(Some(PATIENCE))?;
        tracker.send(&ours)?;
        Ok(ours.read_exact(&mut [0]).map_err(|error| format!("its keeper has not come up: {error}"))?)
    }
}

/// The keeper: on its standard input comes a tracker, its standard output is a pidfd of the target.
pub(crate) fn run(name: &str) -> Result<()> {
    nix::unistd::setsid()?;
    nix::sys::prctl::set_name(c"criu-keeper")?;
    close_inherited()?;
    let mut from = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let tracker = Tracker::receive(&from)?;
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    from.write_all(&[0])?;
    let target = std::io::stdout();
    loop {
        let ready = PollFlags::POLLIN;
        let mut events = [PollFd::new(target.as_fd(), ready), PollFd::new(listener.as_fd(), ready)];
        poll(&mut events, PollTimeout::NONE)?;
        if events[0].any() != Some(false) {
            return Ok(());
        }
        let (stream, _) = listener.accept()?;
        if is_of_our_user(&stream)? {
            // The next keeper has the same address.
            drop(listener);
            stream.set_write_timeout(Some(PATIENCE))?;
            return Ok(tracker.send(&stream)?);
        }
    }
}

fn is_of_our_user(stream: &UnixStream) -> Result<bool> {
    Ok(getsockopt(stream, PeerCredentials)?.uid() == nix::unistd::geteuid().as_raw())
}

/// What the driver has left open for us, nobody should wait for us to close.
fn close_inherited() -> Result<()> {
    let open = fs::read_dir("/proc/self/fd")?.flatten();
    let numbers: Vec<i32> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        let _ = nix::unistd::close(number); // one of them was the directory itself
    }
    Ok(())
}
