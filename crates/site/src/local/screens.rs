//! Screens and consoles that are open at once: bounded, since each is a stream of its own.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use godwit_types::{Fault, Name};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Screens and consoles of one site that may be open at once.
pub(super) const SCREENS_AT_ONCE: usize = 64;

/// The places for screens and consoles.
#[derive(Debug, Clone)]
pub(super) struct Screens(Arc<Semaphore>);

impl Screens {
    pub(super) fn new(at_once: usize) -> Self {
        Self(Arc::new(Semaphore::new(at_once)))
    }

    /// A place for one more.
    pub(super) fn place(&self, site: &Name) -> Result<OwnedSemaphorePermit, Fault> {
        self.0.clone().try_acquire_owned().map_err(|_| {
            Fault::unavailable(format!(
                "site '{site}' has {SCREENS_AT_ONCE} screens and consoles open, as many as it \
                 shows at once"
            ))
            .hint("close one of them")
        })
    }
}

/// A stream that gives its place back with its end.
pub(super) struct Shown<S> {
    stream: S,
    _place: OwnedSemaphorePermit,
}

impl<S> Shown<S> {
    pub(super) const fn new(stream: S, place: OwnedSemaphorePermit) -> Self {
        Self { stream, _place: place }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Shown<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Shown<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_too_many_is_refused_until_another_is_closed() {
        let site = Name::new("cafe").expect("name");
        let screens = Screens::new(2);
        let first = Shown::new((), screens.place(&site).expect("room"));
        let _second = Shown::new((), screens.place(&site).expect("room"));
        let e = screens.place(&site).expect_err("full");
        assert_eq!(e.code, godwit_types::Code::Unavailable);
        assert!(e.message.contains("screens and consoles open"), "{e}");
        drop(first);
        drop(screens.place(&site).expect("room again"));
    }
}
