//! Bad days: daemons, relays and machines that are killed, sites that are gone.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use godwit_tests::{Cloud, Daemon, Setup, exists, kill, within};
use serde_json::Value;

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

/// Starts a move that is held at `step`, and does `harm` there. Gives how the move ended.
fn harmed(
    cloud: &mut Cloud,
    vm: &str,
    step: &str,
    harm: impl FnOnce(&mut Cloud, &Value, &str),
) -> (String, Value) {
    let before = cloud.vm(vm);
    cloud.hold(step);
    let begun = cloud.ok(&["vm", "migrate", vm, "--to", "cafe", "--no-wait"]);
    let op = begun["op"].as_str().unwrap().to_owned();
    let _ = cloud.held(step);
    harm(cloud, &before, &op);
    cloud.let_go(step);
    let end = ended(cloud, &op);
    (op, end)
}

#[test]
fn whatever_is_killed_before_the_switch_the_machine_stays_where_it_is() {
    type Harm = fn(&mut Cloud, &Value, &str);
    let mut cloud = Setup::new().patience(8).start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "m", "--site", "center"]);
    let mut lines = cloud.guest("m").intact(0);
    let harms: [(&str, &str, Harm); 5] = [
        ("the source's relay", "move.precopy", |c, _, _| {
            c.relays(Daemon::Center).into_iter().for_each(kill)
        }),
        ("the source's relay, as QEMU is told to switch", "move.switching", |c, _, _| {
            c.relays(Daemon::Center).into_iter().for_each(kill);
        }),
        ("the destination's relay", "move.precopy", |c, _, _| {
            c.relays(Daemon::Ap).into_iter().for_each(kill)
        }),
        ("the destination's QEMU", "move.switching", |c, vm, _| {
            kill(c.qemu(vm, Daemon::Ap).expect("a waiting QEMU"));
        }),
        ("a cancel", "move.precopy", |c, _, op| {
            let _ = c.ok(&["op", "cancel", op]);
        }),
    ];
    for (what, step, harm) in harms {
        let (op, end) = harmed(&mut cloud, "m", step, harm);
        assert_ne!(end["state"], "done", "{what}: {end}");
        assert_eq!(end["state"] == "cancelled", what == "a cancel", "{end}");
        assert!(end["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{end}");
        stays(&cloud, "m", lines, &op);
        lines = cloud.guest("m").intact(lines);
    }
    // Another try goes well.
    let _ = cloud.ok(&["vm", "migrate", "m", "--to", "cafe"]);
    cloud.runs_at("m", "cafe");
    cloud.guest("m").intact(lines);
}

#[test]
fn a_source_that_ends_in_a_move_can_be_started_and_deleted() {
    type Harm = fn(&mut Cloud, &Value, &str);
    let mut cloud = Setup::new().patience(8).start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "m", "--site", "center"]);
    let mut lines = cloud.guest("m").intact(0);
    let kill_qemu: Harm = |c, vm, _| kill(c.qemu(vm, Daemon::Center).expect("its QEMU"));
    let off: Harm = |c, vm, _| {
        let pid = c.qemu(vm, Daemon::Center).expect("its QEMU");
        // The answer is lost with the guest.
        let _ = c.guest("m").try_sh("sync; poweroff -f");
        within(Duration::from_secs(60), "the guest to be off", || (!exists(pid)).then_some(()));
    };
    for (step, harm, state) in [
        ("move.precopy", kill_qemu, "failed"),
        ("move.precopy", off, "stopped"),
        ("move.switching", kill_qemu, "failed"),
        ("relay.stopped", kill_qemu, "failed"),
    ] {
        let (_, end) = harmed(&mut cloud, "m", step, harm);
        assert_eq!(end["state"], "failed", "{step}: {end}");
        let words = end["error"]["message"].as_str().unwrap();
        let why = if state == "failed" { "signal 9" } else { "powered itself off" };
        assert!(words.contains(why), "{step}: {words}");
        let vm = within(Duration::from_secs(30), &format!("{step}: it to be {state}"), || {
            let vm = cloud.vm("m");
            (vm["state"] == state).then_some(vm)
        });
        let reason = vm["reason"].as_str().unwrap_or_default();
        assert!(reason.len() < 200 && (state == "stopped") == reason.is_empty(), "{vm}");
        let _ = cloud.ok(&["vm", "start", "m"]);
        // QEMU may have written its device state before it was killed at the last step: then the machine
        // had left, and all but its memory with it.
        let left = step == "relay.stopped" && vm["site"] == "cafe";
        cloud.runs_at("m", if left { "cafe" } else { "center" });
        let guest = cloud.guest("m");
        guest.answers();
        // Every line that was written is on the disk, which is whole.
        let check = guest.sh("/usr/lib/godwit/godwit-witness check --file /data/lines");
        let check: Value = serde_json::from_str(&check).unwrap();
        assert!(check["ok"] == true && check["lines"].as_u64() >= Some(lines), "{check}");
        guest.start_witness();
        lines = guest.intact(lines);
        if left {
            let _ = cloud.ok(&["vm", "migrate", "m", "--to", "center"]);
            cloud.runs_at("m", "center");
        }
    }
    let (op, _) = harmed(&mut cloud, "m", "move.precopy", kill_qemu);
    let vm = cloud.vm("m");
    let _ = cloud.ok(&["vm", "delete", "m"]);
    assert!(!cloud.vm_memory(&vm, Daemon::Center).exists(), "{op}");
    assert!(cloud.relays(Daemon::Center).is_empty() && cloud.relays(Daemon::Ap).is_empty());
}

#[test]
fn a_guest_that_powers_itself_off_is_stopped() {
    let cloud = Cloud::start();
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "m", "--site", "cafe"]);
    cloud.guest("m").answers();
    let _ = cloud.guest("m").try_sh("poweroff -f");
    let vm = within(Duration::from_secs(30), "it to be stopped", || {
        let vm = cloud.vm("m");
        (vm["state"] != "running").then_some(vm)
    });
    assert_eq!((vm["state"].as_str(), vm["reason"].as_str()), (Some("stopped"), None), "{vm}");
    assert!(!cloud.vm_memory(&vm, Daemon::Ap).exists());
    let _ = cloud.ok(&["vm", "start", "m"]);
    cloud.runs_at("m", "cafe");
}

#[test]
fn a_daemon_of_the_ap_that_is_killed_in_a_move_leaves_one_machine_and_nothing_else() {
    let mut cloud = Setup::new().patience(8).start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "m", "--site", "center"]);
    let mut lines = cloud.guest("m").intact(0);
    // Held by itself: it has prepared, and nobody knows of it.
    for step in ["move.prepared", "move.precopy", "relay.packaged"] {
        let (op, end) = harmed(&mut cloud, "m", step, |cloud, _, _| {
            cloud.kill(Daemon::Ap);
            cloud.restart(Daemon::Ap);
        });
        let there = end["state"] == "done";
        let words = end["error"]["message"].as_str().unwrap_or_default();
        assert!(there || !words.contains("no migration") && words.contains("cafe"), "{end}");
        if there {
            cloud.runs_at("m", "cafe");
            lines = cloud.guest("m").intact(lines);
            let _ = cloud.ok(&["vm", "migrate", "m", "--to", "center"]);
            cloud.runs_at("m", "center");
            lines = cloud.guest("m").intact(lines);
        } else {
            cloud.runs_at("m", "center");
        }
        nothing_left(&cloud, &op);
    }
    // As the source, it drives the move, and is held by itself.
    let _ = cloud.ok(&["vm", "migrate", "m", "--to", "cafe"]);
    for step in ["move.precopy", "move.switching"] {
        cloud.hold(step);
        let begun = cloud.ok(&["vm", "migrate", "m", "--to", "center", "--no-wait"]);
        let op = begun["op"].as_str().unwrap().to_owned();
        let _ = cloud.held(step);
        cloud.kill(Daemon::Ap);
        cloud.let_go(step);
        cloud.restart(Daemon::Ap);
        let end = ended(&cloud, &op);
        assert_eq!(end["state"], "failed", "{step}: {end}");
        let words = end["error"]["message"].as_str().unwrap();
        assert!(words.contains("restarted before the switch"), "{words}");
        cloud.runs_at("m", "cafe");
        lines = cloud.guest("m").intact(lines);
        nothing_left(&cloud, &op);
    }
}

/// Neither site has a relay or a directory of a move.
fn nothing_left(cloud: &Cloud, op: &str) {
    within(Duration::from_secs(60), &format!("nothing to be left of the move {op}"), || {
        let clean = |at| {
            let run = std::fs::read_dir(cloud.site_dir(at).join("run")).unwrap();
            let mut names = run.map(|e| e.unwrap().file_name().into_string().unwrap());
            cloud.relays(at).is_empty() && !names.any(|n| n.starts_with("mig-"))
        };
        (clean(Daemon::Center) && clean(Daemon::Ap)).then_some(())
    });
}

#[test]
fn two_moves_of_one_machine_at_once_are_refused() {
    let cloud = busy();
    let lines = new_vm(&cloud, "m", "center");
    cloud.hold("move.switching");
    let first = cloud.ok(&["vm", "migrate", "m", "--to", "cafe", "--no-wait"]);
    let first = first["op"].as_str().unwrap().to_owned();
    let _ = cloud.held("move.switching");
    for refused in
        [&["vm", "migrate", "m", "--to", "cafe"][..], &["vm", "stop", "m"], &["vm", "dock", "m"]]
    {
        let words = cloud.refused(refused, 5);
        assert!(words.contains("'m' is moving"), "{words}");
    }
    cloud.let_go("move.switching");
    let end = ended(&cloud, &first);
    assert_eq!(end["state"], "done", "{end}");
    cloud.runs_at("m", "cafe");
    cloud.guest("m").intact(lines);
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

    // Nor does an owner that panics: who has asked is told so, and the next is answered.
    for (name, at) in [("here", Daemon::Center), ("there", Daemon::Ap)] {
        let (daemon, vm) = (cloud.pid(at), cloud.vm(name));
        let qemu = cloud.qemu(&vm, at);
        cloud.panic_at("owner.power-off");
        let words = cloud.refused(&["vm", "stop", name], 1);
        assert!(words.contains(&format!("machine '{name}' broke off")), "{words}");
        cloud.runs_at(name, at.site());
        assert_eq!((cloud.pid(at), cloud.qemu(&vm, at)), (daemon, qemu), "{name}");
        let _ = cloud.guest(name).intact(0);
    }

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
