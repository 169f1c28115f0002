//! Wrong tokens, counted by where they come from (sans-IO: the time is passed in). Whoever has shown
//! too many is not heard for the rest of a minute.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_types::Fault;

/// For how long they are counted together.
const WINDOW: Duration = Duration::from_secs(60);

/// From how many places they are counted.
const PLACES: usize = 4096;

/// Recent wrong tokens.
#[derive(Debug)]
pub(crate) struct Strikes<K> {
    limit: u32,
    all: Mutex<HashMap<K, (u32, Instant)>>,
}

impl<K: Hash + Eq> Strikes<K> {
    /// So many are let pass from one place in a minute.
    pub(crate) fn new(limit: u32) -> Self {
        Self { limit, all: Mutex::default() }
    }

    /// Counts one that comes from there now; or says for how long nothing is heard from there.
    /// Checked and counted in one: many at once do not pass the limit together. One that turns out
    /// to be none is taken back with what this answers.
    pub(crate) fn reserve(&self, from: &K, now: Instant) -> Result<Instant, Duration>
    where
        K: Clone,
    {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let over = |began: &Instant| now.saturating_duration_since(*began) >= WINDOW;
        if all.len() >= PLACES && !all.contains_key(from) {
            all.retain(|_, (_, began)| !over(began));
            if all.len() >= PLACES {
                all.clear();
            }
        }
        let (count, began) = all.entry(from.clone()).or_insert((0, now));
        if over(began) {
            (*count, *began) = (0, now);
        }
        if *count >= self.limit {
            return Err(WINDOW.saturating_sub(now.saturating_duration_since(*began)));
        }
        *count += 1;
        Ok(*began)
    }

    /// Takes one back that was counted in the minute that began then.
    pub(crate) fn take_back(&self, from: &K, counted: Instant) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((count, began)) = all.get_mut(from)
            && *began == counted
        {
            *count = count.saturating_sub(1);
        }
    }
}

/// What is said to whom nobody listens any more.
pub(crate) fn too_many(from: &str, left: Duration) -> Fault {
    let words = format!("too many wrong tokens came from {from}");
    Fault::unavailable(words).hint(format!("come back in {} s", left.as_secs() + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_wrong_tokens_block_their_sender_for_a_minute_and_nobody_else() {
        let strikes = Strikes::new(3);
        let now = Instant::now();
        for n in 0..3 {
            assert_eq!(strikes.reserve(&"cafe", now + Duration::from_secs(n)), Ok(now), "{n}");
        }
        let left = strikes.reserve(&"cafe", now + Duration::from_secs(20));
        assert_eq!(left, Err(Duration::from_secs(40)));
        assert_eq!(strikes.reserve(&"bar", now), Ok(now));
        // One that was none makes room for one more.
        strikes.take_back(&"cafe", now);
        assert_eq!(strikes.reserve(&"cafe", now), Ok(now));
        assert!(strikes.reserve(&"cafe", now).is_err());
        let later = now + WINDOW;
        for n in 0..3 {
            assert_eq!(strikes.reserve(&"cafe", later), Ok(later), "counted anew {n}");
        }
        // Those of the minute before are none of this one.
        strikes.take_back(&"cafe", now);
        assert!(strikes.reserve(&"cafe", later).is_err());
    }

    #[test]
    fn places_are_bounded() {
        let strikes = Strikes::new(1);
        let now = Instant::now();
        for n in 0..3 * PLACES {
            assert!(strikes.reserve(&n, now).is_ok());
        }
        assert!(strikes.all.lock().expect("lock").len() <= PLACES);
    }
}
