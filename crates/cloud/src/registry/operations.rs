//! The operations of a cloud, as they are written down.

use std::sync::Arc;

use godwit_types::OpId;

use super::audience::Tenants;
use super::file::File;
use super::tables::Change;
use super::{OpRecord, Result};

/// Finished operations of each tenant that are kept; the oldest go first.
pub const KEPT_OPS: usize = 1000;

/// The operations of a registry.
#[derive(Debug)]
pub struct Operations {
    file: Arc<File>,
}

impl Operations {
    pub(super) const fn new(file: Arc<File>) -> Self {
        Self { file }
    }

    /// Tells those who follow of an operation that is asked to stop, which is not written down.
    pub(crate) fn cancelling(&self, op: &OpRecord) {
        let audience = self.file.read(|t| Tenants::of(t).op(op));
        self.file.feed().op_cancelling(op, audience);
    }

    /// All operations that are kept, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub fn all(&self) -> Result<Vec<OpRecord>> {
        Ok(self.shared().into_iter().map(Arc::unwrap_or_clone).collect())
    }

    /// As [`Operations::all`], without a copy of each.
    #[must_use]
    pub fn shared(&self) -> Vec<Arc<OpRecord>> {
        self.file.read(|t| t.ops.values().cloned().collect())
    }

    /// One operation.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn get(&self, id: OpId) -> Result<OpRecord> {
        self.file.read(|t| {
            t.ops
                .get(&id)
                .map(|o| OpRecord::clone(o))
                .ok_or_else(|| t.missing_or_damaged("operation", &id.to_string()))
        })
    }

    /// Writes an operation as it is now. When one ends, the oldest finished ones of its tenant
    /// beyond [`KEPT_OPS`] are dropped in the same transaction.
    ///
    /// # Errors
    /// When the database fails.
    pub fn put(&self, op: &OpRecord) -> Result<()> {
        self.file.write(|t, changes| {
            changes.extend(t.audited_op(op));
            changes.push(Change::Op(op.id, Some(Arc::new(op.clone()))));
            if op.state.is_final() {
                // With this one there is one more, unless it had ended before.
                let before = t.ops.get(&op.id).is_some_and(|o| o.state.is_final());
                let old = t.ended_beyond(&op.tenant, KEPT_OPS - usize::from(!before));
                changes.extend(old.filter(|id| **id != op.id).map(|id| Change::Op(*id, None)));
            }
            Ok(())
        })
    }
}
