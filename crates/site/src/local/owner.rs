//! The owner of a machine: one task that alone changes it, and drains one queue of what is asked.
//!
//! ```text
//! whoever asks --> queue --> owner: may it? (allowed.rs) --> answer, what changed is published
//!                              |  \-> no: its refusal          |
//!                              \-> once its docking has ended  v
//! whoever looks <---------------------------------------- a watch, with its revision
//! ```
//!
//! Nothing that takes long goes on in the owner: a boot, a docking, a move, a guest that powers itself
//! off are states ([`Doing`](super::entry::Doing), or in the record), each with a future of its own
//! that tells the owner how far it is. Whoever only looks asks nobody, and never waits.
//!
//! What panics in the owner breaks off that one request. The machine runs on, and its owner takes it
//! as the next daemon would find it.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;

use futures::FutureExt;
use futures::future::BoxFuture;
use godwit_types::{Fault, Generation, MigrationId, Name, VmId};
use tokio::sync::{mpsc, oneshot, watch};

use super::allowed::{Action, First, Refusal};
use super::entry::{Doing, Entry};
use super::record::{DesiredState, MachineRecord};

/// What may be asked of one machine and is not answered yet; more wait with who asks.
const MOST_ASKED: usize = 64;

/// What decides whether something is done to a machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    action: Action,
    /// What who asks knows of.
    generation: Option<Generation>,
    /// The move that asks: of another it sees nothing.
    in_move: Option<MigrationId>,
}

impl Needs {
    /// That its state allows `action`, to one who knows of `generation`.
    pub(super) const fn known(action: Action, generation: Generation) -> Self {
        Self { action, generation: Some(generation), in_move: None }
    }

    /// That its state allows `action`, as that move sees it.
    pub(super) const fn in_move(action: Action, id: MigrationId) -> Self {
        Self { action, generation: None, in_move: Some(id) }
    }
}

/// Something that is asked of a machine's owner, who does it and nothing else meanwhile.
pub(super) trait Ask: Send + Sized + 'static {
    /// The answer.
    type Reply: Send + 'static;

    /// Its name, at which a test build can be held.
    const STEP: &'static str;

    /// What has to be allowed first; of an event, which has happened already, nothing.
    fn needs(&self) -> Option<Needs> {
        None
    }

    /// Does it; `first` is what its state wants ended before.
    fn answer(
        self,
        machine: &mut Owned,
        first: First,
    ) -> impl Future<Output = Result<Self::Reply, Fault>> + Send;
}

/// What somebody has asked, whatever it is.
trait Asked: Send {
    fn needs(&self) -> Option<Needs>;
    /// Whether nobody waits for the answer any more.
    fn is_dropped(&self) -> bool;
    fn refuse(self: Box<Self>, why: Refusal);
    fn answer(self: Box<Self>, machine: &mut Owned, first: First) -> BoxFuture<'_, ()>;
}

struct Pending<A: Ask> {
    ask: A,
    reply: oneshot::Sender<Result<A::Reply, Fault>>,
}

impl<A: Ask> Asked for Pending<A> {
    fn needs(&self) -> Option<Needs> {
        self.ask.needs()
    }

    fn is_dropped(&self) -> bool {
        self.reply.is_closed()
    }

    fn refuse(self: Box<Self>, why: Refusal) {
        let _ = self.reply.send(Err(why.into()));
    }

    fn answer(self: Box<Self>, machine: &mut Owned, first: First) -> BoxFuture<'_, ()> {
        let Self { ask, reply } = *self;
        async move {
            let doing = machine.doing.clone();
            let work = async {
                godwit_hold::at(A::STEP).await;
                ask.answer(machine, first).await
            };
            let done = AssertUnwindSafe(work).catch_unwind().await;
            let done = done.unwrap_or_else(|_| {
                let name = machine.record.name.clone();
                tracing::error!(vm = %name, step = A::STEP, "its owner panicked; it is adopted again");
                machine.adopt_again(doing);
                Err(broke_off(&name, A::STEP))
            });
            // Whoever has the answer sees what it has changed.
            machine.publish();
            let _ = reply.send(done);
        }
        .boxed()
    }
}

/// A machine in the hands of its owner.
pub(super) struct Owned {
    entry: Entry,
    site: Name,
    /// The machine's directory.
    pub(super) dir: PathBuf,
    /// Whether it may be another than it is published.
    touched: bool,
    published: watch::Sender<Entry>,
}

impl Deref for Owned {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl DerefMut for Owned {
    fn deref_mut(&mut self) -> &mut Entry {
        self.touched = true;
        &mut self.entry
    }
}

impl Owned {
    /// Writes its record down.
    pub(super) fn save(&self) -> Result<(), Fault> {
        self.record.save(&self.dir)
    }

    /// Shows it as it is now to whoever looks.
    pub(super) fn publish(&mut self) {
        if std::mem::take(&mut self.touched) {
            self.entry.revision += 1;
            self.published.send_replace(self.entry.clone());
        }
    }

    fn admits(&self, needs: Needs) -> Result<First, Refusal> {
        let state = self.state(&self.site);
        if let Some(generation) = needs.generation {
            state.fence(generation)?;
        }
        match needs.in_move {
            Some(id) => state.in_move(&self.record, id).allows(needs.action),
            None => state.allows(needs.action),
        }
    }

    /// What was done to it broke off by a panic: it is what is written down, as the next daemon would
    /// find it, and what went on before goes on.
    fn adopt_again(&mut self, doing: Doing) {
        let before = self.published.borrow().clone();
        let kept = match MachineRecord::load(&self.dir) {
            Ok(kept) => kept.filter(|r| r.vm == before.record.vm),
            Err(error) => {
                tracing::error!(vm = %before.record.name, %error, "its record");
                None
            }
        };
        if self.record.desired != DesiredState::Gone {
            self.record = kept.unwrap_or(before.record);
        }
        // One that was taken off it and has ended is found to have ended.
        if self.machine.is_none() {
            self.machine = before.machine;
        }
        self.doing = doing;
        // Whoever drove a start that was cancelled drives it no more.
        self.doing.end_cancelled();
    }
}

/// The task that owns a machine.
struct Task {
    machine: Owned,
    queue: mpsc::Receiver<Box<dyn Asked>>,
    /// What waits for its docking to end.
    later: VecDeque<Box<dyn Asked>>,
}

impl Task {
    async fn run(mut self) {
        while let Some(asked) = self.queue.recv().await {
            self.take(asked).await;
            while !matches!(self.machine.doing, Doing::Docking(_))
                && let Some(asked) = self.later.pop_front()
            {
                self.take(asked).await;
            }
        }
    }

    async fn take(&mut self, asked: Box<dyn Asked>) {
        let mut first = First::Nothing;
        if let Some(needs) = asked.needs() {
            if asked.is_dropped() {
                return;
            }
            match self.machine.admits(needs) {
                Ok(First::Docking) => {
                    if needs.action.stops_docking()
                        && let Doing::Docking(stop) = &self.machine.doing
                    {
                        stop.stop();
                    }
                    // Whoever has gone meanwhile is not among them.
                    self.later.retain(|asked| !asked.is_dropped());
                    if self.later.len() < MOST_ASKED {
                        self.later.push_back(asked);
                        return;
                    }
                    tracing::warn!(machine = %self.machine.record.name, "too much waits for its docking");
                    return;
                }
                Ok(what) => first = what,
                Err(refusal) => return asked.refuse(refusal),
            }
        }
        asked.answer(&mut self.machine, first).await;
    }
}

/// Whom to ask about one machine. Clones are of one; with the last of them its task ends.
#[derive(Clone)]
pub(super) struct Owner {
    queue: mpsc::Sender<Box<dyn Asked>>,
    published: watch::Receiver<Entry>,
}

impl Owner {
    /// One that owns a machine of `site` that has this directory, on a task of its own.
    pub(super) fn begin(site: Name, dir: PathBuf, entry: Entry) -> Self {
        let (queue, asked) = mpsc::channel(MOST_ASKED);
        let (published, now) = watch::channel(entry.clone());
        let machine = Owned { entry, site, dir, touched: false, published };
        tokio::spawn(Task { machine, queue: asked, later: VecDeque::new() }.run());
        tokio::spawn(super::reboots::follow(now.clone()));
        Self { queue, published: now }
    }

    /// The machine as it is published; what is being done to it right now may change it.
    pub(super) fn now(&self) -> Entry {
        self.published.borrow().clone()
    }

    /// Which machine it is.
    pub(super) fn vm(&self) -> VmId {
        self.published.borrow().record.vm
    }

    /// Shows the machine as it is published, to who does not keep its owner.
    pub(super) fn watch(&self) -> watch::Receiver<Entry> {
        self.published.clone()
    }

    /// Waits until it is one for which `is` holds; until its owner is gone.
    pub(super) async fn wait_for(&self, is: impl FnMut(&Entry) -> bool) -> Entry {
        let mut published = self.published.clone();
        let found = published.wait_for(is).await.map(|e| e.clone());
        found.unwrap_or_else(|_| self.now())
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The refusal of its state, what came of it, or that it broke off.
    pub(super) async fn ask<A: Ask>(&self, ask: A) -> Result<A::Reply, Fault> {
        let (reply, answer) = oneshot::channel();
        let sent = self.queue.send(Box::new(Pending { ask, reply })).await;
        let gone = || broke_off(&self.published.borrow().record.name, A::STEP);
        sent.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Tells what has happened, and waits for nobody.
    pub(super) fn notify<A: Ask>(&self, event: A) {
        let (reply, _) = oneshot::channel();
        if self.queue.try_send(Box::new(Pending { ask: event, reply })).is_err() {
            tracing::warn!(vm = %self.now().record.name, step = A::STEP, "too much is asked of it");
        }
    }
}

/// Why something was not done to a machine whose owner panicked.
fn broke_off(name: &Name, step: &str) -> Fault {
    Fault::internal(format!(
        "what was asked of machine '{name}' broke off ({step}); its site has adopted it again"
    ))
    .hint(format!("see how it is: godwit vm get {name}; the log of its site says why"))
}

/// What it is once all that was asked of it before is done, if its state allows what who asks is
/// about to do.
pub(super) struct Look {
    pub(super) needs: Option<Needs>,
}

impl Ask for Look {
    type Reply = Entry;
    const STEP: &'static str = "owner.look";

    fn needs(&self) -> Option<Needs> {
        self.needs
    }

    async fn answer(self, machine: &mut Owned, _: First) -> Result<Entry, Fault> {
        Ok(Entry::clone(machine))
    }
}
