//! Codec of QEMU's migration stream and of its return path, as QEMU 10 writes them.
//!
//! Sans-IO: bytes in ([`StreamParser::push`]), [`Record`]s out ([`StreamParser::next`]), and every
//! record encodes to the very bytes it was read from. All numbers are big-endian.
//!
//! ```text
//! main channel                                        preempt channel
//! header, CONFIGURATION                               page records only, no header
//! OPEN_RETURN_PATH, PING 1, ADVISE
//! ram START { MEM_SIZE list, EOS } footer
//! ram PART  { page records,  EOS } footer   ...
//! ---- the machine stops ----                         demanded pages
//! SWITCHOVER_START, RAM_DISCARD ..., PING 2
//! PACKAGED { LISTEN, device sections, PING 3, RUN }
//! PING 4, ram PART ..., ram END, EOF
//! ```
//!
//! Device sections carry no length. In a post-copy run all of them sit inside PACKAGED, whose
//! length is known, so nothing here knows any device. When pre-copy finishes first they appear
//! outside; from the first of them on the parser hands everything through as
//! [`Record::Opaque`]. Devices that put a section before RAM (virtio-mem, VFIO) have the same
//! effect from the start of the stream.

mod join;
mod parse;
mod record;
mod return_path;

pub use join::{blocks_beside, join_devices};
pub use parse::{Limits, PassReason, StreamParser};
pub use record::{Command, Content, Discard, MemSize, Page, RamBlock, Record, Subsection, flags};
pub use return_path::{PONG_COMMIT, ReturnMessage, ReturnPathParser};

use godwit_types::{Code, CodedError};

/// Why bytes are not a migration stream, or not one that can be relayed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The first four bytes are not QEMU's.
    #[error("reading a migration stream: it starts with {found:#010x}, not with QEMU's magic")]
    Magic {
        /// What was read.
        found: u32,
    },
    /// A version other than 3.
    #[error("reading a migration stream: version {found} instead of 3")]
    Version {
        /// What was read.
        found: u32,
    },
    /// A byte where a section must start that starts none.
    #[error("reading a migration stream at byte {at}: {found:#04x} starts no section")]
    SectionType {
        /// Position in the stream.
        at: u64,
        /// What was read.
        found: u8,
    },
    /// PART or END of a section that never started.
    #[error("reading a migration stream at byte {at}: section {id} was never started")]
    UnknownSection {
        /// Position in the stream.
        at: u64,
        /// Its number.
        id: u32,
    },
    /// A section's footer is missing or belongs to another section.
    #[error("reading a migration stream at byte {at}: the footer of section {id} is missing")]
    Footer {
        /// Position in the stream.
        at: u64,
        /// The section that was open.
        id: u32,
    },
    /// A RAM record whose flags have no meaning here.
    #[error("reading a migration stream at byte {at}: RAM record with unknown flags {flags:#x}")]
    RecordFlags {
        /// Position in the stream.
        at: u64,
        /// The low 12 bits.
        flags: u16,
    },
    /// "Same block as before" with no block before.
    #[error("reading a migration stream at byte {at}: a page continues a block, but none came")]
    NoBlock {
        /// Position in the stream.
        at: u64,
    },
    /// A length beyond what is accepted.
    #[error(
        "reading a migration stream at byte {at}: {what} of {len} bytes, at most {limit} are accepted"
    )]
    TooLarge {
        /// Position in the stream.
        at: u64,
        /// What it was to be.
        what: &'static str,
        /// Its length.
        len: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// Contents that contradict themselves.
    #[error("reading a migration stream at byte {at}: {what}")]
    Malformed {
        /// Position in the stream.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A page size other than 4 KiB.
    #[error(
        "reading a migration stream: pages of 2^{bits} bytes, only 4096-byte pages are handled"
    )]
    PageSize {
        /// Log2 of the page size.
        bits: u32,
    },
    /// The stream ended inside a record.
    #[error("reading a migration stream: it ends at byte {at} in the middle of a record")]
    Truncated {
        /// Position in the stream.
        at: u64,
    },
    /// Devices and RAM blocks cannot be made one state.
    #[error("making a whole state of saved devices: {why}")]
    CannotJoin {
        /// Why.
        why: &'static str,
    },
}

impl CodedError for StreamError {
    fn code(&self) -> Code {
        Code::Damaged
    }
}
