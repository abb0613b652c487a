//! Chains: an image that holds only what has changed since another one, its parent, which lies in a directory of
//! its own and may be the child of a third.
//!
//! The page segments of a chain are counted from those of its oldest image on. So what a record of the parent says
//! of the place of a page is true in the child too, and no record has to be looked up in an older image again. A
//! child knows its parent by id and checksum: another image in that place is not taken for it.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};

use super::dir::Dir;
use super::{Bytes, Decode, Encode, Image};
use crate::error::{Context, Error, ErrorKind, NameCall, Result};

/// How many images a chain may have: the files of all are open during a restore.
pub(crate) const MOST: usize = 100;

const HINT: &str = "an image is good for nothing without its parents: keep their directories where they were, \
                    seen from its own";

/// What a child says of its parent.
#[derive(Encode, Decode, Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParentLink {
    /// Its directory, seen from the child's.
    pub(crate) dir: Bytes,
    pub(crate) id: [u8; 16],
    /// Of its manifest.
    pub(crate) manifest_crc32: u32,
}

impl ParentLink {
    /// For a child that is to be written into this directory.
    pub(super) fn to(parent: &Image, manifest_crc32: u32, child: &Dir) -> Result<Self> {
        refuse_same_place(parent, child)?;
        if ancestors(parent).count() >= MOST {
            let reason = format!("the chain of the parent has {MOST} images already");
            return Err(Error::new(ErrorKind::Refused, reason)
                .about(parent.dir()?.subject())
                .with_hint("make one image of it: flatten()"));
        }
        let dir = relative(&place(child)?, &place(parent.dir()?)?);
        let id = parent.manifest().id;
        Ok(Self { dir: dir.into_os_string().into_vec().into(), id, manifest_crc32 })
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.dir.is_empty() || self.dir.contains(&0) || self.dir.len() >= libc::PATH_MAX as usize {
            true => Err(Error::new(ErrorKind::Image, "the manifest lists an impossible parent")),
            false => Ok(()),
        }
    }

    fn open(&self, child: &Dir) -> Result<Image> {
        let name = Path::new(std::ffi::OsStr::from_bytes(&self.dir));
        let path = child.path.join(name);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match openat(child, name, flags, Mode::empty()) {
            Ok(fd) => Image::read_link(Dir { fd, path }, self),
            Err(Errno::ENOENT) => Err(Error::new(ErrorKind::Image, "it is not there")),
            Err(errno) => Err(Error::call("openat", errno)),
        }
        .map_err(|error| {
            let reason = format!("parent image {}: {error}", child.path.join(name).display());
            Error::new(ErrorKind::Image, reason).about(child.subject()).with_hint(HINT)
        })
    }
}

/// No image takes the place of one that it is made of.
pub(super) fn refuse_same_place(image: &Image, dir: &Dir) -> Result<()> {
    let own = fstat(dir).call("fstat").about(|| dir.subject())?;
    for image in ancestors(image) {
        let stat = fstat(image.dir()?).call("fstat")?;
        if (stat.st_dev, stat.st_ino) == (own.st_dev, own.st_ino) {
            let reason = "the image would replace one of those that it is made of, or a child of";
            return Err(Error::new(ErrorKind::Refused, reason).about(dir.subject()));
        }
    }
    Ok(())
}

/// The image and those that it is a child of, the youngest first.
pub(crate) fn ancestors(image: &Image) -> impl Iterator<Item = &Image> {
    std::iter::successors(Some(image), |image| image.parent())
}

/// Opens and verifies the parents of an image, link by link.
pub(super) fn with_parents(image: Image) -> Result<Image> {
    let mut ids = BTreeSet::new();
    let (mut chain, mut next) = (Vec::new(), Some(image));
    while let Some(image) = next {
        if !ids.insert(image.manifest().id) || chain.len() >= MOST {
            let reason = format!("a chain that is longer than {MOST} images, or leads back to itself");
            return Err(Error::new(ErrorKind::Image, reason).about(image.dir()?.subject()));
        }
        next = image.manifest().parent.as_ref().map(|link| link.open(image.dir()?)).transpose()?;
        chain.push(image);
    }
    let mut oldest_first = chain.into_iter().rev();
    let oldest = oldest_first.next().ok_or_else(|| Error::new(ErrorKind::Image, "an empty chain"))?;
    oldest_first.try_fold(oldest.adopted_by(None)?, |parent, child| child.adopted_by(Some(parent)))
}

/// Where an open directory is.
fn place(dir: &Dir) -> Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", dir.fd.as_raw_fd()))
        .call("readlink")
        .about(|| dir.subject())
}

/// The way from one directory to another; both are absolute, without links or dots.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<_>, Vec<_>) = (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(one, other)| one == other).count();
    let up = from.iter().skip(common).map(|_| Component::ParentDir);
    let way: PathBuf = up.chain(to.iter().skip(common).copied()).collect();
    if way.as_os_str().is_empty() { ".".into() } else { way }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::super::ImageWriter;
    use super::super::dir::tests::{INFO, Scratch, records};
    use super::*;
    use crate::error::Subject;

    impl ParentLink {
        pub(in crate::image) fn sample() -> Self {
            Self { dir: b"../earlier".to_vec().into(), id: [0xcd; 16], manifest_crc32: 7 }
        }
    }

    #[test]
    fn ways() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to)).display().to_string();
        assert_eq!(way("/var/images/2", "/var/images/1"), "../1");
        assert_eq!(way("/var/images/2", "/var/images"), "..");
        assert_eq!(way("/var/images", "/var/images/1"), "1");
        assert_eq!(way("/a/b", "/c/d/e"), "../../c/d/e");
        assert_eq!(way("/", "/c"), "c");
        assert_eq!(way("/a", "/a"), ".");
    }

    /// An image with one page segment of these bytes.
    fn write(dir: &Path, parent: Option<&Path>, pages: &str) -> Result<()> {
        let mut writer = ImageWriter::create(dir)?;
        if let Some(parent) = parent {
            writer = writer.child_of(&Image::open(parent)?)?;
        }
        writer.segment()?.file().unwrap().write_all_at(pages.as_bytes(), 0).unwrap();
        writer.finish(records(&["a"]), INFO()).map(drop)
    }

    /// Three images, each the child of the one before.
    fn chain(scratch: &Scratch) -> [PathBuf; 3] {
        let dirs = ["one", "two", "three"].map(|name| scratch.0.join(name));
        write(&dirs[0], None, "oldest").unwrap();
        write(&dirs[1], Some(&dirs[0]), "in between").unwrap();
        write(&dirs[2], Some(&dirs[1]), "youngest").unwrap();
        dirs
    }

    fn contents(image: &Image, segment: u16) -> String {
        let segment = image.segment(segment).unwrap();
        let mut bytes = vec![0; segment.length() as usize];
        segment.read(0, &mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    fn refused(dir: &Path) -> String {
        let error = Image::open(dir).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Image, "{error}");
        assert!(error.subject().is_some(), "{error}");
        error.to_string()
    }

    #[test]
    fn segments_are_counted_from_the_oldest_image() {
        let scratch = Scratch::new();
        let dirs = chain(&scratch);
        let youngest = Image::open(&dirs[2]).unwrap();
        let all: Vec<_> = (0..3).map(|segment| contents(&youngest, segment)).collect();
        assert_eq!(all, ["oldest", "in between", "youngest"]);
        assert_eq!(youngest.segment(3).unwrap_err().kind(), ErrorKind::Image);
        assert_eq!(ancestors(&youngest).count(), 3);
        // What it says of places is true in its children.
        let between = Image::open(&dirs[1]).unwrap();
        assert_eq!([0, 1].map(|segment| contents(&between, segment)), ["oldest", "in between"]);
        assert!(between.segment(2).is_err());
    }

    #[test]
    fn a_chain_can_be_moved_but_not_torn_apart() {
        let scratch = Scratch::new();
        let dirs = chain(&scratch);
        let moved = scratch.0.join("moved");
        fs::create_dir(&moved).unwrap();
        let now = dirs.each_ref().map(|dir| moved.join(dir.file_name().unwrap()));
        fs::rename(&dirs[2], &now[2]).unwrap();
        assert!(refused(&now[2]).contains("two: it is not there"));
        fs::rename(&dirs[1], &now[1]).unwrap();
        let error = Image::open(&now[2]).unwrap_err();
        assert!(error.to_string().contains("one: it is not there"), "{error}");
        assert_eq!(error.subject(), Some(&Subject::Path(now[2].join("../two"))));
        assert!(error.hint().unwrap().contains("keep their directories"), "{error}");
        fs::rename(&dirs[0], &now[0]).unwrap();
        Image::open(&now[2]).unwrap();
    }

    #[test]
    fn another_image_is_not_taken_for_the_parent() {
        let scratch = Scratch::new();
        let dirs = chain(&scratch);
        let mut files = fs::read_dir(&dirs[0]).unwrap().flatten().map(|entry| entry.path());
        let segment = files.find(|path| path.to_string_lossy().contains("pages")).unwrap();
        fs::write(&segment, "oldes").unwrap();
        assert!(refused(&dirs[2]).contains("5 bytes long"));
        fs::write(&segment, "oldest").unwrap();
        fs::set_permissions(&segment, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(refused(&dirs[2]).contains("written by others"));
        write(&dirs[0], None, "oldest").unwrap();
        assert!(refused(&dirs[2]).contains("another image is there now"));
        fs::write(dirs[0].join("manifest"), "").unwrap();
        assert!(refused(&dirs[1]).contains("parent image"));
    }

    #[test]
    fn no_image_replaces_one_of_its_parents() {
        let scratch = Scratch::new();
        let dirs = chain(&scratch);
        for dir in &dirs {
            let error = write(dir, Some(&dirs[2]), "").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        }
        Image::open(&dirs[2]).unwrap();
    }

    #[test]
    fn a_chain_is_not_longer_than_can_be_read() {
        let scratch = Scratch::new();
        let dir = |number: usize| scratch.0.join(number.to_string());
        write(&dir(1), None, "").unwrap();
        (2..=MOST).for_each(|number| write(&dir(number), Some(&dir(number - 1)), "").unwrap());
        assert_eq!(ancestors(&Image::open(&dir(MOST)).unwrap()).count(), MOST);
        let error = write(&dir(MOST + 1), Some(&dir(MOST)), "").unwrap_err();
        assert!(error.to_string().contains("100 images already"), "{error}");
    }

    #[test]
    fn links_that_lead_nowhere() {
        let scratch = Scratch::new();
        let dirs = chain(&scratch);
        let mut manifest = Image::open(&dirs[0]).unwrap().manifest().clone();
        let file = dirs[0].join("manifest");
        // To itself: it would have to say its own checksum.
        let own = ParentLink { dir: b".".to_vec().into(), id: manifest.id, manifest_crc32: 7 };
        manifest.parent = Some(own);
        fs::write(&file, manifest.to_bytes().unwrap()).unwrap();
        assert!(refused(&dirs[0]).contains("another image is there now"));
        let impossible: [&[u8]; 3] = [b"", b"a\0b", &[b'a'; 5000]];
        for dir in impossible {
            manifest.parent = Some(ParentLink { dir: dir.to_vec().into(), ..ParentLink::sample() });
            fs::write(&file, manifest.to_bytes().unwrap()).unwrap();
            assert!(refused(&dirs[0]).contains("impossible parent"));
        }
    }
}
