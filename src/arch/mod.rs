//! Everything that knows a register. One file per processor architecture.

mod cpu;
mod vdso;
mod x86_64;

pub(crate) use cpu::Cpu;
pub(crate) use vdso::{ENTRY_MAX, entry as vdso_entry};
pub(crate) use x86_64::*;
