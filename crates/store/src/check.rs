//! Walking everything.

use godwit_types::Hash;
use rayon::prelude::*;

use crate::Store;
use crate::error::{DamagedUnit, StoreError};
use crate::index::Loc;

/// Units looked up and read in one go.
const BATCH: usize = 4096;

/// What a walk through the whole store found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Units read and checked.
    pub units: u64,
    /// Units whose bytes are not theirs.
    pub damaged: Vec<DamagedUnit>,
    /// Units whose index entry is malformed.
    pub bad_entries: Vec<Hash>,
    /// Units that an owner holds and the store lacks.
    pub missing: Vec<Hash>,
    /// What is wrong with the index as it is on the disk. What was read of it stays usable until the
    /// store is closed.
    pub index: Option<String>,
}

impl CheckReport {
    /// Whether nothing was found wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.index.is_none()
            && self.damaged.is_empty()
            && self.bad_entries.is_empty()
            && self.missing.is_empty()
    }
}

impl Store {
    /// Reads every unit from the disk and compares it with its hash; finds units that are held
    /// but lacking.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Index`]. Damage is no error here but part of the report.
    pub fn check(&self) -> Result<CheckReport, StoreError> {
        let mut report =
            CheckReport { index: self.inner.disk.index.check()?, ..Default::default() };
        if let Some(why) = &report.index {
            tracing::error!(store = %self.inner.dir.display(), why, "the store's index is damaged on the disk");
        }
        self.inner.disk.packs.let_go();
        let mut all: Vec<(Hash, Loc)> = Vec::new();
        let mut last = None;
        let mut out_of_order = 0;
        self.inner.disk.index.for_each(|h, loc| {
            out_of_order += u64::from(last.is_some_and(|last| last >= h));
            last = Some(h);
            match loc {
                Ok(loc) => all.push((h, loc)),
                Err(_) => report.bad_entries.push(h),
            }
        })?;
        if out_of_order > 0 {
            report.index.get_or_insert(format!("{out_of_order} of its entries are out of order"));
        }
        all.sort_unstable_by_key(|(_, l)| (l.pack, l.offset));
        report.units = all.len() as u64;
        for batch in all.chunks(BATCH) {
            let found: Vec<Option<StoreError>> = batch
                .par_iter()
                .with_min_len(64)
                .map(|(h, loc)| self.inner.disk.read_checked(h, loc).err())
                .collect();
            for e in found.into_iter().flatten() {
                match e {
                    StoreError::Damaged(d) => report.damaged.push(*d),
                    // Collected since the list was made.
                    StoreError::Missing(_) => report.units -= 1,
                    e => return Err(e),
                }
            }
        }
        let held: Vec<Hash> = self.inner.disk.index.owned(None)?.into_iter().collect();
        let found = self.contains_many(&held)?;
        report.missing = held.into_iter().zip(found).filter(|(_, f)| !f).map(|(h, _)| h).collect();
        report.missing.retain(|h| !report.bad_entries.contains(h));
        report.missing.sort_unstable();
        Ok(report)
    }
}
