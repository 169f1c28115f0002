//! A cloud in a temporary directory, and a UDP forwarder that stands for a link.
#![allow(dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use godwit_transfer::keys::PendingIdentity;
use godwit_transfer::{Authority, Endpoint, EndpointOptions, Identity, Link};
use godwit_types::{Name, SiteKind};
use tokio::net::UdpSocket;

pub fn name(text: &str) -> Name {
    Name::new(text).expect("a valid name")
}

/// Waits for `work`, with a deadline that only a hang can miss.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("in time")
}

pub struct Cloud {
    pub dir: tempfile::TempDir,
    pub authority: Arc<Authority>,
}

impl Cloud {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::create(&dir.path().join("authority")).expect("an authority");
        Self { dir, authority: Arc::new(authority) }
    }

    pub fn identity(&self, site: &str, kind: SiteKind) -> Identity {
        self.identity_for(site, kind, 3600)
    }

    pub fn identity_for(&self, site: &str, kind: SiteKind, seconds: u64) -> Identity {
        let pending = PendingIdentity::make(&name(site), kind).expect("a key");
        let certificate = self
            .authority
            .issue_for(pending.request(), &name(site), kind, seconds)
            .expect("a certificate");
        pending.complete(&certificate, self.authority.certificate()).expect("an identity")
    }

    /// The center's endpoint, with the authority.
    pub fn center(&self) -> (Endpoint, SocketAddr) {
        let identity = self
            .authority
            .own_identity(&self.dir.path().join("center"), &name("center"))
            .expect("an identity");
        let options =
            EndpointOptions { authority: Some(self.authority.clone()), ..Default::default() };
        self.bind(identity, options)
    }

    pub fn endpoint(&self, identity: Identity) -> (Endpoint, SocketAddr) {
        self.bind(identity, EndpointOptions::default())
    }

    fn bind(&self, identity: Identity, options: EndpointOptions) -> (Endpoint, SocketAddr) {
        let trust = godwit_transfer::Trust::clone(&if options.authority.is_some() {
            self.authority.trust().clone()
        } else {
            godwit_transfer::Trust::new(identity.authority(), Default::default()).expect("trust")
        });
        let endpoint =
            Endpoint::bind("127.0.0.1:0".parse().expect("address"), identity, trust, options)
                .expect("bind");
        let address = endpoint.local_address().expect("address");
        (endpoint, address)
    }

    /// Two sites with a link.
    pub async fn pair(&self) -> (Link, Link) {
        let (center, address) = self.center();
        let (ap, _) = self.endpoint(self.identity("cafe", SiteKind::Ap));
        let near = within(ap.connect(address, Some(&name("center")))).await.expect("connect");
        let far = within(center.accept()).await.expect("accept");
        (near, far)
    }
}

/// Passes datagrams between one client and `to`, at a rate and with a delay each way, and drops
/// them all while it is cut.
pub struct Forwarder {
    pub address: SocketAddr,
    cut: Arc<AtomicBool>,
    dropped: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// What the forwarder's queue holds at most, as time on the link.
const QUEUE: Duration = Duration::from_millis(100);

impl Forwarder {
    pub async fn start(to: SocketAddr, mbit: f64, one_way: Duration) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("bind"));
        let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("bind"));
        back.connect(to).await.expect("connect");
        let address = front.local_addr().expect("address");
        let cut = Arc::new(AtomicBool::new(false));
        let dropped = Arc::new(AtomicU64::new(0));
        let client = Arc::new(std::sync::Mutex::new(None));
        let mut tasks = Vec::new();
        for forward in [true, false] {
            let (front, back) = (front.clone(), back.clone());
            let (cut, dropped, client) = (cut.clone(), dropped.clone(), client.clone());
            tasks.push(tokio::spawn(async move {
                let mut queue: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
                let mut free_at = Instant::now();
                let mut buffer = vec![0; 65536];
                loop {
                    let due = queue.front().map(|(at, _)| *at);
                    tokio::select! {
                        biased;
                        () = async {
                            match due {
                                Some(at) => tokio::time::sleep_until(at.into()).await,
                                None => std::future::pending().await,
                            }
                        } => {
                            // All that is due: timers are a millisecond coarse.
                            while queue.front().is_some_and(|(at, _)| *at <= Instant::now()) {
                                let Some((_, datagram)) = queue.pop_front() else { break };
                                let target = *client.lock().expect("lock");
                                let sent = match target {
                                    _ if forward => back.send(&datagram).await,
                                    Some(client) => front.send_to(&datagram, client).await,
                                    None => Ok(0),
                                };
                                drop(sent);
                            }
                        }
                        got = async {
                            if forward {
                                front.recv_from(&mut buffer).await
                            } else {
                                back.recv(&mut buffer).await.map(|n| (n, to))
                            }
                        } => {
                            let Ok((n, from)) = got else { continue };
                            if forward {
                                *client.lock().expect("lock") = Some(from);
                            }
                            if cut.load(Ordering::SeqCst) {
                                dropped.fetch_add(1, Ordering::SeqCst);
                                continue;
                            }
                            // As a router does whose queue is full; without it nothing is ever lost, and
                            // what is in flight grows and grows.
                            if free_at > Instant::now() + QUEUE {
                                continue;
                            }
                            let cost = Duration::from_secs_f64(n as f64 * 8e-6 / mbit);
                            free_at = free_at.max(Instant::now()) + cost;
                            queue.push_back((free_at + one_way, buffer[..n].to_vec()));
                        }
                    }
                }
            }));
        }
        Self { address, cut, dropped, tasks }
    }

    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }

    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::SeqCst)
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}
