use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use bytes::Bytes;
use godwit_migrate::hybrid::{Received, Sent};
use godwit_site::verbs::{
    MigrateAbort, MigratePrepare, MigrateRelease, MigrateResumeIn, MigrateSend, VmDelete,
    VmExecWait, VmNew, VmStatus, VmStop, VmType,
};
use godwit_site::{
    ByteStream, Call, GuestExec, GuestOutput, GuestProgram, ImageInfo, Incoming, MachineStatus,
    MemoryStatus, MoveStatus, News, Origin, SiteReply, SiteRequest, StreamRequest, SubstrateInfo,
};
use godwit_types::{Arch, Code, Fault, Hash, OpState, SubstrateId, VmId, VmState};

use super::tests_belief::docked;
use super::*;
use crate::access::Principal;
use crate::registry::StepName;
use crate::registry::VmRecord;
use godwit_types::Generation;

/// A site that keeps machines in a list, for the order of steps and the registry's truth.
pub(crate) struct Paper {
    pub(super) name: Name,
    pub(super) machines: Mutex<Vec<MachineStatus>>,
    pub(super) substrates: Mutex<Vec<SubstrateInfo>>,
    /// What `MigrateSend` does.
    send: Send,
    peer: Mutex<Option<Arc<Paper>>>,
    /// A machine that runs here lacks part of its memory.
    broken: AtomicBool,
    /// The QEMU that a machine left here is gone.
    pub(super) gone: AtomicBool,
    /// It cannot say how a migration stands.
    pub(super) silent: AtomicBool,
    /// What it says of a migration, in place of what the flags make of it.
    pub(super) says: Mutex<Option<Result<MoveStatus, Fault>>>,
    /// It was asked to bring the rest of a machine, with its memory or without.
    pub(super) resumed: Mutex<Vec<bool>>,
    /// The streams that were opened.
    pub(super) opened: Mutex<Vec<StreamRequest>>,
    /// It answers nothing at all.
    pub(super) hung: AtomicBool,
    /// How often it was asked what its pool holds.
    listed: AtomicUsize,
    /// How often it was asked what it runs.
    pub(super) asked: AtomicUsize,
    /// The protocol that it speaks.
    pub(super) speaks: std::sync::atomic::AtomicU16,
    /// What networks lack there.
    pub(super) lacks: Mutex<Vec<Name>>,
    /// What was typed into its machines.
    pub(crate) typed: Mutex<Vec<String>>,
    /// Machines that have left it and of which it keeps memory.
    pub(crate) visits: Mutex<Vec<VmId>>,
    pub(super) back: super::tests_back::Back,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Send {
    Works,
    FailsBefore,
    FailsAfter,
    BreaksAfter,
    WaitsForCancel,
    /// It says that a machine runs there under a generation that nobody asked for.
    TellsOfAnother,
}

pub(super) fn me() -> Principal {
    Principal::operator()
}

pub(crate) fn name(s: &str) -> Name {
    Name::new(s).expect("name")
}

fn measured(what: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(what).expect("json")
}

impl Paper {
    fn new(n: &str, send: Send) -> Arc<Self> {
        Arc::new(Self {
            name: name(n),
            machines: Mutex::default(),
            substrates: Mutex::default(),
            send,
            peer: Mutex::default(),
            broken: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            says: Mutex::default(),
            resumed: Mutex::default(),
            opened: Mutex::default(),
            hung: AtomicBool::new(false),
            listed: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            lacks: Mutex::default(),
            typed: Mutex::default(),
            visits: Mutex::default(),
            back: super::tests_back::Back::default(),
            speaks: godwit_transfer::wire::Versions::OURS.max.into(),
        })
    }
    pub(super) fn status(&self, vm: VmId, n: &Name, generation: Generation) -> MachineStatus {
        MachineStatus {
            vm,
            name: n.clone(),
            generation,
            warrant: None,
            state: VmState::Running,
            image: name("tiny"),
            arch: Arch::X86_64,
            memory: Mib(128),
            vcpus: 1,
            reason: None,
            activate: None,
        }
    }
    pub(super) fn all(&self) -> Vec<MachineStatus> {
        self.machines.lock().expect("lock").clone()
    }
    fn drop_vm(&self, vm: VmId) {
        self.machines.lock().expect("lock").retain(|m| m.vm != vm);
        self.visits.lock().expect("lock").retain(|of| *of != vm);
    }
}

#[async_trait::async_trait]
impl SiteHost for Paper {
    fn name(&self) -> &Name {
        &self.name
    }
    fn speaks(&self) -> u16 {
        self.speaks.load(SeqCst)
    }
    async fn open(&self, request: StreamRequest) -> Result<ByteStream, Fault> {
        let supplies = matches!(request, StreamRequest::SubstrateSupply { .. });
        self.opened.lock().expect("lock").push(request);
        match supplies {
            true => Ok(Box::pin(tokio::io::duplex(1).0)),
            false => Err(Fault::invalid("no streams on paper")),
        }
    }
    async fn answer(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault> {
        if self.hung.load(SeqCst) {
            std::future::pending::<()>().await;
        }
        let held = self.substrates.lock().expect("lock").clone();
        match request {
            SiteRequest::Report(_) => Ok(SiteReply::Report(SiteReport {
                cpus: 2,
                memory_free_mib: 8000,
                ram_files_free_mib: 8000,
                disk_free_mib: 8000,
                images: [name("tiny")].into(),
                substrates: held.iter().map(|s| s.id).collect(),
                holdings: Some(Hash::of(&postcard::to_stdvec(&held).expect("encoded"))),
                machines: godwit_site::digest(&self.all()),
                ..SiteReport::default()
            })),
            SiteRequest::Images(_) => Ok(SiteReply::Images(vec![ImageInfo {
                name: name("tiny"),
                hash: godwit_types::Hash::of(b"tiny"),
                arch: Arch::X86_64,
                memory: Mib(128),
                vcpus: 1,
                bytes: 1,
                display: false,
                app: None,
                built: true,
                fault: None,
            }])),
            SiteRequest::Ping(_) => Ok(SiteReply::Done(())),
            SiteRequest::VmType(VmType { text, .. }) => {
                self.typed.lock().expect("lock").push(text);
                Ok(SiteReply::Done(()))
            }
            SiteRequest::Visits(_) => {
                Ok(SiteReply::Visits(self.visits.lock().expect("lock").clone()))
            }
            SiteRequest::NetworksLack(_) => {
                Ok(SiteReply::Names(self.lacks.lock().expect("lock").clone()))
            }
            SiteRequest::Disk(_) => Ok(SiteReply::Bytes(4 << 30)),
            SiteRequest::Machines(_) => {
                self.asked.fetch_add(1, SeqCst);
                Ok(SiteReply::Machines(self.all()))
            }
            SiteRequest::VmStatus(VmStatus { vm }) => {
                let here = self.all().into_iter().find(|m| m.vm == vm);
                here.map(SiteReply::Machine).ok_or_else(|| Fault::not_found("not on paper"))
            }
            SiteRequest::SubstrateUsers(_) => Ok(SiteReply::Names(Vec::new())),
            SiteRequest::SubstrateDelete(d) => {
                self.substrates.lock().expect("lock").retain(|s| s.id != d.id);
                Ok(SiteReply::Done(()))
            }
            SiteRequest::Substrates(_) => {
                self.listed.fetch_add(1, SeqCst);
                Ok(SiteReply::Substrates(held))
            }
            SiteRequest::VmNew(VmNew { machine: n }) => {
                if n.origin == Origin::Image(name("broken")) || n.name == name("unlucky") {
                    return Err(Fault::new(Code::NoRoom, "tmpfs is full"));
                }
                let mut s = self.status(n.vm, &n.name, n.generation);
                s.warrant = Some(n.warrant);
                self.machines.lock().expect("lock").push(s.clone());
                Ok(SiteReply::Machine(s))
            }
            SiteRequest::VmStop(VmStop { vm, .. }) => {
                for m in self.machines.lock().expect("lock").iter_mut().filter(|m| m.vm == vm) {
                    m.state = VmState::Stopped;
                }
                Ok(SiteReply::Done(()))
            }
            SiteRequest::VmDelete(VmDelete { vm, .. })
            | SiteRequest::MigrateRelease(MigrateRelease { vm, .. }) => {
                self.drop_vm(vm);
                Ok(SiteReply::Done(()))
            }
            SiteRequest::MigrateManifest(_) => Ok(SiteReply::Manifest(vec![1])),
            SiteRequest::VmExec(_) => Ok(SiteReply::Executing(7)),
            // The guest stands still here, as in a switch, and answers at the other site.
            SiteRequest::VmExecWait(_) if self.name == name("center") => {
                std::future::pending().await
            }
            SiteRequest::VmExecWait(VmExecWait { pid: 7, .. }) => {
                Ok(SiteReply::Executed(GuestExec::Ended(GuestOutput {
                    exit: Some(3),
                    signal: None,
                    stdout: "moved".into(),
                    stderr: "".into(),
                    truncated: false,
                })))
            }
            SiteRequest::VmExecWait(_) => Ok(SiteReply::Executed(GuestExec::Unknown)),
            SiteRequest::MigratePrepare(MigratePrepare {
                migration,
                machine,
                generation,
                warrant,
                ..
            }) => {
                let mut s = self.status(machine.vm, &machine.name, generation);
                s.warrant = Some(warrant);
                s.state = VmState::Moving;
                self.machines.lock().expect("lock").push(s);
                let address = "127.0.0.1:1".parse().expect("address");
                Ok(SiteReply::Incoming(Incoming { migration, address, peer: self.name.clone() }))
            }
            SiteRequest::MigrateAbort(MigrateAbort { vm, .. }) => {
                if self.send == Send::Works
                    && self.all().iter().any(|m| m.vm == vm && m.state == VmState::Running)
                {
                    return Err(Fault::conflict("it runs here"));
                }
                self.machines
                    .lock()
                    .expect("lock")
                    .retain(|m| m.vm != vm || m.state != VmState::Moving);
                Ok(SiteReply::Done(()))
            }
            SiteRequest::MigrateFollow(_) => Err(Fault::not_found("no migration on paper")),
            SiteRequest::MigrateLost(_) | SiteRequest::MigrateFate(_) => Ok(SiteReply::Done(())),
            SiteRequest::MigrateStatus(_) => {
                if self.silent.load(SeqCst) {
                    return Err(Fault::unavailable("nobody answers"));
                }
                if let Some(says) = self.says.lock().expect("lock").clone() {
                    return says.map(SiteReply::MoveStatus);
                }
                let broken = self.broken.load(SeqCst);
                let memory = match (self.gone.load(SeqCst), broken, self.send) {
                    (true, _, _) => MemoryStatus::Gone,
                    (false, true, _) | (false, false, Send::BreaksAfter) => MemoryStatus::Partial,
                    _ => MemoryStatus::Whole,
                };
                let missing_pages = if broken { 10 } else { 0 };
                let (missing_blocks, runs, why) = (Some(0), true, None);
                let over = !broken && self.send != Send::BreaksAfter;
                Ok(SiteReply::MoveStatus(MoveStatus {
                    memory,
                    missing_pages,
                    missing_blocks,
                    runs,
                    over,
                    why,
                }))
            }
            SiteRequest::MigrateResumeIn(MigrateResumeIn { migration, memory, .. }) => {
                self.resumed.lock().expect("lock").push(memory);
                self.broken.store(false, SeqCst);
                let address = "127.0.0.1:1".parse().expect("address");
                Ok(SiteReply::Incoming(Incoming { migration, address, peer: self.name.clone() }))
            }
            SiteRequest::MigrateResumeOut(_) => {
                Ok(SiteReply::Sent(measured(&Sent { began: None, ..Sent::default() })))
            }
            SiteRequest::MigrateReceived(_) => {
                while !self.all().iter().any(|m| m.state == VmState::Running) {
                    if self.all().is_empty() {
                        return Err(Fault::not_found("no such migration"));
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                if self.broken.load(SeqCst) {
                    return Err(Fault::unavailable("the relay is gone"));
                }
                let at = |ms| Some(std::time::Duration::from_millis(ms));
                Ok(SiteReply::Received(measured(&Received {
                    resumed: at(5),
                    complete: at(6),
                    independent: at(7),
                    pivot: at(1),
                    ..Received::default()
                })))
            }
            SiteRequest::MigrateSend(MigrateSend { vm, next, .. }) => {
                let peer = self.peer.lock().expect("lock").clone().expect("peer");
                match self.send {
                    Send::FailsBefore => return Err(Fault::unavailable("link cut")),
                    Send::TellsOfAnother => {
                        call.news(News::Switched { generation: Generation(next.0 + 1) });
                        return Err(Fault::unavailable("link cut"));
                    }
                    Send::WaitsForCancel => {
                        call.cancel.cancelled().await;
                        return Err(Fault::cancelled());
                    }
                    Send::Works | Send::FailsAfter | Send::BreaksAfter => {}
                }
                peer.broken.store(self.send == Send::BreaksAfter, SeqCst);
                for m in peer.machines.lock().expect("lock").iter_mut().filter(|m| m.vm == vm) {
                    m.state = VmState::Running;
                }
                for m in self.machines.lock().expect("lock").iter_mut().filter(|m| m.vm == vm) {
                    m.state = VmState::Stopped;
                }
                if self.send == Send::FailsAfter {
                    // It switched, but the news of it never came.
                    return Err(Fault::unavailable("link cut"));
                }
                call.news(News::Switched { generation: next });
                if self.send == Send::BreaksAfter {
                    return Err(Fault::unavailable("the relay is gone"));
                }
                let at = |ms| Some(std::time::Duration::from_millis(ms));
                Ok(SiteReply::Sent(measured(&Sent {
                    began: at(1),
                    round_over: at(2),
                    switched: at(3),
                    stopped: at(4),
                    released: at(8),
                    ..Sent::default()
                })))
            }
            other => self.goes_back(other),
        }
    }
}

pub(crate) struct World {
    dir: tempfile::TempDir,
    pub(super) authority: Arc<Authority>,
    pub(crate) c: Arc<Controller>,
    pub(crate) center: Arc<Paper>,
    pub(crate) cafe: Arc<Paper>,
}

impl World {
    /// The registry's file.
    pub(crate) fn registry_file(&self) -> std::path::PathBuf {
        self.dir.path().join("r.redb")
    }
}

pub(crate) async fn world(send: Send) -> World {
    world_with(send, Duration::from_secs(60)).await
}

pub(super) async fn world_with(send: Send, patience: Duration) -> World {
    let dir = tempfile::tempdir().expect("dir");
    let reg = Arc::new(Registry::open(&dir.path().join("r.redb")).expect("open"));
    let authority = Arc::new(Authority::create(&dir.path().join("authority")).expect("authority"));
    let c = Controller::with_patience(reg, authority.clone(), patience);
    let (center, cafe) = (Paper::new("center", send), Paper::new("cafe", Send::Works));
    *center.peer.lock().expect("lock") = Some(cafe.clone());
    *cafe.peer.lock().expect("lock") = Some(center.clone());
    c.attach(center.clone(), SiteKind::Center).await.expect("center");
    c.attach(cafe.clone(), SiteKind::Ap).await.expect("cafe");
    World { dir, authority, c, center, cafe }
}

pub(super) async fn running(w: &World, n: &str) -> VmRecord {
    let want = CreateVm {
        name: Some(name(n)),
        image: Some(name("tiny")),
        site: Some(name("center")),
        ..CreateVm::default()
    };
    let (a, _) = w.c.create(&me(), want, Mode::Act).await.expect("accepted");
    let end = w.c.ops().wait(a.op.expect("op")).await.expect("ends");
    assert_eq!(end.state, OpState::Done, "{end:?}");
    w.c.registry().vm(n).expect("there")
}

/// A machine as cafe claims to run it, with the center's warrant for that.
pub(super) fn warranted(w: &World, vm: &VmRecord, generation: Generation) -> MachineStatus {
    let warrant = w.authority.warrant(vm.id, generation, &w.cafe.name).expect("signed");
    let status = w.cafe.status(vm.id, &vm.name, generation);
    MachineStatus { warrant: Some(warrant), ..status }
}

pub(super) fn to(n: &str) -> MigrateVm {
    MigrateVm { to: Some(name(n)), scheme: None }
}

#[tokio::test]
async fn a_machine_is_made_moved_stopped_and_deleted() {
    let w = world(Send::Works).await;
    let vm = running(&w, "report").await;
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "center"));
    let a = w.c.moves.migrate(&me(), "report", to("cafe"), Mode::Act).expect("accepted");
    let end = w.c.ops().wait(a.op.expect("op")).await.expect("ends");
    assert_eq!(end.state, OpState::Done, "{end:?}");
    let steps: Vec<_> = end.journal.iter().filter_map(|s| s.what.name()).collect();
    assert_eq!(steps, [StepName::Prepare, StepName::Send, StepName::Release]);
    let vm = w.c.registry().vm("report").expect("there");
    assert_eq!(
        (vm.state, vm.site.as_str(), vm.generation),
        (VmState::Running, "cafe", Generation(2))
    );
    assert!(w.center.all().is_empty(), "the source keeps nothing");

    let a = w.c.stop(&me(), "report", false, Mode::Act).expect("accepted");
    w.c.ops().wait(a.op.expect("op")).await.expect("ends");
    let e = w.c.moves.migrate(&me(), "report", to("center"), Mode::Act).expect_err("stopped");
    assert_eq!(
        (e.code, e.hint.as_deref()),
        (Code::Conflict, Some("start it first: godwit vm start report"))
    );
    let a = w.c.delete(&me(), "report", Mode::Act).expect("accepted");
    w.c.ops().wait(a.op.expect("op")).await.expect("ends");
    assert_eq!(w.c.registry().vm("report").expect_err("gone").to_string(), "no machine 'report'");
    assert!(w.cafe.all().is_empty());
}

#[tokio::test]
async fn a_program_is_asked_for_where_its_machine_has_gone() {
    let w = world(Send::Works).await;
    running(&w, "a").await;
    let program = GuestProgram { path: "/x".into(), args: vec![], input: Bytes::new() };
    let minute = Duration::from_secs(60);
    let process = w.c.programs.exec(&me(), "a", program.clone(), minute).await.expect("started");
    let waits = w.c.programs.exec_wait(&process, minute);
    let moves = async {
        let op =
            w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
        w.c.ops().wait(op).await.expect("ends");
    };
    let (ended, ()) = tokio::join!(waits, moves);
    let ended = ended.expect("found");
    assert_eq!((ended.exit, &ended.stdout[..]), (Some(3), &b"moved"[..]));
    let unknown = GuestProcess { pid: 8, ..process.clone() };
    assert_eq!(
        w.c.programs.exec_wait(&unknown, minute).await.expect_err("unknown").code,
        Code::NotFound
    );

    // One that is stopped is not waited for.
    let op = w.c.stop(&me(), "a", true, Mode::Act).expect("accepted").op.expect("op");
    w.c.ops().wait(op).await.expect("ends");
    for f in [
        w.c.programs.exec(&me(), "a", program, minute).await.expect_err("stopped"),
        w.c.programs.exec_wait(&process, minute).await.expect_err("stopped"),
    ] {
        assert!(f.code == Code::Conflict && f.message.contains("is stopped"), "{f}");
    }
    let op = w.c.delete(&me(), "a", Mode::Act).expect("accepted").op.expect("op");
    w.c.ops().wait(op).await.expect("ends");
    let f = w.c.programs.exec_wait(&process, minute).await.expect_err("gone");
    assert!(f.message.contains("was deleted while the program ran (pid 7)"), "{f}");
}

/// Machine `a` runs at the center as if nobody had moved it.
pub(super) fn runs_on_at_its_source(w: &World) {
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!(
        (vm.state, vm.site.as_str(), vm.generation),
        (VmState::Running, "center", Generation(1))
    );
    assert!(w.cafe.all().is_empty(), "the destination keeps nothing");
}

#[tokio::test]
async fn a_second_migration_is_refused_and_a_cancel_leaves_it_at_the_source() {
    let w = world(Send::WaitsForCancel).await;
    running(&w, "a").await;
    let first =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    let e = w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect_err("moving");
    assert_eq!(e.code, Code::Conflict);
    assert!(e.message.contains("is moving"), "{e}");
    assert!(w.c.stop(&me(), "a", false, Mode::Act).is_err());
    w.c.ops().cancel(first).expect("in time");
    assert_eq!(w.c.ops().wait(first).await.expect("ends").state, OpState::Cancelled);
    runs_on_at_its_source(&w);
}

#[tokio::test]
async fn a_failure_before_the_switch_leaves_the_machine_running_at_the_source() {
    let w = world(Send::FailsBefore).await;
    running(&w, "a").await;
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    assert_eq!(w.c.ops().wait(op).await.expect("ends").failure(), Some(Code::Unavailable));
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!((vm.state, vm.site.as_str()), (VmState::Running, "center"));
    assert!(w.cafe.all().is_empty());
}

#[tokio::test]
async fn a_switch_whose_news_was_lost_is_found_at_the_destination() {
    let w = world(Send::FailsAfter).await;
    running(&w, "a").await;
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    w.c.ops().wait(op).await.expect("ends");
    let vm = w.c.registry().vm("a").expect("there");
    assert_eq!(
        (vm.state, vm.site.as_str(), vm.generation),
        (VmState::Running, "cafe", Generation(2))
    );
    // The older one at the source is ended with the next report.
    let host = w.c.sites.host(&name("center")).expect("host");
    w.c.refresh(&host).await.expect("report");
    assert!(w.center.all().is_empty());
}

#[tokio::test]
async fn a_center_that_was_killed_during_a_move_finds_the_machine() {
    let w = world(Send::WaitsForCancel).await;
    let vm = running(&w, "a").await;
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    let mut seen = w.c.ops().watch(op).expect("watch");
    seen.wait_for(|o| o.journal.iter().any(|s| s.what.name() == Some(StepName::Send)))
        .await
        .expect("sending");
    // The daemon dies here; the sites finish the move without it.
    let second = Controller::new(w.c.registry().clone(), w.authority.clone());
    w.cafe.machines.lock().expect("lock").clear();
    w.cafe.machines.lock().expect("lock").push(warranted(&w, &vm, Generation(2)));
    for m in w.center.machines.lock().expect("lock").iter_mut() {
        m.state = VmState::Stopped;
    }
    let left = second.ops().abandoned().expect("list");
    assert_eq!(second.recover().expect("recovers"), 1);
    second.attach(w.center.clone(), SiteKind::Center).await.expect("center");
    second.attach(w.cafe.clone(), SiteKind::Ap).await.expect("cafe");
    let end = second.ops().wait(left[0].id).await.expect("ends");
    assert_eq!(end.state, OpState::Done, "{end:?}");
    let now = second.registry().vm("a").expect("there");
    assert_eq!(
        (now.state, now.site.as_str(), now.generation),
        (VmState::Running, "cafe", Generation(2))
    );
    assert!(w.center.all().is_empty(), "the source was released");
}

#[tokio::test]
async fn a_journal_of_a_later_release_is_refused_in_words_and_nothing_is_undone() {
    let w = world(Send::Works).await;
    let vm = running(&w, "a").await;
    let kind = crate::ops::OpKind::VmStop { vm: vm.id, name: vm.name.clone() };
    let mut op = crate::registry::OpRecord::begun(&me(), kind);
    let step = serde_json::json!({ "name": "warm", "state": "begun", "data": { "pages": 7 } });
    op.journal.push(serde_json::from_value(step).expect("a step"));
    w.c.registry().ops().put(&op).expect("written");
    let second = Controller::new(w.c.registry().clone(), w.authority.clone());
    assert_eq!(second.recover().expect("recovers"), 1);
    let end = second.ops().wait(op.id).await.expect("ends");
    assert_eq!((end.state, end.failure()), (OpState::Failed, Some(Code::Conflict)));
    let message = end.error.expect("a failure").message;
    assert!(message.contains("a step 'warm' that this version does not know"), "{message}");
    assert_eq!(end.journal, op.journal, "kept as it was");
    assert_eq!(second.registry().vm("a").expect("there").state, VmState::Running);
}

#[tokio::test]
async fn a_machine_that_cannot_start_leaves_nothing_behind() {
    let w = world(Send::Works).await;
    let want =
        CreateVm { name: Some(name("unlucky")), image: Some(name("tiny")), ..CreateVm::default() };
    let (a, _) = w.c.create(&me(), want, Mode::Act).await.expect("accepted");
    let end = w.c.ops().wait(a.op.expect("op")).await.expect("ends");
    assert_eq!((end.state, end.failure()), (OpState::Failed, Some(Code::NoRoom)));
    assert!(w.c.registry().vms().expect("list").is_empty());
}

#[tokio::test]
async fn a_dry_run_shows_the_plan_and_changes_nothing() {
    let w = world(Send::Works).await;
    let want = CreateVm { image: Some(name("tiny")), ..CreateVm::default() };
    let (a, vm) = w.c.create(&me(), want, Mode::DryRun).await.expect("plan");
    assert_eq!((a.op, vm), (None, None));
    assert_eq!(a.plan, "boot 'tiny-1' from image 'tiny' at cafe");
    assert!(w.c.registry().vms().expect("list").is_empty());
}

#[tokio::test]
async fn unknown_things_are_named_with_advice() {
    let w = world(Send::Works).await;
    let e = w.c.moves.migrate(&me(), "nobody", to("cafe"), Mode::Act).expect_err("unknown");
    assert_eq!((e.code, e.message.as_str()), (Code::NotFound, "no machine 'nobody'"));
    running(&w, "a").await;
    let e = w.c.moves.migrate(&me(), "a", to("mars"), Mode::Act).expect_err("unknown");
    assert_eq!((e.code, e.message.as_str()), (Code::NotFound, "no site 'mars'"));
    let want = CreateVm { substrate: Some(SubstrateId::new().to_string()), ..CreateVm::default() };
    assert_eq!(w.c.create(&me(), want, Mode::Act).await.expect_err("unknown").code, Code::NotFound);
    let host: Arc<dyn SiteHost> = w.cafe.clone();
    w.c.detach(&host);
    let e = w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect_err("away");
    assert_eq!(e.code, Code::Unavailable);
    assert!(e.message.contains("site 'cafe' is not connected"), "{e}");
}

#[tokio::test]
async fn of_two_generations_the_newer_that_runs_by_warrant_is_right() {
    let w = world(Send::Works).await;
    let vm = running(&w, "a").await;
    let host: Arc<dyn SiteHost> = w.cafe.clone();
    // The registry was restored from before the machine moved.
    let claim = warranted(&w, &vm, vm.generation.next());
    w.cafe.machines.lock().expect("lock").push(claim);
    w.c.refresh(&host).await.expect("report");
    let now = w.c.registry().vm("a").expect("there");
    assert_eq!((now.site.as_str(), now.generation), ("cafe", vm.generation.next()));
    assert_eq!(now.state, VmState::Running);
    // Where the older one is, it ends.
    let center: Arc<dyn SiteHost> = w.center.clone();
    w.c.refresh(&center).await.expect("report");
    assert!(w.center.all().is_empty());
    assert_eq!(w.c.registry().vm("a").expect("there").site.as_str(), "cafe");
}

#[tokio::test]
async fn a_claim_without_the_centers_warrant_moves_nothing_and_ends_nothing() {
    let w = world(Send::Works).await;
    let vm = running(&w, "a").await;
    let (center, cafe): (Arc<dyn SiteHost>, Arc<dyn SiteHost>) = (w.center.clone(), w.cafe.clone());
    let elsewhere = tempfile::tempdir().expect("dir");
    let other = Authority::create(elsewhere.path()).expect("authority");
    let sign = |a: &Authority, generation, site| a.warrant(vm.id, generation, &name(site));
    let next = vm.generation.next();
    let claim = |generation, warrant| MachineStatus {
        warrant,
        ..w.cafe.status(vm.id, &vm.name, generation)
    };
    let good = warranted(&w, &vm, next);
    let claims = [
        claim(next, None),
        // Another authority's, another site's, another generation's, another machine's.
        claim(next, sign(&other, next, "cafe").ok()),
        claim(next, sign(&w.authority, next, "center").ok()),
        claim(Generation(40), good.warrant.clone()),
        claim(next, w.authority.warrant(VmId::new(), next, &w.cafe.name).ok()),
        // Whoever is the last word on a machine can never be outdone.
        claim(Generation(u64::MAX), sign(&w.authority, Generation(u64::MAX), "cafe").ok()),
        claim(Generation(u64::MAX), None),
    ];
    for claim in claims {
        *w.cafe.machines.lock().expect("lock") = vec![claim.clone()];
        w.c.refresh(&cafe).await.expect("report");
        w.c.refresh(&center).await.expect("report");
        assert_eq!(w.c.registry().vm("a").expect("there"), vm, "{claim:?}");
        assert_eq!(w.center.all().len(), 1, "the true one lives: {claim:?}");
    }
    // And it can still be moved, to the very site.
    w.cafe.machines.lock().expect("lock").clear();
    let op =
        w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect("accepted").op.expect("op");
    assert_eq!(w.c.ops().wait(op).await.expect("ends").state, OpState::Done);
}

#[tokio::test]
async fn generations_neither_wrap_nor_panic() {
    let w = world(Send::Works).await;
    let vm = running(&w, "a").await;
    assert_eq!(Generation::LAST.next(), Generation::LAST);
    assert_eq!(Generation(u64::MAX).next(), Generation::LAST);
    let last = |v: &mut VmRecord| {
        v.generation = Generation::LAST;
        v.state = VmState::Stopped;
        Ok(())
    };
    w.c.registry().vm_update(vm.id, vm.generation, last).expect("written");
    let e = w.c.start(&me(), "a", Mode::Act).expect_err("no generation is left");
    assert!(e.message.contains("has had all generations"), "{e}");
    assert_eq!(w.c.registry().vm("a").expect("there").generation, Generation::LAST);
}

#[tokio::test]
async fn a_machine_that_an_operation_left_between_two_states_is_settled() {
    let w = world(Send::Works).await;
    let vm = running(&w, "a").await;
    let host: Arc<dyn SiteHost> = w.center.clone();
    let leave = |changed| {
        let change = |v: &mut VmRecord| {
            v.state = VmState::Docking;
            v.changed = changed;
            Ok(())
        };
        w.c.registry().vm_update(vm.id, vm.generation, change).expect("written");
    };
    let state = || w.c.registry().vm("a").expect("there").state;
    // Just now: an operation may be about to begin.
    leave(UnixMs::now());
    w.c.refresh(&host).await.expect("report");
    assert_eq!(state(), VmState::Docking);
    leave(UnixMs(1));
    w.c.refresh(&host).await.expect("report");
    assert_eq!(state(), VmState::Running);
    w.center.drop_vm(vm.id);
    leave(UnixMs(1));
    w.c.refresh(&host).await.expect("report");
    assert_eq!(state(), VmState::Failed);
}

#[tokio::test]
async fn a_site_that_does_not_answer_holds_up_nobody() {
    let w = world(Send::Works).await;
    w.cafe.hung.store(true, SeqCst);
    let host: Arc<dyn SiteHost> = w.cafe.clone();
    let begun = tokio::time::Instant::now();
    let all = ask_all(w.c.sites.hosts(), async |host| host.images().await).await;
    let answered: Vec<_> = all.answers.iter().map(|(site, _)| site.as_str()).collect();
    assert_eq!(answered, ["center"]);
    assert_eq!(all.unanswered[0].error.message, "site 'cafe' does not answer");
    // Generous: this machine may be busy. Who waits for the hung site waits for ever.
    assert!(begun.elapsed() < ANSWER_WITHIN * 20, "{:?}", begun.elapsed());
    // Nobody waits for the second site when the first has the image.
    running(&w, "a").await;
    let e = w.c.sites.image(&name("other")).await.expect_err("not there");
    assert_eq!(e.message, "no image 'other'; site 'cafe' does not answer");

    // It is placed at, too, until it is seen that it does not answer.
    let want = || CreateVm { image: Some(name("tiny")), ..CreateVm::default() };
    let (a, _) = w.c.create(&me(), want(), Mode::DryRun).await.expect("plan");
    assert!(a.plan.ends_with("at cafe"), "{}", a.plan);
    w.c.check_answers(&host).await;
    let (a, _) = w.c.create(&me(), want(), Mode::DryRun).await.expect("plan");
    assert!(a.plan.ends_with("at center"), "{}", a.plan);
    let e = w.c.moves.migrate(&me(), "a", to("cafe"), Mode::Act).expect_err("silent");
    assert_eq!(e.code, Code::Unavailable);
    assert_eq!(e.message, "no site fits: cafe does not answer");
    // Its next report makes it usable again.
    w.cafe.hung.store(false, SeqCst);
    w.c.check_answers(&host).await;
    w.c.refresh(&host).await.expect("report");
    let (a, _) = w.c.create(&me(), want(), Mode::DryRun).await.expect("plan");
    assert!(a.plan.ends_with("at cafe"), "{}", a.plan);
    // A link that another has replaced says nothing of the site, and nobody keeps it up.
    w.cafe.hung.store(true, SeqCst);
    w.c.attach(Paper::new("cafe", Send::Works), SiteKind::Ap).await.expect("a new link");
    w.c.check_answers(&host).await;
    let (a, _) = w.c.create(&me(), want(), Mode::DryRun).await.expect("plan");
    assert!(a.plan.ends_with("at cafe"), "{}", a.plan);
    w.c.clone().keep(host).await;
}

#[tokio::test]
async fn idle_sites_cost_the_registry_nothing() {
    let w = world(Send::Works).await;
    running(&w, "a").await;
    let hosts = w.c.sites.hosts();
    let held: Vec<_> = (0..200).map(docked).collect();
    for at in [&w.center, &w.cafe] {
        *at.substrates.lock().expect("lock") = held.clone();
    }
    // The first round lets the center's own site tell of them.
    for host in hosts.iter().chain(&hosts) {
        w.c.refresh(host).await.expect("report");
    }
    let of_all = w.c.registry().substrates().expect("list");
    assert!(of_all.len() == 200 && of_all.iter().all(|s| s.holders.len() == 2));
    let (commits, listed) = (w.c.registry().commits(), w.cafe.listed.load(SeqCst));
    for _ in 0..50 {
        for host in &hosts {
            w.c.refresh(host).await.expect("report");
        }
    }
    assert_eq!(w.c.registry().commits(), commits, "nothing durable has changed");
    assert_eq!(w.cafe.listed.load(SeqCst), listed, "and nothing is told twice");
}
