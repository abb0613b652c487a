//! Open files that are not part of the image: a pipe to somebody outside of the tree, a file that will be another.

use std::fs;
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
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
    Case { name: "external_file", test: file, programs: &[FILES] },
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
    let criu = super::criu::criu()?;
    let (target, mut reader, inode) = piped()?;
    fs::DirBuilder::new().mode(0o700).create(target.image()).map_err(text)?;
    let run = |words: &[&str], stdin: Stdio| -> Outcome {
        let mut line = Command::new(&criu);
        line.args(words).arg("-D").arg(target.image()).args(["-o", "log"]);
        let status = line.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::null()).status().map_err(text)?;
        let log = fs::read_to_string(target.image().join("log")).unwrap_or_default();
        ensure(status.success(), || format!("{line:?}: {status}: {log}"))
    };
    run(&["dump", "-t", &target.pid.to_string(), "--ghost-limit", "2M", "-l"], Stdio::null())?;
    reap(target.pid());
    let mut old = String::new();
    reader.read_to_string(&mut old).map_err(text)?;
    let (mut reader, writer) = std::io::pipe().map_err(text)?;
    let inherit = format!("fd[0]:pipe:[{inode}]");
    run(&["restore", "-d", "--file-locks", "--inherit-fd", &inherit], writer.into())?;
    target.go()?;
    let mut new = String::new();
    reader.read_to_string(&mut new).map_err(text)?;
    ensure(old + &new == "beforeafter, by the second", || format!("{new:?} is in the new pipe"))?;
    target.stolen_verdict()
}

/// Another file takes the place of one, which is gone; the position is that of the new one.
fn file() -> Outcome {
    let target = Target::start(FILES, &["appended"])?;
    let path = target.dir().join("output");
    let key = External::File(path.clone());
    let checkpoint = Checkpoint::of(target.pid).after(AfterDump::Kill).external(key.clone());
    checkpoint.write_to(target.image()).map_err(text)?;
    reap(target.pid());
    fs::remove_file(&path).map_err(text)?;
    let other = target.dir().join("other");
    fs::write(&other, "there already, ").map_err(text)?;
    let opened = fs::OpenOptions::new().append(true).open(&other).map_err(text)?;
    Restore::from(target.image()).inherit(key, opened).run().map_err(text)?;
    target.go()?;
    target.verdict()?;
    let contents = fs::read_to_string(&other).map_err(text)?;
    ensure(contents == "there already, after", || contents)
}
