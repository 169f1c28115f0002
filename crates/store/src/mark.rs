//! The number of a database's last commit, kept beside it. A database of two commit slots takes the
//! older one when the newer is damaged, and says nothing; the number that it then has is smaller than
//! the one beside it.
//!
//! ```text
//! transaction: all changes, number n  -->  fsync  -->  n into the file beside it
//! ```
//! The file is written after the commit and not synced: after a crash it may be behind, never ahead.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const MAGIC: [u8; 8] = *b"gwmark1\n";
/// Bytes of the magic number, the commit's and their check.
const LEN: usize = 24;

/// The file beside a database.
#[derive(Debug)]
pub struct CommitMark {
    file: File,
    last: Mutex<u64>,
}

/// What a mark says of the last commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marked {
    /// Nothing: there is none yet, or somebody has removed it to take the database as it is.
    Nothing,
    /// The file is damaged.
    Damaged,
    /// The number of the last commit that is known to have been on the disk.
    At(u64),
}

impl CommitMark {
    /// Opens the file at `path`, making it when it is not there.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(path: &Path) -> io::Result<(Self, Marked)> {
        let mut options = File::options();
        let file =
            options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let mut bytes = [0; LEN + 1];
        let mut len = 0;
        while len < bytes.len() {
            match file.read_at(&mut bytes[len..], len as u64)? {
                0 => break,
                n => len += n,
            }
        }
        let marked = match (len, bytes.first_chunk()) {
            (0, _) => Marked::Nothing,
            (LEN, Some(bytes)) => decode(bytes).map_or(Marked::Damaged, Marked::At),
            _ => Marked::Damaged,
        };
        Ok((Self { file, last: Mutex::new(0) }, marked))
    }

    /// The last commit of this run.
    #[must_use]
    pub fn last(&self) -> u64 {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commit `n` is on the disk. A mark that cannot be written stays behind, which only makes it
    /// say less.
    pub fn set(&self, n: u64) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if n < *last {
            return;
        }
        *last = n;
        if let Err(error) = self.file.write_all_at(&encode(n), 0) {
            tracing::warn!(%error, "the number of a commit is not written down beside its database");
        }
    }
}

fn encode(n: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&n.to_le_bytes());
    let check = blake3::hash(&bytes[..16]);
    bytes[16..].copy_from_slice(&check.as_bytes()[..8]);
    bytes
}

fn decode(bytes: &[u8; LEN]) -> Option<u64> {
    let n = u64::from_le_bytes(*bytes[8..].first_chunk()?);
    (encode(n) == *bytes).then_some(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_outlives_its_process_and_one_flipped_bit_is_seen() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("mark");
        let (mark, found) = CommitMark::open(&path).expect("made");
        assert_eq!(found, Marked::Nothing);
        for n in [3, 7, 5] {
            mark.set(n);
        }
        assert_eq!(CommitMark::open(&path).expect("there").1, Marked::At(7));
        let sound = std::fs::read(&path).expect("read");
        for at in 0..sound.len() {
            let mut bytes = sound.clone();
            bytes[at] ^= 4;
            std::fs::write(&path, bytes).expect("written");
            assert_eq!(CommitMark::open(&path).expect("there").1, Marked::Damaged);
        }
        std::fs::write(&path, &sound[..20]).expect("cut");
        assert_eq!(CommitMark::open(&path).expect("there").1, Marked::Damaged);
    }
}
