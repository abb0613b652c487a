//! What the linker calls a program or a library: the note NT_GNU_BUILD_ID of an ELF file, elf(5). Two builds of one
//! program differ in it, even if they are of the same size and age.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Of a 64-bit file that has one. Any file may be asked.
pub(super) fn of(file: &File) -> std::io::Result<Option<Vec<u8>>> {
    find(|offset, length| {
        let mut bytes = vec![0; length];
        match file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    })
}

/// `read` gives bytes of the file, unless it ends before.
fn find<E>(read: impl Fn(u64, usize) -> Result<Option<Vec<u8>>, E>) -> Result<Option<Vec<u8>>, E> {
    const HEADER: usize = 64;
    /// A program header.
    const ENTRY: usize = 56;
    const MOST: u64 = 512;
    const PT_NOTE: u64 = 4;
    const LONGEST: u64 = 1 << 16;
    let Some(header) = read(0, HEADER)? else { return Ok(None) };
    let entries = number::<2>(&header, 56).unwrap_or(0);
    // 64 bits, little endian, entries as we know them.
    let known = header.starts_with(b"\x7fELF\x02\x01") && number::<2>(&header, 54) == Some(ENTRY as u64);
    if !known || entries > MOST {
        return Ok(None);
    }
    let start = number::<8>(&header, 32).unwrap_or(0);
    for index in 0..entries {
        let Some(offset) = start.checked_add(index * ENTRY as u64) else { break };
        let Some(entry) = read(offset, ENTRY)? else { break };
        let (at, length) = (number::<8>(&entry, 8).unwrap_or(0), number::<8>(&entry, 32).unwrap_or(0));
        if number::<4>(&entry, 0) != Some(PT_NOTE) || length > LONGEST {
            continue;
        }
        let Some(notes) = read(at, length as usize)? else { continue };
        if let Some(found) = in_notes(&notes) {
            return Ok(Some(found.to_vec()));
        }
    }
    Ok(None)
}

fn in_notes(mut notes: &[u8]) -> Option<&[u8]> {
    const NT_GNU_BUILD_ID: u64 = 3;
    loop {
        let length = |at| usize::try_from(number::<4>(notes, at)?).ok();
        let (name, description) = (length(0)?, length(4)?);
        let kind = number::<4>(notes, 8)?;
        let start = 12usize.checked_add(name.checked_next_multiple_of(4)?)?;
        let end = start.checked_add(description)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..)?.starts_with(b"GNU\0") && name == 4 {
            return notes.get(start..end).filter(|id| !id.is_empty());
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
}

/// A little-endian number of so many bytes.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.get(..N)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_bytes(bytes: &[u8]) -> Option<Vec<u8>> {
        let part = |at: u64, length: usize| bytes.get(at as usize..)?.get(..length).map(<[u8]>::to_vec);
        find(|at, length| Ok::<_, ()>(part(at, length))).unwrap()
    }

    /// One entry, whose notes are a foreign one and the id.
    fn sample() -> Vec<u8> {
        let mut file = vec![0; 120];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 4;
        file[72] = 120;
        let note = |kind: u8, name: &[u8], text: &[u8]| {
            let head = [name.len() as u8, 0, 0, 0, text.len() as u8, 0, 0, 0, kind, 0, 0, 0];
            let mut note = [&head[..], name].concat();
            note.resize(note.len().next_multiple_of(4), 0);
            note.extend(text);
            note.resize(note.len().next_multiple_of(4), 0);
            note
        };
        let notes = [note(1, b"other\0", b"xyz"), note(3, b"GNU\0", b"the id")].concat();
        file[96] = notes.len() as u8;
        [file, notes].concat()
    }

    #[test]
    fn it_is_found() {
        assert_eq!(of_bytes(&sample()).unwrap(), b"the id");
        assert_eq!(of_bytes(b"#!/bin/sh"), None);
    }

    /// Torn and altered files are files without one.
    #[test]
    fn any_bytes_will_do() {
        let sample = sample();
        for at in 0..sample.len() {
            let _ = of_bytes(&sample[..at]);
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut altered = sample.clone();
                altered[at] = byte;
                let _ = of_bytes(&altered);
            }
        }
    }
}
