//! What a move is at either of its ends, and what leads from one state to the next: tables, in which
//! nothing is done and nobody is asked.
//!
//! ```text
//! arrival:    Coming ----ran----> Running ....... whole: in no move any more
//!               | abandoned          | abandoned
//!               v                    v
//!             Abandoned -resumed-> Coming, or Running if it has run
//!             (of whatever has run: fell -> Fell, which only the center's word changes:
//!              abandoned -> Abandoned, which may be started from its disk, -resumed, fell-> Fell)
//!
//! departure:  Leaving ---ran---> Away ---ran on---> RanOn
//!             (ran: the machine runs at its destination)
//!             (of all three: returns -> Returning, once the destination's is Fell)
//!
//! question:   Unasked ---ask---> Asked ---answer---> Answered ---withdraw---> Unasked
//! ```
//!
//! Arrival and departure are kept in the machine's record, the question lives as long as its daemon.

use godwit_migrate::hybrid::DestinationFate;
use godwit_migrate::relay::RelayPhase;
use godwit_types::{Fault, Generation, MigrationId, Name};
use serde::{Deserialize, Serialize};

/// Which end of a migration a machine is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum End {
    /// It leaves, or has left.
    Source,
    /// It comes.
    Destination,
}

/// A machine that comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// It has not run here.
    Coming,
    /// It has run here, so it is nobody else's to run, and still needs its source.
    Running,
    /// What is missing is not waited for any more.
    Abandoned {
        /// It has run here.
        ran: bool,
        /// Its QEMU died here, as of [`Arrival::Fell`].
        fell: bool,
        /// Why it is not waited for.
        why: String,
    },
    /// It has run here and its QEMU died before its memory was all here: it never runs here again
    /// under this generation, and the center is told so. Only the center knows whether its source
    /// runs it on, so nothing but its word leads out of this.
    Fell,
}

/// A machine that leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Departure {
    /// It is not known to run at its destination.
    Leaving,
    /// It runs at its destination, which may still need what is here.
    Away,
    /// As [`Departure::Away`], and has run here since, and may have written to its disk: what is
    /// here is not what left.
    RanOn,
    /// It died at its destination, and is brought back by its QEMU here, which has it as it left.
    Returning,
}

/// What happens to a move at one end, and is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// The machine has begun to run at its destination.
    Ran,
    /// It has run at its source after that.
    RanOn,
    /// What its destination lacks is not waited for any more.
    Abandoned(String),
    /// It goes on over new relays.
    Resumed,
    /// Its QEMU died at its destination before its memory was all there.
    Fell,
    /// It is brought back to its source after that.
    Returns,
}

/// A step that a move does not take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the move of a machine that {state} is not {step}")]
pub(super) struct NoStep {
    state: &'static str,
    step: &'static str,
}

impl godwit_types::CodedError for NoStep {
    fn code(&self) -> godwit_types::Code {
        godwit_types::Code::Conflict
    }
}

impl Step {
    const fn name(&self) -> &'static str {
        match self {
            Self::Ran => "committed",
            Self::RanOn => "run on",
            Self::Abandoned(_) => "abandoned",
            Self::Resumed => "resumed",
            Self::Fell => "given back to its source",
            Self::Returns => "brought back",
        }
    }

    const fn not_from(&self, state: &'static str) -> NoStep {
        NoStep { state, step: self.name() }
    }
}

impl Arrival {
    /// What the machine does, for people.
    const fn name(&self) -> &'static str {
        match self {
            Self::Coming => "is coming here",
            Self::Running => "came here and runs",
            Self::Abandoned { .. } => "came here in part",
            Self::Fell => "came here in part and died",
        }
    }

    /// Whether the machine has run here.
    pub(crate) const fn has_run(&self) -> bool {
        match self {
            Self::Coming => false,
            Self::Running | Self::Fell => true,
            Self::Abandoned { ran, .. } => *ran,
        }
    }

    /// Whether its QEMU died here before its memory was all here.
    pub(crate) const fn fell(&self) -> bool {
        match self {
            Self::Coming | Self::Running => false,
            Self::Fell => true,
            Self::Abandoned { fell, .. } => *fell,
        }
    }

    /// What it is after a step.
    fn after(&self, step: Step) -> Result<Self, NoStep> {
        Ok(match (self, step) {
            (Self::Fell, Step::Ran) => Self::Fell,
            (_, Step::Fell) if self.has_run() => Self::Fell,
            (Self::Coming | Self::Running, Step::Ran) => Self::Running,
            (Self::Abandoned { fell, why, .. }, Step::Ran) => {
                Self::Abandoned { ran: true, fell: *fell, why: why.clone() }
            }
            (_, Step::Abandoned(why)) => {
                Self::Abandoned { ran: self.has_run(), fell: self.fell(), why }
            }
            // Its disk is brought; that its QEMU is dead stays so.
            (_, Step::Resumed) if self.fell() => Self::Fell,
            (_, Step::Resumed) if self.has_run() => Self::Running,
            (_, Step::Resumed) => Self::Coming,
            (_, step @ (Step::RanOn | Step::Returns | Step::Fell)) => {
                return Err(step.not_from(self.name()));
            }
        })
    }
}

impl Departure {
    /// What the machine does, for people.
    const fn name(self) -> &'static str {
        match self {
            Self::Leaving => "is leaving",
            Self::Away => "has left",
            Self::RanOn => "has run on here after it had left",
            Self::Returning => "is being brought back here",
        }
    }

    /// What it is after a step.
    fn after(self, step: Step) -> Result<Self, NoStep> {
        Ok(match (self, step) {
            // Whatever is heard late of the run that has ended there.
            (_, Step::Returns) | (Self::Returning, Step::Ran | Step::RanOn) => Self::Returning,
            (Self::Leaving | Self::Away, Step::Ran) => Self::Away,
            // Whether it was noted before that it runs there, or not.
            (_, Step::RanOn) | (Self::RanOn, Step::Ran) => Self::RanOn,
            (Self::Leaving | Self::Away, Step::Resumed) => self,
            (_, step @ (Step::Abandoned(_) | Step::Resumed | Step::Fell)) => {
                return Err(step.not_from(self.name()));
            }
        })
    }
}

/// A move as one of its ends has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Course {
    /// This site is its source.
    Departure {
        is: Departure,
        /// The machine's generation at its destination; one more than here when left out.
        next: Option<Generation>,
    },
    /// This site is its destination.
    Arrival(Arrival),
}

/// The migration that a machine is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Kept", into = "Kept")]
pub(crate) struct Migration {
    pub(crate) id: MigrationId,
    /// The site at the other end.
    pub(crate) peer: Name,
    /// How many times new relays were started for it.
    pub(crate) attempt: u32,
    pub(crate) course: Course,
}

impl Migration {
    fn new(id: MigrationId, peer: Name, course: Course) -> Self {
        Self { id, peer, attempt: 0, course }
    }

    /// Of a machine that is to come from `peer`.
    pub(crate) fn arrival(id: MigrationId, peer: Name) -> Self {
        Self::new(id, peer, Course::Arrival(Arrival::Coming))
    }

    /// Of a machine that is to leave for `peer`, where it has the generation `next`.
    pub(crate) fn departure(id: MigrationId, peer: Name, next: Option<Generation>) -> Self {
        Self::new(id, peer, Course::Departure { is: Departure::Leaving, next })
    }

    /// Which end this is.
    pub(crate) const fn end(&self) -> End {
        match self.course {
            Course::Departure { .. } => End::Source,
            Course::Arrival(_) => End::Destination,
        }
    }

    /// Whether the machine has run at its destination.
    pub(crate) const fn has_run(&self) -> bool {
        match &self.course {
            Course::Departure { is, .. } => !matches!(is, Departure::Leaving),
            Course::Arrival(arrival) => arrival.has_run(),
        }
    }

    /// Whether it has run here after it had left.
    pub(crate) const fn ran_on(&self) -> bool {
        matches!(self.course, Course::Departure { is: Departure::RanOn, .. })
    }

    /// Whether its QEMU died here before its memory was all here.
    pub(crate) const fn fell(&self) -> bool {
        match &self.course {
            Course::Departure { .. } => false,
            Course::Arrival(arrival) => arrival.fell(),
        }
    }

    /// Whether it is brought back here from a destination at which it died.
    pub(crate) const fn returns(&self) -> bool {
        matches!(self.course, Course::Departure { is: Departure::Returning, .. })
    }

    /// Why what is missing here is not waited for any more, if it is not.
    pub(crate) const fn abandoned(&self) -> Option<&String> {
        match &self.course {
            Course::Arrival(Arrival::Abandoned { why, .. }) => Some(why),
            Course::Arrival(_) | Course::Departure { .. } => None,
        }
    }

    /// The generation that a machine which leaves has at its destination, if it was told.
    pub(crate) const fn next(&self) -> Option<Generation> {
        match self.course {
            Course::Departure { next, .. } => next,
            Course::Arrival(_) => None,
        }
    }

    /// What it is after a step.
    ///
    /// # Errors
    /// When it is in no state for that.
    pub(super) fn after(&self, step: Step) -> Result<Self, NoStep> {
        let attempt = self.attempt + u32::from(step == Step::Resumed);
        let course = match &self.course {
            Course::Departure { is, next } => {
                Course::Departure { is: is.after(step)?, next: *next }
            }
            Course::Arrival(arrival) => Course::Arrival(arrival.after(step)?),
        };
        Ok(Self { attempt, course, ..self.clone() })
    }
}

/// A migration as every release has written it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    id: MigrationId,
    end: End,
    peer: Name,
    #[serde(default)]
    attempt: u32,
    #[serde(default)]
    runs: bool,
    #[serde(default)]
    given_up: Option<String>,
    #[serde(default)]
    ran_on: bool,
    #[serde(default)]
    next: Option<Generation>,
    /// Of an arrival: as of [`Arrival::Fell`]; of a departure: [`Departure::Returning`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    fell: bool,
}

impl From<Kept> for Migration {
    fn from(kept: Kept) -> Self {
        let course = match (kept.end, kept.given_up) {
            (End::Destination, Some(why)) => {
                Course::Arrival(Arrival::Abandoned { ran: kept.runs, fell: kept.fell, why })
            }
            (End::Destination, None) if kept.fell => Course::Arrival(Arrival::Fell),
            (End::Destination, None) if kept.runs => Course::Arrival(Arrival::Running),
            (End::Destination, None) => Course::Arrival(Arrival::Coming),
            (End::Source, _) => {
                let is = match (kept.ran_on, kept.runs) {
                    _ if kept.fell => Departure::Returning,
                    (true, _) => Departure::RanOn,
                    (false, true) => Departure::Away,
                    (false, false) => Departure::Leaving,
                };
                Course::Departure { is, next: kept.next }
            }
        };
        Self { id: kept.id, peer: kept.peer, attempt: kept.attempt, course }
    }
}

impl From<Migration> for Kept {
    fn from(m: Migration) -> Self {
        Self {
            end: m.end(),
            runs: m.has_run(),
            given_up: m.abandoned().cloned(),
            ran_on: m.ran_on(),
            next: m.next(),
            fell: m.fell() || m.returns(),
            id: m.id,
            peer: m.peer,
            attempt: m.attempt,
        }
    }
}

/// What a new daemon does with a move in which it finds a machine whose QEMU lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AfterRestart {
    /// It goes on over the relay that is there.
    Follow,
    /// It goes on over new relays only, once both ends are asked for that.
    Interrupted,
    /// The machine never ran at its destination: the move is taken back.
    TakeBack,
}

/// An arrival after a restart of the daemon. `relay`: how far the relay is that answers, if one
/// does.
pub(super) fn arrival_after_restart(has_run: bool, relay: Option<RelayPhase>) -> AfterRestart {
    match relay {
        // Its source may never come: the answer that it waits here may be lost.
        Some(RelayPhase::Joining) if !has_run => AfterRestart::TakeBack,
        Some(_) => AfterRestart::Follow,
        None if has_run => AfterRestart::Interrupted,
        None => AfterRestart::TakeBack,
    }
}

/// A departure after a restart of the daemon. `runs`: the machine runs here, and is not known to
/// run at its destination; `committed`: what the relay that answers says of the destination.
pub(super) const fn departure_after_restart(runs: bool, committed: Option<bool>) -> AfterRestart {
    match (runs, committed) {
        // Nobody drives it any more, and nothing has left.
        (true, Some(false) | None) => AfterRestart::TakeBack,
        (_, Some(_)) => AfterRestart::Follow,
        (false, None) => AfterRestart::Interrupted,
    }
}

/// What a source asks the center of a destination that was lost during the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Question {
    #[default]
    Unasked,
    Asked,
    Answered(DestinationFate),
}

impl Question {
    /// Asks, whatever was answered before.
    pub(super) fn ask(&mut self) {
        *self = Self::Asked;
    }

    /// Answers; whether it was asked.
    pub(super) fn answer(&mut self, fate: DestinationFate) -> bool {
        let asked = *self == Self::Asked;
        if asked {
            *self = Self::Answered(fate);
        }
        asked
    }

    /// It is asked no more; what was answered, if it was.
    pub(super) fn withdraw(&mut self) -> Option<DestinationFate> {
        match std::mem::take(self) {
            Self::Answered(fate) => Some(fate),
            Self::Unasked | Self::Asked => None,
        }
    }
}

/// How one end of a move has ended here; `None` while it goes on.
pub(super) type Outcome<R> = Option<Result<R, Fault>>;

/// Ends a move here, unless it has ended already; whether it did.
pub(super) fn end<R>(outcome: &mut Outcome<R>, how: Result<R, Fault>) -> bool {
    let first = outcome.is_none();
    if first {
        *outcome = Some(how);
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Name {
        Name::new("cafe").expect("name")
    }

    fn arrivals() -> [Arrival; 6] {
        let gone = |ran, fell| Arrival::Abandoned { ran, fell, why: "lost".into() };
        let [lost, ran, fell] = [gone(false, false), gone(true, false), gone(true, true)];
        [Arrival::Coming, Arrival::Running, lost, ran, Arrival::Fell, fell]
    }

    fn steps() -> [Step; 6] {
        let late = Step::Abandoned("late".into());
        [Step::Ran, Step::RanOn, late, Step::Resumed, Step::Fell, Step::Returns]
    }

    fn table<S: std::fmt::Debug>(states: &[S], after: impl Fn(&S, Step) -> String) -> String {
        let line = |s: &S| {
            let cells: Vec<_> = steps().iter().map(|step| after(s, step.clone())).collect();
            format!("{s:?}: {}", cells.join(", "))
        };
        states.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn every_step_of_every_state() {
        let of_arrivals = table(&arrivals(), |s, step| match s.after(step) {
            Ok(Arrival::Abandoned { ran, fell: false, why }) => format!("Abandoned({ran} {why})"),
            Ok(Arrival::Abandoned { fell: true, why, .. }) => format!("Abandoned(fell {why})"),
            Ok(next) => format!("{next:?}"),
            Err(_) => "-".into(),
        });
        assert_eq!(
            of_arrivals,
            "Coming: Running, -, Abandoned(false late), Coming, -, -\n\
             Running: Running, -, Abandoned(true late), Running, Fell, -\n\
             Abandoned { ran: false, fell: false, why: \"lost\" }: Abandoned(true lost), -, Abandoned(false late), Coming, -, -\n\
             Abandoned { ran: true, fell: false, why: \"lost\" }: Abandoned(true lost), -, Abandoned(true late), Running, Fell, -\n\
             Fell: Fell, -, Abandoned(fell late), Fell, Fell, -\n\
             Abandoned { ran: true, fell: true, why: \"lost\" }: Abandoned(fell lost), -, Abandoned(fell late), Fell, Fell, -"
        );
        let departures =
            [Departure::Leaving, Departure::Away, Departure::RanOn, Departure::Returning];
        let of_departures = table(&departures, |s, step| {
            s.after(step).map_or_else(|_| "-".into(), |next| format!("{next:?}"))
        });
        assert_eq!(
            of_departures,
            "Leaving: Away, RanOn, -, Leaving, -, Returning\n\
             Away: Away, RanOn, -, Away, -, Returning\n\
             RanOn: RanOn, RanOn, -, -, -, Returning\n\
             Returning: Returning, Returning, -, -, -, Returning"
        );
        let e = Departure::RanOn.after(Step::Resumed).expect_err("what is here did not leave");
        assert_eq!(
            e.to_string(),
            "the move of a machine that has run on here after it had left is not resumed"
        );
    }

    #[test]
    fn that_a_machine_has_run_is_never_forgotten() {
        let mut all = vec![
            Migration::arrival(MigrationId::new(), peer()),
            Migration::departure(MigrationId::new(), peer(), Some(Generation(3))),
        ];
        for _ in 0..4 {
            for m in std::mem::take(&mut all) {
                for step in &steps() {
                    let Ok(next) = m.after(step.clone()) else { continue };
                    assert!(next.has_run() || !m.has_run(), "{m:?} {step:?}");
                    assert!(next.ran_on() || next.returns() || !m.ran_on(), "{m:?} {step:?}");
                    assert!(next.fell() || !m.fell(), "{m:?} {step:?}");
                    assert!(next.returns() || !m.returns(), "{m:?} {step:?}");
                    assert_eq!((next.id, next.end(), next.next()), (m.id, m.end(), m.next()));
                    assert_eq!(next.attempt - m.attempt, u32::from(*step == Step::Resumed));
                    all.push(next);
                }
            }
        }
    }

    #[test]
    fn a_move_is_kept_as_every_release_has_written_it() {
        let kept = |rest: &str| {
            format!("{{\"id\":\"0190163d-8694-739b-aea5-966c26f8ad91\",{rest}").replace('\'', "\"")
        };
        let cases = [
            "'end':'destination','peer':'cafe','attempt':0,'runs':false,'given_up':null,\
             'ran_on':false,'next':null}",
            "'end':'destination','peer':'cafe','attempt':2,'runs':true,'given_up':null,\
             'ran_on':false,'next':null}",
            "'end':'destination','peer':'cafe','attempt':1,'runs':true,'given_up':'its source is \
             gone','ran_on':false,'next':null}",
            "'end':'source','peer':'cafe','attempt':0,'runs':false,'given_up':null,'ran_on':false,\
             'next':8}",
            "'end':'source','peer':'cafe','attempt':0,'runs':true,'given_up':null,'ran_on':false,\
             'next':8}",
            "'end':'source','peer':'cafe','attempt':3,'runs':true,'given_up':null,'ran_on':true,\
             'next':8}",
            "'end':'destination','peer':'cafe','attempt':0,'runs':true,'given_up':null,\
             'ran_on':false,'next':null,'fell':true}",
            "'end':'destination','peer':'cafe','attempt':0,'runs':true,'given_up':'its source is \
             gone','ran_on':false,'next':null,'fell':true}",
            "'end':'source','peer':'cafe','attempt':0,'runs':true,'given_up':null,'ran_on':false,\
             'next':8,'fell':true}",
        ];
        for case in cases.map(kept) {
            let read: Migration =
                serde_json::from_str(&case).unwrap_or_else(|e| panic!("{case}: {e}"));
            assert_eq!(serde_json::to_string(&read).expect("written"), case);
        }
        let old = kept("'end':'source','peer':'cafe'}");
        let read: Migration = serde_json::from_str(&old).expect("of the first release");
        assert_eq!(read.course, Course::Departure { is: Departure::Leaving, next: None });
    }

    #[test]
    fn a_source_that_ran_on_before_it_was_noted_that_it_had_left_is_not_taken_back() {
        // As earlier releases have written it: that it ran on came first, or came alone.
        let kept = "{'id':'0190163d-8694-739b-aea5-966c26f8ad91','end':'source','peer':'cafe',\
                    'attempt':0,'runs':false,'given_up':null,'ran_on':true,'next':8}";
        let read: Migration = serde_json::from_str(&kept.replace('\'', "\"")).expect("read");
        let next = Some(Generation(8));
        assert_eq!(read.course, Course::Departure { is: Departure::RanOn, next });
        assert!(read.has_run(), "a machine runs on only where its destination has it");
        let written = serde_json::to_string(&read).expect("written");
        assert!(
            written.contains("\"runs\":true") && written.contains("\"ran_on\":true"),
            "{written}"
        );
        // Its QEMU runs here and is held: it is not at home.
        let at_home = !read.has_run();
        for (committed, then) in [
            (None, AfterRestart::Interrupted),
            (Some(false), AfterRestart::Follow),
            (Some(true), AfterRestart::Follow),
        ] {
            assert_eq!(departure_after_restart(at_home, committed), then);
        }
    }

    #[test]
    fn a_new_daemon_takes_back_only_what_never_ran_elsewhere() {
        use AfterRestart::{Follow, Interrupted, TakeBack};
        let arrival = arrival_after_restart;
        assert_eq!(arrival(false, Some(RelayPhase::Joining)), TakeBack);
        assert_eq!(arrival(false, Some(RelayPhase::PreCopy)), Follow);
        assert_eq!(arrival(false, None), TakeBack);
        for relay in [RelayPhase::Joining, RelayPhase::PreCopy, RelayPhase::Done] {
            assert_eq!(arrival(true, Some(relay)), Follow);
        }
        assert_eq!(arrival(true, None), Interrupted);
        let departure = departure_after_restart;
        assert_eq!(departure(true, Some(false)), TakeBack);
        assert_eq!(departure(true, None), TakeBack);
        assert_eq!(departure(true, Some(true)), Follow);
        assert_eq!(departure(false, Some(false)), Follow);
        assert_eq!(departure(false, Some(true)), Follow);
        assert_eq!(departure(false, None), Interrupted);
    }

    #[test]
    fn a_question_is_answered_once_and_only_while_it_is_asked() {
        let mut q = Question::default();
        assert!(!q.answer(DestinationFate::Dead));
        assert_eq!(q.withdraw(), None);
        q.ask();
        assert!(q.answer(DestinationFate::Runs));
        assert!(!q.answer(DestinationFate::Dead), "the first word counts");
        assert_eq!(q.withdraw(), Some(DestinationFate::Runs));
        assert_eq!(q, Question::Unasked);
        q.ask();
        q.ask();
        assert_eq!(q.withdraw(), None);
    }

    #[test]
    fn a_move_ends_once() {
        let mut outcome = None;
        assert!(end(&mut outcome, Ok(1)));
        assert!(!end(&mut outcome, Err(Fault::internal("too late"))));
        assert!(matches!(outcome, Some(Ok(1))));
    }
}
