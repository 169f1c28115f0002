//! The socket of a site: links go out and come in through it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use godwit_types::Name;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::ServerCertVerifier;
use tokio::sync::{Mutex, Semaphore, mpsc};

use super::congestion::{FIRST_WINDOW, ModelConfig};
use super::error::{Attempt, CLOSE_NO_CERTIFICATE, CLOSE_REFUSED};
use super::lane::Lane;
use super::{LaneError, Link, LinkError, from_connection, join};
use crate::keys::{Authority, Expected, Identity, KeyError, Peer, PeerVerifier, Trust};
use crate::wire::{
    ALPN_JOIN, ALPN_LINK, Greeting, Hello, LaneHeader, LaneKind, Priority, Versions, WireError,
    decode_open, encode,
};

/// How long handshake and greeting may take.
const GREETING_TIMEOUT: Duration = Duration::from_secs(15);
/// How many handshakes may be under way at once.
const MAX_HANDSHAKES: usize = 64;
/// How many accepted links may wait for [`Endpoint::accept`].
const WAITING_LINKS: usize = 64;

/// Bytes that the socket holds for a process that waits for a processor. With the system's usual
/// 208 KiB a busy host drops packets there at 100 Mbit/s, and that looks like a full link.
const RECEIVE_BUFFER: usize = 4 << 20;

/// How long a silent link is kept unless something else is asked for: an outage of 5 s is survived
/// with room for QUIC's doubled time-outs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What decides how much is on its way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// A model of the path's rate and length: losses by chance do not throttle it, and it lets no
    /// queue grow (`congestion.rs`).
    #[default]
    Model,
    /// RFC 9438: every loss is taken for a full path, and queues are filled.
    Cubic,
}

/// What can be chosen about an endpoint.
#[derive(Debug, Clone)]
pub struct EndpointOptions {
    /// Silence after which a link is given up; the less patient end decides (RFC 9000, section
    /// 10.1). Default [`PATIENCE`].
    pub max_idle: Duration,
    /// How often an idle link shows that it lives. Default 2 s; below `max_idle` / 3.
    pub keep_alive: Duration,
    /// Which protocol versions to speak. Default [`Versions::OURS`].
    pub versions: Versions,
    /// The authority that lets sites join here; the center's endpoint has one.
    pub authority: Option<Arc<Authority>>,
    /// What decides how much is on its way at once.
    pub congestion: Congestion,
}

impl Default for EndpointOptions {
    fn default() -> Self {
        Self {
            max_idle: PATIENCE,
            keep_alive: Duration::from_secs(2),
            versions: Versions::OURS,
            authority: None,
            congestion: Congestion::default(),
        }
    }
}

impl EndpointOptions {
    /// The defaults, but a link that is silent for `patience` is given up.
    #[must_use]
    pub fn patient(patience: Duration) -> Self {
        let usual = Self::default();
        Self { max_idle: patience, keep_alive: usual.keep_alive.min(patience / 4), ..usual }
    }
}

/// The QUIC parameters of a link.
///
/// Sized for 100 Mbit/s at 200 ms (2.5 MB in flight) with room to spare: one stream may use
/// 8 MiB, all together 24 MiB. The send window is the same, since what waits there can still be
/// overtaken by a lane of higher priority.
fn transport(options: &EndpointOptions) -> quinn::TransportConfig {
    let congestion: Arc<dyn quinn::congestion::ControllerFactory + Send + Sync> =
        match options.congestion {
            Congestion::Model => Arc::new(ModelConfig),
            Congestion::Cubic => {
                let mut cubic = quinn::congestion::CubicConfig::default();
                cubic.initial_window(FIRST_WINDOW);
                Arc::new(cubic)
            }
        };
    let mut transport = quinn::TransportConfig::default();
    transport
        .keep_alive_interval(Some(options.keep_alive))
        .max_idle_timeout(quinn::IdleTimeout::try_from(options.max_idle).ok())
        .stream_receive_window((8u32 << 20).into())
        .receive_window((24u32 << 20).into())
        .send_window(24 << 20)
        .initial_rtt(Duration::from_millis(100))
        .mtu_discovery_config(Some(quinn::MtuDiscoveryConfig::default()))
        .max_concurrent_bidi_streams(1024u32.into())
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(congestion);
    transport
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn keys(error: KeyError) -> LinkError {
    LinkError::Keys(Arc::new(error))
}

fn quic_client(
    tls: rustls::ClientConfig,
    options: &EndpointOptions,
) -> Result<quinn::ClientConfig, LinkError> {
    let quic = QuicClientConfig::try_from(tls).map_err(|_| {
        keys(KeyError::Tls(rustls::Error::General("no TLS 1.3 cipher for QUIC".into())))
    })?;
    let mut config = quinn::ClientConfig::new(Arc::new(quic));
    config.transport_config(Arc::new(transport(options)));
    Ok(config)
}

fn any_port(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// A socket for one exchange without a certificate of our own.
pub(super) fn client_endpoint(
    to: SocketAddr,
    verifier: Arc<dyn ServerCertVerifier>,
    alpn: &[u8],
) -> Result<(quinn::Endpoint, quinn::ClientConfig), LinkError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| keys(KeyError::Tls(e)))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    tls.alpn_protocols = vec![alpn.to_vec()];
    let config = quic_client(tls, &EndpointOptions::default())?;
    let address = any_port(to);
    let endpoint = quinn::Endpoint::client(address)
        .map_err(|e| LinkError::Bind { address, source: Arc::new(e) })?;
    Ok((endpoint, config))
}

fn listen(server: quinn::ServerConfig, address: SocketAddr) -> std::io::Result<quinn::Endpoint> {
    use rustix::net::sockopt;
    let socket = std::net::UdpSocket::bind(address)?;
    // Beyond the system's limit where we may; what the system grants is enough to work with.
    if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER);
    }
    let config = quinn::EndpointConfig::default();
    quinn::Endpoint::new(config, Some(server), socket, Arc::new(quinn::TokioRuntime))
}

/// A site's socket. Clones share it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    inner: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoint: quinn::Endpoint,
    identity: std::sync::RwLock<Arc<Identity>>,
    trust: Trust,
    options: EndpointOptions,
    boot: u64,
    links: Mutex<mpsc::Receiver<Link>>,
    acceptor: std::sync::OnceLock<tokio::task::AbortHandle>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(acceptor) = self.acceptor.get() {
            acceptor.abort();
        }
    }
}

impl Endpoint {
    /// Listens on `address` (port 0: any). `trust` must be of the authority that signed
    /// `identity`. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`LinkError::Bind`], [`LinkError::Keys`].
    pub fn bind(
        address: SocketAddr,
        identity: Identity,
        trust: Trust,
        options: EndpointOptions,
    ) -> Result<Self, LinkError> {
        let server = server_config(&identity, &trust, &options)?;
        let endpoint = listen(server, address)
            .map_err(|e| LinkError::Bind { address, source: Arc::new(e) })?;
        let (tx, links) = mpsc::channel(WAITING_LINKS);
        let inner = Arc::new(Shared {
            endpoint: endpoint.clone(),
            identity: std::sync::RwLock::new(Arc::new(identity)),
            trust,
            options,
            boot: rand::random(),
            links: Mutex::new(links),
            acceptor: std::sync::OnceLock::new(),
        });
        let task = tokio::spawn(accept_loop(endpoint, Arc::downgrade(&inner), tx));
        let _ = inner.acceptor.set(task.abort_handle());
        Ok(Self { inner })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// [`LinkError::Transport`] when the socket is gone.
    pub fn local_address(&self) -> Result<SocketAddr, LinkError> {
        self.inner.endpoint.local_addr().map_err(|e| LinkError::Transport(e.to_string()))
    }

    /// The identity that is shown to peers.
    #[must_use]
    pub fn identity(&self) -> Arc<Identity> {
        self.inner.identity()
    }

    /// Whom the endpoint believes.
    #[must_use]
    pub fn trust(&self) -> &Trust {
        &self.inner.trust
    }

    /// Shows another certificate from now on (after a renewal). Links that are up stay.
    ///
    /// # Errors
    /// [`LinkError::Keys`].
    pub fn set_identity(&self, identity: Identity) -> Result<(), LinkError> {
        let server = server_config(&identity, &self.inner.trust, &self.inner.options)?;
        self.inner.endpoint.set_server_config(Some(server));
        if let Ok(mut now) = self.inner.identity.write() {
            *now = Arc::new(identity);
        }
        Ok(())
    }

    /// Opens a link to the site at `address`; with `expected`, only to the site of that name.
    /// Gives up after 15 s.
    ///
    /// # Errors
    /// [`LinkError`]: who refused whom, and why.
    pub async fn connect(
        &self,
        address: SocketAddr,
        expected: Option<&Name>,
    ) -> Result<Link, LinkError> {
        let expected = expected.map_or(Expected::AnySite, |name| Expected::Site(name.clone()));
        self.connect_to(address, &expected).await
    }

    /// As [`Endpoint::connect`], to whoever `expected` allows.
    ///
    /// # Errors
    /// [`LinkError`]: who refused whom, and why.
    pub async fn connect_to(
        &self,
        address: SocketAddr,
        expected: &Expected,
    ) -> Result<Link, LinkError> {
        let work = self.inner.connect(address, expected);
        tokio::time::timeout(GREETING_TIMEOUT, work).await.map_err(|_| LinkError::Silent)?
    }

    /// The next link that another site opened; its greeting is over. `None` when the endpoint is
    /// closed. Safe to cancel.
    pub async fn accept(&self) -> Option<Link> {
        self.inner.links.lock().await.recv().await
    }

    /// Closes the endpoint and all its links, and waits (at most 3 s) until the peers know.
    pub async fn close(&self, why: &str) {
        self.inner.endpoint.close(super::CLOSE_DONE.into(), why.as_bytes());
        let _ = tokio::time::timeout(Duration::from_secs(3), self.inner.endpoint.wait_idle()).await;
    }
}

fn server_config(
    identity: &Identity,
    trust: &Trust,
    options: &EndpointOptions,
) -> Result<quinn::ServerConfig, LinkError> {
    let tls_error = |e| keys(KeyError::Tls(e));
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls_error)?
        .with_client_cert_verifier(Arc::new(PeerVerifier::new(trust.clone(), Expected::AnySite)))
        .with_single_cert(identity.chain(), identity.key())
        .map_err(tls_error)?;
    tls.alpn_protocols = vec![ALPN_LINK.to_vec()];
    if options.authority.is_some() {
        tls.alpn_protocols.push(ALPN_JOIN.to_vec());
    }
    // A resumed session would skip the look at the certificate.
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    let quic = QuicServerConfig::try_from(tls)
        .map_err(|_| tls_error(rustls::Error::General("no TLS 1.3 cipher for QUIC".into())))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(quic));
    config.transport_config(Arc::new(transport(options)));
    Ok(config)
}

impl Shared {
    fn identity(&self) -> Arc<Identity> {
        self.identity.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn hello(&self) -> Hello {
        Hello {
            versions: self.options.versions,
            name: self.identity().name().clone(),
            boot: self.boot,
        }
    }

    async fn connect(&self, address: SocketAddr, expected: &Expected) -> Result<Link, LinkError> {
        let tls_error = |e| keys(KeyError::Tls(e));
        let identity = self.identity();
        let verifier = Arc::new(PeerVerifier::new(self.trust.clone(), expected.clone()));
        let mut tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(identity.chain(), identity.key())
            .map_err(tls_error)?;
        tls.alpn_protocols = vec![ALPN_LINK.to_vec()];
        tls.resumption = rustls::client::Resumption::disabled();
        let config = quic_client(tls, &self.options)?;
        let attempt = |e| {
            let found = verifier.seen.lock().ok().and_then(|s| s.clone());
            from_connection(e, Some(Attempt { expected: expected.clone(), found }))
        };
        let connection = self
            .endpoint
            .connect_with(config, address, "site.godwit")
            .map_err(|e| LinkError::Connect { address, why: e.to_string() })?
            .await
            .map_err(attempt)?;
        let peer = peer_of(&connection)?;
        let (send, recv) = connection.open_bi().await.map_err(|e| from_connection(e, None))?;
        let mut lane = Lane::new(control(), send, recv);
        let hello = encode("greeting", &self.hello()).map_err(LinkError::Greeting)?;
        lane.send_bytes(hello).await.map_err(greeting_error)?;
        let answer = lane
            .recv()
            .await
            .map_err(greeting_error)?
            .ok_or_else(|| greeting_error(LaneError::Ended))?;
        match decode_open("greeting", &answer).map_err(LinkError::Greeting)? {
            Greeting::Hello(theirs) => {
                let version = agreed(&theirs, &peer, self.options.versions)?;
                Ok(Link::start(connection, peer, version, &self.trust))
            }
            Greeting::Refusal(words) => {
                Err(LinkError::Refused(words.escape_debug().take(400).collect()))
            }
        }
    }

    /// The acceptor's side of the greeting.
    async fn greet(&self, connection: quinn::Connection) -> Result<Link, LinkError> {
        let Ok(peer) = peer_of(&connection) else {
            connection.close(
                CLOSE_NO_CERTIFICATE.into(),
                b"a link needs a certificate; join with a token first",
            );
            return Err(LinkError::NoCertificate);
        };
        let (send, recv) = connection.accept_bi().await.map_err(|e| from_connection(e, None))?;
        let mut lane = Lane::new(control(), send, recv);
        let theirs = lane
            .recv()
            .await
            .map_err(greeting_error)?
            .ok_or_else(|| greeting_error(LaneError::Ended))?;
        let checked = decode_open::<Hello>("greeting", &theirs)
            .map_err(LinkError::Greeting)
            .and_then(|theirs| agreed(&theirs, &peer, self.options.versions));
        let answer = match &checked {
            Ok(_) => Greeting::Hello(self.hello()),
            Err(LinkError::Greeting(why)) => Greeting::Refusal(why.to_string()),
            Err(other) => Greeting::Refusal(other.to_string()),
        };
        let bytes = encode("greeting", &answer).map_err(LinkError::Greeting)?;
        lane.send_bytes(bytes).await.map_err(greeting_error)?;
        match checked {
            Ok(version) => {
                lane.split().0.end();
                Ok(Link::start(connection, peer, version, &self.trust))
            }
            Err(why) => {
                let _ = lane.finish().await;
                connection.close(CLOSE_REFUSED.into(), b"the greeting was refused");
                Err(why)
            }
        }
    }
}

/// The version that both sides of a link use, by the other's greeting.
fn agreed(theirs: &Hello, peer: &Peer, ours: Versions) -> Result<u16, LinkError> {
    if theirs.name != peer.name {
        return Err(LinkError::Greeting(WireError::Bounds {
            what: "greeting",
            why: "the name in it differs from the certificate's",
        }));
    }
    ours.agree(theirs.versions).map_err(LinkError::Greeting)
}

fn greeting_error(error: LaneError) -> LinkError {
    match error {
        LaneError::Link(e) => e,
        LaneError::Wire(e) => LinkError::Greeting(e),
        LaneError::Ended | LaneError::Stopped(_) => {
            LinkError::Greeting(WireError::Truncated { have: 0 })
        }
    }
}

fn control() -> LaneHeader {
    LaneHeader { kind: LaneKind::Steering, priority: Priority::Control, about: bytes::Bytes::new() }
}

fn peer_of(connection: &quinn::Connection) -> Result<Peer, LinkError> {
    let chain = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok())
        .ok_or(LinkError::NoCertificate)?;
    let leaf = chain.first().ok_or(LinkError::NoCertificate)?;
    Peer::of_certificate(leaf).map_err(keys)
}

fn alpn_of(connection: &quinn::Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?.protocol
}

/// Takes connections until the endpoint is closed or dropped.
async fn accept_loop(
    endpoint: quinn::Endpoint,
    shared: std::sync::Weak<Shared>,
    links: mpsc::Sender<Link>,
) {
    let room = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = room.clone().try_acquire_owned() else {
            // An unknown number of callers: let them prove their address before they cost more.
            if incoming.may_retry() {
                let _ = incoming.retry();
            } else {
                incoming.refuse();
            }
            continue;
        };
        let Some(shared) = shared.upgrade() else { return };
        let links = links.clone();
        tokio::spawn(async move {
            let from = incoming.remote_address();
            let work = async {
                let connecting = incoming.accept().map_err(|e| from_connection(e, None))?;
                let connection = connecting.await.map_err(|e| from_connection(e, None))?;
                if alpn_of(&connection).as_deref() == Some(ALPN_JOIN) {
                    if let Some(authority) = shared.options.authority.clone() {
                        join::answer(connection, authority).await;
                    }
                    return Ok(None);
                }
                shared.greet(connection).await.map(Some)
            };
            let outcome = tokio::time::timeout(GREETING_TIMEOUT * 2, work).await;
            drop(permit);
            match outcome {
                Ok(Ok(Some(link))) => {
                    if links.try_send(link).is_err() {
                        tracing::warn!(%from, "closed a link: too many wait to be accepted");
                    }
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::warn!(%from, %error, "refused a link"),
                Err(_) => tracing::debug!(%from, "a handshake took too long"),
            }
        });
    }
}
