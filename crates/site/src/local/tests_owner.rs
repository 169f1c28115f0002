//! What the owner of a machine does, where it has no guest.

use std::time::{Duration, Instant};

use godwit_substrate::DockStop;
use godwit_types::Mib;

use super::allowed::{Action, Activity};
use super::course::End;
use super::entry::Doing;
use super::owner::{Look, Needs, Owned};
use super::record::{DesiredState, MachineRecord};
use super::tests::{Do, keep_busy, on_its_way, site};
use super::*;

fn settled() -> MachineRecord {
    MachineRecord {
        migration: None,
        desired: DesiredState::Stopped,
        ..on_its_way(Mib(256), End::Source)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_looks_at_a_machine_never_waits_for_its_owner() {
    let place = site(Mib(4096)).await;
    let (me, machines) = (&place.site, &place.site.parts.machines);
    let record = settled();
    let vm = record.vm;
    let owner = machines.register(record.clone(), Doing::Nothing).await.expect("here");
    let before = owner.now().revision;
    let free = keep_busy(&owner);
    let waits = {
        let owner = owner.clone();
        tokio::spawn(async move { owner.ask(Look { needs: None }).await.expect("asked") })
    };
    let since = Instant::now();
    let looks = async {
        let one = machines.status(&me.parts.room, vm).await.expect("here");
        assert_eq!(one.state, godwit_types::VmState::Stopped);
        assert_eq!(machines.list(&me.parts.room).await.len(), 1);
        assert_eq!(machines.records().await, std::slice::from_ref(&record));
        assert_eq!(machines.promised_mib(None).await, 0);
        me.report().await.expect("a report");
        machines.qemu_for(vm, Action::Console).await.map(drop).expect_err("it does not run");
        machines.console_log(vm, 10).await.map(drop).expect_err("it has no log");
        me.moves.sweep().await;
    };
    tokio::time::timeout(Duration::from_secs(10), looks).await.expect("no wait");
    assert!(!waits.is_finished(), "what is asked waits: {:?}", since.elapsed());
    drop(free);
    let looked = waits.await.expect("asked");
    assert_eq!(looked.revision, before, "nothing has changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_panics_in_an_owner_breaks_off_alone() {
    let place = site(Mib(4096)).await;
    let machines = &place.site.parts.machines;
    let record = settled();
    let (vm, dir) = (record.vm, place.site.parts.dirs.vm(record.vm));
    std::fs::create_dir_all(&dir).expect("dir");
    record.save(&dir).expect("saved");
    let owner = machines.register(record.clone(), Doing::Nothing).await.expect("here");
    let half = |e: &mut Owned| {
        e.record.desired = DesiredState::Running;
        e.doing.start();
        e.publish();
        panic!("as it is tested");
    };
    let f = owner.ask(Do::<fn(&mut Owned)>(half)).await.expect_err("it broke off");
    assert_eq!(f.code, Code::Internal);
    assert!(f.message.contains("broke off") && f.hint.is_some(), "{f}");
    // As it is written down; a start that nobody drives is none.
    let now = owner.now();
    assert_eq!((now.record.desired, now.record.vm), (DesiredState::Stopped, vm));
    assert_eq!(now.doing.activity(), Activity::Nothing);
    // One that was going on does, unless it was cancelled then.
    for (cancels, then) in [(false, Activity::Starting), (true, Activity::Nothing)] {
        let start = |e: &mut Owned| e.doing.start();
        let wanted = owner.ask(Do(start)).await.expect("it answers");
        let breaks = move |e: &mut Owned| {
            if cancels {
                e.doing.cancel_start();
            }
            panic!("as it is tested");
        };
        let f = owner.ask(Do::<Box<dyn FnOnce(&mut Owned) + Send>>(Box::new(breaks))).await;
        f.expect_err("it broke off");
        assert_eq!(owner.now().doing.activity(), then);
        assert_eq!(wanted.is_cancelled(), cancels);
    }
    place.site.remove(vm, record.generation).await.expect("removed");
    assert!(!dir.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_change_a_machine_waits_for_the_end_of_its_docking() {
    let place = site(Mib(4096)).await;
    let machines = &place.site.parts.machines;
    let record = settled();
    let owner = machines.register(record.clone(), Doing::Nothing).await.expect("here");
    let stop = DockStop::default();
    let docks = stop.clone();
    owner.ask(Do(move |e: &mut Owned| e.doing.dock(docks))).await.expect("asked");
    let asked = |action| {
        let (owner, generation) = (owner.clone(), record.generation);
        tokio::spawn(async move {
            let needs = Some(Needs::known(action, generation));
            owner.ask(Look { needs }).await.map(|e| e.doing.activity())
        })
    };
    let (stopped, log) = (asked(Action::Stop), asked(Action::Log));
    // What comes after it is answered all the same.
    assert_eq!(log.await.expect("asked"), Ok(Activity::Docking));
    let busy = owner.ask(Look { needs: None }).await.expect("asked");
    assert!(busy.doing.activity() == Activity::Docking && !stopped.is_finished());
    // By force it ends before its commit.
    let forced = asked(Action::ForceStop);
    owner.ask(Look { needs: None }).await.expect("asked");
    // Nobody else needs to ask whether it was stopped.
    while format!("{stop:?}") != "DockStop(1)" {
        tokio::task::yield_now().await;
    }
    assert!(!forced.is_finished(), "it is awaited");
    owner.ask(Do(|e: &mut Owned| e.doing.end())).await.expect("asked");
    for waited in [stopped, forced] {
        assert_eq!(waited.await.expect("asked"), Ok(Activity::Nothing));
    }
}
