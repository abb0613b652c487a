//! `/proc/PID/syscall`: see proc_pid_syscall(5).

use super::{File, Malformed, words};

const FILE: File = File("syscall");

/// Where a task is, as far as system calls go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SyscallState {
    /// On a processor: nothing can be said.
    Running,
    /// Blocked or stopped inside a system call.
    Blocked { nr: i64, args: [u64; 6], sp: u64, pc: u64 },
    /// Blocked or stopped, but not inside a system call (a page fault, an interrupt).
    NotInSyscall { sp: u64, pc: u64 },
}

pub(crate) fn parse(text: &[u8]) -> Result<SyscallState, Malformed> {
    let mut words = words(text);
    let first = words.next();
    if first == Some(b"running") {
        return Ok(SyscallState::Running);
    }
    let nr = FILE.decimal(first, "nr")?;
    // A tracer can make a task enter call -1; the kernel then prints no arguments, as for no call.
    let mut args = [0; 6];
    if nr != -1 {
        for arg in &mut args {
            *arg = FILE.prefixed_hex(words.next(), "arguments")?;
        }
    }
    let sp = FILE.prefixed_hex(words.next(), "sp")?;
    let pc = FILE.prefixed_hex(words.next(), "pc")?;
    Ok(if nr == -1 {
        SyscallState::NotInSyscall { sp, pc }
    } else {
        SyscallState::Blocked { nr, args, sp, pc }
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] =
        b"230 0x0 0x0 0x7ffe8b6e05a0 0x7ffe8b6e05e0 0x0 0x0 0x7ffe8b6e0588 0x7f687c8d8503\n";

    #[test]
    fn sample() {
        let args = [0, 0, 0x7ffe_8b6e_05a0, 0x7ffe_8b6e_05e0, 0, 0];
        let (sp, pc) = (0x7ffe_8b6e_0588, 0x7f68_7c8d_8503);
        assert_eq!(parse(SAMPLE), Ok(SyscallState::Blocked { nr: 230, args, sp, pc }));
        assert_eq!(parse(b"-1 0x7ff0 0x40\n"), Ok(SyscallState::NotInSyscall { sp: 0x7ff0, pc: 0x40 }));
        assert_eq!(parse(b"running\n"), Ok(SyscallState::Running));
    }

    #[test]
    fn malformed() {
        for (text, field) in [
            (&b""[..], "nr"),
            (b"walking", "nr"),
            (b"0 0x1 0x2", "arguments"),
            (b"0 0x1 2 0x3 0x4 0x5 0x6 0x7 0x8", "arguments"),
            (b"-1", "sp"),
            (b"-1 0x1 0x", "pc"),
        ] {
            assert_eq!(parse(text), Err(FILE.malformed(field)));
        }
    }
}
