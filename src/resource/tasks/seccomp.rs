//! System call filters, seccomp(2): strict mode, and programs in the order in which they were installed.
//!
//! A filter is in force for whatever a task executes, our remote calls included, so every task is traced with
//! PTRACE_O_SUSPEND_SECCOMP while it works for us: a checkpoint sets it once the task has stopped, a restore on the
//! root, from which all tasks inherit it. Detaching ends it. It needs CAP_SYS_ADMIN in the initial user namespace and
//! a caller without filters of its own; without it a target that has filters is refused. Two things follow:
//!
//! * filters can be installed first, before the identity changes. To install one takes no_new_privs or CAP_SYS_ADMIN,
//!   and the program may have had neither since (a container's filters are older than its loss of capabilities).
//! * a checkpointer that is killed in the middle of a batch leaves the rest of it to the target's filters.
//!
//! A sleep that was interrupted goes on by restart_syscall(2), as after any stop: a filter has to allow that call.
//!
//! Filters that all threads of a process have in common are installed by SECCOMP_FILTER_FLAG_TSYNC, so that they are
//! one object again: a later TSYNC by the program depends on it. What only some of the threads share becomes copies.

use crate::Pid;
use crate::error::{Error, NameCall, Refusal, Result, Subject};
use crate::freeze::Thread;
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::{read, status};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::sys::ptrace;
use crate::tracee::{Answers, Batch, Call, sys};

const ATTRIBUTE: &str = "seccomp";

const FLAG_TSYNC: u64 = 1 << 0;
/// SECCOMP_FILTER_FLAG_LOG, the only flag that the kernel tells.
const FLAG_LOG: u64 = 1 << 1;
/// Speculation control is a thread attribute of its own: a filter must not change it.
const FLAG_SPEC_ALLOW: u64 = 1 << 2;

/// How many instructions fit into a batch, in all filters of a record together. The kernel allows 32768.
const MAX_INSTRUCTIONS: usize = 12_000;

/// How it stands with the filters of a process that has been stopped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Suspended {
    /// They do not apply to remote calls, or there are none.
    pub(crate) possible: bool,
    /// So many of the oldest filters are the same in all threads.
    common: usize,
}

/// Suspends the filters of all threads.
pub(crate) fn suspend(threads: &[Thread]) -> Result<Suspended> {
    for thread in threads {
        match thread.tracee.suspend_seccomp() {
            // The caller may not, and will be told if that matters.
            Err(_) if !filtered(threads)? => return Ok(Suspended { possible: true, common: 0 }),
            Err(_) => return Ok(Suspended { possible: false, common: 0 }),
            Ok(()) => {}
        }
    }
    let [first, others @ ..] = threads else { return Ok(Suspended { possible: true, common: 0 }) };
    let shared = filters_of(first.tid())?;
    let mut common = shared.len();
    for thread in others {
        if common == 0 {
            break;
        }
        let filters = filters_of(thread.tid())?;
        common = shared.iter().zip(&filters).take(common).take_while(|(one, other)| one == other).count();
    }
    // With a single thread there is nothing to be shared.
    Ok(Suspended { possible: true, common: if others.is_empty() { 0 } else { common } })
}

fn filtered(threads: &[Thread]) -> Result<bool> {
    for thread in threads {
        if read::parsed(thread.tid(), "status", status::parse)?.seccomp != 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The refusal for a process whose filters cannot be suspended.
pub(crate) fn refusal(pid: Pid) -> Refusal {
    Refusal::new(
        pid,
        Subject::Attribute(ATTRIBUTE),
        "its system call filters cannot be suspended, so that it cannot be asked anything",
    )
    .hint("CAP_SYS_ADMIN in the initial user namespace is needed, and a caller without filters of its own")
}

/// One filter: its flags and its program.
#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    flags: u64,
    /// A `struct sock_filter` each.
    program: Vec<u64>,
}

/// All filters of a thread, the oldest first.
fn filters_of(tid: Pid) -> Result<Vec<Filter>> {
    let mut filters = Vec::new();
    let named = |error: Error| error.of(tid).about(Subject::Attribute(ATTRIBUTE));
    while let Some(program) =
        ptrace::seccomp_filter(tid, filters.len()).call("ptrace(SECCOMP_GET_FILTER)").map_err(named)?
    {
        let flags = ptrace::seccomp_flags(tid, filters.len());
        filters.push(Filter { flags: flags.call("ptrace(SECCOMP_GET_METADATA)").map_err(named)?, program });
    }
    Ok(filters)
}

impl Filter {
    /// May it hand calls to a listener (SECCOMP_RET_USER_NOTIF)? Its value stands somewhere in the program, even
    /// when it is not a return instruction's own operand.
    fn notifies(&self) -> bool {
        const USER_NOTIF: u64 = 0x7fc0_0000;
        const ACTION: u64 = 0xffff_0000;
        const RET: u64 = 0x06;
        const RET_ACCUMULATOR: u64 = 0x16;
        let code = |instruction: &u64| instruction & 0xffff;
        let computed = self.program.iter().any(|instruction| code(instruction) == RET_ACCUMULATOR);
        self.program.iter().any(|instruction| {
            instruction >> 32 & ACTION == USER_NOTIF && (computed || code(instruction) == RET)
        })
    }

    fn install(&self, flags: u64, batch: &mut Batch) {
        const SET_MODE_FILTER: u64 = 1;
        let program = batch.input_words(&self.program);
        let header = batch.input_words(&[self.program.len() as u64, program]);
        batch.call(sys::seccomp, &[SET_MODE_FILTER, self.flags & FLAG_LOG | FLAG_SPEC_ALLOW | flags, header]);
    }
}

/// Refuses what cannot be installed again.
fn check(filters: &[Filter], tid: Pid, report: &mut Report) {
    if filters.iter().any(Filter::notifies) {
        report.attribute(
            tid,
            ATTRIBUTE,
            "a filter with a listener (SECCOMP_RET_USER_NOTIF) is not supported",
        );
    }
    let instructions: usize = filters.iter().map(|filter| filter.program.len()).sum();
    if instructions > MAX_INSTRUCTIONS {
        report.attribute(
            tid,
            ATTRIBUTE,
            format!("filters of {instructions} instructions in all: {MAX_INSTRUCTIONS} is the most"),
        );
    }
}

fn install(filters: &[Filter], flags: u64, batch: &mut Batch) {
    batch.about(Subject::Attribute(ATTRIBUTE));
    filters.iter().for_each(|filter| filter.install(flags, batch));
}

/// The filters that all threads of a process share.
#[derive(Encode, Decode, Debug)]
pub(crate) struct SharedFilters(Vec<Filter>);

impl Record for SharedFilters {
    const TAG: Tag = Tag::new(b"SECS");
    const VERSION: u16 = 1;
    const NAME: &'static str = "system call filters of a process";
}

impl State for SharedFilters {
    const SCOPE: Scope = Scope::Process;
    /// Before those of single threads.
    const STAGE: Stage = Stage::Plain;
    const SUSPENDS_SECCOMP: bool = true;
    type Asked = ();

    fn ask(_: View<'_>, _: &mut Batch) -> Result<()> {
        Ok(())
    }

    fn describe((): (), _: &Answers, view: View<'_>, report: &mut Report) -> Result<Option<Self>> {
        let common = view.process.seccomp.common;
        if common == 0 {
            return Ok(None);
        }
        let mut filters = filters_of(view.tid())?;
        filters.truncate(common);
        check(&filters, view.process.pid, report);
        Ok(Some(Self(filters)))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        install(&self.0, FLAG_TSYNC, batch);
        Ok(())
    }
}

/// What is in force for one thread alone.
#[derive(Encode, Decode, Debug)]
pub(crate) enum Seccomp {
    Strict,
    /// Besides those that all threads share.
    Filters(Vec<Filter>),
}

impl Record for Seccomp {
    const TAG: Tag = Tag::new(b"SECC");
    const VERSION: u16 = 1;
    const NAME: &'static str = "system call filters of a thread";
}

impl State for Seccomp {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Identity;
    const SUSPENDS_SECCOMP: bool = true;
    type Asked = Call;

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Call> {
        Ok(batch.call(sys::prctl, &[libc::PR_GET_SECCOMP as u64]))
    }

    fn describe(call: Call, answers: &Answers, view: View<'_>, report: &mut Report) -> Result<Option<Self>> {
        const STRICT: u64 = 1;
        const FILTER: u64 = 2;
        // EINVAL: a kernel without seccomp.
        match answers.get(call).unwrap_or(0) {
            STRICT => Ok(Some(Self::Strict)),
            FILTER => {
                let filters = filters_of(view.tid())?.split_off(view.process.seccomp.common);
                check(&filters, view.tid(), report);
                Ok((!filters.is_empty()).then_some(Self::Filters(filters)))
            }
            _ => Ok(None),
        }
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        match self {
            Self::Strict => {
                batch.about(Subject::Attribute(ATTRIBUTE));
                batch.call(sys::seccomp, &[0, 0, 0]);
            }
            Self::Filters(filters) => install(filters, 0, batch),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(program: &[(u16, u32)]) -> Filter {
        let word = |(code, operand): &(u16, u32)| u64::from(*code) | u64::from(*operand) << 32;
        Filter { flags: 0, program: program.iter().map(word).collect() }
    }

    #[test]
    fn listeners_are_seen() {
        let (load, ret, ret_a) = (0x20, 0x06, 0x16);
        assert!(filter(&[(load, 0), (ret, 0x7fc0_0000)]).notifies());
        assert!(filter(&[(ret, 0x7fc0_1234)]).notifies());
        assert!(filter(&[(0x00, 0x7fc0_0000), (ret_a, 0)]).notifies());
        assert!(!filter(&[(0x15, 0x7fc0_0000), (ret, 0x7fff_0000)]).notifies());
        assert!(!filter(&[(load, 0), (ret, 0x7ffc_0000), (ret, 0x8000_0000), (ret, 0)]).notifies());
    }
}
