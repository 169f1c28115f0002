//! A machine that goes back to where it was takes with it what has changed since.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_tests::{Cloud, Daemon, within};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// What the guest has in memory that it does not change, and what it writes between two moves.
const KEPT_MIB: u32 = 24;
const NEW_MIB: u32 = 4;
/// What a guest changes by itself while it is asked to work for a few seconds.
const BESIDE_MIB: u64 = 8;
/// A center sees its sites every four seconds.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// Tells in a guest what is in its memory file `name`.
fn sum(cloud: &Cloud, name: &str) -> String {
    cloud.guest("m").sh(&format!("sha256sum /tmp/{name}"))
}

fn fill(cloud: &Cloud, name: &str, mib: u32) -> String {
    let _ = cloud.guest("m").sh(&format!(
        "rm -f /tmp/{name}; dd if=/dev/urandom of=/tmp/{name} bs=1M count={mib} 2>/dev/null"
    ));
    sum(cloud, name)
}

/// The report of a move: bytes of memory on the wire, and pages that were named as of a visit.
fn migrate(cloud: &Cloud, to: Daemon) -> (u64, u64) {
    let moved = cloud.ok(&["vm", "migrate", "m", "--to", to.site()]);
    let report: &Value = &moved["report"];
    let memory = report["bytes"]["memory"].as_u64().unwrap();
    let visited = report["pages"]["visited"].as_u64().unwrap();
    let (to, total) = (to.site(), &report["total_ms"]);
    eprintln!("to {to}: {} KiB of memory, {visited} pages by visit, {total} ms", memory >> 10);
    (memory, visited)
}

/// The memory that a site keeps of machines that have left it.
fn kept(cloud: &Cloud, at: Daemon) -> Vec<PathBuf> {
    let dir = std::fs::read_dir(cloud.memory_dir(at).join("visits")).unwrap();
    dir.map(|item| item.unwrap().path()).collect()
}

#[test]
fn a_machine_that_comes_back_brings_what_has_changed_and_a_visit_that_is_damaged_is_found() {
    let cloud = Cloud::over_link(100.0, 5.0);
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "m", "--site", "center"]);
    cloud.guest("m").answers();
    let before = fill(&cloud, "before", KEPT_MIB);
    let _ = cloud.guest("m").sh("yes godwit-was-here | head -c 65536 >/tmp/mark");

    let (memory, visited) = migrate(&cloud, Daemon::Ap);
    assert!(memory > u64::from(KEPT_MIB) * MIB, "{memory}");
    assert_eq!((visited, kept(&cloud, Daemon::Center).len()), (0, 1));
    assert!(kept(&cloud, Daemon::Ap).is_empty(), "it has not left");
    let there = fill(&cloud, "there", NEW_MIB);

    // Back: what it did there, and not what it had brought.
    let changed = (u64::from(NEW_MIB) + BESIDE_MIB) * MIB;
    let (memory, visited) = migrate(&cloud, Daemon::Center);
    cloud.runs_at("m", "center");
    assert!(memory < changed, "{memory} for {changed}");
    assert!(visited > u64::from(KEPT_MIB) * MIB / 4096, "{visited}");
    assert_eq!(sum(&cloud, "before"), before);
    assert_eq!(sum(&cloud, "there"), there);
    assert!(kept(&cloud, Daemon::Center).is_empty(), "it is here again");

    // There once more, where what is kept has gone bad: found before it switches.
    let file = kept(&cloud, Daemon::Ap).pop().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let mark = b"godwit-was-here\ngodwit-was-here\n";
    let at = bytes.windows(mark.len()).position(|w| w == mark).unwrap() as u64;
    // Whoever runs this may write to it all the same.
    let copy = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    copy.write_all_at(b"GODWIT", at).unwrap();
    let words = cloud.refused(&["vm", "migrate", "m", "--to", "cafe"], 1);
    assert!(words.contains("is not the same"), "{words}");
    cloud.runs_at("m", "center");
    assert!(kept(&cloud, Daemon::Ap).is_empty(), "it is of no use");
    assert_eq!(sum(&cloud, "before"), before);
    let (memory, visited) = migrate(&cloud, Daemon::Ap);
    assert!(memory > u64::from(KEPT_MIB) * MIB && visited == 0, "{memory}, {visited}");

    // And both ways by what has changed.
    for to in [Daemon::Center, Daemon::Ap] {
        let (memory, visited) = migrate(&cloud, to);
        assert!(memory < BESIDE_MIB * MIB, "{memory}");
        assert!(visited > u64::from(KEPT_MIB) * MIB / 4096, "{visited}");
    }
    assert_eq!(sum(&cloud, "before"), before);
    assert_eq!(sum(&cloud, "there"), there);
    let text = cloud.guest("m").sh("uniq /tmp/mark");
    assert_eq!(text, "godwit-was-here");

    // Nothing is kept of who is gone for good.
    assert_eq!(kept(&cloud, Daemon::Center).len(), 1);
    let _ = cloud.ok(&["vm", "delete", "m"]);
    within(SEEN_WITHIN, "what was kept of a deleted machine to go", || {
        kept(&cloud, Daemon::Center).is_empty().then_some(())
    });
    assert!(kept(&cloud, Daemon::Ap).is_empty());
}

/// The sealed memory of the substrate `base`.
fn sealed(cloud: &Cloud, at: Daemon) -> PathBuf {
    let id = cloud.ok(&["substrate", "get", "base"])["id"].as_str().unwrap().to_owned();
    cloud.memory_dir(at).join(format!("substrates/{id}.mem"))
}

/// Makes a clone at the center and moves it to a site that does not have its substrate; the bytes of
/// memory that took, and how many pages of its own the center keeps of it.
fn clone_that_has_left(cloud: &Cloud) -> (u64, u64) {
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "m", "--site", "center"]);
    let lines = cloud.guest("m").intact(0);
    let (memory, visited) = migrate(cloud, Daemon::Ap);
    assert!(memory > BESIDE_MIB * MIB && visited == 0, "{memory}, {visited}");
    cloud.guest("m").intact(lines);
    let kept = kept(cloud, Daemon::Center).pop().unwrap();
    (memory, std::fs::metadata(kept).unwrap().blocks() * 512 / 4096)
}

#[test]
fn a_clone_that_comes_back_finds_its_own_pages_and_its_substrates_where_it_left_them() {
    let cloud = Cloud::over_link(100.0, 5.0);
    cloud.bring_substrate();
    let sealed = sealed(&cloud, Daemon::Center);

    // Its own pages are a part of what it left. The others are where the pool has them, also when they
    // gave way to something else meanwhile.
    let (there, own) = clone_that_has_left(&cloud);
    std::fs::remove_file(&sealed).unwrap();
    let (back, visited) = migrate(&cloud, Daemon::Center);
    assert!(visited > 2 * own && back < there / 3, "{back} of {there}; {visited} pages, {own} own");
    assert!(sealed.exists(), "it is made again");
    let _ = cloud.guest("m").intact(0);
    let _ = cloud.ok(&["vm", "delete", "m"]);

    // It goes bad after it was opened: found before the machine switches, and not used again.
    let _ = clone_that_has_left(&cloud);
    cloud.hold("move.prepared");
    let begun = cloud.ok(&["vm", "migrate", "m", "--to", "center", "--no-wait"]);
    let _ = cloud.held("move.prepared");
    damage_what_it_has_of(&sealed, &cloud);
    cloud.let_go("move.prepared");
    let words = cloud.refused(&["op", "wait", begun["op"].as_str().unwrap()], 1);
    assert!(words.contains("is not the same"), "{words}");
    cloud.runs_at("m", "cafe");
    assert!(kept(&cloud, Daemon::Center).is_empty(), "it is of no use");
    let (_, visited) = migrate(&cloud, Daemon::Center);
    assert_eq!(visited, 0);
    let _ = cloud.guest("m").intact(0);
    let _ = cloud.ok(&["vm", "delete", "m"]);

    // The clone that follows shows that the memory was made again. When its substrate is gone it comes
    // back by its own pages.
    let (there, own) = clone_that_has_left(&cloud);
    let _ = cloud.ok(&["substrate", "delete", "base"]);
    let (back, visited) = migrate(&cloud, Daemon::Center);
    assert!(visited > 0 && visited <= own, "{back} of {there}; {visited} pages, {own} own");
    let _ = cloud.guest("m").intact(0);
}

/// Turns a bit over in every page of the sealed memory that the machine still has, and that is none of
/// its own which are kept.
fn damage_what_it_has_of(sealed: &Path, cloud: &Cloud) {
    let kept = std::fs::read(kept(cloud, Daemon::Center).pop().unwrap()).unwrap();
    let now = std::fs::read(cloud.vm_memory(&cloud.vm("m"), Daemon::Ap)).unwrap();
    let then = std::fs::read(sealed).unwrap();
    // Whoever runs this may write to it all the same.
    let file = std::fs::OpenOptions::new().write(true).open(sealed).unwrap();
    let zero = [0; 4096];
    let mut damaged = 0;
    for (n, page) in then.chunks(4096).enumerate() {
        let at = n * 4096..(n + 1) * 4096;
        if *page != zero && now[at.clone()] == *page && kept[at.clone()] == zero {
            file.write_all_at(&[page[7] ^ 1], at.start as u64 + 7).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 1000, "{damaged}");
}
