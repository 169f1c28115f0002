//! The chunk exchange over lanes.

use std::sync::Arc;

use bytes::Bytes;
use godwit_types::{CodedError, Hash};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    ChunkError, ChunkMsg, Effect, MAX_HASHES, MAX_UNIT, Puller, PullerConfig, Supplier, Unit,
    Urgency,
};
use crate::codec::Packer;
use crate::link::{Lane, LaneError, LaneSender, Link};
use crate::window::{Window, WindowConfig};
use crate::wire::{LaneKind, WireError, encode};

/// How many units are read from a store at once.
const BATCH: usize = 64;
/// What one unit counts for in the window, in bytes: a page.
const NOMINAL_UNIT: u64 = 4096;

/// Where units come from. May block; called outside the async workers.
pub trait ChunkSource: Send + Sync + 'static {
    /// What the store reports.
    type Error: CodedError + Send + Sync + 'static;

    /// Reads units, `None` where there is none. A unit has at most [`MAX_UNIT`] bytes.
    ///
    /// # Errors
    /// When the store fails; the lane is given up.
    fn load(&self, hashes: &[Hash]) -> Result<Vec<Option<Bytes>>, Self::Error>;

    /// For each hash, whether it is here.
    ///
    /// # Errors
    /// When the store fails; the lane is given up.
    fn holds(&self, hashes: &[Hash]) -> Result<Vec<bool>, Self::Error>;
}

/// Where units go. May block; called outside the async workers.
pub trait ChunkSink: Send + Sync + 'static {
    /// What the store reports.
    type Error: CodedError + Send + Sync + 'static;

    /// For each hash, whether it is lacking.
    ///
    /// # Errors
    /// When the store fails; the pull ends.
    fn lacking(&self, hashes: &[Hash]) -> Result<Vec<bool>, Self::Error>;

    /// Keeps units whose content was checked against their hashes.
    ///
    /// # Errors
    /// When the store fails (it is full, say); the pull ends.
    fn keep(&self, units: Vec<Unit>) -> Result<(), Self::Error>;
}

async fn blocking<T, E>(
    doing: &'static str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, ChunkError>
where
    T: Send + 'static,
    E: CodedError + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => {
            let fault = crate::rpc::Fault::from(error);
            Err(ChunkError::Store { doing, code: fault.code, text: fault.text })
        }
        Err(_) => Err(ChunkError::Store {
            doing,
            code: godwit_types::Code::Internal,
            text: "its task ended early".into(),
        }),
    }
}

/// Answers one lane of a receiver ([`LaneKind::ChunkDemand`] or [`LaneKind::ChunkBulk`]) from
/// `source`, until the receiver ends the lane.
///
/// # Errors
/// [`ChunkError`].
pub async fn supply_lane<S: ChunkSource>(lane: Lane, source: Arc<S>) -> Result<(), ChunkError> {
    let (mut out, mut requests) = lane.split();
    let mut supplier = Supplier::new();
    let mut packer = Packer::new();
    let mut open = true;
    while open || !supplier.is_idle() {
        // All that has come is read before more is sent, so that a cancel counts.
        while open {
            let message = if supplier.is_idle() {
                requests.recv().await?
            } else {
                match futures::FutureExt::now_or_never(requests.recv()) {
                    Some(message) => message?,
                    None => break,
                }
            };
            match message {
                Some(bytes) => match ChunkMsg::decode(&bytes)? {
                    ChunkMsg::Have(hashes) => {
                        let source = Arc::clone(&source);
                        let held =
                            blocking("looking up units", move || source.holds(&hashes)).await?;
                        let mut bits = vec![0u8; held.len().div_ceil(8)];
                        for (i, _) in held.iter().enumerate().filter(|(_, held)| !**held) {
                            bits[i / 8] |= 1 << (i % 8);
                        }
                        let answer = ChunkMsg::Lack(bits.into());
                        out.send_bytes(encode("chunk message", &answer)?).await?;
                    }
                    message => supplier.on_message(message)?,
                },
                None => open = false,
            }
        }
        let batch = supplier.next_batch(BATCH);
        if batch.is_empty() {
            continue;
        }
        let (hashes, source) = (batch.clone(), Arc::clone(&source));
        let units = blocking("reading units", move || source.load(&hashes)).await?;
        let mut missing = Vec::new();
        for (hash, data) in batch.into_iter().zip(units.into_iter().chain(std::iter::repeat(None)))
        {
            match data {
                Some(data) if data.len() <= MAX_UNIT => {
                    let raw_len = data.len() as u32;
                    let message = ChunkMsg::Unit { hash, raw_len, packed: packer.pack(&data) };
                    out.send_bytes(encode("chunk message", &message)?).await?;
                }
                _ => missing.push(hash),
            }
        }
        if !missing.is_empty() {
            out.send_bytes(encode("chunk message", &ChunkMsg::Missing(missing))?).await?;
        }
    }
    Ok(out.finish().await?)
}

/// Asks the peer, which answers with [`supply_lane`], which of `hashes` it lacks; in their order.
///
/// # Errors
/// [`ChunkError`].
pub async fn ask_lacking(
    link: &Link,
    about: Bytes,
    hashes: &[Hash],
) -> Result<Vec<bool>, ChunkError> {
    let kind = LaneKind::ChunkDemand;
    let (mut out, mut answers) = link.open_about(kind, kind.usual_priority(), about).await?.split();
    let batches = async {
        for batch in hashes.chunks(MAX_HASHES) {
            let message = ChunkMsg::Have(batch.to_vec());
            out.send_bytes(encode("chunk message", &message)?).await?;
        }
        out.end();
        Ok::<_, ChunkError>(())
    };
    let collect = async {
        let mut lacking = Vec::with_capacity(hashes.len());
        for batch in hashes.chunks(MAX_HASHES) {
            let answer = answers.recv().await?.ok_or(LaneError::Ended)?;
            match ChunkMsg::decode(&answer)? {
                ChunkMsg::Lack(bits) if bits.len() == batch.len().div_ceil(8) => {
                    lacking.extend((0..batch.len()).map(|i| bits[i / 8] & (1 << (i % 8)) != 0));
                }
                _ => {
                    return Err(ChunkError::Wire(WireError::Bounds {
                        what: "chunk message",
                        why: "it does not answer which units are lacking",
                    }));
                }
            }
        }
        Ok(lacking)
    };
    let (sent, lacking) = tokio::join!(batches, collect);
    sent?;
    lacking
}

/// Makes demands while a [`pull`] runs.
#[derive(Debug, Clone)]
pub struct PullHandle {
    urgent: mpsc::Sender<Vec<Hash>>,
    stop: CancellationToken,
}

impl PullHandle {
    /// A handle and what [`pull`] takes with it.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Vec<Hash>>) {
        let (urgent, demands) = mpsc::channel(64);
        (Self { urgent, stop: CancellationToken::new() }, demands)
    }

    /// These are needed at once. Waits while very many demands are queued; `false` when the pull
    /// is over.
    pub async fn demand(&self, hashes: Vec<Hash>) -> bool {
        self.urgent.send(hashes).await.is_ok()
    }

    /// Ends the pull; what is here stays.
    pub fn cancel(&self) {
        self.stop.cancel();
    }
}

/// What a [`pull`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PullReport {
    /// Units that were asked about.
    pub asked_about: u64,
    /// Of those, units that were here already.
    pub known: u64,
    /// Units that came.
    pub came: u64,
    /// Bytes of messages that came, packed.
    pub wire_bytes: u64,
    /// Bytes of the units, unpacked.
    pub raw_bytes: u64,
}

/// Brings all of `hashes` that `sink` lacks over `link`, and what is demanded by the handle
/// first. To resume after a cut, call it again on a new link: only what is still lacking crosses.
/// `about` tells the sender which job it is.
///
/// # Errors
/// [`ChunkError`]; [`ChunkError::Missing`] after everything else has come.
pub async fn pull<K: ChunkSink>(
    link: &Link,
    about: Bytes,
    hashes: &[Hash],
    sink: Arc<K>,
    handle: &PullHandle,
    demands: &mut mpsc::Receiver<Vec<Hash>>,
) -> Result<PullReport, ChunkError> {
    let open = |kind: LaneKind| link.open_about(kind, kind.usual_priority(), about.clone());
    let (mut demand_out, mut demand_in) = open(LaneKind::ChunkDemand).await?.split();
    let (mut bulk_out, mut bulk_in) = open(LaneKind::ChunkBulk).await?.split();
    let mut puller = Puller::new(PullerConfig::default());
    let mut report = PullReport::default();
    let mut batches = hashes.chunks(MAX_HASHES);
    let mut more = true;
    // The receiver paces the sender: what is asked for is what will be in flight.
    let mut window = Window::new(WindowConfig::default());
    let began = Instant::now();
    let (mut window_sent, mut window_taken) = (0, 0);
    loop {
        // The next part of the list only when the one before is nearly through.
        while more && puller.left() < MAX_HASHES / 2 {
            let Some(batch) = batches.next() else {
                more = false;
                break;
            };
            want(&mut puller, batch, Urgency::Background, &sink, &mut report).await?;
        }
        puller.limit_background((window.target() / NOMINAL_UNIT) as usize);
        for effect in puller.ask() {
            if let Effect::Send(Urgency::Background, ChunkMsg::Want(batch)) = &effect {
                let bytes = batch.len() as u64 * NOMINAL_UNIT;
                window.on_sent(bytes, began.elapsed());
                window_sent += bytes;
            }
            send(effect, &mut demand_out, &mut bulk_out).await?;
        }
        if !more && puller.is_done() {
            break;
        }
        let (bytes, urgent, mut from_bulk) = tokio::select! {
            biased;
            () = handle.stop.cancelled() => return Err(ChunkError::Cancelled),
            Some(urgent) = demands.recv() => (None, urgent, false),
            bytes = demand_in.recv() => (Some(bytes?.ok_or(LaneError::Ended)?), Vec::new(), false),
            bytes = bulk_in.recv() => (Some(bytes?.ok_or(LaneError::Ended)?), Vec::new(), true),
        };
        for batch in urgent.chunks(MAX_HASHES) {
            want(&mut puller, batch, Urgency::Demand, &sink, &mut report).await?;
        }
        let Some(bytes) = bytes else { continue };
        // What else is here goes to the store in the same step.
        let mut units = Vec::new();
        let mut next = Some(bytes);
        while let Some(bytes) = next.take() {
            report.wire_bytes += bytes.len() as u64;
            let message = ChunkMsg::decode(&bytes)?;
            if from_bulk {
                let answered = if let ChunkMsg::Missing(h) = &message { h.len() as u64 } else { 1 };
                window_taken = (window_taken + answered * NOMINAL_UNIT).min(window_sent);
            }
            from_bulk = true;
            for effect in puller.on_message(message)? {
                match effect {
                    Effect::Keep(unit) => {
                        report.raw_bytes += unit.data.len() as u64;
                        report.came += 1;
                        units.push(unit);
                    }
                    other @ Effect::Send(..) => {
                        send(other, &mut demand_out, &mut bulk_out).await?;
                    }
                }
            }
            if units.len() < BATCH {
                next = futures::FutureExt::now_or_never(bulk_in.recv()).transpose()?.flatten();
            }
        }
        window.on_acked(window_taken, began.elapsed());
        if !units.is_empty() {
            let sink = Arc::clone(&sink);
            blocking("keeping units", move || sink.keep(units)).await?;
        }
    }
    demand_out.end();
    bulk_out.end();
    match puller.missing() {
        [] => Ok(report),
        [first, ..] => Err(ChunkError::Missing { count: puller.missing().len(), first: *first }),
    }
}

async fn want<K: ChunkSink>(
    puller: &mut Puller,
    hashes: &[Hash],
    urgency: Urgency,
    sink: &Arc<K>,
    report: &mut PullReport,
) -> Result<(), ChunkError> {
    let (batch, asked) = (hashes.to_vec(), Arc::clone(sink));
    let lacking = blocking("looking up units", move || asked.lacking(&batch)).await?;
    let lacked: Vec<Hash> =
        hashes.iter().zip(&lacking).filter(|(_, lacks)| **lacks).map(|(h, _)| *h).collect();
    report.asked_about += hashes.len() as u64;
    report.known += (hashes.len() - lacked.len()) as u64;
    puller.want(lacked, urgency);
    Ok(())
}

async fn send(
    effect: Effect,
    demand: &mut LaneSender,
    bulk: &mut LaneSender,
) -> Result<(), ChunkError> {
    if let Effect::Send(urgency, message) = effect {
        let bytes = encode("chunk message", &message)?;
        match urgency {
            Urgency::Demand => demand.send_bytes(bytes).await?,
            Urgency::Background => bulk.send_bytes(bytes).await?,
        }
    }
    Ok(())
}
