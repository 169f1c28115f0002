//! Images, substrates and pools of the sites.

use std::sync::Arc;

use godwit_site::{Call, SiteHost, in_use, verbs};
use godwit_types::{Code, Fault, Name, SiteKind, SubstrateId};
use serde_json::json;

use super::authorize::allow;
use super::lifecycle::call_of;
use super::{Accepted, Accounts, Finder, Mode, Sites};
use crate::access::{Action, Object, Principal};
use crate::ops::OpKind;
use crate::ops::Ops;
use crate::registry::Registry;
use crate::registry::{VmRecord, registry_fault};

/// The images and pools of sites.
pub(crate) struct Pool {
    pub(super) registry: Arc<Registry>,
    pub(super) ops: Arc<Ops>,
    pub(super) sites: Arc<Sites>,
    pub(super) finder: Arc<Finder>,
    pub(super) accounts: Arc<Accounts>,
}

impl Pool {
    /// The center's own site.
    ///
    /// # Errors
    /// Unavailable when it is not attached.
    pub(crate) fn center(&self) -> Result<Name, Fault> {
        let sites = self.registry.sites().all().map_err(registry_fault)?;
        sites
            .into_iter()
            .find(|s| s.kind == SiteKind::Center)
            .map(|s| s.name)
            .ok_or_else(|| Fault::unavailable("the center's own site is not up"))
    }

    /// Builds an image at a site, the center when none is named.
    ///
    /// # Errors
    /// When the site is unknown or away.
    pub(crate) fn image_build(
        self: &Arc<Self>,
        who: &Principal,
        image: Name,
        site: Option<Name>,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        allow(who, Action::Create, &Object::Image, ("image", image.as_str()))?;
        let site = site.map_or_else(|| self.center(), Ok)?;
        let host = self.sites.host(&site)?;
        let plan = format!("build image '{image}' at {site}");
        let target = Some(image.to_string());
        if mode == Mode::DryRun {
            return Ok(Accepted { op: None, plan, target });
        }
        let kind = OpKind::ImageBuild { site, image: image.clone() };
        let op = self
            .ops
            .start(who, kind, |op| async move {
                let info = host.ask(verbs::ImageBuild { name: image }, call_of(&op)).await?;
                Ok(json!({ "image": info }))
            })
            .map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target })
    }

    /// Removes an image at a site, or at every site that is attached. Sites of one host share
    /// their images, so it is refused while a machine or a substrate anywhere uses it.
    ///
    /// # Errors
    /// Conflict while it is used; not found when none of the sites has it.
    pub(crate) async fn image_delete(
        &self,
        who: &Principal,
        image: &Name,
        site: Option<Name>,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        allow(who, Action::Change, &Object::Image, ("image", image.as_str()))?;
        let hosts = match &site {
            Some(s) => vec![self.sites.host(s)?],
            None => self.sites.hosts(),
        };
        let vms = self.registry.vms().map_err(registry_fault)?.into_iter();
        let substrates = self.registry.substrates().map_err(registry_fault)?.into_iter();
        let mut used: Vec<String> = vms
            .filter(|v| &v.image == image)
            .map(|v| format!("machine '{}'", v.name))
            .chain(
                substrates.filter(|s| &s.image == image).map(|s| format!("substrate '{}'", s.name)),
            )
            .collect();
        if !used.is_empty() {
            used.sort();
            return Err(in_use(image, &used));
        }
        let at: Vec<_> = hosts.iter().map(|h| h.name().as_str()).collect();
        let plan = format!("delete image '{image}' at {}", at.join(", "));
        let target = Some(image.to_string());
        if mode == Mode::DryRun {
            return Ok(Accepted { op: None, plan, target });
        }
        self.accounts.note_of_cloud(who, "image delete", image.as_str());
        let (mut removed, mut none) = (false, None);
        for host in hosts {
            let request = verbs::ImageDelete { name: image.clone() };
            match host.ask(request, Call::quiet()).await {
                Ok(()) => removed = true,
                Err(f) if f.code == Code::NotFound => none = Some(f),
                Err(f) => return Err(f),
            }
        }
        match none {
            Some(_) if !removed => {
                Err(Fault::not_found(format!("no site has image '{image}' built"))
                    .hint("see the images with: godwit image list"))
            }
            _ => Ok(Accepted { op: None, plan, target }),
        }
    }

    /// Removes a substrate from every site that holds it.
    ///
    /// # Errors
    /// Conflict while an environment needs it; unavailable while a holder is away.
    pub(crate) async fn substrate_delete(
        self: &Arc<Self>,
        who: &Principal,
        key: &str,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        let s = self.finder.substrate_for(who, Action::Change, key)?;
        let in_use =
            |by: &str| Fault::conflict(format!("substrate '{}' is in use by {by}", s.name));
        let vms = self.registry.vms().map_err(registry_fault)?;
        if let Some(vm) = vms.iter().find(|v| v.substrate == Some(s.id) && v.is_on_its_way()) {
            let by = self.finder.called_for(who, vm);
            return Err(
                in_use(&by).hint(format!("wait until {by} has come to rest: godwit op list"))
            );
        }
        let hosts =
            s.holders.iter().map(|n| self.sites.host(n)).collect::<Result<Vec<_>, Fault>>()?;
        for host in &hosts {
            let request = verbs::SubstrateUsers { id: s.id };
            if let Some(vm) = host.ask(request, Call::quiet()).await?.first() {
                // A site knows of no tenants: the one of that name that is here and was made of
                // this substrate is meant.
                let called = |v: &&VmRecord| {
                    v.name == *vm && v.site == *host.name() && v.substrate == Some(s.id)
                };
                let ours = vms.iter().filter(called).any(|v| who.lists(&v.tenant));
                if !ours && !who.is_operator() {
                    return Err(in_use("a machine of another tenant"));
                }
                return Err(in_use(&format!("machine '{vm}'"))
                    .hint(format!("delete that first: godwit vm delete {vm}")));
            }
        }
        let at: Vec<_> = s.holders.iter().map(Name::as_str).collect();
        let plan = format!("delete substrate '{}' at {}", s.name, at.join(", "));
        let target = Some(s.name.to_string());
        if mode == Mode::DryRun {
            return Ok(Accepted { op: None, plan, target });
        }
        self.accounts.note_begun(&who.at(&s.tenant), "substrate delete", s.name.as_str());
        let (me, who, id) = (self.clone(), who.clone(), s.id);
        // It comes to its end also when nobody waits for it any more.
        let deleted = tokio::spawn(async move { me.delete_at(&who, id, hosts).await });
        deleted.await.map_err(|e| Fault::internal(e.to_string()))??;
        Ok(Accepted { op: None, plan, target })
    }

    /// Removes a substrate from these sites, which are all that hold it, and forgets it.
    async fn delete_at(
        &self,
        who: &Principal,
        id: SubstrateId,
        hosts: Vec<Arc<dyn SiteHost>>,
    ) -> Result<(), Fault> {
        for host in hosts {
            match host.ask(verbs::SubstrateDelete { id }, Call::quiet()).await {
                Err(f) if f.code != Code::NotFound => return Err(f),
                _ => self
                    .registry
                    .substrate_holder(id, host.name(), false)
                    .map_err(registry_fault)?,
            }
        }
        self.registry.substrate_remove(who, id).map_err(registry_fault)
    }

    /// Checks a site's pool.
    ///
    /// # Errors
    /// When the site is unknown or away.
    pub(crate) fn pool_check(
        self: &Arc<Self>,
        who: &Principal,
        site: Name,
        mode: Mode,
    ) -> Result<Accepted, Fault> {
        allow(who, Action::Change, &Object::Cloud, ("site", site.as_str()))?;
        let host = self.sites.host(&site)?;
        let plan = format!("check the pool of {site}");
        let target = Some(site.to_string());
        if mode == Mode::DryRun {
            return Ok(Accepted { op: None, plan, target });
        }
        let kind = OpKind::PoolCheck { site };
        let op = self
            .ops
            .start(who, kind, |op| async move {
                let r = host.ask(verbs::PoolCheck {}, call_of(&op)).await?;
                if r.damaged.is_empty() {
                    return Ok(json!({ "check": r }));
                }
                Err(Fault::new(
                    Code::Damaged,
                    format!(
                        "{} found damaged, {} units read: {}",
                        r.damaged.len(),
                        r.units,
                        r.damaged.join("; ")
                    ),
                )
                .hint(
                    "what is made again mends itself; delete substrates with damaged units and \
                     import them again; build damaged images again",
                ))
            })
            .map_err(registry_fault)?;
        Ok(Accepted { op: Some(op), plan, target })
    }
}
