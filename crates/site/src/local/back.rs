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
use godwit_types::{Fault, Generation, MigrationId, Name, VmId};
use tracing::{info, warn};

use super::adopt::end_strays;
use super::allowed::{First, Refusal};
use super::arrivals::Arrivals;
use super::course::{End, Migration, Step};
use super::departures::Departures;
use super::drive::{RECEIVED, RELEASE_WITHIN, UNDO_WITHIN, forget_measured, measured};
use super::entry::Entry;
use super::faults::into_fault;
use super::look::{found_exited, life_of};
use super::owner::{Ask, Look, Owned};
use super::parts::Parts;
use super::progress::runs;
use super::ran;
use super::record::{Back, DesiredState, MachineRecord};
use super::relays::{MovePaths, end_all_below};
use super::travellers::Found;
use crate::{Fell, TookBack};

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
        is_dead(&now, &self.parts).await?;
        let died = clock::now();
        // What its relay still has to write down of its memory comes first; then it is of no use.
        end_all_below(&MovePaths::of(&self.parts.dirs.run, &migration).dir).await;
        self.drives.ended_within(id, RELEASE_WITHIN).await;
        let parts = Arc::clone(&self.parts);
        let record = owner.ask(Falls { parts, id, generation }).await?;
        godwit_hold::at("back.fell").await;
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

/// Refuses where a machine's QEMU lives.
async fn is_dead(e: &Entry, parts: &Parts) -> Result<(), Fault> {
    match &e.machine {
        Some(_) if life_of(e).await != Some(Life::Exited) => {
            let machine = e.record.name.clone();
            Err(Refusal::RunsHere { machine, site: parts.name.clone() }.into())
        }
        None if Machine::recorded(&parts.dirs.vm_run(e.record.vm)).is_some() => {
            Err(Fault::unavailable(format!(
                "the QEMU of '{}' at '{}' lives and does not answer yet",
                e.record.name, parts.name
            )))
        }
        Some(_) | None => Ok(()),
    }
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
        is_dead(e, &parts).await?;
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
        let had_all = ran::had_all_memory(&e.dir);
        if let Some(why) = stays(migration.fell(), had_all) {
            e.save()?;
            return Err(Fault::conflict(format!("machine '{}' {why} at '{site}'", e.record.name)));
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
    /// all that it has had. What is answered is in the record before it is said.
    pub(super) async fn bring_back(
        &self,
        id: MigrationId,
        vm: VmId,
        generation: Generation,
        warrant: Warrant,
    ) -> Result<TookBack, Fault> {
        self.parts.warrants.check(vm, generation, &warrant)?;
        let owner = self.parts.machines.owner(vm).await?;
        let now = owner.ask(Look { needs: None }).await?;
        now.state(&self.parts.name).fence(generation)?;
        let known = now.record.back.filter(|b| b.generation == generation);
        let migration = match (known, in_move(&now.record, id, End::Source, &self.parts.name)) {
            (Some(Back { runs: false, .. }), _) => return Ok(never(&now.record)),
            // What it has done since is its own, whatever its QEMU is now.
            (Some(Back { runs: true, .. }), Err(_)) => return Ok(TookBack::Runs),
            (_, found) => found?.clone(),
        };
        if !end_all_below(&MovePaths::of(&self.parts.dirs.run, &migration).dir).await {
            return Err(Fault::unavailable(format!(
                "a relay of machine '{}' does not end at '{}'",
                now.record.name, self.parts.name
            )));
        }
        self.end_drive(id).await?;
        let parts = Arc::clone(&self.parts);
        let returns = Returns { parts: Arc::clone(&parts), id, generation, warrant };
        let (record, machine) = owner.ask(returns).await?;
        let ran = match &machine {
            Some(machine) => {
                godwit_hold::at("back.returning").await;
                self.run_on(&record, machine, &migration).await
            }
            None => Err(MoveError::Stuck),
        };
        match ran {
            Ok(()) => Ok(TookBack::Runs),
            Err(MoveError::Stuck | MoveError::Ended { .. }) => {
                let took = owner.ask(NeverReturns { parts, id, generation }).await?;
                self.parts.relays.clear(&migration);
                Ok(took)
            }
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
        const RUNS_ON: &str = "letting the machine run on";
        let stands = !runs(Some(machine)).await;
        if stands {
            let paths = MovePaths::of(&self.parts.dirs.run, migration);
            if let Err(error) = paths.make() {
                warn!(dir = %paths.dir.display(), %error, "the directory of its move is not made");
            }
            reclaim(machine, &paths.qemu).await?;
        }
        let owner = self.parts.machines.owner(record.vm).await;
        let noted = match owner {
            Ok(owner) => owner.ask(RunsAgain { id: migration.id }).await,
            Err(f) => Err(f),
        };
        noted.map_err(|f| MoveError::Interrupted { why: f.message })?;
        if stands {
            let run = machine.run().await;
            run.map_err(|source| MoveError::Qemu { what: RUNS_ON, source })?;
        }
        info!(vm = %record.name, "runs on at its source");
        godwit_hold::at("back.ran").await;
        self.travellers.unmark(migration.id, record.vm).await;
        self.parts.relays.clear(migration);
        Ok(())
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
        if record.back.is_some_and(|b| b.runs) && runs(Some(machine)).await {
            info!(vm = %record.name, "runs on at its source");
            self.travellers.unmark(migration.id, record.vm).await;
            self.parts.relays.clear(migration);
            return;
        }
        let why = "it is being brought back from its destination";
        self.drives.interrupted(migration.id, (record.vm, &record.name), why);
    }
}

/// The answer for a machine that cannot be brought back.
fn never(record: &MachineRecord) -> TookBack {
    let why = record.reason.clone().unwrap_or_else(|| "its QEMU is gone".into());
    TookBack::Never { why }
}

/// A machine runs on here from the next instant on: if it is being brought back, that is written down.
struct RunsAgain {
    id: MigrationId,
}

impl Ask for RunsAgain {
    type Reply = ();
    const STEP: &'static str = "owner.runs-again";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        if !e.record.migration.as_ref().is_some_and(|m| m.id == self.id && m.returns()) {
            return Ok(());
        }
        let before = e.record.back;
        e.record.back = Some(Back { generation: e.record.generation, runs: true });
        if let Err(f) = e.save() {
            e.record.back = before;
            return Err(f);
        }
        Ok(())
    }
}

/// A machine cannot be brought back here, its source: its QEMU is gone, or of no use and ended. It is in
/// no move any more.
struct NeverReturns {
    parts: Arc<Parts>,
    id: MigrationId,
    generation: Generation,
}

impl Ask for NeverReturns {
    type Reply = TookBack;
    const STEP: &'static str = "owner.never-returns";

    async fn answer(self, e: &mut Owned, _: First) -> Result<TookBack, Fault> {
        let Self { parts, id, generation } = self;
        let _ = in_move(&e.record, id, End::Source, &parts.name)?;
        // It has run here since: what became of it then is its own.
        let ran = e.record.back.is_some_and(|b| b.generation == generation && b.runs);
        let before = e.record.clone();
        if life_of(e).await == Some(Life::Exited) {
            let _ = found_exited(e).await;
        } else if let Some(m) = e.machine.take() {
            m.kill().await;
            e.record.reason = Some("its QEMU could not be taken back to where it left".into());
        }
        end_strays(&parts.dirs, e.record.vm).await;
        e.record.migration = None;
        e.record.back = Some(Back { generation, runs: ran });
        if let Err(f) = e.save() {
            e.record = before;
            return Err(f);
        }
        forget_measured(&e.dir);
        warn!(vm = %e.record.name, reason = ?e.record.reason, ran, "is not brought back");
        Ok(if ran { TookBack::Runs } else { never(&e.record) })
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
