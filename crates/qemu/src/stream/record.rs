//! The records of a stream and their encoding.

use bytes::{BufMut, Bytes};

/// First four bytes of a main channel.
pub(super) const MAGIC: u32 = 0x5145_564d;
/// The only stream version there is.
pub(super) const VERSION: u32 = 3;

pub(super) const SEC_EOF: u8 = 0x00;
pub(super) const SEC_START: u8 = 0x01;
pub(super) const SEC_PART: u8 = 0x02;
pub(super) const SEC_END: u8 = 0x03;
pub(super) const SEC_FULL: u8 = 0x04;
pub(super) const SUBSECTION: u8 = 0x05;
pub(super) const SEC_CONFIGURATION: u8 = 0x07;
pub(super) const SEC_COMMAND: u8 = 0x08;
pub(super) const SEC_FOOTER: u8 = 0x7e;

/// Flags in the low 12 bits of a RAM record's address.
pub mod flags {
    /// A page of one repeated byte.
    pub const ZERO: u16 = 0x02;
    /// The list of RAM blocks.
    pub const MEM_SIZE: u16 = 0x04;
    /// 4096 bytes follow.
    pub const PAGE: u16 = 0x08;
    /// End of the records of a section.
    pub const EOS: u16 = 0x10;
    /// The block is that of the record before on the same channel.
    pub const CONTINUE: u16 = 0x20;
    /// A barrier for multifd; has no body.
    pub const MULTIFD_FLUSH: u16 = 0x200;
}

/// One element of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Magic and version.
    Header,
    /// The machine type and what both ends must agree on.
    Configuration {
        /// Machine type, e.g. `pc-q35-10.0`.
        machine: Bytes,
    },
    /// A part of the configuration.
    Subsection(Subsection),
    /// A RAM section begins (START).
    SectionStart {
        /// Number of the section, used by its later parts.
        id: u32,
        /// Instance of the name.
        instance: u32,
        /// Version of the section's format.
        version: u32,
    },
    /// A further part (PART) of a RAM section.
    SectionPart {
        /// Number of the section.
        id: u32,
    },
    /// The last part (END) of a RAM section.
    SectionEnd {
        /// Number of the section.
        id: u32,
    },
    /// The list of RAM blocks.
    MemSize(MemSize),
    /// A page.
    Page(Page),
    /// End of the records of a section or of a preempt channel.
    Eos,
    /// A multifd barrier.
    MultifdFlush,
    /// What closes a section.
    Footer {
        /// Number of the section.
        id: u32,
    },
    /// A command to the destination.
    Command(Command),
    /// End of the stream; a VM description may follow as [`Record::Opaque`].
    Eof,
    /// Bytes that are handed through unread.
    Opaque(Bytes),
}

/// A part of the configuration section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subsection {
    /// Log2 of the page size.
    TargetPageBits {
        /// Version of the subsection.
        version: u32,
        /// Log2 of the page size.
        bits: u32,
    },
    /// Capabilities that the destination must have set as well.
    Capabilities {
        /// Version of the subsection.
        version: u32,
        /// Their names.
        names: Vec<Bytes>,
    },
    /// The machine's UUID.
    Uuid {
        /// Version of the subsection.
        version: u32,
        /// The UUID.
        uuid: [u8; 16],
    },
}

pub(super) const SUB_PAGE_BITS: &[u8] = b"configuration/target-page-bits";
pub(super) const SUB_CAPABILITIES: &[u8] = b"configuration/capabilities";
pub(super) const SUB_UUID: &[u8] = b"configuration/uuid";

/// One RAM block as the source lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its id, e.g. `m0` or `/rom@etc/acpi/tables`.
    pub name: Bytes,
    /// Bytes in use.
    pub used: u64,
    /// Guest physical address; present when the source leaves shared blocks out.
    pub address: Option<u64>,
}

/// The list of RAM blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemSize {
    /// Sum of the blocks' sizes in bytes.
    pub total: u64,
    /// The blocks.
    pub blocks: Vec<RamBlock>,
}

/// A page record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The block it belongs to.
    pub block: Bytes,
    /// Whether the record names its block (else it continues the one before).
    pub named: bool,
    /// Offset in the block in bytes, a multiple of 4096.
    pub offset: u64,
    /// What is in it.
    pub content: Content,
}

/// What is in a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// One byte, repeated; QEMU sends 0 only.
    Fill(u8),
    /// 4096 bytes.
    Data(Bytes),
}

/// A range that the destination must forget, because the source dirtied it after sending it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Discard {
    /// Offset in the block in bytes.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A command to the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The destination shall open the return path.
    OpenReturnPath,
    /// The destination shall answer PONG with the value.
    Ping(u32),
    /// Post-copy may follow; carries both ends' page sizes.
    PostcopyAdvise(Bytes),
    /// Start taking pages on demand.
    PostcopyListen,
    /// Run.
    PostcopyRun,
    /// Forget ranges of a block.
    RamDiscard {
        /// Format version of the command.
        version: u8,
        /// The block.
        block: Bytes,
        /// The ranges; at most 12 by QEMU's habit.
        ranges: Vec<Discard>,
    },
    /// A piece of stream that is to be read whole before it is acted upon.
    Packaged(Bytes),
    /// Go on after a break.
    PostcopyResume,
    /// The destination shall send the received-pages bitmap of the block.
    RecvBitmap {
        /// The block.
        block: Bytes,
    },
    /// The source is about to stop.
    SwitchoverStart,
    /// A command that nothing here needs to understand.
    Other {
        /// Its number.
        number: u16,
        /// Its payload.
        payload: Bytes,
    },
}

impl Command {
    pub(super) const OPEN_RETURN_PATH: u16 = 1;
    pub(super) const PING: u16 = 2;
    pub(super) const POSTCOPY_ADVISE: u16 = 3;
    pub(super) const POSTCOPY_LISTEN: u16 = 4;
    pub(super) const POSTCOPY_RUN: u16 = 5;
    pub(super) const RAM_DISCARD: u16 = 6;
    pub(super) const PACKAGED: u16 = 7;
    pub(super) const POSTCOPY_RESUME: u16 = 9;
    pub(super) const RECV_BITMAP: u16 = 10;
    pub(super) const SWITCHOVER_START: u16 = 11;

    /// Appends the command's bytes, section type included.
    pub fn encode(&self, out: &mut Vec<u8>) {
        fn head(out: &mut Vec<u8>, number: u16, len: usize) {
            out.put_u8(SEC_COMMAND);
            out.put_u16(number);
            // Every payload but that of PACKAGED was read with a 16-bit length.
            out.put_u16(u16::try_from(len).unwrap_or(u16::MAX));
        }
        match self {
            Self::OpenReturnPath => head(out, Self::OPEN_RETURN_PATH, 0),
            Self::Ping(value) => {
                head(out, Self::PING, 4);
                out.put_u32(*value);
            }
            Self::PostcopyAdvise(payload) => {
                head(out, Self::POSTCOPY_ADVISE, payload.len());
                out.put_slice(payload);
            }
            Self::PostcopyListen => head(out, Self::POSTCOPY_LISTEN, 0),
            Self::PostcopyRun => head(out, Self::POSTCOPY_RUN, 0),
            Self::RamDiscard { version, block, ranges } => {
                head(out, Self::RAM_DISCARD, 3 + block.len() + ranges.len() * 16);
                out.put_u8(*version);
                put_name(out, block);
                out.put_u8(0);
                for r in ranges {
                    out.put_u64(r.start);
                    out.put_u64(r.len);
                }
            }
            Self::Packaged(blob) => {
                head(out, Self::PACKAGED, 4);
                out.put_u32(u32::try_from(blob.len()).unwrap_or(u32::MAX));
                out.put_slice(blob);
            }
            Self::PostcopyResume => head(out, Self::POSTCOPY_RESUME, 0),
            Self::RecvBitmap { block } => {
                head(out, Self::RECV_BITMAP, 1 + block.len());
                put_name(out, block);
            }
            Self::SwitchoverStart => head(out, Self::SWITCHOVER_START, 0),
            Self::Other { number, payload } => {
                head(out, *number, payload.len());
                out.put_slice(payload);
            }
        }
    }
}

/// A name with its length in one byte; the parser never makes a longer one.
pub(super) fn put_name(out: &mut Vec<u8>, name: &[u8]) {
    let n = name.len().min(255);
    out.put_u8(n as u8);
    out.put_slice(&name[..n]);
}

impl Record {
    /// Appends the record's bytes: exactly those it was parsed from.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Header => {
                out.put_u32(MAGIC);
                out.put_u32(VERSION);
            }
            Self::Configuration { machine } => {
                out.put_u8(SEC_CONFIGURATION);
                out.put_u32(u32::try_from(machine.len()).unwrap_or(u32::MAX));
                out.put_slice(machine);
            }
            Self::Subsection(sub) => sub.encode(out),
            Self::SectionStart { id, instance, version } => {
                out.put_u8(SEC_START);
                out.put_u32(*id);
                put_name(out, super::parse::RAM);
                out.put_u32(*instance);
                out.put_u32(*version);
            }
            Self::SectionPart { id } => {
                out.put_u8(SEC_PART);
                out.put_u32(*id);
            }
            Self::SectionEnd { id } => {
                out.put_u8(SEC_END);
                out.put_u32(*id);
            }
            Self::MemSize(list) => {
                out.put_u64(list.total | u64::from(flags::MEM_SIZE));
                for b in &list.blocks {
                    put_name(out, &b.name);
                    out.put_u64(b.used);
                    if let Some(address) = b.address {
                        out.put_u64(address);
                    }
                }
            }
            Self::Page(page) => page.encode(out),
            Self::Eos => out.put_u64(u64::from(flags::EOS)),
            Self::MultifdFlush => out.put_u64(u64::from(flags::MULTIFD_FLUSH)),
            Self::Footer { id } => {
                out.put_u8(SEC_FOOTER);
                out.put_u32(*id);
            }
            Self::Command(command) => command.encode(out),
            Self::Eof => out.put_u8(SEC_EOF),
            Self::Opaque(bytes) => out.put_slice(bytes),
        }
    }
}

impl Page {
    /// Appends the record's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let kind = match self.content {
            Content::Fill(_) => flags::ZERO,
            Content::Data(_) => flags::PAGE,
        };
        let named = if self.named { 0 } else { flags::CONTINUE };
        out.put_u64(self.offset | u64::from(kind | named));
        if self.named {
            put_name(out, &self.block);
        }
        match &self.content {
            Content::Fill(byte) => out.put_u8(*byte),
            Content::Data(data) => out.put_slice(data),
        }
    }
}

impl Subsection {
    fn encode(&self, out: &mut Vec<u8>) {
        fn head(out: &mut Vec<u8>, name: &[u8], version: u32) {
            out.put_u8(SUBSECTION);
            put_name(out, name);
            out.put_u32(version);
        }
        match self {
            Self::TargetPageBits { version, bits } => {
                head(out, SUB_PAGE_BITS, *version);
                out.put_u32(*bits);
            }
            Self::Capabilities { version, names } => {
                head(out, SUB_CAPABILITIES, *version);
                out.put_u32(u32::try_from(names.len()).unwrap_or(u32::MAX));
                for name in names {
                    put_name(out, name);
                }
            }
            Self::Uuid { version, uuid } => {
                head(out, SUB_UUID, *version);
                out.put_slice(uuid);
            }
        }
    }
}
