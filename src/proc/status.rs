//! `/proc/PID/status` and `/proc/PID/task/TID/status`: see proc_pid_status(5) and table 1-2 of
//! Documentation/filesystems/proc.rst.

use super::{File, Malformed};

const FILE: File = File("status");

/// The lines of status that matter here.
///
/// Fields that are `Option` are missing for some tasks or kernels, as said at each; a kernel without
/// any other field is older than this library supports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// The name: any 15 bytes but NUL, without the escapes of the file.
    pub(crate) name: Vec<u8>,
    /// `None` for zombies and kernel threads.
    pub(crate) umask: Option<u32>,
    pub(crate) state: char,
    pub(crate) tgid: u32,
    /// The NUMA group, 0 for none.
    pub(crate) ngid: u32,
    pub(crate) pid: u32,
    pub(crate) ppid: u32,
    /// 0 for none.
    pub(crate) tracer_pid: u32,
    pub(crate) uid: Ids,
    pub(crate) gid: Ids,
    pub(crate) groups: Vec<u32>,
    /// The number in each pid namespace, from that of this /proc inwards.
    pub(crate) ns_tgid: Vec<u32>,
    pub(crate) ns_pid: Vec<u32>,
    /// 0 where the group's leader is outside the namespace.
    pub(crate) ns_pgid: Vec<u32>,
    /// Like `ns_pgid`.
    pub(crate) ns_sid: Vec<u32>,
    /// `None` for tasks without memory (zombies, kernel threads) and before Linux 4.15.
    pub(crate) core_dumping: Option<bool>,
    /// `None` for tasks without memory and before Linux 5.0.
    pub(crate) thp_enabled: Option<bool>,
    /// `None` for tasks without memory and before Linux 6.4.
    pub(crate) untag_mask: Option<u64>,
    pub(crate) threads: u32,
    pub(crate) sig_q: SigQueue,
    /// Signals are bit sets: bit 0 is signal 1. Pending for this thread:
    pub(crate) sig_pnd: u64,
    /// Pending for the process:
    pub(crate) shd_pnd: u64,
    pub(crate) sig_blk: u64,
    pub(crate) sig_ign: u64,
    pub(crate) sig_cgt: u64,
    pub(crate) cap_inh: u64,
    pub(crate) cap_prm: u64,
    pub(crate) cap_eff: u64,
    pub(crate) cap_bnd: u64,
    pub(crate) cap_amb: u64,
    pub(crate) no_new_privs: bool,
    /// `SECCOMP_MODE_*`; 0 (off) on a kernel without seccomp.
    pub(crate) seccomp: u8,
    /// How many filters are attached; `None` before Linux 5.9.
    pub(crate) seccomp_filters: Option<u32>,
    /// In words, such as `thread vulnerable`; `None` before Linux 4.17.
    pub(crate) speculation_store_bypass: Option<Vec<u8>>,
    /// In words, such as `conditional enabled`; `None` before Linux 5.11.
    pub(crate) speculation_indirect_branch: Option<Vec<u8>>,
    /// Such as `shstk wrss `, or nothing; `None` before Linux 6.6 or without `CONFIG_X86_USER_SHADOW_STACK`.
    pub(crate) x86_thread_features: Option<Vec<u8>>,
    /// Like `x86_thread_features`: those that arch_prctl(2) has locked.
    pub(crate) x86_thread_features_locked: Option<Vec<u8>>,
    /// Hexadecimal words, highest first, with commas between.
    pub(crate) cpus_allowed: Vec<u8>,
    /// Like `cpus_allowed`; `None` without `CONFIG_CPUSETS`.
    pub(crate) mems_allowed: Option<Vec<u8>>,
}

/// The four user or group ids of a task, see credentials(7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) real: u32,
    pub(crate) effective: u32,
    pub(crate) saved: u32,
    pub(crate) fs: u32,
}

/// Signals queued for all tasks of the real user id, and how many there may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SigQueue {
    pub(crate) used: u64,
    pub(crate) limit: u64,
}

pub(crate) fn parse(text: &[u8]) -> Result<Status, Malformed> {
    // The kernel keeps to one order, so that the search for each key goes on where the last one ended.
    let mut fields = Fields { text, rest: text };
    let name = fields.raw("Name")?;
    Ok(Status {
        name: unescape(name.strip_prefix(b"\t").unwrap_or(name)),
        umask: fields.maybe("Umask").map(|mask| FILE.radix(mask, 8, "Umask")).transpose()?,
        state: fields.some("State")?.first().copied().map(char::from).ok_or(FILE.malformed("State"))?,
        tgid: fields.decimal("Tgid")?,
        ngid: fields.decimal("Ngid")?,
        pid: fields.decimal("Pid")?,
        ppid: fields.decimal("PPid")?,
        tracer_pid: fields.decimal("TracerPid")?,
        uid: fields.ids("Uid")?,
        gid: fields.ids("Gid")?,
        groups: fields.decimals("Groups")?,
        ns_tgid: fields.decimals("NStgid")?,
        ns_pid: fields.decimals("NSpid")?,
        ns_pgid: fields.decimals("NSpgid")?,
        ns_sid: fields.decimals("NSsid")?,
        core_dumping: fields.maybe("CoreDumping").map(|flag| FILE.flag(flag, "CoreDumping")).transpose()?,
        thp_enabled: fields.maybe("THP_enabled").map(|flag| FILE.flag(flag, "THP_enabled")).transpose()?,
        untag_mask: fields
            .maybe("untag_mask")
            .map(|mask| FILE.prefixed_hex(mask, "untag_mask"))
            .transpose()?,
        threads: fields.decimal("Threads")?,
        sig_q: fields.sig_queue()?,
        sig_pnd: fields.hex("SigPnd")?,
        shd_pnd: fields.hex("ShdPnd")?,
        sig_blk: fields.hex("SigBlk")?,
        sig_ign: fields.hex("SigIgn")?,
        sig_cgt: fields.hex("SigCgt")?,
        cap_inh: fields.hex("CapInh")?,
        cap_prm: fields.hex("CapPrm")?,
        cap_eff: fields.hex("CapEff")?,
        cap_bnd: fields.hex("CapBnd")?,
        cap_amb: fields.hex("CapAmb")?,
        no_new_privs: FILE.flag(fields.some("NoNewPrivs")?, "NoNewPrivs")?,
        seccomp: fields.maybe("Seccomp").map_or(Ok(0), |mode| FILE.decimal(mode, "Seccomp"))?,
        seccomp_filters: fields
            .maybe("Seccomp_filters")
            .map(|count| FILE.decimal(count, "Seccomp_filters"))
            .transpose()?,
        speculation_store_bypass: fields.maybe("Speculation_Store_Bypass").map(<[u8]>::to_vec),
        speculation_indirect_branch: fields.maybe("SpeculationIndirectBranch").map(<[u8]>::to_vec),
        x86_thread_features: fields.maybe("x86_Thread_features").map(<[u8]>::to_vec),
        x86_thread_features_locked: fields.maybe("x86_Thread_features_locked").map(<[u8]>::to_vec),
        cpus_allowed: fields.some("Cpus_allowed")?.to_vec(),
        mems_allowed: fields.maybe("Mems_allowed").map(<[u8]>::to_vec),
    })
}

/// Looks lines up by key.
struct Fields<'a> {
    text: &'a [u8],
    /// What follows the line found last.
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// All between the colon and the line end.
    fn raw(&mut self, key: &'static str) -> Result<&'a [u8], Malformed> {
        let found = self.find(self.rest, key).or_else(|| self.find(self.text, key));
        let (value, rest) = FILE.some(found, key)?;
        self.rest = rest;
        Ok(value)
    }

    fn find(&self, mut text: &'a [u8], key: &str) -> Option<(&'a [u8], &'a [u8])> {
        loop {
            let (line, after) = super::first_line(text)?;
            if let Some(value) = line.strip_prefix(key.as_bytes()).and_then(|rest| rest.strip_prefix(b":")) {
                return Some((value, after));
            }
            text = after;
        }
    }

    fn some(&mut self, key: &'static str) -> Result<&'a [u8], Malformed> {
        self.raw(key).map(<[u8]>::trim_ascii)
    }

    fn maybe(&mut self, key: &'static str) -> Option<&'a [u8]> {
        self.some(key).ok()
    }

    fn decimal<T: TryFrom<i128>>(&mut self, key: &'static str) -> Result<T, Malformed> {
        FILE.decimal(self.some(key)?, key)
    }

    fn decimals(&mut self, key: &'static str) -> Result<Vec<u32>, Malformed> {
        FILE.decimals(self.some(key)?, key)
    }

    fn hex(&mut self, key: &'static str) -> Result<u64, Malformed> {
        FILE.hex(self.some(key)?, key)
    }

    fn ids(&mut self, key: &'static str) -> Result<Ids, Malformed> {
        let mut words = super::words(self.some(key)?);
        let mut next = || FILE.decimal(words.next(), key);
        Ok(Ids { real: next()?, effective: next()?, saved: next()?, fs: next()? })
    }

    /// `USED/LIMIT`
    fn sig_queue(&mut self) -> Result<SigQueue, Malformed> {
        let (used, limit) = FILE.some(super::split_once(self.some("SigQ")?, b'/'), "SigQ")?;
        Ok(SigQueue { used: FILE.decimal(used, "SigQ")?, limit: FILE.decimal(limit, "SigQ")? })
    }
}

/// Undoes the escapes in the name, of which there are two: line end and backslash.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let escaped = if byte == b'\\' { bytes.next_if(|next| matches!(next, b'n' | b'\\')) } else { None };
        plain.push(match escaped {
            Some(b'n') => b'\n',
            _ => byte,
        });
    }
    plain
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A process that calls itself `a) R\n\ (\xff`.
    pub(in crate::proc) const SAMPLE: &[u8] = b"\
Name:\ta) R\\n\\\\ (\xff
Umask:\t0022
State:\tR (running)
Tgid:\t3143
Ngid:\t0
Pid:\t3144
PPid:\t3139
TracerPid:\t7
Uid:\t1\t2\t3\t4294967295
Gid:\t5\t6\t7\t8
FDSize:\t256
Groups:\t4 24 27 
NStgid:\t3143\t1
NSpid:\t3144\t2
NSpgid:\t3139\t0
NSsid:\t2641\t0
Kthread:\t0
VmPeak:\t    3060 kB
VmRSS:\t    1764 kB
HugetlbPages:\t       0 kB
CoreDumping:\t0
THP_enabled:\t1
untag_mask:\t0xffffffffffffffff
Threads:\t2
SigQ:\t5/96365
SigPnd:\t0000000000000001
ShdPnd:\t0000000000000100
SigBlk:\t0000000000010000
SigIgn:\t0000000000001000
SigCgt:\t0000000180014a07
CapInh:\t0000000000000000
CapPrm:\t000001fffeffffff
CapEff:\t000001fffeffffff
CapBnd:\t000001fffeffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t3
Speculation_Store_Bypass:\tthread vulnerable
SpeculationIndirectBranch:\tconditional enabled
x86_Thread_features:\tshstk wrss 
x86_Thread_features_locked:\t
Cpus_allowed:\t3
Cpus_allowed_list:\t0-1
Mems_allowed:\t00000000,00000001
Mems_allowed_list:\t0
voluntary_ctxt_switches:\t0
nonvoluntary_ctxt_switches:\t0
";
    const ZOMBIE: &[u8] = b"\
Name:\tsleep
State:\tZ (zombie)
Tgid:\t4582
Ngid:\t0
Pid:\t4582
PPid:\t4541
TracerPid:\t0
Uid:\t0\t0\t0\t0
Gid:\t0\t0\t0\t0
FDSize:\t0
Groups:\t 
NStgid:\t4582
NSpid:\t4582
NSpgid:\t4540
NSsid:\t2641
Kthread:\t0
Threads:\t1
SigQ:\t5/96365
SigPnd:\t0000000000000000
ShdPnd:\t0000000000000100
SigBlk:\t0000000000000000
SigIgn:\t0000000000000000
SigCgt:\t0000000000000000
CapInh:\t0000000000000000
CapPrm:\t000001fffeffffff
CapEff:\t000001fffeffffff
CapBnd:\t000001fffeffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t0
Cpus_allowed:\t3
";

    #[test]
    fn sample() {
        let expected = Status {
            name: b"a) R\n\\ (\xff".to_vec(),
            umask: Some(0o22),
            state: 'R',
            tgid: 3143,
            ngid: 0,
            pid: 3144,
            ppid: 3139,
            tracer_pid: 7,
            uid: Ids { real: 1, effective: 2, saved: 3, fs: u32::MAX },
            gid: Ids { real: 5, effective: 6, saved: 7, fs: 8 },
            groups: vec![4, 24, 27],
            ns_tgid: vec![3143, 1],
            ns_pid: vec![3144, 2],
            ns_pgid: vec![3139, 0],
            ns_sid: vec![2641, 0],
            core_dumping: Some(false),
            thp_enabled: Some(true),
            untag_mask: Some(u64::MAX),
            threads: 2,
            sig_q: SigQueue { used: 5, limit: 96365 },
            sig_pnd: 1,
            shd_pnd: 0x100,
            sig_blk: 0x1_0000,
            sig_ign: 0x1000,
            sig_cgt: 0x1_8001_4a07,
            cap_inh: 0,
            cap_prm: 0x1ff_feff_ffff,
            cap_eff: 0x1ff_feff_ffff,
            cap_bnd: 0x1ff_feff_ffff,
            cap_amb: 0,
            no_new_privs: true,
            seccomp: 2,
            seccomp_filters: Some(3),
            speculation_store_bypass: Some(b"thread vulnerable".to_vec()),
            speculation_indirect_branch: Some(b"conditional enabled".to_vec()),
            x86_thread_features: Some(b"shstk wrss".to_vec()),
            x86_thread_features_locked: Some(vec![]),
            cpus_allowed: b"3".to_vec(),
            mems_allowed: Some(b"00000000,00000001".to_vec()),
        };
        assert_eq!(parse(SAMPLE), Ok(expected));
    }

    #[test]
    fn zombie_on_a_lean_kernel() {
        let status = parse(ZOMBIE).unwrap();
        assert_eq!((status.state, status.umask, status.thp_enabled), ('Z', None, None));
        assert_eq!((status.seccomp, status.seccomp_filters, status.mems_allowed), (0, None, None));
        assert_eq!((status.groups, status.shd_pnd), (vec![], 0x100));
    }

    #[test]
    fn names() {
        let name = |name: &[u8]| parse(&[b"Name:\t", name, &ZOMBIE[11..]].concat()).unwrap().name;
        assert_eq!(name(b" blanks "), b" blanks ");
        assert_eq!(name(b"\\\\n"), b"\\n");
        assert_eq!(name(b"\\"), b"\\");
        assert_eq!(name(b""), b"");
    }

    #[test]
    fn own() {
        let status = parse(&std::fs::read("/proc/self/status").unwrap()).unwrap();
        assert_eq!(status.tgid, std::process::id());
        assert!(status.threads > 0 && status.ns_pid.first() == Some(&status.pid));
    }

    #[test]
    fn malformed() {
        let altered = |from: &str, to: &str| {
            let text = String::from_utf8_lossy(SAMPLE).replace(from, to);
            parse(text.as_bytes()).unwrap_err().field
        };
        assert_eq!(parse(b""), Err(FILE.malformed("Name")));
        assert_eq!(altered("State:\tR (running)", "State:\t"), "State");
        assert_eq!(altered("Umask:\t0022", "Umask:\t0822"), "Umask");
        assert_eq!(altered("4294967295", "4294967296"), "Uid");
        assert_eq!(altered("5\t6\t7\t8", "5\t6\t7"), "Gid");
        assert_eq!(altered("4 24 27", "4 24 x"), "Groups");
        assert_eq!(altered("5/96365", "5"), "SigQ");
        assert_eq!(altered("SigBlk:\t0", "SigBlk:\tx"), "SigBlk");
        assert_eq!(altered("NoNewPrivs:\t1", "NoNewPrivs:\t2"), "NoNewPrivs");
        assert_eq!(altered("THP_enabled:\t1", "THP_enabled:\t"), "THP_enabled");
        assert_eq!(altered("untag_mask:\t0x", "untag_mask:\t"), "untag_mask");
        assert_eq!(altered("Cpus_allowed:", "Cpus_denied:"), "Cpus_allowed");
    }
}
