//! Scheme `hybrid` from QEMU to QEMU, through two relays and a QUIC link on this machine.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use godwit_migrate::RelayConfig;
use godwit_migrate::hybrid::{
    Asking, Committed, DestinationFate, MoveError, Received, Sent, Steering, prepare_incoming,
    receive, report, send,
};
use godwit_migrate::relay::{
    HeldMemory, NOT_COMMITTED, RelayDisk, RelayPhase, says_all_memory, says_committed,
};
use godwit_qemu::{Life, MemorySource};
use godwit_testkit::{LONG, Relay, Sites, give, sh, start, up};
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

/// Where the base image has content, and how much, in MiB.
const AT_MIB: usize = 48;
const MIB: usize = 4;

/// Gives both sites a base image with content that a guest can read, and indexes it.
fn image_with_content(place: &mut Sites) -> PathBuf {
    let (base, index) = (place.path("base.raw"), place.path("blocks"));
    let copied = std::process::Command::new("cp")
        .arg("--sparse=always")
        .args([&place.guest.base, &base])
        .status();
    assert!(copied.unwrap().success());
    let image = File::options().read(true).write(true).open(&base).unwrap();
    assert!(image.metadata().unwrap().len() > ((AT_MIB + MIB) << 20) as u64);
    let mut noise = vec![0; MIB << 20];
    File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
    image.write_all_at(&noise, (AT_MIB << 20) as u64).unwrap();
    godwit_disk::BlockIndex::build(&image).unwrap().save(&index).unwrap();
    place.guest.base = base;
    index
}

/// A copy of the machine's memory as it is now, which both sites hold.
async fn held_memory(place: &Sites, source: &godwit_qemu::Machine) -> HeldMemory {
    let MemorySource::Shared { path } = source.launch().memory else { panic!("no file") };
    let copy = place.path("held");
    source.stop().await.unwrap();
    std::fs::copy(path, &copy).unwrap();
    source.run().await.unwrap();
    HeldMemory { content: godwit_types::Hash::of(b"as it was"), path: copy }
}

/// A move to a site that cannot write down that the machine runs there.
async fn is_taken_back_from_a_full_disk(place: &Sites, source: &godwit_qemu::Machine) {
    let mut config = place.destination_config(false);
    give(&mut config, File::options().write(true).open("/dev/full").unwrap());
    let socket = config.qemu.clone();
    let there = Relay::start(config).await;
    let address = there.listening().await;
    let target = start(place.target()).await;
    prepare_incoming(&target, &socket).await.unwrap();
    let here_config = place.source_config(address, false);
    let here = Relay::start(here_config.clone()).await;

    let (_never, lost) = tokio::sync::watch::channel(None);
    let steering = Steering { cancel: CancellationToken::new(), lost };
    let (mut sent, mut received) = (Sent::default(), Received::default());
    let ended = tokio::sync::watch::Sender::new(false);
    // The destination's word is there once it has ended its QEMU.
    let fenced = || -> Asking {
        let mut ended = ended.subscribe();
        Box::pin(async move {
            ended.wait_for(|e| *e).await.unwrap();
            DestinationFate::Dead
        })
    };
    let sending = send(source, &here.client, &here_config.qemu, &mut sent, &steering, fenced);
    let committed = || -> Committed { panic!("the relay has said what became of it") };
    let disk = Some(place.pivot());
    let receiving = async {
        let r = receive(&target, &there.client, disk, &mut received, false, Some(&committed)).await;
        ended.send_replace(true);
        r
    };
    let both = async { tokio::join!(sending, receiving) };
    let (left, arrived) = tokio::time::timeout(LONG, both).await.unwrap();
    let why = match arrived {
        Err(MoveError::Cancelled { why }) => why,
        other => panic!("{other:?}"),
    };
    assert!(why.contains("No space left"), "{why}");
    assert!(matches!(left, Err(MoveError::Reclaimed { .. })), "{left:?}");
    let status = there.finish().await;
    assert!(!status.committed && status.phase < RelayPhase::Committed, "{status:?}");
    here.finish().await;
    assert_eq!(target.life().await.unwrap(), Life::Exited, "it ran there, and nobody was told");
    assert_eq!(source.life().await.unwrap(), Life::Running);
    for left in ["mid.qcow2", "target.qcow2"] {
        std::fs::remove_file(place.path(left)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_moves_with_memory_and_disk_while_it_works() {
    let mut place = Sites::new();
    let index = image_with_content(&mut place);
    let source = start(place.source()).await;
    up(&source).await;
    let held = held_memory(&place, &source).await;
    witness(&source).await;
    sh(&source, &format!("dd if=/dev/vda of=/dev/shm/read bs=1M skip={AT_MIB} count={MIB}")).await;
    let sum = sh(&source, "md5sum < /data/ballast").await;
    Box::pin(is_taken_back_from_a_full_disk(&place, &source)).await;

    let word = place.path("ran");
    std::fs::write(&word, NOT_COMMITTED).unwrap();
    let mut config = place.destination_config(false);
    config.held = Some(held.clone());
    give(&mut config, File::options().write(true).open(&word).unwrap());
    let there = Relay::start(config).await;
    let address = there.listening().await;
    let target = start(place.target()).await;
    prepare_incoming(&target, &place.destination_config(false).qemu).await.unwrap();
    let here_config = place.source_config(address, false);
    let mut here_config = RelayConfig { held: Some(held), ..here_config };
    let Some(RelayDisk::Source { index: at, .. }) = &mut here_config.disk else {
        panic!("no disk")
    };
    *at = Some(index);
    let here = Relay::start(here_config.clone()).await;

    let (_never, lost) = tokio::sync::watch::channel(None);
    let steering = Steering { cancel: CancellationToken::new(), lost };
    let (mut sent, mut received) = (Sent::default(), Received::default());
    let sending = send(&source, &here.client, &here_config.qemu, &mut sent, &steering, dead);
    let committed = || -> Committed { panic!("nothing is lost") };
    let disk = Some(place.pivot());
    let receiving = receive(&target, &there.client, disk, &mut received, false, Some(&committed));
    let both = async { tokio::join!(sending, receiving) };
    let (left, arrived) = tokio::time::timeout(LONG, both).await.unwrap_or_else(|_| {
        panic!("stuck: {:?} {:?}", here.client.status(), there.client.status())
    });
    left.unwrap();
    arrived.unwrap();
    assert_eq!(source.life().await.unwrap(), Life::PostMigrate);
    let said = std::fs::read(&word).unwrap();
    assert!(says_committed(&said) && says_all_memory(&said) == Some(true), "{said:?}");
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
    // Most of what the machine has it had when it was copied; the witness's own pages it had not.
    let pages = &report.pages;
    assert!(pages.known > pages.data / 4 && pages.known < pages.data, "{pages:?}");
    assert!(pages.changed > 0, "{pages:?}");
    assert!(pages.base >= MIB as u64 * 256, "{pages:?}");
    // Whether any page had to be asked for is up to the guest.
    assert!(report.pages.data > 0, "{:?}", report.pages);
    assert!(report.pages.waited_ms >= report.pages.longest_wait_ms, "{:?}", report.pages);

    let read = sh(&target, "md5sum < /dev/shm/read").await;
    let again = format!("dd if=/dev/vda bs=1M skip={AT_MIB} count={MIB} 2>/dev/null | md5sum");
    assert_eq!(read, sh(&target, &again).await);
    assert_eq!(sh(&target, "echo 3 > /proc/sys/vm/drop_caches; md5sum < /data/ballast").await, sum);
    let status = sh(&target, "/usr/lib/godwit/godwit-witness status").await;
    eprintln!("{status}");
    assert!(status.replace(' ', "").contains("\"memory_ok\":true"), "{status}");
    eprintln!("{}", sh(&target, "/usr/lib/godwit/godwit-witness check --file /data/lines").await);
    target.kill().await;
}
