//! The change feed: what has changed in the registry, in the order in which it did.
//!
//! Each event has a *revision*, a number that grows by one and is written in the transaction of the
//! change, together with a summary of it; so a center that was killed goes on where it was, and tells
//! whoever comes back what was missed. What is known in memory only, such as that a site is silent,
//! is told too: such an event has the revision of the change before it and a number of its own.
//!
//! ```text
//! writer thread --+--> ring of the last events --> watchers, each with a place in the ring
//! site reports  --+      (bounded; nobody is waited for)     too slow: Forgotten
//! ```
//!
//! **Epochs.** A registry that was brought back from a copy counts on from an old revision. So each
//! run of a center draws an epoch with its first transaction and writes from which revision on that
//! counts. An [`EventId`] names the epoch that made its revision; one whose epoch is not known, or
//! was over before that revision, belongs to another history and is [`Forgotten`].

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_types::{Generation, Name, OpId, OpState, SiteState, SubstrateId, VmId};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use super::audience::{Audience, Tenants};
use super::tables::{Change, SiteRow, Tables};
use super::{OpRecord, SubstrateRecord, VmRecord};

/// Events that are kept in memory at most.
pub(super) const KEPT: usize = 4096;

/// What they and the records in them take at most, in bytes, about.
const KEPT_BYTES: usize = 16 << 20;

/// Transactions whose events are kept in the file.
pub(super) const KEPT_BATCHES: u64 = 1024;

/// Epochs that are kept in the file.
const KEPT_RUNS: usize = 64;

/// What an event takes besides its record, in bytes, about.
const EVENT_BYTES: usize = 400;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// An execution environment.
    Vm,
    /// A substrate.
    Substrate,
    /// A site.
    Site,
    /// An operation.
    Op,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Vm, Self::Substrate, Self::Site, Self::Op];

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Substrate => "substrate",
            Self::Site => "site",
            Self::Op => "op",
        }
    }
}

/// What of an object an operator follows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Summary {
    /// Its state. Of a substrate who may use it; of a site `joined`, `ready`, `unreachable` or
    /// `revoked`.
    pub state: String,
    /// Where a machine runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<Name>,
    /// Where a machine is going.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving_to: Option<Name>,
    /// The hand-over counter of a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// What an operation does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub does: Option<String>,
    /// The sites that hold a substrate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holders: Vec<Name>,
}

impl Summary {
    fn vm(vm: &VmRecord) -> Self {
        Self {
            state: vm.state.to_string(),
            site: Some(vm.site.clone()),
            moving_to: vm.moving_to.clone(),
            generation: Some(vm.generation),
            ..Self::default()
        }
    }

    fn substrate(s: &SubstrateRecord) -> Self {
        Self {
            state: s.kind.to_string(),
            holders: s.holders.iter().cloned().collect(),
            ..Self::default()
        }
    }

    fn op(op: &OpRecord) -> Self {
        Self {
            state: op.state.to_string(),
            does: Some(op.kind.verb().to_owned()),
            ..Self::default()
        }
    }

    fn site(row: &SiteRow) -> Self {
        let state = if row.revoked { "revoked" } else { "joined" };
        Self { state: state.to_owned(), ..Self::default() }
    }

    fn site_is(state: SiteState) -> Self {
        Self { state: state.to_string(), ..Self::default() }
    }
}

/// The object of an event, as the event left it.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// A machine.
    Vm(Arc<VmRecord>),
    /// A substrate.
    Substrate(Arc<SubstrateRecord>),
    /// An operation.
    Op(Arc<OpRecord>),
}

impl Serialize for Object {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Vm(vm) => vm.serialize(to),
            Self::Substrate(s) => s.serialize(to),
            Self::Op(op) => op.serialize(to),
        }
    }
}

/// What has changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct What {
    /// What it is about.
    pub kind: EventKind,
    /// The id of the object; of a site its name.
    pub key: String,
    /// The name of the object; of an operation the one of its target.
    pub name: String,
    /// What it was; none for a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<Summary>,
    /// What it is; none for one that is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Summary>,
    /// Who could know of it before.
    #[serde(default, skip_serializing_if = "Audience::is_default")]
    pub seen_before: Audience,
    /// Who can know of it now.
    #[serde(default, skip_serializing_if = "Audience::is_default")]
    pub seen_now: Audience,
    /// The object as it was then. None for one that is gone, for a site, and for an event from
    /// before the center was started when the object has changed again since.
    #[serde(skip)]
    pub object: Option<Object>,
}

/// Which event: `epoch-revision`, and for one that is in memory only `epoch-revision-run.number`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EventId {
    epoch: u64,
    revision: u64,
    /// The run of the center and the number in it.
    unwritten: Option<(u32, u32)>,
}

impl EventId {
    /// The number of the last change that was written when it happened, itself included.
    #[must_use]
    pub const fn revision(self) -> u64 {
        self.revision
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.epoch, self.revision)?;
        match self.unwritten {
            Some((run, n)) => write!(f, "-{run:08x}.{n}"),
            None => Ok(()),
        }
    }
}

/// The text is no id of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("that is no id of an event; it is the one that an event or a list came with")]
pub struct NoEventId;

impl FromStr for EventId {
    type Err = NoEventId;

    fn from_str(text: &str) -> Result<Self, NoEventId> {
        let hex = |t: &str, digits| {
            let plain = t.len() == digits && t.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u64::from_str_radix(t, 16).ok()).flatten()
        };
        let read = || {
            let mut parts = text.splitn(3, '-');
            let epoch = hex(parts.next()?, 16)?;
            let revision = parts.next()?.parse().ok()?;
            let unwritten = match parts.next() {
                None => None,
                Some(t) => {
                    let (run, n) = t.split_once('.')?;
                    Some((u32::try_from(hex(run, 8)?).ok()?, n.parse().ok()?))
                }
            };
            Some(Self { epoch, revision, unwritten })
        };
        read().ok_or(NoEventId)
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Which.
    pub id: EventId,
    /// What has changed.
    pub what: What,
    bytes: usize,
}

/// What a watcher asked for, or had not read yet, is not kept any more: it has to list anew, and
/// goes on from `now`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the events after that one are not kept any more")]
pub struct Forgotten {
    /// The last event that there is.
    pub now: EventId,
}

/// A run of a center: its epoch counts for the revisions after `after`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    epoch: u64,
    after: u64,
}

impl Run {
    fn new(after: u64) -> Self {
        Self { epoch: rand::random(), after }
    }
}

/// The events of one transaction, as they are in the file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stored {
    pub(super) first: u64,
    pub(super) events: Vec<What>,
}

/// What the file says of the feed.
#[derive(Debug, Default)]
pub(super) struct Saved {
    pub(super) revision: u64,
    /// Number of the last transaction with events.
    pub(super) batch: u64,
    /// Empty when it was written by a version that knows no feed.
    pub(super) runs: Vec<Run>,
    pub(super) stored: Vec<Stored>,
}

/// What a transaction adds to the feed.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) number: u64,
    /// The revision after it.
    pub(super) revision: u64,
    /// To be written when it is the first of this run.
    pub(super) runs: Option<Vec<Run>>,
    /// None without events.
    pub(super) stored: Option<Stored>,
    /// Bytes of each one's record.
    sizes: Vec<usize>,
}

/// A place among events: revision, and number of an unwritten one.
type Place = (u64, u32);

#[derive(Debug)]
struct Ring {
    runs: Vec<Run>,
    /// This run's epoch is among them.
    begun: bool,
    revision: u64,
    batch: u64,
    /// Tells the unwritten events of this run from those of others.
    run: u32,
    unwritten: u32,
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Counts all events that were ever in the ring before the first that is.
    before: u64,
    /// The last event that is not in the ring any more.
    floor: Place,
}

/// The feed of a registry.
#[derive(Debug)]
pub(super) struct Feed {
    ring: Mutex<Ring>,
    moved: watch::Sender<u64>,
}

/// A place in the feed from which events are read. Whoever reads slowly holds nobody up.
#[derive(Debug)]
pub struct Watcher {
    feed: Arc<Feed>,
    moved: watch::Receiver<u64>,
    /// The number of the next event.
    next: u64,
    last: EventId,
}

const fn place(id: EventId) -> Place {
    match id.unwritten {
        Some((_, n)) => (id.revision, n),
        None => (id.revision, 0),
    }
}

impl Ring {
    fn of(saved: Saved, tables: &Tables) -> Self {
        let mut runs = saved.runs;
        if runs.is_empty() {
            runs.push(Run::new(saved.revision));
        }
        let mut ring = Self {
            runs,
            begun: false,
            revision: saved.revision,
            batch: saved.batch,
            run: rand::random(),
            unwritten: 0,
            events: VecDeque::new(),
            bytes: 0,
            before: 0,
            floor: (saved.revision, 0),
        };
        ring.load_stored(saved.stored, tables);
        ring
    }

    /// Takes in the events of the file, as far back as none is missing.
    fn load_stored(&mut self, mut stored: Vec<Stored>, tables: &Tables) {
        stored.sort_by_key(|s| std::cmp::Reverse(s.first));
        let mut kept = Vec::new();
        let mut next = self.revision + 1;
        for s in stored {
            // One from before its epoch was known belongs to no history.
            let known = s.first > self.runs.first().map_or(u64::MAX, |r| r.after);
            if !known || s.first.checked_add(s.events.len() as u64) != Some(next) {
                break;
            }
            next = s.first;
            kept.push(s);
        }
        self.floor = (next - 1, 0);
        let mut last: HashMap<(EventKind, String), u64> = HashMap::new();
        for s in &kept {
            for (n, what) in (s.first..).zip(&s.events) {
                let last = last.entry((what.kind, what.key.clone())).or_default();
                *last = n.max(*last);
            }
        }
        for s in kept.into_iter().rev() {
            for (revision, mut what) in (s.first..).zip(s.events) {
                if what.new.is_some() && last.get(&(what.kind, what.key.clone())) == Some(&revision)
                {
                    what.object = present(tables, &what);
                }
                let id = EventId { epoch: self.epoch_of(revision), revision, unwritten: None };
                // How long its record is is not worth reading it.
                self.push(Event { id, what, bytes: 2 * EVENT_BYTES });
            }
        }
    }

    fn epoch_of(&self, revision: u64) -> u64 {
        let made = self.runs.iter().rev().find(|r| r.after < revision);
        made.or(self.runs.first()).map_or(0, |r| r.epoch)
    }

    fn push(&mut self, event: Event) {
        self.bytes += event.bytes;
        self.events.push_back(Arc::new(event));
        while self.events.len() > KEPT || (self.bytes > KEPT_BYTES && self.events.len() > 1) {
            if let Some(old) = self.events.pop_front() {
                self.bytes -= old.bytes;
                self.before += 1;
                self.floor = place(old.id);
            }
        }
    }

    /// The last event that there was.
    fn now(&self) -> EventId {
        let n = self.unwritten;
        EventId {
            epoch: self.epoch_of(self.revision),
            revision: self.revision,
            unwritten: (n > 0).then_some((self.run, n)),
        }
    }

    fn end(&self) -> u64 {
        self.before + self.events.len() as u64
    }

    /// The number of the first event after `id`.
    fn after(&self, id: EventId) -> Option<u64> {
        let i = self.runs.iter().position(|r| r.epoch == id.epoch)?;
        let first = self.runs[i].after + u64::from(i > 0);
        let last = self.runs.get(i + 1).map_or(self.revision, |r| r.after);
        if !(first..=last).contains(&id.revision) {
            return None;
        }
        let at = match id.unwritten {
            Some((run, _)) if run == self.run => place(id),
            // Of an unwritten event of another run only the change before it is known.
            _ => (id.revision, 0),
        };
        if at < self.floor || at > place(self.now()) {
            return None;
        }
        let read = self.events.partition_point(|e| place(e.id) <= at);
        Some(self.before + read as u64)
    }
}

/// What there is now of the object of an event.
fn present(t: &Tables, what: &What) -> Option<Object> {
    match what.kind {
        EventKind::Vm => {
            what.key.parse().ok().and_then(|id| t.vms.get(&id)).map(|e| Object::Vm(e.vm.clone()))
        }
        EventKind::Substrate => {
            let id = what.key.parse().ok();
            id.and_then(|id| t.substrates.get(&id)).map(|s| Object::Substrate(s.clone()))
        }
        EventKind::Op => {
            what.key.parse().ok().and_then(|id| t.ops.get(&id)).map(|o| Object::Op(o.clone()))
        }
        EventKind::Site => None,
    }
}

/// The row that a change is of.
#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    Vm(VmId),
    Substrate(SubstrateId),
    Op(OpId),
    Site(&'a Name),
    /// Of no object that is followed.
    Other,
}

const fn key(change: &Change) -> Key<'_> {
    match change {
        Change::Vm(id, _) => Key::Vm(*id),
        Change::Substrate(id, _) => Key::Substrate(*id),
        Change::Op(id, _) => Key::Op(*id),
        Change::Site(name, _) => Key::Site(name),
        Change::Deleted(..)
        | Change::Tenant(..)
        | Change::User(..)
        | Change::Token(..)
        | Change::Network(..)
        | Change::Audit(_) => Key::Other,
    }
}

/// The event of a change; none for one that nobody follows. `before` is an earlier change of the
/// same row that is not in `tables` yet.
fn event(
    change: &Change,
    before: Option<&Change>,
    tables: &Tables,
    tenants: &Tenants<'_>,
) -> Option<What> {
    type Side = (Option<Summary>, Audience);
    let made = |kind, key: String, name: Option<&Name>, old: Side, new: Side, object| What {
        kind,
        key,
        name: name.map(ToString::to_string).unwrap_or_default(),
        old: old.0,
        new: new.0,
        seen_before: old.1,
        seen_now: new.1,
        object,
    };
    fn side_of<R>(
        row: Option<&Arc<R>>,
        summary: impl Fn(&R) -> Summary,
        audience: impl Fn(&R) -> Audience,
    ) -> Side {
        match row {
            Some(row) => (Some(summary(row)), audience(row)),
            None => (None, Audience::default()),
        }
    }
    match change {
        Change::Vm(id, new) => {
            let old = match before {
                Some(Change::Vm(_, old)) => old.as_ref(),
                _ => tables.vms.get(id).map(|e| &e.vm),
            };
            let (new, name) = (new.as_ref(), new.as_ref().or(old).map(|v| &v.name));
            let side = |v| side_of(v, Summary::vm, |v| tenants.vm(v));
            let object = new.cloned().map(Object::Vm);
            Some(made(EventKind::Vm, id.to_string(), name, side(old), side(new), object))
        }
        Change::Substrate(id, new) => {
            let old = match before {
                Some(Change::Substrate(_, old)) => old.as_ref(),
                _ => tables.substrates.get(id),
            };
            let (new, name) = (new.as_ref(), new.as_ref().or(old).map(|s| &s.name));
            let side = |s| side_of(s, Summary::substrate, |s| tenants.substrate(s));
            let object = new.cloned().map(Object::Substrate);
            Some(made(EventKind::Substrate, id.to_string(), name, side(old), side(new), object))
        }
        Change::Op(id, new) => {
            let old = match before {
                Some(Change::Op(_, old)) => old.as_ref(),
                _ => tables.ops.get(id),
            };
            let (new, name) = (new.as_ref(), new.as_ref().or(old).map(|o| o.kind.target()));
            // Whoever wants its steps follows the operation itself.
            if old.zip(new).is_some_and(|(old, new)| old.state == new.state) {
                return None;
            }
            let side = |o| side_of(o, Summary::op, |o| tenants.op(o));
            let object = new.cloned().map(Object::Op);
            Some(made(EventKind::Op, id.to_string(), name, side(old), side(new), object))
        }
        Change::Site(name, new) => {
            let old = match before {
                Some(Change::Site(_, old)) => old.as_ref(),
                _ => tables.sites.get(name),
            };
            let new = new.as_ref();
            // That it went away is told when it does, not when that is written down.
            let shown = |r: &SiteRow| (r.kind, r.joined, r.revoked);
            if old.zip(new).is_some_and(|(old, new)| shown(old) == shown(new)) {
                return None;
            }
            let side = |s| side_of(s, Summary::site, |_| Audience::All);
            Some(made(EventKind::Site, name.to_string(), Some(name), side(old), side(new), None))
        }
        Change::Deleted(..)
        | Change::Tenant(..)
        | Change::User(..)
        | Change::Token(..)
        | Change::Network(..)
        | Change::Audit(_) => None,
    }
}

impl Feed {
    /// A feed with what the file says of it.
    pub(super) fn new(saved: Saved, tables: &Tables) -> Arc<Self> {
        let ring = Ring::of(saved, tables);
        let feed = Self { ring: Mutex::new(ring), moved: watch::Sender::new(0) };
        for site in tables.sites.values().filter(|s| !s.revoked) {
            // None has reported since the center was started.
            feed.site(&site.name, SiteState::Unreachable);
        }
        Arc::new(feed)
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // It is whole between any two statements that could panic.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) {
        self.moved.send_modify(|n| *n += 1);
    }

    /// What a transaction with these changes of `tables` adds. `changes` come with the length of
    /// their rows. Only the registry's writer asks.
    pub(super) fn plan<'a>(
        &self,
        tables: &Tables,
        changes: impl Iterator<Item = (&'a Change, usize)>,
    ) -> Batch {
        // A change sees an earlier one of the same row in the same transaction.
        let mut before: HashMap<Key<'_>, &Change> = HashMap::new();
        let mut tenants = Tenants::of(tables);
        let mut events = Vec::new();
        let mut sizes = Vec::new();
        for (change, bytes) in changes {
            let before = before.insert(key(change), change);
            tenants.apply(change);
            if let Some(what) = event(change, before, tables, &tenants) {
                events.push(what);
                sizes.push(bytes);
            }
        }
        let ring = self.ring();
        let first = ring.revision + 1;
        let mut runs = None;
        if !ring.begun {
            let mut all = ring.runs.clone();
            all.push(Run::new(ring.revision));
            let old = all.len().saturating_sub(KEPT_RUNS);
            runs = Some(all.split_off(old));
        }
        let some = u64::from(!events.is_empty());
        Batch {
            number: ring.batch + some,
            revision: ring.revision + events.len() as u64,
            runs,
            stored: (some > 0).then_some(Stored { first, events }),
            sizes,
        }
    }

    /// Tells of a transaction that is on disk.
    pub(super) fn publish(&self, batch: Batch) {
        let mut ring = self.ring();
        if let Some(runs) = batch.runs {
            ring.runs = runs;
            ring.begun = true;
        }
        ring.batch = batch.number;
        let Some(stored) = batch.stored else { return };
        for ((revision, what), bytes) in (stored.first..).zip(stored.events).zip(batch.sizes) {
            ring.revision = revision;
            ring.unwritten = 0;
            let id = ring.now();
            ring.push(Event { id, what, bytes: bytes + EVENT_BYTES });
        }
        drop(ring);
        self.moved();
    }

    /// Tells of something that is in memory only.
    pub(super) fn publish_unwritten(&self, what: What) {
        let mut ring = self.ring();
        ring.unwritten += 1;
        let id = ring.now();
        ring.push(Event { id, what, bytes: 2 * EVENT_BYTES });
        drop(ring);
        self.moved();
    }

    /// Tells that a site is there or not.
    pub(super) fn site(&self, name: &Name, state: SiteState) {
        let old = match state {
            SiteState::Ready => SiteState::Unreachable,
            SiteState::Unreachable => SiteState::Ready,
        };
        self.publish_unwritten(What {
            kind: EventKind::Site,
            key: name.to_string(),
            name: name.to_string(),
            old: Some(Summary::site_is(old)),
            new: Some(Summary::site_is(state)),
            seen_before: Audience::All,
            seen_now: Audience::All,
            object: None,
        });
    }

    /// Tells that an operation is asked to stop.
    pub(super) fn op_cancelling(&self, op: &OpRecord, audience: Audience) {
        let was = OpRecord { state: OpState::Running, ..op.clone() };
        self.publish_unwritten(What {
            kind: EventKind::Op,
            key: op.id.to_string(),
            name: op.kind.target().to_string(),
            old: Some(Summary::op(&was)),
            new: Some(Summary::op(op)),
            seen_before: audience.clone(),
            seen_now: audience,
            object: Some(Object::Op(Arc::new(op.clone()))),
        });
    }

    /// The file was opened anew and says this: when that is not what was told, the feed begins
    /// anew, and every watcher has to list.
    pub(super) fn reopened(&self, saved: Saved) {
        let mut ring = self.ring();
        if saved.revision == ring.revision && (saved.runs == ring.runs || !ring.begun) {
            return;
        }
        let before = ring.end() + 1;
        // What is told from now on is of a history of its own.
        let anew = Saved { runs: Vec::new(), stored: Vec::new(), ..saved };
        *ring = Ring { before, ..Ring::of(anew, &Tables::default()) };
        drop(ring);
        self.moved();
    }

    pub(super) fn now(&self) -> EventId {
        self.ring().now()
    }

    pub(super) fn watch_now(self: &Arc<Self>) -> Watcher {
        // Subscribed first: what comes in between wakes it.
        let moved = self.moved.subscribe();
        let ring = self.ring();
        let (next, last) = (ring.end(), ring.now());
        drop(ring);
        Watcher { feed: self.clone(), moved, next, last }
    }

    pub(super) fn watch_after(self: &Arc<Self>, id: EventId) -> Result<Watcher, Forgotten> {
        let moved = self.moved.subscribe();
        let ring = self.ring();
        let next = ring.after(id).ok_or_else(|| Forgotten { now: ring.now() })?;
        drop(ring);
        Ok(Watcher { feed: self.clone(), moved, next, last: id })
    }
}

impl Watcher {
    /// The next event, once there is one.
    ///
    /// # Errors
    /// [`Forgotten`] when it was too slow; it then goes on from now.
    pub async fn next(&mut self) -> Result<Arc<Event>, Forgotten> {
        loop {
            self.moved.borrow_and_update();
            if let Some(event) = self.read()? {
                return Ok(event);
            }
            if self.moved.changed().await.is_err() {
                // The feed holds the other end for as long as it is there.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The next event, if there is one already.
    ///
    /// # Errors
    /// As [`Watcher::next`].
    pub fn read(&mut self) -> Result<Option<Arc<Event>>, Forgotten> {
        let ring = self.feed.ring();
        let Some(at) = self.next.checked_sub(ring.before) else {
            (self.next, self.last) = (ring.end(), ring.now());
            return Err(Forgotten { now: self.last });
        };
        let event = usize::try_from(at).ok().and_then(|at| ring.events.get(at)).cloned();
        if let Some(event) = &event {
            self.next += 1;
            self.last = event.id;
        }
        Ok(event)
    }

    /// The last event that was read, or the one that it began after.
    #[must_use]
    pub const fn last(&self) -> EventId {
        self.last
    }
}
