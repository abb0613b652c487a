//! The manifest: what an image is, and exactly which files it consists of.
//!
//! It is written last and read first. File names carry the image's id, so that two images can be in one
//! directory while the second replaces the first; a manifest can name no file but its own.

use std::hash::{BuildHasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

use super::chain::ParentLink;
use super::{Decode, Encode, Kind, Owner, Record, SectionWriter, Sections, Tag};
use crate::Pid;
use crate::error::{Context, Error, ErrorKind, NameCall, Result};

/// Of the layout of an image as a whole.
const FORMAT: u32 = 1;

/// What the caller of [`super::ImageWriter::finish`] knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ManifestInfo {
    pub(crate) root: Pid,
}

/// What an image is good for.
///
/// ```no_run
/// # let image = cryosleep::inspect::Inspection::open("/var/lib/images/job")?;
/// if image.manifest().content == cryosleep::inspect::Content::Pages {
///     println!("a pre-dump");
/// }
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Encode, Decode, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// For being restored.
    #[default]
    Tree,
    /// For being the parent of one that is: a [pre-dump](crate::Checkpoint::pre_dump).
    Pages,
}

#[derive(Encode, Decode, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    /// Version of the library that wrote the image.
    pub(crate) library: String,
    pub(crate) id: [u8; 16],
    /// Seconds and nanoseconds since 1970.
    pub(crate) created: (u64, u32),
    pub(crate) arch: String,
    /// Release of the kernel that the tasks ran on.
    pub(crate) kernel: String,
    pub(crate) page_size: u32,
    /// Pid of the root of the tree, as the tree itself saw it.
    pub(crate) root: u32,
    pub(crate) content: Content,
    /// The image that this one only holds the changes of.
    pub(crate) parent: Option<ParentLink>,
    /// The state file, then the page segments in order.
    pub(crate) files: Vec<ListedFile>,
}

#[derive(Encode, Decode, Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedFile {
    pub(crate) name: String,
    pub(crate) length: u64,
    /// None for page segments: their bytes are only read when they are needed.
    pub(crate) crc32: Option<u32>,
}

impl Record for Manifest {
    const TAG: Tag = Tag::new(b"MNFS");
    const VERSION: u16 = 1;
    const NAME: &'static str = "manifest";
}

impl Manifest {
    pub(super) fn new(
        id: Id,
        info: ManifestInfo,
        (content, parent): (Content, Option<ParentLink>),
        files: Vec<ListedFile>,
    ) -> Result<Self> {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let kernel = nix::sys::utsname::uname().call("uname")?;
        Ok(Self {
            format: FORMAT,
            library: env!("CARGO_PKG_VERSION").into(),
            id: id.0,
            created: (created.as_secs(), created.subsec_nanos()),
            arch: std::env::consts::ARCH.into(),
            kernel: kernel.release().to_string_lossy().into_owned(),
            page_size: page_size()?,
            root: info.root.get(),
            content,
            parent,
            files,
        })
    }

    /// The manifest as the bytes of its file.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut writer = SectionWriter::new(Vec::new(), Kind::Manifest)?;
        writer.put_record(Owner::IMAGE, self)?;
        Ok(writer.into_inner())
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let sections = Sections::parse(bytes, Kind::Manifest)?;
        let section = sections.get(bytes, Self::TAG, Owner::IMAGE);
        let section = section.ok_or_else(|| malformed("the manifest is empty"))?;
        if sections.iter(bytes).count() != 1 {
            return Err(malformed("the manifest has more sections than one"));
        }
        let manifest: Self = section.record()?;
        manifest.check().about(|| super::sections::named::<Self>(Owner::IMAGE))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<()> {
        if self.format != FORMAT {
            let reason = format!("image format {}: this library reads format {FORMAT}", self.format);
            return Err(Error::new(ErrorKind::Image, reason));
        }
        if self.files.is_empty() {
            return Err(malformed("the manifest lists no state file"));
        }
        if self.files.iter().enumerate().any(|(at, file)| file.name != Id(self.id).file_name(at)) {
            return Err(malformed("the manifest lists a file that is not of its image"));
        }
        self.parent.as_ref().map_or(Ok(()), ParentLink::check)
    }
}

fn malformed(reason: &'static str) -> Error {
    Error::new(ErrorKind::Image, reason)
}

fn page_size() -> Result<u32> {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).call("sysconf")?;
    size.and_then(|size| u32::try_from(size).ok())
        .ok_or_else(|| Error::new(ErrorKind::Kernel, "the page size is unknown"))
}

/// What tells one image from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(pub(super) [u8; 16]);

impl Id {
    /// Unique rather than secret: the keys of std's hasher are random for each thread; time and pid keep
    /// apart what a forked or cloned host would repeat.
    pub(super) fn random() -> Self {
        let seed = (SystemTime::now(), std::process::id());
        let mut id = [0; 16];
        let (high, low) = id.split_at_mut(8);
        high.copy_from_slice(&RandomState::new().hash_one(seed).to_le_bytes());
        low.copy_from_slice(&RandomState::new().hash_one(seed).to_le_bytes());
        Self(id)
    }

    fn short(self) -> String {
        self.0.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The name of the file that the manifest lists at this place.
    pub(super) fn file_name(self, at: usize) -> String {
        match at.checked_sub(1) {
            None => format!("state-{}.img", self.short()),
            Some(segment) => format!("pages-{}-{segment}.img", self.short()),
        }
    }

    pub(super) fn manifest_draft(self) -> String {
        format!("manifest-{}.tmp", self.short())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Manifest {
        pub(crate) fn sample() -> Self {
            let id = Id([0xab; 16]);
            let file = |at, crc32| ListedFile { name: id.file_name(at), length: 40, crc32 };
            let info = ManifestInfo { root: Pid::from(412) };
            Manifest::new(
                id,
                info,
                (Content::Pages, Some(ParentLink::sample())),
                vec![file(0, Some(1)), file(1, None)],
            )
            .unwrap()
        }
    }

    fn refused(change: impl FnOnce(&mut Manifest)) -> String {
        let mut manifest = Manifest::sample();
        change(&mut manifest);
        let error = Manifest::from_bytes(&manifest.to_bytes().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image);
        error.to_string()
    }

    #[test]
    fn round_trip() {
        let bytes = Manifest::sample().to_bytes().unwrap();
        let read = Manifest::from_bytes(&bytes).unwrap();
        assert_eq!(read.to_bytes().unwrap(), bytes);
        assert_eq!((read.root, read.page_size), (412, 4096));
        assert_eq!(read.files[0].name, "state-abababab.img");
        assert_eq!(read.files[1].name, "pages-abababab-0.img");
    }

    #[test]
    fn names_no_file_but_its_own() {
        assert!(
            refused(|manifest| manifest.files[1].name = "../../etc/shadow".into())
                .contains("not of its image")
        );
        assert!(refused(|manifest| manifest.files.swap(0, 1)).contains("not of its image"));
        assert!(refused(|manifest| manifest.files.clear()).contains("no state file"));
        assert!(refused(|manifest| manifest.format = 2).contains("image format 2"));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_an_error() {
        let bytes = Manifest::sample().to_bytes().unwrap();
        for len in 0..bytes.len() {
            assert_eq!(Manifest::from_bytes(&bytes[..len]).unwrap_err().kind(), ErrorKind::Image);
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Manifest::from_bytes(&bytes).unwrap_err().kind(), ErrorKind::Image);
        }
    }

    #[test]
    fn ids_differ() {
        assert_ne!(Id::random(), Id::random());
    }
}
