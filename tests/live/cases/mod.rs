//! What is not a subject in modes: refusals, crashes, conflicts, and the process that hosts the library.

mod caller;
mod chain;
mod crash;
pub(crate) mod criu;
mod external;
mod files;
mod freeze;
mod host;
mod huge;
mod image;
mod pids;
mod real;
mod refusal;
mod store;
mod tracking;
mod undone;
mod vdso;

use std::path::Path;
use std::process::{Child, Command, ExitCode};

use cryosleep::{AfterDump, Checkpoint, Event, Hooks, Pids, Restore, Tracker};

use crate::Outcome;
use crate::program::{Program, bare};

/// A test of its own: its name, what it does, and the programs that it needs.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) test: fn() -> Outcome,
    pub(crate) programs: &'static [Program],
}

pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        refusal::CASES,
        image::CASES,
        caller::CASES,
        chain::CASES,
        tracking::CASES,
        pids::CASES,
        crash::CASES,
        host::CASES,
        external::CASES,
        huge::CASES,
        vdso::CASES,
        files::CASES,
        freeze::CASES,
        real::CASES,
        store::CASES,
        undone::CASES,
    ]
    .into_iter()
    .flatten()
}

const HELPER: &str = "CRYOSLEEP_HELPER";

/// Another process that checkpoints or restores: the test binary in this role.
fn helper(role: &str, pid: u32, image: &Path) -> Result<Child, String> {
    helper_by(&[], role, pid, image)?.spawn().map_err(|e| e.to_string())
}

/// The same, to be started by a command that executes it.
fn helper_by(through: &[&str], role: &str, pid: u32, image: &Path) -> Result<Command, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut words = through.iter().map(|word| std::ffi::OsString::from(*word)).chain([own.into_os_string()]);
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).env(HELPER, role).arg(pid.to_string()).arg(image);
    Ok(command)
}

/// Says when it begins with what matters, after all preparations: by a line on stdout.
struct Herald;

impl Hooks for Herald {
    fn event(&mut self, event: Event) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if let Event::PreDump { .. } | Event::PreRestore { .. } = event {
            println!("begins");
        }
        Ok(())
    }
}

/// Where a helper makes one image of a chain.
fn flat(image: &Path) -> std::path::PathBuf {
    image.with_extension("flat")
}

/// What a helper does. Exit code 0: done; 2: refused; 1: another error.
pub(crate) fn help() -> Option<ExitCode> {
    let role = std::env::var(HELPER).ok()?;
    let arguments: Vec<String> = std::env::args().collect();
    let pid: u32 = arguments.get(1)?.parse().ok()?;
    let image = arguments.get(2)?;
    let hooks = &mut Herald;
    // The highest that its memory has been at, from here on.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let before = status_field("VmHWM:");
    let done = match role.as_str() {
        "dump" => Checkpoint::of(pid).after(AfterDump::Resume).hooks(hooks).write_to(image).map(drop),
        "bare_dump" => {
            bare(Checkpoint::of(pid)).after(AfterDump::Resume).hooks(hooks).write_to(image).map(drop)
        }
        "tracked_dump" => {
            let tracked = &mut Tracker::new();
            let checkpoint = Checkpoint::of(pid).after(AfterDump::Resume).tracker(tracked);
            checkpoint.hooks(hooks).write_to(image).map(drop)
        }
        "pre_dump" => Checkpoint::of(pid).hooks(hooks).pre_dump(image).map(drop),
        // To nowhere; what becomes of the stream does not matter here.
        "stream" => Checkpoint::of(pid)
            .after(AfterDump::Resume)
            .hooks(hooks)
            .write_to_stream(std::io::sink())
            .map(drop),
        "flatten" => {
            println!("begins");
            cryosleep::flatten(image, flat(Path::new(image)))
        }
        "killing_dump" => Checkpoint::of(pid).write_to(image).map(drop),
        "clone" => Restore::from(image).pids(Pids::NewNamespace).hooks(hooks).run().map(drop),
        _ => Restore::from(image).hooks(hooks).run().map(drop),
    };
    if let Some(file) = arguments.get(3) {
        let _ = std::fs::write(file, (status_field("VmHWM:") - before).to_string());
    }
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::from(if error.kind() == cryosleep::ErrorKind::Refused { 2 } else { 1 })
        }
    })
}

/// The number that /proc/self/status has there; 0: it has none.
fn status_field(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// The smallest sufficient source of randomness.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below.max(1)
    }
}

/// Turns a wrong value into the reason of a failure.
fn ensure(condition: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(otherwise()) }
}
