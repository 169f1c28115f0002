//! What requests between the center and a site, and their replies, are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;

use bytes::Bytes;
use godwit_transfer::Warrant;
use godwit_types::{
    ActivateReport, Arch, DockReport, Generation, Hash, Mib, MigrationId, Name, SubstrateId,
    SubstrateKind, UnixMs, VmId, VmState,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How far one stage of a job is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Name of the stage, e.g. `memory`.
    pub stage: String,
    /// Done so far, in `unit`.
    pub done: u64,
    /// All there is, in `unit`; zero while it is not known.
    pub total: u64,
    /// `bytes`, `pages`, `steps`, ...
    pub unit: String,
    /// More for people, e.g. `known 497 MiB, sent 6.1 MiB`.
    pub note: String,
}

/// What a site has, as it reports it itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SiteReport {
    /// Version of its daemon.
    pub version: String,
    /// How guests are run there: `tcg` or `kvm`.
    pub accel: String,
    /// Version of its QEMU.
    pub qemu: String,
    /// Processors.
    pub cpus: u32,
    /// Memory of the host in MiB.
    pub memory_mib: u64,
    /// Memory not in use in MiB.
    pub memory_free_mib: u64,
    /// Room for RAM files (tmpfs) in MiB.
    pub ram_files_free_mib: u64,
    /// Room for images, substrates and cow files in MiB.
    pub disk_free_mib: u64,
    /// One-minute load average.
    pub load: f64,
    /// Execution environments that run there.
    pub vms: u32,
    /// Substrates whose every page and block is there.
    pub substrates: BTreeSet<SubstrateId>,
    /// Hash of all that it tells of its substrates; while it is the same, nobody need ask.
    #[serde(default)]
    pub holdings: Option<Hash>,
    /// Hash of all that it tells of its machines; likewise.
    #[serde(default)]
    pub machines: Option<Hash>,
    /// Substrates of which something was found damaged there, and what; a few of them.
    #[serde(default)]
    pub damaged: BTreeMap<SubstrateId, String>,
    /// Images that are there.
    pub images: BTreeSet<Name>,
    /// Round trip from the center in milliseconds, once measured.
    pub rtt_ms: Option<f64>,
    /// Memory that its machines are promised, in MiB: all that they may come to write to.
    #[serde(default)]
    pub memory_promised_mib: u64,
    /// Memory that they may be promised in all, in MiB; 0 when it does not say.
    #[serde(default)]
    pub memory_promise_mib: u64,
}

/// A guest image at a site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageInfo {
    /// Its name.
    pub name: Name,
    /// Content hash of all of it.
    pub hash: Hash,
    /// Guest architecture.
    pub arch: Arch,
    /// Memory that a machine of it gets.
    pub memory: Mib,
    /// vCPUs that a machine of it gets.
    pub vcpus: u8,
    /// Bytes of kernel, initrd and disk.
    pub bytes: u64,
    /// It shows a screen.
    pub display: bool,
    /// The program that it starts, if any.
    pub app: Option<String>,
    /// It is built; otherwise only its recipe is known.
    pub built: bool,
    /// Why what is there under its name cannot be used, if that is so.
    pub fault: Option<String>,
}

/// What a machine is made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Origin {
    /// Cold boot.
    Image(Name),
    /// Activation.
    Substrate(SubstrateId),
    /// Cold boot of the disk that a substrate stores.
    StoredDisk(SubstrateId),
}

/// A machine to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewMachine {
    /// Its id.
    pub vm: VmId,
    /// Its name, which becomes its host name.
    pub name: Name,
    /// Its generation.
    pub generation: Generation,
    /// The center's word that it may run at this site.
    pub warrant: Warrant,
    /// What from.
    pub origin: Origin,
    /// Memory, if not the image's own (cold boot only).
    pub memory: Option<Mib>,
    /// vCPUs, if not the image's own (cold boot only).
    pub vcpus: Option<u8>,
    /// The content that the substrate must have (activation only).
    pub content: Option<Hash>,
}

/// The generation of a machine whose record at its site is damaged; no machine has it.
pub const UNKNOWN_GENERATION: Generation = Generation(0);

/// A machine at a site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Its id.
    pub vm: VmId,
    /// Its name.
    pub name: Name,
    /// Its generation, as this site knows it.
    pub generation: Generation,
    /// The center's word that it may run at this site; none in what the center sends, and none of a
    /// machine from before there were any.
    pub warrant: Option<Warrant>,
    /// Running, stopped, failed, ...; `Moving` for one that is on its way in or out.
    pub state: VmState,
    /// The image below it.
    pub image: Name,
    /// Guest architecture.
    pub arch: Arch,
    /// Guest memory.
    pub memory: Mib,
    /// vCPUs.
    pub vcpus: u8,
    /// Why it is in this state, when that needs words.
    pub reason: Option<String>,
    /// What its activation took, in the answer to the request that activated it.
    pub activate: Option<ActivateReport>,
}

/// A substrate at a site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SubstrateInfo {
    /// Its id.
    pub id: SubstrateId,
    /// Its name.
    pub name: Name,
    /// Who may use it.
    pub kind: SubstrateKind,
    /// Whose it is.
    pub owner: Name,
    /// The image below it.
    pub image: Name,
    /// Guest architecture.
    pub arch: Arch,
    /// Guest memory.
    pub memory: Mib,
    /// vCPUs.
    pub vcpus: u8,
    /// Bytes of memory and disk in the clear.
    pub raw_bytes: u64,
    /// Bytes as stored.
    pub stored_bytes: u64,
    /// When it was docked.
    pub created: UnixMs,
    /// The hash of all that it is.
    pub content: Hash,
    /// What docking took, in the answer to the request that docked it.
    pub dock: Option<DockReport>,
}

/// A destination that waits for a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Incoming {
    /// The migration.
    pub migration: MigrationId,
    /// Where its relay listens; unspecified when nobody can reach it ([`Incoming::dials`]).
    pub address: SocketAddr,
    /// The site's name, as in the relay's certificate.
    pub peer: Name,
}

/// What an end of a migration can say of the machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryStatus {
    /// All of it is at the destination.
    Whole,
    /// Pages are missing at the destination; the source can still give them.
    Partial,
    /// This end's QEMU is gone, or can give and take pages no more.
    Gone,
    /// As [`MemoryStatus::Gone`], at a destination that was asked `MigrateFell`: it is written down
    /// that the machine, which had not all of its memory, never runs there again under its
    /// generation. A center that does not speak that hears [`MemoryStatus::Gone`].
    Fell,
}

/// How far a migration has come at one of its ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveStatus {
    /// The memory.
    pub memory: MemoryStatus,
    /// Destination: pages of guest memory that are not there.
    pub missing_pages: u64,
    /// Destination: blocks of the disk that are not there; `None` when it was never told which
    /// there are.
    pub missing_blocks: Option<u64>,
    /// Destination: the machine has run here.
    pub runs: bool,
    /// The migration is over at this end.
    pub over: bool,
    /// What happened to a QEMU that is gone.
    pub why: Option<String>,
}

/// How a machine ended at a destination that had not all of its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fell {
    /// How its QEMU ended.
    pub why: String,
    /// Milliseconds from its first instant there until it was found dead, where both are known.
    pub ran_ms: Option<u64>,
}

/// What became of a machine that its source was asked to take back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TookBack {
    /// It runs there under the generation that was asked, or has run.
    Runs,
    /// Its QEMU there is gone: it never runs there as it left, but from its disk.
    Never {
        /// How its QEMU ended.
        why: String,
    },
}

/// The last part of a console's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConsoleTail {
    /// The text; bytes that are no UTF-8 are replaced.
    pub text: String,
    /// Bytes that the whole log has.
    pub bytes: u64,
}

/// A program for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestProgram {
    /// Its path in the guest.
    pub path: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its standard input.
    pub input: Bytes,
}

/// What a program in a guest did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestOutput {
    /// Its exit code; none when a signal ended it.
    pub exit: Option<i64>,
    /// The signal that ended it.
    pub signal: Option<i64>,
    /// What it printed.
    pub stdout: Bytes,
    /// What it printed as errors.
    pub stderr: Bytes,
    /// There was more of one of them than the guest's agent keeps.
    pub truncated: bool,
}

/// What is known of a program that was started in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestExec {
    /// It still runs.
    Runs,
    /// It has ended.
    Ended(GuestOutput),
    /// The guest's agent does not know it, or has told its result before.
    Unknown,
}

/// A site's pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolReport {
    /// Substrates.
    pub substrates: u64,
    /// Pages and blocks held.
    pub units: u64,
    /// Bytes in the clear, every reference counted.
    pub raw_bytes: u64,
    /// Bytes on disk.
    pub stored_bytes: u64,
    /// Bytes that the memory tier holds.
    pub memory_bytes: u64,
    /// Bytes of tmpfs that sealed memory takes.
    pub sealed_bytes: u64,
    /// Bytes that it may take before what no machine maps is dropped.
    pub sealed_limit_bytes: u64,
    /// Room left on disk in bytes.
    pub free_bytes: u64,
    /// QEMUs that wait for a substrate.
    pub waiting: u64,
}

/// What a check of a pool found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckReport {
    /// Pages and blocks that were read and compared with their hashes.
    pub units: u64,
    /// What is damaged, each named by hash or substrate.
    pub damaged: Vec<String>,
}

/// A byte stream that the center opens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamRequest {
    /// The serial console, both ways, from now on.
    Console {
        /// The machine.
        vm: VmId,
    },
    /// The display (RFB), both ways.
    Display {
        /// The machine.
        vm: VmId,
    },
    /// A substrate to read, in the frames of `site/frames.rs`.
    SubstrateExport {
        /// Which.
        id: SubstrateId,
    },
    /// A substrate for another site that asks for the units it lacks: read in the frames of
    /// `site/frames.rs`, written [`godwit_substrate::TakerMsg`]s.
    SubstrateSupply {
        /// Which.
        id: SubstrateId,
    },
    /// A substrate from another site: read [`godwit_substrate::TakerMsg`]s and after the last of
    /// them the verdict as JSON, written the parts of `site/frames.rs`.
    SubstrateTake {
        /// The content that it must have, unless any will do.
        content: Option<Hash>,
    },
    /// A substrate to write; ends with one [`SiteEvent`] from the site after the last byte.
    SubstrateImport {
        /// Its name here, if not its own.
        name: Option<Name>,
        /// The content that it must have, unless any will do.
        content: Option<Hash>,
    },
    /// As [`StreamRequest::SubstrateImport`], of a file that a user brings: a substrate of its own.
    SubstrateUpload(Upload),
    /// As [`StreamRequest::SubstrateTake`]; units that the substrate names are taken from those of
    /// some substrates alone.
    SubstrateTakeAmong(TakeAmong),
}

/// What comes from another site, and what it may refer to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeAmong {
    /// The content that it must have, unless any will do.
    pub content: Option<Hash>,
    /// Units that are here already count as here if they belong to one of these substrates, which
    /// whoever has the new one may read; all others must come. So a supplier cannot have a machine
    /// made of somebody else's pages by naming their hashes.
    pub among: Vec<SubstrateId>,
}

/// What a user's file becomes, and what it may refer to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// Its name at the site.
    pub name: Name,
    /// Its id.
    pub id: SubstrateId,
    /// Whose it is.
    pub owner: Name,
    /// Pages and blocks that it only names are taken from these substrates alone: to name
    /// somebody else's is no way to read them.
    pub among: Vec<SubstrateId>,
}

impl StreamRequest {
    /// What it is called in messages.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Console { .. } => "console stream",
            Self::Display { .. } => "display stream",
            Self::SubstrateExport { .. } => "substrate export",
            Self::SubstrateSupply { .. } => "substrate supply",
            Self::SubstrateTake { .. } => "substrate take",
            Self::SubstrateTakeAmong(_) => "substrate take among",
            Self::SubstrateImport { .. } => "substrate import",
            Self::SubstrateUpload(_) => "substrate upload",
        }
    }

    /// The first version of the protocol that has it.
    #[must_use]
    pub const fn since(&self) -> u16 {
        match self {
            Self::Console { .. }
            | Self::Display { .. }
            | Self::SubstrateExport { .. }
            | Self::SubstrateSupply { .. }
            | Self::SubstrateTake { .. }
            | Self::SubstrateImport { .. } => 1,
            Self::SubstrateUpload(_) => 2,
            Self::SubstrateTakeAmong(_) => 3,
        }
    }
}

/// What a site tells while it works on a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum News {
    /// How far it is. The next one says more, so one may be dropped.
    Progress(Progress),
    /// A source: the destination runs the machine under this generation. This is the commit point
    /// of a move; it is never dropped.
    Switched {
        /// The generation that the machine left under; [`UNKNOWN_GENERATION`] where a daemon of
        /// before did not write it down.
        generation: Generation,
    },
    /// A source that lost its destination during the switch asks what became of it. Never dropped.
    Uncertain,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(n) => write!(f, "image {n}"),
            Self::Substrate(s) => write!(f, "substrate {s}"),
            Self::StoredDisk(s) => write!(f, "the disk of substrate {s}"),
        }
    }
}
