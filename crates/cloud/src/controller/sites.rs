//! The sites that are attached, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use godwit_site::{Call, SiteHost, verbs};
use godwit_transfer::Revocations;
use godwit_types::{Fault, Name};
use tokio::sync::watch;

use super::ask::ANSWER_WITHIN;
use crate::registry::{Registry, registry_fault};

/// The sites that are reachable, and which of them takes what.
pub(crate) struct Sites {
    pub(super) registry: Arc<Registry>,
    pub(super) hosts: RwLock<BTreeMap<Name, Arc<dyn SiteHost>>>,
    /// Grows with each change of them.
    pub(super) changes: watch::Sender<u64>,
}

impl Sites {
    /// Sends the list of revoked certificates to every site that is attached. One that cannot be
    /// told now is told when it comes back.
    pub(crate) async fn spread_revocations(&self, list: &Revocations) {
        let hosts = self.hosts();
        futures::future::join_all(hosts.iter().map(|h| self.send_revocations(h, list))).await;
    }

    /// Sends the list of revoked certificates to one site.
    pub(crate) async fn send_revocations(&self, host: &Arc<dyn SiteHost>, list: &Revocations) {
        let request = verbs::Revoke { list: list.clone() };
        let sent = tokio::time::timeout(ANSWER_WITHIN, host.ask(request, Call::quiet())).await;
        let sent = sent.unwrap_or_else(|_| Err(Fault::unavailable("it did not answer")));
        if let Err(error) = sent {
            tracing::warn!(site = %host.name(), %error, "not told of revoked certificates");
        }
    }

    /// Whether `host` is the one by which its site is reached.
    pub(super) fn is_attached(&self, host: &Arc<dyn SiteHost>) -> bool {
        let hosts = self.hosts.read().unwrap_or_else(PoisonError::into_inner);
        hosts.get(host.name()).is_some_and(|h| Arc::ptr_eq(h, host))
    }

    /// Waits until `host` is not the attached one any more: its link is gone, or replaced.
    pub(super) async fn gone(&self, host: &Arc<dyn SiteHost>) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            if !self.is_attached(host) || changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// The attached host of that name.
    ///
    /// # Errors
    /// Not found for a site that never joined, unavailable for one that is away.
    pub(crate) fn host(&self, name: &Name) -> Result<Arc<dyn SiteHost>, Fault> {
        let hosts = self.hosts.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(h) = hosts.get(name) {
            return Ok(h.clone());
        }
        drop(hosts);
        let site = self.registry.sites().get(name).map_err(registry_fault)?;
        if site.revoked {
            return Err(Fault::conflict(format!("site '{}' was revoked", site.name)).hint(format!(
                "let it join anew: godwit site token {0}, then godwit site join --replace there",
                site.name
            )));
        }
        Err(Fault::unavailable(format!(
            "site '{}' is not connected (last heard of {})",
            site.name,
            site.last_seen.rfc3339()
        ))
        .hint("its daemon reconnects by itself; see: godwit site list"))
    }

    /// All attached hosts, by name.
    #[must_use]
    pub(crate) fn hosts(&self) -> Vec<Arc<dyn SiteHost>> {
        let hosts = self.hosts.read().unwrap_or_else(PoisonError::into_inner);
        hosts.values().cloned().collect()
    }

    /// Waits until a site is attached.
    pub(super) async fn await_host(
        &self,
        name: &Name,
        limit: Duration,
    ) -> Result<Arc<dyn SiteHost>, Fault> {
        let mut changes = self.changes.subscribe();
        let wait = async {
            loop {
                changes.borrow_and_update();
                if let Ok(h) = self.host(name) {
                    return h;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        match tokio::time::timeout(limit, wait).await {
            Ok(h) => Ok(h),
            Err(_) => self.host(name),
        }
    }
}
