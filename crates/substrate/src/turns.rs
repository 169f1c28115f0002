//! One import of a substrate at a time.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use godwit_types::SubstrateId;

use crate::pool::lock;

/// The ids that are being imported.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    taken: Mutex<HashSet<SubstrateId>>,
    given_back: Condvar,
}

/// The right to import one substrate, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    of: Arc<Turns>,
    id: SubstrateId,
}

impl Turns {
    /// The turn of `id`, if nobody has it.
    pub(crate) fn take(self: &Arc<Self>, id: SubstrateId) -> Option<Turn> {
        lock(&self.taken).insert(id).then(|| Turn { of: Arc::clone(self), id })
    }

    /// Waits until nobody else imports `id`.
    pub(crate) fn wait(self: &Arc<Self>, id: SubstrateId) -> Turn {
        let taken = lock(&self.taken);
        let mut taken = self
            .given_back
            .wait_while(taken, |taken| taken.contains(&id))
            .unwrap_or_else(PoisonError::into_inner);
        taken.insert(id);
        Turn { of: Arc::clone(self), id }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.of.taken).remove(&self.id);
        self.of.given_back.notify_all();
    }
}
