//! The socket of an API: its certificate, its limits, and the router behind it.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use axum_server::Handle;
use godwit_types::Fault;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::guard::{Guard, impatient};
use super::tls::{self, TlsFiles};

/// How long the head of a request may take to come.
const HEAD_WITHIN: Duration = Duration::from_secs(30);

/// Requests of one connection at once, by HTTP/2.
const STREAMS: u32 = 64;

/// The longest head of a request by HTTP/2, in bytes.
const HEAD_BYTES: u32 = 64 << 10;

/// Where an API listens, and as whom.
pub(super) struct Socket<'a> {
    /// Port 0 picks one.
    pub(super) listen: SocketAddr,
    /// Under which address it is reached where it listens on all.
    pub(super) named: Option<IpAddr>,
    /// The operator's own certificate.
    pub(super) tls: Option<&'a TlsFiles>,
    /// Where one of its own making is kept.
    pub(super) keys: &'a Path,
}

/// An API that is served.
pub(super) struct Served {
    pub(super) handle: Handle<SocketAddr>,
    pub(super) address: SocketAddr,
    /// Its certificate.
    pub(super) pem: String,
}

impl Socket<'_> {
    /// Serves `router` there. Requests carry the caller's address as
    /// [`ConnectInfo`](axum::extract::ConnectInfo).
    pub(super) async fn serve(
        self,
        router: axum::Router,
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Served, Fault> {
        let listener = std::net::TcpListener::bind(self.listen).map_err(|e| {
            Fault::unavailable(format!("listening on {}: {e}", self.listen))
                .hint("another daemon may be running; name another address with --api")
        })?;
        let failed = |e: std::io::Error| Fault::internal(format!("the API's socket: {e}"));
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (pem, tls) = match self.tls {
            Some(files) => files.server()?,
            None => {
                let named = self.named.filter(|_| address.ip().is_unspecified());
                let ip = named.unwrap_or(address.ip());
                tls::server(&self.keys.join("api"), SocketAddr::new(ip, address.port()))?
            }
        };
        if let Some(files) = self.tls.cloned() {
            tasks.spawn(stop.clone().run_until_cancelled_owned(files.keep(tls.clone())));
        }
        let router = router.layer(axum::middleware::map_request(impatient));
        let handle = Handle::new();
        let mut server = axum_server::from_tcp_rustls(listener, tls)
            .map_err(failed)?
            .map(|tls| tls.acceptor(Guard::new()))
            .first_request_timeout(HEAD_WITHIN)
            .handle(handle.clone());
        // Whoever connects and says nothing is not waited for.
        server
            .http_builder()
            .http1()
            .timer(hyper_util::rt::TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN);
        server
            .http_builder()
            .http2()
            .timer(hyper_util::rt::TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_pending_accept_reset_streams(STREAMS as usize)
            .max_header_list_size(HEAD_BYTES)
            .keep_alive_interval(HEAD_WITHIN)
            .keep_alive_timeout(HEAD_WITHIN);
        let made = router.into_make_service_with_connect_info::<SocketAddr>();
        tasks.spawn(async move {
            if let Err(error) = server.serve(made).await {
                tracing::error!(%error, "the API ended");
            }
        });
        handle.listening().await.ok_or_else(|| Fault::internal("the API did not come up"))?;
        Ok(Served { handle, address, pem })
    }
}
