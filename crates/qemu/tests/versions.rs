//! States of one version of QEMU in another: what `manifest::versions_fit` takes for granted.
//!
//! The other versions are those of other Debian suites, unpacked beside the machine's own by
//! `scripts/qemu SUITE`; a test whose QEMU is not there says so and passes.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::path::PathBuf;

use godwit_qemu::{Binaries, DiskLayer, Launch, Layer, Manifest, MemorySource, Node};
use godwit_testkit::{Place, incoming, sh, tiny, up};

/// The QEMU of another suite.
fn other(suite: &str) -> Option<Binaries> {
    let cache = std::env::var_os("GODWIT_QEMUS")
        .map_or_else(|| PathBuf::from("/var/cache/godwit/qemus"), PathBuf::from);
    let program = cache.join(suite).join("qemu-system-x86_64");
    if program.is_file() {
        return Some(Binaries { x86_64: program, ..Binaries::default() });
    }
    eprintln!("SKIPPED: no QEMU of {suite}; fetch it with: scripts/qemu {suite}");
    None
}

/// Saves a state with one QEMU and goes on from it in another.
async fn carry(place: &Place, name: &str, from: &Binaries, to: &Binaries) -> (Manifest, Manifest) {
    let guest = tiny();
    let launch = Launch { binaries: from.clone(), ..place.launch(name, &guest) };
    let machine = launch.spawn().await.unwrap();
    up(&machine).await;
    sh(&machine, "echo before > /tmp/mark; echo before > /data/mark; sync").await;
    let state = place.memory(&format!("{name}-state"));
    machine.save_state(&state).await.unwrap();
    let saved = machine.manifest();
    machine.quit().await.unwrap();

    let clone = format!("{name}-clone");
    let mut launch = Launch {
        binaries: to.clone(),
        memory: MemorySource::PrivateOf { path: place.memory(name) },
        ..incoming(place.launch(&clone, &guest))
    };
    launch.disk.as_mut().unwrap().layers.push(DiskLayer {
        node: Node::Layer(0),
        layer: Layer::Qcow2 { path: place.path(&format!("{name}.qcow2")) },
    });
    let clone = launch.spawn().await.unwrap();
    let here = clone.manifest();
    saved.check(&here).unwrap();
    clone.load_state(&state).await.unwrap();
    clone.run().await.unwrap();
    up(&clone).await;
    assert_eq!(sh(&clone, "cat /tmp/mark /data/mark").await, "before\nbefore");
    // Its devices work on: the disk is written, the clock ticks.
    assert_eq!(sh(&clone, "echo after > /data/mark; sync; sleep 1; cat /data/mark").await, "after");
    let stats = clone.block_stats().await.unwrap();
    assert_eq!((stats.failed_reads, stats.failed_writes), (0, 0));
    clone.quit().await.unwrap();
    (saved, here)
}

#[tokio::test]
async fn a_state_loads_in_another_patch_of_its_series_and_back() {
    let Some(other) = other("trixie") else { return };
    let own = Binaries::default();
    let place = Place::new();
    let (here, there) = carry(&place, "out", &own, &other).await;
    eprintln!("QEMU {} and {}", here.qemu, there.qemu);
    assert_ne!(here.qemu, there.qemu, "two versions");
    let (back_from, back_to) = carry(&place, "back", &other, &own).await;
    assert_eq!((back_from, back_to), (there, here));
}
