//! The relay at the destination.

use std::fs::File;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use godwit_qemu::RAM_BLOCK;
use godwit_qemu::stream::{PONG_COMMIT, ReturnMessage, ReturnPathParser};
use godwit_transfer::{Endpoint, Lane, LaneKind, LaneReceiver, LaneSender, Link};
use godwit_types::Hash;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::Receiver;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

use super::commit::{CommitFile, Word};
use super::control::Asked;
use super::core::{Channel, MAX_BITMAP};
use super::disk::{self, Arrival};
use super::due::Due;
use super::fill::{Filler, PING_EMPTIED, Requests, Zeros, check_size, with_present};
use super::frame::{Kind, open};
use super::known::{HeldHere, KnownMemory, ReferError, expand};
use super::meet::meet;
use super::passing::{Passing, Reader};
use super::preempt::Preempt;
use super::visit::{Arrived, Left, Visit};
use super::waits::Waits;
use super::wire::{About, NEWEST, Note, REFERS, VISITS, recv_note, send_note};
use super::{
    BlockDevice, Outcome, RelayCommand, RelayConfig, RelayDisk, RelayError, RelayPhase,
    RelayStatus, unless_aborted,
};
use crate::clock::{self, ClockId};

const READ: usize = 64 << 10;
/// Frames that name pages to be filled in, and answers to QEMU, that wait at most.
const FILLS_WAITING: usize = 1024;
/// How long the other relay may take to hear that the migration ends.
const GOODBYE: Duration = Duration::from_secs(2);

/// What is open already: the disk, the word on the commit point, what is known of memory, and what
/// tells when QEMU listens.
type Opened<'a> = (Option<&'a BlockDevice>, &'a CommitFile, Known, Option<Receiver>);

/// What is known of the machine's memory, and is to be known of it later.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The memory of a substrate, which the source may hold, too.
    pub(super) held: Option<(Hash, KnownMemory)>,
    /// What the machine left here, and the sealed memory under it.
    pub(super) visit: Option<(Visit, File, Option<File>)>,
    /// Where marks of its pages are written.
    pub(super) arrived: Option<File>,
    /// The machine's memory itself.
    pub(super) memory: Option<File>,
}

/// The lanes of one migration, as the source opened them.
struct Lanes {
    link: Link,
    /// The version that both relays use.
    version: u16,
    steering: (LaneSender, LaneReceiver),
    bulk: LaneReceiver,
    demand: (LaneSender, LaneReceiver),
    disk: Option<((LaneSender, LaneReceiver), LaneReceiver)>,
}

pub(super) async fn run(
    config: &RelayConfig,
    endpoint: &Endpoint,
    (device, commit, known, listens): Opened<'_>,
    status: &watch::Sender<RelayStatus>,
    commands: &mut mpsc::Receiver<Asked>,
) -> Result<Outcome, RelayError> {
    let link = meet(config, endpoint, status, commands).await?;
    let mut lanes = unless_aborted(commands, accept_lanes(config, link)).await?;
    let worked = match unless_aborted(commands, qemu_listens(listens, endpoint)).await {
        Ok(()) => work(config, &mut lanes, (device, commit, known), status, commands).await,
        Err(e) => Err(e),
    };
    // Whoever reads the file once this relay says that it has ended reads its last word.
    commit.settle().await;
    let note = match &worked {
        Ok(()) => Note::Done,
        Err(RelayError::PeerAborted(_)) => return worked.map(|()| Outcome::Moved),
        Err(e) => Note::Abort { why: e.in_full(), committed: status.borrow().committed },
    };
    let farewell = async {
        send_note(&mut lanes.steering.0, note).await?;
        lanes.steering.0.end();
        // The source ends its side when it has understood, or says that it cannot.
        while let Some(note) = recv_note(&mut lanes.steering.1).await? {
            if matches!(note, Note::Abort { .. }) {
                break;
            }
        }
        Ok::<_, RelayError>(())
    };
    let within = if worked.is_ok() { Duration::from_secs(30) } else { GOODBYE };
    let _ = tokio::time::timeout(within, farewell).await;
    worked?;
    status.send_modify(|s| s.phase = RelayPhase::Done);
    Ok(Outcome::Moved)
}

/// Waits until this relay's QEMU listens. It is started while the relays meet.
async fn qemu_listens(told: Option<Receiver>, endpoint: &Endpoint) -> Result<(), RelayError> {
    let Some(mut told) = told else { return Ok(()) };
    match told.read(&mut [0]).await {
        Ok(1..) => Ok(()),
        Ok(0) | Err(_) => Err(RelayError::NoQemu { site: endpoint.identity().name().to_string() }),
    }
}

/// Takes the lanes that the source's relay opens for this migration.
async fn accept_lanes(config: &RelayConfig, link: Link) -> Result<Lanes, RelayError> {
    let fail = |source| RelayError::Link { peer: config.peer.to_string(), source };
    let (migration, generation) = (config.migration, config.generation);
    let ours = About { version: NEWEST, migration, generation };
    let (mut steering, mut bulk, mut demand) = (None, None, None);
    let mut agreed = NEWEST;
    let (mut disk_demand, mut disk_bulk) = (None, None);
    let wanted = if config.disk.is_some() { 5 } else { 3 };
    for _ in 0..wanted {
        let lane: Lane = link.accept_lane().await.map_err(fail)?;
        match ours.agree(lane.about()) {
            Ok(version) => agreed = agreed.min(version),
            Err(e) => {
                link.close(&e.to_string());
                return Err(e);
            }
        }
        match lane.kind() {
            LaneKind::Steering => steering = Some(lane),
            LaneKind::MemoryBulk => bulk = Some(lane),
            LaneKind::MemoryDemand => demand = Some(lane),
            LaneKind::DiskDemand if config.disk.is_some() => disk_demand = Some(lane),
            LaneKind::DiskBulk if config.disk.is_some() => disk_bulk = Some(lane),
            _ => return Err(RelayError::Protocol("a lane that has no use here")),
        }
    }
    let (Some(steering), Some(bulk), Some(demand)) = (steering, bulk, demand) else {
        return Err(RelayError::Protocol("a lane is missing"));
    };
    let disk = disk_demand.zip(disk_bulk).map(|(d, b)| (d.split(), b.split().1));
    if disk.is_some() != config.disk.is_some() {
        return Err(RelayError::Protocol("a lane is missing"));
    }
    let (_, bulk) = bulk.split();
    let (steering, demand) = (steering.split(), demand.split());
    Ok(Lanes { link, version: agreed, steering, bulk, demand, disk })
}

async fn work(
    config: &RelayConfig,
    lanes: &mut Lanes,
    (device, commit, known): (Option<&BlockDevice>, &CommitFile, Known),
    status: &watch::Sender<RelayStatus>,
    commands: &mut mpsc::Receiver<Asked>,
) -> Result<(), RelayError> {
    let (main_read, main_write) = match config.memory {
        true => {
            let main = UnixStream::connect(&config.qemu).await;
            let (read, write) = main
                .map_err(|source| RelayError::Socket {
                    what: "connecting to the waiting QEMU at",
                    path: config.qemu.clone(),
                    source,
                })?
                .into_split();
            (Some(read), Some(write))
        }
        false => (None, None),
    };
    status.send_modify(|s| {
        s.phase = match (config.resume, config.memory) {
            (false, _) => RelayPhase::Waiting,
            (true, true) => RelayPhase::Committed,
            (true, false) => RelayPhase::MemoryDone,
        };
        s.committed = config.resume;
    });
    let Lanes { link, version, steering, bulk, demand, disk } = lanes;
    let mut here = HeldHere::default();
    let refers = *version >= REFERS && !config.resume;
    if let Some(RelayDisk::Destination { base, .. }) = config.disk.as_ref().filter(|_| refers) {
        let open = std::fs::File::open(base);
        here.base = Some(open.map_err(|source| RelayError::Held { path: base.clone(), source })?);
    }
    let memory = known.memory;
    let mut filler = None;
    if let Some((content, known)) = known.held.filter(|_| refers) {
        send_note(&mut steering.0, Note::Holds(content)).await?;
        filler = memory.as_ref().map(|memory| filler_of(memory, &known)).transpose()?;
        here.memory = Some(known);
    }
    if refers && *version >= VISITS && memory.is_some() {
        send_note(&mut steering.0, Note::Fills).await?;
    }
    if let Some((visit, memory, under)) = known.visit.filter(|_| refers && *version >= VISITS) {
        match Left::new(memory, under) {
            Ok(left) => {
                let pages = left.pages();
                send_note(&mut steering.0, Note::Visited { visit, pages }).await?;
                here.visit = Some(left);
            }
            Err(error) => tracing::warn!(%error, "what the machine left here is of no use"),
        }
    }
    let arrived = known.arrived.filter(|_| config.memory && !config.resume);
    let arrived = arrived.and_then(|to| {
        let failed = |error: &_| tracing::warn!(%error, "its pages are not marked");
        Arrived::new(to).inspect_err(failed).ok()
    });
    let arrived = Mutex::new(arrived);
    send_note(&mut steering.0, Note::Ready).await?;

    let (ack_tx, mut acks) = mpsc::channel(1024);
    let (back_lane, demand_lane) = (&mut demand.0, &mut demand.1);
    let (waits, due) = (Mutex::new(Waits::default()), Due::new(config.resume));
    let preempt = Preempt::new(config.qemu.clone());
    let beside = Beside { waits: &waits, arrived: &arrived, due: &due, preempt: &preempt };
    let (frames_tx, frames) = mpsc::channel(FILLS_WAITING);
    let (filled_tx, mut filled) = mpsc::channel(FILLS_WAITING);
    let (emptied_tx, emptied) = watch::channel(false);
    let (zeros_tx, mut zeros) = mpsc::channel(FILLS_WAITING);
    let own = OwnHere {
        zeros: Zeros::default(),
        answers: zeros_tx,
        emptied: emptied_tx,
        fills: frames_tx,
        memory,
    };
    let fill = fill_memory(filler, frames, emptied, filled_tx);
    let back = async {
        match main_read {
            Some(read) => back_path(read, back_lane, &beside, (commit, &own), status).await,
            None => Ok(()),
        }
    };
    let demanded = async {
        if !config.memory {
            return Ok(());
        }
        let lane = (demand_lane, &mut zeros);
        demand_channel(lane, &beside, status).await
    };
    let bulk = async {
        match main_write {
            Some(write) => {
                let reader = Reader::new(Channel::Main, config.resume);
                let lane = (bulk, here, &own);
                bulk_channel(lane, (reader, write), ack_tx, &beside, status).await
            }
            None => Ok(()),
        }
    };
    let (disk_ack_tx, mut disk_acks) = mpsc::channel(1024);
    let disk = async {
        let (
            Some(RelayDisk::Destination { base, mid, bytes, written, .. }),
            Some(device),
            Some(lanes),
        ) = (&config.disk, device, disk)
        else {
            return Ok(());
        };
        let arrival = Arrival { base, mid, written, bytes: *bytes, resume: config.resume };
        disk::destination(arrival, &device.there, &mut lanes.0, &mut lanes.1, disk_ack_tx, status)
            .await
    };
    tokio::pin!(back, demanded, bulk, disk, fill);
    let (mut demand_over, mut bulk_over) = (false, false);
    let (mut memory_over, mut disk_over) = (false, false);
    loop {
        tokio::select! {
            biased;
            Some((command, answer)) = commands.recv() => {
                let abort = matches!(command, RelayCommand::Abort { .. });
                let _ = answer.send(abort);
                if let RelayCommand::Abort { why } = command {
                    return Err(RelayError::Aborted(why));
                }
            }
            note = recv_note(&mut steering.1) => match note? {
                Some(Note::Abort { why, .. }) => return Err(RelayError::PeerAborted(why)),
                Some(Note::Clock { sent }) => {
                    let arrived = clock::now();
                    let clock = ClockId::here();
                    let replied = clock::now();
                    send_note(&mut steering.0, Note::ClockIs { sent, arrived, replied, clock }).await?;
                }
                Some(_) => {}
                None => return Err(RelayError::Protocol("it has left")),
            },
            Some(frames) = acks.recv() => {
                let mut frames: u32 = frames;
                while let Ok(more) = acks.try_recv() {
                    frames = frames.saturating_add(more);
                }
                send_note(&mut steering.0, Note::Ack(frames)).await?;
                let rtt = u64::try_from(link.rtt().as_micros()).unwrap_or(u64::MAX);
                status.send_if_modified(|s| { s.rtt_us = rtt; false });
            }
            Some(frames) = disk_acks.recv() => {
                send_note(&mut steering.0, Note::DiskAck(frames)).await?;
            }
            Some(frames) = filled.recv() => {
                send_note(&mut steering.0, Note::Filled(frames)).await?;
            }
            wrong = &mut fill => return Err(wrong),
            over = &mut back, if !memory_over => {
                over?;
                memory_over = true;
            }
            over = &mut disk, if !disk_over => {
                over?;
                disk_over = true;
            }
            // Nothing more is demanded by a QEMU that has all of memory.
            over = &mut demanded, if !demand_over && !memory_over => {
                over?;
                demand_over = true;
            }
            over = &mut bulk, if !bulk_over => {
                over?;
                bulk_over = true;
            }
        }
        if memory_over && disk_over {
            let arrived = arrived.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Err(error)) = arrived.map(|arrived| arrived.write()) {
                tracing::warn!(%error, "its pages are not marked");
            }
            return Ok(());
        }
    }
}

/// What this relay knows of what passes to QEMU, and the channel beside the main one.
struct Beside<'a> {
    waits: &'a Mutex<Waits>,
    arrived: &'a Mutex<Option<Arrived>>,
    due: &'a Due,
    preempt: &'a Preempt,
}

impl Beside<'_> {
    /// Pages are about to be written to QEMU. Not afterwards: it may be the last that it needs, and say
    /// so before this goes on.
    fn mark(&self, channel: Channel, passing: &Passing) {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(arrived) = arrived.as_mut() {
            arrived.passing(channel, passing);
        }
    }

    /// Pages have been written to QEMU: whoever waited for one of them goes on.
    fn written(&self, passing: &Passing, status: &watch::Sender<RelayStatus>) {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let before = waits.micros();
        waits.written(&passing.pages, Instant::now());
        let after = waits.micros();
        if before != after {
            status.send_modify(|s| (s.counts.waited_us, s.counts.longest_wait_us) = after);
        }
    }
}

/// What this relay does for its QEMU's memory by itself.
struct OwnHere {
    zeros: Zeros,
    /// Pages that it answers for.
    answers: mpsc::Sender<Vec<u8>>,
    /// QEMU's memory is empty.
    emptied: watch::Sender<bool>,
    /// Frames that name pages to be filled in.
    fills: mpsc::Sender<Bytes>,
    /// The file that is the machine's memory.
    memory: Option<File>,
}

/// What puts held pages into the machine's memory.
fn filler_of(memory: &File, known: &KnownMemory) -> Result<Filler, RelayError> {
    let open = memory.try_clone().and_then(|memory| Filler::new(memory, known.file()?));
    open.map_err(RelayError::GuestMemory)
}

/// Fills pages in once QEMU's memory is empty, until something is wrong.
async fn fill_memory(
    filler: Option<Filler>,
    mut frames: mpsc::Receiver<Bytes>,
    mut emptied: watch::Receiver<bool>,
    filled: mpsc::Sender<u32>,
) -> RelayError {
    let filler = filler.map(std::sync::Arc::new);
    // Without QEMU's return path there is nothing to be filled in, either.
    if emptied.wait_for(|emptied| *emptied).await.is_err() {
        std::future::pending::<()>().await;
    }
    while let Some(raw) = frames.recv().await {
        let Some(filler) = filler.clone() else { return ReferError::Nothing.into() };
        match tokio::task::spawn_blocking(move || filler.fill(&raw)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return e.into(),
            Err(_) => return RelayError::Protocol("pages that it names could not be filled in"),
        }
        if filled.send(1).await.is_err() {
            break;
        }
    }
    std::future::pending().await
}

/// From QEMU's return path to the source, until QEMU says that it has all of memory.
async fn back_path(
    mut read: OwnedReadHalf,
    lane: &mut LaneSender,
    beside: &Beside<'_>,
    (commit, own): (&CommitFile, &OwnHere),
    status: &watch::Sender<RelayStatus>,
) -> Result<(), RelayError> {
    let mut parser = ReturnPathParser::new(MAX_BITMAP);
    let mut requests = Requests::default();
    let mut buf = BytesMut::new();
    let mut shut = None;
    loop {
        buf.reserve(READ);
        let n = read.read_buf(&mut buf).await.map_err(|source| RelayError::Qemu {
            what: "reading the destination QEMU's return path",
            source,
        })?;
        if n == 0 {
            return match shut {
                Some(0) => Ok(()),
                _ => Err(RelayError::QemuClosed("the destination QEMU")),
            };
        }
        parser.push(&buf);
        buf.clear();
        let mut on = Vec::new();
        while let Some(mut message) = parser.next()? {
            match &mut message {
                ReturnMessage::Pong(PING_EMPTIED) => {
                    own.emptied.send_replace(true);
                    continue;
                }
                ReturnMessage::Pong(PONG_COMMIT) => {
                    committed(RelayPhase::Committed, commit, status).await?;
                    godwit_hold::at("relay.committed").await;
                }
                ReturnMessage::Shut(value) => {
                    shut = Some(*value);
                    if *value == 0 {
                        committed(RelayPhase::MemoryDone, commit, status).await?;
                    }
                }
                ReturnMessage::ReqPages { block, start, .. } => {
                    beside.waits.lock().unwrap_or_else(PoisonError::into_inner).asked(
                        block.as_ref(),
                        *start,
                        Instant::now(),
                    );
                    status.send_modify(|s| s.counts.requests += 1);
                }
                ReturnMessage::RecvBitmap { block, bitmap } => {
                    if let Some(memory) = own.memory.as_ref().filter(|_| block == RAM_BLOCK) {
                        let there = with_present(bitmap, memory);
                        *bitmap = there.map_err(RelayError::GuestMemory)?;
                    }
                    beside.due.received(block, bitmap);
                }
                _ => {}
            }
            match requests.take(message, &own.zeros, &mut on) {
                Some(page) if !page.is_empty() => {
                    // Nobody takes them any more only when all of memory is there.
                    let _ = own.answers.send(page).await;
                }
                _ => {}
            }
        }
        lane.send_bytes(on.into())
            .await
            .map_err(|source| RelayError::Lane { what: "sending the return path", source })?;
    }
}

/// QEMU is about to run the machine, or does: that is written down, then told to the daemon, and only
/// then passed on to the source. What cannot be written down is not so.
async fn committed(
    phase: RelayPhase,
    commit: &CommitFile,
    status: &watch::Sender<RelayStatus>,
) -> Result<(), RelayError> {
    if !status.borrow().committed {
        godwit_hold::at("relay.pong").await;
        if let Err(e) = commit.write(Word::Runs).await {
            status.send_modify(|s| s.refused = Some(e.in_full()));
            return Err(e);
        }
        godwit_hold::at("relay.written").await;
    }
    if phase >= RelayPhase::MemoryDone {
        // A machine whose memory is all here is never brought back to an older one.
        commit.write(Word::AllMemory).await?;
    }
    status.send_modify(|s| {
        s.committed = true;
        s.phase = s.phase.max(phase);
    });
    Ok(())
}

fn account(status: &watch::Sender<RelayStatus>, kind: Kind, wire: usize) {
    status.send_modify(|s| {
        let phase = match kind {
            Kind::Device => {
                s.counts.bytes.device_state += wire as u64;
                RelayPhase::Stopped
            }
            Kind::Memory | Kind::Open | Kind::Referring | Kind::Fill | Kind::Stale => {
                s.counts.bytes.memory += wire as u64;
                RelayPhase::PreCopy
            }
        };
        s.phase = s.phase.max(phase);
    });
}

/// From the bulk lane to QEMU's main channel; each frame is acknowledged when QEMU has taken it.
async fn bulk_channel(
    (lane, mut here, own): (&mut LaneReceiver, HeldHere, &OwnHere),
    (mut reader, mut write): (Reader, OwnedWriteHalf),
    acks: mpsc::Sender<u32>,
    beside: &Beside<'_>,
    status: &watch::Sender<RelayStatus>,
) -> Result<(), RelayError> {
    while let Some(frame) =
        lane.recv().await.map_err(|source| RelayError::Lane { what: "receiving memory", source })?
    {
        let (kind, raw) = open(&frame)?;
        account(status, kind, frame.len());
        let raw = match kind {
            Kind::Referring => {
                // Blocks come from a disk, which may take its time; demanded pages do not wait for it.
                let mut held = std::mem::take(&mut here);
                let expanded = tokio::task::spawn_blocking(move || {
                    let expanded = expand(&raw, &mut held);
                    (expanded, held)
                });
                let (expanded, held) = expanded.await.map_err(|_| {
                    RelayError::Protocol("what pages it names could not be found out")
                })?;
                here = held;
                expanded?
            }
            Kind::Memory | Kind::Device | Kind::Open => raw,
            Kind::Fill => {
                check_size(&raw)?;
                if own.zeros.is_known() {
                    return Err(
                        ReferError::Malformed("pages to be filled in after the switch").into()
                    );
                }
                // Whoever takes it says what is wrong with it.
                let _ = own.fills.send(raw).await;
                Bytes::new()
            }
            Kind::Stale => {
                own.zeros.learn(&raw)?;
                Bytes::new()
            }
        };
        let passing = reader.read(&raw);
        beside.mark(Channel::Main, &passing);
        beside.due.passed(Channel::Main, &passing);
        if passing.ends {
            godwit_hold::at("relay.ending").await;
            beside.due.all_passed().await?;
            beside.preempt.taken().await?;
        }
        write.write_all(&raw).await.map_err(|source| RelayError::Qemu {
            what: "writing the destination QEMU's main channel",
            source,
        })?;
        beside.written(&passing, status);
        if acks.send(1).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// From the demand lane to QEMU's preempt channel, which is opened when the source's is.
async fn demand_channel(
    (lane, zeros): (&mut LaneReceiver, &mut mpsc::Receiver<Vec<u8>>),
    beside: &Beside<'_>,
    status: &watch::Sender<RelayStatus>,
) -> Result<(), RelayError> {
    let (mut opened, mut over) = (false, false);
    loop {
        let listens = !over;
        let raw = tokio::select! {
            frame = lane.recv(), if listens => {
                let frame = frame.map_err(|source| {
                    RelayError::Lane { what: "receiving demanded memory", source }
                })?;
                let Some(frame) = frame else {
                    over = true;
                    continue;
                };
                let (kind, raw) = open(&frame)?;
                account(status, kind, frame.len());
                raw
            }
            Some(page) = zeros.recv(), if opened => page.into(),
            // The channel stays open until QEMU itself closes it at its end.
            else => return Ok(()),
        };
        let mark = |passing: &Passing| beside.mark(Channel::Preempt, passing);
        let passing = beside.preempt.write(&raw, mark).await?;
        opened = true;
        beside.due.passed(Channel::Preempt, &passing);
        beside.written(&passing, status);
    }
}
