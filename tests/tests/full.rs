//! Full disks, full memory, a full pool: while a machine is docked, activated or moved.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, Setup, Use, within};
use serde_json::Value;

/// How long a site's next report may take to be at the center.
const REPORTED_WITHIN: Duration = Duration::from_secs(30);

/// How a site that is full is refused: exit code 5, with words and advice.
fn full(cloud: &Cloud, args: &[&str], named: &[&str]) -> String {
    let words = cloud.refused(args, 5);
    let what = args.join(" ");
    assert!(words.contains("hint: "), "{what}: {words}");
    assert!(named.iter().any(|n| words.contains(n)), "{what}: none of {named:?} in {words}");
    words
}

/// Waits until the center has a report of a site in which `field` is so.
fn reported(cloud: &Cloud, site: Daemon, field: &str, is: impl Fn(u64) -> bool) {
    within(REPORTED_WITHIN, &format!("a report of {field}"), || {
        let sites = cloud.ok(&["site", "list"]);
        let one = sites.as_array().unwrap().iter().find(|s| s["name"] == site.site())?.clone();
        is(one["report"][field].as_u64()?).then_some(())
    });
}

fn names(of: &Value) -> Vec<String> {
    of.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap().to_owned()).collect()
}

/// What is in a directory; nothing when there is none.
fn entries(dir: &Path) -> Vec<String> {
    let all = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = all.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Everything that a refused command must leave as it was.
#[derive(Debug, PartialEq)]
struct State {
    vms: Vec<String>,
    substrates: Vec<String>,
    /// Records and disks of machines, by site; tombstones left out.
    machines: Vec<Vec<String>>,
    pools: Vec<Vec<String>>,
    memory: Vec<Vec<String>>,
}

fn state(cloud: &Cloud, sites: &[Daemon]) -> State {
    let each = |f: &dyn Fn(Daemon) -> Vec<String>| sites.iter().map(|d| f(*d)).collect();
    State {
        vms: names(&cloud.ok(&["vm", "list"])),
        substrates: names(&cloud.ok(&["substrate", "list"])),
        machines: each(&|d| {
            let dir = cloud.site_dir(d).join("data/vms");
            let alive = |n: &String| entries(&dir.join(n)) != ["environment.json"];
            entries(&dir).into_iter().filter(alive).collect()
        }),
        pools: each(&|d| entries(&cloud.site_dir(d).join("data/substrates"))),
        memory: each(&|d| {
            let dir = cloud.memory_dir(d);
            [entries(&dir), entries(&dir.join("substrates"))].concat()
        }),
    }
}

/// Every page and block of the center's pool is as its hash says.
fn clean(cloud: &Cloud) {
    let check = cloud.ok(&["pool", "check", "--site", "center"]);
    assert_eq!(check["check"]["damaged"], Value::Array(Vec::new()), "{check}");
}

#[test]
fn a_full_disk_or_memory_stops_no_machine_and_leaves_nothing_half_done() {
    let cloud = Setup::new()
        .mount(Daemon::Center, Use::Disk, 2048)
        .mount(Daemon::Center, Use::Ram, 2048)
        .center_only();
    let (disk, ram) =
        (cloud.mounted(Daemon::Center, Use::Disk), cloud.mounted(Daemon::Center, Use::Ram));
    let at = [Daemon::Center];
    cloud.bring_substrate();

    // No memory for the first machine of the substrate: its pages are not laid out either.
    ram.leave(30);
    let before = state(&cloud, &at);
    let args = ["vm", "activate", "base", "--name", "a"];
    full(&cloud, &args, &["of tmpfs, has", "of guest memory at"]);
    let create = ["vm", "create", "--image", "tiny", "--name", "b"];
    full(&cloud, &create, &["of tmpfs, has", "of guest memory at"]);
    assert_eq!(state(&cloud, &at), before);
    ram.leave(2048);
    reported(&cloud, Daemon::Center, "ram_files_free_mib", |mib| mib > 1024);
    let _ = cloud.ok(&args);
    cloud.guest("a").fill_memory(60);
    let mut lines = cloud.guest("a").intact(0);

    // No disk for the pages: before it begins, and when it is half through. Of memory, docking takes
    // none.
    let dock = ["vm", "dock", "a", "--name", "docked"];
    let before = state(&cloud, &at);
    for left in [4, 60] {
        disk.leave(left);
        let words = full(&cloud, &dock, &["no room"]);
        assert!(words.contains(disk.path().to_str().unwrap()), "{words}");
        assert_eq!(state(&cloud, &at), before, "with {left} MiB left");
        cloud.runs_at("a", "center");
        lines = cloud.guest("a").intact(lines);
    }

    // Not a byte left, for the registry neither: what needs none goes on, all else is refused.
    reported(&cloud, Daemon::Center, "ram_files_free_mib", |mib| mib > 1024);
    disk.leave(0);
    // Which of its files finds no room first is not said.
    let none = ["of disk, has", "no room", "registry", "No space left on device"];
    full(&cloud, &["vm", "activate", "base", "--name", "b"], &none);
    full(&cloud, &dock, &none);
    assert_eq!(names(&cloud.ok(&["vm", "list"])), ["a"]);

    // Room again: the same commands work, with the same daemon.
    disk.leave(2048);
    reported(&cloud, Daemon::Center, "disk_free_mib", |mib| mib > 1024);
    cloud.runs_at("a", "center");
    cloud.guest("a").intact(lines);
    clean(&cloud);
    ram.leave(1);
    let _ = cloud.ok(&dock);
    ram.leave(2048);
    reported(&cloud, Daemon::Center, "ram_files_free_mib", |mib| mib > 1024);
    assert_eq!(names(&cloud.ok(&["substrate", "list"])), ["base", "docked"]);
    let _ = cloud.ok(&["vm", "activate", "docked", "--name", "c"]);
    cloud.guest("c").intact(lines);
    clean(&cloud);
}

#[test]
fn a_full_pool_takes_no_substrate_and_the_machine_runs_on() {
    let mut cloud = Setup::new()
        .flag(Daemon::Center, "--pool-limit=80M")
        .flag(Daemon::Ap, "--pool-limit=20M")
        .start();
    let at = [Daemon::Center, Daemon::Ap];
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a", "--site", "center"]);
    cloud.guest("a").fill_memory(60);
    let mut lines = cloud.guest("a").intact(0);

    let before = state(&cloud, &at);
    let dock = ["vm", "dock", "a", "--name", "docked"];
    full(&cloud, &dock, &["no room in the pool, which may hold 80 MiB"]);
    // The AP would have to fetch the substrate first.
    let far = ["vm", "activate", "base", "--name", "b", "--site", "cafe"];
    full(&cloud, &far, &["no room in the pool, which may hold 20 MiB"]);
    assert_eq!(state(&cloud, &at), before);
    cloud.runs_at("a", "center");
    lines = cloud.guest("a").intact(lines);
    clean(&cloud);

    // Larger pools: the same commands work.
    for which in at {
        cloud.kill(which);
        cloud.set_flags(which, &["--pool-limit=2G"]);
    }
    cloud.restart_both();
    let _ = cloud.ok(&far);
    cloud.guest("b").intact(0);
    cloud.guest("a").intact(lines);
    let _ = cloud.ok(&dock);
    clean(&cloud);
}

#[test]
fn a_move_to_a_full_site_is_refused_and_the_machine_runs_on() {
    let cloud =
        Setup::new().mount(Daemon::Ap, Use::Disk, 2048).mount(Daemon::Ap, Use::Ram, 2048).start();
    let (disk, ram) = (cloud.mounted(Daemon::Ap, Use::Disk), cloud.mounted(Daemon::Ap, Use::Ram));
    let at = [Daemon::Center, Daemon::Ap];
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "a", "--site", "center"]);
    cloud.guest("a").fill_memory(60);
    let random = "dd if=/dev/urandom of=/data/x bs=1M count=24 2>/dev/null; sync";
    let _ = cloud.guest("a").sh(random);
    let mut lines = cloud.guest("a").intact(0);
    let before = state(&cloud, &at);
    let go = ["vm", "migrate", "a", "--to", "cafe"];
    let stays = |lines: u64, why: &str| {
        cloud.runs_at("a", "center");
        assert!(cloud.relays(Daemon::Ap).is_empty(), "{why}: a relay is left");
        assert_eq!(state(&cloud, &at), before, "{why}");
        cloud.guest("a").intact(lines)
    };

    // Full since the AP's last report, so that the center may still send it there.
    for (field, mount) in [("disk_free_mib", disk), ("ram_files_free_mib", ram)] {
        reported(&cloud, Daemon::Ap, field, |mib| mib > 1000);
        mount.leave(20);
        let named = ["of disk left at", "of guest memory at", "of disk, has", "of tmpfs, has"];
        full(&cloud, &go, &named);
        lines = stays(lines, field);
        mount.leave(1500);
    }
    // Full in its report. What it would have to fetch for an activation is refused likewise.
    disk.leave(20);
    reported(&cloud, Daemon::Ap, "disk_free_mib", |mib| mib <= 20);
    full(&cloud, &go, &["of disk, has"]);
    let far = ["vm", "activate", "base", "--name", "b", "--site", "cafe"];
    full(&cloud, &far, &["of disk, has"]);
    assert_eq!(state(&cloud, &at), before);
    disk.leave(1500);
    reported(&cloud, Daemon::Ap, "disk_free_mib", |mib| mib > 1000);
    reported(&cloud, Daemon::Ap, "ram_files_free_mib", |mib| mib > 1000);

    // Memory that fills up while the pages come: the machine has not left yet, and does not.
    let begun = cloud.ok(&["vm", "migrate", "a", "--to", "cafe", "--no-wait"]);
    let op = begun["op"].as_str().unwrap();
    within(Duration::from_secs(60), "memory on its way", || {
        let o = cloud.op(op);
        let sent = o["progress"].as_array().unwrap().iter().any(|p| p["stage"] == "memory");
        (sent || o["state"] != "running").then(|| ram.leave(0))
    });
    let end = within(Duration::from_secs(120), "the move's end", || {
        let o = cloud.op(op);
        (!["running", "cancelling"].contains(&o["state"].as_str()?)).then_some(o)
    });
    assert_eq!(end["state"], "failed", "{end}");
    let why = &end["error"];
    assert_eq!(why["code"], "no-room", "{why}");
    assert!(why["message"].as_str().unwrap().contains("no room left for guest memory"), "{why}");
    ram.leave(1500);
    lines = stays(lines, "memory that filled up on the way");

    // Room again: the same command works.
    reported(&cloud, Daemon::Ap, "ram_files_free_mib", |mib| mib > 1000);
    let _ = cloud.ok(&go);
    cloud.runs_at("a", "cafe");
    lines = cloud.guest("a").intact(lines);

    // A guest that finds no room for what it writes stands still, and goes on when there is some.
    disk.leave(8);
    let write = "dd if=/dev/urandom of=/data/y bs=1M count=40; sync";
    let _ = cloud.guest("a").sh(&format!("({write}) >/dev/null 2>&1 </dev/null &"));
    let reason = within(Duration::from_secs(60), "the guest to stand still", || {
        let vm = cloud.vm("a");
        (vm["state"] == "failed").then(|| vm["reason"].as_str().unwrap_or_default().to_owned())
    });
    assert!(reason.contains("no room for its disk"), "{reason}");
    disk.leave(1500);
    cloud.runs_at("a", "cafe");
    cloud.guest("a").intact(lines);
}

#[test]
fn memory_of_idle_substrates_stays_within_its_budget_and_all_can_be_activated() {
    const BUDGET: u64 = 150 << 20;
    // Two machines are promised 320 MiB each, and what they map is there besides.
    let cloud = Setup::new()
        .flag(Daemon::Center, "--memory-cache=150M")
        .flag(Daemon::Center, "--memory-promise=800M")
        .center_only();
    cloud.bring_substrate();
    let archive = cloud.substrate_archive();
    let names: Vec<String> = (0..6).map(|n| format!("s{n}")).collect();
    for name in &names {
        let _ = cloud.ok(&["substrate", "import", archive.to_str().unwrap(), "--name", name]);
    }
    let tmpfs = cloud.memory_dir(Daemon::Center).join("substrates");
    let sealed = Peak::of(&tmpfs);
    for name in names.iter().chain(&names[..2]) {
        let _ = cloud.ok(&["vm", "activate", name, "--name", "a"]);
        cloud.guest("a").intact(0);
        let _ = cloud.ok(&["vm", "delete", "a"]);
    }
    let files = std::fs::read_dir(&tmpfs).unwrap().count();
    assert!((1..names.len()).contains(&files), "{files} files");

    // What clones may come to write to is promised, and no more than there is.
    let a = ["vm", "activate", "s0", "--name", "a"];
    let _ = cloud.ok(&a);
    let _ = cloud.ok(&["vm", "activate", "s0", "--name", "b"]);
    let third = ["vm", "activate", "s0", "--name", "c"];
    let promised = ["MiB of memory to its machines", "that nobody is promised"];
    full(&cloud, &third, &promised);
    reported(&cloud, Daemon::Center, "memory_promised_mib", |mib| (640..800).contains(&mib));
    full(&cloud, &third, &promised);
    assert_eq!(names_of_machines(&cloud), ["a", "b"]);
    let _ = cloud.ok(&["vm", "stop", "a", "--force"]);
    reported(&cloud, Daemon::Center, "memory_promised_mib", |mib| mib < 480);
    let _ = cloud.ok(&third);
    full(&cloud, &["vm", "start", "a"], &promised);
    // Two that start at once do not both get what is left.
    let _ = cloud.ok(&["vm", "stop", "c", "--force"]);
    let answers = std::thread::scope(|s| {
        let both = ["a", "c"].map(|vm| s.spawn(|| cloud.run(&["vm", "start", vm])));
        both.map(|starts| starts.join().unwrap())
    });
    let late = match answers.each_ref().map(|a| a.exit) {
        [0, refused] if refused != 0 => "c",
        [refused, 0] if refused != 0 => "a",
        _ => panic!("one of two starts: {answers:?}"),
    };
    // A machine that is docked becomes an idle one's memory, or none.
    let _ = cloud.ok(&["vm", "dock", "b", "--name", "of-b"]);
    let _ = cloud.ok(&["vm", "start", late]);
    let _ = cloud.ok(&["vm", "dock", late, "--name", "of-late"]);
    let (peak, files) = sealed.end();
    assert!(peak > 0 && peak <= BUDGET, "{peak} bytes of sealed memory on tmpfs: {files:?}");
    clean(&cloud);
}

fn names_of_machines(cloud: &Cloud) -> Vec<String> {
    names(&cloud.ok(&["vm", "list"]))
}

/// The most that the files of a directory took at once, looked at all the time, and which they were.
struct Peak {
    over: Arc<AtomicBool>,
    looks: std::thread::JoinHandle<(u64, Vec<(String, u64)>)>,
}

impl Peak {
    fn of(dir: &Path) -> Self {
        let (over, dir) = (Arc::new(AtomicBool::new(false)), dir.to_owned());
        let stop = Arc::clone(&over);
        let looks = std::thread::spawn(move || {
            let mut most = (0, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                let files = std::fs::read_dir(&dir).into_iter().flatten().flatten();
                let sizes = files.filter_map(|f| {
                    let name = f.file_name().to_string_lossy().into_owned();
                    Some((name, f.metadata().ok()?.blocks() * 512))
                });
                let sizes: Vec<_> = sizes.collect();
                let now = sizes.iter().map(|(_, bytes)| bytes).sum();
                if now > most.0 {
                    most = (now, sizes);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            most
        });
        Self { over, looks }
    }

    fn end(self) -> (u64, Vec<(String, u64)>) {
        self.over.store(true, Ordering::Relaxed);
        self.looks.join().unwrap()
    }
}
