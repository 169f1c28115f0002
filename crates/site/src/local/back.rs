//! The way back after the commit point: a machine whose QEMU died at its destination before its memory
//! was all there runs on at its source, which has it as it left.
//!
//! ```text
//! destination                center                        source
//! it is dead: Fell is
//! written down ------------> generation raised,
//!                            warrant ---------------------> Returning and the generation are
//!                                                           written down; QEMU is taken back; runs
//! what is left goes <------- it runs <--------------------- in no move any more
//! ```
//!
//! Each step may be asked again. Nobody guesses: only the site whose process it was says that it is
//! dead, and from then on does not run the machine under that generation, whatever it is asked.

use std::sync::Arc;

use godwit_migrate::clock;
use godwit_migrate::hybrid::{DestinationFate, MoveError, Received, reclaim};
use godwit_qemu::{Life, Machine};
use godwit_transfer::Warrant;
use godwit_types::{Code, Fault, Generation, MigrationId, Name, VmId};
use tracing::{info, warn};

use super::adopt::end_strays;
use super::allowed::{First, Refusal};
use super::arrivals::Arrivals;
use super::course::{End, Migration, Step};
use super::departures::Departures;
use super::drive::{RECEIVED, RELEASE_WITHIN, UNDO_WITHIN, measured};
use super::faults::into_fault;
use super::look::{found_exited, life_of};
use super::owner::{Ask, Look, Owned};
use super::parts::Parts;
use super::progress::runs;
use super::record::{DesiredState, MachineRecord};
use super::relays::{MovePaths, end_all_below};
use super::travellers::Found;
use crate::Fell;

impl Arrivals {
    /// Gives up a machine that has run here and whose QEMU is dead, while pages of it are at its
    /// source only. What is answered holds for good: it is in the record before it is said.
    pub(super) async fn fell(
        &self,
        id: MigrationId,
        vm: VmId,
        generation: Generation,
    ) -> Result<Fell, Fault> {
        let owner = self.parts.machines.owner(vm).await?;
        let now = owner.ask(Look { needs: None }).await?;
        let migration = in_move(&now.record, id, End::Destination, &self.parts.name)?.clone();
        if !self.has_run(&now.record, now.machine.as_ref()).await {
            return Err(Fault::conflict(format!(
                "machine '{}' has not run at '{}'",
                now.record.name, self.parts.name
            )));
        }
        let known = migration.fell();
        if let Some(why) = stays(known, self.had_all_memory(&now.record)) {
            let (name, site) = (&now.record.name, &self.parts.name);
            return Err(Fault::conflict(format!("machine '{name}' {why} at '{site}'")));
        }
        let died = clock::now();
        let parts = Arc::clone(&self.parts);
        let record = owner.ask(Falls { parts, id, generation }).await?;
        godwit_hold::at("back.fell").await;
        // What its relay has is of no use, and to say good-bye takes long on a slow link.
        end_all_below(&MovePaths::of(&self.parts.dirs.run, &migration).dir).await;
        self.drives.ended_within(id, RELEASE_WITHIN).await;
        let received: Received = measured(&self.parts.dirs.vm(vm), RECEIVED);
        let ran = received.resumed.and_then(|began| died.checked_sub(began));
        Ok(Fell {
            why: record.reason.unwrap_or_else(|| "its QEMU is gone".into()),
            // Who asks again asks later.
            ran_ms: ran.filter(|_| !known).and_then(|d| u64::try_from(d.as_millis()).ok()),
        })
    }
}

/// Why a machine that is dead at its destination does not go back. `fell`: it was given up before;
/// `had_all`: what is written down of its memory.
const fn stays(fell: bool, had_all: Option<bool>) -> Option<&'static str> {
    match (fell, had_all) {
        (true, _) | (false, Some(false)) => None,
        (false, Some(true)) => Some("had all its memory"),
        // Nobody goes back an hour on a guess.
        (false, None) => {
            Some("came by a relay that has not written down how much of its memory came")
        }
    }
}

/// The move of a machine, where it is in that one at that end.
fn in_move<'a>(
    record: &'a MachineRecord,
    id: MigrationId,
    end: End,
    site: &Name,
) -> Result<&'a Migration, Fault> {
    let found = record.migration.as_ref().filter(|m| m.id == id && m.end() == end);
    found.ok_or_else(|| {
        Fault::conflict(format!("machine '{}' is not in that migration at '{site}'", record.name))
            .hint("see where it runs: godwit vm list")
    })
}

/// A machine that came is dead: it never runs here again under its generation. Gives its record.
struct Falls {
    parts: Arc<Parts>,
    id: MigrationId,
    generation: Generation,
}

impl Ask for Falls {
    type Reply = MachineRecord;
    const STEP: &'static str = "owner.falls";

    async fn answer(self, e: &mut Owned, _: First) -> Result<MachineRecord, Fault> {
        let Self { parts, id, generation } = self;
        let site = &parts.name;
        let migration = in_move(&e.record, id, End::Destination, site)?.clone();
        // A center that has raised it since, to start the machine here, has not started it.
        e.state(site).fence(generation)?;
        match &e.machine {
            Some(_) if life_of(e).await != Some(Life::Exited) => {
                let machine = e.record.name.clone();
                return Err(Refusal::RunsHere { machine, site: site.clone() }.into());
            }
            Some(_) => {}
            None if Machine::recorded(&parts.dirs.vm_run(e.record.vm)).is_some() => {
                return Err(Fault::unavailable(format!(
                    "the QEMU of '{}' at '{site}' lives and does not answer yet",
                    e.record.name
                )));
            }
            None => {}
        }
        // One that has only hung up is dead, too, before anything is read into that.
        end_strays(&parts.dirs, e.record.vm).await;
        let _ = found_exited(e).await;
        if e.record.desired != DesiredState::Running {
            e.save()?;
            return Err(Fault::conflict(format!(
                "the guest of machine '{}' has powered itself off at '{site}'",
                e.record.name
            )));
        }
        if !migration.fell() && !e.saw_end {
            return Err(Fault::conflict(format!(
                "nobody saw how the QEMU of machine '{}' ended at '{site}': its guest may have powered \
                 itself off",
                e.record.name
            )));
        }
        let next = migration.after(Step::Fell).map_err(into_fault)?;
        e.record.migration = Some(next);
        if let Err(f) = e.save() {
            e.record.migration = Some(migration);
            return Err(f);
        }
        warn!(vm = %e.record.name, reason = ?e.record.reason, "died here before all of it was here");
        Ok(e.record.clone())
    }
}

impl Departures {
    /// Lets a machine that fell at its destination run on here as it left, under a generation above
    /// all that it has had.
    pub(super) async fn bring_back(
        &self,
        id: MigrationId,
        vm: VmId,
        generation: Generation,
        warrant: Warrant,
    ) -> Result<(), Fault> {
        self.parts.warrants.check(vm, generation, &warrant)?;
        let owner = self.parts.machines.owner(vm).await?;
        let now = owner.ask(Look { needs: None }).await?;
        now.state(&self.parts.name).fence(generation)?;
        let (has, site) = (now.record.warrant.as_ref(), &self.parts.name);
        let same = now.record.generation == generation
            && has.is_some_and(|w| w.is_for(vm, generation, site));
        if now.record.migration.is_none() {
            let gone =
                now.machine.is_none() && Machine::recorded(&self.parts.dirs.vm_run(vm)).is_none();
            // Also when this was found before, and whoever asked did not hear of it.
            if gone && now.record.desired == DesiredState::Running {
                return Err(self.no_way_back(&now.record).await);
            }
            // It was brought back; what it has done since is its own.
            if same {
                return Ok(());
            }
        }
        let migration = in_move(&now.record, id, End::Source, &self.parts.name)?.clone();
        if !end_all_below(&MovePaths::of(&self.parts.dirs.run, &migration).dir).await {
            return Err(Fault::unavailable(format!(
                "a relay of machine '{}' does not end at '{}'",
                now.record.name, self.parts.name
            )));
        }
        self.end_drive(id).await?;
        let parts = Arc::clone(&self.parts);
        let (record, machine) = owner.ask(Returns { parts, id, generation, warrant }).await?;
        let Some(machine) = machine else {
            return Err(self.no_way_back(&record).await);
        };
        godwit_hold::at("back.returning").await;
        match self.run_on(&record, &machine, &migration).await {
            Ok(()) => Ok(()),
            Err(MoveError::Stuck | MoveError::Ended { .. }) => Err(self.no_way_back(&record).await),
            Err(e) => Err(into_fault(e)),
        }
    }

    /// Ends the task that still drives the departure of a machine which fell at its destination.
    async fn end_drive(&self, id: MigrationId) -> Result<(), Fault> {
        let Some(leaving) = self.drives.get(id) else { return Ok(()) };
        let ended = async {
            while !leaving.has_ended() {
                leaving.mark_lost("its QEMU at its destination is dead".into());
                leaving.asks_or_has_ended().await;
                // It did run there; what follows is this machine's way back, not that task's.
                leaving.answer(DestinationFate::Runs);
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(UNDO_WITHIN, ended).await.map_err(|_| {
            Fault::unavailable("the source of that move still works on what its destination asked")
        })
    }

    /// Takes QEMU back to the instant of the hand-over and lets the machine run on; then it is in no
    /// move any more.
    pub(super) async fn run_on(
        &self,
        record: &MachineRecord,
        machine: &Machine,
        migration: &Migration,
    ) -> Result<(), MoveError> {
        if !runs(Some(machine)).await {
            const RUNS_ON: &str = "letting the machine run on";
            let paths = MovePaths::of(&self.parts.dirs.run, migration);
            if let Err(error) = paths.make() {
                warn!(dir = %paths.dir.display(), %error, "the directory of its move is not made");
            }
            reclaim(machine, &paths.qemu).await?;
            let run = machine.run().await;
            run.map_err(|source| MoveError::Qemu { what: RUNS_ON, source })?;
        }
        info!(vm = %record.name, "runs on at its source");
        godwit_hold::at("back.ran").await;
        self.travellers.unmark(migration.id, record.vm).await;
        self.parts.relays.clear(migration);
        Ok(())
    }

    /// The machine died at its destination, and its QEMU here is gone, too.
    async fn no_way_back(&self, record: &MachineRecord) -> Fault {
        self.end_move(record).await;
        let why = record.reason.clone().unwrap_or_else(|| "its QEMU is gone".into());
        Fault::new(
            Code::Damaged,
            format!(
                "machine '{}' cannot be brought back to '{}': {why}",
                record.name, self.parts.name
            ),
        )
        .hint(format!("boot it from its disk as it left: godwit vm start {}", record.name))
    }

    /// A new daemon finds a machine on its way back: one that runs is back, any other waits for the
    /// center's word.
    pub(super) async fn returns_after_restart(
        &self,
        record: &MachineRecord,
        migration: &Migration,
        machine: &Machine,
    ) {
        self.parts.relays.end(migration).await;
        if runs(Some(machine)).await {
            info!(vm = %record.name, "runs on at its source");
            self.travellers.unmark(migration.id, record.vm).await;
            self.parts.relays.clear(migration);
            return;
        }
        let why = "it is being brought back from its destination";
        self.drives.interrupted(migration.id, (record.vm, &record.name), why);
    }
}

/// A machine is brought back to this site, its source. Gives its record and its QEMU, if that lives.
struct Returns {
    parts: Arc<Parts>,
    id: MigrationId,
    generation: Generation,
    warrant: Warrant,
}

impl Ask for Returns {
    type Reply = Found;
    const STEP: &'static str = "owner.returns";

    async fn answer(self, e: &mut Owned, _: First) -> Result<Found, Fault> {
        let Self { parts, id, generation, warrant } = self;
        let migration = in_move(&e.record, id, End::Source, &parts.name)?;
        e.state(&parts.name).fence(generation)?;
        if let Some(seen) = migration.next().filter(|next| *next >= generation) {
            let machine = e.record.name.clone();
            return Err(Refusal::Fenced { machine, seen, given: generation }.into());
        }
        let Some(machine) = e.machine.clone() else {
            if Machine::recorded(&parts.dirs.vm_run(e.record.vm)).is_some() {
                return Err(Fault::unavailable(format!(
                    "the QEMU of '{}' does not answer yet",
                    e.record.name
                )));
            }
            return Ok((e.record.clone(), None));
        };
        let next = migration.after(Step::Returns).map_err(into_fault)?;
        let before = e.record.clone();
        e.record.migration = Some(next);
        e.record.generation = generation;
        e.record.warrant = Some(warrant);
        if let Err(f) = e.save() {
            e.record = before;
            return Err(f);
        }
        Ok((e.record.clone(), Some(machine)))
    }
}

#[cfg(test)]
mod tests {
    use super::stays;

    #[test]
    fn only_what_is_known_to_lack_memory_goes_back() {
        assert_eq!(stays(false, Some(false)), None);
        assert!(stays(false, Some(true)).is_some_and(|why| why.contains("had all")));
        assert!(stays(false, None).is_some_and(|why| why.contains("not written down")));
        for had_all in [None, Some(false), Some(true)] {
            assert_eq!(stays(true, had_all), None, "what was answered once holds");
        }
    }
}
