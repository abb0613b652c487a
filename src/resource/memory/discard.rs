//! Giving memory back that nobody needs any more. The end of a process does that too, but on one processor.

use std::ops::Range;

use super::pages::divide;
use crate::error::Result;
use crate::proc::smaps::Mapping;
use crate::tracee::{Puppet, run_together, sys, with_hands};

/// Less is gone before another thread has been made.
const LARGE_KB: u64 = 64 * 1024;

/// Calls of one thread: what is left the end of the process does.
const CALLS: usize = 1024;

/// Makes a process that is about to be killed give back its large private memory, by several threads. From here on it
/// must not live longer than we do.
pub(crate) fn discard(speaker: &mut Puppet<'_>, mappings: &[Mapping], threads: usize) -> Result<()> {
    let large =
        mappings.iter().filter(|mapping| !mapping.shared && 4 * mapping.anonymous_kb >= size_kb(mapping));
    let ranges: Vec<Range<u64>> = large.clone().map(|mapping| mapping.start..mapping.end).collect();
    if threads < 2 || large.map(|mapping| mapping.anonymous_kb).sum::<u64>() < LARGE_KB {
        return Ok(());
    }
    with_hands(speaker, threads - 1, |writers| {
        writers.iter().try_for_each(|writer| writer.tracee().die_with_us())?;
        let parts = divide(&ranges, writers.len() as u64);
        let batches = writers.iter().zip(parts).map(|(writer, part)| {
            let mut batch = writer.batch();
            for range in part.into_iter().take(CALLS) {
                batch.call(sys::madvise, &[range.start, range.end - range.start, libc::MADV_DONTNEED as u64]);
            }
            batch
        });
        let batches: Vec<_> = batches.collect();
        // Locked memory does not go: that is as well.
        run_together(writers, batches).map(drop)
    })
}

fn size_kb(mapping: &Mapping) -> u64 {
    (mapping.end - mapping.start) / 1024
}
