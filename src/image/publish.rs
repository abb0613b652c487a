//! How a manifest takes its place: at once, and so that two who do so at the same time do not overlook each other.

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::fsync;

use super::Manifest;
use super::dir::{Dir, MANIFEST, read_manifest, refuse_foreign};
use crate::error::{Context, NameCall, Result};

/// What was there before.
#[derive(Debug)]
pub(super) enum Before {
    Nothing,
    /// A manifest, which has the name of the draft now.
    Exchanged,
    /// The file system cannot exchange names: what was read just before it was replaced.
    Replaced(Option<Manifest>),
}

/// Makes the draft the directory's manifest.
pub(super) fn publish(dir: &Dir, draft: &str) -> Result<Before> {
    let rename = |flags| renameat2(dir, draft, dir, MANIFEST, flags);
    let failed = loop {
        match rename(RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => {
                let foreign = refuse_foreign(dir, draft);
                if foreign.is_err() {
                    let _ = Before::Exchanged.put_back(dir, draft);
                }
                return foreign.map(|()| Before::Exchanged);
            }
            Err(Errno::ENOENT) => {}
            Err(errno) => break errno,
        }
        match rename(RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => return Ok(Before::Nothing),
            Err(Errno::EEXIST) => {} // somebody else's, since
            Err(errno) => break errno,
        }
    };
    let replaced = match failed {
        Errno::EINVAL | Errno::ENOSYS => {
            let before = read_manifest(dir, MANIFEST).ok().map(|(manifest, _)| manifest);
            renameat(dir, draft, dir, MANIFEST).map(|()| Before::Replaced(before))
        }
        errno => Err(errno),
    };
    replaced.call("renameat").about(|| dir.file(MANIFEST))
}

impl Before {
    /// Puts it there again, if that is possible; the draft is one again then.
    pub(super) fn put_back(self, dir: &Dir, draft: &str) -> Result<(), Self> {
        let undone = match self {
            Self::Exchanged => renameat2(dir, draft, dir, MANIFEST, RenameFlags::RENAME_EXCHANGE),
            Self::Nothing => renameat2(dir, MANIFEST, dir, draft, RenameFlags::RENAME_NOREPLACE),
            Self::Replaced(_) => return Err(self),
        };
        undone.map_err(|_| self)
    }

    /// Removes all of it but the files of this image.
    pub(super) fn remove(self, dir: &Dir, draft: &str, own: &Manifest) {
        let before = match self {
            Self::Nothing => None,
            Self::Exchanged => read_manifest(dir, draft).ok().map(|(manifest, _)| manifest),
            Self::Replaced(before) => before,
        };
        let before = before.filter(|before| before.id != own.id);
        before.iter().flat_map(|before| &before.files).for_each(|file| dir.remove(&file.name));
        dir.remove(draft);
    }
}

/// The entry of a directory that was made just now reaches the disk.
pub(super) fn sync_entry(dir: &Dir) -> Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = openat(dir, "..", flags, Mode::empty()).call("openat").about(|| dir.file(".."))?;
    fsync(parent).call("fsync").about(|| dir.file(".."))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::super::dir::tests::{INFO, Scratch, records};
    use super::super::sections::tests::{Thing, thing};
    use super::super::{Image, ImageWriter, Owner};
    use super::*;

    fn write(dir: &Path, name: &str) {
        let mut writer = ImageWriter::create(dir).unwrap();
        drop(writer.segment().unwrap());
        writer.finish(records(&[name]), INFO()).unwrap();
    }

    fn count(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    fn dir(path: &Path) -> Dir {
        Dir { fd: fs::File::open(path).unwrap().into(), path: path.into() }
    }

    /// Each leaves the other's image, or its own, and nothing else.
    #[test]
    fn two_at_the_same_time() {
        let scratch = Scratch::new();
        for _ in 0..50 {
            std::thread::scope(|scope| {
                for name in ["one", "two"] {
                    scope.spawn(|| write(&scratch.0, name));
                }
            });
            Image::open(&scratch.0).unwrap();
            assert_eq!(count(&scratch.0), 3);
        }
    }

    #[test]
    fn put_back() {
        let scratch = Scratch::new();
        let (dir, draft) = (dir(&scratch.0), "draft");
        let path = |name: &str| scratch.0.join(name);
        fs::write(path(draft), "new").unwrap();
        let before = publish(&dir, draft).unwrap();
        assert!(matches!(before, Before::Nothing));
        before.put_back(&dir, draft).unwrap();
        assert!(path(draft).exists() && !path(MANIFEST).exists());
        fs::remove_file(path(draft)).unwrap();

        write(&scratch.0, "old");
        fs::write(path(draft), "new").unwrap();
        let before = publish(&dir, draft).unwrap();
        assert_eq!(fs::read(path(MANIFEST)).unwrap(), b"new");
        before.put_back(&dir, draft).unwrap();
        assert_eq!(fs::read(path(draft)).unwrap(), b"new");
        let image = Image::open(&scratch.0).unwrap();
        assert_eq!(image.require::<Thing>(Owner(1)).unwrap(), thing("old"));
    }
}
