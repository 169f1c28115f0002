//! A substrate from one site to another: straight where the taker reaches the supplier, else by way
//! of the center.

use std::sync::Arc;
use std::time::Duration;

use godwit_site::exchange::{Bring, Failed, is_break};
use godwit_site::verbs::{Request, SubstrateFetch, SubstrateOffer};
use godwit_site::{ByteStream, Call, SiteHost, StreamRequest, SubstrateInfo};
use godwit_types::{Fault, Name, SiteKind};
use tokio::time::Instant;

use super::Controller;
use super::lifecycle::call_of;
use crate::ops::OpHandle;
use crate::registry::SubstrateRecord;

/// How often one bring goes on after a break.
const BREAKS: usize = 5;

/// How long a site that was lost in the midst of a bring may stay away.
const AWAY: Duration = Duration::from_secs(60);

impl Controller {
    /// Brings a substrate from one site to another, going on where it stopped when a link breaks
    /// and comes back.
    pub(super) async fn carry(
        &self,
        op: &OpHandle,
        s: &SubstrateRecord,
        from: &Name,
        to: &Name,
    ) -> Result<SubstrateInfo, Fault> {
        let call = call_of(op);
        match self.straight(&call, s, from, to).await {
            Some(Ok(info)) => return Ok(info),
            Some(Err(f)) if !is_break(&f) => return Err(f),
            // What came is kept at the taker.
            Some(Err(f)) => {
                tracing::info!(substrate = %s.name, %from, %to, error = %f, "brought by way of the center");
            }
            None => {}
        }
        let bring = Bring { name: &s.name, from, to, call: &call };
        let mut breaks = 0;
        let mut patience = Duration::ZERO;
        loop {
            let ends = tokio::select! {
                ends = self.ends(s, (from, to), patience) => ends?,
                () = call.cancel.cancelled() => return Err(Fault::cancelled()),
            };
            match bring.run(ends).await {
                Ok(info) => return Ok(info),
                Err(Failed::Broken(f)) if breaks < BREAKS => {
                    breaks += 1;
                    patience = AWAY;
                    tracing::warn!(substrate = %s.name, %from, %to, error = %f, "a bring broke off; it goes on");
                    bring.show(0, 0, format!("the link broke; waiting for {from} and {to}"));
                }
                Err(Failed::Broken(f) | Failed::For(f)) => return Err(f),
            }
        }
    }

    /// Has the taker fetch a substrate from its supplier; `None` where that is no shorter way, or one
    /// of them is of a release that does not know how.
    async fn straight(
        &self,
        call: &Call,
        s: &SubstrateRecord,
        from: &Name,
        to: &Name,
    ) -> Option<Result<SubstrateInfo, Fault>> {
        let own = |name: &Name| self.registry.site(name).is_ok_and(|s| s.kind == SiteKind::Center);
        let able = |name: &Name| -> Option<Arc<dyn SiteHost>> {
            self.host(name).ok().filter(|host| !own(name) && host.speaks() >= SubstrateFetch::SINCE)
        };
        let (src, dst) = (able(from)?, able(to)?);
        let offer = SubstrateOffer { id: s.id, to: to.clone() };
        let address = match src.ask(offer, Call::quiet()).await {
            Ok(address) => address?,
            Err(f) => return Some(Err(f)),
        };
        let (name, from) = (s.name.clone(), from.clone());
        let fetch = SubstrateFetch { id: s.id, name, content: s.content, from, address };
        Some(dst.ask(fetch, call.clone()).await)
    }

    /// The streams of supplier and taker, waiting at most `patience` for a site that is away.
    async fn ends(
        &self,
        s: &SubstrateRecord,
        (from, to): (&Name, &Name),
        patience: Duration,
    ) -> Result<(ByteStream, ByteStream), Fault> {
        let until = Instant::now() + patience;
        let mut changes = self.sites.changes.subscribe();
        loop {
            let open = async {
                let supply = StreamRequest::SubstrateSupply { id: s.id };
                let out = self.host(from)?.open(supply).await?;
                let take = StreamRequest::SubstrateTake { content: s.content };
                Ok((out, self.host(to)?.open(take).await?))
            };
            match open.await {
                Err(f) if is_break(&f) => {
                    match tokio::time::timeout_at(until, changes.changed()).await {
                        Ok(Ok(())) => {}
                        _ => return Err(f),
                    }
                }
                ends => return ends,
            }
        }
    }
}
