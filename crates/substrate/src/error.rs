//! What can go wrong between a machine and its substrate.

use std::io;
use std::path::{Path, PathBuf};

use godwit_disk::DiskError;
use godwit_qemu::{AgentError, ManifestMismatch, QemuError};
use godwit_store::{PageMapError, StoreError};
use godwit_types::{Code, CodedError, Hash, Name, SubstrateId, human_bytes};

/// A failure to dock, keep or activate.
#[derive(Debug, thiserror::Error)]
pub enum SubstrateError {
    /// The pool has no such substrate.
    #[error("the pool has no substrate {0}")]
    NotFound(String),
    /// A substrate of this name or id is in the pool already.
    #[error("the pool has a substrate {0} already")]
    Exists(String),
    /// Clones need the substrate.
    #[error("substrate {id} is in use by {clones} machine(s); delete or dock them first")]
    InUse {
        /// The substrate.
        id: SubstrateId,
        /// Machines that run from it.
        clones: usize,
    },
    /// The image that the substrate stands on is another one.
    #[error("substrate {name} stands on image {wanted}, but {found} was given")]
    WrongImage {
        /// The substrate.
        name: Name,
        /// The image it was made with.
        wanted: Hash,
        /// The image at hand.
        found: Hash,
    },
    /// The machine here would have another shape than the one that was docked.
    #[error("substrate {name} does not fit here")]
    Shape {
        /// The substrate.
        name: Name,
        /// The first difference.
        #[source]
        source: Box<ManifestMismatch>,
    },
    /// Something of one substrate is damaged or missing.
    #[error("substrate '{name}'")]
    In {
        /// The substrate.
        name: Name,
        /// What it is.
        #[source]
        source: Box<SubstrateError>,
    },
    /// What came under the id of a substrate is not that substrate.
    #[error("substrate '{name}' has the content {found}, and {wanted} is what was registered")]
    OtherContent {
        /// The substrate.
        name: Name,
        /// The content that its id stands for.
        wanted: Hash,
        /// The content that was found.
        found: Hash,
    },
    /// A file of a substrate or an archive is not what it should be.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// The file, or the part of an archive.
        what: String,
        /// How it differs.
        why: String,
    },
    /// A page map is not what it should be.
    #[error("the page map of {what} cannot be used")]
    Pages {
        /// Of what.
        what: String,
        /// Why.
        #[source]
        source: PageMapError,
    },
    /// The pool's own limit, or a file system's.
    #[error("no room {place}: {} needed, {} free", human_bytes(*.needed_bytes), human_bytes(*.free_bytes))]
    NoRoom {
        /// For what and where.
        place: String,
        /// Bytes needed.
        needed_bytes: u64,
        /// Bytes there are.
        free_bytes: u64,
    },
    /// The stream on which a substrate came or went ended early.
    #[error("the stream broke off")]
    BrokeOff(#[source] io::Error),
    /// The guest agent does not answer, so that the machine cannot be brought to rest.
    #[error("the guest agent of the machine does not answer; it runs on undocked")]
    AgentSilent(#[source] Box<AgentError>),
    /// The guest's identity could not be taken from it.
    #[error(
        "the machine cannot be generalised, as a public substrate's must be; dock it as restricted, \
         or mend what its guest says"
    )]
    NotGeneralised(#[source] Box<SubstrateError>),
    /// A script in the guest failed.
    #[error("{script} in the guest failed ({how}): {output}")]
    Script {
        /// Its path.
        script: &'static str,
        /// Its end.
        how: String,
        /// The end of what it wrote, at most 400 characters.
        output: String,
    },
    /// The machine.
    #[error("{doing}")]
    Machine {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: Box<QemuError>,
    },
    /// The saved devices of the machine could not be made a state.
    #[error("putting the saved state together")]
    Stream(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store.
    #[error("{doing}")]
    Store {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: Box<StoreError>,
    },
    /// The disk.
    #[error("{doing}")]
    Disk {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: Box<DiskError>,
    },
    /// A file.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Stopped on request, before the commit.
    #[error("stopped on request")]
    Cancelled,
    /// The machine was not docked, and does not run on as before yet: [`crate::run_on`] is to be
    /// called again.
    #[error("{why}; and the machine does not run on as before yet")]
    NotRunningOn {
        /// Why it was not docked.
        why: Box<SubstrateError>,
        /// What keeps it from running on.
        #[source]
        source: Box<SubstrateError>,
    },
    /// A worker thread ended by a panic.
    #[error("a worker ended early while {0}")]
    Worker(&'static str),
}

impl SubstrateError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn store(doing: &'static str) -> impl FnOnce(StoreError) -> Self {
        move |source| Self::Store { doing, source: Box::new(source) }
    }

    pub(crate) fn disk(doing: &'static str) -> impl FnOnce(DiskError) -> Self {
        move |source| Self::Disk { doing, source: Box::new(source) }
    }

    pub(crate) fn machine(doing: &'static str) -> impl FnOnce(QemuError) -> Self {
        move |source| Self::Machine { doing, source: Box::new(source) }
    }

    /// The same failure, said of the substrate `name`, unless it says so already.
    pub(crate) fn of(self, name: &Name) -> Self {
        match self {
            Self::In { .. }
            | Self::NotFound(_)
            | Self::Exists(_)
            | Self::InUse { .. }
            | Self::WrongImage { .. }
            | Self::OtherContent { .. }
            | Self::Shape { .. } => self,
            other => Self::In { name: name.clone(), source: Box::new(other) },
        }
    }

    pub(crate) fn damaged(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Damaged { what: what.into(), why: why.into() }
    }
}

impl From<StoreError> for SubstrateError {
    fn from(source: StoreError) -> Self {
        Self::Store { doing: "reading units from the store", source: Box::new(source) }
    }
}

impl CodedError for SubstrateError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::Exists(_) => Code::Exists,
            Self::InUse { .. } | Self::WrongImage { .. } | Self::Shape { .. } => Code::Conflict,
            Self::Damaged { .. } | Self::Stream(_) | Self::OtherContent { .. } => Code::Damaged,
            // A unit or a file that a substrate lacks is damage to it.
            Self::In { source, .. } if source.code() == Code::NotFound => Code::Damaged,
            Self::In { source, .. } => source.code(),
            Self::Pages { source, .. } => source.code(),
            Self::NoRoom { .. } => Code::NoRoom,
            Self::AgentSilent(_) | Self::BrokeOff(_) => Code::Unavailable,
            Self::Script { .. } | Self::Worker(_) => Code::Internal,
            Self::Cancelled => Code::Cancelled,
            Self::NotGeneralised(_) => Code::Conflict,
            Self::NotRunningOn { why, .. } => why.code(),
            Self::Machine { source, .. } => source.code(),
            Self::Store { source, .. } => source.code(),
            Self::Disk { source, .. } => source.code(),
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::NoRoom,
                io::ErrorKind::NotFound => Code::NotFound,
                _ => Code::Internal,
            },
        }
    }
}

/// `error` and its sources, joined by `: `.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
