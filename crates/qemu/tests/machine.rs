//! Machines on a real QEMU: boot, dock, clone, adopt, plug, pivot.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::time::Instant;

use godwit_qemu::{
    Accel, DiskLayer, Key, Launch, Layer, Life, Machine, Manifest, MemorySource, Nic, NicBackend,
    Node, QemuError, accel,
};
use godwit_testkit::{LONG, Place, RESEEDED, guest, incoming, serve, sh, tiny, up};
use godwit_types::{Arch, Code, CodedError, Mib};

#[tokio::test]
async fn a_machine_boots_obeys_its_life_cycle_and_ends() {
    let place = Place::new();
    let mut guest = tiny();
    guest.spec.display = true;
    let machine = place.launch("boot", &guest).spawn().await.unwrap();
    let mut events = machine.events();
    up(&machine).await;
    assert_eq!(machine.life().await.unwrap(), Life::Running);

    let out = machine
        .agent()
        .exec("/bin/busybox", &["cat"], &["A=b".into()], b"from the host", LONG)
        .await
        .unwrap();
    assert_eq!(out.text(), "from the host");
    let out = machine.agent().exec("/bin/busybox", &["false"], &[], b"", LONG).await.unwrap();
    assert_eq!(out.exit, Some(1));

    let err = machine.load_state(&place.path("none")).await.expect_err("it runs");
    assert_eq!(err.code(), Code::Conflict);
    assert!(matches!(err, QemuError::Refused(r) if r.life == Life::Running));

    let shot = machine.screenshot().await.unwrap();
    assert!(shot.width >= 640 && shot.height >= 400, "{}x{}", shot.width, shot.height);
    machine.send_text("Hello, World!\n").await.unwrap();
    machine.send_chord(&[Key("ctrl"), Key("s")]).await.unwrap();

    machine.stop().await.unwrap();
    let stop = events.wait_named("STOP", LONG).await.unwrap();
    assert!(machine.send_text("x").await.is_err(), "a stopped machine takes no keys");
    machine.run().await.unwrap();
    let resume = events.wait_named("RESUME", LONG).await.unwrap();
    assert!(resume.at >= stop.at);

    let bytes = machine.save_state(&place.memory("state")).await.unwrap();
    eprintln!("device state with a display: {bytes} bytes");
    let log = std::fs::read_to_string(&machine.paths().log).unwrap();
    assert_eq!(log, "", "QEMU complains");
    machine.kill().await;
    assert_eq!(machine.life().await.unwrap(), Life::Exited);
    assert_eq!(machine.exited().await.signal, Some(9));
}

#[tokio::test]
async fn a_guest_that_powers_itself_off_ends_its_machine_in_good_order() {
    let place = Place::new();
    let machine = place.launch("off", &tiny()).spawn().await.unwrap();
    let mut events = machine.events();
    up(&machine).await;
    // The agent does not live to answer.
    let line = ["sh", "-c", "poweroff -f"];
    let _ = machine.agent().exec("/bin/busybox", &line, &[], b"", LONG).await;
    let end = events.wait_named("SHUTDOWN", LONG).await.unwrap();
    assert_eq!(end.data["reason"], "guest-shutdown");
    let exit = machine.exited().await;
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit}");
    assert_eq!(machine.life().await.unwrap(), Life::Exited);
}

#[tokio::test]
async fn a_docked_machine_is_cloned_from_its_sealed_memory() {
    let place = Place::new();
    let guest = tiny();
    let begin = Instant::now();
    let machine = place.launch("orig", &guest).spawn().await.unwrap();
    up(&machine).await;
    eprintln!("cold boot to the agent: {:?}", begin.elapsed());
    sh(&machine, "echo original > /tmp/mark").await;

    let begin = Instant::now();
    let state = place.memory("state");
    let bytes = machine.save_state(&state).await.unwrap();
    eprintln!("save: {:?}, {bytes} bytes", begin.elapsed());
    assert!(bytes < 1 << 20, "{bytes} bytes of device state");
    assert_eq!(machine.life().await.unwrap(), Life::PostMigrate);
    let manifest = machine.manifest();
    machine.quit().await.unwrap();
    let sealed = place.memory("orig");
    let before = blake3::hash(&std::fs::read(&sealed).unwrap());

    let mut clones = Vec::new();
    for name in ["clone-a", "clone-b"] {
        let launch = Launch {
            memory: MemorySource::PrivateOf { path: sealed.clone() },
            ..incoming(place.launch(name, &guest))
        };
        // The disk of the docked machine is the layer under each clone's own.
        let mut launch = launch;
        let disk = launch.disk.as_mut().unwrap();
        disk.layers.push(DiskLayer {
            node: Node::Layer(0),
            layer: Layer::Qcow2 { path: place.path("orig.qcow2") },
        });
        let begin = Instant::now();
        let clone = launch.spawn().await.unwrap();
        let started = begin.elapsed();
        assert_eq!(clone.life().await.unwrap(), Life::Incoming);
        assert!(clone.run().await.is_err(), "nothing to run yet");
        manifest.check(&clone.manifest()).unwrap();
        let load = Instant::now();
        clone.load_state(&state).await.unwrap();
        let loaded = load.elapsed();
        clone.run().await.unwrap();
        eprintln!("clone: start {started:?}, load {loaded:?}, running {:?}", begin.elapsed());
        up(&clone).await;
        eprintln!("clone: first answer {:?}", begin.elapsed());
        clones.push(clone);
    }
    assert_ne!(
        clones[0].generation_id().await.unwrap().unwrap(),
        clones[1].generation_id().await.unwrap().unwrap()
    );
    for (clone, word) in clones.iter().zip(["first", "second"]) {
        assert_eq!(sh(clone, "cat /tmp/mark").await, "original");
        sh(clone, &format!("until {RESEEDED}; do sleep 0.1; done")).await;
        sh(clone, &format!("echo {word} > /tmp/mark; echo {word} > /data/mark; sync")).await;
    }
    for (clone, word) in clones.iter().zip(["first", "second"]) {
        assert_eq!(sh(clone, "cat /tmp/mark /data/mark").await, format!("{word}\n{word}"));
        let stats = clone.block_stats().await.unwrap();
        assert_eq!((stats.failed_reads, stats.failed_writes), (0, 0));
        assert!(stats.written_bytes > 0);
        clone.stop().await.unwrap();
        let memory = clone.memory().unwrap();
        let written = memory.written_pages().unwrap().expect("private memory");
        let pages = memory.len() / 4096;
        eprintln!("clone: {} of {pages} pages written", written.len());
        assert!(!written.is_empty() && (written.len() as u64) < pages / 2);
        let mut page = [0u8; 4096];
        memory.read_at(written[0] * 4096, &mut page).unwrap();
        clone.quit().await.unwrap();
    }
    assert_eq!(before, blake3::hash(&std::fs::read(&sealed).unwrap()), "the sealed file changed");
}

#[tokio::test]
async fn a_state_is_refused_by_a_machine_of_another_shape_or_when_it_is_damaged() {
    let place = Place::new();
    let guest = tiny();
    let waiting = incoming(place.launch("wait", &guest)).spawn().await.unwrap();
    let mut larger = guest.spec.clone();
    larger.memory = Mib(512);
    let saved = Manifest::of(&larger, waiting.version());
    let err = saved.check(&waiting.manifest()).expect_err("refused");
    assert_eq!(err.field, "memory_mib");

    let junk = place.path("junk");
    std::fs::write(&junk, vec![0x51; 4096]).unwrap();
    let err = waiting.load_state(&junk).await.expect_err("refused");
    eprintln!("a damaged state: {err}");
    assert!(matches!(err, QemuError::Migration { .. }), "{err:?}");
    waiting.kill().await;
}

#[test]
fn a_machine_outlives_its_daemon_and_is_adopted() {
    let place = Place::new();
    let guest = tiny();
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let first = runtime();
    let launch = place.launch("adopt", &guest);
    let run_dir = launch.run_dir.clone();
    let pid = first.block_on(async {
        let machine = launch.clone().spawn().await.unwrap();
        up(&machine).await;
        sh(&machine, "echo before > /tmp/mark").await;
        machine.process().pid
    });
    // With its runtime go the tasks, the sockets and every memory of the machine.
    drop(first);
    runtime().block_on(async {
        let err = launch.spawn().await.expect_err("it runs");
        assert!(err.to_string().contains("already runs"), "{err}");
        let machine = Machine::adopt(&run_dir).await.unwrap();
        assert_eq!(machine.process().pid, pid);
        assert_eq!(sh(&machine, "cat /tmp/mark").await, "before");
        machine.quit().await.unwrap();
        assert!(matches!(Machine::adopt(&run_dir).await, Err(QemuError::NotRunning { .. })));
    });
}

#[tokio::test]
async fn a_nic_is_plugged_and_unplugged_while_the_guest_runs() {
    let place = Place::new();
    let machine = place.launch("nic", &tiny()).spawn().await.unwrap();
    up(&machine).await;
    let nic =
        Nic { port: 1, mac: "52:54:00:01:02:03".parse().unwrap(), backend: NicBackend::Isolated };
    let begin = Instant::now();
    machine.plug_nic(nic.clone()).await.unwrap();
    assert!(machine.plug_nic(nic).await.is_err(), "the port is taken");
    let seen = "until grep -q 52:54:00:01:02:03 /sys/class/net/*/address; do :; done";
    sh(&machine, seen).await;
    eprintln!("the guest sees its NIC after {:?}", begin.elapsed());
    machine.unplug_nic(1).await.unwrap();
    assert_eq!(machine.launch().nics, []);
    let err = machine.unplug_nic(1).await.expect_err("empty");
    assert_eq!(err.code(), Code::Conflict);
    machine.kill().await;
}

#[tokio::test]
async fn the_backing_is_pivoted_away_from_the_source_under_a_running_guest() {
    let place = Place::new();
    let guest = tiny();
    let socket = place.path("nbd.sock");
    let base = guest.base.to_str().unwrap();
    let mut nbd = serve(&socket, &["-f", "raw", base]).await;
    let mut launch = place.launch("pivot", &guest);
    let top = launch.disk.unwrap().top;
    launch.disk = Some(godwit_qemu::DiskChain::over(vec![Layer::Nbd { socket }], top));
    let machine = launch.spawn().await.unwrap();
    up(&machine).await;
    machine.bitmap_add("written").await.unwrap();
    sh(&machine, "echo kept > /data/kept; sync").await;
    assert!(machine.bitmap_bytes("written").await.unwrap() >= 4096);
    machine.bitmap_remove("written").await.unwrap();

    let chain = vec![
        DiskLayer { node: Node::Base, layer: Layer::Raw { path: guest.base.clone() } },
        DiskLayer { node: Node::Mid, layer: Layer::Qcow2 { path: place.cow("mid", &guest.base) } },
    ];
    let bad = vec![DiskLayer { node: Node::Mid, layer: Layer::Raw { path: "/no/file".into() } }];
    assert!(machine.pivot_backing(bad).await.is_err());
    let took = machine.pivot_backing(chain).await.unwrap();
    eprintln!("pivot: {took:?}");
    nbd.kill().await.unwrap();
    assert_eq!(
        machine.block_nodes().await.unwrap(),
        ["base", "base-file", "mid", "mid-file", "top", "top-file"]
    );
    sh(&machine, "echo 3 > /proc/sys/vm/drop_caches; ls -lR /data > /dev/null").await;
    assert_eq!(sh(&machine, "cat /data/kept").await, "kept");
    let stats = machine.block_stats().await.unwrap();
    assert_eq!((stats.failed_reads, stats.failed_writes), (0, 0));
    assert!(stats.written_bytes > 0);
    machine.kill().await;
}

#[tokio::test]
async fn a_qemu_that_cannot_start_reports_why() {
    let place = Place::new();
    let mut launch = place.launch("bad", &tiny());
    launch.spec.kernel.path = "/no/such/kernel".into();
    let err = launch.spawn().await.expect_err("no kernel");
    assert!(matches!(err, QemuError::Exited { .. }), "{err:?}");
    assert!(err.to_string().contains("/no/such/kernel"), "{err}");
}

#[tokio::test]
async fn the_probe_runs_its_program_and_keeps_the_answer() {
    let place = Place::new();
    for (program, arch) in
        [("qemu-system-x86_64", Arch::X86_64), ("qemu-system-aarch64", Arch::Aarch64)]
    {
        let begin = Instant::now();
        accel::boots(program.as_ref(), arch, Accel::Tcg).await.unwrap().unwrap();
        eprintln!("{arch}: the probe program under TCG takes {:?}", begin.elapsed());
    }
    let cache = place.path("probe.json");
    let found = accel::probe("qemu-system-x86_64".as_ref(), Arch::X86_64, &cache).await.unwrap();
    eprintln!("probe: {found:?}");
    let again = accel::probe("qemu-system-x86_64".as_ref(), Arch::X86_64, &cache).await.unwrap();
    assert_eq!(found, again);
    std::fs::write(&cache, b"{ damaged").unwrap();
    let anew = accel::probe("qemu-system-x86_64".as_ref(), Arch::X86_64, &cache).await.unwrap();
    assert_eq!(found, anew);
}

#[tokio::test]
async fn an_arm64_guest_boots_and_is_docked() {
    let Some(guest) = guest("tiny-arm64") else {
        eprintln!("not run: there is no tiny-arm64 image on this machine");
        return;
    };
    let place = Place::new();
    let begin = Instant::now();
    let machine = place.launch("arm", &guest).spawn().await.unwrap();
    up(&machine).await;
    eprintln!("cold boot to the agent: {:?}", begin.elapsed());
    let bytes = machine.save_state(&place.memory("state")).await.unwrap();
    assert!(bytes < 1 << 20, "{bytes} bytes of device state");
    machine.quit().await.unwrap();
}
