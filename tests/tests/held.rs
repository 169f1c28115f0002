//! A move between two sites that hold the substrate which the machine comes from.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::path::Path;

use godwit_tests::{Cloud, Daemon};
use serde_json::Value;

/// Turns a bit over in every page of a sealed memory file that has content.
fn damage_every_page(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    // Whoever runs this may write to it all the same.
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let pages = bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0));
    pages.map(|(n, page)| file.write_all_at(&[page[7] ^ 1], n as u64 * 4096 + 7).unwrap()).count()
}

fn migrate(cloud: &Cloud, to: Daemon) -> Value {
    let moved = cloud.ok(&["vm", "migrate", "m", "--to", to.site()]);
    moved["report"].clone()
}

#[test]
fn what_both_sites_hold_is_not_sent_and_a_copy_that_differs_is_found() {
    let cloud = Cloud::start();
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "m", "--site", "cafe"]);
    let lines = cloud.guest("m").intact(0);

    let report = migrate(&cloud, Daemon::Center);
    let pages = |what: &str| report["pages"][what].as_u64().unwrap();
    let (data, known, changed) = (pages("data"), pages("known"), pages("changed"));
    assert!(known > data / 2 && known < data && changed > 0, "{report}");
    // What is sent are the pages that changed, not all: a third of their bytes at most would be packed.
    let sent = report["bytes"]["memory"].as_u64().unwrap();
    assert!(sent < data * 4096 / 3, "{report}");
    let lines = cloud.guest("m").intact(lines);

    // Back and there again: what it had changed of the substrate's pages, and has not changed since, is
    // where it left it.
    let mut lines = lines;
    for to in [Daemon::Ap, Daemon::Center] {
        let report = migrate(&cloud, to);
        let visited = report["pages"]["visited"].as_u64().unwrap();
        assert!(visited > 100, "{report}");
        lines = cloud.guest("m").intact(lines);
    }

    // The destination's copy goes bad after it was read and found good.
    let id = cloud.ok(&["substrate", "get", "base"])["id"].as_str().unwrap().to_owned();
    let copy = cloud.memory_dir(Daemon::Ap).join(format!("substrates/{id}.mem"));
    cloud.hold("move.prepared");
    let begun = cloud.ok(&["vm", "migrate", "m", "--to", "cafe", "--no-wait"]);
    let op = begun["op"].as_str().unwrap().to_owned();
    let _ = cloud.held("move.prepared");
    assert!(damage_every_page(&copy) > 1000);
    cloud.let_go("move.prepared");
    let words = cloud.refused(&["op", "wait", &op], 1);
    assert!(words.contains("is not the same"), "{words}");
    cloud.runs_at("m", "center");
    let lines = cloud.guest("m").intact(lines);
    for at in [Daemon::Center, Daemon::Ap] {
        assert!(cloud.relays(at).is_empty(), "a relay is left at {}", at.site());
    }
    assert_eq!(cloud.qemu(&cloud.vm("m"), Daemon::Ap), None);

    // It is made again for the next move.
    let report = migrate(&cloud, Daemon::Ap);
    assert!(report["pages"]["known"].as_u64().unwrap() > 1000, "{report}");
    cloud.runs_at("m", "cafe");
    let lines = cloud.guest("m").intact(lines);
    let _ = cloud.guest("m").sh("sync; echo 3 >/proc/sys/vm/drop_caches");
    cloud.guest("m").intact(lines);
}
