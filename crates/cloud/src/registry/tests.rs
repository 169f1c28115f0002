use std::collections::BTreeSet;
use std::time::Duration;

use godwit_site::SiteReport;
use godwit_types::{
    Arch, Code, CodedError, Mib, OpId, OpState, SiteKind, SiteState, UnixMs, VmState,
};

use super::sites::REPORT_AGE;
use super::tables::Tables;
use super::*;
use crate::op_kind::OpKind;
use crate::principal::Principal;

pub(super) fn name(s: &str) -> Name {
    Name::new(s).expect("name")
}

pub(super) fn open() -> (tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().expect("dir");
    let reg = Registry::open(&dir.path().join("r.redb")).expect("open");
    (dir, reg)
}

/// A machine of the default tenant that starts at the center.
pub(crate) fn vm(n: &str) -> VmRecord {
    VmRecord {
        id: VmId::new(),
        name: name(n),
        tenant: default_tenant(),
        state: VmState::Starting,
        site: name("center"),
        generation: Generation::FIRST,
        image: name("tiny"),
        substrate: None,
        arch: Arch::X86_64,
        memory: Mib(256),
        vcpus: 1,
        disk_bytes: None,
        created: UnixMs(1),
        changed: UnixMs(1),
        moving_to: None,
        reason: None,
        private_of: None,
        arriving: None,
        returning: None,
        network: None,
        published: Vec::new(),
        ports_pending: false,
        voided: Default::default(),
    }
}

pub(super) fn at(ms: u64) -> Moment {
    Moment { wall: UnixMs(ms), run: Duration::from_millis(ms) }
}

pub(super) fn site(n: &str) -> SiteRecord {
    SiteRecord {
        name: name(n),
        kind: SiteKind::Ap,
        joined: UnixMs(0),
        lease_until: UnixMs(0),
        last_seen: UnixMs(0),
        revoked: false,
        report: SiteReport::default(),
    }
}

pub(crate) fn substrate(n: &str) -> SubstrateRecord {
    SubstrateRecord {
        id: SubstrateId::new(),
        name: name(n),
        tenant: default_tenant(),
        granted: BTreeSet::new(),
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
    reg.vm_add(&v, None).expect("add");
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
    reg.vm_add(&v, None).expect("add");
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
    reg.vm_add(&v, None).expect("add");
    assert_eq!(reg.vm_add(&vm("a"), None).expect_err("taken").code(), Code::Exists);
    assert_eq!(reg.vm(&v.id.to_string()).expect("by id").name, v.name);
    reg.vm_remove(v.id, v.generation).expect("remove");
    reg.vm_add(&vm("a"), None).expect("free again");
    assert_eq!(reg.vm("../etc\n").expect_err("none").to_string(), "no machine '../etc\\n'");
}

#[test]
fn a_machine_and_the_operation_that_makes_it_are_written_together() {
    let (_d, reg) = open();
    let v = vm("a");
    let begun = |v: &VmRecord| {
        OpRecord::begun(&Principal::operator(), OpKind::VmCreate { vm: v.id, name: v.name.clone() })
    };
    let (before, op) = (reg.revision(), begun(&v));
    reg.vm_add(&v, Some(&op)).expect("add");
    // One step of the registry: a kill finds both or neither.
    assert_eq!(reg.revision(), before + 1);
    assert_eq!(reg.ops().get(op.id).expect("written").kind, op.kind);
    let other = vm("a");
    let op = begun(&other);
    assert_eq!(reg.vm_add(&other, Some(&op)).expect_err("taken").code(), Code::Exists);
    assert!(reg.ops().get(op.id).is_err(), "nobody's operation");
}

#[test]
fn leases_run_out_and_a_report_renews_them() {
    let (_d, reg) = open();
    reg.sites().put(&site("cafe")).expect("put");
    let ttl = Duration::from_secs(10);
    let s = reg.sites().report(&name("cafe"), SiteReport::default(), at(1000), ttl).expect("ok");
    assert_eq!(s.state(UnixMs(11_000)), SiteState::Ready);
    assert_eq!(s.state(UnixMs(11_001)), SiteState::Unreachable);
    // A report that was on its way for long does not shorten it.
    let s = reg.sites().report(&name("cafe"), SiteReport::default(), at(500), ttl).expect("ok");
    assert_eq!(s.lease_until, UnixMs(11_000));
    reg.sites().revoke(&name("cafe")).expect("revoke");
    assert_eq!(
        reg.sites().get(&name("cafe")).expect("there").state(UnixMs(0)),
        SiteState::Unreachable
    );
    let e = reg.sites().report(&name("cafe"), SiteReport::default(), at(1), ttl);
    assert_eq!(e.expect_err("revoked").code(), Code::Unauthenticated);
    let e = reg.sites().report(&name("nowhere"), SiteReport::default(), at(1), ttl);
    assert_eq!(e.expect_err("unknown").code(), Code::NotFound);
}

#[test]
fn holders_follow_the_reports_and_a_used_substrate_stays() {
    let (_d, reg) = open();
    let s = substrate("abiword");
    reg.substrate_add(&s).expect("add");
    reg.sites().put(&site("cafe")).expect("put");
    let report = SiteReport { substrates: [s.id].into(), ..SiteReport::default() };
    reg.sites().report(&name("cafe"), report, at(1), Duration::ZERO).expect("report");
    assert!(reg.substrate("abiword").expect("there").holders.contains(&name("cafe")));
    // A report without it may be older than the substrate, until that is impossible.
    let without = |ms| {
        reg.sites()
            .report(&name("cafe"), SiteReport::default(), at(ms), Duration::ZERO)
            .expect("report");
        reg.substrate("abiword").expect("there").holders.len()
    };
    assert_eq!(without(REPORT_AGE.as_millis() as u64), 1);
    assert_eq!(without(1 + REPORT_AGE.as_millis() as u64), 0);

    let mut v = vm("a");
    v.substrate = Some(s.id);
    reg.vm_add(&v, None).expect("add");
    let e = reg.substrate_remove(&Principal::operator(), s.id).expect_err("in use");
    assert_eq!(e.to_string(), "substrate 'abiword' is in use by machine 'a'");
    reg.vm_remove(v.id, v.generation).expect("remove");
    reg.substrate_remove(&Principal::operator(), s.id).expect("free");
    assert_eq!(reg.substrate("abiword").expect_err("gone").code(), Code::NotFound);
}

#[test]
fn old_finished_operations_make_room() {
    let (_d, reg) = open();
    let op = |state| OpRecord {
        id: OpId::new(),
        tenant: default_tenant(),
        user: crate::principal::operator(),
        by: None,
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
    reg.ops().put(&running).expect("put");
    let first = op(OpState::Done);
    let fill = |_: &Tables, changes: &mut Vec<Change>| {
        changes.push(Change::Op(first.id, Some(Arc::new(first.clone()))));
        for _ in 1..KEPT_OPS {
            let o = op(OpState::Done);
            changes.push(Change::Op(o.id, Some(Arc::new(o))));
        }
        Ok(())
    };
    reg.file.write(fill).expect("fill");
    reg.ops().put(&op(OpState::Failed)).expect("put");
    let all = reg.ops().all().expect("list");
    assert_eq!(all.len(), KEPT_OPS + 1);
    assert_eq!(reg.ops().get(first.id).expect_err("dropped").code(), Code::NotFound);
    assert!(reg.ops().get(running.id).is_ok());
}

#[test]
fn a_file_of_another_format_or_in_use_is_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let reg = Registry::open(&path).expect("open");
    assert!(matches!(Registry::open(&path), Err(RegistryError::Open { .. })), "held");
    drop(reg);
    let db = redb::Database::create(&path).expect("closed");
    put_raw(&db, layout::META, "format", b"9");
    drop(db);
    let e = Registry::open(&path).expect_err("format");
    assert_eq!(
        e.to_string(),
        "the registry has format 9, this version knows formats 1 to 5; run the version that wrote it, \
         or bring back a copy from before"
    );
}

pub(super) fn put_raw(
    db: &redb::Database,
    table: redb::TableDefinition<'static, &'static str, &'static [u8]>,
    key: &str,
    value: &[u8],
) {
    let tx = db.begin_write().expect("transaction");
    tx.open_table(table).expect("table").insert(key, value).expect("written");
    tx.commit().expect("commit");
}

#[test]
fn a_file_of_the_first_format_opens_and_is_brought_to_this_one() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let (v, s) = (vm("report"), substrate("abiword"));
    {
        let db = redb::Database::create(&path).expect("made");
        put_raw(&db, layout::META, "format", b"1");
        let old = serde_json::json!({
            "name": "cafe", "kind": "ap", "joined": 5, "lease_until": 95_000, "revoked": true,
            "report": SiteReport { cpus: 7, ..SiteReport::default() },
        });
        put_raw(&db, layout::SITES, "cafe", old.to_string().as_bytes());
        put_raw(&db, layout::VMS, &v.id.to_string(), &serde_json::to_vec(&v).expect("json"));
        put_raw(&db, layout::SUBSTRATES, &s.id.to_string(), &serde_json::to_vec(&s).expect("json"));
        for names in ["substrate-names", "vm-names"] {
            put_raw(&db, redb::TableDefinition::new(names), "report", b"\"x\"");
        }
        let tx = db.begin_write().expect("transaction");
        tx.open_table(layout::OPS).expect("table");
        tx.commit().expect("commit");
    }
    for commits in [1, 0] {
        let reg = Registry::open(&path).expect("opens");
        assert_eq!(reg.commits(), commits, "it is rewritten once");
        assert_eq!(reg.vm("report").expect("there"), v);
        assert_eq!(reg.substrate("abiword").expect("there"), s);
        let cafe = reg.sites().get(&name("cafe")).expect("there");
        let seen = UnixMs(95_000 - LEASE.as_millis() as u64);
        assert_eq!((cafe.joined, cafe.revoked, cafe.last_seen), (UnixMs(5), true, seen));
        assert_eq!(cafe.state(UnixMs(0)), SiteState::Unreachable);
    }
}

#[test]
fn an_entry_that_does_not_parse_is_named_and_the_rest_is_there() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let (good, bad) = (vm("good"), vm("bad"));
    let reg = Registry::open(&path).expect("open");
    reg.vm_add(&good, None).expect("add");
    drop(reg);
    let db = redb::Database::create(&path).expect("closed");
    put_raw(&db, layout::VMS, &bad.id.to_string(), b"{\"id\": 7}");
    drop(db);
    let reg = Registry::open(&path).expect("opens");
    assert_eq!(reg.vms().expect("list"), [good]);
    assert_eq!(reg.damaged(), [bad.id.to_string()]);
    let e = reg.vm(&bad.id.to_string()).expect_err("damaged");
    assert_eq!(e.code(), Code::Damaged);
    assert!(e.to_string().contains(&bad.id.to_string()), "{e}");
}

#[test]
fn reports_with_nothing_new_are_not_written() {
    let (_d, reg) = open();
    let all: Vec<_> = (0..200).map(|i| substrate(&format!("s-{i}"))).collect();
    for s in &all {
        reg.substrate_add(s).expect("add");
    }
    let sites: Vec<_> = (0..5).map(|i| name(&format!("site-{i}"))).collect();
    let held: BTreeSet<_> = all.iter().map(|s| s.id).collect();
    let holdings = Some(Hash::of(b"all"));
    let report =
        |load| SiteReport { substrates: held.clone(), holdings, load, ..SiteReport::default() };
    let ttl = Duration::from_secs(15);
    for n in &sites {
        reg.sites().put(&site(n.as_str())).expect("put");
        reg.sites().report(n, report(0.0), at(1), ttl).expect("report");
    }
    let before = reg.commits();
    for i in 1..100 {
        for n in &sites {
            let now = at(i * 4000);
            let s = reg.sites().report(n, report(i as f64), now, ttl).expect("report");
            assert_eq!((s.report.load, s.last_seen), (i as f64, now.wall));
            assert!(reg.sites().knows_holdings(n, &report(0.0)));
            for s in &all {
                reg.substrate_holder(s.id, n, true).expect("held already");
            }
            reg.sites().put(&s).expect("as it is");
        }
    }
    assert_eq!(reg.commits(), before, "nothing durable has changed");
}

#[test]
fn a_site_that_goes_away_loses_its_lease_and_is_remembered() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let reg = Registry::open(&path).expect("open");
    reg.sites().put(&site("cafe")).expect("put");
    let ttl = Duration::from_secs(15);
    reg.sites().report(&name("cafe"), SiteReport::default(), at(7000), ttl).expect("report");
    assert!(!reg.sites().silent(&name("cafe"), at(6999)), "it has reported since");
    assert!(reg.sites().silent(&name("cafe"), at(7001)));
    assert_eq!(
        reg.sites().get(&name("cafe")).expect("there").state(UnixMs(7001)),
        SiteState::Unreachable
    );
    let s = reg.sites().report(&name("cafe"), SiteReport::default(), at(8000), ttl).expect("back");
    assert_eq!(s.state(UnixMs(8001)), SiteState::Ready);
    reg.sites().away(&name("cafe")).expect("written");
    drop(reg);
    let reg = Registry::open(&path).expect("open");
    let s = reg.sites().get(&name("cafe")).expect("there");
    assert_eq!((s.last_seen, s.state(UnixMs(8001))), (UnixMs(8000), SiteState::Unreachable));
}

#[test]
fn changes_that_come_together_share_a_transaction() {
    let (_d, reg) = open();
    let before = reg.commits();
    std::thread::scope(|s| {
        for i in 0..64 {
            let reg = &reg;
            s.spawn(move || reg.vm_add(&vm(&format!("vm-{i}")), None).expect("add"));
        }
    });
    assert_eq!(reg.vms().expect("list").len(), 64);
    let made = reg.commits() - before;
    assert!((1..64).contains(&made), "{made} transactions for 64 changes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_change_does_not_hold_up_the_other_tasks_of_a_runtime() {
    let (_d, reg) = open();
    let reg = Arc::new(reg);
    // The writer is kept from its file: readers of what is on disk are.
    let durable = reg.clone();
    let (locked, is_locked) = std::sync::mpsc::channel();
    let (free, freed) = std::sync::mpsc::channel::<()>();
    let reader = std::thread::spawn(move || {
        durable.file.read(|_| {
            locked.send(()).expect("waits");
            freed.recv().expect("reported");
        });
    });
    is_locked.recv().expect("locked");
    let change = tokio::spawn({
        let reg = reg.clone();
        async move { reg.vm_add(&vm("a"), None) }
    });
    // On the only worker, which waits for the change.
    let other = tokio::spawn(async { tokio::task::yield_now().await });
    tokio::time::timeout(Duration::from_secs(20), other).await.expect("runs").expect("ran");
    assert!(!change.is_finished());
    free.send(()).expect("waits");
    change.await.expect("ran").expect("added");
    reader.join().expect("ended");
}

#[test]
fn the_machines_of_a_site_are_found_by_it_and_what_changed_since_is_left_out() {
    let (_d, reg) = open();
    let (a, b, c) = (vm("a"), VmRecord { site: name("cafe"), ..vm("b") }, vm("c"));
    for v in [&a, &b, &c] {
        reg.vm_add(v, None).expect("add");
    }
    let at = |site: &str, others: Vec<VmId>, since| {
        let found = reg.vms_about(&name(site), others, since);
        let mut names: Vec<_> = found.iter().map(|v| v.name.to_string()).collect();
        names.sort();
        names.join(" ")
    };
    let before = reg.revision();
    assert_eq!(at("center", vec![], before), "a c");
    assert_eq!(at("cafe", vec![a.id, b.id, VmId::new()], before), "a b");
    reg.vm_update(a.id, a.generation, |v| {
        v.site = name("cafe");
        Ok(())
    })
    .expect("moved");
    assert_eq!(at("center", vec![], before), "c");
    assert_eq!(at("cafe", vec![], before), "b");
    assert_eq!(at("cafe", vec![], reg.revision()), "a b");
    reg.vm_remove(c.id, c.generation).expect("removed");
    assert_eq!(at("center", vec![c.id], reg.revision()), "");
}

#[test]
fn a_rebuilt_substrate_takes_the_name_and_one_in_use_is_kept_aside() {
    let (_d, reg) = open();
    let (old, new, third) = (substrate("abiword"), substrate("new"), substrate("third"));
    let aside = name("abiword-old");
    let made = |n: &str, of: &SubstrateRecord| {
        let v = VmRecord { substrate: Some(of.id), ..vm(n) };
        reg.vm_add(&v, None).expect("add");
        (v.id, v.generation)
    };
    reg.substrate_add(&old).expect("add");
    let booted = made("abiword-rebuild", &old);
    let kept = reg.substrate_replace(old.id, &new, &aside, booted).expect("replaced");
    assert_eq!(kept, None);
    assert_eq!(reg.substrate("abiword").expect("there").id, new.id);
    assert_eq!(reg.substrate(&old.id.to_string()).expect_err("gone").code(), Code::NotFound);
    assert!(reg.vms().expect("list").is_empty());
    made("a", &new);
    let booted = made("abiword-rebuild", &new);
    let kept = reg.substrate_replace(new.id, &third, &aside, booted).expect("replaced");
    let kept = kept.expect("kept");
    assert_eq!((kept.id, &kept.name), (new.id, &aside));
    assert_eq!(reg.substrate("abiword").expect("there").id, third.id);
    assert_eq!(reg.substrate("abiword-old").expect("there").id, new.id);
    let e = reg.substrate_remove(&Principal::operator(), new.id).expect_err("in use");
    assert_eq!(e.to_string(), "substrate 'abiword-old' is in use by machine 'a'");
}

/// The child of the test below: adds machines until it is killed, telling each one that is in.
#[test]
fn child_that_writes_until_it_is_killed() {
    use std::io::Write;
    let Ok(path) = std::env::var("GODWIT_TEST_REGISTRY") else { return };
    let reg = Registry::open(Path::new(&path)).expect("open");
    for i in 0.. {
        reg.vm_add(&vm(&format!("vm-{i}")), None).expect("add");
        let mut out = std::io::stderr();
        writeln!(out, "in {i} {}", reg.now()).expect("tell");
    }
}

#[test]
fn kill_9_loses_nothing_that_was_acknowledged() {
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
    let mut acknowledged = 0;
    let mut ids = Vec::new();
    let mut lines = BufReader::new(child.stderr.take().expect("pipe")).lines();
    for line in lines.by_ref() {
        let line = line.expect("line");
        if let Some(n) = line.strip_prefix("in ") {
            let (n, id) = n.split_once(' ').expect("number and event");
            acknowledged = n.parse::<usize>().expect("number") + 1;
            ids.push(id.parse().expect("id"));
            if acknowledged == 20 {
                break;
            }
        }
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("reaped");
    assert_eq!(acknowledged, 20);
    let reg = Registry::open(&path).expect("opens again");
    let vms = reg.vms().expect("list");
    assert!(vms.len() >= acknowledged, "{} of {acknowledged}", vms.len());
    for i in 0..acknowledged {
        assert!(reg.vm(&format!("vm-{i}")).is_ok(), "vm-{i}");
    }
    // Whoever has read the tenth goes on with the eleventh.
    let mut rest = reg.watch(Some(ids[9])).expect("known");
    for i in 10..vms.len() {
        let event = rest.read().expect("kept").expect("there");
        assert_eq!(event.what.name, format!("vm-{i}"));
    }
    assert_eq!(rest.read().expect("kept"), None, "there are no sites");
}

/// A small tmpfs, unmounted when dropped.
pub(super) struct Tmpfs(pub(super) tempfile::TempDir);

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
    let mut watcher = reg.watch(None).expect("from now");
    reg.vm_add(&small, None).expect("room");
    let filler = mount.0.path().join("filler");
    let free = rustix::fs::statvfs(mount.0.path()).expect("statvfs");
    std::fs::write(&filler, vec![1; (free.f_bavail * free.f_frsize) as usize]).expect("fill");
    let large = VmRecord { reason: Some("x".repeat(4 << 20)), ..vm("b") };
    for _ in 0..2 {
        let e = reg.vm_add(&large, None).expect_err("full");
        assert_eq!(e.code(), Code::NoRoom, "{e:?}");
        assert_eq!(reg.vms().expect("read"), std::slice::from_ref(&small));
    }
    std::fs::remove_file(&filler).expect("remove");
    reg.vm_add(&large, None).expect("room again");
    assert_eq!(reg.vms().expect("read").len(), 2);
    let events: Vec<_> = std::iter::from_fn(|| watcher.read().expect("kept")).collect();
    let events: Vec<_> = events.iter().map(|e| (e.id.revision(), e.what.name.as_str())).collect();
    assert_eq!(events, [(1, "a"), (2, "b")], "what failed is not told and costs no number");
}

#[test]
fn a_deleted_machine_is_remembered_until_every_site_was_seen_without_it() {
    let (dir, reg) = open();
    for n in ["center", "cafe", "stolen"] {
        reg.sites().put(&site(n)).expect("joined");
    }
    let gone: Vec<_> = (0..3).map(|i| vm(&format!("vm-{i}"))).collect();
    for vm in &gone {
        reg.vm_add(vm, None).expect("added");
        reg.vm_remove(vm.id, vm.generation).expect("removed");
    }
    let asked = reg.revision();
    for n in ["center", "cafe"] {
        reg.sites().has_no_deleted(&name(n), asked).expect("reported");
    }
    assert_eq!(reg.deleted_count(), 3);
    // What it answered before is no word on what was deleted after.
    let late = vm("late");
    reg.vm_add(&late, None).expect("added");
    reg.vm_remove(late.id, late.generation).expect("removed");
    assert!(reg.vms_deleted([late.id], asked).is_empty());
    assert_eq!(reg.vms_deleted([late.id, VmId::new()], reg.revision()).len(), 1);
    reg.sites().has_no_deleted(&name("stolen"), asked).expect("reported");
    assert_eq!(reg.deleted_count(), 1, "all have told of the first three");
    reg.sites().revoke(&name("stolen")).expect("revoked");
    for n in ["center", "cafe"] {
        reg.sites().has_no_deleted(&name(n), reg.revision()).expect("reported");
    }
    assert_eq!(reg.deleted_count(), 1, "one that joins anew may have it");
    drop(reg);
    let reg = Registry::open(&dir.path().join("r.redb")).expect("open");
    assert_eq!(reg.vms_deleted([late.id], reg.revision())[0].name, name("late"));
    for n in ["center", "cafe"] {
        reg.sites().has_no_deleted(&name(n), reg.revision()).expect("reported");
    }
    assert_eq!(reg.deleted_count(), 1, "one has not told since the center came back");
    reg.sites().has_no_deleted(&name("stolen"), reg.revision()).expect("reported");
    assert_eq!(reg.deleted_count(), 0);
}

#[test]
fn a_step_of_the_clock_neither_ends_nor_extends_a_lease() {
    let (_d, reg) = open();
    reg.sites().put(&site("cafe")).expect("put");
    let (cafe, ttl) = (name("cafe"), Duration::from_secs(15));
    let day = 86_400_000;
    let begun = Moment { wall: UnixMs(10 * day), run: Duration::from_secs(100) };
    reg.sites().report(&cafe, SiteReport::default(), begun, ttl).expect("report");
    for wall in [UnixMs(day), UnixMs(10 * day), UnixMs(20 * day)] {
        let state = |after| {
            let run = begun.run + Duration::from_millis(after);
            let now = Moment { wall: wall.plus(Duration::from_millis(after)), run };
            reg.sites().at(&cafe, now).expect("there").state(now.wall)
        };
        assert_eq!(state(14_999), SiteState::Ready, "{wall:?}");
        assert_eq!(state(15_001), SiteState::Unreachable, "{wall:?}");
    }
    // Nor does it keep a report from counting, or a silent site from being taken for one.
    let back = Moment { wall: UnixMs(day), run: Duration::from_secs(110) };
    let s = reg.sites().report(&cafe, SiteReport::default(), back, ttl).expect("report");
    assert_eq!((s.lease_until, s.last_seen), (back.wall.plus(ttl), back.wall));
    let asked = Moment { wall: UnixMs(2), run: Duration::from_secs(111) };
    assert!(reg.sites().silent(&cafe, asked));
}

#[test]
fn a_flip_anywhere_in_the_head_of_the_file_loses_no_change_unsaid() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let mark = path.with_extension("mark");
    let reg = Registry::open(&path).expect("open");
    for n in ["first", "last"] {
        reg.vm_add(&vm(n), None).expect("added");
    }
    // As a daemon that is killed leaves it.
    let (sound, at_last) =
        (std::fs::read(&path).expect("read"), std::fs::read(&mark).expect("mark"));
    drop(reg);
    let mut fell_back = 0;
    // The database's own head: which of two commit slots counts, and both.
    for at in 0..320 {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).expect("written");
        std::fs::write(&mark, &at_last).expect("written");
        match Registry::open(&path) {
            Ok(reg) => assert!(reg.vm("last").is_ok(), "byte {at}: lost, and nothing said"),
            Err(e) => {
                fell_back += u32::from(matches!(e, RegistryError::FellBack { .. }));
            }
        }
    }
    assert!(fell_back > 0, "no flip reaches what this is about");
    // An operator who takes it as it is.
    std::fs::write(&path, &sound).expect("written");
    std::fs::remove_file(&mark).expect("removed");
    assert!(Registry::open(&path).expect("open").vm("last").is_ok());
}

#[test]
fn an_address_is_one_machines_and_a_network_in_use_stays() {
    use super::{NetworkRecord, Networks};
    let dir = tempfile::tempdir().expect("dir");
    let reg = Registry::open(&dir.path().join("r")).expect("open");
    let (who, tenant) = (Principal::operator(), crate::principal::default_tenant());
    let networks: &Networks = reg.networks();
    let there = networks.get(&tenant, "default").expect("from the start");
    let lab = NetworkRecord {
        id: godwit_types::NetworkId::new(),
        name: name("lab"),
        prefix: "10.9.0.0/29".parse().expect("prefix"),
        ..there.clone()
    };
    networks.add(&who, &lab).expect("made");
    let mut first = None;
    for n in 0..5 {
        let mut vm = vm(&format!("vm-{n}"));
        vm.network = Some(networks.place(&lab, vm.id).expect("a place"));
        reg.vm_add(&vm, None).expect("added");
        first.get_or_insert(vm);
    }
    let full = networks.place(&lab, VmId::new()).expect_err("none is left");
    assert_eq!(full.to_string(), "network 'lab' has no address left in 10.9.0.0/29");
    let first = first.expect("one");
    let mut twice = vm("twice");
    twice.network = first.network.clone();
    let taken = reg.vm_add(&twice, None).expect_err("taken");
    assert!(taken.to_string().contains("is not free"), "{taken}");
    let used = networks.remove(&who, lab.id).expect_err("in use");
    assert!(used.to_string().contains("in use by machine"), "{used}");
    let kept = networks.remove(&who, there.id).expect_err("as long as its tenant");
    assert!(kept.to_string().contains("as long as its tenant"), "{kept}");
    reg.vm_remove(first.id, first.generation).expect("removed");
    let place = networks.place(&lab, twice.id).expect("free again");
    assert_eq!(Some(place.address), first.network.map(|n| n.address));
}
