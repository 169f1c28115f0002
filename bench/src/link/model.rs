//! The link as a model: packets and the time go in, packets and the next time of interest come
//! out. It does no I/O and reads no clock, so that it is tested exactly.
//!
//! ```text
//!            +-- full: dropped          +-- lost by chance
//!            |                          |
//! offer --> queue (bounded) --> line (rate) --> flight (delay, jitter) --> poll
//!                     \____________ cut: all of it is lost ____________/
//! ```
//!
//! Each direction has a queue, a line and a flight of its own. Sizes are bytes of the IP packet.
//! Packets never overtake each other within a direction.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::spec::{LaneSpec, LinkSpec};
use crate::rng::SplitMix;

/// One of the two ends of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The first end.
    A,
    /// The second end.
    B,
}

impl Side {
    /// Both ends.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The end across the link.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// What became of the packets of one direction. Every packet offered is in exactly one of
/// `delivered`, `dropped`, `lost`, `cut` or still on the link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneCounters {
    /// Packets that came in.
    pub offered: u64,
    /// Bytes that came in.
    pub offered_bytes: u64,
    /// Packets that came out.
    pub delivered: u64,
    /// Bytes that came out.
    pub delivered_bytes: u64,
    /// Packets refused by the full queue.
    pub dropped: u64,
    /// Packets lost by chance.
    pub lost: u64,
    /// Packets lost to an outage.
    pub cut: u64,
    /// Most bytes ever waiting in the queue at once.
    pub queue_high_bytes: u64,
}

/// The counters of both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// From A to B.
    pub a_to_b: LaneCounters,
    /// From B to A.
    pub b_to_a: LaneCounters,
}

impl Counters {
    /// Bytes that came out at either end.
    #[must_use]
    pub const fn delivered_bytes(&self) -> u64 {
        self.a_to_b.delivered_bytes + self.b_to_a.delivered_bytes
    }

    /// Bytes that the senders put on the link, lost ones included: what a metered link bills.
    #[must_use]
    pub const fn offered_bytes(&self) -> u64 {
        self.a_to_b.offered_bytes + self.b_to_a.offered_bytes
    }
}

#[derive(Debug)]
struct Held<P> {
    packet: P,
    bytes: u32,
    /// In the queue: arrival. In flight: time of delivery. Nanoseconds.
    at: u64,
}

#[derive(Debug)]
struct Lane<P> {
    spec: LaneSpec,
    bits_per_s: u64,
    queue: VecDeque<Held<P>>,
    queue_bytes: u64,
    /// When the head of the queue will have left the line.
    head_done: u64,
    flight: VecDeque<Held<P>>,
    last_delivery: u64,
    counters: LaneCounters,
    rng: SplitMix,
}

fn service_ns(bytes: u32, bits_per_s: u64) -> u64 {
    let ns = (u128::from(bytes) * 8 * 1_000_000_000).div_ceil(u128::from(bits_per_s));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

impl<P> Lane<P> {
    fn new(spec: LaneSpec, seed: u64) -> Self {
        Self {
            spec,
            bits_per_s: spec.bits_per_s(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            head_done: 0,
            flight: VecDeque::new(),
            last_delivery: 0,
            counters: LaneCounters::default(),
            rng: SplitMix::new(seed),
        }
    }

    fn set(&mut self, now: u64, spec: LaneSpec) {
        let new_bits = spec.bits_per_s();
        if !self.queue.is_empty() {
            let left = u128::from(self.head_done.saturating_sub(now));
            let left = (left * u128::from(self.bits_per_s)).div_ceil(u128::from(new_bits));
            self.head_done = now.saturating_add(u64::try_from(left).unwrap_or(u64::MAX));
        }
        self.spec = spec;
        self.bits_per_s = new_bits;
    }

    fn offer(&mut self, now: u64, packet: P, bytes: u32) -> Option<P> {
        self.counters.offered += 1;
        self.counters.offered_bytes += u64::from(bytes);
        // An empty queue takes any packet, so that no limit can close the link.
        if !self.queue.is_empty()
            && self.queue_bytes + u64::from(bytes) > self.spec.queue_limit_bytes()
        {
            self.counters.dropped += 1;
            return Some(packet);
        }
        if self.queue.is_empty() {
            self.head_done = now.saturating_add(service_ns(bytes, self.bits_per_s));
        }
        self.queue.push_back(Held { packet, bytes, at: now });
        self.queue_bytes += u64::from(bytes);
        self.counters.queue_high_bytes = self.counters.queue_high_bytes.max(self.queue_bytes);
        None
    }

    /// Lets the line work until `now`.
    fn advance(&mut self, now: u64, freed: &mut Vec<P>) {
        while self.head_done <= now {
            let Some(head) = self.queue.pop_front() else { break };
            self.queue_bytes -= u64::from(head.bytes);
            let done = self.head_done;
            if let Some(next) = self.queue.front() {
                let start = done.max(next.at);
                self.head_done = start.saturating_add(service_ns(next.bytes, self.bits_per_s));
            }
            if self.spec.loss > 0.0 && self.rng.unit() < self.spec.loss {
                self.counters.lost += 1;
                freed.push(head.packet);
                continue;
            }
            let mut at = done.saturating_add(nanos(self.spec.delay()));
            if self.spec.jitter_ms > 0.0 {
                at = at.saturating_add((self.rng.unit() * self.spec.jitter_ms * 1e6) as u64);
            }
            at = at.max(self.last_delivery);
            self.last_delivery = at;
            self.flight.push_back(Held { packet: head.packet, bytes: head.bytes, at });
        }
    }

    /// Loses everything that has not come out by `now`.
    fn purge(&mut self, now: u64, freed: &mut Vec<P>) {
        let due = self.flight.partition_point(|h| h.at <= now);
        let lost = self.flight.len() - due + self.queue.len();
        self.counters.cut += lost as u64;
        freed.extend(self.flight.drain(due..).map(|h| h.packet));
        freed.extend(self.queue.drain(..).map(|h| h.packet));
        self.queue_bytes = 0;
        self.last_delivery = self.last_delivery.min(now);
    }

    fn poll(&mut self, now: u64) -> Option<P> {
        if self.flight.front()?.at > now {
            return None;
        }
        let h = self.flight.pop_front()?;
        self.counters.delivered += 1;
        self.counters.delivered_bytes += u64::from(h.bytes);
        Some(h.packet)
    }

    fn next(&self) -> Option<u64> {
        match self.flight.front() {
            Some(h) => Some(h.at),
            None if self.queue.is_empty() => None,
            None => Some(self.head_done),
        }
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// A full-duplex link that carries packets of type `P`. All times are nanoseconds since the
/// link's start and must not run backwards; a smaller time counts as the latest one seen.
#[derive(Debug)]
pub struct Model<P> {
    lanes: [Lane<P>; 2],
    now: u64,
    /// Planned outages, (start, end), in order and not overlapping.
    outages: VecDeque<(u64, u64)>,
    /// The link is cut until then.
    cut_until: Option<u64>,
    freed: Vec<P>,
}

impl<P> Model<P> {
    /// An idle link. The same spec (with its seed) and the same calls give the same results.
    #[must_use]
    pub fn new(spec: &LinkSpec) -> Self {
        let mut outages: Vec<(u64, u64)> = spec
            .outages
            .iter()
            .map(|o| (nanos(o.start()), nanos(o.start() + o.length())))
            .collect();
        outages.sort_unstable();
        Self {
            lanes: [
                Lane::new(spec.a_to_b, spec.seed),
                Lane::new(spec.b_to_a, spec.seed ^ 0x9e37_79b9_7f4a_7c15),
            ],
            now: 0,
            outages: outages.into(),
            cut_until: None,
            freed: Vec::new(),
        }
    }

    /// A packet of `bytes` enters at `from`. A packet that the link loses may be had back from
    /// [`Model::take_freed`].
    pub fn offer(&mut self, now: u64, from: Side, packet: P, bytes: u32) {
        self.advance(now);
        let lane = &mut self.lanes[from.index()];
        if self.cut_until.is_some() {
            lane.counters.offered += 1;
            lane.counters.offered_bytes += u64::from(bytes);
            lane.counters.cut += 1;
            self.freed.push(packet);
        } else if let Some(back) = lane.offer(self.now, packet, bytes) {
            self.freed.push(back);
        }
    }

    /// The next packet that is due by `now`, and the side where it comes out.
    pub fn poll(&mut self, now: u64) -> Option<(Side, P)> {
        self.advance(now);
        let due = |l: &Lane<P>| l.flight.front().map_or(u64::MAX, |h| h.at);
        let from = if due(&self.lanes[0]) <= due(&self.lanes[1]) { Side::A } else { Side::B };
        let packet = self.lanes[from.index()].poll(self.now)?;
        Some((from.other(), packet))
    }

    /// When to call [`Model::poll`] next, if nothing is offered before.
    #[must_use]
    pub fn next_event(&self) -> Option<u64> {
        self.lanes.iter().filter_map(Lane::next).min()
    }

    /// Cuts the link for `length`, or until [`Model::restore`]. What is on it is lost.
    pub fn cut(&mut self, now: u64, length: Option<Duration>) {
        self.advance(now);
        let until = length.map_or(u64::MAX, |l| self.now.saturating_add(nanos(l)));
        self.start_cut(self.now, until);
    }

    /// Ends an outage. Planned ones still to come stay planned.
    pub fn restore(&mut self, now: u64) {
        self.advance(now);
        self.cut_until = None;
    }

    /// Whether the link is cut at `now`.
    pub fn is_cut(&mut self, now: u64) -> bool {
        self.advance(now);
        self.cut_until.is_some()
    }

    /// Changes the direction that starts at `from`. What is queued goes on at the new rate.
    pub fn set(&mut self, now: u64, from: Side, spec: LaneSpec) {
        self.advance(now);
        let now = self.now;
        self.lanes[from.index()].set(now, spec);
    }

    /// The properties of the direction that starts at `from`.
    #[must_use]
    pub fn lane(&self, from: Side) -> LaneSpec {
        self.lanes[from.index()].spec
    }

    /// The counters since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters { a_to_b: self.lanes[0].counters, b_to_a: self.lanes[1].counters }
    }

    /// Packets on the link now, waiting or in flight.
    #[must_use]
    pub fn held(&self) -> usize {
        self.lanes.iter().map(|l| l.queue.len() + l.flight.len()).sum()
    }

    /// A packet that the link lost, so that its buffer can be used again.
    pub fn take_freed(&mut self) -> Option<P> {
        self.freed.pop()
    }

    fn advance(&mut self, now: u64) {
        let now = now.max(self.now);
        loop {
            if let Some(until) = self.cut_until
                && until <= now
            {
                self.cut_until = None;
                self.now = self.now.max(until);
            }
            match self.outages.front() {
                Some(&(start, end)) if start <= now => {
                    self.outages.pop_front();
                    self.run_lanes(start);
                    self.start_cut(start, end);
                }
                _ => break,
            }
        }
        self.run_lanes(now);
        self.now = now;
    }

    fn run_lanes(&mut self, now: u64) {
        for lane in &mut self.lanes {
            lane.advance(now, &mut self.freed);
        }
    }

    fn start_cut(&mut self, at: u64, until: u64) {
        for lane in &mut self.lanes {
            lane.purge(at, &mut self.freed);
        }
        if until > at {
            self.cut_until = Some(self.cut_until.map_or(until, |u| u.max(until)));
        }
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
