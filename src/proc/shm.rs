//! `/proc/sysvipc/shm`: see proc_sysvipc(5). All segments of the namespace, whoever may use them.

use super::{File, Malformed, lines, words};

const FILE: File = File("sysvipc/shm");

/// What this library wants from a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shm {
    pub(crate) key: i32,
    pub(crate) id: i32,
    /// The process that made it.
    pub(crate) maker: u32,
    /// By how many mappings it is attached.
    pub(crate) attached: u64,
    /// When it was made or last given away, in seconds of the real-time clock.
    pub(crate) changed: u64,
}

pub(crate) fn parse(text: &[u8]) -> Result<Vec<Shm>, Malformed> {
    // The first line has the names of the fields.
    lines(text).skip(1).map(segment).collect()
}

fn segment(line: &[u8]) -> Result<Shm, Malformed> {
    let fields: Vec<&[u8]> = words(line).collect();
    let field = |index: usize| fields.get(index).copied();
    Ok(Shm {
        key: FILE.decimal(field(0), "key")?,
        id: FILE.decimal(field(1), "shmid")?,
        maker: FILE.decimal(field(4), "cpid")?,
        attached: FILE.decimal(field(6), "nattch")?,
        changed: FILE.decimal(field(13), "ctime")?,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::proc) const SAMPLE: &[u8] = b"\
       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      \
ctime                   rss                  swap
     24301          3  1640                 65436  4711  4712      2  1234  5678     0     0 1763787600          0 \
1763787601                 61440                     0
-1879048192          5   600                  4096    12    13      0     0     0     0     0          0          0 \
1763787602                     0                     0
";

    #[test]
    fn sample() {
        let segments = parse(SAMPLE).unwrap();
        assert_eq!(segments[0], Shm { key: 24301, id: 3, maker: 4711, attached: 2, changed: 1763787601 });
        assert_eq!((segments[1].key, segments[1].id, segments[1].attached), (-1879048192, 5, 0));
        assert_eq!(segments.len(), 2);
        assert!(parse(b"key shmid\n1 2 3\n").unwrap_err().to_string().contains("cpid"));
    }
}
