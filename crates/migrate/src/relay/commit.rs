//! Where a destination's relay writes down that the machine is to run here, and later that all of
//! its memory is here, each before anybody is told.
//!
//! ```text
//! QEMU: PONG 3 -> relay: '1' over the first '0', fdatasync -> status, and PONG 3 to the source
//! QEMU: SHUT 0 -> relay: '1' over the second '0', fdatasync -> status, and SHUT 0 to the source
//! ```
//!
//! A host that dies before that has not taken the machine, and one that dies after it has: the
//! source is told so by whoever reads the file, and never learns of a commit that nothing here knows
//! of. Bytes are overwritten and none is added, so that a full disk is no reason to fail. A file
//! whose second byte is another is one of a release that has not written down the memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Mutex;

use super::RelayError;

/// What a byte of the file says before it has come to that, and from then on.
const NOT_YET: u8 = b'0';
const DONE: u8 = b'1';

/// What such a file says that no relay has written to.
pub const NOT_COMMITTED: &[u8] = b"00";

/// Whether a file that says this tells of the commit point.
#[must_use]
pub fn says_committed(bytes: &[u8]) -> bool {
    bytes.first() == Some(&DONE)
}

/// Whether a file that says this tells that all of memory has come; `None` where it would not tell.
#[must_use]
pub fn says_all_memory(bytes: &[u8]) -> Option<bool> {
    match bytes.get(1) {
        Some(&DONE) => Some(true),
        Some(&NOT_YET) => Some(false),
        _ => None,
    }
}

/// What is written down, by its place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// The machine is to run here.
    Runs,
    /// All of its memory is here.
    AllMemory,
}

impl Word {
    const fn place(self) -> u64 {
        match self {
            Self::Runs => 0,
            Self::AllMemory => 1,
        }
    }
}

/// The file, when the relay was given one.
#[derive(Debug, Default)]
pub(super) struct CommitFile(Option<Arc<Mutex<File>>>);

impl CommitFile {
    pub(super) fn new(file: Option<File>) -> Self {
        Self(file.map(|f| Arc::new(Mutex::new(f))))
    }

    /// Writes a word down; on disk when this returns. Once more is as once.
    pub(super) async fn write(&self, word: Word) -> Result<(), RelayError> {
        let Some(file) = &self.0 else { return Ok(()) };
        let began = Instant::now();
        let file = Arc::clone(file).lock_owned().await;
        let written = tokio::task::spawn_blocking(move || {
            put(&file, word, DONE).inspect_err(|_| {
                // It may say either now, and the daemon goes by the status.
                let _ = put(&file, word, NOT_YET);
            })
        });
        written
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)))
            .map_err(RelayError::NotWritten)?;
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(micros, ?word, "it is written down");
        Ok(())
    }

    /// Waits until no write is under way: what was given up has then been written, or never will
    /// be.
    pub(super) async fn settle(&self) {
        if let Some(file) = &self.0 {
            let _ = file.lock().await;
        }
    }
}

/// Writes down that all of memory is there, where a daemon has seen that by itself.
///
/// # Errors
/// What the file system tells.
pub fn write_all_memory(file: &File) -> std::io::Result<()> {
    put(file, Word::AllMemory, DONE)
}

fn put(file: &File, word: Word, says: u8) -> std::io::Result<()> {
    file.write_all_at(&[says], word.place())?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_word_is_in_the_file_when_it_is_passed_on() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("ran");
        std::fs::write(&path, NOT_COMMITTED).expect("made");
        let read = || std::fs::read(&path).expect("there");
        let file = File::options().write(true).open(&path).expect("opened");
        let commit = CommitFile::new(Some(file));
        assert!(!says_committed(&read()) && !says_committed(b""));
        assert_eq!(says_all_memory(&read()), Some(false));
        for (word, all) in [(Word::Runs, false), (Word::AllMemory, true), (Word::Runs, true)] {
            commit.write(word).await.expect("written");
            assert!(says_committed(&read()));
            assert_eq!(says_all_memory(&read()), Some(all), "{word:?}");
            assert_eq!(read().len(), NOT_COMMITTED.len(), "no more room is needed");
        }
        for before in [&b"1\n"[..], b"1", b""] {
            assert_eq!(says_all_memory(before), None);
        }
        commit.settle().await;
        let none = CommitFile::new(None);
        none.write(Word::Runs).await.expect("a relay without one is as it was");
    }

    #[tokio::test]
    async fn a_word_that_cannot_be_written_is_an_error() {
        let full = File::options().write(true).open("/dev/full").expect("opened");
        let e = CommitFile::new(Some(full)).write(Word::Runs).await.expect_err("full");
        assert!(e.in_full().contains("No space left"), "{}", e.in_full());
    }
}
