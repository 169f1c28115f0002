//! How far the clocks of two hosts are apart, by questions over the link between them.
//!
//! ```text
//!   here    sent -------------------------------- returned
//!              \                                 /
//!   there       arrived ------------- replied --
//! ```
//!
//! As in NTP (RFC 5905, section 8): the far clock's lead is the mean of `arrived - sent` and
//! `replied - returned`, and however unequal the two ways are, it is off by no more than half of
//! the round trip. Of many exchanges the one with the least round trip counts. Two ends on one host
//! share one clock, and then nothing is measured.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// Exchanges that follow each other at the beginning.
const BURST: u32 = 8;
/// The pause between two exchanges after them.
const PAUSE: Duration = Duration::from_millis(250);

/// Time since 1970 by this host's clock, which also stamps QEMU's events.
#[must_use]
pub fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Which clock a time is from: the same value for everything that runs on one kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockId(Option<u128>);

impl ClockId {
    /// The clock of this host; unknown where the kernel does not say when it was booted.
    #[must_use]
    pub fn here() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self(u128::from_str_radix(&text.trim().replace('-', ""), 16).ok())
    }

    /// Whether both are known to be one clock.
    #[must_use]
    pub fn same(self, other: Self) -> bool {
        self.0.is_some() && self == other
    }
}

/// How far a far clock is ahead of the one here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offset {
    /// Far time minus time here, in nanoseconds.
    pub ahead_ns: i64,
    /// It is off by no more than this many nanoseconds.
    pub bound_ns: u64,
}

impl Offset {
    /// Both ends share one clock.
    pub const NONE: Self = Self { ahead_ns: 0, bound_ns: 0 };

    /// A time of the far clock, by the clock here.
    #[must_use]
    pub fn here(self, far: Duration) -> Duration {
        let shift = Duration::from_nanos(self.ahead_ns.unsigned_abs());
        if self.ahead_ns < 0 { far.saturating_add(shift) } else { far.saturating_sub(shift) }
    }

    /// A time of the clock here, by the far clock.
    #[must_use]
    pub fn there(self, here: Duration) -> Duration {
        let shift = Duration::from_nanos(self.ahead_ns.unsigned_abs());
        if self.ahead_ns < 0 { here.saturating_sub(shift) } else { here.saturating_add(shift) }
    }
}

/// A question and its answer. `sent` and `returned` are times of the clock here, the others of the
/// far one; all since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    /// The question left.
    pub sent: Duration,
    /// The question had arrived.
    pub arrived: Duration,
    /// The answer left.
    pub replied: Duration,
    /// The answer had arrived.
    pub returned: Duration,
}

fn signed(d: Duration) -> i128 {
    i128::try_from(d.as_nanos()).unwrap_or(i128::MAX)
}

impl Exchange {
    /// The far clock's lead by this exchange; `None` for times that no exchange has.
    #[must_use]
    pub fn offset(&self) -> Option<Offset> {
        let [sent, arrived, replied, returned] =
            [self.sent, self.arrived, self.replied, self.returned].map(signed);
        let round_trip = (returned - sent) - (replied - arrived);
        if returned < sent || replied < arrived || round_trip < 0 {
            return None;
        }
        let ahead = ((arrived - sent) + (replied - returned)) / 2;
        Some(Offset {
            ahead_ns: i64::try_from(ahead).ok()?,
            bound_ns: u64::try_from(round_trip).ok()?.div_ceil(2),
        })
    }
}

/// Asks a far end for its time, one question at a time, and keeps the best answer.
#[derive(Debug, Default)]
pub(crate) struct Compare {
    asked: Option<Duration>,
    answers: u32,
    last: Duration,
    best: Option<Offset>,
}

impl Compare {
    /// Whether a question should leave now; it carries `now`.
    pub(crate) fn ask(&mut self, now: Duration) -> bool {
        let due = self.answers < BURST || now.saturating_sub(self.last) >= PAUSE;
        let ask = due && self.asked.is_none() && self.best != Some(Offset::NONE);
        if ask {
            self.asked = Some(now);
        }
        ask
    }

    /// An answer has come; one to a question that was not asked changes nothing.
    pub(crate) fn answer(&mut self, exchange: Exchange, same_clock: bool) {
        if self.asked.take_if(|at| *at == exchange.sent).is_none() {
            return;
        }
        self.answers = self.answers.saturating_add(1);
        self.last = exchange.returned;
        let found = if same_clock { Some(Offset::NONE) } else { exchange.offset() };
        if let Some(found) = found
            && self.best.is_none_or(|best| found.bound_ns <= best.bound_ns)
        {
            self.best = Some(found);
        }
    }

    pub(crate) fn best(&self) -> Option<Offset> {
        self.best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: u64 = 1_700_000_000_000_000_000;

    fn exchange(sent: u64, ahead: i64, there: u64, stay: u64, back: u64) -> Exchange {
        let far = |t: u64| Duration::from_nanos((BASE + t).saturating_add_signed(ahead));
        let near = |t: u64| Duration::from_nanos(BASE + t);
        Exchange {
            sent: near(sent),
            arrived: far(sent + there),
            replied: far(sent + there + stay),
            returned: near(sent + there + stay + back),
        }
    }

    proptest! {
        #[test]
        fn the_true_lead_lies_within_the_bound_however_unequal_the_ways(
            ahead in -4_000_000_000_000i64..4_000_000_000_000,
            there in 0u64..500_000_000,
            stay in 0u64..5_000_000_000,
            back in 0u64..500_000_000,
        ) {
            let found = exchange(0, ahead, there, stay, back).offset().expect("an exchange");
            prop_assert!(found.ahead_ns.abs_diff(ahead) <= found.bound_ns);
            prop_assert_eq!(found.bound_ns, (there + back).div_ceil(2));
            let far = Duration::from_nanos(BASE.saturating_add_signed(ahead));
            prop_assert_eq!(found.there(found.here(far)), far);
            let here = found.here(far).as_nanos() as i128;
            prop_assert!((here - i128::from(BASE)).unsigned_abs() <= u128::from(found.bound_ns));
        }
    }

    #[test]
    fn the_least_round_trip_counts_and_only_answers_that_were_asked_for() {
        let mut c = Compare::default();
        let at = |t: u64| Duration::from_nanos(BASE + t);
        assert!(c.ask(at(0)));
        assert!(!c.ask(at(1)), "one at a time");
        c.answer(exchange(7, 5_000, 1, 0, 1), false);
        assert_eq!(c.best(), None, "nobody asked at 7");
        c.answer(exchange(0, 5_000, 9_000, 10, 1_000), false);
        assert_eq!(c.best().map(|o| o.bound_ns), Some(5_000));
        for n in 1..u64::from(BURST) {
            assert!(c.ask(at(n * 20_000)));
            let slow = n * 3_000;
            c.answer(exchange(n * 20_000, 5_000, slow, 0, 0), false);
        }
        assert_eq!(c.best(), Some(Offset { ahead_ns: 6_500, bound_ns: 1_500 }));
        assert!(!c.ask(at(1_000_000)), "after the first ones there is a pause");
        assert!(c.ask(at(400_000_000)));
    }

    #[test]
    fn one_clock_is_not_measured() {
        let mut c = Compare::default();
        let at = Duration::from_nanos(BASE);
        assert!(c.ask(at));
        c.answer(exchange(0, 0, 17_500_000, 0, 17_500_000), true);
        assert_eq!(c.best(), Some(Offset::NONE));
        assert!(!c.ask(at + Duration::from_secs(9)));
        assert!(ClockId::here().same(ClockId::here()) && !ClockId(None).same(ClockId(None)));
    }

    #[test]
    fn times_that_run_backwards_say_nothing() {
        let mut e = exchange(0, 0, 10, 0, 10);
        e.returned = e.sent - Duration::from_nanos(1);
        assert_eq!(e.offset(), None);
    }
}
