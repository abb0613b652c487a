//! The process that hosts the library: its threads, its children, its descriptors.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use cryosleep::{AfterDump, Checkpoint, Restore};
use nix::sys::wait::{WaitPidFlag, waitpid};

use super::{Case, ensure, helper_by, status_field};
use crate::Outcome;
use crate::program::{Program, Target, reap};

const COUNTER: Program = Program::StaticC("counter");
const REFUSED: Program = Program::C("refused");
const TASKS: Program = Program::C("tasks");

pub(super) const CASES: &[Case] = &[
    Case { name: "host_with_busy_threads", test: busy, programs: &[TASKS, COUNTER] },
    Case { name: "host_needs_little_memory", test: needs_little, programs: &[COUNTER] },
    Case { name: "host_keeps_nothing", test: keeps_nothing, programs: &[TASKS, REFUSED] },
];

/// Two checkpoints and two restores at once, while other threads fork, and wait for whatever child there is.
fn busy() -> Outcome {
    const ROUNDS: u32 = 15;
    let over = AtomicBool::new(false);
    let going = || !over.load(Ordering::Relaxed);
    let pause = || thread::sleep(Duration::from_micros(200));
    let targets = [(TASKS, "threads"), (COUNTER, ""), (TASKS, "sessions"), (COUNTER, "")]
        .into_iter()
        .enumerate()
        .map(|(number, (program, part))| Target::start_in(&format!("subject{number}"), program, &[part]))
        .collect::<Result<Vec<_>, _>>()?;
    thread::sleep(Duration::from_millis(60));
    thread::scope(|scope| {
        for options in [Some(WaitPidFlag::WNOHANG), Some(WaitPidFlag::WUNTRACED), None] {
            scope.spawn(move || {
                while going() {
                    let _ = waitpid(None, options);
                    pause();
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while going() {
                    // Its status may have been taken by another thread already.
                    if let Ok(mut child) = Command::new("true").spawn() {
                        let _ = child.wait();
                    }
                    pause();
                }
            });
        }
        let workers: Vec<_> = targets
            .into_iter()
            .enumerate()
            .map(|(number, mut target)| {
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        match number % 2 {
                            0 => target.dump(AfterDump::Resume).map(drop)?,
                            _ => target.dump_and_restore()?,
                        }
                    }
                    target.go()?;
                    target.stolen_verdict()
                })
            })
            .collect();
        let outcomes: Vec<Outcome> =
            workers.into_iter().map(|worker| worker.join().unwrap_or(Err("a panic".into()))).collect();
        over.store(true, Ordering::Relaxed);
        outcomes
            .into_iter()
            .enumerate()
            .try_for_each(|(number, outcome)| outcome.map_err(|e| format!("target {number}: {e}")))
    })
}

/// How much it needs depends on nothing of the target's.
fn needs_little() -> Outcome {
    const MOST: u64 = 32 * 1024;
    let target = Target::start(COUNTER, &["256"])?;
    for role in ["killing_dump", "restore"] {
        let file = target.dir().join(role);
        let mut helper = helper_by(&[], role, target.pid, target.image())?;
        let done = helper.arg(&file).status().map_err(|error| error.to_string())?;
        ensure(done.success(), || format!("{role}: {done}"))?;
        let grown: u64 = target.file(role).and_then(|text| text.parse().ok()).ok_or("it does not say")?;
        ensure((1..MOST).contains(&grown), || format!("{role}: its memory grew by {grown} kB"))?;
        if role == "killing_dump" {
            reap(target.pid());
        }
    }
    target.go()?;
    target.verdict()
}

/// What this process holds, by kind.
fn holdings() -> BTreeMap<&'static str, u64> {
    let entries = |dir: &str| fs::read_dir(dir).into_iter().flatten().count() as u64;
    BTreeMap::from([
        ("descriptors", entries("/proc/self/fd")),
        ("threads", entries("/proc/self/task")),
        ("mappings", fs::read_to_string("/proc/self/maps").unwrap_or_default().lines().count() as u64),
        (
            "children",
            fs::read_to_string("/proc/thread-self/children").unwrap_or_default().split_whitespace().count()
                as u64,
        ),
        ("kilobytes of memory", status_field("VmRSS:")),
    ])
}

/// Success and failure alike leave the host as it was.
fn keeps_nothing() -> Outcome {
    let mut target = Target::start_in("good", TASKS, &["threads"])?;
    let refused = Target::start_in("refused", REFUSED, &[])?;
    let round = |target: &mut Target| -> Outcome {
        target.dump(AfterDump::Resume)?;
        target.dump_and_restore()?;
        ensure(Checkpoint::of(refused.pid).write_to(refused.image()).is_err(), || "dumped".into())?;
        // Its pid is taken, by itself.
        ensure(Restore::from(target.image()).run().is_err(), || "restored".into())?;
        ensure(Restore::from("/nonexistent").run().is_err(), || "restored".into())
    };
    for _ in 0..5 {
        round(&mut target)?;
    }
    let before = holdings();
    for _ in 0..100 {
        round(&mut target)?;
    }
    let after = holdings();
    for (what, count) in &before {
        let now = after.get(what).copied().unwrap_or(0);
        // Memory is counted in pages that the allocator keeps for later, too.
        let slack = if what.starts_with("kilobytes") { 2048 } else { 0 };
        ensure(now <= count + slack, || format!("{what}: {count} before, {now} after 100 rounds"))?;
    }
    target.go()?;
    refused.go()?;
    target.stolen_verdict()?;
    refused.verdict()
}
