//! `/proc/PID/mountinfo`: see proc_pid_mountinfo(5) and section 3.5 of Documentation/filesystems/proc.rst.

use super::{Device, File, Malformed, lines, unescape_octal};

const FILE: File = File("mountinfo");

/// One mount of the task's mount namespace that is below the task's root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) id: u32,
    /// The mount it is on; its own id, or one that is not listed, at the root of the tree.
    pub(crate) parent: u32,
    pub(crate) device: Device,
    /// Which directory of the file system is mounted (or, for nsfs, `net:[4026531833]`); a removed one
    /// ends in `//deleted`.
    pub(crate) root: Vec<u8>,
    /// Relative to the task's root directory.
    pub(crate) mount_point: Vec<u8>,
    /// Options of this mount, with commas between, as they are in the file.
    pub(crate) options: Vec<u8>,
    /// The peer group of a shared mount.
    pub(crate) shared: Option<u32>,
    /// The peer group that a slave mount receives from.
    pub(crate) master: Option<u32>,
    /// The nearest dominating peer group below the task's root, where that is not the master.
    pub(crate) propagate_from: Option<u32>,
    pub(crate) unbindable: bool,
    /// With its subtype: `fuse.sshfs`.
    pub(crate) fs_type: Vec<u8>,
    /// What mount(2) was given, which may be nothing at all.
    pub(crate) source: Vec<u8>,
    /// Options of the file system, as they are in the file (with each file system's own escapes).
    pub(crate) super_options: Vec<u8>,
}

/// The mounts, in the order of the file.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Mount>, Malformed> {
    lines(text).map(mount).collect()
}

fn mount(line: &[u8]) -> Result<Mount, Malformed> {
    // Exactly one blank after each field: blanks in names are escaped, and the source may be empty.
    let mut fields = line.split(|&byte| byte == b' ');
    let mut mount = Mount {
        id: FILE.decimal(fields.next(), "mount ID")?,
        parent: FILE.decimal(fields.next(), "parent ID")?,
        device: FILE.device(fields.next(), 10, "major:minor")?,
        root: name(fields.next(), "root")?,
        mount_point: name(fields.next(), "mount point")?,
        options: FILE.some(fields.next(), "mount options")?.to_vec(),
        shared: None,
        master: None,
        propagate_from: None,
        unbindable: false,
        fs_type: Vec::new(),
        source: Vec::new(),
        super_options: Vec::new(),
    };
    loop {
        let field = FILE.some(fields.next(), "separator")?;
        match super::key_value(field).unwrap_or((field, b"")) {
            (b"-", _) => break,
            (b"shared", group) => mount.shared = Some(FILE.decimal(group, "shared")?),
            (b"master", group) => mount.master = Some(FILE.decimal(group, "master")?),
            (b"propagate_from", group) => {
                mount.propagate_from = Some(FILE.decimal(group, "propagate_from")?);
            }
            (b"unbindable", _) => mount.unbindable = true,
            _ => {} // proc.rst: parsers should ignore all unrecognised optional fields
        }
    }
    mount.fs_type = name(fields.next(), "filesystem type")?;
    mount.source = name(fields.next(), "mount source")?;
    mount.super_options = FILE.some(fields.next(), "super options")?.to_vec();
    for more in fields {
        mount.super_options.push(b' ');
        mount.super_options.extend_from_slice(more);
    }
    Ok(mount)
}

/// The kernel escapes the backslash as well here, so every escape is one.
fn name(text: Option<&[u8]>, field: &'static str) -> Result<Vec<u8>, Malformed> {
    Ok(unescape_octal(FILE.some(text, field)?, |_| true))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
41 31 254:16 /a /b rw shared:1 master:2 propagate_from:3 unbindable new:field - ext4 /dev/root rw,errors=continue
42 27 0:39 / /tmp/mm\\040x\\012\\134 rw,relatime - tmpfs  rw
";

    #[test]
    fn sample() {
        let mounts = parse(SAMPLE).unwrap();
        assert_eq!(
            mounts[1],
            Mount {
                id: 41,
                parent: 31,
                device: Device { major: 254, minor: 16 },
                root: b"/a".to_vec(),
                mount_point: b"/b".to_vec(),
                options: b"rw".to_vec(),
                shared: Some(1),
                master: Some(2),
                propagate_from: Some(3),
                unbindable: true,
                fs_type: b"ext4".to_vec(),
                source: b"/dev/root".to_vec(),
                super_options: b"rw,errors=continue".to_vec(),
            }
        );
        assert_eq!(mounts[2].mount_point, b"/tmp/mm x\n\\");
        assert_eq!((&*mounts[2].source, &*mounts[2].super_options), (&b""[..], &b"rw"[..]));
        assert_eq!((mounts.len(), mounts[0].shared), (3, None));
    }

    #[test]
    fn own() {
        let mounts = parse(&std::fs::read("/proc/self/mountinfo").unwrap()).unwrap();
        assert!(mounts.iter().any(|mount| mount.mount_point == b"/proc" && mount.fs_type == b"proc"));
    }

    #[test]
    fn malformed() {
        for (text, field) in [
            (&b"\n"[..], "mount ID"),
            (b"1 x", "parent ID"),
            (b"1 2 3", "major:minor"),
            (b"1 2 3:4 /", "mount point"),
            (b"1 2 3:4 / / rw", "separator"),
            (b"1 2 3:4 / / rw shared:x - a b c", "shared"),
            (b"1 2 3:4 / / rw -", "filesystem type"),
            (b"1 2 3:4 / / rw - a", "mount source"),
            (b"1 2 3:4 / / rw - a b", "super options"),
        ] {
            assert_eq!(parse(text), Err(FILE.malformed(field)));
        }
    }
}
