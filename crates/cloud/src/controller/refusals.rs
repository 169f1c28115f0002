//! Which refused requests are entered into the audit log: whoever asks for what it may not, again
//! and again, fills neither the log nor the disk.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_types::Name;

/// Equal refusals are entered once in this time.
const WINDOW: Duration = Duration::from_secs(60);

/// Refusals of one user that are entered in that time.
const MAX_IN_WINDOW: usize = 32;

/// Users that are remembered; beyond these, all begin anew.
const MAX_USERS: usize = 10_000;

#[derive(Debug)]
struct Window {
    began: Instant,
    entered: BTreeSet<String>,
    /// Those that were not entered, since the last one that was.
    left_out: u64,
}

/// The user's id, and the site that handed the request over.
type From = (Name, Option<Name>);

/// Recent refusals. What comes by a site takes no room in the log from what its user asks
/// elsewhere.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<HashMap<From, Window>>);

impl Refusals {
    /// Whether to enter that `user`, by that site, was refused `object`; if so, how many were left out before.
    pub(super) fn admit(
        &self,
        user: &Name,
        by: Option<&Name>,
        object: &str,
        now: Instant,
    ) -> Option<u64> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MAX_USERS {
            all.clear();
        }
        let new = || Window { began: now, entered: BTreeSet::new(), left_out: 0 };
        let w = all.entry((user.clone(), by.cloned())).or_insert_with(new);
        if now.saturating_duration_since(w.began) >= WINDOW {
            (w.began, w.entered) = (now, BTreeSet::new());
        }
        let object: String = object.chars().take(200).collect();
        if w.entered.len() >= MAX_IN_WINDOW || !w.entered.insert(object) {
            w.left_out += 1;
            return None;
        }
        Some(std::mem::take(&mut w.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_refusals_are_entered_once_a_minute_and_each_user_has_so_many() {
        let refusals = Refusals::default();
        let name = |n: &str| Name::new(n).expect("name");
        let (eve, ann, now) = (name("u-eve"), name("u-ann"), Instant::now());
        assert_eq!(refusals.admit(&eve, None, "GET /metrics", now), Some(0));
        for _ in 0..500 {
            assert_eq!(refusals.admit(&eve, None, "GET /metrics", now), None);
        }
        assert_eq!(
            refusals.admit(&ann, None, "GET /metrics", now),
            Some(0),
            "another user has its own"
        );
        let entered = (0..500)
            .filter_map(|i| refusals.admit(&eve, None, &format!("GET /v1/images/{i}"), now))
            .collect::<Vec<_>>();
        assert_eq!((entered.len(), entered[0]), (MAX_IN_WINDOW - 1, 500));
        let (first, cafe) =
            (refusals.admit(&eve, Some(&name("cafe")), "GET /metrics", now), Some(0));
        assert_eq!(first, cafe, "what came by a site is counted by itself");
        let later = now + WINDOW;
        assert_eq!(refusals.admit(&eve, None, "GET /metrics", later), Some(500 - 31));
        assert_eq!(refusals.admit(&eve, None, "GET /metrics", later), None);
    }
}
