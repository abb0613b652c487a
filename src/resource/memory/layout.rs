//! The addresses that the kernel keeps about an address space: PR_SET_MM_MAP in prctl(2).

use crate::error::Result;
use crate::freeze::Process;
use crate::image::{Bytes, Decode, Encode};
use crate::proc::read;
use crate::tracee::{Batch, sys};

/// Where code, data, brk heap, stack, arguments and environment are, and the auxiliary vector.
#[derive(Encode, Decode, Debug)]
pub(crate) struct Layout {
    /// The first eleven members of `struct prctl_mm_map`.
    addresses: [u64; 11],
    auxv: Bytes,
}

impl Layout {
    pub(crate) fn describe(process: &Process, brk: u64) -> Result<Self> {
        let s = &process.stat;
        let addresses = [
            s.start_code,
            s.end_code,
            s.start_data,
            s.end_data,
            s.start_brk,
            brk,
            s.start_stack,
            s.arg_start,
            s.arg_end,
            s.env_start,
            s.env_end,
        ];
        Ok(Self { addresses, auxv: read::bytes(process.speaker(), "auxv")?.into() })
    }

    /// Queues the call; `executable` is the number of a descriptor in the task, None if that is right already.
    pub(crate) fn build(&self, executable: Option<i32>, batch: &mut Batch) {
        let executable = executable.unwrap_or(-1);
        let auxv = batch.input(&self.auxv);
        let mut map = self.addresses.to_vec();
        // auxv_size and exe_fd share the last word.
        map.extend([auxv, self.auxv.len() as u64 | u64::from(executable as u32) << 32]);
        let size = (map.len() * 8) as u64;
        let map = batch.input_words(&map);
        batch.call(sys::prctl, &[libc::PR_SET_MM as u64, libc::PR_SET_MM_MAP as u64, map, size, 0]);
    }
}
