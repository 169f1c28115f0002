//! Docking and activation on real machines (the tiny guest under TCG).

#![allow(clippy::print_stderr, reason = "figures, and a skipped test says so")]

use std::path::Path;
use std::time::Duration;

use godwit_qemu::{Accel, GuestCommand, Life, MacAddress, Machine, Nic, NicBackend};
use godwit_store::{Store, StoreOptions};
use godwit_substrate::{
    ActivateRequest, Activated, AsyncPool, DockRequest, DockStop, Place, Pool, PoolDirs, Shells,
    activate, dock_convert,
};
use godwit_testkit::{Guest, LONG, guest, sh, up};
use godwit_types::{Code, CodedError, Name, SubstrateId, SubstrateKind, VmId};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

fn name(s: &str) -> Name {
    Name::new(s).expect("name")
}

/// A site in a directory of its own; memory files on tmpfs.
struct Site {
    at: godwit_testkit::Place,
    pool: Pool,
    guest: Guest,
}

fn site(limit_bytes: u64) -> Option<Site> {
    let Some(guest) = guest("tiny") else {
        eprintln!("SKIPPED: the tiny image is not built here");
        return None;
    };
    let at = godwit_testkit::Place::new();
    let store = Store::open(&at.path("store"), StoreOptions::default()).expect("store");
    let dirs = PoolDirs { substrates: at.path("substrates"), memory: at.memory("sealed") };
    let pool = Pool::open(dirs, store, limit_bytes).expect("pool");
    Some(Site { at, pool, guest })
}

impl Site {
    /// The pool as async tasks have it.
    fn shared(&self) -> AsyncPool {
        self.pool.clone().into()
    }

    /// The same with a pool of another size.
    fn reopen(&mut self, limit_bytes: u64) {
        let dirs =
            PoolDirs { substrates: self.at.path("roomy"), memory: self.at.memory("roomy-sealed") };
        let store = Store::open(&self.at.path("roomy-store"), StoreOptions::default());
        self.pool = Pool::open(dirs, store.expect("store"), limit_bytes).expect("pool");
    }
}

fn place(dir: &Path) -> Place {
    let vm = VmId::new();
    let short = vm.0.simple().to_string();
    let short = &short[short.len() - 8..];
    Place {
        vm,
        run_dir: dir.join(format!("r-{short}")),
        top: dir.join(format!("vm-{short}/top.qcow2")),
        confine: None,
        groups: None,
    }
}

impl Site {
    async fn boot(&self) -> Machine {
        let mut launch = self.at.launch("first", &self.guest);
        launch.nics = vec![Nic {
            port: 0,
            mac: MacAddress([0x52, 0, 0, 0, 0, 9]),
            backend: NicBackend::Isolated,
        }];
        let machine = launch.spawn().await.expect("started");
        up(&machine).await;
        machine
    }

    fn dock(&self, as_name: &str) -> DockRequest {
        DockRequest {
            id: SubstrateId::new(),
            name: name(as_name),
            kind: SubstrateKind::Restricted,
            owner: name("operator"),
            image: self.guest.image.clone(),
            stop: DockStop::default(),
        }
    }

    fn request(&self, substrate: SubstrateId, as_name: &str) -> ActivateRequest {
        ActivateRequest {
            substrate,
            image: self.guest.image.clone(),
            place: place(self.at.dir.path()),
            name: name(as_name),
            identity: None,
            nic: Some(NicBackend::Isolated),
            network: None,
            accel: Accel::Tcg,
            cancel: CancellationToken::default(),
        }
    }
}

async fn json(machine: &Machine, script: &str) -> Value {
    let text = sh(machine, script).await;
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{script}: {e}: {text}"))
}

const WITNESS: &str = "PATH=$PATH:/usr/lib/godwit:/usr/bin:/usr/sbin; ";

async fn start_witness(machine: &Machine) {
    sh(machine, &format!("{WITNESS} user-run godwit-witness run --memory-mib 16 --file /data/w"))
        .await;
    steps_beyond(machine, 0).await;
}

/// Waits until the witness has taken more than `steps` steps; its status.
async fn steps_beyond(machine: &Machine, steps: u64) -> Value {
    let deadline = std::time::Instant::now() + LONG;
    loop {
        let script = format!("{WITNESS} godwit-witness status || echo null");
        let status = json(machine, &script).await;
        if status["steps"].as_u64().is_some_and(|n| n > steps)
            && status["lines"].as_u64().is_some_and(|n| n > 0)
        {
            return status;
        }
        assert!(std::time::Instant::now() < deadline, "the witness stands still: {status}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The witness goes on, and nothing of its memory and file is lost.
async fn assert_intact(machine: &Machine) {
    let now = steps_beyond(machine, 0).await["steps"].as_u64().expect("steps");
    let status = steps_beyond(machine, now).await;
    assert_eq!(status["memory_ok"], true, "{status}");
    sh(machine, &format!("{WITNESS} godwit-witness check --file /data/w")).await;
}

/// What a file takes, in KiB.
fn blocks_kib(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).expect("there")) / 2
}

fn show(what: &str, report: &impl serde::Serialize) {
    eprintln!("{what}: {}", serde_json::to_string(report).expect("json"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_docked_machine_comes_to_life_four_times_at_once_each_with_an_identity_of_its_own() {
    let Some(site) = site(1 << 30) else { return };
    let machine = site.boot().await;
    start_witness(&machine).await;
    let request = site.dock("worker");
    let id = request.id;
    let (substrate, report) =
        dock_convert(&machine, &site.shared(), request).await.expect("docked");
    show("dock", &report);
    let sum: f64 = report.phases.iter().map(|p| p.ms).sum();
    assert!((sum - report.total_ms).abs() < 1e-6);
    assert!(report.device_state_bytes < 1 << 20);
    assert_eq!(machine.life().await.expect("life"), Life::Exited);
    assert_eq!(site.pool.get(id).expect("in the pool"), substrate);
    assert!(site.pool.check().expect("check").is_clean());

    let requests: Vec<_> = (0..4).map(|n| site.request(id, &format!("w{n}"))).collect();
    let mut clones: Vec<Activated> = Vec::new();
    for task in requests
        .into_iter()
        .map(|r| {
            let pool = site.shared();
            tokio::spawn(async move { activate(&pool, None, r).await })
        })
        .collect::<Vec<_>>()
    {
        clones.push(task.await.expect("task").expect("activated"));
    }
    let mut seen = std::collections::HashMap::<String, std::collections::HashSet<String>>::new();
    for (n, clone) in clones.iter().enumerate() {
        show("activate", &clone.report);
        assert_intact(&clone.machine).await;
        let who = json(&clone.machine, "/usr/lib/godwit/identity").await;
        assert_eq!(who["hostname"], format!("w{n}"));
        let given = clone.identity.as_ref().expect("given");
        assert_eq!(who["machine_id"], given.machine_id.as_str());
        assert_eq!(who["mac"], given.mac.to_string());
        assert!(!clone.report.phases.iter().any(|p| p.name == "nic"), "its NIC was there already");
        for key in ["hostname", "machine_id", "mac", "random"] {
            let new = seen.entry(key.into()).or_default().insert(who[key].to_string());
            assert!(new, "{key} twice: {who}");
        }
    }
    let refused = site.pool.delete(id).expect_err("in use");
    assert_eq!(refused.code(), Code::Conflict);

    // One from a waiting QEMU.
    let dir = site.at.dir.path().to_owned();
    let shells = Shells::new(site.shared(), Box::new(move || place(&dir)));
    shells.keep(id, site.guest.image.clone(), Accel::Tcg, 1).await.expect("waiting");
    let warm =
        activate(&site.shared(), Some(&shells), site.request(id, "warm")).await.expect("warm");
    show("activate, warm", &warm.report);
    assert!(warm.report.warm);
    assert_eq!(warm.machine.launch().run_dir, warm.place.run_dir, "it lives at its own place");
    assert!(warm.place.top.exists());
    assert_intact(&warm.machine).await;
    let who = json(&warm.machine, "/usr/lib/godwit/identity").await;
    let mac = warm.identity.as_ref().expect("given").mac;
    assert_eq!(who["mac"], mac.to_string());
    assert_eq!(warm.machine.launch().nics[0].mac, mac, "its own after a reset, too");
    let up = sh(&warm.machine, "cat /sys/class/net/eth0/flags; ip route").await;
    assert!(up.contains("0x1003") && up.contains("default via"), "{up}");

    // One that shall have none.
    let without = ActivateRequest { nic: None, ..site.request(id, "without") };
    let without = activate(&site.shared(), None, without).await.expect("activated");
    sh(&without.machine, "! test -e /sys/class/net/eth0").await;
    assert_eq!(without.machine.launch().nics, []);
    without.machine.kill().await;
    site.pool.forget_clone(without.place.vm);

    // A clone is docked: only what it has written is read and stored, and the holes of the memory
    // that it maps stay holes. The other clones go on reading it meanwhile.
    let clone = clones.pop().expect("one");
    sh(&clone.machine, "head -c 3000000 /dev/urandom >/tmp/own; md5sum /tmp/own >/tmp/sum").await;
    let request = site.dock("again");
    let second = request.id;
    let sealed = site.at.memory(&format!("sealed/{id}.mem"));
    let held = || blocks_kib(&sealed);
    let (before, in_pool) = (held(), site.pool.store().stats().expect("stats").pack_bytes);
    assert!(before < 140 << 10, "{before} KiB: the sealed memory has no holes");
    let (docked, report) =
        dock_convert(&clone.machine, &site.shared(), request).await.expect("docked");
    show("dock of a clone", &report);
    let filled = held().saturating_sub(before);
    assert!(filled < 4 << 10, "{filled} KiB of the parent's holes were filled");
    let others = std::fs::read_dir(sealed.parent().expect("dir")).expect("dir").flatten();
    let others: Vec<_> = others.map(|e| e.path()).filter(|p| *p != sealed).collect();
    assert!(others.is_empty(), "{others:?} on tmpfs");
    let grown = site.pool.store().stats().expect("stats").pack_bytes - in_pool;
    assert!((3_000_000..40 << 20).contains(&grown), "{grown} bytes stored");
    assert!(docked.sizes.memory_bytes > substrate.sizes.memory_bytes / 2, "{docked:?}");
    site.pool.forget_clone(clone.place.vm);
    let third =
        activate(&site.shared(), None, site.request(second, "third")).await.expect("activated");
    show("activate of a docked clone", &third.report);
    assert_intact(&third.machine).await;
    sh(&third.machine, "md5sum /tmp/own | cmp - /tmp/sum").await;
    let log = std::fs::read_to_string(&third.machine.paths().log).expect("log");
    assert!(!log.contains("vmdesc") && !log.contains("Unknown"), "QEMU complains: {log}");
    // And once more, of a clone of a clone.
    let request = site.dock("once-more");
    let last = request.id;
    dock_convert(&third.machine, &site.shared(), request).await.expect("docked");
    site.pool.forget_clone(third.place.vm);
    let third =
        activate(&site.shared(), None, site.request(last, "fourth")).await.expect("activated");
    assert_intact(&third.machine).await;
    sh(&third.machine, "md5sum /tmp/own | cmp - /tmp/sum").await;

    // What clones wrote where their parent has zeros took room in its memory, too, which comes free
    // on demand; the clones keep what they wrote.
    let fill = "head -c 20000000 /dev/urandom >/tmp/fill; md5sum /tmp/fill >/tmp/filled";
    sh(&clones[0].machine, fill).await;
    let own = substrate.sizes.memory_bytes;
    let more = held() * 1024 - own;
    assert!(more > 16 << 20, "{more} bytes of zeros");
    let freed = site.pool.reclaim(1);
    assert!(freed > 16 << 20, "{freed} bytes came free");
    let left = (held() * 1024).saturating_sub(own);
    eprintln!("sealed memory: {own} bytes, {more} of zeros, then {left}");
    assert!(left < more / 4, "{left} of {more} bytes of zeros are left");
    for clone in &clones {
        assert_intact(&clone.machine).await;
    }
    sh(&clones[0].machine, "md5sum /tmp/fill | cmp - /tmp/filled").await;
    assert!(site.pool.check().expect("check").is_clean());

    shells.close().await;
    for a in clones.into_iter().chain([warm, third]) {
        a.machine.kill().await;
        site.pool.forget_clone(a.place.vm);
    }
    for id in [id, second, last] {
        site.pool.delete(id).expect("free now");
    }
    assert_eq!(site.pool.store().stats().expect("stats").units, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_cannot_be_docked_runs_on_and_nothing_is_left() {
    let Some(site) = site(1 << 20) else { return };
    let machine = site.boot().await;
    start_witness(&machine).await;
    let nothing_left = || {
        let left = std::fs::read_dir(site.at.path("substrates")).expect("dir").count();
        assert_eq!(left, 0);
        site.pool.store().gc().expect("gc");
        assert_eq!(site.pool.store().stats().expect("stats").units, 0);
    };
    // The pool is full.
    let err = dock_convert(&machine, &site.shared(), site.dock("a")).await.expect_err("full");
    assert_eq!(err.code(), Code::NoRoom, "{err}");
    assert_eq!(machine.life().await.expect("life"), Life::Running);
    assert_eq!(machine.launch().nics.len(), 1, "its NIC is back");
    assert_intact(&machine).await;
    nothing_left();
    // The guest does not answer.
    machine.stop().await.expect("stopped");
    let err = dock_convert(&machine, &site.shared(), site.dock("b")).await.expect_err("silent");
    assert_eq!(err.code(), Code::Unavailable, "{err}");
    nothing_left();
    machine.run().await.expect("runs on");
    assert_intact(&machine).await;
    machine.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_becomes_public_is_nobody_and_a_docking_that_fails_gives_an_identity_back() {
    const WHO: &str = "cat /etc/machine-id; hostname; ls /etc/ssh/ssh_host_* 2>/dev/null; true";
    let Some(mut site) = site(1 << 20) else { return };
    let machine = site.boot().await;
    let first = sh(&machine, WHO).await;
    assert!(first.len() > 32, "{first}");
    // The pool is full: it runs on, as somebody.
    let public = |r| DockRequest { kind: SubstrateKind::Public, ..r };
    let err =
        dock_convert(&machine, &site.shared(), public(site.dock("a"))).await.expect_err("full");
    assert_eq!(err.code(), Code::NoRoom, "{err}");
    let second = sh(&machine, WHO).await;
    assert!(second.len() > 32 && second != first, "{second} after {first}");
    assert!(second.ends_with("first"), "{second}");
    // A guest in which it does not work is not made public.
    sh(&machine, "mv /etc/machine-id /etc/id && mkdir /etc/machine-id").await;
    let err =
        dock_convert(&machine, &site.shared(), public(site.dock("b"))).await.expect_err("not");
    assert_eq!(err.code(), Code::Conflict, "{err}");
    assert!(err.to_string().contains("cannot be generalised"), "{err}");
    sh(&machine, "rmdir /etc/machine-id && mv /etc/id /etc/machine-id").await;
    site.reopen(1 << 30);
    let request = public(site.dock("clean"));
    let id = request.id;
    let (substrate, _) = dock_convert(&machine, &site.shared(), request).await.expect("docked");
    assert!(substrate.generalised && site.pool.get(id).expect("there").generalised);
    // One that is activated is somebody again, and nobody whom it was before.
    let clone = activate(&site.shared(), None, site.request(id, "new")).await.expect("activated");
    let third = sh(&clone.machine, WHO).await;
    assert!(third.len() > 32 && third.ends_with("new"), "{third}");
    assert!(third != second && third != first);
    clone.machine.kill().await;
}

/// An agent and programs as the guests had them that knew neither the one question of an activation
/// nor a card that stays.
const OLD_AGENT: &str = r#"
cd /usr/lib/godwit && mkdir old && cp godwit-guest old/before-dock && cp godwit-guest old/other
rm before-dock after-activate && ln -s old/other after-activate
printf '#!/bin/sh\nunset GODWIT_CARD\nexec /usr/lib/godwit/old/before-dock\n' >before-dock
printf '#!/bin/sh\n[ "$1" = agent ] && exec qemu-ga -m virtio-serial -p "$2" -t /run\n' >script
printf 'exec /usr/lib/godwit/old/other "$@"\n' >>script
chmod 755 before-dock script && mv script godwit-guest
"#;
/// Has it take the place of the agent that answers, and says so in a file.
const OLD_AGENT_STARTS: &str = "sleep 0.3; kill $(pidof godwit-guest); touch /run/old";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_docked_with_an_older_agent_comes_to_life_by_a_program() {
    let Some(site) = site(1 << 30) else { return };
    let machine = site.boot().await;
    start_witness(&machine).await;
    sh(&machine, OLD_AGENT).await;
    let args = ["-c", OLD_AGENT_STARTS];
    let start = GuestCommand { path: "/bin/sh", args: &args, ..GuestCommand::default() };
    machine.agent().start(start, LONG).await.expect("started");
    let deadline = std::time::Instant::now() + LONG;
    let there = serde_json::json!({ "path": "/run/old" });
    let soon = Duration::from_secs(1);
    while machine.agent().ask("guest-file-open", there.clone(), soon).await.is_err() {
        assert!(std::time::Instant::now() < deadline, "the agent is still the same");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let request = site.dock("old");
    let id = request.id;
    let (substrate, _) = dock_convert(&machine, &site.shared(), request).await.expect("docked");
    assert_eq!(substrate.nic_in, None);
    let clone = activate(&site.shared(), None, site.request(id, "new")).await.expect("activated");
    show("activate, older agent", &clone.report);
    assert!(clone.report.phases.iter().any(|p| p.name == "answer"), "a program did it");
    assert_intact(&clone.machine).await;
    let mac = clone.identity.as_ref().expect("given").mac.to_string();
    let who =
        format!("until grep -q {mac} /sys/class/net/eth0/address; do sleep 0.1; done; hostname");
    assert_eq!(sh(&clone.machine, &who).await.trim(), "new");
    clone.machine.kill().await;
}
