//! How much bulk may be in flight: enough to fill the path, little enough to leave no queue.
//!
//! A page that a vCPU waits for goes before bulk inside this host, but not in the routers after
//! it: what queues there delays it. So bulk is kept at 1.25 times the bandwidth-delay product,
//! measured by the far end's acknowledgements: the highest delivery rate of the last ten rounds
//! times the smallest round-trip time of the last ten seconds. The idea is BBR's; here it works
//! on the application's bytes, above QUIC's own congestion control, which then never sees the
//! queue that would make it grow or the loss that would make it shrink.
//!
//! ```text
//!            rate grows < 25 % in 3 rounds           min RTT is 10 s old
//!  Start ------------------------------------> Cruise -----------------> Drain
//!  gain 2.5                                    gain 1.25 <-------------- gain 0.75
//!                                                     one round trip (at least 50 ms)
//! ```
//! Sans-IO: bytes sent, bytes acknowledged and the time come in; how many bytes may be sent comes
//! out. Time is a [`Duration`] since any fixed instant.

use std::collections::VecDeque;
use std::time::Duration;

/// Bounds of a [`Window`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowConfig {
    /// Never less in flight than this, in bytes. Default 32 KiB.
    pub floor: u64,
    /// Never more than this, in bytes. Default 16 MiB: 1 Gbit/s at 100 ms.
    pub ceiling: u64,
}

impl Default for WindowConfig {
    fn default() -> Self {
        Self { floor: 32 << 10, ceiling: 16 << 20 }
    }
}

/// How a [`Window`] behaves at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowPhase {
    /// Looking for the rate.
    Start,
    /// At the rate.
    Cruise,
    /// Sending less, to see the path without a queue.
    Drain,
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    /// All bytes sent up to and with this piece.
    end: u64,
    at: Duration,
    /// Bytes delivered, and when, as this piece was sent.
    delivered: u64,
    delivered_at: Duration,
    /// The sender had less to send than the window allowed.
    starved: bool,
}

const RATE_ROUNDS: u64 = 10;
const RTT_LIFE: Duration = Duration::from_secs(10);
const DRAIN_AT_LEAST: Duration = Duration::from_millis(50);

/// Keeps the bulk bytes in flight near the bandwidth-delay product.
#[derive(Debug)]
pub struct Window {
    config: WindowConfig,
    phase: WindowPhase,
    sent: u64,
    delivered: u64,
    delivered_at: Duration,
    pieces: VecDeque<Sent>,
    /// Highest delivery rates by round, bytes per second.
    rates: VecDeque<(u64, f64)>,
    round: u64,
    round_end: u64,
    min_rtt: Option<Duration>,
    min_rtt_at: Duration,
    drain_until: Duration,
    drain_min: Option<Duration>,
    drained_at: Option<Duration>,
    /// When the last acknowledgement came.
    now: Duration,
    full_rate: f64,
    flat_rounds: u32,
    starved: bool,
}

impl Window {
    /// A window that knows nothing of its path.
    #[must_use]
    pub fn new(config: WindowConfig) -> Self {
        Self {
            config,
            phase: WindowPhase::Start,
            sent: 0,
            delivered: 0,
            delivered_at: Duration::ZERO,
            pieces: VecDeque::new(),
            rates: VecDeque::new(),
            round: 0,
            round_end: 0,
            min_rtt: None,
            min_rtt_at: Duration::ZERO,
            drain_until: Duration::ZERO,
            drain_min: None,
            drained_at: None,
            now: Duration::ZERO,
            full_rate: 0.0,
            flat_rounds: 0,
            starved: false,
        }
    }

    /// Bytes sent and not acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.sent - self.delivered
    }

    /// The measured rate of the path in bytes per second; `None` before the first round.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        self.rates.iter().map(|(_, rate)| *rate).reduce(f64::max)
    }

    /// The smallest round-trip time of the last ten seconds.
    #[must_use]
    pub fn min_rtt(&self) -> Option<Duration> {
        self.min_rtt
    }

    /// How it behaves at the moment.
    #[must_use]
    pub fn phase(&self) -> WindowPhase {
        self.phase
    }

    /// How many bytes should be in flight.
    #[must_use]
    pub fn target(&self) -> u64 {
        let gain = match self.phase {
            WindowPhase::Start => 2.5,
            WindowPhase::Cruise => 0.75 + 0.5 * self.ramp(),
            WindowPhase::Drain => 0.75,
        };
        let product = match (self.rate(), self.min_rtt) {
            (Some(rate), Some(rtt)) => (rate * rtt.as_secs_f64() * gain) as u64,
            _ => 0,
        };
        let floor = match self.phase {
            WindowPhase::Start => self.config.floor * 2,
            _ => self.config.floor,
        };
        product.clamp(floor, self.config.ceiling.max(floor))
    }

    /// After a drain the target returns over two round trips, as a jump would be a burst that
    /// queues: 0 at the end of the drain, 1 from two round trips later on.
    fn ramp(&self) -> f64 {
        match (self.drained_at, self.min_rtt) {
            (Some(at), Some(rtt)) if !rtt.is_zero() => {
                (self.now.saturating_sub(at).as_secs_f64() / (2.0 * rtt.as_secs_f64())).min(1.0)
            }
            _ => 1.0,
        }
    }

    /// How many bytes may be sent now.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.target().saturating_sub(self.in_flight())
    }

    /// `bytes` were handed to the link at `now`.
    pub fn on_sent(&mut self, bytes: u64, now: Duration) {
        if bytes == 0 {
            return;
        }
        if self.in_flight() == 0 {
            // The pause before says nothing about the path.
            self.delivered_at = now;
        }
        self.sent += bytes;
        self.pieces.push_back(Sent {
            end: self.sent,
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            starved: self.starved,
        });
        self.starved = false;
    }

    /// The sender has nothing to send though there is room: the rate seen next is its own, not
    /// the path's.
    pub fn on_starved(&mut self) {
        self.starved = true;
    }

    /// The far end has `total` bytes of all that were ever sent. A lower total than before, or
    /// one above what was sent, is ignored.
    pub fn on_acked(&mut self, total: u64, now: Duration) {
        if total <= self.delivered || total > self.sent {
            return;
        }
        self.delivered = total;
        self.delivered_at = now;
        self.now = now;
        let mut last = None;
        while self.pieces.front().is_some_and(|p| p.end <= total) {
            last = self.pieces.pop_front();
        }
        let Some(piece) = last else { return };
        self.see_rtt(now.saturating_sub(piece.at), now);
        let new_round = piece.delivered >= self.round_end;
        if new_round {
            self.round += 1;
            self.round_end = self.delivered;
        }
        self.see_rate(&piece, now);
        if new_round {
            self.leave_start(piece.starved);
        }
        self.step(now);
    }

    /// The link was cut and came back: what was in flight is unknown, what was learnt of the
    /// path may no longer hold.
    pub fn on_reconnected(&mut self) {
        *self = Self::new(self.config);
    }

    fn see_rtt(&mut self, rtt: Duration, now: Duration) {
        if self.phase == WindowPhase::Drain {
            self.drain_min = Some(self.drain_min.map_or(rtt, |m| m.min(rtt)));
        }
        if self.min_rtt.is_none_or(|min| rtt <= min) {
            self.min_rtt = Some(rtt);
            self.min_rtt_at = now;
        }
    }

    fn see_rate(&mut self, piece: &Sent, now: Duration) {
        let span = now.saturating_sub(piece.delivered_at);
        // A span shorter than the path is an artefact of acknowledgements that came in a bunch.
        let span = span.max(self.min_rtt.unwrap_or_default());
        if span.is_zero() {
            return;
        }
        let rate = (self.delivered - piece.delivered) as f64 / span.as_secs_f64();
        let best = self.rate().unwrap_or(0.0);
        if piece.starved && rate < best {
            return;
        }
        match self.rates.back_mut() {
            Some((round, highest)) if *round == self.round => *highest = highest.max(rate),
            _ => self.rates.push_back((self.round, rate)),
        }
        while self.rates.len() > 1
            && self.rates.front().is_some_and(|(round, _)| round + RATE_ROUNDS < self.round)
        {
            self.rates.pop_front();
        }
    }

    fn leave_start(&mut self, starved: bool) {
        if self.phase != WindowPhase::Start || starved {
            return;
        }
        let rate = self.rate().unwrap_or(0.0);
        if rate > self.full_rate * 1.25 {
            self.full_rate = rate;
            self.flat_rounds = 0;
        } else {
            self.flat_rounds += 1;
            if self.flat_rounds >= 3 {
                self.phase = WindowPhase::Cruise;
            }
        }
    }

    fn step(&mut self, now: Duration) {
        match self.phase {
            WindowPhase::Cruise if now.saturating_sub(self.min_rtt_at) > RTT_LIFE => {
                self.phase = WindowPhase::Drain;
                self.drain_min = None;
                // The queue empties first, then one round is measured.
                let rtt = self.min_rtt.unwrap_or_default();
                self.drain_until = now + (rtt * 2).max(DRAIN_AT_LEAST);
            }
            WindowPhase::Drain if now >= self.drain_until => {
                if let Some(seen) = self.drain_min {
                    self.min_rtt = Some(seen);
                    self.min_rtt_at = now;
                    self.drained_at = Some(now);
                    self.phase = WindowPhase::Cruise;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link with a rate, a delay each way and an endless queue, in simulated time.
    struct Model {
        bytes_per_s: f64,
        one_way: Duration,
        free_at: Duration,
        /// (arrival at the far end, cumulative bytes)
        flying: VecDeque<(Duration, u64)>,
        total: u64,
        worst_queue: Duration,
    }

    const PIECE: u64 = 16 << 10;

    /// Sends bulk for `span` (from `from` on) and returns the bytes delivered in it.
    fn drive(w: &mut Window, m: &mut Model, from: Duration, span: Duration) -> u64 {
        let tick = Duration::from_micros(500);
        let start = w.delivered;
        let mut now = from;
        while now < from + span {
            while let Some(&(at, total)) = m.flying.front() {
                if at + m.one_way > now {
                    break;
                }
                m.flying.pop_front();
                w.on_acked(total, now);
            }
            while w.room() >= PIECE {
                let begin = m.free_at.max(now);
                m.worst_queue = m.worst_queue.max(begin - now);
                m.free_at = begin + Duration::from_secs_f64(PIECE as f64 / m.bytes_per_s);
                m.total += PIECE;
                m.flying.push_back((m.free_at + m.one_way, m.total));
                w.on_sent(PIECE, now);
            }
            now += tick;
        }
        w.delivered - start
    }

    fn model(mbit: f64, one_way_us: u64) -> Model {
        Model {
            bytes_per_s: mbit * 125_000.0,
            one_way: Duration::from_micros(one_way_us),
            free_at: Duration::ZERO,
            flying: VecDeque::new(),
            total: 0,
            worst_queue: Duration::ZERO,
        }
    }

    #[test]
    fn bulk_fills_100_mbit_at_35_ms_and_queues_less_than_30_ms() {
        let mut w = Window::new(WindowConfig::default());
        let mut m = model(100.0, 17_500);
        let s = Duration::from_secs;
        drive(&mut w, &mut m, s(0), s(1));
        assert_eq!(w.phase(), WindowPhase::Cruise);
        m.worst_queue = Duration::ZERO;
        // Long enough to pass through a drain.
        let moved = drive(&mut w, &mut m, s(1), s(25));
        let share = moved as f64 / (25.0 * m.bytes_per_s);
        assert!(share >= 0.90, "only {share:.3} of the rate");
        assert!(m.worst_queue < Duration::from_millis(30), "{:?}", m.worst_queue);
    }

    #[test]
    fn paths_of_other_shapes_are_filled_as_well() {
        for (mbit, one_way_us, worst_ms) in
            [(10.0, 50_000, 60), (1000.0, 5_000, 30), (100.0, 100_000, 80)]
        {
            let mut w = Window::new(WindowConfig { ceiling: 64 << 20, ..WindowConfig::default() });
            let mut m = model(mbit, one_way_us);
            let s = Duration::from_secs;
            drive(&mut w, &mut m, s(0), s(4));
            m.worst_queue = Duration::ZERO;
            let moved = drive(&mut w, &mut m, s(4), s(10));
            let share = moved as f64 / (10.0 * m.bytes_per_s);
            assert!(share >= 0.85, "{mbit} Mbit/s: only {share:.3} of the rate");
            assert!(m.worst_queue < Duration::from_millis(worst_ms), "{mbit}: {:?}", m.worst_queue);
        }
    }

    #[test]
    fn a_path_that_becomes_slower_is_noticed() {
        let mut w = Window::new(WindowConfig::default());
        let mut m = model(100.0, 17_500);
        let s = Duration::from_secs;
        drive(&mut w, &mut m, s(0), s(3));
        m.bytes_per_s /= 4.0;
        drive(&mut w, &mut m, s(3), s(5));
        m.worst_queue = Duration::ZERO;
        drive(&mut w, &mut m, s(8), s(5));
        assert!(m.worst_queue < Duration::from_millis(60), "{:?}", m.worst_queue);
    }

    #[test]
    fn acknowledgements_that_make_no_sense_are_ignored() {
        let mut w = Window::new(WindowConfig::default());
        w.on_sent(1000, Duration::ZERO);
        w.on_acked(5000, Duration::from_millis(1));
        assert_eq!(w.in_flight(), 1000);
        w.on_acked(1000, Duration::from_millis(10));
        w.on_acked(10, Duration::from_millis(11));
        assert_eq!(w.in_flight(), 0);
    }
}
