//! `/proc/PID/stat` and `/proc/PID/task/TID/stat`: see proc_pid_stat(5).

use super::{File, Malformed, words};

const FILE: File = File("stat");

/// The fields of stat that matter here, by their names in proc_pid_stat(5).
///
/// Without ptrace access to the task the kernel prints 0 (1 for `start_code` and `end_code`) for the
/// addresses, for `wchan` and for `exit_code`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) pid: u32,
    /// The name: any 15 bytes but NUL.
    pub(crate) comm: Vec<u8>,
    pub(crate) state: char,
    pub(crate) ppid: u32,
    /// 0 when the group's leader is outside the pid namespace of this /proc, -1 for a task that is gone.
    pub(crate) pgrp: i32,
    /// Like `pgrp`.
    pub(crate) session: i32,
    /// The controlling terminal as a device number of stat(2), 0 for none.
    pub(crate) tty_nr: i32,
    /// The foreground process group of the controlling terminal, -1 for none.
    pub(crate) tpgid: i32,
    /// `PF_*`
    pub(crate) flags: u32,
    /// In clock ticks, like all times here.
    pub(crate) utime: u64,
    pub(crate) stime: u64,
    pub(crate) priority: i32,
    pub(crate) nice: i32,
    pub(crate) num_threads: u32,
    /// Since boot, of the time namespace of the reader.
    pub(crate) starttime: u64,
    /// In pages, and not exact.
    pub(crate) rss: u64,
    pub(crate) start_code: u64,
    pub(crate) end_code: u64,
    pub(crate) start_stack: u64,
    /// 1 for a task that does not run.
    pub(crate) wchan: u64,
    /// -1 for a thread that is no leader.
    pub(crate) exit_signal: i32,
    pub(crate) processor: i32,
    pub(crate) rt_priority: u32,
    pub(crate) policy: u32,
    pub(crate) start_data: u64,
    pub(crate) end_data: u64,
    pub(crate) start_brk: u64,
    pub(crate) arg_start: u64,
    pub(crate) arg_end: u64,
    pub(crate) env_start: u64,
    pub(crate) env_end: u64,
    /// As of wait(2).
    pub(crate) exit_code: i32,
}

pub(crate) fn parse(text: &[u8]) -> Result<Stat, Malformed> {
    // The name is not escaped: it may hold parentheses, but nothing after it does.
    let (pid, rest) = FILE.some(super::split_once(text, b'('), "comm")?;
    let end = FILE.some(rest.iter().rposition(|&byte| byte == b')'), "comm")?;
    let mut fields = Fields { words: words(&rest[end + 1..]) };
    let Some(&[state]) = fields.words.next() else { return Err(FILE.malformed("state")) };
    // Struct expressions are evaluated in the order written, which here is the order of the file.
    Ok(Stat {
        pid: FILE.decimal(pid.trim_ascii(), "pid")?,
        comm: rest[..end].to_vec(),
        state: state.into(),
        ppid: fields.next("ppid")?,
        pgrp: fields.next("pgrp")?,
        session: fields.next("session")?,
        tty_nr: fields.next("tty_nr")?,
        tpgid: fields.next("tpgid")?,
        flags: fields.next("flags")?,
        utime: fields.after(4, "utime")?, // minflt cminflt majflt cmajflt
        stime: fields.next("stime")?,
        priority: fields.after(2, "priority")?, // cutime cstime
        nice: fields.next("nice")?,
        num_threads: fields.next("num_threads")?,
        starttime: fields.after(1, "starttime")?,  // itrealvalue
        rss: fields.after(1, "rss")?,              // vsize
        start_code: fields.after(1, "startcode")?, // rsslim
        end_code: fields.next("endcode")?,
        start_stack: fields.next("startstack")?,
        wchan: fields.after(6, "wchan")?, // kstkesp kstkeip signal blocked sigignore sigcatch
        exit_signal: fields.after(2, "exit_signal")?, // nswap cnswap
        processor: fields.next("processor")?,
        rt_priority: fields.next("rt_priority")?,
        policy: fields.next("policy")?,
        start_data: fields.after(3, "start_data")?, // delayacct_blkio_ticks guest_time cguest_time
        end_data: fields.next("end_data")?,
        start_brk: fields.next("start_brk")?,
        arg_start: fields.next("arg_start")?,
        arg_end: fields.next("arg_end")?,
        env_start: fields.next("env_start")?,
        env_end: fields.next("env_end")?,
        exit_code: fields.next("exit_code")?,
    })
}

struct Fields<W> {
    words: W,
}

impl<'a, W: Iterator<Item = &'a [u8]>> Fields<W> {
    fn next<T: TryFrom<i128>>(&mut self, field: &'static str) -> Result<T, Malformed> {
        self.after(0, field)
    }

    fn after<T: TryFrom<i128>>(&mut self, skipped: usize, field: &'static str) -> Result<T, Malformed> {
        FILE.decimal(self.words.nth(skipped), field)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A process that calls itself `a) R\n\ (\xffx`.
    pub(in crate::proc) const SAMPLE: &[u8] = b"4541 (a) R\n\\ (\xffx) R 4540 4539 2641 0 -1 4194304 3230 6543 22 2 4 3 5 0 20 0 1 0 111127 19177472 3802 18446744073709551615 93911216484352 93911216484693 140734004803760 0 0 0 0 16781312 2 0 0 0 17 1 0 0 0 0 0 93911216496048 93911216496664 93911854272512 140734004807932 140734004807978 140734004807978 140734004809679 0\n";
    const ZOMBIE: &[u8] = b"4582 (sleep) Z 4541 4540 2641 0 -1 4228108 77 0 1 0 0 0 0 0 20 0 1 0 111142 0 0 18446744073709551615 0 0 0 0 0 0 0 0 0 1 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 9\n";

    #[test]
    fn sample() {
        let expected = Stat {
            pid: 4541,
            comm: b"a) R\n\\ (\xffx".to_vec(),
            state: 'R',
            ppid: 4540,
            pgrp: 4539,
            session: 2641,
            tty_nr: 0,
            tpgid: -1,
            flags: 0x0040_0000,
            utime: 4,
            stime: 3,
            priority: 20,
            nice: 0,
            num_threads: 1,
            starttime: 111127,
            rss: 3802,
            start_code: 93911216484352,
            end_code: 93911216484693,
            start_stack: 140734004803760,
            wchan: 0,
            exit_signal: 17,
            processor: 1,
            rt_priority: 0,
            policy: 0,
            start_data: 93911216496048,
            end_data: 93911216496664,
            start_brk: 93911854272512,
            arg_start: 140734004807932,
            arg_end: 140734004807978,
            env_start: 140734004807978,
            env_end: 140734004809679,
            exit_code: 0,
        };
        assert_eq!(parse(SAMPLE), Ok(expected));
    }

    #[test]
    fn zombie() {
        let stat = parse(ZOMBIE).unwrap();
        assert_eq!((stat.state, stat.exit_code, stat.exit_signal, stat.start_code), ('Z', 9, 17, 0));
    }

    #[test]
    fn malformed() {
        for (text, field) in [
            (&b""[..], "comm"),
            (b"1 x", "comm"),
            (b"1 (x", "comm"),
            (b"1 )x(", "comm"),
            (b"1 (x)", "state"),
            (b"1 (x) RS 1", "state"),
            (b"x (x) R 1", "pid"),
            (b"1 (x) R -1", "ppid"),
            (b"1 (x) R 1 2 3 4 5 6 7", "utime"),
        ] {
            assert_eq!(parse(text), Err(FILE.malformed(field)));
        }
        let torn = ZOMBIE.len() - 2;
        assert_eq!(parse(&ZOMBIE[..torn]), Err(FILE.malformed("exit_code")));
    }

    #[test]
    fn own() {
        let stat = parse(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(stat.pid, std::process::id());
    }
}
