//! The command line that the field drives checkpoint engines by, in front of this library: a thin consumer,
//! one table from options to settings and one function from settings to a builder.
//!
//! `criu dump -t PID -D DIR`, `criu pre-dump -t PID -D DIR`, `criu restore -D DIR`, `criu check`. What it does not
//! know, or what the library cannot do yet, is an error that names the option.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a program, not a library

#[path = "support/keeper.rs"]
mod keeper;

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Duration;

use cryosleep::check::{Feature, Features, Need};
use cryosleep::{
    AfterDump, Checkpoint, DevicePaths, Event, Exit, External, FileValidation, Hooks, LinkRemap, OuterPipes,
    OuterSession, Pid, Restore, Restored, Tracker,
};
use tracing::{error, info, warn};
use tracing_subscriber::filter::LevelFilter;

type Failure = Box<dyn Error + Send + Sync>;
type Result<T, E = Failure> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if let (Some(keeper::COMMAND), Some(name)) = (words.next().as_deref(), words.next()) {
        return keeper::run(&name).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let mut settings = Settings::default();
    let parsed = settings.parse(std::env::args().skip(1));
    if let Err(error) = settings.prepare() {
        eprintln!("criu: {error}");
        return ExitCode::FAILURE;
    }
    let unparsed = parsed.is_err();
    match parsed.and_then(|()| settings.act()) {
        Ok(code) => code,
        Err(error) => {
            error!("{}", error.to_string().replace('\n', " "));
            // A driver that gets the options wrong may not have got the log file right either.
            if unparsed && settings.log.is_some() {
                eprintln!("criu: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

/// What the command line says.
#[derive(Default)]
struct Settings {
    command: Option<Action>,
    images: Option<PathBuf>,
    /// Of the image that this one is to be a child of, seen from its own directory.
    previous: Option<PathBuf>,
    /// Have writes noted until the next dump.
    track: bool,
    work: Option<PathBuf>,
    log: Option<PathBuf>,
    verbosity: Verbosity,
    pidfile: Option<PathBuf>,
    time_limit: Option<Duration>,
    scripts: Vec<String>,
    status_fd: Option<u32>,
    tree: Option<u32>,
    after: AfterDump,
    shell_job: bool,
    detached: bool,
    features: Vec<String>,
    ghost_limit: Option<u64>,
    externals: Vec<(External, Option<String>)>,
    link_remap: bool,
    evasive_devices: bool,
    validation: Option<FileValidation>,
    inherited: Vec<(Vec<External>, RawFd)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Dump,
    PreDump,
    Restore,
    Check,
    Version,
}

struct Verbosity(u8);

impl Default for Verbosity {
    fn default() -> Self {
        Self(2)
    }
}

impl Verbosity {
    fn filter(&self) -> LevelFilter {
        match self.0 {
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            _ => LevelFilter::DEBUG,
        }
    }
}

/// What an option does.
#[derive(Clone, Copy)]
enum Does {
    Flag(fn(&mut Settings) -> Result<()>),
    Takes(fn(&mut Settings, &str) -> Result<()>),
    /// The value, if there is one, belongs to the same word.
    MayTake(fn(&mut Settings, Option<&str>) -> Result<()>),
    /// The library cannot do it yet.
    NotYet,
}

/// An option: the commands that it is for, its short name (or a blank), its long name, what it does.
struct Opt(&'static [Action], char, &'static str, Does);

const ALL: &[Action] = &[Action::Dump, Action::PreDump, Action::Restore, Action::Check];
const BOTH: &[Action] = &[Action::Dump, Action::PreDump, Action::Restore];
const DUMP: &[Action] = &[Action::Dump, Action::PreDump];
const RESTORE: &[Action] = &[Action::Restore];
const CHECK: &[Action] = &[Action::Check];

use Does::{Flag, MayTake, NotYet, Takes};

const OPTIONS: &[Opt] = &[
    Opt(ALL, 'D', "images-dir", Takes(|s, v| set(&mut s.images, v.into()))),
    Opt(ALL, 'W', "work-dir", Takes(|s, v| set(&mut s.work, v.into()))),
    Opt(ALL, 'o', "log-file", Takes(|s, v| set(&mut s.log, v.into()))),
    Opt(ALL, 'v', "verbosity", MayTake(Settings::set_verbosity)),
    Opt(ALL, ' ', "pidfile", Takes(|s, v| set(&mut s.pidfile, v.into()))),
    Opt(ALL, ' ', "timeout", Takes(|s, v| set(&mut s.time_limit, Duration::from_secs(v.parse()?)))),
    Opt(ALL, ' ', "action-script", Takes(|s, v| add(&mut s.scripts, v.into()))),
    Opt(ALL, ' ', "status-fd", Takes(|s, v| set(&mut s.status_fd, v.parse()?))),
    Opt(ALL, 'L', "libdir", Takes(|_, _| Ok(()))), // plugins would come from there; there are none
    Opt(ALL, ' ', "no-default-config", Flag(|_| Ok(()))), // there is no configuration file
    Opt(ALL, 'V', "version", Flag(|s| set(&mut s.command, Action::Version))),
    Opt(DUMP, 't', "tree", Takes(|s, v| set(&mut s.tree, v.parse()?))),
    Opt(DUMP, 'R', "leave-running", Flag(|s| s.leave(AfterDump::Resume))),
    Opt(DUMP, 's', "leave-stopped", Flag(|s| s.leave(AfterDump::Stop))),
    Opt(BOTH, 'j', "shell-job", Flag(|s| turn_on(&mut s.shell_job))),
    Opt(BOTH, ' ', "file-validation", Takes(|s, v| set(&mut s.validation, file_validation(v)?))),
    Opt(RESTORE, 'd', "restore-detached", Flag(|s| turn_on(&mut s.detached))),
    Opt(RESTORE, ' ', "inherit-fd", Takes(|s, v| add(&mut s.inherited, inherited(v)?))),
    Opt(DUMP, ' ', "ghost-limit", Takes(|s, v| set(&mut s.ghost_limit, size(v)?))),
    Opt(DUMP, ' ', "external", Takes(|s, v| add(&mut s.externals, external(v)?))),
    Opt(DUMP, ' ', "link-remap", Flag(|s| turn_on(&mut s.link_remap))),
    Opt(DUMP, ' ', "evasive-devices", Flag(|s| turn_on(&mut s.evasive_devices))),
    Opt(RESTORE, ' ', "link-remap", Flag(|_| Ok(()))), // the image says what the dump has done
    Opt(RESTORE, ' ', "evasive-devices", Flag(|_| Ok(()))),
    Opt(BOTH, 'l', "file-locks", Flag(|_| Ok(()))), // they always come back
    Opt(CHECK, ' ', "feature", Takes(|s, v| add(&mut s.features, v.into()))),
    Opt(RESTORE, 'S', "restore-sibling", NotYet),
    Opt(RESTORE, 's', "leave-stopped", NotYet),
    Opt(RESTORE, 'r', "root", NotYet),
    Opt(RESTORE, ' ', "join-ns", NotYet),
    Opt(DUMP, ' ', "freeze-cgroup", NotYet),
    Opt(DUMP, ' ', "skip-in-flight", NotYet),
    Opt(DUMP, ' ', "network-lock", NotYet),
    // Without it pages are compared with those of --prev-images-dir.
    Opt(DUMP, ' ', "track-mem", Flag(|s| turn_on(&mut s.track))),
    Opt(DUMP, ' ', "prev-images-dir", Takes(|s, v| set(&mut s.previous, v.into()))),
    Opt(DUMP, ' ', "auto-dedup", NotYet),
    Opt(DUMP, ' ', "page-server", NotYet),
    Opt(DUMP, ' ', "address", NotYet),
    Opt(DUMP, ' ', "port", NotYet),
    Opt(DUMP, ' ', "root", NotYet),
    Opt(DUMP, ' ', "force-irmap", NotYet),
    Opt(DUMP, ' ', "enable-fs", NotYet),
    Opt(DUMP, ' ', "cpu-cap", NotYet),
    Opt(BOTH, ' ', "tcp-established", NotYet),
    Opt(BOTH, ' ', "tcp-close", NotYet),
    Opt(BOTH, ' ', "ext-unix-sk", NotYet),
    Opt(RESTORE, ' ', "external", NotYet),
    Opt(BOTH, ' ', "manage-cgroups", NotYet),
    Opt(BOTH, ' ', "cgroup-root", NotYet),
    Opt(BOTH, ' ', "lazy-pages", NotYet),
    Opt(BOTH, ' ', "empty-ns", NotYet),
];

/// The last one counts, as for most command lines.
fn set<T>(setting: &mut Option<T>, value: T) -> Result<()> {
    *setting = Some(value);
    Ok(())
}

fn add<T>(list: &mut Vec<T>, value: T) -> Result<()> {
    list.push(value);
    Ok(())
}

fn turn_on(flag: &mut bool) -> Result<()> {
    *flag = true;
    Ok(())
}

fn file_validation(how: &str) -> Result<FileValidation> {
    match how {
        "filesize" => Ok(FileValidation::Size),
        "buildid" => Ok(FileValidation::BuildId),
        other => Err(format!("{other} is not supported").into()),
    }
}

/// A number of bytes, or of kilobytes, megabytes, gigabytes.
fn size(text: &str) -> Result<u64> {
    let number = text.trim_end_matches(['K', 'M', 'G']);
    let factor = match text.strip_prefix(number) {
        Some("K") => 1 << 10,
        Some("M") => 1 << 20,
        Some("G") => 1 << 30,
        Some("") => 1,
        _ => return Err("not a size".into()),
    };
    number.parse::<u64>()?.checked_mul(factor).ok_or_else(|| "too large".into())
}

/// What is between the brackets of `KIND[..]`, and what follows a colon after them.
fn bracketed<'t>(text: &'t str, kind: &str) -> Option<(&'t str, Option<&'t str>)> {
    let (inside, rest) = text.strip_prefix(kind)?.strip_prefix('[')?.split_once(']')?;
    match rest.strip_prefix(':') {
        Some(name) => Some((inside, Some(name))),
        None => rest.is_empty().then_some((inside, None)),
    }
}

/// Two numbers with something in between.
fn pair(text: &str, between: char, radix: u32) -> Result<(u64, u64)> {
    let (one, two) = text.split_once(between).ok_or_else(|| format!("no {between:?} in {text}"))?;
    Ok((u64::from_str_radix(one, radix)?, u64::from_str_radix(two, radix)?))
}

/// `file[MNT_ID:INODE]` (in hexadecimal), as a checkpoint and a restore say it.
fn of_mount(text: &str) -> Result<External> {
    let (mount, inode) = pair(text, ':', 16)?;
    Ok(External::OfMount { mount: u32::try_from(mount)?, inode })
}

/// `file[MNT_ID:INODE]`, `dev[MAJOR/MINOR]:NAME`, `unix[INODE]`: a file that is left out, and the name that it gets.
fn external(text: &str) -> Result<(External, Option<String>)> {
    if let Some((inside, None)) = bracketed(text, "file") {
        Ok((of_mount(inside)?, None))
    } else if let Some((inside, Some(name))) = bracketed(text, "dev") {
        let (major, minor) = pair(inside, '/', 10)?;
        Ok((External::Device { major, minor }, Some(name.into())))
    } else if let Some((inside, None)) = bracketed(text, "unix") {
        Ok((External::Socket(inside.parse()?), None))
    } else {
        Err(format!("{text} is not supported yet").into())
    }
}

/// `fd[N]:KEY`, where the key is `pipe:[INODE]`, `socket:[INODE]`, `file[MNT_ID:INODE]`, the name of something
/// external, or a path (which drivers write without the slash at its start): the one or the other.
fn inherited(text: &str) -> Result<(Vec<External>, RawFd)> {
    let (number, key) =
        text.strip_prefix("fd[").and_then(|rest| rest.split_once("]:")).ok_or("not fd[N]:KEY")?;
    let keys = if let Some((inode, None)) = bracketed(key, "pipe:") {
        vec![External::Pipe(inode.parse()?)]
    } else if let Some((inode, None)) = bracketed(key, "socket:") {
        vec![External::Socket(inode.parse()?)]
    } else if let Some((inside, None)) = bracketed(key, "file") {
        vec![of_mount(inside)?]
    } else if key.contains(":[") || key.starts_with("tty[") {
        return Err(format!("{key} is not supported yet").into());
    } else {
        vec![External::Name(key.into()), External::File(Path::new("/").join(key))]
    };
    Ok((keys, number.parse()?))
}

/// The words of a command line, of which an option may take one more.
type Words<'w> = std::vec::IntoIter<&'w str>;

impl Settings {
    /// Goes on after an error, of which it returns the first: what follows may say where the log is.
    fn parse(&mut self, args: impl Iterator<Item = String>) -> Result<()> {
        let args: Vec<String> = args.collect();
        // First the command: it decides what an option means.
        let found = self.find_command(&args);
        let mut result = Ok(());
        let mut words = args.iter().map(String::as_str).collect::<Vec<_>>().into_iter();
        while let Some(word) = words.next() {
            let parsed = match (word.strip_prefix("--"), word.strip_prefix('-')) {
                (Some(long), _) => self.long(long, &mut words),
                (None, Some(short)) if !short.is_empty() => self.short(short, &mut words),
                _ if command(word).is_some() => Ok(()),
                _ => Err(format!("command {word} is unknown or not supported yet").into()),
            };
            result = result.and(parsed);
        }
        result.and(found)
    }

    fn find_command(&mut self, args: &[String]) -> Result<()> {
        let before = std::iter::once("").chain(args.iter().map(String::as_str));
        let words = args.iter().zip(before).filter(|(_, before)| !self.takes_next(before));
        let commands: Vec<Action> = words.filter_map(|(word, _)| command(word)).collect();
        match commands.as_slice() {
            [one] => self.command = Some(*one),
            [] if args.iter().any(|word| word == "-V" || word == "--version") => {}
            [] => return Err("no command; there are dump, pre-dump, restore and check".into()),
            _ => return Err("more than one command".into()),
        }
        Ok(())
    }

    /// Is the word after this one an option's value?
    fn takes_next(&self, word: &str) -> bool {
        let takes = |opt: Option<&Opt>| matches!(opt, Some(Opt(.., Takes(_))));
        match (word.strip_prefix("--"), word.strip_prefix('-')) {
            (Some(long), _) => takes(self.option(|opt| opt.2 == long)),
            (None, Some(short)) => {
                let first = short.find(|letter| takes(self.option(|opt| opt.1 == letter)));
                first.is_some_and(|at| at + 1 == short.len())
            }
            (None, None) => false,
        }
    }

    fn option(&self, is: impl Fn(&Opt) -> bool) -> Option<&'static Opt> {
        let for_us = |opt: &&Opt| self.command.is_none_or(|command| opt.0.contains(&command) || opt.0 == ALL);
        OPTIONS.iter().filter(for_us).find(|opt| is(opt))
    }

    fn long(&mut self, word: &str, words: &mut Words<'_>) -> Result<()> {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        let Some(Opt(.., does)) = self.option(|opt| opt.2 == name) else {
            return Err(format!("unknown option --{name}").into());
        };
        let done = match (does, value) {
            (Flag(_), Some(_)) => Err("takes no value".into()),
            (Flag(set), None) => set(self),
            (Takes(set), value) => {
                value.or_else(|| words.next()).ok_or_else(no_value).and_then(|v| set(self, v))
            }
            (MayTake(set), value) => set(self, value),
            (NotYet, _) => Err(not_yet()),
        };
        done.map_err(|error| format!("option --{name}: {error}").into())
    }

    /// `-d`, `-t 5`, `-t5`, `-v4`, and several in one word: `-Rj`.
    fn short(&mut self, mut letters: &str, words: &mut Words<'_>) -> Result<()> {
        while let Some(letter) = letters.chars().next() {
            letters = letters.get(letter.len_utf8()..).unwrap_or_default();
            let Some(Opt(.., does)) = self.option(|opt| opt.1 == letter && letter != ' ') else {
                return Err(format!("unknown option -{letter}").into());
            };
            let done = match does {
                Flag(set) => set(self),
                NotYet => Err(not_yet()),
                Takes(_) | MayTake(_) => {
                    let rest = Some(std::mem::take(&mut letters)).filter(|rest| !rest.is_empty());
                    match does {
                        Takes(set) => {
                            rest.or_else(|| words.next()).ok_or_else(no_value).and_then(|v| set(self, v))
                        }
                        MayTake(set) => set(self, rest),
                        _ => Ok(()),
                    }
                }
            };
            done.map_err(|error| format!("option -{letter}: {error}"))?;
        }
        Ok(())
    }

    fn set_verbosity(&mut self, value: Option<&str>) -> Result<()> {
        self.verbosity.0 = match value {
            None => 1,
            Some(more) if more.chars().all(|letter| letter == 'v') => u8::try_from(more.len() + 1)?,
            Some(number) => number.parse()?,
        };
        Ok(())
    }

    fn leave(&mut self, after: AfterDump) -> Result<()> {
        if self.after != AfterDump::default() && self.after != after {
            return Err("it cannot be left both running and stopped".into());
        }
        self.after = after;
        Ok(())
    }

    fn images(&self) -> Result<PathBuf> {
        let dir = self.images.as_deref().unwrap_or(Path::new("."));
        Ok(dir.canonicalize().map_err(|error| format!("images directory {}: {error}", dir.display()))?)
    }

    /// A file in the work directory, unless its path is absolute.
    fn in_work(&self, file: &Path) -> PathBuf {
        self.work.as_deref().or(self.images.as_deref()).unwrap_or(Path::new(".")).join(file)
    }

    /// Starts the log.
    fn prepare(&self) -> Result<()> {
        let log = tracing_subscriber::fmt().with_ansi(false).with_max_level(self.verbosity.filter());
        let Some(file) = &self.log else {
            log.with_writer(std::io::stderr).init();
            return Ok(());
        };
        let path = self.in_work(file);
        let file = File::create(&path).map_err(|error| format!("log file {}: {error}", path.display()))?;
        log.with_writer(Mutex::new(file)).init();
        Ok(())
    }

    fn act(&self) -> Result<ExitCode> {
        match self.command {
            Some(Action::Dump | Action::PreDump) => self.dump(),
            Some(Action::Restore) => self.restore(),
            Some(Action::Check) => self.check(),
            Some(Action::Version) | None => version(),
        }
    }

    fn dump(&self) -> Result<ExitCode> {
        let tree = self.tree.ok_or("option --tree is missing: the pid of the root of the tree")?;
        let images = self.images()?;
        let mut stages = Stages { settings: self, images: &images };
        // A driver supplies the ends of pipes that are its own: --inherit-fd.
        let mut checkpoint =
            Checkpoint::of(tree).after(self.after).outer_pipes(OuterPipes::External).hooks(&mut stages);
        if let Some(limit) = self.ghost_limit {
            checkpoint = checkpoint.ghost_limit(limit);
        }
        if let Some(limit) = self.time_limit {
            checkpoint = checkpoint.time_limit(limit);
        }
        if self.link_remap {
            checkpoint = checkpoint.link_remap(LinkRemap::Link);
        }
        if self.evasive_devices {
            checkpoint = checkpoint.device_paths(DevicePaths::Any);
        }
        for (file, name) in self.externals.iter().cloned() {
            checkpoint = match name {
                Some(name) => checkpoint.external_as(file, &name),
                None => checkpoint.external(file),
            };
        }
        checkpoint = checkpoint.file_validation(self.validation.unwrap_or_default());
        if let Some(previous) = &self.previous {
            checkpoint = checkpoint.parent(images.join(previous));
        }
        // If there is no such process, the checkpoint says so.
        let target = keeper::Target::of(tree).ok();
        let kept = target.as_ref().and_then(kept_tracker);
        let mut tracker = kept.or(self.track.then(Tracker::new));
        if let Some(tracker) = &mut tracker {
            checkpoint = checkpoint.tracker(tracker);
        }
        let ends = self.command == Some(Action::Dump) && self.after == AfterDump::Kill;
        let dumped = match self.command {
            Some(Action::PreDump) => checkpoint.pre_dump(&images)?,
            _ => checkpoint.write_to(&images)?,
        };
        info!(stats = ?dumped.stats, "dumped");
        if let (Some(target), Some(tracker), true) = (target, tracker, self.track && !ends) {
            match target.keep(tracker) {
                Ok(()) => info!("a process keeps the tracker"),
                Err(error) => warn!("nobody keeps the tracker: {error}"),
            }
        }
        self.tell_status()?;
        Ok(ExitCode::SUCCESS)
    }

    fn restore(&self) -> Result<ExitCode> {
        let images = self.images()?;
        let mut stages = Stages { settings: self, images: &images };
        let session = if self.shell_job { OuterSession::Inherit } else { OuterSession::Same };
        let mut restore = Restore::from(&images).outer_session(session);
        restore = restore.file_validation(self.validation.unwrap_or_default());
        for (keys, number) in &self.inherited {
            restore =
                keys.iter().try_fold(restore, |restore, key| restore.inherit_fd(key.clone(), *number))?;
        }
        let restored = restore.hooks(&mut stages).run()?;
        info!(pid = restored.pid().get(), stats = ?restored.stats, "restored");
        self.tell_status()?;
        if self.detached {
            return Ok(ExitCode::SUCCESS);
        }
        exit_code_of(restored)
    }

    /// Is everything there? With --feature: are those there, and of use to this version?
    fn check(&self) -> Result<ExitCode> {
        let features = Features::probe();
        let mut missing = Vec::new();
        for name in &self.features {
            let feature = Feature::from_name(name).ok_or_else(|| format!("unknown feature {name}"))?;
            match features.supports(feature).why_not() {
                Some(why) => missing.push(format!("{name}: {why}")),
                None if feature.need() == Need::Unused => missing.push(format!("{name}: not used yet")),
                None => info!("{name} is there"),
            }
        }
        if self.features.is_empty() {
            let needs = features.iter().filter(|(feature, _)| is_needed(*feature));
            let lacks = needs.filter_map(|(feature, support)| Some((feature, support.why_not()?)));
            missing.extend(lacks.map(|(feature, why)| format!("{feature}: {why}")));
        }
        if missing.is_empty() {
            info!("looks good");
            return Ok(ExitCode::SUCCESS);
        }
        Err(missing.join(", ").into())
    }

    /// There is no server part, so what a driver can wait for is that the work is done.
    fn tell_status(&self) -> Result<()> {
        let Some(fd) = self.status_fd else { return Ok(()) };
        let told = OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}"));
        let told = told.and_then(|mut status| status.write_all(&[0]));
        told.map_err(|error| format!("option --status-fd: descriptor {fd}: {error}").into())
    }
}

/// Without it pages are compared.
fn kept_tracker(target: &keeper::Target) -> Option<Tracker> {
    let taken = target.take();
    taken.inspect_err(|error| warn!("the tracker that was kept is lost: {error}")).ok().flatten()
}

fn command(word: &str) -> Option<Action> {
    match word {
        "dump" => Some(Action::Dump),
        "pre-dump" => Some(Action::PreDump),
        "restore" => Some(Action::Restore),
        "check" => Some(Action::Check),
        _ => None,
    }
}

fn is_needed(feature: Feature) -> bool {
    matches!(feature.need(), Need::Both | Need::Checkpoint | Need::Restore)
}

fn no_value() -> Failure {
    "needs a value".into()
}

fn not_yet() -> Failure {
    "not supported yet".into()
}

/// Drivers compare the first line with the version of the command line that they need.
fn version() -> Result<ExitCode> {
    println!("Version: 4.2");
    println!("cryosleep {}, by the command line of CRIU", env!("CARGO_PKG_VERSION"));
    Ok(ExitCode::SUCCESS)
}

/// As shells pass on how a command has ended.
fn exit_code_of(restored: Restored) -> Result<ExitCode> {
    let code = match restored.wait()? {
        Exit::Code(code) => code,
        Exit::Signal(signal) => 128 + signal,
    };
    Ok(u8::try_from(code & 0xff)?.into())
}

/// Does what a driver wants done at the stages: scripts, the pidfile, a last look before it is too late.
struct Stages<'s> {
    settings: &'s Settings,
    images: &'s Path,
}

impl Hooks for Stages<'_> {
    fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::PreDump { root } => self.script("pre-dump", root),
            Event::Frozen { root } => self.refuse_outer_session(root),
            Event::PostDump { root } => self.script("post-dump", root),
            Event::PreRestore { root } => self.script("pre-restore", root),
            Event::PreResume { root } => {
                self.write_pid(root)?;
                self.script("post-restore", root)?;
                self.script("pre-resume", root)
            }
            Event::PostResume { root } => self.script("post-resume", root),
            _ => Ok(()),
        }
    }
}

impl Stages<'_> {
    fn script(&self, stage: &str, root: Pid) -> Result<()> {
        for script in &self.settings.scripts {
            info!(stage, script, "action script");
            // What it prints is no output of ours.
            let stderr = std::io::stderr().as_fd().try_clone_to_owned()?;
            let mut shell = Command::new("sh");
            shell.args(["-c", script]).stdout(stderr);
            shell.env("CRTOOLS_SCRIPT_ACTION", stage).env("CRTOOLS_IMAGE_DIR", self.images);
            let status = shell.env("CRTOOLS_INIT_PID", root.to_string()).status()?;
            if !status.success() {
                let failure = format!("action script {script:?} at {stage}: {status}");
                error!("{failure}"); // at the last stage the library has no use for it
                return Err(failure.into());
            }
        }
        Ok(())
    }

    /// Only a driver that says so wants the job of a shell: it could not be restored elsewhere.
    fn refuse_outer_session(&self, root: Pid) -> Result<()> {
        let stat = procfs::process::Process::new(i32::try_from(root.get())?)?.stat()?;
        if self.settings.shell_job || stat.session == stat.pid {
            return Ok(());
        }
        let session = stat.session;
        Err(format!("task {root} is in session {session}, which it does not lead: see --shell-job").into())
    }

    fn write_pid(&self, root: Pid) -> Result<()> {
        let Some(file) = &self.settings.pidfile else { return Ok(()) };
        let path = self.settings.in_work(file);
        fs::write(&path, root.to_string())
            .map_err(|error| format!("pid file {}: {error}", path.display()).into())
    }
}
