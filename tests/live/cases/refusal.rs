//! Whatever cannot be checkpointed is refused by name, and the target goes on.

use std::time::{Duration, Instant};

use cryosleep::{AfterDump, Checkpoint, ErrorKind};
use nix::sys::signal::Signal;

use super::{Case, ensure, helper};
use crate::program::{Program, Target};
use crate::{Outcome, cell, view};

const REFUSED: Program = Program::C("refused");
const COUNTER: Program = Program::StaticC("counter");
const NUMA: Program = Program::C("numa");
const MAPPINGS: Program = Program::C("mappings");
const SECCOMP: Program = Program::C("seccomp");
const SOCKETS: Program = Program::C("sockets");
const LOCKS: Program = Program::C("locks");
const TASKS: Program = Program::C("tasks");
const COMPAT: Program = Program::C32("compat");
const TIMERS: Program = Program::C("timers");
const EVENTFILES: Program = Program::C("eventfiles");
const SHARING: Program = Program::C("sharing");

pub(super) const CASES: &[Case] = &[
    Case { name: "refusal_names_all", test: names_all, programs: &[REFUSED] },
    Case { name: "refusal_of_relatives", test: relatives, programs: &[COUNTER] },
    Case { name: "refusal_of_outer_sockets", test: outer_sockets, programs: &[SOCKETS] },
    Case { name: "refusal_of_what_is_no_process", test: no_process, programs: &[TASKS] },
    Case { name: "refusal_of_vfork_parent", test: vfork_parent, programs: &[TASKS] },
    Case { name: "refusal_of_seccomp_listener", test: seccomp_listener, programs: &[SECCOMP] },
    Case { name: "refusal_of_seccomp_without_privilege", test: seccomp_unprivileged, programs: &[SECCOMP] },
    Case { name: "refusal_of_deleted_lease", test: deleted_lease, programs: &[LOCKS] },
    Case { name: "refusal_of_fanotify_asker", test: asker, programs: &[EVENTFILES] },
    Case { name: "refusal_of_mappings", test: mappings, programs: &[MAPPINGS] },
    Case { name: "refusal_of_mapping_policy", test: mapping_policy, programs: &[NUMA] },
    Case { name: "refusal_of_32_bit_task", test: compat, programs: &[COMPAT] },
    Case { name: "refusal_of_overrun_counts", test: overrun_counts, programs: &[TIMERS] },
    Case { name: "refusal_of_impossible_sharing", test: impossible_sharing, programs: &[SHARING] },
    Case { name: "stop_after_dump", test: stop_after_dump, programs: &[TASKS] },
];

/// All reasons at once, of all processes; nothing of the target has changed.
fn names_all() -> Outcome {
    let target = Target::start(REFUSED, &[])?;
    std::thread::sleep(Duration::from_millis(60));
    let child = view::tree(target.pid).into_iter().find(|pid| *pid != target.pid).unwrap_or(0);
    for _ in 0..3 {
        let report = Checkpoint::of(target.pid).preflight().map_err(|e| e.to_string())?;
        let error = match Checkpoint::of(target.pid).write_to(target.image()) {
            Ok(_) => return Err("it was dumped".into()),
            Err(error) => error,
        };
        let text = error.to_string();
        ensure(error.kind() == ErrorKind::Unsupported, || text.clone())?;
        ensure(error.refusals().len() == report.refusals().len(), || format!("{error}\n{report:?}"))?;
        let expected = target.file("expected").unwrap_or_default();
        // fd NUMBER WORDS
        let expected = expected.lines().filter_map(|line| {
            let (fd, words) = line.strip_prefix("fd ")?.split_once(' ')?;
            Some((target.pid, format!("fd {fd} ("), words.to_owned()))
        });
        let thread = target.file("elsewhere").and_then(|tid| tid.parse().ok()).unwrap_or(0);
        let mut others = vec![
            (child, "fd ".into(), "sockets".into()),
            (thread, "uts namespace".into(), "another namespace".into()),
            (target.pid, "debug registers".into(), "breakpoints".into()),
        ];
        if let Some(tid) = target.file("dispatches").and_then(|tid| tid.parse::<u32>().ok()) {
            others.push((tid, "syscall user dispatch".into(), "not supported".into()));
        }
        if let Some(pid) = target.file("dumped_core").and_then(|pid| pid.parse().ok()) {
            others.push((pid, "wait status".into(), "dumped core".into()));
        }
        if target.file("keyrings").is_some() {
            others.push((target.pid, "keyring".into(), "process keyring".into()));
            others.push((thread, "keyring".into(), "thread keyring".into()));
        }
        for (pid, fd, words) in expected.chain(others) {
            let named = report.refusals().iter().any(|refusal| {
                let said = refusal.to_string();
                refusal.pid.get() == pid
                    && said.contains(&fd)
                    && said.contains(&words)
                    && text.contains(&said)
            });
            ensure(named, || format!("{fd}{words}) of {pid} is not named in: {error}\n{report:?}"))?;
        }
    }
    ensure(!target.image().join("manifest").exists(), || "there is an image".into())?;
    target.go()?;
    target.verdict()
}

fn kind_of(pid: u32) -> Result<ErrorKind, String> {
    match Checkpoint::of(pid).write_to(cell::lab().join("never")) {
        Ok(_) => Err(format!("{pid} was dumped")),
        Err(error) => Ok(error.kind()),
    }
}

/// Neither itself nor its ancestors.
fn relatives() -> Outcome {
    let own = kind_of(std::process::id())?;
    ensure(own == ErrorKind::Refused, || format!("itself: {own:?}"))?;
    let child = helper("dump", std::process::id(), &cell::lab().join("never"))?.wait();
    ensure(child.as_ref().is_ok_and(|status| status.code() == Some(2)), || format!("its parent: {child:?}"))
}

/// A child alone, with its end of a pair that it has made, and with both ends of those that its parent has made.
fn outer_sockets() -> Outcome {
    let target = Target::start(SOCKETS, &[])?;
    let child = view::tree(target.pid).into_iter().find(|pid| *pid != target.pid).unwrap_or(0);
    for reason in ["the other end of this socket is outside the tree", "is gone, or outside the tree"] {
        // The child may still be closing what is its parent's.
        target.until(reason, || {
            let report = Checkpoint::of(child).preflight();
            report.is_ok_and(|report| report.refusals().iter().any(|one| one.to_string().contains(reason)))
        })?;
    }
    target.go()?;
    target.verdict()
}

fn no_process() -> Outcome {
    let target = Target::start(TASKS, &["threads"])?;
    let kind = kind_of(target.pid + 1)?; // its first thread, in a namespace where nothing else happens
    ensure(kind == ErrorKind::Refused, || format!("a thread: {kind:?}"))?;
    let kind = kind_of(4_000_000)?;
    ensure(kind == ErrorKind::TaskGone, || format!("no task: {kind:?}"))?;
    target.go()?;
    target.verdict()
}

/// It can only be frozen when its child has gone on: both are named in time, and both go on. By two system calls.
fn vfork_parent() -> Outcome {
    for call in ["vfork", "spawn"] {
        let target = Target::start_in(call, TASKS, &[call])?;
        let child = view::tree(target.pid).into_iter().find(|pid| *pid != target.pid).unwrap_or(0);
        let limit = Duration::from_millis(400);
        let started = Instant::now();
        let error = match Checkpoint::of(target.pid).time_limit(limit).write_to(target.image()) {
            Ok(_) => return Err("it was dumped".into()),
            Err(error) => error,
        };
        ensure(error.kind() == ErrorKind::Unsupported, || error.to_string())?;
        ensure(started.elapsed() >= limit, || format!("after {:?}", started.elapsed()))?;
        let refusal = error.refusals().first().ok_or("no refusal")?;
        let named =
            refusal.pid.get() == target.pid && refusal.to_string().contains(&format!("child {child} ("));
        ensure(named && refusal.to_string().contains("vfork"), || refusal.to_string())?;
        target.go()?;
        target.verdict()?;
    }
    Ok(())
}

/// Looking at it would break the lease.
fn deleted_lease() -> Outcome {
    is_refused(LOCKS, "deleted_lease", &["deleted", "lease"])
}

/// Opening its files would be waiting for it, for ever.
fn asker() -> Outcome {
    is_refused(EVENTFILES, "asker", &["fanotify", "permissions"])
}

fn seccomp_listener() -> Outcome {
    is_refused(SECCOMP, "listener", &["seccomp", "listener"])
}

fn mappings() -> Outcome {
    let words = ["AIO ring", "before and after it was sealed", "/memfd:twice"];
    let target = Target::start(MAPPINGS, &["refused"])?;
    let error = match Checkpoint::of(target.pid).write_to(target.image()) {
        Ok(_) => return Err("it was dumped".into()),
        Err(error) => error,
    };
    let text = error.to_string();
    ensure(words.iter().all(|word| text.contains(word)), || text.clone())?;
    // ADDRESS WORDS
    let expected = target.file("expected").unwrap_or_default();
    for (address, words) in expected.lines().filter_map(|line| line.split_once(' ')) {
        let said = error.refusals().iter().map(ToString::to_string);
        let named =
            said.into_iter().any(|said| said.contains(&format!("{address}-")) && said.contains(words));
        ensure(named, || format!("{address} is not named as {words} in: {text}"))?;
    }
    target.go()?;
    target.verdict()
}

fn mapping_policy() -> Outcome {
    is_refused(NUMA, "mapping", &["mapping", "memory policy", "mbind"])
}

fn compat() -> Outcome {
    is_refused(COMPAT, "", &["32-bit"])
}

fn overrun_counts() -> Outcome {
    is_refused(
        TIMERS,
        "refused",
        &["timer 0: its last signal came with an overrun", "timer 1: ", "try again"],
    )
}

/// As a whole, and for a part of it that shares with what is outside and has an unusual exit signal.
fn impossible_sharing() -> Outcome {
    let target = Target::start(SHARING, &["impossible"])?;
    let below = target.file("below").and_then(|pid| pid.parse().ok()).unwrap_or(0);
    for (pid, words) in
        [(target.pid, &["CLONE_VM", "order"][..]), (below, &["CLONE_VM", "outside", "exit signal"])]
    {
        let error = match Checkpoint::of(pid).write_to(target.image()) {
            Ok(_) => return Err("it was dumped".into()),
            Err(error) => error.to_string(),
        };
        ensure(words.iter().all(|word| error.contains(word)), || error)?;
    }
    target.go()?;
    target.verdict()
}

/// The checkpoint is refused in these words, and the target goes on.
fn is_refused(program: Program, argument: &str, words: &[&str]) -> Outcome {
    let target = Target::start(program, &[argument])?;
    let error = match Checkpoint::of(target.pid).write_to(target.image()) {
        Ok(_) => return Err("it was dumped".into()),
        Err(error) => error.to_string(),
    };
    ensure(words.iter().all(|word| error.contains(word)), || error)?;
    target.go()?;
    target.verdict()
}

/// Without CAP_SYS_ADMIN filters cannot be suspended; nothing may be executed by a task that they would kill.
fn seccomp_unprivileged() -> Outcome {
    let target = Target::start(SECCOMP, &["deadly"])?;
    let dump =
        super::helper_by(&["setpriv", "--bounding-set", "-sys_admin"], "dump", target.pid, target.image())?
            .stdout(std::process::Stdio::piped())
            .output()
            .map_err(|e| format!("skip: setpriv: {e}"))?;
    let said = String::from_utf8_lossy(&dump.stdout).into_owned();
    let named = said.contains("seccomp") && said.contains("CAP_SYS_ADMIN");
    ensure(dump.status.code() == Some(1) && named, || format!("{}: {said}", dump.status))?;
    target.go()?;
    target.verdict()
}

fn stop_after_dump() -> Outcome {
    let target = Target::start(TASKS, &["threads"])?;
    target.dump(AfterDump::Stop)?;
    std::thread::sleep(Duration::from_millis(30));
    ensure(view::state(target.pid) == 'T', || format!("state {}", view::state(target.pid)))?;
    target.go()?;
    target.signal(Signal::SIGCONT)?;
    target.verdict()
}
