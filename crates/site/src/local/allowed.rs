//! What may be asked of a machine in which state: one table, and its refusals. Nothing is done and
//! nobody is asked here.
//!
//! ```text
//!             start        stop     stop --force  delete  dock, leave  resume      abort
//! Starting    -            -        cancels it    .. it   -            -           (1)
//! Settled     no QEMU (2)  yes      yes           yes     QEMU         -           (1)
//! PoweringOff no QEMU (2)  -        yes           yes     -            -           (1)
//! Docking     once it ended (all but what is shown; --force stops it first)   (1)
//! Undocking   -            -        yes           yes     -            -           (1)
//! Leaving     ends it      -        ends it       .. it   -            departure   ends it
//! RanOn       ends it      -        ends it       .. it   -            -           ends it
//! Arriving    -            -        -             .. it   -            arrival     ends it (3)
//! Arrived     -            -        -             .. it   -            arrival     -
//! Stranded    ends it      -        -             .. it   -            arrival     -
//! Damaged     -            -        -             yes     -            -           (1)
//! (1) unless its guest runs here   (2) or one whose guest does not run, which is ended
//! (3) unless it is written down that it has run here
//! ```
//!
//! Ports are published in every state but the first and the last. A program is started, a console and a screen are shown wherever there is a QEMU whose guest is
//! awake; the console's log is shown always. Delete is possible in every state.

use godwit_qemu::Life;
use godwit_types::{Code, CodedError, Fault, Generation, MigrationId, Name, VmState};

use super::course::{Arrival, Course, Departure};
use super::record::{DesiredState, MachineRecord, Unfinished};
use crate::UNKNOWN_GENERATION;

/// What a machine is in the midst of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// It was removed, and whoever still holds it has come too late.
    Gone,
    /// Its record cannot be read, and says why: nothing is known but that it is here.
    Damaged(String),
    /// It boots, or is being activated.
    Starting,
    /// In nothing.
    Settled,
    /// Its guest is waited for to power itself off.
    PoweringOff,
    /// It is being made a substrate.
    Docking,
    /// Its docking broke off, and it is being brought back to run on.
    Undocking,
    /// It moves to that site, or is kept until that needs nothing more of it.
    Leaving(Name),
    /// As [`Phase::Leaving`], and has run here since: what is here is not what left.
    RanOn(Name),
    /// It comes from that site and has not run here.
    Arriving(Name),
    /// It came from that site, runs here, and still needs it.
    Arrived(Name),
    /// It came from that site in part, and the rest is not waited for any more.
    Stranded(Name),
}

/// What this daemon does to a machine while others may look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    /// Nothing.
    Nothing,
    /// It starts it.
    Starting,
    /// It makes its arrival ready.
    Preparing,
    /// It makes it a substrate.
    Docking,
    /// It waits for its guest to power itself off.
    PoweringOff,
}

/// Its QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Qemu {
    /// There is none.
    Gone,
    /// There is one, and it was not asked.
    There,
    /// There is one, and it said so.
    Is(Life),
}

/// All that decides what is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    machine: Name,
    site: Name,
    generation: Generation,
    desired: DesiredState,
    pub(super) phase: Phase,
    doing: Activity,
    qemu: Qemu,
    /// Whether it has a screen.
    display: bool,
}

/// What can be asked of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Boot it from its disk.
    Start,
    /// Have its guest power itself off.
    Stop,
    /// Cut its power.
    ForceStop,
    /// Remove it with all it has.
    Delete,
    /// Make a substrate of it.
    Dock,
    /// Move it to another site.
    Leave,
    /// Start a program in its guest, or ask for one.
    Exec,
    /// Read the end of its console's log.
    Log,
    /// Show its console.
    Console,
    /// Show its screen, or type there.
    Screen,
    /// Have it come here, or be made here.
    Arrive,
    /// Go on with its arrival over a new relay, or end that as it is.
    ResumeArrival,
    /// Go on with its departure over a new relay.
    ResumeDeparture,
    /// Remove what was kept of it: it runs elsewhere for good.
    Release,
    /// Take its move back.
    Abort,
    /// Have ports of the host lead to it.
    Publish,
}

impl Action {
    /// Whether a docking is stopped for it, where there is still time.
    pub(super) const fn stops_docking(self) -> bool {
        matches!(self, Self::ForceStop)
    }
}

/// What has to end before what was asked is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum First {
    /// Nothing.
    Nothing,
    /// Its start is cancelled.
    Start,
    /// Its docking, which ends by itself: it is asked again then.
    Docking,
    /// This site's part of its move.
    Move,
    /// What is left of its arrival, if its disk has come whole.
    Arrival,
}

/// Why something is not done to a machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("machine '{0}' is not here")]
    Gone(Name),
    #[error("{why}")]
    Damaged { machine: Name, why: String },
    #[error("machine '{0}' is starting")]
    Starting(Name),
    #[error("machine '{0}' is being powered off")]
    PoweringOff(Name),
    #[error("machine '{0}' was being docked and is being brought back to run on")]
    Undocking(Name),
    #[error("machine '{machine}' is moving to '{to}'")]
    Leaving { machine: Name, to: Name },
    #[error("machine '{machine}' is moving from '{from}'")]
    Arriving { machine: Name, from: Name },
    #[error("machine '{machine}' is moving from '{from}', and runs here already")]
    Arrived { machine: Name, from: Name },
    #[error("machine '{machine}' came from '{from}' in part; the rest is not waited for any more")]
    Stranded { machine: Name, from: Name },
    #[error(
        "machine '{machine}' cannot be brought from '{site}': it has run there after it had left"
    )]
    RanOn { machine: Name, site: Name },
    #[error("machine '{machine}' is not in that migration at '{site}'")]
    NotInMove { machine: Name, site: Name },
    #[error("machine '{0}' does not run")]
    NotRunning(Name),
    #[error("machine '{0}' runs already")]
    Running(Name),
    #[error("machine '{machine}' runs at '{site}' already")]
    RunsHere { machine: Name, site: Name },
    #[error("the guest of machine '{machine}' stands still (QEMU is {life})")]
    Still { machine: Name, life: Life },
    #[error("machine '{0}' has no display")]
    NoDisplay(Name),
    #[error("machine '{0}' is here already")]
    Here(Name),
    #[error("no machine has generation {0}")]
    NoGeneration(Generation),
    #[error("machine '{machine}' is at generation {seen}; generation {given} may no longer act")]
    Fenced { machine: Name, seen: Generation, given: Generation },
    #[error(
        "machine '{machine}' left '{site}' at generation {seen}; generation {given} may no longer \
         act"
    )]
    Left { machine: String, site: Name, seen: Generation, given: Generation },
}

impl Refusal {
    /// What to do about it.
    pub(super) fn hint(&self) -> String {
        match self {
            Self::Gone(_) | Self::Here(_) | Self::RunsHere { .. } | Self::NotInMove { .. } => {
                "see where it runs: godwit vm list".into()
            }
            Self::Fenced { .. } | Self::Left { .. } | Self::NoGeneration(_) => {
                "see where it runs, and at which generation: godwit vm list -o wide".into()
            }
            Self::Damaged { machine, .. } => {
                format!("it can only be deleted: godwit vm delete {machine}")
            }
            Self::Starting(machine) => {
                format!("wait for it, or end it at once with: godwit vm stop {machine} --force")
            }
            Self::PoweringOff(machine) => {
                format!("wait for that, or end it at once with: godwit vm stop {machine} --force")
            }
            Self::Undocking(machine) => {
                format!("wait for it, or cut its power: godwit vm stop {machine} --force")
            }
            Self::Leaving { .. } => "wait for the move to end: godwit op list".into(),
            Self::Arriving { machine, .. } => format!(
                "wait for the move to end, or take it back: godwit op list, godwit op cancel; or \
                 delete the machine and its disk: godwit vm delete {machine}"
            ),
            Self::Arrived { machine, from } => format!(
                "wait until it needs '{from}' no more: godwit op list, godwit vm get {machine}"
            ),
            Self::Stranded { machine, .. } => format!(
                "boot it from its disk: godwit vm start {machine}; or delete it: godwit vm delete \
                 {machine}"
            ),
            Self::RanOn { machine, .. } => {
                format!("delete what has come of it: godwit vm delete {machine}")
            }
            Self::NotRunning(machine) => format!("start it: godwit vm start {machine}"),
            Self::Running(machine) => format!("stop it first: godwit vm stop {machine}"),
            Self::Still { machine, .. } => format!("see how it is: godwit vm get {machine}"),
            Self::NoDisplay(machine) => format!("its console: godwit vm console {machine}"),
        }
    }
}

impl CodedError for Refusal {
    fn code(&self) -> Code {
        match self {
            Self::Gone(_) | Self::NotInMove { .. } => Code::NotFound,
            Self::Damaged { .. } | Self::RanOn { .. } => Code::Damaged,
            Self::Still { .. } => Code::Unavailable,
            Self::Here(_) => Code::Exists,
            Self::NoGeneration(_) => Code::Invalid,
            Self::Fenced { .. } | Self::Left { .. } => Code::Fenced,
            Self::Starting(_)
            | Self::PoweringOff(_)
            | Self::Undocking(_)
            | Self::Leaving { .. }
            | Self::Arriving { .. }
            | Self::Arrived { .. }
            | Self::Stranded { .. }
            | Self::NotRunning(_)
            | Self::Running(_)
            | Self::RunsHere { .. }
            | Self::NoDisplay(_) => Code::Conflict,
        }
    }
}

impl From<Refusal> for Fault {
    fn from(r: Refusal) -> Self {
        Self::of(&r).hint(r.hint())
    }
}

/// What a machine is in the midst of, by its record and by what is done to it.
fn phase(record: &MachineRecord, doing: Activity) -> Phase {
    if record.desired == DesiredState::Gone {
        return Phase::Gone;
    }
    if record.generation == UNKNOWN_GENERATION {
        return Phase::Damaged(record.reason.clone().unwrap_or_default());
    }
    match (&record.unfinished, &record.migration) {
        _ if doing == Activity::Starting => Phase::Starting,
        _ if doing == Activity::Docking => Phase::Docking,
        (Some(Unfinished::Docking { .. }), _) => Phase::Undocking,
        (_, Some(m)) => {
            let peer = m.peer.clone();
            match &m.course {
                // Of either nothing can be brought to a destination any more.
                Course::Departure { is: Departure::RanOn | Departure::Returning, .. } => {
                    Phase::RanOn(peer)
                }
                Course::Departure { is: Departure::Leaving | Departure::Away, .. } => {
                    Phase::Leaving(peer)
                }
                Course::Arrival(Arrival::Abandoned { .. }) => Phase::Stranded(peer),
                // One that fell is its source's, until the center's word makes it a stranded one.
                Course::Arrival(Arrival::Running | Arrival::Fell) => Phase::Arrived(peer),
                Course::Arrival(Arrival::Coming) => Phase::Arriving(peer),
            }
        }
        (Some(Unfinished::Activating) | None, None) => match doing {
            Activity::PoweringOff => Phase::PoweringOff,
            Activity::Nothing | Activity::Starting | Activity::Preparing | Activity::Docking => {
                Phase::Settled
            }
        },
    }
}

impl State {
    /// The state of a machine at `site`. `display`: its QEMU, if there is one, has a screen.
    pub(super) fn of(
        record: &MachineRecord,
        site: &Name,
        doing: Activity,
        (qemu, display): (Qemu, bool),
    ) -> Self {
        Self {
            machine: record.name.clone(),
            site: site.clone(),
            generation: record.generation,
            desired: record.desired,
            phase: phase(record, doing),
            doing,
            qemu,
            display,
        }
    }

    /// The same, of a QEMU that has been asked.
    pub(super) fn asked(mut self, life: Option<Life>) -> Self {
        self.qemu = life.map_or(Qemu::Gone, Qemu::Is);
        self
    }

    /// The same as one migration sees it: a machine that is in another is in none.
    pub(super) fn in_move(mut self, record: &MachineRecord, id: MigrationId) -> Self {
        if record.migration.as_ref().is_some_and(|m| m.id != id) {
            self.phase =
                phase(&MachineRecord { migration: None, ..record.clone() }, Activity::Nothing);
        }
        self
    }

    /// Whether it leaves, or has left.
    pub(super) const fn leaves(&self) -> bool {
        matches!(self.phase, Phase::Leaving(_) | Phase::RanOn(_))
    }

    /// Refuses whoever knows of an older generation only.
    pub(super) fn fence(&self, given: Generation) -> Result<(), Refusal> {
        if !given.is_sane() {
            return Err(Refusal::NoGeneration(given));
        }
        if given < self.generation {
            let machine = self.machine.clone();
            return Err(Refusal::Fenced { machine, seen: self.generation, given });
        }
        Ok(())
    }

    /// Whether it may be done, and what has to end first.
    pub(super) fn allows(&self, action: Action) -> Result<First, Refusal> {
        match action {
            Action::Start => match &self.phase {
                Phase::Leaving(_) | Phase::RanOn(_) => Ok(First::Move),
                Phase::Stranded(_) => Ok(First::Arrival),
                Phase::Docking => Ok(First::Docking),
                Phase::Settled | Phase::PoweringOff if self.qemu == Qemu::Is(Life::Running) => {
                    Err(Refusal::Running(self.machine.clone()))
                }
                Phase::Settled | Phase::PoweringOff => Ok(First::Nothing),
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Starting
                | Phase::Undocking
                | Phase::Arriving(_)
                | Phase::Arrived(_) => Err(self.busy()),
            },
            Action::Stop => match &self.phase {
                Phase::Settled => Ok(First::Nothing),
                Phase::Docking => Ok(First::Docking),
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Starting
                | Phase::PoweringOff
                | Phase::Undocking
                | Phase::Leaving(_)
                | Phase::RanOn(_)
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => Err(self.busy()),
            },
            Action::ForceStop => match &self.phase {
                Phase::Settled | Phase::PoweringOff | Phase::Undocking => Ok(First::Nothing),
                Phase::Starting => Ok(First::Start),
                Phase::Docking => Ok(First::Docking),
                Phase::Leaving(_) | Phase::RanOn(_) => Ok(First::Move),
                // Its memory, or its disk, is nowhere else: only its deletion gives that up.
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => Err(self.busy()),
            },
            Action::Delete => match &self.phase {
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Undocking => Ok(First::Nothing),
                Phase::Starting => Ok(First::Start),
                Phase::Docking => Ok(First::Docking),
                Phase::Leaving(_)
                | Phase::RanOn(_)
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => Ok(First::Move),
            },
            Action::Dock | Action::Leave => match &self.phase {
                Phase::Settled => self.needs_qemu(),
                Phase::Docking => Ok(First::Docking),
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Starting
                | Phase::PoweringOff
                | Phase::Undocking
                | Phase::Leaving(_)
                | Phase::RanOn(_)
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => Err(self.busy()),
            },
            Action::Exec | Action::Console | Action::Screen | Action::Log => match &self.phase {
                Phase::Gone => Err(self.busy()),
                // Its guest is about to stand still: what it is asked to do is asked once that is over.
                Phase::Docking if action == Action::Exec => Ok(First::Docking),
                // Whatever it is in the midst of, it may be looked at.
                Phase::Damaged(_)
                | Phase::Docking
                | Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Undocking
                | Phase::Leaving(_)
                | Phase::RanOn(_)
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => self.shows(action),
            },
            Action::Arrive => Err(Refusal::Here(self.machine.clone())),
            Action::ResumeArrival => match &self.phase {
                Phase::Arriving(_) | Phase::Arrived(_) | Phase::Stranded(_) => Ok(First::Nothing),
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Docking
                | Phase::Undocking
                | Phase::Leaving(_)
                | Phase::RanOn(_) => Err(self.not_in_move()),
            },
            Action::ResumeDeparture => match &self.phase {
                Phase::Leaving(_) => Ok(First::Nothing),
                Phase::RanOn(_) => {
                    Err(Refusal::RanOn { machine: self.machine.clone(), site: self.site.clone() })
                }
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Docking
                | Phase::Undocking
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => Err(self.not_in_move()),
            },
            Action::Release => match &self.phase {
                Phase::Leaving(_) | Phase::RanOn(_) => Ok(First::Move),
                Phase::Gone
                | Phase::Damaged(_)
                | Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Docking
                | Phase::Undocking
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => Ok(First::Nothing),
            },
            Action::Abort => match &self.phase {
                Phase::Gone => Ok(First::Nothing),
                Phase::Leaving(_) | Phase::RanOn(_) => Ok(First::Move),
                Phase::Arrived(_) | Phase::Stranded(_) => Err(self.runs_here()),
                // It is here by another way, or came by that move and has been whole since.
                Phase::Damaged(_)
                | Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Docking
                | Phase::Undocking
                    if self.qemu == Qemu::Is(Life::Running) =>
                {
                    Err(self.runs_here())
                }
                // Whatever its QEMU does: it has run here once that is written down.
                Phase::Arriving(_) => Ok(First::Move),
                Phase::Damaged(_)
                | Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Docking
                | Phase::Undocking => Ok(First::Nothing),
            },
            Action::Publish => match &self.phase {
                Phase::Gone | Phase::Damaged(_) => Err(self.busy()),
                // It is written down, and follows from what the machine does.
                Phase::Starting
                | Phase::Settled
                | Phase::PoweringOff
                | Phase::Docking
                | Phase::Undocking
                | Phase::Leaving(_)
                | Phase::RanOn(_)
                | Phase::Arriving(_)
                | Phase::Arrived(_)
                | Phase::Stranded(_) => Ok(First::Nothing),
            },
        }
    }

    /// What it is in the midst of, as the reason why something is not done.
    fn busy(&self) -> Refusal {
        let machine = self.machine.clone();
        match self.phase.clone() {
            Phase::Gone => Refusal::Gone(machine),
            Phase::Damaged(why) => Refusal::Damaged { machine, why },
            Phase::Starting => Refusal::Starting(machine),
            Phase::Settled => Refusal::Running(machine),
            Phase::PoweringOff => Refusal::PoweringOff(machine),
            Phase::Docking | Phase::Undocking => Refusal::Undocking(machine),
            Phase::Leaving(to) | Phase::RanOn(to) => Refusal::Leaving { machine, to },
            Phase::Arriving(from) => Refusal::Arriving { machine, from },
            Phase::Arrived(from) => Refusal::Arrived { machine, from },
            Phase::Stranded(from) => Refusal::Stranded { machine, from },
        }
    }

    fn not_in_move(&self) -> Refusal {
        Refusal::NotInMove { machine: self.machine.clone(), site: self.site.clone() }
    }

    fn runs_here(&self) -> Refusal {
        Refusal::RunsHere { machine: self.machine.clone(), site: self.site.clone() }
    }

    fn needs_qemu(&self) -> Result<First, Refusal> {
        match self.qemu {
            Qemu::Gone => Err(Refusal::NotRunning(self.machine.clone())),
            Qemu::There | Qemu::Is(_) => Ok(First::Nothing),
        }
    }

    /// What is seen and used of a machine, by its QEMU alone.
    fn shows(&self, action: Action) -> Result<First, Refusal> {
        let machine = || self.machine.clone();
        if action == Action::Log {
            return Ok(First::Nothing);
        }
        let _ = self.needs_qemu()?;
        match (action, self.qemu) {
            (Action::Exec, Qemu::Is(life)) if !matches!(life, Life::Running | Life::Paused) => {
                Err(Refusal::Still { machine: machine(), life })
            }
            (Action::Screen, _) if !self.display => Err(Refusal::NoDisplay(machine())),
            _ => Ok(First::Nothing),
        }
    }

    /// The state of a machine that is in a change, whatever its QEMU says; a machine of which
    /// nothing is known has failed.
    pub(super) const fn changing(&self) -> Option<VmState> {
        match self.phase {
            Phase::Damaged(_) => Some(VmState::Failed),
            Phase::Starting => Some(VmState::Starting),
            Phase::Arriving(_) if matches!(self.doing, Activity::Preparing) => {
                Some(VmState::Starting)
            }
            Phase::Docking | Phase::Undocking => Some(VmState::Docking),
            _ => None,
        }
    }

    /// What is told of it to the center.
    pub(super) fn vm_state(&self) -> VmState {
        if let Some(state) = self.changing() {
            return state;
        }
        let off = match self.desired {
            DesiredState::Stopped => VmState::Stopped,
            DesiredState::Running | DesiredState::Gone => VmState::Failed,
        };
        match (self.qemu, &self.phase) {
            (Qemu::There | Qemu::Is(Life::Running | Life::Paused), phase) => match phase {
                Phase::Stranded(_) => VmState::Failed,
                // A machine that still needs its source is not settled here.
                Phase::Arriving(_) | Phase::Arrived(_) => VmState::Moving,
                _ => VmState::Running,
            },
            (Qemu::Is(Life::PostMigrate), Phase::Leaving(_) | Phase::RanOn(_))
            | (Qemu::Is(Life::Incoming | Life::Leaving), _) => VmState::Moving,
            (Qemu::Is(Life::PoweredOff | Life::PostMigrate), _) => VmState::Stopped,
            (Qemu::Is(Life::Broken | Life::Stalled | Life::Exited) | Qemu::Gone, _) => off,
        }
    }
}

#[cfg(test)]
#[path = "tests_allowed.rs"]
mod tests;
