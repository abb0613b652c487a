//! The image: what a checkpoint writes and a restore reads.
//!
//! ```text
//! dir/manifest                what the image is, and which files it consists of; written last
//!     state-<id>.img          one container with a section for every record
//!     pages-<id>-<n>.img      page segment n: bare page contents, which records point into
//!
//! container   magic[8] version[4] kind[4]   then sections until the end
//! section     tag[4] version[2] 0[2] owner[4] length[8] crc32[4]   then the payload
//! ```
//!
//! An image may be the child of another one, in a directory of its own, whose page segments it shares: `chain`.
//!
//! All integers are little endian. A section holds one [`Record`], encoded by [`codec`]; its key is its
//! [`Tag`] and its [`Owner`]. Everything that is read is checked before it is used: lengths, checksums,
//! versions, duplicates; nothing that an image says can make the reader panic or allocate without bound.

mod bytes;
mod chain;
mod codec;
mod dir;
mod manifest;
mod publish;
mod sections;
mod segment;
mod store;
mod stream;

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

pub(crate) use bytes::Bytes;
pub(crate) use chain::ancestors;
pub(crate) use codec::{Decode, Encode, decode, encode};
pub use dir::Durability;
pub(crate) use dir::{Image, ImageWriter, Records, Written};
pub use manifest::Content;
pub(crate) use manifest::{ListedFile, Manifest, ManifestInfo};
pub(crate) use sections::{Kind, Section, SectionWriter, Sections};
#[cfg(test)]
pub(crate) use segment::page_sum;
pub(crate) use segment::{Chunks, PageFormat, SegmentWriter};
pub use store::{ImageSource, ImageStore, Part};
pub(crate) use store::{StoreWriter, feed};
pub use stream::Spool;
pub(crate) use stream::StreamStore;
#[cfg(any(test, fuzzing))]
pub(crate) use stream::unpack;

pub use segment::{Compression, PageChecksums};

/// Four ASCII characters that say what a section of an image holds. A tag is never used for anything else
/// again.
///
/// ```no_run
/// # let image = cryosleep::inspect::Inspection::open("/var/lib/images/job")?;
/// let maps = image.sections().filter(|section| section.tag().to_string() == "MMAP").count();
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag([u8; 4]);

impl Tag {
    pub(crate) const fn new(name: &[u8; 4]) -> Self {
        Self(*name)
    }

    /// The characters.
    pub const fn bytes(self) -> [u8; 4] {
        self.0
    }

    /// Is this a tag that any version could have written?
    fn is_plausible(self) -> bool {
        self.0.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ')
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.escape_ascii().fmt(f)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tag({self})")
    }
}

/// The object that a section belongs to: a tid, a tgid, or an object number in a space that the tag
/// defines. Tag and owner together are unique in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Owner(pub(crate) u32);

impl Owner {
    /// The owner of records that an image holds once.
    pub(crate) const IMAGE: Owner = Owner(0);
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an image is written to: a directory, or a store.
pub(crate) trait ImageSink {
    /// The next page segment. What becomes known of its chunks is to be among the records.
    fn segment(&mut self) -> Result<SegmentWriter>;

    /// May others write to the files of page segments, past us?
    fn lends_files(&self) -> bool;

    /// Writes the records, and makes it an image.
    fn finish(self: Box<Self>, records: Records, info: ManifestInfo) -> Result<Written>;
}

/// What one section holds.
///
/// A record is never recursive, and no element of its collections is a type without fields (such an
/// element takes no bytes, so that a hostile length would loop for ever).
pub(crate) trait Record: Encode + Decode<()> + fmt::Debug + 'static {
    const TAG: Tag;
    /// Raised whenever the encoding changes; starts at 1.
    const VERSION: u16;
    /// What messages call it.
    const NAME: &'static str;

    /// Reads the payload of an older version. Without it only the current version is read.
    fn upgrade(version: u16, _payload: &[u8]) -> Result<Self> {
        let reason =
            format!("version {version} of this record is too old: this library reads {}", Self::VERSION);
        Err(Error::new(ErrorKind::Image, reason))
    }
}
