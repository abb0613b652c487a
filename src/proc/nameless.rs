//! The lines of `/proc/PID/fdinfo/FD` by which files without a name tell their state: proc_pid_fdinfo(5).

use super::fdinfo::FdInfo;
use super::{Device, File, Malformed, split_once, words};

const FILE: File = File("fdinfo/FD");

/// eventfd(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) count: u64,
    /// EFD_SEMAPHORE; before Linux 6.5 the kernel does not tell.
    pub(crate) semaphore: bool,
}

/// timerfd_create(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timer {
    pub(crate) clock: i32,
    /// Expirations that have not been read.
    pub(crate) ticks: u64,
    /// Of the last timerfd_settime(2).
    pub(crate) flags: u32,
    /// Does it run? A periodic one stops at an expiration until somebody reads or asks.
    pub(crate) runs: bool,
}

/// What an epoll instance watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The number by which it was added.
    pub(crate) fd: i32,
    pub(crate) events: u32,
    pub(crate) data: u64,
    pub(crate) ino: u64,
    pub(crate) device: Device,
}

/// A watch of an inotify instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watch {
    pub(crate) number: i32,
    pub(crate) mask: u32,
    pub(crate) object: Object,
}

/// A file that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) ino: u64,
    pub(crate) device: Device,
    /// Type and bytes of its file handle, where its file system has such.
    pub(crate) handle: Option<(i32, Vec<u8>)>,
}

/// A fanotify group: fanotify_init(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) flags: u32,
    /// Of the files that it is given: event_f_flags.
    pub(crate) event_flags: u32,
    pub(crate) marks: Vec<Mark>,
}

/// One of its marks: fanotify_mark(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) on: Marked,
    pub(crate) flags: u32,
    pub(crate) mask: u32,
    pub(crate) ignored: u32,
}

/// What is marked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Marked {
    Inode(Object),
    /// By its number.
    Mount(u32),
    FileSystem(Device),
    /// A namespace of mounts.
    Namespace,
}

pub(crate) fn event(info: &FdInfo) -> Result<Event, Malformed> {
    let semaphore = info.get("eventfd-semaphore").map(|value| FILE.flag(value, "eventfd-semaphore"));
    Ok(Event {
        count: FILE.hex(info.get("eventfd-count"), "eventfd-count")?,
        semaphore: FILE.some(semaphore.transpose()?, "eventfd-semaphore")?,
    })
}

pub(crate) fn timer(info: &FdInfo) -> Result<Timer, Malformed> {
    Ok(Timer {
        clock: FILE.decimal(info.get("clockid"), "clockid")?,
        ticks: FILE.decimal(info.get("ticks"), "ticks")?,
        flags: FILE.radix(info.get("settime flags"), 8, "settime flags")?,
        runs: FILE.some(info.get("it_value"), "it_value")? != b"(0, 0)",
    })
}

/// The signals of a signalfd(2), as bits of one word.
pub(crate) fn signals(info: &FdInfo) -> Result<u64, Malformed> {
    FILE.hex(info.get("sigmask"), "sigmask")
}

/// The process (or thread) of a pidfd: 0 if this /proc does not show it, -1 if it is gone.
pub(crate) fn process(info: &FdInfo) -> Result<i32, Malformed> {
    FILE.decimal(info.get("Pid"), "Pid")
}

/// The features of a userfaultfd(2); None if that is not what it is.
pub(crate) fn uffd_features(info: &FdInfo) -> Result<Option<u32>, Malformed> {
    let Some(words) = info.get("API") else { return Ok(None) };
    FILE.hex(words.split(|byte| *byte == b':').nth(1), "API").map(Some)
}

pub(crate) fn targets(info: &FdInfo) -> Result<Vec<Target>, Malformed> {
    let of = |text: &[u8]| {
        Ok(Target {
            fd: FILE.decimal(words(text).next(), "tfd")?,
            events: FILE.hex(field(text, "events"), "events")?,
            data: FILE.hex(field(text, "data"), "data")?,
            ino: FILE.hex(field(text, "ino"), "ino")?,
            device: device(text)?,
        })
    };
    info.lines.iter().filter(|line| line.key == b"tfd").map(|line| of(&line.value)).collect()
}

pub(crate) fn watches(info: &FdInfo) -> Result<Vec<Watch>, Malformed> {
    let of = |text: &[u8]| {
        Ok(Watch {
            number: FILE.hex::<u32>(field(text, "wd"), "wd")? as i32,
            mask: FILE.hex(field(text, "mask"), "mask")?,
            object: object(text)?,
        })
    };
    info.lines.iter().filter(|line| line.key == b"inotify").map(|line| of(&line.value)).collect()
}

pub(crate) fn group(info: &FdInfo) -> Result<Group, Malformed> {
    let mut lines = info.lines.iter().filter(|line| line.key == b"fanotify").map(|line| &*line.value);
    let head = FILE.some(lines.next(), "fanotify")?;
    let mark = |text: &[u8]| {
        let on = match (field(text, "ino"), field(text, "mnt_id"), field(text, "sdev")) {
            (Some(_), ..) => Marked::Inode(object(text)?),
            (None, Some(number), _) => Marked::Mount(FILE.hex(number, "mnt_id")?),
            (None, None, Some(_)) => Marked::FileSystem(device(text)?),
            (None, None, None) => Marked::Namespace,
        };
        Ok(Mark {
            on,
            flags: FILE.hex(field(text, "mflags"), "mflags")?,
            mask: FILE.hex(field(text, "mask"), "mask")?,
            ignored: FILE.hex(field(text, "ignored_mask"), "ignored_mask")?,
        })
    };
    Ok(Group {
        flags: FILE.hex(field(head, "flags"), "flags")?,
        event_flags: FILE.hex(field(head, "event-flags"), "event-flags")?,
        marks: lines.map(mark).collect::<Result<_, _>>()?,
    })
}

fn object(text: &[u8]) -> Result<Object, Malformed> {
    Ok(Object { ino: FILE.hex(field(text, "ino"), "ino")?, device: device(text)?, handle: handle(text)? })
}

fn handle(text: &[u8]) -> Result<Option<(i32, Vec<u8>)>, Malformed> {
    let Some(digits) = field(text, "f_handle") else { return Ok(None) };
    let bytes = digits.chunks(2).map(|two| FILE.hex(two, "f_handle")).collect::<Result<_, _>>()?;
    Ok(Some((FILE.hex::<u32>(field(text, "fhandle-type"), "fhandle-type")? as i32, bytes)))
}

/// The kernel's own form of a device number: twenty bits for the minor one.
fn device(text: &[u8]) -> Result<Device, Malformed> {
    let number: u32 = FILE.hex(field(text, "sdev"), "sdev")?;
    Ok(Device { major: number >> 20, minor: number & 0xf_ffff })
}

/// `key:value` or `key: value`, somewhere in a line.
fn field<'a>(text: &'a [u8], key: &str) -> Option<&'a [u8]> {
    let mut words = words(text);
    while let Some(word) = words.next() {
        match split_once(word, b':') {
            Some((found, b"")) if found == key.as_bytes() => return words.next(),
            Some((found, value)) if found == key.as_bytes() => return Some(value),
            _ => {}
        }
    }
    None
}

/// All of them on any file.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(text: &[u8]) {
    let Ok(info) = super::fdinfo::parse(text) else { return };
    let _ = (event(&info), timer(&info), signals(&info), process(&info), targets(&info), watches(&info));
    let _ = (group(&info), uffd_features(&info));
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::proc::fdinfo;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
pos:\t0
flags:\t02004002
mnt_id:\t4
ino:\t1044
eventfd-count: ffffffff00000007
eventfd-id: 2
eventfd-semaphore: 1
clockid: 7
ticks: 4
settime flags: 03
it_value: (0, 1366799)
it_interval: (0, 10000000)
sigmask:\t0000000000000200
Pid:\t-1
NSpid:\t-1
tfd:        3 events: c0000019 data: 123456789abcdef0  pos:0 ino:414 sdev:fe00010
inotify wd:a ino:98c097 sdev:1b mask:84000100 ignored_mask:0 fhandle-bytes:8 fhandle-type:81 f_handle:97c098000b869f48
inotify wd:1 ino:1 sdev:1b mask:20 ignored_mask:0
fanotify flags:1e80 event-flags:88002
fanotify sdev:d mflags:0 mask:2 ignored_mask:0
fanotify mnt_id:1e mflags:0 mask:8000300 ignored_mask:0
fanotify ino:994029 sdev:fe00000 mflags:40 mask:48000038 ignored_mask:1 fhandle-bytes:8 fhandle-type:1 f_handle:29409900
fanotify mnt_ns:f0000000 mflags:0 mask:1000000 ignored_mask:0
pending:	0
total:	0
API:	aa:8000a000:80000000000001ff
";

    fn without(line: &str) -> FdInfo {
        let text = String::from_utf8(SAMPLE.to_vec()).unwrap();
        let kept: Vec<&str> = text.lines().filter(|other| !other.starts_with(line)).collect();
        fdinfo::parse(kept.join("\n").as_bytes()).unwrap()
    }

    #[test]
    fn sample() {
        let info = fdinfo::parse(SAMPLE).unwrap();
        assert_eq!(event(&info), Ok(Event { count: 0xffff_ffff_0000_0007, semaphore: true }));
        assert_eq!(timer(&info), Ok(Timer { clock: 7, ticks: 4, flags: 3, runs: true }));
        assert_eq!((signals(&info), process(&info)), (Ok(0x200), Ok(-1)));
        assert_eq!(uffd_features(&info), Ok(Some(0x8000_a000)));
        let target = Target {
            fd: 3,
            events: 0xc000_0019,
            data: 0x1234_5678_9abc_def0,
            ino: 0x414,
            device: Device { major: 254, minor: 16 },
        };
        assert_eq!(targets(&info), Ok(vec![target]));
        let watches = watches(&info).unwrap();
        let handle = vec![0x97, 0xc0, 0x98, 0, 0x0b, 0x86, 0x9f, 0x48];
        let object =
            Object { ino: 0x98_c097, device: Device { major: 0, minor: 27 }, handle: Some((0x81, handle)) };
        assert_eq!(watches[0], Watch { number: 10, mask: 0x8400_0100, object });
        assert_eq!((watches[1].number, &watches[1].object.handle), (1, &None));
    }

    #[test]
    fn fanotify() {
        let found = group(&fdinfo::parse(SAMPLE).unwrap()).unwrap();
        let object = Object {
            ino: 0x99_4029,
            device: Device { major: 254, minor: 0 },
            handle: Some((1, vec![0x29, 0x40, 0x99, 0])),
        };
        let mark = |on, flags, mask, ignored| Mark { on, flags, mask, ignored };
        let marks = vec![
            mark(Marked::FileSystem(Device { major: 0, minor: 13 }), 0, 2, 0),
            mark(Marked::Mount(0x1e), 0, 0x800_0300, 0),
            mark(Marked::Inode(object), 0x40, 0x4800_0038, 1),
            mark(Marked::Namespace, 0, 0x100_0000, 0),
        ];
        assert_eq!(found, Group { flags: 0x1e80, event_flags: 0x8_8002, marks });
    }

    #[test]
    fn nothing_is_made_up() {
        let info = without("eventfd-semaphore");
        assert_eq!(event(&info), Err(FILE.malformed("eventfd-semaphore")));
        assert_eq!(timer(&without("it_value")), Err(FILE.malformed("it_value")));
        assert_eq!(signals(&without("sigmask")), Err(FILE.malformed("sigmask")));
        assert_eq!(process(&without("Pid")), Err(FILE.malformed("Pid")));
        assert_eq!(targets(&without("tfd")), Ok(vec![]));
        assert_eq!(uffd_features(&without("API")), Ok(None));
        assert_eq!(
            uffd_features(&fdinfo::parse(b"flags:\t0\nmnt_id:\t1\npos:\t0\nAPI:\taa").unwrap()),
            Err(FILE.malformed("API"))
        );
        assert_eq!(group(&without("fanotify")), Err(FILE.malformed("fanotify")));
    }
}
