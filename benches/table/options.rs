//! What is measured, and how often.

use std::path::PathBuf;

use crate::Result;
use crate::subject::{Kind, Layout, MIB};

pub(crate) const HELP: &str = "\
cargo bench [-- OPTIONS]
  --tiny           the tiny processes only
  --sizes LIST     sizes of memory in MiB (default 64,1024); the larger ones need three times as much RAM,
                   and as much room on tmpfs and on disk
  --shrink N       the other shapes of memory (many mappings, sparse, huge pages, many processes, forked ones) with an
                   N-th of their bytes; default 1: up to 1.6 GiB of memory, twice that of RAM for the copies beside it
  --rounds N       rounds of each case (default 5; 30 for the tiny processes)
  --only PATTERN   only cases whose title has this in it; titles are like `1 GiB tmpfs cryosleep`, `1 GiB chain`, `100 threads tmpfs
                   cryosleep`, `100 processes tmpfs cryosleep` or `1800 files tmpfs cryosleep`: `--only threads` shows what
                   each thread costs
  --tmpfs DIR      where the images on tmpfs go (default /dev/shm)
  --disk DIR       where those on disk go (default: the target directory)";

#[derive(Debug)]
pub(crate) struct Options {
    tiny: bool,
    sizes: Vec<usize>,
    shrink: usize,
    rounds: Option<usize>,
    only: String,
    pub(crate) tmpfs: PathBuf,
    pub(crate) disk: PathBuf,
}

impl Options {
    /// None: help was asked for.
    pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let mut options = Self {
            tiny: false,
            sizes: vec![64, 1024],
            shrink: 1,
            rounds: None,
            only: String::new(),
            tmpfs: "/dev/shm".into(),
            disk: env!("CARGO_TARGET_TMPDIR").into(),
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg}: its value is missing"));
            match arg.as_str() {
                "--bench" => {} // cargo's own
                "--help" | "-h" => return Ok(None),
                "--tiny" => options.tiny = true,
                "--sizes" => {
                    options.sizes = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?;
                }
                "--shrink" => options.shrink = value()?.parse::<usize>()?.clamp(1, 100),
                "--rounds" => options.rounds = Some(value()?.parse()?),
                "--only" => options.only = value()?,
                "--tmpfs" => options.tmpfs = value()?.into(),
                "--disk" => options.disk = value()?.into(),
                _ => return Err(format!("{arg}: unknown option; --help lists them").into()),
            }
        }
        Ok(Some(options))
    }

    pub(crate) fn kinds(&self) -> Vec<Kind> {
        let sizes = if self.tiny { &[][..] } else { &self.sizes };
        let memory = sizes.iter().map(|mib| Kind::Memory(mib * MIB));
        let tasks = (1..=4).map(|power| 10usize.pow(power)).filter(|_| !self.tiny);
        let layouts = if self.tiny { Vec::new() } else { self.layouts() };
        let threads = tasks.clone().map(Kind::Threads);
        let processes = tasks.take(3).map(Kind::Processes);
        // Most processes may have 20,000 files at most, and so may this one.
        let files = [180, 1800, 18_000].into_iter().map(Kind::Files);
        let watches = [500, 5000].into_iter().map(Kind::Watches);
        let files = files.chain(watches).chain([100, 1000].into_iter().map(Kind::Sharers));
        let files = files.filter(|_| !self.tiny);
        [Kind::StaticC, Kind::TinyRust]
            .into_iter()
            .chain(memory)
            .chain(layouts)
            .chain(threads)
            .chain(processes)
            .chain(files)
            .collect()
    }

    /// Each beside one mapping with the same bytes, where it has none in the list of sizes.
    fn layouts(&self) -> Vec<Kind> {
        const VMAS: usize = 10_000;
        const PAGES: usize = 8;
        let less = |mib: usize| (mib * MIB / self.shrink).next_multiple_of(4 * MIB);
        let small = (VMAS * PAGES * 4096 / self.shrink).next_multiple_of(VMAS * 4096);
        let (each, forked) = (less(16), less(200));
        vec![
            Kind::Memory(small.next_multiple_of(MIB)),
            Kind::Layout(Layout::Mappings, small, VMAS),
            Kind::Memory(100 * each),
            Kind::Layout(Layout::Processes, each, 100),
            Kind::Layout(Layout::Forked, forked, 20),
            Kind::Layout(Layout::Sparse, 65536 * MIB, 1024 * 64 / self.shrink),
            Kind::Layout(Layout::Huge, less(1024), 1),
        ]
    }

    pub(crate) fn rounds(&self, kind: &Kind) -> usize {
        let usual = if matches!(kind, Kind::StaticC | Kind::TinyRust) { 30 } else { 5 };
        self.rounds.unwrap_or(usual)
    }

    pub(crate) fn wants(&self, title: &str) -> bool {
        title.contains(&self.only)
    }
}
