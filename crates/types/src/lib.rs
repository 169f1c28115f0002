//! Ids, units, states and errors that every room shares.
//!
//! Nothing here does I/O. A type belongs here when two rooms must agree on it;
//! everything else stays in the room that owns it.

mod clock;
mod error;
mod fault;
mod hash;
mod ids;
mod measure;
mod name;
mod sealed;
mod state;
mod units;

pub use clock::UnixMs;
pub use error::{Code, CodedError};
pub use fault::{Fault, chain};
pub use hash::{Hash, HashParseError};
pub use ids::{MigrationId, NetworkId, OpId, SubstrateId, VmId};
pub use measure::{
    ActivateReport, BytesMoved, ClockOffset, DockReport, LinkReport, MovePhase, MoveReport,
    PagesMoved, PhaseSpan, Phases,
};
pub use name::{Name, NameError};
pub use sealed::{SealBroken, seal, unseal};
pub use state::{
    Arch, Generation, InvalidTransition, OpState, SiteKind, SiteState, SubstrateKind, VmState,
};
pub use units::{BLOCK_SIZE, Mib, PAGE_SIZE, human_bytes};
