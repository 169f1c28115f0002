//! What can go wrong in a store.

use std::io;
use std::path::{Path, PathBuf};

use godwit_types::{Code, CodedError, Hash};

/// How a stored unit differs from what was put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// The pack file ends before the unit does, or is not there.
    #[error("the pack file is too short or missing")]
    Missing,
    /// The record's head is not the one that was written.
    #[error("its record head is wrong")]
    Head,
    /// The body cannot be decoded.
    #[error("its body cannot be decoded")]
    Body,
    /// The decoded bytes have another hash.
    #[error("its bytes have another hash")]
    Content,
}

/// A damaged unit and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unit {hash} in pack {pack:08}.pack at offset {offset} is damaged: {damage}")]
pub struct DamagedUnit {
    /// Its name.
    pub hash: Hash,
    /// Number of the pack file.
    pub pack: u32,
    /// Offset of the record in the pack file in bytes.
    pub offset: u64,
    /// What is wrong.
    pub damage: Damage,
}

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A stored unit is not what was put in.
    #[error(transparent)]
    Damaged(Box<DamagedUnit>),
    /// The store does not hold the unit.
    #[error("the store holds no unit {0}")]
    Missing(Hash),
    /// The disk is full, or would be but for the reserve. Nothing was stored.
    #[error("no room in the store at {dir} ({doing})")]
    NoRoom {
        /// The store.
        dir: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the system said, unless the store saw it coming.
        #[source]
        source: Option<io::Error>,
    },
    /// Another process has the store open.
    #[error("the store's index {0} is in use by another process")]
    Busy(PathBuf),
    /// A file could not be read or written.
    #[error("{doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The index failed.
    #[error("{doing} the store's index")]
    Index {
        /// What was being done.
        doing: &'static str,
        /// What the database said.
        #[source]
        source: Box<redb::Error>,
    },
    /// The index is older than what was committed last: part of it is damaged, and the database has
    /// taken what was there before.
    #[error(
        "the index of the store in {dir} is damaged: it has fallen back from commit {wanted} to \
         {found}; nothing was changed. Bring index.redb back from a copy, or remove index.mark to go \
         on without what was stored last (pool check then names what is missing)"
    )]
    FellBack {
        /// The store.
        dir: PathBuf,
        /// The last commit that is known.
        wanted: u64,
        /// The one that is there.
        found: u64,
    },
    /// An index entry that this version cannot have written.
    #[error("the store's index has a malformed entry for {0}")]
    BadEntry(Hash),
    /// A unit of no or too many bytes, or bytes that do not match their hash, were handed in.
    #[error("a unit handed to the store {0}")]
    BadUnit(&'static str),
}

impl StoreError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| {
            if is_full(&source) {
                let dir = path.parent().unwrap_or(&path).to_owned();
                Self::NoRoom { dir, doing, source: Some(source) }
            } else {
                Self::Io { doing, path, source }
            }
        }
    }

    pub(crate) fn damaged(hash: Hash, pack: u32, offset: u64, damage: Damage) -> Self {
        Self::Damaged(Box::new(DamagedUnit { hash, pack, offset, damage }))
    }
}

pub(crate) fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl CodedError for StoreError {
    fn code(&self) -> Code {
        match self {
            Self::Damaged(_) | Self::BadEntry(_) | Self::FellBack { .. } => Code::Damaged,
            Self::Missing(_) => Code::NotFound,
            Self::NoRoom { .. } => Code::NoRoom,
            Self::Busy(_) => Code::Conflict,
            Self::BadUnit(_) => Code::Invalid,
            Self::Index { source, .. } if matches!(**source, redb::Error::Corrupted(_)) => {
                Code::Damaged
            }
            Self::Io { .. } | Self::Index { .. } => Code::Internal,
        }
    }
}
