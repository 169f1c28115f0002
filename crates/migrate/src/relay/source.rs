//! The relay at the source.

use std::collections::HashMap;
use std::fs::File;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use godwit_disk::BlockIndex;
use godwit_qemu::stream::ReturnMessage;
use godwit_qemu::{MemoryReader, RAM_BLOCK};
use godwit_transfer::codec::Packer;
use godwit_transfer::{Endpoint, LaneKind, LaneReceiver, LaneSender, Link};
use godwit_types::{BytesMoved, Hash};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::control::Asked;
use super::core::{Channel as Lane, SourceCore};
use super::disk::{self, Frozen, SharedPacer};
use super::fill;
use super::frame::seal;
use super::known::{KnownBlocks, KnownMemory};
use super::meet::meet;
use super::own::{GuestMemory, OwnPages};
use super::pages::PageSet;
use super::visit::{Visit, Visited};
use super::wire::{About, Note, REFERS, VISITS, known_by_peer, recv_note, send_note};
use super::{
    Counts, Outcome, OwnMemory, RelayCommand, RelayConfig, RelayDisk, RelayError, RelayPhase,
    RelayStatus, unless_aborted,
};
use crate::clock::{self, ClockId, Compare, Exchange};

/// How much is read from QEMU at once, in bytes.
const READ: usize = 256 << 10;
/// How long the other relay may take to hear that the migration ends.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long the other relay may take to have heard that the migration has ended well.
const LAST_WORD: Duration = Duration::from_secs(10);

/// What is open already: where QEMU connects, the layers of the disk, and what is known of memory.
type Opened = (Option<UnixListener>, Option<Vec<File>>, Known);

/// What the destination may hold, too.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The memory of a substrate.
    pub(super) held: Option<(Hash, KnownMemory)>,
    /// The marks of what the machine left there.
    pub(super) visit: Option<(Visit, File)>,
    /// What the memory of a machine that is a private copy is read from.
    pub(super) guest: Option<CopyFiles>,
}

/// A process's memory, which of its pages it has written to, and the sealed memory.
pub(super) type CopyFiles = (File, File, File);

pub(super) async fn run(
    config: &RelayConfig,
    (listener, layers, known): Opened,
    endpoint: &Endpoint,
    status: &watch::Sender<RelayStatus>,
    commands: &mut mpsc::Receiver<Asked>,
) -> Result<Outcome, RelayError> {
    let listener = match listener {
        Some(listener) => listener,
        None => super::listen(&config.qemu, "listening for QEMU on")?,
    };
    let link = meet(config, endpoint, status, commands).await?;
    let joined = Source::join(config, (layers, known), link, status);
    let mut source = unless_aborted(commands, joined).await?;
    source.compare_clocks().await?;
    source.publish();
    let worked = source.work(&listener, commands).await;
    let _ = std::fs::remove_file(&config.qemu);
    if matches!(worked, Ok(Outcome::Moved)) {
        // The link must not be closed before the destination knows: it would wait for this word.
        let _ = tokio::time::timeout(LAST_WORD, source.steering.0.finish()).await;
    }
    if let Err(e) = &worked
        && !matches!(e, RelayError::PeerAborted(_))
    {
        let note = Note::Abort {
            why: e.in_full(),
            committed: source.core.phase() >= RelayPhase::Committed,
        };
        let _ = tokio::time::timeout(GOODBYE, async {
            if send_note(&mut source.steering.0, note).await.is_ok() {
                let _ = source.steering.0.finish().await;
            }
        })
        .await;
    }
    worked
}

struct Source<'a> {
    status: &'a watch::Sender<RelayStatus>,
    link: Link,
    core: SourceCore,
    clocks: Compare,
    packer: Packer,
    steering: (LaneSender, LaneReceiver),
    bulk: LaneSender,
    demand: (LaneSender, LaneReceiver),
    main: Option<Channel>,
    preempt: Option<Channel>,
    /// The destination has said that it has everything.
    done: bool,
    /// The main channel has come to its end in good order.
    main_over: bool,
    /// The driver wants the machine back, before the destination's loss was noticed here.
    reclaim: bool,
    disk: Option<JoinHandle<Result<(), RelayError>>>,
    disk_pacer: SharedPacer,
    /// What is named of the pages that the destination fills in.
    fills: Option<mpsc::Receiver<std::io::Result<bytes::Bytes>>>,
}

/// The memory of a machine, read from the process of its QEMU.
#[derive(Debug)]
struct QemuMemory {
    reader: MemoryReader,
    sealed: File,
    /// Address and bytes of the other blocks.
    blocks: HashMap<bytes::Bytes, (u64, u64)>,
}

impl QemuMemory {
    fn new(place: &OwnMemory, (memory, pagemap, sealed): CopyFiles) -> Self {
        let reader = MemoryReader::of_files(memory, pagemap, place.address, place.bytes);
        let block = |(name, at, bytes): &(String, u64, u64)| {
            (bytes::Bytes::copy_from_slice(name.as_bytes()), (*at, *bytes))
        };
        Self { reader, sealed, blocks: place.blocks.iter().map(block).collect() }
    }
}

impl GuestMemory for QemuMemory {
    fn written(&self) -> std::io::Result<Vec<u64>> {
        Ok(self.reader.written_pages()?.unwrap_or_default())
    }

    fn read(&self, block: &bytes::Bytes, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        match self.blocks.get(block) {
            Some((address, _)) => self.reader.read_block_at(address + offset, buf),
            None => self.reader.read_at(offset, buf),
        }
    }

    fn has(&self, block: &bytes::Bytes, bytes: u64) -> bool {
        match self.blocks.get(block) {
            Some((_, there)) => bytes <= *there,
            None => block == RAM_BLOCK && bytes == self.reader.len(),
        }
    }

    fn sealed(&self) -> &File {
        &self.sealed
    }
}

/// Names the pages `which` of the sealed memory `file` on a thread of its own.
fn name_fills(which: PageSet, file: File) -> mpsc::Receiver<std::io::Result<bytes::Bytes>> {
    let (to, frames) = mpsc::channel(64);
    tokio::task::spawn_blocking(move || {
        // The empty one is the end.
        for frame in fill::frames(&which, &file).chain([Ok(bytes::Bytes::new())]) {
            if to.blocking_send(frame).is_err() {
                return;
            }
        }
    });
    frames
}

async fn next_fill(
    fills: &mut Option<mpsc::Receiver<std::io::Result<bytes::Bytes>>>,
) -> Option<std::io::Result<bytes::Bytes>> {
    match fills {
        Some(frames) => frames.recv().await,
        None => std::future::pending().await,
    }
}

impl Drop for Source<'_> {
    fn drop(&mut self) {
        if let Some(disk) = &self.disk {
            disk.abort();
        }
    }
}

/// What happened next.
enum Event {
    Connected(UnixStream),
    Main(BytesMut),
    Preempt(BytesMut),
    Back(Option<bytes::Bytes>),
    Note(Option<Note>),
    Command(Asked),
    Fill(Option<std::io::Result<bytes::Bytes>>),
    PutOwn,
}

/// One of QEMU's connections, with what was read from it last. It is closed when it is dropped and
/// never shut down: the driver may hold it, too, and then QEMU must not notice that this relay ends.
struct Channel {
    stream: UnixStream,
    buf: BytesMut,
}

impl Channel {
    fn new(stream: UnixStream) -> Self {
        Self { stream, buf: BytesMut::new() }
    }

    async fn write(&mut self, bytes: &[u8], what: &'static str) -> Result<(), RelayError> {
        self.stream.write_all(bytes).await.map_err(|source| RelayError::Qemu { what, source })
    }
}

/// Reads what is there; waits for ever without a channel. Safe to cancel.
async fn read_some(
    channel: &mut Option<Channel>,
    what: &'static str,
) -> Result<BytesMut, RelayError> {
    match channel {
        Some(channel) => {
            channel.buf.reserve(READ);
            let read = channel.stream.read_buf(&mut channel.buf).await;
            read.map_err(|source| RelayError::Qemu { what, source })?;
            Ok(channel.buf.split())
        }
        None => std::future::pending().await,
    }
}

async fn disk_over(
    disk: &mut Option<JoinHandle<Result<(), RelayError>>>,
) -> Result<(), RelayError> {
    match disk {
        Some(task) => {
            task.await.unwrap_or(Err(RelayError::Protocol("the disk's task has ended early")))
        }
        None => std::future::pending().await,
    }
}

/// The base image with its index, where there is one that can be used.
async fn known_blocks(config: &RelayConfig) -> Option<KnownBlocks> {
    let Some(RelayDisk::Source { base, index: Some(index), .. }) = config.disk.clone() else {
        return None;
    };
    let open = move || {
        let index = BlockIndex::load(&File::open(index)?)?;
        Ok::<_, std::io::Error>(KnownBlocks::new(index, File::open(base)?))
    };
    match tokio::task::spawn_blocking(open).await {
        Ok(Ok(blocks)) => Some(blocks),
        Ok(Err(error)) => {
            tracing::warn!(%error, "pages are not looked for in the base image");
            None
        }
        Err(_) => None,
    }
}

/// The marks of an earlier visit, where they can be read.
fn read_marks(from: &File) -> Option<Visited> {
    Visited::read(from)
        .inspect_err(|error| tracing::warn!(%error, "the machine's earlier visit is of no use"))
        .ok()
}

impl<'a> Source<'a> {
    async fn join(
        config: &RelayConfig,
        (opened, mut known): (Option<Vec<File>>, Known),
        link: Link,
        status: &'a watch::Sender<RelayStatus>,
    ) -> Result<Self, RelayError> {
        let version = known_by_peer(link.version());
        let (migration, generation) = (config.migration, config.generation);
        let about = About { version, migration, generation }.bytes()?;
        let open = async |kind: LaneKind| {
            link.open_about(kind, kind.usual_priority(), about.clone())
                .await
                .map_err(|source| RelayError::Lane { what: "opening a lane for memory", source })
        };
        let mut steering = open(LaneKind::Steering).await?.split();
        let (bulk, _) = open(LaneKind::MemoryBulk).await?.split();
        let demand = open(LaneKind::MemoryDemand).await?.split();
        let disk_pacer = SharedPacer::new();
        let mut disk = None;
        if let Some(RelayDisk::Source { base, layers, .. }) = config.disk.clone() {
            let demand = open(LaneKind::DiskDemand).await?.split();
            let (bulk, _) = open(LaneKind::DiskBulk).await?.split();
            let (pacer, status, resume) = (disk_pacer.clone(), status.clone(), config.resume);
            disk = Some(tokio::spawn(async move {
                let frozen = Frozen { base, layers, opened };
                disk::source(frozen, demand, bulk, pacer, status, resume).await
            }));
        }
        let mut core = SourceCore::new(config.resume, config.memory);
        if version >= REFERS
            && !config.resume
            && let Some(blocks) = known_blocks(config).await
        {
            core.refer_to_blocks(blocks);
        }
        let mut holds = false;
        loop {
            match recv_note(&mut steering.1).await? {
                Some(Note::Ready) => break,
                Some(Note::Holds(content)) if version >= REFERS => {
                    if let Some((_, memory)) = known.held.take_if(|(ours, _)| *ours == content) {
                        core.refer_to(memory);
                        holds = true;
                    }
                }
                Some(Note::Visited { visit, pages }) if version >= VISITS => {
                    let ours = known.visit.take_if(|(ours, _)| *ours == visit);
                    if let Some(visited) = ours.and_then(|(_, marks)| read_marks(&marks)) {
                        core.refer_to_visit(visited.only(&pages));
                    }
                }
                Some(Note::Fills) if version >= VISITS => {
                    if let Some((place, files)) = config.own.as_ref().zip(known.guest.take()) {
                        let memory = QemuMemory::new(place, files);
                        // Held is what it is a copy of, or nothing.
                        core.send_own(OwnPages::new(Box::new(memory), holds));
                    }
                }
                Some(Note::Abort { why, .. }) => return Err(RelayError::PeerAborted(why)),
                _ => return Err(RelayError::Protocol("it is not ready")),
            }
        }
        Ok(Self {
            status,
            link,
            core,
            clocks: Compare::default(),
            packer: Packer::new(),
            steering,
            bulk,
            demand,
            main: None,
            preempt: None,
            done: false,
            main_over: !config.memory,
            reclaim: false,
            disk,
            disk_pacer,
            fills: None,
        })
    }

    fn publish(&self) {
        let (phase, counts) = (self.core.phase(), self.core.counts());
        let clock = self.clocks.best();
        let phase = if self.done && self.main_over { RelayPhase::Done } else { phase };
        let rtt_us = u64::try_from(self.link.rtt().as_micros()).unwrap_or(u64::MAX);
        self.status.send_if_modified(|s| {
            // The disk's own task counts these.
            let bytes = BytesMoved { disk: s.counts.bytes.disk, ..counts.bytes };
            let (disk_blocks, disk_left) = (s.counts.disk_blocks, s.counts.disk_left);
            let counts = Counts { bytes, disk_blocks, disk_left, ..counts };
            let changed = s.phase != phase
                || s.counts != counts
                || s.clock != clock
                || s.ram.as_ref() != self.core.ram();
            if s.ram.as_ref() != self.core.ram() {
                s.ram = self.core.ram().cloned();
            }
            s.phase = phase;
            s.committed = phase >= RelayPhase::Committed;
            s.counts = counts;
            s.rtt_us = rtt_us;
            s.clock = clock;
            changed
        });
    }

    async fn work(
        &mut self,
        listener: &UnixListener,
        commands: &mut mpsc::Receiver<Asked>,
    ) -> Result<Outcome, RelayError> {
        loop {
            let step = self.step(listener, commands).await;
            self.publish();
            match step {
                Ok(false) if self.reclaim => return self.reclaim(listener).await,
                Ok(false) => {}
                Ok(true) => return Ok(Outcome::Moved),
                Err(e) if self.uncertain(&e) => {
                    return self.hold(e, listener, commands).await;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether the other side was lost while the machine stands still or is about to, so that it is
    /// the driver who has to find out where it may run. A QEMU whose connection is closed in the
    /// midst of that can't be taken back.
    fn uncertain(&self, e: &RelayError) -> bool {
        let lost = matches!(
            e,
            RelayError::Lane { .. } | RelayError::PeerAborted(_) | RelayError::Protocol(_)
        );
        let switch = RelayPhase::Switching..=RelayPhase::Stopped;
        lost && switch.contains(&self.core.phase())
    }

    /// Handles one event; tells whether everything is over.
    async fn step(
        &mut self,
        listener: &UnixListener,
        commands: &mut mpsc::Receiver<Asked>,
    ) -> Result<bool, RelayError> {
        let (may_read, may_put) = (self.core.may_read(), self.core.may_put_own());
        let event = tokio::select! {
            biased;
            Some(asked) = commands.recv() => Event::Command(asked),
            ended = disk_over(&mut self.disk) => {
                self.disk = None;
                ended?;
                return Ok(false);
            }
            // After `Done` the destination ends its side, perhaps before QEMU does.
            note = recv_note(&mut self.steering.1), if !self.done => Event::Note(note?),
            frame = self.demand.1.recv() => Event::Back(frame.map_err(|source| {
                RelayError::Lane { what: "reading the return path", source }
            })?),
            bytes = read_some(&mut self.preempt, "reading QEMU's preempt channel") => {
                Event::Preempt(bytes?)
            }
            accepted = listener.accept(), if self.preempt.is_none() && !self.main_over => {
                Event::Connected(accepted.map_err(|source| RelayError::Qemu {
                    what: "accepting QEMU's connection", source,
                })?.0)
            }
            bytes = read_some(&mut self.main, "reading QEMU's main channel"), if may_read => {
                Event::Main(bytes?)
            }
            frame = next_fill(&mut self.fills) => Event::Fill(frame),
            () = std::future::ready(()), if may_put => Event::PutOwn,
        };
        match event {
            Event::Command((command, answer)) => {
                let accepted = match command {
                    RelayCommand::Drain => {
                        self.core.drain();
                        true
                    }
                    RelayCommand::Proceed { first } => self.core.proceed(first),
                    RelayCommand::Abort { why } => {
                        let _ = answer.send(true);
                        return Err(RelayError::Aborted(why));
                    }
                    RelayCommand::Reclaim => {
                        let phase = self.core.phase();
                        if phase < RelayPhase::Switching {
                            // QEMU was not let switch: without a connection its machine runs on.
                            let _ = answer.send(true);
                            let why = "the machine is brought back before its switch";
                            return Err(RelayError::Aborted(why.into()));
                        }
                        self.reclaim = phase <= RelayPhase::Stopped;
                        self.reclaim
                    }
                    RelayCommand::Dial { .. } | RelayCommand::Finish => false,
                };
                // Before the answer: the driver takes QEMU to be on its way then.
                self.notify_qemu().await?;
                let _ = answer.send(accepted);
                if self.reclaim {
                    // Nothing more is sent.
                    return Ok(false);
                }
            }
            Event::Connected(stream) => {
                if self.main.is_none() {
                    let number = std::os::fd::AsRawFd::as_raw_fd(&stream);
                    self.status.send_modify(|s| s.qemu_socket = Some(number));
                    self.main = Some(Channel::new(stream));
                } else {
                    self.preempt = Some(Channel::new(stream));
                    self.core.on_preempt_open();
                }
            }
            Event::Main(bytes) if bytes.is_empty() => {
                if self.core.shut() != Some(0) && !self.core.released() {
                    return Err(RelayError::QemuClosed("the source QEMU"));
                }
                self.main = None;
                self.main_over = true;
            }
            Event::Fill(frame) => {
                let early = || std::io::Error::other("not every page was named");
                let frame = frame.ok_or_else(early).flatten().map_err(RelayError::GuestMemory)?;
                if frame.is_empty() {
                    self.fills = None;
                }
                self.core.on_fill(Some(frame).filter(|f| !f.is_empty()));
            }
            Event::PutOwn => self.core.put_own()?,
            Event::Main(bytes) => {
                let before = (self.core.phase(), self.core.has_device_state());
                self.core.on_main(&bytes)?;
                if let Some((which, file)) = self.core.take_fills() {
                    self.fills = Some(name_fills(which, file));
                }
                self.notify_qemu().await?;
                self.held_at(before).await;
            }
            Event::Preempt(bytes) if bytes.is_empty() => {
                // QEMU closes it at its end; the main channel tells whether that was in order.
                self.preempt = None;
                self.demand.0.end();
            }
            Event::Preempt(bytes) => self.core.on_preempt(&bytes)?,
            Event::Back(Some(frame)) => {
                let back = self.core.on_back(&frame)?;
                if let (Some(main), false) = (&mut self.main, self.core.released()) {
                    main.write(&back, "writing QEMU's return path").await?;
                }
            }
            Event::Back(None) => return Err(RelayError::Protocol("the return path has ended")),
            Event::Note(Some(Note::Ack(frames))) => {
                self.core.on_ack(frames.into(), Instant::now());
                self.compare_clocks().await?;
            }
            Event::Note(Some(Note::ClockIs { sent, arrived, replied, clock })) => {
                let exchange = Exchange { sent, arrived, replied, returned: clock::now() };
                self.clocks.answer(exchange, clock.same(ClockId::here()));
                self.compare_clocks().await?;
            }
            Event::Note(Some(Note::DiskAck(frames))) => self.disk_pacer.on_ack(frames.into()),
            Event::Note(Some(Note::Done)) => self.done = true,
            Event::Note(Some(Note::Abort { why, .. })) => {
                let doubt = self.core.has_referred();
                self.status.send_modify(|s| s.doubt |= doubt);
                return Err(RelayError::PeerAborted(why));
            }
            Event::Note(Some(Note::Filled(frames))) => self.core.on_filled(frames),
            Event::Note(Some(
                Note::Ready
                | Note::Clock { .. }
                | Note::Holds(_)
                | Note::Visited { .. }
                | Note::Fills,
            )) => {}
            Event::Note(None) => return Err(RelayError::Protocol("it has left")),
        }
        self.send_all().await?;
        if self.done && self.main_over {
            self.bulk.end();
            return Ok(true);
        }
        Ok(false)
    }

    /// Asks the destination for its time, when it is time to.
    async fn compare_clocks(&mut self) -> Result<(), RelayError> {
        let sent = clock::now();
        if self.clocks.ask(sent) {
            send_note(&mut self.steering.0, Note::Clock { sent }).await?;
        }
        Ok(())
    }

    async fn send_all(&mut self) -> Result<(), RelayError> {
        while let Some(out) = self.core.next_frame() {
            let frame = seal(&mut self.packer, out.kind, &out.raw);
            let wire = frame.len() as u64;
            let lane = match out.channel {
                Lane::Main => &mut self.bulk,
                Lane::Preempt => &mut self.demand.0,
            };
            // Counted before: an acknowledgement cannot come earlier.
            self.core.on_sent(&out, wire, Instant::now());
            lane.send_bytes(frame)
                .await
                .map_err(|source| RelayError::Lane { what: "sending memory", source })?;
        }
        self.core.look_drained();
        Ok(())
    }

    /// The steps at which tests hold a relay. `before` is where it was before it read on.
    async fn held_at(&self, before: (RelayPhase, bool)) {
        if !before.1 && self.core.has_device_state() {
            godwit_hold::at("relay.packaged").await;
        } else if before.0 < RelayPhase::Stopped && self.core.phase() == RelayPhase::Stopped {
            godwit_hold::at("relay.stopped").await;
        }
    }

    /// Writes what the relay has to say to QEMU of its own accord.
    async fn notify_qemu(&mut self) -> Result<(), RelayError> {
        let words = self.core.take_asked();
        match &mut self.main {
            Some(main) if !words.is_empty() => main.write(&words, "steering QEMU").await,
            _ => Ok(()),
        }
    }

    /// The destination is lost and the machine stands still, or is about to. QEMU is read until its
    /// device state is here, since it answers nobody before, and then held until the driver says
    /// where the machine may run: an abort leaves QEMU's post-copy paused, a reclaim takes its stream
    /// to the end, after which the machine can go on at the source with all it had at STOP.
    async fn hold(
        &mut self,
        lost: RelayError,
        listener: &UnixListener,
        commands: &mut mpsc::Receiver<Asked>,
    ) -> Result<Outcome, RelayError> {
        tracing::warn!(error = %lost.in_full(), "the destination was lost before the commit point was seen");
        self.status.send_modify(|s| s.lost = Some(lost.in_full()));
        loop {
            let wanted = !self.core.has_device_state();
            tokio::select! {
                asked = commands.recv() => match asked {
                    Some((RelayCommand::Reclaim, answer)) => {
                        let _ = answer.send(true);
                        return self.reclaim(listener).await;
                    }
                    Some((RelayCommand::Abort { why }, answer)) => {
                        let _ = answer.send(true);
                        return Err(RelayError::Aborted(why));
                    }
                    Some((_, answer)) => {
                        let _ = answer.send(false);
                    }
                    None => return Err(lost),
                },
                bytes = read_some(&mut self.main, "reading QEMU's device state"), if wanted => {
                    self.drain(&bytes?).await?;
                    self.publish();
                }
                accepted = listener.accept(), if self.preempt.is_none() => {
                    if let Ok((stream, _)) = accepted {
                        self.preempt = Some(Channel::new(stream));
                    }
                }
            }
        }
    }

    /// Takes bytes of QEMU's main channel that go nowhere.
    async fn drain(&mut self, bytes: &[u8]) -> Result<(), RelayError> {
        if bytes.is_empty() {
            return Err(RelayError::QemuClosed("the source QEMU"));
        }
        self.core.on_main(bytes)?;
        while self.core.next_frame().is_some() {}
        self.notify_qemu().await
    }

    async fn reclaim(&mut self, listener: &UnixListener) -> Result<Outcome, RelayError> {
        let mut said = self.core.released();
        while self.main.is_some() {
            // Its end may have come before the reclaim: QEMU says no more then.
            if self.core.stream_ended() && !said {
                if !self.core.released() {
                    let mut shut = Vec::new();
                    ReturnMessage::Shut(0).encode(&mut shut);
                    if let Some(main) = &mut self.main {
                        main.write(&shut, "ending QEMU's migration").await?;
                    }
                }
                said = true;
            }
            tokio::select! {
                bytes = read_some(&mut self.preempt, "draining QEMU's preempt channel") => {
                    if bytes?.is_empty() {
                        self.preempt = None;
                    }
                }
                accepted = listener.accept(), if self.preempt.is_none() => {
                    if let Ok((stream, _)) = accepted {
                        self.preempt = Some(Channel::new(stream));
                    }
                }
                bytes = read_some(&mut self.main, "draining QEMU's main channel") => {
                    let bytes = bytes?;
                    if bytes.is_empty() && said {
                        self.main = None;
                    } else {
                        self.drain(&bytes).await?;
                    }
                }
            }
        }
        // Without a main channel QEMU never began, or has ended in good order.
        if said { Ok(Outcome::Reclaimed) } else { Err(RelayError::QemuClosed("the source QEMU")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    /// A QEMU that has sent everything and reads the end of its return path lets its machine run,
    /// although it runs at the destination.
    #[tokio::test]
    async fn a_relay_that_ends_does_not_shut_a_connection_that_another_holds() {
        let (mut qemu, relay) = UnixStream::pair().expect("a pair");
        let relay = relay.into_std().expect("a stream");
        let mut kept = UnixStream::from_std(relay.try_clone().expect("a second handle")).expect("");
        let mut channel = Channel::new(UnixStream::from_std(relay).expect("a stream"));
        channel.write(b"before", "writing").await.expect("written");
        drop(channel);
        kept.write_all(b"more").await.expect("written");
        let mut read = [0; 10];
        qemu.read_exact(&mut read).await.expect("the connection stands");
        assert_eq!(read, *b"beforemore");
    }
}
