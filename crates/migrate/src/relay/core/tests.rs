use super::*;
use godwit_qemu::stream::{Discard, MemSize, Page, RamBlock};

const M0: &[u8] = b"m0";

fn encode(records: &[Record]) -> Vec<u8> {
    let mut out = Vec::new();
    records.iter().for_each(|r| r.encode(&mut out));
    out
}

fn page(n: u64, named: bool) -> Record {
    let content = Content::Data(Bytes::from(vec![n as u8 + 1; 4096]));
    Record::Page(Page { block: Bytes::from_static(M0), named, offset: n << 12, content })
}

fn setup(pages: u64) -> Vec<Record> {
    let block = RamBlock { name: Bytes::from_static(M0), used: pages << 12, address: None };
    vec![
        Record::Header,
        Record::Configuration { machine: Bytes::from_static(b"pc-q35-10.0") },
        Record::Command(Command::OpenReturnPath),
        Record::Command(Command::Ping(1)),
        Record::SectionStart { id: 2, instance: 0, version: 4 },
        Record::MemSize(MemSize { total: pages << 12, blocks: vec![block] }),
        Record::Eos,
        Record::Footer { id: 2 },
    ]
}

fn part(pages: impl IntoIterator<Item = u64>) -> Vec<Record> {
    let mut out = vec![Record::SectionPart { id: 2 }];
    out.extend(pages.into_iter().enumerate().map(|(i, n)| page(n, i == 0)));
    out.extend([Record::Eos, Record::Footer { id: 2 }]);
    out
}

/// Takes what is to be sent; the far side gets it at once but acknowledges nothing.
fn take(core: &mut SourceCore, main: &mut Vec<u8>, now: Instant) -> u64 {
    let mut frames = 0;
    while let Some(out) = core.next_frame() {
        core.on_sent(out.channel, out.kind, out.raw.len() as u64, now);
        if out.channel == Channel::Main {
            main.extend_from_slice(&out.raw);
            frames += 1;
        }
    }
    core.look_drained();
    frames
}

#[test]
fn a_migration_goes_through_its_phases_and_every_byte_through_the_relay() {
    let now = Instant::now();
    let mut core = SourceCore::new(false, true);
    let (mut sent, mut got) = (Vec::new(), Vec::new());
    assert!(core.may_read());

    let mut wire = encode(&setup(4));
    wire.extend(encode(&part(0..3)));
    core.on_main(&wire).expect("valid");
    sent.extend_from_slice(&wire);
    assert_eq!(core.phase(), RelayPhase::PreCopy);

    // The last page, and the first of a second round in the same read: all of it is passed on.
    let wire = encode(&part([3, 0]));
    core.on_main(&wire).expect("valid");
    sent.extend_from_slice(&wire);
    assert_eq!(core.phase(), RelayPhase::RoundOver);
    assert!(!core.may_read(), "QEMU is held");
    let frames = take(&mut core, &mut got, now);
    assert_eq!(core.phase(), RelayPhase::RoundOver, "not acknowledged yet");
    core.on_ack(frames, now);
    assert_eq!(core.phase(), RelayPhase::Drained);

    assert!(core.proceed(vec![1, 9]));
    assert!(!core.proceed(Vec::new()), "only once");
    assert!(core.may_read());
    let tail = [
        Record::Command(Command::SwitchoverStart),
        Record::Command(Command::RamDiscard {
            version: 0,
            block: Bytes::from_static(M0),
            ranges: vec![Discard { start: 0, len: 8192 }],
        }),
        Record::Command(Command::Ping(2)),
        Record::Command(Command::Packaged(Bytes::from(vec![9; 700 << 10]))),
    ];
    let wire = encode(&tail);
    core.on_main(&wire).expect("valid");
    sent.extend_from_slice(&wire);
    assert_eq!(core.phase(), RelayPhase::Stopped);
    // Of the pages that are needed first, the one that is missing is asked for at once.
    let mut due = Vec::new();
    let block = Some(Bytes::from_static(M0));
    ReturnMessage::ReqPages { block, start: 4096, len: 4096 }.encode(&mut due);
    assert_eq!(core.take_asked(), due);
    assert!(core.take_asked().is_empty());
    let frames = take(&mut core, &mut got, now);
    assert!(frames >= 3, "the package is cut into frames");
    core.on_ack(frames, now);
    assert!(core.counts().bytes.device_state >= 700 << 10);
    assert_eq!(core.counts().discarded_bytes, 8192);

    let mut back = Vec::new();
    ReturnMessage::Pong(1).encode(&mut back);
    ReturnMessage::Pong(3).encode(&mut back);
    core.on_back(&back[..9]).expect("valid");
    assert_eq!(core.phase(), RelayPhase::Stopped);
    core.on_back(&back[9..]).expect("valid");
    assert_eq!(core.phase(), RelayPhase::Committed);

    let mut wire = encode(&part([0, 1]));
    wire.extend(encode(&[Record::SectionEnd { id: 2 }, Record::Eos, Record::Footer { id: 2 }]));
    wire.extend(encode(&[Record::Eof]));
    core.on_main(&wire).expect("valid");
    sent.extend_from_slice(&wire);
    take(&mut core, &mut got, now);
    assert!(core.stream_ended());
    let mut back = Vec::new();
    ReturnMessage::Shut(0).encode(&mut back);
    core.on_back(&back).expect("valid");
    assert_eq!(core.phase(), RelayPhase::MemoryDone);
    assert_eq!(got, sent);
}

#[test]
fn demanded_pages_overtake_bulk() {
    let mut core = SourceCore::new(false, true);
    core.on_main(&encode(&setup(4))).expect("valid");
    core.on_preempt_open();
    core.on_preempt(&encode(&[page(2, true)])).expect("valid");
    let order: Vec<_> =
        std::iter::from_fn(|| core.next_frame()).map(|o| (o.channel, o.kind)).collect();
    assert_eq!(
        order,
        [
            (Channel::Preempt, Kind::Open),
            (Channel::Preempt, Kind::Memory),
            (Channel::Main, Kind::Memory)
        ]
    );
    assert_eq!(core.counts().demanded_pages, 1);
}

#[test]
fn qemu_is_not_read_while_the_window_is_full() {
    let now = Instant::now();
    let mut core = SourceCore::new(false, true);
    core.on_main(&encode(&setup(1000))).expect("valid");
    core.on_main(&encode(&part(0..200))).expect("valid");
    let frames = take(&mut core, &mut Vec::new(), now);
    assert!(!core.may_read());
    core.on_ack(frames, now + std::time::Duration::from_millis(30));
    assert!(core.may_read());
}

#[test]
fn a_drain_can_be_asked_for_before_the_round_is_over() {
    let mut core = SourceCore::new(false, true);
    core.on_main(&encode(&setup(1000))).expect("valid");
    core.drain();
    assert_eq!(core.phase(), RelayPhase::RoundOver);
    take(&mut core, &mut Vec::new(), Instant::now());
    core.on_ack(1, Instant::now());
    assert_eq!(core.phase(), RelayPhase::Drained);
}
