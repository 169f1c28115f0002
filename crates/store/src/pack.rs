//! Pack files: units one behind the other, each with a head that names it.
//!
//! ```text
//! record: "GWU1" u8 encoding u8 0 u16 unit length u16 body length u16 0 | 32 bytes hash | body
//! ```
//!
//! One writer at a time appends to a pack; what it wrote counts once the index has committed the
//! new length. A writer that gives up cuts its pack back to the committed length.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use godwit_types::Hash;
use rustix::fs::Advice;

use crate::encode::{Encoder, Encoding};
use crate::error::StoreError;
use crate::index::Loc;
use crate::{UNIT, lock};

/// Bytes before a record's body.
pub(crate) const HEAD: usize = 44;
const MAGIC: &[u8; 4] = b"GWU1";

/// The head of a record.
pub(crate) fn head(hash: Hash, encoding: Encoding, raw: u16, body: u16) -> [u8; HEAD] {
    let mut h = [0; HEAD];
    h[..4].copy_from_slice(MAGIC);
    h[4] = encoding as u8;
    h[6..8].copy_from_slice(&raw.to_le_bytes());
    h[8..10].copy_from_slice(&body.to_le_bytes());
    h[12..].copy_from_slice(&hash.0);
    h
}

/// One of [`Records`], apart from its bytes.
pub(crate) struct Record {
    pub(crate) hash: Hash,
    pub(crate) encoding: Encoding,
    /// Bytes of the unit.
    pub(crate) raw: u16,
    /// Bytes of the body.
    body: u16,
}

/// Encoded units, each with its head in front, one behind the other as they lie in a pack.
#[derive(Default)]
pub(crate) struct Records {
    bytes: Vec<u8>,
    records: Vec<Record>,
}

impl Records {
    /// Room for `units` records of half a unit each.
    pub(crate) fn with_capacity(units: usize) -> Self {
        let bytes = Vec::with_capacity(units * (HEAD + UNIT / 2));
        Self { bytes, records: Vec::with_capacity(units) }
    }

    /// Encodes a unit and adds it.
    pub(crate) fn encode(&mut self, hash: Hash, unit: &[u8], encoder: &mut Encoder) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; HEAD]);
        let encoding = encoder.encode(unit, &mut self.bytes);
        let body = (self.bytes.len() - at - HEAD) as u16;
        let raw = unit.len() as u16;
        self.bytes[at..at + HEAD].copy_from_slice(&head(hash, encoding, raw, body));
        self.records.push(Record { hash, encoding, raw, body });
    }

    /// Adds a unit of `raw` bytes that is encoded already.
    pub(crate) fn push(&mut self, hash: Hash, encoding: Encoding, raw: u16, body: &[u8]) {
        let len = body.len() as u16;
        self.bytes.extend_from_slice(&head(hash, encoding, raw, len));
        self.bytes.extend_from_slice(body);
        self.records.push(Record { hash, encoding, raw, body: len });
    }

    /// How many units these are.
    pub(crate) const fn units(&self) -> usize {
        self.records.len()
    }

    /// Bytes of all of them, heads included.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Each with its body.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Record, &[u8])> {
        let mut rest = &self.bytes[..];
        self.records.iter().map(move |record| {
            let (this, behind) = rest.split_at(HEAD + usize::from(record.body));
            rest = behind;
            (record, &this[HEAD..])
        })
    }

    /// Makes it empty; its memory stays.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.records.clear();
    }
}

pub(crate) struct Packs {
    dir: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: HashMap<u32, Arc<File>>,
    /// Packs that may be appended to and that no writer has: number, committed length.
    idle: Vec<(u32, u64)>,
    next: u32,
    /// Packs that were found shorter than committed, and their length.
    short: HashMap<u32, u64>,
}

/// A pack in the hands of one writer.
pub(crate) struct OpenPack {
    pub(crate) number: u32,
    pub(crate) file: Arc<File>,
    /// Committed bytes.
    pub(crate) base: u64,
    /// Bytes written.
    pub(crate) len: u64,
    /// How far the kernel was told to bring them to the disk.
    pub(crate) begun: u64,
}

/// Bytes after which the kernel begins to write, so that the sync of a commit finds little left.
const BEGIN: u64 = 8 << 20;

impl OpenPack {
    /// Appends `records` and adds where each lies to `places`.
    pub(crate) fn append(
        &mut self,
        records: &Records,
        places: &mut Vec<(Hash, Loc)>,
    ) -> std::io::Result<()> {
        self.file.write_all_at(&records.bytes, self.len)?;
        let mut offset = self.len;
        places.extend(records.records.iter().map(|&Record { hash, encoding, raw, body }| {
            let loc = Loc { pack: self.number, offset, body, raw, encoding };
            offset += HEAD as u64 + u64::from(body);
            (hash, loc)
        }));
        self.len = offset;
        if let Some(more) = NonZeroU64::new(self.len - self.begun)
            && more.get() >= BEGIN
        {
            // "Not needed" makes Linux start writing what is dirty there, without waiting. It
            // is advice: whether it was taken shows in the sync.
            let _ = rustix::fs::fadvise(&self.file, self.begun, Some(more), Advice::DontNeed);
            self.begun = self.len;
        }
        Ok(())
    }
}

impl Packs {
    /// Opens the packs that the index knows, cuts torn tails, removes what it does not know.
    pub(crate) fn open(
        dir: PathBuf,
        committed: &[(u32, u64)],
        limit: u64,
    ) -> Result<Self, StoreError> {
        let mut state = State { next: 1, ..State::default() };
        for &(number, len) in committed {
            state.next = state.next.max(number.saturating_add(1));
            let path = path(&dir, number);
            let file = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(f) => f,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    tracing::error!(pack = %path.display(), "pack file is missing");
                    continue;
                }
                Err(e) => return Err(StoreError::io("opening", &path)(e)),
            };
            let real = file.metadata().map_err(StoreError::io("reading", &path))?.len();
            if real > len {
                tracing::info!(pack = %path.display(), cut = real - len, "torn tail cut off");
                file.set_len(len).map_err(StoreError::io("cutting", &path))?;
            }
            if real < len {
                tracing::error!(pack = %path.display(), lost = len - real, "pack file is truncated");
                state.short.insert(number, real);
            } else if len < limit {
                state.idle.push((number, len));
            }
            state.files.insert(number, Arc::new(file));
        }
        let entries = std::fs::read_dir(&dir).map_err(StoreError::io("listing", &dir))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|n| n.strip_suffix(".pack")?.parse::<u32>().ok());
            if let Some(number) = number
                && !committed.iter().any(|(n, _)| *n == number)
            {
                tracing::info!(pack = %entry.path().display(), "uncommitted pack file removed");
                std::fs::remove_file(entry.path())
                    .map_err(StoreError::io("removing", &entry.path()))?;
            }
        }
        Ok(Self { dir, limit, state: Mutex::new(state) })
    }

    /// A pack to append to.
    pub(crate) fn take(&self) -> Result<OpenPack, StoreError> {
        let mut s = lock(&self.state);
        if let Some((number, base)) = s.idle.pop()
            && let Some(file) = s.files.get(&number)
        {
            return Ok(OpenPack { number, file: Arc::clone(file), base, len: base, begun: base });
        }
        let number = s.next;
        s.next += 1;
        let path = path(&self.dir, number);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(StoreError::io("making", &path))?;
        File::open(&self.dir)
            .and_then(|d| d.sync_all())
            .map_err(StoreError::io("syncing", &self.dir))?;
        let file = Arc::new(file);
        s.files.insert(number, Arc::clone(&file));
        Ok(OpenPack { number, file, base: 0, len: 0, begun: 0 })
    }

    /// Takes back a pack of which `committed` bytes count; the rest is cut off.
    pub(crate) fn give_back(&self, pack: &OpenPack, committed: u64) {
        if pack.len != committed && pack.file.set_len(committed).is_err() {
            return; // Cut when the store is opened next; nobody appends to it until then.
        }
        if committed < self.limit {
            lock(&self.state).idle.push((pack.number, committed));
        }
    }

    pub(crate) fn file(&self, number: u32) -> Option<Arc<File>> {
        lock(&self.state).files.get(&number).map(Arc::clone)
    }

    /// Asks the kernel to let go of what it holds of the packs, so that they are read from the disk.
    pub(crate) fn let_go(&self) {
        for file in lock(&self.state).files.values() {
            // Advice: what is dirty or mapped stays.
            let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
        }
    }

    /// Whether the pack is there as far as the end of the record at `loc`.
    pub(crate) fn reaches(&self, loc: &Loc) -> bool {
        let s = lock(&self.state);
        let end = loc.offset + HEAD as u64 + u64::from(loc.body);
        s.files.contains_key(&loc.pack) && s.short.get(&loc.pack).is_none_or(|len| end <= *len)
    }

    pub(crate) fn path(&self, number: u32) -> PathBuf {
        path(&self.dir, number)
    }

    /// Takes pack `number` of `len` bytes away from future writers; false when a writer has it now.
    pub(crate) fn withdraw(&self, number: u32, len: u64) -> bool {
        let mut s = lock(&self.state);
        let before = s.idle.len();
        s.idle.retain(|(n, _)| *n != number);
        s.idle.len() < before || len >= self.limit
    }

    /// Removes a pack file that the index no longer names. Readers that have it open go on.
    pub(crate) fn remove(&self, number: u32) -> Result<(), StoreError> {
        lock(&self.state).files.remove(&number);
        let path = self.path(number);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io("removing", &path)(e))
            }
            _ => Ok(()),
        }
    }

    /// Whether `record` (head and body) is the one that the index expects at `loc`.
    pub(crate) fn head_matches(record: &[u8], hash: Hash, loc: &Loc) -> bool {
        record.get(..HEAD) == Some(&head(hash, loc.encoding, loc.raw, loc.body)[..])
    }
}

fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:08}.pack"))
}
