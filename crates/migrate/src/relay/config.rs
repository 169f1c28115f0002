//! What a relay process is told at its start.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use godwit_transfer::Revocations;
use godwit_types::{Generation, Hash, MigrationId, Name};
use serde::{Deserialize, Serialize};

use super::known::KnownMemory;
use super::{Given, RelayError, Visit};

/// The largest configuration file in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Which end of the migration a relay serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RelayRole {
    /// QEMU migrates into this relay.
    Source,
    /// This relay feeds a waiting QEMU.
    Destination,
}

/// How a relay comes to its link with the other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Meeting {
    /// The other relay listens there.
    Dial(SocketAddr),
    /// Listens there until the other one comes, or until it is told to dial
    /// ([`super::RelayCommand::Dial`]); port 0 lets the system choose (see
    /// [`super::RelayStatus::listening`]).
    Listen(SocketAddr),
}

/// Configuration of one relay process (JSON).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayConfig {
    /// Which end.
    pub role: RelayRole,
    /// How it meets the other one.
    pub meeting: Meeting,
    /// Which migration; both relays must have the same.
    pub migration: MigrationId,
    /// The generation that the machine has at the destination; both relays must have the same.
    pub generation: Generation,
    /// Site at the other end, as its certificate must name it.
    pub peer: Name,
    /// Directory of this site's identity.
    pub keys: PathBuf,
    /// Certificates that are no longer good.
    #[serde(default)]
    pub revoked: Revocations,
    /// Where the daemon keeps the newest list of them; read again while the relay works.
    #[serde(default)]
    pub revoked_file: Option<PathBuf>,
    /// Milliseconds of silence after which the link is given up
    /// ([`godwit_transfer::EndpointOptions::max_idle`]).
    #[serde(default = "usual_patience")]
    pub link_patience_ms: u64,
    /// Unix socket on which the daemon steers the relay; made by the relay, mode 0600.
    pub control: PathBuf,
    /// Unix socket of QEMU: made by the relay at the source, by QEMU at the destination.
    pub qemu: PathBuf,
    /// Whether the migration goes on after a break.
    #[serde(default)]
    pub resume: bool,
    /// Whether memory moves; after a break it may be at the destination already, and the disk not.
    #[serde(default = "memory_moves")]
    pub memory: bool,
    /// The disk, when the machine has one.
    #[serde(default)]
    pub disk: Option<RelayDisk>,
    /// Memory that the other site holds as well, most of which the machine may still have; not for a
    /// migration that goes on after a break.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<HeldMemory>,
    /// An earlier visit of the machine to the destination: its marks at the source, its memory at the
    /// destination ([`Given::visit`], and under it [`Given::sealed`]); as `held`, not after a break.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visit: Option<Visit>,
    /// At the source, where its QEMU has the memory of a machine that is a private copy of sealed memory:
    /// its own pages can be told from the others. What is held is that sealed memory then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<OwnMemory>,
    /// What the relay inherits open, in place of opening or making it.
    #[serde(default)]
    pub given: Option<Given>,
}

/// Where a QEMU has the memory of a machine. What it is read from is given open
/// ([`Given::memory`], [`Given::pagemap`], [`Given::sealed`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnMemory {
    /// Address of the machine's memory in that process.
    pub address: u64,
    /// Bytes of it.
    pub bytes: u64,
    /// The other blocks, each with its address and its bytes.
    pub blocks: Vec<(String, u64, u64)>,
}

/// A memory image that both sites hold. It is used where both name the same content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldMemory {
    /// What is in it: the content of its substrate.
    pub content: Hash,
    /// The file, with page `n` of the machine's memory at `n` times 4096; only for messages where it
    /// is given open.
    pub path: PathBuf,
}

/// The disk of the machine as a relay needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "end")]
pub enum RelayDisk {
    /// The frozen chain; opened when the machine stands still.
    Source {
        /// The base image, which both sites hold.
        base: PathBuf,
        /// Where the base image's blocks are indexed ([`godwit_disk::BlockIndex`]), if they are.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        index: Option<PathBuf>,
        /// The layers above it, lowest first: everything that is post-copied.
        layers: Vec<PathBuf>,
    },
    /// Where blocks arrive.
    Destination {
        /// The base image, which both sites hold.
        base: PathBuf,
        /// The layer that the relay fills.
        mid: PathBuf,
        /// Bytes of the disk.
        bytes: u64,
        /// Unix socket of the block device that QEMU has as node `remote`.
        nbd: PathBuf,
        /// Unix socket on which QEMU tells what its guest has overwritten; made by QEMU once all
        /// of memory is there ([`godwit_qemu::Machine::offer_written`]).
        written: PathBuf,
    },
}

const fn usual_patience() -> u64 {
    godwit_transfer::PATIENCE.as_millis() as u64
}

const fn memory_moves() -> bool {
    true
}

impl RelayConfig {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`RelayError::ReadConfig`], [`RelayError::Config`].
    pub fn load(path: &Path) -> Result<Self, RelayError> {
        let read = |source| RelayError::ReadConfig { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_CONFIG {
            return Err(read(std::io::Error::other("it is larger than 1 MiB")));
        }
        Self::parse(&std::fs::read(path).map_err(read)?, path)
    }

    /// As [`RelayConfig::load`], of a configuration that `from` gives and that is called `path`.
    ///
    /// # Errors
    /// As there.
    pub fn read(from: impl std::io::Read, path: &Path) -> Result<Self, RelayError> {
        let read = |source| RelayError::ReadConfig { path: path.to_owned(), source };
        let mut text = Vec::new();
        from.take(MAX_CONFIG + 1).read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_CONFIG {
            return Err(read(std::io::Error::other("it is larger than 1 MiB")));
        }
        Self::parse(&text, path)
    }

    fn parse(text: &[u8], path: &Path) -> Result<Self, RelayError> {
        let config: Self = serde_json::from_slice(text)
            .map_err(|source| RelayError::Config { path: path.to_owned(), source })?;
        config.check()?;
        Ok(config)
    }

    /// Opens the memory that both sites hold, or takes it as it was `given` open.
    pub(super) fn held_memory(
        &self,
        given: Option<std::fs::File>,
    ) -> Result<Option<(Hash, KnownMemory)>, RelayError> {
        let Some(held) = &self.held else { return Ok(None) };
        let path = || held.path.clone();
        let open = || given.map_or_else(|| std::fs::File::open(&held.path), Ok);
        open()
            .and_then(KnownMemory::new)
            .map(|memory| Some((held.content, memory)))
            .map_err(|source| RelayError::Held { path: path(), source })
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`RelayError::Contradiction`].
    pub fn check(&self) -> Result<(), RelayError> {
        let fits = matches!(
            (&self.role, &self.disk),
            (_, None)
                | (RelayRole::Source, Some(RelayDisk::Source { .. }))
                | (RelayRole::Destination, Some(RelayDisk::Destination { .. }))
        );
        if (self.held.is_some() || self.visit.is_some()) && self.resume {
            Err(RelayError::Contradiction("what goes on after a break refers to no held memory"))
        } else if !self.memory && !self.resume {
            Err(RelayError::Contradiction("memory is left out of a migration that just begins"))
        } else if !(1_000..=3_600_000).contains(&self.link_patience_ms) {
            Err(RelayError::Contradiction("the link's patience is not between 1 s and an hour"))
        } else if fits {
            Ok(())
        } else {
            Err(RelayError::Contradiction("the disk belongs to the other end"))
        }
    }
}
