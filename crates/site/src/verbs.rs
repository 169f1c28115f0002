//! The requests of the center to a site, each with its reply: one table.
//!
//! A new verb is a row here and a handler in `local/answers.rs`, which does not compile
//! without it. The row says since which version of the protocol it is there: a site that speaks
//! an older one is not asked ([`RemoteSite`](super::RemoteSite) says so in words). Rows and kinds
//! of reply are only ever added at the end, since their places are their numbers on the wire.

use std::net::SocketAddr;

use godwit_net::{Attachment, PublishedPort};
use godwit_transfer::{Revocations, Warrant};
use godwit_types::{Fault, Generation, Hash, MigrationId, Name, SubstrateId, SubstrateKind, VmId};
use serde::{Deserialize, Serialize};

use super::types::{
    CheckReport, ConsoleTail, Fell, GuestExec, GuestProgram, ImageInfo, Incoming, MachineStatus,
    MemoryStatus, MoveStatus, NewMachine, News, Origin, PoolReport, SubstrateInfo, TookBack,
};
use crate::SiteReport;

/// A request to a site. Its reply is of one type, and a caller sees no other.
pub trait Request: Into<SiteRequest> + Send + 'static {
    /// What it is answered with.
    type Reply: Send + 'static;
    /// The first version of the protocol that has it.
    const SINCE: u16;
    /// What it is called in messages.
    const NAME: &'static str;
    /// What holds for it besides.
    const MANNERS: &'static [Manner];

    /// Wraps the reply for the way back.
    fn answer(reply: Self::Reply) -> SiteReply;

    /// Takes the reply out; `None` where it is one of another kind.
    fn reply(answer: SiteReply) -> Option<Self::Reply>;

    /// The request as one of all those that have such a reply.
    fn asking(self) -> Asking<Self::Reply> {
        Asking { request: self.into(), reply: Self::reply }
    }
}

/// What a site sends in answer to a request over a link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SiteEvent {
    /// What happened meanwhile.
    News(News),
    /// The end.
    Done(Box<Result<SiteReply, Fault>>),
}

/// What may hold for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// It waits for a guest or a tool, for as long as that takes: a site works on a bounded number
    /// of them at once.
    InTurn,
    /// It must not be asked twice: an answer that was lost is told as that.
    Once,
    /// It breaks off when nobody waits for its answer any more.
    WithCaller,
}

/// A request of any verb whose reply is a `T`.
#[derive(Debug, Clone)]
pub struct Asking<T> {
    pub(super) request: SiteRequest,
    pub(super) reply: fn(SiteReply) -> Option<T>,
}

impl<T> Asking<T> {
    /// What is asked.
    #[must_use]
    pub const fn request(&self) -> &SiteRequest {
        &self.request
    }
}

/// A kind of reply.
pub trait Kind {
    /// What it carries.
    type Payload;
}

macro_rules! verbs {
    (
        replies { $( $(#[$kind_doc:meta])* $kind:ident($payload:ty), )* }
        $(
            $(#[$doc:meta])*
            $verb:ident $name:literal since $since:literal $(, $manner:ident)* => $reply:ident {
                $( $(#[$field_doc:meta])* $field:ident: $type:ty, )*
            }
        )*
    ) => {
        /// The kinds of replies.
        mod kind {
            $( pub struct $kind; )*
        }

        $(
            impl Kind for kind::$kind {
                type Payload = $payload;
            }
        )*

        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
            pub struct $verb {
                $( $(#[$field_doc])* pub $field: $type, )*
            }

            impl From<$verb> for SiteRequest {
                fn from(request: $verb) -> Self {
                    Self::$verb(request)
                }
            }

            impl Request for $verb {
                type Reply = <kind::$reply as Kind>::Payload;
                const SINCE: u16 = $since;
                const NAME: &'static str = $name;
                const MANNERS: &'static [Manner] = &[$( Manner::$manner ),*];
                fn answer(reply: Self::Reply) -> SiteReply {
                    SiteReply::$reply(reply)
                }
                fn reply(answer: SiteReply) -> Option<Self::Reply> {
                    match answer {
                        SiteReply::$reply(reply) => Some(reply),
                        _ => None,
                    }
                }
            }
        )*

        /// A request as it crosses a link.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub enum SiteRequest {
            $( $(#[$doc])* $verb($verb), )*
        }

        /// The verbs, each with the first version of the protocol that has it.
        #[cfg(test)]
        pub(super) const VERBS: &[(&str, u16)] = &[$( (stringify!($verb), $since) ),*];

        impl SiteRequest {
            /// What it is called in messages.
            #[must_use]
            pub const fn name(&self) -> &'static str {
                match self { $( Self::$verb(_) => $verb::NAME, )* }
            }

            /// The first version of the protocol that has it.
            #[must_use]
            pub const fn since(&self) -> u16 {
                match self { $( Self::$verb(_) => $verb::SINCE, )* }
            }

            /// Whether that holds for it.
            #[must_use]
            pub fn has(&self, manner: Manner) -> bool {
                match self { $( Self::$verb(_) => $verb::MANNERS, )* }.contains(&manner)
            }
        }

        /// A reply as it crosses a link.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub enum SiteReply {
            $( $(#[$kind_doc])* $kind($payload), )*
        }

        impl SiteReply {
            /// Which kind it is, for messages.
            #[must_use]
            pub const fn label(&self) -> &'static str {
                match self { $( Self::$kind(_) => stringify!($kind), )* }
            }
        }
    };
}

impl SiteReply {
    /// As a center hears it that speaks so much of the protocol: what came later is told in words
    /// that it knows.
    pub(super) fn told_to(mut self, speaks: u16) -> Self {
        if let Self::MoveStatus(status) = &mut self
            && status.memory == MemoryStatus::Fell
            && speaks < MigrateFell::SINCE
        {
            status.memory = MemoryStatus::Gone;
        }
        self
    }
}

verbs! {
    replies {
        /// It was done.
        Done(()),
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
        /// To `VmDock` and `SubstrateFetch`.
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
        /// To `MigrateStatus`.
        MoveStatus(MoveStatus),
        /// To `MigrateSend`, `MigrateFollow` and `MigrateResumeOut`: what the source measured, for
        /// the migrate room.
        Sent(Vec<u8>),
        /// To `MigrateReceived`: what the destination measured, for the migrate room.
        Received(Vec<u8>),
        /// To `SubstrateUsers`.
        Names(Vec<Name>),
        /// To `Pool`.
        Pool(PoolReport),
        /// To `PoolCheck`.
        Checked(CheckReport),
        /// To `MigrateListening` and `SubstrateOffer`.
        Address(Option<SocketAddr>),
        /// To `Disk`.
        Bytes(u64),
        /// To `Visits`.
        Visits(Vec<VmId>),
        /// To `MigrateFell`.
        Fell(Fell),
        /// To `MigrateTakeBack`.
        TookBack(TookBack),
    }

    /// Resources and holdings.
    Report "report" since 1 => Report {}
    /// Images.
    Images "images" since 1 => Images {}
    /// Builds an image from its recipe.
    ImageBuild "image build" since 1, InTurn => Image {
        /// Which.
        name: Name,
    }
    /// Machines.
    Machines "machines" since 1 => Machines {}
    /// Makes and starts a machine.
    VmNew "vm new" since 1 => Machine {
        /// Which, and what from.
        machine: NewMachine,
    }
    /// Starts a stopped machine from its disk.
    VmStart "vm start" since 1 => Machine {
        /// Which.
        vm: VmId,
        /// Its new generation.
        generation: Generation,
        /// The center's word for that.
        warrant: Warrant,
    }
    /// Powers a machine off; its disk is kept.
    VmStop "vm stop" since 1 => Done {
        /// Which.
        vm: VmId,
        /// Its generation.
        generation: Generation,
        /// Without asking the guest.
        force: bool,
    }
    /// Ends a machine and removes all it has.
    VmDelete "vm delete" since 1 => Done {
        /// Which.
        vm: VmId,
        /// Its generation.
        generation: Generation,
    }
    /// Turns a machine into a substrate.
    VmDock "vm dock" since 1 => Substrate {
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
    }
    /// The end of its serial console's log.
    VmConsole "vm console" since 1, InTurn => Console {
        /// Which.
        vm: VmId,
        /// At most so many bytes.
        max_bytes: u32,
    }
    /// Its screen as PNG.
    VmScreenshot "vm screenshot" since 1, InTurn => Screenshot {
        /// Which.
        vm: VmId,
    }
    /// Types into its keyboard.
    VmType "vm type" since 1, InTurn => Done {
        /// Which.
        vm: VmId,
        /// What.
        text: String,
    }
    /// Starts a program in the guest, by its agent.
    VmExec "vm exec" since 1, InTurn, Once => Executing {
        /// Which.
        vm: VmId,
        /// What.
        program: GuestProgram,
    }
    /// Waits until a program that `VmExec` started has ended. The guest tells that once.
    VmExecWait "vm exec wait" since 1 => Executed {
        /// Which.
        vm: VmId,
        /// The program's process in the guest.
        pid: u64,
        /// Milliseconds to wait, at most.
        within_ms: u32,
    }
    /// Makes ready for a machine that is to come.
    MigratePrepare "migrate prepare" since 1 => Incoming {
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
    }
    /// What a destination must know of a machine to make ready for it.
    MigrateManifest "migrate manifest" since 1 => Manifest {
        /// The machine.
        vm: VmId,
        /// Its generation.
        generation: Generation,
    }
    /// Sends a machine; ends when the destination depends on the source no more.
    MigrateSend "migrate send" since 1 => Sent {
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
    }
    /// To a source that asked: what became of a destination that was lost during the switch.
    MigrateFate "migrate fate" since 1 => Done {
        /// The migration.
        migration: MigrationId,
        /// The machine never ran there and its QEMU is gone for good; otherwise it runs there.
        dead: bool,
    }
    /// As `MigrateSend` for a migration that goes on at its source: tells its progress and ends as
    /// it ends.
    MigrateFollow "migrate follow" since 1 => Sent {
        /// The migration.
        migration: MigrationId,
    }
    /// To a source: its destination is lost, before its relay can have noticed.
    MigrateLost "migrate lost" since 1 => Done {
        /// The migration.
        migration: MigrationId,
        /// What was lost.
        why: String,
    }
    /// How far a migration has come at this end, also after a break.
    MigrateStatus "migrate status" since 1 => MoveStatus {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
    }
    /// After a break beyond the commit point, to the destination: a new relay that waits for the
    /// source's.
    MigrateResumeIn "migrate resume in" since 1 => Incoming {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// Memory moves on; otherwise only the disk.
        memory: bool,
    }
    /// After a break beyond the commit point, to the source: a new relay that goes on. Ends as
    /// `MigrateSend` does.
    MigrateResumeOut "migrate resume out" since 1 => Sent {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// Where to.
        to: Incoming,
        /// Memory moves on; otherwise only the disk.
        memory: bool,
    }
    /// To a destination that lacks nothing any more and has lost its relay: it ends the migration
    /// by itself.
    MigrateFinish "migrate finish" since 1 => Done {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
    }
    /// To a destination: what the machine still lacks will not come by itself.
    MigrateGiveUp "migrate give up" since 1 => Done {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// What it lacks, and why.
        why: String,
    }
    /// Waits at the destination until the machine there is whole.
    MigrateReceived "migrate received" since 1 => Received {
        /// The migration.
        migration: MigrationId,
    }
    /// After the commit point: the source removes what it has of the machine.
    MigrateRelease "migrate release" since 1 => Done {
        /// The machine.
        vm: VmId,
        /// The generation that runs elsewhere.
        generation: Generation,
    }
    /// Before the commit point: both ends take back what they did.
    MigrateAbort "migrate abort" since 1 => Done {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
    }
    /// Substrates.
    Substrates "substrates" since 1 => Substrates {}
    /// Removes an image that nothing here uses, with its older builds.
    ImageDelete "image delete" since 1 => Done {
        /// Which.
        name: Name,
    }
    /// The machines here that need a substrate.
    SubstrateUsers "substrate users" since 1 => Names {
        /// Which.
        id: SubstrateId,
    }
    /// Removes a substrate.
    SubstrateDelete "substrate delete" since 1 => Done {
        /// Which.
        id: SubstrateId,
    }
    /// The pool.
    Pool "pool" since 1 => Pool {}
    /// Checks the pool.
    PoolCheck "pool check" since 1, InTurn => Checked {}
    /// The certificates that are no longer good. An older list than the one that is there
    /// changes nothing.
    Revoke "revoke" since 1 => Done {
        /// The whole list.
        list: Revocations,
    }
    /// Whether the site answers: done at once.
    Ping "ping" since 1 => Done {}
    /// One machine.
    VmStatus "vm status" since 2 => Machine {
        /// Which.
        vm: VmId,
    }
    /// To a supplier: another site may fetch a substrate from it, soon. Answered with where it
    /// listens, if anybody can reach it.
    SubstrateOffer "substrate offer" since 3 => Address {
        /// Which.
        id: SubstrateId,
        /// The site that may.
        to: Name,
    }
    /// To a taker: it fetches a substrate from the site that offers it.
    SubstrateFetch "substrate fetch" since 3, WithCaller => Substrate {
        /// Which.
        id: SubstrateId,
        /// Its name, for messages.
        name: Name,
        /// The content that it must have, unless any will do.
        content: Option<Hash>,
        /// Pages and blocks that are there already are taken from these substrates alone.
        among: Vec<SubstrateId>,
        /// The site that offers it, as in its certificate.
        from: Name,
        /// Where that listens.
        address: SocketAddr,
    }
    /// Where the source's relay listens, for a destination that has to dial; none once they have met.
    MigrateListening "migrate listening" since 3 => Address {
        /// The migration.
        migration: MigrationId,
    }
    /// To a destination that nobody can reach: its relay dials the source's.
    MigrateDial "migrate dial" since 3 => Done {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// Where the source's relay listens.
        address: SocketAddr,
    }
    /// How large the disk is that a machine has, in bytes: what its guest sees.
    Disk "disk" since 3 => Bytes {
        /// What the machine is made from.
        of: Origin,
    }
    /// Both sites of a migration hold a substrate that its machine comes from: its memory is made ready
    /// for their relays. A site that cannot refuses; the machine moves without it then.
    MigrateHold "migrate hold" since 4 => Done {
        /// The migration.
        migration: MigrationId,
        /// The substrate.
        substrate: SubstrateId,
        /// Its content.
        content: Hash,
    }
    /// The machines that have left a site and of which it keeps memory.
    Visits "visits" since 5 => Visits {}
    /// As `VmNew`, a machine in a network.
    VmNewOn "vm new on a network" since 6 => Machine {
        /// Which, and what from.
        machine: NewMachine,
        /// Its place in the network.
        attachment: Attachment,
    }
    /// As `MigratePrepare`, for a machine in a network.
    MigratePrepareOn "migrate prepare on a network" since 6 => Incoming {
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
        /// Its place in the network.
        attachment: Attachment,
    }
    /// What a site lacks for networks, each as one word.
    NetworksLack "networks lack" since 7 => Names {}
    /// Has ports of the site's host lead to a machine while it runs there: these, and no others.
    VmPublish "vm publish" since 7 => Done {
        /// Which.
        vm: VmId,
        /// Its generation.
        generation: Generation,
        /// All of its ports.
        ports: Vec<PublishedPort>,
    }
    /// As `MigratePrepareOn`, for a machine that publishes ports.
    MigratePreparePublishing "migrate prepare with ports" since 7 => Incoming {
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
        /// Its place in the network.
        attachment: Attachment,
        /// All of its ports.
        published: Vec<PublishedPort>,
    }
    /// To a destination whose QEMU has died while part of the machine's memory was at the source: it
    /// gives the machine up. When it answers, it is written down there that the machine never runs
    /// there again under this generation. Refused as a conflict where the machine runs, was powered
    /// off by its guest, or had all its memory.
    MigrateFell "migrate fell" since 7 => Fell {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// Its generation there.
        generation: Generation,
    }
    /// To a source, once its destination has answered `MigrateFell`: the machine runs on there as it
    /// was when it left. May be asked again at any time; what was answered once holds.
    MigrateTakeBack "migrate take back" since 7 => TookBack {
        /// The migration.
        migration: MigrationId,
        /// The machine.
        vm: VmId,
        /// Its generation from now on.
        generation: Generation,
        /// The center's word for that.
        warrant: Warrant,
    }
}
