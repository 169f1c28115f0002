//! The states that rooms and users share, and which may follow which.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Guest architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// x86-64 on the `pc-q35-10.0` machine.
    X86_64,
    /// arm64 on the `virt-10.0` machine.
    Aarch64,
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86_64 => "x86-64",
            Self::Aarch64 => "aarch64",
        })
    }
}

/// The hand-over counter of an execution environment. It grows by one each time the machine
/// comes to run in another place; whoever holds an older one is refused everywhere.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation of a machine that never moved.
    pub const FIRST: Self = Self(1);

    /// The highest that is taken for one: no machine comes that far. More is nonsense, or somebody
    /// wants to be the last word on a machine.
    pub const LAST: Self = Self(u64::MAX / 2);

    /// The generation after this one; after the last there is none.
    #[must_use]
    pub const fn next(self) -> Self {
        if self.0 >= Self::LAST.0 { Self::LAST } else { Self(self.0 + 1) }
    }

    /// Whether it can be one.
    #[must_use]
    pub const fn is_sane(self) -> bool {
        self.0 <= Self::LAST.0
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A change of state that the table does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} cannot go from {from} to {to}")]
pub struct InvalidTransition {
    /// What was to change.
    pub what: &'static str,
    /// The state it is in.
    pub from: String,
    /// The state that was asked for.
    pub to: String,
}

/// Life of an execution environment, as the registry shows it.
///
/// ```text
///              +-------------> Failed <-----------+
///              |                 ^                |
/// Starting -> Running -> Moving -+-> Running   Docking -> (gone: a substrate)
///    |         |  ^  \-----------|--> Docking ----^
///    v         v  |              |
///  Failed    Stopped ------------+
///
/// Failed -> Running: its site has found it running again.
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// A QEMU is being started, or a substrate activated.
    Starting,
    /// vCPUs run.
    Running,
    /// Being docked: it stops and becomes a substrate.
    Docking,
    /// A migration is under way; the machine runs at one of the two ends.
    Moving,
    /// Powered off; its disk is kept.
    Stopped,
    /// QEMU ended by itself or could not be started; the reason is beside it.
    Failed,
}

impl VmState {
    /// Whether `self` may be followed by `to`.
    #[must_use]
    pub const fn may_become(self, to: Self) -> bool {
        use VmState::{Docking, Failed, Moving, Running, Starting, Stopped};
        matches!(
            (self, to),
            (Starting, Running | Failed | Stopped)
                | (Running, Docking | Moving | Stopped | Failed)
                | (Docking, Running | Failed | Stopped)
                | (Moving, Running | Failed | Stopped)
                | (Stopped | Failed, Starting)
                | (Stopped, Failed)
                // What it lacked has come after all.
                | (Failed, Running | Stopped)
        )
    }

    /// `to`, if the table allows it.
    ///
    /// # Errors
    /// [`InvalidTransition`] with both states.
    pub fn to(self, to: Self) -> Result<Self, InvalidTransition> {
        if self.may_become(to) {
            Ok(to)
        } else {
            Err(InvalidTransition { what: "a machine", from: self.to_string(), to: to.to_string() })
        }
    }
}

macro_rules! show {
    ($t:ident { $($v:ident => $s:literal),+ $(,)? }) => {
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$v => $s),+ })
            }
        }
    };
}

show!(VmState {
    Starting => "starting", Running => "running", Docking => "docking",
    Moving => "moving", Stopped => "stopped", Failed => "failed",
});

/// State of a long job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OpState {
    /// Under way.
    Running,
    /// Asked to stop; undoing what it did.
    Cancelling,
    /// Done.
    Done,
    /// Ended with an error.
    Failed,
    /// Ended on request with nothing left behind.
    Cancelled,
}

impl OpState {
    /// Whether nothing more will happen.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

show!(OpState {
    Running => "running", Cancelling => "cancelling", Done => "done",
    Failed => "failed", Cancelled => "cancelled",
});

/// What a site is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SiteKind {
    /// The cloud center: it also keeps the registry.
    Center,
    /// A CloudAP, an edge site.
    Ap,
    /// A phone or laptop that runs instances of its own.
    Device,
}

show!(SiteKind { Center => "center", Ap => "ap", Device => "device" });

/// Whether a site can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SiteState {
    /// Its lease is fresh.
    Ready,
    /// Its lease ran out; its machines may still be running.
    Unreachable,
}

show!(SiteState { Ready => "ready", Unreachable => "unreachable" });

/// Who may use a substrate (thesis, chapter 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SubstrateKind {
    /// A clean operating system; shared by all.
    Public,
    /// With applications; shared by those who may use them.
    Restricted,
    /// A user's own state; identity is kept, and reuse is the owner's to allow.
    Private,
}

show!(SubstrateKind { Public => "public", Restricted => "restricted", Private => "private" });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_moves_cannot_be_docked_or_moved_again() {
        let err = VmState::Moving.to(VmState::Docking).expect_err("refused");
        assert_eq!(err.to_string(), "a machine cannot go from moving to docking");
        assert!(VmState::Moving.to(VmState::Moving).is_err());
        assert!(VmState::Moving.to(VmState::Running).is_ok());
    }
}
