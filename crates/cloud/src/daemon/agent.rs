//! The AP agent (CloudAP, section III): a site that joined, in the hands of its center.
//!
//! The site opens the link and keeps it open; the center asks over it. When the link breaks, the
//! agent opens another, for as long as it lives. Its machines do not notice.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_transfer::{
    Endpoint, EndpointOptions, Identity, JoinToken, PATIENCE, Revocations, Trust,
};
use godwit_types::Name;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Ready;
use super::secrets::{make_dir, write_private};
use crate::error::Fault;
use crate::site::{LocalSite, SiteDirs, SiteOptions, serve};

/// First and longest pause between two tries to reach the center.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// Name of the file with the center's `host:port`.
const CENTER_FILE: &str = "center";

/// What an agent needs to know.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where it keeps its things; its name and keys are there since it joined.
    pub dirs: SiteDirs,
    /// Where it listens for other sites' relays (UDP); port 0 picks one.
    pub link: SocketAddr,
    /// Bytes that the pool's store may hold; the usual limit when left out.
    pub pool_bytes: Option<u64>,
    /// How long a silent link to another site is kept; [`godwit_transfer::PATIENCE`] when left
    /// out.
    pub link_patience: Option<Duration>,
    /// Whether it looks after the siblings among its vCPUs.
    pub co_schedule: bool,
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
    let identity = godwit_transfer::join(&token).await.map_err(|e| Fault::of(&e))?;
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
    write_private(&keys.join(CENTER_FILE), token.center.as_bytes())?;
    Ok(identity.name().clone())
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    ready: Ready,
    endpoint: Endpoint,
    site: Arc<LocalSite>,
    connected: watch::Receiver<bool>,
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
        let center = std::fs::read_to_string(keys.join(CENTER_FILE)).map_err(|e| {
            Fault::conflict(format!("this site does not know its center: {e}"))
                .hint("join again: godwit site join TOKEN")
        })?;
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
        let mut options = SiteOptions::new(own_address(link.ip(), &center).await?)?;
        options.link_patience = patience;
        options.co_schedule = config.co_schedule;
        options.pool_bytes = config.pool_bytes.unwrap_or(options.pool_bytes);
        let site = LocalSite::open(name.clone(), config.dirs, trust, options).await?;
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (told, connected) = watch::channel(false);
        let work = stay_connected(endpoint.clone(), center, site.clone(), told);
        tasks.spawn(stop.clone().run_until_cancelled_owned(work));
        let ready = Ready { site: name, api: None, link: Some(link) };
        Ok(Self { ready, endpoint, site, connected, stop, tasks })
    }

    /// Where it serves.
    #[must_use]
    pub const fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Tells each time that the center is reached or lost; returns when the agent ends.
    pub async fn follow(&mut self, tell: impl Fn(bool)) {
        while self.connected.changed().await.is_ok() {
            tell(*self.connected.borrow_and_update());
        }
    }

    /// Ends the agent in good order; its machines run on.
    pub async fn stop(self) {
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
    center: String,
    site: Arc<LocalSite>,
    told: watch::Sender<bool>,
) {
    let mut pause = RETRY.0;
    loop {
        match reach(&endpoint, &center).await {
            Ok(link) => {
                tracing::info!(center = %center, "connected");
                told.send_replace(true);
                pause = RETRY.0;
                serve(link, site.clone()).await;
                told.send_replace(false);
            }
            Err(error) => {
                tracing::warn!(center = %center, %error, "the center is not reached; trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn reach(endpoint: &Endpoint, center: &str) -> Result<godwit_transfer::Link, Fault> {
    let address = tokio::net::lookup_host(center)
        .await
        .ok()
        .and_then(|mut a| a.next())
        .ok_or_else(|| Fault::unavailable(format!("'{center}' has no address")))?;
    endpoint.connect(address, None).await.map_err(|e| Fault::of(&e))
}
