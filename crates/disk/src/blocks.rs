//! Which block of a base image has given content: much of a guest's memory is what it read from its
//! disk.
//!
//! ```text
//! file: "GWBLKIX1" | BLAKE3 of what follows (32) | { u64 key | u32 block } sorted by key, big-endian
//! ```
//!
//! A key is the start of a block's BLAKE3. An index only tells where to look: who uses it compares the
//! bytes. It is derived, and made again when it is missing or damaged.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use godwit_types::BLOCK_SIZE;
use rustix::fs::SeekFrom;

const MAGIC: &[u8; 8] = b"GWBLKIX1";
const HASH: usize = blake3::OUT_LEN;
const ENTRY: usize = 12;
const BLOCK: u64 = BLOCK_SIZE as u64;
/// Bytes of the image that are read in one go.
const WINDOW: usize = 1 << 20;
/// The most blocks that are indexed: 64 GiB of content, 192 MiB of index.
const MOST: usize = 16 << 20;

/// The blocks of a base image by their content.
#[derive(Debug)]
pub struct BlockIndex {
    /// The entries, one behind the other.
    bytes: Vec<u8>,
}

fn key(block: &[u8]) -> u64 {
    let hash = blake3::hash(block);
    hash.as_bytes().first_chunk().map_or(0, |start| u64::from_be_bytes(*start))
}

fn key_of(entry: &[u8; ENTRY]) -> u64 {
    entry.first_chunk().map_or(0, |start| u64::from_be_bytes(*start))
}

impl BlockIndex {
    /// Reads a raw image and indexes each of its 4 KiB blocks that is not zeros; of equal ones the
    /// first. An image that is larger than is indexed gets its first part indexed.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn build(image: &File) -> io::Result<Self> {
        let len = image.metadata()?.len() / BLOCK * BLOCK;
        let mut entries = Vec::new();
        let mut window = vec![0; WINDOW];
        let mut at = 0;
        while let Some((from, to)) = next_data(image, at, len)? {
            let part = &mut window[..(to - from).min(WINDOW as u64) as usize];
            image.read_exact_at(part, from)?;
            at = from + part.len() as u64;
            for (i, block) in part.chunks_exact(BLOCK_SIZE).enumerate() {
                let Ok(number) = u32::try_from(from / BLOCK + i as u64) else { break };
                if entries.len() < MOST && block.iter().any(|b| *b != 0) {
                    let mut entry = [0; ENTRY];
                    entry[..8].copy_from_slice(&key(block).to_be_bytes());
                    entry[8..].copy_from_slice(&number.to_be_bytes());
                    entries.push(entry);
                }
            }
        }
        entries.sort_unstable();
        entries.dedup_by_key(|entry| key_of(entry));
        Ok(Self { bytes: entries.into_flattened() })
    }

    /// Writes the index to `path`, where it appears whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut temp = path.as_os_str().to_owned();
        temp.push(format!(".new-{}", std::process::id()));
        let write = || {
            let mut file = File::create(&temp)?;
            file.write_all(MAGIC)?;
            file.write_all(blake3::hash(&self.bytes).as_bytes())?;
            file.write_all(&self.bytes)?;
            std::fs::rename(&temp, path)
        };
        write().inspect_err(|_| {
            let _ = std::fs::remove_file(&temp);
        })
    }

    /// Reads an index that [`BlockIndex::save`] wrote.
    ///
    /// # Errors
    /// It cannot be read, is none, or is damaged.
    pub fn load(file: &File) -> io::Result<Self> {
        let bad = |why| io::Error::new(io::ErrorKind::InvalidData, why);
        let most = (MAGIC.len() + HASH + MOST * ENTRY) as u64;
        let len = file.metadata()?.len();
        if len > most {
            return Err(bad("an index of blocks that is too large"));
        }
        let mut from = file;
        let mut head = [0; MAGIC.len() + HASH];
        from.read_exact(&mut head)?;
        if !head.starts_with(MAGIC) {
            return Err(bad("no index of blocks"));
        }
        let mut bytes = Vec::with_capacity(len as usize - head.len().min(len as usize));
        from.take(most).read_to_end(&mut bytes)?;
        let whole = bytes.len() % ENTRY == 0;
        if !whole || blake3::hash(&bytes).as_bytes()[..] != head[MAGIC.len()..] {
            return Err(bad("a damaged index of blocks"));
        }
        Ok(Self { bytes })
    }

    /// A block that may have the content `bytes`, to be compared.
    #[must_use]
    pub fn find(&self, bytes: &[u8]) -> Option<u32> {
        let wanted = key(bytes);
        let at = self.entries().binary_search_by_key(&wanted, key_of).ok()?;
        self.entries()[at].last_chunk().map(|number| u32::from_be_bytes(*number))
    }

    fn entries(&self) -> &[[u8; ENTRY]] {
        self.bytes.as_chunks().0
    }

    /// How many blocks are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether the image has no content.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// The next stretch of data at or behind `at`, widened to whole blocks.
fn next_data(image: &File, at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let data = match rustix::fs::seek(image.as_fd(), SeekFrom::Data(at)) {
        Ok(n) => n,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let to = rustix::fs::seek(image.as_fd(), SeekFrom::Hole(data))?;
    let from = (data / BLOCK * BLOCK).max(at);
    let to = to.next_multiple_of(BLOCK).min(len);
    Ok((from < to).then_some((from, to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(blocks: &[u8]) -> File {
        let file = tempfile::tempfile().expect("a file");
        for (n, fill) in blocks.iter().enumerate().filter(|(_, fill)| **fill != 0) {
            file.write_all_at(&[*fill; BLOCK_SIZE], n as u64 * BLOCK).expect("written");
        }
        file.set_len(blocks.len() as u64 * BLOCK + 100).expect("sized");
        file
    }

    #[test]
    fn blocks_are_found_by_their_content() {
        let index = BlockIndex::build(&image(&[5, 0, 7, 7, 0, 9])).expect("indexed");
        assert_eq!(index.len(), 3);
        let found = |fill: u8| index.find(&[fill; BLOCK_SIZE]);
        assert_eq!([5, 7, 9, 0, 8].map(found), [Some(0), Some(2), Some(5), None, None]);
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("index");
        index.save(&path).expect("saved");
        let read = BlockIndex::load(&File::open(&path).expect("there")).expect("loaded");
        assert_eq!(read.find(&[9; BLOCK_SIZE]), Some(5));
        assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_damaged_index_is_none() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("index");
        BlockIndex::build(&image(&[5, 6, 7])).expect("indexed").save(&path).expect("saved");
        let whole = std::fs::read(&path).expect("read");
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 4;
            std::fs::write(&path, bytes).expect("written");
            BlockIndex::load(&File::open(&path).expect("there")).expect_err("damaged");
        }
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).expect("written");
            BlockIndex::load(&File::open(&path).expect("there")).expect_err("cut");
        }
    }
}
