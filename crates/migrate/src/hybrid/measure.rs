//! What a migration took, in the terms of the CloudAP paper, section V.

use std::time::Duration;

use godwit_types::{BytesMoved, ClockOffset, MoveReport, PagesMoved, PhaseSpan};
use serde::{Deserialize, Serialize};

use super::SCHEME;
use crate::clock::{ClockId, Exchange, Offset};
use crate::relay::{Counts, RamSection};

pub(super) use crate::clock::now;

/// What the source measured. All times are since 1970, by its clock.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    /// QEMU and the relay were about to be driven.
    pub asked: Duration,
    /// QEMU began to send memory.
    pub began: Option<Duration>,
    /// The one pre-copy round was over.
    pub round_over: Option<Duration>,
    /// QEMU was told to switch.
    pub switched: Option<Duration>,
    /// QEMU's STOP event.
    pub stopped: Option<Duration>,
    /// The destination needs the source no more.
    pub released: Option<Duration>,
    /// What the source relay counted (memory and device state).
    pub counts: Counts,
    /// How far the destination's clock is ahead of the source's, as the relays found.
    #[serde(default)]
    pub clock: Option<Offset>,
    /// The question that this answers.
    #[serde(default)]
    pub asking: Asked,
    /// What QEMU's stream says of the machine's memory.
    #[serde(default)]
    pub ram: Option<RamSection>,
    /// The source's QEMU let its machine run again after it had left.
    #[serde(default)]
    pub ran_on: bool,
}

/// When a question reached a site and when its answer left, by the clock there; since 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The question had arrived.
    pub arrived: Duration,
    /// The answer left; zero when nobody noted it.
    pub replied: Duration,
    /// Which clock that is.
    pub clock: ClockId,
}

impl Asked {
    /// A question arrives now.
    #[must_use]
    pub fn arrives() -> Self {
        Self { arrived: now(), replied: Duration::ZERO, clock: ClockId::here() }
    }

    /// Its answer leaves now.
    #[must_use]
    pub fn replies(self) -> Self {
        Self { replied: now(), ..self }
    }
}

/// The user's request as the center saw it; times since 1970 by the center's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The operation began.
    pub began: Duration,
    /// The source was asked to send.
    pub sent: Duration,
    /// The source's answer had come.
    pub returned: Duration,
    /// Which clock that is.
    pub clock: ClockId,
}

impl Request {
    /// When the operation began, by the clock of the source that answered; `None` where the two
    /// clocks could not be compared.
    #[must_use]
    pub fn at_source(&self, sent: &Sent) -> Option<Duration> {
        let Asked { arrived, replied, clock } = sent.asking;
        if clock.same(self.clock) {
            return Some(self.began);
        }
        if replied.is_zero() {
            return None;
        }
        let exchange = Exchange { sent: self.sent, arrived, replied, returned: self.returned };
        Some(exchange.offset()?.there(self.began))
    }
}

/// What the destination measured. All times are since 1970, by its clock.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Received {
    /// QEMU's RESUME event.
    pub resumed: Option<Duration>,
    /// Memory and disk were complete.
    pub complete: Option<Duration>,
    /// The machine was independent of the source.
    pub independent: Option<Duration>,
    /// The backing pivot itself.
    pub pivot: Option<Duration>,
    /// What the destination relay counted.
    pub counts: Counts,
}

/// The instants of a migration, each not before the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeline {
    /// requested, began, round over, stopped, resumed, complete, independent; since 1970.
    pub instants: [Duration; 7],
}

/// Names of the phases between the instants; those of [`godwit_types::MovePhase`].
const PHASES: [&str; 6] = ["prepare", "pre-copy", "drain", "freeze", "post-copy", "release"];

impl Timeline {
    /// From what both ends measured, by the source's clock; `None` until the migration is over.
    /// `requested` is when the user's request reached the center, where that is known. An instant
    /// that seems to lie before its predecessor is put at it.
    #[must_use]
    pub fn of(sent: &Sent, received: &Received, requested: Option<Duration>) -> Option<Self> {
        let clock = sent.clock.unwrap_or(Offset::NONE);
        let there = |at: Option<Duration>| at.map(|at| clock.here(at));
        let first = requested.map_or(sent.asked, |at| at.min(sent.asked));
        let raw = [
            Some(first),
            sent.began,
            sent.round_over.or(sent.stopped),
            sent.stopped,
            there(received.resumed),
            there(received.complete),
            there(received.independent),
        ];
        let mut instants = [first; 7];
        let mut last = first;
        for (slot, at) in instants.iter_mut().zip(raw) {
            last = last.max(at?);
            *slot = last;
        }
        Some(Self { instants })
    }

    /// STOP to RESUME.
    #[must_use]
    pub fn downtime(&self) -> Duration {
        self.instants[4] - self.instants[3]
    }

    /// Request to RESUME.
    #[must_use]
    pub fn switch_time(&self) -> Duration {
        self.instants[4] - self.instants[0]
    }

    /// Request to independence.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.instants[6] - self.instants[0]
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// The report of a finished migration; without a `request`, times count from when the source began.
#[must_use]
pub fn report(
    from: &str,
    to: &str,
    sent: &Sent,
    received: &Received,
    request: Option<Request>,
) -> Option<MoveReport> {
    let t = Timeline::of(sent, received, request.and_then(|r| r.at_source(sent)))?;
    let phases = PHASES
        .iter()
        .zip(t.instants.windows(2))
        .map(|(name, w)| PhaseSpan { name: (*name).to_owned(), ms: ms(w[1] - w[0]) })
        .collect();
    let bytes = BytesMoved {
        memory: sent.counts.bytes.memory,
        device_state: sent.counts.bytes.device_state,
        // Blocks one way, requests for them the other.
        disk: sent.counts.bytes.disk + received.counts.bytes.disk,
    };
    let pages = PagesMoved {
        data: sent.counts.data_pages,
        zero: sent.counts.zero_pages,
        repeated: sent.counts.repeated_pages,
        known: sent.counts.known_pages,
        changed: sent.counts.changed_pages,
        base: sent.counts.base_pages,
        visited: sent.counts.visited_pages,
        demanded: sent.counts.demanded_pages,
        discarded_bytes: sent.counts.discarded_bytes,
        requests: received.counts.requests,
        waited_ms: received.counts.waited_us as f64 / 1e3,
        longest_wait_ms: received.counts.longest_wait_us as f64 / 1e3,
    };
    let clock = sent.clock.map(|c| ClockOffset {
        offset_ms: c.ahead_ns as f64 / 1e6,
        bound_ms: c.bound_ns as f64 / 1e6,
    });
    Some(MoveReport {
        from: from.to_owned(),
        to: to.to_owned(),
        scheme: SCHEME.to_owned(),
        switch_ms: ms(t.switch_time()),
        downtime_ms: ms(t.downtime()),
        clock,
        total_ms: ms(t.total()),
        bytes,
        pages,
        cancelled_blocks: received.counts.disk_cancelled,
        phases,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(ms: u64) -> Option<Duration> {
        Some(Duration::from_millis(ms))
    }

    fn sent() -> Sent {
        Sent {
            asked: Duration::from_millis(1300),
            began: at(1310),
            round_over: at(3000),
            switched: at(3050),
            stopped: at(3060),
            released: at(5000),
            ..Sent::default()
        }
    }

    fn received() -> Received {
        Received {
            resumed: at(3100),
            complete: at(4900),
            independent: at(4910),
            ..Received::default()
        }
    }

    fn request(began: u64, sent: u64, returned: u64) -> Request {
        let ms = Duration::from_millis;
        Request {
            began: ms(began),
            sent: ms(sent),
            returned: ms(returned),
            clock: ClockId::default(),
        }
    }

    #[test]
    fn a_report_waits_for_the_end_and_counts_from_the_request() {
        let (mut sent, mut received) = (sent(), received());
        let r = report("center", "cafe", &sent, &received, None).unwrap();
        assert!((r.downtime_ms - 40.0).abs() < 1e-6);
        assert!((r.switch_ms - 1800.0).abs() < 1e-6);
        assert_eq!(r.clock, None);

        // The center's clock is 100 s behind; its question takes 10 ms there, the answer 30 ms.
        sent.asking.arrived = Duration::from_millis(101_250);
        sent.asking.replied = Duration::from_millis(105_000);
        let shift = |d: &mut Option<Duration>| *d = d.map(|d| d + Duration::from_secs(100));
        sent.asked += Duration::from_secs(100);
        for d in [&mut sent.began, &mut sent.round_over, &mut sent.stopped] {
            shift(d);
        }
        for d in [&mut received.resumed, &mut received.complete, &mut received.independent] {
            shift(d);
        }
        let asked = request(1000, 1240, 5030);
        let r = report("center", "cafe", &sent, &received, Some(asked)).unwrap();
        assert!((r.switch_ms - 2110.0).abs() <= 20.0, "{r:?}: off by half of the round trip");
        assert!((r.phases[0].ms - 320.0).abs() <= 20.0, "preparation is a part of it: {r:?}");

        received.resumed = None;
        assert!(report("center", "cafe", &sent, &received, None).is_none());
    }

    #[test]
    fn the_destinations_times_are_read_by_the_sources_clock() {
        let (mut sent, mut received) = (sent(), received());
        let lead = Duration::from_secs(3600);
        for d in [&mut received.resumed, &mut received.complete, &mut received.independent] {
            *d = d.map(|d| d + lead);
        }
        let wrong = report("center", "cafe", &sent, &received, None).unwrap();
        assert!(wrong.downtime_ms > 3_000_000.0);
        sent.clock = Some(Offset { ahead_ns: 3_600_000_400_000, bound_ns: 400_000 });
        let r = report("center", "cafe", &sent, &received, None).unwrap();
        assert!((r.downtime_ms - 39.6).abs() < 1e-6, "{r:?}");
        assert_eq!(r.downtime_text(), "40 ms (+-0.4)");
    }

    proptest! {
        #[test]
        fn phases_add_up_to_the_total_whatever_the_clocks_say(
            times in proptest::array::uniform8(0u64..20_000),
            ahead_ms in -5_000i64..5_000,
            began in 0u64..20_000, stay in 0u64..5_000, ways in 0u64..2_000,
        ) {
            let [asked, began_at, over, stopped, resumed, complete, independent, arrived] = times;
            let sent = Sent {
                asked: Duration::from_millis(asked),
                began: at(began_at),
                round_over: at(over),
                stopped: at(stopped),
                clock: Some(Offset { ahead_ns: ahead_ms * 1_000_000, bound_ns: 5 }),
                asking: Asked {
                    arrived: Duration::from_millis(arrived),
                    replied: Duration::from_millis(arrived + stay + 1),
                    clock: ClockId::default(),
                },
                ..Sent::default()
            };
            let received = Received {
                resumed: at(resumed),
                complete: at(complete),
                independent: at(independent),
                ..Received::default()
            };
            let request = request(began, began + 5, began + 6 + stay + ways);
            let r = report("a", "b", &sent, &received, Some(request)).unwrap();
            let sum = |n: usize| r.phases.iter().take(n).map(|p| p.ms).sum::<f64>();
            prop_assert!(r.phases.iter().all(|p| p.ms >= 0.0));
            prop_assert!((sum(6) - r.total_ms).abs() < 1e-6);
            prop_assert!((sum(4) - r.switch_ms).abs() < 1e-6);
            prop_assert!((r.phases[3].ms - r.downtime_ms).abs() < 1e-6);
        }
    }
}
