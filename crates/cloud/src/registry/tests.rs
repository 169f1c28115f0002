use std::collections::BTreeSet;

use godwit_types::{Arch, Mib, OpState, SiteKind, SiteState, SubstrateKind, VmState};

use super::*;
use crate::ops::OpKind;

fn name(s: &str) -> Name {
    Name::new(s).expect("name")
}

fn open() -> (tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().expect("dir");
    let reg = Registry::open(&dir.path().join("r.redb")).expect("open");
    (dir, reg)
}

fn vm(n: &str) -> VmRecord {
    VmRecord {
        id: VmId::new(),
        name: name(n),
        state: VmState::Starting,
        site: name("center"),
        generation: Generation::FIRST,
        image: name("tiny"),
        substrate: None,
        arch: Arch::X86_64,
        memory: Mib(256),
        vcpus: 1,
        created: UnixMs(1),
        changed: UnixMs(1),
        moving_to: None,
        reason: None,
        arriving: None,
        voided: Default::default(),
    }
}

fn site(n: &str) -> SiteRecord {
    SiteRecord {
        name: name(n),
        kind: SiteKind::Ap,
        joined: UnixMs(0),
        lease_until: UnixMs(0),
        revoked: false,
        report: SiteReport::default(),
    }
}

fn substrate(n: &str) -> SubstrateRecord {
    SubstrateRecord {
        id: SubstrateId::new(),
        name: name(n),
        kind: SubstrateKind::Restricted,
        owner: name("operator"),
        image: name("tiny"),
        arch: Arch::X86_64,
        memory: Mib(256),
        vcpus: 1,
        raw_bytes: 1,
        stored_bytes: 1,
        created: UnixMs(1),
        holders: BTreeSet::new(),
        content: None,
        damaged: std::collections::BTreeMap::new(),
    }
}

#[test]
fn an_older_generation_is_fenced_and_changes_nothing() {
    let (_d, reg) = open();
    let v = vm("report");
    reg.vm_add(&v).expect("add");
    let moved = reg
        .vm_update(v.id, Generation(1), |v| {
            v.become_state(VmState::Running, UnixMs(2))?;
            v.generation = v.generation.next();
            v.site = name("cafe");
            Ok(())
        })
        .expect("update");
    assert_eq!(moved.generation, Generation(2));
    let e = reg
        .vm_update(v.id, Generation(1), |v| {
            v.site = name("center");
            Ok(())
        })
        .expect_err("fenced");
    assert_eq!(e.code(), Code::Fenced);
    assert!(e.to_string().contains("'report' is at generation 2; generation 1"), "{e}");
    assert_eq!(reg.vm_remove(v.id, Generation(1)).expect_err("fenced").code(), Code::Fenced);
    // Nor can a change take the counter back.
    let e = reg.vm_update(v.id, Generation(2), |v| {
        v.generation = Generation(1);
        Ok(())
    });
    assert_eq!(e.expect_err("fenced").code(), Code::Fenced);
    assert_eq!(reg.vm("report").expect("there").site, name("cafe"));
}

#[test]
fn a_change_that_the_state_table_refuses_writes_nothing() {
    let (_d, reg) = open();
    let v = vm("a");
    reg.vm_add(&v).expect("add");
    let e = reg.vm_update(v.id, v.generation, |v| {
        v.site = name("elsewhere");
        v.become_state(VmState::Moving, UnixMs(5))?;
        Ok(())
    });
    assert_eq!(e.expect_err("refused").code(), Code::Conflict);
    assert_eq!(reg.vm("a").expect("there"), v);
}

#[test]
fn names_are_unique_and_free_again_after_removal() {
    let (_d, reg) = open();
    let v = vm("a");
    reg.vm_add(&v).expect("add");
    assert_eq!(reg.vm_add(&vm("a")).expect_err("taken").code(), Code::Exists);
    assert_eq!(reg.vm(&v.id.to_string()).expect("by id").name, v.name);
    reg.vm_remove(v.id, v.generation).expect("remove");
    reg.vm_add(&vm("a")).expect("free again");
    assert_eq!(reg.vm("../etc\n").expect_err("none").to_string(), "no machine '../etc\\n'");
}

#[test]
fn leases_run_out_and_a_report_renews_them() {
    let (_d, reg) = open();
    reg.site_put(&site("cafe")).expect("put");
    let ttl = Duration::from_secs(10);
    let s = reg.site_report(&name("cafe"), SiteReport::default(), UnixMs(1000), ttl).expect("ok");
    assert_eq!(s.state(UnixMs(11_000)), SiteState::Ready);
    assert_eq!(s.state(UnixMs(11_001)), SiteState::Unreachable);
    // A report that was on its way for long does not shorten it.
    let s = reg.site_report(&name("cafe"), SiteReport::default(), UnixMs(500), ttl).expect("ok");
    assert_eq!(s.lease_until, UnixMs(11_000));
    reg.site_revoke(&name("cafe")).expect("revoke");
    assert_eq!(reg.site(&name("cafe")).expect("there").state(UnixMs(0)), SiteState::Unreachable);
    let e = reg.site_report(&name("cafe"), SiteReport::default(), UnixMs(1), ttl);
    assert_eq!(e.expect_err("revoked").code(), Code::Unauthenticated);
    let e = reg.site_report(&name("nowhere"), SiteReport::default(), UnixMs(1), ttl);
    assert_eq!(e.expect_err("unknown").code(), Code::NotFound);
}

#[test]
fn holders_follow_the_reports_and_a_used_substrate_stays() {
    let (_d, reg) = open();
    let s = substrate("abiword");
    reg.substrate_add(&s).expect("add");
    reg.site_put(&site("cafe")).expect("put");
    let report = SiteReport { substrates: [s.id].into(), ..SiteReport::default() };
    reg.site_report(&name("cafe"), report, UnixMs(1), Duration::ZERO).expect("report");
    assert!(reg.substrate("abiword").expect("there").holders.contains(&name("cafe")));
    // A report without it may be older than the substrate, until that is impossible.
    let without = |at| {
        reg.site_report(&name("cafe"), SiteReport::default(), at, Duration::ZERO).expect("report");
        reg.substrate("abiword").expect("there").holders.len()
    };
    assert_eq!(without(UnixMs(s.created.0 + REPORT_AGE_MS - 1)), 1);
    assert_eq!(without(UnixMs(s.created.0 + REPORT_AGE_MS)), 0);

    let mut v = vm("a");
    v.substrate = Some(s.id);
    reg.vm_add(&v).expect("add");
    let e = reg.substrate_remove(s.id).expect_err("in use");
    assert_eq!(e.to_string(), "substrate 'abiword' is in use by machine 'a'");
    reg.vm_remove(v.id, v.generation).expect("remove");
    reg.substrate_remove(s.id).expect("free");
    assert_eq!(reg.substrate("abiword").expect_err("gone").code(), Code::NotFound);
}

#[test]
fn old_finished_operations_make_room() {
    let (_d, reg) = open();
    let op = |state| OpRecord {
        id: OpId::new(),
        kind: OpKind::PoolCheck { site: name("center") },
        state,
        started: UnixMs(1),
        ended: None,
        progress: vec![],
        journal: vec![],
        error: None,
        result: None,
    };
    let running = op(OpState::Running);
    reg.op_put(&running).expect("put");
    let first = op(OpState::Done);
    reg.write(|tx| {
        put(tx, OPS, &first.id.to_string(), &first)?;
        for _ in 1..KEPT_OPS {
            let o = op(OpState::Done);
            put(tx, OPS, &o.id.to_string(), &o)?;
        }
        Ok(())
    })
    .expect("fill");
    reg.op_put(&op(OpState::Failed)).expect("put");
    let all = reg.ops().expect("list");
    assert_eq!(all.len(), KEPT_OPS + 1);
    assert_eq!(reg.op(first.id).expect_err("dropped").code(), Code::NotFound);
    assert!(reg.op(running.id).is_ok());
}

#[test]
fn a_file_of_another_format_or_in_use_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let reg = Registry::open(&path).expect("open");
    assert!(matches!(Registry::open(&path), Err(RegistryError::Open { .. })), "held");
    reg.write(|tx| {
        tx.open_table(META)?.insert("format", b"9".as_slice())?;
        Ok(())
    })
    .expect("write");
    drop(reg);
    let e = Registry::open(&path).expect_err("format");
    assert_eq!(e.to_string(), "the registry has format 9, this version knows format 1");
}

/// The child of the test below: adds machines until it is killed, telling each one that is in.
#[test]
fn child_that_writes_until_it_is_killed() {
    use std::io::Write;
    let Ok(path) = std::env::var("GODWIT_TEST_REGISTRY") else { return };
    let reg = Registry::open(Path::new(&path)).expect("open");
    for i in 0.. {
        reg.vm_add(&vm(&format!("vm-{i}"))).expect("add");
        let mut out = std::io::stderr();
        writeln!(out, "in {i}").expect("tell");
    }
}

#[test]
fn kill_9_loses_nothing_that_was_told() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let mut child = Command::new(std::env::current_exe().expect("exe"))
        .args(["--exact", "registry::tests::child_that_writes_until_it_is_killed", "--nocapture"])
        .env("GODWIT_TEST_REGISTRY", &path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("spawn");
    let mut told = 0;
    let mut lines = BufReader::new(child.stderr.take().expect("pipe")).lines();
    for line in lines.by_ref() {
        let line = line.expect("line");
        if let Some(n) = line.strip_prefix("in ") {
            told = n.parse::<usize>().expect("number") + 1;
            if told == 20 {
                break;
            }
        }
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("reaped");
    assert_eq!(told, 20);
    let reg = Registry::open(&path).expect("opens again");
    let vms = reg.vms().expect("list");
    assert!(vms.len() >= told, "{} of {told}", vms.len());
    for i in 0..told {
        assert!(reg.vm(&format!("vm-{i}")).is_ok(), "vm-{i}");
    }
}

/// A small tmpfs, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
#[allow(clippy::print_stderr, reason = "where a test says that it was left out")]
fn a_full_disk_fails_a_change_whole_and_the_registry_goes_on() {
    let dir = tempfile::tempdir().expect("dir");
    let flags = rustix::mount::MountFlags::empty();
    let size = c"size=33554432,mode=0700";
    if let Err(e) = rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, size) {
        eprintln!("SKIPPED: a small tmpfs cannot be mounted here: {e}");
        return;
    }
    let mount = Tmpfs(dir);
    let reg = Registry::open(&mount.0.path().join("r.redb")).expect("open");
    let small = vm("a");
    reg.vm_add(&small).expect("room");
    let filler = mount.0.path().join("filler");
    let free = rustix::fs::statvfs(mount.0.path()).expect("statvfs");
    std::fs::write(&filler, vec![1; (free.f_bavail * free.f_frsize) as usize]).expect("fill");
    let large = VmRecord { reason: Some("x".repeat(4 << 20)), ..vm("b") };
    for _ in 0..2 {
        let e = reg.vm_add(&large).expect_err("full");
        assert_eq!(e.code(), Code::NoRoom, "{e:?}");
        assert_eq!(reg.vms().expect("read"), std::slice::from_ref(&small));
    }
    std::fs::remove_file(&filler).expect("remove");
    reg.vm_add(&large).expect("room again");
    assert_eq!(reg.vms().expect("read").len(), 2);
}
