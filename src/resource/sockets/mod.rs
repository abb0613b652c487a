//! Sockets: kinds of open file that are made by tasks, since a socket tells who has made it.

mod diag;
mod options;
mod queue;
mod unix;

pub(crate) use diag::is_there as unix_diag;
pub(crate) use unix::{Pairs, Sockets, UnixPair, UnixSocket};
