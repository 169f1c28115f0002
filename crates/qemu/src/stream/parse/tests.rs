use super::*;
use proptest::prelude::*;

fn parse_all(
    mut parser: StreamParser,
    wire: &[u8],
    cut: usize,
) -> Result<Vec<Record>, StreamError> {
    let mut seen = Vec::new();
    for piece in wire.chunks(cut.max(1)) {
        parser.push(piece);
        while let Some(record) = parser.next()? {
            seen.push(record);
        }
    }
    parser.finish()?;
    Ok(seen)
}

fn encode(records: &[Record]) -> Vec<u8> {
    let mut out = Vec::new();
    records.iter().for_each(|r| r.encode(&mut out));
    out
}

fn name() -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(any::<u8>(), 0..12).prop_map(Bytes::from)
}

/// Page records of one channel; the block that CONTINUE means is tracked across them.
fn pages() -> impl Strategy<Value = Vec<(bool, Bytes, u64, Option<u8>)>> {
    let one = (any::<bool>(), name(), 0u64..1 << 40, proptest::option::of(any::<u8>()));
    proptest::collection::vec(one, 0..12)
}

fn page_records(
    raw: Vec<(bool, Bytes, u64, Option<u8>)>,
    block: &mut Option<Bytes>,
) -> Vec<Record> {
    let mut out = Vec::new();
    for (named, name, page, data) in raw {
        let named = named || block.is_none();
        let name = if named { name } else { block.clone().expect("checked") };
        *block = Some(name.clone());
        let content = match data {
            Some(byte) => Content::Data(Bytes::from(vec![byte; PAGE_SIZE])),
            None => Content::Fill(0),
        };
        out.push(Record::Page(Page { block: name, named, offset: page << 12, content }));
    }
    out
}

fn command() -> impl Strategy<Value = Command> {
    let payload = || proptest::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
    let range = (any::<u64>(), any::<u64>()).prop_map(|(start, len)| Discard { start, len });
    prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        payload().prop_map(Command::PostcopyAdvise),
        Just(Command::PostcopyListen),
        Just(Command::PostcopyRun),
        (any::<u8>(), name(), proptest::collection::vec(range, 0..12))
            .prop_map(|(version, block, ranges)| Command::RamDiscard { version, block, ranges }),
        payload().prop_map(Command::Packaged),
        Just(Command::PostcopyResume),
        name().prop_map(|block| Command::RecvBitmap { block }),
        Just(Command::SwitchoverStart),
        (12u16.., payload()).prop_map(|(number, payload)| Command::Other { number, payload }),
    ]
}

fn main_stream() -> impl Strategy<Value = Vec<Record>> {
    let element = prop_oneof![command().prop_map(Ok), pages().prop_map(Err)];
    let sizes = proptest::collection::vec((name(), 1u64..1 << 20), 1..6);
    (sizes, any::<bool>(), any::<u32>(), proptest::collection::vec(element, 0..12)).prop_map(
        |(sizes, shared, id, elements)| {
            let blocks: Vec<RamBlock> = sizes
                .into_iter()
                .map(|(name, pages)| RamBlock {
                    name,
                    used: pages << 12,
                    address: shared.then_some(pages),
                })
                .collect();
            let total = blocks.iter().map(|b| b.used).sum();
            let mut out = vec![
                Record::Header,
                Record::Configuration { machine: Bytes::from_static(b"virt-10.0") },
                Record::Subsection(Subsection::TargetPageBits { version: 1, bits: 12 }),
                Record::Subsection(Subsection::Uuid { version: 1, uuid: [7; 16] }),
            ];
            if shared {
                out.push(Record::Subsection(Subsection::Capabilities {
                    version: 1,
                    names: vec![Bytes::from_static(b"x-ignore-shared")],
                }));
            }
            out.push(Record::SectionStart { id, instance: 0, version: 4 });
            out.push(Record::MemSize(MemSize { total, blocks }));
            out.extend([Record::Eos, Record::Footer { id }]);
            let mut block = None;
            for element in elements {
                match element {
                    Ok(command) => out.push(Record::Command(command)),
                    Err(pages) => {
                        out.push(Record::SectionPart { id });
                        out.extend(page_records(pages, &mut block));
                        out.extend([Record::Eos, Record::Footer { id }]);
                    }
                }
            }
            out.extend([
                Record::SectionEnd { id },
                Record::Eos,
                Record::Footer { id },
                Record::Eof,
            ]);
            out
        },
    )
}

proptest! {
    #[test]
    fn a_main_channel_reads_as_it_was_written_however_it_is_cut(
        records in main_stream(),
        cut in 1usize..9000,
    ) {
        let wire = encode(&records);
        let seen = parse_all(StreamParser::main(Limits::default()), &wire, cut).expect("valid");
        prop_assert_eq!(&seen, &records);
        prop_assert_eq!(encode(&seen), wire);
    }

    #[test]
    fn a_preempt_channel_reads_as_it_was_written(raw in pages(), cut in 1usize..9000) {
        let mut records = page_records(raw, &mut None);
        records.push(Record::Eos);
        let wire = encode(&records);
        let seen = parse_all(StreamParser::preempt(Limits::default()), &wire, cut).expect("valid");
        prop_assert_eq!(seen, records);
    }

    #[test]
    fn a_damaged_stream_is_an_error_or_the_same_length_never_a_panic(
        records in main_stream(),
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        cut in 1usize..5000,
    ) {
        let mut wire = encode(&records);
        for (at, with) in flips {
            let at = at.index(wire.len());
            wire[at] ^= with;
        }
        let mut parser = StreamParser::main(Limits::default());
        let mut out = Vec::new();
        'pieces: for piece in wire.chunks(cut) {
            parser.push(piece);
            loop {
                match parser.next() {
                    Ok(Some(record)) => record.encode(&mut out),
                    Ok(None) => break,
                    Err(e) => {
                        prop_assert_eq!(parser.next(), Err(e));
                        break 'pieces;
                    }
                }
            }
        }
        // Whatever came out is exactly what went in.
        prop_assert_eq!(out.as_slice(), &wire[..out.len()]);
        prop_assert_eq!(out.len() as u64, parser.position());
    }

    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..400)) {
        for mut parser in [
            StreamParser::main(Limits::default()),
            StreamParser::resumed(Limits::default()),
            StreamParser::preempt(Limits::default()),
        ] {
            parser.push(&noise);
            while let Ok(Some(_)) = parser.next() {}
        }
    }
}

#[test]
fn device_sections_outside_a_package_are_handed_through() {
    let mut wire = encode(&[Record::Header]);
    wire.extend_from_slice(b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02body and all the rest");
    let mut parser = StreamParser::main(Limits::default());
    parser.push(&wire);
    assert_eq!(parser.next(), Ok(Some(Record::Header)));
    let Ok(Some(Record::Opaque(rest))) = parser.next() else { panic!("handed through") };
    assert_eq!(rest, &wire[8..]);
    assert_eq!(parser.passing_through(), Some(PassReason::DeviceSection));
}

#[test]
fn a_resumed_channel_knows_no_header_and_any_ram_section() {
    let records = [
        Record::Command(Command::RecvBitmap { block: Bytes::from_static(b"m0") }),
        Record::Command(Command::PostcopyResume),
        Record::SectionPart { id: 2 },
        Record::Eos,
        Record::Footer { id: 2 },
    ];
    let seen = parse_all(StreamParser::resumed(Limits::default()), &encode(&records), 3);
    assert_eq!(seen.expect("valid"), records);
    let stray = encode(&[Record::Header, Record::SectionPart { id: 2 }]);
    let err = parse_all(StreamParser::main(Limits::default()), &stray, 99).expect_err("stray");
    assert_eq!(err, StreamError::UnknownSection { at: 8, id: 2 });
}

#[test]
fn what_is_too_large_is_refused_before_it_is_held() {
    let limits = Limits { packaged: 1000, ..Limits::default() };
    let mut parser = StreamParser::main(limits);
    parser.push(&encode(&[Record::Header]));
    parser.push(&[0x08, 0, 7, 0, 4, 0, 0, 3, 0xe9]);
    assert_eq!(parser.next(), Ok(Some(Record::Header)));
    let err = parser.next().expect_err("1001 bytes");
    assert!(matches!(err, StreamError::TooLarge { len: 1001, limit: 1000, .. }), "{err}");
}
