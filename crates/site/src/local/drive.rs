//! The ends of moves that this daemon drives, each on a task of its own: how it goes on, how it has
//! ended, and what it has measured.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use godwit_migrate::hybrid::{DestinationFate, MoveError, Received, Sent, Steering};
use godwit_migrate::relay::RelayStatus;
use godwit_types::{Fault, MigrationId, Name, VmId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::course::{Outcome, Question, end};

/// How long a source's end may take to come to its end once it is needed no more.
pub(super) const RELEASE_WITHIN: Duration = Duration::from_secs(30);
/// How long an end may take to undo its part when it is told to.
pub(super) const UNDO_WITHIN: Duration = Duration::from_secs(40);
/// How long the task of a move may take to end once its QEMU and its relay are gone.
pub(super) const FORCED_WITHIN: Duration = Duration::from_secs(10);

/// How long the center is asked what became of a lost destination once the move was asked to end.
const CANCEL_LIMIT: Duration = Duration::from_secs(15);

/// What an end measured before a break, beside its machine's record.
pub(super) const SENT: &str = "sent.json";
pub(super) const RECEIVED: &str = "received.json";

/// Keeps what was measured.
pub(super) fn keep_measured<T: Serialize>(dir: &Path, name: &str, value: &T) {
    let written = serde_json::to_vec(value)
        .map_err(std::io::Error::from)
        .and_then(|bytes| std::fs::write(dir.join(name), bytes));
    if let Err(e) = written {
        // Only a report is poorer for it.
        warn!(dir = %dir.display(), error = %e, "what was measured is not kept");
    }
}

pub(super) fn measured<T: DeserializeOwned + Default>(dir: &Path, name: &str) -> T {
    let bytes = std::fs::read(dir.join(name)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// A migration is over: what was measured of it is in its report.
pub(super) fn forget_measured(dir: &Path) {
    for name in [SENT, RECEIVED] {
        // Mostly there is none.
        let _ = std::fs::remove_file(dir.join(name));
    }
}

/// One end of a migration, which this daemon drives or has driven.
#[derive(Debug)]
pub(super) struct Drive<R> {
    vm: VmId,
    outcome: watch::Sender<Outcome<R>>,
    /// The relay's status, once there is one.
    pub(super) shown: watch::Sender<Option<watch::Receiver<RelayStatus>>>,
}

impl<R: Clone> Drive<R> {
    fn new(vm: VmId) -> Self {
        Self { vm, outcome: watch::Sender::new(None), shown: watch::Sender::new(None) }
    }

    /// The machine.
    pub(super) const fn vm(&self) -> VmId {
        self.vm
    }

    /// Whether it has ended here, well or not.
    pub(super) fn has_ended(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    /// Ends it, unless it has ended already.
    pub(super) fn end(&self, how: Result<R, Fault>) {
        self.outcome.send_if_modified(|outcome| end(outcome, how));
    }

    /// Waits for its end here.
    pub(super) async fn ended(&self) -> Result<R, Fault> {
        let mut outcome = self.outcome.subscribe();
        let ended = outcome
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Fault::internal("a migration ended without a word"))?;
        ended.clone().unwrap_or_else(|| Err(Fault::internal("a migration without an end")))
    }
}

/// A machine that comes.
pub(super) type Coming = Drive<Received>;

/// A machine that leaves.
#[derive(Debug)]
pub(super) struct Leaving {
    drive: Drive<Sent>,
    /// What the source asks of a destination that was lost during the switch.
    question: watch::Sender<Question>,
    cancel: CancellationToken,
    lost: watch::Sender<Option<String>>,
}

impl std::ops::Deref for Leaving {
    type Target = Drive<Sent>;

    fn deref(&self) -> &Drive<Sent> {
        &self.drive
    }
}

impl Leaving {
    pub(super) fn steering(&self) -> Steering {
        Steering { cancel: self.cancel.clone(), lost: self.lost.subscribe() }
    }

    /// Asks for the end of the move: the machine stays, where that is still possible.
    pub(super) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Its destination is lost, as the center knows before the relay.
    pub(super) fn mark_lost(&self, why: String) {
        self.lost.send_replace(Some(why));
    }

    /// Asks the center, through whoever follows, what became of a lost destination. The machine is
    /// held until somebody knows; the question is put again and again until it is answered.
    pub(super) async fn ask_fate(&self) -> DestinationFate {
        let asks = Asks(self);
        self.question.send_modify(Question::ask);
        let mut question = self.question.subscribe();
        let tired = async {
            self.cancel.cancelled().await;
            tokio::time::sleep(CANCEL_LIMIT).await;
        };
        tokio::select! {
            _ = question.wait_for(|q| *q != Question::Asked) => {}
            () = tired => {}
        }
        asks.withdraw().unwrap_or(DestinationFate::Unknown)
    }

    /// Answers that question; tells whether it was put by somebody who still waits for it.
    pub(super) fn answer(&self, fate: DestinationFate) -> bool {
        !self.has_ended() && self.question.send_if_modified(|q| q.answer(fate))
    }

    /// The question as it is asked and answered.
    pub(super) fn question(&self) -> watch::Receiver<Question> {
        self.question.subscribe()
    }

    /// Waits until it asks, or has ended.
    pub(super) async fn asks_or_has_ended(&self) {
        let (mut question, mut outcome) = (self.question(), self.drive.outcome.subscribe());
        tokio::select! {
            _ = question.wait_for(|q| *q == Question::Asked) => {}
            _ = outcome.wait_for(Option::is_some) => {}
        }
    }
}

/// Whoever asks for the fate of a destination: with it goes its question, also when its task panics.
struct Asks<'a>(&'a Leaving);

impl Asks<'_> {
    /// Asks no more; what was answered, if it was.
    fn withdraw(&self) -> Option<DestinationFate> {
        let mut fate = None;
        self.0.question.send_if_modified(|q| {
            let asked = *q != Question::Unasked;
            fate = q.withdraw();
            asked
        });
        fate
    }
}

impl Drop for Asks<'_> {
    fn drop(&mut self) {
        let _ = self.withdraw();
    }
}

/// What the task of one end has to say.
pub(super) trait Driven: Send + Sync + 'static {
    /// What a good end has.
    type Done: Clone + Send + Sync;

    /// A machine that begins.
    fn begins(vm: VmId) -> Self;

    /// How it goes on.
    fn drive(&self) -> &Drive<Self::Done>;
}

impl Driven for Coming {
    type Done = Received;

    fn begins(vm: VmId) -> Self {
        Self::new(vm)
    }

    fn drive(&self) -> &Self {
        self
    }
}

impl Driven for Leaving {
    type Done = Sent;

    fn begins(vm: VmId) -> Self {
        Self {
            drive: Drive::new(vm),
            question: watch::Sender::default(),
            cancel: CancellationToken::new(),
            lost: watch::Sender::new(None),
        }
    }

    fn drive(&self) -> &Drive<Sent> {
        &self.drive
    }
}

/// Ends a migration's story even when the task that drives it panics.
struct Ending<D: Driven>(Arc<D>);

impl<D: Driven> Drop for Ending<D> {
    fn drop(&mut self) {
        self.0.drive().end(Err(Fault::internal("a migration's end failed; see the site's log")));
    }
}

/// All that this daemon drives at one kind of end.
#[derive(Debug)]
pub(super) struct Drives<D> {
    site: Name,
    all: StdMutex<HashMap<MigrationId, Arc<D>>>,
}

impl<D: Driven> Drives<D> {
    /// None yet.
    pub(super) fn new(site: Name) -> Self {
        Self { site, all: StdMutex::default() }
    }

    /// One that this daemon drives, or has driven lately.
    pub(super) fn get(&self, id: MigrationId) -> Option<Arc<D>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// As [`Drives::get`], where there has to be one.
    pub(super) fn known(&self, id: MigrationId) -> Result<Arc<D>, Fault> {
        self.get(id).ok_or_else(|| no_such_move(&self.site, id))
    }

    /// Enters one that begins, or goes on in place of its attempt before. Those of the same machine
    /// that have ended are forgotten.
    pub(super) fn register(&self, id: MigrationId, vm: VmId) -> Arc<D> {
        let begins = Arc::new(D::begins(vm));
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // Until then they are kept: who asks late how one has ended is told.
        all.retain(|_, d| d.drive().vm() != vm || !d.drive().has_ended());
        all.insert(id, Arc::clone(&begins));
        begins
    }

    /// Drives one on a task of its own.
    pub(super) fn drive(
        driven: &Arc<D>,
        work: impl Future<Output = Result<D::Done, Fault>> + Send + 'static,
    ) {
        let ending = Ending(Arc::clone(driven));
        tokio::spawn(async move {
            let outcome = work.await;
            ending.0.drive().end(outcome);
        });
    }

    /// Waits for the end of one, if it is known here, for so long.
    pub(super) async fn ended_within(&self, id: MigrationId, within: Duration) -> bool {
        let Some(driven) = self.get(id) else { return true };
        tokio::time::timeout(within, driven.drive().ended()).await.is_ok()
    }

    /// Enters one that goes on only over new relays.
    pub(super) fn interrupted(&self, id: MigrationId, (vm, name): (VmId, &Name), why: &str) {
        warn!(vm = %name, error = %why, "its relay is gone and it still needs the other end");
        let e = MoveError::Interrupted { why: why.to_owned() };
        self.register(id, vm).drive().end(Err(Fault::of(&e)));
    }
}

/// Why a site can't follow a move.
pub(super) fn no_such_move(site: &Name, id: MigrationId) -> Fault {
    Fault::unavailable(format!(
        "the move was given up: the daemon of site '{site}' was restarted before the switch ({id})"
    ))
    .hint("see where the machine runs: godwit vm list")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drives() -> (Drives<Leaving>, MigrationId, Arc<Leaving>) {
        let drives = Drives::<Leaving>::new("cafe".parse().expect("name"));
        let id = MigrationId::new();
        let leaving = drives.register(id, VmId::new());
        (drives, id, leaving)
    }

    #[tokio::test]
    async fn a_task_that_panics_ends_its_move() {
        let (drives, id, leaving) = drives();
        Drives::<Leaving>::drive(&leaving, async { panic!("as it is tested") });
        let f = drives.known(id).expect("known").ended().await.expect_err("no good end");
        assert!(f.message.contains("see the site's log"), "{f}");
    }

    #[tokio::test]
    async fn an_ended_move_is_known_until_its_machine_moves_again() {
        let (drives, id, leaving) = drives();
        assert!(!drives.ended_within(id, Duration::ZERO).await);
        leaving.end(Ok(Sent::default()));
        leaving.end(Err(Fault::internal("too late")));
        assert!(drives.ended_within(id, Duration::ZERO).await);
        drives.known(id).expect("known").ended().await.expect("the first end counts");
        let (other, next) = (MigrationId::new(), MigrationId::new());
        drives.register(other, VmId::new());
        assert!(drives.get(id).is_some(), "another machine's");
        drives.register(next, leaving.vm());
        assert!(drives.get(id).is_none() && drives.get(next).is_some());
    }

    #[tokio::test]
    async fn whoever_asks_gets_the_first_answer() {
        let (_, _, leaving) = drives();
        assert!(!leaving.answer(DestinationFate::Dead), "nobody asks");
        let asks = Arc::clone(&leaving);
        let asking = tokio::spawn(async move { asks.ask_fate().await });
        leaving.asks_or_has_ended().await;
        assert!(leaving.answer(DestinationFate::Runs));
        assert!(!leaving.answer(DestinationFate::Dead));
        assert_eq!(asking.await.expect("answered"), DestinationFate::Runs);
        assert_eq!(*leaving.question().borrow(), Question::Unasked);
    }

    #[tokio::test]
    async fn nobody_is_answered_who_has_gone() {
        let (_, _, leaving) = drives();
        let asks = Arc::clone(&leaving);
        let asking = tokio::spawn(async move { asks.ask_fate().await });
        leaving.asks_or_has_ended().await;
        asking.abort();
        asking.await.expect_err("gone");
        assert_eq!(*leaving.question().borrow(), Question::Unasked);
        assert!(!leaving.answer(DestinationFate::Dead), "its task is gone");

        let asks = Arc::clone(&leaving);
        let asking = tokio::spawn(async move { asks.ask_fate().await });
        leaving.asks_or_has_ended().await;
        leaving.end(Err(Fault::internal("by force")));
        assert!(!leaving.answer(DestinationFate::Dead), "its move has ended");
        asking.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_move_asks_a_little_longer() {
        let (_, _, leaving) = drives();
        leaving.cancel();
        let began = tokio::time::Instant::now();
        assert_eq!(leaving.ask_fate().await, DestinationFate::Unknown);
        assert_eq!(began.elapsed(), CANCEL_LIMIT);
    }
}
