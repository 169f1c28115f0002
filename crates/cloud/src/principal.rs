//! Who asks, in which tenant, as what.

use std::fmt;
use std::str::FromStr;

use godwit_types::{Name, UnixMs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The tenant that every cloud has, and that everything from before there were tenants belongs to.
pub const DEFAULT_TENANT: &str = "default";

/// The user that whoever has the operator token is.
pub const OPERATOR: &str = "operator";

fn fixed(text: &str) -> Name {
    // Both constants are names: a test says so.
    Name::new(text).unwrap_or_else(|_| unreachable!("a fixed name"))
}

/// [`DEFAULT_TENANT`].
#[must_use]
pub fn default_tenant() -> Name {
    fixed(DEFAULT_TENANT)
}

/// [`OPERATOR`].
#[must_use]
pub fn operator() -> Name {
    fixed(OPERATOR)
}

/// What a user is in its tenant; each may do all that those before it may.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Looks, changes nothing.
    Viewer,
    /// Makes and uses machines and substrates of its tenant.
    Member,
    /// Also has users and tokens of its tenant in hand.
    Admin,
    /// Runs the cloud.
    Operator,
}

impl Role {
    /// All, lowest first.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::Member, Self::Admin, Self::Operator];

    /// Its word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Member => "member",
            Self::Admin => "admin",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|r| r.as_str() == text)
            .ok_or_else(|| "it is viewer, member, admin or operator".into())
    }
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The user.
    pub user: Name,
    /// The user as sites know it, for as long as there is a cloud: its id, which no other user
    /// ever has.
    pub id: Name,
    /// The tenant in which it acts: names without another are looked up and made there.
    pub tenant: Name,
    /// What it is there.
    pub role: Role,
    /// An operator who asks for one tenant only.
    pub narrowed: bool,
    /// The id of the token by which it is here; none by the operator's own.
    pub token: Option<String>,
    /// When the token ends by which it is here, if it does.
    pub until: Option<UnixMs>,
    /// The site that handed its request over; none where it asks the center itself.
    pub by: Option<Name>,
}

impl Principal {
    /// Whoever has the operator token, and the center itself.
    #[must_use]
    pub fn operator() -> Self {
        let (user, tenant) = (operator(), default_tenant());
        Self {
            id: user.clone(),
            user,
            tenant,
            role: Role::Operator,
            narrowed: false,
            token: None,
            until: None,
            by: None,
        }
    }

    /// The same user acting in `tenant`: an operator who has named something of it.
    #[must_use]
    pub fn at(&self, tenant: &Name) -> Self {
        Self { tenant: tenant.clone(), ..self.clone() }
    }

    /// Whether it is an operator.
    #[must_use]
    pub const fn is_operator(&self) -> bool {
        matches!(self.role, Role::Operator)
    }

    /// Whether what belongs to `tenant` is listed for it.
    #[must_use]
    pub fn lists(&self, tenant: &Name) -> bool {
        *tenant == self.tenant || self.is_operator() && !self.narrowed
    }
}
