//! Programs that were not written for us, busy all the time: ten checkpoints, each in the middle of something.

use std::time::Duration;

use super::{Case, Dice};
use crate::Outcome;
use crate::program::{Program, Target};

const JAVA: Program = Program::Java("Work");
const PYTHON: Program = Program::Python("family");

pub(super) const CASES: &[Case] = &[
    // Serial and G1, the JVM's own default on a machine with more than one processor.
    Case { name: "java_serial", test: || rounds(JAVA, &["-XX:+UseSerialGC"]), programs: &[JAVA] },
    Case { name: "java_g1", test: || rounds(JAVA, &["-XX:+UseG1GC"]), programs: &[JAVA] },
    Case { name: "python_with_children", test: || rounds(PYTHON, &[]), programs: &[PYTHON] },
];

/// Its image is taken and it is killed, ten times; then it must have come to the right result.
fn rounds(program: Program, options: &[&str]) -> Outcome {
    const ROUNDS: u32 = 10;
    let mut dice = Dice::new();
    let mut target = Target::start(program, options)?;
    for round in 1..=ROUNDS {
        std::thread::sleep(Duration::from_millis(20 + dice.roll(100)));
        target.dump_and_restore().map_err(|error| format!("round {round}: {error}"))?;
    }
    std::thread::sleep(Duration::from_millis(100));
    target.go()?;
    target.verdict()
}
