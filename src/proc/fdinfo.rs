//! `/proc/PID/fdinfo/FD`: see proc_pid_fdinfo(5) and section 3.8 of Documentation/filesystems/proc.rst.

use super::{File, Malformed, decimal, key_value, lines, words};

const FILE: File = File("fdinfo/FD");

/// What the file says of every description, and the further lines that depend on its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FdInfo {
    /// The offset. Signed: /dev/mem and /proc/PID/mem have offsets above `i64::MAX`.
    pub(crate) pos: i64,
    /// Access mode and status flags as of fcntl(2), and `O_CLOEXEC` of this one slot.
    pub(crate) flags: u32,
    pub(crate) mnt_id: u32,
    /// `None` before Linux 5.14.
    pub(crate) ino: Option<u64>,
    /// All other lines, in order.
    pub(crate) lines: Vec<Line>,
    /// The locks that were set through this description (or, of POSIX locks, through this slot).
    pub(crate) locks: Vec<Lock>,
}

/// What follows `lock:`, in the form of /proc/locks: see proc_locks(5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lock {
    pub(crate) kind: LockKind,
    pub(crate) exclusive: bool,
    /// Who took it: -1 or 0 if nobody can be named.
    pub(crate) pid: i32,
    /// The first byte and the last one; `None` is the end, wherever that will be.
    pub(crate) start: u64,
    pub(crate) last: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// Of a process: F_SETLK.
    Posix,
    /// Of a description: F_OFD_SETLK.
    Ofd,
    /// Of a description: flock(2).
    Flock,
    /// F_SETLEASE, while nobody waits for it to end.
    Lease,
    Other,
}

/// One line that depends on the kind of file.
///
/// `inotify wd:1 ino:3c4a7` and its fanotify like have the key `inotify`; a line without a colon has an
/// empty key. `tfd: 5 events: 19 data: 5` has the key `tfd` and the rest as its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

impl FdInfo {
    /// The value of the first line with this key.
    pub(crate) fn get(&self, key: &str) -> Option<&[u8]> {
        self.lines.iter().find(|line| line.key == key.as_bytes()).map(|line| &*line.value)
    }
}

pub(crate) fn parse(text: &[u8]) -> Result<FdInfo, Malformed> {
    let (mut pos, mut flags, mut mnt_id, mut ino) = (None, None, None, None);
    let (mut others, mut locks) = (Vec::new(), Vec::new());
    for line in lines(text) {
        let (key, value) = split(line);
        // Only the first of each: a driver may print a line of its own by one of these names.
        match key {
            b"pos" if pos.is_none() => pos = Some(FILE.decimal(value, "pos")?),
            b"flags" if flags.is_none() => flags = Some(FILE.radix(value, 8, "flags")?),
            b"mnt_id" if mnt_id.is_none() => mnt_id = Some(FILE.decimal(value, "mnt_id")?),
            b"ino" if ino.is_none() && others.is_empty() => ino = Some(FILE.decimal(value, "ino")?),
            b"lock" => locks.push(FILE.some(lock(value), "lock")?),
            _ => others.push(Line { key: key.to_vec(), value: value.to_vec() }),
        }
    }
    Ok(FdInfo {
        pos: FILE.some(pos, "pos")?,
        flags: FILE.some(flags, "flags")?,
        mnt_id: FILE.some(mnt_id, "mnt_id")?,
        ino,
        lines: others,
        locks,
    })
}

/// `1: POSIX  ADVISORY  WRITE 4541 fe:00:10010789 0 EOF`
fn lock(text: &[u8]) -> Option<Lock> {
    let mut words = words(text).skip(1);
    let kind = match words.next()? {
        b"POSIX" => LockKind::Posix,
        b"OFDLCK" => LockKind::Ofd,
        b"FLOCK" => LockKind::Flock,
        b"LEASE" => LockKind::Lease,
        _ => LockKind::Other,
    };
    let kind = match words.next()? {
        b"ADVISORY" | b"ACTIVE" => kind,
        _ => LockKind::Other,
    };
    let exclusive = words.next()? == b"WRITE";
    let pid = decimal(words.next()?)?;
    let _file = words.next()?;
    let start = decimal(words.next()?)?;
    let last = match words.next()? {
        b"EOF" => None,
        last => Some(decimal(last)?),
    };
    Some(Lock { kind, exclusive, pid, start, last })
}

fn split(line: &[u8]) -> (&[u8], &[u8]) {
    for key in ["inotify", "fanotify"] {
        if let Some(value) = line.strip_prefix(key.as_bytes()).and_then(|rest| rest.strip_prefix(b" ")) {
            return (key.as_bytes(), value.trim_ascii());
        }
    }
    key_value(line).unwrap_or((b"", line.trim_ascii()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
pos:\t-4096
flags:\t02100001
mnt_id:\t27
ino:\t10010789
lock:\t1: FLOCK  ADVISORY  WRITE 4541 fe:00:10010789 0 EOF
lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:10010789 10 9223372036854775806
tfd:        5 events:       19 data:     7fd800000005  pos:0 ino:1fb9 sdev:f
inotify wd:1 ino:3c4a7 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000
settime flags: 00
it_value: (0, 49406829)
PollList:
odd
";

    fn line(key: &str, value: &str) -> Line {
        Line { key: key.into(), value: value.into() }
    }

    #[test]
    fn sample() {
        let info = parse(SAMPLE).unwrap();
        assert_eq!((info.pos, info.flags, info.mnt_id, info.ino), (-4096, 0o2_100_001, 27, Some(10010789)));
        let lock = |kind, exclusive, pid, start, last| Lock { kind, exclusive, pid, start, last };
        assert_eq!(
            info.locks,
            [
                lock(LockKind::Flock, true, 4541, 0, None),
                lock(LockKind::Ofd, false, -1, 10, Some(i64::MAX as u64 - 1))
            ]
        );
        assert_eq!(
            info.lines,
            [
                line("tfd", "5 events:       19 data:     7fd800000005  pos:0 ino:1fb9 sdev:f"),
                line(
                    "inotify",
                    "wd:1 ino:3c4a7 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000"
                ),
                line("settime flags", "00"),
                line("it_value", "(0, 49406829)"),
                line("PollList", ""),
                line("", "odd"),
            ]
        );
        assert_eq!(info.get("it_value"), Some(&b"(0, 49406829)"[..]));
        assert_eq!(info.get("ticks"), None);
    }

    #[test]
    fn old_kernel_has_no_inode() {
        let info = parse(b"pos:\t0\nflags:\t02\nmnt_id:\t17\neventfd-count:                5\n").unwrap();
        assert_eq!(info.ino, None);
        assert_eq!(info.lines, [line("eventfd-count", "5")]);
    }

    #[test]
    fn later_lines_do_not_replace_the_first() {
        let info = parse(b"pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1\nflags:\tx\nino:\t2\n").unwrap();
        assert_eq!((info.flags, info.ino), (2, Some(1)));
        assert_eq!(info.lines, [line("flags", "x"), line("ino", "2")]);
    }

    #[test]
    fn locks() {
        for (line, kind, exclusive) in [
            ("1: POSIX  ADVISORY  READ 1 fe:00:1 0 EOF", LockKind::Posix, false),
            ("12: LEASE  ACTIVE    WRITE 0 00:1b:3954 0 EOF", LockKind::Lease, true),
            ("12: LEASE  BREAKING  READ 7 00:1b:3954 0 EOF", LockKind::Other, false),
            ("1: DELEG  ACTIVE    READ 0 00:1b:3954 0 EOF", LockKind::Other, false),
        ] {
            let found = super::lock(line.as_bytes()).unwrap();
            assert_eq!((found.kind, found.exclusive), (kind, exclusive), "{line}");
        }
        for line in [
            "",
            "1: POSIX",
            "1: POSIX ADVISORY WRITE 1 fe:00:1 -1 EOF",
            "1: POSIX ADVISORY WRITE 1 fe:00:1 0",
        ] {
            assert_eq!(super::lock(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn malformed() {
        for (text, field) in [
            (&b""[..], "pos"),
            (b"pos:\tx\n", "pos"),
            (b"pos:\t0\nflags:\t09\n", "flags"),
            (b"pos:\t0\nflags:\t01\n", "mnt_id"),
            (b"pos:\t0\nflags:\t01\nmnt_id:\t-1\n", "mnt_id"),
            (b"pos:\t0\nflags:\t01\nmnt_id:\t1\nino:\t\n", "ino"),
        ] {
            assert_eq!(parse(text), Err(FILE.malformed(field)));
        }
    }
}
