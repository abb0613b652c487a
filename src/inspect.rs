//! What is in an image: for people who wonder, and for tools.
//!
//! An [`Inspection`] opens and verifies an image as a restore does, but builds nothing: it needs no privilege
//! beyond reading the files.
//!
//! ```no_run
//! use cryosleep::inspect::Inspection;
//!
//! let image = Inspection::open("/var/lib/images/job")?;
//! println!("written by version {}", image.manifest().library);
//! for process in image.processes()? {
//!     println!("process {}, child of {}, {} threads", process.pid, process.parent, process.threads.len());
//! }
//! for section in image.sections() {
//!     println!("{} {}: {} bytes", section.tag(), section.owner(), section.len());
//! }
//! # Ok::<(), cryosleep::Error>(())
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Pid;
use crate::error::{Context, Error, ErrorKind, Phase, Result, Subject};
use crate::image::{self, Image, Owner, ancestors};
use crate::resource::tasks::tree::{self, Tree};
use crate::resource::{RecordKind, all_records};

pub use crate::image::{Content, Tag};

/// An image, open for being looked at.
///
/// ```
/// use cryosleep::{ErrorKind, inspect::Inspection};
/// assert_eq!(Inspection::open("/nonexistent").unwrap_err().kind(), ErrorKind::Image);
/// ```
#[derive(Debug)]
pub struct Inspection {
    image: Image,
    manifest: Manifest,
    parents: Vec<Parent>,
}

impl Inspection {
    /// Opens the image in a directory and verifies everything but the contents of its pages.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] for an image that is not whole, or that others than its owner could have changed.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let image = Image::open(dir.as_ref()).in_phase(Phase::Read)?;
        let manifest = Manifest::of(image.manifest()).in_phase(Phase::Read)?;
        let parents = ancestors(&image).skip(1).map(|parent| {
            Ok(Parent { dir: parent.path()?.into(), manifest: Manifest::of(parent.manifest())? })
        });
        let parents = parents.collect::<Result<_>>().in_phase(Phase::Read)?;
        Ok(Self { image, manifest, parents })
    }

    /// What the image is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The images that this one is a child of ([`Checkpoint::parent`](crate::Checkpoint::parent)), the nearest first.
    pub fn parents(&self) -> &[Parent] {
        &self.parents
    }

    /// The process tree: parents before their children, the root first.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] when the record of the tree is missing, contradicts itself, or is of a newer version.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let tree = self.image.require::<Tree>(Owner::IMAGE).in_phase(Phase::Read)?;
        tree.plan().in_phase(Phase::Read)?;
        Ok(tree.processes.iter().map(Process::of).collect())
    }

    /// All sections, by tag and owner.
    pub fn sections(&self) -> impl Iterator<Item = Section<'_>> {
        let kinds: Vec<RecordKind> = all_records().collect();
        self.image.sections().map(move |section| {
            let kind = kinds.iter().copied().find(|kind| kind.tag == section.tag);
            Section { section, kind }
        })
    }

    /// Reads and verifies the contents of all pages, as far as the image has checksums of them
    /// ([`PageChecksums`](crate::PageChecksums)) or has compressed them.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] with the place of the first damage.
    pub fn verify_pages(&self) -> Result<()> {
        let mut segments = self.image.manifest().files.iter().skip(1).zip(0..);
        segments.try_for_each(|(_, index)| self.image.segment(index)?.verify()).in_phase(Phase::Read)
    }

    /// The files that hold the contents of pages.
    pub fn segments(&self) -> impl Iterator<Item = Segment> {
        let files = self.image.manifest().files.iter().skip(1);
        files.zip(0..).map(|(file, index)| {
            let contents = self.image.segment(index).map_or(0, |segment| segment.length());
            Segment { index, file: file.name.clone(), len: file.length, contents }
        })
    }
}

/// An image that others are children of.
///
/// ```no_run
/// let image = cryosleep::inspect::Inspection::open("/var/lib/images/job")?;
/// for parent in image.parents() {
///     println!("{}, made at {:?}", parent.dir.display(), parent.manifest.created);
/// }
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Parent {
    /// Where it was found.
    pub dir: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// What the manifest of an image says.
///
/// ```no_run
/// let image = cryosleep::inspect::Inspection::open("/var/lib/images/job")?;
/// let manifest = image.manifest();
/// println!("pid {} of kernel {}, at {:?}", manifest.root, manifest.kernel, manifest.created);
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Manifest {
    /// Number of the layout of the image as a whole.
    pub format: u32,
    /// What tells this image from all others.
    pub id: [u8; 16],
    /// Version of the library that wrote it.
    pub library: String,
    /// When.
    pub created: SystemTime,
    /// Processor architecture, as in [`std::env::consts::ARCH`].
    pub arch: String,
    /// Release of the kernel that the tasks ran on, as `uname -r` shows it.
    pub kernel: String,
    /// In bytes.
    pub page_size: u32,
    /// The root of the tree, as the tree itself knows it.
    pub root: Pid,
    /// What it is good for.
    pub content: Content,
    /// Length of the file that holds the sections, in bytes.
    pub state_len: u64,
}

impl Manifest {
    fn of(manifest: &image::Manifest) -> Result<Self> {
        let (secs, nanos) = manifest.created;
        let since = Duration::from_secs(secs).checked_add(Duration::from_nanos(nanos.into()));
        let created = since.and_then(|since| UNIX_EPOCH.checked_add(since)).ok_or_else(|| {
            Error::new(ErrorKind::Image, "it was written at an impossible time")
                .about(Subject::Section("manifest".into()))
        })?;
        Ok(Self {
            format: manifest.format,
            id: manifest.id,
            library: manifest.library.clone(),
            created,
            arch: manifest.arch.clone(),
            kernel: manifest.kernel.clone(),
            page_size: manifest.page_size,
            root: Pid::from(manifest.root),
            content: manifest.content,
            state_len: manifest.files.first().map_or(0, |state| state.length),
        })
    }
}

/// One process of the tree in an image.
///
/// ```no_run
/// # let image = cryosleep::inspect::Inspection::open("/var/lib/images/job")?;
/// let processes = image.processes()?;
/// let ended = processes.iter().filter(|process| process.wait_status.is_some()).count();
/// println!("{} processes, {ended} of which had ended", processes.len());
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Process {
    /// Its pid (as are all numbers here: as the tree itself knows them).
    pub pid: Pid,
    /// Its parent; that of the root is not in the image.
    pub parent: Pid,
    /// Its process group; 0 for one outside of the pid namespace that the tree lives in.
    pub group: Pid,
    /// Its session; 0 as for the group.
    pub session: Pid,
    /// Its threads, the leader first; empty when it has ended.
    pub threads: Vec<Pid>,
    /// How it has ended, as wait(2) would report it, if it has.
    pub wait_status: Option<i32>,
}

impl Process {
    fn of(record: &tree::ProcessRecord) -> Self {
        Self {
            pid: record.pid(),
            parent: Pid::from(record.parent),
            group: Pid::from(record.group),
            session: Pid::from(record.session),
            threads: record.threads().iter().copied().map(Pid::from).collect(),
            wait_status: match record.life {
                tree::Life::Threads(_) => None,
                tree::Life::Zombie(status) => Some(status),
            },
        }
    }
}

/// One section of an image: a record that somebody has.
///
/// ```no_run
/// # let image = cryosleep::inspect::Inspection::open("/var/lib/images/job")?;
/// for section in image.sections() {
///     match section.name() {
///         Some(name) => println!("{name} of {}: {}", section.owner(), section.text()?),
///         None => println!("{}: only a newer version knows this", section.tag()),
///     }
/// }
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Section<'i> {
    section: image::Section<'i>,
    kind: Option<RecordKind>,
}

impl Section<'_> {
    /// What kind of record it holds.
    pub fn tag(&self) -> Tag {
        self.section.tag
    }

    /// What messages call this kind of record; `None` for a kind that this version does not know.
    pub fn name(&self) -> Option<&'static str> {
        self.kind.map(|kind| kind.name)
    }

    /// Whose record it is: a pid or tid, the number of an object in a space that the tag defines, or 0 for
    /// what an image has once. Tag and owner together are unique.
    pub fn owner(&self) -> u32 {
        self.section.owner.0
    }

    /// Version of the record's encoding.
    pub fn version(&self) -> u16 {
        self.section.version
    }

    /// Length of the encoded record, in bytes.
    #[allow(clippy::len_without_is_empty)] // an empty record means nothing special
    pub fn len(&self) -> usize {
        self.section.payload.len()
    }

    /// The record, for people: one line that may change with every version.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] when this version of the library does not know the kind, or cannot decode it.
    pub fn text(&self) -> Result<String> {
        let unknown = || {
            Error::new(ErrorKind::Image, "this library does not know this kind of record")
                .about(Subject::Section(self.tag().to_string()))
                .in_phase(Phase::Read)
        };
        (self.kind.ok_or_else(unknown)?.show)(&self.section).in_phase(Phase::Read)
    }
}

impl std::fmt::Debug for Section<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Section");
        debug.field("tag", &self.tag()).field("owner", &self.owner());
        debug.field("version", &self.version()).field("len", &self.len()).finish_non_exhaustive()
    }
}

/// A file of page contents, into which records point.
///
/// ```no_run
/// # let image = cryosleep::inspect::Inspection::open("/var/lib/images/job")?;
/// let bytes: u64 = image.segments().map(|segment| segment.len).sum();
/// println!("{bytes} bytes of memory");
/// # Ok::<(), cryosleep::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Segment {
    /// Its number, from 0.
    pub index: u16,
    /// Its name in the image's directory.
    pub file: String,
    /// Its length in bytes.
    pub len: u64,
    /// Bytes of memory that it holds: more than its length if they are compressed.
    pub contents: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{ImageWriter, ManifestInfo, Records};

    #[test]
    fn shows_what_was_written() {
        let dir = std::env::temp_dir().join(format!("cryosleep-inspect-{}", std::process::id()));
        let process = |pid, parent, life| tree::ProcessRecord {
            pid,
            parent,
            group: 10,
            session: 10,
            exit_signal: 17,
            life,
            name: Vec::new(),
        };
        let processes =
            vec![process(10, 1, tree::Life::Threads(vec![10, 12])), process(11, 10, tree::Life::Zombie(256))];
        let mut records = Records::new().unwrap();
        records.put(Owner::IMAGE, &Tree { processes }).unwrap();
        let mut writer = ImageWriter::create(&dir).unwrap();
        writer.segment().unwrap().file().unwrap().set_len(8192).unwrap();
        writer.finish(records, ManifestInfo { root: Pid::from(10) }).unwrap();

        let image = Inspection::open(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(image.manifest().root, Pid::from(10));
        assert_eq!(image.manifest().library, env!("CARGO_PKG_VERSION"));
        assert!(image.manifest().created <= SystemTime::now());
        let processes = image.processes().unwrap();
        assert_eq!(processes[0].threads, [Pid::from(10), Pid::from(12)]);
        assert_eq!((processes[1].wait_status, processes[1].parent), (Some(256), Pid::from(10)));
        let sections: Vec<_> = image.sections().collect();
        assert_eq!(sections.len(), 1);
        assert_eq!(
            (sections[0].tag().to_string(), sections[0].name()),
            ("TREE".into(), Some("process tree"))
        );
        assert!(sections[0].text().unwrap().contains("Zombie(256)"));
        assert_eq!(
            image.segments().map(|segment| (segment.index, segment.len)).collect::<Vec<_>>(),
            [(0, 8192)]
        );
    }
}
