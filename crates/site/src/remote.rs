//! A site at the other end of a link: the center's side ([`RemoteSite`]) and the site's
//! ([`serve`]).
//!
//! ```text
//! steering lane: request | center -> SiteRequest, later perhaps the one byte CANCEL
//!                answer  | site   -> SiteEvent::News ..., SiteEvent::Done
//! pipe lane:     request | center -> StreamRequest
//!                verdict | site   -> Result<(), Fault>; after Ok bytes flow both ways
//! ```
//!
//! A message longer than one frame is cut into pieces, each led by a byte that tells whether
//! more follow. A request goes on at the site when the link breaks: half a change helps nobody.
//! Only CANCEL stops it, but for those that end with their caller ([`Manner::WithCaller`]).

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use godwit_transfer::{
    Expected, Lane, LaneError, LaneKind, LaneReceiver, LaneSender, Link, Peer, Priority,
};
use godwit_types::{Code, Fault, Name};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{Semaphore, mpsc};

use super::bounds;
use super::verbs::Manner;
use super::{ByteStream, Call, News, SiteEvent, SiteHost, SiteReply, SiteRequest, StreamRequest};

/// The longest message in bytes: what a program in a guest printed, 16 MiB of each kind.
const MAX_MESSAGE: usize = 33 << 20;

/// Bytes of a message in one frame.
pub(super) const PIECE: usize = 512 << 10;

/// Bytes of a stream in one frame.
const STREAM_PIECE: usize = 64 << 10;

/// Requests of one link for guests and tools, which may take long, that are worked on at once.
/// Whatever a site is asked besides does not wait for them.
const AT_ONCE: usize = 64;

/// How long a request may take to arrive after its lane was opened.
const ARRIVAL: Duration = Duration::from_secs(30);

const CANCEL: &[u8] = b"c";
pub(super) const MORE: u8 = 1;
pub(super) const LAST: u8 = 0;

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Fault> {
    postcard::to_stdvec(value).map_err(|e| Fault::internal(format!("encoding a message: {e}")))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    postcard::from_bytes(bytes)
        .map_err(|e| Fault::new(Code::Damaged, format!("a message does not parse: {e}")))
}

pub(super) async fn send_message<T: Serialize + Sync>(
    to: &mut LaneSender,
    value: &T,
) -> Result<(), Fault> {
    let bytes = encode(value)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(Fault::internal(format!("a message of {} bytes is too long", bytes.len())));
    }
    let mut pieces = bytes.chunks(PIECE).peekable();
    loop {
        let piece = pieces.next().unwrap_or_default();
        let mut frame = Vec::with_capacity(piece.len() + 1);
        frame.push(if pieces.peek().is_some() { MORE } else { LAST });
        frame.extend_from_slice(piece);
        let more = frame[0] == MORE;
        to.send_bytes(Bytes::from(frame)).await.map_err(|e| Fault::of(&e))?;
        if !more {
            return Ok(());
        }
    }
}

async fn recv_message<T: DeserializeOwned>(from: &mut LaneReceiver) -> Result<T, Fault> {
    recv_at_most(from, MAX_MESSAGE).await
}

/// The next message, of at most so many bytes.
pub(super) async fn recv_at_most<T: DeserializeOwned>(
    from: &mut LaneReceiver,
    limit: usize,
) -> Result<T, Fault> {
    let mut all = Vec::new();
    loop {
        let frame = from
            .recv()
            .await
            .map_err(|e| Fault::of(&e))?
            .ok_or_else(|| Fault::of(&LaneError::Ended))?;
        let (mark, piece) = frame
            .split_first()
            .ok_or_else(|| Fault::new(Code::Damaged, "an empty frame in a message"))?;
        if all.len() + piece.len() > limit {
            return Err(Fault::new(Code::Damaged, format!("a message over {limit} bytes")));
        }
        all.extend_from_slice(piece);
        match *mark {
            LAST => return decode(&all),
            MORE => {}
            _ => return Err(Fault::new(Code::Damaged, "a frame with an unknown mark")),
        }
    }
}

/// A site that joined over a link.
#[derive(Debug)]
pub struct RemoteSite {
    name: Name,
    link: Link,
}

impl RemoteSite {
    /// The site at the other end of `link`; its name is that of its certificate.
    #[must_use]
    pub fn new(link: Link) -> Self {
        Self { name: link.peer().name.clone(), link }
    }

    /// The link.
    #[must_use]
    pub const fn link(&self) -> &Link {
        &self.link
    }

    fn away(&self, f: Fault) -> Fault {
        let message = format!("site '{}': {}", self.name, f.message);
        let lost = f.hint.is_none() && self.link.close_reason().is_some();
        let hint = lost.then(|| "it reconnects by itself; see: godwit site list".to_owned());
        Fault { message, hint: f.hint.or(hint), ..f }
    }

    /// Refuses what the site is too old for.
    fn has(&self, what: &str, since: u16) -> Result<(), Fault> {
        let (site, speaks) = (&self.name, self.speaks());
        if speaks >= since {
            return Ok(());
        }
        let words = format!("site '{site}' speaks protocol {speaks}, and '{what}' needs {since}");
        Err(Fault::conflict(words).hint(format!("update '{site}'")))
    }

    async fn lane(&self, kind: LaneKind, priority: Priority) -> Result<Lane, Fault> {
        self.link.open(kind, priority).await.map_err(|e| self.away(Fault::of(&e)))
    }
}

#[async_trait]
impl SiteHost for RemoteSite {
    fn name(&self) -> &Name {
        &self.name
    }

    fn speaks(&self) -> u16 {
        self.link.version()
    }

    async fn answer(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault> {
        self.has(request.name(), request.since())?;
        let (mut to, mut from) = self.lane(LaneKind::Steering, Priority::Control).await?.split();
        send_message(&mut to, &request).await.map_err(|f| self.away(f))?;
        let measured = matches!(request, SiteRequest::Report(_));
        // What must not be asked twice is not told as something that may be.
        let once = request.has(Manner::Once);
        let lost = |f: Fault| {
            let words =
                || format!("the answer was lost, the program may have started: {}", f.message);
            if once { Fault::internal(words()) } else { f }
        };
        let mut told = false;
        loop {
            let event = tokio::select! {
                event = recv_message::<SiteEvent>(&mut from) => event.map_err(|f| self.away(lost(f)))?,
                () = call.cancel.cancelled(), if !told => {
                    told = true;
                    to.send(CANCEL).await.map_err(|e| self.away(Fault::of(&e)))?;
                    continue;
                }
            };
            match event {
                SiteEvent::News(news) => call.news(news),
                SiteEvent::Done(outcome) => {
                    let reply = outcome.map_err(bounds::fault).and_then(bounds::checked);
                    let mut reply = reply.map_err(|f| self.away(f))?;
                    if measured && let SiteReply::Report(r) = &mut reply {
                        r.rtt_ms = Some(self.link.rtt().as_secs_f64() * 1000.0);
                    }
                    return Ok(reply);
                }
            }
        }
    }

    async fn open(&self, request: StreamRequest) -> Result<ByteStream, Fault> {
        let priority = match request {
            StreamRequest::Console { .. } | StreamRequest::Display { .. } => Priority::State,
            // A machine that is on its way goes first.
            StreamRequest::SubstrateExport { .. }
            | StreamRequest::SubstrateSupply { .. }
            | StreamRequest::SubstrateTake { .. }
            | StreamRequest::SubstrateTakeAmong(_)
            | StreamRequest::SubstrateUpload(_)
            | StreamRequest::SubstrateImport { .. } => Priority::Background,
        };
        self.has(request.name(), request.since())?;
        let (mut to, mut from) = self.lane(LaneKind::Pipe, priority).await?.split();
        send_message(&mut to, &request).await.map_err(|f| self.away(f))?;
        let taken = recv_message::<Result<(), Fault>>(&mut from).await?;
        taken.map_err(|f| self.away(bounds::fault(f)))?;
        let (near, far) = tokio::io::duplex(4 * STREAM_PIECE);
        tokio::spawn(pump(far, to, from));
        Ok(Box::pin(near))
    }
}

/// Carries bytes between a stream and a lane until both directions have ended.
async fn pump(stream: DuplexStream, to: LaneSender, from: LaneReceiver) {
    let (read, write) = tokio::io::split(stream);
    tokio::join!(outward(read, to), inward(from, write));
}

async fn outward<R: tokio::io::AsyncRead + Unpin>(mut read: R, mut to: LaneSender) {
    let mut buffer = vec![0u8; STREAM_PIECE];
    while let Ok(n) = read.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        if let Err(error) = to.send(&buffer[..n]).await {
            tracing::debug!(%error, "a stream ended at the other side");
            return;
        }
    }
    to.end();
}

async fn inward<W: tokio::io::AsyncWrite + Unpin>(mut from: LaneReceiver, mut write: W) {
    while let Ok(Some(frame)) = from.recv().await {
        if write.write_all(&frame).await.is_err() {
            from.stop();
            return;
        }
    }
    // Fails only when the reader is gone, and then nobody waits for the end.
    let _ = write.shutdown().await;
}

/// Whether the peer may ask a site for anything: it is a center, and the one that the site joined.
fn obeyed(peer: &Peer, center: &Name) -> bool {
    Expected::Center(Some(center.clone())).is(peer)
}

/// Answers the requests of the center of that name until the link is closed. A link to anybody
/// else is closed at once.
pub async fn serve(link: Link, center: &Name, host: Arc<dyn SiteHost>) {
    if !obeyed(link.peer(), center) {
        let peer = link.peer();
        tracing::error!(peer = %peer.name, kind = %peer.kind, "only the center is obeyed");
        link.close("only the center is obeyed");
        return;
    }
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let speaks = link.version();
    loop {
        let lane = match link.accept_lane().await {
            Ok(lane) => lane,
            Err(error) => {
                tracing::info!(%error, "the link to the center ended");
                return;
            }
        };
        let (host, room) = (host.clone(), room.clone());
        tokio::spawn(async move {
            let outcome = match lane.kind() {
                LaneKind::Steering => answer(lane, speaks, host, room).await,
                LaneKind::Pipe => answer_stream(lane, host).await,
                other => {
                    lane.abort();
                    Err(Fault::invalid(format!("a lane for {other:?} is not served here")))
                }
            };
            if let Err(error) = outcome {
                tracing::debug!(%error, "a request could not be answered");
            }
        });
    }
}

async fn arrival<T: DeserializeOwned>(from: &mut LaneReceiver) -> Result<T, Fault> {
    tokio::time::timeout(ARRIVAL, recv_message(from))
        .await
        .map_err(|_| Fault::new(Code::TimedOut, "a lane with no request"))?
}

/// What is said of a request that does not parse: it is of a center that is newer, or of none at
/// all. The link goes on.
fn not_known(site: &Name) -> Fault {
    Fault::invalid(format!("a request that site '{site}' does not know"))
        .hint("is its version older than the center's? see: godwit site list -o wide")
}

async fn answer(
    lane: Lane,
    speaks: u16,
    host: Arc<dyn SiteHost>,
    room: Arc<Semaphore>,
) -> Result<(), Fault> {
    let (mut to, mut from) = lane.split();
    let request: SiteRequest = match arrival(&mut from).await {
        Err(f) if f.code == Code::Damaged => {
            let refused = Box::new(Err(not_known(host.name())));
            send_message(&mut to, &SiteEvent::Done(refused)).await?;
            return to.finish().await.map_err(|e| Fault::of(&e));
        }
        request => request?,
    };
    let turn = request.has(Manner::InTurn).then_some(room);
    let with_caller = request.has(Manner::WithCaller);
    // Progress that comes faster than the link takes it is dropped; nothing else is.
    let (progress, mut shown) = mpsc::channel(32);
    let (certain, mut news) = mpsc::unbounded_channel();
    let call = Call::new(
        move |told| {
            // Fails only when nobody is left who could be told.
            match told {
                News::Progress(_) => drop(progress.try_send(told)),
                News::Switched { .. } | News::Uncertain => drop(certain.send(told)),
            }
        },
        tokio_util::sync::CancellationToken::new(),
    );
    let cancel = call.cancel.clone();
    let mut work = tokio::spawn(async move {
        // Closed never; and one that was cancelled while it waited is told so by the site.
        let _turn = match turn {
            Some(room) => room.acquire_owned().await.ok(),
            None => None,
        };
        host.answer(request, call).await
    });
    let mut listening = true;
    let mut linked = true;
    let outcome = loop {
        tokio::select! {
            outcome = &mut work => {
                break outcome.unwrap_or_else(|_| Err(Fault::internal("the site failed; see its log")));
            }
            Some(told) = news.recv() => {
                linked = linked && send_message(&mut to, &SiteEvent::News(told)).await.is_ok();
            }
            Some(told) = shown.recv() => {
                linked = linked && send_message(&mut to, &SiteEvent::News(told)).await.is_ok();
            }
            frame = from.recv(), if listening => match frame {
                Ok(Some(f)) if f == CANCEL => cancel.cancel(),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => {
                    listening = false;
                    if with_caller {
                        // Not cancelled: what it had done until here may be of use to the next.
                        work.abort();
                    }
                }
            },
        }
    };
    while let Some(told) = shown.try_recv().ok().or_else(|| news.try_recv().ok()) {
        linked = linked && send_message(&mut to, &SiteEvent::News(told)).await.is_ok();
    }
    let outcome = outcome.map(|reply| reply.told_to(speaks));
    send_message(&mut to, &SiteEvent::Done(Box::new(outcome))).await?;
    to.finish().await.map_err(|e| Fault::of(&e))
}

async fn answer_stream(lane: Lane, host: Arc<dyn SiteHost>) -> Result<(), Fault> {
    let (to, mut from) = lane.split();
    let stream = match arrival(&mut from).await {
        Ok(request) => host.open(request).await,
        Err(f) if f.code == Code::Damaged => Err(not_known(host.name())),
        Err(f) => return Err(f),
    };
    answer_pipe(to, from, stream).await
}

/// Answers a request for a stream with what came of it.
async fn answer_pipe(
    mut to: LaneSender,
    from: LaneReceiver,
    stream: Result<ByteStream, Fault>,
) -> Result<(), Fault> {
    match stream {
        Ok(stream) => {
            send_message(&mut to, &Ok::<(), Fault>(())).await?;
            let (read, write) = tokio::io::split(stream);
            tokio::join!(outward(read, to), inward(from, write));
            Ok(())
        }
        Err(f) => {
            send_message(&mut to, &Err::<(), Fault>(f)).await?;
            to.finish().await.map_err(|e| Fault::of(&e))
        }
    }
}

/// Answers another site's requests for streams, one at a time, until it closes the link; `open`
/// decides what it may have. It may ask for nothing else.
pub(crate) async fn serve_neighbour(
    link: Link,
    site: &Name,
    open: impl Fn(StreamRequest) -> Result<ByteStream, Fault>,
) {
    while let Ok(Ok(lane)) = tokio::time::timeout(ARRIVAL, link.accept_lane()).await {
        if lane.kind() != LaneKind::Pipe {
            lane.abort();
            link.close("a site is asked for streams alone");
            return;
        }
        let (to, mut from) = lane.split();
        let stream = match arrival(&mut from).await {
            Ok(request) => open(request),
            Err(f) if f.code == Code::Damaged => Err(not_known(site)),
            Err(_) => continue,
        };
        if let Err(error) = answer_pipe(to, from, stream).await {
            tracing::debug!(%error, "a request could not be answered");
        }
    }
    link.close("nothing more is asked for");
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use godwit_transfer::{Authority, Endpoint, EndpointOptions, PendingIdentity};
    use godwit_types::SiteKind;

    use super::*;

    /// Counts what it is asked.
    struct Counting {
        name: Name,
        asked: AtomicUsize,
    }

    #[async_trait]
    impl SiteHost for Counting {
        fn name(&self) -> &Name {
            &self.name
        }
        async fn answer(&self, _: SiteRequest, _: Call) -> Result<SiteReply, Fault> {
            self.asked.fetch_add(1, SeqCst);
            Ok(SiteReply::Machines(vec![]))
        }
        async fn open(&self, _: StreamRequest) -> Result<ByteStream, Fault> {
            self.asked.fetch_add(1, SeqCst);
            Err(Fault::invalid("no streams here"))
        }
    }

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    fn endpoint(authority: &Authority, site: &str, kind: SiteKind) -> (Endpoint, SocketAddr) {
        let pending = PendingIdentity::make(&name(site), kind).expect("key");
        let der = authority.issue(pending.request(), &name(site), kind).expect("issue");
        let identity = pending.complete(&der, authority.certificate()).expect("identity");
        let (any, trust) = ("127.0.0.1:0".parse().expect("address"), authority.trust().clone());
        let bound = Endpoint::bind(any, identity, trust, EndpointOptions::default()).expect("bind");
        let address = bound.local_address().expect("address");
        (bound, address)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn only_the_center_that_was_joined_is_obeyed() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(dir.path()).expect("authority");
        let (site, _) = endpoint(&authority, "cafe", SiteKind::Ap);
        let host = Arc::new(Counting { name: name("cafe"), asked: AtomicUsize::new(0) });
        // Certificates of this very cloud, one of a site that is called like the center.
        let rogues = [("bar", SiteKind::Ap), ("phone", SiteKind::Device), ("center", SiteKind::Ap)];
        for (who, kind) in rogues {
            let (rogue, address) = endpoint(&authority, who, kind);
            // A link as one would have it that did not look whom it reached.
            let near = site.connect(address, None).await.expect("a link");
            let far = rogue.accept().await.expect("a link");
            let served: Arc<dyn SiteHost> = host.clone();
            let center = name("center");
            let serving = tokio::spawn(async move { serve(near, &center, served).await });
            let rogue = RemoteSite::new(far);
            let machines = (&rogue as &dyn SiteHost).machines().await;
            assert!(machines.is_err(), "{who}: {machines:?}");
            let vm = godwit_types::VmId::new();
            assert!(rogue.open(StreamRequest::Display { vm }).await.is_err(), "{who}");
            serving.await.expect("ended");
        }
        assert_eq!(host.asked.load(SeqCst), 0, "nothing came through");
        let (center, address) = endpoint(&authority, "center", SiteKind::Center);
        let near = site.connect(address, None).await.expect("a link");
        let far = center.accept().await.expect("a link");
        let served: Arc<dyn SiteHost> = host.clone();
        tokio::spawn(async move { serve(near, &name("center"), served).await });
        let remote = RemoteSite::new(far);
        (&remote as &dyn SiteHost).machines().await.expect("obeyed");
        assert_eq!(host.asked.load(SeqCst), 1);
    }
}
