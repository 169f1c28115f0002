//! The audit log: who did what, and what came of it.
//!
//! Entries are only ever added, each in the transaction of the change that it tells of. Each holds
//! the hash of the one before, so that one that was changed or taken out shows; whoever wrote down
//! the hash of the last one also sees when the end was cut off. What was typed, what programs were
//! given and secrets are in none.

use std::sync::Arc;

use godwit_types::{Hash, Name, OpState, UnixMs};

use super::file::File;
use super::tables::{Change, Tables};
use super::{OpRecord, Result};
use crate::principal::Principal;

pub use super::rows::{AuditEnd, AuditEntry};

/// Entries that are told at once.
pub const MAX_AUDIT: usize = 1000;

/// Entries that are looked through for them.
pub const MAX_READ: usize = 100_000;

/// The longest texts of an entry, in characters.
const MAX_TEXT: usize = 160;

/// What an entry tells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Note<'a> {
    pub(crate) tenant: &'a Name,
    pub(crate) user: &'a Name,
    pub(crate) action: &'a str,
    pub(crate) object: &'a str,
    pub(crate) outcome: &'a str,
    /// About the cloud as a whole.
    pub(crate) cloud: bool,
    /// The site that handed the request over.
    pub(crate) by: Option<&'a Name>,
}

impl<'a> Note<'a> {
    /// That `who` did `action` with `object`.
    pub(crate) const fn of(who: &'a Principal, action: &'a str, object: &'a str) -> Self {
        let (tenant, user, by) = (&who.tenant, &who.user, who.by.as_ref());
        Self { tenant, user, action, object, outcome: "done", cloud: false, by }
    }

    /// The same, of the cloud as a whole.
    pub(crate) const fn of_cloud(who: &'a Principal, action: &'a str, object: &'a str) -> Self {
        Self { cloud: true, ..Self::of(who, action, object) }
    }
}

fn bounded(text: &str) -> String {
    text.chars().flat_map(char::escape_debug).take(MAX_TEXT).collect()
}

impl Tables {
    /// The entry that comes next. At most one in a change: the next one knows this one's hash.
    pub(super) fn audited(&self, note: Note<'_>) -> Change {
        Change::Audit(Arc::new(AuditEntry {
            number: self.audit.entries + 1,
            when: UnixMs::now(),
            tenant: note.tenant.clone(),
            user: note.user.clone(),
            action: bounded(note.action),
            object: bounded(note.object),
            outcome: bounded(note.outcome),
            cloud: note.cloud,
            by: note.by.cloned(),
            before: self.audit.last,
        }))
    }

    /// The entry for an operation that begins or ends with this change, if it does.
    pub(super) fn audited_op(&self, op: &OpRecord) -> Option<Change> {
        let old = self.ops.get(&op.id);
        let outcome = match (old, op.state) {
            (_, OpState::Done) => "done".into(),
            (_, OpState::Cancelled) => "cancelled".into(),
            (_, OpState::Failed) => {
                let why = op.error.as_ref().map(|e| e.message.as_str()).unwrap_or_default();
                format!("failed: {why}")
            }
            (None, OpState::Running | OpState::Cancelling) => "begun".into(),
            (Some(_), OpState::Running | OpState::Cancelling) => return None,
        };
        if old.is_some_and(|o| o.state.is_final()) {
            return None;
        }
        let object = format!("{} ({})", op.kind.target(), op.id);
        Some(self.audited(Note {
            tenant: &op.tenant,
            user: &op.user,
            action: op.kind.verb(),
            object: &object,
            outcome: &outcome,
            cloud: op.kind.is_of_cloud(),
            by: op.by.as_ref(),
        }))
    }
}

/// The audit log of a registry.
#[derive(Debug)]
pub struct AuditLog {
    file: Arc<File>,
}

impl AuditLog {
    pub(super) const fn new(file: Arc<File>) -> Self {
        Self { file }
    }

    /// Writes an entry of what changes nothing in the registry.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) fn note(&self, note: Note<'_>) -> Result<()> {
        self.file.write(|t, changes| {
            changes.push(t.audited(note));
            Ok(())
        })
    }

    /// The newest entries that `wanted` takes, at most `limit` and [`MAX_AUDIT`], oldest first:
    /// from entry number `from` on, and of the newest [`MAX_READ`].
    ///
    /// # Errors
    /// When the database fails.
    pub fn entries(
        &self,
        limit: usize,
        from: u64,
        wanted: impl Fn(&AuditEntry) -> bool,
    ) -> Result<Vec<AuditEntry>> {
        self.entries_before(limit, from, None, wanted)
    }

    /// As [`AuditLog::entries`], of those before the entry number `before`.
    ///
    /// # Errors
    /// When the database fails.
    pub fn entries_before(
        &self,
        limit: usize,
        from: u64,
        before: Option<u64>,
        wanted: impl Fn(&AuditEntry) -> bool,
    ) -> Result<Vec<AuditEntry>> {
        let (mut found, mut read) = (Vec::new(), 0);
        let limit = limit.min(MAX_AUDIT);
        if limit == 0 {
            return Ok(found);
        }
        self.file.audit_back(before, |entry| {
            read += 1;
            if entry.number < from {
                return false;
            }
            if wanted(&entry) {
                found.push(entry);
            }
            found.len() < limit && read < MAX_READ
        })?;
        found.reverse();
        Ok(found)
    }

    /// Reads the whole log and tells where it ends.
    ///
    /// # Errors
    /// [`super::RegistryError::Damaged`] that names the first entry, from the end, that is not what
    /// the one after it says; when the database fails.
    pub fn verify(&self) -> Result<AuditEnd> {
        let mut end: Option<AuditEnd> = None;
        let mut after: Option<(u64, Hash)> = None;
        let mut broken = None;
        self.file.audit_back(None, |entry| {
            let hash = entry.hash();
            if after.is_some_and(|(number, before)| number != entry.number + 1 || before != hash) {
                broken = Some(entry.number);
            }
            end.get_or_insert(AuditEnd { entries: entry.number, last: hash });
            after = Some((entry.number, entry.before));
            broken.is_none()
        })?;
        let first = after.unwrap_or((1, AuditEnd::default().last));
        if broken.is_none() && first != (1, AuditEnd::default().last) {
            broken = Some(first.0);
        }
        let end = end.unwrap_or_default();
        let known = self.file.read(|t| t.audit);
        // One that is written meanwhile is no fault.
        if broken.is_none() && known.entries == end.entries && known.last != end.last {
            broken = Some(end.entries);
        }
        match broken {
            None => Ok(end),
            Some(number) => Err(super::RegistryError::Damaged {
                key: format!("audit/{number}"),
                source: serde::de::Error::custom(
                    "the audit log is not whole here: an entry was changed or is missing",
                ),
            }),
        }
    }
}
