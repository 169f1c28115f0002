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

fn words(messages: &[ReturnMessage]) -> Vec<u8> {
    let mut out = Vec::new();
    messages.iter().for_each(|m| m.encode(&mut out));
    out
}

/// Takes what is to be sent; the far side gets it at once but acknowledges nothing.
fn take(core: &mut SourceCore, main: &mut Vec<u8>, now: Instant) -> u64 {
    let mut frames = 0;
    while let Some(out) = core.next_frame() {
        core.on_sent(&out, out.raw.len() as u64, now);
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

    assert!(core.take_asked().is_empty(), "QEMU may not switch yet");
    assert!(core.proceed(vec![1, 9]));
    assert!(!core.proceed(Vec::new()), "only once");
    assert_eq!(core.take_asked(), words(&[ReturnMessage::SwitchoverAck]));
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

/// A core that was let switch after `pages` pages.
fn switching(pages: u64) -> SourceCore {
    let mut core = SourceCore::new(false, true);
    core.on_main(&encode(&setup(pages))).expect("valid");
    core.on_main(&encode(&part(0..pages))).expect("valid");
    let frames = take(&mut core, &mut Vec::new(), Instant::now());
    core.on_ack(frames, Instant::now());
    assert!(core.proceed(Vec::new()));
    assert_eq!(core.take_asked(), words(&[ReturnMessage::SwitchoverAck]));
    core
}

/// Device state in the open, as QEMU ends pre-copy: pages, the end of memory, devices, the end.
fn open_end(devices: &[u8]) -> Vec<u8> {
    let mut wire =
        encode(&[Record::Command(Command::SwitchoverStart), Record::SectionEnd { id: 2 }]);
    wire.extend(encode(&[page(1, true), page(3, false), Record::Eos, Record::Footer { id: 2 }]));
    wire.extend_from_slice(devices);
    let text = br#"{"page_size": 4096, "devices": []}"#;
    wire.extend_from_slice(&[0, 6, 0, 0, 0, text.len() as u8]);
    wire.extend_from_slice(text);
    wire
}

/// What the destination must get for it, frame by frame of the main channel.
fn converted(devices: &[u8]) -> Vec<u8> {
    let mut blob = encode(&[Record::Command(Command::PostcopyListen)]);
    blob.extend_from_slice(devices);
    blob.extend(encode(&[
        Record::Command(Command::Ping(PONG_COMMIT)),
        Record::Command(Command::PostcopyRun),
    ]));
    let block = Bytes::from_static(M0);
    let ranges = vec![Discard { start: 3 << 12, len: 4096 }];
    encode(&[
        Record::Command(Command::SwitchoverStart),
        Record::SectionPart { id: 2 },
        page(1, true),
        page(3, false),
        Record::Eos,
        Record::Footer { id: 2 },
        Record::Command(Command::RamDiscard { version: 0, block, ranges }),
        Record::SectionPart { id: 2 },
        page(3, true),
        Record::Eos,
        Record::Footer { id: 2 },
        Record::Command(Command::Ping(2)),
        Record::Command(Command::Packaged(blob.into())),
        Record::SectionEnd { id: 2 },
        Record::Eos,
        Record::Footer { id: 2 },
        Record::Eof,
    ])
}

#[test]
fn a_qemu_that_ends_as_pre_copy_looks_like_post_copy_wherever_its_bytes_are_cut() {
    let now = Instant::now();
    let devices = [&[4, 0, 0, 0, 9, 5, b't', b'i', b'm', b'e', b'r'][..], &[7; 300]].concat();
    let (wire, due) = (open_end(&devices), converted(&devices));
    for cut in 0..wire.len() {
        let mut core = switching(4);
        let mut got = Vec::new();
        for piece in [&wire[..cut], &wire[cut..]] {
            assert!(!core.released());
            core.on_main(piece).expect("valid");
            // QEMU waits for nobody while it holds its lock, however full the window is.
            assert!(core.may_read());
            let _ = take(&mut core, &mut got, now);
        }
        assert_eq!(got, due, "cut at {cut}");
        assert!(core.released() && core.stream_ended() && core.has_device_state());
        // QEMU is done; the destination is not.
        assert_eq!(core.take_asked(), words(&[ReturnMessage::Shut(0)]));
        assert_eq!((core.phase(), core.shut()), (RelayPhase::Stopped, None));
        core.on_back(&words(&[ReturnMessage::Pong(2), ReturnMessage::Pong(3)])).expect("valid");
        assert_eq!(core.phase(), RelayPhase::Committed);
        core.on_back(&words(&[ReturnMessage::Shut(0)])).expect("valid");
        assert_eq!(core.phase(), RelayPhase::MemoryDone);
    }
}

#[test]
fn post_copy_is_passed_on_as_it_is_wherever_its_bytes_are_cut() {
    let now = Instant::now();
    let block = Bytes::from_static(M0);
    let mut wire = encode(&[
        Record::Command(Command::SwitchoverStart),
        Record::Command(Command::RamDiscard {
            version: 0,
            block,
            ranges: vec![Discard { start: 0, len: 8192 }],
        }),
        Record::Command(Command::Ping(2)),
        Record::Command(Command::Packaged(Bytes::from(vec![9; 300]))),
        Record::Command(Command::Ping(4)),
    ]);
    wire.extend(encode(&part([0, 1])));
    wire.extend(encode(&[
        Record::SectionEnd { id: 2 },
        Record::Eos,
        Record::Footer { id: 2 },
        Record::Eof,
    ]));
    for cut in 0..wire.len() {
        let mut core = switching(4);
        let mut got = Vec::new();
        for piece in [&wire[..cut], &wire[cut..]] {
            core.on_main(piece).expect("valid");
            let _ = take(&mut core, &mut got, now);
        }
        assert_eq!(got, wire, "cut at {cut}");
        assert!(!core.released() && core.has_device_state() && core.stream_ended());
        assert!(core.take_asked().is_empty());
    }
}

#[test]
fn the_end_of_memory_is_never_parted_from_a_package_that_lets_the_machine_run() {
    // Lengths around one frame: the last frame alone decides whether the destination may run.
    let around = MAX_RAW - 60..MAX_RAW + 60;
    for len in around.step_by(7) {
        let mut devices = vec![7; len];
        devices[0] = 4;
        let mut core = switching(4);
        core.on_main(&open_end(&devices)).expect("valid");
        let frames: Vec<_> = std::iter::from_fn(|| core.next_frame())
            .filter(|o| o.kind == Kind::Device)
            .map(|o| o.raw)
            .collect();
        let last = frames.last().expect("frames");
        assert!(last.len() > 60 || frames.len() == 1, "{len}: {:?}", frames.len());
        assert!(frames.iter().all(|f| f.len() <= MAX_RAW));
    }
}

#[test]
fn device_state_before_the_end_of_memory_ends_the_move_before_its_switch() {
    let mut core = SourceCore::new(false, true);
    core.on_main(&encode(&setup(4))).expect("valid");
    assert!(core.on_main(&[4, 0, 0, 0, 9, 5, b't', b'i', b'm', b'e', b'r', 0]).is_err());
}

#[test]
fn pages_that_the_destination_holds_are_named_and_qemu_there_reads_the_same_stream() {
    use super::super::known::{HeldHere, KnownMemory, expand};
    use std::io::Write as _;

    let held = || {
        let mut file = tempfile::tempfile().expect("a file");
        // As `page` makes them, but for page 1; page 3 is not there.
        for n in [1_u8, 9, 3] {
            file.write_all(&[n; 4096]).expect("written");
        }
        KnownMemory::new(file).expect("opened")
    };
    let mut core = SourceCore::new(false, true);
    core.refer_to(held());
    let mut wire = encode(&setup(4));
    wire.extend(encode(&part(0..4)));
    core.on_main(&wire).expect("valid");
    let (mut got, mut kinds, mut there, mut sent) =
        (Vec::new(), Vec::new(), HeldHere::default(), 0);
    there.memory = Some(held());
    while let Some(out) = core.next_frame() {
        sent += out.raw.len();
        kinds.push(out.kind);
        match out.kind {
            Kind::Referring => {
                got.extend_from_slice(&expand(&out.raw, &mut there).expect("expands"));
            }
            _ => got.extend_from_slice(&out.raw),
        }
    }
    assert_eq!(got, wire);
    assert_eq!(kinds, [Kind::Referring]);
    assert!(sent < 3 * 4096, "{sent} of {}", wire.len());
    let counts = core.counts();
    assert_eq!((counts.data_pages, counts.known_pages, counts.changed_pages), (4, 2, 0));
    assert_eq!(core.phase(), RelayPhase::RoundOver);
}
