//! What the registry's file has of the change feed: the revision, the epochs, and the events of the
//! last transactions, each written with the changes that it tells of.

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::feed::{Batch, KEPT_BATCHES, Saved, Stored};
use super::layout::META;
use super::{RegistryError, Result};

/// The events of a transaction, by its number modulo [`KEPT_BATCHES`]: old ones are overwritten.
const EVENTS: TableDefinition<'static, &'static str, &'static [u8]> =
    TableDefinition::new("events");

/// In [`META`]: the revision, the number of the last transaction with events, and the number of
/// the last transaction of all, each 8 bytes.
const FEED: &str = "feed";

/// In [`META`]: the epochs.
const RUNS: &str = "feed-runs";

/// Reads it. What does not parse is as if it were not there: the feed then begins anew.
pub(super) fn read(db: &Database, last_commit: u64) -> Result<Saved> {
    let tx = db.begin_read()?;
    let meta = match tx.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Saved::default()),
        Err(e) => return Err(e.into()),
    };
    let numbers = meta.get(FEED)?.and_then(|v| {
        let (numbers, rest) = v.value().as_chunks::<8>();
        let numbers = <[[u8; 8]; 3]>::try_from(numbers).ok()?;
        rest.is_empty().then(|| numbers.map(u64::from_le_bytes))
    });
    let Some([revision, batch, commit]) = numbers else { return Ok(Saved::default()) };
    let mut saved = Saved { revision, batch, ..Saved::default() };
    if commit != last_commit {
        // A version that knows no feed has changed something since.
        return Ok(saved);
    }
    let runs = meta.get(RUNS)?.and_then(|v| serde_json::from_slice(v.value()).ok());
    saved.runs = runs.unwrap_or_default();
    match tx.open_table(EVENTS) {
        Ok(events) => {
            for entry in events.iter()? {
                saved.stored.extend(serde_json::from_slice::<Stored>(entry?.1.value()));
            }
        }
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(saved)
}

/// Writes what a transaction adds; `commit` is its number.
pub(super) fn write(tx: &WriteTransaction, batch: &Batch, commit: u64) -> Result<()> {
    fn json<T: serde::Serialize>(what: &T) -> Result<Vec<u8>> {
        let key = || EVENTS.to_string();
        serde_json::to_vec(what).map_err(|source| RegistryError::Damaged { key: key(), source })
    }
    let mut meta = tx.open_table(META)?;
    let numbers = [batch.revision, batch.number, commit].map(u64::to_le_bytes);
    meta.insert(FEED, numbers.as_flattened())?;
    if let Some(runs) = &batch.runs {
        meta.insert(RUNS, json(runs)?.as_slice())?;
    }
    if let Some(stored) = &batch.stored {
        let slot = format!("{:04}", batch.number % KEPT_BATCHES);
        tx.open_table(EVENTS)?.insert(slot.as_str(), json(stored)?.as_slice())?;
    }
    Ok(())
}
