//! Another task's memory: fast for what it may touch itself, and whatever the protection for the rest.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};

use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Result, Subject};

/// A view of one task's address space.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    pid: Pid,
    mem: Arc<File>,
}

/// One piece of a vectored transfer: the address in the task, and our bytes.
pub(crate) type Transfer<'a> = (u64, &'a [u8]);

/// How many pieces the kernel takes in one call (UIO_MAXIOV).
const PIECES: usize = 1024;

impl Memory {
    /// Opens `/proc/PID/mem` of a task that the calling thread traces.
    pub(crate) fn open(pid: Pid) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let mem = OpenOptions::new().read(true).write(true).open(&path);
        let mem = Arc::new(mem.call("open").about(|| Subject::Path(path.into())).of(pid)?);
        Ok(Self { pid, mem })
    }

    /// Reads what the task itself could read; falls back to `/proc/PID/mem` for what it could not.
    pub(crate) fn read(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        let remote = [RemoteIoVec { base: addr as usize, len: into.len() }];
        match process_vm_readv(self.pid.nix(), &mut [IoSliceMut::new(into)], &remote) {
            Ok(got) if got == into.len() => Ok(()),
            _ => self.read_protected(addr, into),
        }
    }

    /// Reads pages whatever their protection.
    pub(crate) fn read_protected(&self, addr: u64, into: &mut [u8]) -> Result<()> {
        self.mem
            .read_exact_at(into, addr)
            .call("pread(/proc/PID/mem)")
            .map_err(|e| self.at(e, addr, into.len()))
    }

    pub(crate) fn read_vec(&self, addr: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read(addr, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads several ranges into one buffer, back to back.
    pub(crate) fn read_ranges(&self, ranges: &[Range<u64>], into: &mut [u8]) -> Result<()> {
        let mut at = 0;
        for chunk in ranges.chunks(PIECES) {
            let len = chunk.iter().map(|range| (range.end - range.start) as usize).sum::<usize>();
            let Some(buffer) = into.get_mut(at..at + len) else {
                return Err(Error::new(ErrorKind::Kernel, "buffer shorter than its ranges").of(self.pid));
            };
            let remote: Vec<_> = chunk
                .iter()
                .map(|range| RemoteIoVec {
                    base: range.start as usize,
                    len: (range.end - range.start) as usize,
                })
                .collect();
            let got = process_vm_readv(self.pid.nix(), &mut [IoSliceMut::new(buffer)], &remote);
            if got != Ok(len) {
                self.read_one_by_one(chunk, buffer)?;
            }
            at += len;
        }
        Ok(())
    }

    fn read_one_by_one(&self, ranges: &[Range<u64>], mut into: &mut [u8]) -> Result<()> {
        for range in ranges {
            let (head, rest) = into.split_at_mut((range.end - range.start) as usize);
            self.read(range.start, head)?;
            into = rest;
        }
        Ok(())
    }

    /// The same for pages that others may share (copy-on-write), which process_vm_readv(2) would make copies of.
    pub(crate) fn read_shared_ranges(&self, ranges: &[Range<u64>], mut into: &mut [u8]) -> Result<()> {
        for range in ranges {
            let (head, rest) = into.split_at_mut((range.end - range.start) as usize);
            self.read_protected(range.start, head)?;
            into = rest;
        }
        Ok(())
    }

    /// Writes to writable memory, several places in one call where that is possible.
    pub(crate) fn write_all(&self, pieces: &[Transfer<'_>]) -> Result<()> {
        for chunk in pieces.chunks(PIECES) {
            let local: Vec<_> = chunk.iter().map(|(_, bytes)| IoSlice::new(bytes)).collect();
            let remote: Vec<_> = chunk
                .iter()
                .map(|(addr, bytes)| RemoteIoVec { base: *addr as usize, len: bytes.len() })
                .collect();
            let len = chunk.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
            if process_vm_writev(self.pid.nix(), &local, &remote) != Ok(len) {
                chunk.iter().try_for_each(|(addr, bytes)| self.write(*addr, bytes))?;
            }
        }
        Ok(())
    }

    /// Writes whatever the protection (private pages become the task's own).
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        self.mem
            .write_all_at(bytes, addr)
            .call("pwrite(/proc/PID/mem)")
            .map_err(|e| self.at(e, addr, bytes.len()))
    }

    fn at(&self, error: Error, addr: u64, len: usize) -> Error {
        error.of(self.pid).about(Subject::Vma { start: addr, end: addr + len as u64, what: String::new() })
    }
}
