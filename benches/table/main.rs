//! How long a dump and a restore take: one table, by `cargo bench`.
//!
//! Not criterion: an iteration here is a whole process that is dumped, reaped, restored, checked and ended.
//! What it costs means something only beside a memcpy of the same size at the same moment (machines are
//! shared, and their memory is as fast as the neighbours let it be). So the rounds go through all engines and
//! places in turn, each ratio is taken within its round, and the table shows medians with their extremes.
//! Criterion times one closure at a time, each in a block of its own, and cannot pair them.
//!
//! `cargo bench -- --help` says what can be chosen.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a program, not a library

mod chain;
mod engine;
mod machine;
mod options;
mod report;
mod subject;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use engine::Engine;
use machine::Machine;
use memmap2::{Advice, MmapMut};
use options::Options;
use report::Row;
use subject::{Kind, Subject};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let done = match subject::role() {
        Some(bytes) => subject::live(bytes).map(|()| ExitCode::SUCCESS),
        None => match Options::parse(std::env::args().skip(1)) {
            Ok(Some(options)) => bench(&options),
            Ok(None) => {
                println!("{}", options::HELP);
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => Err(error),
        },
    };
    done.unwrap_or_else(|error| {
        eprintln!("bench: {error}");
        ExitCode::FAILURE
    })
}

/// One combination of subject, place and engine, with what was measured of it.
struct Lane {
    place: &'static str,
    images: PathBuf,
    engine: Engine,
    row: Row,
}

fn bench(options: &Options) -> Result<ExitCode> {
    // CRIU's restored processes become ours to wait for when `criu` ends.
    nix::sys::prctl::set_child_subreaper(true)?;
    let homes = Homes::make(options)?;
    let machine = Machine::look();
    let criu = engine::find_criu();
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for kind in options.kinds() {
        let measured = kind.prepare(&homes.disk).and_then(|()| case(&kind, options, &homes, criu.is_ok()));
        match measured {
            Ok(measured) => rows.extend(measured),
            Err(error) => failed.push(format!("{}: {error}", kind.name())),
        }
    }
    let mut chains = String::new();
    for kind in options.kinds() {
        let Kind::Memory(bytes) = kind else { continue };
        if options.wants(&format!("{} chain", kind.name())) {
            match chain::row(&kind, bytes, options.rounds(&kind), &homes.tmpfs) {
                Ok(row) => chains += &row,
                Err(error) => failed.push(format!("chain, {}: {error}", kind.name())),
            }
        }
    }
    print!("{}", report::table(&rows));
    print!("{chains}");
    println!("{}", report::LEGEND);
    println!("{}", machine.line());
    println!(
        "Images on tmpfs: {}; on disk: {}, in the page cache.",
        homes.tmpfs.display(),
        homes.disk.display()
    );
    criu.err().iter().chain(&failed).for_each(|line| println!("{line}"));
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All rounds of one subject.
fn case(kind: &Kind, options: &Options, homes: &Homes, criu: bool) -> Result<Vec<Row>> {
    let mut lanes = Vec::new();
    for (place, home) in [("tmpfs", &homes.tmpfs), ("disk", &homes.disk)] {
        let memory = matches!(kind, Kind::Memory(_));
        let engines = [
            Some(Engine::Cryosleep),
            memory.then_some(Engine::Bare),
            memory.then_some(Engine::Packed),
            memory.then_some(Engine::Live),
            criu.then_some(Engine::Criu),
        ];
        for engine in engines.into_iter().flatten() {
            let row = Row::new(kind, place, engine.name());
            // Where an image goes makes no difference to what tasks cost.
            if options.wants(&row.title()) && (kind.count().is_none() || place == "tmpfs") {
                lanes.push(Lane { place, images: home.join("image"), engine, row });
            }
        }
    }
    let mut copier = if lanes.is_empty() { None } else { Copier::new(kind)? };
    for number in 0..options.rounds(kind) {
        for lane in &mut lanes {
            round(kind, lane, copier.as_mut(), number == 0)
                .map_err(|error| format!("{} by {}: {error}", lane.place, lane.engine.name()))?;
        }
    }
    Ok(lanes.into_iter().map(|lane| lane.row).collect())
}

/// One life: started, dumped (which ends it), restored, looked at, ended.
fn round(kind: &Kind, lane: &mut Lane, mut copier: Option<&mut Copier>, verify: bool) -> Result<()> {
    let mut yardstick = || copier.as_mut().map(|copier| copier.time());
    remove(&lane.images)?;
    let subject = Subject::start(kind)?;
    let (pid, contents) = (subject.pid(), subject.contents());
    let before_dump = yardstick();
    let dump = lane.engine.dump(pid, &lane.images)?;
    subject.reap()?;
    let before_restore = yardstick();
    let restored = lane.engine.restore(pid, &lane.images)?;
    // The first round is checked to the last byte; every one by its having lived until we ended it.
    let intact = if verify { contents.verify(pid) } else { Ok(()) };
    let restore = restored.end();
    remove(&lane.images)?;
    intact?;
    lane.row.dump.add(before_dump, dump);
    lane.row.restore.add(before_restore, restore?);
    Ok(())
}

fn remove(images: &Path) -> Result<()> {
    match fs::remove_dir_all(images) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The yardstick: memory that is there already, copied to memory that is there already, in 4K pages like the
/// subject's.
struct Copier {
    from: MmapMut,
    to: MmapMut,
}

impl Copier {
    /// None for subjects whose memory is not what they cost.
    fn new(kind: &Kind) -> Result<Option<Self>> {
        let Some(bytes) = kind.populated() else { return Ok(None) };
        let mut copier = Self { from: subject::memory(bytes)?, to: MmapMut::map_anon(bytes)? };
        copier.to.advise(Advice::NoHugePage)?;
        copier.copy();
        Ok(Some(copier))
    }

    /// A single copy may have met a busy neighbour.
    fn time(&mut self) -> Duration {
        let mut times = [(); 3].map(|()| self.copy());
        times.sort();
        times[1]
    }

    fn copy(&mut self) -> Duration {
        let started = Instant::now();
        self.to.copy_from_slice(std::hint::black_box(&self.from));
        std::hint::black_box(&self.to);
        started.elapsed()
    }
}

/// Where images go; gone when the bench is.
struct Homes {
    tmpfs: PathBuf,
    disk: PathBuf,
}

impl Homes {
    fn make(options: &Options) -> Result<Self> {
        let name = format!("cryosleep-bench-{}", std::process::id());
        let homes = Self { tmpfs: options.tmpfs.join(&name), disk: options.disk.join(&name) };
        for home in [&homes.tmpfs, &homes.disk] {
            fs::create_dir_all(home).map_err(|error| format!("{}: {error}", home.display()))?;
        }
        Ok(homes)
    }
}

impl Drop for Homes {
    fn drop(&mut self) {
        for home in [&self.tmpfs, &self.disk] {
            let _ = fs::remove_dir_all(home);
        }
    }
}
