//! The registry: sites, substrates, execution environments and operations, in one
//! embedded database file (redb).
//!
//! Every change is one transaction that is on disk when the call returns, so a daemon that is
//! killed at any moment finds a whole state. A change of an execution environment carries the
//! generation its author believes in; an older one is refused ([`RegistryError::Fenced`]), which
//! is what keeps a machine from being claimed by two places.
//!
//! After an input or output error, as on a full disk, the database is opened anew and comes up
//! with the last change that is whole: the call fails, and the next one finds a registry.
//!
//! Values are JSON: new optional fields do not break an older file, and an operator can read it.
//! Calls block for one `fsync`; they are short and never made while a machine stands still.

mod records;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use godwit_types::{Code, CodedError, Generation, Hash, Name, OpId, SubstrateId, VmId};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use records::{
    Arriving, OpRecord, SiteRecord, SiteReport, Step, StepState, SubstrateRecord, VmRecord,
};

use crate::clock::UnixMs;

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

const META: Table = TableDefinition::new("meta");
const SITES: Table = TableDefinition::new("sites");
const SUBSTRATES: Table = TableDefinition::new("substrates");
const SUBSTRATE_NAMES: Table = TableDefinition::new("substrate-names");
const VMS: Table = TableDefinition::new("vms");
const VM_NAMES: Table = TableDefinition::new("vm-names");
const OPS: Table = TableDefinition::new("ops");

/// Version of the layout. 1: the first.
const FORMAT: &[u8] = b"1";

/// Finished operations that are kept; the oldest go first.
pub const KEPT_OPS: usize = 1000;

/// Why the registry refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The file cannot be used.
    #[error("opening the registry {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<redb::Error>,
    },
    /// The file was written by a version with another layout.
    #[error("the registry has format {found}, this version knows format 1")]
    Format {
        /// What the file says.
        found: String,
    },
    /// The database failed.
    #[error("reading or writing the registry")]
    Database(#[source] Box<redb::Error>),
    /// A value does not parse.
    #[error("the registry's entry '{key}' is damaged")]
    Damaged {
        /// Its key.
        key: String,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// No such object.
    #[error("no {what} '{key}'")]
    NotFound {
        /// Kind of object.
        what: &'static str,
        /// Its name or id.
        key: String,
    },
    /// The name is taken.
    #[error("{what} '{key}' exists already")]
    Exists {
        /// Kind of object.
        what: &'static str,
        /// Its name.
        key: String,
    },
    /// An older generation tried to act.
    #[error("machine '{name}' is at generation {current}; generation {given} may no longer act")]
    Fenced {
        /// The machine.
        name: Name,
        /// What the registry has.
        current: Generation,
        /// What the caller had.
        given: Generation,
    },
    /// The state table forbids it.
    #[error(transparent)]
    Transition(#[from] godwit_types::InvalidTransition),
    /// The object is in use.
    #[error("{0}")]
    Busy(String),
    /// A site holds something else under a substrate's id.
    #[error("site '{site}' holds {found} under the id of substrate '{name}', which is {wanted}")]
    OtherContent {
        /// The site.
        site: Name,
        /// The substrate.
        name: Name,
        /// The content that its id stands for.
        wanted: Hash,
        /// What the site has.
        found: Hash,
    },
    /// The site is no longer trusted.
    #[error("site '{0}' was revoked")]
    Revoked(Name),
}

impl CodedError for RegistryError {
    fn code(&self) -> Code {
        match self {
            Self::Open { source, .. } | Self::Database(source) if is_full(source) => Code::NoRoom,
            Self::Open { source, .. } | Self::Database(source)
                if matches!(**source, redb::Error::Corrupted(_)) =>
            {
                Code::Damaged
            }
            Self::Open { .. } | Self::Database(_) => Code::Internal,
            Self::Format { .. } | Self::Damaged { .. } | Self::OtherContent { .. } => Code::Damaged,
            Self::NotFound { .. } => Code::NotFound,
            Self::Exists { .. } => Code::Exists,
            Self::Fenced { .. } => Code::Fenced,
            Self::Transition(_) | Self::Busy(_) => Code::Conflict,
            Self::Revoked(_) => Code::Unauthenticated,
        }
    }
}

fn is_full(e: &redb::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(e, redb::Error::Io(e) if matches!(e.kind(), StorageFull | QuotaExceeded))
}

macro_rules! from_redb {
    ($($t:ty),+) => { $(
        impl From<$t> for RegistryError {
            fn from(e: $t) -> Self { Self::Database(Box::new(e.into())) }
        }
    )+ };
}
from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);

type Result<T> = std::result::Result<T, RegistryError>;

/// The registry of one center.
#[derive(Debug)]
pub struct Registry {
    path: PathBuf,
    /// None while it could not be opened anew.
    db: RwLock<Option<Database>>,
}

fn put<T: Serialize>(tx: &WriteTransaction, table: Table, key: &str, value: &T) -> Result<()> {
    let bytes = serde_json::to_vec(value)
        .map_err(|source| RegistryError::Damaged { key: key.to_owned(), source })?;
    tx.open_table(table)?.insert(key, bytes.as_slice())?;
    Ok(())
}

fn take<T: DeserializeOwned>(tx: &WriteTransaction, table: Table, key: &str) -> Result<Option<T>> {
    tx.open_table(table)?.get(key)?.map(|v| parse(key, v.value())).transpose()
}

fn parse<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|source| RegistryError::Damaged { key: key.to_owned(), source })
}

/// The oldest that a report may be when it arrives, in milliseconds.
const REPORT_AGE_MS: u64 = 30_000;

impl Registry {
    /// Opens the file, making it if it is not there.
    ///
    /// # Errors
    /// When the file is held by another daemon, damaged, or of another format.
    pub fn open(path: &Path) -> Result<Self> {
        let db = Self::open_db(path)?;
        let tx = db.begin_write()?;
        {
            let mut meta = tx.open_table(META)?;
            let found = meta.get("format")?.map(|v| v.value().to_vec());
            match found {
                Some(f) if f != FORMAT => {
                    return Err(RegistryError::Format {
                        found: String::from_utf8_lossy(&f).escape_debug().to_string(),
                    });
                }
                Some(_) => {}
                None => {
                    meta.insert("format", FORMAT)?;
                }
            }
            for t in [SITES, SUBSTRATES, SUBSTRATE_NAMES, VMS, VM_NAMES, OPS] {
                tx.open_table(t)?;
            }
        }
        tx.commit()?;
        Ok(Self { path: path.to_owned(), db: RwLock::new(Some(db)) })
    }

    fn open_db(path: &Path) -> Result<Database> {
        // Every page has a checksum; without the check redb trusts what it reads.
        Database::builder()
            .set_check_integrity_on_open(true)
            .create(path)
            .map_err(|e| RegistryError::Open { path: path.to_owned(), source: Box::new(e.into()) })
    }

    fn run<T>(&self, f: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        if self.opened().is_none() {
            self.reopen()?;
        }
        let result = match self.opened().as_ref() {
            Some(db) => f(db),
            None => Err(RegistryError::Database(Box::new(redb::Error::PreviousIo))),
        };
        if let Err(RegistryError::Database(e)) = &result
            && matches!(**e, redb::Error::Io(_) | redb::Error::PreviousIo)
            && let Err(error) = self.reopen()
        {
            tracing::error!(%error, "the registry is not usable for now");
        }
        result
    }

    fn opened(&self) -> std::sync::RwLockReadGuard<'_, Option<Database>> {
        self.db.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the database anew.
    fn reopen(&self) -> Result<()> {
        let mut guard = self.db.write().unwrap_or_else(PoisonError::into_inner);
        // It holds a lock on the file.
        drop(guard.take());
        *guard = Some(Self::open_db(&self.path)?);
        Ok(())
    }

    fn get<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<T>> {
        self.run(|db| {
            let tx = db.begin_read()?;
            tx.open_table(table)?.get(key)?.map(|v| parse(key, v.value())).transpose()
        })
    }

    fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<T>> {
        self.run(|db| {
            let tx = db.begin_read()?;
            let mut out = Vec::new();
            for entry in tx.open_table(table)?.iter()? {
                let (k, v) = entry?;
                out.push(parse(k.value(), v.value())?);
            }
            Ok(out)
        })
    }

    fn write<T>(&self, f: impl FnOnce(&WriteTransaction) -> Result<T>) -> Result<T> {
        self.run(|db| {
            let tx = db.begin_write()?;
            let out = f(&tx)?;
            tx.commit()?;
            Ok(out)
        })
    }

    // ---- sites -------------------------------------------------------------------------

    /// All sites.
    ///
    /// # Errors
    /// When the database fails.
    pub fn sites(&self) -> Result<Vec<SiteRecord>> {
        self.all(SITES)
    }

    /// One site.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn site(&self, name: &Name) -> Result<SiteRecord> {
        self.get(SITES, name.as_str())?
            .ok_or_else(|| RegistryError::NotFound { what: "site", key: name.to_string() })
    }

    /// Enters a site, or renews the entry of one that joins again.
    ///
    /// # Errors
    /// When the database fails.
    pub fn site_put(&self, site: &SiteRecord) -> Result<()> {
        self.write(|tx| put(tx, SITES, site.name.as_str(), site))
    }

    /// Takes a site's report and gives it a fresh lease of `ttl` from `now`. A report cannot
    /// shorten a lease, and a revoked site gets none.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; [`RegistryError::Revoked`].
    pub fn site_report(
        &self,
        name: &Name,
        report: SiteReport,
        now: UnixMs,
        ttl: Duration,
    ) -> Result<SiteRecord> {
        self.write(|tx| {
            let mut site: SiteRecord = take(tx, SITES, name.as_str())?
                .ok_or_else(|| RegistryError::NotFound { what: "site", key: name.to_string() })?;
            if site.revoked {
                return Err(RegistryError::Revoked(name.clone()));
            }
            site.lease_until = site.lease_until.max(now.plus(ttl));
            // What a site holds is known from its own word; the substrate table follows it.
            let mut rows: Vec<SubstrateRecord> = Vec::new();
            for entry in tx.open_table(SUBSTRATES)?.iter()? {
                let (k, v) = entry?;
                rows.push(parse(k.value(), v.value())?);
            }
            for mut s in rows {
                let changed = if report.substrates.contains(&s.id) {
                    s.holders.insert(name.clone())
                } else if now.0.saturating_sub(s.created.0) < REPORT_AGE_MS {
                    // The report may have been made before the substrate was.
                    false
                } else {
                    s.holders.remove(name)
                };
                if changed {
                    put(tx, SUBSTRATES, &s.id.to_string(), &s)?;
                }
            }
            site.report = report;
            put(tx, SITES, name.as_str(), &site)?;
            Ok(site)
        })
    }

    /// Marks a site as no longer trusted.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn site_revoke(&self, name: &Name) -> Result<()> {
        self.site_trust(name, false)
    }

    /// Marks a revoked site as trusted again: it has joined anew.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn site_readmit(&self, name: &Name) -> Result<()> {
        self.site_trust(name, true)
    }

    fn site_trust(&self, name: &Name, trusted: bool) -> Result<()> {
        self.write(|tx| {
            let mut site: SiteRecord = take(tx, SITES, name.as_str())?
                .ok_or_else(|| RegistryError::NotFound { what: "site", key: name.to_string() })?;
            site.revoked = !trusted;
            put(tx, SITES, name.as_str(), &site)
        })
    }

    // ---- substrates --------------------------------------------------------------------

    /// All substrates.
    ///
    /// # Errors
    /// When the database fails.
    pub fn substrates(&self) -> Result<Vec<SubstrateRecord>> {
        self.all(SUBSTRATES)
    }

    /// A substrate by name or id.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn substrate(&self, key: &str) -> Result<SubstrateRecord> {
        let missing = || RegistryError::NotFound { what: "substrate", key: shown(key) };
        let id = match key.parse::<SubstrateId>() {
            Ok(id) => id,
            Err(_) => self.get(SUBSTRATE_NAMES, key)?.ok_or_else(missing)?,
        };
        self.get(SUBSTRATES, &id.to_string())?.ok_or_else(missing)
    }

    /// Enters a new substrate.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when the name or id is taken.
    pub fn substrate_add(&self, s: &SubstrateRecord) -> Result<()> {
        self.write(|tx| {
            if take::<SubstrateId>(tx, SUBSTRATE_NAMES, s.name.as_str())?.is_some()
                || take::<SubstrateRecord>(tx, SUBSTRATES, &s.id.to_string())?.is_some()
            {
                return Err(RegistryError::Exists { what: "substrate", key: s.name.to_string() });
            }
            put(tx, SUBSTRATE_NAMES, s.name.as_str(), &s.id)?;
            put(tx, SUBSTRATES, &s.id.to_string(), s)
        })
    }

    /// Adds or removes one holder.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn substrate_holder(&self, id: SubstrateId, site: &Name, holds: bool) -> Result<()> {
        self.write(|tx| {
            let mut s: SubstrateRecord =
                take(tx, SUBSTRATES, &id.to_string())?.ok_or_else(|| RegistryError::NotFound {
                    what: "substrate",
                    key: id.to_string(),
                })?;
            if holds {
                s.holders.insert(site.clone());
            } else {
                s.holders.remove(site);
                s.damaged.remove(site);
            }
            put(tx, SUBSTRATES, &id.to_string(), &s)
        })
    }

    /// Enters `site` as a holder of a substrate with this content. The first to tell of a substrate
    /// says what its content is. Writes only what is new.
    ///
    /// # Errors
    /// [`RegistryError::OtherContent`]: the site holds something else, and is no holder.
    pub fn substrate_seen(
        &self,
        id: SubstrateId,
        site: &Name,
        content: Hash,
    ) -> Result<SubstrateRecord> {
        let not_found = || RegistryError::NotFound { what: "substrate", key: id.to_string() };
        let old: SubstrateRecord = self.get(SUBSTRATES, &id.to_string())?.ok_or_else(not_found)?;
        if let Some(wanted) = old.content.filter(|wanted| *wanted != content) {
            if old.holders.contains(site) {
                self.substrate_holder(id, site, false)?;
            }
            let (site, name) = (site.clone(), old.name);
            return Err(RegistryError::OtherContent { site, name, wanted, found: content });
        }
        self.substrate_change(id, |s| {
            s.holders.insert(site.clone());
            s.content = Some(content);
        })
    }

    /// Takes a site's word of which substrates are damaged there. Writes only what is new.
    ///
    /// # Errors
    /// When the database fails.
    pub fn substrates_damaged(
        &self,
        site: &Name,
        damaged: &BTreeMap<SubstrateId, String>,
    ) -> Result<()> {
        for s in self.substrates()? {
            if s.damaged.get(site) != damaged.get(&s.id) {
                self.substrate_change(s.id, |s| match damaged.get(&s.id) {
                    Some(why) => drop(s.damaged.insert(site.clone(), why.clone())),
                    None => drop(s.damaged.remove(site)),
                })?;
            }
        }
        Ok(())
    }

    fn substrate_change(
        &self,
        id: SubstrateId,
        change: impl Fn(&mut SubstrateRecord),
    ) -> Result<SubstrateRecord> {
        let old = self.substrate(&id.to_string())?;
        let mut new = old.clone();
        change(&mut new);
        if new == old {
            return Ok(old);
        }
        self.write(|tx| {
            let key = id.to_string();
            let mut s: SubstrateRecord = take(tx, SUBSTRATES, &key)?
                .ok_or_else(|| RegistryError::NotFound { what: "substrate", key: key.clone() })?;
            change(&mut s);
            put(tx, SUBSTRATES, &key, &s)?;
            Ok(s)
        })
    }

    /// Forgets a substrate that no environment was activated from.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] that names an environment which still maps its memory.
    pub fn substrate_remove(&self, id: SubstrateId) -> Result<()> {
        self.write(|tx| {
            let s: SubstrateRecord = take(tx, SUBSTRATES, &id.to_string())?.ok_or_else(|| {
                RegistryError::NotFound { what: "substrate", key: id.to_string() }
            })?;
            if let Some(vm) = Self::vm_using(tx, id)? {
                return Err(RegistryError::Busy(format!(
                    "substrate '{}' is in use by machine '{vm}'",
                    s.name
                )));
            }
            tx.open_table(SUBSTRATES)?.remove(id.to_string().as_str())?;
            tx.open_table(SUBSTRATE_NAMES)?.remove(s.name.as_str())?;
            Ok(())
        })
    }

    fn vm_using(tx: &WriteTransaction, id: SubstrateId) -> Result<Option<Name>> {
        for entry in tx.open_table(VMS)?.iter()? {
            let (k, v) = entry?;
            let vm: VmRecord = parse(k.value(), v.value())?;
            if vm.substrate == Some(id) {
                return Ok(Some(vm.name));
            }
        }
        Ok(None)
    }

    // ---- execution environments --------------------------------------------------------

    /// All execution environments.
    ///
    /// # Errors
    /// When the database fails.
    pub fn vms(&self) -> Result<Vec<VmRecord>> {
        self.all(VMS)
    }

    /// An execution environment by name or id.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn vm(&self, key: &str) -> Result<VmRecord> {
        let missing = || RegistryError::NotFound { what: "machine", key: shown(key) };
        let id = match key.parse::<VmId>() {
            Ok(id) => id,
            Err(_) => self.get(VM_NAMES, key)?.ok_or_else(missing)?,
        };
        self.get(VMS, &id.to_string())?.ok_or_else(missing)
    }

    /// Enters a new execution environment.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when the name is taken.
    pub fn vm_add(&self, vm: &VmRecord) -> Result<()> {
        self.write(|tx| {
            if take::<VmId>(tx, VM_NAMES, vm.name.as_str())?.is_some() {
                return Err(RegistryError::Exists { what: "machine", key: vm.name.to_string() });
            }
            put(tx, VM_NAMES, vm.name.as_str(), &vm.id)?;
            put(tx, VMS, &vm.id.to_string(), vm)
        })
    }

    /// Changes an execution environment, if `generation` is the one the registry has. `change`
    /// may fail, and then nothing is written.
    ///
    /// # Errors
    /// [`RegistryError::Fenced`] for another generation; whatever `change` refuses.
    pub fn vm_update(
        &self,
        id: VmId,
        generation: Generation,
        change: impl FnOnce(&mut VmRecord) -> Result<()>,
    ) -> Result<VmRecord> {
        self.write(|tx| {
            let mut vm = Self::fence(tx, id, generation)?;
            let (key, name) = (vm.id, vm.name.clone());
            change(&mut vm)?;
            debug_assert!(vm.id == key && vm.name == name, "identity of a machine is fixed");
            if vm.generation < generation {
                return Err(RegistryError::Fenced {
                    name,
                    current: generation,
                    given: vm.generation,
                });
            }
            put(tx, VMS, &id.to_string(), &vm)?;
            Ok(vm)
        })
    }

    /// Forgets an execution environment, if `generation` is the one the registry has.
    ///
    /// # Errors
    /// As [`Registry::vm_update`].
    pub fn vm_remove(&self, id: VmId, generation: Generation) -> Result<()> {
        self.write(|tx| {
            let vm = Self::fence(tx, id, generation)?;
            tx.open_table(VMS)?.remove(id.to_string().as_str())?;
            tx.open_table(VM_NAMES)?.remove(vm.name.as_str())?;
            Ok(())
        })
    }

    fn fence(tx: &WriteTransaction, id: VmId, given: Generation) -> Result<VmRecord> {
        let vm: VmRecord = take(tx, VMS, &id.to_string())?
            .ok_or_else(|| RegistryError::NotFound { what: "machine", key: id.to_string() })?;
        if vm.generation == given {
            Ok(vm)
        } else {
            Err(RegistryError::Fenced { name: vm.name, current: vm.generation, given })
        }
    }

    // ---- operations --------------------------------------------------------------------

    /// All operations that are kept, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub fn ops(&self) -> Result<Vec<OpRecord>> {
        self.all(OPS)
    }

    /// One operation.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`], or when the database fails.
    pub fn op(&self, id: OpId) -> Result<OpRecord> {
        self.get(OPS, &id.to_string())?
            .ok_or_else(|| RegistryError::NotFound { what: "operation", key: id.to_string() })
    }

    /// Writes an operation as it is now. When one ends, the oldest finished ones beyond
    /// [`KEPT_OPS`] are dropped in the same transaction.
    ///
    /// # Errors
    /// When the database fails.
    pub fn op_put(&self, op: &OpRecord) -> Result<()> {
        self.write(|tx| {
            put(tx, OPS, &op.id.to_string(), op)?;
            if op.state.is_final() {
                let mut finished = Vec::new();
                for entry in tx.open_table(OPS)?.iter()? {
                    let (k, v) = entry?;
                    let o: OpRecord = parse(k.value(), v.value())?;
                    if o.state.is_final() {
                        finished.push(o.id);
                    }
                }
                let drop = finished.len().saturating_sub(KEPT_OPS);
                let mut table = tx.open_table(OPS)?;
                for id in finished.into_iter().take(drop) {
                    table.remove(id.to_string().as_str())?;
                }
            }
            Ok(())
        })
    }
}

/// A key from outside, safe to print.
fn shown(key: &str) -> String {
    key.chars().take(60).flat_map(char::escape_debug).collect()
}
