//! What a file is that no kind takes, in words, so that its refusal says what to do without.

use nix::sys::stat::{SFlag, major, minor};
use nix::sys::statfs::fstatfs;

use super::Probe;
use crate::error::{NameCall, Refusal, Result};

/// How `/proc/PID/fd` shows files that come from no path, and what they are.
const NAMELESS: &[(&str, &str)] = &[
    ("anon_inode:[io_uring]", "io_uring instances"),
    ("anon_inode:[perf_event]", "performance counters (perf_event_open)"),
    ("anon_inode:bpf", "BPF programs, maps and links"),
    ("anon_inode:btf", "BPF type information"),
    ("anon_inode:[fscontext]", "file system contexts (fsopen)"),
    ("anon_inode:[userfaultfd]", "userfaultfd"),
    ("anon_inode:[landlock-ruleset]", "landlock rulesets"),
    ("anon_inode:seccomp notify", "seccomp listeners"),
    ("anon_inode:kvm", "KVM virtual machines"),
    ("anon_inode:[vfio", "VFIO devices"),
    ("anon_inode:iommufd", "iommufd"),
    ("anon_inode:sync_file", "sync files of graphics drivers"),
    ("anon_inode:drm", "objects of graphics drivers"),
    ("anon_inode:gpio", "GPIO lines"),
    ("anon_inode:[papr", "PAPR handles"),
];

/// Internal file systems whose files look like regular ones, by statfs(2).
const FILE_SYSTEMS: &[(i64, &str)] = &[
    (0x6e73_6673, "namespaces"),
    (0x5345_434d, "secret memory (memfd_secret)"),
    (0x444d_4142, "DMA buffers"),
];

/// Character devices by number, as in Documentation/admin-guide/devices.txt. A minor of `None` means all.
const DEVICES: &[(u64, Option<u64>, &str)] = &[
    (1, Some(1), "the machine's memory (/dev/mem)"),
    (1, Some(4), "I/O ports (/dev/port)"),
    (1, Some(11), "the reader's place in the kernel log (/dev/kmsg)"),
    (4, None, "terminals"),
    (5, None, "terminals"),
    (10, Some(183), "a device that makes random numbers (/dev/hwrng)"),
    (10, Some(135), "the real time clock (/dev/rtc)"),
    (10, Some(200), "tunnels (/dev/net/tun)"),
    (10, Some(228), "the high precision timer (/dev/hpet)"),
    (10, Some(229), "FUSE connections (/dev/fuse)"),
    (10, Some(232), "KVM (/dev/kvm)"),
    (10, Some(235), "autofs"),
    (10, Some(236), "the device mapper"),
    (10, Some(237), "loop devices' control"),
    (13, None, "input devices"),
    (29, None, "frame buffers"),
    (116, None, "sound devices"),
    (136, None, "terminals"),
    (195, None, "graphics devices"),
    (226, None, "graphics devices"),
];

/// Why a file is refused that a kind might take for one of its own.
pub(super) fn disguised(probe: &Probe) -> Result<Option<Refusal>> {
    if !matches!(probe.kind(), SFlag::S_IFREG) {
        return Ok(None);
    }
    let on = fstatfs(&probe.file).call("fstatfs")?.filesystem_type().0;
    let known = FILE_SYSTEMS.iter().find(|(magic, _)| *magic == on);
    Ok(known.map(|(_, what)| probe.refusal(format!("{what}: not supported"))))
}

/// Why a file of no known kind is refused.
pub(super) fn refusal(probe: &Probe) -> Refusal {
    let what = what(probe).unwrap_or_else(|| "this kind of file".into());
    probe.refusal(format!("{what}: not supported"))
}

fn what(probe: &Probe) -> Option<String> {
    let name = String::from_utf8_lossy(&probe.name);
    if let Some((_, what)) = NAMELESS.iter().find(|(start, _)| name.starts_with(start)) {
        return Some((*what).to_owned());
    }
    match probe.kind() {
        SFlag::S_IFSOCK => Some("sockets".into()),
        SFlag::S_IFIFO => Some("named pipes".into()),
        SFlag::S_IFBLK => Some("block devices".into()),
        SFlag::S_IFCHR => {
            let (major, minor) = (major(probe.stat.st_rdev), minor(probe.stat.st_rdev));
            let known =
                DEVICES.iter().find(|(one, two, _)| *one == major && two.is_none_or(|two| two == minor));
            // The clock's number is given out when its driver comes.
            let clock = name.starts_with("/dev/rtc").then_some("the real time clock (/dev/rtc)");
            let what = known.map(|(_, _, what)| *what).or(clock);
            Some(what.map_or_else(|| format!("character devices {major}:{minor}"), str::to_owned))
        }
        _ => name.strip_prefix("anon_inode:").map(|kind| format!("files of the kind {kind}")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use nix::fcntl::OFlag;
    use nix::sys::stat::{fstat, makedev};

    use super::super::Chosen;
    use super::*;
    use crate::Pid;

    /// Most of these cannot be had on a machine for tests.
    #[test]
    fn what_they_are_called() {
        let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        let probe = |name: &str, kind: u32, device| {
            let mut stat = fstat(&file).unwrap();
            (stat.st_mode, stat.st_rdev) = (kind, device);
            let info = crate::proc::fdinfo::parse(b"pos:\t0\nflags:\t02\nmnt_id:\t1\n").unwrap();
            let (name, flags) = (name.as_bytes().to_vec(), OFlag::empty());
            let file = file.try_clone().unwrap();
            Probe { pid: Pid::from(1), fd: 7, file, stat, name, flags, info, chosen: Chosen::Nothing }
        };
        let called = |name, kind, device| refusal(&probe(name, kind, device)).reason.into_owned();
        for (name, words) in NAMELESS {
            assert!(called(name, 0, 0).contains(words), "{name}");
        }
        for (name, words) in [
            ("anon_inode:kvm-vcpu:0", "KVM"),
            ("anon_inode:bpf-prog", "BPF"),
            ("anon_inode:[vfio-device]", "VFIO"),
            ("anon_inode:drm_syncobj", "graphics"),
            ("anon_inode:[something]", "files of the kind [something]"),
        ] {
            assert!(called(name, 0, 0).contains(words), "{name}");
        }
        for (name, major, minor, words) in [
            ("/dev/dri/renderD128", 226, 128, "graphics devices"),
            ("/dev/dri/card0", 226, 0, "graphics devices"),
            ("/dev/kvm", 10, 232, "KVM"),
            ("/dev/net/tun", 10, 200, "tunnels"),
            ("/dev/rtc0", 249, 0, "real time clock"),
            ("/dev/kmsg", 1, 11, "kernel log"),
            ("/dev/pts/3", 136, 3, "terminals"),
            ("/dev/nvidia0", 195, 0, "graphics devices"),
            ("/dev/other", 240, 3, "character devices 240:3"),
        ] {
            assert!(called(name, libc::S_IFCHR, makedev(major, minor)).contains(words), "{name}");
        }
        assert!(called("/dev/loop0", libc::S_IFBLK, makedev(7, 0)).contains("block devices"));
        assert!(called("socket:[5]", libc::S_IFSOCK, 0).contains("sockets"));
    }
}
