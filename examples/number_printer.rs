//! A shell that counts is checkpointed while it counts, is gone, and counts on: no number lost or repeated.
//!
//! Run it as `cargo run --release --example number_printer`. An ordinary user will do: then all of it happens in
//! user and pid namespaces of its own, because choosing pids is a privilege.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a program, not a library

#[path = "support/rootless.rs"]
mod rootless;

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use cryosleep::{Checkpoint, Dumped, Exit, Restore, Restored};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const HELP: &str = "\
usage: number_printer [--interval SECONDS] [--rounds ROUNDS]

Starts a shell that prints one number after the other into a file, checkpoints it while it does (which ends
it), restores it from the image, and verifies that the numbers go on where they had stopped.

  --interval SECONDS  time between two numbers (default 1)
  --rounds ROUNDS     how often the same shell is checkpointed and restored (default 1)
  --help              this text
";

struct Options {
    interval: f64,
    rounds: u32,
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("number_printer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    close_inherited()?;
    let Some(options) = parse(std::env::args().skip(1))? else {
        print!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    };
    if rootless::is_init() {
        return Ok(rootless::init()?.into());
    }
    if !rootless::may_choose_pids()? {
        println!("I may not choose pids here, so all of this happens in user and pid namespaces of my own.");
        let status = rootless::run_inside()?;
        return Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1).into());
    }
    // What a killed tree leaves behind becomes ours to wait for, so that its pids are free again at once.
    nix::sys::prctl::set_child_subreaper(true)?;
    let scratch = Scratch::new()?;
    demonstrate(&options, &scratch)
}

/// Whatever the caller has left open would be inherited by the shell, and be part of its checkpoint.
fn close_inherited() -> Result<()> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|number| *number > 2)
        .collect();
    for number in open {
        let _ = nix::unistd::close(number); // one of them was the directory itself
    }
    Ok(())
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options { interval: 1.0, rounds: 1 };
    while let Some(arg) = args.next() {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (arg.as_str(), None),
        };
        let mut value = || value.clone().or_else(|| args.next()).ok_or(format!("{name} needs a value"));
        match name {
            "--interval" => options.interval = value()?.parse()?,
            "--rounds" => options.rounds = value()?.parse()?,
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("unknown option {arg}; see --help").into()),
        }
    }
    if !(0.0..=3600.0).contains(&options.interval) || options.rounds == 0 {
        return Err(
            "the interval must be from 0 to 3600 seconds, and there must be at least one round".into()
        );
    }
    Ok(Some(options))
}

/// A directory for the numbers and for the image, gone when we are.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        Ok(Self(nix::unistd::mkdtemp(&std::env::temp_dir().join("number_printer.XXXXXX"))?))
    }

    fn numbers(&self) -> PathBuf {
        self.0.join("numbers")
    }

    fn image(&self) -> PathBuf {
        self.0.join("image")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The shell. It ends when this is dropped.
struct Shell(Life);

enum Life {
    Started(Child),
    Restored(Restored),
    Ended,
}

impl Shell {
    fn start(interval: f64, numbers: &Path) -> Result<Self> {
        let script = format!("i=0; while true; do echo $i; i=$(expr $i + 1); sleep {interval}; done");
        println!("I start, in a session of its own: sh -c '{script}'");
        // A session of its own, like a daemon: so it has no part in the terminal that we may have.
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", &script]).stdin(Stdio::null()).stderr(Stdio::null());
        Ok(Self(Life::Started(command.stdout(File::create_new(numbers)?).spawn()?)))
    }

    fn pid(&self) -> Option<u32> {
        match &self.0 {
            Life::Started(child) => Some(child.id()),
            Life::Restored(restored) => Some(restored.pid().get()),
            Life::Ended => None,
        }
    }

    /// Waits for it to be killed, as a checkpoint does; nothing else should end it.
    fn wait(&mut self) -> Result<()> {
        let signal = match std::mem::replace(&mut self.0, Life::Ended) {
            Life::Started(mut child) => child.wait()?.signal(),
            Life::Restored(restored) => match restored.wait()? {
                Exit::Signal(signal) => Some(signal),
                Exit::Code(_) => None,
            },
            Life::Ended => return Err("the shell has ended already".into()),
        };
        if signal == Some(Signal::SIGKILL as i32) {
            return Ok(());
        }
        Err(format!("the shell has ended, and not by the checkpoint (signal {signal:?})").into())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let Some(pid) = self.pid() else { return };
        let _ = kill_process(pid);
        let _ = self.wait();
    }
}

/// What the shell has printed so far.
struct Numbers {
    count: usize,
    last: Option<u64>,
    lost: u64,
    repeated: u64,
}

impl Numbers {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        let mut numbers = Numbers { count: 0, last: None, lost: 0, repeated: 0 };
        for line in text.lines() {
            let number: u64 =
                line.parse().map_err(|_| format!("the shell has printed {line:?}, not a number"))?;
            let expected = numbers.last.map_or(0, |last| last + 1);
            numbers.lost += number.saturating_sub(expected);
            numbers.repeated += u64::from(number < expected);
            numbers.last = numbers.last.max(Some(number));
            numbers.count += 1;
        }
        Ok(numbers)
    }

    fn last(&self) -> String {
        self.last.map_or("nothing".into(), |last| last.to_string())
    }

    /// Reads until there are `more` than there were.
    fn wait_for_more(path: &Path, more: usize, interval: Duration) -> Result<Self> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let (started, before) = (Instant::now(), Self::read(path)?.count);
        loop {
            let numbers = Self::read(path)?;
            if numbers.count >= before + more {
                return Ok(numbers);
            }
            if started.elapsed() > PATIENCE + 3 * interval {
                return Err(format!("the shell has stopped counting at {}", numbers.last()).into());
            }
            sleep((interval / 20).clamp(Duration::from_micros(200), Duration::from_millis(20)));
        }
    }
}

fn demonstrate(options: &Options, scratch: &Scratch) -> Result<ExitCode> {
    let interval = Duration::from_secs_f64(options.interval);
    let numbers = scratch.numbers();
    let interrupts = block_interrupts()?;
    let mut shell = Shell::start(options.interval, &numbers)?;
    let pid = shell.pid().ok_or("the shell has no pid")?;
    clean_up_when_interrupted(interrupts, pid, scratch.0.clone());
    let mut times = Times::default();
    for round in 1..=options.rounds {
        let before = Numbers::wait_for_more(&numbers, if round == 1 { 3 } else { 1 }, interval)?;
        if round == 1 {
            println!("It has pid {pid} and has counted up to {}.", before.last());
        }
        // Some moment of its life, a different one each time.
        sleep(interval.mul_f64(f64::from(round) * 0.618_034 % 1.0));
        let dumped = checkpoint(pid, &mut shell, scratch, round)?;
        let restored = restore(pid, scratch, round)?;
        times.add(&dumped, &restored);
        shell.0 = Life::Restored(restored);
        if options.rounds > 1 {
            let after = Numbers::read(&numbers)?;
            println!("round {round}: at {}, pid {pid}: {}", after.last(), times.last());
        }
    }
    let after = Numbers::wait_for_more(&numbers, 3, interval)?;
    println!("It counts on: {} by now.", after.last());
    drop(shell);
    times.report();
    conclude(&numbers, pid)
}

/// From here on they wait for [`clean_up_when_interrupted`], in this thread and in those that it starts.
fn block_interrupts() -> Result<SigSet> {
    let interrupts = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    interrupts.thread_block()?;
    Ok(interrupts)
}

/// The shell is in another session than the terminal, and would not hear of its Ctrl-C.
fn clean_up_when_interrupted(interrupts: SigSet, shell: u32, scratch: PathBuf) {
    std::thread::spawn(move || {
        let signal = interrupts.wait().map_or(0, |signal| signal as i32);
        let _ = kill_process(shell); // unless the image is the only place where it is, just now
        let _ = fs::remove_dir_all(scratch);
        std::process::exit(128 + signal);
    });
}

fn kill_process(pid: u32) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?)
}

fn checkpoint(pid: u32, shell: &mut Shell, scratch: &Scratch, round: u32) -> Result<Dumped> {
    let dumped = Checkpoint::of(pid).write_to(scratch.image())?;
    shell.wait()?;
    let stopped_at = Numbers::read(&scratch.numbers())?;
    if Path::new(&format!("/proc/{pid}")).exists() {
        return Err(format!("there still is a process {pid}").into());
    }
    if round == 1 {
        println!("I have checkpointed it: the image has {} KiB.", dumped.stats.bytes_written / 1024);
        println!(
            "It is gone: there is no process {pid} any more, and {} stays the last number.",
            stopped_at.last()
        );
    }
    Ok(dumped)
}

fn restore(pid: u32, scratch: &Scratch, round: u32) -> Result<Restored> {
    let restored = Restore::from(scratch.image()).run()?;
    if restored.pid().get() != pid {
        return Err(format!("it had pid {pid} and has come back with pid {}", restored.pid()).into());
    }
    if round == 1 {
        println!("I have restored it: it runs again, with pid {pid}.");
    }
    Ok(restored)
}

fn conclude(numbers: &Path, pid: u32) -> Result<ExitCode> {
    let Numbers { count, lost, repeated, .. } = Numbers::read(numbers)?;
    println!("continued: {count} numbers, {lost} lost, {repeated} repeated, pid {pid}");
    Ok(if lost == 0 && repeated == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How long the checkpoints and the restores took.
#[derive(Default)]
struct Times {
    dumps: Vec<Duration>,
    restores: Vec<Duration>,
}

impl Times {
    fn add(&mut self, dumped: &Dumped, restored: &Restored) {
        let stats = dumped.stats;
        self.dumps.push(stats.freezing + stats.frozen + stats.release);
        let stats = &restored.stats;
        self.restores.push(stats.reading + stats.building + stats.release);
    }

    fn last(&self) -> String {
        let [dump, restore] =
            [&self.dumps, &self.restores].map(|list| list.last().copied().unwrap_or_default());
        format!("checkpoint {dump:.1?}, restore {restore:.1?}")
    }

    fn report(&mut self) {
        for (what, list) in [("checkpoint", &mut self.dumps), ("restore", &mut self.restores)] {
            list.sort();
            let (Some(least), Some(most)) = (list.first(), list.last()) else { continue };
            match list.get(list.len() / 2) {
                Some(median) if list.len() > 1 => {
                    println!("One {what} took {median:.1?} (median; {least:.1?} to {most:.1?}).");
                }
                _ => println!("The {what} took {most:.1?}."),
            }
        }
    }
}
