//! Who restores may be restricted in ways that its children inherit: what can be undone is, the rest is an error.

use cryosleep::AfterDump;

use super::{Case, ensure, helper_by};
use crate::program::{Program, Target, others, reap};
use crate::{Outcome, view};

const COUNTER: Program = Program::StaticC("counter");
const ATTRIBUTES: Program = Program::C("attributes");

pub(super) const CASES: &[Case] =
    &[Case { name: "restore_by_restricted_caller", test: restricted, programs: &[COUNTER, ATTRIBUTES] }];

/// Ways to be restricted (see the subject), and the words of the error.
const FOR_GOOD: [(&str, &str); 6] = [
    ("no_new_privs", "no_new_privs"),
    ("mdwe", "memory-deny-write-execute"),
    ("speculation_for_good", "store bypass speculation"),
    ("filter", "seccomp"),
    ("core_group", "core scheduling"),
    ("bounding", "capabilities of the image's: [22]"),
];

const TO_BE_UNDONE: [&str; 2] = ["merge", "speculation"];

/// The exit code of a restore by such a caller, and what it says.
fn restore_by(way: &str, target: &Target) -> Result<(Option<i32>, String), String> {
    let binary = ATTRIBUTES.binary();
    let through = [binary.to_str().unwrap_or_default(), "become", way];
    let mut helper = helper_by(&through, "restore", target.pid, target.image())?;
    let out = helper.current_dir(target.dir()).output().map_err(|error| error.to_string())?;
    match target.file("result") {
        // It had no chance to say so: this kernel, or machine, has no such thing.
        Some(why) if ["EINVAL", "Invalid", "No such device"].iter().any(|word| why.contains(word)) => {
            std::fs::remove_file(target.dir().join("result")).map_err(|error| error.to_string())?;
            Ok((None, why))
        }
        _ => Ok((out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())),
    }
}

fn restricted() -> Outcome {
    let target = Target::start(COUNTER, &[])?;
    let before = view::of(target.pid)?;
    for way in TO_BE_UNDONE {
        target.dump(AfterDump::Kill)?;
        reap(target.pid());
        for (way, words) in FOR_GOOD {
            let (code, said) = restore_by(way, &target)?;
            println!("{way}: {code:?} {said}");
            let refused =
                code.is_none() || code == Some(1) && said.contains(words) && said.contains("restore/plan");
            ensure(refused && others().is_empty(), || format!("{way}: {code:?} {said} {:?}", others()))?;
        }
        let (code, said) = restore_by(way, &target)?;
        ensure(code == Some(0), || format!("{way}: {code:?} {said}"))?;
        let changed = view::difference(&before, &view::of(target.pid)?, false);
        ensure(changed.is_empty(), || format!("after {way}: {changed:?}"))?;
    }
    target.go()?;
    target.stolen_verdict()
}
