//! Tenants, users and tokens, as principals may see and change them.

use std::time::Instant;

use godwit_types::{Code, Fault, Name, UnixMs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Finder;
use super::authorize::{allow, unseen};
use super::refusals::Refusals;
use crate::access::{Action, Object, Principal, Role, may};
use crate::registry::Registry;
use crate::registry::audit::Note;
use crate::registry::{
    AuditEnd, AuditEntry, Drawn, Quota, SubstrateRecord, TenantQuota, TenantRecord, TokenInfo,
    TokenRecord, UserRecord, registry_fault,
};
use std::sync::Arc;

/// A tenant to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTenant {
    /// Its name.
    pub name: Name,
}

/// A user to be made, in the tenant of the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewUser {
    /// Its name.
    pub name: Name,
    /// What it is to be; a member when left out.
    pub role: Option<Role>,
}

/// A token to be made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewApiToken {
    /// Its user, of the tenant of the request; whoever asks when left out.
    pub user: Option<Name>,
    /// What it allows, no more than its user may; all of that when left out.
    pub role: Option<Role>,
    /// How long it is good, in seconds; until it is removed when left out.
    pub lifetime_s: Option<u64>,
}

/// A new token, and its text, which is told once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiToken {
    /// What is kept of it.
    #[serde(flatten)]
    pub info: TokenInfo,
    /// What a client shows: `Authorization: Bearer TEXT`.
    pub token: String,
}

impl std::fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiToken").field("info", &self.info).finish_non_exhaustive()
    }
}

/// The longest life of a token with an end, in seconds: ten years.
const MAX_LIFETIME_S: u64 = 10 * 365 * 86_400;

/// Tenants, users, tokens and quotas, and the log of what was done.
pub(crate) struct Accounts {
    pub(super) registry: Arc<Registry>,
    pub(super) finder: Arc<Finder>,
    /// The recent ones.
    pub(super) refusals: Refusals,
}

impl Accounts {
    /// The tenants that are there for `who`.
    #[must_use]
    pub(crate) fn tenants_for(&self, who: &Principal) -> Vec<TenantRecord> {
        let mut all = self.registry.people().tenants();
        all.retain(|t| may(who, Action::See, &Object::Tenant { name: &t.name }).is_ok());
        all
    }

    /// Makes a tenant.
    ///
    /// # Errors
    /// Forbidden, exists.
    pub(crate) fn tenant_create(
        &self,
        who: &Principal,
        new: NewTenant,
    ) -> Result<TenantRecord, Fault> {
        // Whether there is one is not told: only an operator may, or may not.
        allow(who, Action::Create, &Object::Tenant { name: &who.tenant }, ("tenant", ""))?;
        self.registry.people().tenant_add(who, &TenantRecord::new(new.name)).map_err(registry_fault)
    }

    /// Removes a tenant that has nothing and nobody any more.
    ///
    /// # Errors
    /// Forbidden, not found; conflict that says what it still has.
    pub(crate) fn tenant_delete(&self, who: &Principal, name: &Name) -> Result<(), Fault> {
        allow(who, Action::Change, &Object::Tenant { name }, ("tenant", name.as_str()))?;
        self.registry.people().tenant_remove(who, name).map_err(registry_fault)
    }

    /// How much a tenant may have, and has.
    ///
    /// # Errors
    /// Not found.
    pub(crate) fn quota(&self, who: &Principal, name: &Name) -> Result<TenantQuota, Fault> {
        allow(who, Action::See, &Object::Tenant { name }, ("tenant", name.as_str()))?;
        self.registry.quotas().of(name).map_err(registry_fault)
    }

    /// Sets how much a tenant may have.
    ///
    /// # Errors
    /// Forbidden, not found.
    pub(crate) fn quota_set(
        &self,
        who: &Principal,
        name: &Name,
        quota: Quota,
    ) -> Result<TenantQuota, Fault> {
        allow(who, Action::Change, &Object::Tenant { name }, ("tenant", name.as_str()))?;
        self.registry.quotas().set(who, name, quota).map_err(registry_fault)?;
        self.registry.quotas().of(name).map_err(registry_fault)
    }

    /// Lets another tenant use a restricted substrate, or no longer.
    ///
    /// # Errors
    /// Forbidden, not found; conflict for a substrate that is not restricted.
    pub(crate) fn grant(
        &self,
        who: &Principal,
        key: &str,
        tenant: &Name,
        may: bool,
    ) -> Result<SubstrateRecord, Fault> {
        let s = self.finder.substrate_for(who, Action::Change, key)?;
        self.registry.substrate_grant(who, s.id, tenant, may).map_err(registry_fault)
    }

    /// The newest entries of the audit log that are there for `who`, at most `limit`, oldest first;
    /// of those before the entry number `before`, if that is named.
    ///
    /// # Errors
    /// Forbidden; when the registry fails.
    pub(crate) fn audit_for(
        &self,
        who: &Principal,
        limit: usize,
        before: Option<u64>,
    ) -> Result<Vec<AuditEntry>, Fault> {
        let own = Object::Audit { tenant: &who.tenant };
        allow(who, Action::See, &own, ("tenant", who.tenant.as_str()))?;
        let there = |e: &AuditEntry| who.lists(&e.tenant) && (who.is_operator() || !e.cloud);
        let from = match who.is_operator() {
            true => 0,
            false => self.registry.people().tenant(&who.tenant).map_err(registry_fault)?.audit_from,
        };
        self.registry.audit().entries_before(limit, from, before, there).map_err(registry_fault)
    }

    /// Reads the whole audit log and tells where it ends.
    ///
    /// # Errors
    /// Forbidden; damaged, with the number of the entry.
    pub(crate) fn audit_verify(&self, who: &Principal) -> Result<AuditEnd, Fault> {
        allow(who, Action::See, &Object::Cloud, ("site", ""))?;
        self.registry.audit().verify().map_err(registry_fault)
    }

    /// Writes into the audit log what changed nothing in the registry. What was done is done: a
    /// log that cannot be written is told of in the daemon's own.
    pub(crate) fn note(&self, who: &Principal, action: &str, object: &str) {
        self.enter(Note::of(who, action, object));
    }

    /// As [`Accounts::note`], of what is about to be done: whoever hangs up meanwhile is in the log.
    pub(crate) fn note_begun(&self, who: &Principal, action: &str, object: &str) {
        self.enter(Note { outcome: "begun", ..Note::of(who, action, object) });
    }

    /// As [`Accounts::note`], of what concerns the cloud as a whole.
    pub(crate) fn note_of_cloud(&self, who: &Principal, action: &str, object: &str) {
        self.enter(Note::of_cloud(who, action, object));
    }

    /// As [`Accounts::note`], of a substrate that `who` uses: its tenant finds it in its log too.
    pub(crate) fn note_substrate(&self, who: &Principal, action: &str, s: &SubstrateRecord) {
        self.note(who, action, s.name.as_str());
        if s.tenant != who.tenant {
            let object = format!("{} by a user of tenant {}", s.name, who.tenant);
            self.enter(Note { tenant: &s.tenant, ..Note::of(who, action, &object) });
        }
    }

    /// As [`Accounts::note`], of what was refused. Equal ones are entered once a minute.
    pub(crate) fn note_refused(&self, who: &Principal, object: &str) {
        let admitted = self.refusals.admit(&who.id, who.by.as_ref(), object, Instant::now());
        let Some(left_out) = admitted else { return };
        let outcome = match left_out {
            0 => "forbidden".to_owned(),
            n => format!("forbidden, as {n} requests before that are not listed"),
        };
        self.enter(Note { outcome: &outcome, ..Note::of(who, "request", object) });
    }

    fn enter(&self, note: Note<'_>) {
        let Note { user, action, object, .. } = note;
        if let Err(error) = self.registry.audit().note(note) {
            let error = godwit_types::chain(&error);
            tracing::error!(%user, action, object, %error, "not in the audit log");
        }
    }

    /// The users that are there for `who`, by tenant and name.
    #[must_use]
    pub(crate) fn users_for(&self, who: &Principal) -> Vec<UserRecord> {
        let mut all = self.registry.people().users();
        all.retain(|u| {
            let object = Object::User { tenant: &u.tenant, role: u.role };
            who.lists(&u.tenant) && may(who, Action::See, &object).is_ok()
        });
        all.sort_by(|a, b| (&a.tenant, &a.name).cmp(&(&b.tenant, &b.name)));
        all
    }

    /// Makes a user in the tenant of `who`.
    ///
    /// # Errors
    /// Forbidden, exists.
    pub(crate) fn user_create(&self, who: &Principal, new: NewUser) -> Result<UserRecord, Fault> {
        let (tenant, role) = (&who.tenant, new.role.unwrap_or(Role::Member));
        allow(who, Action::Create, &Object::User { tenant, role }, ("user", new.name.as_str()))?;
        if role == Role::Operator && *tenant != crate::access::default_tenant() {
            return Err(Fault::invalid("operators are users of tenant 'default'"));
        }
        self.registry.people().user_add(who, tenant, &new.name, role).map_err(registry_fault)
    }

    /// A user by name, or `TENANT/NAME`, if `who` may do `action` with it.
    fn user_for(&self, who: &Principal, action: Action, key: &str) -> Result<UserRecord, Fault> {
        let unseen = || unseen("user", key);
        let (tenant, name) = crate::registry::full_name(&who.tenant, key).ok_or_else(unseen)?;
        let user = self.registry.people().user(&tenant, &name).map_err(|_| unseen())?;
        let object = Object::User { tenant: &user.tenant, role: user.role };
        allow(who, action, &object, ("user", key))?;
        Ok(user)
    }

    /// Removes a user and its tokens.
    ///
    /// # Errors
    /// Forbidden, not found; conflict while it has a private substrate.
    pub(crate) fn user_delete(&self, who: &Principal, key: &str) -> Result<(), Fault> {
        let user = self.user_for(who, Action::Change, key)?;
        self.registry.people().user_remove(who, &user.tenant, &user.name).map_err(registry_fault)
    }

    /// The tokens that are there for `who`, without their secrets.
    #[must_use]
    pub(crate) fn tokens_for(&self, who: &Principal) -> Vec<TokenInfo> {
        let mut all = self.registry.people().tokens();
        all.retain(|t| {
            let object = Object::Token { tenant: &t.tenant, user: &t.user, role: t.role };
            who.lists(&t.tenant) && may(who, Action::See, &object).is_ok()
        });
        all.sort_by(|a, b| (&a.tenant, &a.user, &a.id).cmp(&(&b.tenant, &b.user, &b.id)));
        all
    }

    /// Makes a token.
    ///
    /// # Errors
    /// Forbidden, not found; invalid for more than its user may.
    pub(crate) fn token_create(
        &self,
        who: &Principal,
        new: NewApiToken,
    ) -> Result<ApiToken, Fault> {
        // The user who asks may itself be here by a token for less, and act in another tenant.
        let myself = self.registry.people().user_of(&who.id);
        let (of, me) = myself.ok_or_else(|| unseen("user", who.user.as_str()))?;
        let (id, tenant, user, of_user) = match new.user {
            Some(name) if (&who.tenant, &name) != (&of, &me) => {
                let user = self.user_for(who, Action::See, name.as_str())?;
                (user.id, user.tenant, user.name, user.role)
            }
            _ => (who.id.clone(), of, me, who.role),
        };
        let role = new.role.unwrap_or(of_user);
        let object = Object::Token { tenant: &tenant, user: &user, role };
        allow(who, Action::Create, &object, ("user", user.as_str()))?;
        if role > of_user {
            let words = format!("user '{user}' is {of_user}: its tokens allow no more");
            return Err(Fault::new(Code::Invalid, words));
        }
        let lifetime = new.lifetime_s;
        if lifetime.is_some_and(|s| !(1..=MAX_LIFETIME_S).contains(&s)) {
            return Err(Fault::invalid("a token is good for 1 s to 10 years, or without end"));
        }
        let now = UnixMs::now().0;
        let expires = lifetime.map(|s| UnixMs(now.saturating_add(s * 1000)));
        // What comes of a token that ends lives no longer.
        let expires = match (expires, who.until) {
            (Some(end), Some(until)) => Some(end.min(until)),
            (end, until) => end.or(until),
        };
        let made_by = (id != who.id).then(|| who.user.clone());
        let Drawn { record, text } = Drawn::new(id, role, expires);
        let record = TokenRecord { made_by, ..record };
        self.registry.people().token_add(who, &record).map_err(registry_fault)?;
        let (created, made_by) = (record.created, record.made_by);
        let info = TokenInfo { id: record.id, tenant, user, role, created, expires, made_by };
        Ok(ApiToken { info, token: text })
    }

    /// Removes a token: it is good for nothing from now on.
    ///
    /// # Errors
    /// Forbidden, not found.
    pub(crate) fn token_delete(&self, who: &Principal, id: &str) -> Result<(), Fault> {
        let t = self.registry.people().token(id).map_err(|_| unseen("token", id))?;
        let object = Object::Token { tenant: &t.tenant, user: &t.user, role: t.role };
        allow(who, Action::Change, &object, ("token", id))?;
        self.registry.people().token_remove(who, &t.id).map_err(registry_fault)
    }
}
