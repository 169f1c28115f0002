use std::time::Instant;

use godwit_qemu::stream::{Content, Limits, ReturnMessage, StreamParser};

use super::*;
use crate::relay::own::tests::{PAGES, guest, list, write};

const PAGE: u64 = 4096;
const M0: Bytes = Bytes::from_static(b"m0");
const ROM: Bytes = Bytes::from_static(b"rom");

fn encode(records: &[Record]) -> Vec<u8> {
    let mut out = Vec::new();
    records.iter().for_each(|r| r.encode(&mut out));
    out
}

fn page(block: &Bytes, n: u64, named: bool) -> Record {
    let content = Content::Data(vec![0x55; PAGE as usize].into());
    Record::Page(Page { block: block.clone(), named, offset: n * PAGE, content })
}

/// Up to the list of blocks.
fn setup() -> Vec<u8> {
    encode(&[
        Record::Header,
        Record::Configuration { machine: Bytes::from_static(b"pc-q35-10.0") },
        Record::SectionStart { id: 2, instance: 0, version: 4 },
        Record::MemSize(list(&[])),
        Record::Eos,
        Record::Footer { id: 2 },
    ])
}

fn discard(block: &Bytes, pages: u64) -> Record {
    let ranges = vec![Discard { start: 0, len: pages * PAGE }];
    Record::Command(Command::RamDiscard { version: 0, block: block.clone(), ranges })
}

/// A core that sends the own pages of a machine that has written pages 5 and 250.
fn core() -> (SourceCore, crate::relay::own::tests::Memory) {
    let (own, memory, _) = guest();
    write(&memory, 5, 0xaa);
    write(&memory, 250, 0xbb);
    let mut core = SourceCore::new(false, true);
    core.send_own(own);
    (core, memory)
}

/// What goes over the main lane: QEMU's stream as the destination reads it, and how many frames of
/// the other kinds there are.
fn take(core: &mut SourceCore, main: &mut StreamParser) -> (Vec<Record>, usize, usize) {
    let (mut records, mut fills, mut stale, mut frames) = (Vec::new(), 0, 0, 0);
    while let Some(out) = core.next_frame() {
        core.on_sent(&out, out.raw.len() as u64, Instant::now());
        frames += 1;
        match out.kind {
            Kind::Fill => fills += 1,
            Kind::Stale => stale += 1,
            _ => main.push(&out.raw),
        }
    }
    while let Some(record) = main.next().expect("a stream") {
        records.push(record);
    }
    core.on_ack(frames, Instant::now());
    (records, fills, stale)
}

fn pages(records: &[Record]) -> Vec<(Bytes, u64)> {
    let page = |r: &Record| match r {
        Record::Page(p) => {
            assert!(p.named, "{}", p.offset);
            Some((p.block.clone(), p.offset / PAGE))
        }
        _ => None,
    };
    records.iter().filter_map(page).collect()
}

/// Sends what there is to be sent before the switch.
fn until_round_over(core: &mut SourceCore, main: &mut StreamParser) -> Vec<Record> {
    let (which, file) = core.take_fills().expect("to be filled in");
    assert!(core.take_fills().is_none(), "once");
    let mut records = Vec::new();
    while core.may_put_own() {
        core.put_own().expect("read");
    }
    let (some, ..) = take(core, main);
    records.extend(some);
    for frame in crate::relay::fill::frames(&which, &file) {
        core.on_fill(Some(frame.expect("read")));
    }
    core.on_fill(None);
    let (_, fills, _) = take(core, main);
    assert_eq!((fills, core.phase()), (1, RelayPhase::PreCopy), "nothing is filled in yet");
    core.on_filled(1);
    let (some, ..) = take(core, main);
    records.extend(some);
    assert_eq!(core.phase(), RelayPhase::Drained);
    records
}

#[test]
fn own_pages_go_ahead_and_of_qemus_stream_only_what_has_become_stale() {
    let (mut core, memory) = core();
    let mut main = StreamParser::main(Limits::default());
    core.on_main(&setup()).expect("valid");
    assert!(!core.may_read(), "QEMU's pass is left unread");
    let (records, ..) = take(&mut core, &mut main);
    assert_eq!(records.last(), Some(&Record::Command(Command::Ping(PING_EMPTIED))));
    let records = until_round_over(&mut core, &mut main);
    let wanted = [(M0, 5), (M0, 250), (ROM, 0), (ROM, 1)];
    assert_eq!(pages(&records), wanted);
    assert_eq!(records.last(), Some(&Record::Footer { id: 2 }));
    assert_eq!(core.counts().known_pages, 199);

    assert!(core.proceed(Vec::new()));
    assert!(core.may_read());
    write(&memory, 5, 0xcc);
    write(&memory, 7, 0xdd);
    // QEMU notices after some of its pass.
    let pass = [Record::SectionPart { id: 2 }, page(&M0, 0, true), page(&M0, 1, false)];
    let close = [Record::Eos, Record::Footer { id: 2 }];
    core.on_main(&encode(&[&pass[..], &close].concat())).expect("valid");
    let (records, ..) = take(&mut core, &mut main);
    assert_eq!(pages(&records), [(M0, 0), (M0, 1)]);
    let tail = [
        Record::Command(Command::SwitchoverStart),
        discard(&M0, PAGES),
        discard(&ROM, 2),
        Record::Command(Command::Ping(2)),
        Record::Command(Command::Packaged(Bytes::from_static(&[9; 100]))),
    ];
    core.on_main(&encode(&tail)).expect("valid");
    let (records, _, stale) = take(&mut core, &mut main);
    assert_eq!(stale, 1);
    let discards: Vec<_> = records
        .iter()
        .filter_map(|r| match r {
            Record::Command(Command::RamDiscard { block, ranges, .. }) => {
                Some((block.clone(), ranges.iter().map(|r| r.start / PAGE).collect::<Vec<_>>()))
            }
            _ => None,
        })
        .collect();
    assert_eq!(discards, [(M0, vec![5, 7])]);
    assert!(matches!(records.last(), Some(Record::Command(Command::Packaged(_)))));
    assert_eq!(core.counts().discarded_bytes, 2 * PAGE);

    // The rest of its memory as QEMU sends it.
    core.on_preempt_open();
    let mut demanded = Vec::new();
    for (n, named) in [(5, true), (6, false)] {
        page(&M0, n, named).encode(&mut demanded);
    }
    core.on_preempt(&demanded).expect("valid");
    let all: Vec<Record> = (0..PAGES).map(|n| page(&M0, n, n == 0)).collect();
    let part =
        [&[Record::SectionPart { id: 2 }][..], &all, &[page(&ROM, 0, true)], &close].concat();
    core.on_main(&encode(&part)).expect("valid");
    let mut preempt = StreamParser::preempt(Limits::default());
    let mut records = Vec::new();
    while let Some(out) = core.next_frame() {
        match out.channel {
            Channel::Main => main.push(&out.raw),
            Channel::Preempt => preempt.push(&out.raw),
        }
    }
    while let Some(record) = preempt.next().expect("a stream") {
        records.push(record);
    }
    assert_eq!(pages(&records), [(M0, 5)]);
    records.clear();
    while let Some(record) = main.next().expect("a stream") {
        records.push(record);
    }
    assert_eq!(pages(&records), [(M0, 7)]);
}

#[test]
fn own_pages_go_into_the_part_that_qemu_has_begun() {
    let (mut core, _) = core();
    let mut main = StreamParser::main(Limits::default());
    let mut begun = setup();
    let pass = [Record::SectionPart { id: 2 }, page(&M0, 0, true), page(&M0, 1, false)];
    begun.extend(encode(&pass));
    let rest = begun.split_off(begun.len() - 100);
    core.on_main(&begun).expect("valid");
    assert!(!core.may_read());
    let records = until_round_over(&mut core, &mut main);
    let named = pages(&records);
    assert_eq!(named, [(M0, 0), (M0, 5), (M0, 250), (ROM, 0), (ROM, 1)]);
    let footers = records.iter().filter(|r| **r == Record::Footer { id: 2 }).count();
    assert_eq!(footers, 1, "that of the list of blocks: the part is still open");
    assert!(core.proceed(Vec::new()));
    core.on_main(&rest).expect("valid");
    core.on_main(&encode(&[Record::Eos])).expect("valid");
    let (records, ..) = take(&mut core, &mut main);
    // It names its block, since another one's pages came between.
    assert_eq!(pages(&records), [(M0, 1)]);
}

#[test]
fn a_part_that_is_closing_is_read_to_its_end() {
    let (mut core, _) = core();
    let mut begun = setup();
    begun.extend(encode(&[Record::SectionPart { id: 2 }, page(&M0, 0, true), Record::Eos]));
    core.on_main(&begun).expect("valid");
    assert!(core.may_read() && !core.may_put_own());
    core.on_main(&encode(&[Record::Footer { id: 2 }])).expect("valid");
    assert!(!core.may_read() && core.may_put_own());
}

#[test]
fn a_drain_waits_only_for_what_the_destination_fills_in() {
    let (mut core, _) = core();
    let mut main = StreamParser::main(Limits::default());
    core.on_main(&setup()).expect("valid");
    core.drain();
    assert!(!core.may_put_own());
    assert_eq!(core.phase(), RelayPhase::PreCopy);
    core.on_fill(None);
    let _ = take(&mut core, &mut main);
    assert_eq!(core.phase(), RelayPhase::Drained);
    let mut back = Vec::new();
    ReturnMessage::Pong(3).encode(&mut back);
    core.on_back(&back).expect("valid");
}

#[test]
fn a_switch_that_is_wanted_before_the_blocks_are_known_leaves_all_to_qemu() {
    let (mut core, _) = core();
    core.drain();
    assert!(core.proceed(Vec::new()));
    core.on_main(&setup()).expect("valid");
    assert!(core.may_read() && core.take_fills().is_none());
    let mut main = StreamParser::main(Limits::default());
    let tail = [
        Record::Command(Command::SwitchoverStart),
        discard(&M0, PAGES),
        Record::Command(Command::Packaged(Bytes::from_static(&[9; 100]))),
        Record::SectionPart { id: 2 },
        page(&M0, 7, true),
    ];
    core.on_main(&encode(&tail)).expect("valid");
    let (records, fills, stale) = take(&mut core, &mut main);
    assert_eq!((fills, stale, pages(&records)), (0, 0, vec![(M0, 7)]));
    assert!(records.contains(&discard(&M0, PAGES)));
}
