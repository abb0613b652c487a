//! Pages of an image on their way into another one: what many records lead to is copied once, and they lead to it
//! again.

use std::ops::Range;

use super::kin::overlap;
use super::pages::PageWriter;
use super::{Run, Segments};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, ImageWriter};

/// The parts of an image's page segments that its records lead to, back to back.
#[derive(Debug, Default)]
pub(crate) struct Places(Vec<Place>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    segment: u16,
    range: Range<u64>,
    /// How much there is before it.
    base: u64,
}

/// Where they are in another image: the addresses of these runs are counted from the first place on.
#[derive(Debug)]
pub(crate) struct Moved<'p> {
    places: &'p Places,
    runs: Vec<Run>,
}

impl Places {
    pub(crate) fn of(mut runs: Vec<Run>) -> Self {
        runs.sort_unstable_by_key(|run| (run.segment, run.offset));
        let mut places: Vec<Place> = Vec::new();
        for run in runs {
            let end = run.offset + run.len;
            match places.last_mut() {
                Some(last) if last.segment == run.segment && run.offset <= last.range.end => {
                    last.range.end = last.range.end.max(end);
                }
                _ => places.push(Place { segment: run.segment, range: run.offset..end, base: 0 }),
            }
        }
        let mut base = 0;
        for place in &mut places {
            place.base = base;
            base += place.range.end - place.range.start;
        }
        Self(places)
    }

    /// Writes all of it into another image.
    pub(crate) fn copy(
        &self,
        from: &Image,
        pages: &mut PageWriter<'_>,
        image: &mut ImageWriter,
    ) -> Result<Moved<'_>> {
        let ranges: Vec<_> = self
            .0
            .iter()
            .map(|place| place.base..place.base + (place.range.end - place.range.start))
            .collect();
        let source = |ranges: &[Range<u64>], buffer: &mut [u8]| {
            let start = ranges.first().map_or(0, |range| range.start);
            Segments(from).each(&self.runs(ranges), |pieces| {
                pieces.iter().try_for_each(|(at, bytes)| {
                    // One range follows the other.
                    let at = (at - start) as usize;
                    let room = buffer.get_mut(at..at + bytes.len());
                    room.ok_or_else(|| wrong("pages come from nowhere"))?.copy_from_slice(bytes);
                    Ok(())
                })
            })
        };
        let runs = pages.write_ranges(&ranges, &source, &|_| false, image)?;
        Ok(Moved { places: self, runs })
    }

    /// What is at these distances from the first place's start.
    fn runs(&self, ranges: &[Range<u64>]) -> Vec<Run> {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return Vec::new() };
        let before = self.0.partition_point(|place| place.base <= first.start).saturating_sub(1);
        let there = self.0.iter().skip(before).take_while(|place| place.base < last.end);
        let all = there.map(|place| Run {
            addr: place.base,
            len: place.range.end - place.range.start,
            segment: place.segment,
            offset: place.range.start,
        });
        overlap(&all.collect::<Vec<_>>(), ranges)
    }

    /// The distance of a run from the first place's start.
    fn distance(&self, run: &Run) -> Option<u64> {
        let next =
            self.0.partition_point(|place| (place.segment, place.range.start) <= (run.segment, run.offset));
        let place = self.0.get(next.checked_sub(1)?)?;
        let inside = place.segment == run.segment && run.offset + run.len <= place.range.end;
        inside.then(|| place.base + (run.offset - place.range.start))
    }
}

impl Moved<'_> {
    /// The same pages, where they are now.
    pub(crate) fn run(&self, run: &Run) -> Result<Vec<Run>> {
        let at = self.places.distance(run).ok_or_else(|| wrong("a run that was not copied"))?;
        let first = self.runs.partition_point(|there| there.addr + there.len <= at);
        let there = self.runs.get(first..).unwrap_or_default();
        let parts = overlap(there, std::slice::from_ref(&(at..at + run.len)));
        let here = |part: Run| Run { addr: run.addr.wrapping_add(part.addr - at), ..part };
        Ok(parts.into_iter().map(here).collect())
    }
}

fn wrong(why: &'static str) -> Error {
    Error::new(ErrorKind::Kernel, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(addr: u64, len: u64, segment: u16, offset: u64) -> Run {
        Run { addr, len, segment, offset }
    }

    #[test]
    fn what_several_lead_to_is_there_once() {
        // Two processes with common pages, and a third whose pages are elsewhere.
        let runs = [run(1000, 10, 0, 50), run(2000, 4, 0, 53), run(3000, 8, 2, 0), run(4000, 5, 0, 60)];
        let places = Places::of(runs.to_vec());
        assert_eq!(
            places.0,
            [Place { segment: 0, range: 50..65, base: 0 }, Place { segment: 2, range: 0..8, base: 15 },]
        );
        assert_eq!(places.runs(&[10..20, 20..23]), [run(10, 5, 0, 60), run(15, 5, 2, 0), run(20, 3, 2, 5)]);
        // Written in two parts, to two segments.
        let moved =
            Moved { places: &places, runs: vec![run(0, 12, 7, 100), run(12, 3, 8, 0), run(15, 8, 8, 3)] };
        assert_eq!(moved.run(&runs[0]).unwrap(), [run(1000, 10, 7, 100)]);
        assert_eq!(moved.run(&runs[1]).unwrap(), [run(2000, 4, 7, 103)]);
        assert_eq!(moved.run(&runs[2]).unwrap(), [run(3000, 8, 8, 3)]);
        assert_eq!(moved.run(&runs[3]).unwrap(), [run(4000, 2, 7, 110), run(4002, 3, 8, 0)]);
        for unknown in
            [run(0, 1, 1, 50), run(0, 1, 0, 49), run(0, 16, 0, 50), run(0, 1, 0, 65), run(0, 9, 2, 0)]
        {
            assert!(moved.run(&unknown).is_err(), "{unknown:?}");
        }
        assert!(Places::of(Vec::new()).distance(&runs[0]).is_none());
    }
}
