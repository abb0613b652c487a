//! Who a thread is: user and group ids, supplementary groups, capability sets, securebits; credentials(7),
//! capabilities(7). A new task has those of whoever restores it; where they are the same nothing is changed,
//! so that no privilege is needed.
//!
//! Keyrings of a thread or a process (keyrings(7)) are refused. A session keyring is not seen: to ask for it makes a
//! task that has none join its user's.

use super::caller::Caller;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::image::{Decode, Encode, Record, Tag};
use crate::proc::status::{Ids, Status};
use crate::resource::{Rebuilt, Report, Scope, Stage, State, View};
use crate::tracee::{Answers, Batch, Call, sys};

#[derive(Encode, Decode, Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// Real, effective, saved, file system.
    users: [u32; 4],
    groups: [u32; 4],
    supplementary: Vec<u32>,
    inheritable: u64,
    permitted: u64,
    effective: u64,
    bounding: u64,
    ambient: u64,
    securebits: u32,
}

impl Record for Credentials {
    const TAG: Tag = Tag::new(b"CRED");
    const VERSION: u16 = 1;
    const NAME: &'static str = "credentials";
}

impl Credentials {
    fn new(status: &Status, securebits: u32) -> Self {
        let ids = |ids: &Ids| [ids.real, ids.effective, ids.saved, ids.fs];
        Self {
            users: ids(&status.uid),
            groups: ids(&status.gid),
            supplementary: status.groups.clone(),
            inheritable: status.cap_inh,
            permitted: status.cap_prm,
            effective: status.cap_eff,
            bounding: status.cap_bnd,
            ambient: status.cap_amb,
            securebits,
        }
    }
}

/// SECBIT_NO_SETUID_FIXUP: changing users leaves capabilities alone.
const NO_SETUID_FIXUP: u64 = 1 << 2;

const KEYCTL_GET_KEYRING_ID: u64 = 0;

/// KEY_SPEC_THREAD_KEYRING and KEY_SPEC_PROCESS_KEYRING: an error if there is none, unless it is to be made.
const KEYRINGS: [(i64, &str); 2] =
    [(-1, "thread keyrings are not supported"), (-2, "process keyrings are not supported")];

impl State for Credentials {
    const SCOPE: Scope = Scope::Thread;
    const STAGE: Stage = Stage::Identity;
    type Asked = (Call, [Call; 2]);

    fn ask(_: View<'_>, batch: &mut Batch) -> Result<Self::Asked> {
        let keyring = |special: i64| batch.call(sys::keyctl, &[KEYCTL_GET_KEYRING_ID, special as u64, 0]);
        let keyrings = KEYRINGS.map(|(special, _)| special).map(keyring);
        Ok((batch.call(sys::prctl, &[libc::PR_GET_SECUREBITS as u64]), keyrings))
    }

    fn describe(
        (securebits, keyrings): Self::Asked,
        answers: &Answers,
        view: View<'_>,
        report: &mut Report,
    ) -> Result<Option<Self>> {
        for (_, (_, reason)) in
            keyrings.into_iter().zip(KEYRINGS).filter(|(keyring, _)| answers.get(*keyring).is_ok())
        {
            report.attribute(view.tid(), "keyring", reason);
        }
        let securebits = answers.get(securebits)? as u32;
        Ok(Some(Self::new(view.status, securebits)))
    }

    fn check(&self, caller: &Caller) -> Result<()> {
        match self.bounding & !caller.status.cap_bnd {
            0 => Ok(()),
            missing => {
                let bits: Vec<_> = (0..64).filter(|bit| missing >> bit & 1 == 1).collect();
                let reason = format!("the caller's bounding set lacks capabilities of the image's: {bits:?}");
                let error =
                    Error::new(ErrorKind::Permission, reason).about(Subject::Attribute("credentials"));
                Err(error.with_hint("no task gets back what its bounding set has lost (capabilities(7))"))
            }
        }
    }

    fn build(&self, task: Rebuilt<'_>, batch: &mut Batch) -> Result<()> {
        let now = Self::new(task.fresh, own_securebits()?);
        if now == *self {
            return Ok(());
        }
        self.change(&now, batch);
        Ok(())
    }
}

fn own_securebits() -> Result<u32> {
    crate::sys::securebits().map_err(|errno| Error::call("prctl(PR_GET_SECUREBITS)", errno))
}

impl Credentials {
    /// From the privileges of `now` to these, giving up each only when it is no longer needed.
    fn change(&self, now: &Self, batch: &mut Batch) {
        batch.about(Subject::Attribute("credentials"));
        for capability in (0..64).filter(|bit| (now.bounding & !self.bounding) >> bit & 1 == 1) {
            batch.call(sys::prctl, &[libc::PR_CAPBSET_DROP as u64, capability]);
        }
        if self.supplementary != now.supplementary {
            let groups: Vec<u8> = self.supplementary.iter().flat_map(|group| group.to_ne_bytes()).collect();
            let groups_at = batch.input(&groups);
            batch.call(sys::setgroups, &[self.supplementary.len() as u64, groups_at]);
        }
        if self.users != now.users || self.groups != now.groups {
            let bits = u64::from(now.securebits) | NO_SETUID_FIXUP;
            batch.call(sys::prctl, &[libc::PR_SET_SECUREBITS as u64, bits]);
            let [real, effective, saved, fs] = self.groups.map(u64::from);
            batch.call(sys::setresgid, &[real, effective, saved]);
            batch.call(sys::setfsgid, &[fs]);
            let [real, effective, saved, fs] = self.users.map(u64::from);
            batch.call(sys::setresuid, &[real, effective, saved]);
            batch.call(sys::setfsuid, &[fs]);
        }
        // Raising ambient capabilities needs them permitted and inheritable; setting securebits needs
        // CAP_SETPCAP: both come before the final sets.
        if self.ambient != now.ambient || self.inheritable != now.inheritable {
            capset(batch, now.permitted, now.permitted, self.inheritable);
            batch.call(sys::prctl, &[libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64]);
            for capability in (0..64).filter(|bit| self.ambient >> bit & 1 == 1) {
                batch.call(
                    sys::prctl,
                    &[libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_RAISE as u64, capability],
                );
            }
        }
        if self.securebits != now.securebits || self.users != now.users || self.groups != now.groups {
            batch.call(sys::prctl, &[libc::PR_SET_SECUREBITS as u64, u64::from(self.securebits)]);
        }
        capset(batch, self.permitted, self.effective, self.inheritable);
    }
}

fn capset(batch: &mut Batch, permitted: u64, effective: u64, inheritable: u64) {
    const VERSION_3: u64 = 0x2008_0522;
    let header = batch.input_words(&[VERSION_3]);
    let half = |shift: u32| [effective, permitted, inheritable].map(|set| (set >> shift) as u32);
    let data: Vec<u8> = [half(0), half(32)].iter().flatten().flat_map(|word| word.to_ne_bytes()).collect();
    let data = batch.input(&data);
    batch.call(sys::capset, &[header, data]);
}
