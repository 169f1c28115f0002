//! Giving space back: units that nobody holds leave the index, and packs that are mostly empty
//! then are written anew, smaller.

use std::collections::{HashMap, HashSet};

use godwit_types::Hash;

use crate::encode::{Effort, Encoder};
use crate::error::StoreError;
use crate::index::Loc;
use crate::pack::{HEAD, OpenPack, head};
use crate::{Store, UNIT, lock};

/// A pack of which less than this share is in use is written anew.
const WORTH: f64 = 0.7;

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
            report.removed_units = self.inner.disk.index.sweep(&pinned)?;
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
        let mut new = None;
        let copied = self.copy_units(&units, &mut new);
        let moved = match copied {
            Ok(Some(moved)) => moved,
            other => {
                if let Some(p) = &new {
                    self.inner.disk.packs.give_back(p, p.base);
                }
                // A damaged unit keeps its pack as it is.
                return other.map(|_| ());
            }
        };
        let target = new.as_ref().map(|p| (p.number, p.len));
        if let Err(e) = self.inner.disk.index.relocate(&moved, target, &[pack]) {
            if let Some(p) = &new
                && let Ok(packs) = self.inner.disk.index.packs()
            {
                let n = packs.iter().find(|(n, _)| *n == p.number).map_or(0, |(_, len)| *len);
                self.inner.disk.packs.give_back(p, n);
            }
            return Err(e);
        }
        let mut grown = 0;
        if let Some(p) = new {
            grown = p.len - p.base;
            self.inner.disk.packs.give_back(&p, p.len);
        }
        self.inner.disk.packs.remove(pack)?;
        report.packs += 1;
        report.moved_units += moved.len() as u64;
        report.freed_bytes += len.saturating_sub(grown);
        Ok(())
    }

    /// Copies `units` into a pack, smaller where that is possible, and syncs it. `None` when one
    /// of them is damaged.
    fn copy_units(
        &self,
        units: &[(Hash, Loc)],
        new: &mut Option<OpenPack>,
    ) -> Result<Option<Vec<(Hash, Loc)>>, StoreError> {
        if units.is_empty() {
            return Ok(Some(Vec::new()));
        }
        self.room_for(units.iter().map(|(_, l)| HEAD as u64 + u64::from(l.body)).sum())?;
        let pack = new.insert(self.inner.disk.packs.take()?);
        let path = self.inner.disk.packs.path(pack.number);
        let mut encoder = Encoder::new(Effort::Small);
        let mut moved = Vec::with_capacity(units.len());
        let mut out = Vec::new();
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
            let at = out.len();
            out.extend_from_slice(&[0; HEAD]);
            let encoding = encoder.encode(&raw[..n], &mut out);
            let body = (out.len() - at - HEAD) as u16;
            out[at..at + HEAD].copy_from_slice(&head(*hash, encoding, n as u16, body));
            let offset = pack.len + at as u64;
            moved.push((*hash, Loc { pack: pack.number, offset, body, raw: n as u16, encoding }));
            if out.len() > 1 << 20 {
                pack.append(&out).map_err(StoreError::io("writing", &path))?;
                out.clear();
            }
        }
        pack.append(&out).map_err(StoreError::io("writing", &path))?;
        pack.file.sync_data().map_err(StoreError::io("syncing", &path))?;
        moved.sort_unstable_by_key(|(h, _)| *h);
        Ok(Some(moved))
    }
}
