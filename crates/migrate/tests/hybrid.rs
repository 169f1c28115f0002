//! Scheme `hybrid` from QEMU to QEMU, through two relays and a QUIC link on this machine.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

mod support;

use godwit_migrate::hybrid::{
    Asking, DestinationFate, Received, Sent, Steering, prepare_incoming, receive, report, send,
};
use godwit_qemu::Life;
use support::{LONG, Place, Relay, sh, start, up};
use tokio_util::sync::CancellationToken;

fn dead() -> Asking {
    Box::pin(async { DestinationFate::Dead })
}

/// Starts the checkable workload: a pattern in memory that changes all the time, and numbered
/// lines on the disk.
async fn witness(machine: &godwit_qemu::Machine) {
    sh(machine, "dd if=/dev/urandom of=/data/ballast bs=1M count=6 2>/dev/null; sync").await;
    sh(
        machine,
        "setsid /usr/lib/godwit/godwit-witness run --memory-mib 24 --file /data/lines >/tmp/witness.log 2>&1 </dev/null &",
    )
    .await;
    sh(
        machine,
        "until /usr/lib/godwit/godwit-witness status | grep -q memory_ok; do sleep 0.2; done",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_moves_with_memory_and_disk_while_it_works() {
    let place = Place::new();
    let source = start(place.source()).await;
    up(&source).await;
    witness(&source).await;
    let sum = sh(&source, "md5sum < /data/ballast").await;

    let there = Relay::start(place.destination_config(false)).await;
    let address = there.listening().await;
    let target = start(place.target()).await;
    prepare_incoming(&target, &place.destination_config(false).qemu).await.unwrap();
    let here_config = place.source_config(address, false);
    let here = Relay::start(here_config.clone()).await;

    let (_never, lost) = tokio::sync::watch::channel(None);
    let steering = Steering { cancel: CancellationToken::new(), lost };
    let (mut sent, mut received) = (Sent::default(), Received::default());
    let sending = send(&source, &here.client, &here_config.qemu, &mut sent, &steering, dead);
    let receiving =
        receive(&target, &there.client, Some(place.pivot()), &mut received, false, None);
    let both = async { tokio::join!(sending, receiving) };
    let (left, arrived) = tokio::time::timeout(LONG, both).await.unwrap_or_else(|_| {
        panic!("stuck: {:?} {:?}", here.client.status(), there.client.status())
    });
    left.unwrap();
    arrived.unwrap();
    assert_eq!(source.life().await.unwrap(), Life::PostMigrate);
    here.finish().await;
    there.finish().await;
    source.kill().await;
    // Nothing of the source is left.
    std::fs::remove_file(place.path("source.qcow2")).unwrap();
    assert!(!target.block_nodes().await.unwrap().contains(&"remote".to_owned()));

    let report = report("center", "cafe", &sent, &received, None).unwrap();
    eprintln!("{}", serde_json::to_string_pretty(&report).unwrap());
    eprintln!("pivot {:?}, {:?} {:?}", received.pivot, sent.counts, received.counts);
    assert!(sent.counts.disk_blocks >= 1500, "6 MiB were written");
    // Both relays share this host's clock, and found that out.
    let clock = report.clock.expect("the clocks were compared");
    assert!(clock.offset_ms == 0.0 && clock.bound_ms == 0.0, "{clock:?}");
    // Whether any page had to be asked for is up to the guest.
    assert!(report.pages.data > 0, "{:?}", report.pages);
    assert!(report.pages.waited_ms >= report.pages.longest_wait_ms, "{:?}", report.pages);

    assert_eq!(sh(&target, "echo 3 > /proc/sys/vm/drop_caches; md5sum < /data/ballast").await, sum);
    let status = sh(&target, "/usr/lib/godwit/godwit-witness status").await;
    eprintln!("{status}");
    assert!(status.replace(' ', "").contains("\"memory_ok\":true"), "{status}");
    eprintln!("{}", sh(&target, "/usr/lib/godwit/godwit-witness check --file /data/lines").await);
    target.kill().await;
}
