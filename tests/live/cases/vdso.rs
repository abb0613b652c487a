//! A target from another kernel: one whose vdso is not that of this kernel, because the test has changed it. What it
//! had in the place of its functions is no code that could be executed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use super::{Case, ensure};
use crate::program::{Program, Target};
use crate::{Outcome, view};

const MAPPINGS: Program = Program::C("mappings");

pub(super) const CASES: &[Case] =
    &[Case { name: "vdso_of_another_kernel", test: another, programs: &[MAPPINGS] }];

/// Where a process has its vdso.
fn vdso_of(pid: u32) -> Result<(u64, usize), String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| e.to_string())?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).ok_or("it has no vdso")?;
    let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).ok_or("no range")?;
    let number = |text| u64::from_str_radix(text, 16).map_err(|e| e.to_string());
    let (start, end) = (number(start)?, number(end)?);
    Ok((start, (end - start) as usize))
}

/// Where functions begin in it, by its section of symbols.
fn functions(text: &[u8]) -> Vec<u64> {
    let word = |at: usize| u64::from_le_bytes(text[at..at + 8].try_into().unwrap_or_default());
    let half = |at: usize| usize::from(u16::from_le_bytes([text[at], text[at + 1]]));
    let sections = (0..half(60)).map(|index| word(40) as usize + index * half(58));
    const SHT_DYNSYM: u8 = 11;
    let Some(symbols) = sections.into_iter().find(|at| text[at + 4] == SHT_DYNSYM) else { return Vec::new() };
    let (start, size) = (word(symbols + 24) as usize, word(symbols + 32) as usize);
    let functions = (start..start + size).step_by(24).filter(|at| text[at + 4] & 0xf == 2);
    functions.map(|at| word(at + 8)).collect()
}

fn change(pid: u32) -> Outcome {
    const UD2: &[u8] = b"\x0f\x0b";
    let (start, length) = vdso_of(pid)?;
    let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"));
    let memory = memory.map_err(|e| e.to_string())?;
    let mut text = vec![0; length];
    memory.read_exact_at(&mut text, start).map_err(|e| e.to_string())?;
    let functions = functions(&text);
    ensure(functions.len() >= 8, || format!("{functions:?}"))?;
    functions.into_iter().try_for_each(|at| memory.write_all_at(UD2, start + at)).map_err(|e| e.to_string())
}

/// From there to here, and from here to here.
fn another() -> Outcome {
    let mut target = Target::start(MAPPINGS, &["vdso"])?;
    let tree = view::tree(target.pid);
    ensure(tree.len() == 2, || format!("{tree:?}"))?;
    tree.iter().try_for_each(|pid| change(*pid))?;
    let before = vdso_of(target.pid)?;
    target.dump_and_restore()?;
    let after = vdso_of(target.pid)?;
    ensure(before.0 != after.0, || format!("it was left at {:x}", after.0))?;
    target.dump_and_restore()?;
    ensure(vdso_of(target.pid)? == after, || "another place the second time".into())?;
    target.go()?;
    target.verdict()
}
