//! Memory that both sites of a move hold: what the center says they do, made ready ahead of the
//! relays that refer to it (`migrate`'s relay, `known`).

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use godwit_migrate::relay::HeldMemory;
use godwit_substrate::{OpenMemory, Pool};
use godwit_types::{Fault, Hash, MigrationId, SubstrateId};

use super::record::MachineRecord;
use super::substrates::blocking;

/// How many moves this is kept for at once; of more, the oldest goes without.
const MOST: usize = 64;

/// The sealed memory of a substrate, open for the relay of one move.
#[derive(Debug)]
pub(super) struct Held {
    /// As the relay is told of it.
    pub(super) memory: HeldMemory,
    pub(super) open: OpenMemory,
}

/// What is ready for moves whose relay has not started yet.
pub(super) struct HeldMemories {
    pool: Pool,
    ready: Mutex<VecDeque<(MigrationId, Held)>>,
}

impl HeldMemories {
    /// Of the substrates in `pool`; none is ready yet.
    pub(super) fn new(pool: Pool) -> Self {
        Self { pool, ready: Mutex::default() }
    }

    /// Makes the sealed memory of substrate `id` ready for `migration`, if it is here with this
    /// `content` and there is room for it.
    pub(super) async fn hold(
        &self,
        migration: MigrationId,
        (id, content): (SubstrateId, Hash),
    ) -> Result<(), Fault> {
        let pool = self.pool.clone();
        let open = blocking(move || pool.open_memory(id, content)).await?;
        let held = Held { memory: HeldMemory { content, path: open.path().to_owned() }, open };
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.retain(|(of, _)| *of != migration);
        ready.push_back((migration, held));
        if ready.len() > MOST {
            ready.pop_front();
        }
        Ok(())
    }

    /// What is ready for `migration`; once.
    pub(super) fn take(&self, migration: MigrationId) -> Option<Held> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let at = ready.iter().position(|(of, _)| *of == migration)?;
        ready.remove(at).map(|(_, held)| held)
    }

    /// A move of a machine has failed, perhaps since what both sites hold differs.
    pub(super) fn doubt(&self, record: &MachineRecord) {
        if let Some(id) = record.substrate {
            self.pool.doubt_memory(id);
        }
    }
}
