//! How a record becomes bytes and back: the only file that names bincode.
//!
//! Integers are little endian and of fixed width, so that a record has exactly one encoding and that the
//! memory it takes is close to the bytes that encode it.

use bincode::config::{self, Config, Configuration, Fixint, Limit, LittleEndian};
use bincode::de::read::Reader;
use bincode::de::{Decoder, DecoderImpl};
use bincode::error::DecodeError;

use super::Record;
use crate::error::{Error, ErrorKind, Result};

pub(crate) use bincode::{Decode, Encode};

/// What decoding may allocate ahead of the bytes that justify it: `len * FACTOR + FLOOR`.
///
/// bincode reserves room for as many elements as a length field promises and takes it from a budget
/// first; this is that budget. A collection therefore decodes as long as an element takes no more memory
/// than `FACTOR` times the bytes that encode it (an enum whose short variants take 4 bytes can be 256
/// bytes large).
const FACTOR: usize = 64;
const FLOOR: usize = 4096;

/// The limit is a constant of the type; the budget is what is left of it after [`decode`] has claimed the rest.
const LIMIT: usize = usize::MAX;

type Format = Configuration<LittleEndian, Fixint, Limit<LIMIT>>;

const fn format() -> Format {
    config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<LIMIT>()
}

pub(crate) fn encode<R: Record>(record: &R) -> Result<Vec<u8>> {
    let bytes =
        bincode::encode_to_vec(record, format()).map_err(|error| malformed(R::NAME).with_source(error))?;
    // Whatever cannot be read must not be written. Tests run every kind of record through this.
    if cfg!(debug_assertions) {
        decode::<R>(&bytes)?;
    }
    Ok(bytes)
}

/// Reads one record that takes all of `bytes`.
pub(crate) fn decode<R: Record>(bytes: &[u8]) -> Result<R> {
    decode_all(bytes, format()).map_err(|error| malformed(R::NAME).with_source(error))?.ok_or_else(|| {
        let reason = format!("malformed record: {}: bytes follow its end", R::NAME);
        Error::new(ErrorKind::Image, reason)
    })
}

fn malformed(name: &str) -> Error {
    Error::new(ErrorKind::Image, format!("malformed record: {name}"))
}

/// `None`: the record was read but bytes remain.
fn decode_all<T: Decode<()>>(bytes: &[u8], format: impl Config) -> Result<Option<T>, DecodeError> {
    let budget = bytes.len().saturating_mul(FACTOR).saturating_add(FLOOR);
    let mut decoder = DecoderImpl::new(Input(bytes), format, ());
    decoder.claim_bytes_read(LIMIT.saturating_sub(budget))?;
    let value = T::decode(&mut decoder)?;
    Ok(decoder.reader().0.is_empty().then_some(value))
}

/// The bytes that are still to be read; bincode's own slice reader does not tell how many are left.
struct Input<'a>(&'a [u8]);

impl Reader for Input<'_> {
    #[inline]
    fn read(&mut self, bytes: &mut [u8]) -> Result<(), DecodeError> {
        let missing = bytes.len().saturating_sub(self.0.len());
        let (head, tail) =
            self.0.split_at_checked(bytes.len()).ok_or(DecodeError::UnexpectedEnd { additional: missing })?;
        bytes.copy_from_slice(head);
        self.0 = tail;
        Ok(())
    }

    #[inline]
    fn peek_read(&mut self, count: usize) -> Option<&[u8]> {
        self.0.get(..count)
    }

    #[inline]
    fn consume(&mut self, count: usize) {
        self.0 = self.0.get(count..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::*;
    use crate::image::Tag;

    #[derive(Encode, Decode, Debug, PartialEq)]
    enum Shape {
        Nothing,
        Wide([u64; 16]),
    }

    #[derive(Encode, Decode, Debug, PartialEq)]
    struct Sample {
        numbers: Vec<u64>,
        names: Vec<Vec<u8>>,
        shapes: Vec<Shape>,
        map: BTreeMap<u32, String>,
        maybe: Option<Box<[u8; 4]>>,
    }

    impl Record for Sample {
        const TAG: Tag = Tag::new(b"SMPL");
        const VERSION: u16 = 1;
        const NAME: &'static str = "sample";
    }

    fn sample() -> Sample {
        Sample {
            numbers: vec![1, u64::MAX],
            names: vec![b"/a\xff".to_vec(), Vec::new()],
            shapes: vec![Shape::Nothing, Shape::Wide([7; 16])],
            map: BTreeMap::from([(3, "three".into())]),
            maybe: Some(Box::new([1, 2, 3, 4])),
        }
    }

    macro_rules! records {
        ($($name:ident($inner:ty);)*) => { $(
            #[derive(Encode, Decode, Debug)]
            struct $name($inner);

            impl Record for $name {
                const TAG: Tag = Tag::new(b"TEST");
                const VERSION: u16 = 1;
                const NAME: &'static str = stringify!($name);
            }
        )* };
    }

    records! {
        Numbers(Vec<u64>);
        Bytes(Vec<u8>);
        Nested(Vec<Vec<Vec<u64>>>);
        Text(String);
        Table(HashMap<u64, [u64; 8]>);
        Shapes(Vec<Shape>);
    }

    #[test]
    fn round_trip() {
        let bytes = encode(&sample()).unwrap();
        assert_eq!(decode::<Sample>(&bytes).unwrap(), sample());
    }

    #[test]
    fn every_truncation_and_any_trailing_byte_is_an_error() {
        let mut bytes = encode(&sample()).unwrap();
        for len in 0..bytes.len() {
            assert_eq!(decode::<Sample>(&bytes[..len]).unwrap_err().kind(), ErrorKind::Image);
        }
        bytes.push(0);
        let error = decode::<Sample>(&bytes).unwrap_err();
        assert!(error.to_string().contains("bytes follow"), "{error}");
    }

    #[test]
    fn every_flipped_bit_is_survived() {
        let bytes = encode(&sample()).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let _ = decode::<Sample>(&bytes);
        }
    }

    fn refuses_length<R: Record>(len: u64) {
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend([0; 12]);
        let error = decode::<R>(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image);
        assert!(error.to_string().contains("LimitExceeded"), "{}: {error}", R::NAME);
    }

    #[test]
    fn hostile_lengths_are_refused_before_allocation() {
        for len in [u64::MAX, u64::MAX / 8 + 1, 1 << 60, 1 << 40, 20 * FACTOR as u64 + FLOOR as u64] {
            refuses_length::<Numbers>(len);
            refuses_length::<Bytes>(len);
            refuses_length::<Nested>(len);
            refuses_length::<Text>(len);
            refuses_length::<Table>(len);
            refuses_length::<Shapes>(len);
        }
    }

    #[test]
    fn the_budget_admits_what_encodes_small() {
        let bytes = encode(&Shapes((0..10_000).map(|_| Shape::Nothing).collect())).unwrap();
        assert_eq!(bytes.len(), 8 + 4 * 10_000);
        assert_eq!(decode::<Shapes>(&bytes).unwrap().0.len(), 10_000);
    }
}
