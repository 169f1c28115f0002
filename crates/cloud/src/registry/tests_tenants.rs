//! Tenants, users, tokens; and registries from before there were any.

use std::path::PathBuf;
use std::time::Duration;

use godwit_types::{Code, CodedError, UnixMs};

use super::tables::Tables;
use super::tests::{Tmpfs, name, open, put_raw, substrate, vm};
use super::*;
use crate::principal::{Principal, Role, default_tenant};

fn me() -> Principal {
    Principal::operator()
}

/// A registry of format 1 or 2 with one machine and one substrate, which say nothing of tenants.
fn of_format(format: &str, dir: &Path) -> (PathBuf, VmRecord, SubstrateRecord) {
    let path = dir.join("r.redb");
    let (v, s) = (vm("report"), substrate("abiword"));
    let old = |record: serde_json::Value| {
        let mut record = record;
        record.as_object_mut().expect("an object").remove("tenant").expect("it says whose it is");
        record.to_string().into_bytes()
    };
    let db = redb::Database::create(&path).expect("made");
    put_raw(&db, layout::META, "format", format.as_bytes());
    if format == "1" {
        put_raw(&db, redb::TableDefinition::new("vm-names"), "report", v.id.to_string().as_bytes());
    }
    put_raw(&db, layout::VMS, &v.id.to_string(), &old(serde_json::to_value(&v).expect("json")));
    let s_old = old(serde_json::to_value(&s).expect("json"));
    put_raw(&db, layout::SUBSTRATES, &s.id.to_string(), &s_old);
    for table in [layout::SITES, layout::OPS, layout::DELETED] {
        let tx = db.begin_write().expect("transaction");
        tx.open_table(table).expect("table");
        tx.commit().expect("commit");
    }
    (path, v, s)
}

fn format_of(path: &Path) -> Vec<u8> {
    use redb::ReadableDatabase;
    let db = redb::Database::create(path).expect("closed");
    let tx = db.begin_read().expect("transaction");
    let meta = tx.open_table(layout::META).expect("table");
    meta.get("format").expect("read").expect("there").value().to_vec()
}

#[test]
fn what_is_from_before_tenants_belongs_to_the_default_one() {
    for format in ["1", "2"] {
        is_brought_to_tenants(format);
    }
}

fn is_brought_to_tenants(format: &str) {
    let dir = tempfile::tempdir().expect("dir");
    let (path, v, s) = of_format(format, dir.path());
    for commits in [1, 0] {
        let reg = Registry::open(&path).expect("opens");
        assert_eq!(reg.commits(), commits, "it is rewritten once");
        assert_eq!(reg.vm("report").expect("there"), v);
        assert_eq!(reg.vm_in(&default_tenant(), "report").expect("there"), v);
        assert_eq!(reg.substrate("default/abiword").expect("there"), s);
        let names: Vec<_> = reg.people().tenants().into_iter().map(|t| t.name).collect();
        assert_eq!(names, [default_tenant()]);
    }
    // A program from before knows formats 1 and 2, and refuses what it does not know.
    assert_eq!(format_of(&path), b"4");
}

#[test]
fn a_registry_from_before_networks_gives_each_tenant_the_one_that_it_has_from_the_start() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("registry");
    let quota = Quota { machines: Some(3), ..Quota::default() };
    {
        let reg = Registry::open(&path).expect("opens");
        let who = Principal::operator();
        reg.people().tenant_add(&who, &TenantRecord::new(name("acme"))).expect("tenant");
        reg.quotas().set(&who, &default_tenant(), quota).expect("quota");
    }
    {
        let db = redb::Database::create(&path).expect("closed");
        let tx = db.begin_write().expect("transaction");
        tx.delete_table(layout::NETWORKS).expect("deleted");
        let mut meta = tx.open_table(layout::META).expect("table");
        meta.insert("format", b"3".as_slice()).expect("written");
        drop(meta);
        tx.commit().expect("committed");
    }
    for commits in [1, 0] {
        let reg = Registry::open(&path).expect("opens");
        assert_eq!(reg.commits(), commits, "it is rewritten once");
        let all = reg.networks().all();
        let all: Vec<_> = all.iter().map(|n| (n.tenant.as_str(), n.name.as_str())).collect();
        assert_eq!(all, [("acme", "default"), ("default", "default")]);
        assert_eq!(reg.quotas().of(&default_tenant()).expect("there").quota, quota);
    }
    assert_eq!(format_of(&path), b"4");
}

/// The child of the test below: it is killed while it brings a registry to the new format.
#[test]
fn child_that_is_killed_in_an_upgrade() {
    let Ok(path) = std::env::var("GODWIT_TEST_UPGRADE") else { return };
    let _ = Registry::open(Path::new(&path));
}

#[test]
fn kill_9_in_an_upgrade_leaves_the_old_file_which_opens() {
    for format in ["1", "2"] {
        is_killed_in_an_upgrade(format);
    }
}

fn is_killed_in_an_upgrade(format: &str) {
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().expect("dir");
    let (path, v, _) = of_format(format, dir.path());
    let hold = dir.path().join("hold");
    std::fs::create_dir(&hold).expect("dir");
    std::fs::write(hold.join("registry.upgrading"), "").expect("request");
    let mut child = Command::new(std::env::current_exe().expect("exe"))
        .args(["--exact", "registry::tests_tenants::child_that_is_killed_in_an_upgrade"])
        .env("GODWIT_TEST_UPGRADE", &path)
        .env(godwit_hold::VARIABLE, &hold)
        .stdout(Stdio::null())
        .spawn()
        .expect("spawn");
    let begun = std::time::Instant::now();
    while !hold.join("registry.upgrading.held").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never came to that step");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("reaped");
    assert_eq!(format_of(&path), format.as_bytes());
    let reg = Registry::open(&path).expect("opens");
    assert_eq!(reg.vm("report").expect("there"), v);
    drop(reg);
    assert_eq!(format_of(&path), b"4");
}

#[test]
#[allow(clippy::print_stderr, reason = "where a test says that it was left out")]
fn a_full_disk_leaves_the_old_file_and_room_lets_it_be_upgraded() {
    let dir = tempfile::tempdir().expect("dir");
    let flags = rustix::mount::MountFlags::empty();
    let size = c"size=16777216,mode=0700";
    if let Err(e) = rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, size) {
        eprintln!("SKIPPED: a small tmpfs cannot be mounted here: {e}");
        return;
    }
    let mount = Tmpfs(dir);
    let (path, v, _) = of_format("1", mount.0.path());
    let filler = mount.0.path().join("filler");
    let free = rustix::fs::statvfs(mount.0.path()).expect("statvfs");
    std::fs::write(&filler, vec![1; (free.f_bavail * free.f_frsize) as usize]).expect("fill");
    let e = Registry::open(&path).expect_err("full");
    assert_eq!(e.code(), Code::NoRoom, "{e:?}");
    std::fs::remove_file(&filler).expect("remove");
    assert_eq!(format_of(&path), b"1");
    let reg = Registry::open(&path).expect("room again");
    assert_eq!(reg.vm("report").expect("there"), v);
}

#[test]
fn names_are_unique_in_their_tenant_alone() {
    let (_d, reg) = open();
    let acme = name("acme");
    let of = |n: &str, tenant: &Name| VmRecord { tenant: tenant.clone(), ..vm(n) };
    let e = reg.vm_add(&of("web", &acme), None).expect_err("no such tenant");
    assert_eq!(e.to_string(), "no tenant 'acme'");
    reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    let (ours, theirs) = (of("web", &default_tenant()), of("web", &acme));
    reg.vm_add(&ours, None).expect("added");
    reg.vm_add(&theirs, None).expect("added");
    assert_eq!(reg.vm_add(&of("web", &acme), None).expect_err("taken").code(), Code::Exists);
    assert_eq!(reg.vm("web").expect("there").id, ours.id);
    assert_eq!(reg.vm_in(&acme, "web").expect("there").id, theirs.id);
    assert_eq!(reg.vm("acme/web").expect("there").id, theirs.id);
    let e = reg.vm_in(&acme, "other/web\n").expect_err("none");
    assert_eq!(e.to_string(), "no machine 'other/web\\n'");
    assert_eq!(reg.people().tenant_remove(&me(), &acme).expect_err("busy").code(), Code::Conflict);
    reg.vm_remove(theirs.id, theirs.generation).expect("removed");
    reg.people().tenant_remove(&me(), &acme).expect("removed");
    assert_eq!(
        reg.people().tenant_remove(&me(), &default_tenant()).expect_err("never").code(),
        Code::Conflict
    );
}

#[test]
fn fifty_creations_race_for_the_last_places_of_a_quota() {
    let (_d, reg) = open();
    let acme = name("acme");
    reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    let of = |n: &str| VmRecord { tenant: acme.clone(), ..vm(n) };
    reg.vm_add(&of("first"), None).expect("no limit yet");
    reg.quotas().set(&me(), &acme, Quota { machines: Some(4), ..Quota::default() }).expect("set");
    let taken = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|s| {
        for i in 0..50 {
            let (reg, of, taken) = (&reg, &of, &taken);
            s.spawn(move || match reg.vm_add(&of(&format!("vm-{i}")), None) {
                Ok(()) => {
                    taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
                Err(e) => {
                    assert_eq!(e.to_string(), "tenant 'acme' has 4 machines and may have 4");
                    assert_eq!(e.code(), Code::NoRoom);
                }
            });
        }
    });
    assert_eq!(taken.into_inner(), 3);
    assert_eq!(reg.quotas().of(&acme).expect("there").used.machines, 4);
    reg.vm_add(&vm("ours"), None).expect("another tenant has its own");
}

#[test]
fn fifty_creations_race_for_the_last_gigabytes_of_disk() {
    let (_d, reg) = open();
    let acme = name("acme");
    reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    let of = |n: &str| VmRecord { tenant: acme.clone(), disk_bytes: Some(4 << 30), ..vm(n) };
    let old = VmRecord { disk_bytes: None, ..of("old") };
    reg.vm_add(&old, None).expect("no limit yet");
    let quota = Quota { disk_bytes: Some(14 << 30), ..Quota::default() };
    reg.quotas().set(&me(), &acme, quota).expect("set");
    let taken = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|s| {
        for i in 0..50 {
            let (reg, of, taken) = (&reg, &of, &taken);
            s.spawn(move || {
                let vm = of(&format!("vm-{i}"));
                match reg.vm_add(&vm, None) {
                    Ok(()) => taken.lock().expect("lock").push(vm),
                    Err(e) => {
                        let words = "has 12884901888 bytes of machines' disks and may have";
                        assert!(e.to_string().contains(words), "{e}");
                        assert_eq!(e.code(), Code::NoRoom);
                    }
                }
            });
        }
    });
    let taken = taken.into_inner().expect("lock");
    assert_eq!(taken.len(), 3);
    assert_eq!(reg.quotas().of(&acme).expect("there").used.disk_bytes, 12 << 30);
    // One that is off has its disk still; one that is gone has none.
    let off = |v: &mut VmRecord| Ok(v.become_state(godwit_types::VmState::Failed, UnixMs(1))?);
    reg.vm_update(taken[0].id, Generation::FIRST, off).expect("off");
    reg.vm_add(&of("one-more"), None).expect_err("no room");
    reg.vm_remove(taken[0].id, Generation::FIRST).expect("removed");
    reg.vm_add(&of("one-more"), None).expect("room");
}

#[test]
fn each_part_of_a_quota_is_counted_when_it_is_taken() {
    let (_d, reg) = open();
    let all = default_tenant();
    let set = |quota| reg.quotas().set(&me(), &all, quota).expect("set");
    let become_state = |id, states: &[VmState]| {
        let mut last = Ok(vm("none"));
        for state in states {
            last = reg.vm_update(id, Generation::FIRST, |v| Ok(v.become_state(*state, UnixMs(1))?));
        }
        last.map(|_| ())
    };
    let full = |e: Result<()>, what: &str| {
        let e = e.expect_err(what).to_string();
        assert!(e.contains(what), "{e}");
    };
    use godwit_types::VmState::{self, Docking, Moving, Running, Starting, Stopped};
    let (a, b) = (vm("a"), vm("b"));
    set(Quota { vcpus: Some(1), ..Quota::default() });
    reg.vm_add(&a, None).expect("room");
    full(reg.vm_add(&b, None), "1 running vCPUs and may have 1");
    // One that is off takes none, until it is started.
    become_state(a.id, &[Running, Stopped]).expect("off");
    reg.vm_add(&b, None).expect("room");
    full(become_state(a.id, &[Starting]), "1 running vCPUs");
    set(Quota { memory_mib: Some(300), ..Quota::default() });
    full(become_state(a.id, &[Starting]), "256 MiB of running memory and may have 300");
    set(Quota { moves: Some(1), ..Quota::default() });
    become_state(a.id, &[Starting, Running, Moving]).expect("one moves");
    full(become_state(b.id, &[Running, Moving]), "1 moves at once");
    // What is on its way already is not stopped by a lower limit.
    set(Quota { moves: Some(0), machines: Some(0), ..Quota::default() });
    become_state(a.id, &[Running]).expect("it came to its end");
    let mut s = substrate("s");
    (s.raw_bytes, s.stored_bytes) = (100, 1);
    set(Quota { pool_bytes: Some(100), ..Quota::default() });
    reg.substrate_bring(&s).expect("room");
    full(reg.substrate_bring(&substrate("t")), "bytes in the pool");
    full(become_state(a.id, &[Docking]), "100 bytes in the pool");
    // What was docked is there, and is not refused.
    reg.substrate_add(&substrate("u")).expect("written down");
    let used = reg.quotas().of(&all).expect("there").used;
    assert_eq!((used.machines, used.pool_bytes, used.moves), (2, 101, 0));
}

#[test]
fn a_token_is_good_for_its_user_and_role_until_its_end() {
    let (_d, reg) = open();
    let acme = name("acme");
    reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    let ann = reg.people().user_add(&me(), &acme, &name("ann"), Role::Member).expect("made");
    assert_eq!(
        reg.people().user_add(&me(), &acme, &name("ann"), Role::Viewer).expect_err("taken").code(),
        Code::Exists
    );
    let end = UnixMs(UnixMs::now().0 + 1_000_000);
    let drawn = Drawn::new(ann.id.clone(), Role::Member, Some(end));
    reg.people().token_add(&me(), &drawn.record).expect("entered");
    let who = reg.people().principal(&drawn.text, UnixMs(end.0 - 1)).expect("good");
    assert_eq!(
        who,
        Principal { token: Some(drawn.record.id.clone()), until: Some(end), ..Principal::of(&ann) }
    );
    assert_eq!(reg.people().principal(&drawn.text, end), None, "its time is over");
    // Every changed character, and every shorter text.
    for at in 0..drawn.text.len() {
        let mut other = drawn.text.clone().into_bytes();
        other[at] ^= 1;
        let other = String::from_utf8(other).expect("text");
        assert_eq!(reg.people().principal(&other, UnixMs(1)), None, "{at}");
        assert_eq!(reg.people().principal(&drawn.text[..at], UnixMs(1)), None, "{at}");
    }
    // Nothing that is kept is the secret.
    let kept = serde_json::to_string(&drawn.record).expect("json");
    let secret = drawn.text.split('-').nth(2).expect("a secret");
    assert!(!kept.contains(secret) && !format!("{:?}", reg.people().tokens()).contains(secret));
    // One for more than its user may allows no more than that; for less, less.
    for (role, allows) in [(Role::Operator, Role::Member), (Role::Viewer, Role::Viewer)] {
        let drawn = Drawn::new(ann.id.clone(), role, None);
        reg.people().token_add(&me(), &drawn.record).expect("entered");
        assert_eq!(reg.people().principal(&drawn.text, UnixMs(1)).expect("good").role, allows);
    }
    let first = drawn.record.id;
    reg.people().token_remove(&me(), &first).expect("removed");
    assert_eq!(reg.people().principal(&drawn.text, UnixMs(1)), None);
    assert_eq!(reg.people().token_remove(&me(), &first).expect_err("gone").code(), Code::NotFound);
    reg.people().user_remove(&me(), &acme, &name("ann")).expect("removed");
    assert!(reg.people().tokens().is_empty(), "with its tokens");
    let again = reg.people().user_add(&me(), &acme, &name("ann"), Role::Member).expect("made");
    assert_ne!(again.id, ann.id, "another user of that name is another");
}

#[test]
fn users_of_a_tenant_outlive_a_restart_and_keep_what_is_theirs_alone() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let acme = name("acme");
    let (text, id) = {
        let reg = Registry::open(&path).expect("open");
        reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
        let ann = reg.people().user_add(&me(), &acme, &name("ann"), Role::Admin).expect("made");
        let drawn = Drawn::new(ann.id.clone(), Role::Admin, None);
        reg.people().token_add(&me(), &drawn.record).expect("entered");
        let kind = godwit_types::SubstrateKind::Private;
        let owner = name("ann");
        let s = SubstrateRecord { tenant: acme.clone(), owner, kind, ..substrate("mine") };
        reg.substrate_add(&s).expect("added");
        (drawn.text, ann.id)
    };
    let reg = Registry::open(&path).expect("open");
    assert_eq!(reg.people().principal(&text, UnixMs(1)).expect("good").tenant, acme);
    assert_eq!(reg.people().user_of(&id), Some((acme.clone(), name("ann"))));
    let e = reg.people().user_remove(&me(), &acme, &name("ann")).expect_err("busy");
    assert_eq!(e.to_string(), "user 'ann' still has the private substrate 'mine'");
}

#[test]
fn the_audit_log_holds_each_change_and_shows_what_was_changed_or_taken_out() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let acme = name("acme");
    let reg = Registry::open(&path).expect("open");
    assert_eq!(reg.audit().verify().expect("whole"), AuditEnd::default());
    reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    let ann = reg.people().user_add(&me(), &acme, &name("ann"), Role::Member).expect("made");
    let drawn = Drawn::new(ann.id.clone(), Role::Member, None);
    reg.people().token_add(&Principal::of(&ann), &drawn.record).expect("entered");
    // A refused change leaves no entry, an operation two.
    assert!(reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).is_err());
    let v = VmRecord { tenant: acme.clone(), ..vm("web") };
    let kind = crate::op_kind::OpKind::VmCreate { vm: v.id, name: v.name.clone() };
    let mut op = OpRecord::begun(&Principal::of(&ann), kind);
    let before = reg.commits();
    reg.vm_add(&v, Some(&op)).expect("added");
    assert_eq!(reg.commits(), before + 1, "in the transaction of the change");
    op.state = godwit_types::OpState::Failed;
    op.error = Some(godwit_types::Fault::internal("x\n".repeat(500)));
    reg.ops().put(&op).expect("ended");
    reg.ops().put(&op).expect("again");
    let all = reg.audit().entries(100, 0, |_| true).expect("read");
    let found: Vec<_> = all.iter().map(|e| (e.user.as_str(), e.action.as_str())).collect();
    let operator = "operator";
    assert_eq!(
        found,
        [
            (operator, "tenant create"),
            (operator, "user create"),
            ("ann", "token create"),
            ("ann", "vm create"),
            ("ann", "vm create"),
        ]
    );
    assert!(all.iter().all(|e| e.outcome.chars().count() <= 160), "{all:?}");
    assert!(!format!("{all:?}").contains(drawn.text.split('-').nth(2).expect("a secret")));
    let end = reg.audit().verify().expect("whole");
    assert_eq!((end.entries, end.last), (5, all[4].hash()));
    let two = reg.audit().entries(2, 0, |e| e.tenant == acme).expect("read");
    assert_eq!(two, all[3..]);
    let older = reg.audit().entries_before(2, 0, Some(two[0].number), |_| true).expect("read");
    assert_eq!(older, all[1..3]);
    assert!(reg.audit().entries_before(2, 0, Some(1), |_| true).expect("read").is_empty());
    drop(reg);
    // It goes on after a restart where it was.
    let reg = Registry::open(&path).expect("open");
    reg.people().user_add(&me(), &acme, &name("bob"), Role::Viewer).expect("made");
    assert_eq!(reg.audit().verify().expect("whole").entries, 6);
    drop(reg);
    let key = |n: u64| format!("{n:020}");
    for spoilt in ["changed", "taken out", "first taken out"] {
        let copy = dir.path().join("copy.redb");
        std::fs::copy(&path, &copy).expect("copied");
        let db = redb::Database::create(&copy).expect("closed");
        let mut entry = all[2].clone();
        entry.user = name("bob");
        let text = serde_json::to_vec(&entry).expect("json");
        match spoilt {
            "changed" => put_raw(&db, layout::AUDIT, &key(3), &text),
            _ => {
                let n = if spoilt == "taken out" { 3 } else { 1 };
                let tx = db.begin_write().expect("transaction");
                tx.open_table(layout::AUDIT).expect("table").remove(key(n).as_str()).expect("gone");
                tx.commit().expect("commit");
            }
        }
        drop(db);
        let reg = Registry::open(&copy).expect("open");
        let e = reg.audit().verify().expect_err(spoilt);
        assert_eq!(e.code(), Code::Damaged, "{spoilt}: {e}");
    }
}

#[test]
fn tokens_that_have_ended_make_room_for_new_ones() {
    let (_d, reg) = open();
    let ann =
        reg.people().user_add(&me(), &default_tenant(), &name("ann"), Role::Member).expect("made");
    for _ in 0..MAX_TOKENS {
        let ended = Drawn::new(ann.id.clone(), Role::Member, Some(UnixMs(1)));
        reg.people().token_add(&me(), &ended.record).expect("entered");
    }
    assert!(reg.people().tokens().len() <= 2, "those that have ended are gone");
    while reg.people().tokens().len() < MAX_TOKENS {
        reg.people()
            .token_add(&me(), &Drawn::new(ann.id.clone(), Role::Member, None).record)
            .expect("room");
    }
    // The one before the last may have ended.
    let more =
        || reg.people().token_add(&me(), &Drawn::new(ann.id.clone(), Role::Member, None).record);
    let refused = more().and_then(|()| more()).expect_err("full");
    assert_eq!(refused.code(), Code::Conflict);
    assert_eq!(reg.people().tokens().len(), MAX_TOKENS);
}

#[test]
fn a_docking_under_way_takes_room_in_the_pool() {
    let (_d, reg) = open();
    let all = default_tenant();
    let quota = Quota { pool_bytes: Some(100 << 20), ..Quota::default() };
    reg.quotas().set(&me(), &all, quota).expect("set");
    let dock = |n: &str| {
        let v = vm(n);
        reg.vm_add(&v, None).expect("added");
        let to = |state| {
            reg.vm_update(v.id, v.generation, |v| Ok(v.become_state(state, UnixMs(1))?)).map(|_| ())
        };
        to(godwit_types::VmState::Running).expect("runs");
        to(godwit_types::VmState::Docking)
    };
    dock("a").expect("room");
    let e = dock("b").expect_err("what the first will take is not known yet");
    assert_eq!(e.code(), Code::NoRoom, "{e}");
}

#[test]
fn a_tenant_that_is_made_anew_does_not_read_the_log_of_the_earlier_one() {
    let (_d, reg) = open();
    let acme = name("acme");
    let first = reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    assert_eq!(first.audit_from, 1, "its own making is the first");
    reg.people().user_add(&me(), &acme, &name("ann"), Role::Member).expect("made");
    reg.people().user_remove(&me(), &acme, &name("ann")).expect("removed");
    reg.people().tenant_remove(&me(), &acme).expect("removed");
    let again = reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    let own = |e: &AuditEntry| e.tenant == acme;
    let seen = reg.audit().entries(100, again.audit_from, own).expect("read");
    let actions: Vec<_> = seen.iter().map(|e| e.action.as_str()).collect();
    assert_eq!(actions, ["tenant create"]);
    assert_eq!(reg.audit().entries(100, 0, own).expect("read").len(), 5, "it is all of that name");
    assert!(reg.audit().entries(0, 0, own).expect("read").is_empty());
    // That there is such a tenant is no business of others.
    assert!(
        reg.audit().entries(100, 0, |e| e.tenant == default_tenant()).expect("read").is_empty()
    );
}

#[test]
fn machines_of_private_substrates_become_their_owners_alone_in_an_upgrade() {
    let dir = tempfile::tempdir().expect("dir");
    let (path, v, s) = of_format("2", dir.path());
    let mut private = serde_json::to_value(&s).expect("json");
    private["kind"] = "private".into();
    let stands = VmRecord { id: VmId::new(), substrate: Some(s.id), ..vm("diary") };
    let db = redb::Database::create(&path).expect("closed");
    put_raw(&db, layout::SUBSTRATES, &s.id.to_string(), private.to_string().as_bytes());
    let row = serde_json::to_vec(&stands).expect("json");
    put_raw(&db, layout::VMS, &stands.id.to_string(), &row);
    drop(db);
    for _ in 0..2 {
        let reg = Registry::open(&path).expect("opens");
        assert_eq!(reg.vm("diary").expect("there").private_of, Some(s.owner.clone()));
        assert_eq!(reg.vm("report").expect("there"), v);
    }
}

#[test]
fn machines_of_private_substrates_become_their_owners_alone_in_a_registry_of_this_format() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("r.redb");
    let (acme, private) = (name("acme"), godwit_types::SubstrateKind::Private);
    let reg = Registry::open(&path).expect("open");
    reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    reg.people().user_add(&me(), &acme, &name("ann"), Role::Member).expect("made");
    let s = SubstrateRecord {
        tenant: acme.clone(),
        owner: name("ann"),
        kind: private,
        ..substrate("diary")
    };
    reg.substrate_add(&s).expect("added");
    // As a first build of this format wrote them: it knew whose they are, and did not say so.
    let of = |n: &str, tenant: &Name| VmRecord {
        tenant: tenant.clone(),
        substrate: Some(s.id),
        ..vm(n)
    };
    let (own, other) = (of("own", &acme), of("other", &default_tenant()));
    reg.vm_add(&own, None).expect("added");
    reg.vm_add(&other, None).expect("added");
    reg.vm_add(&vm("no-matter"), None).expect("added");
    drop(reg);
    for _ in 0..2 {
        let reg = Registry::open(&path).expect("opens");
        let of = |vm: &VmRecord| reg.vm(&vm.id.to_string()).expect("there").private_of;
        assert_eq!(of(&own), Some(name("ann")));
        assert_eq!(of(&other), Some(name("operator")));
        assert_eq!(reg.vm("no-matter").expect("there").private_of, None);
    }
}

#[test]
fn a_tenant_pushes_no_operations_of_another_out() {
    let (_d, reg) = open();
    let acme = name("acme");
    reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    let (docked, gone) = (vm("docked"), vm("gone"));
    reg.vm_add(&docked, None).expect("added");
    let dock = |who: &Principal, vm: &VmRecord| {
        let (name, substrate) = (vm.name.clone(), SubstrateId::new());
        let (vm, called, becomes, owner) = (vm.id, None, None, None);
        let kind = crate::op_kind::OpKind::VmDock { vm, name, substrate, called, becomes, owner };
        let mut op = OpRecord::begun(who, kind);
        op.state = godwit_types::OpState::Done;
        op
    };
    let in_acme = me().at(&acme);
    let (first, needed, theirs) = (dock(&me(), &gone), dock(&me(), &docked), dock(&in_acme, &gone));
    for op in [&first, &needed, &theirs] {
        reg.ops().put(op).expect("put");
    }
    let fill = |who: &Principal, n: usize| {
        let all: Vec<_> = (0..n).map(|_| dock(who, &gone)).collect();
        let fill = |_: &Tables, changes: &mut Vec<Change>| {
            changes.extend(all.into_iter().map(|o| Change::Op(o.id, Some(Arc::new(o)))));
            Ok(())
        };
        reg.file.write(fill).expect("fill");
        reg.ops().put(&dock(who, &gone)).expect("put");
    };
    fill(&in_acme, KEPT_OPS);
    assert_eq!(reg.ops().get(theirs.id).expect_err("dropped").code(), Code::NotFound);
    reg.ops().get(first.id).expect("another tenant's");
    fill(&me(), KEPT_OPS - 1);
    assert_eq!(reg.ops().get(first.id).expect_err("dropped").code(), Code::NotFound);
    reg.ops().get(needed.id).expect("its machine is there");
    fill(&me(), 2 * KEPT_OPS);
    assert_eq!(
        reg.ops().get(needed.id).expect_err("dropped").code(),
        Code::NotFound,
        "there is an end"
    );
}

#[test]
fn a_change_and_its_entry_in_the_audit_log_are_one_transaction_whichever_part_makes_it() {
    let (_dir, reg) = open();
    let (acme, ann) = (name("acme"), name("ann"));
    let s = SubstrateRecord { kind: SubstrateKind::Restricted, ..substrate("abiword") };
    reg.substrate_add(&s).expect("added");
    let once = |what: &str, change: &dyn Fn()| {
        let count = || (reg.commits(), reg.audit().verify().expect("whole").entries);
        let (commits, entries) = count();
        change();
        assert_eq!(count(), (commits + 1, entries + 1), "{what}");
    };
    once("a tenant", &|| {
        reg.people().tenant_add(&me(), &TenantRecord::new(acme.clone())).expect("made");
    });
    once("its quota", &|| {
        let quota = Quota { machines: Some(1), ..Quota::default() };
        reg.quotas().set(&me(), &acme, quota).expect("set");
    });
    once("a user", &|| {
        reg.people().user_add(&me(), &acme, &ann, Role::Member).expect("made");
    });
    once("a token", &|| {
        let ann = reg.people().user(&acme, &ann).expect("there");
        let drawn = Drawn::new(ann.id, Role::Member, None);
        reg.people().token_add(&me(), &drawn.record).expect("drawn");
    });
    once("a grant", &|| {
        reg.substrate_grant(&me(), s.id, &acme, true).expect("granted");
    });
    once("a user and its tokens", &|| {
        reg.people().user_remove(&me(), &acme, &ann).expect("gone");
        assert_eq!(reg.people().tokens(), []);
    });
    once("a tenant and what was granted to it", &|| {
        reg.people().tenant_remove(&me(), &acme).expect("gone");
        assert!(reg.substrate(&s.id.to_string()).expect("there").granted.is_empty());
    });
}
