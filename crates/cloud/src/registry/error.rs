//! What can go wrong with the registry.

use std::path::PathBuf;
use std::sync::Arc;

use godwit_types::Fault;
use godwit_types::{Code, CodedError, Generation, Hash, Name};

/// Why the registry refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The file cannot be used.
    #[error("opening the registry {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<redb::Error>,
    },
    /// The file was written by a version with another layout.
    #[error(
        "the registry has format {found}, this version knows formats 1 to 4; run the version that \
         wrote it, or bring back a copy from before"
    )]
    Format {
        /// What the file says.
        found: String,
    },
    /// The file lacks what was written last.
    #[error(
        "the registry {path} is damaged: it has fallen back from transaction {wanted} to {found}; \
         nothing was changed"
    )]
    FellBack {
        /// The file.
        path: PathBuf,
        /// The last transaction that is known.
        wanted: u64,
        /// The one that is there.
        found: u64,
    },
    /// The database failed.
    #[error("reading or writing the registry")]
    Database(#[source] Arc<redb::Error>),
    /// A value does not parse.
    #[error("the registry's entry '{key}' is damaged")]
    Damaged {
        /// Its key.
        key: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// No such object.
    #[error("no {what} '{key}'")]
    NotFound {
        /// Kind of object.
        what: &'static str,
        /// Its name or id.
        key: String,
    },
    /// The name is taken.
    #[error("{what} '{key}' exists already")]
    Exists {
        /// Kind of object.
        what: &'static str,
        /// Its name.
        key: String,
    },
    /// An older generation tried to act.
    #[error("machine '{name}' is at generation {current}; generation {given} may no longer act")]
    Fenced {
        /// The machine.
        name: Name,
        /// What the registry has.
        current: Generation,
        /// What the caller had.
        given: Generation,
    },
    /// The state table forbids it.
    #[error(transparent)]
    Transition(#[from] godwit_types::InvalidTransition),
    /// The object is in use.
    #[error("{0}")]
    Busy(String),
    /// The tenant has no room for it.
    #[error("tenant '{tenant}' has {used} {what} and may have {limit}")]
    OverQuota {
        /// Whose quota.
        tenant: Name,
        /// What it counts.
        what: &'static str,
        /// What there is of it.
        used: u64,
        /// The most there may be.
        limit: u64,
    },
    /// All addresses of a network are taken.
    #[error("network '{network}' has no address left in {prefix}")]
    NoAddress {
        /// The network.
        network: Name,
        /// Its addresses.
        prefix: String,
    },
    /// A site holds something else under a substrate's id.
    #[error("site '{site}' holds {found} under the id of substrate '{name}', which is {wanted}")]
    OtherContent {
        /// The site.
        site: Name,
        /// The substrate.
        name: Name,
        /// The content that its id stands for.
        wanted: Hash,
        /// What the site has.
        found: Hash,
    },
    /// The site is no longer trusted.
    #[error("site '{0}' was revoked")]
    Revoked(Name),
}

impl RegistryError {
    /// There is no such thing; `key` may be anything.
    pub(crate) fn not_found(what: &'static str, key: &str) -> Self {
        Self::NotFound { what, key: super::shown(key) }
    }
}

impl CodedError for RegistryError {
    fn code(&self) -> Code {
        match self {
            Self::Open { source, .. } if is_full(source) => Code::NoRoom,
            Self::Database(source) if is_full(source) => Code::NoRoom,
            Self::Open { source, .. } if is_corrupt(source) => Code::Damaged,
            Self::Database(source) if is_corrupt(source) => Code::Damaged,
            Self::Open { .. } | Self::Database(_) => Code::Internal,
            Self::Format { .. }
            | Self::Damaged { .. }
            | Self::FellBack { .. }
            | Self::OtherContent { .. } => Code::Damaged,
            Self::OverQuota { .. } | Self::NoAddress { .. } => Code::NoRoom,
            Self::NotFound { .. } => Code::NotFound,
            Self::Exists { .. } => Code::Exists,
            Self::Fenced { .. } => Code::Fenced,
            Self::Transition(_) | Self::Busy(_) => Code::Conflict,
            Self::Revoked(_) => Code::Unauthenticated,
        }
    }
}

fn is_full(e: &redb::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(e, redb::Error::Io(e) if matches!(e.kind(), StorageFull | QuotaExceeded))
}

fn is_corrupt(e: &redb::Error) -> bool {
    matches!(e, redb::Error::Corrupted(_))
}

macro_rules! from_redb {
    ($($t:ty),+) => { $(
        impl From<$t> for RegistryError {
            fn from(e: $t) -> Self { Self::Database(Arc::new(e.into())) }
        }
    )+ };
}
from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);

impl RegistryError {
    /// The same failure for another whose change was in the same transaction.
    pub(super) fn again(&self) -> Self {
        match self {
            Self::Database(e) => Self::Database(e.clone()),
            _ => Self::Database(Arc::new(redb::Error::PreviousIo)),
        }
    }
}

/// A failure of the registry as it is told to whoever asked.
pub(crate) fn registry_fault(e: RegistryError) -> Fault {
    let fault = Fault::of(&e);
    match e {
        RegistryError::NotFound { what: "machine", .. } => {
            fault.hint("see the machines with: godwit vm list")
        }
        RegistryError::NotFound { what: "substrate", .. } => {
            fault.hint("see the substrates with: godwit substrate list")
        }
        RegistryError::NotFound { what: "site", .. } => {
            fault.hint("see the sites with: godwit site list")
        }
        RegistryError::NotFound { what: "user", .. } => {
            fault.hint("see the users with: godwit user list")
        }
        RegistryError::NotFound { what: "tenant", .. } => {
            fault.hint("see the tenants with: godwit tenant list")
        }
        RegistryError::NotFound { what: "network", .. } => {
            fault.hint("see the networks with: godwit network list")
        }
        RegistryError::NoAddress { .. } => fault.hint(
            "delete machines that are in it, or make another: godwit network create NAME --prefix P",
        ),
        RegistryError::NotFound { what: "token", .. } => {
            fault.hint("see the tokens with: godwit token list")
        }
        RegistryError::OverQuota { .. } => {
            fault.hint("see the quota with: godwit quota get; an operator sets it")
        }
        _ if fault.code == Code::NoRoom => {
            fault.hint("make room on the file system of the center's data directory")
        }
        _ => fault,
    }
}
