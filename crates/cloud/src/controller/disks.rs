//! How large the disks of machines are, for the quotas: sites are asked. What the center's own site
//! says of a substrate is remembered, since that never changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_site::{Call, Origin, Request as _, SiteHost, verbs};
use godwit_types::{Hash, SiteKind, SubstrateId};

use super::Exchange;

/// What a disk is remembered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum DiskOf {
    /// An image of that content.
    Image(Hash),
    /// A substrate.
    Substrate(SubstrateId),
}

/// No disk has more bytes, whatever a site says: a PiB.
const LARGEST: u64 = 1 << 50;

/// So many disks are remembered; then all are forgotten.
const MAX_KNOWN: usize = 4096;

/// The disks that sites have told of, in bytes.
#[derive(Debug, Default)]
pub(super) struct Disks(Mutex<HashMap<DiskOf, u64>>);

impl Disks {
    fn all(&self) -> MutexGuard<'_, HashMap<DiskOf, u64>> {
        // Whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one of that, if it was told of.
    pub(super) fn known(&self, of: DiskOf) -> Option<u64> {
        self.all().get(&of).copied()
    }

    fn remember(&self, of: DiskOf, bytes: u64) {
        let mut all = self.all();
        if all.len() >= MAX_KNOWN {
            all.clear();
        }
        all.insert(of, bytes);
    }
}

impl Exchange {
    /// How large the disk is of a machine that is made of `origin`; none where `host`, which has
    /// that, cannot say.
    pub(super) async fn disk_bytes(
        &self,
        of: DiskOf,
        origin: &Origin,
        host: Option<Arc<dyn SiteHost>>,
    ) -> Option<u64> {
        if let Some(bytes) = self.disks.known(of) {
            return Some(bytes);
        }
        let host = host.filter(|h| h.speaks() >= verbs::Disk::SINCE)?;
        let asked = host.ask(verbs::Disk { of: origin.clone() }, Call::quiet());
        match super::ask::within(host.name(), asked).await {
            Ok(bytes) if bytes > LARGEST => {
                tracing::warn!(site = %host.name(), bytes, "no disk is as large as that");
                None
            }
            Ok(bytes) => {
                // Another site's word holds for what is made of it there, and for nobody else; the
                // build that a name stands for is not the same everywhere.
                let own =
                    self.registry.sites().get(host.name()).map(|s| s.kind == SiteKind::Center);
                if matches!(of, DiskOf::Substrate(_)) && own.unwrap_or_default() {
                    self.disks.remember(of, bytes);
                }
                Some(bytes)
            }
            Err(error) => {
                tracing::warn!(site = %host.name(), %error, "not told how large a disk is");
                None
            }
        }
    }
}
