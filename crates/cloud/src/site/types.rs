//! What the center asks of a site, and the answers.

use std::fmt;
use std::net::SocketAddr;

use bytes::Bytes;
use godwit_transfer::{Revocations, Warrant};
use godwit_types::{
    ActivateReport, Arch, DockReport, Generation, Hash, Mib, MigrationId, Name, SubstrateId,
    SubstrateKind, VmId, VmState,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::clock::UnixMs;
use crate::error::Fault;
use crate::ops::Progress;
use crate::registry::SiteReport;

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
    /// Where its relay listens.
    pub address: SocketAddr,
    /// The site's name, as in the relay's certificate.
    pub peer: Name,
}

/// What an end of a migration can say of the machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryStand {
    /// All of it is at the destination.
    Whole,
    /// Pages are missing at the destination; the source can still give them.
    Partial,
    /// This end's QEMU is gone, or can give and take pages no more.
    Gone,
}

/// How far a migration has come at one of its ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveStand {
    /// The memory.
    pub memory: MemoryStand,
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

/// What the center asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SiteRequest {
    /// Resources and holdings.
    Report,
    /// Images.
    Images,
    /// Builds an image from its recipe.
    ImageBuild {
        /// Which.
        name: Name,
    },
    /// Machines.
    Machines,
    /// Makes and starts a machine.
    VmNew(NewMachine),
    /// Starts a stopped machine from its disk.
    VmStart {
        /// Which.
        vm: VmId,
        /// Its new generation.
        generation: Generation,
        /// The center's word for that.
        warrant: Warrant,
    },
    /// Powers a machine off; its disk is kept.
    VmStop {
        /// Which.
        vm: VmId,
        /// Its generation.
        generation: Generation,
        /// Without asking the guest.
        force: bool,
    },
    /// Ends a machine and removes all it has.
    VmDelete {
        /// Which.
        vm: VmId,
        /// Its generation.
        generation: Generation,
    },
    /// Turns a machine into a substrate.
    VmDock {
        /// Which.
        vm: VmId,
        /// Its generation.
        generation: Generation,
        /// Id of the substrate.
        substrate: SubstrateId,
        /// Name of the substrate.
        name: Name,
        /// Who may use it.
        kind: SubstrateKind,
        /// Whose it is.
        owner: Name,
    },
    /// The end of its serial console's log.
    VmConsole {
        /// Which.
        vm: VmId,
        /// At most so many bytes.
        max_bytes: u32,
    },
    /// Its screen as PNG.
    VmScreenshot {
        /// Which.
        vm: VmId,
    },
    /// Types into its keyboard.
    VmType {
        /// Which.
        vm: VmId,
        /// What.
        text: String,
    },
    /// Starts a program in the guest, by its agent.
    VmExec {
        /// Which.
        vm: VmId,
        /// What.
        program: GuestProgram,
    },
    /// Waits until a program that `VmExec` started has ended. The guest tells that once.
    VmExecWait {
        /// Which.
        vm: VmId,
        /// The program's process in the guest.
        pid: u64,
        /// Milliseconds to wait, at most.
        within_ms: u32,
    },
    /// Makes ready for a machine that is to come.
    MigratePrepare {
        /// The migration.
        migration: MigrationId,
        /// The machine, as the source has it.
        machine: MachineStatus,
        /// Its generation here.
        generation: Generation,
        /// The center's word that it may run here.
        warrant: Warrant,
        /// The site it comes from, as in its certificate.
        from: Name,
        /// What the migrate rooms of both sites must agree on, opaque to the center.
        manifest: Vec<u8>,
    },
    /// What a destination must know of a machine to make ready for it.
    MigrateManifest {
        /// The machine.
        vm: VmId,
        /// Its generation.
        generation: Generation,
    },
    /// Sends a machine; ends when the destination depends on the source no more.
    MigrateSend {
        /// The machine.
        vm: VmId,
        /// Its generation here.
        generation: Generation,
        /// Its generation there.
        next: Generation,
        /// Where to.
        to: Incoming,
        /// The scheme, e.g. `hybrid`.
        scheme: String,
    },
    /// To a source that asked: what became of a destination that was lost during the switch.
    MigrateFate {
        /// The migration.
        migration: MigrationId,
        /// The machine never ran there and its QEMU is gone for good; otherwise it runs there.
        dead: bool,
    },
    /// As `MigrateSend` for a migration that goes on at its source: tells its progress and ends as
    /// it ends.
    MigrateFollow {
        /// The migration.
        migration: MigrationId,
    },
    /// To a source: its destination is lost, before its relay can have noticed.
    MigrateLost {
        /// The migration.
        migration: MigrationId,
        /// What was lost.
        why: String,
    },
    /// How far a migration has come at this end, also after a break.
    MigrateStand {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
    },
    /// After a break beyond the commit point, to the destination: a new relay that waits for the
    /// source's.
    MigrateResumeIn {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// Memory moves on; otherwise only the disk.
        memory: bool,
    },
    /// After a break beyond the commit point, to the source: a new relay that goes on. Ends as
    /// `MigrateSend` does.
    MigrateResumeOut {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// Where to.
        to: Incoming,
        /// Memory moves on; otherwise only the disk.
        memory: bool,
    },
    /// To a destination that lacks nothing any more and has lost its relay: it ends the migration
    /// by itself.
    MigrateFinish {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
    },
    /// To a destination: what the machine still lacks will not come by itself.
    MigrateGiveUp {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// What it lacks, and why.
        why: String,
    },
    /// Waits at the destination until the machine there is whole.
    MigrateReceived {
        /// The migration.
        migration: MigrationId,
    },
    /// After the commit point: the source removes what it has of the machine.
    MigrateRelease {
        /// The machine.
        vm: VmId,
        /// The generation that runs elsewhere.
        generation: Generation,
    },
    /// Before the commit point: both ends take back what they did.
    MigrateAbort {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
    },
    /// Substrates.
    Substrates,
    /// Removes an image that nothing here uses, with its older builds.
    ImageDelete {
        /// Which.
        name: Name,
    },
    /// The machines here that need a substrate.
    SubstrateUsers {
        /// Which.
        id: SubstrateId,
    },
    /// Removes a substrate.
    SubstrateDelete {
        /// Which.
        id: SubstrateId,
    },
    /// The pool.
    Pool,
    /// Checks the pool.
    PoolCheck,
    /// The certificates that are no longer good. An older list than the one that is there
    /// changes nothing.
    Revocations(Revocations),
    /// Whether the site answers: done at once.
    Ping,
}

/// What the site answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SiteReply {
    /// It was done.
    Done,
    /// To `Report`.
    Report(SiteReport),
    /// To `Images`.
    Images(Vec<ImageInfo>),
    /// To `ImageBuild`.
    Image(ImageInfo),
    /// To `Machines`.
    Machines(Vec<MachineStatus>),
    /// To requests that change one machine.
    Machine(MachineStatus),
    /// To `VmDock`.
    Substrate(SubstrateInfo),
    /// To `Substrates`.
    Substrates(Vec<SubstrateInfo>),
    /// To `VmConsole`.
    Console(ConsoleTail),
    /// To `VmScreenshot`: PNG.
    Screenshot(Vec<u8>),
    /// To `VmExec`: the program's process in the guest.
    Executing(u64),
    /// To `VmExecWait`.
    Executed(GuestExec),
    /// To `MigrateManifest`.
    Manifest(Vec<u8>),
    /// To `MigratePrepare` and `MigrateResumeIn`.
    Incoming(Incoming),
    /// To `MigrateStand`.
    Stand(MoveStand),
    /// To `MigrateSend`, `MigrateFollow` and `MigrateResumeOut`: what the source measured, for the migrate room.
    Sent(Vec<u8>),
    /// To `MigrateReceived`: what the destination measured, for the migrate room.
    Received(Vec<u8>),
    /// To `SubstrateUsers`.
    Names(Vec<Name>),
    /// To `Pool`.
    Pool(PoolReport),
    /// To `PoolCheck`.
    Checked(CheckReport),
}

impl SiteReply {
    /// The variant's name, for messages.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Done => "Done",
            Self::Report(_) => "Report",
            Self::Images(_) => "Images",
            Self::Image(_) => "Image",
            Self::Machines(_) => "Machines",
            Self::Machine(_) => "Machine",
            Self::Substrate(_) => "Substrate",
            Self::Substrates(_) => "Substrates",
            Self::Console(_) => "Console",
            Self::Screenshot(_) => "Screenshot",
            Self::Executing(_) => "Executing",
            Self::Executed(_) => "Executed",
            Self::Manifest(_) => "Manifest",
            Self::Incoming(_) => "Incoming",
            Self::Stand(_) => "Stand",
            Self::Sent(_) => "Sent",
            Self::Received(_) => "Received",
            Self::Names(_) => "Names",
            Self::Pool(_) => "Pool",
            Self::Checked(_) => "Checked",
        }
    }
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

/// What a site sends in answer to a request over a link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SiteEvent {
    /// What happened meanwhile.
    News(News),
    /// The end.
    Done(Box<Result<SiteReply, Fault>>),
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
