//! Which action a machine allows in which state of its life.
//!
//! ```text
//!            load / receive                 migrate, save
//! Incoming ----------------> Paused <--+   +------------> PostMigrate
//!    (waits)                  |   ^    |   |                |
//!                         run v   | stop   |            run |
//!   (boots) -------------->  Running ------+ <--------------+
//!                             |  |                    (Stalled --run--> Running)
//!          PoweredOff, Stalled   Broken         any --> Exited
//! ```

use std::fmt;

use godwit_types::{Code, CodedError};

/// The state of a machine, read from QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Waits for a state, or takes one in.
    Incoming,
    /// vCPUs stand still and can run.
    Paused,
    /// vCPUs run.
    Running,
    /// The last pages leave; vCPUs stand still.
    Leaving,
    /// Its state was saved or has gone elsewhere. It can run again only where it was not handed
    /// over.
    PostMigrate,
    /// The guest powered itself off; QEMU is still there.
    PoweredOff,
    /// A write to its disk failed, as on a full file system; it is tried again when it runs.
    Stalled,
    /// The guest panicked, or QEMU found an error of its own.
    Broken,
    /// QEMU has ended.
    Exited,
}

impl Life {
    /// From QEMU's run state.
    pub(crate) fn of(run_state: &str) -> Self {
        match run_state {
            "inmigrate" => Self::Incoming,
            "running" => Self::Running,
            "finish-migrate" | "save-vm" | "colo" => Self::Leaving,
            "postmigrate" => Self::PostMigrate,
            "shutdown" => Self::PoweredOff,
            "io-error" => Self::Stalled,
            "guest-panicked" | "internal-error" | "watchdog" => Self::Broken,
            _ => Self::Paused,
        }
    }

    /// Whether `action` is possible now.
    #[must_use]
    pub const fn allows(self, action: Action) -> bool {
        use Action::{Change, Load, Run, Save, Send, Stop, Type};
        match self {
            Self::Incoming => matches!(action, Load),
            Self::Paused => matches!(action, Run | Stop | Save | Send | Change),
            Self::Running => matches!(action, Run | Stop | Save | Send | Change | Type),
            Self::PostMigrate | Self::Stalled => matches!(action, Run | Stop | Change),
            Self::Leaving | Self::PoweredOff | Self::Broken | Self::Exited => false,
        }
    }

    /// `Ok` when `action` is possible now.
    ///
    /// # Errors
    /// [`Refused`] with the action, the state, and the states that it needs.
    pub const fn check(self, action: Action) -> Result<(), Refused> {
        if self.allows(action) { Ok(()) } else { Err(Refused { action, life: self }) }
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Incoming => "waiting for a state",
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Leaving => "leaving",
            Self::PostMigrate => "saved or migrated",
            Self::PoweredOff => "powered off",
            Self::Stalled => "stopped by a failed write to its disk",
            Self::Broken => "broken",
            Self::Exited => "ended",
        })
    }
}

/// What can be asked of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Let the vCPUs run.
    Run,
    /// Stop the vCPUs.
    Stop,
    /// Save the state to a file.
    Save,
    /// Load a state, or receive one.
    Load,
    /// Send the state to another machine.
    Send,
    /// Change devices or the block graph.
    Change,
    /// Key strokes.
    Type,
}

impl Action {
    /// The states in which it is possible, for people.
    const fn needs(self) -> &'static str {
        match self {
            Self::Run | Self::Stop | Self::Change => "running, paused or saved",
            Self::Save | Self::Send => "running or paused",
            Self::Load => "waiting for a state",
            Self::Type => "running",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Run => "run",
            Self::Stop => "stop",
            Self::Save => "save its state",
            Self::Load => "load a state",
            Self::Send => "migrate",
            Self::Change => "change devices",
            Self::Type => "take key strokes",
        })
    }
}

/// An action that the state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a machine that is {life} cannot {action}: it must be {}", action.needs())]
pub struct Refused {
    /// The action.
    pub action: Action,
    /// The state the machine is in.
    pub life: Life,
}

impl CodedError for Refused {
    fn code(&self) -> Code {
        Code::Conflict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_state_and_the_one_that_is_needed() {
        let err = Life::Running.check(Action::Load).expect_err("refused");
        assert_eq!(
            err.to_string(),
            "a machine that is running cannot load a state: it must be waiting for a state"
        );
    }

    #[test]
    fn an_ended_machine_allows_nothing_and_a_waiting_one_only_loads() {
        use Action::{Change, Load, Run, Save, Send, Stop, Type};
        for action in [Run, Stop, Save, Load, Send, Change, Type] {
            assert!(!Life::Exited.allows(action));
            assert_eq!(Life::Incoming.allows(action), action == Load);
        }
        assert!(!Life::Paused.allows(Type), "QEMU drops keys of a stopped machine");
        assert!(!Life::PostMigrate.allows(Save), "QEMU wants it to run first");
        assert!(Life::of("io-error").allows(Run) && !Life::of("io-error").allows(Send));
    }
}
