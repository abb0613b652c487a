//! Pid namespaces: one image that lives several times at once, process 1, what is outside of a namespace.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use cryosleep::{
    AfterDump, Checkpoint, ErrorKind, Event, Exit, Hooks, OuterSession, Pids, Restore, Restored, Subject,
};
use nix::sys::wait::{WaitStatus, waitpid};

use super::{Case, ensure};
use crate::program::{Program, Target, nothing_left, others, reap};
use crate::{Outcome, view};

const PIDS: Program = Program::C("pids");
const FILES: Program = Program::C("files");
const EVENTS: Program = Program::C("eventfiles");

pub(super) const CASES: &[Case] = &[
    Case { name: "pids_of_five_clones", test: clones, programs: &[PIDS] },
    Case { name: "pids_taken_and_not", test: taken, programs: &[PIDS] },
    Case { name: "pids_killed_root", test: killed, programs: &[PIDS] },
    Case { name: "pids_killed_init", test: killed_init, programs: &[PIDS] },
    Case { name: "pids_after_a_veto", test: vetoed, programs: &[PIDS] },
    Case { name: "pids_process_1", test: process_1, programs: &[PIDS] },
    Case { name: "pids_outer_session", test: outer_session, programs: &[PIDS] },
    Case { name: "pids_in_open_files", test: open_files, programs: &[FILES, EVENTS] },
    Case { name: "pids_in_open_files_inside", test: open_files_inside, programs: &[PIDS] },
    Case { name: "pids_nested", test: nested, programs: &[PIDS] },
];

/// How the subject ends when all its numbers are right.
const RIGHT: Exit = Exit::Code(42);

fn into_new(image: &Path) -> Result<Restored, String> {
    Restore::from(image).pids(Pids::NewNamespace).run().map_err(|error| error.to_string())
}

fn ended(target: &Target, restored: Restored, as_expected: Exit) -> Outcome {
    let exit = restored.wait().map_err(|error| error.to_string())?;
    ensure(exit == as_expected, || format!("{exit:?}, saying {:?}", target.file("result")))
}

fn clones() -> Outcome {
    let target = Target::start(PIDS, &["clone"])?;
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    nothing_left()?;
    let clones: Vec<Restored> = (0..5).map(|_| into_new(target.image())).collect::<Result<_, _>>()?;
    let mut all = BTreeSet::new();
    for clone in &clones {
        let pid = clone.pid().get();
        let init = clone.init().ok_or("it has no process 1")?.get();
        ensure(clone.inner_pid() == target.pid, || {
            format!("{} instead of {}", clone.inner_pid(), target.pid)
        })?;
        ensure(clone.stats.tasks == 3, || format!("{:?}", clone.stats))?;
        for (here, own) in [(pid, target.pid), (init, 1)] {
            let numbers = view::numbers_of(here);
            ensure(numbers == [here, own], || format!("{numbers:?} instead of {here} {own}"))?;
            ensure(all.insert(here), || format!("{here} is there twice"))?;
        }
        // Nothing of ours is left in process 1 when it has had the time to unmap it.
        let maps = || std::fs::read_to_string(format!("/proc/{init}/maps")).unwrap_or_default();
        let started = Instant::now();
        while maps().lines().count() >= 8 && started.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
        ensure((1..8).contains(&maps().lines().count()), maps)?;
        let open = std::fs::read_dir(format!("/proc/{init}/fd")).map_err(|e| e.to_string())?.count();
        ensure(open == 0, || format!("{open} descriptors"))?;
    }
    target.go()?;
    clones.into_iter().try_for_each(|clone| ended(&target, clone, RIGHT))?;
    nothing_left()
}

/// Beside the original that runs on.
fn taken() -> Outcome {
    let target = Target::start(PIDS, &["clone"])?;
    target.dump(AfterDump::Resume)?;
    match Restore::from(target.image()).run() {
        Ok(_) => return Err("two have the same number".into()),
        Err(error) => ensure(error.kind() == ErrorKind::Conflict, || error.to_string())?,
    }
    let clone = into_new(target.image())?;
    target.go()?;
    init_ends(clone, 42)?;
    // The original's orphan comes to us, its process 1.
    let original = loop {
        match waitpid(None, None) {
            Ok(status) if status.pid() != Some(target.pid()) => {}
            status => break status,
        }
    };
    ensure(matches!(original, Ok(WaitStatus::Exited(_, 42))), || format!("{original:?}"))?;
    nothing_left()
}

fn killed() -> Outcome {
    let target = Target::start(PIDS, &["killed"])?;
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    target.go()?;
    ended(&target, into_new(target.image())?, Exit::Signal(9))?;
    // What process 1 makes of it.
    init_ends(into_new(target.image())?, 128 + 9)?;
    nothing_left()
}

/// Its process 1 ends with this code.
fn init_ends(restored: Restored, code: i32) -> Outcome {
    let init = restored.init().ok_or("it has no process 1")?;
    let end = waitpid(nix::unistd::Pid::from_raw(init.get() as i32), None);
    ensure(matches!(end, Ok(WaitStatus::Exited(_, ended)) if ended == code), || format!("process 1: {end:?}"))
}

/// All of the namespace ends with its process 1.
fn killed_init() -> Outcome {
    let target = Target::start(PIDS, &["clone"])?;
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    let restored = into_new(target.image())?;
    let init = restored.init().ok_or("it has no process 1")?;
    let init = nix::unistd::Pid::from_raw(init.get() as i32);
    nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL).map_err(|e| e.to_string())?;
    ended(&target, restored, Exit::Signal(9))?;
    nothing_left()
}

/// The last moment at which an error undoes all.
struct Veto(u32);

impl Hooks for Veto {
    fn event(&mut self, event: Event) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match event {
            Event::PreResume { root } if view::numbers_of(root.get()) == [root.get(), self.0] => {
                Err("not now".into())
            }
            _ => Ok(()),
        }
    }
}

fn vetoed() -> Outcome {
    let target = Target::start(PIDS, &["clone"])?;
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    let mut veto = Veto(target.pid);
    match Restore::from(target.image()).pids(Pids::NewNamespace).hooks(&mut veto).run() {
        Ok(_) => return Err("it runs".into()),
        Err(error) => ensure(error.kind() == ErrorKind::Hook, || error.to_string())?,
    }
    let left = others();
    ensure(left.is_empty(), || format!("left: {left:?}\n{}", view::whereabouts()))
}

/// The root is process 1, and becomes it again; its parent and its session are outside.
fn process_1() -> Outcome {
    for through in [&[][..], &["setsid"]] {
        let name = format!("init-{}", through.len());
        let target = Target::start_as_init(&name, PIDS, &["clone"], through)?;
        let numbers = view::numbers_of(target.pid);
        ensure(numbers.last() == Some(&1), || format!("{numbers:?}"))?;
        target.dump(AfterDump::Kill)?;
        let restored = into_new(target.image())?;
        ensure(restored.inner_pid() == 1 && restored.init().is_none(), || format!("{restored:?}"))?;
        target.go()?;
        ended(&target, restored, RIGHT)?;
    }
    Ok(())
}

/// The session and group that the root is in are made anew, or are those of whoever restores.
fn outer_session() -> Outcome {
    let target = Target::start(PIDS, &["member"])?;
    let member = view::tree(target.pid).into_iter().nth(1).ok_or("it has no child")?;
    // Of the session: it goes with one that is made anew, and leaves that of whoever restores alone.
    let autogroup = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/autogroup")).unwrap_or_default();
    let ours = autogroup("self");
    std::fs::write(format!("/proc/{member}/autogroup"), "5").map_err(|e| e.to_string())?;
    let dumped = Checkpoint::of(member).write_to(target.image()).map_err(|error| error.to_string())?;
    ensure(dumped.root.get() == member, || format!("{dumped:?}"))?;
    reap(target.pid());
    let same = into_new(target.image())?;
    let theirs = autogroup(&same.pid().to_string());
    ensure(theirs.ends_with("nice 5\n"), || theirs)?;
    target.go()?;
    ended(&target, same, RIGHT)?;
    std::fs::write(target.dir().join("inherited"), "").map_err(|e| e.to_string())?;
    let inherited =
        Restore::from(target.image()).pids(Pids::NewNamespace).outer_session(OuterSession::Inherit);
    ended(&target, inherited.run().map_err(|error| error.to_string())?, RIGHT)?;
    ensure(autogroup("self") == ours, || ours)?;
    nothing_left()
}

/// Files of /proc are found by numbers that change where there is more than one namespace.
fn open_files() -> Outcome {
    cannot_move(FILES, "proc", "files of /proc")?;
    // Nor are there any dead in a new namespace.
    cannot_move(EVENTS, "pidfds", "a process that is gone")
}

fn cannot_move(program: Program, part: &str, why: &str) -> Outcome {
    let target = Target::start_in(part, program, &[part])?;
    target.dump(AfterDump::Resume)?;
    match Restore::from(target.image()).pids(Pids::NewNamespace).run() {
        Ok(_) => return Err("it was restored".into()),
        Err(error) => {
            let text = error.to_string();
            ensure(error.kind() == ErrorKind::Conflict && text.contains(why), || text)?;
        }
    }
    target.go()?;
    target.verdict()
}

fn open_files_inside() -> Outcome {
    let target = Target::start_namespaced(PIDS, &["proc"])?;
    let report = Checkpoint::of(target.pid).preflight().map_err(|error| error.to_string())?;
    let named = report.refusals().iter().any(|refusal| refusal.to_string().contains("/proc"));
    ensure(named && report.refusals().len() == 1, || format!("{:?}", report.refusals()))?;
    target.go()?;
    target.verdict()
}

fn nested() -> Outcome {
    let target = Target::start(PIDS, &["nested"])?;
    let report = Checkpoint::of(target.pid).preflight().map_err(|error| error.to_string())?;
    let refused: Vec<u32> = report.refusals().iter().map(|refusal| refusal.pid.get()).collect();
    let named = report.refusals().iter().all(|refusal| matches!(refusal.subject, Subject::Namespace("pid")));
    let all: Vec<u32> = view::tree(target.pid).into_iter().collect();
    ensure(named && refused == all && all.len() == 2, || format!("{:?}", report.refusals()))?;
    target.go()?;
    target.verdict()
}
