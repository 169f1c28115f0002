//! The steps of operations, as the registry keeps them.
//!
//! What a step is called and what it holds is a promise to the releases after this one: names and
//! fields are only added.

use godwit_types::{Generation, MigrationId, Name, SubstrateId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use godwit_types::Fault;

/// One step of an operation, written down before it is taken and again when it is done, so that
/// a daemon that comes back knows what to finish or to undo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What was to be done, with what is needed to finish or to undo it.
    #[serde(flatten)]
    pub what: StepKind,
    /// How far it came.
    pub state: StepState,
}

/// What a step does. It is stored, and shown by the API, as `name` and `data`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", content = "data", rename_all = "kebab-case")]
pub enum StepKind {
    /// A new machine is started.
    Start {
        /// Where.
        site: Name,
    },
    /// A stopped machine is started.
    #[serde(rename = "vm start")]
    VmStart {
        /// Where.
        site: Name,
        /// Its generation from then on.
        generation: Generation,
    },
    /// A machine is stopped.
    #[serde(rename = "vm stop")]
    VmStop {
        /// Where.
        site: Name,
        /// Its generation.
        generation: Generation,
    },
    /// A machine is deleted.
    Delete {
        /// Where.
        site: Name,
    },
    /// A machine is docked.
    Dock {
        /// Where.
        site: Name,
        /// What it becomes.
        substrate: SubstrateId,
    },
    /// A substrate's stored disk is booted and docked again.
    Rebuild {
        /// Where.
        site: Name,
    },
    /// A substrate is brought to a site that lacks it.
    Bring {
        /// From where.
        from: Name,
        /// Where to.
        to: Name,
        /// Which.
        substrate: SubstrateId,
    },
    /// The destination of a move makes ready.
    Prepare {
        /// The move.
        migration: MigrationId,
        /// The destination.
        at: Name,
    },
    /// The source of a move sends.
    Send {
        /// The move.
        migration: MigrationId,
        /// The source.
        from: Name,
    },
    /// The source of a move gives up what it kept.
    Release {
        /// The source.
        at: Name,
    },
    /// One that this version does not know, or not with these fields: kept as it is.
    #[serde(untagged)]
    Unknown {
        /// What it is called.
        name: String,
        /// What it holds.
        #[serde(default)]
        data: serde_json::Value,
    },
}

/// The name of a step, to say which one is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "those of StepKind")]
pub enum StepName {
    Start,
    VmStart,
    VmStop,
    Delete,
    Dock,
    Rebuild,
    Bring,
    Prepare,
    Send,
    Release,
}

/// How far a step came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StepState {
    /// Begun; may have happened or not.
    Begun,
    /// Done.
    Done,
    /// Taken back.
    Undone,
}

/// How far a move had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveReached {
    /// Neither of its ends had been told of it.
    Nothing,
    /// Its destination may have made ready.
    Prepare(MigrationId),
    /// Its source may have sent.
    Send(MigrationId),
}

impl StepKind {
    /// Its name; none of one that is not known.
    #[must_use]
    pub const fn name(&self) -> Option<StepName> {
        Some(match self {
            Self::Start { .. } => StepName::Start,
            Self::VmStart { .. } => StepName::VmStart,
            Self::VmStop { .. } => StepName::VmStop,
            Self::Delete { .. } => StepName::Delete,
            Self::Dock { .. } => StepName::Dock,
            Self::Rebuild { .. } => StepName::Rebuild,
            Self::Bring { .. } => StepName::Bring,
            Self::Prepare { .. } => StepName::Prepare,
            Self::Send { .. } => StepName::Send,
            Self::Release { .. } => StepName::Release,
            Self::Unknown { .. } => return None,
        })
    }

    /// The site that was asked to publish a substrate by this step.
    #[must_use]
    pub const fn docks_at(&self) -> Option<&Name> {
        match self {
            Self::Dock { site, .. } | Self::Rebuild { site } => Some(site),
            Self::Start { .. }
            | Self::VmStart { .. }
            | Self::VmStop { .. }
            | Self::Delete { .. }
            | Self::Bring { .. }
            | Self::Prepare { .. }
            | Self::Send { .. }
            | Self::Release { .. }
            | Self::Unknown { .. } => None,
        }
    }
}

/// How far the move had come whose journal this is.
#[must_use]
pub fn move_reached(journal: &[Step]) -> MoveReached {
    let mut reached = MoveReached::Nothing;
    for step in journal {
        match &step.what {
            StepKind::Send { migration, .. } => reached = MoveReached::Send(*migration),
            StepKind::Prepare { migration, .. } => {
                if !matches!(reached, MoveReached::Send(_)) {
                    reached = MoveReached::Prepare(*migration);
                }
            }
            StepKind::Release { .. }
            | StepKind::Start { .. }
            | StepKind::VmStart { .. }
            | StepKind::VmStop { .. }
            | StepKind::Delete { .. }
            | StepKind::Dock { .. }
            | StepKind::Rebuild { .. }
            | StepKind::Bring { .. }
            | StepKind::Unknown { .. } => {}
        }
    }
    reached
}

/// Refuses to go by a journal with a step that this version does not know: what it has done, nobody
/// here can finish or undo.
///
/// # Errors
/// Of class conflict; it names the step.
pub fn all_known(journal: &[Step]) -> Result<(), Fault> {
    let unknown = journal.iter().find_map(|s| match &s.what {
        StepKind::Unknown { name, .. } => Some(name),
        _ => None,
    });
    unknown.map_or(Ok(()), |name| {
        Err(Fault::conflict(format!(
            "the journal has a step '{}' that this version does not know; nothing was finished or \
             undone",
            name.escape_debug()
        ))
        .hint("see where its machine is with: godwit vm list; stop it with --force, or delete it"))
    })
}

/// One step of an operation, written down before it is taken and again when it is done, so that
/// a daemon that comes back knows what to finish or to undo.
// The form of `Step` in the API's description.
#[derive(ToSchema)]
#[schema(as = Step)]
#[expect(dead_code, reason = "its schema is what is used")]
struct Shown {
    /// What was to be done.
    name: String,
    /// How far it came.
    state: StepState,
    /// What is needed to finish or to undo it.
    #[schema(value_type = Object)]
    data: serde_json::Value,
}

impl utoipa::PartialSchema for Step {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        Shown::schema()
    }
}

impl ToSchema for Step {
    fn name() -> std::borrow::Cow<'static, str> {
        "Step".into()
    }

    fn schemas(
        schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::schema::Schema>)>,
    ) {
        Shown::schemas(schemas);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// The steps as the release before this one wrote them.
    fn recorded() -> Value {
        let id = "0194e7a0-0000-7000-8000-000000000001";
        json!([
            {"name": "start", "state": "done", "data": {"site": "center"}},
            {"name": "vm start", "state": "done", "data": {"site": "center", "generation": 2}},
            {"name": "vm stop", "state": "undone", "data": {"site": "center", "generation": 2}},
            {"name": "delete", "state": "begun", "data": {"site": "center"}},
            {"name": "dock", "state": "begun", "data": {"site": "center", "substrate": id}},
            {"name": "rebuild", "state": "begun", "data": {"site": "center"}},
            {"name": "bring", "state": "begun",
             "data": {"from": "center", "to": "cafe", "substrate": id}},
            {"name": "prepare", "state": "done", "data": {"migration": id, "at": "cafe"}},
            {"name": "send", "state": "begun", "data": {"migration": id, "from": "center"}},
            {"name": "release", "state": "begun", "data": {"at": "center"}},
        ])
    }

    #[test]
    fn steps_of_the_release_before_are_read_and_written_as_they_were() {
        let steps: Vec<Step> = serde_json::from_value(recorded()).expect("read");
        assert!(steps.iter().all(|s| s.what.name().is_some()), "{steps:?}");
        assert_eq!(serde_json::to_value(&steps).expect("written"), recorded());
        // Also from text, which is how they are stored.
        let text = recorded().to_string();
        assert_eq!(serde_json::from_str::<Vec<Step>>(&text).expect("read"), steps);
        all_known(&steps).expect("all known");
        assert!(matches!(move_reached(&steps), MoveReached::Send(_)));
        assert!(matches!(move_reached(&steps[..8]), MoveReached::Prepare(_)));
        assert_eq!(move_reached(&steps[..7]), MoveReached::Nothing);
    }

    #[test]
    fn a_step_of_a_later_release_is_kept_and_named_when_it_matters() {
        for strange in [
            json!({"name": "warm", "state": "begun", "data": {"pages": 7}}),
            json!({"name": "send", "state": "begun", "data": {"migration": "no id"}}),
        ] {
            let step: Step = serde_json::from_str(&strange.to_string()).expect("read");
            assert_eq!(step.what.name(), None);
            assert_eq!(serde_json::to_value(&step).expect("written"), strange);
            let fault = all_known(&[step]).expect_err("unknown");
            let name = strange["name"].as_str().expect("a name");
            assert!(fault.message.contains(&format!("'{name}'")), "{fault:?}");
        }
    }
}
