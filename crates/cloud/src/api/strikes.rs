//! Wrong tokens, counted by where they come from (sans-IO: the time is passed in). Whoever has shown
//! too many is not heard for the rest of a minute, whatever it shows.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_types::Fault;

/// For how long they are counted together.
const WINDOW: Duration = Duration::from_secs(60);

/// From how many places they are counted.
const PLACES: usize = 4096;

/// The wrong tokens of late.
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

    /// For how long `from` is not heard any more, if it is not.
    pub(crate) fn shut(&self, from: &K, now: Instant) -> Option<Duration> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, began) = all.get(from)?;
        let left = WINDOW.checked_sub(now.saturating_duration_since(*began))?;
        (*count >= self.limit && !left.is_zero()).then_some(left)
    }

    /// One more came from there.
    pub(crate) fn add(&self, from: K, now: Instant) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let over = |began: &Instant| now.saturating_duration_since(*began) >= WINDOW;
        if all.len() >= PLACES && !all.contains_key(&from) {
            all.retain(|_, (_, began)| !over(began));
            if all.len() >= PLACES {
                all.clear();
            }
        }
        let (count, began) = all.entry(from).or_insert((0, now));
        if over(began) {
            (*count, *began) = (0, now);
        }
        *count = count.saturating_add(1);
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
    fn who_shows_too_many_is_not_heard_for_a_minute_and_others_are() {
        let strikes = Strikes::new(3);
        let now = Instant::now();
        for n in 0..3 {
            assert_eq!(strikes.shut(&"cafe", now), None, "{n}");
            strikes.add("cafe", now + Duration::from_secs(n));
        }
        let left = strikes.shut(&"cafe", now + Duration::from_secs(20));
        assert_eq!(left, Some(Duration::from_secs(40)));
        assert_eq!(strikes.shut(&"bar", now), None);
        let later = now + WINDOW;
        assert_eq!(strikes.shut(&"cafe", later), None);
        strikes.add("cafe", later);
        assert_eq!(strikes.shut(&"cafe", later), None, "counted anew");
    }

    #[test]
    fn places_are_bounded() {
        let strikes = Strikes::new(1);
        let now = Instant::now();
        for n in 0..3 * PLACES {
            strikes.add(n, now);
        }
        assert!(strikes.all.lock().expect("lock").len() <= PLACES);
    }
}
