//! Where images go: what is stored of pages, and what becomes of target and image when it cannot be stored.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cryosleep::inspect::{Inspection, Segment};
use cryosleep::{
    AfterDump, Checkpoint, Dumped, Durability, Error, ErrorKind, Hooks, ImageStore, Part, Phase, Progress,
    Restore, Spool, Subject,
};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::{Case, ensure};
use crate::Outcome;
use crate::program::{Options, Program, Target, bare, nothing_left, others, packed, reap, usual};

const COUNTER: Program = Program::StaticC("counter");
const TASKS: Program = Program::C("tasks");
const MAPPINGS: Program = Program::C("mappings");

pub(super) const CASES: &[Case] = &[
    Case { name: "store_on_full_disk", test: full_disk, programs: &[COUNTER] },
    Case { name: "store_vetoed_in_the_middle", test: vetoed, programs: &[COUNTER, MAPPINGS] },
    Case { name: "store_by_few_writers", test: few_writers, programs: &[MAPPINGS] },
    Case { name: "store_damaged_pages", test: damaged, programs: &[COUNTER] },
    Case { name: "store_packed_is_smaller", test: smaller, programs: &[TASKS] },
    Case { name: "store_through_a_pipe", test: through_a_pipe, programs: &[COUNTER] },
    Case { name: "store_on_disk_for_sure", test: synced, programs: &[COUNTER] },
    Case { name: "store_that_fails", test: failing, programs: &[COUNTER] },
    Case { name: "store_torn_streams", test: torn_streams, programs: &[TASKS] },
];

/// All ways in which pages are stored.
const WAYS: [(&str, Options); 3] = [("summed", usual), ("bare", bare), ("packed", packed)];

/// It must not have been dumped.
fn failure(target: &Target, options: Options, image: &Path) -> Result<Error, String> {
    match options(Checkpoint::of(target.pid)).write_to(image) {
        Ok(_) => Err("it was dumped".into()),
        Err(error) => Ok(error),
    }
}

fn names(dir: &Path) -> Result<BTreeSet<std::ffi::OsString>, String> {
    Ok(fs::read_dir(dir).map_err(text)?.flatten().map(|entry| entry.file_name()).collect())
}

/// A small one that is gone, and its image; and a large one for which there is no room beside it.
fn full_disk() -> Outcome {
    let disk = crate::cell::lab().join("disk");
    fs::create_dir(&disk).map_err(text)?;
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=8m,mode=0700"))
        .map_err(|e| format!("mount: {e}"))?;
    let image = disk.join("image");
    let small = Target::start_in("small", COUNTER, &[])?;
    Checkpoint::of(small.pid).write_to(&image).map_err(|error| error.to_string())?;
    reap(small.pid());
    let before = names(&image)?;
    let large = Target::start_in("large", COUNTER, &["40"])?;
    for (way, options) in WAYS {
        for (place, dir) in [("an image's", &image), ("its own", &disk.join("other"))] {
            let error = failure(&large, options, dir)?;
            ensure(error.errno() == Some(Errno::ENOSPC as i32), || format!("{way}, {place}: {error}"))?;
            ensure(error.phase() == Some(Phase::Write), || format!("{way}, {place}: {error}"))?;
        }
        ensure(names(&image)? == before, || format!("{way}: {:?}", names(&image)))?;
        ensure(names(&disk.join("other"))?.is_empty(), || {
            format!("{way}: {:?}", names(&disk.join("other")))
        })?;
    }
    Restore::from(&image).run().map_err(|error| error.to_string())?;
    small.go()?;
    large.go()?;
    small.stolen_verdict()?;
    large.verdict()
}

/// However many processes have something to write: never more than so many at the same time, each to a file of its own.
fn few_writers() -> Outcome {
    for most in 1..=2 {
        let mut target = Target::start(MAPPINGS, &["crowd"])?;
        let checkpoint = Checkpoint::of(target.pid).writers(NonZeroUsize::new(most).ok_or("none")?);
        checkpoint.after(AfterDump::Resume).write_to(target.image()).map_err(|error| error.to_string())?;
        let segments = names(target.image())?;
        let segments = segments.iter().filter(|name| name.to_string_lossy().starts_with("pages-")).count();
        ensure(segments == most, || format!("{segments} page segments"))?;
        target.dump_and_restore()?;
        target.go()?;
        target.stolen_verdict()?;
        fs::remove_dir_all(crate::cell::lab().join("subject")).map_err(text)?;
    }
    Ok(())
}

/// Says no when so many bytes have been written.
struct Enough(u64);

impl Hooks for Enough {
    fn progress(
        &mut self,
        progress: Progress,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if progress.bytes < self.0 { Ok(()) } else { Err("enough".into()) }
    }
}

/// While several threads write, or several processes.
fn vetoed() -> Outcome {
    vetoed_at(COUNTER, "40", &[1, 20 << 20, 38 << 20])?;
    fs::remove_dir_all(crate::cell::lab().join("subject")).map_err(text)?;
    vetoed_at(MAPPINGS, "crowd", &[1, 9 << 20, 17 << 20, 30 << 20])
}

fn vetoed_at(program: Program, argument: &str, moments: &[u64]) -> Outcome {
    let target = Target::start(program, &[argument])?;
    target.dump(AfterDump::Resume)?;
    let (before, open) = (names(target.image())?, descriptors()?);
    for (way, options) in WAYS {
        for bytes in moments {
            let mut enough = Enough(*bytes);
            let checkpoint = options(Checkpoint::of(target.pid));
            let error = match checkpoint.hooks(&mut enough).write_to(target.image()) {
                Ok(_) => return Err(format!("{way}: it was dumped")),
                Err(error) => error,
            };
            ensure(error.kind() == ErrorKind::Hook, || format!("{way}, {bytes}: {error}"))?;
            ensure(names(target.image())? == before, || format!("{way}: {:?}", names(target.image())))?;
            ensure(descriptors()? == open, || format!("{way}, {bytes}: {:?}", descriptors()))?;
        }
    }
    target.go()?;
    target.verdict()
}

/// Those of every process of the tree.
fn descriptors() -> Result<BTreeSet<(u32, std::ffi::OsString)>, String> {
    let of = |pid: u32| {
        let numbers = names(Path::new(&format!("/proc/{pid}/fd")))?;
        Ok(numbers.into_iter().map(move |number| (pid, number)))
    };
    let all = others().into_iter().map(of).collect::<Result<Vec<_>, String>>()?;
    Ok(all.into_iter().flatten().collect())
}

/// Large memory comes back by other ways than small: no damaged byte of it comes back, and no task stays.
fn damaged() -> Outcome {
    for options in [usual, packed] {
        let mut target = Target::start(COUNTER, &["40"])?;
        target.options = options;
        target.dump(AfterDump::Kill)?;
        reap(target.pid());
        nothing_left()?;
        let inspected = || Inspection::open(target.image()).and_then(|image| image.verify_pages());
        inspected().map_err(|error| error.to_string())?;
        for entry in fs::read_dir(target.image()).map_err(text)?.flatten() {
            if !entry.file_name().to_string_lossy().starts_with("pages") {
                continue;
            }
            let file = fs::OpenOptions::new().read(true).write(true).open(entry.path()).map_err(text)?;
            let length = file.metadata().map_err(text)?.len();
            for at in [0, length / 3, length / 2, length - 1] {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).map_err(text)?;
                file.write_all_at(&[byte[0] ^ 0x10], at).map_err(text)?;
                for (what, error) in
                    [("restored", Restore::from(target.image()).run().err()), ("verified", inspected().err())]
                {
                    let error = error.ok_or_else(|| format!("byte {at}: {what}"))?;
                    ensure(error.kind() == ErrorKind::Image, || format!("byte {at}: {error}"))?;
                    ensure(error.to_string().contains("pages-"), || format!("byte {at}: {error}"))?;
                }
                nothing_left()?;
                file.write_all_at(&byte, at).map_err(text)?;
            }
        }
        Restore::from(target.image()).run().map_err(|error| error.to_string())?;
        target.go()?;
        target.verdict()?;
        fs::remove_dir_all(crate::cell::lab().join("subject")).map_err(text)?;
    }
    Ok(())
}

/// What compresses well takes less room.
fn smaller() -> Outcome {
    let mut target = Target::start(TASKS, &["threads"])?;
    target.options = packed;
    target.dump(AfterDump::Resume)?;
    let image = Inspection::open(target.image()).map_err(|error| error.to_string())?;
    for Segment { len, contents, .. } in image.segments() {
        ensure(contents > 40 * 4096 && len < contents / 2, || format!("{len} bytes of {contents}"))?;
    }
    target.dump_and_restore()?;
    target.go()?;
    target.verdict()
}

/// From a checkpoint to a restore, without a file in between; and by way of a directory without names. One of the
/// writers finds nothing but zeroes.
fn through_a_pipe() -> Outcome {
    const WRITERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(2);
    let spools = [Spool::Memory, Spool::Directory(crate::cell::lab()), Spool::Memory];
    for ((way, options), spool) in WAYS.into_iter().zip(spools) {
        let target = Target::start(COUNTER, &["10", "1024", "30"])?;
        let (reader, writer) = std::io::pipe().map_err(text)?;
        let pid = target.pid;
        let restored = std::thread::scope(|scope| {
            let dumper = scope.spawn(move || {
                let dumped = options(Checkpoint::of(pid)).writers(WRITERS).write_to_stream(writer);
                // Only when it is gone is its number free.
                dumped.inspect(|_| reap(nix::unistd::Pid::from_raw(pid as i32)))
            });
            let restored = Restore::from_reader(reader).spool(spool).run();
            match (dumper.join().map_err(|_| "a panic")?, restored) {
                (Ok(_), Ok(restored)) => Ok(restored.pid().get()),
                (dumped, restored) => Err(format!("{way}: {dumped:?}, {restored:?}")),
            }
        })?;
        ensure(restored == pid, || way.into())?;
        target.go()?;
        target.verdict()?;
        fs::remove_dir_all(crate::cell::lab().join("subject")).map_err(text)?;
    }
    Ok(())
}

/// Takes so many pieces.
struct Patience(u32);

impl ImageStore for Patience {
    fn append(&mut self, _: Part, _: &[u8]) -> std::io::Result<()> {
        self.0 = self.0.checked_sub(1).ok_or_else(|| std::io::Error::other("no more patience"))?;
        Ok(())
    }

    fn finish(&mut self) -> std::io::Result<()> {
        self.append(Part::Manifest, &[])
    }
}

/// Were pages ever written past the page cache?
#[derive(Default)]
struct Direct(bool);

impl Hooks for Direct {
    fn progress(&mut self, _: Progress) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        for entry in fs::read_dir("/proc/self/fd")?.flatten() {
            let pages =
                fs::read_link(entry.path()).is_ok_and(|path| path.to_string_lossy().contains("/pages-"));
            let number = entry.file_name().into_string().unwrap_or_default();
            let flags = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
            let flags = flags.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).unwrap_or(0);
            self.0 |= pages && flags & nix::libc::O_DIRECT != 0;
        }
        Ok(())
    }
}

/// Durable images, on a real disk if there is one; compressed, pages have no places that O_DIRECT would take.
fn synced() -> Outcome {
    for (way, options) in WAYS {
        let target = Target::start(COUNTER, &["24"])?;
        let image = crate::cell::scratch().join(format!("synced-{way}"));
        let mut direct = Direct::default();
        let checkpoint = options(Checkpoint::of(target.pid)).durability(Durability::Synced);
        checkpoint.hooks(&mut direct).write_to(&image).map_err(|error| error.to_string())?;
        ensure(direct.0 == (way != "packed"), || format!("{way}: {}", direct.0))?;
        reap(target.pid());
        let restored = Restore::from(&image).run();
        fs::remove_dir_all(&image).map_err(text)?;
        restored.map_err(|error| error.to_string())?;
        target.go()?;
        target.verdict()?;
        fs::remove_dir_all(crate::cell::lab().join("subject")).map_err(text)?;
    }
    Ok(())
}

/// A store has failed.
fn by_store(written: cryosleep::Result<Dumped>) -> Result<Error, String> {
    let error = written.err().ok_or("it was dumped")?;
    let place = (error.phase(), error.subject());
    let expected = (Some(Phase::Write), Some(&Subject::Attribute("image store")));
    ensure(place == expected, || error.to_string()).map(|()| error)
}

/// A store that fails at any moment, a full device, a reader that has gone: the target runs on.
fn failing() -> Outcome {
    let target = Target::start(COUNTER, &["40"])?;
    let checkpoint = || Checkpoint::of(target.pid);
    // 40 MiB, 512 KiB each, and some pieces more: the last one that fails is the end.
    let mut failed = 0;
    for pieces in [0, 1, 40].into_iter().chain(80..100) {
        match checkpoint().after(AfterDump::Resume).write_to_store(&mut Patience(pieces)) {
            Ok(_) => break,
            written => {
                let error = by_store(written)?;
                ensure(error.to_string().contains("no more patience"), || error.to_string())?;
                failed = pieces;
            }
        }
    }
    ensure((82..99).contains(&failed), || format!("{failed} pieces"))?;
    // Who is to be killed lives as long as the store has not said that all has arrived.
    by_store(checkpoint().write_to_store(&mut Patience(failed)))?;
    let full = fs::OpenOptions::new().write(true).open("/dev/full").map_err(text)?;
    let error = by_store(checkpoint().write_to_stream(full))?;
    ensure(error.errno() == Some(Errno::ENOSPC as i32), || error.to_string())?;
    let (reader, writer) = std::io::pipe().map_err(text)?;
    std::thread::scope(|scope| {
        scope.spawn(move || std::io::copy(&mut reader.take(1 << 20), &mut std::io::sink()));
        let error = by_store(checkpoint().write_to_stream(writer))?;
        ensure(error.errno() == Some(Errno::EPIPE as i32), || error.to_string())
    })?;
    target.go()?;
    target.verdict()
}

/// A stream that ends too early, late, or somewhere else than it should: nothing comes of it.
fn torn_streams() -> Outcome {
    let target = Target::start(TASKS, &["threads"])?;
    let mut stream = Vec::new();
    let dumped = Checkpoint::of(target.pid).write_to_stream(&mut stream);
    let written = dumped.map_err(|error| error.to_string())?.stats.bytes_written;
    ensure(written > 0 && stream.len() as u64 > written, || format!("{written} of {}", stream.len()))?;
    reap(target.pid());
    nothing_left()?;
    let refused = |what: &str, stream: &[u8]| match Restore::from_reader(stream).run() {
        Ok(_) => Err(format!("{what}: it was restored")),
        Err(error) => ensure(error.kind() == ErrorKind::Image && error.phase() == Some(Phase::Read), || {
            format!("{what}: {error}")
        }),
    };
    for at in (0..stream.len()).step_by(stream.len() / 60) {
        refused("cut off", &stream[..at])?;
        stream[at] ^= 1;
        refused("a bit", &stream)?;
        stream[at] ^= 1;
    }
    refused("longer", &[&stream[..], b"0"].concat())?;
    refused("twice", &stream.repeat(2))?;
    refused("another thing", &fs::read("/proc/self/exe").map_err(text)?)?;
    nothing_left()?;
    Restore::from_reader(&stream[..]).run().map_err(|error| error.to_string())?;
    target.go()?;
    target.verdict()
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}
