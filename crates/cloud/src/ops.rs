//! Operations: long jobs with progress, cancel, and a journal that survives the daemon.
//!
//! ```text
//!            +--> done
//! running ---+--> failed
//!    |       ^
//!    v       | (an error that came before the cancel took hold)
//! cancelling-+--> cancelled
//! ```
//!
//! A step is written to the registry before it is taken and again when it is done. When a daemon
//! starts and finds operations that have not ended, the controller reads their journals and
//! finishes or undoes them. Progress lives in memory only: it is worth nothing after a restart.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use godwit_site::Progress;
use godwit_types::{Code, Fault, OpId, OpState, UnixMs, VmId};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::access::Principal;
pub use crate::op_kind::OpKind;
use crate::registry::{
    OpRecord, Registry, RegistryError, Step, StepKind, StepName, StepState, VmRecord,
    registry_fault,
};

/// Stages an operation may show; more are dropped, so that a peer cannot fill the memory.
const MAX_STAGES: usize = 16;

/// Steps that an operation's journal keeps; beyond these, the oldest that has ended goes.
const MAX_STEPS: usize = 256;

struct Live {
    view: watch::Sender<OpRecord>,
    cancel: CancellationToken,
    committed: Arc<AtomicBool>,
}

/// All operations of one center.
pub struct Ops {
    registry: Arc<Registry>,
    live: Mutex<HashMap<OpId, Live>>,
}

impl std::fmt::Debug for Ops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ops").field("running", &self.running()).finish_non_exhaustive()
    }
}

/// What a running operation uses to tell of itself.
#[derive(Clone)]
pub struct OpHandle {
    ops: Arc<Ops>,
    id: OpId,
    cancel: CancellationToken,
    committed: Arc<AtomicBool>,
}

impl Ops {
    /// The operations that `registry` holds; none of them runs yet.
    #[must_use]
    pub fn new(registry: Arc<Registry>) -> Arc<Self> {
        Arc::new(Self { registry, live: Mutex::default() })
    }

    fn live(&self) -> MutexGuard<'_, HashMap<OpId, Live>> {
        // The map is whole between any two statements that could panic.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are running.
    #[must_use]
    pub fn running(&self) -> usize {
        self.live().len()
    }

    /// As [`Ops::start`], of an operation that makes `vm`: both are written down, or neither. A
    /// machine that nobody works on would come of a kill in between.
    ///
    /// # Errors
    /// As [`Registry::vm_add`]; then the job is not run.
    pub fn start_new<F, Fut>(
        self: &Arc<Self>,
        who: &Principal,
        vm: &VmRecord,
        kind: OpKind,
        job: F,
    ) -> Result<OpId, RegistryError>
    where
        F: FnOnce(OpHandle) -> Fut,
        Fut: Future<Output = Result<Value, Fault>> + Send + 'static,
    {
        let record = OpRecord::begun(who, kind);
        self.registry.vm_add(vm, Some(&record))?;
        let id = record.id;
        self.run(record, job);
        Ok(id)
    }

    /// Writes a new operation of `who` down and runs `job` in the background. What the job returns
    /// becomes the result; [`Fault`] of class cancelled after a request to stop means that
    /// nothing was left behind.
    ///
    /// # Errors
    /// When the operation cannot be written down; then the job is not run.
    pub fn start<F, Fut>(
        self: &Arc<Self>,
        who: &Principal,
        kind: OpKind,
        job: F,
    ) -> Result<OpId, RegistryError>
    where
        F: FnOnce(OpHandle) -> Fut,
        Fut: Future<Output = Result<Value, Fault>> + Send + 'static,
    {
        let record = OpRecord::begun(who, kind);
        self.registry.ops().put(&record)?;
        let id = record.id;
        self.run(record, job);
        Ok(id)
    }

    /// Runs `job` for an operation that an earlier daemon left unfinished.
    pub fn resume<F, Fut>(self: &Arc<Self>, record: OpRecord, job: F)
    where
        F: FnOnce(OpHandle) -> Fut,
        Fut: Future<Output = Result<Value, Fault>> + Send + 'static,
    {
        self.run(record, job);
    }

    fn run<F, Fut>(self: &Arc<Self>, record: OpRecord, job: F)
    where
        F: FnOnce(OpHandle) -> Fut,
        Fut: Future<Output = Result<Value, Fault>> + Send + 'static,
    {
        let handle = OpHandle {
            ops: self.clone(),
            id: record.id,
            cancel: CancellationToken::new(),
            committed: Arc::default(),
        };
        let live = Live {
            view: watch::Sender::new(record),
            cancel: handle.cancel.clone(),
            committed: handle.committed.clone(),
        };
        self.live().insert(handle.id, live);
        let job = job(handle.clone());
        tokio::spawn(async move {
            let outcome = AssertUnwindSafe(job)
                .catch_unwind()
                .await
                .unwrap_or_else(|_| Err(Fault::internal("the job ended by a panic; see the log")));
            handle.end(outcome);
        });
    }

    /// Whether an operation that runs now is about that machine.
    #[must_use]
    pub fn works_on(&self, vm: VmId) -> bool {
        self.live().values().any(|l| l.view.borrow().kind.vm() == Some(vm))
    }

    /// Unfinished operations that nobody runs: what a daemon that was killed left behind.
    ///
    /// # Errors
    /// When the registry fails.
    pub fn abandoned(&self) -> Result<Vec<OpRecord>, RegistryError> {
        let ops = self.registry.ops().shared();
        let live = self.live();
        let left = ops.into_iter().filter(|o| !o.state.is_final() && !live.contains_key(&o.id));
        Ok(left.map(Arc::unwrap_or_clone).collect())
    }

    /// All operations, oldest first, running ones with their present progress.
    ///
    /// # Errors
    /// When the registry fails.
    pub fn list(&self) -> Result<Vec<OpRecord>, RegistryError> {
        let mut ops = self.registry.ops().all()?;
        let live = self.live();
        // What has ended is listed so: whoever follows the registry was told already.
        for op in ops.iter_mut().filter(|o| !o.state.is_final()) {
            if let Some(l) = live.get(&op.id) {
                *op = l.view.borrow().clone();
            }
        }
        Ok(ops)
    }

    /// Operations by kind and state.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<(&'static str, String), u32> {
        let mut counts = BTreeMap::new();
        let kept = self.registry.ops().shared();
        let live = self.live();
        for op in kept {
            let state = live.get(&op.id).map_or(op.state, |l| l.view.borrow().state);
            *counts.entry((op.kind.verb(), state.to_string())).or_default() += 1;
        }
        counts
    }

    /// Follows one operation. The receiver's value is the present state; it changes no more
    /// once that is final.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the registry fails.
    pub fn watch(&self, id: OpId) -> Result<watch::Receiver<OpRecord>, RegistryError> {
        if let Some(l) = self.live().get(&id) {
            return Ok(l.view.subscribe());
        }
        Ok(watch::Sender::new(self.registry.ops().get(id)?).subscribe())
    }

    /// Waits until the operation has ended.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the registry fails.
    pub async fn wait(&self, id: OpId) -> Result<OpRecord, RegistryError> {
        let mut rx = self.watch(id)?;
        let ended = rx.wait_for(|o| o.state.is_final()).await.map(|o| o.clone());
        match ended {
            Ok(o) => Ok(o),
            // The sender is gone: what it last wrote is in the registry.
            Err(_) => self.registry.ops().get(id),
        }
    }

    /// Asks an operation to stop.
    ///
    /// # Errors
    /// [`Fault`] of class not-found; of class conflict when it has ended or passed its commit
    /// point.
    pub fn cancel(&self, id: OpId) -> Result<(), Fault> {
        if let Some(l) = self.live().get(&id) {
            if l.committed.load(Ordering::SeqCst) {
                return Err(Fault::conflict(format!(
                    "operation {id} is past its commit point and will end by itself"
                ))
                .hint(format!("follow it with: godwit op wait {id}")));
            }
            l.cancel.cancel();
            let asked = l.view.send_if_modified(|o| {
                let change = o.state == OpState::Running;
                if change {
                    o.state = OpState::Cancelling;
                }
                change
            });
            if asked {
                self.registry.ops().cancelling(&l.view.borrow());
            }
            return Ok(());
        }
        let op = self.registry.ops().get(id).map_err(registry_fault)?;
        Err(Fault::conflict(format!("operation {id} is {} already", op.state)))
    }
}

impl OpHandle {
    /// Its id.
    #[must_use]
    pub const fn id(&self) -> OpId {
        self.id
    }

    /// Fires when it is asked to stop.
    #[must_use]
    pub const fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    /// An error if it was asked to stop.
    ///
    /// # Errors
    /// [`Fault::cancelled`].
    pub fn check(&self) -> Result<(), Fault> {
        if self.cancel.is_cancelled() { Err(Fault::cancelled()) } else { Ok(()) }
    }

    /// From here on a request to stop is refused.
    ///
    /// # Errors
    /// [`Fault::cancelled`] when the request came before.
    pub fn commit(&self) -> Result<(), Fault> {
        // `cancel` looks at the flag while it holds this lock, so one of the two comes first.
        let _guard = self.ops.live();
        self.check()?;
        self.committed.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Shows how far a stage is. Whoever watches sees the latest; nobody is waited for.
    pub fn progress(&self, mut p: Progress) {
        // A site made it.
        for (text, limit) in [(&mut p.stage, 64), (&mut p.unit, 64), (&mut p.note, 1024)] {
            godwit_site::bounds::tidy(text, limit);
        }
        if let Some(l) = self.ops.live().get(&self.id) {
            l.view.send_modify(|o| {
                if let Some(q) = o.progress.iter_mut().find(|q| q.stage == p.stage) {
                    *q = p;
                } else if o.progress.len() < MAX_STAGES {
                    o.progress.push(p);
                }
            });
        }
    }

    /// Writes down that a step begins, with what its undoing needs.
    ///
    /// # Errors
    /// When the registry fails; then the step must not be taken.
    pub fn begin(&self, step: StepKind) -> Result<(), Fault> {
        self.journal(|j| {
            // A step that was taken again and again says no more than its last times.
            if j.len() >= MAX_STEPS
                && let Some(old) = j.iter().position(|s| s.state != StepState::Begun)
            {
                j.remove(old);
            }
            j.push(Step { what: step, state: StepState::Begun });
        })
    }

    /// Writes down that the latest step of that name is done.
    ///
    /// # Errors
    /// When the registry fails.
    pub fn done(&self, step: StepName) -> Result<(), Fault> {
        self.mark(step, StepState::Done)
    }

    /// Writes down that the latest step of that name was taken back.
    ///
    /// # Errors
    /// When the registry fails.
    pub fn undone(&self, step: StepName) -> Result<(), Fault> {
        self.mark(step, StepState::Undone)
    }

    fn mark(&self, step: StepName, state: StepState) -> Result<(), Fault> {
        self.journal(|j| {
            if let Some(s) = j.iter_mut().rev().find(|s| s.what.name() == Some(step)) {
                s.state = state;
            }
        })
    }

    fn journal(&self, change: impl FnOnce(&mut Vec<Step>)) -> Result<(), Fault> {
        let record = {
            let live = self.ops.live();
            let Some(l) = live.get(&self.id) else {
                return Err(Fault::internal(format!("operation {} has ended", self.id)));
            };
            l.view.send_modify(|o| change(&mut o.journal));
            l.view.borrow().clone()
        };
        self.ops.registry.ops().put(&record).map_err(registry_fault)
    }

    fn end(&self, outcome: Result<Value, Fault>) {
        let mut record = {
            let live = self.ops.live();
            let Some(l) = live.get(&self.id) else { return };
            // A request to stop that comes now is not told of after the end.
            l.committed.store(true, Ordering::SeqCst);
            l.view.borrow().clone()
        };
        record.ended = Some(UnixMs::now());
        match outcome {
            Ok(v) => {
                record.state = OpState::Done;
                record.result = Some(v);
            }
            Err(f) if f.code == Code::Cancelled && self.cancel.is_cancelled() => {
                record.state = OpState::Cancelled;
                record.error = Some(f);
            }
            Err(f) => {
                record.state = OpState::Failed;
                record.error = Some(f);
            }
        }
        if let Err(e) = self.ops.registry.ops().put(&record) {
            tracing::error!(op = %self.id, error = %godwit_types::chain(&e), "the end of an operation could not be written; trying again");
            tokio::spawn(write_later(self.ops.registry.clone(), record.clone()));
        }
        // Out of the map and the last value sent in one go, so that whoever asks finds it in
        // one of the two places.
        let mut live = self.ops.live();
        if let Some(l) = live.remove(&self.id) {
            l.view.send_replace(record);
        }
    }
}

/// The pause between two tries to write the end of an operation.
const WRITE_AGAIN: std::time::Duration = std::time::Duration::from_secs(2);

/// Writes the end of an operation as soon as the registry can take it again.
async fn write_later(registry: Arc<Registry>, record: OpRecord) {
    while registry.ops().put(&record).is_err() {
        tokio::time::sleep(WRITE_AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use godwit_types::Name;

    use super::*;
    use serde_json::json;

    fn ops() -> (tempfile::TempDir, Arc<Registry>, Arc<Ops>) {
        let dir = tempfile::tempdir().expect("dir");
        let reg = Arc::new(Registry::open(&dir.path().join("r.redb")).expect("open"));
        let ops = Ops::new(reg.clone());
        (dir, reg, ops)
    }

    fn kind() -> OpKind {
        OpKind::PoolCheck { site: Name::new("center").expect("name") }
    }

    #[tokio::test]
    async fn an_operation_shows_its_progress_and_ends_with_its_result() {
        let (_d, reg, ops) = ops();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let id = ops
            .start(&Principal::operator(), kind(), |h| async move {
                h.progress(Progress {
                    stage: "memory".into(),
                    done: 1,
                    total: 2,
                    ..Progress::default()
                });
                gone.await.ok();
                Ok(json!({"pages": 2}))
            })
            .expect("start");
        let mut rx = ops.watch(id).expect("watch");
        rx.wait_for(|o| o.progress.first().is_some_and(|p| p.done == 1)).await.expect("progress");
        go.send(()).expect("waits");
        let end = ops.wait(id).await.expect("ends");
        assert_eq!((end.state, end.result), (OpState::Done, Some(json!({"pages": 2}))));
        assert_eq!(reg.ops().get(id).expect("kept").state, OpState::Done);
        assert_eq!(ops.running(), 0);
    }

    #[tokio::test]
    async fn a_cancel_is_heeded_before_the_commit_point_and_refused_after_it() {
        let (_d, _reg, ops) = ops();
        let id = ops
            .start(&Principal::operator(), kind(), |h| async move {
                h.cancel().cancelled().await;
                h.commit()?;
                Ok(Value::Null)
            })
            .expect("start");
        ops.cancel(id).expect("accepted");
        assert_eq!(ops.wait(id).await.expect("ends").state, OpState::Cancelled);
        assert_eq!(ops.cancel(id).expect_err("ended").code, Code::Conflict);

        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let (at, reached) = tokio::sync::oneshot::channel::<()>();
        let id = ops
            .start(&Principal::operator(), kind(), |h| async move {
                h.commit()?;
                at.send(()).ok();
                gone.await.ok();
                h.check()?;
                Ok(Value::Null)
            })
            .expect("start");
        reached.await.expect("committed");
        assert!(ops.cancel(id).expect_err("too late").message.contains("commit point"));
        go.send(()).expect("waits");
        assert_eq!(ops.wait(id).await.expect("ends").state, OpState::Done);
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_of_the_operation_only() {
        let (_d, _reg, ops) = ops();
        let id =
            ops.start(&Principal::operator(), kind(), |_| async { panic!("boom") }).expect("start");
        let end = ops.wait(id).await.expect("ends");
        assert_eq!((end.state, end.failure()), (OpState::Failed, Some(Code::Internal)));
    }

    #[tokio::test]
    async fn what_a_killed_daemon_left_is_found_with_its_journal() {
        let (_d, reg, first) = ops();
        let (at, reached) = tokio::sync::oneshot::channel::<()>();
        let id = first
            .start(&Principal::operator(), kind(), |h| async move {
                let site = Name::new("center").expect("name");
                h.begin(StepKind::Rebuild { site: site.clone() })?;
                h.done(StepName::Rebuild)?;
                h.begin(StepKind::Delete { site })?;
                at.send(()).ok();
                std::future::pending::<()>().await;
                Ok(Value::Null)
            })
            .expect("start");
        reached.await.expect("journal written");
        assert!(first.abandoned().expect("list").is_empty(), "it is being run");

        let second = Ops::new(reg);
        let left = second.abandoned().expect("list");
        assert_eq!(left.len(), 1);
        let states: Vec<_> = left[0].journal.iter().map(|s| (s.what.name(), s.state)).collect();
        assert_eq!(
            states,
            [
                (Some(StepName::Rebuild), StepState::Done),
                (Some(StepName::Delete), StepState::Begun)
            ]
        );
        second.resume(left[0].clone(), |h| async move {
            h.undone(StepName::Delete)?;
            Err(Fault::unavailable("the daemon was restarted"))
        });
        let end = second.wait(id).await.expect("ends");
        assert_eq!((end.state, end.journal[1].state), (OpState::Failed, StepState::Undone));
    }
}
