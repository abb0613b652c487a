//! Small attributes that prctl(2), arch_prctl(2) and personality(2) get and set, each a word: one table.

use std::fmt;

use crate::error::{Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, Output, Sys, sys};

/// How an attribute is read.
enum Get {
    /// It is the call's result.
    Result(Sys, [u64; 2]),
    /// The call writes 4 bytes to the address that is its second argument.
    Written(u64),
}

struct Attribute {
    name: &'static str,
    scope: Scope,
    get: Get,
    /// What every new task has: then nothing has to be set. None: it comes from whoever restores.
    default: Option<u64>,
    /// The call that sets it; none for a value that cannot be set.
    set: fn(u64) -> Option<(Sys, [u64; 4])>,
}

const fn result(option: i32) -> Get {
    Get::Result(sys::prctl, [option as u64, 0])
}

const fn speculation(which: u64) -> Get {
    Get::Result(sys::prctl, [libc::PR_GET_SPECULATION_CTRL as u64, which])
}

fn set(option: i32, value: u64) -> Option<(Sys, [u64; 4])> {
    Some((sys::prctl, [option as u64, value, 0, 0]))
}

/// Only what prctl itself has restricted is set again: the rest follows from the machine.
fn set_speculation(which: u64, value: u64) -> Option<(Sys, [u64; 4])> {
    const RESTRICTED: u64 =
        (libc::PR_SPEC_DISABLE | libc::PR_SPEC_FORCE_DISABLE | PR_SPEC_DISABLE_NOEXEC) as u64;
    const PR_SPEC_DISABLE_NOEXEC: libc::c_uint = 1 << 4;
    let value = value & RESTRICTED;
    Some((sys::prctl, [libc::PR_SET_SPECULATION_CTRL as u64, which, value, 0]))
}

const PR_GET_MDWE: i32 = 66;
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_SET_CPUID: u64 = 0x1012;

/// The position of an attribute is its number in images: append only.
const ATTRIBUTES: &[Attribute] = &[
    Attribute {
        name: "personality",
        scope: Scope::Thread,
        get: Get::Result(sys::personality, [0xffff_ffff, 0]),
        default: None,
        set: |value| Some((sys::personality, [value, 0, 0, 0])),
    },
    Attribute {
        name: "timer slack",
        scope: Scope::Thread,
        get: result(libc::PR_GET_TIMERSLACK),
        default: None,
        set: |value| set(libc::PR_SET_TIMERSLACK, value),
    },
    Attribute {
        name: "machine check policy",
        scope: Scope::Thread,
        get: result(libc::PR_MCE_KILL_GET),
        default: None,
        // PR_MCE_KILL_SET is 1, PR_MCE_KILL_CLEAR 0; the default policy is 2
        set: |value| Some((sys::prctl, [libc::PR_MCE_KILL as u64, u64::from(value != 2), value % 2, 0])),
    },
    Attribute {
        name: "time stamp counter",
        scope: Scope::Thread,
        get: Get::Written(libc::PR_GET_TSC as u64),
        default: Some(libc::PR_TSC_ENABLE as u64),
        set: |value| set(libc::PR_SET_TSC, value),
    },
    Attribute {
        name: "cpuid faulting",
        scope: Scope::Thread,
        get: Get::Result(sys::arch_prctl, [ARCH_GET_CPUID, 0]),
        default: Some(1),
        set: |value| Some((sys::arch_prctl, [ARCH_SET_CPUID, value, 0, 0])),
    },
    Attribute {
        name: "store bypass speculation",
        scope: Scope::Thread,
        get: speculation(0),
        default: Some(SPECULATION_FREE),
        set: |value| set_speculation(0, value),
    },
    Attribute {
        name: "indirect branch speculation",
        scope: Scope::Thread,
        get: speculation(1),
        default: Some(SPECULATION_FREE),
        set: |value| set_speculation(1, value),
    },
    Attribute {
        name: "child subreaper",
        scope: Scope::Process,
        get: Get::Written(libc::PR_GET_CHILD_SUBREAPER as u64),
        default: Some(0),
        set: |value| set(libc::PR_SET_CHILD_SUBREAPER, value),
    },
    Attribute {
        name: "huge pages disabled",
        scope: Scope::Process,
        get: result(libc::PR_GET_THP_DISABLE),
        default: None,
        // Since Linux 6.18 the upper bits are flags, which are the third argument.
        set: |value| Some((sys::prctl, [libc::PR_SET_THP_DISABLE as u64, value & 1, value & !1, 0])),
    },
    Attribute {
        name: "memory-deny-write-execute",
        scope: Scope::Process,
        get: result(PR_GET_MDWE),
        default: Some(0),
        set: |value| set(libc::PR_SET_MDWE, value),
    },
    Attribute {
        name: "memory merge",
        scope: Scope::Process,
        get: result(libc::PR_GET_MEMORY_MERGE),
        default: Some(0),
        set: |value| set(libc::PR_SET_MEMORY_MERGE, value),
    },
    Attribute {
        name: "parent death signal",
        scope: Scope::Thread,
        get: Get::Written(libc::PR_GET_PDEATHSIG as u64),
        default: Some(0),
        set: |value| set(libc::PR_SET_PDEATHSIG, value),
    },
    Attribute {
        name: "no_new_privs",
        scope: Scope::Thread,
        get: result(libc::PR_GET_NO_NEW_PRIVS),
        default: Some(0),
        set: |value| set(libc::PR_SET_NO_NEW_PRIVS, value),
    },
    // Last: it decides who may look at the process.
    Attribute {
        name: "dumpable",
        scope: Scope::Process,
        get: result(libc::PR_GET_DUMPABLE),
        default: None,
        // 2 (only root may read a dump) cannot be set by prctl
        set: |value| (value < 2).then_some(()).and_then(|()| set(libc::PR_SET_DUMPABLE, value)),
    },
];

/// Nothing that prctl could set is restricted: any value without those bits.
const SPECULATION_FREE: u64 = 0;

/// The attributes of a thread (or of a process) that have to be set: number in the table and value.
#[derive(Encode, Decode)]
pub(crate) struct Attributes<const PROCESS: bool>(Vec<(u16, u64)>);

impl<const PROCESS: bool> fmt::Debug for Attributes<PROCESS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |(number, value): &(u16, u64)| {
            (ATTRIBUTES.get(usize::from(*number)).map_or("?", |attribute| attribute.name), *value)
        };
        f.debug_map().entries(self.0.iter().map(named)).finish()
    }
}

impl<const PROCESS: bool> Record for Attributes<PROCESS> {
    const TAG: Tag = Tag::new(if PROCESS { b"PATR" } else { b"TATR" });
    const VERSION: u16 = 1;
    const NAME: &'static str = if PROCESS { "process attributes" } else { "thread attributes" };
}

impl<const PROCESS: bool> State for Attributes<PROCESS> {
    const SCOPE: Scope = if PROCESS { Scope::Process } else { Scope::Thread };
    const STAGE: Stage = Stage::Seal;
    type Asked = Vec<(u16, Call, Option<Output>)>;

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        let own = ATTRIBUTES.iter().enumerate().filter(|(_, attribute)| attribute.scope == Self::SCOPE);
        Ok(own
            .map(|(number, attribute)| match attribute.get {
                Get::Result(sys, args) => (number as u16, batch.call(sys, &args), None),
                Get::Written(option) => {
                    let value = batch.output(8);
                    (number as u16, batch.call(sys::prctl, &[option, value.addr]), Some(value))
                }
            })
            .collect())
    }

    fn describe(
        asked: Self::Asked,
        answers: &Answers,
        view: View<'_>,
        report: &mut Report,
    ) -> Result<Option<Self>> {
        let mut values = Vec::new();
        for (number, call, output) in asked {
            // A kernel without the attribute has nothing to be kept.
            let Ok(result) = answers.get(call) else { continue };
            let written = |output: Output| {
                let bytes = answers.bytes(&output).first_chunk::<4>().copied();
                bytes.map_or(0, |bytes| u64::from(u32::from_ne_bytes(bytes)))
            };
            let value = output.map_or(result, written);
            let Some(attribute) = ATTRIBUTES.get(usize::from(number)) else { continue };
            if is_default(attribute, value) {
                continue;
            }
            match (attribute.set)(value) {
                Some(_) => values.push((number, value)),
                None => report.attribute(
                    view.tid(),
                    attribute.name,
                    format!("the value {value} cannot be set again"),
                ),
            }
        }
        Ok(Some(Self(values)))
    }

    fn build(&self, _: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        for (number, value) in &self.0 {
            let attribute = ATTRIBUTES.get(usize::from(*number));
            if let Some((attribute, (sys, args))) = attribute.and_then(|a| Some((a, (a.set)(*value)?))) {
                batch.about(Subject::Attribute(attribute.name));
                batch.call(sys, &args);
            }
        }
        Ok(())
    }
}

fn is_default(attribute: &Attribute, value: u64) -> bool {
    const SPECULATION: u64 = libc::PR_GET_SPECULATION_CTRL as u64;
    match (attribute.default, &attribute.get) {
        (None, _) => false,
        (Some(_), Get::Result(_, [SPECULATION, _])) => {
            // Restricted by prctl, as opposed to by the machine.
            value & 1 == 0 || matches!(set_speculation(0, value), Some((_, [_, _, 0, _])))
        }
        (Some(default), _) => value == default,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speculation_is_only_set_when_it_was_restricted() {
        let bypass = &ATTRIBUTES[5];
        // PRCTL | ENABLE, and "not affected"
        assert!(is_default(bypass, 3) && is_default(bypass, 0));
        assert!(!is_default(bypass, 1 | 4));
        assert_eq!((bypass.set)(1 | 8).unwrap().1, [libc::PR_SET_SPECULATION_CTRL as u64, 0, 8, 0]);
    }
}
