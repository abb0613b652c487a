//! The table of subjects, and what is done to each of them.

use std::time::{Duration, Instant};

use cryosleep::AfterDump;
use nix::sys::signal::Signal;

use crate::program::{Options, Program, Target, usual};
use crate::{Outcome, view};

/// In which pid namespaces a subject can live.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Namespaces {
    Any,
    /// It has something that only comes back under the numbers that it had for everybody.
    Ours,
    /// Another line of the table has more for ours.
    Another,
}

/// One line of the table.
#[derive(Clone, Copy)]
pub(crate) struct Subject {
    pub(crate) program: Program,
    pub(crate) args: &'static [&'static str],
    /// What goes on before the checkpoint: a wait that is to be interrupted in its middle, for one.
    settle: Duration,
    /// It is stopped (SIGSTOP) at the checkpoint.
    stopped: bool,
    /// It makes and reaps processes all the time: only those that stay are compared.
    churns: bool,
    namespaces: Namespaces,
    /// Its checkpoints, otherwise than usual.
    options: Options,
}

impl Subject {
    pub(crate) const fn new(program: Program, args: &'static [&'static str]) -> Self {
        Self {
            program,
            args,
            settle: Duration::from_millis(60),
            stopped: false,
            churns: false,
            namespaces: Namespaces::Any,
            options: usual,
        }
    }

    pub(crate) const fn dumped(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    pub(crate) const fn settle(mut self, millis: u64) -> Self {
        self.settle = Duration::from_millis(millis);
        self
    }

    pub(crate) const fn stopped(mut self) -> Self {
        self.stopped = true;
        self
    }

    pub(crate) const fn only_original(mut self) -> Self {
        self.namespaces = Namespaces::Ours;
        self
    }

    pub(crate) const fn only_namespaced(mut self) -> Self {
        self.namespaces = Namespaces::Another;
        self
    }

    pub(crate) const fn churns(mut self) -> Self {
        self.churns = true;
        self
    }
}

/// What happens between `ready` and `go`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    /// Nothing: shows that the subject itself is right.
    Control,
    /// A dump that it survives.
    Resume,
    /// Two of them: the second sees what the first left behind.
    ResumeTwice,
    /// Its image is taken, it is killed, and comes back.
    Restore,
    /// And once more, as what came back.
    RestoreTwice,
    /// It lives in a pid namespace, is dumped from outside, restored there, dumped again, and restored into another
    /// namespace.
    Namespaced,
}

pub(crate) const MODES: [(&str, Mode); 6] = [
    ("control", Mode::Control),
    ("resume", Mode::Resume),
    ("resume_twice", Mode::ResumeTwice),
    ("restore", Mode::Restore),
    ("restore_twice", Mode::RestoreTwice),
    ("namespaced", Mode::Namespaced),
];

impl Subject {
    pub(crate) fn has(&self, mode: Mode) -> bool {
        match self.namespaces {
            Namespaces::Any => true,
            Namespaces::Ours => !matches!(mode, Mode::Namespaced),
            Namespaces::Another => matches!(mode, Mode::Namespaced),
        }
    }

    /// What it looks like now; at once it may be on its way back into a call that changes its signal mask.
    fn compare(&self, before: &view::View, look: impl Fn() -> Result<view::View, String>) -> Outcome {
        const TRIES: u32 = 25;
        const LIMIT: Duration = Duration::from_secs(10); // a look at hundreds of threads takes long
        let (mut changed, started) = (Vec::new(), Instant::now());
        for attempt in 0..TRIES {
            if attempt > 2 && started.elapsed() > LIMIT {
                break;
            }
            std::thread::sleep(Duration::from_millis(15));
            changed = view::difference(before, &look()?, self.churns);
            if changed.is_empty() {
                return Ok(());
            }
        }
        Err(changed.join("\n"))
    }

    pub(crate) fn run(&self, mode: Mode) -> Outcome {
        let namespaced = matches!(mode, Mode::Namespaced);
        let start = if namespaced { Target::start_namespaced } else { Target::start };
        let mut target = start(self.program, self.args)?;
        target.options = self.options;
        let look =
            |target: &Target| if namespaced { view::from_inside(target.pid) } else { view::of(target.pid) };
        std::thread::sleep(self.settle);
        if self.stopped {
            target.stop()?;
        }
        let rounds = match mode {
            Mode::Control => 0,
            Mode::Resume | Mode::Restore => 1,
            Mode::ResumeTwice | Mode::RestoreTwice | Mode::Namespaced => 2,
        };
        for round in 1..=rounds {
            let before = look(&target)?;
            match mode {
                Mode::Restore | Mode::RestoreTwice => target.dump_and_restore()?,
                Mode::Namespaced if round == 1 => target.dump_and_return()?,
                Mode::Namespaced => target.dump_and_move()?,
                _ => target.dump(AfterDump::Resume).map(drop)?,
            }
            self.compare(&before, || look(&target))
                .map_err(|changed| format!("seen from outside, round {round} changed:\n{changed}"))?;
        }
        if self.stopped {
            target.go()?;
            std::thread::sleep(Duration::from_millis(50));
            if view::state(target.pid) != 'T' {
                return Err("it does not stay stopped".into());
            }
            target.signal(Signal::SIGCONT)?;
        } else {
            target.go()?;
        }
        target.verdict()
    }
}
