//! `/proc/PID/sched`: see section 1 of Documentation/filesystems/proc.rst and
//! `proc_sched_show_task()`; there is no man page. Needs `CONFIG_SCHED_DEBUG` on kernels before 6.15.

use super::{File, Malformed, key_value, lines};

const FILE: File = File("sched");

/// What this library wants from the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sched {
    /// `se.exec_start`: when the task last got the processor (or was last accounted), in nanoseconds of
    /// its runqueue's clock. It differs between two readings if and only if the task has run.
    pub(crate) exec_start: u64,
}

pub(crate) fn parse(text: &[u8]) -> Result<Sched, Malformed> {
    // The heading has the task's name as it is, which may hold line ends and forge what follows; with
    // 15 bytes at most it cannot forge the rule below the heading.
    let is_rule = |line: &[u8]| line.len() > 16 && line.iter().all(|&byte| byte == b'-');
    let mut values = lines(text).skip_while(|line| !is_rule(line)).filter_map(key_value);
    let found = values.find(|(key, _)| key.trim_ascii_end() == b"se.exec_start");
    let exec_start = found.and_then(|(_, value)| nanoseconds(value));
    Ok(Sched { exec_start: FILE.some(exec_start, "se.exec_start")? })
}

/// Milliseconds with six decimals.
fn nanoseconds(text: &[u8]) -> Option<u64> {
    let (milliseconds, fraction) = super::split_once(text, b'.')?;
    if fraction.len() != 6 {
        return None;
    }
    let nanoseconds = super::unsigned(fraction, 10)?;
    super::unsigned(milliseconds, 10)?.checked_mul(1_000_000)?.checked_add(nanoseconds)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
cat (3146, #threads: 1)
-------------------------------------------------------------------
se.exec_start                                :        938252.448088
se.vruntime                                  :            89.032956
se.sum_exec_runtime                          :             0.216372
nr_switches                                  :                    1
";

    #[test]
    fn sample() {
        assert_eq!(parse(SAMPLE), Ok(Sched { exec_start: 938_252_448_088 }));
    }

    #[test]
    fn a_task_cannot_forge_it_by_its_name() {
        let text = [b"\nse.exec_start:", &SAMPLE[3..]].concat();
        assert_eq!(parse(&text), parse(SAMPLE));
    }

    #[test]
    fn malformed() {
        let rule = "-".repeat(67);
        for line in
            ["", "se.exec_start : 1", "se.exec_start : 1.5", "se.exec_start : -1.000000", "se.exec_start"]
        {
            let text = format!("x (1, #threads: 1)\n{rule}\n{line}\n");
            assert_eq!(parse(text.as_bytes()), Err(FILE.malformed("se.exec_start")), "{line}");
        }
    }
}
