//! Programs that are busy all the time, most of them not written for us: ten checkpoints, each in the middle of
//! something.

use std::time::Duration;

use super::{Case, Dice};
use nix::mount::{MsFlags, mount};

use crate::program::{Program, Target};
use crate::{Outcome, cell};

const JAVA: Program = Program::Java("Work");
const PYTHON: Program = Program::Python("family");
const SQLITE: Program = Program::Shell("sqlite");
const MAKE: Program = Program::Shell("make");
const TAR: Program = Program::Shell("tar");
const NODE: Program = Program::Node("work");
const GO: Program = Program::Go("work");
const ASYNCIO: Program = Program::Python("loop");

const THREADS: Program = Program::C("tasks");

pub(super) const CASES: &[Case] = &[
    // G1 is what a JVM takes by itself on a machine with more than one processor and enough memory.
    Case { name: "java_serial", test: || java("-XX:+UseSerialGC"), programs: &[JAVA] },
    Case { name: "java_g1", test: || java("-XX:+UseG1GC"), programs: &[JAVA] },
    Case { name: "threads_that_come_and_go", test: || rounds(THREADS, &["churn"]), programs: &[THREADS] },
    Case { name: "python_with_children", test: || rounds(PYTHON, &[]), programs: &[PYTHON] },
    Case { name: "sqlite_wal", test: || rounds(SQLITE, &[]), programs: &[SQLITE] },
    Case { name: "make_j4", test: || rounds(MAKE, &[]), programs: &[MAKE] },
    Case { name: "tar_gzip", test: || rounds(TAR, &[]), programs: &[TAR] },
    Case { name: "node", test: || rounds(NODE, &[]), programs: &[NODE] },
    Case { name: "go", test: || rounds(GO, &[]), programs: &[GO] },
    Case { name: "python_asyncio", test: || rounds(ASYNCIO, &[]), programs: &[ASYNCIO] },
];

/// With its performance data in /tmp/hsperfdata_USER/PID, which is mapped and removed at the end: in a /tmp of its own,
/// since the JVMs of other cells have the same pid.
fn java(collector: &str) -> Outcome {
    const TMP: &str = "/tmp";
    if cell::scratch().starts_with(TMP) {
        return rounds(JAVA, &["-XX:-UsePerfData", collector]);
    }
    mount(Some("tmpfs"), TMP, Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .map_err(|e| format!("mount: {e}"))?;
    rounds(JAVA, &[collector])
}

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
