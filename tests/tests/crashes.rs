//! Bad days: daemons, relays and machines that are killed, sites that are gone.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use godwit_tests::{Cloud, Daemon, Setup, exists, kill, pause, resume, within};
use serde_json::Value;

/// How often a move may be over before its bad luck came.
const TRIES: usize = 5;

/// How long a move may take to find out that it has failed.
const FAIL_WITHIN: Duration = Duration::from_secs(120);

/// A cloud with a machine at the center whose memory takes time to send.
fn busy() -> Cloud {
    let cloud = Setup::new().patience(8).start();
    cloud.bring_substrate();
    cloud
}

fn new_vm(cloud: &Cloud, name: &str, site: &str) -> u64 {
    let _ = cloud.ok(&["vm", "activate", "base", "--name", name, "--site", site]);
    let guest = cloud.guest(name);
    guest.fill_memory(120);
    guest.intact(0)
}

/// Starts a move to the AP and returns its operation once memory is on its way.
fn start_move(cloud: &Cloud, vm: &str) -> String {
    let begun = cloud.ok(&["vm", "migrate", vm, "--to", "cafe", "--no-wait"]);
    let op = begun["op"].as_str().unwrap().to_owned();
    within(Duration::from_secs(60), "memory on its way", || {
        let o = cloud.op(&op);
        let sent = o["progress"]
            .as_array()
            .unwrap()
            .iter()
            .any(|p| p["stage"] == "memory" && p["done"].as_u64().unwrap() > 0);
        (sent || o["state"] != "running").then_some(())
    });
    op
}

/// How the operation ended.
fn ended(cloud: &Cloud, op: &str) -> Value {
    within(FAIL_WITHIN, "the move's end", || {
        let o = cloud.op(op);
        let state = o["state"].as_str()?.to_owned();
        (!["running", "cancelling"].contains(&state.as_str())).then_some(o)
    })
}

/// The machine runs on where it was, and nothing of the move is left anywhere.
fn stays(cloud: &Cloud, name: &str, lines: u64, op: &str) {
    cloud.runs_at(name, "center");
    let vm = cloud.vm(name);
    cloud.guest(name).intact(lines);
    let what = format!("nothing to be left of the move {op}");
    within(Duration::from_secs(60), &what, || {
        let gone = cloud.qemu(&vm, Daemon::Ap).is_none()
            && !cloud.vm_memory(&vm, Daemon::Ap).exists()
            && !cloud.vm_dir(&vm, Daemon::Ap).exists()
            && cloud.relays(Daemon::Ap).is_empty()
            && cloud.relays(Daemon::Center).is_empty();
        gone.then_some(())
    });
}

/// Moves a machine and does `harm` after the move has begun and before the switch; then it must
/// run on at its source, and be able to move for good.
fn harmed(harm: impl Fn(&Cloud, &Value, &str)) -> Value {
    let cloud = busy();
    for turn in 0..TRIES {
        let name = format!("m{turn}");
        let lines = new_vm(&cloud, &name, "center");
        let before = cloud.vm(&name);
        let op = start_move(&cloud, &name);
        // Held where it is, the source's relay sends nothing on, and no switch can begin.
        let held = cloud.relays(Daemon::Center);
        held.iter().copied().for_each(pause);
        if held.is_empty() || cloud.vm(&name)["generation"] != before["generation"] {
            held.iter().copied().for_each(resume);
            let _ = ended(&cloud, &op);
            let _ = cloud.ok(&["vm", "delete", &name]);
            continue;
        }
        harm(&cloud, &before, &op);
        held.iter().copied().for_each(resume);
        let end = ended(&cloud, &op);
        if cloud.vm(&name)["generation"] != before["generation"] {
            // The switch had begun unseen.
            let _ = cloud.ok(&["vm", "delete", &name]);
            continue;
        }
        assert_ne!(end["state"], "done", "{end}");
        stays(&cloud, &name, lines, &op);
        // Another try goes well.
        let _ = cloud.ok(&["vm", "migrate", &name, "--to", "cafe"]);
        cloud.runs_at(&name, "cafe");
        cloud.guest(&name).intact(lines);
        return end;
    }
    panic!("each of {TRIES} moves was over before it could be harmed");
}

#[test]
fn the_source_relay_is_killed_before_the_switch() {
    let end = harmed(|cloud, _, _| cloud.relays(Daemon::Center).into_iter().for_each(kill));
    assert!(end["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{end}");
}

#[test]
fn the_destination_relay_is_killed_before_the_switch() {
    let end = harmed(|cloud, _, _| cloud.relays(Daemon::Ap).into_iter().for_each(kill));
    assert!(end["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{end}");
}

#[test]
fn the_destination_machine_is_killed_before_the_switch() {
    let end = harmed(|cloud, vm, _| {
        kill(cloud.qemu(vm, Daemon::Ap).expect("a waiting QEMU"));
    });
    assert!(end["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{end}");
}

#[test]
fn a_cancelled_move_leaves_the_machine_where_it_is() {
    let end = harmed(|cloud, _, op| {
        let _ = cloud.ok(&["op", "cancel", op]);
    });
    assert_eq!(end["state"], "cancelled", "{end}");
}

#[test]
fn two_moves_of_one_machine_at_once_are_refused() {
    let cloud = busy();
    for turn in 0..TRIES {
        let name = format!("m{turn}");
        let lines = new_vm(&cloud, &name, "center");
        let first = cloud.ok(&["vm", "migrate", &name, "--to", "cafe", "--no-wait"]);
        let first = first["op"].as_str().unwrap().to_owned();
        let second = cloud.run(&["vm", "migrate", &name, "--to", "cafe"]);
        let stop = cloud.run(&["vm", "stop", &name]);
        let still = cloud.op(&first)["state"] == "running";
        let end = ended(&cloud, &first);
        assert_eq!(end["state"], "done", "{end}");
        cloud.runs_at(&name, "cafe");
        if !still {
            continue;
        }
        assert_eq!(second.exit, 5, "{}{}", second.stdout, second.stderr);
        assert!(second.stderr.contains("moving"), "{}", second.stderr);
        assert_eq!(stop.exit, 5, "{}{}", stop.stdout, stop.stderr);
        cloud.guest(&name).intact(lines);
        return;
    }
    panic!("each of {TRIES} moves was over before a second was asked for");
}

#[test]
fn a_killed_daemon_kills_no_machine() {
    let mut cloud = busy();
    let mut lines = new_vm(&cloud, "here", "center");
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "there", "--site", "cafe"]);
    cloud.guest("there").answers();
    cloud.guest("there").start_witness();
    let (here, there) = (cloud.vm("here"), cloud.vm("there"));
    let (qemu_here, qemu_there) = (
        cloud.qemu(&here, Daemon::Center).expect("its QEMU"),
        cloud.qemu(&there, Daemon::Ap).expect("its QEMU"),
    );

    cloud.kill(Daemon::Center);
    assert!(exists(qemu_here) && exists(qemu_there));
    cloud.restart(Daemon::Center);
    cloud.runs_at("here", "center");
    cloud.runs_at("there", "cafe");
    lines = cloud.guest("here").intact(lines);
    cloud.guest("there").intact(0);

    cloud.kill(Daemon::Ap);
    assert!(exists(qemu_there));
    cloud.restart(Daemon::Ap);
    cloud.runs_at("there", "cafe");
    let more = cloud.guest("there").intact(0);

    // The same processes, known again: they do what they are told.
    assert_eq!(cloud.qemu(&here, Daemon::Center), Some(qemu_here));
    assert_eq!(cloud.qemu(&there, Daemon::Ap), Some(qemu_there));
    let _ = cloud.ok(&["vm", "migrate", "here", "--to", "cafe"]);
    cloud.guest("here").intact(lines);
    let _ = cloud.ok(&["vm", "migrate", "there", "--to", "center"]);
    cloud.guest("there").intact(more);
    for vm in ["here", "there"] {
        let _ = cloud.ok(&["vm", "delete", vm]);
    }
    assert!(!exists(qemu_here) && !exists(qemu_there));
}

#[test]
fn a_move_to_a_dead_site_is_refused_soon() {
    let mut cloud = busy();
    let lines = new_vm(&cloud, "m", "center");
    cloud.kill(Daemon::Ap);
    let begun = Instant::now();
    let a = cloud.run(&["vm", "migrate", "m", "--to", "cafe"]);
    assert!(begun.elapsed() < Duration::from_secs(60), "it took {:?}", begun.elapsed());
    assert!(a.exit > 0 && a.stderr.contains("cafe"), "exit {}: {}", a.exit, a.stderr);
    cloud.runs_at("m", "center");
    cloud.guest("m").intact(lines);
    // Once its lease is over, the list says so, and the refusal needs no time at all.
    within(Duration::from_secs(60), "the AP's lease to end", || {
        let sites = cloud.ok(&["site", "list"]);
        let cafe = sites.as_array().unwrap().iter().find(|s| s["name"] == "cafe").unwrap();
        (cafe["state"] == "unreachable").then_some(())
    });
    let words = cloud.run(&["vm", "migrate", "m", "--to", "cafe"]);
    assert!(words.exit > 0 && words.stderr.contains("cafe"), "{}", words.stderr);
    cloud.runs_at("m", "center");
}
