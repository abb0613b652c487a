//! Subjects that examples/criu.rs dumps and restores, as a driver would: by its command line, many times.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Dice, ensure};
use crate::modes::Subject;
use crate::program::Target;
use crate::{Outcome, table};

/// How often each subject goes away and comes back.
const ROUNDS: &str = "CRYOSLEEP_ROUNDS";

/// The subject, and after how many rounds it is to be started anew: a wait of 1.5 seconds has room for three.
const SUBJECTS: &[(&str, u32)] = &[
    ("static_counter", u32::MAX),
    ("dynamic_counter", u32::MAX),
    ("shell_tree", u32::MAX),
    ("python", u32::MAX),
    ("read", u32::MAX),
    ("poll", u32::MAX),
    ("poll_for", 3),
    ("select", u32::MAX),
    ("select_for", 3),
    ("futex", u32::MAX),
    ("futex_for", 3),
    ("nanosleep", 3),
    ("clock_nanosleep", 3),
    ("wait4", u32::MAX),
    ("sigsuspend", u32::MAX),
    ("sigtimedwait", 3),
    ("semop", u32::MAX),
];

fn rounds() -> u32 {
    std::env::var(ROUNDS).ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3)
}

/// What there is to test, and how long it may take.
pub(crate) fn all() -> impl Iterator<Item = (&'static str, Option<Subject>, Duration)> {
    let limit = Duration::from_secs(60) + rounds() * Duration::from_secs(5);
    SUBJECTS.iter().map(move |(name, _)| (*name, subject(name), limit))
}

fn subject(name: &str) -> Option<Subject> {
    table::SUBJECTS.iter().find(|(other, _)| *other == name).map(|(_, subject)| *subject)
}

pub(crate) fn test(name: &str) -> Outcome {
    let (Some((_, per_life)), Some(subject)) =
        (SUBJECTS.iter().find(|(other, _)| *other == name), subject(name))
    else {
        return Err(format!("no subject is called {name}"));
    };
    let criu = criu()?;
    let mut dice = Dice::new();
    let mut left = rounds();
    while left > 0 {
        let done = rounds() - left;
        let rounds = left.min(*per_life);
        let round = |at: u32| move |why: String| format!("{name}, round {}: {why}", done + at);
        let mut target = Target::start_in(&format!("after-{done}"), subject.program, subject.args)?;
        std::thread::sleep(Duration::from_millis(60));
        for at in 1..=rounds {
            std::thread::sleep(Duration::from_millis(10 + dice.roll(90)));
            once(&criu, &mut target).map_err(round(at))?;
        }
        target.go()?;
        target.verdict().map_err(round(rounds))?;
        left -= rounds;
    }
    Ok(())
}

/// Cargo builds examples for `cargo test`, but not for `cargo test --test live`.
pub(super) fn criu() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let built = own.parent().and_then(Path::parent).map(|profile| profile.join("examples/criu"));
    built.filter(|criu| criu.exists()).ok_or_else(|| {
        "examples/criu is not built: run `cargo build --example criu` (of the same profile) first".into()
    })
}

fn once(criu: &Path, target: &mut Target) -> Outcome {
    let image = target.image().to_owned();
    fs::DirBuilder::new().mode(0o700).recursive(true).create(&image).map_err(|e| e.to_string())?;
    let pid = target.pid.to_string();
    let said = image.with_extension("said");
    let run = |command: &str, log: &str, words: &[&str]| -> Outcome {
        // No pipe: what is restored must not be able to hold it open, and what failed says it in the log.
        let output = File::create(&said).map_err(|e| e.to_string())?;
        let errors = output.try_clone().map_err(|e| e.to_string())?;
        let mut line = Command::new(criu);
        line.arg(command).args(words).arg("-D").arg(&image).args(["-o", log, "-v3"]);
        let status = line.stdout(output).stderr(errors).status().map_err(|e| format!("{line:?}: {e}"))?;
        let read = |file: &Path| fs::read_to_string(file).unwrap_or_default();
        ensure(status.success(), || format!("{line:?}: {status}\n{}{}", read(&said), read(&image.join(log))))
    };
    target.leave_and_return(
        |target| run("dump", "dump.log", &["-t", &target.pid.to_string()]),
        |_| run("restore", "restore.log", &["-d", "--pidfile", "pid"]),
    )?;
    let written = fs::read_to_string(image.join("pid")).map_err(|e| format!("pidfile: {e}"))?;
    ensure(written == pid, || format!("restored as {written} instead of {pid}"))?;
    ensure(Path::new(&format!("/proc/{pid}")).exists(), || format!("{pid} does not exist"))
}
