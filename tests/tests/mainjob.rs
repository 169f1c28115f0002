//! The main job: an environment that starts in an instant and moves while it works.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use godwit_tests::{Cloud, Daemon, within};

#[test]
fn a_machine_is_docked_and_listed_with_its_sizes() {
    let cloud = Cloud::center_only();
    let made = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "first"]);
    assert_eq!(made["vm"]["state"], "running");
    let guest = cloud.guest("first");
    guest.answers();
    guest.start_witness();
    let docked = cloud.ok(&["vm", "dock", "first", "--name", "base"]);
    let report = &docked["report"];
    assert!(report["device_state_bytes"].as_u64().unwrap() < 1 << 20, "{report}");
    assert!(report["pause_ms"].as_f64().unwrap() > 0.0, "{report}");

    let list = cloud.ok(&["substrate", "list"]);
    let one = &list[0];
    assert_eq!(one["name"], "base");
    let (raw, stored) = (one["raw_bytes"].as_u64().unwrap(), one["stored_bytes"].as_u64().unwrap());
    assert!(raw >= 256 << 20 && stored > 0 && stored < raw / 2, "{one}");
    // It became a substrate: there is no machine any more.
    assert_eq!(cloud.ok(&["vm", "list"]).as_array().unwrap().len(), 0);
    let _ = cloud.refused(&["vm", "get", "first"], 4);
    let check = cloud.ok(&["pool", "check", "--site", "center"]);
    assert!(check["check"]["units"].as_u64().unwrap() > 0, "{check}");
}

#[test]
fn three_from_one_substrate_are_three_machines() {
    let cloud = Cloud::center_only();
    cloud.bring_substrate();
    let names = ["one", "two", "three"];
    std::thread::scope(|s| {
        for name in names {
            let cloud = &cloud;
            s.spawn(move || {
                let made = cloud.ok(&["vm", "activate", "base", "--name", name]);
                assert_eq!(made["vm"]["state"], "running");
                assert!(made["report"]["running_ms"].as_f64().unwrap() > 0.0, "{made}");
            });
        }
    });
    let mut ids = HashSet::new();
    let mut macs = HashSet::new();
    for name in names {
        let guest = cloud.guest(name);
        let lines = guest.intact(0);
        guest.intact(lines);
        let i = within(std::time::Duration::from_secs(30), "a renewed identity", || {
            let i = guest.identity();
            (i.hostname == name).then_some(i)
        });
        assert_eq!(i.machine_id.len(), 32, "{i:?}");
        assert_eq!(i.mac.len(), 17, "{i:?}");
        assert!(ids.insert(i.machine_id.clone()), "{i:?} is not the only one");
        assert!(macs.insert(i.mac.clone()), "{i:?} is not the only one");
    }
    // What one writes, no other sees.
    let _ = cloud.guest("one").sh("echo mine >/data/own; sync");
    assert_eq!(cloud.guest("two").sh("ls /data/own 2>/dev/null || echo none"), "none");
    for name in names {
        let vm = cloud.vm(name);
        let _ = cloud.ok(&["vm", "delete", name]);
        assert_eq!(cloud.qemu(&vm, Daemon::Center), None);
    }
}

#[test]
fn a_machine_makes_a_round_trip_and_needs_nothing_it_left() {
    let mut cloud = Cloud::start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "work", "--site", "center"]);
    let guest = cloud.guest("work");
    let mut lines = guest.intact(0);
    let before = guest.identity();
    let generation = cloud.vm("work")["generation"].as_u64().unwrap();

    for (turn, (from, to)) in
        [(Daemon::Center, Daemon::Ap), (Daemon::Ap, Daemon::Center)].into_iter().enumerate()
    {
        let moved = cloud.ok(&["vm", "migrate", "work", "--to", to.site()]);
        let report = &moved["report"];
        assert_eq!(report["from"], from.site(), "{report}");
        assert_eq!(report["to"], to.site(), "{report}");
        let (downtime, total) =
            (report["downtime_ms"].as_f64().unwrap(), report["total_ms"].as_f64().unwrap());
        assert!(downtime > 0.0 && downtime < total, "{report}");
        assert!(report["bytes"]["memory"].as_u64().unwrap() > 0, "{report}");
        cloud.runs_at("work", to.site());
        let vm = cloud.vm("work");
        assert_eq!(vm["generation"].as_u64().unwrap(), generation + turn as u64 + 1);
        // The source has given up all it had.
        assert_eq!(cloud.qemu(&vm, from), None, "a QEMU is left at {}", from.site());
        assert!(!cloud.vm_memory(&vm, from).exists(), "memory is left at {}", from.site());
        assert!(cloud.relays(from).is_empty(), "a relay is left at {}", from.site());
        assert!(cloud.relays(to).is_empty(), "a relay is left at {}", to.site());
        lines = cloud.guest("work").intact(lines);
        assert_eq!(cloud.guest("work").identity(), before);
    }

    // Free of its source: the AP's daemon and its files are gone, and it works on.
    let vm = cloud.vm("work");
    cloud.kill(Daemon::Ap);
    let dir = cloud.vm_dir(&vm, Daemon::Ap);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    lines = cloud.guest("work").intact(lines);
    // Also what the page cache does not hold any more.
    let _ = cloud.guest("work").sh("sync; echo 3 >/proc/sys/vm/drop_caches");
    cloud.guest("work").intact(lines);
}
