//! What a site decides by itself, at a site without guests.

use std::time::Duration;

use godwit_migrate::hybrid::{Received, Sent};
use godwit_qemu::MacAddress;
use godwit_transfer::Authority;
use godwit_types::{Arch, Generation, Hash, Mib, MigrationId, SubstrateId, VmId};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::allowed::First;
use super::course::{Arrival, Course, End, Migration};
use super::drive::{RECEIVED, SENT};
use super::entry::Doing;
use super::owner::{Ask, Owned, Owner};
use super::promise::share_mib;
use super::record::{DesiredState, DiskBase, MachineRecord, Unfinished};
use super::*;
use crate::{Incoming, MemoryStatus};

/// A site and where it is.
pub(super) struct Place {
    pub(super) site: Arc<LocalSite>,
    pub(super) authority: Authority,
    _dir: tempfile::TempDir,
    _memory: tempfile::TempDir,
}

/// A site that promises so much memory to its machines.
pub(super) async fn site(promise: Mib) -> Place {
    let dir = tempfile::tempdir().expect("dir");
    let memory = tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs");
    let authority = Authority::create(&dir.path().join("ca")).expect("authority");
    let name: Name = "cafe".parse().expect("name");
    authority.own_identity(&dir.path().join("site/data/keys/identity"), &name).expect("keys");
    let dirs = SiteDirs {
        memory: memory.path().join("cafe"),
        ..SiteDirs::below(&dir.path().join("site"))
    };
    let trust = Trust::new(authority.certificate(), Revocations::default()).expect("trust");
    let options = SiteOptions {
        uids: Uids::Off,
        memory_promise_bytes: Some(promise.bytes()),
        ..SiteOptions::new(std::net::Ipv4Addr::LOCALHOST.into()).expect("options")
    };
    let site = LocalSite::open(name, dirs, trust, options).await.expect("a site");
    Place { site, authority, _dir: dir, _memory: memory }
}

/// Something that a test does as the owner of a machine.
pub(super) struct Do<F>(pub(super) F);

impl<T: Send + 'static, F: FnOnce(&mut Owned) -> T + Send + 'static> Ask for Do<F> {
    type Reply = T;
    const STEP: &'static str = "owner.test";

    async fn answer(self, machine: &mut Owned, _: First) -> Result<T, Fault> {
        Ok((self.0)(machine))
    }
}

/// Keeps the owner of a machine busy until whoever has its other end says so.
struct Busy(oneshot::Receiver<()>);

impl Ask for Busy {
    type Reply = ();
    const STEP: &'static str = "owner.busy";

    async fn answer(self, _: &mut Owned, _: First) -> Result<(), Fault> {
        let _ = self.0.await;
        Ok(())
    }
}

/// Keeps it busy for as long as what is returned is there.
pub(super) fn keep_busy(owner: &Owner) -> oneshot::Sender<()> {
    let (free, until) = oneshot::channel();
    owner.notify(Busy(until));
    free
}

pub(super) fn on_its_way(memory: Mib, end: End) -> MachineRecord {
    let peer: Name = "center".parse().expect("name");
    let vm = VmId::new();
    MachineRecord {
        vm,
        name: format!("m{}", &vm.0.simple().to_string()[24..]).parse().expect("name"),
        generation: Generation::FIRST,
        warrant: None,
        desired: DesiredState::Running,
        image: "tiny".parse().expect("name"),
        image_hash: Hash::of(b"tiny"),
        substrate: None,
        arch: Arch::X86_64,
        memory,
        vcpus: 1,
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        disk_base: DiskBase::Image,
        migration: Some(match end {
            End::Source => Migration::departure(MigrationId::new(), peer, None),
            End::Destination => Migration::arrival(MigrationId::new(), peer),
        }),
        reason: None,
        unfinished: None,
        attachment: None,
        published: Vec::new(),
        back: None,
    }
}

/// What is kept of a machine of 1 MiB that has left.
fn leave(me: &LocalSite) -> VmId {
    let (vm, generation) = (VmId::new(), Generation(7));
    let ram = me.parts.dirs.vm_memory(vm);
    std::fs::write(&ram, vec![7; 1 << 20]).expect("written");
    me.parts.machines.visits.left(vm, generation);
    me.parts.machines.visits.keep((vm, generation), &ram, u64::MAX);
    vm
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_of_machines_that_have_left_goes_first() {
    let memory = Mib(256);
    let place = site(Mib(u32::try_from(share_mib(memory) + 1).expect("small"))).await;
    let me = &place.site;
    let (first, second) = (leave(me), leave(me));
    // Its machines are promised all but one MiB.
    let machine = on_its_way(memory, End::Destination);
    me.parts.machines.register(machine, Doing::Nothing).await.expect("there is room");
    assert_eq!(me.parts.machines.visits.machines(), [second]);
    me.parts.substrates.pool.start(|pool| pool.reclaim(1)).await.expect("reclaimed");
    assert_eq!(me.parts.machines.visits.bytes(), 0);
    assert!(!me.parts.dirs.vm_memory(first).exists(), "it lies where its machine had it");
    // With no room beside what is promised nothing is kept.
    let third = VmId::new();
    std::fs::write(me.parts.dirs.vm_memory(third), vec![7; 2 << 20]).expect("written");
    me.parts.machines.visits.left(third, Generation(7));
    me.parts.machines.keep_visit(third, Generation(7)).await;
    assert_eq!(me.parts.machines.visits.bytes(), 0);
}

#[tokio::test]
async fn a_device_keeps_nothing_of_the_machines_that_come_to_it() {
    use godwit_transfer::PendingIdentity;
    let place = site(Mib(1024)).await;
    let (sealed, wanted) = (8 << 20, Some(1 << 20));
    assert_eq!(visits_budget(place.site.dirs(), sealed, None).expect("known"), 2 << 20);
    assert_eq!(visits_budget(place.site.dirs(), sealed, wanted).expect("known"), 1 << 20);
    let authority = Authority::create(&place._dir.path().join("other")).expect("authority");
    let name: Name = "phone".parse().expect("name");
    let pending = PendingIdentity::make(&name, SiteKind::Device).expect("a key");
    let signed = authority.issue(pending.request(), &name, SiteKind::Device).expect("issued");
    let identity = pending.complete(&signed, authority.certificate().as_ref()).expect("whole");
    let dirs = SiteDirs::below(&place._dir.path().join("phone"));
    identity.save(&dirs.keys().join("identity")).expect("kept");
    assert_eq!(visits_budget(&dirs, sealed, wanted).expect("known"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_arrivals_at_once_are_not_promised_the_same_memory() {
    let memory = Mib(256);
    // Room for two, and for most of a third.
    let share = share_mib(memory);
    let place = site(Mib(u32::try_from(3 * share - 1).expect("small"))).await;
    let me = &place.site;
    let arrive =
        || me.parts.machines.register(on_its_way(memory, End::Destination), Doing::Nothing);

    // As an arrival does: its owner is busy until all is ready, and its record comes late.
    let first = arrive().await.expect("the first");
    let busy = keep_busy(&first);
    let first = first.now();
    assert!(!me.parts.dirs.vm(first.record.vm).exists());
    assert_eq!(me.parts.machines.promised_mib(None).await, share);
    assert_eq!(me.parts.machines.promised_mib(Some(first.record.vm)).await, 0);
    let (a, b) = tokio::join!(arrive(), arrive());
    let (second, f) = match (a, b) {
        (Ok(second), Err(f)) | (Err(f), Ok(second)) => (second, f),
        (a, b) => panic!("both or none: {} {}", a.is_ok(), b.is_ok()),
    };
    assert_eq!(f.code, Code::NoRoom);
    assert!(f.message.contains(&format!("has promised {} MiB", 2 * share)), "{f}");
    // Nobody waits for the owner of another machine.
    let third = tokio::time::timeout(Duration::from_secs(10), arrive()).await.expect("no wait");
    third.map(drop).expect_err("still no room");

    drop(busy);
    let vm = first.record.vm;

    // What is undone is free for the next.
    me.parts.machines.unregister(vm).await;
    assert_eq!(me.parts.machines.promised_mib(None).await, share);
    let third = arrive().await.expect("there is room");
    assert_eq!(me.parts.machines.promised_mib(None).await, 2 * share);
    assert_ne!(second.vm(), third.vm());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_failed_late_leaves_the_next_one_alone() {
    let place = site(Mib(4096)).await;
    let machines = &place.site.parts.machines;
    let register = async || {
        let record = MachineRecord { migration: None, ..on_its_way(Mib(256), End::Source) };
        let vm = record.vm;
        let (owner, wanted) = machines.register_starting(record).await.expect("begun");
        (vm, owner, wanted)
    };
    let here = async |vm| machines.owner_if_here(vm).await.is_some();
    let withdraw = async |owner: &Owner, wanted: &CancellationToken| {
        place.site.starts.withdraw(owner, wanted.clone()).await;
    };

    let (vm, owner, wanted) = register().await;
    withdraw(&owner, &wanted).await;
    assert!(!here(vm).await && wanted.is_cancelled());
    withdraw(&owner, &wanted).await;

    // It is stopped by force, and started again before the first start has come to its end.
    let (vm, owner, first) = register().await;
    let again = |e: &mut Owned| {
        e.doing.cancel_start();
        e.doing.start()
    };
    let second = owner.ask(Do(again)).await.expect("started again");
    withdraw(&owner, &first).await;
    assert!(here(vm).await && !second.is_cancelled());
    let ended = Do(move |e: &mut Owned| e.doing.end_start(&second));
    assert!(owner.ask(ended).await.expect("asked"));
    withdraw(&owner, &first).await;
    assert!(here(vm).await, "it runs by the second");

    // Stopped only: nothing of it stays.
    let (vm, owner, wanted) = register().await;
    let stop = |e: &mut Owned| {
        e.doing.cancel_start();
        e.record.desired = DesiredState::Stopped;
    };
    owner.ask(Do(stop)).await.expect("stopped");
    withdraw(&owner, &wanted).await;
    assert!(!here(vm).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_whose_machine_ran_on_gives_neither_memory_nor_disk() {
    let place = site(Mib(4096)).await;
    let me = &place.site;
    let record = on_its_way(Mib(256), End::Source);
    let (vm, id) = (record.vm, record.migration.as_ref().expect("its move").id);
    let dir = me.parts.dirs.vm(vm);
    std::fs::create_dir_all(&dir).expect("dir");
    record.save(&dir).expect("saved");
    me.parts.machines.register(record.clone(), Doing::Nothing).await.map(drop).expect("here");
    let before = me.moves.status(id, vm).await.expect("in its move");
    assert!(!before.over && before.missing_blocks == Some(0), "{before:?}");

    me.moves.departures.mark_ran_on(&record).await;
    let status = me.moves.status(id, vm).await.expect("in its move");
    assert_eq!((status.memory, status.missing_blocks), (MemoryStatus::Gone, None));
    assert!(status.over && !status.runs, "{status:?}");
    for memory in [true, false] {
        let to = Incoming {
            migration: id,
            address: ([127, 0, 0, 1], 9).into(),
            peer: "center".parse().expect("name"),
        };
        let f = me
            .moves
            .departures
            .resume(id, vm, to, memory, &Call::quiet())
            .await
            .expect_err("nothing");
        assert_eq!(f.code, Code::Damaged, "{f}");
        assert!(f.message.contains("it has run there after it had left"), "{f}");
    }
    // No relay was begun, and the next daemon knows it, too.
    let kept = MachineRecord::load(&dir).expect("read").expect("there").migration;
    assert!(kept.is_some_and(|m| m.ran_on() && m.attempt == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_move_ends_no_other() {
    let place = site(Mib(4096)).await;
    let me = &place.site;
    let record = on_its_way(Mib(256), End::Source);
    let (vm, id) = (record.vm, record.migration.as_ref().expect("its move").id);
    let dir = me.parts.dirs.vm(vm);
    std::fs::create_dir_all(&dir).expect("dir");
    let owner = me.parts.machines.register(record, Doing::Nothing).await.expect("here");
    let (departures, sent) = (&me.moves.departures, Sent::default());
    departures.keep_sent(MigrationId::new(), vm, &sent).await;
    me.moves.arrivals.keep_received(id, vm, &Received::default()).await;
    assert!(!dir.join(SENT).exists() && !dir.join(RECEIVED).exists());
    departures.keep_sent(id, vm, &sent).await;
    assert!(dir.join(SENT).exists());

    me.moves.travellers.unmark(MigrationId::new(), vm).await;
    assert!(owner.now().record.migration.is_some() && dir.join(SENT).exists());
    me.moves.travellers.unmark(id, vm).await;
    assert!(owner.now().record.migration.is_none() && !dir.join(SENT).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_removed_while_what_nobody_knows_is_looked_for() {
    let place = site(Mib(4096)).await;
    let me = &place.site;
    for of_moves in [true, false] {
        let record = on_its_way(Mib(256), End::Destination);
        let vm = record.vm;
        let owner = me.parts.machines.register(record, Doing::Nothing).await.expect("here");
        let busy = keep_busy(&owner);
        let sweep = async {
            if of_moves {
                me.moves.sweep().await;
            } else {
                me.sweep_strays().await;
            }
        };
        tokio::pin!(sweep);
        let unregister = me.parts.machines.unregister(vm);
        tokio::time::timeout(Duration::from_secs(10), unregister).await.expect("no wait");
        tokio::time::timeout(Duration::from_secs(10), sweep).await.expect("no wait");
        drop(busy);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_was_docked_is_not_stopped_next_to_its_substrate() {
    let place = site(Mib(4096)).await;
    let me = &place.site;
    for docked in [false, true] {
        let substrate = SubstrateId::new();
        let record = MachineRecord {
            migration: None,
            unfinished: Some(Unfinished::Docking { substrate, nics: Vec::new() }),
            ..on_its_way(Mib(256), End::Source)
        };
        let (vm, generation) = (record.vm, record.generation);
        let dir = me.parts.dirs.vm(vm);
        std::fs::create_dir_all(&dir).expect("dir");
        let owner = me.parts.machines.register(record, Doing::Nothing).await.expect("here");
        if docked {
            let there = me.parts.dirs.data.join("substrates").join(substrate.to_string());
            std::fs::create_dir_all(there).expect("a substrate, if a damaged one");
        }
        let stopped = me.power_off(vm, generation, true, Call::quiet()).await;
        let record = owner.now().record.clone();
        if docked {
            let f = stopped.expect_err("it is its substrate");
            assert_eq!(f.code, Code::NotFound);
            assert!(f.message.contains(&substrate.to_string()), "{f}");
            assert_eq!(record.desired, DesiredState::Gone);
            assert_eq!(me.parts.machines.left(vm), Some(generation));
            assert!(me.parts.machines.owner(vm).await.is_err() && !dir.exists());
        } else {
            stopped.expect("off");
            assert_eq!((record.desired, record.unfinished), (DesiredState::Stopped, None));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_move_of_a_machine_takes_back_an_arrival_that_is_over_and_never_ran() {
    let place = site(Mib(4096)).await;
    let me = &place.site;
    let there = on_its_way(Mib(256), End::Destination);
    let vm = there.vm;
    let dir = me.parts.dirs.vm(vm);
    std::fs::create_dir_all(&dir).expect("dir");
    there.save(&dir).expect("saved");
    me.parts.machines.register(there.clone(), Doing::Nothing).await.map(drop).expect("here");
    // The same move asks again: that one stays.
    me.moves.arrivals.supersede(&there).await.expect("nothing to do");
    assert!(me.parts.machines.owner(vm).await.is_ok());
    let comes = MachineRecord { generation: there.generation.next(), ..there.clone() };
    me.moves.arrivals.supersede(&comes).await.expect("taken back");
    assert!(me.parts.machines.owner(vm).await.is_err() && !dir.exists());

    let other = one_that_runs(me, &there).await;
    let f = me.moves.arrivals.supersede(&other).await.expect_err("it runs here");
    assert_eq!(f.code, Code::Conflict, "{f}");
    assert!(me.parts.machines.owner(other.vm).await.is_ok());
}

/// Another machine, that came and runs here; gives what a later move of it would bring.
async fn one_that_runs(me: &LocalSite, like: &MachineRecord) -> MachineRecord {
    let mut record = MachineRecord { vm: VmId::new(), ..like.clone() };
    if let Some(m) = &mut record.migration {
        m.course = Course::Arrival(Arrival::Running);
    }
    let dir = me.parts.dirs.vm(record.vm);
    std::fs::create_dir_all(&dir).expect("dir");
    record.save(&dir).expect("saved");
    me.parts.machines.register(record.clone(), Doing::Nothing).await.map(drop).expect("here");
    MachineRecord { generation: record.generation.next(), ..record }
}

#[tokio::test]
async fn a_place_in_a_network_is_one_machines() {
    use godwit_net::{Attachment, Network, NetworkKind, Prefix};
    let place = site(Mib(4096)).await;
    let machines = &place.site.parts.machines;
    let network = |name: &str| Network {
        id: godwit_types::NetworkId::new(),
        name: name.parse().expect("name"),
        kind: NetworkKind::Nat,
        prefix: Prefix::DEFAULT,
    };
    let (lab, other) = (network("lab"), network("other"));
    let in_one = |network: &Network, last: u8, name: &str| MachineRecord {
        vm: VmId::new(),
        name: name.parse().expect("name"),
        migration: None,
        attachment: Some(Attachment {
            network: network.clone(),
            mac: MacAddress([0x52, 0, 0, 0, 0, last]),
            address: std::net::Ipv4Addr::new(10, 80, 0, last),
        }),
        ..on_its_way(Mib(64), End::Destination)
    };
    let first = in_one(&lab, 2, "first");
    machines.register(first.clone(), Doing::Nothing).await.expect("the first");
    machines.register(in_one(&lab, 3, "next"), Doing::Nothing).await.expect("the next address");
    machines.register(in_one(&other, 2, "apart"), Doing::Nothing).await.expect("another network");
    let mut same_mac = in_one(&lab, 4, "late");
    same_mac.attachment.as_mut().expect("in one").mac = MacAddress([0x52, 0, 0, 0, 0, 2]);
    for (late, what) in
        [(in_one(&lab, 2, "late"), "address 10.80.0.2"), (same_mac, "MAC address 52:")]
    {
        let refused = machines.register(late, Doing::Nothing).await.err().expect("refused");
        assert_eq!(refused.code, Code::Conflict);
        let words = format!("'late' cannot be here: machine 'first' has {what}");
        assert!(refused.message.starts_with(&words), "{refused}");
    }
    machines.unregister(first.vm).await;
    machines.register(in_one(&lab, 2, "late"), Doing::Nothing).await.expect("it is free again");
}
