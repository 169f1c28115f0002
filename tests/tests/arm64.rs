//! The main job for a guest of another architecture than its host's.
#![allow(clippy::unwrap_used)]

use godwit_tests::{Cloud, Daemon, has_image};

#[test]
fn an_arm64_machine_boots_docks_activates_moves_and_goes() {
    if !has_image("tiny-arm64") {
        return;
    }
    let cloud = Cloud::start();
    let made =
        cloud.ok(&["vm", "create", "--image", "tiny-arm64", "--name", "arm", "--site", "center"]);
    assert_eq!(made["vm"]["arch"], "aarch64");
    let guest = cloud.guest("arm");
    guest.answers();
    assert_eq!(guest.sh("uname -m"), "aarch64");
    guest.start_witness();

    let docked = cloud.ok(&["vm", "dock", "arm", "--name", "arm-base"]);
    assert!(docked["report"]["device_state_bytes"].as_u64().unwrap() < 1 << 20, "{docked}");
    let _ = cloud.ok(&["vm", "activate", "arm-base", "--name", "work", "--site", "center"]);
    let guest = cloud.guest("work");
    let lines = guest.intact(0);

    let moved = cloud.ok(&["vm", "migrate", "work", "--to", "cafe"]);
    assert!(moved["report"]["downtime_ms"].as_f64().unwrap() > 0.0, "{moved}");
    cloud.runs_at("work", "cafe");
    let vm = cloud.vm("work");
    assert_eq!(cloud.qemu(&vm, Daemon::Center), None);
    guest.intact(lines);

    let stopped = cloud.run(&["vm", "stop", "work"]);
    assert_eq!(stopped.exit, 0, "{}", stopped.stderr);
    let _ = cloud.ok(&["vm", "delete", "work"]);
    assert_eq!(cloud.qemu(&vm, Daemon::Ap), None);
    let _ = cloud.ok(&["substrate", "delete", "arm-base"]);
}
