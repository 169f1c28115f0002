//! The AP agent (CloudAP, section III): a site that joined, in the hands of its center.
//!
//! The site opens the link and keeps it open; the center asks over it. When the link breaks, the
//! agent opens another, for as long as it lives. Its machines do not notice.
//!
//! It obeys a certificate of kind center with the name of the center that it joined, and nobody
//! else, whatever address that one answers at; a link that another site opens to it is closed, but
//! for what the center has it offer to that one.
//! Its own certificate is renewed over the link ([`godwit_transfer::Renewal`]).

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum_server::Handle;
use godwit_site::{LocalSite, SiteDirs, SiteOptions, Uids, serve};
use godwit_transfer::{
    Endpoint, EndpointOptions, Expected, Identity, JoinToken, Link, PATIENCE, PendingIdentity,
    Renewal, Revocations, Trust, unix_now,
};
use godwit_types::{Code, Fault, Name};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::front::{self, FrontConfig};
use super::https::{Served, Socket};
use super::secrets::{make_dir, write_private, write_public};
use super::{RENEW, Ready};

/// First and longest pause between two tries to reach the center.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// Name of the file with the center's `host:port` and, in its second line, its name.
const CENTER_FILE: &str = "center";

/// How long open requests may take to end when the agent ends.
const GRACE: Duration = Duration::from_secs(5);

/// How long the center may take to sign a certificate.
const SIGNED_WITHIN: Duration = Duration::from_secs(30);

/// What an agent needs to know.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where it keeps its things; its name and keys are there since it joined.
    pub dirs: SiteDirs,
    /// Where it listens for other sites' relays (UDP); port 0 picks one.
    pub link: SocketAddr,
    /// Bytes that the pool's store may hold; the usual limit when left out.
    pub pool_bytes: Option<u64>,
    /// Bytes of tmpfs for sealed memory that no machine maps; half of it when left out.
    pub memory_cache_bytes: Option<u64>,
    /// Bytes of memory that may be kept of machines that have left; a quarter of the above when left
    /// out.
    pub memory_visits_bytes: Option<u64>,
    /// Bytes of memory that machines may be promised; what the host has when left out.
    pub memory_promise_bytes: Option<u64>,
    /// How long a silent link to another site is kept; [`godwit_transfer::PATIENCE`] when left
    /// out.
    pub link_patience: Option<Duration>,
    /// Nobody can reach this site: its relays dial those of other sites.
    pub behind_nat: bool,
    /// How often all that is stored is read and checked; once a day when left out.
    pub scrub_every: Option<Duration>,
    /// Whether it looks after the siblings among its vCPUs.
    pub co_schedule: bool,
    /// Whether each QEMU gets a uid of its own, and from where.
    pub uids: Uids,
    /// Where it serves the center's API for people there; nowhere when left out.
    pub api: Option<FrontConfig>,
}

/// Joins the center that made `token` and keeps the identity under `dirs`.
///
/// # Errors
/// In which way the token is not good, or the center cannot be reached.
pub async fn join_site(token: &str, dirs: &SiteDirs) -> Result<Name, Fault> {
    let token: JoinToken = token.trim().parse().map_err(|e: _| {
        let e: godwit_transfer::keys::TokenError = e;
        Fault::of(&e)
    })?;
    dirs.make()?;
    let joined = godwit_transfer::join(&token).await.map_err(|e| Fault::of(&e))?;
    let identity = joined.identity;
    let keys = dirs.keys();
    make_dir(&keys)?;
    identity.save(&keys.join("identity")).map_err(|e| Fault::of(&e))?;
    // Of the cloud that this site belonged to before, if it did.
    match std::fs::remove_file(dirs.revoked()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Fault::internal(format!("removing {}: {e}", dirs.revoked().display())));
        }
        _ => {}
    }
    let center = KnownCenter { address: token.center, name: Some(joined.center) };
    center.save(&keys)?;
    Ok(identity.name().clone())
}

/// The center that a site belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownCenter {
    /// Its `host:port`.
    address: String,
    /// Its name; unknown where an earlier version joined, until it is reached.
    name: Option<Name>,
}

impl KnownCenter {
    fn load(keys: &Path) -> Result<Self, Fault> {
        let text = std::fs::read_to_string(keys.join(CENTER_FILE)).map_err(|e| {
            Fault::conflict(format!("this site does not know its center: {e}"))
                .hint("join again: godwit site join @FILE")
        })?;
        let mut lines = text.lines();
        let address = lines.next().unwrap_or_default().trim().to_owned();
        let name = lines.next().map(|n| Name::new(n.trim())).transpose().map_err(|e| {
            let file = keys.join(CENTER_FILE);
            Fault::new(Code::Damaged, format!("the center's name in {}: {e}", file.display()))
        })?;
        Ok(Self { address, name })
    }

    fn save(&self, keys: &Path) -> Result<(), Fault> {
        let name = self.name.as_ref().map(|n| format!("\n{n}")).unwrap_or_default();
        write_private(&keys.join(CENTER_FILE), format!("{}{name}", self.address).as_bytes())
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    ready: Ready,
    endpoint: Endpoint,
    site: Arc<LocalSite>,
    connected: watch::Receiver<bool>,
    front: Option<Handle<SocketAddr>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Agent {
    /// Starts the agent of a site that has joined.
    ///
    /// # Errors
    /// When the site never joined, or its host cannot run machines.
    pub async fn start(config: AgentConfig) -> Result<Self, Fault> {
        let keys = config.dirs.keys();
        let identity = load_identity(&keys.join("identity"))?;
        let name = identity.name().clone();
        let center = KnownCenter::load(&keys)?;
        let revoked = Revocations::load(&config.dirs.revoked()).unwrap_or_else(|error| {
            tracing::warn!(%error, "no list of revoked certificates until the center sends it");
            Revocations::default()
        });
        let trust = Trust::new(identity.authority(), revoked).map_err(|e| Fault::of(&e))?;
        let patience = config.link_patience.unwrap_or(PATIENCE);
        let endpoint_options = EndpointOptions::patient(patience);
        let endpoint = Endpoint::bind(config.link, identity, trust.clone(), endpoint_options)
            .map_err(|e| Fault::of(&e))?;
        let link = endpoint.local_address().map_err(|e| Fault::of(&e))?;
        let address = own_address(link.ip(), &center.address).await?;
        let mut options = SiteOptions::new(address)?;
        options.link_patience = patience;
        options.behind_nat = config.behind_nat;
        options.co_schedule = config.co_schedule;
        options.uids = config.uids;
        options.pool_bytes = config.pool_bytes.unwrap_or(options.pool_bytes);
        options.memory_cache_bytes = config.memory_cache_bytes;
        options.memory_visits_bytes = config.memory_visits_bytes;
        options.memory_promise_bytes = config.memory_promise_bytes;
        options.scrub_every = config.scrub_every;
        let site = LocalSite::open(name.clone(), config.dirs, trust, options).await?;
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (now, linked) = watch::channel(None);
        let (sender, connected) = watch::channel(false);
        let served = match config.api {
            Some(front) => {
                let router = front::router(name.clone(), linked.clone());
                Some(serve_front(front, router, address, &keys, &stop, &tasks).await?)
            }
            None => None,
        };
        let work =
            stay_connected(endpoint.clone(), center, keys.clone(), site.clone(), now, sender);
        tasks.spawn(stop.clone().run_until_cancelled_owned(work));
        let renewing = keep_certificate(endpoint.clone(), keys.join("identity"), linked);
        tasks.spawn(stop.clone().run_until_cancelled_owned(renewing));
        let listens = SocketAddr::new(address, link.port());
        let meeting = site.clone().meet_neighbours(endpoint.clone(), listens);
        tasks.spawn(stop.clone().run_until_cancelled_owned(meeting));
        let api = served.as_ref().map(|s| s.address);
        let ready = Ready { site: name, api, link: Some(link) };
        let front = served.map(|s| s.handle);
        Ok(Self { ready, endpoint, site, connected, front, stop, tasks })
    }

    /// Where it serves.
    #[must_use]
    pub const fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Notifies each time that the center is reached or lost; returns when the agent ends.
    pub async fn follow(&mut self, notify: impl Fn(bool)) {
        while self.connected.changed().await.is_ok() {
            notify(*self.connected.borrow_and_update());
        }
    }

    /// Ends the agent in good order; its machines run on.
    pub async fn stop(self) {
        if let Some(front) = &self.front {
            front.graceful_shutdown(Some(GRACE));
        }
        self.stop.cancel();
        self.endpoint.close("the site is stopped").await;
        self.tasks.close();
        self.tasks.wait().await;
        self.site.close().await;
    }
}

fn load_identity(dir: &Path) -> Result<Identity, Fault> {
    Identity::load(dir).map_err(|e| {
        Fault::of(&e).hint("let the site join: godwit site token NAME at the center, then godwit site join TOKEN here")
    })
}

/// Serves the center's API here, and hands the certificate out.
async fn serve_front(
    front: FrontConfig,
    router: axum::Router,
    own: IpAddr,
    keys: &Path,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Served, Fault> {
    let socket = Socket { listen: front.listen, named: Some(own), tls: front.tls.as_ref(), keys };
    let served = socket.serve(router, stop, tasks).await?;
    if let Some(file) = &front.ca_file {
        write_public(file, served.pem.as_bytes())?;
    }
    tracing::info!(api = %served.address, "the center's API is served here");
    Ok(served)
}

/// The address under which other sites reach this one: the one it listens on or, when it listens
/// on all, the one that packets to the center leave from.
async fn own_address(listening: IpAddr, center: &str) -> Result<IpAddr, Fault> {
    if !listening.is_unspecified() {
        return Ok(listening);
    }
    let fail = |e: std::io::Error| {
        Fault::unavailable(format!("finding this site's address towards '{center}': {e}"))
            .hint("name it: --link ADDRESS:PORT")
    };
    let any = tokio::net::UdpSocket::bind((listening, 0)).await.map_err(fail)?;
    any.connect(center).await.map_err(fail)?;
    Ok(any.local_addr().map_err(fail)?.ip())
}

async fn stay_connected(
    endpoint: Endpoint,
    mut center: KnownCenter,
    keys: PathBuf,
    site: Arc<LocalSite>,
    now: watch::Sender<Option<Link>>,
    sender: watch::Sender<bool>,
) {
    let mut pause = RETRY.0;
    loop {
        match reach(&endpoint, &center).await {
            Ok(link) => {
                let name = link.peer().name.clone();
                tracing::info!(center = %name, address = %center.address, "connected");
                if center.name.is_none() {
                    center.name = Some(name.clone());
                    if let Err(error) = center.save(&keys) {
                        tracing::warn!(%error, "the center's name is not kept");
                    }
                }
                now.send_replace(Some(link.clone()));
                sender.send_replace(true);
                pause = RETRY.0;
                serve(link, &name, site.clone()).await;
                now.send_replace(None);
                sender.send_replace(false);
            }
            Err(error) => {
                let center = &center.address;
                tracing::warn!(%center, %error, "the center is not reached; trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn reach(endpoint: &Endpoint, center: &KnownCenter) -> Result<Link, Fault> {
    let address = tokio::net::lookup_host(&center.address)
        .await
        .ok()
        .and_then(|mut a| a.next())
        .ok_or_else(|| Fault::unavailable(format!("'{}' has no address", center.address)))?;
    let center = Expected::Center(center.name.clone());
    endpoint.connect_to(address, &center).await.map_err(|e| Fault::of(&e))
}

/// Has the certificate renewed whenever it is due, as long as there is a link then.
async fn keep_certificate(
    endpoint: Endpoint,
    dir: PathBuf,
    mut linked: watch::Receiver<Option<Link>>,
) {
    let mut renewal = Renewal::of(endpoint.identity().me());
    loop {
        tokio::time::sleep(renewal.wait(unix_now())).await;
        if !renewal.is_due(unix_now()) {
            continue;
        }
        let link = match linked.wait_for(Option::is_some).await {
            Ok(link) => link.clone(),
            Err(_) => return,
        };
        let Some(link) = link else { continue };
        match renew(&endpoint, &link, &dir).await {
            Ok(()) => renewal = Renewal::of(endpoint.identity().me()),
            Err(error) => {
                tracing::warn!(%error, "this site's certificate is not renewed; trying again");
                renewal.failed(unix_now());
            }
        }
    }
}

/// Has a new key certified, and uses it from now on; relays that start read it from `dir`.
async fn renew(endpoint: &Endpoint, link: &Link, dir: &Path) -> Result<(), Fault> {
    let old = endpoint.identity();
    let pending = PendingIdentity::make(old.name(), old.me().kind).map_err(|e| Fault::of(&e))?;
    let request = pending.request().to_vec();
    let certificate: Vec<u8> =
        link.call(RENEW, &request, SIGNED_WITHIN).await.map_err(|e| Fault::of(&e))?;
    let identity = pending.complete(&certificate, old.authority()).map_err(|e| Fault::of(&e))?;
    endpoint.trust().check_own(&certificate, unix_now()).map_err(|e| Fault::of(&e))?;
    identity.save(dir).map_err(|e| Fault::of(&e))?;
    let (serial, ends) = (identity.me().serial.clone(), identity.me().not_after);
    endpoint.set_identity(identity).map_err(|e| Fault::of(&e))?;
    tracing::info!(%serial, ends, "this site's certificate was renewed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_center_is_kept_by_address_and_name() {
        let dir = tempfile::tempdir().expect("dir");
        let name = Name::new("center").expect("name");
        let center = KnownCenter { address: "10.0.0.1:7701".into(), name: Some(name) };
        center.save(dir.path()).expect("saved");
        assert_eq!(KnownCenter::load(dir.path()).expect("loads"), center);
        // As an earlier version wrote it.
        std::fs::write(dir.path().join(CENTER_FILE), "10.0.0.1:7701").expect("write");
        let old = KnownCenter::load(dir.path()).expect("loads");
        assert_eq!(old, KnownCenter { name: None, ..center });
        std::fs::write(dir.path().join(CENTER_FILE), "10.0.0.1:7701\n../x").expect("write");
        assert_eq!(KnownCenter::load(dir.path()).expect_err("no name").code, Code::Damaged);
    }
}
