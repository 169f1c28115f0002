//! The sender's core for one lane. Sans-IO: messages in, hashes to answer out.

use std::collections::{HashSet, VecDeque};

use godwit_types::Hash;

use super::ChunkMsg;
use crate::wire::WireError;

/// The most units that a receiver may have asked for on one lane.
const MAX_QUEUE: usize = 64 << 10;

/// What one lane's receiver asked for and did not get yet.
#[derive(Debug, Default)]
pub struct Supplier {
    queue: VecDeque<Hash>,
    wanted: HashSet<Hash>,
}

impl Supplier {
    /// Nothing asked for yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a message from the receiver. A [`ChunkMsg::Have`] is for the skin, and not given here.
    ///
    /// # Errors
    /// [`WireError`] when more is asked for than is allowed, or the message is not a receiver's.
    pub fn on_message(&mut self, message: ChunkMsg) -> Result<(), WireError> {
        match message {
            ChunkMsg::Want(hashes) => {
                for hash in hashes {
                    if self.wanted.insert(hash) {
                        self.queue.push_back(hash);
                    }
                }
                if self.queue.len() > MAX_QUEUE {
                    return Err(WireError::Bounds {
                        what: "chunk message",
                        why: "more than 65536 units are asked for at once",
                    });
                }
                Ok(())
            }
            ChunkMsg::Cancel(hashes) => {
                for hash in hashes {
                    self.wanted.remove(&hash);
                }
                self.queue.retain(|hash| self.wanted.contains(hash));
                Ok(())
            }
            _ => Err(WireError::Bounds { what: "chunk message", why: "only a sender sends it" }),
        }
    }

    /// The next units to answer, at most `limit`, in the order in which they were asked for.
    pub fn next_batch(&mut self, limit: usize) -> Vec<Hash> {
        let count = limit.min(self.queue.len());
        let batch: Vec<Hash> = self.queue.drain(..count).collect();
        for hash in &batch {
            self.wanted.remove(hash);
        }
        batch
    }

    /// Nothing is asked for.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asked_twice_is_answered_once_and_cancelled_is_not_answered() {
        let h = |n: u8| Hash::of(&[n]);
        let mut s = Supplier::new();
        s.on_message(ChunkMsg::Want(vec![h(1), h(2), h(1), h(3)])).expect("good");
        s.on_message(ChunkMsg::Cancel(vec![h(2)])).expect("good");
        assert_eq!(s.next_batch(10), [h(1), h(3)]);
        assert!(s.is_idle());
        assert!(s.on_message(ChunkMsg::Missing(vec![])).is_err());
    }
}
