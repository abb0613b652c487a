//! Small attributes that prctl(2), arch_prctl(2) and personality(2) get and set, each a word: one table.

use std::collections::BTreeMap;
use std::fmt;

use super::caller::{Caller, for_good};
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
    /// Then nothing has to be set. None: it comes from whoever restores, and is set in any case.
    default: Option<u64>,
    /// What a new task has to do to come by the default, if whoever makes it has this value.
    inherited: fn(u64) -> Inherited,
    /// The call that sets it; none for a value that cannot be set.
    set: fn(u64) -> Option<Set>,
}

type Set = (Sys, [u64; 4]);

/// What becomes of an attribute of whoever makes a task by clone(2) and execve(2).
enum Inherited {
    /// The new task does not have it.
    Not,
    /// It has, until it makes this call.
    Until(Set),
    /// It has for good.
    Ever,
}

fn not_inherited(_: u64) -> Inherited {
    Inherited::Not
}

const fn result(option: i32) -> Get {
    Get::Result(sys::prctl, [option as u64, 0])
}

const fn speculation(which: u64) -> Get {
    Get::Result(sys::prctl, [libc::PR_GET_SPECULATION_CTRL as u64, which])
}

fn set(option: i32, value: u64) -> Option<Set> {
    Some((sys::prctl, [option as u64, value, 0, 0]))
}

/// Only what prctl itself has restricted is set again: the rest follows from the machine.
fn set_speculation(which: u64, value: u64) -> Option<Set> {
    const RESTRICTED: u64 =
        (libc::PR_SPEC_DISABLE | libc::PR_SPEC_FORCE_DISABLE | PR_SPEC_DISABLE_NOEXEC) as u64;
    Some(speculate(which, value & RESTRICTED))
}

fn speculate(which: u64, how: u64) -> Set {
    (sys::prctl, [libc::PR_SET_SPECULATION_CTRL as u64, which, how, 0])
}

const PR_SPEC_DISABLE_NOEXEC: libc::c_uint = 1 << 4;

fn inherited_speculation(which: u64, value: u64) -> Inherited {
    let has = |flag: libc::c_uint| value & u64::from(flag) != 0;
    if has(libc::PR_SPEC_FORCE_DISABLE) {
        Inherited::Ever
    } else if has(libc::PR_SPEC_DISABLE) {
        Inherited::Until(speculate(which, libc::PR_SPEC_ENABLE.into()))
    } else {
        Inherited::Not // restricted until execve(2), or not at all
    }
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
        inherited: not_inherited,
        set: |value| Some((sys::personality, [value, 0, 0, 0])),
    },
    Attribute {
        name: "timer slack",
        scope: Scope::Thread,
        get: result(libc::PR_GET_TIMERSLACK),
        default: None,
        inherited: not_inherited,
        set: |value| set(libc::PR_SET_TIMERSLACK, value),
    },
    Attribute {
        name: "machine check policy",
        scope: Scope::Thread,
        get: result(libc::PR_MCE_KILL_GET),
        default: None,
        inherited: not_inherited,
        // PR_MCE_KILL_SET is 1, PR_MCE_KILL_CLEAR 0; the default policy is 2
        set: |value| Some((sys::prctl, [libc::PR_MCE_KILL as u64, u64::from(value != 2), value % 2, 0])),
    },
    Attribute {
        name: "time stamp counter",
        scope: Scope::Thread,
        get: Get::Written(libc::PR_GET_TSC as u64),
        default: Some(libc::PR_TSC_ENABLE as u64),
        inherited: |_| {
            Inherited::Until((sys::prctl, [libc::PR_SET_TSC as u64, libc::PR_TSC_ENABLE as u64, 0, 0]))
        },
        set: |value| set(libc::PR_SET_TSC, value),
    },
    Attribute {
        name: "cpuid faulting",
        scope: Scope::Thread,
        get: Get::Result(sys::arch_prctl, [ARCH_GET_CPUID, 0]),
        default: Some(1),
        inherited: not_inherited,
        set: |value| Some((sys::arch_prctl, [ARCH_SET_CPUID, value, 0, 0])),
    },
    Attribute {
        name: "store bypass speculation",
        scope: Scope::Thread,
        get: speculation(0),
        default: Some(SPECULATION_FREE),
        inherited: |value| inherited_speculation(0, value),
        set: |value| set_speculation(0, value),
    },
    Attribute {
        name: "indirect branch speculation",
        scope: Scope::Thread,
        get: speculation(1),
        default: Some(SPECULATION_FREE),
        inherited: |value| inherited_speculation(1, value),
        set: |value| set_speculation(1, value),
    },
    Attribute {
        name: "child subreaper",
        scope: Scope::Process,
        get: Get::Written(libc::PR_GET_CHILD_SUBREAPER as u64),
        default: Some(0),
        inherited: not_inherited,
        set: |value| set(libc::PR_SET_CHILD_SUBREAPER, value),
    },
    Attribute {
        name: "huge pages disabled",
        scope: Scope::Process,
        get: result(libc::PR_GET_THP_DISABLE),
        default: None,
        inherited: not_inherited,
        // Since Linux 6.18 the upper bits are flags, which are the third argument.
        set: |value| Some((sys::prctl, [libc::PR_SET_THP_DISABLE as u64, value & 1, value & !1, 0])),
    },
    Attribute {
        name: "memory-deny-write-execute",
        scope: Scope::Process,
        get: result(PR_GET_MDWE),
        default: Some(0),
        inherited: |_| Inherited::Ever,
        set: |value| set(libc::PR_SET_MDWE, value),
    },
    Attribute {
        name: "memory merge",
        scope: Scope::Process,
        get: result(libc::PR_GET_MEMORY_MERGE),
        default: Some(0),
        inherited: |_| Inherited::Until((sys::prctl, [libc::PR_SET_MEMORY_MERGE as u64, 0, 0, 0])),
        set: |value| set(libc::PR_SET_MEMORY_MERGE, value),
    },
    Attribute {
        name: "parent death signal",
        scope: Scope::Thread,
        get: Get::Written(libc::PR_GET_PDEATHSIG as u64),
        default: Some(0),
        inherited: not_inherited,
        set: |value| set(libc::PR_SET_PDEATHSIG, value),
    },
    Attribute {
        name: "no_new_privs",
        scope: Scope::Thread,
        get: result(libc::PR_GET_NO_NEW_PRIVS),
        default: Some(0),
        inherited: |_| Inherited::Ever,
        set: |value| set(libc::PR_SET_NO_NEW_PRIVS, value),
    },
    // Last: it decides who may look at the process.
    Attribute {
        name: "dumpable",
        scope: Scope::Process,
        get: result(libc::PR_GET_DUMPABLE),
        default: None,
        inherited: not_inherited,
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
        let own = numbered().filter(|(_, attribute)| attribute.scope == Self::SCOPE);
        Ok(own
            .map(|(number, attribute)| match attribute.get {
                Get::Result(sys, args) => (number, batch.call(sys, &args), None),
                Get::Written(option) => {
                    let value = batch.output(8);
                    (number, batch.call(sys::prctl, &[option, value.addr]), Some(value))
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

    fn check(&self, caller: &Caller) -> Result<()> {
        let own = &caller.attributes.0;
        for (number, attribute) in numbered().filter(|(_, attribute)| attribute.scope == Self::SCOPE) {
            let Some(own) = own.get(&number) else { continue };
            let wanted = self.0.iter().find(|(other, _)| *other == number).map(|(_, value)| *value);
            let wanted = wanted.or(attribute.default).unwrap_or(*own);
            if matches!((attribute.inherited)(*own), Inherited::Ever)
                && (attribute.set)(wanted) != (attribute.set)(*own)
            {
                let reason = format!(
                    "it is {wanted} in the image, and the caller has {own}, as all tasks that it makes"
                );
                return Err(for_good(attribute.name, reason));
            }
        }
        Ok(())
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

fn numbered() -> impl Iterator<Item = (u16, &'static Attribute)> {
    ATTRIBUTES.iter().enumerate().map(|(number, attribute)| (number as u16, attribute))
}

/// Those of whoever restores that its tasks are born with, if every other task has the default: by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Own(BTreeMap<u16, u64>);

impl Own {
    /// Of the calling thread, and its process.
    pub(crate) fn look() -> Self {
        let value = |attribute: &Attribute| match attribute.get {
            Get::Result(sys::prctl, [option, which]) => crate::sys::attribute(option as i32, which).ok(),
            Get::Written(option) => crate::sys::written_attribute(option as i32).ok(),
            Get::Result(..) => None,
        };
        let own = numbered().filter_map(|(number, attribute)| {
            attribute.default?;
            // A kernel without the attribute has nothing to be inherited.
            let value = value(attribute).filter(|value| !is_default(attribute, *value))?;
            (!matches!((attribute.inherited)(value), Inherited::Not)).then_some((number, value))
        });
        Self(own.collect())
    }

    /// Makes the first new task give up what it need not keep.
    pub(crate) fn shed(&self, batch: &mut Batch) {
        for (attribute, value) in
            self.0.iter().filter_map(|(number, value)| Some((ATTRIBUTES.get(usize::from(*number))?, *value)))
        {
            if let Inherited::Until((sys, args)) = (attribute.inherited)(value) {
                batch.about(Subject::Attribute(attribute.name));
                batch.call(sys, &args);
            }
        }
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
