//! kill -9 of whoever checkpoints or restores, at any moment.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use cryosleep::inspect::Inspection;
use cryosleep::{AfterDump, Checkpoint};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Case, Dice, ensure, flat, helper, helper_by};
use crate::program::{Program, Target, nothing_left, others, reap};
use crate::{Outcome, view};

const COUNTER: Program = Program::StaticC("counter");
const REGISTERS: Program = Program::C("registers");
const SIGNALS: Program = Program::C("signals");
const BLOCKED: Program = Program::C("blocked");
const TASKS: Program = Program::C("tasks");
const MAPPINGS: Program = Program::C("mappings");
const SHARING: Program = Program::C("sharing");

pub(super) const CASES: &[Case] = &[
    Case { name: "crash_of_dump_counter", test: || dump(COUNTER, ""), programs: &[COUNTER] },
    // So large that the target is given more threads to write it.
    Case {
        name: "crash_of_dump_large",
        test: || dump_in(ROUNDS, "bare_dump", when_helped, COUNTER, &["48"]),
        programs: &[COUNTER],
    },
    // These stop before they end.
    Case {
        name: "crash_of_dump_stopping",
        test: || dump_in(16, "bare_dump", when_helped, COUNTER, &["48", "1000", "0", "heeds all"]),
        programs: &[COUNTER],
    },
    Case {
        name: "crash_of_dump_lending",
        test: || dump_in(16, "bare_dump", when_lent, COUNTER, &["8", "1000", "0", "heeds all"]),
        programs: &[COUNTER],
    },
    Case {
        name: "crash_of_dump_tracked",
        test: || dump_in(16, "tracked_dump", when_lent, COUNTER, &[]),
        programs: &[COUNTER],
    },
    Case { name: "crash_of_dump_registers", test: || dump(REGISTERS, "spin512"), programs: &[REGISTERS] },
    Case { name: "crash_of_dump_threads", test: || dump(TASKS, "threads"), programs: &[TASKS] },
    Case { name: "crash_of_dump_pending", test: || dump(SIGNALS, "pending_others"), programs: &[SIGNALS] },
    Case { name: "crash_of_dump_altstack", test: || dump(SIGNALS, "altstack"), programs: &[SIGNALS] },
    Case { name: "crash_of_dump_poll", test: || dump(BLOCKED, "poll"), programs: &[BLOCKED] },
    Case { name: "crash_of_dump_tree", test: || dump(TASKS, "sessions"), programs: &[TASKS] },
    Case {
        name: "crash_of_dump_many",
        test: || dump_in(20, "dump", sometime, MAPPINGS, &["crowd"]),
        programs: &[MAPPINGS],
    },
    Case {
        name: "crash_of_dump_sharing",
        test: || dump_in(20, "dump", sometime, SHARING, &["living"]),
        programs: &[SHARING],
    },
    Case {
        name: "crash_of_pre_dump",
        test: || dump_in(15, "pre_dump", sometime, TASKS, &["threads"]),
        programs: &[TASKS],
    },
    Case {
        name: "crash_of_dump_to_stream",
        test: || dump_in(15, "stream", sometime, TASKS, &["threads"]),
        programs: &[TASKS],
    },
    Case { name: "crash_of_flatten", test: flatten, programs: &[COUNTER] },
    Case { name: "crash_of_restore_counter", test: || restore(COUNTER, ""), programs: &[COUNTER] },
    Case { name: "crash_of_restore_threads", test: || restore(TASKS, "threads"), programs: &[TASKS] },
    Case { name: "crash_of_restore_tree", test: || restore(TASKS, "sessions"), programs: &[TASKS] },
    Case {
        name: "crash_of_restore_namespace",
        test: || restore_in(20, "clone", TASKS, "sessions"),
        programs: &[TASKS],
    },
    Case {
        name: "crash_of_restore_sharing",
        test: || restore_in(8, "restore", SHARING, "living"),
        programs: &[SHARING],
    },
];

const ROUNDS: u32 = 40;

/// A slow machine has fewer rounds.
fn rounds(most: u32) -> impl Iterator<Item = u32> {
    let started = Instant::now();
    (0..most).take_while(move |_| started.elapsed() < Duration::from_secs(25))
}

/// A helper that has just begun.
fn begun(role: &str, pid: u32, image: &Path) -> Result<Child, String> {
    let mut child = helper_by(&[], role, pid, image)?.stdout(Stdio::piped()).spawn().map_err(text)?;
    let mut line = [0; b"begins\n".len()];
    child.stdout.as_mut().map_or(Ok(()), |stdout| stdout.read_exact(&mut line)).map_err(text)?;
    Ok(child)
}

/// Waits until a helper is to be killed: the target, and the time that a whole run takes.
type Moment = fn(u32, Duration, &mut Dice);

/// After some part of that time.
fn sometime(_: u32, whole: Duration, dice: &mut Dice) {
    std::thread::sleep(Duration::from_micros(dice.roll(whole.as_micros() as u64 * 5 / 4)));
}

/// As soon as the target has a descriptor that is not its own, or soon after: it has few of them.
fn when_lent(pid: u32, whole: Duration, dice: &mut Dice) {
    let at = |number: u32| PathBuf::from(format!("/proc/{pid}/fd/{number}"));
    let lent = (0..).map(at).find(|path| path.symlink_metadata().is_err()).unwrap_or_default();
    soon_after(|| lent.symlink_metadata().is_ok(), whole, dice);
}

/// Sometime, or when the target has more than the one thread that it is.
fn when_helped(pid: u32, whole: Duration, dice: &mut Dice) {
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    match dice.roll(2) {
        0 => sometime(pid, whole, dice),
        _ => soon_after(|| threads() > 1, whole, dice),
    }
}

/// As soon as this is seen, or later.
fn soon_after(seen: impl Fn() -> bool, whole: Duration, dice: &mut Dice) {
    let started = Instant::now();
    while !seen() && started.elapsed() < whole * 2 {}
    // Soon, or at any time in what is left.
    let most = [0, 0, 500, whole.as_micros() as u64 / 2];
    let most = most[dice.roll(4) as usize];
    std::thread::sleep(Duration::from_micros(dice.roll(most + 1)));
}

/// Runs a helper and kills it.
fn interrupted(
    (role, moment): (&str, Moment),
    pid: u32,
    image: &Path,
    whole: Duration,
    dice: &mut Dice,
) -> Outcome {
    let mut child = begun(role, pid, image)?;
    moment(pid, whole, dice);
    child.kill().map_err(text)?;
    child.wait().map(drop).map_err(text)
}

/// How long a helper takes that nobody disturbs.
fn measure(role: &str, pid: u32, image: &Path) -> Result<Duration, String> {
    let mut child = begun(role, pid, image)?;
    let started = Instant::now();
    let status = child.wait().map_err(text)?;
    ensure(status.success(), || format!("the helper ended by {status}"))?;
    Ok(started.elapsed())
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

fn dump(program: Program, part: &str) -> Outcome {
    dump_in(ROUNDS, "dump", sometime, program, &[part])
}

/// The target runs on, or is stopped and goes on after SIGCONT.
fn dump_in(most: u32, role: &str, moment: Moment, program: Program, args: &[&str]) -> Outcome {
    let target = Target::start(program, args)?;
    std::thread::sleep(Duration::from_millis(60));
    let all: BTreeSet<u32> = view::tree(target.pid);
    let before = held(&all);
    let (mut dice, mut stopped) = (Dice::new(), 0);
    if role == "stream" {
        target.dump(AfterDump::Resume)?; // the one that stays
    }
    let whole = measure(role, target.pid, target.image())?;
    for round in rounds(most) {
        interrupted((role, moment), target.pid, target.image(), whole, &mut dice)?;
        let alive = view::tree(target.pid);
        ensure(alive == all && all.iter().all(|pid| view::state(*pid) != 'Z'), || {
            let said = (target.file("result"), waitpid(target.pid(), Some(WaitPidFlag::WNOHANG)));
            format!("round {round}: of {all:?} are left {alive:?}, saying {said:?}\n{}", view::whereabouts())
        })?;
        // Or the next checkpoint comes upon it as it was left.
        if dice.roll(3) == 0 {
            stopped += continue_stopped(&all)?;
        }
        // The image of a round before, or that of this one: whichever it is, it is whole.
        let whole = Inspection::open(target.image()).and_then(|image| image.verify_pages());
        whole.map_err(|error| format!("round {round}: {error}"))?;
    }
    println!("stopped {stopped} times in at most {most} rounds of {whole:?}");
    // A task that was in the middle of a batch stops at its end, perhaps only now; even if it was stopped before.
    let (started, mut quiet) = (Instant::now(), 0);
    while quiet < 3 && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(25));
        quiet = if continue_stopped(&all)? == 0 { quiet + 1 } else { 0 };
    }
    for pid in view::tree(target.pid) {
        let state = view::state(pid);
        ensure(!matches!(state, 'T' | 't'), || format!("{pid} is in state {state}"))?;
    }
    // And it can still be checkpointed.
    target.dump(AfterDump::Resume)?;
    let after = held(&all);
    ensure(before == after, || format!("descriptors and threads: {before:?} instead of {after:?}"))?;
    target.go()?;
    target.verdict()
}

/// The chain stays good, and the one image that is made of it is whole.
fn flatten() -> Outcome {
    const ROUNDS: u32 = 8;
    let target = Target::start(COUNTER, &["16"])?;
    target.dump(AfterDump::Resume)?;
    let child = target.image().with_extension("child");
    let checkpoint = Checkpoint::of(target.pid).after(AfterDump::Resume).parent(target.image());
    checkpoint.write_to(&child).map_err(|error| error.to_string())?;
    let whole = measure("flatten", 0, &child)?;
    let mut dice = Dice::new();
    for round in 0..ROUNDS {
        interrupted(("flatten", sometime), 0, &child, whole, &mut dice)?;
        for image in [&child, &flat(&child)] {
            let whole = Inspection::open(image).and_then(|image| image.verify_pages());
            whole.map_err(|error| format!("round {round}: {}: {error}", image.display()))?;
        }
    }
    target.go()?;
    target.verdict()
}

/// The open descriptors and the threads of each.
fn held(all: &BTreeSet<u32>) -> Vec<[BTreeSet<String>; 2]> {
    let names = |path: String| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    all.iter().map(|pid| ["fd", "task"].map(|of| names(format!("/proc/{pid}/{of}")))).collect()
}

/// Sends SIGCONT to those that are stopped; says how many.
fn continue_stopped(all: &BTreeSet<u32>) -> Result<u32, String> {
    let stopped = all.iter().filter(|pid| view::state(**pid) == 'T');
    stopped
        .map(|pid| kill(Pid::from_raw(*pid as i32), Signal::SIGCONT).map(|()| 1).map_err(|e| e.to_string()))
        .sum()
}

/// Who is left when those that are being killed have gone: nobody, or all of so many, ready.
fn settled(all: usize) -> BTreeSet<u32> {
    let started = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(5));
        let left: BTreeSet<u32> = others().into_iter().filter(|pid| view::state(*pid) != 'Z').collect();
        let whole = left.len() == all && left.iter().all(is_ready);
        if left.is_empty() || whole || started.elapsed() > Duration::from_secs(3) {
            return left;
        }
    }
}

/// It is what it was, or the process 1 that was made for it, and nobody traces it.
fn is_ready(pid: &u32) -> bool {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let is_init = exe.to_string_lossy().starts_with("/memfd:cryosleep-stub")
        && status.contains("Name:\tcryosleep-init");
    (exe.starts_with(crate::cell::scratch()) || is_init) && status.contains("TracerPid:\t0\n")
}

/// What has been restored finds itself to be right, and ends. No: it was about to be killed.
fn lives_on(target: &Target) -> Result<bool, String> {
    target.go()?;
    let (started, mut killed) = (Instant::now(), false);
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(_) => break, // all have ended
            Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => killed = true,
            Ok(WaitStatus::StillAlive) if started.elapsed() > Duration::from_secs(20) => break,
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(5)),
            Ok(_) => {}
        }
    }
    let result = target.file("result");
    let right = result.as_deref() == Some("ok\n");
    ensure(right || killed && result.is_none(), || format!("it says {result:?}\n{}", view::whereabouts()))?;
    for name in ["go", "result"] {
        let _ = std::fs::remove_file(target.dir().join(name));
    }
    Ok(right)
}

fn restore(program: Program, part: &str) -> Outcome {
    restore_in(ROUNDS, "restore", program, part)
}

/// Nothing of the target is there, or all of it, and that is right.
fn restore_in(most: u32, role: &str, program: Program, part: &str) -> Outcome {
    let target = Target::start(program, &[part])?;
    std::thread::sleep(Duration::from_millis(60));
    let all = view::tree(target.pid);
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    nothing_left()?;
    let mut dice = Dice::new();
    let whole = measure(role, target.pid, target.image())?;
    let mut complete = 0;
    let end = || {
        for pid in others() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        nothing_left()
    };
    end()?;
    for round in rounds(most) {
        interrupted((role, sometime), target.pid, target.image(), whole, &mut dice)?;
        let left = settled(all.len() + usize::from(role == "clone"));
        if left.is_empty() {
            nothing_left()?;
            continue;
        }
        // The release of a tree is one detach after the other: a kill in between ends those that are not free
        // yet. But nothing may be left that is not ready.
        let whole = left.len() == all.len() + usize::from(role == "clone");
        ensure(left.iter().all(is_ready) && (whole || all.len() > 1), || {
            format!("round {round}: of {all:?} are left {left:?}\n{}", view::whereabouts())
        })?;
        if whole && lives_on(&target).map_err(|why| format!("round {round}: {why}"))? {
            complete += 1;
        }
        end()?;
    }
    println!("complete {complete} times in at most {most} rounds of {whole:?}");
    // The image is as good as it was, and what has been restored does not need who has done it.
    let status = helper(role, target.pid, target.image())?.wait().map_err(text)?;
    ensure(status.success(), || status.to_string())?;
    ensure(lives_on(&target)?, || "it has ended with who has restored it".into())?;
    nothing_left()
}
