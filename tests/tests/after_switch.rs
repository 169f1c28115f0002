//! Bad days after the switch: a machine that runs at its destination while part of it is still at
//! its source loses a relay, a daemon, the link, or its source.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::time::{Duration, Instant};

use godwit_bench::link::{LaneSpec, Side};
use godwit_tests::{Cloud, Daemon, Setup, exists, kill, within};
use serde_json::Value;

/// The link: 100 Mbit/s, 10 ms each way.
const RATE: f64 = 100.0;
const DELAY: f64 = 10.0;
/// What it is slowed down to while something bad happens, in Mbit/s.
const SLOW: f64 = 3.0;
/// Random bytes on the disk that follow a machine after its switch, in MiB.
const BALLAST: u32 = 20;
/// How long a move may take in all.
const MOVE_WITHIN: Duration = Duration::from_secs(180);
/// The machine is about to run at its destination, and its source does not know it.
const COMMITTED: &str = "relay.committed";
/// A page that was asked for has come, and the destination's QEMU does not have it.
const LATE: &str = "relay.demanded";
/// All that comes on the main channel has come.
const ENDING: &str = "relay.ending";
/// How often a move may be over before its bad luck came.
const TRIES: usize = 4;

/// A machine at work, and what must be found again after its moves.
struct Work {
    name: String,
    lines: u64,
    sum: String,
}

/// Seconds after which the sites take a silent link for lost, where that is what is waited for.
const PATIENCE: u64 = 8;

fn cloud() -> Cloud {
    let cloud = Setup::new().over_link(RATE, DELAY).patience(PATIENCE).start();
    cloud.bring_substrate();
    cloud
}

/// A cloud of the usual patience.
fn patient_cloud() -> Cloud {
    let cloud = Cloud::over_link(RATE, DELAY);
    cloud.bring_substrate();
    cloud
}

fn rate(cloud: &Cloud, mbit: f64) {
    for side in Side::BOTH {
        cloud.net().set(side, LaneSpec::new(mbit, DELAY)).unwrap();
    }
}

impl Work {
    fn begin(cloud: &Cloud, name: &str) -> Self {
        let _ = cloud.ok(&["vm", "activate", "base", "--name", name, "--site", "center"]);
        let guest = cloud.guest(name);
        let _ = guest.sh(&format!(
            "dd if=/dev/urandom of=/data/ballast bs=1M count={BALLAST} 2>/dev/null; sync"
        ));
        let sum = guest.sh("md5sum </data/ballast");
        let lines = guest.intact(0);
        Self { name: name.to_owned(), lines, sum }
    }

    /// Memory, lines and disk are as they were left.
    fn intact(&mut self, cloud: &Cloud) {
        let guest = cloud.guest(&self.name);
        self.lines = guest.intact(self.lines);
        let _ = guest.sh("echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(guest.sh("md5sum </data/ballast"), self.sum);
    }

    /// It has arrived, and nothing of it is at its source.
    fn arrived(&mut self, cloud: &Cloud, op: &str, from: Daemon, to: Daemon) -> Value {
        let end = ended(cloud, op);
        assert_eq!(end["state"], "done", "{end}");
        cloud.runs_at(&self.name, to.site());
        let vm = cloud.vm(&self.name);
        assert!(vm["arriving"].is_null(), "{vm}");
        within(Duration::from_secs(30), "its source to be free of it", || {
            let free = cloud.qemu(&vm, from).is_none()
                && !cloud.vm_memory(&vm, from).exists()
                && cloud.relays(from).is_empty()
                && cloud.relays(to).is_empty();
            free.then_some(())
        });
        self.intact(cloud);
        end
    }
}

fn start_move(cloud: &Cloud, vm: &str, to: Daemon) -> String {
    let begun = cloud.ok(&["vm", "migrate", vm, "--to", to.site(), "--no-wait"]);
    begun["op"].as_str().unwrap().to_owned()
}

/// How the operation ended.
fn ended(cloud: &Cloud, op: &str) -> Value {
    within(MOVE_WITHIN, "the move's end", || {
        let o = cloud.op(op);
        let state = o["state"].as_str()?.to_owned();
        (!["running", "cancelling"].contains(&state.as_str())).then_some(o)
    })
}

fn phase(cloud: &Cloud, at: Daemon) -> Option<String> {
    Some(cloud.relay(at)?["phase"].as_str()?.to_owned())
}

/// Waits until the source's relay is in one of `phases`; `None` when it is beyond them.
fn reach(cloud: &Cloud, at: Daemon, phases: &[&str], beyond: &[&str]) -> Option<String> {
    let begun = Instant::now();
    while begun.elapsed() < MOVE_WITHIN {
        match phase(cloud, at) {
            Some(p) if phases.contains(&p.as_str()) => return Some(p),
            Some(p) if beyond.contains(&p.as_str()) => return None,
            // It is polled as fast as it answers: a phase may be short.
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    panic!("waited {MOVE_WITHIN:?} for {phases:?}: {:?}", phase(cloud, at));
}

/// Moves a machine to the AP and does `harm` after the switch, while its disk is missing and some of
/// its memory.
fn harmed(cloud: &mut Cloud, name: &str, harm: impl Fn(&mut Cloud, &Value)) -> (Work, String) {
    let work = Work::begin(cloud, name);
    cloud.hold(COMMITTED);
    let op = start_move(cloud, &work.name, Daemon::Ap);
    let _ = cloud.held(COMMITTED);
    rate(cloud, SLOW);
    cloud.let_go(COMMITTED);
    let vm = within(Duration::from_secs(20), "the center to know of the switch", || {
        let vm = cloud.vm(&work.name);
        (!vm["arriving"].is_null()).then_some(vm)
    });
    eprintln!("{}: harmed at {:?}", work.name, cloud.relay(Daemon::Ap));
    harm(cloud, &vm);
    rate(cloud, RATE);
    (work, op)
}

/// Waits until the operation says that it recovers.
fn recovers(cloud: &Cloud, op: &str) {
    within(Duration::from_secs(60), "the operation to recover", || {
        let o = cloud.op(op);
        let shown = o["progress"].as_array()?.iter().any(|p| p["stage"] == "recovering");
        (shown || o["state"] != "running").then_some(())
    });
}

#[test]
fn a_move_ends_whichever_relay_is_killed_after_the_switch() {
    let mut cloud = cloud();
    for (name, ends) in [
        ("src", &[Daemon::Center][..]),
        ("dst", &[Daemon::Ap]),
        ("both", &[Daemon::Ap, Daemon::Center]),
        // From here on the AP fills in by itself what it holds.
        ("held-src", &[Daemon::Center]),
        ("held-dst", &[Daemon::Ap]),
    ] {
        let held = name.starts_with("held");
        if name == "held-src" {
            let _ = cloud.ok(&["vm", "activate", "base", "--name", "there", "--site", "cafe"]);
            let _ = cloud.ok(&["vm", "delete", "there"]);
        }
        let killed = Instant::now();
        let (mut work, op) = harmed(&mut cloud, name, |cloud, _| {
            for end in ends {
                cloud.relays(*end).into_iter().for_each(kill);
            }
            recovers(cloud, &cloud_op(cloud));
        });
        eprintln!("{name}: noticed within {:?}", killed.elapsed());
        let end = work.arrived(&cloud, &op, Daemon::Center, Daemon::Ap);
        let known = end["result"]["move"]["pages"]["known"].as_u64().unwrap();
        assert_eq!(known > 1000, held, "{end}");
        let _ = cloud.ok(&["vm", "delete", &work.name]);
    }
}

/// The one move that goes on.
fn cloud_op(cloud: &Cloud) -> String {
    let all = cloud.ok(&["op", "list", "--running"]);
    let op = all.as_array().unwrap().iter().find(|o| o["kind"]["do"] == "vm-migrate").unwrap();
    op["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_move_ends_whichever_daemon_is_killed_after_the_switch() {
    let mut cloud = cloud();
    for daemon in [Daemon::Ap, Daemon::Center] {
        let (mut work, op) = harmed(&mut cloud, daemon.site(), |cloud, _| {
            cloud.kill(daemon);
            cloud.restart(daemon);
        });
        work.arrived(&cloud, &op, Daemon::Center, Daemon::Ap);
        let _ = cloud.ok(&["vm", "delete", &work.name]);
    }
}

#[test]
fn what_a_killed_source_takes_with_it_is_reported_exactly() {
    let mut cloud = cloud();
    let (work, op) = harmed(&mut cloud, "lost", |cloud, vm| {
        kill(cloud.qemu(vm, Daemon::Center).expect("its QEMU"));
    });
    let end = ended(&cloud, &op);
    assert_eq!(end["state"], "failed", "{end}");
    let words = end["error"]["message"].as_str().unwrap();
    eprintln!("{words}");
    let pages: u64 = words
        .split_once("lost ")
        .and_then(|(_, rest)| rest.split_once(" pages"))
        .and_then(|(n, _)| n.parse().ok())
        .unwrap_or_else(|| panic!("{words}"));
    assert!(pages > 0 && words.contains("signal 9") && words.contains("disk is whole"), "{words}");

    let vm = cloud.vm(&work.name);
    assert_eq!((vm["state"].as_str(), vm["site"].as_str()), (Some("failed"), Some("cafe")), "{vm}");
    assert_eq!(vm["reason"].as_str(), Some(words));
    // What runs of it is left as it is, and its memory has as many holes as was said.
    let qemu = cloud.qemu(&vm, Daemon::Ap).expect("its QEMU still waits");
    let file = std::fs::metadata(cloud.vm_memory(&vm, Daemon::Ap)).unwrap();
    let holes = (file.len() - std::os::unix::fs::MetadataExt::blocks(&file) * 512) / 4096;
    assert_eq!(holes, pages);
    let again = cloud.run(&["vm", "migrate", &work.name]);
    assert_ne!(again.exit, 0, "what is lost does not come back: {}", again.stdout);
    assert!(exists(qemu));

    // Its disk is whole: it can be started from it, as after a power cut.
    let _ = cloud.ok(&["vm", "start", &work.name]);
    cloud.runs_at(&work.name, "cafe");
    assert!(!exists(qemu));
    let guest = cloud.guest(&work.name);
    guest.answers();
    assert_eq!(guest.sh("md5sum </data/ballast"), work.sum);
    let _ = cloud.ok(&["vm", "delete", &work.name]);
}

#[test]
fn a_link_cut_for_five_seconds_in_each_phase_stops_no_move() {
    const CUT: Duration = Duration::from_secs(5);
    let cloud = patient_cloud();
    let mut work = Work::begin(&cloud, "m");
    let (mut from, mut to) = (Daemon::Center, Daemon::Ap);
    for step in ["move.precopy", "relay.stopped", COMMITTED, "move.released"] {
        cloud.hold(step);
        let op = start_move(&cloud, &work.name, to);
        let _ = cloud.held(step);
        cloud.net().cut(Some(CUT));
        cloud.let_go(step);
        let begun = Instant::now();
        work.arrived(&cloud, &op, from, to);
        eprintln!("{step}: over {:?} after the cut", begun.elapsed());
        (from, to) = (to, from);
    }
}

#[test]
fn a_link_that_is_gone_for_longer_than_its_patience_stops_no_move() {
    let mut cloud = cloud();
    let (mut work, op) = harmed(&mut cloud, "m", |cloud, _| {
        cloud.net().cut(None);
        recovers(cloud, &cloud_op(cloud));
        cloud.net().restore();
    });
    work.arrived(&cloud, &op, Daemon::Center, Daemon::Ap);
}

/// Pages that the machine waits for, their neighbours and its queues come on a channel of their own. When
/// that one is slow, the end of memory waits for it.
#[test]
fn memory_does_not_end_before_pages_that_come_late() {
    let cloud = patient_cloud();
    let mut work = Work::begin(&cloud, "m");
    for (from, to) in [(Daemon::Center, Daemon::Ap), (Daemon::Ap, Daemon::Center)] {
        cloud.hold(LATE);
        cloud.hold(ENDING);
        let op = start_move(&cloud, &work.name, to);
        let (late, ending) = (cloud.held(LATE), cloud.held(ENDING));
        assert_eq!(late, ending, "both in the relay of the destination");
        cloud.let_go(ENDING);
        cloud.let_go(LATE);
        work.arrived(&cloud, &op, from, to);
    }
}

#[test]
fn what_the_guest_overwrites_does_not_travel() {
    let cloud = patient_cloud();
    for turn in 0..TRIES {
        let mut work = Work::begin(&cloud, &format!("w{turn}"));
        let op = start_move(&cloud, &work.name, Daemon::Ap);
        let met = reach(&cloud, Daemon::Center, &["memory-done"], &["done"]);
        rate(&cloud, SLOW);
        if met.is_none() {
            rate(&cloud, RATE);
            let _ = ended(&cloud, &op);
            let _ = cloud.ok(&["vm", "delete", &work.name]);
            continue;
        }
        let guest = cloud.guest(&work.name);
        let _ = guest.sh(&format!(
            "dd if=/dev/urandom of=/data/ballast bs=1M count={BALLAST} conv=notrunc 2>/dev/null; sync"
        ));
        work.sum = guest.sh("md5sum </data/ballast");
        within(Duration::from_secs(60), "the rest of its disk", || {
            let counts = cloud.relay(Daemon::Ap).map(|r| r["counts"].clone());
            counts.is_none_or(|c| c["disk_left"] == 0).then_some(())
        });
        rate(&cloud, RATE);
        let end = work.arrived(&cloud, &op, Daemon::Center, Daemon::Ap);
        let report = &end["result"]["move"];
        eprintln!("{report}");
        let moved = report["bytes"]["disk"].as_u64().unwrap();
        let cancelled = report["cancelled_blocks"].as_u64().unwrap();
        // Random bytes are not packed: what was cancelled is what did not travel.
        let ballast = u64::from(BALLAST) << 20;
        assert!(cancelled > 256 && moved < ballast - cancelled * 4096 / 2, "{report}");

        // What never came is not missed: neither by a machine that starts from its disk, nor by one
        // that moves on.
        let op = start_move(&cloud, &work.name, Daemon::Center);
        let _ = work.arrived(&cloud, &op, Daemon::Ap, Daemon::Center);
        let _ = cloud.ok(&["vm", "stop", &work.name]);
        let _ = cloud.ok(&["vm", "start", &work.name]);
        let guest = cloud.guest(&work.name);
        guest.answers();
        assert_eq!(guest.sh("md5sum </data/ballast"), work.sum);
        return;
    }
    panic!("each of {TRIES} moves was over before anything could be overwritten");
}
