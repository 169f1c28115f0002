//! A machine that dies at its destination before all of it is there.

use std::sync::Mutex;

use godwit_site::verbs::{MigrateFell, MigrateTakeBack};
use godwit_site::{Fell, MemoryStatus, MoveStatus, SiteReply, SiteRequest};
use godwit_types::{Code, Fault, Generation, VmState};

use super::back::{Stays, may_return};
use super::tests::*;
use super::*;

/// What a site on paper says and was asked of a machine that goes back.
#[derive(Default)]
pub(super) struct Back {
    /// Refuses to give a machine up, or to take it back; each answers once.
    refuses: Mutex<Vec<Fault>>,
    /// The generations under which it was asked to give a machine up, or to run it on.
    asked: Mutex<Vec<Generation>>,
}

impl Paper {
    pub(super) fn goes_back(&self, request: SiteRequest) -> Result<SiteReply, Fault> {
        let refused = self.back.refuses.lock().expect("lock").pop();
        match request {
            SiteRequest::MigrateFell(MigrateFell { generation, .. }) => {
                self.back.asked.lock().expect("lock").push(generation);
                let fell =
                    Fell { why: "its QEMU was ended by signal 9".into(), ran_ms: Some(3210) };
                refused.map_or(Ok(SiteReply::Fell(fell)), Err)
            }
            SiteRequest::MigrateTakeBack(MigrateTakeBack { vm, generation, warrant, .. }) => {
                assert!(warrant.is_for(vm, generation, &self.name));
                self.back.asked.lock().expect("lock").push(generation);
                if let Some(f) = refused {
                    return Err(f);
                }
                for m in self.machines.lock().expect("lock").iter_mut().filter(|m| m.vm == vm) {
                    (m.state, m.generation) = (VmState::Running, generation);
                }
                Ok(SiteReply::Done(()))
            }
            other => Err(Fault::invalid(format!("'{}' is no way back", other.name()))),
        }
    }
}

const fn status(memory: MemoryStatus, missing_pages: u64) -> MoveStatus {
    // Also of a machine without a disk, or whose disk is there already.
    let missing_blocks = Some(0);
    MoveStatus { memory, missing_pages, missing_blocks, runs: true, over: false, why: None }
}

#[test]
fn only_what_is_dead_and_lacks_memory_that_its_source_has_goes_back() {
    use MemoryStatus::{Gone, Partial, Whole};
    let (old, new) = (5, 6);
    let over = MoveStatus { over: true, ..status(Partial, 0) };
    let never = MoveStatus { runs: false, ..status(Gone, 9) };
    for (here, there, speaks, due) in [
        (status(Gone, 9), status(Partial, 0), new, Ok(())),
        (status(Gone, 9), status(Whole, 0), new, Ok(())),
        (status(Partial, 9), status(Partial, 0), new, Err(Stays::Lives)),
        (status(Whole, 0), status(Partial, 0), new, Err(Stays::Lives)),
        (never, status(Partial, 0), new, Err(Stays::NeverRan)),
        (status(Gone, 0), status(Whole, 0), new, Err(Stays::Independent)),
        (status(Gone, 9), status(Gone, 0), new, Err(Stays::SourceGone)),
        (status(Gone, 9), over, new, Err(Stays::SourceGone)),
        (status(Gone, 9), status(Partial, 0), old, Err(Stays::TooOld)),
    ] {
        assert_eq!(may_return(&here, &there, speaks), due, "{here:?} {there:?} {speaks}");
    }
}

/// A move whose machine dies at the destination; how its operation ends.
async fn dies(w: &World) -> crate::registry::OpRecord {
    *w.cafe.says.lock().expect("lock") = Some(Ok(status(MemoryStatus::Gone, 9)));
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    w.c.ops().wait(op).await.expect("ends")
}

fn asked(paper: &Paper) -> Vec<u64> {
    paper.back.asked.lock().expect("lock").iter().map(|g| g.0).collect()
}

#[tokio::test]
async fn a_machine_that_dies_at_its_destination_runs_on_at_its_source() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    let end = dies(&w).await;
    assert_eq!(end.failure(), Some(Code::Unavailable), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    let at = (vm.state, vm.site.as_str(), vm.generation, &vm.arriving, &vm.returning);
    assert_eq!(at, (VmState::Running, "center", Generation(3), &None, &None));
    let words = "died at 'cafe' before all of its memory was there (its QEMU was ended by signal 9), \
                 and runs on at 'center' as it left: up to 3.3 s of its work and all that it wrote to \
                 its disk meanwhile are undone";
    assert_eq!(vm.reason.as_deref(), Some(words));
    assert_eq!((asked(&w.cafe), asked(&w.center)), (vec![2], vec![3]));
    assert!(w.cafe.all().is_empty(), "nothing is left where it died");
    assert!(w.cafe.resumed.lock().expect("lock").is_empty());
}

#[tokio::test]
async fn a_destination_that_keeps_its_machine_is_believed() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    w.cafe.back.refuses.lock().expect("lock").push(Fault::conflict("its guest is off"));
    let end = dies(&w).await;
    assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.site.as_str(), vm.generation), ("cafe", Generation(2)));
    assert!(asked(&w.center).is_empty());
}

#[tokio::test]
async fn a_source_that_does_not_answer_at_once_is_asked_again() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    w.center.back.refuses.lock().expect("lock").push(Fault::unavailable("not yet"));
    dies(&w).await;
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "center"));
    assert_eq!(asked(&w.center), [3, 3], "under the same generation");
}

#[tokio::test]
async fn a_machine_that_is_dead_at_both_ends_is_started_from_its_disk_at_its_source() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    let dead = Fault::new(Code::Damaged, "cannot be brought back: its QEMU is gone");
    w.center.back.refuses.lock().expect("lock").push(dead);
    let end = dies(&w).await;
    assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Failed, "center"));
    assert_eq!(vm.returning, None);
    assert!(vm.reason.expect("a reason").contains("its QEMU is gone"));
    assert!(w.cafe.all().is_empty());
}

#[tokio::test]
async fn a_source_that_stays_away_is_asked_again_on_request_and_by_the_next_center() {
    let w = world_with(Send::BreaksAfter, Duration::ZERO).await;
    let before = running(&w, "a").await;
    w.center.back.refuses.lock().expect("lock").push(Fault::unavailable("away"));
    dies(&w).await;
    let vm = w.c.registry().vm("a").expect("there");
    let back = vm.returning.clone().expect("a way back");
    assert_eq!(
        (vm.state, vm.generation, back.from.as_str()),
        (VmState::Failed, Generation(3), "cafe")
    );
    let e = w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect_err("not yet");
    assert_eq!(e.code, Code::Conflict, "{e}");
    let again = MigrateVm { to: None, scheme: None };
    let op = w.c.moves.migrate(&me(), "a", again, Mode::Act).expect("accepted").op.expect("op");
    w.c.ops().wait(op).await.expect("ends");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.id, vm.returning), (VmState::Running, before.id, None));
}
