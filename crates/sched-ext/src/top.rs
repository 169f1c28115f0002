//! The live table of `sched top`.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use crate::Snapshot;

/// Machines that fit a screen.
const MOST_ROWS: usize = 24;

/// What happened between two snapshots, as a screen of text. Without an earlier one, since the
/// scheduler was loaded.
pub(crate) fn screen(earlier: Option<&Snapshot>, now: &Snapshot) -> String {
    let seconds =
        earlier.map_or(now.uptime_ms, |e| now.uptime_ms.saturating_sub(e.uptime_ms)).max(1) as f64
            / 1000.0;
    let since = |name: &str| {
        let before = earlier.map_or(0, |e| e.counters.get(name));
        (now.counters.get(name) - before) as f64 / seconds
    };
    let mut text = String::new();
    let up = Duration::from_secs(now.uptime_ms / 1000);
    let _ = writeln!(
        text,
        "sched {} alpha {} slice {} us vm-by {}  up {up:?}  restarts {}",
        now.mode, now.alpha, now.slice_us, now.vm_by, now.restarts
    );
    let _ = writeln!(
        text,
        "per second: switches {:.0}  checks {:.0}  too far {:.0}  loans {:.1}  moved {:.1}  tighter {:.2}  looser {:.2}  forced {:.1}",
        since("switches"),
        since("checks"),
        since("exceeded"),
        since("loans"),
        since("settled"),
        since("tightened"),
        since("loosened"),
        since("forced"),
    );
    let _ = writeln!(
        text,
        "placed: new {:.1}  woken {:.1}  moved {:.1}  stacked {:.1}  pulled {:.1}   decision {}",
        since("placed_new"),
        since("placed_woken"),
        since("placed_moved"),
        since("stacked"),
        since("pulled_idle") + since("pulled_balance"),
        now.decision_ns.map_or("-".to_owned(), |ns| format!("{ns:.0} ns")),
    );
    let ms = |name: &str| now.counters.get(name) as f64 / 1e6;
    let _ = writeln!(
        text,
        "ledger (ms): lent {:.1} + repaid {:.1} = settled {:.1} + returned {:.1} + lost {:.1} + outstanding {:.1}",
        ms("lent_ns"),
        ms("repaid_ns"),
        ms("settled_ns"),
        ms("returned_ns"),
        ms("lost_ns"),
        now.counters.outstanding_ns as f64 / 1e6,
    );
    let _ = writeln!(
        text,
        "lag between machines: last {:.1} ms  mean of 1 s {:.1} ms  of 5 s {:.1} ms",
        now.lag.last_ms, now.lag.mean_1s_ms, now.lag.mean_5s_ms
    );
    let _ = writeln!(text, "distance (1/16 of a queue): {}", histogram(now));
    let _ = writeln!(
        text,
        "\n{:<24} {:>8} {:>5} {:>7} {:>9} {:>7}  CPUS",
        "NAME", "ID", "VCPUS", "CPU%", "LENT/S", "TIGHTER"
    );
    for vm in now.vms.iter().take(MOST_ROWS) {
        let before = earlier.and_then(|e| e.vms.iter().find(|other| other.id == vm.id));
        let ran = vm.runtime_ms - before.map_or(0.0, |b| b.runtime_ms);
        let lent = vm.lent_ms - before.map_or(0.0, |b| b.lent_ms);
        let mut cpus: Vec<u32> = vm.vcpus.iter().map(|v| v.cpu).collect();
        cpus.sort_unstable();
        let cpus: Vec<String> = cpus.iter().take(16).map(u32::to_string).collect();
        let _ = writeln!(
            text,
            "{:<24} {:>8} {:>5} {:>7.1} {:>6.1} ms {:>7}  {}",
            name_of(vm.id),
            vm.id,
            vm.vcpus.len(),
            ran / seconds / 10.0,
            lent / seconds,
            vm.tighter,
            cpus.join(",")
        );
    }
    if now.vms.len() > MOST_ROWS {
        let _ = writeln!(text, "... and {} more", now.vms.len() - MOST_ROWS);
    }
    text
}

fn histogram(now: &Snapshot) -> String {
    let all: i64 = now.counters.distance_sixteenths.iter().sum();
    let share = |n: &i64| format!("{:.0}%", *n as f64 * 100.0 / all.max(1) as f64);
    now.counters.distance_sixteenths.iter().map(share).collect::<Vec<_>>().join(" ")
}

/// The name of a process; a process chooses it itself, so it is escaped.
fn name_of(id: u64) -> String {
    let name = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
    let name: String = name.trim_end().escape_debug().take(24).collect();
    if name.is_empty() { "-".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Counters, Lag, Mode, Vm};

    fn snapshot(uptime_ms: u64, loans: i64, runtime_ms: f64) -> Snapshot {
        let mut counters = Counters::default();
        counters.named.insert("loans".to_owned(), loans);
        counters.distance_sixteenths = vec![3, 1];
        Snapshot {
            version: 1,
            mode: Mode::Sbco,
            alpha: "2/3".to_owned(),
            slice_us: 3000,
            vm_by: "names".to_owned(),
            uptime_ms,
            restarts: 0,
            counters,
            decision_ns: None,
            lag: Lag::default(),
            vms: vec![Vm {
                id: u64::MAX,
                runtime_ms,
                lent_ms: 0.0,
                account_ms: 0.0,
                tighter: 0,
                vcpus: Vec::new(),
            }],
        }
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let (a, b) = (snapshot(1000, 10, 500.0), snapshot(3000, 30, 2500.0));
        let text = screen(Some(&a), &b);
        assert!(text.contains("loans 10.0"), "{text}");
        assert!(text.contains("  100.0 "), "one CPU all the time: {text}");
        assert!(text.contains("75% 25%"), "{text}");
    }
}
