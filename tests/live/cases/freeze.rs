//! Trees that do not keep still while they are being stopped.

use cryosleep::{AfterDump, Checkpoint};

use super::Case;
use crate::Outcome;
use crate::program::{Program, Target};

const TASKS: Program = Program::C("tasks");

pub(super) const CASES: &[Case] =
    &[Case { name: "freeze_of_restless_children", test: restless, programs: &[TASKS] }];

/// Its children have threads that end or replace the whole process, at any moment of a freeze.
fn restless() -> Outcome {
    const ROUNDS: u32 = 12;
    let target = Target::start(TASKS, &["restless"])?;
    for round in 0..ROUNDS {
        let done = match round % 10 {
            0 => target.dump(AfterDump::Resume).map(drop),
            _ => Checkpoint::of(target.pid).preflight().map(drop).map_err(|error| error.to_string()),
        };
        done.map_err(|error| format!("round {round}: {error}; it says {:?}", target.file("result")))?;
    }
    target.go()?;
    target.verdict()
}
