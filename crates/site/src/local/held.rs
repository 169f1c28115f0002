//! Memory that both sites of a move hold: what the center says they do, made ready ahead of the
//! relays that refer to it (`migrate`'s relay, `known`).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_migrate::relay::HeldMemory;
use godwit_substrate::{AsyncPool, OpenMemory, Pool};
use godwit_types::{Fault, Hash, MigrationId, SubstrateId};

use super::faults::into_fault;

/// How many moves this is kept for at once; of more, the oldest goes without.
const MOST: usize = 64;
/// How long a move may take from here to the start of its relay.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// The sealed memory of a substrate, open for the relay of one move.
#[derive(Debug)]
pub(super) struct Held {
    /// As the relay is told of it.
    pub(super) memory: HeldMemory,
    pub(super) open: OpenMemory,
}

/// What is ready for moves whose relay has not started yet.
pub(super) struct HeldMemories {
    pool: AsyncPool,
    ready: Arc<Mutex<VecDeque<(MigrationId, Held)>>>,
}

impl HeldMemories {
    /// Of the substrates in `pool`; none is ready yet.
    pub(super) fn new(pool: AsyncPool) -> Self {
        Self { pool, ready: Arc::default() }
    }

    /// Makes the sealed memory of substrate `id` ready for `migration`, if it has this `content` and the
    /// budget has room for it.
    pub(super) async fn hold(
        &self,
        migration: MigrationId,
        (id, content): (SubstrateId, Hash),
    ) -> Result<(), Fault> {
        let opening = move |pool: &Pool| pool.open_memory(id, content);
        let open = self.pool.run("opening memory that both hold", opening).await;
        let open = open.map_err(into_fault)?;
        let memory = HeldMemory { content, path: open.path().to_owned() };
        {
            let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            ready.retain(|(of, _)| *of != migration);
            ready.push_back((migration, Held { memory, open }));
            if ready.len() > MOST {
                ready.pop_front();
            }
        }
        let ready = Arc::clone(&self.ready);
        tokio::spawn(async move {
            tokio::time::sleep(KEPT_FOR).await;
            ready.lock().unwrap_or_else(PoisonError::into_inner).retain(|(of, _)| *of != migration);
        });
        Ok(())
    }

    /// What is ready for `migration`; once. Dropped, its memory is idle again.
    pub(super) fn take(&self, migration: MigrationId) -> Option<Held> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let at = ready.iter().position(|(of, _)| *of == migration)?;
        ready.remove(at).map(|(_, held)| held)
    }
}
