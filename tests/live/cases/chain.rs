//! Chains of images: a program that changes its memory in every way is dumped again and again, and what comes back is
//! compared with what it was, byte by byte.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cryosleep::{
    AfterDump, Checkpoint, CheckpointStats, Error, ErrorKind, Hooks, Progress, Restore, Tracker,
};
use nix::sys::signal::Signal;

use super::{Case, Dice, ensure};
use crate::program::{Program, Target, nothing_left};
use crate::{Outcome, cell, view};

pub(super) const WRITER: Program = Program::C("writer");

pub(super) const CASES: &[Case] = &[
    Case { name: "chain_random", test: || random(1, false), programs: &[WRITER] },
    Case { name: "chain_random_tracked", test: || random(2, true), programs: &[WRITER] },
    Case { name: "chain_broken", test: broken, programs: &[WRITER] },
];

const CHAINS: u32 = 25;
const PAGE: usize = 4096;

/// What is to be found again: of each process the areas that it has reported.
pub(super) struct Model {
    step: u64,
    processes: BTreeMap<u32, Vec<Area>>,
}

struct Area {
    start: u64,
    /// It was given to MADV_FREE.
    loose: bool,
    contents: Vec<u8>,
}

impl Model {
    /// As a quiet tree is now.
    fn of(target: &Target, step: u64) -> Result<Self, String> {
        let processes = view::tree(target.pid).into_iter().map(|pid| Ok((pid, areas(target, pid)?)));
        Ok(Self { step, processes: processes.collect::<Result<_, String>>()? })
    }

    /// Is the tree now what it was then?
    pub(super) fn compare(&self, pid: u32) -> Outcome {
        let pids: Vec<u32> = view::tree(pid).into_iter().collect();
        ensure(pids.iter().eq(self.processes.keys()), || {
            format!("{pids:?}, not {:?}", self.processes.keys())
        })?;
        for (pid, areas) in &self.processes {
            for area in areas {
                let now = contents(*pid, area.start, area.contents.len())?;
                let pages = area.contents.chunks(PAGE).zip(now.chunks(PAGE)).enumerate();
                for (index, (then, now)) in pages {
                    let freed = area.loose && now.iter().all(|byte| *byte == 0);
                    ensure(then == now || freed, || {
                        format!("{pid}, step {}: page {index} of the area at {:x}", self.step, area.start)
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// What a process has reported, read from outside.
fn areas(target: &Target, pid: u32) -> Result<Vec<Area>, String> {
    let report = target.file(&format!("at.{pid}")).ok_or("no report")?;
    let area = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let [start, len, loose] = words[..] else { return Err(format!("{line:?}")) };
        let start = u64::from_str_radix(start.trim_start_matches("0x"), 16).map_err(|e| e.to_string())?;
        let len = len.parse().map_err(|_| line.to_owned())?;
        Ok(Area { start, loose: loose == "1", contents: contents(pid, start, len)? })
    };
    report.lines().skip(1).map(area).collect()
}

fn contents(pid: u32, start: u64, len: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; len];
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(|e| e.to_string())?;
    memory.read_exact_at(&mut bytes, start).map_err(|e| format!("{pid} at {start:x}: {e}"))?;
    Ok(bytes)
}

/// A writer, and the images that there are of it.
pub(super) struct Writer {
    pub(super) target: Target,
    step: u64,
}

impl Writer {
    pub(super) fn start(seed: u64) -> Result<Self, String> {
        Ok(Self { target: Target::start(WRITER, &[&seed.to_string()])?, step: 0 })
    }

    /// Lets all of them change something, and waits until they have.
    pub(super) fn change(&mut self) -> Outcome {
        self.step += 1;
        self.tell(self.step)?;
        let started = Instant::now();
        let reached = |pid| {
            let report = self.target.file(&format!("at.{pid}")).unwrap_or_default();
            report.lines().next() == Some(self.step.to_string().as_str())
        };
        // The root has its new children before it reports.
        while !reached(self.target.pid) || !view::tree(self.target.pid).into_iter().all(reached) {
            ensure(
                started.elapsed() < Duration::from_secs(20) && self.target.file("result").is_none(),
                || format!("step {}: {:?}\n{}", self.step, self.target.file("result"), view::whereabouts()),
            )?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// A process that has done this step already does nothing.
    fn tell(&self, step: u64) -> Outcome {
        let new = self.target.dir().join("step.new");
        fs::write(&new, step.to_string()).map_err(|e| e.to_string())?;
        fs::rename(new, self.target.dir().join("step")).map_err(|e| e.to_string())
    }

    pub(super) fn model(&self) -> Result<Model, String> {
        Model::of(&self.target, self.step)
    }

    pub(super) fn dump(
        &self,
        index: usize,
        after: AfterDump,
        tracker: Option<&mut Tracker>,
    ) -> Result<CheckpointStats, String> {
        let checkpoint = self.checkpoint(index, tracker).after(after);
        checkpoint.write_to(image(index)).map(|dumped| dumped.stats).map_err(|error| error.to_string())
    }

    /// While it goes on: it changes something when some of its pages have been read.
    fn pre_dump(&mut self, index: usize, tracker: Option<&mut Tracker>) -> Result<CheckpointStats, String> {
        let checkpoint = self.checkpoint(index, tracker);
        let dumped = checkpoint.hooks(&mut Meanwhile(Some(self))).pre_dump(image(index));
        dumped.map(|dumped| dumped.stats).map_err(|error| error.to_string())
    }

    /// To be the child of the image before.
    fn checkpoint<'t>(&self, index: usize, tracker: Option<&'t mut Tracker>) -> Checkpoint<'t> {
        let mut checkpoint = Checkpoint::of(self.target.pid);
        if let Some(tracker) = tracker {
            checkpoint = checkpoint.tracker(tracker);
        }
        match index.checked_sub(1) {
            Some(parent) => checkpoint.parent(image(parent)),
            None => checkpoint,
        }
    }

    fn kill(&self) -> Outcome {
        view::tree(self.target.pid).into_iter().try_for_each(|pid| {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), Signal::SIGKILL)
                .map_err(|errno| errno.to_string())
        })?;
        nothing_left()
    }

    /// Brings back what this image holds, which must be what the model says.
    fn restore(&self, index: usize, model: &Model) -> Outcome {
        self.tell(model.step)?;
        Restore::from(image(index)).run().map_err(|error| format!("image {index}: {error}"))?.detach();
        model.compare(self.target.pid).map_err(|why| format!("image {index}: {why}"))
    }
}

/// Has a writer change something once, in the middle of a pre-dump.
struct Meanwhile<'w>(Option<&'w mut Writer>);

impl Hooks for Meanwhile<'_> {
    fn progress(&mut self, _: Progress) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.take().map_or(Ok(()), Writer::change)?)
    }
}

pub(super) fn image(index: usize) -> PathBuf {
    cell::lab().join(format!("chain.{index}"))
}

fn random(seed: u64, tracked: bool) -> Outcome {
    let mut dice = Dice::new();
    let mut writer = Writer::start(seed)?;
    let (mut inherited, mut compared) = (0, 0);
    for chain in 0..CHAINS {
        let depth = if chain == 0 { 10 } else { 2 + dice.roll(9).min(dice.roll(9)) as usize };
        let failed = |why| format!("chain {chain} of {depth}: {why}");
        let mut models = Vec::new();
        let mut tracker = tracked.then(Tracker::new);
        for index in 0..depth {
            if index + 1 < depth && dice.roll(3) == 0 {
                let stats = writer.pre_dump(index, tracker.as_mut()).map_err(failed)?;
                inherited += stats.pages_in_parent;
                models.push(None);
                continue;
            }
            writer.change().map_err(failed)?;
            let model = writer.model()?;
            let after = if index + 1 == depth { AfterDump::Kill } else { AfterDump::Resume };
            let stats = writer.dump(index, after, tracker.as_mut()).map_err(failed)?;
            inherited += stats.pages_in_parent;
            compared += stats.pages_compared;
            if after == AfterDump::Resume {
                model.compare(writer.target.pid).map_err(failed)?;
            }
            models.push(Some(model));
        }
        nothing_left()?;
        // Any of them, and then the last.
        let any = dice.roll(depth as u64) as usize;
        match &models[any] {
            Some(model) => {
                writer.restore(any, model).map_err(failed)?;
                writer.kill()?;
            }
            None => match Restore::from(image(any)).run() {
                Err(error) if error.kind() == ErrorKind::Image && error.hint().is_some() => {}
                other => return Err(failed(format!("a pre-dump was restored: {other:?}"))),
            },
        }
        let last = models.pop().flatten().ok_or("no model")?;
        if chain % 2 == 0 {
            cryosleep::flatten(image(depth - 1), image(depth)).map_err(|error| failed(error.to_string()))?;
            (0..depth).try_for_each(|index| fs::remove_dir_all(image(index)).map_err(text))?;
            writer.restore(depth, &last).map_err(failed)?;
            fs::remove_dir_all(image(depth)).map_err(text)?;
            continue;
        }
        writer.restore(depth - 1, &last).map_err(failed)?;
        (0..depth).try_for_each(|index| fs::remove_dir_all(image(index)).map_err(|e| e.to_string()))?;
    }
    ensure(inherited > 10_000, || format!("only {inherited} pages were left to parents"))?;
    ensure(!tracked || compared < inherited / 2, || format!("{compared} pages were compared"))?;
    writer.target.go()?;
    writer.target.verdict()
}

/// A chain of three: what is wrong with any of its images is said, and leaves no task behind.
fn broken() -> Outcome {
    let mut writer = Writer::start(3)?;
    for index in 0..3 {
        writer.change()?;
        let model = writer.model()?;
        writer.dump(index, if index == 2 { AfterDump::Kill } else { AfterDump::Resume }, None)?;
        if index == 2 {
            nothing_left()?;
            same_place(&writer)?;
            damage(&writer)?;
            // Together they can be moved.
            let moved = cell::lab().join("moved");
            fs::create_dir(&moved).map_err(text)?;
            for index in 0..3 {
                fs::rename(image(index), moved.join(format!("chain.{index}"))).map_err(text)?;
            }
            Restore::from(moved.join("chain.2")).run().map_err(|error| error.to_string())?.detach();
            model.compare(writer.target.pid)?;
        }
    }
    writer.target.go()?;
    writer.target.verdict()
}

/// What is wrong with a parent is said, with what can be done about it.
fn refused(says: &str) -> Outcome {
    let error = damaged(says)?;
    ensure(error.hint().is_some(), || format!("no hint: {error}"))
}

fn damaged(says: &str) -> Result<Error, String> {
    let error = match Restore::from(image(2)).run() {
        Ok(_) => return Err("it was restored".into()),
        Err(error) => error,
    };
    nothing_left()?;
    let good = error.kind() == ErrorKind::Image && error.to_string().contains(says);
    ensure(good, || format!("instead of {says:?}: {:?}: {error}", error.kind()))?;
    match cryosleep::flatten(image(2), cell::lab().join("flat")) {
        Err(error) if error.kind() == ErrorKind::Image => Ok(error),
        other => Err(format!("flattened: {other:?}")),
    }
}

/// An image cannot take the place of one of its parents.
fn same_place(writer: &Writer) -> Outcome {
    writer.target_of(Path::new("sleep"), |pid| {
        for index in [0, 2] {
            match cryosleep::flatten(image(2), image(index)) {
                Err(error) if error.kind() == ErrorKind::Refused => {}
                other => return Err(format!("{other:?}")),
            }
            match Checkpoint::of(pid).parent(image(2)).after(AfterDump::Resume).write_to(image(index)) {
                Err(error) if error.kind() == ErrorKind::Refused => {}
                other => return Err(format!("{other:?}")),
            }
        }
        Ok(())
    })
}

impl Writer {
    fn target_of(&self, program: &Path, test: impl FnOnce(u32) -> Outcome) -> Outcome {
        let mut command = std::process::Command::new("setsid");
        command.arg(program).arg("100").stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut child = command.spawn().map_err(text)?;
        let outcome = test(child.id());
        child.kill().map_err(text)?;
        child.wait().map_err(text)?;
        outcome.and(nothing_left())
    }
}

fn damage(writer: &Writer) -> Outcome {
    for index in [1, 0] {
        let name = format!("chain.{index}");
        let away = cell::lab().join("away");
        fs::rename(image(index), &away).map_err(text)?;
        refused(&format!("{name}: it is not there"))?;
        // Another image in its place, though of the same memory.
        writer.target_of(Path::new("sleep"), |pid| {
            Checkpoint::of(pid).write_to(image(index)).map(drop).map_err(|error| error.to_string())
        })?;
        refused(&name)?;
        fs::remove_dir_all(image(index)).map_err(text)?;
        fs::rename(&away, image(index)).map_err(text)?;
        for file in fs::read_dir(image(index)).map_err(text)?.flatten().map(|entry| entry.path()) {
            let good = fs::read(&file).map_err(text)?;
            if file.to_string_lossy().contains("page") {
                fs::write(&file, good.iter().map(|byte| !byte).collect::<Vec<_>>()).map_err(text)?;
                damaged(&name)?;
            } else {
                for bit in (0..20).map(|part| part * (good.len() * 8 - 1) / 19) {
                    let mut flipped = good.clone();
                    flipped[bit / 8] ^= 1 << (bit % 8);
                    fs::write(&file, flipped).map_err(text)?;
                    refused(&name).map_err(|why| format!("{}, bit {bit}: {why}", file.display()))?;
                }
            }
            fs::write(&file, &good[..good.len() - 1]).map_err(text)?;
            refused(&name)?;
            fs::write(&file, good).map_err(text)?;
        }
    }
    Ok(())
}

pub(super) fn text(error: std::io::Error) -> String {
    error.to_string()
}
