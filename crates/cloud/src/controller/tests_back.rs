//! A machine that dies at its destination before all of it is there.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use godwit_site::verbs::{MigrateFell, MigrateTakeBack, VmStart};
use godwit_site::{Fell, MemoryStatus, MoveStatus, SiteReply, SiteRequest, TookBack};
use godwit_types::{Code, Fault, Generation, OpState, VmState};

use super::back::{Stays, may_return};
use super::tests::*;
use super::*;
use crate::registry::{StepKind, VmRecord};

/// What a site on paper says and was asked of a machine that goes back.
#[derive(Default)]
pub(super) struct Back {
    /// Refuses to give a machine up, or to take it back; each answers once.
    refuses: Mutex<Vec<Fault>>,
    /// The generations under which it was asked to give a machine up, or to run it on.
    asked: Mutex<Vec<Generation>>,
    /// What it says when it is told that what is missing is not waited for.
    on_give_up: Mutex<Option<Fault>>,
    /// How often it was told.
    given_up: AtomicUsize,
    /// How its QEMU died that would have to be taken back, if it did.
    dead: Mutex<Option<String>>,
}

impl Paper {
    pub(super) fn goes_back(&self, request: SiteRequest) -> Result<SiteReply, Fault> {
        if let SiteRequest::MigrateGiveUp(_) = request {
            self.back.given_up.fetch_add(1, SeqCst);
            let says = self.back.on_give_up.lock().expect("lock").clone();
            return says.map_or(Ok(SiteReply::Done(())), Err);
        }
        if let SiteRequest::VmStart(VmStart { vm, generation, .. }) = request {
            let mut all = self.machines.lock().expect("lock");
            let Some(m) = all.iter_mut().find(|m| m.vm == vm) else {
                return Err(Fault::not_found("not on paper"));
            };
            (m.state, m.generation) = (VmState::Running, generation);
            return Ok(SiteReply::Machine(m.clone()));
        }
        let goes_back =
            matches!(request, SiteRequest::MigrateFell(_) | SiteRequest::MigrateTakeBack(_));
        let refused = goes_back.then(|| self.back.refuses.lock().expect("lock").pop()).flatten();
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
                if let Some(why) = self.back.dead.lock().expect("lock").clone() {
                    return Ok(SiteReply::TookBack(TookBack::Never { why }));
                }
                for m in self.machines.lock().expect("lock").iter_mut().filter(|m| m.vm == vm) {
                    (m.state, m.generation) = (VmState::Running, generation);
                }
                Ok(SiteReply::TookBack(TookBack::Runs))
            }
            other => Err(Fault::invalid(format!("'{}' on paper", other.name()))),
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
    use MemoryStatus::{Fell, Gone, Partial, Whole};
    let (old, new) = (6, 7);
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
        (status(Gone, 9), over.clone(), new, Err(Stays::SourceGone)),
        (status(Gone, 9), status(Partial, 0), old, Err(Stays::TooOld)),
        (status(Fell, 1), status(Partial, 0), new, Ok(())),
        (status(Fell, 0), status(Whole, 0), new, Ok(())),
        (status(Fell, 1), status(Gone, 0), new, Err(Stays::SourceGone)),
        (status(Fell, 1), over, new, Err(Stays::SourceGone)),
    ] {
        assert_eq!(may_return(&here, &there, speaks), due, "{here:?} {there:?} {speaks}");
    }
}

/// A move whose machine dies at the destination; how its operation ends.
async fn dies(w: &World) -> crate::registry::OpRecord {
    dies_as(w, status(MemoryStatus::Gone, 9)).await
}

/// The same, where the destination says so much of it.
async fn dies_as(w: &World, says: MoveStatus) -> crate::registry::OpRecord {
    *w.cafe.says.lock().expect("lock") = Some(Ok(says));
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

/// Starts a machine; how that ends.
async fn starts(w: &World) -> VmRecord {
    let op = w.c.start(&me(), "a", Mode::Act).expect("accepted").op.expect("op");
    let end = w.c.ops().wait(op).await.expect("ends");
    assert_eq!(end.state, OpState::Done, "{end:?}");
    w.c.registry().vm("a").expect("there")
}

#[tokio::test]
async fn a_machine_that_is_dead_at_both_ends_is_started_from_its_disk_at_its_source() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.center.back.dead.lock().expect("lock") = Some("its QEMU is gone".into());
    let end = dies_as(&w, lacking(3)).await;
    assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Failed, "center"));
    assert!(vm.reason.clone().expect("a reason").contains("its QEMU is gone"));
    settles(&w).await;
    assert!(!w.cafe.all().is_empty(), "kept until it runs from the other disk");
    let vm = starts(&w).await;
    assert_eq!((vm.state, vm.site.as_str(), &vm.returning), (VmState::Running, "center", &None));
    assert_eq!((vm.reason, vm.generation), (None, Generation(4)), "nothing was brought back");
    assert!(w.cafe.all().is_empty());
}

/// What is said of a dead machine whose disk is not all there.
fn lacking(blocks: u64) -> MoveStatus {
    MoveStatus { missing_blocks: Some(blocks), ..status(MemoryStatus::Gone, 9) }
}

/// Both sites report.
async fn settles(w: &World) {
    for site in [&w.center, &w.cafe] {
        let host: Arc<dyn SiteHost> = site.clone();
        w.c.settler.settle_machines(&host, None, 0).await.expect("settled");
    }
}

#[tokio::test]
async fn a_machine_that_is_dead_at_both_ends_goes_on_from_the_whole_disk_where_it_died() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.center.back.dead.lock().expect("lock") = Some("its QEMU is gone".into());
    let end = dies(&w).await;
    assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    let at = (vm.state, vm.site.as_str(), vm.generation, &vm.returning);
    assert_eq!(at, (VmState::Failed, "cafe", Generation(4), &None));
    assert_eq!(vm.arriving.map(|a| a.from), Some(name("center")));
    assert_eq!(w.cafe.back.given_up.load(SeqCst), 1, "it may be started there");
    settles(&w).await;
    assert!(!w.center.all().is_empty(), "kept until it runs from the other disk");
    let vm = starts(&w).await;
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "cafe"));
    assert!(w.center.all().is_empty() && !w.cafe.all().is_empty());
}

#[tokio::test]
async fn a_machine_that_fell_and_whose_source_is_gone_is_started_from_its_disk() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    let over = MoveStatus { over: true, ..status(MemoryStatus::Gone, 0) };
    *w.center.says.lock().expect("lock") = Some(Ok(over));
    let end = dies_as(&w, status(MemoryStatus::Fell, 1)).await;
    assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Failed, "cafe"));
    assert!(asked(&w.cafe).is_empty() && asked(&w.center).is_empty(), "nobody can run it on");
    assert_eq!(w.cafe.back.given_up.load(SeqCst), 1);
    let vm = starts(&w).await;
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "cafe"));
}

#[tokio::test]
async fn a_machine_that_fell_is_given_back_also_by_a_center_that_did_not_hear_of_it() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    // Whatever is found of its memory now.
    dies_as(&w, status(MemoryStatus::Fell, 0)).await;
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "center"));
    assert_eq!((asked(&w.cafe), asked(&w.center)), (vec![2], vec![3]));
}

#[tokio::test]
async fn a_source_is_not_released_for_a_destination_that_refuses_to_be_started() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.cafe.back.on_give_up.lock().expect("lock") = Some(Fault::conflict("no such step"));
    dies_as(&w, status(MemoryStatus::Gone, 0)).await;
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Failed, "cafe"));
    assert!(vm.arriving.is_some() && !w.center.all().is_empty(), "its source has all of it");
}

#[tokio::test]
async fn a_destination_that_knows_of_a_newer_generation_has_its_disk_brought() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    let fenced = Fault::new(Code::Fenced, "it is at generation 3");
    w.cafe.back.refuses.lock().expect("lock").push(fenced);
    let end = dies_as(&w, lacking(3)).await;
    assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
    assert_eq!(*w.cafe.resumed.lock().expect("lock"), [false], "its disk, and no memory");
}

#[tokio::test]
async fn what_a_source_refuses_for_now_is_asked_again() {
    // Damaged: as of a stream or a message that does not parse.
    for code in [Code::Conflict, Code::Fenced, Code::Damaged] {
        let w = world(Send::BreaksAfter).await;
        running(&w, "a").await;
        w.center.back.refuses.lock().expect("lock").push(Fault::new(code, "not now"));
        dies(&w).await;
        let vm = w.c.registry().vm("a").expect("there");
        assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "center"), "{code:?}");
    }
}

#[tokio::test]
async fn a_machine_on_its_way_back_is_not_started_from_its_disk() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.center.back.refuses.lock().expect("lock") = vec![Fault::unavailable("not yet"); 3];
    let refused = async {
        while w.c.registry().vm("a").expect("there").returning.is_none() {
            tokio::task::yield_now().await;
        }
        let e = w.c.start(&me(), "a", Mode::Act).expect_err("it would end what it goes on with");
        assert_eq!(e.code, Code::Conflict, "{e}");
        let e = w.c.stop(&me(), "a", true, Mode::Act).expect_err("nothing runs");
        assert!(e.hint.is_some_and(|h| h.contains("godwit vm delete a")));
    };
    let (end, ()) = tokio::join!(dies(&w), refused);
    assert_eq!(end.failure(), Some(Code::Unavailable), "{end:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "center"));
}

#[tokio::test]
async fn a_machine_that_came_back_after_its_operation_gave_up_says_what_is_undone() {
    let w = world_with(Send::BreaksAfter, Duration::ZERO).await;
    let before = running(&w, "a").await;
    w.center.back.refuses.lock().expect("lock").push(Fault::unavailable("the answer is lost"));
    dies(&w).await;
    assert!(w.c.registry().vm("a").expect("there").returning.is_some());
    for m in w.center.machines.lock().expect("lock").iter_mut().filter(|m| m.vm == before.id) {
        (m.state, m.generation) = (VmState::Running, Generation(3));
    }
    settles(&w).await;
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str(), &vm.returning), (VmState::Running, "center", &None));
    assert!(vm.reason.is_some_and(|r| r.contains("are undone")));
    assert!(w.cafe.all().is_empty(), "what is left where it died goes then");
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

/// Waits until a machine is on its way back.
async fn returns(w: &World) {
    let mut seen = 0;
    while w.c.registry().vm("a").is_ok_and(|v| v.returning.is_none()) {
        assert!(seen < 5000, "it is not brought back");
        seen += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// It is at the site where it died, to be started from its disk there.
async fn goes_on_from_its_disk_there(w: &World) {
    let vm = w.c.registry().vm("a").expect("there");
    let at = (vm.state, vm.site.as_str(), vm.generation, &vm.returning);
    assert_eq!(at, (VmState::Failed, "cafe", Generation(4), &None));
    let vm = starts(w).await;
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "cafe"));
}

#[tokio::test]
async fn a_source_that_knows_no_such_machine_or_move_keeps_it_from_no_whole_disk() {
    let over = MoveStatus { over: true, ..status(MemoryStatus::Whole, 0) };
    for (code, says) in [(Code::NotFound, None), (Code::Conflict, Some(Ok(over)))] {
        let w = world(Send::BreaksAfter).await;
        running(&w, "a").await;
        // Asked once before, so that it can be seen on its way.
        let refuses = vec![Fault::new(code, "no such"), Fault::unavailable("not yet")];
        *w.center.back.refuses.lock().expect("lock") = refuses;
        let turned = async {
            returns(&w).await;
            *w.center.says.lock().expect("lock") = says;
        };
        let (end, ()) = tokio::join!(dies(&w), turned);
        assert_eq!(end.failure(), Some(Code::Damaged), "{end:?}");
        goes_on_from_its_disk_there(&w).await;
    }
}

#[tokio::test]
async fn a_disk_of_which_nothing_is_known_is_not_said_to_be_lost() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.center.back.dead.lock().expect("lock") = Some("its QEMU is gone".into());
    w.center.back.refuses.lock().expect("lock").push(Fault::unavailable("not yet"));
    let goes = async {
        returns(&w).await;
        *w.cafe.says.lock().expect("lock") = Some(Err(Fault::unavailable("nobody answers")));
    };
    let (end, ()) = tokio::join!(dies(&w), goes);
    let hint = end.error.and_then(|f| f.hint).expect("what to do");
    assert!(hint.contains("may have its disk whole"), "{hint}");
    let vm = w.c.registry().vm("a").expect("there");
    assert!(vm.site == name("center") && vm.returning.is_some(), "{vm:?}");
    // It says so later.
    let op = dies_again(&w, None).await;
    assert_eq!(op.failure(), Some(Code::Damaged), "{op:?}");
    goes_on_from_its_disk_there(&w).await;
}

/// Asks for the way back again, with a destination that is dead and has its disk.
async fn dies_again(w: &World, to: Option<&str>) -> crate::registry::OpRecord {
    *w.cafe.says.lock().expect("lock") = Some(Ok(status(MemoryStatus::Fell, 1)));
    let want = MigrateVm { to: to.map(name), scheme: None };
    let op = w.c.moves.migrate(&me(), "a", want, Mode::Act).expect("accepted").op.expect("op");
    w.c.ops().wait(op).await.expect("ends")
}

#[tokio::test]
async fn a_source_that_never_comes_back_is_given_up_by_a_persons_word_alone() {
    let w = world_with(Send::BreaksAfter, Duration::ZERO).await;
    running(&w, "a").await;
    w.center.back.refuses.lock().expect("lock").push(Fault::unavailable("its link is down"));
    dies(&w).await;
    let e = w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect_err("it is there");
    assert_eq!(e.code, Code::Conflict, "{e}");
    let center: Arc<dyn SiteHost> = w.center.clone();
    w.c.detach(&center);
    let op = dies_again(&w, None).await;
    let hint = op.error.and_then(|f| f.hint).expect("what to do");
    assert!(hint.contains("give up what it has: godwit vm migrate a --to cafe"), "{hint}");
    let op = dies_again(&w, Some("cafe")).await;
    assert_eq!(op.state, OpState::Done, "{op:?}");
    goes_on_from_its_disk_there(&w).await;
}

#[tokio::test]
async fn a_way_back_whose_end_was_not_written_harms_nobody() {
    let w = world_with(Send::BreaksAfter, Duration::ZERO).await;
    running(&w, "a").await;
    w.center.back.refuses.lock().expect("lock").push(Fault::unavailable("away"));
    dies(&w).await;
    let op = dies_again(&w, None).await;
    let before = w.c.registry().vm("a").expect("there");
    assert_eq!((before.state, before.generation), (VmState::Running, Generation(3)));
    // As the center has it that was killed before that, with and without its first step.
    for begun in [true, false] {
        let mut op = crate::registry::OpRecord::begun(&me(), op.kind.clone());
        let step =
            StepKind::Send { migration: godwit_types::MigrationId::new(), from: name("cafe") };
        let state = crate::registry::StepState::Begun;
        op.journal.extend(begun.then_some(crate::registry::Step { what: step, state }));
        w.c.registry().ops().put(&op).expect("written");
        let second = Controller::new(w.c.registry().clone(), w.authority.clone());
        assert_eq!(second.recover().expect("recovers"), 1);
        let end = second.ops().wait(op.id).await.expect("ends");
        assert_eq!(end.state, OpState::Failed, "{end:?}");
        assert!(end.error.is_some_and(|f| f.message.contains("are undone")));
        assert_eq!(w.c.registry().vm("a").expect("there"), before, "untouched");
    }
}

#[tokio::test]
async fn nobody_turns_off_by_force_what_is_brought_back() {
    let w = world(Send::BreaksAfter).await;
    running(&w, "a").await;
    *w.center.back.refuses.lock().expect("lock") = vec![Fault::unavailable("not yet"); 3];
    *w.cafe.says.lock().expect("lock") = Some(Err(Fault::unavailable("not yet")));
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    let arriving = || w.c.registry().vm("a").is_ok_and(|v| v.arriving.is_some());
    while !arriving() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let stop = w.c.stop(&me(), "a", true, Mode::Act).expect("it still moves").op.expect("op");
    *w.cafe.says.lock().expect("lock") = Some(Ok(status(MemoryStatus::Gone, 9)));
    let moved = w.c.ops().wait(op).await.expect("ends");
    assert_eq!(moved.failure(), Some(Code::Unavailable), "{moved:?}");
    let stopped = w.c.ops().wait(stop).await.expect("ends");
    assert_eq!(stopped.state, OpState::Done, "{stopped:?}");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Stopped, "center"));
    assert_eq!(asked(&w.center), [3, 3, 3, 3], "it was brought back first");
}
