//! A substrate from one site to another: straight where the taker reaches the supplier, else by way
//! of the center.

use std::sync::Arc;
use std::time::Duration;

use godwit_site::exchange::{Bring, Failed, is_break};
use godwit_site::verbs::{Request, SubstrateFetch, SubstrateOffer};
use godwit_site::{ByteStream, Call, SiteHost, StreamRequest, SubstrateInfo, TakeAmong};
use godwit_types::{Fault, Name, SiteKind, SubstrateId};
use tokio::time::Instant;

use super::Exchange;
use super::ask::within;
use super::lifecycle::call_of;
use crate::ops::OpHandle;
use crate::registry::{SubstrateRecord, registry_fault};

/// How often one bring goes on after a break.
const BREAKS: usize = 5;

/// How long a taker may take to hear that a bring is given up.
const HEARD: Duration = Duration::from_secs(5);

/// How long a site that was lost in the midst of a bring may stay away.
const AWAY: Duration = Duration::from_secs(60);

impl Exchange {
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
        // The same for every try: what came of one is of use to the next.
        let among = self.readable_with(s, to)?;
        let bring = Bring { name: &s.name, from, to, call: &call };
        let mut breaks = 0;
        let mut patience = Duration::ZERO;
        let given_up = async {
            call.cancel.cancelled().await;
            tokio::time::sleep(HEARD).await;
        };
        let straight = tokio::select! {
            straight = self.straight(&call, s, (from, to), &among) => straight,
            () = given_up => return Err(Fault::cancelled()),
        };
        match straight {
            Some(Ok(info)) => return Ok(info),
            Some(Err(f)) if !is_break(&f) => return Err(f),
            // What came is kept at the taker.
            Some(Err(f)) => {
                breaks += 1;
                patience = AWAY;
                tracing::info!(substrate = %s.name, %from, %to, error = %f, "brought by way of the center");
            }
            None => {}
        }
        loop {
            let ends = tokio::select! {
                ends = self.ends(s, (from, to), &among, patience) => ends?,
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
        (from, to): (&Name, &Name),
        among: &[SubstrateId],
    ) -> Option<Result<SubstrateInfo, Fault>> {
        let own =
            |name: &Name| self.registry.sites().get(name).is_ok_and(|s| s.kind == SiteKind::Center);
        let able = |name: &Name| -> Option<Arc<dyn SiteHost>> {
            self.sites
                .host(name)
                .ok()
                .filter(|host| !own(name) && host.speaks() >= SubstrateFetch::SINCE)
        };
        let (src, dst) = (able(from)?, able(to)?);
        let offer = SubstrateOffer { id: s.id, to: to.clone() };
        let address = match within(from, src.ask(offer, Call::quiet())).await {
            Ok(address) => address?,
            Err(f) => return Some(Err(f)),
        };
        let (name, content, among) = (s.name.clone(), s.content, among.to_vec());
        let from = from.clone();
        let fetch = SubstrateFetch { id: s.id, name, content, among, from, address };
        Some(dst.ask(fetch, call.clone()).await)
    }

    /// The streams of supplier and taker, waiting at most `patience` for a site that is away.
    async fn ends(
        &self,
        s: &SubstrateRecord,
        (from, to): (&Name, &Name),
        among: &[SubstrateId],
        patience: Duration,
    ) -> Result<(ByteStream, ByteStream), Fault> {
        let until = Instant::now() + patience;
        let mut changes = self.sites.changes.subscribe();
        loop {
            let open = async {
                let supply = StreamRequest::SubstrateSupply { id: s.id };
                let out = self.sites.host(from)?.open(supply).await?;
                let taker = self.sites.host(to)?;
                let take = self.take_of(&*taker, s, among)?;
                Ok((out, taker.open(take).await?))
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

impl Exchange {
    /// The substrates at a site whose contents whoever may use `s` may read in any case.
    fn readable_with(&self, s: &SubstrateRecord, at: &Name) -> Result<Vec<SubstrateId>, Fault> {
        let all = self.registry.substrates().map_err(registry_fault)?;
        let there = all.iter().filter(|o| o.holders.contains(at) && o.is_read_by_all_of(s));
        Ok(there.map(|o| o.id).collect())
    }

    /// How a taker is asked. One that is too old to be told whose units it may use is asked only
    /// where there is one tenant.
    fn take_of(
        &self,
        taker: &dyn SiteHost,
        s: &SubstrateRecord,
        among: &[SubstrateId],
    ) -> Result<StreamRequest, Fault> {
        let content = s.content;
        let among = StreamRequest::SubstrateTakeAmong(TakeAmong { content, among: among.to_vec() });
        if taker.speaks() >= among.since() {
            return Ok(among);
        }
        if self.registry.people().tenants().len() <= 1 {
            return Ok(StreamRequest::SubstrateTake { content });
        }
        let (site, speaks) = (taker.name(), taker.speaks());
        Err(Fault::conflict(format!(
            "site '{site}' speaks protocol {speaks}, and '{}', which keeps the pages of tenants \
             apart, needs {}",
            among.name(),
            among.since()
        ))
        .hint(format!("update '{site}'")))
    }
}
