//! What a link is to be like.

use std::net::Ipv4Addr;
use std::time::Duration;

use godwit_types::Name;
use serde::{Deserialize, Serialize};

use super::LinkError;

/// One direction of a link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LaneSpec {
    /// Rate in Mbit/s of IP packets.
    pub rate_mbit: f64,
    /// One-way delay in milliseconds, after the last bit has left.
    pub delay_ms: f64,
    /// Up to this many milliseconds are added to the delay, evenly spread. Packets still keep
    /// their order.
    pub jitter_ms: f64,
    /// Share of packets lost by chance, 0 to 1.
    pub loss: f64,
    /// Room in the queue before the line, in milliseconds at the full rate.
    pub queue_ms: f64,
}

impl LaneSpec {
    /// A direction without jitter or loss and a queue of 50 ms.
    #[must_use]
    pub const fn new(rate_mbit: f64, delay_ms: f64) -> Self {
        Self { rate_mbit, delay_ms, jitter_ms: 0.0, loss: 0.0, queue_ms: 50.0 }
    }

    /// Rate in bits per second.
    #[must_use]
    pub fn bits_per_s(&self) -> u64 {
        ((self.rate_mbit * 1e6) as u64).max(1)
    }

    /// Delay as a duration.
    #[must_use]
    pub fn delay(&self) -> Duration {
        Duration::from_nanos((self.delay_ms * 1e6) as u64)
    }

    /// Room in the queue in bytes.
    #[must_use]
    pub fn queue_limit_bytes(&self) -> u64 {
        (self.rate_mbit * 1e6 / 8.0 * self.queue_ms / 1e3) as u64
    }

    /// # Errors
    /// [`LinkError::Spec`] for a figure outside its range.
    pub fn check(&self) -> Result<(), LinkError> {
        let ranges = [
            ("rate in Mbit/s", self.rate_mbit, 0.001, 10_000.0),
            ("delay in ms", self.delay_ms, 0.0, 60_000.0),
            ("jitter in ms", self.jitter_ms, 0.0, 60_000.0),
            ("loss", self.loss, 0.0, 1.0),
            ("queue in ms", self.queue_ms, 0.0, 60_000.0),
        ];
        for (what, value, min, max) in ranges {
            if !(min..=max).contains(&value) {
                return Err(LinkError::Spec { what, value, min, max });
            }
        }
        Ok(())
    }
}

/// A planned time without a link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outage {
    /// When it begins, in milliseconds since the link's start.
    pub start_ms: f64,
    /// How long it lasts in milliseconds.
    pub for_ms: f64,
}

impl Outage {
    /// Begin, since the link's start.
    #[must_use]
    pub fn start(&self) -> Duration {
        Duration::from_nanos((self.start_ms.max(0.0) * 1e6) as u64)
    }

    /// Length.
    #[must_use]
    pub fn length(&self) -> Duration {
        Duration::from_nanos((self.for_ms.max(0.0) * 1e6) as u64)
    }
}

/// A link between two network namespaces, `gw-<name>-a` and `gw-<name>-b`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkSpec {
    /// Its name, part of the namespaces' names; two links of one name cannot be up at once.
    pub name: Name,
    /// From A to B.
    pub a_to_b: LaneSpec,
    /// From B to A.
    pub b_to_a: LaneSpec,
    /// Address of the end in namespace A; both ends share a /24.
    pub addr_a: Ipv4Addr,
    /// Address of the end in namespace B.
    pub addr_b: Ipv4Addr,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Planned outages.
    pub outages: Vec<Outage>,
    /// What loss and jitter are drawn from.
    pub seed: u64,
}

impl LinkSpec {
    /// The same rate (Mbit/s) and one-way delay (ms) in both directions, nothing lost; ends
    /// 10.77.0.1 and 10.77.0.2, MTU 1500.
    #[must_use]
    pub const fn new(name: Name, rate_mbit: f64, delay_ms: f64) -> Self {
        Self {
            name,
            a_to_b: LaneSpec::new(rate_mbit, delay_ms),
            b_to_a: LaneSpec::new(rate_mbit, delay_ms),
            addr_a: Ipv4Addr::new(10, 77, 0, 1),
            addr_b: Ipv4Addr::new(10, 77, 0, 2),
            mtu: 1500,
            outages: Vec::new(),
            seed: 1,
        }
    }

    /// Changes both directions.
    #[must_use]
    pub fn both(mut self, f: impl Fn(&mut LaneSpec)) -> Self {
        f(&mut self.a_to_b);
        f(&mut self.b_to_a);
        self
    }

    /// Round trip of an empty packet in milliseconds.
    #[must_use]
    pub fn rtt_ms(&self) -> f64 {
        self.a_to_b.delay_ms + self.b_to_a.delay_ms
    }

    /// # Errors
    /// [`LinkError::Spec`] for a figure outside its range.
    pub fn check(&self) -> Result<(), LinkError> {
        self.a_to_b.check()?;
        self.b_to_a.check()?;
        if !(576..=9000).contains(&self.mtu) {
            let value = f64::from(self.mtu);
            return Err(LinkError::Spec { what: "MTU in bytes", value, min: 576.0, max: 9000.0 });
        }
        Ok(())
    }
}
