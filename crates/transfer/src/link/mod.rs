//! Links between sites: QUIC connections with mutual certificates, cut into lanes.
//!
//! ```text
//!  connect/accept --> handshake --> greeting --> up ----------> closed
//!                         |            |          |  peer closes, 30 s of silence,
//!                         v            v          |  a revocation, the end of the peer's
//!                         |            |          |  certificate, close()
//!                      refused      refused       +--> closed
//! ```
//! A link survives an outage shorter than its idle time-out (30 s): QUIC sends again what was
//! lost. After that it is closed, and whoever opened it connects anew.

mod congestion;
mod endpoint;
mod error;
mod join;
mod lane;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};

use crate::keys::{Peer, Trust, unix_now};
use crate::wire::{LaneHeader, LaneKind, MAX_ABOUT, Priority, WireError, encode};

pub use endpoint::{Congestion, Endpoint, EndpointOptions, PATIENCE};
pub(crate) use error::{
    CLOSE_DONE, CLOSE_ENDED, CLOSE_REVOKED, STOP_BUSY, STOP_UNKNOWN, from_connection,
};
pub use error::{JoinError, LaneError, LinkError};
pub use join::{JoinRefusal, JoinRequest, Joined, join};
pub use lane::{Lane, LaneReceiver, LaneSender};

/// How many lanes may wait for [`Link::accept_lane`]; the peer is told to stop opening more.
const WAITING_LANES: usize = 256;
/// How many calls may wait for [`Link::serve`](crate::rpc).
const WAITING_CALLS: usize = 256;
/// How long a peer may take to send a lane's first frame.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one other site. Clones share it; it closes, with all its lanes, when the last
/// one goes.
#[derive(Debug, Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connection: quinn::Connection,
    peer: Peer,
    version: u16,
    lanes: Mutex<mpsc::Receiver<Lane>>,
    calls: Mutex<mpsc::Receiver<Lane>>,
    acceptor: tokio::task::AbortHandle,
    watcher: tokio::task::AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.watcher.abort();
        self.connection.close(CLOSE_DONE.into(), b"done");
    }
}

impl Link {
    /// Begins to work on a connection after the greeting.
    pub(crate) fn start(
        connection: quinn::Connection,
        peer: Peer,
        version: u16,
        trust: &Trust,
    ) -> Self {
        let (lane_tx, lanes) = mpsc::channel(WAITING_LANES);
        let (call_tx, calls) = mpsc::channel(WAITING_CALLS);
        let acceptor =
            tokio::spawn(accept_streams(connection.clone(), lane_tx, call_tx)).abort_handle();
        let watcher =
            tokio::spawn(watch_certificate(connection.clone(), trust.clone(), peer.clone()))
                .abort_handle();
        Self {
            inner: Arc::new(Inner {
                connection,
                peer,
                version,
                lanes: Mutex::new(lanes),
                calls: Mutex::new(calls),
                acceptor,
                watcher,
            }),
        }
    }

    /// Who is at the other end, by its certificate.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.inner.peer
    }

    /// The protocol version that both sides agreed on.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.inner.version
    }

    /// Where the peer's datagrams come from.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.connection.remote_address()
    }

    /// Opens a lane. Does not wait for the peer.
    ///
    /// # Errors
    /// [`LaneError::Link`] when the link is closed.
    pub async fn open(&self, kind: LaneKind, priority: Priority) -> Result<Lane, LaneError> {
        self.open_about(kind, priority, Bytes::new()).await
    }

    /// Opens a lane that belongs to a job: `about` (at most [`MAX_ABOUT`] bytes) tells the other
    /// side which.
    ///
    /// # Errors
    /// [`LaneError::Link`] when the link is closed; [`LaneError::Wire`] for a long `about`.
    pub async fn open_about(
        &self,
        kind: LaneKind,
        priority: Priority,
        about: Bytes,
    ) -> Result<Lane, LaneError> {
        if about.len() > MAX_ABOUT {
            return Err(
                WireError::Bounds { what: "lane header", why: "'about' is too long" }.into()
            );
        }
        let (send, recv) =
            self.inner.connection.open_bi().await.map_err(|e| from_connection(e, None))?;
        let header = LaneHeader { kind, priority, about };
        let mut lane = Lane::new(header.clone(), send, recv);
        lane.send(&encode("lane header", &header)?).await?;
        Ok(lane)
    }

    /// The next lane that the peer opened, calls excepted. Safe to cancel.
    ///
    /// # Errors
    /// [`LinkError`] that closed the link.
    pub async fn accept_lane(&self) -> Result<Lane, LinkError> {
        match self.inner.lanes.lock().await.recv().await {
            Some(lane) => Ok(lane),
            None => Err(self.closed().await),
        }
    }

    pub(crate) async fn accept_call(&self) -> Option<Lane> {
        self.inner.calls.lock().await.recv().await
    }

    /// Smoothed round-trip time.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.inner.connection.rtt()
    }

    /// Closes the link at once: what is not delivered yet is lost. `why` is shown at the other
    /// end.
    pub fn close(&self, why: &str) {
        self.inner.connection.close(CLOSE_DONE.into(), why.as_bytes());
    }

    /// Whether the link is closed, and why.
    #[must_use]
    pub fn close_reason(&self) -> Option<LinkError> {
        self.inner.connection.close_reason().map(|e| from_connection(e, None))
    }

    /// Waits until the link is closed.
    pub async fn closed(&self) -> LinkError {
        from_connection(self.inner.connection.closed().await, None)
    }
}

/// Reads the header of each stream that the peer opens and puts the lane where it belongs.
async fn accept_streams(
    connection: quinn::Connection,
    lanes: mpsc::Sender<Lane>,
    calls: mpsc::Sender<Lane>,
) {
    let mut opening = tokio::task::JoinSet::new();
    loop {
        let (send, recv) = tokio::select! {
            stream = connection.accept_bi() => match stream {
                Ok(stream) => stream,
                Err(_) => return,
            },
            Some(_) = opening.join_next() => continue,
        };
        let (lanes, calls) = (lanes.clone(), calls.clone());
        opening.spawn(async move {
            let read = tokio::time::timeout(HEADER_TIMEOUT, Lane::accept(send, recv)).await;
            let Ok(Ok(lane)) = read else { return };
            let queue = if lane.kind() == LaneKind::Rpc { calls } else { lanes };
            if let Err(refused) = queue.try_send(lane) {
                refused.into_inner().refuse(STOP_BUSY);
            }
        });
    }
}

/// How often the end of a certificate is looked at: clocks are set, hosts sleep.
const LOOK_AT_END: Duration = Duration::from_secs(60);

/// Returns when a certificate has ended.
async fn ended(peer: &Peer) {
    loop {
        let left = peer.not_after.saturating_sub(unix_now());
        if left == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_secs(left).min(LOOK_AT_END)).await;
    }
}

/// Closes the connection when the peer's certificate is revoked or has ended. A site that has
/// renewed its own connects anew with that.
async fn watch_certificate(connection: quinn::Connection, trust: Trust, peer: Peer) {
    let mut list = trust.watch();
    let revoked = tokio::select! {
        listed = list.wait_for(|list| list.serials.contains(&peer.serial)) => listed.is_ok(),
        () = ended(&peer) => {
            tracing::info!(peer = %peer.name, serial = %peer.serial, "closing a link whose certificate has ended");
            connection.close(CLOSE_ENDED.into(), b"the certificate of this site has ended");
            return;
        }
    };
    if revoked {
        tracing::warn!(peer = %peer.name, serial = %peer.serial, "closing the link of a site whose certificate was revoked");
        connection.close(CLOSE_REVOKED.into(), b"the certificate of this site was revoked");
    }
}
