//! How much may be on its way at once, by a model of the path: what it carries and how long it is.
//!
//! ```text
//! startup --- no more comes through, or a queue grows ---> settle ---> cruise ---> probe
//!    ^                                                       ^          |  ^         |
//!    |                                                       +- no more-|--|---------+
//!  nothing came through at all                               path not seen empty for 10 s: empty
//! ```
//!
//! In flight is what the path holds (rate x shortest round trip) and a queue of [`QUEUE`]; now and
//! then a quarter more, to see whether more comes through, and a tenth less, so that the queue
//! empties. A loss alone means nothing here, since radio links lose packets that no queue had to
//! drop: CUBIC, which takes each for a full link, carries 1.5 Mbit/s of 100 where 5 % are lost and
//! 35 ms are the round trip. A fifth lost in a round trip does.
//!
//! The model and its filters are those of BBR (Cardwell et al., ACM Queue 14(5), 2016;
//! draft-ietf-ccwg-bbr). Where another's queue stays although we have left, the path is shared with
//! somebody who fills queues, and then so do we (the mode switch of Copa, NSDI 2018).

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

/// How long a packet may wait behind our own: room for what arrives late at a busy host.
const QUEUE: Duration = Duration::from_millis(6);
/// The first window in bytes, so that a demanded page does not wait for the startup.
pub(super) const FIRST_WINDOW: u64 = 64 << 10;
/// Packets that may be in flight whatever the model says.
const LEAST_PACKETS: u64 = 4;
/// Rounds for which a rate is believed.
const RATE_ROUNDS: u64 = 10;
/// How long the shortest round trip is believed.
const TRIP_FOR: Duration = Duration::from_secs(10);
/// How long the path is left nearly empty to see it again.
const EMPTY_FOR: Duration = Duration::from_millis(60);
/// Rounds of cruise before a probe.
const CRUISE_ROUNDS: u8 = 5;
/// Rounds without a quarter more after which a startup ends.
const FLAT_ROUNDS: u8 = 3;
/// The share of a round's bytes whose loss means a full path.
const HEAVY_LOSS: f64 = 0.2;
/// Sent packets whose state is kept; those before are taken to be lost.
const MOST_SENT: usize = 1 << 16;

/// Makes the controller of each link.
#[derive(Debug)]
pub(super) struct ModelConfig;

impl ControllerFactory for ModelConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Model::new(now, current_mtu))
    }
}

/// What was known when packets were sent.
#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Instant,
    /// Bytes that had come through, and when the last of them had.
    delivered: u64,
    delivered_at: Instant,
    /// When the packet was sent that came through last.
    first_sent: Instant,
    /// There was not enough to send: a low rate then is not the path's.
    limited: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Startup { best: f64, flat: u8 },
    Settle { rounds: u8 },
    Cruise { rounds: u8 },
    Probe { before: f64 },
    Empty { until: Instant },
}

/// The state of one direction of one link.
#[derive(Debug, Clone)]
pub(super) struct Model {
    mtu: u64,
    delivered: u64,
    delivered_at: Instant,
    first_sent: Instant,
    in_flight: u64,
    sent: VecDeque<Sent>,
    /// The newest packet of this batch of acknowledgements, and when it was sent.
    newest: Option<(Sent, Instant)>,
    /// What was sent before more than this had come through was sent for want of more.
    limited_until: u64,
    /// Rounds with enough to send; others tell nothing new of the path.
    round: u64,
    /// The round ends when a packet comes through that was sent beyond this.
    round_ends: u64,
    acked_in_round: u64,
    lost_in_round: u64,
    best_in_round: f64,
    marked: bool,
    /// Bytes a second with their rounds, falling: the first is what the path carries.
    rates: VecDeque<(u64, f64)>,
    trip: Option<Duration>,
    trip_at: Instant,
    /// The shortest round trip of this round, and since the last cycle began.
    low_in_round: Option<Duration>,
    low_in_cycle: Option<Duration>,
    /// Somebody else fills the queue, for how many cycles, and what came through in the first.
    shared: bool,
    shared_cycles: u8,
    shared_rate: f64,
    phase: Phase,
    window: u64,
}

impl Model {
    fn new(now: Instant, mtu: u16) -> Self {
        Self {
            mtu: mtu.into(),
            delivered: 0,
            delivered_at: now,
            first_sent: now,
            in_flight: 0,
            sent: VecDeque::new(),
            newest: None,
            limited_until: 0,
            round: 0,
            round_ends: 0,
            acked_in_round: 0,
            lost_in_round: 0,
            best_in_round: 0.0,
            marked: false,
            rates: VecDeque::new(),
            trip: None,
            trip_at: now,
            low_in_round: None,
            low_in_cycle: None,
            shared: false,
            shared_cycles: 0,
            shared_rate: 0.0,
            phase: Phase::Startup { best: 0.0, flat: 0 },
            window: FIRST_WINDOW,
        }
    }

    /// Bytes a second that the path carries, as far as seen; 0 until then.
    fn rate(&self) -> f64 {
        self.rates.front().map_or(0.0, |(_, rate)| *rate)
    }

    fn note_rate(&mut self, rate: f64) {
        let (round, oldest) = (self.round, self.round.saturating_sub(RATE_ROUNDS));
        while self.rates.front().is_some_and(|(then, _)| *then < oldest) {
            self.rates.pop_front();
        }
        while self.rates.back().is_some_and(|(_, r)| *r <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((round, rate));
    }

    /// `share` of what the path holds and `queue` of our queue, in bytes.
    fn hold(&self, share: f64, queue: f64) -> u64 {
        let trip = self.trip.unwrap_or_default().as_secs_f64();
        let own = trip * share + QUEUE.as_secs_f64() * queue;
        (self.rate() * own) as u64 + self.least()
    }

    fn least(&self) -> u64 {
        LEAST_PACKETS * self.mtu
    }

    fn sent(&mut self, now: Instant, bytes: u64) {
        if self.in_flight == 0 {
            // What was idle is no part of a rate.
            (self.first_sent, self.delivered_at) = (now, now);
        }
        self.in_flight += bytes;
        if self.sent.back().is_none_or(|last| last.at < now) {
            if self.sent.len() >= MOST_SENT {
                self.sent.pop_front();
            }
            let (delivered, delivered_at) = (self.delivered, self.delivered_at);
            self.sent.push_back(Sent {
                at: now,
                delivered,
                delivered_at,
                first_sent: self.first_sent,
                limited: self.delivered <= self.limited_until,
            });
        }
    }

    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.delivered_at = now;
        self.acked_in_round += bytes;
        let at = self.sent.partition_point(|s| s.at <= sent);
        let Some(packet) = at.checked_sub(1).map(|i| self.sent[i]) else { return };
        if self.newest.is_none_or(|(_, at)| at < sent) {
            self.newest = Some((packet, sent));
        }
    }

    fn batch_ends(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        self.in_flight = in_flight;
        if app_limited {
            self.limited_until = self.delivered + in_flight;
        }
        let Some((packet, sent)) = self.newest.take() else { return };
        // Those before it that are still out are late by the length of a round; their own state is
        // near enough to what is kept.
        let gone = self.sent.partition_point(|s| s.at + 8 * self.span() < packet.at);
        self.sent.drain(..gone);
        let trip = now.saturating_duration_since(sent);
        self.first_sent = self.first_sent.max(packet.at);
        let took = now
            .saturating_duration_since(packet.delivered_at)
            .max(packet.at.saturating_duration_since(packet.first_sent));
        let rate = (self.delivered - packet.delivered) as f64 / took.as_secs_f64().max(1e-6);
        // Two acknowledgements that came together tell of no rate, nor does a silence.
        let idle = packet.at.saturating_duration_since(packet.delivered_at) > self.span();
        let limited = app_limited || packet.limited || idle;
        if took >= self.trip.unwrap_or_default() && (!limited || rate > self.rate()) {
            self.note_rate(rate);
            self.best_in_round = self.best_in_round.max(rate);
        }
        self.saw_trip(now, trip, app_limited);
        if let Phase::Startup { .. } = self.phase
            && !app_limited
        {
            // Twice what came through while this packet was on its way.
            self.window = self.window.max((self.delivered - packet.delivered) * 2);
        }
        if packet.delivered >= self.round_ends {
            self.round_ends = self.delivered;
            self.round += u64::from(!limited);
            self.round_over(now, app_limited);
        }
        self.step(now);
    }

    /// The longest that a packet is waited for, as far as known.
    fn span(&self) -> Duration {
        self.trip.unwrap_or(Duration::from_millis(100)).max(Duration::from_millis(10))
    }

    fn saw_trip(&mut self, now: Instant, trip: Duration, app_limited: bool) {
        let least = |low: Option<Duration>| Some(low.map_or(trip, |l| l.min(trip)));
        self.low_in_round = least(self.low_in_round);
        self.low_in_cycle = least(self.low_in_cycle);
        // About as short: the path was empty.
        let near = |t: Duration| t + t / 50 + Duration::from_micros(500);
        if self.trip.is_none_or(|t| trip <= near(t)) {
            self.trip_at = now;
            self.trip = least(self.trip);
        } else if now.saturating_duration_since(self.trip_at) > TRIP_FOR {
            if app_limited {
                (self.trip, self.trip_at) = (Some(trip), now);
            } else if !matches!(self.phase, Phase::Empty { .. } | Phase::Startup { .. }) {
                let until = now + EMPTY_FOR + self.span();
                self.phase = Phase::Empty { until };
                self.low_in_cycle = None;
            }
        }
    }

    fn round_over(&mut self, now: Instant, app_limited: bool) {
        let lost = self.lost_in_round as f64;
        let share = lost / (lost + self.acked_in_round as f64).max(1.0);
        let heavy = share > HEAVY_LOSS && self.lost_in_round > 8 * self.mtu;
        let low = self.low_in_round.take();
        let queued = match (low, self.trip) {
            (Some(low), Some(trip)) => low > trip + (trip / 4).max(Duration::from_millis(8)),
            _ => false,
        };
        if heavy && self.best_in_round > 0.0 {
            // The path is not what it was.
            self.rates.clear();
            self.note_rate(self.best_in_round);
        }
        let marked = std::mem::take(&mut self.marked);
        (self.lost_in_round, self.acked_in_round, self.best_in_round) = (0, 0, 0.0);
        let rate = self.rate();
        self.phase = match self.phase {
            Phase::Startup { .. } if heavy => Phase::Settle { rounds: 0 },
            // What little is sent tells nothing of the path, nor does an answer that is late.
            Phase::Startup { best, flat } if app_limited => Phase::Startup { best, flat },
            Phase::Startup { .. } if queued || marked => Phase::Settle { rounds: 0 },
            Phase::Startup { best, .. } if rate >= best * 1.25 => {
                Phase::Startup { best: rate, flat: 0 }
            }
            Phase::Startup { flat, .. } if flat + 1 >= FLAT_ROUNDS => Phase::Settle { rounds: 0 },
            Phase::Startup { best, flat } => Phase::Startup { best, flat: flat + 1 },
            Phase::Settle { rounds } if rounds + 1 < 2 => Phase::Settle { rounds: rounds + 1 },
            Phase::Settle { .. } => self.cycle_over(now),
            Phase::Cruise { .. } if marked => Phase::Settle { rounds: 0 },
            Phase::Cruise { rounds } if rounds + 1 < CRUISE_ROUNDS || app_limited => {
                Phase::Cruise { rounds: rounds.saturating_add(1).min(CRUISE_ROUNDS) }
            }
            Phase::Cruise { .. } => Phase::Probe { before: rate },
            // More came through: at once again.
            Phase::Probe { before } if rate > before * 1.1 && !heavy && !marked => {
                Phase::Probe { before: rate }
            }
            Phase::Probe { .. } => Phase::Settle { rounds: 0 },
            Phase::Empty { until } if now < until => Phase::Empty { until },
            Phase::Empty { .. } => {
                (self.trip, self.trip_at) = (self.low_in_cycle.take().or(self.trip), now);
                Phase::Cruise { rounds: 0 }
            }
        };
    }

    fn cycle_over(&mut self, now: Instant) -> Phase {
        let low = self.low_in_cycle.take();
        if let (Some(low), Some(trip)) = (low, self.trip) {
            self.shared = low > trip + (trip / 4).max(Duration::from_millis(5));
        }
        if !self.shared {
            self.shared_cycles = 0;
            return Phase::Cruise { rounds: 0 };
        }
        let rate = self.rate();
        if self.shared_cycles == 0 {
            self.shared_rate = rate;
        }
        self.shared_cycles = self.shared_cycles.saturating_add(1);
        // Less and less comes through, and no queue ends: it is the way that has become longer.
        if self.shared_cycles >= 2 && rate < self.shared_rate * 0.8 {
            self.shared_cycles = 0;
            return Phase::Empty { until: now + EMPTY_FOR + self.span() };
        }
        Phase::Cruise { rounds: 0 }
    }

    fn step(&mut self, now: Instant) {
        if let Phase::Empty { until } = self.phase
            && now >= until
        {
            (self.trip, self.trip_at) = (self.low_in_cycle.take().or(self.trip), now);
            self.phase = Phase::Cruise { rounds: 0 };
        }
        let window = match self.phase {
            Phase::Startup { .. } => self.window,
            Phase::Settle { .. } => self.hold(0.9, 0.25),
            Phase::Cruise { .. } if self.shared => self.hold(2.0, 1.0),
            Phase::Cruise { .. } => self.hold(1.0, 1.0),
            Phase::Probe { .. } if self.shared => self.hold(2.25, 1.0),
            Phase::Probe { .. } => self.hold(1.25, 1.0),
            Phase::Empty { .. } => self.hold(0.5, 0.0),
        };
        self.window = window.max(self.least());
    }

    fn lost(&mut self, is_persistent: bool, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.lost_in_round += bytes;
        if is_persistent {
            self.rates.clear();
            // It may be another path.
            (self.trip, self.low_in_round, self.low_in_cycle) = (None, None, None);
            (self.shared, self.shared_cycles) = (false, 0);
            self.phase = Phase::Startup { best: 0.0, flat: 0 };
            self.window = self.least();
        } else if bytes == 0 {
            self.marked = true;
        }
    }
}

impl Controller for Model {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.sent(now, bytes);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.acked(now, sent, bytes);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.batch_ends(now, in_flight, app_limited);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.lost(is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.window = self.window.max(self.least());
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window;
        metrics.pacing_rate = Some((self.rate() * 8.0) as u64);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        FIRST_WINDOW
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
#[path = "congestion_tests.rs"]
mod tests;
