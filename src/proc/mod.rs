//! Pure parsers of the /proc files for which the procfs crate does not do.
//!
//! Two reasons to have our own: names in these files are arbitrary bytes, which procfs holds in a
//! `String` (and so fails on, or alters), and a dump of a small process has to be over in two
//! milliseconds. Everything here works on the bytes of a file that was read whole, or on whole lines of a long one;
//! nothing does I/O, and no input can make it panic or allocate more than a small multiple of its own size.

use std::io::BufRead;

pub(crate) mod fdinfo;
pub(crate) mod limits;
pub(crate) mod mountinfo;
pub(crate) mod nameless;
pub(crate) mod read;
pub(crate) mod sched;
pub(crate) mod shm;
pub(crate) mod smaps;
pub(crate) mod stat;
pub(crate) mod status;
pub(crate) mod syscall;
pub(crate) mod timers;

/// A /proc file does not look the way the kernel writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("/proc/PID/{file}: missing or malformed {field}")]
pub(crate) struct Malformed {
    /// The file, as it is called below /proc/PID.
    pub(crate) file: &'static str,
    /// The field or line, by the name that the kernel gives it.
    pub(crate) field: &'static str,
}

/// A device number, split as the kernel prints it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// The file that a parser is for: reads its numbers, so that each failure names file and field.
#[derive(Clone, Copy)]
struct File(&'static str);

impl File {
    fn malformed(self, field: &'static str) -> Malformed {
        Malformed { file: self.0, field }
    }

    /// A field that has to be there.
    fn some<T>(self, value: Option<T>, field: &'static str) -> Result<T, Malformed> {
        value.ok_or(self.malformed(field))
    }

    fn decimal<'a, T: TryFrom<i128>>(
        self,
        text: impl Into<Option<&'a [u8]>>,
        field: &'static str,
    ) -> Result<T, Malformed> {
        self.some(text.into().and_then(decimal), field)
    }

    fn radix<'a, T: TryFrom<u64>>(
        self,
        text: impl Into<Option<&'a [u8]>>,
        radix: u8,
        field: &'static str,
    ) -> Result<T, Malformed> {
        self.some(text.into().and_then(|text| unsigned(text, radix)?.try_into().ok()), field)
    }

    /// Hexadecimal without a prefix.
    fn hex<'a, T: TryFrom<u64>>(
        self,
        text: impl Into<Option<&'a [u8]>>,
        field: &'static str,
    ) -> Result<T, Malformed> {
        self.radix(text, 16, field)
    }

    /// Hexadecimal with `0x` before it.
    fn prefixed_hex<'a>(
        self,
        text: impl Into<Option<&'a [u8]>>,
        field: &'static str,
    ) -> Result<u64, Malformed> {
        self.hex(text.into().and_then(|text| text.strip_prefix(b"0x")), field)
    }

    /// 0 or 1.
    fn flag(self, text: &[u8], field: &'static str) -> Result<bool, Malformed> {
        match text {
            b"0" => Ok(false),
            b"1" => Ok(true),
            _ => Err(self.malformed(field)),
        }
    }

    fn decimals<T: TryFrom<i128>>(self, text: &[u8], field: &'static str) -> Result<Vec<T>, Malformed> {
        words(text).map(|word| self.decimal(word, field)).collect()
    }

    /// `MAJOR:MINOR`; maps prints it in hexadecimal, mountinfo in decimal.
    fn device(self, text: Option<&[u8]>, radix: u8, field: &'static str) -> Result<Device, Malformed> {
        let (major, minor) = self.some(text.and_then(|text| split_once(text, b':')), field)?;
        Ok(Device { major: self.radix(major, radix, field)?, minor: self.radix(minor, radix, field)? })
    }
}

/// Digits and nothing else: no sign, no prefix, no blanks, no overflow.
fn unsigned(text: &[u8], radix: u8) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, &byte| {
        let digit = char::from(byte).to_digit(radix.into())?;
        value.checked_mul(radix.into())?.checked_add(digit.into())
    })
}

fn decimal<T: TryFrom<i128>>(text: &[u8]) -> Option<T> {
    let value = match text.strip_prefix(b"-") {
        Some(digits) => -i128::from(unsigned(digits, 10)?),
        None => unsigned(text, 10)?.into(),
    };
    value.try_into().ok()
}

/// The lines, without their ends; the end of the last one makes no further, empty line.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (line, after) = first_line(rest)?;
        rest = after;
        Some(line)
    })
}

/// The first line, without its end, and what follows it.
fn first_line(text: &[u8]) -> Option<(&[u8], &[u8])> {
    // The standard library has a fast search for a byte, and shows it in this place only.
    let mut after = text;
    let length = after.skip_until(b'\n').ok().filter(|&length| length > 0)?;
    let line = &text[..length];
    Some((line.strip_suffix(b"\n").unwrap_or(line), after))
}

/// What stands between blanks.
fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|&byte| byte == separator)?;
    Some((&text[..at], &text[at + 1..]))
}

/// `key: value`, the form of most lines; the blanks around the value are not part of it.
fn key_value(line: &[u8]) -> Option<(&[u8], &[u8])> {
    split_once(line, b':').map(|(key, value)| (key, value.trim_ascii()))
}

/// Undoes the `\ooo` escapes of seq_path() and mangle() for those bytes that the file escapes.
fn unescape_octal(text: &[u8], escaped: impl Fn(u8) -> bool) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| unsigned(digits, 8));
        match code.and_then(|code| u8::try_from(code).ok()).filter(|&byte| escaped(byte)) {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    plain
}

/// Feeds arbitrary bytes to the parser that the first byte picks; there is nothing to check but that
/// it comes back.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_all(data: &[u8]) {
    let Some((&pick, text)) = data.split_first() else { return };
    match pick % FUZZ_PARSERS {
        0 => drop(smaps::parse(text)),
        1 => drop(status::parse(text)),
        2 => drop(stat::parse(text)),
        3 => drop(syscall::parse(text)),
        4 => drop(sched::parse(text)),
        5 => drop(timers::parse(text)),
        6 => drop(fdinfo::parse(text)),
        7 => drop(limits::parse(text)),
        8 => drop(mountinfo::parse(text)),
        9 => nameless::fuzz(text),
        _ => drop(shm::parse(text)),
    }
}

/// How many parsers [`fuzz_all`] knows.
#[cfg(any(test, fuzzing))]
const FUZZ_PARSERS: u8 = 11;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_strict() {
        assert_eq!(unsigned(b"ffffffffffffffff", 16), Some(u64::MAX));
        assert_eq!(unsigned(b"18446744073709551616", 10), None);
        for text in [&b""[..], b"+1", b"-1", b" 1", b"1 ", b"0x1", b"8\xff"] {
            assert_eq!(unsigned(text, 10), None);
        }
        assert_eq!(decimal::<i32>(b"-2147483648"), Some(i32::MIN));
        assert_eq!(decimal::<i32>(b"2147483648"), None);
        assert_eq!(decimal::<u32>(b"-1"), None);
        assert_eq!(decimal::<i32>(b"--1"), None);
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape_octal(b"a\\012\\134\\01", |_| true), b"a\n\\\\01");
        assert_eq!(unescape_octal(b"a\\012\\134\\777", |byte| byte == b'\n'), b"a\n\\134\\777");
    }

    #[test]
    fn reads_like_a_sentence() {
        let error = stat::parse(b"1 (x").unwrap_err();
        assert_eq!(error.to_string(), "/proc/PID/stat: missing or malformed comm");
    }

    /// Every parser takes every torn, altered or foreign file without a panic.
    #[test]
    fn survives_damage() {
        let samples: [&[u8]; FUZZ_PARSERS as usize] = [
            smaps::tests::SAMPLE,
            status::tests::SAMPLE,
            stat::tests::SAMPLE,
            syscall::tests::SAMPLE,
            sched::tests::SAMPLE,
            timers::tests::SAMPLE,
            fdinfo::tests::SAMPLE,
            limits::tests::SAMPLE,
            mountinfo::tests::SAMPLE,
            nameless::tests::SAMPLE,
            shm::tests::SAMPLE,
        ];
        fuzz_all(b"");
        for sample in samples {
            for pick in 0..FUZZ_PARSERS {
                let mut data = vec![pick];
                data.extend_from_slice(sample);
                fuzz_all(&data);
            }
        }
        for (pick, sample) in (0..).zip(samples) {
            let mut data = vec![pick];
            data.extend_from_slice(sample);
            for at in 1..data.len() {
                fuzz_all(&data[..at]);
                for byte in [0, b' ', b'\n', b'9', b')', b':', b'-', b'\\', 0xff] {
                    let kept = std::mem::replace(&mut data[at], byte);
                    fuzz_all(&data);
                    data[at] = kept;
                }
            }
        }
    }
}
