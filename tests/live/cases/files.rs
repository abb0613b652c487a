//! Files that need a decision of the caller's: names that are gone, devices elsewhere, contents that have changed,
//! kinds that only he knows.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use cryosleep::{
    AfterDump, Checkpoint, DevicePaths, Error, ErrorKind, FileHandler, FileValidation, LinkRemap, OpenFile,
    Restore,
};

use super::external::Driver;
use super::{Case, ensure};
use crate::Outcome;
use crate::program::{Program, Target, nothing_left, reap};

const FILES: Program = Program::C("files");
const FDS: Program = Program::C("fds");

pub(super) const CASES: &[Case] = &[
    Case { name: "files_linked", test: linked, programs: &[FILES] },
    Case { name: "files_linked_by_criu", test: linked_by_criu, programs: &[FILES] },
    Case { name: "files_of_gone_devices", test: device, programs: &[FILES] },
    Case { name: "files_changed", test: changed, programs: &[FILES] },
    Case { name: "files_above_the_soft_limit", test: above_the_limit, programs: &[FDS] },
    Case { name: "files_handled", test: handled, programs: &[FDS] },
];

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// It must fail with an error of this kind, in these words.
fn fails<T>(result: Result<T, Error>, kind: ErrorKind, words: &[&str]) -> Outcome {
    let Err(error) = result else { return Err(format!("it went well, without {words:?}")) };
    let said = error.to_string();
    ensure(error.kind() == kind && words.iter().all(|word| said.contains(word)), || said)
}

fn links_in(dir: &Path) -> usize {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter(|name| name.to_string_lossy().starts_with(".cryosleep")).count()
}

/// Restored twice from one image: the names that it has made belong to it.
fn linked() -> Outcome {
    let target = Target::start(FILES, &["linked"])?;
    let checkpoint = || Checkpoint::of(target.pid).after(AfterDump::Kill);
    fails(
        checkpoint().write_to(target.image()),
        ErrorKind::Unsupported,
        &["other names", "LinkRemap::Link"],
    )?;
    let report = checkpoint().link_remap(LinkRemap::Link).preflight().map_err(text)?;
    ensure(report.is_supported() && links_in(target.dir()) == 0, || format!("{report:?}"))?;
    checkpoint().link_remap(LinkRemap::Link).write_to(target.image()).map_err(text)?;
    reap(target.pid());
    ensure(links_in(target.dir()) == 2, || format!("{} names", links_in(target.dir())))?;
    for _ in 0..2 {
        Restore::from(target.image()).run().map_err(text)?;
        ensure(links_in(target.dir()) == 2, || format!("{} names", links_in(target.dir())))?;
        target.signal(nix::sys::signal::Signal::SIGKILL)?;
        reap(target.pid());
        nothing_left()?;
    }
    Restore::from(target.image()).run().map_err(text)?;
    names_go_with_the_image(&target)?;
    target.go()?;
    target.verdict()
}

/// When another takes its place, but not those that belong to a third one; nor what has become another file's.
fn names_go_with_the_image(target: &Target) -> Outcome {
    let names = |many: usize, when: &str| {
        ensure(links_in(target.dir()) == many, || format!("{} names {when}", links_in(target.dir())))
    };
    let again = || {
        let checkpoint = Checkpoint::of(target.pid).link_remap(LinkRemap::Link).after(AfterDump::Resume);
        checkpoint.write_to(target.image()).map(drop).map_err(text)
    };
    again()?;
    names(2, "of an image that was replaced")?;
    let flat = target.image().with_extension("flat");
    for _ in 0..2 {
        cryosleep::flatten(target.image(), &flat).map_err(text)?;
        names(4, "of an image and what was made of it")?;
    }
    again()?;
    names(4, "of a new one and what was made of the old one")?;
    Checkpoint::of(target.pid).pre_dump(target.image()).map_err(text)?;
    names(2, "of what was made of one that is gone")?;
    target.signal(nix::sys::signal::Signal::SIGKILL)?;
    reap(target.pid());
    Restore::from(&flat).run().map(drop).map_err(text)?;
    let entries = fs::read_dir(target.dir()).map_err(text)?.flatten().map(|entry| entry.path());
    let links: Vec<_> = entries.filter(|path| path.to_string_lossy().contains("/.cryosleep")).collect();
    let [other, _] = &links[..] else { return Err(format!("{links:?}")) };
    fs::remove_file(other).map_err(text)?;
    fs::write(other, "another file").map_err(text)?;
    Checkpoint::of(target.pid).pre_dump(&flat).map_err(text)?;
    ensure(fs::read(other).is_ok_and(|contents| contents == b"another file"), || "it is gone".into())?;
    names(1, "that is another file's")?;
    fs::remove_file(other).map_err(text)
}

fn linked_by_criu() -> Outcome {
    let target = Target::start(FILES, &["linked"])?;
    let driver = Driver::of(&target)?;
    let pid = target.pid.to_string();
    let words = ["--link-remap", "--evasive-devices", "--file-validation", "buildid"];
    let run =
        |first: &[&str]| driver.run("exec \"$@\"", &[first, &words].concat(), [Stdio::null(), Stdio::null()]);
    run(&["dump", "-t", &pid])?;
    reap(target.pid());
    run(&["restore", "-d"])?;
    target.go()?;
    target.stolen_verdict()
}

fn device() -> Outcome {
    let target = Target::start(FILES, &["device"])?;
    let checkpoint = || Checkpoint::of(target.pid).after(AfterDump::Kill);
    fails(checkpoint().write_to(target.image()), ErrorKind::Unsupported, &["deleted"])?;
    checkpoint().device_paths(DevicePaths::Any).write_to(target.image()).map_err(text)?;
    reap(target.pid());
    Restore::from(target.image()).run().map_err(text)?;
    target.go()?;
    target.verdict()
}

/// A program that is written to: its contents, its build, its size.
fn changed() -> Outcome {
    let target = Target::start(FILES, &["elf"])?;
    let path = target.dir().join("program");
    let bytes = fs::read(&path).map_err(text)?;
    // Four bytes of length, twenty of contents, of the kind NT_GNU_BUILD_ID, by GNU.
    let note = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let id = bytes.windows(note.len()).position(|window| window == note).ok_or("skip: no build id")?;
    let restore = |how| Restore::from(target.image()).file_validation(how).run();
    let file = fs::File::options().write(true).open(&path).map_err(text)?;
    let conflict = |how, word: &str| fails(restore(how), ErrorKind::Conflict, &[word]);

    let checkpoint = Checkpoint::of(target.pid).after(AfterDump::Kill);
    let unread = target.image().with_extension("unread");
    checkpoint.write_to(&unread).map_err(text)?;
    reap(target.pid());
    let without = Restore::from(&unread).file_validation(FileValidation::BuildId).run();
    fails(without, ErrorKind::Conflict, &["has not read its build id", "Checkpoint::file_validation"])?;
    Restore::from(&unread).file_validation(FileValidation::Modified).run().map_err(text)?;

    let checkpoint = Checkpoint::of(target.pid).after(AfterDump::Kill);
    let checkpoint = checkpoint.file_validation(FileValidation::BuildId);
    checkpoint.write_to(target.image()).map_err(text)?;
    reap(target.pid());
    let at = (id + note.len() + 5) as u64;
    let kept = bytes[at as usize];
    file.write_all_at(&[!kept], at).map_err(text)?;
    conflict(FileValidation::BuildId, "another build")?;
    conflict(FileValidation::Modified, "written to")?;
    file.write_all_at(&[kept], at).map_err(text)?;
    conflict(FileValidation::Modified, "written to")?;
    // At its end, where no program is.
    file.set_len(bytes.len() as u64 + 1).map_err(text)?;
    conflict(FileValidation::Size, "size")?;
    restore(FileValidation::BuildId).map_err(text)?;
    target.go()?;
    target.verdict()
}

/// The process that restores may have none like that itself.
fn above_the_limit() -> Outcome {
    let target = Target::start(FDS, &["limited"])?; // it has 900
    Checkpoint::of(target.pid).write_to(target.image()).map_err(text)?;
    reap(target.pid());
    let restore = |limit: &str| {
        let through = ["prlimit", limit];
        let mut helper = super::helper_by(&through, "restore", target.pid, target.image())?;
        helper.stdout(Stdio::piped()).output().map_err(|error| format!("skip: prlimit: {error}"))
    };
    let refused = restore("--nofile=600:800")?;
    let said = String::from_utf8_lossy(&refused.stdout);
    ensure(!refused.status.success() && said.contains("hard RLIMIT_NOFILE"), || said.into_owned())?;
    let restored = restore("--nofile=600:1000")?;
    ensure(restored.status.success(), || String::from_utf8_lossy(&restored.stdout).into_owned())?;
    target.go()?;
    target.stolen_verdict()
}

/// Requests for a low latency, as the caller may know them and the library does not.
struct Latency;

type Failure = Box<dyn std::error::Error + Send + Sync>;

impl FileHandler for Latency {
    fn name(&self) -> &str {
        "latency"
    }

    fn describe(&self, file: &OpenFile<'_>) -> Result<Option<Vec<u8>>, Failure> {
        if file.link() != Path::new("/dev/cpu_dma_latency") {
            return Ok(None);
        }
        let mut state = vec![0; 4];
        fs::File::from(file.fd().try_clone_to_owned()?).read_exact(&mut state)?;
        Ok(Some(state))
    }

    fn restore(&self, state: &[u8], _flags: i32) -> Result<OwnedFd, Failure> {
        let mut device = fs::File::options().read(true).write(true).open("/dev/cpu_dma_latency")?;
        device.write_all(state)?;
        Ok(device.into())
    }
}

/// Takes everything, and can do nothing.
struct Unable;

impl FileHandler for Unable {
    fn name(&self) -> &str {
        "latency"
    }

    fn describe(&self, file: &OpenFile<'_>) -> Result<Option<Vec<u8>>, Failure> {
        Err(format!("no use for {}", file.link().display()).into())
    }

    fn restore(&self, _state: &[u8], _flags: i32) -> Result<OwnedFd, Failure> {
        Err("no way".into())
    }
}

fn handled() -> Outcome {
    let target = Target::start(FDS, &["latency"])?;
    let checkpoint = || Checkpoint::of(target.pid).after(AfterDump::Kill);
    fails(
        checkpoint().write_to(target.image()),
        ErrorKind::Unsupported,
        &["cpu_dma_latency", "character device"],
    )?;
    let unable = checkpoint().handler(Arc::new(Unable)).write_to(target.image());
    fails(unable, ErrorKind::Unsupported, &["latency: no use for /dev/cpu_dma_latency"])?;
    checkpoint().handler(Arc::new(Latency)).write_to(target.image()).map_err(text)?;
    reap(target.pid());
    let restore = || Restore::from(target.image());
    fails(restore().run(), ErrorKind::Conflict, &["no handler", "Restore::handler"])?;
    fails(restore().handler(Arc::new(Unable)).run(), ErrorKind::Hook, &["latency", "cannot restore"])?;
    nothing_left()?;
    restore().handler(Arc::new(Latency)).run().map_err(text)?;
    target.go()?;
    target.verdict()
}
