//! `/proc/PID/task/TID/children`: see proc_pid_task(5) and section 3.6 of Documentation/filesystems/proc.rst.
//!
//! The list is exact only while the children are stopped, and the file exists only on kernels with
//! `CONFIG_PROC_CHILDREN`; without it, look for the parent in everybody's `stat`.

use super::{File, Malformed};

const FILE: File = File("task/TID/children");

/// The children that this one thread has created or been given.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<u32>, Malformed> {
    FILE.decimals(text, "pid")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"412 413 70001 ";

    #[test]
    fn sample() {
        assert_eq!(parse(SAMPLE), Ok(vec![412, 413, 70001]));
        assert_eq!(parse(b""), Ok(vec![]));
    }

    #[test]
    fn malformed() {
        for text in [&b"1 x"[..], b"-1", b"4294967296", b"1,2"] {
            assert_eq!(parse(text), Err(FILE.malformed("pid")));
        }
    }
}
