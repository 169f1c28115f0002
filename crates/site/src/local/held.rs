//! Memory that both sites of a move hold: what the center says they do, made ready ahead of the
//! relays that refer to it (`migrate`'s relay, `known`).

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use godwit_migrate::relay::HeldMemory;
use godwit_substrate::OpenMemory;
use godwit_types::{Fault, Hash, MigrationId, SubstrateId};

use super::substrates::{Substrates, blocking};

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
#[derive(Debug, Default)]
pub(super) struct HeldMemories {
    ready: Mutex<VecDeque<(MigrationId, Held)>>,
}

impl HeldMemories {
    /// Makes the sealed memory of substrate `id` ready for `migration`, if it is here with this
    /// `content` and there is room for it.
    pub(super) async fn hold(
        &self,
        substrates: &Substrates,
        migration: MigrationId,
        (id, content): (SubstrateId, Hash),
    ) -> Result<(), Fault> {
        let pool = substrates.pool.clone();
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
}
