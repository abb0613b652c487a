//! Tasks that nobody minds yet.

use nix::sys::signal::{Signal, kill};

use super::Tracee;

/// Traced tasks on their way to whoever is going to end them. Dropped before they are there, they end at once: a zombie
/// would stay, and a thread that is dead but traced keeps its whole process from being seen as dead.
#[derive(Debug, Default)]
#[must_use = "they end when it is dropped"]
pub(crate) struct Newborn(Vec<Tracee>);

impl Newborn {
    pub(crate) fn push(&mut self, tracee: Tracee) {
        self.0.push(tracee);
    }

    pub(crate) fn first(&self) -> Option<&Tracee> {
        self.0.first()
    }

    /// By these numbers they know themselves, in the order in which they were born.
    pub(crate) fn known_as(mut self, numbers: &[u32]) -> Self {
        for (tracee, number) in self.0.iter_mut().zip(numbers) {
            *tracee = tracee.clone().known_as(*number);
        }
        self
    }

    /// They are minded from now on.
    pub(crate) fn into_tasks(mut self) -> Vec<Tracee> {
        std::mem::take(&mut self.0)
    }
}

impl From<Tracee> for Newborn {
    fn from(tracee: Tracee) -> Self {
        Self(vec![tracee])
    }
}

impl Drop for Newborn {
    fn drop(&mut self) {
        for tracee in &self.0 {
            // Of a thread, this ends its process.
            let _ = kill(tracee.tid().nix(), Signal::SIGKILL);
        }
        for tracee in &self.0 {
            let _ = tracee.wait_death(true);
        }
    }
}
