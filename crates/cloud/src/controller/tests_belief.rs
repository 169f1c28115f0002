//! What the center believes of a site: copies of deleted machines, lies, void warrants, unchanged lists.

use std::sync::Arc;

use godwit_site::SubstrateInfo;
use godwit_types::{
    Arch, Code, Generation, Hash, Mib, OpState, SiteKind, SubstrateId, SubstrateKind, VmState,
};

use super::tests::*;
use super::*;
use crate::registry::VmRecord;

/// A substrate that a site says to have.
pub(super) fn docked(n: usize) -> SubstrateInfo {
    SubstrateInfo {
        id: SubstrateId::new(),
        name: name(&format!("s-{n}")),
        kind: SubstrateKind::Restricted,
        owner: name("operator"),
        image: name("tiny"),
        arch: Arch::X86_64,
        memory: Mib(128),
        vcpus: 1,
        raw_bytes: 1,
        stored_bytes: 1,
        created: UnixMs::now(),
        content: Hash::of(&n.to_le_bytes()),
        dock: None,
    }
}

async fn delete(w: &World, n: &str) {
    let op = w.c.delete(&me(), n, Mode::Act).expect("accepted").op.expect("op");
    assert_eq!(w.c.ops().wait(op).await.expect("ends").state, OpState::Done);
}

#[tokio::test]
async fn a_machine_that_was_deleted_ends_at_a_site_that_was_away() {
    let w = world(Send::Works).await;
    let vm = running(&w, "a").await;
    let (center, cafe): (Arc<dyn SiteHost>, Arc<dyn SiteHost>) = (w.center.clone(), w.cafe.clone());
    // What a move left there: of an older generation, or of one that the center never saw run.
    for generation in [Generation(1), vm.generation.next()] {
        let n = format!("m{generation}");
        let vm = running(&w, &n).await;
        w.c.detach(&cafe);
        let mut left = w.cafe.status(vm.id, &vm.name, generation);
        left.state = VmState::Stopped;
        w.cafe.machines.lock().expect("lock").push(left);
        delete(&w, &n).await;
        w.c.refresh(&center).await.expect("report");
        assert_eq!(w.c.registry().deleted_count(), 1, "the other site may have it");
        w.c.attach(cafe.clone(), SiteKind::Ap).await.expect("back");
        assert!(w.cafe.all().is_empty(), "it lives on");
        w.c.refresh(&cafe).await.expect("report");
        w.c.refresh(&center).await.expect("report");
        assert_eq!(w.c.registry().deleted_count(), 0, "every site has been seen without it");
    }
    // One that the center knows nothing of may be newer than its registry.
    w.cafe.machines.lock().expect("lock").push(w.cafe.status(
        godwit_types::VmId::new(),
        &name("unknown"),
        Generation(3),
    ));
    w.c.refresh(&cafe).await.expect("report");
    assert_eq!(w.cafe.all().len(), 1);
}

#[tokio::test]
async fn a_site_that_was_away_keeps_nothing_of_a_machine_that_was_deleted() {
    let w = world(Send::Works).await;
    let (gone, stays) = (running(&w, "a").await, running(&w, "b").await);
    let (center, cafe): (Arc<dyn SiteHost>, Arc<dyn SiteHost>) = (w.center.clone(), w.cafe.clone());
    w.c.refresh(&cafe).await.expect("report");
    w.c.detach(&cafe);
    w.cafe.visits.lock().expect("lock").extend([gone.id, stays.id]);
    delete(&w, "a").await;
    w.c.refresh(&center).await.expect("report");
    // It has the machines that it had, and says nothing else of them.
    w.c.attach(cafe.clone(), SiteKind::Ap).await.expect("back");
    assert_eq!(*w.cafe.visits.lock().expect("lock"), [stays.id]);
    w.c.refresh(&cafe).await.expect("report");
    w.c.refresh(&center).await.expect("report");
    assert_eq!(w.c.registry().deleted_count(), 0, "every site has been seen without it");
}

/// A site says that it holds a substrate, and what it holds is another: the center does not count it
/// among the holders, neither by its report nor by its list, and nothing is brought from it.
#[tokio::test]
async fn a_site_that_lies_about_what_a_substrate_is_holds_none() {
    let w = world(Send::Works).await;
    let (center, cafe): (Arc<dyn SiteHost>, Arc<dyn SiteHost>) = (w.center.clone(), w.cafe.clone());
    let true_one = docked(1);
    w.center.substrates.lock().expect("lock").push(true_one.clone());
    w.c.refresh(&center).await.expect("report");
    let lie = SubstrateInfo { content: godwit_types::Hash::of(b"a lie"), ..true_one.clone() };
    w.cafe.substrates.lock().expect("lock").push(lie);
    for _ in 0..2 {
        w.c.refresh(&cafe).await.expect("report");
        let s = w.c.registry().substrate(true_one.name.as_str()).expect("there");
        assert_eq!(s.holders, [name("center")].into(), "it is believed");
        assert_eq!(s.content, Some(true_one.content));
        let there = w.c.registry().sites().get(&name("cafe")).expect("there").report.substrates;
        assert!(there.is_empty(), "{there:?}");
    }
    // One that tells the truth is a holder.
    *w.cafe.substrates.lock().expect("lock") = vec![true_one.clone()];
    w.c.refresh(&cafe).await.expect("report");
    let s = w.c.registry().substrate(true_one.name.as_str()).expect("there");
    assert_eq!(s.holders, [name("cafe"), name("center")].into());
}

#[tokio::test]
async fn a_generation_whose_warrant_was_made_void_is_never_given_out_again() {
    let w = world(Send::FailsBefore).await;
    let vm = running(&w, "a").await;
    for generation in [2, 3] {
        let op =
            w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
        assert_eq!(w.c.ops().wait(op).await.expect("ends").state, OpState::Failed);
        let now = w.c.registry().vm("a").expect("there");
        assert_eq!(now.generation, vm.generation);
        assert_eq!(now.voided[&name("cafe")], Generation(generation));
    }
    for how in [true, false] {
        let op = match how {
            true => w.c.stop(&me(), "a", true, Mode::Act),
            false => w.c.start(&me(), "a", Mode::Act),
        };
        let _ = w.c.ops().wait(op.expect("accepted").op.expect("op")).await.expect("ends");
    }
    let now = w.c.registry().vm("a").expect("there");
    assert_eq!((now.generation, now.voided.len()), (Generation(4), 0));
}

#[tokio::test]
async fn what_a_site_runs_is_asked_for_only_when_something_has_changed() {
    let w = world(Send::Works).await;
    let vm = running(&w, "a").await;
    let center: Arc<dyn SiteHost> = w.center.clone();
    let asked = || w.center.asked.load(std::sync::atomic::Ordering::SeqCst);
    w.c.refresh(&center).await.expect("report");
    let before = asked();
    for _ in 0..10 {
        w.c.refresh(&center).await.expect("report");
    }
    assert_eq!(asked(), before, "nothing had changed");
    // At the site.
    w.center.machines.lock().expect("lock")[0].state = VmState::Stopped;
    w.c.refresh(&center).await.expect("report");
    assert_eq!(w.c.registry().vm("a").expect("there").state, VmState::Stopped);
    // In the registry.
    w.c.refresh(&center).await.expect("report");
    let before = asked();
    let change = |v: &mut VmRecord| {
        v.state = VmState::Running;
        Ok(())
    };
    w.c.registry().vm_update(vm.id, vm.generation, change).expect("written");
    w.c.refresh(&center).await.expect("report");
    assert!(asked() > before);
    assert_eq!(w.c.registry().vm("a").expect("there").state, VmState::Stopped);
    // One that the registry does not have there is looked at each time.
    let other = w.center.status(godwit_types::VmId::new(), &name("b"), Generation(1));
    w.center.machines.lock().expect("lock").push(other);
    for _ in 0..3 {
        let before = asked();
        w.c.refresh(&center).await.expect("report");
        assert!(asked() > before);
    }
}

#[tokio::test]
async fn a_warrant_of_a_move_that_never_switched_is_void() {
    let w = world(Send::FailsBefore).await;
    let vm = running(&w, "a").await;
    let (center, cafe): (Arc<dyn SiteHost>, Arc<dyn SiteHost>) = (w.center.clone(), w.cafe.clone());
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    assert_eq!(w.c.ops().wait(op).await.expect("ends").failure(), Some(Code::Unavailable));
    // The site that was to have it has kept what it was given.
    w.cafe.machines.lock().expect("lock").push(warranted(&w, &vm, vm.generation.next()));
    w.c.refresh(&cafe).await.expect("report");
    w.c.refresh(&center).await.expect("report");
    let now = w.c.registry().vm("a").expect("there");
    assert_eq!((now.site.as_str(), now.generation), ("center", vm.generation));
    assert_eq!(w.center.all().len(), 1, "the true one lives");
}

#[tokio::test]
async fn a_switch_to_another_generation_than_was_asked_for_is_not_believed() {
    let w = world(Send::TellsOfAnother).await;
    running(&w, "a").await;
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    assert_eq!(w.c.ops().wait(op).await.expect("ends").failure(), Some(Code::Unavailable));
    runs_on_at_its_source(&w);
}

/// Two sites may dock under one name at the same time: both substrates are there, and neither site
/// is lost over it.
#[tokio::test]
async fn two_substrates_of_one_name_cost_no_site_its_report() {
    let w = world(Send::Works).await;
    let center: Arc<dyn SiteHost> = w.center.clone();
    let (first, second) = (docked(1), docked(2));
    let second = SubstrateInfo { name: first.name.clone(), ..second };
    w.center.substrates.lock().expect("lock").extend([first.clone(), second.clone()]);
    for _ in 0..2 {
        w.c.refresh(&center).await.expect("report");
    }
    let named = |id: godwit_types::SubstrateId| {
        w.c.registry().substrate(&id.to_string()).expect("there").name
    };
    assert_eq!(named(first.id), first.name);
    let other = named(second.id);
    assert!(other.as_str().starts_with(&format!("{}-", first.name)), "{other}");
    let site = w.c.registry().sites().get(&name("center")).expect("there");
    assert_eq!(site.report.substrates, [first.id, second.id].into());
}

#[tokio::test]
async fn a_site_publishes_nothing_that_it_was_not_asked_to_hold() {
    let w = world(Send::Works).await;
    let own = |n: &str| SubstrateInfo { name: name(n), kind: SubstrateKind::Public, ..docked(1) };
    let (center, cafe): (Arc<dyn SiteHost>, Arc<dyn SiteHost>) = (w.center.clone(), w.cafe.clone());
    w.cafe.substrates.lock().expect("lock").push(own("abiword"));
    w.c.refresh(&cafe).await.expect("report");
    assert!(w.c.registry().substrates().expect("list").is_empty(), "taken for a user's own");
    // What the center's own site holds is the center's own word.
    w.center.substrates.lock().expect("lock").push(own("abiword"));
    w.c.refresh(&center).await.expect("report");
    let all = w.c.registry().substrates().expect("list");
    assert_eq!((all.len(), all[0].holders.contains(&name("center"))), (1, true));
}
