//! `/proc/PID/limits`: see proc_pid_limits(5) and getrlimit(2).

use super::{File, Malformed, lines, words};

const FILE: File = File("limits");

/// What the kernel calls each limit in this file, by `RLIMIT_*` number (`lnames` in fs/proc/base.c).
const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// One resource limit; `u64::MAX` (`RLIM_INFINITY`) for unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// All limits, by `RLIMIT_*` number. Lines that are not about one of them are skipped.
pub(crate) fn parse(text: &[u8]) -> Result<[Limit; 16], Malformed> {
    let mut limits = [None; 16];
    for line in lines(text) {
        for (name, limit) in NAMES.iter().zip(&mut limits) {
            if let Some(values) = line.strip_prefix(name.as_bytes()).filter(|rest| rest.starts_with(b" ")) {
                let mut values = words(values);
                let mut value = || match values.next() {
                    Some(b"unlimited") => Ok(u64::MAX),
                    number => FILE.decimal(number, name),
                };
                *limit = Some(Limit { soft: value()?, hard: value()? });
                break;
            }
        }
    }
    let mut complete = [Limit::default(); 16];
    for ((name, limit), complete) in NAMES.into_iter().zip(limits).zip(&mut complete) {
        *complete = FILE.some(limit, name)?;
    }
    Ok(complete)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max file size             unlimited            unlimited            bytes     
Max data size             unlimited            unlimited            bytes     
Max stack size            8388608              unlimited            bytes     
Max core file size        0                    unlimited            bytes     
Max resident set          unlimited            unlimited            bytes     
Max processes             96365                96365                processes 
Max open files            20000                20001                files     
Max locked memory         8388608              8388608              bytes     
Max address space         unlimited            unlimited            bytes     
Max file locks            unlimited            unlimited            locks     
Max pending signals       96365                96365                signals   
Max msgqueue size         819200               819200               bytes     
Max nice priority         0                    0                    
Max realtime priority     0                    0                    
Max realtime timeout      unlimited            unlimited            us        
";

    #[test]
    fn sample() {
        let limits = parse(SAMPLE).unwrap();
        assert_eq!(limits[0], Limit { soft: u64::MAX, hard: u64::MAX });
        assert_eq!(limits[3], Limit { soft: 8 << 20, hard: u64::MAX });
        assert_eq!(limits[7], Limit { soft: 20000, hard: 20001 });
        assert_eq!(limits[13], Limit { soft: 0, hard: 0 });
        assert_eq!(limits[15], Limit { soft: u64::MAX, hard: u64::MAX });
    }

    #[test]
    fn malformed() {
        assert_eq!(parse(b""), Err(FILE.malformed("Max cpu time")));
        assert_eq!(parse(b"Max cpu time 1\n"), Err(FILE.malformed("Max cpu time")));
        assert_eq!(parse(b"Max open files 1 some files\n"), Err(FILE.malformed("Max open files")));
        let torn = SAMPLE.len() - 80;
        assert_eq!(parse(&SAMPLE[..torn]), Err(FILE.malformed("Max realtime timeout")));
    }
}
