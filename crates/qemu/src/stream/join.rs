//! Makes a whole saved machine of its devices, which were saved alone, and its RAM blocks, which
//! were read from outside.
//!
//! ```text
//! template   header, CONFIGURATION, ram START { sizes }     of any machine of the same manifest
//! blocks     ram END { pages of every block but the memory }
//! devices    FULL sections, EOF                             less their own header
//! ```
//!
//! The result loads as what [`crate::Machine::save_state`] writes of a machine with shared memory.

use bytes::Bytes;
use godwit_types::PAGE_SIZE;

use super::{Content, Limits, Page, Record, StreamError, StreamParser};

/// Magic and version, before the first section.
const HEADER: usize = 8;
/// What ends the sections.
const EOF: u8 = 0x00;
/// An empty description of the machine: QEMU wants one, and reads it for nothing.
const NO_DESCRIPTION: &[u8] = b"\x06\0\0\0\x02{}";
/// The section that says what the machine did when it was saved, up to its first value, the length
/// of the name of its state.
const GLOBAL_STATE: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";
/// That it ran: devices that are saved alone always say so.
const RAN: &[u8] = b"\0\0\0\x08running\0";
/// That it stood still, as a machine does whose state is saved. One that loads the other runs at
/// once.
const STOOD: &[u8] = b"\0\0\0\x07paused\0\0";

/// A whole state of `devices` (from [`crate::Machine::save_devices`]) and of the contents of
/// `blocks`; `memory` is the block that is left out. `template` is the state of a machine of the
/// same manifest.
///
/// # Errors
/// [`StreamError`] when the template or the devices are not what they should be, and
/// [`StreamError::CannotJoin`] when `blocks` are not those of the template.
pub fn join_devices(
    template: &[u8],
    memory: &str,
    blocks: &[(String, Vec<u8>)],
    devices: &[u8],
) -> Result<Vec<u8>, StreamError> {
    let cannot = |why| StreamError::CannotJoin { why };
    let mut out = Vec::with_capacity(devices.len() + (1 << 20));
    let section = prefix(template, memory, blocks, &mut out)?;
    Record::SectionEnd { id: section }.encode(&mut out);
    for (name, content) in blocks {
        if content.len() % PAGE_SIZE != 0 {
            return Err(cannot("a RAM block is not of whole pages"));
        }
        let block = Bytes::copy_from_slice(name.as_bytes());
        for (n, page) in content.chunks(PAGE_SIZE).enumerate() {
            let zero = page.iter().all(|b| *b == 0);
            let content =
                if zero { Content::Fill(0) } else { Content::Data(Bytes::copy_from_slice(page)) };
            let offset = (n * PAGE_SIZE) as u64;
            Record::Page(Page { block: block.clone(), named: n == 0, offset, content })
                .encode(&mut out);
        }
    }
    Record::Eos.encode(&mut out);
    Record::Footer { id: section }.encode(&mut out);

    let mut header = Vec::new();
    Record::Header.encode(&mut header);
    let sections = devices.strip_prefix(&header[..HEADER]);
    let sections = sections.ok_or_else(|| cannot("the devices have another header"))?;
    if sections.last() != Some(&EOF) {
        return Err(cannot("the devices end too early"));
    }
    let from = out.len();
    out.extend_from_slice(sections);
    mark_as_stopped(&mut out[from..])?;
    out.extend_from_slice(NO_DESCRIPTION);
    Ok(out)
}

/// Copies the template up to the end of its list of blocks, with the sizes of `blocks`; gives the
/// number of the RAM section.
fn prefix(
    template: &[u8],
    memory: &str,
    blocks: &[(String, Vec<u8>)],
    out: &mut Vec<u8>,
) -> Result<u32, StreamError> {
    let cannot = |why| StreamError::CannotJoin { why };
    let mut parser = StreamParser::main(Limits::default());
    parser.push(template);
    let mut sizes = false;
    loop {
        let mut record = parser.next()?.ok_or_else(|| cannot("the template ends too early"))?;
        match &mut record {
            Record::MemSize(list) => {
                list.total = 0;
                let mut known = 0;
                for block in &mut list.blocks {
                    if block.name.as_ref() == memory.as_bytes() {
                        known += 1;
                    }
                    let here = blocks.iter().find(|(name, _)| name.as_bytes() == &block.name[..]);
                    if let Some((_, content)) = here {
                        block.used = content.len() as u64;
                        known += 1;
                    }
                    list.total += block.used;
                }
                if known != list.blocks.len() || known != blocks.len() + 1 {
                    return Err(cannot("the machine has other RAM blocks than the template"));
                }
                sizes = true;
            }
            Record::Opaque(_) => return Err(cannot("the template has devices before memory")),
            _ => {}
        }
        record.encode(out);
        if let Record::Footer { id } = record {
            return if sizes { Ok(id) } else { Err(cannot("the template has no sizes")) };
        }
    }
}

/// The RAM blocks that a state of `template`'s machine has beside `memory`, in its order.
///
/// # Errors
/// As [`join_devices`].
pub fn blocks_beside(template: &[u8], memory: &str) -> Result<Vec<String>, StreamError> {
    let mut parser = StreamParser::main(Limits::default());
    parser.push(template);
    loop {
        let why = "the template ends too early";
        match parser.next()?.ok_or(StreamError::CannotJoin { why })? {
            Record::MemSize(list) => {
                let names = list.blocks.iter().map(|b| &b.name[..]);
                let beside = names.filter(|name| *name != memory.as_bytes());
                return Ok(beside.map(|n| String::from_utf8_lossy(n).into_owned()).collect());
            }
            Record::Opaque(_) => {
                let why = "the template has devices before memory";
                return Err(StreamError::CannotJoin { why });
            }
            _ => {}
        }
    }
}

/// Has the machine of these sections stand still once they are loaded.
fn mark_as_stopped(sections: &mut [u8]) -> Result<(), StreamError> {
    let mark = [GLOBAL_STATE, RAN].concat();
    let found: Vec<usize> = (0..sections.len().saturating_sub(mark.len()))
        .filter(|at| sections[*at..].starts_with(&mark))
        .collect();
    let [at] = found[..] else {
        return Err(StreamError::CannotJoin { why: "the devices do not say once that it ran" });
    };
    let at = at + GLOBAL_STATE.len();
    sections[at..at + STOOD.len()].copy_from_slice(STOOD);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{MemSize, RamBlock};

    fn encode(records: &[Record]) -> Vec<u8> {
        let mut out = Vec::new();
        records.iter().for_each(|r| r.encode(&mut out));
        out
    }

    fn template() -> Vec<Record> {
        let block = |name: &'static str, used| RamBlock {
            name: Bytes::from_static(name.as_bytes()),
            used,
            address: None,
        };
        let blocks = vec![block("m0", 8192), block("rom", 4096)];
        vec![
            Record::Header,
            Record::Configuration { machine: Bytes::from_static(b"pc-q35-10.0") },
            Record::SectionStart { id: 2, instance: 0, version: 4 },
            Record::MemSize(MemSize { total: 3 * 4096, blocks }),
            Record::Eos,
            Record::Footer { id: 2 },
            Record::SectionEnd { id: 2 },
            Record::Page(Page {
                block: Bytes::from_static(b"rom"),
                named: true,
                offset: 0,
                content: Content::Fill(0),
            }),
            Record::Eos,
            Record::Footer { id: 2 },
            Record::Opaque(Bytes::from_static(b"\x04\0\0\0\x09\x04cpu0old")),
        ]
    }

    fn devices() -> Vec<u8> {
        let mut all = encode(&[Record::Header]);
        all.extend_from_slice(b"\x04\0\0\0\x09\x04cpu0new\x04\0\0\0\x0a");
        all.extend_from_slice(&[GLOBAL_STATE, RAN].concat());
        all.extend_from_slice(b"rest\0");
        all
    }

    #[test]
    fn devices_and_blocks_become_the_whole_state_of_a_stopped_machine() {
        let blocks = [("rom".to_owned(), [vec![7; 4096], vec![0; 4096]].concat())];
        let whole = join_devices(&encode(&template()), "m0", &blocks, &devices()).expect("it fits");
        let mut parser = StreamParser::main(Limits::default());
        parser.push(&whole);
        let mut records = Vec::new();
        while let Some(r) = parser.next().expect("valid") {
            records.push(r);
        }
        assert!(matches!(&records[3], Record::MemSize(l) if l.total == 4 * 4096
            && l.blocks[1].used == 8192 && l.blocks[0].used == 8192));
        assert_eq!(records[6], Record::SectionEnd { id: 2 });
        let pages: Vec<_> = records.iter().filter(|r| matches!(r, Record::Page(_))).collect();
        assert!(matches!(pages[..], [Record::Page(a), Record::Page(b)]
            if a.named && !b.named && b.offset == 4096 && b.content == Content::Fill(0)));
        let Some(Record::Opaque(rest)) = records.last() else { panic!("{records:?}") };
        let text = String::from_utf8_lossy(rest);
        assert!(text.contains("cpu0new") && text.contains("paused") && !text.contains("running"));
        assert!(rest.ends_with(NO_DESCRIPTION));
        assert_eq!(blocks_beside(&encode(&template()), "m0").expect("a list"), ["rom"]);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let rom = || ("rom".to_owned(), vec![7; 4096]);
        let template = encode(&template());
        let join = |blocks: &[_], devices: &[u8]| join_devices(&template, "m0", blocks, devices);
        assert!(join(&[rom()], &devices()).is_ok());
        assert!(join(&[], &devices()).is_err());
        assert!(join(&[rom(), ("vram".to_owned(), vec![7; 4096])], &devices()).is_err());
        assert!(join(&[("rom".to_owned(), vec![7; 4095])], &devices()).is_err());
        assert!(join(&[rom()], &devices()[1..]).is_err());
        assert!(join(&[rom()], &devices()[..40]).is_err());
        let stands = encode(&[Record::Header]);
        assert!(join(&[rom()], &[&stands[..], b"\0"].concat()).is_err());
        assert!(join_devices(&template[..30], "m0", &[rom()], &devices()).is_err());
    }
}
