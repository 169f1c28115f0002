//! What a migration took, in the terms of the CloudAP paper, section V.

use std::time::{Duration, SystemTime};

use godwit_types::{BytesMoved, MoveReport, PhaseSpan};
use serde::{Deserialize, Serialize};

use super::SCHEME;
use crate::relay::Counts;

/// Time since 1970, as QEMU stamps its events.
#[must_use]
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// What the source measured. All times are since 1970.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    /// The migration was asked for.
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
}

/// What the destination measured. All times are since 1970.
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
    /// asked, began, round over, stopped, resumed, complete, independent; since 1970.
    pub instants: [Duration; 7],
}

/// Names of the phases between the instants; those of [`godwit_types::MovePhase`].
const PHASES: [&str; 6] = ["prepare", "pre-copy", "drain", "freeze", "post-copy", "release"];

impl Timeline {
    /// From what both ends measured; `None` until the migration is over. Clocks of both sites are
    /// taken to agree; an instant that seems to lie before its predecessor is put at it.
    #[must_use]
    pub fn of(sent: &Sent, received: &Received) -> Option<Self> {
        let raw = [
            Some(sent.asked),
            sent.began,
            sent.round_over.or(sent.stopped),
            sent.stopped,
            received.resumed,
            received.complete,
            received.independent,
        ];
        let mut instants = [sent.asked; 7];
        let mut last = sent.asked;
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

/// The report of a finished migration.
#[must_use]
pub fn report(from: &str, to: &str, sent: &Sent, received: &Received) -> Option<MoveReport> {
    let t = Timeline::of(sent, received)?;
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
    Some(MoveReport {
        from: from.to_owned(),
        to: to.to_owned(),
        scheme: SCHEME.to_owned(),
        switch_ms: ms(t.switch_time()),
        downtime_ms: ms(t.downtime()),
        total_ms: ms(t.total()),
        bytes,
        cancelled_blocks: received.counts.disk_cancelled,
        phases,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_total_even_when_clocks_disagree() {
        let at = |ms| Some(Duration::from_millis(ms));
        let sent = Sent {
            asked: Duration::from_millis(1000),
            began: at(1010),
            round_over: at(3000),
            switched: at(3050),
            stopped: at(3060),
            released: at(5000),
            counts: Counts::default(),
        };
        let mut received = Received {
            resumed: at(3100),
            complete: at(4900),
            independent: at(4910),
            ..Received::default()
        };
        let r = report("center", "cafe", &sent, &received).unwrap();
        assert!((r.downtime_ms - 40.0).abs() < 1e-6);
        assert!((r.switch_ms - 2100.0).abs() < 1e-6);
        assert!((r.phases.iter().map(|p| p.ms).sum::<f64>() - r.total_ms).abs() < 1e-6);

        received.resumed = at(2000);
        let r = report("center", "cafe", &sent, &received).unwrap();
        assert!(r.downtime_ms.abs() < 1e-6);
        assert!((r.phases.iter().map(|p| p.ms).sum::<f64>() - r.total_ms).abs() < 1e-6);

        received.resumed = None;
        assert!(report("center", "cafe", &sent, &received).is_none());
    }
}
