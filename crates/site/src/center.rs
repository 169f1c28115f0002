//! What a site asks of its center, over the link that it keeps to it.
//!
//! ```text
//! pipe lane that the site opens:
//!   site   -> CenterRequest | the body: pieces, the last one marked
//!   center -> Result<ApiAnswer, Fault> | the body: pieces, the last one marked
//!   site   -> that it has taken a piece, for each
//! ```
//!
//! People read slowly, and what waits for them on the link is in the way of all else there. So the
//! center sends each answer so many pieces ahead of those that were taken, and all of a site's
//! together so many bytes; a site gives up whoever leaves a piece for too long.
//!
//! A site has no rights of its own at its center: what it hands over is somebody's request with
//! that one's token, and the center answers it as it does whoever asks it itself. A body whose
//! lane ends before the last piece broke off. Who lets go of the answer ends the request.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use godwit_transfer::{Lane, LaneError, LaneKind, LaneReceiver, LaneSender, Link, Peer, Priority};
use godwit_types::{Code, Fault, Name};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::bounds;
use super::remote::{LAST, MORE, PIECE, recv_at_most, send_message};

/// Requests of one site that its center works on at once; streams of events are among them.
pub const API_AT_ONCE: usize = 128;

/// The longest head of a request or an answer, in bytes.
const MAX_HEAD: usize = 64 << 10;

/// The longest method of HTTP, in bytes.
const MAX_METHOD: usize = 16;

/// The longest path with its query, in bytes.
const MAX_TARGET: usize = 8 << 10;

/// The most headers of a request or an answer.
const MAX_HEADERS: usize = 32;

/// How long a request may take to arrive after its lane was opened.
const ARRIVAL: Duration = Duration::from_secs(30);

/// How long the body of a request may stand still.
const BODY_STILL: Duration = Duration::from_secs(60);

/// How long the center may take for the head of its answer, from the end of the request on: a
/// program's start and the wait for its end may each take 600 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(1500);

/// How long whoever asked may take for the next piece of its answer.
const READ_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 8 } else { 30 });

/// Bytes of an answer in one frame.
const ANSWER_PIECE: usize = 64 << 10;

/// Pieces of one answer that were sent and not taken.
const AHEAD: usize = 16;

/// Bytes of all answers to one site that were sent and not taken, beside one piece of each. With
/// those it is well below what a link lets its peer send unread.
const AHEAD_OF_SITE: usize = 6 << 20;

/// Marks that a piece of the answer was taken.
const TAKEN: u8 = 2;

/// How long a piece of a body may wait for the other side to take it.
const TAKEN_WITHIN: Duration = Duration::from_secs(120);

/// A request to the center. Only ever added to at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CenterRequest {
    /// Somebody's request to the API.
    Api(ApiRequest),
}

impl CenterRequest {
    /// What it is called in messages.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Api(_) => ApiRequest::NAME,
        }
    }

    /// The first version of the protocol that has it.
    #[must_use]
    pub const fn since(&self) -> u16 {
        match self {
            Self::Api(_) => ApiRequest::SINCE,
        }
    }
}

/// Somebody's request to the center's API; its body follows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiRequest {
    /// HTTP's method.
    pub method: String,
    /// The path, with the query.
    pub target: String,
    /// The headers that the center is to know, in lower case; a token among them.
    pub headers: Vec<(String, String)>,
    /// The length of its body in bytes, where its sender has said it.
    pub length: Option<u64>,
}

impl std::fmt::Debug for ApiRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The headers hold a token.
        write!(f, "ApiRequest({} {})", self.method, self.target)
    }
}

impl ApiRequest {
    /// The first version of the protocol that has it.
    pub const SINCE: u16 = 4;
    /// What it is called in messages.
    pub const NAME: &'static str = "api request";

    /// The same within its bounds.
    fn checked(self) -> Result<Self, Fault> {
        let refuse = |what: &str| Err(Fault::invalid(format!("a request with {what}")));
        if self.method.is_empty() || self.method.len() > MAX_METHOD {
            return refuse("no method, or a long one");
        }
        if !self.target.starts_with('/') || self.target.len() > MAX_TARGET {
            return refuse("a path that is none or over 8 KiB");
        }
        if self.headers.len() > MAX_HEADERS {
            return refuse("more than 32 headers");
        }
        Ok(self)
    }
}

/// The head of the center's answer; its body follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiAnswer {
    /// HTTP's status.
    pub status: u16,
    /// The headers, in lower case.
    pub headers: Vec<(String, String)>,
}

/// Pieces of a body.
pub type Pieces = BoxStream<'static, Result<Bytes, Fault>>;

/// What a center does for its sites.
#[async_trait]
pub trait CenterHost: Send + Sync {
    /// Answers the request of somebody at the site `by`.
    ///
    /// # Errors
    /// What keeps it from being answered at all; a refusal is an answer.
    async fn api(
        &self,
        by: &Peer,
        request: ApiRequest,
        body: Pieces,
    ) -> Result<(ApiAnswer, Pieces), Fault>;
}

/// Asks the center at the other end of `link` on behalf of somebody. `place` is let go of when the
/// answer was taken whole, or is not wanted any more, or its next piece is not taken for 30 s.
///
/// # Errors
/// That the center is too old for it; what it said; [`Code::Unavailable`] when the link broke,
/// and what was asked may have been done.
pub async fn ask_center(
    link: &Link,
    request: ApiRequest,
    body: impl Stream<Item = Result<Bytes, Fault>> + Send + 'static,
    place: impl Send + 'static,
) -> Result<(ApiAnswer, Pieces), Fault> {
    let center = link.peer().name.clone();
    let request = CenterRequest::Api(request.checked()?);
    newer(&center, link.version(), &request)?;
    let lost = |f: Fault| {
        let words = format!("the link to center '{center}' broke off: {}", f.message);
        Fault::unavailable(words).hint("see whether it was done before you ask again")
    };
    let opened = link.open(LaneKind::Pipe, Priority::Bulk).await;
    let (mut to, mut from) = opened.map_err(|e| lost(Fault::of(&e)))?.split();
    send_message(&mut to, &request).await.map_err(lost)?;
    let (took, taken) = mpsc::unbounded_channel();
    // The answer may come before the whole body has gone: it is then a refusal.
    let sending = tokio::spawn(async move {
        if let Err(error) = send_request(&mut to, body.boxed(), taken).await {
            tracing::debug!(%error, "the body of a request is not sent whole");
        }
    });
    // It ends with the answer.
    let sending = Ends(sending.abort_handle());
    let answer = recv_at_most::<Result<ApiAnswer, Fault>>(&mut from, MAX_HEAD).await;
    let answer = answer.map_err(lost)?.map_err(bounds::fault)?;
    if !(100..1000).contains(&answer.status) || answer.headers.len() > MAX_HEADERS {
        return Err(Fault::new(Code::Damaged, "an answer of the center that is none"));
    }
    let (to, pieces) = mpsc::channel(1);
    tokio::spawn(async move {
        hand_on(read_body(Lent::kept(from), None), to, took).await;
        drop((sending, place));
    });
    Ok((answer, handed_on(pieces)))
}

/// Sends the body of a request, and what its answer's reader has taken meanwhile and after that.
async fn send_request(
    to: &mut LaneSender,
    mut body: Pieces,
    mut taken: mpsc::UnboundedReceiver<()>,
) -> Result<(), Fault> {
    let mut whole = false;
    loop {
        let piece = tokio::select! {
            took = taken.recv() => {
                let Some(()) = took else { return Ok(()) };
                send_piece(to, TAKEN, &[]).await?;
                continue;
            }
            piece = body.next(), if !whole => piece.transpose()?,
            () = to.stopped() => return Err(Fault::of(&LaneError::Ended)),
        };
        let Some(piece) = piece else {
            send_piece(to, LAST, &[]).await?;
            whole = true;
            continue;
        };
        for part in piece.chunks(PIECE) {
            send_piece(to, MORE, part).await?;
        }
    }
}

/// Pieces on their way to whoever asked; nothing follows the end of a whole body.
type Handed = Result<Option<Bytes>, Fault>;

/// Reads an answer for its caller, at the caller's pace; one that does not go on is left.
async fn hand_on(mut pieces: Pieces, to: mpsc::Sender<Handed>, took: mpsc::UnboundedSender<()>) {
    loop {
        // There is room when the piece before was taken.
        let Ok(Ok(room)) = tokio::time::timeout(READ_WITHIN, to.reserve()).await else { return };
        let piece = tokio::select! {
            piece = pieces.next() => piece.transpose(),
            () = to.closed() => return,
        };
        // The center is told now: the link holds it no more.
        let _ = took.send(());
        let over = !matches!(piece, Ok(Some(_)));
        room.send(piece);
        if over {
            // Whoever asked has its place until the end of what it asked for.
            let _ = tokio::time::timeout(READ_WITHIN, to.reserve()).await;
            return;
        }
    }
}

fn handed_on(pieces: mpsc::Receiver<Handed>) -> Pieces {
    let reading = futures::stream::try_unfold(Some(pieces), |pieces| async move {
        let Some(mut pieces) = pieces else { return Ok(None) };
        let left = || Fault::new(Code::TimedOut, "the body broke off: it was not read in time");
        let piece = pieces.recv().await.unwrap_or_else(|| Err(left()))?;
        Ok(piece.map(|piece| (piece, Some(pieces))))
    });
    reading.boxed()
}

/// Ends a task when it goes.
struct Ends(tokio::task::AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Refuses what `peer` is too old for.
fn newer(peer: &Name, speaks: u16, request: &CenterRequest) -> Result<(), Fault> {
    let (what, since) = (request.name(), request.since());
    if speaks >= since {
        return Ok(());
    }
    let words = format!("'{peer}' speaks protocol {speaks}, and '{what}' needs {since}");
    Err(Fault::conflict(words).hint(format!("update '{peer}'")))
}

/// Answers what the site at the other end of `link` asks, until the link is closed.
pub async fn serve_site(link: Link, host: Arc<dyn CenterHost>) {
    let room = Arc::new((Semaphore::new(API_AT_ONCE), Semaphore::new(AHEAD_OF_SITE)));
    while let Ok(lane) = link.accept_lane().await {
        let (host, room, by) = (host.clone(), room.clone(), link.peer().clone());
        let speaks = link.version();
        tokio::spawn(async move {
            let site = by.name.clone();
            if lane.kind() != LaneKind::Pipe {
                tracing::debug!(%site, kind = ?lane.kind(), "a lane that is not served here");
                lane.abort();
            } else if let Err(error) = answer(lane, by, speaks, &*host, (&room.0, &room.1)).await {
                tracing::debug!(%site, %error, "a request could not be answered");
            }
        });
    }
}

async fn answer(
    lane: Lane,
    by: Peer,
    speaks: u16,
    host: &dyn CenterHost,
    (room, ahead): (&Semaphore, &Semaphore),
) -> Result<(), Fault> {
    let (mut to, mut from) = lane.split();
    let arrived = tokio::time::timeout(ARRIVAL, recv_at_most(&mut from, MAX_HEAD)).await;
    let request = match arrived {
        Ok(Ok(request)) => request,
        Ok(Err(f)) if f.code == Code::Damaged => {
            let words = "a request that the center does not know";
            let f = Fault::invalid(words).hint("is it older than the site?");
            return refuse(to, f).await;
        }
        Ok(Err(f)) => return Err(f),
        Err(_) => return Err(Fault::new(Code::TimedOut, "a lane with no request")),
    };
    if let Err(f) = newer(&by.name, speaks, &request) {
        return refuse(to, f).await;
    }
    let CenterRequest::Api(request) = request;
    let Ok(_place) = room.try_acquire() else {
        let words = format!("site '{}' has {API_AT_ONCE} requests at its center", by.name);
        return refuse(to, Fault::unavailable(words).hint("come back later")).await;
    };
    let request = match request.checked() {
        Ok(request) => request,
        Err(f) => return refuse(to, f).await,
    };
    // Since the last piece of the request that was read.
    let progress = Arc::new(Mutex::new(Instant::now()));
    let (back, returned) = oneshot::channel();
    let body = read_body(Lent { from: Some(from), back: Some(back) }, Some(progress.clone()));
    let too_late = async {
        loop {
            let due = *progress.lock().unwrap_or_else(PoisonError::into_inner) + ANSWER_WITHIN;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    };
    let outcome = tokio::select! {
        outcome = host.api(&by, request, body) => outcome,
        () = to.stopped() => return Ok(()),
        () = too_late => Err(Fault::new(Code::TimedOut, "the center took too long to answer")),
    };
    match outcome {
        Ok((head, body)) => {
            send_message(&mut to, &Ok::<_, Fault>(head)).await?;
            let taken = Taken { returned: Some(returned), from: None, over: false };
            send_answer(&mut to, body, taken, ahead).await?;
            to.finish().await.map_err(|e| Fault::of(&e))
        }
        Err(f) => refuse(to, f).await,
    }
}

async fn refuse(mut to: LaneSender, f: Fault) -> Result<(), Fault> {
    send_message(&mut to, &Err::<ApiAnswer, _>(f)).await?;
    to.finish().await.map_err(|e| Fault::of(&e))
}

/// What a site says of the pieces that it takes, on the lane that brought its request.
struct Taken {
    /// Comes when nobody reads the request's body any more.
    returned: Option<oneshot::Receiver<LaneReceiver>>,
    from: Option<LaneReceiver>,
    /// The site says no more.
    over: bool,
}

impl Taken {
    /// Waits until one more was taken; false when the site will say so of none. Safe to cancel.
    async fn one(&mut self) -> bool {
        if let Some(returned) = &mut self.returned {
            self.from = returned.await.ok();
            self.returned = None;
        }
        while let Some(from) = &mut self.from {
            match from.recv().await {
                Ok(Some(frame)) if frame.first() == Some(&TAKEN) => return true,
                // The rest of a body that nobody reads.
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        self.over = true;
        false
    }
}

/// Sends the body of an answer, no further ahead of its reader than it may. One that fails or is
/// not taken is left without an end, which is how the other side knows.
async fn send_answer(
    to: &mut LaneSender,
    mut body: Pieces,
    mut taken: Taken,
    ahead: &Semaphore,
) -> Result<(), Fault> {
    let gone = || Fault::of(&LaneError::Ended);
    // Of each piece that was sent and not taken what it has of the site's share. One needs nothing
    // of that, so that those who read slowly do not keep the others from going on.
    let mut unread = VecDeque::new();
    loop {
        let piece = tokio::select! {
            piece = body.next() => piece.transpose()?,
            took = taken.one(), if !taken.over => {
                if took {
                    unread.pop_front();
                }
                continue;
            }
            // A stream of events says nothing for long, and nobody may be there any more.
            () = to.stopped() => return Err(gone()),
        };
        let Some(piece) = piece else { break };
        for part in piece.chunks(ANSWER_PIECE) {
            let share = u32::try_from(part.len()).unwrap_or(u32::MAX);
            let share = loop {
                if unread.is_empty() {
                    break None;
                }
                tokio::select! {
                    share = ahead.acquire_many(share), if unread.len() < AHEAD => {
                        break Some(share.map_err(|_| gone())?);
                    }
                    took = tokio::time::timeout(TAKEN_WITHIN, taken.one()) => match took {
                        Ok(true) => drop(unread.pop_front()),
                        Ok(false) => return Err(gone()),
                        Err(_) => return Err(not_taken()),
                    },
                    () = to.stopped() => return Err(gone()),
                }
            };
            unread.push_back(share);
            send_piece(to, MORE, part).await?;
        }
    }
    send_piece(to, LAST, &[]).await?;
    // Until then it is on the link.
    while !unread.is_empty() {
        match tokio::time::timeout(TAKEN_WITHIN, taken.one()).await {
            Ok(true) => drop(unread.pop_front()),
            Ok(false) => break,
            Err(_) => return Err(not_taken()),
        }
    }
    Ok(())
}

fn not_taken() -> Fault {
    Fault::new(Code::TimedOut, "nobody takes a body's next piece")
}

async fn send_piece(to: &mut LaneSender, mark: u8, part: &[u8]) -> Result<(), Fault> {
    let mut frame = Vec::with_capacity(part.len() + 1);
    frame.push(mark);
    frame.extend_from_slice(part);
    let sent = tokio::time::timeout(TAKEN_WITHIN, to.send_bytes(Bytes::from(frame))).await;
    let sent = sent.map_err(|_| not_taken())?;
    sent.map_err(|e| Fault::of(&e))
}

/// A lane while its body is read; it goes back to whoever lent it.
struct Lent {
    from: Option<LaneReceiver>,
    back: Option<oneshot::Sender<LaneReceiver>>,
}

impl Lent {
    const fn kept(from: LaneReceiver) -> Self {
        Self { from: Some(from), back: None }
    }

    async fn recv(&mut self) -> Result<Option<Bytes>, LaneError> {
        match &mut self.from {
            Some(from) => from.recv().await,
            None => Ok(None),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(from), Some(back)) = (self.from.take(), self.back.take()) {
            // Dropped, it tells the other side that no more is read.
            let _ = back.send(from);
        }
    }
}

/// The body that comes over a lane. That of a request tells of its progress, and may not stand
/// still; an answer may be silent for as long as its link lives.
fn read_body(from: Lent, progress: Option<Arc<Mutex<Instant>>>) -> Pieces {
    let cut = |e: LaneError| {
        let f = Fault::of(&e);
        Fault { message: format!("the body broke off: {}", f.message), ..f }
    };
    let reading = futures::stream::try_unfold(Some(from), move |from| {
        let progress = progress.clone();
        async move {
            let Some(mut from) = from else { return Ok(None) };
            let frame = match progress {
                Some(progress) => {
                    let still = |_| Fault::new(Code::TimedOut, "the body stood still for too long");
                    let frame = tokio::time::timeout(BODY_STILL, from.recv()).await;
                    let frame = frame.map_err(still)?;
                    *progress.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                    frame
                }
                None => from.recv().await,
            };
            let frame = frame.map_err(cut)?.ok_or_else(|| cut(LaneError::Ended))?;
            match frame.first() {
                Some(&MORE) => Ok(Some((frame.slice(1..), Some(from)))),
                Some(&LAST) if frame.len() > 1 => Ok(Some((frame.slice(1..), None))),
                Some(&LAST) => Ok(None),
                _ => Err(Fault::new(Code::Damaged, "a frame with an unknown mark")),
            }
        }
    });
    reading.boxed()
}

#[cfg(test)]
mod tests;
