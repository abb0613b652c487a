//! The names that a checkpoint has made for files ([`LinkRemap::Link`](crate::LinkRemap::Link)) belong to its image: when
//! another image takes its place they go, and an image that is made of it gets its own.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::unistd::{UnlinkatFlags, unlinkat};

use super::super::link::{self, Links};
use super::{Birth, Ghost, open_directory, split};
use crate::error::{Context, Result};
use crate::image::Image;

/// Those of an image that is about to be replaced.
#[derive(Default)]
pub(crate) struct OldNames(Vec<OldName>);

struct OldName {
    directory: PathBuf,
    name: OsString,
    inode: u64,
}

impl OldNames {
    /// Of the image in this directory, if there is one.
    pub(crate) fn of_image_in(directory: &Path) -> Self {
        // What cannot be read is replaced all the same.
        let Ok(image) = Image::open(directory) else { return Self::default() };
        let ghosts = image.owners::<Ghost>().filter_map(|owner| image.require::<Ghost>(owner).ok());
        Self(ghosts.filter_map(|ghost| OldName::of(&ghost)).collect())
    }

    /// The new image is complete. What has become another file's name stays.
    pub(crate) fn remove(self) {
        for OldName { directory, name, inode } in self.0 {
            let Ok(directory) = open_directory(&directory) else { continue };
            if link::open(&directory, name.as_bytes(), inode).is_ok() {
                // It is in nobody's way.
                let _ = unlinkat(&directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
    }
}

impl OldName {
    /// An image is not trusted: only what a checkpoint could have made.
    fn of(ghost: &Ghost) -> Option<Self> {
        let Birth::Linked { name, inode } = &ghost.birth else { return None };
        let directory = split(&ghost.path).ok()?.0.to_owned();
        link::is_ours(name).then(|| Self { directory, name: OsStr::from_bytes(name).into(), inode: *inode })
    }
}

/// One more name for a file that has such a name, if it is there: another image is to have it.
pub(super) fn again(ghost: &mut Ghost, links: &mut Links) -> Result<()> {
    let Some(old) = OldName::of(ghost) else { return Ok(()) };
    let found = open_directory(&old.directory)
        .and_then(|at| link::open(&at, old.name.as_bytes(), old.inode).map(|file| (at, file)));
    // Perhaps it is only elsewhere that it can be restored.
    let Ok((directory, file)): Result<(OwnedFd, OwnedFd)> = found else { return Ok(()) };
    let made = links.make(&file, directory).about(|| ghost.subject())?;
    if let Birth::Linked { name, .. } = &mut ghost.birth {
        *name = made.into_vec().into();
    }
    Ok(())
}
