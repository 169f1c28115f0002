//! The two halves of disk post-copy on real files: the async skin of [`crate::postcopy`].
//!
//! Neither half knows the link. The owner of the link takes messages with `next_...` when its
//! lane has room and hands over what arrives with `handle`.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_types::{BLOCK_SIZE, Code, CodedError};
use tokio::sync::{Notify, oneshot};

use crate::bitmap::BlockBitmap;
use crate::error::DiskError;
use crate::image::{FrozenChain, MidLayer};
use crate::msg::{BitmapPart, BitmapParts, BlockRange, BlockRun, DiskMsg, MsgError};
use crate::nbd::BlockSource;
use crate::postcopy::{PostcopyDestination, PostcopySource, Read, SourceCounts, Ticket, ToSend};

/// A failure of one half of a disk post-copy.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// What the peer sent was refused.
    #[error("a message of disk post-copy was refused")]
    Message(#[from] MsgError),
    /// An image failed.
    #[error("an image failed in disk post-copy")]
    Disk(#[from] DiskError),
    /// The peer sent a message that only this side sends.
    #[error("a message of disk post-copy came from the wrong side")]
    WrongSide,
    /// A worker thread died.
    #[error("a disk worker ended early")]
    Worker,
}

impl CodedError for LiveError {
    fn code(&self) -> Code {
        match self {
            Self::Message(e) => e.code(),
            Self::Disk(e) => e.code(),
            Self::WrongSide => Code::Invalid,
            Self::Worker => Code::Internal,
        }
    }
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, LiveError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|_| LiveError::Worker)?;
    Ok(done?)
}

/// The source of a disk post-copy: a frozen chain and figure 5.
#[derive(Debug)]
pub struct SourceDisk {
    chain: Arc<FrozenChain>,
    core: Mutex<PostcopySource>,
    have: Mutex<BitmapParts>,
    changed: Notify,
    released: Notify,
}

impl SourceDisk {
    /// Serves the blocks `bitmap` (usually [`FrozenChain::allocation`], less what the far side
    /// has already) of `chain`.
    #[must_use]
    pub fn new(chain: Arc<FrozenChain>, bitmap: BlockBitmap) -> Self {
        Self {
            chain,
            core: Mutex::new(PostcopySource::new(bitmap)),
            have: Mutex::default(),
            changed: Notify::new(),
            released: Notify::new(),
        }
    }

    /// The messages to send at STOP, before all else.
    #[must_use]
    pub fn greeting(&self) -> Vec<DiskMsg> {
        BitmapPart::cut(locked(&self.core).bitmap()).map(DiskMsg::Bitmap).collect()
    }

    /// The link was lost: nothing is sent on the next one until the destination has said what it
    /// has. Call it before taking messages for a new link.
    pub fn link_lost(&self) {
        locked(&self.core).link_lost();
        *locked(&self.have) = BitmapParts::default();
    }

    /// Takes a message from the destination.
    ///
    /// # Errors
    /// If it is refused; the link should then be dropped and made anew.
    pub fn handle(&self, msg: DiskMsg) -> Result<(), LiveError> {
        match msg {
            DiskMsg::Pull { id, range, again } => locked(&self.core).pull(id, range, again)?,
            DiskMsg::Syn(ranges) => locked(&self.core).syn(&ranges)?,
            DiskMsg::Have(part) => {
                if let Some(have) = locked(&self.have).take(&part)? {
                    locked(&self.core).have(&have)?;
                }
            }
            DiskMsg::Done => {
                locked(&self.core).released()?;
                self.released.notify_waiters();
            }
            DiskMsg::Bitmap(_) | DiskMsg::Push(_) | DiskMsg::PullReply { .. } => {
                return Err(LiveError::WrongSide);
            }
        }
        self.changed.notify_waiters();
        Ok(())
    }

    /// Waits for the next block run that a read is waiting for. Cancel-safe, as the other two.
    ///
    /// # Errors
    /// If the chain can't be read.
    pub async fn next_demanded(&self) -> Result<DiskMsg, LiveError> {
        self.next(PostcopySource::next_demanded).await
    }

    /// Waits for the next run of active push, or [`DiskMsg::Done`] after the last. Call it when
    /// the lane for bulk has room.
    ///
    /// # Errors
    /// If the chain can't be read.
    pub async fn next_push(&self) -> Result<DiskMsg, LiveError> {
        self.next(PostcopySource::next_push).await
    }

    /// Waits for whatever is next, pulls first: for links with a single lane.
    ///
    /// # Errors
    /// If the chain can't be read.
    pub async fn next_any(&self) -> Result<DiskMsg, LiveError> {
        self.next(PostcopySource::next_send).await
    }

    async fn next(
        &self,
        take: impl Fn(&mut PostcopySource) -> Option<ToSend>,
    ) -> Result<DiskMsg, LiveError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let next = take(&mut locked(&self.core));
            let Some(next) = next else {
                changed.await;
                continue;
            };
            // A caller that goes away while the blocks are read must not lose them.
            let mut taken = Taken { disk: self, next: Some(next) };
            let msg = match next {
                ToSend::Done => DiskMsg::Done,
                ToSend::Push(range) => DiskMsg::Push(self.read(range).await?),
                ToSend::PullReply { id, range } => {
                    DiskMsg::PullReply { id, run: self.read(range).await? }
                }
            };
            taken.next = None;
            return Ok(msg);
        }
    }

    async fn read(&self, range: BlockRange) -> Result<BlockRun, LiveError> {
        let chain = Arc::clone(&self.chain);
        blocking(move || {
            let mut data = vec![0; range.count as usize * BLOCK_SIZE];
            chain.read_blocks(range.first, &mut data)?;
            Ok(BlockRun::encode(range.first, &data))
        })
        .await
    }

    /// Blocks still to be sent.
    #[must_use]
    pub fn left(&self) -> u64 {
        locked(&self.core).bitmap().count()
    }

    /// What was sent so far.
    #[must_use]
    pub fn counts(&self) -> SourceCounts {
        locked(&self.core).counts()
    }

    /// Waits until the destination has everything on disk.
    pub async fn wait_released(&self) {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            if locked(&self.core).is_released() {
                return;
            }
            released.await;
        }
    }
}

/// Blocks that were taken from the core and are not a message yet.
struct Taken<'a> {
    disk: &'a SourceDisk,
    next: Option<ToSend>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(unsent) = self.next.take() {
            locked(&self.disk.core).put_back(unsent);
            self.disk.changed.notify_waiters();
        }
    }
}

/// The destination of a disk post-copy: figure 4 over a middle layer. Served by
/// [`crate::nbd::NbdServer`], it is the node `remote` below the guest's `top`.
#[derive(Debug)]
pub struct RemoteDisk {
    mid: Arc<MidLayer>,
    core: Mutex<PostcopyDestination>,
    waiters: Mutex<HashMap<Ticket, oneshot::Sender<()>>>,
    to_send: Notify,
    progress: Notify,
}

impl RemoteDisk {
    /// Begins with a new middle layer ([`PostcopyDestination::new`]) or one that was resumed
    /// ([`PostcopyDestination::resume`]).
    #[must_use]
    pub fn new(mid: MidLayer, core: PostcopyDestination) -> Self {
        Self {
            mid: Arc::new(mid),
            core: Mutex::new(core),
            waiters: Mutex::default(),
            to_send: Notify::new(),
            progress: Notify::new(),
        }
    }

    /// Takes a message from the source and writes what it brings to the middle layer. Let it run
    /// to its end: blocks of a call that is dropped count as lost until the next
    /// [`RemoteDisk::reconnected`].
    ///
    /// # Errors
    /// If it is refused or the layer can't be written. A damaged run is not written; make the
    /// link anew and call [`RemoteDisk::reconnected`].
    pub async fn handle(&self, msg: DiskMsg) -> Result<(), LiveError> {
        let run = match msg {
            DiskMsg::Push(run) | DiskMsg::PullReply { run, .. } => run,
            DiskMsg::Done => {
                locked(&self.core).source_done();
                self.progress.notify_waiters();
                return Ok(());
            }
            _ => return Err(LiveError::WrongSide),
        };
        let range = run.range();
        let fresh = locked(&self.core).arrived(range)?;
        let data = run.decode()?;
        let mid = Arc::clone(&self.mid);
        let parts = fresh.clone();
        blocking(move || {
            for part in parts {
                let at = |block: u64| (block - range.first) as usize * BLOCK_SIZE;
                mid.write(part.start, &data[at(part.start)..at(part.end)])?;
            }
            Ok(())
        })
        .await?;
        for part in fresh {
            let ready = locked(&self.core).stored(part);
            let mut waiters = locked(&self.waiters);
            for ticket in ready {
                // A reader that left needs no answer.
                let _ = waiters.remove(&ticket).map(|w| w.send(()));
            }
        }
        self.progress.notify_waiters();
        Ok(())
    }

    /// The guest overwrote all of these blocks in `top`, durably ([`crate::OverlayWatch::settled`]).
    pub fn written(&self, blocks: std::ops::Range<u64>) {
        locked(&self.core).write(blocks);
        self.to_send.notify_waiters();
        self.progress.notify_waiters();
    }

    /// A new link to the source: call it before taking messages for that link.
    pub fn reconnected(&self) {
        locked(&self.core).reconnected();
        self.to_send.notify_waiters();
    }

    /// Waits for the next message to the source. They go on one ordered lane.
    pub async fn next_message(&self) -> DiskMsg {
        loop {
            let changed = self.to_send.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let next = locked(&self.core).next_message();
            match next {
                Some(msg) => return msg,
                None => changed.await,
            }
        }
    }

    /// Blocks still to come.
    #[must_use]
    pub fn left(&self) -> u64 {
        locked(&self.core).missing().count()
    }

    /// Blocks that need not come: the guest overwrote them first.
    #[must_use]
    pub fn cancelled(&self) -> u64 {
        locked(&self.core).cancelled().count()
    }

    /// Whether the source says that it has sent everything and yet blocks are missing.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        locked(&self.core).is_stalled()
    }

    /// Waits until every block is here or cancelled.
    pub async fn wait_complete(&self) {
        loop {
            let progress = self.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            if locked(&self.core).is_complete() {
                return;
            }
            progress.await;
        }
    }

    /// Makes what has come so far durable; call it every second or so while blocks come.
    ///
    /// # Errors
    /// If the layer can't be written.
    pub async fn flush(&self) -> Result<(), LiveError> {
        let mid = Arc::clone(&self.mid);
        blocking(move || mid.flush()).await
    }

    /// When every block is here: makes the layer durable and returns the message that releases
    /// the source. `None` while blocks are missing or if the link was told already. Reads go on
    /// until the server is stopped.
    ///
    /// # Errors
    /// If the layer can't be written.
    pub async fn finished(&self) -> Result<Option<DiskMsg>, LiveError> {
        if !locked(&self.core).is_complete() {
            return Ok(None);
        }
        self.flush().await?;
        Ok(locked(&self.core).finished())
    }

    /// Closes the middle layer so that QEMU can open it: after [`RemoteDisk::finished`]. Reads
    /// through the server may still go on: the layer is not written any more.
    ///
    /// # Errors
    /// If the layer can't be written.
    pub async fn seal(&self) -> Result<PathBuf, LiveError> {
        let mid = Arc::clone(&self.mid);
        blocking(move || mid.seal()).await
    }
}

impl BlockSource for RemoteDisk {
    fn bytes(&self) -> u64 {
        self.mid.bytes()
    }

    async fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let block = BLOCK_SIZE as u64;
        let blocks = offset / block..(offset + len as u64).div_ceil(block);
        let waiting = {
            let mut core = locked(&self.core);
            match core.read(blocks) {
                Read::Ready => None,
                Read::Wait(ticket) => {
                    let (tx, rx) = oneshot::channel();
                    locked(&self.waiters).insert(ticket, tx);
                    Some(rx)
                }
            }
        };
        if let Some(rx) = waiting {
            self.to_send.notify_waiters();
            rx.await.map_err(|_| io::Error::other("the disk was closed while a read waited"))?;
        }
        let mid = Arc::clone(&self.mid);
        blocking(move || {
            let mut data = vec![0; len];
            mid.read(offset, &mut data)?;
            Ok(data)
        })
        .await
        .map_err(io::Error::other)
    }
}

impl BlockSource for Arc<FrozenChain> {
    fn bytes(&self) -> u64 {
        FrozenChain::bytes(self)
    }

    async fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let chain = Arc::clone(self);
        blocking(move || {
            let mut data = vec![0; len];
            chain.read_at(offset, &mut data)?;
            Ok(data)
        })
        .await
        .map_err(io::Error::other)
    }
}
