//! One image of a chain.

use std::path::Path;

use crate::Pid;
use crate::error::{Context, Phase, Result};
use crate::image::{Durability, Image, ImageWriter, ManifestInfo, Records};
use crate::resource::fds::{Links, OldNames};
use crate::resource::memory::{PageWriter, Places, Segments};
use crate::resource::{PAGED, refuse_unknown};

/// Makes an image that needs no other one of an image and its parents
/// ([`Checkpoint::parent`](crate::Checkpoint::parent)), in another directory: the parents can then be removed, if
/// nothing else is a child of theirs, as the new one has reached the disk ([`Durability::Synced`]). All pages that the
/// image has of any of them are read, verified, and written anew. Pages that processes share are there once, as before.
///
/// ```no_run
/// cryosleep::flatten("/var/lib/images/24", "/var/lib/images/day")?;
/// (1..=24).try_for_each(|hour| std::fs::remove_dir_all(format!("/var/lib/images/{hour}")))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Image`](crate::ErrorKind::Image) when something about the chain is wrong, and
/// [`ErrorKind::Refused`](crate::ErrorKind::Refused) for the directory of one of its images. What was in the other
/// directory is still there then, unless it is the new image that cannot be read.
pub fn flatten(image: impl AsRef<Path>, into: impl AsRef<Path>) -> Result<()> {
    let image = Image::open(image.as_ref()).in_phase(Phase::Read)?;
    write(&image, into.as_ref()).in_phase(Phase::Write)?;
    Image::open(into.as_ref()).map(drop).in_phase(Phase::Read)
}

fn write(image: &Image, into: &Path) -> Result<()> {
    refuse_unknown(image)?;
    let mut runs = Vec::new();
    for section in image.sections() {
        if let Some(kind) = PAGED.iter().find(|kind| kind.tag == section.tag) {
            runs.extend((kind.runs)(&section).about(|| section.subject())?);
        }
    }
    Segments(image).check(&runs)?;
    let places = Places::of(runs);
    let mut writer = ImageWriter::create(into)?.durability(Durability::Synced).instead_of(image)?;
    let mut progress = |_| Ok(());
    let mut pages = PageWriter::new(None, None, &mut progress);
    let moved = places.copy(image, &mut pages, &mut writer)?;
    let (mut records, mut links) = (Records::new()?, Links::default());
    for section in image.sections().filter(|section| !section.is_of_segments()) {
        match PAGED.iter().find(|kind| kind.tag == section.tag) {
            Some(kind) => {
                (kind.put)(&section, (&moved, &mut links), &mut records).about(|| section.subject())?
            }
            None => records.copy(section)?,
        }
    }
    pages.finish(&mut records)?;
    let root = Pid::from(image.manifest().root);
    let old = OldNames::of_image_in(into);
    writer.finish(records, ManifestInfo { root })?;
    links.keep();
    old.remove();
    Ok(())
}
