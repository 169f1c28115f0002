//! What the API's socket lets in: so many connections, from one address and in all, and bodies that
//! do not stand still. Whoever is over a limit is closed before TLS costs anything.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum_server::accept::Accept;
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Connections to the API in all.
const CONNECTIONS: usize = 1024;
/// Connections from one address that is not of this host.
const FROM_ONE: usize = 128;
/// Connections from this host, whose users and addresses all count as one: the half, so that they
/// do not shut out everybody else.
const FROM_HERE: usize = 512;
/// How long a request's body may stand still.
const BODY_STILL: Duration = Duration::from_secs(60);

/// Counts connections.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    open: Arc<Mutex<Open>>,
    in_all: usize,
    from_one: usize,
    from_here: usize,
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Guard {
    /// With the usual limits.
    pub(super) fn new() -> Self {
        Self::with(CONNECTIONS, FROM_ONE, FROM_HERE)
    }

    fn with(in_all: usize, from_one: usize, from_here: usize) -> Self {
        Self { open: Arc::default(), in_all, from_one, from_here }
    }

    /// A place for one more connection, until it is dropped.
    fn enter(&self, from: IpAddr) -> Option<Place> {
        let from = match from.to_canonical() {
            ip if ip.is_loopback() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            ip => ip,
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let here = open.by_address.get(&from).copied().unwrap_or(0);
        let limit = if from.is_loopback() { self.from_here } else { self.from_one };
        if open.all >= self.in_all || here >= limit {
            return None;
        }
        open.all += 1;
        open.by_address.insert(from, here + 1);
        Some(Place { open: self.open.clone(), from })
    }
}

/// One open connection.
#[derive(Debug)]
struct Place {
    open: Arc<Mutex<Open>>,
    from: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.all = open.all.saturating_sub(1);
        if let Some(n) = open.by_address.get_mut(&self.from) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                open.by_address.remove(&self.from);
            }
        }
    }
}

impl<S> Accept<TcpStream, S> for Guard {
    type Stream = Counted;
    type Service = S;
    type Future = std::future::Ready<io::Result<(Counted, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let counted = stream.peer_addr().and_then(|from| {
            let place = self.enter(from.ip()).ok_or_else(|| {
                tracing::warn!(%from, "closed a connection to the API: too many are open");
                io::Error::other("too many connections are open")
            })?;
            // A small answer must not wait for the acknowledgement of the one before.
            stream.set_nodelay(true)?;
            Ok(Counted { stream, _place: place })
        });
        std::future::ready(counted.map(|stream| (stream, service)))
    }
}

/// A connection that is counted for as long as it is open.
#[derive(Debug)]
pub(super) struct Counted {
    stream: TcpStream,
    _place: Place,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// A request whose body fails when none of it has come for a minute.
pub(super) async fn impatient(request: Request) -> Request {
    request.map(|body| patient_for(body, BODY_STILL))
}

fn patient_for(body: Body, still: Duration) -> Body {
    if body.is_end_stream() {
        return body;
    }
    let pause = Box::pin(tokio::time::sleep(still));
    Body::new(Patient { body, still, pause, waits: false })
}

/// A body whose next piece is waited for, but not for ever. How long it says it is stays known.
struct Patient {
    body: Body,
    still: Duration,
    pause: Pin<Box<tokio::time::Sleep>>,
    waits: bool,
}

impl HttpBody for Patient {
    type Data = axum::body::Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let me = &mut *self;
        if let Poll::Ready(piece) = Pin::new(&mut me.body).poll_frame(cx) {
            me.waits = false;
            return Poll::Ready(piece.map(|piece| piece.map_err(io::Error::other)));
        }
        if !std::mem::replace(&mut me.waits, true) {
            me.pause.as_mut().reset(tokio::time::Instant::now() + me.still);
        }
        me.pause.as_mut().poll(cx).map(|()| {
            let why = "the body of the request stood still for too long";
            Some(Err(io::Error::new(io::ErrorKind::TimedOut, why)))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[test]
    fn connections_are_limited_from_one_address_and_in_all() {
        let guard = Guard::with(5, 2, 3);
        let ip = |text: &str| text.parse::<IpAddr>().expect("address");
        let far = ip("192.0.2.7");
        let first = guard.enter(far).expect("one");
        let _second = guard.enter(ip("::ffff:192.0.2.7")).expect("two, the same in IPv6");
        assert!(guard.enter(far).is_none(), "a third from there");
        let near: Vec<_> = (0..3).map(|_| guard.enter(ip("127.0.0.1")).expect("near")).collect();
        assert!(guard.enter(ip("198.51.100.1")).is_none(), "the sixth in all");
        drop(first);
        assert!(guard.enter(ip("127.0.0.2")).is_none(), "a fourth from this host");
        let first = guard.enter(far).expect("there is a place for others");
        drop(first);
        assert!(guard.enter(far).is_some());
        drop(near);
        assert_eq!(guard.open.lock().expect("lock").by_address.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_body_fails_and_a_slow_one_does_not() {
        let slow = futures::stream::iter(0..4).then(|_| async {
            tokio::time::sleep(Duration::from_secs(50)).await;
            Ok::<_, io::Error>("x")
        });
        let body = patient_for(Body::from_stream(slow), BODY_STILL);
        assert_eq!(axum::body::to_bytes(body, 100).await.expect("whole"), "xxxx");
        let stuck =
            futures::stream::iter([Ok::<_, io::Error>("x")]).chain(futures::stream::pending());
        let body = patient_for(Body::from_stream(stuck), BODY_STILL);
        let error = axum::body::to_bytes(body, 100).await.expect_err("stuck");
        let long = patient_for(Body::from("xxxx"), BODY_STILL);
        assert_eq!(long.size_hint().exact(), Some(4), "what is announced stays known");
        assert!(godwit_types::chain(&error).contains("stood still"), "{error:?}");
    }
}
