//! The source's table.

use std::fmt;

use godwit_types::InvalidTransition;

use crate::relay::RelayPhase;

/// Where the source is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceState {
    /// The relays are joining.
    Prepare,
    /// The one round over memory.
    PreCopy,
    /// What is on the wire is let through.
    Drain,
    /// QEMU is told to switch, and does not before the relay says so, too.
    Arm,
    /// The relay reads on, so QEMU switches: the machine stops, its device state leaves.
    Freeze,
    /// The machine runs at the destination; memory and disk follow.
    PostCopy,
    /// Memory is there; the disk is being finished.
    Release,
    /// The migration is being undone.
    Cancelling {
        /// Why.
        why: String,
    },
    /// The destination was lost in `Freeze`: it is not known yet where the machine may run.
    Uncertain {
        /// What was lost.
        why: String,
    },
    /// The machine is brought back from the hand-over instant.
    Reclaiming {
        /// What was lost.
        why: String,
    },
    /// Nothing more will happen.
    Ended(SourceEnd),
}

/// How a migration ended for the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEnd {
    /// The machine is independent of the source.
    Moved,
    /// The machine runs at the source, as if nothing had happened.
    Cancelled {
        /// Why.
        why: String,
    },
    /// The destination was lost while the machine stood still; it runs at the source again.
    Reclaimed {
        /// What was lost.
        why: String,
    },
    /// The machine runs at the destination, which still needs the source: both QEMUs keep what
    /// they have until new relays are started.
    Interrupted {
        /// What was lost.
        why: String,
    },
}

impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::PreCopy => "pre-copy",
            Self::Drain => "drain",
            Self::Arm => "arm",
            Self::Freeze => "freeze",
            Self::PostCopy => "post-copy",
            Self::Release => "release",
            Self::Cancelling { .. } => "cancelling",
            Self::Uncertain { .. } => "uncertain",
            Self::Reclaiming { .. } => "reclaiming",
            Self::Ended(_) => "ended",
        })
    }
}

/// What the source learns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// The relay has come this far (or further than told before).
    Relay(RelayPhase),
    /// The relay or its link is lost, or QEMU's migration failed.
    Lost {
        /// What.
        why: String,
    },
    /// Somebody wants the migration undone.
    Cancel {
        /// Why.
        why: String,
    },
    /// QEMU has taken the word to switch.
    Armed,
    /// QEMU's migration is undone.
    Undone,
    /// The destination says (or the center, for it) that the machine never ran there and never
    /// will: its QEMU is gone.
    DestinationDead,
    /// The destination says that the machine runs there.
    DestinationRuns,
    /// The relay has taken QEMU's stream to its end.
    Reclaimed,
}

/// What the source is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEffect {
    /// Set capabilities and start QEMU's migration into the relay.
    Migrate,
    /// Tell QEMU to switch to post-copy.
    StartPostcopy,
    /// Tell the relay to read on.
    Proceed,
    /// Cancel QEMU's migration and see that the machine runs.
    Undo,
    /// End the relay.
    AbortRelay {
        /// Why.
        why: String,
    },
    /// Find out whether the machine runs at the destination, and fence it if it does not.
    AskDestination,
    /// Tell the relay to take QEMU's stream to its end.
    Reclaim,
    /// Let the machine run.
    Run,
}

/// The source's state machine.
#[derive(Debug)]
pub struct SourceDriver {
    state: SourceState,
}

impl Default for SourceDriver {
    fn default() -> Self {
        Self::new()
    }
}

impl SourceDriver {
    /// At the start of a migration.
    #[must_use]
    pub fn new() -> Self {
        Self { state: SourceState::Prepare }
    }

    /// After a break beyond the commit point.
    #[must_use]
    pub fn resumed() -> Self {
        Self { state: SourceState::PostCopy }
    }

    /// Found again in the switch, when it is not known whether the commit point has passed.
    #[must_use]
    pub fn frozen() -> Self {
        Self { state: SourceState::Freeze }
    }

    /// Whether the machine is known to run at the destination.
    #[must_use]
    pub fn is_beyond(&self) -> bool {
        use SourceState::{Ended, PostCopy, Release};
        matches!(
            self.state,
            PostCopy | Release | Ended(SourceEnd::Moved | SourceEnd::Interrupted { .. })
        )
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &SourceState {
        &self.state
    }

    /// Whether a cancel would be taken now.
    #[must_use]
    pub fn can_cancel(&self) -> bool {
        use SourceState::{Arm, Drain, PreCopy, Prepare};
        matches!(self.state, Prepare | PreCopy | Drain | Arm)
    }

    /// Takes an event; gives what is to be done, in order.
    ///
    /// # Errors
    /// [`InvalidTransition`] when the state does not allow it; the state stays. For a cancel this
    /// is the refusal: the machine is beyond the point where it could be kept here.
    pub fn on(&mut self, event: SourceEvent) -> Result<Vec<SourceEffect>, InvalidTransition> {
        use SourceEffect as Do;
        use SourceEvent as On;
        use SourceState as At;
        let mut todo = Vec::new();
        let next = match (&self.state, event) {
            (_, On::Relay(phase)) => {
                while let Some(next) = self.advance(phase, &mut todo) {
                    self.state = next;
                }
                return Ok(todo);
            }
            (At::Prepare, On::Cancel { why } | On::Lost { why }) => {
                todo.push(Do::AbortRelay { why: why.clone() });
                At::Ended(SourceEnd::Cancelled { why })
            }
            (At::Arm, On::Armed) => {
                todo.push(Do::Proceed);
                At::Freeze
            }
            // Undone meanwhile.
            (At::Cancelling { why }, On::Armed) => At::Cancelling { why: why.clone() },
            (At::PreCopy | At::Drain | At::Arm, On::Cancel { why } | On::Lost { why }) => {
                todo.extend([Do::AbortRelay { why: why.clone() }, Do::Undo]);
                At::Cancelling { why }
            }
            (At::Cancelling { why }, On::Undone) => {
                At::Ended(SourceEnd::Cancelled { why: why.clone() })
            }
            (At::Cancelling { why }, On::Cancel { .. } | On::Lost { .. }) => {
                At::Cancelling { why: why.clone() }
            }
            (At::Freeze, On::Lost { why }) => {
                todo.push(Do::AskDestination);
                At::Uncertain { why }
            }
            // QEMU itself gave up before it sent the machine off, and the destination is fenced.
            (At::Uncertain { why }, On::Undone) => {
                At::Ended(SourceEnd::Cancelled { why: why.clone() })
            }
            (At::Uncertain { why }, On::DestinationDead) => {
                todo.push(Do::Reclaim);
                At::Reclaiming { why: why.clone() }
            }
            (At::Uncertain { why }, On::DestinationRuns) => {
                let why = why.clone();
                todo.push(Do::AbortRelay { why: why.clone() });
                At::Ended(SourceEnd::Interrupted { why })
            }
            (At::Uncertain { why } | At::Reclaiming { why }, On::Lost { .. }) => {
                At::Uncertain { why: why.clone() }
            }
            (At::Reclaiming { why }, On::Reclaimed) => {
                todo.push(Do::Run);
                At::Ended(SourceEnd::Reclaimed { why: why.clone() })
            }
            (At::PostCopy | At::Release, On::Lost { why }) => {
                At::Ended(SourceEnd::Interrupted { why })
            }
            (At::Ended(end), On::Lost { .. }) => At::Ended(end.clone()),
            (state, event) => {
                let to = match event {
                    On::Cancel { .. } => "cancelled: it is beyond the switch to the destination",
                    On::Armed => "switched",
                    On::Undone => "undone",
                    On::DestinationDead | On::Reclaimed => "reclaimed",
                    On::DestinationRuns | On::Lost { .. } | On::Relay(_) => "interrupted",
                };
                return Err(InvalidTransition {
                    what: "a migration",
                    from: state.to_string(),
                    to: to.to_owned(),
                });
            }
        };
        self.state = next;
        Ok(todo)
    }

    /// One step that the relay's phase allows. Phases are levels: some may never be seen.
    fn advance(&self, phase: RelayPhase, todo: &mut Vec<SourceEffect>) -> Option<SourceState> {
        use SourceState as At;
        match &self.state {
            At::Prepare if phase >= RelayPhase::Waiting => {
                todo.push(SourceEffect::Migrate);
                Some(At::PreCopy)
            }
            At::PreCopy if phase >= RelayPhase::RoundOver => Some(At::Drain),
            At::Drain if phase >= RelayPhase::Drained => {
                if phase < RelayPhase::Switching {
                    todo.push(SourceEffect::StartPostcopy);
                    Some(At::Arm)
                } else {
                    Some(At::Freeze)
                }
            }
            At::Freeze if phase >= RelayPhase::Committed => Some(At::PostCopy),
            At::PostCopy if phase >= RelayPhase::MemoryDone => Some(At::Release),
            At::Release if phase >= RelayPhase::Done => Some(At::Ended(SourceEnd::Moved)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to(phase: RelayPhase) -> SourceDriver {
        let mut driver = SourceDriver::new();
        for p in [
            RelayPhase::Waiting,
            RelayPhase::PreCopy,
            RelayPhase::RoundOver,
            RelayPhase::Drained,
            RelayPhase::Switching,
            RelayPhase::Stopped,
            RelayPhase::Committed,
            RelayPhase::MemoryDone,
        ] {
            if p <= phase {
                driver.on(SourceEvent::Relay(p)).unwrap();
            }
            if *driver.state() == SourceState::Arm && phase > RelayPhase::Drained {
                driver.on(SourceEvent::Armed).unwrap();
            }
        }
        driver
    }

    fn cancel() -> SourceEvent {
        SourceEvent::Cancel { why: "asked".into() }
    }

    fn lost() -> SourceEvent {
        SourceEvent::Lost { why: "link".into() }
    }

    #[test]
    fn the_way_of_a_migration() {
        let mut d = SourceDriver::new();
        assert_eq!(d.on(SourceEvent::Relay(RelayPhase::Waiting)).unwrap(), [SourceEffect::Migrate]);
        assert_eq!(d.on(SourceEvent::Relay(RelayPhase::RoundOver)).unwrap(), []);
        assert_eq!(*d.state(), SourceState::Drain);
        let drained = SourceEvent::Relay(RelayPhase::Drained);
        assert_eq!(d.on(drained.clone()).unwrap(), [SourceEffect::StartPostcopy]);
        assert_eq!(d.on(drained).unwrap(), []);
        assert!(d.can_cancel(), "QEMU does not switch before the relay reads on");
        assert_eq!(d.on(SourceEvent::Armed).unwrap(), [SourceEffect::Proceed]);
        assert_eq!(d.on(SourceEvent::Relay(RelayPhase::Done)).unwrap(), []);
        assert_eq!(*d.state(), SourceState::Ended(SourceEnd::Moved));
    }

    #[test]
    fn a_cancel_is_taken_before_the_switch_and_refused_after_it() {
        for phase in [RelayPhase::Waiting, RelayPhase::RoundOver, RelayPhase::Drained] {
            let mut d = to(phase);
            let todo = d.on(cancel()).unwrap();
            assert!(todo.contains(&SourceEffect::Undo));
            d.on(SourceEvent::Undone).unwrap();
            assert!(matches!(d.state(), SourceState::Ended(SourceEnd::Cancelled { .. })));
        }
        for phase in [RelayPhase::Switching, RelayPhase::Stopped, RelayPhase::Committed] {
            let mut d = to(phase);
            assert!(!d.can_cancel());
            let e = d.on(cancel()).unwrap_err();
            assert!(e.to_string().contains("beyond the switch"), "{e}");
        }
    }

    #[test]
    fn a_destination_lost_in_the_freeze_is_asked_about_before_anything_runs() {
        let mut d = to(RelayPhase::Stopped);
        assert_eq!(d.on(lost()).unwrap(), [SourceEffect::AskDestination]);
        assert!(d.on(SourceEvent::Reclaimed).is_err());
        assert_eq!(d.on(SourceEvent::DestinationDead).unwrap(), [SourceEffect::Reclaim]);
        assert_eq!(d.on(SourceEvent::Reclaimed).unwrap(), [SourceEffect::Run]);

        let mut d = to(RelayPhase::Stopped);
        d.on(lost()).unwrap();
        d.on(SourceEvent::DestinationRuns).unwrap();
        assert!(matches!(d.state(), SourceState::Ended(SourceEnd::Interrupted { .. })));
    }

    #[test]
    fn after_the_commit_point_a_loss_never_lets_the_source_run() {
        let mut d = to(RelayPhase::Committed);
        assert_eq!(d.on(lost()).unwrap(), []);
        assert!(d.on(SourceEvent::DestinationDead).is_err());
    }

    fn any_event() -> impl Strategy<Value = SourceEvent> {
        let phases = [
            RelayPhase::Waiting,
            RelayPhase::PreCopy,
            RelayPhase::RoundOver,
            RelayPhase::Drained,
            RelayPhase::Stopped,
            RelayPhase::Committed,
            RelayPhase::MemoryDone,
            RelayPhase::Done,
        ];
        prop_oneof![
            4 => proptest::sample::select(phases.to_vec()).prop_map(SourceEvent::Relay),
            1 => proptest::sample::select(vec![
                lost(),
                cancel(),
                SourceEvent::Armed,
                SourceEvent::Undone,
                SourceEvent::DestinationDead,
                SourceEvent::DestinationRuns,
                SourceEvent::Reclaimed,
            ]),
        ]
    }

    proptest! {
        /// One machine in one place: the source runs only if the commit point was never told.
        #[test]
        fn no_order_of_events_lets_both_sides_run(
            events in proptest::collection::vec(any_event(), 0..30),
        ) {
            let mut d = SourceDriver::new();
            let mut committed = false;
            for event in events {
                let tells = matches!(event, SourceEvent::Relay(p) if p >= RelayPhase::Committed);
                let before = d.state().clone();
                let todo = d.on(event).unwrap_or_default();
                // A relay that is known dead tells nothing more.
                committed |= tells && matches!(
                    before, SourceState::Freeze | SourceState::PostCopy | SourceState::Release
                );
                for effect in todo {
                    if matches!(effect, SourceEffect::Run | SourceEffect::Undo) {
                        prop_assert!(!committed);
                    }
                }
            }
        }
    }
}
