//! Places that many want: so many in all, and so many under one key, so that no tenant takes what
//! the others need.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The places that are taken, by key.
#[derive(Debug, Clone, Default)]
pub(super) struct Shares(Arc<Mutex<HashMap<String, usize>>>);

/// A place; it is free again when dropped.
#[derive(Debug)]
pub(super) struct Share {
    of: Shares,
    key: String,
}

impl Shares {
    fn taken(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place under `key`, where there are `each`, of `all` under all keys; none when those are
    /// taken.
    pub(super) fn place(&self, key: String, each: usize, all: usize) -> Option<Share> {
        let mut taken = self.taken();
        let here = taken.get(&key).copied().unwrap_or_default();
        if here >= each || taken.values().sum::<usize>() >= all {
            return None;
        }
        taken.insert(key.clone(), here + 1);
        drop(taken);
        Some(Share { of: self.clone(), key })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.of.taken();
        if let Some(n) = taken.get_mut(&self.key) {
            *n -= 1;
            if *n == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_more_than_its_share_and_what_is_dropped_is_free_again() {
        let shares = Shares::default();
        let take = |key: &str| shares.place(key.to_owned(), 2, 3);
        let first = take("acme").expect("room");
        let _second = take("acme").expect("room");
        assert!(take("acme").is_none(), "its share is taken");
        let _other = take("other").expect("room for others");
        assert!(take("third").is_none(), "all are taken");
        drop(first);
        assert!(take("third").is_some(), "free again");
        assert!(shares.taken().values().all(|n| *n == 1), "{shares:?}");
    }
}
