//! The destination's table.

use std::fmt;

use godwit_types::InvalidTransition;

use crate::relay::RelayPhase;

/// Where the destination is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationState {
    /// QEMU waits for the state; the relays are joining.
    Prepare,
    /// The one round over memory.
    PreCopy,
    /// The machine stands still.
    Freeze,
    /// The machine runs here; memory and disk follow.
    PostCopy,
    /// Everything is here; the disk is pivoted away from the source.
    Release,
    /// The machine is independent of the source.
    Moved,
    /// The machine never ran here; its QEMU is gone.
    Gone {
        /// Why.
        why: String,
    },
    /// The machine runs here and still needs the source; new relays have to be started.
    Interrupted {
        /// What was lost.
        why: String,
    },
}

impl fmt::Display for DestinationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::PreCopy => "pre-copy",
            Self::Freeze => "freeze",
            Self::PostCopy => "post-copy",
            Self::Release => "release",
            Self::Moved => "moved",
            Self::Gone { .. } => "gone",
            Self::Interrupted { .. } => "interrupted",
        })
    }
}

/// What the destination learns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The relay has come this far (or further than told before).
    Relay(RelayPhase),
    /// QEMU runs the machine.
    Runs,
    /// The relay, its link or QEMU is lost, or the source gave up.
    Lost {
        /// What.
        why: String,
    },
    /// What was lost was lost before it had been written down that the machine runs here, and it never
    /// will be: nobody was told, and it runs at its source again.
    NotCommitted {
        /// What was lost.
        why: String,
    },
    /// The disk no longer reads from the source.
    Pivoted,
}

/// What the destination is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationEffect {
    /// Let QEMU tell the relay what the guest overwrites (nothing to do without a disk).
    Offer,
    /// Swap the disk's backing to the middle layer (nothing to do without a disk).
    Pivot,
    /// End QEMU: the machine never ran here.
    EndQemu,
}

/// The destination's state machine.
#[derive(Debug)]
pub struct DestinationDriver {
    state: DestinationState,
    runs: bool,
    offered: bool,
}

impl Default for DestinationDriver {
    fn default() -> Self {
        Self::new()
    }
}

impl DestinationDriver {
    /// QEMU waits for the state.
    #[must_use]
    pub fn new() -> Self {
        Self { state: DestinationState::Prepare, runs: false, offered: false }
    }

    /// After a break beyond the commit point.
    #[must_use]
    pub fn resumed() -> Self {
        Self { state: DestinationState::PostCopy, runs: true, offered: false }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &DestinationState {
        &self.state
    }

    /// Whether it is not known yet that the machine runs here.
    #[must_use]
    pub fn is_open(&self) -> bool {
        use DestinationState::{Freeze, PreCopy, Prepare};
        matches!(self.state, Prepare | PreCopy | Freeze)
    }

    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_over(&self) -> bool {
        use DestinationState::{Gone, Interrupted, Moved};
        matches!(self.state, Moved | Gone { .. } | Interrupted { .. })
    }

    /// Takes an event; gives what is to be done, in order.
    ///
    /// # Errors
    /// [`InvalidTransition`] when the state does not allow it; the state stays.
    pub fn on(
        &mut self,
        event: DestinationEvent,
    ) -> Result<Vec<DestinationEffect>, InvalidTransition> {
        use DestinationEvent as On;
        use DestinationState as At;
        let mut todo = Vec::new();
        match (&self.state, event) {
            (_, On::Relay(phase)) => {
                while let Some(next) = self.advance(phase, &mut todo) {
                    self.state = next;
                }
                // Before that a QEMU that waits for a page may answer nobody.
                if self.state == At::PostCopy
                    && self.runs
                    && phase >= RelayPhase::MemoryDone
                    && !std::mem::replace(&mut self.offered, true)
                {
                    todo.push(DestinationEffect::Offer);
                }
            }
            (
                At::Moved | At::Gone { .. } | At::Interrupted { .. },
                On::Lost { .. } | On::NotCommitted { .. } | On::Runs,
            ) => {}
            (_, On::Runs) => {
                self.runs = true;
                if matches!(self.state, At::Prepare | At::PreCopy | At::Freeze) {
                    self.state = At::PostCopy;
                }
            }
            // Beyond the commit point the machine is ours, whatever is lost.
            (At::PostCopy | At::Release, On::Lost { why }) => {
                self.state = At::Interrupted { why };
            }
            (At::Prepare | At::PreCopy | At::Freeze, On::Lost { why })
            | (_, On::NotCommitted { why }) => {
                todo.push(DestinationEffect::EndQemu);
                self.state = At::Gone { why };
            }
            (At::Release, On::Pivoted) => self.state = At::Moved,
            (state, On::Pivoted) => {
                return Err(InvalidTransition {
                    what: "an arriving machine",
                    from: state.to_string(),
                    to: "moved".into(),
                });
            }
        }
        Ok(todo)
    }

    fn advance(
        &self,
        phase: RelayPhase,
        todo: &mut Vec<DestinationEffect>,
    ) -> Option<DestinationState> {
        use DestinationState as At;
        match &self.state {
            At::Prepare if phase >= RelayPhase::PreCopy => Some(At::PreCopy),
            At::PreCopy if phase >= RelayPhase::Stopped => Some(At::Freeze),
            At::Freeze if phase >= RelayPhase::Committed => Some(At::PostCopy),
            At::PostCopy if phase >= RelayPhase::Done && self.runs => {
                todo.push(DestinationEffect::Pivot);
                Some(At::Release)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_of_an_arrival() {
        let mut d = DestinationDriver::new();
        for phase in [RelayPhase::Waiting, RelayPhase::PreCopy, RelayPhase::Stopped] {
            assert_eq!(d.on(DestinationEvent::Relay(phase)).unwrap(), []);
        }
        assert_eq!(*d.state(), DestinationState::Freeze);
        d.on(DestinationEvent::Relay(RelayPhase::Done)).unwrap();
        assert_eq!(*d.state(), DestinationState::PostCopy, "waits until QEMU says that it runs");
        d.on(DestinationEvent::Runs).unwrap();
        let todo = d.on(DestinationEvent::Relay(RelayPhase::Done)).unwrap();
        assert_eq!(todo, [DestinationEffect::Pivot]);
        d.on(DestinationEvent::Pivoted).unwrap();
        assert!(d.is_over());
    }

    #[test]
    fn what_is_overwritten_is_reported_once_all_memory_is_there() {
        let on = |d: &mut DestinationDriver, phase| d.on(DestinationEvent::Relay(phase)).unwrap();
        for mut d in [DestinationDriver::new(), DestinationDriver::resumed()] {
            d.on(DestinationEvent::Runs).unwrap();
            assert_eq!(on(&mut d, RelayPhase::Committed), []);
            assert_eq!(on(&mut d, RelayPhase::MemoryDone), [DestinationEffect::Offer]);
            assert_eq!(on(&mut d, RelayPhase::MemoryDone), []);
            assert_eq!(on(&mut d, RelayPhase::Done), [DestinationEffect::Pivot]);
        }
    }

    #[test]
    fn a_machine_that_runs_and_was_never_announced_is_ended() {
        let mut d = DestinationDriver::new();
        d.on(DestinationEvent::Relay(RelayPhase::Stopped)).unwrap();
        d.on(DestinationEvent::Runs).unwrap();
        let why = || "a full disk".to_owned();
        let todo = d.on(DestinationEvent::NotCommitted { why: why() }).unwrap();
        assert_eq!(todo, [DestinationEffect::EndQemu]);
        assert_eq!(*d.state(), DestinationState::Gone { why: why() });
        assert_eq!(d.on(DestinationEvent::Lost { why: why() }).unwrap(), []);
    }

    #[test]
    fn a_machine_that_runs_here_is_kept_and_one_that_never_ran_is_ended() {
        let lost = || DestinationEvent::Lost { why: "relay".into() };
        for phase in [RelayPhase::Waiting, RelayPhase::PreCopy, RelayPhase::Stopped] {
            let mut d = DestinationDriver::new();
            d.on(DestinationEvent::Relay(phase)).unwrap();
            assert_eq!(d.on(lost()).unwrap(), [DestinationEffect::EndQemu]);
        }
        let mut d = DestinationDriver::new();
        d.on(DestinationEvent::Relay(RelayPhase::Committed)).unwrap();
        assert_eq!(d.on(lost()).unwrap(), []);
        let mut d = DestinationDriver::new();
        d.on(DestinationEvent::Runs).unwrap();
        assert_eq!(d.on(lost()).unwrap(), []);
    }
}
