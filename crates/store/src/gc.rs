//! Giving space back: units that nobody holds leave the index, and packs that are mostly empty
//! then are written anew, smaller.

use std::collections::{HashMap, HashSet};

use godwit_types::Hash;

use crate::disk::PackWrite;
use crate::encode::{Effort, Encoder};
use crate::error::StoreError;
use crate::index::Loc;
use crate::pack::{HEAD, Records};
use crate::tier::{Tier, TierWrite};
use crate::{Store, UNIT, lock};

/// A pack of which less than this share is in use is written anew.
const WORTH: f64 = 0.7;
/// Bytes of records that are copied in one go.
const COPIED: usize = 1 << 20;

/// What a collection gave back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Units removed from the index.
    pub removed_units: u64,
    /// Pack files written anew or dropped.
    pub packs: u64,
    /// Units that were copied over.
    pub moved_units: u64,
    /// Bytes of pack files given back.
    pub freed_bytes: u64,
}

impl Store {
    /// Removes units without an owner and compacts packs. May run beside readers and writers.
    /// A damaged unit stays where it is, and so does its pack.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`] when a pack to be written anew does not fit; [`StoreError::Io`],
    /// [`StoreError::Index`]. What was done before stays done; nothing is lost.
    pub fn gc(&self) -> Result<GcReport, StoreError> {
        let mut report = GcReport::default();
        {
            // Held through the commit: a writer that pins a unit afterwards sees it gone.
            let pins = lock(&self.inner.pins);
            let pinned: HashSet<Hash> = pins.by_writer.values().flatten().copied().collect();
            // An owner that comes between the two holds only what was pinned.
            let gone = self.inner.disk.index.unowned(&pinned)?;
            if !gone.is_empty() {
                self.inner.disk.remove(&gone)?;
                self.inner.memory.remove(&gone)?;
            }
            report.removed_units = gone.len() as u64;
        }
        let mut used: HashMap<u32, Vec<(Hash, Loc)>> = HashMap::new();
        let mut bad = None;
        self.inner.disk.index.for_each(|h, loc| match loc {
            Ok(loc) => used.entry(loc.pack).or_default().push((h, loc)),
            Err(e) => bad = Some(e),
        })?;
        if let Some(e) = bad {
            return Err(e);
        }
        for (pack, len) in self.inner.disk.index.packs()? {
            let units = used.remove(&pack).unwrap_or_default();
            let live: u64 = units.iter().map(|(_, l)| HEAD as u64 + u64::from(l.body)).sum();
            if live as f64 >= len as f64 * WORTH || !self.inner.disk.packs.withdraw(pack, len) {
                continue;
            }
            self.compact(pack, len, units, &mut report)?;
        }
        Ok(report)
    }

    fn compact(
        &self,
        pack: u32,
        len: u64,
        mut units: Vec<(Hash, Loc)>,
        report: &mut GcReport,
    ) -> Result<(), StoreError> {
        units.sort_unstable_by_key(|(_, l)| l.offset);
        // A damaged unit keeps its pack as it is.
        let Some(copy) = self.copy_units(&units)? else { return Ok(()) };
        let (moved, grown) = copy.added();
        copy.relocate(pack)?;
        self.inner.disk.packs.remove(pack)?;
        report.packs += 1;
        report.moved_units += moved;
        report.freed_bytes += len.saturating_sub(grown);
        Ok(())
    }

    /// Copies `units` into a pack, smaller where that is possible. `None` when one of them is
    /// damaged.
    fn copy_units(&self, units: &[(Hash, Loc)]) -> Result<Option<PackWrite>, StoreError> {
        let mut copy = self.inner.disk.begin();
        if units.is_empty() {
            return Ok(Some(copy));
        }
        self.room_for(units.iter().map(|(_, l)| HEAD as u64 + u64::from(l.body)).sum())?;
        let mut encoder = Encoder::new(Effort::Small);
        let mut records = Records::default();
        let mut raw = [0; UNIT];
        for (hash, _) in units {
            let n = match self.get(hash, &mut raw) {
                Ok(n) => n,
                Err(StoreError::Damaged(d)) => {
                    tracing::error!(error = %d, "pack not compacted");
                    return Ok(None);
                }
                Err(e) => return Err(e),
            };
            records.encode(*hash, &raw[..n], &mut encoder);
            if records.bytes() > COPIED {
                copy.put(&records)?;
                records.clear();
            }
        }
        copy.put(&records)?;
        Ok(Some(copy))
    }
}
