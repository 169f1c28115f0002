//! What the demo tells: lines while it plays, a table and `report.json` at its end.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use godwit_types::{DockReport, MoveReport, human_bytes};
use serde::Serialize;

use super::guest::GuestIdentity;
use crate::prober::Signs;

/// The whole of `report.json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// `demo`.
    pub(super) suite: &'static str,
    /// Start of the run, RFC 3339.
    pub(super) started: String,
    /// Commit of the tree it was run from, where known.
    pub(super) git_rev: Option<String>,
    pub(super) guest: String,
    pub(super) accel: String,
    pub(super) emulated: String,
    pub(super) link: Link,
    /// From the request to the first picture that shows a typed letter or, without a display, to
    /// the first answer.
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
    /// From the request to the first picture that shows a typed letter; none without a display.
    pub(super) screen_ms: Option<f64>,
    /// By how much that is faster than by a cold boot.
    pub(super) faster_than_cold_boot: Option<f64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Move {
    pub(super) from: String,
    pub(super) to: String,
    /// What Godwit says of it.
    pub(super) report: MoveReport,
    /// What somebody outside saw meanwhile.
    pub(super) signs: Signs,
    /// Bytes that both ends put on the link meanwhile, headers and what was lost included.
    pub(super) link_bytes: Option<u64>,
    /// What of the memory that moved is the witness's own noise, at most, before packing.
    pub(super) witness_bytes: u64,
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
pub(crate) fn say(line: &str) -> anyhow::Result<()> {
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
                format!(
                    "{} Mbit/s, {} ms round trip (emulated)",
                    self.link.rate_mbit, self.link.rtt_ms
                ),
            ),
            (
                match self.activate.screen_ms {
                    Some(_) => "cold boot, key on screen".into(),
                    None => "cold boot, first answer".into(),
                },
                ms(self.cold_boot_ms),
            ),
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
        if let Some((v, times)) = self.activate.screen_ms.zip(self.activate.faster_than_cold_boot) {
            rows.push((
                "activate, key on screen".into(),
                format!("{} ({times:.0} times faster than a cold boot)", ms(v)),
            ));
        }
        for Move { from, to, report: m, signs, link_bytes, witness_bytes } in &self.moves {
            rows.push((
                format!("{from} to {to}"),
                format!(
                    "switch {}, down {}, longest stall {}, independent after {}",
                    ms(m.switch_ms),
                    m.downtime_text(),
                    ms(signs.longest_stall_ms),
                    ms(m.total_ms)
                ),
            ));
            let mut more = |text: String| rows.push((String::new(), text));
            more(format!(
                "program stalled {}, pings lost {} of {} (10/s)",
                ms(signs.program_stall_ms),
                signs.pings_lost,
                signs.pings
            ));
            let link = link_bytes.map_or_else(|| "unknown".into(), human_bytes);
            more(format!(
                "on the link {link}: memory {}, disk {}, device state {}",
                human_bytes(m.bytes.memory),
                human_bytes(m.bytes.disk),
                human_bytes(m.bytes.device_state)
            ));
            more(format!(
                "pages: {} requests, waited {} for them, {} sent twice, {} discarded",
                m.pages.requests,
                ms(m.pages.waited_ms),
                m.pages.repeated,
                human_bytes(m.pages.discarded_bytes)
            ));
            more(format!("of it the witness's noise: at most {}", human_bytes(*witness_bytes)));
        }
        let word = |ok: bool| if ok { "yes" } else { "NO" };
        rows.push((
            "intact".into(),
            format!(
                "memory {}, disk {} ({} lines), text {}, independent of the source: {}",
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
                "running after {}, own identities: {}",
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
