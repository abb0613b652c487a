//! Where images go: what is stored of pages, and what becomes of target and image when it cannot be stored.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cryosleep::inspect::{Inspection, Segment};
use cryosleep::{AfterDump, Checkpoint, Error, ErrorKind, Hooks, Phase, Progress, Restore};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::{Case, ensure};
use crate::Outcome;
use crate::program::{Options, Program, Target, bare, nothing_left, packed, reap, usual};

const COUNTER: Program = Program::StaticC("counter");
const TASKS: Program = Program::C("tasks");

pub(super) const CASES: &[Case] = &[
    Case { name: "store_on_full_disk", test: full_disk, programs: &[COUNTER] },
    Case { name: "store_vetoed_in_the_middle", test: vetoed, programs: &[COUNTER] },
    Case { name: "store_damaged_pages", test: damaged, programs: &[COUNTER] },
    Case { name: "store_packed_is_smaller", test: smaller, programs: &[TASKS] },
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

/// While several threads write.
fn vetoed() -> Outcome {
    let target = Target::start(COUNTER, &["40"])?;
    target.dump(AfterDump::Resume)?;
    let before = names(target.image())?;
    for (way, options) in WAYS {
        for bytes in [1, 20 << 20, 38 << 20] {
            let mut enough = Enough(bytes);
            let checkpoint = options(Checkpoint::of(target.pid));
            let error = match checkpoint.hooks(&mut enough).write_to(target.image()) {
                Ok(_) => return Err(format!("{way}: it was dumped")),
                Err(error) => error,
            };
            ensure(error.kind() == ErrorKind::Hook, || format!("{way}, {bytes}: {error}"))?;
            ensure(names(target.image())? == before, || format!("{way}: {:?}", names(target.image())))?;
        }
    }
    target.go()?;
    target.verdict()
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

fn text(error: std::io::Error) -> String {
    error.to_string()
}
