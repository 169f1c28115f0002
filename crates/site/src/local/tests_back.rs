//! What a destination answers of a machine that died there.

use godwit_types::{Code, Fault, Generation, Mib};

use super::allowed::Action;
use super::course::{End, Step};
use super::entry::Doing;
use super::owner::{Owned, Owner};
use super::ran;
use super::record::{Back, DesiredState, MachineRecord};
use super::tests::{Do, Place, on_its_way, site};
use crate::TookBack;

/// A machine that has run here, and has no QEMU.
async fn dead(place: &Place) -> (MachineRecord, Owner) {
    let mut record = on_its_way(Mib(256), End::Destination);
    let begun = record.migration.take().expect("its move");
    record.migration = Some(begun.after(Step::Ran).expect("it has run"));
    let dir = place.site.parts.dirs.vm(record.vm);
    std::fs::create_dir_all(&dir).expect("dir");
    record.save(&dir).expect("saved");
    ran::make(&dir).expect("made");
    let me = &place.site.parts;
    let owner = me.machines.register(record.clone(), Doing::Nothing).await.expect("here");
    (record, owner)
}

async fn asked(place: &Place, record: &MachineRecord, generation: u64) -> Result<(), Fault> {
    let id = record.migration.as_ref().expect("its move").id;
    let arrivals = &place.site.moves.arrivals;
    arrivals.fell(id, record.vm, Generation(generation)).await.map(drop)
}

/// Its end was seen by this daemon.
async fn seen(owner: &Owner) {
    owner.ask(Do(|e: &mut Owned| e.saw_end = true)).await.expect("asked");
}

fn kept(place: &Place, record: &MachineRecord) -> super::course::Migration {
    let dir = place.site.parts.dirs.vm(record.vm);
    let kept = MachineRecord::load(&dir).expect("read").expect("there");
    kept.migration.expect("its move")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fell_is_given_up_and_led_to_its_disk_by_the_centers_word() {
    let place = site(Mib(4096)).await;
    let (record, owner) = dead(&place).await;
    let id = record.migration.as_ref().expect("its move").id;
    owner.ask(Do(|e: &mut Owned| e.record.generation = Generation(3))).await.expect("asked");
    seen(&owner).await;
    let f = asked(&place, &record, 2).await.expect_err("older than it is here");
    assert_eq!(f.code, Code::Fenced, "{f}");
    // The center has raised it since, to start the machine from its disk, which was refused.
    for _ in 0..2 {
        asked(&place, &record, 5).await.expect("given up");
    }
    assert!(kept(&place, &record).fell());
    let may = |action| owner.now().state(&place.site.parts.name).allows(action);
    may(Action::Start).expect_err("its source may run it");

    let arrivals = &place.site.moves.arrivals;
    arrivals.abandon(id, record.vm, "its source is gone".into()).await.expect("known");
    assert!(kept(&place, &record).fell(), "that its QEMU died is not forgotten");
    may(Action::Start).expect("its source is gone");
    // Its source is there after all.
    asked(&place, &record, 5).await.expect("given up");
    may(Action::Start).expect_err("its source may run it");
    let next = arrivals.next_attempt(&owner.now().record).await.expect("its disk is brought");
    assert!(next.migration.is_some_and(|m| m.fell() && m.attempt == 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_known_of_a_dead_machine_sends_it_nowhere() {
    let place = site(Mib(4096)).await;
    let refused = async |record: &MachineRecord, words: &str| {
        let f = asked(&place, record, 1).await.expect_err("it stays");
        assert!(f.code == Code::Conflict && f.message.contains(words), "{f}");
        assert!(!kept(&place, record).fell());
    };
    let (record, owner) = dead(&place).await;
    refused(&record, "nobody saw how the QEMU").await;
    seen(&owner).await;
    let dir = place.site.parts.dirs.vm(record.vm);
    ran::forget(&dir).expect("as of a release before");
    refused(&record, "has not written down").await;
    ran::make(&dir).expect("made");
    ran::note_all_memory(&dir).expect("written");
    refused(&record, "had all its memory").await;

    let (record, owner) = dead(&place).await;
    seen(&owner).await;
    owner.ask(Do(|e: &mut Owned| e.record.desired = DesiredState::Stopped)).await.expect("asked");
    refused(&record, "has powered itself off").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_of_a_way_back_holds() {
    let place = site(Mib(4096)).await;
    let me = &place.site;
    let mut record = on_its_way(Mib(256), End::Source);
    let id = record.migration.take().expect("its move").id;
    let (vm, generation) = (record.vm, Generation(3));
    let warrant = || place.authority.warrant(vm, generation, &me.parts.name).expect("signed");
    (record.generation, record.warrant) = (generation, Some(warrant()));
    std::fs::create_dir_all(me.parts.dirs.vm(vm)).expect("dir");
    let owner = me.parts.machines.register(record, Doing::Nothing).await.expect("here");
    let again = async || me.moves.departures.bring_back(id, vm, generation, warrant()).await;
    let f = again().await.expect_err("in no such move, and nothing is known of a way back");
    assert_eq!(f.code, Code::Conflict, "{f}");
    for (runs, due) in
        [(true, TookBack::Runs), (false, TookBack::Never { why: "its QEMU is gone".into() })]
    {
        let back = Back { generation, runs };
        owner.ask(Do(move |e: &mut Owned| e.record.back = Some(back))).await.expect("asked");
        assert_eq!(again().await.expect("known"), due);
    }
    // Of an earlier way back.
    let back = Back { generation: Generation(2), runs: true };
    owner.ask(Do(move |e: &mut Owned| e.record.back = Some(back))).await.expect("asked");
    again().await.expect_err("not this one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_whose_qemu_is_gone_says_so_once_and_for_all_unless_it_had_run() {
    for ran in [false, true] {
        let place = site(Mib(4096)).await;
        let me = &place.site;
        let mut record = on_its_way(Mib(256), End::Source);
        let (id, vm, generation) =
            (record.migration.as_ref().expect("its move").id, record.vm, Generation(3));
        // Killed between its first instant and the end of its move, and then its host.
        record.back = ran.then_some(Back { generation, runs: true });
        let dir = me.parts.dirs.vm(vm);
        std::fs::create_dir_all(&dir).expect("dir");
        record.save(&dir).expect("saved");
        me.parts.machines.register(record, Doing::Nothing).await.map(drop).expect("here");
        for _ in 0..2 {
            let warrant = place.authority.warrant(vm, generation, &me.parts.name).expect("signed");
            let took = me.moves.departures.bring_back(id, vm, generation, warrant).await;
            assert_eq!(took.expect("known") == TookBack::Runs, ran);
            let kept = MachineRecord::load(&dir).expect("read").expect("there");
            assert_eq!((kept.migration, kept.back), (None, Some(Back { generation, runs: ran })));
        }
    }
}
