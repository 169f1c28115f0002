//! When a certificate is renewed (sans-IO: the time is passed in).
//!
//! ```text
//!  issued ---- a third of its life ---- due: asked for ---- ... ---- ended
//!                                        |  ^ failed
//!                                        v  | (a thirtieth of what is left, at most an hour)
//! ```
//! Two thirds of its life are left for a center that is away to come back.

use std::time::Duration;

use super::Peer;

/// The longest wait in seconds, since a host may sleep, and its clock may be set.
const LONGEST_S: u64 = 3600;

/// The renewal of one certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewal {
    /// One that is not good yet was made by a clock that was ahead, and is of no use.
    begins: u64,
    due: u64,
    ends: u64,
}

impl Renewal {
    /// That of the certificate that says this.
    #[must_use]
    pub const fn of(me: &Peer) -> Self {
        let life = me.not_after.saturating_sub(me.not_before);
        Self {
            begins: me.not_before,
            due: me.not_before.saturating_add(life / 3),
            ends: me.not_after,
        }
    }

    /// Whether it is to be asked for at `now` (seconds since 1970).
    #[must_use]
    pub const fn is_due(&self, now: u64) -> bool {
        now >= self.due || now < self.begins
    }

    /// How long to wait until the next look.
    #[must_use]
    pub fn wait(&self, now: u64) -> Duration {
        if self.is_due(now) {
            return Duration::ZERO;
        }
        Duration::from_secs(self.due.saturating_sub(now).min(LONGEST_S))
    }

    /// It could not be had at `now`.
    pub fn failed(&mut self, now: u64) {
        let pause = (self.ends.saturating_sub(now) / 30).clamp(1, LONGEST_S);
        self.due = now.saturating_add(pause);
        self.begins = 0;
    }
}

#[cfg(test)]
mod tests {
    use godwit_types::{Name, SiteKind};

    use super::super::Serial;
    use super::*;

    #[test]
    fn it_is_asked_for_at_a_third_and_again_until_it_is_had() {
        const DAY: u64 = 86_400;
        let me = Peer {
            name: Name::new("cafe").expect("name"),
            kind: SiteKind::Ap,
            serial: Serial::from_bytes(&[1]),
            not_before: 1000 * DAY,
            not_after: 1090 * DAY,
        };
        let mut r = Renewal::of(&me);
        assert!(!r.is_due(1029 * DAY));
        assert_eq!(r.wait(1030 * DAY - 10), Duration::from_secs(10));
        assert_eq!(r.wait(1000 * DAY), Duration::from_secs(3600), "clocks are set, hosts sleep");
        assert!(r.is_due(1030 * DAY));
        // It was made by a clock that was a month ahead.
        assert!(r.is_due(970 * DAY) && r.wait(970 * DAY) == Duration::ZERO);
        // The center is away until shortly before the end.
        let mut now = 1030 * DAY;
        let mut tries = 0u64;
        while now < me.not_after {
            r.failed(now);
            assert!(!r.is_due(now) && r.wait(now) > Duration::ZERO);
            now += r.wait(now).as_secs();
            assert!(r.is_due(now));
            tries += 1;
        }
        assert!((60 * 24..60 * 24 + 300).contains(&tries), "{tries} tries in 60 days");
    }
}
