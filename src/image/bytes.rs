//! Bytes in a record that people may want to read: names, paths, what a buffer held.

use std::fmt;
use std::ops::Deref;

use super::{Decode, Encode};

/// Encoded like the vector that it is; shown as text when it is text, and as the start of a hex dump otherwise.
#[derive(Encode, Decode, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 16;
        match std::str::from_utf8(&self.0) {
            Ok(text) if !text.contains('\0') => fmt::Debug::fmt(text, f),
            _ => {
                write!(f, "<{} bytes:", self.0.len())?;
                self.0.iter().take(SHOWN).try_for_each(|byte| write!(f, " {byte:02x}"))?;
                f.write_str(if self.0.len() > SHOWN { " ...>" } else { ">" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_shown_as_text() {
        assert_eq!(format!("{:?}", Bytes(b"/tmp/a \"b\"".to_vec())), r#""/tmp/a \"b\"""#);
        assert_eq!(format!("{:?}", Bytes(vec![0, 255])), "<2 bytes: 00 ff>");
        assert!(format!("{:?}", Bytes(vec![0; 17])).ends_with("00 ...>"));
    }
}
