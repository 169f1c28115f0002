//! What the registry keeps of tenants, users, tokens and of what was done: rows, as they are written.
//! What is done with them is in `people`, `quota` and `audit`.

use godwit_types::{Hash, Name, UnixMs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::principal::Role;

/// A tenant: people who own machines and substrates together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TenantRecord {
    /// Its name.
    pub name: Name,
    /// When it was made.
    pub created: UnixMs,
    /// How much it may have.
    #[serde(default)]
    pub quota: Quota,
    /// The first entry of the audit log that is its own: those before are of an earlier tenant of
    /// that name.
    #[serde(default)]
    pub audit_from: u64,
}

impl TenantRecord {
    /// One that is made now.
    #[must_use]
    pub fn new(name: Name) -> Self {
        Self { name, created: UnixMs::now(), quota: Quota::default(), audit_from: 0 }
    }
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserRecord {
    /// Its id: no other user ever has it.
    pub id: Name,
    /// Its tenant.
    pub tenant: Name,
    /// Its name; unique in its tenant.
    pub name: Name,
    /// What it is there.
    pub role: Role,
    /// When it was made.
    pub created: UnixMs,
}

/// A token as it is kept: without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Which: 16 hex digits, also in its text.
    pub id: String,
    /// Id of its user.
    pub user: Name,
    /// What it allows, if its user still may as much.
    pub role: Role,
    /// When it was made.
    pub created: UnixMs,
    /// Its end.
    pub expires: Option<UnixMs>,
    /// BLAKE3 of its text.
    pub hash: Hash,
    /// Who made it, if that was somebody else: such a one may have kept it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_by: Option<Name>,
}

/// The most that a tenant may have; what is left out has no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// Machines, running or not.
    #[serde(default)]
    pub machines: Option<u64>,
    /// vCPUs of the machines that are on.
    #[serde(default)]
    pub vcpus: Option<u64>,
    /// Guest memory of the machines that are on, in MiB.
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// Bytes of its machines' disks as their guests see them, running or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// What its substrates hold of memory and disk, each in full whatever it shares with others, in
    /// bytes: the most that they may take in the pool. A docking begins only
    /// while there is room, those under way counted with their guests' memory; the one that fills
    /// it ends.
    #[serde(default)]
    pub pool_bytes: Option<u64>,
    /// Machines that move at once.
    #[serde(default)]
    pub moves: Option<u64>,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// Its number; the first is 1.
    pub number: u64,
    /// When.
    pub when: UnixMs,
    /// The tenant that it concerns.
    pub tenant: Name,
    /// Who.
    pub user: Name,
    /// What was done.
    pub action: String,
    /// With what.
    pub object: String,
    /// What came of it.
    pub outcome: String,
    /// It is about the cloud as a whole: for operators alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cloud: bool,
    /// The site that handed the request over; none where the center was asked itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Name>,
    /// Hash of the entry before; of nothing for the first.
    pub before: Hash,
}

impl AuditEntry {
    /// Its hash.
    #[must_use]
    pub fn hash(&self) -> Hash {
        Hash::of(&serde_json::to_vec(self).unwrap_or_default())
    }
}

/// The end of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEnd {
    /// How many entries there are.
    pub entries: u64,
    /// Hash of the last.
    pub last: Hash,
}

impl Default for AuditEnd {
    fn default() -> Self {
        Self { entries: 0, last: Hash::of(b"") }
    }
}
