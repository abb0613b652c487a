//! Takes note of threads that die while their tracer can do nothing.
//!
//! A thread in execve(2) ends its siblings, and waits until they are gone: those that are traced, until their tracer has
//! taken note. All that time PTRACE_SEIZE waits too, for whatever thread of the process, and knows no time limit. So who
//! has seized one thread and is about to seize the next could wait for ever, if nobody else took note. Any thread of the
//! tracer's process can.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::Pid;
use crate::error::{NameCall, Result};
use crate::sys::wait;

/// Does so for one process at a time, on a thread of its own if there was any of several threads.
#[derive(Debug, Default)]
pub(super) struct Undertaker(Option<(Sender<Vec<Pid>>, JoinHandle<()>)>);

impl Undertaker {
    /// These threads of one process are being seized: all but the leader, of whose end nobody hears before that of the
    /// others.
    pub(super) fn mind(&mut self, threads: Vec<Pid>) -> Result<()> {
        if threads.is_empty() {
            return Ok(());
        }
        if self.0.is_none() {
            let (tell, told) = channel();
            let thread = std::thread::Builder::new().name("cryosleep-ends".into());
            self.0 = Some((tell, thread.spawn(move || work(&told)).call("clone")?));
        }
        if let Some((tell, _)) = &self.0 {
            let _ = tell.send(threads); // it hears us as long as we are there
        }
        Ok(())
    }
}

impl Drop for Undertaker {
    fn drop(&mut self) {
        if let Some((tell, thread)) = self.0.take() {
            drop(tell);
            let _ = thread.join();
        }
    }
}

fn work(told: &Receiver<Vec<Pid>>) {
    const LOOK: Duration = Duration::from_millis(5);
    /// A look takes less than a tenth of that.
    const EACH: Duration = Duration::from_micros(10);
    let mut threads: Vec<Pid> = Vec::new();
    loop {
        match told.recv_timeout(LOOK.max(EACH * threads.len() as u32)) {
            Ok(others) => threads = others,
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => threads.retain(|tid| match wait::peek(*tid) {
                Ok(Some(_)) => {
                    wait::reap(*tid);
                    false
                }
                _ => true, // it lives, or is yet to be seized
            }),
        }
    }
}
