//! All subjects, by the name that their tests have.

use crate::modes::Subject;
use crate::program::Program::{C, Python, Shell, StaticC};

/// A call with a time limit of 1.5 seconds, stopped in its middle.
const fn timed(name: &'static [&'static str]) -> Subject {
    Subject::new(C("blocked"), name).settle(500)
}

/// A call that somebody ends.
const fn blocked(name: &'static [&'static str]) -> Subject {
    Subject::new(C("blocked"), name)
}

#[rustfmt::skip]
pub(crate) const SUBJECTS: &[(&str, Subject)] = &[
    ("static_counter", Subject::new(StaticC("counter"), &[])),
    ("dynamic_counter", Subject::new(C("counter"), &[])),
    ("registers_avx", Subject::new(C("registers"), &["spin"])),
    ("registers_avx512", Subject::new(C("registers"), &["spin512"])),
    ("registers_avx_in_call", Subject::new(C("registers"), &["call"])),
    ("registers_avx512_in_call", Subject::new(StaticC("registers"), &["call512"])),
    ("nanosleep", timed(&["nanosleep"])),
    ("nanosleep_rem", timed(&["nanosleep_rem"])),
    ("clock_nanosleep", timed(&["clock_nanosleep"])),
    ("clock_nanosleep_rem", timed(&["clock_nanosleep_rem"])),
    ("clock_nanosleep_real", timed(&["clock_nanosleep_real"])),
    ("sleep_until_monotonic", timed(&["until_monotonic"])),
    ("sleep_until_realtime", timed(&["until_realtime"])),
    ("poll_for", timed(&["poll_for"])),
    ("ppoll_for", timed(&["ppoll_for"])),
    ("select_for", timed(&["select_for"])),
    ("pselect_for", timed(&["pselect_for"])),
    ("futex_for", timed(&["futex_for"])),
    ("futex_until", timed(&["futex_until"])),
    ("sigtimedwait", timed(&["sigtimedwait"])),
    ("semtimedop", timed(&["semtimedop"])),
    ("read", blocked(&["read"])),
    ("write", blocked(&["write"])),
    ("poll", blocked(&["poll"])),
    ("ppoll", blocked(&["ppoll"])),
    ("select", blocked(&["select"])),
    ("pselect", blocked(&["pselect"])),
    ("futex", blocked(&["futex"])),
    ("futex_bitset", blocked(&["futex_bitset"])),
    ("wait4", blocked(&["wait4"])),
    ("waitid", blocked(&["waitid"])),
    ("sigsuspend", blocked(&["sigsuspend"])),
    ("pause", blocked(&["pause"])),
    ("sigwaitinfo", blocked(&["sigwaitinfo"])),
    ("semop", blocked(&["semop"])),
    ("msgrcv", blocked(&["msgrcv"])),
    ("flock_wait", blocked(&["flock"])),
    ("setlkw_wait", blocked(&["setlkw"])),
    ("shell_tree", Subject::new(Shell("tree"), &[]).churns()),
    ("python", Subject::new(Python("work"), &[]).churns()),
    ("private_memory", Subject::new(C("mappings"), &["private"])),
    ("private_memory_static", Subject::new(StaticC("mappings"), &["private"])),
    ("mapped_files", Subject::new(C("mappings"), &["files"])),
    ("shared_memory", Subject::new(C("mappings"), &["shared"])),
    ("memory_advice", Subject::new(C("mappings"), &["advice"])),
    ("guard_regions", Subject::new(C("mappings"), &["guards"])),
    ("regular_files", Subject::new(C("fds"), &["regular"])),
    ("devices", Subject::new(C("fds"), &["devices"])),
    ("pipes", Subject::new(C("fds"), &["pipes"])),
    ("places", Subject::new(C("fds"), &["places"])),
    ("chroot", Subject::new(C("fds"), &["chroot"])),
    ("signal_actions", Subject::new(C("signals"), &["actions"])),
    ("pending_signals", Subject::new(C("signals"), &["pending"])),
    ("pending_of_child", Subject::new(C("signals"), &["of_child"])),
    ("alternate_stack", Subject::new(C("signals"), &["altstack"])),
    ("interval_timers", Subject::new(C("signals"), &["timers"])),
    ("ticking_timer", Subject::new(C("signals"), &["ticking"])),
    ("sessions_and_groups", Subject::new(C("tasks"), &["sessions"])),
    ("zombies", Subject::new(C("tasks"), &["zombies"])),
    ("stopped_children", Subject::new(C("tasks"), &["stopped"])),
    ("stopped_root", Subject::new(C("counter"), &[]).stopped()),
    ("stopped_threads", Subject::new(C("tasks"), &["threads"]).stopped()),
    ("stopped_sleep", Subject::new(C("blocked"), &["poll"]).stopped()),
    ("threads", Subject::new(C("tasks"), &["threads"])),
    ("robust_mutexes", Subject::new(C("tasks"), &["robust"])),
    ("rseq", Subject::new(C("tasks"), &["rseq"])),
    ("attributes", Subject::new(C("attributes"), &[])),
    ("seccomp_shared", Subject::new(C("seccomp"), &["shared"])),
    ("seccomp_different", Subject::new(C("seccomp"), &["different"])),
    ("seccomp_deadly", Subject::new(C("seccomp"), &["deadly"])),
    ("seccomp_dropped", Subject::new(C("seccomp"), &["dropped"])),
    ("seccomp_strict", Subject::new(C("seccomp"), &["strict"])),
    ("memory_policies", Subject::new(C("numa"), &["threads"])),
    ("open_fifo", blocked(&["open_fifo"])),
];
