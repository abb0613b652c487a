//! Reading the files of one task and handing them to their parsers: the only I/O in this module.

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::Malformed;
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result, Subject};

/// Reads `/proc/PID/name` whole.
pub(crate) fn bytes(pid: Pid, name: &str) -> Result<Vec<u8>> {
    bytes_of(format!("/proc/{pid}/{name}"), pid)
}

fn bytes_of(path: String, pid: Pid) -> Result<Vec<u8>> {
    read_whole(&path).map_err(|error| {
        match error.raw_errno() {
            Some(Errno::ENOENT | Errno::ESRCH) => error.with_kind(ErrorKind::TaskGone),
            _ => error,
        }
        .about(Subject::Path(path.into()))
        .of(pid)
    })
}

/// These files have no size, so that asking for it (as std does) would only cost time.
fn read_whole(path: &str) -> Result<Vec<u8>> {
    let file = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).call("open")?;
    let mut text = vec![0; 4096];
    let mut len = 0;
    loop {
        if len == text.len() {
            text.resize(len * 4, 0);
        }
        match nix::unistd::read(&file, text.get_mut(len..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(got) => len += got,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::call("read", errno)),
        }
    }
    text.truncate(len);
    Ok(text)
}

/// Reads and parses one file of a thread. By way of its process, since `/proc/TID/stat` adds up all threads.
pub(crate) fn of_thread<T>(
    pid: Pid,
    tid: Pid,
    name: &str,
    parse: impl FnOnce(&[u8]) -> std::result::Result<T, Malformed>,
) -> Result<T> {
    parsed(pid, &format!("task/{tid}/{name}"), parse).map_err(|error| error.of(tid))
}

/// Reads and parses one file of a task. Works for threads too: /proc/TID exists, though it is not listed.
pub(crate) fn parsed<T>(
    pid: Pid,
    name: &str,
    parse: impl FnOnce(&[u8]) -> std::result::Result<T, Malformed>,
) -> Result<T> {
    parse(&bytes(pid, name)?).map_err(|malformed| {
        Error::new(ErrorKind::Kernel, "unexpected contents").with_source(malformed).of(pid)
    })
}

/// Reads a symbolic link of a task as raw bytes.
pub(crate) fn link(pid: Pid, name: &str) -> Result<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    let path = format!("/proc/{pid}/{name}");
    match std::fs::read_link(&path).call("readlink") {
        Ok(target) => Ok(target.into_os_string().into_vec()),
        Err(error) => Err(error.about(Subject::Path(path.into())).of(pid)),
    }
}

/// The threads of a process.
pub(crate) fn threads(pid: Pid) -> Result<Vec<Pid>> {
    numbered(&format!("/proc/{pid}/task")).map_err(|error| match error.raw_errno() {
        Some(Errno::ENOENT) => error.with_kind(ErrorKind::TaskGone).of(pid),
        _ => error.of(pid),
    })
}

/// The parent of a process.
pub(crate) fn parent(pid: Pid) -> Result<Pid> {
    match crate::sys::pidfd::parent(pid) {
        Ok(parent) => Ok(parent),
        // Older kernels only tell in text, which takes them longer.
        Err(_) => parsed(pid, "stat", super::stat::parse).map(|stat| Pid::from(stat.ppid)),
    }
}

/// Every process that this /proc shows.
pub(crate) fn processes() -> Result<Vec<Pid>> {
    numbered("/proc")
}

/// The same, with its parent.
pub(crate) fn parents() -> Result<Vec<(Pid, Pid)>> {
    let mut all = Vec::new();
    for pid in numbered("/proc")? {
        // One that has ended meanwhile is nobody's child.
        if let Ok(parent) = parent(pid) {
            all.push((pid, parent));
        }
    }
    Ok(all)
}

/// All pids are lower than this.
pub(crate) fn pid_limit() -> Result<u32> {
    let path = "/proc/sys/kernel/pid_max";
    let text = read_whole(path).map_err(|error| error.about(Subject::Path(path.into())))?;
    let number = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    number
        .ok_or_else(|| Error::new(ErrorKind::Kernel, "unexpected contents").about(Subject::Path(path.into())))
}

fn numbered(path: &str) -> Result<Vec<Pid>> {
    let entries = std::fs::read_dir(path).call("open");
    let entries = entries.map_err(|error| error.about(Subject::Path(path.into())))?;
    let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    Ok(entries.filter_map(number).map(|pid: u32| Pid::from(pid)).collect())
}
