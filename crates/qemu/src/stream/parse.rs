//! The incremental parser of one channel.

use bytes::{Buf, Bytes, BytesMut};
use godwit_types::PAGE_SIZE;

use super::StreamError;
use super::record::{
    Command, Content, Discard, MAGIC, MemSize, Page, RamBlock, Record, SEC_COMMAND,
    SEC_CONFIGURATION, SEC_END, SEC_EOF, SEC_FOOTER, SEC_FULL, SEC_PART, SEC_START,
    SUB_CAPABILITIES, SUB_PAGE_BITS, SUB_UUID, SUBSECTION, Subsection, VERSION, flags,
};

/// Name of the section that holds memory.
pub(super) const RAM: &[u8] = b"ram";
const PAGE: u64 = PAGE_SIZE as u64;
const FLAG_MASK: u64 = PAGE - 1;
/// Largest piece of one [`Record::Opaque`].
const OPAQUE_CHUNK: usize = 256 << 10;

/// What a stream may contain at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes in one PACKAGED command (device state).
    pub packaged: u32,
    /// RAM blocks in the list.
    pub blocks: usize,
    /// Bytes of the machine's name.
    pub machine_name: u32,
    /// Capabilities in the configuration.
    pub capabilities: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { packaged: 64 << 20, blocks: 1024, machine_name: 256, capabilities: 64 }
    }
}

/// Why a parser hands bytes through unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassReason {
    /// A section that is not RAM came outside PACKAGED: pre-copy finished, or a device comes first.
    DeviceSection,
    /// After the end of the stream: QEMU's description of the machine.
    Trailer,
    /// A part of the configuration or a capability whose layout is not known here.
    UnknownConfiguration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Magic and version are next.
    Header,
    /// A section is next; `configuration` tells how far the configuration has come.
    Section {
        configuration: Configuration,
    },
    /// Records of RAM section `id`.
    Ram {
        id: u32,
    },
    /// The footer of section `id` is next.
    Footer {
        id: u32,
    },
    /// A preempt channel: records without sections.
    Preempt,
    Opaque(PassReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Configuration {
    Allowed,
    Open,
    Closed,
}

/// Parser of one channel: bytes in, records out.
///
/// Memory stays bounded by what is pushed without being read, plus one record
/// (at most [`Limits::packaged`]).
#[derive(Debug)]
pub struct StreamParser {
    limits: Limits,
    buf: BytesMut,
    at: u64,
    state: State,
    /// Number of the RAM section; a resumed stream learns it from its first part.
    ram: Option<u32>,
    resumed: bool,
    ignore_shared: bool,
    /// The block that CONTINUE means.
    block: Option<Bytes>,
    failed: Option<StreamError>,
}

impl StreamParser {
    /// A parser of a main channel from its first byte.
    #[must_use]
    pub fn main(limits: Limits) -> Self {
        Self::with(limits, State::Header, false)
    }

    /// A parser of a main channel that goes on after a break: no header, and the RAM section
    /// was started on an earlier channel.
    #[must_use]
    pub fn resumed(limits: Limits) -> Self {
        Self::with(limits, State::Section { configuration: Configuration::Closed }, true)
    }

    /// A parser of a preempt channel.
    #[must_use]
    pub fn preempt(limits: Limits) -> Self {
        Self::with(limits, State::Preempt, false)
    }

    fn with(limits: Limits, state: State, resumed: bool) -> Self {
        Self {
            limits,
            buf: BytesMut::new(),
            at: 0,
            state,
            ram: None,
            resumed,
            ignore_shared: false,
            block: None,
            failed: None,
        }
    }

    /// Takes the next bytes of the channel.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// The buffer that [`StreamParser::push`] appends to, for readers that can fill it directly.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buf
    }

    /// Bytes that have been pushed and not yet come out as records.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.buf.len()
    }

    /// Bytes that have come out as records.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Whether bytes are being handed through unread, and why.
    #[must_use]
    pub fn passing_through(&self) -> Option<PassReason> {
        match self.state {
            State::Opaque(why) => Some(why),
            _ => None,
        }
    }

    /// Declares the end of the channel.
    ///
    /// # Errors
    /// [`StreamError::Truncated`] when it ends inside a record.
    pub fn finish(&self) -> Result<(), StreamError> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        if self.buf.is_empty() { Ok(()) } else { Err(StreamError::Truncated { at: self.at }) }
    }

    /// The next record, or `None` until more bytes are pushed.
    ///
    /// # Errors
    /// [`StreamError`] when the bytes are no stream that can be relayed; every further call
    /// returns the same error.
    #[allow(clippy::should_implement_trait, reason = "an iterator ends at None; this waits")]
    pub fn next(&mut self) -> Result<Option<Record>, StreamError> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        let before = self.buf.len();
        let result = match self.state {
            State::Header => self.header(),
            State::Section { configuration } => self.section(configuration),
            State::Ram { id } => self.ram_record(Some(id)),
            State::Preempt => self.ram_record(None),
            State::Footer { id } => self.footer(id),
            State::Opaque(_) => Ok(self.opaque()),
        };
        self.at += (before - self.buf.len()) as u64;
        if let Err(e) = &result {
            self.failed = Some(e.clone());
        }
        result
    }

    fn header(&mut self) -> Result<Option<Record>, StreamError> {
        let mut peek = Peek(&self.buf);
        let Some(magic) = peek.u32() else { return Ok(None) };
        if magic != MAGIC {
            return Err(StreamError::Magic { found: magic });
        }
        let Some(version) = peek.u32() else { return Ok(None) };
        if version != VERSION {
            return Err(StreamError::Version { found: version });
        }
        self.buf.advance(8);
        self.state = State::Section { configuration: Configuration::Allowed };
        Ok(Some(Record::Header))
    }

    fn section(&mut self, configuration: Configuration) -> Result<Option<Record>, StreamError> {
        let mut peek = Peek(&self.buf);
        let Some(kind) = peek.u8() else { return Ok(None) };
        match kind {
            SEC_CONFIGURATION if configuration == Configuration::Allowed => {
                let Some(len) = peek.u32() else { return Ok(None) };
                self.bound("a machine name", len.into(), self.limits.machine_name.into())?;
                let Some(name) = peek.take(len as usize) else { return Ok(None) };
                let machine = Bytes::copy_from_slice(name);
                self.consume(5 + machine.len());
                self.state = State::Section { configuration: Configuration::Open };
                Ok(Some(Record::Configuration { machine }))
            }
            SUBSECTION if configuration == Configuration::Open => self.subsection(),
            SEC_START | SEC_FULL => {
                let (Some(id), Some(name)) = (peek.u32(), peek.name()) else { return Ok(None) };
                if kind == SEC_FULL || name != RAM {
                    self.state = State::Opaque(PassReason::DeviceSection);
                    return Ok(self.opaque());
                }
                let (Some(instance), Some(version)) = (peek.u32(), peek.u32()) else {
                    return Ok(None);
                };
                self.consume(5 + 1 + RAM.len() + 8);
                self.ram = Some(id);
                self.state = State::Ram { id };
                Ok(Some(Record::SectionStart { id, instance, version }))
            }
            SEC_PART | SEC_END => {
                let Some(id) = peek.u32() else { return Ok(None) };
                let known = match self.ram {
                    Some(ram) => ram == id,
                    None => self.resumed,
                };
                if !known {
                    return Err(StreamError::UnknownSection { at: self.at, id });
                }
                self.consume(5);
                self.ram = Some(id);
                self.state = State::Ram { id };
                Ok(Some(if kind == SEC_PART {
                    Record::SectionPart { id }
                } else {
                    Record::SectionEnd { id }
                }))
            }
            SEC_COMMAND => self.command(),
            SEC_EOF => {
                self.consume(1);
                self.state = State::Opaque(PassReason::Trailer);
                Ok(Some(Record::Eof))
            }
            found => Err(StreamError::SectionType { at: self.at, found }),
        }
    }

    fn subsection(&mut self) -> Result<Option<Record>, StreamError> {
        let mut peek = Peek(&self.buf);
        let Some(_type) = peek.u8() else { return Ok(None) };
        let (Some(name), Some(version)) = (peek.name(), peek.u32()) else { return Ok(None) };
        let sub = if name == SUB_PAGE_BITS {
            let Some(bits) = peek.u32() else { return Ok(None) };
            if bits != PAGE_SIZE.trailing_zeros() {
                return Err(StreamError::PageSize { bits });
            }
            Subsection::TargetPageBits { version, bits }
        } else if name == SUB_CAPABILITIES {
            let Some(count) = peek.u32() else { return Ok(None) };
            self.bound("capabilities", count.into(), self.limits.capabilities.into())?;
            let mut names = Vec::new();
            for _ in 0..count {
                let Some(name) = peek.name() else { return Ok(None) };
                names.push(Bytes::copy_from_slice(name));
            }
            self.ignore_shared = names.iter().any(|n| n.as_ref() == b"x-ignore-shared");
            if names.iter().any(|n| n.as_ref() == b"mapped-ram") {
                self.state = State::Opaque(PassReason::UnknownConfiguration);
                return Ok(self.opaque());
            }
            Subsection::Capabilities { version, names }
        } else if name == SUB_UUID {
            let Some(raw) = peek.take(16) else { return Ok(None) };
            let mut uuid = [0; 16];
            uuid.copy_from_slice(raw);
            Subsection::Uuid { version, uuid }
        } else {
            self.state = State::Opaque(PassReason::UnknownConfiguration);
            return Ok(self.opaque());
        };
        let rest = peek.0.len();
        self.consume(self.buf.len() - rest);
        Ok(Some(Record::Subsection(sub)))
    }

    fn command(&mut self) -> Result<Option<Record>, StreamError> {
        let at = self.at;
        let malformed = |what| StreamError::Malformed { at, what };
        let mut peek = Peek(&self.buf);
        let Some(_type) = peek.u8() else { return Ok(None) };
        let (Some(number), Some(len)) = (peek.u16(), peek.u16()) else { return Ok(None) };
        let len = usize::from(len);
        let Some(mut body) = peek.take(len).map(Peek) else { return Ok(None) };
        let expect = |n: usize| {
            if len == n { Ok(()) } else { Err(malformed("a command's length does not fit it")) }
        };
        let command = match number {
            Command::OPEN_RETURN_PATH => expect(0).map(|()| Command::OpenReturnPath)?,
            Command::PING => {
                expect(4)?;
                Command::Ping(body.u32().unwrap_or_default())
            }
            Command::POSTCOPY_ADVISE => Command::PostcopyAdvise(Bytes::copy_from_slice(body.0)),
            Command::POSTCOPY_LISTEN => expect(0).map(|()| Command::PostcopyListen)?,
            Command::POSTCOPY_RUN => expect(0).map(|()| Command::PostcopyRun)?,
            Command::POSTCOPY_RESUME => expect(0).map(|()| Command::PostcopyResume)?,
            Command::SWITCHOVER_START => expect(0).map(|()| Command::SwitchoverStart)?,
            Command::RAM_DISCARD => {
                Self::discard(body).ok_or(malformed("a RAM discard that is no list of ranges"))?
            }
            Command::RECV_BITMAP => {
                let block = body
                    .name()
                    .filter(|n| n.len() + 1 == len)
                    .ok_or(malformed("a bitmap request without a block"))?;
                Command::RecvBitmap { block: Bytes::copy_from_slice(block) }
            }
            Command::PACKAGED => {
                expect(4)?;
                let size = body.u32().unwrap_or_default();
                self.bound("a package of device state", size.into(), self.limits.packaged.into())?;
                let whole = 9 + size as usize;
                if self.buf.len() < whole {
                    self.buf.reserve(whole - self.buf.len());
                    return Ok(None);
                }
                self.consume(9);
                let blob = self.buf.split_to(size as usize).freeze();
                self.after_configuration();
                return Ok(Some(Record::Command(Command::Packaged(blob))));
            }
            number => Command::Other { number, payload: Bytes::copy_from_slice(body.0) },
        };
        self.consume(5 + len);
        self.after_configuration();
        Ok(Some(Record::Command(command)))
    }

    fn discard(mut body: Peek<'_>) -> Option<Command> {
        let version = body.u8()?;
        let block = Bytes::copy_from_slice(body.name()?);
        if body.u8()? != 0 || !body.0.len().is_multiple_of(16) {
            return None;
        }
        let mut ranges = Vec::with_capacity(body.0.len() / 16);
        while let (Some(start), Some(len)) = (body.u64(), body.u64()) {
            ranges.push(Discard { start, len });
        }
        Some(Command::RamDiscard { version, block, ranges })
    }

    fn after_configuration(&mut self) {
        self.state = State::Section { configuration: Configuration::Closed };
    }

    fn footer(&mut self, id: u32) -> Result<Option<Record>, StreamError> {
        let mut peek = Peek(&self.buf);
        let Some(kind) = peek.u8() else { return Ok(None) };
        if kind != SEC_FOOTER {
            return Err(StreamError::Footer { at: self.at, id });
        }
        let Some(found) = peek.u32() else { return Ok(None) };
        if found != id {
            return Err(StreamError::Footer { at: self.at, id });
        }
        self.consume(5);
        self.after_configuration();
        Ok(Some(Record::Footer { id }))
    }

    /// One record of RAM section `section`, or of a preempt channel.
    fn ram_record(&mut self, section: Option<u32>) -> Result<Option<Record>, StreamError> {
        let mut peek = Peek(&self.buf);
        let Some(word) = peek.u64() else { return Ok(None) };
        let found = (word & FLAG_MASK) as u16;
        let offset = word & !FLAG_MASK;
        let unknown = StreamError::RecordFlags { at: self.at, flags: found };
        match found & !flags::CONTINUE {
            kind @ (flags::ZERO | flags::PAGE) => self.page(offset, kind, found),
            flags::MEM_SIZE if found == flags::MEM_SIZE && section.is_some() => {
                self.mem_size(offset)
            }
            flags::EOS if word == u64::from(flags::EOS) => {
                self.consume(8);
                if let Some(id) = section {
                    self.state = State::Footer { id };
                }
                Ok(Some(Record::Eos))
            }
            flags::MULTIFD_FLUSH if word == u64::from(flags::MULTIFD_FLUSH) => {
                self.consume(8);
                Ok(Some(Record::MultifdFlush))
            }
            _ => Err(unknown),
        }
    }

    fn page(&mut self, offset: u64, kind: u16, found: u16) -> Result<Option<Record>, StreamError> {
        let named = found & flags::CONTINUE == 0;
        let mut peek = Peek(&self.buf[8..]);
        let mut head = 8;
        let name = if named {
            let Some(name) = peek.name() else { return Ok(None) };
            head += 1 + name.len();
            Some(name)
        } else {
            None
        };
        let body = if kind == flags::ZERO { 1 } else { PAGE_SIZE };
        if peek.0.len() < body {
            return Ok(None);
        }
        let block = match (name, &self.block) {
            (None, None) => return Err(StreamError::NoBlock { at: self.at }),
            (None, Some(block)) => block.clone(),
            // The usual case: a name is repeated when a section begins.
            (Some(name), Some(block)) if block.as_ref() == name => block.clone(),
            (Some(name), _) => Bytes::copy_from_slice(name),
        };
        let content = if kind == flags::ZERO {
            let byte = peek.u8().unwrap_or_default();
            self.consume(head + 1);
            Content::Fill(byte)
        } else {
            self.consume(head);
            Content::Data(self.buf.split_to(PAGE_SIZE).freeze())
        };
        self.block = Some(block.clone());
        Ok(Some(Record::Page(Page { block, named, offset, content })))
    }

    fn mem_size(&mut self, total: u64) -> Result<Option<Record>, StreamError> {
        let mut peek = Peek(&self.buf[8..]);
        let mut blocks = Vec::new();
        let mut left = total;
        while left > 0 {
            if blocks.len() == self.limits.blocks {
                return Err(StreamError::TooLarge {
                    at: self.at,
                    what: "a list of RAM blocks",
                    len: blocks.len() as u64 + 1,
                    limit: self.limits.blocks as u64,
                });
            }
            let (Some(name), Some(used)) = (peek.name(), peek.u64()) else { return Ok(None) };
            let address = if self.ignore_shared {
                let Some(address) = peek.u64() else { return Ok(None) };
                Some(address)
            } else {
                None
            };
            let what = "the sizes of the RAM blocks do not add up";
            left = left.checked_sub(used).ok_or(StreamError::Malformed { at: self.at, what })?;
            blocks.push(RamBlock { name: Bytes::copy_from_slice(name), used, address });
        }
        let rest = peek.0.len();
        self.consume(self.buf.len() - rest);
        Ok(Some(Record::MemSize(MemSize { total, blocks })))
    }

    fn opaque(&mut self) -> Option<Record> {
        if self.buf.is_empty() {
            return None;
        }
        let n = self.buf.len().min(OPAQUE_CHUNK);
        Some(Record::Opaque(self.buf.split_to(n).freeze()))
    }

    fn consume(&mut self, n: usize) {
        self.buf.advance(n);
    }

    fn bound(&self, what: &'static str, len: u64, limit: u64) -> Result<(), StreamError> {
        if len <= limit {
            Ok(())
        } else {
            Err(StreamError::TooLarge { at: self.at, what, len, limit })
        }
    }
}

/// Reads from a slice without consuming the buffer behind it; `None` when it is too short.
pub(super) struct Peek<'a>(pub(super) &'a [u8]);

impl<'a> Peek<'a> {
    pub(super) fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|mut b| b.get_u16())
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|mut b| b.get_u32())
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take(8).map(|mut b| b.get_u64())
    }

    /// A name with its length in one byte.
    pub(super) fn name(&mut self) -> Option<&'a [u8]> {
        let n = self.u8()?;
        self.take(usize::from(n))
    }
}

#[cfg(test)]
mod tests;
