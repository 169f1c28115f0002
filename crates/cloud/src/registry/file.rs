//! The registry's file (redb) and the thread that writes it.
//!
//! ```text
//! callers                              writer thread
//!   | change of `next`, rows queued --> | takes all that is queued: one transaction, one fsync
//!   | wait                              | makes the change in `durable`
//!   | <-------------------------------- | answers each
//! ```
//!
//! Changes that come while a transaction is under way share the next one. Readers see what is on
//! disk only. When a transaction fails, so does every change that was made on top of it, and the
//! database is opened anew with what it holds.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, mpsc};

use godwit_types::UnixMs;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use godwit_store::{CommitMark, Marked};

use super::feed::{Batch, Feed};
use super::layout::{
    AUDIT, DELETED, META, NETWORKS, OPS, SITES, SUBSTRATES, TENANTS, TOKENS, Table, USERS, VMS,
};
use super::rows::{AuditEntry, TenantRecord, TokenRecord, UserRecord};
use super::tables::{Change, SiteRow, Tables};
use super::{RegistryError, Result, saved};

/// Format 1: ids by name. Names are read from the rows since.
const OLD_NAMES: [Table; 2] =
    [TableDefinition::new("substrate-names"), TableDefinition::new("vm-names")];

/// In [`META`]: the number of the last transaction.
const LAST: &str = "last-commit";

/// Version of the layout. 1: the first, with each site's last report in its row and tables of
/// names. 2: what sites report is not written down. 3: everything belongs to a tenant; what does not
/// say to which belongs to the default one. 4: networks; each tenant has one from the start.
const FORMAT: &[u8] = b"4";

/// A row as it is written.
struct Row {
    table: Table,
    key: String,
    value: Option<Vec<u8>>,
}

struct Job {
    rows: Vec<Row>,
    changes: Vec<Change>,
    done: mpsc::SyncSender<Result<()>>,
}

#[derive(Default)]
struct Queue {
    /// `durable` with all that is queued or being written.
    next: Tables,
    jobs: Vec<Job>,
    writing: bool,
    closed: bool,
}

/// What callers and writer share.
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    durable: RwLock<Tables>,
    feed: Arc<Feed>,
    commits: AtomicU64,
    /// None while it could not be opened anew. Only the writer changes which it is.
    db: RwLock<Option<Database>>,
}

/// The tables, in memory and on disk.
pub(super) struct File {
    shared: Arc<Shared>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File").field("commits", &self.commits()).finish_non_exhaustive()
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Changes are made whole between any two statements that could panic.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_db(&self, db: Option<Database>) {
        *self.db.write().unwrap_or_else(PoisonError::into_inner) = db;
    }

    /// Does something with the database that is open.
    fn with_db<T>(&self, act: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        match &*self.db.read().unwrap_or_else(PoisonError::into_inner) {
            Some(db) => act(db),
            None => Err(RegistryError::Database(Arc::new(redb::Error::PreviousIo))),
        }
    }
}

impl File {
    /// Opens the file, making it if it is not there, and brings one of an earlier format to this one.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let db = open_db(path)?;
        let beside = path.with_extension("mark");
        let (mark, marked) = CommitMark::open(&beside).map_err(|e| RegistryError::Open {
            path: beside.clone(),
            source: Box::new(redb::Error::Io(e)),
        })?;
        has_reached(path, &db, marked)?;
        let commits = u64::from(prepare(&db)?);
        mark.set(last_commit(&db)?);
        let tables = load(&db)?;
        for (key, why) in &tables.damaged {
            tracing::error!(%key, %why, "an entry of the registry is damaged and left out");
        }
        let feed = Feed::new(saved::read(&db, last_commit(&db)?)?, &tables);
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { next: tables.clone(), ..Queue::default() }),
            wake: Condvar::new(),
            feed,
            durable: RwLock::new(tables),
            commits: AtomicU64::new(commits),
            db: RwLock::new(Some(db)),
        });
        let writer = Writer { path: path.to_owned(), mark, shared: shared.clone() };
        let thread = std::thread::Builder::new().name("registry".into());
        let writer = thread.spawn(move || writer.run()).map_err(|e| RegistryError::Open {
            path: path.to_owned(),
            source: Box::new(redb::Error::Io(e)),
        })?;
        Ok(Self { shared, writer: Some(writer) })
    }

    /// Write transactions made so far.
    pub(super) fn commits(&self) -> u64 {
        self.shared.commits.load(Ordering::Relaxed)
    }

    /// What was changed, for whoever follows it.
    pub(super) fn feed(&self) -> &Arc<Feed> {
        &self.shared.feed
    }

    /// Looks at what is on disk.
    pub(super) fn read<T>(&self, look: impl FnOnce(&Tables) -> T) -> T {
        look(&self.shared.durable.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Shows the entries of the audit log, newest first, for as long as `more` wants: all of them,
    /// or those before the one of that number.
    pub(super) fn audit_back(
        &self,
        before: Option<u64>,
        mut more: impl FnMut(AuditEntry) -> bool,
    ) -> Result<()> {
        self.shared.with_db(|db| {
            let tx = db.begin_read()?;
            let end = format!("{:020}", before.unwrap_or(u64::MAX));
            for entry in tx.open_table(AUDIT)?.range(..end.as_str())?.rev() {
                let (key, value) = entry?;
                let entry = serde_json::from_slice(value.value()).map_err(|source| {
                    RegistryError::Damaged { key: format!("audit/{}", key.value()), source }
                })?;
                if !more(entry) {
                    return Ok(());
                }
            }
            Ok(())
        })
    }

    /// Makes the changes that `plan` names and returns when they are on disk. A plan that fails
    /// changes nothing; one that names no change costs no transaction.
    pub(super) fn write<T>(
        &self,
        plan: impl FnOnce(&Tables, &mut Vec<Change>) -> Result<T>,
    ) -> Result<T> {
        let mut queue = self.shared.queue();
        let mut changes = Vec::new();
        let out = plan(&queue.next, &mut changes)?;
        if changes.is_empty() && !queue.writing && queue.jobs.is_empty() {
            return Ok(out);
        }
        // With no change of its own it waits for those that it has seen.
        let rows = changes.iter().map(row).collect::<Result<Vec<_>>>()?;
        for change in &changes {
            queue.next.apply(change);
        }
        let (done, end) = mpsc::sync_channel(1);
        queue.jobs.push(Job { rows, changes, done });
        drop(queue);
        self.shared.wake.notify_one();
        wait(&end)?;
        Ok(out)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_one();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the registry's writer ended by a panic");
        }
    }
}

/// Waits for the writer; a worker thread of a runtime hands its other tasks to another meanwhile.
fn wait(end: &mpsc::Receiver<Result<()>>) -> Result<()> {
    use tokio::runtime::{Handle, RuntimeFlavor};
    let gone = |_| Err(RegistryError::Database(Arc::new(redb::Error::PreviousIo)));
    let wait = || end.recv().unwrap_or_else(gone);
    match Handle::try_current() {
        Ok(h) if h.runtime_flavor() == RuntimeFlavor::MultiThread => {
            tokio::task::block_in_place(wait)
        }
        _ => wait(),
    }
}

fn row(change: &Change) -> Result<Row> {
    fn made<T: Serialize>(table: Table, key: String, value: Option<&Arc<T>>) -> Result<Row> {
        let value = value
            .map(|v| serde_json::to_vec(&**v))
            .transpose()
            .map_err(|source| RegistryError::Damaged { key: key.clone(), source })?;
        Ok(Row { table, key, value })
    }
    match change {
        Change::Site(name, v) => made(SITES, name.to_string(), v.as_ref()),
        Change::Substrate(id, v) => made(SUBSTRATES, id.to_string(), v.as_ref()),
        Change::Vm(id, v) => made(VMS, id.to_string(), v.as_ref()),
        Change::Op(id, v) => made(OPS, id.to_string(), v.as_ref()),
        Change::Deleted(id, v) => made(DELETED, id.to_string(), v.as_ref()),
        Change::Tenant(name, v) => made(TENANTS, name.to_string(), v.as_ref()),
        Change::User(id, v) => made(USERS, id.to_string(), v.as_ref()),
        Change::Token(id, v) => made(TOKENS, id.clone(), v.as_ref()),
        Change::Network(id, v) => made(NETWORKS, id.to_string(), v.as_ref()),
        Change::Audit(e) => made(AUDIT, format!("{:020}", e.number), Some(e)),
    }
}

struct Writer {
    path: PathBuf,
    mark: CommitMark,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(mut self) {
        loop {
            let jobs = {
                let mut queue = self.shared.queue();
                while queue.jobs.is_empty() && !queue.closed {
                    queue = self.shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                if queue.jobs.is_empty() {
                    return;
                }
                queue.writing = true;
                std::mem::take(&mut queue.jobs)
            };
            // A writer that is gone would leave everybody waiting.
            let done =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.commit(&jobs)))
                    .unwrap_or_else(|_| {
                        Err(RegistryError::Database(Arc::new(redb::Error::PreviousIo)))
                    });
            match done {
                Ok(batch) => self.succeeded(jobs, batch),
                Err(e) => self.failed(jobs, &e),
            }
        }
    }

    /// Answers with what the feed has to tell, if anything was written.
    fn commit(&mut self, jobs: &[Job]) -> Result<Option<Batch>> {
        if jobs.iter().all(|j| j.rows.is_empty()) {
            return Ok(None);
        }
        if self.shared.db.read().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.reopen()?;
        }
        let batch = {
            let durable = self.shared.durable.read().unwrap_or_else(PoisonError::into_inner);
            let changes = jobs.iter().flat_map(|j| j.changes.iter().zip(&j.rows));
            let bytes = |r: &Row| r.value.as_ref().map_or(0, Vec::len);
            self.shared.feed.plan(&durable, changes.map(|(c, r)| (c, bytes(r))))
        };
        let n = self.shared.with_db(|db| {
            self.shared.commits.fetch_add(1, Ordering::Relaxed);
            let tx = db.begin_write()?;
            for row in jobs.iter().flat_map(|j| &j.rows) {
                put_row(&tx, row)?;
            }
            let n = count(&tx)?;
            saved::write(&tx, &batch, n)?;
            tx.commit()?;
            Ok(n)
        })?;
        self.mark.set(n);
        Ok(Some(batch))
    }

    fn succeeded(&self, jobs: Vec<Job>, batch: Option<Batch>) {
        {
            let mut durable = self.shared.durable.write().unwrap_or_else(PoisonError::into_inner);
            for change in jobs.iter().flat_map(|j| &j.changes) {
                durable.apply(change);
            }
        }
        // Whoever is batch of a change finds it.
        if let Some(batch) = batch {
            self.shared.feed.publish(batch);
        }
        self.shared.queue().writing = false;
        for job in jobs {
            // Fails only when the caller is gone.
            let _ = job.done.send(Ok(()));
        }
    }

    /// Everything that was queued meanwhile was planned on top of what failed.
    fn failed(&mut self, mut jobs: Vec<Job>, error: &RegistryError) {
        self.shared.set_db(None);
        let mut queue = self.shared.queue();
        jobs.append(&mut queue.jobs);
        let reopened = open_db(&self.path).and_then(|db| {
            let saved = saved::read(&db, last_commit(&db)?)?;
            load(&db).map(|tables| (db, tables, saved))
        });
        let mut durable = self.shared.durable.write().unwrap_or_else(PoisonError::into_inner);
        match reopened {
            Ok((db, tables, saved)) => {
                self.shared.set_db(Some(db));
                if !tables.same_rows(&durable) {
                    // No number that a reader has seen stands for these rows.
                    let revision = durable.revision;
                    *durable = tables;
                    durable.renumber(revision + 1);
                }
                self.shared.feed.reopened(saved);
            }
            Err(error) => {
                let error = godwit_types::chain(&error);
                tracing::error!(%error, "the registry is not usable for now");
            }
        }
        queue.next = durable.clone();
        queue.writing = false;
        drop((durable, queue));
        for job in jobs {
            let _ = job.done.send(Err(error.again()));
        }
    }

    /// Opens the database anew; what it holds must be what is believed.
    fn reopen(&mut self) -> Result<()> {
        let db = open_db(&self.path)?;
        let tables = load(&db)?;
        let same = {
            let durable = self.shared.durable.read().unwrap_or_else(PoisonError::into_inner);
            tables.same_rows(&durable)
        };
        if !same {
            // `failed` reads it again.
            return Err(RegistryError::Database(Arc::new(redb::Error::PreviousIo)));
        }
        self.shared.set_db(Some(db));
        Ok(())
    }
}

fn put_row(tx: &WriteTransaction, row: &Row) -> Result<()> {
    let mut table = tx.open_table(row.table)?;
    match &row.value {
        Some(bytes) => {
            table.insert(row.key.as_str(), bytes.as_slice())?;
        }
        None => {
            table.remove(row.key.as_str())?;
        }
    }
    Ok(())
}

fn open_db(path: &Path) -> Result<Database> {
    // Every page has a checksum; without the check redb trusts what it reads.
    Database::builder()
        .set_check_integrity_on_open(true)
        .create(path)
        .map_err(|e| RegistryError::Open { path: path.to_owned(), source: Box::new(e.into()) })
}

/// The number of the last transaction; none in a file that does not count them yet.
fn last_commit(db: &Database) -> Result<u64> {
    let tx = db.begin_read()?;
    match tx.open_table(META) {
        Ok(meta) => number(meta.get(LAST)?.map(|v| v.value().to_vec())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

fn number(bytes: Option<Vec<u8>>) -> Result<u64> {
    let Some(bytes) = bytes else { return Ok(0) };
    match bytes.first_chunk() {
        Some(n) if bytes.len() == 8 => Ok(u64::from_le_bytes(*n)),
        _ => Err(RegistryError::Damaged {
            key: LAST.into(),
            source: serde::de::Error::custom("it is no number"),
        }),
    }
}

/// Gives a transaction its number.
pub(super) fn count(tx: &WriteTransaction) -> Result<u64> {
    let mut meta = tx.open_table(META)?;
    let n = number(meta.get(LAST)?.map(|v| v.value().to_vec()))? + 1;
    meta.insert(LAST, n.to_le_bytes().as_slice())?;
    Ok(n)
}

/// Refuses a file that lacks the last transaction alone: that is what the database does without a
/// word when its newest commit is damaged. One that lacks more was brought back from a copy.
fn has_reached(path: &Path, db: &Database, marked: Marked) -> Result<()> {
    let wanted = match marked {
        Marked::At(wanted) => wanted,
        Marked::Nothing => return Ok(()),
        Marked::Damaged => {
            tracing::warn!(path = %path.display(), "the registry's mark is damaged: whether the registry has fallen back is not known; written anew");
            return Ok(());
        }
    };
    let found = last_commit(db)?;
    match wanted.saturating_sub(found) {
        0 => Ok(()),
        1 => Err(RegistryError::FellBack { path: path.to_owned(), wanted, found }),
        _ => {
            tracing::warn!(path = %path.display(), wanted, found, "the registry is older than it was: taken for one that was brought back from a copy");
            Ok(())
        }
    }
}

/// Makes the tables of a new file and brings one of an earlier format to this one, in one
/// transaction. Answers whether it wrote.
fn prepare(db: &Database) -> Result<bool> {
    let found = {
        let tx = db.begin_read()?;
        match tx.open_table(META) {
            Ok(meta) => meta.get("format")?.map(|v| v.value().to_vec()),
            Err(redb::TableError::TableDoesNotExist(_)) => None,
            Err(e) => return Err(e.into()),
        }
    };
    match found.as_deref() {
        Some(FORMAT) => return own_private_now(db),
        None | Some(b"1" | b"2" | b"3") => {}
        Some(other) => {
            return Err(RegistryError::Format {
                found: String::from_utf8_lossy(other).escape_debug().to_string(),
            });
        }
    }
    let tx = db.begin_write()?;
    for t in [SITES, SUBSTRATES, VMS, OPS, DELETED, TENANTS, USERS, TOKENS, AUDIT, NETWORKS] {
        tx.open_table(t)?;
    }
    if found.as_deref() != Some(b"3") {
        let all = TenantRecord::new(crate::principal::default_tenant());
        let key = all.name.to_string();
        let bytes = serde_json::to_vec(&all)
            .map_err(|source| RegistryError::Damaged { key: key.clone(), source })?;
        tx.open_table(TENANTS)?.insert(key.as_str(), bytes.as_slice())?;
    }
    default_networks(&tx)?;
    if !matches!(found.as_deref(), Some(b"2" | b"3")) {
        let mut sites = tx.open_table(SITES)?;
        let mut rows = Vec::new();
        for entry in sites.iter()? {
            let (k, v) = entry?;
            // One that does not parse stays as it is, to be named.
            if let Ok(row) = serde_json::from_slice::<SiteRow>(v.value()) {
                rows.push((k.value().to_owned(), row));
            }
        }
        for (key, row) in rows {
            let ended = row.lease_until.0.saturating_sub(super::LEASE.as_millis() as u64);
            let row = SiteRow { last_seen: UnixMs(ended), ..row };
            let bytes = serde_json::to_vec(&row)
                .map_err(|source| RegistryError::Damaged { key: key.clone(), source })?;
            sites.insert(key.as_str(), bytes.as_slice())?;
        }
    }
    own_private(&tx, &not_owned(&db.begin_read()?)?)?;
    for old in OLD_NAMES {
        tx.delete_table(old)?;
    }
    tx.open_table(META)?.insert("format", FORMAT)?;
    count(&tx)?;
    godwit_hold::at_blocking("registry.upgrading");
    tx.commit()?;
    Ok(true)
}

/// Gives each tenant the network that it has from the start.
fn default_networks(tx: &WriteTransaction) -> Result<()> {
    let (tenants, mut networks) = (tx.open_table(TENANTS)?, tx.open_table(NETWORKS)?);
    for entry in tenants.iter()? {
        // One that does not parse is named when it is loaded.
        if let Ok(t) = serde_json::from_slice::<TenantRecord>(entry?.1.value()) {
            let network = super::NetworkRecord::default_of(&t.name);
            let key = network.id.to_string();
            let bytes = serde_json::to_vec(&network)
                .map_err(|source| RegistryError::Damaged { key: key.clone(), source })?;
            networks.insert(key.as_str(), bytes.as_slice())?;
        }
    }
    Ok(())
}

/// Machines of private substrates that do not say whose they are, with those owners: no machine said
/// so before format 3, nor did those of its first builds.
fn not_owned(tx: &redb::ReadTransaction) -> Result<Vec<(String, super::VmRecord)>> {
    let (mut private, mut found) = (std::collections::HashMap::new(), Vec::new());
    let rows = |table| match tx.open_table(table) {
        Ok(rows) => Ok(Some(rows)),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(e) => Err(e),
    };
    let (Some(substrates), Some(vms)) = (rows(SUBSTRATES)?, rows(VMS)?) else { return Ok(found) };
    for entry in substrates.iter()? {
        // One that does not parse is named when it is loaded.
        if let Ok(s) = serde_json::from_slice::<super::SubstrateRecord>(entry?.1.value())
            && let Some(owner) = s.private_of()
        {
            private.insert(s.id, (s.tenant.clone(), owner.clone()));
        }
    }
    if private.is_empty() {
        return Ok(found);
    }
    for entry in vms.iter()? {
        let (k, v) = entry?;
        if let Ok(mut vm) = serde_json::from_slice::<super::VmRecord>(v.value())
            && vm.private_of.is_none()
            && let Some((tenant, owner)) = vm.substrate.and_then(|s| private.get(&s))
        {
            // The name of a user says who that is in its tenant alone; in another, an operator has
            // activated it.
            let of =
                if vm.tenant == *tenant { owner.clone() } else { crate::principal::operator() };
            vm.private_of = Some(of);
            found.push((k.value().to_owned(), vm));
        }
    }
    Ok(found)
}

fn own_private(tx: &WriteTransaction, owned: &[(String, super::VmRecord)]) -> Result<()> {
    let mut vms = tx.open_table(VMS)?;
    for (key, vm) in owned {
        let bytes = serde_json::to_vec(vm)
            .map_err(|source| RegistryError::Damaged { key: key.clone(), source })?;
        vms.insert(key.as_str(), bytes.as_slice())?;
    }
    Ok(())
}

/// The same in a file of this format. Answers whether it wrote.
fn own_private_now(db: &Database) -> Result<bool> {
    let owned = not_owned(&db.begin_read()?)?;
    if owned.is_empty() {
        return Ok(false);
    }
    let tx = db.begin_write()?;
    own_private(&tx, &owned)?;
    count(&tx)?;
    tx.commit()?;
    Ok(true)
}

fn load(db: &Database) -> Result<Tables> {
    fn rows<T: DeserializeOwned>(
        tx: &redb::ReadTransaction,
        table: Table,
        tables: &mut Tables,
        enter: impl Fn(Arc<T>) -> Change,
    ) -> Result<()> {
        let rows = match tx.open_table(table) {
            Ok(rows) => rows,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for entry in rows.iter()? {
            let (k, v) = entry?;
            match serde_json::from_slice::<T>(v.value()) {
                Ok(row) => tables.apply(&enter(Arc::new(row))),
                Err(e) => {
                    tables.damaged.insert(k.value().to_owned(), e.to_string());
                }
            }
        }
        Ok(())
    }
    let tx = db.begin_read()?;
    let mut t = Tables::default();
    rows(&tx, SITES, &mut t, |r: Arc<SiteRow>| Change::Site(r.name.clone(), Some(r)))?;
    rows(&tx, SUBSTRATES, &mut t, |r: Arc<super::SubstrateRecord>| {
        Change::Substrate(r.id, Some(r))
    })?;
    rows(&tx, NETWORKS, &mut t, |r: Arc<super::NetworkRecord>| Change::Network(r.id, Some(r)))?;
    rows(&tx, VMS, &mut t, |r: Arc<super::VmRecord>| Change::Vm(r.id, Some(r)))?;
    rows(&tx, OPS, &mut t, |r: Arc<super::OpRecord>| Change::Op(r.id, Some(r)))?;
    rows(&tx, DELETED, &mut t, |r: Arc<super::DeletedVm>| Change::Deleted(r.vm, Some(r)))?;
    rows(&tx, TENANTS, &mut t, |r: Arc<TenantRecord>| Change::Tenant(r.name.clone(), Some(r)))?;
    rows(&tx, USERS, &mut t, |r: Arc<UserRecord>| Change::User(r.id.clone(), Some(r)))?;
    rows(&tx, TOKENS, &mut t, |r: Arc<TokenRecord>| Change::Token(r.id.clone(), Some(r)))?;
    match tx.open_table(AUDIT) {
        Ok(audit) => {
            if let Some(last) = audit.last()? {
                match serde_json::from_slice::<AuditEntry>(last.1.value()) {
                    Ok(e) => t.apply(&Change::Audit(Arc::new(e))),
                    // What comes next would not hold on to anything.
                    Err(source) => {
                        let key = format!("audit/{}", last.0.value());
                        return Err(RegistryError::Damaged { key, source });
                    }
                }
            }
        }
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(t)
}
