//! Who gets signals about an open file: fcntl(2) F_SETOWN_EX, F_SETSIG, O_ASYNC. Any kind of file can have them.
//!
//! The kernel keeps with the owner who has named it, and it keeps with O_ASYNC by which number; so a task sets them
//! again by itself, when it is the user that it was.

use std::collections::BTreeSet;

use nix::fcntl::OFlag;
use nix::sys::stat::SFlag;

use super::{Collector, Probe};
use crate::Pid;
use crate::error::{Error, ErrorKind, NameCall, Result, Subject};
use crate::freeze::Process;
use crate::image::{Decode, Encode, Image, Owner, Record, Tag};
use crate::resource::Report;
use crate::resource::tasks::tree::Tree;
use crate::sys::file;
use crate::tracee::{Batch, sys};

#[derive(Encode, Decode, Debug)]
pub(crate) struct FileOwner {
    /// The table of the process that sets them, and the file's number in it.
    table: u32,
    fd: i32,
    /// F_OWNER_TID, F_OWNER_PID or F_OWNER_PGRP.
    kind: i32,
    /// 0: nobody, or nobody that is still there.
    number: u32,
    /// 0: SIGIO.
    signal: i32,
    /// F_GETFL, if O_ASYNC is in it.
    asynchronous: Option<i32>,
}

impl Record for FileOwner {
    const TAG: Tag = Tag::new(b"FOWN");
    const VERSION: u16 = 1;
    const NAME: &'static str = "owner of an open file";
}

const F_SETSIG: u64 = 10;
const F_SETOWN_EX: u64 = 15;
const F_OWNER_PGRP: i32 = 2;

impl FileOwner {
    /// None when nobody gets any.
    pub(super) fn describe(
        probe: &Probe,
        (process, table): (&Process, u32),
        collector: &Collector,
        report: &mut Report,
    ) -> Result<Option<Self>> {
        if probe.flags.contains(OFlag::O_PATH) {
            return Ok(None); // it has none, and cannot be asked
        }
        let owner = file::owner(&probe.file).call("fcntl(F_GETOWN_EX)")?;
        let asynchronous = probe.flags.contains(OFlag::O_ASYNC).then_some(probe.flags.bits());
        if (owner.kind, owner.number, owner.signal, asynchronous) == (0, 0, 0, None) {
            return Ok(None);
        }
        let number = owner.number.unsigned_abs();
        // As we see it, and as the tree does.
        let own = match owner.kind {
            F_OWNER_PGRP => collector.group(number),
            _ => collector.task(Pid::from(number)),
        };
        if number != 0 && own.is_none() {
            let what = if owner.kind == F_OWNER_PGRP { "process group" } else { "process" };
            let reason = format!("its owner (F_SETOWN) is {what} {number}, which is not part of the tree");
            report.refuse(probe.refusal(reason));
        }
        // F_NOTIFY names one, and shows nowhere else; nobody needs one for any other purpose.
        if number != 0 && probe.kind() == SFlag::S_IFDIR {
            let reason = "it may tell its owner of changes (F_NOTIFY, dnotify), which cannot be seen";
            report.refuse(probe.refusal(reason));
        }
        let users = [process.status.uid.real, process.status.uid.effective];
        if number != 0 && owner.users != users {
            let [real, effective] = owner.users;
            let reason =
                format!("its owner (F_SETOWN) was named by another user ({real}, effectively {effective})");
            report.refuse(probe.refusal(reason));
        }
        let number = own.unwrap_or(0);
        Ok(Some(Self { table, fd: probe.fd, kind: owner.kind, number, signal: owner.signal, asynchronous }))
    }

    /// All of an image, with their references checked. `slot` knows all tables.
    pub(crate) fn load(
        image: &Image,
        tree: &Tree,
        slot: impl Fn(u32, i32) -> Option<u32>,
    ) -> Result<Vec<Self>> {
        let groups = tree.processes.iter().map(|process| Pid::from(process.group));
        let numbers: BTreeSet<Pid> = tree.numbers().chain(groups).collect();
        let owners: Vec<Owner> = image.owners::<Self>().collect();
        let load = |owner: Owner| {
            let one: Self = image.require(owner)?;
            let right = slot(one.table, one.fd) == Some(owner.0)
                && (0..=F_OWNER_PGRP).contains(&one.kind)
                && (0..=64).contains(&one.signal)
                && (one.number == 0 || numbers.contains(&Pid::from(one.number)));
            match right {
                true => Ok(one),
                false => Err(Error::new(ErrorKind::Image, "an owner of an open file that cannot be")
                    .about(Subject::Section(format!("{} {owner}", Self::NAME)))),
            }
        };
        owners.into_iter().map(load).collect()
    }

    /// The number of the table that it is in.
    pub(crate) fn table(&self) -> u32 {
        self.table
    }

    /// Queues the calls that set them.
    pub(crate) fn set(&self, batch: &mut Batch) {
        let fd = self.fd as u64;
        batch.about(Subject::Fd { fd: self.fd, what: "its owner".into() });
        if (self.kind, self.number) != (0, 0) {
            // struct f_owner_ex: kind and number
            let who = batch.input_words(&[u64::from(self.kind as u32) | u64::from(self.number) << 32]);
            batch.call(sys::fcntl, &[fd, F_SETOWN_EX, who]);
        }
        if self.signal != 0 {
            batch.call(sys::fcntl, &[fd, F_SETSIG, self.signal as u64]);
        }
        if let Some(flags) = self.asynchronous {
            batch.call(sys::fcntl, &[fd, libc::F_SETFL as u64, flags as u64]);
        }
    }
}
