//! `/proc/PID/smaps` and `/proc/PID/maps`: see proc_pid_smaps(5), proc_pid_maps(5) and section 1.1 of
//! Documentation/filesystems/proc.rst.

use std::borrow::Cow;

use super::{Device, File, Malformed, lines, split_once, unescape_octal, words};

const FILE: File = File("smaps");

/// What d_path() adds to the name of a file without a directory entry.
const DELETED: &[u8] = b" (deleted)";

bitflags::bitflags! {
    /// What may be done with the memory: the bits are those of `PROT_*`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub(crate) struct Prot: u32 {
        const READ = 1;
        const WRITE = 2;
        const EXEC = 4;
    }
}

/// Defines the flags, numbered in order, and the table from their codes, so that the two agree.
macro_rules! vm_flags {
    ($($name:ident $code:literal $comment:literal)*) => {
        #[expect(non_camel_case_types, clippy::upper_case_acronyms)]
        enum Number { $($name),* }

        bitflags::bitflags! {
            /// The line `VmFlags`. The bits are ours: the kernel's own differ between versions.
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
            pub(crate) struct VmFlags: u64 {
                $(#[doc = $comment] const $name = 1 << Number::$name as u64;)*
            }
        }

        impl VmFlags {
            /// The flag that the kernel prints as these two letters.
            pub(crate) fn from_code(code: [u8; 2]) -> Option<Self> {
                match &code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

vm_flags! {
    READ          b"rd" "readable"
    WRITE         b"wr" "writable"
    EXEC          b"ex" "executable"
    SHARED        b"sh" "shared"
    MAY_READ      b"mr" "may be made readable"
    MAY_WRITE     b"mw" "may be made writable"
    MAY_EXEC      b"me" "may be made executable"
    MAY_SHARE     b"ms" "was mapped with MAP_SHARED"
    GROWS_DOWN    b"gd" "MAP_GROWSDOWN"
    MAYBE_GUARD   b"gu" "may contain guard regions of MADV_GUARD_INSTALL (only since Linux 6.19)"
    PFN_MAP       b"pf" "pages without struct page"
    DENY_WRITE    b"dw" "writes to the file are denied (old kernels)"
    LOCKED        b"lo" "mlock(2)"
    IO            b"io" "memory of a device"
    SEQ_READ      b"sr" "MADV_SEQUENTIAL"
    RAND_READ     b"rr" "MADV_RANDOM"
    DONT_FORK     b"dc" "MADV_DONTFORK"
    DONT_EXPAND   b"de" "mremap(2) cannot expand it"
    LOCK_ON_FAULT b"lf" "MLOCK_ONFAULT"
    ACCOUNT       b"ac" "counts as committed memory"
    NO_RESERVE    b"nr" "MAP_NORESERVE"
    HUGETLB       b"ht" "MAP_HUGETLB or a file of hugetlbfs"
    SYNC          b"sf" "MAP_SYNC"
    NONLINEAR     b"nl" "remap_file_pages(2) of old kernels"
    ARCH          b"ar" "depends on the architecture"
    WIPE_ON_FORK  b"wf" "MADV_WIPEONFORK"
    DONT_DUMP     b"dd" "MADV_DONTDUMP"
    BTI           b"bt" "arm64: PROT_BTI"
    MTE           b"mt" "arm64: PROT_MTE"
    SOFT_DIRTY    b"sd" "written to (or new) since the soft-dirty bits were cleared"
    MIXED_MAP     b"mm" "pages with and without struct page"
    HUGE_PAGE     b"hg" "MADV_HUGEPAGE"
    NO_HUGE_PAGE  b"nh" "MADV_NOHUGEPAGE"
    MERGEABLE     b"mg" "MADV_MERGEABLE"
    UFFD_MISSING  b"um" "userfaultfd: missing pages"
    UFFD_WP       b"uw" "userfaultfd: writes to protected pages"
    UFFD_MINOR    b"ui" "userfaultfd: minor faults"
    SHADOW_STACK  b"ss" "shadow stack"
    SEALED        b"sl" "mseal(2)"
    DROPPABLE     b"dp" "MAP_DROPPABLE"
}

/// One mapping of the address space. From `maps`, only what its one line has; the rest is 0 or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    /// The first address after it.
    pub(crate) end: u64,
    pub(crate) prot: Prot,
    /// `s`: `MAP_SHARED`, even where the file was opened for reading only.
    pub(crate) shared: bool,
    /// In the file, in bytes.
    pub(crate) offset: u64,
    pub(crate) device: Device,
    pub(crate) inode: u64,
    /// The path, `[stack]` and the like, or nothing; without the suffix that `deleted` tells of.
    ///
    /// The kernel writes a line end as `\012` but a backslash as it is, so that a file which really has
    /// `\012` in its name reads like one with a line end: compare inodes before trusting a path.
    pub(crate) name: Vec<u8>,
    /// The name ended in ` (deleted)`. That can also be the true name of a living file; only its inode
    /// tells, at the path [`Mapping::raw_name`].
    pub(crate) deleted: bool,
    pub(crate) flags: VmFlags,
    /// Codes of `VmFlags` that this library does not know: a newer kernel.
    pub(crate) unknown_flags: Vec<[u8; 2]>,
    /// The key of pkey_alloc(2).
    pub(crate) protection_key: u32,
    /// Written to, and mapped nowhere else.
    pub(crate) private_dirty_kb: u64,
    /// Pages that the kernel may take back (MADV_FREE).
    pub(crate) lazy_free_kb: u64,
    pub(crate) kernel_page_size_kb: u64,
}

impl Mapping {
    /// The name with the suffix that `name` lacks if the mapping is `deleted`.
    pub(crate) fn raw_name(&self) -> Cow<'_, [u8]> {
        if self.deleted { Cow::Owned([&self.name, DELETED].concat()) } else { Cow::Borrowed(&self.name) }
    }
}

/// The mappings, in the order of the file, which is that of their addresses.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse(text: &[u8]) -> Result<Vec<Mapping>, Malformed> {
    let mut mappings = Vec::new();
    parse_some(text, &mut mappings)?;
    Ok(mappings)
}

/// Adds what some lines of the file tell to what those before have told.
pub(crate) fn parse_some(text: &[u8], mappings: &mut Vec<Mapping>) -> Result<(), Malformed> {
    for line in lines(text) {
        // Addresses are in small letters, keys begin with a capital one.
        if !line.first().is_some_and(u8::is_ascii_uppercase) {
            mappings.push(header(line)?);
            continue;
        }
        property(line, FILE.some(mappings.last_mut(), "address")?)?;
    }
    Ok(())
}

/// `LazyFree:             24 kB`
fn property(line: &[u8], mapping: &mut Mapping) -> Result<(), Malformed> {
    // Five of two dozen are wanted: what none of them begins with is not looked at any further.
    let [b'K' | b'P' | b'L' | b'V', ..] = line else { return Ok(()) };
    let Some((key, value)) = split_once(line, b':') else { return Err(FILE.malformed("key")) };
    let kilobytes = |name| FILE.radix(value.trim_ascii().strip_suffix(b" kB"), 10, name);
    match key {
        b"KernelPageSize" => mapping.kernel_page_size_kb = kilobytes("KernelPageSize")?,
        b"Private_Dirty" => mapping.private_dirty_kb = kilobytes("Private_Dirty")?,
        b"LazyFree" => mapping.lazy_free_kb = kilobytes("LazyFree")?,
        b"ProtectionKey" => mapping.protection_key = FILE.radix(value.trim_ascii(), 10, "ProtectionKey")?,
        b"VmFlags" => vm_flags(value, mapping)?,
        _ => {}
    }
    Ok(())
}

fn vm_flags(codes: &[u8], mapping: &mut Mapping) -> Result<(), Malformed> {
    for code in words(codes) {
        let code = <[u8; 2]>::try_from(code).map_err(|_| FILE.malformed("VmFlags"))?;
        match VmFlags::from_code(code) {
            Some(flag) => mapping.flags |= flag,
            None if mapping.unknown_flags.contains(&code) => {}
            None => mapping.unknown_flags.push(code),
        }
    }
    Ok(())
}

/// `7f0c2000-7f0c4000 r-xp 00002000 fe:00 247030      /usr/bin/cat`
fn header(line: &[u8]) -> Result<Mapping, Malformed> {
    // Single blanks separate the fields; those in the name, at its end too, belong to it.
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let (start, end) = FILE.some(fields.next().and_then(|range| split_once(range, b'-')), "address")?;
    let (start, end) = (FILE.hex(start, "address")?, FILE.hex(end, "address")?);
    if start >= end {
        return Err(FILE.malformed("address"));
    }
    let Some(&[read, write, exec, share]) = fields.next() else { return Err(FILE.malformed("perms")) };
    let mut prot = Prot::empty();
    for (letter, set, bit) in [(read, b'r', Prot::READ), (write, b'w', Prot::WRITE), (exec, b'x', Prot::EXEC)]
    {
        if letter == set {
            prot |= bit;
        } else if letter != b'-' {
            return Err(FILE.malformed("perms"));
        }
    }
    let shared = match share {
        b's' => true,
        b'p' => false,
        _ => return Err(FILE.malformed("perms")),
    };
    let offset = FILE.hex(fields.next(), "offset")?;
    let device = FILE.device(fields.next(), 16, "dev")?;
    let inode = FILE.decimal(fields.next(), "inode")?;
    let name = fields.next().unwrap_or_default().trim_ascii_start();
    let stripped = name.strip_suffix(DELETED);
    Ok(Mapping {
        start,
        end,
        prot,
        shared,
        offset,
        device,
        inode,
        name: unescape_octal(stripped.unwrap_or(name), |byte| byte == b'\n'),
        deleted: stripped.is_some(),
        ..Mapping::default()
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
55ba30b97000-55ba30b9c000 r-xp 00002000 fe:00 247030                     /usr/bin/cat
Size:                 20 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                  20 kB
Pss:                  20 kB
Pss_Dirty:             0 kB
Shared_Clean:          0 kB
Shared_Dirty:          0 kB
Private_Clean:        20 kB
Private_Dirty:         8 kB
Referenced:           20 kB
Anonymous:            12 kB
KSM:                   0 kB
LazyFree:             24 kB
AnonHugePages:      2048 kB
ShmemPmdMapped:        0 kB
FilePmdMapped:         0 kB
Shared_Hugetlb:        1 kB
Private_Hugetlb:       2 kB
Swap:                  8 kB
SwapPss:               0 kB
Locked:                0 kB
THPeligible:           0
ProtectionKey:         3
VmFlags: rd ex mr mw me zz zz sl 
7fd8ee815000-7fd8ee816000 rw-s 00001000 fe:00 10010786                   /tmp/odd\\012 dir\xff/gone (deleted)
VmFlags: rd wr sh mr mw me ms 
7fd8ee816000-7fd8ee817000 ---p 00000000 00:00 0 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex 
";

    /// The name of the mapping that this line ends in.
    fn name(end: &str) -> (Vec<u8>, bool) {
        let line = format!("1000-2000 r--p 00000000 fe:00 7    {end}\n");
        let mapping = parse(line.as_bytes()).unwrap().remove(0);
        (mapping.name, mapping.deleted)
    }

    #[test]
    fn sample() {
        let mappings = parse(SAMPLE).unwrap();
        assert_eq!(
            mappings[0],
            Mapping {
                start: 0x55ba_30b9_7000,
                end: 0x55ba_30b9_c000,
                prot: Prot::READ | Prot::EXEC,
                shared: false,
                offset: 0x2000,
                device: Device { major: 0xfe, minor: 0 },
                inode: 247030,
                name: b"/usr/bin/cat".to_vec(),
                deleted: false,
                flags: VmFlags::READ
                    | VmFlags::EXEC
                    | VmFlags::MAY_READ
                    | VmFlags::MAY_WRITE
                    | VmFlags::MAY_EXEC
                    | VmFlags::SEALED,
                unknown_flags: vec![*b"zz"],
                protection_key: 3,
                private_dirty_kb: 8,
                lazy_free_kb: 24,
                kernel_page_size_kb: 4,
            }
        );
        assert_eq!(mappings[0].end - mappings[0].start, 0x5000);
        assert!(mappings[1].shared && mappings[1].deleted);
        assert_eq!(mappings[1].name, b"/tmp/odd\n dir\xff/gone");
        assert_eq!(mappings[1].raw_name(), &b"/tmp/odd\n dir\xff/gone (deleted)"[..]);
        assert_eq!((mappings[2].prot, &*mappings[2].name), (Prot::empty(), &b""[..]));
        assert_eq!((mappings[3].end, &*mappings[3].name), (0xffff_ffff_ff60_1000, &b"[vsyscall]"[..]));
        assert_eq!(mappings.len(), 4);
    }

    #[test]
    fn odd_names() {
        assert_eq!(name("/a\\012\\012b "), (b"/a\n\nb ".to_vec(), false));
        assert_eq!(name("/back\\134slash"), (b"/back\\134slash".to_vec(), false));
        assert_eq!(name("/y (deleted) (deleted)"), (b"/y (deleted)".to_vec(), true));
        assert_eq!(name("/memfd:me\\012mo (deleted)"), (b"/memfd:me\nmo".to_vec(), true));
        assert_eq!(name("[anon:my heap]"), (b"[anon:my heap]".to_vec(), false));
        assert_eq!(name("/SYSV00000000 (deleted)"), (b"/SYSV00000000".to_vec(), true));
        assert_eq!(name(""), (b"".to_vec(), false));
    }

    #[test]
    fn every_flag_has_its_code() {
        let codes = (b'a'..=b'z').flat_map(|first| (b'a'..=b'z').map(move |second| [first, second]));
        let known: VmFlags = codes.filter_map(VmFlags::from_code).collect();
        assert_eq!(known, VmFlags::all());
        assert_eq!(VmFlags::READ.bits(), 1);
        assert_eq!(VmFlags::from_code(*b"dp"), Some(VmFlags::DROPPABLE));
    }

    #[test]
    fn own() {
        let smaps = parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        assert!(smaps.iter().all(|mapping| mapping.unknown_flags.is_empty()), "{smaps:?}");
        assert!(smaps.iter().any(|mapping| mapping.name == b"[stack]" && mapping.private_dirty_kb > 0));
        let maps = parse(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        let stack = maps.iter().find(|mapping| mapping.name == b"[stack]").unwrap();
        assert_eq!((stack.prot, stack.flags), (Prot::READ | Prot::WRITE, VmFlags::empty()));
    }

    #[test]
    fn malformed() {
        for (text, field) in [
            (&b"\n"[..], "address"),
            (b"LazyFree: 1 kB\n", "address"),
            (b"1000 r--p 0 0:0 0 \n", "address"),
            (b"2000-2000 r--p 0 0:0 0 \n", "address"),
            (b"10000000000000000-20000000000000000 r--p 0 0:0 0 \n", "address"),
            (b"1000-2000 r--\n", "perms"),
            (b"1000-2000 rxwp 0 0:0 0 \n", "perms"),
            (b"1000-2000 rw-q 0 0:0 0 \n", "perms"),
            (b"1000-2000 rw-p -1 0:0 0 \n", "offset"),
            (b"1000-2000 rw-p 0 0 0 \n", "dev"),
            (b"1000-2000 rw-p 0 0:0 f \n", "inode"),
            (b"1000-2000 rw-p 0 0:0 0 \nLazyFree\n", "key"),
            (b"1000-2000 rw-p 0 0:0 0 \nLazyFree: 4 MB\n", "LazyFree"),
            (b"1000-2000 rw-p 0 0:0 0 \nPrivate_Dirty: kB\n", "Private_Dirty"),
            (b"1000-2000 rw-p 0 0:0 0 \nProtectionKey: -1\n", "ProtectionKey"),
            (b"1000-2000 rw-p 0 0:0 0 \nVmFlags: rd wrx\n", "VmFlags"),
        ] {
            assert_eq!(parse(text), Err(FILE.malformed(field)), "{}", text.escape_ascii());
        }
    }
}
