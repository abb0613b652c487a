//! Memory of huge pages. Of those of hugetlb there are as many as the administrator allows: the test raises that limit,
//! and gives back what it was.

use std::fs::{self, File};
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};

use super::{Case, ensure};
use crate::modes::{MODES, Subject};
use crate::program::{Program, Target};
use crate::{Outcome, cell};

const HUGE: Program = Program::C("huge");

const MAPPINGS: Program = Program::C("mappings");

pub(super) const CASES: &[Case] = &[
    Case { name: "huge_pages", test: all_sizes, programs: &[HUGE] },
    Case { name: "huge_pages_transparent", test: transparent, programs: &[MAPPINGS] },
];

/// What was full of huge pages by its own wish is so again at once.
fn transparent() -> Outcome {
    const FULL: u64 = 3;
    let mut target = Target::start(MAPPINGS, &["thp"])?;
    let huge = |target: &Target| -> Result<u64, String> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", target.pid())).map_err(|e| e.to_string())?;
        let sizes = smaps.lines().filter_map(|line| line.strip_prefix("AnonHugePages:"));
        let sizes = sizes.filter_map(|size| size.trim().trim_end_matches(" kB").parse::<u64>().ok());
        Ok(sizes.sum::<u64>() / 2048)
    };
    if huge(&target)? <= FULL {
        return Err("skip: the kernel gives no transparent huge pages".into());
    }
    target.dump_and_restore()?;
    let now = huge(&target)?;
    ensure(now >= FULL, || format!("{now} huge pages"))?;
    target.go()?;
    target.stolen_verdict()
}

/// Those of 1 GiB are there only if the machine was started with some.
fn all_sizes() -> Outcome {
    modes(21, Subject::new(HUGE, &["all", "21"]).only_original())?;
    match modes(30, Subject::new(HUGE, &["one", "30"])) {
        Err(reason) if reason.starts_with("skip: ") => Ok(()),
        done => done,
    }
}

/// More pages than there are in the pool may be taken for a while.
struct Pages {
    limit: PathBuf,
    before: String,
    /// Tests of several checkouts may run at the same time.
    _lock: Flock<File>,
}

impl Pages {
    /// Those of 1 GiB cannot be had for the asking: there have to be some.
    fn allow(shift: u32, count: u32) -> Result<Self, String> {
        let skip = |what: String| format!("skip: huge pages of 2^{shift} bytes: {what}");
        let pool = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{}kB", 1u64 << (shift - 10)));
        let limit = pool.join("nr_overcommit_hugepages");
        let file = File::open(&limit).map_err(|error| skip(error.to_string()))?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| skip(errno.to_string()))?;
        let read = |name: &str| fs::read_to_string(pool.join(name)).map_err(|error| skip(error.to_string()));
        let before = read("nr_overcommit_hugepages")?;
        let pages = Self { limit, before, _lock: lock };
        let raised = fs::write(&pages.limit, count.to_string());
        match raised {
            Err(_) if read("free_hugepages")?.trim() == "0" => Err(skip("there are none".into())),
            _ => Ok(pages),
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let _ = fs::write(&self.limit, &self.before);
    }
}

/// In all its modes, one after the other.
fn modes(shift: u32, subject: Subject) -> Outcome {
    const MOST: u32 = 64;
    let _pages = Pages::allow(shift, MOST)?;
    for (name, mode) in MODES.into_iter().filter(|(_, mode)| subject.has(*mode)) {
        subject.run(mode).map_err(|reason| match reason.starts_with("skip: ") {
            true => reason,
            false => format!("{name}: {reason}"),
        })?;
        for left in fs::read_dir(cell::lab()).into_iter().flatten().flatten() {
            let _ = fs::remove_dir_all(left.path());
        }
    }
    Ok(())
}
