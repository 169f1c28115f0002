//! Daemons that are killed at each step of docking and activating, and what is found afterwards:
//! a whole machine that runs, or a substrate, or nothing; never two of these, and always said.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use godwit_tests::{Cloud, Daemon, Guest, Identity, Setup, exists, flip, within};
use serde_json::Value;

/// How long an operation may take to end once its daemon is back.
const ENDS_WITHIN: Duration = Duration::from_secs(120);

/// How the operation ended.
fn ended(cloud: &Cloud, op: &str) -> Value {
    within(ENDS_WITHIN, "the operation's end", || {
        let all = cloud.json(&["op", "list"])?;
        let o = all.as_array()?.iter().find(|o| o["id"] == op)?.clone();
        let state = o["state"].as_str()?.to_owned();
        (!["running", "cancelling"].contains(&state.as_str())).then_some(o)
    })
}

fn begin(cloud: &Cloud, args: &[&str]) -> String {
    let begun = cloud.ok(&[args, &["--no-wait"]].concat());
    begun["op"].as_str().unwrap().to_owned()
}

/// What a machine must still be after a docking that was undone.
struct Before<'a> {
    guest: Guest<'a>,
    identity: Identity,
    uptime_s: f64,
    lines: u64,
}

fn uptime_s(guest: &Guest) -> f64 {
    let text = guest.sh("cat /proc/uptime");
    text.split(' ').next().unwrap().parse().unwrap()
}

impl<'a> Before<'a> {
    fn of(cloud: &'a Cloud, vm: &'a str) -> Self {
        let guest = cloud.guest(vm);
        let (identity, uptime_s) = (guest.identity(), uptime_s(&guest));
        Self { guest, identity, uptime_s, lines: guest.intact(0) }
    }

    /// It runs on: the same boot, thawed, with its card and its name, and nothing of it lost.
    fn runs_on(&self, step: &str) {
        let frozen = self.guest.sh("cat /sys/fs/cgroup/user/cgroup.freeze");
        assert_eq!(frozen, "0", "{step}: its user programs are frozen");
        assert_eq!(self.guest.identity(), self.identity, "{step}");
        let up = self.guest.sh("cat /sys/class/net/eth0/flags /sys/class/net/eth0/operstate");
        assert!(up.contains("0x1003"), "{step}: its card is not up: {up}");
        assert!(uptime_s(&self.guest) > self.uptime_s, "{step}: it was booted anew");
        let _ = self.guest.intact(self.lines);
    }
}

fn substrates(cloud: &Cloud) -> usize {
    cloud.ok(&["substrate", "list"]).as_array().unwrap().len()
}

/// No QEMU runs at a site but that of these machines and those that wait.
fn no_other_qemu(cloud: &Cloud, at: Daemon, vms: &[&str]) {
    let mut known: Vec<i32> =
        vms.iter().map(|vm| cloud.qemu(&cloud.vm(vm), at).expect("its QEMU")).collect();
    known.sort_unstable();
    within(Duration::from_secs(30), "every other QEMU to be gone", || {
        let mut there = cloud.qemus(at);
        there.retain(|pid| !cloud.waits(at).contains(pid));
        there.sort_unstable();
        (there == known).then_some(())
    });
}

#[test]
fn a_docking_cut_at_any_step_is_undone_or_done() {
    let mut cloud = Cloud::center_only();
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "w", "--site", "center"]);
    cloud.guest("w").answers();
    cloud.guest("w").start_witness();
    let vm = cloud.vm("w");
    let qemu = cloud.qemu(&vm, Daemon::Center).unwrap();

    // On request, before the commit.
    for step in ["dock.quiesced", "dock.saved"] {
        let before = Before::of(&cloud, "w");
        cloud.hold(step);
        let op = begin(&cloud, &["vm", "dock", "w", "--name", "s"]);
        let _ = cloud.held(step);
        assert_eq!(cloud.vm("w")["state"], "docking");
        let _ = cloud.ok(&["op", "cancel", &op]);
        cloud.let_go(step);
        assert_eq!(ended(&cloud, &op)["state"], "cancelled");
        cloud.runs_at("w", "center");
        before.runs_on(step);
        assert_eq!(substrates(&cloud), 0, "{step}");
    }

    // Its daemon is killed before the commit.
    for step in ["dock.quiesced", "dock.stopped", "dock.saved"] {
        let before = Before::of(&cloud, "w");
        let (identity, uptime_s, lines) = (before.identity, before.uptime_s, before.lines);
        cloud.hold(step);
        let op = begin(&cloud, &["vm", "dock", "w", "--name", "s"]);
        let _ = cloud.held(step);
        cloud.kill(Daemon::Center);
        cloud.let_go(step);
        cloud.restart_center();
        let end = ended(&cloud, &op);
        assert_eq!(end["state"], "failed", "{step}: {end}");
        let words = end["error"]["message"].as_str().unwrap();
        assert!(words.contains("'w' was not docked and runs on"), "{step}: {end}");
        cloud.runs_at("w", "center");
        Before { guest: cloud.guest("w"), identity, uptime_s, lines }.runs_on(step);
        assert_eq!(cloud.qemu(&vm, Daemon::Center), Some(qemu), "{step}");
        assert_eq!(substrates(&cloud), 0, "{step}");
        no_other_qemu(&cloud, Daemon::Center, &["w"]);
    }

    // Its task panics; the daemon goes on, and does what its successor would.
    let daemon = cloud.pid(Daemon::Center);
    for step in ["dock.marked", "dock.stopped"] {
        let before = Before::of(&cloud, "w");
        cloud.panic_at(step);
        cloud.panic_at("dock.bring-back");
        let op = begin(&cloud, &["vm", "dock", "w", "--name", "s"]);
        let end = ended(&cloud, &op);
        assert_eq!(end["state"], "failed", "{step}: {end}");
        let words = end["error"]["message"].as_str().unwrap();
        assert!(words.contains("'w' was not docked and runs on"), "{step}: {end}");
        cloud.runs_at("w", "center");
        before.runs_on(step);
        assert_eq!(cloud.qemu(&vm, Daemon::Center), Some(qemu), "{step}");
        assert_eq!(substrates(&cloud), 0, "{step}");
        assert_eq!(cloud.pid(Daemon::Center), daemon, "{step}");
    }

    // Of what is to be public its identity was taken by then: it runs on, and is somebody again.
    let before = Before::of(&cloud, "w");
    let (was, lines) = (before.identity, before.lines);
    cloud.hold("dock.generalised");
    let op = begin(&cloud, &["vm", "dock", "w", "--name", "s", "--kind", "public"]);
    let _ = cloud.held("dock.generalised");
    cloud.kill(Daemon::Center);
    cloud.let_go("dock.generalised");
    cloud.restart_center();
    assert_eq!(ended(&cloud, &op)["state"], "failed");
    cloud.runs_at("w", "center");
    let is = cloud.guest("w").identity();
    assert_eq!((is.hostname.as_str(), &is.mac), ("w", &was.mac));
    assert!(is.machine_id.len() == 32 && is.machine_id != was.machine_id, "{is:?} was {was:?}");
    assert_eq!(substrates(&cloud), 0);

    // Behind the commit it is a substrate, and nothing else of it is left.
    let mut lines = cloud.guest("w").intact(lines);
    for (step, vm, substrate, kind) in [
        ("dock.published", "w", "mine", "private"),
        ("dock.ended", "again", "more", "restricted"),
        ("dock.settling", "again", "most", "restricted"),
    ] {
        let old = cloud.vm(vm);
        let qemu = cloud.qemu(&old, Daemon::Center).unwrap();
        let dock = ["vm", "dock", vm, "--name", substrate, "--kind", kind];
        let op = if step == "dock.settling" {
            // So does whoever finishes it then, who tries again.
            cloud.panic_at(step);
            cloud.panic_at("dock.finishing");
            begin(&cloud, &dock)
        } else {
            cloud.hold(step);
            let op = begin(&cloud, &dock);
            let _ = cloud.held(step);
            cloud.kill(Daemon::Center);
            cloud.let_go(step);
            cloud.restart_center();
            op
        };
        let end = ended(&cloud, &op);
        assert_eq!(end["state"], "done", "{step}: {end}");
        let finishing = cloud.file("hold").join("dock.finishing");
        assert!(!finishing.exists(), "{step}: nobody came to finish it");
        let _ = cloud.refused(&["vm", "get", vm], 4);
        assert!(!exists(qemu), "{step}: its QEMU is left");
        assert!(!cloud.vm_memory(&old, Daemon::Center).exists(), "{step}: its memory is left");
        assert!(!cloud.vm_dir(&old, Daemon::Center).exists(), "{step}: its disk is left");
        no_other_qemu(&cloud, Daemon::Center, &[]);
        let _ = cloud.ok(&["vm", "activate", substrate, "--name", "again"]);
        lines = cloud.guest("again").intact(lines);
        if kind == "private" {
            // It is one machine, however many ask for it.
            let asked = [
                cloud.begin(&["vm", "activate", substrate]),
                cloud.begin(&["vm", "activate", substrate]),
            ];
            for mut one in asked {
                assert_eq!(one.0.wait().unwrap().code(), Some(5));
            }
            let words = cloud.refused(&["vm", "activate", substrate, "--name", "third"], 5);
            assert!(words.contains("private") && words.contains("machine 'again'"), "{words}");
        }
    }
}

#[test]
fn a_docking_at_an_ap_goes_on_without_its_center_and_is_undone_without_its_ap() {
    let mut cloud = Setup::new().patience(8).start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "m", "--site", "cafe"]);

    // The AP's daemon.
    for step in ["dock.quiesced", "dock.stopped"] {
        let before = Before::of(&cloud, "m");
        let (identity, uptime_s, lines) = (before.identity, before.uptime_s, before.lines);
        cloud.hold(step);
        let op = begin(&cloud, &["vm", "dock", "m", "--name", "s"]);
        let _ = cloud.held(step);
        cloud.kill(Daemon::Ap);
        cloud.let_go(step);
        cloud.restart(Daemon::Ap);
        let end = ended(&cloud, &op);
        assert_eq!(end["state"], "failed", "{step}: {end}");
        let words = end["error"]["message"].as_str().unwrap();
        assert!(words.contains("'m' was not docked and runs on"), "{step}: {end}");
        cloud.runs_at("m", "cafe");
        Before { guest: cloud.guest("m"), identity, uptime_s, lines }.runs_on(step);
        no_other_qemu(&cloud, Daemon::Ap, &["m"]);
    }

    // An activation at the AP is taken back.
    cloud.hold("activate.identity");
    let op = begin(&cloud, &["vm", "activate", "base", "--name", "n", "--site", "cafe"]);
    let _ = cloud.held("activate.identity");
    cloud.kill(Daemon::Ap);
    cloud.let_go("activate.identity");
    cloud.restart(Daemon::Ap);
    assert_eq!(ended(&cloud, &op)["state"], "failed");
    let _ = cloud.refused(&["vm", "get", "n"], 4);
    no_other_qemu(&cloud, Daemon::Ap, &["m"]);

    // The center.
    let old = cloud.vm("m");
    let lines = cloud.guest("m").intact(0);
    cloud.hold("dock.saved");
    let op = begin(&cloud, &["vm", "dock", "m", "--name", "s"]);
    let _ = cloud.held("dock.saved");
    cloud.kill(Daemon::Center);
    cloud.restart_center();
    cloud.let_go("dock.saved");
    let end = ended(&cloud, &op);
    assert_eq!(end["state"], "done", "{end}");
    let _ = cloud.refused(&["vm", "get", "m"], 4);
    assert_eq!(cloud.qemu(&old, Daemon::Ap), None);
    let _ = cloud.ok(&["vm", "activate", "s", "--name", "again", "--site", "cafe"]);
    let _ = cloud.guest("again").intact(lines);
}

#[test]
fn an_activation_cut_at_any_step_leaves_nothing() {
    let mut cloud = Cloud::center_only();
    cloud.bring_substrate();
    for step in [
        "activate.recorded",
        "qemu.started",
        "activate.loaded",
        "activate.running",
        "activate.identity",
        "activate.plugged",
    ] {
        cloud.hold(step);
        let op = begin(&cloud, &["vm", "activate", "base", "--name", "a"]);
        let _ = cloud.held(step);
        let vm = cloud.vm("a");
        assert_eq!(vm["state"], "starting", "{step}");
        cloud.kill(Daemon::Center);
        cloud.let_go(step);
        cloud.restart_center();
        let end = ended(&cloud, &op);
        assert_eq!(end["state"], "failed", "{step}: {end}");
        let hint = end["error"]["hint"].as_str().unwrap_or_default();
        assert!(hint.contains("nothing is left"), "{step}: {end}");
        let _ = cloud.refused(&["vm", "get", "a"], 4);
        no_other_qemu(&cloud, Daemon::Center, &[]);
        assert!(!cloud.vm_dir(&vm, Daemon::Center).exists(), "{step}");
    }

    // It is complete; a QEMU is being started that waits for the next one.
    cloud.hold("activate.renamed");
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a"]);
    within(Duration::from_secs(30), "a QEMU that waits", || {
        let pools = cloud.ok(&["pool", "status"]);
        pools.as_array()?.iter().any(|p| p["waiting"] == 1).then_some(())
    });
    let op = begin(&cloud, &["vm", "activate", "base", "--name", "b"]);
    let _ = cloud.held("activate.renamed");
    cloud.kill(Daemon::Center);
    cloud.let_go("activate.renamed");
    cloud.restart_center();
    assert_eq!(ended(&cloud, &op)["state"], "failed");
    no_other_qemu(&cloud, Daemon::Center, &["a"]);
    cloud.hold("qemu.started");
    let a = cloud.vm("a");
    let _ = begin(&cloud, &["vm", "activate", "base", "--name", "b"]);
    let _ = cloud.held("qemu.started");
    cloud.kill(Daemon::Center);
    cloud.let_go("qemu.started");
    // What no record names: a record that is gone with its directory.
    std::fs::remove_dir_all(cloud.vm_dir(&a, Daemon::Center)).unwrap();
    cloud.restart_center();
    no_other_qemu(&cloud, Daemon::Center, &[]);
    let _ = cloud.ok(&["vm", "delete", "a"]);

    // A record that is damaged: the machine has failed, and its end is its QEMU's.
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "c"]);
    let vm = cloud.vm("c");
    let qemu = cloud.qemu(&vm, Daemon::Center).unwrap();
    cloud.kill(Daemon::Center);
    flip(&cloud.vm_dir(&vm, Daemon::Center).join("environment.json"), 300);
    cloud.restart_center();
    let failed = within(Duration::from_secs(30), "the machine to have failed", || {
        let vm = cloud.vm("c");
        (vm["state"] == "failed").then_some(vm)
    });
    let reason = failed["reason"].as_str().unwrap();
    assert!(reason.contains("its record is damaged"), "{reason}");
    let _ = cloud.ok(&["vm", "delete", "c"]);
    assert!(!exists(qemu));
    let _ = cloud.refused(&["vm", "get", "c"], 4);
}
