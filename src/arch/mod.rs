//! Everything that knows a register. One file per processor architecture.

mod x86_64;

pub(crate) use x86_64::*;
