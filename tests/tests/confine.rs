//! Each QEMU is a uid of its own that sees nothing of other machines, and lives through all that a
//! machine lives through.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, within};

/// The values of one line of `/proc/PID/status`.
fn status(pid: i32, key: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').split_whitespace().map(|n| n.parse().unwrap()).collect()
}

/// The uid of a QEMU, which has it in every sense, no other right and mounts of its own.
fn apart(pid: i32) -> u64 {
    let uids: HashSet<u64> = status(pid, "Uid").into_iter().collect();
    assert_eq!(uids.len(), 1, "{uids:?}");
    let uid = uids.into_iter().next().unwrap();
    assert!(uid >= 2_000_000_000, "{uid}");
    assert_eq!(status(pid, "Gid"), [uid; 4]);
    assert!(status(pid, "Groups").is_empty());
    assert_eq!(status(pid, "NoNewPrivs"), [1]);
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
    let mounts = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/mnt")).unwrap();
    assert_ne!(mounts(&pid.to_string()), mounts("self"));
    uid
}

/// The control group that the record of a QEMU names.
fn group_of(run: &Path) -> PathBuf {
    let record = std::fs::read(run.join("machine.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    record["launch"]["group"]["dir"].as_str().expect("a group").into()
}

fn number(path: &Path) -> u64 {
    std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// Whether who has taken that QEMU over can do it, by `test WHAT PATH`.
fn can(pid: i32, uid: u64, what: &str, path: &Path) -> bool {
    let done = Command::new("nsenter")
        .args(["-t", &pid.to_string(), "-m", "-S", &uid.to_string(), "-G", &uid.to_string()])
        .args(["/usr/bin/test", what])
        .arg(path)
        .status()
        .unwrap();
    assert!(matches!(done.code(), Some(0 | 1)), "{done}");
    done.success()
}

#[test]
fn each_qemu_has_a_uid_of_its_own_and_nothing_of_others() {
    let mut cloud = Cloud::start();
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "seed", "--site", "center"]);
    cloud.guest("seed").answers();
    let seed = apart(cloud.qemu(&cloud.vm("seed"), Daemon::Center).unwrap());
    let _ = cloud.ok(&["vm", "dock", "seed", "--name", "s"]);

    // One that is started for the activation, and one that waited for it.
    let _ = cloud.ok(&["vm", "activate", "s", "--name", "a", "--site", "center"]);
    let _ = cloud.ok(&["vm", "activate", "s", "--name", "b", "--site", "center"]);
    let (a, b) = (cloud.vm("a"), cloud.vm("b"));
    let pid = cloud.qemu(&a, Daemon::Center).unwrap();
    let other = cloud.qemu(&b, Daemon::Center).unwrap();
    let (uid, other_uid) = (apart(pid), apart(other));
    assert!(uid != other_uid && uid != seed);

    let run = |vm: &serde_json::Value| {
        let id = vm["id"].as_str().unwrap().replace('-', "");
        cloud.site_dir(Daemon::Center).join("run").join(id)
    };
    assert!(can(pid, uid, "-r", &run(&a).join("console.log")));
    assert!(can(pid, uid, "-w", &cloud.vm_dir(&a, Daemon::Center).join("top.qcow2")));
    assert!(can(pid, uid, "-w", Path::new("/dev/userfaultfd")));
    let memory = cloud.memory_dir(Daemon::Center);
    let mut files = std::fs::read_dir(memory.join("substrates")).unwrap();
    let sealed = files.next().unwrap().unwrap().path();
    let docked = cloud.site_dir(Daemon::Center).join("data/substrates");
    let docked = docked.join(sealed.file_stem().unwrap());
    assert!(docked.join("state").exists());
    assert!(can(pid, uid, "-r", &sealed) && can(pid, uid, "-r", &docked.join("ready/layer.qcow2")));
    assert!(!can(pid, uid, "-w", &sealed));
    for (what, path) in [
        ("-r", run(&a)),
        ("-w", run(&a)),
        ("-r", run(&a).join("machine.json")),
        ("-w", run(&a).join("qmp0.sock")),
        ("-e", run(&b).join("console.log")),
        ("-e", run(&b).join("qmp0.sock")),
        ("-r", run(&b).parent().unwrap().to_owned()),
        ("-e", cloud.vm_dir(&b, Daemon::Center).join("top.qcow2")),
        ("-e", cloud.site_dir(Daemon::Center).join("data/keys")),
        ("-e", cloud.site_dir(Daemon::Center).join("data/store")),
        ("-e", docked.join("state")),
        ("-w", docked.join("ready/layer.qcow2")),
        ("-w", memory.join("substrates")),
        ("-r", memory.join("scratch")),
        ("-e", "/root".into()),
        ("-e", "/etc/passwd".into()),
        ("-w", "/".into()),
        ("-e", format!("/proc/{other}/status").into()),
    ] {
        assert!(!can(pid, uid, what, &path), "{what} {}", path.display());
    }

    // One that outgrows its control group is ended alone, and its state says why.
    let group = group_of(&run(&b));
    let unified = group.join("memory.max").exists();
    let [most, used] = match unified {
        true => ["memory.max", "memory.current"],
        false => ["memory.limit_in_bytes", "memory.usage_in_bytes"],
    };
    let limit = number(&group.join(most));
    assert!((1 << 30..4 << 30).contains(&limit), "{limit}");
    assert_ne!(group, group_of(&run(&a)));
    std::fs::write(group.join(most), (number(&group.join(used)) + (8 << 20)).to_string()).unwrap();
    let _ = cloud.guest("b").try_sh("dd if=/dev/urandom of=/tmp/x bs=1M count=64");
    let failed = within(Duration::from_secs(30), "its end to be seen", || {
        Some(cloud.vm("b")).filter(|vm| vm["state"] == "failed")
    });
    let reason = failed["reason"].as_str().unwrap();
    assert!(reason.contains("more than its") && reason.contains("of memory"), "{reason}");
    assert!(!group.exists());
    cloud.guest("a").answers();

    // It moves while it runs, there and back, and a daemon's restart finds it again.
    let found = cloud.guest("a").identity();
    let _ = cloud.ok(&["vm", "migrate", "a", "--to", Daemon::Ap.site()]);
    let there = apart(cloud.qemu(&a, Daemon::Ap).unwrap());
    assert!(there != other_uid);
    cloud.kill(Daemon::Center);
    cloud.kill(Daemon::Ap);
    cloud.restart_both();
    let _ = cloud.ok(&["vm", "migrate", "a", "--to", "center"]);
    let _ = apart(cloud.qemu(&a, Daemon::Center).unwrap());
    assert_eq!(cloud.guest("a").identity(), found);
    let _ = cloud.ok(&["vm", "dock", "a", "--name", "u"]);
    let _ = cloud.ok(&["vm", "activate", "u", "--name", "c", "--site", "center"]);
    cloud.guest("c").answers();
    let _ = apart(cloud.qemu(&cloud.vm("c"), Daemon::Center).unwrap());
    // From its disk, too.
    let _ = cloud.ok(&["vm", "stop", "c", "--force"]);
    let _ = cloud.ok(&["vm", "start", "c"]);
    cloud.guest("c").answers();
    let _ = apart(cloud.qemu(&cloud.vm("c"), Daemon::Center).unwrap());
}
