//! Whatever state a move is in, a person's word leads out of it.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use godwit_tests::{Cloud, Daemon, Setup, pause, resume, within};

fn begin(cloud: &Cloud, name: &str, step: &str) -> String {
    let _ = cloud.ok(&["vm", "activate", "base", "--name", name, "--site", "center"]);
    let _ = cloud.guest(name).intact(0);
    cloud.hold(step);
    let begun = cloud.ok(&["vm", "migrate", name, "--to", "cafe", "--no-wait"]);
    let _ = cloud.held(step);
    begun["op"].as_str().unwrap().to_owned()
}

/// Nothing of a move is left: no relay, no QEMU at the AP, and its operation is over.
fn over(cloud: &Cloud, name: &str, op: &str) {
    within(Duration::from_secs(60), &format!("the move of {name} to be over"), || {
        let o = cloud.op(op);
        let ended = !["running", "cancelling"].contains(&o["state"].as_str()?);
        let free = cloud.relays(Daemon::Center).is_empty() && cloud.relays(Daemon::Ap).is_empty();
        (ended && free).then_some(())
    });
}

#[test]
fn a_move_that_hangs_is_ended_by_stop_and_by_delete() {
    let cloud = Setup::new().patience(60).start();
    cloud.bring_substrate();
    // A relay that hangs with the machine's device state, and one before the switch.
    for (name, step) in [("a", "relay.packaged"), ("b", "move.precopy")] {
        let op = begin(&cloud, name, step);
        let vm = cloud.vm(name);
        assert!(cloud.refused(&["vm", "stop", name], 5).contains("moving"));
        let since = Instant::now();
        let _ = cloud.ok(&["vm", "stop", "--force", name]);
        assert!(since.elapsed() < Duration::from_secs(90), "{:?}", since.elapsed());
        let now = cloud.vm(name);
        assert_eq!(
            (now["state"].as_str(), now["site"].as_str()),
            (Some("stopped"), Some("center"))
        );
        cloud.let_go(step);
        over(&cloud, name, &op);
        assert!(cloud.qemu(&vm, Daemon::Center).is_none() && cloud.qemu(&vm, Daemon::Ap).is_none());
        let _ = cloud.ok(&["vm", "start", name]);
        cloud.runs_at(name, "center");
        cloud.guest(name).answers();
        let _ = cloud.ok(&["vm", "delete", name]);
    }
    let op = begin(&cloud, "c", "relay.packaged");
    let vm = cloud.vm("c");
    let _ = cloud.ok(&["vm", "delete", "c"]);
    cloud.let_go("relay.packaged");
    over(&cloud, "c", &op);
    for at in [Daemon::Center, Daemon::Ap] {
        assert!(cloud.qemu(&vm, at).is_none() && !cloud.vm_memory(&vm, at).exists());
    }
    assert!(cloud.run(&["vm", "get", "c"]).exit == 4);
}

#[test]
fn a_machine_whose_qemu_answers_nobody_is_stopped_in_its_move() {
    let cloud = Setup::new().patience(60).start();
    cloud.bring_substrate();
    let op = begin(&cloud, "m", "move.precopy");
    let vm = cloud.vm("m");
    let qemu = cloud.qemu(&vm, Daemon::Center).unwrap();
    pause(qemu);
    cloud.let_go("move.precopy");
    let _ = cloud.ok(&["vm", "stop", "--force", "m"]);
    assert_eq!(cloud.vm("m")["state"], "stopped");
    assert!(cloud.qemu(&vm, Daemon::Center).is_none());
    resume(qemu);
    over(&cloud, "m", &op);
    let _ = cloud.ok(&["vm", "start", "m"]);
    cloud.runs_at("m", "center");
}

#[test]
fn a_move_whose_destination_is_away_is_ended_by_cancel_and_stop() {
    let cloud = Setup::new().over_link(100.0, 1.0).patience(5).start();
    cloud.bring_substrate();
    let op = begin(&cloud, "m", "relay.packaged");
    cloud.net().cut(None);
    cloud.let_go("relay.packaged");
    within(Duration::from_secs(90), "the move to be uncertain", || {
        let o = cloud.op(&op);
        o["progress"].as_array()?.iter().any(|p| p["stage"] == "uncertain").then_some(())
    });
    let _ = cloud.ok(&["op", "cancel", &op]);
    within(Duration::from_secs(120), "the cancelled move to end", || {
        let o = cloud.op(&op);
        (!["running", "cancelling"].contains(&o["state"].as_str()?)).then_some(())
    });
    let _ = cloud.ok(&["vm", "stop", "--force", "m"]);
    let vm = cloud.vm("m");
    assert_eq!((vm["state"].as_str(), vm["site"].as_str()), (Some("stopped"), Some("center")));
    let _ = cloud.ok(&["vm", "start", "m"]);
    cloud.runs_at("m", "center");
    // What the other site may have of it is of no account when it comes back.
    cloud.net().restore();
    within(Duration::from_secs(90), "the AP to be rid of it", || {
        let free = cloud.qemu(&vm, Daemon::Ap).is_none() && cloud.relays(Daemon::Ap).is_empty();
        free.then_some(())
    });
    cloud.runs_at("m", "center");
}
