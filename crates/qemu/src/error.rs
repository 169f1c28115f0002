//! Why a machine could not be started or did not do what was asked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_types::{Code, CodedError};

use crate::agent::AgentError;
use crate::machine::Refused;
use crate::process::Exit;
use crate::qmp::{QmpError, WaitError};
use crate::spec::SpecError;

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// The spec is no machine.
    #[error("the machine cannot be built")]
    Spec(#[from] SpecError),
    /// The launch does not fit the spec, or a path cannot be used.
    #[error("launching {name}: {why}")]
    Launch {
        /// The machine.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// A file or a directory.
    #[error("{doing} {}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// QEMU could not be executed.
    #[error("starting {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// QEMU ended.
    #[error("QEMU of {name} ended: {exit}")]
    Exited {
        /// The machine.
        name: String,
        /// How.
        exit: Exit,
    },
    /// The life cycle does not allow it.
    #[error("the machine refuses")]
    Refused(#[from] Refused),
    /// QMP.
    #[error("driving QEMU")]
    Qmp(#[from] QmpError),
    /// A migration, a save or a load ended otherwise than wanted.
    #[error("{doing}: QEMU reports '{status}'{}", reason.as_ref().map(|r| format!(" ({r})")).unwrap_or_default())]
    Migration {
        /// What was being done.
        doing: &'static str,
        /// The status that came.
        status: String,
        /// QEMU's words.
        reason: Option<String>,
    },
    /// It took too long.
    #[error("{doing} did not end within {within:?}")]
    TimedOut {
        /// What was being done.
        doing: &'static str,
        /// The time it had.
        within: Duration,
    },
    /// There is no machine to adopt.
    #[error("no running machine in {}", run_dir.display())]
    NotRunning {
        /// Where it should be.
        run_dir: PathBuf,
    },
    /// The guest agent.
    #[error("talking to the guest agent")]
    Agent(#[from] AgentError),
    /// A text that cannot be typed.
    #[error("typing")]
    Typing(#[from] crate::keys::UnknownCharacter),
    /// An answer or a file of another form than expected.
    #[error("{what} is not as expected: {why}")]
    Unexpected {
        /// What.
        what: &'static str,
        /// How it differs.
        why: String,
    },
}

/// What the system says of a full file system; QEMU passes it on as text.
const FULL: &str = "No space left on device";

impl QemuError {
    pub(crate) fn file(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { doing, path: path.to_owned(), source }
    }
}

impl From<WaitError> for QemuError {
    fn from(e: WaitError) -> Self {
        Self::Qmp(e.into())
    }
}

impl CodedError for QemuError {
    fn code(&self) -> Code {
        match self {
            Self::Spec(_) | Self::Launch { .. } | Self::Typing(_) => Code::Invalid,
            Self::File { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => Code::NotFound,
                std::io::ErrorKind::StorageFull => Code::NoRoom,
                _ => Code::Internal,
            },
            Self::Start { .. } | Self::Exited { .. } => Code::Unavailable,
            Self::Refused(e) => e.code(),
            Self::Qmp(e) => e.code(),
            Self::Agent(e) => e.code(),
            Self::Migration { reason: Some(why), .. } if why.contains(FULL) => Code::NoRoom,
            Self::Migration { .. } => Code::Unavailable,
            Self::TimedOut { .. } => Code::TimedOut,
            Self::NotRunning { .. } => Code::NotFound,
            Self::Unexpected { .. } => Code::Internal,
        }
    }
}
