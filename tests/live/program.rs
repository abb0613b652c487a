//! Subjects: small real programs that set up some state, say `ready`, wait for `go`, and check themselves.
//!
//! They speak through files in their working directory, since a pipe to the test would be refused.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use cryosleep::{AfterDump, Checkpoint, Compression, Dumped, Exit, PageChecksums, Pids, Restore, Restored};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::{Outcome, cell, view};

/// What a subject is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Program {
    /// tests/subjects/NAME.c
    C(&'static str),
    /// The same, linked statically.
    StaticC(&'static str),
    /// The same as a 32-bit program without a C library.
    C32(&'static str),
    /// tests/subjects/NAME.sh
    Shell(&'static str),
    /// tests/subjects/NAME.py
    Python(&'static str),
    /// tests/subjects/NAME.java; its arguments are those of the JVM.
    Java(&'static str),
    /// tests/subjects/NAME.js
    Node(&'static str),
    /// tests/subjects/NAME.go
    Go(&'static str),
}

impl Program {
    fn source(self) -> PathBuf {
        let name = match self {
            Program::C(name) | Program::StaticC(name) | Program::C32(name) => format!("{name}.c"),
            Program::Shell(name) => format!("{name}.sh"),
            Program::Python(name) => format!("{name}.py"),
            Program::Java(name) => format!("{name}.java"),
            Program::Node(name) => format!("{name}.js"),
            Program::Go(name) => format!("{name}.go"),
        };
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/subjects").join(name)
    }

    /// Where it is compiled to, if it is.
    pub(crate) fn binary(self) -> PathBuf {
        cell::scratch().join(match self {
            Program::C(name) => name.to_owned(),
            Program::StaticC(name) => format!("{name}-static"),
            Program::C32(name) => format!("{name}-32"),
            Program::Shell(name) => format!("{name}-sh"),
            Program::Python(name) => format!("{name}-py"),
            Program::Java(name) => format!("{name}-java"),
            Program::Node(name) => format!("{name}-js"),
            Program::Go(name) => format!("{name}-go"),
        })
    }

    /// Compiles it, once in the life of the test binary.
    pub(crate) fn prepare(self) -> Outcome {
        type Slot = Arc<OnceLock<Outcome>>;
        static DONE: Mutex<BTreeMap<Program, Slot>> = Mutex::new(BTreeMap::new());
        let slot = DONE.lock().map_err(|e| e.to_string())?.entry(self).or_default().clone();
        slot.get_or_init(|| self.compile()).clone()
    }

    fn compile(self) -> Outcome {
        let linking: &[&str] = match self {
            Program::C(_) => &[],
            Program::StaticC(_) => &["-static"],
            Program::C32(_) => &["-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pic"],
            Program::Shell(_) | Program::Python(_) => return Ok(()),
            Program::Node(_) => {
                let mut node = Command::new("node");
                node.arg("--check").arg(self.source());
                return Self::compiled_by(node);
            }
            Program::Go(_) => {
                let mut go = Command::new("go");
                // What it keeps from one time to the next is kept with the rest of what is built.
                go.env("GOCACHE", cell::scratch().join("go-cache")).env("GO111MODULE", "off");
                go.args(["build", "-o"]).arg(self.binary()).arg(self.source());
                return Self::compiled_by(go);
            }
            Program::Java(_) => {
                let mut javac = Command::new("javac");
                javac.arg("-d").arg(self.binary()).arg(self.source());
                return Self::compiled_by(javac);
            }
        };
        let mut gcc = Command::new("gcc");
        gcc.args([
            "-std=gnu17",
            "-O1",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unused-function",
            "-Wno-format-zero-length",
            "-Wno-missing-field-initializers",
        ])
        .args(["-pthread", "-o"])
        .arg(self.binary())
        .arg(self.source())
        .args(linking);
        Self::compiled_by(gcc)
    }

    fn compiled_by(mut compiler: Command) -> Outcome {
        match compiler.output() {
            Err(error) => Err(format!("skip: {compiler:?}: {error}")),
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// In a session of its own: a tree that is in the test's session could only be restored into it.
    fn command(self, arguments: &[&str]) -> Command {
        let mut command = Command::new("setsid");
        match self {
            Program::C(_) | Program::StaticC(_) | Program::C32(_) | Program::Go(_) => {
                command.arg(self.binary())
            }
            Program::Shell(_) => command.arg("sh").arg(self.source()),
            Program::Python(_) => command.arg("python3").arg(self.source()),
            Program::Node(_) => command.arg("node").arg(self.source()),
            Program::Java(name) => {
                command.args(["java", "-cp"]).arg(self.binary()).args(arguments);
                command.arg(name);
                return command;
            }
        };
        command.args(arguments);
        command
    }
}

/// What a checkpoint is told besides whom, and what becomes of him.
pub(crate) type Options = fn(Checkpoint<'_>) -> Checkpoint<'_>;

pub(crate) fn usual(checkpoint: Checkpoint<'_>) -> Checkpoint<'_> {
    checkpoint
}

/// Pages without checksums, which the target writes itself.
pub(crate) fn bare(checkpoint: Checkpoint<'_>) -> Checkpoint<'_> {
    checkpoint.page_checksums(PageChecksums::Off)
}

/// Pages that are compressed.
pub(crate) fn packed(checkpoint: Checkpoint<'_>) -> Checkpoint<'_> {
    checkpoint.compression(Compression::Lz4)
}

/// A running (or frozen, or restored) subject.
pub(crate) struct Target {
    pub(crate) pid: u32,
    dir: PathBuf,
    image: PathBuf,
    gone: Gone,
    /// The process 1 of the pid namespace that it lives in, which is not ours.
    warden: Option<Warden>,
    /// What it was restored as.
    restored: Option<Restored>,
    pub(crate) options: Options,
}

/// A process 1 that does nothing but wait for others, and the child of ours that keeps it alive.
struct Warden {
    pid: u32,
    keeper: Child,
}

impl Drop for Warden {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL);
        // Its end waits for all of its namespace, of whom some may be children of ours.
        while let Ok(None) = self.keeper.try_wait() {
            let _ = waitpid(None, Some(WaitPidFlag::WNOHANG));
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Where a subject lives.
enum Home {
    /// In our own namespace.
    Here,
    /// Below a warden.
    Warded,
    /// As process 1.
    AsInit,
}

fn only_child(pid: u32) -> Option<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.trim().parse().ok()
}

/// For how long it has not existed, at least and at most.
#[derive(Clone, Copy, Default)]
struct Gone {
    min: Duration,
    max: Duration,
}

/// How long a subject may take for one step.
const PATIENCE: Duration = Duration::from_secs(25);

impl Target {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(program: Program, args: &[&str]) -> Result<Self, String> {
        Self::start_in("subject", program, args)
    }

    pub(crate) fn start_in(name: &str, program: Program, args: &[&str]) -> Result<Self, String> {
        Self::started(name, program.command(args), Home::Here)
    }

    /// In a pid namespace of its own, of which it is not process 1.
    pub(crate) fn start_namespaced(program: Program, args: &[&str]) -> Result<Self, String> {
        let inner = program.command(args);
        let mut command = Command::new("unshare");
        // Numbers that are none of its own outside.
        command.args(["--pid", "--fork", "sh", "-c", "\"$@\" & while :; do wait; sleep 0.02; done", "sh"]);
        command.arg(inner.get_program()).args(inner.get_args());
        Self::started("subject", command, Home::Warded)
    }

    /// As process 1 of a pid namespace.
    pub(crate) fn start_as_init(
        name: &str,
        program: Program,
        args: &[&str],
        through: &[&str],
    ) -> Result<Self, String> {
        let Program::C(_) = program else { return Err("only C programs need no setsid".into()) };
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork"]).args(through).arg(program.binary()).args(args);
        Self::started(name, command, Home::AsInit)
    }

    fn started(name: &str, mut command: Command, home: Home) -> Result<Self, String> {
        let dir = cell::lab().join(name);
        fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        let log = File::create(dir.join("log")).map_err(|e| e.to_string())?;
        command
            .current_dir(&dir)
            .env_clear()
            .envs(std::env::vars().filter(|(name, _)| name == "PATH" || name == "HOME"))
            .env("SUBJECT", "its environment")
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(|e| e.to_string())?)
            .stderr(log);
        if matches!(home, Home::AsInit) {
            command.stderr(Stdio::null()); // unshare says that its child was killed, and so the log grows
        }
        let child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        let mut target = Self {
            pid: child.id(),
            image: cell::lab().join(format!("{name}.image")),
            dir,
            gone: Gone::default(),
            warden: None,
            restored: None,
            options: usual,
        };
        target.until("ready", || target.file("ready").is_some())?;
        if !matches!(home, Home::Here) {
            target.pid = only_child(child.id()).ok_or("there is no process 1")?;
        }
        if matches!(home, Home::Warded) {
            let pid = target.pid;
            target.pid = only_child(pid).ok_or("process 1 has not exactly one child")?;
            target.warden = Some(Warden { pid, keeper: child });
        }
        match target.file("result") {
            Some(result) if result.starts_with("skip: ") => Err(result.trim().to_owned()),
            _ => Ok(target),
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.pid as i32)
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn file(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.dir.join(name)).ok()
    }

    /// Waits for a condition, and for the subject to report a failure.
    pub(crate) fn until(&self, what: &str, mut done: impl FnMut() -> bool) -> Outcome {
        let started = Instant::now();
        while !done() {
            let failed = self.file("result").filter(|result| result != "ok\n" && result.ends_with('\n'));
            if let Some(reason) = failed.filter(|reason| !reason.starts_with("skip: ")) {
                return Err(format!("the subject: {}{}", reason, self.log()));
            }
            if started.elapsed() > PATIENCE {
                return Err(format!("not {what} within {PATIENCE:?}{}\n{}", self.log(), view::whereabouts()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn log(&self) -> String {
        self.file("log")
            .filter(|log| !log.is_empty())
            .map_or(String::new(), |log| format!("\nits output: {log}"))
    }

    pub(crate) fn signal(&self, signal: Signal) -> Outcome {
        kill(self.pid(), signal).map_err(|errno| format!("kill: {errno}"))
    }

    /// Stops it, and waits until all of it is: a signal that is still pending can be seen from outside.
    pub(crate) fn stop(&self) -> Outcome {
        self.signal(Signal::SIGSTOP)?;
        self.until("stopped", || view::states(self.pid).into_iter().all(|state| state == 'T'))
    }

    pub(crate) fn dump(&self, after: AfterDump) -> Result<Dumped, String> {
        let checkpoint = (self.options)(Checkpoint::of(self.pid)).after(after);
        checkpoint.write_to(&self.image).map_err(|error| error.to_string())
    }

    /// The same at a moment at which it can be done: a refusal may say that it is worth trying again.
    fn dump_sometime(&self, after: AfterDump) -> Outcome {
        const TRIES: u32 = 25;
        for _ in 1..TRIES {
            match self.dump(after) {
                Err(reason) if reason.contains("try again") => std::thread::sleep(Duration::from_millis(3)),
                other => return other.map(drop),
            }
        }
        self.dump(after).map(drop)
    }

    /// Dumps it, makes sure that it is gone, restores it.
    pub(crate) fn dump_and_restore(&mut self) -> Outcome {
        let restore = |target: &Self| {
            let restored = Restore::from(&target.image).run().map_err(|error| error.to_string())?;
            let (pid, _pidfd) = restored.detach();
            if pid.get() == target.pid { Ok(()) } else { Err(format!("restored as {pid}")) }
        };
        self.leave_and_return(|target| target.dump_sometime(AfterDump::Kill), restore)
    }

    /// Dumps it from outside of its pid namespace, and restores it there.
    pub(crate) fn dump_and_return(&mut self) -> Outcome {
        let warden = self.warden.as_ref().ok_or("it has no namespace of its own")?.pid;
        let namespace = File::open(format!("/proc/{warden}/ns/pid")).map_err(|e| e.to_string())?;
        self.dump_and_restore_in(Pids::Namespace(namespace.into()))
    }

    /// Dumps it from outside of its pid namespace, and restores it into a new one.
    pub(crate) fn dump_and_move(&mut self) -> Outcome {
        self.dump_and_restore_in(Pids::NewNamespace)
    }

    fn dump_and_restore_in(&mut self, pids: Pids) -> Outcome {
        let inner = view::numbers_of(self.pid).last().copied();
        let mut restored = None;
        let restore = |target: &Self| {
            let run = Restore::from(&target.image).pids(pids).run().map_err(|error| error.to_string())?;
            restored = Some(run);
            Ok(())
        };
        self.leave_and_return(|target| target.dump(AfterDump::Kill).map(drop), restore)?;
        let restored = restored.ok_or("it was not restored")?;
        let (known, own) = (restored.pid().get(), restored.inner_pid());
        if inner != Some(own) || view::numbers_of(known).last() != Some(&own) {
            return Err(format!("{inner:?} was restored as {known}, which says it is {own}"));
        }
        self.pid = known;
        self.restored = Some(restored);
        Ok(())
    }

    /// The same, by what can do it.
    pub(crate) fn leave_and_return(
        &mut self,
        dump: impl FnOnce(&Self) -> Outcome,
        restore: impl FnOnce(&Self) -> Outcome,
    ) -> Outcome {
        let dumping = Instant::now();
        dump(self)?;
        let dumped = Instant::now();
        reap(self.pid());
        let survivor =
            || view::tree(self.pid).into_iter().find(|pid| Path::new(&format!("/proc/{pid}")).exists());
        if self.warden.is_some() {
            self.until("waited for by its process 1", || survivor().is_none())?;
        }
        if let Some(survivor) = survivor() {
            return Err(format!("{survivor} is still there after the dump: {}", view::whereabouts()));
        }
        let restoring = Instant::now();
        restore(self)?;
        self.gone.min += restoring - dumped;
        self.gone.max += dumping.elapsed();
        Ok(())
    }

    /// Allows it to go on and to check itself.
    pub(crate) fn go(&self) -> Outcome {
        let Gone { min, max } = self.gone;
        let new = self.dir.join("go.new");
        fs::write(&new, format!("{} {}", min.as_nanos(), max.as_nanos())).map_err(|e| e.to_string())?;
        fs::rename(new, self.dir.join("go")).map_err(|e| e.to_string())
    }

    /// The same where others may have waited for it, or live beside it.
    pub(crate) fn stolen_verdict(self) -> Outcome {
        self.until("over", || self.file("result").is_some() || reap_ended(self.pid()).is_some())?;
        match self.file("result").as_deref() {
            Some("ok\n") => Ok(()),
            other => Err(format!("it says {other:?}{}", self.log())),
        }
    }

    /// Of one that has lived in namespaces.
    fn warded_verdict(mut self) -> Outcome {
        self.until("over", || self.file("result").is_some())?;
        let exit = self.restored.take().map(Restored::wait).transpose().map_err(|error| error.to_string())?;
        match (self.file("result").as_deref(), exit) {
            (Some("ok\n"), None | Some(Exit::Code(0))) => {}
            (other, exit) => return Err(format!("it ended by {exit:?}, saying {other:?}{}", self.log())),
        }
        drop(self.warden.take());
        nothing_left()
    }

    /// Waits for its end: it must be content, and leave nothing behind.
    pub(crate) fn verdict(self) -> Outcome {
        if self.warden.is_some() {
            return self.warded_verdict();
        }
        let mut ended = None;
        self.until("over", || {
            ended = reap_ended(self.pid());
            ended.is_some()
        })?;
        match self.file("result").as_deref() {
            Some("ok\n") => {}
            other => return Err(format!("it ended by {ended:?}, saying {other:?}{}", self.log())),
        }
        match ended {
            Some(WaitStatus::Exited(_, 0)) => nothing_left(),
            other => Err(format!("it said ok, but ended by {other:?}")),
        }
    }
}

/// Waits for one child, as the parent that it had.
pub(crate) fn reap(pid: Pid) {
    let _ = waitpid(pid, None);
}

fn reap_ended(pid: Pid) -> Option<WaitStatus> {
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) => None,
        Ok(status) => Some(status),
        Err(_) => Some(WaitStatus::StillAlive),
    }
}

/// As process 1, reaps what has ended; nothing else may be alive any more.
pub(crate) fn nothing_left() -> Outcome {
    let started = Instant::now();
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
        {
        }
        let others = others();
        if others.is_empty() {
            return Ok(());
        }
        if started.elapsed() > Duration::from_secs(3) {
            return Err(format!("left behind: {others:?}\n{}", view::whereabouts()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// All processes of the namespace but ourselves.
pub(crate) fn others() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id()).collect()
}
