//! Images and surroundings that are not what they were: a restore says so, and leaves no task behind.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use cryosleep::inspect::Inspection;
use cryosleep::{AfterDump, Cgroups, Error, ErrorKind, FileValidation, Restore};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::{Case, ensure};
use crate::program::{Program, Target, nothing_left, others, reap};
use crate::{Outcome, view};

const COUNTER: Program = Program::StaticC("counter");
const FILES: Program = Program::C("mappings");
const FDS: Program = Program::C("fds");
const LOCKS: Program = Program::C("locks");
const TASKS: Program = Program::C("tasks");

pub(super) const CASES: &[Case] = &[
    Case { name: "image_torn", test: torn, programs: &[TASKS] },
    Case { name: "image_foreign", test: foreign, programs: &[] },
    Case { name: "image_of_refused_dump_stays", test: replaced, programs: &[COUNTER] },
    Case { name: "restore_when_pid_is_taken", test: || taken(0), programs: &[TASKS] },
    Case { name: "restore_when_tid_is_taken", test: || taken(4), programs: &[TASKS] },
    Case {
        name: "restore_without_mapped_file",
        test: || changed(FILES, "files", "shared", remove),
        programs: &[FILES],
    },
    Case {
        name: "restore_without_open_file",
        test: || changed(FDS, "regular", "file", remove),
        programs: &[FDS],
    },
    Case {
        name: "restore_with_longer_file",
        test: || changed(FDS, "regular", "file", lengthen),
        programs: &[FDS],
    },
    Case {
        name: "restore_with_shorter_mapping",
        test: || changed(FILES, "files", "private", shorten),
        programs: &[FILES],
    },
    Case {
        name: "restore_with_symlink",
        test: || changed(FDS, "regular", "file", link_elsewhere),
        programs: &[FDS],
    },
    Case {
        name: "restore_with_directory",
        test: || changed(FDS, "regular", "file", directory),
        programs: &[FDS],
    },
    Case { name: "restore_from_another_cgroup", test: other_cgroup, programs: &[COUNTER] },
    Case { name: "restore_without_cwd", test: || changed(FDS, "places", "inside", remove), programs: &[FDS] },
    Case { name: "copy_on_write_is_stored_once", test: stored_once, programs: &[FILES] },
    Case { name: "empty_pages_are_not_stored", test: empty_pages, programs: &[COUNTER] },
    Case { name: "pages_written_by_the_kernel", test: moved, programs: &[COUNTER] },
    Case { name: "restore_when_lock_is_taken", test: lock_taken, programs: &[LOCKS] },
    Case { name: "restore_without_system_v_segment", test: lost_segment, programs: &[FILES] },
    Case { name: "restore_with_other_contents", test: other_contents, programs: &[FDS] },
];

/// Starts it, dumps it, and lets it be gone.
fn dumped(program: Program, part: &str) -> Result<Target, String> {
    let target = Target::start(program, &[part])?;
    std::thread::sleep(std::time::Duration::from_millis(40));
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    nothing_left()?;
    Ok(target)
}

/// The restore must fail, with nothing left of it.
fn failure(target: &Target) -> Result<Error, String> {
    let before = others();
    let error = match Restore::from(target.image()).run() {
        Ok(_) => return Err("it was restored".into()),
        Err(error) => error,
    };
    ensure(others() == before, || {
        format!("{:?} instead of {before:?} are left after: {error}\n{}", others(), view::whereabouts())
    })?;
    Ok(error)
}

fn expect_conflict(target: &Target) -> Outcome {
    let error = failure(target)?;
    ensure(error.kind() == ErrorKind::Conflict, || format!("{:?}: {error}", error.kind()))
}

/// After the cause is gone, the same image must still be good.
fn restore_after_all(target: Target) -> Outcome {
    Restore::from(target.image()).run().map_err(|error| error.to_string())?;
    target.go()?;
    target.verdict()
}

/// A control group, for as long as the test needs it.
struct Group(std::path::PathBuf);

impl Group {
    fn make() -> Result<Self, String> {
        let unique = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(text)?;
        let make = |hierarchy| {
            let path = Path::new(hierarchy).join(format!("cryosleep-test-{}", unique.trim()));
            fs::create_dir(&path)
                .ok()
                .map(|()| Self(path))
                .filter(|group| group.0.join("cgroup.procs").exists())
        };
        ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids"]
            .into_iter()
            .find_map(make)
            .ok_or("skip: no control group can be made".into())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Refused, unless the caller says that it does not matter.
fn other_cgroup() -> Outcome {
    let group = Group::make()?;
    let target = Target::start(COUNTER, &[])?;
    fs::write(group.0.join("cgroup.procs"), target.pid.to_string()).map_err(text)?;
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    let error = failure(&target)?;
    ensure(error.kind() == ErrorKind::Conflict && error.to_string().contains("control group"), || {
        error.to_string()
    })?;
    Restore::from(target.image()).cgroups(Cgroups::Inherit).run().map_err(|error| error.to_string())?;
    target.go()?;
    target.verdict()
}

fn torn() -> Outcome {
    let target = dumped(TASKS, "threads")?;
    let files: Vec<_> = fs::read_dir(target.image()).map_err(text)?.flatten().map(|e| e.path()).collect();
    ensure(files.len() > 1, || format!("{files:?}"))?;
    for file in files {
        let good = fs::read(&file).map_err(text)?;
        let length = good.len();
        let mut broken: Vec<(String, Option<Vec<u8>>)> = vec![
            ("missing".into(), None),
            ("empty".into(), Some(Vec::new())),
            ("half".into(), Some(good[..length / 2].to_vec())),
            ("short by one byte".into(), Some(good[..length - 1].to_vec())),
        ];
        for bit in (0..40).map(|i| i * (length * 8 - 1) / 39) {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            broken.push((format!("bit {bit} flipped"), Some(flipped)));
        }
        for (how, contents) in broken {
            match contents {
                None => fs::remove_file(&file).map_err(text)?,
                Some(contents) => fs::write(&file, contents).map_err(text)?,
            }
            let error = failure(&target).map_err(|e| format!("{}, {how}: {e}", file.display()))?;
            ensure(error.kind() == ErrorKind::Image, || {
                format!("{}, {how}: {:?}: {error}", file.display(), error.kind())
            })?;
        }
        fs::write(&file, good).map_err(text)?;
    }
    restore_after_all(target)
}

fn foreign() -> Outcome {
    let dir = crate::cell::lab().join("foreign");
    fs::create_dir(&dir).map_err(text)?;
    for name in ["manifest", "pages.img", "core-1.img"] {
        fs::write(dir.join(name), b"CRIU or something else").map_err(text)?;
    }
    let link = dir.with_file_name("link");
    symlink(&dir, &link).map_err(text)?;
    for image in [dir.as_path(), Path::new("/nonexistent"), Path::new("/proc"), Path::new("/dev/null"), &link]
    {
        match Restore::from(image).run() {
            Err(error) if error.kind() == ErrorKind::Image => {}
            other => return Err(format!("{}: {other:?}", image.display())),
        }
    }
    nothing_left()
}

/// A dump that fails leaves the image before it as it was.
fn replaced() -> Outcome {
    let target = dumped(COUNTER, "")?;
    match cryosleep::Checkpoint::of(4_000_000u32).write_to(target.image()) {
        Ok(_) => return Err("nobody was dumped".into()),
        Err(error) => ensure(error.kind() == ErrorKind::TaskGone, || error.to_string())?,
    }
    restore_after_all(target)
}

pub(super) fn spawn_as(pid: u32) -> Result<Child, String> {
    fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).map_err(text)?;
    let child = Command::new("sleep").arg("100").spawn().map_err(text)?;
    // The next one must not be given a number that the target needs: this process starts threads.
    fs::write("/proc/sys/kernel/ns_last_pid", "20000").map_err(text)?;
    ensure(child.id() == pid, || format!("{} instead of {pid}", child.id()))?;
    Ok(child)
}

/// Somebody has the number of the process (0) or of one of its threads.
fn taken(thread: u32) -> Outcome {
    let target = dumped(TASKS, "threads")?;
    let mut thief = spawn_as(target.pid + thread)?;
    expect_conflict(&target)?;
    thief.kill().map_err(text)?;
    thief.wait().map_err(text)?;
    restore_after_all(target)
}

type Change = fn(&Path) -> std::io::Result<()>;

fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) }
}
fn lengthen(path: &Path) -> std::io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.set_len(fs::metadata(path)?.len() + 1)
}
fn shorten(path: &Path) -> std::io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.set_len(fs::metadata(path)?.len() - 1)
}
/// The name leads to a file with the same contents, by another way.
fn link_elsewhere(path: &Path) -> std::io::Result<()> {
    fs::rename(path, path.with_extension("moved"))?;
    symlink(path.with_extension("moved"), path)
}
fn directory(path: &Path) -> std::io::Result<()> {
    fs::remove_file(path)?;
    fs::create_dir(path)
}

/// Something about a file that the target needs has changed.
fn changed(program: Program, part: &str, file: &str, change: Change) -> Outcome {
    let target = dumped(program, part)?;
    change(&target.dir().join(file)).map_err(text)?;
    expect_conflict(&target)
}

/// Somebody has taken a lock that a description had, or one that a process had.
fn lock_taken() -> Outcome {
    let target = dumped(LOCKS, "")?;
    let open = |name: &str| fs::OpenOptions::new().write(true).open(target.dir().join(name)).map_err(text);
    for (name, by_range) in [("whole", false), ("posix", true)] {
        let file = open(name)?;
        if by_range {
            let all = nix::libc::flock {
                l_type: nix::libc::F_WRLCK as i16,
                l_whence: 0,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&all)).map_err(|e| e.to_string())?;
            expect_conflict(&target)?;
        } else {
            let how = nix::fcntl::FlockArg::LockSharedNonblock;
            let lock = nix::fcntl::Flock::lock(file, how).map_err(|(_, e)| e.to_string())?;
            expect_conflict(&target)?;
            drop(lock);
        }
    }
    restore_after_all(target)
}

/// By option, files may change in any way but their type.
fn other_contents() -> Outcome {
    let target = dumped(FDS, "devices")?;
    lengthen(&target.dir().join("log")).map_err(text)?;
    expect_conflict(&target)?;
    Restore::from(target.image()).file_validation(FileValidation::Type).run().map_err(|e| e.to_string())?;
    target.go()?;
    target.verdict()
}

/// Three processes of 16 MiB each have most of it in common.
fn stored_once() -> Outcome {
    let target = Target::start(FILES, &["cow"])?;
    let stats = target.dump(AfterDump::Resume)?.stats;
    // 16 MiB that all have, 5 that only the first has, 5 that only the others have; not 5 of zeroes.
    let (bytes, most) = (stats.pages_written * 4096, 29 << 20);
    ensure(bytes > 26 << 20 && bytes < most, || format!("{bytes} bytes, not {most}"))?;
    target.go()?;
    target.verdict()
}

/// Of 64 MiB every other page is empty. That is seen when some are written already.
fn empty_pages() -> Outcome {
    let mut target = Target::start(COUNTER, &["64", "1000", "0", "heeds all", "every other"])?;
    target.dump(AfterDump::Resume)?;
    let mut bytes = 0;
    for entry in fs::read_dir(target.image()).map_err(text)? {
        bytes += entry.and_then(|entry| entry.metadata()).map_err(text)?.blocks() * 512;
    }
    ensure((32 << 20..52 << 20).contains(&bytes), || format!("{bytes} bytes"))?;
    target.dump_and_restore()?;
    target.go()?;
    target.stolen_verdict()
}

/// Whenever a thread comes to another processor, the kernel writes that into its rseq area: between the sum of that page and
/// its being stored, too.
fn moved() -> Outcome {
    const DUMPS: u32 = 400;
    let mut target = Target::start(COUNTER, &["5"])?;
    let pid = target.pid();
    let all = sched_getaffinity(pid).map_err(|e| e.to_string())?;
    let each = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu) == Ok(true)).map(|cpu| {
        let mut only = CpuSet::new();
        only.set(cpu).map(|()| only)
    });
    let each = each.collect::<nix::Result<Vec<_>>>().map_err(|e| e.to_string())?;
    if each.len() < 2 {
        return Err("skip: there is one processor".into());
    }
    let over = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut places = each.iter().cycle().take_while(|_| !over.load(Ordering::Relaxed));
        let mover = scope.spawn(move || places.try_for_each(|only| sched_setaffinity(pid, only)));
        let dumped = (0..DUMPS).try_for_each(|_| {
            target.dump(AfterDump::Resume)?;
            Inspection::open(target.image()).and_then(|image| image.verify_pages()).map_err(|e| e.to_string())
        });
        over.store(true, Ordering::Relaxed);
        let moved = mover.join().map_err(|_| "the mover ended early")?;
        dumped.and(moved.map_err(|e| e.to_string()))
    })?;
    sched_setaffinity(pid, &all).map_err(|e| e.to_string())?;
    target.dump_and_restore()?;
    target.go()?;
    target.stolen_verdict()
}

/// A segment that is still there is attached, one that has gone is made again, another one is not touched.
fn lost_segment() -> Outcome {
    let ipcrm = |way: &str| {
        let removed = Command::new("ipcrm").arg(way).status().map_err(|e| format!("skip: ipcrm: {e}"))?;
        ensure(removed.success(), || removed.to_string())
    };
    let target = dumped(FILES, "sysv")?;
    ipcrm("--all=shm")?;
    let thief = "import ctypes; exit(ctypes.CDLL(None).shmget(0x5eed, 4096, 0o1000) < 0)";
    let made = Command::new("python3").args(["-c", thief]).status().map_err(|e| format!("skip: {e}"))?;
    ensure(made.success(), || made.to_string())?;
    expect_conflict(&target)?;
    ipcrm("--all=shm")?;
    restore_after_all(target)?;
    let left = fs::read_to_string("/proc/sysvipc/shm").map_err(text)?;
    ensure(left.lines().count() == 1, || left)
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
