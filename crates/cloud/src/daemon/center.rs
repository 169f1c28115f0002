//! The center: registry, controller, API, its own site, and the door for other sites.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum_server::Handle;
use godwit_site::{
    CenterHost, LocalSite, RemoteSite, SiteDirs, SiteHost, SiteOptions, Uids, serve_site,
};
use godwit_transfer::keys::TokenInfo;
use godwit_transfer::{
    Authority, Endpoint, EndpointOptions, Fault as LinkFault, KeyError, PATIENCE, Peer, Renewal,
    Revocations, Router, unix_now,
};
use godwit_types::{Code, Fault, Name, SiteKind};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::by_site::BySite;
use super::https::{Served, Socket};
use super::{ClientFiles, RENEW, Ready, TlsFiles, local_socket, secrets};
use crate::api::{Api, Gatekeeper, Routes};
use crate::controller::Controller;
use crate::registry::{Registry, RegistryError};

/// How long open requests may take to end when the daemon ends.
const GRACE: Duration = Duration::from_secs(5);

/// What a center needs to know.
#[derive(Debug, Clone)]
pub struct CenterConfig {
    /// Name of its own site.
    pub site: Name,
    /// Where it keeps its things.
    pub dirs: SiteDirs,
    /// Where the API listens; port 0 picks one.
    pub api: SocketAddr,
    /// Where other sites connect (UDP); port 0 picks one.
    pub link: SocketAddr,
    /// `host:port` under which other sites reach it, when that differs from `link`.
    pub advertise: Option<String>,
    /// Where the files for clients go.
    pub client: ClientFiles,
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
    /// How often all that is stored is read and checked; once a day when left out.
    pub scrub_every: Option<Duration>,
    /// The operator's own certificate for the API; a self-signed one is made when left out.
    pub tls: Option<TlsFiles>,
    /// Seconds for which it issues certificates; 90 days when left out.
    pub certificate_life: Option<u64>,
    /// Whether it looks after the siblings among its vCPUs.
    pub co_schedule: bool,
    /// Whether each QEMU gets a uid of its own, and from where.
    pub uids: Uids,
    /// The ports of its host that machines may publish; those that need no right when left out.
    pub publish_ports: Option<std::ops::RangeInclusive<u16>>,
}

/// A running center.
#[derive(Debug)]
pub struct Center {
    ready: Ready,
    controller: Arc<Controller>,
    endpoint: Endpoint,
    own: Arc<LocalSite>,
    api: Handle<SocketAddr>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

struct Door {
    authority: Arc<Authority>,
    center: String,
}

impl Gatekeeper for Door {
    fn invite(&self, site: &Name, kind: SiteKind, lifetime_s: u64) -> Result<String, Fault> {
        self.authority
            .invite(site, kind, &self.center, lifetime_s)
            .map(|t| t.to_string())
            .map_err(|e| Fault::of(&e))
    }

    fn tokens(&self) -> Vec<TokenInfo> {
        self.authority.tokens()
    }

    fn withdraw(&self, token: &str) -> Result<(), Fault> {
        self.authority.withdraw(token).map_err(|e| match &e {
            KeyError::TokenUsed(_) => {
                Fault::of(&e).hint("throw the site out with: godwit site revoke NAME")
            }
            KeyError::NoSuchToken(_) => {
                Fault::of(&e).hint("see the tokens with: godwit site token list")
            }
            _ => Fault::of(&e),
        })
    }

    fn revoke(&self, site: &Name) -> Result<Revocations, Fault> {
        self.authority.revoke_site(site).map_err(|e| Fault::of(&e))
    }
}

impl Center {
    /// Starts a center; when this returns, its API answers. `serves` says of what that is put
    /// together.
    ///
    /// # Errors
    /// What could not be opened, bound or read.
    pub async fn start(
        config: CenterConfig,
        serves: impl FnOnce(&Api) -> Routes + Send,
    ) -> Result<Self, Fault> {
        config.dirs.make()?;
        let registry = Registry::open(&config.dirs.data.join("registry.redb")).map_err(|e| {
            let hint = match &e {
                RegistryError::FellBack { .. } => {
                    "bring it back from a copy, or remove registry.mark beside it to go on \
                         without the last change: what runs is asked of the sites"
                }
                _ => "one center at a time uses a registry",
            };
            Fault::of(&e).hint(hint)
        })?;
        let keys = config.dirs.keys();
        let mut authority =
            Authority::open_or_create(&keys.join("authority")).map_err(|e| Fault::of(&e))?;
        if let Some(seconds) = config.certificate_life {
            authority = authority.with_life(seconds);
        }
        let authority = Arc::new(authority);
        let controller = Controller::new(Arc::new(registry), authority.clone());
        let identity = authority
            .own_identity(&keys.join("identity"), &config.site)
            .map_err(|e| Fault::of(&e))?;
        let patience = config.link_patience.unwrap_or(PATIENCE);
        let options = EndpointOptions {
            authority: Some(authority.clone()),
            ..EndpointOptions::patient(patience)
        };
        let endpoint = Endpoint::bind(config.link, identity, authority.trust().clone(), options)
            .map_err(|e| Fault::of(&e))?;
        let link = endpoint.local_address().map_err(|e| Fault::of(&e))?;

        let own = {
            let mut options = SiteOptions::new(link.ip())?;
            options.link_patience = patience;
            options.co_schedule = config.co_schedule;
            options.uids = config.uids;
            options.pool_bytes = config.pool_bytes.unwrap_or(options.pool_bytes);
            options.memory_cache_bytes = config.memory_cache_bytes;
            options.memory_visits_bytes = config.memory_visits_bytes;
            options.memory_promise_bytes = config.memory_promise_bytes;
            options.scrub_every = config.scrub_every;
            options.publish_ports = config.publish_ports.unwrap_or(options.publish_ports);
            let trust = authority.trust().clone();
            LocalSite::open(config.site.clone(), config.dirs.clone(), trust, options).await?
        };
        controller.attach(own.clone(), SiteKind::Center).await?;
        controller.recover()?;

        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let kept: Arc<dyn SiteHost> = own.clone();
        tasks.spawn(stop.clone().run_until_cancelled_owned(controller.clone().keep(kept)));
        let work = keep_certificate(endpoint.clone(), authority.clone(), keys.join("identity"));
        tasks.spawn(stop.clone().run_until_cancelled_owned(work));

        let listener = local_socket::listen(&config.dirs.run)?;
        let work = local_socket::serve(listener, controller.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(work));

        let token = secrets::token_or_new(&keys.join("operator-token"))?;
        let door = Door {
            authority: authority.clone(),
            center: config.advertise.clone().unwrap_or_else(|| link.to_string()),
        };
        let api = Api::new(controller.clone(), Arc::new(door), &token).until(stop.clone());
        let router = api.serve(serves(&api));
        let host: Arc<dyn CenterHost> = Arc::new(BySite { router: router.clone() });
        let work = welcome(endpoint.clone(), controller.clone(), authority, host);
        tasks.spawn(stop.clone().run_until_cancelled_owned(work));
        let socket =
            Socket { listen: config.api, named: None, tls: config.tls.as_ref(), keys: &keys };
        let Served { handle: api, address, pem } = socket.serve(router, &stop, &tasks).await?;
        config.client.write(&format!("https://{address}"), &pem, &token)?;
        tracing::info!(site = %config.site, api = %address, link = %link, "center ready");
        let ready = Ready { site: config.site, api: Some(address), link: Some(link) };
        Ok(Self { ready, controller, endpoint, own, api, stop, tasks })
    }

    /// Where it serves.
    #[must_use]
    pub const fn ready(&self) -> &Ready {
        &self.ready
    }

    /// The controller.
    #[must_use]
    pub const fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// Ends the center in good order; its machines run on.
    pub async fn stop(self) {
        self.api.graceful_shutdown(Some(GRACE));
        self.stop.cancel();
        self.endpoint.close("the center is stopped").await;
        self.tasks.close();
        if tokio::time::timeout(GRACE * 2, self.tasks.wait()).await.is_err() {
            tracing::warn!("some requests did not end in time");
        }
        self.own.close().await;
    }
}

/// Takes in the sites that connect. Each is the site of its certificate, whatever it says.
async fn welcome(
    endpoint: Endpoint,
    controller: Arc<Controller>,
    authority: Arc<Authority>,
    host: Arc<dyn CenterHost>,
) {
    while let Some(link) = endpoint.accept().await {
        let (controller, trust) = (controller.clone(), endpoint.trust().clone());
        let known = authority.clone();
        let own = endpoint.identity();
        if link.peer().kind == SiteKind::Center || link.peer().name == *own.name() {
            let peer = link.peer();
            tracing::error!(peer = %peer.name, from = %link.remote_address(), "a second center is turned away");
            link.close("there is one center");
            continue;
        }
        let (calls, host) = (Arc::new(calls(authority.clone())), host.clone());
        tokio::spawn(async move {
            let kind = link.peer().kind;
            let site: Arc<dyn SiteHost> = Arc::new(RemoteSite::new(link.clone()));
            readmit(&controller, &known, link.peer());
            match controller.attach(site.clone(), kind).await {
                Ok(()) => {
                    // Read after it is attached, so that no later list misses it.
                    let list = trust.revocations();
                    controller.sites.send_revocations(&site, &list).await;
                    tokio::select! {
                        () = controller.clone().keep(site.clone()) => {}
                        () = link.serve(calls) => controller.detach(&site),
                        () = serve_site(link.clone(), host) => controller.detach(&site),
                        why = link.closed() => {
                            tracing::info!(site = %site.name(), %why, "link closed");
                            controller.detach(&site);
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(site = %site.name(), %error, "not taken in");
                    link.close("not taken in");
                }
            }
        });
    }
}

/// What a site may call at its center.
fn calls(authority: Arc<Authority>) -> Router {
    Router::new().on(RENEW, move |peer, request: Vec<u8>| {
        let authority = authority.clone();
        async move {
            let name = peer.name.clone();
            let signed =
                tokio::task::spawn_blocking(move || authority.renew(&peer, &request)).await;
            let signed = signed
                .map_err(|_| LinkFault::new(Code::Internal, "the center failed; see its log"))?;
            match &signed {
                Ok(_) => tracing::info!(site = %name, "its certificate is renewed"),
                Err(error) => tracing::warn!(site = %name, %error, "no certificate for it"),
            }
            Ok(signed?)
        }
    })
}

/// Renews the center's own certificate whenever it is due.
async fn keep_certificate(endpoint: Endpoint, authority: Arc<Authority>, dir: PathBuf) {
    let mut renewal = Renewal::of(endpoint.identity().me());
    loop {
        tokio::time::sleep(renewal.wait(unix_now())).await;
        if !renewal.is_due(unix_now()) {
            continue;
        }
        let (authority, dir, name) =
            (authority.clone(), dir.clone(), endpoint.identity().name().clone());
        let made = tokio::task::spawn_blocking(move || authority.own_identity(&dir, &name)).await;
        let done = match made {
            Ok(Ok(identity)) => endpoint.set_identity(identity).map_err(|e| Fault::of(&e)),
            Ok(Err(e)) => Err(Fault::of(&e)),
            Err(e) => Err(Fault::internal(e.to_string())),
        };
        match done {
            Ok(()) => {
                tracing::info!("the center's certificate was renewed");
                renewal = Renewal::of(endpoint.identity().me());
            }
            Err(error) => {
                tracing::error!(%error, "the center's certificate is not renewed; trying again");
                renewal.failed(unix_now());
            }
        }
    }
}

/// A site that was revoked and shows a good certificate has joined anew, with a token that was
/// made for it since.
///
/// A certificate that this authority does not know (it was restored from a copy) proves no such
/// thing; that of a site in good standing is entered, so that a revocation finds it.
fn readmit(controller: &Controller, authority: &Authority, peer: &Peer) {
    let revoked = controller.registry().sites().get(&peer.name).is_ok_and(|s| s.revoked);
    if authority.trust().is_revoked(&peer.serial) {
        return;
    }
    if !revoked {
        if let Err(error) = authority.enter(peer) {
            tracing::error!(site = %peer.name, %error, "its certificate is not entered");
        }
        return;
    }
    if !authority.knows(&peer.serial) {
        tracing::warn!(site = %peer.name, "revoked, and its certificate is not known here");
        return;
    }
    tracing::info!(site = %peer.name, "a revoked site has joined anew");
    if let Err(error) = controller.registry().sites().readmit(&peer.name) {
        tracing::error!(site = %peer.name, %error, "a site that joined anew is not taken in");
    }
}
