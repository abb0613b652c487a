//! What the parent of an image has already: pages that are as they were need not be stored again.
//!
//! Equal is what is equal byte by byte.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::kin::overlap;
use super::pages::BUFFER;
use super::{AddressSpace, Run, Segments};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Decode, Encode, Image, Owner, Record, Tag, ancestors};
use crate::resource::fds::Links;
use crate::sys::PAGE;

/// A record that says where pages are.
pub(crate) trait Paged: Record {
    fn runs(&mut self) -> &mut Vec<Run>;

    /// Has what belongs to its image made once more, for another one.
    fn give_names(&mut self, _links: &mut Links) -> Result<()> {
        Ok(())
    }
}

/// The private pages of a process, by an image that holds nothing else of it: a pre-dump.
#[derive(Encode, Decode, Debug)]
pub(crate) struct PreDumped {
    pub(crate) runs: Vec<Run>,
}

impl Record for PreDumped {
    const TAG: Tag = Tag::new(b"PDMP");
    const VERSION: u16 = 1;
    const NAME: &'static str = "pre-dumped pages";
}

impl Paged for PreDumped {
    fn runs(&mut self) -> &mut Vec<Run> {
        &mut self.runs
    }
}

/// The image that a new one is to be a child of.
#[derive(Debug)]
pub(crate) struct Parent {
    image: Image,
    /// Of processes, which have to be looked up while the tree stands still.
    spaces: BTreeMap<u32, Known>,
}

/// Where the chain has the pages of an object.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(super) runs: Vec<Run>,
    /// Does the parent itself say so? Otherwise an older image does.
    pub(super) by_parent: bool,
}

impl Parent {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let mut parent = Self { image: Image::open(dir)?, spaces: BTreeMap::new() };
        // The oldest first: what a younger one says takes its place.
        let images: Vec<_> = ancestors(&parent.image).zip(0..).collect();
        let mut spaces = BTreeMap::new();
        for (image, age) in images.into_iter().rev() {
            let mut owners: Vec<(Owner, Vec<Run>)> = Vec::new();
            for owner in image.owners::<AddressSpace>() {
                owners.push((owner, image.require::<AddressSpace>(owner)?.runs));
            }
            for owner in image.owners::<PreDumped>() {
                owners.push((owner, image.require::<PreDumped>(owner)?.runs));
            }
            for (owner, runs) in owners {
                spaces.insert(owner.0, parent.checked(runs, age)?);
            }
        }
        parent.spaces = spaces;
        Ok(parent)
    }

    fn checked(&self, runs: Vec<Run>, age: usize) -> Result<Known> {
        Segments(&self.image).check(&runs)?;
        if are_sound(&runs) { Ok(Known { runs, by_parent: age == 0 }) } else { Err(unsound()) }
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    pub(super) fn space(&self, number: u32) -> Known {
        self.spaces.get(&number).cloned().unwrap_or_default()
    }

    /// By the youngest image that knows the object.
    pub(super) fn known<R: Paged>(&self, owner: Owner) -> Result<Known> {
        for (image, age) in ancestors(&self.image).zip(0..) {
            if let Some(mut record) = image.get::<R>(owner)? {
                return self.checked(std::mem::take(record.runs()), age);
            }
        }
        Ok(Known::default())
    }

    /// The parts of `known` runs that are inside of the ranges and have the contents that `source` gives for them now.
    pub(super) fn unchanged(
        &self,
        known: &[Run],
        ranges: &[Range<u64>],
        source: impl Fn(&[Range<u64>], &mut [u8]) -> Result<()>,
    ) -> Result<Vec<Run>> {
        let candidates = overlap(known, ranges);
        let (mut now, mut same) = (vec![0; BUFFER], Vec::new());
        Segments(&self.image).each(&candidates, |pieces| {
            let ranges: Vec<_> =
                pieces.iter().map(|(addr, bytes)| *addr..addr + bytes.len() as u64).collect();
            let len = pieces.iter().map(|(_, bytes)| bytes.len()).sum();
            if now.len() < len {
                now.resize(len, 0);
            }
            let now = now.get_mut(..len).unwrap_or_default();
            source(&ranges, now)?;
            let then = pieces.iter().flat_map(|(addr, bytes)| {
                (*addr..).step_by(PAGE as usize).zip(bytes.chunks_exact(PAGE as usize))
            });
            let pages = then.zip(now.chunks_exact(PAGE as usize));
            pages.filter(|((_, then), now)| then == now).for_each(|((addr, _), _)| add_page(&mut same, addr));
            Ok(())
        })?;
        // They came in the order of the image. Where a candidate ends, a mapping may.
        same.sort_unstable_by_key(|range| range.start);
        Ok(overlap(&candidates, &same))
    }
}

fn add_page(ranges: &mut Vec<Range<u64>>, addr: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == addr => last.end += PAGE,
        _ => ranges.push(addr..addr + PAGE),
    }
}

/// In order, and of whole pages: an image is not trusted.
fn are_sound(runs: &[Run]) -> bool {
    let mut end = 0;
    runs.iter().all(|run| {
        let in_order =
            run.addr >= end && run.len > 0 && (run.addr | run.len | run.offset).is_multiple_of(PAGE);
        end = run.addr.saturating_add(run.len);
        in_order && i64::try_from(end).is_ok()
    })
}

fn unsound() -> Error {
    Error::new(ErrorKind::Image, "the parent image has pages that overlap, are out of order or out of bounds")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::Pid;
    use crate::image::{ImageWriter, ManifestInfo, Records};

    const P: u64 = PAGE;

    fn run(addr: u64, pages: u64, offset: u64) -> Run {
        Run { addr, len: pages * P, segment: 0, offset }
    }

    /// An image with eight pages, full of the bytes 0 to 7.
    fn parent(name: &str) -> Parent {
        let dir = std::env::temp_dir().join(format!("cryosleep-parent-{name}-{}", std::process::id()));
        let mut writer = ImageWriter::create(&dir).unwrap();
        let pages: Vec<u8> = (0..8).flat_map(|byte| [byte; PAGE as usize]).collect();
        writer.segment().unwrap().file().unwrap().write_all_at(&pages, 0).unwrap();
        writer.finish(Records::new().unwrap(), ManifestInfo { root: Pid::from(1) }).unwrap();
        let parent = Parent::open(&dir).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        parent
    }

    /// Memory in which each page is full of the byte that this gives for its number, but for one byte of some.
    fn memory(byte: impl Fn(u64) -> u8, odd: &[u64]) -> impl Fn(&[Range<u64>], &mut [u8]) -> Result<()> {
        move |ranges: &[Range<u64>], buffer: &mut [u8]| {
            let pages = ranges.iter().flat_map(|range| range.clone().step_by(PAGE as usize)).map(|at| at / P);
            pages.zip(buffer.chunks_mut(PAGE as usize)).for_each(|(page, contents)| {
                contents.fill(byte(page));
                contents[4095] ^= u8::from(odd.contains(&page));
            });
            Ok(())
        }
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init)] // one range is what is meant
    fn only_what_is_equal_is_left_to_the_parent() {
        let parent = parent("equal");
        let known = [run(10 * P, 4, 0), run(20 * P, 4, 4 * P)];
        let all = [0..100 * P];
        let same = |odd: &[u64], ranges: &[Range<u64>]| {
            let byte = |page| if page < 15 { page as u8 - 10 } else { page as u8 - 16 };
            parent.unchanged(&known, ranges, memory(byte, odd)).unwrap()
        };
        assert_eq!(same(&[], &all), known);
        assert_eq!(same(&[11, 23], &all), [run(10 * P, 1, 0), run(12 * P, 2, 2 * P), run(20 * P, 3, 4 * P)]);
        assert_eq!(same(&[10, 11, 12, 13, 20, 21, 22, 23], &all), []);
        // Runs end where the ranges do, which is where mappings do.
        let ranges = [11 * P..12 * P, 12 * P..13 * P, 22 * P..40 * P];
        assert_eq!(same(&[], &ranges), [run(11 * P, 1, P), run(12 * P, 1, 2 * P), run(22 * P, 2, 6 * P)]);
        assert_eq!(same(&[], &[50 * P..60 * P]), []);
        // The image may have them in another order, or one for several.
        let known = [run(10 * P, 1, 7 * P), run(11 * P, 1, 3 * P), run(12 * P, 2, 3 * P)];
        let now = memory(|page| [7, 3, 3, 4][page as usize - 10], &[]);
        assert_eq!(parent.unchanged(&known, &all, now).unwrap(), known);
    }

    #[test]
    fn what_an_image_says_is_held_against_its_bounds() {
        let sound = [run(0, 1, 0), run(P, 2, 0), run(8 * P, 1, 5 * P)];
        assert!(are_sound(&sound));
        assert!(are_sound(&[]));
        for wrong in [
            vec![run(P, 2, 0), run(2 * P, 1, 0)],
            vec![run(P, 1, 0), run(0, 1, 0)],
            vec![run(1, 1, 0)],
            vec![run(P, 1, 1)],
            vec![run(0, 0, 0)],
            vec![Run { len: 100, ..run(0, 1, 0) }],
            vec![run(u64::MAX - P + 1, 1, 0)],
            vec![run(1 << 63, 1, 0)],
        ] {
            assert!(!are_sound(&wrong), "{wrong:?}");
        }
    }
}
