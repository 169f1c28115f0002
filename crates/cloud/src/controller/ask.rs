//! Questions to several sites at once: one that does not answer holds up nobody else.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use godwit_site::{Call, ImageInfo, SiteHost, verbs};
use godwit_types::{Code, Fault, Name, UnixMs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Controller, Sites};
use crate::clock::Moment;
use crate::placement::{Demand, Placement, PlacementRefusal, Unfit, place};
use crate::registry::{SubstrateRecord, registry_fault};

/// How long a site may take to tell what it has when several are asked.
pub const ANSWER_WITHIN: Duration = Duration::from_millis(if cfg!(test) { 300 } else { 3000 });

/// A site that gave no answer, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unanswered {
    /// The site.
    pub site: Name,
    /// What kept it from answering.
    pub error: Fault,
}

/// What several sites answered.
#[derive(Debug)]
pub(crate) struct Answers<T> {
    /// The answers, by the sites' names.
    pub(crate) answers: Vec<(Name, T)>,
    /// The sites that gave none.
    pub(crate) unanswered: Vec<Unanswered>,
}

/// Asks each host at the same time, each with its own limit.
pub(crate) async fn ask_all<T, F>(
    hosts: Vec<Arc<dyn SiteHost>>,
    ask: impl Fn(Arc<dyn SiteHost>) -> F,
) -> Answers<T>
where
    F: Future<Output = Result<T, Fault>>,
{
    let asked = hosts.into_iter().map(|host| {
        let name = host.name().clone();
        let answer = ask(host);
        async move { (within(&name, answer).await, name) }
    });
    let mut all = Answers { answers: Vec::new(), unanswered: Vec::new() };
    for (answer, site) in futures::future::join_all(asked).await {
        match answer {
            Ok(answer) => all.answers.push((site, answer)),
            Err(error) => {
                tracing::debug!(%site, %error, "no answer");
                all.unanswered.push(Unanswered { site, error });
            }
        }
    }
    all
}

/// An answer of `site`, or that it does not answer.
pub(super) async fn within<T>(
    site: &Name,
    answer: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    let answer = tokio::time::timeout(ANSWER_WITHIN, answer).await;
    answer.unwrap_or_else(|_| {
        Err(Fault::unavailable(format!("site '{site}' does not answer"))
            .hint("is its daemon running? see: godwit site list"))
    })
}

impl Sites {
    /// Finds an image at any attached site: as the first that has it tells.
    ///
    /// # Errors
    /// Not found; conflict when only its recipe is known.
    pub(crate) async fn image(&self, name: &Name) -> Result<ImageInfo, Fault> {
        let mut asked: FuturesUnordered<_> =
            self.hosts()
                .into_iter()
                .map(|host| async move {
                    (within(host.name(), host.images()).await, host.name().clone())
                })
                .collect();
        let (mut recipe, mut silent) = (None::<ImageInfo>, None);
        while let Some((answer, site)) = asked.next().await {
            match answer {
                Ok(all) => {
                    for i in all.into_iter().filter(|i| &i.name == name) {
                        if i.built {
                            return Ok(i);
                        }
                        // What is wrong with it says more than that it is not built.
                        if recipe.as_ref().is_none_or(|r| r.fault.is_none()) {
                            recipe = Some(i);
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(%site, %error, "images not listed");
                    silent = Some(site);
                }
            }
        }
        let fault = match recipe {
            Some(ImageInfo { fault: Some(why), .. }) => {
                return Err(Fault::new(
                    Code::Damaged,
                    format!("image '{name}' cannot be used: {why}"),
                )
                .hint(format!("build it again: godwit image build {name}")));
            }
            Some(_) => Fault::conflict(format!("image '{name}' has not been built"))
                .hint(format!("build it with: godwit image build {name}")),
            None => Fault::not_found(format!("no image '{name}'"))
                .hint("see the images with: godwit image list"),
        };
        Err(match silent {
            Some(site) => Fault {
                message: format!("{}; site '{site}' does not answer", fault.message),
                ..fault
            },
            None => fault,
        })
    }

    /// Chooses a site for `demand`. `held` is the substrate that it starts from, if it does.
    pub(super) fn choose(
        &self,
        demand: &Demand,
        held: Option<&SubstrateRecord>,
    ) -> Result<Placement, Fault> {
        let mut sites = self.registry.sites().all().map_err(registry_fault)?;
        // What was docked or brought a moment ago is in no report yet.
        if let Some(s) = held {
            for site in sites.iter_mut().filter(|site| s.holders.contains(&site.name)) {
                site.report.substrates.insert(s.id);
            }
        }
        place(demand, &sites, UnixMs::now()).map_err(|refusal| {
            // Of the one site that was asked for, more is known than that it does not answer.
            if let (Some(only), PlacementRefusal::NoneFits(why)) = (&demand.only, &refusal)
                && matches!(why.as_slice(), [(_, Unfit::Unreachable)])
                && let Err(fault) = self.host(only)
            {
                return fault;
            }
            let fault = Fault::of(&refusal);
            match refusal.hint() {
                Some(h) => fault.hint(h),
                None => fault,
            }
        })
    }
}

impl Controller {
    /// Looks whether a site answers at all, and takes it for unreachable when it does not, until
    /// its next report. A host that another one has replaced says nothing of the site.
    pub(super) async fn check_answers(&self, host: &Arc<dyn SiteHost>) {
        let asked = Moment::now();
        let ping = host.ask(verbs::Ping {}, Call::quiet());
        // Whatever it answers, it answers.
        if tokio::time::timeout(ANSWER_WITHIN, ping).await.is_err()
            && self.sites.is_attached(host)
            && self.registry.sites().silent(host.name(), asked)
        {
            tracing::warn!(site = %host.name(), "does not answer");
        }
    }
}
