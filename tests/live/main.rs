//! Real programs, dumped and restored; and what must not happen to them, or to the process that does it.
//!
//! `cargo test --test live` runs all of it, two at a time, if `cargo build --example criu` was before; see cell.rs for
//! where a test runs and modes.rs for what is done to each subject. Without the privilege for namespaces all are
//! skipped, which is visible, and a failure with CRYOSLEEP_REQUIRE_ALL=1.
#![allow(clippy::print_stdout)] // a test in a cell of its own says on stdout why it failed

mod cases;
mod cell;
mod modes;
mod program;
mod table;
mod view;

use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};

/// Why it failed; `skip: ...` for what cannot be tried here.
type Outcome = Result<(), String>;

const LIMIT: Duration = Duration::from_secs(60);

/// How the names of tests begin that go through examples/criu.rs.
const BY_CRIU: &str = "criu/";

fn main() -> ExitCode {
    if let Some(code) = cases::help().or_else(|| cell::role(inside)) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    let mut trials = Vec::new();
    for (name, subject) in table::SUBJECTS {
        for (mode, _) in modes::MODES.iter().filter(|(_, mode)| subject.has(*mode)) {
            let test = format!("{name}/{mode}");
            trials.push(Trial::ignorable_test(test.clone(), move || {
                cell::run(&test, &[subject.program], LIMIT)
            }));
        }
    }
    let case = |case: &'static cases::Case| {
        Trial::ignorable_test(case.name, move || cell::run(case.name, case.programs, LIMIT))
    };
    trials.extend(cases::all().map(case));
    for (name, subject, limit) in cases::criu::all() {
        let test = format!("{BY_CRIU}{name}");
        let programs: Vec<_> = subject.iter().map(|subject| subject.program).collect();
        trials.push(Trial::ignorable_test(test.clone(), move || cell::run(&test, &programs, limit)));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The test of this name, in its cell.
fn inside(name: &str) -> Outcome {
    if let Some(subject) = name.strip_prefix(BY_CRIU) {
        return cases::criu::test(subject);
    }
    if let Some((subject, mode)) = name.split_once('/') {
        let subject = table::SUBJECTS.iter().find(|(other, _)| *other == subject);
        let mode = modes::MODES.iter().find(|(other, _)| *other == mode);
        if let (Some((_, subject)), Some((_, mode))) = (subject, mode) {
            return subject.run(*mode);
        }
    }
    match cases::all().find(|case| case.name == name) {
        Some(case) => (case.test)(),
        None => Err(format!("no test is called {name}")),
    }
}
