//! The change feed.

use std::collections::BTreeMap;
use std::time::Duration;

use godwit_site::SiteReport;
use godwit_types::{OpState, SiteState, UnixMs, VmState};

use super::tests::{at, name, site, substrate, vm};
use super::*;
use crate::op_kind::OpKind;

fn open() -> (tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().expect("dir");
    let reg = Registry::open(&dir.path().join("r.redb")).expect("open");
    (dir, reg)
}

fn all(w: &mut Watcher) -> Vec<Arc<Event>> {
    std::iter::from_fn(|| w.read().expect("kept")).collect()
}

/// Kind, name, and the states before and after.
fn summaries(events: &[Arc<Event>]) -> Vec<(&str, &str, &str, &str)> {
    fn state(of: Option<&Summary>) -> &str {
        of.map_or("-", |s| &s.state)
    }
    events
        .iter()
        .map(|e| &e.what)
        .map(|w| (w.kind.word(), w.name.as_str(), state(w.old.as_ref()), state(w.new.as_ref())))
        .collect()
}

fn run_on(reg: &Registry, v: &VmRecord, to: VmState) {
    let change = |v: &mut VmRecord| Ok(v.become_state(to, UnixMs(9))?);
    reg.vm_update(v.id, v.generation, change).expect("update");
}

#[test]
fn every_change_that_somebody_follows_is_one_event_in_its_order() {
    let (_d, reg) = open();
    let mut w = reg.watch(None).expect("from now");
    let v = vm("a");
    let mut op = OpRecord::begun(
        &crate::principal::Principal::operator(),
        OpKind::VmStart { vm: v.id, name: v.name.clone() },
    );
    reg.vm_add(&v, Some(&op)).expect("add");
    op.journal.push(Step {
        what: StepKind::VmStart { site: name("center"), generation: Generation(1) },
        state: StepState::Begun,
    });
    reg.ops().put(&op).expect("a step");
    run_on(&reg, &v, VmState::Running);
    op.state = OpState::Done;
    reg.ops().put(&op).expect("ended");
    let s = substrate("abiword");
    reg.substrate_add(&s).expect("add");
    reg.substrate_holder(s.id, &name("cafe"), true).expect("holds");
    reg.vm_remove(v.id, v.generation).expect("remove");
    let events = all(&mut w);
    assert_eq!(
        summaries(&events),
        [
            ("vm", "a", "-", "starting"),
            ("op", "a", "-", "running"),
            ("vm", "a", "starting", "running"),
            ("op", "a", "running", "done"),
            ("substrate", "abiword", "-", "restricted"),
            ("substrate", "abiword", "restricted", "restricted"),
            ("vm", "a", "running", "-"),
        ]
    );
    let revisions: Vec<_> = events.iter().map(|e| e.id.revision()).collect();
    assert_eq!(revisions, (1..=7).collect::<Vec<_>>(), "a step of an operation has none");
    assert_eq!(events[5].what.new.as_ref().expect("there").holders, [name("cafe")]);
    assert!(matches!(&events[2].what.object, Some(Object::Vm(v)) if v.state == VmState::Running));
    assert_eq!(events[6].what.object, None);
    assert_eq!(reg.now(), events[6].id);
}

#[test]
fn a_site_is_an_event_when_it_falls_silent_and_is_back_and_not_for_each_report() {
    let (_d, reg) = open();
    reg.sites().put(&site("cafe")).expect("put");
    let cafe = name("cafe");
    let ttl = Duration::from_secs(15);
    let report =
        |ms| reg.sites().report(&cafe, SiteReport::default(), at(ms), ttl).expect("report");
    let mut w = reg.watch(None).expect("from now");
    let (before, commits) = (reg.now(), reg.commits());
    report(1_000);
    report(5_000);
    assert!(reg.sites().silent(&cafe, at(9_000)));
    assert!(!reg.sites().silent(&cafe, at(9_500)), "it is known");
    report(10_000);
    reg.sites().lapsed(&cafe, at(20_000));
    reg.sites().lapsed(&cafe, at(25_001));
    report(26_000);
    assert_eq!(reg.commits(), commits, "none of this is written");
    reg.sites().away(&cafe).expect("away");
    reg.sites().revoke(&cafe).expect("revoke");
    let events = all(&mut w);
    assert_eq!(
        summaries(&events),
        [
            ("site", "cafe", "unreachable", "ready"),
            ("site", "cafe", "ready", "unreachable"),
            ("site", "cafe", "unreachable", "ready"),
            ("site", "cafe", "ready", "unreachable"),
            ("site", "cafe", "unreachable", "ready"),
            ("site", "cafe", "ready", "unreachable"),
            ("site", "cafe", "joined", "revoked"),
        ]
    );
    assert_eq!(events[5].id.revision(), before.revision(), "they take no number of the file's");
    // From each of them one can go on.
    for (i, e) in events.iter().enumerate() {
        let id = e.id.to_string().parse().expect("the id is read as it is written");
        assert_eq!(all(&mut reg.watch(Some(id)).expect("kept")), &events[i + 1..]);
    }
}

#[tokio::test]
async fn a_slow_watcher_delays_nobody_and_learns_that_it_lost_something() {
    let (_d, reg) = open();
    let v = vm("a");
    reg.vm_add(&v, None).expect("add");
    let mut slow = reg.watch(None).expect("from now");
    let gone = reg.watch(None).expect("from now");
    let first = reg.now();
    let cafe = name("cafe");
    for i in 0..feed::KEPT / 2 {
        let state = [SiteState::Ready, SiteState::Unreachable][i % 2];
        reg.file.feed().site(&cafe, state);
    }
    drop(gone);
    assert!(slow.read().expect("not yet").is_some());
    for _ in 0..feed::KEPT {
        reg.file.feed().site(&cafe, SiteState::Ready);
    }
    let lost = slow.next().await.expect_err("it has missed some");
    assert_eq!(lost.now, reg.now());
    assert_eq!(reg.watch(Some(first)).expect_err("long ago"), lost);
    // It goes on from now, and hears what comes.
    let next = tokio::spawn(async move { slow.next().await });
    run_on(&reg, &v, VmState::Running);
    let event = next.await.expect("joined").expect("kept");
    assert_eq!(event.what.new.as_ref().expect("there").state, "running");
}

#[test]
fn large_records_are_not_kept_without_bound() {
    let (_d, reg) = open();
    let mut w = reg.watch(None).expect("from now");
    for i in 0..20 {
        let large = VmRecord { reason: Some("x".repeat(1 << 20)), ..vm(&format!("vm-{i}")) };
        reg.vm_add(&large, None).expect("add");
    }
    assert!(w.read().is_err(), "the first went");
    let kept = (1..=20).filter(|r| {
        let id = format!("{}-{r}", &reg.now().to_string()[..16]).parse().expect("id");
        reg.watch(Some(id)).is_ok()
    });
    assert_eq!(kept.collect::<Vec<_>>(), (5..=20).collect::<Vec<_>>());
}

#[test]
fn an_id_that_is_none_of_this_registry_is_forgotten() {
    let (_d, reg) = open();
    let (_e, other) = open();
    other.vm_add(&vm("b"), None).expect("add");
    reg.vm_add(&vm("a"), None).expect("add");
    assert_eq!(reg.watch(Some(other.now())).expect_err("another's"), Forgotten { now: reg.now() });
    let ahead = reg.now().to_string().replace("-1", "-2").parse().expect("id");
    assert!(reg.watch(Some(ahead)).is_err(), "it was not yet");
    for bad in ["", "1", "-1", "0000000000000001", "000000000000000g-1", "0000000000000001-1-7"] {
        assert_eq!(bad.parse::<EventId>(), Err(NoEventId), "{bad}");
    }
}

/// Lists, follows from what the list said, and ends with what there is.
#[test]
fn who_lists_and_then_follows_misses_nothing_while_others_write() {
    let (_d, reg) = open();
    let reg = Arc::new(reg);
    let writers: Vec<_> = (0..4)
        .map(|w| {
            let reg = reg.clone();
            std::thread::spawn(move || {
                for i in 0..30 {
                    let v = vm(&format!("vm-{w}-{i}"));
                    reg.vm_add(&v, None).expect("add");
                    run_on(&reg, &v, VmState::Running);
                    if i % 3 == 0 {
                        reg.vm_remove(v.id, v.generation).expect("remove");
                    }
                }
            })
        })
        .collect();
    let mut followers = Vec::new();
    while !writers.iter().all(std::thread::JoinHandle::is_finished) {
        let now = reg.now();
        let list = reg.vms().expect("list");
        let known: BTreeMap<_, _> = list.into_iter().map(|v| (v.id.to_string(), v)).collect();
        followers.push((known, reg.watch(Some(now)).expect("kept")));
    }
    writers.into_iter().for_each(|w| w.join().expect("writes"));
    let end: BTreeMap<_, _> =
        reg.vms().expect("list").into_iter().map(|v| (v.id.to_string(), v)).collect();
    assert_eq!(end.len(), 80);
    assert!(followers.len() > 3, "{}", followers.len());
    for (mut known, mut w) in followers {
        for e in all(&mut w) {
            match &e.what.object {
                Some(Object::Vm(v)) => known.insert(e.what.key.clone(), VmRecord::clone(v)),
                _ => known.remove(&e.what.key),
            };
        }
        assert_eq!(known, end);
    }
}

#[test]
fn a_registry_that_is_opened_again_goes_on_where_it_was() {
    let (dir, reg) = open();
    let path = dir.path().join("r.redb");
    reg.sites().put(&site("cafe")).expect("put");
    let (a, b) = (vm("a"), vm("b"));
    reg.vm_add(&a, None).expect("add");
    let read = reg.now();
    run_on(&reg, &a, VmState::Running);
    reg.vm_add(&b, None).expect("add");
    run_on(&reg, &a, VmState::Stopped);
    reg.vm_remove(b.id, b.generation).expect("remove");
    let before = all(&mut reg.watch(Some(read)).expect("kept"));
    let unwritten = {
        reg.file.feed().site(&name("cafe"), SiteState::Ready);
        reg.now()
    };
    drop(reg);

    for round in 0..3 {
        let reg = Registry::open(&path).expect("opens again");
        let after = all(&mut reg.watch(Some(read)).expect("known"));
        let expected: Vec<_> = summaries(&before)
            .into_iter()
            .chain([("site", "cafe", "ready", "unreachable")])
            .collect();
        assert_eq!(summaries(&after), expected, "also that no site has reported yet");
        let ids = |events: &[Arc<Event>]| events.iter().map(|e| e.id).collect::<Vec<_>>();
        assert_eq!(ids(&after[..before.len()]), ids(&before));
        let objects: Vec<_> = after.iter().map(|e| e.what.object.is_some()).collect();
        assert_eq!(objects, [false, false, true, false, false], "as far as it is known still");
        // Of what was in memory only the states of now are told.
        let rest = all(&mut reg.watch(Some(unwritten)).expect("known"));
        assert_eq!(summaries(&rest), [("site", "cafe", "ready", "unreachable")], "{round}");
        assert_eq!(reg.now().revision(), before.last().expect("some").id.revision());
    }
    let reg = Registry::open(&path).expect("opens again");
    reg.vm_add(&b, None).expect("add");
    let last = before.last().expect("some").id;
    assert_eq!(reg.now().revision(), last.revision() + 1, "no number comes twice");
    assert_ne!(reg.now().to_string()[..16], last.to_string()[..16], "a run has its own epoch");
    let rest = all(&mut reg.watch(Some(last)).expect("known"));
    assert_eq!(summaries(&rest).last(), Some(&("vm", "b", "-", "starting")));
}

#[test]
fn a_registry_that_was_brought_back_does_not_take_another_history_for_its_own() {
    let (dir, reg) = open();
    let path = dir.path().join("r.redb");
    let copy = dir.path().join("copy.redb");
    reg.vm_add(&vm("before"), None).expect("add");
    let shared = reg.now();
    drop(reg);
    std::fs::copy(&path, &copy).expect("copy");
    std::fs::copy(path.with_extension("mark"), copy.with_extension("mark")).expect("copy");
    // The same run of the center, and a later one, go on from there.
    let mut lost = Vec::new();
    for n in ["x", "y"] {
        let reg = Registry::open(&path).expect("open");
        reg.vm_add(&vm(n), None).expect("add");
        lost.push(reg.now());
    }
    // The copy comes to the same numbers, and past them.
    let reg = Registry::open(&copy).expect("open");
    assert_eq!(summaries(&all(&mut reg.watch(Some(shared)).expect("before the copy"))), []);
    for n in ["p", "q", "r"] {
        for id in &lost {
            assert!(reg.watch(Some(*id)).is_err(), "{id} is of another history");
        }
        reg.vm_add(&vm(n), None).expect("add");
    }
    let rest = all(&mut reg.watch(Some(shared)).expect("before the copy"));
    let names: Vec<_> = rest.iter().map(|e| e.what.name.as_str()).collect();
    assert_eq!(names, ["p", "q", "r"]);
}

#[test]
fn a_copy_from_the_midst_of_a_run_does_not_know_how_that_went_on() {
    let (dir, reg) = open();
    let path = dir.path().join("r.redb");
    let copy = dir.path().join("copy.redb");
    reg.vm_add(&vm("before"), None).expect("add");
    let shared = reg.now();
    std::fs::copy(&path, &copy).expect("copy");
    reg.vm_add(&vm("x"), None).expect("add");
    let lost = reg.now();
    let reg = Registry::open(&copy).expect("open");
    for n in ["p", "q"] {
        assert!(reg.watch(Some(lost)).is_err(), "the number is not reached, then another's");
        reg.vm_add(&vm(n), None).expect("add");
    }
    assert_eq!(all(&mut reg.watch(Some(shared)).expect("known")).len(), 2);
}

#[test]
fn a_version_without_a_feed_in_between_ends_the_history() {
    let (dir, reg) = open();
    let path = dir.path().join("r.redb");
    reg.vm_add(&vm("a"), None).expect("add");
    let read = reg.now();
    drop(reg);
    // It counts its transactions and knows nothing else.
    let db = redb::Database::create(&path).expect("open");
    let tx = db.begin_write().expect("write");
    file::count(&tx).expect("count");
    tx.commit().expect("commit");
    drop(db);
    let reg = Registry::open(&path).expect("open");
    assert!(reg.watch(Some(read)).is_err(), "it may have changed anything");
    let now = reg.now();
    reg.vm_add(&vm("b"), None).expect("add");
    assert_eq!(all(&mut reg.watch(Some(now)).expect("known")).len(), 1);
    assert!(reg.now().revision() > read.revision());
}
