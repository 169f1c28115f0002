//! What the guests of clones free.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use godwit_qemu::{Binaries, DiskLayer, Launch, Layer, Machine, MemorySource, Node};
use godwit_testkit::{Guest, LONG, Place, incoming, sh, tiny, up};

/// Docks a machine of `guest` and activates a clone of it.
async fn clone_of(place: &Place, guest: &Guest) -> Machine {
    clone_by(place, guest, Binaries::default()).await
}

/// The same, the clone's QEMU being one of these.
async fn clone_by(place: &Place, guest: &Guest, binaries: Binaries) -> Machine {
    let machine = place.launch("orig", guest).spawn().await.unwrap();
    up(&machine).await;
    let state = place.memory("state");
    machine.save_state(&state).await.unwrap();
    machine.quit().await.unwrap();
    let memory = MemorySource::PrivateOf { path: place.memory("orig") };
    let mut launch = Launch { memory, binaries, ..incoming(place.launch("clone", guest)) };
    launch.disk.as_mut().unwrap().layers.push(DiskLayer {
        node: Node::Layer(0),
        layer: Layer::Qcow2 { path: place.path("orig.qcow2") },
    });
    let clone = launch.spawn().await.unwrap();
    clone.load_state(&state).await.unwrap();
    clone.run().await.unwrap();
    up(&clone).await;
    clone
}

fn own_pages(machine: &Machine) -> usize {
    machine.memory().unwrap().written_pages().unwrap().expect("private memory").len()
}

#[tokio::test]
async fn what_the_guest_of_a_clone_frees_is_free_on_the_host() {
    const PAGES: usize = 64 * 256;
    let place = Place::new();
    let clone = clone_of(&place, &tiny()).await;
    let sealed = place.memory("orig");
    let before = blake3::hash(&std::fs::read(&sealed).unwrap());
    let fill = "dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\\000' x";
    sh(&clone, &format!("mkdir -p /mnt && mount -t tmpfs none /mnt && {fill} > /mnt/a")).await;
    let full = own_pages(&clone);
    assert!(full >= PAGES, "{full} pages");
    sh(&clone, "rm /mnt/a").await;
    let deadline = tokio::time::Instant::now() + LONG;
    loop {
        let now = own_pages(&clone);
        if now + PAGES * 9 / 10 <= full {
            eprintln!("{full} pages of the clone's own, then {now}");
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{full} pages, then {now}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    // What was given back is taken again, and is what the guest writes there.
    let sum = sh(&clone, &format!("{fill} > /mnt/b && md5sum < /mnt/b")).await;
    assert_eq!(sum, sh(&clone, &format!("{fill} | md5sum")).await);
    assert_eq!(before, blake3::hash(&std::fs::read(&sealed).unwrap()), "the sealed file changed");
    clone.quit().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_counts_on_zeros_in_what_it_freed_keeps_its_memory() {
    let place = Place::new();
    for (more, on) in [("", vec![1]), (" init_on_free=1", vec![])] {
        let mut guest = tiny();
        guest.spec.cmdline.push_str(more);
        let clone = clone_of(&place, &guest).await;
        // The switch, as its QEMU has it.
        let dir = format!("/proc/{}/fd", clone.process().pid);
        let mut switches = std::fs::read_dir(dir).unwrap().flatten().filter(|fd| {
            let to = std::fs::read_link(fd.path()).unwrap_or_default();
            to.to_string_lossy().starts_with("/memfd:godwit-discards")
        });
        let switch = switches.next().expect("it is preloaded").path();
        assert_eq!(std::fs::read(switch).unwrap(), on, "with '{more}'");
        clone.quit().await.unwrap();
        for file in ["orig", "state"] {
            std::fs::remove_file(place.memory(file)).unwrap();
        }
    }
}

#[tokio::test]
async fn where_nothing_is_loaded_clones_start_all_the_same_and_only_read_what_they_share() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let guest = tiny();
    let program = place.path("qemu");
    std::fs::write(&program, "#!/bin/sh\nunset LD_PRELOAD\nexec qemu-system-x86_64 \"$@\"\n")
        .unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let binaries = Binaries { x86_64: program, ..Binaries::default() };
    let clone = clone_by(&place, &guest, binaries).await;
    let pid = clone.process().pid;
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(line.contains("\"readonly\":true"), "{line}");
    clone.quit().await.unwrap();
}
