//! Everything that knows a register. One file per processor architecture.

mod cpu;
mod x86_64;

pub(crate) use cpu::Cpu;
pub(crate) use x86_64::*;
