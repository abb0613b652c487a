//! A cell: a test runs as process 1 of a pid namespace of its own, with its own /proc and a time limit, so
//! that it may use any pid, sees every task that it leaves behind, and none survives it.
//!
//! The test binary runs itself again, twice: once to leave its namespaces, once (as their first process) to
//! run the test. What that prints is the reason if it fails.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libtest_mimic::{Completion, Failed};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use crate::Outcome;
use crate::program::Program;

const CELL: &str = "CRYOSLEEP_CELL";
const SKIPPED: u8 = 77;

/// Fails instead of skipping, where everything is supposed to be there.
const REQUIRE_ALL: &str = "CRYOSLEEP_REQUIRE_ALL";

/// What this machine lets tests do; asked once.
fn possible() -> Result<(), String> {
    static POSSIBLE: OnceLock<Result<(), String>> = OnceLock::new();
    let probe = || match enter("probe", Duration::from_secs(20)) {
        (Some(0), _) => Ok(()),
        (_, output) => Err(format!("skip: no new pid and mount namespaces: {}", output.trim())),
    };
    POSSIBLE.get_or_init(probe).clone()
}

/// Runs the test of this name in a cell.
pub(crate) fn run(name: &str, programs: &[Program], limit: Duration) -> Result<Completion, Failed> {
    let prepared = possible().and_then(|()| programs.iter().try_for_each(|program| program.prepare()));
    let (code, output) = match prepared {
        Ok(()) => enter(name, limit),
        Err(reason) => match reason.strip_prefix("skip: ") {
            Some(why) => (Some(SKIPPED.into()), why.to_owned()),
            None => (Some(1), reason),
        },
    };
    match code {
        Some(0) => Ok(Completion::Completed),
        Some(code) if code == i32::from(SKIPPED) && std::env::var_os(REQUIRE_ALL).is_none() => {
            Ok(Completion::ignored_with(output.trim()))
        }
        Some(_) => Err(output.into()),
        None => Err(format!("not over within {limit:?}\n{output}").into()),
    }
}

/// The exit code, unless the time is up, and all output.
fn enter(name: &str, limit: Duration) -> (Option<i32>, String) {
    let log = scratch().join(format!("{}.log", name.replace('/', "-")));
    let attempt = || -> std::io::Result<Option<i32>> {
        let file = File::create(&log)?;
        let mut outer = Command::new(std::env::current_exe()?)
            .env(CELL, format!("outer {name}"))
            // One more arena of the allocator looks like two mappings that a host has forgotten.
            .envs(name.starts_with("host_").then_some(("MALLOC_ARENA_MAX", "1")))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = outer.try_wait()? {
                return Ok(Some(status.code().unwrap_or(1)));
            }
            if Instant::now() > deadline {
                outer.kill()?;
                outer.wait()?;
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    match attempt() {
        Ok(code) => (code, std::fs::read_to_string(&log).unwrap_or_default()),
        Err(error) => (Some(1), format!("cannot run the test binary: {error}")),
    }
}

/// What runs inside: the role that the environment names, if it does.
pub(crate) fn role(test: impl FnOnce(&str) -> Outcome) -> Option<ExitCode> {
    let role = std::env::var(CELL).ok()?;
    let (stage, name) = role.split_once(' ')?;
    let outcome = match stage {
        "outer" => outer(name),
        _ => inner().and_then(|()| if name == "probe" { Ok(()) } else { test(name) }).map(|()| 0),
    };
    Some(match outcome {
        Ok(code) => ExitCode::from(code),
        Err(reason) => match reason.strip_prefix("skip: ") {
            Some(why) => {
                println!("{why}");
                ExitCode::from(SKIPPED)
            }
            None => {
                println!("{reason}");
                ExitCode::FAILURE
            }
        },
    })
}

fn die_with_parent() -> Outcome {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(|errno| format!("prctl: {errno}"))
}

/// What whoever started the tests left open would be in every subject, as a file with an end outside.
fn close_inherited() -> Outcome {
    let open = std::fs::read_dir("/proc/self/fd").map_err(text)?.flatten();
    let numbers: Vec<i32> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        let _ = nix::unistd::close(number); // one of them was the directory itself
    }
    Ok(())
}

fn outer(name: &str) -> Result<u8, String> {
    die_with_parent()?;
    close_inherited()?;
    unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC)
        .map_err(|errno| format!("skip: unshare: {errno}"))?;
    let inner = Command::new(std::env::current_exe().map_err(text)?)
        .env(CELL, format!("inner {name}"))
        .status()
        .map_err(text)?;
    Ok(inner.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn inner() -> Outcome {
    die_with_parent()?;
    // What dies once more on a restore must not dump core, though it may.
    let (_, most) = getrlimit(Resource::RLIMIT_CORE).map_err(|errno| format!("getrlimit: {errno}"))?;
    setrlimit(Resource::RLIMIT_CORE, most, most).map_err(|errno| format!("setrlimit: {errno}"))?;
    let none = None::<&str>;
    let mounted = |what: &str, at: &str, kind, flags| {
        mount(Some(what), at, kind, flags, none).map_err(|errno| format!("mount {what} on {at}: {errno}"))
    };
    mounted("none", "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    mounted("proc", "/proc", Some("proc"), MsFlags::empty())?;
    // What a test writes is gone with it.
    mounted("tmpfs", &lab().to_string_lossy(), Some("tmpfs"), MsFlags::empty())
}

/// A directory of this run of the test binary, for what tests share.
pub(crate) fn scratch() -> PathBuf {
    directory("live")
}

/// The directory that is private to the test.
pub(crate) fn lab() -> PathBuf {
    directory("lab")
}

fn directory(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::DirBuilder::new().mode(0o755).recursive(true).create(&path);
    path
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
