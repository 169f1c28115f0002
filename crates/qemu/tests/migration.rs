//! Migration from QEMU to QEMU over a unix socket.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::path::Path;
use std::time::{Duration, Instant};

use godwit_qemu::{
    Capability, DiskChain, DiskLayer, Launch, Layer, Life, Machine, MemorySource, MigrationStatus,
    Node, Parameters, VmGenId,
};
use godwit_testkit::{LONG, Place, RESEEDED, incoming, serve, sh, tiny, up};
use serde_json::json;

/// A running guest and the machine that waits for it. Both open the same cow image: QEMU hands its
/// locks over.
async fn pair(place: &Place) -> (Machine, Machine) {
    pair_with(place, async |_, _| {}).await
}

/// As [`pair`], with `prepare` changing what the target is launched with.
async fn pair_with(
    place: &Place,
    prepare: impl AsyncFnOnce(&Machine, &mut Launch),
) -> (Machine, Machine) {
    let launch = place.launch("source", &tiny());
    let mut there = incoming(launch.clone());
    there.run_dir = place.path("target");
    there.memory = MemorySource::Shared { path: place.memory("target") };
    let source = launch.spawn().await.unwrap();
    up(&source).await;
    there.vmgenid = VmGenId::Keep(source.generation_id().await.unwrap().unwrap());
    prepare(&source, &mut there).await;
    let target = there.spawn().await.unwrap();
    assert_eq!(target.generation_id().await.unwrap(), source.generation_id().await.unwrap());
    for end in [&source, &target] {
        end.set_capabilities(&[Capability::PostcopyRam, Capability::PostcopyPreempt])
            .await
            .unwrap();
    }
    (source, target)
}

/// Starts pre-copy over `socket`, slowly enough that its first round is still under way at the
/// switch, and switches to post-copy. Gives the time from STOP to RESUME.
async fn switch(source: &Machine, target: &Machine, socket: &Path) -> Duration {
    let (mut from, mut to) = (source.events(), target.events());
    target.migrate_incoming(socket).await.unwrap();
    let slow = Parameters { max_bandwidth: Some(20 << 20), ..Parameters::default() };
    source.set_parameters(slow).await.unwrap();
    source.migrate_to(socket).await.unwrap();
    let active = [MigrationStatus::Active];
    source.wait_migration("waiting for pre-copy", &active, LONG).await.unwrap();
    source.start_postcopy().await.unwrap();
    let stop = from.wait_named("STOP", LONG).await.unwrap();
    let resume = to.wait_named("RESUME", LONG).await.unwrap();
    resume.at.saturating_sub(stop.at)
}

#[tokio::test]
async fn one_precopy_round_then_postcopy_and_the_guest_goes_on() {
    let place = Place::new();
    let (source, target) = pair(&place).await;
    sh(&source, "echo kept > /tmp/mark; echo kept > /data/mark; sync").await;
    let memory = std::fs::read(place.memory("source")).unwrap();
    let rings = source.ring_pages().await.unwrap();
    let used = |p: &&u64| memory[**p as usize * 4096..][..4096].iter().any(|b| *b != 0);
    eprintln!("{} pages of queues, {} in use", rings.len(), rings.iter().filter(used).count());
    assert!(rings.iter().filter(used).count() >= 4, "{rings:?}");
    let begin = Instant::now();
    let gap = switch(&source, &target, &place.path("mig")).await;
    let ends = [MigrationStatus::Completed];
    let info = source.wait_migration("migrating", &ends, LONG).await.unwrap();
    eprintln!(
        "switch: {:?} after STOP, total {:?}, {} bytes, {} pages asked for",
        gap,
        begin.elapsed(),
        info.transferred,
        info.postcopy_requests
    );
    target.wait_migration("arriving", &ends, LONG).await.unwrap();
    // QEMU says that it has ended a moment before it stands in this state.
    source.wait_life("leaving", Life::PostMigrate, LONG).await.unwrap();
    source.kill().await;
    assert_eq!(sh(&target, "cat /tmp/mark /data/mark").await, "kept\nkept");
    let reseeded = format!("if {RESEEDED}; then echo yes; else echo no; fi");
    assert_eq!(sh(&target, &reseeded).await, "no", "a guest that moves is no copy");
    target.kill().await;
}

#[tokio::test]
async fn a_cancelled_migration_leaves_the_guest_running_at_the_source() {
    let place = Place::new();
    let (source, target) = pair(&place).await;
    let socket = place.path("mig");
    target.migrate_incoming(&socket).await.unwrap();
    let slow = Parameters { max_bandwidth: Some(1 << 20), ..Parameters::default() };
    source.set_parameters(slow).await.unwrap();
    source.migrate_to(&socket).await.unwrap();
    let active = [MigrationStatus::Active];
    source.wait_migration("waiting for pre-copy", &active, LONG).await.unwrap();
    source.migrate_cancel().await.unwrap();
    assert_eq!(source.life().await.unwrap(), Life::Running);
    assert_eq!(sh(&source, "echo alive").await, "alive");
    for machine in [source, target] {
        machine.kill().await;
    }
}

#[tokio::test]
async fn a_post_copy_that_lost_its_connection_goes_on_over_another() {
    let place = Place::new();
    let (source, target) = pair(&place).await;
    sh(&source, "echo kept > /tmp/mark").await;
    let slow = Parameters { max_postcopy_bandwidth: Some(4 << 20), ..Parameters::default() };
    source.set_parameters(slow).await.unwrap();
    switch(&source, &target, &place.path("mig")).await;
    source.migrate_pause().await.unwrap();
    let paused = [MigrationStatus::PostcopyPaused];
    for end in [&source, &target] {
        end.wait_migration("losing the connection", &paused, LONG).await.unwrap();
    }
    let unlimited = Parameters { max_postcopy_bandwidth: Some(0), ..Parameters::default() };
    source.set_parameters(unlimited).await.unwrap();
    let begin = Instant::now();
    let socket = place.path("again");
    target.migrate_recover(&socket).await.unwrap();
    source.migrate_resume(&socket).await.unwrap();
    let ends = [MigrationStatus::Completed];
    source.wait_migration("migrating", &ends, LONG).await.unwrap();
    target.wait_migration("arriving", &ends, LONG).await.unwrap();
    eprintln!("recovered and everything across after {:?}", begin.elapsed());
    source.kill().await;
    assert_eq!(sh(&target, "cat /tmp/mark").await, "kept");
    target.kill().await;
}

#[tokio::test]
async fn a_disk_is_read_through_the_source_until_the_pivot() {
    let place = Place::new();
    let nbd = place.path("nbd");
    let mut server = None;
    let (source, target) = pair_with(&place, async |source, there| {
        // From here on the source's disk is at rest and can be read beside QEMU. (QEMU's own
        // export of an inactive node answers reads alone, no questions for its allocation, and
        // those a write of part of a cluster needs.)
        sh(source, "echo kept > /data/mark && umount /data").await;
        let from = source.launch().disk.unwrap();
        let image = json!({
            "driver": "qcow2", "force-share": true,
            "file": { "driver": "file", "filename": from.top },
            "backing": { "driver": "raw", "file": { "driver": "file", "filename": tiny().base } },
        });
        server = Some(serve(&nbd, &[&format!("json:{image}")]).await);
        let top = place.cow("there.qcow2", &tiny().base);
        there.disk = Some(DiskChain::over(vec![Layer::Nbd { socket: nbd.clone() }], top));
    })
    .await;
    assert_eq!(target.block_nodes().await.unwrap(), ["remote", "top", "top-file"]);
    let gap = switch(&source, &target, &place.path("mig")).await;
    let ends = [MigrationStatus::Completed];
    source.wait_migration("migrating", &ends, LONG).await.unwrap();
    target.wait_migration("arriving", &ends, LONG).await.unwrap();
    assert_eq!(sh(&target, "mount /dev/vda /data && cat /data/mark").await, "kept");
    sh(&target, "echo later > /data/later; sync").await;

    let left = source.launch().disk.unwrap();
    let chain = vec![
        left.layers[0].clone(),
        DiskLayer { node: Node::Mid, layer: Layer::Qcow2 { path: left.top } },
    ];
    let took = target.pivot_backing(chain).await.unwrap();
    eprintln!("gap {gap:?}, pivot {took:?}");
    assert_eq!(
        target.block_nodes().await.unwrap(),
        ["base", "base-file", "mid", "mid-file", "top", "top-file"]
    );
    source.kill().await;
    server.unwrap().kill().await.unwrap();
    sh(&target, "echo more > /data/more; sync").await;
    let reread = "echo 3 > /proc/sys/vm/drop_caches; cat /data/mark /data/later /data/more";
    assert_eq!(sh(&target, reread).await, "kept\nlater\nmore");
    let stats = target.block_stats().await.unwrap();
    assert_eq!((stats.failed_reads, stats.failed_writes), (0, 0));
    target.kill().await;
}
