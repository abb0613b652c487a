//! What chains save: the size of the second image, and the time that the tree stands still after pre-dumps. The subject
//! writes to one page in a hundred between two of them (we do it for it, which is the same for the kernel).

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use cryosleep::{AfterDump, Checkpoint, CheckpointStats, Tracker};

use crate::subject::{Kind, PAGE, Subject};
use crate::{Result, remove};

const ONE_IN: usize = 100;

/// What a round has shown.
struct Round {
    /// The second image, and the final freeze, each as a part of what it is without a chain.
    size: f64,
    freeze: f64,
    whole: Duration,
    last: Duration,
}

/// One line for a size of memory.
pub(crate) fn row(kind: &Kind, bytes: usize, rounds: usize, home: &Path) -> Result<String> {
    let rounds: Result<Vec<_>> = (0..rounds).map(|_| round(kind, bytes, home)).collect();
    let mut rounds = rounds?;
    rounds.sort_by(|one, other| one.freeze.total_cmp(&other.freeze));
    let Round { size, freeze, whole, last } = &rounds[rounds.len() / 2];
    Ok(format!(
        "Chain, {}, 1 % written between images: the second image is {:.2} % of the first; after two pre-dumps the tree \
         stands still for {:.1} ms, {freeze:.3} of a full dump's {:.1} ms.\n",
        kind.name(),
        100.0 * size,
        last.as_secs_f64() * 1e3,
        whole.as_secs_f64() * 1e3,
    ))
}

fn round(kind: &Kind, bytes: usize, home: &Path) -> Result<Round> {
    let image = |number: usize| home.join(format!("chain.{number}"));
    (0..6).try_for_each(|number| remove(&image(number)))?;
    let subject = Subject::start(kind)?;
    let dirty = |subject: &Subject| dirty(subject, bytes);
    // Two images, the second a child of the first.
    let mut tracker = Tracker::new();
    let first = of(&subject).after(AfterDump::Resume).tracker(&mut tracker).write_to(image(0))?.stats;
    dirty(&subject)?;
    let child = of(&subject).after(AfterDump::Resume).tracker(&mut tracker).parent(image(0));
    let second = child.write_to(image(1))?.stats;
    drop(tracker);
    // All at once.
    let whole = of(&subject).write_to(image(2))?.stats.frozen;
    subject.reap()?;
    // Two pre-dumps, and the rest.
    let subject = Subject::start(kind)?;
    let mut tracker = Tracker::new();
    of(&subject).tracker(&mut tracker).pre_dump(image(3))?;
    dirty(&subject)?;
    of(&subject).tracker(&mut tracker).parent(image(3)).pre_dump(image(4))?;
    dirty(&subject)?;
    let last = of(&subject).tracker(&mut tracker).parent(image(4)).write_to(image(5))?.stats;
    subject.reap()?;
    (0..6).try_for_each(|number| remove(&image(number)))?;
    let size = |stats: CheckpointStats| stats.bytes_written as f64;
    let freeze = last.frozen.as_secs_f64() / whole.as_secs_f64();
    Ok(Round { size: size(second) / size(first), freeze, whole, last: last.frozen })
}

fn of<'t>(subject: &Subject) -> Checkpoint<'t> {
    Checkpoint::of(subject.pid())
}

fn dirty(subject: &Subject, bytes: usize) -> Result<()> {
    let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", subject.pid()))?;
    let start = subject.contents().address();
    for at in (0..bytes).step_by(ONE_IN * PAGE) {
        memory.write_all_at(&at.to_ne_bytes(), start + at as u64)?;
    }
    Ok(())
}
