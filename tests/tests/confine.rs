//! Each QEMU and each relay is a uid of its own that sees nothing of other machines, and lives through
//! all that a machine lives through.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, within};

/// The machine may run at its destination, and the source does not know it.
const COMMITTED: &str = "relay.committed";

/// The values of one line of `/proc/PID/status`.
fn status(pid: i32, key: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    let words = line.trim_start_matches(':').trim_end_matches(" kB").split_whitespace();
    words.map(|n| n.parse().unwrap()).collect()
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

/// Whether who has taken that process over can signal `other`.
fn can_signal(pid: i32, uid: u64, other: i32) -> bool {
    let done = Command::new("nsenter")
        .args(["-t", &pid.to_string(), "-m", "-S", &uid.to_string(), "-G", &uid.to_string()])
        .args(["/bin/sh", "-c", &format!("kill -0 {other} 2>&1")])
        .output()
        .unwrap();
    done.status.success()
}

/// Both relays of a move are uids of their own, at the step at which the machine may run at its
/// destination; `qemus` are the uids of its QEMUs at the center and at the AP.
fn relays_are_apart(cloud: &Cloud, vm: &serde_json::Value, qemus: [u64; 2]) {
    let ends = [Daemon::Center, Daemon::Ap];
    let pids = ends.map(|at| cloud.relays(at)[0]);
    let uids = pids.map(apart);
    let all: HashSet<u64> = uids.into_iter().chain(qemus).collect();
    assert_eq!(all.len(), 4, "{all:?}");
    for (n, at) in ends.into_iter().enumerate() {
        let (pid, uid, site) = (pids[n], uids[n], cloud.site_dir(at));
        let run = site.join("run");
        let mine = std::fs::read_dir(&run).unwrap().flatten().map(|e| e.path());
        let mine = mine.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("mig-"));
        let mine = mine.last().unwrap();
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(mine.join("relay.json")).unwrap()).unwrap();
        let disk = &config["disk"];
        assert!(can(pid, uid, "-r", Path::new(disk["base"].as_str().unwrap())));
        assert!(can(pid, uid, "-r", &run.join("for-relays/revoked.json")));
        let data = cloud.vm_dir(vm, at);
        if at == Daemon::Ap {
            assert!(can(pid, uid, "-w", &data.join("in")));
            assert!(can(pid, uid, "-w", Path::new(config["qemu"].as_str().unwrap())));
        }
        let qemu = cloud.qemu(vm, at).unwrap();
        let id = vm["id"].as_str().unwrap().replace('-', "");
        for (what, path) in [
            ("-w", mine.clone()),
            ("-r", mine.clone()),
            ("-r", mine.join("relay.json")),
            ("-r", mine.join("relay.log")),
            ("-w", mine.join("control")),
            ("-w", run.join("for-relays")),
            ("-w", run.join("for-relays/revoked.json")),
            ("-w", disk["base"].as_str().unwrap().into()),
            ("-e", run.join(id)),
            ("-e", data.join("top.qcow2")),
            ("-e", data.join("environment.json")),
            ("-w", data),
            ("-e", site.join("data/keys")),
            ("-e", site.join("data/store")),
            ("-e", cloud.memory_dir(at)),
            ("-e", "/root".into()),
            ("-e", "/etc/passwd".into()),
            ("-e", "/dev/userfaultfd".into()),
            ("-w", "/".into()),
            ("-e", format!("/proc/{qemu}/status").into()),
            ("-e", format!("/proc/{}/status", std::process::id()).into()),
        ] {
            assert!(!can(pid, uid, what, &path), "{at:?}: {what} {}", path.display());
        }
        assert!(can_signal(pid, uid, pid));
        for other in [qemu, pids[1 - n], cloud.pid(at)] {
            assert!(!can_signal(pid, uid, other), "{at:?}: {other}");
        }
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        for to in open.filter_map(|e| std::fs::read_link(e.path()).ok()) {
            assert!(!to.starts_with(site.join("data/keys")), "{}", to.display());
        }
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(groups.contains("/mig-"), "{groups}");
        let had = status(pid, "VmHWM").first().copied();
        eprintln!("the relay at {at:?} has had {had:?} KiB");
    }
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
    cloud.hold(COMMITTED);
    let begun = cloud.ok(&["vm", "migrate", "a", "--to", Daemon::Ap.site(), "--no-wait"]);
    let _ = cloud.held(COMMITTED);
    let there = apart(cloud.qemu(&a, Daemon::Ap).unwrap());
    relays_are_apart(&cloud, &a, [uid, there]);
    cloud.let_go(COMMITTED);
    let op = begun["op"].as_str().unwrap();
    within(Duration::from_secs(60), "the move's end", || {
        Some(()).filter(|()| cloud.op(op)["state"] == "done")
    });
    // Nothing of its relays is left.
    for at in [Daemon::Center, Daemon::Ap] {
        assert!(!cloud.vm_dir(&a, at).join("in").exists());
        within(Duration::from_secs(20), "relays to be gone", || {
            Some(()).filter(|()| cloud.relays(at).is_empty())
        });
    }
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
