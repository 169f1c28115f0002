//! The disk's lanes: CloudAP, figures 4 and 5, between the frozen chain at the source and the
//! middle layer at the destination.
//!
//! ```text
//! source                       disk demand lane             destination
//!   at STOP: block bitmap  =========================>  makes the middle layer
//!   pull service           <==== pull, syn, done =====  reads of QEMU's node `remote` (NBD)
//!                          ===== pulled blocks =====>   answered at once
//!   active push            ==== disk bulk lane =====>   after memory, paced
//! ```

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_disk::msg::DiskMsg;
use godwit_disk::{
    BitmapParts, BlockSource, FrozenChain, LiveError, MidLayer, OverlayWatch, PostcopyDestination,
    RemoteDisk, SourceDisk,
};
use godwit_transfer::{LaneError, LaneReceiver, LaneSender};
use tokio::sync::{Notify, watch};

use super::pacer::Pacer;
use super::{RelayError, RelayPhase, RelayStatus};

/// How often what has arrived is made durable.
const FLUSH: Duration = Duration::from_secs(1);
/// Pause between two looks at what the guest has overwritten.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A window shared by the task that sends and the one that hears acknowledgements.
#[derive(Debug, Clone)]
pub(super) struct SharedPacer(Arc<(Mutex<Pacer>, Notify)>);

impl SharedPacer {
    pub(super) fn new() -> Self {
        Self(Arc::new((Mutex::new(Pacer::new()), Notify::new())))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Pacer) -> T) -> T {
        work(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn on_ack(&self, frames: u64) {
        self.with(|p| p.on_ack(frames, Instant::now()));
        self.0.1.notify_one();
    }

    async fn room(&self) {
        while !self.with(|p| p.has_room()) {
            self.0.1.notified().await;
        }
    }
}

fn disk(what: &'static str) -> impl Fn(LiveError) -> RelayError {
    move |source| RelayError::Disk { what, source }
}

fn lane(source: LaneError) -> RelayError {
    RelayError::Lane { what: "moving the disk", source }
}

async fn send(
    to: &mut LaneSender,
    message: &DiskMsg,
    status: &watch::Sender<RelayStatus>,
) -> Result<u64, RelayError> {
    let bytes = message.encode().map_err(|e| disk("sending blocks")(e.into()))?;
    let wire = bytes.len() as u64;
    status.send_modify(|s| s.counts.bytes.disk += wire);
    to.send_bytes(bytes.into()).await.map_err(lane)?;
    Ok(wire)
}

async fn receive(from: &mut LaneReceiver) -> Result<Option<DiskMsg>, RelayError> {
    let frame = from.recv().await.map_err(lane)?;
    frame
        .map(|f| DiskMsg::decode(&f).map_err(|e| disk("reading a message about blocks")(e.into())))
        .transpose()
}

/// The disk as the source has it when its machine stands still.
pub(super) struct Frozen {
    pub(super) base: PathBuf,
    /// Names of the layers above, lowest first.
    pub(super) layers: Vec<PathBuf>,
    /// The same, if they are open already.
    pub(super) opened: Option<Vec<std::fs::File>>,
}

impl Frozen {
    fn open(self) -> Result<FrozenChain, godwit_disk::DiskError> {
        match self.opened {
            Some(files) => {
                FrozenChain::of_open(&self.base, self.layers.into_iter().zip(files).collect())
            }
            None => FrozenChain::open(&self.base, &self.layers),
        }
    }
}

/// The source's end: waits for STOP, then serves until the destination has everything.
pub(super) async fn source(
    frozen: Frozen,
    demand: (LaneSender, LaneReceiver),
    mut bulk: LaneSender,
    pacer: SharedPacer,
    status: watch::Sender<RelayStatus>,
    resume: bool,
) -> Result<(), RelayError> {
    let mut phases = status.subscribe();
    let lost = |_| RelayError::Protocol("the relay is over");
    // QEMU has flushed its images and given them up when SWITCHOVER_START comes.
    phases.wait_for(|s| s.phase >= RelayPhase::Stopped).await.map_err(lost)?;
    let opened = tokio::task::spawn_blocking(move || {
        let chain = frozen.open()?;
        let bitmap = chain.allocation()?;
        Ok::<_, godwit_disk::DiskError>((chain, bitmap))
    })
    .await
    .map_err(|_| RelayError::Protocol("a disk worker ended early"))?;
    let (chain, bitmap) = opened.map_err(|e| disk("opening the frozen disk")(e.into()))?;
    let blocks = bitmap.count();
    status.send_modify(|s| {
        s.counts.disk_blocks = blocks;
        s.counts.disk_left = blocks;
    });
    let serving = SourceDisk::new(Arc::new(chain), bitmap);
    if resume {
        // The destination says first what it has.
        serving.link_lost();
    }
    let (mut demand_out, mut demand_in) = demand;
    for message in serving.greeting() {
        send(&mut demand_out, &message, &status).await?;
    }
    let hear = async {
        while let Some(message) = receive(&mut demand_in).await? {
            serving.handle(message).map_err(disk("answering the destination's disk"))?;
            status.send_modify(|s| s.counts.disk_left = serving.left());
        }
        Ok::<(), RelayError>(())
    };
    let pull_service = async {
        loop {
            let message = serving.next_demanded().await.map_err(disk("reading demanded blocks"))?;
            send(&mut demand_out, &message, &status).await?;
            status.send_modify(|s| s.counts.disk_left = serving.left());
        }
    };
    let active_push = async {
        // Nothing may delay the device state, nor the pages behind it: a vCPU waits for each of
        // those, while most of what a guest reads from its disk is in its memory.
        phases.wait_for(|s| s.phase >= RelayPhase::MemoryDone).await.map_err(lost)?;
        loop {
            pacer.room().await;
            let message = serving.next_push().await.map_err(disk("reading blocks"))?;
            let wire = send(&mut bulk, &message, &status).await?;
            pacer.with(|p| p.on_sent(wire, wire, Instant::now()));
            status.send_modify(|s| s.counts.disk_left = serving.left());
        }
    };
    tokio::select! {
        () = serving.wait_released() => Ok(()),
        heard = hear => heard,
        failed = pull_service => failed,
        failed = active_push => failed,
    }
}

/// The block device that QEMU has as `remote` from its start.
///
/// QEMU itself reads when it sets up the disk (it guesses a geometry from block 0), long before
/// the machine runs here: such reads are answered from the base. As soon as device state is on
/// its way to QEMU, the machine may run, and reads wait for the block bitmap.
#[derive(Debug, Clone)]
pub(super) struct LateDisk {
    base: Arc<FrozenChain>,
    bytes: u64,
    there: watch::Receiver<Option<Arc<RemoteDisk>>>,
    status: watch::Receiver<RelayStatus>,
}

/// Where the remote disk is put once its bitmap has come.
pub(super) type RemoteSlot = watch::Sender<Option<Arc<RemoteDisk>>>;

impl LateDisk {
    pub(super) fn new(
        base: &Path,
        bytes: u64,
        status: watch::Receiver<RelayStatus>,
    ) -> Result<(Self, RemoteSlot), RelayError> {
        let base =
            FrozenChain::open(base, &[]).map_err(|e| disk("opening the base image")(e.into()))?;
        let (tx, there) = watch::channel(None);
        Ok((Self { base: Arc::new(base), bytes, there, status }, tx))
    }
}

impl BlockSource for LateDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    async fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let runs = |s: &RelayStatus| s.committed || s.phase >= RelayPhase::Stopped;
        if !runs(&self.status.borrow()) {
            return self.base.read(offset, len).await;
        }
        let mut there = self.there.clone();
        let gone = |_| std::io::Error::other("the migration ended before the disk came");
        let disk = there.wait_for(Option::is_some).await.map_err(gone)?.clone();
        match disk {
            Some(disk) => disk.read(offset, len).await,
            None => Err(std::io::ErrorKind::NotConnected.into()),
        }
    }
}

/// Where blocks arrive.
pub(super) struct Arrival<'a> {
    pub(super) base: &'a Path,
    pub(super) mid: &'a Path,
    /// Where QEMU tells what its guest has overwritten.
    pub(super) written: &'a Path,
    pub(super) bytes: u64,
    pub(super) resume: bool,
}

/// Cancels what the guest overwrites (figure 4, lines 4, 5 and 8) as long as blocks come. QEMU
/// offers to tell when it has all of memory; while it does not, blocks merely travel that nobody
/// will read.
async fn watch_writes(
    written: &Path,
    remote: &RemoteDisk,
    status: &watch::Sender<RelayStatus>,
) -> std::convert::Infallible {
    loop {
        if status.borrow().phase >= RelayPhase::MemoryDone
            && let Err(error) = cancel_written(written, remote, status).await
        {
            tracing::debug!(%error, "what the guest overwrites is not told");
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn cancel_written(
    written: &Path,
    remote: &RemoteDisk,
    status: &watch::Sender<RelayStatus>,
) -> std::io::Result<()> {
    let mut overlay = OverlayWatch::connect(written, "").await?;
    loop {
        for blocks in overlay.settled().await? {
            remote.written(blocks);
        }
        status.send_modify(|s| {
            s.counts.disk_cancelled = remote.cancelled();
            s.counts.disk_left = remote.left();
        });
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// The destination's end: until every block is in the middle layer and the layer is sealed.
pub(super) async fn destination(
    arrival: Arrival<'_>,
    there: &watch::Sender<Option<Arc<RemoteDisk>>>,
    demand: &mut (LaneSender, LaneReceiver),
    bulk: &mut LaneReceiver,
    acks: tokio::sync::mpsc::Sender<u32>,
    status: &watch::Sender<RelayStatus>,
) -> Result<(), RelayError> {
    let mut parts = BitmapParts::default();
    let bitmap = loop {
        let wrong = RelayError::Protocol("blocks came before the bitmap");
        let Some(DiskMsg::Bitmap(part)) = receive(&mut demand.1).await? else { return Err(wrong) };
        let whole = parts.take(&part).map_err(|e| disk("reading the block bitmap")(e.into()))?;
        if let Some(bitmap) = whole {
            break bitmap;
        }
    };
    let blocks = bitmap.count();
    status.send_modify(|s| {
        s.counts.disk_blocks = blocks;
        s.counts.disk_left = blocks;
    });
    let (base, mid) = (arrival.base.to_owned(), arrival.mid.to_owned());
    let (bytes, resume) = (arrival.bytes, arrival.resume);
    let made = tokio::task::spawn_blocking(move || {
        if !(resume && MidLayer::is_begun(&mid)) {
            let layer = match resume {
                true => MidLayer::create_again(&mid, &base, bytes, &bitmap)?,
                false => MidLayer::create(&mid, &base, bytes, &bitmap)?,
            };
            let mut core = PostcopyDestination::new(bitmap);
            if resume {
                // The source waits for a word of what is here, even if it is nothing.
                core.reconnected();
            }
            return Ok((layer, core));
        }
        let found = MidLayer::resume(&mid, &base)?;
        let core =
            PostcopyDestination::resume(found.sent, &found.received).map_err(LiveError::Message)?;
        Ok::<_, LiveError>((found.layer, core))
    })
    .await
    .map_err(|_| RelayError::Protocol("a disk worker ended early"))?;
    let (layer, core) = made.map_err(disk("making the middle layer"))?;
    let remote = Arc::new(RemoteDisk::new(layer, core));
    status.send_modify(|s| s.counts.disk_left = remote.left());
    there.send_replace(Some(Arc::clone(&remote)));

    let (out, demanded) = demand;
    let took = |message| async {
        remote.handle(message).await.map_err(disk("writing blocks to the middle layer"))?;
        status.send_modify(|s| s.counts.disk_left = remote.left());
        Ok::<(), RelayError>(())
    };
    let pulled = async {
        while let Some(message) = receive(demanded).await? {
            took(message).await?;
        }
        Err::<(), _>(RelayError::Protocol("the disk lane has ended"))
    };
    let pushed = async {
        while let Some(message) = receive(bulk).await? {
            took(message).await?;
            let _ = acks.send(1).await;
        }
        Err::<(), _>(RelayError::Protocol("the disk lane has ended"))
    };
    let ask = async {
        loop {
            let message = tokio::select! {
                biased;
                message = remote.next_message() => message,
                // Only when all is said: the source lets nobody go who has not told what need not
                // come.
                () = remote.wait_complete() => return Ok::<(), RelayError>(()),
            };
            send(out, &message, status).await?;
        }
    };
    let keep = async {
        let mut tick = tokio::time::interval(FLUSH);
        loop {
            tick.tick().await;
            if let Err(e) = remote.flush().await {
                return Err::<(), _>(disk("making blocks durable")(e));
            }
        }
    };
    let overwritten = watch_writes(arrival.written, &remote, status);
    tokio::select! {
        asked = ask => asked?,
        never = overwritten => match never {},
        failed = pulled => return failed,
        failed = pushed => return failed,
        failed = keep => return failed,
    }
    if let Some(done) = remote.finished().await.map_err(disk("finishing the middle layer"))? {
        send(out, &done, status).await?;
    }
    remote.seal().await.map_err(disk("sealing the middle layer"))?;
    status.send_modify(|s| s.counts.disk_left = 0);
    Ok(())
}
