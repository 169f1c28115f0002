//! Tenants, their users, and the tokens by which users reach the API.
//!
//! ```text
//! token text:  gwu-ID-SECRET-CHECK     ID 16 hex digits, SECRET 64, CHECK 8
//! kept of it:  ID, BLAKE3 of the whole text, whose it is, what it allows, until when
//! ```
//!
//! The secret is drawn here and told once. 256 random bits need no slow hash.

use std::sync::Arc;

use godwit_types::{Hash, Name, SubstrateKind, UnixMs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::audit::Note;
use super::file::File;
use super::tables::{Change, PeopleTables, Tables};
use super::{RegistryError, Result, missing};
use crate::principal::{DEFAULT_TENANT, OPERATOR, Principal, Role, default_tenant, operator};
use crate::token::{USER_TOKEN, checked};

pub use super::rows::{TenantRecord, TokenRecord, UserRecord};

/// Tokens that one user may have at once.
pub const MAX_TOKENS: usize = 100;

/// A token for people to see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenInfo {
    /// Which: 16 hex digits.
    pub id: String,
    /// The tenant of its user.
    pub tenant: Name,
    /// Its user.
    pub user: Name,
    /// What it allows.
    pub role: Role,
    /// When it was made.
    pub created: UnixMs,
    /// Its end, if it has one.
    pub expires: Option<UnixMs>,
    /// Who made it, if that was somebody else: such a one may have kept it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_by: Option<Name>,
}

/// A new token, and its text, which is told once.
#[derive(Clone, PartialEq, Eq)]
pub struct Drawn {
    /// What is kept.
    pub record: TokenRecord,
    /// What its user needs.
    pub text: String,
}

impl std::fmt::Debug for Drawn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drawn").field("id", &self.record.id).finish_non_exhaustive()
    }
}

impl Drawn {
    /// Draws a token for the user with this id.
    #[must_use]
    pub fn new(user: Name, role: Role, expires: Option<UnixMs>) -> Self {
        let id = hex::encode(rand::random::<[u8; 8]>());
        let text = format!("{USER_TOKEN}{id}-{}", hex::encode(rand::random::<[u8; 32]>()));
        let text = checked(&text);
        let hash = Hash::of(text.as_bytes());
        let (created, made_by) = (UnixMs::now(), None);
        let record = TokenRecord { id, user, role, created, expires, hash, made_by };
        Self { record, text }
    }
}

/// An id for a user: a name, as sites and substrates have owners.
fn user_id() -> Name {
    let text = format!("u-{}", hex::encode(rand::random::<[u8; 16]>()));
    Name::new(&text).unwrap_or_else(|_| unreachable!("34 characters of a-z, 0-9 and '-'"))
}

fn busy(words: String) -> RegistryError {
    RegistryError::Busy(words)
}

impl PeopleTables {
    /// A user by its tenant and name.
    fn user_named(&self, tenant: &Name, name: &Name) -> Option<&Arc<UserRecord>> {
        self.users.values().find(|u| u.tenant == *tenant && u.name == *name)
    }

    /// Tenant and name of the user with this id.
    fn user_of(&self, id: &Name) -> Option<(Name, Name)> {
        if id.as_str() == OPERATOR {
            return Some((default_tenant(), operator()));
        }
        self.users.get(id).map(|u| (u.tenant.clone(), u.name.clone()))
    }

    fn token_info(&self, t: &TokenRecord) -> Option<TokenInfo> {
        let (tenant, user) = self.user_of(&t.user)?;
        let (id, role, created, expires) = (t.id.clone(), t.role, t.created, t.expires);
        let made_by = t.made_by.clone();
        Some(TokenInfo { id, tenant, user, role, created, expires, made_by })
    }
}

impl Tables {
    /// What a user has that is nobody else's.
    fn private_of(&self, tenant: &Name, user: &Name) -> Option<String> {
        let private = |s: &&Arc<super::SubstrateRecord>| {
            s.kind == SubstrateKind::Private && (&s.tenant, &s.owner) == (tenant, user)
        };
        let machine =
            |v: &&Arc<super::VmRecord>| v.tenant == *tenant && v.private_of.as_ref() == Some(user);
        let machines = || self.vms.values().map(|e| &e.vm);
        let substrate = self.substrates.values().find(private);
        substrate
            .map(|s| format!("substrate '{}'", s.name))
            .or_else(|| machines().find(machine).map(|v| format!("machine '{}'", v.name)))
    }

    /// Refuses what would belong to a tenant that is not there.
    pub(super) fn has_tenant(&self, name: &Name) -> Result<()> {
        match self.people.tenants.contains_key(name) {
            true => Ok(()),
            false => Err(missing("tenant", name)),
        }
    }
}

/// The people of a registry. What they have is asked and changed in the same transaction.
#[derive(Debug)]
pub struct People {
    file: Arc<File>,
}

impl People {
    pub(super) const fn new(file: Arc<File>) -> Self {
        Self { file }
    }

    /// All tenants.
    #[must_use]
    pub fn tenants(&self) -> Vec<TenantRecord> {
        self.file.read(|t| t.people.tenants.values().map(|r| TenantRecord::clone(r)).collect())
    }

    /// Whether there is such a tenant.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn tenant(&self, name: &Name) -> Result<TenantRecord> {
        self.file.read(|t| {
            t.people
                .tenants
                .get(name)
                .map(|r| TenantRecord::clone(r))
                .ok_or_else(|| missing("tenant", name))
        })
    }

    /// Enters a tenant.
    ///
    /// # Errors
    /// [`RegistryError::Exists`].
    pub fn tenant_add(&self, who: &Principal, tenant: &TenantRecord) -> Result<TenantRecord> {
        self.file.write(|t, changes| {
            let name = &tenant.name;
            if t.people.tenants.contains_key(name) {
                return Err(RegistryError::Exists { what: "tenant", key: name.to_string() });
            }
            let tenant = TenantRecord { audit_from: t.audit.entries + 1, ..tenant.clone() };
            let note = Note::of(who, "tenant create", name.as_str());
            changes.push(t.audited(Note { tenant: name, ..note }));
            changes.push(Change::Tenant(name.clone(), Some(Arc::new(tenant.clone()))));
            changes.push(Tables::default_network(name));
            Ok(tenant)
        })
    }

    /// Forgets a tenant that has nothing and nobody any more, with its operations and with what was
    /// granted to it.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] that says what it still has.
    pub fn tenant_remove(&self, who: &Principal, name: &Name) -> Result<()> {
        self.file.write(|t, changes| {
            t.has_tenant(name)?;
            if name.as_str() == DEFAULT_TENANT {
                return Err(busy(format!("tenant '{name}' is there as long as the cloud")));
            }
            let has = |what: &str, which: &dyn std::fmt::Display| {
                Err(busy(format!("tenant '{name}' still has {what} '{which}'")))
            };
            if let Some(e) = t.vms.values().find(|e| e.vm.tenant == *name) {
                return has("machine", &e.vm.name);
            }
            if let Some(s) = t.substrates.values().find(|s| s.tenant == *name) {
                return has("substrate", &s.name);
            }
            if let Some(u) = t.people.users.values().find(|u| u.tenant == *name) {
                return has("user", &u.name);
            }
            let ops = || t.ops.values().filter(|o| o.tenant == *name);
            if let Some(op) = ops().find(|o| !o.state.is_final()) {
                return has("operation", &op.id);
            }
            // Who is called the same later has nothing to do with this one.
            changes.extend(ops().map(|op| Change::Op(op.id, None)));
            for s in t.substrates.values().filter(|s| s.granted.contains(name)) {
                let mut s = super::SubstrateRecord::clone(s);
                s.granted.remove(name);
                changes.push(Change::Substrate(s.id, Some(Arc::new(s))));
            }
            let note = Note::of(who, "tenant delete", name.as_str());
            changes.push(t.audited(Note { tenant: name, ..note }));
            changes.extend(t.forget_networks(name));
            changes.push(Change::Tenant(name.clone(), None));
            Ok(())
        })
    }

    /// All users.
    #[must_use]
    pub fn users(&self) -> Vec<UserRecord> {
        self.file.read(|t| t.people.users.values().map(|r| UserRecord::clone(r)).collect())
    }

    /// A user by its tenant and name.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn user(&self, tenant: &Name, name: &Name) -> Result<UserRecord> {
        self.file.read(|t| {
            let user = t.people.user_named(tenant, name).ok_or_else(|| missing("user", name))?;
            Ok(UserRecord::clone(user))
        })
    }

    /// Tenant and name of the user with this id, as substrates at sites have it.
    #[must_use]
    pub fn user_of(&self, id: &Name) -> Option<(Name, Name)> {
        self.file.read(|t| t.people.user_of(id))
    }

    /// Enters a user.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] without its tenant; [`RegistryError::Exists`].
    pub fn user_add(
        &self,
        who: &Principal,
        tenant: &Name,
        name: &Name,
        role: Role,
    ) -> Result<UserRecord> {
        let (tenant, name) = (tenant.clone(), name.clone());
        let user = UserRecord { id: user_id(), tenant, name, role, created: UnixMs::now() };
        self.file.write(|t, changes| {
            t.has_tenant(&user.tenant)?;
            // Nobody of a tenant is taken for the operator.
            if user.name.as_str() == OPERATOR
                || t.people.user_named(&user.tenant, &user.name).is_some()
            {
                return Err(RegistryError::Exists { what: "user", key: user.name.to_string() });
            }
            let object = format!("{} ({role})", user.name);
            let note = Note::of(who, "user create", &object);
            changes.push(t.audited(Note { tenant: &user.tenant, ..note }));
            changes.push(Change::User(user.id.clone(), Some(Arc::new(user.clone()))));
            Ok(())
        })?;
        Ok(user)
    }

    /// Forgets a user and its tokens.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; [`RegistryError::Busy`] while it has a private substrate, which
    /// nobody else may use.
    pub fn user_remove(&self, who: &Principal, tenant: &Name, name: &Name) -> Result<()> {
        self.file.write(|t, changes| {
            let user = t.people.user_named(tenant, name).ok_or_else(|| missing("user", name))?;
            if let Some(what) = t.private_of(tenant, name) {
                return Err(busy(format!("user '{name}' still has the private {what}")));
            }
            let tokens = t.people.tokens.values().filter(|k| k.user == user.id);
            changes.extend(tokens.map(|k| Change::Token(k.id.clone(), None)));
            let note = Note::of(who, "user delete", name.as_str());
            changes.push(t.audited(Note { tenant, ..note }));
            changes.push(Change::User(user.id.clone(), None));
            Ok(())
        })
    }

    /// All tokens of users that are there, without their secrets.
    #[must_use]
    pub fn tokens(&self) -> Vec<TokenInfo> {
        self.file
            .read(|t| t.people.tokens.values().filter_map(|k| t.people.token_info(k)).collect())
    }

    /// One of them.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn token(&self, id: &str) -> Result<TokenInfo> {
        self.file.read(|t| {
            let info = t.people.tokens.get(id).and_then(|k| t.people.token_info(k));
            info.ok_or_else(|| RegistryError::NotFound { what: "token", key: super::shown(id) })
        })
    }

    /// Enters a token.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] without its user; [`RegistryError::Busy`] when that has
    /// [`MAX_TOKENS`].
    pub fn token_add(&self, who: &Principal, token: &TokenRecord) -> Result<()> {
        self.file.write(|t, changes| {
            let Some((tenant, user)) = t.people.user_of(&token.user) else {
                return Err(missing("user", &token.user));
            };
            let stranger = token.user != who.id && !who.is_operator();
            if stranger && let Some(what) = t.private_of(&tenant, &user) {
                return Err(busy(format!(
                    "user '{user}' has the private {what}: its tokens are made by itself"
                )));
            }
            let ended = |k: &TokenRecord| k.expires.is_some_and(|end| end <= token.created);
            let (ended, good): (Vec<_>, Vec<_>) =
                t.people.tokens.values().filter(|k| k.user == token.user).partition(|k| ended(k));
            changes.extend(ended.iter().map(|k| Change::Token(k.id.clone(), None)));
            if good.len() >= MAX_TOKENS {
                return Err(busy(format!(
                    "user '{user}' has {MAX_TOKENS} tokens; remove one first"
                )));
            }
            let object = format!("{} of {user} ({})", token.id, token.role);
            let note = Note::of(who, "token create", &object);
            changes.push(t.audited(Note { tenant: &tenant, ..note }));
            changes.push(Change::Token(token.id.clone(), Some(Arc::new(token.clone()))));
            Ok(())
        })
    }

    /// Forgets a token: it is good for nothing from now on.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`].
    pub fn token_remove(&self, who: &Principal, id: &str) -> Result<()> {
        self.file.write(|t, changes| {
            let token = t
                .people
                .tokens
                .get(id)
                .ok_or_else(|| RegistryError::NotFound { what: "token", key: super::shown(id) })?;
            let note = Note::of(who, "token delete", &token.id);
            let tenant =
                t.people.user_of(&token.user).map_or_else(|| who.tenant.clone(), |(of, _)| of);
            changes.push(t.audited(Note { tenant: &tenant, ..note }));
            changes.push(Change::Token(token.id.clone(), None));
            Ok(())
        })
    }

    /// Whether the token by which `who` is here is still good.
    #[must_use]
    pub fn still_good(&self, who: &Principal, now: UnixMs) -> bool {
        let there = |id: &String| {
            self.file.read(|t| {
                let token = t.people.tokens.get(id);
                token.is_some_and(|k| k.user == who.id && t.people.user_of(&k.user).is_some())
            })
        };
        who.until.is_none_or(|end| now < end) && who.token.as_ref().is_none_or(there)
    }

    /// Who shows the token with this text; nobody when there is none, or its time is over.
    #[must_use]
    pub fn principal(&self, text: &str, now: UnixMs) -> Option<Principal> {
        let id = text.strip_prefix(USER_TOKEN)?.split('-').next()?;
        self.file.read(|t| {
            let token = t.people.tokens.get(id)?;
            // Of hashes, in constant time: how far a wrong one fits tells nothing anyway.
            let same = blake3::Hash::from_bytes(token.hash.0) == blake3::hash(text.as_bytes());
            if !same || token.expires.is_some_and(|end| end <= now) {
                return None;
            }
            let (user, role) = match t.people.users.get(&token.user) {
                Some(u) => (Principal::of(u), u.role),
                None if token.user.as_str() == OPERATOR => (Principal::operator(), Role::Operator),
                None => return None,
            };
            let (token, role, until) =
                (Some(token.id.clone()), token.role.min(role), token.expires);
            Some(Principal { token, role, until, ..user })
        })
    }
}

impl Principal {
    /// That user.
    #[must_use]
    pub fn of(user: &UserRecord) -> Self {
        Self {
            user: user.name.clone(),
            id: user.id.clone(),
            tenant: user.tenant.clone(),
            role: user.role,
            narrowed: false,
            token: None,
            until: None,
            by: None,
        }
    }
}
