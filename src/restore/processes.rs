//! All processes of a tree, with their memory.

use super::{Blueprint, Ready};
use crate::error::{Context, Result};
use crate::family::{Family, Member};
use crate::resource::memory::{self, AddressSpace, Fillers, Inheritance, MmBuilder};

impl Ready<'_> {
    /// Makes all processes, and fills their memory: while some is being filled, more is mapped.
    pub(super) fn build_processes<'s>(
        &self,
        family: &mut Family,
        blueprint: &'s Blueprint,
        fillers: &Fillers<'s>,
    ) -> Result<()> {
        let lineage = &blueprint.lineage;
        let own = |member: &Member| blueprint.processes.get(&member.number)?.space.as_ref();
        family.prepare(|puppet| {
            memory::prepare_shared(puppet, &blueprint.shared, &blueprint.workshop, fillers)
        })?;
        family.grow(&blueprint.tree, &blueprint.plan, self.outer_group, |member| match own(member) {
            Some(space) if lineage.is_donor(member.number) => {
                let (first, _) = lineage.missing(member.number, space);
                self.map(member, space, blueprint)?;
                memory::fill(&mut member.puppet(0)?, space, &first, fillers).of(member.pid)?;
                fillers.finish()?;
                memory::lock(&mut member.puppet(0)?, space).of(member.pid)
            }
            _ => Ok(()),
        })?;
        for member in family.members() {
            let Some(space) = own(member) else { continue };
            let (_, then) = lineage.missing(member.number, space);
            if !lineage.is_donor(member.number) {
                self.map(member, space, blueprint)?;
            }
            memory::fill(&mut member.puppet(0)?, space, &then, fillers).of(member.pid)?;
        }
        fillers.finish()?;
        for member in family.members().filter(|member| !lineage.is_donor(member.number)) {
            let Some(space) = own(member) else { continue };
            memory::lock(&mut member.puppet(0)?, space).of(member.pid)?;
        }
        Ok(())
    }

    /// Makes the mappings of a process.
    fn map(&self, member: &Member, space: &AddressSpace, blueprint: &Blueprint) -> Result<()> {
        let blank = memory::places(member.pid)?;
        let nothing = Inheritance::default();
        let builder = MmBuilder {
            workshop: blueprint.workshop,
            shared: &blueprint.shared,
            opened: &self.opened,
            channel: &self.channel,
            image: self.image,
            blank: &blank,
            inheritance: blueprint.lineage.inheritances.get(&member.number).unwrap_or(&nothing),
        };
        builder.build(&mut member.puppet(0)?, space).of(member.pid)
    }
}
