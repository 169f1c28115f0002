//! What the demo tells: lines while it plays, a table and `report.json` at its end.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use godwit_types::{BytesMoved, DockReport, PhaseSpan, human_bytes};
use serde::Serialize;

use super::guest::GuestIdentity;

/// The whole of `report.json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) guest: String,
    pub(super) accel: String,
    pub(super) emulated: String,
    pub(super) link: Link,
    pub(super) cold_boot_ms: f64,
    pub(super) dock: DockReport,
    pub(super) activate: Activation,
    pub(super) moves: Vec<Move>,
    pub(super) intact: Intact,
    pub(super) clones: Clones,
}

#[derive(Debug, Serialize)]
pub(super) struct Link {
    pub(super) rate_mbit: f64,
    pub(super) rtt_ms: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Activation {
    pub(super) running_ms: f64,
    pub(super) warm_running_ms: Option<f64>,
    pub(super) first_answer_ms: Option<f64>,
    /// From the request to the first picture that a key stroke changed; none without a display.
    pub(super) screen_ms: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Move {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) scheme: String,
    pub(super) switch_ms: f64,
    pub(super) downtime_ms: f64,
    /// Longest silence of a guest program that writes every 20 ms, seen from outside.
    pub(super) guest_gap_ms: f64,
    pub(super) total_ms: f64,
    pub(super) bytes: BytesMoved,
    pub(super) phases: Vec<PhaseSpan>,
}

#[derive(Debug, Serialize)]
pub(super) struct Intact {
    pub(super) memory: bool,
    pub(super) disk: bool,
    /// Lines of the file that were compared.
    pub(super) lines: u64,
    /// None without a display.
    pub(super) text: Option<bool>,
    pub(super) freed_from_source: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Clones {
    pub(super) count: usize,
    pub(super) all_running_ms: f64,
    pub(super) distinct_identity: bool,
    pub(super) identities: Vec<GuestIdentity>,
}

/// One line for people, on stdout.
pub(super) fn say(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("write to stdout")
}

impl Report {
    pub(super) fn write(&self, out: &Path) -> anyhow::Result<()> {
        let path = out.join("report.json");
        let text = serde_json::to_vec_pretty(self).context("write the report as JSON")?;
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    pub(super) fn show(&self, out: &Path) -> anyhow::Result<()> {
        let ms =
            |v: f64| if v >= 10_000.0 { format!("{:.1} s", v / 1e3) } else { format!("{v:.0} ms") };
        let mut rows: Vec<(String, String)> = vec![
            ("guest".into(), format!("{}, accelerator {}", self.guest, self.accel)),
            (
                "link".into(),
                format!("{} Mbit/s, {} ms RTT (emulated)", self.link.rate_mbit, self.link.rtt_ms),
            ),
            ("cold boot".into(), ms(self.cold_boot_ms)),
            (
                "dock".into(),
                format!(
                    "{}, paused {}; {} stored as {}, device state {}",
                    ms(self.dock.total_ms),
                    ms(self.dock.pause_ms),
                    human_bytes(self.dock.raw_bytes),
                    human_bytes(self.dock.stored_bytes),
                    human_bytes(self.dock.device_state_bytes)
                ),
            ),
            ("activate, vCPUs run".into(), ms(self.activate.running_ms)),
        ];
        if let Some(v) = self.activate.first_answer_ms {
            rows.push(("activate, first answer".into(), ms(v)));
        }
        if let Some(v) = self.activate.screen_ms {
            rows.push((
                "activate, key on screen".into(),
                format!("{} ({:.0} times sooner than cold)", ms(v), self.cold_boot_ms / v),
            ));
        }
        for m in &self.moves {
            rows.push((
                format!("{} to {}", m.from, m.to),
                format!(
                    "switch {}, down {}, guest silent {}, total {}",
                    ms(m.switch_ms),
                    ms(m.downtime_ms),
                    ms(m.guest_gap_ms),
                    ms(m.total_ms)
                ),
            ));
            rows.push((
                String::new(),
                format!(
                    "memory {}, disk {}, device state {}",
                    human_bytes(m.bytes.memory),
                    human_bytes(m.bytes.disk),
                    human_bytes(m.bytes.device_state)
                ),
            ));
        }
        let word = |ok: bool| if ok { "yes" } else { "NO" };
        rows.push((
            "intact".into(),
            format!(
                "memory {}, disk {} ({} lines), text {}, free of its source {}",
                word(self.intact.memory),
                word(self.intact.disk),
                self.intact.lines,
                self.intact.text.map_or("none", word),
                word(self.intact.freed_from_source)
            ),
        ));
        rows.push((
            format!("{} clones at once", self.clones.count),
            format!(
                "all run after {}, own identities {}",
                ms(self.clones.all_running_ms),
                word(self.clones.distinct_identity)
            ),
        ));
        say("")?;
        for (what, value) in rows {
            say(&format!("{what:<24} {value}"))?;
        }
        say(&format!("\nreport and pictures: {}", out.display()))
    }
}
