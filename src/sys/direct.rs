//! Files that are written past the page cache (O_DIRECT): what has to be on the disk in the end gets there faster.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::PAGE;

/// From now on the file is written past the page cache, if its file system can do that.
pub(crate) fn bypass_cache(file: &File) {
    let _ = set(file, true);
}

fn set(file: &File, direct: bool) -> nix::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags)).map(drop)
}

/// Writes all of it. Past the cache only what is aligned can be written: should something not be, the file goes
/// through the cache again.
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    match file.write_all_at(bytes, offset) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            set(file, false)?;
            file.write_all_at(bytes, offset)
        }
        written => written,
    }
}

/// A buffer that begins where a page does.
#[derive(Debug, Default)]
pub(crate) struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl PageBuffer {
    /// So many bytes of it; what is in them is of no use.
    pub(crate) fn take(&mut self, len: usize) -> &mut [u8] {
        let page = PAGE as usize;
        if self.bytes.len() < len + page {
            self.bytes = vec![0; len + page];
            self.start = self.bytes.as_ptr().align_offset(page).min(page);
        }
        self.bytes.get_mut(self.start..self.start + len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_at_a_page() {
        let mut buffer = PageBuffer::default();
        for len in [1, 4096, 100_000, 5, 100_001] {
            let taken = buffer.take(len);
            assert_eq!((taken.len(), taken.as_ptr() as usize % 4096), (len, 0));
        }
    }

    #[test]
    fn what_is_not_aligned_is_written_all_the_same() {
        let path = std::env::temp_dir().join(format!("cryosleep-direct-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        bypass_cache(&file);
        let mut buffer = PageBuffer::default();
        buffer.take(8192).fill(7);
        write_all_at(&file, buffer.take(8192), 0).unwrap();
        write_all_at(&file, b"three", 8192).unwrap();
        let mut read = vec![0; 8197];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read[..8192].iter().all(|byte| *byte == 7) && read.ends_with(b"three"));
    }
}
