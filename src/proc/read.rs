//! Reading the files of one task and handing them to their parsers: the only I/O in this module.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlink, readlinkat};
use nix::sys::stat::Mode;

use super::Malformed;
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result, Subject};
use crate::sys::Compare;

/// Reads `/proc/PID/name` whole.
pub(crate) fn bytes(pid: Pid, name: &str) -> Result<Vec<u8>> {
    bytes_of(format!("/proc/{pid}/{name}"), pid)
}

fn bytes_of(path: String, pid: Pid) -> Result<Vec<u8>> {
    read_whole(&path).map_err(|error| about(error, path, pid))
}

fn about(error: Error, path: String, pid: Pid) -> Error {
    match error.raw_errno() {
        Some(Errno::ENOENT | Errno::ESRCH) => error.with_kind(ErrorKind::TaskGone),
        _ => error,
    }
    .about(Subject::Path(path.into()))
    .of(pid)
}

/// These files have no size, so that asking for it (as std does) would only cost time.
fn read_whole(path: &str) -> Result<Vec<u8>> {
    let (mut text, mut len) = (Vec::new(), 0);
    let file = open_file(path)?;
    while let got @ 1.. = read_some(&file, &mut text, len)? {
        len += got;
    }
    text.truncate(len);
    Ok(text)
}

fn open_file(path: &str) -> Result<OwnedFd> {
    open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).call("open")
}

/// Reads on behind what is in the buffer already, which grows if it is full. 0 at the end.
fn read_some(file: &OwnedFd, buffer: &mut Vec<u8>, len: usize) -> Result<usize> {
    if len == buffer.len() {
        buffer.resize((len * 4).max(4096), 0);
    }
    loop {
        match nix::unistd::read(file, buffer.get_mut(len..).unwrap_or_default()) {
            Err(Errno::EINTR) => {}
            got => return got.call("read"),
        }
    }
}

/// Reads a file of a task that may be long, and hands its lines over, some whole ones at a time.
pub(crate) fn some_lines_each(pid: Pid, name: &str, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let path = format!("/proc/{pid}/{name}");
    let failed = |error| about(error, path.clone(), pid);
    let file = open_file(&path).map_err(failed)?;
    let (mut buffer, mut len) = (Vec::new(), 0);
    loop {
        let got = read_some(&file, &mut buffer, len).map_err(failed)?;
        len += got;
        let text = buffer.get(..len).unwrap_or_default();
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let whole = if got == 0 { len } else { end };
        take(text.get(..whole).unwrap_or_default())?;
        if got == 0 {
            return Ok(());
        }
        buffer.copy_within(whole..len, 0);
        len -= whole;
    }
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
    understood(pid, parse(&bytes(pid, name)?))
}

/// What a parser has made of a file of a task.
pub(crate) fn understood<T>(pid: Pid, parsed: std::result::Result<T, Malformed>) -> Result<T> {
    parsed.map_err(|malformed| {
        Error::new(ErrorKind::Kernel, "unexpected contents").with_source(malformed).of(pid)
    })
}

/// Reads a symbolic link of a task as raw bytes.
pub(crate) fn link(pid: Pid, name: &str) -> Result<Vec<u8>> {
    let path = format!("/proc/{pid}/{name}");
    match readlink(path.as_str()).call("readlink") {
        Ok(target) => Ok(target.into_vec()),
        Err(error) => Err(error.about(Subject::Path(path.into())).of(pid)),
    }
}

/// A directory of a task whose links are read: the second costs a fraction of the first.
pub(crate) struct Links(OwnedFd);

impl Links {
    /// `/proc/PID/name`. Works for threads too.
    pub(crate) fn of(pid: Pid, name: &str) -> Result<Self> {
        let path = format!("/proc/{pid}/{name}");
        let opened =
            open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        opened.call("open").map(Self).map_err(|error| error.about(Subject::Path(path.into())).of(pid))
    }

    /// `/proc/PID/task/TID/name`.
    pub(crate) fn of_thread(pid: Pid, tid: Pid, name: &str) -> Result<Self> {
        Self::of(pid, &format!("task/{tid}/{name}")).map_err(|error| error.of(tid))
    }

    /// None if there is none of that name.
    pub(crate) fn get(&self, name: &str) -> Option<Vec<u8>> {
        readlinkat(&self.0, name).ok().map(OsString::into_vec)
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

/// Every process that this /proc shows with its parent, but for the kernel's own threads.
pub(crate) fn parents() -> Result<Vec<(Pid, Pid)>> {
    let kernel = kernel_daemon();
    // They have its fd table, and nobody else has: one call tells, where a parent takes three.
    let is_kernels = |pid| {
        kernel.is_some_and(|kernel| crate::sys::kcmp(kernel, pid, Compare::Files) == Ok(Ordering::Equal))
    };
    let mut all = Vec::new();
    for pid in numbered("/proc")?.into_iter().filter(|pid| !is_kernels(*pid)) {
        // One that has ended meanwhile is nobody's child.
        if let Ok(parent) = parent(pid) {
            all.push((pid, parent));
        }
    }
    Ok(all)
}

/// kthreadd, which makes all kernel threads, where it can be seen: in the first pid namespace.
fn kernel_daemon() -> Option<Pid> {
    const PF_KTHREAD: u32 = 0x0020_0000;
    let second = Pid::from(2);
    let stat = parsed(second, "stat", super::stat::parse).ok()?;
    (stat.ppid == 0 && stat.flags & PF_KTHREAD != 0).then_some(second)
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn lines_are_handed_over_whole() {
        let own = Pid::from(std::process::id());
        let lengths = [0, 1, 4094, 4095, 4096, 10, 70_000, 3, 20_000];
        let lines: Vec<Vec<u8>> = lengths.iter().map(|length| vec![b'x'; *length]).collect();
        for text in [lines.join(&b'\n'), [lines.join(&b'\n'), b"\n".to_vec()].concat(), Vec::new()] {
            let file = memfd_create(c"lines", MFdFlags::MFD_CLOEXEC).unwrap();
            File::from(file.try_clone().unwrap()).write_all(&text).unwrap();
            let mut parts: Vec<Vec<u8>> = Vec::new();
            let name = format!("fd/{}", file.as_raw_fd());
            let take = |lines: &[u8]| {
                parts.push(lines.to_vec());
                Ok(())
            };
            some_lines_each(own, &name, take).unwrap();
            assert_eq!(parts.concat(), text);
            let (_, all_but_last) = parts.split_last().unwrap();
            assert!(all_but_last.iter().all(|part| part.is_empty() || part.ends_with(b"\n")));
            assert!(text.is_empty() || parts.len() > 3);
        }
    }
}
