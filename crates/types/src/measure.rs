//! Measurement as types: what ran through its phases carries how long each took, and the parts
//! add up to the whole.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// One phase that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PhaseSpan {
    /// Name of the phase.
    pub name: String,
    /// Its length in milliseconds.
    pub ms: f64,
}

/// Times consecutive phases: each ends where the next begins, so their sum is the total.
#[derive(Debug)]
pub struct Phases {
    start: Instant,
    last: Instant,
    spans: Vec<PhaseSpan>,
}

impl Phases {
    /// Starts the clock.
    #[must_use]
    pub fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, spans: Vec::new() }
    }

    /// Ends the phase that has been running since the last call and gives it its name.
    pub fn end(&mut self, name: impl Into<String>) {
        self.end_at(name, Instant::now());
    }

    /// As [`Phases::end`], for a phase that ended at `at`.
    pub fn end_at(&mut self, name: impl Into<String>, at: Instant) {
        let ms = at.saturating_duration_since(self.last).as_secs_f64() * 1e3;
        self.last = self.last.max(at);
        self.spans.push(PhaseSpan { name: name.into(), ms });
    }

    /// Time since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// The finished phases and their sum in milliseconds.
    #[must_use]
    pub fn finish(self) -> (Vec<PhaseSpan>, f64) {
        let total = self.spans.iter().map(|s| s.ms).sum();
        (self.spans, total)
    }
}

/// What docking took and made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DockReport {
    /// From the request to the substrate being in the pool.
    pub total_ms: f64,
    /// How long the vCPUs stood still (for a conversion: from STOP to the end).
    pub pause_ms: f64,
    /// Bytes of QEMU's device state.
    pub device_state_bytes: u64,
    /// Bytes of guest memory.
    pub raw_bytes: u64,
    /// Bytes that the store grew by for memory and device state.
    pub stored_bytes: u64,
    /// The phases.
    pub phases: Vec<PhaseSpan>,
}

/// What an activation took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ActivateReport {
    /// From the request to running vCPUs.
    pub running_ms: f64,
    /// From the request to the guest agent's first answer, when there is an agent.
    pub first_answer_ms: Option<f64>,
    /// Whether a waiting QEMU was used.
    pub warm: bool,
    /// The phases up to running vCPUs.
    pub phases: Vec<PhaseSpan>,
}

impl ActivateReport {
    /// Adds a wait that came before all else: it counts from the request.
    pub fn waited(&mut self, wait: Duration) {
        let ms = wait.as_secs_f64() * 1e3;
        self.running_ms += ms;
        self.first_answer_ms = self.first_answer_ms.map(|answer| answer + ms);
        self.phases.insert(0, PhaseSpan { name: "turn".into(), ms });
    }
}

/// The phases of a migration, in order.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum MovePhase {
    /// Destination prepared: QEMU in incoming mode, relays joined.
    Prepare,
    /// The one pre-copy round.
    PreCopy,
    /// What is on the wire is let through before the machine stops.
    Drain,
    /// STOP to RESUME: the freeze-and-copy stage.
    Freeze,
    /// Memory and disk are post-copied.
    PostCopy,
    /// The backing pivot, and the end of every tie to the source.
    Release,
}

/// Payload bytes on the wire by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BytesMoved {
    /// Memory pages, as encoded on the wire.
    pub memory: u64,
    /// Disk blocks, as encoded on the wire.
    pub disk: u64,
    /// Device state.
    pub device_state: u64,
}

impl BytesMoved {
    /// The sum.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.memory + self.disk + self.device_state
    }
}

/// The link a move went over, where it is known.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LinkReport {
    /// Rate in Mbit/s.
    pub rate_mbit: f64,
    /// Round trip in milliseconds.
    pub rtt_ms: f64,
}

/// How far the clocks of two hosts are apart, as measured over the link between them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ClockOffset {
    /// The destination's clock minus the source's in milliseconds; 0 where both are one clock.
    pub offset_ms: f64,
    /// It is off by no more than this many milliseconds; 0 where both are one clock.
    pub bound_ms: f64,
}

/// What became of the machine's pages in a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct PagesMoved {
    /// Pages that came with contents.
    pub data: u64,
    /// Pages that came as zeros.
    pub zero: u64,
    /// Of both, those that had been sent before.
    pub repeated: u64,
    /// Of the pages with content, those that were only named, since both sites held them.
    pub known: u64,
    /// Of the pages with content, those of which only what differs from what both sites held was sent.
    pub changed: u64,
    /// Of the pages with content, those that were named as blocks of the base image.
    pub base: u64,
    /// Of the pages with content, those that were only named, since the machine had left them at the
    /// destination when it was there before.
    pub visited: u64,
    /// Of both, those sent because the machine, or the relay for it, asked for them.
    pub demanded: u64,
    /// Bytes that the destination was told to forget at the switch, since they had changed.
    pub discarded_bytes: u64,
    /// Requests for pages by the machine at the destination.
    pub requests: u64,
    /// Time during which it waited for a page that it had asked for, in milliseconds.
    pub waited_ms: f64,
    /// The longest that it waited for one page, in milliseconds.
    pub longest_wait_ms: f64,
}

/// What a migration took, in the terms of the CloudAP paper, section V.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MoveReport {
    /// Site it left.
    pub from: String,
    /// Site it came to.
    pub to: String,
    /// Scheme, e.g. `hybrid`.
    pub scheme: String,
    /// From the user's request at the center to RESUME at the destination.
    pub switch_ms: f64,
    /// True STOP-to-RESUME gap, both taken from QEMU's own event time stamps, the destination's by
    /// the source's clock.
    pub downtime_ms: f64,
    /// How far the clocks of both hosts are apart; the downtime is off by no more than its bound.
    /// None where it was not measured: both are then taken to agree.
    #[serde(default)]
    pub clock: Option<ClockOffset>,
    /// From the user's request to independence of the source.
    pub total_ms: f64,
    /// Amount of migrated data.
    pub bytes: BytesMoved,
    /// What became of the machine's pages.
    #[serde(default)]
    pub pages: PagesMoved,
    /// Blocks of the disk that did not travel, since the guest overwrote them first.
    #[serde(default)]
    pub cancelled_blocks: u64,
    /// The phases; they add up to `total_ms`.
    pub phases: Vec<PhaseSpan>,
}

impl MoveReport {
    /// How far the downtime may be off, in milliseconds; none where nobody knows.
    #[must_use]
    pub fn downtime_bound_ms(&self) -> Option<f64> {
        self.clock.map(|c| c.bound_ms)
    }

    /// From the beginning of the pre-copy round to the machine's STOP: how long its memory was
    /// written while it was sent.
    #[must_use]
    pub fn until_stop(&self) -> Duration {
        let spans = self.phases.iter().filter(|p| p.name == "pre-copy" || p.name == "drain");
        Duration::try_from_secs_f64(spans.map(|p| p.ms).sum::<f64>() / 1e3).unwrap_or_default()
    }

    /// The downtime for people: `41 ms`, or `41 ms (+-0.4)` where two clocks had a part in it.
    #[must_use]
    pub fn downtime_text(&self) -> String {
        match self.downtime_bound_ms() {
            Some(bound) if bound >= 0.05 => format!("{:.0} ms (+-{bound:.1})", self.downtime_ms),
            _ => format!("{:.0} ms", self.downtime_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_its_turn_counts_from_the_request() {
        let phases = vec![PhaseSpan { name: "run".into(), ms: 5.0 }];
        let mut r =
            ActivateReport { running_ms: 5.0, first_answer_ms: Some(9.0), warm: true, phases };
        r.waited(Duration::from_millis(100));
        assert_eq!((r.running_ms, r.first_answer_ms), (105.0, Some(109.0)));
        assert_eq!((r.phases[0].name.as_str(), r.phases[0].ms), ("turn", 100.0));
    }

    #[test]
    fn phases_add_up_to_the_whole() {
        let mut p = Phases::start();
        let t0 = p.start;
        p.end_at("a", t0 + Duration::from_millis(30));
        p.end_at("b", t0 + Duration::from_millis(45));
        // A time before the last one is an empty phase, never a negative one.
        p.end_at("c", t0);
        let (spans, total) = p.finish();
        assert_eq!(spans.iter().map(|s| s.ms).collect::<Vec<_>>(), [30.0, 15.0, 0.0]);
        assert!((total - 45.0).abs() < 1e-9);
    }

    #[test]
    fn a_report_of_an_earlier_version_is_read_and_a_downtime_carries_its_bound() {
        let old = serde_json::json!({ "from": "a", "to": "b", "scheme": "hybrid", "switch_ms": 1.0,
            "downtime_ms": 41.2, "total_ms": 2.0, "phases": [],
            "bytes": { "memory": 1, "disk": 0, "device_state": 0 } });
        let mut r: MoveReport = serde_json::from_value(old).expect("read");
        assert_eq!((r.clock, r.pages), (None, PagesMoved::default()));
        assert_eq!(r.downtime_text(), "41 ms");
        r.clock = Some(ClockOffset { offset_ms: -3.0, bound_ms: 0.42 });
        assert_eq!(r.downtime_text(), "41 ms (+-0.4)");
        r.clock = Some(ClockOffset { offset_ms: 0.0, bound_ms: 0.0 });
        assert_eq!(r.downtime_text(), "41 ms");
    }
}
