//! The tables of the registry's file.

use redb::TableDefinition;

/// JSON by a key that is text.
pub(super) type Table = TableDefinition<'static, &'static str, &'static [u8]>;

pub(super) const META: Table = TableDefinition::new("meta");
pub(super) const SITES: Table = TableDefinition::new("sites");
pub(super) const SUBSTRATES: Table = TableDefinition::new("substrates");
pub(super) const VMS: Table = TableDefinition::new("vms");
pub(super) const OPS: Table = TableDefinition::new("ops");
/// Came after format 2: a file without it has no such rows.
pub(super) const DELETED: Table = TableDefinition::new("deleted-vms");
/// Format 3, as the three below.
pub(super) const TENANTS: Table = TableDefinition::new("tenants");
pub(super) const USERS: Table = TableDefinition::new("users");
pub(super) const TOKENS: Table = TableDefinition::new("api-tokens");
/// Format 4.
pub(super) const NETWORKS: Table = TableDefinition::new("networks");
/// By number, so that the order of keys is theirs.
pub(super) const AUDIT: Table = TableDefinition::new("audit");
