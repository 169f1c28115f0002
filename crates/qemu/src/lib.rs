//! One QEMU process as one typed machine.
//!
//! This is the only room that speaks QMP, starts QEMU, or talks to a guest agent. A machine is
//! described by a [`MachineSpec`]; its [`Manifest`] is what two ends have to agree on before a
//! state goes from one to the other. [`Launch::spawn`] starts a QEMU and gives a [`Machine`]
//! whose actions are refused with both states when its life cycle does not allow them.
//!
//! Architecture invariants: every text that can come from outside reaches QEMU as JSON or as one
//! escaped option value, never through a shell; every answer read from QEMU, from a guest or from
//! a file has a bound.
//!
//! # How it works
//!
//! `Launch` describes a process, `Machine` is one; what its life cycle does not allow is refused
//! with both states. RAM is a named file on tmpfs: shared for a machine of its own, a private
//! copy-on-write mapping of a sealed read-only file for an activated one. QEMU gets its own session
//! and listening sockets handed over, so a daemon's end ends no machine and the next daemon adopts
//! it. The guest agent's connection is kept between questions, and made before a saved state is
//! loaded: an agent that nobody is connected to looks only every 100 ms whether somebody is. A
//! program that is executed in a guest holds that connection only while it is started and asked
//! about, so it keeps nobody else waiting, and whoever follows it may ask at another site. A site
//! that runs as root gives each QEMU and each relay of a move a uid, a mount namespace and a
//! memory-limited control group of its own (`confine`, `companion`); a relay inherits its
//! configuration, identity, sockets and, at the source, the disk's layers open, and fills the disk
//! at the destination in `vms/ID/in`, from where it becomes the site's at the pivot; what such a
//! QEMU has to make elsewhere it makes in a directory of its own, and the site moves it to its
//! place.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod accel;
mod agent;
mod args;
mod companion;
mod confine;
mod discard;
mod disk;
pub mod doctor;
mod error;
mod group;
mod keys;
mod launch;
mod machine;
mod manifest;
mod memory;
mod process;
pub mod qmp;
mod spec;
pub mod stream;
mod tap;

pub use accel::Accel;
pub use agent::{Agent, AgentError, AgentSession, ExecOutput, GuestCommand, Vcpus};
pub use companion::{Companion, NotStarted};
pub use confine::{Confine, UidRange};
pub use disk::{DiskChain, DiskLayer, Layer, Node};
pub use error::QemuError;
pub use group::{MemoryGroup, MemoryGroups};
pub use keys::{Key, KeyStroke, UnknownCharacter, strokes};
pub use launch::{Binaries, Launch, MACHINE_VARIABLE, MemorySource, Start, VmGenId};
pub use machine::{
    Action, BlockInUse, BlockStats, Capability, Life, Machine, MigrationInfo, MigrationStatus,
    Parameters, RAM_BLOCK, Refused, RunPaths, Screenshot, bound_log,
};
pub use manifest::{Manifest, ManifestMismatch, versions_fit};
pub use memory::{MemoryFile, MemoryReader};
pub use process::{Exit, Process, started_below};
pub use qmp::{Event, EventCursor, Qmp, QmpError};
pub use spec::{BootFile, MacAddress, MachineSpec, Nic, NicBackend, SpecError};
pub use tap::Tap;
