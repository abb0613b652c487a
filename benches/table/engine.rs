//! The engines that are compared: this library, and CRIU's command line where there is one.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cryosleep::{AfterDump, Checkpoint, Compression, Exit, PageChecksums, Restore, Restored};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::Result;

#[derive(Clone, Copy)]
pub(crate) enum Engine {
    Cryosleep,
    /// Pages without checksums.
    Bare,
    /// Compressed pages; those here do not become smaller.
    Packed,
    /// The process runs on after its dump, and is ended by us before it is restored.
    Live,
    Criu,
}

/// What a dump or a restore took: from the caller's side, and by the library's own account.
pub(crate) struct Took {
    pub(crate) whole: Duration,
    /// The last one is what the library did not account for.
    pub(crate) stages: [Duration; 4],
}

/// A process that has come back.
pub(crate) struct Back {
    pid: Pid,
    /// By the library; CRIU's are waited for by number.
    handle: Option<Restored>,
    took: Took,
}

impl Engine {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Engine::Cryosleep => "cryosleep",
            Engine::Bare => "cryosleep, no checksums",
            Engine::Packed => "cryosleep, LZ4",
            Engine::Live => "cryosleep, runs on",
            Engine::Criu => "criu",
        }
    }

    /// Dumps the process; it ends by that, or after it.
    pub(crate) fn dump(self, pid: u32, images: &Path) -> Result<Took> {
        match self {
            Engine::Cryosleep | Engine::Bare | Engine::Packed | Engine::Live => {
                let checkpoint = Checkpoint::of(pid);
                let checkpoint = match self {
                    Engine::Bare => checkpoint.page_checksums(PageChecksums::Off),
                    Engine::Packed => checkpoint.compression(Compression::Lz4),
                    Engine::Live => checkpoint.after(AfterDump::Resume),
                    _ => checkpoint,
                };
                let started = Instant::now();
                let stats = checkpoint.write_to(images)?.stats;
                let whole = started.elapsed();
                if let Engine::Live = self {
                    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
                }
                Ok(Took { whole, stages: [stats.freezing, stats.frozen, stats.memory, stats.release] })
            }
            Engine::Criu => {
                fs::create_dir(images)?;
                criu(&["dump", "-v0", "--tree", &pid.to_string()], images)
            }
        }
    }

    pub(crate) fn restore(self, pid: u32, images: &Path) -> Result<Back> {
        let (handle, took) = match self {
            Engine::Cryosleep | Engine::Bare | Engine::Packed | Engine::Live => {
                let started = Instant::now();
                let restored = Restore::from(images).run()?;
                let whole = started.elapsed();
                let stats = restored.stats;
                let other = whole.saturating_sub(stats.reading + stats.building + stats.release);
                let stages = [stats.reading, stats.building, stats.release, other];
                (Some(restored), Took { whole, stages })
            }
            Engine::Criu => (None, criu(&["restore", "-v0", "--restore-detached"], images)?),
        };
        Ok(Back { pid: Pid::from_raw(i32::try_from(pid)?), handle, took })
    }
}

impl Back {
    /// Ends it with its descendants, and makes sure that it had not ended by itself. Gives what the restore took.
    pub(crate) fn end(self) -> Result<Took> {
        let below = descendants(self.pid)?;
        below.iter().try_for_each(|pid| kill(*pid, Signal::SIGKILL))?;
        kill(self.pid, Signal::SIGKILL)?;
        let by_us = match self.handle {
            Some(restored) => restored.wait()? == Exit::Signal(libc::SIGKILL),
            None => matches!(waitpid(self.pid, None)?, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
        };
        // Orphans have become children of ours.
        for pid in below {
            let _ = waitpid(pid, None);
        }
        if by_us { Ok(self.took) } else { Err("the restored process did not live on".into()) }
    }
}

/// The children of a process, theirs, and so on.
pub(crate) fn descendants(root: Pid) -> Result<Vec<Pid>> {
    let (mut all, mut looked_at) = (vec![root], 0);
    while let Some(pid) = all.get(looked_at) {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let children: Result<Vec<i32>, _> = children.split_ascii_whitespace().map(str::parse).collect();
        all.extend(children?.into_iter().map(Pid::from_raw));
        looked_at += 1;
    }
    all.remove(0);
    Ok(all)
}

/// As its users call it: a program that is started for each dump and each restore.
fn criu(args: &[&str], images: &Path) -> Result<Took> {
    let mut command = Command::new("criu");
    command.args(args).arg("--images-dir").arg(images);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let started = Instant::now();
    let status = command.status()?;
    let whole = started.elapsed();
    if status.success() {
        Ok(Took { whole, stages: [Duration::ZERO; 4] })
    } else {
        Err(format!("criu {}: {status}", args.join(" ")).into())
    }
}

/// Is there a `criu` that works here? Otherwise the line that says so.
pub(crate) fn find_criu() -> Result<(), String> {
    let runs = |arg| Command::new("criu").arg(arg).output();
    match (runs("--version"), runs("check")) {
        (Err(_), _) | (_, Err(_)) => Err("criu: not on PATH".into()),
        (Ok(version), Ok(check)) if version.status.success() && check.status.success() => Ok(()),
        (_, Ok(check)) => {
            let said = String::from_utf8_lossy(&check.stderr).into_owned();
            Err(format!("criu: on PATH, but `criu check` fails: {}", said.lines().last().unwrap_or_default()))
        }
    }
}
