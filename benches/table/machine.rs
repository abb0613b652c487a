//! How quiet the machine is: what one costs that is shared, its neighbours decide too.

use std::fs;
use std::time::Instant;

/// Processor time of this machine since it was booted, in clock ticks: all, and what others had of it.
#[derive(Default)]
pub(crate) struct Machine {
    all: u64,
    stolen: u64,
}

impl Machine {
    /// As of now; zeroes where there is no /proc/stat (proc_stat(5)).
    pub(crate) fn look() -> Self {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let line = text.lines().next().unwrap_or_default();
        let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        Self { all: ticks.iter().take(8).sum(), stolen: ticks.get(7).copied().unwrap_or(0) }
    }

    /// What has happened since, and how fast it is now.
    pub(crate) fn line(&self) -> String {
        let now = Self::look();
        let stolen = 100.0 * (now.stolen - self.stolen) as f64 / (now.all - self.all).max(1) as f64;
        let call = (0..5).map(|_| nanoseconds_of_a_call()).fold(f64::MAX, f64::min);
        format!(
            "This machine: {call:.0} ns for a system call; {stolen:.1} % of its processors' time went to others."
        )
    }
}

fn nanoseconds_of_a_call() -> f64 {
    const CALLS: u32 = 20_000;
    let started = Instant::now();
    for _ in 0..CALLS {
        std::hint::black_box(nix::unistd::getppid());
    }
    started.elapsed().as_nanos() as f64 / f64::from(CALLS)
}
