//! A migration that breaks beyond its switch: what the center has the sites do, and what it says.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use godwit_site::{MemoryStatus, MoveStatus};
use godwit_types::{Code, Generation, OpState, SiteKind, VmState};

use super::tests::*;
use super::*;

const fn status(memory: MemoryStatus, missing_blocks: Option<u64>, over: bool) -> MoveStatus {
    MoveStatus { memory, missing_pages: 0, missing_blocks, runs: true, over, why: None }
}

/// A move that breaks off beyond its switch and does not come to a good end: the class of the failure
/// and what is said of the machine.
async fn lost(w: &World) -> (Option<Code>, String) {
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    let end = w.c.ops().wait(op).await.expect("ends");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Failed, "cafe"));
    (end.failure(), vm.reason.expect("a reason"))
}

#[tokio::test]
async fn the_disk_of_a_machine_that_ended_at_its_destination_is_brought_alone() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.cafe.says.lock().expect("lock") = Some(Ok(status(MemoryStatus::Gone, Some(3), false)));
    let (code, why) = lost(&w).await;
    assert_eq!(code, Some(Code::Damaged));
    assert!(why.contains("ended at 'cafe' before it needed 'center' no more"), "{why}");
    assert_eq!(*w.cafe.resumed.lock().expect("lock"), [false], "its disk, and no memory");
    assert!(!w.center.all().is_empty(), "released before the disk is whole");
}

#[tokio::test]
async fn a_disk_is_not_brought_of_a_source_whose_machine_has_run_on() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    let ran_on = MoveStatus {
        why: Some("it has run there after it had left".into()),
        ..status(MemoryStatus::Gone, None, true)
    };
    *w.center.says.lock().expect("lock") = Some(Ok(ran_on));
    *w.cafe.says.lock().expect("lock") = Some(Ok(status(MemoryStatus::Whole, Some(3), false)));
    let (code, why) = lost(&w).await;
    assert_eq!(code, Some(Code::Damaged));
    let words = "lacks no memory and 3 blocks (12 KiB) of its disk, which cannot be had of \
                 'center': it has run there after it had left";
    assert!(why.contains(words), "{why}");
    assert!(w.cafe.resumed.lock().expect("lock").is_empty());
}

#[tokio::test]
async fn a_destination_that_knows_nothing_of_its_machine_costs_the_source_nothing() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.cafe.says.lock().expect("lock") = Some(Err(Fault::not_found("no machine of that id")));
    let (code, why) = lost(&w).await;
    assert_eq!(code, Some(Code::Damaged));
    assert!(why.contains("'center' keeps what it left with"), "{why}");
    assert!(!w.center.all().is_empty());
}

#[tokio::test]
async fn a_move_broken_after_the_switch_goes_on() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    let end = w.c.ops().wait(op).await.expect("ends");
    assert_eq!(end.state, OpState::Done, "{end:?}");
    assert!(end.progress.iter().any(|p| p.stage == "recovering"), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!(
        (vm.state, vm.site.as_str(), vm.generation, vm.arriving),
        (VmState::Running, "cafe", Generation(2), None)
    );
    assert!(w.center.all().is_empty(), "the source keeps nothing");
}

#[tokio::test]
async fn a_source_that_is_gone_is_reported_with_what_it_had() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    w.center.gone.store(true, SeqCst);
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    let end = w.c.ops().wait(op).await.expect("ends");
    assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Failed, "cafe"));
    let why = vm.reason.expect("a reason");
    assert!(why.contains("lost 10 pages (40 KiB) of its memory with 'center'"), "{why}");
    assert!(why.ends_with("its disk is whole"), "{why}");
}

#[tokio::test]
async fn a_source_that_stays_away_is_waited_for_and_may_be_asked_again() {
    let w = world_with(Send::BreaksAfter, Duration::from_millis(600)).await;
    running(&w, "a").await;
    w.center.silent.store(true, SeqCst);
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    let mut seen = w.c.ops().watch(op).expect("watch");
    let center: Arc<dyn SiteHost> = w.center.clone();
    seen.wait_for(|o| o.progress.iter().any(|p| p.stage == "recovering")).await.expect("broken");
    w.c.detach(&center);
    let waits = |o: &crate::registry::OpRecord| {
        o.progress.iter().any(|p| p.note.contains("waiting for site 'center'"))
    };
    seen.wait_for(waits).await.expect("waits");
    let end = w.c.ops().wait(op).await.expect("ends");
    assert_eq!(end.failure(), Some(Code::Unavailable), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Failed, "cafe"));
    let why = vm.reason.expect("a reason");
    assert!(why.contains("10 pages (40 KiB) of its memory and nothing of its disk"), "{why}");
    let e = w.c.moves.migrate(&me(), "a", to("center"), Mode::Act).expect_err("not whole");
    assert!(e.message.contains("part of it is at 'center'"), "{e}");
    for force in [false, true] {
        let e = w.c.stop(&me(), "a", force, Mode::Act).expect_err("not whole");
        assert!(e.message.contains("is failed at 'cafe', and part of it is at 'center'"), "{e}");
        let out = "bring the rest: godwit vm migrate a; or give it up: godwit vm delete a";
        assert_eq!(e.hint.as_deref(), Some(out));
    }

    w.center.silent.store(false, SeqCst);
    w.c.attach(center, SiteKind::Center).await.expect("back");
    let again = MigrateVm { to: None, scheme: None };
    let op = w.c.moves.migrate(&me(), "a", again, Mode::Act).expect("accepted").op.expect("op");
    let end = w.c.ops().wait(op).await.expect("ends");
    assert_eq!(end.state, OpState::Done, "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.arriving), (VmState::Running, None));
}

#[tokio::test]
async fn a_stop_leads_out_of_what_was_left_behind_and_else_says_what_does() {
    let w = world(Send::Works).await;
    running(&w, "a").await;
    let vm = w.c.registry().vm("a").expect("there");
    let stop = |force| w.c.stop(&me(), "a", force, Mode::Act);
    for state in [VmState::Failed, VmState::Starting] {
        w.c.warrants
            .change_vm(&vm, vm.generation, |v| {
                v.state = state;
                Ok(())
            })
            .expect("changed");
        let hint = stop(false).expect_err("it does not run").hint.expect("a hint");
        assert!(hint.contains("godwit vm delete a"), "{state}: {hint}");
    }
    // One that has just begun is not left behind yet.
    assert_eq!(stop(true).expect_err("too early").code, Code::Conflict);
    // No operation works on it, for longer than one takes to begin: its site ends what there is.
    w.c.warrants
        .change_vm(&w.c.registry().vm("a").expect("there"), vm.generation, |v| {
            v.changed = UnixMs(v.changed.0 - 31_000);
            Ok(())
        })
        .expect("changed");
    let op = stop(true).expect("accepted").op.expect("op");
    assert_eq!(w.c.ops().wait(op).await.expect("ends").state, OpState::Done);
    assert_eq!(w.c.registry().vm("a").expect("there").state, VmState::Stopped);
}
