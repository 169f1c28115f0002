//! A substrate as a file, and what comes in.
//!
//! File form (little-endian):
//!
//! ```text
//! "GWSA" u16 version(1) | u32 length, substrate.json | state | pages | disk   (lengths as in it)
//! | u64 units | units x { 32 bytes hash, u8 encoding, u16 unit length, u16 body length, body }
//! | 32 bytes BLAKE3 of all before
//! ```

use std::collections::HashSet;
use std::io::{Read, Write};
use std::path::Path;

use godwit_store::{Effort, Encoder, Encoding, PageMap, Store, UNIT, Writer, decode, zero_hash};
use godwit_types::{Hash, Name, SubstrateId, SubstrateKind};

use crate::coming::Coming;
use crate::error::SubstrateError;
use crate::manifest::{MAX_JSON, Part, Substrate, disk_map, memory_map};
use crate::pool::{Parts, Pool};
use crate::turns::Turn;

const MAGIC: &[u8; 4] = b"GWSA";
const VERSION: u16 = 1;

/// The parts of a substrate that are no units, as a peer sends them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// `substrate.json`.
    pub json: Vec<u8>,
    /// Device state.
    pub state: Vec<u8>,
    /// Page map of the memory.
    pub pages: Vec<u8>,
    /// Page map of the disk.
    pub disk: Option<Vec<u8>>,
}

/// What a substrate becomes where it comes in, as far as that is not what it brings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImportAs {
    /// Whose it is.
    pub owner: Option<Name>,
    /// Its name. Under a name of its own it is another substrate, with an id of its own.
    pub name: Option<Name>,
    /// The content that it must have, as [`Substrate::content`] tells it, unless any will do.
    pub content: Option<Hash>,
    /// Its id.
    pub id: Option<SubstrateId>,
    /// What says that it is public becomes restricted.
    pub not_public: bool,
    /// The same, unless its machine was generalised.
    pub not_public_as_it_was: bool,
    /// The substrates of this pool whose units it may name without bringing them; all that the
    /// store has when left out. For what a user brings: whoever names a unit gets to read it.
    pub among: Option<Vec<SubstrateId>>,
}

/// A substrate that is coming in. Dropped without [`Import::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct Import {
    pool: Pool,
    substrate: Substrate,
    parts: Parts,
    hashes: usize,
    lacking: HashSet<Hash>,
    /// What was lacking at first, as the substrate has it.
    order: Vec<Hash>,
    /// Units that must come though the store has them, for somebody else, and what has come of
    /// them: counted as if they had been new, so that the size does not tell what others have.
    stored_already: HashSet<Hash>,
    stored_already_bytes: u64,
    writer: Writer,
    /// What has come is kept there, if it is to be kept.
    coming: Option<Coming>,
    _turn: Turn,
}

impl Import {
    /// Checks `bundle` in full. Blocks while another import of the same substrate goes on.
    ///
    /// # Errors
    /// [`SubstrateError::Damaged`], [`SubstrateError::Pages`], [`SubstrateError::Exists`],
    /// [`SubstrateError::OtherContent`].
    pub fn begin(pool: &Pool, bundle: Bundle, becomes: ImportAs) -> Result<Self, SubstrateError> {
        Self::begin_as(pool, bundle, becomes, false)
    }

    /// As [`Import::begin`]; what comes is kept for another try, where this one breaks off.
    pub(crate) fn begin_kept(
        pool: &Pool,
        bundle: Bundle,
        becomes: ImportAs,
    ) -> Result<Self, SubstrateError> {
        Self::begin_as(pool, bundle, becomes, true)
    }

    fn begin_as(
        pool: &Pool,
        bundle: Bundle,
        becomes: ImportAs,
        kept: bool,
    ) -> Result<Self, SubstrateError> {
        let mut substrate = Substrate::parse(&bundle.json, "the substrate's manifest")?;
        let Bundle { state, pages, disk, .. } = &bundle;
        let same = |part: Part, content: &[u8]| Part::of(content) == part;
        let whole = same(substrate.state, state)
            && same(substrate.pages, pages)
            && match (&substrate.disk, disk) {
                (Some(part), Some(content)) => same(*part, content),
                (None, None) => true,
                _ => false,
            };
        if !whole {
            return Err(SubstrateError::damaged(
                "the substrate's bundle",
                "a part does not have the hash in the manifest",
            ));
        }
        let found = substrate.content();
        if let Some(wanted) = becomes.content.filter(|wanted| *wanted != found) {
            return Err(SubstrateError::OtherContent { name: substrate.name, wanted, found });
        }
        let (mut hashes, mut seen) = (Vec::new(), HashSet::from([zero_hash()]));
        let memory = memory_map(pages, substrate.shape.memory, "the memory")?;
        let blocks = disk.as_deref().map(|d| disk_map(d, "the disk")).transpose()?;
        for map in [Some(&memory), blocks.as_ref()].into_iter().flatten() {
            hashes.extend(map.entries().iter().map(|(_, h)| *h).filter(|h| seen.insert(*h)));
        }
        if let Some(owner) = &becomes.owner {
            substrate.owner = owner.clone();
        }
        if let Some(name) = becomes.name.as_ref().filter(|n| **n != substrate.name) {
            substrate.name = name.clone();
            substrate.id = SubstrateId::new();
        }
        substrate.id = becomes.id.unwrap_or(substrate.id);
        let as_it_was = becomes.not_public_as_it_was && !substrate.generalised;
        if (becomes.not_public || as_it_was) && substrate.kind == SubstrateKind::Public {
            substrate.kind = SubstrateKind::Restricted;
        }
        let turn = pool.turn(substrate.id);
        pool.is_free(substrate.id, &substrate.name)?;
        let (coming, came) = match kept {
            true => Coming::open(pool, substrate.id, &bundle).map(|(c, came)| (Some(c), came))?,
            false => (None, HashSet::new()),
        };
        let mut writer = pool
            .store()
            .writer(substrate.id.into(), Effort::Small)
            .map_err(SubstrateError::store("opening the store"))?;
        let mut order = writer.hold(&hashes).map_err(SubstrateError::store("looking for units"))?;
        let mut stored_already = HashSet::new();
        if let Some(among) = &becomes.among {
            let mut known = came;
            for id in among {
                match pool.units(*id) {
                    Ok(units) => known.extend(units),
                    Err(SubstrateError::NotFound(_)) => {}
                    Err(e) => return Err(e),
                }
            }
            let not_here: HashSet<Hash> = order.iter().copied().collect();
            let must_come = |h: &&Hash| !known.contains(h) || not_here.contains(h);
            order = hashes.iter().filter(must_come).copied().collect();
            stored_already.extend(order.iter().filter(|h| !not_here.contains(h)));
        }
        Ok(Self {
            pool: pool.clone(),
            substrate,
            parts: Parts { state: bundle.state, pages: bundle.pages, disk: bundle.disk },
            hashes: hashes.len(),
            lacking: order.iter().copied().collect(),
            order,
            stored_already,
            stored_already_bytes: 0,
            writer,
            coming,
            _turn: turn,
        })
    }

    /// The substrate.
    #[must_use]
    pub const fn substrate(&self) -> &Substrate {
        &self.substrate
    }

    /// The units that this site still lacks, in the order of memory and disk.
    #[must_use]
    pub fn lacking(&self) -> Vec<Hash> {
        self.order.iter().filter(|h| self.lacking.contains(h)).copied().collect()
    }

    /// The distinct units of the substrate, that of zeros left out.
    #[must_use]
    pub const fn units(&self) -> u64 {
        self.hashes as u64
    }

    /// Takes one unit in, after checking it. One that is not lacking is ignored.
    ///
    /// # Errors
    /// A unit that is not what its hash says; [`SubstrateError::NoRoom`].
    pub fn put(
        &mut self,
        hash: Hash,
        encoding: Encoding,
        raw_len: usize,
        body: &[u8],
    ) -> Result<(), SubstrateError> {
        if !self.lacking.contains(&hash) {
            return Ok(());
        }
        if raw_len != UNIT {
            return Err(SubstrateError::damaged(format!("unit {hash}"), "it is not a whole page"));
        }
        let had = self.stored_already.contains(&hash);
        match &mut self.coming {
            Some(coming) => {
                self.pool.room_for(coming.uncommitted() + body.len() as u64)?;
                coming.put((hash, encoding, raw_len), body, had)?;
            }
            None => {
                self.pool.room_for(self.writer.stored().new_bytes + body.len() as u64)?;
                self.writer
                    .put_encoded(hash, encoding, raw_len, body)
                    .map_err(SubstrateError::store("taking a unit in"))?;
                if had {
                    self.stored_already_bytes += godwit_store::UNIT_HEAD + body.len() as u64;
                }
            }
        }
        self.stored_already.remove(&hash);
        self.lacking.remove(&hash);
        Ok(())
    }

    /// Keeps what has come for the next try.
    pub(crate) fn keep(mut self) {
        if let Some(coming) = &mut self.coming
            && let Err(error) = coming.commit()
        {
            tracing::warn!(substrate = %self.substrate.name, %error, "what came last is not kept");
        }
    }

    /// Keeps nothing of it.
    pub(crate) fn give_up(mut self) {
        let Some(coming) = self.coming.take() else { return };
        coming.done();
        let pool = self.pool.clone();
        drop(self);
        if let Err(error) = pool.store().gc() {
            tracing::warn!(%error, "the space of what was given up is not given back yet");
        }
    }

    /// Puts the substrate into the pool.
    ///
    /// # Errors
    /// [`SubstrateError::Damaged`] while units are lacking; as [`Import::put`].
    pub fn finish(mut self) -> Result<Substrate, SubstrateError> {
        if let Some(hash) = self.lacking.iter().next() {
            return Err(SubstrateError::damaged(
                format!("the bundle of {}", self.substrate.name),
                format!("{} units are missing, {hash} among them", self.lacking.len()),
            ));
        }
        let new = self.pool.import_dir(self.substrate.id);
        let mut others = self.stored_already_bytes;
        if let Some(coming) = &mut self.coming {
            coming.commit()?;
            others += coming.bytes();
            // They are the substrate's from now on.
            let held = self.writer.hold(&self.order);
            if let Some(hash) = held.map_err(SubstrateError::store("looking for units"))?.first() {
                let why = format!("unit {hash} came and is not in the store");
                return Err(SubstrateError::damaged(self.substrate.name.to_string(), why));
            }
        }
        let done = self.pool.publish_by(&new, self.substrate, &self.parts, self.writer, others);
        if let Some(coming) = self.coming {
            coming.done();
        }
        done
    }
}

impl Pool {
    /// The parts of a substrate that are no units, each checked.
    ///
    /// # Errors
    /// [`SubstrateError::NotFound`], [`SubstrateError::Damaged`].
    pub fn bundle(&self, id: SubstrateId) -> Result<Bundle, SubstrateError> {
        let docked = self.docked(id)?;
        Ok(Bundle {
            json: docked.substrate.to_json(),
            state: docked.state()?,
            pages: docked.pages()?.encode(),
            disk: docked.disk()?.map(|d| d.encode()),
        })
    }

    /// The distinct units of a substrate: those of its memory, then those of its disk.
    ///
    /// # Errors
    /// As [`Pool::bundle`].
    pub fn units(&self, id: SubstrateId) -> Result<Vec<Hash>, SubstrateError> {
        let docked = self.docked(id)?;
        let maps = [Some(docked.pages()?), docked.disk()?];
        let mut seen = HashSet::from([zero_hash()]);
        let all = maps.iter().flatten().flat_map(PageMap::entries);
        Ok(all.map(|(_, h)| *h).filter(|h| seen.insert(*h)).collect())
    }

    /// Writes a substrate as one file; the bytes written.
    ///
    /// # Errors
    /// As [`Pool::bundle`]; a damaged unit; what `out` says.
    pub fn export(&self, id: SubstrateId, out: impl Write) -> Result<u64, SubstrateError> {
        let name = self.docked(id)?.substrate.name;
        let done = self.export_units(id, out).map_err(|e| e.of(&name));
        self.note_use(id, done.as_ref().err());
        done
    }

    fn export_units(&self, id: SubstrateId, out: impl Write) -> Result<u64, SubstrateError> {
        let bundle = self.bundle(id)?;
        let units = self.units(id)?;
        let mut out = Hashing { inner: out, hasher: blake3::Hasher::new(), bytes: 0 };
        let mut put = |bytes: &[u8]| {
            out.write_all(bytes).map_err(SubstrateError::io("writing", Path::new("the archive")))
        };
        write_head(&bundle, &mut put)?;
        put(&(units.len() as u64).to_le_bytes())?;
        let mut encoder = Encoder::new(Effort::Small);
        for hash in units {
            write_unit(self.store(), &mut encoder, hash, &mut put)?;
        }
        let sum = *out.hasher.finalize().as_bytes();
        out.write_all(&sum)
            .and_then(|()| out.inner.flush())
            .map_err(SubstrateError::io("writing", Path::new("the archive")))?;
        Ok(out.bytes)
    }

    /// Reads a substrate from a file that [`Pool::export`] wrote. Memory use is bounded by the
    /// substrate's small parts; nothing is left when the file turns out to be bad.
    ///
    /// # Errors
    /// [`SubstrateError::Damaged`] for a foreign, truncated or changed file; as [`Import`].
    pub fn import(&self, from: impl Read, becomes: ImportAs) -> Result<Substrate, SubstrateError> {
        let mut from = Hashing { inner: from, hasher: blake3::Hasher::new(), bytes: 0 };
        let (io, bad) =
            (SubstrateError::io, |why: &str| SubstrateError::damaged("the archive", why));
        let bundle = read_head(&mut |out: &mut [u8]| read(&mut from, out))?;
        let mut import = Import::begin(self, bundle, becomes)?;
        let units = u64::from_le_bytes(take(&mut from)?);
        let mut body = [0; UNIT];
        for _ in 0..units {
            let UnitHead { hash, encoding, raw_len, len } =
                take_unit(&mut |out: &mut [u8]| read(&mut from, out), &mut body)?;
            import.put(hash, encoding, raw_len, &body[..len])?;
        }
        let sum = *from.hasher.finalize().as_bytes();
        if take::<32>(&mut from)? != sum {
            return Err(bad("its checksum does not match"));
        }
        let more = from.inner.read(&mut [0]).map_err(io("reading", Path::new("the archive")))?;
        if more > 0 {
            return Err(bad("there is something behind its end"));
        }
        import.finish()
    }
}

/// Tells whether an archive that passes by ends with the checksum of what came before.
#[derive(Debug, Default)]
pub struct ArchiveEnd {
    hasher: blake3::Hasher,
    /// The last bytes so far, at most as many as the checksum has.
    last: Vec<u8>,
}

impl ArchiveEnd {
    /// Takes the next bytes.
    pub fn push(&mut self, part: &[u8]) {
        self.last.extend_from_slice(part);
        let body = self.last.len().saturating_sub(blake3::OUT_LEN);
        self.hasher.update(&self.last[..body]);
        self.last.drain(..body);
    }

    /// Whether what came is an archive from its first byte to its last.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.last == self.hasher.finalize().as_bytes()
    }
}

/// Hashes what passes through.
struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn read<T: Read>(from: &mut Hashing<T>, out: &mut [u8]) -> Result<(), SubstrateError> {
    from.inner.read_exact(out).map_err(|e| {
        if e.kind() == std::io::ErrorKind::UnexpectedEof {
            SubstrateError::damaged("the archive", "it ends too early")
        } else {
            SubstrateError::io("reading", Path::new("the archive"))(e)
        }
    })?;
    from.hasher.update(out);
    from.bytes += out.len() as u64;
    Ok(())
}

fn take<const N: usize>(from: &mut Hashing<impl Read>) -> Result<[u8; N], SubstrateError> {
    let mut out = [0; N];
    read(from, &mut out)?;
    Ok(out)
}

/// Writes the archive form up to its units.
pub(crate) fn write_head(
    bundle: &Bundle,
    put: &mut impl FnMut(&[u8]) -> Result<(), SubstrateError>,
) -> Result<(), SubstrateError> {
    put(MAGIC)?;
    put(&VERSION.to_le_bytes())?;
    put(&(bundle.json.len() as u32).to_le_bytes())?;
    for part in [Some(&bundle.json), Some(&bundle.state), Some(&bundle.pages), bundle.disk.as_ref()]
    {
        put(part.map_or(&[], Vec::as_slice))?;
    }
    Ok(())
}

/// Fills a slice from where an archive comes from, or fails.
type Fill<'a> = dyn FnMut(&mut [u8]) -> Result<(), SubstrateError> + 'a;

/// Reads what [`write_head`] wrote. Memory use grows with what is really there.
pub(crate) fn read_head(fill: &mut Fill<'_>) -> Result<Bundle, SubstrateError> {
    let bad = |why: &str| SubstrateError::damaged("the archive", why);
    let (mut magic, mut version, mut len) = ([0; 4], [0; 2], [0; 4]);
    fill(&mut magic)?;
    if magic != *MAGIC {
        return Err(bad("it is not an archive of a substrate"));
    }
    fill(&mut version)?;
    let version = u16::from_le_bytes(version);
    if version != VERSION {
        return Err(bad(&format!("version {version} is not known here ({VERSION} is)")));
    }
    fill(&mut len)?;
    let len = u64::from(u32::from_le_bytes(len));
    if len > MAX_JSON {
        return Err(bad("its manifest is longer than allowed"));
    }
    let json = take_many(fill, len)?;
    let substrate = Substrate::parse(&json, "the archive's manifest")?;
    let state = take_many(fill, substrate.state.bytes)?;
    let pages = take_many(fill, substrate.pages.bytes)?;
    let disk = substrate.disk.map(|d| take_many(fill, d.bytes)).transpose()?;
    Ok(Bundle { json, state, pages, disk })
}

/// Writes one unit of the archive form, as it is stored or smaller.
pub(crate) fn write_unit(
    store: &Store,
    encoder: &mut Encoder,
    hash: Hash,
    put: &mut impl FnMut(&[u8]) -> Result<(), SubstrateError>,
) -> Result<(), SubstrateError> {
    let (mut raw, mut smaller) = ([0; UNIT], Vec::new());
    let unit = store.get_encoded(&hash)?;
    let (mut encoding, mut body) = (unit.encoding, &unit.body[..]);
    if encoding == Encoding::Lz4 && unit.raw_len <= UNIT {
        let raw = &mut raw[..unit.raw_len];
        decode(encoding, body, raw)
            .map_err(|e| SubstrateError::damaged(format!("unit {hash}"), e.to_string()))?;
        let other = encoder.encode(raw, &mut smaller);
        if smaller.len() < body.len() {
            (encoding, body) = (other, &smaller);
        }
    }
    put(&hash.0)?;
    put(&[encoding as u8])?;
    put(&(unit.raw_len as u16).to_le_bytes())?;
    put(&(body.len() as u16).to_le_bytes())?;
    put(body)
}

/// What stands before the bytes of a unit.
pub(crate) struct UnitHead {
    pub(crate) hash: Hash,
    pub(crate) encoding: Encoding,
    pub(crate) raw_len: usize,
    /// Bytes of its body.
    pub(crate) len: usize,
}

/// Reads what [`write_unit`] wrote; its body is at the front of `body`.
pub(crate) fn take_unit(
    fill: &mut Fill<'_>,
    body: &mut [u8; UNIT],
) -> Result<UnitHead, SubstrateError> {
    let bad = |why: &str| SubstrateError::damaged("the archive", why);
    let (mut hash, mut encoding, mut raw_len, mut len) = ([0; 32], [0; 1], [0; 2], [0; 2]);
    fill(&mut hash)?;
    fill(&mut encoding)?;
    fill(&mut raw_len)?;
    fill(&mut len)?;
    let encoding = Encoding::from_u8(encoding[0]).ok_or_else(|| bad("an encoding is not known"))?;
    let len = usize::from(u16::from_le_bytes(len));
    fill(body.get_mut(..len).ok_or_else(|| bad("a unit is longer than allowed"))?)?;
    let raw_len = usize::from(u16::from_le_bytes(raw_len));
    Ok(UnitHead { hash: Hash(hash), encoding, raw_len, len })
}

/// Reads `len` bytes, growing with what is really there.
fn take_many(fill: &mut Fill<'_>, len: u64) -> Result<Vec<u8>, SubstrateError> {
    let mut out = Vec::new();
    let mut left = usize::try_from(len)
        .map_err(|_| SubstrateError::damaged("the archive", "a part is longer than allowed"))?;
    while left > 0 {
        let n = left.min(1 << 20);
        let at = out.len();
        out.resize(at + n, 0);
        fill(&mut out[at..])?;
        left -= n;
    }
    Ok(out)
}
