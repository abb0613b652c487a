//! `/proc/PID/timers`: see proc_pid_timers(5). Needs `CONFIG_CHECKPOINT_RESTORE`.

use super::{File, Malformed, key_value, lines, split_once};

const FILE: File = File("timers");

/// A timer of timer_create(2). The file lists them with the newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PosixTimer {
    pub(crate) id: i32,
    /// `sigev_signo`.
    pub(crate) signal: i32,
    /// `sigev_value`, as the pointer that it may be.
    pub(crate) sigev_value: u64,
    pub(crate) notify: Notify,
    pub(crate) target: Target,
    /// The clock; negative for the processor time of a task.
    pub(crate) clock_id: i32,
}

/// How expiry is told: `sigev_notify` without `SIGEV_THREAD_ID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notify {
    Signal,
    None,
    Thread,
}

/// Who is told; 0 when the task is gone or not visible in the pid namespace of this /proc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Process(u32),
    /// With `SIGEV_THREAD_ID`.
    Thread(u32),
}

pub(crate) fn parse(text: &[u8]) -> Result<Vec<PosixTimer>, Malformed> {
    let mut timers = Vec::new();
    let mut lines = lines(text).peekable();
    while let Some(line) = lines.next() {
        let id = FILE.decimal(value(Some(line), b"ID"), "ID")?;
        let signal = value(lines.next(), b"signal").and_then(|signal| split_once(signal, b'/'));
        let (signal, sigev_value) = FILE.some(signal, "signal")?;
        let notify = FILE.some(value(lines.next(), b"notify").and_then(notification), "notify")?;
        timers.push(PosixTimer {
            id,
            signal: FILE.decimal(signal, "signal")?,
            sigev_value: FILE.hex(sigev_value, "signal")?,
            notify: notify.0,
            target: notify.1,
            clock_id: FILE.decimal(value(lines.next(), b"ClockID"), "ClockID")?,
        });
        // Lines that some later kernel may add to a timer.
        while lines.next_if(|line| !line.starts_with(b"ID:")).is_some() {}
    }
    Ok(timers)
}

fn value<'a>(line: Option<&'a [u8]>, key: &[u8]) -> Option<&'a [u8]> {
    key_value(line?).filter(|(found, _)| *found == key).map(|(_, value)| value)
}

/// `signal/tid.412`
fn notification(text: &[u8]) -> Option<(Notify, Target)> {
    let (notify, target) = split_once(text, b'/')?;
    let notify = match notify {
        b"signal" => Notify::Signal,
        b"none" => Notify::None,
        b"thread" => Notify::Thread,
        _ => return None,
    };
    let (kind, number) = split_once(target, b'.')?;
    let number = super::decimal(number)?;
    match kind {
        b"pid" => Some((notify, Target::Process(number))),
        b"tid" => Some((notify, Target::Thread(number))),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
ID: 3
signal: 14/0000000000000000
notify: signal/pid.4541
ClockID: -6
ID: 2
signal: 34/0000deadbeefcafe
notify: signal/tid.4541
ClockID: 1
ID: 1
signal: 0/0000000000000000
notify: none/pid.4541
ClockID: 0
";

    #[test]
    fn sample() {
        let timers = parse(SAMPLE).unwrap();
        assert_eq!(timers.iter().map(|timer| timer.id).collect::<Vec<_>>(), [3, 2, 1]);
        assert_eq!(timers[0].clock_id, -6);
        assert_eq!(
            timers[1],
            PosixTimer {
                id: 2,
                signal: 34,
                sigev_value: 0xdead_beef_cafe,
                notify: Notify::Signal,
                target: Target::Thread(4541),
                clock_id: 1,
            }
        );
        assert_eq!((timers[2].notify, timers[2].target), (Notify::None, Target::Process(4541)));
        assert_eq!(parse(b""), Ok(vec![]));
    }

    #[test]
    fn unknown_lines_are_skipped() {
        let text = b"ID: 1\nsignal: 1/0\nnotify: thread/pid.0\nClockID: 0\nNew: 1\nID: 0\nsignal: 1/0\nnotify: none/pid.0\nClockID: 0";
        assert_eq!(parse(text).unwrap().len(), 2);
    }

    #[test]
    fn malformed() {
        for (text, field) in [
            (&b"\n"[..], "ID"),
            (b"ID: x\n", "ID"),
            (b"ID: 1\n", "signal"),
            (b"ID: 1\nsignal: 1\n", "signal"),
            (b"ID: 1\nsignal: 1/0\nnotify: none\n", "notify"),
            (b"ID: 1\nsignal: 1/0\nnotify: none/uid.1\n", "notify"),
            (b"ID: 1\nsignal: 1/0\nnotify: none/pid.1\nClock: 1\n", "ClockID"),
        ] {
            assert_eq!(parse(text), Err(FILE.malformed(field)));
        }
    }
}
