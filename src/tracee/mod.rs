//! A task under ptrace: the puppet that all state is read from and rebuilt in.
#![allow(unsafe_code)]

mod batch;
mod blank;
mod dummy;
mod hand;
mod memory;
mod newborn;
mod puppet;
mod stop;

pub(crate) use batch::{Answers, Batch, Call, LastWill, Output, Sys, sys};
pub(crate) use blank::{Birthplace, Blank, CloneArgs, Gift, Seed, StubFile, explain as explain_clone};
pub(crate) use dummy::Dummy;
pub(crate) use hand::with_hands;
pub(crate) use memory::{Memory, Transfer};
pub(crate) use newborn::Newborn;
pub(crate) use puppet::{
    Ending, Home, Ids, Puppet, Saved, Scratch, Springboard, call_at, last_call, run_together,
};
pub(crate) use stop::{Stop, Tracee};
