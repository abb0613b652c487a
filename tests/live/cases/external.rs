//! Open files that are not part of the image: a pipe to somebody outside of the tree, a file that will be another.

use std::fs;
use std::io::{PipeReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cryosleep::{AfterDump, Checkpoint, ErrorKind, External, OuterPipes, Restore};

use super::{Case, ensure};
use crate::Outcome;
use crate::program::{Program, Target, nothing_left, reap};

const FILES: Program = Program::C("files");

pub(super) const CASES: &[Case] = &[
    Case { name: "external_pipe_by_number", test: || outer_pipe(Choice::Number), programs: &[FILES] },
    Case { name: "external_pipes_all", test: || outer_pipe(Choice::All), programs: &[FILES] },
    Case { name: "external_pipe_by_criu", test: by_criu, programs: &[FILES] },
    Case { name: "external_file", test: || file(Named::AtCheckpoint), programs: &[FILES] },
    Case { name: "external_file_of_restore", test: || file(Named::AtRestore), programs: &[FILES] },
    Case { name: "external_of_every_kind", test: every_kind, programs: &[FILES] },
    Case { name: "external_of_every_kind_by_criu", test: every_kind_by_criu, programs: &[FILES] },
];

#[derive(Clone, Copy)]
enum Choice {
    Number,
    All,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A subject that writes to a pipe of ours, and its inode number.
fn piped() -> Result<(Target, PipeReader, u64), String> {
    let (reader, writer) = std::io::pipe().map_err(text)?;
    let way = format!("/proc/{}/fd/{}", std::process::id(), writer.as_raw_fd());
    let inode = fs::metadata(&way).map_err(text)?.ino();
    Ok((Target::start(FILES, &["piped", &way])?, reader, inode))
}

fn outer_pipe(choice: Choice) -> Outcome {
    let (target, mut reader, inode) = piped()?;
    let error = match Checkpoint::of(target.pid).write_to(target.image()) {
        Ok(_) => return Err("it was dumped".into()),
        Err(error) => error,
    };
    let named = error.refusals().iter().any(|refusal| {
        let hint = refusal.hint.as_deref().unwrap_or_default();
        refusal.to_string().contains(&format!("pipe:[{inode}]")) && hint.contains("Restore::inherit")
    });
    ensure(error.kind() == ErrorKind::Unsupported && named, || error.to_string())?;

    let key = External::Pipe(inode);
    let checkpoint = Checkpoint::of(target.pid).after(AfterDump::Kill);
    let checkpoint = match choice {
        Choice::Number => checkpoint.external(key.clone()),
        Choice::All => checkpoint.outer_pipes(OuterPipes::External),
    };
    checkpoint.write_to(target.image()).map_err(text)?;
    reap(target.pid());
    let mut old = String::new();
    reader.read_to_string(&mut old).map_err(text)?;
    ensure(old == "before", || format!("{old:?} was in the pipe"))?;

    let error = match Restore::from(target.image()).run() {
        Ok(_) => return Err("it was restored without its pipe".into()),
        Err(error) => error,
    };
    let said = error.to_string();
    let named = said.contains(&key.to_string()) && said.contains("inherit");
    ensure(error.kind() == ErrorKind::Conflict && named, || said)?;
    nothing_left()?;

    let (mut reader, writer) = std::io::pipe().map_err(text)?;
    Restore::from(target.image()).inherit(key, writer).run().map_err(text)?;
    target.go()?;
    // Our end of it is closed: there is an end of file when the target has ended.
    let mut new = String::new();
    reader.read_to_string(&mut new).map_err(text)?;
    ensure(new == "after, by the second", || format!("{new:?} is in the new pipe"))?;
    target.verdict()
}

/// As a driver does it: the dump needs no option, the restore is told which descriptor the pipe is now.
fn by_criu() -> Outcome {
    let (target, mut reader, inode) = piped()?;
    let driver = Driver::of(&target)?;
    let dump = ["dump", "-t", &target.pid.to_string(), "--ghost-limit", "2M", "-l"];
    driver.run("exec \"$@\"", &dump, [Stdio::null(), Stdio::null()])?;
    reap(target.pid());
    let mut old = String::new();
    reader.read_to_string(&mut old).map_err(text)?;
    let (mut reader, writer) = std::io::pipe().map_err(text)?;
    let inherit = format!("fd[0]:pipe:[{inode}]");
    let restore = ["restore", "-d", "--file-locks", "--inherit-fd", &inherit];
    driver.run("exec \"$@\"", &restore, [writer.into(), Stdio::null()])?;
    target.go()?;
    let mut new = String::new();
    reader.read_to_string(&mut new).map_err(text)?;
    ensure(old + &new == "beforeafter, by the second", || format!("{new:?} is in the new pipe"))?;
    target.stolen_verdict()
}

/// examples/criu.rs, for one target.
pub(super) struct Driver<'t> {
    criu: PathBuf,
    target: &'t Target,
}

impl<'t> Driver<'t> {
    pub(super) fn of(target: &'t Target) -> Result<Self, String> {
        let criu = super::criu::criu()?;
        fs::DirBuilder::new().mode(0o700).create(target.image()).map_err(text)?;
        Ok(Self { criu, target })
    }

    /// By way of a shell script, which may open more for it, with these for its standard input and output.
    pub(super) fn run(&self, script: &str, words: &[&str], [input, output]: [Stdio; 2]) -> Outcome {
        let image = self.target.image();
        let mut line = Command::new("sh");
        line.args(["-c", script, "sh"]).arg(&self.criu).args(words).arg("-D").arg(image).args(["-o", "log"]);
        line.current_dir(self.target.dir()).stdin(input).stdout(output).stderr(Stdio::null());
        let status = line.status().map_err(text)?;
        let log = fs::read_to_string(image.join("log")).unwrap_or_default();
        ensure(status.success(), || format!("{line:?}: {status}: {log}"))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    AtCheckpoint,
    AtRestore,
}

/// Another file takes the place of one, which is gone; the position is that of the new one.
fn file(named: Named) -> Outcome {
    let target = Target::start(FILES, &["appended"])?;
    let path = target.dir().join("output");
    let key = External::File(path.clone());
    let checkpoint = Checkpoint::of(target.pid).after(AfterDump::Kill);
    let checkpoint = match named {
        Named::AtCheckpoint => checkpoint.external(key.clone()),
        Named::AtRestore => checkpoint,
    };
    checkpoint.write_to(target.image()).map_err(text)?;
    reap(target.pid());
    fs::remove_file(&path).map_err(text)?;
    let kind = Restore::from(target.image()).run().map_err(|error| error.kind());
    ensure(kind.is_err_and(|kind| kind == ErrorKind::Conflict), || "restored without its file".into())?;
    let other = target.dir().join("other");
    fs::write(&other, "there already, ").map_err(text)?;
    let opened = fs::OpenOptions::new().append(true).open(&other).map_err(text)?;
    Restore::from(target.image()).inherit(key, opened).run().map_err(text)?;
    target.go()?;
    target.verdict()?;
    let contents = fs::read_to_string(&other).map_err(text)?;
    ensure(contents == "there already, after", || contents)
}

/// What somebody else supplies of the subject `outer`: its descriptors, and what the system calls them.
struct Outer {
    target: Target,
    /// Two ends of a connection, two files.
    fds: [i32; 4],
    inodes: [u64; 4],
    mount: u32,
}

impl Outer {
    fn start() -> Result<Self, String> {
        let target = Target::start(FILES, &["outer"])?;
        let numbers = target.file("numbers").unwrap_or_default();
        let numbers: Vec<i32> = numbers.split(' ').filter_map(|number| number.parse().ok()).collect();
        let fds: [i32; 4] = numbers.try_into().map_err(|_| "not four numbers")?;
        let inode =
            |fd| fs::metadata(format!("/proc/{}/fd/{fd}", target.pid)).map_err(text).map(|is| is.ino());
        let inodes = [inode(fds[0])?, inode(fds[1])?, inode(fds[2])?, inode(fds[3])?];
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{}", target.pid, fds[3])).map_err(text)?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
        for name in ["one", "two", "zero"] {
            fs::write(target.dir().join(format!("new {name}")), name).map_err(text)?;
        }
        Ok(Self { target, fds, inodes, mount: mount.ok_or("no mnt_id")? })
    }

    fn supplied(&self, name: &str) -> Result<fs::File, String> {
        fs::File::options().read(true).write(true).open(self.target.dir().join(name)).map_err(text)
    }
}

fn every_kind() -> Outcome {
    let outer = Outer::start()?;
    let Outer { target, fds, inodes, mount } = &outer;
    let device = fs::metadata(target.dir().join("one")).map_err(text)?.dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let keys = [
        External::Socket(inodes[0]),
        External::Fd { pid: target.pid.into(), fd: fds[1] },
        External::Inode { major, minor, inode: inodes[2] },
        External::OfMount { mount: *mount, inode: inodes[3] },
    ];
    // Each is needed, and only the sockets are refused without.
    let zero = External::Device { major: 1, minor: 5 };
    let checkpoint = Checkpoint::of(target.pid).after(AfterDump::Kill).external_as(zero, "zero");
    let checkpoint = keys.iter().cloned().fold(checkpoint, Checkpoint::external);
    checkpoint.write_to(target.image()).map_err(text)?;
    reap(target.pid());
    for name in ["one", "two"] {
        fs::remove_file(target.dir().join(name)).map_err(text)?;
    }
    let (one, two) = std::os::unix::net::UnixStream::pair().map_err(text)?;
    let files: [OwnedFd; 4] =
        [one.into(), two.into(), outer.supplied("new one")?.into(), outer.supplied("new two")?.into()];
    let zero = outer.supplied("new zero")?;
    let supply = |left_out: Option<usize>| -> Result<(), cryosleep::Error> {
        let mut restore = Restore::from(target.image());
        for (index, (key, file)) in keys.iter().zip(&files).enumerate() {
            if Some(index) != left_out {
                restore = restore.inherit_fd(key.clone(), file.as_raw_fd())?;
            }
        }
        if left_out != Some(keys.len()) {
            restore = restore.inherit_fd(External::Name("zero".into()), zero.as_raw_fd())?;
        }
        restore.run().map(drop)
    };
    for index in 0..=keys.len() {
        let kind = supply(Some(index)).map_err(|error| error.kind());
        ensure(kind == Err(ErrorKind::Conflict), || format!("{index} is not missed: {kind:?}"))?;
    }
    nothing_left()?;
    supply(None).map_err(text)?;
    target.go()?;
    outer.target.verdict()
}

fn every_kind_by_criu() -> Outcome {
    let outer = Outer::start()?;
    let Outer { target, inodes, mount, .. } = &outer;
    let driver = Driver::of(target)?;
    let external = |key: String| ["--external".to_owned(), key];
    let keys = [
        external(format!("unix[{}]", inodes[0])),
        external(format!("unix[{}]", inodes[1])),
        external("dev[1/5]:zero".into()),
        external(format!("file[{mount:x}:{:x}]", inodes[3])),
    ];
    let words: Vec<&str> = keys.iter().flatten().map(String::as_str).collect();
    let pid = target.pid.to_string();
    driver.run(
        "exec \"$@\"",
        &[&["dump", "-t", &pid], &words[..]].concat(),
        [Stdio::null(), Stdio::null()],
    )?;
    reap(target.pid());
    let (one, two) = std::os::unix::net::UnixStream::pair().map_err(text)?;
    // Drivers write paths without the slash at their start.
    let path = target.dir().join("one");
    let inherit = |key: String| ["--inherit-fd".to_owned(), key];
    let keys = [
        inherit(format!("fd[0]:socket:[{}]", inodes[0])),
        inherit(format!("fd[1]:socket:[{}]", inodes[1])),
        inherit("fd[3]:zero".into()),
        inherit(format!("fd[4]:{}", path.display().to_string().trim_start_matches('/'))),
        inherit(format!("fd[5]:file[{mount:x}:{:x}]", inodes[3])),
    ];
    let words: Vec<&str> = keys.iter().flatten().map(String::as_str).collect();
    let script = "exec 3<'new zero' 4<>'new one' 5<>'new two'; exec \"$@\"";
    let (one, two): (OwnedFd, OwnedFd) = (one.into(), two.into());
    driver.run(script, &[&["restore", "-d"], &words[..]].concat(), [one.into(), two.into()])?;
    target.go()?;
    outer.target.stolen_verdict()
}
