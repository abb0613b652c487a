//! Restores that fail after tasks have been made: none of them is left, nor a zombie, and the image is still good.

use std::fs;
use std::process::Child;

use cryosleep::{AfterDump, Error, ErrorKind, Event, Hooks, Restore, Restored};
use nix::libc::rlim_t;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::image::spawn_as;
use super::{Case, ensure};
use crate::Outcome;
use crate::program::{Program, Target, others, reap};

const MANY: Program = Program::C("many");
const TASKS: Program = Program::C("tasks");

pub(super) const CASES: &[Case] = &[
    Case { name: "undone_among_threads", test: among_threads, programs: &[MANY] },
    Case { name: "undone_for_want_of_descriptors", test: without_descriptors, programs: &[TASKS] },
];

/// Does something when all has been planned, and nothing made.
struct Then<F>(F);

impl<F: FnMut() -> Outcome + Send> Hooks for Then<F> {
    fn event(&mut self, event: Event) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match event {
            Event::PreRestore { .. } => (self.0)().map_err(Into::into),
            _ => Ok(()),
        }
    }
}

fn restore(target: &Target, then: impl FnMut() -> Outcome + Send) -> Result<Restored, Error> {
    Restore::from(target.image()).hooks(&mut Then(then)).run()
}

/// The number of a thread in the middle of many is taken at the last moment.
fn among_threads() -> Outcome {
    let target = Target::start(MANY, &["threads"])?;
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    let mut thief: Option<Child> = None;
    let taken = target.pid + 60;
    let failed = restore(&target, || {
        thief = Some(spawn_as(taken)?);
        Ok(())
    });
    let left = others();
    let mut thief = thief.ok_or("nobody was told")?;
    ensure(left == [taken], || format!("left behind: {left:?}"))?;
    thief.kill().and_then(|()| thief.wait()).map_err(|error| error.to_string())?;
    let error = failed.err().ok_or("it was restored")?;
    ensure(error.kind() == ErrorKind::Conflict, || error.to_string())?;
    restore(&target, || Ok(())).map_err(|error| error.to_string())?;
    target.go()?;
    target.verdict()
}

/// Descriptors run out at every moment there is.
fn without_descriptors() -> Outcome {
    let target = Target::start(TASKS, &["sessions"])?;
    target.dump(AfterDump::Kill)?;
    reap(target.pid());
    let (usual, most) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|errno| errno.to_string())?;
    let limit = |descriptors| {
        setrlimit(Resource::RLIMIT_NOFILE, descriptors, most).map_err(|errno| errno.to_string())
    };
    for more in 0..100 {
        let restored = restore(&target, || {
            let open = fs::read_dir("/proc/self/fd").map_err(|error| error.to_string())?.count();
            limit(open as rlim_t + more)
        });
        limit(usual)?;
        match restored {
            Ok(_) => {
                ensure(more > 5, || format!("{more} were enough"))?;
                target.go()?;
                return target.verdict();
            }
            Err(error) => {
                let left = others();
                ensure(left.is_empty(), || format!("{more}: {error}: left behind: {left:?}"))?;
            }
        }
    }
    Err("it is never restored".into())
}
