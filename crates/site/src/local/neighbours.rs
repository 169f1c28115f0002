//! Substrates straight from one site to another, as the center arranges it.
//!
//! ```text
//! center -> supplier: offer      to one site, one substrate, for a minute; it says where it listens
//! center -> taker: fetch         dials there, has the supplier's name checked, asks for that one
//! ```
//!
//! A site answers another one nothing but this, and nothing that the center did not arrange.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use godwit_transfer::{Endpoint, Link};
use godwit_types::{Code, Fault, Hash, Name, SubstrateId};

use super::LocalSite;
use crate::exchange::{Bring, Failed};
use crate::remote::serve_neighbour;
use crate::{Call, RemoteSite, SiteHost, StreamRequest, SubstrateInfo};

/// How long an offer may wait for the taker to come.
const OFFERED: Duration = Duration::from_secs(60);
/// Links of other sites that are served at once, and of one of them.
const LINKS: usize = 64;
const LINKS_OF_ONE: usize = 4;
/// How long the supplier may take to be reached.
const REACHED: Duration = Duration::from_secs(5);

/// What other sites may ask this one for.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    /// Set once the daemon listens; nothing is offered where others cannot reach it.
    reachable: OnceLock<SocketAddr>,
    /// Dials other sites.
    endpoint: OnceLock<Endpoint>,
    offers: Mutex<HashMap<(Name, SubstrateId), Instant>>,
}

/// A substrate at another site that offers it.
#[derive(Debug)]
pub(super) struct Offered {
    pub(super) id: SubstrateId,
    pub(super) name: Name,
    pub(super) content: Option<Hash>,
    pub(super) among: Vec<SubstrateId>,
    pub(super) from: Name,
    pub(super) address: SocketAddr,
}

impl Neighbours {
    /// Lets `to` fetch a substrate; gives where, if anybody can reach this site.
    pub(super) fn offer(&self, id: SubstrateId, to: Name) -> Option<SocketAddr> {
        let address = *self.reachable.get()?;
        let mut offers = self.offers.lock().unwrap_or_else(PoisonError::into_inner);
        offers.retain(|_, since| since.elapsed() < OFFERED);
        offers.insert((to, id), Instant::now());
        Some(address)
    }

    /// Takes the offer of a substrate to `peer`: each is good once.
    fn take(&self, peer: &Name, id: SubstrateId) -> bool {
        let mut offers = self.offers.lock().unwrap_or_else(PoisonError::into_inner);
        offers.remove(&(peer.clone(), id)).is_some_and(|since| since.elapsed() < OFFERED)
    }

    /// Whether anything is offered to `peer`.
    fn expects(&self, peer: &Name) -> bool {
        let offers = self.offers.lock().unwrap_or_else(PoisonError::into_inner);
        offers.iter().any(|((to, _), since)| to == peer && since.elapsed() < OFFERED)
    }
}

impl LocalSite {
    /// Takes links of other sites at `endpoint`, until it is closed: for what was offered to them.
    /// Whoever else comes is turned away. `listens` is where other sites reach it.
    pub async fn meet_neighbours(self: Arc<Self>, endpoint: Endpoint, listens: SocketAddr) {
        let _ = self.neighbours.endpoint.set(endpoint.clone());
        if !self.options.behind_nat {
            let _ = self.neighbours.reachable.set(listens);
        }
        let (neighbours, name, pool) = (&self.neighbours, &self.name, Arc::clone(&self));
        take_links(&endpoint, neighbours, name, move |id| pool.parts.substrates.supply(id)).await;
    }

    /// Fetches a substrate from a site that offers it.
    pub(super) async fn fetch(&self, at: Offered, call: Call) -> Result<SubstrateInfo, Fault> {
        let endpoint = self.neighbours.endpoint.get();
        let endpoint = endpoint.ok_or_else(|| Fault::unavailable("this site dials no other"))?;
        let silent =
            |_| Fault::unavailable(format!("site '{}' is not reached at {}", at.from, at.address));
        let dialled = tokio::time::timeout(REACHED, endpoint.connect(at.address, Some(&at.from)));
        let link = tokio::select! {
            link = dialled => link.map_err(silent)?.map_err(|e| {
                // Whatever it is, the center's way remains.
                Fault::unavailable(format!("site '{}' at {}: {e}", at.from, at.address))
            })?,
            () = call.cancel.cancelled() => return Err(Fault::cancelled()),
        };
        let supplier = RemoteSite::new(link.clone());
        let fetched = async {
            let supply = supplier.open(StreamRequest::SubstrateSupply { id: at.id });
            let out = tokio::select! {
                out = tokio::time::timeout(REACHED, supply) => out.map_err(silent)?,
                () = call.cancel.cancelled() => return Err(Fault::cancelled()),
            };
            let out = out.map_err(|f| match f.code {
                // The center's way remains.
                Code::Forbidden => Fault::unavailable(f.message),
                _ => f,
            })?;
            let bring = Bring { name: &at.name, from: &at.from, to: &self.name, call: &call };
            match bring.run((out, self.parts.substrates.take(at.content, Some(at.among)))).await {
                Ok(info) => Ok(info),
                Err(Failed::Broken(f) | Failed::For(f)) => Err(f),
            }
        };
        let fetched = fetched.await;
        link.close("the substrate was fetched");
        fetched
    }
}

/// Serves the links that come to `endpoint` with what was offered to whoever opened them.
async fn take_links(
    endpoint: &Endpoint,
    neighbours: &Neighbours,
    site: &Name,
    supply: impl Fn(SubstrateId) -> crate::ByteStream,
) {
    let mut served = futures::stream::FuturesUnordered::new();
    let mut open: HashMap<Name, usize> = HashMap::new();
    loop {
        let link = tokio::select! {
            link = endpoint.accept() => link,
            Some(peer) = futures::StreamExt::next(&mut served) => {
                if let Some(its) = open.get_mut(&peer) {
                    *its -= 1;
                }
                open.retain(|_, its| *its > 0);
                continue;
            }
        };
        let Some(link) = link else { return };
        let peer = link.peer().name.clone();
        let its = open.get(&peer).copied().unwrap_or_default();
        if served.len() < LINKS && its < LINKS_OF_ONE && neighbours.expects(&peer) {
            *open.entry(peer).or_default() += 1;
            served.push(serve_offers(link, neighbours, site, &supply));
            continue;
        }
        tracing::warn!(peer = %link.peer().name, from = %link.remote_address(), "turned away");
        link.close("this site serves its center alone");
    }
}

async fn serve_offers(
    link: Link,
    neighbours: &Neighbours,
    site: &Name,
    supply: &impl Fn(SubstrateId) -> crate::ByteStream,
) -> Name {
    let peer = link.peer().name.clone();
    serve_neighbour(link, site, |request| match request {
        StreamRequest::SubstrateSupply { id } if neighbours.take(&peer, id) => Ok(supply(id)),
        _ => Err(Fault::new(Code::Forbidden, "that was not offered to this site")),
    })
    .await;
    peer
}

#[cfg(test)]
mod tests {
    use godwit_transfer::{Authority, EndpointOptions, PendingIdentity};
    use godwit_types::SiteKind;
    use tokio::io::AsyncReadExt;

    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    #[test]
    fn an_offer_is_to_one_site_of_one_substrate_once() {
        let (one, other) = (SubstrateId::new(), SubstrateId::new());
        let n = Neighbours::default();
        assert_eq!(n.offer(one, name("bar")), None, "nobody can reach it");
        assert!(!n.expects(&name("bar")));
        let at = "127.0.0.1:1".parse().expect("address");
        n.reachable.set(at).expect("once");
        assert_eq!(n.offer(one, name("bar")), Some(at));
        assert!(n.expects(&name("bar")) && !n.expects(&name("baz")));
        assert!(!n.take(&name("baz"), one) && !n.take(&name("bar"), other));
        assert!(n.take(&name("bar"), one) && !n.take(&name("bar"), one));
        assert!(!n.expects(&name("bar")));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn another_site_gets_what_was_offered_to_it_and_nothing_else() {
        let dir = tempfile::tempdir().expect("dir");
        let authority = Authority::create(dir.path()).expect("authority");
        let bind = |site: &str, kind| {
            let pending = PendingIdentity::make(&name(site), kind).expect("key");
            let der = authority.issue(pending.request(), &name(site), kind).expect("issue");
            let identity = pending.complete(&der, authority.certificate()).expect("identity");
            let (any, trust) = ("127.0.0.1:0".parse().expect("address"), authority.trust());
            let options = EndpointOptions::default();
            Endpoint::bind(any, identity, trust.clone(), options).expect("bind")
        };
        let cafe = bind("cafe", SiteKind::Ap);
        let at = cafe.local_address().expect("address");
        let neighbours = Arc::new(Neighbours::default());
        neighbours.reachable.set(at).expect("once");
        let (offers, here) = (Arc::clone(&neighbours), name("cafe"));
        tokio::spawn(async move {
            let text = |id: SubstrateId| id.to_string().into_bytes();
            take_links(&cafe, &offers, &here, |id| {
                let (near, mut far) = tokio::io::duplex(64);
                tokio::spawn(async move {
                    let _ = tokio::io::AsyncWriteExt::write_all(&mut far, &text(id)).await;
                });
                Box::pin(near)
            })
            .await;
        });
        // Even the center's certificate opens no link here: the site opens it.
        for (who, kind) in [("bar", SiteKind::Device), ("center", SiteKind::Center)] {
            // It may be closed before its opening is answered.
            let closed = match bind(who, kind).connect(at, None).await {
                Ok(link) => link.closed().await.to_string(),
                Err(error) => error.to_string(),
            };
            assert!(closed.contains("serves its center alone"), "{closed}");
        }
        let (one, other) = (SubstrateId::new(), SubstrateId::new());
        neighbours.offer(one, name("bar")).expect("reachable");
        neighbours.offer(other, name("baz")).expect("reachable");
        let bar = bind("bar", SiteKind::Ap);
        let link = bar.connect(at, Some(&name("cafe"))).await.expect("a link");
        let supplier = RemoteSite::new(link);
        let ask = |request| supplier.open(request);
        for request in [
            StreamRequest::SubstrateSupply { id: other },
            StreamRequest::SubstrateExport { id: one },
            StreamRequest::Display { vm: godwit_types::VmId::new() },
        ] {
            let refused = ask(request).await.map(drop).expect_err("refused");
            assert_eq!(refused.code, Code::Forbidden, "{refused:?}");
        }
        let mut got = String::new();
        let mut stream = ask(StreamRequest::SubstrateSupply { id: one }).await.expect("offered");
        stream.read_to_string(&mut got).await.expect("read");
        assert_eq!(got, one.to_string());
        drop(stream);
        let again = ask(StreamRequest::SubstrateSupply { id: one }).await.map(drop);
        assert_eq!(again.expect_err("once").code, Code::Forbidden);
        assert!((&supplier as &dyn SiteHost).machines().await.is_err(), "it is asked for streams");
    }
}
