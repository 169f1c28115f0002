//! How much bulk may be under way: little more than the path holds.
//!
//! What is sent beyond the bandwidth-delay product only waits in a queue, and the device state
//! would wait behind it. So the limit follows the largest recent delivery rate times the
//! smallest round trip, with room to grow. The far relay acknowledges a frame when QEMU has
//! taken it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The limit to begin with, in bytes.
const FIRST: u64 = 128 << 10;
/// Never less than this: two frames.
const LEAST: u64 = 128 << 10;
/// Never more than this; less than what a QUIC lane buffers, so that sending never waits there.
const MOST: u64 = 6 << 20;
/// The most bytes of QEMU's stream that frames under way may stand for: where pages are only named
/// this, and not the link, holds the source back to what the destination's QEMU takes.
const MOST_MEANT: u64 = 64 << 20;
/// How long a rate is remembered.
const RATE_WINDOW: Duration = Duration::from_secs(2);
/// How long a round trip is remembered.
const RTT_WINDOW: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Sent {
    bytes: u64,
    meant: u64,
    at: Instant,
    acked_then: u64,
}

/// The window of one bulk lane.
#[derive(Debug)]
pub(crate) struct Pacer {
    under_way: VecDeque<Sent>,
    sent: u64,
    acked: u64,
    /// Bytes of QEMU's stream that what is under way stands for.
    meant: u64,
    rates: VecDeque<(Instant, f64)>,
    trips: VecDeque<(Instant, Duration)>,
    limit: u64,
}

impl Pacer {
    pub(crate) fn new() -> Self {
        Self {
            under_way: VecDeque::new(),
            sent: 0,
            acked: 0,
            meant: 0,
            rates: VecDeque::new(),
            trips: VecDeque::new(),
            limit: FIRST,
        }
    }

    /// Bytes sent and not acknowledged.
    pub(crate) fn in_flight(&self) -> u64 {
        self.sent - self.acked
    }

    /// Whether more may be sent.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight() < self.limit && self.meant < MOST_MEANT
    }

    /// A frame of `bytes` was sent that stands for `meant` bytes of QEMU's stream.
    pub(crate) fn on_sent(&mut self, bytes: u64, meant: u64, now: Instant) {
        self.sent += bytes;
        self.meant += meant;
        self.under_way.push_back(Sent { bytes, meant, at: now, acked_then: self.acked });
    }

    /// The oldest `frames` frames under way have arrived. More than are under way is ignored.
    pub(crate) fn on_ack(&mut self, frames: u64, now: Instant) {
        for _ in 0..frames {
            let Some(frame) = self.under_way.pop_front() else { return };
            self.acked += frame.bytes;
            self.meant -= frame.meant;
            let trip = now.saturating_duration_since(frame.at).max(Duration::from_micros(50));
            let rate = (self.acked - frame.acked_then) as f64 / trip.as_secs_f64();
            while self.rates.back().is_some_and(|(_, r)| *r <= rate) {
                self.rates.pop_back();
            }
            self.rates.push_back((now, rate));
            while self.trips.back().is_some_and(|(_, t)| *t >= trip) {
                self.trips.pop_back();
            }
            self.trips.push_back((now, trip));
        }
        while self
            .rates
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > RATE_WINDOW)
            && self.rates.len() > 1
        {
            self.rates.pop_front();
        }
        while self
            .trips
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > RTT_WINDOW)
            && self.trips.len() > 1
        {
            self.trips.pop_front();
        }
        if let (Some((_, rate)), Some((_, trip))) = (self.rates.front(), self.trips.front()) {
            let product = rate * trip.as_secs_f64();
            self.limit = ((product * 1.25) as u64 + (64 << 10)).clamp(LEAST, MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of `rate` bytes/s and `trip` round trip, driven in simulated time; gives the
    /// largest amount under way in the second half.
    fn drive(rate: f64, trip: f64) -> (u64, f64) {
        let t0 = Instant::now();
        let at = |s: f64| t0 + Duration::from_secs_f64(s);
        let mut pacer = Pacer::new();
        let mut acks: VecDeque<f64> = VecDeque::new();
        let (mut now, mut link_free, mut peak, mut done) = (0.0f64, 0.0f64, 0, 0u64);
        let frame = 40_000u64;
        while now < 6.0 {
            while pacer.has_room() {
                pacer.on_sent(frame, frame, at(now));
                link_free = link_free.max(now) + frame as f64 / rate;
                acks.push_back(link_free + trip);
            }
            if now > 3.0 {
                peak = peak.max(pacer.in_flight());
            }
            now = acks.pop_front().expect("under way");
            pacer.on_ack(1, at(now));
            done += frame;
        }
        (peak, done as f64 / now)
    }

    #[test]
    fn the_link_is_filled_with_little_more_than_it_holds() {
        for (rate, trip) in [(12.5e6, 0.035), (12.5e6, 0.002), (1e6, 0.1)] {
            let (peak, reached) = drive(rate, trip);
            let product = rate * trip;
            assert!(reached > 0.85 * rate, "{reached} of {rate}");
            // At most 200 ms of the product's share may stand in the queue.
            assert!((peak as f64) < product * 2.5 + 256e3, "{peak} for {product}");
        }
    }
}
